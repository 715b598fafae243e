/*
 * endpoint.h
 *		The webhooks that are registered here, as Sent serves them.
 */
#ifndef SENTDM_ENDPOINT_H
#define SENTDM_ENDPOINT_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* The one that is being looked at. */
typedef struct SentdmEndpoint
{
	pg_uuid_t	id;
	TimestampTz looked_at;
	TimestampTz backfill_from;
	bool		thorough;		/* it is, or was, in trouble: read its whole
								 * log */
	int			page;			/* of the log, to be read next */
	int			clean_pages;	/* in a row, of which nothing was missing */
} SentdmEndpoint;

/* What to ask Sent next. */
typedef enum SentdmEndpointNeed
{
	SENTDM_ENDPOINT_DONE,		/* nothing */
	SENTDM_ENDPOINT_ACTIVATION, /* to post to it again */
	SENTDM_ENDPOINT_EVENTS		/* a page of its log */
} SentdmEndpointNeed;

/* The functions need a transaction and an SPI connection. */

/*
 * Find the one that was not looked at for longest.  False: it is not its turn, and
 * due is lowered to when it will be.
 */
extern bool sentdm_endpoint_find(SentdmEndpoint *endpoint, TimestampTz now, TimestampTz *due);

/* It was looked at, and there was no answer of use. */
extern void sentdm_endpoint_checked(const SentdmEndpoint *endpoint);

/* Store what Sent says about it (NULL: does not know it), and warn if it must be. */
extern SentdmEndpointNeed sentdm_endpoint_store(SentdmEndpoint *endpoint, Jsonb *answer);

/* Sent posts to it again. */
extern void sentdm_endpoint_reactivated(const SentdmEndpoint *endpoint);

/* Record what is missing of a page of its log. */
extern SentdmEndpointNeed sentdm_endpoint_events(SentdmEndpoint *endpoint, Jsonb *answer);

#endif							/* SENTDM_ENDPOINT_H */
