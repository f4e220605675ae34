-- payout_create_job() and payout_create_job_from(): what they write, and
-- everything that they refuse.
\ir fresh.psql
BEGIN;
SELECT plan(126);

-- ---------------------------------------------------------------------------
-- The forms
-- ---------------------------------------------------------------------------

SELECT payout_create_job('jsonb', '[{"user_id": "b", "amount": 200}, {"user_id": "a", "amount": 100},
    {"amount": 300.0, "user_id": "Z", "note": "other keys are left alone"}]') AS jsonb \gset
SELECT payout_create_job('arrays', ARRAY['b', 'a', 'Z'], ARRAY[200, 100, 300]) AS arrays \gset

SELECT isnt(:jsonb, :arrays, 'each reference has a job of its own');
SELECT results_eq(
    'SELECT reference, status, kind, total_winners, processed_winners, total_pool, platform_fee, amount_paid,
            currency, priority, batch_size, source_account, created_by, run_at = now(), created_at = now(),
            num_nulls(challenge_id, metadata, started_at, completed_at, error)
       FROM payout_jobs ORDER BY job_id',
    $$VALUES ('jsonb', 'queued', 'payout', 3::bigint, 0::bigint, 600::bigint, 0::bigint, 0::bigint,
              'USD', 0, 500, '@outside', current_user, true, true, 5),
             ('arrays', 'queued', 'payout', 3, 0, 600, 0, 0,
              'USD', 0, 500, '@outside', current_user, true, true, 5)$$,
    'what is not said has its default');
SELECT results_eq(
    format('SELECT entry, user_id, amount, status, attempts, error, processed_at FROM payout_entries
             WHERE job_id = %s ORDER BY entry', :jsonb),
    $$VALUES (1, 'Z' COLLATE "C", 300::bigint, 'pending', 0, NULL, NULL::timestamptz),
             (2, 'a', 100, 'pending', 0, NULL, NULL),
             (3, 'b', 200, 'pending', 0, NULL, NULL)$$,
    'entries are numbered in the order of the bytes of user_id');
SELECT results_eq(
    format('SELECT entry, user_id, amount FROM payout_entries WHERE job_id = %s ORDER BY entry', :jsonb),
    format('SELECT entry, user_id, amount FROM payout_entries WHERE job_id = %s ORDER BY entry', :arrays),
    'both forms write the same entries');

SELECT payout_create_job(reference => 'all', user_ids => ARRAY['u1', 'u2'], amounts => ARRAY[1, 2],
    total_pool => 10, platform_fee => 4, challenge_id => 7, currency => 'EUR', priority => -3, batch_size => 1,
    run_at => '2100-01-01 00:00+00', source_account => '@outside', metadata => '{"a": [1]}') AS job \gset
SELECT results_eq(
    format('SELECT total_pool, platform_fee, challenge_id, currency, priority, batch_size, run_at, source_account, metadata
              FROM payout_jobs WHERE job_id = %s', :job),
    $$VALUES (10::bigint, 4::bigint, 7::bigint, 'EUR', -3, 1, '2100-01-01 00:00+00'::timestamptz, '@outside', '{"a": [1]}'::jsonb)$$,
    'every argument is kept');

SELECT payout_create_job('nulls', '[{"user_id": "u", "amount": 1}]', total_pool => NULL, platform_fee => NULL, challenge_id => NULL,
    currency => NULL, priority => NULL, batch_size => NULL, run_at => NULL, source_account => NULL, provider => NULL,
    metadata => NULL) AS job \gset
SELECT results_eq(
    format('SELECT total_pool, platform_fee, currency, priority, batch_size, run_at, source_account FROM payout_jobs WHERE job_id = %s', :job),
    $$VALUES (1::bigint, 0::bigint, 'USD', 0, 500, now(), '@outside')$$,
    'null stands for the default');

SELECT payout_create_job_from('query', 'SELECT ''u'' || i AS user_id, i AS amount FROM generate_series(1, 3) i;  ') AS job \gset
SELECT results_eq(
    format('SELECT status, total_winners, total_pool, progress, amount_paid FROM payout_job_status(%s)', :job),
    $$VALUES ('queued', 0::bigint, NULL::bigint, 0.0000, 0::bigint)$$,
    'a query is not run at creation');
SELECT is_empty(
    format('SELECT FROM payout_entries WHERE job_id = %s', :job), 'so there are no entries yet');
SELECT lives_ok(
    $$SELECT payout_create_job_from('types', 'SELECT ''u''::varchar AS user_id, 1::smallint AS amount')$$,
    'a query may yield other strings and smaller integers');
SELECT lives_ok(
    $$SELECT payout_create_job_from('columns', 'SELECT 1 AS x, ''u'' AS user_id, 2 AS y, 1 AS amount')$$,
    'a query may have further columns');
SELECT lives_ok(
    $$SELECT payout_create_job_from('comment', 'SELECT ''u'' AS user_id, 1 AS amount -- the end')$$,
    'a query may end with a comment');

-- ---------------------------------------------------------------------------
-- Batches
-- ---------------------------------------------------------------------------

SELECT payout_create_job('batches', array_agg('u' || i), array_agg(i), batch_size => 2) AS job
  FROM generate_series(1, 5) i \gset
SELECT results_eq(
    format('SELECT batch_no, first_entry, last_entry, amount, status, attempts FROM payout_batches WHERE job_id = %s ORDER BY 1', :job),
    $$VALUES (1, 1, 2, 3::bigint, 'pending', 0), (2, 3, 4, 7, 'pending', 0), (3, 5, 5, 5, 'pending', 0)$$,
    'the last batch takes what is left');

SET LOCAL payoutq.batch_size = 4;
SELECT payout_create_job('setting', array_agg('u' || i), array_agg(i)) AS job FROM generate_series(1, 8) i \gset
RESET payoutq.batch_size;
SELECT is((SELECT batch_size FROM payout_jobs WHERE job_id = :job), 4, 'batch_size defaults to the setting');
SELECT is((SELECT count(*)::int FROM payout_batches WHERE job_id = :job), 2, 'a whole number of batches has no empty one');

SELECT lives_ok($$SELECT payout_create_job('b1', ARRAY['u'], ARRAY[1], batch_size => 1)$$, 'batch_size 1 is allowed');
SELECT lives_ok($$SELECT payout_create_job('b10000', ARRAY['u'], ARRAY[1], batch_size => 10000)$$, 'batch_size 10000 is allowed');
-- A contest without winners: array_agg() and jsonb_agg() are null.
CREATE FUNCTION pg_temp.hint(call text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    hint text;
BEGIN
    EXECUTE call;
    RETURN 'no error';
EXCEPTION WHEN invalid_parameter_value THEN
    GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    RETURN hint;
END $$;
SELECT matches(pg_temp.hint(format('SELECT payout_create_job(''none'', %s) FROM unnest(''{}''::text[]) u', winners)), 'without winners, create no job', winners)
  FROM unnest(ARRAY['array_agg(u), array_agg(1::bigint)', 'jsonb_agg(u)']) winners;

SELECT throws_ok($$SELECT payout_create_job('b0', ARRAY['u'], ARRAY[1], batch_size => 0)$$, '22023', NULL, 'batch_size 0');
SELECT throws_ok($$SELECT payout_create_job('b-1', ARRAY['u'], ARRAY[1], batch_size => -1)$$, '22023', NULL, 'batch_size -1');
SELECT throws_ok($$SELECT payout_create_job('b10001', ARRAY['u'], ARRAY[1], batch_size => 10001)$$, '22023', NULL, 'batch_size 10001');
SELECT throws_like($$SELECT payout_create_job('b10001', ARRAY['u'], ARRAY[1], batch_size => 10001)$$, '%10001%', 'the message has the value');

-- ---------------------------------------------------------------------------
-- The reference, and what is null
-- ---------------------------------------------------------------------------

SELECT throws_ok($$SELECT payout_create_job(NULL, '[{"user_id": "u", "amount": 1}]')$$, '22023', NULL, 'jsonb: reference null');
SELECT throws_ok($$SELECT payout_create_job('', '[{"user_id": "u", "amount": 1}]')$$, '22023', NULL, 'jsonb: reference empty');
SELECT throws_ok($$SELECT payout_create_job(NULL, ARRAY['u'], ARRAY[1])$$, '22023', NULL, 'arrays: reference null');
SELECT throws_ok($$SELECT payout_create_job_from(NULL, 'SELECT ''u'' AS user_id, 1 AS amount')$$, '22023', NULL, 'query: reference null');
SELECT throws_ok(format('SELECT payout_create_job(%L, ARRAY[''u''], ARRAY[1])', string_agg(md5(i::text), '')), '22023', NULL, 'reference too long')
  FROM generate_series(1, 300) i;
SELECT throws_ok($$SELECT payout_create_job('n', NULL::jsonb)$$, '22023', NULL, 'winners null');
SELECT throws_ok($$SELECT payout_create_job('n', NULL::text[], ARRAY[1])$$, '22023', NULL, 'user_ids null');
SELECT throws_ok($$SELECT payout_create_job('n', ARRAY['u'], NULL::bigint[])$$, '22023', NULL, 'amounts null');
SELECT throws_ok($$SELECT payout_create_job_from('n', NULL)$$, '22023', NULL, 'query null');

-- ---------------------------------------------------------------------------
-- How many winners
-- ---------------------------------------------------------------------------

SET LOCAL payoutq.max_winners = 3;
SELECT lives_ok($$SELECT payout_create_job('w3', array_agg('w' || i), array_agg(i)) FROM generate_series(1, 3) i$$,
    'arrays: as many winners as payoutq.max_winners');
SELECT lives_ok($$SELECT payout_create_job('j3', jsonb_agg(jsonb_build_object('user_id', 'w' || i, 'amount', i))) FROM generate_series(1, 3) i$$,
    'jsonb: as many winners as payoutq.max_winners');
SELECT throws_ok($$SELECT payout_create_job('w4', array_agg('w' || i), array_agg(i)) FROM generate_series(1, 4) i$$,
    '54000', 'too many winners in one call', 'arrays: one more');
SELECT throws_ok($$SELECT payout_create_job('a4', ARRAY['w'], array_agg(i)) FROM generate_series(1, 4) i$$,
    '54000', 'too many winners in one call', 'arrays: one amount more');
SELECT throws_ok($$SELECT payout_create_job('j4', jsonb_agg(jsonb_build_object('user_id', 'w' || i, 'amount', i))) FROM generate_series(1, 4) i$$,
    '54000', 'too many winners in one call', 'jsonb: one more');
SELECT throws_ok($$SELECT * FROM payout_preview_job('p4', ARRAY['a', 'b', 'c', 'd'], ARRAY[1, 2, 3, 4])$$,
    '54000', 'too many winners in one call', 'preview: one more');
SELECT lives_ok($$SELECT payout_create_job_from('q4', 'SELECT ''w'' || i AS user_id, i AS amount FROM generate_series(1, 4) i')$$,
    'a query may yield more');
SELECT throws_ok($$SELECT * FROM payout_preview_job_from('q4', 'SELECT ''w'' || i AS user_id, i AS amount FROM generate_series(1, 4) i')$$,
    '54000', 'too many winners in one call', 'but its preview is a call');
CREATE ROLE winners_operator;
SELECT payout_grant('winners_operator', 'operator');
SET LOCAL ROLE winners_operator;
SELECT throws_ok('SET payoutq.max_winners = 4', '42501', NULL, 'an operator cannot raise it');
RESET ROLE;
RESET payoutq.max_winners;

-- ---------------------------------------------------------------------------
-- Winners as jsonb
-- ---------------------------------------------------------------------------

SELECT throws_ok(format('SELECT payout_create_job(%L, %L::jsonb)', 'bad', winners), code, NULL, what)
  FROM (VALUES
    ('[]',                                           '22023', 'no winners'),
    ('{"user_id": "u", "amount": 1}',                '22P02', 'winners are an object'),
    ('{}',                                           '22P02', 'winners are an empty object'),
    ('"u"',                                          '22P02', 'winners are a string'),
    ('5',                                            '22P02', 'winners are a number'),
    ('null',                                         '22P02', 'winners are a JSON null'),
    ('[5]',                                          '22P02', 'a winner is a number'),
    ('[null]',                                       '22P02', 'a winner is null'),
    ('[[{"user_id": "u", "amount": 1}]]',            '22P02', 'a winner is an array'),
    ('[{"amount": 1}]',                              '22P02', 'no user_id'),
    ('[{"user_id": "u"}]',                           '22P02', 'no amount'),
    ('[{"USER_ID": "u", "amount": 1}]',              '22P02', 'keys are case-sensitive'),
    ('[{"user_id": 7, "amount": 1}]',                '22P02', 'user_id is a number'),
    ('[{"user_id": "u", "amount": "1"}]',            '22P02', 'amount is a string'),
    ('[{"user_id": "u", "amount": true}]',           '22P02', 'amount is a boolean'),
    ('[{"user_id": "u", "amount": {}}]',             '22P02', 'amount is an object'),
    ('[{"user_id": "u", "amount": 1.5}]',            '22P02', 'amount is not an integer'),
    ('[{"user_id": "u", "amount": 0.4}]',            '22P02', 'amount would be rounded to 0'),
    ('[{"user_id": "u", "amount": 9223372036854775808}]', '22003', 'amount above bigint'),
    ('[{"user_id": "u", "amount": 1e300}]',          '22003', 'amount far above bigint'),
    ('[{"user_id": null, "amount": 1}]',             '22023', 'user_id null'),
    ('[{"user_id": "u", "amount": null}]',           '22023', 'amount null'),
    ('[{"user_id": "", "amount": 1}]',               '22023', 'user_id empty'),
    ('[{"user_id": "@platform", "amount": 1}]',      '22023', 'user_id of a system account'),
    ('[{"user_id": "@", "amount": 1}]',              '22023', 'user_id begins with @'),
    ('[{"user_id": "u", "amount": 0}]',              '23514', 'amount 0'),
    ('[{"user_id": "u", "amount": -1}]',             '23514', 'amount negative'),
    ('[{"user_id": "u", "amount": 1}, {"user_id": "v", "amount": 1}, {"user_id": "u", "amount": 2}]',
                                                     '23505', 'a user twice'),
    ('[{"user_id": "u", "amount": 9223372036854775807}, {"user_id": "v", "amount": 1}]',
                                                     '22003', 'the sum overflows')
  ) AS t (winners, code, what);
SELECT lives_ok(
    $$SELECT payout_create_job('exact', '[{"user_id": "u", "amount": 1e2}, {"user_id": "v", "amount": 7.00}]')$$,
    'an integer may be written as 1e2 or 7.00');
SELECT lives_ok(
    $$SELECT payout_create_job('at', '[{"user_id": "a@b", "amount": 1}]')$$, 'a user_id may contain @');
SELECT lives_ok(
    $$SELECT payout_create_job('long', ARRAY[repeat('x', 1000)], ARRAY[1])$$, 'a user_id may have 1000 bytes');
SELECT throws_ok(
    $$SELECT payout_create_job('longer', ARRAY[repeat('x', 1001)], ARRAY[1])$$, '22023', NULL, 'but not 1001');

CREATE FUNCTION pg_temp.message_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN EXECUTE statement; RETURN ''; EXCEPTION WHEN OTHERS THEN RETURN SQLERRM; END $$;
SELECT lives_ok(format('SELECT convert_from(convert_to(pg_temp.message_of(%L), ''UTF8''), ''UTF8'')',
                       'SELECT payout_create_job(''bad'', ARRAY[''@'' || repeat(''ä'', 60)], ARRAY[1])'),
    'a name that is too long for a message is cut between two characters');

-- ---------------------------------------------------------------------------
-- Winners as arrays
-- ---------------------------------------------------------------------------

SELECT throws_ok(format('SELECT payout_create_job(%L, %s::text[], %s::bigint[])', 'bad', users, amounts), code, NULL, what)
  FROM (VALUES
    ($$'{}'$$,            $$'{}'$$,            '22023', 'empty arrays'),
    ($$'{u,v}'$$,         $$'{1}'$$,           '22023', 'more users than amounts'),
    ($$'{u}'$$,           $$'{1,2}'$$,         '22023', 'more amounts than users'),
    ($$'{u,NULL}'$$,      $$'{1,2}'$$,         '22023', 'a user_id null'),
    ($$'{u,v}'$$,         $$'{1,NULL}'$$,      '22023', 'an amount null'),
    ($$'{{u,v}}'$$,       $$'{1,2}'$$,         '22023', 'two dimensions of users'),
    ($$'{u,v}'$$,         $$'{{1,2}}'$$,       '22023', 'two dimensions of amounts'),
    ($$'{u,@outside}'$$,  $$'{1,2}'$$,         '22023', 'arrays: user_id of a system account'),
    ($$'{u,""}'$$,        $$'{1,2}'$$,         '22023', 'arrays: user_id empty'),
    ($$'{u,v}'$$,         $$'{1,0}'$$,         '23514', 'arrays: amount 0'),
    ($$'{u,v}'$$,         $$'{1,-5}'$$,        '23514', 'arrays: amount negative'),
    ($$'{u,u}'$$,         $$'{1,2}'$$,         '23505', 'arrays: a user twice'),
    ($$'{u,v}'$$,         $$'{9223372036854775807,1}'$$, '22003', 'arrays: the sum overflows')
  ) AS t (users, amounts, code, what);
SELECT lives_ok(
    $$SELECT payout_create_job('bounds', '[5:6]={u,v}'::text[], '[0:1]={1,2}'::bigint[])$$,
    'arrays may begin at any index');

-- ---------------------------------------------------------------------------
-- A bad element is named by its position
-- ---------------------------------------------------------------------------

SELECT throws_like(format('SELECT payout_create_job(%L, %L::jsonb)', 'bad', '[{"user_id": "a", "amount": 1}, ' || winner || ']'),
                   '%winner 2 %', winner)
  FROM unnest(ARRAY['{"user_id": "", "amount": 1}', '{"user_id": "@x", "amount": 1}', '{"user_id": "u", "amount": 0}',
                    '{"user_id": "u", "amount": 1.5}', '{"user_id": null, "amount": 1}', '{"user_id": "u"}']) AS winner;
SELECT throws_like($$SELECT payout_create_job('bad', ARRAY['a', 'b', NULL], ARRAY[1, 2, 3])$$, '%user\_ids[3]%', 'user_ids[3]');
SELECT throws_like($$SELECT payout_create_job('bad', ARRAY['a', 'b'], ARRAY[1, NULL])$$, '%amounts[2]%', 'amounts[2]');
SELECT throws_like($$SELECT payout_create_job('bad', ARRAY['a', 'bob', 'bob'], ARRAY[1, 2, 3])$$, '%"bob"%', 'a user twice is named');

-- ---------------------------------------------------------------------------
-- The pool, the fee, the source, the currency
-- ---------------------------------------------------------------------------

SELECT lives_ok($$SELECT payout_create_job('fits', ARRAY['u'], ARRAY[90], total_pool => 100, platform_fee => 10)$$,
    'amounts and fee may take the whole pool');
SELECT throws_ok($$SELECT payout_create_job('small', ARRAY['u'], ARRAY[91], total_pool => 100, platform_fee => 10)$$,
    '23514', NULL, 'amounts and fee above the pool');
SELECT throws_ok($$SELECT payout_create_job('negative', ARRAY['u'], ARRAY[1], total_pool => -1)$$,
    '23514', NULL, 'a negative pool is too small');
SELECT throws_ok($$SELECT payout_create_job('fee', ARRAY['u'], ARRAY[1], platform_fee => -1)$$,
    '23514', NULL, 'platform_fee negative');
SELECT throws_ok($$SELECT payout_create_job('over', ARRAY['u'], ARRAY[9223372036854775807], platform_fee => 1)$$,
    '22003', NULL, 'amounts and fee overflow');
SELECT throws_ok($$SELECT payout_create_job('bad', ARRAY['u'], ARRAY[1], currency => '')$$, '22023', NULL, 'currency empty');
SELECT throws_ok($$SELECT payout_create_job('bad', ARRAY['u'], ARRAY[1], currency => repeat('C', 64))$$, '22023', NULL, 'currency too long');
SELECT throws_ok(format('SELECT payout_create_job(%L, ARRAY[%L], ARRAY[1], source_account => %L)', 'bad', 'u', source),
                 '22023', NULL, format('source_account "%s"', source))
  FROM unnest(ARRAY['', '@', '@job:1', '@nobody']) AS source;
SELECT throws_ok($$SELECT payout_create_job('bad', ARRAY['u'], ARRAY[1], provider => 'stripe')$$, '42704', NULL, 'no such provider');
SELECT throws_like($$SELECT payout_create_job('bad', ARRAY['u'], ARRAY[1], provider => 'stripe')$$, '%"stripe"%', 'the provider is named');

-- ---------------------------------------------------------------------------
-- Queries
-- ---------------------------------------------------------------------------

CREATE TEMP TABLE own_table (user_id text, amount bigint);
CREATE TEMP VIEW own_view AS SELECT * FROM own_table;
SELECT throws_ok(format('SELECT payout_create_job_from(%L, %L)', 'bad', query), code, NULL, what)
  FROM (VALUES
    ('SELECT ''u'' AS user_id, 1.5 AS amount',                 '22023', 'amount of type numeric'),
    ('SELECT ''u'' AS user_id, ''1''::text AS amount',         '22023', 'amount of type text'),
    ('SELECT ''u'' AS user_id',                                '42703', 'a query without amount'),
    ('SELECT 1 AS amount',                                     '42703', 'a query without user_id'),
    ('SELECT user_id, amount FROM no_such_table',              '42P01', 'a query of no such table'),
    ('nonsense',                                               '42601', 'not a query'),
    ('',                                                       '42601', 'an empty query'),
    ('DELETE FROM payoutq.account RETURNING user_id, balance AS amount', '42601', 'not a SELECT'),
    ('SELECT ''u'' AS user_id, 1 AS amount; SELECT 1',         '42601', 'two statements'),
    ('SELECT * FROM own_table',                                '22023', 'a query of a temporary table'),
    ('SELECT * FROM own_view',                                 '22023', 'or of a view of one')
  ) AS t (query, code, what);
SELECT throws_ok($$SELECT payout_create_job_from('bad', 'SELECT ''u'' AS user_id, 1 AS amount', platform_fee => -1)$$,
    '23514', NULL, 'query: platform_fee negative');
SELECT throws_ok($$SELECT payout_create_job_from('bad', 'SELECT ''u'' AS user_id, 1 AS amount', batch_size => 0)$$,
    '22023', NULL, 'query: batch_size 0');
SELECT throws_ok($$SELECT payout_create_job_from('bad', 'SELECT ''u'' AS user_id, 1 AS amount', provider => 'stripe')$$,
    '42704', NULL, 'query: no such provider');

SELECT is_empty($$SELECT FROM payout_jobs WHERE reference IN ('bad', 'n', 'small', 'over', 'fee', 'negative', 'longer', 'b0')$$,
    'what is refused leaves no job');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
ROLLBACK;
