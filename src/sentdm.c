/*
 * sentdm.c
 *		Module entry point: settings and registration.
 *
 * Secrets are special.  PostgreSQL writes a changed setting into the server log
 * at a reload, and a rejected one too; both must never happen to a key.  So the
 * check hook of a secret accepts everything, hands the real text to the assign
 * hook through "extra", and replaces the value that PostgreSQL sees, shows and
 * compares by stars.
 */
#include "postgres.h"

#include <limits.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"

#include "commands.h"
#include "compat.h"
#include "insert.h"
#include "launcher.h"
#include "send.h"
#include "sentdm.h"
#include "shmem.h"

PG_MODULE_MAGIC;

#define STARS "********"

/* A limit that can be written as 100/minute; the parsed form of a setting. */
typedef struct RateUnit
{
	const char *name;
	int64_t		window_us;
} RateUnit;

static const RateUnit rate_units[] = {
	{"second", INT64CONST(1000000)},
	{"minute", INT64CONST(60000000)},
	{"hour", INT64CONST(3600000000)},
	{"day", INT64CONST(86400000000)},
};

static const struct config_enum_entry mode_options[] = {
	{"live", SENTDM_MODE_LIVE, false},
	{"sandbox", SENTDM_MODE_SANDBOX, false},
	{"hold", SENTDM_MODE_HOLD, false},
	{NULL, 0, false}
};

static const struct config_enum_entry on_opt_out_options[] = {
	{"skip", SENTDM_OPT_OUT_SKIP, false},
	{"refuse", SENTDM_OPT_OUT_REFUSE, false},
	{"send", SENTDM_OPT_OUT_SEND, false},
	{NULL, 0, false}
};

char	   *sentdm_api_key_file;
char	   *sentdm_base_url;
char	   *sentdm_ca_file;
bool		sentdm_allow_insecure_http;
int			sentdm_mode = SENTDM_MODE_LIVE;
char	   *sentdm_environment;
int			sentdm_max_in_flight;
int			sentdm_connect_timeout_ms;
int			sentdm_request_timeout_ms;
int			sentdm_retry_min_ms;
int			sentdm_retry_max_ms;
int			sentdm_give_up_after_s;
int			sentdm_uncertain_after_s;
int			sentdm_webhook_tolerance_s;
int			sentdm_webhook_max_age_s;
bool		sentdm_webhook_legacy_signature;
int			sentdm_retention_s;
int			sentdm_body_retention_s;
int			sentdm_refresh_after_s;
int			sentdm_max_per_transaction;
bool		sentdm_check_templates;
int			sentdm_on_opt_out = SENTDM_OPT_OUT_SKIP;
int			sentdm_idle_timeout_ms;
bool		sentdm_notify;
bool		sentdm_log_requests;
bool		sentdm_reactivate_webhook;
int			sentdm_check_webhook_s;
bool		sentdm_preloaded = false;

/* What SHOW sees (stars), and the text behind it. */
static char *api_key_shown;
static char *webhook_secret_shown;
static const char *api_key = "";
static const char *webhook_secret = "";

static char *rate_limit_text;
static char *message_rate_limit_text;
static SentdmRate rate_limit;
static SentdmRate message_rate_limit;

static bool database_enabled;	/* read by the launcher in the catalog only */

void		_PG_init(void);

/*
 * Move the secret from the setting's value into "extra".  Stars stand for the
 * value that is in force already: that is how it reaches a parallel worker.
 */
static bool
hide_secret(char **newval, void **extra, const char *current)
{
	const char *secret = strcmp(*newval, STARS) == 0 ? current : *newval;
	char	   *kept = sentdm_guc_strdup(secret);
	char	   *stars = sentdm_guc_strdup(STARS);

	if (kept == NULL || stars == NULL)
		return false;
	sentdm_guc_free(*newval);
	*newval = stars;
	*extra = kept;
	return true;
}

static bool
check_api_key(char **newval, void **extra, GucSource source)
{
	return hide_secret(newval, extra, api_key);
}

static void
assign_api_key(const char *newval, void *extra)
{
	api_key = extra;
}

static bool
check_webhook_secret(char **newval, void **extra, GucSource source)
{
	return hide_secret(newval, extra, webhook_secret);
}

static void
assign_webhook_secret(const char *newval, void *extra)
{
	webhook_secret = extra;
}

const char *
sentdm_api_key_setting(void)
{
	return api_key;
}

const char *
sentdm_webhook_secret_setting(void)
{
	const char *value;

	if (webhook_secret[0] != '\0')
		return webhook_secret;
	value = getenv("SENT_DM_WEBHOOK_SECRET");
	return value ? value : "";
}

/* "100/minute", "off" or "" */
static bool
parse_rate(const char *text, SentdmRate *rate)
{
	char	   *end;
	long long	amount;

	rate->amount = 0;
	rate->window_us = 0;
	if (text[0] == '\0' || pg_strcasecmp(text, "off") == 0)
		return true;
	errno = 0;
	amount = strtoll(text, &end, 10);
	if (errno != 0 || end == text ||amount < 1 || amount > INT_MAX || *end != '/')
		return false;
	end++;
	for (int i = 0; i < lengthof(rate_units); i++)
	{
		if (pg_strcasecmp(end, rate_units[i].name) == 0)
		{
			rate->amount = amount;
			rate->window_us = rate_units[i].window_us;
			return true;
		}
	}
	return false;
}

static bool
check_rate(char **newval, void **extra, GucSource source)
{
	SentdmRate *rate = sentdm_guc_alloc(sizeof(SentdmRate));

	if (rate == NULL)
		return false;
	if (!parse_rate(*newval, rate))
	{
		sentdm_guc_free(rate);
		GUC_check_errhint("Write it as \"10000/minute\" (second, minute, hour or day), or \"off\".");
		return false;
	}
	*extra = rate;
	return true;
}

static void
assign_rate_limit(const char *newval, void *extra)
{
	rate_limit = *(SentdmRate *) extra;
}

static void
assign_message_rate_limit(const char *newval, void *extra)
{
	message_rate_limit = *(SentdmRate *) extra;
}

SentdmRate
sentdm_rate_limit(void)
{
	return rate_limit;
}

SentdmRate
sentdm_message_rate_limit(void)
{
	return message_rate_limit;
}

const char *
sentdm_mode_name(int mode)
{
	for (const struct config_enum_entry *option = mode_options; option->name; option++)
	{
		if (option->val == mode)
			return option->name;
	}
	return "";
}

/*
 * Whether plain http is allowed depends on another setting, which may be read
 * later; that is checked where the URL is used.  User names are refused,
 * because a URL may be shown.
 */
static bool
check_base_url(char **newval, void **extra, GucSource source)
{
	const char *url = *newval;

	if ((strncmp(url, "https://", 8) != 0 && strncmp(url, "http://", 7) != 0) ||
		strpbrk(url, "@ \t\r\n?#\"") != NULL)
	{
		GUC_check_errhint("Use a URL such as https://api.sent.dm, without user name, query or fragment.");
		return false;
	}
	return true;
}

static void
define_secrets(void)
{
	DefineCustomStringVariable("sentdm.api_key",
							   "The API key; shown as stars.",
							   "Settable in the configuration file only. sentdm.api_key_file keeps it out of there.",
							   &api_key_shown, "", PGC_SIGHUP,
							   GUC_DISALLOW_IN_AUTO_FILE | GUC_NOT_IN_SAMPLE,
							   check_api_key, assign_api_key, NULL);
	DefineCustomStringVariable("sentdm.webhook_secret",
							   "Signing secret of webhooks, beside those of sentdm_set_webhook_secret(); shown as stars.",
							   NULL,
							   &webhook_secret_shown, "", PGC_SIGHUP,
							   GUC_DISALLOW_IN_AUTO_FILE | GUC_NOT_IN_SAMPLE,
							   check_webhook_secret, assign_webhook_secret, NULL);
	DefineCustomStringVariable("sentdm.api_key_file",
							   "File that holds the API key, protected like a TLS key file.",
							   NULL,
							   &sentdm_api_key_file, "", PGC_SIGHUP,
							   GUC_SUPERUSER_ONLY | GUC_DISALLOW_IN_AUTO_FILE,
							   NULL, NULL, NULL);
}

static void
define_connection_settings(void)
{
	const char *base_url = getenv("SENT_DM_BASE_URL");

	DefineCustomStringVariable("sentdm.base_url", "URL of the API; https, except in tests.", NULL,
							   &sentdm_base_url,
							   base_url && base_url[0] ? base_url : "https://api.sent.dm",
							   PGC_SIGHUP, 0, check_base_url, NULL, NULL);
	DefineCustomStringVariable("sentdm.ca_file",
							   "File of certificates to trust instead of the system's.", NULL,
							   &sentdm_ca_file, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.allow_insecure_http",
							 "Allow http:// to a loopback address, for tests.", NULL,
							 &sentdm_allow_insecure_http, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.connect_timeout", "Longest time that connecting may take.", NULL,
							&sentdm_connect_timeout_ms, 10000, 100, 600000, PGC_SIGHUP,
							GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.request_timeout", "Longest time that a request may take.", NULL,
							&sentdm_request_timeout_ms, 30000, 100, 600000, PGC_SIGHUP,
							GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.max_in_flight", "Most requests under way at once.", NULL,
							&sentdm_max_in_flight, 64, 1, 4096, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("sentdm.rate_limit", "Most requests in a second, minute, hour or day, such as 10000/minute, or off.", NULL,
							   &rate_limit_text, "10000/minute", PGC_SIGHUP, 0,
							   check_rate, assign_rate_limit, NULL);
	DefineCustomStringVariable("sentdm.message_rate_limit", "Most recipients in a second, minute, hour or day, such as 300/minute, or off.", NULL,
							   &message_rate_limit_text, "off", PGC_SIGHUP, 0,
							   check_rate, assign_message_rate_limit, NULL);
	DefineCustomBoolVariable("sentdm.log_requests",
							 "Log one line for each request, without personal data.", NULL,
							 &sentdm_log_requests, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
}

static void
define_queue_settings(void)
{
	DefineCustomEnumVariable("sentdm.mode",
							 "live sends messages, sandbox lets Sent validate them only, hold keeps them in the queue.", NULL,
							 &sentdm_mode, SENTDM_MODE_LIVE, mode_options, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("sentdm.environment",
							   "Name of this installation; a copy under another name does not send.", NULL,
							   &sentdm_environment, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.enabled",
							 "Set by sentdm_enable() for its database; not to be set by hand.", NULL,
							 &database_enabled, false, PGC_SUSET,
							 GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.retry_min", "Shortest time between two attempts.", NULL,
							&sentdm_retry_min_ms, 1000, 10, 3600000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.retry_max", "Longest time between two attempts.", NULL,
							&sentdm_retry_max_ms, 300000, 10, 86400000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.give_up_after", "A message that Sent has put off for so long fails.", NULL,
							&sentdm_give_up_after_s, 72 * 3600, 1, INT_MAX / 1000, PGC_SIGHUP,
							GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.uncertain_after",
							"A message whose outcome is unknown for so long waits for a person.",
							"Sent remembers an Idempotency-Key for 24 hours.",
							&sentdm_uncertain_after_s, 23 * 3600, 1, 23 * 3600 + 1800, PGC_SIGHUP,
							GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.max_per_transaction",
							"Most recipients that one transaction may write to.",
							"A runaway trigger must not text a million people; SET LOCAL raises it.",
							&sentdm_max_per_transaction, 10000, 0, INT_MAX, PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.check_templates",
							 "Refuse an unknown template, or a missing variable, at once.",
							 "Templates are known since sentdm_sync_templates().",
							 &sentdm_check_templates, false, PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("sentdm.on_opt_out",
							 "What to do about a recipient who opted out: skip, refuse or send.", NULL,
							 &sentdm_on_opt_out, SENTDM_OPT_OUT_SKIP, on_opt_out_options, PGC_SUSET, 0,
							 NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.idle_timeout",
							"An idle worker leaves the database after so long.", NULL,
							&sentdm_idle_timeout_ms, 60000, 0, 86400000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.notify", "NOTIFY sentdm_status with ids and statuses.", NULL,
							 &sentdm_notify, false, PGC_SUSET, 0, NULL, NULL, NULL);
}

static void
define_receipt_settings(void)
{
	DefineCustomIntVariable("sentdm.webhook_tolerance", "A webhook event at most so old, or so early, is in time.", NULL,
							&sentdm_webhook_tolerance_s, 300, 0, 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.webhook_max_age",
							"A webhook event older than this is refused; one that is not in time is kept as late.", NULL,
							&sentdm_webhook_max_age_s, 86400, 0, 30 * 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.webhook_legacy_signature",
							 "Accept the older signature scheme too, which does not protect against replay.", NULL,
							 &sentdm_webhook_legacy_signature, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.retention", "Finished messages and events are kept so long; 0: for ever.", NULL,
							&sentdm_retention_s, 90 * 86400, 0, INT_MAX, PGC_SUSET, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.body_retention",
							"Texts and parameters of finished messages are kept so long; -1: as long as the message.", NULL,
							&sentdm_body_retention_s, -1, -1, INT_MAX, PGC_SUSET, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.refresh_after",
							"Ask the API for messages that have no receipt after so long; 0: never.", NULL,
							&sentdm_refresh_after_s, 900, 0, 30 * 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("sentdm.check_webhook",
							"Look so often whether Sent still posts to the webhooks registered here; 0: never.", NULL,
							&sentdm_check_webhook_s, 300, 0, 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomBoolVariable("sentdm.reactivate_webhook",
							 "Have Sent post to a webhook again that it disabled after failures.", NULL,
							 &sentdm_reactivate_webhook, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
}

void
_PG_init(void)
{
	sentdm_preloaded = process_shared_preload_libraries_in_progress;

	define_secrets();
	define_connection_settings();
	define_queue_settings();
	define_receipt_settings();
	MarkGUCPrefixReserved("sentdm");

	sentdm_insert_init();
	sentdm_send_init();
	sentdm_commands_init();
	if (sentdm_preloaded)
	{
		sentdm_shmem_init();
		sentdm_launcher_register();
	}
}
