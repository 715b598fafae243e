#!/bin/bash
# A shop that texts its customers: what sentdm does, step by step, as SQL.
#
# Builds the extension, starts a server of its own and a stand-in for Sent, and
# removes both at the end.  Nothing is sent to anybody, and nothing is changed
# outside a temporary directory, except that missing packages are installed.
# With --keep, all goes on running for you to play with.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

PORT=54329						# the name of a socket only; there is no TCP
SECRET=whsec_c3RhbmQtaW4gd2ViaG9vayBzaWduaW5nIHNlY3JldCE=
WAIT_S=20						# the longest that anything may take

SCRATCH= SERVER_STARTED= STANDIN_PID= URL=
BOLD= PLAIN=
if [[ -t 1 ]]; then
	BOLD=$'\e[1m' PLAIN=$'\e[0m'
fi

# Starting and stopping

stop_everything() {
	local status=$?
	trap '' HUP INT TERM
	trap - EXIT
	[[ ! $STANDIN_PID ]] || kill "$STANDIN_PID" 2>/dev/null || true
	[[ ! $SERVER_STARTED ]] || as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -s -m immediate stop || true
	if ((status == 1)) && [[ -s $SCRATCH/server.log ]]; then
		printf '\nThe end of the server log:\n' >&2
		tail -n 20 "$SCRATCH/server.log" >&2
	fi
	[[ ! $SCRATCH ]] || rm -rf "$SCRATCH"
	exit "$status"
}

start_standin() {
	"${AS_USER[@]}" setsid python3 "$SCRATCH/src/test/standin.py" --quiet --webhook-secret "$SECRET" \
		--ready-file "$SCRATCH/standin.port" </dev/null >"$SCRATCH/standin.log" 2>&1 &
	STANDIN_PID=$!
	wait_until $WAIT_S test -s "$SCRATCH/standin.port" || die "the stand-in for Sent did not start"
	URL=http://127.0.0.1:$(<"$SCRATCH/standin.port")
}

start_server() {
	as_user "$PG_BIN/initdb" -D "$SCRATCH/data" -U postgres -A trust -E UTF8 --no-sync >"$SCRATCH/initdb.log"
	as_user bash -c 'umask 077; echo sk_test_of_the_demo >"$HOME/sentdm.key"'
	as_user tee -a "$SCRATCH/data/postgresql.conf" >/dev/null <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$SCRATCH'
		port = $PORT
		shared_preload_libraries = 'sentdm'
		sentdm.base_url = '$URL'
		sentdm.allow_insecure_http = on
		sentdm.api_key_file = '$SCRATCH/sentdm.key'
	CONF
	SERVER_STARTED=yes
	as_user "$PG_BIN/pg_ctl" -D "$SCRATCH/data" -l "$SCRATCH/server.log" -s -w start
	client -d postgres -c "CREATE DATABASE shop"
}

# The shop's web application, as far as it matters here: it takes the webhooks
# that Sent posts and hands each to the database, bytes and headers.
write_web_application() {
	as_user tee "$SCRATCH/webapp.py" >/dev/null <<'PYTHON'
import json, os, signal, subprocess, sys, time, urllib.request

signal.signal(signal.SIGINT, signal.SIG_DFL)
command, url, state, *psql = sys.argv[1:]

def control(path, body=None):
    data = body and json.dumps(body).encode()
    return json.load(urllib.request.urlopen(url + "/_control/" + path, data))

def quote(text):
    return "'" + text.replace("'", "''") + "'"

def relay():
    after = open(state).read() if os.path.exists(state) else "0"
    news = control("events?after=" + after)
    sql = ""
    for kind in dict.fromkeys(event["headers"]["X-Webhook-Event-Type"] for event in news["events"]):
        events = [event for event in news["events"] if event["headers"]["X-Webhook-Event-Type"] == kind]
        payloads = ", ".join(quote("\\x" + event["body"].encode().hex()) for event in events)
        headers = ", ".join(quote(json.dumps(event["headers"])) for event in events)
        sql += f"SELECT * FROM sentdm_receive_webhooks(ARRAY[{payloads}]::bytea[], ARRAY[{headers}]::jsonb[]);\n"
    if sql:
        subprocess.run(psql, input=sql, text=True, check=True, stdout=subprocess.DEVNULL)
    open(state, "w").write(str(news["next"]))

if command == "relay":
    relay()
elif command == "relay-always":
    while True:
        relay()
        time.sleep(0.2)
elif command == "receipt":      # headers and body of the first delivery receipt
    for event in control("events?limit=50")["events"]:
        if event["headers"]["X-Webhook-Event-Type"] == "message.delivered":
            print(json.dumps(event["headers"]), event["body"], sep="\n")
            break
elif command == "reply":
    control("inbound", {"from": "+14155550101", "channel": "whatsapp", "text": "Thank you!"})
elif command == "count":
    ledger = control("ledger/summary")
    print("Messages that the stand-in for Sent has accepted: {accepted_recipients},"
          " at most {max_effects_per_key} request per Idempotency-Key.\n".format(**ledger))
PYTHON
}

webapp() {
	as_user python3 "$SCRATCH/webapp.py" "$1" "$URL" "$SCRATCH/handed_on" "${PSQL[@]}" -d shop
}

# Showing

client() {
	as_user "${PSQL[@]}" "$@"
}

is_true() {
	[[ $(client -d shop -A -t -c "SELECT $1") == t ]]
}

heading() {
	printf '%s--- %s ---%s\n\n' "$BOLD" "$1" "$PLAIN"
}

# Show each paragraph of standard input and what psql answers to it.
sql() {
	local paragraph
	while IFS= read -r -d '' paragraph; do
		printf '%s%s%s\n' "$BOLD" "$paragraph" "$PLAIN"
		client -d shop "$@" -f - <<<"$paragraph"
	done < <(awk 'BEGIN { RS = "" } { printf "%s%c", $0, 0 }')
}

# Wait until all that is due has been sent.
settle() {
	wait_until $WAIT_S is_true "NOT EXISTS (SELECT FROM sentdm.outbox WHERE due_at <= now())" ||
		die "messages are still waiting"
}

relay_makes_true() {
	webapp relay && is_true "$1"
}

# Hand on webhooks until a condition is true.
receive_until() {
	wait_until $WAIT_S relay_makes_true "$1" || die "a receipt did not come"
}

# The story

enable() {
	heading "Sending starts where an administrator says so"
	sql <<'SQL'
CREATE EXTENSION sentdm;
SELECT sentdm_enable();
SQL
}

first_message() {
	heading "The first message"
	sql <<'SQL'
SELECT sentdm_send('+14155550101', 'order_confirmation', '{"name": "Ada", "order_id": 1001}');
SQL
	settle
	sql <<'SQL'
SELECT recipient, state, status, attempts, finished_at - created_at AS took FROM sentdm.status;
SQL
}

rollback() {
	heading "What is rolled back never leaves"
	sql <<'SQL'
BEGIN;
SELECT sentdm_send('+14155550199', body => 'Nobody will read this');
ROLLBACK;

SELECT count(*) AS messages FROM sentdm.messages;
SQL
	settle
	webapp count
}

batch() {
	heading "A batch: what is wrong with an item is said, the others go"
	sql <<'SQL'
SELECT * FROM sentdm_send_batch('[
    {"recipient": "+14155550102", "template": "welcome", "parameters": {"name": "Bob"}},
    {"recipient": "415-555-0103", "template": "welcome", "parameters": {"name": "Eve"}},
    {"recipient": "+14155550103", "body": "Welcome, Eve!", "channels": ["sms"]}]');
SQL
}

campaign() {
	heading "A campaign: 1,500 recipients, one request per 1,000"
	sql <<'SQL'
SELECT sentdm_send(array_agg('+1415556' || n), 'spring_sale',
                   channels => '{whatsapp}', tag => 'spring', priority => 'bulk')
FROM generate_series(1001, 2500) AS n;
SQL
}

trigger() {
	heading "From a trigger: the message commits with the order, once"
	sql <<'SQL'
CREATE TABLE orders (id int PRIMARY KEY, name text, phone text, status text DEFAULT 'new');
INSERT INTO orders VALUES (1002, 'Bob', '+14155550102'), (1003, 'Eve', '+14155550103');

CREATE FUNCTION tell_customer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM sentdm_send(NEW.phone, 'order_shipped',
                        jsonb_build_object('name', NEW.name, 'order_id', NEW.id),
                        unique_key => 'shipped-' || NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER shipped AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.status = 'shipped') EXECUTE FUNCTION tell_customer();

UPDATE orders SET status = 'shipped';
UPDATE orders SET status = 'shipped';

SELECT unique_key, request FROM sentdm.messages WHERE unique_key LIKE 'shipped-%';
SQL
}

password() {
	heading "A one-time password: before all others, and never too late"
	sql <<'SQL'
SELECT sentdm_send('+14155550101', 'otp', '{"code": "493021"}',
                   priority => 'high', expires_at => now() + interval '5 minutes');

SELECT sentdm_pause('maintenance');
SELECT sentdm_send('+14155550102', 'otp', '{"code": "771530"}', tag => 'late',
                   priority => 'high', expires_at => now() + interval '0.5 seconds');
SQL
	wait_until $WAIT_S is_true "(SELECT expires_at < now() FROM sentdm.messages WHERE tag = 'late')"
	sql <<'SQL'
SELECT sentdm_resume();
SQL
	settle
	sql <<'SQL'
SELECT recipient, state, error FROM sentdm.status WHERE tag = 'late';
SQL
}

schedule() {
	heading "Later, and called off"
	sql <<'SQL'
SELECT sentdm_send('+14155550103', body => 'We ring in an hour', tag => 'soon',
                   send_at => now() + interval '2 seconds');
SELECT sentdm_send('+14155550103', body => 'We ring in an hour', tag => 'tomorrow',
                   send_at => now() + interval '1 day');
SELECT sentdm_cancel(id) FROM sentdm.messages WHERE tag = 'tomorrow';

SELECT tag, state, send_at - created_at AS "in" FROM sentdm.status WHERE send_at IS NOT NULL;
SELECT priority, queued, due FROM sentdm.stat_outbox;
SQL
}

receipt_has_come() {
	webapp receipt >"$SCRATCH/receipt"
	[[ -s $SCRATCH/receipt ]]
}

receipts() {
	local headers body
	heading "Receipts: an application hands the webhooks that it gets to one function"
	sql <<<"SELECT sentdm_set_webhook_secret('$SECRET');"
	wait_until $WAIT_S receipt_has_come || die "there is no receipt"
	{ read -r headers && read -r body; } <"$SCRATCH/receipt"
	printf '%s\n\n%s\n\n' "$headers" "$body"
	sql -v "headers=$headers" -v "body=$body" <<'SQL'
SELECT * FROM sentdm_receive_webhook(convert_to(:'body', 'UTF8'), :'headers');

-- the same again
SELECT * FROM sentdm_receive_webhook(convert_to(:'body', 'UTF8'), :'headers');

-- the same, but somebody has changed it
SELECT * FROM sentdm_receive_webhook(convert_to(replace(:'body', 'DELIVERED', 'READ'), 'UTF8'), :'headers');
SQL
}

statuses() {
	heading "Statuses move as receipts come: one message is read, one fails"
	sql <<'SQL'
SELECT sentdm_send('+14155550101', body => 'We are at your door', channels => '{whatsapp}', tag => 'door');
SELECT sentdm_send('+14155550001', body => 'We are at your door', channels => '{whatsapp}', tag => 'door');
SQL
	receive_until "(SELECT array_agg(status ORDER BY status) = '{failed,read}' FROM sentdm.status WHERE tag = 'door')"
	sql <<'SQL'
SELECT recipient, status, error_code, error FROM sentdm.status WHERE tag = 'door';

SELECT recipient, string_agg(event, ', ' ORDER BY events.id) AS events
FROM sentdm.status JOIN sentdm.events USING (sent_id) WHERE tag = 'door' GROUP BY recipient;
SQL
	heading "How far is the campaign?"
	receive_until "(SELECT delivered = total FROM sentdm.progress WHERE tag = 'spring')"
	sql <<'SQL'
SELECT tag, total, queued, accepted, delivered, failed, percent FROM sentdm.progress WHERE tag = 'spring';
SQL
}

departure() {
	heading "Meanwhile the scheduled message has left"
	wait_until $WAIT_S is_true "(SELECT state <> 'queued' FROM sentdm.messages WHERE tag = 'soon')" ||
		die "the scheduled message did not leave"
	sql <<'SQL'
SELECT recipient, state, finished_at - created_at AS after FROM sentdm.status WHERE tag = 'soon';
SQL
}

replies() {
	heading "A customer answers"
	webapp reply
	receive_until "EXISTS (SELECT FROM sentdm.inbound)"
	sql <<'SQL'
SELECT contact, channel, text FROM sentdm.inbound;
SQL
}

operating() {
	heading "What a person must look at"
	sql <<'SQL'
SELECT sentdm_send('+14155550102', 'missing_template');
SQL
	settle
	sql <<'SQL'
SELECT problem, error_code, detail, hint FROM sentdm.problems;

SELECT * FROM sentdm_health();

SELECT state, count(*) AS messages, sum(jsonb_array_length(request -> 'to')) AS recipients
FROM sentdm.messages GROUP BY state ORDER BY state;
SQL
	webapp count
}

# With --keep

leave_running() {
	"${AS_USER[@]}" setsid python3 "$SCRATCH/webapp.py" relay-always "$URL" "$SCRATCH/handed_on" \
		"${PSQL[@]}" -d shop </dev/null >/dev/null 2>"$SCRATCH/relay.log" &
	as_user tee "$SCRATCH/stop" >/dev/null <<-STOP
		#!/bin/sh
		# End what demo.sh --keep has left running, and remove it.
		cd /
		kill $! $STANDIN_PID
		${AS_USER[*]} $PG_BIN/pg_ctl -D $SCRATCH/data -s -m immediate stop
		rm -rf $SCRATCH
	STOP
	as_user chmod 755 "$SCRATCH/stop"
	trap - EXIT
	heading "Server, stand-in and receipts go on"
	printf 'To look around:  %s -h %s -p %s -U postgres shop\n' "$PG_BIN/psql" "$SCRATCH" $PORT
	printf 'To stop:         %s\n' "$SCRATCH/stop"
}

main() {
	local keep=
	[[ $# -eq 0 || $* == --keep ]] || die "usage: $0 [--keep]"
	[[ $# -eq 0 ]] || keep=yes
	trap stop_everything EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM

	install_missing
	find_pg_config
	choose_user
	make_scratch sentdm-demo
	cd "$SCRATCH"
	printf 'Building for %s in %s\n\n' "$("$PG_CONFIG" --version)" "$SCRATCH"
	build_private_server
	PSQL=("$PG_BIN/psql" -X -q -h "$SCRATCH" -p $PORT -U postgres -v ON_ERROR_STOP=1 -P pager=off -P footer=off)
	write_web_application
	start_standin
	start_server

	enable
	first_message
	rollback
	batch
	campaign
	trigger
	password
	schedule
	receipts
	statuses
	departure
	replies
	operating
	[[ ! $keep ]] || leave_running
}

main "$@"
