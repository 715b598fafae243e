/*
 * notify.h
 *		NOTIFY sentdm_status: who listens learns that a status has changed.
 */
#ifndef SENTDM_NOTIFY_H
#define SENTDM_NOTIFY_H

#include "sql.h"

/*
 * A statement that changes statuses, and what it has to return for those who
 * listen: the message's id, uuid, and its status, text.
 */
typedef struct SentdmNotifying
{
	SentdmStatement plain;
	const char *returning;
	SentdmStatement notifying;	/* made of both at the first use */
} SentdmNotifying;

/*
 * Run the statement, which has no arguments, and with sentdm.notify have its changes
 * announced at commit; it costs nothing without.  Needs an SPI connection.
 */
extern void sentdm_execute_notifying(SentdmNotifying *statement);

#endif							/* SENTDM_NOTIFY_H */
