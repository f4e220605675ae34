-- payout_job_status(): its columns, and what it says while a job goes on.
\ir fresh.psql
SELECT plan(35);

CREATE FUNCTION pg_temp.columns(query text) RETURNS TABLE (name text, type text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE 'CREATE TEMP VIEW shape AS ' || query;
    RETURN QUERY SELECT attname::text, format_type(atttypid, atttypmod)
                   FROM pg_attribute WHERE attrelid = 'shape'::regclass ORDER BY attnum;
    DROP VIEW shape;
END $$;

-- ---------------------------------------------------------------------------
-- Shape
-- ---------------------------------------------------------------------------

SELECT results_eq(
    'SELECT * FROM pg_temp.columns(''SELECT * FROM payout_job_status(1)'')',
    $$VALUES ('job_id', 'bigint'), ('reference', 'text'), ('challenge_id', 'bigint'), ('status', 'text'),
             ('total_winners', 'bigint'), ('processed_winners', 'bigint'), ('completed_count', 'bigint'),
             ('failed_count', 'bigint'), ('pending_count', 'bigint'), ('progress', 'numeric'),
             ('progress_percent', 'numeric'), ('total_pool', 'bigint'), ('platform_fee', 'bigint'),
             ('amount_paid', 'bigint'), ('entries_per_second', 'numeric'), ('eta', 'timestamp with time zone'),
             ('created_at', 'timestamp with time zone'), ('started_at', 'timestamp with time zone'),
             ('completed_at', 'timestamp with time zone'), ('error', 'text')$$,
    'payout_job_status(bigint) has these columns');
SELECT results_eq(
    'SELECT * FROM pg_temp.columns(''SELECT * FROM payout_job_status(''''x''''::text)'')',
    'SELECT * FROM pg_temp.columns(''SELECT * FROM payout_job_status(1)'')',
    'payout_job_status(text) has the same');
SELECT set_eq(
    $$SELECT DISTINCT d.refobjid::regclass::text FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
       WHERE d.classid = 'pg_rewrite'::regclass AND r.ev_class = 'payoutq.status'::regclass
         AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class$$,
    ARRAY['payoutq.counts', 'payoutq.job'],
    'it reads neither entries nor batches, so a poll costs the same for any job');

-- ---------------------------------------------------------------------------
-- A job of ten in two batches
-- ---------------------------------------------------------------------------

SELECT payout_create_job('ten', array_agg('u' || i), array_agg(i * 10), total_pool => 600, platform_fee => 50,
                         challenge_id => 7, batch_size => 5) AS job
  FROM generate_series(1, 10) i \gset
SELECT results_eq(
    format('SELECT job_id, reference, challenge_id, status, total_winners, processed_winners, completed_count, failed_count,
                   pending_count, progress, progress_percent, total_pool, platform_fee, amount_paid,
                   num_nulls(entries_per_second, eta, started_at, completed_at, error) FROM payout_job_status(%s)', :job),
    format($$VALUES (%s::bigint, 'ten', 7::bigint, 'queued', 10::bigint, 0::bigint, 0::bigint, 0::bigint,
                     10::bigint, 0::numeric, 0::numeric, 600::bigint, 50::bigint, 0::bigint, 5)$$, :job),
    'queued: nothing is done');
SELECT results_eq('SELECT * FROM payout_job_status(''ten'')', format('SELECT * FROM payout_job_status(%s)', :job),
    'the reference finds the same job');

CALL payout_process(1);
SELECT results_eq(
    format('SELECT status, processed_winners, completed_count, failed_count, pending_count, progress, progress_percent, amount_paid
              FROM payout_job_status(%s)', :job),
    $$VALUES ('running', 5::bigint, 5::bigint, 0::bigint, 5::bigint, 0.5, 50::numeric, 200::bigint)$$,
    'one batch of two: 50 %');
SELECT ok(started_at >= created_at AND completed_at IS NULL, 'it has started and not ended') FROM payout_job_status(:job);
SELECT cmp_ok(entries_per_second, '>', 0::numeric, 'it has a speed') FROM payout_job_status(:job);
SELECT cmp_ok(eta, '>', now(), 'and an expected end') FROM payout_job_status(:job);

CALL payout_process(1);
SELECT results_eq(
    format('SELECT status, processed_winners, progress < 1 FROM payout_job_status(%s)', :job),
    $$VALUES ('running', 10::bigint, true)$$,
    'all are paid, but the job is not finished, so progress is below 1');

CALL payout_process();
SELECT results_eq(
    format('SELECT status, processed_winners, completed_count, failed_count, pending_count, progress, progress_percent, amount_paid, error
              FROM payout_job_status(%s)', :job),
    $$VALUES ('completed', 10::bigint, 10::bigint, 0::bigint, 0::bigint, 1::numeric, 100::numeric, 550::bigint, NULL)$$,
    'completed: 10 of 10');
SELECT ok(completed_at >= started_at AND eta IS NULL, 'it has ended, so nothing is expected') FROM payout_job_status(:job);
SELECT is((SELECT entries_per_second FROM payout_job_status(:job)), (SELECT entries_per_second FROM payout_job_status(:job)),
    'the speed of a finished job does not change');

-- ---------------------------------------------------------------------------
-- Progress is always what the tables say, and never goes back
-- ---------------------------------------------------------------------------

SELECT payout_create_job('thousand', array_agg('t' || i), array_agg(i), batch_size => 100) AS job
  FROM generate_series(1, 1000) i \gset
CREATE TEMP TABLE poll (n serial, progress numeric, processed bigint, entries bigint, paid bigint, amount bigint);
CREATE FUNCTION pg_temp.poll(job bigint) RETURNS void LANGUAGE sql AS $$
    INSERT INTO poll (progress, processed, entries, paid, amount)
    SELECT s.progress, s.processed_winners, count(e), s.amount_paid, coalesce(sum(e.amount), 0)
      FROM payout_job_status(job) s LEFT JOIN payout_entries e ON e.job_id = job AND e.status = 'completed'
     GROUP BY 1, 2, 4
$$;
SELECT pg_temp.poll(:job) \g /dev/null
CALL payout_process(1, :job);
SELECT pg_temp.poll(:job) \g /dev/null
CALL payout_process(4, :job);
SELECT pg_temp.poll(:job) \g /dev/null
CALL payout_process(4, :job);
SELECT pg_temp.poll(:job) \g /dev/null
CALL payout_process(NULL, :job);
SELECT pg_temp.poll(:job) \g /dev/null
SELECT results_eq('SELECT progress FROM poll ORDER BY n', ARRAY[0, 0.1, 0.5, 0.9, 1], 'progress after 0, 1, 5, 9 and all batches of 10');
SELECT is_empty('SELECT * FROM poll WHERE processed <> entries OR paid <> amount', 'counters say what the entries say');

-- 20,000 of 20,001 would be 1 when rounded
SELECT payout_create_job('rounding', array_agg('r' || i), array_agg(1), batch_size => 10000) AS job
  FROM generate_series(1, 20001) i \gset
CALL payout_process(2, :job);
SELECT is((SELECT processed_winners FROM payout_job_status(:job)), 20000::bigint, 'one of 20,001 is left');
SELECT cmp_ok((SELECT progress FROM payout_job_status(:job)), '<', 1::numeric, 'and progress is not rounded up to 1');
SELECT cmp_ok((SELECT progress_percent FROM payout_job_status(:job)), '<', 100::numeric, 'nor the percentage to 100');
CALL payout_process(NULL, :job);
SELECT is((SELECT progress FROM payout_job_status(:job)), 1::numeric, 'until it is paid');

-- One of 2,000 since a long time ago
SELECT payout_create_job('slow', array_agg('s' || i), array_agg(1), batch_size => 1) AS job FROM generate_series(1, 2000) i \gset
CALL payout_process(1, :job);
UPDATE payoutq.job SET started_at = now() - interval '10 days' WHERE id = :job;
SELECT cmp_ok((SELECT eta FROM payout_job_status(:job)), '>', now() + interval '50 years', 'the end may be far away');
UPDATE payoutq.job SET started_at = now() - interval '1000 years' WHERE id = :job;
SELECT is((SELECT eta FROM payout_job_status(:job)), NULL, 'but not out of sight');
SELECT is((SELECT count(eta) FROM payout_jobs WHERE job_id = :job), 0::bigint, 'nor is it for payout_jobs');
SELECT is((SELECT count(time_left) FROM payout_progress WHERE job_id = :job), 0::bigint, 'nor for payout_progress');
SELECT payout_cancel_job(:job) \g /dev/null

-- ---------------------------------------------------------------------------
-- Entries that fail
-- ---------------------------------------------------------------------------

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint NOT NULL);
INSERT INTO app.wallet VALUES ('here', 0);
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM');
SELECT payout_create_job('gone', ARRAY['here', 'gone'], ARRAY[3, 4], currency => 'GEM') AS job \gset
CALL payout_process(NULL, :job);
SELECT results_eq(
    format('SELECT status, processed_winners, completed_count, failed_count, pending_count, progress FROM payout_job_status(%s)', :job),
    $$VALUES ('running', 1::bigint, 1::bigint, 0::bigint, 1::bigint, 0.5)$$,
    'an entry that will be tried again is pending');

-- five attempts, without waiting for the backoff
SELECT payout_trigger_job(:job) \g /dev/null
CALL payout_process(NULL, :job);
SELECT payout_trigger_job(:job) \g /dev/null
CALL payout_process(NULL, :job);
SELECT payout_trigger_job(:job) \g /dev/null
CALL payout_process(NULL, :job);
SELECT payout_trigger_job(:job) \g /dev/null
CALL payout_process(NULL, :job);
SELECT results_eq(
    format('SELECT status, processed_winners, completed_count, failed_count, pending_count, progress, amount_paid FROM payout_job_status(%s)', :job),
    $$VALUES ('completed', 2::bigint, 1::bigint, 1::bigint, 0::bigint, 1::numeric, 3::bigint)$$,
    'a job with an entry that failed for good is completed');

DROP TABLE app.wallet;
SELECT payout_create_job('stopped', ARRAY['here'], ARRAY[3], currency => 'GEM') AS job \gset
CALL payout_process(NULL, :job);
SELECT results_eq(
    format('SELECT status, processed_winners, pending_count, progress, completed_at >= started_at FROM payout_job_status(%s)', :job),
    $$VALUES ('failed', 0::bigint, 1::bigint, 0::numeric, true)$$,
    'a job that could not run has failed, its entries have not');
SELECT matches((SELECT error FROM payout_job_status(:job)), 'does not exist', 'and says why');

SELECT payout_create_job_from('unknown', 'SELECT ''u'' AS user_id, 1 AS amount', platform_fee => 5, run_at => '2100-01-01') AS job \gset
SELECT results_eq(
    format('SELECT status, total_winners, pending_count, progress, total_pool, platform_fee FROM payout_job_status(%s)', :job),
    $$VALUES ('queued', 0::bigint, 0::bigint, 0::numeric, NULL::bigint, 5::bigint)$$,
    'before its query is run a job has no winners and no pool');

-- ---------------------------------------------------------------------------
-- No such job
-- ---------------------------------------------------------------------------

SELECT throws_ok('SELECT * FROM payout_job_status(999999)', '42704', NULL, 'no such id');
SELECT throws_ok('SELECT * FROM payout_job_status(''nobody''''s'')', '42704', NULL, 'no such reference');
SELECT throws_ok('SELECT * FROM payout_job_status(NULL::bigint)', '42704', NULL, 'id null');
SELECT throws_ok('SELECT * FROM payout_job_status(NULL::text)', '42704', NULL, 'reference null');
SELECT throws_like('SELECT * FROM payout_job_status(999999)', '%999999%', 'the id is named');
SELECT throws_like('SELECT * FROM payout_job_status(''nobody''''s'')', '%nobody''s%', 'the reference is named');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
