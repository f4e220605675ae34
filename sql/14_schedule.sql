-- Schedules, with pg_cron. Its jobs are kept in one database of the server
-- (cron.database_name); from any other they are reached through a process there.

CREATE FUNCTION payoutq.execute_in(database text, command text) RETURNS text
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'payoutq_execute_in';
COMMENT ON FUNCTION payoutq.execute_in(text, text) IS
'runs statements in another database, in a transaction of their own, as the extension''s owner, and returns the value that the last one yields';

-- Looks first, in a statement of its own, whether schema cron is pg_cron's: what
-- anybody else has put there must not be called with our rights.
CREATE FUNCTION payoutq.execute_in_cron(command text) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    cron_database text := current_setting('cron.database_name', true);
    is_local boolean := cron_database = current_database();
    is_there constant text := $sql$
        SELECT count(*) > 0 FROM pg_extension x
          JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid AND d.deptype = 'e'
         WHERE x.extname = 'pg_cron' AND d.classid = 'pg_class'::regclass AND d.objid = to_regclass('cron.job')$sql$;
    answer text;
BEGIN
    IF cron_database IS NULL THEN
        RAISE EXCEPTION 'pg_cron is not loaded'
            USING ERRCODE = 'feature_not_supported',
                  DETAIL = 'Schedules are jobs of pg_cron. Without it, workers still process jobs, at their creation and every payoutq.interval.',
                  HINT = format('Install it (on Debian, the package postgresql-%s-cron), add pg_cron to shared_preload_libraries, restart the server, and run CREATE EXTENSION pg_cron in the database cron.database_name.',
                                current_setting('server_version_num')::integer / 10000);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_database d WHERE d.datname = cron_database) THEN
        RAISE EXCEPTION 'database "%" does not exist', cron_database
            USING ERRCODE = 'feature_not_supported', DETAIL = 'It is cron.database_name.',
                  HINT = 'Create it, restart the server, and run CREATE EXTENSION pg_cron there.';
    END IF;

    IF is_local THEN
        EXECUTE is_there INTO answer;
    ELSE
        answer := payoutq.execute_in(cron_database, is_there);
    END IF;
    IF NOT answer::boolean THEN
        RAISE EXCEPTION 'extension "pg_cron" does not exist in database "%"', cron_database
            USING ERRCODE = 'feature_not_supported', DETAIL = 'That database is cron.database_name.',
                  HINT = format('Run CREATE EXTENSION pg_cron in database "%s".', cron_database);
    END IF;

    IF is_local THEN
        EXECUTE command INTO answer;
        RETURN answer;
    END IF;
    RETURN payoutq.execute_in(cron_database, command);
END $$;

-- The jobs by name. What they run does nothing when the extension is gone; names
-- are complete, so that nobody's function comes before ours.
CREATE FUNCTION payoutq.scheduled_jobs(OUT name text, OUT command text) RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 'payoutq ' || j.name,
           format('DO $$BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = ''payoutq'' AND extnamespace = %L::pg_catalog.regnamespace) THEN %s; END IF; END$$',
                  x.extnamespace::regnamespace, replace(j.command, '@', x.extnamespace::regnamespace::text))
      FROM (VALUES ('process', 'CALL @.payout_process(NULL::pg_catalog.int4, NULL::pg_catalog.int8)'),
                   ('deadlines', 'PERFORM @.payout_run_deadlines(pg_catalog.now())'),
                   ('notifications', 'PERFORM @.payout_run_notifications(pg_catalog.now())'),
                   ('maintenance', 'PERFORM @.payout_maintain(1000000::pg_catalog.int4)')) AS j (name, command),
           pg_extension x
     WHERE x.extname = 'payoutq'
$function$;

-- What is added to a name that the same role has given to another database's
-- job. Names of jobs are short, so it is not the database's name.
CREATE FUNCTION payoutq.job_suffix() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(' (%s)', d.oid) FROM pg_database d WHERE d.datname = current_database()
$$;

-- The names of this database's jobs of pg_cron, as an array.
CREATE FUNCTION payoutq.own_cron_jobs() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('%L::text[]', array_agg(j.name || s.suffix))
      FROM payoutq.scheduled_jobs() j, (VALUES (''), (payoutq.job_suffix())) AS s (suffix)
$$;

CREATE FUNCTION @extschema@.payout_schedule(process text DEFAULT '*/5 * * * *', deadlines text DEFAULT '* * * * *',
                                notifications text DEFAULT '* * * * *', maintenance text DEFAULT '30 3 * * *') RETURNS integer
LANGUAGE C AS 'MODULE_PATHNAME', 'payout_schedule';
COMMENT ON FUNCTION @extschema@.payout_schedule(text, text, text, text) IS
'makes or changes the jobs of pg_cron for this database, run as the current user: payoutq process, deadlines, notifications and maintenance, at the times given as cron expressions (null: not at all); returns how many there are; in another database than cron.database_name they stay when the transaction is rolled back; error: 0A000';

-- Its caller knows who the user is.
CREATE FUNCTION payoutq.schedule(username text, process text, deadlines text, notifications text, maintenance text) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted jsonb := (SELECT coalesce(jsonb_agg(jsonb_build_object('name', j.name, 'command', j.command, 'schedule', t.schedule)), '[]')
                       FROM payoutq.scheduled_jobs() j
                       JOIN (VALUES ('payoutq process', process), ('payoutq deadlines', deadlines),
                                    ('payoutq notifications', notifications), ('payoutq maintenance', maintenance))
                            AS t (name, schedule) USING (name)
                      WHERE t.schedule IS NOT NULL);
BEGIN
    -- In one call: each may be a transaction of its own, in another database. The
    -- lock, because another database may be choosing the same names.
    RETURN payoutq.execute_in_cron(format($sql$
        LOCK TABLE cron.job IN SHARE ROW EXCLUSIVE MODE;
        SELECT count(cron.unschedule(j.jobid)) FROM cron.job j
         WHERE j.database = %1$L AND j.jobname = ANY (%2$s)
           AND (j.username <> %3$L OR NOT EXISTS (SELECT FROM jsonb_array_elements(%4$L) w
                                                   WHERE j.jobname IN (w ->> 'name', w ->> 'name' || %5$L)));
        SELECT count(cron.schedule_in_database(
                   w ->> 'name' || CASE WHEN EXISTS (SELECT FROM cron.job j WHERE j.jobname = w ->> 'name' AND j.username = %3$L
                                                        AND j.database <> %1$L) THEN %5$L ELSE '' END,
                   w ->> 'schedule', w ->> 'command', %1$L, %3$L, true))
          FROM jsonb_array_elements(%4$L) w$sql$,
        current_database(), payoutq.own_cron_jobs(), username, wanted, payoutq.job_suffix()))::integer;
END $$;

CREATE FUNCTION @extschema@.payout_unschedule() RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT payoutq.execute_in_cron(format(
        'SELECT count(cron.unschedule(j.jobid)) FROM cron.job j WHERE j.database = %L AND j.jobname = ANY (%s)',
        current_database(), payoutq.own_cron_jobs()))::integer
$$;
COMMENT ON FUNCTION @extschema@.payout_unschedule() IS
'removes the jobs that payout_schedule() has made for this database, and returns how many; error: 0A000';

-- No row where there is no pg_cron, nor on a standby.
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
            WHERE j.database = %L AND j.jobname = ANY (%s)$sql$, current_database(), payoutq.own_cron_jobs()))::jsonb)
        AS s (name text, schedule text, command text, username text, active boolean, last_run timestamptz, result text,
              duration interval, message text);
EXCEPTION WHEN feature_not_supported THEN
    RETURN;
END $$;
CREATE VIEW @extschema@.payout_schedules AS
SELECT name, schedule, command, username, active, last_run, result, duration, message FROM payoutq.schedules();
COMMENT ON VIEW @extschema@.payout_schedules IS
'jobs of pg_cron for this database: when they run and as whom, and the start, result, duration and message of the last run; no row without pg_cron';
