-- sentdm_send_trigger(): a message for a row, without any code
\set VERBOSITY default
SET client_min_messages = error;
SET TimeZone = 'UTC';
CREATE TABLE orders (id int PRIMARY KEY, phone text, name text, amount numeric, note text, due timestamptz, shipped boolean DEFAULT false);

CREATE TRIGGER shipped AFTER UPDATE OF shipped ON orders
	FOR EACH ROW WHEN (NEW.shipped AND NOT OLD.shipped)
	EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=order_shipped', 'parameters.name=name',
		'parameters.amount=amount', 'channels=sms,whatsapp', 'tag=shipping', 'priority=high', 'unique_key=id');
INSERT INTO orders VALUES (1, '+14155550001', 'Ann', 12.50), (2, NULL, NULL, 3), (3, '+14155550003', 'Eve', 4);
SELECT count(*) FROM sentdm.messages;
UPDATE orders SET shipped = true;
SELECT request, priority, tag, unique_key FROM sentdm.messages ORDER BY id;
UPDATE orders SET shipped = false;
UPDATE orders SET shipped = true WHERE id = 1;
SELECT count(*) AS still FROM sentdm.messages;
TRUNCATE sentdm.messages, sentdm.outbox;

-- whole messages from columns, also at a time; a DELETE trigger sees the old row
CREATE TRIGGER noted AFTER INSERT ON orders FOR EACH ROW WHEN (NEW.note IS NOT NULL)
	EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'body=note', 'send_at=due', 'sandbox=true');
CREATE TRIGGER deleted BEFORE DELETE ON orders FOR EACH ROW
	EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=gone', 'parameters.name=name');
INSERT INTO orders VALUES (4, '+14155550004', 'Joe', 5, 'a = b, "c"', '2100-01-01 10:00+00');
DELETE FROM orders WHERE id = 3;
SELECT request, send_at FROM sentdm.messages ORDER BY id;
SELECT count(*) FROM orders WHERE id = 3;
TRUNCATE sentdm.messages, sentdm.outbox;

-- rolled back with the row
BEGIN;
INSERT INTO orders VALUES (5, '+14155550005', 'Kim', 5, 'x');
ROLLBACK;
SELECT count(*) FROM sentdm.messages;

-- what is wrong is said, and nothing is changed
INSERT INTO orders VALUES (6, 'no number', 'Kim', 5, 'x');
CREATE TRIGGER wrong AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=fone');
INSERT INTO orders VALUES (6);
DROP TRIGGER wrong ON orders;
CREATE TRIGGER wrong AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'to=phone');
INSERT INTO orders VALUES (6, '+14155550006');
DROP TRIGGER wrong ON orders;
CREATE TRIGGER wrong AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('phone');
INSERT INTO orders VALUES (6, '+14155550006');
DROP TRIGGER wrong ON orders;
CREATE TRIGGER wrong AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'sandbox');
INSERT INTO orders VALUES (6, '+14155550006');
DROP TRIGGER wrong ON orders;
CREATE TRIGGER wrong AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=t', 'parameters.name=name');
INSERT INTO orders VALUES (6, '+14155550006', NULL);
DROP TRIGGER wrong ON orders;
CREATE TRIGGER wrong AFTER INSERT ON orders EXECUTE FUNCTION sentdm_send_trigger('recipient=phone');
INSERT INTO orders VALUES (6);
SELECT sentdm_send_trigger();
SELECT count(*) FROM sentdm.messages;
SELECT count(*) FROM orders WHERE id = 6;
DROP TABLE orders;

-- arguments are checked at the first row that fires it, whatever is in it
SET client_min_messages = error;
CREATE TABLE checked (phone text, note text);
CREATE PROCEDURE try(VARIADIC arguments text[]) LANGUAGE plpgsql AS $$
DECLARE
	detail text;
BEGIN
	EXECUTE format('CREATE TRIGGER tried AFTER INSERT ON checked FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger(%s)',
		(SELECT string_agg(quote_literal(a), ', ') FROM unnest(arguments) a));
	BEGIN
		INSERT INTO checked VALUES (NULL, NULL);
		RAISE INFO 'no error';
	EXCEPTION WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
		RAISE INFO '% % %', SQLSTATE, SQLERRM, detail;
	END;
	DROP TRIGGER tried ON checked;
END $$;
CALL try('recipient=phone', 'body=note');
CALL try('recipient=phone', 'body=note', 'template=t');
CALL try('recipient=phone');
CALL try('body=note');
CALL try('recipient=phone', 'recipient=note', 'body=note');
CALL try('recipient=phone', 'body=text');
CALL try('recipient=phone', 'template=t', 'parameters.name=text');
CALL try('recipient=phone', 'template=t', 'parameters.=note');
CALL try('recipient=phone', 'body=note', 'unique_key=text');
CALL try('recipient=phone', 'body=note', 'channels=sms,fax');
CALL try('recipient=phone', 'body=note', 'channels=sent,sms');
CALL try('recipient=phone', 'body=note', 'priority=urgent');
CALL try('recipient=phone', 'body=note', 'tag=');
CALL try('recipient=phone', 'body=note', 'sandbox=perhaps');
CALL try('recipient=phone', 'body=note', 'extra=note');
DROP TABLE checked;
DROP PROCEDURE try(text[]);
