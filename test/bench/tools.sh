# What the measurements share; to be sourced by run.sh.  DB is the database that is
# meant.

sql() {
	as_user "$PG_BIN/psql" -X -q -A -t -h "$SCRATCH" -p $PORT -U postgres -d "$DB" -v ON_ERROR_STOP=1 "$@"
}

# record NAME SIDE VALUE UNIT: one measurement of ours, of reference, or of only
# (for what has no reference).  report.py knows the targets by NAME.  What failed has
# left no value: nothing is recorded then, and all ends.
record() {
	[[ $3 =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || die "$1: no value"
	printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$SCRATCH/results"
	printf '  %-72s %-9s %12s %s\n' "$1" "$2" "$3" "$4" >&2
}

# both NAME OURS REFERENCE UNIT
both() {
	record "$1" ours "$2" "$4"
	record "$1" reference "$3" "$4"
}

calculate() {
	awk "BEGIN { printf \"%.${2:-3}f\", ($1) }"
}

# thousands NUMBER: with commas, in any locale
thousands() {
	sed -E ':again; s/^([0-9]+)([0-9]{3})/\1,\2/; t again' <<<"$1"
}

per_second() {
	calculate "$1 / $2" 1
}

# What the programs print on standard input: one value of a line of JSON.
field() {
	python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

# The stand-in for Sent

standin() {
	curl -s --noproxy '*' -X POST "$URL/reset?latency_us=${1:-0}&hang=${2:-0}"
}

arrived() {
	curl -s --noproxy '*' "$URL/count" | field "${1:-requests}"
}

# The server

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

has_worker() {
	[[ $(worker_pid) ]]
}

has_no_worker() {
	[[ ! $(worker_pid) ]]
}

# CPU seconds that a process has used, with its ended children when it has any.
cpu_of() {
	awk -v hz="$(getconf CLK_TCK)" '{ sub(/.*\) /, ""); print ($12 + $13 + $14 + $15) / hz }' "/proc/$1/stat" 2>/dev/null || true
}

# ... the whole server: every process of it, ended ones too.
cpu_of_server() {
	local postmaster pid
	postmaster=$(head -n 1 "$SCRATCH/data/postmaster.pid")
	for pid in "$postmaster" $(pgrep -P "$postmaster"); do
		cpu_of "$pid"
	done | awk '{ sum += $1 } END { printf "%.2f", sum }'
}

# Private memory of a process, in MB.
memory_of() {
	awk '/^RssAnon/ { printf "%.1f", $2 / 1024 }' "/proc/$1/status"
}

# Run a statement in a transaction; prints how many seconds it took with its commit.
timed() {
	{
		echo "SELECT extract(epoch FROM clock_timestamp()) AS began \\gset"
		echo "BEGIN; $1; COMMIT;"
		echo "SELECT 'took ' || extract(epoch FROM clock_timestamp()) - :began;"
	} | sql -f - | awk '/^took/ { print $2 }'
}

# The queue

hold() {
	sql -c "SELECT sentdm_pause('bench')" >/dev/null
}

release() {
	sql -c "SELECT sentdm_resume()" >/dev/null
}

empty_tables() {
	sql -c "TRUNCATE sentdm.messages, sentdm.outbox, sentdm.deliveries, sentdm.events" -c "CHECKPOINT"
}

# fill COUNT [RECIPIENTS [CHANNELS]]: queue so many requests, held, after emptying all
fill() {
	local count=$1 recipients=${2:-1} channels=${3:-}
	hold
	empty_tables
	if ((recipients == 1)); then
		sql -c "SELECT count(sentdm_send(phone, 'order_confirmation', parameters))
			FROM people, generate_series(1, ($count + 49999) / 50000) AS g WHERE (g - 1) * 50000 + n <= $count" >/dev/null
	else
		sql -c "SELECT count(*)
			FROM (SELECT array_agg(phone) AS phones FROM people WHERE n <= $recipients) p, generate_series(1, $count) AS g,
				LATERAL sentdm_send(phones, 'order_confirmation', channels => nullif('$channels', '')::text[], tag => 'request ' || g)" >/dev/null
	fi
	sql -c "CHECKPOINT"
}

# insert_messages COUNT STATE DUE: as sentdm_send would, but quickly
insert_messages() {
	sql -f - <<-SQL
		INSERT INTO sentdm.messages (id, request, state, created_by, attempts, finished_at, http_status)
		SELECT ('0199e0a8-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
			jsonb_build_object('to', jsonb_build_array('+1415' || 5550000 + n % 50000), 'template', jsonb_build_object(
				'name', 'order_confirmation', 'parameters', jsonb_build_object('name', 'Ada', 'order_id', n::text))),
			'$2', 'postgres', CASE '$2' WHEN 'queued' THEN 0 ELSE 1 END, CASE '$2' WHEN 'queued' THEN NULL ELSE now() END,
			CASE '$2' WHEN 'queued' THEN NULL ELSE 202 END
		FROM generate_series(1, $1) AS n;
		INSERT INTO sentdm.outbox (message_id, priority, due_at, position)
		SELECT id, 'normal', $3, row_number() OVER (ORDER BY id) FROM sentdm.messages WHERE '$2' = 'queued';
		CHECKPOINT;
	SQL
}

# drain [COUNT]: let go what was queued; prints how many seconds it took until all of
# it, or COUNT, was accepted and stored.
drain() {
	sql -f - <<-SQL
		SELECT extract(epoch FROM clock_timestamp()) AS began,
			(SELECT value FROM sentdm.counters() WHERE name = 'accepted') + ${1:-(SELECT count(*) FROM sentdm.outbox)} AS goal \gset
		SET bench.goal = :goal;
		SELECT sentdm_resume() AS resumed \gset
		DO \$\$
		BEGIN
			WHILE (SELECT value FROM sentdm.counters() WHERE name = 'accepted') < current_setting('bench.goal')::bigint
				OR (${1:-0} = 0 AND EXISTS (SELECT FROM sentdm.outbox)) LOOP
				IF clock_timestamp() > statement_timestamp() + interval '$WAIT_S seconds' THEN
					RAISE EXCEPTION 'the queue does not drain';
				END IF;
				COMMIT;
				PERFORM pg_sleep(0.01);
				COMMIT;
			END LOOP;
		END \$\$;
		SELECT extract(epoch FROM clock_timestamp()) - :began;
	SQL
}

# expect_stored REQUESTS DELIVERIES: what a drain has left is whole, and nothing came twice
expect_stored() {
	local stored
	stored=$(sql -c "SELECT (SELECT count(*) FROM sentdm.messages WHERE state = 'accepted') || ' ' ||
		(SELECT count(DISTINCT sent_id) FROM sentdm.deliveries) || ' ' || (SELECT count(*) FROM sentdm.outbox)")
	[[ $stored == "$1 $2 0" ]] || die "stored (requests, deliveries, queued): $stored; expected $1 $2 0"
	[[ $(arrived) == "$1" && $(arrived repeated) == 0 ]] || die "not $1 requests arrived, or some twice"
}

# bare IN_FLIGHT [URL CA_FILE]: the bytes of the messages stored, by the bare client
bare() {
	sql -c "COPY (SELECT 'sentdm-' || id || '-1', request::text FROM sentdm.messages ORDER BY id) TO STDOUT" >"$SCRATCH/requests"
	as_user "$SCRATCH/client.bin" "${2:-$URL}/v3/messages" "$1" ${3:-} <"$SCRATCH/requests" || die "the bare client failed"
}
