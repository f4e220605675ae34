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
