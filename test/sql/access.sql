-- Who may do what: every object of the extension, for the five kinds of access
-- and PUBLIC.  Whoever adds an object has to say here who may use it.
SET client_min_messages = warning;
CREATE ROLE kind_sender;
CREATE ROLE kind_reader;
CREATE ROLE kind_webhook;
CREATE ROLE kind_operator;
CREATE ROLE kind_monitor;
SELECT sentdm_grant(('kind_' || kind)::regrole, kind) FROM unnest('{sender,reader,webhook,operator,monitor}'::text[]) kind;
SELECT sentdm_grant('kind_reader', 'owner');
SELECT sentdm_revoke('kind_reader', 'owner');

CREATE FUNCTION pg_temp.holders(may text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	kind text;
	yes boolean;
	list text := '';
BEGIN
	FOREACH kind IN ARRAY '{public,kind_sender,kind_reader,kind_webhook,kind_operator,kind_monitor,pg_monitor}'::text[] LOOP
		EXECUTE format(may, quote_literal(kind)) INTO yes;
		list := list || CASE WHEN yes THEN ' ' || replace(kind, 'kind_', '') ELSE '' END;
	END LOOP;
	RETURN ltrim(list);
END $$;
CREATE TEMP VIEW members AS
	SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
	WHERE d.deptype = 'e' AND e.extname = 'sentdm';

-- who may run a function; overloads are told apart by their number of arguments
SELECT (p.proname || '/' || p.pronargs) COLLATE "C" AS function,
	pg_temp.holders(format('SELECT has_function_privilege(%%s, %s, ''EXECUTE'')', p.oid)) AS may_run
FROM members m JOIN pg_proc p ON m.classid = 'pg_proc'::regclass AND p.oid = m.objid
GROUP BY 1, 2 ORDER BY 1;

-- who may read a relation, or some of its columns
SELECT c.relname COLLATE "C" AS relation,
	pg_temp.holders(format('SELECT has_table_privilege(%%s, %s, ''SELECT'')', c.oid)) AS may_read,
	nullif(pg_temp.holders(format('SELECT has_any_column_privilege(%%s, %s, ''SELECT'')', c.oid)),
		pg_temp.holders(format('SELECT has_table_privilege(%%s, %s, ''SELECT'')', c.oid))) AS may_read_columns
FROM members m JOIN pg_class c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid
WHERE c.relkind IN ('r', 'v') ORDER BY 1;
SELECT c.relname AS relation, string_agg(a.attname, ' ' ORDER BY a.attnum) AS not_for_readers
FROM members m JOIN pg_class c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.relname IN ('messages', 'deliveries', 'events') AND NOT has_column_privilege('kind_reader', c.oid, a.attnum, 'SELECT')
GROUP BY 1 ORDER BY 1;

-- who may do more than read
SELECT pg_describe_object(m.classid, m.objid, 0) AS object,
	pg_temp.holders(CASE WHEN c.relkind = 'S' THEN format('SELECT has_sequence_privilege(%%s, %s, ''USAGE, SELECT, UPDATE'')', c.oid)
		ELSE format('SELECT has_table_privilege(%%s, %s, ''INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER'')'
			' OR has_any_column_privilege(%%1$s, %s, ''INSERT, UPDATE, REFERENCES'')', c.oid, c.oid) END) AS may_write
FROM members m JOIN pg_class c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid
WHERE pg_temp.holders(CASE WHEN c.relkind = 'S' THEN format('SELECT has_sequence_privilege(%%s, %s, ''USAGE, SELECT, UPDATE'')', c.oid)
		ELSE format('SELECT has_table_privilege(%%s, %s, ''INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER'')'
			' OR has_any_column_privilege(%%1$s, %s, ''INSERT, UPDATE, REFERENCES'')', c.oid, c.oid) END) <> '';
SELECT pg_temp.holders('SELECT has_schema_privilege(%s, ''sentdm'', ''USAGE'')') AS may_use_the_schema,
	pg_temp.holders('SELECT has_schema_privilege(%s, ''sentdm'', ''CREATE'')') AS may_create_in_it;
-- and what else there is (since PostgreSQL 17 the tables' row types, too)
SELECT m.classid::regclass AS class, count(*) > 0 AS some
FROM members m WHERE m.classid NOT IN ('pg_proc'::regclass, 'pg_class'::regclass, 'pg_type'::regclass) GROUP BY 1 ORDER BY 1;

-- sentdm_health() sees what was granted by hand
CREATE VIEW access_health AS SELECT ok, detail FROM sentdm_health() WHERE name = 'access';
SELECT * FROM access_health;
GRANT INSERT ON sentdm.messages TO PUBLIC;
SELECT * FROM access_health;
REVOKE INSERT ON sentdm.messages FROM PUBLIC;
GRANT EXECUTE ON FUNCTION sentdm_pause(text) TO PUBLIC;
SELECT * FROM access_health;
REVOKE EXECUTE ON FUNCTION sentdm_pause(text) FROM PUBLIC;
GRANT UPDATE (state) ON sentdm.messages TO kind_reader;
SELECT * FROM access_health;
REVOKE UPDATE (state) ON sentdm.messages FROM kind_reader;
GRANT TRIGGER ON sentdm.deliveries TO kind_sender;
SELECT * FROM access_health;
REVOKE TRIGGER ON sentdm.deliveries FROM kind_sender;
GRANT CREATE ON SCHEMA sentdm TO kind_sender;
SELECT * FROM access_health;
REVOKE CREATE ON SCHEMA sentdm FROM kind_sender;
SELECT * FROM access_health;

-- ... and a trigger that cannot work, before it fires
CREATE VIEW trigger_health AS SELECT ok, detail FROM sentdm_health() WHERE name = 'triggers';
CREATE TABLE access_orders (phone text, old_name text);
SELECT * FROM trigger_health;
CREATE TRIGGER good AFTER INSERT ON access_orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=t', 'parameters.name=old_name');
SELECT * FROM trigger_health;
ALTER TABLE access_orders RENAME old_name TO name;
SELECT * FROM trigger_health;
INSERT INTO access_orders VALUES (NULL, NULL);
DROP TRIGGER good ON access_orders;
CREATE TRIGGER bad AFTER INSERT ON access_orders EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=t');
SELECT * FROM trigger_health;
DROP TABLE access_orders;
SELECT * FROM trigger_health;

DROP VIEW access_health, trigger_health;
SELECT sentdm_revoke(('kind_' || kind)::regrole, kind) FROM unnest('{sender,reader,webhook,operator,monitor}'::text[]) kind;
SELECT count(*) AS left_over FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid IN (SELECT oid FROM pg_roles WHERE rolname ~ '^kind_');
DROP ROLE kind_sender, kind_reader, kind_webhook, kind_operator, kind_monitor;
