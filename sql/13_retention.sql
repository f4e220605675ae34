-- What need not be kept: queues leave nothing behind. The ledger, with the jobs
-- that it refers to, is not touched.

-- Jobs that were finished before a time keep their counters in their own row,
-- and no longer in those of payoutq.progress, most of whose pages are left free
-- for updates. As the rows of one job lie together, and those of old jobs too,
-- whole pages become free. At least one row of each job is removed.
CREATE FUNCTION payoutq.archive_jobs(before timestamptz, max_jobs bigint) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    removed bigint;
BEGIN
    WITH finished AS (
        SELECT j.id FROM payoutq.job j
         WHERE j.status IN ('completed', 'cancelled') AND (j.archived_at IS NULL OR j.archived_at < j.completed_at)
           AND j.completed_at < before
         ORDER BY j.completed_at LIMIT max_jobs FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM payoutq.progress p USING finished f WHERE p.job_id = f.id
        RETURNING p.job_id, p.completed, p.failed, p.paid, p.settled
    ), counted AS (
        SELECT f.id, count(g.job_id) AS rows, coalesce(sum(g.completed), 0) AS completed, coalesce(sum(g.failed), 0) AS failed,
               coalesce(sum(g.paid), 0) AS paid, coalesce(sum(g.settled), 0) AS settled
          FROM finished f LEFT JOIN gone g ON g.job_id = f.id GROUP BY f.id
    ), archived AS (
        UPDATE payoutq.job j
           SET archived_at = clock_timestamp(), completed = coalesce(j.completed, 0) + c.completed, failed = coalesce(j.failed, 0) + c.failed,
               paid = coalesce(j.paid, 0) + c.paid, settled = coalesce(j.settled, 0) + c.settled
          FROM counted c WHERE j.id = c.id
        RETURNING c.rows
    )
    SELECT coalesce(sum(rows), 0) INTO removed FROM archived;
    RETURN removed;
END $$;

CREATE FUNCTION @extschema@.payout_maintain(max_rows integer DEFAULT 100000) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    retention interval := payoutq.setting('payoutq.retention')::interval;
    removed bigint := 0;
BEGIN
    IF max_rows IS NULL OR max_rows <= 0 THEN
        RAISE EXCEPTION 'max_rows must be greater than zero, not %', coalesce(max_rows::text, 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF retention > interval '0' THEN
        DELETE FROM payoutq.notification n
         WHERE n.id IN (SELECT o.id FROM payoutq.notification o WHERE o.created_at < now() - retention
                         ORDER BY o.created_at, o.id LIMIT max_rows);
        GET DIAGNOSTICS removed = ROW_COUNT;
        removed := removed + payoutq.archive_jobs(now() - retention, max_rows - removed);
    END IF;
    -- Nobody waits for how many those are.
    DELETE FROM payoutq.webhook_event w
     WHERE (w.provider, w.event_id) IN (SELECT o.provider, o.event_id FROM payoutq.webhook_event o
                                         WHERE o.received_at < now() - interval '30 days' LIMIT max_rows);
    RETURN removed;
END $$;
COMMENT ON FUNCTION @extschema@.payout_maintain(integer) IS
'if payoutq.retention is set, removes notifications that are older, and archives jobs that were finished before, which leaves their rows in the queue''s counters free; at most max_rows notifications and jobs in a call, the oldest first; returns how many rows were removed; removes events of web hooks older than 30 days, too; error: 22023';
