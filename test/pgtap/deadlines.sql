-- payout_run_deadlines(): closes what is due, in one go and once. The clock is
-- its argument.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(38);

SELECT payout_deposit('ann', 1000000, 'd1'), payout_deposit('bob', 1000000, 'd2') \g /dev/null

-- An active challenge with one stake, and what its id or its title is then
CREATE FUNCTION pg_temp.active(title text, due_at timestamptz) RETURNS bigint LANGUAGE sql AS $$
    SELECT c + 0 * payout_place_stake(c, 'ann', 'YES', 1, at => '2100-01-01')
      FROM payout_create_challenge(title, due_at, min_stakes => 1) AS c
$$;
CREATE FUNCTION pg_temp.statuses(VARIADIC ids bigint[]) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(title || ' ' || status, ', ' ORDER BY id) FROM payout_challenges WHERE id = ANY (ids)
$$;

-- ---------------------------------------------------------------------------
-- What is due
-- ---------------------------------------------------------------------------

SELECT is(payout_run_deadlines('2100-01-01 12:00'), 0, 'without any challenge there is nothing to do');
SELECT pg_temp.active('before', '2100-01-01 11:59:59.999999') AS before, pg_temp.active('at', '2100-01-01 12:00') AS at,
       pg_temp.active('after', '2100-01-01 12:00:00.000001') AS after, pg_temp.active('never', NULL) AS never,
       pg_temp.active('ever', '2101-01-01') AS ever \gset
UPDATE payoutq.challenge SET due_at = 'infinity' WHERE id = :ever;  -- as older versions took it
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 2, 'due is what has its due time now, or had it before');
SELECT is(pg_temp.statuses(:before, :at, :after, :never, :ever), 'before pending_admin, at pending_admin, after active, never active, ever active',
    'those await their result; one without a due time is ignored');
SELECT set_eq(format('SELECT closed_at FROM payout_challenges WHERE id IN (%s, %s)', :before, :at), ARRAY['2100-01-01 12:00'::timestamptz],
    'they were closed by this run');
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 0, 'a second run changes nothing');
SELECT is(payout_run_deadlines('2100-01-01 12:00:00.000001'), 1, 'the next is due a moment later');
SELECT is(payout_run_deadlines('2100-01-01 11:00'), 0, 'nothing is opened again by a clock that goes back');
SELECT is(payout_run_deadlines('9999-01-01'), 0, 'without a due time a challenge is never due');
SELECT throws_ok(format('SELECT payout_run_deadlines(%L)', at), '22023', NULL, 'not a time: ' || coalesce(at, 'null')) FROM unnest(ARRAY[NULL, 'infinity', '-infinity']) AS at;
SELECT is(pg_temp.statuses(:never, :ever), 'never active, ever active', 'so those are still active');
SELECT is((SELECT closed_at FROM payout_challenges WHERE id = :at), '2100-01-01 12:00', 'and what was closed has kept its time');

-- only active ones
SELECT payout_create_challenge('pending', '2100-01-01 12:00') AS pending \gset
SELECT payout_place_stake(:pending, 'ann', 'YES', 1) \g /dev/null
SELECT pg_temp.active('cancelled', '2100-01-01 12:00') AS cancelled, pg_temp.active('completed', '2100-01-01 12:00') AS completed,
       pg_temp.active('resolved', '2100-01-01 12:00') AS resolved \gset
SELECT payout_cancel_challenge(:cancelled) \g /dev/null
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 2, 'one that was cancelled is not closed, nor one that was never active');
SELECT payout_resolve_challenge(:completed, 'draw') \g /dev/null
CALL payout_process();
SELECT payout_resolve_challenge(:resolved, 'draw') \g /dev/null
SELECT is(payout_run_deadlines('2100-01-02'), 0, 'nor one that is resolved');
SELECT is(pg_temp.statuses(:pending, :cancelled, :completed, :resolved),
    'pending pending, cancelled cancelled, completed completed, resolved pending_admin', 'all of them are as they were');
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'expired_challenges'$$, $$VALUES (true, 0::numeric)$$,
    'as long as it is not due one that is pending is no problem');
SELECT payout_create_challenge('expired', now() - interval '1 s') AS expired \gset
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'expired_challenges'$$, $$VALUES (false, 1::numeric)$$,
    'one that is due and was never active is shown by payout_health');
SELECT payout_cancel_challenge(:expired) \g /dev/null

-- the clock of the server
SELECT payout_create_challenge('now', now() - interval '1 s', min_stakes => 1) AS now,
       payout_create_challenge('later', now() + interval '1 hour', min_stakes => 1) AS later \gset
SELECT payout_place_stake(:now, 'ann', 'YES', 1), payout_place_stake(:later, 'ann', 'YES', 1) \g /dev/null
SELECT is(payout_run_deadlines(), 1, 'without an argument the time is now');
SELECT is(pg_temp.statuses(:now, :later), 'now pending_admin, later active', 'for what is due now');

BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 1, 'at any isolation level');
COMMIT;
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

-- ---------------------------------------------------------------------------
-- A hundred in one run
-- ---------------------------------------------------------------------------

SELECT payout_cancel_challenge(id) FROM payout_challenges WHERE status IN ('pending', 'active') \g /dev/null
CREATE TEMP TABLE hundred AS
SELECT payout_create_challenge('due ' || n, '2100-02-01 12:00'::timestamptz - n * interval '1 minute', 'creator' || n, 'ann', 'bob') AS id, n
  FROM generate_series(1, 100) n;
CREATE TEMP TABLE others AS
SELECT payout_create_challenge('not due ' || n, CASE WHEN n % 2 = 0 THEN '2100-02-01 12:01'::timestamptz + n * interval '1 minute' END) AS id
  FROM generate_series(1, 50) n;
SELECT payout_place_stake(id, 'ann', 'YES', n, at => '2100-01-01'), payout_place_stake(id, 'bob', 'NO', 2 * n, at => '2100-01-01'),
       payout_place_stake(id, 'bob', 'NO', 1, at => '2100-01-01') FROM hundred \g /dev/null
SELECT payout_place_stake(id, 'ann', 'YES', 1, at => '2100-01-01'), payout_place_stake(id, 'bob', 'NO', 1, at => '2100-01-01') FROM others \g /dev/null
SELECT is((SELECT count(*)::int FROM payout_challenges WHERE status = 'active'), 150, 'a hundred and fifty are active');
SELECT count(*) AS awaiting FROM payout_challenges_awaiting \gset
SELECT count(*) AS notifications FROM payout_notifications \gset
SELECT is(payout_run_deadlines('2100-02-01 12:00'), 100, 'one run closes a hundred');
SELECT is_empty('SELECT id, status FROM payout_challenges JOIN hundred USING (id) WHERE status <> ''pending_admin''', 'all that are due');
SELECT is_empty('SELECT id, status FROM payout_challenges JOIN others USING (id) WHERE status <> ''active''', 'and no other');
SELECT is_empty(
    $$SELECT n, yes_pool, no_pool, yes_stakes, no_stakes FROM hundred JOIN payout_challenges USING (id)
       WHERE (yes_pool, no_pool, pool, yes_stakes, no_stakes) IS DISTINCT FROM (n::bigint, 2::bigint * n + 1, 3::bigint * n + 1, 1::bigint, 2::bigint)$$,
    'each with its own pools');
SELECT is((SELECT count(*)::int FROM payout_challenges_awaiting) - :awaiting, 100, 'administrators see them in the list');
SELECT is((SELECT count(*)::int FROM payout_notifications) - :notifications, 300, 'three people are told of each');
SELECT is_empty(
    $$(SELECT n, u FROM hundred, unnest(ARRAY['creator' || n, 'ann', 'bob']) u)
      EXCEPT (SELECT n, user_id FROM hundred JOIN payout_notifications ON challenge_id = hundred.id
               WHERE type = 'challenge_pending_review' AND created_at = '2100-02-01 12:00' AND data->>'status' = 'pending_admin')$$,
    'creator, challenger and challenged, that it awaits its result');
SELECT is(payout_run_deadlines('2100-02-01 12:00'), 0, 'a second run closes nothing');
SELECT is((SELECT count(*)::int FROM payout_notifications) - :notifications, 300, 'and tells nobody anything');
SELECT is(payout_run_deadlines('2100-02-01 13:00'), 25, 'an hour later others are due, each once');
SELECT is(payout_run_deadlines('2100-03-01'), 0, 'and those without a due time never');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');

-- all of them are resolved, and paid in jobs of their own
SELECT count(payout_resolve_challenge(id, CASE WHEN n % 2 = 0 THEN 'challenger_won' ELSE 'challenged_won' END)) FROM hundred \g /dev/null
CALL payout_process();
SELECT is_empty('SELECT id, status FROM payout_challenges JOIN hundred USING (id) WHERE status <> ''completed''', 'all of the hundred can be resolved and paid');
SELECT is_empty(
    $$SELECT n, e.user_id, e.amount FROM hundred JOIN payout_challenges c USING (id) LEFT JOIN payout_entries e ON e.job_id = c.payout_job_id
       WHERE (e.user_id, e.amount, e.status) IS DISTINCT FROM (CASE WHEN n % 2 = 0 THEN 'ann' ELSE 'bob' END, 3::bigint * n + 1, 'completed')$$,
    'each to who has won it');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

SELECT finish();
