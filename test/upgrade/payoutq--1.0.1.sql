\echo Use "CREATE EXTENSION payoutq" to load this file. \quit
-- What somebody else may have put into the target schema must not be found
-- while the objects are made.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Storage. Applications use the functions and views named payout_*; nobody
-- but the extension's owner may touch these tables.

CREATE SCHEMA payoutq;
REVOKE ALL ON SCHEMA payoutq FROM PUBLIC;
COMMENT ON SCHEMA payoutq IS 'storage and internals of the extension payoutq; use the functions and views named payout_*';

CREATE TABLE payoutq.job (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    reference      text NOT NULL UNIQUE,
    kind           text NOT NULL DEFAULT 'payout' CHECK (kind IN ('payout', 'refund')),
    status         text NOT NULL DEFAULT 'queued'
                   CHECK (status IN ('queued', 'running', 'paused', 'completed', 'failed', 'cancelled')),
    payload_hash   bytea NOT NULL,
    challenge_id   bigint,
    currency       text NOT NULL,
    source_account text NOT NULL,
    provider       text,                -- entries become transfers
    total_pool     bigint,
    platform_fee   bigint NOT NULL DEFAULT 0 CHECK (platform_fee >= 0),
    amount         bigint,              -- sum of the entries
    total_winners  integer,             -- number of entries
    batches        integer NOT NULL DEFAULT 0,  -- highest batch_no given out
    query          text,                -- yields the entries; null: given, or the stakes of a challenge do
    settings       text[],              -- of whoever gave the query: name, value, ...
    created_by     name NOT NULL,
    priority       integer NOT NULL DEFAULT 0,
    batch_size     integer NOT NULL CHECK (batch_size > 0),
    run_at         timestamptz NOT NULL DEFAULT now(),
    metadata       jsonb,
    origin         text NOT NULL,       -- see payoutq.origin()
    bound          boolean NOT NULL,    -- was the currency, when the job was created?
    attempts       integer NOT NULL DEFAULT 0,  -- at the query, begun with no outcome recorded
    error_code     text,
    error          text,
    created_at     timestamptz NOT NULL DEFAULT now(),
    started_at     timestamptz,
    completed_at   timestamptz,
    archived_at    timestamptz,
    completed      bigint,              -- since it was archived; see payoutq.counts
    failed         bigint,
    paid           bigint,
    settled        bigint
);
CREATE INDEX job_active ON payoutq.job (priority DESC, id) WHERE status IN ('queued', 'running');
CREATE INDEX job_run_at ON payoutq.job (run_at) WHERE status IN ('queued', 'running');
CREATE INDEX job_archivable ON payoutq.job (completed_at)
    WHERE status IN ('completed', 'cancelled') AND (archived_at IS NULL OR archived_at < completed_at);
COMMENT ON TABLE payoutq.job IS
'one row a job; amount and total_winners are null until a worker has expanded the query or the challenge into entries, and so may be total_pool';

-- A line of the ledger, written once. It is posted when its batch completes,
-- so its status is the status of its batch. Numbered by user_id, so that all
-- workers lock accounts in one order.
CREATE TABLE payoutq.entry (
    job_id  bigint NOT NULL,
    amount  bigint NOT NULL CHECK (amount > 0),
    seq     integer NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (job_id, seq),
    CONSTRAINT entry_user UNIQUE (user_id, job_id)
);
COMMENT ON TABLE payoutq.entry IS
'one person''s share of a job; immutable; posted to the ledger when its batch completes';

-- The queue. The ranges of a job's batches cover 1..total_winners exactly
-- once, through every split.
CREATE TABLE payoutq.batch (
    job_id       bigint NOT NULL,
    batch_no     integer NOT NULL,
    first_seq    integer NOT NULL,
    last_seq     integer NOT NULL,
    amount       bigint NOT NULL,       -- sum of its entries
    status       text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'completed', 'failed')),
    attempts     integer NOT NULL DEFAULT 0,
    crashes      integer NOT NULL DEFAULT 0,  -- begun, with no outcome recorded
    run_after    timestamptz NOT NULL DEFAULT now(),
    processed_at timestamptz,
    error_code   text,
    error        text,
    PRIMARY KEY (job_id, batch_no),
    CONSTRAINT batch_range UNIQUE (job_id, first_seq),
    CHECK (first_seq <= last_seq)
);
CREATE INDEX batch_pending ON payoutq.batch (job_id, run_after, batch_no) WHERE status = 'pending';
CREATE INDEX batch_error ON payoutq.batch (job_id, batch_no) WHERE error_code IS NOT NULL;
CREATE INDEX batch_processed ON payoutq.batch (processed_at) WHERE processed_at IS NOT NULL;
COMMENT ON TABLE payoutq.batch IS
'a range of entries that is paid in one transaction; pending -> completed | failed, under its row lock';

-- Counters of a job, spread over rows so that two workers do not wait for
-- each other, and over parts so that no row has more than about a thousand
-- versions while something holds back vacuum. The job's count is the sum.
CREATE TABLE payoutq.progress (
    job_id    bigint NOT NULL,
    part      integer NOT NULL,         -- batch_no / 1024; below zero, see transfer_part()
    slot      integer NOT NULL,         -- of the process that counted
    completed bigint NOT NULL,
    failed    bigint NOT NULL,
    paid      bigint NOT NULL,          -- out of the job's escrow
    settled   bigint NOT NULL,          -- that is in the users' hands
    PRIMARY KEY (job_id, part, slot)
) WITH (fillfactor = 20);
COMMENT ON TABLE payoutq.progress IS
'entries completed and failed, and the amount paid, counted in the transaction of each batch';

-- A job that is archived, and then retried, has both.
CREATE VIEW payoutq.counts AS
SELECT p.job_id, p.completed, p.failed, p.paid, p.settled FROM payoutq.progress p
UNION ALL
SELECT j.id, j.completed, j.failed, j.paid, j.settled FROM payoutq.job j WHERE j.archived_at IS NOT NULL;
COMMENT ON VIEW payoutq.counts IS 'what adds up to the counters of a job';

-- Half of each page is left free for HOT updates; no index on the balance.
CREATE TABLE payoutq.account (
    user_id  text COLLATE "C" NOT NULL,
    currency text COLLATE "C" NOT NULL,
    balance  bigint NOT NULL CONSTRAINT account_balance_not_negative CHECK (balance >= 0),
    PRIMARY KEY (user_id, currency)
) WITH (fillfactor = 50);
COMMENT ON TABLE payoutq.account IS
'balances of users, in minor units; a system account (@...) has no row, its balance is derived';

CREATE TABLE payoutq.binding (
    currency       text PRIMARY KEY,
    table_name     regclass NOT NULL,
    key_column     name NOT NULL,
    balance_column name NOT NULL,
    created_by     name NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE payoutq.binding IS
'currencies whose balances are kept in a table of the application';

-- Every movement of money that is not an entry: two ledger lines in a row.
CREATE TABLE payoutq.movement (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind           text NOT NULL CHECK (kind IN ('deposit', 'withdrawal', 'stake', 'funding', 'fee', 'hold', 'transfer',
                                                     'release', 'reversal', 'unbinding')),
    debit_account  text COLLATE "C" NOT NULL,
    credit_account text COLLATE "C" NOT NULL,
    currency       text NOT NULL,
    amount         bigint NOT NULL CHECK (amount > 0),
    job_id         bigint,
    entry_seq      integer,
    transfer_id    bigint,
    challenge_id   bigint,              -- of a stake, and its side
    side           text CHECK (side IN ('YES', 'NO')),
    reference      text UNIQUE,
    reason         text,
    posted_at      timestamptz NOT NULL DEFAULT clock_timestamp(),  -- after the accounts were locked
    CHECK (debit_account <> credit_account),
    CHECK ((kind = 'stake') = (challenge_id IS NOT NULL) AND (kind = 'stake') = (side IS NOT NULL))
);
CREATE INDEX movement_debit ON payoutq.movement (debit_account, currency);
CREATE INDEX movement_credit ON payoutq.movement (credit_account, currency);
CREATE INDEX movement_job ON payoutq.movement (job_id, kind) WHERE job_id IS NOT NULL;
CREATE INDEX movement_stake ON payoutq.movement (challenge_id, side, debit_account) INCLUDE (amount) WHERE kind = 'stake';
CREATE INDEX movement_transfer ON payoutq.movement (transfer_id) WHERE transfer_id IS NOT NULL;
CREATE UNIQUE INDEX movement_fee ON payoutq.movement (job_id) WHERE kind = 'fee';
COMMENT ON TABLE payoutq.movement IS
'money moved from debit_account to credit_account; append-only, a correction is a new row';

-- pg_dump writes the rows of these tables, though the extension owns them.
SELECT pg_catalog.pg_extension_config_dump('payoutq.job', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.job_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.entry', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.batch', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.progress', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.account', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.binding', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.movement', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.movement_id_seq', '');

-- Append-only, for the owner too. A restore only inserts, so it passes.
CREATE FUNCTION payoutq.refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of "%" is not allowed', lower(TG_OP), TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME
        USING ERRCODE = 'object_not_in_prerequisite_state',
              DETAIL = CASE WHEN TG_TABLE_NAME IN ('entry', 'movement', 'batch') THEN 'The ledger is append-only.'
                            ELSE 'The ledger refers to it.' END,
              HINT = 'An entry is corrected with payout_reverse_entry().';
END $$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON payoutq.entry
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON payoutq.movement
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();
CREATE TRIGGER no_truncate BEFORE TRUNCATE ON payoutq.batch
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();
CREATE TRIGGER completed_is_final BEFORE UPDATE OR DELETE ON payoutq.batch
    FOR EACH ROW WHEN (OLD.status = 'completed') EXECUTE FUNCTION payoutq.refuse_change();
CREATE TRIGGER no_delete BEFORE DELETE OR TRUNCATE ON payoutq.job
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();
-- What the functions and views share. Nobody but the owner may call it.

CREATE FUNCTION payoutq.lock_job(job_id bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_lock_job_sql';
COMMENT ON FUNCTION payoutq.lock_job(bigint) IS
'waits until no batch of the job is being paid, and lets none begin before the transaction ends';

CREATE FUNCTION payoutq.require_current(job_id bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_require_current';
COMMENT ON FUNCTION payoutq.require_current(bigint) IS
'40001 if the transaction''s snapshot does not show the failures and transfers of the locked job as they are now';

CREATE FUNCTION payoutq.origin() RETURNS text
LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'payoutq_origin_sql';
COMMENT ON FUNCTION payoutq.origin() IS
'names this installation: system identifier, database, extension; a job with another one came in with a restore';

CREATE FUNCTION payoutq.setting(name text) RETURNS text
LANGUAGE C STRICT STABLE AS 'MODULE_PATHNAME', 'payoutq_setting_sql';
COMMENT ON FUNCTION payoutq.setting(text) IS
'current_setting(), also where the library was not loaded before';

CREATE FUNCTION payoutq.wake() RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_wake_sql';
COMMENT ON FUNCTION payoutq.wake() IS
'wakes the workers of this database when the transaction commits';

CREATE FUNCTION payoutq.tell_waiters() RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_tell_waiters';
COMMENT ON FUNCTION payoutq.tell_waiters() IS
'wakes whoever is in payout_wait_for_job() when the transaction commits';

-- Whoever inserts a job wakes, a restore too.
CREATE FUNCTION payoutq.wake_workers() RETURNS trigger
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_wake_trigger';
CREATE TRIGGER wake_workers AFTER INSERT ON payoutq.job
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.wake_workers();

CREATE FUNCTION payoutq.change_balance(account text, currency text, amount bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_change_balance_sql';
COMMENT ON FUNCTION payoutq.change_balance(text, text, bigint) IS
'adds the amount, which may be negative, to a balance; 23514 if that is too low';

CREATE FUNCTION payoutq.amount_due(user_id text) RETURNS bigint
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_amount_due';
COMMENT ON FUNCTION payoutq.amount_due(text) IS
'what the batch that is being paid in this session owes the user';

CREATE FUNCTION payoutq.user_balance(account text, currency text) RETURNS bigint
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_user_balance_sql';
COMMENT ON FUNCTION payoutq.user_balance(text, text) IS
'balance of a user, null when there is no such account';

-- STABLE, so that it sees what its caller's snapshot sees.
CREATE FUNCTION payoutq.system_balance(account text, currency text) RETURNS bigint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT (coalesce((SELECT sum(m.amount) FROM payoutq.movement m
                       WHERE m.credit_account = account AND m.currency = system_balance.currency), 0)
          - coalesce((SELECT sum(m.amount) FROM payoutq.movement m
                       WHERE m.debit_account = account AND m.currency = system_balance.currency), 0)
          - coalesce((SELECT sum(p.paid) FROM payoutq.counts p JOIN payoutq.job j ON j.id = p.job_id
                       WHERE j.currency = system_balance.currency AND p.job_id = CASE WHEN account ~ '^@job:[0-9]{1,18}$'
                                             THEN substr(account, 6)::bigint END), 0))::bigint
$$;
COMMENT ON FUNCTION payoutq.system_balance(text, text) IS
'balance of a system account, derived from what was moved';

CREATE FUNCTION payoutq.latest_system_balance(account text, currency text) RETURNS bigint
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_latest_balance_sql';
COMMENT ON FUNCTION payoutq.latest_system_balance(text, text) IS
'payoutq.system_balance() of what is committed now, at any isolation level; for whoever holds the lock';

CREATE FUNCTION payoutq.read_winners(winners jsonb)
RETURNS TABLE (entry integer, user_id text, amount bigint)
LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'payoutq_read_winners_jsonb';
CREATE FUNCTION payoutq.read_winners(user_ids text[], amounts bigint[])
RETURNS TABLE (entry integer, user_id text, amount bigint)
LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'payoutq_read_winners_arrays';
COMMENT ON FUNCTION payoutq.read_winners(jsonb) IS 'the entries that the winners would become, checked';
COMMENT ON FUNCTION payoutq.read_winners(text[], bigint[]) IS 'the entries that the winners would become, checked';

CREATE FUNCTION payoutq.worker_slots()
RETURNS TABLE (pid integer, state text, job_id bigint, batch_no integer, since timestamptz,
               batches bigint, entries bigint, last_error text)
LANGUAGE C AS 'MODULE_PATHNAME', 'payoutq_worker_slots';
COMMENT ON FUNCTION payoutq.worker_slots() IS 'workers of this database in shared memory; none without preload';

-- Nothing is cut: a reference has 1000 bytes at the most, a payload 8000.
CREATE FUNCTION payoutq.announce(job_id bigint, event text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT pg_notify('payoutq_jobs',
                     json_build_object('event', event, 'job_id', j.id, 'reference', j.reference,
                                       'status', j.status)::text),
           payoutq.tell_waiters()
      FROM payoutq.job j WHERE j.id = announce.job_id
$$;
COMMENT ON FUNCTION payoutq.announce(bigint, text) IS
'notifies the channel payoutq_jobs: {"event", "job_id", "reference", "status"}';

-- As payout_bind_accounts() has found it.
CREATE FUNCTION payoutq.is_bound(currency text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM payoutq.binding b
                     JOIN pg_attribute a ON a.attrelid = b.table_name AND a.attname = b.key_column
                     JOIN pg_index i ON i.indrelid = b.table_name AND i.indisunique AND i.indisvalid
                      AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum
                    WHERE b.currency = is_bound.currency)
$$;

-- The job, locked against its workers, or 42704.
CREATE FUNCTION payoutq.locked_job(job_id bigint) RETURNS payoutq.job
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    job payoutq.job;
BEGIN
    PERFORM payoutq.lock_job(job_id);
    SELECT j.* INTO job FROM payoutq.job j WHERE j.id = job_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'job % does not exist', coalesce(job_id::text, 'null')
            USING ERRCODE = 'undefined_object';
    END IF;
    RETURN job;
END $$;

CREATE FUNCTION payoutq.refuse_state(job payoutq.job, verb text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'job % cannot be %', job.id, verb
        USING ERRCODE = 'object_not_in_prerequisite_state',
              DETAIL = format('It is %s.', job.status);
END $$;

CREATE FUNCTION payoutq.require_user_id(user_id text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF user_id IS NULL OR user_id = '' OR user_id LIKE '@%' THEN
        RAISE EXCEPTION 'invalid user id "%"', coalesce(user_id, 'null')
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'It must not be empty, nor begin with "@".';
    END IF;
    IF octet_length(user_id) > 1000 THEN
        RAISE EXCEPTION 'user id is too long'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('It has %s bytes; the limit is 1000.', octet_length(user_id));
    END IF;
END $$;

CREATE FUNCTION payoutq.require_time(at timestamptz) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF at IS NULL OR NOT isfinite(at) THEN
        RAISE EXCEPTION 'at must be a finite time, not %', coalesce(at::text, 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
END $$;
-- Jobs: creation, and what an application polls.

CREATE FUNCTION @extschema@.payout_create_job(
    reference text, winners jsonb, total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL) RETURNS bigint
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_create_job_jsonb';
COMMENT ON FUNCTION @extschema@.payout_create_job(text, jsonb, bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'creates a job that pays the winners [{"user_id": "u1", "amount": 100}, ...], amounts in minor units, and returns its id; the same reference with the same payload returns the same job; errors: 22023, 22P02, 22003, 23514, 23505, 42704, 42501 (provider), 54000 (more than payoutq.max_winners)';

CREATE FUNCTION @extschema@.payout_create_job(
    reference text, user_ids text[], amounts bigint[], total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL) RETURNS bigint
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_create_job_arrays';
COMMENT ON FUNCTION @extschema@.payout_create_job(text, text[], bigint[], bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'creates a job that pays user_ids the amounts, two arrays of one length, in minor units, and returns its id: the fast form; the same reference with the same payload returns the same job; errors: 22023, 22003, 23514, 23505, 42704, 42501 (provider), 54000 (more than payoutq.max_winners)';

CREATE FUNCTION @extschema@.payout_create_job_from(
    reference text, query text, total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL) RETURNS bigint
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_create_job_from';
COMMENT ON FUNCTION @extschema@.payout_create_job_from(text, text, bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'creates a job from a query that yields (user_id, amount bigint), and returns its id; a worker runs it later, as the role that calls this function (a superuser''s as pg_read_all_data), and sees the database as it is then, in one snapshot; errors: 22023, 22003, 23514, 23505, 42704, 42501 (provider), and those of the query''s syntax; what is wrong with its rows makes the job failed';

-- What would happen to each entry. The job is created and rolled back, so that
-- each error is the one that payout_create_job() would raise.
CREATE FUNCTION @extschema@.payout_preview_job(
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
COMMENT ON FUNCTION @extschema@.payout_preview_job(text, text[], bigint[], bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'what payout_create_job() with the same arguments would do to each entry; writes nothing; outcome: credit, new account, account missing, in job N already; errors: those of payout_create_job()';

CREATE FUNCTION @extschema@.payout_preview_job(
    reference text, winners jsonb, total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL)
RETURNS TABLE (entry integer, user_id text, amount bigint, batch_no integer,
               balance_before bigint, balance_after bigint, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    users text[];
    shares bigint[];
BEGIN
    IF winners IS NULL THEN
        RAISE EXCEPTION 'winners must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT array_agg(w.user_id), array_agg(w.amount) INTO users, shares FROM payoutq.read_winners(winners) w;
    RETURN QUERY SELECT * FROM @extschema@.payout_preview_job(reference, users, shares, total_pool, platform_fee, challenge_id, currency, priority,
        batch_size, run_at, source_account, provider, metadata);
END $$;
COMMENT ON FUNCTION @extschema@.payout_preview_job(text, jsonb, bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'what payout_create_job() with the same arguments would do to each entry; writes nothing; outcome: credit, new account, account missing, in job N already; errors: those of payout_create_job()';

-- With the rights of the caller, whose query it is.
CREATE FUNCTION @extschema@.payout_preview_job_from(
    reference text, query text, total_pool bigint DEFAULT NULL, platform_fee bigint DEFAULT 0,
    challenge_id bigint DEFAULT NULL, currency text DEFAULT 'USD', priority integer DEFAULT 0,
    batch_size integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, source_account text DEFAULT '@outside',
    provider text DEFAULT NULL, metadata jsonb DEFAULT NULL)
RETURNS TABLE (entry integer, user_id text, amount bigint, batch_no integer,
               balance_before bigint, balance_after bigint, outcome text)
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    users text[];
    shares bigint[];
    type text;
BEGIN
    IF query IS NULL THEN
        RAISE EXCEPTION 'query must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE pg_catalog.format('SELECT pg_catalog.array_agg(q.user_id::pg_catalog.text), pg_catalog.array_agg(q.amount)::pg_catalog.int8[], '
                              'pg_catalog.format_type(pg_catalog.min(pg_catalog.pg_typeof(q.amount)::pg_catalog.oid), NULL) '
                              'FROM (' || pg_catalog.chr(10) || '%s' || pg_catalog.chr(10) || ') AS q',
                              pg_catalog.rtrim(query, '; ' || pg_catalog.chr(10) || pg_catalog.chr(9))) INTO users, shares, type;
    IF type NOT IN ('bigint', 'integer', 'smallint') THEN
        RAISE EXCEPTION 'column "amount" of the query must be of type bigint, not %', type
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Cast it to bigint, in minor units.';
    END IF;
    RETURN QUERY SELECT * FROM @extschema@.payout_preview_job(
        reference, coalesce(users, '{}'), coalesce(shares, '{}'), total_pool, platform_fee, challenge_id, currency, priority,
        batch_size, run_at, source_account, provider, metadata);
END $$;
COMMENT ON FUNCTION @extschema@.payout_preview_job_from(text, text, bigint, bigint, bigint, text, integer, integer, timestamptz, text, text, jsonb) IS
'what payout_create_job_from() with the same arguments would do to each entry, were its query run now, with the rights of the caller; writes nothing; errors: those of payout_create_job_from(), 54000, and those of the query';

-- All that is counted comes from a few rows of payoutq.counts, so it costs
-- the same for ten winners and for ten million.
CREATE VIEW payoutq.status AS
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

COMMENT ON VIEW payoutq.status IS 'what payout_job_status() returns, and the first columns of payout_jobs';

CREATE FUNCTION @extschema@.payout_job_status(job_id bigint) RETURNS SETOF payoutq.status
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1 SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT s.* FROM payoutq.status s WHERE s.job_id = payout_job_status.job_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'job % does not exist', coalesce(job_id::text, 'null') USING ERRCODE = 'undefined_object';
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_job_status(bigint) IS
'one row: where the job with this id stands; progress goes from 0 to 1, and is 1 only when the job is completed; amounts in minor units; error: 42704';

CREATE FUNCTION @extschema@.payout_job_status(reference text) RETURNS SETOF payoutq.status
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1 SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT s.* FROM payoutq.status s WHERE s.reference = payout_job_status.reference;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'job "%" does not exist', coalesce(reference, 'null') USING ERRCODE = 'undefined_object';
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_job_status(text) IS
'one row: where the job with this reference stands; progress goes from 0 to 1, and is 1 only when the job is completed; amounts in minor units; error: 42704';

CREATE FUNCTION @extschema@.payout_wait_for_job(job_id bigint, timeout interval DEFAULT '1 minute') RETURNS text
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payout_wait_for_job';
COMMENT ON FUNCTION @extschema@.payout_wait_for_job(bigint, interval) IS
'waits until the job is completed, failed or cancelled, and returns its status; after the timeout, whatever it is; error: 42704';

CREATE PROCEDURE @extschema@.payout_process(max_batches integer DEFAULT NULL, job_id bigint DEFAULT NULL)
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_process';
COMMENT ON PROCEDURE @extschema@.payout_process(integer, bigint) IS
'does the work of a worker in this session, with a commit after each batch, until nothing is due, or max_batches were tried; with job_id, only of that job; errors: 22023, 25001 (inside a transaction block), 42704';
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
-- Accounts and the ledger.

CREATE FUNCTION @extschema@.payout_balance(user_id text, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN user_id LIKE '@%' THEN payoutq.system_balance(user_id, currency)
                ELSE coalesce(payoutq.user_balance(user_id, currency), 0) END
$$;
COMMENT ON FUNCTION @extschema@.payout_balance(text, text) IS
'balance of a user or of a system account (@outside, @platform, @job:<id>, @challenge:<id>, @transit:<provider>), in minor units; 0 if there is no such account';

-- A deposit, a withdrawal or a stake, once a reference. *is_new*: not posted
-- before. Its plans are kept, so none may be made for tables that were small. (What
-- is ruled out is not impossible but of a cost that would have it compiled: no jit,
-- here and wherever plans are ruled out.)
CREATE FUNCTION payoutq.post(kind text, debit text, credit text, amount bigint, reference text, currency text,
                             challenge_id bigint DEFAULT NULL, side text DEFAULT NULL, OUT id bigint, OUT is_new boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    user_id text := CASE kind WHEN 'deposit' THEN credit ELSE debit END;
    posted payoutq.movement;
BEGIN
    PERFORM payoutq.require_user_id(user_id);
    IF reference = '' OR reference IS NULL AND kind <> 'stake' OR currency IS NULL OR currency = '' OR amount IS NULL THEN
        RAISE EXCEPTION 'amount, reference and currency must not be null or empty'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF octet_length(reference) > 1000 OR octet_length(currency) > 63 THEN
        RAISE EXCEPTION 'reference or currency is too long'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'The limits are 1000 and 63 bytes.';
    END IF;
    IF amount <= 0 THEN
        RAISE EXCEPTION 'amount % is not positive', amount USING ERRCODE = 'check_violation';
    END IF;
    IF reference LIKE 'ledger:%' THEN
        RAISE EXCEPTION 'reference "%" begins with "ledger:"', reference
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Such references are kept for transfers.';
    END IF;

    -- The account first, so that the movement is posted after what it follows.
    PERFORM FROM payoutq.account a WHERE a.user_id = user_id AND a.currency = currency FOR UPDATE;
    INSERT INTO payoutq.movement AS m (kind, debit_account, credit_account, currency, amount, reference, challenge_id, side)
    VALUES (kind, debit, credit, currency, amount, reference, challenge_id, side)
    ON CONFLICT ON CONSTRAINT movement_reference_key DO NOTHING RETURNING m.id INTO id;
    is_new := id IS NOT NULL;
    IF is_new THEN
        PERFORM payoutq.change_balance(user_id, currency, CASE kind WHEN 'deposit' THEN amount ELSE -amount END);
        RETURN;
    END IF;

    SELECT m.* INTO STRICT posted FROM payoutq.movement m WHERE m.reference = reference;
    IF (posted.kind, posted.debit_account, posted.credit_account, posted.currency, posted.amount, posted.side)
       IS DISTINCT FROM (kind, debit, credit, currency, amount, side) THEN
        RAISE EXCEPTION 'reference "%" is taken by movement %', reference, posted.id
            USING ERRCODE = 'unique_violation',
                  DETAIL = format('That is a %s of %s %s from %s to %s.', posted.kind, posted.amount,
                                  posted.currency, posted.debit_account, posted.credit_account);
    END IF;
    id := posted.id;
END $$;

CREATE FUNCTION @extschema@.payout_deposit(user_id text, amount bigint, reference text, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.id FROM payoutq.post('deposit', '@outside', user_id, amount, reference, currency) p
$$;
COMMENT ON FUNCTION @extschema@.payout_deposit(text, bigint, text, text) IS
'credits a user from @outside, once a reference, amount in minor units, and returns the movement''s id; errors: 22023, 23514, 23505, 22003, 42704 (not in the bound table)';

CREATE FUNCTION @extschema@.payout_withdraw(user_id text, amount bigint, reference text, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.id FROM payoutq.post('withdrawal', user_id, '@outside', amount, reference, currency) p
$$;
COMMENT ON FUNCTION @extschema@.payout_withdraw(text, bigint, text, text) IS
'takes from a user''s balance to @outside, once a reference, amount in minor units, and returns the movement''s id; errors: 22023, 23514 (also: balance too low), 23505';

CREATE FUNCTION @extschema@.payout_reverse_entry(job_id bigint, user_id text, amount bigint, reason text DEFAULT NULL) RETURNS bigint
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
COMMENT ON FUNCTION @extschema@.payout_reverse_entry(bigint, text, bigint, text) IS
'takes back a paid entry, or a part of it, in minor units, to the account that funded the job, and returns the movement''s id; errors: 42704, 55000, 23514 (also: balance too low)';

CREATE FUNCTION @extschema@.payout_statement(user_id text, currency text DEFAULT 'USD')
RETURNS TABLE (posted_at timestamptz, kind text, amount bigint, balance bigint, job_id bigint, entry integer,
               reference text, reason text, challenge_id bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH line AS (
        SELECT b.processed_at AS posted_at, j.kind, e.amount, j.id AS job_id, e.seq AS entry, j.reference, NULL AS reason,
               j.challenge_id, 0::bigint AS movement
          FROM payoutq.entry e
          JOIN payoutq.job j ON j.id = e.job_id AND j.currency = payout_statement.currency
         CROSS JOIN LATERAL (SELECT * FROM payoutq.batch
                              WHERE batch.job_id = e.job_id AND batch.first_seq <= e.seq
                              ORDER BY batch.first_seq DESC LIMIT 1) b
         WHERE e.user_id = payout_statement.user_id AND b.status = 'completed'
        UNION ALL
        SELECT m.posted_at, m.kind, m.amount, m.job_id, m.entry_seq, m.reference, m.reason, m.challenge_id, m.id
          FROM payoutq.movement m
         WHERE m.credit_account = payout_statement.user_id AND m.currency = payout_statement.currency
        UNION ALL
        SELECT m.posted_at, m.kind, -m.amount, m.job_id, m.entry_seq, m.reference, m.reason, m.challenge_id, m.id
          FROM payoutq.movement m
         WHERE m.debit_account = payout_statement.user_id AND m.currency = payout_statement.currency
    )
    SELECT l.posted_at, l.kind, l.amount,
           sum(l.amount) OVER (ORDER BY l.posted_at, l.movement, l.job_id, l.entry)::bigint,
           l.job_id, l.entry, l.reference, l.reason, l.challenge_id
      FROM line l ORDER BY l.posted_at, l.movement, l.job_id, l.entry
$$;
COMMENT ON FUNCTION @extschema@.payout_statement(text, text) IS
'the lines of a user in the ledger, in order of time, with signed amounts in minor units and the running balance';

CREATE FUNCTION @extschema@.payout_split(pool bigint, weights bigint[]) RETURNS bigint[]
LANGUAGE C STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'payout_split';
COMMENT ON FUNCTION @extschema@.payout_split(bigint, bigint[]) IS
'divides the pool in proportion to the weights, to the last unit: shares rounded down, what is left to the largest remainders (Hamilton''s method); errors: 22023, 23514';

-- A binding hides other balances, so what it counts must be what is committed.
CREATE FUNCTION payoutq.lock_bindings(currency text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'bindings can only be changed at isolation level READ COMMITTED'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    -- Waits for the batches that are being paid, and for stakes.
    LOCK TABLE payoutq.binding IN ACCESS EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM payoutq.challenge c
                WHERE c.currency = lock_bindings.currency AND c.completed_at IS NULL
                  AND EXISTS (SELECT FROM payoutq.movement m WHERE m.kind = 'stake' AND m.challenge_id = c.id)) THEN
        RAISE EXCEPTION 'the accounts of currency "%" cannot be changed', currency
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'Stakes of challenges that are not completed came from them.';
    END IF;
END $$;

CREATE FUNCTION @extschema@.payout_bind_accounts(table_name regclass, key_column name, balance_column name,
                                     currency text DEFAULT 'USD') RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_bind_accounts';
COMMENT ON FUNCTION @extschema@.payout_bind_accounts(regclass, name, name, text) IS
'keeps the balances of a currency in a table of the application; credits are made as the owner of the table; the key must be unique; for the owner of the table; errors: 22023, 42501, 55000';

-- Its caller has seen that the table is the user's own.
CREATE FUNCTION payoutq.bind_accounts(table_name regclass, key_column name, balance_column name, currency text, created_by name)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tab pg_class;
    key pg_attribute;
    balance pg_attribute;
BEGIN
    SELECT c.* INTO tab FROM pg_class c WHERE c.oid = table_name;
    SELECT a.* INTO key FROM pg_attribute a WHERE a.attrelid = table_name AND a.attname = key_column
       AND a.attnum > 0 AND NOT a.attisdropped;
    SELECT a.* INTO balance FROM pg_attribute a WHERE a.attrelid = table_name AND a.attname = balance_column
       AND a.attnum > 0 AND NOT a.attisdropped;

    IF currency IS NULL OR currency = '' OR tab.oid IS NULL THEN
        RAISE EXCEPTION 'table_name and currency must not be null or empty' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF tab.relnamespace IN ('payoutq'::regnamespace, 'pg_catalog'::regnamespace) THEN
        RAISE EXCEPTION '% cannot be bound', table_name
            USING ERRCODE = 'insufficient_privilege', DETAIL = 'It is not a table of an application.';
    END IF;
    IF tab.relkind NOT IN ('r', 'p') OR tab.relpersistence = 't' THEN
        RAISE EXCEPTION '% cannot be bound', table_name
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Only permanent tables can keep balances.';
    END IF;
    IF key.attnum IS NULL OR key.atttypid::regtype NOT IN ('text', 'varchar', 'bigint', 'integer', 'uuid') THEN
        RAISE EXCEPTION 'column "%" of % cannot be a key', key_column, table_name
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'It must exist, and be of type text, varchar, bigint, integer or uuid.';
    END IF;
    IF balance.attnum IS NULL OR balance.attgenerated <> '' OR balance.attnum = key.attnum
       OR balance.atttypid::regtype NOT IN ('bigint', 'integer', 'numeric') THEN
        RAISE EXCEPTION 'column "%" of % cannot be a balance', balance_column, table_name
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'It must exist, not be generated, and be of type bigint, integer or numeric.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = table_name AND i.indisunique AND i.indisvalid
                      AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = key.attnum) THEN
        RAISE EXCEPTION 'column "%" of % is not unique', key_column, table_name
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'A user must have one balance.', HINT = 'Create a unique index on it.';
    END IF;
    PERFORM payoutq.lock_bindings(currency);
    IF EXISTS (SELECT FROM payoutq.binding b WHERE b.currency = bind_accounts.currency) THEN
        RAISE EXCEPTION 'currency "%" is bound already', currency
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Use payout_unbind_accounts() first.';
    END IF;
    IF EXISTS (SELECT FROM payoutq.account a WHERE a.currency = bind_accounts.currency AND a.balance > 0) THEN
        RAISE EXCEPTION 'there are balances in currency "%" already', currency
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'They would no longer be seen.', HINT = 'Withdraw them first.';
    END IF;

    INSERT INTO payoutq.binding (currency, table_name, key_column, balance_column, created_by)
    VALUES (currency, table_name, key_column, balance_column, created_by);
END $$;

-- The money stays in the application's table, so it leaves our books: what was
-- credited there is posted back to the outside.
CREATE FUNCTION @extschema@.payout_unbind_accounts(currency text DEFAULT 'USD') RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    bound regclass;
BEGIN
    PERFORM payoutq.lock_bindings(currency);
    DELETE FROM payoutq.binding b WHERE b.currency = currency RETURNING b.table_name INTO bound;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'currency "%" is not bound', currency USING ERRCODE = 'undefined_object';
    END IF;

    INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, reason)
    SELECT 'unbinding', CASE WHEN sum(l.amount) > 0 THEN l.account ELSE '@outside' END,
           CASE WHEN sum(l.amount) > 0 THEN '@outside' ELSE l.account END,
           currency, abs(sum(l.amount)), format('unbound from table %s', bound)
      FROM @extschema@.payout_ledger l
     WHERE l.currency = currency AND l.account NOT LIKE '@%'
     GROUP BY l.account HAVING sum(l.amount) <> 0;
END $$;
COMMENT ON FUNCTION @extschema@.payout_unbind_accounts(text) IS
'keeps the balances of a currency in the extension''s own table again, where they begin at zero; what is in the application''s table stays there; errors: 42704, 55000';
-- Challenges: contests on which people stake. A stake is a movement from the
-- user's balance into the challenge's escrow, so nothing of it is kept twice:
-- its status follows from that of the challenge.

-- pending -> active -> pending_admin -> completed, or cancelled. The pools are
-- null until the challenge is closed, and frozen then: no stake comes in any more.
CREATE TABLE payoutq.challenge (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title         text NOT NULL,
    description   text,
    category      text,
    creator_id    text COLLATE "C",
    challenger_id text COLLATE "C",     -- on the side YES
    challenged_id text COLLATE "C",     -- on the side NO
    currency      text NOT NULL,
    fee_bps       integer NOT NULL CHECK (fee_bps BETWEEN 0 AND 9999),  -- hundredths of a percent of the pool
    min_stakes    integer CHECK (min_stakes > 0),  -- to become active; null: one on each side
    early_stakes  integer NOT NULL DEFAULT 0,  -- placed while it was pending
    is_large      boolean NOT NULL DEFAULT false,  -- its pool is summed up for each stake
    due_at        timestamptz,
    status        text NOT NULL DEFAULT 'pending'
                  CHECK (status IN ('pending', 'active', 'pending_admin', 'completed', 'cancelled')),
    result        text CHECK (result IN ('challenger_won', 'challenged_won', 'draw')),
    job_id        bigint UNIQUE,        -- pays the winners, or gives the stakes back
    yes_pool      bigint,
    no_pool       bigint,
    yes_stakes    bigint,
    no_stakes     bigint,
    notified_type text,                 -- the last that its roles were told, and when
    notified_at   timestamptz,
    evidence      jsonb NOT NULL DEFAULT '[]',
    admin_notes   text,
    metadata      jsonb,
    origin        text NOT NULL DEFAULT payoutq.origin(),
    created_at    timestamptz NOT NULL DEFAULT now(),
    activated_at  timestamptz,
    closed_at     timestamptz,
    resolved_at   timestamptz,
    completed_at  timestamptz,
    -- Makes the status part of a key, so that a change of it conflicts with the
    -- FOR KEY SHARE of those who place a stake. What they are told does not.
    CONSTRAINT challenge_status UNIQUE (id, status),
    CHECK ((closed_at IS NULL) = (status IN ('pending', 'active'))),
    CHECK (num_nulls(closed_at, yes_pool, no_pool, yes_stakes, no_stakes) IN (0, 5)),
    CHECK (status <> 'completed' OR num_nulls(result, job_id, completed_at) = 0),
    CHECK ((result IS NULL) = (resolved_at IS NULL))
);
CREATE INDEX challenge_due ON payoutq.challenge (status, due_at) WHERE status IN ('pending', 'active', 'pending_admin');
-- Only for those who look for what came in with a restore; others write IS TRUE.
CREATE INDEX challenge_origin ON payoutq.challenge (origin) WHERE status IN ('pending', 'active', 'pending_admin');
COMMENT ON TABLE payoutq.challenge IS
'contests on which people stake; what is staked are movements of kind stake into the account @challenge:<id>';
SELECT pg_catalog.pg_extension_config_dump('payoutq.challenge', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.challenge_id_seq', '');

CREATE TRIGGER no_delete BEFORE DELETE OR TRUNCATE ON payoutq.challenge
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.refuse_change();

-- {pool of YES, pool of NO, stakes on YES, stakes on NO}, of what is committed now at
-- any isolation level; for whoever has closed the challenge to stakes.
CREATE FUNCTION payoutq.latest_pools(challenge_id bigint) RETURNS bigint[]
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_latest_pools';

CREATE FUNCTION payoutq.refuse_challenge(challenge payoutq.challenge, verb text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'challenge % cannot be %', challenge.id, verb
        USING ERRCODE = 'object_not_in_prerequisite_state',
              DETAIL = CASE WHEN challenge.status = 'pending_admin' AND challenge.result IS NOT NULL
                            THEN format('It was resolved as %s, and job %s is at it.', challenge.result, challenge.job_id)
                            WHEN challenge.status = 'active' AND challenge.due_at IS NOT NULL
                            THEN format('It is active, and due at %s; payout_run_deadlines() closes it then.', challenge.due_at)
                            ELSE format('It is %s.', challenge.status) END;
END $$;

CREATE FUNCTION payoutq.refuse_unknown_challenge(challenge_id bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'challenge % does not exist', coalesce(challenge_id::text, 'null')
        USING ERRCODE = 'undefined_object';
END $$;

-- Whoever adds to a challenge, before he locks its row: until his transaction ends,
-- whoever wants the row for himself waits for him, and those who come later behind.
CREATE FUNCTION payoutq.enter_challenge(challenge_id bigint) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_enter_challenge_sql';
COMMENT ON FUNCTION payoutq.enter_challenge(bigint) IS
'waits for those who wait to lock the challenge''s row for themselves, and has others wait until the transaction ends';
CREATE FUNCTION payoutq.lock_challenge(challenge_id bigint, stays boolean) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_lock_challenge_sql';
COMMENT ON FUNCTION payoutq.lock_challenge(bigint, boolean) IS
'locks the challenge''s row FOR UPDATE, after those who have entered; whoever stays has entered it, too';

-- The challenge, locked against all others, or 42704. Whoever places a stake stays.
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

CREATE FUNCTION @extschema@.payout_create_challenge(
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
COMMENT ON FUNCTION @extschema@.payout_create_challenge(text, timestamptz, text, text, text, text, text, integer, integer, text, jsonb) IS
'creates a challenge and returns its id; it becomes active with a stake on each side, or with min_stakes stakes; fee_bps: hundredths of a percent of the pool; without due_at it is open until it is resolved; error: 22023';

-- Pools stay within bigint. The caller has locked the challenge, so that large
-- stakes come one after the other; it takes nine million small ones to get there.
CREATE FUNCTION payoutq.refuse_overflow(challenge payoutq.challenge, amount bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    pools bigint[] := payoutq.latest_pools(challenge.id);
BEGIN
    IF pools[1]::numeric + pools[2] + amount > 9223372036854775807 THEN
        RAISE EXCEPTION 'the pool of challenge % is out of range for type bigint', challenge.id
            USING ERRCODE = 'numeric_value_out_of_range';
    END IF;
    UPDATE payoutq.challenge c SET is_large = true WHERE c.id = challenge.id AND NOT c.is_large;
END $$;

-- Refused by the clock are those who come late, before they lock anything: they
-- must not keep the challenge open. One that was created when it was due
-- already takes stakes until payout_run_deadlines() closes it.
CREATE FUNCTION @extschema@.payout_place_stake(challenge_id bigint, user_id text, side text, amount bigint,
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
COMMENT ON FUNCTION @extschema@.payout_place_stake(bigint, text, text, bigint, text, timestamptz) IS
'moves the amount from the user''s balance into the challenge''s escrow, on the side YES or NO, and returns the stake''s id; with a reference, only once; errors: 22023, 42704, 55000, 23514 (also: balance too low), 23505, 22003';

CREATE FUNCTION @extschema@.payout_add_evidence(challenge_id bigint, user_id text, evidence jsonb) RETURNS void
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
COMMENT ON FUNCTION @extschema@.payout_add_evidence(bigint, text, jsonb) IS
'adds {"user_id", "evidence", "at"} to the evidence of a challenge that is not decided yet; errors: 22023, 42704, 55000';

-- Who is placing a stake is not waited for: an idle transaction must not hold up
-- the others. His challenge is left to the next run, and so is one that
-- payout_run_notifications() has locked. One that came in with a restore waits
-- until its books are complete.
CREATE FUNCTION @extschema@.payout_run_deadlines(at timestamptz DEFAULT now()) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    due bigint[];
BEGIN
    PERFORM payoutq.require_time(at);
    -- Notifications that began in the same second have theirs locked for a moment.
    FOR attempt IN 1 .. 10 LOOP
        SELECT array_agg(d.id) INTO due
          FROM (SELECT c.id FROM payoutq.challenge c
                 WHERE c.status = 'active' AND c.due_at <= at AND (c.origin = payoutq.origin()) IS TRUE
                 ORDER BY c.due_at FOR UPDATE SKIP LOCKED) d;
        EXIT WHEN coalesce(cardinality(due), 0)
            = (SELECT count(*) FROM payoutq.challenge c
                WHERE c.status = 'active' AND c.due_at <= at AND (c.origin = payoutq.origin()) IS TRUE);
        PERFORM pg_sleep(0.05);
    END LOOP;
    IF due IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM payoutq.close_challenges(due, 'pending_admin', at);
    PERFORM payoutq.tell_roles(due, array_fill('challenge_pending_review'::text, ARRAY[cardinality(due)]), at);
    RETURN cardinality(due);
END $$;
COMMENT ON FUNCTION @extschema@.payout_run_deadlines(timestamptz) IS
'closes all active challenges that are due, once each, tells their roles, and returns how many; one on which a stake is being placed is closed by the next run; error: 22023';

-- The caller holds their rows FOR UPDATE, so that no stake is on its way.
CREATE FUNCTION payoutq.close_challenges(challenges bigint[], status text, at timestamptz) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    UPDATE payoutq.challenge c
       SET status = close_challenges.status, closed_at = at,
           (yes_pool, no_pool, yes_stakes, no_stakes) = (SELECT p.a[1], p.a[2], p.a[3], p.a[4] FROM payoutq.latest_pools(c.id) AS p (a))
     WHERE c.id = ANY (challenges) AND c.closed_at IS NULL
$$;

-- The job that pays the winners or gives the stakes back. It costs the same for
-- ten stakes and for a million: a worker expands it, from challenge_shares().
CREATE FUNCTION payoutq.create_challenge_job(challenge payoutq.challenge, kind text, fee bigint) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO payoutq.job (reference, kind, payload_hash, challenge_id, currency, source_account, total_pool,
                             platform_fee, created_by, batch_size, origin, bound)
    SELECT r.reference, kind, sha256(convert_to(r.reference, 'UTF8')), challenge.id, challenge.currency,
           '@challenge:' || challenge.id, challenge.yes_pool + challenge.no_pool, fee, session_user,
           payoutq.setting('payoutq.batch_size')::integer, payoutq.origin(),
           EXISTS (SELECT FROM payoutq.binding b WHERE b.currency = challenge.currency)
      FROM format('@challenge:%s:%s', challenge.id, kind) AS r (reference)
    RETURNING id
$$;

-- Who gets what: the pool less the fee in proportion to what each has staked on
-- the winning side; when the stakes go back, that is what each has staked.
CREATE FUNCTION payoutq.challenge_shares(job_id bigint) RETURNS TABLE (user_id text, amount bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT share.user_id, share.amount
      FROM (SELECT min(s.pool) AS pool, array_agg(s.user_id) AS users, array_agg(s.staked) AS weights
              FROM (SELECT min(j.total_pool - j.platform_fee) AS pool, m.debit_account AS user_id,
                           sum(m.amount)::bigint AS staked
                      FROM payoutq.job j
                      JOIN payoutq.challenge c ON c.job_id = j.id
                      JOIN payoutq.movement m ON m.kind = 'stake' AND m.challenge_id = c.id
                       AND m.side = ANY (CASE WHEN j.kind = 'refund' THEN '{YES,NO}'
                                              WHEN c.result = 'challenger_won' THEN '{YES}' ELSE '{NO}' END::text[])
                     WHERE j.id = challenge_shares.job_id
                     GROUP BY m.debit_account ORDER BY m.debit_account) s) w,
           unnest(w.users, @extschema@.payout_split(w.pool, w.weights)) AS share (user_id, amount)
     WHERE share.amount > 0
$$;

CREATE FUNCTION @extschema@.payout_resolve_challenge(INOUT challenge_id bigint, INOUT result text, IN notes text DEFAULT NULL,
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
COMMENT ON FUNCTION @extschema@.payout_resolve_challenge(bigint, text, text) IS
'decides a challenge that awaits it, or that is active without due_at: challenger_won (YES), challenged_won (NO) or draw; one row that names the job that pays the winners or gives the stakes back; the challenge is completed when the job is; errors: 22023, 42704, 55000';

CREATE FUNCTION @extschema@.payout_cancel_challenge(challenge_id bigint, reason text DEFAULT NULL) RETURNS bigint
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
COMMENT ON FUNCTION @extschema@.payout_cancel_challenge(bigint, text) IS
'ends a challenge that is not decided yet, and returns the id of the job that gives the stakes back, or null if there are none; errors: 42704, 55000';

CREATE VIEW @extschema@.payout_challenges AS
SELECT c.id, c.title, c.status, c.result, c.due_at, c.creator_id, c.challenger_id, c.challenged_id,
       p.yes_pool + p.no_pool AS pool, p.yes_pool, p.no_pool, c.fee_bps,
       CASE WHEN j.kind = 'payout' THEN j.id END AS payout_job_id, c.created_at, c.resolved_at, c.completed_at,
       CASE WHEN j.kind = 'refund' THEN j.id END AS refund_job_id, p.yes_stakes, p.no_stakes, c.min_stakes, c.currency,
       c.description, c.category, c.activated_at, c.closed_at, c.evidence, c.admin_notes, c.metadata
  FROM payoutq.challenge c
  LEFT JOIN payoutq.job j ON j.id = c.job_id
 CROSS JOIN LATERAL (
       SELECT coalesce(c.yes_pool, sum(m.amount) FILTER (WHERE m.side = 'YES'), 0)::bigint AS yes_pool,
              coalesce(c.no_pool, sum(m.amount) FILTER (WHERE m.side = 'NO'), 0)::bigint AS no_pool,
              coalesce(c.yes_stakes, count(*) FILTER (WHERE m.side = 'YES')) AS yes_stakes,
              coalesce(c.no_stakes, count(*) FILTER (WHERE m.side = 'NO')) AS no_stakes
         FROM payoutq.movement m
        WHERE m.kind = 'stake' AND m.challenge_id = c.id AND c.closed_at IS NULL
       OFFSET 0) p;  -- challenge by challenge, not all that was ever staked
COMMENT ON VIEW @extschema@.payout_challenges IS
'challenges: status (pending, active, pending_admin, completed, cancelled), result, what is staked on each side, in minor units, and the job that pays it; the pools of an open challenge are summed up, those of a closed one are kept';

CREATE VIEW @extschema@.payout_challenges_awaiting AS
WITH challenge AS NOT MATERIALIZED (SELECT * FROM payoutq.challenge)
SELECT c.id, c.title, c.category, c.due_at, now() - c.closed_at AS age, c.yes_pool + c.no_pool AS pool, c.yes_pool, c.no_pool,
       c.yes_stakes, c.no_stakes, c.currency, c.fee_bps, c.creator_id, c.challenger_id, c.challenged_id, c.description, c.evidence,
       c.admin_notes, c.closed_at
  FROM challenge c
 WHERE c.status = 'pending_admin' AND c.result IS NULL
 ORDER BY c.closed_at, c.id;
COMMENT ON VIEW @extschema@.payout_challenges_awaiting IS
'challenges that wait for payout_resolve_challenge(), the longest waiting first, with what is staked on each side';

CREATE VIEW @extschema@.payout_stakes AS
SELECT m.id, m.challenge_id, m.debit_account AS user_id, m.side, m.amount,
       CASE WHEN c.status = 'cancelled' THEN 'cancelled'
            WHEN c.activated_at IS NULL THEN 'waiting'
            ELSE 'matched' END AS status,
       m.posted_at AS created_at,
       CASE WHEN c.status <> 'cancelled' AND c.activated_at IS NOT NULL THEN greatest(c.activated_at, m.posted_at) END AS matched_at,
       c.currency, m.reference
  FROM payoutq.movement m
  JOIN payoutq.challenge c ON c.id = m.challenge_id
 WHERE m.kind = 'stake';
COMMENT ON VIEW @extschema@.payout_stakes IS
'who has staked what: side YES or NO, amount in minor units, status waiting (for the challenge to become active), matched or cancelled';
-- Notifications: what people are told of a challenge, once each, and the queue of
-- those that are to be pushed to their devices.

CREATE TABLE payoutq.notification (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      text COLLATE "C" NOT NULL,
    type         text NOT NULL,
    title        text NOT NULL,
    body         text NOT NULL,
    urgency      text NOT NULL CHECK (urgency IN ('normal', 'high', 'critical')),
    challenge_id bigint,
    job_id       bigint,
    data         jsonb,
    created_at   timestamptz NOT NULL,
    read_at      timestamptz,
    pushed_at    timestamptz,
    push_after   timestamptz,               -- null: it is not to be pushed, or no longer
    push_attempts integer NOT NULL DEFAULT 0,
    push_error   text
);
CREATE INDEX notification_user ON payoutq.notification (user_id, id);
CREATE INDEX notification_created ON payoutq.notification USING brin (created_at);
CREATE INDEX notification_push ON payoutq.notification (push_after, id) WHERE push_after IS NOT NULL;
CREATE INDEX notification_push_user ON payoutq.notification (user_id, id) WHERE push_after IS NOT NULL;
CREATE INDEX notification_push_created ON payoutq.notification (created_at) WHERE push_after IS NOT NULL;
COMMENT ON TABLE payoutq.notification IS
'what people are told; kept for payoutq.retention';
SELECT pg_catalog.pg_extension_config_dump('payoutq.notification', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.notification_id_seq', '');

-- The provider that pushes: of several of the kind, the oldest.
CREATE FUNCTION payoutq.push_provider() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.srvname FROM pg_foreign_server s
      JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider',
           pg_options_to_table(s.srvoptions) o
     WHERE o.option_name = 'kind' AND o.option_value = 'pusher'
     ORDER BY s.oid LIMIT 1
$$;

-- Of a notification that is made now. Nothing is queued while nobody pushes, so
-- that the first provider does not send out all that has happened.
CREATE FUNCTION payoutq.push_at() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN payoutq.push_provider() IS NOT NULL THEN clock_timestamp() END
$$;

-- The payload is the same for the whole transaction, so the server sends it once.
CREATE FUNCTION payoutq.announce_notifications() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM inserted) THEN
        PERFORM pg_notify('payoutq_notifications',
                          json_build_object('event', 'created', 'transaction_at', transaction_timestamp())::text);
    END IF;
    IF EXISTS (SELECT FROM inserted WHERE push_after IS NOT NULL) THEN
        PERFORM payoutq.wake();
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION payoutq.announce_notifications() IS
'notifies the channel payoutq_notifications, once a transaction: {"event": "created", "transaction_at"}; and wakes whoever pushes them';
CREATE TRIGGER announce AFTER INSERT ON payoutq.notification REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.announce_notifications();

-- Nobody is told the same twice within the window, nor what another run has
-- overtaken.
CREATE FUNCTION payoutq.may_be_told(challenge payoutq.challenge, type text, at timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT challenge.notified_at IS NULL
        OR challenge.notified_at <= at
           AND (challenge.notified_type <> type
                OR challenge.notified_at <= at - payoutq.setting('payoutq.notification_window')::interval)
$$;

-- Tells creator, challenger and challenged of each challenge what is its type.
-- The caller has locked the challenges.
CREATE FUNCTION payoutq.tell_roles(challenges bigint[], types text[], at timestamptz) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    written integer;
BEGIN
    WITH told AS (
        UPDATE payoutq.challenge c SET notified_type = t.type, notified_at = at
          FROM unnest(challenges, types) AS t (id, type)
         WHERE c.id = t.id
           AND payoutq.may_be_told(c, t.type, at)
        RETURNING c.*, t.type
    )
    INSERT INTO payoutq.notification (user_id, type, title, body, urgency, challenge_id, data, created_at, push_after)
    SELECT DISTINCT role.user_id, told.type, message.title, format(message.body, told.title), message.urgency, told.id,
           jsonb_build_object('due_at', told.due_at, 'status', told.status), at, (SELECT payoutq.push_at())
      FROM told
      JOIN (VALUES ('challenge_ending_1_hour', 'Challenge ends within an hour', 'The challenge "%s" ends within an hour.', 'high'),
                   ('challenge_ending_10_mins', 'Challenge ends within 10 minutes', 'The challenge "%s" ends within 10 minutes.', 'critical'),
                   ('challenge_pending_review', 'Challenge awaits its result', 'The challenge "%s" has ended and awaits its result.', 'normal'))
           AS message (type, title, body, urgency) ON message.type = told.type,
           LATERAL (VALUES (told.creator_id), (told.challenger_id), (told.challenged_id)) AS role (user_id)
     WHERE role.user_id IS NOT NULL
     ORDER BY told.id, role.user_id;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END $$;

-- Only active challenges near their due time are looked at; of one that it
-- closes, payout_run_deadlines() tells. One that is locked is another run's;
-- stakes do not stand in the way.
CREATE FUNCTION @extschema@.payout_run_notifications(at timestamptz DEFAULT now()) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    challenges bigint[];
    types text[];
BEGIN
    PERFORM payoutq.require_time(at);
    SELECT array_agg(near.id), array_agg(near.type) INTO challenges, types
      FROM (SELECT c.id, t.type
              FROM payoutq.challenge c,
                   LATERAL (SELECT CASE WHEN c.due_at <= at THEN 'challenge_pending_review'
                                        WHEN c.due_at <= at + interval '10 minutes' THEN 'challenge_ending_10_mins'
                                        ELSE 'challenge_ending_1_hour' END) AS t (type)
             WHERE c.status = 'active' AND c.due_at <= at + interval '1 hour' AND (c.origin = payoutq.origin()) IS TRUE
               AND payoutq.may_be_told(c, t.type, at)
             ORDER BY c.due_at FOR NO KEY UPDATE OF c SKIP LOCKED) near;
    RETURN CASE WHEN challenges IS NULL THEN 0 ELSE payoutq.tell_roles(challenges, types, at) END;
END $$;
COMMENT ON FUNCTION @extschema@.payout_run_notifications(timestamptz) IS
'tells creator, challenger and challenged that a challenge ends within an hour, within 10 minutes, or awaits its result, none of it twice within payoutq.notification_window, and returns how many notifications were written; error: 22023';

-- In the transaction of the batch that pays them.
CREATE FUNCTION payoutq.tell_winners(job_id bigint, first_seq integer, last_seq integer) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO payoutq.notification (user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, push_after)
    SELECT e.user_id, 'payout_received', 'Payout received',
           format('The challenge "%s" has paid you.', c.title), 'normal', c.id, e.job_id,
           jsonb_build_object('amount', e.amount, 'currency', c.currency), clock_timestamp(), (SELECT payoutq.push_at())
      FROM payoutq.challenge c
      JOIN payoutq.entry e ON e.job_id = c.job_id AND e.seq BETWEEN tell_winners.first_seq AND tell_winners.last_seq
     WHERE c.job_id = tell_winners.job_id
     ORDER BY e.seq
$$;

CREATE FUNCTION @extschema@.payout_mark_notification_read(id bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE payoutq.notification n SET read_at = coalesce(n.read_at, clock_timestamp())
     WHERE n.id = payout_mark_notification_read.id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'notification % does not exist', coalesce(id::text, 'null') USING ERRCODE = 'undefined_object';
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_mark_notification_read(bigint) IS
'notes when the user has read the notification; error: 42704';

CREATE VIEW @extschema@.payout_notifications AS
WITH notification AS NOT MATERIALIZED (
    SELECT id, user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, read_at, pushed_at, push_error
      FROM payoutq.notification)
SELECT id, user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, read_at, pushed_at, push_error FROM notification;
COMMENT ON VIEW @extschema@.payout_notifications IS
'what users were told: type (challenge_ending_1_hour, challenge_ending_10_mins, challenge_pending_review, payout_received, with the amount in minor units in data), urgency (normal, high, critical); unread while read_at is null; with a provider of kind pusher: when it was pushed, or why it was not, or not yet';
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
-- What a DBA looks at. Views read the storage with the owner's rights; who may
-- read them is decided by payout_grant().

CREATE VIEW @extschema@.payout_jobs AS
SELECT s.*, j.kind, j.currency, j.priority, j.batch_size, j.run_at, j.source_account, j.provider, j.created_by, j.metadata
  FROM payoutq.status s
  JOIN payoutq.job j ON j.id = s.job_id;
COMMENT ON VIEW @extschema@.payout_jobs IS
'jobs: status (queued, running, paused, completed, failed, cancelled), counts, progress 0..1, amounts in minor units, when and how';

-- For psql's \watch: a row fits into 100 columns.
CREATE VIEW @extschema@.payout_progress AS
SELECT s.job_id,
       CASE WHEN length(s.reference) > 12 THEN '..' || right(s.reference, 10) ELSE s.reference END AS reference,
       s.status,
       format('[%s] %s %%', rpad(repeat('#', floor(s.progress * 10)::integer), 10, '-'),
              lpad(floor(s.progress_percent)::text, 3)) AS bar,
       CASE WHEN s.total_winners < 100000 THEN format('%s/%s', s.completed_count, s.total_winners)
            ELSE format('%sk/%sk', s.completed_count / 1000, s.total_winners / 1000) END AS done,
       s.failed_count AS failed,
       round(s.entries_per_second) AS rate,
       CASE WHEN s.eta IS NOT NULL THEN date_trunc('second', greatest(s.eta - clock_timestamp(), '0')) END AS time_left
  FROM payoutq.status s
 WHERE s.completed_at IS NULL OR s.completed_at > now() - interval '1 hour'
 ORDER BY s.job_id;
COMMENT ON VIEW @extschema@.payout_progress IS
'jobs that are not finished, or were in the last hour, with a bar; for \watch, a row has at most 100 columns for most jobs';

CREATE VIEW @extschema@.payout_batches AS
SELECT b.job_id, b.batch_no, b.first_seq AS first_entry, b.last_seq AS last_entry,
       CASE WHEN j.status = 'cancelled' AND b.status = 'pending' THEN 'cancelled'
            WHEN b.status = 'pending' AND b.attempts > 0 THEN 'retryable'
            ELSE b.status END AS status,
       b.attempts, b.run_after,
       CASE WHEN b.status = 'completed' THEN b.processed_at END AS completed_at,
       CASE WHEN b.status <> 'completed' AND b.attempts > 0 THEN b.error_code END AS error_code,
       CASE WHEN b.status <> 'completed' AND b.attempts > 0 THEN b.error END AS error,
       b.amount, b.processed_at
  FROM payoutq.batch b
  JOIN payoutq.job j ON j.id = b.job_id;
COMMENT ON VIEW @extschema@.payout_batches IS
'ranges of entries that are paid in one transaction each: status (pending, retryable, completed, failed, cancelled), attempts, when the next is due, the last error';

-- The batch of an entry is looked up by range: by job or by user, each is one
-- probe of an index, whatever the statistics say.
CREATE VIEW @extschema@.payout_entries AS
SELECT e.job_id, e.seq AS entry, e.user_id, e.amount,
       CASE WHEN t.id IS NULL OR t.status = 'completed' THEN b.status
            WHEN t.status IN ('failed_terminal', 'confirmation_failed') THEN CASE j.status WHEN 'cancelled' THEN 'cancelled' ELSE 'failed' END
            WHEN t.status = 'retryable' THEN 'retryable'
            ELSE 'pending' END AS status,
       coalesce(t.attempts, b.attempts) AS attempts, coalesce(t.error, b.error) AS error,
       j.created_at, CASE WHEN t.id IS NULL THEN b.processed_at
                          WHEN t.status IN ('completed', 'failed_terminal', 'confirmation_failed') THEN t.updated_at END AS processed_at,
       b.error_code, b.batch_no, t.id AS transfer_id
  FROM payoutq.entry e
  JOIN payoutq.job j ON j.id = e.job_id
  LEFT JOIN payoutq.transfer t ON t.job_id = e.job_id AND t.entry_seq = e.seq AND j.provider IS NOT NULL
 CROSS JOIN LATERAL (SELECT * FROM @extschema@.payout_batches
                      WHERE payout_batches.job_id = e.job_id AND payout_batches.first_entry <= e.seq
                      ORDER BY payout_batches.first_entry DESC LIMIT 1) b;
COMMENT ON VIEW @extschema@.payout_entries IS
'each person''s share of a job: status (pending, completed, retryable, failed, cancelled) and error are those of its batch, or of its transfer; amount in minor units';

CREATE VIEW @extschema@.payout_failed_entries AS
SELECT e.job_id, e.seq AS entry, e.user_id, e.amount, b.status, b.attempts, b.error,
       j.created_at, b.processed_at, b.error_code, b.batch_no, NULL::bigint AS transfer_id
  FROM payoutq.batch failed
  JOIN @extschema@.payout_batches b ON b.job_id = failed.job_id AND b.batch_no = failed.batch_no
  JOIN payoutq.job j ON j.id = failed.job_id
 CROSS JOIN LATERAL (SELECT * FROM payoutq.entry
                      WHERE entry.job_id = failed.job_id AND entry.seq BETWEEN failed.first_seq AND failed.last_seq
                     OFFSET 0) e
 WHERE failed.error_code IS NOT NULL AND b.status IN ('failed', 'retryable')
UNION ALL
SELECT t.job_id, t.entry_seq, t.user_id, t.amount, 'failed', t.attempts, t.error, t.created_at, t.updated_at, NULL, NULL, t.id
  FROM payoutq.transfer t JOIN payoutq.job j ON j.id = t.job_id AND j.status <> 'cancelled'
 WHERE t.status IN ('failed_terminal', 'confirmation_failed');
COMMENT ON VIEW @extschema@.payout_failed_entries IS
'entries that could not be paid: failed for good, or waiting for another try (retryable), with the error';

-- WITH, so that the server does not make the view updatable.
CREATE VIEW @extschema@.payout_accounts AS
WITH account AS NOT MATERIALIZED (SELECT user_id, currency, balance FROM payoutq.account)
SELECT user_id, currency, balance FROM account;
COMMENT ON VIEW @extschema@.payout_accounts IS
'balances in minor units; those of a bound currency are in the application''s table';

CREATE VIEW @extschema@.payout_ledger AS
SELECT e.user_id AS account, j.currency, e.amount, j.kind, e.job_id, e.seq AS entry,
       j.challenge_id, NULL::bigint AS transfer_id, j.reference, b.processed_at AS posted_at
  FROM payoutq.entry e
  JOIN payoutq.job j ON j.id = e.job_id
 CROSS JOIN LATERAL (SELECT * FROM payoutq.batch
                      WHERE batch.job_id = e.job_id AND batch.first_seq <= e.seq
                      ORDER BY batch.first_seq DESC LIMIT 1) b
 WHERE b.status = 'completed'
UNION ALL
SELECT '@job:' || b.job_id, j.currency, -b.amount, j.kind, b.job_id, NULL,
       j.challenge_id, NULL, j.reference, b.processed_at
  FROM payoutq.batch b
  JOIN payoutq.job j ON j.id = b.job_id
 WHERE b.status = 'completed'
UNION ALL
SELECT line.account, m.currency, line.amount, m.kind, m.job_id, m.entry_seq,
       coalesce(m.challenge_id, j.challenge_id), m.transfer_id, coalesce(m.reference, j.reference), m.posted_at
  FROM payoutq.movement m
  LEFT JOIN payoutq.job j ON j.id = m.job_id
 CROSS JOIN LATERAL (VALUES (m.debit_account, -m.amount), (m.credit_account, m.amount)) AS line (account, amount);
COMMENT ON VIEW @extschema@.payout_ledger IS
'all movements of money as signed lines in minor units, which sum to zero in each currency; kind: payout, refund, deposit, withdrawal, stake, funding, fee, hold, transfer, release, reversal, unbinding';

-- Shared memory knows more than pg_stat_activity, but is there with preload only.
CREATE FUNCTION payoutq.workers()
RETURNS TABLE (pid integer, state text, job_id bigint, batch_no integer, since timestamptz,
               batches bigint, entries bigint, last_error text)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM payoutq.worker_slots()
    UNION ALL
    SELECT a.pid, CASE a.state WHEN 'active' THEN 'working' ELSE 'idle' END, NULL, NULL, a.state_change, NULL, NULL, NULL
      FROM pg_stat_activity a
     WHERE a.backend_type = 'payoutq worker' AND a.datname = current_database()
       AND a.pid NOT IN (SELECT w.pid FROM payoutq.worker_slots() w WHERE w.pid IS NOT NULL)
$$;
CREATE VIEW @extschema@.payout_workers AS
SELECT pid, state, job_id, batch_no, since, batches, entries, last_error FROM payoutq.workers();
COMMENT ON VIEW @extschema@.payout_workers IS
'workers of this database: what they are doing, since when, and what they have paid since they started';

CREATE VIEW @extschema@.payout_stats AS
SELECT date_trunc('minute', b.processed_at) AS minute,
       count(*) FILTER (WHERE b.status = 'completed') AS batches,
       coalesce(sum(b.last_seq - b.first_seq + 1) FILTER (WHERE b.status = 'completed'), 0)::bigint AS entries,
       coalesce(sum(b.last_seq - b.first_seq + 1) FILTER (WHERE b.status = 'failed'), 0)::bigint AS failed_entries,
       coalesce(sum(b.amount) FILTER (WHERE b.status = 'completed'), 0) AS amount,
       round(coalesce(sum(b.last_seq - b.first_seq + 1) FILTER (WHERE b.status = 'completed'), 0) / 60.0, 1) AS entries_per_second
  FROM payoutq.batch b
 WHERE b.processed_at > now() - interval '24 hours'
 GROUP BY 1 ORDER BY 1;
COMMENT ON VIEW @extschema@.payout_stats IS
'throughput by minute over the last 24 hours; entries_per_second is averaged over the minute';
-- What must always be true, checked on live data in one snapshot. It reads
-- everything, so the settings that pin the engine's plans are put back.
CREATE FUNCTION payoutq.verify()
RETURNS TABLE (check_name text, ok boolean, violations bigint, detail text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET enable_material = on AS $$
WITH counted AS MATERIALIZED (
    SELECT p.job_id, sum(p.completed) AS completed, sum(p.failed) AS failed, sum(p.paid) AS paid, sum(p.settled) AS settled
      FROM payoutq.counts p GROUP BY 1
), batched AS MATERIALIZED (
    SELECT b.job_id, min(b.first_seq) AS first_seq, max(b.last_seq) AS last_seq,
           sum(b.last_seq - b.first_seq + 1) AS entries, sum(b.amount) AS amount,
           sum(b.last_seq - b.first_seq + 1) FILTER (WHERE b.status = 'completed') AS completed,
           sum(b.last_seq - b.first_seq + 1) FILTER (WHERE b.status = 'failed') AS failed,
           sum(b.amount) FILTER (WHERE b.status = 'completed') AS paid,
           max(b.batch_no) AS batch_no
      FROM payoutq.batch b GROUP BY 1
), transferred AS MATERIALIZED (
    SELECT t.job_id, count(*) AS transfers, count(*) FILTER (WHERE t.status = 'completed') AS completed,
           count(*) FILTER (WHERE t.status IN ('failed_terminal', 'confirmation_failed')) AS failed,
           sum(t.amount) FILTER (WHERE t.status = 'completed') AS settled
      FROM payoutq.transfer t GROUP BY 1
), ranged AS (
    SELECT b.job_id, b.first_seq, lag(b.last_seq, 1, 0) OVER (PARTITION BY b.job_id ORDER BY b.first_seq) AS before
      FROM payoutq.batch b
), entered AS MATERIALIZED (
    SELECT e.job_id, count(*) AS entries, sum(e.amount) AS amount, max(e.seq) AS last_seq
      FROM payoutq.entry e GROUP BY 1
), posted AS MATERIALIZED (
    SELECT e.user_id, j.currency, e.amount
      FROM payoutq.batch b
      JOIN payoutq.job j ON j.id = b.job_id
     CROSS JOIN LATERAL (SELECT * FROM payoutq.entry
                          WHERE entry.job_id = b.job_id AND entry.seq BETWEEN b.first_seq AND b.last_seq
                         OFFSET 0) e  -- by range, not a merge of all with all
     WHERE b.status = 'completed'
), moved AS MATERIALIZED (
    SELECT l.account, m.currency, sum(l.amount) AS amount
      FROM payoutq.movement m
     CROSS JOIN LATERAL (VALUES (m.debit_account, -m.amount), (m.credit_account, m.amount)) AS l (account, amount)
     GROUP BY 1, 2
), escrow AS (
    SELECT j.id, coalesce(m.amount, 0) - coalesce(c.paid, 0) AS balance, j.status, j.total_winners,
           j.amount - coalesce(c.paid, 0) AS unpaid,
           j.platform_fee * (j.status <> 'completed' AND NOT EXISTS (
               SELECT FROM payoutq.movement f WHERE f.job_id = j.id AND f.kind = 'fee'))::integer AS unposted_fee
      FROM payoutq.job j
      LEFT JOIN counted c ON c.job_id = j.id
      LEFT JOIN moved m ON m.account = '@job:' || j.id AND m.currency = j.currency
), staked AS MATERIALIZED (
    SELECT c.id, c.status, c.yes_pool, c.no_pool, coalesce(p.yes_pool, 0) AS yes, coalesce(p.no_pool, 0) AS no,
           coalesce(m.amount, 0) AS escrow, j.total_winners IS NOT NULL AS funded
      FROM payoutq.challenge c
      LEFT JOIN (SELECT s.challenge_id, sum(s.amount) FILTER (WHERE s.side = 'YES') AS yes_pool,
                        sum(s.amount) FILTER (WHERE s.side = 'NO') AS no_pool
                   FROM payoutq.movement s WHERE s.kind = 'stake' GROUP BY 1) p ON p.challenge_id = c.id
      LEFT JOIN payoutq.job j ON j.id = c.job_id
      LEFT JOIN moved m ON m.account = '@challenge:' || c.id AND m.currency = c.currency
), checks (check_name, violation) AS (
    SELECT 'job_amounts', format('job %s: amounts %s + fee %s, pool %s', j.id, coalesce(e.amount, 0), j.platform_fee, j.total_pool)
      FROM payoutq.job j
      LEFT JOIN entered e ON e.job_id = j.id
      LEFT JOIN batched b ON b.job_id = j.id
     WHERE j.amount IS DISTINCT FROM e.amount OR b.amount IS DISTINCT FROM e.amount
        OR coalesce(e.amount, 0) + j.platform_fee > j.total_pool
    UNION ALL
    SELECT 'ledger_balanced', format('currency %s: %s', l.currency, sum(l.amount))
      FROM (SELECT p.currency, sum(p.amount) AS amount FROM posted p GROUP BY 1
            UNION ALL
            SELECT j.currency, -sum(c.paid) FROM counted c JOIN payoutq.job j ON j.id = c.job_id GROUP BY 1
            UNION ALL
            SELECT m.currency, m.amount FROM moved m) AS l
     GROUP BY l.currency HAVING sum(l.amount) <> 0
    UNION ALL
    SELECT 'account_balances', format('account %s %s: balance %s, ledger %s', user_id, currency, a.balance, l.amount)
      FROM (SELECT a.user_id, a.currency, a.balance FROM payoutq.account a) a
      FULL JOIN (SELECT u.user_id, u.currency, sum(u.amount) AS amount
                   FROM (SELECT p.user_id, p.currency, p.amount FROM posted p
                         UNION ALL
                         SELECT m.account, m.currency, m.amount FROM moved m WHERE m.account NOT LIKE '@%') u
                  GROUP BY 1, 2) l USING (user_id, currency)
     WHERE coalesce(a.balance, 0) <> coalesce(l.amount, 0)
       AND NOT EXISTS (SELECT FROM payoutq.binding b WHERE b.currency = coalesce(a.currency, l.currency))
    UNION ALL
    SELECT 'batches_cover_entries', format('job %s: entries after %s', r.job_id, r.before)
      FROM ranged r WHERE r.first_seq <> r.before + 1
    UNION ALL
    SELECT 'batches_cover_entries', format('job %s: %s entries, %s in batches, %s in the job', j.id, e.entries, b.entries, j.total_winners)
      FROM payoutq.job j
      LEFT JOIN entered e ON e.job_id = j.id
      LEFT JOIN batched b ON b.job_id = j.id
     WHERE coalesce(e.entries, 0) <> coalesce(j.total_winners, 0) OR e.entries IS DISTINCT FROM b.entries
        OR e.last_seq IS DISTINCT FROM b.last_seq OR e.last_seq IS DISTINCT FROM e.entries
        OR b.batch_no > j.batches
    UNION ALL
    SELECT 'job_counters', format('job %s: counted %s completed, %s failed, %s paid, %s settled; batches say %s, %s, %s, transfers %s, %s, %s',
                                  b.job_id, c.completed, c.failed, c.paid, c.settled, b.completed, b.failed, b.paid,
                                  t.completed, t.failed, t.settled)
      FROM batched b
      FULL JOIN counted c ON c.job_id = b.job_id
      LEFT JOIN payoutq.job j ON j.id = b.job_id
      LEFT JOIN transferred t ON t.job_id = b.job_id
     WHERE (coalesce(c.completed, 0), coalesce(c.failed, 0), coalesce(c.paid, 0), coalesce(c.settled, 0))
        <> (coalesce(CASE WHEN j.provider IS NULL THEN b.completed ELSE t.completed END, 0),
            coalesce(b.failed, 0) + coalesce(t.failed, 0), coalesce(b.paid, 0),
            coalesce(CASE WHEN j.provider IS NULL THEN b.paid ELSE t.settled END, 0))
        OR j.provider IS NOT NULL AND coalesce(b.completed, 0) <> coalesce(t.transfers, 0)
    UNION ALL
    SELECT 'completed_jobs', format('job %s is %s with entries pending', j.id, j.status)
      FROM payoutq.job j LEFT JOIN counted c ON c.job_id = j.id
     WHERE j.status = 'completed' AND coalesce(c.completed + c.failed, 0) <> j.total_winners
    UNION ALL
    SELECT 'job_escrow', format('job %s (%s): escrow %s, unpaid %s, fee to come %s', e.id, e.status, e.balance, e.unpaid, e.unposted_fee)
      FROM escrow e
     WHERE CASE WHEN e.status = 'cancelled' OR e.total_winners IS NULL THEN e.balance <> 0
                ELSE e.balance <> e.unpaid + e.unposted_fee END
    UNION ALL
    SELECT 'reversals', format('job %s entry %s: %s of %s reversed', m.job_id, m.entry_seq, sum(m.amount), e.amount)
      FROM payoutq.movement m
      LEFT JOIN payoutq.entry e ON e.job_id = m.job_id AND e.seq = m.entry_seq
     WHERE m.kind = 'reversal' GROUP BY m.job_id, m.entry_seq, e.amount HAVING sum(m.amount) > coalesce(e.amount, 0)
    UNION ALL
    SELECT 'balances_not_negative', format('account %s %s: %s', a.user_id, a.currency, a.balance)
      FROM payoutq.account a WHERE a.balance < 0
    UNION ALL
    SELECT 'balances_not_negative', format('account %s %s: %s', m.account, m.currency, m.amount)
      FROM moved m WHERE m.account LIKE '@%' AND m.account NOT LIKE '@job:%' AND m.account <> '@outside' AND m.amount < 0
    UNION ALL
    SELECT 'transfer_holds', format('provider %s %s: %s in transit, transfers under way %s', coalesce(h.provider, substr(m.account, 10)),
                                    coalesce(h.currency, m.currency), m.amount, h.amount)
      FROM (SELECT t.provider, t.currency, sum(t.amount) AS amount FROM payoutq.transfer t
             WHERE t.status NOT IN ('completed', 'failed_terminal', 'confirmation_failed') GROUP BY 1, 2) h
      FULL JOIN (SELECT * FROM moved WHERE account LIKE '@transit:%') m
        ON m.account = '@transit:' || h.provider AND m.currency = h.currency
     WHERE coalesce(h.amount, 0) <> coalesce(m.amount, 0)
    UNION ALL
    SELECT 'transfer_attempts', format('transfer %s is %s with %s attempts, and %s were written', t.id, t.status, t.attempts, a.attempts)
      FROM payoutq.transfer t
      LEFT JOIN (SELECT a.transfer_id, count(*) AS attempts FROM payoutq.attempt a GROUP BY 1) a ON a.transfer_id = t.id
     WHERE t.attempts <> coalesce(a.attempts, 0) OR t.status IN ('sent', 'completed') AND coalesce(a.attempts, 0) = 0
        OR t.status NOT IN ('pending', 'failed_terminal') AND t.destination IS NULL
    UNION ALL
    SELECT 'challenge_stakes', format('challenge %s is %s: staked %s + %s, kept %s + %s, escrow %s', k.id, k.status,
                                      k.yes, k.no, k.yes_pool, k.no_pool, k.escrow)
      FROM staked k
     WHERE (k.yes_pool, k.no_pool) <> (k.yes, k.no) OR k.escrow <> k.yes + k.no AND NOT k.funded
    UNION ALL
    SELECT 'challenge_stakes', format('account %s: there is no such challenge', m.account)
      FROM moved m WHERE m.account LIKE '@challenge:%'
       AND NOT EXISTS (SELECT FROM staked k WHERE m.account = '@challenge:' || k.id)
    UNION ALL
    SELECT 'challenge_states', format('challenge %s is %s, its result %s, its job %s', c.id, c.status,
                                      coalesce(c.result, 'open'), coalesce(j.status, 'none'))
      FROM payoutq.challenge c LEFT JOIN payoutq.job j ON j.id = c.job_id
     WHERE c.job_id IS NOT NULL AND j.id IS NULL
        OR c.result IS NOT NULL AND c.status NOT IN ('pending_admin', 'completed')
        OR c.completed_at IS NULL AND j.status = 'completed'
        OR c.status IN ('pending', 'active') AND c.job_id IS NOT NULL
    UNION ALL
    SELECT 'sequences', format('ids go up to %s, the sequence of challenges stands at %s', max(c.id), max(s.last_value))
      FROM payoutq.challenge c, payoutq.challenge_id_seq s HAVING max(c.id) > max(s.last_value)
    UNION ALL
    SELECT 'sequences', format('ids go up to %s, the sequence of transfers stands at %s', max(t.id), max(s.last_value))
      FROM payoutq.transfer t, payoutq.transfer_id_seq s HAVING max(t.id) > max(s.last_value)
    UNION ALL
    SELECT 'sequences', format('ids go up to %s, the sequence of notifications stands at %s', max(n.id), max(s.last_value))
      FROM payoutq.notification n, payoutq.notification_id_seq s HAVING max(n.id) > max(s.last_value)
    UNION ALL
    SELECT 'sequences', format('ids go up to %s, the sequence of jobs stands at %s', max(j.id), max(s.last_value))
      FROM payoutq.job j, payoutq.job_id_seq s HAVING max(j.id) > max(s.last_value)
    UNION ALL
    SELECT 'sequences', format('ids go up to %s, the sequence of movements stands at %s', max(m.id), max(s.last_value))
      FROM payoutq.movement m, payoutq.movement_id_seq s HAVING max(m.id) > max(s.last_value)
)
SELECT n.check_name, count(c.violation) = 0, count(c.violation), min(c.violation)
  FROM unnest(ARRAY['job_amounts', 'ledger_balanced', 'account_balances', 'batches_cover_entries', 'job_counters',
                    'completed_jobs', 'job_escrow', 'reversals', 'balances_not_negative', 'transfer_holds',
                    'transfer_attempts', 'challenge_stakes',
                    'challenge_states', 'sequences'])
       WITH ORDINALITY AS n (check_name, n)
  LEFT JOIN checks c USING (check_name)
 GROUP BY n.n, n.check_name ORDER BY n.n
$$;
COMMENT ON FUNCTION payoutq.verify() IS 'see payout_verify()';

CREATE FUNCTION @extschema@.payout_verify() RETURNS TABLE (check_name text, ok boolean, violations bigint, detail text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM payoutq.verify()
$$;
COMMENT ON FUNCTION @extschema@.payout_verify() IS
'one row for each thing that must always be true of the books: whether it is, how many violations there are, and the first of them; reads everything';
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
-- Schedules, with pg_cron. Its jobs are kept in one database of the server
-- (cron.database_name); from any other they are reached through a process there.

CREATE FUNCTION payoutq.execute_in(database text, command text) RETURNS text
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_execute_in';
COMMENT ON FUNCTION payoutq.execute_in(text, text) IS
'runs statements in another database, in a transaction of their own, as the extension''s owner, and returns the value that the last one yields';

-- Looks first, in a statement of its own, whether schema cron is pg_cron's: what
-- anybody else has put there must not be called with our rights.
CREATE FUNCTION payoutq.execute_in_cron(command text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cron_database text := current_setting('cron.database_name', true);
    is_local boolean := cron_database = current_database();
    is_there constant text := $sql$
        SELECT count(*) > 0 FROM pg_extension x
          JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid AND d.deptype = 'e'
         WHERE x.extname = 'pg_cron' AND d.classid = 'pg_class'::regclass AND d.objid = to_regclass('cron.job')$sql$;
    answer text;
BEGIN
    IF cron_database IS NULL THEN
        RAISE EXCEPTION 'pg_cron is not loaded'
            USING ERRCODE = 'feature_not_supported',
                  DETAIL = 'Schedules are jobs of pg_cron. Without it, workers still process jobs, at their creation and every payoutq.interval.',
                  HINT = format('Install it (on Debian, the package postgresql-%s-cron), add pg_cron to shared_preload_libraries, restart the server, and run CREATE EXTENSION pg_cron in the database cron.database_name.',
                                current_setting('server_version_num')::integer / 10000);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_database d WHERE d.datname = cron_database) THEN
        RAISE EXCEPTION 'database "%" does not exist', cron_database
            USING ERRCODE = 'feature_not_supported', DETAIL = 'It is cron.database_name.',
                  HINT = 'Create it, restart the server, and run CREATE EXTENSION pg_cron there.';
    END IF;

    IF is_local THEN
        EXECUTE is_there INTO answer;
    ELSE
        answer := payoutq.execute_in(cron_database, is_there);
    END IF;
    IF NOT answer::boolean THEN
        RAISE EXCEPTION 'extension "pg_cron" does not exist in database "%"', cron_database
            USING ERRCODE = 'feature_not_supported', DETAIL = 'That database is cron.database_name.',
                  HINT = format('Run CREATE EXTENSION pg_cron in database "%s".', cron_database);
    END IF;

    IF is_local THEN
        EXECUTE command INTO answer;
        RETURN answer;
    END IF;
    RETURN payoutq.execute_in(cron_database, command);
END $$;

-- The jobs by name. What they run does nothing when the extension is gone; names
-- are complete, so that nobody's function comes before ours.
CREATE FUNCTION payoutq.scheduled_jobs(OUT name text, OUT command text) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 'payoutq ' || j.name,
           format('DO $$BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = ''payoutq'' AND extnamespace = %L::pg_catalog.regnamespace) THEN %s; END IF; END$$',
                  x.extnamespace::regnamespace, replace(j.command, '@', x.extnamespace::regnamespace::text))
      FROM (VALUES ('process', 'CALL @.payout_process(NULL::pg_catalog.int4, NULL::pg_catalog.int8)'),
                   ('deadlines', 'PERFORM @.payout_run_deadlines(pg_catalog.now())'),
                   ('notifications', 'PERFORM @.payout_run_notifications(pg_catalog.now())'),
                   ('maintenance', 'PERFORM @.payout_maintain(1000000::pg_catalog.int4)')) AS j (name, command),
           pg_extension x
     WHERE x.extname = 'payoutq'
$function$;

-- What is added to a name that the same role has given to another database's
-- job. Names of jobs are short, so it is not the database's name.
CREATE FUNCTION payoutq.job_suffix() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(' (%s)', d.oid) FROM pg_database d WHERE d.datname = current_database()
$$;

-- The names of this database's jobs of pg_cron, as an array.
CREATE FUNCTION payoutq.own_cron_jobs() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('%L::text[]', array_agg(j.name || s.suffix))
      FROM payoutq.scheduled_jobs() j, (VALUES (''), (payoutq.job_suffix())) AS s (suffix)
$$;

CREATE FUNCTION @extschema@.payout_schedule(process text DEFAULT '*/5 * * * *', deadlines text DEFAULT '* * * * *',
                                notifications text DEFAULT '* * * * *', maintenance text DEFAULT '30 3 * * *') RETURNS integer
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_schedule';
COMMENT ON FUNCTION @extschema@.payout_schedule(text, text, text, text) IS
'makes or changes the jobs of pg_cron for this database, run as the current user: payoutq process, deadlines, notifications and maintenance, at the times given as cron expressions (null: not at all); returns how many there are; in another database than cron.database_name they stay when the transaction is rolled back; error: 0A000';

-- Its caller knows who the user is.
CREATE FUNCTION payoutq.schedule(username text, process text, deadlines text, notifications text, maintenance text) RETURNS integer
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

CREATE FUNCTION @extschema@.payout_unschedule() RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT payoutq.execute_in_cron(format(
        'SELECT count(cron.unschedule(j.jobid)) FROM cron.job j WHERE j.database = %L AND j.jobname = ANY (%s)',
        current_database(), payoutq.own_cron_jobs()))::integer
$$;
COMMENT ON FUNCTION @extschema@.payout_unschedule() IS
'removes the jobs that payout_schedule() has made for this database, and returns how many; error: 0A000';

-- No row where there is no pg_cron, nor on a standby.
CREATE FUNCTION payoutq.schedules()
RETURNS TABLE (name text, schedule text, command text, username text, active boolean, last_run timestamptz, result text,
               duration interval, message text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT s.name, s.schedule, s.command, s.username, s.active, s.last_run, s.result, s.duration, s.message
      FROM jsonb_to_recordset(payoutq.execute_in_cron(format($sql$
           SELECT jsonb_agg(jsonb_build_object('name', j.jobname, 'schedule', j.schedule, 'command', j.command,
                                               'username', j.username, 'active', j.active, 'last_run', d.start_time,
                                               'result', d.status, 'duration', d.end_time - d.start_time,
                                               'message', left(d.return_message, 1000)) ORDER BY j.jobid)
             FROM cron.job j
             LEFT JOIN LATERAL (SELECT * FROM cron.job_run_details r WHERE r.jobid = j.jobid ORDER BY r.runid DESC LIMIT 1) d ON true
            WHERE j.database = %L AND j.jobname = ANY (%s)$sql$, current_database(), payoutq.own_cron_jobs()))::jsonb)
        AS s (name text, schedule text, command text, username text, active boolean, last_run timestamptz, result text,
              duration interval, message text);
EXCEPTION WHEN feature_not_supported THEN
    RETURN;
END $$;
CREATE VIEW @extschema@.payout_schedules AS
SELECT name, schedule, command, username, active, last_run, result, duration, message FROM payoutq.schedules();
COMMENT ON VIEW @extschema@.payout_schedules IS
'jobs of pg_cron for this database: when they run and as whom, and the start, result, duration and message of the last run; no row without pg_cron';
-- Three levels, each with what the one before has. The list is the only place
-- that says who may do what; a test holds it against the catalog. (A function
-- in a view is called with the rights of whoever reads it.)
CREATE FUNCTION payoutq.level_of(object text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT l.level FROM (VALUES
        ('reader', ARRAY['payout_job_status', 'payout_wait_for_job', 'payout_balance', 'payout_statement', 'payout_verify',
                         'payout_split', 'payout_jobs', 'payout_progress', 'payout_entries', 'payout_failed_entries', 'payout_batches',
                         'payout_accounts', 'payout_ledger', 'payout_workers', 'payout_stats', 'payout_health', 'payout_challenges',
                         'payout_challenges_awaiting', 'payout_stakes', 'payout_notifications', 'payout_schedules', 'payout_transfers', 'payout_attempts',
                         'payout_stuck_transfers', 'payout_providers', 'provider_states', 'schedules', 'sending_is_armed', 'idempotency_key', 'workers', 'xmin_holders', 'restored_jobs']),
        ('operator', ARRAY['payout_create_job', 'payout_create_job_from', 'payout_preview_job', 'payout_preview_job_from',
                           'payout_pause_job', 'payout_resume_job', 'payout_cancel_job', 'payout_retry_job',
                           'payout_trigger_job', 'payout_process', 'payout_deposit', 'payout_withdraw', 'payout_create_challenge',
                           'payout_place_stake', 'payout_add_evidence', 'payout_run_deadlines', 'payout_run_notifications',
                           'payout_resolve_challenge', 'payout_cancel_challenge', 'payout_mark_notification_read',
                           'payout_set_destination', 'payout_claim_transfers', 'payout_transfer_sent', 'payout_transfer_completed',
                           'payout_transfer_failed', 'payout_confirm_transfer', 'payout_retry_transfer', 'payout_handle_webhook', 'payout_reconcile',
                           'payout_on_settlement']),
        ('admin', ARRAY['payout_reverse_entry', 'payout_bind_accounts', 'payout_unbind_accounts', 'payout_start_worker',
                        'payout_stop_workers', 'payout_grant', 'payout_revoke', 'payout_schedule', 'payout_unschedule', 'payout_maintain',
                        'payout_on_confirm', 'payout_arm_sending', 'payout_fail_transfer'])
    ) AS l (level, objects)
    WHERE object = ANY (l.objects)
$$;

-- GRANT or REVOKE on each object of the extension that belongs to the levels.
CREATE FUNCTION payoutq.change_grants(role_name regrole, levels text[], command text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target text;
    direction text := CASE command WHEN 'GRANT' THEN 'TO' ELSE 'FROM' END;
BEGIN
    IF role_name IS NULL THEN
        RAISE EXCEPTION 'role_name must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR target IN
        SELECT CASE WHEN d.classid = 'pg_proc'::regclass
                    THEN format('EXECUTE ON ROUTINE %s', d.objid::regprocedure)
                    ELSE format('SELECT ON %s', d.objid::regclass) END
          FROM pg_depend d
          JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'payoutq'
          LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
         WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
           AND payoutq.level_of(coalesce(p.proname, c.relname)) = ANY (levels)
    LOOP
        EXECUTE format('%s %s %s %s', command, target, direction, role_name);
    END LOOP;
END $$;

CREATE FUNCTION @extschema@.payout_grant(role_name regrole, level text) RETURNS void
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
COMMENT ON FUNCTION @extschema@.payout_grant(regrole, text) IS
'lets a role use the extension: reader (status, balances, views), operator (also create and control jobs and challenges, deposit, withdraw), admin (also reverse, bind tables, workers, schedules, arm sending, grant); error: 22023';

CREATE FUNCTION @extschema@.payout_revoke(role_name regrole) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM payoutq.change_grants(role_name, '{reader,operator,admin}', 'REVOKE');
END $$;
COMMENT ON FUNCTION @extschema@.payout_revoke(regrole) IS 'takes back from a role what payout_grant() gave; error: 22023';

-- Nothing for PUBLIC, nor for whom ALTER DEFAULT PRIVILEGES names: functions are
-- executable by everybody unless revoked.
DO $$
DECLARE
    command text;
BEGIN
    FOR command IN
        SELECT format('REVOKE ALL ON %s FROM %s', o.target,
                      CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
          FROM pg_depend d
          JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'payoutq'
         CROSS JOIN LATERAL (
               SELECT 'ROUTINE ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
                 FROM pg_proc p WHERE d.classid = 'pg_proc'::regclass AND p.oid = d.objid
               UNION ALL
               SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || c.oid::regclass, c.relacl, c.relowner
                 FROM pg_class c WHERE d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'v', 'S')
               UNION ALL
               SELECT 'SCHEMA ' || n.oid::regnamespace, n.nspacl, n.nspowner
                 FROM pg_namespace n WHERE d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
               ) AS o (target, acl, owner)
         CROSS JOIN LATERAL aclexplode(o.acl) a
         WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND a.grantee <> o.owner
         GROUP BY 1
    LOOP
        EXECUTE command;
    END LOOP;
END $$;

-- The launcher learns of the database when this commits.
SELECT payoutq.wake();
-- What psql shows with \d+: column by column the same as in doc/reference.md,
-- which a test sees to.

COMMENT ON COLUMN @extschema@.payout_jobs.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_jobs.reference IS 'idempotency key; that of a challenge''s job begins with @challenge:';
COMMENT ON COLUMN @extschema@.payout_jobs.challenge_id IS 'challenge that the job pays, or the number that its creator gave';
COMMENT ON COLUMN @extschema@.payout_jobs.status IS 'queued, running, paused, completed, failed or cancelled';
COMMENT ON COLUMN @extschema@.payout_jobs.total_winners IS 'number of entries; 0 until a worker has run the query';
COMMENT ON COLUMN @extschema@.payout_jobs.processed_winners IS 'entries that are completed, or failed for good';
COMMENT ON COLUMN @extschema@.payout_jobs.completed_count IS 'entries that are completed; with a provider, those that have arrived';
COMMENT ON COLUMN @extschema@.payout_jobs.failed_count IS 'entries that failed for good';
COMMENT ON COLUMN @extschema@.payout_jobs.pending_count IS 'entries that are still to come';
COMMENT ON COLUMN @extschema@.payout_jobs.progress IS '0 to 1, with four decimals; 1 only when the job is completed';
COMMENT ON COLUMN @extschema@.payout_jobs.progress_percent IS '0 to 100, with two decimals';
COMMENT ON COLUMN @extschema@.payout_jobs.total_pool IS 'what there is to distribute, in minor units; null until a query has yielded it';
COMMENT ON COLUMN @extschema@.payout_jobs.platform_fee IS 'fee for @platform, in minor units';
COMMENT ON COLUMN @extschema@.payout_jobs.amount_paid IS 'what is in the users'' hands, in minor units';
COMMENT ON COLUMN @extschema@.payout_jobs.entries_per_second IS 'speed since the start of the job';
COMMENT ON COLUMN @extschema@.payout_jobs.eta IS 'when the job will be finished at this speed; null when it is not running, or when that is more than 100 years away';
COMMENT ON COLUMN @extschema@.payout_jobs.created_at IS 'when the job was created';
COMMENT ON COLUMN @extschema@.payout_jobs.started_at IS 'when its first batch was tried';
COMMENT ON COLUMN @extschema@.payout_jobs.completed_at IS 'when it was completed, failed or cancelled';
COMMENT ON COLUMN @extschema@.payout_jobs.error IS 'why the job failed, was cancelled or waits';
COMMENT ON COLUMN @extschema@.payout_jobs.kind IS 'payout, or refund of stakes';
COMMENT ON COLUMN @extschema@.payout_jobs.currency IS 'currency of all its amounts';
COMMENT ON COLUMN @extschema@.payout_jobs.priority IS 'jobs with a higher one go first';
COMMENT ON COLUMN @extschema@.payout_jobs.batch_size IS 'entries in one transaction';
COMMENT ON COLUMN @extschema@.payout_jobs.run_at IS 'not before';
COMMENT ON COLUMN @extschema@.payout_jobs.source_account IS 'account that funds the job';
COMMENT ON COLUMN @extschema@.payout_jobs.provider IS 'provider of its transfers; null: it pays into balances';
COMMENT ON COLUMN @extschema@.payout_jobs.created_by IS 'role that created the job; its query is run as this role';
COMMENT ON COLUMN @extschema@.payout_jobs.metadata IS 'whatever the application gave';

COMMENT ON COLUMN @extschema@.payout_progress.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_progress.reference IS 'idempotency key; of a long one, the last ten characters';
COMMENT ON COLUMN @extschema@.payout_progress.status IS 'queued, running, paused, completed, failed or cancelled';
COMMENT ON COLUMN @extschema@.payout_progress.bar IS 'a bar, and percent';
COMMENT ON COLUMN @extschema@.payout_progress.done IS 'completed entries / all entries; in thousands from 100,000 entries on';
COMMENT ON COLUMN @extschema@.payout_progress.failed IS 'entries that failed for good';
COMMENT ON COLUMN @extschema@.payout_progress.rate IS 'entries a second since the start of the job';
COMMENT ON COLUMN @extschema@.payout_progress.time_left IS 'until the job is finished at this speed; null when it is not running, or when that is more than 100 years';

COMMENT ON COLUMN @extschema@.payout_entries.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_entries.entry IS 'number of the entry in its job, in order of user id';
COMMENT ON COLUMN @extschema@.payout_entries.user_id IS 'who is paid';
COMMENT ON COLUMN @extschema@.payout_entries.amount IS 'how much, in minor units';
COMMENT ON COLUMN @extschema@.payout_entries.status IS 'pending, completed, retryable, failed or cancelled';
COMMENT ON COLUMN @extschema@.payout_entries.attempts IS 'attempts of its batch, or of its transfer';
COMMENT ON COLUMN @extschema@.payout_entries.error IS 'error of the last attempt';
COMMENT ON COLUMN @extschema@.payout_entries.created_at IS 'when the job was created';
COMMENT ON COLUMN @extschema@.payout_entries.processed_at IS 'when it was completed or failed';
COMMENT ON COLUMN @extschema@.payout_entries.error_code IS 'SQLSTATE of the error';
COMMENT ON COLUMN @extschema@.payout_entries.batch_no IS 'batch that it belongs to';
COMMENT ON COLUMN @extschema@.payout_entries.transfer_id IS 'transfer that it has become, with a provider';

COMMENT ON COLUMN @extschema@.payout_failed_entries.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_failed_entries.entry IS 'number of the entry in its job, in order of user id';
COMMENT ON COLUMN @extschema@.payout_failed_entries.user_id IS 'who is paid';
COMMENT ON COLUMN @extschema@.payout_failed_entries.amount IS 'how much, in minor units';
COMMENT ON COLUMN @extschema@.payout_failed_entries.status IS 'failed or retryable';
COMMENT ON COLUMN @extschema@.payout_failed_entries.attempts IS 'attempts of its batch, or of its transfer';
COMMENT ON COLUMN @extschema@.payout_failed_entries.error IS 'error of the last attempt';
COMMENT ON COLUMN @extschema@.payout_failed_entries.created_at IS 'when the job, or the transfer, was created';
COMMENT ON COLUMN @extschema@.payout_failed_entries.processed_at IS 'when it failed';
COMMENT ON COLUMN @extschema@.payout_failed_entries.error_code IS 'SQLSTATE of the error; null for a transfer';
COMMENT ON COLUMN @extschema@.payout_failed_entries.batch_no IS 'batch that it belongs to; null for a transfer';
COMMENT ON COLUMN @extschema@.payout_failed_entries.transfer_id IS 'transfer that has failed';

COMMENT ON COLUMN @extschema@.payout_batches.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_batches.batch_no IS 'number of the batch in its job';
COMMENT ON COLUMN @extschema@.payout_batches.first_entry IS 'first entry of the range';
COMMENT ON COLUMN @extschema@.payout_batches.last_entry IS 'last entry of the range';
COMMENT ON COLUMN @extschema@.payout_batches.status IS 'pending, retryable, completed, failed or cancelled';
COMMENT ON COLUMN @extschema@.payout_batches.attempts IS 'attempts that failed';
COMMENT ON COLUMN @extschema@.payout_batches.run_after IS 'the next attempt is not before';
COMMENT ON COLUMN @extschema@.payout_batches.completed_at IS 'when it was completed';
COMMENT ON COLUMN @extschema@.payout_batches.error_code IS 'SQLSTATE of the last error';
COMMENT ON COLUMN @extschema@.payout_batches.error IS 'the last error';
COMMENT ON COLUMN @extschema@.payout_batches.amount IS 'sum of its entries, in minor units';
COMMENT ON COLUMN @extschema@.payout_batches.processed_at IS 'when it was completed or failed';

COMMENT ON COLUMN @extschema@.payout_accounts.user_id IS 'whose';
COMMENT ON COLUMN @extschema@.payout_accounts.currency IS 'in which currency';
COMMENT ON COLUMN @extschema@.payout_accounts.balance IS 'balance in minor units, never negative';

COMMENT ON COLUMN @extschema@.payout_ledger.account IS 'user or system account (@...)';
COMMENT ON COLUMN @extschema@.payout_ledger.currency IS 'currency of the amount';
COMMENT ON COLUMN @extschema@.payout_ledger.amount IS 'signed, in minor units: positive is what the account got';
COMMENT ON COLUMN @extschema@.payout_ledger.kind IS 'payout, refund, deposit, withdrawal, stake, funding, fee, hold, transfer, release, reversal or unbinding';
COMMENT ON COLUMN @extschema@.payout_ledger.job_id IS 'job that it belongs to';
COMMENT ON COLUMN @extschema@.payout_ledger.entry IS 'entry of the job';
COMMENT ON COLUMN @extschema@.payout_ledger.challenge_id IS 'challenge that it belongs to';
COMMENT ON COLUMN @extschema@.payout_ledger.transfer_id IS 'transfer that it belongs to';
COMMENT ON COLUMN @extschema@.payout_ledger.reference IS 'reference of the movement, or of the job';
COMMENT ON COLUMN @extschema@.payout_ledger.posted_at IS 'when it was posted';

COMMENT ON COLUMN @extschema@.payout_challenges.id IS 'id of the challenge';
COMMENT ON COLUMN @extschema@.payout_challenges.title IS 'title';
COMMENT ON COLUMN @extschema@.payout_challenges.status IS 'pending, active, pending_admin, completed or cancelled';
COMMENT ON COLUMN @extschema@.payout_challenges.result IS 'challenger_won, challenged_won or draw; null while it is not decided';
COMMENT ON COLUMN @extschema@.payout_challenges.due_at IS 'when it is closed; null: when it is resolved';
COMMENT ON COLUMN @extschema@.payout_challenges.creator_id IS 'who is told of it as its creator';
COMMENT ON COLUMN @extschema@.payout_challenges.challenger_id IS 'who is told of it as the challenger (side YES)';
COMMENT ON COLUMN @extschema@.payout_challenges.challenged_id IS 'who is told of it as the challenged (side NO)';
COMMENT ON COLUMN @extschema@.payout_challenges.pool IS 'all stakes, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges.yes_pool IS 'stakes on YES, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges.no_pool IS 'stakes on NO, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges.fee_bps IS 'fee in hundredths of a percent of the pool';
COMMENT ON COLUMN @extschema@.payout_challenges.payout_job_id IS 'job that pays the winners';
COMMENT ON COLUMN @extschema@.payout_challenges.created_at IS 'when it was created';
COMMENT ON COLUMN @extschema@.payout_challenges.resolved_at IS 'when it was decided';
COMMENT ON COLUMN @extschema@.payout_challenges.completed_at IS 'when its job was completed';
COMMENT ON COLUMN @extschema@.payout_challenges.refund_job_id IS 'job that gives the stakes back';
COMMENT ON COLUMN @extschema@.payout_challenges.yes_stakes IS 'number of stakes on YES';
COMMENT ON COLUMN @extschema@.payout_challenges.no_stakes IS 'number of stakes on NO';
COMMENT ON COLUMN @extschema@.payout_challenges.min_stakes IS 'number of stakes that make it active; null: one on each side';
COMMENT ON COLUMN @extschema@.payout_challenges.currency IS 'currency of all its amounts';
COMMENT ON COLUMN @extschema@.payout_challenges.description IS 'description';
COMMENT ON COLUMN @extschema@.payout_challenges.category IS 'category';
COMMENT ON COLUMN @extschema@.payout_challenges.activated_at IS 'when it became active';
COMMENT ON COLUMN @extschema@.payout_challenges.closed_at IS 'when it was closed to stakes';
COMMENT ON COLUMN @extschema@.payout_challenges.evidence IS 'array of {"user_id", "evidence", "at"}';
COMMENT ON COLUMN @extschema@.payout_challenges.admin_notes IS 'notes of whoever decided or cancelled it';
COMMENT ON COLUMN @extschema@.payout_challenges.metadata IS 'whatever the application gave';

COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.id IS 'id of the challenge';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.title IS 'title';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.category IS 'category';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.due_at IS 'when it was due';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.age IS 'how long it waits';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.pool IS 'all stakes, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.yes_pool IS 'stakes on YES, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.no_pool IS 'stakes on NO, in minor units';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.yes_stakes IS 'number of stakes on YES';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.no_stakes IS 'number of stakes on NO';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.currency IS 'currency of all its amounts';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.fee_bps IS 'fee in hundredths of a percent of the pool';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.creator_id IS 'who is told of it as its creator';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.challenger_id IS 'who is told of it as the challenger (side YES)';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.challenged_id IS 'who is told of it as the challenged (side NO)';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.description IS 'description';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.evidence IS 'array of {"user_id", "evidence", "at"}';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.admin_notes IS 'notes of an administrator';
COMMENT ON COLUMN @extschema@.payout_challenges_awaiting.closed_at IS 'when it was closed to stakes';

COMMENT ON COLUMN @extschema@.payout_stakes.id IS 'id of the stake';
COMMENT ON COLUMN @extschema@.payout_stakes.challenge_id IS 'challenge that it is placed on';
COMMENT ON COLUMN @extschema@.payout_stakes.user_id IS 'who has staked';
COMMENT ON COLUMN @extschema@.payout_stakes.side IS 'YES (the challenger wins) or NO';
COMMENT ON COLUMN @extschema@.payout_stakes.amount IS 'how much, in minor units';
COMMENT ON COLUMN @extschema@.payout_stakes.status IS 'waiting (for the challenge to become active), matched or cancelled';
COMMENT ON COLUMN @extschema@.payout_stakes.created_at IS 'when it was placed';
COMMENT ON COLUMN @extschema@.payout_stakes.matched_at IS 'since when it counts: the challenge is active';
COMMENT ON COLUMN @extschema@.payout_stakes.currency IS 'currency of the amount';
COMMENT ON COLUMN @extschema@.payout_stakes.reference IS 'idempotency key, if it was given one';

COMMENT ON COLUMN @extschema@.payout_notifications.id IS 'id of the notification';
COMMENT ON COLUMN @extschema@.payout_notifications.user_id IS 'who is told';
COMMENT ON COLUMN @extschema@.payout_notifications.type IS 'challenge_ending_1_hour, challenge_ending_10_mins, challenge_pending_review or payout_received';
COMMENT ON COLUMN @extschema@.payout_notifications.title IS 'a short text for people';
COMMENT ON COLUMN @extschema@.payout_notifications.body IS 'a sentence for people';
COMMENT ON COLUMN @extschema@.payout_notifications.urgency IS 'normal, high or critical';
COMMENT ON COLUMN @extschema@.payout_notifications.challenge_id IS 'challenge that it is about';
COMMENT ON COLUMN @extschema@.payout_notifications.job_id IS 'job that has paid';
COMMENT ON COLUMN @extschema@.payout_notifications.data IS '{"amount" in minor units, "currency"} of what was received, else {"due_at", "status"} of the challenge';
COMMENT ON COLUMN @extschema@.payout_notifications.created_at IS 'when it was written';
COMMENT ON COLUMN @extschema@.payout_notifications.read_at IS 'when the user has read it; null: unread';
COMMENT ON COLUMN @extschema@.payout_notifications.pushed_at IS 'when it was pushed';
COMMENT ON COLUMN @extschema@.payout_notifications.push_error IS 'why it was not pushed, or not yet';

COMMENT ON COLUMN @extschema@.payout_transfers.transfer_id IS 'id of the transfer';
COMMENT ON COLUMN @extschema@.payout_transfers.job_id IS 'id of the job';
COMMENT ON COLUMN @extschema@.payout_transfers.entry IS 'entry of the job';
COMMENT ON COLUMN @extschema@.payout_transfers.user_id IS 'who is paid';
COMMENT ON COLUMN @extschema@.payout_transfers.provider IS 'through which provider';
COMMENT ON COLUMN @extschema@.payout_transfers.destination IS 'account of the user there, as it was when the transfer was made';
COMMENT ON COLUMN @extschema@.payout_transfers.amount IS 'how much, in minor units';
COMMENT ON COLUMN @extschema@.payout_transfers.currency IS 'currency of the amount';
COMMENT ON COLUMN @extschema@.payout_transfers.status IS 'pending, processing, sent, completed, retryable, unknown, failed_terminal or confirmation_failed';
COMMENT ON COLUMN @extschema@.payout_transfers.attempts IS 'attempts that were begun';
COMMENT ON COLUMN @extschema@.payout_transfers.run_after IS 'when the next call is due; while processing, the end of the lease';
COMMENT ON COLUMN @extschema@.payout_transfers.provider_reference IS 'under which the provider knows it';
COMMENT ON COLUMN @extschema@.payout_transfers.idempotency_key IS 'key of its calls: payout:id, or payout:id:gN after a definite rejection';
COMMENT ON COLUMN @extschema@.payout_transfers.error IS 'what went wrong last';
COMMENT ON COLUMN @extschema@.payout_transfers.created_at IS 'when it was made';
COMMENT ON COLUMN @extschema@.payout_transfers.updated_at IS 'when its status changed last';
COMMENT ON COLUMN @extschema@.payout_transfers.generation IS 'number of the key; goes up only after a definite rejection';
COMMENT ON COLUMN @extschema@.payout_transfers.confirmed_at IS 'when the provider has confirmed it';

COMMENT ON COLUMN @extschema@.payout_attempts.transfer_id IS 'id of the transfer';
COMMENT ON COLUMN @extschema@.payout_attempts.attempt IS 'number of the attempt, from 1';
COMMENT ON COLUMN @extschema@.payout_attempts.started_at IS 'when it was claimed';
COMMENT ON COLUMN @extschema@.payout_attempts.finished_at IS 'when its outcome was recorded';
COMMENT ON COLUMN @extschema@.payout_attempts.outcome IS 'sent, completed, transient, permanent or unknown; null: it is going on, or nobody knows';
COMMENT ON COLUMN @extschema@.payout_attempts.http_status IS 'of the answer';
COMMENT ON COLUMN @extschema@.payout_attempts.provider_reference IS 'of the answer';
COMMENT ON COLUMN @extschema@.payout_attempts.error IS 'what went wrong';
COMMENT ON COLUMN @extschema@.payout_attempts.idempotency_key IS 'key of the call';

COMMENT ON COLUMN @extschema@.payout_providers.provider IS 'name of the server';
COMMENT ON COLUMN @extschema@.payout_providers.kind IS 'kind of the provider';
COMMENT ON COLUMN @extschema@.payout_providers.base_url IS 'where it is called';
COMMENT ON COLUMN @extschema@.payout_providers.open_until IS 'nothing is sent before; null: it is not left alone';
COMMENT ON COLUMN @extschema@.payout_providers.reason IS 'why: the provider''s answer';

COMMENT ON COLUMN @extschema@.payout_workers.pid IS 'process id; null while it starts';
COMMENT ON COLUMN @extschema@.payout_workers.state IS 'starting, idle or working';
COMMENT ON COLUMN @extschema@.payout_workers.job_id IS 'job that it is working on';
COMMENT ON COLUMN @extschema@.payout_workers.batch_no IS 'batch of the job; 0 while it writes entries';
COMMENT ON COLUMN @extschema@.payout_workers.since IS 'since when it is in this state';
COMMENT ON COLUMN @extschema@.payout_workers.batches IS 'batches that it has paid since it started';
COMMENT ON COLUMN @extschema@.payout_workers.entries IS 'entries that it has paid since it started';
COMMENT ON COLUMN @extschema@.payout_workers.last_error IS 'last error that it has met';

COMMENT ON COLUMN @extschema@.payout_stats.minute IS 'beginning of the minute';
COMMENT ON COLUMN @extschema@.payout_stats.batches IS 'batches completed';
COMMENT ON COLUMN @extschema@.payout_stats.entries IS 'entries completed';
COMMENT ON COLUMN @extschema@.payout_stats.failed_entries IS 'entries that failed for good';
COMMENT ON COLUMN @extschema@.payout_stats.amount IS 'amounts completed, in minor units, of all currencies';
COMMENT ON COLUMN @extschema@.payout_stats.entries_per_second IS 'entries completed a second, averaged over the minute';

COMMENT ON COLUMN @extschema@.payout_health.check_name IS 'name of the check';
COMMENT ON COLUMN @extschema@.payout_health.ok IS 'false: the value is beyond the threshold';
COMMENT ON COLUMN @extschema@.payout_health.value IS 'what was measured';
COMMENT ON COLUMN @extschema@.payout_health.threshold IS 'highest value that is well; lowest for sending_armed, entries_per_second and worker_running';
COMMENT ON COLUMN @extschema@.payout_health.hint IS 'what the value is, and where to look';

COMMENT ON COLUMN @extschema@.payout_schedules.name IS 'name of the job';
COMMENT ON COLUMN @extschema@.payout_schedules.schedule IS 'when it runs, as a cron expression';
COMMENT ON COLUMN @extschema@.payout_schedules.command IS 'what it runs';
COMMENT ON COLUMN @extschema@.payout_schedules.username IS 'role that it runs as';
COMMENT ON COLUMN @extschema@.payout_schedules.active IS 'false: it was switched off in pg_cron';
COMMENT ON COLUMN @extschema@.payout_schedules.last_run IS 'start of the last run';
COMMENT ON COLUMN @extschema@.payout_schedules.result IS 'of the last run: succeeded, failed, running or another status of pg_cron';
COMMENT ON COLUMN @extschema@.payout_schedules.duration IS 'of the last run';
COMMENT ON COLUMN @extschema@.payout_schedules.message IS 'what the last run returned, or its error';
