-- Three levels, each with what the one before has. The list is the only place
-- that says who may do what; a test holds it against the catalog. (A function
-- in a view is called with the rights of whoever reads it.)
CREATE FUNCTION payoutq.level_of(object text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT l.level FROM (VALUES
        ('reader', ARRAY['payout_job_status', 'payout_wait_for_job', 'payout_balance', 'payout_statement', 'payout_verify',
                         'payout_split', 'payout_jobs', 'payout_progress', 'payout_entries', 'payout_failed_entries', 'payout_batches',
                         'payout_accounts', 'payout_ledger', 'payout_workers', 'payout_stats', 'payout_health', 'payout_challenges',
                         'payout_challenges_awaiting', 'payout_stakes', 'payout_notifications', 'payout_schedules', 'payout_transfers', 'payout_attempts',
                         'payout_stuck_transfers', 'payout_providers', 'provider_states', 'schedules', 'sending_is_armed', 'idempotency_key', 'workers', 'xmin_holders', 'restored_jobs']),
        ('operator', ARRAY['payout_create_job', 'payout_create_job_from', 'payout_preview_job', 'payout_preview_job_from',
                           'payout_pause_job', 'payout_resume_job', 'payout_cancel_job', 'payout_retry_job',
                           'payout_trigger_job', 'payout_process', 'payout_deposit', 'payout_withdraw', 'payout_create_challenge',
                           'payout_place_stake', 'payout_add_evidence', 'payout_run_deadlines', 'payout_run_notifications',
                           'payout_resolve_challenge', 'payout_cancel_challenge', 'payout_mark_notification_read',
                           'payout_set_destination', 'payout_claim_transfers', 'payout_transfer_sent', 'payout_transfer_completed',
                           'payout_transfer_failed', 'payout_confirm_transfer', 'payout_retry_transfer', 'payout_handle_webhook', 'payout_reconcile',
                           'payout_on_settlement']),
        ('admin', ARRAY['payout_reverse_entry', 'payout_bind_accounts', 'payout_unbind_accounts', 'payout_start_worker',
                        'payout_stop_workers', 'payout_grant', 'payout_revoke', 'payout_schedule', 'payout_unschedule', 'payout_maintain',
                        'payout_on_confirm', 'payout_arm_sending', 'payout_fail_transfer'])
    ) AS l (level, objects)
    WHERE object = ANY (l.objects)
$$;

-- GRANT or REVOKE on each object of the extension that belongs to the levels.
CREATE FUNCTION payoutq.change_grants(role_name regrole, levels text[], command text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target text;
    direction text := CASE command WHEN 'GRANT' THEN 'TO' ELSE 'FROM' END;
BEGIN
    IF role_name IS NULL THEN
        RAISE EXCEPTION 'role_name must not be null' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    FOR target IN
        SELECT CASE WHEN d.classid = 'pg_proc'::regclass
                    THEN format('EXECUTE ON ROUTINE %s', d.objid::regprocedure)
                    ELSE format('SELECT ON %s', d.objid::regclass) END
          FROM pg_depend d
          JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'payoutq'
          LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
         WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
           AND payoutq.level_of(coalesce(p.proname, c.relname)) = ANY (levels)
    LOOP
        EXECUTE format('%s %s %s %s', command, target, direction, role_name);
    END LOOP;
END $$;

CREATE FUNCTION @extschema@.payout_grant(role_name regrole, level text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    levels text[] := CASE level WHEN 'reader' THEN ARRAY['reader'] WHEN 'operator' THEN ARRAY['reader', 'operator']
                                WHEN 'admin' THEN ARRAY['reader', 'operator', 'admin'] END;
    home regnamespace := (SELECT x.extnamespace FROM pg_extension x WHERE x.extname = 'payoutq');
BEGIN
    IF levels IS NULL THEN
        RAISE EXCEPTION 'invalid level "%"', coalesce(level, 'null')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Levels are reader, operator and admin.';
    END IF;
    PERFORM payoutq.change_grants(role_name, levels, 'GRANT');

    -- There may be more in the schema than the extension, so that is for its owner.
    IF NOT has_schema_privilege(role_name, home, 'USAGE') THEN
        RAISE WARNING 'role % lacks USAGE on schema %', role_name, home
            USING ERRCODE = '01007', HINT = format('GRANT USAGE ON SCHEMA %s TO %s.', home, role_name);
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_grant(regrole, text) IS
'lets a role use the extension: reader (status, balances, views), operator (also create and control jobs and challenges, deposit, withdraw), admin (also reverse, bind tables, workers, schedules, arm sending, grant); error: 22023';

CREATE FUNCTION @extschema@.payout_revoke(role_name regrole) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM payoutq.change_grants(role_name, '{reader,operator,admin}', 'REVOKE');
END $$;
COMMENT ON FUNCTION @extschema@.payout_revoke(regrole) IS 'takes back from a role what payout_grant() gave; error: 22023';

-- Nothing for PUBLIC, nor for whom ALTER DEFAULT PRIVILEGES names: functions are
-- executable by everybody unless revoked.
DO $$
DECLARE
    command text;
BEGIN
    FOR command IN
        SELECT format('REVOKE ALL ON %s FROM %s', o.target,
                      CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
          FROM pg_depend d
          JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'payoutq'
         CROSS JOIN LATERAL (
               SELECT 'ROUTINE ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
                 FROM pg_proc p WHERE d.classid = 'pg_proc'::regclass AND p.oid = d.objid
               UNION ALL
               SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || c.oid::regclass, c.relacl, c.relowner
                 FROM pg_class c WHERE d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'v', 'S')
               UNION ALL
               SELECT 'SCHEMA ' || n.oid::regnamespace, n.nspacl, n.nspowner
                 FROM pg_namespace n WHERE d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
               ) AS o (target, acl, owner)
         CROSS JOIN LATERAL aclexplode(o.acl) a
         WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND a.grantee <> o.owner
         GROUP BY 1
    LOOP
        EXECUTE command;
    END LOOP;
END $$;

-- The launcher learns of the database when this commits.
SELECT payoutq.wake();
