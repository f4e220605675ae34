-- The views: their columns, what they say of jobs in all states, statistics
-- and alerts.
\ir fresh.psql
SELECT plan(79);

-- ---------------------------------------------------------------------------
-- Columns that applications rely on; there may be more
-- ---------------------------------------------------------------------------

SELECT is_empty(
    format($$SELECT c FROM unnest(string_to_array(%L, ', ')) AS c
              WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = %L::regclass AND attname = c AND attnum > 0)$$, columns, v),
    v || ' has its columns')
  FROM (VALUES
    ('payout_jobs', 'job_id, reference, challenge_id, status, total_winners, processed_winners, completed_count, failed_count, '
                    'pending_count, progress, progress_percent, total_pool, platform_fee, amount_paid, entries_per_second, eta, '
                    'created_at, started_at, completed_at, error, kind, currency, priority, batch_size, run_at, metadata'),
    ('payout_entries', 'job_id, entry, user_id, amount, status, attempts, error, created_at, processed_at'),
    ('payout_failed_entries', 'job_id, entry, user_id, amount, status, attempts, error, created_at, processed_at'),
    ('payout_batches', 'job_id, batch_no, first_entry, last_entry, status, attempts, run_after, completed_at, error'),
    ('payout_accounts', 'user_id, currency, balance'),
    ('payout_ledger', 'account, currency, amount, kind, job_id, entry, challenge_id, transfer_id, reference, posted_at'),
    ('payout_workers', 'pid, state, job_id, batch_no, since, batches, entries, last_error'),
    ('payout_stats', 'minute, batches, entries, failed_entries, entries_per_second'),
    ('payout_health', 'check_name, ok, value, threshold, hint'),
    ('payout_transfers', 'transfer_id, job_id, entry, user_id, provider, destination, amount, currency, status, attempts, run_after, '
                         'provider_reference, idempotency_key, error, created_at, updated_at'),
    ('payout_attempts', 'transfer_id, attempt, started_at, finished_at, outcome, http_status, provider_reference, error')
  ) AS t (v, columns);
SELECT is_empty(
    $$SELECT a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
       WHERE a.attrelid IN (SELECT oid FROM pg_class WHERE relkind = 'v' AND relname LIKE 'payout\_%') AND a.attnum > 0
         AND format_type(a.atttypid, a.atttypmod) <> CASE
             WHEN a.attname IN ('job_id', 'challenge_id', 'transfer_id', 'amount', 'balance', 'total_pool', 'platform_fee', 'amount_paid')
                  AND a.attrelid <> 'payout_stats'::regclass THEN 'bigint'
             WHEN a.attname IN ('user_id', 'status', 'reference', 'error', 'kind', 'currency', 'account') THEN 'text'
             WHEN a.attname LIKE '%\_at' THEN 'timestamp with time zone'
             ELSE format_type(a.atttypid, a.atttypmod) END$$,
    'ids and amounts are bigint, names text, times timestamptz');

-- ---------------------------------------------------------------------------
-- Nothing yet
-- ---------------------------------------------------------------------------

SELECT is_empty('SELECT FROM ' || v, v || ' is empty at first')
  FROM unnest(ARRAY['payout_jobs', 'payout_progress', 'payout_entries', 'payout_failed_entries', 'payout_batches', 'payout_accounts',
                    'payout_ledger', 'payout_stats', 'payout_workers', 'payout_challenges', 'payout_challenges_awaiting',
                    'payout_stakes', 'payout_notifications', 'payout_schedules', 'payout_transfers', 'payout_attempts']) AS v;
SELECT results_eq('SELECT check_name, ok FROM payout_health ORDER BY check_name',
    $$VALUES ('entries_per_second', true), ('expired_challenges', true), ('failed_entries', true), ('failed_jobs', true), ('oldest_job', true),
             ('overdue_challenges', true), ('restored_jobs', true), ('sending_armed', true), ('stuck_transfers', true), ('transfers_made_twice', true), ('unpushed_notifications', true), ('worker_running', false), ('xmin_holder', true)$$,
    'all is well, but for the worker, which this test has stopped');
SELECT is_empty('SELECT * FROM payout_health WHERE num_nulls(check_name, ok, value, threshold, hint) > 0', 'no check leaves anything out');

-- ---------------------------------------------------------------------------
-- A job in each state, and an entry in each
-- ---------------------------------------------------------------------------

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.wallet VALUES ('a'), ('b');
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM');
SELECT payout_create_job('mixed', ARRAY['a', 'b', 'failed'], ARRAY[1, 2, 4], currency => 'GEM', platform_fee => 3, batch_size => 2) AS mixed \gset
CALL payout_process();
SELECT payout_trigger_job(:mixed);
CALL payout_process();
SELECT payout_trigger_job(:mixed);
CALL payout_process();
SELECT payout_trigger_job(:mixed);
CALL payout_process();
SELECT payout_trigger_job(:mixed);
CALL payout_process();
SELECT payout_create_job('waiting', ARRAY['a', 'retryable'], ARRAY[10, 20], currency => 'GEM') AS waiting \gset
CALL payout_process();
SELECT payout_create_job('half', ARRAY['c', 'd'], ARRAY[100, 200], batch_size => 1, challenge_id => 9) AS half \gset
CALL payout_process(1, :half);
SELECT payout_create_job('stopped', ARRAY['c', 'd'], ARRAY[100, 200], batch_size => 1) AS stopped \gset
CALL payout_process(1, :stopped);
SELECT payout_cancel_job(:stopped, 'why not');

SELECT results_eq(
    $$SELECT reference, entry, user_id, e.amount, e.status, attempts, e.error IS NOT NULL, e.created_at = j.created_at, processed_at IS NOT NULL
        FROM payout_entries e JOIN payout_jobs j USING (job_id) ORDER BY reference, entry$$,
    $$VALUES ('half', 1, 'c' COLLATE "C", 100::bigint, 'completed', 1, false, true, true),
             ('half', 2, 'd', 200, 'pending', 0, false, true, false),
             ('mixed', 1, 'a', 1, 'completed', 1, false, true, true),
             ('mixed', 2, 'b', 2, 'completed', 1, false, true, true),
             ('mixed', 3, 'failed', 4, 'failed', 5, true, true, true),
             ('stopped', 1, 'c', 100, 'completed', 1, false, true, true),
             ('stopped', 2, 'd', 200, 'cancelled', 0, false, true, false),
             ('waiting', 1, 'a', 10, 'completed', 1, false, true, true),
             ('waiting', 2, 'retryable', 20, 'retryable', 1, true, true, false)$$,
    'payout_entries knows all five states');
SELECT results_eq(
    $$SELECT reference, f.entry, f.user_id, f.amount, f.status, f.attempts, e.error = f.error
        FROM payout_failed_entries f JOIN payout_entries e USING (job_id, entry) JOIN payout_jobs j USING (job_id) ORDER BY reference$$,
    $$VALUES ('mixed', 3, 'failed' COLLATE "C", 4::bigint, 'failed', 5, true), ('waiting', 2, 'retryable', 20, 'retryable', 1, true)$$,
    'payout_failed_entries has those that failed, and those that will be tried again');
SELECT results_eq(
    format('SELECT batch_no, first_entry, last_entry, status, attempts, completed_at IS NOT NULL, error IS NOT NULL FROM payout_batches
             WHERE job_id = %s ORDER BY batch_no', :mixed),
    $$VALUES (1, 1, 2, 'completed', 1, true, false), (2, 3, 3, 'failed', 5, false, true)$$,
    'payout_batches has them as batches');
SELECT ok(run_after > now(), 'what is tried again says when') FROM payout_batches WHERE job_id = :waiting AND status = 'retryable';
SELECT results_eq('SELECT reference, kind, status, failed_count, error FROM payout_jobs ORDER BY reference',
    $$VALUES ('half', 'payout', 'running', 0::bigint, NULL), ('mixed', 'payout', 'completed', 1, NULL),
             ('stopped', 'payout', 'cancelled', 0, 'why not'), ('waiting', 'payout', 'running', 0, NULL)$$,
    'payout_jobs has the jobs');
SELECT is_empty(
    $$SELECT to_jsonb(s) FROM payout_jobs j, payout_job_status(j.job_id) s
       WHERE to_jsonb(s) - 'eta' - 'entries_per_second' <> to_jsonb(j) - 'eta' - 'entries_per_second'
             - ARRAY(SELECT jsonb_object_keys(to_jsonb(j)) EXCEPT SELECT jsonb_object_keys(to_jsonb(s)))$$,
    'and says of each what payout_job_status() says');
SELECT results_eq('SELECT user_id, currency, balance FROM payout_accounts ORDER BY user_id',
    $$VALUES ('c' COLLATE "C", 'USD' COLLATE "C", 200::bigint)$$, 'payout_accounts has the balances that are kept here');
SELECT is_empty(
    $$SELECT j.job_id FROM payout_jobs j LEFT JOIN payout_entries e ON e.job_id = j.job_id
       GROUP BY j.job_id, j.total_winners, j.completed_count, j.failed_count, j.amount_paid
      HAVING (j.total_winners, j.completed_count, j.failed_count, j.amount_paid)
             IS DISTINCT FROM (count(e), count(*) FILTER (WHERE e.status = 'completed'), count(*) FILTER (WHERE e.status = 'failed'),
                               coalesce(sum(e.amount) FILTER (WHERE e.status = 'completed'), 0))$$,
    'counts and amounts of jobs are those of their entries');

-- ---------------------------------------------------------------------------
-- The ledger
-- ---------------------------------------------------------------------------

SELECT is_empty('SELECT currency FROM payout_ledger GROUP BY currency HAVING sum(amount) <> 0', 'the ledger sums to zero');
SELECT results_eq(
    format('SELECT account, currency, amount, kind, entry FROM payout_ledger WHERE job_id = %s ORDER BY kind, account', :mixed),
    format($$VALUES ('@job:%1$s' COLLATE "C", 'GEM', -3::bigint, 'fee', NULL::int), ('@platform', 'GEM', 3, 'fee', NULL),
                    ('@job:%1$s', 'GEM', 10, 'funding', NULL), ('@outside', 'GEM', -10, 'funding', NULL),
                    ('@job:%1$s', 'GEM', -3, 'payout', NULL), ('a', 'GEM', 1, 'payout', 1), ('b', 'GEM', 2, 'payout', 2)$$, :mixed),
    'payout_ledger has lines for what is paid, and none for what is not');
SELECT results_eq('SELECT DISTINCT challenge_id FROM payout_ledger WHERE reference = ''half''', ARRAY[9::bigint], 'lines name the challenge');
SELECT results_eq(format('SELECT account, amount FROM payout_ledger WHERE job_id = %s AND kind = ''release'' ORDER BY amount', :stopped),
    format($$VALUES ('@job:%s' COLLATE "C", -200::bigint), ('@outside', 200)$$, :stopped), 'what a cancelled job gives back is a line');

-- ---------------------------------------------------------------------------
-- Statistics
-- ---------------------------------------------------------------------------

SELECT results_eq('SELECT sum(batches), sum(entries), sum(failed_entries), sum(amount) FROM payout_stats',
    $$VALUES (4::numeric, 5::numeric, 1::numeric, 213::numeric)$$, 'payout_stats counts batches, entries and failed entries');
SELECT is_empty('SELECT * FROM payout_stats WHERE minute <> date_trunc(''minute'', minute) OR minute > now()
                    OR entries_per_second <> round(entries / 60.0, 1)', 'by the minute');
BEGIN;
SET LOCAL session_replication_role = replica;
UPDATE payoutq.batch SET processed_at = date_trunc('minute', now()) - interval '10 minutes' + interval '1 second' * batch_no
 WHERE status = 'completed' AND job_id IN (:mixed, :half);
UPDATE payoutq.batch SET processed_at = now() - interval '25 hours' WHERE status = 'completed' AND job_id = :stopped;
SELECT results_eq('SELECT minute = date_trunc(''minute'', now()) - interval ''10 minutes'', batches, entries, amount
                     FROM payout_stats ORDER BY minute LIMIT 1',
    $$VALUES (true, 2::bigint, 3::bigint, 103::numeric)$$, 'what was paid in one minute is one row');
SELECT is((SELECT sum(entries) FROM payout_stats), 4::numeric, 'after a day it is left out');
ROLLBACK;

-- ---------------------------------------------------------------------------
-- Alerts
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.health(what text, OUT ok boolean, OUT value numeric) LANGUAGE sql AS $$
    SELECT h.ok, h.value FROM payout_health h WHERE h.check_name = what
$$;
SELECT results_eq('SELECT * FROM pg_temp.health(''failed_entries'')', 'VALUES (false, 1::numeric)', 'failed_entries: 1');
SELECT results_eq('SELECT * FROM pg_temp.health(''failed_jobs'')', 'VALUES (true, 0::numeric)', 'failed_jobs: none');
SELECT results_eq('SELECT * FROM pg_temp.health(''entries_per_second'')', 'VALUES (true, 10::numeric)', 'entries_per_second: too early to say');
SELECT ok(ok AND value < 3600, 'oldest_job: not old') FROM pg_temp.health('oldest_job');

-- with the clock set back in the tables
BEGIN;
UPDATE payoutq.job SET run_at = now() - interval '2 hours', created_at = now() - interval '2 hours' WHERE id = :half;
SELECT results_eq('SELECT * FROM pg_temp.health(''oldest_job'')', 'VALUES (false, 7200::numeric)', 'oldest_job: due for two hours');
UPDATE payoutq.job SET run_at = '-infinity' WHERE id = :half;
SELECT results_eq('SELECT * FROM pg_temp.health(''oldest_job'')', 'VALUES (false, 7200::numeric)', 'due for ever counts from its creation');
UPDATE payoutq.job SET run_at = now() + interval '1 hour' WHERE id = :half;
SELECT ok(ok, 'not due yet is not old') FROM pg_temp.health('oldest_job');
ROLLBACK;
BEGIN;
UPDATE payoutq.job SET run_at = now() - interval '2 hours', created_at = now() - interval '2 hours', status = 'paused' WHERE id = :half;
SELECT ok(ok, 'nor is what somebody has paused') FROM pg_temp.health('oldest_job');
ROLLBACK;
BEGIN;
UPDATE payoutq.job SET started_at = now() - interval '2 minutes' WHERE id = :half;
SELECT ok(NOT ok AND value < 10, 'entries_per_second: a job runs, and hardly anything is paid') FROM pg_temp.health('entries_per_second');
INSERT INTO payoutq.batch (job_id, batch_no, first_seq, last_seq, amount, status, processed_at)
VALUES (:half, 99, 1000, 1000 + 599, 1, 'completed', now());
SELECT ok(ok AND value >= 10, 'or 600 entries in a minute') FROM pg_temp.health('entries_per_second');
ROLLBACK;
BEGIN;
UPDATE payoutq.job SET status = 'failed' WHERE id = :half;
SELECT results_eq('SELECT * FROM pg_temp.health(''failed_jobs'')', 'VALUES (false, 1::numeric)', 'failed_jobs: 1');
ROLLBACK;
BEGIN;
UPDATE payoutq.job SET origin = 'elsewhere' WHERE id = :half;
SELECT results_eq('SELECT * FROM pg_temp.health(''restored_jobs'')', 'VALUES (false, 1::numeric)', 'restored_jobs: 1');
ROLLBACK;
SELECT results_eq('SELECT * FROM pg_temp.health(''worker_running'')', 'VALUES (false, 0::numeric)', 'worker_running: none');
SELECT matches((SELECT hint FROM payout_health WHERE check_name = 'failed_entries'), 'payout_retry_job', 'a hint says what to do');

-- an entry that is retried is no longer an alert
INSERT INTO app.wallet VALUES ('failed'), ('retryable');
SELECT payout_retry_job(:mixed), payout_trigger_job(:waiting) \g /dev/null
CALL payout_process();
SELECT results_eq('SELECT * FROM pg_temp.health(''failed_entries'')', 'VALUES (true, 0::numeric)', 'failed_entries: none any more');
SELECT is_empty('SELECT * FROM payout_failed_entries', 'and none in payout_failed_entries');

-- ---------------------------------------------------------------------------
-- Looking up one job, user or batch in large tables is one probe of an index
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.plan_of(query text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    line text;
    plan text := '';
BEGIN
    FOR line IN EXECUTE 'EXPLAIN (COSTS OFF) ' || query LOOP
        plan := plan || line || E'\n';
    END LOOP;
    RETURN plan;
END $$;
SELECT payout_create_job('large' || n, array_agg('u' || n || '_' || i), array_agg(1), batch_size => 10, run_at => '2100-01-01')
  FROM generate_series(1, 20) n, generate_series(1, 1000) i GROUP BY n \g /dev/null
CREATE SERVER large FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT payout_set_destination('w' || n || '_' || i, 'large', 'x') FROM generate_series(1, 10) n, generate_series(1, 300) i \g /dev/null
SELECT payout_create_job('wired' || n, array_agg('w' || n || '_' || i), array_agg(1), provider => 'large')
  FROM generate_series(1, 10) n, generate_series(1, 310) i GROUP BY n \g /dev/null
CALL payout_process();
SELECT count(*) FROM payout_claim_transfers('large', 1000) \g /dev/null
SELECT is((SELECT count(*) FROM payout_transfers), 3100::bigint, 'many transfers');
ANALYZE payoutq.job, payoutq.entry, payoutq.batch, payoutq.transfer, payoutq.attempt;
SELECT unalike(pg_temp.plan_of(query), scan, query || ': no' || replace(scan, '%', ' '))
  FROM unnest(ARRAY['SELECT * FROM payout_entries WHERE job_id = 7', 'SELECT * FROM payout_entries WHERE user_id = ''u5_5''',
                    'SELECT * FROM payout_ledger WHERE job_id = 7', 'SELECT * FROM payout_failed_entries WHERE job_id = 7']) AS query,
       unnest(ARRAY['%Seq Scan on entry%', '%Seq Scan on batch%', '%Seq Scan on transfer%']) AS scan;
SELECT unalike(pg_temp.plan_of(query), '%Seq Scan on%', query || ': no Seq Scan')
  FROM unnest(ARRAY['SELECT * FROM payout_transfers WHERE transfer_id = 7', 'SELECT * FROM payout_transfers WHERE job_id = 30',
                    'SELECT * FROM payout_attempts WHERE transfer_id = 7']) AS query;

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
