/*
 * control.h
 *		sentdm.sender: who this database is, and whether it may send.
 */
#ifndef SENTDM_CONTROL_H
#define SENTDM_CONTROL_H

#include "request.h"

typedef struct SentdmSender
{
	bool		installed;		/* the extension is there */
	bool		enabled;		/* sentdm_enable() was called, and
								 * sentdm_disable() not since */
	const char *fence;			/* static text why this database must not
								 * send; NULL: it may */
	SentdmPause pause;
	int64_t		probe_after_ms; /* from now; -1: only after a person acted */
	int64_t		settings_hash;	/* of what ALTER DATABASE and ALTER ROLE say
								 * to a process like this */
	int64_t		key_hash;		/* of the API key that was in force when it
								 * paused */
} SentdmSender;

/* All of these need a transaction. */
extern void sentdm_sender_read(SentdmSender *sender);

/*
 * There is no fence: from now on this is what the database looks like, after a
 * promotion or an upgrade.
 */
extern void sentdm_sender_adopt(void);

/*
 * There is a fence: if it says that this database is a copy, keep that in mind,
 * as pg_upgrade changes what tells it.
 */
extern void sentdm_sender_note_copy(const char *fence);

/*
 * Store a pause that the worker makes, unless a person paused already.
 * probe_after_ms: -1: only after a person acted.  key_hash tells a later worker
 * whether the key has changed since.
 */
extern void sentdm_sender_pause(SentdmPause pause, const char *reason, int64_t probe_after_ms,
								int64_t key_hash);

/* Remove a pause that the worker made itself: a request went well. */
extern void sentdm_sender_unpause(void);

/*
 * Put messages that are queued, but have no place in the queue, back into it: all
 * of them, or those of an array of ids (uuid[]); under a new key, or only where
 * the request has to differ from an earlier one.  Needs an SPI connection;
 * returns how many requests that makes.
 */
extern uint64 sentdm_requeue(Datum message_ids, bool all, bool new_key);

#endif							/* SENTDM_CONTROL_H */
