/*
 * outbox.c
 *		The worker's side of the queue: all SQL that claims and settles.
 *
 * A row is looked up by "= ANY (ARRAY[x])" where "= x" would do: the planner can
 * then use the index in no other way.  When the statistics say that a table is
 * empty, as after an ANALYZE during a long load, it would else read all of the
 * index in its order and join afterwards.
 *
 * One drainer per database, so a claim needs no owner and no lease time.  The
 * outbox row is small and claims do not touch its indexes; the message itself is
 * written once, when its outcome is known.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "notify.h"
#include "outbox.h"
#include "sql.h"

static const char *const lane_names[SENTDM_LANES] = {"high", "normal", "bulk"};

#define ANSWER_PER_COPY 1024	/* bytes: ids, number, and a template's text */

/* Rows that one statement inserts: a bound for its memory. */
#define INSERT_AT_ONCE 2048

/* What is to be done about outcomes, each by statements of its own. */
typedef enum Fate
{
	ENDED,						/* the message came to an end */
	PART,						/* a part of a split request did */
	RETRY,
	RELEASE,
	SPLIT,
	FATES
} Fate;

static const char *const fate_names[FATES] = {"ended", "part", "retry", "release", "split"};

/* The columns of outcomes. */
enum
{
	FATE,
	ID,
	PART_NUMBER,
	STATE,
	ATTEMPTS,
	HTTP_STATUS,
	ERROR_CODE,
	ERROR_TEXT,
	REQUEST_ID,
	DUE_AT,
	AMBIGUOUS_SINCE,
	FIRST_TRIED_AT
};

static SentdmShape outcome_shape = {.name = "outcomes",.ncolumns = FIRST_TRIED_AT + 1,.columns = {
		{"fate", TEXTOID}, {"id", UUIDOID}, {"part", INT4OID}, {"state", TEXTOID}, {"attempts", INT4OID},
		{"http_status", INT4OID}, {"error_code", TEXTOID}, {"error", TEXTOID}, {"request_id", TEXTOID},
		{"due_at", TIMESTAMPTZOID}, {"ambiguous_since", TIMESTAMPTZOID}, {"first_tried_at", TIMESTAMPTZOID}
}};

int64
sentdm_outbox_rescue(int64 *suspects)
{
	static SentdmStatement rescue = {
		.sql = "WITH rescued AS ("
		"  UPDATE sentdm.outbox SET claimed_at = NULL, crashes = crashes + 1"
		"  WHERE claimed_at IS NOT NULL RETURNING crashes) "
		"SELECT count(*), count(*) FILTER (WHERE crashes > 1) FROM rescued"
	};
	int64		rescued;
	bool		isnull;

	SPI_connect();
	sentdm_execute(&rescue, NULL, NULL);
	rescued = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	*suspects = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	SPI_finish();
	return rescued;
}

void
sentdm_outbox_abandon(void)
{
	static SentdmStatement abandon = {
		.sql = "UPDATE sentdm.outbox SET claimed_at = NULL WHERE claimed_at IS NOT NULL"
	};

	SPI_connect();
	sentdm_execute(&abandon, NULL, NULL);
	SPI_finish();
}

static TimestampTz
timestamp_or(HeapTuple row, TupleDesc desc, int column, TimestampTz missing)
{
	bool		isnull;
	Datum		value = SPI_getbinval(row, desc, column, &isnull);

	return isnull ? missing : DatumGetTimestampTz(value);
}

/* What a claim returns, row by row: it may be too much to have all at once. */
typedef struct Claim
{
	DestReceiver receiver;		/* first, so that a pointer to it is one to us */
	SentdmLane	lane;
	MemoryContext memory;
	size_t	   *room;
	SentdmMessage **messages;
	int			n;
} Claim;

static TimestampTz
claimed_timestamp(TupleTableSlot *row, int column, TimestampTz missing)
{
	bool		isnull;
	Datum		value = slot_getattr(row, column, &isnull);

	return isnull ? missing : DatumGetTimestampTz(value);
}

static int
claimed_int(TupleTableSlot *row, int column)
{
	bool		isnull;
	Datum		value = slot_getattr(row, column, &isnull);

	return isnull ? 0 : DatumGetInt32(value);
}

/* A text in UTF-8, as it goes on the wire; NULL when it is NULL. */
static char *
claimed_utf8(TupleTableSlot *row, int column)
{
	bool		isnull;
	Datum		value = slot_getattr(row, column, &isnull);
	char	   *string;
	char	   *utf8;

	if (isnull)
		return NULL;
	string = TextDatumGetCString(value);
	utf8 = pg_server_to_any(string, strlen(string), PG_UTF8);
	if (utf8 != string)
		pfree(string);
	return utf8;
}

/*
 * An answer has a line for each recipient and channel, with the text; of a template
 * only its name is in the request.
 */
static size_t
longest_answer(const SentdmMessage *message)
{
	size_t		body = message->body ? strlen(message->body) : 0;

	return message->copies * (ANSWER_PER_COPY + 2 * body / message->recipients);
}

static SentdmMessage *
claimed_message(TupleTableSlot *row, SentdmLane lane)
{
	SentdmMessage *message = palloc0(sizeof(SentdmMessage));
	char	   *profile_id;
	bool		isnull;

	message->id = *DatumGetUUIDP(slot_getattr(row, 1, &isnull));
	message->part = claimed_int(row, 2);
	message->generation = claimed_int(row, 3);
	message->lane = lane;
	message->recipients = Max(claimed_int(row, 4), 1);
	message->copies = message->recipients * Max(claimed_int(row, 5), 1);
	message->attempts = claimed_int(row, 6);
	message->crashes = claimed_int(row, 7);
	message->claimed_at = claimed_timestamp(row, 8, 0);
	message->expires_at = claimed_timestamp(row, 9, DT_NOEND);
	message->ambiguous_since = claimed_timestamp(row, 10, 0);
	message->first_tried_at = claimed_timestamp(row, 11, 0);
	message->body = claimed_utf8(row, 12);
	profile_id = claimed_utf8(row, 13);
	message->place.due_at = claimed_timestamp(row, 14, 0);
	message->place.position = DatumGetInt64(slot_getattr(row, 15, &isnull));
	if (profile_id != NULL)
		strlcpy(message->profile_id, profile_id, sizeof(message->profile_id));
	message->answer_bytes = longest_answer(message);
	/* Alone it may go, whatever it takes. */
	message->bytes = Min(sizeof(SentdmMessage) + strlen(message->body ? message->body : "") + message->answer_bytes,
						 SENTDM_IN_HAND_BYTES / 2);
	return message;
}

static bool
take_claimed_row(TupleTableSlot *row, DestReceiver *receiver)
{
	Claim	   *claim = (Claim *) receiver;
	MemoryContext old = MemoryContextSwitchTo(claim->memory);
	SentdmMessage *message = claimed_message(row, claim->lane);

	message->left_out = message->bytes > *claim->room;
	if (message->left_out && message->body != NULL)
	{
		pfree(message->body);
		message->body = NULL;
	}
	if (!message->left_out)
		*claim->room -= message->bytes;
	claim->messages[claim->n++] = message;
	MemoryContextSwitchTo(old);
	return true;
}

static void
start_claim(DestReceiver *receiver, int operation, TupleDesc desc)
{
}

static void
end_claim(DestReceiver *receiver)
{
}

static int
compare_places(const void *a, const void *b)
{
	const SentdmPlace *left = &(*(SentdmMessage *const *) a)->place;
	const SentdmPlace *right = &(*(SentdmMessage *const *) b)->place;

	if (left->due_at != right->due_at)
		return left->due_at < right->due_at ? -1 : 1;
	return left->position < right->position ? -1 : left->position > right->position;
}

int
sentdm_outbox_claim(SentdmLane lane, const SentdmPlace *from, int limit, bool sandbox_only,
					size_t *room, MemoryContext memory, SentdmMessage **messages)
{
	static SentdmStatement claim = {
		.sql = "WITH due AS MATERIALIZED ("
		"  SELECT ctid, message_id, ambiguous_since, first_tried_at FROM sentdm.outbox"
		"  WHERE priority = $1 AND due_at <= pg_catalog.now() AND (due_at, position) >= ($4, $5)"
		"    AND claimed_at IS NULL AND (sandbox OR NOT $3)"
		"  ORDER BY due_at, position LIMIT $2 FOR UPDATE SKIP LOCKED) "
		"UPDATE sentdm.outbox o SET claimed_at = pg_catalog.now(),"
		"  ambiguous_since = coalesce(o.ambiguous_since, pg_catalog.now()),"
		"  first_tried_at = coalesce(o.first_tried_at, pg_catalog.now()) "
		"FROM due LEFT JOIN sentdm.messages m ON m.id = ANY (ARRAY[due.message_id])"
		" WHERE o.ctid OPERATOR(pg_catalog.=) due.ctid "
		"RETURNING o.message_id, o.part, m.generation,"
		"  coalesce(pg_catalog.cardinality(o.recipients), pg_catalog.jsonb_array_length(m.request -> 'to')),"
		"  pg_catalog.jsonb_array_length(m.request -> 'channel'),"
		"  o.attempts, o.crashes, o.claimed_at, o.expires_at, due.ambiguous_since, due.first_tried_at,"
		"  CASE WHEN o.recipients IS NULL THEN m.request"
		"    ELSE pg_catalog.jsonb_set(m.request, '{to}', pg_catalog.to_jsonb(o.recipients)) END::text,"
		"  m.profile_id::text, o.due_at, o.position",
		.nargs = 5,
		.types = {TEXTOID, INT4OID, BOOLOID, TIMESTAMPTZOID, INT8OID}
	};
	Datum		values[5];
	Claim		claimed = {
		.receiver = {take_claimed_row, start_claim, end_claim, end_claim, DestNone},
		.lane = lane,
		.memory = memory,
		.room = room,
		.messages = messages
	};

	SPI_connect();
	values[0] = CStringGetTextDatum(lane_names[lane]);
	values[1] = Int32GetDatum(limit);
	values[2] = BoolGetDatum(sandbox_only);
	values[3] = TimestampTzGetDatum(from->due_at);
	values[4] = Int64GetDatum(from->position);
	sentdm_execute_into(&claim, values, &claimed.receiver);
	SPI_finish();
	qsort(messages, claimed.n, sizeof(SentdmMessage *), compare_places);
	return claimed.n;
}

/*
 * The API's text is UTF-8.  A database in another encoding may have no form of
 * it, and an outcome must not fail to be stored for that: so it takes the ASCII.
 */
static char *
storable(const char *text_utf8)
{
	char	   *stored = palloc(strlen(text_utf8) + 1);
	char	   *next = stored;

	if (GetDatabaseEncoding() == PG_UTF8)
		return strcpy(stored, text_utf8);
	for (const char *c = text_utf8; *c; c++)
	{
		if (!IS_HIGHBIT_SET(*c))
			*next++ = *c;
		else if ((*c & 0xC0) != 0x80)
			*next++ = '?';		/* one for each character */
	}
	*next = '\0';
	return stored;
}

/* NULL for an empty or missing string. */
static void
set_storable(SentdmRows *rows, int column, const char *string)
{
	if (string != NULL && string[0] != '\0')
		sentdm_rows_set_text(rows, column, storable(string));
}

static const char *
state_of(SentdmAction action)
{
	switch (action)
	{
		case SENTDM_DO_ACCEPT:
			return "accepted";
		case SENTDM_DO_EXPIRE:
			return "expired";
		case SENTDM_DO_UNCERTAIN:
			return "uncertain";
		case SENTDM_DO_FAIL:
			return "failed";
		default:
			return "queued";
	}
}

/* An outcome of our own making says what happened in our own words. */
static const char *
error_of(const SentdmOutcome *outcome)
{
	const char *code = outcome->decision.error_code;

	if (code == NULL)
		return outcome->answer.error;
	if (strcmp(code, "expired") == 0)
		return "expired before it could be sent";
	if (strcmp(code, "expired_unknown") == 0)
		return "expired while it was unknown whether Sent had accepted it";
	if (strcmp(code, "outcome_unknown") == 0)
		return "it is unknown whether Sent accepted it";
	if (strcmp(code, "gave_up") == 0)
		return "Sent could not take it for longer than sentdm.give_up_after";
	if (strcmp(code, "worker_crash") == 0)
		return "the worker died each time that it was sent";
	return outcome->answer.error;
}

static Fate
fate_of(const SentdmOutcome *outcome)
{
	switch (outcome->decision.action)
	{
		case SENTDM_DO_RETRY:
			return RETRY;
		case SENTDM_DO_RELEASE:
			return RELEASE;
		case SENTDM_DO_SPLIT:
			return SPLIT;
		default:
			return outcome->message->part == 0 ? ENDED : PART;
	}
}

static void
add_outcome(SentdmRows *rows, const SentdmOutcome *outcome, TimestampTz now)
{
	const SentdmMessage *message = outcome->message;
	const SentdmDecision *decision = &outcome->decision;

	sentdm_rows_set_text(rows, FATE, fate_names[fate_of(outcome)]);
	sentdm_rows_set(rows, ID, UUIDPGetDatum(&message->id));
	sentdm_rows_set(rows, PART_NUMBER, Int32GetDatum(message->part));
	sentdm_rows_set_text(rows, STATE, state_of(decision->action));
	sentdm_rows_set(rows, ATTEMPTS, Int32GetDatum(message->attempts + (decision->charged ? 1 : 0)));
	if (outcome->http_status != 0)
		sentdm_rows_set(rows, HTTP_STATUS, Int32GetDatum(outcome->http_status));
	set_storable(rows, ERROR_CODE, decision->error_code ? decision->error_code : outcome->answer.error_code);
	set_storable(rows, ERROR_TEXT, error_of(outcome));
	set_storable(rows, REQUEST_ID, outcome->answer.request_id);
	sentdm_rows_set(rows, DUE_AT, TimestampTzGetDatum(now + decision->delay_ms * 1000));
	if (decision->ambiguous)
		sentdm_rows_set(rows, AMBIGUOUS_SINCE,
						TimestampTzGetDatum(message->ambiguous_since ? message->ambiguous_since : message->claimed_at));
	if (message->first_tried_at != 0)
		sentdm_rows_set(rows, FIRST_TRIED_AT, TimestampTzGetDatum(message->first_tried_at));
	sentdm_rows_add(rows);
}

/*
 * Parts of a split request: what was not accepted is noted per recipient, and
 * the last part to end decides the state of the whole.
 */
static void
settle_parts(void)
{
	static SentdmStatement note = {
		.sql = "INSERT INTO sentdm.deliveries (message_id, recipient, status, reason_code, reason) "
		"SELECT e.id, recipient, e.state, e.error_code, e.error FROM outcomes e"
		" JOIN sentdm.outbox o ON o.message_id = ANY (ARRAY[e.id]) AND o.part = e.part,"
		" pg_catalog.unnest(o.recipients) AS recipient "
		"WHERE e.fate = 'part' AND e.state <> 'accepted'"
	};
	static SentdmNotifying conclude =
	{
		.plain =
		{
			.sql = "WITH ended AS MATERIALIZED (SELECT * FROM outcomes WHERE fate = 'part'),"
			" gone AS (DELETE FROM sentdm.outbox o USING ended e"
			"  WHERE o.message_id = ANY (ARRAY[e.id]) AND o.part = e.part),"
			" whole AS (SELECT DISTINCT ON (id) e.* FROM ended e"
			"  WHERE NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = e.id AND NOT EXISTS"
			"    (SELECT FROM ended x WHERE x.id = o.message_id AND x.part = o.part)) ORDER BY id, part) "
			"UPDATE sentdm.messages m SET finished_at = pg_catalog.now(), attempts = w.attempts,"
			"  http_status = w.http_status, error_code = w.error_code, error = w.error, request_id = w.request_id,"
			"  state = CASE"
			"    WHEN w.state = 'uncertain' OR EXISTS (SELECT FROM sentdm.deliveries d"
			"      WHERE d.message_id = m.id AND d.sent_id IS NULL AND d.status = 'uncertain') THEN 'uncertain'"
			"    WHEN w.state = 'accepted' OR EXISTS (SELECT FROM sentdm.deliveries d"
			"      WHERE d.message_id = m.id AND d.sent_id IS NOT NULL) THEN 'accepted'"
			"    ELSE w.state END "
			"FROM whole w WHERE m.id = ANY (ARRAY[w.id])"
		},.returning = "m.id, m.state"
	};

	sentdm_execute(&note, NULL, NULL);
	sentdm_execute_notifying(&conclude);
}

/* Messages that came to an end, one way or another. */
static void
settle_ended(void)
{
	static SentdmNotifying end =
	{
		.plain =
		{
			.sql = "UPDATE sentdm.messages m SET state = e.state, attempts = e.attempts,"
			"  finished_at = pg_catalog.now(), http_status = e.http_status,"
			"  error_code = e.error_code, error = e.error, request_id = e.request_id "
			"FROM outcomes e WHERE e.fate = 'ended' AND m.id = ANY (ARRAY[e.id])"
		},.returning = "m.id, m.state"
	};

	sentdm_execute_notifying(&end);
}

/* Their places in the queue.  By an array, which is the cheapest way to name rows. */
static void
leave_queue(const SentdmOutcome *outcomes, int n)
{
	static SentdmStatement leave = {
		.sql = "DELETE FROM sentdm.outbox WHERE message_id = ANY ($1) AND part = 0",
		.nargs = 1,
		.types = {UUIDARRAYOID}
	};
	Datum	   *ids = palloc(n * sizeof(Datum));
	Datum		array;
	int			n_ended = 0;

	for (int i = 0; i < n; i++)
	{
		if (fate_of(&outcomes[i]) == ENDED)
			ids[n_ended++] = UUIDPGetDatum(&outcomes[i].message->id);
	}
	if (n_ended == 0)
		return;
	array = sentdm_array(ids, NULL, n_ended, UUIDOID);
	sentdm_execute(&leave, &array, NULL);
}

/* Messages that go back into the queue. */
static void
settle_retries(void)
{
	static SentdmStatement retry = {
		.sql = "UPDATE sentdm.outbox o SET claimed_at = NULL, crashes = 0, due_at = r.due_at,"
		"  attempts = r.attempts, ambiguous_since = r.ambiguous_since,"
		"  http_status = r.http_status, error_code = r.error_code, error = r.error "
		"FROM outcomes r WHERE r.fate = 'retry' AND o.message_id = ANY (ARRAY[r.id]) AND o.part = r.part"
	};

	sentdm_execute(&retry, NULL, NULL);
}

/*
 * Messages that were claimed ahead of their turn, and it did not come: as they
 * were before.
 */
static void
settle_released(void)
{
	static SentdmStatement release = {
		.sql = "UPDATE sentdm.outbox o SET claimed_at = NULL, ambiguous_since = r.ambiguous_since,"
		"  first_tried_at = r.first_tried_at "
		"FROM outcomes r WHERE r.fate = 'release' AND o.message_id = ANY (ARRAY[r.id]) AND o.part = r.part"
	};

	sentdm_execute(&release, NULL, NULL);
}

/* Requests that were refused because of some of their recipients: two halves. */
static void
settle_splits(void)
{
	static SentdmStatement split = {
		.sql = "WITH gone AS (DELETE FROM sentdm.outbox o USING outcomes s"
		"  WHERE s.fate = 'split' AND o.message_id = ANY (ARRAY[s.id]) AND o.part = s.part RETURNING o.*),"
		" whole AS (SELECT g.*, coalesce(g.recipients, ARRAY("
		"    SELECT pg_catalog.jsonb_array_elements_text(m.request -> 'to'))) AS everyone"
		"  FROM gone g JOIN sentdm.messages m ON m.id = ANY (ARRAY[g.message_id])) "
		"INSERT INTO sentdm.outbox (message_id, part, priority, due_at, expires_at, recipients, sandbox) "
		"SELECT message_id, 2 * part + half, priority, pg_catalog.now(), expires_at,"
		"  CASE half WHEN 1 THEN everyone[:pg_catalog.cardinality(everyone) / 2]"
		"    ELSE everyone[pg_catalog.cardinality(everyone) / 2 + 1:] END, sandbox "
		"FROM whole, (VALUES (1), (2)) AS halves(half)"
	};

	sentdm_execute(&split, NULL, NULL);
}

/* An id that Sent gave us, and whose message it is. */
typedef struct Delivery
{
	const char *packed;
	const SentdmMessage *message;
} Delivery;

static int
compare_deliveries(const void *a, const void *b)
{
	return memcmp(((const Delivery *) a)->packed, ((const Delivery *) b)->packed, UUID_LEN);
}

/* In order of sent_id, each once; returns how many. */
static int
sort_deliveries(const SentdmOutcome *outcomes, int n_outcomes, Delivery *deliveries)
{
	SentdmSent	sent;
	int			n = 0;
	int			kept = 0;

	for (int i = 0; i < n_outcomes; i++)
	{
		const char *packed = outcomes[i].answer.sent;

		for (int j = 0; j < outcomes[i].answer.n_sent; j++)
		{
			deliveries[n].packed = packed;
			deliveries[n++].message = outcomes[i].message;
			packed = sentdm_answer_sent(packed, &sent);
		}
	}
	qsort(deliveries, n, sizeof(Delivery), compare_deliveries);
	for (int i = 0; i < n; i++)
	{
		if (kept == 0 || compare_deliveries(&deliveries[kept - 1], &deliveries[i]) != 0)
			deliveries[kept++] = deliveries[i];
	}
	return kept;
}

static void
insert_deliveries(const Delivery *deliveries, int n)
{
	static SentdmNotifying insert =
	{
		.plain =
		{
			.sql = "INSERT INTO sentdm.deliveries AS d (sent_id, message_id, recipient, channel, status) "
			"SELECT sent_id, message_id, recipient, channel, 'queued' FROM sent "
			"ON CONFLICT (sent_id) DO UPDATE SET message_id = excluded.message_id,"
			"  recipient = coalesce(excluded.recipient, d.recipient),"
			"  channel = coalesce(d.channel, excluded.channel) "
			"WHERE d.message_id IS NULL"
		},.returning = "CASE WHEN d.status_at IS NOT NULL THEN d.message_id END, d.status"
	};
	static SentdmShape shape = {.name = "sent",.ncolumns = 4,.columns = {
			{"sent_id", UUIDOID}, {"message_id", UUIDOID}, {"recipient", TEXTOID}, {"channel", TEXTOID}
	}};
	SentdmRows	rows;

	sentdm_rows_begin(&rows, &shape);
	for (int i = 0; i < n; i++)
	{
		SentdmSent	sent;

		sentdm_answer_sent(deliveries[i].packed, &sent);
		sentdm_rows_set(&rows, 0, PointerGetDatum(sent.sent_id));
		sentdm_rows_set(&rows, 1, UUIDPGetDatum(&deliveries[i].message->id));
		sentdm_rows_set_text(&rows, 2, sent.recipient[0] ? sent.recipient : NULL);
		sentdm_rows_set_text(&rows, 3, sent.channel[0] ? sent.channel : NULL);
		sentdm_rows_add(&rows);
	}
	sentdm_rows_offer(&rows);
	sentdm_execute_notifying(&insert);
	sentdm_rows_end(&rows);
}

/*
 * The ids that Sent gave us.  A receipt may have arrived before: then the row is
 * there, and only learns which message it belongs to.  In order of sent_id, as
 * the receiver writes too, so that the two cannot deadlock.  There may be very
 * many, so it takes several statements.
 */
static void
settle_deliveries(const SentdmOutcome *outcomes, int n_outcomes)
{
	Delivery   *deliveries;
	int			n = 0;

	for (int i = 0; i < n_outcomes; i++)
		n += outcomes[i].answer.n_sent;
	if (n == 0)
		return;
	deliveries = palloc_extended(n * sizeof(Delivery), MCXT_ALLOC_HUGE);
	n = sort_deliveries(outcomes, n_outcomes, deliveries);
	for (int i = 0; i < n; i += INSERT_AT_ONCE)
		insert_deliveries(deliveries + i, Min(n - i, INSERT_AT_ONCE));
	pfree(deliveries);
}

void
sentdm_outbox_settle(SentdmOutcome *outcomes, int n)
{
	static void (*const settle[FATES]) (void) = {
		settle_ended, settle_parts, settle_retries, settle_released, settle_splits
	};
	SentdmRows	rows;
	bool		has[FATES] = {false};
	TimestampTz now = GetCurrentTimestamp();

	SPI_connect();
	settle_deliveries(outcomes, n);
	sentdm_rows_begin(&rows, &outcome_shape);
	for (int i = 0; i < n; i++)
	{
		add_outcome(&rows, &outcomes[i], now);
		has[fate_of(&outcomes[i])] = true;
	}
	leave_queue(outcomes, n);
	sentdm_rows_offer(&rows);
	for (int fate = 0; fate < FATES; fate++)
	{
		if (has[fate])
			settle[fate] ();
	}
	sentdm_rows_end(&rows);
	SPI_finish();
}

TimestampTz
sentdm_outbox_next_due(SentdmLane lane, const SentdmPlace *from, bool sandbox_only)
{
	static SentdmStatement next = {
		.sql = "SELECT due_at FROM sentdm.outbox"
		" WHERE priority = $1 AND (due_at, position) >= ($3, $4) AND claimed_at IS NULL AND (sandbox OR NOT $2)"
		" ORDER BY due_at, position LIMIT 1",
		.nargs = 4,
		.types = {TEXTOID, BOOLOID, TIMESTAMPTZOID, INT8OID}
	};
	Datum		values[4];
	TimestampTz due = DT_NOEND;

	SPI_connect();
	values[0] = CStringGetTextDatum(lane_names[lane]);
	values[1] = BoolGetDatum(sandbox_only);
	values[2] = TimestampTzGetDatum(from->due_at);
	values[3] = Int64GetDatum(from->position);
	if (sentdm_execute(&next, values, NULL) > 0)
		due = timestamp_or(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, DT_NOEND);
	SPI_finish();
	return due;
}
