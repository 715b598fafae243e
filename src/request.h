/*
 * request.h
 *		What an answer of the API means for the message that was POSTed.
 *
 * Pure: no PostgreSQL, no libcurl, no clock.  It is the error table of the
 * wire contract (section 6) and nothing else; what follows for the queue is
 * decided in drain.c.
 */
#ifndef SENTDM_REQUEST_H
#define SENTDM_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How far a request got. */
typedef enum SentdmTransport
{
	SENTDM_ANSWERED,			/* a complete HTTP answer was read */
	SENTDM_NOT_REACHED,			/* DNS, connect or TLS failed: nothing was
								 * sent */
	SENTDM_BAD_CERTIFICATE,		/* the peer is not who it should be: nothing
								 * was sent */
	SENTDM_TOO_LATE,			/* expired before the request left: nothing
								 * was sent */
	SENTDM_NO_ANSWER			/* sent, but no complete answer: outcome
								 * unknown */
} SentdmTransport;

/* An answer, reduced to what decides. */
typedef struct SentdmReply
{
	SentdmTransport transport;
	int			http_status;	/* 0 unless answered */
	bool		readable;		/* the body is the API's JSON envelope */
	bool		success;		/* ... and says success */
	char		error_code[40]; /* ... and its error.code, or "" */
	int64_t		retry_after_ms; /* Retry-After, relative to now; -1: absent or
								 * unusable */
} SentdmReply;

typedef enum SentdmVerdict
{
	SENTDM_ACCEPTED,
	SENTDM_RETRY,				/* again later, same key, same bytes */
	SENTDM_IN_FLIGHT,			/* 409: Sent works on this key right now */
	SENTDM_RATE_LIMITED,		/* the whole account has to wait */
	SENTDM_UNREACHED,			/* nothing left this machine */
	SENTDM_REFUSED,				/* this message will never be accepted */
	SENTDM_REFUSED_RECIPIENT,	/* the same, but one recipient alone may be
								 * the cause */
	SENTDM_ACCOUNT,				/* nothing will be accepted until a person
								 * acts: pause */
	SENTDM_EXPIRED				/* not sent, because it was too late */
} SentdmVerdict;

/* Why the queue is paused; the text form is sentdm.sender.pause_kind. */
typedef enum SentdmPause
{
	SENTDM_PAUSE_NONE,
	SENTDM_PAUSE_USER,			/* sentdm_pause() */
	SENTDM_PAUSE_CREDENTIALS,	/* no usable key, or 401 */
	SENTDM_PAUSE_FORBIDDEN,		/* 403: role, activation, KYC, channel */
	SENTDM_PAUSE_SUSPENDED,		/* 403: account suspended */
	SENTDM_PAUSE_BALANCE,		/* no credit */
	SENTDM_PAUSE_QUOTA,			/* the account's quota is used up */
	SENTDM_PAUSE_CERTIFICATE	/* TLS peer not trusted */
} SentdmPause;

typedef struct SentdmJudgement
{
	SentdmVerdict verdict;
	bool		ambiguous;		/* Sent may have accepted it all the same */
	SentdmPause pause;			/* with SENTDM_ACCOUNT: why */
	int64_t		probe_after_ms; /* with SENTDM_ACCOUNT: when one request may
								 * try by itself; -1: only after a person
								 * acted */
} SentdmJudgement;

/*
 * The table of the wire contract, section 6.  Unknown codes are judged by
 * their HTTP class.  now_unix (seconds) is needed for quotas that end with the
 * UTC day only.
 */
extern SentdmJudgement sentdm_judge(const SentdmReply *reply, int64_t now_unix);

/*
 * Milliseconds until Retry-After is over: integer or decimal seconds, or an
 * HTTP date relative to date_unix (the answer's own Date, so that a wrong local
 * clock does no harm; 0: unknown, dates are then unusable).  Negative and
 * absurd values (over a day) are -1, like no header at all.
 */
extern int64_t sentdm_retry_after_ms(const char *value, int64_t date_unix);

/* The text of a pause kind, and back; unknown text is SENTDM_PAUSE_USER. */
extern const char *sentdm_pause_name(SentdmPause pause);
extern SentdmPause sentdm_pause_from_name(const char *name);

#endif							/* SENTDM_REQUEST_H */
