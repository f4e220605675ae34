-- The smallest complete use: create a job, wait for it, look at the result.
SELECT payout_create_job('smoke', ARRAY['alice', 'bob', 'carol'],
                         ARRAY[100, 200, 300]) AS job \gset
SELECT payout_wait_for_job(:job, '1 min');
SELECT status, total_winners, completed_count, failed_count, progress,
       total_pool
  FROM payout_job_status(:job);
SELECT user_id, balance FROM payout_accounts
  WHERE user_id IN ('alice', 'bob', 'carol') ORDER BY user_id;
SELECT check_name, violations, detail FROM payout_verify() WHERE NOT ok;
