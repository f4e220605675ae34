-- A reference is paid once: the same call again returns the same job, another
-- payload is refused.
\ir fresh.psql
SELECT plan(27);

SELECT payout_create_job('settlement:1', '[{"user_id": "a", "amount": 100}, {"user_id": "b", "amount": 200}]',
                         platform_fee => 10) AS job \gset

-- ---------------------------------------------------------------------------
-- The same payload
-- ---------------------------------------------------------------------------

SELECT is(payout_create_job('settlement:1', '[{"user_id": "a", "amount": 100}, {"user_id": "b", "amount": 200}]',
                            platform_fee => 10), :'job', 'the same call returns the same job');
SELECT is(payout_create_job('settlement:1', '[{"amount": 200, "user_id": "b"}, {"amount": 100.0, "user_id": "a", "x": 1}]',
                            platform_fee => 10), :'job', 'in any order of winners');
SELECT is(payout_create_job('settlement:1', ARRAY['b', 'a'], ARRAY[200, 100], platform_fee => 10), :'job',
    'and as arrays');
SELECT is(payout_create_job('settlement:1', ARRAY['b', 'a'], ARRAY[200, 100], platform_fee => 10, currency => 'USD',
                            source_account => '@outside', challenge_id => NULL), :'job',
    'and with the defaults written out');
SELECT is(payout_create_job('settlement:1', ARRAY['b', 'a'], ARRAY[200, 100], platform_fee => 10, priority => 9,
                            batch_size => 1, run_at => '2100-01-01', metadata => '{"try": 2}'), :'job',
    'and scheduled otherwise');
SELECT results_eq(
    'SELECT job_id, priority, batch_size, metadata FROM payout_jobs',
    format($$VALUES (%s::bigint, 0, 500, NULL::jsonb)$$, :job), 'there is one job, as it was created first');
SELECT is((SELECT count(*)::int FROM payout_entries), 2, 'with two entries');
SELECT is(payout_balance('@outside'), -310::bigint, 'and funded once');

-- ---------------------------------------------------------------------------
-- Another payload
-- ---------------------------------------------------------------------------

SELECT throws_ok('SELECT payout_create_job(''settlement:1'', ' || call || ')', '23505', NULL, what)
  FROM (VALUES
    ($$ARRAY['a', 'b'], ARRAY[100, 201], platform_fee => 10$$,                    'another amount'),
    ($$ARRAY['a', 'b'], ARRAY[200, 100], platform_fee => 10$$,                    'amounts exchanged'),
    ($$ARRAY['a', 'c'], ARRAY[100, 200], platform_fee => 10$$,                    'another user'),
    ($$ARRAY['a'], ARRAY[100], platform_fee => 10$$,                              'a user less'),
    ($$ARRAY['a', 'b', 'c'], ARRAY[100, 200, 1], platform_fee => 10$$,            'a user more'),
    ($$ARRAY['a', 'b'], ARRAY[100, 200], platform_fee => 11$$,                    'another fee'),
    ($$ARRAY['a', 'b'], ARRAY[100, 200], platform_fee => 10, total_pool => 400$$, 'another pool'),
    ($$ARRAY['a', 'b'], ARRAY[100, 200], platform_fee => 10, currency => 'EUR'$$, 'another currency'),
    ($$ARRAY['a', 'b'], ARRAY[100, 200], platform_fee => 10, challenge_id => 1$$, 'another challenge'),
    ($$ARRAY['a', 'b'], ARRAY[100, 200], platform_fee => 10, source_account => '@platform'$$, 'another source account')
  ) AS t (call, what);
SELECT throws_ok($$SELECT payout_create_job_from('settlement:1', 'SELECT ''a'' AS user_id, 310 AS amount')$$,
    '23505', NULL, 'a query instead');
SELECT throws_like($$SELECT payout_create_job('settlement:1', ARRAY['a'], ARRAY[1])$$,
    '%"settlement:1"%job ' || :'job' || '%', 'the message names the reference and the job');

-- ---------------------------------------------------------------------------
-- After it is paid
-- ---------------------------------------------------------------------------

CALL payout_process();
SELECT is(payout_create_job('settlement:1', ARRAY['b', 'a'], ARRAY[200, 100], platform_fee => 10), :'job',
    'a finished job is returned too');
CALL payout_process();
SELECT results_eq('SELECT user_id, balance FROM payout_accounts ORDER BY 1',
    $$VALUES ('a' COLLATE "C", 100::bigint), ('b', 200)$$, 'and nobody is paid again');

-- ---------------------------------------------------------------------------
-- Queries; and a creation that is rolled back
-- ---------------------------------------------------------------------------

SELECT payout_create_job_from('query:1', 'SELECT ''q'' AS user_id, 5 AS amount') AS query \gset
CALL payout_process();
SELECT is(payout_create_job_from('query:1', 'SELECT ''q'' AS user_id, 5 AS amount'), :'query',
    'a query is the same by its text');
CALL payout_process();
SELECT is(payout_balance('q'), 5::bigint, 'and is paid once');
SELECT throws_ok($$SELECT payout_create_job_from('query:1', 'SELECT ''q'' AS user_id, 6 AS amount')$$,
    '23505', NULL, 'another query is refused');

BEGIN;
SELECT payout_create_job('undone', ARRAY['a'], ARRAY[1]) AS undone \gset
ROLLBACK;
SELECT lives_ok($$SELECT payout_create_job('undone', ARRAY['a'], ARRAY[2])$$,
    'a creation that is rolled back does not take the reference');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
