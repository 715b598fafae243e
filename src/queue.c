/*
 * queue.c
 *		The worker's transactions with the queue: what ended is settled, what comes
 *		next is claimed.
 *
 * One transaction does both, because each costs more than the rows in it, and a
 * claim has to wait for the disk anyway.  If it fails, nothing was claimed and
 * the outcomes are still in memory.  An outcome may be lost in a crash: the same
 * key brings the same answer.  So what is only settled does not wait.
 */
#include "postgres.h"

#include <limits.h>

#include "commands/extension.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "clock.h"
#include "failpoint.h"
#include "outbox.h"
#include "queue.h"
#include "sentdm.h"
#include "share.h"
#include "shmem.h"

#define LOCKED_ROW_POLL_MS 200
#define LOOK_BACK_US 1000000

/* Outcomes wait for others for so long, unless there are so many. */
#define SETTLE_WITHIN_US 5000
#define SETTLE_AT_ONCE 1024

void
sentdm_queue_take_over(SentdmQueue *queue)
{
	int64		suspects;
	int64		rescued;

	sentdm_begin();
	sentdm_commit_to_disk();
	sentdm_sender_adopt();
	rescued = sentdm_outbox_rescue(&suspects);
	sentdm_commit();
	queue->flight->suspects = (int) Min(suspects, INT_MAX);
	sentdm_count(queue->flight->slot, SENTDM_COUNT_RESCUED, rescued);
	if (rescued > 0)
		ereport(LOG,
				(errmsg("sentdm worker took over %lld requests of a worker that ended early",
						(long long) rescued)));
}

/*
 * Where to look.
 *
 * Rows that were sent are dead, and stay in the index until a vacuum has been;
 * while an old snapshot is held, each scan would even read all of them.  So a
 * lane is looked at from the place of the last row that was claimed.  Rows may
 * come to lie before it: those of a transaction that began early and committed
 * late (it says so when it commits), and those that we give back ourselves.  A
 * row that somebody had locked is the one thing that nobody tells us: for that we
 * look from the beginning now and then, as often as it costs little, and before
 * we believe that there is nothing more to do.
 */

static void
step_back(SentdmQueue *queue, SentdmLane lane, TimestampTz due_at)
{
	if (due_at <= queue->from[lane].due_at)
	{
		queue->from[lane].due_at = due_at;
		queue->from[lane].position = 0;
	}
}

static void
step_forward(SentdmQueue *queue, SentdmLane lane, const SentdmMessage *last)
{
	queue->from[lane] = last->place;
	if (queue->look_back_us == INT64_MAX)
		queue->look_back_us = sentdm_clock_us() + Max(LOOK_BACK_US, 20 * queue->look_cost_us);
}

static void
look_back(SentdmQueue *queue)
{
	memcpy(queue->reached, queue->from, sizeof(queue->reached));
	sentdm_queue_look(queue, DT_NOBEGIN);
}

/* Nothing lies before that place that is not claimed. */
static void
go_on(SentdmQueue *queue, SentdmLane lane)
{
	if (queue->from[lane].due_at == DT_NOBEGIN && queue->due[lane] > queue->reached[lane].due_at)
		queue->from[lane] = queue->reached[lane];
}

void
sentdm_queue_look(SentdmQueue *queue, TimestampTz earliest)
{
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		queue->due[lane] = DT_NOBEGIN;
		step_back(queue, lane, earliest);
	}
	if (earliest == DT_NOBEGIN)
		queue->look_back_us = INT64_MAX;
}

/* Settling */

bool
sentdm_queue_is_unsettled(const SentdmQueue *queue)
{
	return queue->flight->n_outcomes > 0 || sentdm_account_is_unsettled(queue->account);
}

static bool
nothing_in_hand(const SentdmFlight *flight)
{
	return flight->under_way == 0 && sentdm_flight_ready(flight, SENTDM_LANES - 1) == 0;
}

/* In how many microseconds the outcomes are to be stored; 0: now. */
static int64
settle_in_us(const SentdmQueue *queue)
{
	const SentdmFlight *flight = queue->flight;

	if (nothing_in_hand(flight) || sentdm_account_is_unsettled(queue->account) ||
		flight->n_outcomes + flight->n_sent >= SETTLE_AT_ONCE)
		return 0;
	return Max(flight->ended_us + SETTLE_WITHIN_US - sentdm_clock_us(), 0);
}

/* Retries and parts are in the queue again, perhaps due at once. */
static void
look_for_returning(SentdmQueue *queue)
{
	SentdmFlight *flight = queue->flight;
	TimestampTz now = GetCurrentTimestamp();

	for (int i = 0; i < flight->n_outcomes; i++)
	{
		const SentdmMessage *message = flight->outcomes[i].message;
		SentdmAction action = flight->outcomes[i].decision.action;

		if (action != SENTDM_DO_RETRY && action != SENTDM_DO_RELEASE && action != SENTDM_DO_SPLIT)
			continue;
		queue->due[message->lane] = DT_NOBEGIN;
		step_back(queue, message->lane, action == SENTDM_DO_RELEASE ? message->place.due_at : now);
	}
}

/* Claiming */

static size_t
room_in_hand(const SentdmQueue *queue)
{
	return SENTDM_IN_HAND_BYTES - Min(queue->flight->bytes, SENTDM_IN_HAND_BYTES);
}

/* How many messages such as those of the last claim have room.  Bulk leaves a share. */
static int
affordable(const SentdmQueue *queue, SentdmLane lane, size_t room_bytes)
{
	if (lane == SENTDM_BULK)
		room_bytes -= Min(room_bytes, SENTDM_IN_HAND_BYTES / 8);
	return (int) Min(room_bytes / Max(queue->message_bytes, 1), INT_MAX);
}

/* How many messages of a lane to claim now; 0: no use in asking. */
static int
wanted(const SentdmQueue *queue, SentdmLane lane, TimestampTz now)
{
	SentdmFlight *flight = queue->flight;
	int			ready = sentdm_flight_ready(flight, lane) + queue->n_claimed;
	int			startable;
	int			claimable;

	if (queue->due[lane] > now || !sentdm_share_is_free())
		return 0;
	sentdm_share_lock(&flight->drain.rates);
	startable = sentdm_drain_quota(&flight->drain, lane, sentdm_clock_us());
	claimable = sentdm_drain_claimable(&flight->drain, lane, ready, sentdm_clock_us());
	sentdm_share_unlock(&flight->drain.rates);

	/*
	 * Those that may have killed the worker go alone, so that no other is
	 * blamed.
	 */
	if (flight->suspects > 0)
		return nothing_in_hand(flight) && queue->n_claimed == 0 ? Min(startable, 1) : 0;
	return Min(claimable, affordable(queue, lane, queue->room_bytes));
}

/* Where a lane was empty, remember when to look again. */
static void
note_next_due(SentdmQueue *queue, SentdmLane lane, bool claimed, TimestampTz now)
{
	queue->due[lane] = sentdm_outbox_next_due(lane, &queue->from[lane],
											  sentdm_mode == SENTDM_MODE_SANDBOX);
	go_on(queue, lane);
	/* Due, yet not claimed: locked by somebody, who may let go of it. */
	if (queue->due[lane] <= now && !claimed)
		queue->due[lane] = TimestampTzPlusMilliseconds(now, LOCKED_ROW_POLL_MS);
}

static void
claim(SentdmQueue *queue)
{
	TimestampTz now = GetCurrentTimestamp();
	int64		began_us = sentdm_clock_us();
	bool		looked_back = false;

	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		int			limit = Min(wanted(queue, lane, now), queue->room - queue->n_claimed);
		int			n;

		if (limit <= 0)
			continue;
		looked_back |= queue->from[lane].due_at == DT_NOBEGIN;
		n = sentdm_outbox_claim(lane, &queue->from[lane], limit, sentdm_mode == SENTDM_MODE_SANDBOX,
								&queue->room_bytes, queue->memory, queue->claimed + queue->n_claimed);
		queue->n_claimed += n;
		if (n < limit)
			note_next_due(queue, lane, n > 0, now);
	}
	if (looked_back)
		queue->look_cost_us = sentdm_clock_us() - began_us;
}

/* Both */

static void
exchange_body(void *arg)
{
	SentdmQueue *queue = arg;
	SentdmFlight *flight = queue->flight;

	queue->n_claimed = 0;
	/* Dropped, perhaps made anew: these outcomes belong to no one any more. */
	queue->gone = get_extension_oid("sentdm", true) != queue->extension;
	if (queue->gone)
		return;
	if (flight->n_outcomes > 0)
		sentdm_outbox_settle(flight->outcomes, flight->n_outcomes);
	sentdm_account_store_pause(queue->account);
	if (queue->room > 0)
		claim(queue);
	if (queue->n_claimed > 0)
		sentdm_commit_to_disk();
	else
		sentdm_commit_may_be_lost();
	if (queue->n_claimed > 0)
		SENTDM_FAILPOINT("before-claim-commit");
	if (flight->n_outcomes > 0)
		SENTDM_FAILPOINT("before-settle-commit");
}

static void
take_claimed(SentdmQueue *queue)
{
	size_t		bytes = 0;

	for (int i = 0; i < queue->n_claimed; i++)
	{
		SentdmMessage *message = queue->claimed[i];

		sentdm_flight_take(queue->flight, message);
		step_forward(queue, message->lane, message);
		bytes += message->bytes;
		if (message->body != NULL)
			pfree(message->body);
	}
	if (queue->n_claimed > 0)
		queue->message_bytes = bytes / queue->n_claimed;
}

static void
settle_last_body(void *arg)
{
	SentdmFlight *flight = ((SentdmQueue *) arg)->flight;

	sentdm_outbox_settle(&flight->outcomes[flight->n_outcomes - 1], 1);
	sentdm_commit_may_be_lost();
}

static void
settle_last_without_triggers_body(void *arg)
{
	sentdm_without_triggers(false);
	settle_last_body(arg);
}

/*
 * A trigger of the user's that raises an error must cost no more than its own
 * effect: the outcomes are stored one by one, and the one that it refuses without
 * it.  What may pass is left to the next exchange.
 */
static void
settle_one_by_one(SentdmQueue *queue)
{
	SentdmFlight *flight = queue->flight;

	while (flight->n_outcomes > 0)
	{
		const SentdmMessage *message = flight->outcomes[flight->n_outcomes - 1].message;

		if (!sentdm_transact(&queue->backoff, settle_last_body, queue))
		{
			int			sqlstate = queue->backoff.sqlstate;

			if (sentdm_error_may_pass(sqlstate) ||
				!sentdm_transact(&queue->backoff, settle_last_without_triggers_body, queue))
				return;
			ereport(WARNING,
					(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
					 errmsg("the outcome of message %s was stored without firing triggers, because one raised an error (SQLSTATE %s)",
							DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&message->id))),
							unpack_sql_state(sqlstate)),
					 errhint("Look at your triggers on the tables of sentdm.")));
		}
		sentdm_flight_settled_last(flight);
	}
}

static bool
exchange(SentdmQueue *queue)
{
	queue->memory = CurrentMemoryContext;
	queue->claimed = palloc(Max(queue->room, 1) * sizeof(SentdmMessage *));
	if (!sentdm_transact(&queue->backoff, exchange_body, queue))
	{
		/* What it found out about the queue is not so, either. */
		sentdm_queue_look(queue, DT_NOBEGIN);
		if (!sentdm_error_may_pass(queue->backoff.sqlstate))
			settle_one_by_one(queue);
		return false;
	}
	if (queue->n_claimed > 0)
		SENTDM_FAILPOINT("after-claim-commit");
	if (queue->flight->n_outcomes > 0)
		SENTDM_FAILPOINT("after-settle-commit");
	sentdm_account_announce_pause(queue->account);
	sentdm_flight_settled(queue->flight);
	take_claimed(queue);
	/* Only what the standby knows of may leave. */
	if (queue->n_claimed > 0 && !sentdm_wait_for_standby())
		sentdm_flight_release(queue->flight);
	return !queue->gone;
}

bool
sentdm_queue_exchange(SentdmQueue *queue, bool may_claim)
{
	TimestampTz now = GetCurrentTimestamp();

	if (sentdm_backing_off(&queue->backoff))
		return true;
	look_for_returning(queue);
	if (queue->look_back_us <= sentdm_clock_us())
		look_back(queue);
	queue->room = 0;
	queue->room_bytes = room_in_hand(queue);
	queue->n_claimed = 0;
	for (int lane = 0; lane < SENTDM_LANES && may_claim; lane++)
		queue->room += wanted(queue, lane, now);
	if (queue->room == 0 && !(sentdm_queue_is_unsettled(queue) && settle_in_us(queue) == 0))
		return true;
	return exchange(queue);
}

void
sentdm_queue_settle(SentdmQueue *queue)
{
	queue->room = 0;
	if (sentdm_queue_is_unsettled(queue))
		(void) exchange(queue);
}

static void
abandon_body(void *arg)
{
	SentdmQueue *queue = arg;

	if (get_extension_oid("sentdm", true) == queue->extension)
		sentdm_outbox_abandon();
}

void
sentdm_queue_abandon(SentdmQueue *queue)
{
	(void) sentdm_transact(&queue->backoff, abandon_body, queue);
}

/* Waiting */

TimestampTz
sentdm_queue_next_due(SentdmQueue *queue, bool hurry)
{
	TimestampTz next = DT_NOEND;

	if (queue->look_back_us != INT64_MAX)
	{
		if (hurry)
			queue->look_back_us = 0;
		return DT_NOBEGIN;
	}
	for (int lane = 0; lane < SENTDM_LANES; lane++)
		next = Min(next, queue->due[lane]);
	return next;
}

long
sentdm_ms_until(TimestampTz when)
{
	TimestampTz now = GetCurrentTimestamp();

	/* Infinities first: a difference with one of them overflows. */
	if (when <= now)
		return 0;
	if (when == DT_NOEND)
		return SENTDM_LONGEST_WAIT_MS;
	return Min(TimestampDifferenceMilliseconds(now, when), SENTDM_LONGEST_WAIT_MS);
}

long
sentdm_ms_until_us(int64_t when_us)
{
	if (when_us == INT64_MAX)
		return SENTDM_LONGEST_WAIT_MS;
	return (long) Min(Max((when_us - sentdm_clock_us() + 999) / 1000, 0), SENTDM_LONGEST_WAIT_MS);
}

/* When something of this lane can be claimed or started. */
static long
lane_wait_ms(const SentdmQueue *queue, SentdmLane lane)
{
	SentdmFlight *flight = queue->flight;
	long		wait_ms = flight->n_ready[lane] > 0 ? 0 : sentdm_ms_until(queue->due[lane]);
	int64		ready_us;

	if (wait_ms == SENTDM_LONGEST_WAIT_MS || (flight->suspects > 0 && !nothing_in_hand(flight)))
		return SENTDM_LONGEST_WAIT_MS;
	/* When an answer comes there will be. */
	if (flight->n_ready[lane] == 0 && affordable(queue, lane, room_in_hand(queue)) == 0)
		return SENTDM_LONGEST_WAIT_MS;
	/* Another worker tries the key: it will set the latch. */
	if (!sentdm_share_is_free())
		return SENTDM_LONGEST_WAIT_MS;
	sentdm_share_lock(&flight->drain.rates);
	ready_us = sentdm_drain_ready_us(&flight->drain, lane, sentdm_clock_us());
	sentdm_share_unlock(&flight->drain.rates);
	return Max(wait_ms, sentdm_ms_until_us(ready_us));
}

long
sentdm_queue_wait_ms(const SentdmQueue *queue, bool may_claim)
{
	long		wait_ms = SENTDM_LONGEST_WAIT_MS;

	if (sentdm_backing_off(&queue->backoff))
		return sentdm_ms_until(queue->backoff.until);
	if (sentdm_queue_is_unsettled(queue))
		wait_ms = (settle_in_us(queue) + 999) / 1000;
	if (may_claim)
		wait_ms = Min(wait_ms, sentdm_ms_until_us(queue->look_back_us));
	for (int lane = 0; lane < SENTDM_LANES && may_claim; lane++)
		wait_ms = Min(wait_ms, lane_wait_ms(queue, lane));
	return wait_ms;
}
