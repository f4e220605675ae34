-- Balances, deposits and withdrawals, who funds a job, the fee, reversals,
-- statements and the ledger.
\ir fresh.psql
SELECT plan(113);

-- ---------------------------------------------------------------------------
-- Deposits and withdrawals
-- ---------------------------------------------------------------------------

SELECT is(payout_balance('alice'), 0::bigint, 'who has no account has nothing');
SELECT payout_deposit('alice', 100, 'd1') AS d1 \gset
SELECT is(payout_balance('alice'), 100::bigint, 'a deposit is credited');
SELECT is(payout_balance('@outside'), -100::bigint, 'the world owes it');
SELECT is(payout_deposit('alice', 100, 'd1'), :'d1', 'the same deposit again is the same movement');
SELECT is(payout_balance('alice'), 100::bigint, 'and credits nothing');
SELECT payout_withdraw('alice', 30, 'w1') AS w1 \gset
SELECT is(payout_balance('alice'), 70::bigint, 'a withdrawal is taken');
SELECT is(payout_withdraw('alice', 30, 'w1'), :'w1', 'the same withdrawal again is the same movement');
SELECT is(payout_balance('alice'), 70::bigint, 'and takes nothing');

SELECT throws_ok(call, '23505', NULL, what)
  FROM (VALUES
    ('SELECT payout_deposit(''alice'', 101, ''d1'')',        'd1 with another amount'),
    ('SELECT payout_deposit(''bob'', 100, ''d1'')',          'd1 for another user'),
    ('SELECT payout_deposit(''alice'', 100, ''d1'', ''EUR'')', 'd1 in another currency'),
    ('SELECT payout_withdraw(''alice'', 100, ''d1'')',       'd1 as a withdrawal'),
    ('SELECT payout_withdraw(''alice'', 29, ''w1'')',        'w1 with another amount'),
    ('SELECT payout_deposit(''alice'', 30, ''w1'')',         'w1 as a deposit')
  ) AS t (call, what);
SELECT throws_like('SELECT payout_deposit(''alice'', 101, ''d1'')', '%"d1"%movement ' || :'d1' || '%',
    'the message names the reference and the movement');

SELECT throws_ok('SELECT payout_' || verb || '(' || arguments || ')', code, NULL, verb || ': ' || what)
  FROM unnest(ARRAY['deposit', 'withdraw']) AS verb,
       (VALUES
    ('''alice'', 1, NULL',        '22023', 'reference null'),
    ('''alice'', 1, ''''',        '22023', 'reference empty'),
    ('''alice'', NULL, ''x''',    '22023', 'amount null'),
    ('''alice'', 1, ''x'', NULL', '22023', 'currency null'),
    ('''alice'', 1, ''x'', ''''', '22023', 'currency empty'),
    ('NULL, 1, ''x''',            '22023', 'user null'),
    (''''', 1, ''x''',            '22023', 'user empty'),
    ('''@platform'', 1, ''x''',   '22023', 'platform account'),
    ('''@outside'', 1, ''x''',    '22023', 'outside account'),
    ('''@job:1'', 1, ''x''',      '22023', 'escrow of a job'),
    ('repeat(''u'', 1001), 1, ''x''', '22023', 'user too long'),
    ('''alice'', 1, ''x'', repeat(''C'', 64)', '22023', 'currency too long'),
    ('''alice'', 1, (SELECT string_agg(md5(i::text), '''') FROM generate_series(1, 300) i)', '22023', 'reference too long'),
    ('''alice'', 0, ''x''',       '23514', 'amount 0'),
    ('''alice'', -1, ''x''',      '23514', 'amount negative')
  ) AS t (arguments, code, what);

SELECT throws_ok('SELECT payout_withdraw(''alice'', 71, ''w2'')', '23514', NULL, 'more than the balance');
SELECT throws_like('SELECT payout_withdraw(''alice'', 71, ''w2'')', '%"alice"%', 'the account is named');
SELECT throws_ok('SELECT payout_withdraw(''nobody'', 1, ''w2'')', '23514', NULL, 'who has no account cannot withdraw');
SELECT throws_ok('SELECT payout_withdraw(''alice'', 1, ''w2'', ''EUR'')', '23514', NULL, 'currencies do not mix');
SELECT is(payout_balance('alice'), 70::bigint, 'what is refused changes nothing');
SELECT lives_ok('SELECT payout_withdraw(''alice'', 70, ''w2'')', 'a refused reference is free, and all may be withdrawn');
SELECT is(payout_balance('alice'), 0::bigint, 'down to zero');
SELECT lives_ok('SELECT payout_withdraw(''alice'', 70, ''w2'')', 'a repeated withdrawal needs no balance');

SELECT lives_ok('SELECT payout_deposit(''rich'', 9223372036854775807, ''r1'')', 'a balance may be all of bigint');
SELECT throws_ok('SELECT payout_deposit(''rich'', 1, ''r2'')', '22003', NULL, 'but not more');
SELECT is(payout_balance('rich'), 9223372036854775807, 'and stays what it was');
SELECT lives_ok('SELECT payout_withdraw(''rich'', 9223372036854775807, ''r3'')', 'and may be withdrawn');

SELECT results_eq($$SELECT payout_balance(a) FROM unnest(ARRAY['@job:', '@job:x', '@job:-1', '@job:99999999999999999999', '@nothing']) a$$,
    $$SELECT 0::bigint FROM generate_series(1, 5)$$, 'names that are no account have nothing');

-- ---------------------------------------------------------------------------
-- Who funds a job
-- ---------------------------------------------------------------------------

SELECT payout_deposit('sponsor', 1000, 'd2') \g /dev/null
SELECT payout_create_job('sponsored', ARRAY['w1', 'w2'], ARRAY[100, 200], total_pool => 800, platform_fee => 40,
                         source_account => 'sponsor') AS sponsored \gset
SELECT is(payout_balance('sponsor'), 660::bigint, 'a user funds amounts and fee, at once; what is left of the pool stays with him');
SELECT is(payout_balance('@job:' || :sponsored), 340::bigint, 'in the escrow of the job');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[661], source_account => 'sponsor')$$,
    '23514', NULL, 'a user must have the money');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[660], platform_fee => 1, source_account => 'sponsor')$$,
    '23514', NULL, 'also for the fee');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[1], source_account => 'nobody')$$,
    '23514', NULL, 'who has no account cannot fund a job');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[1], currency => 'EUR', source_account => 'sponsor')$$,
    '23514', NULL, 'nor who has another currency');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[1], source_account => '@platform')$$,
    '23514', NULL, 'the platform must have the money too');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[1], source_account => '@challenge:1')$$,
    '23514', NULL, 'and so must a challenge');
SELECT is_empty($$SELECT FROM payout_jobs WHERE reference = 'poor'$$, 'no job is left of those');
SELECT is(payout_balance('sponsor'), 660::bigint, 'and nothing is taken');

CALL payout_process();
SELECT is(payout_balance('w1') + payout_balance('w2'), 300::bigint, 'the winners are paid');
SELECT is(payout_balance('@platform'), 40::bigint, 'the platform has its fee');
SELECT is(payout_balance('@job:' || :sponsored), 0::bigint, 'and the escrow is empty');

SELECT payout_create_job('bonus', ARRAY['sponsor', 'w1'], ARRAY[10, 30], source_account => '@platform') AS bonus \gset
SELECT is(payout_balance('@platform'), 0::bigint, 'the platform may fund a job with its fees');
SELECT throws_ok($$SELECT payout_create_job('poor', ARRAY['w'], ARRAY[1], source_account => '@platform')$$,
    '23514', NULL, 'but with no more than those');
CALL payout_process();
SELECT payout_create_job('self', ARRAY['sponsor'], ARRAY[50], source_account => 'sponsor') AS self \gset
SELECT is(payout_balance('sponsor'), 620::bigint, 'who funds a job may be paid by it');
CALL payout_process();
SELECT is(payout_balance('sponsor'), 670::bigint, 'and gets it back');

-- ---------------------------------------------------------------------------
-- Reversals
-- ---------------------------------------------------------------------------

SELECT payout_create_job('unpaid', ARRAY['w1'], ARRAY[5], run_at => now() + '1 year') AS unpaid \gset
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 5)', :unpaid), '55000', NULL, 'what is not paid cannot be reversed');
SELECT throws_ok('SELECT payout_reverse_entry(999999, ''w1'', 5)', '42704', NULL, 'no such job');
SELECT throws_ok('SELECT payout_reverse_entry(NULL, ''w1'', 5)', '42704', NULL, 'job null');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''nobody'', 5)', :sponsored), '42704', NULL, 'no entry of that user');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 0)', :sponsored), '23514', NULL, 'nothing to reverse');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', -5)', :sponsored), '23514', NULL, 'a negative reversal');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 101)', :sponsored), '23514', NULL, 'more than the entry');

SELECT lives_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 60, ''chargeback'')', :sponsored), 'a part is reversed');
SELECT is(payout_balance('w1'), 70::bigint, 'the user no longer has it');
SELECT is(payout_balance('sponsor'), 730::bigint, 'who funded the job has it again');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 41)', :sponsored), '23514', NULL, 'parts may not exceed the entry');
SELECT lives_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 40)', :sponsored), 'but the rest may be reversed');
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w1'', 1)', :sponsored), '23514', NULL, 'and then nothing more');
SELECT is(payout_balance('w1'), 30::bigint, 'other entries of the user stay');
SELECT results_eq(format('SELECT status, amount FROM payout_entries WHERE job_id = %s AND user_id = ''w1''', :sponsored),
    $$VALUES ('completed', 100::bigint)$$, 'the entry itself is unchanged: the reversal is a row of its own');

SELECT payout_reverse_entry(:bonus, 'w1', 30) \g /dev/null
SELECT is(payout_balance('@platform'), 30::bigint, 'what the platform funded goes back to it');
SELECT payout_withdraw('w2', 150, 'w3') \g /dev/null
SELECT throws_ok(format('SELECT payout_reverse_entry(%s, ''w2'', 200)', :sponsored), '23514', NULL, 'what is spent cannot be taken back');
SELECT is(payout_balance('w2'), 50::bigint, 'a balance does not go below zero');
SELECT lives_ok(format('SELECT payout_reverse_entry(%s, ''w2'', 50)', :sponsored), 'but what is left can');

-- ---------------------------------------------------------------------------
-- Statement and ledger
-- ---------------------------------------------------------------------------

SELECT results_eq(
    'SELECT kind, amount, balance, job_id, entry, reference, reason FROM payout_statement(''w1'')',
    format($$VALUES ('payout', 100::bigint, 100::bigint, %1$s::bigint, 1, 'sponsored', NULL),
                    ('payout', 30, 130, %2$s, 2, 'bonus', NULL),
                    ('reversal', -60, 70, %1$s, 1, NULL, 'chargeback'),
                    ('reversal', -40, 30, %1$s, 1, NULL, NULL),
                    ('reversal', -30, 0, %2$s, 2, NULL, NULL)$$, :sponsored, :bonus),
    'a statement lists what came and went, with the running balance');
SELECT results_eq(
    'SELECT kind, amount, balance, reference FROM payout_statement(''alice'')',
    $$VALUES ('deposit', 100::bigint, 100::bigint, 'd1'), ('withdrawal', -30, 70, 'w1'), ('withdrawal', -70, 0, 'w2')$$,
    'also of deposits and withdrawals');
SELECT is_empty('SELECT * FROM payout_statement(''alice'', ''EUR'')', 'each currency has its own statement');
SELECT is_empty('SELECT * FROM payout_statement(''nobody'')', 'who has no account has an empty one');
SELECT is_empty(
    $$SELECT a.user_id, a.balance, s.balance FROM payout_accounts a
       CROSS JOIN LATERAL (SELECT balance, row_number() OVER () AS n FROM payout_statement(a.user_id, a.currency)
                            ORDER BY n DESC LIMIT 1) s
       WHERE s.balance <> a.balance$$, 'every statement ends with the balance');
SELECT cmp_ok((SELECT count(*) FROM payout_accounts), '>=', 5::bigint, 'of which there are some');

SELECT is_empty('SELECT currency, sum(amount) FROM payout_ledger GROUP BY currency HAVING sum(amount) <> 0',
    'the ledger sums to zero');
SELECT is_empty($$SELECT job_id, sum(amount) FROM payout_ledger WHERE job_id IS NOT NULL GROUP BY 1 HAVING sum(amount) <> 0$$,
    'and so does each job');
SELECT is_empty(
    $$SELECT account, currency, sum(l.amount), payout_balance(account, currency) FROM payout_ledger l
       GROUP BY account, currency HAVING sum(l.amount) <> payout_balance(account, currency)$$,
    'every balance is the sum of its ledger lines, of system accounts too');
SELECT set_eq('SELECT DISTINCT kind FROM payout_ledger',
    ARRAY['deposit', 'withdrawal', 'funding', 'fee', 'payout', 'reversal'], 'all of that is in the ledger');
SELECT results_eq(
    format($$SELECT account, amount, kind, entry, reference FROM payout_ledger WHERE job_id = %s
             ORDER BY posted_at, kind, amount$$, :bonus),
    format($$VALUES ('@platform' COLLATE "C", -40::bigint, 'funding', NULL::int, 'bonus'),
                    ('@job:%1$s', 40, 'funding', NULL, 'bonus'),
                    ('@job:%1$s', -40, 'payout', NULL, 'bonus'),
                    ('sponsor', 10, 'payout', 1, 'bonus'), ('w1', 30, 'payout', 2, 'bonus'),
                    ('w1', -30, 'reversal', 2, 'bonus'), ('@platform', 30, 'reversal', 2, 'bonus')$$, :bonus),
    'a job is lines from its source to its winners');

-- ---------------------------------------------------------------------------
-- A payout that would overflow a balance
-- ---------------------------------------------------------------------------

SELECT payout_deposit('rich', 9223372036854775800, 'r4') \g /dev/null
SELECT payout_withdraw('sponsor', payout_balance('sponsor'), 'w4') \g /dev/null
SELECT payout_create_job('overflow', ARRAY['rich', 'w1', 'w2'], ARRAY[8, 1, 1], currency => 'USD') AS overflow \gset
CALL payout_process(NULL, :overflow);
SELECT results_eq(format('SELECT user_id, status FROM payout_entries WHERE job_id = %s ORDER BY entry', :overflow),
    $$VALUES ('rich' COLLATE "C", 'retryable'), ('w1', 'completed'), ('w2', 'completed')$$,
    'an entry that would overflow its balance is isolated');
SELECT is(payout_balance('rich'), 9223372036854775800, 'and changes nothing');
SELECT payout_withdraw('rich', 9223372036854775800, 'r5') \g /dev/null
SELECT payout_trigger_job(:overflow);
CALL payout_process(NULL, :overflow);
SELECT is(payout_balance('rich'), 8::bigint, 'it is paid when there is room');

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

-- ---------------------------------------------------------------------------
-- Many deposits in one transaction
-- ---------------------------------------------------------------------------

BEGIN;
SELECT is(count(payout_deposit('many' || i, i, 'many:' || i)), 30000::bigint, 'thirty thousand users get deposits in one transaction')
  FROM generate_series(1, 30000) i;
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'in it the books balance');
COMMIT;
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and after it');
SELECT is_empty($$SELECT i FROM generate_series(1, 30000) i LEFT JOIN payout_accounts a ON a.user_id = 'many' || i WHERE a.balance IS DISTINCT FROM i$$,
    'each of them has what he was given');

SELECT finish();
