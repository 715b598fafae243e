/*
 * webhook_load.c
 *		Post signed webhooks over many connections, and measure the answers.
 *
 * A closed loop: each connection sends its next event when the one before was
 * answered.  Everything is signed before the clock starts, so that what is measured
 * is the receiver.  Bounded, and to the loopback interface only.
 *
 *		webhook_load PORT PATH CONNECTIONS EVENTS SECRET [SEED]
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 1000
#define MAX_EVENTS 2000000
#define MAX_REQUEST 1400
#define WEBHOOK_ID "d4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8"

typedef struct Event
{
	char	   *request;
	int			length;
} Event;

typedef struct Connection
{
	int			fd;
	int64_t		start_us;
	char		answer[2048];
	int			received;
} Connection;

static Event *events;
static int	n_events;
static int	next_event;
static int	n_answered;
static int32_t *latencies_us;
static int	statuses[600];

static int64_t
now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void
die(const char *what)
{
	perror(what);
	exit(EXIT_FAILURE);
}

static void
make_event(Event *event, int port, const char *path, const unsigned char *key, int key_length,
		   uint32_t seed, int number)
{
	char		request[MAX_REQUEST];
	char		body[512];
	char		signed_content[640];
	unsigned char mac[32];
	char		signature[64];
	unsigned int mac_length;
	time_t		now = time(NULL);
	int			body_length;
	int			signed_length;

	body_length = snprintf(body, sizeof(body),
						   "{\"field\":\"message\",\"event\":\"message.delivered\",\"timestamp\":\"2026-09-14T16:11:50Z\","
						   "\"payload\":{\"account_id\":\"7ba7b820-9dad-11d1-80b4-00c04fd430c8\","
						   "\"message_id\":\"%08x-9dad-11d1-80b4-%012x\",\"message_status\":\"DELIVERED\","
						   "\"channel\":\"sms\",\"outbound_number\":\"+1415555%04d\",\"updated_at\":\"2026-09-14T16:11:49Z\"}}",
						   seed, (unsigned int) number, number % 10000);
	signed_length = snprintf(signed_content, sizeof(signed_content), WEBHOOK_ID ".%lld.%s", (long long) now, body);
	HMAC(EVP_sha256(), key, key_length, (unsigned char *) signed_content, (size_t) signed_length, mac, &mac_length);
	EVP_EncodeBlock((unsigned char *) signature, mac, (int) mac_length);
	event->length = snprintf(request, sizeof(request),
							 "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: load/1\r\n"
							 "Content-Type: application/json\r\nX-Webhook-ID: " WEBHOOK_ID "\r\n"
							 "X-Webhook-Timestamp: %lld\r\nX-Webhook-Signature: v1,%s\r\n"
							 "Content-Length: %d\r\n\r\n%s",
							 path, port, (long long) now, signature, body_length, body);
	event->request = strdup(request);
	if (event->request == NULL)
		die("strdup");
}

static void
connect_to(Connection *connection, int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t) port)};
	int			on = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	connection->fd = socket(AF_INET, SOCK_STREAM, 0);
	if (connection->fd < 0 || connect(connection->fd, (struct sockaddr *) &address, sizeof(address)) != 0)
		die("connect");
	setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

/* Requests are small: a socket that has room for none of one is an error here. */
static void
send_next(Connection *connection)
{
	Event	   *event;

	if (next_event == n_events)
		return;
	event = &events[next_event++];
	connection->received = 0;
	connection->start_us = now_us();
	if (send(connection->fd, event->request, (size_t) event->length, MSG_NOSIGNAL) != event->length)
		die("send");
}

/* Is there a whole answer? */
static int
is_whole(const Connection *connection)
{
	const char *body = strstr(connection->answer, "\r\n\r\n");
	const char *length = strcasestr(connection->answer, "\r\ncontent-length:");

	return body != NULL && length != NULL && length < body &&
		connection->answer + connection->received >= body + 4 + atoi(length + 17);
}

static void
on_readable(Connection *connection)
{
	int			room = (int) sizeof(connection->answer) - 1 - connection->received;
	ssize_t		n = recv(connection->fd, connection->answer + connection->received, (size_t) room, 0);
	int			status;

	if (n <= 0)
		die("the receiver closed a connection");
	connection->received += (int) n;
	connection->answer[connection->received] = '\0';
	if (!is_whole(connection))
		return;
	status = atoi(connection->answer + 9);
	if (status >= 0 && status < 600)
		statuses[status]++;
	latencies_us[n_answered++] = (int32_t) (now_us() - connection->start_us);
	send_next(connection);
}

static int
compare(const void *a, const void *b)
{
	int32_t		x = *(const int32_t *) a;
	int32_t		y = *(const int32_t *) b;

	return (x > y) - (x < y);
}

static void
report(int64_t duration_us)
{
	qsort(latencies_us, (size_t) n_answered, sizeof(int32_t), compare);
	printf("%.0f events/s, latency ms: median %.2f, p99 %.2f, max %.2f; statuses:",
		   n_answered * 1e6 / (double) duration_us, latencies_us[n_answered / 2] / 1e3,
		   latencies_us[(int64_t) n_answered * 99 / 100] / 1e3, latencies_us[n_answered - 1] / 1e3);
	for (int status = 0; status < 600; status++)
	{
		if (statuses[status] > 0)
			printf(" %d: %d", status, statuses[status]);
	}
	printf("\n");
}

static void
run(int port, int n_connections)
{
	static Connection connections[MAX_CONNECTIONS];
	struct epoll_event ready[64];
	int			epoll_fd = epoll_create1(0);
	int64_t		start_us;

	for (int i = 0; i < n_connections; i++)
	{
		struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};

		connect_to(&connections[i], port);
		epoll_ctl(epoll_fd, EPOLL_CTL_ADD, connections[i].fd, &event);
	}
	start_us = now_us();
	for (int i = 0; i < n_connections; i++)
		send_next(&connections[i]);
	while (n_answered < n_events)
	{
		int			n = epoll_wait(epoll_fd, ready, 64, 30000);

		if (n == 0)
			die("no answer for 30 s");
		for (int i = 0; i < n; i++)
			on_readable(ready[i].data.ptr);
	}
	report(now_us() - start_us);
}

int
main(int argc, char **argv)
{
	unsigned char key[256];
	int			key_length;
	int			port;
	int			n_connections;
	uint32_t	seed;

	if (argc < 6 || strncmp(argv[5], "whsec_", 6) != 0 || strlen(argv[5]) > 200)
	{
		fprintf(stderr, "usage: webhook_load PORT PATH CONNECTIONS EVENTS whsec_SECRET [SEED]\n");
		return EXIT_FAILURE;
	}
	port = atoi(argv[1]);
	n_connections = atoi(argv[3]);
	n_events = atoi(argv[4]);
	seed = argc > 6 ? (uint32_t) strtoul(argv[6], NULL, 10) : (uint32_t) now_us();
	if (n_connections < 1 || n_connections > MAX_CONNECTIONS || n_events < n_connections || n_events > MAX_EVENTS)
	{
		fprintf(stderr, "webhook_load: too few or too many connections or events\n");
		return EXIT_FAILURE;
	}
	key_length = EVP_DecodeBlock(key, (unsigned char *) argv[5] + 6, (int) strlen(argv[5] + 6));
	for (size_t i = strlen(argv[5]); key_length > 0 && i > 0 && argv[5][i - 1] == '='; i--)
		key_length--;
	events = calloc((size_t) n_events, sizeof(Event));
	latencies_us = calloc((size_t) n_events, sizeof(int32_t));
	if (events == NULL || latencies_us == NULL || key_length <= 0)
		die("cannot prepare");
	for (int i = 0; i < n_events; i++)
		make_event(&events[i], port, argv[2], key, key_length, seed, i);
	run(port, n_connections);
	return EXIT_SUCCESS;
}
