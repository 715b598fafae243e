/*
 * database.h
 *		A connection that calls sentdm_receive_webhooks().
 */
#ifndef RECEIVER_DATABASE_H
#define RECEIVER_DATABASE_H

#include <libpq-fe.h>
#include <stdatomic.h>

#include "batch.h"

typedef struct ReceiverDatabase
{
	PGconn	   *conn;			/* NULL: not connected */
	ReceiverBatch batch;
	atomic_bool *abandon;		/* becomes true: do not wait any longer */
	char		sqlstate[6];	/* of the last error, or "" */
	char		trouble[256];	/* why connecting failed */
} ReceiverDatabase;

/* How a query ended. */
typedef enum ReceiverOutcome
{
	RECEIVER_COMMITTED,
	RECEIVER_ROLLED_BACK,		/* certainly; sqlstate says why */
	RECEIVER_UNKNOWN			/* the connection was lost or took too long, and is closed */
} ReceiverOutcome;

/*
 * Set what libpq assumes where nobody says otherwise.  Once, and before there are
 * other threads: they read the environment, and must not see it move.
 */
extern void receiver_database_set_defaults(void);

/* Connect and prepare; this can take seconds.  False: trouble says why. */
extern bool receiver_database_connect(ReceiverDatabase *database, const char *conninfo,
									  int64_t statement_timeout_us);
extern void receiver_database_close(ReceiverDatabase *database);

/* Did the server close the connection?  Then it is closed here too; trouble says why. */
extern bool receiver_database_is_alive(ReceiverDatabase *database);

/*
 * Store events in one transaction, and fill in their answers when it is committed.
 * No events at all is a question whether it would work.
 */
extern ReceiverOutcome receiver_database_store(ReceiverDatabase *database, ReceiverEvent **events,
											   int n, int64_t deadline_us);

#endif							/* RECEIVER_DATABASE_H */
