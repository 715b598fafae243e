/*
 * queue.h
 *		The worker's transactions with the queue: what ended is settled, what comes
 *		next is claimed.
 */
#ifndef SENTDM_QUEUE_H
#define SENTDM_QUEUE_H

#include "account.h"
#include "flight.h"
#include "transact.h"

#define SENTDM_LONGEST_WAIT_MS 60000	/* the clock may have been set forward */

typedef struct SentdmQueue
{
	SentdmFlight *flight;
	SentdmAccount *account;
	Oid			extension;		/* as it was at the start */
	bool		gone;			/* it is not that any more */
	SentdmBackoff backoff;
	TimestampTz due[SENTDM_LANES];	/* look no earlier than this; DT_NOBEGIN:
									 * now */
	SentdmPlace from[SENTDM_LANES]; /* and not before this place, see queue.c */
	SentdmPlace reached[SENTDM_LANES];	/* where it was before looking back */
	int64_t		look_back_us;	/* when to look from the beginning; monotonic;
								 * INT64_MAX: no need to */
	int64_t		look_cost_us;	/* what it cost the last time */
	MemoryContext memory;		/* of the transaction under way: what it
								 * claims ... */
	SentdmMessage **claimed;	/* ... is here */
	int			n_claimed;
	int			room;			/* for so many */
	size_t		room_bytes;		/* for what they take in memory */
	size_t		message_bytes;	/* what one of the last claim takes, on
								 * average */
} SentdmQueue;

/* This worker is the sender now: put the queue into order. */
extern void sentdm_queue_take_over(SentdmQueue *queue);

/*
 * Something was committed that is due no earlier than this (DT_NOBEGIN: whenever):
 * look at every lane.
 */
extern void sentdm_queue_look(SentdmQueue *queue, TimestampTz earliest);

/*
 * Settle what ended, if it is time to, and claim, if that is allowed and there
 * is room: in one transaction, whose end waits for the disk when something was
 * claimed.  Memory comes from the caller's context.  False: it failed; what
 * ended is kept, nothing was claimed, and queue->backoff says when to try again.
 * Or the extension is gone.
 */
extern bool sentdm_queue_exchange(SentdmQueue *queue, bool may_claim);

/* Settle everything now, whether it is time to or not. */
extern void sentdm_queue_settle(SentdmQueue *queue);

/*
 * As the last thing of a worker that ends in order, when nothing is under way any
 * more: what had no answer is left for the next worker, not as that of one that
 * died.
 */
extern void sentdm_queue_abandon(SentdmQueue *queue);

/* Has something ended that is not stored yet? */
extern bool sentdm_queue_is_unsettled(const SentdmQueue *queue);

/*
 * When the next message is due, DT_NOEND: none; DT_NOBEGIN while that is not quite
 * certain.  hurry: make certain at the next exchange.
 */
extern TimestampTz sentdm_queue_next_due(SentdmQueue *queue, bool hurry);

/* How long nothing will happen in it that nobody wakes us for. */
extern long sentdm_queue_wait_ms(const SentdmQueue *queue, bool may_claim);

/* Milliseconds from now, the longest wait at most. */
extern long sentdm_ms_until(TimestampTz when);
extern long sentdm_ms_until_us(int64_t when_us);

#endif							/* SENTDM_QUEUE_H */
