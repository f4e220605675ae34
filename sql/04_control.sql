-- What an operator does to a job. All of it waits for the batches that are
-- being paid; when it returns, no other has begun in the old state.

CREATE FUNCTION @extschema@.payout_pause_job(job_id bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
BEGIN
    IF target.status NOT IN ('queued', 'running') THEN
        PERFORM payoutq.refuse_state(target, 'paused');
    END IF;
    UPDATE payoutq.job SET status = 'paused' WHERE id = target.id;
END $$;
COMMENT ON FUNCTION @extschema@.payout_pause_job(bigint) IS
'pauses a job: no batch of it is paid until payout_resume_job(); errors: 42704, 55000';

CREATE FUNCTION @extschema@.payout_resume_job(job_id bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
BEGIN
    IF target.status <> 'paused' THEN
        PERFORM payoutq.refuse_state(target, 'resumed');
    END IF;
    UPDATE payoutq.job SET status = CASE WHEN started_at IS NULL THEN 'queued' ELSE 'running' END
     WHERE id = target.id;
    PERFORM payoutq.wake();
END $$;
COMMENT ON FUNCTION @extschema@.payout_resume_job(bigint) IS
'lets a paused job go on; errors: 42704, 55000';

CREATE FUNCTION @extschema@.payout_cancel_job(job_id bigint, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
    escrow text := '@job:' || job_id;
    rest bigint;
BEGIN
    IF target.status IN ('completed', 'cancelled') THEN
        PERFORM payoutq.refuse_state(target, 'cancelled');
    END IF;
    IF EXISTS (SELECT FROM payoutq.challenge c WHERE c.job_id = target.id AND c.completed_at IS NULL) THEN
        RAISE EXCEPTION 'job % cannot be cancelled', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = format('It pays what was decided of challenge %s.', target.challenge_id),
                  HINT = 'Use payout_pause_job() to stop it.';
    END IF;
    PERFORM payoutq.require_current(target.id), payoutq.cancel_transfers(target);
    rest := payoutq.latest_system_balance(escrow, target.currency);
    IF rest > 0 THEN
        PERFORM payoutq.change_balance(target.source_account, target.currency, rest);
        INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, reason)
        VALUES ('release', escrow, target.source_account, target.currency, rest, target.id, reason);
    END IF;
    UPDATE payoutq.job SET status = 'cancelled', completed_at = clock_timestamp(), error = reason
     WHERE id = target.id;
    PERFORM payoutq.announce(target.id, 'cancelled');
END $$;
COMMENT ON FUNCTION @extschema@.payout_cancel_job(bigint, text) IS
'ends a job: what is paid stays paid, the rest of the money goes back to the account that funded it; errors: 40001, 42704, 55000';

-- Whoever still runs its query need not finish it. At the commit, because the job
-- is not cancelled before.
CREATE FUNCTION payoutq.cancel_query() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_cancel_backend(w.pid) FROM payoutq.workers() w WHERE w.job_id = NEW.id AND w.batch_no = 0;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER cancel_query AFTER UPDATE ON payoutq.job DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.status = 'cancelled' AND OLD.status <> 'cancelled') EXECUTE FUNCTION payoutq.cancel_query();

CREATE FUNCTION @extschema@.payout_retry_job(job_id bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
    queued bigint;
BEGIN
    IF target.status = 'cancelled' THEN
        PERFORM payoutq.refuse_state(target, 'retried');
    END IF;
    PERFORM payoutq.require_current(target.id);

    -- What had failed for good is taken out of the count again.
    INSERT INTO payoutq.progress AS p (job_id, part, slot, completed, failed, paid, settled)
    SELECT target.id, b.batch_no / 1024, -1, 0, -sum(b.last_seq - b.first_seq + 1), 0, 0
      FROM payoutq.batch b WHERE b.job_id = target.id AND b.status = 'failed'
     GROUP BY b.batch_no / 1024
    ON CONFLICT ON CONSTRAINT progress_pkey DO UPDATE SET failed = p.failed + excluded.failed;

    WITH again AS (
        UPDATE payoutq.batch b
           SET status = 'pending', attempts = 0, crashes = 0, run_after = clock_timestamp(),
               processed_at = NULL, error_code = NULL, error = NULL
         WHERE b.job_id = target.id AND (b.status = 'failed' OR b.status = 'pending' AND b.error_code IS NOT NULL)
        RETURNING b.last_seq - b.first_seq + 1 AS entries)
    SELECT coalesce(sum(entries), 0) INTO queued FROM again;

    IF target.provider IS NOT NULL AND target.status IN ('running', 'completed') THEN
        SELECT queued + count(@extschema@.payout_retry_transfer(t.id)) INTO queued
          FROM (SELECT t.* FROM payoutq.transfer t
                 WHERE t.job_id = target.id AND t.status IN ('failed_terminal', 'confirmation_failed')
                   AND (t.status = 'confirmation_failed' OR t.provider_reference IS NULL) ORDER BY t.entry_seq) t
          JOIN payoutq.destination d ON d.user_id = t.user_id AND d.provider = t.provider
         WHERE payoutq.user_balance(t.user_id, t.currency) >= t.amount
           AND NOT EXISTS (SELECT FROM payoutq.movement m WHERE m.job_id = t.job_id AND m.kind = 'reversal' AND m.entry_seq = t.entry_seq);
    END IF;

    -- What was not tried before the job failed goes first now: it is due longer.
    IF target.status = 'failed' THEN
        SELECT coalesce(sum(b.last_seq - b.first_seq + 1), 0) INTO queued
          FROM payoutq.batch b WHERE b.job_id = target.id AND b.status = 'pending';
    END IF;

    IF target.status = 'failed' OR (target.status = 'completed' AND queued > 0) THEN
        UPDATE payoutq.job
           SET status = CASE WHEN started_at IS NULL THEN 'queued' ELSE 'running' END,
               completed_at = NULL, error_code = NULL, error = NULL, attempts = 0, run_at = clock_timestamp()
         WHERE id = target.id;
    END IF;
    PERFORM payoutq.wake();
    RETURN queued;
END $$;
COMMENT ON FUNCTION @extschema@.payout_retry_job(bigint) IS
'queues the failed entries of a job again, also of a finished one, and those that wait for another try, and its failed transfers of users who have a destination and still have the money; returns how many; errors: 40001, 42704, 55000';

CREATE FUNCTION @extschema@.payout_trigger_job(job_id bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
BEGIN
    IF target.status NOT IN ('queued', 'running') THEN
        PERFORM payoutq.refuse_state(target, 'triggered');
    END IF;
    PERFORM payoutq.require_current(target.id);
    -- A restored job goes on, whatever payout_verify() says.
    UPDATE payoutq.job SET run_at = least(run_at, clock_timestamp()), origin = payoutq.origin(), error = NULL
     WHERE id = target.id;
    UPDATE payoutq.batch b SET run_after = clock_timestamp()
     WHERE b.job_id = target.id AND b.status = 'pending' AND b.run_after > clock_timestamp();
    PERFORM payoutq.wake();
END $$;
COMMENT ON FUNCTION @extschema@.payout_trigger_job(bigint) IS
'runs a job now, whatever its run_at and the backoff of its batches say, and a restored one although its books are not complete; errors: 40001, 42704, 55000';
