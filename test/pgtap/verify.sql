-- payout_verify(): true for books that were only written by the extension; and
-- each of its checks sees what it is there to see.
\ir fresh.psql

-- Books with something of everything
CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.wallet VALUES ('here');
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM') \g /dev/null
SELECT payout_deposit('rich', 100000, 'd1') \g /dev/null
SELECT payout_deposit('u5', 3, 'd3') \g /dev/null
SELECT payout_deposit('euro', 500, 'd2', 'EUR') \g /dev/null
SELECT payout_withdraw('rich', 100, 'w1') \g /dev/null
SELECT payout_create_job('paid', array_agg('u' || i), array_agg(i), platform_fee => 7, batch_size => 4, source_account => 'rich') AS paid
  FROM generate_series(1, 10) i \gset
SELECT payout_create_job('gone', ARRAY['here', 'gone'], ARRAY[1, 2], currency => 'GEM') AS gone \gset
SELECT payout_create_job('euro', ARRAY['euro'], ARRAY[50], currency => 'EUR', source_account => 'euro') \g /dev/null
CALL payout_process();
SELECT payout_reverse_entry(:paid, 'u5', 3) \g /dev/null
SELECT payout_create_job('half', array_agg('u' || i), array_agg(i * 10), platform_fee => 5, total_pool => 1000, batch_size => 2) AS half
  FROM generate_series(1, 8) i \gset
CALL payout_process(2, :half);
SELECT payout_create_job('cancelled', ARRAY['u1'], ARRAY[1]) AS cancelled \gset
SELECT payout_cancel_job(:cancelled) \g /dev/null
SELECT payout_create_job('queued', ARRAY['u1'], ARRAY[1], platform_fee => 1) AS queued \gset
SELECT payout_create_job_from('query', 'SELECT ''u'' AS user_id, 1 AS amount', run_at => '2100-01-01') \g /dev/null

-- a transfer in each state: t1 to t8, in a currency of its own, t9 without a destination
CREATE SERVER wire FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT payout_set_destination('t' || i, 'wire', 'x') FROM generate_series(1, 8) i \g /dev/null
SELECT payout_create_job('wired', array_agg('t' || i), array_agg((2 ^ i)::bigint), currency => 'WIRE', provider => 'wire') AS wired
  FROM generate_series(1, 9) i \gset
CALL payout_process(NULL, :wired);
UPDATE payoutq.transfer SET run_after = 'infinity' WHERE user_id = 't1';
CREATE TEMP TABLE claim AS SELECT * FROM payout_claim_transfers('wire');
CREATE FUNCTION pg_temp.t(who text, OUT transfer bigint, OUT token uuid) LANGUAGE sql AS $$
    SELECT transfer_id, attempt_token FROM claim WHERE user_id = who
$$;
SELECT payout_transfer_sent(transfer, token, 'r3') FROM pg_temp.t('t3') \g /dev/null
SELECT payout_transfer_completed(transfer, token, 'r4') FROM pg_temp.t('t4') \g /dev/null
SELECT payout_transfer_failed(transfer, token, 'transient') FROM pg_temp.t('t5') \g /dev/null
SELECT payout_transfer_failed(transfer, token, 'unknown') FROM pg_temp.t('t6') \g /dev/null
SELECT payout_transfer_failed(transfer, token, 'permanent') FROM pg_temp.t('t7') \g /dev/null
SELECT payout_transfer_sent(transfer, token, 'r8') FROM pg_temp.t('t8') \g /dev/null
SELECT payout_confirm_transfer('wire', 'r8', false) \g /dev/null

-- and a challenge in each state, in a currency of its own
CREATE FUNCTION pg_temp.challenge(title text) RETURNS bigint LANGUAGE sql AS $$
    SELECT c + 0 * payout_place_stake(c, 'yes', 'YES', 60) + 0 * payout_place_stake(c, 'no', 'NO', 40)
      FROM payout_create_challenge(title, '2100-01-01', currency => 'CHIP', fee_bps => 500) AS c
$$;
SELECT payout_deposit('yes', 1000, 'd4', 'CHIP'), payout_deposit('no', 1000, 'd5', 'CHIP') \g /dev/null
SELECT pg_temp.challenge('completed') AS c_completed, pg_temp.challenge('cancelled') AS c_cancelled \gset
SELECT pg_temp.challenge('resolved') AS c_resolved, pg_temp.challenge('awaiting') AS c_awaiting \gset
SELECT payout_run_deadlines('2100-01-01') \g /dev/null
SELECT payout_cancel_challenge(:c_cancelled) AS cancelled_refund, payout_job_id AS completed_payout
  FROM payout_resolve_challenge(:c_completed, 'challenger_won') \gset
CALL payout_process(NULL, :cancelled_refund);
CALL payout_process(NULL, :completed_payout);
SELECT payout_resolve_challenge(:c_resolved, 'challenged_won') \g /dev/null
SELECT pg_temp.challenge('active') AS c_active, payout_create_challenge('pending', currency => 'CHIP') AS c_pending \gset
SELECT payout_place_stake(:c_pending, 'yes', 'YES', 7) AS waiting \gset

BEGIN;
SELECT plan(71);

SELECT results_eq('SELECT check_name, ok, violations, detail FROM payout_verify()',
    $$SELECT n, true, 0::bigint, NULL::text
        FROM unnest(ARRAY['job_amounts', 'ledger_balanced', 'account_balances', 'batches_cover_entries', 'job_counters',
                          'completed_jobs', 'job_escrow', 'reversals', 'balances_not_negative', 'transfer_holds', 'transfer_attempts', 'challenge_stakes',
                          'challenge_states', 'sequences']) n$$,
    'all checks hold');
SELECT set_eq('SELECT DISTINCT status FROM payout_jobs', ARRAY['queued', 'running', 'completed', 'cancelled'],
    'of jobs in many states');
SELECT isnt_empty('SELECT FROM payout_failed_entries', 'with an entry that failed');
SELECT set_eq('SELECT DISTINCT status FROM payout_challenges', ARRAY['pending', 'active', 'pending_admin', 'completed', 'cancelled'],
    'and a challenge in each state');
SELECT set_eq('SELECT DISTINCT status FROM payout_transfers',
    '{pending,processing,sent,completed,retryable,unknown,failed_terminal,confirmation_failed}'::text[], 'and a transfer');

-- Which checks turn false when somebody tampers with the tables; undone again
CREATE FUNCTION pg_temp.after(VARIADIC statements text[]) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    result text;
    statement text;
    touched bigint;
BEGIN
    -- as a superuser can who means harm: the append-only triggers do not fire
    PERFORM set_config('session_replication_role', 'replica', true);
    FOREACH statement IN ARRAY statements LOOP
        EXECUTE statement;
        GET DIAGNOSTICS touched = ROW_COUNT;
        IF touched = 0 AND statement !~ '^ALTER' THEN
            RAISE EXCEPTION 'nothing was changed by: %', statement;
        END IF;
    END LOOP;
    SELECT coalesce(string_agg(check_name || ' ' || violations, ', '), 'none') INTO result FROM payout_verify() WHERE NOT ok;
    RAISE SQLSTATE 'UNDO0' USING MESSAGE = result;
EXCEPTION WHEN SQLSTATE 'UNDO0' THEN
    RETURN SQLERRM;
END $$;

-- job_amounts
SELECT is(pg_temp.after(format('UPDATE payoutq.job SET total_pool = amount + platform_fee - 1 WHERE id = %s', :half)),
    'job_amounts 1', 'a pool that is smaller than amounts and fee');
SELECT is(pg_temp.after(format('UPDATE payoutq.batch SET amount = amount + 1 WHERE job_id = %s AND batch_no = 4', :half)),
    'job_amounts 1', 'a batch with another amount than its entries');
SELECT matches(pg_temp.after(format('UPDATE payoutq.entry SET amount = amount + 1 WHERE job_id = %s AND seq = 8', :half)),
    'job_amounts 1', 'an entry with another amount');

-- ledger_balanced: what was posted to users is not what left the escrow
SELECT is(pg_temp.after(format('UPDATE payoutq.entry SET amount = amount + 1 WHERE job_id = %s AND seq = 1', :half),
                        format('UPDATE payoutq.entry SET amount = amount - 1 WHERE job_id = %s AND seq = 8', :half),
                        'UPDATE payoutq.account SET balance = balance + 1 WHERE user_id = ''u1'''),
    'ledger_balanced 1', 'an amount moved from an unpaid entry to a paid one');

-- account_balances
SELECT is(pg_temp.after('UPDATE payoutq.account SET balance = balance + 1 WHERE user_id = ''u1'''),
    'account_balances 1', 'a balance that is higher');
SELECT is(pg_temp.after('UPDATE payoutq.account SET balance = 0 WHERE user_id IN (''u1'', ''u2'')'),
    'account_balances 2', 'two balances that are lower');
SELECT is(pg_temp.after('DELETE FROM payoutq.account WHERE user_id = ''u1'''),
    'account_balances 1', 'an account that is gone');
SELECT is(pg_temp.after('INSERT INTO payoutq.account VALUES (''new'', ''USD'', 5)'),
    'account_balances 1', 'an account without a ledger line');
SELECT is(pg_temp.after('UPDATE payoutq.account SET currency = ''EUR'' WHERE user_id = ''u1'''),
    'account_balances 2', 'an account in another currency');
SELECT is(pg_temp.after('DELETE FROM payoutq.movement WHERE kind = ''deposit'' AND credit_account = ''rich'''),
    'account_balances 1', 'a deposit that is gone');
SELECT is(pg_temp.after('UPDATE payoutq.movement SET amount = amount - 1 WHERE kind = ''withdrawal'''),
    'account_balances 1', 'a withdrawal of another amount');

-- batches_cover_entries
SELECT is(pg_temp.after(format('UPDATE payoutq.batch SET first_seq = first_seq + 1 WHERE job_id = %s AND batch_no = 4', :half)),
    'batches_cover_entries 2', 'an entry in no batch');
SELECT is(pg_temp.after(format('UPDATE payoutq.batch SET last_seq = last_seq + 1 WHERE job_id = %s AND batch_no = 3', :half)),
    'batches_cover_entries 2', 'an entry in two batches');
SELECT matches(pg_temp.after(format('DELETE FROM payoutq.batch WHERE job_id = %s AND batch_no = 4', :half)),
    'batches_cover_entries', 'a batch that is gone');
SELECT matches(pg_temp.after(format('INSERT INTO payoutq.entry SELECT job_id, 1, 9, ''u99'' FROM payoutq.entry WHERE job_id = %s AND seq = 1', :half)),
    'batches_cover_entries', 'an entry more');
SELECT is(pg_temp.after(format('UPDATE payoutq.job SET total_winners = 9 WHERE id = %s', :half)),
    'batches_cover_entries 1', 'a job with another number of winners');

-- job_counters
SELECT is(pg_temp.after(format('UPDATE payoutq.progress SET failed = failed + 1 WHERE job_id = %s', :half)),
    'job_counters 1', 'a failed entry that was not counted');
SELECT is(pg_temp.after(format('UPDATE payoutq.progress SET completed = completed - 1 WHERE job_id = %s', :half)),
    'job_counters 1', 'a completed entry that was not counted');
SELECT matches(pg_temp.after(format('UPDATE payoutq.batch SET status = ''completed'', processed_at = now() WHERE job_id = %s AND batch_no = 4', :half)),
    'job_counters 1', 'a batch that was completed by hand');

-- completed_jobs
SELECT is(pg_temp.after(format('UPDATE payoutq.job SET status = ''completed'' WHERE id = %s', :gone)),
    'completed_jobs 1', 'a job completed with entries pending');

-- job_escrow
SELECT is(pg_temp.after(format('DELETE FROM payoutq.movement WHERE kind = ''funding'' AND job_id = %s', :half)),
    'job_escrow 1', 'a job that was not funded');
SELECT is(pg_temp.after(format('UPDATE payoutq.job SET status = ''cancelled'' WHERE id = %s', :half)),
    'job_escrow 1', 'a job that was cancelled and has kept its money');
SELECT is(pg_temp.after(format('DELETE FROM payoutq.movement WHERE kind = ''fee'' AND job_id = %s', :paid)),
    'job_escrow 1', 'a completed job that has not given the platform its fee');

-- reversals
SELECT is(pg_temp.after(format($$INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id, entry_seq)
                                 VALUES ('reversal', 'u5', 'rich', 'USD', 3, %s, 6)$$, :paid),
                        'UPDATE payoutq.account SET balance = balance - 3 WHERE user_id = ''u5''',
                        'UPDATE payoutq.account SET balance = balance + 3 WHERE user_id = ''rich'''),
    'reversals 1', 'reversals of more than the entry');

-- balances_not_negative
SELECT is(pg_temp.after('ALTER TABLE payoutq.account DROP CONSTRAINT account_balance_not_negative',
                        $$INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount)
                          VALUES ('withdrawal', 'debtor', '@outside', 'USD', 1)$$,
                        'INSERT INTO payoutq.account VALUES (''debtor'', ''USD'', -1)'),
    'balances_not_negative 1', 'a user below zero');
SELECT is(pg_temp.after($$INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount)
                          VALUES ('deposit', '@platform', '@outside', 'USD', 1000)$$),
    'balances_not_negative 1', 'the platform below zero');

-- transfer_holds
SELECT is(pg_temp.after('DELETE FROM payoutq.movement WHERE kind = ''hold'' AND debit_account = ''t1'''),
    'account_balances 1, transfer_holds 1', 'a hold that is gone');
SELECT is(pg_temp.after('UPDATE payoutq.movement SET amount = amount - 1 WHERE kind = ''transfer'''),
    'transfer_holds 1', 'less gone outside than the transfer');
SELECT is(pg_temp.after('DELETE FROM payoutq.movement WHERE kind = ''release'' AND credit_account = ''t7'''),
    'account_balances 1, transfer_holds 1', 'a release that is gone');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET amount = amount + 1 WHERE user_id = ''t2'''),
    'transfer_holds 1', 'a transfer of another amount than is held for it');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET currency = ''USD'' WHERE user_id = ''t2'''),
    'transfer_holds 2', 'a transfer in another currency');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET provider = ''elsewhere'' WHERE user_id = ''t2'''),
    'transfer_holds 2', 'a transfer by another provider');
SELECT is(pg_temp.after('UPDATE payoutq.movement SET credit_account = ''@transit:nowhere'' WHERE kind = ''hold'' AND debit_account = ''t2'''),
    'transfer_holds 2', 'a hold at another provider');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET status = ''completed'' WHERE user_id = ''t3'''),
    'job_counters 1, transfer_holds 1', 'a transfer that was completed by hand');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET status = ''failed_terminal'' WHERE user_id = ''t1'''),
    'job_counters 1, transfer_holds 1', 'a transfer that was given up by hand');
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET status = ''retryable'' WHERE user_id = ''t8'''),
    'job_counters 1, transfer_holds 1', 'a transfer that was taken up again by hand');
SELECT is(pg_temp.after('DELETE FROM payoutq.attempt WHERE transfer_id IN (SELECT id FROM payoutq.transfer WHERE user_id = ''t2'')',
                        'DELETE FROM payoutq.transfer WHERE user_id = ''t2'''),
    'job_counters 1, transfer_holds 1', 'a transfer that is gone');

-- transfer_attempts
SELECT is(pg_temp.after(format('DELETE FROM payoutq.attempt WHERE transfer_id = %s', transfer)), 'transfer_attempts 1', who || ': an attempt that is gone')
  FROM unnest(ARRAY['t2', 't3', 't4']) AS who, pg_temp.t(who);
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET attempts = attempts + 1 WHERE user_id IN (''t1'', ''t5'')'),
    'transfer_attempts 2', 'attempts that were not written');
SELECT is(pg_temp.after(format('INSERT INTO payoutq.attempt SELECT transfer_id, 2, 1, gen_random_uuid(), now() FROM payoutq.attempt WHERE transfer_id = %s', transfer)),
    'transfer_attempts 1', 'an attempt that was not counted') FROM pg_temp.t('t6');
SELECT is(pg_temp.after(format('DELETE FROM payoutq.attempt WHERE transfer_id = %s', transfer), format('UPDATE payoutq.transfer SET attempts = 0 WHERE id = %s', transfer)),
    'transfer_attempts 1', who || ': sent without an attempt') FROM unnest(ARRAY['t3', 't4']) AS who, pg_temp.t(who);
SELECT is(pg_temp.after('UPDATE payoutq.transfer SET destination = NULL WHERE user_id IN (''t2'', ''t6'')'),
    'transfer_attempts 2', 'sent to nowhere');

-- job_counters and completed_jobs, of transfers
SELECT is(pg_temp.after(format('UPDATE payoutq.progress SET %1$s = %1$s + 1 WHERE job_id = %2$s AND part = -1', what, :wired)),
    'job_counters 1', 'transfers: another count of ' || what) FROM unnest(ARRAY['completed', 'failed', 'settled']) AS what;
SELECT is(pg_temp.after(format('UPDATE payoutq.job SET status = ''completed'' WHERE id = %s', :wired)),
    'completed_jobs 1', 'a job completed with transfers under way');

-- challenge_stakes
SELECT is(pg_temp.after(format('UPDATE payoutq.challenge SET yes_pool = yes_pool + 1 WHERE id = %s', :c_awaiting)),
    'challenge_stakes 1', 'a pool that is more than the stakes');
SELECT is(pg_temp.after(format('UPDATE payoutq.challenge SET yes_pool = yes_pool + 1, no_pool = no_pool - 1 WHERE id = %s', :c_completed)),
    'challenge_stakes 1', 'a part of a pool on the other side');
SELECT is(pg_temp.after(format('DELETE FROM payoutq.movement WHERE kind = ''stake'' AND challenge_id = %s AND side = ''NO''', :c_awaiting)),
    'account_balances 1, challenge_stakes 1', 'a stake that is gone');
SELECT is(pg_temp.after(format('UPDATE payoutq.movement SET credit_account = ''@challenge:%s'' WHERE id = %s', :c_active, :waiting)),
    'challenge_stakes 2', 'a stake in the escrow of another challenge');
SELECT is(pg_temp.after(format($$INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount)
                                 VALUES ('withdrawal', '@challenge:%s', '@outside', 'CHIP', 1)$$, :c_resolved)),
    'challenge_stakes 1', 'an escrow from which something was taken before the job did');
SELECT is(pg_temp.after($$INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount)
                          VALUES ('deposit', '@outside', '@challenge:999999', 'CHIP', 1)$$),
    'challenge_stakes 1', 'an escrow of no challenge');

-- challenge_states
SELECT throws_ok(format('UPDATE payoutq.challenge SET %s WHERE id = %s', change, :c_completed), '23514', NULL, 'refused at once: ' || change)
  FROM unnest(ARRAY['result = NULL', 'job_id = NULL', 'yes_pool = NULL', 'closed_at = NULL', 'completed_at = NULL']) AS change;
SELECT is(pg_temp.after(format('UPDATE payoutq.challenge SET status = ''pending_admin'', completed_at = NULL WHERE id = %s', :c_completed)),
    'challenge_states 1', 'a challenge that is not completed although its job is');
SELECT is(pg_temp.after(format('UPDATE payoutq.challenge SET result = ''draw'', resolved_at = now() WHERE id = %s', :c_cancelled)),
    'challenge_states 1', 'a cancelled challenge with a result');
SELECT is(pg_temp.after(format('UPDATE payoutq.challenge SET job_id = 999999 WHERE id = %s', :c_active)),
    'challenge_states 1', 'an open challenge with a job');

-- sequences
SELECT is(pg_temp.after('ALTER SEQUENCE payoutq.challenge_id_seq RESTART'), 'sequences 1', 'a sequence of challenges');
SELECT is(pg_temp.after('ALTER SEQUENCE payoutq.transfer_id_seq RESTART'), 'sequences 1', 'a sequence of transfers');
SELECT is(pg_temp.after('ALTER SEQUENCE payoutq.job_id_seq RESTART', 'ALTER SEQUENCE payoutq.movement_id_seq RESTART'),
    'sequences 2', 'sequences that would give out ids again');

SELECT finish();
ROLLBACK;
