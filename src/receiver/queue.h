/*
 * queue.h
 *		Events that wait for the database, and what they are answered.
 */
#ifndef RECEIVER_QUEUE_H
#define RECEIVER_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "refusal.h"

typedef struct ReceiverEvent ReceiverEvent;

/*
 * One webhook request.  Whoever takes an event from the queue owes it an answer:
 * fills in the last part and calls answered(), after which the event is gone.
 */
struct ReceiverEvent
{
	ReceiverEvent *next;
	char	   *body;
	size_t		body_length;
	char	   *headers;		/* JSON object */
	size_t		headers_length;
	int64_t		deadline_us;	/* refused when not taken by then */
	void		(*answered) (ReceiverEvent *event);

	ReceiverRefusal refusal;	/* when the receiver refuses it, else: */
	int			http_status;	/* as the database says */
	int64_t		event_id;		/* 0: not stored */
	bool		duplicate;
	char		reason[64];		/* "": none */
};

typedef struct ReceiverQueue ReceiverQueue;

/* NULL: out of memory or descriptors. */
extern ReceiverQueue *receiver_queue_create(int max_events, size_t max_bytes);
extern void receiver_queue_destroy(ReceiverQueue *queue);

/* Memory for bodies, also of those that are still arriving. */
extern bool receiver_queue_reserve(ReceiverQueue *queue, size_t bytes);
extern void receiver_queue_release(ReceiverQueue *queue, size_t bytes);

/* Add an event, or say why not; then it still belongs to the caller. */
extern ReceiverRefusal receiver_queue_put(ReceiverQueue *queue, ReceiverEvent *event);

/* Take the oldest events: at most max, and no more than max_bytes unless it is one. */
extern int	receiver_queue_take(ReceiverQueue *queue, ReceiverEvent **events, int max, size_t max_bytes);

/* Answer those whose deadline is over. */
extern void receiver_queue_expire(ReceiverQueue *queue, int64_t now_us, ReceiverRefusal refusal);

/* Put nothing more in; answer what is in it. */
extern void receiver_queue_close(ReceiverQueue *queue);

/* While the database is away, events are not let in at all: the reason why. */
extern void receiver_queue_block(ReceiverQueue *queue, ReceiverRefusal refusal);

extern int	receiver_queue_depth(ReceiverQueue *queue);
extern size_t receiver_queue_bytes(ReceiverQueue *queue);

/*
 * To wait: say how many events are worth waking up for, and poll the descriptor.
 * False: there are as many already.
 */
extern bool receiver_queue_prepare_wait(ReceiverQueue *queue, int enough);
extern int	receiver_queue_fd(const ReceiverQueue *queue);
extern void receiver_queue_end_wait(ReceiverQueue *queue);
extern void receiver_queue_wake(ReceiverQueue *queue);

/* Answer an event that the receiver refuses. */
extern void receiver_event_refuse(ReceiverEvent *event, ReceiverRefusal refusal);

#endif							/* RECEIVER_QUEUE_H */
