-- How each function is defined: kind and language, volatility, parallel safety,
-- whose rights it runs with, and its settings. A SECURITY DEFINER function
-- without a search_path of its own would be seen here.
\pset format unaligned
\pset tuples_only
SELECT format(E'%s\n    %s, %s, %s%s%s%s', p.oid::regprocedure,
              CASE p.prokind WHEN 'p' THEN l.lanname || ' procedure' ELSE l.lanname END,
              CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END,
              CASE p.proparallel WHEN 's' THEN 'parallel safe' WHEN 'r' THEN 'parallel restricted' ELSE 'parallel unsafe' END,
              CASE WHEN p.proisstrict THEN ', strict' END,
              CASE WHEN p.prosecdef THEN ', SECURITY DEFINER' END,
              ', ' || array_to_string(p.proconfig, '; '))
  FROM pg_depend d
  JOIN pg_proc p ON p.oid = d.objid
  JOIN pg_language l ON l.oid = p.prolang
 WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
   AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'payoutq')
 ORDER BY p.oid::regprocedure::text COLLATE "C";

-- Tables, views and sequences, and what a dump keeps of them
SELECT format('%s %s%s',
              CASE c.relkind WHEN 'r' THEN 'table' WHEN 'v' THEN 'view' WHEN 'S' THEN 'sequence' ELSE c.relkind::text END,
              c.oid::regclass, CASE WHEN c.oid = ANY (x.extconfig) THEN ', dumped' END)
  FROM pg_depend d
  JOIN pg_class c ON c.oid = d.objid
  JOIN pg_extension x ON x.oid = d.refobjid
 WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'e' AND x.extname = 'payoutq'
 ORDER BY c.relkind, c.oid::regclass::text COLLATE "C";

-- Triggers that guard the ledger
SELECT pg_get_triggerdef(t.oid)
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
 WHERE c.relnamespace = 'payoutq'::regnamespace AND NOT t.tgisinternal
 ORDER BY c.relname, t.tgname;
