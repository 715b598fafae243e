/*
 * refresh.h
 *		Which messages to ask Sent for, because their receipt did not come.
 */
#ifndef SENTDM_REFRESH_H
#define SENTDM_REFRESH_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#define SENTDM_REFRESH_BATCH 100	/* recipients */

/* How far one pass over the messages has come. */
typedef struct SentdmRefreshed
{
	TimestampTz send_at;
	pg_uuid_t	message_id;
	pg_uuid_t	sent_id;
} SentdmRefreshed;

/* A recipient to ask for. */
typedef struct SentdmToRefresh
{
	pg_uuid_t	sent_id;
	char		profile_id[40]; /* or "" */
} SentdmToRefresh;

/* Some recipients, asked for one after the other. */
typedef struct SentdmRefresh
{
	SentdmToRefresh batch[SENTDM_REFRESH_BATCH];
	int			n;
	int			next;			/* whose turn it is */
	bool		scheduled;		/* the pass that they belong to ... */
	int			pass;
	SentdmRefreshed upto;		/* ... and how far that is, afterwards */
} SentdmRefresh;

/* The functions need a transaction and an SPI connection. */

/*
 * Find the next ones to ask for; with n = 0 there are only messages to leave
 * behind.  False: there is nothing, and due is lowered to when there may be.
 */
extern bool sentdm_refresh_find(SentdmRefresh *refresh, TimestampTz now, TimestampTz *due);

/* Apply Sent's answer about the one whose turn it is. */
extern void sentdm_refresh_store(const SentdmRefresh *refresh, Jsonb *answer);

/* All of them were asked for: the pass goes on behind them. */
extern void sentdm_refresh_finish(const SentdmRefresh *refresh);

/* How old a message is when it is asked for the first time, in microseconds. */
extern int64 sentdm_refresh_age_us(void);

#endif							/* SENTDM_REFRESH_H */
