/*
 * send.h
 *		Enqueueing, and the wake-up at commit.
 */
#ifndef SENTDM_SEND_H
#define SENTDM_SEND_H

#include "compat.h"
#include "message.h"
#include "nodes/pg_list.h"

/* Register the transaction callbacks; once per process. */
extern void sentdm_send_init(void);

/*
 * Check and store a message in the current transaction, with the rights of the
 * owner of the SQL function that was called.  Returns the ids (pg_uuid_t *, in
 * the caller's context), NIL for no recipients; on bad input NIL with
 * complaint->message set, which is NULL otherwise.  Raises an error when the
 * transaction is read-only or has too many recipients.
 */
extern List *sentdm_enqueue(SentdmDraft *draft, Oid function, SentdmComplaint *complaint);

/* A NOTICE when recipients were left out because they opted out; without numbers. */
extern void sentdm_report_opted_out(const SentdmDraft *draft);

/* A complaint as an error. */
pg_noreturn extern void sentdm_raise(const SentdmComplaint *complaint);

/*
 * At commit of the current transaction: tell the worker that a pause, resume or
 * retry changed the queue; resume also ends what other databases know of a pause
 * of the account, enable or disable also changes who is served.
 */
extern void sentdm_control_at_commit(void);
extern void sentdm_resume_at_commit(void);
extern void sentdm_enable_at_commit(bool enabled);

/*
 * At commit of the current transaction: settings of databases or roles changed,
 * which running workers have to look at.
 */
extern void sentdm_settings_at_commit(void);

/* At commit of the current transaction: there is work for the worker. */
extern void sentdm_wake_at_commit(void);

#endif							/* SENTDM_SEND_H */
