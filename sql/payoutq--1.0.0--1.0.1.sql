-- From 1.0.0 to 1.0.1: bodies of functions only.
\echo Use "ALTER EXTENSION payoutq UPDATE" to load this file. \quit
SET LOCAL search_path = pg_catalog, pg_temp;

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
            IF target.maybe_sent OR EXISTS (SELECT FROM payoutq.job j WHERE j.id = target.job_id AND j.status = 'cancelled') THEN
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
