/*
 * status.c
 *		The order of the statuses that a message goes through.
 *
 * One table for C and SQL.  It must never become a closed list: Sent adds
 * statuses without notice, and they are stored and ordered like any other.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"

#include "status.h"

PG_FUNCTION_INFO_V1(sentdm_status_rank);

typedef struct StatusRank
{
	const char *status;
	int			rank;
} StatusRank;

/*
 * A status of which we know nothing is newer than any progress that we can name
 * for the same second, but it must not hide a receipt or a final result.
 */
#define UNKNOWN_RANK 60

/* The rank of the statuses after which a message does not arrive any more. */
#define FAILED_RANK 90

static const StatusRank ranks[] = {
	{"queued", 10},
	{"accepted", 10},			/* older answers' words for queued */
	{"pending", 10},
	{"processed", 20},			/* in the activity log only */
	{"scheduled", 30},
	{"routed", 40},
	{"sent", 50},
	{"delivered", 70},
	{"read", 80},
	{"failed", FAILED_RANK},
	{"filtered", FAILED_RANK},
	{"blocked", FAILED_RANK},
	{"cancelled", FAILED_RANK},
};

/* The table's entry of a status, or NULL. */
static const StatusRank *
find_status(const char *status)
{
	for (int i = 0; i < lengthof(ranks); i++)
	{
		if (pg_strcasecmp(status, ranks[i].status) == 0)
			return &ranks[i];
	}
	return NULL;
}

int
sentdm_rank_of_status(const char *status)
{
	const StatusRank *found = find_status(status);

	return found ? found->rank : UNKNOWN_RANK;
}

bool
sentdm_status_is_known(const char *status)
{
	return find_status(status) != NULL;
}

bool
sentdm_status_is_failure(const char *status)
{
	return sentdm_rank_of_status(status) == FAILED_RANK;
}

/* sentdm.status_rank(text) */
Datum
sentdm_status_rank(PG_FUNCTION_ARGS)
{
	char	   *status = text_to_cstring(PG_GETARG_TEXT_PP(0));

	PG_RETURN_INT32(sentdm_rank_of_status(status));
}
