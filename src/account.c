/*
 * account.c
 *		The account that a worker sends for: its key, its URL, and its pauses.
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "utils/timestamp.h"

#include "account.h"
#include "clock.h"
#include "sentdm.h"
#include "share.h"

#define KEY_POLL_MS 5000

SentdmDrainSettings
sentdm_drain_settings(void)
{
	SentdmDrainSettings settings;

	settings.max_in_flight = sentdm_max_in_flight;
	settings.requests = sentdm_rate_limit();
	settings.messages = sentdm_message_rate_limit();
	settings.retry_min_ms = sentdm_retry_min_ms;
	settings.retry_max_ms = Max(sentdm_retry_min_ms, sentdm_retry_max_ms);
	settings.give_up_after_ms = (int64) sentdm_give_up_after_s * 1000;
	settings.uncertain_after_ms = (int64) sentdm_uncertain_after_s * 1000;
	return settings;
}

static uint64
hash_text(const char *text, uint64 seed)
{
	return hash_bytes_extended((const unsigned char *) text, (int) strlen(text), seed);
}

/*
 * A pause remembers what was in force when the request was made that led to it:
 * settings may have changed while that was under way, and then it is worth
 * another try.
 */
static uint64
hash_of_address(void)
{
	return hash_text(sentdm_ca_file, hash_text(sentdm_base_url, 0));
}

void
sentdm_account_count_call(const char *key)
{
	SentdmDrainSettings settings = sentdm_drain_settings();

	sentdm_share_spend(hash_text(key, hash_of_address()), &settings, sentdm_clock_us());
}

static void
pause_for_settings(SentdmAccount *account, const char *key, const char *why)
{
	SentdmFlight *flight = account->flight;

	if (flight->drain.pause != SENTDM_PAUSE_NONE)
		return;
	sentdm_drain_pause(&flight->drain, SENTDM_PAUSE_CREDENTIALS, -1, sentdm_clock_us());
	flight->new_pause = SENTDM_PAUSE_CREDENTIALS;
	flight->probe_after_ms = -1;
	flight->paused_hash = (int64) hash_text(key, hash_of_address());
	strlcpy(flight->report.trouble, why, sizeof(flight->report.trouble));
}

/* The same, of the pause that is on, which may not be stored yet. */
static int64
hash_of_pause(const SentdmAccount *account)
{
	return account->flight->new_pause != SENTDM_PAUSE_NONE ? account->flight->paused_hash :
		account->sender.key_hash;
}

bool
sentdm_account_paused_for_key(const SentdmAccount *account)
{
	SentdmPause pause = account->flight->drain.pause;

	return pause == SENTDM_PAUSE_CREDENTIALS || pause == SENTDM_PAUSE_FORBIDDEN ||
		pause == SENTDM_PAUSE_CERTIFICATE;
}

static void
resume(SentdmFlight *flight)
{
	sentdm_share_lock(&flight->drain.rates);
	sentdm_drain_resume(&flight->drain, sentdm_clock_us());
	sentdm_share_unlock(&flight->drain.rates);
}

/*
 * The key, URL or CA file that requests use may be another one.  One that is not
 * known to be good is tried by one request.
 */
static void
use_access(SentdmAccount *account)
{
	SentdmFlight *flight = account->flight;
	int64		access_hash = (int64) hash_text(flight->api_key, account->address_hash);

	if (access_hash == flight->access_hash)
		return;
	flight->access_hash = access_hash;
	flight->report.account = sentdm_share_attach((uint64) access_hash, &flight->drain.rates);
	if (!sentdm_share_is_proven() && flight->drain.pause == SENTDM_PAUSE_NONE)
		resume(flight);
}

void
sentdm_account_hear(SentdmAccount *account)
{
	SentdmFlight *flight = account->flight;
	int64		now_us = sentdm_clock_us();
	int64		probe_after_ms;
	SentdmNews	news;

	if (!sentdm_share_news(&news) || flight->drain.pause == SENTDM_PAUSE_USER)
		return;
	probe_after_ms = news.probe_at_us == INT64_MAX ? -1 : Max((news.probe_at_us - now_us) / 1000, 0);
	if (news.pause != SENTDM_PAUSE_NONE)
	{
		if (flight->drain.pause == SENTDM_PAUSE_NONE)
		{
			flight->new_pause = news.pause;
			flight->probe_after_ms = probe_after_ms;
			flight->paused_hash = flight->access_hash;
			flight->unpause = false;
		}
		sentdm_drain_pause(&flight->drain, news.pause, probe_after_ms, now_us);
	}
	else if (flight->drain.pause != SENTDM_PAUSE_NONE)
	{
		resume(flight);
		flight->new_pause = SENTDM_PAUSE_NONE;
		flight->unpause = true;
	}
}

void
sentdm_account_read_key(SentdmAccount *account)
{
	SentdmFlight *flight = account->flight;
	char		key[SENTDM_MAX_KEY];
	const char *trouble = sentdm_read_api_key(key);

	account->key_read_at = GetCurrentTimestamp();
	if (trouble == NULL)
		trouble = sentdm_http_check_url(sentdm_base_url, sentdm_allow_insecure_http);
	if (trouble != NULL)
		pause_for_settings(account, key, trouble);
	else if (sentdm_account_paused_for_key(account) &&
			 (int64) hash_text(key, hash_of_address()) != hash_of_pause(account))
	{
		resume(flight);
		flight->unpause = true;
		flight->new_pause = SENTDM_PAUSE_NONE;
	}
	memcpy(flight->api_key, key, sizeof(key));
	use_access(account);
	explicit_bzero(key, sizeof(key));
}

bool
sentdm_account_key_is_due(const SentdmAccount *account)
{
	return sentdm_account_paused_for_key(account) &&
		TimestampDifferenceExceeds(account->key_read_at, GetCurrentTimestamp(), KEY_POLL_MS);
}

static SentdmHttpOptions
http_options(int max_in_flight)
{
	SentdmHttpOptions options;

	/* With an unusable URL nothing is sent: reading the key pauses for it. */
	options.base_url = sentdm_http_check_url(sentdm_base_url, sentdm_allow_insecure_http) ?
		"https://api.sent.dm" : sentdm_base_url;
	options.ca_file = sentdm_ca_file;
	options.user_agent = "sentdm/" SENTDM_VERSION " PostgreSQL/" PG_MAJORVERSION;
	options.insecure_http = sentdm_allow_insecure_http;
	options.max_in_flight = max_in_flight;
	options.connect_timeout_ms = sentdm_connect_timeout_ms;
	options.request_timeout_ms = sentdm_request_timeout_ms;
	return options;
}

static void
raise_unless_opened(const void *http)
{
	if (http == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("could not start the HTTP client"),
				 errhint("Memory, descriptors or threads are exhausted.")));
}

SentdmHttp *
sentdm_account_http(void)
{
	SentdmHttpOptions options = http_options(1);
	SentdmHttp *http = sentdm_http_create(&options);

	raise_unless_opened(http);
	return http;
}

void
sentdm_account_open_http(SentdmAccount *account)
{
	SentdmHttpOptions options = http_options(sentdm_max_in_flight);
	SentdmFlight *flight = account->flight;

	sentdm_http_thread_destroy(flight->http);
	flight->http = sentdm_http_thread_create(&options);
	raise_unless_opened(flight->http);
	account->address_hash = hash_of_address();
	/* At the start the key comes next. */
	if (flight->access_hash != 0)
		use_access(account);
}

void
sentdm_account_follow_sender(SentdmAccount *account)
{
	SentdmDrain *drain = &account->flight->drain;
	const SentdmSender *sender = &account->sender;

	if (sender->pause != SENTDM_PAUSE_NONE)
	{
		/* A pause that a good answer has just ended is still in the row. */
		if (sender->pause != drain->pause &&
			!(account->flight->unpause && sender->pause != SENTDM_PAUSE_USER))
			sentdm_drain_pause(drain, sender->pause, sender->probe_after_ms, sentdm_clock_us());
	}
	else if (drain->pause != SENTDM_PAUSE_NONE && account->flight->new_pause == SENTDM_PAUSE_NONE)
	{
		resume(account->flight);
		sentdm_account_read_key(account);
	}
}

bool
sentdm_account_is_unsettled(const SentdmAccount *account)
{
	return account->flight->new_pause != SENTDM_PAUSE_NONE || account->flight->unpause;
}

static const char *
pause_reason(const SentdmAccount *account)
{
	const SentdmFlight *flight = account->flight;

	switch (flight->new_pause)
	{
		case SENTDM_PAUSE_CREDENTIALS:
			return flight->report.trouble[0] ? flight->report.trouble :
				"Sent does not accept the API key";
		case SENTDM_PAUSE_FORBIDDEN:
			return "the account may not send, or the base URL is not the API's";
		case SENTDM_PAUSE_SUSPENDED:
			return "the account is suspended";
		case SENTDM_PAUSE_BALANCE:
			return "the account has no credit";
		case SENTDM_PAUSE_QUOTA:
			return "the account's quota is used up";
		case SENTDM_PAUSE_CERTIFICATE:
			return "the certificate of the API is not trusted";
		default:
			return "paused";
	}
}

void
sentdm_account_store_pause(SentdmAccount *account)
{
	SentdmFlight *flight = account->flight;

	if (flight->new_pause != SENTDM_PAUSE_NONE)
	{
		account->sender.key_hash = flight->paused_hash;
		sentdm_sender_pause(flight->new_pause, pause_reason(account), flight->probe_after_ms,
							account->sender.key_hash);
	}
	else if (flight->unpause)
		sentdm_sender_unpause();
}

void
sentdm_account_announce_pause(SentdmAccount *account)
{
	SentdmFlight *flight = account->flight;

	if (flight->new_pause != SENTDM_PAUSE_NONE)
	{
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("sentdm has paused sending: %s", pause_reason(account)),
				 errhint("See sentdm.problems and sentdm_health(); sentdm_resume() tries again.")));
		if (flight->report.trouble[0] == '\0')
			strlcpy(flight->report.trouble, pause_reason(account), sizeof(flight->report.trouble));
	}
	flight->new_pause = SENTDM_PAUSE_NONE;
	flight->unpause = false;
}
