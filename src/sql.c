/*
 * sql.c
 *		Statements that are planned once per process.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/lsyscache.h"

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
