-- All that the extension consists of, one line for each fact, so that an update
-- can be compared with a fresh install: members, with their owners, privileges
-- (those a dump takes for granted, too), comments and definitions.
\pset format unaligned
\pset tuples_only
SET search_path = pg_catalog;
WITH RECURSIVE extension AS (SELECT * FROM pg_extension WHERE extname = 'payoutq'),
-- Triggers, constraints, indexes and rules belong to members and are none.
part (classid, objid, objsubid) AS (
    SELECT d.classid, d.objid, d.objsubid FROM pg_depend d, extension x
     WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = x.oid AND d.deptype = 'e'
    UNION
    SELECT d.classid, d.objid, d.objsubid FROM part p
      JOIN pg_depend d ON d.refclassid = p.classid AND d.refobjid = p.objid AND d.deptype IN ('a', 'i')
     -- of tables that users bind, and the like
     WHERE d.classid IN ('pg_class'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass, 'pg_rewrite'::regclass,
                         'pg_attrdef'::regclass, 'pg_type'::regclass, 'pg_policy'::regclass, 'pg_statistic_ext'::regclass)
), object AS (
    SELECT p.*, i.type || ' ' || i.identity AS name
      FROM (SELECT DISTINCT classid, objid FROM part) p, pg_identify_object(p.classid, p.objid, 0) i
     WHERE i.schema IS DISTINCT FROM 'pg_toast'
), acl (classid, objid, owner, acl) AS (
    SELECT 'pg_class'::regclass, oid, relowner, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, relowner)) FROM pg_class
    UNION ALL SELECT 'pg_proc'::regclass, oid, proowner, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
    UNION ALL SELECT 'pg_namespace'::regclass, oid, nspowner, coalesce(nspacl, acldefault('n', nspowner)) FROM pg_namespace
    UNION ALL SELECT 'pg_type'::regclass, oid, typowner, coalesce(typacl, acldefault('T', typowner)) FROM pg_type
    UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid, fdwowner, coalesce(fdwacl, acldefault('F', fdwowner))
      FROM pg_foreign_data_wrapper
), fact AS (
    SELECT name, 'is a part' AS fact FROM object
    UNION ALL SELECT name, 'is a member' FROM object JOIN pg_depend d USING (classid, objid) WHERE d.deptype = 'e'
    UNION ALL SELECT name, 'owner ' || owner::regrole FROM object JOIN acl USING (classid, objid)
    UNION ALL SELECT name, 'privilege ' || a::text FROM object JOIN acl USING (classid, objid), unnest(acl) a
    UNION ALL SELECT name, concat('initial privilege ', a::text, ' of column ' || nullif(i.objsubid, 0))
      FROM object o JOIN pg_init_privs i ON (i.classoid, i.objoid) = (o.classid, o.objid), unnest(i.initprivs) a
    UNION ALL SELECT name, concat('comment ', a.attname || ': ', d.description)
      FROM object o JOIN pg_description d ON (d.classoid, d.objoid) = (o.classid, o.objid)
      LEFT JOIN pg_attribute a ON d.objsubid > 0 AND (a.attrelid, a.attnum) = (d.objoid, d.objsubid)
    UNION ALL SELECT name, pg_get_functiondef(p.oid)
      FROM object o JOIN pg_proc p ON o.classid = 'pg_proc'::regclass AND p.oid = o.objid WHERE p.prokind <> 'a'
    UNION ALL SELECT name, format('relation %s %s %s %s', c.relkind, c.relpersistence, c.relrowsecurity, c.reloptions)
      FROM object o JOIN pg_class c ON o.classid = 'pg_class'::regclass AND c.oid = o.objid
    UNION ALL SELECT name, format('column %s: %s %s %s %s %s %s %s', row_number() OVER (PARTITION BY a.attrelid ORDER BY a.attnum),
                                  a.attname, format_type(a.atttypid, a.atttypmod), a.attcollation::regcollation,
                                  CASE WHEN a.attnotnull THEN 'not null' END, concat(a.attidentity, a.attgenerated),
                                  pg_get_expr(d.adbin, d.adrelid), a.attstattarget)
      FROM object o JOIN pg_attribute a ON o.classid = 'pg_class'::regclass AND a.attrelid = o.objid AND a.attnum > 0 AND NOT a.attisdropped
      LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    UNION ALL SELECT name, format('column privilege %s %s', a.attname, p)
      FROM object o JOIN pg_attribute a ON o.classid = 'pg_class'::regclass AND a.attrelid = o.objid, unnest(a.attacl) p
    UNION ALL SELECT name, pg_get_viewdef(c.oid)
      FROM object o JOIN pg_class c ON o.classid = 'pg_class'::regclass AND c.oid = o.objid WHERE c.relkind IN ('v', 'm')
    UNION ALL SELECT name, pg_get_indexdef(i.indexrelid) || CASE WHEN i.indisvalid THEN '' ELSE ' invalid' END
      FROM object o JOIN pg_index i ON o.classid = 'pg_class'::regclass AND i.indexrelid = o.objid
    UNION ALL SELECT name, format('sequence %s %s %s %s %s %s', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache)
      FROM object o JOIN pg_sequence s ON o.classid = 'pg_class'::regclass AND s.seqrelid = o.objid
    UNION ALL SELECT name, concat(pg_get_constraintdef(c.oid), CASE WHEN NOT c.convalidated THEN ' not valid' END)
      FROM object o JOIN pg_constraint c ON o.classid = 'pg_constraint'::regclass AND c.oid = o.objid
    UNION ALL SELECT name, pg_get_triggerdef(t.oid) || ' ' || t.tgenabled::text
      FROM object o JOIN pg_trigger t ON o.classid = 'pg_trigger'::regclass AND t.oid = o.objid WHERE NOT t.tgisinternal
    UNION ALL SELECT name, 'label ' || e.enumlabel
      FROM object o JOIN pg_enum e ON o.classid = 'pg_type'::regclass AND e.enumtypid = o.objid
    UNION ALL SELECT name, format('%s %s %s', w.fdwhandler::regproc, w.fdwvalidator::regproc, w.fdwoptions)
      FROM object o JOIN pg_foreign_data_wrapper w ON o.classid = 'pg_foreign_data_wrapper'::regclass AND w.oid = o.objid
    UNION ALL SELECT c::regclass::text, 'dumped ' || x.extcondition[n]
      FROM extension x, unnest(x.extconfig) WITH ORDINALITY AS u (c, n)
    UNION ALL SELECT 'extension', format('version %s relocatable %s', extversion, extrelocatable) FROM extension
)
-- Names that the server has made of oids are the same only by chance.
SELECT line
  FROM (SELECT regexp_replace(replace(name || E'\t' || fact, E'\n', '\n'), 'RI_ConstraintTrigger_\w_\d+|\d+_\d+_\d+_not_null', 'x', 'g') AS line
          FROM fact) f
 ORDER BY line COLLATE "C";
