/*
 * listener.c
 *		Where webhooks come in: libmicrohttpd's side of the receiver.
 *
 * A few threads serve all connections.  One whose event waits for the database is
 * suspended, costs nothing, and is resumed by the writer's answer.  Must never
 * answer an event itself once it is in the queue.
 */
#include <errno.h>
#include <netdb.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "listener.h"
#include "log.h"
#include "metrics.h"
#include "request.h"

#define BACKLOG 1024
#define ANSWER_US (10 * 1000000)	/* to take an answer */
#define POOL_FOR_ANSWER 8192	/* bytes of a connection's memory, beside the headers */

static const ReceiverConfig *config;
static ReceiverQueue *queue;
static struct MHD_Daemon *daemon_;
static int	listen_fd = -1;
static bool own_socket;
static atomic_bool quiesced;
static atomic_int n_requests;

/* Sockets */

static struct addrinfo *
resolve(const char *address)
{
	struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
	struct addrinfo *found = NULL;
	const char *colon = strrchr(address, ':');
	char		host[256];
	size_t		length = colon ? (size_t) (colon - address) : 0;
	int			error;

	if (colon == NULL || length >= sizeof(host))
	{
		receiver_log(RECEIVER_ERROR, "\"%s\" is not ADDRESS:PORT", address);
		return NULL;
	}
	if (length >= 2 && address[0] == '[' && address[length - 1] == ']')
		snprintf(host, sizeof(host), "%.*s", (int) length - 2, address + 1);
	else
		snprintf(host, sizeof(host), "%.*s", (int) length, address);
	error = getaddrinfo(host[0] && strcmp(host, "*") != 0 ? host : NULL, colon + 1, &hints, &found);
	if (error != 0)
		receiver_log(RECEIVER_ERROR, "cannot listen on \"%s\": %s", address, gai_strerror(error));
	return found;
}

int
receiver_socket_listen(const char *address)
{
	struct addrinfo *found = resolve(address);
	const int	on = 1;
	int			fd;

	if (found == NULL)
		return -1;
	fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd >= 0 &&
		(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
		 bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, BACKLOG) != 0))
	{
		int			error = errno;

		close(fd);
		errno = error;
		fd = -1;
	}
	if (fd < 0)
		receiver_log(RECEIVER_ERROR, "cannot listen on \"%s\": %s", address, strerror(errno));
	freeaddrinfo(found);
	return fd;
}

void
receiver_socket_describe(int fd, char *text, size_t size)
{
	struct sockaddr_storage address;
	socklen_t	length = sizeof(address);
	char		host[NI_MAXHOST];
	char		port[NI_MAXSERV];

	if (getsockname(fd, (struct sockaddr *) &address, &length) != 0 ||
		getnameinfo((struct sockaddr *) &address, length, host, sizeof(host), port, sizeof(port),
					NI_NUMERICHOST | NI_NUMERICSERV) != 0)
		snprintf(text, size, "a socket");
	else
		snprintf(text, size, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

/* Callbacks of libmicrohttpd */

static void
on_connection(void *arg, struct MHD_Connection *http, void **context,
			  enum MHD_ConnectionNotificationCode what)
{
	(void) arg;
	if (what == MHD_CONNECTION_NOTIFY_STARTED)
	{
		const union MHD_ConnectionInfo *fd =
			MHD_get_connection_info(http, MHD_CONNECTION_INFO_CONNECTION_FD);
		const union MHD_ConnectionInfo *peer =
			MHD_get_connection_info(http, MHD_CONNECTION_INFO_CLIENT_ADDRESS);

		receiver_metrics_count(RECEIVER_CONNECTIONS_ACCEPTED);
		*context = receiver_connection_open(fd->connect_fd, peer->client_addr,
											receiver_now_us() + config->request_timeout_us);
	}
	else if (*context != NULL)
	{
		receiver_connection_close(*context);
		*context = NULL;
	}
}

/* The first line of a request is there: its time begins. */
static void *
on_request_line(void *arg, const char *uri, struct MHD_Connection *http)
{
	const union MHD_ConnectionInfo *context =
		MHD_get_connection_info(http, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
	ReceiverConnection *connection = context->socket_context;
	ReceiverRequest *request;

	(void) arg;
	(void) uri;
	if (connection == NULL ||
		!receiver_connection_set_deadline(connection, receiver_now_us() + config->request_timeout_us))
		return NULL;
	request = receiver_request_create(http, connection);
	if (request != NULL)
		atomic_fetch_add(&n_requests, 1);
	return request;
}

/* Called by the writer, or wherever an event is refused. */
static void
on_answered(ReceiverEvent *event)
{
	ReceiverRequest *request = (ReceiverRequest *) event;

	MHD_resume_connection(request->http);
}

static enum MHD_Result
answer(ReceiverRequest *request)
{
	(void) receiver_connection_set_deadline(request->connection, receiver_now_us() + ANSWER_US);
	return receiver_request_answer(request, atomic_load(&quiesced));
}

/* The whole request is there: to the database with it. */
static enum MHD_Result
enqueue(ReceiverRequest *request)
{
	ReceiverEvent *event = &request->event;
	ReceiverRefusal refusal;

	receiver_metrics_count(RECEIVER_RECEIVED);
	/* Now the writer has its own time to answer. */
	if (!receiver_connection_set_deadline(request->connection, RECEIVER_NEVER))
		return MHD_NO;
	event->deadline_us = receiver_now_us() + config->queue_timeout_us;
	event->answered = on_answered;
	request->waiting = true;
	/* Suspended before it is in the queue: the answer may come at once. */
	MHD_suspend_connection(request->http);
	refusal = receiver_queue_put(queue, event);
	if (refusal != RECEIVER_NOT_REFUSED)
		receiver_event_refuse(event, refusal);
	return MHD_YES;
}

static enum MHD_Result
on_request(void *arg, struct MHD_Connection *http, const char *uri, const char *method,
		   const char *version, const char *data, size_t *data_size, void **context)
{
	ReceiverRequest *request = *context;

	(void) arg;
	(void) http;
	(void) version;
	if (request == NULL)
		return MHD_NO;
	if (request->waiting)
		return answer(request);
	if (!request->examined)
	{
		receiver_request_examine(request, config, method, uri);
		return receiver_request_is_hopeless(request) ? answer(request) : MHD_YES;
	}
	if (*data_size > 0)
	{
		receiver_request_add_body(request, queue, data, *data_size);
		*data_size = 0;
		return MHD_YES;
	}
	if (request->event.refusal != RECEIVER_NOT_REFUSED)
		return answer(request);
	return enqueue(request);
}

/* What libmicrohttpd answered or gave up by itself. */
static void
note_own_answer(ReceiverRequest *request, enum MHD_RequestTerminationCode why)
{
	const union MHD_ConnectionInfo *status =
		MHD_get_connection_info(request->http, MHD_CONNECTION_INFO_HTTP_STATUS);

	if (status != NULL && status->http_status != 0)
	{
		request->status = (int) status->http_status;
		if (request->status == 431 || request->status == 414 || request->status == 413)
			request->event.refusal = RECEIVER_HEADERS_TOO_LARGE;
		return;
	}
	(void) why;
	if (!receiver_connection_set_deadline(request->connection, RECEIVER_NEVER))
	{
		request->status = receiver_refusal_status(RECEIVER_TOO_SLOW);
		request->event.refusal = RECEIVER_TOO_SLOW;
	}
}

static void
on_completed(void *arg, struct MHD_Connection *http, void **context,
			 enum MHD_RequestTerminationCode why)
{
	ReceiverRequest *request = *context;

	(void) arg;
	(void) http;
	if (request == NULL)
		return;
	if (request->status == 0)
		note_own_answer(request, why);
	receiver_request_account(request, config->log_requests);
	(void) receiver_connection_set_deadline(request->connection,
											receiver_now_us() + config->idle_timeout_us);
	receiver_request_free(request, queue);
	*context = NULL;
	atomic_fetch_sub(&n_requests, 1);
}

/* libmicrohttpd's own messages, which a hostile client can cause at will. */
static void
on_message(void *arg, const char *format, va_list args)
{
	static _Atomic int64_t last_us;
	int64_t		now_us = receiver_now_us();
	int64_t		before_us = atomic_load(&last_us);
	char		text[256];

	(void) arg;
	if (now_us - before_us < 10 * 1000000 || !atomic_compare_exchange_strong(&last_us, &before_us, now_us))
		return;
	vsnprintf(text, sizeof(text), format, args);
	receiver_log(RECEIVER_INFO, "libmicrohttpd: %s", text);
}

bool
receiver_listener_start(const ReceiverConfig *settings, ReceiverQueue *event_queue, int fd, bool own)
{
	config = settings;
	queue = event_queue;
	listen_fd = fd;
	own_socket = own;
	/*
	 * Not epoll: version 0.9.75 waits again, with 128 connections ready and not yet
	 * served, when it finds exactly so many.  And connections are suspended and
	 * resumed for each event here, which poll() has for nothing.
	 */
	daemon_ = MHD_start_daemon(MHD_USE_POLL | MHD_USE_INTERNAL_POLLING_THREAD |
							   MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC | MHD_USE_ERROR_LOG,
							   0, NULL, NULL, on_request, NULL,
							   MHD_OPTION_EXTERNAL_LOGGER, on_message, NULL,
							   MHD_OPTION_LISTEN_SOCKET, fd,
							   MHD_OPTION_THREAD_POOL_SIZE, (unsigned int) config->threads,
							   MHD_OPTION_CONNECTION_LIMIT, (unsigned int) config->max_connections,
							   MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t) config->max_headers + POOL_FOR_ANSWER,
							   MHD_OPTION_CONNECTION_TIMEOUT, 0U,
							   MHD_OPTION_STRICT_FOR_CLIENT, 1,
							   MHD_OPTION_URI_LOG_CALLBACK, on_request_line, NULL,
							   MHD_OPTION_NOTIFY_CONNECTION, on_connection, NULL,
							   MHD_OPTION_NOTIFY_COMPLETED, on_completed, NULL,
							   MHD_OPTION_END);
	return daemon_ != NULL;
}

void
receiver_listener_quiesce(void)
{
	atomic_store(&quiesced, true);
	(void) MHD_quiesce_daemon(daemon_);
	/*
	 * Whoever comes now is refused at once, instead of waiting for a process that
	 * will not be there.  A socket of the service manager's waits for the next one.
	 */
	if (own_socket)
		shutdown(listen_fd, SHUT_RDWR);
}

int
receiver_listener_requests(void)
{
	return atomic_load(&n_requests);
}

void
receiver_listener_stop(void)
{
	MHD_stop_daemon(daemon_);
	daemon_ = NULL;
	if (atomic_load(&quiesced))
		close(listen_fd);
}
