/*
 * status.h
 *		The order of the statuses that a message goes through.
 */
#ifndef SENTDM_STATUS_H
#define SENTDM_STATUS_H

/*
 * How far a status is along the way, whatever its case.  It only decides between
 * statuses of the same second, and of events that do not say when they happened.
 */
extern int	sentdm_rank_of_status(const char *status);

/* Is it one of the statuses that this version has a place for? */
extern bool sentdm_status_is_known(const char *status);

/* Does it say that the message will not arrive? */
extern bool sentdm_status_is_failure(const char *status);

#endif							/* SENTDM_STATUS_H */
