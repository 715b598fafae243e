/*
 * transact.h
 *		Transactions of the worker: short, durable where it matters, and with an
 *		error that does not end the process.
 */
#ifndef SENTDM_TRANSACT_H
#define SENTDM_TRANSACT_H

#include "datatype/timestamp.h"

/* When a transaction failed, the next one waits for a while. */
typedef struct SentdmBackoff
{
	int			delay_ms;		/* 0: the last transaction went well */
	TimestampTz until;
	int			sqlstate;		/* of the last failure */
} SentdmBackoff;

/*
 * Give the session settings that the server, the database or a role must not
 * weaken: durable commits, short waits for locks, plans that suit a queue.
 */
extern void sentdm_fix_settings(void);

/* Begin and commit; the memory context is the same afterwards. */
extern void sentdm_begin(void);
extern void sentdm_commit(void);

/*
 * The commit of the current transaction waits for the disk, whatever the settings
 * say, but not for a standby: see sentdm_wait_for_standby.
 */
extern void sentdm_commit_to_disk(void);

/*
 * Wait until what was committed last is on the synchronous standby, if there is to
 * be one.  False: it is not, and the process was asked to end.
 */
extern bool sentdm_wait_for_standby(void);

/* What SIGTERM does: ask the process to end, also while it waits for a standby. */
extern void sentdm_handle_shutdown(SIGNAL_ARGS);

/* The current transaction may be lost in a crash of the server, to save a flush. */
extern void sentdm_commit_may_be_lost(void);

/*
 * Run body(arg) as a transaction.  False: it failed, and changed nothing; the
 * reason was logged without what it may quote, and the backoff was set.
 */
extern bool sentdm_transact(SentdmBackoff *backoff, void (*body) (void *), void *arg);

/*
 * Is this the SQLSTATE of an error that passes by itself: a conflict, a lack of
 * resources, an intervention?  Any other comes from what was written, or from a
 * trigger of the user's, and comes again.
 */
extern bool sentdm_error_may_pass(int sqlstate);

/*
 * From now on, in this transaction or GUC nesting level, no trigger of the user's
 * fires, unless it is marked ALWAYS.
 */
extern void sentdm_without_triggers(bool only_this_level);

/* Is it too early for the next try? */
extern bool sentdm_backing_off(const SentdmBackoff *backoff);

#endif							/* SENTDM_TRANSACT_H */
