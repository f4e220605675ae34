-- pause, resume, cancel, retry, trigger: what they do, and in which states of
-- a job they are refused.
\ir fresh.psql
SELECT plan(51);

-- ---------------------------------------------------------------------------
-- A job in each state
-- ---------------------------------------------------------------------------

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint NOT NULL);
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM');
ALTER TABLE app.wallet RENAME COLUMN coins TO gone;
SELECT payout_create_job('failed', ARRAY['u'], ARRAY[1], currency => 'GEM') AS failed \gset
CALL payout_process();
ALTER TABLE app.wallet RENAME COLUMN gone TO coins;

SELECT payout_create_job('completed', ARRAY['u'], ARRAY[1]) AS completed \gset
CALL payout_process(NULL, :completed);
SELECT payout_create_job('running', ARRAY['u', 'v'], ARRAY[1, 2], batch_size => 1) AS running \gset
CALL payout_process(1, :running);
SELECT payout_create_job('paused', ARRAY['u', 'v'], ARRAY[1, 2], batch_size => 1) AS paused \gset
SELECT payout_pause_job(:paused);
SELECT payout_create_job('cancelled', ARRAY['u'], ARRAY[1]) AS cancelled \gset
SELECT payout_cancel_job(:cancelled);
SELECT payout_create_job('queued', ARRAY['u'], ARRAY[1]) AS queued \gset
SELECT is_empty('SELECT reference, status FROM payout_jobs WHERE reference <> status', 'there is a job in each state');

-- What the call does in each state, undone again: ok, or its SQLSTATE
CREATE FUNCTION pg_temp.in_each_state(verb text) RETURNS TABLE (status text, outcome text) LANGUAGE plpgsql AS $$
BEGIN
    FOR status IN SELECT unnest(ARRAY['queued', 'running', 'paused', 'completed', 'failed', 'cancelled']) LOOP
        BEGIN
            EXECUTE format('SELECT payout_%s_job(job_id) FROM payout_job_status(%L::text)', verb, status);
            RAISE SQLSTATE 'UNDO0';
        EXCEPTION WHEN OTHERS THEN
            outcome := CASE SQLSTATE WHEN 'UNDO0' THEN 'ok' ELSE SQLSTATE END;
        END;
        RETURN NEXT;
    END LOOP;
END $$;
SELECT results_eq(format('SELECT outcome FROM pg_temp.in_each_state(%L)', verb), outcomes,
                  verb || ': queued, running, paused, completed, failed, cancelled')
  FROM (VALUES
    ('pause',   ARRAY['ok',    'ok',    '55000', '55000', '55000', '55000']),
    ('resume',  ARRAY['55000', '55000', 'ok',    '55000', '55000', '55000']),
    ('cancel',  ARRAY['ok',    'ok',    'ok',    '55000', 'ok',    '55000']),
    ('retry',   ARRAY['ok',    'ok',    'ok',    'ok',    'ok',    '55000']),
    ('trigger', ARRAY['ok',    'ok',    '55000', '55000', '55000', '55000'])
  ) AS t (verb, outcomes);
SELECT throws_like(format('SELECT payout_resume_job(%s)', :queued), '%job ' || :'queued' || ' %', 'the message names the job');
SELECT throws_ok(format('SELECT payout_%s_job(%s)', verb, id), '42704', NULL, format('%s: no job %s', verb, id))
  FROM unnest(ARRAY['pause', 'resume', 'cancel', 'retry', 'trigger']) AS verb, unnest(ARRAY['999999', 'NULL']) AS id;

-- ---------------------------------------------------------------------------
-- Pause and resume
-- ---------------------------------------------------------------------------

CALL payout_process(NULL, :paused);
SELECT is((SELECT processed_winners FROM payout_job_status(:paused)), 0::bigint, 'a paused job is not paid');
SELECT payout_resume_job(:paused);
SELECT is((SELECT status FROM payout_job_status(:paused)), 'queued', 'resumed before it began, it is queued again');

SELECT payout_pause_job(:running);
CALL payout_process(NULL, :running);
SELECT is((SELECT processed_winners FROM payout_job_status(:running)), 1::bigint, 'paused in the middle, it stays there');
SELECT payout_resume_job(:running);
SELECT is((SELECT status FROM payout_job_status(:running)), 'running', 'resumed, it is running again');
CALL payout_process(NULL, :running);
SELECT results_eq(format('SELECT status, processed_winners, amount_paid FROM payout_job_status(%s)', :running),
    $$VALUES ('completed', 2::bigint, 3::bigint)$$, 'and goes on to its end');

-- ---------------------------------------------------------------------------
-- Cancel: what is paid stays paid, the rest goes back to where it came from
-- ---------------------------------------------------------------------------

SELECT payout_deposit('sponsor', 1000, 'd1');
SELECT payout_create_job('half', ARRAY['x', 'y'], ARRAY[100, 200], platform_fee => 50, batch_size => 1,
                         source_account => 'sponsor') AS half \gset
SELECT is(payout_balance('sponsor'), 650::bigint, 'the job has taken its money');
SELECT is(payout_balance('@job:' || :half), 350::bigint, 'into its escrow');
CALL payout_process(1, :half);
SELECT payout_cancel_job(:half, 'wrong result');
SELECT is(payout_balance('sponsor'), 900::bigint, 'cancel gives back what is unpaid, and the fee');
SELECT is(payout_balance('@job:' || :half), 0::bigint, 'and leaves nothing in the escrow');
SELECT is(payout_balance('x'), 100::bigint, 'what is paid stays paid');
SELECT is(payout_balance('@platform'), 0::bigint, 'no fee is taken');
SELECT results_eq(format('SELECT status, completed_count, pending_count, error, completed_at IS NOT NULL FROM payout_job_status(%s)', :half),
    $$VALUES ('cancelled', 1::bigint, 1::bigint, 'wrong result', true)$$, 'the job is cancelled, with the reason');
SELECT results_eq(format('SELECT user_id, status FROM payout_entries WHERE job_id = %s ORDER BY entry', :half),
    $$VALUES ('x' COLLATE "C", 'completed'), ('y', 'cancelled')$$, 'and its unpaid entry too');
CALL payout_process(NULL, :half);
SELECT is(payout_balance('y'), 0::bigint, 'which is not paid any more');

SELECT payout_create_job_from('unexpanded', 'SELECT ''u'' AS user_id, 1 AS amount', source_account => 'sponsor') AS unexpanded \gset
SELECT payout_cancel_job(:unexpanded);
CALL payout_process(NULL, :unexpanded);
SELECT is(payout_balance('sponsor'), 900::bigint, 'a job whose query was not run has taken nothing, and gives nothing back');

-- ---------------------------------------------------------------------------
-- Trigger: neither run_at nor a backoff is waited for
-- ---------------------------------------------------------------------------

SELECT payout_create_job('later', ARRAY['z'], ARRAY[5], run_at => now() + '1 year') AS later \gset
CALL payout_process(NULL, :later);
SELECT is((SELECT status FROM payout_job_status(:later)), 'queued', 'a job waits for its run_at');
SELECT payout_trigger_job(:later);
CALL payout_process(NULL, :later);
SELECT is((SELECT status FROM payout_job_status(:later)), 'completed', 'unless it is triggered');

-- ---------------------------------------------------------------------------
-- Retry
-- ---------------------------------------------------------------------------

INSERT INTO app.wallet VALUES ('here', 0);
SELECT payout_create_job('retry', ARRAY['here', 'late1', 'late2'], ARRAY[1, 2, 3], platform_fee => 9, currency => 'GEM') AS retry \gset
CALL payout_process(NULL, :retry);
SELECT payout_trigger_job(:retry);
CALL payout_process(NULL, :retry);
SELECT is((SELECT array_agg(DISTINCT attempts) FROM payout_failed_entries WHERE job_id = :retry), ARRAY[2],
    'a trigger is an attempt, whatever the backoff says');
SELECT payout_trigger_job(:retry);
CALL payout_process(NULL, :retry);
SELECT payout_trigger_job(:retry);
CALL payout_process(NULL, :retry);
SELECT payout_trigger_job(:retry);
CALL payout_process(NULL, :retry);
SELECT results_eq(format('SELECT status, completed_count, failed_count FROM payout_job_status(%s)', :retry),
    $$VALUES ('completed', 1::bigint, 2::bigint)$$, 'two entries have failed for good');

INSERT INTO app.wallet VALUES ('late1', 0);
SELECT is(payout_retry_job(:retry), 2::bigint, 'both are queued again');
SELECT results_eq(format('SELECT status, completed_count, failed_count, pending_count FROM payout_job_status(%s)', :retry),
    $$VALUES ('running', 1::bigint, 0::bigint, 2::bigint)$$, 'the job runs again');
CALL payout_process(NULL, :retry);
SELECT results_eq('SELECT id, coins FROM app.wallet ORDER BY id', $$VALUES ('here', 1::bigint), ('late1', 2)$$,
    'who can be paid now is, who was is not again');
INSERT INTO app.wallet VALUES ('late2', 0);
SELECT is(payout_retry_job(:retry), 1::bigint, 'a retry counts those that wait for another try');
CALL payout_process(NULL, :retry);
SELECT results_eq(format('SELECT status, completed_count, failed_count, progress FROM payout_job_status(%s)', :retry),
    $$VALUES ('completed', 3::bigint, 0::bigint, 1::numeric)$$, 'in the end all are paid');
SELECT is(payout_balance('@platform', 'GEM'), 9::bigint, 'and the fee was taken once');
SELECT is(payout_retry_job(:retry), 0::bigint, 'there is nothing to retry any more');
SELECT is((SELECT status FROM payout_job_status(:retry)), 'completed', 'so the job stays completed');

-- Who never can be paid: the money goes back.
SELECT payout_balance('@outside', 'GEM') AS outside \gset
SELECT payout_create_job('never', ARRAY['here', 'never'], ARRAY[10, 20], currency => 'GEM') AS never \gset
CALL payout_process(NULL, :never);
SELECT payout_trigger_job(:never) \g /dev/null
CALL payout_process(NULL, :never);
SELECT payout_trigger_job(:never) \g /dev/null
CALL payout_process(NULL, :never);
SELECT payout_trigger_job(:never) \g /dev/null
CALL payout_process(NULL, :never);
SELECT payout_trigger_job(:never) \g /dev/null
CALL payout_process(NULL, :never);
SELECT is((SELECT format('%s %s', status, failed_count) FROM payout_job_status(:never)), 'completed 1', '(one has failed for good)');
BEGIN;
SELECT payout_retry_job(:never), payout_cancel_job(:never, 'has left') \g /dev/null
COMMIT;
SELECT is((SELECT format('%s %s %s', status, completed_count, amount_paid) FROM payout_job_status(:never)), 'cancelled 1 10', 'retried and cancelled, what is paid stays paid');
SELECT is(payout_balance('@outside', 'GEM') - :outside, -10::bigint, 'and the rest goes back');
SELECT is_empty(format('SELECT FROM payout_failed_entries WHERE job_id = %s', :never), 'nothing of it is shown as failed');

INSERT INTO app.wallet VALUES ('u', 0);
SELECT is(payout_retry_job(:failed), 1::bigint, 'a job that could not run is retried with all its entries');
CALL payout_process(NULL, :failed);
SELECT results_eq(format('SELECT status, completed_count, error FROM payout_job_status(%s)', :failed),
    $$VALUES ('completed', 1::bigint, NULL)$$, 'and runs');

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
