-- Templates that are checked, and recipients who opted out
\set VERBOSITY default
SET client_min_messages = notice;
SET TimeZone = 'UTC';
\set secret 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8='
SET sentdm.max_per_transaction = 100000;
DO $$ BEGIN PERFORM sentdm_send('+14155550000', body => 'so that the warning of this session is over'); EXCEPTION WHEN OTHERS THEN END $$;
TRUNCATE sentdm.messages, sentdm.outbox;

-- nothing is checked unless it is wanted
SELECT sentdm_send('+14155550001', 'nobody_knows') IS NOT NULL AS sent;
SET sentdm.check_templates = on;
SELECT sentdm_send('+14155550001', 'nobody_knows');
SELECT sentdm_send('+14155550001', body => 'a text') IS NOT NULL AS sent;
INSERT INTO sentdm.templates (id, name, status, channels, variables) VALUES
	('7ba7b820-9dad-11d1-80b4-00c04fd430c8', 'order_shipped', 'APPROVED', '{sms}', '{name,order_id}'),
	('7ba7b821-9dad-11d1-80b4-00c04fd430c8', 'plain', 'APPROVED', '{sms}', '{}'),
	('7ba7b822-9dad-11d1-80b4-00c04fd430c8', 'order_shipped', 'APPROVED', '{sms}', '{vorname}');
SELECT sentdm_send('+14155550001', 'nobody_knows');
SELECT sentdm_send('+14155550001', 'order_shipped', '{"name": "hidden value"}');
SELECT sentdm_send('+14155550001', '7BA7B820-9dad-11d1-80b4-00c04fd430c8', '{"order_id": "hidden value"}');
SELECT sentdm_send('+14155550001', '7ba7b820-9dad-11d1-80b4-00c04fd430c8');
SELECT sentdm_send('+14155550001', 'order_shipped', '{"name": "Ann", "order_id": 1, "more": 2}') IS NOT NULL AS sent;
SELECT sentdm_send('+14155550001', 'order_shipped', '{"vorname": "Ann"}') IS NOT NULL AS sent;
SELECT sentdm_send('+14155550001', 'plain') IS NOT NULL AS sent;
SELECT sentdm_send('+14155550001', 'of_a_profile', profile_id => '11111111-2222-3333-4444-555555555555') IS NOT NULL AS sent;
SELECT ordinal, message_id IS NOT NULL AS sent, error FROM sentdm_send_batch('[
	{"recipient": "+14155550001", "template": "nobody_knows"},
	{"recipient": "+14155550001", "template": "order_shipped"},
	{"recipient": "+14155550001", "template": "plain"}]');
-- ... under any search_path, and for somebody who may not read the table
CREATE ROLE guard_sender;
SELECT sentdm_grant('guard_sender', 'sender');
CREATE SCHEMA trap;
CREATE FUNCTION trap.always(jsonb, text) RETURNS boolean LANGUAGE sql RETURN true;
CREATE OPERATOR trap.? (LEFTARG = jsonb, RIGHTARG = text, FUNCTION = trap.always);
GRANT USAGE ON SCHEMA trap TO guard_sender;
SET search_path = trap, pg_catalog, public;
SET ROLE guard_sender;
SELECT sentdm_send('+14155550001', 'order_shipped', '{"name": "hidden value"}');
SELECT current_user;
RESET ROLE;
RESET search_path;
RESET sentdm.check_templates;
SELECT count(*) FROM sentdm.messages;
TRUNCATE sentdm.messages, sentdm.outbox;

-- opt-outs are learned from webhooks
SELECT sentdm_set_webhook_secret(:'secret');
CREATE FUNCTION hear(body text) RETURNS int LANGUAGE sql AS $$
	SELECT r.http_status FROM (SELECT extract(epoch FROM clock_timestamp())::bigint::text AS stamp) t, sentdm_receive_webhook(convert_to(body, 'UTF8'),
		jsonb_build_object('x-webhook-id', 'x', 'x-webhook-timestamp', stamp, 'x-webhook-signature',
			sentdm_sign(body, 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=', 'x', stamp))) r $$;
CREATE FUNCTION heard(phone text, text text, at text) RETURNS int LANGUAGE sql AS $$
	SELECT hear(jsonb_build_object('field', 'message', 'event', 'message.received', 'timestamp', at, 'payload',
		jsonb_build_object('message_id', gen_random_uuid(), 'inbound_number', phone, 'outbound_number', '+14155559999',
			'channel', 'sms', 'text', text, 'received_at', at))::text) $$;
CREATE FUNCTION contact_event(event text, payload jsonb, at text) RETURNS int LANGUAGE sql AS $$
	SELECT hear(jsonb_build_object('field', 'contact', 'event', event, 'timestamp', at, 'payload', payload)::text) $$;
SELECT heard('+14155551001', 'STOP', '2026-01-01T10:00:00Z'), heard('+14155551002', E' stop. \n', '2026-01-01T10:00:00Z'),
	heard('+14155551003', 'Unsubscribe', '2026-01-01T10:00:00Z'), heard('+14155551004', 'please stop by at ten', '2026-01-01T10:00:00Z'),
	heard('no number', 'STOP', '2026-01-01T10:00:00Z'), heard('+14155551005', NULL, '2026-01-01T10:00:00Z');
SELECT contact_event('contact.opt_out', '{"opt_out": true, "from": "+14155551006", "source": "INBOUND_KEYWORD"}', '2026-01-01T10:00:00Z'),
	contact_event('contact.opt_out', '{"phone_number": "+14155551007"}', '2026-01-01T10:00:00Z'),
	contact_event('contact.custom_keyword', '{"opt_out": true, "from": "+14155551008"}', '2026-01-01T10:00:00Z'),
	contact_event('contact.help', '{"from": "+14155551009"}', '2026-01-01T10:00:00Z'),
	contact_event('contact.opt_out', '{"opt_out": "yes"}', '2026-01-01T10:00:00Z');
SELECT hear(jsonb_build_object('field', 'message', 'event', 'message.filtered', 'payload', jsonb_build_object('message_id', gen_random_uuid(),
	'message_status', 'FILTERED', 'outbound_number', '+141555510' || n, 'reason_code', reason, 'updated_at', '2026-01-01T10:00:00Z'))::text)
FROM (VALUES (10, 'ERR_CONSENT_BLOCKED'), (11, 'BUSINESS_004'), (12, 'ERR_ROUTE_DENIED')) AS v(n, reason);
SELECT phone, opted_out, since, source FROM sentdm.optouts ORDER BY phone;

-- the later word wins, in whatever order it comes; of two in one second, no
SELECT heard('+14155551001', 'Start', '2026-01-01T10:00:01Z'), heard('+14155551001', 'stop', '2026-01-01T09:59:59Z');
SELECT contact_event('contact.opt_in', '{"opt_out": false, "from": "+14155551006"}', '2026-01-01T10:00:00Z'),
	contact_event('contact.opt_in', '{"opt_out": false, "from": "+14155551007"}', '2026-01-01T10:00:05Z');
SELECT heard('+14155551013', 'START', '2026-01-01T10:00:00Z'), heard('+14155551013', 'STOP', '2026-01-01T10:00:00Z');
-- ... also within one batch
SELECT count(*) FILTER (WHERE r.http_status = 200) AS received
FROM (SELECT extract(epoch FROM clock_timestamp())::bigint::text AS stamp) t,
	LATERAL (SELECT array_agg(convert_to(body, 'UTF8') ORDER BY n) AS bodies, array_agg(jsonb_build_object('x-webhook-id', 'x', 'x-webhook-timestamp', stamp,
			'x-webhook-signature', sentdm_sign(body, :'secret', 'x', stamp)) ORDER BY n) AS headers
		FROM (SELECT n, jsonb_build_object('field', 'contact', 'event', CASE WHEN n % 2 = 1 THEN 'contact.opt_out' ELSE 'contact.opt_in' END,
				'timestamp', '2026-01-01T10:00:0' || n || 'Z', 'payload', jsonb_build_object('from', '+14155551014'))::text AS body
			FROM generate_series(1, 3) n) e) b,
	sentdm_receive_webhooks(bodies, headers) r;
SELECT phone, opted_out, since, source FROM sentdm.optouts WHERE phone ~ '10(01|06|07|13|14)$' ORDER BY phone;

-- by hand
SELECT sentdm_opt_out('+14155551020');
SELECT sentdm_opt_out('+14155551014', false);
SELECT sentdm_opt_out('4155551020');
SELECT phone, opted_out, since > now() - interval '1 minute' AS now, source FROM sentdm.optouts WHERE source = 'manual' ORDER BY phone;

-- skipped by default, and said; a number is never quoted
SELECT sentdm_send('+14155551002', body => 'x') IS NULL AS skipped;
SELECT sentdm_send('+14155551001', body => 'x') IS NULL AS skipped;
SELECT count(*) FROM sentdm_send('{+14155551002,+14155551004,+14155551003}'::text[], body => 'x');
SELECT count(*) FROM sentdm_send('{+14155551002,+14155551003}'::text[], body => 'x');
SELECT ordinal, message_id IS NOT NULL AS sent, error FROM sentdm_send_batch('[
	{"recipient": "+14155551002", "body": "x"}, {"recipient": "+14155551004", "body": "x"},
	{"recipients": [], "body": "x"}]');
CREATE TABLE guard_orders (phone text);
CREATE TRIGGER ordered AFTER INSERT ON guard_orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'template=t');
INSERT INTO guard_orders VALUES ('+14155551002');
SELECT request -> 'to' AS "to" FROM sentdm.messages ORDER BY id;
TRUNCATE sentdm.messages, sentdm.outbox;
-- refused
SET sentdm.on_opt_out = refuse;
SELECT sentdm_send('+14155551002', body => 'x');
SELECT sentdm_send('{+14155551002,+14155551004}'::text[], body => 'x');
INSERT INTO guard_orders VALUES ('+14155551002');
SELECT ordinal, message_id IS NOT NULL AS sent, error FROM sentdm_send_batch('[
	{"recipient": "+14155551002", "body": "x"}, {"recipient": "+14155551004", "body": "x"}]');
-- sent all the same, and only a superuser decides on that
SET sentdm.on_opt_out = send;
SELECT sentdm_send('+14155551002', body => 'x') IS NOT NULL AS sent;
SET ROLE guard_sender;
SET sentdm.on_opt_out = skip;
RESET ROLE;
RESET sentdm.on_opt_out;
SELECT request -> 'to' AS "to" FROM sentdm.messages ORDER BY id;
SET ROLE guard_sender;
SELECT sentdm_send('+14155551002', body => 'x') IS NULL AS skipped;
SELECT sentdm_opt_out('+14155551021');
RESET ROLE;
-- many at once
INSERT INTO sentdm.optouts (phone) SELECT '+1415666' || n FROM generate_series(1000, 2999) n;
SELECT count(*) FROM sentdm_send(ARRAY(SELECT '+1415666' || n FROM generate_series(1000, 4999) n), body => 'x');
SELECT sum(jsonb_array_length(request -> 'to')), bool_and(request -> 'to' ->> 0 >= '+14156663000') AS only_others
FROM sentdm.messages WHERE request -> 'to' ->> 0 LIKE '+1415666%';

TRUNCATE sentdm.messages, sentdm.outbox, sentdm.optouts, sentdm.templates, sentdm.events, sentdm.deliveries, sentdm.webhook_secrets RESTART IDENTITY;
DROP TABLE guard_orders;
DROP FUNCTION hear(text), heard(text, text, text), contact_event(text, jsonb, text);
SET client_min_messages = warning;
DROP SCHEMA trap CASCADE;
SELECT sentdm_revoke('guard_sender', 'sender');
DROP ROLE guard_sender;
