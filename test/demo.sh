#!/bin/bash
# A shop that texts its customers: what sentdm does, step by step, as SQL.
#
# Builds the extension, starts a server of its own and a stand-in for Sent, and
# removes both at the end.  Nothing is sent to anybody; nothing outside a
# temporary directory is changed, except that missing packages are installed.
# With --keep, server and stand-in go on running for you to play with.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

PORT=54329						# the name of a socket only; there is no TCP
SECRET='whsec_c3RhbmQtaW4gd2ViaG9vayBzaWduaW5nIHNlY3JldCE='
WAIT_S=20						# for anything that should happen

SCRATCH= KEEP= SERVER_STARTED= STANDIN_PID= STANDIN_URL=
BOLD= PLAIN=
if [[ -t 1 ]]; then
	BOLD=$'\e[1m' PLAIN=$'\e[0m'
fi

stop_everything() {
	local status=$?
	trap - EXIT HUP INT TERM
	[[ ! $STANDIN_PID ]] || kill "$STANDIN_PID" 2>/dev/null || true
	[[ ! $SERVER_STARTED ]] || as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -s -m immediate stop || true
	if ((status != 0)) && [[ -s $SCRATCH/server.log ]]; then
		printf '\nThe end of the server log:\n' >&2
		tail -n 20 "$SCRATCH/server.log" >&2
	fi
	[[ ! $SCRATCH ]] || rm -rf "$SCRATCH"
	exit "$status"
}

start_standin() {
	cd "$SCRATCH"
	as_user python3 "$SCRATCH/src/test/standin.py" --quiet --webhook-secret "$SECRET" \
		--ready-file "$SCRATCH/standin.port" </dev/null >"$SCRATCH/standin.log" 2>&1 &
	STANDIN_PID=$!
	wait_until $WAIT_S test -s "$SCRATCH/standin.port" || die "the stand-in did not start"
	STANDIN_URL=http://127.0.0.1:$(<"$SCRATCH/standin.port")
}

start_server() {
	as_user "$PG_BIN/initdb" -D "$SCRATCH/data" -U shop -A trust --no-sync -E UTF8 >"$SCRATCH/initdb.log"
	as_user tee "$SCRATCH/api.key" <<<'sk_test_of_the_demo' >/dev/null
	as_user chmod 600 "$SCRATCH/api.key"
	as_user tee -a "$SCRATCH/data/postgresql.conf" >/dev/null <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$SCRATCH'
		port = $PORT
		shared_preload_libraries = 'sentdm'
		sentdm.base_url = '$STANDIN_URL'
		sentdm.allow_insecure_http = on
		sentdm.api_key_file = '$SCRATCH/api.key'
	CONF
	SERVER_STARTED=yes
	as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -l "$SCRATCH/server.log" -s -w start
	quietly "CREATE DATABASE shop" postgres
}

client() {
	as_user "$PG_BIN/psql" -X -q -h "$SCRATCH" -p $PORT -U shop -v ON_ERROR_STOP=1 \
		-P pager=off -P footer=off "$@"
}

# One value, or nothing, without show.
quietly() {
	client -d "${2:-shop}" -A -t -c "$1"
}

is_true() {
	[[ $(quietly "SELECT $1") == t ]]
}

heading() {
	printf '\n%s== %s%s\n\n' "$BOLD" "$1" "$PLAIN"
}

# Show a statement and what psql answers.
sql() {
	printf '%s%s%s\n' "$BOLD" "$1" "$PLAIN"
	client -d shop "${@:2}" -f - <<<"$1"
}

# The worker and the stand-in have done all that is due.
settle() {
	wait_until $WAIT_S is_true "NOT EXISTS (SELECT FROM sentdm.outbox WHERE due_at <= now())" ||
		die "messages are still waiting"
}

# The demo's web application: it takes the webhooks that the stand-in has sent
# since the last time, and hands each to the database, bytes and headers.
hand_on_webhooks() {
	as_user python3 - "$STANDIN_URL" "$SCRATCH/handed_on" "$@" <<-'PYTHON' | client -d shop -f - >/dev/null
		import json, os, sys, urllib.request
		url, state = sys.argv[1:3]
		after = int(open(state).read()) if os.path.exists(state) else 0
		news = json.load(urllib.request.urlopen(f"{url}/_control/events?after={after}"))
		for event in news["events"]:
		    headers = json.dumps(event["headers"]).replace("'", "''")
		    print(rf"SELECT * FROM sentdm_receive_webhook('\x{event['body'].encode().hex()}', '{headers}');")
		open(state, "w").write(str(news["next"]))
	PYTHON
}

webhooks_make_true() {
	hand_on_webhooks
	is_true "$1"
}

receive_until() {
	wait_until $WAIT_S webhooks_make_true "$1" || die "a webhook did not come"
}

control() {
	as_user python3 -c 'import json, sys, urllib.request
url, path, keys = sys.argv[1], sys.argv[2], sys.argv[3:]
data = json.load(urllib.request.urlopen(url + "/_control/" + path))
for key in keys:
    data = data[int(key) if key.isdigit() else key]
print(data if isinstance(data, str) else json.dumps(data))' "$STANDIN_URL" "$@"
}

install_and_sending() {
	heading "Sending starts where an administrator says so"
	sql "CREATE EXTENSION sentdm;
SELECT sentdm_enable();"
	sql "CREATE TABLE customers (name text, phone text);
INSERT INTO customers VALUES
    ('Ada', '+14155550101'), ('Bob', '+14155550102'), ('Eve', '+14155550103');"

	heading "The first message"
	sql "SELECT sentdm_send('+14155550101', 'order_confirmation', '{\"name\": \"Ada\", \"order_id\": 1001}');"
	settle
	sql "SELECT recipient, channel, state, status, attempts FROM sentdm.status;"
}

rollback() {
	heading "What is rolled back never leaves"
	sql "BEGIN;
SELECT sentdm_send('+14155550199', body => 'You should not read this');
ROLLBACK;"
	settle
	sql "SELECT count(*) AS messages FROM sentdm.messages;"
	echo "Messages that the stand-in for Sent has accepted so far: $(control ledger/summary accepted_recipients)"
}

batch() {
	heading "A batch: what is wrong is named, the rest goes"
	sql "SELECT * FROM sentdm_send_batch('[
    {\"recipient\": \"+14155550102\", \"template\": \"welcome\", \"parameters\": {\"name\": \"Bob\"}},
    {\"recipient\": \"415-555-0103\", \"template\": \"welcome\", \"parameters\": {\"name\": \"Eve\"}},
    {\"recipient\": \"+14155550103\", \"body\": \"Welcome, Eve!\", \"channels\": [\"sms\"]}]');"
}

campaign() {
	heading "A campaign: one statement, one request per 1,000 numbers"
	sql "SELECT sentdm_send(array_agg('+1415556' || to_char(n, 'FM0000')), 'spring_sale',
                   channels => '{whatsapp}', tag => 'spring', priority => 'bulk')
FROM generate_series(1001, 3500) AS n;"
}

trigger() {
	heading "From a trigger, in the transaction that changes the order"
	sql "CREATE TABLE orders (id int PRIMARY KEY, name text, phone text, status text);
INSERT INTO orders VALUES (1002, 'Bob', '+14155550102', 'new'), (1003, 'Eve', '+14155550103', 'new');

CREATE FUNCTION tell_customer() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    PERFORM sentdm_send(NEW.phone, 'order_shipped',
                        jsonb_build_object('name', NEW.name, 'order_id', NEW.id),
                        unique_key => 'shipped-' || NEW.id);
    RETURN NULL;
END \$\$;
CREATE TRIGGER shipped AFTER UPDATE ON orders
    FOR EACH ROW WHEN (OLD.status <> 'shipped' AND NEW.status = 'shipped')
    EXECUTE FUNCTION tell_customer();

UPDATE orders SET status = 'shipped';"
	settle
	sql "SELECT unique_key, state, request FROM sentdm.messages WHERE unique_key LIKE 'shipped-%';"
}

password() {
	heading "A one-time password: before all others, and useless after five minutes"
	sql "SELECT sentdm_send('+14155550101', 'otp', '{\"code\": \"493021\"}',
                   priority => 'high', expires_at => now() + interval '5 minutes');"
	settle
	echo "One that cannot leave in time is not sent late:"
	echo
	sql "SELECT sentdm_pause('maintenance');
SELECT sentdm_send('+14155550102', 'otp', '{\"code\": \"771530\"}', tag => 'late',
                   priority => 'high', expires_at => now() + interval '0.5 seconds');"
	wait_until $WAIT_S is_true "(SELECT expires_at < clock_timestamp() FROM sentdm.messages WHERE tag = 'late')"
	sql "SELECT sentdm_resume();"
	settle
	sql "SELECT recipient, state, error FROM sentdm.status WHERE tag = 'late';"
}

schedule() {
	heading "Later, and called off"
	sql "SELECT sentdm_send('+14155550103', body => 'Your parcel comes today', send_at => now() + interval '2 seconds', tag => 'today');
SELECT sentdm_send('+14155550103', body => 'Your parcel comes tomorrow', send_at => now() + interval '1 day', tag => 'tomorrow');
SELECT sentdm_cancel(id) FROM sentdm.messages WHERE tag = 'tomorrow';
SELECT tag, state, send_at - created_at AS \"in\" FROM sentdm.status WHERE tag IN ('today', 'tomorrow');"
	sql "SELECT priority, queued, due FROM sentdm.stat_outbox;"
}

# headers and body of the first delivery receipt
first_receipt() {
	as_user python3 - "$STANDIN_URL" <<-'PYTHON'
		import json, sys, urllib.request
		events = json.load(urllib.request.urlopen(sys.argv[1] + "/_control/events"))["events"]
		event = next(event for event in events if event["headers"]["X-Webhook-Event-Type"] == "message.delivered")
		print(json.dumps(event["headers"]))
		print(event["body"])
	PYTHON
}

receipts() {
	local headers body
	heading "Receipts: any application hands the webhooks it gets to one function"
	sql "SELECT sentdm_set_webhook_secret('$SECRET');"
	wait_until $WAIT_S eval 'first_receipt >"$SCRATCH/receipt" 2>/dev/null' || die "the stand-in sent no receipt"
	{ read -r headers && read -r body; } <"$SCRATCH/receipt"
	printf '\\set headers %s\n\\set body %s\n' "$headers" "$body"
	sql "SELECT * FROM sentdm_receive_webhook(convert_to(:'body', 'UTF8'), :'headers');" \
		-v "headers=$headers" -v "body=$body"
	echo "The same again, and one that somebody has tampered with:"
	echo
	sql "SELECT * FROM sentdm_receive_webhook(convert_to(:'body', 'UTF8'), :'headers');
SELECT * FROM sentdm_receive_webhook(convert_to(replace(:'body', 'DELIVERED', 'FAILED'), 'UTF8'), :'headers');" \
		-v "headers=$headers" -v "body=$body"
}

statuses() {
	heading "The others follow: delivered, read, and one that failed"
	sql "SELECT sentdm_send('+14155550101', body => 'Your parcel is at the door', channels => '{whatsapp}', tag => 'door');
SELECT sentdm_send('+14155550001', body => 'Your parcel is at the door', channels => '{whatsapp}', tag => 'door');"
	receive_until "(SELECT array_agg(status ORDER BY status) = '{failed,read}' FROM sentdm.status WHERE tag = 'door')"
	sql "SELECT recipient, status, error_code, error FROM sentdm.status WHERE tag = 'door';
SELECT e.id, e.event, d.recipient
FROM sentdm.events e JOIN sentdm.deliveries d USING (sent_id) JOIN sentdm.messages m ON m.id = d.message_id
WHERE m.tag = 'door' ORDER BY d.recipient, e.id;"

	heading "How far is the campaign?"
	receive_until "(SELECT delivered = total FROM sentdm.progress WHERE tag = 'spring')"
	sql "SELECT tag, total, queued, accepted, delivered, failed, percent FROM sentdm.progress ORDER BY tag;"
}

replies() {
	heading "A customer answers"
	as_user python3 -c 'import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/_control/inbound", sys.argv[2].encode())' \
		"$STANDIN_URL" '{"from": "+14155550101", "channel": "whatsapp", "text": "Thank you!"}'
	receive_until "EXISTS (SELECT FROM sentdm.inbound)"
	sql "SELECT contact, line, channel, text FROM sentdm.inbound;"
}

operating() {
	heading "What a person must look at"
	sql "SELECT sentdm_send('+14155550102', 'missing_template');"
	settle
	sql '\x
SELECT problem, error_code, detail, hint FROM sentdm.problems;'

	heading "Is all well?"
	sql "SELECT * FROM sentdm_health();
SELECT requests, accepted, retried, failed, expired FROM sentdm.stat_worker;
SELECT state, count(*), sum(jsonb_array_length(request->'to')) AS recipients FROM sentdm.messages GROUP BY state ORDER BY state;"
	settle
	cat <<-TEXT
		The stand-in's own count: $(control ledger/summary accepted_recipients) recipients accepted, at most \
		$(control ledger/summary max_effects_per_key) time per Idempotency-Key.
	TEXT
}

say_how_to_stop() {
	cat >"$SCRATCH/stop" <<-STOP
		#!/bin/bash
		# Ends what demo.sh --keep left running, and removes it.
		kill $STANDIN_PID
		$(declare -f as_user)
		RUN_AS=$RUN_AS SCRATCH=$SCRATCH
		as_user $PG_BIN/pg_ctl -D $SCRATCH/data -s -m fast stop
		rm -rf $SCRATCH
	STOP
	chmod 755 "$SCRATCH/stop"
	heading "Server and stand-in are still running"
	cat <<-TEXT
		To look around:  $PG_BIN/psql -h $SCRATCH -p $PORT -U shop shop
		To stop:         $SCRATCH/stop
	TEXT
}

main() {
	case ${1:-} in
		'') ;;
		--keep) KEEP=yes ;;
		*) die "usage: $(basename "$0") [--keep]" ;;
	esac
	unset "${!PG@}"
}
main "$@"
