-- payout_reconcile(): a provider's books against ours, and what it mends.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(116);

CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
CREATE SERVER other FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');

CREATE FUNCTION pg_temp.t(who text) RETURNS bigint LANGUAGE sql AS $$ SELECT transfer_id FROM payout_transfers WHERE user_id = who $$;
CREATE TABLE app.claim (transfer_id bigint, attempt_token uuid, user_id text, n bigint GENERATED ALWAYS AS IDENTITY);
CREATE FUNCTION pg_temp.token(who text) RETURNS uuid LANGUAGE sql AS $$
    SELECT attempt_token FROM app.claim WHERE user_id = who ORDER BY n DESC LIMIT 1
$$;
-- Claims what these users are to get, and nothing else.
CREATE FUNCTION pg_temp.claim(provider text, who text[], lease interval DEFAULT '1 hour') RETURNS text LANGUAGE sql AS $$
    UPDATE payoutq.transfer SET run_after = CASE WHEN user_id = ANY (who) THEN clock_timestamp() ELSE 'infinity' END
     WHERE status IN ('pending', 'retryable', 'unknown');
    WITH claimed AS (
        INSERT INTO app.claim SELECT transfer_id, attempt_token, user_id FROM payout_claim_transfers(provider, 1000, lease) RETURNING user_id)
    SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM claimed
$$;
CREATE FUNCTION pg_temp.sent(who text) RETURNS void LANGUAGE sql AS $$ SELECT payout_transfer_sent(pg_temp.t(who), pg_temp.token(who), 'r ' || who) $$;
CREATE FUNCTION pg_temp.failed(who text, class text) RETURNS text LANGUAGE sql AS $$ SELECT payout_transfer_failed(pg_temp.t(who), pg_temp.token(who), class) $$;
-- 'sent r ann 1 g1': status, reference, attempts, generation
CREATE FUNCTION pg_temp.state(who text) RETURNS text LANGUAGE sql AS $$
    SELECT format('%s %s %s g%s', status, coalesce(provider_reference, '-'), attempts, generation) FROM payout_transfers WHERE user_id = who
$$;
-- What the provider lists for users, with changes
CREATE FUNCTION pg_temp.listed(who text[], change jsonb DEFAULT '{}') RETURNS jsonb LANGUAGE sql AS $$
    SELECT coalesce(jsonb_agg(jsonb_build_object('reference', 'r ' || user_id, 'key', idempotency_key, 'amount', amount, 'currency', lower(currency),
                                                 'destination', destination, 'reversed', false) || change), '[]')
      FROM payout_transfers WHERE user_id = ANY (who)
$$;
-- 'missing ann r ann 1 USD: why; ...'
CREATE FUNCTION pg_temp.found(listing jsonb, older_than interval DEFAULT '1 hour', repair boolean DEFAULT false, provider text DEFAULT 'bank') RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(format('%s %s %s %s %s: %s', r.finding, coalesce(t.user_id, '-'), coalesce(r.provider_reference, '-'), r.amount, r.currency, r.detail), '; '
                      ORDER BY r.finding, t.user_id, r.provider_reference)
      FROM payout_reconcile(provider, listing, older_than, repair) r LEFT JOIN payout_transfers t ON t.transfer_id = r.transfer_id
$$;
CREATE FUNCTION pg_temp.everything() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text;
    rows text;
    result text := '';
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'payoutq' ORDER BY 1 LOOP
        EXECUTE format('SELECT string_agg(t::text, chr(10) ORDER BY t::text) FROM payoutq.%I t', name) INTO rows;
        result := result || name || ': ' || coalesce(md5(rows), 'empty') || ' ';
    END LOOP;
    RETURN result;
END $$;

SELECT ARRAY['done', 'sent', 'plain', 'returned', 'waits', 'lost', 'refused', 'live', 'hand'] AS first,
       ARRAY['unknown', 'pending', 'retry', 'lapsed', 'newer', 'older', 'back'] AS mended,
       ARRAY['origin', 'amount', 'currency', 'place', 'reversed', 'twice', 'taken', 'alive', 'unlisted', 'long', 'empty', 'nokey', 'failed'] AS kept \gset
SELECT payout_set_destination(u, p, 'to ' || u) FROM unnest(:'first'::text[] || :'mended'::text[] || :'kept'::text[] || '{foreign}') u, unnest(ARRAY['bank', 'other']) p \g /dev/null
SELECT payout_create_job('first', u, array_fill(10::bigint, ARRAY[cardinality(u)]), provider => 'bank') AS first_job FROM (SELECT :'first'::text[] AS u) j \gset
CALL payout_process();

-- ---------------------------------------------------------------------------
-- Findings
-- ---------------------------------------------------------------------------

SELECT is(pg_temp.found('[]'), NULL, 'nothing was sent: there is nothing to find');
SELECT is(pg_temp.claim('bank', ARRAY['done', 'sent', 'plain', 'returned', 'lost', 'refused', 'live', 'hand']), 'done hand live lost plain refused returned sent', '(claimed)');
SELECT pg_temp.sent(u) FROM unnest(ARRAY['done', 'sent', 'returned']) u \g /dev/null
SELECT payout_confirm_transfer('bank', 'r done', true), payout_confirm_transfer('bank', 'r returned', false),
       payout_transfer_completed(pg_temp.t('plain'), pg_temp.token('plain'), NULL),
       pg_temp.failed('lost', 'unknown'), pg_temp.failed('refused', 'permanent'), pg_temp.failed('hand', 'unknown'), payout_fail_transfer(pg_temp.t('hand')) \g /dev/null
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent'])), NULL, 'equal books: nothing');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent', 'returned'], '{"reversed": true}') || pg_temp.listed(ARRAY['done', 'sent'])),
    'reversed done r done 10 usd: it is completed here; reversed sent r sent 10 usd: it is sent here', '(reversed, and what was returned is not ours)');
UPDATE payoutq.transfer SET updated_at = now() - interval '2 hours';

UPDATE payoutq.transfer SET error = 'timed out' WHERE user_id = 'lost';
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent'])), 'stale_unknown lost - 10 USD: timed out', 'stale_unknown');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']), '3 hours'), NULL, 'not when it may last longer');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['sent', 'lost'])),
    'missing done r done 10 USD: it is completed here, and not in the listing; orphan lost r lost 10 usd: its transfer is unknown here; stale_unknown lost - 10 USD: timed out',
    'missing, and an orphan that is listed and unknown here');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['lost']), '3 hours'), 'orphan lost r lost 10 usd: its transfer is unknown here', 'missing only after a while');
SELECT is(pg_temp.found('[]'),
    'missing done r done 10 USD: it is completed here, and not in the listing; missing sent r sent 10 USD: it is sent here, and not in the listing; stale_unknown lost - 10 USD: timed out',
    'an empty listing: all that was sent is missing, but for what has no reference');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || listing, '3 hours'), finding, what)
  FROM (VALUES
    ('[{"reference": "x", "amount": 7, "currency": "eur"}]'::jsonb,                      'orphan - x 7 eur: no transfer has its key',                'an orphan without a key'),
    ('[{"reference": "x", "key": "payout:0", "amount": 7, "currency": "eur"}]',          'orphan - x 7 eur: no transfer has its key',                'an orphan with a key of nothing'),
    ('[{"reference": "x", "key": "other:1", "amount": 7, "currency": "eur"}]',           'orphan - x 7 eur: no transfer has its key',                'an orphan with a key of somebody else'),
    ('[{}]',                                                                             'orphan - -  : no transfer has its key',                    'an orphan of which nothing is said')
  ) AS t (listing, finding, what);
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || pg_temp.listed(ARRAY[who]), '3 hours'), finding, what)
  FROM (VALUES
    ('waits',       'orphan waits r waits 10 usd: its transfer is pending here',                        'made by the original of a restored copy'),
    ('returned',    'orphan returned r returned 10 usd: its transfer is confirmation_failed here',      'made, and rejected here'),
    ('hand',        'orphan hand r hand 10 usd: its transfer is failed_terminal here',                  'made, and failed by hand'),
    ('refused',     'orphan refused r refused 10 usd: its transfer is failed_terminal here',            'made, and refused'),
    ('live',        'orphan live r live 10 usd: its transfer is processing here',                       'made, and not reported yet')
  ) AS t (who, finding, what);
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || pg_temp.listed(ARRAY['done'], '{"reference": "r done 2"}'), '3 hours'),
    'duplicate done r done, r done 2 20 usd: 2 of them; orphan done r done 2 10 usd: its transfer is completed here', 'duplicate');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || jsonb_set(pg_temp.listed(ARRAY['done'], '{"reference": "r done 2"}'), '{0,key}', to_jsonb(format('payout:%s:g2', pg_temp.t('done')))), '3 hours'),
    'duplicate done r done, r done 2 20 usd: 2 of them; orphan done r done 2 10 usd: its transfer is completed here', 'also under another key of the same transfer');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || pg_temp.listed(ARRAY['done'], '{"reference": "r done 2", "reversed": true}'), '3 hours'),
    'orphan done r done 2 10 usd: its transfer is completed here', 'one that is reversed is no duplicate');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done']) || pg_temp.listed(ARRAY['sent'], change), '3 hours'), 'amount_mismatch sent r sent ' || finding || ': 10 USD to to sent here', 'mismatch: ' || change::text)
  FROM (VALUES ('{"amount": 11}'::jsonb, '11 usd'), ('{"amount": "9"}', '9 usd'), ('{"currency": "eur"}', '10 eur'), ('{"destination": "elsewhere"}', '10 usd')) AS t (change, finding);
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done']) || pg_temp.listed(ARRAY['sent'], change), '3 hours'), NULL, 'no mismatch: ' || change::text)
  FROM unnest(ARRAY['{"currency": "USD"}', '{"destination": null}', '{"key": null}', '{"more": 1}', '{"reversed": null}', '{"origin": null}']::jsonb[]) AS change;
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done']) || pg_temp.listed(ARRAY['sent'], '{"reversed": true}'), '3 hours'), 'reversed sent r sent 10 usd: it is sent here', 'reversed');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent']) || pg_temp.listed(ARRAY['done', 'sent', 'lost'], '{"reference": "x", "origin": "another"}'), '3 hours'), NULL,
    'what another installation has made is not looked at');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent'], jsonb_build_object('origin', payoutq.key_origin())), '3 hours'), NULL, 'and what is ours is');
SELECT is(pg_temp.found('[]', provider => 'other'), NULL, 'another provider has other books');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['lost']), provider => 'other'), 'orphan lost r lost 10 usd: no transfer has its key', 'and other transfers');

-- Bad listings
CREATE FUNCTION pg_temp.refused(arguments text, code text, what text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    before text := pg_temp.everything();
BEGIN
    RETURN NEXT throws_ok(format('SELECT payout_reconcile(%s)', arguments), code, NULL, what || ' is refused');
    RETURN NEXT is(pg_temp.everything(), before, what || ' changes nothing');
END $$;
SELECT pg_temp.refused(arguments, code, arguments)
  FROM (VALUES ('''nowhere''', '42704'), ('NULL', '42704'), ('''bank'', NULL', '22023'), ('''bank'', ''{}''', '22023'), ('''bank'', ''"x"''', '22023'), ('''bank'', ''null''', '22023')) AS t (arguments, code);
SELECT pg_temp.refused(format('''bank'', %L, repair => true', pg_temp.listed(ARRAY['lost']) || bad::jsonb), code, bad)
  FROM (VALUES ('[1]', '22023'), ('[null]', '22023'), ('["x"]', '22023'), ('[[{}]]', '22023'), ('[{"amount": "x"}]', '22P02'), ('[{"amount": 1.5}]', '22P02'),
               ('[{"amount": ""}]', '22P02'), ('[{"amount": 99999999999999999999}]', '22003'), ('[{"reversed": "maybe"}]', '22P02')) AS t (bad, code);

-- ---------------------------------------------------------------------------
-- Repair: what is mended
-- ---------------------------------------------------------------------------

SELECT payout_create_job('mended', u, array_fill(20::bigint, ARRAY[cardinality(u)]), provider => 'bank') AS mended_job FROM (SELECT :'mended'::text[] AS u) j \gset
CALL payout_process();
SELECT is(pg_temp.claim('bank', ARRAY['unknown', 'retry', 'lapsed', 'newer', 'older', 'back']), 'back lapsed newer older retry unknown', '(claimed)');
SELECT pg_temp.failed('unknown', 'unknown'), pg_temp.failed('retry', 'transient'), pg_temp.failed('newer', 'unknown'), pg_temp.failed('older', 'permanent'), payout_retry_transfer(pg_temp.t('older')),
       pg_temp.sent('back') \g /dev/null
SELECT payout_confirm_transfer('bank', 'r back', false), payout_retry_transfer(pg_temp.t('back')) \g /dev/null
UPDATE payoutq.transfer SET run_after = clock_timestamp() - interval '1 s' WHERE user_id = 'lapsed';
SELECT pg_temp.listed(ARRAY['done', 'sent', 'unknown', 'pending', 'retry', 'lapsed'])
       || pg_temp.listed(ARRAY['newer'], jsonb_build_object('key', format('payout:%s:g4', pg_temp.t('newer'))))
       || pg_temp.listed(ARRAY['older'], jsonb_build_object('key', format('payout:%s', pg_temp.t('older'))))
       || pg_temp.listed(ARRAY['back'], jsonb_build_object('key', format('payout:%s', pg_temp.t('back')))) AS listing \gset
SELECT pg_temp.everything() AS before \gset
SELECT is(pg_temp.found(:'listing', '3 hours'),
    'orphan back r back 20 usd: its transfer is pending here; orphan lapsed r lapsed 20 usd: its transfer is processing here; orphan newer r newer 20 usd: its transfer is unknown here; '
    'orphan older r older 20 usd: its transfer is pending here; orphan pending r pending 20 usd: its transfer is pending here; '
    'orphan retry r retry 20 usd: its transfer is retryable here; orphan unknown r unknown 20 usd: its transfer is unknown here', 'what is listed and not sent here');
SELECT is(pg_temp.everything(), :'before', 'finding changes nothing');
SELECT is(pg_temp.found(:'listing', '3 hours', true), 'orphan back r back 20 usd: its transfer is pending here', 'repaired; but what was rejected stays so');
SELECT is(pg_temp.state(who), state, what)
  FROM (VALUES
    ('unknown', 'sent r unknown 1 g1',  'an unknown one is sent'),
    ('pending', 'sent r pending 1 g1',  'a pending one, of a restored copy'),
    ('retry',   'sent r retry 1 g1',    'one to be tried again'),
    ('lapsed',  'sent r lapsed 1 g1',   'one whose lease has lapsed'),
    ('newer',   'sent r newer 2 g4',    'one under a newer key than ours'),
    ('older',   'sent r older 2 g1',    'one under an older key, when the newer was not used'),
    ('back',    'pending - 1 g2',       'but not one that was rejected, and is retried'),
    ('lost',    'unknown - 1 g1',       'nor one that is not listed')
  ) AS t (who, state, what);
SELECT is_empty(format($$SELECT FROM payout_attempts a JOIN payout_transfers t USING (transfer_id)
                          WHERE job_id = %s AND status = 'sent' AND attempt = attempts AND (outcome, a.provider_reference) IS DISTINCT FROM ('sent', t.provider_reference)$$, :mended_job), 'their attempts say so');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'repaired: the books balance');
SELECT pg_temp.everything() AS before \gset
SELECT is(pg_temp.found(:'listing', '3 hours', true), 'orphan back r back 20 usd: its transfer is pending here', 'repaired again');
SELECT is(pg_temp.everything(), :'before', 'it changes nothing');
SELECT throws_ok('SELECT pg_temp.failed(''lapsed'', ''permanent'')', '55000', NULL, 'a report of an attempt that was repaired is late');

-- To the end
SELECT is(pg_temp.claim('bank', ARRAY['unknown', 'pending', 'retry', 'lapsed', 'newer', 'older', 'back']), 'back', 'none of them is sent again');
SELECT payout_transfer_completed(pg_temp.t('back'), pg_temp.token('back'), 'r back 2') \g /dev/null
SELECT is(payout_confirm_transfer('bank', 'r ' || who, true), 'completed', who || ' is confirmed') FROM unnest(ARRAY['unknown', 'pending', 'retry', 'lapsed', 'newer', 'older']) AS who;
CALL payout_process();
SELECT is((SELECT format('%s %s %s %s', status, completed_count, failed_count, amount_paid) FROM payout_job_status(:mended_job)), 'completed 7 0 140', 'their job is completed');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'to the end: the books balance');

-- ---------------------------------------------------------------------------
-- Repair: what is not
-- ---------------------------------------------------------------------------

SELECT payout_create_job('kept', u, array_fill(30::bigint, ARRAY[cardinality(u)]), provider => 'bank') AS kept_job FROM (SELECT :'kept'::text[] AS u) j \gset
SELECT payout_create_job('else', ARRAY['foreign'], ARRAY[30], provider => 'other') \g /dev/null
CALL payout_process();
SELECT is(pg_temp.claim('bank', ARRAY['alive', 'failed']), 'alive failed', '(claimed)');
SELECT pg_temp.failed('failed', 'unknown'), payout_fail_transfer(pg_temp.t('failed')) \g /dev/null
SELECT pg_temp.listed(ARRAY['done', 'sent'])
       || pg_temp.listed(ARRAY['origin'], '{"origin": "another"}')
       || pg_temp.listed(ARRAY['amount'], '{"amount": 31}')
       || pg_temp.listed(ARRAY['currency'], '{"currency": "eur"}')
       || pg_temp.listed(ARRAY['place'], '{"destination": "elsewhere"}')
       || pg_temp.listed(ARRAY['reversed'], '{"reversed": true}')
       || pg_temp.listed(ARRAY['twice']) || pg_temp.listed(ARRAY['twice'], '{"reference": "r twice 2"}')
       || pg_temp.listed(ARRAY['taken'], '{"reference": "r done"}')
       || pg_temp.listed(ARRAY['alive'])
       || pg_temp.listed(ARRAY['long'], jsonb_build_object('reference', repeat('x', 256)))
       || pg_temp.listed(ARRAY['empty'], '{"reference": ""}')
       || pg_temp.listed(ARRAY['nokey'], '{"key": null}') AS listing \gset
SELECT pg_temp.everything() AS before \gset
SELECT lives_ok(format('SELECT pg_temp.found(%L, ''3 hours'', true)', :'listing'), 'what is not as it was asked for, or not to be told apart');
SELECT is(pg_temp.everything(), :'before', 'is not repaired');
SELECT is(pg_temp.state(who), 'pending - 0 g1', who)
  FROM unnest(ARRAY['origin', 'amount', 'currency', 'place', 'reversed', 'twice', 'taken', 'unlisted', 'long', 'empty', 'nokey']) AS who;
SELECT is(pg_temp.state('alive'), 'processing - 1 g1', 'alive');
SELECT lives_ok('SELECT pg_temp.sent(''alive'')', 'whose answer comes');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent', 'alive', 'foreign']), '3 hours', true), 'orphan foreign r foreign 30 usd: no transfer has its key', 'nor what is another provider''s');
SELECT is(pg_temp.state('foreign'), 'pending - 0 g1', 'which has its own books');

-- Failed by hand: marked
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent', 'alive', 'failed']), '3 hours', true), 'orphan failed r failed 30 usd: its transfer is failed_terminal here', 'failed by hand, and listed');
SELECT is(pg_temp.state('failed') || ' ' || payout_balance('failed'), 'failed_terminal r failed 1 g1 30', 'is marked');
SELECT ok(NOT ok, 'payout_health says so') FROM payout_health WHERE check_name = 'transfers_made_twice';
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent', 'alive', 'failed']), '3 hours', true), 'orphan failed r failed 30 usd: its transfer is failed_terminal here', 'and is found again');
SELECT is(pg_temp.found(pg_temp.listed(ARRAY['done', 'sent', 'alive']) || pg_temp.listed(ARRAY['failed'], '{"reversed": true}'), '3 hours', true), NULL, 'until it is reversed there');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'at the end the books balance');
SELECT finish();
DROP SCHEMA app CASCADE;
DROP EXTENSION payoutq CASCADE;
CREATE EXTENSION payoutq;
