-- Notifications: what people are told of a challenge, once each, and the queue of
-- those that are to be pushed to their devices.

CREATE TABLE payoutq.notification (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      text COLLATE "C" NOT NULL,
    type         text NOT NULL,
    title        text NOT NULL,
    body         text NOT NULL,
    urgency      text NOT NULL CHECK (urgency IN ('normal', 'high', 'critical')),
    challenge_id bigint,
    job_id       bigint,
    data         jsonb,
    created_at   timestamptz NOT NULL,
    read_at      timestamptz,
    pushed_at    timestamptz,
    push_after   timestamptz,               -- null: it is not to be pushed, or no longer
    push_attempts integer NOT NULL DEFAULT 0,
    push_error   text
);
CREATE INDEX notification_user ON payoutq.notification (user_id, id);
CREATE INDEX notification_created ON payoutq.notification USING brin (created_at);
CREATE INDEX notification_push ON payoutq.notification (push_after, id) WHERE push_after IS NOT NULL;
CREATE INDEX notification_push_user ON payoutq.notification (user_id, id) WHERE push_after IS NOT NULL;
CREATE INDEX notification_push_created ON payoutq.notification (created_at) WHERE push_after IS NOT NULL;
COMMENT ON TABLE payoutq.notification IS
'what people are told; kept for payoutq.retention';
SELECT pg_catalog.pg_extension_config_dump('payoutq.notification', '');
SELECT pg_catalog.pg_extension_config_dump('payoutq.notification_id_seq', '');

-- The provider that pushes: of several of the kind, the oldest.
CREATE FUNCTION payoutq.push_provider() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.srvname FROM pg_foreign_server s
      JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw AND w.fdwname = 'payout_provider',
           pg_options_to_table(s.srvoptions) o
     WHERE o.option_name = 'kind' AND o.option_value = 'pusher'
     ORDER BY s.oid LIMIT 1
$$;

-- Of a notification that is made now. Nothing is queued while nobody pushes, so
-- that the first provider does not send out all that has happened.
CREATE FUNCTION payoutq.push_at() RETURNS timestamptz
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN payoutq.push_provider() IS NOT NULL THEN clock_timestamp() END
$$;

-- The payload is the same for the whole transaction, so the server sends it once.
CREATE FUNCTION payoutq.announce_notifications() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM inserted) THEN
        PERFORM pg_notify('payoutq_notifications',
                          json_build_object('event', 'created', 'transaction_at', transaction_timestamp())::text);
    END IF;
    IF EXISTS (SELECT FROM inserted WHERE push_after IS NOT NULL) THEN
        PERFORM payoutq.wake();
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION payoutq.announce_notifications() IS
'notifies the channel payoutq_notifications, once a transaction: {"event": "created", "transaction_at"}; and wakes whoever pushes them';
CREATE TRIGGER announce AFTER INSERT ON payoutq.notification REFERENCING NEW TABLE AS inserted
    FOR EACH STATEMENT EXECUTE FUNCTION payoutq.announce_notifications();

-- Nobody is told the same twice within the window, nor what another run has
-- overtaken.
CREATE FUNCTION payoutq.may_be_told(challenge payoutq.challenge, type text, at timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT challenge.notified_at IS NULL
        OR challenge.notified_at <= at
           AND (challenge.notified_type <> type
                OR challenge.notified_at <= at - payoutq.setting('payoutq.notification_window')::interval)
$$;

-- Tells creator, challenger and challenged of each challenge what is its type.
-- The caller has locked the challenges.
CREATE FUNCTION payoutq.tell_roles(challenges bigint[], types text[], at timestamptz) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    written integer;
BEGIN
    WITH told AS (
        UPDATE payoutq.challenge c SET notified_type = t.type, notified_at = at
          FROM unnest(challenges, types) AS t (id, type)
         WHERE c.id = t.id
           AND payoutq.may_be_told(c, t.type, at)
        RETURNING c.*, t.type
    )
    INSERT INTO payoutq.notification (user_id, type, title, body, urgency, challenge_id, data, created_at, push_after)
    SELECT DISTINCT role.user_id, told.type, message.title, format(message.body, told.title), message.urgency, told.id,
           jsonb_build_object('due_at', told.due_at, 'status', told.status), at, (SELECT payoutq.push_at())
      FROM told
      JOIN (VALUES ('challenge_ending_1_hour', 'Challenge ends within an hour', 'The challenge "%s" ends within an hour.', 'high'),
                   ('challenge_ending_10_mins', 'Challenge ends within 10 minutes', 'The challenge "%s" ends within 10 minutes.', 'critical'),
                   ('challenge_pending_review', 'Challenge awaits its result', 'The challenge "%s" has ended and awaits its result.', 'normal'))
           AS message (type, title, body, urgency) ON message.type = told.type,
           LATERAL (VALUES (told.creator_id), (told.challenger_id), (told.challenged_id)) AS role (user_id)
     WHERE role.user_id IS NOT NULL
     ORDER BY told.id, role.user_id;
    GET DIAGNOSTICS written = ROW_COUNT;
    RETURN written;
END $$;

-- Only active challenges near their due time are looked at; of one that it
-- closes, payout_run_deadlines() tells. One that is locked is another run's;
-- stakes do not stand in the way.
CREATE FUNCTION @extschema@.payout_run_notifications(at timestamptz DEFAULT now()) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
    challenges bigint[];
    types text[];
BEGIN
    PERFORM payoutq.require_time(at);
    SELECT array_agg(near.id), array_agg(near.type) INTO challenges, types
      FROM (SELECT c.id, t.type
              FROM payoutq.challenge c,
                   LATERAL (SELECT CASE WHEN c.due_at <= at THEN 'challenge_pending_review'
                                        WHEN c.due_at <= at + interval '10 minutes' THEN 'challenge_ending_10_mins'
                                        ELSE 'challenge_ending_1_hour' END) AS t (type)
             WHERE c.status = 'active' AND c.due_at <= at + interval '1 hour' AND (c.origin = payoutq.origin()) IS TRUE
               AND payoutq.may_be_told(c, t.type, at)
             ORDER BY c.due_at FOR NO KEY UPDATE OF c SKIP LOCKED) near;
    RETURN CASE WHEN challenges IS NULL THEN 0 ELSE payoutq.tell_roles(challenges, types, at) END;
END $$;
COMMENT ON FUNCTION @extschema@.payout_run_notifications(timestamptz) IS
'tells creator, challenger and challenged that a challenge ends within an hour, within 10 minutes, or awaits its result, none of it twice within payoutq.notification_window, and returns how many notifications were written; error: 22023';

-- In the transaction of the batch that pays them.
CREATE FUNCTION payoutq.tell_winners(job_id bigint, first_seq integer, last_seq integer) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO payoutq.notification (user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, push_after)
    SELECT e.user_id, 'payout_received', 'Payout received',
           format('The challenge "%s" has paid you.', c.title), 'normal', c.id, e.job_id,
           jsonb_build_object('amount', e.amount, 'currency', c.currency), clock_timestamp(), (SELECT payoutq.push_at())
      FROM payoutq.challenge c
      JOIN payoutq.entry e ON e.job_id = c.job_id AND e.seq BETWEEN tell_winners.first_seq AND tell_winners.last_seq
     WHERE c.job_id = tell_winners.job_id
     ORDER BY e.seq
$$;

CREATE FUNCTION @extschema@.payout_mark_notification_read(id bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE payoutq.notification n SET read_at = coalesce(n.read_at, clock_timestamp())
     WHERE n.id = payout_mark_notification_read.id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'notification % does not exist', coalesce(id::text, 'null') USING ERRCODE = 'undefined_object';
    END IF;
END $$;
COMMENT ON FUNCTION @extschema@.payout_mark_notification_read(bigint) IS
'notes when the user has read the notification; error: 42704';

CREATE VIEW @extschema@.payout_notifications AS
WITH notification AS NOT MATERIALIZED (
    SELECT id, user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, read_at, pushed_at, push_error
      FROM payoutq.notification)
SELECT id, user_id, type, title, body, urgency, challenge_id, job_id, data, created_at, read_at, pushed_at, push_error FROM notification;
COMMENT ON VIEW @extschema@.payout_notifications IS
'what users were told: type (challenge_ending_1_hour, challenge_ending_10_mins, challenge_pending_review, payout_received, with the amount in minor units in data), urgency (normal, high, critical); unread while read_at is null; with a provider of kind pusher: when it was pushed, or why it was not, or not yet';
