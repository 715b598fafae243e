/*
 * event.h
 *		One webhook event, read from a payload of any generation (wire contract,
 *		8.1 and 8.6).
 *
 * Pure: no tables, no clock, no settings.  No function raises an error for what
 * a payload contains.
 */
#ifndef SENTDM_EVENT_H
#define SENTDM_EVENT_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* What an event says about whether somebody wants messages. */
typedef enum SentdmConsent
{
	SENTDM_CONSENT_UNKNOWN,
	SENTDM_OPTED_OUT,
	SENTDM_OPTED_IN
} SentdmConsent;

/* Strings are NULL when there is nothing; memory is the caller's. */
typedef struct SentdmEvent
{
	char	   *name;			/* "message.delivered" */
	bool		has_sent_id;
	pg_uuid_t	sent_id;		/* the message that it is about */
	TimestampTz occurred_at;	/* DT_NOBEGIN: unknown */
	char	   *identity;		/* signed words that tell it from other
								 * events; NULL: only its bytes do */

	/* What it says about a message of ours. */
	char	   *status;			/* lower case; NULL: it says nothing */
	char	   *recipient;
	char	   *channel;
	char	   *reason_code;
	char	   *reason;

	/* What it says about a person. */
	SentdmConsent consent;
	char	   *contact;		/* E.164, unless consent is unknown */
} SentdmEvent;

/*
 * Read an event.  envelope is NULL for one that is kept as bytes; unsigned_name
 * comes from a header that nobody signed (may be NULL), and names an event that
 * has no name of its own; now bounds the times that are believed.
 */
extern void sentdm_event_read(SentdmEvent *event, Jsonb *envelope,
							  const char *unsigned_name, TimestampTz now);

/* Parse a UUID in its canonical form, in any case. */
extern bool sentdm_uuid_parse(const char *text, size_t length, pg_uuid_t *uuid);

#endif							/* SENTDM_EVENT_H */
