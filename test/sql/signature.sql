-- sentdm_sign() and sentdm_verify_signature(), with the vectors of the wire
-- contract; these were computed with two other implementations.
\set secret1 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8='
\set secret2 'whsec_yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f'
\set secret3 'whsec_AAECAwQFBgcICQoLDA0ODw=='
\set id1 'd4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8'
\set id3 '550e8400-e29b-41d4-a716-446655440000'
\set sig1 'v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc='
\set sig2 'v1,XXqpprr63Swm16MVS51v339HGMXwT17lqVa67eGGGYc='
\set sig3 'v1,1tt1Gfy8FJXU7vjGIaU5/XvxUQd6H6YwytZe+rnWAYg='
\set hex1 'a9cbfb6ec38a6121d878917bd17f414105f1a5e918b488f2897c4a789fa304d3'
\set hex2 'a734b782eb920c63d7f032fd9a02a02c2de06470ed348f62fcbffe0fda6519e5'
\set hex3 '8bb990c40a7d61cb97597a942125025be50ac8beb74436e3735b98893a7f6620'
\set secret_a1 'your_webhook_secret_here'
\set body1 '{"field":"message","event":"message.delivered","timestamp":"2026-09-14T16:11:50Z","payload":{"account_id":"7ba7b820-9dad-11d1-80b4-00c04fd430c8","message_id":"8ba7b830-9dad-11d1-80b4-00c04fd430c8","message_status":"DELIVERED","channel":"sms","outbound_number":"+14155551234","updated_at":"2026-09-14T16:11:49Z"}}'
-- spaces, line breaks and UTF-8
\set body2 '\\x7b20226669656c6422203a20226d657373616765222c20226576656e74223a226d6573736167652e7265636569766564222c2274696d657374616d70223a22323032362d30392d31345431363a31323a30305a222c0a20227061796c6f6164223a7b22696e626f756e645f6e756d626572223a222b353235353132333435363738222c226f7574626f756e645f6e756d626572223a222b3134313535353530303030222c2274657874223a22c2bf4375c3a16e746f3f205c753236303320e29883222c2272656365697665645f6174223a22323032362d30392d31345431363a31313a35395a227d207d0a'
\set body_a1 '{"type": "message.delivered", "data": {"id": "msg_123", "status": "delivered"}}'
\set body_a2 '\\x7b2274797065223a226d6573736167652e6661696c6564222c2264617461223a7b226964223a226d73675f313234222c22737461747573223a226661696c6564222c226572726f72223a7b226d657373616765223a226ec3ba6d65726f20696e76c3a16c69646f227d7d2c2274696d657374616d70223a22323032362d30322d30315431303a30303a30305a227d'

SELECT encode(sha256(convert_to(:'body1', 'UTF8')), 'hex') AS body1,
	length(:'body2'::bytea) AS body2_bytes, length(:'body_a2'::bytea) AS body_a2_bytes;

-- The current scheme: what verifies is also what is made
CREATE TEMP TABLE vectors (name text, body bytea, secret text, id text, at bigint, signature text);
INSERT INTO vectors VALUES
	('B1', convert_to(:'body1', 'UTF8'), :'secret1', :'id1', 1789402310, :'sig1'),
	('B2', :'body2', :'secret2', :'id1', 1789402320, :'sig2'),
	('B3', '', :'secret3', :'id3', 1705334531, :'sig3');
SELECT name,
	sentdm_verify_signature(body, signature, secret, id, at::text, at => to_timestamp(at)) AS verifies,
	sentdm_sign(body, secret, id, at::text) = signature AS signs
FROM vectors ORDER BY name;

-- A payload of type text means its bytes
SELECT sentdm_verify_signature(:'body1'::text, :'sig1', :'secret1', :'id1', '1789402310', at => to_timestamp(1789402310)) AS verifies,
	sentdm_sign(:'body1'::text, :'secret1', :'id1', '1789402310') = :'sig1' AS signs;

-- Signatures that a wrong reading of the scheme would make
SELECT name, sentdm_verify_signature(body, wrong, secret, id, at::text, at => to_timestamp(at)) AS verifies
FROM vectors JOIN (VALUES
	('B1', 'keyed with the whole secret', 'v1,pwUu2oyO1vf4vX8n2/05cgW4RFyAy3sIyKaJMYlKJjU='),
	('B1', 'keyed with the undecoded base64', 'v1,+s76UThm6t9Q/BDzNEIIFBiS0v/Kou70F4WxEoAYABw='),
	('B2', 'of the JSON serialised again', 'v1,l9TEApEqgPYvZjHF9dUV11nSE3uw5RukoHZXyKT93Rw=')) w(name, what, wrong) USING (name)
ORDER BY name, what;

-- Each part is signed
SELECT what, sentdm_verify_signature(body, signature, secret, id, stamp, at => to_timestamp(1789402310)) AS verifies
FROM (VALUES
	(1, 'all right', :'body1', :'sig1', :'secret1', :'id1', '1789402310'),
	(2, 'body', :'body1' || ' ', :'sig1', :'secret1', :'id1', '1789402310'),
	(3, 'signature', :'body1', :'sig2', :'secret1', :'id1', '1789402310'),
	(4, 'secret', :'body1', :'sig1', :'secret2', :'id1', '1789402310'),
	(5, 'id', :'body1', :'sig1', :'secret1', :'id3', '1789402310'),
	(6, 'id in upper case', :'body1', :'sig1', :'secret1', upper(:'id1'), '1789402310'),
	(7, 'timestamp', :'body1', :'sig1', :'secret1', :'id1', '1789402311')
	) t(n, what, body, signature, secret, id, stamp)
ORDER BY n;

-- Several signatures, and malformed ones
SELECT header, sentdm_verify_signature(:'body1'::text, header, :'secret1', :'id1', '1789402310', at => to_timestamp(1789402310)) AS verifies
FROM unnest(ARRAY[
	:'sig2' || ' ' || :'sig1',
	'v0,abc ' || :'sig1' || ' v2,xyz',
	:'sig2' || ' ' || :'sig3',
	'', ' ', 'v1', 'v1,', 'v1,abc', 'V1' || substr(:'sig1', 3), substr(:'sig1', 4), :'sig1' || 'A',
	' ' || :'sig1' || ' ', replace(:'sig1', '=', ''), :'sig1' || ',' || :'sig2']) WITH ORDINALITY h(header, n)
ORDER BY n;

-- Malformed ids, timestamps and secrets
SELECT what, sentdm_verify_signature(''::bytea, :'sig3', secret, id, stamp, at => to_timestamp(1705334531)) AS verifies
FROM (VALUES
	(1, 'all right', :'secret3', :'id3', '1705334531'),
	(2, 'empty id', :'secret3', '', '1705334531'),
	(3, 'empty timestamp', :'secret3', :'id3', ''),
	(4, 'no number', :'secret3', :'id3', 'yesterday'),
	(5, 'sign', :'secret3', :'id3', '+1705334531'),
	(6, 'space', :'secret3', :'id3', ' 1705334531'),
	(7, 'leading zero', :'secret3', :'id3', '01705334531'),
	(8, 'many digits', :'secret3', :'id3', repeat('1', 100)),
	(9, 'empty secret', '', :'id3', '1705334531'),
	(10, 'no prefix', substr(:'secret3', 7), :'id3', '1705334531'),
	(11, 'no base64', 'whsec_!!!!', :'id3', '1705334531'),
	(12, 'long secret', 'whsec_' || repeat('A', 10000), :'id3', '1705334531')
	) t(n, what, secret, id, stamp)
ORDER BY n;

-- A dot in the id would let one signature stand for another content
SELECT sentdm_verify_signature('rest'::text, signature, :'secret3', 'id.1789402310', '1705334531', '100 years') AS moved_dot
FROM sentdm_sign('1705334531.rest'::text, :'secret3', 'id', '1789402310') signature;

-- The older scheme, with and without its prefix
SELECT name, sentdm_verify_signature(body, hex, secret) AS verifies,
	sentdm_verify_signature(body, 'sha256=' || hex, secret) AS with_prefix,
	sentdm_sign(body, secret) = hex AS signs
FROM (VALUES
	('A1', convert_to(:'body_a1', 'UTF8'), :'secret_a1', :'hex1'),
	('A2', :'body_a2', :'secret1', :'hex2'),
	('A3', '', 'k', :'hex3')) t(name, body, secret, hex)
ORDER BY name;
SELECT signature, sentdm_verify_signature(:'body_a1'::text, signature, :'secret_a1') AS verifies
FROM unnest(ARRAY[:'hex1', upper(:'hex1'), 'sha256=' || upper(:'hex1'), 'SHA256=' || :'hex1', 'sha256=',
	substr(:'hex1', 2), :'hex1' || '0', ' ' || :'hex1', :'hex2', '']) WITH ORDINALITY s(signature, n)
ORDER BY n;

-- No scheme is taken for the other
SELECT sentdm_verify_signature(:'body1'::text, :'sig1', :'secret1') AS v1_as_hex,
	sentdm_verify_signature(:'body1'::text, sentdm_sign(:'body1'::text, :'secret1'), :'secret1',
		:'id1', '1789402310', at => to_timestamp(1789402310)) AS hex_as_v1;

-- Age, in whole seconds either way
SELECT tolerance, late_by, sentdm_verify_signature(:'body1'::text, :'sig1', :'secret1', :'id1', '1789402310',
	tolerance, to_timestamp(1789402310) + late_by) AS verifies
FROM (VALUES
	(1, interval '5 minutes', interval '300 seconds'),
	(2, '5 minutes', '300.9 seconds'),
	(3, '5 minutes', '301 seconds'),
	(4, '5 minutes', '-300 seconds'),
	(5, '5 minutes', '-300.1 seconds'),
	(6, '0', '0'),
	(7, '0', '0.999 seconds'),
	(8, '0', '1 second'),
	(9, '0', '-0.001 seconds'),
	(10, '0.9 seconds', '1 second'),
	(11, '-0.001 seconds', '0'),
	(12, '-5 minutes', '0'),
	(13, '1 day -1 second', '86399 seconds'),
	(14, '1 day -1 second', '86400 seconds'),
	(15, '1 month', '30 days'),
	(16, '1 month', '30 days 1 second'),
	(17, '178000000 years', '-2000 years')
	) t(n, tolerance, late_by)
ORDER BY n;
SELECT at, sentdm_verify_signature(:'body1'::text, :'sig1', :'secret1', :'id1', '1789402310', '178000000 years', at) AS verifies
FROM unnest(ARRAY['infinity', '-infinity']::timestamptz[]) at;

-- The default is five minutes from now
SELECT age, sentdm_verify_signature('{}'::text, sentdm_sign('{}'::text, :'secret1', :'id1', stamp), :'secret1', :'id1', stamp) AS verifies
FROM (VALUES (0), (200), (-200), (400), (-400)) a(age),
	LATERAL (SELECT (extract(epoch FROM now())::bigint - age)::text AS stamp) s;

-- NULL is false when verifying, and NULL when signing
SELECT n AS null_argument, sentdm_verify_signature(
	CASE WHEN n <> 1 THEN :'body1'::text END, CASE WHEN n <> 2 THEN :'sig1' END,
	CASE WHEN n <> 3 THEN :'secret1' END, CASE WHEN n <> 4 THEN :'id1' END,
	CASE WHEN n <> 5 THEN '1789402310' END, CASE WHEN n <> 6 THEN interval '5 minutes' END,
	CASE WHEN n <> 7 THEN to_timestamp(1789402310) END) AS verifies
FROM generate_series(0, 7) n;
SELECT sentdm_verify_signature(NULL::text, :'hex1', :'secret_a1') AS payload,
	sentdm_verify_signature(:'body_a1'::text, NULL, :'secret_a1') AS signature,
	sentdm_verify_signature(:'body_a1'::text, :'hex1', NULL) AS secret;
SELECT sentdm_sign(NULL::text, 'k') IS NULL AS payload, sentdm_sign('x'::text, NULL) IS NULL AS secret,
	sentdm_sign(NULL::bytea, NULL, 'id') IS NULL AS before_errors;

-- What cannot be signed
DO $$
DECLARE
	call text;
	message text;
	hint text;
BEGIN
	FOREACH call IN ARRAY ARRAY[
		$c$sentdm_sign('{}'::text, 'hidden', 'id')$c$,
		$c$sentdm_sign('{}'::text, 'hidden', NULL, '1789402310')$c$,
		$c$sentdm_sign('{}'::text, 'hidden', 'id', '1789402310')$c$,
		$c$sentdm_sign('{}'::text, 'whsec_hidden!', 'id', '1789402310')$c$,
		$c$sentdm_sign('{}'::text, 'whsec_AAECAwQFBgcICQoLDA0ODw==', 'i.d', '1789402310')$c$,
		$c$sentdm_sign('{}'::text, 'whsec_AAECAwQFBgcICQoLDA0ODw==', 'id', 'soon')$c$,
		$c$sentdm_sign('{}'::text, '')$c$,
		$c$sentdm_sign('{}'::text, repeat('x', 513))$c$]
	LOOP
		BEGIN
			EXECUTE 'SELECT ' || call;
			RAISE WARNING 'no error: %', call;
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
			RAISE INFO '%: %; %', SQLSTATE, message, hint;
		END;
	END LOOP;
END $$;

-- Changing secrets and schemes from row to row
SELECT count(*) FILTER (WHERE sentdm_verify_signature(body, sentdm_sign(body, secret, 'id', '1789402310'), secret,
		'id', '1789402310', at => to_timestamp(1789402310))) AS v1,
	count(*) FILTER (WHERE sentdm_verify_signature(body, sentdm_sign(body, secret), secret)) AS hex,
	count(*) FILTER (WHERE sentdm_verify_signature(body, sentdm_sign(body, secret), secret || 'x')) AS wrong
FROM (SELECT convert_to('body ' || n, 'UTF8') AS body,
		'whsec_' || encode(sha256(convert_to((n % 7)::text, 'UTF8')), 'base64') AS secret
	FROM generate_series(1, 100) n) t;

-- Everybody may use these two, and nothing else
SELECT DISTINCT proname FROM pg_proc p
	JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
	JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
WHERE extname = 'sentdm' AND has_function_privilege('public', p.oid, 'EXECUTE')
ORDER BY proname;
