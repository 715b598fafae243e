# Measurements of single sends: from the confirmed commit to the arrival at Sent; to
# be sourced by run.sh.

has_arrived() {
	(($(arrived) >= $1))
}

# What the files sent and arrivals say, in ms: p50 p99 longest, and p50 p99 of the commit
latencies() {
	curl -s --noproxy '*' "$URL/arrivals" >"$SCRATCH/arrivals"
	python3 "$SCRATCH/src/test/bench/report.py" latency "$SCRATCH/sent" "$SCRATCH/arrivals" >"$SCRATCH/times" ||
		die "something that was sent did not arrive"
	read -r p50 p99 longest commit50 commit99 <"$SCRATCH/times"
}

# send_and_time COUNT INTERVAL_US [STATEMENT]: sends, one at a time; leaves what
# latencies does
send_and_time() {
	local before
	before=$(arrived)
	as_user "$SCRATCH/sender.bin" "host=$SCRATCH port=$PORT user=postgres dbname=$DB" "$@" >"$SCRATCH/sent"
	wait_until 10 has_arrived $((before + $1)) || true
	latencies
}

# send_first [STATEMENT]: one that does not count, as after TRUNCATE it has its
# statements planned anew, on both sides
send_first() {
	send_and_time 1 0 "$@"
	wait_until 10 is_drained || die "the first one was not stored"
	standin
}

record_latencies() {
	both "commit to arrival, $1: median, of the commit before it" "$p50" "$commit50" ms
	both "commit to arrival, $1: p99, of the commit before it" "$p99" "$commit99" ms
}

measure_arrival() {
	local pace_ms round count
	warm_up
	for ((round = 0; round < ROUNDS; round++)); do
		for pace_ms in $PACES_MS; do
			empty_tables
			standin
			send_first
			count=$((3000 / pace_ms + 2))
			send_and_time $count $((pace_ms * 1000))
			record_latencies "one per $pace_ms ms"
		done
	done
}

# The Node worker, woken by NOTIFY.
measure_listen() {
	local round pace_ms=100 ours50 ours99 insert="INSERT INTO node.messages (recipient, template, parameters)
		VALUES ('+14155550101', 'order_confirmation', '{\"name\": \"Ada\", \"order_id\": \"1001\"}') RETURNING 'node-' || id"
	warm_up
	[[ -f $SCRATCH/node/tuned.mjs ]] || install_node_workers
	start_node_worker tuned listen
	timeout 20 head -n 1 <"$SCRATCH/tuned.listen.out" | grep -q listening || die "the Node worker does not listen"
	sql -f - <<-'SQL'
		CREATE FUNCTION node.notify() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NOTIFY queued; RETURN NULL; END $$;
		CREATE TRIGGER notify AFTER INSERT ON node.messages FOR EACH STATEMENT EXECUTE FUNCTION node.notify();
	SQL
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		sql -c "TRUNCATE node.messages"
		standin
		send_first
		send_and_time 40 $((pace_ms * 1000))
		ours50=$p50 ours99=$p99
		send_first "$insert"
		send_and_time 40 $((pace_ms * 1000)) "$insert"
		both "commit to arrival, one per $pace_ms ms: median, of a Node worker on LISTEN/NOTIFY" "$ours50" "$p50" ms
		both "commit to arrival, one per $pace_ms ms: p99, of a Node worker on LISTEN/NOTIFY" "$ours99" "$p99" ms
	done
	kill "${CHILDREN[-1]}"
	unset 'CHILDREN[-1]'
	sql -c "DROP FUNCTION node.notify CASCADE" 2>/dev/null
}

# The worker has left the database; the launcher starts another one.
measure_idle() {
	local round
	release
	configure "sentdm.idle_timeout = '50ms'"
	for ((round = 0; round < ROUNDS * 3; round++)); do
		empty_tables
		standin
		wait_until 20 has_no_worker || die "the worker does not leave"
		send_and_time 1 0
		record "commit to arrival, the worker had left" only "$p50" ms
	done
	configure "sentdm.idle_timeout = '10min'"
}

# A thousand requests hang; others must not notice.  The worker opens up to so many
# only after it was answered well for a while.
measure_hang() {
	local round
	configure "sentdm.max_in_flight = 2048" "sentdm.request_timeout = '120s'"
	for ((round = 0; round < ROUNDS; round++)); do
		fill 6000
		standin 20000
		drain >/dev/null
		standin 0 1000
		sql -c "SELECT count(sentdm_send(phone, 'order_confirmation')) FROM people WHERE n <= 1000" >/dev/null
		wait_until 20 has_arrived 1000 || die "no thousand requests hang"
		send_and_time 40 50000
		record_latencies "1,000 requests hang"
		hold
		restart_worker
		empty_tables
	done
	configure "sentdm.max_in_flight = 64" "sentdm.request_timeout = '30s'"
	release
}

restart_worker() {
	local pid
	pid=$(worker_pid)
	sql -c "SELECT pg_terminate_backend($pid)" >/dev/null
	wait_until 20 is_another_worker "$pid" || die "the worker does not come back"
}

is_another_worker() {
	[[ $(worker_pid) && $(worker_pid) != "$1" ]]
}

# An enabled database without traffic: the worker waits, then it is gone.  Nobody
# asks it anything meanwhile, autovacuum neither.
measure_idle_cost() {
		release
	configure "autovacuum = off" "sentdm.idle_timeout = '1h'"
	idle_cost "with the worker waiting" $IDLE_S
	configure "sentdm.idle_timeout = '50ms'"
	wait_until 20 has_no_worker || die "the worker does not leave"
	idle_cost "with the worker gone" $IDLE_S
	configure "autovacuum = on" "sentdm.idle_timeout = '10min'"
}

transactions_in() {
	DB=postgres sql -c "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '$1'"
}

# idle_cost NAME SECONDS
idle_cost() {
	local pids cpu transactions
	pids=$(DB=postgres sql -c "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'sentdm%'")
	sleep 2						# until the statistics of the above are in
	transactions=$(transactions_in "$DB")
	cpu=$(cpu_of_all $pids)
	sleep "$2"
	record "idle, $1: transactions in the database per minute" only "$(calculate "($(transactions_in "$DB") - $transactions) * 60 / $2" 1)" ""
	record "idle, $1: CPU of launcher and worker" only "$(calculate "($(cpu_of_all $pids) - $cpu) / $2 * 100")" %
}

cpu_of_all() {
	local pid
	for pid in "$@"; do
		cpu_of "$pid"
	done | awk '{ sum += $1 } END { print sum + 0 }'
}
