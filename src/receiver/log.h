/*
 * log.h
 *		Lines on standard error, written by a thread of their own.
 */
#ifndef RECEIVER_LOG_H
#define RECEIVER_LOG_H

#include <stdbool.h>

typedef enum ReceiverLogLevel
{
	RECEIVER_ERROR,
	RECEIVER_WARNING,
	RECEIVER_INFO
} ReceiverLogLevel;

/* Before it, and after receiver_log_stop(), lines are written at once. */
extern bool receiver_log_start(void);

/* Write what is left. */
extern void receiver_log_stop(void);

/* One line; control characters in it become '?'. */
extern void receiver_log(ReceiverLogLevel level, const char *format,...)
			__attribute__((format(printf, 2, 3)));

/* The same for a line about one request: these are the first to be left out. */
extern void receiver_log_access(const char *format,...)
			__attribute__((format(printf, 1, 2)));

#endif							/* RECEIVER_LOG_H */
