-- From 1.0.0 to 1.0.1.
\echo Use "ALTER EXTENSION payoutq UPDATE" to load this file. \quit
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION payoutq.require_current(job_id bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_require_current';

COMMENT ON FUNCTION payoutq.require_current(bigint) IS
'40001 if the transaction''s snapshot does not show the failures and transfers of the locked job as they are now';

CREATE OR REPLACE FUNCTION payoutq.announce(job_id bigint, event text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT pg_notify('payoutq_jobs',
                     json_build_object('event', event, 'job_id', j.id, 'reference', j.reference,
                                       'status', j.status)::text),
           payoutq.tell_waiters()
      FROM payoutq.job j WHERE j.id = announce.job_id
$$;

CREATE OR REPLACE FUNCTION @extschema@.payout_preview_job(
    reference text, user_ids text[], amounts bigint[], total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL)
RETURNS TABLE (entry integer, user_id text, amount bigint, batch_no integer,
               balance_before bigint, balance_after bigint, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    existing bigint := (SELECT j.id FROM payoutq.job j WHERE j.reference = reference);
    size integer := coalesce(batch_size, payoutq.setting('payoutq.batch_size')::integer);
BEGIN
    BEGIN
        PERFORM @extschema@.payout_create_job(reference, user_ids, amounts, total_pool, platform_fee, challenge_id, currency, priority,
            batch_size, run_at, source_account, provider, metadata);
        RAISE EXCEPTION USING ERRCODE = 'PQ000', MESSAGE = 'undo';
    EXCEPTION WHEN SQLSTATE 'PQ000' THEN
        NULL;
    END;

    RETURN QUERY
        SELECT w.entry, w.user_id, w.amount, (w.entry - 1) / size + 1, b.balance,
               least(coalesce(b.balance, 0)::numeric + w.amount, 9223372036854775807)::bigint,
               CASE WHEN existing IS NOT NULL THEN format('in job %s already', existing)
                    WHEN b.balance IS NOT NULL THEN 'credit'
                    WHEN EXISTS (SELECT FROM payoutq.binding bound WHERE bound.currency = currency)
                    THEN 'account missing'
                    ELSE 'new account' END
          FROM payoutq.read_winners(user_ids, amounts) w,
               LATERAL (SELECT payoutq.user_balance(w.user_id, currency) AS balance) b;
END $$;

CREATE OR REPLACE VIEW payoutq.status AS
SELECT j.id AS job_id, j.reference, j.challenge_id, j.status,
       coalesce(j.total_winners, 0)::bigint AS total_winners,
       p.completed + p.failed AS processed_winners,
       p.completed AS completed_count, p.failed AS failed_count,
       coalesce(j.total_winners, 0) - p.completed - p.failed AS pending_count,
       s.progress, round(s.progress * 100, 2) AS progress_percent,
       j.total_pool, j.platform_fee, p.settled AS amount_paid,
       round(s.rate, 1) AS entries_per_second,
       -- A job that was paused for months may seem to need longer than timestamps go.
       CASE WHEN j.status = 'running' AND s.rate > 0
                 AND j.total_winners - p.completed - p.failed < s.rate * extract(epoch FROM interval '100 years')
            THEN clock_timestamp() + make_interval(secs =>
                 ((j.total_winners - p.completed - p.failed) / s.rate)::float8) END AS eta,
       j.created_at, j.started_at, j.completed_at, j.error
  FROM payoutq.job j
 CROSS JOIN LATERAL (SELECT coalesce(sum(completed), 0)::bigint AS completed,
                            coalesce(sum(failed), 0)::bigint AS failed,
                            coalesce(sum(settled), 0)::bigint AS settled
                       FROM payoutq.counts WHERE counts.job_id = j.id) p
 CROSS JOIN LATERAL (SELECT CASE WHEN j.status = 'completed' THEN 1.0000
                                 WHEN j.total_winners > 0
                                 THEN least(round((p.completed + p.failed)::numeric / j.total_winners, 4), 0.9999)
                                 ELSE 0.0000 END AS progress,
                            (p.completed + p.failed) / nullif(extract(epoch FROM
                                coalesce(j.completed_at, clock_timestamp()) - j.started_at), 0) AS rate) s;

CREATE OR REPLACE FUNCTION @extschema@.payout_cancel_job(job_id bigint, reason text DEFAULT NULL) RETURNS void
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

CREATE FUNCTION payoutq.cancel_query() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_cancel_backend(w.pid) FROM payoutq.workers() w WHERE w.job_id = NEW.id AND w.batch_no = 0;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_retry_job(job_id bigint) RETURNS bigint
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

CREATE OR REPLACE FUNCTION @extschema@.payout_trigger_job(job_id bigint) RETURNS void
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

CREATE OR REPLACE FUNCTION @extschema@.payout_reverse_entry(job_id bigint, user_id text, amount bigint, reason text DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.job := payoutq.locked_job(job_id);
    entry payoutq.entry;
    reversed numeric;
    id bigint;
BEGIN
    SELECT e.* INTO entry FROM payoutq.entry e WHERE e.job_id = target.id AND e.user_id = user_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'job % has no entry for user "%"', target.id, user_id USING ERRCODE = 'undefined_object';
    END IF;
    IF amount IS NULL OR amount <= 0 THEN
        RAISE EXCEPTION 'amount % is not positive', amount USING ERRCODE = 'check_violation';
    END IF;
    IF NOT EXISTS (SELECT FROM payoutq.batch b WHERE b.job_id = target.id AND b.status = 'completed'
                      AND entry.seq BETWEEN b.first_seq AND b.last_seq) THEN
        RAISE EXCEPTION 'the entry of user "%" is not paid', user_id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;

    -- The job's lock makes us the only one who counts.
    SELECT coalesce(sum(m.amount), 0) INTO reversed FROM payoutq.movement m
     WHERE m.job_id = target.id AND m.kind = 'reversal' AND m.entry_seq = entry.seq;
    IF reversed + amount > entry.amount THEN
        RAISE EXCEPTION 'reversals exceed the entry'
            USING ERRCODE = 'check_violation',
                  DETAIL = format('%s of %s are reversed already.', reversed, entry.amount);
    END IF;

    -- In the order in which everybody locks accounts; of one and the same, first what it has.
    PERFORM payoutq.change_balance(c.account, target.currency, c.change)
       FROM (SELECT * FROM (VALUES (user_id, -amount), (target.source_account, amount)) AS v (account, change)
              ORDER BY v.account COLLATE "C", v.change) c;
    INSERT INTO payoutq.movement AS m (kind, debit_account, credit_account, currency, amount, job_id, entry_seq, reason)
    VALUES ('reversal', user_id, target.source_account, target.currency, amount, target.id, entry.seq, reason)
    RETURNING m.id INTO id;
    RETURN id;
END $$;

CREATE FUNCTION payoutq.enter_challenge(challenge_id bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_enter_challenge_sql';

COMMENT ON FUNCTION payoutq.enter_challenge(bigint) IS
'waits for those who wait to lock the challenge''s row for themselves, and has others wait until the transaction ends';

CREATE FUNCTION payoutq.lock_challenge(challenge_id bigint, stays boolean) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_lock_challenge_sql';

COMMENT ON FUNCTION payoutq.lock_challenge(bigint, boolean) IS
'locks the challenge''s row FOR UPDATE, after those who have entered; whoever stays has entered it, too';

CREATE FUNCTION payoutq.locked_challenge(challenge_id bigint, stays boolean DEFAULT false) RETURNS payoutq.challenge
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE
    challenge payoutq.challenge;
BEGIN
    PERFORM payoutq.lock_challenge(challenge_id, stays);
    SELECT c.* INTO challenge FROM payoutq.challenge c WHERE c.id = challenge_id;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_challenge(challenge_id);
    END IF;
    RETURN challenge;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_create_challenge(
    title text, due_at timestamptz DEFAULT NULL, creator_id text DEFAULT NULL, challenger_id text DEFAULT NULL,
    challenged_id text DEFAULT NULL, description text DEFAULT NULL, category text DEFAULT NULL, fee_bps integer DEFAULT 0,
    min_stakes integer DEFAULT NULL, currency text DEFAULT 'USD', metadata jsonb DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    id bigint;
BEGIN
    IF title IS NULL OR title = '' THEN
        RAISE EXCEPTION 'title must not be null or empty' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF octet_length(title) > 1000 THEN
        RAISE EXCEPTION 'title is too long'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('It has %s bytes; the limit is 1000.', octet_length(title));
    END IF;
    IF currency IS NULL OR currency = '' OR octet_length(currency) > 63 THEN
        RAISE EXCEPTION 'currency must have 1 to 63 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF fee_bps IS NULL OR fee_bps NOT BETWEEN 0 AND 9999 THEN
        RAISE EXCEPTION 'fee_bps must be between 0 and 9999, not %', coalesce(fee_bps::text, 'null')
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'It is in hundredths of a percent of the pool.';
    END IF;
    IF min_stakes <= 0 THEN
        RAISE EXCEPTION 'min_stakes must be greater than zero, not %', min_stakes
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT isfinite(due_at) THEN
        RAISE EXCEPTION 'due_at must be a finite time, not %', due_at
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Without it the challenge is open until it is resolved.';
    END IF;
    PERFORM payoutq.require_user_id(u) FROM unnest(ARRAY[creator_id, challenger_id, challenged_id]) u WHERE u IS NOT NULL;

    INSERT INTO payoutq.challenge AS c (title, description, category, creator_id, challenger_id, challenged_id, currency,
                                        fee_bps, min_stakes, due_at, metadata)
    VALUES (title, description, category, creator_id, challenger_id, challenged_id, currency,
            fee_bps, min_stakes, due_at, metadata)
    RETURNING c.id INTO id;
    RETURN id;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_place_stake(challenge_id bigint, user_id text, side text, amount bigint,
                                   reference text DEFAULT NULL, at timestamptz DEFAULT clock_timestamp()) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.challenge;
    stake record;
    is_large boolean := amount > 1e12;
BEGIN
    IF side IS NULL OR side NOT IN ('YES', 'NO') THEN
        RAISE EXCEPTION 'invalid side "%"', coalesce(side, 'null')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Sides are YES and NO.';
    END IF;
    PERFORM payoutq.require_time(at);
    SELECT c.* INTO target FROM payoutq.challenge c WHERE c.id = challenge_id;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_challenge(challenge_id);
    END IF;

    -- Whoever asks again gets the same answer, also when it is closed.
    IF NOT EXISTS (SELECT FROM payoutq.movement m WHERE m.reference = reference AND m.kind = 'stake') THEN
        IF target.status IN ('pending', 'active') AND at >= target.due_at AND target.created_at < target.due_at THEN
            RAISE EXCEPTION 'challenge % cannot be staked on', target.id
                USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('It was due at %s.', target.due_at);
        END IF;

        -- While it is pending, stakes are counted one after the other.
        IF target.status = 'pending' OR is_large OR target.is_large THEN
            target := payoutq.locked_challenge(challenge_id, stays => true);
        ELSIF target.status = 'active' THEN
            PERFORM payoutq.enter_challenge(challenge_id);
            SELECT c.* INTO target FROM payoutq.challenge c WHERE c.id = challenge_id FOR KEY SHARE;
        END IF;
        IF target.status NOT IN ('pending', 'active') THEN
            PERFORM payoutq.refuse_challenge(target, 'staked on');
        END IF;
        IF is_large OR target.is_large THEN
            PERFORM payoutq.refuse_overflow(target, amount);
        END IF;
    END IF;

    stake := payoutq.post('stake', user_id, '@challenge:' || target.id, amount, reference, target.currency, target.id, side);

    -- Changed by each stake, so that at a higher isolation level those who did
    -- not see each other fail instead of both leaving it pending.
    IF target.status = 'pending' AND stake.is_new THEN
        UPDATE payoutq.challenge c
           SET early_stakes = c.early_stakes + 1,
               (status, activated_at) = (
               SELECT CASE WHEN enough THEN 'active' ELSE 'pending' END, CASE WHEN enough THEN at END
                 FROM (SELECT CASE WHEN c.min_stakes IS NOT NULL THEN c.early_stakes + 1 >= c.min_stakes
                                   ELSE EXISTS (SELECT FROM payoutq.movement m
                                                 WHERE m.kind = 'stake' AND m.challenge_id = c.id AND m.side = 'YES')
                                    AND EXISTS (SELECT FROM payoutq.movement m
                                                 WHERE m.kind = 'stake' AND m.challenge_id = c.id AND m.side = 'NO') END) AS e (enough))
         WHERE c.id = target.id;
    END IF;
    RETURN stake.id;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_add_evidence(challenge_id bigint, user_id text, evidence jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.challenge;
BEGIN
    PERFORM payoutq.require_user_id(user_id);
    IF evidence IS NULL THEN
        RAISE EXCEPTION 'evidence must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM payoutq.enter_challenge(challenge_id);
    SELECT c.* INTO target FROM payoutq.challenge c WHERE c.id = challenge_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_challenge(challenge_id);
    ELSIF target.resolved_at IS NOT NULL OR target.status = 'cancelled' THEN
        PERFORM payoutq.refuse_challenge(target, 'given evidence');
    END IF;
    UPDATE payoutq.challenge c
       SET evidence = c.evidence || jsonb_build_object('user_id', user_id, 'evidence', evidence, 'at', clock_timestamp())
     WHERE c.id = target.id;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_resolve_challenge(INOUT challenge_id bigint, INOUT result text, IN notes text DEFAULT NULL,
                                         OUT payout_job_id bigint, OUT refund_job_id bigint, OUT message text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.challenge;
    pool bigint;
    fee bigint;
    winners bigint;
BEGIN
    IF result IS NULL OR result NOT IN ('challenger_won', 'challenged_won', 'draw') THEN
        RAISE EXCEPTION 'invalid result "%"', coalesce(result, 'null')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Results are challenger_won, challenged_won and draw.';
    END IF;
    target := payoutq.locked_challenge(challenge_id);
    IF target.status = 'active' AND target.due_at IS NULL THEN
        -- Nobody else closes it. That takes as long as it takes to sum up the stakes.
        PERFORM payoutq.close_challenges(ARRAY[target.id], 'pending_admin', clock_timestamp());
        SELECT c.* INTO target FROM payoutq.challenge c WHERE c.id = challenge_id;
    END IF;
    IF target.status <> 'pending_admin' OR target.result IS NOT NULL THEN
        PERFORM payoutq.refuse_challenge(target, 'resolved');
    END IF;

    pool := target.yes_pool + target.no_pool;
    fee := floor(pool::numeric * target.fee_bps / 10000);
    winners := CASE result WHEN 'challenger_won' THEN target.yes_stakes WHEN 'challenged_won' THEN target.no_stakes END;
    IF winners > 0 THEN
        payout_job_id := payoutq.create_challenge_job(target, 'payout', fee);
        message := format('%s share%s %s minor units of %s%s.',
                          CASE winners WHEN 1 THEN '1 winning stake' ELSE winners || ' winning stakes' END, CASE winners WHEN 1 THEN 's' END,
                          pool - fee, target.currency, CASE WHEN fee > 0 THEN ', after a fee of ' || fee END);
    ELSE
        refund_job_id := payoutq.create_challenge_job(target, 'refund', 0);
        message := format('%s: all %s stakes go back, %s minor units of %s.',
                          CASE winners WHEN 0 THEN 'Nobody has staked on the winning side' ELSE 'Draw' END,
                          target.yes_stakes + target.no_stakes, pool, target.currency);
    END IF;
    UPDATE payoutq.challenge c
       SET result = result, resolved_at = clock_timestamp(), job_id = coalesce(payout_job_id, refund_job_id),
           admin_notes = coalesce(notes, c.admin_notes)
     WHERE c.id = target.id;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_cancel_challenge(challenge_id bigint, reason text DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.challenge := payoutq.locked_challenge(challenge_id);
    job_id bigint;
BEGIN
    IF target.status NOT IN ('pending', 'active', 'pending_admin') OR target.result IS NOT NULL THEN
        PERFORM payoutq.refuse_challenge(target, 'cancelled');
    END IF;

    PERFORM payoutq.close_challenges(ARRAY[target.id], 'cancelled', clock_timestamp());
    UPDATE payoutq.challenge c SET status = 'cancelled', admin_notes = coalesce(reason, c.admin_notes)
     WHERE c.id = target.id RETURNING c.* INTO target;
    IF target.yes_stakes + target.no_stakes > 0 THEN
        job_id := payoutq.create_challenge_job(target, 'refund', 0);
    END IF;
    UPDATE payoutq.challenge c
       SET job_id = job_id, completed_at = CASE WHEN job_id IS NULL THEN clock_timestamp() END
     WHERE c.id = target.id;
    RETURN job_id;
END $$;

CREATE OR REPLACE FUNCTION payoutq.reporting_transfer(transfer_id bigint, attempt_token uuid) RETURNS payoutq.transfer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.transfer;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_transfer(transfer_id);
    ELSIF target.status <> 'processing' OR target.token IS DISTINCT FROM attempt_token THEN
        RAISE EXCEPTION 'the report on transfer % is late', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = CASE WHEN target.status <> 'processing' THEN format('It is %s.', target.status)
                                ELSE format('Attempt %s is at it by now.', target.attempts) END,
                  HINT = 'Nothing was changed. ' || CASE WHEN target.status IN ('sent', 'completed') THEN 'If this is what it should be, there is nothing left to report.'
                                                         ELSE 'What the provider has done under the idempotency key is found by the next attempt.' END;
    END IF;
    RETURN target;
END $$;

CREATE OR REPLACE FUNCTION payoutq.backoff(failures integer) RETURNS interval
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT least(payoutq.setting('payoutq.retry_cap')::interval,
                 payoutq.setting('payoutq.retry_base')::interval * 2 ^ least(failures - 1, 20)) * (0.5 + random() / 2)
$$;

CREATE FUNCTION payoutq.is_cancelled(job_id bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    job_status text;
BEGIN
    SELECT j.status INTO job_status FROM payoutq.job j WHERE j.id = job_id FOR KEY SHARE;
    RETURN job_status = 'cancelled';
END $$;

CREATE OR REPLACE FUNCTION payoutq.fail_transfer(t payoutq.transfer, error_class text, reason text, wait interval, counts boolean) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    in_generation integer := t.attempts - t.first_attempt + 1;

    -- Money that may have left is not given back because of a failure that says
    -- nothing of the earlier attempts.
    outcome text := CASE WHEN error_class = 'permanent' THEN 'failed_terminal'
                         WHEN error_class = 'unknown' OR t.maybe_sent THEN 'unknown'
                         WHEN counts AND in_generation >= payoutq.setting('payoutq.max_attempts')::integer THEN 'failed_terminal'
                         ELSE 'retryable' END;
    next_try timestamptz := clock_timestamp() + coalesce(wait, payoutq.backoff(in_generation));
BEGIN
    IF outcome = 'retryable' AND payoutq.is_cancelled(t.job_id) THEN
        outcome := 'failed_terminal';
    END IF;
    reason := left(reason, 1000);
    PERFORM payoutq.end_attempt(t, error_class, NULL, reason);
    UPDATE payoutq.transfer
       SET status = outcome, error = reason, maybe_sent = maybe_sent OR outcome = 'unknown', updated_at = clock_timestamp(),
           settlements = settlements + CASE outcome WHEN 'failed_terminal' THEN 1 ELSE 0 END,
           first_sent_at = CASE WHEN outcome <> 'retryable' THEN first_sent_at END,
           first_attempt = first_attempt + CASE WHEN counts THEN 0 ELSE 1 END,
           run_after = next_try
     WHERE id = t.id;
    IF outcome = 'failed_terminal' THEN
        PERFORM payoutq.settle_transfer(t, outcome);
    END IF;
    RETURN outcome;
END $$;

CREATE OR REPLACE FUNCTION payoutq.record_answer(transfer_id bigint, token uuid, outcome text, reference text, reason text, http_status integer,
                                      retry_after integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.transfer;
    wait interval := make_interval(secs => retry_after);
BEGIN
    -- Most are sent, and that is as mark_sent() does it.
    IF outcome = 'sent' THEN
        UPDATE payoutq.transfer t
           SET status = 'sent', provider_reference = reference, error = NULL, run_after = clock_timestamp(), updated_at = clock_timestamp()
         WHERE t.id = transfer_id AND t.status = 'processing' AND t.token = record_answer.token
        RETURNING t.* INTO target;
        UPDATE payoutq.attempt a
           SET outcome = 'sent', finished_at = target.updated_at, provider_reference = reference, http_status = record_answer.http_status
         WHERE a.transfer_id = target.id AND a.attempt = target.attempts;
        DELETE FROM payoutq.circuit c WHERE c.provider = target.provider;
        IF target.id IS NOT NULL THEN
            RETURN;
        END IF;
    ELSE
        SELECT t.* INTO target FROM payoutq.transfer t
         WHERE t.id = transfer_id AND t.status = 'processing' AND t.token = record_answer.token FOR UPDATE;
    END IF;
    IF target.id IS NULL THEN
        IF EXISTS (SELECT FROM payoutq.transfer t WHERE t.id = transfer_id AND t.provider_reference = reference) THEN
            RETURN;  -- its web hook was first
        END IF;
        RAISE LOG 'the answer to transfer % came late: %', transfer_id, outcome;
        -- It was failed meanwhile, or goes on under another key.
        SELECT t.* INTO target FROM payoutq.transfer t JOIN payoutq.attempt a ON a.transfer_id = t.id AND a.token = record_answer.token
         WHERE t.id = record_answer.transfer_id AND (t.status = 'failed_terminal' OR t.generation <> a.generation) FOR UPDATE OF t;
        IF FOUND AND outcome IN ('sent', 'completed') THEN
            PERFORM payoutq.adopt_transfer(target, payoutq.idempotency_key(target.id, a.generation), reference)
               FROM payoutq.attempt a WHERE a.transfer_id = target.id AND a.token = record_answer.token;
        END IF;
        RETURN;
    END IF;
    UPDATE payoutq.attempt a SET http_status = record_answer.http_status, provider_reference = reference
     WHERE a.transfer_id = target.id AND a.attempt = target.attempts;

    CASE outcome
        WHEN 'completed' THEN
            PERFORM payoutq.end_attempt(target, 'completed', reference, NULL);
            target.provider_reference := reference;
            PERFORM payoutq.complete_or_leave(target);
        WHEN 'refused', 'unreachable' THEN
            PERFORM payoutq.fail_transfer(target, 'transient', reason, interval '0', false),
                    payoutq.open_circuit(target.provider, outcome, reason);
        WHEN 'unfunded' THEN
            PERFORM payoutq.open_circuit(target.provider, outcome, reason);
            IF target.maybe_sent OR payoutq.is_cancelled(target.job_id) THEN
                PERFORM payoutq.fail_transfer(target, CASE WHEN target.maybe_sent THEN 'unknown' ELSE 'permanent' END, reason, NULL, true);
            ELSE
                -- A definite rejection, which the provider would repeat under the old key
                PERFORM payoutq.end_attempt(target, 'transient', NULL, reason),
                        payoutq.next_generation(target, target.destination);
            END IF;
        WHEN 'throttled' THEN
            PERFORM payoutq.fail_transfer(target, 'transient', reason, coalesce(wait, interval '1 s'), false);
        ELSE
            -- Whoever answers may not be who was called before (another account, a proxy).
            PERFORM payoutq.fail_transfer(target, CASE WHEN target.maybe_sent AND outcome = 'permanent' THEN 'unknown' ELSE outcome END,
                                          reason, wait, true);
    END CASE;
    IF outcome = 'completed' THEN
        DELETE FROM payoutq.circuit c WHERE c.provider = target.provider;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION payoutq.open_circuit(provider text, outcome text, reason text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    pause interval := CASE outcome WHEN 'unreachable' THEN payoutq.setting('payoutq.retry_base')::interval ELSE '1 minute' END;
BEGIN
    INSERT INTO payoutq.circuit AS c VALUES (provider, 1, clock_timestamp() + pause, reason, outcome = 'unfunded')
    ON CONFLICT ON CONSTRAINT circuit_pkey DO UPDATE
       SET failures = c.failures + 1, reason = excluded.reason, sends_only = excluded.sends_only,
           open_until = clock_timestamp() + pause * least(15, 2 ^ least(c.failures, 4))
     WHERE c.open_until <= clock_timestamp();
END $$;

CREATE OR REPLACE FUNCTION payoutq.record_lookup(transfer_id bigint, idempotency_key text, outcome text, reference text, reason text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.transfer;
    quiet_since timestamptz;
    lost_keys bigint;
    answered boolean;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id AND t.status = 'unknown' FOR UPDATE;
    IF NOT FOUND OR payoutq.idempotency_key(target.id, target.generation) <> record_lookup.idempotency_key THEN
        RETURN;
    END IF;
    SELECT max(coalesce(a.finished_at, a.started_at)), count(DISTINCT a.generation) FILTER (WHERE a.outcome = 'unknown'),
           coalesce(bool_or(a.generation = target.generation AND a.provider_reference IS NOT NULL), false)
      INTO quiet_since, lost_keys, answered
      FROM payoutq.attempt a WHERE a.transfer_id = target.id;

    IF outcome = 'sent' THEN
        PERFORM payoutq.mark_sent(target, reference);
    ELSIF outcome = 'absent' AND NOT answered AND clock_timestamp() > quiet_since + payoutq.quiet_period(target.provider) THEN
        IF lost_keys >= payoutq.setting('payoutq.max_attempts')::integer
           OR payoutq.is_cancelled(target.job_id) THEN
            UPDATE payoutq.transfer t
               SET status = 'failed_terminal', settlements = settlements + 1, updated_at = clock_timestamp()
             WHERE t.id = target.id;
            PERFORM payoutq.settle_transfer(target, 'failed_terminal');
        ELSE
            PERFORM payoutq.next_generation(target, target.destination);
        END IF;
    ELSE
        IF outcome IN ('refused', 'unreachable') THEN
            PERFORM payoutq.open_circuit(target.provider, outcome, reason);
        END IF;
        UPDATE payoutq.transfer t
           SET error = coalesce(reason, t.error),
               run_after = clock_timestamp() + CASE outcome WHEN 'absent' THEN payoutq.quiet_period(t.provider) / 4
                                                            ELSE payoutq.backoff(t.attempts) END
         WHERE t.id = target.id;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_maintain(max_rows integer DEFAULT 100000) RETURNS bigint
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

CREATE OR REPLACE FUNCTION payoutq.schedule(username text, process text, deadlines text, notifications text, maintenance text) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted jsonb := (SELECT coalesce(jsonb_agg(jsonb_build_object('name', j.name, 'command', j.command, 'schedule', t.schedule)), '[]')
                       FROM payoutq.scheduled_jobs() j
                       JOIN (VALUES ('payoutq process', process), ('payoutq deadlines', deadlines),
                                    ('payoutq notifications', notifications), ('payoutq maintenance', maintenance))
                            AS t (name, schedule) USING (name)
                      WHERE t.schedule IS NOT NULL);
BEGIN
    -- In one call: each may be a transaction of its own, in another database. The
    -- lock, because another database may be choosing the same names.
    RETURN payoutq.execute_in_cron(format($sql$
        LOCK TABLE cron.job IN SHARE ROW EXCLUSIVE MODE;
        SELECT count(cron.unschedule(j.jobid)) FROM cron.job j
         WHERE j.database = %1$L AND j.jobname = ANY (%2$s)
           AND (j.username <> %3$L OR NOT EXISTS (SELECT FROM jsonb_array_elements(%4$L) w
                                                   WHERE j.jobname IN (w ->> 'name', w ->> 'name' || %5$L)));
        SELECT count(cron.schedule_in_database(
                   w ->> 'name' || CASE WHEN EXISTS (SELECT FROM cron.job j WHERE j.jobname = w ->> 'name' AND j.username = %3$L
                                                        AND j.database <> %1$L) THEN %5$L ELSE '' END,
                   w ->> 'schedule', w ->> 'command', %1$L, %3$L, true))
          FROM jsonb_array_elements(%4$L) w$sql$,
        current_database(), payoutq.own_cron_jobs(), username, wanted, payoutq.job_suffix()))::integer;
END $$;

CREATE OR REPLACE FUNCTION @extschema@.payout_grant(role_name regrole, level text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    levels text[] := CASE level WHEN 'reader' THEN ARRAY['reader'] WHEN 'operator' THEN ARRAY['reader', 'operator']
                                WHEN 'admin' THEN ARRAY['reader', 'operator', 'admin'] END;
    home regnamespace := (SELECT x.extnamespace FROM pg_extension x WHERE x.extname = 'payoutq');
BEGIN
    IF levels IS NULL THEN
        RAISE EXCEPTION 'invalid level "%"', coalesce(level, 'null')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Levels are reader, operator and admin.';
    END IF;
    PERFORM payoutq.change_grants(role_name, levels, 'GRANT');

    -- There may be more in the schema than the extension, so that is for its owner.
    IF NOT has_schema_privilege(role_name, home, 'USAGE') THEN
        RAISE WARNING 'role % lacks USAGE on schema %', role_name, home
            USING ERRCODE = '01007', HINT = format('GRANT USAGE ON SCHEMA %s TO %s.', home, role_name);
    END IF;
END $$;

COMMENT ON COLUMN @extschema@.payout_jobs.eta IS 'when the job will be finished at this speed; null when it is not running, or when that is more than 100 years away';

COMMENT ON COLUMN @extschema@.payout_progress.time_left IS 'until the job is finished at this speed; null when it is not running, or when that is more than 100 years';

CREATE CONSTRAINT TRIGGER cancel_query AFTER UPDATE ON payoutq.job DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.status = 'cancelled' AND OLD.status <> 'cancelled') EXECUTE FUNCTION payoutq.cancel_query();

-- As for all functions of the extension
REVOKE ALL ON FUNCTION payoutq.require_current(bigint), payoutq.enter_challenge(bigint), payoutq.lock_challenge(bigint, boolean),
    payoutq.locked_challenge(bigint, boolean), payoutq.is_cancelled(bigint), payoutq.cancel_query() FROM PUBLIC;
