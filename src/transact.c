/*
 * transact.c
 *		Transactions of the worker.
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "transact.h"

#define FIRST_RETRY_MS 100
#define LONGEST_RETRY_MS 30000

static MemoryContext context_outside;

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
	if (synchronous_commit != SYNCHRONOUS_COMMIT_REMOTE_APPLY)
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

void
sentdm_require_durable_commit(void)
{
	if (synchronous_commit < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
		elog(ERROR, "a claim would not be durable");
}

void
sentdm_commit_may_be_lost(void)
{
	/*
	 * The source must be the session: a value from PGC_S_OVERRIDE would
	 * become the default that the end of the transaction returns to, and no
	 * later claim would wait for the disk.
	 */
	(void) set_config_option("synchronous_commit", "off", PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
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
