-- What the scenarios share: made-up users, and jobs that pay some of them.

CREATE EXTENSION payoutq;
CREATE EXTENSION pg_prewarm;
CREATE SCHEMA bench;

CREATE FUNCTION bench.user_id(i bigint) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT 'user' || lpad(i::text, 7, '0') $$;

-- So many of the users, spread evenly and by chance: one out of each group of
-- neighbours.  In no order, as an application would have them.
CREATE FUNCTION bench.winners(entries bigint, users bigint, seed bigint)
RETURNS TABLE (user_id text, amount bigint)
LANGUAGE sql STABLE AS $$
    SELECT bench.user_id(k * (users / entries) + abs(hashint8extended(k, seed) % (users / entries))),
           1 + abs(hashint8extended(k, seed + 1) % 10000)
      FROM generate_series(0, entries - 1) k
     ORDER BY hashint8extended(k, seed + 2)
$$;

CREATE FUNCTION bench.make_job(reference text, entries bigint, users bigint, seed bigint) RETURNS bigint
LANGUAGE sql AS $$
    SELECT payout_create_job(reference, array_agg(w.user_id), array_agg(w.amount))
      FROM bench.winners(entries, users, seed) w
$$;

-- What is used is in shared buffers, whoever is measured first; accounts last,
-- in case that not all has room.
CREATE FUNCTION bench.warm(schema_name text) RETURNS bigint
LANGUAGE sql AS $$
    SELECT sum(pg_prewarm(r.oid))::bigint
      FROM (SELECT c.oid FROM pg_class c
             WHERE c.relkind IN ('r', 'i') AND c.relnamespace = schema_name::regnamespace
             ORDER BY c.relname LIKE 'account%', c.relname) r
$$;

-- Workers are told to leave; this waits until they have left.
CREATE PROCEDURE bench.stop_workers()
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM payout_stop_workers();
    LOOP
        PERFORM pg_stat_clear_snapshot();
        EXIT WHEN NOT EXISTS (SELECT FROM pg_stat_activity
                               WHERE backend_type = 'payoutq worker' AND datname = current_database());
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;

-- The baselines add to the same balances, behind the back of the books.
-- This takes the money out again, so that the books can be verified.
CREATE TABLE bench.added (user_id text COLLATE "C", amount bigint);
CREATE PROCEDURE bench.take_back()
LANGUAGE sql AS $$
    UPDATE payoutq.account a SET balance = a.balance - s.amount
      FROM (SELECT user_id, sum(amount) AS amount FROM bench.added GROUP BY 1) s
     WHERE a.user_id = s.user_id AND a.currency = 'USD';
    TRUNCATE bench.added;
$$;
