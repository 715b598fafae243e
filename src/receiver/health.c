/*
 * health.c
 *		/health and /metrics, on an address of their own.
 *
 * Whoever asks must get an answer at once, whatever the database and the senders
 * do: so it has a thread and connections of its own, and only reads what is known.
 */
#include <microhttpd.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "connection.h"
#include "health.h"
#include "metrics.h"

#define MAX_CONNECTIONS 64
#define TIMEOUT_S 5

static ReceiverQueue *queue;
static ReceiverWriter *writer;
static struct MHD_Daemon *daemon_;
static atomic_bool stopping;

/* The words of the framework integrations that Sent documents. */
static const char *
overall(void)
{
	if (!receiver_writer_is_up(writer))
		return "unhealthy";
	return atomic_load(&stopping) ? "stopping" : "healthy";
}

/*
 * What is known of Sent here: whether its webhooks come, and whether the last one
 * was authentic.  Anybody can send another kind, so it says nothing about us.
 */
static const char *
sent_status(void)
{
	int64_t		accepted_us = receiver_metrics_last_accepted_us();
	int64_t		rejected_us = receiver_metrics_last_rejected_us();

	if (accepted_us == 0 && rejected_us == 0)
		return "waiting";
	return accepted_us >= rejected_us ? "receiving" : "rejected";
}

static bool
is_ready(void)
{
	return receiver_writer_is_up(writer) && !atomic_load(&stopping);
}

static struct MHD_Response *
make_text(char *text)
{
	return MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_COPY);
}

static struct MHD_Response *
make_health(void)
{
	char		text[256];
	char		timestamp[32];
	time_t		now = time(NULL);
	struct tm	parts;

	gmtime_r(&now, &parts);
	strftime(timestamp, sizeof(timestamp), "%Y-%m-%dT%H:%M:%SZ", &parts);
	snprintf(text, sizeof(text),
			 "{\"status\": \"%s\", \"version\": \"%s\", \"timestamp\": \"%s\","
			 " \"services\": {\"database\": \"%s\", \"sent_dm\": \"%s\"}}\n",
			 overall(), SENTDM_VERSION, timestamp,
			 receiver_writer_is_up(writer) ? "connected" : "disconnected", sent_status());
	return make_text(text);
}

static struct MHD_Response *
make_metrics(void)
{
	const ReceiverGauges gauges = {
		.queue_depth = receiver_queue_depth(queue),
		.queue_bytes = receiver_queue_bytes(queue),
		.connections = receiver_connections_open(),
		.database_up = receiver_writer_is_up(writer),
		.stopping = atomic_load(&stopping),
	};
	size_t		length;
	char	   *text = receiver_metrics_render(&gauges, &length);

	if (text == NULL)
		return NULL;
	return MHD_create_response_from_buffer(length, text, MHD_RESPMEM_MUST_FREE);
}

static struct MHD_Response *
route(const char *method, const char *path, unsigned int *status, const char **type)
{
	static char not_allowed[] = "{\"error\": \"only GET is possible here\"}\n";
	static char not_found[] = "{\"error\": \"not found\"}\n";
	static char alive[] = "{\"status\": \"alive\"}\n";
	static char ready[] = "{\"status\": \"ready\"}\n";
	static char not_ready[] = "{\"status\": \"not ready\"}\n";

	*type = "application/json";
	*status = MHD_HTTP_OK;
	if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0)
	{
		*status = MHD_HTTP_METHOD_NOT_ALLOWED;
		return make_text(not_allowed);
	}
	if (strcmp(path, "/health/live") == 0)
		return make_text(alive);
	if (strcmp(path, "/metrics") == 0)
	{
		*type = "text/plain; version=0.0.4; charset=utf-8";
		return make_metrics();
	}
	if (strcmp(path, "/health") != 0 && strcmp(path, "/health/ready") != 0)
	{
		*status = MHD_HTTP_NOT_FOUND;
		return make_text(not_found);
	}
	if (!is_ready())
		*status = MHD_HTTP_SERVICE_UNAVAILABLE;
	if (strcmp(path, "/health") == 0)
		return make_health();
	return make_text(is_ready() ? ready : not_ready);
}

static enum MHD_Result
on_request(void *arg, struct MHD_Connection *http, const char *uri, const char *method,
		   const char *version, const char *data, size_t *data_size, void **context)
{
	struct MHD_Response *response;
	enum MHD_Result result;
	unsigned int status;
	const char *type;

	(void) arg;
	(void) version;
	(void) data;
	(void) data_size;
	(void) context;
	response = route(method, uri, &status, &type);
	if (response == NULL)
		return MHD_NO;
	MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
	MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
	if (status == MHD_HTTP_METHOD_NOT_ALLOWED)
		MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
	result = MHD_queue_response(http, status, response);
	MHD_destroy_response(response);
	return result;
}

bool
receiver_health_start(int fd, ReceiverQueue *event_queue, ReceiverWriter *event_writer)
{
	queue = event_queue;
	writer = event_writer;
	daemon_ = MHD_start_daemon(MHD_USE_POLL | MHD_USE_INTERNAL_POLLING_THREAD,
							   0, NULL, NULL, on_request, NULL,
							   MHD_OPTION_LISTEN_SOCKET, fd,
							   MHD_OPTION_CONNECTION_LIMIT, MAX_CONNECTIONS,
							   MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t) 16384,
							   MHD_OPTION_CONNECTION_TIMEOUT, TIMEOUT_S,
							   MHD_OPTION_STRICT_FOR_CLIENT, 1,
							   MHD_OPTION_END);
	return daemon_ != NULL;
}

void
receiver_health_set_stopping(void)
{
	atomic_store(&stopping, true);
}

void
receiver_health_stop(void)
{
	MHD_stop_daemon(daemon_);
	daemon_ = NULL;
}
