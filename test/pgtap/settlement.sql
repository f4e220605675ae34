-- payout_on_settlement(): a trigger on the application's own table makes the
-- one job of a settlement, in the transaction that settles.
\ir fresh.psql
SELECT plan(37);
DROP ROLE IF EXISTS payoutq_test_settler;

CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT payout_set_destination('w' || i, 'bank', 'x') FROM generate_series(1, 9) i \g /dev/null
CREATE TABLE app.winner (contest text, who text, prize integer);
INSERT INTO app.winner SELECT c, 'w' || i, i FROM unnest(ARRAY['7', 'final', 'it''s \ $1', '5d2f8ee0-4a3b-4b7e-9d4e-0d8a3e1f2c11']) AS c, generate_series(1, 3) i;
CREATE TABLE app.contest (id bigint PRIMARY KEY, done boolean DEFAULT false, note text);
CREATE TRIGGER pay AFTER INSERT OR UPDATE ON app.contest FOR EACH ROW WHEN (NEW.done)
    EXECUTE FUNCTION payout_on_settlement('id', 'SELECT who AS user_id, prize AS amount FROM app.winner WHERE contest::text = $1::text', 'bank', 'EUR');
CREATE FUNCTION pg_temp.jobs() RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(format('%s %s %s %s', reference, coalesce(provider, '-'), currency, total_pool), ', ' ORDER BY job_id) FROM payout_jobs
$$;

INSERT INTO app.contest VALUES (7, false), (8, false);
SELECT is(pg_temp.jobs(), NULL, 'what is not settled makes no job');
BEGIN;
UPDATE app.contest SET done = true WHERE id = 7;
SELECT is(pg_temp.jobs(), 'app.contest:7 bank EUR 6', 'settled, it makes one, in the same transaction');
ROLLBACK;
SELECT is(pg_temp.jobs(), NULL, 'rolled back, there is none');
UPDATE app.contest SET done = true WHERE id = 7;
SELECT is(pg_temp.jobs(), 'app.contest:7 bank EUR 6', 'settled after all');
CALL payout_process();
SELECT results_eq('SELECT user_id, amount, currency, provider, status FROM payout_transfers ORDER BY amount',
    $$VALUES ('w1' COLLATE "C", 1::bigint, 'EUR', 'bank' COLLATE "C", 'pending'), ('w2', 2, 'EUR', 'bank', 'pending'), ('w3', 3, 'EUR', 'bank', 'pending')$$,
    'its winners have their transfers');
UPDATE app.contest SET note = 'again' WHERE id = 7;
UPDATE app.contest SET done = false WHERE id = 7;
UPDATE app.contest SET done = true WHERE id = 7;
SELECT is((SELECT count(*)::int FROM payout_jobs), 1, 'fired again, it makes none');
INSERT INTO app.winner VALUES ('7', 'w9', 9);
UPDATE app.contest SET note = 'more winners' WHERE id = 7;
SELECT is(pg_temp.jobs(), 'app.contest:7 bank EUR 6', 'also when the winners are others by now');
SELECT is((SELECT count(*)::int FROM payout_transfers), 3, 'and no transfer');
UPDATE app.contest SET done = true WHERE id = 8;
SELECT is((SELECT count(*)::int FROM payout_jobs), 1, 'without winners there is no job');
INSERT INTO app.winner VALUES ('8', 'w1', 5);
UPDATE app.contest SET note = 'a winner' WHERE id = 8;
SELECT is((SELECT total_pool FROM payout_job_status('app.contest:8')), 5::bigint, 'but there is when they come later');
INSERT INTO app.winner VALUES ('9', 'w1', 5);
INSERT INTO app.contest VALUES (9, true);
SELECT is((SELECT total_pool FROM payout_job_status('app.contest:9')), 5::bigint, 'a row that is settled from the start makes one');
INSERT INTO app.winner SELECT c::text, 'w1', c FROM generate_series(100, 119) c;
INSERT INTO app.contest SELECT c, true FROM generate_series(100, 119) c;
SELECT is((SELECT count(*)::int FROM payout_jobs WHERE reference ~ ':1..$'), 20, 'many rows, many jobs');

-- keys of other types, and other names
CREATE TABLE app."Text keys" ("The key" text, done boolean);
CREATE TRIGGER pay AFTER INSERT ON app."Text keys" FOR EACH ROW
    EXECUTE FUNCTION payout_on_settlement('The key', 'SELECT who AS user_id, prize AS amount FROM app.winner WHERE contest = $1', 'bank');
INSERT INTO app."Text keys" VALUES ('final'), ('it''s \ $1');
SELECT is((SELECT total_pool FROM payout_job_status('app.Text keys:final')), 6::bigint, 'a key of type text');
SELECT is((SELECT total_pool FROM payout_job_status('app.Text keys:it''s \ $1')), 6::bigint, 'with characters of all kinds');
SELECT is((SELECT currency FROM payout_jobs WHERE reference = 'app.Text keys:final'), 'USD', 'the currency may be left out');
CREATE TABLE app.uuid_key (id uuid);
INSERT INTO app.winner SELECT '00000000-0000-0000-0000-000000000001', 'w4', 4;
CREATE VIEW app.uuid_winner AS SELECT CASE WHEN contest ~ '-' THEN contest::uuid END AS contest, who, prize FROM app.winner;
CREATE TRIGGER pay AFTER INSERT ON app.uuid_key FOR EACH ROW
    EXECUTE FUNCTION payout_on_settlement('id', 'SELECT who AS user_id, prize AS amount FROM app.uuid_winner WHERE contest = $1');
INSERT INTO app.uuid_key VALUES ('5D2F8EE0-4a3b-4b7e-9d4e-0d8a3e1f2c11');
SELECT results_eq($$SELECT total_pool, provider FROM payout_jobs WHERE reference = 'app.uuid_key:5d2f8ee0-4a3b-4b7e-9d4e-0d8a3e1f2c11'$$,
    'VALUES (6::bigint, NULL::text)', 'a key of type uuid; without a provider the job pays into balances');
CREATE TRIGGER empty AFTER INSERT ON app.uuid_key FOR EACH ROW
    EXECUTE FUNCTION payout_on_settlement('id', 'SELECT who AS user_id, prize AS amount FROM app.uuid_winner WHERE contest = $1', '', 'EUR');
INSERT INTO app.uuid_key VALUES ('00000000-0000-0000-0000-000000000001');
SELECT is((SELECT count(*)::int FROM payout_jobs WHERE reference ~ 'uuid_key:0000'), 1, 'two triggers make one job');
DROP TRIGGER pay ON app.uuid_key;
INSERT INTO app.winner SELECT '00000000-0000-0000-0000-000000000002', 'w5', 5;
INSERT INTO app.uuid_key VALUES ('00000000-0000-0000-0000-000000000002');
SELECT results_eq($$SELECT provider, currency FROM payout_jobs WHERE reference ~ '0002$'$$, $$VALUES (NULL::text, 'EUR')$$, 'an empty provider is none');

-- wrong use
CREATE FUNCTION pg_temp.settle(definition text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    CREATE TABLE app.wrong (id bigint, done boolean);
    EXECUTE format('CREATE TRIGGER pay %s', replace(definition, 'EXECUTE', 'EXECUTE FUNCTION payout_on_settlement'));
    INSERT INTO app.wrong VALUES (1, true);
    UPDATE app.wrong SET done = true;
    DELETE FROM app.wrong;
END $$;
SELECT throws_ok(format('SELECT pg_temp.settle(%L)', definition), code, NULL, what)
  FROM (VALUES
    ('AFTER INSERT ON app.wrong FOR EACH STATEMENT EXECUTE(''id'', ''SELECT 1'')',                  '22023', 'a trigger for statements'),
    ('AFTER DELETE ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT 1'')',                        '22023', 'a trigger for DELETE'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE()',                                            '22023', 'no arguments'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'')',                                      '22023', 'no query'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT 1'', ''bank'', ''EUR'', 5)',  '22023', 'too many arguments'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''ID'', ''SELECT 1'')',                        '22023', 'no such column'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT ''''w'''' AS user_id, 1 AS amount'', ''nowhere'')', '42704', 'no such provider'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT 1'')',                        '42703', 'a query without the columns'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT ''''w'''' AS user_id, 0 AS amount'')', '23514', 'an amount of 0'),
    ('AFTER INSERT ON app.wrong FOR EACH ROW EXECUTE(''id'', ''SELECT ''''w'''' AS user_id, 1 AS amount FROM generate_series(1, 2)'')', '23505', 'a winner twice')
  ) AS t (definition, code, what);
SELECT throws_ok('INSERT INTO app."Text keys" VALUES (NULL)', '22023', NULL, 'a key that is null');
SELECT is_empty('SELECT FROM app."Text keys" WHERE "The key" IS NULL', 'and the row is not settled');

-- with the rights of whoever settles
CREATE ROLE payoutq_test_settler;
GRANT USAGE ON SCHEMA app TO payoutq_test_settler;
GRANT SELECT, INSERT, UPDATE ON app.contest TO payoutq_test_settler;
INSERT INTO app.winner VALUES ('200', 'w1', 1);
SET ROLE payoutq_test_settler;
SELECT throws_ok('INSERT INTO app.contest VALUES (200, true)', '42501', NULL, 'who may do nothing makes no job');
RESET ROLE;
SELECT payout_grant('payoutq_test_settler', 'operator') \g /dev/null
SET ROLE payoutq_test_settler;
SELECT throws_ok('INSERT INTO app.contest VALUES (200, true)', '42501', 'permission denied for table winner', 'nor who may not read the winners');
RESET ROLE;
GRANT SELECT ON app.winner TO payoutq_test_settler;
SET ROLE payoutq_test_settler;
SELECT throws_ok('INSERT INTO app.contest VALUES (200, true)', '42501', 'permission denied for provider "bank"', 'nor who may not use the provider');
RESET ROLE;
GRANT USAGE ON FOREIGN SERVER bank TO payoutq_test_settler;
SET ROLE payoutq_test_settler;
SELECT lives_ok('INSERT INTO app.contest VALUES (200, true)', 'who may do all of that, does');
RESET ROLE;
SELECT is((SELECT created_by FROM payout_jobs WHERE reference = 'app.contest:200'), 'payoutq_test_settler', 'the job is his');

CALL payout_process();
SELECT is((SELECT count(*)::int FROM payout_transfers WHERE status = 'pending'), 32, 'everybody has a transfer');
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance');
SELECT finish();
DROP OWNED BY payoutq_test_settler;
DROP SCHEMA app CASCADE;
DROP EXTENSION payoutq CASCADE;
CREATE EXTENSION payoutq;
DROP ROLE payoutq_test_settler;
