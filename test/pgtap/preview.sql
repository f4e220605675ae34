-- payout_preview_job() and payout_preview_job_from(): what payout_create_job()
-- would do, and nothing done.
\ir fresh.psql
SELECT plan(56);

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.wallet VALUES ('a', 5), ('b', NULL);
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM');
SELECT payout_deposit('b', 70, 'd1'), payout_deposit('sponsor', 100, 'd2') \g /dev/null
SELECT payout_create_job('taken', ARRAY['a'], ARRAY[1], run_at => '2100-01-01') AS taken \gset

-- All that is written anywhere
CREATE FUNCTION pg_temp.contents() RETURNS text LANGUAGE sql AS $$
    SELECT md5(string_agg(t, '|' ORDER BY t)) FROM (
        SELECT to_jsonb(x)::text FROM payoutq.job x UNION ALL SELECT to_jsonb(x)::text FROM payoutq.entry x
        UNION ALL SELECT to_jsonb(x)::text FROM payoutq.batch x UNION ALL SELECT to_jsonb(x)::text FROM payoutq.account x
        UNION ALL SELECT to_jsonb(x)::text FROM payoutq.movement x UNION ALL SELECT to_jsonb(x)::text FROM payoutq.progress x
        UNION ALL SELECT to_jsonb(x)::text FROM app.wallet x) AS all_rows (t)
$$;
SELECT pg_temp.contents() AS before \gset

-- ---------------------------------------------------------------------------
-- What would happen to each entry
-- ---------------------------------------------------------------------------

SELECT results_eq(
    $$SELECT entry, user_id, amount, batch_no, balance_before, balance_after, outcome
        FROM payout_preview_job('p1', '[{"user_id": "c", "amount": 30}, {"user_id": "b", "amount": 20}, {"user_id": "Z", "amount": 10}]', batch_size => 2)
       ORDER BY entry$$,
    $$VALUES (1, 'Z', 10::bigint, 1, NULL::bigint, 10::bigint, 'new account'), (2, 'b', 20, 1, 70, 90, 'credit'),
             (3, 'c', 30, 2, NULL, 30, 'new account')$$,
    'entries as they would be numbered, batches, balances, and whether there is an account');
SELECT results_eq(
    $$SELECT * FROM payout_preview_job('p1', ARRAY['c', 'b', 'Z'], ARRAY[30, 20, 10], batch_size => 2) ORDER BY entry$$,
    $$SELECT * FROM payout_preview_job('p1', '[{"user_id": "c", "amount": 30}, {"user_id": "b", "amount": 20}, {"user_id": "Z", "amount": 10}]',
                                       batch_size => 2) ORDER BY entry$$,
    'the same of arrays');
SELECT results_eq(
    $$SELECT * FROM payout_preview_job_from('p1', 'SELECT * FROM (VALUES (''c'', 30), (''b'', 20), (''Z'', 10)) AS w (user_id, amount); ',
                                            batch_size => 2) ORDER BY entry$$,
    $$SELECT * FROM payout_preview_job('p1', ARRAY['c', 'b', 'Z'], ARRAY[30, 20, 10], batch_size => 2) ORDER BY entry$$,
    'and of a query');
SELECT results_eq(
    $$SELECT user_id, balance_before, balance_after, outcome
        FROM payout_preview_job('p2', ARRAY['a', 'b', 'nobody'], ARRAY[1, 2, 3], currency => 'GEM') ORDER BY entry$$,
    $$VALUES ('a', 5::bigint, 6::bigint, 'credit'), ('b', 0, 2, 'credit'), ('nobody', NULL, 3, 'account missing')$$,
    'of a bound table: who is missing there');
SELECT results_eq(
    $$SELECT entry, batch_no FROM payout_preview_job('p3', ARRAY(SELECT 'u' || i FROM generate_series(1, 501) i),
                                                     ARRAY(SELECT 1 FROM generate_series(1, 501))) WHERE entry IN (1, 500, 501) ORDER BY 1$$,
    'VALUES (1, 1), (500, 1), (501, 2)', 'batch_size defaults to the setting');
SELECT is((SELECT outcome FROM payout_preview_job('taken', ARRAY['a'], ARRAY[1])), format('in job %s already', :taken),
    'a job that exists would not be created again');

SELECT payout_create_job('p1', ARRAY['c', 'b', 'Z'], ARRAY[30, 20, 10], batch_size => 2, run_at => '2100-01-01') AS job,
       pg_temp.contents() AS after \gset
BEGIN;
SELECT results_eq(
    format('SELECT e.entry, e.user_id, e.amount, e.batch_no FROM payout_entries e WHERE job_id = %s ORDER BY 1', :job),
    $$SELECT entry, user_id COLLATE "C", amount, batch_no
        FROM payout_preview_job('p1', ARRAY['c', 'b', 'Z'], ARRAY[30, 20, 10], batch_size => 2) ORDER BY 1$$,
    'a job that is created is what was shown');
ROLLBACK;

-- ---------------------------------------------------------------------------
-- The same errors
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.error_of(call text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE 'SELECT * FROM ' || call;
    RAISE SQLSTATE 'UNDO0';
EXCEPTION
    WHEN SQLSTATE 'UNDO0' THEN RETURN 'none';
    WHEN OTHERS THEN RETURN SQLSTATE || ' ' || SQLERRM;
END $$;
CREATE TEMP TABLE refused (n serial, job text, code text, arguments text);
INSERT INTO refused (job, code, arguments) VALUES
    ('job', '22023', $$NULL, ARRAY['a'], ARRAY[1]$$),
    ('job', '22023', $$'', ARRAY['a'], ARRAY[1]$$),
    ('job', '22023', $$NULL, '[{"user_id": "a", "amount": 1}]'::jsonb$$),
    ('job', '22023', $$'r', NULL::jsonb$$),
    ('job', '22023', $$'r', NULL::text[], ARRAY[1]$$),
    ('job', '22023', $$'r', ARRAY['a'], NULL::bigint[]$$),
    ('job', '22023', $$'r', '[]'::jsonb$$),
    ('job', '22P02', $$'r', '{}'::jsonb$$),
    ('job', '22P02', $$'r', '[{"user_id": "a", "amount": 1.5}]'::jsonb$$),
    ('job', '22003', $$'r', '[{"user_id": "a", "amount": 1e30}]'::jsonb$$),
    ('job', '22023', $$'r', '[{"user_id": "@a", "amount": 1}]'::jsonb$$),
    ('job', '23505', $$'r', '[{"user_id": "a", "amount": 1}, {"user_id": "a", "amount": 1}]'::jsonb$$),
    ('job', '22023', $$'r', ARRAY['a', 'b'], ARRAY[1]$$),
    ('job', '22023', $$'r', ARRAY['a', NULL], ARRAY[1, 2]$$),
    ('job', '22023', $$'r', ARRAY['@a'], ARRAY[1]$$),
    ('job', '23514', $$'r', ARRAY['a'], ARRAY[0]$$),
    ('job', '22003', $$'r', ARRAY['a', 'b'], ARRAY[9223372036854775807, 1]$$),
    ('job', '22003', $$'r', ARRAY['a'], ARRAY[9223372036854775807], platform_fee => 1$$),
    ('job', '23514', $$'r', ARRAY['a'], ARRAY[1], platform_fee => -1$$),
    ('job', '23514', $$'r', ARRAY['a'], ARRAY[10], total_pool => 10, platform_fee => 1$$),
    ('job', '22023', $$'r', ARRAY['a'], ARRAY[1], batch_size => 0$$),
    ('job', '22023', $$'r', ARRAY['a'], ARRAY[1], batch_size => 10001$$),
    ('job', '22023', $$'r', ARRAY['a'], ARRAY[1], currency => ''$$),
    ('job', '22023', $$'r', ARRAY['a'], ARRAY[1], source_account => '@job:1'$$),
    ('job', '23514', $$'r', ARRAY['a'], ARRAY[1], source_account => '@platform'$$),
    ('job', '23514', $$'r', ARRAY['a'], ARRAY[101], source_account => 'sponsor'$$),
    ('job', '42704', $$'r', ARRAY['a'], ARRAY[1], provider => 'stripe'$$),
    ('job', '42704', $$'r', '[{"user_id": "a", "amount": 1}]'::jsonb, provider => 'stripe'$$),
    ('job', '23505', $$'taken', ARRAY['a'], ARRAY[2]$$),
    ('job', '23505', $$'taken', '[{"user_id": "b", "amount": 1}]'::jsonb$$),
    ('job_from', 'none',  $$'r', 'SELECT ''a'' AS user_id, 1 AS amount -- a comment'$$),
    ('job_from', '22023', $$NULL, 'SELECT ''a'' AS user_id, 1 AS amount'$$),
    ('job_from', '22023', $$'r', NULL$$),
    ('job_from', '22023', $$'r', 'SELECT ''a'' AS user_id, 1.5 AS amount'$$),
    ('job_from', '42703', $$'r', 'SELECT ''a'' AS user_id'$$),
    ('job_from', '42P01', $$'r', 'SELECT * FROM no_such_table'$$),
    ('job_from', '42601', $$'r', 'nonsense'$$),
    ('job_from', '42601', $$'r', 'SELECT ''a'' AS user_id, 1 AS amount; SELECT 1'$$),
    ('job_from', '42704', $$'r', 'SELECT ''a'' AS user_id, 1 AS amount', provider => 'stripe'$$);
SELECT is_empty($$SELECT arguments, code, e FROM refused, LATERAL pg_temp.error_of('payout_create_' || job || '(' || arguments || ')') e
                   WHERE split_part(e, ' ', 1) <> code$$, 'what payout_create_job() refuses');
SELECT is(pg_temp.error_of('payout_preview_' || job || '(' || arguments || ')'),
          pg_temp.error_of('payout_create_' || job || '(' || arguments || ')'), 'preview: ' || arguments)
  FROM refused ORDER BY n;
-- those that only the run of the query shows
SELECT throws_ok(format('SELECT * FROM payout_preview_job_from(''r'', %L)', query), code, NULL, 'preview_job_from: ' || what)
  FROM (VALUES
    ('SELECT ''a'' AS user_id, 1 AS amount WHERE false', '22023', 'no row'),
    ('SELECT ''@a'' AS user_id, 1 AS amount',            '22023', 'a system account'),
    ('SELECT NULL::text AS user_id, 1 AS amount',        '22023', 'user_id null'),
    ('SELECT ''a'' AS user_id, NULL::bigint AS amount',  '22023', 'amount null'),
    ('SELECT ''a'' AS user_id, 0 AS amount',             '23514', 'amount 0'),
    ('SELECT ''a'' AS user_id, 1 AS amount FROM generate_series(1, 2)', '23505', 'a user twice'),
    ('SELECT ''a'' AS user_id, 1/0 AS amount',           '22012', 'an error of its own')
  ) AS t (query, code, what);

-- ---------------------------------------------------------------------------
-- Nothing is written
-- ---------------------------------------------------------------------------

SELECT is(pg_temp.contents(), :'after', 'all those previews have written nothing');
SELECT isnt(:'before'::text, :'after', '(which a creation would have shown)');

SELECT finish();
