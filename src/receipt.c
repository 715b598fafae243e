/*
 * receipt.c
 *		Keep authentic events, and apply what they say to the deliveries and
 *		opt-outs.
 *
 * Events come twice, late and in any order, and many receivers record them at
 * the same time.  What a delivery ends up as must not depend on any of that, nor
 * on how events were grouped into batches.  Whatever is written is written in
 * the order of its unique key, so that concurrent callers, and the worker, which
 * does the same, wait for each other but never in a circle.
 */
#include "postgres.h"

#include <openssl/sha.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "notify.h"
#include "receipt.h"
#include "sql.h"
#include "status.h"
#include "transact.h"

/* An array has to fit into 1 GB, and jsonb may be several times its text. */
#define MAX_STATEMENT_BYTES (256 * 1024 * 1024)

/* The columns of one statement, each an array with an element per row. */
#define MAX_COLUMNS 10

typedef struct Columns
{
	int			nrows;
	Datum	   *values[MAX_COLUMNS];
	bool	   *nulls[MAX_COLUMNS];
} Columns;

static void
allocate_columns(Columns *columns, int ncolumns, int nrows)
{
	columns->nrows = 0;
	for (int c = 0; c < ncolumns; c++)
	{
		columns->values[c] = palloc(nrows * sizeof(Datum));
		columns->nulls[c] = palloc(nrows * sizeof(bool));
	}
}

/* Set a column of the row that is being added. */
static void
set_column(Columns *columns, int c, Datum value, bool isnull)
{
	columns->values[c][columns->nrows] = value;
	columns->nulls[c][columns->nrows] = isnull;
}

static void
set_text(Columns *columns, int c, const char *string)
{
	set_column(columns, c, string ? CStringGetTextDatum(string) : (Datum) 0, string == NULL);
}

/* The columns as one-dimensional arrays of these types. */
static void
columns_to_arrays(const Columns *columns, const Oid *types, int ncolumns, Datum *arrays)
{
	for (int c = 0; c < ncolumns; c++)
		arrays[c] = sentdm_array(columns->values[c], columns->nulls[c], columns->nrows, types[c]);
}

/* Run a statement whose arguments are such arrays. */
static void
execute_columns(SentdmStatement *statement, const Columns *columns, const Oid *types)
{
	Datum		values[MAX_COLUMNS];

	columns_to_arrays(columns, types, statement->nargs, values);
	sentdm_execute(statement, values, NULL);
}

/* The API's log of events has what a payload says, but not its bytes. */
void
sentdm_receipt_set_key(SentdmReceipt *receipt)
{
	unsigned char hash[SHA256_DIGEST_LENGTH];
	char	   *identity = receipt->event.identity;

	if (identity == NULL && receipt->payload != NULL)
		identity = JsonbToCString(NULL, &receipt->payload->root, VARSIZE(receipt->payload));
	if (SHA256((const unsigned char *) (identity ? identity : VARDATA_ANY(receipt->raw)),
			   identity ? strlen(identity) : VARSIZE_ANY_EXHDR(receipt->raw), hash) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not compute a hash")));
	memcpy(receipt->dedupe_key, hash, SENTDM_DEDUPE_KEY_LEN);
	if (identity != receipt->event.identity)
		pfree(identity);
}

/* Order by key; of the same key, by arrival. */
static int
compare_keys(const void *a, const void *b)
{
	const SentdmReceipt *left = *(SentdmReceipt *const *) a;
	const SentdmReceipt *right = *(SentdmReceipt *const *) b;
	int			order = memcmp(left->dedupe_key, right->dedupe_key, SENTDM_DEDUPE_KEY_LEN);

	if (order != 0)
		return order;
	return left < right ? -1 : left > right;
}

static bool
same_key(const SentdmReceipt *a, const SentdmReceipt *b)
{
	return memcmp(a->dedupe_key, b->dedupe_key, SENTDM_DEDUPE_KEY_LEN) == 0;
}

/* How many of the sorted receipts, from the first on, are the same event. */
static int
count_copies(SentdmReceipt **sorted, int n)
{
	int			copies = 1;

	while (copies < n && same_key(sorted[0], sorted[copies]))
		copies++;
	return copies;
}

static Size
stored_bytes(const SentdmReceipt *receipt)
{
	return receipt->payload ? VARSIZE(receipt->payload) : VARSIZE_ANY(receipt->raw);
}

/* The types of the columns of an event, in their order. */
static const Oid event_types[] = {
	TEXTOID, UUIDOID, TIMESTAMPTZOID, JSONBOID, BYTEAOID, TEXTOID, INT4OID, BOOLOID, TEXTOID, BYTEAOID
};

static void
add_event(Columns *columns, const SentdmReceipt *receipt, int copies)
{
	const SentdmEvent *event = &receipt->event;
	bytea	   *key = palloc(VARHDRSZ + SENTDM_DEDUPE_KEY_LEN);

	SET_VARSIZE(key, VARHDRSZ + SENTDM_DEDUPE_KEY_LEN);
	memcpy(VARDATA(key), receipt->dedupe_key, SENTDM_DEDUPE_KEY_LEN);

	set_text(columns, 0, event->name);
	set_column(columns, 1, UUIDPGetDatum(&event->sent_id), !event->has_sent_id);
	set_column(columns, 2, TimestampTzGetDatum(event->occurred_at), event->occurred_at == DT_NOBEGIN);
	set_column(columns, 3, JsonbPGetDatum(receipt->payload), receipt->payload == NULL);
	set_column(columns, 4, PointerGetDatum(receipt->raw), receipt->raw == NULL);
	set_text(columns, 5, receipt->raw_reason);
	set_column(columns, 6, Int32GetDatum(copies - 1), false);
	set_column(columns, 7, BoolGetDatum(receipt->late), false);
	set_column(columns, 8, PointerGetDatum(receipt->webhook_id), receipt->webhook_id == NULL);
	set_column(columns, 9, PointerGetDatum(key), false);
	columns->nrows++;
}

/* The first of the sorted receipts with a key; n if there is none. */
static int
find_key(SentdmReceipt **sorted, int n, const bytea *key)
{
	int			low = 0;
	int			high = n;

	/* A trigger of the user's could have changed it. */
	if (VARSIZE_ANY_EXHDR(key) != SENTDM_DEDUPE_KEY_LEN)
		return n;
	while (low < high)
	{
		int			middle = (low + high) / 2;

		if (memcmp(sorted[middle]->dedupe_key, VARDATA_ANY(key), SENTDM_DEDUPE_KEY_LEN) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	if (low < n && memcmp(sorted[low]->dedupe_key, VARDATA_ANY(key), SENTDM_DEDUPE_KEY_LEN) != 0)
		return n;
	return low;
}

/*
 * Take over one row that was returned: the event's id, and how often it has come
 * again.  An event is new if that is less often than it came just now; so this
 * needs no look at system columns.
 */
static void
take_id(SentdmReceipt **sorted, int n, HeapTuple row, TupleDesc desc)
{
	bool		isnull;
	int64		id = DatumGetInt64(SPI_getbinval(row, desc, 1, &isnull));
	int32		duplicates = DatumGetInt32(SPI_getbinval(row, desc, 2, &isnull));
	bytea	   *key = DatumGetByteaPP(SPI_getbinval(row, desc, 3, &isnull));
	int			first = find_key(sorted, n, key);
	int			copies;

	if (first == n)
		return;
	copies = count_copies(sorted + first, n - first);
	for (int i = 0; i < copies; i++)
	{
		sorted[first + i]->id = id;
		sorted[first + i]->duplicate = i > 0 || duplicates >= copies;
	}
}

#define STORE_EVENTS(on_conflict) { \
	.sql = "INSERT INTO sentdm.events AS e" \
	" (event, sent_id, occurred_at, payload, raw, reason, duplicates, late, webhook_id, dedupe_key)" \
	" SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) " \
	"ON CONFLICT (dedupe_key) " on_conflict " RETURNING id, duplicates, dedupe_key", \
	.nargs = 10, \
	.types = {TEXTARRAYOID, UUIDARRAYOID, TIMESTAMPTZARRAYOID, JSONBARRAYOID, BYTEAARRAYOID, \
	TEXTARRAYOID, INT4ARRAYOID, BOOLARRAYOID, TEXTARRAYOID, BYTEAARRAYOID} \
}

/*
 * Store some of the sorted receipts, each event once; returns how many of them.
 * That is all, unless they are too big for one statement.
 */
static int
store_events(SentdmReceipt **sorted, int n, bool count_known)
{
	static SentdmStatement store = STORE_EVENTS("DO UPDATE SET duplicates = e.duplicates + excluded.duplicates + 1");
	static SentdmStatement store_new = STORE_EVENTS("DO NOTHING");
	Columns		columns;
	Size		bytes = 0;
	int			taken = 0;

	allocate_columns(&columns, lengthof(event_types), n);
	while (taken < n && (taken == 0 || bytes + stored_bytes(sorted[taken]) <= MAX_STATEMENT_BYTES))
	{
		int			copies = count_copies(sorted + taken, n - taken);

		bytes += stored_bytes(sorted[taken]);
		add_event(&columns, sorted[taken], copies);
		taken += copies;
	}
	execute_columns(count_known ? &store : &store_new, &columns, event_types);
	for (uint64 i = 0; i < SPI_processed; i++)
		take_id(sorted, taken, SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	return taken;
}

/* Does the event change a delivery? */
static bool
has_status(const SentdmReceipt *receipt)
{
	return !receipt->duplicate && receipt->event.has_sent_id && receipt->event.status != NULL;
}

/* Order by message; of the same message, by arrival. */
static int
compare_messages(const void *a, const void *b)
{
	const SentdmReceipt *left = *(SentdmReceipt *const *) a;
	const SentdmReceipt *right = *(SentdmReceipt *const *) b;
	int			order = memcmp(&left->event.sent_id, &right->event.sent_id, UUID_LEN);

	if (order != 0)
		return order;
	return left < right ? -1 : left > right;
}

static bool
same_message(const SentdmReceipt *a, const SentdmReceipt *b)
{
	return memcmp(&a->event.sent_id, &b->event.sent_id, UUID_LEN) == 0;
}

static bool
has_time(const SentdmReceipt *receipt)
{
	return receipt->event.occurred_at != DT_NOBEGIN;
}

/*
 * Does the status of an event win over that of an earlier arrival?  Both have a
 * time, or neither has.
 */
static bool
wins(const SentdmEvent *event, const SentdmEvent *earlier)
{
	if (event->occurred_at != earlier->occurred_at)
		return event->occurred_at > earlier->occurred_at;
	return sentdm_rank_of_status(event->status) > sentdm_rank_of_status(earlier->status);
}

/* The types of the columns of a status, in their order. */
static const Oid status_types[] = {
	UUIDOID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TEXTOID, TEXTOID
};

/*
 * Add the status that wins among the receipts of one message.  What it does not
 * know of the recipient and the channel, the others may.
 */
static void
add_status(Columns *columns, SentdmReceipt **same, int n)
{
	const SentdmEvent *winner = &same[0]->event;
	const char *recipient = NULL;
	const char *channel = NULL;

	for (int i = 0; i < n; i++)
	{
		const SentdmEvent *event = &same[i]->event;

		if (wins(event, winner))
			winner = event;
		recipient = recipient ? recipient : event->recipient;
		channel = event->channel ? event->channel : channel;
	}
	set_column(columns, 0, UUIDPGetDatum(&winner->sent_id), false);
	set_text(columns, 1, recipient);
	set_text(columns, 2, winner->channel ? winner->channel : channel);
	set_text(columns, 3, winner->status);
	set_column(columns, 4, TimestampTzGetDatum(winner->occurred_at), winner->occurred_at == DT_NOBEGIN);
	set_text(columns, 5, winner->reason_code);
	set_text(columns, 6, winner->reason);
	columns->nrows++;
}

/*
 * Apply statuses to the deliveries, one row per message.
 *
 * A later time wins, and of the same second the higher rank; so a status never
 * goes back because events came in disorder, and a message that is sent again
 * starts anew.  An event without a time can only advance, since nobody knows
 * what it is later than.  A message that we do not know gets a row of its own,
 * which settling our request, or nobody, will attach to a message.
 *
 * The recipient of a message never changes, and an older event may have the
 * sender in its place; so what is known stays.  Its channel does change, when
 * Sent falls back to another one.
 */
static void
apply_statuses(const Columns *columns)
{
	static SentdmNotifying apply = {.plain = {
			.sql = "INSERT INTO sentdm.deliveries AS d"
			" (sent_id, recipient, channel, status, status_at, reason_code, reason)"
			" SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7) "
			"ON CONFLICT (sent_id) DO UPDATE SET"
			"  recipient = coalesce(d.recipient, excluded.recipient),"
			"  channel = coalesce(excluded.channel, d.channel),"
			"  status = excluded.status,"
			"  status_at = coalesce(excluded.status_at, d.status_at),"
			"  reason_code = excluded.reason_code,"
			"  reason = excluded.reason "
			"WHERE excluded.status_at > coalesce(d.status_at, '-infinity')"
			"  OR (coalesce(excluded.status_at, d.status_at) IS NOT DISTINCT FROM d.status_at"
			"    AND sentdm.status_rank(excluded.status) > sentdm.status_rank(d.status))",
			.nargs = 7,
			.types = {UUIDARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZARRAYOID,
			TEXTARRAYOID, TEXTARRAYOID}
	},.returning = "d.message_id, d.status"};
	Datum		values[MAX_COLUMNS];

	columns_to_arrays(columns, status_types, lengthof(status_types), values);
	sentdm_execute_notifying(&apply, values);
}

/*
 * Of each message, apply the first of the sorted receipts, and move those that
 * are left to the front; returns how many.  A statement takes one row per message:
 * the winner, which can only be told among events that all have a time, or all
 * have none.  Nearly always that is all of them.
 */
static int
apply_turn(SentdmReceipt **sorted, int n)
{
	Columns		columns;
	int			left = 0;

	allocate_columns(&columns, lengthof(status_types), n);
	for (int i = 0; i < n;)
	{
		int			first = i;

		while (i < n && same_message(sorted[i], sorted[first]) &&
			   has_time(sorted[i]) == has_time(sorted[first]))
			i++;
		add_status(&columns, sorted + first, i - first);
		while (i < n && same_message(sorted[i], sorted[first]))
			sorted[left++] = sorted[i++];
	}
	apply_statuses(&columns);
	return left;
}

/* Leave out those that are there already, uncounted; returns how many are left. */
static int
keep_stored(SentdmReceipt **receipts, int n)
{
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (receipts[i]->id != 0)
			receipts[count++] = receipts[i];
	}
	return count;
}

/* Apply the statuses of those receipts that change one. */
static void
apply_all_statuses(SentdmReceipt **receipts, int n)
{
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		if (has_status(receipts[i]))
			receipts[count++] = receipts[i];
	}
	qsort(receipts, count, sizeof(SentdmReceipt *), compare_messages);
	while (count > 0)
		count = apply_turn(receipts, count);
}

/* The types of the columns of an opt-out, in their order. */
static const Oid optout_types[] = {TEXTOID, BOOLOID, TIMESTAMPTZOID, TEXTOID};

static void
add_consent(Columns *columns, const SentdmEvent *event)
{
	set_text(columns, 0, event->contact);
	set_column(columns, 1, BoolGetDatum(event->consent == SENTDM_OPTED_OUT), false);
	set_column(columns, 2, TimestampTzGetDatum(event->occurred_at), event->occurred_at == DT_NOBEGIN);
	set_text(columns, 3, event->name);
	columns->nrows++;
}

/*
 * Apply what new events say about whom to write to.  The later word wins; of two
 * in the same second, no.
 */
static void
apply_consents(SentdmReceipt **receipts, int n)
{
	static SentdmStatement apply = {
		.sql = "INSERT INTO sentdm.optouts AS o (phone, opted_out, since, source)"
		" SELECT DISTINCT ON (n.phone) n.phone, n.opted_out, coalesce(n.since, pg_catalog.now()) AS at, n.source"
		" FROM unnest($1, $2, $3, $4) AS n(phone, opted_out, since, source)"
		" ORDER BY n.phone, at DESC, n.opted_out DESC "
		"ON CONFLICT (phone) DO UPDATE SET opted_out = excluded.opted_out, since = excluded.since,"
		"  source = excluded.source "
		"WHERE (excluded.since, excluded.opted_out) > (o.since, o.opted_out)",
		.nargs = 4,
		.types = {TEXTARRAYOID, BOOLARRAYOID, TIMESTAMPTZARRAYOID, TEXTARRAYOID}
	};
	Columns		columns;

	allocate_columns(&columns, apply.nargs, n);
	for (int i = 0; i < n; i++)
	{
		if (!receipts[i]->duplicate &&
			receipts[i]->event.consent != SENTDM_CONSENT_UNKNOWN)
			add_consent(&columns, &receipts[i]->event);
	}
	if (columns.nrows > 0)
		execute_columns(&apply, &columns, optout_types);
}

/* What is done with receipts; count_known is for the first. */
typedef void (*Work) (SentdmReceipt *receipts, int n, bool count_known);

static void
record(SentdmReceipt *receipts, int n, bool count_known)
{
	SentdmReceipt **sorted;
	int			count;

	SPI_connect();
	sorted = palloc(n * sizeof(SentdmReceipt *));
	for (int i = 0; i < n; i++)
	{
		sorted[i] = &receipts[i];
		receipts[i].id = 0;
		receipts[i].duplicate = false;
	}
	qsort(sorted, n, sizeof(SentdmReceipt *), compare_keys);
	for (int stored = 0; stored < n;)
		stored += store_events(sorted + stored, n - stored, count_known);
	count = keep_stored(sorted, n);
	apply_consents(sorted, count);
	apply_all_statuses(sorted, count);
	SPI_finish();
}

static void
apply(SentdmReceipt *receipts, int n, bool count_known)
{
	SentdmReceipt **pointers;

	SPI_connect();
	pointers = palloc(n * sizeof(SentdmReceipt *));
	for (int i = 0; i < n; i++)
		pointers[i] = &receipts[i];
	apply_all_statuses(pointers, n);
	SPI_finish();
}

/*
 * Do the work in a subtransaction; returns the SQLSTATE of the error that undid
 * it, 0 for none.  Errors that pass by themselves are the caller's.
 */
static int
try_work(Work work, SentdmReceipt *receipts, int n, bool count_known, bool without_triggers)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;
	int			sqlstate;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		int			level = NewGUCNestLevel();

		if (without_triggers)
			sentdm_without_triggers(true);
		work(receipts, n, count_known);
		AtEOXact_GUC(true, level);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	if (error == NULL)
		return 0;
	sqlstate = error->sqlerrcode;
	if (sentdm_error_may_pass(sqlstate) || without_triggers)
		ReThrowError(error);
	FreeErrorData(error);
	return sqlstate;
}

/*
 * Do the work for all receipts at once.  A trigger of the user's that raises an
 * error must cost no more than its own effect: then it is done one by one, and
 * for the one that the trigger refuses, without it.
 */
static void
work_through(Work work, SentdmReceipt *receipts, int n, bool count_known)
{
	if (n == 0 || try_work(work, receipts, n, count_known, false) == 0)
		return;
	for (int i = 0; i < n; i++)
	{
		int			sqlstate = try_work(work, &receipts[i], 1, count_known, false);

		if (sqlstate == 0)
			continue;
		(void) try_work(work, &receipts[i], 1, count_known, true);
		ereport(WARNING,
				(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
				 errmsg("an event of message %s was stored without firing triggers, because one raised an error (SQLSTATE %s)",
						receipts[i].event.has_sent_id ?
						DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&receipts[i].event.sent_id))) : "?",
						unpack_sql_state(sqlstate)),
				 errhint("Look at your triggers on the tables of sentdm.")));
	}
}

void
sentdm_receipts_record(SentdmReceipt *receipts, int n, bool count_known)
{
	work_through(record, receipts, n, count_known);
}

void
sentdm_receipts_apply(SentdmReceipt *receipts, int n)
{
	work_through(apply, receipts, n, false);
}
