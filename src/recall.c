/*
 * recall.c
 *		What a person decides about messages that were enqueued: cancel them, or
 *		send them again; one, or all of a tag.
 *
 * The worker may claim any of them at the same moment.  "Cancelled" must be true
 * then and later, so only rows that are locked and still unclaimed are touched,
 * and the commit waits for the disk.  A whole tag never waits for a row that
 * somebody else has locked: what is being claimed or settled is too late anyway,
 * and so there is nobody to wait for in a circle.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

#include "control.h"
#include "send.h"
#include "sql.h"

PG_FUNCTION_INFO_V1(sentdm_cancel);
PG_FUNCTION_INFO_V1(sentdm_retry);
PG_FUNCTION_INFO_V1(sentdm_cancel_tag);
PG_FUNCTION_INFO_V1(sentdm_retry_tag);

#define CANCELLED "state = 'cancelled', finished_at = pg_catalog.now()"

/* Never claimed, and no earlier attempt that Sent may have accepted. */
#define UNTOUCHED "o.claimed_at IS NULL AND o.ambiguous_since IS NULL AND o.part = 0"

/*
 * Messages that are on hold have no row in the queue to lock.  So they are
 * locked themselves, by a statement that returns their ids as an array; and only
 * then looked at, because sentdm_enable() may just have given them a place.
 */
static uint64
cancel_held(SentdmStatement *lock, Datum which)
{
	static SentdmStatement cancel = {
		.sql = "UPDATE sentdm.messages m SET " CANCELLED " WHERE m.id = ANY ($1) AND m.state = 'queued'"
		" AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)",
		.nargs = 1,
		.types = {UUIDARRAYOID}
	};
	Datum		ids;
	bool		isnull;

	sentdm_execute(lock, &which, NULL);
	ids = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return isnull ? 0 : sentdm_execute(&cancel, &ids, NULL);
}

/*
 * True only when no attempt was made that Sent may have accepted, and none can
 * be made any more: the rows are locked first, then looked at.  But a row that
 * the worker has is not locked, or it could store no outcome before the caller's
 * transaction ends.
 */
Datum
sentdm_cancel(PG_FUNCTION_ARGS)
{
	static SentdmStatement find_late = {
		.sql = "SELECT FROM sentdm.outbox o WHERE o.message_id = $1 AND NOT (" UNTOUCHED ")",
		.nargs = 1,
		.types = {UUIDOID}
	};
	static SentdmStatement lock = {
		.sql = "SELECT (" UNTOUCHED ") FROM sentdm.outbox o WHERE o.message_id = $1 FOR UPDATE",
		.nargs = 1,
		.types = {UUIDOID}
	};
	static SentdmStatement cancel = {
		.sql = "WITH gone AS (DELETE FROM sentdm.outbox WHERE message_id = $1) "
		"UPDATE sentdm.messages SET " CANCELLED " WHERE id = $1",
		.nargs = 1,
		.types = {UUIDOID}
	};
	static SentdmStatement lock_held = {
		.sql = "SELECT ARRAY(SELECT m.id FROM sentdm.messages m WHERE m.id = $1 AND m.state = 'queued' FOR UPDATE)",
		.nargs = 1,
		.types = {UUIDOID}
	};
	Datum		id = PG_GETARG_DATUM(0);
	uint64		rows;
	bool		cancellable = true;

	SPI_connect();
	if (sentdm_execute(&find_late, &id, NULL) > 0)
	{
		SPI_finish();
		PG_RETURN_BOOL(false);
	}
	rows = sentdm_execute(&lock, &id, NULL);
	for (uint64 i = 0; i < rows; i++)
	{
		bool		isnull;

		if (!DatumGetBool(SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull)))
			cancellable = false;
	}
	if (rows == 0)
		cancellable = cancel_held(&lock_held, id) > 0;
	else if (cancellable)
		sentdm_execute(&cancel, &id, NULL);
	SPI_finish();
	/* Who was told true must not find it undone by a crash. */
	if (cancellable)
		ForceSyncCommit();
	PG_RETURN_BOOL(cancellable);
}

/* sentdm_cancel_tag(tag text) returns bigint: so many will never be sent */
Datum
sentdm_cancel_tag(PG_FUNCTION_ARGS)
{
	static SentdmStatement cancel = {
		.sql = "WITH free AS MATERIALIZED (SELECT o.message_id FROM sentdm.outbox o"
		"  JOIN sentdm.messages m ON m.id = o.message_id"
		"  WHERE m.tag = $1 AND m.state = 'queued' AND " UNTOUCHED " FOR UPDATE OF o SKIP LOCKED),"
		" gone AS (DELETE FROM sentdm.outbox o USING free WHERE o.message_id = free.message_id) "
		"UPDATE sentdm.messages m SET " CANCELLED " FROM free WHERE m.id = free.message_id",
		.nargs = 1,
		.types = {TEXTOID}
	};
	static SentdmStatement lock_held = {
		.sql = "SELECT ARRAY(SELECT m.id FROM sentdm.messages m WHERE m.tag = $1 AND m.state = 'queued'"
		"  AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id) FOR UPDATE SKIP LOCKED)",
		.nargs = 1,
		.types = {TEXTOID}
	};
	Datum		tag = PG_GETARG_DATUM(0);
	uint64		cancelled;

	SPI_connect();
	cancelled = sentdm_execute(&cancel, &tag, NULL);
	cancelled += cancel_held(&lock_held, tag);
	SPI_finish();
	if (cancelled > 0)
		ForceSyncCommit();
	PG_RETURN_INT64((int64) cancelled);
}

#define REOPEN(which) "WITH reopened AS (UPDATE sentdm.messages m SET state = 'queued', attempts = 0," \
	"  finished_at = NULL, http_status = NULL, error_code = NULL, error = NULL, request_id = NULL," \
	"  send_at = NULL, expires_at = CASE WHEN expires_at > pg_catalog.now() THEN expires_at END" \
	"  WHERE " which " AND m.erased_at IS NULL RETURNING m.id)," \
	" refused AS (DELETE FROM sentdm.deliveries d USING reopened r WHERE d.message_id = r.id AND d.sent_id IS NULL) " \
	"SELECT pg_catalog.array_agg(id) FROM reopened"

/* Put into the queue again what a REOPEN statement found; returns how many. */
static int64
requeue(void)
{
	bool		isnull;
	Datum		ids = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	int64		n;

	if (isnull)
		return 0;
	n = ArrayGetNItems(ARR_NDIM(DatumGetArrayTypeP(ids)), ARR_DIMS(DatumGetArrayTypeP(ids)));
	(void) sentdm_requeue(ids, false, true);
	sentdm_wake_at_commit();
	return n;
}

/*
 * A person's decision: the message is sent again under a new key, to everybody
 * who is not known to have been accepted.
 */
Datum
sentdm_retry(PG_FUNCTION_ARGS)
{
	static SentdmStatement reopen = {
		.sql = REOPEN("m.id = $1 AND m.state IN ('failed', 'expired', 'cancelled', 'uncertain')"),
		.nargs = 1,
		.types = {UUIDOID}
	};
	Datum		id = PG_GETARG_DATUM(0);
	int64		reopened;

	SPI_connect();
	sentdm_execute(&reopen, &id, NULL);
	reopened = requeue();
	SPI_finish();
	PG_RETURN_BOOL(reopened > 0);
}

/* Only states that a message can be retried from; which ones is the caller's choice. */
static void
check_states(ArrayType *states)
{
	static const char *const known[] = {"failed", "expired", "cancelled", "uncertain"};
	Datum	   *elements;
	bool	   *nulls;
	int			n;

	deconstruct_array(states, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
	for (int i = 0; i < n; i++)
	{
		bool		good = false;

		for (int k = 0; k < lengthof(known) && !nulls[i]; k++)
			good = good || strcmp(TextDatumGetCString(elements[i]), known[k]) == 0;
		if (!good)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("argument \"states\" contains an unknown state"),
					 errhint("Use failed, expired, cancelled and uncertain.")));
	}
}

/* sentdm_retry_tag(tag text, states text[]) returns bigint: so many are in the queue again */
Datum
sentdm_retry_tag(PG_FUNCTION_ARGS)
{
	static SentdmStatement reopen = {
		.sql = REOPEN("m.tag = $1 AND m.state = ANY ($2)"),
		.nargs = 2,
		.types = {TEXTOID, TEXTARRAYOID}
	};
	Datum		values[2];
	int64		reopened;

	values[0] = PG_GETARG_DATUM(0);
	values[1] = PG_GETARG_DATUM(1);
	check_states(DatumGetArrayTypeP(values[1]));
	SPI_connect();
	sentdm_execute(&reopen, values, NULL);
	reopened = requeue();
	SPI_finish();
	PG_RETURN_INT64(reopened);
}
