/*
 * share.c
 *		What the workers that use one API key share.
 *
 * Sent knows nothing of databases: its limits, its 429 and its lock after ten
 * refused keys are about the key.  So there is one entry per key and URL, found by
 * their hash, which outlives its workers: what was used up is not forgotten when
 * one leaves.  Nothing here raises an error while the lock is held, knows SQL or
 * the network, or decides: the decisions are drain.c's.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"

#include "compat.h"
#include "share.h"
#include "shmem.h"

#define NOBODY (-1)

typedef struct Share
{
	uint64		access_hash;	/* of key, URL and CA file; 0: free */
	uint64		used;			/* when it was attached to last, as a number */
	SentdmRates rates;
	int			prober;			/* proc number of the worker that tries
								 * whether the key is good */
	bool		awaited;		/* somebody waits for that */
	bool		proven;			/* the last answer that tells was good */
	SentdmNews	news;
	uint32		news_number;	/* of the news, to tell new from old */
} Share;

/* A worker that is attached. */
typedef struct Member
{
	int			proc;			/* NOBODY: free */
	int			share;
} Member;

typedef struct Shares
{
	uint64		uses;
	Share		shares[SENTDM_MAX_DATABASES];
	Member		members[SENTDM_MAX_DATABASES];
} Shares;

static Shares *all = NULL;
static LWLock *lock = NULL;

/* Of this worker. */
static Share *mine = NULL;
static Member *membership = NULL;
static uint32 news_seen;

size_t
sentdm_share_size(void)
{
	return MAXALIGN(sizeof(Shares));
}

void
sentdm_share_startup(void *memory, LWLock *its_lock, bool found)
{
	all = memory;
	lock = its_lock;
	if (found)
		return;
	memset(all, 0, sizeof(Shares));
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
		all->members[i].proc = all->shares[i].prober = NOBODY;
}

/* The others of this account have something to look at; the lock is held. */
static void
wake_others(void)
{
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		Member	   *member = &all->members[i];

		if (member->proc != NOBODY && member != membership && &all->shares[member->share] == mine)
			SetLatch(&ProcGlobal->allProcs[member->proc].procLatch);
	}
}

/* This worker's trial is over, if it had one; the lock is held. */
static void
let_go(void)
{
	if (mine->prober == sentdm_proc_number())
		mine->prober = NOBODY;
	if (mine->awaited)
	{
		mine->awaited = false;
		wake_others();
	}
}

static void
detach(int code, Datum arg)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	let_go();
	membership->proc = NOBODY;
	LWLockRelease(lock);
}

static bool
has_members(const Share *share)
{
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		if (all->members[i].proc != NOBODY && &all->shares[all->members[i].share] == share)
			return true;
	}
	return false;
}

/* The one with this hash, or the one that nobody has used for the longest time. */
static Share *
find_share(uint64 access_hash)
{
	Share	   *oldest = NULL;

	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		Share	   *share = &all->shares[i];

		if (share->access_hash == access_hash)
			return share;
		if (!has_members(share) && (oldest == NULL || share->used < oldest->used))
			oldest = share;
	}
	return oldest;
}

/* There are as many places as databases, so one is free. */
static Member *
find_place(void)
{
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		if (all->members[i].proc == NOBODY)
			return &all->members[i];
	}
	return NULL;
}

static void
start_afresh(Share *share, uint64 access_hash, const SentdmRates *rates)
{
	memset(share, 0, sizeof(*share));
	share->access_hash = access_hash;
	share->rates = *rates;
	share->prober = NOBODY;
	share->news.pause = SENTDM_PAUSE_NONE;
}

int
sentdm_share_attach(uint64_t access_hash, const SentdmRates *rates)
{
	Share	   *share;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (mine != NULL)
		let_go();
	if (membership == NULL && (membership = find_place()) != NULL)
	{
		before_shmem_exit(detach, (Datum) 0);
		membership->proc = sentdm_proc_number();
		membership->share = 0;
	}
	if (membership == NULL)
	{
		LWLockRelease(lock);
		elog(ERROR, "too many sentdm workers");
	}
	share = find_share(access_hash);
	if (share->access_hash != access_hash)
		start_afresh(share, access_hash, rates);
	share->used = ++all->uses;
	if (share != mine)
	{
		mine = share;
		membership->share = (int) (share - all->shares);
		/* Only a pause is news to who comes later. */
		news_seen = share->news.pause == SENTDM_PAUSE_NONE ? share->news_number : share->news_number - 1;
	}
	LWLockRelease(lock);
	return membership->share;
}

void
sentdm_share_lock(SentdmRates *rates)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	*rates = mine->rates;
}

void
sentdm_share_unlock(const SentdmRates *rates)
{
	bool		limited = rates->limited_until_us != mine->rates.limited_until_us;

	mine->rates = *rates;
	if (limited)
		wake_others();
	LWLockRelease(lock);
}

void
sentdm_share_spend(uint64_t access_hash, const SentdmDrainSettings *settings, int64_t now_us)
{
	SentdmDrain drain;

	if (all == NULL)
		return;
	memset(&drain, 0, sizeof(drain));
	drain.settings = *settings;
	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < SENTDM_MAX_DATABASES; i++)
	{
		if (all->shares[i].access_hash != access_hash)
			continue;
		drain.rates = all->shares[i].rates;
		sentdm_drain_spend(&drain, now_us);
		all->shares[i].rates = drain.rates;
	}
	LWLockRelease(lock);
}

static bool
is_free(void)
{
	return mine->proven || mine->prober == NOBODY || mine->prober == sentdm_proc_number();
}

bool
sentdm_share_is_free(void)
{
	bool		is;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	is = is_free();
	if (!is)
		mine->awaited = true;
	LWLockRelease(lock);
	return is;
}

bool
sentdm_share_take(void)
{
	bool		taken;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	taken = is_free();
	if (!mine->proven && taken)
		mine->prober = sentdm_proc_number();
	LWLockRelease(lock);
	return taken;
}

void
sentdm_share_rest(void)
{
	/* Nobody else makes this worker the prober. */
	if (mine->prober != sentdm_proc_number())
		return;
	LWLockAcquire(lock, LW_EXCLUSIVE);
	let_go();
	LWLockRelease(lock);
}

bool
sentdm_share_is_proven(void)
{
	return mine->proven;
}

static void
tell(SentdmPause pause, int64_t probe_at_us)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (pause == SENTDM_PAUSE_NONE)
		let_go();
	mine->proven = pause == SENTDM_PAUSE_NONE;
	mine->news.pause = pause;
	mine->news.probe_at_us = probe_at_us;
	/* Told by this worker, so no news to it. */
	news_seen = ++mine->news_number;
	wake_others();
	LWLockRelease(lock);
}

void
sentdm_share_prove(void)
{
	/* After a pause that this worker has not heard of it proves nothing. */
	if (!mine->proven && mine->news_number == news_seen)
		tell(SENTDM_PAUSE_NONE, INT64_MAX);
}

void
sentdm_share_pause(SentdmPause pause, int64_t probe_at_us)
{
	tell(pause, probe_at_us);
}

bool
sentdm_share_news(SentdmNews *news)
{
	bool		any;

	LWLockAcquire(lock, LW_SHARED);
	any = mine->news_number != news_seen;
	news_seen = mine->news_number;
	*news = mine->news;
	LWLockRelease(lock);
	return any;
}

void
sentdm_share_forget_pause(int number)
{
	if (all == NULL || number < 0)
		return;
	LWLockAcquire(lock, LW_EXCLUSIVE);
	all->shares[number].news.pause = SENTDM_PAUSE_NONE;
	LWLockRelease(lock);
}
