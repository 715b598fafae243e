/*
 * drain_test.c
 *		The decisions of the drainer: rates, window, breaker, pauses, and what
 *		becomes of a message.
 *
 *		cc -I src -o drain_test test/unit/drain_test.c src/drain.c src/request.c
 */
#include "drain.h"
#include "tap.h"

#include <string.h>

#define MS			INT64_C(1000)
#define SECOND		INT64_C(1000000)
#define MINUTE		(60 * SECOND)
#define HOUR		(60 * MINUTE)
#define HOUR_MS		INT64_C(3600000)
#define NEVER		INT64_MAX
#define NOON		INT64_C(1789402310)
#define START		(1000 * SECOND)

/* Unlimited, so that each test limits what it is about. */
static const SentdmDrainSettings plain = {
	.max_in_flight = 64,
	.retry_min_ms = 1000,
	.retry_max_ms = 600000,
	.give_up_after_ms = 72 * HOUR_MS,
	.uncertain_after_ms = 23 * HOUR_MS
};

static const SentdmAttempt fresh_attempt = {
	.recipients = 1,
	.tried_ms = 0,
	.ambiguous_ms = -1,
	.expires_ms = NEVER
};

/* Answers by name. */
typedef enum Answer
{
	OK,
	REFUSED,
	BAD_NUMBER,
	HTTP_500,
	SERVICE_DOWN,
	TIMEOUT,
	UNREACHED,
	LIMITED,
	LIMITED_30,					/* Retry-After: 30 */
	TOO_MANY_SCHEDULED,
	BUSY,						/* CONFLICT_001 */
	BAD_KEY,
	NO_BALANCE,
	NO_QUOTA,
	BAD_CERTIFICATE,
	REDIRECT,
	FOREIGN_413,
	FOREIGN_400,
	TOO_LATE,
	ANSWERS
} Answer;

static const SentdmReply replies[ANSWERS] = {
	[OK] = {SENTDM_ANSWERED, 202, true, true, "", -1},
	[REFUSED] = {SENTDM_ANSWERED, 404, true, false, "RESOURCE_002", -1},
	[BAD_NUMBER] = {SENTDM_ANSWERED, 400, true, false, "VALIDATION_002", -1},
	[HTTP_500] = {SENTDM_ANSWERED, 500, true, false, "INTERNAL_001", -1},
	[SERVICE_DOWN] = {SENTDM_ANSWERED, 503, true, false, "SERVICE_001", -1},
	[TIMEOUT] = {SENTDM_NO_ANSWER, 0, false, false, "", -1},
	[UNREACHED] = {SENTDM_NOT_REACHED, 0, false, false, "", -1},
	[LIMITED] = {SENTDM_ANSWERED, 429, true, false, "BUSINESS_002", -1},
	[LIMITED_30] = {SENTDM_ANSWERED, 429, true, false, "BUSINESS_002", 30000},
	[TOO_MANY_SCHEDULED] = {SENTDM_ANSWERED, 429, true, false, "LIMIT_001", -1},
	[BUSY] = {SENTDM_ANSWERED, 409, true, false, "CONFLICT_001", -1},
	[BAD_KEY] = {SENTDM_ANSWERED, 401, true, false, "AUTH_002", -1},
	[NO_BALANCE] = {SENTDM_ANSWERED, 422, true, false, "BUSINESS_003", -1},
	[NO_QUOTA] = {SENTDM_ANSWERED, 422, true, false, "BUSINESS_008", -1},
	[BAD_CERTIFICATE] = {SENTDM_BAD_CERTIFICATE, 0, false, false, "", -1},
	[REDIRECT] = {SENTDM_ANSWERED, 302, false, false, "", -1},
	[FOREIGN_413] = {SENTDM_ANSWERED, 413, false, false, "", -1},
	[FOREIGN_400] = {SENTDM_ANSWERED, 400, false, false, "", -1},
	[TOO_LATE] = {SENTDM_TOO_LATE, 0, false, false, "", -1},
};

static const char *const answer_names[ANSWERS] = {
	[OK] = "a success",
	[REFUSED] = "a refusal",
	[BAD_NUMBER] = "a bad number",
	[HTTP_500] = "a 500",
	[SERVICE_DOWN] = "a 503 SERVICE_001",
	[TIMEOUT] = "a timeout",
	[UNREACHED] = "a refused connection",
	[LIMITED] = "a 429",
	[LIMITED_30] = "a 429 with Retry-After",
	[TOO_MANY_SCHEDULED] = "a 429 LIMIT_001",
	[BUSY] = "a 409 in flight",
	[BAD_KEY] = "a 401",
	[NO_BALANCE] = "no balance",
	[NO_QUOTA] = "no quota",
	[BAD_CERTIFICATE] = "a bad certificate",
	[REDIRECT] = "a redirect",
	[FOREIGN_413] = "a proxy's 413",
	[FOREIGN_400] = "a proxy's 400",
	[TOO_LATE] = "an expiry before the start",
};

/* The drainer under test, its clock, and its era when the last request was started. */
static SentdmDrain drain;
static int64_t now;
static int	era;

/* splitmix64, for schedules */
static uint64_t schedule_state;

static int
roll(int n)
{
	uint64_t	z = (schedule_state += UINT64_C(0x9e3779b97f4a7c15));

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return (int) ((z ^ (z >> 31)) % (uint64_t) n);
}

static void
begin(const SentdmDrainSettings *settings, uint64_t seed)
{
	now = START;
	schedule_state = seed;
	sentdm_drain_init(&drain, settings, now, seed);
}

static int
quota(SentdmLane lane)
{
	return sentdm_drain_quota(&drain, lane, now);
}

static void
start(int n)
{
	for (int i = 0; i < n; i++)
		sentdm_drain_started(&drain, 1, now);
	era = drain.era;
}

static SentdmDecision
finish_with(const SentdmReply *reply, const SentdmAttempt *attempt)
{
	SentdmAttempt of_era = *attempt;

	of_era.era = era;
	return sentdm_drain_finished(&drain, &of_era, reply, now, NOON);
}

static SentdmDecision
finish(Answer answer)
{
	return finish_with(&replies[answer], &fresh_attempt);
}

static SentdmDecision
request(Answer answer)
{
	start(1);
	return finish(answer);
}

/* Waits until a request may start. */
static bool
wait_ready(SentdmLane lane)
{
	int64_t		ready = sentdm_drain_ready_us(&drain, lane, now);

	if (ready == NEVER)
		return false;
	now = ready;
	return true;
}

/*
 * The window.
 */

static void
test_slow_start(void)
{
	int			grown = 0;

	begin(&plain, 1);
	ok(quota(SENTDM_HIGH) == 4 && quota(SENTDM_NORMAL) == 4 && quota(SENTDM_BULK) == 4,
	   "a new drainer may have four requests in flight");
	start(4);
	ok(quota(SENTDM_HIGH) == 0, "and no fifth");
	ok(sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) == NEVER, "which no waiting will change");
	for (int i = 0; i < 60; i++)
	{
		finish(OK);
		start(1);
		grown += drain.window == 5 + i;
	}
	ok(grown == 60, "each success earns one more");
	for (int i = 0; i < 10; i++)
		request(OK);
	ok(drain.window == 64, "up to the setting");
	ok(quota(SENTDM_HIGH) == 60 && quota(SENTDM_NORMAL) == 60 && quota(SENTDM_BULK) == 52,
	   "of which an eighth is not for bulk");
	start(52);
	ok(quota(SENTDM_BULK) == 0 && quota(SENTDM_NORMAL) == 8, "however many others there are");
}

static void
test_small_max_in_flight(void)
{
	SentdmDrainSettings settings = plain;

	settings.max_in_flight = 1;
	begin(&settings, 1);
	ok(quota(SENTDM_BULK) == 1, "with one slot bulk may have it");
	request(OK);
	request(OK);
	ok(quota(SENTDM_HIGH) == 1, "and it stays one");
	settings.max_in_flight = 7;
	begin(&settings, 1);
	for (int i = 0; i < 10; i++)
		request(OK);
	ok(quota(SENTDM_BULK) == 7, "seven slots are too few to share");
	settings.max_in_flight = 8;
	begin(&settings, 1);
	for (int i = 0; i < 10; i++)
		request(OK);
	ok(quota(SENTDM_BULK) == 7 && quota(SENTDM_NORMAL) == 8, "of eight, bulk gets seven");
}

static int
claimable(int ready)
{
	return sentdm_drain_claimable(&drain, SENTDM_NORMAL, ready, now);
}

/* Claiming ahead of what may start. */
static void
test_ahead(void)
{
	SentdmDrainSettings settings = plain;

	begin(&plain, 1);
	ok(claimable(0) == 4 && claimable(3) == 1 && claimable(4) == 0,
	   "a new drainer claims what may start, less what is ready");
	for (int i = 0; i < 100; i++)
		request(OK);
	ok(claimable(0) == 64 + 100, "then as many more as requests ended lately");
	ok(claimable(64 + 75) == 25 && claimable(64 + 76) == 0, "once a quarter of them is gone");
	start(64);
	ok(quota(SENTDM_NORMAL) == 0 && claimable(0) == 100, "also while all slots are taken");
	now += 200 * MS;
	ok(claimable(0) == 0, "and no more when nothing ended for a while");
	for (int i = 0; i < 500; i++)
		finish(OK), start(1);
	ok(claimable(0) == 256, "there is an end to it");
	finish(TIMEOUT), finish(HTTP_500);
	ok(claimable(0) <= quota(SENTDM_NORMAL), "after a failure nothing is claimed ahead");

	settings.requests = (SentdmRate) {20, 60 * SECOND};
	begin(&settings, 1);
	for (int i = 0; i < 20; i++)
		request(OK);
	now += 60 * SECOND;
	request(OK);
	ok(claimable(0) == quota(SENTDM_NORMAL), "nor is more than the rate allows");

	begin(&plain, 1);
	for (int i = 0; i < 100; i++)
		request(OK);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_BALANCE, -1, now);
	ok(claimable(0) == 0, "nor anything during a pause");
	sentdm_drain_resume(&drain, now);
	ok(claimable(0) == 1, "and one after it");
}

static void
test_single_failure(void)
{
	begin(&plain, 1);
	for (int i = 0; i < 80; i++)
		request(OK);
	for (int i = 0; i < 10; i++)
	{
		request(TIMEOUT);
		for (int j = 0; j < 40; j++)
			request(OK);
	}
	ok(drain.blocked_until_us == 0 && !drain.probing && drain.window == 64,
	   "one timeout in forty requests trips nothing");
	request(TIMEOUT);
	ok(drain.window == 32, "a failure halves the window");
	request(TIMEOUT);
	request(TIMEOUT);
	ok(drain.window == 32, "only once in a run");
	request(OK);
	request(TIMEOUT);
	ok(drain.window == 16, "and again in the next");
	for (int i = 0; i < 20; i++)
	{
		request(OK);
		request(TIMEOUT);
	}
	ok(drain.window == 4, "but never below what it was at the start");
}

/*
 * The breaker.
 */

/* Everything fails, in any order and timing: how many requests before it opens? */
static int
requests_until_open(Answer answer, int initially)
{
	int			started = 0;

	while (drain.blocked_until_us <= now)
	{
		int			more = quota((SentdmLane) roll(3));

		if (initially > 0 && more > initially)
			more = initially;
		if (more > 0 && roll(3) > 0)
		{
			int			n = 1 + roll(more);

			start(n);
			started += n;
			initially = 0;
		}
		else if (drain.in_flight > 0)
			finish(answer);
		now += roll(100) * MS;
		if (started > 100)
			break;
	}
	return started;
}

static void
test_idle_start(void)
{
	static const Answer bad[] = {UNREACHED, TIMEOUT, HTTP_500, SERVICE_DOWN, FOREIGN_400};

	for (size_t b = 0; b < sizeof(bad) / sizeof(bad[0]); b++)
	{
		int			most = 0;
		int			least = 100;
		int			most_after_idling = 0;

		for (int seed = 1; seed <= 500; seed++)
		{
			int			n;

			begin(&plain, (uint64_t) seed);
			n = requests_until_open(bad[b], roll(5));
			most = n > most ? n : most;
			least = n < least ? n : least;

			begin(&plain, (uint64_t) seed);
			for (int i = 0; i < 100; i++)
				request(OK);
			now += 10 * SECOND;
			n = requests_until_open(bad[b], roll(5));
			most_after_idling = n > most_after_idling ? n : most_after_idling;
		}
		ok(least == 5 && most == 5, "from a start, five times %s opens the breaker", answer_names[bad[b]]);
		ok(most_after_idling == 5, "also after idling");
	}
}

static void
test_breaker_times(void)
{
	int64_t		base = 1000;
	bool		bounded = true;
	bool		spread = false;
	int64_t		before = 0;

	begin(&plain, 7);
	for (int i = 0; i < 4; i++)
		request(UNREACHED);
	ok(quota(SENTDM_NORMAL) == 1 && drain.blocked_until_us == 0, "four failures leave one try");
	request(UNREACHED);
	for (int i = 0; i < 10; i++)
	{
		int64_t		wait = (drain.blocked_until_us - now) / MS;

		bounded = bounded && wait >= base / 2 && wait <= base;
		spread = spread || (i > 6 && wait != before);
		before = wait;
		base = base * 2 > 60000 ? 60000 : base * 2;
		if (quota(SENTDM_HIGH) != 0 || !wait_ready(SENTDM_HIGH) || now != drain.blocked_until_us ||
			quota(SENTDM_HIGH) != 1)
			bounded = false;
		start(1);
		if (quota(SENTDM_HIGH) != 0 || sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) <= now + 3 * SECOND ||
			sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) > now + 6 * SECOND)
			bounded = false;
		now += 10 * MS;
		finish(UNREACHED);
	}
	ok(bounded, "it blocks for 1 s, 2 s, ... 60 s, half of it by chance, and one request probes");
	ok(spread, "chance is at work");
}

/* Opens the breaker and starts the probe. */
static void
probe(void)
{
	begin(&plain, 3);
	for (int i = 0; i < 5; i++)
		request(UNREACHED);
	wait_ready(SENTDM_NORMAL);
	start(1);
}

static void
test_probe_answers(void)
{
	static const struct
	{
		Answer		answer;
		bool		closes;
		bool		blocks;
	}			cases[] = {
		{OK, true, false},
		{REFUSED, true, false},
		{BAD_NUMBER, true, false},
		{BUSY, true, false},
		{TOO_MANY_SCHEDULED, true, false},
		{HTTP_500, false, true},
		{SERVICE_DOWN, false, true},
		{TIMEOUT, false, true},
		{UNREACHED, false, true},
		{FOREIGN_400, false, true},
		{LIMITED, false, true},
		{FOREIGN_413, false, false},
		{TOO_LATE, false, false},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		probe();
		finish(cases[i].answer);
		ok(drain.probing != cases[i].closes && (drain.blocked_until_us > now) == cases[i].blocks,
		   "%s %s the breaker", answer_names[cases[i].answer], cases[i].closes ? "closes" : "does not close");
		wait_ready(SENTDM_NORMAL);
		ok(cases[i].closes ? quota(SENTDM_NORMAL) > 1 : quota(SENTDM_NORMAL) == 1,
		   "then %s may go", cases[i].closes ? "several" : "one");
	}
	probe();
	finish(OK);
	ok(drain.window <= 5 && drain.failures == 0, "after an outage the window starts small");
}

/* Many are in flight when the API goes down. */
static void
test_leftovers(void)
{
	begin(&plain, 5);
	for (int i = 0; i < 100; i++)
		request(OK);
	start(64);
	for (int i = 0; i < 5; i++)
		finish(TIMEOUT);
	ok(drain.probing && drain.failures == 5, "five of many open it");
	for (int i = 0; i < 20; i++)
		finish(TIMEOUT);
	ok(drain.failures == 5, "those that fail with them make it no worse");
	wait_ready(SENTDM_NORMAL);
	ok(quota(SENTDM_NORMAL) == 1, "one may probe although others still hang");
	start(1);
	ok(quota(SENTDM_NORMAL) == 0, "only one");
	now += 6 * SECOND;
	ok(quota(SENTDM_NORMAL) == 1, "unless it hangs, too");
	start(1);
	ok(quota(SENTDM_NORMAL) == 0, "again only one");
	finish(OK);
	ok(!drain.probing && quota(SENTDM_NORMAL) >= 1, "when it is answered, more may go, whatever still hangs");
}

/* Connections that break at once are no requests that hang. */
static void
test_resets(void)
{
	begin(&plain, 6);
	for (int i = 0; i < 20; i++)
		request(OK);
	start(15);
	finish(OK);
	for (int i = 0; i < 4; i++)
		finish(TIMEOUT);
	ok(!drain.probing && drain.failures == 4, "requests that break off count, although others were answered");
	finish(TIMEOUT);
	ok(drain.probing && quota(SENTDM_HIGH) == 0, "and five of them open the breaker");
}

/*
 * Some requests hang until they time out, the others are answered at once.  At
 * no time may an answered one have to wait for those that hang.
 */
static int64_t
longest_wait(int period_ms, int hanging, uint64_t seed)
{
	int64_t		wake[64];
	bool		out[64] = {false};
	int64_t		longest = 0;
	int64_t		waiting_since = START;
	int64_t		answer_at = NEVER;

	begin(&plain, seed);
	for (int i = 0; i < hanging; i++)
		wake[i] = START + roll(5000) * MS;
	/* who is due first goes first; those that hang are due when their backoff is over */
	for (; now < START + 30 * MINUTE; now += 20 * MS)
	{
		bool		served = answer_at != NEVER || now < waiting_since;

		for (int i = 0; i < hanging; i++)
		{
			if (out[i] && now >= wake[i])
			{
				SentdmDecision decision;
				SentdmAttempt attempt = fresh_attempt;

				attempt.attempts = (int) ((now - START) / (2 * MINUTE));
				decision = finish_with(&replies[TIMEOUT], &attempt);
				out[i] = false;
				wake[i] = now + decision.delay_ms * MS;
			}
			else if (!out[i] && now >= wake[i] && (served || wake[i] < waiting_since) &&
					 quota(SENTDM_NORMAL) > 0)
			{
				start(1);
				out[i] = true;
				wake[i] = now + 30 * SECOND;
			}
		}
		if (answer_at <= now)
		{
			finish(OK);
			answer_at = NEVER;
			waiting_since = now + period_ms * MS;
		}
		if (answer_at == NEVER && now >= waiting_since && quota(SENTDM_NORMAL) > 0)
		{
			longest = now - waiting_since > longest ? now - waiting_since : longest;
			start(1);
			answer_at = now + 100 * MS;
		}
	}
	return longest;
}

static void
test_hanging(void)
{
	static const struct
	{
		int			period_ms;
		int			hanging;
		int64_t		bound;
	}			cases[] = {
		{0, 4, 2 * SECOND},
		{0, 20, 2 * SECOND},
		{200, 10, 15 * SECOND},
		{1000, 3, 2 * SECOND},
		{1000, 10, 30 * SECOND},
		{5000, 2, 2 * SECOND},
		{5000, 10, 30 * SECOND},
		{20000, 3, 10 * SECOND},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		int64_t		longest = 0;

		for (uint64_t seed = 1; seed <= 20; seed++)
		{
			int64_t		wait = longest_wait(cases[i].period_ms, cases[i].hanging, seed);

			longest = wait > longest ? wait : longest;
		}
		ok(longest <= cases[i].bound,
		   "%d requests that hang do not starve one each %d ms (longest wait %lld ms)",
		   cases[i].hanging, cases[i].period_ms, (long long) (longest / MS));
	}
}

/* From one moment on, all requests hang: how many are made? */
static void
test_blackout(void)
{
	int64_t		ends[10000];
	int			first = 0;
	int			n = 0;
	int			after_minutes = 0;

	begin(&plain, 9);
	for (int i = 0; i < 100; i++)
		request(OK);
	for (; now < START + 60 * MINUTE && n < 10000; now += 100 * MS)
	{
		while (first < n && ends[first] <= now)
		{
			finish(TIMEOUT);
			first++;
		}
		for (int more = quota(SENTDM_NORMAL); more > 0 && n < 10000; more--)
		{
			start(1);
			ends[n++] = now + 30 * SECOND;
		}
		if (now < START + 5 * MINUTE)
			after_minutes = n;
	}
	ok(after_minutes <= 200 && n - after_minutes <= 5 * 60,
	   "when all requests hang, few are made (%d in 5 minutes, %d in the 55 after)", after_minutes, n - after_minutes);
}

/*
 * 429.
 */

static void
test_rate_limited(void)
{
	SentdmDrainSettings settings = plain;
	SentdmDecision decision;
	SentdmReply reply = replies[LIMITED];
	bool		within = true;

	settings.requests = (SentdmRate) {6000, MINUTE};
	begin(&settings, 11);
	now += MINUTE;
	for (int i = 0; i < 60; i++)
		request(OK);
	start(10);
	decision = finish(LIMITED_30);
	ok(decision.action == SENTDM_DO_RETRY && !decision.charged && !decision.ambiguous &&
	   decision.delay_ms == 0 && decision.pause == SENTDM_PAUSE_NONE, "a 429 costs the message no attempt");
	ok(quota(SENTDM_HIGH) == 0 && drain.blocked_until_us >= now + 30 * SECOND &&
	   drain.blocked_until_us <= now + 33 * SECOND, "and stops everything for Retry-After and a little");
	ok(drain.rates.slowdown == 0.5 && drain.window == 32, "after which half the rate is used");
	for (int i = 0; i < 9; i++)
		finish(LIMITED_30);
	ok(drain.rates.slowdown == 0.5 && drain.window == 32, "the others that were in flight slow down no further");
	ok(sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) > drain.blocked_until_us &&
	   sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) < drain.blocked_until_us + 100 * MS,
	   "it ends with an empty bucket");
	for (int i = 0; i < 10; i++)
	{
		now = drain.blocked_until_us;
		request(LIMITED);
	}
	ok(drain.rates.slowdown == 1.0 / 16, "a sixteenth of the rate is the least");
	ok(drain.blocked_until_us - now >= MINUTE, "and without Retry-After the wait grows meanwhile, to a minute");

	for (int64_t wait = -1; wait < 86400000; wait = wait < 1 ? wait + 1 : wait * 7)
	{
		int64_t		least = wait < 1000 ? 1000 : wait > HOUR_MS ? HOUR_MS : wait;

		begin(&settings, (uint64_t) wait + 2);
		reply.retry_after_ms = wait;
		start(1);
		finish_with(&reply, &fresh_attempt);
		within = within && drain.blocked_until_us >= now + least * MS &&
			drain.blocked_until_us <= now + HOUR &&
			drain.blocked_until_us <= now + (wait < 0 ? 2300 : least + least / 10 + 250) * MS;
	}
	ok(within, "it waits one second at least and one hour at most");
}

/* At half the rate half as many go, and not all workers come back at once. */
static void
test_slow_rate(void)
{
	SentdmDrainSettings settings = plain;
	int64_t		first = 0;
	bool		spread = false;
	int			n = 0;

	settings.requests = (SentdmRate) {600, MINUTE};
	begin(&settings, 14);
	now += MINUTE;
	request(LIMITED);
	now = drain.blocked_until_us;
	for (int64_t until = now + MINUTE; now < until; n++)
	{
		wait_ready(SENTDM_HIGH);
		start(1);
		finish(TOO_LATE);		/* says nothing, so nothing recovers */
	}
	ok(n > 230 && n < 300, "after a 429, half the limit is used (%d of 600)", n);

	for (uint64_t seed = 1; seed <= 20; seed++)
	{
		begin(&settings, seed);
		request(LIMITED_30);
		spread = spread || (first != 0 && drain.blocked_until_us != first);
		first = drain.blocked_until_us;
	}
	ok(spread, "and the wait has a bit of chance in it");
}

static void
test_recovery(void)
{
	double		half_way;

	begin(&plain, 12);
	request(LIMITED);
	now = drain.blocked_until_us;
	for (int i = 0; i < 75; i++)
	{
		now += SECOND;
		request(OK);
	}
	half_way = drain.rates.slowdown;
	ok(half_way > 0.74 && half_way < 0.76, "the rate comes back linearly");
	for (int i = 0; i < 76; i++)
	{
		now += SECOND;
		request(OK);
	}
	ok(drain.rates.slowdown == 1, "within minutes of successes");

	begin(&plain, 12);
	request(LIMITED);
	now = drain.blocked_until_us + HOUR;
	request(OK);
	ok(drain.rates.slowdown < 0.6, "one success after an hour is not minutes of them");
}

static void
test_long_backoff(void)
{
	SentdmReply reply = replies[TOO_MANY_SCHEDULED];
	SentdmDecision decision;

	begin(&plain, 13);
	start(2);
	decision = finish_with(&reply, &fresh_attempt);
	ok(decision.action == SENTDM_DO_RETRY && decision.delay_ms == HOUR_MS && !decision.ambiguous && decision.charged &&
	   quota(SENTDM_NORMAL) > 0, "too many scheduled messages hold up this one for an hour, and no other");
	reply.retry_after_ms = 120000;
	decision = finish_with(&reply, &fresh_attempt);
	ok(decision.delay_ms == 120000, "or as long as Retry-After says");
}

/*
 * Pauses.
 */

static void
test_pause(void)
{
	SentdmDecision first;
	SentdmDecision second;

	begin(&plain, 21);
	start(4);
	first = finish(BAD_KEY);
	ok(first.action == SENTDM_DO_RETRY && !first.charged && !first.ambiguous && first.delay_ms == 0 &&
	   first.pause == SENTDM_PAUSE_CREDENTIALS && first.probe_after_ms == -1, "the first 401 pauses the queue");
	second = finish(BAD_KEY);
	ok(second.action == SENTDM_DO_RETRY && !second.charged && second.delay_ms == 0 &&
	   second.pause == SENTDM_PAUSE_NONE, "the next one says nothing new");
	finish(NO_BALANCE);
	ok(drain.pause == SENTDM_PAUSE_CREDENTIALS, "nor does another reason");
	finish(OK);
	ok(drain.pause == SENTDM_PAUSE_CREDENTIALS && quota(SENTDM_HIGH) == 0,
	   "nor does a success from before");
	now += 1000 * HOUR;
	ok(quota(SENTDM_HIGH) == 0 && sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) == NEVER,
	   "nothing goes until a person acts");

	sentdm_drain_resume(&drain, now);
	ok(drain.pause == SENTDM_PAUSE_NONE && quota(SENTDM_HIGH) == 1, "then one request tries");
	start(1);
	ok(quota(SENTDM_HIGH) == 0, "only one");
	first = finish(BAD_KEY);
	ok(first.pause == SENTDM_PAUSE_CREDENTIALS && quota(SENTDM_HIGH) == 0, "and may pause it again");
	sentdm_drain_resume(&drain, now);
	request(OK);
	ok(drain.pause == SENTDM_PAUSE_NONE && quota(SENTDM_HIGH) > 1, "or lets the others go");
}

/* What is started before a pause may be answered after it. */
static void
test_latecomers(void)
{
	begin(&plain, 28);
	start(4);
	finish(BAD_KEY);
	sentdm_drain_resume(&drain, now);
	ok(finish(BAD_KEY).pause == SENTDM_PAUSE_NONE && drain.pause == SENTDM_PAUSE_NONE,
	   "after the pause, a 401 from before it pauses nothing");
	finish(OK);
	ok(quota(SENTDM_HIGH) == 1, "nor does a success from before it prove anything");
	finish(TIMEOUT);
	ok(quota(SENTDM_HIGH) == 1, "nor a timeout");
	start(1);
	ok(quota(SENTDM_HIGH) == 0, "and one request tries");
	finish(OK);
	ok(quota(SENTDM_HIGH) > 1, "which counts");
}

static void
test_pause_kinds(void)
{
	static const struct
	{
		Answer		answer;
		SentdmPause pause;
		int64_t		probe_ms;
	}			cases[] = {
		{BAD_KEY, SENTDM_PAUSE_CREDENTIALS, -1},
		{NO_BALANCE, SENTDM_PAUSE_BALANCE, 900000},
		{NO_QUOTA, SENTDM_PAUSE_QUOTA, (86400 - NOON % 86400 + 60) * 1000},
		{BAD_CERTIFICATE, SENTDM_PAUSE_CERTIFICATE, 300000},
		{REDIRECT, SENTDM_PAUSE_FORBIDDEN, 900000},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		SentdmDecision decision;
		int64_t		ready;

		begin(&plain, 22);
		start(2);
		decision = finish(cases[i].answer);
		ready = sentdm_drain_ready_us(&drain, SENTDM_BULK, now);
		ok(decision.pause == cases[i].pause && decision.probe_after_ms == cases[i].probe_ms &&
		   drain.pause == cases[i].pause && !decision.charged && !decision.ambiguous,
		   "%s pauses the queue (%s)", answer_names[cases[i].answer], sentdm_pause_name(cases[i].pause));
		ok(ready == (cases[i].probe_ms < 0 ? NEVER : now + cases[i].probe_ms * MS),
		   "until one request may try");
	}
}

static void
test_timed_probe(void)
{
	SentdmDecision decision;

	begin(&plain, 23);
	start(3);
	finish(NO_BALANCE);
	now += 15 * MINUTE - 1;
	ok(quota(SENTDM_HIGH) == 0, "a timed pause holds to the last moment");
	now += 1;
	ok(quota(SENTDM_HIGH) == 1, "then one request tries, although others still hang");
	ok(drain.pause == SENTDM_PAUSE_BALANCE, "and the pause stands until it is answered");
	start(1);
	ok(quota(SENTDM_HIGH) == 0, "only one");
	decision = finish(NO_BALANCE);
	ok(decision.pause == SENTDM_PAUSE_BALANCE && decision.probe_after_ms == 900000 && quota(SENTDM_HIGH) == 0,
	   "a probe that fails pauses again, and says so");
	now += 15 * MINUTE;
	start(1);
	finish(UNREACHED);
	ok(drain.pause == SENTDM_PAUSE_BALANCE && quota(SENTDM_HIGH) == 0, "one that is not answered leaves it as it is");
	now += 2 * SECOND;
	ok(quota(SENTDM_HIGH) == 1, "and is repeated soon");
	start(1);
	finish(REFUSED);
	ok(drain.pause == SENTDM_PAUSE_NONE && !drain.probing && quota(SENTDM_HIGH) > 0, "a good answer ends the pause");
}

static void
test_user_pause(void)
{
	begin(&plain, 24);
	start(4);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_USER, -1, now);
	ok(finish(OK).action == SENTDM_DO_ACCEPT, "what was in flight when a person paused is still settled");
	ok(finish(BAD_KEY).pause == SENTDM_PAUSE_NONE, "and cannot change the pause");
	finish(TIMEOUT);
	finish(TIMEOUT);
	ok(drain.pause == SENTDM_PAUSE_USER && drain.failures == 0 && quota(SENTDM_HIGH) == 0, "nor the breaker");
	start(1);
	ok(drain.pause == SENTDM_PAUSE_USER && !drain.probing, "nor can one that was claimed just before");
	finish(OK);
	ok(quota(SENTDM_HIGH) == 0, "however it is answered");
	sentdm_drain_resume(&drain, now);
	ok(quota(SENTDM_HIGH) > 1 && !drain.probing, "after that, all go on: there was no trouble");

	begin(&plain, 24);
	start(1);
	finish(BAD_KEY);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_USER, -1, now);
	sentdm_drain_resume(&drain, now);
	ok(quota(SENTDM_HIGH) == 1, "unless there was: then one request goes first");
	start(1);
	ok(quota(SENTDM_HIGH) == 0, "and the others wait for it");
	ok(sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) == NEVER, "until it is answered");
	now += 29 * SECOND;
	ok(quota(SENTDM_HIGH) == 0, "however long that takes: each refusal brings the lock nearer");
	finish(TIMEOUT);
	ok(wait_ready(SENTDM_HIGH) && quota(SENTDM_HIGH) == 1, "or given up: then another one tries");

	begin(&plain, 24);
	start(4);
	for (int i = 0; i < 4; i++)
		finish(TIMEOUT);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_USER, -1, now);
	sentdm_drain_resume(&drain, now);
	ok(quota(SENTDM_HIGH) == 1, "so, too, when the API was unwell before the pause");
}

static void
test_stored_pause(void)
{
	begin(&plain, 25);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_BALANCE, 5000, now);
	ok(quota(SENTDM_HIGH) == 0 && sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) == now + 5 * SECOND,
	   "a pause that an earlier worker left goes on");
	sentdm_drain_pause(&drain, SENTDM_PAUSE_BALANCE, 0, now);
	ok(quota(SENTDM_HIGH) == 1, "one whose time is over lets one request try");

	begin(&plain, 25);
	start(3);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_BALANCE, 1000, now);
	now += SECOND;
	ok(quota(SENTDM_HIGH) == 1, "whatever is still in flight from before");
}

static void
test_lockout(void)
{
	SentdmDecision decision;

	begin(&plain, 26);
	request(BAD_KEY);
	sentdm_drain_resume(&drain, now);
	decision = request(LIMITED_30);
	ok(decision.pause == SENTDM_PAUSE_CREDENTIALS && !decision.charged && drain.pause == SENTDM_PAUSE_CREDENTIALS,
	   "a 429 after a 401 is the lockout of a bad key");
	ok(decision.probe_after_ms == 900000 && drain.rates.slowdown == 1, "which ends by itself, and is no matter of rates");
	now += 15 * MINUTE;
	request(OK);
	ok(drain.pause == SENTDM_PAUSE_NONE && request(LIMITED).pause == SENTDM_PAUSE_NONE,
	   "once the key is good, a 429 is a 429 again");

	begin(&plain, 26);
	sentdm_drain_pause(&drain, SENTDM_PAUSE_CREDENTIALS, -1, now);
	sentdm_drain_resume(&drain, now);
	ok(request(LIMITED).pause == SENTDM_PAUSE_CREDENTIALS, "also when it was another worker that met the 401");

	begin(&plain, 26);
	start(2);
	finish(BAD_KEY);
	finish(OK);
	sentdm_drain_resume(&drain, now);
	ok(request(LIMITED).pause == SENTDM_PAUSE_CREDENTIALS, "and although an older request succeeded in between");
}

/*
 * Messages.
 */

typedef struct Case
{
	const char *name;
	Answer		answer;
	SentdmAttempt attempt;
	SentdmAction action;
	bool		charged;
	bool		ambiguous;
	int64_t		delay_min_ms;
	int64_t		delay_max_ms;
	const char *error_code;
} Case;

#define MANY(n)		{.recipients = n, .tried_ms = 0, .ambiguous_ms = -1, .expires_ms = NEVER}
#define TRIED(n)	{.recipients = 1, .attempts = n, .tried_ms = 60000, .ambiguous_ms = -1, .expires_ms = NEVER}
#define MAYBE(age)	{.recipients = 1, .attempts = 1, .tried_ms = age, .ambiguous_ms = age, .expires_ms = NEVER}
#define MAYBE_MANY	{.recipients = 9, .attempts = 1, .tried_ms = 5000, .ambiguous_ms = 5000, .expires_ms = NEVER}
#define EXPIRES(ms)	{.recipients = 1, .tried_ms = 0, .ambiguous_ms = -1, .expires_ms = ms}
#define EXPIRES_MAYBE(ms) \
	{.recipients = 1, .tried_ms = 5000, .ambiguous_ms = 5000, .expires_ms = ms}
#define OLD			{.recipients = 1, .attempts = 9, .tried_ms = 72 * HOUR_MS, .ambiguous_ms = -1, .expires_ms = NEVER}

static const Case cases[] = {
	{"accepted", OK, MANY(1), SENTDM_DO_ACCEPT, true, false, 0, 0, NULL},
	{"accepted at last", OK, MAYBE(5000), SENTDM_DO_ACCEPT, true, false, 0, 0, NULL},
	{"accepted, too late to expire", OK, EXPIRES(-5), SENTDM_DO_ACCEPT, true, false, 0, 0, NULL},

	{"refused", REFUSED, MANY(1), SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"refused for many: no split for a fault of the message", REFUSED, MANY(9), SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"refused after an ambiguous attempt: a proof that it was not accepted", REFUSED, MAYBE(5000),
	SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"a bad number alone", BAD_NUMBER, MANY(1), SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"a bad number among two", BAD_NUMBER, MANY(2), SENTDM_DO_SPLIT, true, false, 0, 0, NULL},
	{"a bad number among many", BAD_NUMBER, MANY(1000), SENTDM_DO_SPLIT, true, false, 0, 0, NULL},
	{"a bad number among many after an ambiguous attempt", BAD_NUMBER, MAYBE_MANY,
	SENTDM_DO_SPLIT, true, false, 0, 0, NULL},
	{"too big for a proxy", FOREIGN_413, MANY(9), SENTDM_DO_SPLIT, true, false, 0, 0, NULL},
	{"too big for a proxy, and no smaller", FOREIGN_413, MANY(1), SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"too big for a proxy after an ambiguous attempt: proves nothing", FOREIGN_413, MAYBE_MANY,
	SENTDM_DO_UNCERTAIN, true, true, 0, 0, "outcome_unknown"},

	{"a 500", HTTP_500, MANY(1), SENTDM_DO_RETRY, true, true, 1000, 2000, NULL},
	{"a 500, second time", HTTP_500, TRIED(1), SENTDM_DO_RETRY, true, true, 1000, 4000, NULL},
	{"a 500, fifth time", HTTP_500, TRIED(4), SENTDM_DO_RETRY, true, true, 1000, 32000, NULL},
	{"a 500, hundredth time", HTTP_500, TRIED(99), SENTDM_DO_RETRY, true, true, 1000, 600000, NULL},
	{"a 500, and too many to count", HTTP_500, TRIED(INT32_MAX - 1), SENTDM_DO_RETRY, true, true, 1000, 600000, NULL},
	{"a timeout", TIMEOUT, MANY(1), SENTDM_DO_RETRY, true, true, 1000, 2000, NULL},
	{"not executed", SERVICE_DOWN, MANY(1), SENTDM_DO_RETRY, true, false, 1000, 2000, NULL},
	{"not executed, but maybe before", SERVICE_DOWN, MAYBE(5000), SENTDM_DO_RETRY, true, true, 1000, 4000, NULL},
	{"refused by a proxy", FOREIGN_400, MANY(9), SENTDM_DO_RETRY, true, false, 1000, 2000, NULL},

	{"in flight", BUSY, MANY(1), SENTDM_DO_RETRY, false, true, 1000, 2000, NULL},
	{"in flight since 5 s", BUSY, MAYBE(5000), SENTDM_DO_RETRY, false, true, 1000, 2000, NULL},
	{"in flight since 15 s", BUSY, MAYBE(15000), SENTDM_DO_RETRY, false, true, 3000, 6000, NULL},
	{"in flight for long", BUSY, MAYBE(600000), SENTDM_DO_RETRY, false, true, 5000, 10000, NULL},

	{"not reached", UNREACHED, MANY(1), SENTDM_DO_RETRY, false, false, 0, 250, NULL},
	{"not reached, but maybe before", UNREACHED, MAYBE(5000), SENTDM_DO_RETRY, false, true, 0, 250, NULL},
	{"limited", LIMITED, MANY(1), SENTDM_DO_RETRY, false, false, 0, 0, NULL},
	{"limited, but maybe before", LIMITED, MAYBE(5000), SENTDM_DO_RETRY, false, true, 0, 0, NULL},
	{"paused, but maybe before", BAD_KEY, MAYBE(5000), SENTDM_DO_RETRY, false, true, 0, 0, NULL},

	{"expired before the start", TOO_LATE, EXPIRES(-1), SENTDM_DO_EXPIRE, false, false, 0, 0, "expired"},
	{"expired before the start, but maybe before", TOO_LATE, EXPIRES_MAYBE(-1),
	SENTDM_DO_UNCERTAIN, false, true, 0, 0, "expired_unknown"},
	{"expired before the start, as the transport says", TOO_LATE, MANY(1), SENTDM_DO_EXPIRE, false, false, 0, 0, "expired"},
	{"would expire before the next attempt", SERVICE_DOWN, EXPIRES(999),
	SENTDM_DO_EXPIRE, true, false, 0, 0, "expired"},
	{"would expire just then", SERVICE_DOWN, EXPIRES(1000), SENTDM_DO_EXPIRE, true, false, 0, 0, "expired"},
	{"has time for another attempt", SERVICE_DOWN, EXPIRES(2001), SENTDM_DO_RETRY, true, false, 1000, 2000, NULL},
	{"would expire, and is ambiguous now", HTTP_500, EXPIRES(999),
	SENTDM_DO_UNCERTAIN, true, true, 0, 0, "expired_unknown"},
	{"would expire, and was ambiguous before", SERVICE_DOWN, EXPIRES_MAYBE(999),
	SENTDM_DO_UNCERTAIN, true, true, 0, 0, "expired_unknown"},
	{"in flight, but would expire", BUSY, EXPIRES(999), SENTDM_DO_UNCERTAIN, false, true, 0, 0, "expired_unknown"},
	{"not reached and expired", UNREACHED, EXPIRES(0), SENTDM_DO_EXPIRE, false, false, 0, 0, "expired"},
	{"limited and expired", LIMITED, EXPIRES(0), SENTDM_DO_EXPIRE, false, false, 0, 0, "expired"},
	{"limited and nearly expired", LIMITED, EXPIRES(1), SENTDM_DO_RETRY, false, false, 0, 0, NULL},

	{"ambiguous for too long", HTTP_500, MAYBE(23 * HOUR_MS), SENTDM_DO_UNCERTAIN, true, true, 0, 0, "outcome_unknown"},
	{"ambiguous for too long, not reached", UNREACHED, MAYBE(23 * HOUR_MS),
	SENTDM_DO_UNCERTAIN, false, true, 0, 0, "outcome_unknown"},
	{"ambiguous for long", HTTP_500, MAYBE(23 * HOUR_MS - 1), SENTDM_DO_RETRY, true, true, 1000, 4000, NULL},
	{"tried for too long", SERVICE_DOWN, OLD, SENTDM_DO_FAIL, true, false, 0, 0, "gave_up"},
	{"tried for too long, and now it is ambiguous", HTTP_500, OLD, SENTDM_DO_RETRY, true, true, 1000, 600000, NULL},
	{"not reached for too long", UNREACHED, OLD, SENTDM_DO_FAIL, false, false, 0, 0, "gave_up"},
	{"limited for too long", LIMITED, OLD, SENTDM_DO_FAIL, false, false, 0, 0, "gave_up"},
	{"tried for long, refused at last", REFUSED, OLD, SENTDM_DO_FAIL, true, false, 0, 0, NULL},
	{"tried for long, accepted at last", OK, OLD, SENTDM_DO_ACCEPT, true, false, 0, 0, NULL},
};

static bool
same_text(const char *a, const char *b)
{
	return a == b || (a != NULL && b != NULL && strcmp(a, b) == 0);
}

static void
test_messages(void)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		const Case *c = &cases[i];
		bool		good = true;
		int64_t		least = NEVER;
		int64_t		most = -1;

		for (uint64_t seed = 1; seed <= 300; seed++)
		{
			SentdmDecision d;

			begin(&plain, seed);
			start(1);
			d = finish_with(&replies[c->answer], &c->attempt);
			good = good && d.action == c->action && d.charged == c->charged &&
				d.ambiguous == c->ambiguous && same_text(d.error_code, c->error_code);
			least = d.delay_ms < least ? d.delay_ms : least;
			most = d.delay_ms > most ? d.delay_ms : most;
		}
		ok(good && least >= c->delay_min_ms && most <= c->delay_max_ms &&
		   (least - c->delay_min_ms) * 20 <= c->delay_max_ms - c->delay_min_ms &&
		   (c->delay_max_ms - most) * 20 <= c->delay_max_ms - c->delay_min_ms,
		   "%s (delays %lld to %lld ms)", c->name, (long long) least, (long long) most);
	}
}

static void
test_retry_after_floor(void)
{
	SentdmReply reply = replies[SERVICE_DOWN];
	SentdmAttempt attempt = fresh_attempt;

	begin(&plain, 31);
	start(4);
	reply.retry_after_ms = 45000;
	ok(finish_with(&reply, &fresh_attempt).delay_ms == 45000, "Retry-After is the least delay");
	reply.retry_after_ms = 20 * HOUR_MS;
	ok(finish_with(&reply, &fresh_attempt).delay_ms == HOUR_MS, "but never more than an hour");
	reply.retry_after_ms = 45000;
	attempt.expires_ms = 45000;
	ok(finish_with(&reply, &attempt).action == SENTDM_DO_EXPIRE, "who cannot wait so long expires");
	reply = replies[BUSY];
	reply.retry_after_ms = 45000;
	ok(finish_with(&reply, &fresh_attempt).delay_ms == 45000, "a 409 may say how long, too");
}

static void
test_admit(void)
{
	static const struct
	{
		const char *name;
		SentdmAttempt attempt;
		SentdmAction action;
		bool		ambiguous;
		const char *error_code;
	}			table[] = {
		{"a new message", {1, 0, 0, -1, -1, NEVER}, SENTDM_DO_SEND, false, NULL},
		{"a retry", {1, 3, 0, 60000, -1, NEVER}, SENTDM_DO_SEND, false, NULL},
		{"an ambiguous one", {1, 3, 0, 60000, 60000, NEVER}, SENTDM_DO_SEND, true, NULL},
		{"one just before it expires", {1, 0, 0, -1, -1, 1}, SENTDM_DO_SEND, false, NULL},
		{"one that expires now", {1, 0, 0, -1, -1, 0}, SENTDM_DO_EXPIRE, false, "expired"},
		{"one that expired", {1, 0, 0, -1, -1, -5}, SENTDM_DO_EXPIRE, false, "expired"},
		{"an ambiguous one that expired", {1, 1, 0, 9, 9, -5}, SENTDM_DO_UNCERTAIN, true, "expired_unknown"},
		{"one ambiguous for nearly 23 h", {1, 1, 0, 23 * HOUR_MS - 1, 23 * HOUR_MS - 1, NEVER}, SENTDM_DO_SEND, true, NULL},
		{"one ambiguous for 23 h", {1, 1, 0, 23 * HOUR_MS, 23 * HOUR_MS, NEVER}, SENTDM_DO_UNCERTAIN, true, "outcome_unknown"},
		{"one ambiguous for 72 h", {1, 1, 0, 72 * HOUR_MS, 72 * HOUR_MS, NEVER}, SENTDM_DO_UNCERTAIN, true, "outcome_unknown"},
		{"one tried for nearly 72 h", {1, 9, 0, 72 * HOUR_MS - 1, -1, NEVER}, SENTDM_DO_SEND, false, NULL},
		{"one tried for 72 h", {1, 9, 0, 72 * HOUR_MS, -1, NEVER}, SENTDM_DO_FAIL, false, "gave_up"},
		{"one after two crashes", {1, 0, 2, 9, 9, NEVER}, SENTDM_DO_SEND, true, NULL},
		{"one after three crashes", {1, 0, 3, 9, 9, NEVER}, SENTDM_DO_FAIL, true, "worker_crash"},
		{"an expired one after three crashes", {1, 0, 3, 9, 9, 0}, SENTDM_DO_UNCERTAIN, true, "expired_unknown"},
	};

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
	{
		SentdmDrain before;
		SentdmDecision decision;

		begin(&plain, 41);
		before = drain;
		decision = sentdm_drain_admit(&drain, &table[i].attempt);
		ok(decision.action == table[i].action && decision.ambiguous == table[i].ambiguous &&
		   same_text(decision.error_code, table[i].error_code) && !decision.charged &&
		   decision.pause == SENTDM_PAUSE_NONE && memcmp(&before, &drain, sizeof(drain)) == 0,
		   "admit: %s", table[i].name);
	}
}

/*
 * Rates.
 */

#define MOST_STARTS 20000

typedef struct Arrival
{
	int64_t		at_us;
	int			recipients;
} Arrival;

static Arrival arrivals[MOST_STARTS];
static int	n_arrivals;

static int
by_time(const void *a, const void *b)
{
	int64_t		x = ((const Arrival *) a)->at_us;
	int64_t		y = ((const Arrival *) b)->at_us;

	return (x > y) - (x < y);
}

/* The most that arrived in any window. */
static int64_t
busiest_window(int64_t window_us, bool recipients)
{
	int64_t		sum = 0;
	int64_t		most = 0;
	int			first = 0;

	qsort(arrivals, (size_t) n_arrivals, sizeof(Arrival), by_time);
	for (int i = 0; i < n_arrivals; i++)
	{
		sum += recipients ? arrivals[i].recipients : 1;
		while (arrivals[first].at_us <= arrivals[i].at_us - window_us)
		{
			sum -= recipients ? arrivals[first].recipients : 1;
			first++;
		}
		most = sum > most ? sum : most;
	}
	return most;
}

/* Takes all that is allowed, at odd moments; restarts and 429s now and then. */
static void
take_all(const SentdmDrainSettings *settings, int most_recipients, int restart_each, int64_t for_us)
{
	SentdmRate	rate = settings->requests.amount ? settings->requests : settings->messages;
	int64_t		until;

	n_arrivals = 0;
	until = now + for_us;
	while (now < until && n_arrivals < MOST_STARTS)
	{
		SentdmLane	lane = (SentdmLane) roll(3);
		int			n = quota(lane);

		for (int i = 0; i < n && n_arrivals < MOST_STARTS; i++)
		{
			int			recipients = 1 + roll(most_recipients);

			sentdm_drain_started(&drain, recipients, now);
			arrivals[n_arrivals++] = (Arrival) {now + (int64_t) ((double) rate.window_us * 0.0199 * roll(1000) / 1000),
				recipients};
			finish(OK);
		}
		if (restart_each && roll(restart_each) == 0)
			sentdm_drain_init(&drain, settings, now, (uint64_t) roll(1000));
		if (roll(3) == 0)
			now += rate.window_us / rate.amount / 4 + 1;
		else if (roll(20) == 0)
			now += rate.window_us / (1 + roll(8));
		else
			wait_ready(lane);
	}
}

static void
test_rates(void)
{
	static const SentdmRate rates[] = {
		{1, MINUTE}, {2, MINUTE}, {3, SECOND * 10}, {9, MINUTE}, {10, MINUTE}, {11, MINUTE}, {19, MINUTE},
		{40, MINUTE}, {60, MINUTE}, {200, MINUTE}, {300, MINUTE}, {1000, HOUR}, {10000, MINUTE}, {5000, SECOND * 10},
	};

	for (size_t i = 0; i < sizeof(rates) / sizeof(rates[0]); i++)
	{
		for (int restarts = 0; restarts < 2; restarts++)
		{
			SentdmDrainSettings settings = plain;
			int64_t		most = 0;
			int64_t		most_recipients = 0;
			int64_t		half = rates[i].amount / 20 > 1 ? rates[i].amount / 20 : 1;
			double		used;

			settings.requests = rates[i];
			for (uint64_t seed = 1; seed <= 8; seed++)
			{
				int64_t		most_now;

				begin(&settings, seed);
				take_all(&settings, 1, restarts ? 20 : 0, 20 * rates[i].window_us);
				most_now = busiest_window(rates[i].window_us, false);
				most = most_now > most ? most_now : most;
			}
			used = (double) n_arrivals / (double) rates[i].amount;
			ok(most <= rates[i].amount, "%lld requests in %lld ms%s: at most %lld arrived in any window (%.1f windows' worth)",
			   (long long) rates[i].amount, (long long) (rates[i].window_us / MS),
			   restarts ? " and restarts" : "", (long long) most, used);

			if (restarts)
				continue;
			settings.requests = (SentdmRate) {0, 0};
			settings.messages = rates[i];
			for (uint64_t seed = 1; seed <= 8; seed++)
			{
				int64_t		most_now;

				begin(&settings, seed);
				now += rates[i].window_us;
				take_all(&settings, (int) half, 0, 20 * rates[i].window_us);
				most_now = busiest_window(rates[i].window_us, true);
				most_recipients = most_now > most_recipients ? most_now : most_recipients;
			}
			ok(most_recipients <= rates[i].amount, "%lld recipients in %lld ms: at most %lld arrived in any window",
			   (long long) rates[i].amount, (long long) (rates[i].window_us / MS), (long long) most_recipients);
		}
	}
}

/* The full rate is nearly used, and a queue of one lane is not held up. */
static void
test_throughput(void)
{
	static const SentdmLane lanes[] = {SENTDM_HIGH, SENTDM_NORMAL, SENTDM_BULK};
	SentdmDrainSettings settings = plain;

	settings.requests = (SentdmRate) {200, MINUTE};
	for (size_t i = 0; i < 3; i++)
	{
		int			n = 0;

		begin(&settings, 51);
		for (int64_t until = now + 10 * MINUTE; now < until; n++)
		{
			request(OK);
			wait_ready(lanes[i]);
		}
		ok(n >= 1700 && n <= 2000, "lane %d alone gets nine tenths of the limit (%d of 2000)", (int) i, n);
	}
	begin(&settings, 51);
	ok(quota(SENTDM_BULK) == 0 && sentdm_drain_ready_us(&drain, SENTDM_BULK, now) < now + SECOND / 2,
	   "the first request waits for one token only");
}

static void
test_reserve(void)
{
	SentdmDrainSettings settings = plain;
	int			n = 0;

	settings.max_in_flight = 1000;
	settings.requests = (SentdmRate) {1000, MINUTE};
	begin(&settings, 52);
	drain.window = 1000;
	now += 9 * SECOND;
	ok(quota(SENTDM_HIGH) == 100 && quota(SENTDM_NORMAL) == 90 && quota(SENTDM_BULK) == 75,
	   "bulk leaves a quarter of the tokens, normal a tenth");
	while (quota(SENTDM_BULK) > 0 && n < 1000)
	{
		start(1);
		n++;
	}
	ok(n == 75 && quota(SENTDM_NORMAL) == 15 && quota(SENTDM_HIGH) == 25, "for the others");
	settings.requests = (SentdmRate) {10, MINUTE};
	begin(&settings, 52);
	now += HOUR;
	ok(quota(SENTDM_BULK) == 1, "but of one token nothing is left");

	begin(&plain, 52);
	settings = plain;
	settings.messages = (SentdmRate) {1000, MINUTE};
	begin(&settings, 52);
	now += HOUR;
	ok(quota(SENTDM_HIGH) == 1, "requests go one by one where recipients are limited");
	sentdm_drain_started(&drain, 700, now);
	finish(OK);
	ok(quota(SENTDM_HIGH) == 0 && drain.rates.messages.tokens < -599, "a big request passes, and leaves a debt");
	now = sentdm_drain_ready_us(&drain, SENTDM_HIGH, now);
	ok(now > START + HOUR + 43 * SECOND && now < START + HOUR + 46 * SECOND, "that is earned back first");
}

/* Requests that are not the drainer's, and wait for nothing. */
static void
test_spend(void)
{
	SentdmDrainSettings settings = plain;

	settings.requests = (SentdmRate) {60, MINUTE};
	begin(&settings, 53);
	for (int i = 0; i < 20; i++)
		sentdm_drain_spend(&drain, now);
	now = sentdm_drain_ready_us(&drain, SENTDM_HIGH, now);
	ok(now > START + 20 * SECOND && now < START + 25 * SECOND, "twenty requests of others are waited for");
	for (int i = 0; i < 1000; i++)
		sentdm_drain_spend(&drain, now);
	ok(sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) - now < 70 * SECOND, "but never more than a window of them");
	begin(&plain, 53);
	for (int i = 0; i < 1000; i++)
		sentdm_drain_spend(&drain, now);
	ok(quota(SENTDM_HIGH) > 0, "and without a limit none");
}

/* What sentdm_drain_ready_us says is the very moment. */
static void
test_ready(void)
{
	int			early = 0;
	int			late = 0;
	int			stuck = 0;
	int			checked = 0;

	for (uint64_t seed = 1; seed <= 2000; seed++)
	{
		SentdmDrainSettings settings = plain;

		schedule_state = seed;
		settings.max_in_flight = 1 + roll(20);
		if (roll(2))
			settings.requests = (SentdmRate) {1 + roll(300), (1 + roll(100)) * SECOND};
		if (roll(3) == 0)
			settings.messages = (SentdmRate) {1 + roll(3000), (1 + roll(100)) * SECOND};
		begin(&settings, seed);
		for (int step = 0; step < 60; step++)
		{
			SentdmLane	lane = (SentdmLane) roll(3);
			SentdmDrain copy = drain;
			int64_t		ready = sentdm_drain_ready_us(&drain, lane, now);

			if (ready != NEVER)
			{
				checked++;
				late += sentdm_drain_quota(&copy, lane, ready) == 0;
				copy = drain;
				if (ready > now)
					early += sentdm_drain_quota(&copy, lane, ready - 1) > 0;
			}
			else if (drain.in_flight == 0 && drain.pause == SENTDM_PAUSE_NONE)
				stuck++;
			else
			{
				copy = drain;
				early += sentdm_drain_quota(&copy, lane, now + 1000 * HOUR) > 0 && drain.in_flight == 0;
			}
			if (roll(2) && quota(lane) > 0)
				sentdm_drain_started(&drain, 1 + roll(30), now);
			else if (drain.in_flight > 0 && roll(2))
				finish((Answer) roll(ANSWERS));
			else if (roll(10) == 0)
				sentdm_drain_resume(&drain, now);
			else if (roll(2) || !wait_ready(lane))
				now += roll(2000000);
		}
	}
	ok(late == 0, "when the time comes that ready_us names, there is quota (%d times)", checked);
	ok(early == 0, "and none before");
	ok(stuck == 0, "with nothing in flight and no pause there always is such a time");
}

static void
test_configure(void)
{
	SentdmDrainSettings settings = plain;

	settings.requests = (SentdmRate) {1000, MINUTE};
	begin(&settings, 61);
	now += MINUTE;
	drain.window = 64;
	drain.heard_us = now;
	start(64);
	settings.requests.amount = 100;
	settings.max_in_flight = 8;
	sentdm_drain_configure(&drain, &settings, now);
	ok(drain.rates.requests.tokens <= 10 && drain.window == 8 && quota(SENTDM_HIGH) == 0, "smaller limits hold at once");
	settings.requests.amount = 10000;
	settings.max_in_flight = 100;
	sentdm_drain_configure(&drain, &settings, now);
	ok(drain.rates.requests.tokens <= 10 && drain.in_flight == 64, "greater ones give nothing for nothing");

	begin(&plain, 61);
	now += HOUR;
	settings = plain;
	settings.requests = (SentdmRate) {60, MINUTE};
	sentdm_drain_configure(&drain, &settings, now);
	ok(quota(SENTDM_HIGH) == 0 && sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) > now, "a new limit begins empty");
	sentdm_drain_configure(&drain, &plain, now);
	ok(quota(SENTDM_HIGH) == 4, "and one that is taken away is gone");

	begin(&settings, 61);
	now += MINUTE;
	start(4);
	sentdm_drain_configure(&drain, &settings, now);
	ok(drain.rates.requests.tokens < 2.1, "the same settings again forget nothing");
}

static void
test_clock(void)
{
	SentdmDrainSettings settings = plain;

	settings.requests = (SentdmRate) {60, MINUTE};
	begin(&settings, 62);
	now += MINUTE;
	start(4);
	quota(SENTDM_HIGH);
	now -= 30 * SECOND;
	quota(SENTDM_HIGH);
	start(1);
	now += 30 * SECOND;
	ok(quota(SENTDM_HIGH) == 0 && drain.rates.requests.tokens < 1.1, "time that passes twice is counted once");
}

static void
test_seed(void)
{
	SentdmDrain other;
	SentdmDecision a;
	SentdmDecision b;

	begin(&plain, 71);
	other = drain;
	start(1);
	a = finish(HTTP_500);
	drain = other;
	start(1);
	b = finish(HTTP_500);
	ok(a.delay_ms == b.delay_ms, "the same state decides the same");
	begin(&plain, 72);
	start(1);
	b = finish(HTTP_500);
	ok(a.delay_ms != b.delay_ms, "another seed has other jitter");
}

/*
 * Drainers of several databases under one API key, each with a state of its own and
 * the rates shared.
 */

#define SHARERS 3

static SentdmDrain sharers[SHARERS];
static SentdmRates shared_rates;

static void
enter(int i)
{
	drain = sharers[i];
	drain.rates = shared_rates;
}

static void
leave(int i)
{
	sharers[i] = drain;
	shared_rates = drain.rates;
}

static void
begin_shared(const SentdmDrainSettings *settings, uint64_t seed)
{
	for (int i = 0; i < SHARERS; i++)
	{
		begin(settings, seed + i);
		sharers[i] = drain;
	}
	shared_rates = drain.rates;
}

static void
test_shared_rates(void)
{
	static int64_t at[100000];
	SentdmDrainSettings settings = plain;
	int			n = 0;
	int			most = 0;
	int			first = 0;
	int			count[SHARERS] = {0};

	settings.requests = (SentdmRate) {100, MINUTE};
	begin_shared(&settings, 73);
	for (int64_t until = now + 30 * MINUTE; now < until; now += 1 + roll(400) * MS)
	{
		int			i = roll(SHARERS);

		enter(i);
		for (int room = quota((SentdmLane) roll(3)); room > 0; room--)
		{
			request(roll(50) == 0 ? HTTP_500 : OK);
			at[n++] = now;
			count[i]++;
		}
		leave(i);
		if (roll(1000) == 0)	/* its worker ends, and another one comes */
		{
			sentdm_drain_init(&sharers[i], &settings, now, (uint64_t) now);
		}
	}
	for (int last = 0; last < n; last++)
	{
		while (at[last] - at[first] >= MINUTE)
			first++;
		most = last - first + 1 > most ? last - first + 1 : most;
	}
	ok(most <= 100, "drainers that share the rates keep to them together (%d of 100)", most);
	ok(n > 30 * 85, "and use them (%d in half an hour)", n);
	ok(count[0] > n / 5 && count[1] > n / 5 && count[2] > n / 5, "each about as much as the others");

	begin_shared(&plain, 74);
	now += MINUTE;
	enter(0);
	request(LIMITED_30);
	leave(0);
	enter(1);
	ok(quota(SENTDM_HIGH) == 0 && sentdm_drain_ready_us(&drain, SENTDM_HIGH, now) >= now + 30 * SECOND,
	   "a 429 for one stops the others until Retry-After");
	start(1);
	finish(LIMITED_30);
	ok(drain.rates.slowdown == 0.5, "and theirs slow down no further");
	leave(1);
	enter(2);
	now += 40 * SECOND;
	ok(quota(SENTDM_HIGH) > 0 && drain.rates.slowdown == 0.5, "afterwards all go on, at half the rate");
}

int
main(void)
{
	test_slow_start();
	test_small_max_in_flight();
	test_ahead();
	test_single_failure();
	test_idle_start();
	test_breaker_times();
	test_probe_answers();
	test_leftovers();
	test_resets();
	test_hanging();
	test_blackout();
	test_rate_limited();
	test_slow_rate();
	test_recovery();
	test_long_backoff();
	test_pause();
	test_latecomers();
	test_pause_kinds();
	test_timed_probe();
	test_user_pause();
	test_stored_pause();
	test_lockout();
	test_messages();
	test_retry_after_floor();
	test_admit();
	test_rates();
	test_throughput();
	test_reserve();
	test_spend();
	test_ready();
	test_configure();
	test_clock();
	test_seed();
	test_shared_rates();
	return done_testing();
}
