/*
 * insert.h
 *		Single rows into our own tables, without a plan.
 */
#ifndef SENTDM_INSERT_H
#define SENTDM_INSERT_H

/* A table of the schema sentdm with so many columns. */
typedef struct SentdmTable
{
	const char *name;
	int			columns;
	int			unique_column;	/* number from 1; a row with a value in it
								 * that is there already is not inserted; 0:
								 * there is none */
	struct SentdmTarget *target;	/* insert.c */
} SentdmTable;

typedef enum SentdmInserted
{
	SENTDM_INSERTED,
	SENTDM_KNOWN,				/* its unique value was there already */
	SENTDM_NOT_PLAIN			/* nothing was done: a statement has to */
} SentdmInserted;

/* Register what hears of changes; once per process. */
extern void sentdm_insert_init(void);

/*
 * Insert a row, with the values of all columns in their order; indexes and
 * constraints are seen to.  Not plain is a table with something that is left to a
 * statement: triggers, rules, row security, further columns, unusual indexes.
 * Raises what an INSERT would, with ON CONFLICT DO NOTHING for the unique column.
 */
extern SentdmInserted sentdm_insert(SentdmTable *table, const Datum *values, const bool *nulls);

#endif							/* SENTDM_INSERT_H */
