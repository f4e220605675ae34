-- payout_handle_webhook(): signatures, and events that come twice, early, out of
-- order, of others, or after somebody has decided by hand.
\ir fresh.psql
SET timezone = 'UTC';
SELECT plan(239);
DROP ROLE IF EXISTS payoutq_test_hook, payoutq_test_looker;

CREATE SERVER stripe FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'stripe', base_url 'https://127.0.0.1:1');
CREATE USER MAPPING FOR PUBLIC SERVER stripe OPTIONS (api_key 'sk_test_1', webhook_secret 'whsec_1');
CREATE SERVER wire FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'webhook', base_url 'https://127.0.0.1:1');
CREATE USER MAPPING FOR PUBLIC SERVER wire OPTIONS (webhook_secret 'whsec_2');
CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
CREATE USER MAPPING FOR PUBLIC SERVER bank OPTIONS (webhook_secret 'whsec_3');
CREATE SERVER silent FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'stripe', base_url 'https://127.0.0.1:1');
CREATE USER MAPPING FOR PUBLIC SERVER silent OPTIONS (api_key 'sk_test_1');
CREATE SERVER unmapped FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'stripe', base_url 'https://127.0.0.1:1');
CREATE SERVER personal FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'stripe', base_url 'https://127.0.0.1:1');
CREATE USER MAPPING FOR CURRENT_USER SERVER personal OPTIONS (webhook_secret 'whsec_1');

-- HMAC-SHA256 by RFC 2104, reckoned by the test itself
CREATE FUNCTION pg_temp.hmac(secret text, message bytea) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    key bytea := convert_to(secret, 'UTF8');
    inner_key bytea := decode(repeat('36', 64), 'hex');
    outer_key bytea := decode(repeat('5c', 64), 'hex');
BEGIN
    IF length(key) > 64 THEN
        key := sha256(key);
    END IF;
    FOR i IN 0 .. length(key) - 1 LOOP
        inner_key := set_byte(inner_key, i, get_byte(inner_key, i) # get_byte(key, i));
        outer_key := set_byte(outer_key, i, get_byte(outer_key, i) # get_byte(key, i));
    END LOOP;
    RETURN encode(sha256(outer_key || sha256(inner_key || message)), 'hex');
END $$;
SELECT is(pg_temp.hmac('Jefe', 'what do ya want for nothing?'), '5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843', '(RFC 4231)');

CREATE FUNCTION pg_temp.v1(secret text, t bigint, body bytea) RETURNS text LANGUAGE sql AS $$
    SELECT pg_temp.hmac(secret, convert_to(t || '.', 'UTF8') || body)
$$;
CREATE FUNCTION pg_temp.secret(provider text) RETURNS text LANGUAGE sql AS $$
    SELECT CASE provider WHEN 'wire' THEN 'whsec_2' WHEN 'bank' THEN 'whsec_3' ELSE 'whsec_1' END
$$;
CREATE FUNCTION pg_temp.header(provider text, body bytea, t bigint DEFAULT extract(epoch FROM clock_timestamp())::bigint) RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('Host', 'example.com', CASE WHEN provider IN ('wire', 'bank') THEN 'Payoutq-Signature' ELSE 'Stripe-Signature' END,
                              format('t=%s,v1=%s', t, pg_temp.v1(pg_temp.secret(provider), t, body)))
$$;
-- A web hook that is signed as it should be
CREATE FUNCTION pg_temp.hook(provider text, body text) RETURNS text LANGUAGE sql AS $$
    SELECT payout_handle_webhook(provider, pg_temp.header(provider, convert_to(body, 'UTF8')), convert_to(body, 'UTF8'))
$$;

-- What was done, by user: one transfer each
CREATE FUNCTION pg_temp.t(who text) RETURNS bigint LANGUAGE sql AS $$ SELECT transfer_id FROM payout_transfers WHERE user_id = who $$;
CREATE TABLE app.claim (transfer_id bigint, attempt_token uuid, user_id text, n bigint GENERATED ALWAYS AS IDENTITY);
CREATE FUNCTION pg_temp.claim(provider text, lease interval DEFAULT '1 hour') RETURNS text LANGUAGE sql AS $$
    WITH claimed AS (
        INSERT INTO app.claim SELECT transfer_id, attempt_token, user_id FROM payout_claim_transfers(provider, 1000, lease) RETURNING user_id)
    SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM claimed
$$;
CREATE FUNCTION pg_temp.token(who text) RETURNS uuid LANGUAGE sql AS $$
    SELECT attempt_token FROM app.claim WHERE user_id = who ORDER BY n DESC LIMIT 1
$$;
CREATE FUNCTION pg_temp.sent(who text, reference text) RETURNS void LANGUAGE sql AS $$ SELECT payout_transfer_sent(pg_temp.t(who), pg_temp.token(who), reference) $$;
CREATE FUNCTION pg_temp.failed(who text, class text) RETURNS text LANGUAGE sql AS $$ SELECT payout_transfer_failed(pg_temp.t(who), pg_temp.token(who), class) $$;
CREATE FUNCTION pg_temp.lapse(who text) RETURNS void LANGUAGE sql AS $$
    UPDATE payoutq.transfer SET run_after = clock_timestamp() - interval '1 s' WHERE user_id = who
$$;
CREATE FUNCTION pg_temp.due(who text[]) RETURNS void LANGUAGE sql AS $$
    UPDATE payoutq.transfer SET run_after = CASE WHEN user_id = ANY (who) THEN clock_timestamp() ELSE 'infinity' END
     WHERE status IN ('pending', 'retryable', 'unknown') AND provider = 'stripe'
$$;
-- 'sent tr_ann 1 g1': status, reference, attempts, generation
CREATE FUNCTION pg_temp.state(who text) RETURNS text LANGUAGE sql AS $$
    SELECT format('%s %s %s g%s', status, coalesce(provider_reference, '-'), attempts, generation) FROM payout_transfers WHERE user_id = who
$$;
CREATE FUNCTION pg_temp.attempts(who text) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(format('%s %s', coalesce(outcome, 'none'), coalesce(provider_reference, '-')), ', ' ORDER BY attempt)
      FROM payout_attempts WHERE transfer_id = pg_temp.t(who)
$$;
-- Stripe's transfer of a user, and an event about it
CREATE FUNCTION pg_temp.object(who text, made_under integer DEFAULT 1) RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('id', 'tr_' || who, 'object', 'transfer', 'amount', amount, 'currency', lower(currency), 'destination', destination,
                              'reversed', false, 'amount_reversed', 0,
                              'metadata', jsonb_build_object('payoutq_transfer', transfer_id::text, 'payoutq_key', payoutq.idempotency_key(transfer_id, made_under),
                                                             'payoutq_origin', payoutq.key_origin()))
      FROM payout_transfers WHERE user_id = who
$$;
CREATE FUNCTION pg_temp.event(id text, type text, object jsonb) RETURNS text LANGUAGE sql AS $$
    SELECT pg_temp.hook('stripe', jsonb_build_object('id', id, 'object', 'event', 'type', type, 'data', jsonb_build_object('object', object))::text)
$$;
CREATE FUNCTION pg_temp.created(who text, made_under integer DEFAULT 1, id text DEFAULT NULL) RETURNS text LANGUAGE sql AS $$
    SELECT pg_temp.event(coalesce(id, 'evt_' || who), 'transfer.created', pg_temp.object(who, made_under))
$$;

-- All that there is, but for events that were handled
CREATE FUNCTION pg_temp.everything() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text;
    rows text;
    result text := '';
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'payoutq' AND tablename <> 'webhook_event' ORDER BY 1 LOOP
        EXECUTE format('SELECT string_agg(t::text, chr(10) ORDER BY t::text) FROM payoutq.%I t', name) INTO rows;
        result := result || name || ': ' || coalesce(md5(rows), 'empty') || ' ';
    END LOOP;
    RETURN result;
END $$;
-- Two tests: an event is ignored, and changes nothing.
CREATE FUNCTION pg_temp.ignored(id text, type text, object jsonb, what text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    before text := pg_temp.everything();
BEGIN
    RETURN NEXT is(pg_temp.event(id, type, object), 'ignored', what || ' is ignored');
    RETURN NEXT is(pg_temp.everything(), before, what || ' changes nothing');
END $$;

SELECT payout_set_destination(u, 'stripe', 'acct_' || u) FROM unnest(ARRAY['live', 'lapsed', 'unknown', 'copy', 'retry', 'wait', 'order', 'alien', 'hand', 'old', 'old2', 'old3', 'back', 'seen']) u \g /dev/null
SELECT payout_set_destination(u, 'wire', 'to ' || u), payout_set_destination(u, 'bank', 'to ' || u) FROM unnest(ARRAY['w1', 'w2', 'w3']) u \g /dev/null
SELECT payout_create_job('stripe', array_agg(u), array_agg(100::bigint), provider => 'stripe') AS job
  FROM unnest(ARRAY['live', 'lapsed', 'unknown', 'copy', 'retry', 'wait', 'order', 'alien', 'hand', 'old', 'old2', 'old3', 'back', 'seen']) u \gset
SELECT payout_create_job('wire', ARRAY['w1', 'w2', 'w3'], ARRAY[1, 2, 3], provider => 'wire') AS wire \gset
CALL payout_process();

-- ---------------------------------------------------------------------------
-- Signatures
-- ---------------------------------------------------------------------------

CREATE FUNCTION pg_temp.verified(what text, headers jsonb, body bytea DEFAULT '{"id": "evt_0", "type": "x"}', provider text DEFAULT 'stripe',
                                 at timestamptz DEFAULT to_timestamp(1800000000)) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    BEGIN
        PERFORM payout_handle_webhook(provider, headers, body, at);
        RAISE SQLSTATE 'PQ002';
    EXCEPTION WHEN SQLSTATE 'PQ002' THEN
        RETURN pass(what);
    END;
EXCEPTION WHEN OTHERS THEN
    RETURN fail(what || ': ' || SQLERRM);
END $$;
CREATE FUNCTION pg_temp.forged(what text, headers jsonb, body bytea DEFAULT '{"id": "evt_0", "type": "x"}', provider text DEFAULT 'stripe',
                               at timestamptz DEFAULT to_timestamp(1800000000)) RETURNS text LANGUAGE sql AS $$
    SELECT throws_ok(format('SELECT payout_handle_webhook(%L, %L, %L, %L)', provider, headers, body, at), '42501', 'the signature of the web hook is not valid', what)
$$;
SELECT pg_temp.v1('whsec_1', 1800000000, '{"id": "evt_0", "type": "x"}') AS good,
       pg_temp.v1('whsec_0', 1800000000, '{"id": "evt_0", "type": "x"}') AS bad \gset
CREATE FUNCTION pg_temp.signed(header text, name text DEFAULT 'Stripe-Signature') RETURNS jsonb LANGUAGE sql AS 'SELECT jsonb_build_object(name, header)';

SELECT pg_temp.verified('a signature', pg_temp.signed('t=1800000000,v1=' || :'good'));
SELECT pg_temp.verified('the header in ' || name, pg_temp.signed('t=1800000000,v1=' || :'good', name))
  FROM unnest(ARRAY['stripe-signature', 'STRIPE-SIGNATURE', 'stripe-Signature']) AS name;
SELECT pg_temp.verified('among other headers', pg_temp.signed('t=1800000000,v1=' || :'good') || '{"Accept": "*/*", "Payoutq-Signature": "t=1,v1=0", "N": 1, "L": ["a"]}');
SELECT pg_temp.verified(format('%s seconds old', age), pg_temp.signed('t=1800000000,v1=' || :'good'), at => to_timestamp(1800000000 + age)) FROM unnest(ARRAY[-300, -1, 1, 300]) AS age;
SELECT pg_temp.forged(format('%s seconds old', age), pg_temp.signed('t=1800000000,v1=' || :'good'), at => to_timestamp(1800000000 + age))
  FROM unnest(ARRAY[-1000000, -301, 301, 1000000]) AS age;
SELECT pg_temp.forged('the clock is that of now, if no time is given', pg_temp.signed('t=1800000000,v1=' || :'good'), at => clock_timestamp());
SELECT pg_temp.verified('one of several ' || what, pg_temp.signed(replace(replace(header, 'GOOD', :'good'), 'WRONG', :'bad')))
  FROM (VALUES ('fits', 't=1800000000,v1=WRONG,v1=GOOD'), ('that is first', 't=1800000000,v1=GOOD,v1=WRONG'), ('schemes', 't=1800000000,v0=WRONG,v1=GOOD'),
               ('that are too short, or too long', 't=1800000000,v1=,v1=GOOD0,v1=ab,v1=GOOD')) AS t (what, header);
SELECT pg_temp.forged(what, pg_temp.signed(replace(replace(header, 'GOOD', :'good'), 'WRONG', :'bad')))
  FROM (VALUES
    ('another secret',                      't=1800000000,v1=WRONG'),
    ('none of several fits',                't=1800000000,v1=WRONG,v1=WRONG'),
    ('v0 does not count',                   't=1800000000,v0=GOOD'),
    ('v11 does not count',                  't=1800000000,v11=GOOD'),
    ('the time of the header is signed',    't=1800000001,v1=GOOD'),
    ('and as it is written',                't=01800000000,v1=GOOD'),
    ('with a sign',                         't=+1800000000,v1=GOOD'),
    ('without a time',                      'v1=GOOD'),
    ('a time that is none',                 't=now,v1=GOOD'),
    ('a time out of range',                 't=99999999999999999999999,v1=GOOD'),
    ('without a signature',                 't=1800000000'),
    ('an empty signature',                  't=1800000000,v1='),
    ('half a signature',                    't=1800000000,v1=' || left(:'good', 32)),
    ('in upper case',                       't=1800000000,v1=' || upper(:'good')),
    ('an empty header',                     ''),
    ('commas only',                         ',,,')
  ) AS t (what, header);
SELECT pg_temp.forged('a time that is not signed:' || t, pg_temp.signed('t=' || t || ',v1=' ||
                          pg_temp.hmac('whsec_1', convert_to('.{"id": "evt_0", "type": "x"}', 'UTF8'))))
  FROM unnest(ARRAY[' 1800000000', '+1800000000']) AS t;
SELECT pg_temp.forged('another body: ' || body, pg_temp.signed('t=1800000000,v1=' || :'good'), body::bytea)
  FROM unnest(ARRAY['{"id": "evt_0", "type": "y"}', '{"id": "evt_0", "type": "x"} ', '{"type": "x", "id": "evt_0"}', '', '{}']) AS body;
SELECT pg_temp.forged('no body', pg_temp.signed('t=1800000000,v1=' || :'good'), NULL);
SELECT pg_temp.forged('no header of the name', '{"Accept": "*/*"}');
SELECT pg_temp.forged('no headers', NULL);
SELECT pg_temp.forged('a header that is null', '{"Stripe-Signature": null}');
SELECT pg_temp.forged('the header of another kind', pg_temp.signed('t=1800000000,v1=' || :'good', 'Payoutq-Signature'));
SELECT pg_temp.forged('a provider ' || what, pg_temp.signed('t=1800000000,v1=' || :'good'), provider => provider)
  FROM (VALUES ('without a user mapping', 'unmapped'), ('without webhook_secret', 'silent'), ('with a user mapping, but not for PUBLIC', 'personal')) AS t (what, provider);
SELECT pg_temp.forged('an empty secret is not taken', pg_temp.signed('t=1800000000,v1=' || pg_temp.v1('', 1800000000, '{"id": "evt_0", "type": "x"}')), provider => 'unmapped');
SELECT pg_temp.verified('kind webhook has a header of its own', pg_temp.signed('t=1800000000,v1=' || pg_temp.v1('whsec_2', 1800000000, '{"id": "e"}'), 'payoutq-signature'), '{"id": "e"}', 'wire');
SELECT pg_temp.forged('and a secret of its own', pg_temp.signed('t=1800000000,v1=' || pg_temp.v1('whsec_1', 1800000000, '{"id": "e"}'), 'payoutq-signature'), '{"id": "e"}', 'wire');
SELECT throws_ok('SELECT payout_handle_webhook(''nowhere'', ''{}'', '''')', '42704', NULL, 'no such provider');
SELECT throws_ok('SELECT payout_handle_webhook(NULL, ''{}'', '''')', '42704', NULL, 'provider null');
SELECT throws_ok('SELECT payout_handle_webhook(''stripe'', ''[]'', ''x'')', '22023', NULL, 'headers that are no object');
SELECT is_empty('SELECT FROM payoutq.webhook_event', 'of all those nothing is left');

-- What is signed, and makes no sense
CREATE FUNCTION pg_temp.raw(provider text, body bytea) RETURNS text LANGUAGE sql AS 'SELECT payout_handle_webhook(provider, pg_temp.header(provider, body), body)';
SELECT throws_ok(format('SELECT pg_temp.raw(''stripe'', %L)', body), code, NULL, what)
  FROM (VALUES
    (''::bytea,                                     '22P02', 'an empty body'),
    ('{"id": "evt_1"',                              '22P02', 'malformed JSON'),
    ('<html>',                                      '22P02', 'no JSON'),
    ('{"id": "evt_1\\u0000"}',                      '22P05', 'a text that PostgreSQL has not'),
    ('\xff00fe',                                    '22021', 'bytes that are not UTF-8'),
    ('{"id": "evt_1", "x": "'::bytea || '\xc328'::bytea || '"}'::bytea, '22021', 'in the middle'),
    ('{"type": "transfer.created"}',                '22023', 'no event id'),
    ('{"id": null, "type": "transfer.created"}',    '22023', 'an event id that is null'),
    ('[{"id": "evt_1"}]',                           '22023', 'a list'),
    ('"evt_1"',                                     '22023', 'a text'),
    ('null',                                        '22023', 'null')
  ) AS t (body, code, what);
SELECT is_empty('SELECT FROM payoutq.webhook_event', 'of those nothing is left either');

-- ---------------------------------------------------------------------------
-- Events that are ignored, and duplicates
-- ---------------------------------------------------------------------------

SELECT pg_temp.ignored('evt_' || type, type, pg_temp.object('copy'), type)
  FROM unnest(ARRAY['payout.paid', 'charge.succeeded', 'transfer', 'Transfer.created', 'xtransfer.created']) AS type;
SELECT is(pg_temp.hook('stripe', '{"id": "evt_untyped"}'), 'ignored', 'an event without a type is ignored');
SELECT is(pg_temp.hook('stripe', jsonb_build_object('id', 'evt_untyped2', 'data', jsonb_build_object('object', pg_temp.object('copy')))::text), 'ignored', 'also one about a transfer');
SELECT is(pg_temp.hook('stripe', '{"id": "evt_empty", "type": "transfer.created"}'), 'ignored', 'and one without an object');
SELECT is(pg_temp.event('evt_payout.paid', 'transfer.created', pg_temp.object('copy')), 'duplicate', 'an event that was handled is a duplicate, whatever it says now');
SELECT is(pg_temp.hook('wire', '{"id": "evt_payout.paid", "status": "sent"}'), 'ignored', 'another provider has other events');
SELECT is(pg_temp.state('copy'), 'pending - 0 g1', 'nothing has come of them');

-- ---------------------------------------------------------------------------
-- Events that come early, or late
-- ---------------------------------------------------------------------------

SELECT is(pg_temp.created('copy'), 'accepted', 'what the original of a restored copy has sent');
SELECT is(pg_temp.state('copy'), 'sent tr_copy 1 g1', 'is sent');
SELECT is(pg_temp.attempts('copy'), 'sent tr_copy', 'with an attempt');
SELECT is(pg_temp.created('copy'), 'duplicate', 'the event comes again');
SELECT is(pg_temp.created('copy', id => 'evt_other'), 'accepted', 'another event about it');
SELECT is(pg_temp.state('copy'), 'sent tr_copy 1 g1', 'changes nothing');

SELECT pg_temp.due('{live,lapsed,unknown,retry,hand,old3}') \g /dev/null
SELECT is(pg_temp.claim('stripe'), 'hand lapsed live old3 retry unknown', '(claimed)');
SELECT is(pg_temp.created('live'), 'accepted', 'what is under way');
SELECT is(pg_temp.state('live'), 'sent tr_live 1 g1', 'is sent');
SELECT throws_ok('SELECT pg_temp.sent(''live'', ''tr_live'')', '55000', NULL, 'a report that comes after it is late');
SELECT is(pg_temp.state('live'), 'sent tr_live 1 g1', 'and changes nothing');
SELECT lives_ok(format('SELECT payoutq.record_answer(%s, %L, ''unknown'', NULL, ''Timeout was reached'', NULL, NULL)', pg_temp.t('live'), pg_temp.token('live')), 'no answer, after it');
SELECT is(pg_temp.state('live'), 'sent tr_live 1 g1', 'changes nothing either');
SELECT is(pg_temp.created('live'), 'duplicate', 'the event is not handled twice');

SELECT pg_temp.lapse('lapsed') \g /dev/null
SELECT is(pg_temp.created('lapsed'), 'accepted', 'whose lease has lapsed');
SELECT is(pg_temp.state('lapsed') || ', ' || pg_temp.attempts('lapsed'), 'sent tr_lapsed 1 g1, sent tr_lapsed', 'is sent, by the attempt that it had');
SELECT throws_ok('SELECT pg_temp.sent(''lapsed'', ''tr_other'')', '55000', NULL, 'its report is late then');

SELECT pg_temp.failed('unknown', 'unknown'), pg_temp.failed('hand', 'unknown'), pg_temp.failed('retry', 'transient'), pg_temp.failed('old3', 'unknown') \g /dev/null
SELECT is(pg_temp.created('unknown'), 'accepted', 'of which nobody knew');
SELECT is(pg_temp.state('unknown') || ', ' || pg_temp.attempts('unknown'), 'sent tr_unknown 1 g1, sent tr_unknown', 'is sent');
SELECT is(pg_temp.created('retry'), 'accepted', 'which was to be tried again');
SELECT is(pg_temp.state('retry') || ', ' || pg_temp.attempts('retry'), 'sent tr_retry 1 g1, sent tr_retry', 'is sent');

-- An attempt that did not count
SELECT pg_temp.due('{wait}') \g /dev/null
SELECT pg_temp.claim('stripe') \g /dev/null
SELECT payoutq.record_answer(pg_temp.t('wait'), pg_temp.token('wait'), 'throttled', NULL, 'HTTP 429', 429, NULL) \g /dev/null
SELECT is(pg_temp.created('wait'), 'accepted', 'whose attempt did not count');
SELECT is(pg_temp.state('wait') || ', ' || pg_temp.attempts('wait'), 'sent tr_wait 2 g1, transient -, sent tr_wait', 'is sent, by another');

-- In the wrong order
SELECT pg_temp.ignored('evt_order1', 'transfer.reversed', pg_temp.object('order') || '{"reversed": true, "amount_reversed": 100}', 'reversed, before it is known');
SELECT pg_temp.ignored('evt_order2', 'transfer.updated', pg_temp.object('order') || '{"reversed": true, "amount_reversed": 100}', 'said in another way');
SELECT is(pg_temp.event('evt_order3', 'transfer.updated', pg_temp.object('order')), 'accepted', 'updated, before it is created');
SELECT is(pg_temp.state('order'), 'sent tr_order 1 g1', 'is sent');
UPDATE payoutq.transfer SET run_after = 'infinity' WHERE user_id = 'order';
SELECT is(pg_temp.created('order'), 'accepted', 'created, after that');
SELECT is(pg_temp.state('order'), 'sent tr_order 1 g1', 'it stays so');
SELECT ok(run_after <= clock_timestamp(), 'and is asked about at once') FROM payout_transfers WHERE user_id = 'order';
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'early events: the books balance');

-- Completed, and then reversed
SELECT is(payout_confirm_transfer('stripe', 'tr_order', true), 'completed', '(confirmed)');
SELECT is(pg_temp.event('evt_order4', 'transfer.updated', pg_temp.object('order')), 'accepted', 'of what is completed');
SELECT is(pg_temp.state('order'), 'completed tr_order 1 g1', 'nothing changes');
SELECT is((SELECT error FROM payout_transfers WHERE user_id = 'order'), NULL, 'at all');
SELECT is(pg_temp.event('evt_order5', 'transfer.reversed', pg_temp.object('order') || '{"reversed": true, "amount_reversed": 100}'), 'accepted', 'reversed');
SELECT is((SELECT status || ': ' || error FROM payout_transfers WHERE user_id = 'order'), 'completed: reversed at the provider', 'is seen, and no money is moved');
SELECT is(payout_balance('order'), 0::bigint, 'since it may be the user''s debt');
SELECT is(pg_temp.event('evt_retry2', 'transfer.reversed', pg_temp.object('retry') || '{"reversed": true, "amount_reversed": 100}'), 'accepted', 'reversed, while it is sent');
SELECT is(pg_temp.state('retry'), 'sent tr_retry 1 g1', 'is asked about');

-- ---------------------------------------------------------------------------
-- Somebody else's, or not what was asked for
-- ---------------------------------------------------------------------------

SELECT pg_temp.ignored('evt_alien' || n, 'transfer.created', object, what)
  FROM (SELECT row_number() OVER () AS n, what, pg_temp.object('alien') || change AS object
          FROM (VALUES
            ('another amount',          '{"amount": 99}'::jsonb),
            ('another currency',        '{"currency": "eur"}'),
            ('another destination',     '{"destination": "acct_hand"}'),
            ('no destination',          '{"destination": null}'),
            ('no metadata',             '{"metadata": {}}'),
            ('an id that is too long',  jsonb_build_object('id', repeat('x', 256))),
            ('no id',                   '{"id": null}'),
            ('an empty id',             '{"id": ""}')
          ) AS t (what, change)) o;
SELECT pg_temp.ignored('evt_alien:' || what, 'transfer.created', jsonb_set(pg_temp.object('alien'), path, value), what)
  FROM (VALUES
    ('another installation''s',         '{metadata,payoutq_origin}'::text[], '"00000000-0000-0000-0000-000000000000"'::jsonb),
    ('of an origin that is not said',   '{metadata,payoutq_origin}', 'null'),
    ('another key',                     '{metadata,payoutq_key}', '"payout:0"'),
    ('a key that is none',              '{metadata,payoutq_key}', '"payout:"'),
    ('a key out of range',              '{metadata,payoutq_key}', '"payout:99999999999999999999"'),
    ('a key of somebody else',          '{metadata,payoutq_key}', to_jsonb('x' || payoutq.idempotency_key(pg_temp.t('alien'), 1))),
    ('the key of another provider''s',  '{metadata,payoutq_key}', to_jsonb(payoutq.idempotency_key(pg_temp.t('w1'), 1)))
  ) AS t (what, path, value);
SELECT is(pg_temp.state('alien'), 'pending - 0 g1', 'nothing has come of those');

-- ---------------------------------------------------------------------------
-- Other generations
-- ---------------------------------------------------------------------------

SELECT pg_temp.due('{old,old2,back}') \g /dev/null
SELECT pg_temp.claim('stripe') \g /dev/null
SELECT is(pg_temp.failed('old', 'permanent') || ' ' || pg_temp.failed('old2', 'permanent'), 'failed_terminal failed_terminal', '(refused)');
SELECT is(payout_retry_transfer(pg_temp.t('old')) || ' ' || payout_retry_transfer(pg_temp.t('old2')), 'pending pending', '(and retried)');
SELECT is(pg_temp.state('old'), 'pending - 1 g2', '(under a new key)');
SELECT is(pg_temp.created('old', 1), 'accepted', 'made under the old key after all, and the new one was not used');
SELECT is(pg_temp.state('old') || ', ' || pg_temp.attempts('old'), 'sent tr_old 2 g1, permanent -, sent tr_old', 'is sent');
SELECT pg_temp.due('{old2}') \g /dev/null
SELECT pg_temp.claim('stripe') \g /dev/null
SELECT pg_temp.ignored('evt_old2', 'transfer.created', pg_temp.object('old2', 1), 'made under the old key while the new one is used');
SELECT is(pg_temp.failed('old2', 'transient'), 'retryable', '(nothing was done under the new key)');
SELECT is(pg_temp.created('old2', 1, 'evt_old2b'), 'accepted', 'but when nothing was made under the new one');
SELECT is(pg_temp.state('old2') || ', ' || pg_temp.attempts('old2'), 'sent tr_old2 3 g1, permanent -, transient -, sent tr_old2', 'it is sent, and not made twice');
SELECT is(payout_confirm_transfer('stripe', 'tr_old2', false), 'confirmation_failed', '(returned)');
SELECT is(payout_retry_transfer(pg_temp.t('old2')), 'pending', '(and retried)');
SELECT is(pg_temp.state('old2'), 'pending - 3 g3', 'the key after that was never used');
SELECT is(pg_temp.created('old3', 3), 'accepted', 'made under a newer key than ours, by the original of a restored copy');
SELECT is(pg_temp.state('old3') || ', ' || pg_temp.attempts('old3'), 'sent tr_old3 2 g3, unknown -, sent tr_old3', 'is sent, under that');

-- Rejected and retried: an old event does not bring the rejected one back.
SELECT pg_temp.sent('back', 'tr_back'), payout_confirm_transfer('stripe', 'tr_back', false), payout_retry_transfer(pg_temp.t('back')) \g /dev/null
SELECT is(pg_temp.state('back'), 'pending - 1 g2', '(returned, and retried)');
SELECT pg_temp.ignored('evt_back', 'transfer.updated', pg_temp.object('back', 1), 'what was rejected');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'generations: the books balance');

-- ---------------------------------------------------------------------------
-- Failed by hand, and made by the provider
-- ---------------------------------------------------------------------------

SELECT ok(ok, '(nothing was made twice)') FROM payout_health WHERE check_name = 'transfers_made_twice';
SELECT is(payout_fail_transfer(pg_temp.t('hand'), 'not there'), 'failed_terminal', '(failed by hand)');
SELECT is(pg_temp.created('hand'), 'accepted', 'what was failed by hand, and is there');
SELECT is((SELECT status || ': ' || error FROM payout_transfers WHERE user_id = 'hand'), 'failed_terminal: failed here, and made by the provider', 'is marked');
SELECT is(payout_balance('hand'), 100::bigint, 'the user has the money here, too');
SELECT results_eq($$SELECT ok, value FROM payout_health WHERE check_name = 'transfers_made_twice'$$, 'VALUES (false, 1::numeric)', 'payout_health says so');
SELECT throws_ok('SELECT payout_retry_transfer(pg_temp.t(''hand''))', '55000', NULL, 'it cannot be retried');
SELECT is(pg_temp.created('hand', id => 'evt_hand2'), 'accepted', 'said again');
SELECT is((SELECT status || ': ' || error FROM payout_transfers WHERE user_id = 'hand'), 'failed_terminal: failed here, and made by the provider', 'nothing changes');
SELECT is(pg_temp.event('evt_hand3', 'transfer.reversed', pg_temp.object('hand') || '{"amount_reversed": 40}'), 'accepted', 'reversed there, in part');
SELECT ok(NOT ok, 'is not enough') FROM payout_health WHERE check_name = 'transfers_made_twice';
SELECT is(pg_temp.event('evt_hand4', 'transfer.reversed', pg_temp.object('hand') || '{"reversed": true, "amount_reversed": 100}'), 'accepted', 'reversed there');
SELECT ok(ok, 'is amended') FROM payout_health WHERE check_name = 'transfers_made_twice';
SELECT is(pg_temp.state('hand'), 'failed_terminal - 1 g1', 'is as if it was never made');
SELECT is(payout_retry_transfer(pg_temp.t('hand')), 'pending', 'and can be retried');
SELECT is(pg_temp.state('hand'), 'pending - 1 g2', 'under a new key');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'by hand: the books balance');

-- ---------------------------------------------------------------------------
-- Kinds webhook and external
-- ---------------------------------------------------------------------------

SELECT is(pg_temp.claim('wire'), 'w1 w2 w3', '(claimed)');
SELECT pg_temp.sent(u, 'ref ' || u) FROM unnest(ARRAY['w1', 'w2', 'w3']) u \g /dev/null
SELECT is(pg_temp.hook('wire', format('{"id": "e1", "reference": "ref w1", "status": %s}', status)), result, 'status ' || status)
  FROM (VALUES ('"sent"', 'ignored'), ('"completed"', 'duplicate')) AS t (status, result);
SELECT is(pg_temp.hook('wire', format('{"id": "e:%s", "reference": "ref w1"%s}', n, status)), 'ignored', 'ignored: ' || status)
  FROM (VALUES (1, ', "status": "pending"'), (2, ', "status": null'), (3, ', "status": "Completed"'), (4, ', "status": ["completed"]'), (5, '')) AS t (n, status);
SELECT is(pg_temp.state('w1'), 'sent ref w1 1 g1', 'those change nothing');
SELECT is(pg_temp.hook('wire', '{"id": "e2", "reference": "ref w1", "status": "completed"}'), 'completed', 'completed');
SELECT is(pg_temp.hook('wire', '{"id": "e2", "reference": "ref w1", "status": "completed"}'), 'duplicate', 'once');
SELECT is(pg_temp.hook('wire', '{"id": "e3", "reference": "ref w1", "status": "completed"}'), 'completed', 'said by another event');
SELECT throws_ok($$SELECT pg_temp.hook('wire', '{"id": "e4", "reference": "ref w1", "status": "failed"}')$$, '55000', NULL, 'it cannot fail any more');
SELECT is(pg_temp.hook('wire', '{"id": "e5", "reference": "ref w2", "status": "failed", "reason": "no such account"}'), 'confirmation_failed', 'failed');
SELECT is((SELECT error FROM payout_transfers WHERE user_id = 'w2'), 'no such account', 'with the reason');
SELECT is(payout_balance('w2'), 2::bigint, 'the money is back');
SELECT throws_ok(format('SELECT pg_temp.hook(''wire'', %L)', body), code, NULL, what)
  FROM (VALUES
    ('{"id": "e6", "reference": "nothing", "status": "completed"}', '42704', 'a reference that nothing has'),
    ('{"id": "e6", "status": "completed"}',                         '42704', 'no reference'),
    ('{"reference": "ref w3", "status": "completed"}',              '22023', 'no event id')
  ) AS t (body, code, what);
SELECT is(pg_temp.hook('wire', '{"id": "e6", "reference": "ref w3", "status": "completed"}'), 'completed', 'an event that was refused is no duplicate when it comes again');
SELECT is((SELECT status FROM payout_job_status(:wire)), 'running', '(a worker ends the job)');
CALL payout_process();
SELECT is((SELECT format('%s %s %s', status, completed_count, failed_count) FROM payout_job_status(:wire)), 'completed 2 1', 'the job is completed');
SELECT is(pg_temp.hook('bank', '{"id": "e1", "status": "sent"}'), 'ignored', 'kind external has web hooks alike');
SELECT throws_ok($$SELECT pg_temp.hook('bank', '{"id": "e2", "reference": "ref w3", "status": "completed"}')$$, '42704', NULL, 'of its own transfers');

-- ---------------------------------------------------------------------------
-- The dispatcher's own call, answered when somebody has decided by hand
-- ---------------------------------------------------------------------------

SELECT payout_set_destination(u, 'stripe', 'acct_' || u) FROM unnest(ARRAY['tardy', 'tardy2', 'tardy3']) u \g /dev/null
SELECT payout_create_job('tardy', ARRAY['tardy', 'tardy2', 'tardy3'], ARRAY[100, 100, 100], provider => 'stripe') \g /dev/null
CALL payout_process();
SELECT pg_temp.claim('stripe') \g /dev/null
SELECT pg_temp.lapse(u), payout_fail_transfer(pg_temp.t(u), 'somebody thought so') FROM unnest(ARRAY['tardy', 'tardy2', 'tardy3']) u \g /dev/null
SELECT payout_retry_transfer(pg_temp.t('tardy2')) \g /dev/null
SELECT is(pg_temp.state('tardy2'), 'pending - 1 g2', '(it goes on under another key)');
SELECT payoutq.record_answer(pg_temp.t(u), pg_temp.token(u), 'sent', 'tr_' || u, NULL, 200, -1) FROM unnest(ARRAY['tardy', 'tardy2']) u \g /dev/null
SELECT is(pg_temp.state('tardy'), 'failed_terminal tr_tardy 1 g1', 'what was failed, and made all the same, stays failed');
SELECT is((SELECT error FROM payout_transfers WHERE user_id = 'tardy'), 'failed here, and made by the provider', 'and says so');
SELECT is((SELECT value FROM payout_health WHERE check_name = 'transfers_made_twice'), 1::numeric, 'which is an alert');
SELECT is(pg_temp.state('tardy2'), 'sent tr_tardy2 2 g1', 'what goes on under another key is sent, and that key is not used');
SELECT payoutq.record_answer(pg_temp.t('tardy3'), pg_temp.token('tardy3'), 'transient', NULL, 'no', 500, -1) \g /dev/null
SELECT is(pg_temp.state('tardy3'), 'failed_terminal - 1 g1', 'other answers change nothing');

INSERT INTO payoutq.circuit VALUES ('stripe', 1024, clock_timestamp(), 'not there', false);
SELECT lives_ok($$SELECT payoutq.open_circuit('stripe', 'unreachable', 'still not there')$$, 'a provider may be away for days');
DELETE FROM payoutq.circuit;

-- ---------------------------------------------------------------------------
-- Whatever a body may be
-- ---------------------------------------------------------------------------

-- What an event of Stripe is answered, or its SQLSTATE, and whether it changes
-- anything; it is taken back. The outcome of the transfer to "lost" is unknown.
CREATE FUNCTION pg_temp.tried(body bytea) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    before text := pg_temp.everything();
    result text;
BEGIN
    BEGIN
        result := payout_handle_webhook('stripe', pg_temp.header('stripe', body), body);
        result := result || CASE WHEN pg_temp.everything() <> before THEN ', changed' ELSE '' END;
        RAISE SQLSTATE 'PQ002';
    EXCEPTION
        WHEN SQLSTATE 'PQ002' THEN
            RETURN result;
        WHEN OTHERS THEN
            RETURN SQLSTATE;
    END;
END $$;
-- The same as it should be
CREATE FUNCTION pg_temp.should(body bytea) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    event jsonb;
    object jsonb;
    lost jsonb := pg_temp.object('lost');
BEGIN
    event := convert_from(body, 'UTF8');
    object := event #> '{data,object}';
    IF event ->> 'id' IS NULL THEN
        RETURN '22023';
    ELSIF starts_with(event ->> 'type', 'transfer.') AND event ->> 'type' <> 'transfer.reversed'
          AND octet_length(object ->> 'id') BETWEEN 1 AND 255 AND object -> 'reversed' IS DISTINCT FROM 'true'
          AND (object ->> 'amount', object ->> 'currency', object ->> 'destination', object #>> '{metadata,payoutq_origin}')
              = (lost ->> 'amount', lost ->> 'currency', lost ->> 'destination', lost #>> '{metadata,payoutq_origin}')
          AND object #>> '{metadata,payoutq_key}' ~ format('^payout:0*%s(:g[0-9]{1,9})?$', pg_temp.t('lost')) THEN
        RETURN 'accepted, changed';
    END IF;
    RETURN 'ignored';
EXCEPTION
    WHEN data_exception THEN
        RETURN SQLSTATE;
END $$;
-- With a value or a key that is another, or is gone, up to three times
CREATE FUNCTION pg_temp.other_values(event jsonb) RETURNS bytea LANGUAGE plpgsql AS $$
DECLARE
    paths text[] := '{id, type, data, "data,object", "data,object,id", "data,object,amount", "data,object,currency", "data,object,destination",
                      "data,object,reversed", "data,object,metadata", "data,object,metadata,payoutq_key", "data,object,metadata,payoutq_origin"}';
    others jsonb[] := ARRAY['null', 'true', '0', '-1', '100', '100.0', '1e2', '1e400', '""', '"100"', '"acct_lost"', '"transfer.reversed"', '"transfer."',
                            '"payout:0"', '"payout:999999999999999999:g999999999"', '[]', '{}', '[{}]', '{"object": {}}',
                            to_jsonb('payout:' || pg_temp.t('lost')), to_jsonb('payout:' || pg_temp.t('lost') || ':g7'), to_jsonb(repeat('x', 300)), to_jsonb(repeat('é', 200)),
                            event, event #> '{data,object}'];
    path text[];
BEGIN
    FOR n IN 1 .. 1 + floor(random() * 3) LOOP
        path := string_to_array(paths[1 + floor(random() * cardinality(paths))], ',');
        CONTINUE WHEN jsonb_typeof(event #> trim_array(path, 1)) IS DISTINCT FROM 'object';
        event := CASE WHEN random() < 0.2 THEN event #- path ELSE jsonb_set(event, path, others[1 + floor(random() * cardinality(others))]) END;
    END LOOP;
    RETURN convert_to(event::text, 'UTF8');
END $$;
-- With bytes that are others, are gone, or are there twice, up to three times
CREATE FUNCTION pg_temp.other_bytes(event jsonb) RETURNS bytea LANGUAGE plpgsql AS $$
DECLARE
    body bytea := convert_to(event::text, 'UTF8');
    others bytea := '\x000a1f225c2c3a5b5d7b7d30392d2e6575ffc3a9eda080' || convert_to(' truefalsn', 'UTF8');
    at integer;
    size integer;
BEGIN
    FOR n IN 1 .. 1 + floor(random() * 3) LOOP
        at := floor(random() * length(body));
        size := 1 + floor(random() * 4);
        body := CASE floor(random() * 3)
                WHEN 0 THEN overlay(body PLACING substr(others, 1 + floor(random() * length(others))::integer, 1) FROM at + 1)
                WHEN 1 THEN overlay(body PLACING '' FROM at + 1 FOR size)
                ELSE overlay(body PLACING substr(body, at + 1, size) FROM at + 1 FOR 0) END;
    END LOOP;
    RETURN body;
END $$;

SELECT payout_set_destination('lost', 'stripe', 'acct_lost'), payout_create_job('lost', ARRAY['lost'], ARRAY[100], provider => 'stripe') \g /dev/null
CALL payout_process();
SELECT pg_temp.claim('stripe') \g /dev/null
SELECT pg_temp.failed('lost', 'unknown') \g /dev/null
CREATE TABLE app.tried (how text, body bytea, should text, result text);
SELECT setseed(0.5) \g /dev/null
INSERT INTO app.tried (how, body)
SELECT how, CASE how WHEN 'values' THEN pg_temp.other_values(event) ELSE pg_temp.other_bytes(event) END
  FROM (SELECT how, n, jsonb_build_object('id', 'evt', 'type', 'transfer.created', 'data', jsonb_build_object('object', pg_temp.object('lost'))) AS event
          FROM unnest(ARRAY['values', 'bytes']) how, generate_series(1, 1000) n OFFSET 0) e;
UPDATE app.tried SET should = pg_temp.should(body), result = pg_temp.tried(body);
SELECT is_empty('SELECT how, should, result, encode(body, ''escape'') FROM app.tried WHERE result IS DISTINCT FROM should', 'whatever a body may be, nothing else happens');
SELECT set_eq('SELECT DISTINCT should FROM app.tried', ARRAY['accepted, changed', 'ignored', '22021', '22023', '22P02'], '(all of it was tried)');

-- ---------------------------------------------------------------------------
-- Cleaning, and permissions
-- ---------------------------------------------------------------------------

SELECT cmp_ok((SELECT count(*) FROM payoutq.webhook_event), '>', 10::bigint, '(there are events)');
UPDATE payoutq.webhook_event SET received_at = now() - interval '29 days 23 hours';
UPDATE payoutq.webhook_event SET received_at = now() - interval '30 days 1 s' WHERE event_id IN ('e1', 'e2', 'e3');
SELECT count(*) AS events FROM payoutq.webhook_event \gset
SELECT is(payout_maintain(1), 0::bigint, 'payout_maintain() counts no events');
SELECT is((SELECT count(*) FROM payoutq.webhook_event), :events - 1::bigint, 'and removes as many as it may');
SELECT payout_maintain() \g /dev/null
SELECT is((SELECT count(*) FROM payoutq.webhook_event), :events - 4::bigint, 'those older than 30 days');
SELECT is(pg_temp.hook('wire', '{"id": "e2", "reference": "ref w1", "status": "completed"}'), 'completed', 'an event that was removed is handled again, and changes nothing');
SELECT is(pg_temp.hook('wire', '{"id": "e5", "reference": "ref w2", "status": "failed"}'), 'duplicate', 'others are still known');

CREATE ROLE payoutq_test_hook;
CREATE ROLE payoutq_test_looker;
SELECT payout_grant('payoutq_test_hook', 'operator'), payout_grant('payoutq_test_looker', 'reader') \g /dev/null
GRANT USAGE ON SCHEMA app TO payoutq_test_hook;
SELECT convert_to('{"id": "e7", "status": "sent"}', 'UTF8') AS body \gset
SELECT pg_temp.header('wire', :'body') AS headers \gset
SET ROLE payoutq_test_looker;
SELECT throws_ok(format('SELECT payout_handle_webhook(''wire'', %L, %L)', :'headers', :'body'), '42501', 'permission denied for function payout_handle_webhook', 'a reader may not');
SET ROLE payoutq_test_hook;
SELECT is(payout_handle_webhook('wire', :'headers', :'body'), 'ignored', 'an operator may');
SELECT throws_ok($$SELECT payoutq.signature_is_valid('wire', 't=1,v1=0', '', now())$$, '42501', NULL, 'but not guess at signatures');
SELECT throws_ok('SELECT FROM payoutq.webhook_event', '42501', NULL, 'nor see the events');
SELECT is_empty($$SELECT FROM pg_user_mappings WHERE umoptions IS NOT NULL$$, 'nor the secrets');
RESET ROLE;

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'at the end the books balance');
SELECT finish();
DROP OWNED BY payoutq_test_hook, payoutq_test_looker;
DROP SCHEMA app CASCADE;
DROP EXTENSION payoutq CASCADE;
CREATE EXTENSION payoutq;
DROP ROLE payoutq_test_hook, payoutq_test_looker;
