#!/bin/bash
# Measures sentdm against what it could be at best, and against what one would use
# instead, side by side on one machine.
#
#   bash test/bench/run.sh [--quick | --full] [--json FILE] [NAME...]
#
# Installs what is missing, builds the extension, starts a server of its own
# (PostgreSQL's default settings, fsync on) and a stand-in for Sent, runs each
# measurement three times or more in turn with its reference, prints one table, and
# removes everything but the JSON.  Absolute figures drift with the machine: compare
# ratios.  NAME chooses measurements; each is a function measure_NAME in a file here.
# --full also does what takes long: histories of 10,000,000, a snapshot of 10 minutes.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
for part in tools sending arrival enqueue receiving; do
	. "$(dirname "$0")/$part.sh"
done

PORT=54330						# the name of a socket only; there is no TCP
WAIT_S=300						# the longest that one step may take
SECRET=whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
QUICK="drain latency50 thousand enqueue_bulk enqueue_single verify"
ALL="standin drain node latency50 tls thousand memory backlog history snapshot scheduled arrival listen idle hang
	enqueue_bulk enqueue_single enqueue_trigger session verify webhooks stored_events idle_cost receiver"

ROUNDS=3
N=30000							# messages in a drain
SECONDS_EACH=4					# for what runs for a time
IN_FLIGHT="64 256 1024"			# with latency
PACES_MS="3000 1000 100 10"		# between single sends
DRAINED=10000					# messages in a drain beside a backlog or a history
QUEUED=1000000					# messages of a backlog, or for tomorrow
MANY=1000000					# rows of history, stored events
SNAPSHOT_S=36
SESSION_S=60
IDLE_S=15
JSON_FILE=$SOURCE_TREE/build/bench.json

SCRATCH= SERVER_STARTED= URL=
CHILDREN=()						# pids of what runs beside the server

stop_everything() {
	local status=$?
	trap '' HUP INT TERM
	trap - EXIT
	((${#CHILDREN[@]} == 0)) || kill "${CHILDREN[@]}" 2>/dev/null || true
	[[ ! $SERVER_STARTED ]] || as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -s -m immediate stop || true
	if ((status == 1)) && [[ -s $SCRATCH/server.log ]]; then
		grep -v checkpoint "$SCRATCH/server.log" | tail -n 20 >&2
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
	"${AS_USER[@]}" "$SCRATCH/server.bin" </dev/null >"$SCRATCH/standin.port" 2>"$SCRATCH/standin.log" &
	CHILDREN+=($!)
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
		sentdm.idle_timeout = '10min'
	CONF
	SERVER_STARTED=yes
	as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -l "$SCRATCH/server.log" -s -w start
	make_database bench
}

# make_database NAME: what sends, the same tables without us, and what to fill them with
make_database() {
	DB=postgres sql -c "CREATE DATABASE $1"
	DB=$1 sql -f - >/dev/null <<-SQL
		CREATE EXTENSION pgcrypto;
		CREATE EXTENSION sentdm;
		SELECT sentdm_enable();
		SELECT sentdm_set_webhook_secret('$SECRET');
		CREATE SCHEMA plain;
		CREATE TABLE plain.messages (LIKE sentdm.messages INCLUDING ALL);
		CREATE TABLE plain.outbox (LIKE sentdm.outbox INCLUDING ALL) WITH (fillfactor = 44);
		CREATE TABLE plain.deliveries (LIKE sentdm.deliveries INCLUDING ALL) WITH (fillfactor = 85);
		CREATE TABLE plain.events (LIKE sentdm.events INCLUDING ALL);
		CREATE TABLE people AS
		SELECT n, '+1415' || 5550000 + n AS phone, jsonb_build_object('name', 'Ada', 'order_id', n::text) AS parameters
		FROM generate_series(1, 50000) AS n;
		VACUUM ANALYZE people;
	SQL
}

report() {
	[[ -s $SCRATCH/results ]] || return 0
	mkdir -p "$(dirname "$JSON_FILE")"
	python3 "$SCRATCH/src/test/bench/report.py" table "$SCRATCH/results" "$JSON_FILE" \
		"$(as_user "$PG_BIN/postgres" --version), libcurl $(curl-config --version | cut -d' ' -f2), $(openssl version | cut -d' ' -f1,2)$(node_version)" \
		"$(stat -f -c %T "$SCRATCH")" "$SECONDS" "$LOAD_BEFORE"
}

wants() {
	local name
	for name in "$@"; do
		[[ " ${names[*]} " == *" $name "* ]] && return 0
	done
	return 1
}

main() {
	local name names=() packages="libpq-dev curl procps openssl"
	while (($#)); do
		case $1 in
			--quick) N=20000 SECONDS_EACH=2 IN_FLIGHT=64 PACES_MS="100 10" QUEUED=100000 MANY=100000 SNAPSHOT_S=30 SESSION_S=15 ALL=$QUICK ;;
			--full) MANY=10000000 SNAPSHOT_S=600 IDLE_S=120 ;;
			--json) JSON_FILE=$(realpath "$2") && shift ;;
			-*) die "usage: $0 [--quick | --full] [--json FILE] [NAME...]" ;;
			*) names+=("$1") ;;
		esac
		shift
	done
	for name in "${names[@]}"; do
		declare -F "measure_$name" >/dev/null || die "no measurement $name; there are:" $(compgen -A function measure_ | sed 's/measure_//')
	done
	((${#names[@]})) || names=($ALL)
	trap stop_everything EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM

	LOAD_BEFORE=$(cut -d' ' -f1 /proc/loadavg)
	! wants standin || packages+=" wrk"
	! wants tls || packages+=" nginx-light"
	install_missing $packages
	find_pg_config
	choose_user
	make_scratch sentdm-bench
	cd "$SCRATCH"				# the other user may not be allowed into where we were
	build_private_server
	build_programs
	start_standin
	start_server
	for name in "${names[@]}"; do
		printf '%s (%d s)\n' "$name" "$SECONDS" >&2
		DB=bench "measure_$name"
	done
	! grep -E 'PANIC|FATAL|ERROR' "$SCRATCH/server.log" | grep -vE 'terminating|canceling autovacuum task' >&2 || die "the server's log has errors"
	report
}

main "$@"
