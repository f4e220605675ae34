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
