/*
 * outbox.h
 *		The worker's side of the queue (design: claim, send, settle).
 *
 * All functions need a transaction and SPI is handled inside.  They raise errors
 * as any SQL does; the caller decides what a failed transaction means.
 */
#ifndef SENTDM_OUTBOX_H
#define SENTDM_OUTBOX_H

#include "answer.h"
#include "datatype/timestamp.h"
#include "drain.h"
#include "utils/uuid.h"

/*
 * Memory for the messages in hand, requests and the longest answers to them: 15
 * requests at once to a thousand recipients, and 3 if they are on four channels.
 */
#define SENTDM_IN_HAND_BYTES ((size_t) 16 * 1024 * 1024)

/* A place in a lane. */
typedef struct SentdmPlace
{
	TimestampTz due_at;
	int64		position;		/* of those that are due at the same time */
} SentdmPlace;

/* A claimed row of the outbox, with what is needed to send it. */
typedef struct SentdmMessage
{
	pg_uuid_t	id;
	int			part;			/* 0, or a part of a request that was split */
	int			generation;
	SentdmLane	lane;
	int			recipients;
	int			copies;			/* recipients times channels: ids in the
								 * answer */
	int			attempts;		/* charged before this claim */
	int			crashes;
	SentdmPlace place;
	TimestampTz claimed_at;
	TimestampTz expires_at;		/* DT_NOEND: never */
	TimestampTz ambiguous_since;	/* before this claim; 0: not ambiguous */
	TimestampTz first_tried_at; /* 0: this is the first attempt */
	int64		access_hash;	/* flight.c: what the request was made with */
	int			era;			/* flight.c: the drain's when it was started */
	char	   *body;			/* UTF-8 JSON, freed when it is not needed any
								 * more */
	size_t		answer_bytes;	/* of the longest answer that makes sense */
	size_t		bytes;			/* what it takes of SENTDM_IN_HAND_BYTES */
	bool		left_out;		/* there was no room for its body: to be given
								 * back */
	char		profile_id[40]; /* or "" */
	int64_t		taken_us;		/* flight.c: when it was claimed; monotonic */
	struct SentdmMessage *next; /* flight.c: of its lane, claimed after it */
} SentdmMessage;

/* What became of a claimed message; kept until it is settled. */
typedef struct SentdmOutcome
{
	SentdmMessage *message;
	SentdmDecision decision;
	int			http_status;
	SentdmAnswer answer;		/* ids, error and request id, as far as there
								 * are any */
} SentdmOutcome;

/*
 * Give back what a dead worker had claimed.  Exact, because the caller holds the
 * drainer's lock: whatever is claimed now belongs to nobody.  Returns how many;
 * suspects: how many of them were in a worker's hands when it died before.
 */
extern int64 sentdm_outbox_rescue(int64 *suspects);

/* The same for a worker that ends in order: it was not their fault. */
extern void sentdm_outbox_abandon(void);

/*
 * Claim up to limit due messages of a lane, in its order and not before a place;
 * sandbox_only skips live ones.  Those for which *room does not suffice (bytes; it
 * is lowered by what the others take) are left out, which nobody can know before.
 * Memory comes from the caller's context.  The claim counts only once the
 * transaction is committed, durably.
 */
extern int	sentdm_outbox_claim(SentdmLane lane, const SentdmPlace *from, int limit, bool sandbox_only,
								size_t *room, MemoryContext memory, SentdmMessage **messages);

/* Store the outcomes; repeating it with the same outcomes changes nothing more. */
extern void sentdm_outbox_settle(SentdmOutcome *outcomes, int n);

/*
 * When the next unclaimed message of a lane is due, not before a place; DT_NOEND
 * when there is none.
 */
extern TimestampTz sentdm_outbox_next_due(SentdmLane lane, const SentdmPlace *from, bool sandbox_only);

#endif							/* SENTDM_OUTBOX_H */
