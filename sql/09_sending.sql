-- Sending: what the dispatcher (src/dispatcher.c) asks for and records. Calls are
-- claimed in one transaction, made without any, and recorded in another.

-- A provider that refuses everybody (wrong key), or cannot be reached, is left
-- alone for a while.
CREATE TABLE payoutq.circuit (
    provider   text PRIMARY KEY,
    failures   integer NOT NULL,
    open_until timestamptz NOT NULL,
    reason     text NOT NULL,
    sends_only boolean NOT NULL             -- it may still be asked what has become of transfers
);
COMMENT ON TABLE payoutq.circuit IS 'providers that are not called before open_until';

-- Options of the server, then of the user mapping for PUBLIC, as name, value, ...
CREATE FUNCTION payoutq.sending_providers() RETURNS TABLE (name text, options text[], open_until timestamptz, sends_only boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.srvname, ARRAY(SELECT unnest(ARRAY[o.option_name, o.option_value])
                              FROM (SELECT * FROM pg_options_to_table(s.srvoptions)
                                    UNION ALL SELECT * FROM pg_options_to_table(m.umoptions)) o),
           c.open_until, coalesce(c.sends_only, false)
      FROM pg_foreign_server s
      JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider'
      LEFT JOIN pg_user_mapping m ON m.umserver = s.oid AND m.umuser = 0
      LEFT JOIN payoutq.circuit c ON c.provider = s.srvname
     WHERE payoutq.provider_option(s.srvname, 'kind') NOT IN ('external', 'pusher') OR s.srvname = payoutq.push_provider()
$$;

-- When the next call to a provider is due; null: there is none.
CREATE FUNCTION payoutq.sending_due() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    SELECT min(d.run_after)
      FROM payoutq.sending_providers() p,
           LATERAL (SELECT greatest(p.open_until, min(t.run_after)) FROM payoutq.transfer t
                     WHERE t.provider = p.name AND t.status IN ('pending', 'retryable', 'unknown', 'processing')
                    HAVING min(t.run_after) IS NOT NULL
                     UNION ALL
                    SELECT greatest(CASE WHEN NOT p.sends_only THEN p.open_until END, min(t.run_after)) FROM payoutq.transfer t
                     WHERE t.provider = p.name AND t.status = 'sent' AND t.confirmed_at IS NULL
                    HAVING min(t.run_after) IS NOT NULL
                     UNION ALL
                    SELECT greatest(p.open_until, min(n.push_after)) FROM payoutq.notification n
                     WHERE n.push_after IS NOT NULL AND p.name = payoutq.push_provider()
                    HAVING min(n.push_after) IS NOT NULL) AS d (run_after)
$$;

-- What a provider has answered to a transfer that was sent. A report that comes
-- when the lease has lapsed changes nothing.
CREATE FUNCTION payoutq.record_answer(transfer_id bigint, token uuid, outcome text, reference text, reason text, http_status integer,
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

-- Longer each time, up to fifteen times as long as at first. Somebody has to
-- mend what is refused; a connection may be there again in a moment.
CREATE FUNCTION payoutq.open_circuit(provider text, outcome text, reason text) RETURNS void
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

-- Transfers to ask the provider about; each is asked about once at a time.
CREATE FUNCTION payoutq.claim_confirmations(provider text, max_count integer, lease interval, since timestamptz)
RETURNS TABLE (transfer_id bigint, provider_reference text, amount bigint, currency text, destination text, due_at timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
    RETURN QUERY
    UPDATE payoutq.transfer t SET run_after = clock_timestamp() + lease
      FROM (SELECT d.id, d.run_after FROM payoutq.transfer d
             WHERE d.provider = provider AND d.status = 'sent' AND d.confirmed_at IS NULL
               AND d.run_after BETWEEN since AND clock_timestamp()
             ORDER BY d.run_after, d.id LIMIT max_count FOR UPDATE SKIP LOCKED) due
     WHERE t.id = due.id
    RETURNING t.id, t.provider_reference, t.amount, t.currency, t.destination, due.run_after;
END $$;

CREATE FUNCTION payoutq.record_confirmation(transfer_id bigint, outcome text, reason text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.transfer;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t
     WHERE t.id = transfer_id AND t.status = 'sent' AND t.confirmed_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;  -- a web hook was faster
    END IF;
    CASE outcome
        WHEN 'completed' THEN
            PERFORM payoutq.complete_or_leave(target);
            IF reason IS NOT NULL THEN
                UPDATE payoutq.transfer t SET error = reason WHERE t.id = target.id;
            END IF;
        WHEN 'rejected' THEN
            PERFORM payoutq.reject_transfer(target, reason);
        ELSE
            IF outcome IN ('refused', 'unreachable') THEN
                PERFORM payoutq.open_circuit(target.provider, outcome, reason);
            END IF;
            -- Not so often any more when it takes long.
            UPDATE payoutq.transfer t
               SET error = reason, run_after = clock_timestamp() + greatest(payoutq.setting('payoutq.confirm_interval')::interval,
                                                                            least((clock_timestamp() - t.updated_at) / 10, interval '1 hour'))
             WHERE t.id = target.id;
    END CASE;
END $$;

-- Transfers of which nobody knows, to ask what was done under their keys.
CREATE FUNCTION payoutq.claim_lookups(provider text, max_count integer, lease interval)
RETURNS TABLE (transfer_id bigint, idempotency_key text, destination text, amount bigint, currency text, job_id bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    key_life interval := payoutq.key_life(provider);
BEGIN
    PERFORM payoutq.end_lapsed_leases(provider, 100);
    RETURN QUERY
    UPDATE payoutq.transfer t SET run_after = clock_timestamp() + lease
      FROM (SELECT d.id FROM payoutq.transfer d
             WHERE d.provider = provider AND d.status = 'unknown' AND d.run_after <= clock_timestamp()
               AND payoutq.wants_lookup(d, key_life)
             ORDER BY d.run_after, d.id LIMIT max_count FOR UPDATE SKIP LOCKED) due
     WHERE t.id = due.id
    RETURNING t.id, payoutq.idempotency_key(t.id, t.generation), t.destination, t.amount, t.currency, t.job_id;
END $$;

-- That nothing was done counts when it is quiet: the provider may still have
-- been at it; and not if there was an answer with something that was done. Then
-- a new key may be used, as often as a key may be tried.
CREATE FUNCTION payoutq.record_lookup(transfer_id bigint, idempotency_key text, outcome text, reference text, reason text) RETURNS void
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

-- The provider has made a transfer under a key of ours, and says so of its own
-- accord, or in its books. Ours is sent, then, also if it was tried under another
-- key since, which is not used again; so also in a copy of the database that does
-- not know of the call. What was failed here is only marked: the money is there
-- twice. The transfer is locked. Returns whether it was of use.
CREATE FUNCTION payoutq.adopt_transfer(t payoutq.transfer, key text, reference text) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    made_under integer := coalesce(substring(key FROM ':g([0-9]{1,9})$')::integer, 1);
BEGIN
    IF octet_length(reference) BETWEEN 1 AND 255 IS NOT TRUE
       OR EXISTS (SELECT FROM payoutq.transfer o WHERE o.provider = t.provider AND o.provider_reference = reference)
       -- It was ours before, and was rejected.
       OR EXISTS (SELECT FROM payoutq.attempt a
                   WHERE a.transfer_id = t.id AND a.provider_reference = reference AND a.outcome IN ('sent', 'completed')) THEN
        RETURN false;
    ELSIF t.provider_reference IS NOT NULL THEN
        RAISE WARNING 'the provider has made transfer % twice, as "%" and "%"', t.id, t.provider_reference, reference;
        RETURN false;
    ELSIF t.status = 'failed_terminal' THEN
        UPDATE payoutq.transfer
           SET provider_reference = reference, error = 'failed here, and made by the provider', updated_at = clock_timestamp()
         WHERE id = t.id;
        RAISE WARNING 'transfer % was failed, and the provider has made it', t.id;
        RETURN true;
    -- A call that is under way may be the one that made it, if it has this key.
    ELSIF NOT (t.status IN ('pending', 'retryable', 'unknown')
               OR t.status = 'processing' AND (t.generation = made_under OR t.run_after <= clock_timestamp())) THEN
        RETURN false;
    END IF;

    IF t.attempts < t.first_attempt OR t.generation <> made_under THEN
        IF t.status = 'processing' THEN
            PERFORM payoutq.end_attempt(t, 'unknown', NULL, 'the lease ended without a report');
        END IF;
        t.attempts := t.attempts + 1;
        INSERT INTO payoutq.attempt (transfer_id, attempt, generation, token, started_at)
        VALUES (t.id, t.attempts, made_under, gen_random_uuid(), clock_timestamp());
        UPDATE payoutq.transfer
           SET attempts = t.attempts, first_attempt = t.attempts, generation = made_under,
               first_sent_at = coalesce(first_sent_at, clock_timestamp())
         WHERE id = t.id;
    END IF;
    PERFORM payoutq.mark_sent(t, reference);
    RETURN true;
END $$;

CREATE FUNCTION payoutq.quiet_period(provider text) RETURNS interval
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(payoutq.provider_option(provider, 'quiet_period'), '1 hour')::interval
$$;

-- Pushes. Nobody can be asked whether a notification has arrived, so the claim,
-- which is committed before the call, takes it out of the queue: each is pushed
-- at most once, whatever ends on the way. Of each user in the order of ids, one
-- at a time.
CREATE FUNCTION payoutq.claim_pushes(max_count integer, busy text[])
RETURNS TABLE (notification_id bigint, attempt integer, user_id text, type text, data text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    claimed_at timestamptz := clock_timestamp();
    too_old timestamptz := claimed_at - interval '1 day';
BEGIN
    UPDATE payoutq.notification n SET push_after = NULL, push_error = concat_ws(', ', 'too old', n.push_error)
     WHERE n.id IN (SELECT o.id FROM payoutq.notification o WHERE o.push_after IS NOT NULL AND o.created_at < too_old
                     ORDER BY o.created_at LIMIT 10000 FOR UPDATE SKIP LOCKED);
    RETURN QUERY
    WITH due AS (
        SELECT n.id FROM payoutq.notification n
         WHERE n.push_after <= claimed_at AND n.created_at >= too_old AND n.user_id <> ALL (busy)
           AND NOT EXISTS (SELECT FROM payoutq.notification e
                            WHERE e.user_id = n.user_id AND e.push_after IS NOT NULL AND e.id < n.id)
         ORDER BY n.push_after, n.id LIMIT max_count FOR UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE payoutq.notification n
           SET push_after = NULL, push_attempts = n.push_attempts + 1, push_error = 'no answer was recorded'
          FROM due WHERE n.id = due.id
        RETURNING n.*
    )
    SELECT c.id, c.push_attempts, c.user_id, c.type,
           json_build_object('id', c.id, 'type', c.type, 'title', c.title, 'body', c.body, 'urgency', c.urgency,
                             'challenge_id', c.challenge_id, 'job_id', c.job_id, 'data', c.data, 'created_at', c.created_at)::text
      FROM claimed c ORDER BY c.id;
END $$;

-- Only what was certainly not done is due again, and what comes after it for the
-- same user not before. There is no limit to how often: it is the service that is
-- down.
CREATE FUNCTION payoutq.record_push(notification_id bigint, attempt integer, provider text, outcome text, reason text,
                                    retry_after integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
DECLARE
    target payoutq.notification;
    next_try timestamptz;
BEGIN
    SELECT n.* INTO target FROM payoutq.notification n
     WHERE n.id = notification_id AND n.push_attempts = attempt AND n.push_after IS NULL AND n.pushed_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    CASE
        WHEN outcome = 'completed' THEN
            UPDATE payoutq.notification n SET pushed_at = clock_timestamp(), push_error = NULL WHERE n.id = target.id;
            DELETE FROM payoutq.circuit c WHERE c.provider = record_push.provider;
        WHEN outcome IN ('refused', 'unreachable', 'throttled') THEN
            IF outcome <> 'throttled' THEN
                PERFORM payoutq.open_circuit(provider, outcome, reason);
            END IF;
            next_try := clock_timestamp() + coalesce(make_interval(secs => retry_after), payoutq.backoff(1));
            UPDATE payoutq.notification n SET push_after = next_try, push_error = left(reason, 1000) WHERE n.id = target.id;
            IF retry_after > 0 THEN  -- else it is the circuit that waits
                UPDATE payoutq.notification n SET push_after = next_try
                 WHERE n.user_id = target.user_id AND n.push_after < next_try AND n.id > target.id;
            END IF;
        ELSE
            UPDATE payoutq.notification n SET push_error = left(reason, 1000) WHERE n.id = target.id;
    END CASE;
END $$;

-- Web hooks: what a provider tells of its own accord, at least once, in any order.

CREATE TABLE payoutq.webhook_event (
    provider    text NOT NULL,
    event_id    text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, event_id)
);
CREATE INDEX webhook_event_received ON payoutq.webhook_event (received_at);
COMMENT ON TABLE payoutq.webhook_event IS 'events of providers that were handled; kept for 30 days, in which a provider may send them again';
SELECT pg_catalog.pg_extension_config_dump('payoutq.webhook_event', '');

CREATE FUNCTION payoutq.signature_is_valid(provider text, header text, body bytea, at timestamptz) RETURNS boolean
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_signature_is_valid';

-- An event of Stripe is a hint: what it is about is read again.
CREATE FUNCTION payoutq.handle_stripe_event(provider text, event jsonb) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    object jsonb := event #> '{data,object}';
    reversed boolean := coalesce(object -> 'reversed' = 'true', false);
    target payoutq.transfer;
BEGIN
    IF event ->> 'type' LIKE 'transfer.%' IS NOT TRUE THEN
        RETURN 'ignored';
    END IF;
    SELECT t.* INTO target FROM payoutq.transfer t
     WHERE t.provider = provider AND t.provider_reference = object ->> 'id' FOR UPDATE;
    IF FOUND THEN
        IF target.status = 'sent' THEN
            UPDATE payoutq.transfer t SET run_after = least(t.run_after, clock_timestamp()) WHERE t.id = target.id;
        ELSIF event ->> 'type' = 'transfer.reversed' THEN
            -- What was failed here and made there is amended, and may be retried.
            UPDATE payoutq.transfer t
               SET error = CASE WHEN reversed THEN '' ELSE coalesce(object ->> 'amount_reversed', 'some') || ' of it ' END || 'reversed at the provider',
                   provider_reference = CASE WHEN NOT reversed OR t.status <> 'failed_terminal' THEN t.provider_reference END
             WHERE t.id = target.id;
        END IF;
        PERFORM payoutq.wake();
        RETURN 'accepted';
    END IF;

    -- It came before the answer, or instead of it.
    SELECT t.* INTO target FROM payoutq.transfer t
     WHERE t.id = payoutq.transfer_of_key(object #>> '{metadata,payoutq_key}') AND t.provider = provider
       AND object #>> '{metadata,payoutq_origin}' = payoutq.key_origin()
       AND t.amount::text = object ->> 'amount' AND lower(t.currency) = object ->> 'currency'
       AND t.destination = object ->> 'destination' FOR UPDATE;
    IF NOT FOUND OR reversed OR event ->> 'type' = 'transfer.reversed'
       OR NOT payoutq.adopt_transfer(target, object #>> '{metadata,payoutq_key}', object ->> 'id') THEN
        RETURN 'ignored';
    END IF;
    PERFORM payoutq.wake();
    RETURN 'accepted';
END $$;

CREATE FUNCTION payoutq.transfer_of_key(key text) RETURNS bigint
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT substring(key FROM '^payout:([0-9]{1,18})(:g[0-9]{1,9})?$')::bigint
$$;

CREATE FUNCTION @extschema@.payout_handle_webhook(provider text, headers jsonb, body bytea, at timestamptz DEFAULT clock_timestamp())
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    kind text := payoutq.provider_kind(provider);
    header text := (SELECT h.value FROM jsonb_each_text(headers) h
                     WHERE lower(h.key) = CASE kind WHEN 'stripe' THEN 'stripe-signature' ELSE 'payoutq-signature' END LIMIT 1);
    event jsonb;
BEGIN
    IF body IS NULL OR NOT coalesce(payoutq.signature_is_valid(provider, header, body, at), false) THEN
        RAISE EXCEPTION 'the signature of the web hook is not valid'
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Pass on the body byte by byte, and all headers; the secret is the option webhook_secret of the user mapping for PUBLIC.';
    END IF;
    event := convert_from(body, 'UTF8')::jsonb;
    IF event ->> 'id' IS NULL THEN
        RAISE EXCEPTION 'the web hook has no event id' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    INSERT INTO payoutq.webhook_event (provider, event_id) VALUES (provider, event ->> 'id') ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN 'duplicate';
    END IF;
    IF kind = 'stripe' THEN
        RETURN payoutq.handle_stripe_event(provider, event);
    END IF;
    IF event ->> 'status' IN ('completed', 'failed') IS NOT TRUE THEN
        RETURN 'ignored';
    END IF;
    RETURN @extschema@.payout_confirm_transfer(provider, event ->> 'reference', event ->> 'status' = 'completed', event ->> 'reason');
END $$;
COMMENT ON FUNCTION @extschema@.payout_handle_webhook(text, jsonb, bytea, timestamptz) IS
'handles what a provider has posted to the application: headers as an object, the body as it came; verifies its signature, and each event once; returns accepted, ignored, duplicate, or for kind webhook ({"id", "reference", "status": "completed" | "failed", "reason"}) the status of the transfer; errors: 42501 (signature), 22P02, 22023, 42704';

-- The provider's books against ours.
CREATE FUNCTION @extschema@.payout_reconcile(provider text, listing jsonb DEFAULT '[]', older_than interval DEFAULT '1 hour',
                                 repair boolean DEFAULT false)
RETURNS TABLE (finding text, transfer_id bigint, provider_reference text, amount bigint, currency text, detail text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    origin text := payoutq.key_origin();
    made record;
BEGIN
    PERFORM payoutq.provider_kind(provider);
    IF jsonb_typeof(listing) IS DISTINCT FROM 'array'
       OR EXISTS (SELECT FROM jsonb_array_elements(listing) l WHERE jsonb_typeof(l) <> 'object') THEN
        RAISE EXCEPTION 'listing must be an array of objects' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF repair THEN
        FOR made IN
            SELECT t AS transfer, l.key, l.reference
              FROM (SELECT l ->> 'key' AS key, l ->> 'reference' AS reference, (l ->> 'amount')::bigint AS amount,
                           lower(l ->> 'currency') AS currency, l ->> 'destination' AS destination,
                           count(*) OVER (PARTITION BY payoutq.transfer_of_key(l ->> 'key')) AS times,
                           count(*) OVER (PARTITION BY l ->> 'reference') AS uses
                      FROM jsonb_array_elements(listing) l
                     WHERE NOT coalesce((l ->> 'reversed')::boolean, false) AND coalesce(l ->> 'origin', origin) = origin) l
              JOIN payoutq.transfer t ON t.id = payoutq.transfer_of_key(l.key)
             WHERE l.times = 1 AND l.uses = 1
               AND t.provider = provider AND t.provider_reference IS NULL AND t.amount = l.amount
               AND lower(t.currency) = l.currency AND t.destination = l.destination
             ORDER BY t.id FOR UPDATE OF t
        LOOP
            -- What is under way will be reported.
            CONTINUE WHEN (made.transfer).status = 'processing' AND (made.transfer).run_after > clock_timestamp();
            PERFORM payoutq.adopt_transfer(made.transfer, made.key, made.reference);
        END LOOP;
        PERFORM payoutq.wake();
    END IF;

    RETURN QUERY
    WITH theirs AS MATERIALIZED (
        SELECT l ->> 'reference' AS reference, l ->> 'key' AS key, (l ->> 'amount')::bigint AS amount, l ->> 'currency' AS currency,
               l ->> 'destination' AS destination, coalesce((l ->> 'reversed')::boolean, false) AS reversed,
               payoutq.transfer_of_key(l ->> 'key') AS transfer_id
          FROM jsonb_array_elements(listing) l
         WHERE coalesce(l ->> 'origin', origin) = origin
    ), ours AS MATERIALIZED (
        SELECT t.* FROM payoutq.transfer t WHERE t.provider = provider
    ), matched AS MATERIALIZED (
        SELECT h.*, o.id, o.status, o.amount AS our_amount, o.currency AS our_currency, o.destination AS our_destination
          FROM theirs h LEFT JOIN ours o ON o.provider_reference = h.reference
    )
    SELECT 'missing', o.id, o.provider_reference, o.amount, o.currency, format('it is %s here, and not in the listing', o.status)
      FROM ours o
     WHERE o.status IN ('sent', 'completed') AND o.provider_reference IS NOT NULL AND o.updated_at < clock_timestamp() - older_than
       AND NOT EXISTS (SELECT FROM theirs h WHERE h.reference = o.provider_reference)
    UNION ALL
    SELECT 'orphan', m.transfer_id, m.reference, m.amount, m.currency,
           coalesce('its transfer is ' || coalesce(m.status, o.status) || ' here', 'no transfer has its key')
      FROM matched m LEFT JOIN ours o ON o.id = m.transfer_id
     WHERE m.id IS NULL OR m.status IN ('failed_terminal', 'confirmation_failed') AND NOT m.reversed
    UNION ALL
    SELECT 'duplicate', h.transfer_id, string_agg(h.reference, ', '), sum(h.amount)::bigint, min(h.currency), format('%s of them', count(*))
      FROM theirs h WHERE h.transfer_id IS NOT NULL AND NOT h.reversed GROUP BY h.transfer_id HAVING count(*) > 1
    UNION ALL
    SELECT 'amount_mismatch', m.id, m.reference, m.amount, m.currency,
           format('%s %s to %s here', m.our_amount, m.our_currency, m.our_destination)
      FROM matched m
     WHERE m.amount <> m.our_amount OR lower(m.currency) <> lower(m.our_currency) OR m.destination <> m.our_destination
    UNION ALL
    SELECT 'reversed', m.id, m.reference, m.amount, m.currency, format('it is %s here', m.status)
      FROM matched m WHERE m.reversed AND m.status IN ('sent', 'completed')
    UNION ALL
    SELECT 'stale_unknown', o.id, o.provider_reference, o.amount, o.currency, o.error
      FROM ours o WHERE o.status = 'unknown' AND o.updated_at < clock_timestamp() - older_than
    ORDER BY 1, 2;
END $$;
COMMENT ON FUNCTION @extschema@.payout_reconcile(text, jsonb, interval, boolean) IS
'compares our transfers with all that a provider lists, as [{"reference", "key", "origin", "amount", "currency", "destination", "reversed"}] (origin: see payout_claim_transfers, for an account that several installations use): missing, orphan, duplicate, amount_mismatch, reversed, stale_unknown; with repair, what is not known to be sent here and is listed under its key becomes sent, which is safe to repeat; errors: 22023, 22P02 (a number or a boolean), 42704';

CREATE FUNCTION payoutq.provider_states()
RETURNS TABLE (provider text, kind text, base_url text, open_until timestamptz, reason text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.srvname, payoutq.provider_option(s.srvname, 'kind'), payoutq.provider_option(s.srvname, 'base_url'),
           CASE WHEN c.open_until > clock_timestamp() THEN c.open_until END, CASE WHEN c.open_until > clock_timestamp() THEN c.reason END
      FROM pg_foreign_server s
      JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider'
      LEFT JOIN payoutq.circuit c ON c.provider = s.srvname
$$;
CREATE VIEW @extschema@.payout_providers AS
SELECT provider, kind, base_url, open_until, reason FROM payoutq.provider_states();
COMMENT ON VIEW @extschema@.payout_providers IS
'providers: nothing is sent before open_until, because of the reason, which is the provider''s answer';
