/*
 * clock.h
 *		The clock that never jumps.
 */
#ifndef SENTDM_CLOCK_H
#define SENTDM_CLOCK_H

#include "portability/instr_time.h"

/* Monotonic microseconds since some moment. */
static inline int64
sentdm_clock_us(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

#endif							/* SENTDM_CLOCK_H */
