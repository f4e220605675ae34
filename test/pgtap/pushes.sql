-- Notifications that are to be pushed: the provider, the queue, claims and what
-- is recorded of them. Nothing is sent: the test claims what the dispatcher would.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(77);

-- ---------------------------------------------------------------------------
-- The provider
-- ---------------------------------------------------------------------------

CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT throws_ok('CREATE SERVER bad FOREIGN DATA WRAPPER payout_provider OPTIONS (' || options || ')', code, NULL, options)
  FROM (VALUES
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com''',                                                    'HV002'),
    ('kind ''pusher'', app_id ''3''',                                                                              'HV002'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''''',                                       '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3/4''',                                    '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''ä''',                                      '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com?a=b'', app_id ''3''',                                  '22023'),
    ('kind ''pusher'', base_url ''http://api-eu.pusher.com'', app_id ''3''',                                       '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''everybody''',               '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''%s%s''',                    '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''%d-%s''',                   '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''user %s''',                 '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''%s/x''',                    '22023'),
    ('kind ''pusher'', base_url ''https://api-eu.pusher.com'', app_id ''3'', channel ''%s' || repeat('x', 163) || '''', '22023'),
    ('kind ''stripe'', base_url ''https://api.stripe.com'', app_id ''3''',                                         'HV00D'),
    ('kind ''webhook'', base_url ''https://example.com'', channel ''%s''',                                         'HV00D'),
    ('kind ''external'', channel ''%s''',                                                                          'HV00D')
  ) AS t (options, code);
SELECT throws_ok('CREATE USER MAPPING FOR PUBLIC SERVER bank OPTIONS (secret '''')', '22023', NULL, 'an empty secret');

CREATE FUNCTION pg_temp.insert(who text, at timestamptz DEFAULT now()) RETURNS bigint LANGUAGE sql AS $$
    INSERT INTO payoutq.notification (user_id, type, title, body, urgency, data, created_at, push_after)
    VALUES (who, 'test', 'Title', 'Body', 'high', '{"due": [1]}', at, (SELECT payoutq.push_at())) RETURNING id
$$;
SELECT pg_temp.insert('early') \g /dev/null
SELECT is((SELECT push_after FROM payoutq.notification), NULL, 'without a provider nothing is queued');
SELECT is(payoutq.sending_due(), NULL, 'nor due');
CREATE SERVER push FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'pusher', base_url 'https://api-eu.pusher.com', app_id '3', channel '%s');
CREATE SERVER a_second FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'pusher', base_url 'https://api-eu.pusher.com', app_id '4');
SELECT lives_ok('CREATE USER MAPPING FOR PUBLIC SERVER push OPTIONS (api_key ''k'', secret ''s'')', 'key and secret');
SELECT is(payoutq.push_provider(), 'push', 'of two, the first pushes');
SELECT results_eq('SELECT name FROM payoutq.sending_providers()', ARRAY['push'::text], 'and is the only one that the dispatcher has');
SELECT results_eq('SELECT provider, kind FROM payout_providers ORDER BY 1',
    $$VALUES ('a_second', 'pusher'), ('bank', 'external'), ('push', 'pusher')$$, 'payout_providers has both');
SELECT is(payoutq.sending_due(), NULL, 'what was there before is not due');

-- It makes no transfers.
SELECT throws_ok(call, '22023', 'provider "push" does not make transfers', call)
  FROM unnest(ARRAY['SELECT payout_create_job(''j'', ARRAY[''a''], ARRAY[1], provider => ''push'')',
                    'SELECT payout_create_job(''j'', ''[{"user_id": "a", "amount": 1}]'', provider => ''push'')',
                    'SELECT payout_create_job_from(''j'', ''SELECT 1'', provider => ''push'')',
                    'SELECT * FROM payout_preview_job(''j'', ARRAY[''a''], ARRAY[1], provider => ''push'')',
                    'SELECT payout_set_destination(''a'', ''push'', ''x'')',
                    'SELECT * FROM payout_claim_transfers(''push'')',
                    'SELECT payout_on_confirm(''push'', NULL)']) AS call;

-- ---------------------------------------------------------------------------
-- Claims
-- ---------------------------------------------------------------------------

-- 'ann 2, bob 4': who is told, and of which notification
CREATE FUNCTION pg_temp.claim(max_count integer DEFAULT 100, VARIADIC busy text[] DEFAULT '{}') RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(c.user_id || ' ' || c.notification_id, ', ' ORDER BY c.notification_id) FROM payoutq.claim_pushes(max_count, busy) c
$$;
CREATE FUNCTION pg_temp.record(id bigint, outcome text, reason text DEFAULT NULL, retry_after integer DEFAULT NULL) RETURNS void LANGUAGE sql AS $$
    SELECT payoutq.record_push(id, (SELECT n.push_attempts FROM payoutq.notification n WHERE n.id = record.id), 'push', outcome, reason, retry_after)
$$;
CREATE FUNCTION pg_temp.state(id bigint) RETURNS text LANGUAGE sql AS $$
    SELECT concat_ws(', ', CASE WHEN n.push_after IS NOT NULL THEN 'due' END, CASE WHEN n.pushed_at IS NOT NULL THEN 'pushed' END,
                     n.push_attempts, n.push_error)
      FROM payoutq.notification n WHERE n.id = state.id
$$;
-- As if the time had come
CREATE FUNCTION pg_temp.wait() RETURNS void LANGUAGE sql AS $$
    UPDATE payoutq.notification SET push_after = least(push_after, now()) WHERE push_after IS NOT NULL;
    UPDATE payoutq.circuit SET open_until = now();
$$;

SELECT pg_temp.insert(u) FROM unnest(ARRAY['ann', 'ann', 'bob', 'carl', 'ann']) AS u \g /dev/null
SELECT ok(payoutq.sending_due() <= clock_timestamp(), 'what is written now is due');
SELECT is(pg_temp.claim(2), 'ann 2, bob 4', 'the first of each user, as many as wanted');
SELECT is(pg_temp.state(2), '1, no answer was recorded', 'what is claimed is not due any more, whatever becomes of it');
SELECT is(pg_temp.claim(100, 'ann', 'bob'), 'carl 5', 'not of users who are being told');
SELECT is(pg_temp.claim(100, 'ann', 'bob', 'carl'), NULL, 'nothing else');
SELECT pg_temp.record(2, 'completed') \g /dev/null
SELECT is(pg_temp.state(2), 'pushed, 1', 'one that was pushed');
SELECT ok(pushed_at <= clock_timestamp() AND pushed_at > now() - interval '1 min' AND push_error IS NULL, 'says when')
  FROM payout_notifications WHERE id = 2;
SELECT pg_temp.record(2, outcome, 'late') FROM unnest(ARRAY['unknown', 'unreachable', 'refused']) AS outcome \g /dev/null
SELECT is(pg_temp.state(2), 'pushed, 1', 'nothing changes that');
SELECT is((SELECT count(*) FROM payoutq.circuit), 0::bigint, 'nor has any effect');

-- What may have been done
SELECT pg_temp.record(4, outcome, 'HTTP 500') FROM unnest(ARRAY['unknown']) AS outcome \g /dev/null
SELECT is(pg_temp.state(4), '1, HTTP 500', 'what may have been done is not due again');
SELECT pg_temp.record(5, 'permanent', repeat('x', 1001)) \g /dev/null
SELECT is(pg_temp.state(5), '1, ' || repeat('x', 1000), 'nor what will never be done');
SELECT is(pg_temp.claim(), 'ann 3', 'then the next of the user');

-- What was not done
SELECT pg_temp.record(3, 'unreachable', 'no connection', 600) \g /dev/null
SELECT is(pg_temp.state(3), 'due, 1, no connection', 'what was not done is due again');
SELECT is(pg_temp.state(6), 'due, 0', 'before what comes after it');
SELECT ok(push_after > clock_timestamp() + interval '9 min', 'when the service says') FROM payoutq.notification WHERE id = 3;
SELECT is((SELECT count(DISTINCT push_after) FROM payoutq.notification WHERE id IN (3, 6)), 1::bigint, 'and what comes after it not before');
SELECT ok(open_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 s', 'for a second the service is left alone')
  FROM payout_providers WHERE provider = 'push';
SELECT ok(payoutq.sending_due() > clock_timestamp() + interval '9 min', 'and nothing is due');
UPDATE payoutq.circuit SET open_until = now() + interval '1 h';
SELECT is(payoutq.sending_due(), (SELECT open_until FROM payoutq.circuit), 'nor while it is left alone');
SELECT pg_temp.insert('ann') \g /dev/null
SELECT is(pg_temp.claim(), NULL, 'a new one of the user does not overtake it');
SELECT pg_temp.wait() \g /dev/null
SELECT is(pg_temp.claim(), 'ann 3', 'it comes first again');
SELECT payoutq.record_push(3, 1, 'push', 'completed', NULL, NULL) \g /dev/null
SELECT is(pg_temp.state(3), '2, no answer was recorded', 'an answer to an earlier attempt does not count');
SELECT pg_temp.record(3, 'refused', 'HTTP 401') \g /dev/null
SELECT is(pg_temp.state(3), 'due, 2, HTTP 401', 'one that was refused is due again');
SELECT ok(push_after < clock_timestamp() + interval '1 s', 'in a moment') FROM payoutq.notification WHERE id = 3;
SELECT ok(open_until > clock_timestamp() + interval '30 s', 'when the service is called again, after minutes')
  FROM payout_providers WHERE provider = 'push';
SELECT pg_temp.wait() \g /dev/null
SELECT is(pg_temp.claim(), 'ann 3', 'there is no limit');
SELECT pg_temp.record(3, 'throttled', 'HTTP 429', 600) \g /dev/null
SELECT ok(push_after > clock_timestamp() + interval '9 min', 'one that was too many is due when the service says') FROM payoutq.notification WHERE id = 3;
SELECT pg_temp.wait() \g /dev/null
SELECT is(pg_temp.claim(), 'ann 3', 'then');
SELECT pg_temp.record(3, 'completed') \g /dev/null
SELECT is((SELECT count(*) FROM payoutq.circuit), 0::bigint, 'a success ends the waiting');
SELECT is(pg_temp.claim(), 'ann 6', 'the next');
SELECT pg_temp.record(6, 'completed') \g /dev/null
SELECT is(pg_temp.claim(), 'ann 7', 'and the next');
SELECT pg_temp.record(7, 'completed') \g /dev/null
SELECT is(payoutq.sending_due(), NULL, 'nothing is due any more');

-- What is pushed
SELECT pg_temp.insert('doris', '2100-01-01 12:00') AS doris \gset
SELECT is((SELECT data::jsonb FROM payoutq.claim_pushes(1, '{}')), (SELECT to_jsonb(n) - 'user_id' - 'read_at' - 'pushed_at' - 'push_error'
                                                                     FROM payout_notifications n WHERE user_id = 'doris'), 'all that is in the view');

-- ---------------------------------------------------------------------------
-- Too old, restored, waiting
-- ---------------------------------------------------------------------------

SELECT pg_temp.insert('eve', now() - age) FROM unnest(ARRAY[interval '25 h', '24 h', '23 h', '11 min', '9 min']) AS age \g /dev/null
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'unpushed_notifications'$$, 'VALUES (false, 4::numeric)',
    'what waits for more than ten minutes is an alert');
SELECT matches(pg_temp.claim(), '^eve \d+$', 'one is claimed');
SELECT results_eq($$SELECT push_error, push_attempts FROM payoutq.notification WHERE user_id = 'eve' ORDER BY id$$,
    $$VALUES ('too old', 0), ('too old', 0), ('no answer was recorded', 1), (NULL, 0), (NULL, 0)$$, 'which is not older than a day');
UPDATE payoutq.notification SET push_error = 'HTTP 503', created_at = now() - interval '2 days' WHERE user_id = 'eve' AND push_after IS NOT NULL;
SELECT is(pg_temp.claim(), NULL, 'those that became too old');
SELECT results_eq($$SELECT DISTINCT push_error FROM payout_notifications WHERE user_id = 'eve' ORDER BY 1 DESC$$,
    ARRAY['too old, HTTP 503', 'too old', 'no answer was recorded'], 'say what else there was');
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'unpushed_notifications'$$, 'VALUES (true, 0::numeric)', 'and are no alert');

SELECT pg_temp.insert('fay') AS fay \gset
SELECT payout_arm_sending();
SELECT is(pg_temp.state(:fay), 'due, 0', 'arming where sending is armed changes nothing');
UPDATE payoutq.sending SET timeline = 'other';
SELECT payout_arm_sending();
SELECT is(pg_temp.state(:fay), '0, the original may have pushed it', 'after a restore it gives up what was due');
SELECT pg_temp.insert('fay') AS fay \gset
SELECT is(pg_temp.state(:fay), 'due, 0', 'and what happens from then on is due');
DROP SERVER push CASCADE;
SELECT is(payoutq.push_provider(), 'a_second', 'without it, the next pushes');

-- ---------------------------------------------------------------------------
-- Notifications of challenges
-- ---------------------------------------------------------------------------

SELECT payout_deposit(u, 100, u) FROM unnest(ARRAY['ann', 'bob']) u \g /dev/null
SELECT payout_create_challenge('Chess', '2100-01-01 12:00', 'carl', 'ann', 'bob') AS c \gset
SELECT payout_place_stake(:c, 'ann', 'YES', 10), payout_place_stake(:c, 'bob', 'NO', 10) \g /dev/null
SELECT payout_run_notifications('2100-01-01 11:30') + payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_resolve_challenge(:c, 'draw') \g /dev/null
CALL payout_process();
SELECT payout_create_challenge('Chess', '2100-01-01 12:00', 'carl', 'ann', 'bob') AS c \gset
SELECT payout_place_stake(:c, 'ann', 'YES', 10), payout_place_stake(:c, 'bob', 'NO', 10) \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_resolve_challenge(:c, 'challenger_won') \g /dev/null
CALL payout_process();
SELECT results_eq($$SELECT type, count(*), count(push_after) FROM payoutq.notification WHERE challenge_id IS NOT NULL GROUP BY 1 ORDER BY 1$$,
    $$VALUES ('challenge_ending_1_hour', 3::bigint, 3::bigint), ('challenge_pending_review', 6, 6), ('payout_received', 1, 1)$$,
    'of all kinds they are to be pushed');

-- ---------------------------------------------------------------------------
-- A long queue
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.plan_of(query text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    line text;
    plan text := '';
BEGIN
    FOR line IN EXECUTE 'EXPLAIN (COSTS OFF) ' || query LOOP
        plan := plan || line || E'\n';
    END LOOP;
    RETURN plan;
END $$;
INSERT INTO payoutq.notification (user_id, type, title, body, urgency, created_at, push_after)
SELECT 'u' || i, 'test', 't', 'b', 'normal', now(), CASE WHEN i % 10 = 0 THEN now() END FROM generate_series(1, 50000) i;
ANALYZE payoutq.notification;
SELECT matches(pg_temp.plan_of('SELECT min(push_after) FROM payoutq.notification WHERE push_after IS NOT NULL'),
    'Index Only Scan using notification_push ', 'what is due first is one probe');
SELECT matches(pg_temp.plan_of('SELECT count(*) FROM payoutq.notification WHERE push_after IS NOT NULL AND created_at < now() - interval ''1 day'''),
    'using notification_push_created', 'so is what is too old');

SELECT finish();
