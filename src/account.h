/*
 * account.h
 *		The account that a worker sends for: its key, its URL, and whether it is
 *		paused.
 *
 * A pause lives in three places, each for its reason: in the drain (which stops
 * at once), in sentdm.sender (which outlives the worker and tells people), and
 * in the log (once).
 */
#ifndef SENTDM_ACCOUNT_H
#define SENTDM_ACCOUNT_H

#include "control.h"
#include "datatype/timestamp.h"
#include "flight.h"

typedef struct SentdmAccount
{
	SentdmFlight *flight;
	SentdmSender sender;		/* as it was last read */
	TimestampTz key_read_at;
	uint64		address_hash;	/* of the URL and CA file of the HTTP client */
} SentdmAccount;

/* The settings that drive the drain. */
extern SentdmDrainSettings sentdm_drain_settings(void);

/*
 * A session calls the API with this key: it counts for the rate that the workers
 * keep to, and does not wait for it.
 */
extern void sentdm_account_count_call(const char *key);

/*
 * Read the key that is in force.  None that is usable pauses; a changed one (or
 * base URL, or CA file) ends a pause that was made because of the old one.
 */
extern void sentdm_account_read_key(SentdmAccount *account);

/* Is it time to see whether the key has changed? */
extern bool sentdm_account_key_is_due(const SentdmAccount *account);

/* Would a changed key, base URL or CA file help? */
extern bool sentdm_account_paused_for_key(const SentdmAccount *account);

/*
 * Take over what an answer to a worker of another database said about the
 * account, if there is anything new.
 */
extern void sentdm_account_hear(SentdmAccount *account);

/*
 * An HTTP client for one request at a time, under the present settings.  Both raise
 * an error when there are no means for it.
 */
extern SentdmHttp *sentdm_account_http(void);

/* A new one for the flight, with a thread; nothing may be under way. */
extern void sentdm_account_open_http(SentdmAccount *account);

/* Take over what sentdm.sender says, which was just read into account->sender. */
extern void sentdm_account_follow_sender(SentdmAccount *account);

/* Is a change of the pause not stored yet? */
extern bool sentdm_account_is_unsettled(const SentdmAccount *account);

/* Within a transaction: store it.  After its commit: say it. */
extern void sentdm_account_store_pause(SentdmAccount *account);
extern void sentdm_account_announce_pause(SentdmAccount *account);

#endif							/* SENTDM_ACCOUNT_H */
