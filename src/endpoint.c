/*
 * endpoint.c
 *		The webhooks that are registered here: does Sent still post to them, and
 *		what did not arrive?
 *
 * All within transactions of chores.c, which does the asking.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "endpoint.h"
#include "sentdm.h"
#include "sql.h"

#define BACKFILL_MARGIN_US (300 * USECS_PER_SEC)	/* two clocks may differ */
#define MOST_CLEAN_PAGES 500
#define YOUNG_EVENT_S 60		/* may be under way */

static char *
uuid_text(const pg_uuid_t *uuid)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(uuid)));
}

bool
sentdm_endpoint_find(SentdmEndpoint *endpoint, TimestampTz now, TimestampTz *due)
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
		*due = Min(*due, checked_at + sentdm_check_webhook_s * USECS_PER_SEC);
		return false;
	}
	endpoint->id = *DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
	endpoint->looked_at = now;
	endpoint->backfill_from = DatumGetTimestampTz(SPI_getbinval(row, desc, 3, &isnull)) - BACKFILL_MARGIN_US;
	endpoint->thorough = DatumGetBool(SPI_getbinval(row, desc, 4, &isnull));
	return true;
}

void
sentdm_endpoint_checked(const SentdmEndpoint *endpoint)
{
	static SentdmStatement note = {
		.sql = "UPDATE sentdm.webhooks SET checked_at = $2 WHERE id = $1",
		.nargs = 2,
		.types = {UUIDOID, TIMESTAMPTZOID}
	};
	Datum		values[2];

	values[0] = UUIDPGetDatum(&endpoint->id);
	values[1] = TimestampTzGetDatum(endpoint->looked_at);
	sentdm_execute(&note, values, NULL);
}

SentdmEndpointNeed
sentdm_endpoint_store(SentdmEndpoint *endpoint, Jsonb *answer)
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

	values[0] = UUIDPGetDatum(&endpoint->id);
	values[1] = JsonbPGetDatum(answer);
	values[2] = TimestampTzGetDatum(endpoint->looked_at);
	if (sentdm_execute(&store, values, answer ? NULL : " n ") == 0)
		return SENTDM_ENDPOINT_DONE;
	active = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	if (DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull)) || !active)
		endpoint->thorough = true;
	trouble = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 3);
	if (trouble != NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("webhook %s: %s", uuid_text(&endpoint->id), trouble),
				 errhint("See sentdm.problems.")));
	if (answer == NULL)
		return SENTDM_ENDPOINT_DONE;
	endpoint->page = 1;
	endpoint->clean_pages = 0;
	return active || !sentdm_reactivate_webhook ? SENTDM_ENDPOINT_EVENTS : SENTDM_ENDPOINT_ACTIVATION;
}

void
sentdm_endpoint_reactivated(const SentdmEndpoint *endpoint)
{
	static SentdmStatement store = {
		.sql = "UPDATE sentdm.webhooks SET active = true, failures = 0, trouble = NULL WHERE id = $1",
		.nargs = 1,
		.types = {UUIDOID}
	};
	Datum		values[1];

	values[0] = UUIDPGetDatum(&endpoint->id);
	sentdm_execute(&store, values, NULL);
	ereport(LOG,
			(errmsg("webhook %s: Sent had disabled it, and posts to it again", uuid_text(&endpoint->id))));
}

/*
 * Record what is missing of a page of the log; the newest come first.
 *
 * The log is read back to where the last look began: an event can be missed while
 * those around it arrive, and nothing else would tell.  Only where that is a great
 * many pages, all of them known, and there was no trouble, is the rest left unread,
 * so that looking never takes much of the rate.
 */
SentdmEndpointNeed
sentdm_endpoint_events(SentdmEndpoint *endpoint, Jsonb *answer)
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
	TimestampTz until = endpoint->looked_at - Min(YOUNG_EVENT_S, sentdm_check_webhook_s) * USECS_PER_SEC;
	Datum		values[4];
	int64		missing;
	bool		more;
	bool		isnull;

	values[0] = UUIDPGetDatum(&endpoint->id);
	values[1] = JsonbPGetDatum(answer);
	values[2] = TimestampTzGetDatum(endpoint->backfill_from);
	values[3] = TimestampTzGetDatum(until);
	sentdm_execute(&record, values, NULL);
	missing = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	more = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	if (missing > 0)
		ereport(LOG,
				(errmsg("webhook %s: fetched %lld events that did not arrive", uuid_text(&endpoint->id),
						(long long) missing)));
	endpoint->page++;
	endpoint->clean_pages = missing > 0 ? 0 : endpoint->clean_pages + 1;
	if (more && (endpoint->thorough || endpoint->clean_pages < MOST_CLEAN_PAGES))
		return SENTDM_ENDPOINT_EVENTS;
	if (more)
		ereport(LOG,
				(errmsg("webhook %s: only the newest %d events since the last look were looked at",
						uuid_text(&endpoint->id), MOST_CLEAN_PAGES * 100),
				 errhint("Set sentdm.check_webhook to a shorter time.")));
	values[1] = TimestampTzGetDatum(until);
	sentdm_execute(&finish, values, NULL);
	return SENTDM_ENDPOINT_DONE;
}
