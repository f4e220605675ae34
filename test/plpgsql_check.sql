-- What plpgsql_check finds in the functions of the extension; nothing is good.
WITH function AS (
    SELECT p.oid, t.tgrelid, t.tgnewtable
      FROM pg_proc p
      JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
      JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
      JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'payoutq'
      LEFT JOIN (SELECT DISTINCT ON (tgfoid) tgfoid, tgrelid, tgnewtable FROM pg_trigger ORDER BY tgfoid, oid) t ON t.tgfoid = p.oid
     -- a trigger of the application's tables
     WHERE p.proname <> 'payout_on_settlement'
)
SELECT f.oid::regprocedure, c.lineno, c.level, c.message, c.detail
  FROM function f,
       plpgsql_check_function_tb(f.oid, coalesce(f.tgrelid, 0), newtable => f.tgnewtable, performance_warnings => false) c
 -- a parameter that is returned as it came
 WHERE c.message NOT LIKE 'unmodified OUT variable%'
 ORDER BY 1, 2;
