-- Many messages in one transaction, and what may come in between: what sentdm_send()
-- remembers of its tables must never be out of date, and never in the way.
\set VERBOSITY terse
SET client_min_messages = error;

CREATE FUNCTION say(first int, last int) RETURNS bigint LANGUAGE sql
	AS $$ SELECT count(sentdm_send('+14155551234', body => 'x', tag => n::text)) FROM generate_series(first, last) n $$;
-- those that are there, and whether every index knows them all
CREATE FUNCTION said() RETURNS text LANGUAGE plpgsql
	SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
	ASSERT (SELECT count(*) FROM sentdm.messages WHERE id > '00000000-0000-0000-0000-000000000000') =
		(SELECT count(*) FROM sentdm.messages WHERE tag > ''), 'indexes of messages differ';
	ASSERT (SELECT count(*) FROM sentdm.outbox WHERE message_id > '00000000-0000-0000-0000-000000000000') =
		(SELECT count(*) FROM sentdm.outbox WHERE priority = 'normal'), 'indexes of outbox differ';
	SET LOCAL enable_indexscan = off;
	SET LOCAL enable_indexonlyscan = off;
	SET LOCAL enable_seqscan = on;
	RETURN string_agg(tag, ' ' ORDER BY tag::int) FROM sentdm.messages m JOIN sentdm.outbox o ON o.message_id = m.id;
END $$;
-- locks of this session, on tables and on indexes of ours
CREATE VIEW held AS
	SELECT count(*) FILTER (WHERE relkind = 'r') AS tables, count(*) FILTER (WHERE relkind = 'i') > 0 AS indexes
	FROM pg_locks l JOIN pg_class c ON c.oid = relation
	WHERE pid = pg_backend_pid() AND relnamespace = 'sentdm'::regnamespace AND mode = 'RowExclusiveLock';

-- errors in the middle of a statement, and of a row, and going on after them
CREATE UNIQUE INDEX once ON sentdm.messages (tag) WHERE tag <> '0';
BEGIN;
SELECT say(1, 3);
SAVEPOINT a;
SELECT say(4, 6), 1 / 0;
ROLLBACK TO a;
SELECT say(7, 8);
SELECT say(9, 10), say(8, 8);
ROLLBACK TO a;
SELECT say(11, 12);
RELEASE a;
DO $$
BEGIN
	FOR n IN 11 .. 14 LOOP
		BEGIN
			PERFORM say(n, n);
		EXCEPTION WHEN unique_violation THEN
			RAISE INFO '% is there', n;
		END;
	END LOOP;
END $$;
COMMIT;
SELECT said();
DROP INDEX sentdm.once;
TRUNCATE sentdm.messages, sentdm.outbox;

-- locks are those that any INSERT holds; a second message keeps those of the indexes
BEGIN;
SELECT say(1, 1);
SELECT * FROM held;
SAVEPOINT a;
SELECT say(2, 4);
SELECT * FROM held;
ROLLBACK TO a;
SELECT * FROM held;
COMMIT;
BEGIN;
SAVEPOINT a;
SELECT say(5, 7);
ROLLBACK TO a;
SELECT * FROM held;
SELECT say(8, 8);
SELECT * FROM held;
SELECT say(9, 10);
SELECT * FROM held;
COMMIT;
BEGIN;
SELECT say(11, 11);
SELECT * FROM held;
COMMIT;
SELECT * FROM held;
SELECT said();
TRUNCATE sentdm.messages, sentdm.outbox;

-- a trigger that comes, is disabled, and goes
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE INFO 'noted %', NEW.tag; RETURN NEW; END $$;
BEGIN;
SELECT say(1, 2);
SAVEPOINT a;
CREATE TRIGGER note BEFORE INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION note();
SELECT say(3, 4);
ALTER TABLE sentdm.messages DISABLE TRIGGER note;
SELECT say(5, 5);
ALTER TABLE sentdm.messages ENABLE ALWAYS TRIGGER note;
SELECT say(6, 6);
ROLLBACK TO a;
SELECT say(7, 7);
CREATE TRIGGER note AFTER INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION note();
SELECT say(8, 8);
COMMIT;
SELECT say(9, 9);
ALTER TABLE sentdm.messages ENABLE REPLICA TRIGGER note;
SELECT say(11, 11);
SET session_replication_role = replica;
SELECT say(12, 12);
RESET session_replication_role;
SELECT say(13, 13);
DROP TRIGGER note ON sentdm.messages;
SELECT say(10, 10);
SELECT said();
TRUNCATE sentdm.messages, sentdm.outbox;

-- commands on the tables, between statements and with a cursor open in the middle
BEGIN;
DECLARE c CURSOR FOR SELECT sentdm_send('+14155551234', body => 'x', tag => n::text) IS NOT NULL AS sent FROM generate_series(1, 10) n;
FETCH 2 FROM c;
CREATE INDEX further ON sentdm.messages (tag) WHERE tag IS NOT NULL;
FETCH 1 FROM c;
DROP INDEX sentdm.messages_tag;
ALTER INDEX sentdm.further RENAME TO messages_tag;
FETCH 1 FROM c;
REINDEX TABLE sentdm.outbox;
FETCH 1 FROM c;
SAVEPOINT a;
ALTER TABLE sentdm.messages ADD CONSTRAINT few CHECK (tag::int < 7);
FETCH 1 FROM c;
FETCH 1 FROM c;
ROLLBACK TO a;
SELECT said();
CLUSTER sentdm.messages USING messages_pkey;
SELECT say(11, 12);
SELECT said();
TRUNCATE sentdm.messages, sentdm.outbox;
SELECT say(13, 14);
COMMIT;
SELECT said();

-- a kind of index that keeps more than memory from one row to the next
BEGIN;
CREATE INDEX recent ON sentdm.messages USING brin (created_at);
SELECT say(1, 3);
SELECT 1 / 0;
ROLLBACK;
CREATE INDEX recent ON sentdm.messages USING brin (created_at);
SELECT say(1, 3);
DROP INDEX sentdm.recent;
SELECT say(4, 5);
SELECT said();
TRUNCATE sentdm.messages, sentdm.outbox;
SELECT say(13, 14);

-- in the middle of a statement
CREATE FUNCTION change(n int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	IF n = 16 THEN
		CREATE TRIGGER note BEFORE INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION note();
	ELSIF n = 18 THEN
		DROP TRIGGER note ON sentdm.messages;
		REINDEX INDEX sentdm.messages_pkey;
	ELSIF n = 19 THEN
		ALTER TABLE sentdm.outbox ADD COLUMN further text DEFAULT 'added';
	END IF;
	RETURN n;
END $$;
SELECT sentdm_send('+14155551234', body => 'x', tag => change(n)) IS NOT NULL AS sent FROM generate_series(15, 20) n;
SELECT said(), (SELECT count(*) FROM sentdm.outbox WHERE further = 'added');
ALTER TABLE sentdm.outbox DROP COLUMN further;
DROP FUNCTION change(int);
TRUNCATE sentdm.messages, sentdm.outbox;

-- a message within the row of another, and functions of an index that are replaced
DROP EXTENSION sentdm CASCADE;
CREATE EXTENSION sentdm;
CREATE FUNCTION answers(tag text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF tag::int < 100 THEN
		PERFORM say(tag::int + 100, tag::int + 101);
	END IF;
	RETURN tag::int < 102;
END $$;
CREATE INDEX answered ON sentdm.messages (tag) WHERE answers(tag);
SELECT say(1, 3);
SELECT said();
SET enable_seqscan = off;
SELECT tag FROM sentdm.messages WHERE answers(tag) AND tag IS NOT NULL ORDER BY tag::int;
RESET enable_seqscan;
TRUNCATE sentdm.messages, sentdm.outbox;
BEGIN;
CREATE OR REPLACE FUNCTION answers(tag text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END';
SELECT say(200, 201);
CREATE OR REPLACE FUNCTION answers(tag text) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT false';
SELECT say(202, 203);
CREATE OR REPLACE FUNCTION answers(tag text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END';
COMMIT;
SET enable_seqscan = off;
SELECT tag FROM sentdm.messages WHERE answers(tag) AND tag IS NOT NULL ORDER BY tag::int;
RESET enable_seqscan;
DROP INDEX sentdm.answered;
TRUNCATE sentdm.messages, sentdm.outbox;

-- who opts out is left out from the next message on
BEGIN;
SELECT say(1, 2);
SELECT sentdm_opt_out('+14155551234');
SELECT say(3, 3);
ROLLBACK;
TRUNCATE sentdm.optouts;
BEGIN;
SELECT say(4, 5);
SAVEPOINT a;
SELECT sentdm_opt_out('+14155551234');
ROLLBACK TO a;
SELECT say(6, 6);
COMMIT;
TRUNCATE sentdm.optouts;
SELECT say(7, 7), sentdm_opt_out('+14155551234'), sentdm_send('+14155551234', body => 'x') IS NULL AS skipped;
SELECT said();
TRUNCATE sentdm.messages, sentdm.outbox, sentdm.optouts;

-- the extension is dropped and made again
BEGIN;
SELECT say(1, 3);
DROP EXTENSION sentdm CASCADE;
DO $$
BEGIN
	PERFORM say(4, 4);
EXCEPTION WHEN undefined_function THEN
	RAISE INFO 'is gone';
END $$;
ROLLBACK;
SELECT say(5, 6);
BEGIN;
SELECT say(7, 9);
DROP EXTENSION sentdm CASCADE;
CREATE EXTENSION sentdm;
SELECT say(10, 12);
SAVEPOINT a;
DROP EXTENSION sentdm CASCADE;
CREATE EXTENSION sentdm;
SELECT say(13, 15);
ROLLBACK TO a;
SELECT say(16, 17);
COMMIT;
SELECT say(18, 18);
SELECT said();

-- what is remembered stays small
SELECT count(*), bool_and(total_bytes < 50000) AS small FROM pg_backend_memory_contexts WHERE name = 'sentdm table';

-- as new for the other tests
DROP FUNCTION say, said, note, answers;
DROP EXTENSION sentdm CASCADE;
CREATE EXTENSION sentdm;
