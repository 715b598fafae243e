/*
 * event.c
 *		One webhook event, read from a payload of any generation.
 *
 * Sent has renamed its envelope three times without notice, and events of all
 * generations are still met.  So nothing here insists on a shape: what is
 * recognised is used, and an event of which nothing is recognised is still an
 * event.  Must never raise an error for what a payload contains, because ten
 * failures in a row make Sent disable the endpoint.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/formatting.h"
#include "utils/timestamp.h"

#include "event.h"
#include "message.h"
#include "status.h"

#define MAX_UNSIGNED_NAME 100	/* bytes */
#define UUID_TEXT_LENGTH 36

/* An envelope, taken apart. */
typedef struct Envelope
{
	JsonbContainer *root;
	JsonbContainer *body;		/* what the event is about; or NULL */
	char	   *field;			/* family: message, templates, contact, ... */
	char	   *name;			/* signed, or concluded from what is signed */
	bool		is_guide;		/* type and data, as in the integration guides */
	bool		is_sub_type;	/* the generation that had the recipient in
								 * inbound_number */
} Envelope;

/* A string member of an object; NULL when it is missing, empty or no string. */
static char *
get_string(JsonbContainer *object, const char *key)
{
	JsonbValue	value;

	if (object == NULL ||
		getKeyJsonValueFromContainer(object, key, strlen(key), &value) == NULL ||
		value.type != jbvString || value.val.string.len == 0)
		return NULL;
	return pnstrdup(value.val.string.val, value.val.string.len);
}

/* An object member of an object, or NULL. */
static JsonbContainer *
get_object(JsonbContainer *object, const char *key)
{
	JsonbValue	value;

	if (object == NULL ||
		getKeyJsonValueFromContainer(object, key, strlen(key), &value) == NULL ||
		value.type != jbvBinary || !JsonContainerIsObject(value.val.binary.data))
		return NULL;
	return value.val.binary.data;
}

static int
hex_value(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c = pg_ascii_tolower((unsigned char) c);
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool
sentdm_uuid_parse(const char *text, size_t length, pg_uuid_t *uuid)
{
	int			n = 0;

	if (length != UUID_TEXT_LENGTH)
		return false;
	for (int i = 0; i < UUID_TEXT_LENGTH; i++)
	{
		bool		is_dash = i == 8 || i == 13 || i == 18 || i == 23;
		int			high;
		int			low;

		if (is_dash)
		{
			if (text[i] != '-')
				return false;
			continue;
		}
		high = hex_value(text[i]);
		low = hex_value(text[++i]);
		if (high < 0 || low < 0)
			return false;
		uuid->data[n++] = (unsigned char) (high << 4 | low);
	}
	return true;
}

/* Read exactly n digits. */
static bool
read_digits(const char **rest, int n, int *value)
{
	*value = 0;
	for (int i = 0; i < n; i++, (*rest)++)
	{
		if (**rest < '0' || **rest > '9')
			return false;
		*value = *value * 10 + (**rest - '0');
	}
	return true;
}

static bool
read_char(const char **rest, char c)
{
	if (**rest != c)
		return false;
	(*rest)++;
	return true;
}

/* Read ".123" with any number of digits; true also if there is no fraction. */
static bool
read_fraction(const char **rest, int64 *fraction_us)
{
	int64		unit_us = USECS_PER_SEC / 10;
	const char *digits;

	*fraction_us = 0;
	if (!read_char(rest, '.'))
		return true;
	for (digits = *rest; **rest >= '0' && **rest <= '9'; (*rest)++)
	{
		*fraction_us += (**rest - '0') * unit_us;
		unit_us /= 10;
	}
	return *rest > digits;
}

/* Read "Z" or "+01:00". */
static bool
read_offset(const char **rest, int *offset_min)
{
	bool		west = **rest == '-';
	int			hours;
	int			minutes;

	*offset_min = 0;
	if (read_char(rest, 'Z'))
		return true;
	if (!read_char(rest, '+') && !read_char(rest, '-'))
		return false;
	if (!read_digits(rest, 2, &hours) || !read_char(rest, ':') ||
		!read_digits(rest, 2, &minutes) || hours > 15 || minutes > 59)
		return false;
	*offset_min = (hours * 60 + minutes) * (west ? -1 : 1);
	return true;
}

/*
 * Parse "2026-09-14T16:11:49Z"; DT_NOBEGIN if that is not what it is.  Also for
 * a time that cannot be true: one far in the future would otherwise keep every
 * later status of its message away for ever.
 */
static TimestampTz
parse_time(const char *rest, TimestampTz now)
{
	int			year,
				month,
				day,
				hour,
				minute,
				second,
				offset_min;
	int64		fraction_us;
	TimestampTz time;

	if (!read_digits(&rest, 4, &year) || !read_char(&rest, '-') ||
		!read_digits(&rest, 2, &month) || !read_char(&rest, '-') ||
		!read_digits(&rest, 2, &day) || !read_char(&rest, 'T') ||
		!read_digits(&rest, 2, &hour) || !read_char(&rest, ':') ||
		!read_digits(&rest, 2, &minute) || !read_char(&rest, ':') ||
		!read_digits(&rest, 2, &second) || !read_fraction(&rest, &fraction_us) ||
		!read_offset(&rest, &offset_min) || *rest != '\0')
		return DT_NOBEGIN;
	if (month < 1 || month > 12 || day < 1 || day > day_tab[isleap(year)][month - 1] ||
		hour > 23 || minute > 59 || second > 59)
		return DT_NOBEGIN;

	time = (TimestampTz) (date2j(year, month, day) - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY +
		(hour * SECS_PER_HOUR + (minute - offset_min) * SECS_PER_MINUTE + second) * USECS_PER_SEC +
		fraction_us;
	if (time < 0 || time > now + USECS_PER_DAY) /* 0 is the year 2000 */
		return DT_NOBEGIN;
	return time;
}

/* When it happened, as well as the event knows. */
static TimestampTz
find_time(const Envelope *envelope, TimestampTz now)
{
	static const char *const keys[] = {"updated_at", "occurred_at", "received_at"};
	TimestampTz time = DT_NOBEGIN;
	char	   *string;

	for (int i = 0; i < lengthof(keys) && time == DT_NOBEGIN; i++)
	{
		string = get_string(envelope->body, keys[i]);
		if (string != NULL)
			time = parse_time(string, now);
	}
	if (time == DT_NOBEGIN)
	{
		string = get_string(envelope->root, "timestamp");
		if (string != NULL)
			time = parse_time(string, now);
	}
	return time;
}

/* A name for an event of the generation that had none. */
static char *
conclude_name(const Envelope *envelope)
{
	char	   *status = get_string(envelope->body, "message_status");

	if (status != NULL)
		return psprintf("message.%s", asc_tolower(status, strlen(status)));
	if (envelope->field != NULL && strncmp(envelope->field, "message", 7) == 0 &&
		get_string(envelope->body, "received_at") != NULL)
		return pstrdup("message.received");
	return NULL;
}

/* Take an envelope of any generation apart. */
static void
open_envelope(Envelope *envelope, Jsonb *json)
{
	char	   *type;

	memset(envelope, 0, sizeof(*envelope));
	envelope->root = &json->root;

	type = get_string(envelope->root, "type");
	envelope->body = get_object(envelope->root, "data");
	if (type != NULL && envelope->body != NULL)
	{
		envelope->name = type;
		envelope->is_guide = true;
		return;
	}

	envelope->field = get_string(envelope->root, "field");
	envelope->body = get_object(envelope->root, "payload");
	envelope->name = get_string(envelope->root, "event");
	if (envelope->name == NULL)
	{
		envelope->name = get_string(envelope->root, "sub_type");
		envelope->is_sub_type = envelope->name != NULL;
	}
	if (envelope->name == NULL)
		envelope->name = conclude_name(envelope);
}

/* Is it fit to be a name?  Anybody on the way may have written it. */
static bool
is_name(const char *name)
{
	size_t		length = strlen(name);

	return length > 0 && length <= MAX_UNSIGNED_NAME &&
		strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == length;
}

/*
 * The status that an outbound message event reports, in lower case.  Without one
 * the name says it, if it ends in a status that we know.
 */
static char *
find_status(const Envelope *envelope)
{
	char	   *status = get_string(envelope->body, "message_status");

	if (status == NULL)
		status = get_string(envelope->body, "status");
	if (status == NULL)
	{
		char	   *suffix = strchr(envelope->name, '.') + 1;

		if (!sentdm_status_is_known(suffix))
			return NULL;
		status = suffix;
	}
	status = asc_tolower(status, strlen(status));
	/* Inbound messages have no delivery. */
	return strcmp(status, "received") == 0 ? NULL : status;
}

/*
 * Whom an outbound message went to.  The current generation has the recipient in
 * outbound_number and no inbound_number; the one before had it in the latter.
 */
static char *
find_recipient(const Envelope *envelope)
{
	char	   *inbound = get_string(envelope->body, "inbound_number");

	if (inbound != NULL && envelope->is_sub_type)
		return inbound;
	return get_string(envelope->body, "outbound_number");
}

/* What an outbound message event says about its message. */
static void
read_status(SentdmEvent *event, const Envelope *envelope)
{
	JsonbContainer *error = get_object(envelope->body, "error");

	event->status = find_status(envelope);
	event->recipient = find_recipient(envelope);
	event->channel = get_string(envelope->body, "channel");
	event->reason_code = get_string(envelope->body, "reason_code");
	event->reason = get_string(envelope->body, "reason");
	if (event->reason_code == NULL)
		event->reason_code = get_string(error, "code");
	if (event->reason == NULL)
		event->reason = get_string(error, "message");
}

/*
 * What two deliveries of the same event have in common, and two events have not.
 *
 * Signed words only: a header could be changed to have one event counted many
 * times, or another one lost as a duplicate.  The webhook's id is not among them,
 * because two endpoints of ours receive the same event, and it happened once.
 * The time is, because a message that is sent again goes through the same
 * statuses again.  Without it, the bytes decide.
 */
static char *
find_identity(const SentdmEvent *event, const Envelope *envelope, bool inbound)
{
	char	   *updated_at = get_string(envelope->body, "updated_at");
	char	   *id;

	if (!event->has_sent_id || (!inbound && updated_at == NULL))
		return NULL;
	id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&event->sent_id)));
	if (inbound)
		return psprintf("%s|message.received", id);
	return psprintf("%s|%s|%s|%s", id, envelope->name,
					event->status ? event->status : "", updated_at);
}

/* The text without what people put around a word, in upper case. */
static char *
bare_word(const char *text)
{
	char	   *word = asc_toupper(text, strlen(text));
	size_t		length;

	word += strspn(word, " \t\r\n\"'");
	length = strlen(word);
	while (length > 0 && strchr(" \t\r\n\"'.!", word[length - 1]) != NULL)
		word[--length] = '\0';
	return word;
}

/*
 * What the answer of a contact says.  Only words that mean nothing else: Sent
 * knows more of them, and tells of those by events of the contact family.
 */
static SentdmConsent
consent_of_text(const char *text)
{
	static const char *const out[] = {
		"STOP", "STOPALL", "STOP ALL", "UNSUBSCRIBE", "OPTOUT", "OPT OUT", "OPT-OUT"
	};
	char	   *word = text ? bare_word(text) : "";

	for (int i = 0; i < lengthof(out); i++)
	{
		if (strcmp(word, out[i]) == 0)
			return SENTDM_OPTED_OUT;
	}
	return strcmp(word, "START") == 0 || strcmp(word, "UNSTOP") == 0 ? SENTDM_OPTED_IN : SENTDM_CONSENT_UNKNOWN;
}

/* An event of the contact family has the resulting state, or else its name says it. */
static SentdmConsent
consent_of_contact(const Envelope *envelope)
{
	JsonbValue	value;

	if (envelope->body != NULL &&
		getKeyJsonValueFromContainer(envelope->body, "opt_out", 7, &value) != NULL &&
		value.type == jbvBool)
		return value.val.boolean ? SENTDM_OPTED_OUT : SENTDM_OPTED_IN;
	if (strcmp(envelope->name, "contact.opt_out") == 0)
		return SENTDM_OPTED_OUT;
	return strcmp(envelope->name, "contact.opt_in") == 0 ? SENTDM_OPTED_IN : SENTDM_CONSENT_UNKNOWN;
}

/* Was the message filtered because its recipient had opted out? */
static bool
filtered_for_consent(const SentdmEvent *event)
{
	return event->status != NULL && strcmp(event->status, "filtered") == 0 && event->reason_code != NULL &&
		(strcmp(event->reason_code, "ERR_CONSENT_BLOCKED") == 0 || strcmp(event->reason_code, "BUSINESS_004") == 0);
}

static void
read_consent(SentdmEvent *event, const Envelope *envelope)
{
	const char *key = "from";

	if (strncmp(envelope->name, "contact.", 8) == 0)
		event->consent = consent_of_contact(envelope);
	else if (strcmp(envelope->name, "message.received") == 0)
	{
		event->consent = consent_of_text(get_string(envelope->body, "text"));
		key = "inbound_number";
	}
	else if (filtered_for_consent(event))
	{
		event->consent = SENTDM_OPTED_OUT;
		event->contact = event->recipient;
	}
	if (event->consent == SENTDM_CONSENT_UNKNOWN)
		return;
	if (event->contact == NULL)
		event->contact = get_string(envelope->body, key);
	if (event->contact == NULL)
		event->contact = get_string(envelope->body, key[0] == 'i' ? "from" : "phone_number");
	if (event->contact == NULL || !sentdm_is_e164(event->contact))
		event->consent = SENTDM_CONSENT_UNKNOWN;
}

void
sentdm_event_read(SentdmEvent *event, Jsonb *json, const char *unsigned_name, TimestampTz now)
{
	Envelope	envelope;
	char	   *message_id;

	memset(event, 0, sizeof(*event));
	event->occurred_at = DT_NOBEGIN;
	if (json == NULL)
		return;

	open_envelope(&envelope, json);
	event->occurred_at = find_time(&envelope, now);
	message_id = get_string(envelope.body, "message_id");
	if (message_id == NULL && envelope.is_guide)
		message_id = get_string(envelope.body, "id");
	if (message_id != NULL)
		event->has_sent_id = sentdm_uuid_parse(message_id, strlen(message_id), &event->sent_id);

	/* Only a signed name decides what an event does. */
	if (envelope.name != NULL && strncmp(envelope.name, "message.", 8) == 0)
	{
		bool		inbound = strcmp(envelope.name, "message.received") == 0;

		if (!inbound)
			read_status(event, &envelope);
		event->identity = find_identity(event, &envelope, inbound);
	}
	if (envelope.name != NULL)
		read_consent(event, &envelope);

	event->name = envelope.name;
	if (event->name == NULL && unsigned_name != NULL && is_name(unsigned_name))
		event->name = pstrdup(unsigned_name);
	if (event->name == NULL)
		event->name = envelope.field;
}
