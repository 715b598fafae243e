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

/* What one statement stores: a bound for its memory. */
#define MAX_STATEMENT_BYTES (64 * 1024 * 1024)

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

/* Columns that an event has or has not. */
static void
set_time(SentdmRows *rows, int column, TimestampTz time)
{
	if (time != DT_NOBEGIN)
		sentdm_rows_set(rows, column, TimestampTzGetDatum(time));
}

static void
set_pointer(SentdmRows *rows, int column, const void *value)
{
	if (value != NULL)
		sentdm_rows_set(rows, column, PointerGetDatum(value));
}

static void
add_event(SentdmRows *rows, const SentdmReceipt *receipt, int copies)
{
	const SentdmEvent *event = &receipt->event;
	bytea	   *key = palloc(VARHDRSZ + SENTDM_DEDUPE_KEY_LEN);

	SET_VARSIZE(key, VARHDRSZ + SENTDM_DEDUPE_KEY_LEN);
	memcpy(VARDATA(key), receipt->dedupe_key, SENTDM_DEDUPE_KEY_LEN);

	sentdm_rows_set_text(rows, 0, event->name);
	set_pointer(rows, 1, event->has_sent_id ? &event->sent_id : NULL);
	set_time(rows, 2, event->occurred_at);
	set_pointer(rows, 3, receipt->payload);
	set_pointer(rows, 4, receipt->raw);
	sentdm_rows_set_text(rows, 5, receipt->raw_reason);
	sentdm_rows_set(rows, 6, Int32GetDatum(copies - 1));
	sentdm_rows_set(rows, 7, BoolGetDatum(receipt->late));
	set_pointer(rows, 8, receipt->webhook_id);
	set_pointer(rows, 9, key);
	sentdm_rows_add(rows);
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
	" SELECT * FROM received " \
	"ON CONFLICT (sent_id, dedupe_key) " on_conflict " RETURNING id, duplicates, dedupe_key" \
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
	static SentdmShape shape = {.name = "received",.ncolumns = 10,.columns = {
			{"event", TEXTOID}, {"sent_id", UUIDOID}, {"occurred_at", TIMESTAMPTZOID}, {"payload", JSONBOID},
			{"raw", BYTEAOID}, {"reason", TEXTOID}, {"duplicates", INT4OID}, {"late", BOOLOID},
			{"webhook_id", TEXTOID}, {"dedupe_key", BYTEAOID}
	}};
	SentdmRows	rows;
	Size		bytes = 0;
	int			taken = 0;

	sentdm_rows_begin(&rows, &shape);
	while (taken < n && (taken == 0 || bytes + stored_bytes(sorted[taken]) <= MAX_STATEMENT_BYTES))
	{
		int			copies = count_copies(sorted + taken, n - taken);

		bytes += stored_bytes(sorted[taken]);
		add_event(&rows, sorted[taken], copies);
		taken += copies;
	}
	sentdm_rows_offer(&rows);
	sentdm_execute(count_known ? &store : &store_new, NULL, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
		take_id(sorted, taken, SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	sentdm_rows_end(&rows);
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

/*
 * Add the status that wins among the receipts of one message.  What it does not
 * know of the recipient and the channel, the others may.
 */
static void
add_status(SentdmRows *rows, SentdmReceipt **same, int n)
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
	set_pointer(rows, 0, &winner->sent_id);
	sentdm_rows_set_text(rows, 1, recipient);
	sentdm_rows_set_text(rows, 2, winner->channel ? winner->channel : channel);
	sentdm_rows_set_text(rows, 3, winner->status);
	set_time(rows, 4, winner->occurred_at);
	sentdm_rows_set_text(rows, 5, winner->reason_code);
	sentdm_rows_set_text(rows, 6, winner->reason);
	sentdm_rows_add(rows);
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
apply_statuses(SentdmRows *statuses)
{
	static SentdmNotifying apply = {.plain = {
			.sql = "INSERT INTO sentdm.deliveries AS d"
			" (sent_id, recipient, channel, status, status_at, reason_code, reason)"
			" SELECT * FROM statuses "
			"ON CONFLICT (sent_id) DO UPDATE SET"
			"  recipient = coalesce(d.recipient, excluded.recipient),"
			"  channel = coalesce(excluded.channel, d.channel),"
			"  status = excluded.status,"
			"  status_at = coalesce(excluded.status_at, d.status_at),"
			"  reason_code = excluded.reason_code,"
			"  reason = excluded.reason "
			"WHERE excluded.status_at > coalesce(d.status_at, '-infinity')"
			"  OR (coalesce(excluded.status_at, d.status_at) IS NOT DISTINCT FROM d.status_at"
			"    AND sentdm.status_rank(excluded.status) > sentdm.status_rank(d.status))"
	},.returning = "d.message_id, d.status"};

	sentdm_rows_offer(statuses);
	sentdm_execute_notifying(&apply);
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
	static SentdmShape shape = {.name = "statuses",.ncolumns = 7,.columns = {
			{"sent_id", UUIDOID}, {"recipient", TEXTOID}, {"channel", TEXTOID}, {"status", TEXTOID},
			{"status_at", TIMESTAMPTZOID}, {"reason_code", TEXTOID}, {"reason", TEXTOID}
	}};
	SentdmRows	statuses;
	int			left = 0;

	sentdm_rows_begin(&statuses, &shape);
	for (int i = 0; i < n;)
	{
		int			first = i;

		while (i < n && same_message(sorted[i], sorted[first]) &&
			   has_time(sorted[i]) == has_time(sorted[first]))
			i++;
		add_status(&statuses, sorted + first, i - first);
		while (i < n && same_message(sorted[i], sorted[first]))
			sorted[left++] = sorted[i++];
	}
	apply_statuses(&statuses);
	sentdm_rows_end(&statuses);
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

static void
add_consent(SentdmRows *rows, const SentdmEvent *event)
{
	sentdm_rows_set_text(rows, 0, event->contact);
	sentdm_rows_set(rows, 1, BoolGetDatum(event->consent == SENTDM_OPTED_OUT));
	set_time(rows, 2, event->occurred_at);
	sentdm_rows_set_text(rows, 3, event->name);
	sentdm_rows_add(rows);
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
		" FROM consents n"
		" ORDER BY n.phone, at DESC, n.opted_out DESC "
		"ON CONFLICT (phone) DO UPDATE SET opted_out = excluded.opted_out, since = excluded.since,"
		"  source = excluded.source "
		"WHERE (excluded.since, excluded.opted_out) > (o.since, o.opted_out)"
	};
	static SentdmShape shape = {.name = "consents",.ncolumns = 4,.columns = {
			{"phone", TEXTOID}, {"opted_out", BOOLOID}, {"since", TIMESTAMPTZOID}, {"source", TEXTOID}
	}};
	SentdmRows	rows;

	sentdm_rows_begin(&rows, &shape);
	for (int i = 0; i < n; i++)
	{
		if (!receipts[i]->duplicate &&
			receipts[i]->event.consent != SENTDM_CONSENT_UNKNOWN)
			add_consent(&rows, &receipts[i]->event);
	}
	if (sentdm_rows_count(&rows) > 0)
	{
		sentdm_rows_offer(&rows);
		sentdm_execute(&apply, NULL, NULL);
	}
	sentdm_rows_end(&rows);
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
