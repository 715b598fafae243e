/*
 * batch.c
 *		Some events as the parameters of one query, and its result as answers.
 *
 * Arrays go in PostgreSQL's binary format, so that no byte of a body needs to be
 * escaped on one side and parsed on the other.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "batch.h"

#define BYTEA_OID 17
#define JSONB_OID 3802
#define JSONB_VERSION 1
#define KEPT_CAPACITY (4 * 1024 * 1024) /* bytes */

static void
append(ReceiverBuffer *buffer, const void *data, size_t length)
{
	if (buffer->failed)
		return;
	if (buffer->length + length > buffer->capacity)
	{
		size_t		capacity = 2 * (buffer->length + length);
		char	   *grown = realloc(buffer->data, capacity);

		if (grown == NULL)
		{
			buffer->failed = true;
			return;
		}
		buffer->data = grown;
		buffer->capacity = capacity;
	}
	if (length > 0)
		memcpy(buffer->data + buffer->length, data, length);
	buffer->length += length;
}

static void
append_int32(ReceiverBuffer *buffer, uint32_t value)
{
	uint32_t	network = htonl(value);

	append(buffer, &network, sizeof(network));
}

/* The head of a one-dimensional array without NULLs. */
static void
begin_array(ReceiverBuffer *buffer, uint32_t element_oid, int n)
{
	buffer->length = 0;
	buffer->failed = false;
	append_int32(buffer, 1);	/* dimensions */
	append_int32(buffer, 0);	/* no NULLs */
	append_int32(buffer, element_oid);
	append_int32(buffer, (uint32_t) n);
	append_int32(buffer, 1);	/* first subscript */
}

bool
receiver_batch_encode(ReceiverBatch *batch, ReceiverEvent **events, int n)
{
	const char	version = JSONB_VERSION;

	begin_array(&batch->payloads, BYTEA_OID, n);
	begin_array(&batch->headers, JSONB_OID, n);
	for (int i = 0; i < n; i++)
	{
		append_int32(&batch->payloads, (uint32_t) events[i]->body_length);
		append(&batch->payloads, events[i]->body, events[i]->body_length);
		append_int32(&batch->headers, (uint32_t) events[i]->headers_length + 1);
		append(&batch->headers, &version, 1);
		append(&batch->headers, events[i]->headers, events[i]->headers_length);
	}
	return !batch->payloads.failed && !batch->headers.failed;
}

/* Columns of the query in writer.c. */
enum
{
	ORDINAL,
	HTTP_STATUS,
	EVENT_ID,
	DUPLICATE,
	REASON,
	COLUMNS
};

static void
decode_row(const PGresult *result, int row, ReceiverEvent *event)
{
	int			http_status = atoi(PQgetvalue(result, row, HTTP_STATUS));

	/* What cannot be a final HTTP status must not look like success. */
	event->http_status = http_status >= 200 && http_status <= 599 ? http_status : 500;
	event->event_id = strtoll(PQgetvalue(result, row, EVENT_ID), NULL, 10);
	event->duplicate = PQgetvalue(result, row, DUPLICATE)[0] == 't';
	snprintf(event->reason, sizeof(event->reason), "%s", PQgetvalue(result, row, REASON));
}

bool
receiver_batch_decode(const PGresult *result, ReceiverEvent **events, int n)
{
	if (PQnfields(result) != COLUMNS || PQntuples(result) != n)
		return false;
	for (int i = 0; i < n; i++)
		events[i]->http_status = 0;
	for (int row = 0; row < n; row++)
	{
		int			ordinal = atoi(PQgetvalue(result, row, ORDINAL));

		if (ordinal < 1 || ordinal > n || events[ordinal - 1]->http_status != 0)
			return false;
		decode_row(result, row, events[ordinal - 1]);
	}
	return true;
}

static void
trim(ReceiverBuffer *buffer)
{
	if (buffer->capacity > KEPT_CAPACITY)
	{
		free(buffer->data);
		memset(buffer, 0, sizeof(*buffer));
	}
}

void
receiver_batch_trim(ReceiverBatch *batch)
{
	trim(&batch->payloads);
	trim(&batch->headers);
}

void
receiver_batch_free(ReceiverBatch *batch)
{
	free(batch->payloads.data);
	free(batch->headers.data);
	memset(batch, 0, sizeof(*batch));
}
