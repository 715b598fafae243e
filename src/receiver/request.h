/*
 * request.h
 *		One HTTP request to the listener, from its first line to its answer.
 */
#ifndef RECEIVER_REQUEST_H
#define RECEIVER_REQUEST_H

#include <microhttpd.h>

#include "config.h"
#include "connection.h"
#include "queue.h"

#define RECEIVER_REQUEST_ID_LENGTH 128

typedef struct ReceiverRequest
{
	ReceiverEvent event;		/* first, so that a pointer to it is one to us */
	struct MHD_Connection *http;
	ReceiverConnection *connection;
	int64_t		start_us;
	char		id[RECEIVER_REQUEST_ID_LENGTH + 1];
	ReceiverAddress client;
	bool		counted;		/* against the limit of requests from the client */
	const char *method;			/* a word of ours */
	const char *path;			/* a word of ours or of the configuration */
	bool		examined;
	bool		waiting;		/* for the database */
	int			status;			/* of the answer; 0: none yet */
	size_t		content_length;
	size_t		received;		/* bytes of the body, also those thrown away */
	size_t		reserved;		/* bytes of memory for the body */
} ReceiverRequest;

/* NULL: out of memory. */
extern ReceiverRequest *receiver_request_create(struct MHD_Connection *http,
												ReceiverConnection *connection);
extern void receiver_request_free(ReceiverRequest *request, ReceiverQueue *queue);

/* Read line and headers; what is wrong with them is kept in event.refusal. */
extern void receiver_request_examine(ReceiverRequest *request, const ReceiverConfig *config,
									 const char *method, const char *path);

/* Must the body be thrown away unseen, and the answer be given first? */
extern bool receiver_request_is_hopeless(const ReceiverRequest *request);

/* A part of the body. */
extern void receiver_request_add_body(ReceiverRequest *request, ReceiverQueue *queue,
									  const char *data, size_t length);

/* Answer it; stopping: and close the connection. */
extern enum MHD_Result receiver_request_answer(ReceiverRequest *request, bool stopping);

/* Count it, and write the access line. */
extern void receiver_request_account(const ReceiverRequest *request, bool log);

#endif							/* RECEIVER_REQUEST_H */
