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
