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

/* One recipient on one channel, as the API answered; strings are "" when absent. */
typedef struct SentdmSent
{
	char		sent_id[40];	/* the API's message_id, textual UUID */
	char		recipient[24];
	char		channel[24];
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
	SentdmSent *sent;			/* data.recipients, or NULL */
} SentdmAnswer;

/*
 * Parse an answer; the result is cleared first.  Recipients without a UUID as
 * their message_id are left out.
 */
extern void sentdm_answer_parse(const char *body, size_t length, SentdmAnswer *answer);

#endif							/* SENTDM_ANSWER_H */
