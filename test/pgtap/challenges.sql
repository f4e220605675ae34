-- Challenges: stakes, activation, evidence, resolving, refunds, cancelling.
-- The clock is an argument: all of it happens on one day, far in the future.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(240);

-- A challenge that is due at noon, with these stakes: user, side, amount. Each
-- user gets the money for it first.
CREATE FUNCTION pg_temp.stake(challenge bigint, who text, side text, amount bigint, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE sql AS $$
    SELECT payout_place_stake(challenge, who, side, amount, at => '2100-01-01 11:00')
      FROM payout_deposit(who, amount, 'for a stake: ' || gen_random_uuid(), currency)
$$;
CREATE FUNCTION pg_temp.challenge(stakes jsonb, fee_bps integer DEFAULT 0, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    id bigint := payout_create_challenge('Chess', '2100-01-01 12:00', fee_bps => fee_bps, currency => currency);
BEGIN
    PERFORM pg_temp.stake(id, s->>0, s->>1, (s->>2)::bigint, currency) FROM jsonb_array_elements(stakes) WITH ORDINALITY AS t (s, n) ORDER BY n;
    RETURN id;
END $$;
-- one that is closed already
CREATE FUNCTION pg_temp.closed(stakes jsonb, fee_bps integer DEFAULT 0, currency text DEFAULT 'USD') RETURNS bigint
LANGUAGE sql AS $$
    SELECT id + 0 * payout_run_deadlines('2100-01-01 12:00') FROM pg_temp.challenge(stakes, fee_bps, currency) AS id
$$;
CREATE FUNCTION pg_temp.status(challenge bigint) RETURNS text LANGUAGE sql AS $$
    SELECT status FROM payout_challenges WHERE id = challenge
$$;
-- 'ann 12, bob 3': what the job has paid, all of it
CREATE FUNCTION pg_temp.paid(job bigint) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(user_id || ' ' || amount, ', ' ORDER BY user_id) FROM payout_entries WHERE job_id = job AND status = 'completed'
$$;

-- ---------------------------------------------------------------------------
-- The views have the columns of the API
-- ---------------------------------------------------------------------------

SELECT is_empty(
    format($$SELECT unnest(%L::text[]) EXCEPT SELECT attname FROM pg_attribute WHERE attrelid = %L::regclass AND attnum > 0$$, columns, view),
    view || ' has all its columns')
  FROM (VALUES
    ('payout_challenges', '{id,title,status,result,due_at,creator_id,challenger_id,challenged_id,pool,yes_pool,no_pool,fee_bps,'
                          'payout_job_id,created_at,resolved_at,completed_at}'),
    ('payout_challenges_awaiting', '{id,title,due_at,age,pool,yes_pool,no_pool}'),
    ('payout_stakes', '{id,challenge_id,user_id,side,amount,status,created_at,matched_at}')
  ) AS t (view, columns);

-- ---------------------------------------------------------------------------
-- Create
-- ---------------------------------------------------------------------------

SELECT payout_create_challenge('Who wins?', '2100-01-01 12:00', 'carl', 'yes-man', 'no-man', 'A game of chess', 'chess',
                               250, 3, 'EUR', '{"board": 7}') AS full \gset
SELECT results_eq(
    format($$SELECT title, due_at, creator_id, challenger_id, challenged_id, description, category, fee_bps, min_stakes, currency, metadata
               FROM payout_challenges WHERE id = %s$$, :full),
    $$VALUES ('Who wins?', '2100-01-01 12:00'::timestamptz, 'carl' COLLATE "C", 'yes-man' COLLATE "C", 'no-man' COLLATE "C", 'A game of chess', 'chess',
              250, 3, 'EUR', '{"board": 7}'::jsonb)$$,
    'a challenge is what was given');
SELECT payout_create_challenge('Bare') AS bare \gset
SELECT results_eq(
    format($$SELECT status, result, due_at, creator_id IS NULL, pool, yes_pool, no_pool, yes_stakes, no_stakes, fee_bps, min_stakes, currency,
                    payout_job_id, refund_job_id, evidence, admin_notes, activated_at, closed_at, resolved_at, completed_at
               FROM payout_challenges WHERE id = %s$$, :bare),
    $$VALUES ('pending', NULL::text, NULL::timestamptz, true, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0, NULL::int, 'USD',
              NULL::bigint, NULL::bigint, '[]'::jsonb, NULL::text, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz)$$,
    'only a title is needed; it is pending, and nothing is staked');
SELECT ok(created_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), 'it knows when it was created')
  FROM payout_challenges WHERE id = :bare;

SELECT throws_ok('SELECT payout_create_challenge(' || arguments || ')', '22023', NULL, 'create: ' || what)
  FROM (VALUES
    ('NULL',                                        'title null'),
    ('''''',                                        'title empty'),
    ('''x'', currency => NULL',                     'currency null'),
    ('''x'', currency => ''''',                     'currency empty'),
    ('''x'', currency => repeat(''C'', 64)',        'currency too long'),
    ('''x'', fee_bps => NULL',                      'fee null'),
    ('''x'', fee_bps => -1',                        'fee negative'),
    ('''x'', fee_bps => 10000',                     'a fee of everything'),
    ('''x'', min_stakes => 0',                      'min_stakes 0'),
    ('''x'', min_stakes => -1',                     'min_stakes negative'),
    ('''x'', ''infinity''',                         'never due'),
    ('''x'', ''-infinity''',                        'always due'),
    ('''x'', creator_id => ''@outside''',           'a system account as creator'),
    ('''x'', challenger_id => ''''',                'challenger empty'),
    ('''x'', challenged_id => ''@challenge:1''',    'an escrow as challenged'),
    ('''x'', creator_id => repeat(''u'', 1001)',    'creator too long')
  ) AS t (arguments, what);
SELECT lives_ok($$SELECT payout_create_challenge('x', fee_bps => 9999, min_stakes => 1, creator_id => repeat('u', 1000))$$, 'the limits themselves are allowed');
SELECT is((SELECT count(*)::int FROM payout_challenges WHERE title = 'x'), 1, 'of those that were refused nothing is left');

-- ---------------------------------------------------------------------------
-- Stakes
-- ---------------------------------------------------------------------------

SELECT payout_create_challenge('Go', '2100-01-01 12:00') AS go \gset
SELECT payout_deposit('ann', 100, 'd1'), payout_deposit('bob', 50, 'd2'), payout_deposit('euro', 50, 'd3', 'EUR') \g /dev/null
SELECT payout_place_stake(:go, 'ann', 'YES', 30, at => '2100-01-01 10:00') AS ann1 \gset
SELECT is(payout_balance('ann'), 70::bigint, 'a stake leaves the balance of the user');
SELECT is(payout_balance('@challenge:' || :go), 30::bigint, 'and is in the escrow of the challenge');
SELECT results_eq(
    format('SELECT account, currency, amount, kind, job_id, challenge_id, reference FROM payout_ledger WHERE challenge_id = %s ORDER BY amount', :go),
    format($$VALUES ('ann' COLLATE "C", 'USD', -30::bigint, 'stake', NULL::bigint, %1$s::bigint, NULL::text),
                    ('@challenge:%1$s', 'USD', 30, 'stake', NULL, %1$s, NULL)$$, :go),
    'as two lines of the ledger');
SELECT results_eq($$SELECT kind, amount, balance, challenge_id FROM payout_statement('ann')$$,
    format($$VALUES ('deposit', 100::bigint, 100::bigint, NULL::bigint), ('stake', -30, 70, %s)$$, :go), 'and one of her statement');
SELECT results_eq(
    format('SELECT id, user_id, side, amount, status, currency, reference FROM payout_stakes WHERE challenge_id = %s', :go),
    format($$VALUES (%s::bigint, 'ann' COLLATE "C", 'YES', 30::bigint, 'waiting', 'USD', NULL::text)$$, :ann1),
    'it waits for somebody on the other side');
SELECT ok(created_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), 'it knows when it was placed')
  FROM payout_stakes WHERE id = :ann1;
SELECT is(pg_temp.status(:go), 'pending', 'and so does the challenge');
SELECT isnt(payout_place_stake(:go, 'ann', 'YES', 20, at => '2100-01-01 10:01'), :'ann1', 'without a reference, the next call is another stake');
SELECT is(pg_temp.status(:go), 'pending', 'two on one side do not make a challenge active');
SELECT results_eq(format('SELECT pool, yes_pool, no_pool, yes_stakes, no_stakes FROM payout_challenges WHERE id = %s', :go),
    'VALUES (50::bigint, 50::bigint, 0::bigint, 2::bigint, 0::bigint)', 'its pools are what is staked');

SELECT throws_ok(format('SELECT payout_place_stake(%s)', replace(arguments, 'GO', :'go')), code, NULL, 'stake: ' || what)
  FROM (VALUES
    ('GO, ''ann'', ''yes'', 1',             '22023', 'side in lower case'),
    ('GO, ''ann'', ''MAYBE'', 1',           '22023', 'no such side'),
    ('GO, ''ann'', NULL, 1',                '22023', 'side null'),
    ('GO, NULL, ''YES'', 1',                '22023', 'user null'),
    ('GO, '''', ''YES'', 1',                '22023', 'user empty'),
    ('GO, ''@platform'', ''YES'', 1',       '22023', 'a system account'),
    ('GO, ''ann'', ''YES'', NULL',          '22023', 'amount null'),
    ('GO, ''ann'', ''YES'', 1, ''''',       '22023', 'reference empty'),
    ('GO, ''ann'', ''YES'', 1, (SELECT string_agg(md5(i::text), '''') FROM generate_series(1, 300) i)', '22023', 'reference too long'),
    ('GO, ''ann'', ''YES'', 1, at => NULL', '22023', 'at null'),
    ('GO, ''ann'', ''YES'', 0',             '23514', 'amount 0'),
    ('GO, ''ann'', ''YES'', -1',            '23514', 'amount negative'),
    ('GO, ''ann'', ''YES'', 51',            '23514', 'more than the balance'),
    ('GO, ''nobody'', ''NO'', 1',           '23514', 'who has no account'),
    ('GO, ''euro'', ''NO'', 1',             '23514', 'who has another currency'),
    ('999999, ''ann'', ''YES'', 1',         '42704', 'no such challenge'),
    ('NULL, ''ann'', ''YES'', 1',           '42704', 'challenge null'),
    ('GO, ''ann'', ''YES'', 1, ''d1''',     '23505', 'the reference of a deposit')
  ) AS t (arguments, code, what);
SELECT throws_like(format('SELECT payout_place_stake(%s, ''ann'', ''YES'', 51)', :go), '%"ann"%', 'the account with too little is named');
SELECT is(pg_temp.status(:go), 'pending', 'a stake that was refused activates nothing');
SELECT is(payout_balance('ann'), 50::bigint, 'and takes nothing');

SELECT payout_place_stake(:go, 'bob', 'NO', 10, 'stake:1', '2100-01-01 10:02') AS bob1 \gset
SELECT is(payout_place_stake(:go, 'bob', 'NO', 10, 'stake:1', '2100-01-01 10:03'), :'bob1', 'the same reference again is the same stake');
SELECT is(payout_balance('bob'), 40::bigint, 'and takes nothing more');
SELECT is((SELECT reference FROM payout_stakes WHERE id = :bob1), 'stake:1', 'the stake has it');
SELECT payout_create_challenge('Other') AS other \gset
SELECT throws_ok(format('SELECT payout_place_stake(%s)', arguments), '23505', NULL, 'stake:1 for ' || what)
  FROM (VALUES
    (:'go' || ', ''bob'', ''NO'', 11, ''stake:1''',    'another amount'),
    (:'go' || ', ''bob'', ''YES'', 10, ''stake:1''',   'the other side'),
    (:'go' || ', ''ann'', ''NO'', 10, ''stake:1''',    'another user'),
    (:'other' || ', ''bob'', ''NO'', 10, ''stake:1''', 'another challenge')
  ) AS t (arguments, what);
SELECT throws_ok($$SELECT payout_deposit('bob', 10, 'stake:1')$$, '23505', NULL, 'nor is it free for a deposit');
SELECT payout_place_stake(:go, 'bob', 'NO', 40, 'stake:2', '2100-01-01 10:04') \g /dev/null
SELECT lives_ok(format('SELECT payout_place_stake(%s, ''bob'', ''NO'', 40, ''stake:2'')', :go), 'a repeated stake needs no balance');

-- ---------------------------------------------------------------------------
-- Activation
-- ---------------------------------------------------------------------------

SELECT is(pg_temp.status(:go), 'active', 'with a stake on each side a challenge is active');
SELECT is((SELECT activated_at FROM payout_challenges WHERE id = :go), '2100-01-01 10:02', 'since the first on the other side');
SELECT set_eq(format('SELECT status, matched_at FROM payout_stakes WHERE challenge_id = %s', :go),
    $$VALUES ('matched', '2100-01-01 10:02'::timestamptz)$$, 'its stakes are matched since then');
SELECT results_eq(format('SELECT pool, yes_pool, no_pool, yes_stakes, no_stakes FROM payout_challenges WHERE id = %s', :go),
    'VALUES (100::bigint, 50::bigint, 50::bigint, 2::bigint, 2::bigint)', 'its pools have them all');
SELECT payout_deposit(u, 100, 'a ' || u) FROM unnest(ARRAY['u1', 'u2', 'u3', 'u4']) u \g /dev/null
SELECT payout_place_stake(:go, 'u1', 'YES', 1, at => '2100-01-01 10:05') \g /dev/null
SELECT is((SELECT activated_at FROM payout_challenges WHERE id = :go), '2100-01-01 10:02', 'further stakes do not change that');

SELECT payout_create_challenge('Three', min_stakes => 3) AS three \gset
SELECT payout_place_stake(:three, 'u1', 'YES', 1), payout_place_stake(:three, 'u2', 'NO', 1) \g /dev/null
SELECT is(pg_temp.status(:three), 'pending', 'min_stakes: two of three, one on each side');
SELECT payout_place_stake(:three, 'u3', 'YES', 1) \g /dev/null
SELECT is(pg_temp.status(:three), 'active', 'the third makes it active');
SELECT payout_create_challenge('One side', min_stakes => 2) AS side \gset
SELECT payout_place_stake(:side, 'u1', 'NO', 1, 'side') \g /dev/null
SELECT payout_place_stake(:side, 'u1', 'NO', 1, 'side') \g /dev/null
SELECT is(pg_temp.status(:side), 'pending', 'a stake that was asked for twice counts once');
SELECT payout_place_stake(:side, 'u2', 'NO', 1) \g /dev/null
SELECT is(pg_temp.status(:side), 'active', 'a minimum may be reached on one side');
SELECT payout_create_challenge('One', min_stakes => 1) AS one \gset
SELECT payout_place_stake(:one, 'u1', 'YES', 1) \g /dev/null
SELECT is(pg_temp.status(:one), 'active', 'or by one stake');

-- when it is due no stake comes in any more, closed or not
SELECT payout_create_challenge('Due', '2100-01-01 12:00') AS due \gset
SELECT throws_ok(format($$SELECT payout_place_stake(%s, 'u1', 'YES', 1, at => %L)$$, challenge, at), '55000', NULL, what)
  FROM (VALUES (:due, '2100-01-01 12:00', 'pending, at its due time'), (:due, '2100-01-01 12:01', 'pending, after it'),
               (:go, '2100-01-01 12:00', 'active, at its due time')) AS t (challenge, at, what);
SELECT lives_ok(format($$SELECT payout_place_stake(%s, 'u1', 'YES', 1, 'last', '2100-01-01 11:59:59.999999')$$, :due), 'just before is in time');
SELECT lives_ok(format($$SELECT payout_place_stake(%s, 'u1', 'YES', 1, 'last', '2100-01-01 12:30')$$, :due), 'and may be asked for again later');
SELECT payout_create_challenge('Due at birth', now() - interval '1 hour') AS late \gset
SELECT lives_ok(format('SELECT payout_place_stake(%s, ''u1'', ''YES'', 1)', :late), 'one that was due when it was created takes stakes until it is closed');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'with open challenges the books balance');

-- ---------------------------------------------------------------------------
-- Evidence
-- ---------------------------------------------------------------------------

SELECT payout_add_evidence(:go, 'ann', '{"photo": "a.jpg"}') \g /dev/null
SELECT payout_add_evidence(:go, 'bob', '"I saw it"') \g /dev/null
SELECT results_eq(
    format($$SELECT e->>'user_id', e->'evidence', (e->>'at')::timestamptz BETWEEN now() - interval '1 minute' AND clock_timestamp()
               FROM payout_challenges, jsonb_array_elements(evidence) e WHERE id = %s$$, :go),
    $$VALUES ('ann', '{"photo": "a.jpg"}'::jsonb, true), ('bob', '"I saw it"', true)$$, 'evidence is kept in order: who, what, when');
SELECT throws_ok(format('SELECT payout_add_evidence(%s)', replace(arguments, 'GO', :'go')), code, NULL, 'evidence: ' || what)
  FROM (VALUES
    ('GO, ''ann'', NULL',         '22023', 'evidence null'),
    ('GO, NULL, ''{}''',          '22023', 'user null'),
    ('GO, ''@outside'', ''{}''',  '22023', 'a system account'),
    ('999999, ''ann'', ''{}''',   '42704', 'no such challenge'),
    ('NULL, ''ann'', ''{}''',     '42704', 'challenge null')
  ) AS t (arguments, code, what);

-- ---------------------------------------------------------------------------
-- Resolve: who is refused
-- ---------------------------------------------------------------------------

SELECT throws_ok(format('SELECT payout_resolve_challenge(%s)', replace(arguments, 'GO', :'go')), code, NULL, 'resolve: ' || what)
  FROM (VALUES
    ('GO, ''challenger_won''',        '55000', 'an active one'),
    (:'bare' || ', ''draw''',         '55000', 'a pending one'),
    ('GO, ''YES''',                   '22023', 'no such result'),
    ('GO, NULL',                      '22023', 'result null'),
    ('999999, ''draw''',              '42704', 'no such challenge'),
    ('NULL, ''draw''',                '42704', 'challenge null')
  ) AS t (arguments, code, what);
SELECT throws_like(format('SELECT payout_resolve_challenge(%s, ''draw'')', :go), '%challenge ' || :'go' || ' %', 'the challenge is named');

-- ---------------------------------------------------------------------------
-- The challenger wins: 1000, less a fee of 2.5 %
-- ---------------------------------------------------------------------------

SELECT pg_temp.closed('[["ann","YES",300],["bob","NO",500],["cid","YES",100],["ann","YES",100]]', 250) AS won \gset
SELECT is(pg_temp.status(:won), 'pending_admin', 'a due challenge awaits its result');
SELECT results_eq(
    format('SELECT id, title, due_at, pool, yes_pool, no_pool, yes_stakes, no_stakes, currency, fee_bps, closed_at FROM payout_challenges_awaiting WHERE id = %s', :won),
    format($$VALUES (%s::bigint, 'Chess', '2100-01-01 12:00'::timestamptz, 1000::bigint, 500::bigint, 500::bigint, 3::bigint, 1::bigint, 'USD', 250,
                     '2100-01-01 12:00'::timestamptz)$$, :won),
    'administrators see it with its pool and sides');
SELECT throws_ok(format('SELECT payout_place_stake(%s, ''u1'', ''YES'', 1, at => ''2100-01-01 11:00'')', :won), '55000', NULL,
    'closed, no stake comes in any more, whatever its time');
SELECT lives_ok(format('SELECT payout_add_evidence(%s, ''bob'', ''"late"'')', :won), 'evidence may still come in');

SELECT challenge_id, result, payout_job_id, refund_job_id IS NULL AS no_refund, message
  FROM payout_resolve_challenge(:won, 'challenger_won', 'as the video shows') \gset r_
SELECT is(format('%s %s', :r_challenge_id, :'r_result'), :'won' || ' challenger_won', 'the answer names the challenge and the result');
SELECT ok(:'r_no_refund', 'no stake goes back');
SELECT matches(:'r_message'::text, '3 winning stakes.*975 minor units of USD.*25', 'and says what is shared, and the fee');
SELECT results_eq(
    format($$SELECT job_id, kind, challenge_id, status, total_pool, platform_fee, currency, source_account, progress, total_winners
               FROM payout_jobs WHERE job_id = %s$$, :r_payout_job_id),
    format($$VALUES (%1$s::bigint, 'payout', %2$s::bigint, 'queued', 1000::bigint, 25::bigint, 'USD', '@challenge:%2$s', 0::numeric, 0::bigint)$$,
           :r_payout_job_id, :won), 'the job is queued; its winners are not written yet');
SELECT results_eq(
    format($$SELECT status, result, payout_job_id, refund_job_id, admin_notes, resolved_at BETWEEN now() - interval '1 minute' AND clock_timestamp(), completed_at
               FROM payout_challenges WHERE id = %s$$, :won),
    format($$VALUES ('pending_admin', 'challenger_won', %s::bigint, NULL::bigint, 'as the video shows', true, NULL::timestamptz)$$, :r_payout_job_id),
    'until they are paid the challenge is not completed');
SELECT is_empty(format('SELECT FROM payout_challenges_awaiting WHERE id = %s', :won), 'but no longer awaits its result');
SELECT is(payout_balance('@challenge:' || :won), 1000::bigint, 'the escrow is still full');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'resolved and not paid, the books balance');

SELECT throws_ok(format(call, :won), '55000', NULL, 'resolved: ' || call)
  FROM unnest(ARRAY['SELECT payout_resolve_challenge(%s, ''challenger_won'')', 'SELECT payout_resolve_challenge(%s, ''draw'')',
                    'SELECT payout_cancel_challenge(%s)', 'SELECT payout_add_evidence(%s, ''ann'', ''{}'')',
                    'SELECT payout_place_stake(%s, ''ann'', ''YES'', 1)']) AS call;
SELECT throws_ok(format('SELECT payout_cancel_job(%s)', :r_payout_job_id), '55000', NULL, 'nor is its job cancelled');
SELECT throws_ok(format($$SELECT payout_create_job('thief', ARRAY['mallory'], ARRAY[1], source_account => '@challenge:%s', challenge_id => %s)$$, id, id),
    '23514', NULL, what)
  FROM (VALUES (:won, 'the escrow of a resolved challenge funds no other job'), (:go, 'nor that of an active one'),
               (:due, 'nor that of a pending one')) AS t (id, what);

CALL payout_process();
SELECT is(pg_temp.paid(:r_payout_job_id), 'ann 780, cid 195', 'the winners share in proportion to what they have staked, several stakes of one together');
SELECT is(payout_balance('@platform'), 25::bigint, 'the platform has its fee');
SELECT is(payout_balance('@challenge:' || :won), 0::bigint, 'and the escrow is empty');
SELECT is(payout_balance('bob'), 0::bigint, 'the other side gets nothing');
SELECT results_eq(
    format($$SELECT status, result, completed_at BETWEEN resolved_at AND clock_timestamp() FROM payout_challenges WHERE id = %s$$, :won),
    $$VALUES ('completed', 'challenger_won', true)$$, 'now the challenge is completed');
SELECT results_eq(format('SELECT status, total_winners, completed_count, amount_paid, progress FROM payout_job_status(%s)', :r_payout_job_id),
    $$VALUES ('completed', 2::bigint, 2::bigint, 975::bigint, 1::numeric)$$, 'and so is its job');
SELECT is((SELECT xmin::text FROM payoutq.challenge WHERE id = :won), (SELECT xmin::text FROM payoutq.job WHERE id = :r_payout_job_id),
    'in the same transaction');
SELECT throws_ok(format(call, :won), '55000', NULL, 'completed: ' || call)
  FROM unnest(ARRAY['SELECT payout_resolve_challenge(%s, ''challenger_won'')', 'SELECT payout_cancel_challenge(%s)',
                    'SELECT payout_add_evidence(%s, ''ann'', ''{}'')', 'SELECT payout_place_stake(%s, ''ann'', ''YES'', 1)']) AS call;
CALL payout_process();
SELECT is(payout_balance('cid'), 195::bigint, 'nobody is paid again');
SELECT is(sum(amount), 0::numeric, 'the lines of a challenge sum to zero') FROM payout_ledger WHERE challenge_id = :won;
SELECT set_eq(format('SELECT kind, count(*) FROM payout_ledger WHERE challenge_id = %s GROUP BY 1', :won),
    $$VALUES ('stake', 8::bigint), ('funding', 2), ('payout', 3), ('fee', 2)$$, 'from the stakes to the winners');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'paid, the books balance');

-- a reversal goes back to where the money came from
SELECT payout_reverse_entry(:r_payout_job_id, 'cid', 195, 'cheated') \g /dev/null
SELECT is(payout_balance('@challenge:' || :won), 195::bigint, 'what is taken back from a winner is in the escrow again');
SELECT payout_create_job('instead', ARRAY['bob'], ARRAY[195], source_account => '@challenge:' || :won) \g /dev/null
CALL payout_process();
SELECT is(payout_balance('bob'), 195::bigint, 'and, the challenge being completed, may fund another job');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

-- ---------------------------------------------------------------------------
-- The challenged wins; a draw; nobody on the winning side
-- ---------------------------------------------------------------------------

SELECT pg_temp.closed('[["dan","YES",10],["eve","NO",1],["fay","NO",2]]') AS lost \gset
SELECT payout_job_id AS job FROM payout_resolve_challenge(:lost, 'challenged_won') \gset
SELECT pg_temp.closed('[["dan","YES",10],["eve","NO",1],["dan","NO",2],["dan","YES",5]]', 1000) AS draw \gset
SELECT refund_job_id, payout_job_id IS NULL AS no_payout, message FROM payout_resolve_challenge(:draw, 'draw', 'rain') \gset d_
SELECT ok(:'d_no_payout', 'a draw makes no payout job');
SELECT matches(:'d_message'::text, '^Draw.*4 stakes.*18 minor units of USD', 'and says that all goes back');
SELECT results_eq(format('SELECT kind, challenge_id, total_pool, platform_fee FROM payout_jobs WHERE job_id = %s', :d_refund_job_id),
    format($$VALUES ('refund', %s::bigint, 18::bigint, 0::bigint)$$, :draw), 'but a refund, without a fee');
SELECT payout_create_challenge('No taker', '2100-01-01 12:00', min_stakes => 2, fee_bps => 500) AS nobody \gset
SELECT pg_temp.stake(:nobody, 'gus', 'YES', 7), pg_temp.stake(:nobody, 'hal', 'YES', 8) \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT refund_job_id, payout_job_id IS NULL AS no_payout, message FROM payout_resolve_challenge(:nobody, 'challenged_won') \gset n_
SELECT ok(:'n_no_payout', 'nobody on the winning side: there is no payout job');
SELECT matches(:'n_message'::text, 'Nobody has staked on the winning side.*2 stakes.*15 minor units of USD', 'and the message says why');
CALL payout_process();
SELECT is(pg_temp.paid(:job), 'eve 4, fay 9', 'the challenged has won: 13 shared as 1 to 2');
SELECT is(pg_temp.paid(:d_refund_job_id), 'dan 17, eve 1', 'a draw returns every stake');
SELECT is(pg_temp.paid(:n_refund_job_id), 'gus 7, hal 8', 'and so it is when nobody has won');
SELECT results_eq(
    format($$SELECT status, result, payout_job_id, refund_job_id, admin_notes FROM payout_challenges WHERE id IN (%s, %s) ORDER BY id$$, :draw, :nobody),
    format($$VALUES ('completed', 'draw', NULL::bigint, %s::bigint, 'rain'), ('completed', 'challenged_won', NULL, %s, NULL)$$, :d_refund_job_id, :n_refund_job_id),
    'those challenges are completed, too');
SELECT is(payout_balance('@platform'), 25::bigint, 'and cost no fee');
SELECT set_eq(format('SELECT DISTINCT status FROM payout_stakes WHERE challenge_id IN (%s, %s)', :lost, :draw), ARRAY['matched'], 'their stakes were matched');
SELECT results_eq($$SELECT kind, amount FROM payout_statement('gus')$$,
    $$VALUES ('deposit', 7::bigint), ('stake', -7), ('refund', 7)$$, 'a refund is a line of its own kind');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'after refunds the books balance');

-- a minimum on one side may also win
SELECT payout_create_challenge('No contest', '2100-01-01 12:00', min_stakes => 2, fee_bps => 1000) AS alone \gset
SELECT pg_temp.stake(:alone, 'gus', 'YES', 7), pg_temp.stake(:alone, 'hal', 'YES', 8) \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_job_id AS job FROM payout_resolve_challenge(:alone, 'challenger_won') \gset
CALL payout_process();
SELECT is(pg_temp.paid(:job), 'gus 7, hal 7', 'who has staked without an opponent wins his stake, less the fee');

-- ---------------------------------------------------------------------------
-- To the last unit
-- ---------------------------------------------------------------------------

SELECT pg_temp.closed('[["a","YES",1],["b","YES",1],["c","YES",1],["z","NO",7]]') AS thirds \gset
SELECT payout_job_id AS thirds_job FROM payout_resolve_challenge(:thirds, 'challenger_won') \gset
SELECT pg_temp.closed('[["a","YES",1],["b","YES",1000000],["z","NO",1]]', 9999) AS dust \gset
SELECT payout_job_id AS dust_job FROM payout_resolve_challenge(:dust, 'challenger_won') \gset
SELECT pg_temp.closed('[["a","YES",4611686018427387904],["b","YES",1],["z","NO",4611686018427387902]]', 9999, 'BIG') AS big \gset
SELECT payout_job_id AS big_job FROM payout_resolve_challenge(:big, 'challenger_won') \gset
CALL payout_process();
SELECT is(pg_temp.paid(:thirds_job), 'a 4, b 3, c 3', 'what is left over goes to the largest remainders');
SELECT is(pg_temp.paid(:dust_job), 'b 101', 'who would get less than a unit gets nothing, and is no entry');
SELECT is((SELECT platform_fee FROM payout_job_status(:dust_job)), 999901::bigint, 'the fee is rounded down');
SELECT is(pg_temp.paid(:big_job), 'a 922337203685478', 'a pool of all bigint');
SELECT is((SELECT platform_fee FROM payout_job_status(:big_job)), 9222449699651090329, 'and its fee, exactly');

-- Random challenges: five fees, all three results; people who stake several
-- times, and on both sides
SELECT setseed(0.7) \g /dev/null
CREATE TEMP TABLE contest AS
SELECT payout_create_challenge('random', '2100-01-01 12:00', fee_bps => (ARRAY[0, 1, 333, 2500, 9999])[1 + n % 5], currency => 'RND', min_stakes => 1) AS id, n
  FROM generate_series(1, 60) n;
CREATE TEMP TABLE bet AS
SELECT c.id, 'p' || (random() * 12)::int AS who, CASE WHEN random() < 0.4 THEN 'YES' ELSE 'NO' END AS side,
       (1 + power(10, random() * (2 + c.n % 12)))::bigint AS amount
  FROM contest c, generate_series(1, 1 + (c.n * 7) % 23);
SELECT pg_temp.stake(id, who, side, amount, 'RND') FROM bet \g /dev/null
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 60, 'sixty random challenges are due');
CREATE TEMP TABLE outcome AS
SELECT c.id, r.* FROM contest c, payout_resolve_challenge(c.id, (ARRAY['challenger_won', 'challenged_won', 'draw'])[1 + c.n % 3]) r;
CALL payout_process();
SELECT cmp_ok((SELECT count(*) FROM outcome WHERE payout_job_id IS NOT NULL), '>=', 30::bigint, 'many of them are won');
SELECT is_empty(
    $$SELECT o.id FROM outcome o JOIN payout_job_status(coalesce(payout_job_id, refund_job_id)) s ON true
       WHERE s.amount_paid + s.platform_fee IS DISTINCT FROM (SELECT sum(amount) FROM bet WHERE bet.id = o.id) OR s.status <> 'completed'$$,
    'of each, what is paid and the fee are the pool');
SELECT is_empty(
    $$WITH side AS (SELECT o.id, o.payout_job_id, b.who, sum(b.amount)::bigint AS staked FROM outcome o JOIN bet b USING (id)
                     WHERE o.payout_job_id IS NOT NULL AND b.side = CASE o.result WHEN 'challenger_won' THEN 'YES' ELSE 'NO' END
                     GROUP BY 1, 2, 3),
           divided AS (SELECT s.id, w.who, w.share
                         FROM (SELECT id, payout_job_id, array_agg(who ORDER BY who COLLATE "C") AS whos,
                                      array_agg(staked ORDER BY who COLLATE "C") AS weights FROM side GROUP BY 1, 2) s
                         JOIN payout_job_status(s.payout_job_id) j ON true
                        CROSS JOIN LATERAL ROWS FROM (unnest(whos), unnest(payout_split(j.total_pool - j.platform_fee, weights))) AS w (who, share))
      SELECT d.* FROM divided d JOIN outcome o USING (id)
        LEFT JOIN payout_entries e ON e.job_id = o.payout_job_id AND e.user_id = d.who
       WHERE coalesce(e.amount, 0) <> d.share$$,
    'each winner gets what payout_split() says of his stakes');
SELECT is_empty(
    $$SELECT o.id, b.who, sum(b.amount) FROM outcome o JOIN bet b USING (id) WHERE o.refund_job_id IS NOT NULL GROUP BY 1, 2
      EXCEPT SELECT o.id, e.user_id, e.amount FROM outcome o JOIN payout_entries e ON e.job_id = o.refund_job_id$$,
    'and whose stakes go back, what he has staked');
SELECT is_empty($$SELECT id FROM outcome WHERE payout_balance('@challenge:' || id, 'RND') <> 0$$, 'no escrow keeps anything');
SELECT is_empty($$SELECT id FROM outcome JOIN payout_challenges USING (id) WHERE status <> 'completed'$$, 'and all are completed');
SELECT is(payout_balance('@platform', 'RND'), (SELECT sum(platform_fee)::bigint FROM payout_jobs WHERE currency = 'RND'), 'the platform has all fees');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

-- ---------------------------------------------------------------------------
-- Cancel, in each state
-- ---------------------------------------------------------------------------

SELECT payout_create_challenge('empty') AS empty \gset
SELECT is(payout_cancel_challenge(:empty, 'nobody came'), NULL, 'without a stake there is nothing to give back');
SELECT results_eq(
    format($$SELECT status, result, pool, payout_job_id, refund_job_id, admin_notes, closed_at IS NOT NULL, completed_at IS NOT NULL FROM payout_challenges WHERE id = %s$$, :empty),
    $$VALUES ('cancelled', NULL::text, 0::bigint, NULL::bigint, NULL::bigint, 'nobody came', true, true)$$, 'and the challenge has ended');

SELECT pg_temp.challenge('[["ida","YES",3]]') AS waiting \gset
SELECT pg_temp.challenge('[["ida","YES",3],["joe","NO",4],["ida","NO",5]]', 1000) AS active \gset
SELECT pg_temp.closed('[["ida","YES",30],["joe","NO",40]]') AS awaiting \gset
SELECT results_eq(format('SELECT status FROM payout_challenges WHERE id IN (%s, %s, %s) ORDER BY id', :waiting, :active, :awaiting),
    $$VALUES ('pending'), ('pending_admin'), ('pending_admin')$$, 'three with stakes, two of them closed');
SELECT pg_temp.challenge('[["ida","YES",3],["joe","NO",4],["ida","NO",5]]', 1000) AS active \gset
SELECT is(pg_temp.status(:active), 'active', 'and one that is active');
SELECT payout_cancel_challenge(:waiting) AS waiting_job, payout_cancel_challenge(:active, 'rules broken') AS active_job,
       payout_cancel_challenge(:awaiting) AS awaiting_job \gset
SELECT results_eq(
    format($$SELECT status, closed_at IS NOT NULL, completed_at, refund_job_id FROM payout_challenges WHERE id IN (%s, %s, %s) ORDER BY id$$,
           :waiting, :active, :awaiting),
    format($$VALUES ('cancelled', true, NULL::timestamptz, %s::bigint), ('cancelled', true, NULL, %s), ('cancelled', true, NULL, %s)$$,
           :waiting_job, :awaiting_job, :active_job), 'all are cancelled, with a job that gives the stakes back');
SELECT is((SELECT closed_at FROM payout_challenges WHERE id = :awaiting), '2100-01-01 12:00', 'one that was closed keeps its time');
SELECT is_empty(format('SELECT FROM payout_challenges_awaiting WHERE id = %s', :awaiting), 'and awaits nothing any more');
SELECT set_eq(format('SELECT DISTINCT status, matched_at FROM payout_stakes WHERE challenge_id IN (%s, %s, %s)', :waiting, :active, :awaiting),
    $$VALUES ('cancelled', NULL::timestamptz)$$, 'their stakes are cancelled');
SELECT throws_ok(format(call, id), '55000', NULL, format('cancelled: ' || call, id))
  FROM unnest(ARRAY[:waiting, :active, :awaiting]) AS id,
       unnest(ARRAY['SELECT payout_resolve_challenge(%s, ''draw'')', 'SELECT payout_cancel_challenge(%s)',
                    'SELECT payout_add_evidence(%s, ''ann'', ''{}'')', 'SELECT payout_place_stake(%s, ''u1'', ''YES'', 1, at => ''2100-01-01 11:00'')']) AS call;
SELECT throws_ok(format('SELECT payout_cancel_job(%s)', :active_job), '55000', NULL, 'a refund is not cancelled');
SELECT throws_ok(format('SELECT payout_cancel_challenge(%s)', id), '42704', NULL, 'cancel: no challenge ' || id) FROM unnest(ARRAY['999999', 'NULL']) AS id;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT lives_ok(format('SELECT payout_cancel_challenge(%s)', payout_create_challenge('in one snapshot')), 'at any isolation level');
COMMIT;
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'cancelled and not refunded, the books balance');
CALL payout_process();
SELECT is(pg_temp.paid(:waiting_job), 'ida 3', 'a pending challenge gives back what is staked');
SELECT is(pg_temp.paid(:active_job), 'ida 8, joe 4', 'an active one too, without a fee');
SELECT is(pg_temp.paid(:awaiting_job), 'ida 30, joe 40', 'and one that awaited its result');
SELECT set_eq(format('SELECT status, completed_at IS NOT NULL FROM payout_challenges WHERE id IN (%s, %s, %s)', :waiting, :active, :awaiting),
    $$VALUES ('cancelled', true)$$, 'they stay cancelled, and have ended');
SELECT is((SELECT admin_notes FROM payout_challenges WHERE id = :active), 'rules broken', 'with the reason');
SELECT is(payout_balance('@challenge:' || :active), 0::bigint, 'an escrow is empty');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'refunded, the books balance');

-- pausing, triggering and retrying the job of a challenge
SELECT pg_temp.closed('[["kim","YES",1],["lou","NO",1]]') AS paused \gset
SELECT payout_job_id AS job FROM payout_resolve_challenge(:paused, 'challenger_won') \gset
SELECT payout_pause_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.status(:paused), 'pending_admin', 'while its job is paused a challenge is not completed');
SELECT payout_resume_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.status(:paused), 'completed', 'but when it is resumed');

-- the job of a challenge in batches
SELECT pg_temp.closed((SELECT jsonb_agg(jsonb_build_array('m' || i, CASE WHEN i % 2 = 1 THEN 'YES' ELSE 'NO' END, i)) FROM generate_series(1, 20) i)) AS many \gset
SET payoutq.batch_size = 3;
SELECT payout_job_id AS job FROM payout_resolve_challenge(:many, 'challenger_won') \gset
RESET payoutq.batch_size;
CALL payout_process(2, :job);
SELECT results_eq(format('SELECT status, total_winners, processed_winners FROM payout_job_status(%s)', :job),
    $$VALUES ('running', 10::bigint, 6::bigint)$$, 'the job of a challenge is paid in batches of payoutq.batch_size');
SELECT is(pg_temp.status(:many), 'pending_admin', 'and before the last the challenge is not completed');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'in the middle the books balance');
CALL payout_process(NULL, :job);
SELECT is(pg_temp.status(:many), 'completed', 'after it, it is');
SELECT is((SELECT amount_paid FROM payout_job_status(:job)), 210::bigint, 'and all is paid');

-- ---------------------------------------------------------------------------
-- The balance is in a table of the application
-- ---------------------------------------------------------------------------

CREATE TABLE app.text_key (id text PRIMARY KEY, coins bigint NOT NULL);
CREATE TABLE app.bigint_key (id bigint PRIMARY KEY, coins bigint NOT NULL);
INSERT INTO app.text_key VALUES ('1', 100), ('2', 100), ('3', 5);
INSERT INTO app.bigint_key SELECT id::bigint, coins FROM app.text_key;
SELECT payout_bind_accounts('app.' || t, 'id', 'coins', t) FROM unnest(ARRAY['text_key', 'bigint_key']::name[]) AS t \g /dev/null
CREATE TEMP TABLE bound AS
SELECT t, payout_create_challenge(t || ' ' || what, '2100-01-01 12:00', fee_bps => 1000, currency => t) AS id, what
  FROM unnest(ARRAY['text_key', 'bigint_key']) AS t, unnest(ARRAY['won', 'draw', 'cancelled']) AS what;
SELECT payout_place_stake(id, u, side, amount, at => '2100-01-01 11:00')
  FROM bound, (VALUES ('1', 'YES', 10::bigint), ('2', 'NO', 20), ('1', 'YES', 5)) AS s (u, side, amount) \g /dev/null
SELECT results_eq('SELECT id, coins FROM app.' || t || ' ORDER BY id',
    format('VALUES (%L::%s, 55::bigint), (''2'', 40), (''3'', 5)', '1', replace(t, '_key', '')), t || ': stakes are taken from the bound table')
  FROM unnest(ARRAY['text_key', 'bigint_key']) AS t;
SELECT throws_ok(format('SELECT payout_place_stake(%s, %L, ''NO'', 6, at => ''2100-01-01 11:00'')', id, u), '23514', NULL,
    format('%s: user %s has too little, or is not there', t, u))
  FROM bound, unnest(ARRAY['3', '4']) AS u WHERE what = 'won';
SELECT payout_cancel_challenge(id) FROM bound WHERE what = 'cancelled' \g /dev/null
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 4, 'the others are due');
SELECT payout_resolve_challenge(id, CASE what WHEN 'won' THEN 'challenger_won' ELSE 'draw' END) FROM bound WHERE what <> 'cancelled' \g /dev/null
CALL payout_process();
SELECT results_eq('SELECT id, coins FROM app.' || t || ' ORDER BY id',
    format('VALUES (%L::%s, 117::bigint), (''2'', 80), (''3'', 5)', '1', replace(t, '_key', '')),
    t || ': a win of 32 and two refunds are credited there')
  FROM unnest(ARRAY['text_key', 'bigint_key']) AS t;
SELECT is_empty('SELECT j.id FROM payoutq.job j JOIN bound b ON b.id = j.challenge_id WHERE NOT j.bound', 'their jobs know that the currency is bound, which a restore waits for');
SELECT is_empty($$SELECT FROM payout_accounts WHERE currency LIKE '%key'$$, 'nothing is kept in the extension''s own table');
SELECT is(payout_balance('@platform', t), 3::bigint, t || ': the fee is the platform''s') FROM unnest(ARRAY['text_key', 'bigint_key']) AS t;
SELECT results_eq($$SELECT DISTINCT status FROM payout_challenges JOIN bound USING (id) ORDER BY 1$$, $$VALUES ('cancelled'), ('completed')$$, 'all of them have ended');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

-- a currency cannot be bound, nor unbound, while something is staked
SELECT payout_create_challenge('moves', currency => 'MOVE') AS moves \gset
SELECT pg_temp.stake(:moves, '1', 'YES', 9, 'MOVE') \g /dev/null
CREATE TABLE app.move (id text PRIMARY KEY, coins bigint NOT NULL);
INSERT INTO app.move VALUES ('1', 0), ('2', 8);
SELECT throws_ok($$SELECT payout_bind_accounts('app.move', 'id', 'coins', 'MOVE')$$, '55000', NULL, 'what is staked would come back to another table');
SELECT payout_cancel_challenge(:moves) \g /dev/null
SELECT throws_ok($$SELECT payout_bind_accounts('app.move', 'id', 'coins', 'MOVE')$$, '55000', NULL, 'also while it is being given back');
CALL payout_process();
SELECT payout_withdraw('1', 9, 'moves on', 'MOVE') \g /dev/null
SELECT payout_bind_accounts('app.move', 'id', 'coins', 'MOVE') \g /dev/null
SELECT payout_create_challenge('moves back', currency => 'MOVE') AS moves_back \gset
SELECT payout_place_stake(:moves_back, '2', 'YES', 8) \g /dev/null
SELECT throws_ok($$SELECT payout_unbind_accounts('MOVE')$$, '55000', NULL, 'nor can it be unbound');
SELECT payout_cancel_challenge(:moves_back) \g /dev/null
CALL payout_process();
SELECT payout_unbind_accounts('MOVE') \g /dev/null
SELECT results_eq('SELECT id, coins FROM app.move ORDER BY id', $$VALUES ('1', 0::bigint), ('2', 8)$$, 'until all is back');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

-- a pool that would be too large for bigint
SELECT payout_create_challenge('poison', '2100-01-01 12:00', min_stakes => 2, currency => 'HUGE') AS poison \gset
SELECT payout_deposit('a', 9223372036854775806, 'huge a', 'HUGE'), payout_deposit('b', 9223372036854775807, 'huge b', 'HUGE') \g /dev/null
SELECT payout_place_stake(:poison, 'a', 'YES', 9223372036854775806, at => '2100-01-01 11:00') \g /dev/null
SELECT throws_ok(format('SELECT payout_place_stake(%s, ''b'', %L, %s, at => ''2100-01-01 11:00'')', :poison, side, amount), '22003', NULL,
    format('%s on %s is too much', amount, side))
  FROM unnest(ARRAY['YES', 'NO']) AS side, unnest(ARRAY[2, 9223372036854775807]) AS amount;
SELECT payout_place_stake(:poison, 'b', 'NO', 1, at => '2100-01-01 11:00') \g /dev/null
SELECT is(payout_run_deadlines('2100-01-01 12:00'), 1, 'one that is full is closed as any other');
SELECT payout_resolve_challenge(:poison, 'challenged_won') \g /dev/null
CALL payout_process();
SELECT is(payout_balance('b', 'HUGE'), 9223372036854775806, 'its money is there');

-- a winner without an account: he is paid when he has one
INSERT INTO app.text_key VALUES ('5', 10), ('6', 10);
SELECT payout_create_challenge('gone', '2100-01-01 12:00', currency => 'text_key') AS gone \gset
SELECT payout_place_stake(:gone, '5', 'YES', 10, at => '2100-01-01 11:00'), payout_place_stake(:gone, '6', 'YES', 10, at => '2100-01-01 11:00'),
       payout_place_stake(:gone, '1', 'NO', 10, at => '2100-01-01 11:00') \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_job_id AS job FROM payout_resolve_challenge(:gone, 'challenger_won') \gset
DELETE FROM app.text_key WHERE id = '6';
CALL payout_process();
SELECT is(pg_temp.paid(:job), '5 15', 'the others are paid');
SELECT is(pg_temp.status(:gone), 'pending_admin', 'and the challenge is not completed');
INSERT INTO app.text_key VALUES ('6', 0);
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.paid(:job), '5 15, 6 15', 'until he is, too');
SELECT is(pg_temp.status(:gone), 'completed', 'then it is');

-- a job that cannot run, and is retried
SELECT payout_create_challenge('fails', '2100-01-01 12:00', currency => 'text_key') AS fails \gset
SELECT payout_place_stake(:fails, '1', 'YES', 10, at => '2100-01-01 11:00'), payout_place_stake(:fails, '2', 'NO', 10, at => '2100-01-01 11:00') \g /dev/null
SELECT payout_run_deadlines('2100-01-01 12:00') \g /dev/null
SELECT payout_job_id AS job FROM payout_resolve_challenge(:fails, 'challenged_won') \gset
ALTER TABLE app.text_key RENAME COLUMN coins TO gone;
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:job)), 'failed', 'without the column of the balances the job fails');
SELECT is(pg_temp.status(:fails), 'pending_admin', 'the challenge is not completed');
SELECT throws_ok(format('SELECT payout_cancel_job(%s)', :job), '55000', NULL, 'nor is its failed job cancelled');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');
ALTER TABLE app.text_key RENAME COLUMN gone TO coins;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.paid(:job), '2 20', 'retried when the cause is mended, it pays');
SELECT is(pg_temp.status(:fails), 'completed', 'and the challenge is completed');

-- ---------------------------------------------------------------------------
-- The list of what awaits a result
-- ---------------------------------------------------------------------------

SELECT payout_cancel_challenge(id) FROM payout_challenges_awaiting \g /dev/null
BEGIN;  -- one now() for all of it
SELECT payout_create_challenge(title, now() - interval '1 hour', 'carl', 'ann', 'bob', description => 'D', category => 'C', min_stakes => 1, fee_bps => 5)
  FROM unnest(ARRAY['middle', 'old', 'young']) AS title \g /dev/null
SELECT payout_deposit('ann', 6, 'awaiting') \g /dev/null
SELECT payout_place_stake(id, 'ann', 'YES', 1) FROM payout_challenges WHERE title = 'old' \g /dev/null
SELECT payout_run_deadlines(now() - interval '30 minutes') \g /dev/null
SELECT payout_place_stake(id, 'ann', 'NO', 2) FROM payout_challenges WHERE title = 'middle' \g /dev/null
SELECT payout_run_deadlines(now() - interval '20 minutes') \g /dev/null
SELECT payout_place_stake(id, 'ann', 'YES', 3) FROM payout_challenges WHERE title = 'young' \g /dev/null
SELECT payout_run_deadlines(now() - interval '10 minutes') \g /dev/null
SELECT payout_add_evidence(id, 'bob', '1') FROM payout_challenges WHERE title = 'old' \g /dev/null
SELECT results_eq(
    $$SELECT title, category, age, pool, yes_pool, no_pool, yes_stakes, no_stakes, creator_id, challenger_id, challenged_id, description, jsonb_array_length(evidence)
        FROM payout_challenges_awaiting$$,
    $$VALUES ('old', 'C', interval '30 minutes', 1::bigint, 1::bigint, 0::bigint, 1::bigint, 0::bigint, 'carl' COLLATE "C", 'ann' COLLATE "C", 'bob' COLLATE "C", 'D', 1),
             ('middle', 'C', '20 minutes', 2, 0, 2, 0, 1, 'carl', 'ann', 'bob', 'D', 0),
             ('young', 'C', '10 minutes', 3, 3, 0, 1, 0, 'carl', 'ann', 'bob', 'D', 0)$$,
    'what awaits a result, the longest waiting first');
COMMIT;

SELECT is_empty('SELECT currency, sum(amount) FROM payout_ledger GROUP BY 1 HAVING sum(amount) <> 0', 'in the end the ledger sums to zero');
SELECT is_empty(
    $$SELECT account, currency, sum(amount) FROM payout_ledger WHERE account LIKE '@challenge:%' GROUP BY 1, 2
      HAVING sum(amount) <> payout_balance(account, currency)$$, 'the balance of each escrow is the sum of its lines');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books balance');

SELECT finish();
