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
