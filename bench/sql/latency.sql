-- Winners at hand, and a session that watches for the first batch of a job.

CREATE TABLE bench.ready AS
SELECT array_agg(user_id) AS user_ids, array_agg(amount) AS amounts
  FROM bench.winners(10000, 100000, 5);

-- Milliseconds since COMMIT was sent, and since it had returned, which is when
-- this is called.  It looks once a millisecond, each time with a snapshot of its
-- own: without the pause it would take a CPU from the workers.
CREATE FUNCTION bench.wait_for_batch(job bigint, sent timestamptz)
RETURNS TABLE (since_sent numeric, since_returned numeric)
LANGUAGE plpgsql AS $$
DECLARE
    returned timestamptz := clock_timestamp();
    seen timestamptz;
BEGIN
    WHILE NOT EXISTS (SELECT FROM payoutq.batch b WHERE b.job_id = job AND b.status = 'completed') LOOP
        PERFORM pg_sleep(0.001);
    END LOOP;
    seen := clock_timestamp();
    RETURN QUERY SELECT round(extract(epoch FROM seen - sent) * 1000, 3),
                        round(extract(epoch FROM seen - returned) * 1000, 3);
END $$;
