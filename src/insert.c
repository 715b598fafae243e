/*
 * insert.c
 *		Single rows into our own tables, without a plan.
 *
 * To start and end a plan for a single row costs more than the row.  The executor
 * has a way in that needs none, made for logical replication; what it does not
 * do, such as triggers for statements or row security, is left to a statement.
 *
 * What the executor has to know of a table costs more than the row, too, so it is
 * kept for the next one, as long as nothing changes.  It is memory and nothing
 * else: each row opens and locks the table and its indexes, and leaves nothing open.
 * So no later command of the transaction finds the table in use, and there is
 * nothing to undo when a statement, a savepoint or a transaction ends or fails.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "nodes/makefuncs.h"
#include "parser/parse_relation.h"
#include "storage/lmgr.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/reltrigger.h"
#include "utils/syscache.h"

#include "compat.h"
#include "insert.h"

/* What was found out about a table; all of it is in the context. */
typedef struct SentdmTarget
{
	MemoryContext context;
	uint64		known;			/* the value of "changes" then */
	Oid			table;
	Oid		   *indexes;
	List	   *unique_indexes; /* on the unique column */
	bool		plain;			/* else a statement has to insert */
	EState	   *estate;
	ResultRelInfo *info;
	TupleTableSlot *slot;
	uint64		locked_in;		/* the value of "releases" ... */
	int			rows;			/* ... and how many were inserted since */
} SentdmTarget;

/* Grows whenever a table, an index or a function is not what it was. */
static uint64 changes = 0;

/* Grows whenever locks that were to be kept may have been released. */
static uint64 releases = 0;

static void
on_relation_change(Datum arg, Oid relation)
{
	changes++;
}

/* Indexes and checks can call functions, which are looked up once. */
static void
on_function_change(Datum arg, int cache, uint32 hash)
{
	changes++;
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	releases++;
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		releases++;
}

void
sentdm_insert_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
	CacheRegisterRelcacheCallback(on_relation_change, (Datum) 0);
	CacheRegisterSyscacheCallback(PROCOID, on_function_change, (Datum) 0);
}

/* Those for a subscriber do not, for it has no plain tables. */
static bool
fires_triggers(const TriggerDesc *triggers)
{
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];

		if (TRIGGER_FOR_INSERT(trigger->tgtype) && trigger->tgenabled != TRIGGER_DISABLED &&
			trigger->tgenabled != TRIGGER_FIRES_ON_REPLICA)
			return true;
	}
	return false;
}

/* Is there nothing about the table that we would pass by? */
static bool
is_plain(Relation relation, int columns)
{
	return relation->rd_rel->relkind == RELKIND_RELATION &&
		RelationGetNumberOfAttributes(relation) == columns &&
		relation->rd_rules == NULL && !relation->rd_rel->relrowsecurity &&
		!fires_triggers(relation->trigdesc);
}

/* Other kinds of indexes may keep more than memory from one row to the next. */
static bool
has_plain_indexes(const ResultRelInfo *info)
{
	for (int i = 0; i < info->ri_NumIndices; i++)
	{
		if (info->ri_IndexRelationInfo[i]->ii_Am != BTREE_AM_OID)
			return false;
	}
	return true;
}

static bool
is_unique_on(const IndexInfo *index, int column)
{
	return index->ii_Unique && index->ii_NumIndexKeyAttrs == 1 && index->ii_IndexAttrNumbers[0] == column;
}

static void
note_indexes(SentdmTarget *target, int unique_column)
{
	ResultRelInfo *info = target->info;

	ExecOpenIndices(info, unique_column != 0);
	target->indexes = palloc(info->ri_NumIndices * sizeof(Oid));
	for (int i = 0; i < info->ri_NumIndices; i++)
	{
		target->indexes[i] = RelationGetRelid(info->ri_IndexRelationDescs[i]);
		if (unique_column != 0 && is_unique_on(info->ri_IndexRelationInfo[i], unique_column))
			target->unique_indexes = lappend_oid(target->unique_indexes, target->indexes[i]);
	}
	ExecCloseIndices(info);
}

/* What the executor wants for rows that come one by one. */
static void
prepare(SentdmTarget *target, Relation relation, int unique_column)
{
	RangeTblEntry *entry = makeNode(RangeTblEntry);

	entry->rtekind = RTE_RELATION;
	entry->relid = RelationGetRelid(relation);
	entry->relkind = relation->rd_rel->relkind;
	entry->rellockmode = RowExclusiveLock;
	target->estate = CreateExecutorState();
	sentdm_init_range_table(target->estate, entry);
	target->info = makeNode(ResultRelInfo);
	InitResultRelInfo(target->info, relation, 1, NULL, 0);
	target->info->ri_TrigDesc = NULL;	/* none of them fires */
	note_indexes(target, unique_column);
	target->plain = has_plain_indexes(target->info) && (unique_column == 0 || target->unique_indexes != NIL);
	/* The table's own description would have to be held. */
	target->slot = ExecInitExtraTupleSlot(target->estate, CreateTupleDescCopy(RelationGetDescr(relation)),
										  &TTSOpsVirtual);
}

static SentdmTarget *
find_out(const SentdmTable *table)
{
	RangeVar   *name = makeRangeVar("sentdm", unconstify(char *, table->name), -1);
	Oid			relid = RangeVarGetRelid(name, RowExclusiveLock, false);
	uint64		known = changes;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "sentdm table", ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	SentdmTarget *target = palloc0(sizeof(SentdmTarget));
	Relation	relation = table_open(relid, NoLock);

	target->context = context;
	target->known = known;
	target->table = relid;
	if (is_plain(relation, table->columns))
		prepare(target, relation, table->unique_column);
	table_close(relation, NoLock);
	MemoryContextSwitchTo(old);
	return target;
}

/*
 * What is known of a table, which is locked.  It is taken out of where it is kept,
 * and into the caller's memory: after an error in the middle of a row nobody finds
 * it again, and a row within a row finds out for itself.
 */
static SentdmTarget *
take(SentdmTable *table)
{
	SentdmTarget *target = table->target;

	if (target == NULL)
		return find_out(table);
	table->target = NULL;
	MemoryContextSetParent(target->context, CurrentMemoryContext);
	if (target->locked_in != releases)
		target->rows = 0;
	/* A lock that is new tells what changed before it was granted. */
	if (target->rows == 0)
		LockRelationOid(target->table, RowExclusiveLock);
	if (target->known == changes)
		return target;
	MemoryContextDelete(target->context);
	return find_out(table);
}

static void
keep(SentdmTable *table, SentdmTarget *target)
{
	if (table->target != NULL)
		MemoryContextDelete(table->target->context);
	MemoryContextSetParent(target->context, CacheMemoryContext);
	table->target = target;
}

/*
 * A row with a unique value, unless that is there already, or somebody else inserts
 * it at the same time: then whoever is first to enter it into the index wins, and
 * the other one's row is taken back.
 */
static bool
store_unless_known(SentdmTarget *target)
{
	ResultRelInfo *info = target->info;
	EState	   *estate = target->estate;
	bool		lost;

	target->slot->tts_tableOid = target->table;
	if (RelationGetDescr(info->ri_RelationDesc)->constr != NULL)
		ExecConstraints(info, target->slot, estate);
	do
	{
		uint32		token;

		lost = false;
		if (!sentdm_check_unique(info, target->slot, estate, target->unique_indexes))
			return false;
		token = SpeculativeInsertionLockAcquire(GetCurrentTransactionId());
		table_tuple_insert_speculative(info->ri_RelationDesc, target->slot, estate->es_output_cid, 0, NULL, token);
		sentdm_insert_index_tuples(info, target->slot, estate, &lost, target->unique_indexes);
		table_tuple_complete_speculative(info->ri_RelationDesc, target->slot, token, !lost);
		SpeculativeInsertionLockRelease(GetCurrentTransactionId());
	} while (lost);
	return true;
}

static bool
store(SentdmTarget *target, const Datum *values, const bool *nulls, const SentdmTable *table)
{
	bool		stored = true;

	target->estate->es_output_cid = GetCurrentCommandId(true);
	memcpy(target->slot->tts_values, values, table->columns * sizeof(Datum));
	memcpy(target->slot->tts_isnull, nulls, table->columns * sizeof(bool));
	ExecStoreVirtualTuple(target->slot);
	if (table->unique_column != 0 && !nulls[table->unique_column - 1])
		stored = store_unless_known(target);
	else
		ExecSimpleRelationInsert(target->info, target->estate, target->slot);
	ExecClearTuple(target->slot);
	ResetPerTupleExprContext(target->estate);
	return stored;
}

/*
 * Locks of indexes are released after the first row, as a statement does after its
 * last; a transaction that inserts more keeps them, like that of the table.
 */
static bool
insert_into(SentdmTarget *target, const Datum *values, const bool *nulls, const SentdmTable *table)
{
	ResultRelInfo *info = target->info;
	LOCKMODE	to_acquire = target->rows < 2 ? RowExclusiveLock : NoLock;
	LOCKMODE	to_release = target->rows < 1 ? RowExclusiveLock : NoLock;
	bool		stored;

	info->ri_RelationDesc = table_open(target->table, NoLock);
	for (int i = 0; i < info->ri_NumIndices; i++)
		info->ri_IndexRelationDescs[i] = index_open(target->indexes[i], to_acquire);
	stored = store(target, values, nulls, table);
	for (int i = 0; i < info->ri_NumIndices; i++)
		index_close(info->ri_IndexRelationDescs[i], to_release);
	table_close(info->ri_RelationDesc, NoLock);
	target->locked_in = releases;
	target->rows = Min(target->rows + 1, 2);
	return stored;
}

SentdmInserted
sentdm_insert(SentdmTable *table, const Datum *values, const bool *nulls)
{
	SentdmTarget *target = take(table);
	SentdmInserted inserted = SENTDM_NOT_PLAIN;

	if (target->plain && SessionReplicationRole != SESSION_REPLICATION_ROLE_REPLICA)
		inserted = insert_into(target, values, nulls, table) ? SENTDM_INSERTED : SENTDM_KNOWN;
	keep(table, target);
	return inserted;
}
