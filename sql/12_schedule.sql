-- Schedules, with pg_cron. Its jobs are kept in one database of the server
-- (cron.database_name); from any other they are reached through a process there.

CREATE FUNCTION payoutq.execute_in(database text, command text) RETURNS text
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_execute_in';
COMMENT ON FUNCTION payoutq.execute_in(text, text) IS
'runs a statement in another database, in a transaction of its own, as the extension''s owner, and returns the value it yields';

CREATE FUNCTION payoutq.execute_in_cron(command text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cron_database text := current_setting('cron.database_name', true);
    answer text;
BEGIN
    IF cron_database IS NULL THEN
        RAISE EXCEPTION 'pg_cron is not loaded'
            USING ERRCODE = 'feature_not_supported',
                  DETAIL = 'Schedules are jobs of pg_cron. Without it, workers still process jobs, at their creation and every payoutq.interval.',
                  HINT = format('Install it (on Debian, the package postgresql-%s-cron), add pg_cron to shared_preload_libraries, restart the server, and run CREATE EXTENSION pg_cron in the database cron.database_name.',
                                current_setting('server_version_num')::integer / 10000);
    END IF;
    IF cron_database = current_database() THEN
        EXECUTE command INTO answer;
    ELSE
        answer := payoutq.execute_in(cron_database, command);
    END IF;
    RETURN answer;
EXCEPTION WHEN undefined_table OR undefined_function OR invalid_schema_name THEN
    RAISE EXCEPTION 'extension "pg_cron" does not exist in database "%"', cron_database
        USING ERRCODE = 'feature_not_supported', DETAIL = SQLERRM,
              HINT = format('Run CREATE EXTENSION pg_cron in database "%s", which is cron.database_name.', cron_database);
END $$;

-- The jobs of this database, whoever has scheduled them. A name that the same
-- role has given to another database's job gets this database's name added.
CREATE FUNCTION @extschema@.payout_schedule(process text DEFAULT '*/5 * * * *', deadlines text DEFAULT '* * * * *',
                                notifications text DEFAULT '* * * * *', maintenance text DEFAULT '30 3 * * *') RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT payoutq.execute_in_cron(format($sql$
        WITH wanted AS (
            SELECT w.*, w.name || CASE WHEN EXISTS (SELECT FROM cron.job j WHERE j.jobname = w.name AND j.username = %2$L
                                                       AND j.database <> %1$L) THEN %3$L ELSE '' END AS jobname
              FROM (VALUES ('payoutq process', %4$L, 'CALL @extschema@.payout_process()'),
                           ('payoutq deadlines', %5$L, 'SELECT @extschema@.payout_run_deadlines()'),
                           ('payoutq notifications', %6$L, 'SELECT @extschema@.payout_run_notifications()'),
                           ('payoutq maintenance', %7$L, 'SELECT @extschema@.payout_maintain()')) AS w (name, schedule, command)
             WHERE w.schedule IS NOT NULL
        ), superfluous AS MATERIALIZED (
            SELECT cron.unschedule(j.jobid) FROM cron.job j
             WHERE j.database = %1$L AND j.jobname LIKE 'payoutq %%'
               AND (j.username <> %2$L OR j.jobname NOT IN (SELECT w.jobname FROM wanted w))
        ), scheduled AS MATERIALIZED (
            SELECT cron.schedule_in_database(w.jobname, w.schedule, w.command, %1$L, %2$L, true) FROM wanted w
        )
        SELECT (SELECT count(*) FROM scheduled) + 0 * (SELECT count(*) FROM superfluous)$sql$,
        current_database(), session_user, format(' (%s)', current_database()),
        process, deadlines, notifications, maintenance))::integer
$$;
COMMENT ON FUNCTION @extschema@.payout_schedule(text, text, text, text) IS
'makes or changes the jobs of pg_cron for this database, run as the current user: payoutq process, deadlines, notifications and maintenance, at the times given as cron expressions (null: not at all); returns how many there are; in another database than cron.database_name they stay when the transaction is rolled back; error: 0A000';

CREATE FUNCTION @extschema@.payout_unschedule() RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT payoutq.execute_in_cron(format(
        'SELECT count(cron.unschedule(j.jobid)) FROM cron.job j WHERE j.database = %L AND j.jobname LIKE ''payoutq %%''',
        current_database()))::integer
$$;
COMMENT ON FUNCTION @extschema@.payout_unschedule() IS
'removes the jobs that payout_schedule() has made for this database, and returns how many; error: 0A000';

-- No row where there is no pg_cron.
CREATE FUNCTION payoutq.schedules()
RETURNS TABLE (name text, schedule text, command text, username text, active boolean, last_run timestamptz, result text,
               duration interval, message text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
    SELECT s.name, s.schedule, s.command, s.username, s.active, s.last_run, s.result, s.duration, s.message
      FROM jsonb_to_recordset(payoutq.execute_in_cron(format($sql$
           SELECT jsonb_agg(jsonb_build_object('name', j.jobname, 'schedule', j.schedule, 'command', j.command,
                                               'username', j.username, 'active', j.active, 'last_run', d.start_time,
                                               'result', d.status, 'duration', d.end_time - d.start_time,
                                               'message', left(d.return_message, 1000)) ORDER BY j.jobid)
             FROM cron.job j
             LEFT JOIN LATERAL (SELECT * FROM cron.job_run_details r WHERE r.jobid = j.jobid ORDER BY r.runid DESC LIMIT 1) d ON true
            WHERE j.database = %L AND j.jobname LIKE 'payoutq %%'$sql$, current_database()))::jsonb)
        AS s (name text, schedule text, command text, username text, active boolean, last_run timestamptz, result text,
              duration interval, message text);
EXCEPTION WHEN feature_not_supported THEN
    RETURN;
END $$;
CREATE VIEW @extschema@.payout_schedules AS
SELECT name, schedule, command, username, active, last_run, result, duration, message FROM payoutq.schedules();
COMMENT ON VIEW @extschema@.payout_schedules IS
'jobs of pg_cron for this database: when they run and as whom, and the start, result, duration and message of the last run; no row without pg_cron';

-- Looks at the oldest rows only, so that each call is short.
CREATE FUNCTION @extschema@.payout_maintain(max_rows integer DEFAULT 10000) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    retention interval := payoutq.setting('payoutq.retention');
    removed bigint := 0;
BEGIN
    IF max_rows IS NULL OR max_rows <= 0 THEN
        RAISE EXCEPTION 'max_rows must be greater than zero, not %', coalesce(max_rows::text, 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF retention > interval '0' THEN
        DELETE FROM payoutq.notification n
         WHERE n.id IN (SELECT old.id FROM (SELECT o.id, o.created_at FROM payoutq.notification o
                                             ORDER BY o.id LIMIT max_rows) old
                         WHERE old.created_at < now() - retention);
        GET DIAGNOSTICS removed = ROW_COUNT;
    END IF;
    RETURN removed;
END $$;
COMMENT ON FUNCTION @extschema@.payout_maintain(integer) IS
'removes notifications older than payoutq.retention, if that is set, at most max_rows in a call, and returns how many; error: 22023';
