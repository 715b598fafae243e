#!/bin/bash
# How many webhooks a second are acknowledged over 64 connections, by sentdm-receiver
# and by two receivers that one would write in Node (webhook_node.js), in turn, on the
# same server; how long the answers take; and that the receiver's memory stays as it is.
#
#   bash test/bench/webhook.sh        the same as run.sh receiver, which sources it
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
	exec bash "$(dirname "$0")/run.sh" "$@" receiver
fi

CONNECTIONS=64
EVENTS=$N						# to a receiver in a round, after a quarter of that to warm up; a third to the slow ones

prepare_receivers() {
	install_missing libmicrohttpd-dev libpq-dev
	as_user make -s -C "$SCRATCH/src" PG_CONFIG="$PG_CONFIG" with_llvm=no receiver
	as_user gcc -std=gnu11 -O2 -D_GNU_SOURCE "$SCRATCH/src/test/bench/webhook_load.c" -o "$SCRATCH/webhook_load.bin" -lcrypto
	fetch_node_modules pg@8 || die "cannot fetch the npm package pg"
	sql -f - <<-SQL
		CREATE TABLE plain.node_events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, dedupe_key text NOT NULL UNIQUE,
			event text, sent_id uuid, received_at timestamptz NOT NULL DEFAULT now(), payload jsonb);
		CREATE TABLE plain.node_deliveries (sent_id uuid PRIMARY KEY, status text, status_at timestamptz);
	SQL
}

listens() {
	(exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

free_port() {
	python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# load PORT EVENTS: prints events per second, median and 99th percentile in ms
load() {
	as_user "$SCRATCH/webhook_load.bin" "$1" /webhooks/sent $CONNECTIONS "$2" $SECRET >"$SCRATCH/load.out" || die "the load failed"
	grep -q "; statuses: 200: $2\$" "$SCRATCH/load.out" || die "not all were acknowledged: $(<"$SCRATCH/load.out")"
	sed -n 's|^\([0-9.]*\) events/s, latency ms: median \([0-9.]*\), p99 \([0-9.]*\),.*|\1 \2 \3|p' "$SCRATCH/load.out"
}

# load_receiver EVENTS PORT COMMAND...: start it, load it, end it; sets RATE, MEDIAN_MS, P99_MS,
# MEMORY_BEFORE and MEMORY_AFTER (MB) and the CPU of it and of the server per event (us)
load_receiver() {
	local events=$1 port=$2 pid cpu cpu_server
	shift 2
	sql -c "TRUNCATE sentdm.events, sentdm.deliveries, plain.node_events, plain.node_deliveries" -c "CHECKPOINT"
	"${AS_USER[@]}" PGHOST="$SCRATCH" PGPORT=$PORT PGUSER=postgres PGDATABASE="$DB" "$@" >"$SCRATCH/receiver.log" 2>&1 &
	pid=$!
	CHILDREN+=($pid)
	wait_until 20 listens "$port" || die "no receiver: $(tail -n 3 "$SCRATCH/receiver.log")"
	load "$port" $((events / 4)) >/dev/null	# connections, plans, caches
	MEMORY_BEFORE=$(memory_of $pid) cpu=$(cpu_of $pid) cpu_server=$(cpu_of_server)
	read -r RATE MEDIAN_MS P99_MS < <(load "$port" "$events")
	CPU_US=$(calculate "($(cpu_of $pid) - $cpu) * 1000000 / $events" 1)
	CPU_SERVER_US=$(calculate "($(cpu_of_server) - $cpu_server) * 1000000 / $events" 1)
	MEMORY_AFTER=$(memory_of $pid)
	kill $pid
	wait $pid || true
	unset 'CHILDREN[-1]'
}

# expect_rows TABLE EVENTS
expect_rows() {
	[[ $(sql -c "SELECT count(*) FROM $1") == $(($2 + $2 / 4)) ]] || die "not every event is in $1"
}

run_receivers() {
	local round port=$(free_port) ours mode slow=$((EVENTS / 3))
	local -A name=([transaction]="a transaction each" [statement]="a statement each")
	prepare_receivers
	for ((round = 0; round < ROUNDS; round++)); do
		load_receiver $EVENTS "$port" "$SCRATCH/src/build/sentdm-receiver" --listen="127.0.0.1:$port" --health-listen=127.0.0.1:0
		expect_rows sentdm.events $EVENTS
		ours=($RATE $MEDIAN_MS $P99_MS)
		record "receiver: CPU of an event in the receiver" only $CPU_US us
		record "receiver: CPU of an event in the server" only $CPU_SERVER_US us
		record "receiver: memory after $EVENTS events: of that before" ours $MEMORY_AFTER MB
		record "receiver: memory after $EVENTS events: of that before" reference $MEMORY_BEFORE MB
		for mode in transaction statement; do
			load_receiver $slow "$port" env NODE_PATH="$NODE_MODULES" node "$SCRATCH/src/test/bench/webhook_node.js" "$port" $mode $SECRET
			expect_rows plain.node_events $slow
			both "receiver: webhooks acknowledged: of Node, ${name[$mode]}" "${ours[0]}" $RATE events/s
			both "receiver: median answer: of Node, ${name[$mode]}" "${ours[1]}" $MEDIAN_MS ms
			both "receiver: 99th percentile: of Node, ${name[$mode]}" "${ours[2]}" $P99_MS ms
		done
	done
}

run_receivers
