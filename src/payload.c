/*
 * payload.c
 *		The bytes of a webhook, as jsonb if they can be.
 *
 * They are authentic when they come here, but that does not make them JSON, nor
 * JSON that this server can store.  Whatever is wrong with them is an answer and
 * never an error, because ten failures in a row make Sent disable the endpoint.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "payload.h"

#define MAX_DEPTH 64

/* Is the nesting harmless?  Brackets within strings do not count. */
static bool
is_shallow(const char *json, size_t length)
{
	int			depth = 0;
	bool		in_string = false;

	for (size_t i = 0; i < length; i++)
	{
		char		c = json[i];

		if (c == '"')
			in_string = !in_string;
		else if (in_string)
			i += c == '\\' ? 1 : 0;
		else if (c == '{' || c == '[')
		{
			if (++depth > MAX_DEPTH)
				return false;
		}
		else if (c == '}' || c == ']')
			depth--;
	}
	return true;
}

/*
 * The payload, which is UTF-8, as a string in the database encoding; NULL if it
 * is not valid or cannot be expressed.
 */
static char *
to_database_encoding(const char *payload, size_t length)
{
	int			encoding = GetDatabaseEncoding();
	size_t		size = length * MAX_CONVERSION_GROWTH + 1;
	char	   *converted;
	Oid			conversion;

	if (!pg_verify_mbstr(PG_UTF8, payload, length, true))
		return NULL;
	if (encoding == PG_UTF8 || encoding == PG_SQL_ASCII)
		return pnstrdup(payload, length);

	conversion = FindDefaultConversionProc(PG_UTF8, encoding);
	if (!OidIsValid(conversion))
		return NULL;
	converted = palloc(size);
	if (pg_do_encoding_conversion_buf(conversion, PG_UTF8, encoding,
									  (unsigned char *) payload, length,
									  (unsigned char *) converted, size, true) != length)
		return NULL;
	return converted;
}

/* Why the JSON parser refused, in our own words; NULL: not because of the input. */
static const char *
refusal(int sqlstate)
{
	if (sqlstate == ERRCODE_INVALID_TEXT_REPRESENTATION)
		return "not JSON";
	/* The latter is for an escape in a database without an encoding. */
	if (sqlstate == ERRCODE_UNTRANSLATABLE_CHARACTER || sqlstate == ERRCODE_FEATURE_NOT_SUPPORTED)
		return "has a character that cannot be stored";
	if (sqlstate == ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE)
		return "has a number that is out of range";
	if (ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_DATA_EXCEPTION ||
		ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_PROGRAM_LIMIT_EXCEEDED)
		return "exceeds a limit of jsonb";
	return NULL;
}

/*
 * Have the server parse JSON, and take its refusal of the input as an answer.
 *
 * Version 15 has no other way to learn of it than to catch the error.  Without a
 * subtransaction that is safe for this one function only: it looks at its
 * argument and nothing else, so there are no locks, pins, snapshots or catalog
 * caches that would have to be cleaned up.  What it allocated is the caller's to
 * free with the context.  Errors that are not about the input, such as a
 * cancelled query or lack of memory, go on.
 */
static Jsonb *
parse_json(char *json, const char **reason)
{
	MemoryContext context = CurrentMemoryContext;
	Jsonb	   *volatile parsed = NULL;

	PG_TRY();
	{
		parsed = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
	}
	PG_CATCH();
	{
		*reason = refusal(geterrcode());
		if (*reason == NULL)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return parsed;
}

Jsonb	   *
sentdm_payload_parse(const char *payload, size_t length, const char **reason)
{
	Jsonb	   *parsed;
	char	   *json;

	*reason = NULL;
	/* The parser is recursive; so are those who will read the document. */
	if (!is_shallow(payload, length))
	{
		*reason = "nested too deeply";
		return NULL;
	}
	json = to_database_encoding(payload, length);
	if (json == NULL)
	{
		*reason = "not in an encoding that can be stored";
		return NULL;
	}
	parsed = parse_json(json, reason);
	if (parsed != NULL && !JB_ROOT_IS_OBJECT(parsed))
	{
		*reason = "not a JSON object";
		return NULL;
	}
	return parsed;
}
