/*
 * server.c
 *		A stand-in for Sent that is never the bottleneck of a measurement.
 *
 * One thread, epoll, HTTP/1.1 with connections that stay open.  It takes every
 * POST to /v3/messages, answers 202 with an id for each recipient and channel,
 * and notes when each Idempotency-Key arrived.  It judges nothing; for faults
 * and for what the API refuses there is test/standin.py.
 *
 *		server [PORT]		0 or none: any; the port is printed
 *
 * Control, on the same port:
 *		POST /reset?latency_us=N&hang=N		forget all; answer after a fixed time;
 *											never answer the next so many
 *		GET /count							what arrived, as one line of JSON
 *		GET /arrivals						a line for each: key, Unix time in us
 *
 * It listens on loopback only.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define EVENTS_AT_ONCE 256
#define READ_AT_ONCE (64 * 1024)
#define MAX_REQUEST (1024 * 1024)
#define KEY_SIZE 56
#define MAX_CHANNELS 8

typedef struct Buffer
{
	char	   *data;
	size_t		length;
	size_t		capacity;
} Buffer;

typedef struct Connection
{
	int			fd;
	bool		waiting;		/* for its latency to pass, or forever */
	bool		write_blocked;
	bool		closed;			/* freed once no delayed answer refers to it */
	int			delayed;		/* answers in the queue below */
	Buffer		in;
	Buffer		out;
} Connection;

typedef struct Arrival
{
	char		key[KEY_SIZE];
	int64_t		unix_us;
} Arrival;

/* Answers that are held back; all by the same time, so first in, first out. */
typedef struct Delayed
{
	Connection *connection;
	int64_t		due_us;
	Buffer		answer;
} Delayed;

/* Where the parts of a request lie in the connection's buffer. */
typedef struct Request
{
	const char *line;
	const char *body;
	size_t		body_length;
	char		key[KEY_SIZE];
} Request;

static int	epoll_fd;
static int	timer_fd;
static int64_t latency_us;
static int64_t hang;
static Arrival *arrivals;
static size_t n_arrivals,
			max_arrivals;
static uint64_t *seen;			/* hashes of keys, open addressing */
static size_t max_seen;
static int64_t n_recipients,
			n_repeated;
static Delayed *delayed;		/* a ring */
static size_t first_delayed,
			n_delayed,
			max_delayed;
static uint64_t random_state[2];

static void
die(const char *what)
{
	perror(what);
	exit(1);
}

static void *
grow(void *memory, size_t size)
{
	memory = realloc(memory, size);
	if (memory == NULL)
		die("realloc");
	return memory;
}

static int64_t
now_us(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Buffers */

static void
reserve(Buffer *buffer, size_t more)
{
	size_t		needed = buffer->length + more;

	if (needed <= buffer->capacity)
		return;
	buffer->capacity = needed * 2;
	buffer->data = grow(buffer->data, buffer->capacity);
}

static void
append(Buffer *buffer, const char *data, size_t length)
{
	reserve(buffer, length);
	memcpy(buffer->data + buffer->length, data, length);
	buffer->length += length;
}

static void
append_text(Buffer *buffer, const char *text)
{
	append(buffer, text, strlen(text));
}

static void
drop_front(Buffer *buffer, size_t length)
{
	buffer->length -= length;
	memmove(buffer->data, buffer->data + length, buffer->length);
}

/* Ids */

/* xorshift128+ */
static uint64_t
next_random(void)
{
	uint64_t	a = random_state[0];
	uint64_t	b = random_state[1];

	random_state[0] = b;
	a ^= a << 23;
	random_state[1] = a ^ b ^ (a >> 17) ^ (b >> 26);
	return random_state[1] + b;
}

/* A random UUID, as text without a terminating NUL. */
static void
put_uuid(char *out)
{
	static const char digits[] = "0123456789abcdef";
	uint64_t	bits[2] = {next_random(), next_random()};

	for (int i = 0, nibble = 0; i < 36; i++)
	{
		if (i == 8 || i == 13 || i == 18 || i == 23)
			out[i] = '-';
		else
		{
			out[i] = digits[bits[nibble / 16] >> (nibble % 16 * 4) & 15];
			nibble++;
		}
	}
	out[14] = '4';
	out[19] = '8';
}

/* What arrived */

static uint64_t
hash_of(const char *key)
{
	uint64_t	hash = 14695981039346656037u;

	for (; *key; key++)
		hash = (hash ^ (unsigned char) *key) * 1099511628211u;
	return hash ? hash : 1;
}

static bool
note_seen(uint64_t hash)
{
	size_t		i;

	for (i = hash & (max_seen - 1); seen[i] != 0; i = (i + 1) & (max_seen - 1))
	{
		if (seen[i] == hash)
			return true;
	}
	seen[i] = hash;
	return false;
}

static void
make_room_for_arrival(void)
{
	if (n_arrivals < max_arrivals)
		return;
	max_arrivals = max_arrivals ? max_arrivals * 2 : 65536;
	arrivals = grow(arrivals, max_arrivals * sizeof(Arrival));
	free(seen);
	max_seen = max_arrivals * 4;
	seen = calloc(max_seen, sizeof(uint64_t));
	if (seen == NULL)
		die("calloc");
	for (size_t i = 0; i < n_arrivals; i++)
		note_seen(hash_of(arrivals[i].key));
}

static void
note_arrival(const char *key, int64_t unix_us)
{
	Arrival    *arrival;

	make_room_for_arrival();
	arrival = &arrivals[n_arrivals++];
	memcpy(arrival->key, key, KEY_SIZE);
	arrival->unix_us = unix_us;
	if (note_seen(hash_of(key)))
		n_repeated++;
}

/* Answers */

static const char *
date_header(void)
{
	static char header[64];
	static time_t made_at;
	time_t		now = time(NULL);

	if (now != made_at)
	{
		made_at = now;
		strftime(header, sizeof(header), "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", gmtime(&now));
	}
	return header;
}

static void
put_answer(Buffer *out, const char *status, const char *type, const Buffer *body)
{
	char		length[32];
	char		id[36];

	put_uuid(id);
	snprintf(length, sizeof(length), "%zu\r\n\r\n", body->length);
	append_text(out, "HTTP/1.1 ");
	append_text(out, status);
	append_text(out, "\r\n");
	append_text(out, date_header());
	append_text(out, "Content-Type: ");
	append_text(out, type);
	append_text(out, "\r\nX-Request-Id: req_");
	append(out, id, 8);
	append_text(out, "\r\nContent-Length: ");
	append_text(out, length);
	append(out, body->data, body->length);
}

/* The strings of an array of the request, without quotes; returns how many. */
static int
strings_of(const char *body, const char *end, const char *field, const char **strings,
		   int *lengths, int max)
{
	const char *p = memmem(body, end - body, field, strlen(field));
	int			n = 0;

	if (p == NULL || (p = memchr(p, '[', end - p)) == NULL)
		return 0;
	while (n < max && p < end && *p != ']')
	{
		const char *close;

		if (*p++ != '"')
			continue;
		close = memchr(p, '"', end - p);
		if (close == NULL)
			break;
		strings[n] = p;
		lengths[n++] = close - p;
		p = close + 1;
	}
	return n;
}

static void
put_recipient(Buffer *body, const char *to, int to_length, const char *channel, int channel_length)
{
	char		id[36];

	put_uuid(id);
	append_text(body, "{\"message_id\":\"");
	append(body, id, sizeof(id));
	append_text(body, "\",\"to\":\"");
	append(body, to, to_length);
	if (channel == NULL)
		append_text(body, "\",\"channel\":null,\"body\":null},");
	else
	{
		append_text(body, "\",\"channel\":\"");
		append(body, channel, channel_length);
		append_text(body, "\",\"body\":null},");
	}
	n_recipients++;
}

/* PostgreSQL writes "to" first, as jsonb sorts short keys before longer ones. */
static void
accept_message(Buffer *out, const Request *request)
{
	static Buffer body;
	static const char *to[1000];
	static int	to_lengths[1000];
	const char *channels[MAX_CHANNELS];
	int			channel_lengths[MAX_CHANNELS];
	const char *end = request->body + request->body_length;
	int			n_to = strings_of(request->body, end, "\"to\"", to, to_lengths, 1000);
	int			n_channels = strings_of(request->body, end, "\"channel\"", channels,
										channel_lengths, MAX_CHANNELS);

	body.length = 0;
	append_text(&body, "{\"success\":true,\"data\":{\"status\":\"QUEUED\",\"template_id\":null,"
				"\"template_name\":null,\"recipients\":[");
	for (int i = 0; i < n_to; i++)
	{
		for (int c = 0; c < (n_channels ? n_channels : 1); c++)
			put_recipient(&body, to[i], to_lengths[i], n_channels ? channels[c] : NULL,
						  n_channels ? channel_lengths[c] : 0);
	}
	if (n_to > 0)
		body.length--;			/* the last comma */
	append_text(&body, "]},\"error\":null,\"meta\":{\"request_id\":\"req_7X9zKp2jDw\","
				"\"timestamp\":\"2026-03-11T21:50:49.6728596+00:00\",\"version\":\"v3\"}}");
	put_answer(out, "202 Accepted", "application/json", &body);
}

static int64_t
argument(const char *line, const char *name)
{
	const char *end = strchr(line, '\r');
	const char *p = memmem(line, end - line, name, strlen(name));

	return p ? strtoll(p + strlen(name), NULL, 10) : 0;
}

static void
reset(const char *line)
{
	latency_us = argument(line, "latency_us=");
	hang = argument(line, "hang=");
	n_arrivals = 0;
	n_recipients = 0;
	n_repeated = 0;
	if (max_seen > 0)
		memset(seen, 0, max_seen * sizeof(uint64_t));
}

static void
answer_control(Buffer *out, const Request *request)
{
	Buffer		body = {0};
	char		line[256];
	struct rusage usage;

	if (strncmp(request->line, "POST /reset", 11) == 0)
		reset(request->line);
	else if (strncmp(request->line, "GET /arrivals", 13) == 0)
	{
		for (size_t i = 0; i < n_arrivals; i++)
		{
			snprintf(line, sizeof(line), "%s %lld\n", arrivals[i].key,
					 (long long) arrivals[i].unix_us);
			append_text(&body, line);
		}
	}
	else
	{
		getrusage(RUSAGE_SELF, &usage);
		snprintf(line, sizeof(line), "{\"requests\": %zu, \"recipients\": %lld, \"repeated\": %lld,"
				 " \"cpu_us\": %lld}\n", n_arrivals, (long long) n_recipients, (long long) n_repeated,
				 (long long) (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 +
				 usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
		append_text(&body, line);
	}
	put_answer(out, "200 OK", "text/plain", &body);
	free(body.data);
}

/* Connections */

static void
free_connection(Connection *connection)
{
	free(connection->in.data);
	free(connection->out.data);
	free(connection);
}

static void
close_connection(Connection *connection)
{
	close(connection->fd);
	connection->closed = true;
	if (connection->delayed == 0)
		free_connection(connection);
}

static void
watch(Connection *connection)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};

	if (connection->write_blocked)
		event.events |= EPOLLOUT;
	epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

/* If the connection is gone, reading from it will tell. */
static void
flush_out(Connection *connection)
{
	ssize_t		n;
	bool		blocked;

	if (connection->out.length == 0)
		return;
	n = send(connection->fd, connection->out.data, connection->out.length, MSG_NOSIGNAL);
	if (n < 0 && errno != EAGAIN)
		connection->out.length = 0;
	if (n > 0)
		drop_front(&connection->out, n);
	blocked = connection->out.length > 0;
	if (blocked != connection->write_blocked)
	{
		connection->write_blocked = blocked;
		watch(connection);
	}
}

static void
arm_timer(void)
{
	struct itimerspec spec = {{0, 0}, {0, 0}};

	if (n_delayed > 0)
	{
		int64_t		due_us = delayed[first_delayed].due_us;

		spec.it_value.tv_sec = due_us / 1000000;
		spec.it_value.tv_nsec = due_us % 1000000 * 1000 + 1;
	}
	timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

static void
grow_delayed(void)
{
	size_t		max = max_delayed ? max_delayed * 2 : 1024;
	Delayed    *ring = grow(NULL, max * sizeof(Delayed));

	for (size_t i = 0; i < n_delayed; i++)
		ring[i] = delayed[(first_delayed + i) % max_delayed];
	free(delayed);
	delayed = ring;
	max_delayed = max;
	first_delayed = 0;
}

static void
delay_answer(Connection *connection, const Request *request)
{
	Delayed    *slot;

	if (n_delayed == max_delayed)
		grow_delayed();
	slot = &delayed[(first_delayed + n_delayed++) % max_delayed];
	slot->connection = connection;
	slot->due_us = now_us(CLOCK_MONOTONIC) + latency_us;
	memset(&slot->answer, 0, sizeof(slot->answer));
	accept_message(&slot->answer, request);
	connection->waiting = true;
	connection->delayed++;
	if (n_delayed == 1)
		arm_timer();
}

/* Requests */

static void
take_header(Request *request, size_t *content_length, const char *line, size_t length)
{
	static const char key[] = "Idempotency-Key: ";
	static const char size[] = "Content-Length: ";

	if (length > sizeof(size) - 1 && strncasecmp(line, size, sizeof(size) - 1) == 0)
		*content_length = strtoul(line + sizeof(size) - 1, NULL, 10);
	else if (length > sizeof(key) - 1 && strncasecmp(line, key, sizeof(key) - 1) == 0)
	{
		length -= sizeof(key) - 1;
		if (length >= KEY_SIZE)
			length = KEY_SIZE - 1;
		memcpy(request->key, line + sizeof(key) - 1, length);
		request->key[length] = '\0';
	}
}

/* The length of the first request in the buffer; 0: it is not complete yet. */
static size_t
parse(const Buffer *in, Request *request)
{
	const char *start = in->data;
	const char *end = in->length ? memmem(start, in->length, "\r\n\r\n", 4) : NULL;
	const char *line;
	size_t		content_length = 0;

	if (end == NULL)
		return 0;
	request->line = start;
	request->key[0] = '\0';
	for (line = start; line < end;)
	{
		const char *newline = memchr(line, '\r', end + 2 - line);

		take_header(request, &content_length, line, newline - line);
		line = newline + 2;
	}
	request->body = end + 4;
	request->body_length = content_length;
	if (in->length < (size_t) (request->body - start) + content_length)
		return 0;
	return request->body - start + content_length;
}

static void
serve_request(Connection *connection, const Request *request)
{
	if (strncmp(request->line, "POST /v3/messages ", 18) != 0)
	{
		answer_control(&connection->out, request);
		return;
	}
	note_arrival(request->key, now_us(CLOCK_REALTIME));
	if (hang > 0)
	{
		hang--;
		connection->waiting = true;
	}
	else if (latency_us > 0)
		delay_answer(connection, request);
	else
		accept_message(&connection->out, request);
}

static void
serve_requests(Connection *connection)
{
	Request		request;
	size_t		length;

	while (!connection->waiting && (length = parse(&connection->in, &request)) > 0)
	{
		serve_request(connection, &request);
		drop_front(&connection->in, length);
	}
	flush_out(connection);
}

static void
serve_delayed(void)
{
	int64_t		now = now_us(CLOCK_MONOTONIC);

	while (n_delayed > 0 && delayed[first_delayed].due_us <= now)
	{
		Delayed		slot = delayed[first_delayed];
		Connection *connection = slot.connection;

		first_delayed = (first_delayed + 1) % max_delayed;
		n_delayed--;
		connection->delayed--;
		if (connection->closed && connection->delayed == 0)
			free_connection(connection);
		else if (!connection->closed)
		{
			append(&connection->out, slot.answer.data, slot.answer.length);
			connection->waiting = false;
			serve_requests(connection);
		}
		free(slot.answer.data);
	}
	arm_timer();
}

static void
read_from(Connection *connection)
{
	ssize_t		n;

	reserve(&connection->in, READ_AT_ONCE);
	n = recv(connection->fd, connection->in.data + connection->in.length, READ_AT_ONCE, 0);
	if (n < 0 && errno == EAGAIN)
		return;
	if (n > 0)
		connection->in.length += n;
	if (n <= 0 || connection->in.length > MAX_REQUEST)
		close_connection(connection);
	else
		serve_requests(connection);
}

static void
take_connections(int listener)
{
	int			fd;
	int			on = 1;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
	{
		Connection *connection = calloc(1, sizeof(Connection));
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};

		if (connection == NULL)
			die("calloc");
		connection->fd = fd;
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
	}
}

static void
serve_event(int listener, const struct epoll_event *event)
{
	Connection *connection = event->data.ptr;
	uint64_t	expirations;

	if (event->data.ptr == NULL)
		take_connections(listener);
	else if (event->data.ptr == &timer_fd)
	{
		if (read(timer_fd, &expirations, sizeof(expirations)) > 0)
			serve_delayed();
	}
	else
	{
		if (event->events & EPOLLOUT)
			flush_out(connection);
		if (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR))
			read_from(connection);
	}
}

static int
listen_on(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t	length = sizeof(address);
	int			fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int			on = 1;

	/* Some servers pace by default; its timers cost more than the rest. */
	setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
	address.sin_port = htons(port);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || bind(fd, (struct sockaddr *) &address, sizeof(address)) != 0 ||
		listen(fd, 4096) != 0 || getsockname(fd, (struct sockaddr *) &address, &length) != 0)
		die("listen");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	return fd;
}

int
main(int argc, char **argv)
{
	int			listener = listen_on(argc > 1 ? atoi(argv[1]) : 0);
	struct epoll_event events[EVENTS_AT_ONCE];
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

	random_state[0] = (uint64_t) now_us(CLOCK_REALTIME);
	random_state[1] = (uint64_t) getpid() << 32 | 1;
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
	event.data.ptr = &timer_fd;
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &event);
	for (;;)
	{
		int			n = epoll_wait(epoll_fd, events, EVENTS_AT_ONCE, -1);

		for (int i = 0; i < n; i++)
			serve_event(listener, &events[i]);
	}
}
