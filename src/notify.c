/*
 * notify.c
 *		NOTIFY sentdm_status: who listens learns that a status has changed.
 *
 * Ids and statuses only: everybody may LISTEN.  A large change is announced as a
 * number, because the server's queue of notifications is finite, and whoever
 * does not read it holds it up for all.
 */
#include "postgres.h"

#include "commands/async.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/uuid.h"

#include "notify.h"
#include "sentdm.h"

#define CHANNEL "sentdm_status"
#define MOST_SINGLE 1000		/* changes of one statement */
#define LONGEST_STATUS 100		/* bytes: there is a limit to a payload */

static void
announce_one(HeapTuple row, TupleDesc desc)
{
	StringInfoData payload;
	bool		no_id;
	bool		no_status;
	Datum		id = SPI_getbinval(row, desc, 1, &no_id);
	char	   *status = SPI_getvalue(row, desc, 2);

	no_status = status == NULL || strlen(status) > LONGEST_STATUS;
	if (no_id || no_status)
		return;
	initStringInfo(&payload);
	appendStringInfo(&payload, "{\"message_id\": \"%s\", \"status\": ",
					 DatumGetCString(DirectFunctionCall1(uuid_out, id)));
	escape_json(&payload, status);
	appendStringInfoChar(&payload, '}');
	/* The same payload is announced once in a transaction. */
	Async_Notify(CHANNEL, payload.data);
}

static void
announce(uint64 n)
{
	if (n > MOST_SINGLE)
		Async_Notify(CHANNEL, psprintf("{\"messages\": %llu}", (unsigned long long) n));
	for (uint64 i = 0; i < n && n <= MOST_SINGLE; i++)
		announce_one(SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
}

void
sentdm_execute_notifying(SentdmNotifying *statement)
{
	if (!sentdm_notify)
	{
		sentdm_execute(&statement->plain, NULL, NULL);
		return;
	}
	if (statement->notifying.sql == NULL)
	{
		char	   *sql = psprintf("%s RETURNING %s", statement->plain.sql, statement->returning);

		statement->notifying = statement->plain;
		statement->notifying.plan = NULL;
		statement->notifying.sql = MemoryContextStrdup(TopMemoryContext, sql);
	}
	announce(sentdm_execute(&statement->notifying, NULL, NULL));
}
