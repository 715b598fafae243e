/*
 * chores.c
 *		What a worker asks Sent besides sending.
 *
 * Refreshing: a message whose receipt did not come is asked for when it is
 * sentdm.refresh_after old, and at 4, 16, 64 and 256 times that age; then never
 * again.  Each pass goes through the messages in the order of time, which is that
 * of their ids, and remembers how far it came: so neither sending nor receipts
 * write anything for it, and an idle database is not read.
 *
 * Webhooks: the worker looks now and then whether Sent still posts to those that
 * are registered here, and fetches from its log what did not arrive.
 *
 * There is never more than one request under way, each counts for the rate as a
 * bulk message does, and no transaction is open meanwhile.  If the process dies,
 * the same is asked again.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "answer.h"
#include "chores.h"
#include "clock.h"
#include "payload.h"
#include "queue.h"
#include "sentdm.h"
#include "share.h"
#include "sql.h"

#define PASSES 5
#define PASS_FACTOR 4
#define MOST_FAILURES 3			/* of one request, until it is left alone */
#define LARGEST_ANSWER (16 * 1024 * 1024)
#define UNIX_EPOCH_MS ((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * 1000)

/* Sent tries for a while, and two clocks may differ. */
#define BACKFILL_MARGIN_US (600 * USECS_PER_SEC)
#define YOUNG_EVENT_S 60		/* may be under way */

typedef enum Verdict
{
	GOOD,
	REFUSED,					/* this key may not ask */
	HOPELESS,					/* there is no such thing, or the like */
	LATER
} Verdict;

/* Asking */

static char *
uuid_text(const pg_uuid_t *uuid)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(uuid)));
}

/* If the rates allow a request that has the least priority, it counts. */
static bool
take_from_rates(SentdmDrain *drain)
{
	bool		may;

	sentdm_share_lock(&drain->rates);
	may = sentdm_drain_quota(drain, SENTDM_BULK, sentdm_clock_us()) > 0;
	if (may)
		sentdm_drain_spend(drain, sentdm_clock_us());
	sentdm_share_unlock(&drain->rates);
	return may;
}

static bool
submit(SentdmChores *chores, const char *method, const char *path, const char *body, const char *profile_id)
{
	SentdmHttpRequest request;

	memset(&request, 0, sizeof(request));
	request.method = method;
	request.path = path;
	request.api_key = chores->flight->api_key;
	request.profile_id = profile_id;
	request.body = body;
	request.body_length = body ? strlen(body) : 0;
	request.max_answer = LARGEST_ANSWER;
	request.deadline_unix_us = INT64_MAX;
	return sentdm_http_submit(chores->http, &request);
}

static void
ask(SentdmChores *chores)
{
	const SentdmToRefresh *delivery = &chores->batch[chores->next];
	const char *id = uuid_text(&chores->webhook_id);

	switch (chores->chore)
	{
		case SENTDM_REFRESH:
			chores->asking = submit(chores, "GET", psprintf("/v3/messages/%s", uuid_text(&delivery->sent_id)),
									NULL, delivery->profile_id[0] ? delivery->profile_id : NULL);
			break;
		case SENTDM_LOOK_AT_WEBHOOK:
			chores->asking = submit(chores, "GET", psprintf("/v3/webhooks/%s", id), NULL, NULL);
			break;
		case SENTDM_REACTIVATE_WEBHOOK:
			chores->asking = submit(chores, "PATCH", psprintf("/v3/webhooks/%s/toggle-status", id),
									"{\"is_active\": true}", NULL);
			break;
		case SENTDM_READ_EVENTS:
			chores->asking = submit(chores, "GET", psprintf("/v3/webhooks/%s/events?page=%d&page_size=100", id,
															chores->page), NULL, NULL);
			break;
		case SENTDM_NO_CHORE:
			break;
	}
	if (chores->asking)
	{
		sentdm_http_run(chores->http);

		/*
		 * Perhaps it has failed, or was answered, already: nothing wakes us
		 * then.
		 */
		chores->result = sentdm_http_next_result(chores->http);
	}
	else
		chores->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sentdm_retry_max_ms);
}

static Verdict
judge(const SentdmHttpResult *result)
{
	SentdmAnswer answer;

	if (result->transport != SENTDM_ANSWERED || result->http_status == 408 || result->http_status == 429 ||
		result->http_status >= 500)
		return LATER;
	if (result->http_status == 401 || result->http_status == 403)
		return REFUSED;
	if (result->http_status < 200 || result->http_status > 299)
		return HOPELESS;
	sentdm_answer_parse(result->body, result->body_length, &answer);
	return answer.success ? GOOD : LATER;
}

/* The answer, within a transaction; NULL: it cannot be stored. */
static Jsonb *
parse(const SentdmHttpResult *result)
{
	const char *reason;

	return sentdm_payload_parse(result->body, result->body_length, &reason);
}

/* Refreshing */

static int64
age_of_pass_us(int pass)
{
	int64		age_us = (int64) sentdm_refresh_after_s * USECS_PER_SEC;

	for (int i = 0; i < pass; i++)
		age_us *= PASS_FACTOR;
	return age_us;
}

/* The least id of a message of that time. */
static pg_uuid_t
id_at(TimestampTz time)
{
	int64		unix_ms = Max(time / 1000 + UNIX_EPOCH_MS, 0);
	pg_uuid_t	id;

	memset(&id, 0, sizeof(id));
	for (int i = 0; i < 6; i++)
		id.data[i] = (unsigned char) (unix_ms >> (40 - 8 * i));
	return id;
}

static TimestampTz
time_of_id(const pg_uuid_t *id)
{
	int64		unix_ms = 0;

	for (int i = 0; i < 6; i++)
		unix_ms = unix_ms << 8 | id->data[i];
	return (unix_ms - UNIX_EPOCH_MS) * 1000;
}

/*
 * Where a pass goes on.  What has become old enough for the next pass is left to
 * that.
 */
static SentdmRefreshed
position_of(bool scheduled, int pass, TimestampTz now)
{
	static SentdmStatement read = {
		.sql = "SELECT send_at, message_id, sent_id FROM sentdm.refreshes WHERE scheduled = $1 AND pass = $2",
		.nargs = 2,
		.types = {BOOLOID, INT4OID}
	};
	Datum		values[2];
	SentdmRefreshed from;
	bool		isnull;

	values[0] = BoolGetDatum(scheduled);
	values[1] = Int32GetDatum(pass);
	memset(&from, 0, sizeof(from));
	from.send_at = now - age_of_pass_us(pass + 1);
	if (!scheduled)
		from.message_id = id_at(from.send_at);
	if (sentdm_execute(&read, values, NULL) > 0)
	{
		HeapTuple	row = SPI_tuptable->vals[0];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		SentdmRefreshed kept;

		kept.send_at = DatumGetTimestampTz(SPI_getbinval(row, desc, 1, &isnull));
		kept.message_id = *DatumGetUUIDP(SPI_getbinval(row, desc, 2, &isnull));
		kept.sent_id = *DatumGetUUIDP(SPI_getbinval(row, desc, 3, &isnull));
		if (scheduled ? kept.send_at > from.send_at :
			memcmp(&kept.message_id, &from.message_id, UUID_LEN) > 0)
			from = kept;
	}
	return from;
}

static void
store_position(bool scheduled, int pass, const SentdmRefreshed *upto)
{
	static SentdmStatement store = {
		.sql = "INSERT INTO sentdm.refreshes (scheduled, pass, send_at, message_id, sent_id) VALUES ($1, $2, $3, $4, $5) "
		"ON CONFLICT (scheduled, pass) DO UPDATE SET send_at = excluded.send_at,"
		"  message_id = excluded.message_id, sent_id = excluded.sent_id",
		.nargs = 5,
		.types = {BOOLOID, INT4OID, TIMESTAMPTZOID, UUIDOID, UUIDOID}
	};
	Datum		values[5];

	values[0] = BoolGetDatum(scheduled);
	values[1] = Int32GetDatum(pass);
	values[2] = TimestampTzGetDatum(upto->send_at);
	values[3] = UUIDPGetDatum(&upto->message_id);
	values[4] = UUIDPGetDatum(&upto->sent_id);
	sentdm_execute(&store, values, NULL);
}

/*
 * Recipients without a final status of the next messages: as many as fit into a
 * batch; then one row with the last message that was looked at.  These are as
 * many as have a thousand recipients, but two at least, for the first may be the
 * one that was looked at last.
 */
#define TO_REFRESH(range, message_order, last_first, after) { \
	.sql = "WITH looked AS MATERIALIZED (SELECT n.* FROM (" \
	"  SELECT m.id, m.send_at, m.state, m.profile_id, m.request -> 'sandbox' AS sandbox," \
	"    row_number() OVER w <= 2" \
	"      OR sum(pg_catalog.jsonb_array_length(m.request -> 'to')) OVER w <= 1000 AS taken" \
	"  FROM (SELECT m.* FROM sentdm.messages m WHERE " range " ORDER BY " message_order " LIMIT 1000) AS m" \
	"  WINDOW w AS (ORDER BY " message_order ")) AS n WHERE n.taken)," \
	" found AS MATERIALIZED (SELECT l.id, l.send_at, d.sent_id, l.profile_id::text FROM looked l" \
	"  CROSS JOIN LATERAL (SELECT d.sent_id FROM sentdm.deliveries d WHERE d.message_id = l.id" \
	"    AND d.sent_id IS NOT NULL AND d.status <> ALL" \
	"      ('{delivered,read,failed,filtered,blocked,cancelled}'::text[])) AS d" \
	"  WHERE l.state = 'accepted' AND l.sandbox IS DISTINCT FROM 'true' AND " after \
	"  ORDER BY l.send_at, l.id, d.sent_id LIMIT $5)," \
	" last AS (SELECT m.id, m.send_at FROM looked m ORDER BY " last_first " LIMIT 1) " \
	"SELECT id, send_at, sent_id, profile_id FROM (SELECT * FROM found" \
	"  UNION ALL SELECT id, send_at, NULL, NULL FROM last) AS f ORDER BY sent_id IS NULL, send_at, id, sent_id", \
	.nargs = 6, \
	.types = {TIMESTAMPTZOID, UUIDOID, UUIDOID, UUIDOID, INT4OID, TIMESTAMPTZOID} \
}

static uint64
find_to_refresh(bool scheduled, const SentdmRefreshed *from, TimestampTz until)
{
	static SentdmStatement by_id = TO_REFRESH("m.id >= $2 AND m.id < $4", "m.id", "m.id DESC",
											  "l.send_at IS NULL AND (l.id, d.sent_id) > ($2, $3)");
	static SentdmStatement by_send_at = TO_REFRESH("(m.send_at, m.id) >= ($1, $2) AND m.send_at < $6",
												   "m.send_at, m.id", "m.send_at DESC, m.id DESC",
												   "(l.send_at, l.id, d.sent_id) > ($1, $2, $3)");
	Datum		values[6];
	pg_uuid_t	until_id = id_at(until);

	values[0] = TimestampTzGetDatum(from->send_at);
	values[1] = UUIDPGetDatum(&from->message_id);
	values[2] = UUIDPGetDatum(&from->sent_id);
	values[3] = UUIDPGetDatum(&until_id);
	values[4] = Int32GetDatum(SENTDM_REFRESH_BATCH);
	values[5] = TimestampTzGetDatum(until);
	return sentdm_execute(scheduled ? &by_send_at : &by_id, values, NULL);
}

/* Take over what was found; false: nothing, not even a message to leave behind. */
static bool
take_batch(SentdmChores *chores, const SentdmRefreshed *from, uint64 n)
{
	TupleDesc	desc = SPI_tuptable->tupdesc;
	bool		isnull;

	chores->n_batch = 0;
	chores->next = 0;
	for (uint64 i = 0; i < n; i++)
	{
		HeapTuple	row = SPI_tuptable->vals[i];
		Datum		sent_id = SPI_getbinval(row, desc, 3, &isnull);
		char	   *profile_id = SPI_getvalue(row, desc, 4);

		/* A full batch ends with a recipient, any other with a message. */
		if (isnull && chores->n_batch == SENTDM_REFRESH_BATCH)
			break;
		memset(&chores->upto.sent_id, isnull ? 0xff : 0, UUID_LEN);
		if (!isnull)
		{
			SentdmToRefresh *delivery = &chores->batch[chores->n_batch++];

			chores->upto.sent_id = *DatumGetUUIDP(sent_id);
			delivery->sent_id = chores->upto.sent_id;
			strlcpy(delivery->profile_id, profile_id ? profile_id : "", sizeof(delivery->profile_id));
		}
		chores->upto.message_id = *DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
		chores->upto.send_at = DatumGetTimestampTz(SPI_getbinval(row, desc, 2, &isnull));
		if (isnull)
			chores->upto.send_at = from->send_at;
	}
	return chores->n_batch > 0 ||
		(n > 0 && memcmp(&chores->upto.message_id, &from->message_id, UUID_LEN) != 0);
}

/* When a pass has something to look at. */
static TimestampTz
pass_is_due(bool scheduled, int pass, const SentdmRefreshed *from)
{
	static SentdmStatement by_id = {
		.sql = "SELECT m.id, NULL::timestamptz FROM sentdm.messages m WHERE m.id > $2 ORDER BY m.id LIMIT 1",
		.nargs = 2,
		.types = {TIMESTAMPTZOID, UUIDOID}
	};
	static SentdmStatement by_send_at = {
		.sql = "SELECT m.id, m.send_at FROM sentdm.messages m WHERE (m.send_at, m.id) > ($1, $2)"
		" ORDER BY m.send_at, m.id LIMIT 1",
		.nargs = 2,
		.types = {TIMESTAMPTZOID, UUIDOID}
	};
	Datum		values[2];
	TimestampTz time;
	bool		isnull;

	values[0] = TimestampTzGetDatum(from->send_at);
	values[1] = UUIDPGetDatum(&from->message_id);
	if (sentdm_execute(scheduled ? &by_send_at : &by_id, values, NULL) == 0)
		return DT_NOEND;
	if (scheduled)
		time = DatumGetTimestampTz(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	else
		time = time_of_id(DatumGetUUIDP(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull)));
	/* An id of the same millisecond as the limit is not before it. */
	return time + age_of_pass_us(pass) + 1000;
}

/* A batch of some pass, if there is one; otherwise when to look again. */
static bool
find_batch(SentdmChores *chores, TimestampTz now)
{
	for (int i = 0; i < 2 * PASSES; i++)
	{
		bool		scheduled = i % 2 != 0;
		int			pass = i / 2;
		SentdmRefreshed from = position_of(scheduled, pass, now);
		uint64		n = find_to_refresh(scheduled, &from, now - age_of_pass_us(pass));

		if (take_batch(chores, &from, n))
		{
			chores->scheduled = scheduled;
			chores->pass = pass;
			return true;
		}
		chores->due = Min(chores->due, pass_is_due(scheduled, pass, &from));
	}
	return false;
}

static void
store_answer(const SentdmToRefresh *delivery, const SentdmHttpResult *result)
{
	static SentdmStatement apply = {
		.sql = "SELECT sentdm.apply_answers(pg_catalog.jsonb_build_array("
		"pg_catalog.jsonb_build_object('sent_id', $1, 'answer', $2 -> 'data')))",
		.nargs = 2,
		.types = {UUIDOID, JSONBOID}
	};
	Datum		values[2];
	Jsonb	   *json = parse(result);

	if (json == NULL)
		return;
	values[0] = UUIDPGetDatum(&delivery->sent_id);
	values[1] = JsonbPGetDatum(json);
	sentdm_execute(&apply, values, NULL);
}

/* Webhooks */

/* The webhook that was not looked at for longest, if it is its turn. */
static bool
find_webhook(SentdmChores *chores, TimestampTz now)
{
	static SentdmStatement find = {
		.sql = "SELECT id, coalesce(checked_at, '-infinity'), backfilled_until,"
		"  trouble IS NOT NULL OR coalesce(failures > 0, false)"
		" FROM sentdm.webhooks ORDER BY checked_at NULLS FIRST LIMIT 1"
	};
	HeapTuple	row;
	TupleDesc	desc;
	TimestampTz checked_at;
	bool		isnull;

	if (sentdm_execute(&find, NULL, NULL) == 0)
		return false;
	row = SPI_tuptable->vals[0];
	desc = SPI_tuptable->tupdesc;
	checked_at = DatumGetTimestampTz(SPI_getbinval(row, desc, 2, &isnull));
	if (checked_at != DT_NOBEGIN && checked_at <= now &&
		checked_at + sentdm_check_webhook_s * USECS_PER_SEC > now)
	{
		chores->due = Min(chores->due, checked_at + sentdm_check_webhook_s * USECS_PER_SEC);
		return false;
	}
	chores->webhook_id = *DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
	chores->looked_at = now;
	chores->backfill_from = DatumGetTimestampTz(SPI_getbinval(row, desc, 3, &isnull)) - BACKFILL_MARGIN_US;
	chores->thorough = DatumGetBool(SPI_getbinval(row, desc, 4, &isnull));
	return true;
}

static void
note_checked(const SentdmChores *chores)
{
	static SentdmStatement note = {
		.sql = "UPDATE sentdm.webhooks SET checked_at = $2 WHERE id = $1",
		.nargs = 2,
		.types = {UUIDOID, TIMESTAMPTZOID}
	};
	Datum		values[2];

	values[0] = UUIDPGetDatum(&chores->webhook_id);
	values[1] = TimestampTzGetDatum(chores->looked_at);
	sentdm_execute(&note, values, NULL);
}

/* Store what Sent says about the webhook; what follows is the next chore. */
static SentdmChore
store_webhook(SentdmChores *chores, Jsonb *answer)
{
	static SentdmStatement store = {
		.sql = "UPDATE sentdm.webhooks w SET checked_at = $3, active = n.active, failures = n.failures, trouble = CASE"
		"  WHEN $2 IS NULL THEN 'Sent does not know it'"
		"  WHEN NOT n.active THEN 'Sent has disabled it'"
		"  WHEN n.failures >= 3 THEN pg_catalog.format('Sent could not post the last %s events', n.failures) END "
		"FROM sentdm.webhooks old,"
		"  (SELECT coalesce($2 #> '{data,is_active}' = 'true', false) AS active,"
		"    CASE WHEN $2 #>> '{data,consecutive_failures}' ~ '^[0-9]{1,9}$'"
		"      THEN ($2 #>> '{data,consecutive_failures}')::integer ELSE 0 END AS failures) AS n "
		"WHERE w.id = $1 AND old.id = $1 "
		"RETURNING w.active, w.failures > 0,"
		"  CASE WHEN old.trouble IS NULL OR old.active AND NOT w.active THEN w.trouble END",
		.nargs = 3,
		.types = {UUIDOID, JSONBOID, TIMESTAMPTZOID}
	};
	Datum		values[3];
	char	   *trouble;
	bool		active;
	bool		isnull;

	values[0] = UUIDPGetDatum(&chores->webhook_id);
	values[1] = JsonbPGetDatum(answer);
	values[2] = TimestampTzGetDatum(chores->looked_at);
	if (sentdm_execute(&store, values, answer ? NULL : " n ") == 0)
		return SENTDM_NO_CHORE;
	active = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	if (DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull)) || !active)
		chores->thorough = true;
	trouble = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 3);
	if (trouble != NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("webhook %s: %s", uuid_text(&chores->webhook_id), trouble),
				 errhint("See sentdm.problems.")));
	if (answer == NULL)
		return SENTDM_NO_CHORE;
	chores->page = 1;
	return active || !sentdm_reactivate_webhook ? SENTDM_READ_EVENTS : SENTDM_REACTIVATE_WEBHOOK;
}

static void
store_reactivated(SentdmChores *chores)
{
	static SentdmStatement store = {
		.sql = "UPDATE sentdm.webhooks SET active = true, failures = 0, trouble = NULL WHERE id = $1",
		.nargs = 1,
		.types = {UUIDOID}
	};
	Datum		values[1];

	values[0] = UUIDPGetDatum(&chores->webhook_id);
	sentdm_execute(&store, values, NULL);
	ereport(LOG,
			(errmsg("webhook %s: Sent had disabled it, and posts to it again", uuid_text(&chores->webhook_id))));
}

/*
 * Record what is missing of a page of the log; the newest come first.  All pages
 * are read when there was trouble; otherwise while something is missing, because
 * an account may have thousands of pages a day.
 */
static SentdmChore
store_events(SentdmChores *chores, Jsonb *answer)
{
	static SentdmStatement record = {
		.sql = "WITH e AS MATERIALIZED (SELECT r.e, (r.e ->> 'created_at')::timestamptz AS at"
		"  FROM pg_catalog.jsonb_array_elements($2 #> '{data,events}') AS r(e)) "
		"SELECT sentdm.record_events($1, ARRAY(SELECT e -> 'event_data' FROM e WHERE at >= $3 AND at < $4 ORDER BY at)),"
		"  (SELECT coalesce(min(at) >= $3, false) FROM e)",
		.nargs = 4,
		.types = {UUIDOID, JSONBOID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	};
	static SentdmStatement finish = {
		.sql = "UPDATE sentdm.webhooks SET backfilled_until = greatest(backfilled_until, $2) WHERE id = $1",
		.nargs = 2,
		.types = {UUIDOID, TIMESTAMPTZOID}
	};
	TimestampTz until = chores->looked_at - Min(YOUNG_EVENT_S, sentdm_check_webhook_s) * USECS_PER_SEC;
	Datum		values[4];
	int64		missing;
	bool		more;
	bool		isnull;

	values[0] = UUIDPGetDatum(&chores->webhook_id);
	values[1] = JsonbPGetDatum(answer);
	values[2] = TimestampTzGetDatum(chores->backfill_from);
	values[3] = TimestampTzGetDatum(until);
	sentdm_execute(&record, values, NULL);
	missing = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	more = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	if (missing > 0)
		ereport(LOG,
				(errmsg("webhook %s: fetched %lld events that did not arrive", uuid_text(&chores->webhook_id),
						(long long) missing)));
	chores->page++;
	if (more && (chores->thorough || missing > 0))
		return SENTDM_READ_EVENTS;
	values[1] = TimestampTzGetDatum(until);
	sentdm_execute(&finish, values, NULL);
	return SENTDM_NO_CHORE;
}

/* Taking answers */

typedef struct Taken
{
	SentdmChores *chores;
	const SentdmHttpResult *result;
	Verdict		verdict;
	SentdmChore next;			/* what follows from it */
} Taken;

static SentdmChore
take_refreshed(SentdmChores *chores, const Taken *taken)
{
	if (taken->verdict == GOOD)
		store_answer(&chores->batch[chores->next], taken->result);
	if (chores->next + 1 < chores->n_batch)
		return SENTDM_REFRESH;
	store_position(chores->scheduled, chores->pass, &chores->upto);
	return SENTDM_NO_CHORE;
}

static SentdmChore
take_webhook(SentdmChores *chores, const Taken *taken)
{
	Jsonb	   *answer = taken->verdict == GOOD ? parse(taken->result) : NULL;

	if (answer == NULL && !(chores->chore == SENTDM_LOOK_AT_WEBHOOK && taken->result->http_status == 404))
	{
		note_checked(chores);
		return SENTDM_NO_CHORE;
	}
	if (chores->chore == SENTDM_LOOK_AT_WEBHOOK)
		return store_webhook(chores, answer);
	if (chores->chore == SENTDM_READ_EVENTS)
		return store_events(chores, answer);
	store_reactivated(chores);
	return SENTDM_READ_EVENTS;
}

static void
take_body(void *arg)
{
	Taken	   *taken = arg;

	SPI_connect();
	taken->next = taken->chores->chore == SENTDM_REFRESH ?
		take_refreshed(taken->chores, taken) : take_webhook(taken->chores, taken);
	SPI_finish();
	sentdm_commit_may_be_lost();
}

/* What can be learned from an answer is stored, and decides what is next. */
static void
take(SentdmChores *chores, const SentdmHttpResult *result)
{
	Taken		taken = {chores, result, judge(result), SENTDM_NO_CHORE};

	chores->asking = false;
	if (taken.verdict == LATER && ++chores->failures < MOST_FAILURES)
	{
		chores->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sentdm_retry_max_ms);
		return;
	}
	if (taken.verdict == REFUSED)
	{
		/* 403 is about what was asked for, 401 about the key. */
		for (int i = 0; i < SENTDM_CHORES; i++)
		{
			if (i == chores->chore || result->http_status == 401)
				chores->refused[i] = chores->flight->access_hash;
		}
		chores->chore = SENTDM_NO_CHORE;
		return;
	}
	/* If it cannot be stored, the same is asked again, later. */
	if (!sentdm_transact(&chores->backoff, take_body, &taken))
		return;
	chores->failures = 0;
	if (chores->chore == SENTDM_REFRESH)
		chores->next++;
	chores->chore = taken.next;
}

/* What is next */

static bool
may(const SentdmChores *chores, SentdmChore chore)
{
	return chores->refused[chore] == 0 || chores->refused[chore] != chores->flight->access_hash;
}

static void
find_body(void *arg)
{
	SentdmChores *chores = arg;
	TimestampTz now = GetCurrentTimestamp();

	chores->due = DT_NOEND;
	SPI_connect();
	if (sentdm_check_webhook_s > 0 && may(chores, SENTDM_LOOK_AT_WEBHOOK) && find_webhook(chores, now))
		chores->chore = SENTDM_LOOK_AT_WEBHOOK;
	else if (sentdm_refresh_after_s > 0 && may(chores, SENTDM_REFRESH) && find_batch(chores, now))
	{
		if (chores->n_batch > 0)
			chores->chore = SENTDM_REFRESH;
		else
			store_position(chores->scheduled, chores->pass, &chores->upto);
		chores->due = DT_NOBEGIN;
	}
	if (chores->chore != SENTDM_NO_CHORE)
		chores->due = DT_NOBEGIN;
	SPI_finish();
	sentdm_commit_may_be_lost();
}

static void
find(SentdmChores *chores)
{
	chores->failures = 0;
	if (!sentdm_transact(&chores->backoff, find_body, chores))
	{
		chores->chore = SENTDM_NO_CHORE;
		chores->due = chores->backoff.until;
	}
}

void
sentdm_chores_run(SentdmChores *chores, bool may_ask)
{
	/* Also in between: a connection that ends makes the descriptor readable. */
	sentdm_http_run(chores->http);
	if (chores->result == NULL)
		chores->result = sentdm_http_next_result(chores->http);
	if (chores->result != NULL)
		take(chores, chores->result);
	sentdm_http_free_result(chores->result);
	chores->result = NULL;
	if (chores->asking || !may_ask)
		return;
	if (sentdm_backing_off(&chores->backoff) || chores->flight->drain.pause != SENTDM_PAUSE_NONE)
		return;
	if (chores->chore == SENTDM_NO_CHORE && chores->due <= GetCurrentTimestamp())
		find(chores);
	if (chores->chore != SENTDM_NO_CHORE && chores->not_before <= GetCurrentTimestamp() &&
		sentdm_share_take() && take_from_rates(&chores->flight->drain))
		ask(chores);
}

void
sentdm_chores_open(SentdmChores *chores)
{
	sentdm_http_free_result(chores->result);
	chores->result = NULL;
	sentdm_http_destroy(chores->http);
	chores->http = NULL;
	chores->http = sentdm_account_http(1);
	chores->asking = false;
	sentdm_chores_look(chores);
}

void
sentdm_chores_look(SentdmChores *chores)
{
	if (!chores->asking)
		chores->chore = SENTDM_NO_CHORE;
	chores->due = DT_NOBEGIN;
}

void
sentdm_chores_expect(SentdmChores *chores)
{
	if (sentdm_refresh_after_s > 0)
		chores->due = Min(chores->due, GetCurrentTimestamp() + age_of_pass_us(0));
}

TimestampTz
sentdm_chores_next_due(const SentdmChores *chores)
{
	if (chores->asking)
		return DT_NOBEGIN;
	return chores->chore != SENTDM_NO_CHORE ? chores->not_before : chores->due;
}

long
sentdm_chores_wait_ms(const SentdmChores *chores)
{
	SentdmDrain *drain = &chores->flight->drain;
	int64_t		ready_us;
	long		wait_ms;

	if (chores->result != NULL)
		return 0;
	if (chores->asking || chores->flight->drain.pause != SENTDM_PAUSE_NONE)
		return SENTDM_LONGEST_WAIT_MS;
	if (sentdm_backing_off(&chores->backoff))
		return sentdm_ms_until(chores->backoff.until);
	wait_ms = sentdm_ms_until(sentdm_chores_next_due(chores));
	if (chores->chore == SENTDM_NO_CHORE)
		return wait_ms;
	/* Another worker tries the key: it will set the latch. */
	if (!sentdm_share_is_free())
		return SENTDM_LONGEST_WAIT_MS;
	sentdm_share_lock(&drain->rates);
	ready_us = sentdm_drain_ready_us(drain, SENTDM_BULK, sentdm_clock_us());
	sentdm_share_unlock(&drain->rates);
	return Max(wait_ms, sentdm_ms_until_us(ready_us));
}
