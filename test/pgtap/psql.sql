-- What psql shows: a job's progress within 100 columns, and a description of
-- everything.
\ir fresh.psql
SELECT plan(18);


CREATE FUNCTION pg_temp.too_long(shown text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT line FROM regexp_split_to_table(shown, '\n') line WHERE length(line) > 100
$$;
\set file `mktemp`

-- ---------------------------------------------------------------------------
-- A job from its beginning to its end
-- ---------------------------------------------------------------------------

SELECT is_empty('SELECT FROM payout_progress', 'nothing yet');
SELECT payout_create_job('settlement:2026-11-30:1', array_agg('u' || i), array_agg(i::bigint)) AS large
  FROM generate_series(1, 43575) i \gset
SELECT results_eq('SELECT reference, status, bar, done, failed, rate, time_left FROM payout_progress',
    $$VALUES ('..26-11-30:1', 'queued', '[----------]   0 %', '0/43575', 0::bigint, NULL::numeric, NULL::interval)$$,
    'a job is queued; of a long reference the end is shown');
CALL payout_process(max_batches => 60);
SELECT results_eq('SELECT status, bar, done, failed, rate > 0, time_left >= ''0'' FROM payout_progress',
    $$VALUES ('running', '[######----]  68 %', '30000/43575', 0::bigint, true, true)$$, 'it is running');

-- Others beside it: with entries that fail, cancelled, and larger than is usual
CREATE TABLE app.wallet (id text PRIMARY KEY, coins bigint DEFAULT 0 CHECK (coins < 1000));
INSERT INTO app.wallet SELECT 'u' || i FROM generate_series(1, 3) i;
SELECT payout_bind_accounts('app.wallet', 'id', 'coins', 'COIN') \g /dev/null
\set setting payoutq.max_attempts
\set value 1
\ir setting.psql
SELECT payout_create_job('some fail', ARRAY['u1', 'u2', 'u3'], ARRAY[1, 5000, 7000], currency => 'COIN') AS some \gset
CALL payout_process(job_id => :some);
\set value 5
\ir setting.psql
ALTER SYSTEM RESET payoutq.max_attempts;
SELECT payout_create_job('one', ARRAY['u1'], ARRAY[1]) AS one \gset
SELECT payout_cancel_job(:one) \g /dev/null
SELECT payout_create_job('1234567890123', array_agg('m' || i), array_agg(1::bigint)) AS million FROM generate_series(1, 250000) i \gset
CALL payout_process(max_batches => 100, job_id => :million);
SELECT results_eq('SELECT reference, status, bar, done, failed FROM payout_progress OFFSET 1',
    $$VALUES ('some fail', 'completed', '[##########] 100 %', '1/3', 2::bigint),
             ('one', 'cancelled', '[----------]   0 %', '0/1', 0),
             ('..4567890123', 'running', '[##--------]  20 %', '50k/250k', 0)$$, 'all kinds of jobs');

-- As it is on a terminal
\pset format aligned
\pset tuples_only off
\o :file
SELECT * FROM payout_progress;
\o
\pset format unaligned
\pset tuples_only on
\set shown `cat :'file'`
SELECT matches((:'shown')::text, '^ job_id .* time_left.*30000/43575.*50k/250k', 'psql shows them');
SELECT is_empty(format('SELECT pg_temp.too_long(%L)', (:'shown')::text), 'within 100 columns');

CALL payout_process();
SELECT results_eq(format('SELECT status, bar, done, rate > 0, time_left FROM payout_progress WHERE job_id = %s', :large),
    $$VALUES ('completed', '[##########] 100 %', '43575/43575', true, NULL::interval)$$, 'it is completed');
\pset format aligned
\pset tuples_only off
\o :file
SELECT * FROM payout_progress;
\o
\pset format unaligned
\pset tuples_only on
\set shown `cat :'file'`
\set gone `rm -f :'file'`
SELECT matches((:'shown')::text, '43575/43575', 'psql shows it');
SELECT is_empty(format('SELECT pg_temp.too_long(%L)', (:'shown')::text), 'still within 100 columns');

UPDATE payoutq.job SET completed_at = completed_at - interval '1 hour' WHERE id = :large;
SELECT is_empty(format('SELECT FROM payout_progress WHERE job_id = %s', :large), 'after an hour it is not shown any more');

-- ---------------------------------------------------------------------------
-- Descriptions
-- ---------------------------------------------------------------------------

CREATE TEMP TABLE described AS
SELECT d.classid, d.objid, pg_describe_object(d.classid, d.objid, 0) AS object, obj_description(d.objid, c.relname) AS description
  FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'payoutq' JOIN pg_class c ON c.oid = d.classid
 WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e';
SELECT is_empty($$SELECT object FROM described JOIN pg_class c ON c.oid = objid AND classid = 'pg_class'::regclass
                   WHERE c.relkind IN ('r', 'v') AND description IS NULL$$, 'each table and view has a description');
SELECT is_empty($$SELECT object FROM described WHERE classid IN ('pg_namespace'::regclass, 'pg_foreign_data_wrapper'::regclass)
                     AND description IS NULL$$, 'so have the schema and the wrapper');
SELECT is_empty($$SELECT object FROM described JOIN pg_proc p ON p.oid = objid AND classid = 'pg_proc'::regclass
                   WHERE p.proname LIKE 'payout\_%' AND description IS NULL$$, 'each function for applications');
SELECT is_empty($$SELECT c.oid::regclass, a.attname FROM described JOIN pg_class c ON c.oid = objid AND classid = 'pg_class'::regclass
                    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
                   WHERE c.relkind = 'v' AND c.relname LIKE 'payout\_%' AND col_description(c.oid, a.attnum) IS NULL$$,
    'each column of a view');
SELECT is_empty($$SELECT name FROM pg_settings WHERE name LIKE 'payoutq.%' AND short_desc !~ '^Sets .*\.$'$$, 'and each setting');
SELECT is((SELECT count(*) FROM pg_settings WHERE name LIKE 'payoutq.%') > 10, true, 'of which there are some');
SELECT is_empty($$SELECT object, description FROM described
                   WHERE object ~ 'payout_' AND (description ~ '^(The|A|An|This) |\.$|\n|  ' OR length(description) > 500)$$,
    'as PostgreSQL writes them: one line, no full stop');
SELECT is_empty($$SELECT object, description FROM described JOIN pg_proc p ON p.oid = objid AND classid = 'pg_proc'::regclass
                   WHERE p.proname LIKE 'payout\_%' AND description ~ '\merror' AND description !~ '\merrors?: (those|\w{5})'$$,
    'errors are at the end, with their SQLSTATEs');
SELECT finish();
