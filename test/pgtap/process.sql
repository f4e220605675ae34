-- CALL payout_process(): how much it does, of which job, in which order; and
-- whole jobs from creation to completion, as in the requirements.
\ir fresh.psql
SELECT plan(63);

-- The progress of all jobs: reference status processed
CREATE FUNCTION pg_temp.jobs() RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(concat_ws(' ', reference, status, processed_winners), ', ' ORDER BY job_id) FROM payout_jobs WHERE status <> 'completed'
$$;

-- ---------------------------------------------------------------------------
-- What it refuses
-- ---------------------------------------------------------------------------

-- test/sql/walkthrough.sql has more: only psql can see errors of a CALL outside of a transaction
SELECT throws_ok('CALL payout_process()', '25001', NULL, 'it cannot run inside a function');
CALL payout_process();
SELECT is_empty('SELECT FROM payout_jobs', 'without any job it does nothing');

-- ---------------------------------------------------------------------------
-- How many batches, of which job
-- ---------------------------------------------------------------------------

SELECT payout_create_job('one', ARRAY['a', 'b', 'c'], ARRAY[1, 2, 3], batch_size => 1) AS one \gset
SELECT payout_create_job('two', ARRAY['a', 'b', 'c'], ARRAY[10, 20, 30], batch_size => 1) AS two \gset
CALL payout_process(1, :two);
SELECT is(pg_temp.jobs(), 'one queued 0, two running 1', 'one batch of the job that is named');
CALL payout_process(max_batches => 1, job_id => :one);
SELECT is(pg_temp.jobs(), 'one running 1, two running 1', 'arguments have names');
CALL payout_process(2);
SELECT is(pg_temp.jobs(), 'one running 2, two running 2', 'without a name, jobs advance together');
CALL payout_process(NULL, :one);
SELECT is(pg_temp.jobs(), 'two running 2', 'all that is left of one job');
CALL payout_process(100);
SELECT is(pg_temp.jobs(), NULL, 'and of the other');
CALL payout_process(NULL, :one);
SELECT is(payout_balance('a'), 11::bigint, 'a finished job is not paid again');

SELECT payout_create_job('low', ARRAY['a', 'b'], ARRAY[1, 2], batch_size => 1, priority => -1),
       payout_create_job('middle', ARRAY['a', 'b'], ARRAY[1, 2], batch_size => 1),
       payout_create_job('high', ARRAY['a', 'b'], ARRAY[1, 2], batch_size => 1, priority => 1) \g /dev/null
CALL payout_process(1);
SELECT is(pg_temp.jobs(), 'low queued 0, middle queued 0, high running 1', 'the highest priority first');
CALL payout_process(2);
SELECT is(pg_temp.jobs(), 'low queued 0, middle running 1', 'then the next');
CALL payout_process(2);
SELECT is(pg_temp.jobs(), 'low running 1', 'and the lowest last');
CALL payout_process();

SELECT payout_create_job('later', ARRAY['a'], ARRAY[1], run_at => now() + '1 hour') AS later,
       payout_create_job('past', ARRAY['a'], ARRAY[1], run_at => '-infinity') AS past \gset
CALL payout_process();
SELECT is(pg_temp.jobs(), 'later queued 0', 'what is not due yet is left alone');
CALL payout_process(NULL, :later);
SELECT is(pg_temp.jobs(), 'later queued 0', 'also when it is named');
SELECT payout_cancel_job(:later);

-- ---------------------------------------------------------------------------
-- Waiting for a job
-- ---------------------------------------------------------------------------

SELECT payout_create_job('wait', ARRAY['a'], ARRAY[1]) AS wait \gset
SELECT is(payout_wait_for_job(:wait, '1 ms'), 'queued', 'a wait ends with its timeout');
SELECT is(payout_wait_for_job(:wait, '-1 s'), 'queued', 'which may be over already');
CALL payout_process();
SELECT is(payout_wait_for_job(:wait), 'completed', 'the wait for a finished job ends at once');
SELECT is(payout_wait_for_job(:later), 'cancelled', 'also of a cancelled one');
SELECT throws_ok('SELECT payout_wait_for_job(999999, ''1 ms'')', '42704', NULL, 'no such job');
SELECT is(payout_wait_for_job(NULL), NULL, 'job null');

-- ---------------------------------------------------------------------------
-- Jobs from a query
-- ---------------------------------------------------------------------------

CREATE TABLE app.prize (player text, money bigint);
INSERT INTO app.prize SELECT 'p' || i, i FROM generate_series(1, 25) i;
SELECT payout_create_job_from('query', 'SELECT player AS user_id, money AS amount FROM app.prize', platform_fee => 5, batch_size => 10) AS query \gset
INSERT INTO app.prize VALUES ('late', 1000);
CALL payout_process(1, :query);
SELECT results_eq(format('SELECT status, total_winners, processed_winners, total_pool FROM payout_job_status(%s)', :query),
    $$VALUES ('running', 26::bigint, 10::bigint, 1330::bigint)$$, 'a query sees the database as it is when it is run');
DELETE FROM app.prize;
CALL payout_process(NULL, :query);
SELECT results_eq(format('SELECT status, processed_winners, amount_paid FROM payout_job_status(%s)', :query),
    $$VALUES ('completed', 26::bigint, 1325::bigint)$$, 'and is run once');
SELECT is((SELECT string_agg(user_id, ' ' ORDER BY entry) FROM payout_entries WHERE job_id = :query AND entry <= 4), 'late p1 p10 p11',
    'its entries are in order of user_id');
SELECT is(payout_balance('@job:' || :query), 0::bigint, 'its escrow is empty in the end');

SET search_path = app, public;
CREATE TABLE app.local (user_id text, amount int);
INSERT INTO app.local VALUES ('local', 7);
SELECT payout_create_job_from('path', 'SELECT user_id, amount FROM local') AS path \gset
RESET search_path;
CALL payout_process(NULL, :path);
SELECT is(payout_balance('local'), 7::bigint, 'names in a query are those that its creator''s search_path finds');

-- in a session whose temporary table has the name of one that a function of the query reads
SET search_path = app, public;
CREATE FUNCTION app.locals() RETURNS TABLE (user_id text, amount int) LANGUAGE plpgsql AS
    $$ BEGIN RETURN QUERY SELECT l.user_id, l.amount FROM local l; END $$;
SELECT payout_create_job_from('temp', 'SELECT * FROM locals()') AS temp, payout_create_job_from('temp 2', 'SELECT * FROM local') AS temp2,
       payout_create_job_from('temp of 1.0.0', 'SELECT * FROM locals()') AS old \gset
RESET search_path;
SELECT is((SELECT DISTINCT settings[2] FROM payoutq.job WHERE id IN (:temp, :temp2, :old)), 'app, public, pg_temp', 'temporary tables come last');
UPDATE payoutq.job SET settings = array_replace(settings, 'app, public, pg_temp', 'app, public') WHERE id = :old;
CREATE TEMP TABLE local (user_id text, amount int);
INSERT INTO local VALUES ('thief', 1000000);
GRANT SELECT ON local TO PUBLIC;
CALL payout_process();
SELECT is((SELECT string_agg(user_id, ' ') FROM payout_entries WHERE job_id = :temp), 'local', 'a query does not read temporary tables of the session that runs it');
SELECT is((SELECT string_agg(user_id, ' ') FROM payout_entries WHERE job_id = :temp2), 'local', 'nor fails because of them');
SELECT is((SELECT string_agg(user_id, ' ') FROM payout_entries WHERE job_id = :old), 'local', 'nor with a search_path that version 1.0.0 has stored');
DROP TABLE pg_temp.local;

SET TimeZone = 'Asia/Tokyo';
SET DateStyle = 'SQL, DMY';
SELECT payout_create_job_from('time', $$SELECT 'time' AS user_id, extract(epoch FROM timestamptz '02/01/2026 09:00' - '2026-01-01 00:00+00')::int AS amount$$) AS job \gset
RESET TimeZone;
RESET DateStyle;
CALL payout_process(NULL, :job);
SELECT is((SELECT sum(amount) FROM payout_entries WHERE job_id = :job), 86400::numeric, 'and times in it are those that he has written');

CREATE TABLE app.bad (user_id text, amount bigint);
SELECT payout_create_job_from('bad ' || what, query, total_pool => pool, source_account => source)
  FROM (VALUES
    ('empty',    'SELECT * FROM app.bad WHERE false', NULL::bigint, '@outside'),
    ('null',     'SELECT NULL::text AS user_id, 1 AS amount', NULL, '@outside'),
    ('amount',   'SELECT ''u'' AS user_id, NULL::int AS amount', NULL, '@outside'),
    ('zero',     'SELECT ''u'' || i AS user_id, 3 - i AS amount FROM generate_series(1, 3) i', NULL, '@outside'),
    ('twice',    'SELECT ''u'' AS user_id, i AS amount FROM generate_series(1, 2) i', NULL, '@outside'),
    ('system',   'SELECT ''@platform'' AS user_id, 1 AS amount', NULL, '@outside'),
    ('nobody',   'SELECT '''' AS user_id, 1 AS amount', NULL, '@outside'),
    ('overflow', 'SELECT ''u'' || i AS user_id, 9223372036854775807 AS amount FROM generate_series(1, 2) i', NULL, '@outside'),
    ('pool',     'SELECT ''u'' AS user_id, 11 AS amount', 10, '@outside'),
    ('source',   'SELECT ''u'' AS user_id, 11 AS amount', NULL, 'poor'),
    ('own',      'SELECT ''u'' AS user_id, 1 / (random() * 0)::int AS amount', NULL, '@outside')
  ) AS t (what, query, pool, source) \g /dev/null
CALL payout_process();
SELECT results_eq($$SELECT reference, status, error_code FROM payoutq.job WHERE reference LIKE 'bad %' ORDER BY id$$,
    $$VALUES ('bad empty', 'failed', '22023'), ('bad null', 'failed', '22023'), ('bad amount', 'failed', '22023'), ('bad zero', 'failed', '23514'),
             ('bad twice', 'failed', '23505'), ('bad system', 'failed', '22023'), ('bad nobody', 'failed', '22023'),
             ('bad overflow', 'failed', '22003'), ('bad pool', 'failed', '23514'), ('bad source', 'failed', '23514'),
             ('bad own', 'failed', '22012')$$,
    'what payout_create_job() would refuse stops the job');
SELECT is_empty($$SELECT FROM payout_entries e JOIN payout_jobs USING (job_id) WHERE reference LIKE 'bad %'$$, 'and leaves no entries');
SELECT is_empty($$SELECT l.* FROM payout_ledger l JOIN payout_jobs USING (job_id) WHERE l.reference LIKE 'bad %'$$, 'nor any movement of money');
INSERT INTO app.bad VALUES ('w', 3);
UPDATE payoutq.job SET query = 'SELECT * FROM app.bad' WHERE reference = 'bad empty';
SELECT payout_retry_job(job_id) FROM payout_job_status('bad empty') \g /dev/null
CALL payout_process();
SELECT results_eq('SELECT status, amount_paid, error FROM payout_job_status(''bad empty'')', $$VALUES ('completed', 3::bigint, NULL)$$,
    'retried when the cause is mended, such a job is paid');

-- ---------------------------------------------------------------------------
-- The scenarios of the requirements
-- ---------------------------------------------------------------------------

SELECT payout_create_job('ten', array_agg('t' || i), array_agg(i * 100), platform_fee => 500, currency => 'TEN') AS ten FROM generate_series(1, 10) i \gset
CALL payout_process();
SELECT results_eq(format('SELECT status, processed_winners, total_winners, progress, amount_paid FROM payout_job_status(%s)', :ten),
    $$VALUES ('completed', 10::bigint, 10::bigint, 1::numeric, 5500::bigint)$$, '10 winners: 10/10');
SELECT is((SELECT count(*)::int FROM payout_accounts WHERE currency = 'TEN' AND 't' || balance / 100 = user_id), 10, 'each has what he won');

SELECT payout_create_job('thousand', array_agg('m' || i), array_agg(i), currency => 'MIL') AS thousand FROM generate_series(1, 1000) i \gset
SELECT is((SELECT progress_percent FROM payout_job_status(:thousand)), 0::numeric, '1,000 winners: 0 %');
CALL payout_process(1, :thousand);
SELECT results_eq(format('SELECT progress_percent, processed_winners FROM payout_job_status(%s)', :thousand), 'VALUES (50::numeric, 500::bigint)', '50 %');
CALL payout_process(NULL, :thousand);
SELECT results_eq(format('SELECT progress_percent, status FROM payout_job_status(%s)', :thousand), $$VALUES (100::numeric, 'completed')$$, '100 %');
SELECT is((SELECT count(*)::int FROM payout_batches WHERE job_id = :thousand), 2, 'in two batches of 500');

SELECT payout_create_job('hundred ' || n, array_agg('h' || i), array_agg(n), currency => 'HUN', batch_size => 30)
  FROM generate_series(1, 2) n, generate_series(1, 100) i GROUP BY n \g /dev/null
CALL payout_process(2);
SELECT results_eq($$SELECT processed_winners FROM payout_jobs WHERE reference LIKE 'hundred %'$$, ARRAY[30, 30]::bigint[],
    'two jobs of 100 advance together');
CALL payout_process();
SELECT is((SELECT count(*)::int FROM payout_accounts WHERE currency = 'HUN' AND balance = 3), 100, 'and both complete');

SELECT payout_create_job('ten thousand', array_agg('x' || i), array_agg(1 + i % 997), platform_fee => 12345, currency => 'TTH') AS big
  FROM generate_series(1, 10000) i \gset
CALL payout_process(NULL, :big);
SELECT results_eq(format('SELECT status, completed_count, failed_count, amount_paid, total_pool FROM payout_job_status(%s)', :big),
    $$SELECT 'completed', 10000::bigint, 0::bigint, sum(1 + i % 997)::bigint, sum(1 + i % 997)::bigint + 12345 FROM generate_series(1, 10000) i$$,
    '10,000 winners end to end');
SELECT is((SELECT sum(balance) + 12345 FROM payout_accounts WHERE currency = 'TTH'), (SELECT total_pool::numeric FROM payout_job_status(:big)),
    'payouts and fee are the pool, to the last unit');
SELECT is(payout_balance('@platform', 'TTH'), 12345::bigint, 'the platform has its fee');

-- an injected failure
CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint DEFAULT 0 CONSTRAINT injected CHECK (id <> 'u13' OR coins = 0));
INSERT INTO app.wallet SELECT 'u' || i FROM generate_series(1, 100) i;
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'INJ');
SELECT payout_create_job('injected', array_agg('u' || i), array_agg(i), currency => 'INJ') AS job FROM generate_series(1, 100) i \gset
CALL payout_process();
SELECT results_eq(format('SELECT status, completed_count, failed_count, pending_count FROM payout_job_status(%s)', :job),
    $$VALUES ('running', 99::bigint, 0::bigint, 1::bigint)$$, 'an injected failure: the others are paid, the job is not completed');
SELECT results_eq(format('SELECT user_id, status, error_code FROM payout_failed_entries WHERE job_id = %s', :job),
    $$VALUES ('u13' COLLATE "C", 'retryable', '23514')$$, 'the entry is marked, with its error');
SELECT is_empty(format($$SELECT * FROM payout_batches b WHERE job_id = %s AND first_entry <> 1 +
        coalesce((SELECT max(last_entry) FROM payout_batches a WHERE a.job_id = b.job_id AND a.first_entry < b.first_entry), 0)$$, :job),
    'split batches cover the entries without gap or overlap');
SELECT cmp_ok((SELECT count(*) FROM payout_batches WHERE job_id = :job), '<=', 16::bigint, 'and are few: the failure was looked for by halves');
ALTER TABLE app.wallet DROP CONSTRAINT injected;
SELECT payout_trigger_job(:job);
CALL payout_process();
SELECT results_eq(format('SELECT status, completed_count FROM payout_job_status(%s)', :job), $$VALUES ('completed', 100::bigint)$$,
    'the next run completes it when the cause is mended');
SELECT is((SELECT count(*)::int FROM app.wallet WHERE 'u' || coins = id), 100, 'and everybody is paid once');

-- ---------------------------------------------------------------------------
-- Names are only names
-- ---------------------------------------------------------------------------

CREATE TEMP TABLE odd (n serial, name text);
INSERT INTO odd (name) VALUES ('it''s'), ('"quoted"'), ('back\slash'), ('%s%n%d'), (E'new\nline'), (' space '), ('a,b}'), ('{}'), ('NULL'), ('null'),
    ('Ünïcödé 日本'), ('🙂'), ('$1'), ('''; DROP TABLE payoutq.job; --'), (repeat('ä', 500));
SELECT payout_create_job(E'it''s "odd" %s\n日本 \\', (SELECT array_agg(name) FROM odd), (SELECT array_agg(n * 10) FROM odd), currency => repeat('Ä', 31)) AS odd \gset
CALL payout_process(NULL, :odd);
SELECT is((SELECT status FROM payout_job_status(E'it''s "odd" %s\n日本 \\')), 'completed', 'odd names do not keep a job from being paid');
SELECT is_empty('SELECT name FROM odd WHERE payout_balance(name, repeat(''Ä'', 31)) <> n * 10', 'and each gets his own');
SELECT is_empty('SELECT name FROM odd WHERE NOT EXISTS (SELECT FROM payout_statement(name, repeat(''Ä'', 31)))', 'and has a statement');

-- ---------------------------------------------------------------------------
-- Of a session: settings, rights, and a new extension
-- ---------------------------------------------------------------------------

SET search_path = app;
SET enable_indexscan = off;
SET default_transaction_isolation = 'serializable';
SET lock_timeout = '7s';
SET synchronous_commit = off;
SELECT public.payout_create_job('settings', ARRAY['s1', 's2'], ARRAY[1, 2], batch_size => 1) AS job \gset
CALL public.payout_process(NULL, :job);
SELECT concat_ws(' ', current_setting('search_path'), current_setting('enable_indexscan'), current_setting('enable_seqscan'),
                    current_setting('lock_timeout'), current_setting('synchronous_commit'),
                 current_setting('transaction_isolation'), current_user) AS settings \gset
RESET search_path;
RESET enable_indexscan;
RESET lock_timeout;
RESET synchronous_commit;
RESET default_transaction_isolation;
SELECT is(:'settings', 'app off on 7s off serializable ' || session_user, 'after it the settings of the session are as before');
SELECT is((SELECT status FROM payout_job_status(:job)), 'completed', 'and none of them kept the job from being paid');

-- what a procedure has deferred before it calls us
DROP ROLE IF EXISTS payoutq_test_deferrer;
CREATE ROLE payoutq_test_deferrer;
SELECT payout_grant('payoutq_test_deferrer', 'operator') \g /dev/null
GRANT USAGE, CREATE ON SCHEMA app TO payoutq_test_deferrer;
SET ROLE payoutq_test_deferrer;
CREATE TABLE app.deferred (who name);
CREATE TABLE app.fired (who name);
CREATE FUNCTION app.fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO app.fired VALUES (current_user); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER fire AFTER INSERT ON app.deferred DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION app.fire();
CREATE PROCEDURE app.defer() LANGUAGE plpgsql AS 'BEGIN INSERT INTO app.deferred VALUES (current_user); CALL public.payout_process(); END';
CALL app.defer();
RESET ROLE;
SELECT results_eq('SELECT who FROM app.fired', ARRAY['payoutq_test_deferrer'::name], 'runs as the caller');
REASSIGN OWNED BY payoutq_test_deferrer TO CURRENT_USER;
DROP OWNED BY payoutq_test_deferrer;
SELECT payout_revoke('payoutq_test_deferrer') \g /dev/null
DROP ROLE payoutq_test_deferrer;

-- ---------------------------------------------------------------------------
-- Turns of equals
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.paid() RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(concat_ws(' ', reference, processed_winners), ', ' ORDER BY job_id) FROM payout_jobs WHERE reference ~ '^equal'
$$;
SELECT payout_create_job('equal' || j, users, amounts, batch_size => 1)
  FROM (SELECT array_agg('t' || i) AS users, array_agg(i::bigint) AS amounts FROM generate_series(1, 100) i) a,
       generate_series(1, 2) j \g /dev/null
DO $$
BEGIN
    FOR i IN 1..40 LOOP
        PERFORM payout_create_job('urgent' || i, ARRAY['a'], ARRAY[1], priority => 1);
        COMMIT;
        CALL payout_process(2);
    END LOOP;
END $$;
SELECT is(pg_temp.paid(), 'equal1 20, equal2 20', 'equals take turns beside small jobs of higher priority');
DO $$
BEGIN
    FOR i IN 1..40 LOOP
        PERFORM payout_create_job('small' || i, ARRAY['a'], ARRAY[1]);
        COMMIT;
        CALL payout_process(2);
    END LOOP;
END $$;
SELECT cmp_ok((SELECT min(processed_winners) FROM payout_jobs WHERE reference ~ '^equal')::int, '>=', 35,
    'and are not held up by new equals');
SELECT cmp_ok((SELECT count(*) FROM payout_jobs WHERE reference ~ '^small' AND status = 'completed')::int, '>=', 20,
    'which have their turns');
CALL payout_process();
SELECT is(pg_temp.paid(), 'equal1 100, equal2 100', 'all are paid in the end');

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');
DROP EXTENSION payoutq;
SELECT is_empty('SELECT FROM pg_namespace WHERE nspname = ''payoutq''', 'DROP EXTENSION leaves nothing');
CREATE EXTENSION payoutq;
SELECT payout_create_job('again', ARRAY['a'], ARRAY[4]) AS job \gset
CALL payout_process();
SELECT is(payout_balance('a'), 4::bigint, 'a session that has used the extension can use a new one');

SELECT finish();
