/*
 * flight.h
 *		The messages in a worker's hands: claimed and ready to start, under way, or
 *		with an outcome that is not stored yet.
 */
#ifndef SENTDM_FLIGHT_H
#define SENTDM_FLIGHT_H

#include "credentials.h"
#include "drain.h"
#include "http_thread.h"
#include "outbox.h"
#include "shmem.h"

typedef struct SentdmFlight
{
	MemoryContext memory;		/* of messages and outcomes */
	SentdmHttpThread *http;
	SentdmDrain drain;
	SentdmSlot *slot;
	SentdmWorkerReport report;
	char		api_key[SENTDM_MAX_KEY];
	int64		access_hash;	/* of the key, URL and CA file that requests
								 * now use */
	SentdmMessage *first_ready[SENTDM_LANES];	/* claimed, not started */
	SentdmMessage *last_ready[SENTDM_LANES];
	int			n_ready[SENTDM_LANES];
	int			under_way;
	size_t		bytes;			/* of those ready and under way, answers
								 * included */
	SentdmOutcome *outcomes;	/* not stored yet */
	int			n_outcomes;
	int			max_outcomes;
	int			n_sent;			/* recipients in them */
	int64_t		ended_us;		/* when the first of them ended; monotonic */
	SentdmPause new_pause;		/* made by an answer, not stored yet */
	int64_t		probe_after_ms; /* with it */
	int64		paused_hash;	/* with it: access_hash of the request that
								 * failed */
	bool		unpause;		/* a probe went well, not stored yet */
	int			suspects;		/* messages that were in hand when a worker
								 * died twice */
} SentdmFlight;

/*
 * Take a message that was claimed durably, to be started in its turn.  It is
 * copied.
 */
extern void sentdm_flight_take(SentdmFlight *flight, const SentdmMessage *message);

/*
 * POST as many of those ready as may start now, the lanes in their order, except
 * what must not be sent any more: that gets an outcome.
 */
extern void sentdm_flight_start(SentdmFlight *flight);

/* How many are ready, of this lane and those before it. */
extern int	sentdm_flight_ready(const SentdmFlight *flight, SentdmLane lane);

/* When the one that has waited longest was claimed (monotonic); INT64_MAX: none. */
extern int64_t sentdm_flight_ready_since_us(const SentdmFlight *flight);

/* Give back what is ready: each gets an outcome that says so. */
extern void sentdm_flight_release(SentdmFlight *flight);

/* Turn the answers that have come in into outcomes. */
extern void sentdm_flight_collect(SentdmFlight *flight);

/* The outcomes are stored, or the last one of them is: forget them, or it. */
extern void sentdm_flight_settled(SentdmFlight *flight);
extern void sentdm_flight_settled_last(SentdmFlight *flight);

#endif							/* SENTDM_FLIGHT_H */
