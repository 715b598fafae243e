/*
 * receipt.h
 *		Keep authentic events, and apply what they say to the deliveries.
 */
#ifndef SENTDM_RECEIPT_H
#define SENTDM_RECEIPT_H

#include "event.h"

#define SENTDM_DEDUPE_KEY_LEN 16

typedef struct SentdmReceipt
{
	SentdmEvent event;
	Jsonb	   *payload;		/* or NULL, and instead ... */
	bytea	   *raw;			/* ... the bytes that came ... */
	const char *raw_reason;		/* ... and why only they are kept */
	text	   *webhook_id;		/* signed; NULL: none */
	bool		late;
	uint8		dedupe_key[SENTDM_DEDUPE_KEY_LEN];

	/* Result */
	bool		duplicate;
	int64		id;				/* of the row in sentdm.events; 0: a trigger
								 * refused it */
} SentdmReceipt;

/*
 * Tell the event of a receipt from all others: by its identity, or else by its
 * payload, or the bytes of it.  These are set before.
 */
extern void sentdm_receipt_set_key(SentdmReceipt *receipt);

/*
 * Store new events, and apply their statuses and opt-outs.  Those that are there
 * already are counted as duplicates, or with count_known false left alone, their
 * id 0.  An error of a user's trigger is a WARNING.  Needs a transaction; SPI is handled inside.  Memory of the current
 * context is used.
 */
extern void sentdm_receipts_record(SentdmReceipt *receipts, int n, bool count_known);

/* Only apply what they say about messages, likewise. */
extern void sentdm_receipts_apply(SentdmReceipt *receipts, int n);

#endif							/* SENTDM_RECEIPT_H */
