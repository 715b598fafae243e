/*
 * trigger.c
 *		sentdm_send_trigger(): a message for a row, without any code.
 *
 * The arguments of CREATE TRIGGER are those of sentdm_send(), as 'name=value'.
 * What differs from row to row is a column (recipient, body, parameters.X, ...);
 * what does not is a text (template, channels, tag, priority, sandbox).
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "message.h"
#include "send.h"

PG_FUNCTION_INFO_V1(sentdm_send_trigger);
PG_FUNCTION_INFO_V1(sentdm_trigger_trouble);

/* The row that the message is about. */
typedef struct Row
{
	HeapTuple	tuple;
	TupleDesc	desc;
} Row;

/* What is wrong with the arguments of a trigger; message NULL: nothing. */
typedef struct Trouble
{
	int			sqlstate;
	const char *message;
	const char *detail;			/* or NULL */
	const char *hint;
} Trouble;

static bool
trouble(Trouble *trouble, const char *detail, const char *hint)
{
	trouble->sqlstate = ERRCODE_INVALID_PARAMETER_VALUE;
	trouble->message = "sentdm_send_trigger() has an argument that it does not understand";
	trouble->detail = detail;
	trouble->hint = hint;
	return false;
}

/* The text of a column; NULL when the row has none. */
static char *
column(const Row *row, const char *name)
{
	return SPI_getvalue(row->tuple, row->desc, SPI_fnumber(row->desc, name));
}

static TimestampTz
timestamp_column(const Row *row, const char *name, TimestampTz missing)
{
	char	   *value = column(row, name);

	if (value == NULL)
		return missing;
	return DatumGetTimestampTz(DirectFunctionCall3(timestamptz_in, CStringGetDatum(value),
												   ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
}

/* "sms,whatsapp" */
static void
take_channels(SentdmDraft *draft, char *list)
{
	char	   *rest = NULL;

	draft->channels = palloc((strlen(list) + 1) * sizeof(char *));
	for (char *name = strtok_r(list, ", ", &rest); name; name = strtok_r(NULL, ", ", &rest))
		draft->channels[draft->n_channels++] = name;
}

static void
push_string(JsonbParseState **state, JsonbIteratorToken as, const char *string)
{
	JsonbValue	value;

	value.type = jbvString;
	value.val.string.val = (char *) string;
	value.val.string.len = (int) strlen(string);
	pushJsonbValue(state, as, &value);
}

static void
take_parameter(JsonbParseState **state, const char *name, const Row *row, const char *column_name)
{
	char	   *value = column(row, column_name);

	if (value == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("column \"%s\", a parameter of the message, is NULL", column_name),
				 errhint("Give the trigger a WHEN clause that leaves such rows out.")));
	if (*state == NULL)
		pushJsonbValue(state, WJB_BEGIN_OBJECT, NULL);
	push_string(state, WJB_KEY, name);
	push_string(state, WJB_VALUE, value);
}

static pg_uuid_t *
uuid_column(const Row *row, const char *name)
{
	char	   *value = column(row, name);

	return value ? DatumGetUUIDP(DirectFunctionCall1(uuid_in, CStringGetDatum(value))) : NULL;
}

/*
 * One argument of CREATE TRIGGER, which was checked, but the recipient, which was
 * taken first; parameters are collected in *state.
 */
static void
take_argument(SentdmDraft *draft, JsonbParseState **state, const Row *row, const char *argument)
{
	char	   *name = pstrdup(argument);
	char	   *value = strchr(name, '=');

	*value++ = '\0';
	if (strcmp(name, "template") == 0)
		draft->template_name = value;
	else if (strncmp(name, "parameters.", 11) == 0)
		take_parameter(state, name + 11, row, value);
	else if (strcmp(name, "body") == 0)
		draft->body = column(row, value);
	else if (strcmp(name, "channels") == 0)
		take_channels(draft, value);
	else if (strcmp(name, "send_at") == 0)
		draft->send_at = timestamp_column(row, value, 0);
	else if (strcmp(name, "expires_at") == 0)
		draft->expires_at = timestamp_column(row, value, DT_NOEND);
	else if (strcmp(name, "priority") == 0)
		draft->priority = value;
	else if (strcmp(name, "unique_key") == 0)
		draft->unique_key = column(row, value);
	else if (strcmp(name, "tag") == 0)
		draft->tag = value;
	else if (strcmp(name, "profile_id") == 0)
		draft->profile_id = uuid_column(row, value);
	else if (strcmp(name, "sandbox") == 0)
		(void) parse_bool(value, &draft->sandbox);
}

static void
check_fired(FunctionCallInfo fcinfo)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("sentdm_send_trigger() was not called as a trigger"),
				 errhint("Use it in CREATE TRIGGER ... EXECUTE FUNCTION.")));
	if (!TRIGGER_FIRED_FOR_ROW(((TriggerData *) fcinfo->context)->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("sentdm_send_trigger() was fired for a statement"),
				 errhint("Create the trigger FOR EACH ROW.")));
}

/* Is it an argument whose value is the name of a column? */
static bool
takes_column(const char *name)
{
	static const char *const columns[] = {
		"recipient", "body", "send_at", "expires_at", "unique_key", "profile_id"
	};

	for (int i = 0; i < lengthof(columns); i++)
	{
		if (strcmp(name, columns[i]) == 0)
			return true;
	}
	return strncmp(name, "parameters.", 11) == 0 && name[11] != '\0';
}

static bool
check_column(const char *name, TupleDesc desc, Trouble *found)
{
	if (SPI_fnumber(desc, name) != SPI_ERROR_NOATTRIBUTE)
		return true;
	found->sqlstate = ERRCODE_UNDEFINED_COLUMN;
	found->message = psprintf("sentdm_send_trigger() names column \"%s\", which the table does not have", name);
	found->detail = NULL;
	found->hint = "Recreate the trigger with the name of a column.";
	return false;
}

/* One argument; what does not depend on a row goes into the draft. */
static bool
check_argument(const char *argument, TupleDesc desc, SentdmDraft *draft, Trouble *found)
{
	char	   *name = pstrdup(argument);
	char	   *value = strchr(name, '=');

	if (value == NULL)
		return trouble(found, psprintf("\"%s\" is not of the form name=value.", argument),
					   "Write for example 'recipient=phone', 'template=order_shipped'.");
	*value++ = '\0';
	if (strcmp(name, "recipient") == 0)
		draft->n_recipients++;
	else if (strcmp(name, "body") == 0)
		draft->body = "x";
	else if (strcmp(name, "template") == 0)
		draft->template_name = value;
	else if (strcmp(name, "channels") == 0)
		take_channels(draft, value);
	else if (strcmp(name, "priority") == 0)
		draft->priority = value;
	else if (strcmp(name, "tag") == 0)
		draft->tag = value;
	else if (strcmp(name, "sandbox") == 0)
	{
		if (!parse_bool(value, &draft->sandbox))
			return trouble(found, "Argument \"sandbox\" is neither true nor false.", "Write sandbox=true.");
	}
	else if (!takes_column(name))
		return trouble(found, psprintf("There is no argument \"%s\".", name),
					   "Arguments are recipient, template, parameters.X, body, channels, send_at, expires_at,"
					   " priority, unique_key, tag, profile_id and sandbox.");
	return !takes_column(name) || check_column(value, desc, found);
}

/*
 * Everything about the arguments that does not depend on a row: so a trigger that
 * cannot work fails at the first row, not at the first that has a number.
 */
static bool
check_arguments(const Trigger *trigger, TupleDesc desc, Trouble *found)
{
	SentdmDraft draft;
	SentdmComplaint complaint;
	char	   *anybody = "+14155550123";

	found->message = NULL;
	sentdm_draft_init(&draft);
	for (int i = 0; i < trigger->tgnargs; i++)
	{
		if (!check_argument(trigger->tgargs[i], desc, &draft, found))
			return false;
	}
	if (draft.n_recipients != 1)
		return trouble(found, draft.n_recipients == 0 ? "There is no argument \"recipient\"."
					   : "There is more than one argument \"recipient\".", "Write 'recipient=COLUMN'.");
	draft.recipients = &anybody;
	if (sentdm_draft_check(&draft, GetCurrentTimestamp(), &complaint))
		return true;
	found->sqlstate = complaint.sqlstate;
	found->message = psprintf("sentdm_send_trigger(): %s", complaint.message);
	found->detail = NULL;
	found->hint = complaint.hint;
	return false;
}

/* At the first row of a statement. */
static void
require_good_arguments(FunctionCallInfo fcinfo, const Trigger *trigger, TupleDesc desc)
{
	Trouble		found;

	if (fcinfo->flinfo->fn_extra != NULL)
		return;
	if (!check_arguments(trigger, desc, &found))
		ereport(ERROR,
				(errcode(found.sqlstate),
				 errmsg("%s", found.message),
				 found.detail ? errdetail("%s", found.detail) : 0,
				 errhint("%s", found.hint)));
	fcinfo->flinfo->fn_extra = fcinfo->flinfo;
}

/* False: the row has no number, and nothing is to be sent. */
static bool
find_recipient(SentdmDraft *draft, const Row *row, const Trigger *trigger)
{
	char	   *recipient = NULL;

	for (int i = 0; i < trigger->tgnargs; i++)
	{
		if (strncmp(trigger->tgargs[i], "recipient=", 10) == 0)
			recipient = column(row, trigger->tgargs[i] + 10);
	}
	if (recipient == NULL)
		return false;
	draft->recipients = palloc(sizeof(char *));
	draft->recipients[0] = recipient;
	draft->n_recipients = 1;
	return true;
}

/* A NULL recipient sends nothing.  The row is NEW, or OLD in a DELETE trigger. */
Datum
sentdm_send_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *data = (TriggerData *) fcinfo->context;
	JsonbParseState *parameters = NULL;
	SentdmComplaint complaint;
	SentdmDraft draft;
	Row			row;

	check_fired(fcinfo);
	row.desc = data->tg_relation->rd_att;
	row.tuple = TRIGGER_FIRED_BY_UPDATE(data->tg_event) ? data->tg_newtuple : data->tg_trigtuple;
	require_good_arguments(fcinfo, data->tg_trigger, row.desc);
	sentdm_draft_init(&draft);
	if (!find_recipient(&draft, &row, data->tg_trigger))
		return PointerGetDatum(row.tuple);
	for (int i = 0; i < data->tg_trigger->tgnargs; i++)
		take_argument(&draft, &parameters, &row, data->tg_trigger->tgargs[i]);
	if (parameters != NULL)
		draft.parameters = JsonbValueToJsonb(pushJsonbValue(&parameters, WJB_END_OBJECT, NULL));
	(void) sentdm_enqueue(&draft, fcinfo->flinfo->fn_oid, &complaint);
	if (complaint.message != NULL)
		sentdm_raise(&complaint);
	sentdm_report_opted_out(&draft);
	return PointerGetDatum(row.tuple);
}

/* sentdm.trigger_trouble(trigger oid, relation regclass): what is wrong with a trigger; NULL: nothing */
Datum
sentdm_trigger_trouble(PG_FUNCTION_ARGS)
{
	Oid			id = PG_GETARG_OID(0);
	Relation	relation = table_open(PG_GETARG_OID(1), AccessShareLock);
	const char *text = NULL;

	for (int i = 0; relation->trigdesc != NULL && i < relation->trigdesc->numtriggers; i++)
	{
		const Trigger *trigger = &relation->trigdesc->triggers[i];
		Trouble		found;

		if (trigger->tgoid != id)
			continue;
		if (!TRIGGER_FOR_ROW(trigger->tgtype))
			text = "it is not FOR EACH ROW";

		else if (!check_arguments(trigger, RelationGetDescr(relation), &found))
			text = found.detail ? found.detail : found.message;
	}
	table_close(relation, AccessShareLock);
	if (text == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(text));
}
