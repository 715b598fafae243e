/*
 * retention.c
 *		Deleting what was kept for long enough, in small batches.
 *
 * A pass goes through the tables in the order of their keys, which is about the
 * order in which rows came, and so needs no index of its own: an index on a time
 * would be paid for by every message.  A batch looks at a bounded number of
 * rows, in a short transaction; rows that somebody has locked are left for the
 * next pass.  What is queued has not finished, and is never touched.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "retention.h"
#include "sentdm.h"
#include "sql.h"
#include "transact.h"

PG_FUNCTION_INFO_V1(sentdm_prune);

#define BATCH 1000				/* rows, and recipients of messages */
#define LONGEST_PASS_INTERVAL_MS (3600 * 1000)
#define REST_FACTOR 9			/* rest so many times as long as a batch took */
#define MIN_REST_MS 10

/* Where the pass is: in which step, and after which key; "": at its beginning. */
typedef struct Pass
{
	int			step;
	char		position[40];
} Pass;

/*
 * A step takes the key after which to look ($1, NULL: from the beginning), the
 * time before which something is old ($2) and how much to look at ($3).  It
 * returns the last key it looked at, NULL at the end of the step, and how many
 * rows it changed.
 */
typedef struct Step
{
	const int  *kept_s;			/* setting: seconds */
	int			off;			/* its value that means "for ever" */
	SentdmStatement statement;
} Step;

/* Messages from a key on: so many, or those with so many recipients. */
#define LOOK_AT_MESSAGES "looked AS MATERIALIZED (SELECT l.id, l.created_at," \
	"    row_number() OVER w = 1 OR sum(l.recipients) OVER w <= $3 AS taken" \
	"  FROM (SELECT m.id, m.created_at, pg_catalog.jsonb_array_length(m.request -> 'to') AS recipients" \
	"    FROM sentdm.messages m WHERE m.id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000')" \
	"    ORDER BY m.id LIMIT $3) l WINDOW w AS (ORDER BY l.id))"
#define MESSAGES_SEEN "SELECT CASE WHEN NOT pg_catalog.bool_and(taken) OR count(*) = $3" \
	"  AND (pg_catalog.array_agg(created_at ORDER BY id DESC))[1] < $2" \
	" THEN (pg_catalog.array_agg(id ORDER BY id DESC) FILTER (WHERE taken))[1]::text END"
#define LOOK_AT_EVENTS "looked AS MATERIALIZED (SELECT e.id, e.received_at FROM sentdm.events e" \
	" WHERE e.id > coalesce($1::bigint, 0) ORDER BY e.id LIMIT $3)"
#define EVENTS_SEEN "SELECT CASE WHEN count(*) = $3" \
	"  AND (pg_catalog.array_agg(received_at ORDER BY id DESC))[1] < $2 THEN max(id)::text END"
#define ARGUMENTS .nargs = 3, .types = {TEXTOID, TIMESTAMPTZOID, INT4OID}

static Step steps[] = {
	{&sentdm_retention_s, 0, {
			.sql = "WITH " LOOK_AT_MESSAGES ","
			" old AS MATERIALIZED (SELECT m.id FROM sentdm.messages m JOIN looked l ON l.id = m.id"
			"  WHERE l.taken AND m.finished_at < $2 FOR UPDATE OF m SKIP LOCKED),"
			" gone AS (DELETE FROM sentdm.messages m USING old WHERE m.id = old.id),"
			" receipts AS (DELETE FROM sentdm.deliveries d USING old WHERE d.message_id = old.id RETURNING 1) "
			MESSAGES_SEEN ", (SELECT count(*) FROM old) + (SELECT count(*) FROM receipts) FROM looked",
			ARGUMENTS
	}},
	{&sentdm_retention_s, 0, {
			.sql = "WITH " LOOK_AT_EVENTS ","
			" old AS MATERIALIZED (SELECT e.id FROM sentdm.events e JOIN looked l ON l.id = e.id"
			"  WHERE e.received_at < $2 FOR UPDATE OF e SKIP LOCKED),"
			" gone AS (DELETE FROM sentdm.events e USING old WHERE e.id = old.id) "
			EVENTS_SEEN ", (SELECT count(*) FROM old) FROM looked",
			ARGUMENTS
	}},
	/* Receipts of what was sent elsewhere, once no event is kept about them. */
	{&sentdm_retention_s, 0, {
			.sql = "WITH looked AS MATERIALIZED (SELECT d.sent_id FROM sentdm.deliveries d"
			"  WHERE d.message_id IS NULL AND d.sent_id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000')"
			"  ORDER BY d.sent_id LIMIT $3),"
			" old AS MATERIALIZED (SELECT d.sent_id FROM sentdm.deliveries d JOIN looked l ON l.sent_id = d.sent_id"
			"  WHERE d.message_id IS NULL AND coalesce(d.status_at, '-infinity') < $2"
			"    AND NOT EXISTS (SELECT FROM sentdm.events e WHERE e.sent_id = d.sent_id)"
			"  FOR UPDATE OF d SKIP LOCKED),"
			" gone AS (DELETE FROM sentdm.deliveries d USING old WHERE d.sent_id = old.sent_id) "
			"SELECT CASE WHEN count(*) = $3 THEN (pg_catalog.array_agg(sent_id ORDER BY sent_id DESC))[1]::text END,"
			"  (SELECT count(*) FROM old) FROM looked",
			ARGUMENTS
	}},
	/* Failed and uncertain messages keep their content: they may be retried. */
	{&sentdm_body_retention_s, -1, {
			.sql = "WITH " LOOK_AT_MESSAGES ","
			" old AS MATERIALIZED (SELECT m.id FROM sentdm.messages m JOIN looked l ON l.id = m.id"
			"  WHERE l.taken AND m.finished_at < $2 AND m.erased_at IS NULL"
			"    AND m.state IN ('accepted', 'expired', 'cancelled') FOR UPDATE OF m SKIP LOCKED),"
			" emptied AS (UPDATE sentdm.messages m SET request = sentdm.without_content(m.request),"
			"  erased_at = pg_catalog.now() FROM old WHERE m.id = old.id) "
			MESSAGES_SEEN ", (SELECT count(*) FROM old) FROM looked",
			ARGUMENTS
	}},
	/* Sent's events repeat the text. */
	{&sentdm_body_retention_s, -1, {
			.sql = "WITH " LOOK_AT_EVENTS ","
			" old AS MATERIALIZED (SELECT e.id FROM sentdm.events e JOIN looked l ON l.id = e.id"
			"  WHERE e.received_at < $2 AND e.event LIKE 'message.%' AND e.event <> 'message.received'"
			"    AND pg_catalog.jsonb_typeof(e.payload #> '{payload,body}') = 'string' FOR UPDATE OF e SKIP LOCKED),"
			" emptied AS (UPDATE sentdm.events e SET payload = e.payload #- '{payload,body}'"
			"  FROM old WHERE e.id = old.id) "
			EVENTS_SEEN ", (SELECT count(*) FROM old) FROM looked",
			ARGUMENTS
	}},
};

static bool
is_wanted(const Step *step)
{
	return *step->kept_s != step->off;
}

/* One batch; moves the pass on, and returns how many rows it changed. */
static int64
take_batch(Pass *pass)
{
	Step	   *step = &steps[pass->step];
	Datum		values[3];
	char	   *position;
	int64		changed;
	bool		isnull;

	values[0] = CStringGetTextDatum(pass->position);
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp() - *step->kept_s * USECS_PER_SEC);
	values[2] = Int32GetDatum(BATCH);
	SPI_connect();
	sentdm_execute(&step->statement, values, pass->position[0] ? NULL : "n  ");
	position = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	changed = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	strlcpy(pass->position, position ? position : "", sizeof(pass->position));
	if (position == NULL)
		pass->step++;
	SPI_finish();
	return changed;
}

/* Go to the next step that has something to do; false: the pass is over. */
static bool
find_step(Pass *pass)
{
	while (pass->step < lengthof(steps) && !is_wanted(&steps[pass->step]))
		pass->step++;
	return pass->step < lengthof(steps);
}

/* How long until another pass: often enough that nothing is kept much too long. */
static TimestampTz
next_pass(TimestampTz now)
{
	int64		interval_ms = -1;

	for (int i = 0; i < lengthof(steps); i++)
	{
		int64		tenth_ms = Min(Max((int64) *steps[i].kept_s * 100, 1000), LONGEST_PASS_INTERVAL_MS);

		if (is_wanted(&steps[i]))
			interval_ms = interval_ms < 0 ? tenth_ms : Min(interval_ms, tenth_ms);
	}
	return interval_ms < 0 ? DT_NOEND : TimestampTzPlusMilliseconds(now, interval_ms);
}

static void
step_body(void *arg)
{
	/* Somebody who has a row locked must not hold up what is to be sent. */
	(void) set_config_option("lock_timeout", "50ms", PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	(void) take_batch(arg);
}

TimestampTz
sentdm_retention_step(void)
{
	static Pass pass;
	static SentdmBackoff backoff;
	Pass		next = pass;
	TimestampTz began = GetCurrentTimestamp();
	TimestampTz now;

	if (find_step(&next))
	{
		if (!sentdm_transact(&backoff, step_body, &next))
			return backoff.until;
		pass = next;
	}
	now = GetCurrentTimestamp();
	if (find_step(&next))
		return now + Min(Max((now - began) * REST_FACTOR, MIN_REST_MS * 1000), SENTDM_RETENTION_REST_MS * 1000);
	memset(&pass, 0, sizeof(pass));
	return next_pass(now);
}

/* sentdm_prune() returns bigint: a whole pass, in the caller's transaction */
Datum
sentdm_prune(PG_FUNCTION_ARGS)
{
	Pass		pass = {0};
	int64		changed = 0;

	while (find_step(&pass))
	{
		CHECK_FOR_INTERRUPTS();
		changed += take_batch(&pass);
	}
	PG_RETURN_INT64(changed);
}
