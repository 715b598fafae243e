/*
 * payload.h
 *		The bytes of a webhook, as jsonb if they can be.
 */
#ifndef SENTDM_PAYLOAD_H
#define SENTDM_PAYLOAD_H

#include "utils/jsonb.h"

/*
 * Parse a payload, which has to be an object; or return NULL, and a fixed text
 * that says why it can only be kept as bytes.  Leaves a multiple of the payload
 * behind in the current memory context.
 */
extern Jsonb *sentdm_payload_parse(const char *payload, size_t length, const char **reason);

#endif							/* SENTDM_PAYLOAD_H */
