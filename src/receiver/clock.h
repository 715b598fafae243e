/*
 * clock.h
 *		Time as the receiver measures it: microseconds that never jump.
 */
#ifndef RECEIVER_CLOCK_H
#define RECEIVER_CLOCK_H

#include <stdint.h>
#include <time.h>

#define RECEIVER_NEVER INT64_MAX	/* a deadline that does not come */

static inline int64_t
receiver_now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* How long poll() may sleep until then, in milliseconds, rounded up; at most limit_ms. */
static inline int
receiver_ms_until(int64_t deadline_us, int limit_ms)
{
	int64_t		left_us = deadline_us - receiver_now_us();

	if (left_us <= 0)
		return 0;
	if (left_us > (int64_t) limit_ms * 1000)
		return limit_ms;
	return (int) ((left_us + 999) / 1000);
}

#endif							/* RECEIVER_CLOCK_H */
