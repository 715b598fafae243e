/*
 * flight.h
 *		The messages in a worker's hands: claimed, under way, or with an outcome
 *		that is not stored yet.
 */
#ifndef SENTDM_FLIGHT_H
#define SENTDM_FLIGHT_H

#include "credentials.h"
#include "drain.h"
#include "http.h"
#include "outbox.h"
#include "shmem.h"

typedef struct SentdmFlight
{
	MemoryContext memory;		/* of messages and outcomes */
	SentdmHttp *http;
	SentdmDrain drain;
	SentdmSlot *slot;
	SentdmWorkerReport report;
	char		api_key[SENTDM_MAX_KEY];
	int64		access_hash;	/* of the key, URL and CA file that requests
								 * now use */
	int			under_way;
	SentdmOutcome *outcomes;	/* not stored yet */
	int			n_outcomes;
	int			max_outcomes;
	SentdmPause new_pause;		/* made by an answer, not stored yet */
	int64_t		probe_after_ms; /* with it */
	int64		paused_hash;	/* with it: access_hash of the request that
								 * failed */
	bool		unpause;		/* a probe went well, not stored yet */
	int			suspects;		/* messages that were in hand when a worker
								 * died twice */
} SentdmFlight;

/*
 * Decide on a message that was claimed durably, and POST it unless it must not
 * be.  The message is copied.
 */
extern void sentdm_flight_submit(SentdmFlight *flight, const SentdmMessage *message);

/* Turn the answers that have come in into outcomes. */
extern void sentdm_flight_collect(SentdmFlight *flight);

/* The outcomes are stored: forget them. */
extern void sentdm_flight_settled(SentdmFlight *flight);

#endif							/* SENTDM_FLIGHT_H */
