-- payout_maintain() archives what is finished: less is kept of it, and
-- everything that can be asked is answered as before.
\ir fresh.psql
SELECT plan(26);

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint NOT NULL);
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM') \g /dev/null
INSERT INTO app.wallet VALUES ('here', 0);
CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT payout_set_destination('u' || i, 'bank', 'x') FROM generate_series(1, 4) AS i \g /dev/null

-- Since how long each was finished
CREATE FUNCTION pg_temp.since(reference text, age interval) RETURNS void LANGUAGE sql AS
    'UPDATE payoutq.job SET completed_at = now() - age WHERE job.reference = since.reference';
CREATE FUNCTION pg_temp.counters(OUT result text) LANGUAGE sql AS $$
    SELECT string_agg(DISTINCT reference, ' ' ORDER BY reference) FROM payoutq.progress p JOIN payoutq.job j ON j.id = p.job_id
$$;
-- All that users see of jobs and money
CREATE FUNCTION pg_temp.seen() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT 'job ' || to_jsonb(j)::text FROM payout_jobs j
    UNION ALL SELECT 'status ' || payout_job_status(job_id)::text FROM payout_jobs
    UNION ALL SELECT 'entry ' || to_jsonb(e)::text FROM payout_entries e
    UNION ALL SELECT 'failed ' || to_jsonb(f)::text FROM payout_failed_entries f
    UNION ALL SELECT 'line ' || to_jsonb(l)::text FROM payout_ledger l
    UNION ALL SELECT 'attempt ' || to_jsonb(a)::text FROM payout_attempts a
    UNION ALL SELECT format('balance %s %s', a, payout_balance(a)) FROM unnest(ARRAY['@outside', '@transit:bank', '@job:1', '@job:3', 'u1']) a
    UNION ALL SELECT format('health %s %s', check_name, value) FROM payout_health WHERE check_name NOT IN ('xmin_holder', 'oldest_job')
$$;

SELECT payout_create_job('plain', ARRAY['u1', 'u2', 'u3'], ARRAY[1, 2, 3], batch_size => 1) \g /dev/null
SELECT payout_create_job('young', ARRAY['u1'], ARRAY[1]) \g /dev/null
SELECT payout_create_job('cancelled', ARRAY['u1', 'u2'], ARRAY[1, 2], batch_size => 1) \g /dev/null
SELECT payout_create_job('failed', ARRAY['here', 'late'], ARRAY[1, 2], currency => 'GEM', platform_fee => 9) \g /dev/null
SELECT payout_create_job('sent', ARRAY['u1', 'u2', 'u5'], ARRAY[5, 6, 7], provider => 'bank') \g /dev/null
CALL payout_process(1, 3);
SELECT payout_cancel_job(3);
CALL payout_process();
SELECT payout_transfer_completed(transfer_id, attempt_token, 'ref ' || transfer_id) FROM payout_claim_transfers('bank') \g /dev/null
SELECT payout_trigger_job(4);
CALL payout_process();
SELECT payout_trigger_job(4);
CALL payout_process();
SELECT payout_trigger_job(4);
CALL payout_process();
SELECT payout_trigger_job(4);
CALL payout_process();
SELECT payout_create_job('open', ARRAY['u1'], ARRAY[1], run_at => '2100-01-01') \g /dev/null
SELECT results_eq('SELECT reference, status, completed_count, failed_count FROM payout_jobs ORDER BY 1',
    $$VALUES ('cancelled', 'cancelled', 1::bigint, 0::bigint), ('failed', 'completed', 1, 1), ('open', 'queued', 0, 0),
             ('plain', 'completed', 3, 0), ('sent', 'completed', 2, 1), ('young', 'completed', 1, 0)$$, 'jobs in many states');

SELECT pg_temp.since('plain', '9 days'), pg_temp.since('cancelled', '8 days'), pg_temp.since('failed', '7 days'), pg_temp.since('sent', '6 days') \g /dev/null
CREATE TABLE app.before AS SELECT * FROM pg_temp.seen() AS line;
SELECT is(payout_maintain(), 0::bigint, 'without payoutq.retention nothing is archived');
\set setting payoutq.retention
\set value 1d
\ir setting.psql
SELECT is(pg_temp.counters(), 'cancelled failed plain sent young', 'all have their counters');
SELECT cmp_ok(payout_maintain(1), '>=', 1::bigint, 'with it a job is archived');
SELECT is(pg_temp.counters(), 'cancelled failed sent young', 'the oldest first, at most as many as asked for');
SELECT cmp_ok(payout_maintain(2), '>=', 2::bigint, 'two more');
SELECT is(pg_temp.counters(), 'sent young', 'in the order in which they were finished');
SELECT cmp_ok(payout_maintain(), '>=', 1::bigint, 'and what is left');
SELECT is(pg_temp.counters(), 'young', 'but for what is younger');
SELECT is(payout_maintain(), 0::bigint, 'a further call has nothing to do');
SELECT results_eq('SELECT * FROM pg_temp.seen() s ORDER BY 1', 'SELECT * FROM app.before b ORDER BY 1',
    'jobs, entries, the ledger, balances and health say what they said before');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');
SELECT is((SELECT payout_create_job('plain', ARRAY['u1', 'u2', 'u3'], ARRAY[1, 2, 3], batch_size => 1)), 1::bigint,
    'the same job again is the archived one');

-- What has failed may be retried for ever.
INSERT INTO app.wallet VALUES ('late', 0);
SELECT is(payout_retry_job(4), 1::bigint, 'an entry of an archived job is queued again');
SELECT results_eq('SELECT status, completed_count, failed_count, pending_count, amount_paid FROM payout_job_status(4)',
    $$VALUES ('running', 1::bigint, 0::bigint, 1::bigint, 1::bigint)$$, 'and is counted as that');
SELECT is(payout_maintain(), 0::bigint, 'what runs again is not archived');
CALL payout_process();
SELECT results_eq('SELECT status, completed_count, failed_count, progress, amount_paid FROM payout_job_status(4)',
    $$VALUES ('completed', 2::bigint, 0::bigint, 1::numeric, 3::bigint)$$, 'until it is paid');
SELECT is(payout_balance('@platform', 'GEM'), 9::bigint, 'the fee was taken once');

SELECT payout_set_destination('u5', 'bank', 'x') \g /dev/null
SELECT is(payout_retry_job(5), 1::bigint, 'a transfer of an archived job is retried');
SELECT payout_transfer_completed(transfer_id, attempt_token, 'ref ' || transfer_id) FROM payout_claim_transfers('bank') \g /dev/null
CALL payout_process();
SELECT results_eq('SELECT status, completed_count, failed_count, amount_paid FROM payout_job_status(5)',
    $$VALUES ('completed', 3::bigint, 0::bigint, 18::bigint)$$, 'and completes it');
SELECT is(pg_temp.counters(), 'failed sent young', 'both have counters again');
SELECT pg_temp.since('failed', '2 days'), pg_temp.since('sent', '2 days') \g /dev/null
UPDATE payoutq.job SET archived_at = completed_at - interval '1 day' WHERE id IN (4, 5);
SELECT cmp_ok(payout_maintain(), '>=', 2::bigint, 'and are archived again');
SELECT results_eq('SELECT completed_count, failed_count, amount_paid FROM payout_jobs WHERE job_id IN (4, 5) ORDER BY job_id',
    $$VALUES (2::bigint, 0::bigint, 3::bigint), (3, 0, 18)$$, 'with what was counted since');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

-- Day after day: the counters need no more space.
CREATE PROCEDURE app.day(OUT bytes bigint) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM payout_create_job(format('day %s %s', n, clock_timestamp()), ARRAY['u' || n], ARRAY[1]) FROM generate_series(1, 500) n;
    CALL payout_process();
    UPDATE payoutq.job SET completed_at = now() - interval '2 days' WHERE status = 'completed' AND completed_at > now() - interval '1 day';
    PERFORM payout_maintain();
    bytes := pg_total_relation_size('payoutq.progress');
END $$;
CALL app.day(0) \g /dev/null
VACUUM payoutq.progress;
CALL app.day(0) \g /dev/null
VACUUM payoutq.progress;
CALL app.day(0) \g /dev/null
VACUUM payoutq.progress;
CALL app.day(0) \gset first_
VACUUM payoutq.progress;
CALL app.day(0) \g /dev/null
VACUUM payoutq.progress;
CALL app.day(0) \g /dev/null
VACUUM payoutq.progress;
CALL app.day(0) \gset last_
SELECT is(:last_bytes, :first_bytes, 'after days of the same work, the counters take the same space');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance still');

ALTER SYSTEM RESET payoutq.retention;
SELECT pg_reload_conf() \g /dev/null
SELECT finish();
