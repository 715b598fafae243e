/*
 * pace.h
 *		How long a backlog takes under the limits in force.
 */
#ifndef SENTDM_PACE_H
#define SENTDM_PACE_H

/*
 * Seconds that so many requests to so many recipients take at least, by
 * sentdm.rate_limit and sentdm.message_rate_limit; -1: there is no limit.
 */
extern double sentdm_seconds_to_send(int64 requests, int64 recipients);

#endif							/* SENTDM_PACE_H */
