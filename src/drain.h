/*
 * drain.h
 *		The decisions of the drainer as a state machine: how many requests may
 *		start now, and what follows from the outcome of one.
 *
 * Pure: no PostgreSQL, no libcurl, no clock; times are arguments.  Monotonic
 * microseconds (now_us) drive everything that lives in memory, ages in
 * milliseconds describe what is stored in rows.  worker.c carries the decisions
 * out; test/sim drives the same code against a model of Sent.
 */
#ifndef SENTDM_DRAIN_H
#define SENTDM_DRAIN_H

#include "request.h"

/* Priorities in the order in which they are served. */
typedef enum SentdmLane
{
	SENTDM_HIGH,
	SENTDM_NORMAL,
	SENTDM_BULK
} SentdmLane;

#define SENTDM_LANES 3

/* So many times may the worker die with a message in hand before it gives up on it. */
#define SENTDM_MAX_CRASHES 3

typedef struct SentdmRate
{
	int64_t		amount;			/* at most so many ... */
	int64_t		window_us;		/* ... in every window of this length; 0: no
								 * limit */
} SentdmRate;

typedef struct SentdmDrainSettings
{
	int			max_in_flight;
	SentdmRate	requests;
	SentdmRate	messages;		/* recipients */
	int64_t		retry_min_ms;
	int64_t		retry_max_ms;
	int64_t		give_up_after_ms;
	int64_t		uncertain_after_ms;
} SentdmDrainSettings;

/* A token bucket; drain.c says what it promises.  May be in debt. */
typedef struct SentdmBucket
{
	double		tokens;
	int64_t		refilled_us;
	int64_t		emptied_us;		/* when it began to fill, from nothing */
} SentdmBucket;

/* How often something happened lately: in a stretch of time, and the one before. */
typedef struct SentdmTally
{
	int64_t		epoch;			/* the stretch, numbered */
	int			counts[2];		/* in it, and before it */
} SentdmTally;

/*
 * What is left of the account's rates.  All drainers that use one API key share
 * it: whoever holds them apart copies it in before a call and out after it.
 */
typedef struct SentdmRates
{
	SentdmBucket requests;
	SentdmBucket messages;
	double		slowdown;		/* 1: full rate; less after a 429, recovering */
	int64_t		slowed_us;		/* when slowdown was changed last */
	int64_t		limited_until_us;	/* by a 429; 0: not */
} SentdmRates;

/*
 * All that the drainer remembers between two decisions; plain data, copyable.
 *
 * pause is for the caller to read: it goes back to NONE when a probe was
 * answered well, and what was stored about the pause is then to be cleared.
 */
typedef struct SentdmDrain
{
	SentdmDrainSettings settings;
	SentdmRates rates;
	int			in_flight;
	int			older;			/* of these, started before the last good
								 * answer, the last opening of the breaker or
								 * the last pause */
	int			era;			/* pauses and resumptions so far: what was
								 * started before the last of them says
								 * nothing about the account any more */
	int			window;			/* requests in flight that the API has earned
								 * so far */
	bool		proven;			/* a good answer came since the start, idling
								 * or opening */
	SentdmTally starts;			/* of requests */
	SentdmTally ends;
	int64_t		heard_us;		/* when the last request came to an end */
	int			failures;		/* answers in a row that say the API is unwell */
	bool		probing;		/* one request at a time, until one is
								 * answered well */
	int64_t		blocked_until_us;	/* breaker or rate limit; 0: open */
	SentdmPause pause;
	int64_t		probe_at_us;	/* when a pause lets one request try;
								 * INT64_MAX: never */
	bool		doubted;		/* the account was paused by an answer, and no
								 * good one came since */
	bool		unauthorized;	/* the last answer that tells was a 401 */
	uint64_t	random;			/* state of the generator for jitter */
} SentdmDrain;

/*
 * What is known of a message, leaving out the attempt in hand: ambiguous_ms is
 * about earlier attempts only, also after the row was marked for this one.
 * Ages are as of the call.  era is about the attempt in hand: the drain's, when it
 * was started.
 */
typedef struct SentdmAttempt
{
	int			recipients;
	int			attempts;		/* earlier ones that Sent may have looked at */
	int			crashes;		/* earlier ones during which the worker died */
	int64_t		tried_ms;		/* since the first attempt; -1: this is the
								 * first */
	int64_t		ambiguous_ms;	/* since the first attempt with unknown
								 * outcome; -1: none */
	int64_t		expires_ms;		/* until it expires; INT64_MAX: never */
	int			era;
} SentdmAttempt;

typedef enum SentdmAction
{
	SENTDM_DO_SEND,				/* only from sentdm_drain_admit */
	SENTDM_DO_ACCEPT,
	SENTDM_DO_RETRY,			/* back into the queue, due in delay_ms */
	SENTDM_DO_RELEASE,			/* back into the queue as it was: claimed
								 * ahead, and its turn did not come; not from
								 * drain.c */
	SENTDM_DO_SPLIT,			/* two halves, each under a new key, due at
								 * once */
	SENTDM_DO_FAIL,
	SENTDM_DO_EXPIRE,
	SENTDM_DO_UNCERTAIN
} SentdmAction;

typedef struct SentdmDecision
{
	SentdmAction action;
	int64_t		delay_ms;		/* with RETRY */
	bool		charged;		/* counts as an attempt */
	bool		ambiguous;		/* Sent may have accepted this attempt, or an
								 * earlier one */
	SentdmPause pause;			/* NONE, or: the queue has just been paused
								 * for this */
	int64_t		probe_after_ms; /* with pause; -1: only after a person acted */
	const char *error_code;		/* static text of our own; NULL: take the
								 * API's */
} SentdmDecision;

/*
 * Start with empty buckets, a small window and no pause.  Empty, because nobody
 * knows what the worker before used up: so the limit holds over any number of
 * restarts, and the first request waits for its token (window / amount).
 */
extern void sentdm_drain_init(SentdmDrain *drain, const SentdmDrainSettings *settings,
							  int64_t now_us, uint64_t seed);

/* Take over changed settings without forgetting what was used already. */
extern void sentdm_drain_configure(SentdmDrain *drain, const SentdmDrainSettings *settings,
								   int64_t now_us);

/*
 * How many requests of this lane may be started now.  Counts what was started:
 * start them before asking again.
 */
extern int	sentdm_drain_quota(SentdmDrain *drain, SentdmLane lane, int64_t now_us);

/*
 * How many messages of this lane to claim now: those that may start, and, while
 * answers come quickly, some ahead of their turn.  ready: how many are claimed
 * and not started, of this lane and those before it.
 */
extern int	sentdm_drain_claimable(SentdmDrain *drain, SentdmLane lane, int ready,
								   int64_t now_us);

/*
 * When sentdm_drain_quota may give more for this lane although nothing comes
 * back and nobody acts; INT64_MAX: never.
 */
extern int64_t sentdm_drain_ready_us(const SentdmDrain *drain, SentdmLane lane, int64_t now_us);

/*
 * Before the POST: DO_SEND, or the end of a message that must not be sent any
 * more (expired, unknown for too long, given up, killed the worker too often).
 * Does not touch the state.
 */
extern SentdmDecision sentdm_drain_admit(const SentdmDrain *drain, const SentdmAttempt *attempt);

/* A request was started.  Every one of them has to be finished, too. */
extern void sentdm_drain_started(SentdmDrain *drain, int recipients, int64_t now_us);

/*
 * A request was started that is not a message's, and that nobody reports the end
 * of: it only counts for the rate.  More than a window's worth is never owed, as
 * Sent forgets what is older.
 */
extern void sentdm_drain_spend(SentdmDrain *drain, int64_t now_us);

/*
 * A request came to an end: what becomes of the message, and what the drainer
 * learns from it.  now_unix is wall clock seconds (for quotas only).
 */
extern SentdmDecision sentdm_drain_finished(SentdmDrain *drain, const SentdmAttempt *attempt,
											const SentdmReply *reply,
											int64_t now_us, int64_t now_unix);

/*
 * Hold everything; probe_after_ms as in SentdmDecision.  Used for what a person
 * paused and for a pause that an earlier worker left behind.
 */
extern void sentdm_drain_pause(SentdmDrain *drain, SentdmPause pause,
							   int64_t probe_after_ms, int64_t now_us);

/*
 * A person resumed, or the key changed: unless it was only a person's pause, one
 * request probes, then all go on.
 */
extern void sentdm_drain_resume(SentdmDrain *drain, int64_t now_us);

#endif							/* SENTDM_DRAIN_H */
