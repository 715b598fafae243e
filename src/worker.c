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
 * One turn of the loop: read what changed, take the answers, start what is ready,
 * settle and claim, start again, wait.  There is one place that waits.
 */
#include "postgres.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

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
#include "chores.h"
#include "clock.h"
#include "compat.h"
#include "failpoint.h"
#include "flight.h"
#include "launcher.h"
#include "queue.h"
#include "retention.h"
#include "sentdm.h"
#include "share.h"
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
#define ASIDE_MS 10000			/* for whoever asked to */
#define LONGEST_AHEAD_US 1000000	/* claimed and not started */

typedef struct Worker
{
	SentdmFlight flight;
	SentdmAccount account;
	SentdmQueue queue;
	SentdmChores chores;
	SentdmSlot *slot;
	WaitEventSet *events;
	MemoryContext turn;			/* reset in every turn of the loop */
	int64		settings;		/* hash of those of the catalog, at the start */
	uint32		control_seen;
	bool		http_outdated;	/* settings changed; renew it when nothing is
								 * under way */
	bool		asked_to_leave; /* as soon as there is nothing to do */
	TimestampTz idle_since;		/* 0: not idle */
} Worker;

/*
 * Large answers come in bursts.  By itself glibc takes more and more of what it
 * gives out from the heap, which keeps it; this way it goes back to the system.
 */
static void
keep_little_memory(void)
{
#ifdef M_MMAP_THRESHOLD
	mallopt(M_MMAP_THRESHOLD, 256 * 1024);
	mallopt(M_TRIM_THRESHOLD, 1024 * 1024);
#endif
}

/* What lies between pieces that are still in use is only given back when told to. */
static void
give_memory_back(void)
{
#ifdef M_MMAP_THRESHOLD
	malloc_trim(0);
#endif
}

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

/* Settings */

static void
open_http(Worker *worker)
{
	if (worker->events != NULL)
		FreeWaitEventSet(worker->events);
	sentdm_account_open_http(&worker->account);
	sentdm_chores_open(&worker->chores);
	/* Fewer requests may be in flight now. */
	give_memory_back();
	worker->http_outdated = false;
	worker->events = SentdmCreateWaitEventSet(4);
	AddWaitEventToSet(worker->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(worker->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(worker->events, WL_SOCKET_READABLE, sentdm_http_thread_fd(worker->flight.http),
					  NULL, NULL);
	AddWaitEventToSet(worker->events, WL_SOCKET_READABLE, sentdm_http_fd(worker->chores.http),
					  NULL, NULL);
}

static void
reload(Worker *worker)
{
	SentdmDrainSettings settings;

	ProcessConfigFile(PGC_SIGHUP);
	settings = sentdm_drain_settings();
	sentdm_share_lock(&worker->flight.drain.rates);
	sentdm_drain_configure(&worker->flight.drain, &settings, sentdm_clock_us());
	sentdm_share_unlock(&worker->flight.drain.rates);
	worker->http_outdated = true;
	sentdm_account_read_key(&worker->account);
	/* What was claimed under another mode may not go under this one. */
	sentdm_flight_release(&worker->flight);
	/* Another name of the environment may be a fence. */
	worker->control_seen--;
	worker->flight.report.prune_at = 0;
	/* Another mode may have something to do at once. */
	sentdm_queue_look(&worker->queue, DT_NOBEGIN);
	sentdm_chores_look(&worker->chores);
}

/* Look at sentdm.sender again: somebody paused, resumed, enabled or disabled. */
static void
read_sender(Worker *worker)
{
	SentdmSender *sender = &worker->account.sender;

	sentdm_begin();
	sentdm_sender_read(sender);
	if (worker->queue.extension != get_extension_oid("sentdm", true))
		sender->installed = false;
	sentdm_commit();
	sentdm_account_follow_sender(&worker->account);
	sentdm_chores_look(&worker->chores);
}

/* Sending */

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
	if (worker->http_outdated || must_start_anew(worker))
		return "waiting for requests under the old settings";
	return NULL;
}

/*
 * What is ready and does not get its turn soon is not to be kept from those who
 * want to cancel it.
 */
static bool
is_ready_in_vain(Worker *worker)
{
	return worker->flight.drain.pause != SENTDM_PAUSE_NONE || reason_not_to_claim(worker) != NULL ||
		sentdm_flight_ready_since_us(&worker->flight) < sentdm_clock_us() - LONGEST_AHEAD_US;
}

static void
send_and_store(Worker *worker)
{
	sentdm_flight_collect(&worker->flight);
	sentdm_account_hear(&worker->account);
	if (is_ready_in_vain(worker))
		sentdm_flight_release(&worker->flight);
	if (worker->flight.n_outcomes > 0)
		sentdm_chores_expect(&worker->chores);
	/* They are answered while the exchange waits for the disk. */
	sentdm_flight_start(&worker->flight);
	/* Perhaps the extension is gone: look. */
	if (!sentdm_queue_exchange(&worker->queue, reason_not_to_claim(worker) == NULL))
		worker->control_seen--;
	sentdm_flight_start(&worker->flight);
	if (worker->flight.under_way == 0 && !worker->chores.asking)
		sentdm_share_rest();
}

/* What has time until the queue is served; a copy is left as it is. */
static void
keep_house(Worker *worker)
{
	SentdmWorkerReport *report = &worker->flight.report;

	if (worker->account.sender.fence == NULL && !sentdm_queue_is_unsettled(&worker->queue) &&
		report->prune_at <= GetCurrentTimestamp())
		report->prune_at = sentdm_retention_step();
	sentdm_chores_run(&worker->chores, reason_not_to_claim(worker) == NULL);
}

/* Waiting */

/* When the next thing happens that nobody wakes us for. */
static long
time_to_wait(Worker *worker)
{
	int64_t		since_us = sentdm_flight_ready_since_us(&worker->flight);
	long		wait_ms = sentdm_queue_wait_ms(&worker->queue, reason_not_to_claim(worker) == NULL);

	if (since_us != INT64_MAX)
		wait_ms = Min(wait_ms, sentdm_ms_until_us(since_us + LONGEST_AHEAD_US) + 1);
	if (sentdm_account_paused_for_key(&worker->account))
		wait_ms = Min(wait_ms, KEY_CHECK_MS);
	if (worker->account.sender.fence == NULL)
		wait_ms = Min(wait_ms, sentdm_ms_until(worker->flight.report.prune_at));
	if (reason_not_to_claim(worker) == NULL)
		wait_ms = Min(wait_ms, sentdm_chores_wait_ms(&worker->chores));
	if (worker->idle_since != 0)
		wait_ms = Min(wait_ms, sentdm_ms_until(TimestampTzPlusMilliseconds(worker->idle_since,
																		   sentdm_idle_timeout_ms)));
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

/* When there is something to send. */
static TimestampTz
next_to_send(Worker *worker, bool hurry)
{
	const SentdmDrain *drain = &worker->flight.drain;

	if (reason_not_to_claim(worker) != NULL)
		return DT_NOEND;

	/*
	 * A pause for the key is looked at now and then: the file may have
	 * changed.
	 */
	if (sentdm_account_paused_for_key(&worker->account))
		return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RESTING_KEY_CHECK_MS);
	if (drain->pause == SENTDM_PAUSE_NONE)
		return sentdm_queue_next_due(&worker->queue, hurry);
	if (drain->probe_at_us == INT64_MAX)
		return DT_NOEND;
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sentdm_ms_until_us(drain->probe_at_us));
}

/* When there is something else to ask Sent for. */
static TimestampTz
next_to_ask(Worker *worker)
{
	if (reason_not_to_claim(worker) != NULL || worker->flight.drain.pause != SENTDM_PAUSE_NONE)
		return DT_NOEND;
	return sentdm_chores_next_due(&worker->chores);
}

static TimestampTz
next_due(Worker *worker)
{
	if (worker->account.sender.fence != NULL)
		return DT_NOEND;
	return Min(Min(next_to_send(worker, false), next_to_ask(worker)), worker->flight.report.prune_at);
}

/* In the middle of a pass, which whoever comes next would begin anew. */
static bool
is_pruning(Worker *worker, TimestampTz now)
{
	return worker->account.sender.fence == NULL &&
		worker->flight.report.prune_at <= TimestampTzPlusMilliseconds(now, SENTDM_RETENTION_REST_MS);
}

/* Nothing to do, nothing in hand: after a while, leave the database. */
static bool
leave_if_idle(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	TimestampTz now = GetCurrentTimestamp();
	bool		asked = pg_atomic_exchange_u32(&worker->slot->in_the_way, 0) != 0 || worker->asked_to_leave;
	int			timeout_ms = asked ? 0 : sentdm_idle_timeout_ms;
	bool		busy = flight->under_way > 0 || sentdm_queue_is_unsettled(&worker->queue) ||
	sentdm_flight_ready(flight, SENTDM_LANES - 1) > 0 ||
	next_to_send(worker, asked) <= TimestampTzPlusMilliseconds(now, timeout_ms) ||
	(!asked && (is_pruning(worker, now) ||
				next_to_ask(worker) <= TimestampTzPlusMilliseconds(now, timeout_ms)));

	if (busy)
	{
		worker->idle_since = 0;
		worker->asked_to_leave = asked;
		return false;
	}
	if (worker->idle_since == 0)
		worker->idle_since = now;
	return TimestampDifferenceExceeds(worker->idle_since, now, timeout_ms) &&
		sentdm_slot_leave(worker->slot, true, asked ?
						  Max(next_due(worker), TimestampTzPlusMilliseconds(now, ASIDE_MS)) : next_due(worker));
}

/* Take the answers that come within the grace time, store them, and end. */
static void
shut_down(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), SHUTDOWN_GRACE_MS);

	sentdm_flight_release(flight);
	while (flight->under_way > 0 && GetCurrentTimestamp() < deadline)
	{
		WaitEvent	event;

		(void) WaitEventSetWait(worker->events, sentdm_ms_until(deadline), &event, 1,
								PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		sentdm_flight_collect(flight);
	}
	sentdm_queue_settle(&worker->queue);
	sentdm_http_thread_destroy(flight->http);
	flight->http = NULL;
	if (flight->under_way > 0)
		sentdm_queue_abandon(&worker->queue);
	/* Whoever asked us to end did not mean that nothing is to be sent. */
	(void) sentdm_slot_leave(worker->slot, true, DT_NOBEGIN);
	proc_exit(0);
}

/*
 * However the process ends in an orderly way: the thread must not outlive the locks,
 * for the next worker repeats what this one was about to send, nor what exit() frees.
 */
static void
stop_http(int code, Datum arg)
{
	SentdmFlight *flight = (SentdmFlight *) DatumGetPointer(arg);

	(void) code;
	sentdm_http_thread_stop(flight->http);
}

/* The loop */

static void
report(Worker *worker)
{
	SentdmFlight *flight = &worker->flight;
	const char *reason = worker->queue.backoff.delay_ms > 0 ? "the database cannot be written" :
	reason_not_to_claim(worker);

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
	TimestampTz earliest;

	CHECK_FOR_INTERRUPTS();
	if (ShutdownRequestPending)
		shut_down(worker);
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		reload(worker);
	}
	if (sentdm_slot_take_work(worker->slot, &earliest))
		sentdm_queue_look(&worker->queue, earliest);
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
		send_and_store(worker);
		keep_house(worker);
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
	worker->chores.flight = &worker->flight;
	worker->queue.flight = &worker->flight;
	worker->queue.account = &worker->account;
	sentdm_slot_read_report(worker->slot, &worker->flight.report);
	if (!pg_strong_random(&seed, sizeof(seed)))
		seed = (uint64) GetCurrentTimestamp();
	sentdm_drain_init(&worker->flight.drain, &settings, sentdm_clock_us(), seed);
	sentdm_queue_look(&worker->queue, DT_NOBEGIN);

	sentdm_begin();
	worker->queue.extension = get_extension_oid("sentdm", true);
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
		sentdm_queue_take_over(&worker->queue);
	before_shmem_exit(stop_http, PointerGetDatum(&worker->flight));
	open_http(worker);
	sentdm_account_read_key(&worker->account);
}

void
sentdm_worker_main(Datum arg)
{
	static Worker worker;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, sentdm_handle_shutdown);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);

	worker.slot = sentdm_slot(MyDatabaseId, false);
	if (worker.slot == NULL || !sentdm_slot_attach(worker.slot))
		proc_exit(1);
	sentdm_fix_settings();
	keep_little_memory();
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
