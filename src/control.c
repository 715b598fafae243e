/*
 * control.c
 *		sentdm.sender: who this database is, and whether it may send.
 *
 * A copy of a database carries this row too.  It then describes another database
 * than the one it is in, and that is the fence: nothing is sent until an
 * administrator enables the copy.  What must not make a difference is a failover
 * (the same cluster, promoted) and pg_upgrade (which keeps database oids, and
 * changes the system identifier and the major version together).  The identifier
 * alone changes when pg_createsubscriber makes a copy of a standby; and for a
 * copy that is upgraded later, the worker notes what it found.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "replication/logicalworker.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "control.h"
#include "recovery.h"
#include "send.h"
#include "sentdm.h"
#include "sql.h"

PG_FUNCTION_INFO_V1(sentdm_enable);
PG_FUNCTION_INFO_V1(sentdm_disable);
PG_FUNCTION_INFO_V1(sentdm_pause);
PG_FUNCTION_INFO_V1(sentdm_resume);
PG_FUNCTION_INFO_V1(sentdm_fence);
PG_FUNCTION_INFO_V1(sentdm_ignore_applied);

/* What sentdm_enable() does with messages that a copy carries. */
typedef enum Pending
{
	PENDING_HOLD,
	PENDING_SEND,
	PENDING_DISCARD
} Pending;

/* What no restart and no changed setting can undo. */
enum
{
	COPY_OF_DATABASE, COPY_OF_CLUSTER, COPY_OF_THE_PAST, COPIES
};

static const char *const copy_texts[COPIES] = {
	"this database is a copy of another database",
	"this database is a copy from another cluster",
	"this database was restored to a point in time"
};

static const char *
setting_text(const char *value)
{
	return value ? value : "";
}

/* What a worker noted, as a text that stays; NULL: nothing. */
static const char *
found_copy(const char *noted)
{
	if (noted == NULL)
		return NULL;
	for (int i = 0; i < COPIES; i++)
	{
		if (strcmp(noted, copy_texts[i]) == 0)
			return copy_texts[i];
	}
	return "this database is a copy";
}

/* Compare the row's idea of this database with the truth. */
static const char *
compare_identity(HeapTuple row, TupleDesc desc)
{
	bool		isnull;
	int64		system_identifier = DatumGetInt64(SPI_getbinval(row, desc, 1, &isnull));
	Oid			database = DatumGetObjectId(SPI_getbinval(row, desc, 2, &isnull));
	char	   *cluster = TextDatumGetCString(SPI_getbinval(row, desc, 3, &isnull));
	char	   *environment = TextDatumGetCString(SPI_getbinval(row, desc, 4, &isnull));
	int			version = DatumGetInt32(SPI_getbinval(row, desc, 5, &isnull));
	TimeLineID	timeline = DatumGetInt32(SPI_getbinval(row, desc, 10, &isnull));
	bool		upgraded = PG_VERSION_NUM / 10000 > version / 10000;
	const char *found = found_copy(SPI_getvalue(row, desc, 11));

	if (found != NULL)
		return found;
	if (database != MyDatabaseId)
		return copy_texts[COPY_OF_DATABASE];
	if (system_identifier != (int64) GetSystemIdentifier() && !upgraded)
		return copy_texts[COPY_OF_CLUSTER];
	if (!RecoveryInProgress() && !upgraded &&
		sentdm_recovery_made_copy(timeline, GetWALInsertionTimeLine()))
		return copy_texts[COPY_OF_THE_PAST];
	if (strcmp(cluster, setting_text(cluster_name)) != 0)
		return "cluster_name differs from the one that was enabled";
	if (strcmp(environment, setting_text(sentdm_environment)) != 0)
		return "sentdm.environment differs from the one that was enabled";
	return NULL;
}

/* The row of sentdm.sender is in SPI_tuptable afterwards; false: there is none. */
static bool
fetch_sender(void)
{
	static SentdmStatement fetch = {
		.sql = "SELECT system_identifier, database_oid, cluster_name, environment, server_version,"
		" enabled, pause_kind, probe_at, paused_key, timeline, copy_of FROM sentdm.sender"
	};

	return sentdm_execute(&fetch, NULL, NULL) > 0;
}

static void
read_pause(SentdmSender *sender, HeapTuple row, TupleDesc desc)
{
	char	   *kind = SPI_getvalue(row, desc, 7);
	bool		isnull;
	Datum		probe_at = SPI_getbinval(row, desc, 8, &isnull);

	if (kind == NULL)
		return;
	sender->pause = sentdm_pause_from_name(kind);
	if (!isnull)
		sender->probe_after_ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(),
																 DatumGetTimestampTz(probe_at));
	sender->key_hash = DatumGetInt64(SPI_getbinval(row, desc, 9, &isnull));
}

/* What a worker that starts now would take over from the catalog. */
static int64
hash_of_settings(void)
{
	static SentdmStatement fetch = {
		.sql = "SELECT pg_catalog.hashtextextended(pg_catalog.string_agg(setconfig::text, ' '"
		"   ORDER BY setdatabase, setrole), 0) FROM pg_catalog.pg_db_role_setting"
		"  WHERE setdatabase IN (0, $1) AND setrole IN (0, $2)",
		.nargs = 2,
		.types = {OIDOID, OIDOID}
	};
	Datum		values[2];
	Datum		hash;
	bool		isnull;

	values[0] = ObjectIdGetDatum(MyDatabaseId);
	values[1] = ObjectIdGetDatum(BOOTSTRAP_SUPERUSERID);
	sentdm_execute(&fetch, values, NULL);
	hash = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return isnull ? 0 : DatumGetInt64(hash);
}

void
sentdm_sender_read(SentdmSender *sender)
{
	Oid			schema = get_namespace_oid("sentdm", true);

	memset(sender, 0, sizeof(*sender));
	sender->probe_after_ms = -1;
	sender->installed = OidIsValid(get_extension_oid("sentdm", true)) &&
		OidIsValid(schema) && OidIsValid(get_relname_relid("sender", schema));
	if (!sender->installed)
		return;
	SPI_connect();
	if (fetch_sender())
	{
		HeapTuple	row = SPI_tuptable->vals[0];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		bool		isnull;

		sender->enabled = DatumGetBool(SPI_getbinval(row, desc, 6, &isnull));
		sender->fence = compare_identity(row, desc);
		read_pause(sender, row, desc);
	}
	sender->settings_hash = hash_of_settings();
	SPI_finish();
}

void
sentdm_sender_pause(SentdmPause pause, const char *reason, int64_t probe_after_ms, int64_t key_hash)
{
	static SentdmStatement store = {
		.sql = "UPDATE sentdm.sender SET paused_at = coalesce(paused_at, pg_catalog.now()),"
		" pause_kind = $1, pause_reason = $2, probe_at = $3, paused_key = $4"
		" WHERE pause_kind IS DISTINCT FROM 'user'",
		.nargs = 4,
		.types = {TEXTOID, TEXTOID, TIMESTAMPTZOID, INT8OID}
	};
	Datum		values[4];

	SPI_connect();
	values[0] = CStringGetTextDatum(sentdm_pause_name(pause));
	values[1] = CStringGetTextDatum(reason);
	values[2] = TimestampTzGetDatum(GetCurrentTimestamp() + probe_after_ms * 1000);
	values[3] = Int64GetDatum(key_hash);
	sentdm_execute(&store, values, probe_after_ms < 0 ? "  n " : NULL);
	SPI_finish();
}

#define CLEAR_PAUSE "UPDATE sentdm.sender SET paused_at = NULL, pause_kind = NULL," \
	" pause_reason = NULL, probe_at = NULL"

void
sentdm_sender_unpause(void)
{
	static SentdmStatement clear = {
		.sql = CLEAR_PAUSE " WHERE pause_kind <> 'user'"
	};

	SPI_connect();
	sentdm_execute(&clear, NULL, NULL);
	SPI_finish();
}

void
sentdm_sender_adopt(void)
{
	static SentdmStatement adopt = {
		.sql = "UPDATE sentdm.sender SET system_identifier = $1, server_version = $2, timeline = $3"
		" WHERE (system_identifier, server_version, timeline) <> ($1, $2, $3)",
		.nargs = 3,
		.types = {INT8OID, INT4OID, INT4OID}
	};
	Datum		values[3];

	SPI_connect();
	values[0] = Int64GetDatum((int64) GetSystemIdentifier());
	values[1] = Int32GetDatum(PG_VERSION_NUM);
	values[2] = Int32GetDatum((int32) GetWALInsertionTimeLine());
	sentdm_execute(&adopt, values, NULL);
	SPI_finish();
}

void
sentdm_sender_note_copy(const char *fence)
{
	static SentdmStatement note = {
		.sql = "UPDATE sentdm.sender SET copy_of = $1 WHERE copy_of IS DISTINCT FROM $1",
		.nargs = 1,
		.types = {TEXTOID}
	};
	Datum		values[1];

	if (found_copy(fence) != fence)
		return;
	SPI_connect();
	values[0] = CStringGetTextDatum(fence);
	sentdm_execute(&note, values, NULL);
	SPI_finish();
}

/* Why this database must not send, for sentdm_health(); NULL: it may. */
Datum
sentdm_fence(PG_FUNCTION_ARGS)
{
	SentdmSender sender;

	sentdm_sender_read(&sender);
	if (sender.fence == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(sender.fence));
}

static Pending
pending_argument(FunctionCallInfo fcinfo)
{
	char	   *choice = PG_ARGISNULL(0) ? "hold" : text_to_cstring(PG_GETARG_TEXT_PP(0));

	if (strcmp(choice, "hold") == 0)
		return PENDING_HOLD;
	if (strcmp(choice, "send") == 0)
		return PENDING_SEND;
	if (strcmp(choice, "discard") == 0)
		return PENDING_DISCARD;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unknown value of argument \"pending\""),
			 errhint("Use hold, send or discard.")));
}

/*
 * Recipients that were accepted already are left out; what then differs from the
 * bytes of an earlier request needs a key of its own.
 */
uint64
sentdm_requeue(Datum message_ids, bool all, bool new_key)
{
	static SentdmStatement enqueue = {
		.sql = "WITH waiting AS MATERIALIZED ("
		"  SELECT m.id, m.priority, m.expires_at, m.request, m.send_at, m.created_at,"
		"    EXISTS (SELECT FROM sentdm.deliveries d WHERE d.message_id = m.id) AS partly"
		"  FROM sentdm.messages m WHERE m.state = 'queued' AND ($2 OR m.id = ANY ($1))"
		"    AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)"
		"  FOR UPDATE),"
		" new_key AS (UPDATE sentdm.messages m SET generation = generation + 1 FROM waiting w"
		"  WHERE m.id = w.id AND (w.partly OR $3)) "
		"INSERT INTO sentdm.outbox (message_id, priority, due_at, expires_at, recipients, sandbox, position) "
		"SELECT w.id, w.priority, coalesce(w.send_at, w.created_at), w.expires_at,"
		"  CASE WHEN w.partly THEN rest.recipients END,"
		"  coalesce((w.request ->> 'sandbox')::boolean, false), pg_catalog.row_number() OVER () "
		"FROM waiting w, LATERAL (SELECT pg_catalog.array_agg(r) AS recipients"
		"  FROM pg_catalog.jsonb_array_elements_text(w.request -> 'to') AS r"
		"  WHERE NOT EXISTS (SELECT FROM sentdm.deliveries d WHERE d.message_id = w.id"
		"    AND d.recipient = r AND d.sent_id IS NOT NULL)) AS rest "
		"WHERE rest.recipients IS NOT NULL",
		.nargs = 3,
		.types = {UUIDARRAYOID, BOOLOID, BOOLOID}
	};
	Datum		values[3];

	values[0] = message_ids;
	values[1] = BoolGetDatum(all);
	values[2] = BoolGetDatum(new_key);
	return sentdm_execute(&enqueue, values, all ? "n  " : NULL);
}

/*
 * Whatever sent for this queue until now may have tried them, and goes on perhaps:
 * nothing that a copy carries tells.  But nobody did before they were due.  So where
 * that is long ago, a key may be one that Sent has accepted and forgotten.
 */
static void
give_up_old(void)
{
	static SentdmStatement give_up = {
		.sql = "UPDATE sentdm.messages m SET state = 'uncertain', finished_at = pg_catalog.now(),"
		" error_code = 'outcome_unknown', error = 'it is unknown whether Sent accepted it before sentdm_enable()'"
		" WHERE state = 'queued' AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)"
		" AND coalesce(send_at, created_at) < pg_catalog.now() - pg_catalog.make_interval(secs => $1)",
		.nargs = 1,
		.types = {FLOAT8OID}
	};
	Datum		values[1];
	uint64		n;

	values[0] = Float8GetDatum((double) sentdm_uncertain_after_s);
	n = sentdm_execute(&give_up, values, NULL);
	if (n > 0)
		ereport(NOTICE,
				(errmsg("%llu messages were due too long ago to be sent again by themselves",
						(unsigned long long) n),
				 errhint("Sent may have accepted them. See sentdm.problems, and sentdm_retry().")));
}

/*
 * Messages that wait here although nobody decided that this database sends them.
 * Returns how many stay on hold.
 */
static uint64
treat_carried(Pending pending, bool is_copy)
{
	static SentdmStatement empty_queue = {.sql = "DELETE FROM sentdm.outbox"};
	static SentdmStatement discard = {
		.sql = "UPDATE sentdm.messages m SET state = 'cancelled', finished_at = pg_catalog.now(),"
		" error_code = 'discarded', error = 'discarded by sentdm_enable()' WHERE state = 'queued'"
		" AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)"
	};
	static SentdmStatement count = {
		.sql = "SELECT FROM sentdm.messages m WHERE state = 'queued'"
		" AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)"
	};
	uint64		held = 0;

	if (is_copy)
		sentdm_execute(&empty_queue, NULL, NULL);
	if (pending == PENDING_SEND)
	{
		give_up_old();
		(void) sentdm_requeue((Datum) 0, true, false);
	}
	else if (pending == PENDING_DISCARD)
		sentdm_execute(&discard, NULL, NULL);
	else if ((held = sentdm_execute(&count, NULL, NULL)) > 0)
		ereport(NOTICE,
				(errmsg("%llu messages from before stay on hold", (unsigned long long) held),
				 errhint("Run sentdm_enable('send') to send them, or sentdm_enable('discard') to cancel them.")));
	return held;
}

static void
store_identity(bool keep_pause, uint64 held)
{
	static SentdmStatement store = {
		.sql = "INSERT INTO sentdm.sender AS s (system_identifier, database_oid, cluster_name, environment,"
		"  server_version, timeline, enabled, enabled_at, enabled_by, held)"
		" VALUES ($1, $2, $3, $4, $5, $6, true, pg_catalog.now(), $7, $8)"
		" ON CONFLICT (singleton) DO UPDATE SET system_identifier = excluded.system_identifier,"
		"  database_oid = excluded.database_oid, cluster_name = excluded.cluster_name,"
		"  environment = excluded.environment, server_version = excluded.server_version,"
		"  timeline = excluded.timeline, copy_of = NULL, enabled = true, enabled_at = excluded.enabled_at,"
		"  enabled_by = excluded.enabled_by, held = excluded.held",
		.nargs = 8,
		.types = {INT8OID, OIDOID, TEXTOID, TEXTOID, INT4OID, INT4OID, NAMEOID, INT8OID}
	};
	static SentdmStatement clear_pause = {.sql = CLEAR_PAUSE};
	Datum		values[8];

	values[0] = Int64GetDatum((int64) GetSystemIdentifier());
	values[1] = ObjectIdGetDatum(MyDatabaseId);
	values[2] = CStringGetTextDatum(setting_text(cluster_name));
	values[3] = CStringGetTextDatum(setting_text(sentdm_environment));
	values[4] = Int32GetDatum(PG_VERSION_NUM);
	values[5] = Int32GetDatum((int32) GetWALInsertionTimeLine());
	values[6] = DirectFunctionCall1(namein, CStringGetDatum(GetUserNameFromId(GetOuterUserId(), false)));
	values[7] = Int64GetDatum((int64) held);
	sentdm_execute(&store, values, NULL);
	if (!keep_pause)
		sentdm_execute(&clear_pause, NULL, NULL);
}

/* The flag that the launcher reads; a copy made by CREATE DATABASE lacks it. */
static void
set_database_flag(bool enabled)
{
	char	   *sql = psprintf("ALTER DATABASE %s %s",
							   quote_identifier(get_database_name(MyDatabaseId)),
							   enabled ? "SET sentdm.enabled = on" : "RESET sentdm.enabled");

	if (SPI_execute(sql, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not change the settings of the database");
}

Datum
sentdm_enable(PG_FUNCTION_ARGS)
{
	Pending		pending = pending_argument(fcinfo);
	const char *fence = NULL;
	bool		known;
	uint64		held;

	PreventCommandIfReadOnly("sentdm_enable()");
	SPI_connect();
	known = fetch_sender();
	if (known)
		fence = compare_identity(SPI_tuptable->vals[0], SPI_tuptable->tupdesc);
	held = treat_carried(pending, fence != NULL);
	store_identity(known && fence == NULL, held);
	set_database_flag(true);
	SPI_finish();
	sentdm_enable_at_commit(true);
	if (!sentdm_preloaded)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("nothing will be sent before the library is preloaded"),
				 errhint("Add sentdm to \"shared_preload_libraries\" and restart the server.")));
	PG_RETURN_VOID();
}

Datum
sentdm_disable(PG_FUNCTION_ARGS)
{
	static SentdmStatement disable = {.sql = "UPDATE sentdm.sender SET enabled = false"};

	PreventCommandIfReadOnly("sentdm_disable()");
	SPI_connect();
	sentdm_execute(&disable, NULL, NULL);
	set_database_flag(false);
	SPI_finish();
	ForceSyncCommit();
	sentdm_enable_at_commit(false);
	PG_RETURN_VOID();
}

static void
require_sender(uint64 rows)
{
	if (rows == 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("sending is not enabled in this database"),
				 errhint("Run SELECT sentdm_enable() first.")));
}

Datum
sentdm_pause(PG_FUNCTION_ARGS)
{
	static SentdmStatement pause = {
		.sql = "UPDATE sentdm.sender SET paused_at = pg_catalog.now(), pause_kind = 'user',"
		" pause_reason = $1, probe_at = NULL",
		.nargs = 1,
		.types = {TEXTOID}
	};
	Datum		values[1];

	SPI_connect();
	values[0] = PG_ARGISNULL(0) ? (Datum) 0 : PG_GETARG_DATUM(0);
	require_sender(sentdm_execute(&pause, values, PG_ARGISNULL(0) ? "n" : NULL));
	SPI_finish();
	ForceSyncCommit();
	sentdm_control_at_commit();
	PG_RETURN_VOID();
}

Datum
sentdm_resume(PG_FUNCTION_ARGS)
{
	static SentdmStatement clear = {.sql = CLEAR_PAUSE};

	SPI_connect();
	require_sender(sentdm_execute(&clear, NULL, NULL));
	SPI_finish();
	sentdm_resume_at_commit();
	PG_RETURN_VOID();
}

/*
 * Logical replication applies rows of another database.  A place in its queue,
 * applied here, would be sent here too; and it has an identity of its own.  What
 * a trigger of the user does with applied rows is what the user wants.
 */
Datum
sentdm_ignore_applied(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("sentdm.ignore_applied() was not called by a trigger")));
	if (IsLogicalWorker() && DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0)) == 1)
		PG_RETURN_POINTER(NULL);
	PG_RETURN_POINTER(TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ?
					  trigger->tg_newtuple : trigger->tg_trigtuple);
}
