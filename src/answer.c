/*
 * answer.c
 *		Reads the API's JSON answers with PostgreSQL's own parser.
 *
 * The parser is fed by whoever answers on the network, and in a server it may
 * raise errors of its own: on deep nesting, and on an escape that the database
 * encoding cannot express.  Both are dealt with before it runs, because an
 * answer that cannot be read must not cost us what other answers said.
 */
#ifdef FRONTEND
#include "postgres_fe.h"
#else
#include "postgres.h"
#endif

#include "common/jsonapi.h"
#include "mb/pg_wchar.h"

#include "answer.h"
#include "compat.h"

#define MAX_DEPTH 32
#define MAX_ERROR 500

/* Where the parser is: the field name at each level of nesting that matters. */
#define PATH_LEVELS 5

typedef struct Reading
{
	SentdmAnswer *answer;
	int			depth;
	char	   *path[PATH_LEVELS];
	unsigned char sent_id[16];	/* of the recipient being read */
	bool		has_sent_id;
	char		recipient[24];
	char		channel[24];
	size_t		capacity;		/* of what is packed */
	bool		has_success;
} Reading;

/* Is the nesting harmless?  Brackets within strings do not count. */
static bool
is_shallow(const char *body, size_t length)
{
	int			depth = 0;
	bool		in_string = false;

	for (size_t i = 0; i < length; i++)
	{
		char		c = body[i];

		if (in_string)
		{
			if (c == '\\')
				i++;
			else if (c == '"')
				in_string = false;
		}
		else if (c == '"')
			in_string = true;
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

static bool
any_escape_is_safe(void)
{
#ifdef FRONTEND
	return true;
#else
	return GetDatabaseEncoding() == PG_UTF8;
#endif
}

/*
 * Replace \u escapes that the parser would choke on by a question mark.  What we
 * need of an answer is ASCII.
 */
static void
defuse_escapes(char *body, size_t length)
{
	bool		only_zero = any_escape_is_safe();

	if (memchr(body, '\\', length) == NULL)
		return;
	for (size_t i = 0; i + 1 < length; i++)
	{
		unsigned int code;

		if (body[i] != '\\')
			continue;
		i++;
		if (body[i] != 'u' || i + 4 >= length ||
			strspn(body + i + 1, "0123456789abcdefABCDEF") < 4 ||
			sscanf(body + i + 1, "%4x", &code) != 1)
			continue;
		if (code == 0 || (!only_zero && code >= 0x80))
			memcpy(body + i + 1, "003f", 4);
	}
}

/* Text from outside, fit to be stored: valid, on one line, not too long. */
static char *
clean_text(const char *text)
{
	size_t		length = strlen(text);
	char	   *clean;

	if (length > MAX_ERROR)
	{
		/* Not in the middle of a character. */
		length = MAX_ERROR;
		while (length > 0 && (text[length] & 0xC0) == 0x80)
			length--;
	}
	clean = pnstrdup(text, length);
	if ((size_t) pg_encoding_verifymbstr(PG_UTF8, clean, (int) length) != length)
	{
		for (char *c = clean; *c; c++)
		{
			if (IS_HIGHBIT_SET(*c))
				*c = '?';
		}
	}
	for (char *c = clean; *c; c++)
	{
		if ((unsigned char) *c < ' ')
			*c = ' ';
	}
	return clean;
}

static bool
at(const Reading *reading, int depth, const char *parent, const char *field)
{
	return reading->depth == depth &&
		(parent == NULL || (reading->path[depth - 1] && strcmp(reading->path[depth - 1], parent) == 0)) &&
		reading->path[depth] && strcmp(reading->path[depth], field) == 0;
}

/* Within data.recipients[] */
static bool
at_recipient(const Reading *reading)
{
	return reading->depth == 4 &&
		reading->path[1] && strcmp(reading->path[1], "data") == 0 &&
		reading->path[2] && strcmp(reading->path[2], "recipients") == 0;
}

static int
hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The bytes of a textual UUID; false: it is none. */
static bool
take_uuid(unsigned char *uuid, const char *text)
{
	static const char pattern[] = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
	int			n = 0;

	for (size_t i = 0; i < sizeof(pattern) - 1; i++)
	{
		int			digit = hex_digit(text[i]);

		if (pattern[i] == '-' ? text[i] != '-' : digit < 0)
			return false;
		if (pattern[i] == '-')
			continue;
		uuid[n / 2] = (unsigned char) (n % 2 == 0 ? digit << 4 : uuid[n / 2] | digit);
		n++;
	}
	return text[sizeof(pattern) - 1] == '\0';
}

/* Short ASCII fields only; anything else is left empty. */
static void
take(char *field, size_t size, const char *value)
{
	size_t		length = strlen(value);

	if (length >= size)
		return;
	for (size_t i = 0; i < length; i++)
	{
		if (value[i] < ' ' || value[i] > '~')
			return;
	}
	memcpy(field, value, length + 1);
}

static char *
room_for(Reading *reading, size_t bytes)
{
	SentdmAnswer *answer = reading->answer;
	char	   *room;

	if (answer->sent == NULL)
	{
		reading->capacity = 64;
		answer->sent = palloc(reading->capacity);
	}
	else if (answer->sent_bytes + bytes > reading->capacity)
	{
		reading->capacity *= 2;
		answer->sent = repalloc(answer->sent, reading->capacity);
	}
	room = answer->sent + answer->sent_bytes;
	answer->sent_bytes += bytes;
	return room;
}

/* Takes 64 bytes at most. */
static void
keep_recipient(Reading *reading)
{
	size_t		recipient_size = strlen(reading->recipient) + 1;
	size_t		channel_size = strlen(reading->channel) + 1;
	char	   *packed;

	if (!reading->has_sent_id)
		return;
	packed = room_for(reading, sizeof(reading->sent_id) + recipient_size + channel_size);
	memcpy(packed, reading->sent_id, sizeof(reading->sent_id));
	packed += sizeof(reading->sent_id);
	memcpy(packed, reading->recipient, recipient_size);
	memcpy(packed + recipient_size, reading->channel, channel_size);
	reading->answer->n_sent++;
}

static SENTDM_JSON_CALLBACK
on_object_start(void *state)
{
	Reading    *reading = state;

	reading->depth++;
	if (reading->depth < PATH_LEVELS)
		reading->path[reading->depth] = NULL;
	if (at_recipient(reading))
	{
		reading->has_sent_id = false;
		reading->recipient[0] = '\0';
		reading->channel[0] = '\0';
	}
	SENTDM_JSON_GO_ON;
}

static SENTDM_JSON_CALLBACK
on_object_end(void *state)
{
	Reading    *reading = state;

	if (at_recipient(reading))
		keep_recipient(reading);
	reading->depth--;
	SENTDM_JSON_GO_ON;
}

static SENTDM_JSON_CALLBACK
on_array_start(void *state)
{
	Reading    *reading = state;

	reading->depth++;
	if (reading->depth < PATH_LEVELS)
		reading->path[reading->depth] = NULL;
	SENTDM_JSON_GO_ON;
}

static SENTDM_JSON_CALLBACK
on_array_end(void *state)
{
	((Reading *) state)->depth--;
	SENTDM_JSON_GO_ON;
}

static SENTDM_JSON_CALLBACK
on_field(void *state, char *name, bool isnull)
{
	Reading    *reading = state;

	(void) isnull;
	if (reading->depth < PATH_LEVELS)
		reading->path[reading->depth] = name;
	SENTDM_JSON_GO_ON;
}

static SENTDM_JSON_CALLBACK
on_scalar(void *state, char *token, JsonTokenType type)
{
	Reading    *reading = state;
	SentdmAnswer *answer = reading->answer;

	if (at(reading, 1, NULL, "success"))
	{
		reading->has_success = type == JSON_TOKEN_TRUE || type == JSON_TOKEN_FALSE;
		answer->success = type == JSON_TOKEN_TRUE;
	}
	if (type != JSON_TOKEN_STRING)
		SENTDM_JSON_GO_ON;
	if (at(reading, 2, "error", "code"))
		take(answer->error_code, sizeof(answer->error_code), token);
	else if (at(reading, 2, "error", "message"))
		answer->error = clean_text(token);
	else if (at(reading, 2, "meta", "request_id"))
		take(answer->request_id, sizeof(answer->request_id), token);
	else if (at_recipient(reading) && reading->path[4])
	{
		if (strcmp(reading->path[4], "message_id") == 0)
			reading->has_sent_id = take_uuid(reading->sent_id, token);
		else if (strcmp(reading->path[4], "to") == 0)
			take(reading->recipient, sizeof(reading->recipient), token);
		else if (strcmp(reading->path[4], "channel") == 0)
			take(reading->channel, sizeof(reading->channel), token);
	}
	SENTDM_JSON_GO_ON;
}

void
sentdm_answer_parse(const char *body, size_t length, SentdmAnswer *answer)
{
	Reading		reading;
	JsonSemAction actions;
	char	   *copy;

	memset(answer, 0, sizeof(*answer));
	/* A NUL is no JSON, and would end every copy of the text early. */
	if (length == 0 || length > PG_INT32_MAX || memchr(body, '\0', length) != NULL ||
		!is_shallow(body, length))
		return;
	memset(&reading, 0, sizeof(reading));
	reading.answer = answer;
	memset(&actions, 0, sizeof(actions));
	actions.semstate = &reading;
	actions.object_start = on_object_start;
	actions.object_end = on_object_end;
	actions.array_start = on_array_start;
	actions.array_end = on_array_end;
	actions.object_field_start = on_field;
	actions.scalar = on_scalar;

	copy = pnstrdup(body, length);
	defuse_escapes(copy, length);
	answer->readable = pg_parse_json(sentdm_json_lexer(copy, (int) length), &actions) == JSON_SUCCESS &&
		reading.has_success;
	if (!answer->readable)
		memset(answer, 0, sizeof(*answer));
}

const char *
sentdm_answer_sent(const char *packed, SentdmSent *sent)
{
	sent->sent_id = (const unsigned char *) packed;
	sent->recipient = packed + 16;
	sent->channel = sent->recipient + strlen(sent->recipient) + 1;
	return sent->channel + strlen(sent->channel) + 1;
}
