/*
 * sql.h
 *		Statements that are planned once per process, and rows for them to read.
 */
#ifndef SENTDM_SQL_H
#define SENTDM_SQL_H

#include "executor/spi.h"
#include "tcop/dest.h"
#include "utils/queryenvironment.h"

#define SENTDM_MAX_ARGS 16
#define SENTDM_MAX_COLUMNS 12

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

/* The name and the columns of such rows; constant but for what is made of them. */
typedef struct SentdmShape
{
	const char *name;
	int			ncolumns;
	struct
	{
		const char *name;
		Oid			type;
	}			columns[SENTDM_MAX_COLUMNS];
	TupleDesc	desc;			/* made at the first use */
} SentdmShape;

/*
 * Rows in memory that statements read as if they were a table: for many rows much
 * cheaper than an array for each column.
 */
typedef struct SentdmRows
{
	SentdmShape *shape;
	MemoryContext memory;		/* of the next row */
	EphemeralNamedRelationData table;
	Datum		values[SENTDM_MAX_COLUMNS]; /* of the row to be added next */
	bool		nulls[SENTDM_MAX_COLUMNS];
} SentdmRows;

/* No rows yet.  *rows must stay where it is, and so must the current memory context. */
extern void sentdm_rows_begin(SentdmRows *rows, SentdmShape *shape);

/* Set a column of the next row, otherwise null; text may be NULL.  Then add it. */
extern void sentdm_rows_set(SentdmRows *rows, int column, Datum value);
extern void sentdm_rows_set_text(SentdmRows *rows, int column, const char *string);
extern void sentdm_rows_add(SentdmRows *rows);
extern int	sentdm_rows_count(const SentdmRows *rows);

/* Let the statements of this SPI connection read them, by the name of their shape. */
extern void sentdm_rows_offer(SentdmRows *rows);

/* They are not needed any more; the end of the transaction does the same. */
extern void sentdm_rows_end(SentdmRows *rows);

/* An array of n elements without dimensions of its own; nulls may be NULL. */
extern Datum sentdm_array(Datum *values, bool *nulls, int n, Oid type);

#endif							/* SENTDM_SQL_H */
