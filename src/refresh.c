/*
 * refresh.c
 *		Which messages to ask Sent for, because their receipt did not come.
 *
 * A message is asked for when it is sentdm.refresh_after old, and at 4, 16, 64 and
 * 256 times that age; then never again.  Each pass goes through the messages in
 * the order of time, which is that of their ids, and remembers how far it came:
 * so neither sending nor receipts write anything for it, and an idle database is
 * not read.  All within transactions of chores.c, which does the asking.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "refresh.h"
#include "sentdm.h"
#include "sql.h"

#define PASSES 5
#define PASS_FACTOR 4
#define UNIX_EPOCH_MS ((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY * 1000)

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
take_batch(SentdmRefresh *refresh, const SentdmRefreshed *from, uint64 n)
{
	TupleDesc	desc = SPI_tuptable->tupdesc;
	bool		isnull;

	refresh->n = 0;
	refresh->next = 0;
	for (uint64 i = 0; i < n; i++)
	{
		HeapTuple	row = SPI_tuptable->vals[i];
		Datum		sent_id = SPI_getbinval(row, desc, 3, &isnull);
		char	   *profile_id = SPI_getvalue(row, desc, 4);

		/* A full batch ends with a recipient, any other with a message. */
		if (isnull && refresh->n == SENTDM_REFRESH_BATCH)
			break;
		memset(&refresh->upto.sent_id, isnull ? 0xff : 0, UUID_LEN);
		if (!isnull)
		{
			SentdmToRefresh *delivery = &refresh->batch[refresh->n++];

			refresh->upto.sent_id = *DatumGetUUIDP(sent_id);
			delivery->sent_id = refresh->upto.sent_id;
			strlcpy(delivery->profile_id, profile_id ? profile_id : "", sizeof(delivery->profile_id));
		}
		refresh->upto.message_id = *DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
		refresh->upto.send_at = DatumGetTimestampTz(SPI_getbinval(row, desc, 2, &isnull));
		if (isnull)
			refresh->upto.send_at = from->send_at;
	}
	return refresh->n > 0 ||
		(n > 0 && memcmp(&refresh->upto.message_id, &from->message_id, UUID_LEN) != 0);
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
		" AND m.send_at >= $1"	/* or the planner does not see that the index
								 * has it */
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

bool
sentdm_refresh_find(SentdmRefresh *refresh, TimestampTz now, TimestampTz *due)
{
	for (int i = 0; i < 2 * PASSES; i++)
	{
		bool		scheduled = i % 2 != 0;
		int			pass = i / 2;
		SentdmRefreshed from = position_of(scheduled, pass, now);
		uint64		n = find_to_refresh(scheduled, &from, now - age_of_pass_us(pass));

		if (take_batch(refresh, &from, n))
		{
			refresh->scheduled = scheduled;
			refresh->pass = pass;
			return true;
		}
		*due = Min(*due, pass_is_due(scheduled, pass, &from));
	}
	return false;
}

void
sentdm_refresh_store(const SentdmRefresh *refresh, Jsonb *answer)
{
	static SentdmStatement apply = {
		.sql = "SELECT sentdm.apply_answers(pg_catalog.jsonb_build_array("
		"pg_catalog.jsonb_build_object('sent_id', $1, 'answer', $2 -> 'data')))",
		.nargs = 2,
		.types = {UUIDOID, JSONBOID}
	};
	Datum		values[2];

	values[0] = UUIDPGetDatum(&refresh->batch[refresh->next].sent_id);
	values[1] = JsonbPGetDatum(answer);
	sentdm_execute(&apply, values, NULL);
}

void
sentdm_refresh_finish(const SentdmRefresh *refresh)
{
	store_position(refresh->scheduled, refresh->pass, &refresh->upto);
}

int64
sentdm_refresh_age_us(void)
{
	return age_of_pass_us(0);
}
