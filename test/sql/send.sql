-- What sentdm_send() accepts, refuses and stores; needs neither preload nor network.
\set VERBOSITY terse

-- that nothing leaves without preload is said once a session
SELECT sentdm_send('+14155551234', body => 'x') IS NOT NULL AS sent;
SELECT sentdm_send('+14155551234', body => 'x') IS NOT NULL AS sent;
TRUNCATE sentdm.messages, sentdm.outbox;

CREATE VIEW sent AS
	SELECT request, priority, tag, unique_key, profile_id, send_at, expires_at, state
	FROM sentdm.messages ORDER BY id;

-- the request is what the API takes
SELECT sentdm_send('+14155551234', 'order_shipped', '{"name": "Ann", "count": 3, "gift": true, "sum": 12.50}') IS NOT NULL AS sent;
SELECT sentdm_send('+14155551234', '7ba7b820-9dad-11d1-80b4-00c04fd430c8') IS NOT NULL AS sent;
SELECT sentdm_send('+14155551234', body => E'Hello: "quoted" \\ and\na line', channels => '{sms,whatsapp}',
	priority => 'high', tag => 'spring', profile_id => '11111111-2222-3333-4444-555555555555',
	sandbox => true, extra => '{"media_urls": ["https://example.com/a.png"], "subject": "s"}') IS NOT NULL AS sent;
SELECT request, priority, tag, profile_id, state FROM sent;
SELECT priority, attempts, claimed_at, sandbox FROM sentdm.outbox ORDER BY message_id;
TRUNCATE sentdm.messages, sentdm.outbox;

-- ids are version 7 and ascend
SELECT count(*), bool_and(substr(id::text, 15, 1) = '7') AS version_7,
	bool_and(substr(id::text, 20, 1) IN ('8', '9', 'a', 'b')) AS variant, bool_and(id > before) AS ascending
FROM (SELECT id, lag(id) OVER (ORDER BY n) AS before
	FROM (SELECT n, sentdm_send('+14155551234', body => 'x') AS id FROM generate_series(1, 200) n) s) s
WHERE before IS NOT NULL;
TRUNCATE sentdm.messages, sentdm.outbox;

-- many recipients: one request per thousand, the same number once
SELECT count(*) FROM sentdm_send(ARRAY(SELECT '+1415' || 5550000 + i FROM generate_series(1, 2500) i), body => 'x');
SELECT jsonb_array_length(request -> 'to') AS recipients, request -> 'to' ->> 0 AS first FROM sent;
SELECT count(*) FROM sentdm_send(ARRAY['+14155550001', '+14155550002', '+14155550001'], body => 'x');
SELECT request -> 'to' AS "to" FROM sent OFFSET 3;
SELECT count(*) FROM sentdm_send('{}'::text[], body => 'x');
SELECT count(*) FROM sentdm_send(NULL::text[], body => 'x');
TRUNCATE sentdm.messages, sentdm.outbox;

-- bad input: each has its SQLSTATE, names the argument, hints at the remedy
CREATE FUNCTION refused(call text) RETURNS TABLE (code text, message text, hint text)
LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE 'SELECT ' || call;
	RETURN QUERY SELECT '00000', 'accepted', NULL;
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
	RETURN NEXT;
END $$;
\x on
SELECT c.call, r.* FROM (VALUES
	($$sentdm_send('4155551234', body => 'x')$$),
	($$sentdm_send('+0155551234', body => 'x')$$),
	($$sentdm_send('+1415555', body => 'x')$$),
	($$sentdm_send('+123456', body => 'x')$$),
	($$sentdm_send('+1234567890123456', body => 'x')$$),
	($$sentdm_send('+1415555 1234', body => 'x')$$),
	($$sentdm_send('', body => 'x')$$),
	($$sentdm_send(NULL::text, body => 'x')$$),
	($$sentdm_send(ARRAY['+14155551234', NULL], body => 'x')$$),
	($$sentdm_send(ARRAY['+14155551234', 'bad'], body => 'x')$$),
	($$sentdm_send('+14155551234')$$),
	($$sentdm_send('+14155551234', body => '')$$),
	($$sentdm_send('+14155551234', 'welcome', body => 'x')$$),
	($$sentdm_send('+14155551234', 'welcome', '[1]')$$),
	($$sentdm_send('+14155551234', 'welcome', '"x"')$$),
	($$sentdm_send('+14155551234', 'welcome', '{"a": {"b": 1}}')$$),
	($$sentdm_send('+14155551234', 'welcome', '{"a": [1]}')$$),
	($$sentdm_send('+14155551234', 'welcome', '{"a": null}')$$),
	($$sentdm_send('+14155551234', body => 'x', parameters => '{}')$$),
	($$sentdm_send('+14155551234', body => 'x', channels => '{SMS}')$$),
	($$sentdm_send('+14155551234', body => 'x', channels => '{telegram}')$$),
	($$sentdm_send('+14155551234', body => 'x', channels => '{sent,sms}')$$),
	($$sentdm_send('+14155551234', body => 'x', channels => '{NULL}')$$),
	($$sentdm_send('+14155551234', body => 'x', priority => 'urgent')$$),
	($$sentdm_send('+14155551234', body => 'x', expires_at => now() - interval '1 s')$$),
	($$sentdm_send('+14155551234', body => 'x', send_at => now() + interval '2 h', expires_at => now() + interval '1 h')$$),
	($$sentdm_send('+14155551234', body => 'x', send_at => 'infinity')$$),
	($$sentdm_send('+14155551234', body => 'x', extra => '[]')$$),
	($$sentdm_send('+14155551234', body => 'x', extra => '{"to": ["+14155550000"]}')$$),
	($$sentdm_send('+14155551234', body => 'x', unique_key => '')$$),
	($$sentdm_send('+14155551234', body => 'x', tag => repeat('x', 513))$$),
	($$sentdm_send('+14155551234', body => repeat('x', 300000))$$),
	($$sentdm_send_batch('{}')$$)
) AS c(call), refused(c.call) AS r;
\x off
SELECT count(*) AS stored FROM sentdm.messages;

-- a batch sends what is good
SELECT ordinal, message_id IS NOT NULL AS sent, error FROM sentdm_send_batch($$[
	{"recipient": "+14155550001", "body": "x"},
	{"recipient": "bad", "body": "x"},
	{"recipients": ["+14155550002", "+14155550003"], "template": "welcome", "parameters": {"n": 1}, "priority": "bulk"},
	{"recipient": "+14155550004", "body": "x", "expires_at": "2020-01-01"},
	{"recipient": "+14155550004", "body": "x", "send_at": "tomorrow-ish"},
	{"recipient": "+14155550004", "body": "x", "profile_id": "no"},
	{"recipient": "+14155550004", "body": 5},
	{"recipient": null, "body": "x"},
	{"recipients": [], "body": "x"},
	{"recipients": ["+14155550004", null], "body": "x"},
	{"recipient": "+14155550004", "text": "x"},
	{"recipient": "+14155550004", "recipients": ["+14155550004"], "body": "x"},
	{"body": "x"},
	17,
	{"recipient": "+14155550005", "body": "x", "sandbox": true, "channels": ["sms"], "tag": "t",
	 "send_at": "2100-01-01T00:00:00Z", "expires_at": "2100-01-02T00:00:00Z", "extra": {"subject": "s"}, "template": null}
]$$);
SELECT request, priority, tag, send_at AT TIME ZONE 'UTC' AS send_at FROM sent;
TRUNCATE sentdm.messages, sentdm.outbox;

-- a unique key sends once, also across calls with many recipients
SELECT sentdm_send('+14155551234', body => 'x', unique_key => 'order 1') = sentdm_send('+14155551234', body => 'y', unique_key => 'order 1') AS same;
SELECT count(*) AS messages, max(request ->> 'text') AS text FROM sent;
CREATE TEMP TABLE first_call AS
	SELECT sentdm_send(ARRAY(SELECT '+1415' || 5550000 + i FROM generate_series(1, 1500) i), body => 'x', unique_key => 'campaign') AS id;
SELECT count(*) AS ids, count(*) FILTER (WHERE id IN (SELECT id FROM first_call)) AS known
FROM sentdm_send(ARRAY(SELECT '+1415' || 5550000 + i FROM generate_series(1, 2500) i), body => 'x', unique_key => 'campaign') AS id;
SELECT unique_key FROM sent ORDER BY 1;
TRUNCATE sentdm.messages, sentdm.outbox;

-- a runaway transaction is stopped; a savepoint that is rolled back does not count
SET sentdm.max_per_transaction = 3;
SELECT * FROM refused($$count(sentdm_send('+1415555' || 1000 + i, body => 'x')) FROM generate_series(1, 4) i$$);
SELECT * FROM refused($$count(*) FROM sentdm_send(ARRAY['+14155550001', '+14155550002', '+14155550003', '+14155550004'], body => 'x')$$);
BEGIN;
SELECT count(sentdm_send('+1415555' || 1000 + i, body => 'x')) FROM generate_series(1, 2) i;
SAVEPOINT a;
SELECT count(sentdm_send('+14155551234', body => 'rolled back'));
ROLLBACK TO a;
SELECT count(sentdm_send('+14155551234', body => 'x'));
SELECT * FROM refused($$sentdm_send('+14155551234', body => 'x')$$);
SET LOCAL sentdm.max_per_transaction = 4;
SELECT count(sentdm_send('+14155551234', body => 'x'));
COMMIT;
SELECT count(*), count(*) FILTER (WHERE request ->> 'text' = 'rolled back') AS rolled_back FROM sent;
RESET sentdm.max_per_transaction;
TRUNCATE sentdm.messages, sentdm.outbox;

-- a read-only transaction
BEGIN READ ONLY;
SELECT * FROM refused($$sentdm_send('+14155551234', body => 'x')$$);
ROLLBACK;

-- cancel: only what is still here
SELECT sentdm_send('+14155551234', body => 'x') AS id \gset
SELECT sentdm_cancel(:'id'), sentdm_cancel(:'id');
SELECT state, finished_at IS NOT NULL AS finished FROM sentdm.messages;
SELECT count(*) FROM sentdm.outbox;
SELECT sentdm_cancel('00000000-0000-7000-8000-000000000000'), sentdm_cancel(NULL);
-- ... and again, deliberately, under a new key
SELECT sentdm_retry(:'id'), sentdm_retry(:'id');
SELECT state, generation FROM sentdm.messages;
UPDATE sentdm.outbox SET claimed_at = now();
SELECT sentdm_cancel(:'id') AS claimed;
UPDATE sentdm.outbox SET claimed_at = NULL, ambiguous_since = now();
SELECT sentdm_cancel(:'id') AS perhaps_sent;
TRUNCATE sentdm.messages, sentdm.outbox;

-- the sender's name is kept, whoever owns the function; PUBLIC may not send
CREATE ROLE regress_sentdm_app;
SET ROLE regress_sentdm_app;
SELECT * FROM public.refused($$public.sentdm_send('+14155551234', body => 'x')$$);
RESET ROLE;
GRANT EXECUTE ON FUNCTION sentdm_send(text, text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb) TO regress_sentdm_app;
GRANT USAGE ON SCHEMA public TO regress_sentdm_app;
SET ROLE regress_sentdm_app;
SELECT sentdm_send('+14155551234', body => 'x') IS NOT NULL AS sent, current_user;
SELECT * FROM refused('count(*) FROM sentdm.messages');
-- an operator of the caller's own making is not used with the owner's rights
RESET ROLE;
SELECT created_by FROM sentdm.messages;
CREATE SCHEMA regress_trap AUTHORIZATION regress_sentdm_app;
SET ROLE regress_sentdm_app;
CREATE FUNCTION regress_trap.equal(text, text) RETURNS boolean LANGUAGE plpgsql AS
	$$ BEGIN RAISE EXCEPTION 'trapped as %', current_user; END $$;
CREATE OPERATOR regress_trap.= (LEFTARG = text, RIGHTARG = text, FUNCTION = regress_trap.equal);
SET search_path = regress_trap, pg_catalog, public;
SELECT sentdm_send('+14155551234', body => 'x', unique_key => 'k') IS NOT NULL AS first;
SELECT sentdm_send('+14155551234', body => 'x', unique_key => 'k') IS NOT NULL AS again;
RESET search_path;
RESET ROLE;
DROP OWNED BY regress_sentdm_app CASCADE;
DROP ROLE regress_sentdm_app;
TRUNCATE sentdm.messages, sentdm.outbox;

-- secrets are stars, and cannot be set from SQL
SHOW sentdm.api_key;
SHOW sentdm.webhook_secret;
SELECT * FROM refused($$set_config('sentdm.api_key', 'x', false)$$);
ALTER SYSTEM SET sentdm.api_key = 'x';
ALTER SYSTEM SET sentdm.webhook_secret = 'x';
ALTER SYSTEM SET sentdm.api_key_file = 'x';
ALTER ROLE CURRENT_USER SET sentdm.api_key = 'x';

TRUNCATE sentdm.messages, sentdm.outbox;
DROP FUNCTION refused;
DROP VIEW sent;
