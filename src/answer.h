/*
 * answer.h
 *		Reads the API's JSON answers (wire contract, sections 1 and 2.2).
 *
 * Never raises an error for bad input; fuzzed on its own.  Memory comes from
 * palloc (malloc in a frontend build).
 */
#ifndef SENTDM_ANSWER_H
#define SENTDM_ANSWER_H

#include "request.h"

/*
 * One recipient on one channel, as the API answered; strings are "" when absent.
 * An answer may have thousands, and waits to be stored, so there they are packed:
 * the id, and both strings with their ends.
 */
typedef struct SentdmSent
{
	const unsigned char *sent_id;	/* the API's message_id: the 16 bytes of a
									 * UUID */
	const char *recipient;
	const char *channel;
} SentdmSent;

typedef struct SentdmAnswer
{
	bool		readable;		/* it is an envelope: an object with "success" */
	bool		success;
	char		error_code[40];
	char	   *error;			/* error.message, at most 500 bytes, UTF-8; or
								 * NULL */
	char		request_id[80];
	int			n_sent;
	char	   *sent;			/* data.recipients, packed; or NULL */
	size_t		sent_bytes;
} SentdmAnswer;

/*
 * Parse an answer; the result is cleared first.  Recipients without a UUID as
 * their message_id are left out.
 */
extern void sentdm_answer_parse(const char *body, size_t length, SentdmAnswer *answer);

/* Unpack a recipient, which points into the answer; returns where the next one is. */
extern const char *sentdm_answer_sent(const char *packed, SentdmSent *sent);

#endif							/* SENTDM_ANSWER_H */
