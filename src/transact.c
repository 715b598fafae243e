/*
 * transact.c
 *		Transactions of the worker.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/interrupt.h"
#include "replication/syncrep.h"
#include "replication/walsender.h"
#include "replication/walsender_private.h"
#include "storage/lwlock.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "transact.h"

#define FIRST_RETRY_MS 100
#define LONGEST_RETRY_MS 30000

static MemoryContext context_outside;
static volatile sig_atomic_t waiting_for_standby = false;

/*
 * Old statistics must not turn a look at the queue into a scan of the history,
 * nor a claim into a sort of the whole queue: hence no plans but nested index
 * scans, in the order of the index.
 */
void
sentdm_fix_settings(void)
{
	static const char *const fixed[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"lock_timeout", "500ms"},
		{"statement_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"enable_seqscan", "off"},
		{"enable_hashjoin", "off"},
		{"enable_mergejoin", "off"},
		{"enable_bitmapscan", "off"},
		{"enable_sort", "off"},
		{"jit", "off"},
		{"plan_cache_mode", "force_generic_plan"},
		{"session_replication_role", "origin"},
		{"row_security", "on"},
	};

	for (int i = 0; i < lengthof(fixed); i++)
		SetConfigOption(fixed[i][0], fixed[i][1], PGC_SUSET, PGC_S_OVERRIDE);

	/*
	 * What a claim waits for on a standby; transactions choose for
	 * themselves.
	 */
	SetConfigOption("synchronous_commit", "on", PGC_SUSET, PGC_S_OVERRIDE);
}

void
sentdm_begin(void)
{
	context_outside = CurrentMemoryContext;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, "draining sentdm.outbox");
}

void
sentdm_commit(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(context_outside);
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/*
 * For the current transaction only.  The source must be the session: a value from
 * PGC_S_OVERRIDE would become the default that the end of the transaction returns
 * to, and no later claim would wait.
 */
static void
set_synchronous_commit(const char *value)
{
	(void) set_config_option("synchronous_commit", value, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

void
sentdm_commit_to_disk(void)
{
	set_synchronous_commit("local");
	if (synchronous_commit != SYNCHRONOUS_COMMIT_LOCAL_FLUSH)
		elog(ERROR, "a claim would not be durable");
}

void
sentdm_commit_may_be_lost(void)
{
	set_synchronous_commit("off");
}

/* Has the standby flushed it, or is none wanted (any more)? */
static bool
is_on_standby(XLogRecPtr lsn)
{
	bool		there;

	if (!SyncRepRequested())
		return true;
	LWLockAcquire(SyncRepLock, LW_SHARED);
	there = !sentdm_sync_standbys_defined() || lsn <= WalSndCtl->lsn[SYNC_REP_WAIT_FLUSH];
	LWLockRelease(SyncRepLock);
	return there;
}

void
sentdm_handle_shutdown(SIGNAL_ARGS)
{
	SignalHandlerForShutdownRequest(postgres_signal_arg);
	/* The only thing that ends the wait, and there it does no harm. */
	if (waiting_for_standby)
		StatementCancelHandler(postgres_signal_arg);
}

/*
 * Outside of a transaction, so that a standby that is gone for hours holds back
 * nothing here.  A wait that somebody cancelled ends like one that succeeded; so
 * what counts is what the standby has confirmed.
 */
bool
sentdm_wait_for_standby(void)
{
	XLogRecPtr	lsn = XactLastCommitEnd;
	bool		there;

	HOLD_INTERRUPTS();
	waiting_for_standby = true;
	while (!(there = is_on_standby(lsn)) && !ShutdownRequestPending)
		SyncRepWaitForLSN(lsn, true);
	waiting_for_standby = false;
	QueryCancelPending = false;
	RESUME_INTERRUPTS();
	return there;
}

bool
sentdm_error_may_pass(int sqlstate)
{
	switch (ERRCODE_TO_CATEGORY(sqlstate))
	{
		case MAKE_SQLSTATE('4', '0', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '3', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '5', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '7', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '8', '0', '0', '0'):
			return true;
		default:
			return false;
	}
}

void
sentdm_without_triggers(bool only_this_level)
{
	(void) set_config_option("session_replication_role", "replica", PGC_SUSET, PGC_S_SESSION,
							 only_this_level ? GUC_ACTION_SAVE : GUC_ACTION_LOCAL, true, 0, false);
}

/*
 * What the server says about a row may quote it; what it says about itself
 * (access rules, resources, locks, intervention, the system) does not.
 */
static const char *
loggable_message(const ErrorData *error)
{
	switch (ERRCODE_TO_CATEGORY(error->sqlerrcode))
	{
		case MAKE_SQLSTATE('4', '2', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '3', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '5', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '7', '0', '0', '0'):
		case MAKE_SQLSTATE('5', '8', '0', '0', '0'):
			return error->message;
		default:
			return "see the code";
	}
}

static void
note_failure(SentdmBackoff *backoff)
{
	ErrorData  *error;

	HOLD_INTERRUPTS();
	MemoryContextSwitchTo(context_outside);
	error = CopyErrorData();
	FlushErrorState();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(context_outside);
	pgstat_report_activity(STATE_IDLE, NULL);
	RESUME_INTERRUPTS();

	backoff->delay_ms = backoff->delay_ms == 0 ? FIRST_RETRY_MS :
		Min(backoff->delay_ms * 2, LONGEST_RETRY_MS);
	backoff->until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), backoff->delay_ms);
	backoff->sqlstate = error->sqlerrcode;
	ereport(LOG,
			(errmsg("sentdm worker could not write to the database and tries again in %d ms: %s (SQLSTATE %s)",
					backoff->delay_ms, loggable_message(error), unpack_sql_state(error->sqlerrcode))));
	FreeErrorData(error);
}

bool
sentdm_transact(SentdmBackoff *backoff, void (*body) (void *), void *arg)
{
	volatile bool done = false;

	PG_TRY();
	{
		sentdm_begin();
		body(arg);
		sentdm_commit();
		backoff->delay_ms = 0;
		done = true;
	}
	PG_CATCH();
	{
		note_failure(backoff);
	}
	PG_END_TRY();
	return done;
}

bool
sentdm_backing_off(const SentdmBackoff *backoff)
{
	return backoff->delay_ms > 0 && GetCurrentTimestamp() < backoff->until;
}
