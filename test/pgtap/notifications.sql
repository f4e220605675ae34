-- payout_run_notifications(): who is told what, when, and once. The clock is
-- its argument; challenges are due at noon.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(101);

SELECT payout_deposit(u, 1000000, 'd ' || u) FROM unnest(ARRAY['ann', 'bob']) u \g /dev/null

-- An active challenge, with a stake that says nothing about its roles
CREATE FUNCTION pg_temp.active(title text, due_at timestamptz DEFAULT '2100-01-01 12:00', creator text DEFAULT 'carl',
                               challenger text DEFAULT 'ann', challenged text DEFAULT 'bob') RETURNS bigint LANGUAGE sql AS $$
    SELECT c + 0 * payout_place_stake(c, 'ann', 'YES', 1, at => '2000-01-01')
      FROM payout_create_challenge(title, due_at, creator, challenger, challenged, min_stakes => 1) AS c
$$;
-- So that the next test begins with none
CREATE FUNCTION pg_temp.close_all() RETURNS void LANGUAGE sql AS $$
    SELECT payout_cancel_challenge(id) FROM payout_challenges WHERE status IN ('pending', 'active', 'pending_admin') AND result IS NULL
$$;
-- A run, and what it has written: user, type without its common beginning
CREATE FUNCTION pg_temp.run(at timestamptz) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    before bigint := (SELECT coalesce(max(id), 0) FROM payout_notifications);
    written integer := payout_run_notifications(at);
BEGIN
    IF written <> (SELECT count(*) FROM payout_notifications WHERE id > before) THEN
        RETURN 'returned ' || written;
    END IF;
    RETURN (SELECT coalesce(string_agg(user_id || ' ' || replace(type, 'challenge_', ''), ', ' ORDER BY challenge_id, user_id), 'nobody')
              FROM payout_notifications WHERE id > before);
END $$;
-- The same, undone again
CREATE FUNCTION pg_temp.would_run(at timestamptz) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RAISE SQLSTATE 'UNDO0' USING MESSAGE = pg_temp.run(at);
EXCEPTION WHEN SQLSTATE 'UNDO0' THEN
    RETURN SQLERRM;
END $$;

SELECT is_empty(
    $$SELECT unnest(ARRAY['id', 'user_id', 'type', 'title', 'body', 'urgency', 'challenge_id', 'job_id', 'data', 'created_at', 'read_at', 'pushed_at'])
      EXCEPT SELECT attname FROM pg_attribute WHERE attrelid = 'payout_notifications'::regclass AND attnum > 0$$,
    'payout_notifications has all its columns');
SELECT is(payout_run_notifications('2100-01-01 12:00'), 0, 'without any challenge nobody is told anything');

-- ---------------------------------------------------------------------------
-- What is told when: an hour is 10 to 60 minutes, ten minutes are 0 to 10
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('Chess') AS chess \gset
SELECT is(pg_temp.would_run('2100-01-01 12:00'::timestamptz + after), replace(told, '*', type), format('at %s: %s', after, type))
  FROM (VALUES (interval '-1 day', 'nobody'), ('-60 min -1 us', 'nobody'), ('-60 min', 'ending_1_hour'), ('-59 min', 'ending_1_hour'),
               ('-30 min', 'ending_1_hour'), ('-11 min', 'ending_1_hour'), ('-10 min -1 us', 'ending_1_hour'),
               ('-10 min', 'ending_10_mins'), ('-5 min', 'ending_10_mins'), ('-1 us', 'ending_10_mins'),
               ('0', 'pending_review'), ('1 us', 'pending_review'), ('1 day', 'pending_review')) AS t (after, type),
       LATERAL (VALUES (CASE type WHEN 'nobody' THEN 'nobody' ELSE 'ann *, bob *, carl *' END)) AS v (told);

-- the notifications themselves
SELECT payout_run_notifications(at) FROM unnest(ARRAY['2100-01-01 11:30', '2100-01-01 11:55', '2100-01-01 12:05']::timestamptz[]) AS at \g /dev/null
SELECT results_eq(
    $$SELECT type, urgency, body ~ 'Chess', length(title) > 0, challenge_id, job_id, created_at, read_at, pushed_at, (data->>'due_at')::timestamptz, data->>'status'
        FROM payout_notifications WHERE user_id = 'carl' ORDER BY id$$,
    format($$VALUES ('challenge_ending_1_hour', 'high', true, true, %1$s::bigint, NULL::bigint, '2100-01-01 11:30'::timestamptz, NULL::timestamptz,
                     NULL::timestamptz, '2100-01-01 12:00'::timestamptz, 'active'),
                    ('challenge_ending_10_mins', 'critical', true, true, %1$s, NULL, '2100-01-01 11:55', NULL, NULL, '2100-01-01 12:00', 'active'),
                    ('challenge_pending_review', 'normal', true, true, %1$s, NULL, '2100-01-01 12:05', NULL, NULL, '2100-01-01 12:00', 'active')$$, :chess),
    'with its urgency, the challenge by title and id, and unread');
SELECT results_eq($$SELECT user_id, count(*) FROM payout_notifications GROUP BY 1 ORDER BY 1$$,
    $$VALUES ('ann' COLLATE "C", 3::bigint), ('bob', 3), ('carl', 3)$$, 'creator, challenger and challenged are told the same');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Within the last ten minutes only the second warning is sent
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('created late') \g /dev/null
SELECT is(pg_temp.run('2100-01-01 11:55'), 'ann ending_10_mins, bob ending_10_mins, carl ending_10_mins', 'a first run in the last ten minutes sends the ten-minute warning');
SELECT is(pg_temp.run('2100-01-01 11:56'), 'nobody', 'and not the other after it');
SELECT pg_temp.close_all() \g /dev/null
SELECT pg_temp.active('warned') \g /dev/null
SELECT is(pg_temp.run('2100-01-01 11:49'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'an hour-warning just before');
SELECT is(pg_temp.run('2100-01-01 11:50'), 'ann ending_10_mins, bob ending_10_mins, carl ending_10_mins',
    'does not hold back the ten-minute one: it is another kind');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Roles
-- ---------------------------------------------------------------------------

-- who is told in each of the three cases
CREATE FUNCTION pg_temp.told_to(creator text, challenger text, challenged text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_temp.close_all(), pg_temp.active('roles', creator => creator, challenger => challenger, challenged => challenged);
    RETURN concat_ws('; ', replace(pg_temp.would_run('2100-01-01 11:55'), ' ending_10_mins', ''),
                     replace(pg_temp.would_run('2100-01-01 11:30'), ' ending_1_hour', ''),
                     replace(pg_temp.would_run('2100-01-01 12:00'), ' pending_review', ''));
END $$;
SELECT is(pg_temp.told_to(creator, challenger, challenged), concat_ws('; ', told, told, told), 'roles: ' || what)
  FROM (VALUES
    ('carl', 'ann',  'bob',  'ann, bob, carl', 'three people'),
    ('ann',  'ann',  'bob',  'ann, bob',       'the creator is the challenger: once'),
    ('bob',  'ann',  'bob',  'ann, bob',       'the creator is the challenged'),
    ('carl', 'ann',  'ann',  'ann, carl',      'somebody plays against himself'),
    ('ann',  'ann',  'ann',  'ann',            'one person in all roles'),
    (NULL,   'ann',  'bob',  'ann, bob',       'no creator'),
    ('carl', NULL,   NULL,   'carl',           'only a creator'),
    (NULL,   NULL,   'bob',  'bob',            'only a challenged'),
    (NULL,   NULL,   NULL,   'nobody',         'none')
  ) AS t (creator, challenger, challenged, told, what);

SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Not twice within 30 minutes
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('window') AS window \gset
SELECT is(pg_temp.run('2100-01-01 11:00'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'window: the first run tells');
SELECT is(pg_temp.run('2100-01-01 11:00'), 'nobody', 'the same moment again does not');
SELECT is(pg_temp.run('2100-01-01 11:00:01'), 'nobody', 'nor a second later');
SELECT is(pg_temp.run('2100-01-01 11:29:59.999999'), 'nobody', 'nor just within the window');
SELECT is(pg_temp.run('2100-01-01 11:00'), 'nobody', 'nor with a clock that goes back');
SELECT pg_temp.active('another') AS another \gset
SELECT is(pg_temp.run('2100-01-01 11:29:59.999999'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'another challenge has a window of its own');
SELECT payout_cancel_challenge(:another) \g /dev/null
SELECT is(pg_temp.run('2100-01-01 11:30'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'after the window they are told again');
SELECT pg_temp.close_all() \g /dev/null

-- every 30 seconds, for two hours and a half
SELECT pg_temp.active('many runs') AS many \gset
SELECT sum(payout_run_notifications(at)) AS written FROM generate_series('2100-01-01 10:30'::timestamptz, '2100-01-01 13:00', '30 seconds') AS at \gset
SELECT is((SELECT count(*)::text FROM payout_notifications WHERE challenge_id = :many), :'written', 'over many runs all that is written is counted');
SELECT is_empty(
    format($$SELECT a.user_id, a.type, a.created_at, b.created_at FROM payout_notifications a JOIN payout_notifications b USING (user_id, type, challenge_id)
              WHERE challenge_id = %s AND a.id < b.id AND b.created_at - a.created_at < interval '30 minutes'$$, :many),
    'nobody was told the same twice within 30 minutes');
SELECT results_eq(
    format($$SELECT type, min(created_at) FROM payout_notifications WHERE challenge_id = %s AND user_id = 'carl' GROUP BY 1 ORDER BY 2$$, :many),
    $$VALUES ('challenge_ending_1_hour', '2100-01-01 11:00'::timestamptz), ('challenge_ending_10_mins', '2100-01-01 11:50'),
             ('challenge_pending_review', '2100-01-01 12:00')$$,
    'each kind began when its time came');
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE challenge_id = :many AND user_id = 'ann' AND type = 'challenge_ending_10_mins'), 1,
    'the ten-minute warning came once');
SELECT pg_temp.close_all() \g /dev/null

-- the setting
\set setting payoutq.notification_window
\set value 2h
\ir setting.psql
SELECT pg_temp.active('long window') AS long \gset
SELECT sum(payout_run_notifications(at)) FROM generate_series('2100-01-01 10:30'::timestamptz, '2100-01-01 13:00', '1 minute') AS at \g /dev/null
SELECT results_eq(format($$SELECT type, count(*) FROM payout_notifications WHERE challenge_id = %s AND user_id = 'carl' GROUP BY 1 ORDER BY 1$$, :long),
    $$VALUES ('challenge_ending_10_mins', 1::bigint), ('challenge_ending_1_hour', 1), ('challenge_pending_review', 1)$$,
    'payoutq.notification_window: in two hours each kind comes once');
SELECT pg_temp.close_all() \g /dev/null
\set value 5min
\ir setting.psql
SELECT pg_temp.active('short window') AS short \gset
SELECT is(pg_temp.run('2100-01-01 11:20'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'with a window of five minutes');
SELECT is(pg_temp.run('2100-01-01 11:24:59'), 'nobody', 'nobody is told again within it');
SELECT is(pg_temp.run('2100-01-01 11:25'), 'ann ending_1_hour, bob ending_1_hour, carl ending_1_hour', 'but after it');
\set value 30min
\ir setting.psql
SELECT is(pg_temp.run('2100-01-01 11:45'), 'nobody', 'a change counts for those who were told before');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Only active challenges with a due time
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('no due time', NULL), pg_temp.active('for ever', '2101-01-01'), payout_create_challenge('pending', '2100-01-01 12:00', 'carl') \g /dev/null
UPDATE payoutq.challenge SET due_at = 'infinity' WHERE title = 'for ever';  -- as older versions took it
SELECT pg_temp.active('cancelled') AS cancelled, pg_temp.active('closed', '2100-01-01 11:30') AS closed \gset
SELECT payout_cancel_challenge(:cancelled) \g /dev/null
SELECT payout_run_deadlines('2100-01-01 11:30') \g /dev/null
SELECT is(pg_temp.run(at::timestamptz), 'nobody', 'at ' || at || ' nobody is told of one that is not active or has no due time')
  FROM unnest(ARRAY['2100-01-01 11:30', '2100-01-01 11:55', '2100-01-01 12:00', '2100-01-02 12:00']) AS at;
SELECT throws_ok(format('SELECT payout_run_notifications(%L)', at), '22023', NULL, 'not a time: ' || coalesce(at, 'null')) FROM unnest(ARRAY[NULL, 'infinity', '-infinity']) AS at;
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Clocks that go back
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('Clock') \g /dev/null
-- a run whose time is before that of another that has committed
SELECT is(pg_temp.run('2100-01-01 11:50'), 'ann ending_10_mins, bob ending_10_mins, carl ending_10_mins', 'ten minutes before');
SELECT is(pg_temp.run('2100-01-01 11:49:59'), 'nobody', 'a run that began before, and comes after it, tells nothing');
SELECT is(pg_temp.run('2100-01-01 11:51'), 'nobody', 'and makes nobody tell again');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Several challenges at the same due time
-- ---------------------------------------------------------------------------

SELECT pg_temp.active('same ' || i) FROM generate_series(1, 20) i \g /dev/null
SELECT pg_temp.active('an hour later', '2100-01-01 13:00') \g /dev/null
SELECT is(payout_run_notifications('2100-01-01 11:30'), 60, 'twenty challenges: one run tells three people of each');
SELECT is_empty($$SELECT c.title, u FROM payout_challenges c, unnest(ARRAY['ann', 'bob', 'carl']) u WHERE c.title ~ '^same'
                  EXCEPT ALL SELECT c.title, n.user_id FROM payout_notifications n JOIN payout_challenges c ON c.id = n.challenge_id$$,
    'nobody is left out');
SELECT is(payout_run_notifications('2100-01-01 11:31'), 0, 'a second run tells nobody');
SELECT is(payout_run_notifications('2100-01-01 12:00'), 63, 'at noon they are due, and another ends within the hour');
SELECT results_eq($$SELECT c.title ~ '^same', n.type, count(*) FROM payout_notifications n JOIN payout_challenges c ON c.id = n.challenge_id
                     WHERE n.created_at = '2100-01-01 12:00' AND (c.title ~ '^same' OR c.title = 'an hour later') GROUP BY 1, 2 ORDER BY 1$$,
    $$VALUES (false, 'challenge_ending_1_hour', 3::bigint), (true, 'challenge_pending_review', 60)$$, 'each is told its own');
SELECT pg_temp.close_all() \g /dev/null

-- a title is no format string
SELECT pg_temp.active('100 %s "sure" %1$s \n') AS odd \gset
SELECT payout_run_notifications('2100-01-01 11:55') \g /dev/null
SELECT set_eq(format('SELECT body LIKE ''%%"100 \%%s "sure" \%%1$s \\n"%%'' FROM payout_notifications WHERE challenge_id = %s', :odd), ARRAY[true], 'a title stands in the text as it is');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- The full life of a challenge, with both schedulers every minute
-- ---------------------------------------------------------------------------

SELECT payout_create_challenge('Life', '2100-01-01 12:00', 'carl', 'ann', 'bob', fee_bps => 1000) AS life \gset
CREATE FUNCTION pg_temp.minutes(since time, until time) RETURNS void LANGUAGE sql AS $$
    SELECT payout_run_notifications(at), payout_run_deadlines(at)
      FROM generate_series('2100-01-01'::timestamptz + since, '2100-01-01'::timestamptz + until, '1 minute') AS at
$$;
CREATE FUNCTION pg_temp.life(who text) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(replace(n.type, 'challenge_', '') || to_char(n.created_at, ' HH24:MI'), ', ' ORDER BY n.id)
      FROM payout_notifications n JOIN payout_challenges c ON c.id = n.challenge_id WHERE c.title = 'Life' AND n.user_id = who AND n.type <> 'payout_received'
$$;
SELECT payout_place_stake(:life, 'ann', 'YES', 100, at => '2100-01-01 09:00') \g /dev/null
SELECT pg_temp.minutes('09:00', '10:00');
SELECT payout_place_stake(:life, 'bob', 'NO', 50, at => '2100-01-01 10:00') \g /dev/null
SELECT pg_temp.minutes('10:01', '11:28');
SELECT is(pg_temp.life('carl'), 'ending_1_hour 11:00', 'life: the hour-warning');
SELECT pg_temp.minutes('11:51', '11:59');
SELECT is(pg_temp.life('carl'), 'ending_1_hour 11:00, ending_10_mins 11:51', 'then the ten-minute warning');
SELECT is((SELECT status FROM payout_challenges WHERE id = :life), 'active', 'it is still open');
SELECT pg_temp.minutes('12:00', '15:00');
SELECT is((SELECT status FROM payout_challenges WHERE id = :life), 'pending_admin', 'at its due time it is closed');
SELECT is(pg_temp.life(who), 'ending_1_hour 11:00, ending_10_mins 11:51, pending_review 12:00', who || ' is told once that it awaits its result')
  FROM unnest(ARRAY['ann', 'bob', 'carl']) AS who;
SELECT payout_job_id AS life_job FROM payout_resolve_challenge(:life, 'challenger_won') \gset
SELECT is_empty(format($$SELECT FROM payout_notifications WHERE challenge_id = %s AND type = 'payout_received'$$, :life), 'resolved, nobody has been paid');
CALL payout_process();
SELECT results_eq(
    format($$SELECT user_id, urgency, job_id, data, body ~ 'Life', created_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), read_at
               FROM payout_notifications WHERE challenge_id = %s AND type = 'payout_received'$$, :life),
    format($$VALUES ('ann' COLLATE "C", 'normal', %s::bigint, '{"amount": 135, "currency": "USD"}'::jsonb, true, true, NULL::timestamptz)$$, :life_job),
    'paid, the winner is told how much');
SELECT pg_temp.minutes('15:01', '16:00');
CALL payout_process();
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE challenge_id = :life), 10, 'and then nobody anything more');

-- deadlines without the other scheduler tell as well, and either of them first
SELECT pg_temp.active('deadlines first') \g /dev/null
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 1, 'a challenge is closed');
SELECT is(pg_temp.run('2100-01-01 12:00'), 'nobody', 'whoever closes it has told already');
SELECT pg_temp.close_all() \g /dev/null

-- ---------------------------------------------------------------------------
-- Winners: once each, whatever the batches
-- ---------------------------------------------------------------------------

SELECT payout_deposit('w' || i, 1000, 'w ' || i) FROM generate_series(1, 12) i \g /dev/null
SELECT payout_create_challenge('Winners', '2100-01-01 12:00', 'carl') AS winners \gset
SELECT payout_place_stake(:winners, 'w' || i, CASE WHEN i <= 10 THEN 'YES' ELSE 'NO' END, i), payout_place_stake(:winners, 'w1', 'YES', 5)
  FROM generate_series(1, 12) i \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SET payoutq.batch_size = 3;
SELECT payout_job_id AS job FROM payout_resolve_challenge(:winners, 'challenger_won') \gset
RESET payoutq.batch_size;
CALL payout_process(2, :job);
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE job_id = :job), 6, 'two batches of three: six winners are told');
SELECT is_empty(format($$SELECT user_id FROM payout_entries WHERE job_id = %1$s AND status = 'completed'
                         EXCEPT ALL SELECT user_id FROM payout_notifications WHERE job_id = %1$s$$, :job), 'those who are paid');
CALL payout_process();
CALL payout_process();
SELECT results_eq(
    format($$SELECT user_id, type, (data->>'amount')::bigint FROM payout_notifications WHERE job_id = %s ORDER BY user_id$$, :job),
    format($$SELECT user_id, 'payout_received', amount FROM payout_entries WHERE job_id = %s ORDER BY user_id$$, :job),
    'in the end each winner is told once, and how much');
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE job_id = :job), 10, 'all ten of them, and no loser');

-- a batch that fails, is split and tried again
CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint NOT NULL CONSTRAINT few CHECK (coins <= 100 OR id <> 'g3'));
INSERT INTO app.wallet SELECT 'g' || i, 100 FROM generate_series(1, 6) i;
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'GEM') \g /dev/null
SELECT payout_create_challenge('Split', '2100-01-01 12:00', currency => 'GEM') AS split \gset
SELECT payout_place_stake(:split, 'g' || i, CASE WHEN i <= 5 THEN 'YES' ELSE 'NO' END, 100) FROM generate_series(1, 6) i \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_job_id AS job FROM payout_resolve_challenge(:split, 'challenger_won') \gset
CALL payout_process();
SELECT is((SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM payout_notifications WHERE job_id = :job), 'g1 g2 g4 g5',
    'who cannot be paid is not told that he was, and the others once');
ALTER TABLE app.wallet DROP CONSTRAINT few;
SELECT payout_trigger_job(:job) \g /dev/null
CALL payout_process();
SELECT is((SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM payout_notifications WHERE job_id = :job), 'g1 g2 g3 g4 g5',
    'but when he is');

-- neither refunds nor other jobs
SELECT payout_create_challenge('Draw', '2100-01-01 12:00') AS draw \gset
SELECT payout_place_stake(:draw, 'w1', 'YES', 1), payout_place_stake(:draw, 'w2', 'NO', 1) \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT refund_job_id AS draw_job FROM payout_resolve_challenge(:draw, 'draw') \gset
SELECT payout_create_job('ordinary', ARRAY['w1'], ARRAY[1], challenge_id => :draw) AS ordinary \gset
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:draw_job)), 'completed', 'a refund is paid');
SELECT is_empty(format('SELECT FROM payout_notifications WHERE job_id IN (%s, %s)', :draw_job, :ordinary), 'nobody has won anything by it, nor by a job of the application');

-- ---------------------------------------------------------------------------
-- Read
-- ---------------------------------------------------------------------------

SELECT min(id) AS first, max(id) AS last FROM payout_notifications WHERE read_at IS NULL \gset
SELECT payout_mark_notification_read(:first) \g /dev/null
SELECT ok(read_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), 'read, it says when') FROM payout_notifications WHERE id = :first;
SELECT is((SELECT read_at FROM payout_notifications WHERE id = :last), NULL, 'another is still unread');
SELECT read_at AS read_at FROM payout_notifications WHERE id = :first \gset
SELECT payout_mark_notification_read(:first) \g /dev/null
SELECT is((SELECT read_at FROM payout_notifications WHERE id = :first), :'read_at'::timestamptz, 'read again, it keeps the first time');
SELECT throws_ok(format('SELECT payout_mark_notification_read(%s)', id), '42704', NULL, 'no notification ' || id) FROM unnest(ARRAY['999999', 'NULL']) AS id;

-- ---------------------------------------------------------------------------
-- Retention
-- ---------------------------------------------------------------------------

\ir fresh.psql
SELECT payout_deposit('ann', 1000000, 'd') \g /dev/null
-- told three and two days ago, ten people each time, and now
SELECT payout_create_challenge('old', now() - interval '2 days', 'c' || i, min_stakes => 1) FROM generate_series(1, 10) i \g /dev/null
SELECT payout_place_stake(id, 'ann', 'YES', 1) FROM payout_challenges \g /dev/null
SELECT payout_run_notifications(now() - interval '2 days 5 minutes'), payout_run_notifications(now() - interval '2 days'), payout_run_deadlines() \g /dev/null
SELECT results_eq('SELECT type, count(*) FROM payout_notifications GROUP BY 1 ORDER BY min(id)',
    $$VALUES ('challenge_ending_10_mins', 10::bigint), ('challenge_pending_review', 20)$$, 'there are twenty old notifications and ten new ones');
SELECT throws_ok(format('SELECT payout_maintain(%s)', n), '22023', NULL, 'maintain: max_rows ' || n) FROM unnest(ARRAY['0', '-1', 'NULL']) AS n;
SELECT is(payout_maintain(), 0::bigint, 'without payoutq.retention nothing is removed');
\set setting payoutq.retention
\set value 1d
\ir setting.psql
SELECT is(payout_maintain(7), 7::bigint, 'with it, at most as many as asked for');
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE type = 'challenge_ending_10_mins'), 3, 'the oldest first');
UPDATE payoutq.notification SET created_at = now() - interval '9 days' WHERE id = (SELECT max(id) - 10 FROM payoutq.notification);
SELECT is(payout_maintain(1), 1::bigint, 'one more');
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE created_at < now() - interval '8 days'), 0, 'by their time, not their place in the table');
SELECT is(payout_maintain(), 12::bigint, 'then all that are older');
SELECT is((SELECT count(*)::int FROM payout_notifications WHERE created_at > now() - interval '1 day'), 10, 'younger ones stay');
SELECT is(payout_maintain(), 0::bigint, 'and a further call has nothing to do');
SELECT is(payout_run_notifications(now()), 0, 'what was removed is not told again');
\set value 0
\ir setting.psql
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

SELECT finish();
ALTER SYSTEM RESET payoutq.retention;
ALTER SYSTEM RESET payoutq.notification_window;
SELECT pg_reload_conf() \g /dev/null
