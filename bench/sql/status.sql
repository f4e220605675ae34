SELECT * FROM payout_job_status(:job::bigint);
