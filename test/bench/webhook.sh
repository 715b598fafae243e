#!/usr/bin/env bash
# How many webhooks a second are acknowledged, by sentdm-receiver and by two
# receivers in Node, one after the other and again, on the same server.
#
#	test/bench/webhook.sh [ROUNDS] [EVENTS] [CONNECTIONS]
#
# To be run as a user that PostgreSQL runs under, with the extension installed,
# the receiver built, pg_config in PATH, and NODE_PATH naming a directory with the
# npm package pg (without it, only sentdm-receiver is measured).  A new cluster in a
# temporary directory, with the defaults of initdb; loopback only.
set -eu
ROUNDS=${1:-3} EVENTS=${2:-60000} CONNECTIONS=${3:-64}
SECRET=whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
HERE=$(cd "$(dirname "$0")" && pwd)
RECEIVER=${SENTDM_RECEIVER:-$HERE/../../build/sentdm-receiver}
BIN=$(pg_config --bindir)
DIR=$(mktemp -d)
PORT=$((20000 + RANDOM % 10000))
export PGHOST=$DIR PGPORT=5432 PGDATABASE=postgres PGUSER=$(id -un)
PIDS=

clean_up() {
	for pid in $PIDS; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
	"$BIN/pg_ctl" -D "$DIR/data" -m immediate stop >/dev/null 2>&1 || true
	rm -rf "$DIR"
}
trap clean_up EXIT

"${CC:-cc}" -O2 -D_GNU_SOURCE -o "$DIR/load" "$HERE/webhook_load.c" -lcrypto
"$BIN/initdb" -D "$DIR/data" -A trust >/dev/null
"$BIN/pg_ctl" -D "$DIR/data" -w -l "$DIR/log" \
	-o "-k $DIR -c listen_addresses='' -c shared_preload_libraries=sentdm -c max_wal_size=4GB" start >/dev/null
"$BIN/psql" -Xq -v ON_ERROR_STOP=1 <<SQL >/dev/null
CREATE EXTENSION sentdm;
SELECT sentdm_set_webhook_secret('$SECRET');
CREATE TABLE node_events (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, dedupe_key text NOT NULL UNIQUE,
	event text, sent_id uuid, received_at timestamptz NOT NULL DEFAULT now(), payload jsonb);
CREATE TABLE node_deliveries (sent_id uuid PRIMARY KEY, status text, status_at timestamptz);
SQL

# CPU seconds of a process and, for the server, of all its processes.
cpu() {
	cat /proc/"$1"/stat /proc/"$1"/task/*/children 2>/dev/null | awk -v hz="$(getconf CLK_TCK)" 'NR == 1 { print ($14 + $15) / hz }'
}
server_cpu() {
	local total=0 pid
	for pid in $(head -1 "$DIR/data/postmaster.pid") $(pgrep -P "$(head -1 "$DIR/data/postmaster.pid")"); do
		total=$(awk -v a="$total" -v b="$(cpu "$pid")" 'BEGIN { print a + b }')
	done
	echo "$total"
}

# Start a receiver, load it, and stop it.
measure() {
	local name=$1 pid before server_before
	shift
	"$BIN/psql" -Xqc 'TRUNCATE sentdm.events, sentdm.deliveries, node_events, node_deliveries' -c CHECKPOINT
	"$@" >"$DIR/out" 2>&1 &
	pid=$!
	PIDS=$pid
	until (exec 3<>/dev/tcp/127.0.0.1/$PORT) 2>/dev/null; do sleep 0.05; done
	"$DIR/load" $PORT /webhooks/sent "$CONNECTIONS" $((EVENTS / 10)) $SECRET >/dev/null	# connections, plans, caches
	before=$(cpu $pid) server_before=$(server_cpu)
	printf '%-28s %s' "$name" "$("$DIR/load" $PORT /webhooks/sent "$CONNECTIONS" "$EVENTS" $SECRET)"
	awk -v n="$EVENTS" -v a="$before" -v b="$(cpu $pid)" -v c="$server_before" -v d="$(server_cpu)" -v rss="$(awk '/VmRSS/ { print $2 }' /proc/$pid/status)" \
		'BEGIN { printf "; CPU us/event: receiver %.0f, server %.0f; %d kB\n", (b - a) * 1e6 / n, (d - c) * 1e6 / n, rss }'
	kill "$pid"
	wait "$pid" || true
	PIDS=
}

for round in $(seq "$ROUNDS"); do
	measure sentdm-receiver "$RECEIVER" --listen=127.0.0.1:$PORT --health-listen=127.0.0.1:0 --access-log="${ACCESS_LOG:-on}"
	if [[ -n ${NODE_PATH:-} ]]; then
		measure 'node, one statement' node "$HERE/webhook_node.js" $PORT statement $SECRET
		measure 'node, one transaction' node "$HERE/webhook_node.js" $PORT transaction $SECRET
	fi
done
