/*
 * message.h
 *		From what a caller says to the request that is POSTed.
 */
#ifndef SENTDM_MESSAGE_H
#define SENTDM_MESSAGE_H

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* One API request takes so many recipients (wire contract, section 2.1). */
#define SENTDM_MAX_RECIPIENTS 1000

/* The arguments of sentdm_send(); strings are in the database encoding. */
typedef struct SentdmDraft
{
	bool		plural;			/* given as "recipients" */
	bool		null_recipient; /* NULL, or an array with a NULL in it */
	int			n_recipients;
	char	  **recipients;		/* each one once, after the check */
	char	   *template_name;	/* a name, or an id when it is a UUID */
	Jsonb	   *parameters;
	char	   *body;
	bool		null_channel;	/* an array with a NULL in it */
	int			n_channels;
	char	  **channels;
	TimestampTz send_at;		/* 0: now */
	TimestampTz expires_at;		/* DT_NOEND: never */
	char	   *priority;		/* NULL: normal */
	char	   *unique_key;
	char	   *tag;
	pg_uuid_t  *profile_id;
	bool		sandbox;
	Jsonb	   *extra;
	int			opted_out;		/* so many were left out because they opted
								 * out */
} SentdmDraft;

/* What is wrong with it; texts name the argument, never its value. */
typedef struct SentdmComplaint
{
	int			sqlstate;
	char	   *message;
	const char *hint;
} SentdmComplaint;

/* Is it a number as the API takes it: a plus sign and 7 to 15 digits? */
extern bool sentdm_is_e164(const char *number);

extern void sentdm_draft_init(SentdmDraft *draft);

/*
 * Check everything that can be checked before anything is stored, and drop
 * recipients that are named twice.  False fills the complaint.
 */
extern bool sentdm_draft_check(SentdmDraft *draft, TimestampTz now, SentdmComplaint *complaint);

/*
 * The request for some of the recipients.  NULL fills the complaint: too large,
 * or text that has no UTF-8 form.
 */
extern Jsonb *sentdm_draft_request(const SentdmDraft *draft, int first, int count,
								   SentdmComplaint *complaint);

#endif							/* SENTDM_MESSAGE_H */
