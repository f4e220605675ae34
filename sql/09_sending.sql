-- Sending: what the dispatcher (src/dispatcher.c) asks for and records. Calls are
-- claimed in one transaction, made without any, and recorded in another.

-- A provider that refuses everybody (wrong key, no funds) is left alone for a while.
CREATE TABLE payoutq.circuit (
    provider   text PRIMARY KEY,
    failures   integer NOT NULL,
    open_until timestamptz NOT NULL,
    reason     text NOT NULL
);
COMMENT ON TABLE payoutq.circuit IS 'providers that nothing is sent to before open_until';

-- Options of the server, then of the user mapping for PUBLIC, as name, value, ...
CREATE FUNCTION payoutq.sending_providers() RETURNS TABLE (name text, options text[], open_until timestamptz)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.srvname, ARRAY(SELECT unnest(ARRAY[o.option_name, o.option_value])
                              FROM (SELECT * FROM pg_options_to_table(s.srvoptions)
                                    UNION ALL SELECT * FROM pg_options_to_table(m.umoptions)) o),
           c.open_until
      FROM pg_foreign_server s
      JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider'
      LEFT JOIN pg_user_mapping m ON m.umserver = s.oid AND m.umuser = 0
      LEFT JOIN payoutq.circuit c ON c.provider = s.srvname
     WHERE payoutq.provider_option(s.srvname, 'kind') <> 'external'
$$;

-- When the next call to a provider is due; null: there is none.
CREATE FUNCTION payoutq.sending_due() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    SELECT min(d.run_after)
      FROM payoutq.sending_providers() p,
           LATERAL (SELECT greatest(p.open_until, min(t.run_after)) FROM payoutq.transfer t
                     WHERE t.provider = p.name AND t.status IN ('pending', 'retryable', 'unknown', 'processing')
                       AND t.run_after < 'infinity'
                     UNION ALL
                    SELECT min(t.run_after) FROM payoutq.transfer t
                     WHERE t.provider = p.name AND t.status = 'sent' AND t.run_after < 'infinity') AS d (run_after)
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
    SELECT t.* INTO target FROM payoutq.transfer t
     WHERE t.id = transfer_id AND t.status = 'processing' AND t.token = record_answer.token FOR UPDATE;
    IF NOT FOUND THEN
        RAISE LOG 'the answer to transfer % came late: %', transfer_id, outcome;
        RETURN;
    END IF;
    UPDATE payoutq.attempt a SET http_status = record_answer.http_status
     WHERE a.transfer_id = target.id AND a.attempt = target.attempts;

    CASE outcome
        WHEN 'sent' THEN
            PERFORM payoutq.mark_sent(target, reference);
        WHEN 'completed' THEN
            PERFORM payoutq.end_attempt(target, 'completed', reference, NULL);
            target.provider_reference := reference;
            PERFORM payoutq.complete_transfer(target);
        WHEN 'refused' THEN
            PERFORM payoutq.fail_transfer(target, 'transient', reason, interval '0', false),
                    payoutq.open_circuit(target.provider, reason);
        WHEN 'throttled' THEN
            PERFORM payoutq.fail_transfer(target, 'transient', reason, coalesce(wait, interval '1 s'), false);
        ELSE
            PERFORM payoutq.fail_transfer(target, outcome, reason, wait, true);
    END CASE;
    IF outcome IN ('sent', 'completed') THEN
        DELETE FROM payoutq.circuit c WHERE c.provider = target.provider;
    END IF;
END $$;

-- For a minute at first, then for up to a quarter of an hour.
CREATE FUNCTION payoutq.open_circuit(provider text, reason text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO payoutq.circuit AS c VALUES (provider, 1, clock_timestamp() + interval '1 minute', reason)
    ON CONFLICT ON CONSTRAINT circuit_pkey DO UPDATE
       SET failures = c.failures + 1, reason = excluded.reason,
           open_until = clock_timestamp() + least(interval '15 minutes', interval '1 minute' * 2 ^ least(c.failures, 10))
     WHERE c.open_until <= clock_timestamp()
$$;

-- Transfers to ask the provider about; each is asked about once at a time.
CREATE FUNCTION payoutq.claim_confirmations(provider text, max_count integer, lease interval)
RETURNS TABLE (transfer_id bigint, provider_reference text, amount bigint, currency text, destination text)
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    UPDATE payoutq.transfer t SET run_after = clock_timestamp() + lease
      FROM (SELECT d.id FROM payoutq.transfer d
             WHERE d.provider = claim_confirmations.provider AND d.status = 'sent' AND d.confirmed_at IS NULL
               AND d.run_after <= clock_timestamp()
             ORDER BY d.run_after, d.id LIMIT max_count FOR UPDATE SKIP LOCKED) due
     WHERE t.id = due.id
    RETURNING t.id, t.provider_reference, t.amount, t.currency, t.destination
$$;

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
            PERFORM payoutq.complete_transfer(target);
        WHEN 'rejected' THEN
            PERFORM payoutq.reject_transfer(target, reason);
        ELSE
            -- Not so often any more when it takes long.
            UPDATE payoutq.transfer t
               SET error = reason, run_after = clock_timestamp() + greatest(payoutq.setting('payoutq.confirm_interval')::interval,
                                                                            least((clock_timestamp() - t.updated_at) / 10, interval '1 hour'))
             WHERE t.id = target.id;
    END CASE;
END $$;

CREATE FUNCTION payoutq.claim_lookups(provider text, max_count integer, lease interval)
RETURNS TABLE (transfer_id bigint, idempotency_key text, destination text, amount bigint, currency text, job_id bigint)
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    UPDATE payoutq.transfer t SET run_after = clock_timestamp() + lease
      FROM (SELECT d.id FROM payoutq.transfer d
             WHERE d.provider = claim_lookups.provider AND d.status IN ('pending', 'retryable', 'unknown', 'processing')
               AND d.status = 'unknown' AND d.run_after <= clock_timestamp() AND payoutq.wants_lookup(d)
             ORDER BY d.run_after, d.id LIMIT max_count FOR UPDATE SKIP LOCKED) due
     WHERE t.id = due.id
    RETURNING t.id, payoutq.idempotency_key(t.id, t.generation), t.destination, t.amount, t.currency, t.job_id
$$;

-- What was done under a key. That nothing was counts when it is quiet: the
-- provider may still have been at it. Then a new key may be used.
CREATE FUNCTION payoutq.record_lookup(transfer_id bigint, idempotency_key text, outcome text, reference text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target payoutq.transfer;
    quiet_since timestamptz;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id AND t.status = 'unknown' FOR UPDATE;
    IF NOT FOUND OR payoutq.idempotency_key(target.id, target.generation) <> record_lookup.idempotency_key THEN
        RETURN;
    END IF;
    SELECT max(coalesce(a.finished_at, a.started_at)) INTO quiet_since FROM payoutq.attempt a WHERE a.transfer_id = target.id;

    IF outcome = 'sent' THEN
        PERFORM payoutq.mark_sent(target, reference);
    ELSIF outcome = 'absent' AND clock_timestamp() > quiet_since + payoutq.quiet_period(target.provider) THEN
        IF target.generation >= payoutq.setting('payoutq.max_attempts')::integer THEN
            UPDATE payoutq.transfer t SET status = 'failed_terminal', updated_at = clock_timestamp() WHERE t.id = target.id;
            PERFORM payoutq.settle_transfer(target, 'failed_terminal');
        ELSE
            PERFORM payoutq.next_generation(target, target.destination);
        END IF;
    ELSE
        UPDATE payoutq.transfer t
           SET run_after = clock_timestamp() + CASE outcome WHEN 'absent' THEN payoutq.quiet_period(t.provider) / 4
                                                            ELSE payoutq.backoff(t.attempts) END
         WHERE t.id = target.id;
    END IF;
END $$;

CREATE FUNCTION payoutq.quiet_period(provider text) RETURNS interval
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(payoutq.provider_option(provider, 'quiet_period'), '1 hour')::interval
$$;

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
