/*
 * insert.h
 *		Single rows into our own tables, without a plan.
 */
#ifndef SENTDM_INSERT_H
#define SENTDM_INSERT_H

/* A table of the schema sentdm with so many columns; the rest is ours. */
typedef struct SentdmTable
{
	const char *name;
	int			columns;
	struct SentdmTarget *target;
} SentdmTable;

/* Register what hears of changes; once per process. */
extern void sentdm_insert_init(void);

/*
 * Insert a row, with the values of all columns in their order; indexes and
 * constraints are seen to.  False: nothing was done, because the table has
 * something that is left to a statement (triggers, rules, row security, further
 * columns, unusual indexes).  Raises what an INSERT would.
 */
extern bool sentdm_insert(SentdmTable *table, const Datum *values, const bool *nulls);

#endif							/* SENTDM_INSERT_H */
