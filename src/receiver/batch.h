/*
 * batch.h
 *		Some events as the parameters of one query, and its result as answers.
 */
#ifndef RECEIVER_BATCH_H
#define RECEIVER_BATCH_H

#include <libpq-fe.h>

#include "queue.h"

/* A buffer that grows and is used again. */
typedef struct ReceiverBuffer
{
	char	   *data;
	size_t		length;
	size_t		capacity;
	bool		failed;			/* out of memory: the content is not whole */
} ReceiverBuffer;

/* bytea[] of the bodies and jsonb[] of the headers, in binary format. */
typedef struct ReceiverBatch
{
	ReceiverBuffer payloads;
	ReceiverBuffer headers;
} ReceiverBatch;

/* False: out of memory. */
extern bool receiver_batch_encode(ReceiverBatch *batch, ReceiverEvent **events, int n);

/*
 * Fill in the answers, without giving them.  False: the result is not one row for
 * each event.
 */
extern bool receiver_batch_decode(const PGresult *result, ReceiverEvent **events, int n);

/* Give back the memory of an unusually large batch. */
extern void receiver_batch_trim(ReceiverBatch *batch);
extern void receiver_batch_free(ReceiverBatch *batch);

#endif							/* RECEIVER_BATCH_H */
