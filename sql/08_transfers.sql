-- Transfers: money that leaves the database through a provider. The entry of a
-- job with a provider credits the user, and a hold moves the money at once from
-- his balance to @transit:<provider>, in the transaction of the batch. From
-- there it goes to @outside when the provider has it, or back to the user.

-- A provider is a foreign server of this wrapper.
CREATE FUNCTION payoutq.provider_validator(options text[], catalog oid) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_provider_validator';
CREATE FOREIGN DATA WRAPPER payout_provider NO HANDLER VALIDATOR payoutq.provider_validator;
COMMENT ON FOREIGN DATA WRAPPER payout_provider IS
'providers of payoutq: CREATE SERVER name FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''external'')';

CREATE TABLE payoutq.destination (
    user_id     text COLLATE "C" NOT NULL,
    provider    text COLLATE "C" NOT NULL,
    destination text NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, provider)
);
COMMENT ON TABLE payoutq.destination IS 'the account of a user at a provider';

-- What was frozen when it was made, and its state. The key under which the
-- provider knows it follows from id and generation, which goes up only after a
-- definite rejection: the same key never pays twice.
CREATE TABLE payoutq.transfer (
    id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id             bigint NOT NULL,
    entry_seq          integer NOT NULL,
    user_id            text COLLATE "C" NOT NULL,
    provider           text COLLATE "C" NOT NULL,
    destination        text,
    amount             bigint NOT NULL CHECK (amount > 0),
    currency           text NOT NULL,
    status             text NOT NULL
                       CHECK (status IN ('pending', 'processing', 'sent', 'completed', 'retryable', 'unknown',
                                         'failed_terminal', 'confirmation_failed')),
    generation         integer NOT NULL DEFAULT 1,
    attempts           integer NOT NULL DEFAULT 0,
    first_attempt      integer NOT NULL DEFAULT 1,  -- of the generation
    maybe_sent         boolean NOT NULL DEFAULT false,  -- in the generation: an attempt ended without an answer
    first_sent_at      timestamptz,         -- in the generation: the provider may forget the key after a while
    token              uuid,                -- of the attempt that may report
    run_after          timestamptz NOT NULL DEFAULT now(),  -- while processing: the end of the lease
    provider_reference text,
    confirmed_at       timestamptz,         -- by the provider; the callback may be still to come
    callback_failures  integer NOT NULL DEFAULT 0,
    settlements        integer NOT NULL DEFAULT 0,  -- how often its money came to an end
    error              text,
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT transfer_entry UNIQUE (job_id, entry_seq),
    CONSTRAINT transfer_reference UNIQUE (provider, provider_reference),
    CONSTRAINT transfer_reference_length CHECK (octet_length(provider_reference) BETWEEN 1 AND 255)
) WITH (fillfactor = 70);
CREATE INDEX transfer_due ON payoutq.transfer (provider, run_after, id)
    WHERE status IN ('pending', 'retryable', 'unknown', 'processing');
CREATE INDEX transfer_unanswered ON payoutq.transfer (provider, run_after, id) WHERE status IN ('unknown', 'processing');
CREATE INDEX transfer_sent ON payoutq.transfer (provider, run_after, id) WHERE status = 'sent' AND confirmed_at IS NULL;
CREATE INDEX transfer_begun ON payoutq.transfer (updated_at)
    WHERE status IN ('processing', 'retryable', 'unknown', 'sent');
CREATE INDEX transfer_confirmed ON payoutq.transfer (run_after) WHERE status = 'sent' AND confirmed_at IS NOT NULL;
CREATE INDEX transfer_made_twice ON payoutq.transfer (id) WHERE status = 'failed_terminal' AND provider_reference IS NOT NULL;
CREATE INDEX transfer_failed ON payoutq.transfer (job_id) WHERE status IN ('failed_terminal', 'confirmation_failed');
COMMENT ON TABLE payoutq.transfer IS
'one entry''s money on its way to a provider; states move along the picture in src/README.md, which a trigger guards';

-- Written before the call, completed after it.
CREATE TABLE payoutq.attempt (
    transfer_id        bigint NOT NULL,
    attempt            integer NOT NULL,
    generation         integer NOT NULL,
    token              uuid NOT NULL,
    started_at         timestamptz NOT NULL,
    finished_at        timestamptz,
    outcome            text CHECK (outcome IN ('sent', 'completed', 'transient', 'permanent', 'unknown')),
    http_status        integer,
    provider_reference text,
    error              text,
    PRIMARY KEY (transfer_id, attempt)
);
COMMENT ON TABLE payoutq.attempt IS 'calls to a provider; the intent is committed before the call';

-- What runs when a transfer is completed, in that transaction.
CREATE TABLE payoutq.confirm_callback (
    provider text PRIMARY KEY,
    callback text NOT NULL,                 -- as regprocedure writes it, with its schema
    settings text[] NOT NULL                -- name, value, ... of whoever has registered it
);
COMMENT ON TABLE payoutq.confirm_callback IS 'what an application does when a transfer is completed';

-- Where sending is armed. A copy of the database cannot know what the original
-- has sent since, so a row of somewhere else keeps it from sending.
CREATE TABLE payoutq.sending (
    origin   text NOT NULL,
    timeline text NOT NULL,
    PRIMARY KEY (origin, timeline)
);
COMMENT ON TABLE payoutq.sending IS 'where sending is armed';

SELECT pg_catalog.pg_extension_config_dump('payoutq.destination', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.transfer', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.transfer_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.attempt', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.confirm_callback', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.sending', '');

CREATE FUNCTION payoutq.check_transition() RETURNS trigger
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_check_transition';
CREATE TRIGGER check_transition BEFORE UPDATE ON payoutq.transfer
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION payoutq.check_transition();
CREATE TRIGGER no_delete BEFORE DELETE OR TRUNCATE ON payoutq.transfer
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();
CREATE TRIGGER no_delete BEFORE DELETE OR TRUNCATE ON payoutq.attempt
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();

-- Goes with the keys into each request, so that what another installation has
-- done with the same account of a provider is not taken for ours. A restored
-- copy has that of the original: its keys are the original's, too.
CREATE TABLE payoutq.key_origin (
    origin  uuid NOT NULL DEFAULT gen_random_uuid(),
    made_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE payoutq.key_origin IS 'one row, made at random with the extension, or restored';
SELECT pg_catalog.pg_extension_config_dump('payoutq.key_origin', '');
CREATE FUNCTION payoutq.key_origin() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    -- A restore adds the original's row, which was made before.
    SELECT o.origin::text FROM payoutq.key_origin o ORDER BY o.made_at LIMIT 1
$$;

-- Here and now: this installation, on this timeline of the server.
CREATE FUNCTION payoutq.timeline() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN pg_is_in_recovery() THEN 'recovery' ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END
$$;
INSERT INTO payoutq.sending VALUES (payoutq.origin(), payoutq.timeline());
INSERT INTO payoutq.key_origin DEFAULT VALUES;

CREATE FUNCTION payoutq.sending_is_armed() RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) > 0 AND bool_and(s.origin = payoutq.origin() AND s.timeline = payoutq.timeline()) FROM payoutq.sending s
$$;

-- What is to be pushed by then, the original may have pushed already, and there
-- is no way to find out.
CREATE FUNCTION @extschema@.payout_arm_sending() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    UPDATE payoutq.notification SET push_after = NULL, push_error = 'the original may have pushed it'
     WHERE push_after IS NOT NULL AND NOT payoutq.sending_is_armed();
    DELETE FROM payoutq.sending;
    INSERT INTO payoutq.sending VALUES (payoutq.origin(), payoutq.timeline());
$$;
COMMENT ON FUNCTION @extschema@.payout_arm_sending() IS
'lets transfers be sent and notifications pushed from here after a restore or a promotion; make sure first that the original does not send any more, and reconcile what it has sent since; what was to be pushed until now will not be';

CREATE FUNCTION payoutq.require_armed() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT payoutq.sending_is_armed() THEN
        RAISE EXCEPTION 'sending is fenced'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'This database was restored, copied, promoted or upgraded, and may not know what the original has sent.',
                  HINT = 'Make sure that the original does not send, reconcile, then call payout_arm_sending().';
    END IF;
END $$;

-- The kind of a provider, or 42704.
CREATE FUNCTION payoutq.provider_kind(provider text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind text := (SELECT o.option_value
                    FROM pg_foreign_server s
                    JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider',
                         pg_options_to_table(s.srvoptions) o
                   WHERE s.srvname = provider AND o.option_name = 'kind');
BEGIN
    IF kind IS NULL THEN
        RAISE EXCEPTION 'provider "%" does not exist', coalesce(provider, 'null')
            USING ERRCODE = 'undefined_object',
                  HINT = 'Create it with CREATE SERVER ... FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ...).';
    END IF;
    RETURN kind;
END $$;

-- (In PL/pgSQL, which keeps its plans, as it is asked for with each claim.)
CREATE FUNCTION payoutq.provider_option(provider text, option text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (SELECT o.option_value FROM pg_foreign_server s, pg_options_to_table(s.srvoptions) o
             WHERE s.srvname = provider AND o.option_name = option);
END $$;

-- Of a provider that makes transfers, the kind; or 22023 or 42704.
CREATE FUNCTION payoutq.paying_kind(provider text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind text := payoutq.provider_kind(provider);
BEGIN
    IF kind = 'pusher' THEN
        RAISE EXCEPTION 'provider "%" does not make transfers', provider
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'It is of kind pusher, which pushes notifications.';
    END IF;
    RETURN kind;
END $$;

CREATE FUNCTION @extschema@.payout_set_destination(user_id text, provider text, destination text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    PERFORM payoutq.require_user_id(user_id), payoutq.paying_kind(provider);
    IF destination = '' OR octet_length(destination) > 1000 THEN
        RAISE EXCEPTION 'destination must have 1 to 1000 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF destination IS NULL THEN
        DELETE FROM payoutq.destination d WHERE d.user_id = user_id AND d.provider = provider;
    ELSE
        INSERT INTO payoutq.destination AS d VALUES (user_id, provider, destination)
        ON CONFLICT ON CONSTRAINT destination_pkey DO UPDATE SET destination = excluded.destination, updated_at = now();
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_set_destination(text, text, text) IS
'sets the account of a user at a provider, for transfers that are made from now on (null: he has none); errors: 22023, 42704';

-- Entries of a batch become transfers, in its transaction. Who has no
-- destination keeps the money in his balance. Returns how many those are.
CREATE FUNCTION payoutq.hold_entries(job_id bigint, first_seq integer, last_seq integer, provider text) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    missing integer;
BEGIN
    WITH made AS (
        INSERT INTO payoutq.transfer AS t (job_id, entry_seq, user_id, provider, destination, amount, currency, status, error, run_after)
        SELECT e.job_id, e.seq, e.user_id, provider, d.destination, e.amount, j.currency,
               CASE WHEN d.destination IS NULL THEN 'failed_terminal' ELSE 'pending' END,
               CASE WHEN d.destination IS NULL THEN payoutq.provider_kind(provider) || '_account_not_connected' END, clock_timestamp()
          FROM payoutq.job j
          JOIN payoutq.entry e ON e.job_id = j.id AND e.seq BETWEEN first_seq AND last_seq
          LEFT JOIN payoutq.destination d ON d.user_id = e.user_id AND d.provider = provider
         WHERE j.id = job_id
         ORDER BY e.seq
        RETURNING t.*
    ), held AS (
        INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, entry_seq, transfer_id)
        SELECT 'hold', m.user_id, '@transit:' || provider, m.currency, m.amount, m.job_id, m.entry_seq, m.id
          FROM made m WHERE m.status = 'pending' ORDER BY m.id
    )
    SELECT count(*) FILTER (WHERE m.status = 'failed_terminal') INTO missing FROM made m;

    IF missing > 0 THEN
        BEGIN
            PERFORM payoutq.change_balance(t.user_id, t.currency, t.amount)
               FROM (SELECT t.* FROM payoutq.transfer t
                      WHERE t.job_id = job_id AND t.entry_seq BETWEEN first_seq AND last_seq AND t.destination IS NULL
                      ORDER BY t.entry_seq) t;
        EXCEPTION WHEN undefined_object THEN
            -- of one entry, not of the configuration
            RAISE EXCEPTION '%', SQLERRM USING ERRCODE = 'no_data_found';
        END;
        PERFORM payoutq.count_transfers(job_id, m.part, 0, m.count, 0)
           FROM (SELECT payoutq.transfer_part(t.entry_seq) AS part, count(*) AS count FROM payoutq.transfer t
                  WHERE t.job_id = job_id AND t.entry_seq BETWEEN first_seq AND last_seq AND t.destination IS NULL
                  GROUP BY 1) m;
    END IF;
    PERFORM payoutq.wake();
    RETURN missing;
END $$;

-- Counts of a job's transfers are rows of their own in payoutq.progress, one for
-- each 1,024 entries and some processes, so that none has many dead versions
-- when something holds back vacuum.
CREATE FUNCTION payoutq.transfer_part(entry_seq integer) RETURNS integer
LANGUAGE sql IMMUTABLE
RETURN -1 - (entry_seq - 1) / 1024;

CREATE FUNCTION payoutq.count_transfers(job_id bigint, part integer, completed bigint, failed bigint, settled bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    remaining bigint;
BEGIN
    INSERT INTO payoutq.progress AS p (job_id, part, slot, completed, failed, paid, settled)
    VALUES (job_id, part, pg_backend_pid() % 64, completed, failed, 0, settled)
    ON CONFLICT ON CONSTRAINT progress_pkey DO UPDATE
       SET completed = p.completed + excluded.completed, failed = p.failed + excluded.failed, settled = p.settled + excluded.settled;

    -- The end of the job is the end of some part. Whoever is last there does not
    -- see those who are at it now.
    SELECT CASE WHEN j.archived_at IS NULL THEN least(1024, j.total_winners + 1024 * (part + 1)) - sum(p.completed + p.failed) ELSE 0 END
      INTO remaining
      FROM payoutq.job j JOIN payoutq.progress p ON p.job_id = j.id AND p.part = part
     WHERE j.id = job_id GROUP BY j.id;
    IF remaining < 64 THEN
        PERFORM payoutq.wake();
    END IF;
END $$;

-- The money and the counters of a transfer that comes to its end. Its row is
-- locked, and has counted the settlement. What was not sent is the user's, or whose it was if the job was
-- cancelled, or if the user's account in a bound table is gone.
CREATE FUNCTION payoutq.settle_transfer(t payoutq.transfer, status text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    transit text := '@transit:' || t.provider;
    target text := '@outside';
BEGIN
    IF status <> 'completed' THEN
        SELECT CASE j.status WHEN 'cancelled' THEN j.source_account ELSE t.user_id END INTO target
          FROM payoutq.job j WHERE j.id = t.job_id;
        BEGIN
            PERFORM payoutq.change_balance(target, t.currency, t.amount);
        EXCEPTION WHEN undefined_object THEN
            SELECT j.source_account INTO target FROM payoutq.job j WHERE j.id = t.job_id;
            PERFORM payoutq.change_balance(target, t.currency, t.amount);
        END;
    END IF;
    INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, entry_seq, transfer_id, reference)
    VALUES (CASE status WHEN 'completed' THEN 'transfer' ELSE 'release' END, transit, target, t.currency, t.amount, t.job_id,
            t.entry_seq, t.id, format('ledger:payout:%s:%s%s', t.id, t.attempts,
                                      CASE WHEN t.attempts < t.first_attempt THEN '.' || t.settlements END));
    PERFORM payoutq.count_transfers(t.job_id, payoutq.transfer_part(t.entry_seq), CASE status WHEN 'completed' THEN 1 ELSE 0 END,
                                    CASE status WHEN 'completed' THEN 0 ELSE 1 END,
                                    CASE status WHEN 'completed' THEN t.amount ELSE 0 END);
END $$;

CREATE FUNCTION payoutq.idempotency_key(transfer_id bigint, generation integer) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN 'payout:' || transfer_id || CASE WHEN generation > 1 THEN ':g' || generation ELSE '' END;

CREATE FUNCTION payoutq.refuse_unknown_transfer(transfer_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'transfer % does not exist', coalesce(transfer_id::text, 'null') USING ERRCODE = 'undefined_object';
END $$;

-- How long a provider is sure to know a key. Then nothing is sent under it again.
CREATE FUNCTION payoutq.key_life(provider text) RETURNS interval
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN coalesce(payoutq.provider_option(provider, 'key_life'), '23 hours')::interval;
END $$;

-- Transfers whose key was used three times, or may have been forgotten by the
-- provider: nothing is sent under it again, but it is asked what was done.
CREATE FUNCTION payoutq.wants_lookup(t payoutq.transfer, key_life interval) RETURNS boolean
LANGUAGE sql STABLE
RETURN t.attempts - t.first_attempt + 1 >= 3 OR clock_timestamp() > t.first_sent_at + key_life;

-- Of a lease that has lapsed nobody knows what was done. Most are claimed again
-- as they are; this sees to the others.
CREATE FUNCTION payoutq.end_lapsed_leases(provider text, max_count integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    key_life interval := payoutq.key_life(provider);
BEGIN
    WITH lapsed AS (
        UPDATE payoutq.transfer t
           SET status = 'unknown', maybe_sent = true, error = 'the lease ended without a report', updated_at = clock_timestamp()
          FROM (SELECT d.id FROM payoutq.transfer d
                 WHERE d.provider = provider AND d.status = 'processing'
                   AND d.run_after <= clock_timestamp() AND payoutq.wants_lookup(d, key_life)
                 ORDER BY d.run_after LIMIT max_count FOR UPDATE SKIP LOCKED) due
         WHERE t.id = due.id
        RETURNING t.id, t.attempts, t.error
    )
    UPDATE payoutq.attempt a SET outcome = 'unknown', finished_at = clock_timestamp(), error = l.error
      FROM lapsed l WHERE a.transfer_id = l.id AND a.attempt = l.attempts;
END $$;

-- A claim lasts as long as its lease. A lease that ends without a report is an
-- attempt with an unknown outcome: the next one uses the same key, unless the
-- provider may have forgotten it. Destinations can be left out, and then each is
-- claimed for once; and so can be what claim_lookups() takes care of, and what is
-- due since before a time.
CREATE FUNCTION payoutq.claim_transfers(provider text, max_count integer, lease interval, busy text[] DEFAULT NULL,
                                         without_lookups boolean DEFAULT false, since timestamptz DEFAULT '-infinity')
RETURNS TABLE (transfer_id bigint, attempt_token uuid, attempt integer, idempotency_key text, user_id text, destination text,
               amount bigint, currency text, job_id bigint, entry integer, due_at timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    claimed_at timestamptz := clock_timestamp();
    key_life interval := payoutq.key_life(provider);
BEGIN
    RETURN QUERY
    WITH locked AS (
        SELECT t.id, t.status, t.attempts, t.destination, t.run_after FROM payoutq.transfer t
         WHERE t.provider = provider AND t.status IN ('pending', 'retryable', 'unknown', 'processing')
           AND t.run_after BETWEEN since AND claimed_at AND (busy IS NULL OR t.destination <> ALL (busy))
           AND (t.maybe_sent OR t.status = 'processing' OR EXISTS (SELECT FROM payoutq.job j WHERE j.id = t.job_id AND j.status NOT IN ('paused', 'cancelled')))
           AND NOT (t.status IN ('unknown', 'processing')
                    AND (claimed_at > t.first_sent_at + key_life OR without_lookups AND payoutq.wants_lookup(t, key_life)))
         ORDER BY t.run_after, t.id LIMIT max_count FOR UPDATE SKIP LOCKED
    ), due AS (
        SELECT l.id, l.status, l.attempts, l.run_after
          FROM (SELECT *, row_number() OVER (PARTITION BY locked.destination ORDER BY locked.id) AS n FROM locked) l
         WHERE busy IS NULL OR l.n = 1
    ), lapsed AS (
        UPDATE payoutq.attempt a
           SET outcome = 'unknown', finished_at = claimed_at, error = 'the lease ended without a report'
          FROM due WHERE due.status = 'processing' AND a.transfer_id = due.id AND a.attempt = due.attempts
    ), claimed AS (
        UPDATE payoutq.transfer t
           SET status = 'processing', attempts = t.attempts + 1, token = gen_random_uuid(), run_after = claimed_at + lease,
               maybe_sent = t.maybe_sent OR due.status IN ('processing', 'unknown'),
               first_sent_at = coalesce(t.first_sent_at, claimed_at), updated_at = claimed_at
          FROM due WHERE t.id = due.id
        RETURNING t.*, due.run_after AS due_at
    ), begun AS (
        INSERT INTO payoutq.attempt (transfer_id, attempt, generation, token, started_at)
        SELECT c.id, c.attempts, c.generation, c.token, claimed_at FROM claimed c
    )
    SELECT c.id, c.token, c.attempts, payoutq.idempotency_key(c.id, c.generation), c.user_id, c.destination, c.amount, c.currency,
           c.job_id, c.entry_seq, c.due_at
      FROM claimed c ORDER BY c.id;
END $$;

-- The pull interface: for an application that talks to the provider itself.
CREATE FUNCTION @extschema@.payout_claim_transfers(provider text, max_count integer DEFAULT 50, lease interval DEFAULT '1 minute')
RETURNS TABLE (transfer_id bigint, attempt_token uuid, attempt integer, idempotency_key text, user_id text, destination text,
               amount bigint, currency text, metadata jsonb)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
    IF max_count IS NULL OR max_count <= 0 OR lease IS NULL OR lease <= interval '0' THEN
        RAISE EXCEPTION 'max_count and lease must be greater than zero' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM payoutq.paying_kind(provider), payoutq.require_armed(), payoutq.end_lapsed_leases(provider, max_count);
    RETURN QUERY
    SELECT c.transfer_id, c.attempt_token, c.attempt, c.idempotency_key, c.user_id, c.destination, c.amount, c.currency,
           coalesce(j.metadata, '{}') || jsonb_build_object('job_id', j.id, 'reference', j.reference, 'entry', c.entry,
                                                            'origin', payoutq.key_origin())
      FROM payoutq.claim_transfers(provider, max_count, lease) c
      JOIN payoutq.job j ON j.id = c.job_id;
END $$;
COMMENT ON FUNCTION @extschema@.payout_claim_transfers(text, integer, interval) IS
'gives transfers to whoever sends them, for the time of the lease; commit before the first call; always call the provider with the idempotency key; a transfer that was claimed before may have been sent under the same key; errors: 22023, 42704, 55000';

-- The transfer of the attempt that may report, locked, or 42704 or 55000.
CREATE FUNCTION payoutq.reporting_transfer(transfer_id bigint, attempt_token uuid) RETURNS payoutq.transfer
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

CREATE FUNCTION payoutq.end_attempt(t payoutq.transfer, outcome text, provider_reference text, error text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    UPDATE payoutq.attempt a
       SET outcome = outcome, finished_at = clock_timestamp(),
           provider_reference = coalesce(provider_reference, a.provider_reference), error = error
     WHERE a.transfer_id = t.id AND a.attempt = t.attempts;
END $$;

CREATE FUNCTION payoutq.mark_sent(t payoutq.transfer, provider_reference text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM payoutq.end_attempt(t, 'sent', provider_reference, NULL);
    UPDATE payoutq.transfer
       SET status = 'sent', provider_reference = mark_sent.provider_reference, error = NULL, run_after = clock_timestamp(),
           updated_at = clock_timestamp()
     WHERE id = t.id;
END $$;

CREATE FUNCTION payoutq.require_reference(provider_reference text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF octet_length(provider_reference) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'provider_reference must have 1 to 255 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
END $$;

CREATE FUNCTION @extschema@.payout_transfer_sent(transfer_id bigint, attempt_token uuid, provider_reference text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF provider_reference IS NULL THEN
        RAISE EXCEPTION 'provider_reference must not be null'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'It is what the transfer is confirmed by.';
    END IF;
    PERFORM payoutq.require_reference(provider_reference);
    PERFORM payoutq.mark_sent(payoutq.reporting_transfer(transfer_id, attempt_token), provider_reference);
END $$;
COMMENT ON FUNCTION @extschema@.payout_transfer_sent(bigint, uuid, text) IS
'reports that the provider has accepted the transfer, and will confirm it under its reference later; errors: 22023, 42704, 55000 (late report), 23505 (the reference is another transfer''s)';

CREATE FUNCTION @extschema@.payout_transfer_completed(transfer_id bigint, attempt_token uuid, provider_reference text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.transfer := payoutq.reporting_transfer(transfer_id, attempt_token);
BEGIN
    PERFORM payoutq.require_reference(provider_reference), payoutq.end_attempt(target, 'completed', provider_reference, NULL);
    target.provider_reference := provider_reference;
    PERFORM payoutq.complete_transfer(target);
END $$;
COMMENT ON FUNCTION @extschema@.payout_transfer_completed(bigint, uuid, text) IS
'reports that the transfer has been made, for good; errors: 22023, 42704, 55000 (late report), 23505 (the reference is another transfer''s)';

CREATE FUNCTION payoutq.end_transfer(t payoutq.transfer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE payoutq.transfer
       SET status = 'completed', provider_reference = t.provider_reference, confirmed_at = clock_timestamp(),
           -- What was said when it was confirmed stays.
           error = CASE WHEN t.confirmed_at IS NOT NULL AND t.error NOT LIKE 'callback: %' THEN t.error END,
           settlements = settlements + 1, updated_at = clock_timestamp()
     WHERE id = t.id;
    PERFORM payoutq.settle_transfer(t, 'completed');
END $$;

-- With the callback in the same transaction. One that fails leaves the transfer
-- sent, confirmed, and due to be completed later.
CREATE FUNCTION payoutq.complete_transfer(t payoutq.transfer) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    failure text;
BEGIN
    -- An update in a subtransaction of a row that was locked outside costs a multixact.
    IF NOT EXISTS (SELECT FROM payoutq.confirm_callback c WHERE c.provider = t.provider) THEN
        PERFORM payoutq.end_transfer(t);
        RETURN 'completed';
    END IF;
    BEGIN
        PERFORM payoutq.end_transfer(t);
        BEGIN
            PERFORM payoutq.call_confirm_callback(t.id, t.provider);
        EXCEPTION WHEN OTHERS OR ASSERT_FAILURE THEN
            RAISE EXCEPTION USING ERRCODE = 'PQ001', MESSAGE = SQLERRM;
        END;
        RETURN 'completed';
    EXCEPTION WHEN SQLSTATE 'PQ001' THEN
        failure := SQLERRM;
    END;

    UPDATE payoutq.transfer
       SET status = 'sent', provider_reference = t.provider_reference, confirmed_at = coalesce(confirmed_at, clock_timestamp())
     WHERE id = t.id;
    PERFORM payoutq.postpone_callback(t.id, failure);
    RETURN 'sent';
END $$;

CREATE FUNCTION payoutq.postpone_callback(transfer_id bigint, failure text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE payoutq.transfer
       SET callback_failures = callback_failures + 1, error = left('callback: ' || failure, 1000),
           run_after = clock_timestamp() + payoutq.backoff(callback_failures + 1), updated_at = clock_timestamp()
     WHERE id = transfer_id;
    PERFORM payoutq.wake();
END $$;

-- For the dispatcher, which does not wait for callbacks: a worker calls them.
CREATE FUNCTION payoutq.complete_or_leave(t payoutq.transfer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM payoutq.confirm_callback c WHERE c.provider = t.provider) THEN
        PERFORM payoutq.complete_transfer(t);
        RETURN;
    END IF;
    UPDATE payoutq.transfer
       SET status = 'sent', provider_reference = t.provider_reference, confirmed_at = clock_timestamp(), error = NULL,
           run_after = clock_timestamp(), updated_at = clock_timestamp()
     WHERE id = t.id;
    PERFORM payoutq.wake();
END $$;

-- As the engine's: doubles with each failure, with jitter.
CREATE FUNCTION payoutq.backoff(failures integer) RETURNS interval
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT least(payoutq.setting('payoutq.retry_cap')::interval,
                 payoutq.setting('payoutq.retry_base')::interval * 2 ^ least(failures - 1, 20)) * (0.5 + random() / 2)
$$;

-- Asked before a transfer is to be sent again: a cancellation of the job either is
-- seen, or waits for us and then stops the transfer.
CREATE FUNCTION payoutq.is_cancelled(job_id bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    job_status text;
BEGIN
    SELECT j.status INTO job_status FROM payoutq.job j WHERE j.id = job_id FOR KEY SHARE;
    RETURN job_status = 'cancelled';
END $$;

-- Waits as long as the provider asks for, else with backoff. An attempt that
-- does not count leaves as many as there were.
CREATE FUNCTION payoutq.fail_transfer(t payoutq.transfer, error_class text, reason text, wait interval, counts boolean) RETURNS text
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

CREATE FUNCTION @extschema@.payout_transfer_failed(transfer_id bigint, attempt_token uuid, error_class text, reason text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF error_class IS NULL OR error_class NOT IN ('transient', 'permanent', 'unknown') THEN
        RAISE EXCEPTION 'invalid error class "%"', coalesce(error_class, 'null')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Classes are transient, permanent and unknown.';
    END IF;
    RETURN payoutq.fail_transfer(payoutq.reporting_transfer(transfer_id, attempt_token), error_class, reason, NULL, true);
END $$;
COMMENT ON FUNCTION @extschema@.payout_transfer_failed(bigint, uuid, text, text) IS
'reports that the transfer was not made (permanent: refused under its key, so that no earlier attempt has made it either; transient: this attempt has not) or that nobody knows (unknown), and returns the new status: retryable, failed_terminal, or unknown, which is tried again under the same key; errors: 22023, 42704, 55000 (late report)';

CREATE FUNCTION payoutq.reject_transfer(t payoutq.transfer, reason text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE payoutq.transfer
       SET status = 'confirmation_failed', error = coalesce(reason, 'rejected by the provider'), settlements = settlements + 1,
           updated_at = clock_timestamp()
     WHERE id = t.id;
    PERFORM payoutq.settle_transfer(t, 'confirmation_failed');
END $$;

CREATE FUNCTION @extschema@.payout_confirm_transfer(provider text, provider_reference text, confirmed boolean, detail text DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.transfer;
BEGIN
    IF confirmed IS NULL THEN
        RAISE EXCEPTION 'confirmed must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM payoutq.provider_kind(provider);
    SELECT t.* INTO target FROM payoutq.transfer t
     WHERE t.provider = provider AND t.provider_reference = provider_reference FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'provider "%" has no transfer with the reference "%"', provider, coalesce(provider_reference, 'null')
            USING ERRCODE = 'undefined_object';
    END IF;

    -- Providers say it more than once.
    IF (target.status, confirmed) IN (('completed', true), ('confirmation_failed', false)) THEN
        RETURN target.status;
    END IF;
    IF target.status <> 'sent' OR target.confirmed_at IS NOT NULL AND NOT confirmed THEN
        RAISE EXCEPTION 'transfer % cannot be %', target.id, CASE WHEN confirmed THEN 'confirmed' ELSE 'rejected' END
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('It is %s.', target.status);
    END IF;

    IF confirmed THEN
        RETURN payoutq.complete_transfer(target);
    END IF;
    PERFORM payoutq.reject_transfer(target, detail);
    RETURN 'confirmation_failed';
END $$;
COMMENT ON FUNCTION @extschema@.payout_confirm_transfer(text, text, boolean, text) IS
'records what the provider says of a transfer that was sent, and returns its status: completed (sent, if the callback has failed) or confirmation_failed, which gives the money back to the user; saying it again changes nothing; errors: 22023, 42704, 55000';

-- A new key, unless none was ever used. Only for what was definitely not done
-- under the present one.
CREATE FUNCTION payoutq.next_generation(t payoutq.transfer, destination text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE payoutq.transfer
       SET status = 'pending', destination = next_generation.destination,
           generation = coalesce((SELECT max(a.generation) + 1 FROM payoutq.attempt a WHERE a.transfer_id = t.id), generation),
           first_attempt = attempts + 1, maybe_sent = false, first_sent_at = NULL, token = NULL, provider_reference = NULL,
           run_after = clock_timestamp(), error = NULL, updated_at = clock_timestamp()
     WHERE id = t.id
$$;

-- After a definite rejection. The money is held again.
CREATE FUNCTION @extschema@.payout_retry_transfer(transfer_id bigint) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.transfer;
    job payoutq.job;
    destination text;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_transfer(transfer_id);
    END IF;
    job := payoutq.locked_job(target.job_id);
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id FOR UPDATE;

    IF target.status = 'retryable'
       OR target.status = 'unknown' AND clock_timestamp() <= target.first_sent_at + payoutq.key_life(target.provider) THEN
        UPDATE payoutq.transfer t SET run_after = clock_timestamp() WHERE t.id = target.id;
        RETURN target.status;
    END IF;
    IF target.status = 'unknown' THEN
        RAISE EXCEPTION 'transfer % cannot be retried', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'It may have been made, and the provider may have forgotten its key.',
                  HINT = 'Look for it at the provider, then use payout_reconcile() or payout_fail_transfer().';
    END IF;
    IF target.status NOT IN ('failed_terminal', 'confirmation_failed') OR job.status = 'cancelled' THEN
        RAISE EXCEPTION 'transfer % cannot be retried', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = CASE WHEN job.status = 'cancelled' THEN format('Job %s was cancelled.', job.id)
                                ELSE format('It is %s.', target.status) END;
    END IF;
    IF target.status = 'failed_terminal' AND target.provider_reference IS NOT NULL THEN
        RAISE EXCEPTION 'transfer % cannot be retried', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = format('The provider has made it, as "%s", and the user has the money twice.', target.provider_reference);
    END IF;
    IF EXISTS (SELECT FROM payoutq.movement m WHERE m.job_id = target.job_id AND m.kind = 'reversal' AND m.entry_seq = target.entry_seq) THEN
        RAISE EXCEPTION 'transfer % cannot be retried', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'Its entry was reversed.';
    END IF;
    SELECT d.destination INTO destination FROM payoutq.destination d
     WHERE d.user_id = target.user_id AND d.provider = target.provider;
    IF destination IS NULL THEN
        RAISE EXCEPTION 'transfer % cannot be retried', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = format('User "%s" has no account at provider "%s".', target.user_id, target.provider),
                  HINT = 'Use payout_set_destination() first.';
    END IF;

    PERFORM payoutq.change_balance(target.user_id, target.currency, -target.amount);
    PERFORM payoutq.next_generation(target, destination);
    INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, entry_seq, transfer_id)
    VALUES ('hold', target.user_id, '@transit:' || target.provider, target.currency, target.amount, target.job_id,
            target.entry_seq, target.id);
    UPDATE payoutq.job j SET status = 'running', completed_at = NULL WHERE j.id = job.id AND j.status = 'completed';
    PERFORM payoutq.count_transfers(target.job_id, payoutq.transfer_part(target.entry_seq), 0, -1, 0);
    RETURN 'pending';
END $$;
COMMENT ON FUNCTION @extschema@.payout_retry_transfer(bigint) IS
'sends a failed transfer again, under a new key and to the user''s present destination, and returns its status; one that is retryable or unknown is due now, under its old key; errors: 42704, 55000, 23514 (the user has spent the money)';

CREATE FUNCTION @extschema@.payout_fail_transfer(transfer_id bigint, reason text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    target payoutq.transfer;
BEGIN
    SELECT t.* INTO target FROM payoutq.transfer t WHERE t.id = transfer_id FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM payoutq.refuse_unknown_transfer(transfer_id);
    ELSIF NOT (target.status IN ('pending', 'retryable', 'unknown') OR target.status = 'processing' AND target.run_after <= clock_timestamp()) THEN
        RAISE EXCEPTION 'transfer % cannot be failed', target.id
            USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('It is %s.', target.status);
    END IF;
    IF target.status = 'processing' THEN
        PERFORM payoutq.end_attempt(target, 'unknown', NULL, 'the lease ended without a report');
    END IF;
    UPDATE payoutq.transfer t
       SET status = 'failed_terminal', error = coalesce(reason, 'failed by hand'), settlements = settlements + 1,
           updated_at = clock_timestamp()
     WHERE t.id = target.id;
    PERFORM payoutq.settle_transfer(target, 'failed_terminal');
    RETURN 'failed_terminal';
END $$;
COMMENT ON FUNCTION @extschema@.payout_fail_transfer(bigint, text) IS
'ends a transfer of which somebody has made sure that the provider has not made it, nor will; the money is back in the user''s balance; errors: 42704, 55000';

-- Of a job that is cancelled: what nobody has begun to send goes back.
CREATE FUNCTION payoutq.cancel_transfers(job payoutq.job) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    released bigint;
    parts bigint;
BEGIN
    WITH stopped AS (
        UPDATE payoutq.transfer t SET status = 'failed_terminal', error = 'the job was cancelled', updated_at = clock_timestamp()
         WHERE t.job_id = job.id AND t.status IN ('pending', 'retryable') AND NOT t.maybe_sent
        RETURNING t.*
    ), counted AS MATERIALIZED (
        SELECT payoutq.transfer_part(s.entry_seq) AS part, count(*) AS count, sum(s.amount) AS amount FROM stopped s GROUP BY 1
    ), posted AS (
        INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, entry_seq, transfer_id, reference)
        SELECT 'release', '@transit:' || s.provider, job.source_account, s.currency, s.amount, s.job_id, s.entry_seq, s.id,
               format('ledger:payout:%s:cancelled', s.id)
          FROM stopped s
    )
    SELECT sum(c.amount), count(payoutq.count_transfers(job.id, c.part, 0, c.count, 0)) INTO released, parts FROM counted c;
    IF parts > 0 THEN
        PERFORM payoutq.change_balance(job.source_account, job.currency, released);
    END IF;
END $$;

CREATE FUNCTION @extschema@.payout_stuck_transfers(older_than interval DEFAULT NULL)
RETURNS TABLE (transfer_id bigint, job_id bigint, user_id text, provider text, amount bigint, currency text, status text,
               attempts integer, provider_reference text, age interval, error text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.id, t.job_id, t.user_id, t.provider, t.amount, t.currency, t.status, t.attempts, t.provider_reference,
           clock_timestamp() - t.updated_at, t.error
      FROM (SELECT b.* FROM payoutq.transfer b
             WHERE b.status IN ('processing', 'retryable', 'unknown', 'sent')
               AND b.updated_at < clock_timestamp() - coalesce(older_than, payoutq.setting('payoutq.confirm_timeout')::interval)
             UNION ALL
            SELECT p.* FROM payoutq.transfer p
             WHERE older_than IS NOT NULL AND p.status = 'pending' AND p.updated_at < clock_timestamp() - older_than) t
     ORDER BY t.updated_at
$$;
COMMENT ON FUNCTION @extschema@.payout_stuck_transfers(interval) IS
'transfers that were begun, have not come to an end, and have not moved for payoutq.confirm_timeout; with older_than, for so long, and also those that wait to be begun';

CREATE FUNCTION @extschema@.payout_on_confirm(provider text, callback regprocedure) RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_on_confirm';
COMMENT ON FUNCTION @extschema@.payout_on_confirm(text, regprocedure) IS
'calls callback(transfer_id bigint) in the transaction that completes a transfer of the provider, as the owner of the function and with the search_path of now (null: no longer); for the owner of the function; errors: 22023, 42501, 42704';

CREATE FUNCTION payoutq.call_confirm_callback(transfer_id bigint, provider text) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_call_confirm_callback';

-- A trigger of the application's settlement table.
CREATE FUNCTION @extschema@.payout_on_settlement() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    key text;
    reference text;
    users text[];
    amounts bigint[];
BEGIN
    IF TG_LEVEL <> 'ROW' OR TG_OP = 'DELETE' OR TG_NARGS NOT BETWEEN 2 AND 4 THEN
        RAISE EXCEPTION 'payout_on_settlement() must be called by a row-level trigger for INSERT or UPDATE with 2 to 4 arguments'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'They are the key column, the query for the winners (where $1 is the key), the provider and the currency.';
    END IF;
    key := pg_catalog.to_jsonb(NEW) OPERATOR(pg_catalog.->>) TG_ARGV[0];
    IF key IS NULL THEN
        RAISE EXCEPTION 'column "%" of the settlement does not exist or is null', TG_ARGV[0]
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    reference := pg_catalog.format('%s.%s:%s', TG_TABLE_SCHEMA, TG_TABLE_NAME, key);
    BEGIN
        PERFORM FROM @extschema@.payout_job_status(reference);
        RETURN NULL;
    EXCEPTION WHEN undefined_object THEN
        NULL;  -- the first time
    END;

    EXECUTE pg_catalog.format('SELECT pg_catalog.array_agg(q.user_id::pg_catalog.text), pg_catalog.array_agg(q.amount::pg_catalog.int8) FROM (%s) AS q',
                              pg_catalog.array_to_string(pg_catalog.regexp_split_to_array(TG_ARGV[1], '\$1(?!\d)'),
                                                         pg_catalog.quote_literal(key))) INTO users, amounts;
    IF users IS NOT NULL THEN
        PERFORM @extschema@.payout_create_job(reference, users, amounts, provider => nullif(TG_ARGV[2], ''),
                                              currency => coalesce(TG_ARGV[3], 'USD'));
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION @extschema@.payout_on_settlement() IS
'trigger AFTER INSERT OR UPDATE FOR EACH ROW, with the condition in its WHEN: makes the job of a settlement, once; arguments: key column, query for (user_id, amount) where $1 is the key, provider, currency; runs with the rights of whoever settles; error: 22023';

CREATE VIEW @extschema@.payout_transfers AS
SELECT t.id AS transfer_id, t.job_id, t.entry_seq AS entry, t.user_id, t.provider, t.destination, t.amount, t.currency, t.status,
       t.attempts, t.run_after, t.provider_reference, payoutq.idempotency_key(t.id, t.generation) AS idempotency_key, t.error,
       t.created_at, t.updated_at, t.generation, t.confirmed_at
  FROM payoutq.transfer t
 CROSS JOIN (SELECT) AS not_updatable;
COMMENT ON VIEW @extschema@.payout_transfers IS
'money on its way to a provider: status (pending, processing, sent, completed, retryable, unknown, failed_terminal, confirmation_failed), amount in minor units; run_after is when it is due, or the end of the lease';

CREATE VIEW @extschema@.payout_attempts AS
WITH attempt AS NOT MATERIALIZED (SELECT * FROM payoutq.attempt)
SELECT transfer_id, attempt, started_at, finished_at, outcome, http_status, provider_reference, error,
       payoutq.idempotency_key(transfer_id, generation) AS idempotency_key
  FROM attempt;
COMMENT ON VIEW @extschema@.payout_attempts IS
'calls to a provider: outcome sent, completed, transient, permanent or unknown; no outcome yet: it is going on, or nobody knows';
