/*
 * pace.c
 *		How long a backlog takes under the limits in force.
 *
 * A lower bound, from the settings alone: what Sent slows down, or takes long
 * for, is seen only in the rate that was reached.
 */
#include "postgres.h"

#include "datatype/timestamp.h"
#include "fmgr.h"

#include "pace.h"
#include "sentdm.h"

PG_FUNCTION_INFO_V1(sentdm_pace);

static double
seconds_at(SentdmRate rate, int64 n)
{
	if (rate.window_us == 0)
		return -1;
	return (double) n * (double) rate.window_us / (double) rate.amount / USECS_PER_SEC;
}

double
sentdm_seconds_to_send(int64 requests, int64 recipients)
{
	return Max(seconds_at(sentdm_rate_limit(), requests),
			   seconds_at(sentdm_message_rate_limit(), recipients));
}

/* sentdm.seconds_to_send(requests bigint, recipients bigint) */
Datum
sentdm_pace(PG_FUNCTION_ARGS)
{
	double		seconds = sentdm_seconds_to_send(PG_GETARG_INT64(0), PG_GETARG_INT64(1));

	if (seconds < 0)
		PG_RETURN_NULL();
	PG_RETURN_FLOAT8(seconds);
}
