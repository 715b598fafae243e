/*
 * sockets.c
 *		Everything that libcurl waits for, behind one pollable descriptor.
 *
 * libcurl tells us which sockets and which timeout it waits for; both go into
 * one epoll instance, whose descriptor the caller waits on.  What shaped this file
 * is that to tell the kernel of each change would cost more than the requests do.
 * It knows nothing of requests, and its callbacks must not throw.
 */
#include <curl/curl.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "sockets.h"

#define EVENTS_AT_ONCE 64

/* A connection, by its descriptor; of other sockets nothing is remembered. */
typedef struct Connection
{
	bool		open;
	bool		wanted;			/* libcurl waits for it */
	uint32_t	events;			/* what epoll looks for; 0: it is not there */
} Connection;

struct SentdmSockets
{
	CURLM	   *multi;
	int			epoll_fd;
	int			timer_fd;
	Connection *connections;
	int			max_connections;
	int64_t		due_us;			/* when libcurl wants to be called; monotonic */
	int64_t		armed_us;		/* when the timer goes off, perhaps too early */
};

static int64_t
monotonic_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Callbacks of libcurl */

/* NULL: it is none that on_open() has seen. */
static Connection *
connection_of(SentdmSockets *sockets, curl_socket_t socket)
{
	if (socket >= sockets->max_connections || !sockets->connections[socket].open)
		return NULL;
	return &sockets->connections[socket];
}

static void
remember_connection(SentdmSockets *sockets, curl_socket_t socket)
{
	if (socket >= sockets->max_connections)
	{
		int			n = socket + 64;
		Connection *longer = realloc(sockets->connections, n * sizeof(Connection));

		if (longer == NULL)
			return;
		memset(longer + sockets->max_connections, 0, (n - sockets->max_connections) * sizeof(Connection));
		sockets->connections = longer;
		sockets->max_connections = n;
	}
	memset(&sockets->connections[socket], 0, sizeof(Connection));
	sockets->connections[socket].open = true;
}

static curl_socket_t
on_open(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	curl_socket_t opened = socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);

	(void) purpose;
	if (opened >= 0)
		remember_connection(arg, opened);
	return opened;
}

/* The kernel takes it out of the epoll instance. */
static int
on_close(void *arg, curl_socket_t socket)
{
	Connection *connection = connection_of(arg, socket);

	if (connection != NULL)
		connection->open = false;
	return close(socket);
}

static void
unwatch(SentdmSockets *sockets, curl_socket_t socket)
{
	epoll_ctl(sockets->epoll_fd, EPOLL_CTL_DEL, socket, NULL);
}

/*
 * libcurl stops waiting for a connection after each answer and begins anew with
 * the next request.  To tell the kernel each time would cost more than to receive
 * the answer; so a connection stays where it is until something happens on it
 * that nobody waits for.  That needs to be told when it is closed, because its
 * number may be used again; of other sockets, such as the resolver's, we are not.
 */
static int
on_socket(CURL *easy, curl_socket_t socket, int what, void *arg, void *socket_arg)
{
	SentdmSockets *sockets = arg;
	Connection *connection = connection_of(sockets, socket);
	struct epoll_event event;

	(void) easy;
	(void) socket_arg;
	memset(&event, 0, sizeof(event));
	event.data.fd = socket;
	if (what != CURL_POLL_REMOVE && (what & CURL_POLL_IN))
		event.events |= EPOLLIN;
	if (what != CURL_POLL_REMOVE && (what & CURL_POLL_OUT))
		event.events |= EPOLLOUT;
	if (connection != NULL)
	{
		connection->wanted = what != CURL_POLL_REMOVE;
		if (!connection->wanted || connection->events == event.events)
			return 0;
		connection->events = event.events;
	}
	if (what == CURL_POLL_REMOVE)
		unwatch(sockets, socket);
	else if (epoll_ctl(sockets->epoll_fd, EPOLL_CTL_MOD, socket, &event) != 0 && errno == ENOENT)
		epoll_ctl(sockets->epoll_fd, EPOLL_CTL_ADD, socket, &event);
	return 0;
}

static int
on_timer(CURLM *multi, long timeout_ms, void *arg)
{
	SentdmSockets *sockets = arg;

	(void) multi;
	sockets->due_us = timeout_ms < 0 ? INT64_MAX : monotonic_us() + timeout_ms * 1000;
	return 0;
}

/* Setting up */

static bool
watch_timer(SentdmSockets *sockets)
{
	struct epoll_event event;

	memset(&event, 0, sizeof(event));
	event.events = EPOLLIN;
	event.data.fd = sockets->timer_fd;
	return epoll_ctl(sockets->epoll_fd, EPOLL_CTL_ADD, sockets->timer_fd, &event) == 0;
}

SentdmSockets *
sentdm_sockets_create(CURLM *multi)
{
	SentdmSockets *sockets = calloc(1, sizeof(SentdmSockets));

	if (sockets == NULL)
		return NULL;
	sockets->multi = multi;
	sockets->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	sockets->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	sockets->due_us = INT64_MAX;
	sockets->armed_us = INT64_MAX;
	if (sockets->epoll_fd < 0 || sockets->timer_fd < 0 || !watch_timer(sockets))
	{
		sentdm_sockets_destroy(sockets);
		return NULL;
	}
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, sockets);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	curl_multi_setopt(multi, CURLMOPT_TIMERDATA, sockets);
	return sockets;
}

void
sentdm_sockets_adopt(SentdmSockets *sockets, CURL *easy)
{
	curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, on_open);
	curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, sockets);
	curl_easy_setopt(easy, CURLOPT_CLOSESOCKETFUNCTION, on_close);
	curl_easy_setopt(easy, CURLOPT_CLOSESOCKETDATA, sockets);
}

void
sentdm_sockets_destroy(SentdmSockets *sockets)
{
	if (sockets == NULL)
		return;
	if (sockets->epoll_fd >= 0)
		close(sockets->epoll_fd);
	if (sockets->timer_fd >= 0)
		close(sockets->timer_fd);
	free(sockets->connections);
	free(sockets);
}

/* Running */

int
sentdm_sockets_fd(const SentdmSockets *sockets)
{
	return sockets->epoll_fd;
}

static void
serve(SentdmSockets *sockets, const struct epoll_event *event)
{
	int			running;
	int			mask = 0;
	uint64_t	expirations;
	Connection *connection = connection_of(sockets, event->data.fd);

	if (connection != NULL && !connection->wanted)
	{
		unwatch(sockets, event->data.fd);
		connection->events = 0;
		return;
	}
	if (event->data.fd == sockets->timer_fd)
	{
		if (read(sockets->timer_fd, &expirations, sizeof(expirations)) > 0)
			sockets->armed_us = INT64_MAX;
		return;
	}
	if (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR))
		mask |= CURL_CSELECT_IN;
	if (event->events & EPOLLOUT)
		mask |= CURL_CSELECT_OUT;
	curl_multi_socket_action(sockets->multi, event->data.fd, mask, &running);
}

bool
sentdm_sockets_serve(SentdmSockets *sockets)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	int			n = epoll_wait(sockets->epoll_fd, events, EVENTS_AT_ONCE, 0);
	int			running;

	for (int i = 0; i < n; i++)
		serve(sockets, &events[i]);
	if (sockets->due_us <= monotonic_us())
	{
		sockets->due_us = INT64_MAX;
		curl_multi_socket_action(sockets->multi, CURL_SOCKET_TIMEOUT, 0, &running);
	}
	return n == EVENTS_AT_ONCE;
}

/*
 * libcurl moves its timeout several times for each request, and to arm a timer
 * costs more than to send one.  So it is armed before we return to the caller,
 * who may wait, and only for an earlier time; going off too early does no harm.
 */
void
sentdm_sockets_arm_timer(SentdmSockets *sockets)
{
	struct itimerspec spec;

	if (sockets->due_us >= sockets->armed_us)
		return;
	sockets->armed_us = sockets->due_us;
	memset(&spec, 0, sizeof(spec));
	spec.it_value.tv_sec = sockets->due_us / 1000000;
	spec.it_value.tv_nsec = sockets->due_us % 1000000 * 1000;
	timerfd_settime(sockets->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}
