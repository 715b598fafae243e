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

/* The row that the message is about. */
typedef struct Row
{
	HeapTuple	tuple;
	TupleDesc	desc;
} Row;

static void
refuse(const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("sentdm_send_trigger() has an argument that it does not understand"),
			 errdetail("%s", detail),
			 errhint("%s", hint)));
}

/* The text of a column; NULL when the row has none. */
static char *
column(const Row *row, const char *name)
{
	int			number = SPI_fnumber(row->desc, name);

	if (number == SPI_ERROR_NOATTRIBUTE)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("sentdm_send_trigger() names column \"%s\", which the table does not have", name),
				 errhint("Recreate the trigger with the name of a column.")));
	return SPI_getvalue(row->tuple, row->desc, number);
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

static bool
boolean(const char *value)
{
	bool		result;

	if (!parse_bool(value, &result))
		refuse("Argument \"sandbox\" is neither true nor false.", "Write sandbox=true.");
	return result;
}

/* One argument of CREATE TRIGGER; parameters are collected in *state. */
static void
take_argument(SentdmDraft *draft, JsonbParseState **state, const Row *row, const char *argument)
{
	char	   *name = pstrdup(argument);
	char	   *value = strchr(name, '=');

	if (value == NULL)
		refuse(psprintf("\"%s\" is not of the form name=value.", argument),
			   "Write for example 'recipient=phone', 'template=order_shipped'.");
	*value++ = '\0';
	if (strcmp(name, "recipient") == 0)
		return;					/* was taken first */
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
		draft->sandbox = boolean(value);
	else
		refuse(psprintf("There is no argument \"%s\".", name),
			   "Arguments are recipient, template, parameters.X, body, channels, send_at, expires_at,"
			   " priority, unique_key, tag, profile_id and sandbox.");
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

/* False: the row has no number, and nothing is to be sent. */
static bool
find_recipient(SentdmDraft *draft, const Row *row, const Trigger *trigger)
{
	for (int i = 0; i < trigger->tgnargs; i++)
	{
		if (strncmp(trigger->tgargs[i], "recipient=", 10) == 0)
		{
			char	   *recipient = column(row, trigger->tgargs[i] + 10);

			if (recipient == NULL)
				return false;
			draft->recipients = palloc(sizeof(char *));
			draft->recipients[0] = recipient;
			draft->n_recipients = 1;
			return true;
		}
	}
	refuse("There is no argument \"recipient\".", "Write 'recipient=COLUMN'.");
	return false;
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
