-- sentdm_receive_webhook() and sentdm_receive_webhooks()
SET timezone = 'UTC';
SET datestyle = 'ISO';
\set secret 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8='

-- Helpers: a message's id, an event of the current generation, headers that are
-- signed so many seconds ago, and how the outcome of it all is shown.
CREATE FUNCTION msg(n int) RETURNS uuid LANGUAGE sql IMMUTABLE
	RETURN ('8ba7b830-9dad-11d1-80b4-' || lpad(n::text, 12, '0'))::uuid;
CREATE FUNCTION event(n int, status text, at text, more jsonb = '{}') RETURNS text LANGUAGE sql IMMUTABLE
	RETURN jsonb_build_object('field', 'message', 'event', 'message.' || lower(status), 'timestamp', '2025-09-14T16:30:00Z',
		'payload', jsonb_strip_nulls(jsonb_build_object('message_id', msg(n), 'message_status', status, 'updated_at', at)) || more)::text;
CREATE FUNCTION headers(body bytea, age int = 0, id text = 'd4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8',
	secret text = 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=') RETURNS jsonb LANGUAGE sql
	RETURN (SELECT jsonb_build_object('x-webhook-id', id, 'x-webhook-timestamp', stamp,
			'x-webhook-signature', sentdm_sign(body, secret, id, stamp))
		FROM (SELECT (extract(epoch FROM clock_timestamp())::bigint - age)::text AS stamp) t);
CREATE FUNCTION receive(body text, age int = 0, more jsonb = '{}')
	RETURNS TABLE (http_status int, duplicate boolean, reason text) LANGUAGE sql
	BEGIN ATOMIC
		SELECT r.http_status, r.duplicate, r.reason
		FROM sentdm_receive_webhook(convert_to(body, 'UTF8'), headers(convert_to(body, 'UTF8'), age) || more) r;
	END;
CREATE FUNCTION number_of(id uuid) RETURNS int LANGUAGE sql IMMUTABLE RETURN right(id::text, 12)::int;
CREATE VIEW deliveries AS
	SELECT number_of(sent_id) AS msg, recipient, channel, status, to_char(status_at, 'HH24:MI:SS') AS at, reason_code, reason
	FROM sentdm.deliveries;

-- Without a secret nothing can be verified; whoever has one is told, if it is any
SELECT * FROM receive('{}');
SELECT sentdm_set_webhook_secret(NULL);
SELECT sentdm_set_webhook_secret('hidden');
SELECT sentdm_set_webhook_secret('a secret that is not decoded');
SELECT sentdm_set_webhook_secret('whsec_hidden', NULL, '1 day');
SELECT sentdm_set_webhook_secret(:'secret', overlap => '-1 day');
SELECT sentdm_set_webhook_secret(:'secret', overlap => NULL);
SELECT sentdm_set_webhook_secret(:'secret');

-- What is refused, and what is not
CREATE TEMP TABLE requests (n int GENERATED ALWAYS AS IDENTITY, what text, body bytea, headers jsonb);
INSERT INTO requests (what, body, headers)
SELECT what, body, headers FROM (SELECT headers('{}') AS good) g, LATERAL (VALUES
	('all right', '{}'::bytea, good),
	('names in upper case', '{}', (SELECT jsonb_object_agg(upper(key), value) FROM jsonb_each(good))),
	('values in arrays', '{}', (SELECT jsonb_object_agg(key, jsonb_build_array(value)) FROM jsonb_each(good))),
	('other headers', '{}', good || '{"host": "example.com", "x-webhook": null, "x-webhook-idx": [1, {}]}'),
	('no payload', NULL, good),
	('no headers', '{}', NULL),
	('headers are null', '{}', 'null'),
	('headers are an array', '{}', '[{"x-webhook-id": "x"}]'),
	('headers are a string', '{}', '"x-webhook-id"'),
	('empty headers', '{}', '{}'),
	('no signature', '{}', good - 'x-webhook-signature'),
	('signature is a number', '{}', good || '{"x-webhook-signature": 1}'),
	('two signature headers', '{}', good || jsonb_build_object('x-webhook-signature', jsonb_build_array(good -> 'x-webhook-signature', good -> 'x-webhook-signature'))),
	('empty signature', '{}', good || '{"x-webhook-signature": ""}'),
	('malformed signature', '{}', good || '{"x-webhook-signature": "v1,x"}'),
	('another version', '{}', good || '{"x-webhook-signature": "v2,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}'),
	('wrong signature', '{}', good || '{"x-webhook-signature": "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}'),
	('one of two signatures', '{}', good || jsonb_build_object('x-webhook-signature', 'v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= ' || (good ->> 'x-webhook-signature'))),
	('no id', '{}', good - 'x-webhook-id'),
	('another id', '{}', good || '{"x-webhook-id": "550e8400-e29b-41d4-a716-446655440000"}'),
	('id with a dot', '{}', good || '{"x-webhook-id": "a.b"}'),
	('no timestamp', '{}', good - 'x-webhook-timestamp'),
	('malformed timestamp', '{}', good || '{"x-webhook-timestamp": "now"}'),
	('another timestamp', '{}', good || '{"x-webhook-timestamp": "1789402310"}'),
	('another body', '{ }', good),
	('another secret', '{}', headers('{}', secret => 'whsec_AAECAwQFBgcICQoLDA0ODw==')),
	('older scheme', '{}', good || jsonb_build_object('x-webhook-signature', sentdm_sign('{}'::bytea, :'secret'))),
	('10 minutes old', '{}', headers('{}', 600)),
	('23 hours old', '{}', headers('{}', 23 * 3600)),
	('25 hours old', '{}', headers('{}', 25 * 3600)),
	('in 4 minutes', '{}', headers('{}', -240)),
	('in 6 minutes', '{}', headers('{}', -360))
	) v(what, body, headers);
INSERT INTO requests (what, body, headers)
SELECT what, body, headers(body) FROM (VALUES
	('1 MiB', convert_to('{"a":"' || repeat('x', 1024 * 1024 - 8) || '"}', 'UTF8')),
	('1 byte more', convert_to('{"a":"' || repeat('x', 1024 * 1024 - 7) || '"}', 'UTF8'))) v(what, body);
SELECT what, r.http_status, r.event_id IS NOT NULL AS kept, r.duplicate, r.reason
FROM requests, sentdm_receive_webhook(body, headers) r ORDER BY n;
SELECT what, r.http_status, r.event_id IS NOT NULL AS kept, r.duplicate, r.reason
FROM (SELECT array_agg(body ORDER BY n) AS bodies, array_agg(headers ORDER BY n) AS headers FROM requests) t,
	sentdm_receive_webhooks(bodies, t.headers) r JOIN requests ON n = r.ordinal
WHERE what IN ('all right', 'no payload', 'headers are an array', 'wrong signature', '23 hours old', 'in 6 minutes', '1 byte more')
ORDER BY n;
SELECT length(payload::text) AS payload, duplicates, late FROM sentdm.events ORDER BY id;
DELETE FROM sentdm.events;

-- Arrays of different length, empty and NULL ones
SELECT * FROM sentdm_receive_webhooks(ARRAY['{}', '{}']::bytea[], ARRAY[]::jsonb[]);
SELECT * FROM sentdm_receive_webhooks(ARRAY[]::bytea[], ARRAY['{}']::jsonb[]);
SELECT count(*) FROM sentdm_receive_webhooks(NULL, NULL);
SELECT count(*) FROM sentdm_receive_webhooks('{}', '{}');

-- Every generation and family; what is recognised, and what it does
CREATE TEMP TABLE samples (n int, what text, body text, event_type text);
INSERT INTO samples VALUES
	(1, 'guide', '{"type":"message.failed","data":{"id":"8ba7b830-9dad-11d1-80b4-000000000001","status":"FAILED","channel":"sms","error":{"code":"E1","message":"no such number"}},"timestamp":"2025-02-01T10:00:00Z"}', NULL),
	(2, 'guide, status.updated', '{"type":"message.status.updated","data":{"id":"8ba7b830-9dad-11d1-80b4-000000000002","status":"Read"},"timestamp":"2025-02-01T10:00:00Z"}', NULL),
	(3, 'guide, foreign id', '{"type":"message.failed","data":{"id":"msg_123","status":"failed"},"timestamp":"2025-02-01T10:00:00Z"}', NULL),
	(4, 'guide, no status', '{"type":"message.read","data":{"id":"8ba7b830-9dad-11d1-80b4-000000000004"},"timestamp":"2025-02-01T10:00:00Z"}', NULL),
	(5, '2025', '{"field":"messages","timestamp":"2025-03-01T10:00:00Z","payload":{"message_id":"8ba7b830-9dad-11d1-80b4-000000000005","message_status":"SENT","outbound_number":"+14155550005"}}', 'messages'),
	(6, '2025, inbound', '{"field":"messages","timestamp":"2025-03-01T10:00:00Z","payload":{"from":"+525500000006","to":"+14155550000","text":"two","channel":"sms","received_at":"2025-03-01T09:59:00Z"}}', 'messages'),
	(7, 'sub_type', '{"field":"message","sub_type":"message.delivered","timestamp":"2025-10-31T10:10:42+00:00","payload":{"account_id":"a","message_id":"8ba7b830-9dad-11d1-80b4-000000000007","message_status":"DELIVERED","channel":"sms","inbound_number":"+12345678907","outbound_number":"+19876543210"}}', NULL),
	(8, 'sub_type, inbound', '{"field":"message","sub_type":"message.received","timestamp":"2025-10-31T10:10:42Z","payload":{"from":"+525500000008","to":"+14155550000","text":null,"channel":"whatsapp","provider":"p","received_at":"2025-10-31T10:10:41Z"}}', NULL),
	(9, 'current', '{"field":"message","event":"message.delivered","timestamp":"2025-09-14T16:11:50Z","request_id":"r","payload":{"account_id":"a","message_id":"8BA7B830-9DAD-11D1-80B4-000000000009","message_status":"DELIVERED","channel":"sms","outbound_number":"+14155550009","template_id":null,"body":null,"updated_at":"2025-09-14T16:11:49Z"}}', 'message.spoofed'),
	(10, 'current, failed', '{"field":"message","event":"message.failed","timestamp":"2025-09-14T16:11:50Z","payload":{"message_id":"8ba7b830-9dad-11d1-80b4-000000000010","message_status":"FAILED","channel":"whatsapp","outbound_number":"+14155550010","reason_code":"DELIVERY_007","reason":"not registered","updated_at":"2025-09-14T16:11:49.1234567+02:00"}}', NULL),
	(11, 'current, scheduled', '{"field":"message","event":"message.scheduled","timestamp":"2025-09-14T16:11:50Z","payload":{"message_id":"8ba7b830-9dad-11d1-80b4-000000000011","message_status":"SCHEDULED","scheduled_at":"2035-10-01T07:00:00Z","updated_at":"2025-09-14T16:11:49Z"}}', NULL),
	(12, 'current, inbound', '{"field":"message","event":"message.received","timestamp":"2025-09-14T16:12:00Z","payload":{"account_id":"a","message_id":"8ba7b830-9dad-11d1-80b4-000000000012","channel":"rcs","inbound_number":"+525500000012","outbound_number":"+14155550000","text":"STOP","media":[{"url":"https://example.com/1"}],"received_at":"2025-09-14T16:11:58Z","updated_at":"2025-09-14T16:11:59Z"}}', NULL),
	(13, 'current, new status', '{"field":"message","event":"message.teleported","timestamp":"2025-09-14T16:11:50Z","payload":{"message_id":"8ba7b830-9dad-11d1-80b4-000000000013","message_status":"TELEPORTED","updated_at":"2025-09-14T16:11:49Z"}}', NULL),
	(14, 'templates', '{"field":"templates","timestamp":"2025-10-31T12:18:14Z","payload":{"template_id":"9ba7b830-9dad-11d1-80b4-000000000014","template_name":"order","status":"APPROVED","channel":"whatsapp","reason":null}}', 'templates'),
	(15, 'contact', '{"field":"contact","event":"contact.opt_out","timestamp":"2025-09-14T16:11:50Z","payload":{"opt_out":true,"contact_id":"c","channel":"sms","from":"+1","message_id":"8ba7b830-9dad-11d1-80b4-000000000012","text":"STOP"}}', NULL),
	(16, 'channel', '{"field":"channel","event":"channel.activated","timestamp":"2025-09-14T16:11:50Z","payload":{"country":"US","status":"ACTIVE","updated_at":"2025-09-14T16:11:48Z"}}', NULL),
	(17, 'link', '{"field":"link","event":"link.clicked","timestamp":"2025-09-14T16:11:50Z","payload":{"record_id":"r","message_id":"8ba7b830-9dad-11d1-80b4-000000000017","status_code":302,"occurred_at":"2025-09-14T16:11:47Z"}}', NULL),
	(18, 'call', '{"field":"call","event":"call.completed","timestamp":"2025-09-14T16:11:50Z","payload":{"call_id":"c","number":"+1","channel":"voice","updated_at":"2025-09-14T16:11:46Z"}}', NULL),
	(19, 'unknown family', '{"field":"weather","event":"weather.changed","timestamp":"2025-09-14T16:11:50Z","payload":{"message_id":1,"updated_at":"2025-09-14T16:11:45Z"}}', NULL),
	(20, 'no family, header', '{"payload":{"message_id":"8ba7b830-9dad-11d1-80b4-000000000020","updated_at":"2025-09-14T16:11:45Z"}}', 'message.delivered'),
	(21, 'no name, bad header', '{"n":21}', 'not a name'),
	(22, 'no name, no header', '{"n":22}', NULL),
	(23, 'nothing is what it should be', '{"field":1,"event":{},"sub_type":[],"type":"","data":[],"payload":"x","timestamp":17}', NULL),
	(24, 'message_id is no UUID', '{"field":"message","event":"message.sent","payload":{"message_id":"msg_24","message_status":"SENT","updated_at":"2025-09-14T16:11:45Z"}}', NULL);
CREATE TEMP TABLE answers AS
	SELECT n, s.* FROM samples, sentdm_receive_webhook(convert_to(body, 'UTF8'), headers(convert_to(body, 'UTF8')) ||
		jsonb_strip_nulls(jsonb_build_object('X-Webhook-Event-Type', event_type))) s;
SELECT n, what, http_status, event, number_of(sent_id) AS msg, occurred_at, e.payload = body::jsonb AS kept
FROM samples JOIN answers USING (n) LEFT JOIN sentdm.events e ON e.id = event_id
ORDER BY n;
SELECT * FROM deliveries ORDER BY msg;
SELECT number_of(sent_id) AS msg, contact, line, channel, text, media FROM sentdm.inbound ORDER BY contact;

-- The same again, all at once: duplicates, and nothing else happens
SELECT r.http_status, r.duplicate, count(*)
FROM (SELECT array_agg(convert_to(body, 'UTF8') ORDER BY n) AS bodies, array_agg(headers(convert_to(body, 'UTF8')) ORDER BY n) AS headers FROM samples) t,
	sentdm_receive_webhooks(bodies, t.headers) r
GROUP BY 1, 2;
SELECT count(*), min(duplicates), max(duplicates) FROM sentdm.events;
DELETE FROM sentdm.events;
DELETE FROM sentdm.deliveries;

-- What makes an event the same: signed words, or the bytes
SELECT what, receive.* FROM (VALUES
	(1, 'an event', event(1, 'SENT', '2025-09-14T16:00:00Z'), '{}'::jsonb),
	(2, 'emitted later', replace(event(1, 'SENT', '2025-09-14T16:00:00Z'), '16:30:00', '16:31:00'), '{}'),
	(3, 'with another unsigned id', event(1, 'SENT', '2025-09-14T16:00:00Z'), '{"x-webhook-event-id": "2"}'),
	(4, 'with another unsigned name', event(1, 'SENT', '2025-09-14T16:00:00Z'), '{"x-webhook-event-type": "message.read"}'),
	(5, 'with more in it', event(1, 'SENT', '2025-09-14T16:00:00Z', '{"new": 1}'), '{}'),
	(6, 'at another time', event(1, 'SENT', '2025-09-14T16:00:01Z'), '{}'),
	(7, 'with another status', event(1, 'ROUTED', '2025-09-14T16:00:00Z'), '{}'),
	(8, 'of another message', event(2, 'SENT', '2025-09-14T16:00:00Z'), '{}'),
	(9, 'without a time', event(1, 'SENT', NULL), '{}'),
	(10, 'without a time, again', event(1, 'SENT', NULL), '{}'),
	(11, 'without a time, other bytes', event(1, 'SENT', NULL) || ' ', '{}'),
	(12, 'inbound', event(3, 'RECEIVED', '2025-09-14T16:00:00Z'), '{}'),
	(13, 'inbound, at another time', event(3, 'RECEIVED', '2025-09-14T16:00:01Z'), '{}'),
	(14, 'inbound and outbound', event(3, 'SENT', '2025-09-14T16:00:01Z'), '{}')
	) v(n, what, body, more), receive(body, 0, more) ORDER BY n;
-- ... delivered by two endpoints
SELECT what, r.http_status, r.duplicate FROM (VALUES
	(1, 'another endpoint', event(1, 'SENT', '2025-09-14T16:00:00Z')),
	(2, 'another endpoint, bytes', event(1, 'SENT', NULL))) v(n, what, body),
	sentdm_receive_webhook(convert_to(body, 'UTF8'), headers(convert_to(body, 'UTF8'), id => '550e8400-e29b-41d4-a716-446655440000')) r
ORDER BY n;
-- ... and late: the first one that came counts
SELECT what, receive.* FROM (VALUES
	(1, 'late', event(4, 'SENT', '2025-09-14T16:00:00Z'), 3600),
	(2, 'late, again in time', event(4, 'SENT', '2025-09-14T16:00:00Z'), 0),
	(3, 'in time', event(5, 'SENT', '2025-09-14T16:00:00Z'), 0),
	(4, 'in time, again late', event(5, 'SENT', '2025-09-14T16:00:00Z'), 3600)
	) v(n, what, body, age), receive(body, age) ORDER BY n;
SELECT event, number_of(sent_id) AS msg, to_char(occurred_at, 'HH24:MI:SS') AS at, duplicates, late, webhook_id
FROM sentdm.events ORDER BY msg, occurred_at, event, duplicates;
DELETE FROM sentdm.events;
DELETE FROM sentdm.deliveries;


-- Times that are not believed
CREATE FUNCTION occurred_at(at text) RETURNS timestamptz LANGUAGE plpgsql AS $$
DECLARE
	body bytea := convert_to(jsonb_build_object('timestamp', at)::text, 'UTF8');
	kept bigint;
BEGIN
	SELECT event_id INTO kept FROM sentdm_receive_webhook(body, headers(body));
	RETURN (SELECT e.occurred_at FROM sentdm.events e WHERE id = kept);
END $$;
SELECT at, occurred_at(at) FROM unnest(ARRAY['2025-09-14T16:00:00Z', '2025-09-14T16:00:00.5Z', '2025-09-14T16:00:00.123456789Z',
		'2025-09-14T16:00:00+05:30', '2025-09-14T16:00:00-08:00', '2024-02-29T00:00:00Z', '2025-02-29T00:00:00Z', '2025-09-31T00:00:00Z',
		'2025-13-01T00:00:00Z', '2025-00-01T00:00:00Z', '2025-09-00T00:00:00Z', '2025-09-14T24:00:00Z', '2025-09-14T16:60:00Z', '2025-09-14T16:00:60Z',
		'2025-09-14T16:00:00', '2025-09-14T16:00:00.Z', '2025-09-14T16:00:00+16:00', '2025-09-14T16:00:00+01:60', '2025-09-14T16:00:00+0100',
		'2025-09-14 16:00:00Z', '2025-09-14T16:00:00Z ', '2025-9-14T16:00:00Z', '2025-09-14', '20250914T160000Z', 'now', 'infinity',
		'1999-12-31T23:59:59Z', '2000-01-01T00:00:00Z', '9999-12-31T23:59:59Z']) WITH ORDINALITY v(at, n)
ORDER BY n;
SELECT occurred_at(to_char(now() + '1 hour', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')) IS NOT NULL AS in_an_hour,
	occurred_at(to_char(now() + '2 days', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')) IS NOT NULL AS in_two_days;
-- A bad time gives way to the next best one
SELECT receive.* FROM receive('{"event":"x","timestamp":"2025-09-14T16:00:03Z","payload":{"updated_at":"?","occurred_at":"2025-09-14T16:00:01Z","received_at":"2025-09-14T16:00:02Z"}}');
SELECT receive.* FROM receive('{"event":"x","timestamp":"2025-09-14T16:00:03Z","payload":{"updated_at":"?","occurred_at":7,"received_at":"2025-09-14T16:00:02Z"}}');
SELECT occurred_at FROM sentdm.events WHERE event = 'x' ORDER BY 1;
DELETE FROM sentdm.events;

-- The merge rule.  Events are written status@minute (no minute: no time); each
-- row is received one by one, and all at once.
CREATE FUNCTION outcome(events text, batched boolean) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	bodies bytea[];
	result text;
BEGIN
	SELECT array_agg(convert_to((event(1, split_part(e, '@', 1), '2025-09-14T16:' || nullif(split_part(e, '@', 2), '') || ':00Z')::jsonb
			- 'timestamp' || jsonb_build_object('n', n))::text, 'UTF8') ORDER BY n)
		INTO bodies FROM regexp_split_to_table(events, ' +') WITH ORDINALITY t(e, n);
	IF batched THEN
		PERFORM sentdm_receive_webhooks(bodies, (SELECT array_agg(headers(b) ORDER BY n) FROM unnest(bodies) WITH ORDINALITY t(b, n)));
	ELSE
		FOR i IN 1 .. cardinality(bodies) LOOP
			PERFORM sentdm_receive_webhook(bodies[i], headers(bodies[i]));
		END LOOP;
	END IF;
	SELECT concat_ws('@', status, to_char(status_at, 'MI')) INTO result FROM sentdm.deliveries WHERE sent_id = msg(1);
	DELETE FROM sentdm.deliveries;
	DELETE FROM sentdm.events;
	RETURN result;
END $$;
SELECT events, outcome(events, false) AS one_by_one, nullif(outcome(events, true), outcome(events, false)) AS differs_in_batch
FROM unnest(ARRAY[
	-- in order, in disorder, twice
	'SENT@01 DELIVERED@02', 'DELIVERED@02 SENT@01', 'SENT@01 SENT@02', 'SENT@02 SENT@01', 'SENT@01 SENT@01',
	'READ@03 QUEUED@01 DELIVERED@02 SENT@01', 'FAILED@05 DELIVERED@04', 'DELIVERED@04 FAILED@05',
	-- of the same second, the one further along the way
	'QUEUED@01 SCHEDULED@01', 'SCHEDULED@01 ROUTED@01', 'ROUTED@01 SENT@01', 'SENT@01 DELIVERED@01', 'DELIVERED@01 READ@01', 'READ@01 FAILED@01',
	'SCHEDULED@01 QUEUED@01', 'ROUTED@01 SCHEDULED@01', 'SENT@01 ROUTED@01', 'DELIVERED@01 SENT@01', 'READ@01 DELIVERED@01', 'FAILED@01 READ@01',
	'BLOCKED@01 READ@01', 'FILTERED@01 READ@01', 'CANCELLED@01 READ@01', 'READ@01 BLOCKED@01', 'READ@01 FILTERED@01', 'READ@01 CANCELLED@01',
	-- of equals, the first
	'FAILED@01 BLOCKED@01', 'BLOCKED@01 FAILED@01',
	-- sent again: strictly newer
	'FAILED@01 QUEUED@02', 'BLOCKED@01 QUEUED@01', 'FAILED@02 QUEUED@01', 'FAILED@01 QUEUED@02 SENT@03 DELIVERED@04', 'QUEUED@02 FAILED@01 DELIVERED@04 SENT@03',
	-- unknown ones: after any progress, before any receipt
	'SENT@01 TELEPORTED@01', 'TELEPORTED@01 SENT@01', 'TELEPORTED@01 DELIVERED@01', 'DELIVERED@01 TELEPORTED@01', 'DELIVERED@01 TELEPORTED@02', 'TELEPORTED@01 BEAMED@01',
	-- case does not matter
	'delivered@01 Sent@01', 'sEnT@01 DeLiVeReD@01',
	-- without a time: only forward
	'SENT', 'SENT DELIVERED', 'DELIVERED SENT', 'SENT@01 DELIVERED', 'DELIVERED@01 SENT', 'DELIVERED@01 FAILED', 'DELIVERED SENT@01', 'FAILED QUEUED@01',
	'SENT@03 FAILED DELIVERED@04', 'FAILED READ', 'FAILED BLOCKED'
	]) WITH ORDINALITY v(events, n)
ORDER BY n;
-- A duplicate does nothing, even where it would win
SELECT what, receive.* FROM (VALUES
	(1, 'failed', '{"event": "message.failed", "payload": {"message_id": "8ba7b830-9dad-11d1-80b4-000000000001"}}'),
	(2, 'sent again', event(1, 'QUEUED', '2025-09-14T16:05:00Z')),
	(3, 'failed, duplicate', '{"event": "message.failed", "payload": {"message_id": "8ba7b830-9dad-11d1-80b4-000000000001"}}')) v(n, what, body), receive(body)
ORDER BY n;
SELECT msg, status, at FROM deliveries;
DELETE FROM sentdm.deliveries;
DELETE FROM sentdm.events;
SELECT status, sentdm.status_rank(status) FROM unnest(ARRAY['queued', 'accepted', 'pending', 'PROCESSED', 'Scheduled', 'routed', 'sent', 'teleported', '',
	'delivered', 'read', 'failed', 'filtered', 'blocked', 'CANCELLED', NULL]) WITH ORDINALITY v(status, n) ORDER BY n;

-- Events that come before their message is known here, or are not of ours, get a
-- row; what is known of a message stays.
INSERT INTO sentdm.deliveries (sent_id, message_id, recipient, channel, status) VALUES
	(msg(1), msg(91), '+14155550001', NULL, 'queued'), (msg(2), msg(92), NULL, NULL, 'queued'), (msg(3), msg(93), '+14155550003', 'whatsapp', 'queued');
SELECT what, http_status, duplicate FROM (VALUES
	(1, 'number of the recipient', event(1, 'SENT', '2025-09-14T16:00:00Z', '{"channel": "sms", "outbound_number": "+14155550001"}')),
	(2, 'neither number nor channel', event(1, 'DELIVERED', '2025-09-14T16:01:00Z')),
	(3, 'number that was not known', event(2, 'SENT', '2025-09-14T16:00:00Z', '{"outbound_number": "+14155550002"}')),
	(4, 'older event', event(2, 'ROUTED', '2025-09-14T15:00:00Z', '{"channel": "rcs", "outbound_number": "+19999999999"}')),
	(5, 'ambiguous numbers, another channel', replace(event(3, 'SENT', '2025-09-14T16:00:00Z', '{"channel": "sms", "inbound_number": "+14155550000", "outbound_number": "+14155550003"}'), '"event"', '"sub_type"')),
	(6, 'early, numbers swapped', replace(event(4, 'SENT', '2025-09-14T16:00:00Z', '{"inbound_number": "+14155550004", "outbound_number": "+14155550000"}'), '"event"', '"sub_type"')),
	(7, 'early', event(5, 'SENT', '2025-09-14T16:00:00Z', '{"inbound_number": "+14155550000", "outbound_number": "+14155550005"}')),
	(8, 'a reason', event(6, 'FAILED', '2025-09-14T16:00:00Z', '{"reason_code": "DELIVERY_007", "reason": "not registered"}')),
	(9, 'a reason', event(7, 'BLOCKED', '2025-09-14T16:00:00Z', '{"reason_code": "BUSINESS_003", "reason": "Insufficient balance"}')),
	(10, 'sent again', event(7, 'QUEUED', '2025-09-14T16:05:00Z')),
	(11, 'values that are no strings', event(8, 'SENT', '2025-09-14T16:00:00Z', '{"channel": 1, "outbound_number": {}, "reason_code": [], "reason": true}'))
	) v(n, what, body), receive(body) ORDER BY n;
SELECT * FROM deliveries ORDER BY msg;
SELECT number_of(sent_id) AS msg, number_of(message_id) AS message FROM sentdm.deliveries WHERE message_id IS NOT NULL ORDER BY 1;
-- In a batch, what one event does not know, another one may
DELETE FROM sentdm.deliveries;
SELECT r.http_status, r.duplicate FROM
	(SELECT array_agg(convert_to(body, 'UTF8') ORDER BY n) AS bodies FROM (VALUES
		(1, event(9, 'SENT', '2025-09-14T16:00:00Z', '{"channel": "sms", "outbound_number": "+14155550009"}')),
		(2, event(9, 'DELIVERED', '2025-09-14T16:01:00Z'))) v(n, body)) b,
	LATERAL (SELECT array_agg(headers(body) ORDER BY n) AS headers FROM unnest(bodies) WITH ORDINALITY u(body, n)) h,
	sentdm_receive_webhooks(bodies, h.headers) r;
SELECT * FROM deliveries ORDER BY msg;
DELETE FROM sentdm.deliveries;
DELETE FROM sentdm.events;

-- Authentic, but not JSON that can be kept as such
CREATE TEMP TABLE raws (n int GENERATED ALWAYS AS IDENTITY, what text, body bytea);
INSERT INTO raws (what, body) VALUES
	('empty', ''), ('text', 'hello'), ('cut off', '{"a": '), ('two documents', '{} {}'), ('string', '"a"'), ('number', '1'), ('null', 'null'), ('array', '[{}]'),
	('zero character', '{"a": "\\u0000"}'), ('zero byte', '\x7b7d00'), ('zero byte within', '\x7b2261223a2200227d'), ('half a surrogate', '{"a": "\\ud83d"}'),
	('not UTF-8', '\x7b2261223a22ff227d'), ('overlong UTF-8', '\x7b2261223a22c080227d'),
	('large number', '{"a": 1e400000}'), ('small number', '{"a": 1e-400000}'),
	('nested 64 deep', convert_to('{"a":' || repeat('[', 63) || repeat(']', 63) || '}', 'UTF8')),
	('nested 65 deep', convert_to('{"a":' || repeat('[', 64) || repeat(']', 64) || '}', 'UTF8')),
	('nested 500,000 deep', convert_to(repeat('[', 500000), 'UTF8')),
	('brackets in a string', convert_to('{"a":"\"' || repeat('[', 100) || '\\"}', 'UTF8')),
	('long string', convert_to('{"a":"' || repeat('x', 1000000) || '"}', 'UTF8')),
	('member twice', '{"event": "x", "event": "y"}');
CREATE TEMP TABLE kept AS SELECT n, r.* FROM raws, sentdm_receive_webhook(body, headers(body)) r;
SELECT what, http_status, duplicate, k.reason, e.event, e.raw = body AS raw, e.reason IS NOT DISTINCT FROM k.reason AS same_reason, e.payload IS NOT NULL AS payload
FROM raws JOIN kept k USING (n) LEFT JOIN sentdm.events e ON e.id = event_id ORDER BY n;
SELECT r.http_status, r.duplicate, count(*) FROM (SELECT array_agg(body ORDER BY n) AS bodies, array_agg(headers(body) ORDER BY n) AS headers FROM raws) t,
	sentdm_receive_webhooks(bodies, t.headers) r GROUP BY 1, 2;
DELETE FROM sentdm.events;

-- In a batch, each for itself; the order of the answers is that of the requests
CREATE TEMP TABLE batch (n int GENERATED ALWAYS AS IDENTITY, what text, body bytea, headers jsonb);
INSERT INTO batch (what, body) VALUES
	('good', convert_to(event(1, 'SENT', '2025-09-14T16:00:00Z'), 'UTF8')),
	('not JSON', 'oops'),
	('forged', convert_to(event(2, 'FAILED', '2025-09-14T16:00:00Z'), 'UTF8')),
	('good', convert_to(event(2, 'DELIVERED', '2025-09-14T16:00:00Z'), 'UTF8')),
	('no payload', NULL),
	('same as the first', convert_to(event(1, 'SENT', '2025-09-14T16:00:00Z'), 'UTF8')),
	('zero character', '{"a": "\\u0000"}'),
	('no headers', convert_to(event(3, 'DELIVERED', '2025-09-14T16:00:00Z'), 'UTF8')),
	('good', convert_to(event(1, 'DELIVERED', '2025-09-14T16:00:00Z'), 'UTF8')),
	('late', convert_to(event(4, 'SENT', '2025-09-14T16:00:00Z'), 'UTF8')),
	('not JSON, again', 'oops'),
	('same as the first', convert_to(event(1, 'SENT', '2025-09-14T16:00:00Z'), 'UTF8'));
UPDATE batch SET headers = headers(body, CASE what WHEN 'late' THEN 3600 ELSE 0 END) WHERE what <> 'no headers';
UPDATE batch SET headers = headers || '{"x-webhook-signature": "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}' WHERE what = 'forged';
CREATE TEMP TABLE outcomes AS SELECT 1 AS turn, r.* FROM (SELECT array_agg(body ORDER BY n) AS bodies, array_agg(headers ORDER BY n) AS headers FROM batch) t,
	sentdm_receive_webhooks(bodies, t.headers) r;
INSERT INTO outcomes SELECT 2 AS turn, r.* FROM (SELECT array_agg(body ORDER BY n) AS bodies, array_agg(headers ORDER BY n) AS headers FROM batch) t,
	sentdm_receive_webhooks(bodies, t.headers) r;
SELECT a.ordinal, what, a.http_status, a.duplicate, a.reason, e.duplicates, e.late, b.duplicate AS duplicate_again, a.event_id = b.event_id AS same_event
FROM outcomes a JOIN outcomes b USING (ordinal) JOIN batch ON n = ordinal LEFT JOIN sentdm.events e ON e.id = a.event_id
WHERE a.turn = 1 AND b.turn = 2 ORDER BY ordinal;
SELECT * FROM deliveries ORDER BY msg;
DELETE FROM sentdm.deliveries;
DELETE FROM sentdm.events;

-- Many at once, in any order
SELECT r.http_status, r.duplicate, count(*), count(DISTINCT r.event_id) FROM
	(SELECT array_agg(body ORDER BY h) AS bodies, array_agg(headers(body) ORDER BY h) AS headers
		FROM (SELECT convert_to(event(n / 4, (ARRAY['QUEUED', 'SENT', 'DELIVERED', 'SENT'])[n % 4 + 1], '2025-09-14T16:0' || n % 4 % 3 || ':00Z'), 'UTF8') AS body, md5(n::text) AS h
			FROM generate_series(4, 2003) n) b) t,
	sentdm_receive_webhooks(bodies, t.headers) r GROUP BY 1, 2 ORDER BY 2;
SELECT status, at, count(*) FROM deliveries GROUP BY 1, 2;
SELECT duplicates, count(*) FROM sentdm.events GROUP BY 1;
DELETE FROM sentdm.deliveries;
DELETE FROM sentdm.events;

-- Secrets: those of an endpoint, those of any, and those that run out
DELETE FROM sentdm.webhook_secrets;
CREATE FUNCTION secret(n int) RETURNS text LANGUAGE sql IMMUTABLE RETURN 'whsec_' || encode(sha256(convert_to(n::text, 'UTF8')), 'base64');
CREATE FUNCTION tries() RETURNS TABLE (endpoint int, secrets text) LANGUAGE sql BEGIN ATOMIC
	SELECT e, string_agg(CASE r.http_status WHEN 200 THEN s::text WHEN 401 THEN '-' ELSE r.http_status::text END, ' ' ORDER BY s)
	FROM generate_series(1, 3) e, generate_series(1, 4) s, headers('{}', 0, msg(e)::text, secret(s)) h, sentdm_receive_webhook('{}', h) r
	GROUP BY e ORDER BY e;
END;
SELECT sentdm_set_webhook_secret(secret(1), msg(1));
SELECT sentdm_set_webhook_secret(secret(2), msg(2));
SELECT * FROM tries();
-- ... any endpoint
SELECT sentdm_set_webhook_secret(secret(3));
SELECT * FROM tries();
-- ... a new one, while the old one is valid for a day; others are not concerned
SELECT sentdm_set_webhook_secret(secret(4), msg(1));
SELECT * FROM tries();
-- ... the old one again
SELECT sentdm_set_webhook_secret(secret(1), msg(1), '1 hour');
SELECT number_of(webhook_id) AS endpoint, n, CASE WHEN valid_until IS NOT NULL THEN valid_until - now() > '59 minutes' AND valid_until - now() <= '1 hour' END AS for_an_hour
FROM sentdm.webhook_secrets JOIN generate_series(1, 4) n ON secret = secret(n) ORDER BY n;
-- ... again, with a longer overlap: what runs out does not live longer
SELECT sentdm_set_webhook_secret(secret(1), msg(1), '1 day');
SELECT count(*), count(valid_until), max(valid_until) < now() + '2 hours' AS not_longer FROM sentdm.webhook_secrets;
-- ... at once
SELECT sentdm_set_webhook_secret(secret(1), msg(1), '0');
SELECT * FROM tries();
-- ... of endpoints whose id is no UUID
SELECT s, r.http_status, r.reason FROM generate_series(1, 3, 2) s, headers('{}', 0, 'endpoint', secret(s)) h, sentdm_receive_webhook('{}', h) r;
-- ... none is left
UPDATE sentdm.webhook_secrets SET valid_until = now() - interval '1 second';
SELECT * FROM tries();
DELETE FROM sentdm.webhook_secrets;
DELETE FROM sentdm.events;

-- The older scheme, where a setting turns it on (for new sessions, to be sure)
CREATE TABLE olds (n int GENERATED ALWAYS AS IDENTITY, what text, body bytea, headers jsonb);
INSERT INTO olds (what, body, headers)
SELECT what, '{"type":"message.delivered","data":{"id":"8ba7b830-9dad-11d1-80b4-000000000001","status":"delivered"}}', h
FROM (SELECT sentdm_sign(convert_to('{"type":"message.delivered","data":{"id":"8ba7b830-9dad-11d1-80b4-000000000001","status":"delivered"}}', 'UTF8'), 'your_webhook_secret_here') AS hex) s,
	LATERAL (VALUES
		('hex, unsigned id', jsonb_build_object('X-Webhook-Signature', hex, 'X-Webhook-Id', 'd4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8')),
		('prefix', jsonb_build_object('X-Webhook-Signature', 'sha256=' || hex)),
		('upper case', jsonb_build_object('X-Webhook-Signature', upper(hex))),
		('beside a v1 entry', jsonb_build_object('X-Webhook-Signature', 'v1,x ' || hex, 'X-Webhook-Id', 'id', 'X-Webhook-Timestamp', '1789402310')),
		('before a v1 entry', jsonb_build_object('X-Webhook-Signature', hex || ' v1,x', 'X-Webhook-Id', 'id', 'X-Webhook-Timestamp', '1789402310')),
		('wrong', jsonb_build_object('X-Webhook-Signature', sentdm_sign('x'::text, 'your_webhook_secret_here')))) v(what, h);
INSERT INTO sentdm.webhook_secrets (secret) VALUES ('your_webhook_secret_here');
SELECT what, r.http_status, r.duplicate, r.reason FROM olds, sentdm_receive_webhook(body, headers) r ORDER BY n;
ALTER SYSTEM SET sentdm.webhook_legacy_signature = on;
SELECT pg_reload_conf();
\c -
SELECT what, r.http_status, r.duplicate, r.reason FROM olds, sentdm_receive_webhook(body, headers) r ORDER BY n;
SELECT event, late, webhook_id FROM sentdm.events;
SELECT msg, status FROM deliveries;
-- ... the current scheme works as before, also with a secret for both
SELECT sentdm_set_webhook_secret('short and hidden');
SELECT sentdm_set_webhook_secret('short, hidden..');
SELECT sentdm_set_webhook_secret(secret(1));
SELECT n, r.http_status, r.reason FROM generate_series(1, 2) n, headers('{}', 0, msg(1)::text, secret(n)) h, sentdm_receive_webhook('{}', h) r;
SELECT r.http_status, r.duplicate FROM sentdm_receive_webhook('{"n":1}', jsonb_build_object('X-Webhook-Signature', sentdm_sign('{"n":1}'::bytea, secret(1)))) r;
ALTER SYSTEM RESET sentdm.webhook_legacy_signature;
SELECT pg_reload_conf();
\c -
SELECT r.http_status, r.reason FROM sentdm_receive_webhook('{"n":1}', jsonb_build_object('X-Webhook-Signature', sentdm_sign('{"n":1}'::bytea, secret(1)))) r;

-- Who may do all this without being allowed to look
CREATE ROLE regress_sentdm_receiver;
GRANT EXECUTE ON FUNCTION sentdm_receive_webhook(bytea, jsonb) TO regress_sentdm_receiver;
SELECT headers('{"by": "receiver"}', 0, msg(1)::text, secret(1)) AS signed \gset
SET ROLE regress_sentdm_receiver;
SELECT http_status, duplicate, reason FROM sentdm_receive_webhook('{"by": "receiver"}', :'signed');
SELECT http_status FROM sentdm_receive_webhooks(ARRAY['{}']::bytea[], ARRAY['{}']::jsonb[]);
SELECT sentdm_set_webhook_secret('hidden');
SELECT count(*) FROM sentdm.webhook_secrets;
RESET ROLE;
GRANT USAGE ON SCHEMA sentdm TO regress_sentdm_receiver;
GRANT pg_read_all_data TO regress_sentdm_receiver;
SET ROLE regress_sentdm_receiver;
SELECT count(*) FROM sentdm.webhook_secrets;
RESET ROLE;
REVOKE ALL ON FUNCTION sentdm_receive_webhook(bytea, jsonb) FROM regress_sentdm_receiver;
REVOKE ALL ON SCHEMA sentdm FROM regress_sentdm_receiver;
DROP ROLE regress_sentdm_receiver;

DELETE FROM sentdm.webhook_secrets;
DELETE FROM sentdm.deliveries;
DELETE FROM sentdm.events;
DROP TABLE olds;
DROP VIEW deliveries;
DROP FUNCTION tries, secret, outcome, occurred_at, number_of, receive, headers, event, msg;
