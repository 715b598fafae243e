/*
 * webhook.c
 *		sentdm_receive_webhook() and sentdm_receive_webhooks(): verify, record,
 *		apply, and answer with the HTTP status to give.
 *
 * Whatever is in a request, the answer is a status: one bad request must not
 * cost its neighbours their commit.  Errors are for what a retry may cure.  Must
 * never believe anything that is not signed, nor repeat any of it in a reason.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "event.h"
#include "payload.h"
#include "receipt.h"
#include "secret.h"
#include "sentdm.h"
#include "shmem.h"
#include "status.h"

PG_FUNCTION_INFO_V1(sentdm_receive_webhook);
PG_FUNCTION_INFO_V1(sentdm_receive_webhooks);
PG_FUNCTION_INFO_V1(sentdm_record_events);
PG_FUNCTION_INFO_V1(sentdm_apply_events);

#define MAX_PAYLOAD (1024 * 1024)	/* bytes */

/* A header's value; data is NULL when it is missing. */
typedef struct Header
{
	const char *data;
	int			length;
} Header;

typedef struct Request
{
	bytea	   *payload;		/* NULL: none */
	Jsonb	   *headers;		/* NULL: none */

	Header		signature;
	Header		webhook_id;
	Header		timestamp;
	Header		event_type;		/* not signed */

	int			http_status;	/* 0: nothing wrong so far */
	const char *reason;
	bool		is_v1;
	bool		late;
	SentdmReceipt *receipt;		/* NULL: rejected */
} Request;

static void
reject(Request *request, int http_status, const char *reason)
{
	request->http_status = http_status;
	request->reason = reason;
}

static bool
rejected(const Request *request)
{
	return request->http_status != 0;
}

/* The value of a header: a string, or an array of one string. */
static void
read_header(Header *header, JsonbValue *value)
{
	if (value->type == jbvBinary && JsonContainerIsArray(value->val.binary.data) &&
		JsonContainerSize(value->val.binary.data) == 1)
		value = getIthJsonbValueFromContainer(value->val.binary.data, 0);
	if (value->type == jbvString)
	{
		header->data = value->val.string.val;
		header->length = value->val.string.len;
	}
}

/* Where a header of this name goes; NULL when it is of no interest. */
static Header *
find_header(Request *request, const JsonbValue *name)
{
	static const struct
	{
		const char *name;
		size_t		offset;
	}			known[] = {
		{"x-webhook-signature", offsetof(Request, signature)},
		{"x-webhook-id", offsetof(Request, webhook_id)},
		{"x-webhook-timestamp", offsetof(Request, timestamp)},
		{"x-webhook-event-type", offsetof(Request, event_type)},
	};

	for (int i = 0; i < lengthof(known); i++)
	{
		if (name->val.string.len == strlen(known[i].name) &&
			pg_strncasecmp(name->val.string.val, known[i].name, name->val.string.len) == 0)
			return (Header *) ((char *) request + known[i].offset);
	}
	return NULL;
}

static void
read_headers(Request *request)
{
	JsonbIterator *iterator = JsonbIteratorInit(&request->headers->root);
	JsonbIteratorToken token;
	JsonbValue	value;
	Header	   *header = NULL;

	while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			header = find_header(request, &value);
		else if (token == WJB_VALUE && header != NULL)
			read_header(header, &value);
	}
}

/* Refuse what cannot be a webhook, before anything is computed. */
static void
examine(Request *request)
{
	if (request->payload == NULL)
		reject(request, 400, "no payload");
	else if (request->headers == NULL || !JB_ROOT_IS_OBJECT(request->headers))
		reject(request, 400, "no headers");
	else if (VARSIZE_ANY_EXHDR(request->payload) > MAX_PAYLOAD)
		reject(request, 413, "payload too large");
	else
	{
		read_headers(request);
		if (request->signature.data == NULL)
			reject(request, 401, "no x-webhook-signature header");
	}
}

/* Is there a signature of the current scheme in the header, well formed or not? */
static bool
has_v1_entry(const Header *signature)
{
	for (int i = 0; i + 3 <= signature->length; i++)
	{
		if ((i == 0 || signature->data[i - 1] == ' ') && memcmp(signature->data + i, "v1,", 3) == 0)
			return true;
	}
	return false;
}

/* The endpoint that a request says it is for, if that can be one of ours. */
static const pg_uuid_t *
endpoint_of(const Request *request, pg_uuid_t *uuid)
{
	if (request->webhook_id.data == NULL ||
		!sentdm_uuid_parse(request->webhook_id.data, request->webhook_id.length, uuid))
		return NULL;
	return uuid;
}

static void
judge_verdict(Request *request, SentdmSigVerdict verdict)
{
	if (verdict == SENTDM_SIG_ERROR)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not compute a signature")));
	if (verdict == SENTDM_SIG_MALFORMED)
		reject(request, 401, "malformed signature, webhook id or timestamp");
	else if (verdict != SENTDM_SIG_OK)
		reject(request, 401, "wrong signature");
}

/*
 * An old event is refused only when it is so old that it must be a replay: Sent
 * repeats a failed delivery with the time of the first one, so after an outage
 * they all are old.  A replay is a duplicate, and as such does no harm.
 */
static void
judge_age(Request *request, int64 age_s)
{
	if (age_s > Max(sentdm_webhook_max_age_s, sentdm_webhook_tolerance_s))
		reject(request, 401, "too old");
	else if (age_s < -sentdm_webhook_tolerance_s)
		reject(request, 401, "timestamp is in the future");
	else
		request->late = age_s > sentdm_webhook_tolerance_s;
}

/* The current scheme: id, time and payload are signed. */
static void
authenticate_v1(Request *request, SentdmSecrets *secrets, int64 now_s)
{
	SentdmSignedContent content;
	pg_uuid_t	uuid;
	int64		age_s;

	if (request->webhook_id.data == NULL)
	{
		reject(request, 401, "no x-webhook-id header");
		return;
	}
	if (request->timestamp.data == NULL)
	{
		reject(request, 401, "no x-webhook-timestamp header");
		return;
	}
	content.payload = VARDATA_ANY(request->payload);
	content.payload_len = VARSIZE_ANY_EXHDR(request->payload);
	content.id = request->webhook_id.data;
	content.id_len = request->webhook_id.length;
	content.timestamp = request->timestamp.data;
	content.timestamp_len = request->timestamp.length;
	judge_verdict(request, sentdm_secrets_verify_v1(secrets, endpoint_of(request, &uuid), &content,
													request->signature.data, request->signature.length,
													now_s, &age_s));
	if (!rejected(request))
		judge_age(request, age_s);
}

/* The older scheme: only the payload is signed, so no age is known. */
static void
authenticate_hex(Request *request, SentdmSecrets *secrets)
{
	pg_uuid_t	uuid;

	judge_verdict(request, sentdm_secrets_verify_hex(secrets, endpoint_of(request, &uuid),
													 VARDATA_ANY(request->payload),
													 VARSIZE_ANY_EXHDR(request->payload),
													 request->signature.data,
													 request->signature.length));
}

/*
 * Who may choose the scheme?  Not the sender: what has a signature of the current
 * scheme is never looked at under the older one.
 */
static void
authenticate(Request *request, SentdmSecrets *secrets, int64 now_s)
{
	request->is_v1 = has_v1_entry(&request->signature);
	if (!sentdm_secrets_any(secrets))
		reject(request, 500, "no webhook secret is configured");
	else if (request->is_v1)
		authenticate_v1(request, secrets, now_s);
	else if (sentdm_webhook_legacy_signature)
		authenticate_hex(request, secrets);
	else
		reject(request, 401, "no v1 signature");
}

/*
 * Read an authentic event.  scratch is for what parsing leaves behind, which may
 * be many times the payload.
 */
static void
read_event(const Request *request, TimestampTz now, MemoryContext scratch)
{
	SentdmReceipt *receipt = request->receipt;
	const char *payload = VARDATA_ANY(request->payload);
	size_t		length = VARSIZE_ANY_EXHDR(request->payload);
	MemoryContext context = MemoryContextSwitchTo(scratch);
	Jsonb	   *parsed = sentdm_payload_parse(payload, length, &receipt->raw_reason);
	char	   *unsigned_name = NULL;

	MemoryContextSwitchTo(context);
	if (parsed != NULL)
	{
		receipt->payload = palloc(VARSIZE(parsed));
		memcpy(receipt->payload, parsed, VARSIZE(parsed));
	}
	else
		receipt->raw = request->payload;
	MemoryContextReset(scratch);

	if (request->event_type.data != NULL)
		unsigned_name = pnstrdup(request->event_type.data, request->event_type.length);
	sentdm_event_read(&receipt->event, receipt->payload, unsigned_name, now);
	sentdm_receipt_set_key(receipt);
	receipt->late = request->late;
	/* In the older scheme the id is anybody's word. */
	if (request->is_v1)
		receipt->webhook_id = cstring_to_text_with_len(request->webhook_id.data,
													   request->webhook_id.length);
}

/* Read and record the events of the requests that were not rejected. */
static void
record(Request *requests, int n, TimestampTz now)
{
	SentdmReceipt *receipts = palloc0(n * sizeof(SentdmReceipt));
	MemoryContext scratch = AllocSetContextCreate(CurrentMemoryContext, "sentdm webhook",
												  ALLOCSET_DEFAULT_SIZES);
	int			count = 0;

	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		if (rejected(&requests[i]))
			continue;
		requests[i].receipt = &receipts[count++];
		read_event(&requests[i], now, scratch);
		requests[i].http_status = 200;
		requests[i].reason = requests[i].receipt->raw_reason;
	}
	sentdm_receipts_record(receipts, count, true);
}

/* How many messages arrive, and how many do not; NULL says nothing of that. */
static void
count_status(int *counts, const char *status)
{
	if (status == NULL)
		return;
	counts[SENTDM_COUNT_DELIVERED] += strcmp(status, "delivered") == 0;
	counts[SENTDM_COUNT_UNDELIVERED] += sentdm_status_is_failure(status);
}

static void
count_receipt(int *counts, const SentdmReceipt *receipt)
{
	if (receipt == NULL)
		counts[SENTDM_COUNT_EVENTS_REJECTED]++;
	else if (receipt->duplicate)
		counts[SENTDM_COUNT_EVENTS_DUPLICATE]++;
	else
	{
		count_status(counts, receipt->event.status);
		counts[SENTDM_COUNT_EVENTS]++;
		counts[SENTDM_COUNT_EVENTS_LATE] += receipt->late;
		counts[SENTDM_COUNT_EVENTS_RAW] += receipt->raw != NULL;
	}
}

static void
publish_counts(const int *counts)
{
	SentdmSlot *slot = sentdm_slot(MyDatabaseId, false);

	for (int c = SENTDM_COUNT_EVENTS; c < SENTDM_COUNTERS; c++)
		sentdm_count(slot, c, counts[c]);
}

static void
count_requests(const Request *requests, int n)
{
	int			counts[SENTDM_COUNTERS] = {0};

	for (int i = 0; i < n; i++)
		count_receipt(counts, requests[i].receipt);
	publish_counts(counts);
}

/* Receive some webhooks, of which payload and headers are set. */
static void
receive(Request *requests, int n)
{
	/* Not the time of the transaction, which may have begun long ago. */
	TimestampTz now = GetCurrentTimestamp();
	int64		now_s = now / USECS_PER_SEC +
	(int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;
	SentdmSecrets *secrets = sentdm_secrets_load();

	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		examine(&requests[i]);
		if (!rejected(&requests[i]))
			authenticate(&requests[i], secrets, now_s);
	}
	record(requests, n, now);
	count_requests(requests, n);
}

/* Answer with one row; ordinal 0 stands for a result that has no such column. */
static void
put_answer(ReturnSetInfo *result, const Request *request, int ordinal)
{
	const SentdmReceipt *receipt = request->receipt;
	Datum		values[5];
	bool		nulls[5] = {false};
	int			first = ordinal > 0 ? 0 : 1;

	values[0] = Int32GetDatum(ordinal);
	values[1] = Int32GetDatum(request->http_status);
	nulls[2] = receipt == NULL || receipt->id == 0;
	values[2] = nulls[2] ? (Datum) 0 : Int64GetDatum(receipt->id);
	nulls[3] = receipt == NULL;
	values[3] = BoolGetDatum(receipt != NULL && receipt->duplicate);
	nulls[4] = request->reason == NULL;
	values[4] = nulls[4] ? (Datum) 0 : CStringGetTextDatum(request->reason);
	tuplestore_putvalues(result->setResult, result->setDesc, values + first, nulls + first);
}

/*
 * Receive and answer, in a memory context of its own: the secrets are erased with
 * it, also after an error.
 */
static void
receive_and_answer(FunctionCallInfo fcinfo, Request *requests, int n, bool with_ordinal)
{
	ErrorContextCallback hide;
	MemoryContext batch;
	MemoryContext context;

	hide.callback = sentdm_hide_statement;
	hide.arg = NULL;
	hide.previous = error_context_stack;
	error_context_stack = &hide;

	InitMaterializedSRF(fcinfo, 0);
	batch = AllocSetContextCreate(CurrentMemoryContext, "sentdm webhooks", ALLOCSET_DEFAULT_SIZES);
	context = MemoryContextSwitchTo(batch);
	receive(requests, n);
	for (int i = 0; i < n; i++)
		put_answer((ReturnSetInfo *) fcinfo->resultinfo, &requests[i], with_ordinal ? i + 1 : 0);
	MemoryContextSwitchTo(context);
	MemoryContextDelete(batch);

	error_context_stack = hide.previous;
}

Datum
sentdm_receive_webhook(PG_FUNCTION_ARGS)
{
	Request		request = {0};

	if (!PG_ARGISNULL(0))
		request.payload = PG_GETARG_BYTEA_PP(0);
	if (!PG_ARGISNULL(1))
		request.headers = PG_GETARG_JSONB_P(1);
	receive_and_answer(fcinfo, &request, 1, false);
	return (Datum) 0;
}

/* The elements of an array argument; none if it is NULL. */
static int
array_argument(FunctionCallInfo fcinfo, int arg, Oid type, Datum **values, bool **nulls)
{
	int			n = 0;

	*values = NULL;
	*nulls = NULL;
	if (!PG_ARGISNULL(arg))
		deconstruct_array(PG_GETARG_ARRAYTYPE_P(arg), type, -1, false, TYPALIGN_INT, values, nulls, &n);
	return n;
}

Datum
sentdm_receive_webhooks(PG_FUNCTION_ARGS)
{
	Datum	   *payloads;
	Datum	   *headers;
	bool	   *no_payload;
	bool	   *no_headers;
	int			n_payloads = array_argument(fcinfo, 0, BYTEAOID, &payloads, &no_payload);
	int			n_headers = array_argument(fcinfo, 1, JSONBOID, &headers, &no_headers);
	int			n = Max(n_payloads, n_headers);
	Request    *requests = palloc0(Max(n, 1) * sizeof(Request));

	for (int i = 0; i < n; i++)
	{
		if (i < n_payloads && !no_payload[i])
			requests[i].payload = DatumGetByteaPP(payloads[i]);
		if (i < n_headers && !no_headers[i])
			requests[i].headers = DatumGetJsonbP(headers[i]);
	}
	receive_and_answer(fcinfo, requests, n, true);
	return (Datum) 0;
}

/*
 * Events that the API told when it was asked, as receipts; returns how many.  They
 * are known to be authentic by the way they came.
 */
static int
read_events(SentdmReceipt *receipts, text *webhook_id, const Datum *events, const bool *nulls, int n)
{
	TimestampTz now = GetCurrentTimestamp();
	int			n_receipts = 0;

	for (int i = 0; i < n; i++)
	{
		SentdmReceipt *receipt = &receipts[n_receipts];

		CHECK_FOR_INTERRUPTS();
		if (nulls[i] || !JB_ROOT_IS_OBJECT(DatumGetJsonbP(events[i])))
			continue;
		receipt->payload = DatumGetJsonbP(events[i]);
		receipt->webhook_id = webhook_id;
		receipt->late = true;
		sentdm_event_read(&receipt->event, receipt->payload, NULL, now);
		n_receipts++;
	}
	return n_receipts;
}

/*
 * Record events that the API's log has, and that no webhook brought; returns how
 * many of them are new.
 */
static int
record_events(text *webhook_id, const Datum *events, const bool *nulls, int n)
{
	SentdmReceipt *receipts = palloc0(Max(n, 1) * sizeof(SentdmReceipt));
	int			counts[SENTDM_COUNTERS] = {0};
	int			n_receipts = read_events(receipts, webhook_id, events, nulls, n);

	for (int i = 0; i < n_receipts; i++)
		sentdm_receipt_set_key(&receipts[i]);
	sentdm_receipts_record(receipts, n_receipts, false);
	for (int i = 0; i < n_receipts; i++)
	{
		if (receipts[i].id != 0)
			count_receipt(counts, &receipts[i]);
	}
	publish_counts(counts);
	return counts[SENTDM_COUNT_EVENTS];
}

/* sentdm.record_events(webhook_id uuid, events jsonb[]) returns bigint */
Datum
sentdm_record_events(PG_FUNCTION_ARGS)
{
	ErrorContextCallback hide;
	char	   *webhook_id = DatumGetCString(DirectFunctionCall1(uuid_out, PG_GETARG_DATUM(0)));
	Datum	   *events;
	bool	   *nulls;
	int			n = array_argument(fcinfo, 1, JSONBOID, &events, &nulls);
	int			n_new;

	hide.callback = sentdm_hide_statement;
	hide.arg = NULL;
	hide.previous = error_context_stack;
	error_context_stack = &hide;
	n_new = record_events(cstring_to_text(webhook_id), events, nulls, n);
	error_context_stack = hide.previous;
	PG_RETURN_INT64(n_new);
}

/*
 * Apply what the API says about messages, by the rule for events, and record
 * nothing.  Its answers know parts of a second, events do not: a status must not
 * look later than the event about the next one.
 */
static void
apply_events(const Datum *events, const bool *nulls, int n)
{
	SentdmReceipt *receipts = palloc0(Max(n, 1) * sizeof(SentdmReceipt));
	int			n_receipts = read_events(receipts, NULL, events, nulls, n);

	for (int i = 0; i < n_receipts; i++)
	{
		if (receipts[i].event.occurred_at != DT_NOBEGIN)
			receipts[i].event.occurred_at -= receipts[i].event.occurred_at % USECS_PER_SEC;
	}
	sentdm_receipts_apply(receipts, n_receipts);
}

/* sentdm.apply_events(events jsonb[]) returns void */
Datum
sentdm_apply_events(PG_FUNCTION_ARGS)
{
	ErrorContextCallback hide;
	Datum	   *events;
	bool	   *nulls;
	int			n = array_argument(fcinfo, 0, JSONBOID, &events, &nulls);

	hide.callback = sentdm_hide_statement;
	hide.arg = NULL;
	hide.previous = error_context_stack;
	error_context_stack = &hide;
	apply_events(events, nulls, n);
	error_context_stack = hide.previous;
	PG_RETURN_VOID();
}
