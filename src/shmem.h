/*
 * shmem.h
 *		What the processes of sentdm share: one slot per enabled database.
 */
#ifndef SENTDM_SHMEM_H
#define SENTDM_SHMEM_H

#include "datatype/timestamp.h"
#include "port/atomics.h"

#define SENTDM_MAX_DATABASES 64

/* Counters since the server started; the order is that of counter_names. */
typedef enum SentdmCounter
{
	SENTDM_COUNT_REQUESTS,
	SENTDM_COUNT_ACCEPTED,
	SENTDM_COUNT_RETRIED,
	SENTDM_COUNT_FAILED,
	SENTDM_COUNT_EXPIRED,
	SENTDM_COUNT_UNCERTAIN,
	SENTDM_COUNT_RATE_LIMITED,
	SENTDM_COUNT_UNREACHED,
	SENTDM_COUNT_PAUSES,
	SENTDM_COUNT_RESCUED,
	SENTDM_COUNT_EVENTS,
	SENTDM_COUNT_EVENTS_DUPLICATE,
	SENTDM_COUNT_EVENTS_LATE,
	SENTDM_COUNT_EVENTS_RAW,
	SENTDM_COUNT_EVENTS_REJECTED,
	SENTDM_COUNT_DELIVERED,
	SENTDM_COUNT_UNDELIVERED,
	SENTDM_COUNTERS
} SentdmCounter;

/* What the worker tells about itself; copied whole, under the lock. */
typedef struct SentdmWorkerReport
{
	int			pid;			/* 0: no worker runs */
	TimestampTz started_at;		/* of the worker that runs or ran last; 0:
								 * none yet */
	int			in_flight;
	TimestampTz answered_at;	/* last complete answer; 0: none yet */
	int			http_status;	/* ... and what it was */
	char		error_code[40];
	int64		clock_skew_ms;	/* Sent's clock minus ours, from its Date
								 * headers */
	bool		clock_known;
	int			account;		/* share.c's number of it; -1: none yet */
	int			mode;			/* sentdm.mode of the worker; -1: none ran yet */
	TimestampTz prune_at;		/* when it looks for what is to be deleted; 0:
								 * at once */
	char		trouble[200];	/* why nothing is sent, or ""; no personal
								 * data */
} SentdmWorkerReport;

typedef struct SentdmSlot
{
	Oid			database;		/* InvalidOid: free; set under the lock */
	bool		enabled;		/* under the lock */
	int			worker_proc;	/* proc number of the worker, -1: none; under
								 * the lock */
	bool		left_cleanly;	/* the last worker left because there was no
								 * work */
	TimestampTz next_due;		/* when it is needed again; DT_NOEND: only
								 * when woken */
	SentdmWorkerReport report;	/* under the lock */
	pg_atomic_uint32 work;		/* something was committed since the worker
								 * looked */
	pg_atomic_uint64 earliest;	/* ... and none of it is due before this
								 * (TimestampTz) */
	pg_atomic_uint32 control;	/* generation of pause, resume and enable */
	pg_atomic_uint32 in_the_way;	/* somebody wants to drop or copy the
									 * database */
	pg_atomic_uint64 counters[SENTDM_COUNTERS];
} SentdmSlot;

/* Ask for shared memory; to be called while the library is preloaded. */
extern void sentdm_shmem_init(void);

/* True when this server has our shared memory (the library is preloaded). */
extern bool sentdm_shmem_available(void);

/*
 * The slot of a database; NULL when there is none, or when all are taken.
 * create: make one.  The pointer stays valid, but the slot may change hands
 * when its database is dropped.
 */
extern SentdmSlot *sentdm_slot(Oid database, bool create);
extern SentdmSlot *sentdm_slot_by_index(int index);

/* Mark a database as enabled or not, and have the launcher and the worker look. */
extern void sentdm_slot_enable(Oid database, bool enabled);

/* Give the slot of a dropped database back. */
extern void sentdm_slot_free(SentdmSlot *slot);

/*
 * Something to send was committed, due no earlier than this (DT_NOBEGIN: whenever):
 * wake the worker, or the launcher to start one.
 */
extern void sentdm_slot_wake(SentdmSlot *slot, TimestampTz earliest);

/*
 * For the worker: was something committed since it last asked, and when is it due
 * at the earliest?
 */
extern bool sentdm_slot_take_work(SentdmSlot *slot, TimestampTz *earliest);

/* A pause, resume or enable was committed: wake the worker to read it. */
extern void sentdm_slot_control(SentdmSlot *slot);

/* The same for all databases. */
extern void sentdm_slots_control_all(void);

/* Somebody wants the database for himself: an idle worker leaves at once. */
extern void sentdm_slot_ask_to_leave(SentdmSlot *slot);

/* The worker takes its place; false when another one has it. */
extern bool sentdm_slot_attach(SentdmSlot *slot);

/*
 * The worker leaves.  cleanly: there is no work before next_due (DT_NOBEGIN: let
 * the next one start at once); refused (false) when something was committed in
 * the meantime, so that no wake-up is lost.  Not cleanly: the launcher waits for a
 * while, longer each time, before it starts another.
 */
extern bool sentdm_slot_leave(SentdmSlot *slot, bool cleanly, TimestampTz next_due);

/*
 * The worker leaves because nothing is enabled here, unless that has changed
 * since it looked (control_seen).
 */
extern void sentdm_slot_give_up(SentdmSlot *slot, uint32 control_seen);

extern void sentdm_slot_report(SentdmSlot *slot, const SentdmWorkerReport *report);
extern void sentdm_slot_read_report(SentdmSlot *slot, SentdmWorkerReport *report);

extern void sentdm_count(SentdmSlot *slot, SentdmCounter counter, uint64 n);
extern const char *const sentdm_counter_names[SENTDM_COUNTERS];

/* The launcher's side: announce itself, and whether the catalog was read. */
extern void sentdm_launcher_attach(void);
extern bool sentdm_launcher_running(void);
extern bool sentdm_databases_known(void);
extern void sentdm_databases_read(void);

#endif							/* SENTDM_SHMEM_H */
