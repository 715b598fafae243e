/*
 * request.c
 *		One HTTP request to the listener, from its first line to its answer.
 *
 * Nothing that a client says reaches the log, except an X-Request-ID of harmless
 * characters: not the path, not the query, no header, no body.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "clock.h"
#include "headers.h"
#include "log.h"
#include "metrics.h"
#include "request.h"

#define FIRST_BODY 4096			/* bytes */
#define MAX_DISCARDED (4 * 1024 * 1024) /* bytes of a body that we read to throw away */
#define RETRY_AFTER "5"			/* seconds */
#define ID_BYTES 16

#define REQUEST_ID_CHARACTERS \
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"

ReceiverRequest *
receiver_request_create(struct MHD_Connection *http, ReceiverConnection *connection)
{
	ReceiverRequest *request = calloc(1, sizeof(ReceiverRequest));

	if (request == NULL)
		return NULL;
	request->http = http;
	request->connection = connection;
	request->client = *receiver_connection_peer(connection);
	request->start_us = receiver_now_us();
	request->method = "-";
	request->path = "-";
	return request;
}

void
receiver_request_free(ReceiverRequest *request, ReceiverQueue *queue)
{
	if (request->counted)
		receiver_address_release(&request->client);
	receiver_queue_release(queue, request->reserved);
	free(request->event.body);
	free(request->event.headers);
	free(request);
}

/* Random bytes for one id; the kernel is asked for those of many at once. */
static const unsigned char *
random_bytes(void)
{
	static _Thread_local unsigned char pool[ID_BYTES * 64];
	static _Thread_local size_t used = sizeof(pool);

	if (used == sizeof(pool))
	{
		/* An id that is not unique is better than none: it is for people. */
		if (getrandom(pool, sizeof(pool), 0) < 0)
			memset(pool, 0, sizeof(pool));
		used = 0;
	}
	used += ID_BYTES;
	return pool + used - ID_BYTES;
}

/* A random UUID. */
static void
make_id(char *id)
{
	static const char digits[] = "0123456789abcdef";
	const unsigned char *bytes = random_bytes();

	for (int i = 0; i < ID_BYTES; i++)
	{
		unsigned char byte = bytes[i];

		if (i == 4 || i == 6 || i == 8 || i == 10)
			*id++ = '-';
		if (i == 6)
			byte = (byte & 0x0f) | 0x40;
		else if (i == 8)
			byte = (byte & 0x3f) | 0x80;
		*id++ = digits[byte >> 4];
		*id++ = digits[byte & 0x0f];
	}
	*id = '\0';
}

static const char *
header(const ReceiverRequest *request, const char *name)
{
	return MHD_lookup_connection_value(request->http, MHD_HEADER_KIND, name);
}

static void
take_id(ReceiverRequest *request)
{
	const char *id = header(request, "X-Request-ID");
	size_t		length = id ? strlen(id) : 0;

	if (length >= 1 && length <= RECEIVER_REQUEST_ID_LENGTH &&
		strspn(id, REQUEST_ID_CHARACTERS) == length)
		memcpy(request->id, id, length + 1);
	else
		make_id(request->id);
}

static void
refuse(ReceiverRequest *request, ReceiverRefusal refusal)
{
	if (request->event.refusal == RECEIVER_NOT_REFUSED)
		request->event.refusal = refusal;
}

/* A word for the log. */
static const char *
known_method(const char *method)
{
	static const char *const methods[] = {"POST", "GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"};

	for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
	{
		if (strcmp(methods[i], method) == 0)
			return methods[i];
	}
	return "other";
}

/* What goes through a trusted proxy counts for its client, not for the proxy. */
static void
find_client(ReceiverRequest *request, const ReceiverConfig *config)
{
	const char *forwarded_for = header(request, "X-Forwarded-For");

	if (!receiver_connection_is_proxy(request->connection))
		return;
	if (forwarded_for != NULL)
		receiver_address_forwarded(&request->client, forwarded_for, config->proxies, config->n_proxies);
	if (receiver_network_contains(config->proxies, config->n_proxies, &request->client))
		return;
	request->counted = receiver_address_acquire(&request->client);
	if (!request->counted)
		refuse(request, RECEIVER_TOO_MANY);
}

/* Without a Content-Type it may still be what it should; with another it is not. */
static bool
is_json(const char *content_type)
{
	static const char json[] = "application/json";
	const char *rest;

	if (content_type == NULL)
		return true;
	if (strncasecmp(content_type, json, sizeof(json) - 1) != 0)
		return false;
	rest = content_type + sizeof(json) - 1;
	return *rest == '\0' || *rest == ';' || *rest == ' ' || *rest == '\t';
}

/* Content-Length; -1: not one number. */
static long long
read_length(const char *text)
{
	long long	length = 0;

	if (*text == '\0')
		return -1;
	for (; *text; text++)
	{
		if (*text < '0' || *text > '9')
			return -1;
		if (length < INT64_MAX / 16)
			length = length * 10 + (*text - '0');
	}
	return length;
}

/* One walk over all headers. */
typedef struct Walk
{
	ReceiverHeaders headers;
	int			content_lengths;
} Walk;

static enum MHD_Result
visit_header(void *arg, enum MHD_ValueKind kind, const char *name, size_t name_length,
			 const char *value, size_t value_length)
{
	Walk	   *walk = arg;

	(void) kind;
	if (strcasecmp(name, MHD_HTTP_HEADER_CONTENT_LENGTH) == 0)
		walk->content_lengths++;
	receiver_headers_add(&walk->headers, name, name_length, value ? value : "", value ? value_length : 0);
	return MHD_YES;
}

static void
examine_length(ReceiverRequest *request, const ReceiverConfig *config)
{
	const char *text = header(request, MHD_HTTP_HEADER_CONTENT_LENGTH);
	long long	length;

	if (text == NULL || header(request, MHD_HTTP_HEADER_TRANSFER_ENCODING) != NULL)
	{
		refuse(request, RECEIVER_NO_LENGTH);
		return;
	}
	length = read_length(text);
	if (length < 0)
		refuse(request, RECEIVER_NO_LENGTH);
	else if (length > config->max_body)
		refuse(request, RECEIVER_BODY_TOO_LARGE);
	if (length > 0)
		request->content_length = (size_t) length;
}

static void
examine_headers(ReceiverRequest *request, const ReceiverConfig *config)
{
	const union MHD_ConnectionInfo *size =
		MHD_get_connection_info(request->http, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
	Walk		walk = {.content_lengths = 0};
	ReceiverRefusal refusal;

	receiver_headers_begin(&walk.headers);
	MHD_get_connection_values_n(request->http, MHD_HEADER_KIND, visit_header, &walk);
	refusal = receiver_headers_end(&walk.headers);
	request->event.headers = walk.headers.json;
	request->event.headers_length = walk.headers.length;
	if (size != NULL && size->header_size > (size_t) config->max_headers)
		refuse(request, RECEIVER_HEADERS_TOO_LARGE);
	/* Two lengths are how one request is smuggled into another. */
	if (walk.content_lengths > 1)
		refuse(request, RECEIVER_HEADER_REPEATED);
	if (refusal != RECEIVER_NOT_REFUSED)
		refuse(request, refusal);
}

void
receiver_request_examine(ReceiverRequest *request, const ReceiverConfig *config,
						 const char *method, const char *path)
{
	request->examined = true;
	request->method = known_method(method);
	take_id(request);
	find_client(request, config);
	if (strcmp(path, config->path) != 0)
		refuse(request, RECEIVER_NOT_FOUND);
	else
		request->path = config->path;
	if (strcmp(method, MHD_HTTP_METHOD_POST) != 0)
		refuse(request, RECEIVER_METHOD);
	examine_length(request, config);
	if (!is_json(header(request, MHD_HTTP_HEADER_CONTENT_TYPE)))
		refuse(request, RECEIVER_CONTENT_TYPE);
	examine_headers(request, config);
}

/*
 * A refused request is answered after its body, so that the answer is not lost with
 * a connection that is reset, and the connection can be used again.  Not when the
 * client waits for "100 Continue", nor when the end of the body is far or unknown.
 */
bool
receiver_request_is_hopeless(const ReceiverRequest *request)
{
	return request->event.refusal != RECEIVER_NOT_REFUSED &&
		(header(request, MHD_HTTP_HEADER_EXPECT) != NULL ||
		 header(request, MHD_HTTP_HEADER_TRANSFER_ENCODING) != NULL ||
		 request->content_length > MAX_DISCARDED);
}

/* Memory grows with what has arrived, not with what is announced. */
static bool
grow_body(ReceiverRequest *request, ReceiverQueue *queue, size_t needed)
{
	size_t		capacity = request->reserved ? request->reserved : FIRST_BODY;
	char	   *grown;

	while (capacity < needed)
		capacity *= 2;
	if (capacity > request->content_length)
		capacity = request->content_length;
	if (needed > capacity || !receiver_queue_reserve(queue, capacity - request->reserved))
		return false;
	grown = realloc(request->event.body, capacity);
	if (grown == NULL)
	{
		receiver_queue_release(queue, capacity - request->reserved);
		return false;
	}
	request->event.body = grown;
	request->reserved = capacity;
	return true;
}

void
receiver_request_add_body(ReceiverRequest *request, ReceiverQueue *queue,
						  const char *data, size_t length)
{
	ReceiverEvent *event = &request->event;

	request->received += length;
	if (event->refusal != RECEIVER_NOT_REFUSED)
		return;
	if (event->body_length + length > request->reserved &&
		!grow_body(request, queue, event->body_length + length))
	{
		refuse(request, RECEIVER_NO_MEMORY);
		return;
	}
	memcpy(event->body + event->body_length, data, length);
	event->body_length += length;
}

/* reason is ASCII, ours or the function's. */
static struct MHD_Response *
make_response(int status, const char *reason)
{
	static const char received[] = "{\"received\": true}";
	char		text[160];
	int			length = 0;

	if (status == 200)
		return MHD_create_response_from_buffer(sizeof(received) - 1, (void *) received,
											   MHD_RESPMEM_PERSISTENT);
	length = snprintf(text, sizeof(text), "{\"error\": \"");
	for (; *reason && length < (int) sizeof(text) - 8; reason++)
	{
		if (*reason == '"' || *reason == '\\')
			text[length++] = '\\';
		if ((unsigned char) *reason >= 0x20 && (unsigned char) *reason < 0x7f)
			text[length++] = *reason;
	}
	text[length++] = '"';
	text[length++] = '}';
	return MHD_create_response_from_buffer((size_t) length, text, MHD_RESPMEM_MUST_COPY);
}

static void
add_headers(struct MHD_Response *response, const ReceiverRequest *request, bool stopping)
{
	char		seconds[32];
	long long	elapsed_us = receiver_now_us() - request->start_us;

	MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, "application/json");
	MHD_add_response_header(response, "X-Request-ID", request->id);
	snprintf(seconds, sizeof(seconds), "%lld.%06lld", elapsed_us / 1000000, elapsed_us % 1000000);
	MHD_add_response_header(response, "X-Process-Time", seconds);
	if (request->status == 405)
		MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "POST");
	if (request->status == 503 || request->status == 429)
		MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, RETRY_AFTER);
	if (stopping)
		MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
}

enum MHD_Result
receiver_request_answer(ReceiverRequest *request, bool stopping)
{
	ReceiverEvent *event = &request->event;
	struct MHD_Response *response;
	enum MHD_Result result;

	if (event->refusal != RECEIVER_NOT_REFUSED)
		request->status = receiver_refusal_status(event->refusal);
	else
		request->status = event->http_status;
	response = make_response(request->status, event->refusal != RECEIVER_NOT_REFUSED ?
							 receiver_refusal_text(event->refusal) : event->reason);
	if (response == NULL)
		return MHD_NO;
	add_headers(response, request, stopping);
	result = MHD_queue_response(request->http, (unsigned int) request->status, response);
	MHD_destroy_response(response);
	return result;
}

static void
count(const ReceiverRequest *request, int64_t elapsed_us)
{
	const ReceiverEvent *event = &request->event;

	if (event->refusal != RECEIVER_NOT_REFUSED)
		receiver_metrics_refused(event->refusal);
	else if (request->status == 200)
		receiver_metrics_accepted(event->duplicate);
	else if (request->status != 0)
		receiver_metrics_rejected(request->status, event->reason);
	receiver_metrics_observe(RECEIVER_REQUEST_TIME, elapsed_us);
}

static const char *
reason_of(const ReceiverRequest *request)
{
	if (request->event.refusal != RECEIVER_NOT_REFUSED)
		return receiver_refusal_text(request->event.refusal);
	return request->status == 0 ? "the client went away" : request->event.reason;
}

void
receiver_request_account(const ReceiverRequest *request, bool log)
{
	const ReceiverEvent *event = &request->event;
	long long	elapsed_us = receiver_now_us() - request->start_us;
	char		client[RECEIVER_ADDRESS_TEXT];

	count(request, elapsed_us);
	if (!log)
		return;
	receiver_address_format(&request->client, client);
	receiver_log_access("request client=%s id=%s method=%s path=%s status=%d bytes=%zu ms=%lld.%lld"
						" event=%lld duplicate=%s reason=\"%s\"",
						client, request->id[0] ? request->id : "-", request->method, request->path,
						request->status, request->received,
						elapsed_us / 1000, elapsed_us / 100 % 10,
						(long long) event->event_id, event->duplicate ? "true" : "false",
						reason_of(request));
}
