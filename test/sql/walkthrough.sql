-- A walk through payoutq, from the first job to the books. The job is paid with
-- CALL payout_process(), step by step; at the end by the worker.

DO $$
BEGIN
    LOOP  -- a worker may be about to start, or to end
        PERFORM set_config('client_min_messages', 'error', true), payout_stop_workers(), pg_stat_clear_snapshot();
        EXIT WHEN NOT EXISTS (SELECT FROM payout_workers);
    END LOOP;
END $$;
DROP EXTENSION payoutq;
CREATE EXTENSION payoutq;
\set VERBOSITY terse

-- 1. A contest is settled: three winners, and a fee for the platform.
SELECT payout_create_job('contest:7',
    '[{"user_id": "alice", "amount": 500}, {"user_id": "bob", "amount": 300}, {"user_id": "carol", "amount": 150}]',
    platform_fee => 50) AS job \gset
SELECT status, total_winners, processed_winners, progress, total_pool FROM payout_job_status(:job);
SELECT entry, user_id, amount, status FROM payout_entries WHERE job_id = :job ORDER BY entry;

CALL payout_process();
SELECT status, total_winners, processed_winners, progress, amount_paid FROM payout_job_status('contest:7');
SELECT user_id, balance FROM payout_accounts ORDER BY user_id;
SELECT payout_balance('alice') AS alice, payout_balance('@platform') AS platform, payout_balance('@outside') AS outside;

-- 2. The same settlement again: the same job, nobody is paid again.
SELECT payout_create_job('contest:7', ARRAY['carol', 'alice', 'bob'], ARRAY[150, 500, 300], platform_fee => 50) = :job AS same_job;
SELECT payout_create_job('contest:7', ARRAY['mallory'], ARRAY[950], platform_fee => 50);
CALL payout_process();
SELECT payout_balance('alice') AS alice;

-- 3. What would be refused; a preview shows it without doing anything.
SELECT payout_create_job('contest:8', ARRAY['alice', 'bob'], ARRAY[100, 0]);
SELECT payout_create_job('contest:8', ARRAY['alice', 'bob'], ARRAY[100, 200], total_pool => 250);
SELECT user_id, amount, balance_before, balance_after, outcome
  FROM payout_preview_job('contest:8', ARRAY['alice', 'dave'], ARRAY[100, 200]);
CALL payout_process(0);
CALL payout_process(job_id => 999);
BEGIN;
CALL payout_process();
ROLLBACK;

-- 4. A thousand winners share a pool in proportion to their stakes, and are
-- paid in two batches of 500.
SELECT payout_create_job('contest:9', array_agg('player' || to_char(i, 'FM0000') ORDER BY i),
                         payout_split(1000003, array_agg(1 + i % 10 ORDER BY i)), total_pool => 1000003) AS job
  FROM generate_series(1, 1000) i \gset
SELECT status, progress_percent, processed_winners, pending_count FROM payout_job_status(:job);
CALL payout_process(1);
SELECT status, progress_percent, processed_winners, pending_count FROM payout_job_status(:job);
CALL payout_process();
SELECT status, progress_percent, processed_winners, pending_count, amount_paid FROM payout_job_status(:job);
SELECT batch_no, first_entry, last_entry, status FROM payout_batches WHERE job_id = :job ORDER BY batch_no;

-- 5. An application that has its own balances binds its table; three of its
-- people cannot be paid.
CREATE TABLE users (id bigint PRIMARY KEY, coins bigint NOT NULL DEFAULT 0 CONSTRAINT coins_limit CHECK (coins <= 1000));
INSERT INTO users SELECT i FROM generate_series(1, 10) i;
SELECT payout_bind_accounts('users', 'id', 'coins', currency => 'COIN');
SELECT payout_create_job('season:1', ARRAY['1', '2', '3', '4', '99', 'nobody'], ARRAY[10, 20, 5000, 40, 50, 60], currency => 'COIN') AS job \gset
CALL payout_process();
SELECT status, completed_count, failed_count, pending_count FROM payout_job_status(:job);
SELECT user_id, amount, status, attempts, error_code, error FROM payout_failed_entries ORDER BY entry;
SELECT id, coins FROM users WHERE coins > 0 ORDER BY id;

-- The causes are mended, but for one; what has failed is tried again.
ALTER TABLE users DROP CONSTRAINT coins_limit;
INSERT INTO users VALUES (99);
SELECT payout_retry_job(:job);
CALL payout_process();
SELECT status, completed_count, failed_count, pending_count FROM payout_job_status(:job);
SELECT user_id, status FROM payout_entries WHERE job_id = :job ORDER BY entry;
SELECT payout_cancel_job(:job, 'nobody is nobody');
SELECT status, completed_count, pending_count, amount_paid, error FROM payout_job_status(:job);
SELECT user_id, status FROM payout_entries WHERE job_id = :job AND status <> 'completed';

-- 6. A sponsor funds a job from his own balance; it is paused, and goes on.
SELECT payout_deposit('sponsor', 1000, 'card:1') IS NOT NULL AS deposited;
SELECT payout_create_job('bonus:1', ARRAY['alice', 'bob'], ARRAY[400, 400], source_account => 'sponsor', batch_size => 1) AS job \gset
SELECT payout_balance('sponsor') AS sponsor;
SELECT payout_create_job('bonus:2', ARRAY['alice'], ARRAY[201], source_account => 'sponsor');
CALL payout_process(1);
SELECT payout_pause_job(:job);
CALL payout_process();
SELECT status, processed_winners FROM payout_job_status(:job);
SELECT payout_resume_job(:job);
CALL payout_process();
SELECT status, processed_winners FROM payout_job_status(:job);

-- 7. A mistake is corrected by another line of the ledger.
SELECT payout_reverse_entry(:job, 'bob', 100, 'paid too much') IS NOT NULL AS reversed;
SELECT payout_reverse_entry(:job, 'bob', 301);
SELECT payout_withdraw('bob', 250, 'bank:1') IS NOT NULL AS withdrawn;
SELECT payout_withdraw('bob', 351, 'bank:2');
SELECT kind, amount, balance, reference, reason FROM payout_statement('bob');
UPDATE payoutq.entry SET amount = 1;

-- 8. The books
SELECT kind, count(*) AS lines, sum(amount) AS sum, sum(amount) FILTER (WHERE account NOT LIKE '@%') AS of_users
  FROM payout_ledger WHERE currency = 'USD' GROUP BY kind ORDER BY kind;
SELECT currency, sum(amount) FROM payout_ledger GROUP BY currency ORDER BY currency;
SELECT reference, status, total_winners, completed_count, failed_count FROM payout_jobs ORDER BY job_id;
SELECT check_name, ok, violations FROM payout_verify();

-- 9. Nobody has to call anything: the worker pays.
SELECT payout_start_worker();
SELECT payout_create_job('contest:10', ARRAY['alice', 'bob'], ARRAY[1, 2]) AS job \gset
SELECT payout_wait_for_job(:job, '1 min');
SELECT check_name, ok FROM payout_health WHERE check_name IN ('worker_running', 'failed_entries', 'failed_jobs') ORDER BY 1;
SELECT * FROM payout_verify() WHERE NOT ok;

DROP TABLE users;
