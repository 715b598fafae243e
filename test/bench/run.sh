#!/bin/bash
# Measures sentdm against what it could be at best, side by side on one machine.
#
#   bash test/bench/run.sh [--quick] [--json FILE] [NAME...]
#
# Builds the extension, starts a server of its own (PostgreSQL's default settings,
# fsync on) and a stand-in for Sent, runs each measurement three times or more in
# turn with its reference, prints one table, and removes everything.  Absolute
# figures drift with the machine: compare ratios.  NAME chooses measurements, by
# the names of the functions measure_NAME below.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"

PORT=54330						# the name of a socket only; there is no TCP
WAIT_S=60						# the longest that one step may take
SECRET=whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
ALL="drain latency50 thousand arrival idle hang enqueue_bulk enqueue_single verify webhooks"

ROUNDS=3 N=50000 SECONDS_EACH=8 PACES="1000000 100000 10000" JSON_FILE=
SCRATCH= SERVER_STARTED= SERVER_PID= URL=

# Starting and stopping

stop_everything() {
	local status=$?
	trap '' HUP INT TERM
	trap - EXIT
	[[ ! $SERVER_PID ]] || kill "$SERVER_PID" 2>/dev/null || true
	[[ ! $SERVER_STARTED ]] || as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -s -m immediate stop || true
	if ((status == 1)) && [[ -s $SCRATCH/server.log ]]; then
		tail -n 20 "$SCRATCH/server.log" >&2
	fi
	[[ ! $SCRATCH ]] || rm -rf "$SCRATCH"
	exit "$status"
}

build_programs() {
	local flags="-std=gnu11 -O2 -D_GNU_SOURCE" from=$SCRATCH/src/test/bench
	[[ $(stat -f -c %T "$SCRATCH") != tmpfs ]] || die "$SCRATCH is not on a disk: set TMPDIR"
	as_user gcc $flags "$from/server.c" -o "$SCRATCH/server.bin"
	as_user gcc $flags "$from/client.c" -o "$SCRATCH/client.bin" -lcurl
	as_user gcc $flags -I"$("$PG_CONFIG" --includedir)" "$from/sender.c" -o "$SCRATCH/sender.bin" -lpq
}

start_standin() {
	"${AS_USER[@]}" setsid "$SCRATCH/server.bin" </dev/null >"$SCRATCH/standin.port" 2>"$SCRATCH/standin.log" &
	SERVER_PID=$!
	wait_until 10 test -s "$SCRATCH/standin.port" || die "the stand-in for Sent did not start"
	URL=http://127.0.0.1:$(<"$SCRATCH/standin.port")
}

start_server() {
	as_user "$PG_BIN/initdb" -D "$SCRATCH/data" -U postgres -A trust -E UTF8 --no-sync >"$SCRATCH/initdb.log"
	as_user bash -c 'umask 077; echo sk_test_of_the_bench >"$HOME/sentdm.key"'
	as_user tee -a "$SCRATCH/data/postgresql.conf" >/dev/null <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$SCRATCH'
		port = $PORT
		shared_preload_libraries = 'sentdm'
		sentdm.base_url = '$URL'
		sentdm.allow_insecure_http = on
		sentdm.api_key_file = '$SCRATCH/sentdm.key'
		sentdm.rate_limit = 'off'
		sentdm.max_per_transaction = 10000000
	CONF
	SERVER_STARTED=yes
	as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -l "$SCRATCH/server.log" -s -w start
	sql -d postgres -c "CREATE DATABASE bench"
}

# The same tables without us, and what to fill them with.
prepare_database() {
	sql -f - <<-SQL
		CREATE EXTENSION pgcrypto;
		CREATE EXTENSION sentdm;
		SELECT sentdm_enable();
		SELECT sentdm_set_webhook_secret('$SECRET');
		CREATE SCHEMA plain;
		CREATE TABLE plain.messages (LIKE sentdm.messages INCLUDING ALL);
		CREATE TABLE plain.outbox (LIKE sentdm.outbox INCLUDING ALL) WITH (fillfactor = 60);
		CREATE TABLE plain.deliveries (LIKE sentdm.deliveries INCLUDING ALL) WITH (fillfactor = 85);
		CREATE TABLE plain.events (LIKE sentdm.events INCLUDING ALL);
		CREATE TABLE people AS
		SELECT n, '+1415' || 5550000 + n AS phone, jsonb_build_object('name', 'Ada', 'order_id', n::text) AS parameters
		FROM generate_series(1, 50000) AS n;
		VACUUM ANALYZE people;
	SQL
}

# Tools

sql() {
	as_user "$PG_BIN/psql" -X -q -A -t -h "$SCRATCH" -p $PORT -U postgres -d bench -v ON_ERROR_STOP=1 "$@"
}

# record NAME SIDE VALUE UNIT: one measurement of ours, of reference, or of only
# (for what has no reference)
record() {
	printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$SCRATCH/results"
	printf '  %-60s %-9s %14s %s\n' "$1" "$2" "$3" "$4" >&2
}

per_second() {
	awk -v n="$1" -v s="$2" 'BEGIN { printf "%.1f", n / s }'
}

standin() {
	curl -s --noproxy '*' -X POST "$URL/reset?latency_us=${1:-0}&hang=${2:-0}"
}

configure() {
	local setting
	for setting in "$@"; do
		sql -c "ALTER SYSTEM SET $setting"
	done
	sql -c "SELECT pg_reload_conf()" >/dev/null
	sleep 0.3
}

worker_pid() {
	sql -c "SELECT pid FROM sentdm.worker_report()"
}

# Clock ticks spent so far by the worker, and by the server's other processes
# that serve no client.
ticks() {
	local worker=$1 pid kind
	for pid in $(pgrep -P "$(head -n 1 "$SCRATCH/data/postmaster.pid")"); do
		kind=$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) || continue
		[[ $kind != *"[local]"* ]] || continue
		awk -v who="$([[ $pid == "$worker" ]] && echo worker || echo other)" \
			'{ sub(/.*\) /, ""); print who, $12 + $13 }' "/proc/$pid/stat" 2>/dev/null || true
	done | awk '{ sum[$1] += $2 } END { print sum["worker"] + 0, sum["other"] + 0 }'
}

empty_tables() {
	sql -c "TRUNCATE sentdm.messages, sentdm.outbox, sentdm.deliveries, sentdm.events" -c "CHECKPOINT"
}

# fill COUNT [RECIPIENTS]: queue so many requests, held
fill() {
	local count=$1 recipients=${2:-1}
	sql -c "SELECT sentdm_pause('bench')" >/dev/null
	empty_tables
	if ((recipients == 1)); then
		sql -c "SELECT count(sentdm_send(phone, 'order_confirmation', parameters))
			FROM people, generate_series(1, ($count + 49999) / 50000) AS g WHERE n <= $count" >/dev/null
	else
		sql -c "SELECT count(*)
			FROM (SELECT array_agg(phone) AS phones FROM people WHERE n <= $recipients) p, generate_series(1, $count) AS g,
				LATERAL sentdm_send(phones, 'order_confirmation', tag => 'request ' || g)" >/dev/null
	fi
	sql -c "CHECKPOINT"
}

# Let go what was queued; prints how many seconds it took until all was stored.
drain() {
	sql -f - <<-SQL
		SELECT extract(epoch FROM clock_timestamp()) AS began,
			(SELECT count(*) FROM sentdm.outbox) + (SELECT value FROM sentdm.counters() WHERE name = 'accepted') AS goal \gset
		SET bench.goal = :goal;
		SELECT sentdm_resume() AS resumed \gset
		DO \$\$
		BEGIN
			WHILE (SELECT value FROM sentdm.counters() WHERE name = 'accepted') < current_setting('bench.goal')::bigint LOOP
				IF clock_timestamp() > statement_timestamp() + interval '$WAIT_S seconds' THEN
					RAISE EXCEPTION 'the queue does not drain';
				END IF;
				COMMIT;
				PERFORM pg_sleep(0.01);
				COMMIT;
			END LOOP;
			WHILE EXISTS (SELECT FROM sentdm.outbox) LOOP
				COMMIT;
				PERFORM pg_sleep(0.005);
				COMMIT;
			END LOOP;
		END \$\$;
		SELECT extract(epoch FROM clock_timestamp()) - :began;
	SQL
}

# bare IN_FLIGHT: the same bytes by the bare client; prints its seconds
bare() {
	sql -c "COPY (SELECT 'sentdm-' || id || '-1', request::text FROM sentdm.messages ORDER BY id) TO STDOUT" >"$SCRATCH/requests"
	as_user "$SCRATCH/client.bin" "$URL/v3/messages" "$1" <"$SCRATCH/requests" |
		python3 -c 'import json, sys; print(json.load(sys.stdin)["seconds"])'
}

# Measurements

memory_of() {
	awk '/^RssAnon/ { printf "%.1f", $2 / 1024 }' "/proc/$1/status"
}

note_cost() {
	local -a before=($1) after=($2)
	local hz
	hz=$(getconf CLK_TCK)
	record "CPU s per 10,000 messages, worker" only \
		"$(awk -v t=$((after[0] - before[0])) -v n=$N -v hz="$hz" 'BEGIN { printf "%.3f", t / hz / n * 10000 }')" s
	record "CPU s per 10,000 messages, worker and database" only \
		"$(awk -v t=$((after[0] - before[0] + after[1] - before[1])) -v n=$N -v hz="$hz" 'BEGIN { printf "%.3f", t / hz / n * 10000 }')" s
}

measure_drain() {
	local worker before after
	configure "sentdm.max_in_flight = 64"
	standin
	fill 1000 && drain >/dev/null
	for ((round = 0; round < ROUNDS; round++)); do
		fill $N
		standin
		worker=$(worker_pid)
		before=$(ticks "$worker")
		record "drain, 1 recipient a request" ours "$(per_second $N "$(drain)")" messages/s
		after=$(ticks "$worker")
		record "drain, 1 recipient a request" reference "$(per_second $N "$(bare 64)")" messages/s
		note_cost "$before" "$after"
		record "memory of the worker after the drain" only "$(memory_of "$worker")" MB
	done
}

measure_latency50() {
	local n
	for in_flight in 64 256 1024; do
		n=$((in_flight * 20 * SECONDS_EACH / 2))
		((n <= N)) || n=$N
		configure "sentdm.max_in_flight = $in_flight"
		for ((round = 0; round < ROUNDS; round++)); do
			standin 50000
			fill $((in_flight * 4)) && drain >/dev/null
			fill $n
			rate=$(per_second $n "$(drain)")
			record "drain, 50 ms latency, $in_flight in flight" ours "$rate" messages/s
			record "drain, 50 ms latency, $in_flight in flight" reference "$(per_second $n "$(bare "$in_flight")")" messages/s
			record "  of in-flight / latency, $in_flight in flight" ours "$rate" messages/s
			record "  of in-flight / latency, $in_flight in flight" reference $((in_flight * 20)) messages/s
		done
	done
	configure "sentdm.max_in_flight = 64"
}

measure_thousand() {
	local n=$((N / 1000))
	standin
	for ((round = 0; round < ROUNDS; round++)); do
		fill $n 1000
		record "drain, 1,000 recipients a request" ours "$(per_second $((n * 1000)) "$(drain)")" deliveries/s
		[[ $(sql -c "SELECT count(*) FROM sentdm.deliveries") == $((n * 1000)) ]] || die "not all deliveries were stored"
		record "drain, 1,000 recipients a request" reference "$(per_second $((n * 1000)) "$(bare 64)")" deliveries/s
		record "memory of the worker, 1,000 recipients" only "$(memory_of "$(worker_pid)")" MB
	done
}

# send_and_time NAME COUNT INTERVAL_US: commit confirmed until arrived
send_and_time() {
	local name=$1
	as_user "$SCRATCH/sender.bin" "host=$SCRATCH port=$PORT user=postgres dbname=bench" "$2" "$3" >"$SCRATCH/sent"
	sleep 0.2
	curl -s --noproxy '*' "$URL/arrivals" >"$SCRATCH/arrivals"
	python3 "$SCRATCH/src/test/bench/report.py" latency "$SCRATCH/sent" "$SCRATCH/arrivals" >"$SCRATCH/times"
	read -r p50 p99 commit50 commit99 <"$SCRATCH/times"
	record "commit to arrival, $name: median" ours "$p50" ms
	record "commit to arrival, $name: median" reference "$commit50" ms
	record "commit to arrival, $name: p99" ours "$p99" ms
	record "commit to arrival, $name: p99" reference "$commit99" ms
}

measure_arrival() {
	sql -c "SELECT sentdm_resume()" >/dev/null
	for ((round = 0; round < ROUNDS; round++)); do
		for pace in $PACES; do
			empty_tables
			standin
			send_and_time "one per $((pace / 1000)) ms" $((3000000 / pace + 5)) "$pace"
		done
	done
}

# The worker has left the database; the launcher starts another one.
measure_idle() {
	configure "sentdm.idle_timeout = '50ms'"
	sql -c "SELECT sentdm_resume()" >/dev/null
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		standin
		sleep 1
		send_and_time "worker had left" 1 0
	done
	configure "sentdm.idle_timeout = '60s'"
}

# A thousand requests hang; others must not notice.
measure_hang() {
	configure "sentdm.max_in_flight = 2048"
	for ((round = 0; round < ROUNDS; round++)); do
		standin 20000
		fill 4000 && drain >/dev/null
		standin 0 1000
		sql -c "SELECT count(sentdm_send(phone, 'order_confirmation')) FROM people WHERE n <= 1000" >/dev/null
		sleep 3
		printf '  (%s)\n' "$(curl -s --noproxy '*' "$URL/count")" >&2
		send_and_time "1,000 requests hang" 20 50000
		sql -c "SELECT sentdm_pause()" >/dev/null
		empty_tables
		restart_worker
	done
	configure "sentdm.max_in_flight = 64"
	sql -c "SELECT sentdm_resume()" >/dev/null
}

restart_worker() {
	local pid
	pid=$(worker_pid)
	[[ ! $pid || $pid == 0 ]] || sql -c "SELECT pg_terminate_backend($pid)" >/dev/null
	sleep 4
}

timed() {
	{
		echo "SELECT extract(epoch FROM clock_timestamp()) AS began \\gset"
		echo "BEGIN; $1; COMMIT;"
		echo "SELECT 'took ' || extract(epoch FROM clock_timestamp()) - :began;"
	} | sql -f - | awk '/^took/ { print $2 }'
}

measure_enqueue_bulk() {
	local n=50000
	sql -c "SELECT sentdm_pause('bench')" >/dev/null
	empty_tables
	sql -c "SELECT count(sentdm_send(phone, 'order_confirmation', parameters)) FROM people" >/dev/null
	sql -c "CREATE TABLE saved_messages AS SELECT * FROM sentdm.messages" -c "CREATE TABLE saved_outbox AS SELECT * FROM sentdm.outbox" \
		-c "VACUUM ANALYZE saved_messages" -c "VACUUM ANALYZE saved_outbox"
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		record "enqueue 50,000 in one statement" ours "$(per_second $n "$(timed \
			"SELECT count(sentdm_send(phone, 'order_confirmation', parameters)) FROM people")")" rows/s
		sql -c "TRUNCATE plain.messages, plain.outbox" -c "CHECKPOINT"
		record "enqueue 50,000 in one statement" reference "$(per_second $n "$(timed \
			"INSERT INTO plain.messages SELECT * FROM saved_messages; INSERT INTO plain.outbox SELECT * FROM saved_outbox")")" rows/s
	done
	sql -c "DROP TABLE saved_messages, saved_outbox"
}

# transactions CLIENTS SECONDS < script
transactions() {
	as_user tee "$SCRATCH/script.sql" >/dev/null
	as_user "$PG_BIN/pgbench" -n -M prepared -c "$1" -j 1 -T "$2" -f "$SCRATCH/script.sql" \
		-h "$SCRATCH" -p $PORT -U postgres bench 2>/dev/null | awk '/^tps/ { printf "%.0f", $3 }'
}

single_send() {
	transactions 8 $((SECONDS_EACH / 2)) <<-'SQL'
		SELECT sentdm_send('+14155550101', 'order_confirmation', '{"name": "Ada", "order_id": "1001"}');
	SQL
}

plain_inserts() {
	transactions 8 $((SECONDS_EACH / 2)) <<-'SQL'
		WITH m AS (INSERT INTO plain.messages (id, request, priority, created_by)
			VALUES ((to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint + (7::bigint << 44)) || right(md5(random()::text), 20))::uuid, '{"to": ["+14155550101"], "template": {"name": "order_confirmation", "parameters": {"name": "Ada", "order_id": "1001"}}}', 'normal', 'postgres') RETURNING id)
		INSERT INTO plain.outbox (message_id, priority, due_at, sandbox) SELECT id, 'normal', now(), false FROM m;
	SQL
}

measure_enqueue_single() {
	sql -c "SELECT sentdm_pause('bench')" >/dev/null
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		record "enqueue, 8 clients, single sends" ours "$(single_send)" tps
		sql -c "TRUNCATE plain.messages, plain.outbox" -c "CHECKPOINT"
		record "enqueue, 8 clients, single sends" reference "$(plain_inserts)" tps
	done
}

measure_verify() {
	sql -f - <<-SQL
		CREATE TABLE signed AS
		SELECT payload, 'd4f5a6b7' AS id, '1700000000' AS stamp, sentdm_sign(payload, '$SECRET', 'd4f5a6b7', '1700000000') AS v1,
			sentdm_sign(payload, '$SECRET') AS hex, hmac(payload, '$SECRET', 'sha256') AS mac
		FROM (SELECT convert_to(rpad(n::text, 300, 'x'), 'UTF8') AS payload FROM generate_series(1, 100000) AS n) p;
		VACUUM ANALYZE signed;
	SQL
	for ((round = 0; round < ROUNDS; round++)); do
		record "verify_signature, v1" ours "$(per_second 100000 "$(timed "SET LOCAL max_parallel_workers_per_gather = 0;
			SELECT count(*) FROM signed WHERE sentdm_verify_signature(payload, v1, '$SECRET', id, stamp, at => to_timestamp(1700000000))")")" rows/s
		record "verify_signature, hex" ours "$(per_second 100000 "$(timed "SET LOCAL max_parallel_workers_per_gather = 0;
			SELECT count(*) FROM signed WHERE sentdm_verify_signature(payload, hex, '$SECRET')")")" rows/s
		rate=$(per_second 100000 "$(timed "SET LOCAL max_parallel_workers_per_gather = 0;
			SELECT count(*) FROM signed WHERE hmac(payload, '$SECRET', 'sha256') = mac")")
		record "verify_signature, v1" reference "$rate" rows/s
		record "verify_signature, hex" reference "$rate" rows/s
	done
	sql -c "DROP TABLE signed"
}

prepare_events() {
	sql -f - <<-SQL
		TRUNCATE sentdm.events, sentdm.deliveries, plain.events, plain.deliveries;
		INSERT INTO sentdm.deliveries (sent_id, message_id, recipient, status)
		SELECT gen_random_uuid(), gen_random_uuid(), phone, 'queued' FROM people WHERE n <= $1;
		INSERT INTO plain.deliveries SELECT * FROM sentdm.deliveries;
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
			FROM sentdm.deliveries) d) e GROUP BY b;
		VACUUM ANALYZE batches;
		CHECKPOINT;
	SQL
}

# in_batches COUNT STATEMENT: the statement once for each batch; prints seconds
in_batches() {
	{
		echo "SELECT extract(epoch FROM clock_timestamp()) AS began \\gset"
		echo "SELECT format(\$\$$2\$\$, n, n) FROM generate_series(0, $1 - 1) AS n \\gexec"
		echo "SELECT 'took ' || extract(epoch FROM clock_timestamp()) - :began;"
	} | sql -f - | awk '/^took/ { print $2 }'
}

measure_webhooks() {
	local n=$((N / 500 < 60 ? N / 500 : 60))
	for ((round = 0; round < ROUNDS; round++)); do
		prepare_events $((n * 500))
		record "receive_webhooks, batches of 500" ours "$(per_second $((n * 500)) "$(in_batches $n \
			"SELECT count(*) FROM batches, sentdm_receive_webhooks(payloads, batches.headers) WHERE b = %s")")" events/s
		[[ $(sql -c "SELECT count(*) = $((n * 500)) FROM sentdm.deliveries WHERE status = 'delivered'") == t ]] || die "events were not applied"
		record "receive_webhooks, batches of 500" reference "$(per_second $((n * 500)) "$(in_batches $n \
			"WITH e AS (INSERT INTO plain.events (event, sent_id, occurred_at, payload, webhook_id, dedupe_key)
				SELECT 'message.delivered', sent_id, '2026-03-01T10:00:00Z', convert_from(body, 'UTF8')::jsonb, 'd4f5a6b7', sha256(body)
				FROM batches, unnest(payloads, sent_ids) AS x(body, sent_id) WHERE b = %s)
			UPDATE plain.deliveries d SET status = 'delivered', status_at = '2026-03-01T10:00:00Z'
			FROM batches, unnest(sent_ids) AS x(sent_id) WHERE b = %s AND d.sent_id = x.sent_id")")" events/s
	done
}

report() {
	python3 "$SCRATCH/src/test/bench/report.py" table "$SCRATCH/results" ${JSON_FILE:+"$JSON_FILE"} \
		"$(as_user "$PG_BIN/postgres" --version), libcurl $(curl-config --version | cut -d' ' -f2), $(openssl version | cut -d' ' -f1,2)" \
		"$(stat -f -c %T "$SCRATCH")" "$LOAD_BEFORE"
}

main() {
	local name names=()
	while (($#)); do
		case $1 in
			--quick) N=10000 SECONDS_EACH=4 PACES="100000 10000" ;;
			--json) JSON_FILE=$2 && shift ;;
			-*) die "usage: $0 [--quick] [--json FILE] [NAME...]" ;;
			*) names+=("$1") ;;
		esac
		shift
	done
	((${#names[@]})) || names=($ALL)
	for name in "${names[@]}"; do
		[[ " $ALL " == *" $name "* ]] || die "unknown measurement $name; there are: $ALL"
	done
	trap stop_everything EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM

	LOAD_BEFORE=$(cut -d' ' -f1 /proc/loadavg)
	install_missing libpq-dev curl procps openssl
	find_pg_config
	choose_user
	make_scratch sentdm-bench
	build_private_server
	build_programs
	start_standin
	start_server
	prepare_database
	for name in "${names[@]}"; do
		printf '%s\n' "$name" >&2
		"measure_$name"
	done
	report
}

main "$@"
