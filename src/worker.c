/*
 * worker.c
 *		One process per database: claim, submit, wait, settle.
 *
 * The order is the promise.  A message is POSTed only after the claim is durable;
 * its outcome is kept in memory until a transaction has stored it; while that
 * fails, nothing new is claimed.  No transaction is open while the network is
 * waited for.  If the process dies anywhere, the drainer's lock dies with it, and
 * the next worker finds the claimed rows and repeats the same requests under the
 * same keys.
 *
 * One turn of the loop: read what changed, take the answers, settle, claim,
 * submit, wait.  There is one place that waits.
 */
#include "postgres.h"

#include <limits.h>

#include "access/xact.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "control.h"
#include "flight.h"
#include "launcher.h"
#include "outbox.h"
#include "sentdm.h"
#include "shmem.h"

/*
 * The drainer's lock is an advisory lock that no SQL function can take: those
 * use 1 and 2 here.
 */
#define DRAINER_LOCK_CLASS 7

#define SHUTDOWN_GRACE_MS 3000
#define KEY_POLL_MS 5000
#define LOCKED_ROW_POLL_MS 200
#define FIRST_RETRY_MS 100
#define LONGEST_RETRY_MS 30000
#define LONGEST_WAIT_MS 3600000

typedef struct Worker
{
	SentdmFlight flight;
	SentdmSlot *slot;
	WaitEventSet *events;
	MemoryContext turn;			/* reset in every turn of the loop */
	Oid			extension;		/* as it was at the start */
	uint32		control_seen;
	SentdmSender sender;
	TimestampTz due[SENTDM_LANES];	/* look no earlier than this; DT_NOBEGIN: now */
	bool		http_outdated;	/* settings changed; renew it when nothing is under way */
	SentdmMessage **claimed;	/* by the transaction under way */
	int			n_claimed;
	int			room;			/* for so many */
	int			retry_ms;		/* 0: the last transaction went well */
	TimestampTz retry_at;
	TimestampTz key_read_at;
	TimestampTz idle_since;		/* 0: not idle */
} Worker;

static int64
monotonic_us(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

/* Transactions */

static MemoryContext context_outside;

static void
begin(void)
{
	context_outside = CurrentMemoryContext;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, "draining sentdm.outbox");
}

static void
commit(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(context_outside);
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
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
note_failure(Worker *worker)
{
	ErrorData  *error;

	HOLD_INTERRUPTS();
	MemoryContextSwitchTo(worker->turn);
	error = CopyErrorData();
	FlushErrorState();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(worker->turn);
	pgstat_report_activity(STATE_IDLE, NULL);
	RESUME_INTERRUPTS();

	worker->retry_ms = worker->retry_ms == 0 ? FIRST_RETRY_MS :
		Min(worker->retry_ms * 2, LONGEST_RETRY_MS);
	worker->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), worker->retry_ms);
	/* Perhaps the extension is gone. */
	worker->control_seen--;
	ereport(LOG,
			(errmsg("sentdm worker could not write to the database and tries again in %d ms: %s (SQLSTATE %s)",
					worker->retry_ms, loggable_message(error), unpack_sql_state(error->sqlerrcode)),
			 errdetail("It keeps %d outcomes and has %d requests under way.",
					   worker->flight.n_outcomes, worker->flight.under_way)));
}

/* Run a transaction; false when it failed, and then it changed nothing. */
static bool
transact(Worker *worker, void (*body) (Worker *))
{
	volatile bool done = false;

	PG_TRY();
	{
		begin();
		body(worker);
		commit();
		worker->retry_ms = 0;
		done = true;
	}
	PG_CATCH();
	{
		note_failure(worker);
	}
	PG_END_TRY();
	return done;
}

static bool
must_wait_to_write(const Worker *worker)
{
	return worker->retry_ms > 0 && GetCurrentTimestamp() < worker->retry_at;
}

/* For this transaction only: its loss in a crash costs a repeated request, no more. */
static void
commit_may_be_lost(void)
{
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

/*
 * Settings of the server, the database or a role must not weaken what the worker
 * relies on: durable claims, short transactions, and plans that do not turn into
 * scans of a large history because statistics are old.
 */
static void
fix_settings(void)
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

/* Held until the process ends, however it ends. */
static bool
take_drainer_lock(void)
{
	LOCKTAG		tag;
	bool		taken;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, 0, DRAINER_LOCK_CLASS);
	begin();
	taken = LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
	commit();
	return taken;
}

static void
rescue(Worker *worker)
{
	int64		suspects;
	int64		rescued;

	begin();
	rescued = sentdm_outbox_rescue(&suspects);
	commit();
	worker->flight.suspects = (int) Min(suspects, INT_MAX);
	sentdm_count(worker->slot, SENTDM_COUNT_RESCUED, rescued);
	if (rescued > 0)
		ereport(LOG,
				(errmsg("sentdm worker took over %lld requests of a worker that ended early",
						(long long) rescued)));
}

/* Settings and credentials */

static SentdmDrainSettings
drain_settings(void)
{
	SentdmDrainSettings settings;

	settings.max_in_flight = sentdm_max_in_flight;
	settings.requests = sentdm_rate_limit();
	settings.messages = sentdm_message_rate_limit();
	settings.retry_min_ms = sentdm_retry_min_ms;
	settings.retry_max_ms = Max(sentdm_retry_min_ms, sentdm_retry_max_ms);
	settings.give_up_after_ms = (int64) sentdm_give_up_after_s * 1000;
	settings.uncertain_after_ms = (int64) sentdm_uncertain_after_s * 1000;
	return settings;
}

static int64
hash_of_key(const char *key)
{
	return (int64) hash_bytes_extended((const unsigned char *) key, (int) strlen(key), 0);
}

/* A pause, in the queue's memory and (with the next settle) in its row. */
static void
pause_sending(Worker *worker, SentdmPause pause, const char *why)
{
	SentdmFlight *flight = &worker->flight;

	if (flight->drain.pause != SENTDM_PAUSE_NONE)
		return;
	sentdm_drain_pause(&flight->drain, pause, -1, monotonic_us());
	flight->new_pause = pause;
	flight->probe_after_ms = -1;
	strlcpy(flight->report.trouble, why, sizeof(flight->report.trouble));
}

static bool
paused_for_key(const Worker *worker)
{
	SentdmPause pause = worker->flight.drain.pause;

	return pause == SENTDM_PAUSE_CREDENTIALS || pause == SENTDM_PAUSE_FORBIDDEN;
}

/* Read the key; a changed one ends a pause that was made because of the old one. */
static void
read_key(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	char		key[SENTDM_MAX_KEY];
	const char *trouble = sentdm_read_api_key(key);

	worker->key_read_at = GetCurrentTimestamp();
	if (trouble != NULL)
		pause_sending(worker, SENTDM_PAUSE_CREDENTIALS, trouble);
	else if (paused_for_key(worker) && hash_of_key(key) != worker->sender.key_hash)
	{
		sentdm_drain_resume(&flight->drain, monotonic_us());
		flight->unpause = true;
		flight->new_pause = SENTDM_PAUSE_NONE;
	}
	memcpy(flight->api_key, key, sizeof(key));
	explicit_bzero(key, sizeof(key));
}

static void
open_http(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	SentdmHttpOptions options;
	const char *trouble = sentdm_http_check_url(sentdm_base_url, sentdm_allow_insecure_http);

	if (worker->events != NULL)
		FreeWaitEventSet(worker->events);
	sentdm_http_destroy(flight->http);
	options.base_url = trouble ? "https://api.sent.dm" : sentdm_base_url;
	options.ca_file = sentdm_ca_file;
	options.user_agent = "sentdm/" SENTDM_VERSION " PostgreSQL/" PG_VERSION;
	options.insecure_http = sentdm_allow_insecure_http;
	options.max_in_flight = sentdm_max_in_flight;
	options.connect_timeout_ms = sentdm_connect_timeout_ms;
	options.request_timeout_ms = sentdm_request_timeout_ms;
	flight->http = sentdm_http_create(&options);
	if (flight->http == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not initialize the HTTP client")));
	worker->http_outdated = false;
	if (trouble != NULL)
		pause_sending(worker, SENTDM_PAUSE_CREDENTIALS, trouble);

	worker->events = SentdmCreateWaitEventSet(3);
	AddWaitEventToSet(worker->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(worker->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(worker->events, WL_SOCKET_READABLE, sentdm_http_fd(flight->http), NULL, NULL);
}

static void
reload(Worker *worker)
{
	SentdmDrainSettings settings;

	ProcessConfigFile(PGC_SIGHUP);
	settings = drain_settings();
	sentdm_drain_configure(&worker->flight.drain, &settings, monotonic_us());
	worker->http_outdated = true;
	read_key(worker);
}

/* Look at sentdm.sender again: somebody paused, resumed, enabled or disabled. */
static void
read_sender(Worker *worker)
{
	SentdmDrain *drain = &worker->flight.drain;
	SentdmSender *sender = &worker->sender;

	begin();
	sentdm_sender_read(sender);
	if (worker->extension != get_extension_oid("sentdm", true))
		sender->installed = false;
	commit();
	if (sender->pause != SENTDM_PAUSE_NONE && sender->pause != drain->pause)
		sentdm_drain_pause(drain, sender->pause, sender->probe_after_ms, monotonic_us());
	else if (sender->pause == SENTDM_PAUSE_NONE && drain->pause != SENTDM_PAUSE_NONE &&
			 worker->flight.new_pause == SENTDM_PAUSE_NONE)
	{
		sentdm_drain_resume(drain, monotonic_us());
		read_key(worker);
	}
}

/* Settling */

static const char *
pause_reason(const Worker *worker)
{
	switch (worker->flight.new_pause)
	{
		case SENTDM_PAUSE_CREDENTIALS:
			return worker->flight.report.trouble[0] ? worker->flight.report.trouble :
				"Sent does not accept the API key";
		case SENTDM_PAUSE_FORBIDDEN:
			return "the account may not send";
		case SENTDM_PAUSE_SUSPENDED:
			return "the account is suspended";
		case SENTDM_PAUSE_BALANCE:
			return "the account has no credit";
		case SENTDM_PAUSE_QUOTA:
			return "the account's quota is used up";
		case SENTDM_PAUSE_CERTIFICATE:
			return "the certificate of the API is not trusted";
		default:
			return "paused";
	}
}

static void
store_pause(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;

	if (flight->new_pause != SENTDM_PAUSE_NONE)
	{
		worker->sender.key_hash = hash_of_key(flight->api_key);
		sentdm_sender_pause(flight->new_pause, pause_reason(worker), flight->probe_after_ms,
							worker->sender.key_hash);
	}
	else if (flight->unpause)
		sentdm_sender_unpause();
}

static bool
anything_to_settle(const Worker *worker)
{
	const SentdmFlight *flight = &worker->flight;

	return flight->n_outcomes > 0 || flight->new_pause != SENTDM_PAUSE_NONE || flight->unpause;
}

static void
settle_body(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;

	commit_may_be_lost();
	/* Dropped, perhaps made anew: these outcomes belong to no one any more. */
	if (get_extension_oid("sentdm", true) != worker->extension)
		return;
	if (flight->n_outcomes > 0)
		sentdm_outbox_settle(flight->outcomes, flight->n_outcomes);
	store_pause(worker);
}

static void
announce_pause(Worker *worker)
{
	SentdmWorkerReport *told = &worker->flight.report;

	ereport(WARNING,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("sentdm has paused sending: %s", pause_reason(worker)),
			 errhint("See sentdm.problems and sentdm_health(); sentdm_resume() tries again.")));
	strlcpy(told->trouble, pause_reason(worker), sizeof(told->trouble));
}

static void
settle(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;

	if (!anything_to_settle(worker) || must_wait_to_write(worker) ||
		!transact(worker, settle_body))
		return;
	if (flight->new_pause != SENTDM_PAUSE_NONE)
		announce_pause(worker);
	for (int i = 0; i < flight->n_outcomes; i++)
	{
		SentdmAction action = flight->outcomes[i].decision.action;

		/* Retries and parts are in the queue again, perhaps due at once. */
		if (action == SENTDM_DO_RETRY || action == SENTDM_DO_SPLIT)
			worker->due[flight->outcomes[i].message->lane] = DT_NOBEGIN;
	}
	sentdm_flight_settled(flight);
}

/* Claiming */

/* How many messages of a lane to claim now; 0: no use in asking. */
static int
wanted(Worker *worker, SentdmLane lane, TimestampTz now)
{
	SentdmFlight *flight = &worker->flight;

	if (worker->due[lane] > now)
		return 0;
	/* Those that may have killed the worker go alone, so that no other is blamed. */
	if (flight->suspects > 0)
		return flight->under_way == 0 ? Min(sentdm_drain_quota(&flight->drain, lane, monotonic_us()), 1) : 0;
	return sentdm_drain_quota(&flight->drain, lane, monotonic_us());
}

static const char *
reason_not_to_claim(Worker *worker)
{
	if (worker->sender.fence != NULL)
		return worker->sender.fence;
	if (sentdm_mode == SENTDM_MODE_HOLD)
		return "sentdm.mode is hold";
	if (worker->retry_ms > 0)
		return "the database cannot be written";
	if (worker->http_outdated)
		return "waiting for requests under the old settings";
	return NULL;
}

/* Where the queue was empty, remember when to look again. */
static void
note_next_due(Worker *worker, TimestampTz now)
{
	sentdm_outbox_next_due(sentdm_mode == SENTDM_MODE_SANDBOX, worker->due);
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		/* Due, yet not claimed: locked by somebody, who may let go of it. */
		if (worker->due[lane] <= now && worker->n_claimed == 0)
			worker->due[lane] = TimestampTzPlusMilliseconds(now, LOCKED_ROW_POLL_MS);
	}
}

static void
claim_body(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		exhausted = false;

	worker->n_claimed = 0;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		int			limit = Min(wanted(worker, lane, now), worker->room) - worker->n_claimed;
		int			n;

		if (limit <= 0)
			continue;
		n = sentdm_outbox_claim(lane, limit, sentdm_mode == SENTDM_MODE_SANDBOX,
								worker->turn, worker->claimed + worker->n_claimed);
		worker->n_claimed += n;
		if (n < limit)
			exhausted = true;
	}
	if (exhausted)
		note_next_due(worker, now);
}

/*
 * Claim what may start now, then submit it.  In between is the commit that waits
 * for the disk: only from there on may a request leave.
 */
static void
claim(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();

	/* A failed transaction is tried again by this one, when its time has come. */
	if (anything_to_settle(worker) || must_wait_to_write(worker) ||
		(worker->retry_ms == 0 && reason_not_to_claim(worker) != NULL))
		return;
	worker->room = 0;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		worker->room = Max(worker->room, wanted(worker, lane, now));
	if (worker->room == 0)
		return;
	worker->claimed = palloc(worker->room * sizeof(SentdmMessage *));
	if (!transact(worker, claim_body) || worker->n_claimed == 0)
		return;
	for (int i = 0; i < worker->n_claimed; i++)
		sentdm_flight_submit(&worker->flight, worker->claimed[i]);
	sentdm_http_run(worker->flight.http);
}

/* Waiting */

static long
until(TimestampTz when, TimestampTz now)
{
	return when == DT_NOEND ? LONGEST_WAIT_MS : Min(TimestampDifferenceMilliseconds(now, when), LONGEST_WAIT_MS);
}

static long
until_us(int64 when_us, int64 now_us)
{
	if (when_us == INT64_MAX)
		return LONGEST_WAIT_MS;
	return (long) Min(Max((when_us - now_us + 999) / 1000, 0), LONGEST_WAIT_MS);
}

/* When the next thing happens that nobody wakes us for. */
static long
time_to_wait(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	TimestampTz now = GetCurrentTimestamp();
	int64		now_us = monotonic_us();
	long		wait_ms = LONGEST_WAIT_MS;

	if (worker->retry_ms > 0)
		wait_ms = until(worker->retry_at, now);
	else if (anything_to_settle(worker))
		wait_ms = 0;
	if (paused_for_key(worker))
		wait_ms = Min(wait_ms, KEY_POLL_MS);
	if (worker->idle_since != 0)
		wait_ms = Min(wait_ms, until(TimestampTzPlusMilliseconds(worker->idle_since,
																 sentdm_idle_timeout_ms), now));
	if (reason_not_to_claim(worker) != NULL)
		return wait_ms;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		long		lane_ms = until(worker->due[lane], now);

		if (lane_ms < LONGEST_WAIT_MS)
			lane_ms = Max(lane_ms, until_us(sentdm_drain_ready_us(&flight->drain, lane, now_us), now_us));
		wait_ms = Min(wait_ms, lane_ms);
	}
	return wait_ms;
}

static void
wait_for_something(Worker *worker)
{
	WaitEvent	event;

	(void) WaitEventSetWait(worker->events, time_to_wait(worker), &event, 1, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
}

/* Leaving */

static TimestampTz
next_due(Worker *worker)
{
	TimestampTz next = DT_NOEND;

	if (reason_not_to_claim(worker) != NULL)
		return next;
	/* A pause for the key is looked at now and then: the file may have changed. */
	if (paused_for_key(worker))
		return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 60000);
	if (worker->flight.drain.pause != SENTDM_PAUSE_NONE)
	{
		if (worker->flight.drain.probe_at_us == INT64_MAX)
			return next;
		return TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
										   until_us(worker->flight.drain.probe_at_us, monotonic_us()));
	}
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		next = Min(next, worker->due[lane]);
	return next;
}

/* Nothing to do, nothing in hand: after a while, leave the database. */
static bool
leave_if_idle(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	TimestampTz now = GetCurrentTimestamp();
	bool		busy = flight->under_way > 0 || anything_to_settle(worker) ||
	next_due(worker) <= TimestampTzPlusMilliseconds(now, sentdm_idle_timeout_ms);

	if (busy)
	{
		worker->idle_since = 0;
		return false;
	}
	if (worker->idle_since == 0)
		worker->idle_since = now;
	return TimestampDifferenceExceeds(worker->idle_since, now, sentdm_idle_timeout_ms) &&
		sentdm_slot_leave(worker->slot, true, next_due(worker));
}

/* Take the answers that come within the grace time, store them, and end. */
static void
shut_down(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), SHUTDOWN_GRACE_MS);

	while (flight->under_way > 0 && GetCurrentTimestamp() < deadline)
	{
		WaitEvent	event;

		(void) WaitEventSetWait(worker->events, until(deadline, GetCurrentTimestamp()), &event, 1,
								PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		sentdm_flight_collect(flight);
	}
	worker->retry_ms = 0;
	settle(worker);
	sentdm_http_destroy(flight->http);
	(void) sentdm_slot_leave(worker->slot, false, DT_NOEND);
	proc_exit(0);
}

/* The loop */

static void
report(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	const char *reason = reason_not_to_claim(worker);

	flight->report.in_flight = flight->under_way;
	if (reason != NULL)
		strlcpy(flight->report.trouble, reason, sizeof(flight->report.trouble));
	else if (flight->drain.pause == SENTDM_PAUSE_NONE)
		flight->report.trouble[0] = '\0';
	sentdm_slot_report(worker->slot, &flight->report);
}

/* Answer to signals and flags; false: the worker has to end. */
static bool
notice_changes(Worker *worker)
{
	uint32		control = pg_atomic_read_u32(&worker->slot->control);

	CHECK_FOR_INTERRUPTS();
	if (ShutdownRequestPending)
		shut_down(worker);
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		reload(worker);
	}
	if (pg_atomic_exchange_u32(&worker->slot->work, 0) != 0)
	{
		for (int lane = 0; lane < SENTDM_LANES; lane++)
			worker->due[lane] = DT_NOBEGIN;
	}
	if (control != worker->control_seen)
	{
		worker->control_seen = control;
		read_sender(worker);
	}
	if (paused_for_key(worker) &&
		TimestampDifferenceExceeds(worker->key_read_at, GetCurrentTimestamp(), KEY_POLL_MS))
		read_key(worker);
	if (worker->http_outdated && worker->flight.under_way == 0)
		open_http(worker);
	return worker->sender.installed && worker->sender.enabled;
}

static void
run(Worker *worker)
{
	while (notice_changes(worker))
	{
		MemoryContextReset(worker->turn);
		MemoryContextSwitchTo(worker->turn);
		sentdm_flight_collect(&worker->flight);
		settle(worker);
		claim(worker);
		report(worker);
		if (leave_if_idle(worker))
			return;
		wait_for_something(worker);
	}
	/* Disabled or dropped: finish what is under way, then stay away. */
	shut_down(worker);
}

static void
start(Worker *worker)
{
	SentdmDrainSettings settings = drain_settings();
	uint64		seed;

	worker->turn = AllocSetContextCreate(TopMemoryContext, "sentdm turn", ALLOCSET_DEFAULT_SIZES);
	worker->flight.memory = AllocSetContextCreate(TopMemoryContext, "sentdm messages in hand",
												  ALLOCSET_DEFAULT_SIZES);
	worker->flight.slot = worker->slot;
	sentdm_slot_read_report(worker->slot, &worker->flight.report);
	if (!pg_strong_random(&seed, sizeof(seed)))
		seed = (uint64) GetCurrentTimestamp();
	sentdm_drain_init(&worker->flight.drain, &settings, monotonic_us(), seed);
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		worker->due[lane] = DT_NOBEGIN;

	begin();
	worker->extension = get_extension_oid("sentdm", true);
	commit();
	worker->control_seen = pg_atomic_read_u32(&worker->slot->control);
	read_sender(worker);
	if (!worker->sender.installed || !worker->sender.enabled)
		return;
	if (worker->sender.fence != NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("sentdm sends nothing from this database: %s", worker->sender.fence),
				 errhint("If this database is to send, run SELECT sentdm_enable() in it.")));
	else
		rescue(worker);
	open_http(worker);
	read_key(worker);
}

void
sentdm_worker_main(Datum arg)
{
	static Worker worker;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);

	worker.slot = sentdm_slot(MyDatabaseId, false);
	if (worker.slot == NULL || !sentdm_slot_attach(worker.slot))
		proc_exit(1);
	fix_settings();
	/* Not there yet when the one before is about to end. */
	if (!take_drainer_lock())
		proc_exit(1);
	start(&worker);
	if (!worker.sender.installed || !worker.sender.enabled)
	{
		(void) sentdm_slot_leave(worker.slot, true, DT_NOEND);
		proc_exit(0);
	}
	run(&worker);
	proc_exit(0);
}
