-- payout_bind_accounts(): balances in a table of the application, whose
-- triggers and constraints are somebody else's code.
\ir fresh.psql
DROP ROLE IF EXISTS payoutq_test_app, payoutq_test_other;
CREATE ROLE payoutq_test_app;
CREATE ROLE payoutq_test_other;
GRANT ALL ON SCHEMA app TO payoutq_test_app, payoutq_test_other;
SELECT plan(140);

-- The statuses of a job's entries, by user
CREATE FUNCTION pg_temp.statuses(job bigint) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(user_id || ' ' || status || coalesce(' ' || error_code, ''), ', ' ORDER BY entry)
      FROM payout_entries WHERE job_id = job
$$;

-- ---------------------------------------------------------------------------
-- Types of keys and balances
-- ---------------------------------------------------------------------------

CREATE TABLE app.text_key (id text PRIMARY KEY, coins bigint);
CREATE TABLE app.varchar_key (id varchar(20) UNIQUE, coins numeric NOT NULL DEFAULT 0);
CREATE TABLE app.bigint_key (name text, coins integer, id bigint UNIQUE);
CREATE TABLE app.integer_key (id integer PRIMARY KEY, coins bigint DEFAULT 0);
CREATE TABLE app.uuid_key (id uuid PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.text_key VALUES ('11', 5), ('12', NULL), ('other', 1);
INSERT INTO app.varchar_key VALUES ('11', 5.50), ('12', 0), ('other', 1);
INSERT INTO app.bigint_key (id, coins) VALUES (11, 5), (12, NULL), (13, 1);
INSERT INTO app.integer_key VALUES (11, 5), (12, NULL), (13, 1);
INSERT INTO app.uuid_key SELECT ('00000000-0000-0000-0000-0000000000' || i)::uuid, 5 FROM generate_series(11, 13) i;

SELECT lives_ok(format('SELECT payout_bind_accounts(%L, ''id'', ''coins'', %L)', 'app.' || t, t), t || ' can be bound')
  FROM unnest(ARRAY['text_key', 'varchar_key', 'bigint_key', 'integer_key', 'uuid_key']) AS t;
SELECT payout_create_job('types ' || t, ARRAY['12', '11'], ARRAY[20, 10], currency => t)
  FROM unnest(ARRAY['text_key', 'varchar_key', 'bigint_key', 'integer_key']) AS t \g /dev/null
SELECT payout_create_job('types uuid', ARRAY['00000000-0000-0000-0000-000000000012', '00000000-0000-0000-0000-000000000011'],
                         ARRAY[20, 10], currency => 'uuid_key') \g /dev/null
CALL payout_process();
SELECT results_eq('SELECT id, coins FROM app.text_key ORDER BY id', $$VALUES ('11', 15::bigint), ('12', 20), ('other', 1)$$,
    'text keys: a balance that is null counts as 0');
SELECT results_eq('SELECT id, coins FROM app.varchar_key ORDER BY id',
    $$VALUES ('11'::varchar(20), 15.50), ('12', 20), ('other', 1)$$, 'varchar keys, numeric balance');
SELECT results_eq('SELECT id, coins FROM app.bigint_key ORDER BY id', $$VALUES (11::bigint, 15), (12, 20), (13, 1)$$,
    'bigint keys, integer balance');
SELECT results_eq('SELECT id, coins FROM app.integer_key ORDER BY id', $$VALUES (11, 15::bigint), (12, 20), (13, 1)$$, 'integer keys');
SELECT results_eq('SELECT coins FROM app.uuid_key ORDER BY id', ARRAY[15, 25, 5]::bigint[], 'uuid keys');
SELECT is_empty($$SELECT reference FROM payout_jobs WHERE status <> 'completed'$$, 'all those jobs are completed');

SELECT is(payout_balance('11', 'text_key'), 15::bigint, 'payout_balance() reads the bound table');
SELECT is(payout_balance('11', 'bigint_key'), 15::bigint, 'also an integer there');
SELECT is(payout_balance('nobody', 'text_key'), 0::bigint, 'who is not in it has nothing');
SELECT is_empty($$SELECT FROM payout_accounts WHERE currency LIKE '%key'$$, 'nothing is kept in the extension''s own table');
SELECT payout_deposit('12', 100, 'd1', 'text_key') \g /dev/null
SELECT payout_withdraw('12', 115, 'w1', 'text_key') \g /dev/null
SELECT is((SELECT coins FROM app.text_key WHERE id = '12'), 5::bigint, 'deposits and withdrawals change it');
SELECT throws_ok('SELECT payout_withdraw(''12'', 6, ''w2'', ''text_key'')', '23514', NULL, 'but not below zero');
SELECT throws_ok('SELECT payout_withdraw(''nobody'', 6, ''w2'', ''text_key'')', '23514', NULL, 'nor of who is not in it');
SELECT throws_ok('SELECT payout_create_job(''poor'', ARRAY[''11''], ARRAY[6], currency => ''text_key'', source_account => ''12'')',
    '23514', NULL, 'who funds a job must have the money there');
SELECT payout_create_job('funded', ARRAY['11'], ARRAY[5], currency => 'text_key', source_account => '12') AS funded \gset
SELECT is(payout_balance('12', 'text_key'), 0::bigint, 'and pays from there');
CALL payout_process();
SELECT payout_reverse_entry(:funded, '11', 5) \g /dev/null
SELECT results_eq('SELECT coins FROM app.text_key WHERE id IN (''11'', ''12'') ORDER BY id', ARRAY[15, 5]::bigint[],
    'a reversal goes back there');

CREATE TABLE app."Odd ""Table" ("User Id" text PRIMARY KEY, "%1$s" bigint DEFAULT 0);
INSERT INTO app."Odd ""Table" VALUES ('u', 1);
SELECT payout_bind_accounts('app."Odd ""Table"', 'User Id', '%1$s', 'odd');
SELECT payout_create_job('odd', ARRAY['u'], ARRAY[2], currency => 'odd') \g /dev/null
CALL payout_process();
SELECT is((SELECT "%1$s" FROM app."Odd ""Table"), 3::bigint, 'odd names are quoted');

CREATE TABLE app.parts (id text PRIMARY KEY, coins bigint DEFAULT 0) PARTITION BY HASH (id);
CREATE TABLE app.part0 PARTITION OF app.parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE app.part1 PARTITION OF app.parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO app.parts SELECT 'u' || i, 0 FROM generate_series(1, 20) i;
SELECT payout_bind_accounts('app.parts', 'id', 'coins', 'parts');
SELECT payout_create_job('parts', array_agg('u' || i), array_agg(i), currency => 'parts') AS job FROM generate_series(1, 20) i \gset
CALL payout_process();
SELECT matches((SELECT error FROM payout_job_status(:job)), 'superuser',
    'a superuser''s partitioned table is not touched: its partitions may have triggers of anybody');
ALTER TABLE app.parts OWNER TO payoutq_test_app;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is((SELECT count(*)::int FROM app.parts WHERE 'u' || coins = id), 20, 'a partitioned table of an ordinary role can be bound');

-- ---------------------------------------------------------------------------
-- What cannot be bound
-- ---------------------------------------------------------------------------

CREATE TABLE app.bad (id text PRIMARY KEY, coins bigint, plain text, partial text, pair1 text, pair2 text,
    real_balance real, text_balance text, generated_balance bigint GENERATED ALWAYS AS (1) STORED,
    date_key date UNIQUE, numeric_key numeric UNIQUE, UNIQUE (pair1, pair2), dropped text UNIQUE);
CREATE UNIQUE INDEX ON app.bad (partial) WHERE partial <> '';
CREATE UNIQUE INDEX ON app.bad (lower(plain));
ALTER TABLE app.bad DROP COLUMN dropped;
CREATE VIEW app.view AS SELECT * FROM app.bad;
CREATE MATERIALIZED VIEW app.matview AS SELECT * FROM app.bad;
CREATE UNIQUE INDEX ON app.matview (id);
CREATE TEMP TABLE temporary (id text PRIMARY KEY, coins bigint);
SELECT throws_ok(format('SELECT payout_bind_accounts(%L, %L, %L, %L)', tab, key, balance, currency), code, NULL, what)
  FROM (VALUES
    ('app.bad', 'plain', 'coins', 'X',             '22023', 'a key without a unique index'),
    ('app.bad', 'partial', 'coins', 'X',           '22023', 'a key with a partial unique index'),
    ('app.bad', 'pair1', 'coins', 'X',             '22023', 'a key that is unique with another only'),
    ('app.bad', 'date_key', 'coins', 'X',          '22023', 'a key of type date'),
    ('app.bad', 'numeric_key', 'coins', 'X',       '22023', 'a key of type numeric'),
    ('app.bad', 'nothing', 'coins', 'X',           '22023', 'a key that does not exist'),
    ('app.bad', 'dropped', 'coins', 'X',           '22023', 'a key that was dropped'),
    ('app.bad', 'ctid', 'coins', 'X',              '22023', 'a system column'),
    ('app.bad', 'id', 'real_balance', 'X',         '22023', 'a balance of type real'),
    ('app.bad', 'id', 'text_balance', 'X',         '22023', 'a balance of type text'),
    ('app.bad', 'id', 'generated_balance', 'X',    '22023', 'a balance that is generated'),
    ('app.bad', 'id', 'nothing', 'X',              '22023', 'a balance that does not exist'),
    ('app.bigint_key', 'id', 'id', 'X',            '22023', 'the key as the balance'),
    ('app.view', 'id', 'coins', 'X',               '22023', 'a view'),
    ('app.matview', 'id', 'coins', 'X',            '22023', 'a materialized view'),
    ('temporary', 'id', 'coins', 'X',              '22023', 'a temporary table'),
    ('app.bad', 'id', 'coins', '',                 '22023', 'no currency'),
    ('app.bad', 'id', 'coins', NULL,               '22023', 'currency null'),
    (NULL, 'id', 'coins', 'X',                     '22023', 'table null'),
    ('app.bad', NULL, 'coins', 'X',                '22023', 'key null'),
    ('app.bad', 'id', NULL, 'X',                   '22023', 'balance null'),
    ('app.bad', 'id', 'coins', 'text_key',         '55000', 'a currency that is bound already')
  ) AS t (tab, key, balance, currency, code, what);
SELECT payout_deposit('saver', 1, 'd2', 'SAVED') \g /dev/null
SELECT throws_ok('SELECT payout_bind_accounts(''app.bad'', ''id'', ''coins'', ''SAVED'')', '55000', NULL,
    'a currency in which there are balances that nobody would see');
SELECT payout_withdraw('saver', 1, 'w3', 'SAVED') \g /dev/null
SELECT lives_ok('SELECT payout_bind_accounts(''app.bad'', ''id'', ''coins'', ''SAVED'')', 'unless they are withdrawn');
SELECT throws_ok('SELECT payout_unbind_accounts(''X'')', '42704', NULL, 'what is not bound cannot be unbound');

-- who has the right to call it needs the table, too
SELECT payout_grant('payoutq_test_other', 'admin');
CREATE TABLE app.owned (id text PRIMARY KEY, coins bigint);
ALTER TABLE app.owned OWNER TO payoutq_test_app;
GRANT ALL ON app.owned TO payoutq_test_other;
BEGIN;
SET LOCAL SESSION AUTHORIZATION payoutq_test_other;
SELECT throws_ok('SELECT payout_bind_accounts(''app.owned'', ''id'', ''coins'', ''OWNED'')', '42501', NULL,
    'only the owner of a table binds it');
SELECT throws_ok('SELECT payout_bind_accounts(''payoutq.account'', ''user_id'', ''balance'', ''OWNED'')', '42501', NULL,
    'and nobody a table of the extension');
RESET SESSION AUTHORIZATION;
GRANT payoutq_test_app TO payoutq_test_other;
SET LOCAL SESSION AUTHORIZATION payoutq_test_other;
SELECT lives_ok('SELECT payout_bind_accounts(''app.owned'', ''id'', ''coins'', ''OWNED'')', 'or a member of the owner');
ROLLBACK;

-- ---------------------------------------------------------------------------
-- Entries that the table refuses: the others are paid
-- ---------------------------------------------------------------------------

SELECT payout_create_job('missing', ARRAY['11', '12', 'gone', 'other'], ARRAY[1, 1, 1, 1], currency => 'text_key') AS missing \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:missing), '11 completed, 12 completed, gone retryable P0002, other completed',
    'a missing account is cut out');
SELECT matches((SELECT error FROM payout_failed_entries WHERE job_id = :missing), 'account', 'and its error says so');

SELECT payout_create_job('cast', ARRAY['11', '12', 'abc'], ARRAY[1, 1, 1], currency => 'bigint_key') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), '11 completed, 12 completed, abc retryable 22P02', 'so is a user id that is no key');

SELECT payout_create_job('alias', ARRAY['11', '011', ' 11'], ARRAY[1, 2, 4], currency => 'bigint_key') AS job \gset
SELECT coins AS before FROM app.bigint_key WHERE id = 11 \gset
CALL payout_process();
SELECT payout_trigger_job(:job);
CALL payout_process();
SELECT payout_trigger_job(:job);
CALL payout_process();
SELECT is(pg_temp.statuses(:job), ' 11 completed, 011 completed, 11 completed', 'user ids that mean one key are all paid');
SELECT is((SELECT coins - :before FROM app.bigint_key WHERE id = 11), 7, 'each once');

ALTER TABLE app.integer_key ADD CONSTRAINT rich CHECK (coins <= 1000);
SELECT payout_create_job('check', ARRAY['11', '12', '13'], ARRAY[1, 1000, 1], currency => 'integer_key') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), '11 completed, 12 retryable 23514, 13 completed', 'so is one that violates a constraint');

SELECT payout_create_job('range', ARRAY['11', '12', '13'], ARRAY[1, 3000000000, 1], currency => 'bigint_key') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), '11 completed, 12 retryable 22003, 13 completed', 'so is one beyond the type of the balance');

CREATE FUNCTION app.suppress() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER suppress BEFORE UPDATE ON app.uuid_key FOR EACH ROW
    WHEN (NEW.id = '00000000-0000-0000-0000-000000000012') EXECUTE FUNCTION app.suppress();
SELECT payout_create_job('suppressed', ARRAY['00000000-0000-0000-0000-000000000011', '00000000-0000-0000-0000-000000000012'],
                         ARRAY[1, 1], currency => 'uuid_key') AS job \gset
CALL payout_process();
SELECT is((SELECT array_agg(status ORDER BY entry) FROM payout_entries WHERE job_id = :job), ARRAY['completed', 'retryable'],
    'an update that a trigger suppresses does not count as paid');
SELECT is((SELECT sum(coins) FROM app.uuid_key), 46::numeric, 'what is not recorded as paid is not paid');

-- ---------------------------------------------------------------------------
-- Numeric balances that are no bigint
-- ---------------------------------------------------------------------------

INSERT INTO app.varchar_key VALUES ('huge', 1e19), ('debt', -1e19), ('part', 99.5), ('owes', -0.5), ('nan', 'NaN'), ('inf', 'Infinity');
SELECT results_eq('SELECT id::text, payout_balance(id, ''varchar_key'') FROM app.varchar_key WHERE id !~ ''^[0-9o]'' OR id = ''owes'' ORDER BY id',
    $$VALUES ('debt', -9223372036854775808), ('huge', 9223372036854775807), ('inf', 9223372036854775807), ('nan', 9223372036854775807),
             ('owes', -1), ('part', 99)$$, 'are rounded down, and within the range of bigint');
UPDATE app.text_key SET coins = 9007199254740993 WHERE id = 'other';
SELECT is(payout_balance('other', 'text_key'), 9007199254740993, 'a bigint is exact beyond 2^53');
UPDATE app.text_key SET coins = 1 WHERE id = 'other';
SELECT results_eq('SELECT user_id, balance_before, balance_after FROM payout_preview_job(''p'', ARRAY[''huge'', ''part''], ARRAY[100, 100], currency => ''varchar_key'') ORDER BY 1',
    $$VALUES ('huge', 9223372036854775807, 9223372036854775807), ('part', 99, 199)$$, 'the preview keeps within it, too');

CREATE SERVER bind_bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
SELECT payout_create_job('transfers', ARRAY['huge', 'part', 'whole'], ARRAY[100, 100, 100], currency => 'varchar_key', provider => 'bind_bank') AS job \gset
INSERT INTO app.varchar_key VALUES ('whole', 0.5);
CALL payout_process();
UPDATE app.varchar_key SET coins = coins - 100 WHERE id = 'part';
SELECT payout_set_destination(u, 'bind_bank', u) FROM unnest(ARRAY['huge', 'part', 'whole']) u \g /dev/null
SELECT is(payout_retry_job(:job), 2::bigint, 'of failed transfers, those of users who have the money are made again');
SELECT results_eq('SELECT id::text, coins FROM app.varchar_key WHERE id IN (''huge'', ''part'', ''whole'') ORDER BY 1',
    $$VALUES ('huge', 1e19), ('part', 99.5), ('whole', 0.5)$$, 'and not of who lacks half a unit');
SELECT payout_cancel_job(:job) \g /dev/null
DROP SERVER bind_bank CASCADE;
DELETE FROM app.varchar_key WHERE id !~ '^1' AND id <> 'other';

-- ---------------------------------------------------------------------------
-- Whatever fails for everybody stops the job, and pays nobody
-- ---------------------------------------------------------------------------

ALTER TABLE app.text_key RENAME COLUMN coins TO gone;
SELECT payout_create_job('column', ARRAY['11'], ARRAY[7], currency => 'text_key') AS job \gset
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:job)), 'failed', 'without the column the job has failed');
SELECT is(pg_temp.statuses(:job), '11 pending', 'and its entries are as they were');
ALTER TABLE app.text_key RENAME COLUMN gone TO coins;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.statuses(:job), '11 completed', 'retried when the cause is mended, it pays');

ALTER TABLE app.text_key DROP CONSTRAINT text_key_pkey;
INSERT INTO app.text_key VALUES ('twice', 1), ('twice', 2);
SELECT payout_create_job('not unique', ARRAY['11', 'twice', 'missing'], ARRAY[7, 8, 9], currency => 'text_key') AS job \gset
CALL payout_process();
SELECT results_eq(format('SELECT status, error_code FROM payoutq.job WHERE id = %s', :job), $$VALUES ('failed', '42P10')$$,
    'a user with two rows stops the job, although as many rows were changed as there are entries');
SELECT is(pg_temp.statuses(:job), '11 pending, missing pending, twice pending', 'nobody is paid');
SELECT results_eq('SELECT coins FROM app.text_key WHERE id = ''twice'' ORDER BY 1', ARRAY[1, 2]::bigint[], 'nor is he');
SELECT throws_ok('SELECT payout_deposit(''twice'', 5, ''t1'', ''text_key'')', '42P10', NULL, 'he gets no deposit');
SELECT throws_ok('SELECT payout_withdraw(''twice'', 1, ''t2'', ''text_key'')', '42P10', NULL, 'and makes no withdrawal');
DELETE FROM app.text_key WHERE id = 'twice' AND coins = 1;
ALTER TABLE app.text_key ADD PRIMARY KEY (id);
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is(pg_temp.statuses(:job), '11 completed, missing retryable P0002, twice completed', 'with one row it goes on');
SELECT is((SELECT coins FROM app.text_key WHERE id = 'twice'), 10::bigint, 'and pays once');
DELETE FROM app.text_key WHERE id = 'twice';

SELECT payout_create_job('nobody', array_agg('n' || i), array_agg(1), currency => 'text_key') AS job FROM generate_series(1, 25) i \gset
CALL payout_process();
SELECT results_eq(format('SELECT DISTINCT status, error_code, attempts FROM payout_entries WHERE job_id = %s', :job),
    $$VALUES ('retryable', 'P0002', 1)$$, 'a batch of which nobody has an account waits');
SELECT is((SELECT count(*)::int FROM payout_batches WHERE job_id = :job), 1, 'as a whole');
INSERT INTO app.text_key SELECT 'n' || i, 0 FROM generate_series(1, 25) i;
SELECT is(payout_retry_job(:job), 25::bigint, 'and all of it can be retried');
CALL payout_process();
SELECT is((SELECT sum(coins) FROM app.text_key WHERE id LIKE 'n%'), 25::numeric, 'and paid');

ALTER TABLE app.text_key ADD CONSTRAINT frozen CHECK (id NOT LIKE 'n%' OR coins <= 1);
SELECT payout_create_job('mass', array_agg('n' || i), array_agg(1), currency => 'text_key', batch_size => 1) AS job
  FROM generate_series(1, 25) i \gset
CALL payout_process();
SELECT results_eq(format('SELECT status, completed_count FROM payout_job_status(%s)', :job), $$VALUES ('failed', 0::bigint)$$,
    'twenty isolated entries with one error stop the job');
SELECT matches((SELECT error FROM payout_job_status(:job)), 'frozen', 'which names it');
ALTER TABLE app.text_key DROP CONSTRAINT frozen;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is((SELECT completed_count FROM payout_job_status(:job)), 25::bigint, 'it is paid when that is mended');

-- Another error before does not matter
CREATE FUNCTION app.refuse_m00() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'm00'; END $$;
CREATE TRIGGER refuse_m00 BEFORE UPDATE ON app.text_key FOR EACH ROW WHEN (NEW.id = 'm00') EXECUTE FUNCTION app.refuse_m00();
INSERT INTO app.text_key SELECT 'm' || lpad(i::text, 2, '0'), 0 FROM generate_series(0, 21) i;
ALTER TABLE app.text_key ADD CONSTRAINT frozen CHECK (id NOT LIKE 'm%' OR coins < 1);
SELECT payout_create_job('mass after another', array_agg(id), array_agg(1), currency => 'text_key', batch_size => 1) AS job
  FROM app.text_key WHERE id LIKE 'm%' \gset
CALL payout_process();
SELECT results_eq(format('SELECT status, completed_count FROM payout_job_status(%s)', :job), $$VALUES ('failed', 0::bigint)$$,
    'twenty with one error after one with another stop the job');
ALTER TABLE app.text_key DROP CONSTRAINT frozen;
DROP FUNCTION app.refuse_m00 CASCADE;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is((SELECT completed_count FROM payout_job_status(:job)), 22::bigint, 'all are paid when both are mended');

-- ---------------------------------------------------------------------------
-- Triggers run as the owner of the table, and can do less than he
-- ---------------------------------------------------------------------------

ALTER TABLE app.owned OWNER TO payoutq_test_app;
CREATE TABLE app.seen (id text, who name, path text);
ALTER TABLE app.seen OWNER TO payoutq_test_app;
INSERT INTO app.owned VALUES ('immediate', 0), ('deferred', 0), ('role', 0), ('auth', 0), ('temp', 0), ('none', 0);
SELECT payout_bind_accounts('app.owned', 'id', 'coins', 'OWNED');
SET ROLE payoutq_test_app;
CREATE FUNCTION app.look() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO app.seen VALUES (NEW.id, current_user, current_setting('search_path'));
    RETURN NEW;
END $$;
CREATE FUNCTION app.escape() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE CASE NEW.id WHEN 'role' THEN 'SET ROLE postgres' WHEN 'auth' THEN 'SET SESSION AUTHORIZATION DEFAULT'
                        WHEN 'temp' THEN 'CREATE TEMP TABLE trap ()' WHEN 'none' THEN 'SET LOCAL ROLE NONE' END;
    INSERT INTO app.seen VALUES (NEW.id, current_user);
    RETURN NEW;
END $$;
CREATE TRIGGER look AFTER UPDATE ON app.owned FOR EACH ROW WHEN (NEW.id = 'immediate') EXECUTE FUNCTION app.look();
CREATE CONSTRAINT TRIGGER deferred AFTER UPDATE ON app.owned DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.id = 'deferred') EXECUTE FUNCTION app.look();
CREATE TRIGGER escape AFTER UPDATE ON app.owned FOR EACH ROW
    WHEN (NEW.id IN ('role', 'auth', 'temp', 'none')) EXECUTE FUNCTION app.escape();
RESET ROLE;
SELECT payout_create_job('triggers', ARRAY['immediate', 'deferred'], ARRAY[1, 1], currency => 'OWNED') AS job \gset
CALL payout_process();
SELECT results_eq('SELECT id, who FROM app.seen ORDER BY id',
    $$VALUES ('deferred', 'payoutq_test_app'::name), ('immediate', 'payoutq_test_app')$$,
    'triggers run as the owner of the table, deferred ones too');
SELECT is((SELECT array_agg(DISTINCT path) FROM app.seen), ARRAY['pg_catalog, pg_temp'], 'with a search_path that nobody else chose');
SELECT is((SELECT status FROM payout_job_status(:job)), 'completed', 'and what they watch is paid');

SELECT payout_create_job('escape ' || id, ARRAY[id], ARRAY[1], currency => 'OWNED')
  FROM unnest(ARRAY['role', 'auth', 'temp', 'none']) AS id \g /dev/null
CALL payout_process();
SELECT is_empty($$SELECT * FROM app.seen WHERE id NOT IN ('immediate', 'deferred')$$, 'a trigger cannot become somebody else, nor leave a trap');
SELECT is((SELECT sum(coins) FROM app.owned), 2::numeric, 'and what it tried in is not paid');

-- a trigger comes into the extension again, in the middle of a payment
SET ROLE payoutq_test_app;
CREATE TABLE app.coins (id text PRIMARY KEY, coins bigint DEFAULT 0);
CREATE TABLE app.bonus (id text PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.coins SELECT 'u' || i FROM generate_series(1, 200) i;
INSERT INTO app.bonus SELECT 'u' || i FROM generate_series(1, 200) i;
CREATE FUNCTION app.cashback() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM public.payout_deposit(NEW.id, 1 + public.payout_balance(NEW.id, 'COINS') % 10, format('cashback:%s:%s', NEW.id, NEW.coins), 'BONUS');
    RETURN NEW;
END $$;
CREATE TRIGGER cashback AFTER UPDATE ON app.coins FOR EACH ROW EXECUTE FUNCTION app.cashback();
RESET ROLE;
SELECT payout_grant('payoutq_test_app', 'operator');
SELECT payout_bind_accounts('app.coins', 'id', 'coins', 'COINS'), payout_bind_accounts('app.bonus', 'id', 'coins', 'BONUS') \g /dev/null
SELECT payout_create_job('cashback', array_agg('u' || i), array_agg(i), currency => 'COINS', batch_size => 7) AS job FROM generate_series(1, 200) i \gset
CALL payout_process();
SELECT payout_deposit('u' || i, 10, 'd5:' || i, 'COINS') FROM generate_series(1, 200) i \g /dev/null
SELECT is((SELECT completed_count FROM payout_job_status(:job)), 200::bigint, 'a trigger may use the extension itself');
SELECT is((SELECT count(*)::int FROM app.coins c JOIN app.bonus b USING (id)
            WHERE 'u' || c.coins - 10 = id AND b.coins = 2 * (1 + c.coins % 10)), 200, 'and what it does there holds');

-- in a superuser's table a trigger would be a superuser
CREATE TABLE app.super (id text PRIMARY KEY, coins bigint);
INSERT INTO app.super VALUES ('u', 0);
SELECT payout_bind_accounts('app.super', 'id', 'coins', 'SUPER');
GRANT ALL ON app.super TO payoutq_test_app;
SET ROLE payoutq_test_app;
CREATE FUNCTION app.rise() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO app.seen VALUES ('super', current_user); RETURN NEW; END $$;
CREATE TRIGGER rise BEFORE UPDATE ON app.super FOR EACH ROW EXECUTE FUNCTION app.rise();
RESET ROLE;
SELECT payout_create_job('super', ARRAY['u'], ARRAY[1], currency => 'SUPER') AS job \gset
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:job)), 'failed', 'an ordinary role''s trigger in a superuser''s table stops the job');
SELECT is((SELECT error_code FROM payoutq.job WHERE id = :job), '42501', 'as not allowed');
SELECT is_empty($$SELECT FROM app.seen WHERE id = 'super'$$, 'it did not run');
SELECT is((SELECT coins FROM app.super), 0::bigint, 'and nobody is paid');
SELECT throws_ok('SELECT payout_deposit(''u'', 1, ''d3'', ''SUPER'')', '42501', NULL, 'the same holds for a deposit');
CREATE FUNCTION app.trusted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO app.seen VALUES ('trusted', current_user); RETURN NEW; END $$;
ALTER TABLE app.super DISABLE TRIGGER rise;
CREATE TRIGGER trusted BEFORE UPDATE ON app.super FOR EACH ROW EXECUTE FUNCTION app.trusted();
SELECT throws_ok('SELECT payout_deposit(''u'', 1, ''d3'', ''SUPER'')', '42501', NULL, 'even a disabled one');
DROP TRIGGER rise ON app.super;
SELECT lives_ok('SELECT payout_deposit(''u'', 1, ''d3'', ''SUPER'')', 'a superuser''s own trigger may stay');
SELECT is((SELECT who FROM app.seen WHERE id = 'trusted'), session_user, 'and runs as him');
DROP TRIGGER trusted ON app.super;
SET ROLE payoutq_test_app;
CREATE TRIGGER rise BEFORE UPDATE ON app.super FOR EACH ROW EXECUTE FUNCTION app.rise();
RESET ROLE;
ALTER TABLE app.super OWNER TO payoutq_test_app;
SELECT payout_retry_job(:job) \g /dev/null
CALL payout_process();
SELECT is((SELECT coins FROM app.super), 2::bigint, 'with another owner of the table the job pays');
SELECT is((SELECT who FROM app.seen WHERE id = 'super'), 'payoutq_test_app', 'and the trigger runs as him');

-- so would all that is evaluated with it: pwn() makes its owner a superuser
CREATE TABLE app.guarded (id text PRIMARY KEY, coins bigint DEFAULT 0);
INSERT INTO app.guarded VALUES ('u');
SELECT payout_bind_accounts('app.guarded', 'id', 'coins', 'GUARDED');
GRANT TRIGGER ON app.guarded TO payoutq_test_app;
CREATE FUNCTION app.mine(text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
SET ROLE payoutq_test_app;
CREATE FUNCTION app.pwn(text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    ALTER ROLE payoutq_test_app SUPERUSER;
    RETURN true;
END $$;
CREATE FUNCTION app.pwn_now(text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT app.pwn($1)';
CREATE FUNCTION app.pwn_either(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT app.pwn($1)';
CREATE OPERATOR app.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = app.pwn_either);
CREATE DOMAIN app.evil AS text CHECK (app.pwn(VALUE));
RESET ROLE;

-- What becomes of a deposit after such a statement
CREATE FUNCTION pg_temp.deposit_with(statement text, undo text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    answer text := 'paid';
BEGIN
    EXECUTE statement;
    ALTER ROLE payoutq_test_app NOSUPERUSER;
    BEGIN
        PERFORM public.payout_deposit('u', 1, statement, 'GUARDED');
    EXCEPTION WHEN insufficient_privilege THEN
        answer := 'refused';
    END;
    SELECT answer || CASE WHEN rolsuper THEN ', and risen' ELSE '' END INTO answer FROM pg_roles WHERE rolname = 'payoutq_test_app';
    EXECUTE undo;
    ALTER ROLE payoutq_test_app NOSUPERUSER;
    RETURN answer;
END $$;
SELECT is(pg_temp.deposit_with(format('SET ROLE payoutq_test_app;
                                       CREATE TRIGGER t BEFORE UPDATE ON app.guarded FOR EACH ROW WHEN (%s)
                                           EXECUTE FUNCTION suppress_redundant_updates_trigger();
                                       RESET ROLE', condition),
                               'DROP TRIGGER t ON app.guarded'), expected, expected || ': a trigger WHEN ' || condition)
  FROM (VALUES ('app.pwn(NEW.id)', 'refused'), ('NEW.id OPERATOR(app.===) ''u''', 'refused'),
               ('NEW.id::app.evil IS NOT NULL', 'refused'),
               ('ts_rewrite(''a'', ''SELECT tsquery ''''a'''', tsquery ''''b'''' WHERE app.pwn(NULL)'') IS NOT NULL', 'refused'),
               ('payout_deposit(''u'', 1000, ''gift'', ''GIFT'') > 0', 'refused'),
               ('OLD.* IS DISTINCT FROM NEW.* AND NEW.id <> ''v'' AND pg_trigger_depth() < 5 AND now() > ''2000-01-01''', 'paid')
       ) AS t (condition, expected);
SELECT is(pg_temp.deposit_with('CREATE TRIGGER t AFTER UPDATE ON app.guarded FOR EACH ROW EXECUTE FUNCTION
                                    payout_on_settlement(''id'', ''SELECT ''''u'''' AS user_id, 1 AS amount WHERE app.pwn($1)'')',
                               'DROP TRIGGER t ON app.guarded'), 'refused', 'refused: a trigger that runs the query of whoever made it');
SELECT is(pg_temp.deposit_with(format('ALTER TABLE app.guarded ADD CONSTRAINT c CHECK (%s) NOT VALID', condition),
                               'ALTER TABLE app.guarded DROP CONSTRAINT c'), expected, expected || ': CHECK ' || condition)
  FROM (VALUES ('app.pwn(id)', 'refused'), ('id::app.evil IS NOT NULL', 'refused'), ('app.mine(id)', 'paid')) AS t (condition, expected);
SELECT is(pg_temp.deposit_with(format('ALTER TABLE app.guarded ADD COLUMN g boolean GENERATED ALWAYS AS (%s) STORED', expression),
                               'ALTER TABLE app.guarded DROP COLUMN g'), expected, expected || ': a column generated as ' || expression)
  FROM (VALUES ('app.pwn_now(id)', 'refused'), ('coins > 0', 'paid')) AS t (expression, expected);
SELECT is(pg_temp.deposit_with(format('CREATE INDEX i ON app.guarded %s', index), 'DROP INDEX app.i'), expected, expected || ': an index on ' || index)
  FROM (VALUES ('(app.pwn_now(id), coins)', 'refused'), ('(coins) WHERE app.pwn_now(id)', 'refused'),
               ('(lower(id), coins)', 'paid')) AS t (index, expected);
SELECT is(pg_temp.deposit_with(format('CREATE RULE r AS ON UPDATE TO app.guarded DO ALSO UPDATE app.seen SET path = NULL WHERE %s', condition),
                               'DROP RULE r ON app.guarded'), expected, expected || ': a rule WHERE ' || condition)
  FROM (VALUES ('app.pwn(NEW.id)', 'refused'), ('app.mine(NEW.id)', 'paid')) AS t (condition, expected);
CREATE TABLE app.halves (id text PRIMARY KEY, coins bigint) PARTITION BY LIST (id);
CREATE TABLE app.half PARTITION OF app.halves FOR VALUES IN ('u');
INSERT INTO app.half VALUES ('u', 0);
SELECT payout_bind_accounts('app.half', 'id', 'coins', 'HALF');
SELECT throws_ok('SELECT payout_deposit(''u'', 1, ''d7'', ''HALF'')', '42501', NULL, 'a superuser''s partition is refused');

SET ROLE payoutq_test_app;
CREATE TABLE app.parent (id text PRIMARY KEY, coins bigint DEFAULT 0, home text NOT NULL DEFAULT 'x');
INSERT INTO app.parent VALUES ('u');
CREATE FUNCTION app.fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'deferred check failed' USING ERRCODE = '23514'; END $$;
CREATE CONSTRAINT TRIGGER fail AFTER UPDATE ON app.parent DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION app.fail();
RESET ROLE;
SELECT payout_bind_accounts('app.parent', 'id', 'coins', 'DEFER');
SELECT payout_create_job('deferred', ARRAY['u'], ARRAY[1], currency => 'DEFER') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), 'u retryable 23514', 'a deferred check that fails is an error of its entry, not of the commit');
SELECT throws_ok('SELECT payout_deposit(''deferred'', 1, ''d8'', ''OWNED'')', '42501', NULL, 'a session''s deferred constraints are left alone');
BEGIN;
SET CONSTRAINTS ALL IMMEDIATE;
SELECT lives_ok('SELECT payout_deposit(''deferred'', 1, ''d8'', ''OWNED'')', 'unless it says otherwise');
COMMIT;
SELECT payout_create_job_from('source', 'SELECT ''immediate'' AS user_id, 1 AS amount', currency => 'OWNED', source_account => 'deferred') AS job \gset
CALL payout_process();
SELECT is((SELECT status FROM payout_job_status(:job)), 'completed', 'those who pay need not say it');

-- ---------------------------------------------------------------------------
-- A binding follows its table, whatever that is called
-- ---------------------------------------------------------------------------

CREATE TABLE app.users (id text PRIMARY KEY, coins bigint NOT NULL DEFAULT 0);
CREATE TABLE app.users_new (LIKE app.users INCLUDING ALL);
INSERT INTO app.users VALUES ('u');
INSERT INTO app.users_new VALUES ('u');
SELECT payout_bind_accounts('app.users', 'id', 'coins', 'RENAMED');
CREATE FUNCTION pg_temp.pay(reference text) RETURNS bigint LANGUAGE sql AS
    $$ SELECT payout_create_job(reference, ARRAY['u'], ARRAY[1], currency => 'RENAMED') $$;
SELECT payout_deposit('u', 10, 'r0', 'RENAMED'), pg_temp.pay('r1') \g /dev/null
CALL payout_process();
BEGIN;
ALTER TABLE app.users RENAME TO users_old;
ALTER TABLE app.users_new RENAME TO users;
COMMIT;
SELECT pg_temp.pay('r2') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), 'u completed', 'when another table takes its name, payouts go on');
SELECT payout_deposit('u', 10, 'r2', 'RENAMED') \g /dev/null
SELECT is((SELECT coins FROM app.users_old), 22::bigint, 'to the table that is bound');
SELECT is(payout_balance('u', 'RENAMED'), 22::bigint, 'whose balances are those that are read');
SELECT is((SELECT coins FROM app.users), 0::bigint, 'and the other one is left alone');
DROP TABLE app.users;
ALTER TABLE app.users_old RENAME TO users_older;
SELECT pg_temp.pay('r3') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), 'u completed', 'renamed');
ALTER SCHEMA app RENAME TO app_old;
CREATE SCHEMA app;
CREATE TABLE app.users_older (LIKE app_old.users_older INCLUDING ALL);
INSERT INTO app.users_older VALUES ('u');
SELECT pg_temp.pay('r4') AS job \gset
CALL payout_process();
SELECT is(pg_temp.statuses(:job), 'u completed', 'its schema renamed');
SELECT is((SELECT coins FROM app_old.users_older), 24::bigint, 'and nothing went elsewhere');
DROP SCHEMA app CASCADE;
ALTER SCHEMA app_old RENAME TO app;

-- ---------------------------------------------------------------------------
-- Unbind
-- ---------------------------------------------------------------------------

SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'the books balance while currencies are bound');
SELECT lives_ok('SELECT payout_unbind_accounts(''odd'')', 'a table can be unbound');
SELECT payout_create_job('unbound', ARRAY['u'], ARRAY[4], currency => 'odd') \g /dev/null
CALL payout_process();
SELECT is((SELECT "%1$s" FROM app."Odd ""Table"), 3::bigint, 'then it is left alone');
SELECT is((SELECT balance FROM payout_accounts WHERE user_id = 'u' AND currency = 'odd'), 4::bigint,
    'and the extension keeps the balances');
SELECT lives_ok('SELECT payout_unbind_accounts(''parts'')', 'another that had payouts can be unbound');
DROP TABLE app.varchar_key;
SELECT lives_ok('SELECT payout_unbind_accounts(''varchar_key'')', 'and one that is gone');
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT throws_ok('SELECT payout_unbind_accounts(''uuid_key'')', '55000', NULL, 'not with an old snapshot, which may miss a payout');
SELECT throws_ok('SELECT payout_bind_accounts(''app.text_key'', ''id'', ''coins'', ''new'')', '55000', NULL, 'nor bound');
COMMIT;
SELECT is_empty('SELECT * FROM payout_verify() WHERE NOT ok', 'and the books still balance');

SELECT finish();
DROP SCHEMA app CASCADE;
SELECT payout_revoke('payoutq_test_other'), payout_revoke('payoutq_test_app') \g /dev/null
DROP ROLE payoutq_test_app, payoutq_test_other;
