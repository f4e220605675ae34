-- Workers, and what to alert on.

CREATE FUNCTION payoutq.start_worker() RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_start_worker_sql';
CREATE FUNCTION payoutq.stop_workers() RETURNS integer
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_stop_workers_sql';

CREATE FUNCTION @extschema@.payout_start_worker() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT payoutq.start_worker()
$$;
COMMENT ON FUNCTION @extschema@.payout_start_worker() IS
'lets workers run in this database again after payout_stop_workers(); without shared_preload_libraries, starts one that looks for work every second until it is stopped; error: 53000 (no free worker process)';

CREATE FUNCTION @extschema@.payout_stop_workers() RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    -- Those without shared memory are only seen in pg_stat_activity.
    SELECT payoutq.stop_workers() + count(pg_terminate_backend(a.pid))::integer
      FROM pg_stat_activity a
     WHERE a.backend_type = 'payoutq worker' AND a.datname = current_database()
       AND a.application_name = 'payoutq worker (unsupervised)';
$$;
COMMENT ON FUNCTION @extschema@.payout_stop_workers() IS
'ends the workers of this database, after the batch each of them is at is rolled back or committed, until payout_start_worker() or a restart of the server; returns how many';

-- Who keeps VACUUM from removing the old versions of balances.
CREATE FUNCTION payoutq.xmin_holders() RETURNS TABLE (age bigint, who text)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT age(a.backend_xmin), format('pid %s (%s, %s), since %s', a.pid, coalesce(a.usename, a.backend_type), a.state,
                                       date_trunc('second', a.xact_start))
      FROM pg_stat_activity a WHERE a.backend_xmin IS NOT NULL AND a.pid <> pg_backend_pid()
    UNION ALL
    SELECT age(x), format('replication slot %s', s.slot_name)
      FROM pg_replication_slots s, unnest(ARRAY[s.xmin, s.catalog_xmin]) x WHERE x IS NOT NULL
    UNION ALL
    SELECT age(p.transaction), format('prepared transaction %s, since %s', p.gid, date_trunc('second', p.prepared))
      FROM pg_prepared_xacts p
    ORDER BY 1 DESC LIMIT 1
$$;

CREATE FUNCTION payoutq.restored_jobs() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT count(*) FROM payoutq.job j WHERE j.status IN ('queued', 'running') AND j.origin <> payoutq.origin())
         + (SELECT count(*) FROM payoutq.challenge c
             WHERE c.status IN ('pending', 'active', 'pending_admin') AND c.origin <> payoutq.origin())
$$;

CREATE VIEW @extschema@.payout_health AS
SELECT c.check_name,
       CASE c.bad_when WHEN 'above' THEN c.value <= c.threshold ELSE c.value >= c.threshold END AS ok,
       c.value, c.threshold, c.hint
  FROM (
    SELECT 'oldest_job', coalesce(round(extract(epoch FROM max(now() - greatest(j.run_at, j.created_at)))), 0), 3600, 'above',
           'seconds that the oldest unfinished job is due; look at payout_jobs and payout_batches'
      FROM payoutq.job j WHERE j.status IN ('queued', 'running') AND j.run_at <= now()
    UNION ALL
    SELECT 'failed_jobs', count(*), 0, 'above', 'jobs that could not run; mend the cause, then payout_retry_job()'
      FROM payoutq.job j WHERE j.status = 'failed'
    UNION ALL
    SELECT 'restored_jobs', payoutq.restored_jobs(), 0, 'above',
           'jobs and challenges that came in with a restore and wait until their books are complete; a job also for payout_trigger_job()'
    UNION ALL
    SELECT 'failed_entries', coalesce(sum(p.failed), 0), 0, 'above',
           'entries that failed for good; look at payout_failed_entries, then payout_retry_job()'
      FROM payoutq.counts p JOIN payoutq.job j ON j.id = p.job_id AND j.status <> 'cancelled'
    UNION ALL
    SELECT 'stuck_transfers', count(*), 0, 'above', 'transfers that have not moved for payoutq.confirm_timeout; look at payout_stuck_transfers()'
      FROM @extschema@.payout_stuck_transfers()
    UNION ALL
    SELECT 'transfers_made_twice', count(*), 0, 'above',
           'transfers that were failed here and made by the provider; the user has the money twice'
      FROM payoutq.transfer t WHERE t.status = 'failed_terminal' AND t.provider_reference IS NOT NULL
    UNION ALL
    SELECT 'sending_armed', payoutq.sending_is_armed()::integer, 1, 'below',
           'transfers are sent from here, and notifications pushed; after a restore or a promotion payout_arm_sending() must be called'
    UNION ALL
    SELECT 'unpushed_notifications', count(*), 0, 'above',
           'notifications that wait for more than ten minutes to be pushed; look at payout_providers, and push_error in payout_notifications'
      FROM payoutq.notification n WHERE n.push_after IS NOT NULL AND n.created_at < now() - interval '10 minutes'
    UNION ALL
    SELECT 'expired_challenges', count(*), 0, 'above',
           'challenges that are due and were never active; payout_cancel_challenge() gives their stakes back'
      FROM payoutq.challenge c WHERE c.status = 'pending' AND c.due_at <= now()
    UNION ALL
    SELECT 'overdue_challenges', count(*), 0, 'above',
           'active challenges that were due ten minutes ago; does anybody call payout_run_deadlines(), or hold a transaction open that has staked?'
      FROM payoutq.challenge c WHERE c.status = 'active' AND c.due_at <= now() - interval '10 minutes'
    UNION ALL
    -- Speed matters while there is something to pay.
    SELECT 'entries_per_second',
           CASE WHEN EXISTS (SELECT FROM payoutq.job j WHERE j.status = 'running' AND j.provider IS NULL
                                AND j.started_at < now() - interval '1 minute')
                THEN round(coalesce((SELECT sum(b.last_seq - b.first_seq + 1) FROM payoutq.batch b
                                      WHERE b.processed_at > now() - interval '1 minute'), 0) / 60.0, 1)
                ELSE 10 END, 10, 'below',
           'entries processed a second in the last minute while a job is running; 10 when none is'
    UNION ALL
    SELECT 'worker_running', (SELECT count(*) FROM payoutq.workers()), 1, 'below',
           'workers of this database; is payoutq in shared_preload_libraries?'
    UNION ALL
    SELECT 'xmin_holder', coalesce(max(x.age), 0), 1000000, 'above',
           coalesce('vacuum is held back by ' || max(x.who), 'nobody holds back vacuum')
      FROM payoutq.xmin_holders() x
  ) AS c (check_name, value, threshold, bad_when, hint);
COMMENT ON VIEW @extschema@.payout_health IS
'what to alert on: ok is false when the value is beyond the threshold; xmin_holder is in transactions, and its hint names who';
