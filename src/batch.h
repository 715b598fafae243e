/*
 * batch.h
 *		One item of sentdm_send_batch().
 */
#ifndef SENTDM_BATCH_H
#define SENTDM_BATCH_H

#include "message.h"

/*
 * Read a JSON object keyed by the argument names of sentdm_send().  False fills
 * the complaint; true clears it.  Memory comes from the current context.
 */
extern bool sentdm_draft_from_item(SentdmDraft *draft, JsonbValue *item,
								   SentdmComplaint *complaint);

#endif							/* SENTDM_BATCH_H */
