/*
 * headers.c
 *		The headers of a webhook as a JSON object.
 *
 * Only headers that begin with X-Webhook- go to the database: the others are
 * between the sender, the proxies and us, and may be anything, also cookies.
 * These may be anything too, until a signature is verified, so they are checked
 * byte by byte: what PostgreSQL would refuse must not get into a batch, where it
 * would cost the neighbours a second attempt.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "headers.h"

#define PREFIX "x-webhook-"
#define PREFIX_LENGTH (sizeof(PREFIX) - 1)

static void
append(ReceiverHeaders *headers, const char *data, size_t length)
{
	if (headers->refusal != RECEIVER_NOT_REFUSED)
		return;
	if (headers->length + length > headers->capacity)
	{
		size_t		capacity = 2 * (headers->length + length) + 256;
		char	   *grown = realloc(headers->json, capacity);

		if (grown == NULL)
		{
			headers->refusal = RECEIVER_NO_MEMORY;
			return;
		}
		headers->json = grown;
		headers->capacity = capacity;
	}
	memcpy(headers->json + headers->length, data, length);
	headers->length += length;
}

/*
 * Length of the character at the beginning; 0: not UTF-8.  Neither overlong forms
 * nor surrogates nor anything beyond U+10FFFF are.
 */
static size_t
utf8_length(const unsigned char *text, size_t length)
{
	unsigned char low = 0x80;
	unsigned char high = 0xbf;
	size_t		n;

	if (text[0] < 0x80)
		return 1;
	if (text[0] < 0xc2 || text[0] > 0xf4)
		return 0;
	n = text[0] < 0xe0 ? 2 : text[0] < 0xf0 ? 3 : 4;
	if (text[0] == 0xe0)
		low = 0xa0;
	else if (text[0] == 0xed)
		high = 0x9f;
	else if (text[0] == 0xf0)
		low = 0x90;
	else if (text[0] == 0xf4)
		high = 0x8f;
	if (n > length || text[1] < low || text[1] > high)
		return 0;
	for (size_t i = 2; i < n; i++)
	{
		if ((text[i] & 0xc0) != 0x80)
			return 0;
	}
	return n;
}

static void
append_string(ReceiverHeaders *headers, const char *text, size_t length)
{
	append(headers, "\"", 1);
	for (size_t i = 0; i < length;)
	{
		unsigned char c = (unsigned char) text[i];
		size_t		n = utf8_length((const unsigned char *) text + i, length - i);
		char		escaped[8];

		/* jsonb cannot hold U+0000. */
		if (n == 0 || c == 0)
		{
			headers->refusal = RECEIVER_HEADER_NOT_UTF8;
			return;
		}
		if (c == '"' || c == '\\' || c < 0x20)
		{
			snprintf(escaped, sizeof(escaped), "\\u%04x", c);
			append(headers, escaped, 6);
		}
		else
			append(headers, text + i, n);
		i += n;
	}
	append(headers, "\"", 1);
}

static bool
is_repeated(const ReceiverHeaders *headers, const char *name, size_t name_length)
{
	for (int i = 0; i < headers->count; i++)
	{
		if (headers->name_lengths[i] == name_length &&
			strncasecmp(headers->names[i], name, name_length) == 0)
			return true;
	}
	return false;
}

void
receiver_headers_begin(ReceiverHeaders *headers)
{
	memset(headers, 0, sizeof(*headers));
	append(headers, "{", 1);
}

void
receiver_headers_add(ReceiverHeaders *headers, const char *name, size_t name_length,
					 const char *value, size_t value_length)
{
	if (headers->refusal != RECEIVER_NOT_REFUSED ||
		name_length <= PREFIX_LENGTH || strncasecmp(name, PREFIX, PREFIX_LENGTH) != 0)
		return;
	/* Which of two would the signature be for?  No sender of ours leaves that open. */
	if (is_repeated(headers, name, name_length))
		headers->refusal = RECEIVER_HEADER_REPEATED;
	else if (headers->count == RECEIVER_MAX_HEADERS)
		headers->refusal = RECEIVER_HEADERS_TOO_LARGE;
	if (headers->refusal != RECEIVER_NOT_REFUSED)
		return;
	if (headers->count > 0)
		append(headers, ",", 1);
	headers->names[headers->count] = name;
	headers->name_lengths[headers->count++] = name_length;
	append_string(headers, name, name_length);
	append(headers, ":", 1);
	append_string(headers, value, value_length);
}

ReceiverRefusal
receiver_headers_end(ReceiverHeaders *headers)
{
	append(headers, "}", 1);
	if (headers->refusal != RECEIVER_NOT_REFUSED)
	{
		free(headers->json);
		headers->json = NULL;
	}
	return headers->refusal;
}
