-- What an administrator adds to the tables holds for sentdm_send(), too.
\set VERBOSITY terse
SET client_min_messages = error;

CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO notes SELECT TG_WHEN, TG_LEVEL, TG_TABLE_NAME;
	RETURN NEW;
END $$;
CREATE TABLE notes (nr serial, what text, level text, tab text);
ALTER TABLE notes DROP COLUMN nr;

-- a constraint
ALTER TABLE sentdm.messages ADD CONSTRAINT no_spring CHECK (tag <> 'spring');
SELECT sentdm_send('+14155551234', body => 'x', tag => 'autumn') IS NOT NULL AS sent;
DO $$
BEGIN
	PERFORM sentdm_send('+14155551234', body => 'x', tag => 'spring');
EXCEPTION WHEN check_violation THEN
	RAISE INFO 'refused';
END $$;
ALTER TABLE sentdm.messages DROP CONSTRAINT no_spring;

-- an index, also a unique one
CREATE UNIQUE INDEX once ON sentdm.messages ((request ->> 'text'), tag);
SELECT sentdm_send('+14155551234', body => 'y', tag => 'winter') IS NOT NULL AS sent;
DO $$
BEGIN
	PERFORM sentdm_send('+14155551234', body => 'y', tag => 'winter');
EXCEPTION WHEN unique_violation THEN
	RAISE INFO 'refused';
END $$;
SET enable_seqscan = off;
SELECT count(*) FROM sentdm.messages WHERE request ->> 'text' = 'y' AND tag = 'winter';
RESET enable_seqscan;
DROP INDEX sentdm.once;

-- triggers, for rows and for statements
CREATE TRIGGER a BEFORE INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER b AFTER INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER c AFTER INSERT ON sentdm.messages FOR EACH STATEMENT EXECUTE FUNCTION note();
CREATE TRIGGER a BEFORE INSERT ON sentdm.outbox FOR EACH STATEMENT EXECUTE FUNCTION note();
SELECT sentdm_send('+14155551234', body => 'x') IS NOT NULL AS sent;
SELECT * FROM notes ORDER BY tab, what, level;
DROP TRIGGER a ON sentdm.messages;
DROP TRIGGER b ON sentdm.messages;
DROP TRIGGER c ON sentdm.messages;
DROP TRIGGER a ON sentdm.outbox;
DROP TABLE notes;
DROP FUNCTION note();

-- a rule
CREATE RULE quiet AS ON INSERT TO sentdm.outbox DO INSTEAD NOTHING;
SELECT sentdm_send('+14155551234', body => 'x', tag => 'ruled') IS NOT NULL AS sent;
SELECT count(*) FROM sentdm.outbox o JOIN sentdm.messages m ON m.id = o.message_id WHERE tag = 'ruled';
DROP RULE quiet ON sentdm.outbox;

-- row security, where the owner is not exempt
CREATE ROLE regress_sentdm_owner;
GRANT ALL ON SCHEMA sentdm TO regress_sentdm_owner;
GRANT CREATE ON SCHEMA public TO regress_sentdm_owner;
ALTER TABLE sentdm.messages OWNER TO regress_sentdm_owner;
ALTER TABLE sentdm.outbox OWNER TO regress_sentdm_owner;
ALTER FUNCTION sentdm_send(text, text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb)
	OWNER TO regress_sentdm_owner;
ALTER TABLE sentdm.messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE sentdm.messages FORCE ROW LEVEL SECURITY;
CREATE POLICY no_summer ON sentdm.messages USING (true) WITH CHECK (tag <> 'summer');
SELECT sentdm_send('+14155551234', body => 'x', tag => 'autumn') IS NOT NULL AS sent;
SELECT sentdm_send('+14155551234', body => 'x', tag => 'summer') IS NOT NULL AS sent;
DROP POLICY no_summer ON sentdm.messages;
ALTER TABLE sentdm.messages NO FORCE ROW LEVEL SECURITY;
ALTER TABLE sentdm.messages DISABLE ROW LEVEL SECURITY;

-- columns with defaults, and generated ones; a column that was dropped again
ALTER TABLE sentdm.messages ADD COLUMN note text DEFAULT 'noted';
ALTER TABLE sentdm.messages ADD COLUMN loud text GENERATED ALWAYS AS (upper(tag)) STORED;
SELECT sentdm_send('+14155551234', body => 'x', tag => 'late') IS NOT NULL AS sent;
SELECT note, loud, state, attempts, generation, finished_at FROM sentdm.messages WHERE tag = 'late';
ALTER TABLE sentdm.messages DROP COLUMN note, DROP COLUMN loud;
SELECT sentdm_send('+14155551234', body => 'x', tag => 'later') IS NOT NULL AS sent;
SELECT state, attempts, generation FROM sentdm.messages WHERE tag = 'later';

-- as new for the other tests
DROP EXTENSION sentdm;
DROP OWNED BY regress_sentdm_owner;
DROP ROLE regress_sentdm_owner;
CREATE EXTENSION sentdm;
