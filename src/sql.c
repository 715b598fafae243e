/*
 * sql.c
 *		Statements that are planned once per process, and rows for them to read.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/tuplestore.h"

#include "sql.h"

static SPIPlanPtr
plan_of(SentdmStatement *statement)
{
	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, statement->nargs, statement->types);

		if (plan == NULL || SPI_keepplan(plan) != 0)
			elog(ERROR, "could not prepare a statement: %s",
				 SPI_result_code_string(SPI_result));
		statement->plan = plan;
	}
	return statement->plan;
}

static uint64
processed(int result)
{
	if (result < 0)
		elog(ERROR, "could not run a statement: %s", SPI_result_code_string(result));
	return SPI_processed;
}

uint64
sentdm_execute(SentdmStatement *statement, Datum *values, const char *nulls)
{
	return processed(SPI_execute_plan(plan_of(statement), values, nulls, false, 0));
}

uint64
sentdm_execute_into(SentdmStatement *statement, Datum *values, DestReceiver *receiver)
{
	SPIPlanPtr	plan = plan_of(statement);
	SPIExecuteOptions options;
	ParamListInfo params = makeParamList(statement->nargs);

	for (int i = 0; i < statement->nargs; i++)
	{
		params->params[i].value = values[i];
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype = statement->types[i];
	}
	memset(&options, 0, sizeof(options));
	options.params = params;
	options.dest = receiver;
	return processed(SPI_execute_plan_extended(plan, &options));
}

static TupleDesc
desc_of(SentdmShape *shape)
{
	if (shape->desc == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
		TupleDesc	desc = CreateTemplateTupleDesc(shape->ncolumns);

		for (int c = 0; c < shape->ncolumns; c++)
			TupleDescInitEntry(desc, c + 1, shape->columns[c].name, shape->columns[c].type, -1, 0);
		MemoryContextSwitchTo(old);
		shape->desc = desc;
	}
	return shape->desc;
}

void
sentdm_rows_begin(SentdmRows *rows, SentdmShape *shape)
{
	memset(rows, 0, sizeof(*rows));
	memset(rows->nulls, true, sizeof(rows->nulls));
	rows->shape = shape;
	rows->memory = AllocSetContextCreate(CurrentMemoryContext, "sentdm row", ALLOCSET_SMALL_SIZES);
	rows->table.md.name = unconstify(char *, shape->name);
	rows->table.md.tupdesc = desc_of(shape);
	rows->table.md.enrtype = ENR_NAMED_TUPLESTORE;
	rows->table.reldata = tuplestore_begin_heap(true, false, work_mem);
}

void
sentdm_rows_set(SentdmRows *rows, int column, Datum value)
{
	rows->values[column] = value;
	rows->nulls[column] = false;
}

void
sentdm_rows_set_text(SentdmRows *rows, int column, const char *string)
{
	MemoryContext old = MemoryContextSwitchTo(rows->memory);

	if (string != NULL)
		sentdm_rows_set(rows, column, CStringGetTextDatum(string));
	MemoryContextSwitchTo(old);
}

void
sentdm_rows_add(SentdmRows *rows)
{
	tuplestore_putvalues(rows->table.reldata, rows->shape->desc, rows->values, rows->nulls);
	memset(rows->nulls, true, sizeof(rows->nulls));
	rows->table.md.enrtuples++;
	MemoryContextReset(rows->memory);
}

int
sentdm_rows_count(const SentdmRows *rows)
{
	return (int) rows->table.md.enrtuples;
}

void
sentdm_rows_offer(SentdmRows *rows)
{
	int			result = SPI_register_relation(&rows->table);

	if (result < 0)
		elog(ERROR, "could not offer rows: %s", SPI_result_code_string(result));
}

void
sentdm_rows_end(SentdmRows *rows)
{
	(void) SPI_unregister_relation(rows->shape->name);
	tuplestore_end(rows->table.reldata);
	MemoryContextDelete(rows->memory);
}

Datum
sentdm_array(Datum *values, bool *nulls, int n, Oid type)
{
	int			dims[1];
	int			lower_bounds[1] = {1};
	int16		length;
	bool		by_value;
	char		align;

	dims[0] = n;
	get_typlenbyvalalign(type, &length, &by_value, &align);
	return PointerGetDatum(construct_md_array(values, nulls, 1, dims, lower_bounds, type,
											  length, by_value, align));
}
