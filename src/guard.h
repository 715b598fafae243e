/*
 * guard.h
 *		What only the database knows against a message: an unknown template, a
 *		recipient who does not want it.
 */
#ifndef SENTDM_GUARD_H
#define SENTDM_GUARD_H

#include "message.h"

/*
 * Is there anything to look up for a checked draft?  Costs next to nothing when
 * templates are not checked and nobody has opted out.
 */
extern bool sentdm_guard_is_needed(const SentdmDraft *draft);

/*
 * Check the template, and leave out or refuse recipients who opted out;
 * draft->opted_out counts them.  To be called with the rights of the tables'
 * owner.  False fills the complaint.
 */
extern bool sentdm_guard(SentdmDraft *draft, SentdmComplaint *complaint);

#endif							/* SENTDM_GUARD_H */
