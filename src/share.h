/*
 * share.h
 *		What the workers that use one API key share: its rates, its pause, and who
 *		may try whether it is good.
 */
#ifndef SENTDM_SHARE_H
#define SENTDM_SHARE_H

#include "drain.h"
#include "storage/lwlock.h"

/* A pause that an answer made, for the whole account. */
typedef struct SentdmNews
{
	SentdmPause pause;			/* NONE: a good answer ended it */
	int64_t		probe_at_us;	/* monotonic; INT64_MAX: only after a person
								 * acted */
} SentdmNews;

/* For shmem.c: the size, and to be called once when shared memory is made. */
extern size_t sentdm_share_size(void);
extern void sentdm_share_startup(void *memory, LWLock *lock, bool found);

/*
 * This worker uses a key and a URL with this hash from now on; rates: what to
 * begin with if nobody else does.  Returns a number by which others can name it.
 */
extern int	sentdm_share_attach(uint64_t access_hash, const SentdmRates *rates);

/* Around each call that looks at the rates or changes them; no error in between. */
extern void sentdm_share_lock(SentdmRates *rates);
extern void sentdm_share_unlock(const SentdmRates *rates);

/*
 * A request with this hash is made by somebody who is no worker: count it, if any
 * worker has used the hash.
 */
extern void sentdm_share_spend(uint64_t access_hash, const SentdmDrainSettings *settings,
							   int64_t now_us);

/*
 * While it is not known whether the key is good, only one worker may have a
 * request out: ten that are refused would lock the account.  Is it, or could it be,
 * this one?  If not, its latch will be set.  And: let it be this one.
 */
extern bool sentdm_share_is_free(void);
extern bool sentdm_share_take(void);

/* This worker has no request out (any more). */
extern void sentdm_share_rest(void);

/* Is the key known to be good? */
extern bool sentdm_share_is_proven(void);

/* Tell the others: an answer was good; an answer paused the account. */
extern void sentdm_share_prove(void);
extern void sentdm_share_pause(SentdmPause pause, int64_t probe_at_us);

/* What others told since the last call; false: nothing. */
extern bool sentdm_share_news(SentdmNews *news);

/* Somebody resumed: a worker that starts shall not take over the pause. */
extern void sentdm_share_forget_pause(int number);

#endif							/* SENTDM_SHARE_H */
