-- What need not be kept.

CREATE FUNCTION @extschema@.payout_maintain(max_rows integer DEFAULT 100000) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    retention interval := payoutq.setting('payoutq.retention')::interval;
    removed bigint := 0;
BEGIN
    IF max_rows IS NULL OR max_rows <= 0 THEN
        RAISE EXCEPTION 'max_rows must be greater than zero, not %', coalesce(max_rows::text, 'null')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF retention > interval '0' THEN
        DELETE FROM payoutq.notification n
         WHERE n.id IN (SELECT o.id FROM payoutq.notification o WHERE o.created_at < now() - retention LIMIT max_rows);
        GET DIAGNOSTICS removed = ROW_COUNT;
    END IF;
    -- Nobody waits for how many those are.
    DELETE FROM payoutq.webhook_event w
     WHERE (w.provider, w.event_id) IN (SELECT o.provider, o.event_id FROM payoutq.webhook_event o
                                         WHERE o.received_at < now() - interval '30 days' LIMIT max_rows);
    RETURN removed;
END $$;
COMMENT ON FUNCTION @extschema@.payout_maintain(integer) IS
'removes notifications older than payoutq.retention, if that is set, at most max_rows in a call, and returns how many; and events of web hooks older than 30 days; error: 22023';
