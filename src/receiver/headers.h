/*
 * headers.h
 *		The headers of a webhook as a JSON object.
 */
#ifndef RECEIVER_HEADERS_H
#define RECEIVER_HEADERS_H

#include "queue.h"

#define RECEIVER_MAX_HEADERS 32 /* that go to the database */

typedef struct ReceiverHeaders
{
	char	   *json;			/* malloc'ed; the caller's after receiver_headers_end() */
	size_t		length;
	size_t		capacity;
	int			count;
	const char *names[RECEIVER_MAX_HEADERS];	/* must live until the end */
	size_t		name_lengths[RECEIVER_MAX_HEADERS];
	ReceiverRefusal refusal;	/* the first thing that was wrong */
} ReceiverHeaders;

extern void receiver_headers_begin(ReceiverHeaders *headers);

/* Add a header, if it is one that concerns the database. */
extern void receiver_headers_add(ReceiverHeaders *headers, const char *name, size_t name_length,
								 const char *value, size_t value_length);

/* The result; on a refusal nothing is left to free. */
extern ReceiverRefusal receiver_headers_end(ReceiverHeaders *headers);

#endif							/* RECEIVER_HEADERS_H */
