# Measurements of the worker: from the queue to what is stored; to be sourced by run.sh.

# The stand-in must never be the bottleneck: what it takes from a client that does
# nothing but post.
measure_standin() {
	local round
	as_user tee "$SCRATCH/post.lua" >/dev/null <<-'LUA'
		wrk.method = "POST"
		wrk.body = '{"to": ["+14155550101"], "template": {"name": "order_confirmation", "parameters": {"name": "Ada", "order_id": "1001"}}}'
		wrk.headers["Content-Type"] = "application/json"
		wrk.headers["Idempotency-Key"] = "sentdm-0199e0a8-5c60-7b5e-9d0c-3f6f0c2f4a11-1"
	LUA
	for ((round = 0; round < ROUNDS; round++)); do
		standin
		record "the stand-in alone: requests it takes" only "$(as_user wrk -t 1 -c 32 -d 2 -s "$SCRATCH/post.lua" "$URL/v3/messages" |
			awk '/^Requests\/sec/ { print $2 } /Non-2xx/ { exit 1 }')" requests/s
	done
}

# measured_drain NAME: a drain of N, checked; leaves rate, cpu_worker and cpu_all
# (seconds per 10,000) in variables
measured_drain() {
	local worker before before_worker
	fill $N
	standin
	worker=$(worker_pid)
	before=$(cpu_of_server) before_worker=$(cpu_of "$worker")
	rate=$(per_second $N "$(drain)")
	[[ $(worker_pid) == "$worker" ]] || die "the worker was replaced"
	cpu_worker=$(calculate "($(cpu_of "$worker") - $before_worker) / $N * 10000")
	cpu_all=$(calculate "($(cpu_of_server) - $before) / $N * 10000")
	expect_stored $N $N
}

warm_up() {
	fill 2000
	standin "${1:-0}"
	drain >/dev/null
}

measure_drain() {
	local round rate cpu_worker cpu_all standin_cpu
	warm_up
	for ((round = 0; round < ROUNDS; round++)); do
		measured_drain
		standin
		standin_cpu=$(arrived cpu_us)
		bare 64 >"$SCRATCH/bare"
		standin_cpu=$(calculate "($(arrived cpu_us) - $standin_cpu) / $N" 1)
		both "drain, 1 recipient a request: of bare libcurl" "$rate" "$(per_second $N "$(field seconds <"$SCRATCH/bare")")" messages/s
		record "CPU per 10,000 messages: worker and database" only "$cpu_all" s
		both "CPU per 10,000 messages: worker alone, of bare libcurl" "$cpu_worker" \
			"$(calculate "$(field cpu_s <"$SCRATCH/bare") / $N * 10000")" s
		record "memory of the worker after a drain" only "$(memory_of "$(worker_pid)")" MB
		record "the stand-in's CPU per request of bare libcurl" only "$standin_cpu" us
	done
}

# The Node workers, as they stay: node/ says what each is

node_version() {
	[[ ! -f $SCRATCH/node/tuned.mjs ]] || printf ', Node %s with %s' "$(node --version)" \
		"$(npm ls --prefix "$SCRATCH/node" --depth=0 2>/dev/null | sed -n 's/^[^ ]* \(.*@[0-9.]*\)$/\1/p' | paste -s -d' ')"
}

# undici 6 also runs on the Node of Debian 12; 7 is no faster.
install_node_workers() {
	fetch_node_modules @sentdm/sentdm@0.32.0 undici@6.21.3 pg@8.23.1 || die "cannot fetch the npm packages of the Node workers"
	cp "$SOURCE_TREE"/test/bench/node/*.mjs "$SCRATCH/node"
	sql -f - <<-SQL
		CREATE SCHEMA node;
		CREATE TABLE node.messages (
			id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
			recipient text NOT NULL,
			template text NOT NULL,
			parameters jsonb NOT NULL,
			state text NOT NULL DEFAULT 'queued',
			sent_id uuid,
			error text,
			created_at timestamptz NOT NULL DEFAULT now(),
			finished_at timestamptz
		);
		CREATE INDEX messages_queued ON node.messages (id) WHERE state = 'queued';
	SQL
}

# start_node_worker NAME [ARGUMENT]: it reads from a pipe, and writes to another
start_node_worker() {
	local pipe=$SCRATCH/$1${2:+.$2}
	as_user mkfifo "$pipe.in" "$pipe.out"
	"${AS_USER[@]}" "PGHOST=$SCRATCH" PGPORT=$PORT PGUSER=postgres PGDATABASE="$DB" node "$SCRATCH/node/$1.mjs" "$URL" ${2:-} \
		<>"$pipe.in" 1<>"$pipe.out" 2>"$pipe.log" &
	CHILDREN+=($!)
}

# node_drain NAME COUNT: prints the worker's line of JSON
node_drain() {
	sql -c "TRUNCATE node.messages" -c "INSERT INTO node.messages (recipient, template, parameters)
		SELECT phone, 'order_confirmation', parameters FROM people WHERE n <= $2" -c "VACUUM ANALYZE node.messages" -c "CHECKPOINT"
	standin
	echo go >"$SCRATCH/$1.in"
	timeout $WAIT_S head -n 1 <"$SCRATCH/$1.out"
	[[ $(sql -c "SELECT count(DISTINCT sent_id) FROM node.messages WHERE state = 'accepted'") == "$2" && $(arrived) == "$2" ]] ||
		die "the Node worker $1 did not send all"
}

measure_node() {
	local round rate cpu_worker cpu_all name cpu slow=$((N / 5))
	local -A title=([tuned]="the tuned Node worker" [sdk]="the SDK's Node worker") count=([tuned]=$N [sdk]=$slow)
	warm_up
	[[ -f $SCRATCH/node/tuned.mjs ]] || install_node_workers
	for name in tuned sdk; do
		start_node_worker $name
		node_drain $name 2000 >/dev/null
	done
	for ((round = 0; round < ROUNDS; round++)); do
		measured_drain
		for name in tuned sdk; do
			cpu=$(cpu_of_server)
			node_drain $name "${count[$name]}" >"$SCRATCH/node.result"
			cpu=$(calculate "($(cpu_of_server) - $cpu + $(field cpu_s <"$SCRATCH/node.result")) / ${count[$name]} * 10000")
			both "drain, 1 recipient a request: of ${title[$name]}" "$rate" \
				"$(per_second "${count[$name]}" "$(field seconds <"$SCRATCH/node.result")")" messages/s
			both "CPU per 10,000 messages, database included: of ${title[$name]}" "$cpu_all" "$cpu" s
		done
	done
}

# paced NAME IN_FLIGHT SECONDS [URL CA_FILE]: a drain with 50 ms latency, and what
# bare libcurl makes of it
paced() {
	local n=$(($2 * 20 * $3)) rate
	fill $n
	standin 50000
	rate=$(per_second $n "$(drain)")
	expect_stored $n $n
	record "$1: of in-flight / latency" ours "$rate" messages/s
	record "$1: of in-flight / latency" reference $(($2 * 20)) messages/s
	both "$1: of bare libcurl" "$rate" "$(per_second $n "$(bare "$2" ${4:-} ${5:-} | field seconds)")" messages/s
}

measure_latency50() {
	local in_flight round
	for in_flight in $IN_FLIGHT; do
		configure "sentdm.max_in_flight = $in_flight"
		warm_up 50000
		for ((round = 0; round < ROUNDS; round++)); do
			paced "50 ms latency, $in_flight in flight" "$in_flight" $((SECONDS_EACH / 2))
			record "memory of the worker, $in_flight in flight" only "$(memory_of "$(worker_pid)")" MB
		done
	done
	configure "sentdm.max_in_flight = 64"
}

# TLS and HTTP/2 by nginx, in front of the same stand-in.  Its log says what was spoken.

start_tls() {
	local port
	as_user openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench -addext subjectAltName=IP:127.0.0.1 \
		-keyout "$SCRATCH/tls.key" -out "$SCRATCH/tls.crt" 2>/dev/null
	port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
	as_user tee "$SCRATCH/nginx.conf" >/dev/null <<-CONF
		daemon off;
		pid $SCRATCH/nginx.pid;
		worker_processes 1;
		worker_rlimit_nofile 8192;
		error_log $SCRATCH/nginx.error;
		events { worker_connections 4096; }
		http {
			log_format spoken '\$server_protocol \$connection \$status';
			access_log $SCRATCH/nginx.spoken spoken buffer=64k flush=100ms;
			client_body_temp_path $SCRATCH/nginx.body;
			proxy_temp_path $SCRATCH/nginx.proxy;
			fastcgi_temp_path $SCRATCH/nginx.fastcgi;
			uwsgi_temp_path $SCRATCH/nginx.uwsgi;
			scgi_temp_path $SCRATCH/nginx.scgi;
			upstream standin { server ${URL#http://}; keepalive 2048; keepalive_requests 100000000; }
			server {
				listen 127.0.0.1:$port ssl http2 backlog=4096;
				ssl_certificate $SCRATCH/tls.crt;
				ssl_certificate_key $SCRATCH/tls.key;
				keepalive_requests 100000000;
				location / { proxy_pass http://standin; proxy_http_version 1.1; proxy_set_header Connection ""; }
			}
		}
	CONF
	"${AS_USER[@]}" "$(PATH=$PATH:/usr/sbin command -v nginx)" -p "$SCRATCH" -c "$SCRATCH/nginx.conf" -e "$SCRATCH/nginx.error" </dev/null &
	CHILDREN+=($!)
	TLS_URL=https://127.0.0.1:$port
	wait_until 10 curl -s -o /dev/null --noproxy '*' --cacert "$SCRATCH/tls.crt" "$TLS_URL/count" || die "nginx did not start"
}

forget_spoken() {
	sleep 0.3					# until the log is written
	: >"$SCRATCH/nginx.spoken"
}

# expect_http2 COUNT: so many requests, all of them over HTTP/2; prints on how many connections
expect_http2() {
	sleep 0.3
	awk -v count="$1" '$1 == "HTTP/2.0" && $3 == 202 { spoken++; if (!seen[$2]++) connections++ }
		END { if (spoken != count) exit 1; print connections }' "$SCRATCH/nginx.spoken" || die "not all of $1 requests were made over HTTP/2"
}

measure_tls() {
	local round rate n=$((N / 2)) ours
	start_tls
	configure "sentdm.base_url = '$TLS_URL'" "sentdm.ca_file = '$SCRATCH/tls.crt'"
	warm_up
	for ((round = 0; round < ROUNDS; round++)); do
		fill $n
		standin
		forget_spoken
		rate=$(per_second $n "$(drain)")
		expect_stored $n $n
		record "TLS and HTTP/2: connections used, 64 in flight" ours "$(expect_http2 $n)" connections
		forget_spoken
		both "TLS and HTTP/2, 1 recipient a request: of bare libcurl" "$rate" \
			"$(per_second $n "$(bare 64 "$TLS_URL" "$SCRATCH/tls.crt" | field seconds)")" messages/s
		record "TLS and HTTP/2: connections used, 64 in flight" reference "$(expect_http2 $n)" connections
	done
	configure "sentdm.max_in_flight = 1024"
	warm_up 50000
	for ((round = 0; round < ROUNDS; round++)); do
		n=$((1024 * 20))
		fill $n
		standin 50000
		forget_spoken
		rate=$(per_second $n "$(drain)")
		expect_stored $n $n
		record "TLS and HTTP/2: connections used, 1024 in flight" ours "$(expect_http2 $n)" connections
		record "memory of the worker, 1024 in flight over TLS" only "$(memory_of "$(worker_pid)")" MB
		forget_spoken
		both "TLS and HTTP/2, 50 ms latency, 1024 in flight: of bare libcurl" "$rate" \
			"$(per_second $n "$(bare 1024 "$TLS_URL" "$SCRATCH/tls.crt" | field seconds)")" messages/s
		record "TLS and HTTP/2: connections used, 1024 in flight" reference "$(expect_http2 $n)" connections
	done
	configure "sentdm.max_in_flight = 64" "sentdm.base_url = '$URL'" "sentdm.ca_file = ''"
}

measure_thousand() {
	local round rate n=$((N / 500))
	fill 10 1000
	standin
	drain >/dev/null
	for ((round = 0; round < ROUNDS; round++)); do
		fill $n 1000
		standin
		rate=$(per_second $((n * 1000)) "$(drain)")
		expect_stored $n $((n * 1000))
		both "drain, 1,000 recipients a request: of bare libcurl, which stores nothing" "$rate" \
			"$(per_second $((n * 1000)) "$(bare 64 | field seconds)")" deliveries/s
		record "memory of the worker, 1,000 recipients a request" only "$(memory_of "$(worker_pid)")" MB
	done
}

# The largest answers there are: 1,000 recipients on four channels, 64 at once.
measure_memory() {
	local round watcher
	for ((round = 0; round < ROUNDS; round++)); do
		fill 100 1000 '{sms,whatsapp,rcs,mms}'
		standin
		watch_memory "$(worker_pid)" &
		watcher=$!
		drain >/dev/null
		expect_stored 100 400000
		kill $watcher
		wait $watcher 2>/dev/null || true
		record "memory of the worker, 1,000 recipients on 4 channels, peak" only "$(<"$SCRATCH/peak")" MB
	done
}

# watch_memory PID: keeps its peak in a file, until killed
watch_memory() {
	local now peak=0
	while now=$(memory_of "$1"); do
		if [[ $(calculate "$now > $peak" 0) == 1 ]]; then
			peak=$now
			echo "$peak" >"$SCRATCH/peak"
		fi
		sleep 0.02
	done
}

# What waits or was sent already must not matter.  A second database carries it, and
# the two are measured in turn.

make_big() {
	make_database big
	DB=big hold
}

drop_big() {
	DB=big sql -c "SELECT sentdm_disable()" >/dev/null
	DB=postgres sql -c "DROP DATABASE big WITH (FORCE)"
}

# small_drain: the same number of messages, alone, in the first database
small_drain() {
	fill $DRAINED
	standin
	per_second $DRAINED "$(drain)"
}

measure_backlog() {
	local round rate
	warm_up
	make_big
	DB=big insert_messages $QUEUED queued 'now()'
	DB=big sql -c "VACUUM ANALYZE sentdm.messages, sentdm.outbox"
	for ((round = 0; round < ROUNDS + 4; round++)); do
		standin
		rate=$(per_second $DRAINED "$(DB=big drain $DRAINED)")
		DB=big hold
		record "memory of the worker, $(thousands $QUEUED) queued" only "$(memory_of "$(DB=big worker_pid)")" MB
		both "drain with $(thousands $QUEUED) queued: of the drain with $(thousands $DRAINED)" "$rate" "$(small_drain)" messages/s
	done
	drain_all_of_big
	drop_big
}

# The rest of the million, with an eye on the worker's memory.
drain_all_of_big() {
	local worker peak=0 first now
	DB=big release
	wait_until 20 big_is_busy
	worker=$(DB=big worker_pid)
	sleep 2
	first=$(memory_of "$worker")
	while [[ $(DB=big sql -c "SELECT EXISTS (SELECT FROM sentdm.outbox)") == t ]]; do
		now=$(memory_of "$worker")
		peak=$(calculate "($now > $peak) ? $now : $peak" 1)
		sleep 1
	done
	[[ $(DB=big worker_pid) == "$worker" ]] || die "the worker was replaced"
	[[ $(DB=big sql -c "SELECT count(*) FROM sentdm.messages WHERE state = 'accepted'") == $QUEUED ]] || die "not all of the million was accepted"
	[[ $(DB=big sql -c "SELECT count(DISTINCT sent_id) FROM sentdm.deliveries") == $QUEUED ]] || die "not all of the million was stored"
	both "memory of the worker over $(thousands $QUEUED) messages: peak, of that after 2 s" "$peak" "$first" MB
}

big_is_busy() {
	[[ $(DB=big sql -c "SELECT in_flight > 0 FROM sentdm.worker_report()") == t ]]
}

# plain_inserts: what the deliveries of as many messages cost by themselves, right
# after a checkpoint; they are rolled back
plain_inserts() {
	sql -f - <<-SQL
		CHECKPOINT;
		BEGIN;
		CREATE TEMP TABLE ready ON COMMIT DROP AS
		SELECT gen_random_uuid() AS sent_id, id, request -> 'to' ->> 0 AS phone
		FROM sentdm.messages ORDER BY created_at DESC LIMIT $DRAINED;
		SELECT extract(epoch FROM clock_timestamp()) AS began \\gset
		INSERT INTO sentdm.deliveries (sent_id, message_id, recipient, status)
		SELECT sent_id, id, phone, 'accepted' FROM ready;
		SELECT $DRAINED / (extract(epoch FROM clock_timestamp()) - :began);
		ROLLBACK;
	SQL
}

measure_history() {
	local round rate began=$SECONDS
	warm_up
	make_big
	DB=big insert_messages $MANY accepted 'now()'
	DB=big sql -f - <<-SQL
		DROP INDEX sentdm.deliveries_message_id;
		ALTER TABLE sentdm.deliveries DROP CONSTRAINT deliveries_sent_id_key;
		INSERT INTO sentdm.deliveries (sent_id, message_id, recipient, status)
		SELECT gen_random_uuid(), id, request -> 'to' ->> 0, 'delivered' FROM sentdm.messages;
		ALTER TABLE sentdm.deliveries ADD CONSTRAINT deliveries_sent_id_key UNIQUE (sent_id);
		CREATE INDEX deliveries_message_id ON sentdm.deliveries (message_id);
		VACUUM ANALYZE sentdm.messages;
		VACUUM ANALYZE sentdm.deliveries;
		CHECKPOINT;
	SQL
	printf '  (%d rows of history in %d s)\n' $MANY $((SECONDS - began)) >&2
	for ((round = 0; round < ROUNDS + 2; round++)); do
		DB=big hold
		DB=big sql -c "SELECT count(sentdm_send(phone, 'order_confirmation', parameters)) FROM people WHERE n <= $DRAINED" >/dev/null
		DB=big sql -c "CHECKPOINT"
		standin
		rate=$(per_second $DRAINED "$(DB=big drain)")
		[[ $(DB=big sql -c "SELECT count(*) FROM sentdm.messages WHERE state = 'accepted'") == $((MANY + DRAINED * (round + 1))) ]] || die "not all was accepted"
		both "drain with a history of $(thousands $MANY): of the drain without" "$rate" "$(small_drain)" messages/s
		both "plain inserts of deliveries beside that history: of those without" "$(DB=big plain_inserts)" "$(plain_inserts)" rows/s
	done
	drop_big
}

# A queue that is kept between 10,000 and 20,000, without ever scanning it.
feed() {
	sql -f - <<-SQL >/dev/null
		CREATE TABLE feeding (enough boolean);
		DO \$\$
		DECLARE
			sent bigint := (SELECT value FROM sentdm.counters() WHERE name = 'accepted');
		BEGIN
			WHILE NOT EXISTS (SELECT FROM feeding) LOOP
				IF sent - (SELECT value FROM sentdm.counters() WHERE name = 'accepted') < 15000 THEN
					PERFORM sentdm_send(phone, 'order_confirmation', parameters) FROM people WHERE n <= 5000;
					sent := sent + 5000;
				END IF;
				COMMIT;
				PERFORM pg_sleep(0.005);
				COMMIT;
			END LOOP;
		END \$\$;
		DROP TABLE feeding;
	SQL
}

accepted_so_far() {
	sql -c "SELECT extract(epoch FROM clock_timestamp()), value FROM sentdm.counters() WHERE name = 'accepted'"
}

# rate_over SECONDS: messages accepted per second
rate_over() {
	local before after
	before=$(accepted_so_far)
	sleep "$1"
	after=$(accepted_so_far)
	calculate "(${after#*|} - ${before#*|}) / (${after%|*} - ${before%|*})" 1
}

measure_snapshot() {
	local feeder holder round window=5 before=() held=() after=()
	warm_up
	standin
	feed &
	feeder=$!
	CHILDREN+=($feeder)
	sleep $window
	for ((round = 0; round < ROUNDS; round++)); do
		before+=($(rate_over $window))
	done
	sql -c "BEGIN ISOLATION LEVEL REPEATABLE READ" -c "SELECT count(*) FROM people" -c "SELECT pg_sleep($SNAPSHOT_S)" >/dev/null &
	holder=$!
	sleep $((SNAPSHOT_S - ROUNDS * window - 3))
	for ((round = 0; round < ROUNDS; round++)); do
		held+=($(rate_over $window))
	done
	kill -0 $holder 2>/dev/null || die "the snapshot was not held for so long"
	wait $holder
	sleep 10
	for ((round = 0; round < ROUNDS; round++)); do
		after+=($(rate_over $window))
	done
	sql -c "INSERT INTO feeding VALUES (true)"
	wait $feeder
	unset 'CHILDREN[-1]'
	for ((round = 0; round < ROUNDS; round++)); do
		both "drain, a snapshot held for $SNAPSHOT_S s: of the drain before" "${held[round]}" "${before[round]}" messages/s
		both "drain, 10 s after that snapshot: of the drain before" "${after[round]}" "${before[round]}" messages/s
	done
	wait_until 60 is_drained || die "the queue does not drain"
	[[ $(arrived repeated) == 0 ]] || die "something arrived twice"
}

is_drained() {
	[[ $(sql -c "SELECT EXISTS (SELECT FROM sentdm.outbox)") == f ]]
}

# A hundred, 10 ms apart, among a million for tomorrow: from due to arrived.
measure_scheduled() {
	local round
	warm_up
	make_big
	DB=big insert_messages $QUEUED queued "now() + interval '1 day'"
	DB=big release
	for ((round = 0; round < ROUNDS; round++)); do
		standin
		DB=big sql -F ' ' -c "WITH due AS MATERIALIZED (SELECT n, now() + interval '2 s' + n * interval '10 ms' AS at FROM generate_series(1, 100) AS n),
			sent AS MATERIALIZED (SELECT sentdm_send('+14155550101', 'order_confirmation', send_at => at) AS id, (extract(epoch FROM at) * 1000000)::bigint AS us FROM due)
			SELECT id, us, us FROM sent" >"$SCRATCH/sent"
		wait_until 20 has_arrived 100 || die "what was due did not leave"
		latencies
		record "$(thousands $QUEUED) scheduled, 100 due: from due to arrival, median" only "$p50" ms
		record "$(thousands $QUEUED) scheduled, 100 due: from due to arrival, longest" only "$longest" ms
	done
	[[ $(DB=big sql -c "SELECT count(*) FROM sentdm.outbox") == $QUEUED ]] || die "something of tomorrow was sent today"
	drop_big
}

# Not in the table: where the worker's CPU time goes, per message, by perf.  Its own
# symbols and the libraries' names are enough; no debug packages.
measure_profile() {
	local worker before
	command -v perf >/dev/null || die "profile needs perf (Debian: linux-perf)"
	warm_up
	fill $N
	standin
	worker=$(worker_pid)
	perf record -q -F 999 -g --call-graph dwarf,8192 -p "$worker" -o "$SCRATCH/perf.data" -- sleep $WAIT_S 2>"$SCRATCH/perf.log" &
	CHILDREN+=($!)
	sleep 1
	before=$(cpu_of "$worker")
	drain >/dev/null
	before=$(calculate "$(cpu_of "$worker") - $before")
	kill -INT "${CHILDREN[-1]}"
	wait "${CHILDREN[-1]}" || true
	unset 'CHILDREN[-1]'
	perf script --no-inline -F ip,sym,dso -i "$SCRATCH/perf.data" 2>/dev/null |
		python3 "$SCRATCH/src/test/bench/report.py" profile "$(calculate "$before * 1000000 / $N")"
}
