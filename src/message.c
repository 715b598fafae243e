/*
 * message.c
 *		From what a caller says to the request that is POSTed (wire contract, 2.1).
 *
 * Everything that can be known to be wrong is found here, before a row is
 * written.  Complaints are values, not errors: a batch goes on with the next
 * item.  They name arguments and never quote them, because messages of errors
 * end up in logs.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

#include "message.h"

#define MAX_REQUEST (256 * 1024)
#define MAX_KEY 512

/* A text may grow by this factor when it is written as JSON. */
#define WORST_ESCAPE 6

static const char *const known_channels[] = {"sent", "sms", "whatsapp", "rcs", "mms"};
static const char *const known_priorities[] = {"high", "normal", "bulk"};

/* Fields of the request that have an argument of their own. */
static const char *const own_fields[] = {"to", "template", "text", "channel", "sandbox"};

typedef struct Recipient
{
	char	   *number;
	int			position;
} Recipient;

void
sentdm_draft_init(SentdmDraft *draft)
{
	memset(draft, 0, sizeof(*draft));
	draft->expires_at = DT_NOEND;
}

static bool
complain(SentdmComplaint *complaint, int sqlstate, const char *message, const char *hint)
{
	complaint->sqlstate = sqlstate;
	complaint->message = pstrdup(message);
	complaint->hint = hint;
	return false;
}

static bool
invalid(SentdmComplaint *complaint, const char *message, const char *hint)
{
	return complain(complaint, ERRCODE_INVALID_PARAMETER_VALUE, message, hint);
}

static bool
one_of(const char *value, const char *const *list, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (strcmp(value, list[i]) == 0)
			return true;
	}
	return false;
}

bool
sentdm_is_e164(const char *number)
{
	size_t		digits;

	if (number[0] != '+' || number[1] < '1' || number[1] > '9')
		return false;
	digits = strspn(number + 1, "0123456789");
	return digits >= 7 && digits <= 15 && number[1 + digits] == '\0';
}

static int
compare_numbers(const void *a, const void *b)
{
	const Recipient *left = a;
	const Recipient *right = b;
	int			order = strcmp(left->number, right->number);

	return order != 0 ? order : left->position - right->position;
}

/* Keep the first of equal numbers, and the order. */
static void
drop_repeated(SentdmDraft *draft)
{
	int			n = draft->n_recipients;
	Recipient  *sorted;
	int			kept = 0;

	if (n < 2)
		return;
	sorted = palloc(n * sizeof(Recipient));
	for (int i = 0; i < n; i++)
	{
		sorted[i].number = draft->recipients[i];
		sorted[i].position = i;
	}
	qsort(sorted, n, sizeof(Recipient), compare_numbers);
	for (int i = 1; i < n; i++)
	{
		if (strcmp(sorted[i].number, sorted[i - 1].number) == 0)
			draft->recipients[sorted[i].position] = NULL;
	}
	for (int i = 0; i < n; i++)
	{
		if (draft->recipients[i] != NULL)
			draft->recipients[kept++] = draft->recipients[i];
	}
	draft->n_recipients = kept;
	pfree(sorted);
}

static bool
check_recipients(SentdmDraft *draft, SentdmComplaint *complaint)
{
	if (draft->null_recipient)
		return complain(complaint, ERRCODE_NULL_VALUE_NOT_ALLOWED,
						draft->plural ? "argument \"recipients\" contains a NULL"
						: "argument \"recipient\" is NULL",
						"Leave out rows without a number, for example with WHERE phone IS NOT NULL.");
	for (int i = 0; i < draft->n_recipients; i++)
	{
		if (!sentdm_is_e164(draft->recipients[i]))
			return invalid(complaint,
						   draft->plural ? "argument \"recipients\" contains a number that is not E.164"
						   : "argument \"recipient\" is not an E.164 number",
						   "Write numbers with a plus sign and the country code, digits only, such as +14155550123.");
	}
	drop_repeated(draft);
	return true;
}

static bool
check_parameters(const Jsonb *parameters, SentdmComplaint *complaint)
{
	JsonbIterator *it;
	JsonbValue	value;
	JsonbIteratorToken token;

	if (parameters == NULL)
		return true;
	if (!JB_ROOT_IS_OBJECT(parameters))
		return invalid(complaint, "argument \"parameters\" is not a JSON object",
					   "Use jsonb_build_object('name', value, ...).");
	it = JsonbIteratorInit((JsonbContainer *) &parameters->root);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token != WJB_VALUE)
			continue;
		if (value.type == jbvBinary)
			return invalid(complaint, "argument \"parameters\" contains a nested value",
						   "Every parameter is a string, number or boolean.");
		if (value.type == jbvNull)
			return invalid(complaint, "argument \"parameters\" contains a null",
						   "Use coalesce() to give a text for missing values.");
	}
	return true;
}

static bool
check_content(const SentdmDraft *draft, SentdmComplaint *complaint)
{
	bool		has_template = draft->template_name != NULL && draft->template_name[0] != '\0';
	bool		has_body = draft->body != NULL && draft->body[0] != '\0';

	if (has_template && has_body)
		return invalid(complaint, "both arguments \"template\" and \"body\" are given",
					   "Give exactly one of them.");
	if (!has_template && !has_body)
		return invalid(complaint, "neither argument \"template\" nor \"body\" is given",
					   "Give exactly one of them.");
	if (has_body && draft->parameters != NULL)
		return invalid(complaint, "argument \"parameters\" is given without \"template\"",
					   "Put the values into \"body\", for example with format().");
	return check_parameters(draft->parameters, complaint);
}

static bool
check_channels(const SentdmDraft *draft, SentdmComplaint *complaint)
{
	bool		automatic = false;

	if (draft->null_channel)
		return complain(complaint, ERRCODE_NULL_VALUE_NOT_ALLOWED,
						"argument \"channels\" contains a NULL",
						"Name the channels, or leave the argument out to let Sent choose.");
	for (int i = 0; i < draft->n_channels; i++)
	{
		if (!one_of(draft->channels[i], known_channels, lengthof(known_channels)))
			return invalid(complaint, "argument \"channels\" contains an unknown channel",
						   "Known channels are sent, sms, whatsapp, rcs and mms, in lower case.");
		if (strcmp(draft->channels[i], "sent") == 0)
			automatic = true;
	}
	if (automatic && draft->n_channels > 1)
		return invalid(complaint, "argument \"channels\" combines sent with others",
					   "Each channel gets a message of its own; sent alone lets Sent choose one.");
	return true;
}

static bool
check_times(const SentdmDraft *draft, TimestampTz now, SentdmComplaint *complaint)
{
	if (TIMESTAMP_NOT_FINITE(draft->send_at))
		return invalid(complaint, "argument \"send_at\" is infinite",
					   "Give a time, or leave it out to send at once.");
	if (draft->expires_at <= now)
		return invalid(complaint, "argument \"expires_at\" is in the past",
					   "Give a time in the future, such as now() + interval '5 minutes'.");
	if (draft->expires_at <= draft->send_at)
		return invalid(complaint, "argument \"expires_at\" is not after \"send_at\"",
					   "Such a message would expire before it is due.");
	return true;
}

static bool
check_extra(const Jsonb *extra, SentdmComplaint *complaint)
{
	JsonbIterator *it;
	JsonbValue	value;
	JsonbIteratorToken token;

	if (extra == NULL)
		return true;
	if (!JB_ROOT_IS_OBJECT(extra))
		return invalid(complaint, "argument \"extra\" is not a JSON object",
					   "Use jsonb_build_object('field', value, ...).");
	it = JsonbIteratorInit((JsonbContainer *) &extra->root);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		char	   *field;

		if (token != WJB_KEY)
			continue;
		field = pnstrdup(value.val.string.val, value.val.string.len);
		if (one_of(field, own_fields, lengthof(own_fields)))
			return invalid(complaint, psprintf("argument \"extra\" contains the field \"%s\"", field),
						   "Use the argument for it.");
	}
	return true;
}

static bool
check_key(const char *value, const char *message, SentdmComplaint *complaint)
{
	if (value != NULL && (value[0] == '\0' || strlen(value) > MAX_KEY))
		return invalid(complaint, message, "Use 1 to 512 bytes.");
	return true;
}

bool
sentdm_draft_check(SentdmDraft *draft, TimestampTz now, SentdmComplaint *complaint)
{
	if (!check_recipients(draft, complaint) || !check_content(draft, complaint) ||
		!check_channels(draft, complaint) || !check_times(draft, now, complaint) ||
		!check_extra(draft->extra, complaint) ||
		!check_key(draft->unique_key, "argument \"unique_key\" is empty or too long", complaint) ||
		!check_key(draft->tag, "argument \"tag\" is empty or too long", complaint))
		return false;
	if (draft->priority != NULL &&
		!one_of(draft->priority, known_priorities, lengthof(known_priorities)))
		return invalid(complaint, "argument \"priority\" is unknown", "Use high, normal or bulk.");
	return true;
}

/* Building the request */

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
push_strings(JsonbParseState **state, const char *field, char **strings, int n)
{
	push_string(state, WJB_KEY, field);
	pushJsonbValue(state, WJB_BEGIN_ARRAY, NULL);
	for (int i = 0; i < n; i++)
		push_string(state, WJB_ELEM, strings[i]);
	pushJsonbValue(state, WJB_END_ARRAY, NULL);
}

/* The API takes strings only. */
static void
push_scalar_as_string(JsonbParseState **state, JsonbValue *value)
{
	if (value->type == jbvNumeric)
		push_string(state, WJB_VALUE,
					DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric))));
	else if (value->type == jbvBool)
		push_string(state, WJB_VALUE, value->val.boolean ? "true" : "false");
	else
		pushJsonbValue(state, WJB_VALUE, value);
}

static bool
is_uuid(const char *name)
{
	static const char pattern[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";

	for (int i = 0; pattern[i]; i++)
	{
		if (pattern[i] == '-' ? name[i] != '-' : !isxdigit((unsigned char) name[i]))
			return false;
	}
	return name[sizeof(pattern) - 1] == '\0';
}

static void
push_template(JsonbParseState **state, const SentdmDraft *draft)
{
	JsonbIterator *it;
	JsonbValue	value;
	JsonbIteratorToken token;

	push_string(state, WJB_KEY, "template");
	pushJsonbValue(state, WJB_BEGIN_OBJECT, NULL);
	push_string(state, WJB_KEY, is_uuid(draft->template_name) ? "id" : "name");
	push_string(state, WJB_VALUE, draft->template_name);
	if (draft->parameters != NULL)
	{
		push_string(state, WJB_KEY, "parameters");
		pushJsonbValue(state, WJB_BEGIN_OBJECT, NULL);
		it = JsonbIteratorInit(&draft->parameters->root);
		while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
		{
			if (token == WJB_KEY)
				pushJsonbValue(state, WJB_KEY, &value);
			else if (token == WJB_VALUE)
				push_scalar_as_string(state, &value);
		}
		pushJsonbValue(state, WJB_END_OBJECT, NULL);
	}
	pushJsonbValue(state, WJB_END_OBJECT, NULL);
}

static void
push_extra(JsonbParseState **state, Jsonb *extra)
{
	JsonbIterator *it = JsonbIteratorInit(&extra->root);
	JsonbValue	value;
	JsonbIteratorToken token;

	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY || token == WJB_VALUE)
			pushJsonbValue(state, token, &value);
	}
}

/* Does text in the database encoding have a UTF-8 form? */
static bool
has_utf8_form(const char *text, int length)
{
	int			encoding = GetDatabaseEncoding();
	Oid			conversion;
	unsigned char *buffer;
	int			buffer_length = length * MAX_CONVERSION_GROWTH + 1;

	if (encoding == PG_UTF8)
		return true;
	if (encoding == PG_SQL_ASCII)
		return pg_verify_mbstr(PG_UTF8, text, length, true);
	conversion = FindDefaultConversionProc(encoding, PG_UTF8);
	if (!OidIsValid(conversion))
		return false;
	buffer = palloc(buffer_length);
	return pg_do_encoding_conversion_buf(conversion, encoding, PG_UTF8,
										 (unsigned char *) unconstify(char *, text), length,
										 buffer, buffer_length, true) == length;
}

static bool
check_request(Jsonb *request, SentdmComplaint *complaint)
{
	StringInfoData text;

	/* Most requests are so small that their text cannot be too long. */
	if (GetDatabaseEncoding() == PG_UTF8 && VARSIZE(request) < MAX_REQUEST / WORST_ESCAPE)
		return true;
	initStringInfo(&text);
	(void) JsonbToCString(&text, &request->root, VARSIZE(request));
	if (text.len > MAX_REQUEST)
		return complain(complaint, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
						"the request is larger than 256 kB",
						"Shorten \"body\" or \"parameters\", or send to fewer recipients at once.");
	if (!has_utf8_form(text.data, text.len))
		return complain(complaint, ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
						"a text argument has no form in UTF-8",
						"The API takes UTF-8 only.");
	pfree(text.data);
	return true;
}

Jsonb	   *
sentdm_draft_request(const SentdmDraft *draft, int first, int count, SentdmComplaint *complaint)
{
	JsonbParseState *state = NULL;
	JsonbValue	sandbox;
	Jsonb	   *request;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	push_strings(&state, "to", draft->recipients + first, count);
	if (draft->template_name != NULL && draft->template_name[0] != '\0')
		push_template(&state, draft);
	else
	{
		push_string(&state, WJB_KEY, "text");
		push_string(&state, WJB_VALUE, draft->body);
	}
	if (draft->n_channels > 0)
		push_strings(&state, "channel", draft->channels, draft->n_channels);
	if (draft->sandbox)
	{
		push_string(&state, WJB_KEY, "sandbox");
		sandbox.type = jbvBool;
		sandbox.val.boolean = true;
		pushJsonbValue(&state, WJB_VALUE, &sandbox);
	}
	if (draft->extra != NULL)
		push_extra(&state, draft->extra);
	request = JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
	return check_request(request, complaint) ? request : NULL;
}
