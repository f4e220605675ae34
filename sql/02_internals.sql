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
