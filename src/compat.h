/*
 * compat.h
 *		Differences between PostgreSQL versions, and nothing else.
 */
#ifndef SENTDM_COMPAT_H
#define SENTDM_COMPAT_H

#if PG_VERSION_NUM < 150000
#error "sentdm needs PostgreSQL 15 or later"
#endif

/* 18 has it before the declaration. */
#if PG_VERSION_NUM < 180000
#define pg_noreturn pg_attribute_noreturn()
#endif

/* 16 moved VARDATA() and its like out of postgres.h. */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/* 16 moved memory of settings from plain malloc() to a context of its own. */
#if PG_VERSION_NUM >= 160000
#define sentdm_guc_alloc(size) guc_malloc(LOG, size)
#define sentdm_guc_strdup(s) guc_strdup(LOG, s)
#define sentdm_guc_free(p) guc_free(p)
#else
#define sentdm_guc_alloc(size) malloc(size)
#define sentdm_guc_strdup(s) strdup(s)
#define sentdm_guc_free(p) free(p)
#endif

/* 17 replaced backend ids by proc numbers and made events of a set explicit. */
#if PG_VERSION_NUM >= 170000
#define SentdmCreateWaitEventSet(n) CreateWaitEventSet(CurrentResourceOwner, n)
#define sentdm_proc_number() MyProcNumber
#else
#define SentdmCreateWaitEventSet(n) CreateWaitEventSet(TopMemoryContext, n)
#define sentdm_proc_number() (MyProc->pgprocno)
#endif

/* Minor releases of 2025 tell "none" from "not known yet", when the setting decides. */
#ifdef SYNC_STANDBY_DEFINED
#define sentdm_sync_standbys_defined() \
	((WalSndCtl->sync_standbys_status & SYNC_STANDBY_DEFINED) != 0 || \
	 ((WalSndCtl->sync_standbys_status & SYNC_STANDBY_INIT) == 0 && \
	  SyncRepStandbyNames != NULL && SyncRepStandbyNames[0] != '\0'))
#else
#define sentdm_sync_standbys_defined() (WalSndCtl->sync_standbys_defined)
#endif

/* 16 lets callbacks of the JSON parser stop it; 17 lets its state live elsewhere. */
#if PG_VERSION_NUM >= 160000
#define SENTDM_JSON_CALLBACK JsonParseErrorType
#define SENTDM_JSON_GO_ON return JSON_SUCCESS
#else
#define SENTDM_JSON_CALLBACK void
#define SENTDM_JSON_GO_ON return
#endif

#if PG_VERSION_NUM >= 170000
#define sentdm_json_lexer(text, length) \
	makeJsonLexContextCstringLen(NULL, text, length, PG_UTF8, true)
#else
#define sentdm_json_lexer(text, length) \
	makeJsonLexContextCstringLen(text, length, PG_UTF8, true)
#endif

/* 16 keeps permissions apart from the range table; 18 prunes it. */
#if PG_VERSION_NUM >= 180000
#define sentdm_init_range_table(estate, entry) \
	do { \
		List	   *permissions = NIL; \
		addRTEPermissionInfo(&permissions, entry); \
		ExecInitRangeTable(estate, list_make1(entry), permissions, bms_make_singleton(1)); \
	} while (0)
#elif PG_VERSION_NUM >= 160000
#define sentdm_init_range_table(estate, entry) \
	do { \
		List	   *permissions = NIL; \
		addRTEPermissionInfo(&permissions, entry); \
		ExecInitRangeTable(estate, list_make1(entry), permissions); \
	} while (0)
#else
#define sentdm_init_range_table(estate, entry) ExecInitRangeTable(estate, list_make1(entry))
#endif

/* 16 has indexes that only summarize; 18 lets a row be in conflict with itself. */
#if PG_VERSION_NUM >= 160000
#define sentdm_insert_index_tuples(info, slot, estate, lost, arbiters) \
	list_free(ExecInsertIndexTuples(info, slot, estate, false, true, lost, arbiters, false))
#else
#define sentdm_insert_index_tuples(info, slot, estate, lost, arbiters) \
	list_free(ExecInsertIndexTuples(info, slot, estate, false, true, lost, arbiters))
#endif
#if PG_VERSION_NUM >= 180000
#define sentdm_check_unique(info, slot, estate, arbiters) \
	ExecCheckIndexConstraints(info, slot, estate, &(ItemPointerData) {0}, &(ItemPointerData) {0}, arbiters)
#else
#define sentdm_check_unique(info, slot, estate, arbiters) \
	ExecCheckIndexConstraints(info, slot, estate, &(ItemPointerData) {0}, arbiters)
#endif

#endif							/* SENTDM_COMPAT_H */
