-- Print docs/reference.md, from the comments of a database that has the extension:
--
--	psql -X -A -t -q -f test/reference.sql -o docs/reference.md       (or: make reference)
--
-- What it shows is in the order of the install script; settings in that of their names.
-- As in sentdm.privileges_of(), so that it names functions in the same way.
SET search_path = pg_catalog, pg_temp;
-- Makes the settings known, where the library is not preloaded.
LOAD 'sentdm';

CREATE VIEW pg_temp.objects AS
SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
WHERE d.deptype = 'e' AND e.extname = 'sentdm';

-- One sentence: a capital letter, and a full stop unless it ends with another mark.
CREATE FUNCTION pg_temp.sentence(text) RETURNS text LANGUAGE sql AS $$
	SELECT upper(left($1, 1)) || substr($1, 2) || CASE WHEN $1 ~ '[.?!]$' THEN '' ELSE '.' END
$$;

-- What stands in a cell of a table.
CREATE FUNCTION pg_temp.cell(text) RETURNS text LANGUAGE sql AS $$ SELECT replace($1, '|', '\|') $$;

-- Arguments and types as people write them.
CREATE FUNCTION pg_temp.short(text) RETURNS text LANGUAGE sql AS $$
	SELECT regexp_replace(regexp_replace(replace($1, 'timestamp with time zone', 'timestamptz'),
		'::(text|jsonb|uuid|boolean|interval|timestamptz)(\[\])?', '', 'g'), ' DEFAULT ', ' = ', 'g')
$$;

-- A value of a setting as people write it: in the largest unit that it is a whole number of.
CREATE FUNCTION pg_temp.with_unit(value text, unit text) RETURNS text LANGUAGE sql AS $$
	SELECT coalesce((
		SELECT value::bigint * u.ms / larger.ms || larger.name
		FROM (VALUES ('ms', 1), ('s', 1000)) AS u(name, ms),
			(VALUES ('d', 86400000), ('h', 3600000), ('min', 60000), ('s', 1000), ('ms', 1)) AS larger(name, ms)
		WHERE u.name = unit AND CASE WHEN value ~ '^[1-9][0-9]*$' THEN value::bigint * u.ms % larger.ms = 0 END
		ORDER BY larger.ms DESC LIMIT 1), value)
$$;

\qecho '# Reference'
\qecho
\qecho 'Made by `test/reference.sql` from the comments in the database, which `\\df+ sentdm*`, `\\dx+ sentdm` and `\\d+` show too.'
\qecho
\qecho '- [Functions](#functions)'
\qecho '- [Relations](#relations)'
\qecho '- [Settings](#settings)'
\qecho
\qecho '## Functions'
\qecho
\qecho 'In brackets: the kinds of access that `sentdm_grant()` gives it to; without, superusers only.'

WITH function AS (
	SELECT p.oid, p.proname, p.proacl,
		pg_temp.short(format('%s(%s) returns %s', p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))) AS signature,
		pg_temp.sentence(obj_description(p.oid, 'pg_proc')) AS comment
	FROM pg_proc p JOIN pg_temp.objects o ON o.classid = 'pg_proc'::regclass AND o.objid = p.oid
	WHERE p.proname LIKE 'sentdm\_%'
), access AS (
	SELECT f.oid, string_agg(a.kind, ', ' ORDER BY a.n) AS kinds
	FROM function f, unnest('{sender,reader,webhook,operator,monitor}'::text[]) WITH ORDINALITY AS a(kind, n)
	WHERE format('EXECUTE ON FUNCTION %s', f.oid::regprocedure) IN (SELECT sentdm.privileges_of(a.kind))
	GROUP BY f.oid
)
SELECT E'\n### ' || proname || E'\n' || string_agg(format(E'\n```sql\n%s\n```\n\n%s%s', signature, comment,
	CASE WHEN has_function_privilege('public', oid, 'EXECUTE') THEN ' [everybody]' ELSE ' [' || kinds || ']' END), E'\n' ORDER BY oid)
FROM function LEFT JOIN access USING (oid) GROUP BY proname ORDER BY min(oid);

\qecho
\qecho '## Relations'
\qecho
\qecho 'All in the schema `sentdm`. In brackets: who may read it.'

WITH relation AS (
	SELECT c.oid, c.relname, c.relkind, pg_temp.sentence(obj_description(c.oid, 'pg_class')) AS comment
	FROM pg_class c JOIN pg_temp.objects o ON o.classid = 'pg_class'::regclass AND o.objid = c.oid
	WHERE c.relkind IN ('r', 'v')
), access AS (
	SELECT r.oid, string_agg(a.kind, ', ' ORDER BY a.n) AS kinds
	FROM relation r, unnest('{sender,reader,webhook,operator,monitor}'::text[]) WITH ORDINALITY AS a(kind, n)
	WHERE format('SELECT ON sentdm.%I', r.relname) IN (SELECT sentdm.privileges_of(a.kind))
	GROUP BY r.oid
)
SELECT format(E'\n### %s\n\n%s: %s%s\n\n| column | type | |\n|---|---|---|\n%s', r.relname,
	CASE r.relkind WHEN 'r' THEN 'Table' ELSE 'View' END, r.comment, ' [' || a.kinds || ']',
	(SELECT string_agg(format('| `%s` | `%s` | %s |', c.attname, pg_temp.short(format_type(c.atttypid, c.atttypmod)),
		pg_temp.cell(col_description(r.oid, c.attnum))), E'\n' ORDER BY c.attnum)
	FROM pg_attribute c WHERE c.attrelid = r.oid AND c.attnum > 0 AND NOT c.attisdropped))
FROM relation r LEFT JOIN access a USING (oid) ORDER BY r.oid;

\qecho
\qecho '## Settings'
\qecho
\qecho 'Set by `file`: in the configuration file or on the command line, changed by a reload; `superuser`: by superusers, also for a'
\qecho 'database or a role; `anyone`: by anyone. Secrets are shown as stars.'
\qecho
\qecho '| setting | default | set by | |'
\qecho '|---|---|---|---|'

SELECT format('| `%s` | %s | %s | %s |', name,
	CASE WHEN boot_val <> '' AND boot_val !~ '^\*+$' THEN format('`%s`', pg_temp.with_unit(boot_val, unit)) END,
	CASE context WHEN 'sighup' THEN 'file' WHEN 'user' THEN 'anyone' ELSE context END,
	pg_temp.cell(concat_ws(' ', short_desc, extra_desc)))
FROM pg_settings WHERE name LIKE 'sentdm.%' ORDER BY name;
