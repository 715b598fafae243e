/*
 * refusal.h
 *		Why the receiver itself, and not the database, refuses a request.
 */
#ifndef RECEIVER_REFUSAL_H
#define RECEIVER_REFUSAL_H

#include <stdbool.h>

typedef enum ReceiverRefusal
{
	RECEIVER_NOT_REFUSED,
	/* The request is wrong. */
	RECEIVER_NOT_FOUND,
	RECEIVER_METHOD,
	RECEIVER_NO_LENGTH,
	RECEIVER_BODY_TOO_LARGE,
	RECEIVER_CONTENT_TYPE,
	RECEIVER_HEADERS_TOO_LARGE,
	RECEIVER_HEADER_NOT_UTF8,
	RECEIVER_HEADER_REPEATED,
	RECEIVER_NOT_STORABLE,
	RECEIVER_TOO_SLOW,
	RECEIVER_TOO_MANY,
	/* The request may be right, and is to be repeated later: 503. */
	RECEIVER_QUEUE_FULL,
	RECEIVER_NO_MEMORY,
	RECEIVER_STOPPING,
	RECEIVER_DATABASE_DOWN,
	RECEIVER_DATABASE_ERROR,
	RECEIVER_DATABASE_SLOW,
	RECEIVER_OUTCOME_UNKNOWN,
	RECEIVER_REFUSALS
} ReceiverRefusal;

extern int	receiver_refusal_status(ReceiverRefusal refusal);

/* A word, for metrics. */
extern const char *receiver_refusal_label(ReceiverRefusal refusal);

/* A few words, for whoever reads the answer. */
extern const char *receiver_refusal_text(ReceiverRefusal refusal);

#endif							/* RECEIVER_REFUSAL_H */
