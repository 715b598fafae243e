/*
 * metrics.h
 *		What happened since the start, as numbers without personal data.
 */
#ifndef RECEIVER_METRICS_H
#define RECEIVER_METRICS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "refusal.h"

typedef enum ReceiverCounter
{
	RECEIVER_RECEIVED,			/* whole POSTs to the webhook path */
	RECEIVER_EVENTS_ACCEPTED,
	RECEIVER_EVENTS_DUPLICATE,
	RECEIVER_CONNECTIONS_ACCEPTED,
	RECEIVER_CONNECTIONS_REFUSED,
	RECEIVER_BATCHES,
	RECEIVER_BATCHES_RETRIED,
	RECEIVER_DATABASE_CONNECTS,
	RECEIVER_DATABASE_FAILURES,
	RECEIVER_LOG_LINES_LOST,
	RECEIVER_COUNTERS
} ReceiverCounter;

typedef enum ReceiverHistogram
{
	RECEIVER_BATCH_SIZE,		/* events */
	RECEIVER_BATCH_TIME,		/* from sending to the commit's confirmation */
	RECEIVER_REQUEST_TIME,		/* from the request line to the answer */
	RECEIVER_HISTOGRAMS
} ReceiverHistogram;

/* What is true now. */
typedef struct ReceiverGauges
{
	int			queue_depth;
	size_t		queue_bytes;
	int			connections;
	bool		database_up;
	bool		stopping;
} ReceiverGauges;

extern void receiver_metrics_count(ReceiverCounter counter);

/* An event count, or a time in microseconds. */
extern void receiver_metrics_observe(ReceiverHistogram histogram, int64_t value);

/* A request that the receiver refused. */
extern void receiver_metrics_refused(ReceiverRefusal refusal);

/* A request that the database refused, and why. */
extern void receiver_metrics_rejected(int http_status, const char *reason);

/* Prometheus' text format, to be freed by the caller; NULL: out of memory. */
extern char *receiver_metrics_render(const ReceiverGauges *gauges, size_t *length);

/* When the last request was accepted or rejected by the database; 0: never. */
extern int64_t receiver_metrics_last_accepted_us(void);
extern int64_t receiver_metrics_last_rejected_us(void);
extern void receiver_metrics_accepted(bool duplicate);

#endif							/* RECEIVER_METRICS_H */
