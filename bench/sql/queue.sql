-- The rival: a queue as one would write it today, with care.  Entries are
-- claimed 500 at a time with SKIP LOCKED by a partial index; balances are changed
-- by one set-based statement in order of user_id; each entry is marked, and gets
-- a ledger row; the job's counter is changed once a batch; one commit a batch, in
-- a loop in the server.
--
-- What helps it, and is here:
--   a claim goes on from the last one, and so does not walk over dead rows;
--   entries are marked by ctid, which cannot change while they are locked;
--   the ledger has no index but its key, which is the entry's;
--   accounts are payoutq's own, with room on each page for HOT updates;
--   joins are nested loops over indexes, and plans are made once.

CREATE SCHEMA queue;

CREATE TABLE queue.job (
    id        bigint PRIMARY KEY,
    total     integer NOT NULL,
    processed integer NOT NULL DEFAULT 0
);

CREATE TABLE queue.entry (
    id           bigint PRIMARY KEY,
    job_id       bigint NOT NULL,
    amount       bigint NOT NULL,
    processed_at timestamptz,
    seq          integer NOT NULL,
    user_id      text COLLATE "C" NOT NULL,
    status       text NOT NULL DEFAULT 'pending'
);
CREATE INDEX entry_pending ON queue.entry (job_id, seq) WHERE status = 'pending';

CREATE TABLE queue.ledger (
    entry_id   bigint PRIMARY KEY,
    amount     bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    user_id    text COLLATE "C" NOT NULL
);

-- The entries of a job of payoutq, once more: as they arrive, which is in no
-- order, or sorted by user_id as payoutq does, so that a batch touches neighbours.
CREATE PROCEDURE queue.load(job bigint, sorted boolean)
LANGUAGE sql AS $$
    TRUNCATE queue.job, queue.entry, queue.ledger;
    INSERT INTO queue.entry (id, job_id, amount, seq, user_id)
    SELECT n, job, amount, n, user_id
      FROM (SELECT amount, user_id,
                   row_number() OVER (ORDER BY CASE WHEN NOT sorted THEN hashint8extended(seq, job) END, seq) AS n
              FROM payoutq.entry WHERE job_id = job) e
     ORDER BY n;
    INSERT INTO queue.job SELECT job, count(*) FROM queue.entry;
$$;

CREATE PROCEDURE queue.pay(job bigint)
LANGUAGE plpgsql AS $$
DECLARE
    rows tid[];
    ids bigint[];
    users text[];
    amounts bigint[];
    position integer := 0;
    paid integer;
BEGIN
    LOOP
        SELECT array_agg(c.ctid), array_agg(c.id), array_agg(c.user_id), array_agg(c.amount), max(c.seq)
          INTO rows, ids, users, amounts, position
          FROM (SELECT * FROM (SELECT e.ctid, e.id, e.user_id, e.amount, e.seq
                                 FROM queue.entry e
                                WHERE e.job_id = job AND e.status = 'pending' AND e.seq > position
                                ORDER BY e.seq LIMIT 500 FOR UPDATE SKIP LOCKED) claimed
                 ORDER BY user_id) c;
        EXIT WHEN ids IS NULL;

        UPDATE payoutq.account a SET balance = a.balance + c.amount
          FROM unnest(users, amounts) AS c (user_id, amount)
         WHERE a.user_id = c.user_id AND a.currency = 'USD';
        GET DIAGNOSTICS paid = ROW_COUNT;
        IF paid <> cardinality(ids) THEN
            RAISE EXCEPTION '% of % entries have an account', paid, cardinality(ids);
        END IF;

        UPDATE queue.entry e SET status = 'completed', processed_at = now() WHERE e.ctid = ANY (rows);
        INSERT INTO queue.ledger (entry_id, amount, user_id)
        SELECT c.id, c.amount, c.user_id FROM unnest(ids, amounts, users) AS c (id, amount, user_id);
        UPDATE queue.job j SET processed = processed + paid WHERE j.id = job;
        COMMIT;
    END LOOP;
END $$;
