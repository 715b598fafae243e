/*
 * insert.h
 *		Single rows into our own tables, without a plan.
 */
#ifndef SENTDM_INSERT_H
#define SENTDM_INSERT_H

/*
 * Insert a row into a table of the schema sentdm, with the values of all its
 * columns in their order; indexes and constraints are seen to.  False: nothing
 * was done, because the table has something that only a statement respects
 * (triggers, rules, row security, further columns).  Raises what an INSERT would.
 */
extern bool sentdm_insert(const char *table, const Datum *values, const bool *nulls, int n);

#endif							/* SENTDM_INSERT_H */
