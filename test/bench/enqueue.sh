# Measurements of enqueueing: what a transaction pays; to be sourced by run.sh.
# Nothing is sent meanwhile.

# enqueue_bulk TITLE [ARGUMENTS]: sends in one statement; the very same rows, ready
# made, by plain inserts
enqueue_bulk() {
	local n=50000 round ours send="SELECT count(sentdm_send(phone, 'order_confirmation', parameters${2:-})) FROM people"
	hold
	empty_tables
	sql -c "$send" >/dev/null
	sql -c "CREATE TABLE saved_messages AS SELECT * FROM sentdm.messages" -c "CREATE TABLE saved_outbox AS SELECT * FROM sentdm.outbox" \
		-c "VACUUM ANALYZE saved_messages" -c "VACUUM ANALYZE saved_outbox"
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		ours=$(timed "$send")
		[[ $(sql -c "SELECT count(*) FROM sentdm.outbox JOIN sentdm.messages m ON m.id = message_id") == $n ]] || die "not all was enqueued"
		sql -c "TRUNCATE plain.messages, plain.outbox" -c "CHECKPOINT"
		both "$1: of plain inserts" "$(per_second $n "$ours")" "$(per_second $n "$(timed \
			"INSERT INTO plain.messages SELECT * FROM saved_messages; INSERT INTO plain.outbox SELECT * FROM saved_outbox")")" rows/s
	done
	sql -c "DROP TABLE saved_messages, saved_outbox"
}

measure_enqueue_bulk() {
	enqueue_bulk "enqueue 50,000 in one statement"
	enqueue_bulk "enqueue 50,000 with a unique_key" ", unique_key => 'order ' || n"
}

# transactions CLIENTS SECONDS [OPTION...] < script: prints transactions per second
transactions() {
	local clients=$1 seconds=$2
	shift 2
	as_user tee "$SCRATCH/script.sql" >/dev/null
	as_user "$PG_BIN/pgbench" -n -M prepared -c "$clients" -j 1 -T "$seconds" "$@" -f "$SCRATCH/script.sql" \
		-h "$SCRATCH" -p $PORT -U postgres "$DB" 2>"$SCRATCH/pgbench.log" |
		awk '/^tps/ { printf "%.0f", $3; ok = 1 } /^number of failed/ && $5 != 0 { exit 1 } END { exit !ok }' ||
		{ cat "$SCRATCH/pgbench.log" >&2 && die "pgbench failed"; }
}

single_send() {
	cat <<-'SQL'
		SELECT sentdm_send('+14155550101', 'order_confirmation', '{"name": "Ada", "order_id": "1001"}');
	SQL
}

# An id that grows with the time, as ours does.
plain_insert() {
	cat <<-'SQL'
		WITH m AS (INSERT INTO plain.messages (id, request, priority, created_by)
			VALUES ((lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7' || right(md5(random()::text), 19))::uuid, '{"to": ["+14155550101"], "template": {"name": "order_confirmation", "parameters": {"name": "Ada", "order_id": "1001"}}}', 'normal', 'postgres') RETURNING id)
		INSERT INTO plain.outbox (message_id, priority, due_at, sandbox) SELECT id, 'normal', now(), false FROM m;
	SQL
}

# The worker must be there, and hold: its wake-up is part of the price.
measure_enqueue_single() {
	local round ours
	hold
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		ours=$(single_send | transactions 8 $SECONDS_EACH)
		sql -c "TRUNCATE plain.messages, plain.outbox" -c "CHECKPOINT"
		both "enqueue, 8 clients, single sends: of plain inserts" "$ours" "$(plain_insert | transactions 8 $SECONDS_EACH)" tps
		[[ $(sql -c "SELECT (SELECT count(*) FROM sentdm.outbox) > 0 AND (SELECT count(*) FROM plain.outbox) > 0") == t ]] || die "nothing was enqueued"
	done
}

# The same from a trigger; the reference is a trigger in PL/pgSQL that inserts the same.
measure_enqueue_trigger() {
	local round ours
	hold
	sql -f - <<-'SQL'
		CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, phone text);
		CREATE TABLE plain.orders (LIKE orders INCLUDING ALL);
		CREATE TRIGGER confirm AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger(
			'recipient=phone', 'template=order_confirmation', 'parameters.name=name', 'parameters.order_id=id');
		CREATE FUNCTION plain.confirm() RETURNS trigger LANGUAGE plpgsql AS $$
		DECLARE
			new_id uuid := (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7' || right(md5(random()::text), 19))::uuid;
		BEGIN
			INSERT INTO plain.messages (id, request, priority, created_by)
			VALUES (new_id, jsonb_build_object('to', jsonb_build_array(NEW.phone), 'template', jsonb_build_object('name', 'order_confirmation',
				'parameters', jsonb_build_object('name', NEW.name, 'order_id', NEW.id::text))), 'normal', 'postgres');
			INSERT INTO plain.outbox (message_id, priority, due_at, sandbox) VALUES (new_id, 'normal', now(), false);
			RETURN NULL;
		END $$;
		CREATE TRIGGER confirm AFTER INSERT ON plain.orders FOR EACH ROW EXECUTE FUNCTION plain.confirm();
	SQL
	for ((round = 0; round < ROUNDS; round++)); do
		empty_tables
		sql -c "TRUNCATE orders"
		ours=$(transactions 8 $SECONDS_EACH <<<"INSERT INTO orders (name, phone) VALUES ('Ada', '+14155550101');")
		[[ $(sql -c "SELECT (SELECT count(*) FROM orders) = count(*) FROM sentdm.outbox") == t ]] || die "not every order sent a message"
		sql -c "TRUNCATE plain.messages, plain.outbox, plain.orders" -c "CHECKPOINT"
		both "enqueue, 8 clients, from a row trigger: of a trigger with plain inserts" "$ours" \
			"$(transactions 8 $SECONDS_EACH <<<"INSERT INTO plain.orders (name, phone) VALUES ('Ada', '+14155550101');")" tps
	done
	sql -c "DROP TABLE orders, plain.orders" -c "DROP FUNCTION plain.confirm"
}

# Three sessions that live long: is the last send as fast as the first?
measure_session() {
	local session first last
	hold
	empty_tables
	single_send | transactions $ROUNDS $SESSION_S -l --log-prefix="$SCRATCH/session" >/dev/null
	cat "$SCRATCH"/session.* | python3 "$SCRATCH/src/test/bench/report.py" session 5 >"$SCRATCH/sessions"
	while read -r session first last; do
		both "single sends over $SESSION_S s in one session: p50 of the last 5 s, of the first" "$last" "$first" ms
	done <"$SCRATCH/sessions"
	empty_tables
}
