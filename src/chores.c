/*
 * chores.c
 *		What a worker asks Sent besides sending.
 *
 * What to ask for is refresh.c's and endpoint.c's to say, and what becomes of the
 * answers.
 *
 * There is never more than one request under way, each counts for the rate as a
 * bulk message does, and no transaction is open meanwhile.  If the process dies,
 * the same is asked again.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "answer.h"
#include "chores.h"
#include "clock.h"
#include "payload.h"
#include "queue.h"
#include "sentdm.h"
#include "share.h"
#include "sql.h"

#define MOST_FAILURES 3			/* of one request, until it is left alone */
#define LARGEST_ANSWER (16 * 1024 * 1024)

typedef enum Verdict
{
	GOOD,
	REFUSED,					/* this key may not ask */
	HOPELESS,					/* there is no such thing, or the like */
	LATER
} Verdict;

/* Asking */

static char *
uuid_text(const pg_uuid_t *uuid)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(uuid)));
}

/* If the rates allow a request that has the least priority, it counts. */
static bool
take_from_rates(SentdmDrain *drain)
{
	bool		may;

	sentdm_share_lock(&drain->rates);
	may = sentdm_drain_quota(drain, SENTDM_BULK, sentdm_clock_us()) > 0;
	if (may)
		sentdm_drain_spend(drain, sentdm_clock_us());
	sentdm_share_unlock(&drain->rates);
	return may;
}

static bool
submit(SentdmChores *chores, const char *method, const char *path, const char *body, const char *profile_id)
{
	SentdmHttpRequest request;

	memset(&request, 0, sizeof(request));
	request.method = method;
	request.path = path;
	request.api_key = chores->flight->api_key;
	request.profile_id = profile_id;
	request.body = body;
	request.body_length = body ? strlen(body) : 0;
	request.max_answer = LARGEST_ANSWER;
	request.deadline_unix_us = INT64_MAX;
	return sentdm_http_submit(chores->http, &request);
}

static void
ask(SentdmChores *chores)
{
	const SentdmToRefresh *delivery = &chores->refresh.batch[chores->refresh.next];
	const char *id = uuid_text(&chores->endpoint.id);

	switch (chores->chore)
	{
		case SENTDM_REFRESH:
			chores->asking = submit(chores, "GET", psprintf("/v3/messages/%s", uuid_text(&delivery->sent_id)),
									NULL, delivery->profile_id[0] ? delivery->profile_id : NULL);
			break;
		case SENTDM_LOOK_AT_WEBHOOK:
			chores->asking = submit(chores, "GET", psprintf("/v3/webhooks/%s", id), NULL, NULL);
			break;
		case SENTDM_REACTIVATE_WEBHOOK:
			chores->asking = submit(chores, "PATCH", psprintf("/v3/webhooks/%s/toggle-status", id),
									"{\"is_active\": true}", NULL);
			break;
		case SENTDM_READ_EVENTS:
			chores->asking = submit(chores, "GET", psprintf("/v3/webhooks/%s/events?page=%d&page_size=100", id,
															chores->endpoint.page), NULL, NULL);
			break;
		case SENTDM_NO_CHORE:
			break;
	}
	if (chores->asking)
	{
		sentdm_http_run(chores->http);

		/*
		 * Perhaps it has failed, or was answered, already: nothing wakes us
		 * then.
		 */
		chores->result = sentdm_http_next_result(chores->http);
	}
	else
		chores->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sentdm_retry_max_ms);
}

static Verdict
judge(const SentdmHttpResult *result)
{
	SentdmAnswer answer;

	if (result->transport != SENTDM_ANSWERED || result->http_status == 408 || result->http_status == 429 ||
		result->http_status >= 500)
		return LATER;
	if (result->http_status == 401 || result->http_status == 403)
		return REFUSED;
	if (result->http_status < 200 || result->http_status > 299)
		return HOPELESS;
	sentdm_answer_parse(result->body, result->body_length, &answer);
	return answer.success ? GOOD : LATER;
}

/* Taking answers */

/* Within a transaction; NULL: it cannot be stored. */
static Jsonb *
parse(const SentdmHttpResult *result)
{
	const char *reason;

	return sentdm_payload_parse(result->body, result->body_length, &reason);
}

typedef struct Taken
{
	SentdmChores *chores;
	const SentdmHttpResult *result;
	Verdict		verdict;
	SentdmChore next;			/* what follows from it */
} Taken;

static SentdmChore
take_refreshed(SentdmRefresh *refresh, Jsonb *answer)
{
	if (answer != NULL)
		sentdm_refresh_store(refresh, answer);
	if (refresh->next + 1 < refresh->n)
		return SENTDM_REFRESH;
	sentdm_refresh_finish(refresh);
	return SENTDM_NO_CHORE;
}

static SentdmChore
take_webhook(SentdmChores *chores, const SentdmHttpResult *result, Jsonb *answer)
{
	static const SentdmChore chore_for[] = {
		[SENTDM_ENDPOINT_DONE] = SENTDM_NO_CHORE,
		[SENTDM_ENDPOINT_ACTIVATION] = SENTDM_REACTIVATE_WEBHOOK,
		[SENTDM_ENDPOINT_EVENTS] = SENTDM_READ_EVENTS
	};

	if (answer == NULL && !(chores->chore == SENTDM_LOOK_AT_WEBHOOK && result->http_status == 404))
	{
		sentdm_endpoint_checked(&chores->endpoint);
		return SENTDM_NO_CHORE;
	}
	if (chores->chore == SENTDM_LOOK_AT_WEBHOOK)
		return chore_for[sentdm_endpoint_store(&chores->endpoint, answer)];
	if (chores->chore == SENTDM_READ_EVENTS)
		return chore_for[sentdm_endpoint_events(&chores->endpoint, answer)];
	sentdm_endpoint_reactivated(&chores->endpoint);
	return SENTDM_READ_EVENTS;
}

static void
take_body(void *arg)
{
	Taken	   *taken = arg;
	Jsonb	   *answer;

	SPI_connect();
	answer = taken->verdict == GOOD ? parse(taken->result) : NULL;
	taken->next = taken->chores->chore == SENTDM_REFRESH ?
		take_refreshed(&taken->chores->refresh, answer) : take_webhook(taken->chores, taken->result, answer);
	SPI_finish();
	sentdm_commit_may_be_lost();
}

/* What can be learned from an answer is stored, and decides what is next. */
static void
take(SentdmChores *chores, const SentdmHttpResult *result)
{
	Taken		taken = {chores, result, judge(result), SENTDM_NO_CHORE};

	chores->asking = false;
	if (taken.verdict == LATER && ++chores->failures < MOST_FAILURES)
	{
		chores->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sentdm_retry_max_ms);
		return;
	}
	if (taken.verdict == REFUSED)
	{
		/* 403 is about what was asked for, 401 about the key. */
		for (int i = 0; i < SENTDM_CHORES; i++)
		{
			if (i == chores->chore || result->http_status == 401)
				chores->refused[i] = chores->flight->access_hash;
		}
		chores->chore = SENTDM_NO_CHORE;
		return;
	}
	/* If it cannot be stored, the same is asked again, later. */
	if (!sentdm_transact(&chores->backoff, take_body, &taken))
		return;
	chores->failures = 0;
	if (chores->chore == SENTDM_REFRESH)
		chores->refresh.next++;
	chores->chore = taken.next;
}

/* What is next */

static bool
may(const SentdmChores *chores, SentdmChore chore)
{
	return chores->refused[chore] == 0 || chores->refused[chore] != chores->flight->access_hash;
}

static void
find_body(void *arg)
{
	SentdmChores *chores = arg;
	TimestampTz now = GetCurrentTimestamp();

	chores->due = DT_NOEND;
	SPI_connect();
	if (sentdm_check_webhook_s > 0 && may(chores, SENTDM_LOOK_AT_WEBHOOK) && sentdm_endpoint_find(&chores->endpoint, now, &chores->due))
		chores->chore = SENTDM_LOOK_AT_WEBHOOK;
	else if (sentdm_refresh_after_s > 0 && may(chores, SENTDM_REFRESH) && sentdm_refresh_find(&chores->refresh, now, &chores->due))
	{
		if (chores->refresh.n > 0)
			chores->chore = SENTDM_REFRESH;
		else
			sentdm_refresh_finish(&chores->refresh);
		chores->due = DT_NOBEGIN;
	}
	if (chores->chore != SENTDM_NO_CHORE)
		chores->due = DT_NOBEGIN;
	SPI_finish();
	sentdm_commit_may_be_lost();
}

static void
find(SentdmChores *chores)
{
	chores->failures = 0;
	if (!sentdm_transact(&chores->backoff, find_body, chores))
	{
		chores->chore = SENTDM_NO_CHORE;
		chores->due = chores->backoff.until;
	}
}

void
sentdm_chores_run(SentdmChores *chores, bool may_ask)
{
	/* Also in between: a connection that ends makes the descriptor readable. */
	sentdm_http_run(chores->http);
	if (chores->result == NULL)
		chores->result = sentdm_http_next_result(chores->http);
	if (chores->result != NULL)
		take(chores, chores->result);
	sentdm_http_free_result(chores->result);
	chores->result = NULL;
	if (chores->asking || !may_ask)
		return;
	if (sentdm_backing_off(&chores->backoff) || chores->flight->drain.pause != SENTDM_PAUSE_NONE)
		return;
	if (chores->chore == SENTDM_NO_CHORE && chores->due <= GetCurrentTimestamp())
		find(chores);
	if (chores->chore != SENTDM_NO_CHORE && chores->not_before <= GetCurrentTimestamp() &&
		sentdm_share_take() && take_from_rates(&chores->flight->drain))
		ask(chores);
}

void
sentdm_chores_open(SentdmChores *chores)
{
	sentdm_http_free_result(chores->result);
	chores->result = NULL;
	sentdm_http_destroy(chores->http);
	chores->http = NULL;
	chores->http = sentdm_account_http();
	chores->asking = false;
	sentdm_chores_look(chores);
}

void
sentdm_chores_look(SentdmChores *chores)
{
	if (!chores->asking)
		chores->chore = SENTDM_NO_CHORE;
	chores->due = DT_NOBEGIN;
}

void
sentdm_chores_expect(SentdmChores *chores)
{
	if (sentdm_refresh_after_s > 0)
		chores->due = Min(chores->due, GetCurrentTimestamp() + sentdm_refresh_age_us());
}

TimestampTz
sentdm_chores_next_due(const SentdmChores *chores)
{
	if (chores->asking)
		return DT_NOBEGIN;
	return chores->chore != SENTDM_NO_CHORE ? chores->not_before : chores->due;
}

long
sentdm_chores_wait_ms(const SentdmChores *chores)
{
	SentdmDrain *drain = &chores->flight->drain;
	int64_t		ready_us;
	long		wait_ms;

	if (chores->result != NULL)
		return 0;
	if (chores->asking || chores->flight->drain.pause != SENTDM_PAUSE_NONE)
		return SENTDM_LONGEST_WAIT_MS;
	if (sentdm_backing_off(&chores->backoff))
		return sentdm_ms_until(chores->backoff.until);
	wait_ms = sentdm_ms_until(sentdm_chores_next_due(chores));
	if (chores->chore == SENTDM_NO_CHORE)
		return wait_ms;
	/* Another worker tries the key: it will set the latch. */
	if (!sentdm_share_is_free())
		return SENTDM_LONGEST_WAIT_MS;
	sentdm_share_lock(&drain->rates);
	ready_us = sentdm_drain_ready_us(drain, SENTDM_BULK, sentdm_clock_us());
	sentdm_share_unlock(&drain->rates);
	return Max(wait_ms, sentdm_ms_until_us(ready_us));
}
