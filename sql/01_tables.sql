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
