/*
 * drain.c
 *		The decisions of the drainer: how many requests may start now, and what
 *		follows from the outcome of one.
 *
 * Four things hold requests back, each in its own section: the token buckets
 * (the rate), the window (requests in flight), the circuit breaker (the API is
 * unwell) and the pause (a person has to act).  The last section decides about
 * one message.  It must never look at a clock, allocate or wait.  What shaped
 * it: it has to be right in situations that no test on a real server produces
 * often enough, so the simulator runs this very file.
 */
#include "drain.h"

#define MS_US				INT64_C(1000)
#define SECOND_US			INT64_C(1000000)
#define SECOND_MS			INT64_C(1000)
#define HOUR_MS				INT64_C(3600000)

#define MAX_RECIPIENTS		1000	/* of one request, by the contract */

#define FIRST_WINDOW		4	/* requests in flight after idling or a fault */
#define IDLE_US				(10 * SECOND_US)	/* as long without requests is
												 * idling */

#define EPOCH_US			(3 * SECOND_US) /* a request is slow after one or
											 * two of them */
#define PACE_US				(100 * MS_US)	/* ends in one or two of them are
											 * the pace */
#define MIN_AHEAD			256 /* claimed ahead at most, if more than may be
								 * in flight */

#define FAILURES_TO_OPEN	5	/* in a row */
#define BREAKER_MIN_MS		SECOND_MS
#define BREAKER_MAX_MS		(60 * SECOND_MS)

#define MIN_SLOWDOWN		(1.0 / 16)
#define RECOVERY_US			(300 * SECOND_US)	/* from a standstill to the
												 * full rate */

static int64_t
min64(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t
max64(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

/* A number from low to high, both included (splitmix64). */
static int64_t
uniform(SentdmDrain *drain, int64_t low, int64_t high)
{
	uint64_t	z;

	drain->random += UINT64_C(0x9e3779b97f4a7c15);
	z = drain->random;
	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	z ^= z >> 31;
	if (high <= low)
		return low;
	return low + (int64_t) (z % ((uint64_t) (high - low) + 1));
}

static void
halve_window(SentdmDrain *drain)
{
	drain->window = (int) max64(drain->window / 2,
								min64(drain->window, FIRST_WINDOW));
}

/*
 * The rate.
 *
 * A bucket of capacity B that gains r tokens per microsecond lets at most
 * B + r * W of them through in any window of length W, wherever it begins.  B
 * is a tenth of the amount, and r makes the sum less than amount + 1; tokens
 * are spent whole, so no window ever sees more than amount.  W is taken a
 * little longer than it is: the API counts requests when they arrive, and two
 * that left a whole window apart may arrive closer together.
 *
 * A request with n recipients spends n tokens at once, and n is known only
 * after it was claimed.  So one may go while the bucket holds half of its
 * capacity, and may leave a debt that has to be earned back first.  Requests of
 * up to half the capacity (a twentieth of the amount) make no debt and the
 * promise above holds as it stands; a bigger one may put a window that ends
 * with it over the limit, by at most n - B / 2, and the windows that begin with
 * it let through that much less.  Were it to wait for a bucket that covers it,
 * it would wait forever.
 */

static bool
is_limited(const SentdmRate *rate)
{
	return rate->amount > 0 && rate->window_us > 0;
}

static double
capacity(const SentdmRate *rate)
{
	return rate->amount < 10 ? 1.0 : (double) rate->amount / 10;
}

/* Tokens gained per microsecond. */
static double
refill_rate(const SentdmRate *rate, double slowdown)
{
	int64_t		jitter_us = max64(rate->window_us / 50, 50 * MS_US);

	return ((double) rate->amount + 1 - capacity(rate)) /
		(double) (rate->window_us + jitter_us) * slowdown;
}

/* What the bucket holds now.  It may have been shut until a time to come. */
static double
tokens_at(const SentdmBucket *bucket, const SentdmRate *rate, double slowdown, int64_t now_us)
{
	double		tokens = bucket->tokens;

	if (now_us > bucket->refilled_us)
		tokens += (double) (now_us - bucket->refilled_us) * refill_rate(rate, slowdown);
	return tokens < capacity(rate) ? tokens : capacity(rate);
}

static void
refill(SentdmBucket *bucket, const SentdmRate *rate, double slowdown, int64_t now_us)
{
	if (is_limited(rate))
		bucket->tokens = tokens_at(bucket, rate, slowdown, now_us);
	else
	{
		bucket->tokens = 0;		/* for the day when it is limited */
		bucket->emptied_us = now_us;
	}
	bucket->refilled_us = max64(bucket->refilled_us, now_us);
}

/* To be done before anything changes that the tokens depend on. */
static void
refill_all(SentdmDrain *drain, int64_t now_us)
{
	refill(&drain->rates.requests, &drain->settings.requests, drain->rates.slowdown, now_us);
	refill(&drain->rates.messages, &drain->settings.messages, drain->rates.slowdown, now_us);
}

/*
 * The share of the capacity that has to stay in the bucket when a request of
 * this lane starts: what it leaves for the lanes before it, and what it may
 * need itself.  Nothing when there is little to share.
 */
static double
kept_share(const SentdmRate *rate, SentdmLane lane, double own)
{
	static const double lanes[SENTDM_LANES] = {0, 0.10, 0.25};

	return capacity(rate) < 4 ? 0 : own + lanes[lane];
}

/*
 * What the bucket holds beyond what one more request needs; negative if it
 * does not suffice.
 *
 * The share counts from what the bucket can have gained since it was empty: so
 * the first request of a new worker waits for one token, not for the reserve,
 * and yet the reserve grows under any load.
 */
static double
surplus_at(const SentdmBucket *bucket, const SentdmRate *rate, double slowdown, double share,
		   int64_t now_us)
{
	double		gained = 0;

	if (now_us > bucket->emptied_us)
		gained = (double) (now_us - bucket->emptied_us) * refill_rate(rate, slowdown);
	if (gained > capacity(rate))
		gained = capacity(rate);
	return tokens_at(bucket, rate, slowdown, now_us) - 1 - share * gained;
}

/* How many requests may start, if each of them costs so much at worst. */
static int64_t
bucket_room(const SentdmBucket *bucket, const SentdmRate *rate, double slowdown, double share,
			int cost, int64_t now_us)
{
	double		surplus;

	if (!is_limited(rate))
		return INT32_MAX;
	surplus = surplus_at(bucket, rate, slowdown, share, now_us);
	return surplus < 0 ? 0 : 1 + (int64_t) (surplus / cost);
}

/* When one may.  The surplus only grows, so bisection finds the moment. */
static int64_t
bucket_ready_us(const SentdmBucket *bucket, const SentdmRate *rate, double slowdown, double share,
				int64_t now_us)
{
	int64_t		early_us = now_us;
	int64_t		late_us;

	if (!is_limited(rate) || surplus_at(bucket, rate, slowdown, share, now_us) >= 0)
		return now_us;
	late_us = max64(now_us, bucket->refilled_us) + 1 +
		(int64_t) ((capacity(rate) - bucket->tokens) / refill_rate(rate, slowdown));
	while (early_us + 1 < late_us)
	{
		int64_t		middle_us = early_us + (late_us - early_us) / 2;

		if (surplus_at(bucket, rate, slowdown, share, middle_us) >= 0)
			late_us = middle_us;
		else
			early_us = middle_us;
	}
	return late_us;
}

/* How many requests of a lane the rates allow. */
static int64_t
rate_room(const SentdmDrain *drain, SentdmLane lane, int64_t now_us)
{
	const SentdmRate *requests = &drain->settings.requests;
	const SentdmRate *messages = &drain->settings.messages;

	return min64(bucket_room(&drain->rates.requests, requests, drain->rates.slowdown,
							 kept_share(requests, lane, 0), 1, now_us),
				 bucket_room(&drain->rates.messages, messages, drain->rates.slowdown,
							 kept_share(messages, lane, 0.5), MAX_RECIPIENTS, now_us));
}

/* When they allow one. */
static int64_t
rate_ready_us(const SentdmDrain *drain, SentdmLane lane, int64_t now_us)
{
	const SentdmRate *requests = &drain->settings.requests;
	const SentdmRate *messages = &drain->settings.messages;

	return max64(bucket_ready_us(&drain->rates.requests, requests, drain->rates.slowdown,
								 kept_share(requests, lane, 0), now_us),
				 bucket_ready_us(&drain->rates.messages, messages, drain->rates.slowdown,
								 kept_share(messages, lane, 0.5), now_us));
}

/* Empty until a time to come.  A debt stays. */
static void
shut(SentdmBucket *bucket, int64_t until_us)
{
	bucket->tokens = bucket->tokens < 0 ? bucket->tokens : 0;
	bucket->refilled_us = until_us;
	bucket->emptied_us = until_us;
}

/* By the breaker, or by a 429 that any drainer of the account was given. */
static int64_t
blocked_until(const SentdmDrain *drain)
{
	return max64(drain->blocked_until_us, drain->rates.limited_until_us);
}

/*
 * A 429: nothing starts until Retry-After is over, and then at a lower rate.
 *
 * Those that were in flight with it bring further ones; they may lengthen the
 * wait but slow down no further.  The buckets are emptied and shut until then,
 * or the wait would save up a burst.  Without a Retry-After the wait grows as
 * the rate falls, for our idea of the limit may be far from theirs; and at the
 * lowest rate their window of a minute passes with nothing in it, in case that
 * it counts what it refuses.
 */
static void
slow_down(SentdmDrain *drain, int64_t retry_after_ms, int64_t now_us)
{
	int64_t		wait_ms;

	refill_all(drain, now_us);
	if (now_us >= blocked_until(drain))
	{
		drain->rates.slowdown = drain->rates.slowdown / 2 > MIN_SLOWDOWN ? drain->rates.slowdown / 2 : MIN_SLOWDOWN;
		halve_window(drain);
	}

	if (retry_after_ms >= 0)
		wait_ms = max64(retry_after_ms, SECOND_MS);
	else
		wait_ms = drain->rates.slowdown > MIN_SLOWDOWN ?
			(int64_t) ((double) SECOND_MS / drain->rates.slowdown) : 61 * SECOND_MS;
	wait_ms += uniform(drain, 0, max64(wait_ms / 10, 250));
	drain->blocked_until_us = max64(drain->blocked_until_us,
									now_us + min64(wait_ms, HOUR_MS) * MS_US);

	drain->rates.limited_until_us = drain->blocked_until_us;
	drain->rates.slowed_us = drain->blocked_until_us;
	shut(&drain->rates.requests, drain->blocked_until_us);
	shut(&drain->rates.messages, drain->blocked_until_us);
}

/* Back to the full rate, linearly in the time during which answers are good. */
static void
speed_up(SentdmDrain *drain, int64_t now_us)
{
	int64_t		elapsed_us = min64(max64(now_us - drain->rates.slowed_us, 0), IDLE_US);

	if (drain->rates.slowdown >= 1)
		return;
	refill_all(drain, now_us);
	drain->rates.slowdown += (double) elapsed_us / (double) RECOVERY_US;
	if (drain->rates.slowdown > 1)
		drain->rates.slowdown = 1;
	drain->rates.slowed_us = max64(drain->rates.slowed_us, now_us);
}

/*
 * The window and the breaker.
 *
 * Requests that hang until they time out must not take the API down for the
 * others, although we are not told which ones hang.  Two things are known.  A
 * request that started before the last good answer was overtaken ("older"): it
 * says nothing new about the API's health.  And when more are in flight than
 * were started lately, the rest are slow: they take no part of the window, or
 * all of it would be lost to them, and a probe that is slow does not keep the
 * next one waiting.  A timeout that can be one of an older and slow request is
 * no failure of the API.  While nothing proves that the API is there at all,
 * though, being slow is no excuse; nor is it when Sent has refused the key or the
 * account: each refusal more brings it nearer to being locked, so the next request
 * waits for the end of the one that tries.
 *
 * For the same reason a run of failures halves the window only once, and never
 * below what it was at the start: what limits the damage when the API is down
 * is not the window but the count in free_slots().
 */

/* The pause, or nothing but one probe. */
static bool
one_by_one(const SentdmDrain *drain)
{
	return drain->probing || drain->pause != SENTDM_PAUSE_NONE;
}

/* In the stretch of this length that we are in, and the one before. */
static int
recent(const SentdmTally *tally, int64_t length_us, int64_t now_us)
{
	switch (now_us / length_us - tally->epoch)
	{
		case 0:
			return tally->counts[0] + tally->counts[1];
		case 1:
			return tally->counts[0];
		default:
			return 0;
	}
}

static void
count_one(SentdmTally *tally, int64_t length_us, int64_t now_us)
{
	int64_t		epoch = now_us / length_us;

	if (epoch != tally->epoch)
	{
		tally->counts[1] = epoch == tally->epoch + 1 ? tally->counts[0] : 0;
		tally->counts[0] = 0;
		tally->epoch = epoch;
	}
	tally->counts[0]++;
}

/* Requests in flight that are not slow. */
static int
young(const SentdmDrain *drain, int64_t now_us)
{
	if (drain->doubted || (!drain->proven && !one_by_one(drain)))
		return drain->in_flight;
	return (int) min64(drain->in_flight, recent(&drain->starts, EPOCH_US, now_us));
}

/* Those that are not older, either. */
static int
fresh(const SentdmDrain *drain, int64_t now_us)
{
	return (int) min64(drain->in_flight - drain->older, young(drain, now_us));
}

/* Asked before it is taken from those in flight. */
static bool
was_overtaken(const SentdmDrain *drain, const SentdmReply *reply, int64_t now_us)
{
	return reply->transport == SENTDM_NO_ANSWER && drain->older > 0 &&
		drain->in_flight > young(drain, now_us);
}

/* A share of the slots stays free of bulk. */
static int
lane_share(int slots, SentdmLane lane)
{
	return lane == SENTDM_BULK && slots >= 8 ? slots - slots / 8 : slots;
}

/* Much may have changed while nothing was to be done. */
static bool
is_idle(const SentdmDrain *drain, int64_t now_us)
{
	return drain->in_flight == 0 && now_us - drain->heard_us >= IDLE_US;
}

static int
window_at(const SentdmDrain *drain, int64_t now_us)
{
	return is_idle(drain, now_us) ? (int) min64(drain->window, FIRST_WINDOW) : drain->window;
}

/*
 * How many more requests may be in flight.  While answers fail, those that
 * failed and those that are out together stay within what opens the breaker:
 * so an idle worker finds out with five requests that the API is down.
 */
static int
free_slots(const SentdmDrain *drain, SentdmLane lane, int64_t now_us)
{
	int64_t		slots = lane_share(window_at(drain, now_us), lane) - young(drain, now_us);

	slots = max64(slots, 1 - fresh(drain, now_us));
	if (one_by_one(drain))
		slots = min64(slots, 1 - fresh(drain, now_us));
	else if (drain->failures > 0)
		slots = min64(slots, FAILURES_TO_OPEN - drain->failures - fresh(drain, now_us));
	slots = min64(slots, lane_share(drain->settings.max_in_flight, lane) - drain->in_flight);
	return (int) max64(slots, 0);
}

/*
 * How many messages to hold claimed beyond those that may start.  To claim takes
 * a wait for the disk, during which slots become free: as many as requests ended
 * lately will soon want a successor.  When answers are slow, or something is
 * wrong, nothing is claimed ahead: what is claimed cannot be cancelled any more.
 */
static int
ahead(const SentdmDrain *drain, int64_t now_us)
{
	if (one_by_one(drain) || drain->failures > 0)
		return 0;
	return (int) min64(recent(&drain->ends, PACE_US, now_us),
					   max64(drain->settings.max_in_flight, MIN_AHEAD));
}

/* Stop for a while, then try one request at a time. */
static void
open_breaker(SentdmDrain *drain, int64_t now_us)
{
	int			doublings = (int) min64(max64(drain->failures - FAILURES_TO_OPEN, 0), 16);
	int64_t		wait_ms = min64(BREAKER_MIN_MS << doublings, BREAKER_MAX_MS);

	wait_ms = uniform(drain, wait_ms / 2, wait_ms);
	drain->blocked_until_us = max64(drain->blocked_until_us, now_us + wait_ms * MS_US);
	drain->probing = true;
	drain->proven = false;
	drain->older = drain->in_flight;
	drain->window = (int) min64(drain->window, FIRST_WINDOW);
}

/* Is a person or a time awaited, with no probe under way? */
static bool
is_holding(const SentdmDrain *drain)
{
	return drain->pause != SENTDM_PAUSE_NONE && !drain->probing;
}

/* An answer that proves that the API works for us. */
static void
learn_good(SentdmDrain *drain, int64_t now_us)
{
	drain->failures = 0;
	drain->proven = true;
	drain->doubted = false;
	drain->older = drain->in_flight;
	drain->window = (int) min64(drain->window + 1, drain->settings.max_in_flight);
	drain->probing = false;
	drain->pause = SENTDM_PAUSE_NONE;
	drain->probe_at_us = INT64_MAX;
	speed_up(drain, now_us);
}

/* No answer, or one that says that the API is unwell. */
static void
learn_bad(SentdmDrain *drain, int64_t now_us)
{
	if (drain->probing && now_us < drain->blocked_until_us)
		return;					/* no probe: from before the breaker opened */
	if (drain->failures == 0)
		halve_window(drain);
	if (drain->failures < INT32_MAX)
		drain->failures++;
	if (drain->probing || drain->failures >= FAILURES_TO_OPEN)
		open_breaker(drain, now_us);
}

/* From before the last pause, or the end of it. */
static bool
is_stale(const SentdmDrain *drain, const SentdmAttempt *attempt)
{
	return is_holding(drain) || attempt->era != drain->era;
}

/* Which one it was is only known of those that try a doubted account. */
static void
count_end(SentdmDrain *drain, bool stale, int64_t now_us)
{
	drain->in_flight = (int) max64(drain->in_flight - 1, 0);
	if (stale || !drain->doubted)
		drain->older = (int) max64(drain->older - 1, 0);
	drain->heard_us = now_us;
	count_one(&drain->ends, PACE_US, now_us);
}

/*
 * What the outcome of a request says about everything else; pauses are seen to
 * by the caller.
 */
static void
learn(SentdmDrain *drain, const SentdmAttempt *attempt, const SentdmReply *reply,
	  const SentdmJudgement *judgement, int64_t now_us)
{
	bool		overtaken = was_overtaken(drain, reply, now_us);
	bool		stale = is_stale(drain, attempt);

	count_end(drain, stale, now_us);
	if (stale && judgement->verdict != SENTDM_RATE_LIMITED)
		return;
	switch (judgement->verdict)
	{
		case SENTDM_ACCEPTED:
			learn_good(drain, now_us);
			break;
		case SENTDM_REFUSED:
		case SENTDM_REFUSED_RECIPIENT:
		case SENTDM_IN_FLIGHT:
			/* a proxy's word proves nothing about the API */
			if (reply->readable)
				learn_good(drain, now_us);
			break;
		case SENTDM_RETRY:
			/* with a 429 it is about scheduled messages only */
			if (reply->http_status == 429)
				learn_good(drain, now_us);
			else if (!overtaken)
				learn_bad(drain, now_us);
			break;
		case SENTDM_UNREACHED:
			learn_bad(drain, now_us);
			break;
		case SENTDM_RATE_LIMITED:
			slow_down(drain, reply->retry_after_ms, now_us);
			break;
		case SENTDM_ACCOUNT:
		case SENTDM_EXPIRED:
			break;
	}
}

/*
 * The pause.
 */

/*
 * Sent locks an account out after ten failed authentications, with a 429 that
 * looks like any other.  One that follows a 401 (from before the pause that it
 * caused) is taken for that.  It ends by itself, so one request tries again
 * after a while: a key that was set right must not wait for a second person.
 */
static void
recognise_lockout(const SentdmDrain *drain, const SentdmReply *reply, SentdmJudgement *judgement)
{
	if (judgement->verdict != SENTDM_RATE_LIMITED || !drain->unauthorized)
		return;
	judgement->verdict = SENTDM_ACCOUNT;
	judgement->pause = SENTDM_PAUSE_CREDENTIALS;
	judgement->probe_after_ms = max64(HOUR_MS / 4, min64(reply->retry_after_ms, HOUR_MS));
}

/* Remember whether the key was refused; only answers of the API tell. */
static void
note_authorization(SentdmDrain *drain, const SentdmAttempt *attempt, const SentdmReply *reply,
				   const SentdmJudgement *judgement)
{
	if (is_stale(drain, attempt) || reply->transport != SENTDM_ANSWERED)
		return;
	if (judgement->pause == SENTDM_PAUSE_CREDENTIALS)
		drain->unauthorized = true;
	else if (reply->readable && judgement->verdict != SENTDM_RATE_LIMITED)
		drain->unauthorized = false;
}

void
sentdm_drain_pause(SentdmDrain *drain, SentdmPause pause, int64_t probe_after_ms, int64_t now_us)
{
	drain->pause = pause;
	drain->probe_at_us = probe_after_ms < 0 ? INT64_MAX : now_us + probe_after_ms * MS_US;
	drain->probing = false;
	drain->older = drain->in_flight;
	drain->era++;
	if (pause != SENTDM_PAUSE_USER)
		drain->doubted = true;
	if (pause == SENTDM_PAUSE_CREDENTIALS)
		drain->unauthorized = true;
}

/*
 * A wait that Sent or the breaker asked for stays.  One request has to prove
 * that the trouble is over; after a pause that a person wanted there was none,
 * and others need not wait for the first, which may hang.
 */
void
sentdm_drain_resume(SentdmDrain *drain, int64_t now_us)
{
	refill_all(drain, now_us);
	drain->probing = drain->pause != SENTDM_PAUSE_USER || drain->doubted ||
		drain->failures > 0;
	drain->pause = SENTDM_PAUSE_NONE;
	drain->probe_at_us = INT64_MAX;
	drain->older = drain->in_flight;
	drain->era++;
}

/*
 * Everything together.
 */

void
sentdm_drain_init(SentdmDrain *drain, const SentdmDrainSettings *settings,
				  int64_t now_us, uint64_t seed)
{
	*drain = (SentdmDrain)
	{
		.settings = *settings,
			.rates =
		{
			.requests =
			{
				.refilled_us = now_us,.emptied_us = now_us
			},
				.messages =
			{
				.refilled_us = now_us,.emptied_us = now_us
			},
				.slowdown = 1,
				.slowed_us = now_us
		},
			.window = (int) min64(FIRST_WINDOW, settings->max_in_flight),
			.heard_us = now_us,
			.pause = SENTDM_PAUSE_NONE,
			.probe_at_us = INT64_MAX,
			.random = seed
	};
}

/* A limit that was off begins with an empty bucket, see sentdm_drain_init. */
void
sentdm_drain_configure(SentdmDrain *drain, const SentdmDrainSettings *settings, int64_t now_us)
{
	refill_all(drain, now_us);
	drain->settings = *settings;
	refill_all(drain, now_us);	/* for the new capacity */
	drain->window = (int) min64(drain->window, settings->max_in_flight);
	drain->window = (int) max64(drain->window, 1);
}

/* May nothing start, whatever else there is room for? */
static bool
is_shut(const SentdmDrain *drain, int64_t now_us)
{
	return (is_holding(drain) && now_us < drain->probe_at_us) || now_us < blocked_until(drain);
}

int
sentdm_drain_quota(SentdmDrain *drain, SentdmLane lane, int64_t now_us)
{
	refill_all(drain, now_us);
	if (is_shut(drain, now_us))
		return 0;
	return (int) min64(free_slots(drain, lane, now_us), rate_room(drain, lane, now_us));
}

/*
 * Not before a quarter of what is ahead was used, for a claim is cheaper for many;
 * nor later, for requests end meanwhile and want successors.
 */
int
sentdm_drain_claimable(SentdmDrain *drain, SentdmLane lane, int ready, int64_t now_us)
{
	int			slots = free_slots(drain, lane, now_us);
	int			more = ahead(drain, now_us);

	refill_all(drain, now_us);
	if (is_shut(drain, now_us) || (ready >= slots && ready - slots > more * 3 / 4))
		return 0;
	return (int) max64(min64(slots + more, rate_room(drain, lane, now_us)) - ready, 0);
}

int64_t
sentdm_drain_ready_us(const SentdmDrain *drain, SentdmLane lane, int64_t now_us)
{
	int64_t		ready_us = max64(now_us, blocked_until(drain));

	/* an epoch or two, and requests are slow; else something has to come back */
	for (int i = 0; free_slots(drain, lane, ready_us) == 0; i++)
	{
		if (i == 2)
			return INT64_MAX;
		ready_us = (ready_us / EPOCH_US + 1) * EPOCH_US;
	}
	if (is_holding(drain))
		ready_us = max64(ready_us, drain->probe_at_us);
	return max64(ready_us, rate_ready_us(drain, lane, now_us));
}

void
sentdm_drain_spend(SentdmDrain *drain, int64_t now_us)
{
	refill_all(drain, now_us);
	if (is_limited(&drain->settings.requests) &&
		drain->rates.requests.tokens > -(double) drain->settings.requests.amount)
		drain->rates.requests.tokens -= 1;
}

void
sentdm_drain_started(SentdmDrain *drain, int recipients, int64_t now_us)
{
	refill_all(drain, now_us);
	if (is_limited(&drain->settings.requests))
		drain->rates.requests.tokens -= 1;
	if (is_limited(&drain->settings.messages))
		drain->rates.messages.tokens -= recipients;
	drain->window = window_at(drain, now_us);
	if (is_idle(drain, now_us))
		drain->proven = false;
	count_one(&drain->starts, EPOCH_US, now_us);
	drain->in_flight++;
	if (is_holding(drain) && now_us >= drain->probe_at_us)
		drain->probing = true;
}

/*
 * One message.
 */

static SentdmDecision
decide(SentdmAction action, bool charged, const char *error_code)
{
	return (SentdmDecision)
	{
		.action = action,
			.charged = charged,
			.pause = SENTDM_PAUSE_NONE,
			.probe_after_ms = -1,
			.error_code = error_code
	};
}

/* Sent may have it, and we stop asking: a person has to look. */
static SentdmDecision
unknown(bool charged, const char *error_code)
{
	SentdmDecision decision = decide(SENTDM_DO_UNCERTAIN, charged, error_code);

	decision.ambiguous = true;
	return decision;
}

static SentdmDecision
expire(bool ambiguous, bool charged)
{
	if (ambiguous)
		return unknown(charged, "expired_unknown");
	return decide(SENTDM_DO_EXPIRE, charged, "expired");
}

/*
 * Once more in delay_ms, unless the message's time is over.
 *
 * An ambiguous message that would come too late is not tried a last time: if
 * Sent has it the key would only bring back the answer, but if not this would
 * send it after it expired.
 */
static SentdmDecision
again(const SentdmDrain *drain, const SentdmAttempt *attempt, bool ambiguous,
	  int64_t delay_ms, bool charged)
{
	SentdmDecision decision;

	ambiguous = ambiguous || attempt->ambiguous_ms >= 0;
	if (attempt->expires_ms <= delay_ms)
		return expire(ambiguous, charged);
	if (!ambiguous && attempt->tried_ms >= drain->settings.give_up_after_ms)
		return decide(SENTDM_DO_FAIL, charged, "gave_up");

	if (ambiguous && attempt->ambiguous_ms >= drain->settings.uncertain_after_ms)
		return unknown(charged, "outcome_unknown");

	decision = decide(SENTDM_DO_RETRY, charged, NULL);
	decision.delay_ms = delay_ms;
	decision.ambiguous = ambiguous;
	return decision;
}

/* Exponential with full jitter, but never before Sent wants it. */
static int64_t
retry_delay_ms(SentdmDrain *drain, const SentdmAttempt *attempt, const SentdmReply *reply)
{
	const SentdmDrainSettings *settings = &drain->settings;
	int64_t		ceiling_ms = max64(settings->retry_min_ms, 1);
	int64_t		floor_ms = min64(reply->retry_after_ms, HOUR_MS);

	for (int i = 0; i <= attempt->attempts && ceiling_ms < settings->retry_max_ms; i++)
		ceiling_ms *= 2;
	ceiling_ms = min64(ceiling_ms, settings->retry_max_ms);

	/* too many scheduled messages: it takes long until some have gone out */
	if (reply->http_status == 429 && reply->retry_after_ms < 0)
		floor_ms = HOUR_MS;
	return max64(uniform(drain, settings->retry_min_ms, ceiling_ms), floor_ms);
}

/* Soon, as it is about our own request; less so when it lasts. */
static int64_t
in_flight_delay_ms(SentdmDrain *drain, const SentdmAttempt *attempt, const SentdmReply *reply)
{
	int64_t		base_ms = attempt->ambiguous_ms / 5;

	base_ms = min64(max64(base_ms, SECOND_MS), 5 * SECOND_MS);
	return max64(base_ms + uniform(drain, 0, base_ms), min64(reply->retry_after_ms, HOUR_MS));
}

/*
 * The message is refused, now or as the sum of its parts.
 *
 * Also when an earlier attempt is ambiguous: Sent keeps the answer of an
 * accepted request for its key and would have repeated it, so a refusal proves
 * that nothing was accepted, and the parts may go under new keys.  The answer
 * of a proxy proves nothing of the kind.
 */
static SentdmDecision
refuse(const SentdmAttempt *attempt, const SentdmReply *reply, bool split)
{
	if (!reply->readable && attempt->ambiguous_ms >= 0)
		return unknown(true, "outcome_unknown");
	if (split && attempt->recipients > 1)
		return decide(SENTDM_DO_SPLIT, true, NULL);
	return decide(SENTDM_DO_FAIL, true, NULL);
}

/* The first to report an account's trouble pauses the queue, others just wait. */
static SentdmDecision
suspend(SentdmDrain *drain, const SentdmAttempt *attempt, const SentdmJudgement *judgement,
		int64_t now_us)
{
	SentdmDecision decision = again(drain, attempt, false, 0, false);

	if (is_stale(drain, attempt))
		return decision;
	sentdm_drain_pause(drain, judgement->pause, judgement->probe_after_ms, now_us);
	decision.pause = judgement->pause;
	decision.probe_after_ms = judgement->probe_after_ms;
	return decision;
}

/*
 * Delays of zero: the pause, the breaker or the limit holds the message, and
 * when that is over it shall go at once.
 */
SentdmDecision
sentdm_drain_finished(SentdmDrain *drain, const SentdmAttempt *attempt,
					  const SentdmReply *reply, int64_t now_us, int64_t now_unix)
{
	SentdmJudgement judgement = sentdm_judge(reply, now_unix);

	recognise_lockout(drain, reply, &judgement);
	note_authorization(drain, attempt, reply, &judgement);
	learn(drain, attempt, reply, &judgement, now_us);

	switch (judgement.verdict)
	{
		case SENTDM_ACCEPTED:
			return decide(SENTDM_DO_ACCEPT, true, NULL);
		case SENTDM_RETRY:
			return again(drain, attempt, judgement.ambiguous,
						 retry_delay_ms(drain, attempt, reply), true);
		case SENTDM_IN_FLIGHT:
			return again(drain, attempt, judgement.ambiguous,
						 in_flight_delay_ms(drain, attempt, reply), false);
		case SENTDM_RATE_LIMITED:
			return again(drain, attempt, false, 0, false);
		case SENTDM_UNREACHED:
			return again(drain, attempt, false, uniform(drain, 0, 250), false);
		case SENTDM_REFUSED:
			return refuse(attempt, reply, false);
		case SENTDM_REFUSED_RECIPIENT:
			return refuse(attempt, reply, true);
		case SENTDM_ACCOUNT:
			return suspend(drain, attempt, &judgement, now_us);
		case SENTDM_EXPIRED:
			break;
	}
	return expire(attempt->ambiguous_ms >= 0, false);
}

/*
 * A message that was in hand whenever the worker died is taken for the cause,
 * although its outcome is unknown, too: a person has to look at it before
 * anything is sent again, which failed and uncertain have in common.
 */
SentdmDecision
sentdm_drain_admit(const SentdmDrain *drain, const SentdmAttempt *attempt)
{
	SentdmDecision decision = again(drain, attempt, false, 0, false);

	if (decision.action != SENTDM_DO_RETRY)
		return decision;
	decision.action = SENTDM_DO_SEND;
	if (attempt->crashes >= SENTDM_MAX_CRASHES)
	{
		decision.action = SENTDM_DO_FAIL;
		decision.error_code = "worker_crash";
	}
	return decision;
}
