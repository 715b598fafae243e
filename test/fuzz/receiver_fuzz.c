/*
 * receiver_fuzz.c
 *		Fuzz target (libFuzzer) of the receiver: the bytes of a connection, to the
 *		real listener with its real libmicrohttpd, and what comes back.
 *
 * parts: receiver/listener receiver/request receiver/headers receiver/address receiver/connection receiver/queue receiver/refusal receiver/metrics
 * flags: -D_GNU_SOURCE -DSENTDM_VERSION="fuzz" -pthread
 * libs: -lmicrohttpd -lcrypto
 *
 * An input is what a client sends before it closes its side.  Instead of the
 * database, the harness takes the events from the queue and answers them, with a
 * status and a reason out of the body.  It checks that each event is what was sent,
 * that its headers are what PostgreSQL accepts as jsonb, that whatever comes back
 * is HTTP with JSON in it, that no log line has a byte it must not have, and that
 * afterwards nothing is left: no request, no connection, no memory.
 */
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"
#include "receiver/clock.h"
#include "receiver/connection.h"
#include "receiver/listener.h"
#include "receiver/log.h"
#include "receiver/metrics.h"

#define MAX_ANSWERS (1 << 20)	/* bytes */
#define MAX_BATCH 8
#define LIMIT_US (8 * 1000000)	/* for everything about one input */

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static ReceiverConfig config = {
	.path = "/webhooks/sent", .threads = 1, .max_connections = 8,
	.max_connections_per_address = 4, .max_body = 16384, .max_headers = 4096,
	.request_timeout_us = 60 * 1000000, .idle_timeout_us = 60 * 1000000,
	.queue_timeout_us = 60 * 1000000, .log_requests = true
};
static ReceiverQueue *queue;
static struct sockaddr_un address = {.sun_family = AF_UNIX};
static socklen_t address_length = sizeof(address);
static char answers[MAX_ANSWERS + 1];

/* Instead of log.c: a line must be printable, whatever the client sent. */
static void
check_line(const char *format, va_list args)
{
	char		line[2048];
	int			length = vsnprintf(line, sizeof(line), format, args);

	CHECK(length > 0 && length < (int) sizeof(line));
	for (int i = 0; i < length; i++)
		CHECK(line[i] >= 0x20 && line[i] < 0x7f);
}

void
receiver_log_access(const char *format,...)
{
	va_list		args;

	va_start(args, format);
	check_line(format, args);
	va_end(args);
}

/* Messages of libmicrohttpd are not ours; log.c replaces what is not printable. */
void
receiver_log(ReceiverLogLevel level, const char *format,...)
{
	(void) level;
	(void) format;
}

/* A string of JSON from its opening quote; returns what follows it. */
static const char *
check_string(const char *json, const char *end)
{
	CHECK(json < end && *json == '"');
	for (json++; json < end && *json != '"'; json++)
	{
		CHECK((unsigned char) *json >= 0x20);
		if (*json != '\\')
			continue;
		json++;
		CHECK(json < end && strchr("\"\\u", *json) != NULL);
		if (*json != 'u')
			continue;
		/* Not U+0000, which jsonb cannot hold. */
		CHECK(end - json > 5 && strspn(json + 1, "0123456789abcdef") >= 4);
		CHECK(strncmp(json + 1, "0000", 4) != 0);
	}
	CHECK(json < end);
	return json + 1;
}

/* UTF-8 as Unicode defines it, written in another way than headers.c has it. */
static void
check_utf8(const char *text, size_t length)
{
	static const uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};

	for (size_t i = 0; i < length;)
	{
		unsigned char c = (unsigned char) text[i];
		int			n = c < 0x80 ? 1 : c >> 5 == 6 ? 2 : c >> 4 == 14 ? 3 : c >> 3 == 30 ? 4 : 0;
		uint32_t	value = n == 1 ? c : c & (0x7f >> n);

		CHECK(n > 0 && i + (size_t) n <= length);
		for (int k = 1; k < n; k++)
		{
			CHECK(((unsigned char) text[i + (size_t) k] & 0xc0) == 0x80);
			value = value << 6 | ((unsigned char) text[i + (size_t) k] & 0x3f);
		}
		CHECK(value >= smallest[n] && value <= 0x10ffff && (value < 0xd800 || value > 0xdfff));
		i += (size_t) n;
	}
}

/* {"X-Webhook-...":"...",...}, no name twice. */
static void
check_headers(const char *json, size_t length)
{
	const char *names[64];
	size_t		lengths[64];
	const char *end = json + length;
	int			n = 0;

	check_utf8(json, length);
	CHECK(length >= 2 && *json == '{' && end[-1] == '}');
	for (json++; *json != '}'; json += *json == ',')
	{
		CHECK(n < 64);
		names[n] = json + 1;
		json = check_string(json, end);
		lengths[n] = (size_t) (json - 1 - names[n]);
		CHECK(lengths[n] > 10 && strncasecmp(names[n], "x-webhook-", 10) == 0);
		for (int i = 0; i < n; i++)
			CHECK(lengths[i] != lengths[n] || strncasecmp(names[i], names[n], lengths[n]) != 0);
		n++;
		CHECK(*json == ':');
		json = check_string(json + 1, end);
		CHECK(*json == ',' ? json[1] == '"' : *json == '}');
	}
	CHECK(json + 1 == end);
}

/* As the database would: some status, some reason. */
static void
answer_event(ReceiverEvent *event, const uint8_t *data, size_t size)
{
	static const int statuses[] = {200, 401, 400, 500};
	size_t		length = event->body_length;

	CHECK(length <= (size_t) config.max_body);
	CHECK(length == 0 || memmem(data, size, event->body, length) != NULL);
	check_headers(event->headers, event->headers_length);
	if (length > 0 && event->body[0] == '!')
	{
		receiver_event_refuse(event, RECEIVER_OUTCOME_UNKNOWN);
		return;
	}
	event->http_status = statuses[length % 4];
	event->event_id = (int64_t) length;
	event->duplicate = length % 2;
	for (size_t i = 0; i < length && i < sizeof(event->reason) - 1; i++)
		event->reason[i] = event->body[i] >= 0x20 && event->body[i] < 0x7f ? event->body[i] : '?';
	event->answered(event);
}

static void
answer_events(const uint8_t *data, size_t size)
{
	ReceiverEvent *events[MAX_BATCH];
	int			n;

	while ((n = receiver_queue_take(queue, events, MAX_BATCH, SIZE_MAX)) > 0)
	{
		for (int i = 0; i < n; i++)
			answer_event(events[i], data, size);
	}
}

static int
connect_to_listener(void)
{
	int			fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);

	CHECK(fd >= 0 && connect(fd, (struct sockaddr *) &address, address_length) == 0);
	return fd;
}

/* Send it all, answer events, and collect what comes back until its end. */
static size_t
converse(int fd, const uint8_t *data, size_t size)
{
	int64_t		until_us = receiver_now_us() + LIMIT_US;
	size_t		sent = 0;
	size_t		received = 0;
	bool		open = true;

	while (open)
	{
		struct pollfd fds[2] = {{fd, sent < size ? POLLIN | POLLOUT : POLLIN, 0}, {receiver_queue_fd(queue), POLLIN, 0}};
		ssize_t		n;

		CHECK(receiver_now_us() < until_us);
		if (receiver_queue_prepare_wait(queue, 1))
			poll(fds, 2, 1000);
		receiver_queue_end_wait(queue);
		answer_events(data, size);
		if (sent < size && (n = send(fd, data + sent, size - sent, MSG_NOSIGNAL)) > 0)
			sent += (size_t) n;
		if (sent == size)
			shutdown(fd, SHUT_WR);
		while (open && (n = recv(fd, answers + received, MAX_ANSWERS - received, 0)) != -1)
		{
			received += (size_t) n;
			open = n > 0;
		}
		/* Refused before all was read: what was not is of no interest. */
		if (open && errno != EAGAIN)
			open = false;
	}
	return received;
}

/* One answer after the other, each whole; the last one may be cut off. */
static void
check_answers(const char *text, size_t length)
{
	const char *end = text + length;

	while (text < end)
	{
		const char *head_end = memmem(text, (size_t) (end - text), "\r\n\r\n", 4);
		const char *field;
		size_t		body_length = 0;
		int			status;

		if (head_end == NULL)
			return;
		CHECK(sscanf(text, "HTTP/1.%*1[01] %3d ", &status) == 1 && status >= 100 && status <= 599);
		for (const char *c = text; c < head_end; c++)
			CHECK(*c == '\r' || *c == '\n' || (*c >= 0x20 && *c < 0x7f));
		field = memmem(text, (size_t) (head_end - text), "Content-Length: ", 16);
		if (field != NULL)
			body_length = strtoul(field + 16, NULL, 10);
		field = memmem(text, (size_t) (head_end - text), "X-Request-ID: ", 14);
		text = head_end + 4;
		/* Only the head was asked for. */
		if (text == end || *text == 'H')
			continue;
		if ((size_t) (end - text) < body_length)
			return;
		/* Ours, and not libmicrohttpd's own. */
		if (field != NULL && body_length > 0 && status == 200)
			CHECK(body_length == 18 && memcmp(text, "{\"received\": true}", 18) == 0);
		else if (field != NULL && body_length > 0)
		{
			CHECK(body_length > 12 && memcmp(text, "{\"error\": ", 10) == 0);
			CHECK(check_string(text + 10, text + body_length - 1) == text + body_length - 1);
		}
		text += body_length;
	}
}

/* All that the connection had is given back, at once or a moment later. */
static void
check_nothing_left(void)
{
	int64_t		until_us = receiver_now_us() + LIMIT_US;

	while (receiver_listener_requests() > 0 || receiver_connections_open() > 0 || receiver_queue_bytes(queue) > 0)
	{
		CHECK(receiver_now_us() < until_us);
		poll(NULL, 0, 0);
	}
	CHECK(receiver_queue_depth(queue) == 0);
}

static void
start(void)
{
	int			fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	static const char *const networks[] = {"::/128", "10.0.0.0/8", "2001:db8::/32"};

	for (int i = 0; i < 3; i++)
		CHECK(receiver_network_parse(&config.proxies[config.n_proxies++], networks[i], strlen(networks[i])));
	CHECK(receiver_connections_init((int) config.max_connections_per_address, config.proxies, config.n_proxies));
	/* The kernel chooses a name that no file has. */
	CHECK(fd >= 0 && bind(fd, (struct sockaddr *) &address, sizeof(sa_family_t)) == 0 && listen(fd, 8) == 0);
	CHECK(getsockname(fd, (struct sockaddr *) &address, &address_length) == 0);
	queue = receiver_queue_create(4, 65536);
	CHECK(queue != NULL && receiver_listener_start(&config, queue, fd, true));
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t		received;
	int			fd;

	if (queue == NULL)
		start();
	fd = connect_to_listener();
	received = converse(fd, data, size);
	close(fd);
	answer_events(data, size);
	check_answers(answers, received);
	check_nothing_left();
	return 0;
}
