/*
 * writer.h
 *		The thread that takes events to the database.
 */
#ifndef RECEIVER_WRITER_H
#define RECEIVER_WRITER_H

#include "config.h"
#include "queue.h"

typedef struct ReceiverWriter ReceiverWriter;

/* NULL: out of memory or threads. */
extern ReceiverWriter *receiver_writer_start(const ReceiverConfig *config, ReceiverQueue *queue);

/* Connected, and the function can be called. */
extern bool receiver_writer_is_up(ReceiverWriter *writer);

/* Since when it is not; 0: it is. */
extern int64_t receiver_writer_down_since_us(ReceiverWriter *writer);

/*
 * End when the queue is closed and the batch under way is done; with abandon, do
 * not wait for that batch.  False: it hangs, and memory must not be freed.
 */
extern bool receiver_writer_stop(ReceiverWriter *writer, bool abandon);

/* After it has ended, and when nobody asks any longer whether it is up. */
extern void receiver_writer_free(ReceiverWriter *writer);

/* Connect once, say on standard output what was found.  False: it would not work. */
extern bool receiver_writer_check(const ReceiverConfig *config);

#endif							/* RECEIVER_WRITER_H */
