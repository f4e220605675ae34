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
