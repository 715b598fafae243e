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

#include "commands/extension.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "compat.h"
#include "failpoint.h"
#include "flight.h"
#include "launcher.h"
#include "outbox.h"
#include "sentdm.h"
#include "shmem.h"
#include "transact.h"

/*
 * The drainer's lock is an advisory lock that no SQL function can take: those
 * use 1 and 2 here.
 */
#define DRAINER_LOCK_CLASS 7

#define SHUTDOWN_GRACE_MS 3000
#define KEY_CHECK_MS 5000
#define RESTING_KEY_CHECK_MS 60000
#define LOCKED_ROW_POLL_MS 200
#define LONGEST_WAIT_MS 3600000

typedef struct Worker
{
	SentdmFlight flight;
	SentdmAccount account;
	SentdmSlot *slot;
	SentdmBackoff backoff;
	WaitEventSet *events;
	MemoryContext turn;			/* reset in every turn of the loop */
	Oid			extension;		/* as it was at the start */
	int64		settings;		/* hash of those of the catalog, at the start */
	uint32		control_seen;
	TimestampTz due[SENTDM_LANES];	/* look no earlier than this; DT_NOBEGIN:
									 * now */
	bool		http_outdated;	/* settings changed; renew it when nothing is
								 * under way */
	SentdmMessage **claimed;	/* by the transaction under way */
	int			n_claimed;
	int			room;			/* for so many */
	TimestampTz idle_since;		/* 0: not idle */
} Worker;

/* Held until the process ends, however it ends. */
static bool
take_drainer_lock(void)
{
	LOCKTAG		tag;
	bool		taken;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, 0, DRAINER_LOCK_CLASS);
	sentdm_begin();
	taken = LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
	sentdm_commit();
	return taken;
}

/* This worker is the sender now: put the queue into order. */
static void
take_over(Worker *worker)
{
	int64		suspects;
	int64		rescued;

	sentdm_begin();
	sentdm_sender_adopt();
	rescued = sentdm_outbox_rescue(&suspects);
	sentdm_commit();
	worker->flight.suspects = (int) Min(suspects, INT_MAX);
	sentdm_count(worker->slot, SENTDM_COUNT_RESCUED, rescued);
	if (rescued > 0)
		ereport(LOG,
				(errmsg("sentdm worker took over %lld requests of a worker that ended early",
						(long long) rescued)));
}

/* Settings */

static void
open_http(Worker *worker)
{
	if (worker->events != NULL)
		FreeWaitEventSet(worker->events);
	sentdm_account_open_http(&worker->account);
	worker->http_outdated = false;
	worker->events = SentdmCreateWaitEventSet(3);
	AddWaitEventToSet(worker->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(worker->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(worker->events, WL_SOCKET_READABLE, sentdm_http_fd(worker->flight.http),
					  NULL, NULL);
}

static void
look_at_once(Worker *worker)
{
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		worker->due[lane] = DT_NOBEGIN;
}

static void
reload(Worker *worker)
{
	SentdmDrainSettings settings;

	ProcessConfigFile(PGC_SIGHUP);
	settings = sentdm_drain_settings();
	sentdm_drain_configure(&worker->flight.drain, &settings, sentdm_clock_us());
	worker->http_outdated = true;
	sentdm_account_read_key(&worker->account);
	/* Another name of the environment may be a fence. */
	worker->control_seen--;
	/* Another mode may have something to do at once. */
	look_at_once(worker);
}

/* Look at sentdm.sender again: somebody paused, resumed, enabled or disabled. */
static void
read_sender(Worker *worker)
{
	SentdmSender *sender = &worker->account.sender;

	sentdm_begin();
	sentdm_sender_read(sender);
	if (worker->extension != get_extension_oid("sentdm", true))
		sender->installed = false;
	sentdm_commit();
	sentdm_account_follow_sender(&worker->account);
}

/* Settling */

static bool
anything_to_settle(const Worker *worker)
{
	return worker->flight.n_outcomes > 0 || sentdm_account_is_unsettled(&worker->account);
}

static void
settle_body(void *arg)
{
	Worker	   *worker = arg;
	SentdmFlight *flight = &worker->flight;

	/* What is lost is found out again: the same key brings the same answer. */
	sentdm_commit_may_be_lost();
	/* Dropped, perhaps made anew: these outcomes belong to no one any more. */
	if (get_extension_oid("sentdm", true) != worker->extension)
		return;
	if (flight->n_outcomes > 0)
		sentdm_outbox_settle(flight->outcomes, flight->n_outcomes);
	sentdm_account_store_pause(&worker->account);
	SENTDM_FAILPOINT("before-settle-commit");
}

static bool
transact(Worker *worker, void (*body) (void *))
{
	bool		done = sentdm_transact(&worker->backoff, body, worker);

	if (!done)
	{
		/* Perhaps the extension is gone: look. */
		worker->control_seen--;
		/* What it found out about the queue is not so, either. */
		look_at_once(worker);
	}
	return done;
}

static void
settle(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;

	if (!anything_to_settle(worker) || sentdm_backing_off(&worker->backoff) ||
		!transact(worker, settle_body))
		return;
	SENTDM_FAILPOINT("after-settle-commit");
	sentdm_account_announce_pause(&worker->account);
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

	/*
	 * Those that may have killed the worker go alone, so that no other is
	 * blamed.
	 */
	if (flight->suspects > 0)
		return flight->under_way == 0 ? Min(sentdm_drain_quota(&flight->drain, lane, sentdm_clock_us()), 1) : 0;
	return sentdm_drain_quota(&flight->drain, lane, sentdm_clock_us());
}

/* Settings of the database or a role reach a process only when it starts. */
static bool
must_start_anew(const Worker *worker)
{
	return worker->account.sender.settings_hash != worker->settings;
}

static const char *
reason_not_to_claim(Worker *worker)
{
	if (worker->account.sender.fence != NULL)
		return worker->account.sender.fence;
	if (sentdm_mode == SENTDM_MODE_HOLD)
		return "sentdm.mode is hold";
	if (worker->backoff.delay_ms > 0)
		return "the database cannot be written";
	if (worker->http_outdated || must_start_anew(worker))
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
claim_body(void *arg)
{
	Worker	   *worker = arg;
	TimestampTz now = GetCurrentTimestamp();
	bool		exhausted = false;

	sentdm_require_durable_commit();
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
	if (worker->n_claimed > 0)
		SENTDM_FAILPOINT("before-claim-commit");
}

/*
 * Claim what may start now, then submit it.  In between is the commit that waits
 * for the disk: only from there on may a request leave.
 */
static void
claim(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();

	/*
	 * A failed transaction is tried again by this one, when its time has
	 * come.
	 */
	if (anything_to_settle(worker) || sentdm_backing_off(&worker->backoff) ||
		(worker->backoff.delay_ms == 0 && reason_not_to_claim(worker) != NULL))
		return;
	worker->room = 0;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		worker->room = Max(worker->room, wanted(worker, lane, now));
	if (worker->room == 0)
		return;
	worker->claimed = palloc(worker->room * sizeof(SentdmMessage *));
	if (!transact(worker, claim_body) || worker->n_claimed == 0)
		return;
	SENTDM_FAILPOINT("after-claim-commit");
	for (int i = 0; i < worker->n_claimed; i++)
		sentdm_flight_submit(&worker->flight, worker->claimed[i]);

	/*
	 * They leave in the next turn, which begins at once: libcurl's timer is
	 * due.
	 */
}

/* Waiting */

static long
until(TimestampTz when, TimestampTz now)
{
	/* Infinities first: a difference with one of them overflows. */
	if (when <= now)
		return 0;
	if (when == DT_NOEND)
		return LONGEST_WAIT_MS;
	return Min(TimestampDifferenceMilliseconds(now, when), LONGEST_WAIT_MS);
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
	int64		now_us = sentdm_clock_us();
	long		wait_ms = LONGEST_WAIT_MS;

	if (worker->backoff.delay_ms > 0)
		wait_ms = until(worker->backoff.until, now);
	else if (anything_to_settle(worker))
		wait_ms = 0;
	if (sentdm_account_paused_for_key(&worker->account))
		wait_ms = Min(wait_ms, KEY_CHECK_MS);
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

	if (worker->flight.under_way > 0)
		SENTDM_FAILPOINT("under-way");
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

	/*
	 * A pause for the key is looked at now and then: the file may have
	 * changed.
	 */
	if (sentdm_account_paused_for_key(&worker->account))
		return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RESTING_KEY_CHECK_MS);
	if (worker->flight.drain.pause != SENTDM_PAUSE_NONE)
	{
		if (worker->flight.drain.probe_at_us == INT64_MAX)
			return next;
		return TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
										   until_us(worker->flight.drain.probe_at_us, sentdm_clock_us()));
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
	bool		asked = pg_atomic_exchange_u32(&worker->slot->in_the_way, 0) != 0;
	int			timeout_ms = asked ? 0 : sentdm_idle_timeout_ms;
	bool		busy = flight->under_way > 0 || anything_to_settle(worker) ||
	next_due(worker) <= TimestampTzPlusMilliseconds(now, timeout_ms);

	if (busy)
	{
		worker->idle_since = 0;
		return false;
	}
	if (worker->idle_since == 0)
		worker->idle_since = now;
	return TimestampDifferenceExceeds(worker->idle_since, now, timeout_ms) &&
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
	worker->backoff.delay_ms = 0;
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
	flight->report.mode = sentdm_mode;
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
		look_at_once(worker);
	if (control != worker->control_seen)
	{
		worker->control_seen = control;
		read_sender(worker);
	}
	if (sentdm_account_key_is_due(&worker->account))
		sentdm_account_read_key(&worker->account);
	if (worker->http_outdated && worker->flight.under_way == 0)
		open_http(worker);
	if (must_start_anew(worker) && worker->flight.under_way == 0)
		return false;
	return worker->account.sender.installed && worker->account.sender.enabled;
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
	/* Disabled, dropped, or to start anew: finish what is under way. */
	shut_down(worker);
}

static void
start(Worker *worker)
{
	SentdmDrainSettings settings = sentdm_drain_settings();
	const SentdmSender *sender = &worker->account.sender;
	uint64		seed;

	worker->turn = AllocSetContextCreate(TopMemoryContext, "sentdm turn", ALLOCSET_DEFAULT_SIZES);
	worker->flight.memory = AllocSetContextCreate(TopMemoryContext, "sentdm messages in hand",
												  ALLOCSET_DEFAULT_SIZES);
	worker->flight.slot = worker->slot;
	worker->account.flight = &worker->flight;
	sentdm_slot_read_report(worker->slot, &worker->flight.report);
	if (!pg_strong_random(&seed, sizeof(seed)))
		seed = (uint64) GetCurrentTimestamp();
	sentdm_drain_init(&worker->flight.drain, &settings, sentdm_clock_us(), seed);
	look_at_once(worker);

	sentdm_begin();
	worker->extension = get_extension_oid("sentdm", true);
	sentdm_commit();
	worker->control_seen = pg_atomic_read_u32(&worker->slot->control);
	read_sender(worker);
	worker->settings = sender->settings_hash;
	if (!sender->installed || !sender->enabled)
		return;
	if (sender->fence != NULL)
	{
		sentdm_begin();
		sentdm_sender_note_copy(sender->fence);
		sentdm_commit();
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("sentdm sends nothing from this database: %s", sender->fence),
				 errhint("If this database is to send, run SELECT sentdm_enable() in it.")));
	}
	else
		take_over(worker);
	open_http(worker);
	sentdm_account_read_key(&worker->account);
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
	sentdm_fix_settings();
	/* Not there yet when the one before is about to end. */
	if (!take_drainer_lock())
		proc_exit(1);
	start(&worker);
	if (!worker.account.sender.installed || !worker.account.sender.enabled)
	{
		sentdm_slot_give_up(worker.slot, worker.control_seen);
		proc_exit(0);
	}
	run(&worker);
	proc_exit(0);
}
