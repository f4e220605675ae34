-- Transfers by the pull interface: providers, destinations, holds, claims and
-- reports, confirmations, retries, callbacks. Each part has a provider of its
-- own, so that what one leaves is not claimed by the next.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(524);
DROP SERVER IF EXISTS payoutq_test_other;
DROP FOREIGN DATA WRAPPER IF EXISTS payoutq_test_other;
DROP ROLE IF EXISTS payoutq_test_payer, payoutq_test_minter;

-- The transfer of a user, and the token of one of its attempts (by default, the last)
CREATE FUNCTION pg_temp.t(who text) RETURNS bigint LANGUAGE sql AS $$
    SELECT max(transfer_id) FROM payout_transfers WHERE user_id = who
$$;
CREATE TABLE app.claim (transfer_id bigint, attempt_token uuid, attempt integer, idempotency_key text, user_id text, destination text,
                        amount bigint, currency text, metadata jsonb, n bigint GENERATED ALWAYS AS IDENTITY);
CREATE FUNCTION pg_temp.token(who text, attempt integer DEFAULT NULL) RETURNS uuid LANGUAGE sql AS $$
    SELECT attempt_token FROM app.claim WHERE user_id = who AND claim.attempt = coalesce($2, claim.attempt) ORDER BY n DESC LIMIT 1
$$;
-- 'ann 1, bob 1': who was claimed, at which attempt
CREATE FUNCTION pg_temp.claim(provider text, max_count integer DEFAULT 1000, lease interval DEFAULT '1 hour') RETURNS text
LANGUAGE sql AS $$
    WITH claimed AS (
        INSERT INTO app.claim SELECT * FROM payout_claim_transfers(provider, max_count, lease) RETURNING user_id, attempt, n)
    SELECT string_agg(user_id || ' ' || attempt, ', ' ORDER BY n) FROM claimed
$$;
CREATE FUNCTION pg_temp.sent(who text, reference text, attempt integer DEFAULT NULL) RETURNS void LANGUAGE sql AS $$
    SELECT payout_transfer_sent(pg_temp.t(who), pg_temp.token(who, attempt), reference)
$$;
CREATE FUNCTION pg_temp.done(who text, reference text DEFAULT NULL, attempt integer DEFAULT NULL) RETURNS void LANGUAGE sql AS $$
    SELECT payout_transfer_completed(pg_temp.t(who), pg_temp.token(who, attempt), reference)
$$;
CREATE FUNCTION pg_temp.failed(who text, class text, reason text DEFAULT NULL, attempt integer DEFAULT NULL) RETURNS text LANGUAGE sql AS $$
    SELECT payout_transfer_failed(pg_temp.t(who), pg_temp.token(who, attempt), class, reason)
$$;
CREATE FUNCTION pg_temp.retry(who text) RETURNS text LANGUAGE sql AS $$ SELECT payout_retry_transfer(pg_temp.t(who)) $$;
CREATE FUNCTION pg_temp.status(who text) RETURNS text LANGUAGE sql AS $$
    SELECT status FROM payout_transfers WHERE transfer_id = pg_temp.t(who)
$$;
-- 'ann sent 1, bob pending 0'
CREATE FUNCTION pg_temp.transfers(job bigint) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(format('%s %s %s', user_id, status, attempts), ', ' ORDER BY entry) FROM payout_transfers WHERE job_id = job
$$;
-- 'running: 1 completed, 0 failed, 2 pending, 100 paid'
CREATE FUNCTION pg_temp.job(job bigint) RETURNS text LANGUAGE sql AS $$
    SELECT format('%s: %s completed, %s failed, %s pending, %s paid', status, completed_count, failed_count, pending_count, amount_paid)
      FROM payout_job_status(job)
$$;
CREATE FUNCTION pg_temp.provider(name text, destinations text[] DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE SERVER %I FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''external'')', name);
    PERFORM payout_set_destination(who, name, who || '''s') FROM unnest(destinations) AS who;
END $$;

-- All that there is, and two tests: a call is refused, and changes nothing.
CREATE FUNCTION pg_temp.everything() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text;
    rows text;
    result text := '';
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'payoutq' ORDER BY 1 LOOP
        EXECUTE format('SELECT string_agg(t::text, chr(10) ORDER BY t::text) FROM payoutq.%I t', name) INTO rows;
        result := result || name || ': ' || coalesce(md5(rows), 'empty') || ' ';
    END LOOP;
    RETURN result;
END $$;
CREATE FUNCTION pg_temp.refused(call text, code text, what text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    before text := pg_temp.everything();
BEGIN
    RETURN NEXT throws_ok('SELECT ' || call, code, NULL, what || ' is refused');
    RETURN NEXT is(pg_temp.everything(), before, what || ' changes nothing');
END $$;

-- ---------------------------------------------------------------------------
-- The wrapper and its validator
-- ---------------------------------------------------------------------------

SELECT throws_ok('CREATE SERVER bad FOREIGN DATA WRAPPER payout_provider ' || options, code, NULL, 'server: ' || what)
  FROM (VALUES
    ('',                                                          'HV002', 'without options'),
    ('OPTIONS (key_life ''1 day'')',                              'HV002', 'without a kind'),
    ('OPTIONS (kind ''bank'')',                                   '22023', 'no such kind'),
    ('OPTIONS (kind '''')',                                       '22023', 'kind empty'),
    ('OPTIONS (kind ''EXTERNAL'')',                               '22023', 'kind in upper case'),
    ('OPTIONS (kind ''external'', colour ''red'')',               'HV00D', 'an unknown option'),
    ('OPTIONS (kind ''external'', "Kind" ''external'')',          'HV00D', 'an option in upper case'),
    ('OPTIONS (kind ''external'', key_life ''soon'')',            '22007', 'key_life is no interval'),
    ('OPTIONS (kind ''external'', key_life '''')',                '22007', 'key_life empty'),
    ('OPTIONS (kind ''external'', key_life ''-1 hour'')',         '22023', 'key_life negative'),
    ('OPTIONS (kind ''external'', key_life ''-1 day'')',          '22023', 'key_life negative, in days'),
    ('OPTIONS (kind ''external'', key_life ''-1 month'')',        '22023', 'key_life negative, in months')
  ) AS t (options, code, what);
SELECT throws_like('CREATE SERVER bad FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''bank'')', '%"bank"%', 'the kind is named');
SELECT throws_like('CREATE SERVER bad FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''external'', colour ''red'')', '%"colour"%',
    'the option is named');
SELECT lives_ok('CREATE SERVER good FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''external'', key_life ''2 days'')',
    'what is known is allowed');
SELECT throws_ok(command, code, NULL, what)
  FROM (VALUES
    ('ALTER SERVER good OPTIONS (DROP kind)',                                       'HV002', 'a server keeps its kind'),
    ('ALTER SERVER good OPTIONS (SET kind ''bank'')',                               '22023', 'or gets another that is known'),
    ('ALTER SERVER good OPTIONS (SET key_life ''never'')',                          '22007', 'key_life is looked at again'),
    ('ALTER SERVER good OPTIONS (ADD colour ''red'')',                              'HV00D', 'no unknown option comes later'),
    ('CREATE USER MAPPING FOR PUBLIC SERVER good OPTIONS (colour ''red'')',         'HV00D', 'user mapping: an unknown option'),
    ('CREATE USER MAPPING FOR PUBLIC SERVER good OPTIONS (kind ''external'')',      'HV00D', 'user mapping: an option of a server'),
    ('ALTER FOREIGN DATA WRAPPER payout_provider OPTIONS (ADD kind ''external'')',  'HV00D', 'the wrapper has no options')
  ) AS t (command, code, what);
SELECT lives_ok('ALTER SERVER good OPTIONS (DROP key_life)', 'key_life can be left out again');

-- ---------------------------------------------------------------------------
-- No such provider
-- ---------------------------------------------------------------------------

CREATE FOREIGN DATA WRAPPER payoutq_test_other;
CREATE SERVER payoutq_test_other FOREIGN DATA WRAPPER payoutq_test_other OPTIONS (kind 'external');
CREATE FUNCTION app.noted(bigint) RETURNS void LANGUAGE sql AS '';
SELECT pg_temp.refused(format(call, quote_nullable(name)), '42704', format(call, coalesce(name, 'NULL')))
  FROM unnest(ARRAY['payout_create_job(''x'', ARRAY[''a''], ARRAY[1], provider => %s)',
                    'payout_create_job(''x'', ''[{"user_id": "a", "amount": 1}]'', provider => %s)',
                    'payout_create_job_from(''x'', ''SELECT ''''a'''' AS user_id, 1 AS amount'', provider => %s)',
                    'payout_preview_job(''x'', ARRAY[''a''], ARRAY[1], provider => %s)',
                    'payout_preview_job(''x'', ''[{"user_id": "a", "amount": 1}]'', provider => %s)',
                    'payout_set_destination(''a'', %s, ''acct'')',
                    'payout_claim_transfers(%s)',
                    'payout_confirm_transfer(%s, ''ref'', true)',
                    'payout_on_confirm(%s, ''app.noted(bigint)'')']) AS call,
       unnest(ARRAY['nowhere', 'payoutq_test_other', 'Good', NULL]) AS name
 WHERE name IS NOT NULL OR call !~ '_job|on_confirm';
SELECT throws_like('SELECT payout_claim_transfers(''nowhere'')', '%"nowhere"%', 'the provider is named');
SELECT throws_ok('SELECT payout_on_confirm(NULL, ''app.noted(bigint)'')', '22023', NULL, 'on_confirm: provider null');

-- ---------------------------------------------------------------------------
-- Who may use a provider
-- ---------------------------------------------------------------------------

CREATE ROLE payoutq_test_payer;
SELECT payout_grant('payoutq_test_payer', 'operator');
SET ROLE payoutq_test_payer;
SELECT throws_ok(call, '42501', 'permission denied for provider "good"', call)
  FROM unnest(ARRAY['SELECT payout_create_job(''mine'', ARRAY[''a''], ARRAY[1], provider => ''good'')',
                    'SELECT payout_create_job(''mine'', ''[{"user_id": "a", "amount": 1}]'', provider => ''good'')',
                    'SELECT payout_create_job_from(''mine'', ''SELECT ''''a'''' AS user_id, 1 AS amount'', provider => ''good'')']) AS call;
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER good TO payoutq_test_payer;
SET ROLE payoutq_test_payer;
SELECT lives_ok('SELECT payout_create_job(''mine'', ARRAY[''a''], ARRAY[1], provider => ''good'', run_at => ''2100-01-01'')',
    'with USAGE on the server a job can be created');
SELECT payout_cancel_job((SELECT job_id FROM payout_jobs WHERE reference = 'mine')) \g /dev/null
RESET ROLE;

-- ---------------------------------------------------------------------------
-- Destinations
-- ---------------------------------------------------------------------------

SELECT throws_ok('SELECT payout_set_destination(' || arguments || ')', '22023', NULL, 'destination: ' || what)
  FROM (VALUES
    ('NULL, ''good'', ''x''',                   'user null'),
    (''''', ''good'', ''x''',                   'user empty'),
    ('''@outside'', ''good'', ''x''',           'a system account'),
    ('repeat(''u'', 1001), ''good'', ''x''',    'user too long'),
    ('''a'', ''good'', ''''',                   'destination empty'),
    ('''a'', ''good'', repeat(''d'', 1001)',    'destination too long'),
    ('''a'', ''good'', repeat(''é'', 501)',     'destination too long, in bytes')
  ) AS t (arguments, what);
SELECT is_empty('SELECT FROM payoutq.destination', 'of those nothing is left');
SELECT lives_ok('SELECT payout_set_destination(repeat(''u'', 1000), ''good'', repeat(''d'', 1000))', 'the limits themselves are allowed');

SELECT pg_temp.provider('place', '{old}'), pg_temp.provider('place2') \g /dev/null
SELECT payout_set_destination('new', 'place', 'first'), payout_set_destination('new', 'place2', 'elsewhere'),
       payout_set_destination('gone', 'place', 'was here') \g /dev/null
SELECT payout_set_destination('new', 'place', 'second'), payout_set_destination('gone', 'place', NULL) \g /dev/null
SELECT lives_ok('SELECT payout_set_destination(''nobody'', ''place'', NULL)', 'who has none can be said to have none');
SELECT payout_create_job('place', ARRAY['old', 'new', 'gone'], ARRAY[1, 2, 4], provider => 'place') AS place \gset
CALL payout_process();
SELECT payout_set_destination('old', 'place', 'later'), payout_set_destination('new', 'place', NULL), payout_set_destination('gone', 'place', 'back') \g /dev/null
SELECT results_eq(format('SELECT user_id, destination, status FROM payout_transfers WHERE job_id = %s ORDER BY user_id', :place),
    $$VALUES ('gone' COLLATE "C", NULL, 'failed_terminal'), ('new', 'second', 'pending'), ('old', 'old''s', 'pending')$$,
    'transfers keep the destination of the time when they were made; setting one again replaces it, null removes it');
SELECT payout_create_job('place:2', ARRAY['old', 'new', 'gone'], ARRAY[1, 2, 4], provider => 'place') AS place2 \gset
CALL payout_process();
SELECT results_eq(format('SELECT user_id, destination FROM payout_transfers WHERE job_id = %s ORDER BY user_id', :place2),
    $$VALUES ('gone' COLLATE "C", 'back'), ('new', NULL), ('old', 'later')$$, 'the next ones have the new ones');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'destinations: the books balance');

-- ---------------------------------------------------------------------------
-- A job: a transfer for each entry, and its money held
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('hold', '{ann,bob}') \g /dev/null
-- no balance is ever below zero, not even for a moment
CREATE TABLE app.seen (user_id text, balance bigint);
CREATE FUNCTION app.see() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO app.seen VALUES (NEW.user_id, NEW.balance);
    RETURN NULL;
END $$;
CREATE TRIGGER see AFTER INSERT OR UPDATE ON payoutq.account FOR EACH ROW EXECUTE FUNCTION app.see();
SELECT payout_create_job('hold', ARRAY['ann', 'bob', 'cyd'], ARRAY[100, 200, 50], platform_fee => 7, batch_size => 2, provider => 'hold',
                         metadata => '{"season": 3}') AS hold \gset
SELECT is((SELECT provider FROM payout_jobs WHERE job_id = :hold), 'hold', 'a job knows its provider');
SELECT is_empty(format('SELECT FROM payout_transfers WHERE job_id = %s', :hold), 'transfers are not made when it is created');
CALL payout_process(1, :hold);
SELECT is(pg_temp.transfers(:hold), 'ann pending 0, bob pending 0', 'but by batches');
SELECT is(payout_balance('@transit:hold'), 300::bigint, 'each holds what it has made');
SELECT is(pg_temp.job(:hold), 'running: 0 completed, 0 failed, 3 pending, 0 paid', 'which is not paid yet');
CALL payout_process(NULL, :hold);
SELECT is(pg_temp.transfers(:hold), 'ann pending 0, bob pending 0, cyd failed_terminal 0', 'there is one for each entry');
SELECT results_eq(
    format($$SELECT transfer_id = pg_temp.t(user_id), job_id, entry, user_id, provider, destination, amount, currency, provider_reference,
                    idempotency_key = 'payout:' || transfer_id, error, generation,
                    created_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), run_after <= clock_timestamp(),
                    updated_at BETWEEN created_at AND clock_timestamp(), confirmed_at
               FROM payout_transfers WHERE job_id = %s ORDER BY entry$$, :hold),
    format($$VALUES (true, %1$s::bigint, 1, 'ann' COLLATE "C", 'hold' COLLATE "C", 'ann''s', 100::bigint, 'USD', NULL::text, true, NULL::text, 1, true, true, true, NULL::timestamptz),
                    (true, %1$s, 2, 'bob', 'hold', 'bob''s', 200, 'USD', NULL, true, NULL, 1, true, true, true, NULL),
                    (true, %1$s, 3, 'cyd', 'hold', NULL, 50, 'USD', NULL, true, 'external_account_not_connected', 1, true, true, true, NULL)$$, :hold),
    'payout_transfers has all of them; who has no account at the provider has no transfer to wait for');
SELECT results_eq(
    format($$SELECT l.account, l.amount, l.kind, l.entry, t.user_id FROM payout_ledger l LEFT JOIN payout_transfers t USING (transfer_id)
              WHERE l.job_id = %s ORDER BY l.kind, l.entry, l.account, l.amount$$, :hold),
    format($$VALUES ('@job:%1$s' COLLATE "C", 357::bigint, 'funding', NULL::int, NULL COLLATE "C"), ('@outside', -357, 'funding', NULL, NULL),
                    ('@transit:hold', 100, 'hold', 1, 'ann'), ('ann', -100, 'hold', 1, 'ann'),
                    ('@transit:hold', 200, 'hold', 2, 'bob'), ('bob', -200, 'hold', 2, 'bob'),
                    ('ann', 100, 'payout', 1, NULL), ('bob', 200, 'payout', 2, NULL), ('cyd', 50, 'payout', 3, NULL),
                    ('@job:%1$s', -300, 'payout', NULL, NULL), ('@job:%1$s', -50, 'payout', NULL, NULL)$$, :hold),
    'payout_ledger: paid to the users, and held for all who have an account there');
SELECT is(payout_balance('@transit:hold'), 300::bigint, 'the money is in transit');
SELECT is(payout_balance(who), balance, what) FROM (VALUES
    ('ann', 0::bigint, 'and not in the balance of ann'), ('bob', 0, 'nor in that of bob'), ('cyd', 50, 'cyd has hers')) AS t (who, balance, what);
SELECT results_eq(
    format('SELECT entry, user_id, amount, status, attempts, error, processed_at IS NOT NULL, transfer_id = pg_temp.t(user_id) FROM payout_entries WHERE job_id = %s ORDER BY entry', :hold),
    $$VALUES (1, 'ann' COLLATE "C", 100::bigint, 'pending', 0, NULL, false, true), (2, 'bob', 200, 'pending', 0, NULL, false, true),
             (3, 'cyd', 50, 'failed', 0, 'external_account_not_connected', true, true)$$, 'an entry is in the state of its transfer');
SELECT is(pg_temp.job(:hold), 'running: 0 completed, 1 failed, 2 pending, 0 paid', 'and the job waits for them');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'holds: the books balance');

-- ---------------------------------------------------------------------------
-- Claim
-- ---------------------------------------------------------------------------

SELECT throws_ok('SELECT payout_claim_transfers(' || arguments || ')', '22023', NULL, 'claim: ' || what)
  FROM (VALUES
    ('''hold'', 0',                     'nothing'),
    ('''hold'', -1',                    'less than nothing'),
    ('''hold'', NULL',                  'max_count null'),
    ('''hold'', 1, NULL',               'lease null'),
    ('''hold'', 1, ''0''',              'no lease'),
    ('''hold'', 1, ''-1 minute''',      'a lease that has ended')
  ) AS t (arguments, what);
SELECT is(pg_temp.transfers(:hold), 'ann pending 0, bob pending 0, cyd failed_terminal 0', 'of those nothing is claimed');

SELECT pg_temp.provider('claim', '{c1,c2,c3,c4,c5,c6}') \g /dev/null
SELECT payout_create_job('claim:1', ARRAY['c1', 'c2', 'c3'], ARRAY[1, 2, 3], provider => 'claim', currency => 'EUR', metadata => '{"season": 3, "entry": "mine"}') AS claim1,
       payout_create_job('claim:2', ARRAY['c4', 'c5', 'c6'], ARRAY[4, 5, 6], provider => 'claim') AS claim2 \gset
CALL payout_process();
UPDATE payoutq.transfer SET run_after = now() - interval '1 minute' WHERE user_id = 'c5';
UPDATE payoutq.transfer SET run_after = now() + interval '1 minute' WHERE user_id = 'c2';
SELECT is(pg_temp.claim('claim', 2, '1 hour'), 'c1 1, c5 1', 'claim: no more than asked for, those that are due longest');
SELECT results_eq(
    $$SELECT c.idempotency_key = 'payout:' || c.transfer_id, c.transfer_id = pg_temp.t(c.user_id), c.attempt_token IS NOT NULL, c.attempt, c.user_id,
             c.destination, c.amount, c.currency, c.metadata - 'origin', c.metadata ->> 'origin' = payoutq.key_origin() FROM app.claim c ORDER BY c.user_id$$,
    format($$VALUES (true, true, true, 1, 'c1', 'c1''s', 1::bigint, 'EUR', '{"season": 3, "reference": "claim:1", "job_id": %s, "entry": 1}'::jsonb, true),
                    (true, true, true, 1, 'c5', 'c5''s', 5, 'USD', '{"reference": "claim:2", "job_id": %s, "entry": 2}', true)$$, :claim1, :claim2),
    'a claim has all that the provider needs, and the metadata of the job');
SELECT isnt(pg_temp.token('c1'), pg_temp.token('c5'), 'each has a token of its own');
SELECT is((SELECT status || ' ' || attempts FROM payout_transfers WHERE user_id = 'c1'), 'processing 1', 'it is processing');
SELECT ok(run_after BETWEEN now() + interval '59 minutes' AND clock_timestamp() + interval '1 hour', 'until its lease ends')
  FROM payout_transfers WHERE user_id = 'c1';
SELECT results_eq($$SELECT attempt, started_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), finished_at, outcome, http_status, provider_reference, error,
                           idempotency_key = 'payout:' || transfer_id FROM payout_attempts WHERE transfer_id = pg_temp.t('c1')$$,
    'VALUES (1, true, NULL::timestamptz, NULL::text, NULL::int, NULL::text, NULL::text, true)', 'payout_attempts has the attempt before the call');
SELECT is(pg_temp.claim('claim', 100), 'c3 1, c4 1, c6 1', 'what is claimed is not claimed again, nor what is not due');
SELECT is(pg_temp.claim('claim', 100), NULL, 'then there is nothing more');
SELECT is((SELECT count(*)::int FROM payout_attempts WHERE transfer_id IN (SELECT transfer_id FROM payout_transfers WHERE provider = 'claim')), 5,
    'an attempt each');
SELECT is(pg_temp.claim('place2', 100), NULL, 'another provider has others');
SELECT is(payout_balance('@transit:claim'), 15::bigint, 'a claim moves no money');
SELECT is(payout_balance('@transit:claim', 'EUR'), 6::bigint, 'in no currency');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'claims: the books balance');

-- ---------------------------------------------------------------------------
-- Sent, completed, failed
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('report', '{done,sent,transient,permanent,unknown,plain}') \g /dev/null
SELECT payout_create_job('report', ARRAY['done', 'sent', 'transient', 'permanent', 'unknown', 'plain'], ARRAY[1, 2, 4, 8, 16, 32],
                         platform_fee => 3, provider => 'report') AS report \gset
CALL payout_process();
SELECT throws_ok(format('SELECT payout_transfer_%s', call), '55000', NULL, 'before it is claimed: ' || call)
  FROM unnest(ARRAY['sent(pg_temp.t(''done''), gen_random_uuid(), ''r'')', 'completed(pg_temp.t(''done''), gen_random_uuid(), ''r'')',
                    'failed(pg_temp.t(''done''), gen_random_uuid(), ''permanent'')', 'failed(pg_temp.t(''done''), NULL, ''permanent'')']) AS call;
SELECT pg_temp.claim('report') \g /dev/null
SELECT pg_temp.refused(call, code, call)
  FROM (VALUES
    ('payout_transfer_sent(-1, gen_random_uuid(), ''r'')',                                      '42704'),
    ('payout_transfer_sent(NULL, gen_random_uuid(), ''r'')',                                    '42704'),
    ('payout_transfer_completed(-1, gen_random_uuid(), ''r'')',                                 '42704'),
    ('payout_transfer_failed(-1, gen_random_uuid(), ''permanent'')',                            '42704'),
    ('payout_retry_transfer(-1)',                                                               '42704'),
    ('payout_retry_transfer(NULL)',                                                             '42704'),
    ('payout_transfer_sent(pg_temp.t(''done''), gen_random_uuid(), ''r'')',                     '55000'),
    ('payout_transfer_sent(pg_temp.t(''done''), NULL, ''r'')',                                  '55000'),
    ('payout_transfer_sent(pg_temp.t(''done''), pg_temp.token(''sent''), ''r'')',               '55000'),
    ('payout_transfer_completed(pg_temp.t(''done''), gen_random_uuid(), ''r'')',                '55000'),
    ('payout_transfer_failed(pg_temp.t(''done''), gen_random_uuid(), ''permanent'')',           '55000'),
    ('pg_temp.sent(''done'', NULL)',                                                            '22023'),
    ('pg_temp.sent(''done'', '''')',                                                            '22023'),
    ('pg_temp.failed(''done'', ''fatal'')',                                                     '22023'),
    ('pg_temp.failed(''done'', ''Permanent'')',                                                 '22023'),
    ('pg_temp.failed(''done'', NULL)',                                                          '22023')
  ) AS t (call, code);
SELECT throws_like('SELECT payout_transfer_sent(-1, gen_random_uuid(), ''r'')', '%transfer -1 %', 'the transfer is named');

SELECT pg_temp.done('done', 'tr_1'), pg_temp.sent('sent', 'tr_2'), pg_temp.done('plain') \g /dev/null
SELECT is(pg_temp.failed(who, class, 'because'), status, who || ': ' || status)
  FROM (VALUES ('transient', 'transient', 'retryable'), ('permanent', 'permanent', 'failed_terminal'), ('unknown', 'unknown', 'unknown')) AS t (who, class, status);
SELECT results_eq(
    format($$SELECT user_id, status, attempts, provider_reference, error, confirmed_at IS NOT NULL FROM payout_transfers WHERE job_id = %s ORDER BY amount$$, :report),
    $$VALUES ('done' COLLATE "C", 'completed', 1, 'tr_1', NULL, true), ('sent', 'sent', 1, 'tr_2', NULL, false), ('transient', 'retryable', 1, NULL, 'because', false),
             ('permanent', 'failed_terminal', 1, NULL, 'because', false), ('unknown', 'unknown', 1, NULL, 'because', false), ('plain', 'completed', 1, NULL, NULL, true)$$,
    'each class of outcome has its state');
SELECT results_eq(
    format($$SELECT t.user_id, a.attempt, a.outcome, a.provider_reference, a.error, a.finished_at >= a.started_at
               FROM payout_attempts a JOIN payout_transfers t USING (transfer_id) WHERE t.job_id = %s ORDER BY t.amount$$, :report),
    $$VALUES ('done' COLLATE "C", 1, 'completed', 'tr_1', NULL, true), ('sent', 1, 'sent', 'tr_2', NULL, true), ('transient', 1, 'transient', NULL, 'because', true),
             ('permanent', 1, 'permanent', NULL, 'because', true), ('unknown', 1, 'unknown', NULL, 'because', true), ('plain', 1, 'completed', NULL, NULL, true)$$,
    'and so has the attempt');
SELECT results_eq(
    format($$SELECT l.account, l.amount, l.kind, l.entry, t.user_id, l.reference = format('ledger:payout:%%s:1', l.transfer_id)
               FROM payout_ledger l JOIN payout_transfers t USING (transfer_id) WHERE t.job_id = %s AND l.kind <> 'hold' ORDER BY t.amount, l.amount$$, :report),
    $$VALUES ('@transit:report' COLLATE "C", -1::bigint, 'transfer', 1, 'done' COLLATE "C", true), ('@outside', 1, 'transfer', 1, 'done', true),
             ('@transit:report', -8, 'release', 2, 'permanent', true), ('permanent', 8, 'release', 2, 'permanent', true),
             ('@transit:report', -32, 'transfer', 3, 'plain', true), ('@outside', 32, 'transfer', 3, 'plain', true)$$,
    'what is completed goes outside, what has failed goes back to the user, each with a reference of its own');
SELECT is(payout_balance('@transit:report'), 22::bigint, 'the rest is in transit');
SELECT results_eq($$SELECT u, payout_balance(u) FROM unnest(ARRAY['done', 'sent', 'transient', 'permanent', 'unknown', 'plain']) AS u$$,
    $$VALUES ('done', 0::bigint), ('sent', 0), ('transient', 0), ('permanent', 8), ('unknown', 0), ('plain', 0)$$, 'nobody else has anything');
SELECT is(pg_temp.job(:report), 'running: 2 completed, 1 failed, 3 pending, 33 paid', 'the job has counted them');
SELECT set_eq(format('SELECT user_id, status, attempts, error, processed_at IS NOT NULL FROM payout_entries WHERE job_id = %s', :report),
    $$VALUES ('done' COLLATE "C", 'completed', 1, NULL, true), ('sent', 'pending', 1, NULL, false), ('transient', 'retryable', 1, 'because', false),
             ('permanent', 'failed', 1, 'because', true), ('unknown', 'pending', 1, 'because', false), ('plain', 'completed', 1, NULL, true)$$,
    'payout_entries shows it');
SELECT results_eq(format('SELECT user_id, amount, status, attempts, error, processed_at IS NOT NULL, transfer_id = pg_temp.t(user_id) FROM payout_failed_entries WHERE job_id = %s', :report),
    $$VALUES ('permanent' COLLATE "C", 8::bigint, 'failed', 1, 'because', true, true)$$, 'payout_failed_entries has what has failed');
SELECT is((SELECT progress FROM payout_job_status(:report)), 0.5, 'half of them have come to an end');
SELECT ok(extract(epoch FROM run_after - updated_at) BETWEEN 0.499 AND 1.001, user_id || ': due again after the backoff')
  FROM payout_transfers WHERE user_id IN ('transient', 'unknown');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'reports: the books balance');

-- a report, once it was made, cannot be made again, nor another one
SELECT pg_temp.refused(format(call, quote_literal(who)), '55000', who || ': ' || call)
  FROM unnest(ARRAY['done', 'sent', 'transient', 'permanent', 'unknown']) AS who,
       unnest(ARRAY['pg_temp.sent(%s, ''late'')', 'pg_temp.done(%s, ''late'')', 'pg_temp.failed(%s, ''permanent'')']) AS call;
SELECT throws_like('SELECT pg_temp.done(''done'', ''late'')', '%late%', 'it is said to be late');

-- a reference belongs to one transfer of a provider
UPDATE payoutq.transfer SET run_after = now() WHERE user_id IN ('transient', 'unknown');
SELECT pg_temp.claim('report') \g /dev/null
SELECT pg_temp.refused(call, '23505', call)
  FROM unnest(ARRAY['pg_temp.sent(''transient'', ''tr_1'')', 'pg_temp.done(''transient'', ''tr_2'')']) AS call;
SELECT pg_temp.done('transient', 'tr_3'), pg_temp.done('unknown', 'tr_4') \g /dev/null
SELECT is(pg_temp.transfers(:report), 'done completed 1, permanent failed_terminal 1, plain completed 1, sent sent 1, transient completed 2, unknown completed 2',
    'what was retried can be completed');
SELECT is((SELECT string_agg(a.outcome || ' ' || a.idempotency_key, ', ' ORDER BY attempt) FROM payout_attempts a WHERE transfer_id = pg_temp.t('unknown')),
    format('unknown payout:%1$s, completed payout:%1$s', pg_temp.t('unknown')), 'under the same key');
SELECT is((SELECT reference FROM payout_ledger WHERE kind = 'transfer' AND account = '@outside' AND transfer_id = pg_temp.t('unknown')),
    format('ledger:payout:%s:2', pg_temp.t('unknown')), 'a ledger line names the attempt');

-- the last one, which fails: the job is completed all the same
SELECT is(payout_confirm_transfer('report', 'tr_2', false, 'no such account'), 'confirmation_failed', 'the last transfer of the job fails');
CALL payout_process();
SELECT is(pg_temp.job(:report), 'completed: 4 completed, 2 failed, 0 pending, 53 paid', 'and completes the job');
SELECT results_eq(format('SELECT progress, processed_winners, completed_at IS NOT NULL, error FROM payout_job_status(%s)', :report),
    'VALUES (1.0000, 6::bigint, true, NULL::text)', 'all of it');
SELECT is(payout_balance('@platform'), 3::bigint, 'the platform has its fee');
SELECT is(payout_balance('@transit:report'), 0::bigint, 'and nothing is in transit');
SELECT is((SELECT sum(amount)::bigint FROM payout_ledger WHERE account = '@outside' AND kind = 'transfer' AND job_id = :report), 53::bigint, 'what is paid has gone outside');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'a completed job: the books balance');

-- ---------------------------------------------------------------------------
-- The limit of attempts
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('limit', '{tired,doubtful,refused,lost}') \g /dev/null
SELECT payout_create_job('limit', ARRAY['tired', 'doubtful', 'refused', 'lost'], ARRAY[1, 2, 4, 8], provider => 'limit') AS limit \gset
CALL payout_process();
SELECT pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('tired', 'transient'), 'retryable', 'attempt 1 of 5');
SELECT is(pg_temp.failed('doubtful', 'unknown'), 'unknown', 'attempt 1, with no answer');
SELECT is(pg_temp.failed('refused', 'unknown', 'no answer'), 'unknown', 'attempt 1, with no answer');
SELECT is(pg_temp.failed('lost', 'transient'), 'retryable', 'attempt 1 of 5');
SELECT pg_temp.retry('tired'), pg_temp.retry('doubtful'), pg_temp.retry('refused'), pg_temp.retry('lost'), pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('refused', 'permanent', 'account closed'), 'failed_terminal', 'a definite rejection under the same key ends what was unknown');
SELECT is(payout_balance('refused'), 4::bigint, 'and gives the money back');
SELECT is(pg_temp.failed('tired', 'transient'), 'retryable', 'attempt 2 of 5');
SELECT is(pg_temp.failed('doubtful', 'transient'), 'unknown', 'attempt 2: still unknown');
SELECT is(pg_temp.failed('lost', 'transient'), 'retryable', 'attempt 2 of 5');
SELECT ok(extract(epoch FROM run_after - updated_at) BETWEEN 0.999 AND 2.001, 'the backoff doubles') FROM payout_transfers WHERE user_id = 'tired';
SELECT pg_temp.retry('tired'), pg_temp.retry('doubtful'), pg_temp.retry('lost'), pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('tired', 'transient'), 'retryable', 'attempt 3 of 5');
SELECT is(pg_temp.failed('doubtful', 'transient'), 'unknown', 'attempt 3: still unknown');
SELECT is(pg_temp.failed('lost', 'transient'), 'retryable', 'attempt 3 of 5');
SELECT pg_temp.retry('tired'), pg_temp.retry('doubtful'), pg_temp.retry('lost'), pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('tired', 'transient'), 'retryable', 'attempt 4 of 5');
SELECT is(pg_temp.failed('doubtful', 'transient'), 'unknown', 'attempt 4: still unknown');
SELECT is(pg_temp.failed('lost', 'transient'), 'retryable', 'attempt 4 of 5');
SELECT pg_temp.retry('tired'), pg_temp.retry('doubtful'), pg_temp.retry('lost'), pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('tired', 'transient', 'busy'), 'failed_terminal', 'attempt 5 of 5: failed');
SELECT is(pg_temp.failed('doubtful', 'transient'), 'unknown', 'attempt 5: what may have been paid is not given back');
SELECT is(pg_temp.failed('lost', 'unknown'), 'unknown', 'attempt 5 of 5, with no answer: unknown');
SELECT is(payout_balance('tired'), 1::bigint, 'at the limit the money goes back');
SELECT is((SELECT status || ': ' || error FROM payout_transfers WHERE user_id = 'tired'), 'failed_terminal: busy', 'the last reason is kept');
SELECT pg_temp.retry('doubtful'), pg_temp.retry('lost'), pg_temp.claim('limit') \g /dev/null
SELECT is(pg_temp.failed('doubtful', 'transient'), 'unknown', 'attempt 6: for ever');
SELECT is(pg_temp.failed('lost', 'transient'), 'unknown', 'attempt 6: for ever');
SELECT is(payout_balance('@transit:limit'), 10::bigint, 'their money is held');
SELECT is_empty($$SELECT FROM payout_attempts WHERE transfer_id = pg_temp.t('doubtful') AND idempotency_key <> 'payout:' || transfer_id$$, 'all of that under one key');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'attempts: the books balance');

-- after the time for which the provider knows the key nothing is sent under it
CREATE SERVER forgetful FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external', key_life '0');
SELECT payout_set_destination('old key', 'forgetful', 'x') \g /dev/null
SELECT payout_create_job('forgetful', ARRAY['old key'], ARRAY[1], provider => 'forgetful') AS forgetful \gset
CALL payout_process();
SELECT pg_temp.claim('forgetful') \g /dev/null
SELECT is(pg_temp.failed('old key', 'unknown'), 'unknown', 'the key is forgotten');
SELECT isnt((SELECT run_after FROM payout_transfers WHERE user_id = 'old key'), NULL, 'it is due');
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id = 'old key';
SELECT is(pg_temp.claim('forgetful'), NULL, 'but is not claimed any more');
SELECT pg_temp.refused('pg_temp.retry(''old key'')', '55000', 'a retry under a forgotten key');

-- ---------------------------------------------------------------------------
-- The lease ends
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('lease', '{slow,dead}') \g /dev/null
SELECT payout_create_job('lease', ARRAY['slow', 'dead'], ARRAY[1, 2], provider => 'lease') AS lease \gset
CALL payout_process();
SELECT is(pg_temp.claim('lease', 2, '1 microsecond'), 'dead 1, slow 1', 'a lease that is over at once');
SELECT is(pg_temp.claim('lease', 1), 'dead 2', 'lets another claim it');
SELECT results_eq($$SELECT attempt, outcome, finished_at IS NOT NULL, error, idempotency_key = 'payout:' || transfer_id
                      FROM payout_attempts WHERE transfer_id = pg_temp.t('dead') ORDER BY attempt$$,
    $$VALUES (1, 'unknown', true, 'the lease ended without a report', true), (2, NULL, false, NULL, true)$$,
    'nobody knows how the first attempt ended; the second has the same key');
SELECT isnt(pg_temp.token('dead', 1), pg_temp.token('dead', 2), 'and another token');
SELECT pg_temp.refused(call, '55000', 'after another claim, ' || call)
  FROM unnest(ARRAY['pg_temp.sent(''dead'', ''r1'', 1)', 'pg_temp.done(''dead'', ''r1'', 1)', 'pg_temp.failed(''dead'', ''permanent'', NULL, 1)',
                    'pg_temp.failed(''dead'', ''unknown'', NULL, 1)']) AS call;
SELECT lives_ok('SELECT pg_temp.done(''slow'', ''r2'', 1)', 'as long as nobody has, a late report counts');
SELECT is(pg_temp.failed('dead', 'transient'), 'unknown', 'the first may have paid, so the money is not free');
SELECT pg_temp.retry('dead'), pg_temp.claim('lease') \g /dev/null
SELECT pg_temp.refused(format('pg_temp.done(''dead'', ''r3'', %s)', attempt), '55000', 'the token of attempt ' || attempt) FROM generate_series(1, 2) AS attempt;
SELECT pg_temp.sent('dead', 'r3') \g /dev/null
SELECT pg_temp.refused(format('pg_temp.done(''dead'', ''r3'', %s)', attempt), '55000', 'sent, the token of attempt ' || attempt) FROM generate_series(1, 3) AS attempt;
SELECT is(payout_confirm_transfer('lease', 'r3', true), 'completed', 'it is confirmed in the end');
SELECT is(pg_temp.claim('lease'), NULL, 'what is over is not claimed again');
CALL payout_process();
SELECT is(pg_temp.job(:lease), 'completed: 2 completed, 0 failed, 0 pending, 3 paid', 'the job too');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'leases: the books balance');

-- ---------------------------------------------------------------------------
-- Confirm
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('confirm', '{yes,no,early}'), pg_temp.provider('confirm2') \g /dev/null
SELECT payout_create_job('confirm', ARRAY['yes', 'no', 'early'], ARRAY[1, 2, 4], provider => 'confirm') AS confirm \gset
CALL payout_process();
SELECT pg_temp.claim('confirm'), pg_temp.sent('yes', 'h_yes'), pg_temp.sent('no', 'h_no') \g /dev/null
SELECT is(pg_temp.claim('confirm'), NULL, 'what is sent is not claimed');
SELECT pg_temp.refused(call, code, call)
  FROM (VALUES
    ('payout_confirm_transfer(''confirm'', ''h_early'', true)',     '42704'),
    ('payout_confirm_transfer(''confirm'', ''h_early'', false)',    '42704'),
    ('payout_confirm_transfer(''confirm'', NULL, true)',            '42704'),
    ('payout_confirm_transfer(''confirm2'', ''h_yes'', true)',      '42704'),
    ('payout_confirm_transfer(''confirm'', ''h_yes'', NULL)',       '22023')
  ) AS t (call, code);
SELECT throws_like('SELECT payout_confirm_transfer(''confirm'', ''h_early'', true)', '%"h_early"%', 'the reference is named');
SELECT is(payout_confirm_transfer('confirm', 'h_yes', true), 'completed', 'confirmed');
SELECT is(payout_confirm_transfer('confirm', 'h_no', false, 'rejected by the bank'), 'confirmation_failed', 'rejected');
SELECT results_eq(format('SELECT user_id, status, error, provider_reference, confirmed_at IS NOT NULL FROM payout_transfers WHERE job_id = %s ORDER BY amount', :confirm),
    $$VALUES ('yes' COLLATE "C", 'completed', NULL, 'h_yes', true), ('no', 'confirmation_failed', 'rejected by the bank', 'h_no', false), ('early', 'processing', NULL, NULL, false)$$,
    'payout_transfers has it');
SELECT is(payout_balance('no'), 2::bigint, 'a rejection gives the money back');
SELECT is(payout_balance('yes'), 0::bigint, 'a confirmation does not');
SELECT is(payout_balance('@transit:confirm'), 4::bigint, 'and neither is in transit any more');
SELECT results_eq(format($$SELECT account, amount, kind FROM payout_ledger WHERE transfer_id IN (pg_temp.t('yes'), pg_temp.t('no')) AND kind <> 'hold' ORDER BY kind, amount$$),
    $$VALUES ('@transit:confirm' COLLATE "C", -2::bigint, 'release'), ('no', 2, 'release'), ('@transit:confirm', -1, 'transfer'), ('@outside', 1, 'transfer')$$,
    'payout_ledger too');
SELECT is(pg_temp.job(:confirm), 'running: 1 completed, 1 failed, 1 pending, 1 paid', 'and the job');
CREATE TEMP TABLE before AS SELECT pg_temp.everything() AS everything;
SELECT is(payout_confirm_transfer('confirm', 'h_yes', true), 'completed', 'said twice: confirmed');
SELECT is(payout_confirm_transfer('confirm', 'h_no', false, 'again'), 'confirmation_failed', 'said twice: rejected');
SELECT is(pg_temp.everything(), everything, 'which changes nothing') FROM before;
SELECT pg_temp.refused(call, '55000', call)
  FROM unnest(ARRAY['payout_confirm_transfer(''confirm'', ''h_yes'', false)', 'payout_confirm_transfer(''confirm'', ''h_no'', true)']) AS call;
SELECT pg_temp.done('early', 'h_early') \g /dev/null
SELECT is(payout_confirm_transfer('confirm', 'h_early', true), 'completed', 'what was completed at once may be confirmed as well');
SELECT is((SELECT error FROM payout_transfers WHERE user_id = 'sent'), 'no such account', 'a reason is kept');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'confirmations: the books balance');

-- ---------------------------------------------------------------------------
-- Retry
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('retry', '{again,poor,moved,closed,wait,ask,busy,over,away}') \g /dev/null
SELECT payout_create_job('retry', ARRAY['again', 'poor', 'moved', 'closed', 'wait', 'ask', 'busy', 'over', 'away', 'never'],
                         ARRAY[1, 2, 4, 8, 16, 32, 64, 128, 256, 512], provider => 'retry') AS retry \gset
CALL payout_process();
SELECT pg_temp.refused('pg_temp.retry(''again'')', '55000', 'a retry of a pending one');
SELECT pg_temp.claim('retry'), pg_temp.failed('again', 'permanent', 'no'), pg_temp.failed('poor', 'permanent'), pg_temp.sent('moved', 'm1'),
       pg_temp.failed('closed', 'permanent'), pg_temp.failed('wait', 'transient'), pg_temp.failed('ask', 'unknown'), pg_temp.done('over'), pg_temp.sent('away', 'a1') \g /dev/null
SELECT payout_confirm_transfer('retry', 'm1', false), payout_withdraw('poor', 1, 'w1'), payout_set_destination('closed', 'retry', NULL),
       payout_set_destination('moved', 'retry', 'new place') \g /dev/null
SELECT pg_temp.refused(format('pg_temp.retry(%L)', who), code, what)
  FROM (VALUES
    ('poor',   '23514', 'a retry when the user has spent the money'),
    ('closed', '55000', 'a retry for a user without an account at the provider'),
    ('never',  '55000', 'a retry for a user who never had one'),
    ('busy',   '55000', 'a retry of a processing one'),
    ('over',   '55000', 'a retry of a completed one'),
    ('away',   '55000', 'a retry of a sent one')
  ) AS t (who, code, what);
SELECT throws_like('SELECT pg_temp.retry(''over'')', format('%%transfer %s %%', pg_temp.t('over')), 'the transfer is named');

SELECT is(pg_temp.retry(who), status, who || ' is retried')
  FROM (VALUES ('again', 'pending'), ('moved', 'pending'), ('wait', 'retryable'), ('ask', 'unknown')) AS t (who, status);
SELECT results_eq(
    $$SELECT user_id, status, attempts, destination, provider_reference, error, generation, replace(idempotency_key, transfer_id::text, 'N'), run_after <= clock_timestamp()
        FROM payout_transfers WHERE user_id IN ('again', 'moved', 'wait', 'ask') ORDER BY amount$$,
    $$VALUES ('again' COLLATE "C", 'pending', 1, 'again''s', NULL, NULL, 2, 'payout:N:g2', true), ('moved', 'pending', 1, 'new place', NULL, NULL, 2, 'payout:N:g2', true),
             ('wait', 'retryable', 1, 'wait''s', NULL, NULL, 1, 'payout:N', true), ('ask', 'unknown', 1, 'ask''s', NULL, NULL, 1, 'payout:N', true)$$,
    'after a definite rejection it has a new key and the present destination, otherwise it is due now and has the old key');
SELECT is(payout_balance(who), 0::bigint, who || ': the money is held again') FROM unnest(ARRAY['again', 'moved']) AS who;
SELECT results_eq($$SELECT account, amount, kind FROM payout_ledger WHERE transfer_id = pg_temp.t('again') ORDER BY posted_at, amount$$,
    $$VALUES ('again' COLLATE "C", -1::bigint, 'hold'), ('@transit:retry', 1, 'hold'), ('@transit:retry', -1, 'release'), ('again', 1, 'release'),
             ('again', -1, 'hold'), ('@transit:retry', 1, 'hold')$$, 'payout_ledger: hold, release, hold');
SELECT is(pg_temp.job(:retry), 'running: 1 completed, 3 failed, 6 pending, 128 paid', 'the job waits for them again');
SELECT pg_temp.refused('pg_temp.done(''again'', ''late'', 1)', '55000', 'a report of the first generation');
SELECT throws_ok('SELECT payout_confirm_transfer(''retry'', ''m1'', true)', '42704', NULL, 'its reference is not known any more');
SELECT is(pg_temp.claim('retry'), 'again 2, ask 2, moved 2, wait 2', 'they are claimed again');
SELECT is((SELECT string_agg(replace(idempotency_key, transfer_id::text, 'N') || ' ' || attempt, ', ' ORDER BY n) FROM app.claim WHERE user_id = 'again'),
    'payout:N 1, payout:N:g2 2', 'under the new key, and attempts go on');
SELECT is((SELECT destination FROM app.claim WHERE user_id = 'moved' ORDER BY n DESC LIMIT 1), 'new place', 'at the new destination');
-- attempts are counted from the new generation, and what is known of the old one does not matter
SELECT is(pg_temp.failed('again', 'transient'), 'retryable', 'a new generation has attempts of its own');
UPDATE payoutq.transfer SET attempts = 4 WHERE user_id = 'again';
INSERT INTO payoutq.attempt SELECT transfer_id, a, 2, gen_random_uuid(), now(), now(), 'transient' FROM payoutq.attempt, generate_series(3, 4) AS a
 WHERE transfer_id = pg_temp.t('again') AND attempt = 2;
SELECT pg_temp.retry('again'), pg_temp.claim('retry') \g /dev/null
SELECT is(pg_temp.failed('again', 'transient'), 'retryable', '(attempt 5, the fourth of the generation)');
SELECT pg_temp.retry('again'), pg_temp.claim('retry') \g /dev/null
SELECT is((SELECT max(attempt) FROM app.claim WHERE user_id = 'again'), 6, '(attempt 6, the fifth of the generation)');
SELECT is(pg_temp.failed('again', 'transient'), 'failed_terminal', 'five of them');
SELECT is(pg_temp.retry('again'), 'pending', 'and may be retried again');
SELECT is((SELECT replace(idempotency_key, transfer_id::text, 'N') FROM payout_transfers WHERE user_id = 'again'), 'payout:N:g3', 'as the third generation');
SELECT pg_temp.claim('retry'), pg_temp.done('again', 'm1') \g /dev/null
SELECT is(pg_temp.status('again'), 'completed', 'a reference of a generation that was rejected may be used again');
-- whoever had no destination has made no attempt, and so needs no new key
SELECT payout_set_destination('never', 'retry', 'at last'), pg_temp.retry('never') \g /dev/null
SELECT results_eq($$SELECT status, attempts, destination, idempotency_key = 'payout:' || transfer_id, generation FROM payout_transfers WHERE user_id = 'never'$$,
    $$VALUES ('pending', 0, 'at last', true, 1)$$, 'without an attempt the first key is still good');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'retries: the books balance');

-- payout_retry_job()
SELECT payout_withdraw('closed', 8, 'w2') \g /dev/null
SELECT is(payout_retry_job(:retry), 0::bigint, 'retry of the job: who has no account, or has spent the money, is left alone');
SELECT payout_set_destination('closed', 'retry', 'back'), payout_deposit('closed', 8, 'd2') \g /dev/null
SELECT is(payout_retry_job(:retry), 1::bigint, 'the one who has both is retried');
SELECT is((SELECT status || ' ' || destination || ' ' || generation FROM payout_transfers WHERE user_id = 'closed'), 'pending back 2', 'as by payout_retry_transfer()');
SELECT payout_deposit('poor', 1, 'd3') \g /dev/null
SELECT is(payout_retry_job(:retry), 1::bigint, 'nobody is retried twice');
SELECT pg_temp.claim('retry') \g /dev/null
SELECT count(pg_temp.done(user_id)) FROM payout_transfers WHERE job_id = :retry AND status = 'processing' AND user_id <> 'poor' \g /dev/null
SELECT pg_temp.failed('poor', 'permanent'), payout_confirm_transfer('retry', 'a1', true) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.job(:retry), 'completed: 9 completed, 1 failed, 0 pending, 1021 paid', 'the job is completed');
SELECT is(payout_retry_job(:retry), 1::bigint, 'a completed job can be retried');
SELECT is(pg_temp.job(:retry), 'running: 9 completed, 0 failed, 1 pending, 1021 paid', 'and runs again');
SELECT results_eq(format('SELECT progress < 1, completed_at FROM payout_job_status(%s)', :retry), 'VALUES (true, NULL::timestamptz)', 'it is not completed any more');
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:retry)), 'running', 'as long as the transfer is under way');
SELECT pg_temp.claim('retry'), pg_temp.done('poor') \g /dev/null
CALL payout_process();
SELECT is(pg_temp.job(:retry), 'completed: 10 completed, 0 failed, 0 pending, 1023 paid', 'then it is completed again');
SELECT is_empty(format('SELECT FROM payout_failed_entries WHERE job_id = %s', :retry), 'nothing of it has failed');
SELECT is(payout_retry_job(:retry), 0::bigint, 'and nothing is left to retry');
-- a completed job goes on by a single transfer, too
SELECT is(pg_temp.retry('no'), 'pending', 'retry of one transfer of a job');
SELECT is((SELECT status FROM payout_job_status(:confirm)), 'running', 'which was about to be completed');
SELECT pg_temp.claim('confirm'), pg_temp.done('no') \g /dev/null
CALL payout_process();
SELECT is(pg_temp.job(:confirm), 'completed: 3 completed, 0 failed, 0 pending, 7 paid', 'and is completed');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'retried jobs: the books balance');

-- ---------------------------------------------------------------------------
-- Cancel
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('cancel', '{k1,k2,k3,k4,k5,k6,k7}') \g /dev/null
SELECT payout_deposit('sponsor', 1000, 'd4') \g /dev/null
SELECT payout_create_job('cancel', ARRAY['k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', 'k8'], ARRAY[1, 2, 4, 8, 16, 32, 64, 128], platform_fee => 3, batch_size => 6,
                         source_account => 'sponsor', provider => 'cancel') AS cancel \gset
CALL payout_process(1, :cancel);
SELECT is(payout_balance('sponsor'), 742::bigint, 'a user funds a job');
SELECT pg_temp.claim('cancel', 5), pg_temp.done('k1'), pg_temp.sent('k2', 's2'), pg_temp.failed('k3', 'unknown'), pg_temp.failed('k4', 'transient') \g /dev/null
SELECT is(pg_temp.transfers(:cancel), 'k1 completed 1, k2 sent 1, k3 unknown 1, k4 retryable 1, k5 processing 1, k6 pending 0', 'a job in the middle');
SELECT payout_cancel_job(:cancel, 'called off') \g /dev/null
SELECT is(pg_temp.transfers(:cancel), 'k1 completed 1, k2 sent 1, k3 unknown 1, k4 failed_terminal 1, k5 processing 1, k6 failed_terminal 0',
    'cancelled: what was certainly not sent ends');
SELECT results_eq($$SELECT DISTINCT error FROM payout_transfers WHERE user_id IN ('k4', 'k6')$$, ARRAY['the job was cancelled'], 'and says why');
SELECT is(payout_balance('sponsor'), 742 + 8 + 32 + 64 + 128 + 3::bigint, 'its money goes back to the account that has funded the job, with that of the rest');
SELECT is(payout_balance('@transit:cancel'), 22::bigint, 'what may have been sent is held');
SELECT is_empty($$SELECT * FROM unnest(ARRAY['k1', 'k2', 'k3', 'k4', 'k5', 'k6', 'k7', 'k8']) AS u WHERE payout_balance(u) <> 0$$, 'no winner has anything of it');
SELECT results_eq($$SELECT account, amount, kind, reference = format('ledger:payout:%s:cancelled', transfer_id) FROM payout_ledger WHERE transfer_id = pg_temp.t('k6') AND kind <> 'hold' ORDER BY amount$$,
    $$VALUES ('@transit:cancel' COLLATE "C", -32::bigint, 'release', true), ('sponsor', 32, 'release', true)$$, 'payout_ledger has it');
SELECT set_eq(format('SELECT user_id, status FROM payout_entries WHERE job_id = %s', :cancel),
    $$VALUES ('k1' COLLATE "C", 'completed'), ('k2', 'pending'), ('k3', 'pending'), ('k4', 'cancelled'), ('k5', 'pending'), ('k6', 'cancelled'), ('k7', 'cancelled'), ('k8', 'cancelled')$$,
    'payout_entries too');
SELECT is_empty(format('SELECT FROM payout_failed_entries WHERE job_id = %s', :cancel), 'cancelled is not failed');
SELECT pg_temp.refused('pg_temp.retry(''k6'')', '55000', 'a retry in a cancelled job');
SELECT pg_temp.refused(format('payout_retry_job(%s)', :cancel), '55000', 'a retry of a cancelled job');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'cancelled: the books balance');
-- the others come to their ends
SELECT lives_ok('SELECT pg_temp.done(''k5'')', 'what was under way can still be completed');
SELECT is(payout_confirm_transfer('cancel', 's2', true), 'completed', 'and confirmed');
SELECT is(pg_temp.retry('k3'), 'unknown', 'and asked for again');
SELECT is(pg_temp.claim('cancel'), 'k3 2', 'but nothing else is sent');
SELECT pg_temp.done('k3') \g /dev/null
SELECT is(payout_balance('@transit:cancel'), 0::bigint, 'then nothing is in transit');
SELECT is((SELECT status || ' ' || amount_paid FROM payout_job_status(:cancel)), 'cancelled 23', 'the job stays cancelled, and says what was paid');
-- of a lapsed lease it is asked for, as of what is unknown
SELECT payout_set_destination('k9', 'cancel', 'k9''s'), payout_create_job('cancel2', ARRAY['k9'], ARRAY[256], provider => 'cancel') AS cancel2 \gset
CALL payout_process(1, :cancel2);
SELECT pg_temp.claim('cancel'), payout_cancel_job(:cancel2, 'called off') \g /dev/null
SELECT is(pg_temp.claim('cancel'), NULL, 'a lease goes on after the job was cancelled');
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id = 'k9';
SELECT is(pg_temp.claim('cancel'), 'k9 2', 'when it has lapsed, the same key is used again');
SELECT is(pg_temp.failed('k9', 'permanent'), 'failed_terminal', 'and says what was done');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'at the end of a cancelled job the books balance');

-- ---------------------------------------------------------------------------
-- Stuck
-- ---------------------------------------------------------------------------

SELECT pg_temp.provider('stuck', '{s-pending,s-processing,s-retryable,s-unknown,s-sent,s-completed,s-failed,s-rejected,s-fresh}') \g /dev/null
SELECT payout_create_job('stuck', ARRAY['s-processing', 's-retryable', 's-unknown', 's-sent', 's-completed', 's-failed', 's-rejected', 's-fresh'],
                         ARRAY[1, 2, 4, 8, 16, 32, 64, 128], provider => 'stuck') AS stuck \gset
CALL payout_process();
SELECT pg_temp.claim('stuck'), pg_temp.failed('s-retryable', 'transient', 'busy'), pg_temp.failed('s-unknown', 'unknown'), pg_temp.sent('s-sent', 'hash'),
       pg_temp.done('s-completed'), pg_temp.failed('s-failed', 'permanent'), pg_temp.sent('s-rejected', 'hash2'), pg_temp.sent('s-fresh', 'hash3') \g /dev/null
SELECT payout_confirm_transfer('stuck', 'hash2', false), payout_create_job('stuck:2', ARRAY['s-pending'], ARRAY[256], provider => 'stuck') \g /dev/null
CALL payout_process();
UPDATE payoutq.transfer SET updated_at = now() - interval '5 minutes 1 second' * amount - interval '5 minutes' WHERE provider = 'stuck' AND user_id <> 's-fresh';
UPDATE payoutq.transfer SET updated_at = now() - interval '4 minutes' WHERE user_id = 's-fresh';
CREATE FUNCTION pg_temp.stuck(older_than interval DEFAULT NULL) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(user_id || ' ' || status, ', ' ORDER BY age DESC) FROM payout_stuck_transfers(older_than) WHERE provider = 'stuck'
$$;
SELECT is(pg_temp.stuck(), 's-sent sent, s-unknown unknown, s-retryable retryable, s-processing processing',
    'stuck: begun, not ended, and not moved for payoutq.confirm_timeout');
SELECT is(pg_temp.stuck('3 minutes'), 's-pending pending, s-sent sent, s-unknown unknown, s-retryable retryable, s-processing processing, s-fresh sent',
    'with a time, also those that were not begun');
SELECT is(pg_temp.stuck('20 minutes'), 's-pending pending, s-sent sent, s-unknown unknown', 'and only those that are older');
SELECT results_eq($$SELECT transfer_id = pg_temp.t(user_id), job_id, user_id, provider, amount, currency, status, attempts, provider_reference,
                           age BETWEEN interval '45 minutes 8 seconds' AND interval '46 minutes', error FROM payout_stuck_transfers() WHERE user_id = 's-sent'$$,
    format($$VALUES (true, %s::bigint, 's-sent', 'stuck', 8::bigint, 'USD', 'sent', 1, 'hash', true, NULL::text)$$, :stuck), 'payout_stuck_transfers has all of it');
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'stuck_transfers'$$, 'VALUES (false, 4::numeric)', 'payout_health counts them');
SELECT is(payout_confirm_transfer('stuck', 'hash', true), 'completed', 'one is recovered');
SELECT pg_temp.done('s-processing'), pg_temp.retry('s-unknown'), pg_temp.retry('s-retryable'), pg_temp.claim('stuck') \g /dev/null
SELECT is(pg_temp.stuck(), NULL, 'what moves is not stuck');
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'stuck_transfers'$$, 'VALUES (true, 0::numeric)', 'and payout_health is content');

-- ---------------------------------------------------------------------------
-- States move along the picture, whoever changes them
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.moves() RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    states text[] := '{pending,processing,sent,completed,retryable,unknown,failed_terminal,confirmation_failed}';
    was text;
    becomes text;
BEGIN
    FOR was, becomes IN SELECT * FROM unnest(states) a, unnest(states) b WHERE a <> b LOOP
        BEGIN
            -- whatever it was before
            PERFORM set_config('session_replication_role', 'replica', true);
            UPDATE payoutq.transfer SET status = was WHERE user_id = 's-fresh';
            PERFORM set_config('session_replication_role', 'origin', true);
            UPDATE payoutq.transfer SET status = becomes WHERE user_id = 's-fresh' AND status = was;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'nothing was changed';
            END IF;
            RAISE SQLSTATE 'UNDO0';
        EXCEPTION
            WHEN SQLSTATE 'UNDO0' THEN RETURN NEXT was || ' ' || becomes;
            WHEN object_not_in_prerequisite_state THEN NULL;
        END;
    END LOOP;
END $$;
BEGIN;
SELECT set_eq('SELECT pg_temp.moves()',
    $$VALUES ('pending processing'),
             ('processing sent'), ('processing completed'), ('processing retryable'), ('processing unknown'), ('processing failed_terminal'),
             ('sent completed'), ('sent confirmation_failed'),
             ('retryable processing'), ('unknown processing'),
             -- the job was cancelled
             ('pending failed_terminal'), ('retryable failed_terminal'),
             -- a copy of the database finds what the original has sent
             ('pending sent'), ('retryable sent'),
             -- the provider had no money: a new generation
             ('processing pending'),
             -- found at the provider, or certainly not there
             ('unknown sent'), ('unknown completed'), ('unknown failed_terminal'), ('unknown pending'),
             -- a new generation
             ('failed_terminal pending'), ('confirmation_failed pending')$$, 'of all pairs of states these are allowed');
ROLLBACK;
SELECT throws_like('UPDATE payoutq.transfer SET status = ''pending'' WHERE user_id = ''s-completed''', '%"completed"%"pending"%', 'a refusal names the states');
SELECT throws_ok(command, '55000', NULL, command)
  FROM unnest(ARRAY['DELETE FROM payoutq.transfer', 'TRUNCATE payoutq.transfer', 'DELETE FROM payoutq.attempt', 'TRUNCATE payoutq.attempt']) AS command;
SELECT throws_ok('UPDATE payoutq.transfer SET status = ''lost'' WHERE user_id = ''s-fresh''', NULL, NULL, 'there are no other states');

-- ---------------------------------------------------------------------------
-- Callbacks
-- ---------------------------------------------------------------------------

CREATE ROLE payoutq_test_minter;
GRANT USAGE ON SCHEMA app TO payoutq_test_minter;
GRANT USAGE, CREATE ON SCHEMA app TO payoutq_test_payer;
CREATE TABLE app.minted (transfer_id bigint, who name, xid bigint, status text, path text);
CREATE TABLE app.broken (how text);
GRANT SELECT, INSERT ON app.minted, app.broken TO payoutq_test_minter;
SELECT payout_grant('payoutq_test_minter', 'reader') \g /dev/null
-- names without a schema, found by the search_path of whoever registers it
CREATE FUNCTION app.mint(transfer_id bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    what text;
BEGIN
    INSERT INTO minted VALUES (transfer_id, current_user, txid_current(),
                               (SELECT t.status FROM public.payout_transfers t WHERE t.transfer_id = mint.transfer_id), current_setting('search_path'));
    FOR what IN SELECT how FROM broken LOOP
        EXECUTE what;
    END LOOP;
END $$;
ALTER FUNCTION app.mint OWNER TO payoutq_test_minter;
CREATE FUNCTION app.mint(text) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION app.mint(integer) RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION app.mint2(bigint, text DEFAULT '') RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION app.minting() RETURNS void LANGUAGE sql AS '';
CREATE PROCEDURE app.minter(bigint) LANGUAGE sql AS '';
CREATE AGGREGATE app.mints(bigint) (SFUNC = int8pl, STYPE = bigint);
CREATE FUNCTION pg_temp.mint(bigint) RETURNS void LANGUAGE sql AS '';
SELECT pg_temp.provider('mint', '{m1,m2,m3,m4,m5,m6,m7,m8}'), pg_temp.provider('mint2', '{n1,n2}') \g /dev/null
SELECT throws_ok(format('SELECT payout_on_confirm(''mint'', %L)', callback), '22023', NULL, 'callback: ' || what)
  FROM (VALUES
    ('app.mint(text)',              'another type'),
    ('app.mint(integer)',           'integer'),
    ('app.mint2(bigint,text)',      'two arguments'),
    ('app.minting()',               'no argument'),
    ('app.minter(bigint)',          'a procedure'),
    ('app.mints(bigint)',           'an aggregate'),
    ('pg_temp.mint(bigint)',        'a temporary function')
  ) AS t (callback, what);
SELECT is_empty('SELECT FROM payoutq.confirm_callback', 'none of them is kept');
GRANT USAGE ON FOREIGN SERVER mint TO payoutq_test_payer;
SELECT payout_grant('payoutq_test_payer', 'admin') \g /dev/null
SET ROLE payoutq_test_payer;
CREATE FUNCTION app.mine(bigint) RETURNS void LANGUAGE sql AS '';
SELECT throws_ok('SELECT payout_on_confirm(''mint'', ''app.mint(bigint)'')', '42501', 'must be owner of function app.mint(bigint)', 'callback: somebody else''s');
SELECT throws_ok('SELECT payout_on_confirm(''mint2'', ''app.mine(bigint)'')', '42501', 'permission denied for provider "mint2"', 'callback: a provider that one may not use');
SELECT lives_ok('SELECT payout_on_confirm(''mint'', ''app.mine(bigint)'')', 'callback: one''s own');
RESET ROLE;
SET search_path = app, public, pg_temp;
SELECT payout_on_confirm('mint', 'mint(bigint)') \g /dev/null
RESET search_path;
SELECT is((SELECT callback FROM payoutq.confirm_callback WHERE provider = 'mint'), 'app.mint(bigint)', 'a provider has one callback: the last');

SELECT payout_create_job('mint', ARRAY['m1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8'], ARRAY[1, 2, 4, 8, 16, 32, 64, 128], provider => 'mint') AS mint,
       payout_create_job('mint2', ARRAY['n1', 'n2'], ARRAY[1, 2], provider => 'mint2') AS mint2 \gset
CALL payout_process();
SELECT pg_temp.claim('mint'), pg_temp.claim('mint2'), pg_temp.sent('m1', 'x1'), pg_temp.sent('m2', 'x2'), pg_temp.sent('m3', 'x3'), pg_temp.sent('m4', 'x4'), pg_temp.done('n1') \g /dev/null
SELECT is_empty('SELECT FROM app.minted', 'what is only sent, and what another provider has completed, calls nothing');
BEGIN;
SELECT payout_confirm_transfer('mint', 'x1', true) \g /dev/null
SELECT is((SELECT xid FROM app.minted), txid_current(), 'the callback is called in the transaction that completes');
ROLLBACK;
SELECT is_empty('SELECT FROM app.minted', 'and is undone with it');
SELECT is(pg_temp.status('m1'), 'sent', 'as the transfer is');
CREATE TEMP TABLE minted (LIKE app.minted);
GRANT ALL ON minted TO PUBLIC;
DISCARD PLANS;  -- in which the name is looked up already
BEGIN;
SELECT payout_confirm_transfer('mint', 'x1', true) \g /dev/null
SELECT is((SELECT count(*)::int FROM app.minted), 1, 'a temporary table of the session does not come before those of the callback');
ROLLBACK;
BEGIN;
UPDATE payoutq.confirm_callback SET settings = array_replace(settings, 'app, public, pg_temp', 'app, public');
SELECT payout_confirm_transfer('mint', 'x1', true) \g /dev/null
SELECT is((SELECT count(*)::int FROM app.minted), 1, 'nor with a search_path that version 1.0.0 has stored');
ROLLBACK;
DROP TABLE pg_temp.minted;
SELECT is(payout_confirm_transfer('mint', 'x1', true), 'completed', 'confirmed');
SELECT is(payout_confirm_transfer('mint', 'x1', true), 'completed', 'twice');
SELECT pg_temp.done('m5', 'x5') \g /dev/null
SELECT is(payout_confirm_transfer('mint', 'x5', true), 'completed', 'completed, and confirmed afterwards');
SELECT pg_temp.failed('m6', 'permanent'), payout_confirm_transfer('mint', 'x2', false) \g /dev/null
SELECT results_eq('SELECT transfer_id, who, status FROM app.minted ORDER BY 1',
    $$VALUES (pg_temp.t('m1'), 'payoutq_test_minter'::name, 'completed'), (pg_temp.t('m5'), 'payoutq_test_minter', 'completed')$$,
    'once each, as the owner of the function, when the transfer is completed; failures call nothing');
SELECT set_eq('SELECT path FROM app.minted', ARRAY['app, public, pg_temp'], 'with the search_path of whoever has registered it');
SELECT is(current_setting('search_path'), '"$user", public', 'which is not left to the session');

-- one that fails
INSERT INTO app.broken VALUES ('SELECT 1 / 0');
SELECT is(payout_confirm_transfer('mint', 'x3', true), 'sent', 'a callback that fails leaves the transfer sent');
SELECT pg_temp.done('m7', 'x7'), pg_temp.done('m8') \g /dev/null
SELECT results_eq($$SELECT user_id, status, error, confirmed_at IS NOT NULL, provider_reference, extract(epoch FROM run_after - updated_at) BETWEEN 0.499 AND 1.001
                      FROM payout_transfers WHERE user_id IN ('m3', 'm7', 'm8') ORDER BY user_id$$,
    $$VALUES ('m3' COLLATE "C", 'sent', 'callback: division by zero', true, 'x3', true), ('m7', 'sent', 'callback: division by zero', true, 'x7', true),
             ('m8', 'sent', 'callback: division by zero', true, NULL, true)$$, 'with the error, confirmed, and due again; also when the provider''s answer was final');
SELECT is((SELECT count(*)::int FROM app.minted), 2, 'nothing of it is left');
SELECT is((SELECT string_agg(outcome, ' ') FROM payout_attempts WHERE transfer_id = pg_temp.t('m7')), 'completed', 'the attempt is completed all the same');
SELECT is(payout_balance('@transit:mint'), 4 + 8 + 64 + 128::bigint, 'the money is held');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'a failed callback: the books balance');
SELECT pg_temp.refused('payout_confirm_transfer(''mint'', ''x3'', false)', '55000', 'what was confirmed cannot be rejected, so that');
SELECT is(payout_confirm_transfer('mint', 'x3', true), 'sent', 'saying it again tries it again');
SELECT is((SELECT callback_failures FROM payoutq.transfer WHERE user_id = 'm3'), 2, 'and counts');
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE provider = 'mint' AND status = 'sent';
CALL payout_process();
SELECT is((SELECT callback_failures FROM payoutq.transfer WHERE user_id = 'm3'), 3, 'and so does a worker');
SELECT is(pg_temp.status('m3'), 'sent', 'in vain');
SELECT is((SELECT status FROM payout_job_status(:mint)), 'running', 'the job waits');

-- what a callback must not do
DELETE FROM app.broken;
INSERT INTO app.broken VALUES ('SET ROLE postgres');
SELECT payout_confirm_transfer('mint', 'x4', true) \g /dev/null
SELECT matches((SELECT error FROM payout_transfers WHERE user_id = 'm4'), '^callback: cannot set parameter "role"', 'a callback may not become somebody else');
UPDATE app.broken SET how = 'CREATE TEMP TABLE trap ()';
SELECT payout_confirm_transfer('mint', 'x4', true) \g /dev/null
SELECT matches((SELECT error FROM payout_transfers WHERE user_id = 'm4'), '^callback: .*security-restricted', 'nor leave something in the session');
UPDATE app.broken SET how = 'DELETE FROM app.claim';
SELECT payout_confirm_transfer('mint', 'x4', true) \g /dev/null
SELECT matches((SELECT error FROM payout_transfers WHERE user_id = 'm4'), '^callback: permission denied', 'nor do what its owner may not');
UPDATE app.broken SET how = 'SELECT set_config(''payoutq.batch_size'', ''7'', false), set_config(''search_path'', ''app'', false)';
SELECT is(payout_confirm_transfer('mint', 'x4', true), 'completed', 'it may change settings');
SELECT is(current_setting('payoutq.batch_size') || ' ' || current_setting('search_path'), '500 "$user", public', 'which are put back');

-- mended
DELETE FROM app.broken;
UPDATE payoutq.transfer SET run_after = clock_timestamp() + interval '1 hour' WHERE user_id = 'm8';
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id IN ('m3', 'm7');
CALL payout_process();
SELECT is(pg_temp.transfers(:mint), 'm1 completed 1, m2 confirmation_failed 1, m3 completed 1, m4 completed 1, m5 completed 1, m6 failed_terminal 1, m7 completed 1, m8 sent 1',
    'CALL payout_process() completes those that are due');
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id = 'm8';
CALL payout_process();
SELECT is(pg_temp.job(:mint), 'completed: 6 completed, 2 failed, 0 pending, 221 paid', 'the last completes the job, in the same call');
SELECT set_eq('SELECT transfer_id, count(*), min(who::text) FROM app.minted GROUP BY 1 ORDER BY 1',
    $$SELECT pg_temp.t(u), 1::bigint, 'payoutq_test_minter' FROM unnest(ARRAY['m1', 'm3', 'm4', 'm5', 'm7', 'm8']) AS u ORDER BY 1$$,
    'each is minted once');
SELECT results_eq($$SELECT error, confirmed_at IS NOT NULL FROM payout_transfers WHERE user_id = 'm8'$$, 'VALUES (NULL::text, true)', 'and has no error any more');
SELECT is(payout_balance('@transit:mint'), 0::bigint, 'nothing is in transit');

-- gone
SELECT payout_on_confirm('mint2', 'app.noted(bigint)') \g /dev/null
DROP FUNCTION app.noted;
SELECT pg_temp.done('n2', 'gone') \g /dev/null
SELECT is((SELECT status || ' ' || error FROM payout_transfers WHERE user_id = 'n2'), 'sent callback: function "app.noted(bigint)" does not exist', 'a callback that was dropped is missed');
SELECT payout_on_confirm('mint2', NULL) \g /dev/null
SELECT is(payout_confirm_transfer('mint2', 'gone', true), 'completed', 'unless it is unregistered');
-- deferred constraints, as frameworks make their foreign keys
CREATE TABLE app.person (id int PRIMARY KEY);
CREATE TABLE app.receipt (transfer_id bigint, person int REFERENCES app.person DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION app.receive(transfer_id bigint) RETURNS void LANGUAGE sql AS 'INSERT INTO app.receipt VALUES (transfer_id, 1)';
SELECT pg_temp.provider('defer', '{d1}'), payout_on_confirm('defer', 'app.receive(bigint)') \g /dev/null
SELECT payout_create_job('defer', ARRAY['d1'], ARRAY[1], provider => 'defer') \g /dev/null
CALL payout_process();
SELECT pg_temp.claim('defer') \g /dev/null
BEGIN;
INSERT INTO app.receipt VALUES (0, 2);  -- and its person later
SELECT pg_temp.done('d1') \g /dev/null
INSERT INTO app.person VALUES (2);
COMMIT;
SELECT is((SELECT count(*)::int FROM app.receipt), 1, 'a callback leaves alone what a session has deferred');
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id = 'd1' AND status = 'sent';
CALL payout_process();
SELECT matches((SELECT status || ' ' || error FROM payout_transfers WHERE user_id = 'd1'), '^sent callback: .* foreign key', 'a deferred constraint that does not hold is an error of the callback');
INSERT INTO app.person VALUES (1);
UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE user_id = 'd1';
CALL payout_process();
SELECT is(pg_temp.status('d1'), 'completed', 'one that does hold lets the transfer be completed');
SELECT is((SELECT count(*)::int FROM app.receipt WHERE transfer_id = pg_temp.t('d1')), 1, 'with what the callback has done');

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'callbacks: the books balance');

-- ---------------------------------------------------------------------------
-- Bound currencies, queries, idempotency
-- ---------------------------------------------------------------------------

CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint NOT NULL DEFAULT 0 CHECK (coins >= 0));
INSERT INTO app.wallet VALUES ('b1', 5), ('b2', 5), ('b3', 5);
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM') \g /dev/null
SELECT pg_temp.provider('bound', '{b1,b2,b4}') \g /dev/null
SELECT payout_create_job('bound', ARRAY['b1', 'b2', 'b3', 'b4'], ARRAY[1, 2, 4, 8], currency => 'GEM', provider => 'bound') AS bound \gset
CALL payout_process();
SELECT is(pg_temp.transfers(:bound), 'b1 pending 0, b2 pending 0, b3 failed_terminal 0, b4 pending 0', 'bound: transfers are made');
SELECT results_eq('SELECT id, coins FROM app.wallet ORDER BY id', $$VALUES ('b1', 5::bigint), ('b2', 5), ('b3', 9)$$, 'bound: who has no account at the provider has the money');
SELECT is(payout_balance('@transit:bound', 'GEM'), 11::bigint, 'bound: the rest is held');
SELECT pg_temp.claim('bound'), pg_temp.done('b1'), pg_temp.failed('b2', 'permanent') \g /dev/null
SELECT lives_ok('SELECT pg_temp.done(''b4'')', 'bound: an account is not needed by whoever gets all of it outside');
SELECT results_eq('SELECT id, coins FROM app.wallet ORDER BY id', $$VALUES ('b1', 5::bigint), ('b2', 7), ('b3', 9)$$, 'bound: what has failed is in the table');
SELECT is(pg_temp.retry('b2'), 'pending', 'bound: a retry takes it');
SELECT is((SELECT coins FROM app.wallet WHERE id = 'b2'), 5::bigint, 'bound: from the table');
SELECT pg_temp.claim('bound'), pg_temp.failed('b2', 'permanent') \g /dev/null
UPDATE app.wallet SET coins = 1 WHERE id = 'b2';
SELECT pg_temp.refused('pg_temp.retry(''b2'')', '23514', 'bound: a retry of what is spent');
CALL payout_process();
SELECT is(pg_temp.job(:bound), 'completed: 2 completed, 2 failed, 0 pending, 9 paid', 'bound: the job is completed');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'bound: the books balance');

SELECT pg_temp.provider('query', '{q1,q2,q3}') \g /dev/null
CREATE TABLE app.share (who text, amount bigint);
INSERT INTO app.share VALUES ('q1', 1), ('q2', 2), ('q3', 4);
SELECT payout_create_job_from('query', 'SELECT who AS user_id, amount FROM app.share', provider => 'query', batch_size => 2) AS query \gset
CALL payout_process();
SELECT is(pg_temp.transfers(:query), 'q1 pending 0, q2 pending 0, q3 pending 0', 'a query: transfers are made');
SELECT is(payout_balance('@transit:query'), 7::bigint, 'a query: and their money is held');
SELECT pg_temp.claim('query'), pg_temp.done('q1'), pg_temp.done('q2'), pg_temp.done('q3') \g /dev/null
CALL payout_process();
SELECT is(pg_temp.job(:query), 'completed: 3 completed, 0 failed, 0 pending, 7 paid', 'a query: the job is completed');

SELECT is(payout_create_job('hold', ARRAY['ann', 'bob', 'cyd'], ARRAY[100, 200, 50], platform_fee => 7, batch_size => 2, provider => 'hold', metadata => '{"season": 3}'),
    :hold::bigint, 'the same job again is the same job');
SELECT pg_temp.refused(format($$payout_create_job('hold', ARRAY['ann', 'bob', 'cyd'], ARRAY[100, 200, 50], platform_fee => 7, batch_size => 2, provider => %s, metadata => '{"season": 3}')$$, provider),
                       '23505', 'with ' || what || ' it')
  FROM (VALUES ('''claim''', 'another provider'), ('NULL', 'no provider')) AS t (provider, what);
SELECT payout_create_job('at home', ARRAY['ann'], ARRAY[1]) \g /dev/null
SELECT pg_temp.refused($$payout_create_job('at home', ARRAY['ann'], ARRAY[1], provider => 'hold')$$, '23505', 'a provider for a job that had none');
SELECT throws_ok($$SELECT payout_create_job_from('query', 'SELECT who AS user_id, amount FROM app.share', provider => 'bound', batch_size => 2)$$, '23505', NULL,
    'a query: another provider');

-- a user who has money before keeps it
SELECT pg_temp.provider('rich', '{rich}') \g /dev/null
SELECT payout_deposit('rich', 1000, 'd5') \g /dev/null
SELECT payout_create_job('rich', ARRAY['rich'], ARRAY[10], provider => 'rich') AS rich \gset
CALL payout_process();
SELECT is(payout_balance('rich'), 1000::bigint, 'a balance from before is not touched by a hold');
SELECT pg_temp.claim('rich'), pg_temp.done('rich') \g /dev/null
SELECT is(payout_balance('rich'), 1000::bigint, 'nor by the transfer');

-- ---------------------------------------------------------------------------
-- A provider that is sent to stays
-- ---------------------------------------------------------------------------

SELECT payout_create_job('stays', ARRAY['rich'], ARRAY[10], provider => 'rich') AS stays \gset
CALL payout_process();
SET payoutq.allow_drop = off;
CREATE FUNCTION pg_temp.stays(why text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT throws_ok('DROP SERVER rich', '2BP01', 'cannot drop provider "rich" because it has jobs or transfers that have not ended',
                     'it is not dropped: ' || why)
    UNION ALL
    SELECT throws_ok('ALTER SERVER rich OPTIONS (' || change || ', ADD base_url ''http://127.0.0.1:1'')', '2BP01',
                     'cannot change the kind of provider "rich" because it has jobs or transfers that have not ended',
                     'and keeps its kind: ' || change)
      FROM unnest('{SET kind ''webhook'',"DROP kind, ADD kind ''stripe''"}'::text[]) AS change
$$;
SELECT pg_temp.stays('a transfer is pending');
SELECT throws_ok('ALTER SERVER rich RENAME TO poor', '0A000', 'cannot rename provider "rich"', 'nor renamed');
SELECT lives_ok('ALTER SERVER rich OPTIONS (SET kind ''external'', ADD key_life ''1 day'')', 'it can be altered');
SET ROLE payoutq_test_payer;
SELECT throws_ok('ALTER SERVER rich OPTIONS (SET kind ''webhook'')', '42501', NULL, 'by its owner');
RESET ROLE;
SELECT pg_temp.claim('rich') \g /dev/null
SELECT payout_cancel_job(:stays) \g /dev/null
SELECT pg_temp.stays('a transfer of a cancelled job is under way');
SELECT pg_temp.done('rich') \g /dev/null
SELECT payout_create_job('stays later', ARRAY['rich'], ARRAY[10], provider => 'rich', run_at => now() + interval '1 hour') AS stays \gset
SELECT pg_temp.stays('a job is not due yet');
SELECT payout_pause_job(:stays) \g /dev/null
SELECT pg_temp.stays('it is paused');
SELECT payout_cancel_job(:stays) \g /dev/null
SELECT payout_create_job_from('stays failed', 'SELECT ''rich'' AS user_id, 1 / 0 AS amount', provider => 'rich') AS stays \gset
CALL payout_process();
SELECT is(pg_temp.job(:stays), 'failed: 0 completed, 0 failed, 0 pending, 0 paid', '(a job has failed)');
SELECT pg_temp.stays('and could be retried');
SELECT payout_cancel_job(:stays) \g /dev/null
SELECT lives_ok('ALTER SERVER rich OPTIONS (SET kind ''stripe'', ADD base_url ''http://127.0.0.1:1'')', 'until its jobs and transfers have ended');
SELECT lives_ok('DROP SERVER rich', 'then it can go, too');
SELECT lives_ok('ALTER SERVER payoutq_test_other RENAME TO payoutq_test_another; ALTER SERVER payoutq_test_another RENAME TO payoutq_test_other',
    'servers of others are none of ours');
SET payoutq.allow_drop = on;

-- ---------------------------------------------------------------------------
-- The end
-- ---------------------------------------------------------------------------

SELECT isnt_empty('SELECT FROM app.seen', '(balances were watched)');
SELECT is_empty('SELECT * FROM app.seen WHERE balance < 0', 'no balance was below zero, not for a moment');
SELECT is_empty('SELECT * FROM app.seen WHERE user_id IN (''ann'', ''bob'') AND balance <> 1', 'and money that is held was never in a balance');
SELECT is_empty($$SELECT currency, account FROM payout_ledger WHERE account LIKE '@transit:%' GROUP BY 1, 2
                  HAVING sum(amount) <> (SELECT coalesce(sum(t.amount), 0) FROM payout_transfers t
                                          WHERE '@transit:' || t.provider = account AND t.currency = payout_ledger.currency
                                            AND t.status IN ('pending', 'processing', 'sent', 'retryable', 'unknown'))$$,
    'what is in transit is what the transfers under way are about');
SELECT is_empty($$SELECT transfer_id FROM payout_ledger WHERE account = '@outside' AND kind = 'transfer' GROUP BY 1 HAVING count(*) > 1$$, 'no transfer has gone outside twice');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'at the end the books balance');

SELECT finish();
DROP OWNED BY payoutq_test_payer, payoutq_test_minter;
DROP SERVER payoutq_test_other;
DROP FOREIGN DATA WRAPPER payoutq_test_other;
DROP SCHEMA app CASCADE;
DROP EXTENSION payoutq CASCADE;
CREATE EXTENSION payoutq;
DROP ROLE payoutq_test_payer, payoutq_test_minter;
