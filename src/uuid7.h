/*
 * uuid7.h
 *		Time-ordered ids.
 */
#ifndef SENTDM_UUID7_H
#define SENTDM_UUID7_H

#include "utils/uuid.h"

/*
 * Make a version 7 UUID; ids made by one process are ascending.  Never from a
 * sequence: after a crash a sequence can repeat itself, Sent would answer the
 * new message with the old one's answer, and a message would vanish.
 */
extern void sentdm_uuid7(pg_uuid_t *uuid);

/* When an id was made, in 4096ths of a millisecond since 1970: rises in a session. */
extern int64 sentdm_uuid7_time(const pg_uuid_t *uuid);

#endif							/* SENTDM_UUID7_H */
