/*
 * sentdm.h
 *		Settings, and what the files of the extension share about them.
 */
#ifndef SENTDM_H
#define SENTDM_H

#include "drain.h"

#define SENTDM_VERSION "1.0"

typedef enum SentdmMode
{
	SENTDM_MODE_LIVE,
	SENTDM_MODE_SANDBOX,
	SENTDM_MODE_HOLD
}			SentdmMode;

/* What becomes of a message to somebody who opted out. */
typedef enum SentdmOnOptOut
{
	SENTDM_OPT_OUT_SKIP,
	SENTDM_OPT_OUT_REFUSE,
	SENTDM_OPT_OUT_SEND
}			SentdmOnOptOut;

/* sentdm.c: settings; times are in the unit the name says */
extern char *sentdm_api_key_file;
extern char *sentdm_base_url;
extern char *sentdm_ca_file;
extern bool sentdm_allow_insecure_http;
extern int	sentdm_mode;
extern char *sentdm_environment;
extern int	sentdm_max_in_flight;
extern int	sentdm_connect_timeout_ms;
extern int	sentdm_request_timeout_ms;
extern int	sentdm_retry_min_ms;
extern int	sentdm_retry_max_ms;
extern int	sentdm_give_up_after_s;
extern int	sentdm_uncertain_after_s;
extern int	sentdm_webhook_tolerance_s;
extern int	sentdm_webhook_max_age_s;
extern bool sentdm_webhook_legacy_signature;
extern int	sentdm_retention_s;
extern int	sentdm_body_retention_s;
extern int	sentdm_refresh_after_s;
extern int	sentdm_max_per_transaction;
extern bool sentdm_check_templates;
extern int	sentdm_on_opt_out;
extern int	sentdm_idle_timeout_ms;
extern bool sentdm_notify;
extern bool sentdm_log_requests;
extern bool sentdm_reactivate_webhook;
extern int	sentdm_check_webhook_s;

/* The name of a value of sentdm.mode; "" if it is none. */
extern const char *sentdm_mode_name(int mode);

/* True when the library was loaded by shared_preload_libraries. */
extern bool sentdm_preloaded;

/*
 * The secrets behind the stars; "" when not set.  Valid until the next reload;
 * never to be put into a message or a log line.  The webhook secret falls back
 * to SENT_DM_WEBHOOK_SECRET; for the API key, credentials.c looks further.
 */
extern const char *sentdm_api_key_setting(void);
extern const char *sentdm_webhook_secret_setting(void);

/* sentdm.rate_limit and sentdm.message_rate_limit, parsed. */
extern SentdmRate sentdm_rate_limit(void);
extern SentdmRate sentdm_message_rate_limit(void);

#endif							/* SENTDM_H */
