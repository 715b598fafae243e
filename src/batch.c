/*
 * batch.c
 *		One item of sentdm_send_batch(): a JSON object as the arguments of
 *		sentdm_send().
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "batch.h"

static bool
complain(SentdmComplaint *complaint, const char *format, const char *argument)
{
	complaint->sqlstate = ERRCODE_INVALID_PARAMETER_VALUE;
	complaint->message = psprintf(format, argument);
	complaint->hint = NULL;
	return false;
}

/*
 * Text to a value of a type.  Input functions of these types look at nothing but
 * the text, so an error of the data exception class leaves nothing to clean up
 * and can be swallowed; any other is passed on.
 */
static bool
convert(Datum *result, PGFunction input, const char *text)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool converted = false;

	PG_TRY();
	{
		*result = DirectFunctionCall3(input, CStringGetDatum(text),
									  ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));
		converted = true;
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (ERRCODE_TO_CATEGORY(error->sqlerrcode) != ERRCODE_DATA_EXCEPTION)
			PG_RE_THROW();
		FlushErrorState();
		FreeErrorData(error);
	}
	PG_END_TRY();
	return converted;
}

static char *
string_of(const JsonbValue *value)
{
	if (value->type != jbvString)
		return NULL;
	return pnstrdup(value->val.string.val, value->val.string.len);
}

/* An array of strings; a null among them is noted, anything else is refused. */
static bool
read_strings(const JsonbValue *value, char ***strings, int *n, bool *has_null)
{
	JsonbIterator *it;
	JsonbValue	element;
	JsonbIteratorToken token;

	if (value->type != jbvBinary || !JsonContainerIsArray(value->val.binary.data))
		return false;
	*strings = palloc((JsonContainerSize(value->val.binary.data) + 1) * sizeof(char *));
	it = JsonbIteratorInit(value->val.binary.data);
	while ((token = JsonbIteratorNext(&it, &element, true)) != WJB_DONE)
	{
		if (token != WJB_ELEM)
			continue;
		if (element.type == jbvNull)
			*has_null = true;
		else if (element.type == jbvString)
			(*strings)[(*n)++] = string_of(&element);
		else
			return false;
	}
	return true;
}

static bool
read_recipient(SentdmDraft *draft, const JsonbValue *value)
{
	if (value->type != jbvString)
		return false;
	draft->recipients = palloc(sizeof(char *));
	draft->recipients[0] = string_of(value);
	draft->n_recipients = 1;
	return true;
}

static bool
read_timestamp(TimestampTz *timestamp, const JsonbValue *value)
{
	Datum		datum;

	if (value->type != jbvString || !convert(&datum, timestamptz_in, string_of(value)))
		return false;
	*timestamp = DatumGetTimestampTz(datum);
	return true;
}

static bool
read_uuid(pg_uuid_t **uuid, const JsonbValue *value)
{
	Datum		datum;

	if (value->type != jbvString || !convert(&datum, uuid_in, string_of(value)))
		return false;
	*uuid = DatumGetUUIDP(datum);
	return true;
}

static bool
read_string(char **string, const JsonbValue *value)
{
	*string = string_of(value);
	return *string != NULL;
}

static bool
read_jsonb(Jsonb **jsonb, JsonbValue *value)
{
	*jsonb = JsonbValueToJsonb(value);
	return true;
}

/* False: the value does not fit the argument; *known tells whether there is one. */
static bool
read_argument(SentdmDraft *draft, const char *name, JsonbValue *value, bool *known)
{
	*known = true;
	if (strcmp(name, "recipient") == 0)
		return read_recipient(draft, value);
	if (strcmp(name, "recipients") == 0)
	{
		draft->plural = true;
		return read_strings(value, &draft->recipients, &draft->n_recipients, &draft->null_recipient);
	}
	if (strcmp(name, "template") == 0)
		return read_string(&draft->template_name, value);
	if (strcmp(name, "parameters") == 0)
		return read_jsonb(&draft->parameters, value);
	if (strcmp(name, "body") == 0)
		return read_string(&draft->body, value);
	if (strcmp(name, "channels") == 0)
		return read_strings(value, &draft->channels, &draft->n_channels, &draft->null_channel);
	if (strcmp(name, "send_at") == 0)
		return read_timestamp(&draft->send_at, value);
	if (strcmp(name, "expires_at") == 0)
		return read_timestamp(&draft->expires_at, value);
	if (strcmp(name, "priority") == 0)
		return read_string(&draft->priority, value);
	if (strcmp(name, "unique_key") == 0)
		return read_string(&draft->unique_key, value);
	if (strcmp(name, "tag") == 0)
		return read_string(&draft->tag, value);
	if (strcmp(name, "profile_id") == 0)
		return read_uuid(&draft->profile_id, value);
	if (strcmp(name, "sandbox") == 0)
	{
		draft->sandbox = value->type == jbvBool && value->val.boolean;
		return value->type == jbvBool;
	}
	if (strcmp(name, "extra") == 0)
		return read_jsonb(&draft->extra, value);
	*known = false;
	return false;
}

bool
sentdm_draft_from_item(SentdmDraft *draft, JsonbValue *item, SentdmComplaint *complaint)
{
	JsonbIterator *it;
	JsonbValue	key;
	JsonbIteratorToken token;
	bool		has_recipient = false;

	sentdm_draft_init(draft);
	complaint->message = NULL;
	if (item->type != jbvBinary || !JsonContainerIsObject(item->val.binary.data))
		return complain(complaint, "the item is not a JSON object%s", "");
	it = JsonbIteratorInit(item->val.binary.data);
	while ((token = JsonbIteratorNext(&it, &key, true)) != WJB_DONE)
	{
		JsonbValue	value;
		char	   *name;
		bool		known;

		if (token != WJB_KEY)
			continue;
		name = string_of(&key);
		(void) JsonbIteratorNext(&it, &value, true);
		if (strncmp(name, "recipient", 9) == 0)
		{
			if (has_recipient)
				return complain(complaint, "the item has both \"recipient\" and \"recipients\"%s", "");
			has_recipient = true;
			draft->null_recipient = value.type == jbvNull && strcmp(name, "recipient") == 0;
		}
		/* As in SQL, a null is an argument that is not given. */
		if (value.type != jbvNull && !read_argument(draft, name, &value, &known))
			return complain(complaint, known ? "argument \"%s\" has a value of the wrong type"
							: "the item has a key that is no argument of sentdm_send()%s",
							known ? name : "");
	}
	if (!has_recipient)
		return complain(complaint, "the item has neither \"recipient\" nor \"recipients\"%s", "");
	return true;
}
