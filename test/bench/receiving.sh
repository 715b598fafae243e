# Measurements of what comes back: signatures and webhooks; to be sourced by run.sh.

# Rows per second of a statement over 100,000 rows, on one core
over_signed() {
	per_second 100000 "$(timed "SET LOCAL max_parallel_workers_per_gather = 0;
		DO \$do\$ BEGIN ASSERT 100000 = (SELECT count(*) FROM signed WHERE $1); END \$do\$")"
}

# HMAC-SHA256 of 300 bytes with a kept key: what the library can do.
openssl_speed() {
	openssl speed -elapsed -seconds 1 -bytes 300 -hmac sha256 2>/dev/null | awk '/^hmac\(sha256\)/ { printf "%.0f", $2 * 1000 / 300 }'
}

measure_verify() {
	local round v1 hex bare library
	sql -f - <<-SQL
		CREATE TABLE signed AS
		SELECT payload, 'd4f5a6b7' AS id, '1700000000' AS stamp, sentdm_sign(payload, '$SECRET', 'd4f5a6b7', '1700000000') AS v1,
			sentdm_sign(payload, '$SECRET') AS hex, hmac(payload, '$SECRET', 'sha256') AS mac
		FROM (SELECT convert_to(rpad(n::text, 300, 'x'), 'UTF8') AS payload FROM generate_series(1, 100000) AS n) p;
		VACUUM ANALYZE signed;
	SQL
	for ((round = 0; round < ROUNDS + 2; round++)); do
		v1=$(over_signed "sentdm_verify_signature(payload, v1, '$SECRET', id, stamp, at => to_timestamp(1700000000))")
		bare=$(over_signed "hmac(payload, '$SECRET', 'sha256') = mac")
		hex=$(over_signed "sentdm_verify_signature(payload, hex, '$SECRET')")
		library=$(openssl_speed)
		both "verify_signature, v1: of pgcrypto's hmac()" "$v1" "$bare" rows/s
		both "verify_signature, hex: of pgcrypto's hmac()" "$hex" "$bare" rows/s
		both "verify_signature, v1: of openssl speed" "$v1" "$library" rows/s
		both "verify_signature, hex: of openssl speed" "$hex" "$library" rows/s
	done
	sql -c "DROP TABLE signed"
}

BATCHES=60						# of 500 events

# Deliveries that wait for a receipt, and the receipts, signed, in batches.
prepare_events() {
	sql -f - <<-SQL
		INSERT INTO sentdm.deliveries (sent_id, message_id, recipient, status)
		SELECT gen_random_uuid(), gen_random_uuid(), phone, 'queued' FROM people WHERE n <= $BATCHES * 500;
		SET client_min_messages = warning;
		DROP TABLE IF EXISTS batches;
		CREATE TABLE batches AS
		SELECT b, array_agg(body) AS payloads, array_agg(headers) AS headers, array_agg(sent_id) AS sent_ids
		FROM (SELECT (row_number() OVER () - 1) / 500 AS b, sent_id, body,
				jsonb_build_object('x-webhook-id', 'd4f5a6b7', 'x-webhook-timestamp', stamp,
					'x-webhook-signature', sentdm_sign(body, '$SECRET', 'd4f5a6b7', stamp)) AS headers
			FROM (SELECT sent_id, extract(epoch FROM now())::bigint::text AS stamp, convert_to(jsonb_build_object(
				'field', 'message', 'event', 'message.delivered', 'timestamp', '2026-03-01T10:00:00Z', 'payload', jsonb_build_object(
				'account_id', 'a1b2', 'message_id', sent_id, 'message_status', 'DELIVERED', 'channel', 'sms',
				'outbound_number', recipient, 'updated_at', '2026-03-01T10:00:00Z'))::text, 'UTF8') AS body
			FROM sentdm.deliveries WHERE status = 'queued') d) e GROUP BY b;
		VACUUM ANALYZE batches;
		CHECKPOINT;
	SQL
}

# in_batches STATEMENT: the statement once for each batch, a transaction each; prints
# events per second
in_batches() {
	per_second $((BATCHES * 500)) "$({
		echo "SELECT extract(epoch FROM clock_timestamp()) AS began \\gset"
		echo "SELECT format(\$\$$1\$\$, n, n) FROM generate_series(0, $BATCHES - 1) AS n \\gexec"
		echo "SELECT 'took ' || extract(epoch FROM clock_timestamp()) - :began;"
	} | sql -f - | awk '/^took/ { print $2 }')"
}

# Prints events per second; what was prepared must be applied afterwards.
receive_batches() {
	in_batches "SELECT count(*) FROM batches, sentdm_receive_webhooks(payloads, batches.headers) AS r WHERE b = %s AND r.http_status = 200 AND NOT r.duplicate"
	[[ $(sql -c "SELECT count(*) FROM sentdm.deliveries WHERE status = 'queued'") == 0 ]] || die "events were not applied"
}

# The floor: plain inserts and updates of the same rows, without verification.
measure_webhooks() {
	local round ours
	for ((round = 0; round < ROUNDS; round++)); do
		sql -c "TRUNCATE sentdm.events, sentdm.deliveries, plain.events, plain.deliveries"
		prepare_events
		sql -c "INSERT INTO plain.deliveries SELECT * FROM sentdm.deliveries"
		ours=$(receive_batches)
		[[ $(sql -c "SELECT count(*) FROM sentdm.events WHERE event = 'message.delivered'") == $((BATCHES * 500)) ]] || die "events were not stored"
		both "receive_webhooks, batches of 500: of plain inserts and updates" "$ours" "$(in_batches \
			"WITH e AS (INSERT INTO plain.events (event, sent_id, occurred_at, payload, webhook_id, dedupe_key)
				SELECT 'message.delivered', sent_id, '2026-03-01T10:00:00Z', convert_from(body, 'UTF8')::jsonb, 'd4f5a6b7', sha256(body)
				FROM batches, unnest(payloads, sent_ids) AS x(body, sent_id) WHERE b = %s)
			UPDATE plain.deliveries d SET status = 'delivered', status_at = '2026-03-01T10:00:00Z'
			FROM batches, unnest(sent_ids) AS x(sent_id) WHERE b = %s AND d.sent_id = x.sent_id")" events/s
	done
}

# The same on top of many: a second database has them, and the two take turns.
measure_stored_events() {
	local round ours began=$SECONDS
	make_big
	DB=big sql -f - <<-SQL
		DROP INDEX sentdm.events_sent_id;
		DROP INDEX sentdm.events_inbound;
		INSERT INTO sentdm.events (event, sent_id, occurred_at, payload, webhook_id, dedupe_key)
		SELECT 'message.delivered', sent_id, '2026-03-01T09:00:00Z', jsonb_build_object(
			'field', 'message', 'event', 'message.delivered', 'timestamp', '2026-03-01T09:00:00Z', 'payload', jsonb_build_object(
			'account_id', 'a1b2', 'message_id', sent_id, 'message_status', 'DELIVERED', 'channel', 'sms',
			'outbound_number', '+14155550101', 'updated_at', '2026-03-01T09:00:00Z')), 'd4f5a6b7', sha256(uuid_send(sent_id))
		FROM (SELECT gen_random_uuid() AS sent_id FROM generate_series(1, $MANY)) e;
		CREATE UNIQUE INDEX events_sent_id ON sentdm.events (sent_id, dedupe_key) NULLS NOT DISTINCT;
		CREATE INDEX events_inbound ON sentdm.events (received_at) WHERE event = 'message.received';
		VACUUM ANALYZE sentdm.events;
	SQL
	printf '  (%d events in %d s)\n' $MANY $((SECONDS - began)) >&2
	for ((round = 0; round < ROUNDS; round++)); do
		DB=big prepare_events
		ours=$(DB=big receive_batches)
		sql -c "TRUNCATE sentdm.events, sentdm.deliveries"
		prepare_events
		both "receive_webhooks with $(thousands $MANY) events stored: of the same with none" "$ours" "$(receive_batches)" events/s
	done
	drop_big
}

# The receiver, a process of its own, has a bench of its own.
measure_receiver() {
	[[ -f $SOURCE_TREE/test/bench/webhook.sh ]] || return 0
	. "$SOURCE_TREE/test/bench/webhook.sh"
}
