/*
 * chores.h
 *		What a worker asks Sent besides sending: for the status of messages without
 *		a receipt, and whether webhooks are still served.
 */
#ifndef SENTDM_CHORES_H
#define SENTDM_CHORES_H

#include "account.h"
#include "endpoint.h"
#include "flight.h"
#include "refresh.h"
#include "transact.h"

typedef enum SentdmChore
{
	SENTDM_NO_CHORE,
	SENTDM_REFRESH,				/* GET a message */
	SENTDM_LOOK_AT_WEBHOOK,		/* GET a webhook */
	SENTDM_REACTIVATE_WEBHOOK,	/* have it served again */
	SENTDM_READ_EVENTS			/* GET a page of its log */
} SentdmChore;

#define SENTDM_CHORES 5

/*
 * One request at a time, over a connection of its own, so that it is never in the
 * way of messages.  The rate, the key and the report are those of the flight.
 */
typedef struct SentdmChores
{
	SentdmFlight *flight;
	SentdmHttp *http;
	SentdmBackoff backoff;
	bool		asking;			/* a request is under way */
	SentdmHttpResult *result;	/* of it, not taken yet */
	SentdmChore chore;			/* the one in hand */
	int64		refused[SENTDM_CHORES]; /* access_hash with which it was */
	TimestampTz not_before;		/* after a failure */
	int			failures;		/* of the request in hand */
	TimestampTz due;			/* when there is something to look for;
								 * DT_NOBEGIN: look now */

	SentdmRefresh refresh;
	SentdmEndpoint endpoint;
} SentdmChores;

/* A new HTTP client under the present settings; forgets what is under way. */
extern void sentdm_chores_open(SentdmChores *chores);

/* Messages were settled: their receipts are to be expected. */
extern void sentdm_chores_expect(SentdmChores *chores);

/* Settings have changed: look again. */
extern void sentdm_chores_look(SentdmChores *chores);

/*
 * Take an answer, and ask for the next thing, if something is due and may be asked
 * for.  To be called outside of transactions; raises no error for what the
 * database refuses.
 */
extern void sentdm_chores_run(SentdmChores *chores, bool may_ask);

/* When there is something to do again, as far as is known; DT_NOEND: never. */
extern TimestampTz sentdm_chores_next_due(const SentdmChores *chores);

/* How long nothing will happen that nobody wakes us for. */
extern long sentdm_chores_wait_ms(const SentdmChores *chores);

#endif							/* SENTDM_CHORES_H */
