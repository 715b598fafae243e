/*
 * recovery.h
 *		How this server came to be the primary: was it promoted, or restored to a
 *		point in time?
 */
#ifndef SENTDM_RECOVERY_H
#define SENTDM_RECOVERY_H

#include "access/xlogdefs.h"

/* To be called by the postmaster each time that it starts the server. */
extern void sentdm_recovery_note_start(void);

/*
 * Is what this server now holds, on the present timeline, a restored copy of
 * what it held on an earlier one?  False after a promotion.
 */
extern bool sentdm_recovery_made_copy(TimeLineID then, TimeLineID now);

#endif							/* SENTDM_RECOVERY_H */
