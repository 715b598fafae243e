/*
 * flight.c
 *		The messages in a worker's hands: from the claim to the outcome.
 *
 * No SQL here and no waiting: worker.c calls in between its transactions.
 */
#include "postgres.h"

#include <limits.h>

#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "flight.h"
#include "share.h"
#include "sentdm.h"

#define UNIX_EPOCH_US ((POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY)

/* What an answer may need beyond its copies: the envelope, or an error page. */
#define ANSWER_BASE (64 * 1024)
#define ANSWER_LIMIT (64 * 1024 * 1024)

static int64
age_ms(TimestampTz since, TimestampTz now)
{
	return since == 0 ? -1 : Max((now - since) / 1000, 0);
}

static SentdmAttempt
attempt_of(const SentdmMessage *message, TimestampTz now)
{
	SentdmAttempt attempt;

	attempt.recipients = message->recipients;
	attempt.attempts = message->attempts;
	attempt.crashes = message->crashes;
	attempt.tried_ms = age_ms(message->first_tried_at, now);
	attempt.ambiguous_ms = age_ms(message->ambiguous_since, now);
	attempt.expires_ms = message->expires_at == DT_NOEND ? INT64_MAX :
		(message->expires_at - now) / 1000;
	attempt.era = message->era;
	return attempt;
}

static SentdmOutcome *
add_outcome(SentdmFlight *flight, SentdmMessage *message, const SentdmDecision *decision)
{
	SentdmOutcome *outcome;

	if (flight->n_outcomes == flight->max_outcomes)
	{
		flight->max_outcomes = Max(64, flight->max_outcomes * 2);
		if (flight->outcomes == NULL)
			flight->outcomes = MemoryContextAlloc(flight->memory,
												  flight->max_outcomes * sizeof(SentdmOutcome));
		else
			flight->outcomes = repalloc(flight->outcomes,
										flight->max_outcomes * sizeof(SentdmOutcome));
	}
	if (flight->n_outcomes == 0)
		flight->ended_us = sentdm_clock_us();
	flight->bytes -= message->bytes;
	outcome = &flight->outcomes[flight->n_outcomes++];
	memset(outcome, 0, sizeof(*outcome));
	outcome->message = message;
	outcome->decision = *decision;
	return outcome;
}

static void
count_outcome(SentdmFlight *flight, SentdmAction action)
{
	switch (action)
	{
		case SENTDM_DO_ACCEPT:
			sentdm_count(flight->slot, SENTDM_COUNT_ACCEPTED, 1);
			break;
		case SENTDM_DO_RETRY:
		case SENTDM_DO_SPLIT:
			sentdm_count(flight->slot, SENTDM_COUNT_RETRIED, 1);
			break;
		case SENTDM_DO_FAIL:
			sentdm_count(flight->slot, SENTDM_COUNT_FAILED, 1);
			break;
		case SENTDM_DO_EXPIRE:
			sentdm_count(flight->slot, SENTDM_COUNT_EXPIRED, 1);
			break;
		case SENTDM_DO_UNCERTAIN:
			sentdm_count(flight->slot, SENTDM_COUNT_UNCERTAIN, 1);
			break;
		case SENTDM_DO_SEND:
		case SENTDM_DO_RELEASE:
			break;
	}
}

static bool
post(SentdmFlight *flight, SentdmMessage *message)
{
	SentdmHttpRequest request;
	char		key[80];
	char	   *id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&message->id)));

	if (message->part == 0)
		snprintf(key, sizeof(key), "sentdm-%s-%d", id, message->generation);
	else
		snprintf(key, sizeof(key), "sentdm-%s-%d-%d", id, message->generation, message->part);
	memset(&request, 0, sizeof(request));
	request.method = "POST";
	request.path = "/v3/messages";
	request.api_key = flight->api_key;
	request.idempotency_key = key;
	request.profile_id = message->profile_id[0] ? message->profile_id : NULL;
	request.body = message->body;
	request.body_length = strlen(message->body);
	request.max_answer = Min(ANSWER_BASE + message->answer_bytes, ANSWER_LIMIT);
	request.deadline_unix_us = message->expires_at == DT_NOEND ? INT64_MAX :
		message->expires_at + UNIX_EPOCH_US;
	request.tag = message;
	pfree(id);
	return sentdm_http_thread_submit(flight->http, &request);
}

/* An outcome without a request having been made. */
static void
end_unsent(SentdmFlight *flight, SentdmMessage *message, const SentdmDecision *decision)
{
	(void) add_outcome(flight, message, decision);
	count_outcome(flight, decision->action);
}

/* An outcome needs the rest only. */
static void
drop_body(SentdmMessage *message)
{
	if (message->body != NULL)
		pfree(message->body);
	message->body = NULL;
}

static SentdmDecision
finish(SentdmFlight *flight, const SentdmAttempt *attempt, const SentdmReply *reply)
{
	SentdmDecision decision;

	sentdm_share_lock(&flight->drain.rates);
	decision = sentdm_drain_finished(&flight->drain, attempt, reply, sentdm_clock_us(),
									 (int64) time(NULL));
	sentdm_share_unlock(&flight->drain.rates);
	return decision;
}

/* Not even handed over: out of memory. */
static void
not_submitted(SentdmFlight *flight, SentdmMessage *message, const SentdmAttempt *attempt)
{
	SentdmReply reply;
	SentdmDecision decision;

	memset(&reply, 0, sizeof(reply));
	reply.transport = SENTDM_NOT_REACHED;
	reply.retry_after_ms = -1;
	decision = finish(flight, attempt, &reply);
	end_unsent(flight, message, &decision);
}

/* It was never POSTed, so the row is to look as it did before the claim. */
static void
give_back(SentdmFlight *flight, SentdmMessage *message)
{
	SentdmDecision decision;

	memset(&decision, 0, sizeof(decision));
	decision.action = SENTDM_DO_RELEASE;
	decision.ambiguous = message->ambiguous_since != 0;
	drop_body(message);
	end_unsent(flight, message, &decision);
}

/* Ready to start */

void
sentdm_flight_take(SentdmFlight *flight, const SentdmMessage *message)
{
	SentdmMessage *kept = MemoryContextAlloc(flight->memory, sizeof(SentdmMessage));
	SentdmLane	lane = message->lane;

	*kept = *message;
	kept->next = NULL;
	kept->taken_us = sentdm_clock_us();
	if (message->body != NULL)
		kept->body = MemoryContextStrdup(flight->memory, message->body);
	flight->bytes += kept->bytes;
	if (message->left_out)
	{
		give_back(flight, kept);
		return;
	}
	if (flight->first_ready[lane] == NULL)
		flight->first_ready[lane] = kept;
	else
		flight->last_ready[lane]->next = kept;
	flight->last_ready[lane] = kept;
	flight->n_ready[lane]++;
}

static SentdmMessage *
next_ready(SentdmFlight *flight, SentdmLane lane)
{
	SentdmMessage *message = flight->first_ready[lane];

	if (message == NULL)
		return NULL;
	flight->first_ready[lane] = message->next;
	flight->n_ready[lane]--;
	return message;
}

int
sentdm_flight_ready(const SentdmFlight *flight, SentdmLane lane)
{
	int			n = 0;

	for (int i = 0; i <= lane; i++)
		n += flight->n_ready[i];
	return n;
}

int64_t
sentdm_flight_ready_since_us(const SentdmFlight *flight)
{
	int64_t		since_us = INT64_MAX;

	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		if (flight->first_ready[lane] != NULL)
			since_us = Min(since_us, flight->first_ready[lane]->taken_us);
	}
	return since_us;
}

void
sentdm_flight_release(SentdmFlight *flight)
{
	SentdmMessage *message;

	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		while ((message = next_ready(flight, lane)) != NULL)
			give_back(flight, message);
	}
}

/* Answers */

static void
note_answer(SentdmFlight *flight, const SentdmHttpResult *result, const SentdmAnswer *answer)
{
	SentdmWorkerReport *report = &flight->report;

	if (result->transport != SENTDM_ANSWERED)
		return;
	report->answered_at = GetCurrentTimestamp();
	report->http_status = result->http_status;
	strlcpy(report->error_code, answer->error_code, sizeof(report->error_code));
	if (result->date_unix != 0)
	{
		/* The header has whole seconds: half a second is no skew. */
		report->clock_skew_ms = (result->date_unix - (int64) time(NULL)) * 1000;
		report->clock_known = true;
	}
}

static SentdmReply
reply_of(const SentdmHttpResult *result, const SentdmAnswer *answer)
{
	SentdmReply reply;

	memset(&reply, 0, sizeof(reply));
	reply.transport = result->transport;
	reply.http_status = result->http_status;
	reply.readable = answer->readable;
	reply.success = answer->success;
	strlcpy(reply.error_code, answer->error_code, sizeof(reply.error_code));
	reply.retry_after_ms = sentdm_retry_after_ms(result->retry_after, result->date_unix);
	return reply;
}

/* One line per request, when wanted: ids and numbers only. */
static void
log_request(const SentdmMessage *message, const SentdmHttpResult *result, const SentdmAnswer *answer)
{
	char	   *id;

	if (!sentdm_log_requests)
		return;
	id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&message->id)));
	ereport(LOG,
			(errmsg("sentdm request: message=%s part=%d status=%d code=%s request_id=%s duration_ms=%lld%s%s",
					id, message->part, result->http_status,
					answer->error_code[0] ? answer->error_code : "-",
					answer->request_id[0] ? answer->request_id : "-",
					(long long) (result->duration_us / 1000),
					result->trouble ? " trouble=" : "", result->trouble ? result->trouble : ""),
			 errhidestmt(true), errhidecontext(true)));
	pfree(id);
}

/* Keep what changed for the whole account, until it is stored. */
static void
note_pause(SentdmFlight *flight, const SentdmMessage *message, SentdmPause before,
		   const SentdmDecision *decision)
{
	if (decision->pause != SENTDM_PAUSE_NONE)
	{
		flight->new_pause = decision->pause;
		flight->probe_after_ms = decision->probe_after_ms;
		flight->paused_hash = message->access_hash;
		flight->unpause = false;
		sentdm_count(flight->slot, SENTDM_COUNT_PAUSES, 1);
	}
	else if (before != SENTDM_PAUSE_NONE && flight->drain.pause == SENTDM_PAUSE_NONE)
		flight->unpause = true;
}

/* Sent looked at the message itself, so it knows the key. */
static bool
proves_key(const SentdmReply *reply, const SentdmDecision *decision)
{
	return decision->action == SENTDM_DO_ACCEPT ||
		(reply->readable && decision->error_code == NULL &&
		 (decision->action == SENTDM_DO_FAIL || decision->action == SENTDM_DO_SPLIT));
}

/* Other databases send under the same key; unless it was changed meanwhile. */
static void
tell_others(const SentdmFlight *flight, const SentdmMessage *message,
			const SentdmReply *reply, const SentdmDecision *decision)
{
	if (message->access_hash != flight->access_hash)
		return;
	if (decision->pause != SENTDM_PAUSE_NONE)
		sentdm_share_pause(decision->pause, flight->drain.probe_at_us);
	else if (message->era == flight->drain.era && flight->drain.pause == SENTDM_PAUSE_NONE &&
			 proves_key(reply, decision))
		sentdm_share_prove();
}

static void
count_trouble(SentdmFlight *flight, const SentdmReply *reply)
{
	if (reply->transport == SENTDM_ANSWERED && reply->http_status == 429)
		sentdm_count(flight->slot, SENTDM_COUNT_RATE_LIMITED, 1);
	if (reply->transport == SENTDM_NOT_REACHED || reply->transport == SENTDM_BAD_CERTIFICATE)
		sentdm_count(flight->slot, SENTDM_COUNT_UNREACHED, 1);
}

/* The parser's memory is reset soon; what an outcome needs must outlive it. */
static void
keep_answer(SentdmFlight *flight, SentdmAnswer *kept, const SentdmAnswer *answer)
{
	*kept = *answer;
	if (answer->error != NULL)
		kept->error = MemoryContextStrdup(flight->memory, answer->error);
	kept->sent = NULL;
	if (answer->n_sent > 0)
	{
		kept->sent = MemoryContextAlloc(flight->memory, answer->sent_bytes);
		memcpy(kept->sent, answer->sent, answer->sent_bytes);
	}
}

static void
conclude(SentdmFlight *flight, const SentdmHttpResult *result)
{
	SentdmMessage *message = result->tag;
	SentdmAttempt attempt = attempt_of(message, GetCurrentTimestamp());
	SentdmPause pause_before = flight->drain.pause;
	SentdmOutcome *outcome;
	SentdmAnswer answer;
	SentdmReply reply;
	SentdmDecision decision;

	sentdm_answer_parse(result->body, result->transport == SENTDM_ANSWERED ? result->body_length : 0,
						&answer);
	if (answer.error == NULL && result->trouble != NULL)
		answer.error = pstrdup(result->trouble);
	if (answer.request_id[0] == '\0')
		strlcpy(answer.request_id, result->request_id, sizeof(answer.request_id));
	reply = reply_of(result, &answer);
	decision = finish(flight, &attempt, &reply);
	if (decision.action != SENTDM_DO_ACCEPT)
		answer.n_sent = 0;
	note_answer(flight, result, &answer);
	note_pause(flight, message, pause_before, &decision);
	tell_others(flight, message, &reply, &decision);
	count_trouble(flight, &reply);
	count_outcome(flight, decision.action);
	log_request(message, result, &answer);

	outcome = add_outcome(flight, message, &decision);
	outcome->http_status = result->http_status;
	keep_answer(flight, &outcome->answer, &answer);
	flight->n_sent += answer.n_sent;
}

void
sentdm_flight_collect(SentdmFlight *flight)
{
	MemoryContext parsing = AllocSetContextCreate(CurrentMemoryContext, "sentdm answer", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(parsing);
	const SentdmHttpResult *result;

	sentdm_http_thread_run(flight->http);
	while ((result = sentdm_http_thread_next_result(flight->http)) != NULL)
	{
		flight->under_way--;
		conclude(flight, result);
		MemoryContextReset(parsing);
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(parsing);
}

/* If the rates allow it, it counts as started at once: others use them, too. */
static bool
take_from_rates(SentdmFlight *flight, const SentdmMessage *message, bool starts)
{
	bool		may;

	sentdm_share_lock(&flight->drain.rates);
	may = sentdm_drain_quota(&flight->drain, message->lane, sentdm_clock_us()) > 0;
	if (may && starts)
		sentdm_drain_started(&flight->drain, message->recipients, sentdm_clock_us());
	sentdm_share_unlock(&flight->drain.rates);
	return may;
}

/*
 * Decide on the first message of a lane anew, for its time may be over, and POST
 * it if it may go.  False: none of this lane may, now.
 */
static bool
start(SentdmFlight *flight, SentdmLane lane)
{
	SentdmMessage *message = flight->first_ready[lane];
	SentdmAttempt attempt = attempt_of(message, GetCurrentTimestamp());
	SentdmDecision decision = sentdm_drain_admit(&flight->drain, &attempt);

	if (message->body == NULL)
	{
		/* The message was deleted by hand: so is its place in the queue. */
		decision.action = SENTDM_DO_FAIL;
		decision.error_code = "deleted";
	}
	if (!sentdm_share_take() ||
		!take_from_rates(flight, message, decision.action == SENTDM_DO_SEND))
		return false;
	(void) next_ready(flight, lane);
	if (decision.action != SENTDM_DO_SEND)
	{
		drop_body(message);
		end_unsent(flight, message, &decision);
		return true;
	}
	message->access_hash = flight->access_hash;
	message->era = attempt.era = flight->drain.era;
	if (!post(flight, message))
	{
		drop_body(message);
		not_submitted(flight, message, &attempt);
		return true;
	}
	/* The client has a copy. */
	drop_body(message);
	flight->under_way++;
	sentdm_count(flight->slot, SENTDM_COUNT_REQUESTS, 1);
	return true;
}

void
sentdm_flight_start(SentdmFlight *flight)
{
	int			before = flight->under_way;

	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		while (flight->n_ready[lane] > 0 && start(flight, lane))
			;
	}
	/* They leave when they have been handed over. */
	if (flight->under_way > before)
		sentdm_flight_collect(flight);
}

static void
free_answer(SentdmAnswer *answer)
{
	if (answer->error != NULL)
		pfree(answer->error);
	if (answer->sent != NULL)
		pfree(answer->sent);
}

void
sentdm_flight_settled_last(SentdmFlight *flight)
{
	SentdmOutcome *outcome = &flight->outcomes[--flight->n_outcomes];

	if (outcome->message->crashes > 1 && flight->suspects > 0 &&
		outcome->decision.action != SENTDM_DO_RELEASE)
		flight->suspects--;
	flight->n_sent -= outcome->answer.n_sent;
	free_answer(&outcome->answer);
	pfree(outcome->message);
}

void
sentdm_flight_settled(SentdmFlight *flight)
{
	while (flight->n_outcomes > 0)
		sentdm_flight_settled_last(flight);
}
