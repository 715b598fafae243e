/*
 * launcher.c
 *		One process per server: starts a worker for each database that needs one.
 *
 * It connects to no database, so it is never in the way of a DROP DATABASE.
 * Which databases are enabled is a setting of the database, written by
 * sentdm_enable(): it survives a failover and pg_upgrade, and it does not follow
 * a CREATE DATABASE ... TEMPLATE.  PostgreSQL can read that catalog only from
 * within a database; so a reader, a process of some milliseconds, does it once
 * when the server starts.  Afterwards sentdm_enable() itself tells.
 *
 * The life of a worker, as the launcher sees it:
 *
 *		RESTING --(work, due, enabled)--> RUNNING --(left cleanly)--> RESTING
 *		   ^                                 |
 *		   +---(backoff over)--- WAITING <---+ (failed, or no process slot free)
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "catalog/pg_db_role_setting.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "launcher.h"
#include "sentdm.h"
#include "shmem.h"

#define LONGEST_WAIT_MS 60000
#define FIRST_BACKOFF_MS 1000
#define LONGEST_BACKOFF_MS 60000

typedef enum ChildState
{
	CHILD_RESTING,
	CHILD_RUNNING,
	CHILD_WAITING
} ChildState;

typedef struct Child
{
	Oid			database;
	ChildState	state;
	BackgroundWorkerHandle *handle;
	TimestampTz started_at;
	TimestampTz retry_at;
	int			backoff_ms;
	bool		fresh;			/* has not run since the launcher started */
	bool		inherited;		/* runs, started by a launcher before this one */
} Child;

static Child children[SENTDM_MAX_DATABASES];
static Child reader;

void
sentdm_launcher_register(void)
{
	BackgroundWorker worker;

	/* pg_upgrade starts servers that must not do anything by themselves. */
	if (IsBinaryUpgrade)
		return;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 5;
	strlcpy(worker.bgw_library_name, "sentdm", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "sentdm_launcher_main", BGW_MAXLEN);
	strlcpy(worker.bgw_name, "sentdm launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "sentdm launcher", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}

/* Does this row of pg_db_role_setting enable its database? */
static bool
setting_enables(HeapTuple tuple, TupleDesc desc)
{
	bool		isnull;
	Datum		settings;
	Datum	   *elements;
	int			n;
	bool		enabled = false;

	settings = heap_getattr(tuple, Anum_pg_db_role_setting_setconfig, desc, &isnull);
	if (isnull)
		return false;
	deconstruct_array(DatumGetArrayTypeP(settings), TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, NULL, &n);
	for (int i = 0; i < n; i++)
	{
		char	   *setting = TextDatumGetCString(elements[i]);

		if (strncmp(setting, "sentdm.enabled=", 15) == 0)
			(void) parse_bool(setting + 15, &enabled);
	}
	return enabled;
}

/* Databases whose settings say so; palloc'd list of oids. */
static List *
enabled_databases(void)
{
	List	   *databases = NIL;
	Relation	rel = table_open(DbRoleSettingRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	HeapTuple	tuple;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_db_role_setting form = (Form_pg_db_role_setting) GETSTRUCT(tuple);

		if (OidIsValid(form->setdatabase) && !OidIsValid(form->setrole) &&
			setting_enables(tuple, RelationGetDescr(rel)) &&
			SearchSysCacheExists1(DATABASEOID, ObjectIdGetDatum(form->setdatabase)))
			databases = lappend_oid(databases, form->setdatabase);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return databases;
}

/* Entry point of the reader: make a slot for each enabled database. */
void
sentdm_reader_main(Datum arg)
{
	List	   *databases;
	ListCell   *cell;

	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);
	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	databases = enabled_databases();
	foreach(cell, databases)
	{
		if (sentdm_slot(lfirst_oid(cell), true) == NULL)
			ereport(WARNING,
					(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
					 errmsg("sentdm serves at most %d databases of a server", SENTDM_MAX_DATABASES)));
		else
			sentdm_slot_enable(lfirst_oid(cell), true);
	}
	sentdm_databases_read();
	CommitTransactionCommand();
	proc_exit(0);
}

/* Some database that can be connected to; also gives back slots of dropped ones. */
static Oid
look_at_databases(void)
{
	Oid			connectable = InvalidOid;
	bool		exists[SENTDM_MAX_DATABASES] = {false};
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		/* The one that is meant for maintenance is the best choice. */
		if (form->datallowconn &&
			(!OidIsValid(connectable) || strcmp(NameStr(form->datname), "postgres") == 0))
			connectable = form->oid;
		for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
		{
			if (sentdm_slot_by_index(i)->database == form->oid)
				exists[i] = true;
		}
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();

	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		SentdmSlot *slot = sentdm_slot_by_index(i);

		if (OidIsValid(slot->database) && !exists[i] && slot->worker_proc < 0)
			sentdm_slot_free(slot);
	}
	return connectable;
}

static void
wait_before_restart(Child *child, TimestampTz now)
{
	child->state = CHILD_WAITING;
	if (child->backoff_ms == 0 ||
		TimestampDifferenceExceeds(child->started_at, now, LONGEST_BACKOFF_MS))
		child->backoff_ms = FIRST_BACKOFF_MS;
	else
		child->backoff_ms = Min(child->backoff_ms * 2, LONGEST_BACKOFF_MS);
	child->retry_at = TimestampTzPlusMilliseconds(now, child->backoff_ms);
}

static void
start_process(Child *child, const char *function, const char *name, TimestampTz now)
{
	BackgroundWorker worker;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "sentdm", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, function, BGW_MAXLEN);
	snprintf(worker.bgw_name, BGW_MAXLEN, "%s for database %u", name, child->database);
	strlcpy(worker.bgw_type, name, BGW_MAXLEN);
	worker.bgw_main_arg = ObjectIdGetDatum(child->database);
	worker.bgw_notify_pid = MyProcPid;

	child->started_at = now;
	child->fresh = false;
	if (RegisterDynamicBackgroundWorker(&worker, &child->handle))
	{
		child->state = CHILD_RUNNING;
		return;
	}
	/* Said once for each time that it starts to happen. */
	if (child->backoff_ms == 0)
		ereport(WARNING,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("no process slot is free for a %s", name),
				 errhint("Raise \"max_worker_processes\".")));
	wait_before_restart(child, now);
}

static bool
database_exists(Oid database)
{
	bool		exists;

	StartTransactionCommand();
	exists = SearchSysCacheExists1(DATABASEOID, ObjectIdGetDatum(database));
	CommitTransactionCommand();
	return exists;
}

static void
start_worker(Child *child, SentdmSlot *slot, TimestampTz now)
{
	if (!database_exists(child->database))
	{
		sentdm_slot_free(slot);
		return;
	}
	/* What the one before said must not speak for this one. */
	slot->left_cleanly = false;
	start_process(child, "sentdm_worker_main", "sentdm worker", now);
}

static bool
has_ended(Child *child)
{
	pid_t		pid;

	if (GetBackgroundWorkerPid(child->handle, &pid) != BGWH_STOPPED)
		return false;
	pfree(child->handle);
	child->handle = NULL;
	return true;
}

/* A running worker ended: rest when it said so, otherwise try again later. */
static void
notice_end(Child *child, SentdmSlot *slot, TimestampTz now)
{
	if (!has_ended(child))
		return;
	if (slot->left_cleanly)
	{
		child->state = CHILD_RESTING;
		child->backoff_ms = 0;
	}
	else
		wait_before_restart(child, now);
}

/* A worker that an earlier launcher started: leave it alone until it ends. */
static bool
is_inherited(Child *child, SentdmSlot *slot)
{
	if (child->state != CHILD_RESTING)
		return false;
	if (slot->worker_proc >= 0)
	{
		child->inherited = true;
		child->fresh = false;
	}
	else if (child->inherited)
	{
		child->inherited = false;
		child->fresh = !slot->left_cleanly;
	}
	return child->inherited;
}

/* What to do for one database; returns how long nothing will happen by itself. */
static long
tend(Child *child, SentdmSlot *slot, TimestampTz now)
{
	TimestampTz wake_at = DT_NOEND;

	if (child->state == CHILD_RUNNING)
		notice_end(child, slot, now);
	if (is_inherited(child, slot))
		return LONGEST_WAIT_MS;
	if (child->state != CHILD_RUNNING && slot->enabled &&
		(child->state == CHILD_WAITING ? now >= child->retry_at :
		 child->fresh || slot->next_due <= now || pg_atomic_read_u32(&slot->work) != 0))
		start_worker(child, slot, now);

	if (child->state == CHILD_WAITING && slot->enabled)
		wake_at = child->retry_at;
	else if (child->state == CHILD_RESTING && slot->enabled)
		wake_at = slot->next_due;
	if (wake_at == DT_NOEND)
		return LONGEST_WAIT_MS;
	return Min(TimestampDifferenceMilliseconds(now, wake_at), LONGEST_WAIT_MS);
}

static long
tend_all(TimestampTz now)
{
	long		timeout_ms = LONGEST_WAIT_MS;

	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		SentdmSlot *slot = sentdm_slot_by_index(i);
		Child	   *child = &children[i];

		if (child->database != slot->database && child->state != CHILD_RUNNING)
		{
			memset(child, 0, sizeof(*child));
			child->database = slot->database;
			child->fresh = true;
		}
		if (OidIsValid(child->database))
			timeout_ms = Min(timeout_ms, tend(child, slot, now));
	}
	return timeout_ms;
}

/* Have the catalog read, until it was; returns how long to wait. */
static long
tend_reader(TimestampTz now)
{
	if (reader.state == CHILD_RUNNING)
	{
		if (!has_ended(&reader))
			return LONGEST_WAIT_MS;
		wait_before_restart(&reader, now);
	}
	if (sentdm_databases_known())
		return 0;
	if (reader.state == CHILD_WAITING && now < reader.retry_at)
		return TimestampDifferenceMilliseconds(now, reader.retry_at);
	reader.database = look_at_databases();
	start_process(&reader, "sentdm_reader_main", "sentdm reader", now);
	return LONGEST_WAIT_MS;
}

static void
reload(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	/* What kept a worker from sending may be over. */
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
		children[i].fresh = true;
}

void
sentdm_launcher_main(Datum arg)
{
	TimestampTz looked_at = 0;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	sentdm_launcher_attach();

	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();
		long		timeout_ms;

		CHECK_FOR_INTERRUPTS();
		/* Not 0: whoever terminates only this process gets a new one. */
		if (ShutdownRequestPending)
			proc_exit(1);
		if (ConfigReloadPending)
			reload();
		if (TimestampDifferenceExceeds(looked_at, now, LONGEST_WAIT_MS))
		{
			(void) look_at_databases();
			looked_at = now;
		}
		timeout_ms = tend_reader(now);
		if (sentdm_databases_known())
			timeout_ms = tend_all(now);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Max(timeout_ms, 1), PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}
