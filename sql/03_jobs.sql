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
