-- What is written to the ledger stays as it is, for the superuser too.
\ir fresh.psql
SELECT payout_deposit('sponsor', 1000, 'd1') \g /dev/null
SELECT payout_create_job('paid', ARRAY['a', 'b'], ARRAY[10, 20], platform_fee => 3, batch_size => 1, source_account => 'sponsor') \g /dev/null
CALL payout_process();
SELECT payout_create_job('half', ARRAY['a', 'b'], ARRAY[10, 20], batch_size => 1) AS half \gset
CALL payout_process(1, :half);

BEGIN;
SELECT plan(27);
SELECT is(current_setting('is_superuser'), 'on', 'this is a superuser');

SELECT throws_ok(statement, '55000', NULL, statement)
  FROM unnest(ARRAY[
    'UPDATE payoutq.entry SET amount = 1',
    'UPDATE payoutq.entry SET user_id = user_id WHERE false',
    'DELETE FROM payoutq.entry WHERE seq = 1',
    'TRUNCATE payoutq.entry',
    'INSERT INTO payoutq.entry SELECT * FROM payoutq.entry ON CONFLICT (job_id, seq) DO UPDATE SET amount = 1',
    'MERGE INTO payoutq.entry e USING payoutq.entry f ON e.job_id = f.job_id AND e.seq = f.seq WHEN MATCHED THEN DELETE',
    'UPDATE payoutq.movement SET amount = 1',
    'UPDATE payoutq.movement SET reason = NULL WHERE kind = ''fee''',
    'DELETE FROM payoutq.movement',
    'DELETE FROM payoutq.movement WHERE kind = ''deposit''',
    'TRUNCATE payoutq.movement',
    'UPDATE payoutq.batch SET status = ''pending'' WHERE status = ''completed''',
    'UPDATE payoutq.batch SET amount = amount + 1 WHERE status = ''completed''',
    'UPDATE payoutq.batch SET processed_at = now()',
    'DELETE FROM payoutq.batch',
    'DELETE FROM payoutq.batch WHERE status = ''completed''',
    'TRUNCATE payoutq.batch',
    'DELETE FROM payoutq.job',
    'DELETE FROM payoutq.job WHERE reference = ''half''',
    'TRUNCATE payoutq.job',
    'TRUNCATE payoutq.job, payoutq.entry, payoutq.batch, payoutq.progress, payoutq.account, payoutq.movement'
  ]) AS statement;
SELECT throws_like('DELETE FROM payoutq.movement', '%payoutq.movement%', 'the message names the table');

-- ... and what must not be refused
SELECT lives_ok('UPDATE payoutq.batch SET run_after = now() WHERE status = ''pending''', 'a batch that is pending may change');
SELECT lives_ok('UPDATE payoutq.job SET priority = 5', 'so may a job');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'all is as it was');
SELECT is((SELECT sum(amount) FROM payout_entries), 60::numeric, 'to the last unit');

SELECT finish();
ROLLBACK;
