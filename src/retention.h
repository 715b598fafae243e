/*
 * retention.h
 *		Deleting what was kept for long enough, in small batches.
 */
#ifndef SENTDM_RETENTION_H
#define SENTDM_RETENTION_H

#include "datatype/timestamp.h"

/* The longest rest between two batches of a pass. */
#define SENTDM_RETENTION_REST_MS 5000

/*
 * In the worker: apply sentdm.retention and sentdm.body_retention to one small
 * batch, in a transaction of its own, and return when to be called again.  Never
 * raises an error for what the database refuses, and never waits for a lock.
 * DT_NOEND: nothing is to be deleted, under these settings.
 */
extern TimestampTz sentdm_retention_step(void);

#endif							/* SENTDM_RETENTION_H */
