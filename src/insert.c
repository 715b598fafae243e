/*
 * insert.c
 *		Single rows into our own tables, without a plan.
 *
 * To start and end a plan for a single row costs more than the row.  The executor
 * has a way in that needs none, made for logical replication; what it does not
 * do, such as triggers for statements or row security, is left to a statement.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "executor/executor.h"
#include "nodes/makefuncs.h"
#include "parser/parse_relation.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/reltrigger.h"

#include "compat.h"
#include "insert.h"

/* Is there nothing about the table that we would pass by? */
static bool
is_plain(Relation relation, int columns)
{
	const TriggerDesc *triggers = relation->trigdesc;

	return relation->rd_rel->relkind == RELKIND_RELATION &&
		RelationGetNumberOfAttributes(relation) == columns &&
		relation->rd_rules == NULL && !relation->rd_rel->relrowsecurity &&
		(triggers == NULL ||
		 !(triggers->trig_insert_before_statement || triggers->trig_insert_after_statement ||
		   triggers->trig_insert_after_row || triggers->trig_insert_new_table));
}

static void
insert_into(Relation relation, const Datum *values, const bool *nulls, int n)
{
	EState	   *estate = CreateExecutorState();
	ResultRelInfo *target = makeNode(ResultRelInfo);
	RangeTblEntry *entry = makeNode(RangeTblEntry);
	TupleTableSlot *slot;

	entry->rtekind = RTE_RELATION;
	entry->relid = RelationGetRelid(relation);
	entry->relkind = relation->rd_rel->relkind;
	entry->rellockmode = RowExclusiveLock;
	sentdm_init_range_table(estate, entry);
	InitResultRelInfo(target, relation, 1, NULL, 0);
	estate->es_output_cid = GetCurrentCommandId(true);
	ExecOpenIndices(target, false);

	slot = ExecInitExtraTupleSlot(estate, RelationGetDescr(relation), &TTSOpsVirtual);
	memcpy(slot->tts_values, values, n * sizeof(Datum));
	memcpy(slot->tts_isnull, nulls, n * sizeof(bool));
	ExecStoreVirtualTuple(slot);
	ExecSimpleRelationInsert(target, estate, slot);

	ExecCloseIndices(target);
	ExecResetTupleTable(estate->es_tupleTable, false);
	FreeExecutorState(estate);
}

bool
sentdm_insert(const char *table, const Datum *values, const bool *nulls, int n)
{
	Oid			schema = get_namespace_oid("sentdm", false);
	Relation	relation = table_open(get_relname_relid(table, schema), RowExclusiveLock);
	bool		plain = is_plain(relation, n);

	if (plain)
		insert_into(relation, values, nulls, n);
	table_close(relation, NoLock);
	return plain;
}
