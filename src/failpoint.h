/*
 * failpoint.h
 *		Places at which a test can make the worker die, fail or stand still.
 *
 * Only in a library built for tests (make failpoints); elsewhere nothing of it
 * is compiled.
 */
#ifndef SENTDM_FAILPOINT_H
#define SENTDM_FAILPOINT_H

#ifdef SENTDM_FAILPOINTS

/* Do what the file sentdm.failpoint asks for at this place, once; see failpoint.c. */
extern void sentdm_failpoint(const char *place);

#define SENTDM_FAILPOINT(place) sentdm_failpoint(place)
#else
#define SENTDM_FAILPOINT(place) ((void) 0)
#endif

#endif							/* SENTDM_FAILPOINT_H */
