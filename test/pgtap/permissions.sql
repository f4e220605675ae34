-- Who may do what: nobody anything, unless payout_grant() said so; the storage
-- is closed to all levels; and nobody's search_path gains him anything.
\ir fresh.psql
DROP SCHEMA IF EXISTS evil, trapped CASCADE;
DROP ROLE IF EXISTS payoutq_test_gone, payoutq_test_nobody, payoutq_test_reader, payoutq_test_operator, payoutq_test_admin, "payoutq test Odd ""role";
CREATE ROLE payoutq_test_nobody;
CREATE ROLE payoutq_test_reader;
CREATE ROLE payoutq_test_operator;
CREATE ROLE payoutq_test_admin;
CREATE ROLE "payoutq test Odd ""role";
GRANT USAGE ON SCHEMA app TO payoutq_test_operator, payoutq_test_nobody;
SELECT payout_create_job('paid', ARRAY['a'], ARRAY[10]) AS paid \gset
CALL payout_process();
SELECT payout_create_job('later', ARRAY['a', 'b'], ARRAY[10, 20], run_at => '2100-01-01') AS later \gset
CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
CREATE USER MAPPING FOR PUBLIC SERVER bank;
GRANT USAGE ON FOREIGN SERVER bank TO payoutq_test_operator;
CREATE FUNCTION app.confirmed(bigint) RETURNS void LANGUAGE sql AS '';
SELECT payout_set_destination(u, 'bank', 'x') FROM unnest(ARRAY['t1', 't2', 't3', 't4']) AS u \g /dev/null
SELECT payout_create_job('wired', ARRAY['t1', 't2', 't3', 't4'], ARRAY[1, 2, 3, 4], provider => 'bank') AS wired \gset
CALL payout_process();
SELECT plan(220);

-- What belongs to the extension
CREATE TEMP TABLE routines AS SELECT oid::regprocedure::text AS routine, * FROM pg_proc WHERE false;
CREATE TEMP TABLE relations AS SELECT oid::regclass::text AS relation, * FROM pg_class WHERE false;
CREATE FUNCTION pg_temp.read_extension() RETURNS void LANGUAGE sql AS $$
    TRUNCATE routines, relations;
    INSERT INTO routines SELECT p.oid::regprocedure, p.* FROM pg_proc p WHERE p.oid IN (
        SELECT objid FROM pg_depend JOIN pg_extension x ON x.oid = refobjid AND x.extname = 'payoutq'
         WHERE classid = 'pg_proc'::regclass AND deptype = 'e');
    INSERT INTO relations SELECT c.oid::regclass, c.* FROM pg_class c WHERE c.oid IN (
        SELECT objid FROM pg_depend JOIN pg_extension x ON x.oid = refobjid AND x.extname = 'payoutq'
         WHERE classid = 'pg_class'::regclass AND deptype = 'e');
$$;
CREATE FUNCTION pg_temp.callable(who name) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT routine FROM routines WHERE has_function_privilege(who, oid, 'EXECUTE')
$$;
CREATE FUNCTION pg_temp.rights(who name) RETURNS TABLE (relation text, privilege text) LANGUAGE sql AS $$
    SELECT relation, p
      FROM relations, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER', 'USAGE']
                             || CASE WHEN current_setting('server_version_num')::int >= 170000 THEN '{MAINTAIN}'::text[] END) AS p
     WHERE CASE WHEN relkind = 'S' THEN p IN ('USAGE', 'SELECT', 'UPDATE') AND has_sequence_privilege(who, oid, p)
                WHEN p = 'USAGE' THEN false
                WHEN p IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES') THEN has_any_column_privilege(who, oid, p)
                ELSE has_table_privilege(who, oid, p) END
$$;

-- ---------------------------------------------------------------------------
-- PUBLIC has nothing
-- ---------------------------------------------------------------------------

SELECT pg_temp.read_extension();
SELECT cmp_ok((SELECT count(*) FROM routines), '>', 40::bigint, 'the extension has many functions');
SELECT cmp_ok((SELECT count(*) FROM relations), '>', 15::bigint, 'and tables and views');
SELECT is_empty('SELECT * FROM pg_temp.callable(''payoutq_test_nobody'')', 'PUBLIC may execute none of them');
SELECT is_empty('SELECT * FROM pg_temp.rights(''payoutq_test_nobody'')', 'and has no right on any table, view or sequence');
SELECT ok(NOT has_schema_privilege('payoutq_test_nobody', 'payoutq', 'USAGE, CREATE'), 'nor on the schema payoutq');

-- ---------------------------------------------------------------------------
-- What each level may do, and nothing else
-- ---------------------------------------------------------------------------

SELECT payout_grant('payoutq_test_reader', 'reader');
SELECT payout_grant('payoutq_test_operator', 'operator');
SELECT payout_grant('payoutq_test_admin', 'admin');

-- A function in a view is called with the rights of whoever reads the view.
CREATE TEMP TABLE in_views AS
SELECT DISTINCT routine FROM routines JOIN pg_depend d ON d.refobjid = routines.oid AND d.refclassid = 'pg_proc'::regclass
 WHERE d.classid = 'pg_rewrite'::regclass AND pronamespace = 'payoutq'::regnamespace;
CREATE TEMP TABLE may (level text, routine text);
INSERT INTO may SELECT 'reader', routine FROM in_views;
INSERT INTO may VALUES
    ('reader', 'payout_job_status(bigint)'),
    ('reader', 'payout_job_status(text)'),
    ('reader', 'payout_wait_for_job(bigint,interval)'),
    ('reader', 'payout_balance(text,text)'),
    ('reader', 'payout_statement(text,text)'),
    ('reader', 'payout_verify()'),
    ('reader', 'payout_split(bigint,bigint[])'),
    ('reader', 'payout_stuck_transfers(interval)'),
    ('operator', 'payout_create_job(text,jsonb,bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_create_job(text,text[],bigint[],bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_create_job_from(text,text,bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_preview_job(text,jsonb,bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_preview_job(text,text[],bigint[],bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_preview_job_from(text,text,bigint,bigint,bigint,text,integer,integer,timestamp with time zone,text,text,jsonb)'),
    ('operator', 'payout_pause_job(bigint)'),
    ('operator', 'payout_resume_job(bigint)'),
    ('operator', 'payout_cancel_job(bigint,text)'),
    ('operator', 'payout_retry_job(bigint)'),
    ('operator', 'payout_trigger_job(bigint)'),
    ('operator', 'payout_process(integer,bigint)'),
    ('operator', 'payout_deposit(text,bigint,text,text)'),
    ('operator', 'payout_withdraw(text,bigint,text,text)'),
    ('operator', 'payout_create_challenge(text,timestamp with time zone,text,text,text,text,text,integer,integer,text,jsonb)'),
    ('operator', 'payout_place_stake(bigint,text,text,bigint,text,timestamp with time zone)'),
    ('operator', 'payout_add_evidence(bigint,text,jsonb)'),
    ('operator', 'payout_run_deadlines(timestamp with time zone)'),
    ('operator', 'payout_run_notifications(timestamp with time zone)'),
    ('operator', 'payout_resolve_challenge(bigint,text,text)'),
    ('operator', 'payout_cancel_challenge(bigint,text)'),
    ('operator', 'payout_mark_notification_read(bigint)'),
    ('operator', 'payout_set_destination(text,text,text)'),
    ('operator', 'payout_claim_transfers(text,integer,interval)'),
    ('operator', 'payout_transfer_sent(bigint,uuid,text)'),
    ('operator', 'payout_transfer_completed(bigint,uuid,text)'),
    ('operator', 'payout_transfer_failed(bigint,uuid,text,text)'),
    ('operator', 'payout_confirm_transfer(text,text,boolean,text)'),
    ('operator', 'payout_retry_transfer(bigint)'),
    ('operator', 'payout_reconcile(text,jsonb,interval,boolean)'),
    ('operator', 'payout_handle_webhook(text,jsonb,bytea,timestamp with time zone)'),
    ('admin', 'payout_schedule(text,text,text,text)'),
    ('admin', 'payout_unschedule()'),
    ('admin', 'payout_maintain(integer)'),
    ('admin', 'payout_reverse_entry(bigint,text,bigint,text)'),
    ('admin', 'payout_bind_accounts(regclass,name,name,text)'),
    ('admin', 'payout_unbind_accounts(text)'),
    ('admin', 'payout_start_worker()'),
    ('admin', 'payout_stop_workers()'),
    ('admin', 'payout_grant(regrole,text)'),
    ('admin', 'payout_revoke(regrole)'),
    ('admin', 'payout_on_confirm(text,regprocedure)'),
    ('operator', 'payout_on_settlement()'),
    ('admin', 'payout_fail_transfer(bigint,text)'),
    ('admin', 'payout_arm_sending()');
SELECT isnt_empty('SELECT FROM in_views', 'some views call functions');
SELECT set_eq('SELECT * FROM pg_temp.callable(''payoutq_test_reader'')',
    'SELECT routine FROM may WHERE level = ''reader''', 'a reader may call these');
SELECT set_eq('SELECT * FROM pg_temp.callable(''payoutq_test_operator'')',
    'SELECT routine FROM may WHERE level IN (''reader'', ''operator'')', 'an operator may call these, too');
SELECT set_eq('SELECT * FROM pg_temp.callable(''payoutq_test_admin'')',
    'SELECT routine FROM may', 'and an admin these');
SELECT set_eq(format('SELECT * FROM pg_temp.rights(%L)', who),
    $$SELECT v, 'SELECT' FROM unnest(ARRAY['payout_jobs', 'payout_progress', 'payout_entries', 'payout_failed_entries', 'payout_batches', 'payout_accounts',
                                           'payout_ledger', 'payout_workers', 'payout_stats', 'payout_health', 'payout_challenges',
                                           'payout_challenges_awaiting', 'payout_stakes', 'payout_notifications', 'payout_schedules',
                                           'payout_transfers', 'payout_attempts', 'payout_providers']) AS v$$,
    who || ' may read the views, and has no right on the storage')
  FROM unnest(ARRAY['payoutq_test_reader', 'payoutq_test_operator', 'payoutq_test_admin']) AS who;
SELECT ok(NOT has_schema_privilege(who, 'payoutq', 'USAGE, CREATE'), who || ' has no right on the schema')
  FROM unnest(ARRAY['payoutq_test_reader', 'payoutq_test_operator', 'payoutq_test_admin']) AS who;
SELECT is_empty($$SELECT routine FROM routines WHERE has_function_privilege('payoutq_test_admin', oid, 'EXECUTE WITH GRANT OPTION')$$,
    'an admin grants with payout_grant() only');

-- ---------------------------------------------------------------------------
-- Every object has a level, a comment, and a search_path
-- ---------------------------------------------------------------------------

SELECT is_empty($$SELECT routine FROM routines WHERE proname LIKE 'payout\_%' AND payoutq.level_of(proname) IS NULL AND proname <> 'payout_on_settlement'$$,
    'each function of the API has a level');
SELECT is_empty($$SELECT relation FROM relations WHERE relname LIKE 'payout\_%' AND payoutq.level_of(relname) IS NULL$$,
    'each view of the API has a level');
SELECT is_empty($$SELECT routine FROM routines WHERE pronamespace <> 'payoutq'::regnamespace AND proname NOT LIKE 'payout\_%'$$,
    'outside the schema payoutq functions are named payout_*');
SELECT is_empty($$SELECT relation FROM relations WHERE relnamespace <> 'payoutq'::regnamespace AND relname NOT LIKE 'payout\_%'$$,
    'and so are relations');
SELECT is_empty($$SELECT routine FROM routines WHERE proname LIKE 'payout\_%' AND coalesce(obj_description(oid, 'pg_proc'), '') = ''$$,
    'each function of the API has a comment');
SELECT is_empty($$SELECT relation FROM relations WHERE relname LIKE 'payout\_%' AND coalesce(obj_description(oid, 'pg_class'), '') = ''$$,
    'each view of the API has a comment');
SELECT is_empty($$SELECT routine FROM routines WHERE prosecdef
                     AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)$$,
    'each SECURITY DEFINER function has a search_path of its own');
SELECT is_empty($$SELECT routine FROM routines JOIN pg_language l ON l.oid = prolang
                   WHERE lanname IN ('sql', 'plpgsql') AND NOT prosecdef AND proname NOT IN ('payout_preview_job_from', 'payout_on_settlement')
                     AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false) AND prosqlbody IS NULL$$,
    'and so have the others, but for those that run a query of their caller, or were parsed when they were made');
SELECT is_empty($$SELECT routine FROM routines WHERE proconfig::text LIKE '%enable\_%=off%' AND NOT 'jit=off' = ANY (proconfig)$$,
    'what rules out plans is not compiled for their cost');
SELECT is_empty($$SELECT relation FROM relations, pg_extension
                   WHERE extname = 'payoutq' AND relkind = 'v' AND (relowner <> extowner OR reloptions IS NOT NULL)$$,
    'views read with the rights of the owner of the extension');
SELECT is_empty($$SELECT relation FROM relations WHERE relkind = 'v' AND pg_relation_is_updatable(oid, true) <> 0$$,
    'and nobody can write through them, the owner neither');

-- ---------------------------------------------------------------------------
-- Calls: what is granted works, the rest is refused
-- ---------------------------------------------------------------------------

BEGIN;
SET LOCAL ROLE payoutq_test_nobody;
SELECT throws_ok(call, '42501', NULL, 'nobody: ' || call)
  FROM unnest(ARRAY['SELECT * FROM payout_job_status(1)', 'SELECT * FROM payout_jobs', 'SELECT * FROM payout_accounts',
                    'SELECT payout_split(1, ''{1}'')', 'SELECT payout_balance(''a'')', 'CALL payout_process()',
                    'SELECT payout_create_job(''x'', ARRAY[''a''], ARRAY[1])', 'SELECT * FROM payoutq.job',
                    'SELECT payoutq.change_balance(''a'', ''USD'', 1)', 'SELECT payout_grant(''payoutq_test_nobody'', ''admin'')',
                    'SELECT * FROM payout_challenges', 'SELECT * FROM payout_stakes', 'SELECT * FROM payout_notifications',
                    'SELECT payout_create_challenge(''x'')', 'SELECT payout_resolve_challenge(1, ''draw'')', 'SELECT payout_schedule()',
                    'SELECT * FROM payout_transfers', 'SELECT * FROM payout_attempts', 'SELECT payout_claim_transfers(''bank'')',
                    'SELECT payout_confirm_transfer(''bank'', ''x'', true)', 'SELECT * FROM payout_stuck_transfers()',
                    'SELECT payout_arm_sending()']) AS call;

SET LOCAL ROLE payoutq_test_reader;
SELECT lives_ok(call, 'reader: ' || call)
  FROM unnest(ARRAY['SELECT * FROM payout_job_status(1)', 'SELECT * FROM payout_job_status(''paid'')',
                    'SELECT payout_wait_for_job(1, ''1 s'')', 'SELECT payout_balance(''a'')', 'SELECT payout_balance(''@platform'')',
                    'SELECT * FROM payout_statement(''a'')', 'SELECT * FROM payout_verify()', 'SELECT payout_split(1, ''{1}'')',
                    'SELECT * FROM payout_jobs', 'SELECT * FROM payout_progress', 'SELECT * FROM payout_entries', 'SELECT * FROM payout_failed_entries',
                    'SELECT * FROM payout_batches', 'SELECT * FROM payout_accounts', 'SELECT * FROM payout_ledger',
                    'SELECT * FROM payout_workers', 'SELECT * FROM payout_stats', 'SELECT * FROM payout_health',
                    'SELECT * FROM payout_challenges', 'SELECT * FROM payout_challenges_awaiting', 'SELECT * FROM payout_stakes',
                    'SELECT * FROM payout_notifications', 'SELECT * FROM payout_schedules',
                    'SELECT * FROM payout_transfers', 'SELECT * FROM payout_attempts', 'SELECT * FROM payout_stuck_transfers()']) AS call;
SELECT throws_ok(call, '42501', NULL, 'reader: ' || call)
  FROM unnest(ARRAY['SELECT payout_create_job(''x'', ARRAY[''a''], ARRAY[1])', 'SELECT payout_pause_job(2)', 'CALL payout_process()',
                    'SELECT payout_deposit(''a'', 1, ''x'')', 'SELECT * FROM payout_preview_job(''x'', ARRAY[''a''], ARRAY[1])',
                    'SELECT * FROM payoutq.job', 'SELECT * FROM payoutq.workers()', 'SELECT payoutq.wake()',
                    'SELECT payout_create_challenge(''x'')', 'SELECT payout_place_stake(1, ''a'', ''YES'', 1)',
                    'SELECT payout_resolve_challenge(1, ''draw'')', 'SELECT payout_cancel_challenge(1)',
                    'SELECT payout_mark_notification_read(1)', 'SELECT payout_run_deadlines()', 'SELECT payout_run_notifications()',
                    'SELECT * FROM payoutq.challenge', 'SELECT * FROM payoutq.notification', 'SELECT * FROM payoutq.pools',
                    'SELECT payout_claim_transfers(''bank'')', 'SELECT payout_set_destination(''a'', ''bank'', ''mine'')',
                    'SELECT payout_transfer_sent(1, gen_random_uuid(), ''x'')', 'SELECT payout_transfer_completed(1, gen_random_uuid(), ''x'')',
                    'SELECT payout_transfer_failed(1, gen_random_uuid(), ''permanent'')', 'SELECT payout_retry_transfer(1)',
                    'SELECT payout_confirm_transfer(''bank'', ''x'', true)', 'SELECT * FROM payoutq.transfer', 'SELECT * FROM payoutq.destination']) AS call;

SET LOCAL ROLE payoutq_test_operator;
SELECT lives_ok(call, 'operator: ' || call)
  FROM unnest(ARRAY['SELECT payout_create_job(''o1'', ARRAY[''a''], ARRAY[1])',
                    'SELECT payout_create_job(''o2'', ''[{"user_id": "a", "amount": 1}]'')',
                    'SELECT payout_create_job_from(''o3'', ''SELECT ''''a'''' AS user_id, 1 AS amount'')',
                    'SELECT * FROM payout_preview_job(''o4'', ARRAY[''a''], ARRAY[1])',
                    'SELECT * FROM payout_preview_job(''o4'', ''[{"user_id": "a", "amount": 1}]'')',
                    'SELECT * FROM payout_preview_job_from(''o4'', ''SELECT ''''a'''' AS user_id, 1 AS amount'')',
                    'SELECT payout_pause_job(2)', 'SELECT payout_resume_job(2)', 'SELECT payout_trigger_job(2)', 'SELECT payout_retry_job(2)',
                    'SELECT payout_cancel_job(2)', 'SELECT payout_deposit(''a'', 1, ''d1'')', 'SELECT payout_withdraw(''a'', 1, ''w1'')',
                    'SELECT payout_create_challenge(''c1'', ''2100-01-01'', ''a'', min_stakes => 1)',
                    'SELECT payout_place_stake(1, ''a'', ''YES'', 1)', 'SELECT payout_add_evidence(1, ''a'', ''1'')',
                    'SELECT payout_run_notifications(''2099-12-31 23:55'')', 'SELECT payout_mark_notification_read(1)',
                    'SELECT payout_run_deadlines(''2100-01-01'')', 'SELECT * FROM payout_resolve_challenge(1, ''draw'')',
                    'SELECT payout_cancel_challenge(payout_create_challenge(''c2''))',
                    'SELECT payout_set_destination(''a'', ''bank'', ''x'')',
                    'SELECT payout_create_job(''o5'', ARRAY[''a''], ARRAY[1], provider => ''bank'')',
                    'SELECT payout_transfer_sent(transfer_id, attempt_token, ''r1'') FROM payout_claim_transfers(''bank'', 1)',
                    'SELECT payout_confirm_transfer(''bank'', ''r1'', false)', 'SELECT payout_retry_transfer(1)',
                    'SELECT payout_transfer_completed(transfer_id, attempt_token, ''r2'') FROM payout_claim_transfers(''bank'', 1)',
                    'SELECT payout_transfer_failed(transfer_id, attempt_token, ''permanent'') FROM payout_claim_transfers(''bank'', 1)']) AS call;
SELECT results_eq('SELECT status FROM payout_transfers ORDER BY 1', '{completed,failed_terminal,pending,pending}'::text[], 'which has done what it says');
SELECT is((SELECT created_by FROM payout_jobs WHERE reference = 'o1'), 'payoutq_test_operator', 'a job knows who created it');
SELECT throws_ok(call, '42501', NULL, 'operator: ' || call)
  FROM unnest(ARRAY['SELECT payout_reverse_entry(1, ''a'', 1)', 'SELECT payout_bind_accounts(''pg_class'', ''oid'', ''relpages'')',
                    'SELECT payout_unbind_accounts()', 'SELECT payout_start_worker()', 'SELECT payout_stop_workers()',
                    'SELECT payout_grant(''payoutq_test_operator'', ''admin'')', 'SELECT payout_revoke(''payoutq_test_reader'')',
                    'SELECT * FROM payoutq.entry', 'INSERT INTO payoutq.movement DEFAULT VALUES',
                    'SELECT payout_schedule()', 'SELECT payout_unschedule()', 'SELECT payout_maintain()',
                    'UPDATE payoutq.challenge SET result = ''draw''', 'DELETE FROM payoutq.notification',
                    'SELECT payoutq.execute_in(''postgres'', ''SELECT 1'')', 'SELECT payoutq.tell_roles(''{1}'', ''{x}'', now())',
                    'SELECT payout_arm_sending()', 'SELECT payout_on_confirm(''bank'', ''app.confirmed(bigint)'')',
                    'SELECT payout_on_confirm(''bank'', NULL)', 'UPDATE payoutq.transfer SET status = ''completed''',
                    'DELETE FROM payoutq.sending', 'SELECT * FROM payoutq.destination', 'INSERT INTO payoutq.confirm_callback VALUES (''bank'', ''x'', ''{}'')',
                    'SELECT payoutq.complete_transfer(t) FROM payoutq.transfer t', 'SELECT payoutq.call_confirm_callback(1, ''bank'')',
                    'SELECT payoutq.claim_transfers(''bank'', 1, ''1 hour'')', 'SELECT payoutq.hold_entries(1, 1, 1, ''bank'')']) AS call;

SET LOCAL ROLE payoutq_test_admin;
SELECT lives_ok(call, 'admin: ' || call)
  FROM unnest(ARRAY['SELECT payout_reverse_entry(1, ''a'', 1)', 'SELECT payout_stop_workers()',
                    'SELECT payout_grant(''payoutq_test_nobody'', ''reader'')', 'SELECT payout_revoke(''payoutq_test_nobody'')',
                    'SELECT payout_maintain()', 'SELECT payout_arm_sending()']) AS call;
SELECT throws_ok(call, '42501', NULL, 'admin: ' || call)
  FROM unnest(ARRAY['SELECT * FROM payoutq.entry', 'UPDATE payoutq.account SET balance = 1', 'DELETE FROM payoutq.movement',
                    'CREATE TRIGGER t BEFORE UPDATE ON payoutq.batch FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()',
                    'ALTER TABLE payoutq.batch DISABLE TRIGGER ALL', 'SELECT payoutq.change_balance(''a'', ''USD'', 1)',
                    'SELECT payoutq.execute_in(''postgres'', ''SELECT 1'')', 'SELECT payoutq.execute_in_cron(''SELECT 1'')',
                    'UPDATE payoutq.challenge SET result = ''draw''', 'SELECT payout_on_confirm(''bank'', ''app.confirmed(bigint)'')',
                    'UPDATE payoutq.transfer SET status = ''completed''', 'DELETE FROM payoutq.sending',
                    'CREATE TRIGGER t BEFORE UPDATE ON payoutq.transfer FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()',
                    'DROP EXTENSION payoutq']) AS call;
ROLLBACK;

-- ---------------------------------------------------------------------------
-- Grant and revoke
-- ---------------------------------------------------------------------------

SELECT throws_ok('SELECT payout_grant(''payoutq_test_nobody'', ''owner'')', '22023', NULL, 'no such level');
SELECT throws_ok('SELECT payout_grant(''payoutq_test_nobody'', NULL)', '22023', NULL, 'level null');
SELECT throws_ok('SELECT payout_grant(NULL, ''reader'')', '22023', NULL, 'role null');
SELECT throws_ok('SELECT payout_revoke(NULL)', '22023', NULL, 'revoke: role null');
SELECT throws_ok('SELECT payout_grant(''payoutq_no_such_role'', ''reader'')', '42704', NULL, 'no such role');
SELECT lives_ok($$SELECT payout_grant('"payoutq test Odd ""role"', 'reader')$$, 'names are quoted');
SELECT isnt_empty($$SELECT pg_temp.rights('payoutq test Odd "role')$$, 'and the role has its grants');
SELECT payout_revoke(who) FROM unnest(ARRAY['payoutq_test_admin', '"payoutq test Odd ""role"']::regrole[]) AS who;
SELECT is_empty('SELECT pg_temp.callable(''payoutq_test_admin'')', 'payout_revoke() takes every function back');
SELECT is_empty('SELECT pg_temp.rights(''payoutq_test_admin'')', 'and every view');
SELECT isnt_empty('SELECT pg_temp.callable(''payoutq_test_reader'')', 'and leaves other roles what they have');
SELECT lives_ok('DROP ROLE "payoutq test Odd ""role"', 'nothing is left that would keep a role from being dropped');

-- ---------------------------------------------------------------------------
-- A query of a job can do no more than the role that created it
-- ---------------------------------------------------------------------------

CREATE TABLE app.secret (user_id text, amount bigint);
INSERT INTO app.secret VALUES ('mallory', 1000000);
CREATE TABLE app.trap (who name);
GRANT INSERT ON app.trap TO PUBLIC;
CREATE FUNCTION app.spring() RETURNS bigint LANGUAGE sql AS $$ INSERT INTO app.trap VALUES (current_user) RETURNING 1::bigint $$;
CREATE FUNCTION app.become(statement text) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN EXECUTE statement; RETURN 1; END $$;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA app TO payoutq_test_operator;
SET ROLE payoutq_test_operator;
SELECT throws_ok($$SELECT * FROM payout_preview_job_from('q0', 'SELECT * FROM app.secret')$$, '42501', NULL,
    'a preview reads nothing that its caller may not');
SELECT payout_create_job_from('q1', 'SELECT * FROM app.secret') AS q1,
       payout_create_job_from('q2', 'SELECT ''u'' AS user_id, app.become(''SET ROLE postgres'') AS amount') AS q2,
       payout_create_job_from('q3', 'SELECT ''u'' AS user_id, app.become(''RESET SESSION AUTHORIZATION'') AS amount') AS q3,
       payout_create_job_from('q4', 'SELECT ''u'' AS user_id, app.become(''CREATE TEMP TABLE trap ()'') AS amount') AS q4 \gset
RESET ROLE;
SELECT payout_create_job_from('q5', 'SELECT ''u'' AS user_id, app.become(''DELETE FROM app.secret'') AS amount') AS q5 \gset
SELECT payout_create_job_from('q6', 'SELECT ''paid by query'' AS user_id, amount FROM app.secret') AS q6 \gset
CALL payout_process();
SELECT results_eq(
    $$SELECT j.reference, j.status, j.error_code FROM payoutq.job j WHERE j.reference ~ '^q[1-5]$' ORDER BY 1$$,
    $$VALUES ('q1', 'failed', '42501'), ('q2', 'failed', '42501'), ('q3', 'failed', '42501'), ('q4', 'failed', '42501'),
             ('q5', 'failed', '42501')$$,
    'a query that reads what its creator may not, becomes somebody else, leaves a trap, or writes as a superuser, stops its job');
SELECT isnt_empty('SELECT FROM app.secret', 'the superuser''s query has deleted nothing');
SELECT is(payout_balance('paid by query'), 1000000::bigint, 'but may read everything');
SELECT is(payout_balance('mallory'), 0::bigint, 'the operator''s may not');

CREATE ROLE payoutq_test_gone;
SELECT payout_grant('payoutq_test_gone', 'operator');
SET ROLE payoutq_test_gone;
SELECT payout_create_job_from('q7', 'SELECT ''u'' AS user_id, 1 AS amount') AS q7 \gset
RESET ROLE;
SELECT payout_revoke('payoutq_test_gone');
DROP ROLE payoutq_test_gone;
CALL payout_process();
SELECT is((SELECT status || ' ' || error_code FROM payoutq.job WHERE id = :q7), 'failed 42704', 'nor is a query run for a role that is gone');

-- what a query sets, in the session of whoever calls payout_process(), ends with it
CREATE FUNCTION app.set(text, text) RETURNS bigint LANGUAGE sql AS $$ SELECT 1 + 0 * length(set_config($1, $2, false)) $$;
SET ROLE payoutq_test_operator;
SELECT payout_create_job_from('q8', $$SELECT 'u8' AS user_id, app.set('search_path', 'evil') * app.set('synchronous_commit', 'off')
                                      * app.set('payoutq.batch_size', '7') * app.set('session_replication_role', 'origin') AS amount$$) AS q8,
       payout_create_job_from('q9', $$SELECT 'u9' || i AS user_id, app.set('search_path', 'evil') * app.set('synchronous_commit', 'off')
                                      * app.set('payoutq.batch_size', '7') * app.set('lock_timeout', '1ms') AS amount
                                        FROM generate_series(1, 3) i$$) AS q9 \gset
RESET ROLE;
CALL payout_process();
SELECT is(concat_ws(' ', current_setting('search_path'), current_setting('synchronous_commit'), current_setting('payoutq.batch_size'),
                    current_setting('lock_timeout')), '"$user", public on 500 0', 'a query leaves no setting behind');
SELECT is((SELECT status FROM payout_job_status(:q9)), 'completed', 'and is paid');
SELECT is((SELECT error_code FROM payoutq.job WHERE id = :q8), '42501', 'unless it sets what its creator may not');

-- ---------------------------------------------------------------------------
-- Operators and functions of the same names, found first
-- ---------------------------------------------------------------------------

CREATE SCHEMA evil AUTHORIZATION payoutq_test_operator;
SET ROLE payoutq_test_operator;
CREATE TABLE evil.log (who name, what text);
CREATE FUNCTION evil.note(what text) RETURNS void LANGUAGE sql AS $$ INSERT INTO evil.log VALUES (current_user, what) $$;
-- each does what the true one does, and notes who called it
DO $$
DECLARE
    o record;
BEGIN
    FOR o IN
        SELECT op.oprname, op.oprleft::regtype AS l, op.oprright::regtype AS r, op.oprresult::regtype AS result
          FROM pg_operator op
         WHERE op.oprname IN ('=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '/', '%', '||', '~', '~~', '!~~', '->>', '->')
           AND op.oprleft IN ('text'::regtype, 'bigint'::regtype, 'integer'::regtype, 'numeric'::regtype, 'name'::regtype,
                              'timestamptz'::regtype, 'boolean'::regtype, 'oid'::regtype, 'jsonb'::regtype, 'interval'::regtype)
           AND op.oprright IN ('text'::regtype, 'bigint'::regtype, 'integer'::regtype, 'numeric'::regtype, 'name'::regtype,
                              'timestamptz'::regtype, 'boolean'::regtype, 'oid'::regtype, 'jsonb'::regtype, 'interval'::regtype)
    LOOP
        EXECUTE format($f$CREATE FUNCTION evil.op(%1$s, %2$s) RETURNS %3$s LANGUAGE plpgsql AS $b$
            BEGIN PERFORM evil.note('operator'); RETURN $1 OPERATOR(pg_catalog.%4$s) $2; END $b$ $f$, o.l, o.r, o.result, o.oprname);
        EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.op)', o.oprname, o.l, o.r);
        EXECUTE format('ALTER FUNCTION evil.op(%s, %s) RENAME TO %I', o.l, o.r, 'op_' || o.oprname || o.l || o.r);
    END LOOP;
END $$;
CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('now'); RETURN pg_catalog.now(); END $$;
CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('clock_timestamp'); RETURN pg_catalog.clock_timestamp(); END $$;
CREATE FUNCTION evil.format(text, VARIADIC text[]) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('format'); RETURN $1; END $$;
CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('pg_notify'); END $$;
CREATE FUNCTION evil.left(text, integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('left'); RETURN $1; END $$;
CREATE FUNCTION evil.round(numeric, integer) RETURNS numeric LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('round'); RETURN $1; END $$;
CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('current_setting'); RETURN '500'; END $$;
CREATE FUNCTION evil.array_length(anyarray, integer) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN PERFORM evil.note('array_length'); RETURN 1; END $$;
CREATE TABLE evil.pg_class (LIKE pg_catalog.pg_class);
CREATE TABLE evil.pg_proc (LIKE pg_catalog.pg_proc);
SET search_path = evil, pg_catalog, public;

SELECT 1 + 1 \g /dev/null
RESET search_path;
SELECT isnt_empty('SELECT FROM evil.log', 'the trap works: 1 + 1 is noted');
DELETE FROM evil.log;

SET search_path = evil, pg_catalog, public;
SELECT public.payout_create_job('evil', ARRAY['a', 'b', 'c'], ARRAY[1, 2, 3], platform_fee => 1, batch_size => 1) AS job \gset
SELECT public.payout_create_job('evil2', '[{"user_id": "x", "amount": 5}]', run_at => '2100-01-01') AS later \gset
SELECT public.payout_create_job_from('evil3', 'SELECT ''q''::text AS user_id, 1::bigint AS amount') \g /dev/null
SELECT * FROM public.payout_preview_job('evil4', ARRAY['a'], ARRAY[1]) \g /dev/null
SELECT public.payout_pause_job(:later), public.payout_resume_job(:later) \g /dev/null
CALL public.payout_process();
SELECT public.payout_trigger_job(:later), public.payout_retry_job(:later), public.payout_cancel_job(:later) \g /dev/null
SELECT public.payout_deposit('a', 1, 'e1'), public.payout_withdraw('a', 1, 'e2') \g /dev/null
SELECT public.payout_balance('a'), public.payout_balance('@platform'), public.payout_split(5, '{1,2}') \g /dev/null
SELECT public.payout_wait_for_job(:job, '1 s') \g /dev/null
SELECT * FROM public.payout_job_status(:job), public.payout_statement('a'), public.payout_verify() \g /dev/null
SELECT count(*) FROM public.payout_jobs, public.payout_entries \g /dev/null
SELECT count(*) FROM public.payout_ledger, public.payout_batches, public.payout_failed_entries, public.payout_accounts \g /dev/null
SELECT count(*) FROM public.payout_workers, public.payout_stats, public.payout_health \g /dev/null
SELECT public.payout_create_challenge('evil', '2100-01-01', 'a', 'b', 'c', min_stakes => 1, fee_bps => 1) AS challenge,
       public.payout_create_challenge('evil2', '2100-01-01') AS challenge2 \gset
SELECT public.payout_place_stake(:challenge, 'a', 'YES', 1, 'e3'), public.payout_place_stake(:challenge2, 'a', 'YES', 1),
       public.payout_add_evidence(:challenge, 'a', '1') \g /dev/null
SELECT public.payout_run_notifications('2099-12-31 23:55'), public.payout_run_deadlines('2100-01-01') \g /dev/null
SELECT public.payout_cancel_challenge(:challenge2), public.payout_mark_notification_read((SELECT min(id) FROM public.payout_notifications)) \g /dev/null
SELECT * FROM public.payout_resolve_challenge(:challenge, 'challenger_won') \g /dev/null
CALL public.payout_process();
SELECT count(*) FROM public.payout_challenges, public.payout_challenges_awaiting, public.payout_stakes \g /dev/null
SELECT count(*) FROM public.payout_notifications, public.payout_schedules \g /dev/null
SELECT public.payout_set_destination('e' || i, 'bank', 'x') FROM pg_catalog.generate_series(1, 5) i \g /dev/null
SELECT public.payout_create_job('evil5', ARRAY['e1', 'e2', 'e3', 'e4', 'e5', 'e6'], ARRAY[1, 2, 4, 8, 16, 32], provider => 'bank') AS wired2 \gset
CALL public.payout_process();
SELECT public.payout_set_destination('e5', 'bank', NULL) \g /dev/null
-- some that others have left come first
CREATE TEMP TABLE claim AS SELECT * FROM public.payout_claim_transfers('bank', 9, '1 hour') WHERE user_id OPERATOR(pg_catalog.~~) 'e%';
SELECT public.payout_transfer_sent(transfer_id, attempt_token, 'e1') FROM claim WHERE user_id OPERATOR(pg_catalog.=) 'e1' \g /dev/null
SELECT public.payout_transfer_completed(transfer_id, attempt_token, 'e2') FROM claim WHERE user_id OPERATOR(pg_catalog.=) 'e2' \g /dev/null
SELECT public.payout_transfer_failed(transfer_id, attempt_token, 'transient') FROM claim WHERE user_id OPERATOR(pg_catalog.=) 'e3' \g /dev/null
SELECT public.payout_transfer_failed(transfer_id, attempt_token, 'permanent') FROM claim WHERE user_id OPERATOR(pg_catalog.=) 'e4' \g /dev/null
SELECT public.payout_retry_transfer(transfer_id) FROM claim WHERE user_id OPERATOR(pg_catalog.=) ANY (ARRAY['e3', 'e4']) \g /dev/null
SELECT public.payout_confirm_transfer('bank', 'e1', true) \g /dev/null
SELECT count(*) FROM public.payout_transfers, public.payout_attempts, public.payout_stuck_transfers() \g /dev/null
SELECT public.payout_retry_job(:wired2), public.payout_cancel_job(:wired2) \g /dev/null
DROP TABLE claim;
RESET search_path;
RESET ROLE;
SELECT results_eq(format('SELECT status, completed_count FROM payout_job_status(%s)', :job), $$VALUES ('completed', 3::bigint)$$,
    'with an evil search_path a job is paid as ever');
SELECT is((SELECT amount FROM payout_entries WHERE user_id = 'q'), 1::bigint, 'also one of a query');
SELECT results_eq(format('SELECT status FROM payout_challenges WHERE id IN (%s, %s) ORDER BY id', :challenge, :challenge2),
    $$VALUES ('completed'), ('cancelled')$$, 'and a challenge is resolved, or cancelled');
SELECT set_eq(format('SELECT type, count(*) FROM payout_notifications WHERE challenge_id = %s GROUP BY 1', :challenge),
    $$VALUES ('challenge_ending_10_mins', 3::bigint), ('challenge_pending_review', 3), ('payout_received', 1)$$, 'and its people are told');
SELECT is((SELECT string_agg(user_id || ' ' || status, ', ' ORDER BY user_id) FROM payout_transfers WHERE job_id = :wired2),
    'e1 completed, e2 completed, e3 failed_terminal, e4 failed_terminal, e5 processing, e6 failed_terminal', 'transfers, too');
SELECT is_empty($$SELECT * FROM evil.log WHERE who <> 'payoutq_test_operator'$$, 'and nothing of it ran with other rights');
SELECT is_empty($$SELECT what, count(*) FROM evil.log GROUP BY 1$$, 'nor at all');

-- ---------------------------------------------------------------------------
-- CREATE EXTENSION into a schema where somebody has prepared traps
-- ---------------------------------------------------------------------------

DROP EXTENSION payoutq CASCADE;
CREATE SCHEMA trapped AUTHORIZATION payoutq_test_operator;
DO $$
DECLARE
    o record;
BEGIN
    -- the exact types, which beat the polymorphic and the converted ones
    FOR o IN
        SELECT op.oprname, l, r FROM (VALUES ('=', 'oid', 'regclass'), ('||', 'text', 'bigint'), ('*', 'numeric', 'integer'),
                                             ('=', 'name', 'text'), ('||', 'text', 'text')) AS op (oprname, l, r)
    LOOP
        EXECUTE format($f$CREATE FUNCTION trapped.op(%1$s, %2$s) RETURNS %3$s LANGUAGE plpgsql AS $b$
            BEGIN RAISE EXCEPTION 'trapped: %4$s'; END $b$ $f$, o.l, o.r,
            CASE o.oprname WHEN '=' THEN 'boolean' WHEN '*' THEN 'numeric' ELSE 'text' END, o.oprname);
        EXECUTE format('CREATE OPERATOR trapped.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = trapped.op)', o.oprname, o.l, o.r);
    END LOOP;
END $$;
SELECT lives_ok('CREATE EXTENSION payoutq SCHEMA trapped', 'an operator prepared in its schema is not called by the script');
SELECT is_empty(
    $$SELECT d.classid::regclass, d.objid FROM pg_depend d
       WHERE (d.refclassid = 'pg_operator'::regclass AND d.refobjid IN (SELECT oid FROM pg_operator WHERE oprnamespace = 'trapped'::regnamespace)
              OR d.refclassid = 'pg_proc'::regclass AND d.refobjid IN (SELECT oid FROM pg_proc
                                                                        WHERE pronamespace = 'trapped'::regnamespace AND proname = 'op'))
         AND d.classid NOT IN ('pg_operator'::regclass, 'pg_proc'::regclass)$$,
    'and built into no view, index or default');
SELECT is(trapped.payout_create_job('other schema', ARRAY['a'], ARRAY[1]) > 0, true, 'the extension works in another schema');
CALL trapped.payout_process();
SELECT is(trapped.payout_balance('a'), 1::bigint, 'and pays there');
SELECT is_empty('SELECT * FROM trapped.payout_verify() WHERE NOT ok', 'and its books balance');
SELECT lives_ok('SELECT trapped.payout_grant(''payoutq_test_reader'', ''reader'')', 'and can be granted');
SELECT lives_ok('SELECT count(*) FROM trapped.payout_ledger, trapped.payout_jobs, trapped.payout_health', 'and its views can be read');

-- ---------------------------------------------------------------------------
-- CREATE EXTENSION where new objects are given to everybody
-- ---------------------------------------------------------------------------

DROP EXTENSION payoutq;
BEGIN;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC, payoutq_test_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC, payoutq_test_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO payoutq_test_nobody;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC, payoutq_test_nobody;
CREATE TABLE app.given ();
SELECT ok(has_table_privilege('payoutq_test_nobody', 'app.given', 'DELETE'), 'a new table is everybody''s');
CREATE EXTENSION payoutq;
SELECT pg_temp.read_extension();
SELECT is_empty('SELECT * FROM pg_temp.callable(''payoutq_test_nobody'')', 'but no function of the extension is');
SELECT isnt_empty('SELECT FROM relations', '(it has tables)');
SELECT is_empty('SELECT * FROM pg_temp.rights(''payoutq_test_nobody'')', 'nor any of its tables, views and sequences');
SELECT ok(NOT has_schema_privilege('payoutq_test_nobody', 'payoutq', 'USAGE, CREATE'), 'nor its schema');
ROLLBACK;
SELECT lives_ok('CREATE EXTENSION payoutq', 'all of that rolled back, it can be created again');

SELECT finish();
DROP SCHEMA app, evil, trapped CASCADE;
DROP ROLE payoutq_test_nobody, payoutq_test_reader, payoutq_test_operator, payoutq_test_admin;
