/*
 * send.c
 *		sentdm_send and its relatives: enqueue, and wake the worker at commit.
 *
 * A message is two inserted rows, in the caller's transaction; whatever undoes
 * the transaction, or the savepoint, undoes the message.  The rows are written
 * with the rights of the function's owner: callers hold EXECUTE on the function
 * and nothing on the tables.  Statements run under the caller's search_path, so
 * they contain no operator and no unqualified name.
 */
#include "postgres.h"

#include <math.h>

#include "access/xact.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "batch.h"
#include "guard.h"
#include "insert.h"
#include "message.h"
#include "pace.h"
#include "send.h"
#include "sentdm.h"
#include "share.h"
#include "shmem.h"
#include "sql.h"
#include "uuid7.h"

PG_FUNCTION_INFO_V1(sentdm_send);
PG_FUNCTION_INFO_V1(sentdm_send_many);
PG_FUNCTION_INFO_V1(sentdm_send_batch);

/* Positions of the arguments of sentdm_send(). */
enum
{
	ARG_RECIPIENT, ARG_TEMPLATE, ARG_PARAMETERS, ARG_BODY, ARG_CHANNELS, ARG_SEND_AT,
	ARG_EXPIRES_AT, ARG_PRIORITY, ARG_UNIQUE_KEY, ARG_TAG, ARG_PROFILE_ID, ARG_SANDBOX, ARG_EXTRA
};

/* A transaction that takes longer than this to send is large, unless it is small. */
#define LONG_TO_SEND_S 60
#define SMALL_TRANSACTION 100

/* What the current transaction has done, as far as its commit must act on it. */
typedef struct Pending
{
	bool		wake;
	TimestampTz earliest;		/* with it: nothing is due before this */
	bool		control;
	bool		resumed;
	bool		enable_changed;
	bool		enable;
	bool		settings_changed;	/* of databases or roles */
	int64		recipients;		/* written to by this transaction */
	int64		requests;		/* enqueued by it */
} Pending;

/* What was pending when a subtransaction began, for its rollback to go back to. */
typedef struct OpenSubtransaction
{
	SubTransactionId id;
	Pending		before;
	struct OpenSubtransaction *parent;
} OpenSubtransaction;

static Pending pending;
static OpenSubtransaction *open_subtransactions = NULL;

/* At commit */

static void
act_on_commit(void)
{
	SentdmSlot *slot;

	if (pending.enable_changed)
		sentdm_slot_enable(MyDatabaseId, pending.enable);
	if (pending.settings_changed)
		sentdm_slots_control_all();
	if (!pending.wake && !pending.control)
		return;
	slot = sentdm_slot(MyDatabaseId, false);
	if (slot == NULL)
		return;
	if (pending.resumed)
	{
		SentdmWorkerReport report;

		sentdm_slot_read_report(slot, &report);
		sentdm_share_forget_pause(report.account);
	}
	if (pending.control)
		sentdm_slot_control(slot);
	else
		sentdm_slot_wake(slot, pending.earliest);
}

/* Whoever enqueues a campaign learns at once how long it takes, at least. */
static void
announce_large(void)
{
	double		seconds;

	if (pending.requests < SMALL_TRANSACTION && pending.recipients < SMALL_TRANSACTION)
		return;
	seconds = sentdm_seconds_to_send(pending.requests, pending.recipients);
	if (seconds >= LONG_TO_SEND_S)
		ereport(NOTICE,
				(errmsg("%lld requests to %lld recipients take at least %.0f minutes under the present limits",
						(long long) pending.requests, (long long) pending.recipients, ceil(seconds / 60))));
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_PRE_COMMIT || event == XACT_EVENT_PRE_PREPARE)
		announce_large();
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT && event != XACT_EVENT_PREPARE)
		return;
	if (event == XACT_EVENT_COMMIT &&
		(pending.wake || pending.control || pending.enable_changed || pending.settings_changed))
		act_on_commit();
	memset(&pending, 0, sizeof(pending));
	open_subtransactions = NULL;	/* was in the transaction's memory */
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent_id, void *arg)
{
	OpenSubtransaction *open = open_subtransactions;

	if (open == NULL || open->id != id)
		return;
	if (event == SUBXACT_EVENT_ABORT_SUB)
		pending = open->before;
	if (event == SUBXACT_EVENT_COMMIT_SUB && parent_id != TopSubTransactionId &&
		(open->parent == NULL || open->parent->id != parent_id))
		open->id = parent_id;	/* its parent can still undo it */
	else if (event == SUBXACT_EVENT_ABORT_SUB || event == SUBXACT_EVENT_COMMIT_SUB)
		open_subtransactions = open->parent;
}

void
sentdm_send_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}

/* Remember what to go back to if this subtransaction is rolled back. */
static void
note_subtransaction(void)
{
	SubTransactionId id = GetCurrentSubTransactionId();
	OpenSubtransaction *open;

	if (GetCurrentTransactionNestLevel() == 1 ||
		(open_subtransactions != NULL && open_subtransactions->id == id))
		return;
	open = MemoryContextAlloc(TopTransactionContext, sizeof(OpenSubtransaction));
	open->id = id;
	open->before = pending;
	open->parent = open_subtransactions;
	open_subtransactions = open;
}

static void
wake_at_commit(TimestampTz earliest)
{
	note_subtransaction();
	pending.earliest = pending.wake ? Min(pending.earliest, earliest) : earliest;
	pending.wake = true;
}

void
sentdm_wake_at_commit(void)
{
	wake_at_commit(DT_NOBEGIN);
}

void
sentdm_control_at_commit(void)
{
	note_subtransaction();
	pending.control = true;
}

void
sentdm_resume_at_commit(void)
{
	sentdm_control_at_commit();
	pending.resumed = true;
}

void
sentdm_enable_at_commit(bool enabled)
{
	note_subtransaction();
	pending.enable_changed = true;
	pending.enable = enabled;
}

void
sentdm_settings_at_commit(void)
{
	note_subtransaction();
	pending.settings_changed = true;
}

/* Enqueueing */

static void
count(int n, int requests)
{
	note_subtransaction();
	if (pending.recipients + n > sentdm_max_per_transaction)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("this transaction would write to more than %d recipients",
						sentdm_max_per_transaction),
				 errhint("If that is meant, raise the limit with SET LOCAL sentdm.max_per_transaction.")));
	pending.recipients += n;
	pending.requests += requests;
}

/* Say once per session that what is queued does not leave yet. */
static void
warn_if_not_sending(void)
{
	static bool warned = false;
	bool		enabled = false;

	if (warned)
		return;
	if (sentdm_shmem_available())
	{
		SentdmSlot *slot = sentdm_slot(MyDatabaseId, false);

		enabled = (slot != NULL && slot->enabled) || (pending.enable_changed && pending.enable);
	}
	if (enabled)
		return;
	warned = true;
	if (!sentdm_shmem_available())
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the message is queued, but the sentdm library is not preloaded"),
				 errhint("Add sentdm to \"shared_preload_libraries\" and restart the server.")));
	else
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the message is queued, but sending is not enabled in this database"),
				 errhint("Run SELECT sentdm_enable().")));
}

/* The id under which a message with this unique key is known, if it is. */
static pg_uuid_t *
find_by_unique_key(const char *unique_key)
{
	static SentdmStatement find = {
		.sql = "SELECT id FROM sentdm.messages WHERE unique_key OPERATOR(pg_catalog.=) $1",
		.nargs = 1,
		.types = {TEXTOID}
	};
	Datum		values[1];
	bool		isnull;
	pg_uuid_t  *id = NULL;

	values[0] = CStringGetTextDatum(unique_key);
	SPI_connect();
	if (sentdm_execute(&find, values, NULL) > 0)
	{
		id = SPI_palloc(sizeof(pg_uuid_t));
		*id = *DatumGetUUIDP(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	}
	SPI_finish();
	return id;
}

static uint64
execute(SentdmStatement *statement, Datum *values, const bool *nulls)
{
	char		spi_nulls[SENTDM_MAX_ARGS];
	uint64		rows;

	for (int i = 0; i < statement->nargs; i++)
		spi_nulls[i] = nulls[i] ? 'n' : ' ';
	SPI_connect();
	rows = sentdm_execute(statement, values, spi_nulls);
	SPI_finish();
	return rows;
}

static Datum
text_or_null(const char *text, bool *isnull)
{
	*isnull = text == NULL;
	return text ? CStringGetTextDatum(text) : (Datum) 0;
}

/* The columns of sentdm.messages that a new message has, in their order. */
enum
{
	MESSAGE_ID, MESSAGE_REQUEST, MESSAGE_STATE, MESSAGE_PRIORITY, MESSAGE_TAG, MESSAGE_UNIQUE_KEY,
	MESSAGE_PROFILE_ID, MESSAGE_CREATED_AT, MESSAGE_CREATED_BY, MESSAGE_SEND_AT, MESSAGE_EXPIRES_AT,
	MESSAGE_GENERATION, MESSAGE_ATTEMPTS, MESSAGE_GIVEN, MESSAGE_COLUMNS = MESSAGE_GIVEN + 6
};

#define INSERT_MESSAGE "INSERT INTO sentdm.messages" \
	" (id, request, state, priority, tag, unique_key, profile_id, created_at, created_by, send_at, expires_at," \
	"  generation, attempts)" \
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
#define MESSAGE_ARGS .nargs = MESSAGE_GIVEN, .types = {UUIDOID, JSONBOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, \
	UUIDOID, TIMESTAMPTZOID, NAMEOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, INT4OID}

/* False: a message with this unique key is there already. */
static bool
insert_message(const SentdmDraft *draft, const pg_uuid_t *id, Jsonb *request,
			   const char *unique_key, Name created_by)
{
	static SentdmStatement insert = {.sql = INSERT_MESSAGE, MESSAGE_ARGS};
	static SentdmStatement insert_unique = {
		.sql = INSERT_MESSAGE " ON CONFLICT (unique_key) WHERE unique_key IS NOT NULL DO NOTHING",
		MESSAGE_ARGS
	};
	static SentdmTable messages = {
		.name = "messages",.columns = MESSAGE_COLUMNS,.unique_column = MESSAGE_UNIQUE_KEY + 1
	};
	Datum		values[MESSAGE_COLUMNS];
	bool		nulls[MESSAGE_COLUMNS];

	memset(nulls, false, sizeof(nulls));
	memset(nulls + MESSAGE_GIVEN, true, MESSAGE_COLUMNS - MESSAGE_GIVEN);
	values[MESSAGE_ID] = UUIDPGetDatum(id);
	values[MESSAGE_REQUEST] = JsonbPGetDatum(request);
	values[MESSAGE_STATE] = CStringGetTextDatum("queued");
	values[MESSAGE_PRIORITY] = CStringGetTextDatum(draft->priority ? draft->priority : "normal");
	values[MESSAGE_TAG] = text_or_null(draft->tag, &nulls[MESSAGE_TAG]);
	values[MESSAGE_UNIQUE_KEY] = text_or_null(unique_key, &nulls[MESSAGE_UNIQUE_KEY]);
	values[MESSAGE_PROFILE_ID] = UUIDPGetDatum(draft->profile_id);
	nulls[MESSAGE_PROFILE_ID] = draft->profile_id == NULL;
	values[MESSAGE_CREATED_AT] = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
	values[MESSAGE_CREATED_BY] = NameGetDatum(created_by);
	values[MESSAGE_SEND_AT] = TimestampTzGetDatum(draft->send_at);
	nulls[MESSAGE_SEND_AT] = draft->send_at == 0;
	values[MESSAGE_EXPIRES_AT] = TimestampTzGetDatum(draft->expires_at);
	nulls[MESSAGE_EXPIRES_AT] = draft->expires_at == DT_NOEND;
	values[MESSAGE_GENERATION] = Int32GetDatum(1);
	values[MESSAGE_ATTEMPTS] = Int32GetDatum(0);

	switch (sentdm_insert(&messages, values, nulls))
	{
		case SENTDM_INSERTED:
			return true;
		case SENTDM_KNOWN:
			return false;
		case SENTDM_NOT_PLAIN:
			break;
	}
	return execute(unique_key ? &insert_unique : &insert, values, nulls) > 0;
}

/* The columns of sentdm.outbox that a new message has, in their order. */
enum
{
	OUTBOX_MESSAGE_ID, OUTBOX_PART, OUTBOX_PRIORITY, OUTBOX_DUE_AT, OUTBOX_EXPIRES_AT, OUTBOX_RECIPIENTS,
	OUTBOX_SANDBOX, OUTBOX_ATTEMPTS, OUTBOX_CRASHES, OUTBOX_POSITION, OUTBOX_GIVEN, OUTBOX_COLUMNS = OUTBOX_GIVEN + 6
};

static void
insert_outbox(const SentdmDraft *draft, const pg_uuid_t *id)
{
	static SentdmStatement insert = {
		.sql = "INSERT INTO sentdm.outbox (message_id, part, priority, due_at, expires_at, recipients, sandbox,"
		"  attempts, crashes, position)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
		.nargs = OUTBOX_GIVEN,
		.types = {UUIDOID, INT4OID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTARRAYOID, BOOLOID, INT4OID, INT4OID, INT8OID}
	};
	static SentdmTable outbox = {.name = "outbox",.columns = OUTBOX_COLUMNS};
	TimestampTz now = GetCurrentTransactionStartTimestamp();
	Datum		values[OUTBOX_COLUMNS];
	bool		nulls[OUTBOX_COLUMNS];

	memset(nulls, false, sizeof(nulls));
	memset(nulls + OUTBOX_GIVEN, true, OUTBOX_COLUMNS - OUTBOX_GIVEN);
	values[OUTBOX_MESSAGE_ID] = UUIDPGetDatum(id);
	values[OUTBOX_PART] = Int32GetDatum(0);
	values[OUTBOX_PRIORITY] = CStringGetTextDatum(draft->priority ? draft->priority : "normal");
	values[OUTBOX_DUE_AT] = TimestampTzGetDatum(Max(draft->send_at, now));
	values[OUTBOX_EXPIRES_AT] = TimestampTzGetDatum(draft->expires_at);
	nulls[OUTBOX_EXPIRES_AT] = draft->expires_at == DT_NOEND;
	values[OUTBOX_RECIPIENTS] = (Datum) 0;
	nulls[OUTBOX_RECIPIENTS] = true;
	values[OUTBOX_SANDBOX] = BoolGetDatum(draft->sandbox);
	values[OUTBOX_ATTEMPTS] = Int32GetDatum(0);
	values[OUTBOX_CRASHES] = Int32GetDatum(0);
	values[OUTBOX_POSITION] = Int64GetDatum(sentdm_uuid7_time(id));
	if (sentdm_insert(&outbox, values, nulls) == SENTDM_NOT_PLAIN)
		execute(&insert, values, nulls);
}

/* The unique key of the n-th request of one call. */
static char *
key_of_request(const char *unique_key, int n)
{
	if (unique_key == NULL || n == 0)
		return unique_key ? pstrdup(unique_key) : NULL;
	return psprintf("%s#%d", unique_key, n + 1);
}

/* The ids of an earlier call with the same unique key. */
static List *
earlier_ids(const char *unique_key)
{
	List	   *ids = NIL;
	pg_uuid_t  *id;

	while ((id = find_by_unique_key(key_of_request(unique_key, list_length(ids)))) != NULL)
		ids = lappend(ids, id);
	if (ids == NIL)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("a message with this unique key was sent and removed at the same time"),
				 errhint("Try again.")));
	return ids;
}

/* Store the requests of a draft. */
static List *
store(SentdmDraft *draft, List *requests, Name created_by)
{
	List	   *ids = NIL;
	ListCell   *cell;

	foreach(cell, requests)
	{
		pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
		char	   *unique_key = key_of_request(draft->unique_key, foreach_current_index(cell));

		sentdm_uuid7(id);
		if (!insert_message(draft, id, (Jsonb *) lfirst(cell), unique_key, created_by))
			return earlier_ids(draft->unique_key);
		insert_outbox(draft, id);
		ids = lappend(ids, id);
	}
	return ids;
}

/* All requests of a draft, before any is stored; NIL fills the complaint. */
static List *
build_requests(const SentdmDraft *draft, SentdmComplaint *complaint)
{
	List	   *requests = NIL;

	for (int first = 0; first < draft->n_recipients; first += SENTDM_MAX_RECIPIENTS)
	{
		int			count = Min(draft->n_recipients - first, SENTDM_MAX_RECIPIENTS);
		Jsonb	   *request = sentdm_draft_request(draft, first, count, complaint);

		if (request == NULL)
			return NIL;
		requests = lappend(requests, request);
	}
	return requests;
}

static Oid
owner_of(Oid function)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", function);
	owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
	ReleaseSysCache(tuple);
	return owner;
}

/* Whether nothing in the database speaks against it; with the owner's rights. */
static bool
pass_guard(SentdmDraft *draft, Oid function, SentdmComplaint *complaint)
{
	Oid			caller;
	int			security_context;
	bool		good;

	if (!sentdm_guard_is_needed(draft))
		return true;
	GetUserIdAndSecContext(&caller, &security_context);
	/* An error restores both by itself. */
	SetUserIdAndSecContext(owner_of(function), security_context | SECURITY_LOCAL_USERID_CHANGE);
	good = sentdm_guard(draft, complaint);
	SetUserIdAndSecContext(caller, security_context);
	return good;
}

List	   *
sentdm_enqueue(SentdmDraft *draft, Oid function, SentdmComplaint *complaint)
{
	Oid			caller;
	int			security_context;
	NameData	created_by;
	List	   *requests;
	List	   *ids;

	complaint->message = NULL;
	if (!sentdm_draft_check(draft, GetCurrentTimestamp(), complaint) ||
		!pass_guard(draft, function, complaint))
		return NIL;
	if (sentdm_mode == SENTDM_MODE_SANDBOX)
		draft->sandbox = true;
	requests = build_requests(draft, complaint);
	if (requests == NIL)
		return NIL;
	PreventCommandIfReadOnly("sentdm_send()");
	count(draft->n_recipients, list_length(requests));
	warn_if_not_sending();

	GetUserIdAndSecContext(&caller, &security_context);
	namestrcpy(&created_by, GetUserNameFromId(caller, false));
	SetUserIdAndSecContext(owner_of(function), security_context | SECURITY_LOCAL_USERID_CHANGE);
	ids = store(draft, requests, &created_by);
	SetUserIdAndSecContext(caller, security_context);

	/* The worker may have been past that time before this commits. */
	wake_at_commit(GetCurrentTransactionStartTimestamp());
	return ids;
}

void
sentdm_raise(const SentdmComplaint *complaint)
{
	ereport(ERROR,
			(errcode(complaint->sqlstate),
			 errmsg("%s", complaint->message),
			 complaint->hint ? errhint("%s", complaint->hint) : 0));
}

void
sentdm_report_opted_out(const SentdmDraft *draft)
{
	if (draft->opted_out > 0)
		ereport(NOTICE,
				(errmsg_plural("%d recipient has opted out and is left out",
							   "%d recipients have opted out and are left out",
							   draft->opted_out, draft->opted_out),
				 errhint("See sentdm.optouts and the setting sentdm.on_opt_out.")));
}

/* The SQL functions */

static char *
text_argument(FunctionCallInfo fcinfo, int n)
{
	return PG_ARGISNULL(n) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(n));
}

/* The elements of a text[] argument; a NULL among them sets has_null. */
static char **
array_argument(FunctionCallInfo fcinfo, int n, int *count, bool *has_null)
{
	Datum	   *elements;
	bool	   *nulls;
	char	  **strings;

	*count = 0;
	if (PG_ARGISNULL(n))
		return NULL;
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(n), TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, &nulls, count);
	strings = palloc((*count + 1) * sizeof(char *));
	for (int i = 0; i < *count; i++)
	{
		if (nulls[i])
			*has_null = true;
		else
			strings[i] = TextDatumGetCString(elements[i]);
	}
	return strings;
}

/* All arguments but the recipient, which has two forms. */
static void
read_arguments(FunctionCallInfo fcinfo, SentdmDraft *draft)
{
	sentdm_draft_init(draft);
	draft->template_name = text_argument(fcinfo, ARG_TEMPLATE);
	if (!PG_ARGISNULL(ARG_PARAMETERS))
		draft->parameters = PG_GETARG_JSONB_P(ARG_PARAMETERS);
	draft->body = text_argument(fcinfo, ARG_BODY);
	draft->channels = array_argument(fcinfo, ARG_CHANNELS, &draft->n_channels, &draft->null_channel);
	if (!PG_ARGISNULL(ARG_SEND_AT))
		draft->send_at = PG_GETARG_TIMESTAMPTZ(ARG_SEND_AT);
	if (!PG_ARGISNULL(ARG_EXPIRES_AT))
		draft->expires_at = PG_GETARG_TIMESTAMPTZ(ARG_EXPIRES_AT);
	draft->priority = text_argument(fcinfo, ARG_PRIORITY);
	draft->unique_key = text_argument(fcinfo, ARG_UNIQUE_KEY);
	draft->tag = text_argument(fcinfo, ARG_TAG);
	if (!PG_ARGISNULL(ARG_PROFILE_ID))
		draft->profile_id = PG_GETARG_UUID_P(ARG_PROFILE_ID);
	draft->sandbox = !PG_ARGISNULL(ARG_SANDBOX) && PG_GETARG_BOOL(ARG_SANDBOX);
	if (!PG_ARGISNULL(ARG_EXTRA))
		draft->extra = PG_GETARG_JSONB_P(ARG_EXTRA);
}

/* sentdm_send(recipient text, ...) returns uuid */
Datum
sentdm_send(PG_FUNCTION_ARGS)
{
	SentdmDraft draft;
	SentdmComplaint complaint;
	List	   *ids;
	char	   *recipient;

	read_arguments(fcinfo, &draft);
	recipient = text_argument(fcinfo, ARG_RECIPIENT);
	draft.null_recipient = recipient == NULL;
	draft.n_recipients = recipient ? 1 : 0;
	draft.recipients = &recipient;
	ids = sentdm_enqueue(&draft, fcinfo->flinfo->fn_oid, &complaint);
	if (complaint.message != NULL)
		sentdm_raise(&complaint);
	sentdm_report_opted_out(&draft);
	if (ids == NIL)
		PG_RETURN_NULL();
	PG_RETURN_UUID_P((pg_uuid_t *) linitial(ids));
}

/* sentdm_send(recipients text[], ...) returns setof uuid */
Datum
sentdm_send_many(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	SentdmDraft draft;
	SentdmComplaint complaint;
	List	   *ids;
	ListCell   *cell;

	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	read_arguments(fcinfo, &draft);
	draft.plural = true;
	draft.recipients = array_argument(fcinfo, ARG_RECIPIENT, &draft.n_recipients, &draft.null_recipient);
	ids = sentdm_enqueue(&draft, fcinfo->flinfo->fn_oid, &complaint);
	if (complaint.message != NULL)
		sentdm_raise(&complaint);
	sentdm_report_opted_out(&draft);
	foreach(cell, ids)
	{
		Datum		value = UUIDPGetDatum((pg_uuid_t *) lfirst(cell));
		bool		isnull = false;

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &value, &isnull);
	}
	return (Datum) 0;
}

/* One row for each message of an item, or one with its error. */
static void
put_item(ReturnSetInfo *rsinfo, int ordinal, List *ids, const char *error)
{
	Datum		values[3];
	bool		nulls[3] = {false, true, true};
	ListCell   *cell;

	values[0] = Int32GetDatum(ordinal);
	if (ids == NIL)
	{
		nulls[2] = error == NULL;
		values[2] = error ? CStringGetTextDatum(error) : (Datum) 0;
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	foreach(cell, ids)
	{
		values[1] = UUIDPGetDatum((pg_uuid_t *) lfirst(cell));
		nulls[1] = false;
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
}

/* sentdm_send_batch(requests jsonb) returns table(ordinal, message_id, error) */
Datum
sentdm_send_batch(PG_FUNCTION_ARGS)
{
	Jsonb	   *requests = PG_GETARG_JSONB_P(0);
	JsonbIterator *it;
	JsonbValue	item;
	JsonbIteratorToken token;
	int			ordinal = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (!JB_ROOT_IS_ARRAY(requests) || JB_ROOT_IS_SCALAR(requests))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"requests\" is not a JSON array"),
				 errhint("Use jsonb_agg(jsonb_build_object('recipient', ..., 'template', ...)).")));
	it = JsonbIteratorInit(&requests->root);
	while ((token = JsonbIteratorNext(&it, &item, true)) != WJB_DONE)
	{
		SentdmDraft draft;
		SentdmComplaint complaint;
		List	   *ids = NIL;

		if (token != WJB_ELEM)
			continue;
		if (sentdm_draft_from_item(&draft, &item, &complaint))
			ids = sentdm_enqueue(&draft, fcinfo->flinfo->fn_oid, &complaint);
		if (ids == NIL && complaint.message == NULL && draft.opted_out > 0)
			complaint.message = pstrdup("skipped: the recipient has opted out");
		put_item((ReturnSetInfo *) fcinfo->resultinfo, ++ordinal, ids, complaint.message);
	}
	return (Datum) 0;
}
