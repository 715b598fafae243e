/*
 * sql.h
 *		Statements that are planned once per process.
 */
#ifndef SENTDM_SQL_H
#define SENTDM_SQL_H

#include "executor/spi.h"
#include "tcop/dest.h"

#define SENTDM_MAX_ARGS 16

/* Text and argument types are constant; the plan is made at the first use. */
typedef struct SentdmStatement
{
	const char *sql;
	int			nargs;
	Oid			types[SENTDM_MAX_ARGS];
	SPIPlanPtr	plan;
} SentdmStatement;

/*
 * Run a statement within an SPI connection; the result is in SPI_tuptable, and
 * the number of rows is returned.  nulls as in SPI_execute_plan, or NULL.
 */
extern uint64 sentdm_execute(SentdmStatement *statement, Datum *values, const char *nulls);

/* The same, with each row given to the receiver, and no SPI_tuptable. */
extern uint64 sentdm_execute_into(SentdmStatement *statement, Datum *values, DestReceiver *receiver);

/* An array of n elements without dimensions of its own; nulls may be NULL. */
extern Datum sentdm_array(Datum *values, bool *nulls, int n, Oid type);

#endif							/* SENTDM_SQL_H */
