/*
 * shmem.c
 *		Per-database slots in shared memory: who is awake, what was counted.
 *
 * Only proc numbers are kept, never pointers.  A latch of a process that is gone
 * may be set in vain; that is harmless.  Nothing here may raise an error while
 * the lock is held, and nothing here knows SQL or the network.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "recovery.h"
#include "share.h"
#include "shmem.h"

typedef struct SharedState
{
	LWLock	   *lock;
	int			launcher_proc;	/* -1: none; under the lock */
	pg_atomic_uint32 databases_known;	/* the catalog was read since the
										 * start */
	SentdmSlot	slots[SENTDM_MAX_DATABASES];
} SharedState;

const char *const sentdm_counter_names[SENTDM_COUNTERS] = {
	"requests", "accepted", "retried", "failed", "expired", "uncertain",
	"rate_limited", "unreached", "pauses", "rescued",
	"events", "events_duplicate", "events_late", "events_raw", "events_rejected",
	"delivered", "undelivered"
};

static SharedState *shared = NULL;
static shmem_request_hook_type previous_request_hook = NULL;
static shmem_startup_hook_type previous_startup_hook = NULL;

static void
request_shmem(void)
{
	if (previous_request_hook)
		previous_request_hook();
	RequestAddinShmemSpace(MAXALIGN(sizeof(SharedState)) + sentdm_share_size());
	RequestNamedLWLockTranche("sentdm", 2);
}

static void
startup_shmem(void)
{
	bool		found;
	void	   *shares;

	if (previous_startup_hook)
		previous_startup_hook();
	sentdm_recovery_note_start();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	shared = ShmemInitStruct("sentdm", sizeof(SharedState), &found);
	if (!found)
	{
		memset(shared, 0, sizeof(SharedState));
		shared->lock = &GetNamedLWLockTranche("sentdm")->lock;
		shared->launcher_proc = -1;
		pg_atomic_init_u32(&shared->databases_known, 0);
		for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
		{
			SentdmSlot *slot = &shared->slots[i];

			slot->worker_proc = -1;
			pg_atomic_init_u32(&slot->work, 0);
			pg_atomic_init_u64(&slot->earliest, DT_NOEND);
			pg_atomic_init_u32(&slot->control, 0);
			pg_atomic_init_u32(&slot->in_the_way, 0);
			for (int c = 0; c < SENTDM_COUNTERS; c++)
				pg_atomic_init_u64(&slot->counters[c], 0);
		}
	}
	shares = ShmemInitStruct("sentdm accounts", sentdm_share_size(), &found);
	sentdm_share_startup(shares, &GetNamedLWLockTranche("sentdm")[1].lock, found);
	LWLockRelease(AddinShmemInitLock);
}

void
sentdm_shmem_init(void)
{
	previous_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	previous_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
}

bool
sentdm_shmem_available(void)
{
	return shared != NULL;
}

static void
set_latch_of(int proc)
{
	if (proc >= 0)
		SetLatch(&ProcGlobal->allProcs[proc].procLatch);
}

static void
wake_launcher(void)
{
	LWLockAcquire(shared->lock, LW_SHARED);
	set_latch_of(shared->launcher_proc);
	LWLockRelease(shared->lock);
}

static SentdmSlot *
find_slot(Oid database)
{
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		if (shared->slots[i].database == database)
			return &shared->slots[i];
	}
	return NULL;
}

/* Empty a slot for a new owner; the lock is held. */
static void
reset_slot(SentdmSlot *slot, Oid database)
{
	slot->database = database;
	slot->enabled = false;
	slot->worker_proc = -1;
	slot->left_cleanly = false;
	slot->next_due = DT_NOEND;
	memset(&slot->report, 0, sizeof(slot->report));
	slot->report.mode = -1;
	slot->report.account = -1;
	pg_atomic_write_u32(&slot->work, 0);
	for (int c = 0; c < SENTDM_COUNTERS; c++)
		pg_atomic_write_u64(&slot->counters[c], 0);
}

SentdmSlot *
sentdm_slot(Oid database, bool create)
{
	SentdmSlot *slot;

	if (shared == NULL)
		return NULL;
	LWLockAcquire(shared->lock, create ? LW_EXCLUSIVE : LW_SHARED);
	slot = find_slot(database);
	if (slot == NULL && create)
	{
		slot = find_slot(InvalidOid);
		if (slot != NULL)
			reset_slot(slot, database);
	}
	LWLockRelease(shared->lock);
	return slot;
}

SentdmSlot *
sentdm_slot_by_index(int index)
{
	return &shared->slots[index];
}

void
sentdm_slot_enable(Oid database, bool enabled)
{
	SentdmSlot *slot;

	if (shared == NULL)
		return;
	slot = sentdm_slot(database, enabled);
	if (slot != NULL)
	{
		LWLockAcquire(shared->lock, LW_EXCLUSIVE);
		slot->enabled = enabled;
		LWLockRelease(shared->lock);
		sentdm_slot_control(slot);
	}
	wake_launcher();
}

void
sentdm_slot_free(SentdmSlot *slot)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	reset_slot(slot, InvalidOid);
	LWLockRelease(shared->lock);
}

/* Before the flag is set: who sees the flag must see this. */
static void
lower_earliest(SentdmSlot *slot, TimestampTz earliest)
{
	uint64		known = pg_atomic_read_u64(&slot->earliest);

	while (earliest < (TimestampTz) known &&
		   !pg_atomic_compare_exchange_u64(&slot->earliest, &known, (uint64) earliest))
		;
}

bool
sentdm_slot_take_work(SentdmSlot *slot, TimestampTz *earliest)
{
	if (pg_atomic_read_u32(&slot->work) == 0 || pg_atomic_exchange_u32(&slot->work, 0) == 0)
		return false;
	*earliest = (TimestampTz) pg_atomic_exchange_u64(&slot->earliest, DT_NOEND);
	return true;
}

void
sentdm_slot_wake(SentdmSlot *slot, TimestampTz earliest)
{
	lower_earliest(slot, earliest);
	/* Somebody else has woken it, and it has not looked yet. */
	if (pg_atomic_exchange_u32(&slot->work, 1) != 0)
		return;
	LWLockAcquire(shared->lock, LW_SHARED);
	if (slot->worker_proc >= 0)
		set_latch_of(slot->worker_proc);
	else
		set_latch_of(shared->launcher_proc);
	LWLockRelease(shared->lock);
}

void
sentdm_slot_control(SentdmSlot *slot)
{
	pg_atomic_fetch_add_u32(&slot->control, 1);
	pg_atomic_write_u32(&slot->work, 0);
	sentdm_slot_wake(slot, DT_NOBEGIN);
}

void
sentdm_slots_control_all(void)
{
	if (shared == NULL)
		return;
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		if (OidIsValid(shared->slots[i].database))
			sentdm_slot_control(&shared->slots[i]);
	}
}

void
sentdm_slot_ask_to_leave(SentdmSlot *slot)
{
	LWLockAcquire(shared->lock, LW_SHARED);
	if (slot->worker_proc >= 0)
	{
		pg_atomic_write_u32(&slot->in_the_way, 1);
		set_latch_of(slot->worker_proc);
	}
	LWLockRelease(shared->lock);
}

/* Also runs at the exit of a worker that failed: then it has not left cleanly. */
static void
detach_worker(int code, Datum arg)
{
	SentdmSlot *slot = (SentdmSlot *) DatumGetPointer(arg);

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	if (slot->worker_proc == sentdm_proc_number())
	{
		slot->worker_proc = -1;
		slot->left_cleanly = false;
		slot->report.pid = 0;
		slot->report.in_flight = 0;
	}
	set_latch_of(shared->launcher_proc);
	LWLockRelease(shared->lock);
}

bool
sentdm_slot_attach(SentdmSlot *slot)
{
	bool		attached = false;

	/* Registered first: a worker that dies in between must not stay listed. */
	before_shmem_exit(detach_worker, PointerGetDatum(slot));
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	if (slot->worker_proc < 0)
	{
		slot->worker_proc = sentdm_proc_number();
		pg_atomic_write_u32(&slot->in_the_way, 0);
		slot->report.pid = MyProcPid;
		slot->report.started_at = GetCurrentTimestamp();
		attached = true;
	}
	LWLockRelease(shared->lock);
	return attached;
}

bool
sentdm_slot_leave(SentdmSlot *slot, bool cleanly, TimestampTz next_due)
{
	bool		left = false;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	if (!cleanly || next_due == DT_NOBEGIN || pg_atomic_read_u32(&slot->work) == 0)
	{
		slot->worker_proc = -1;
		slot->left_cleanly = cleanly;
		slot->next_due = next_due;
		slot->report.pid = 0;
		slot->report.in_flight = 0;
		left = true;
	}
	LWLockRelease(shared->lock);
	return left;
}

void
sentdm_slot_give_up(SentdmSlot *slot, uint32 control_seen)
{
	bool		still;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	still = pg_atomic_read_u32(&slot->control) == control_seen;
	if (still)
		slot->enabled = false;
	LWLockRelease(shared->lock);
	(void) sentdm_slot_leave(slot, still, DT_NOEND);
}

void
sentdm_slot_report(SentdmSlot *slot, const SentdmWorkerReport *report)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	slot->report = *report;
	LWLockRelease(shared->lock);
}

void
sentdm_slot_read_report(SentdmSlot *slot, SentdmWorkerReport *report)
{
	LWLockAcquire(shared->lock, LW_SHARED);
	*report = slot->report;
	LWLockRelease(shared->lock);
}

void
sentdm_count(SentdmSlot *slot, SentdmCounter counter, uint64 n)
{
	if (slot != NULL && n > 0)
		pg_atomic_fetch_add_u64(&slot->counters[counter], n);
}

static void
detach_launcher(int code, Datum arg)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->launcher_proc = -1;
	LWLockRelease(shared->lock);
}

void
sentdm_launcher_attach(void)
{
	before_shmem_exit(detach_launcher, (Datum) 0);
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->launcher_proc = sentdm_proc_number();
	LWLockRelease(shared->lock);
}

bool
sentdm_launcher_running(void)
{
	bool		running;

	if (shared == NULL)
		return false;
	LWLockAcquire(shared->lock, LW_SHARED);
	running = shared->launcher_proc >= 0;
	LWLockRelease(shared->lock);
	return running;
}

bool
sentdm_databases_known(void)
{
	return pg_atomic_read_u32(&shared->databases_known) != 0;
}

void
sentdm_databases_read(void)
{
	pg_atomic_write_u32(&shared->databases_known, 1);
}
