/*
 * http.c
 *		Many HTTP requests at once behind one pollable descriptor.
 *
 * Nothing here may throw: libcurl's callbacks run in the middle of its own data
 * structures.
 *
 * Two things matter to the promise of this project.  Whether a request left the
 * machine is known from the moment libcurl asks before it sends (PREREQ), not
 * guessed from error codes.  And the key must not leak: no redirects, no verbose
 * log, no user name in URLs, TLS always verified.
 */
#include <curl/curl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "http.h"
#include "sockets.h"

#define STREAMS 100				/* of a connection, what libcurl takes at most */
#define FEW_CONNECTIONS 4		/* as many as requests before the first answer */

/* One request under way, or a free handle that waits for the next one. */
typedef struct Transfer
{
	struct Transfer *next;		/* in the free list or the list of all */
	SentdmHttp *http;
	CURL	   *easy;
	CURLU	   *url;			/* parsed once, ... */
	char	   *path;			/* ... for requests with this path */
	struct curl_slist *headers; /* all in one piece of memory */
	char	   *request_body;
	size_t		max_answer;
	size_t		capacity;
	int64_t		deadline_unix_us;
	bool		on_the_wire;	/* libcurl was about to send, and was let */
	bool		too_late;
	SentdmHttpResult *result;
	struct Transfer *previous;	/* in the list of those under way */
} Transfer;

typedef struct QueuedResult
{
	SentdmHttpResult result;	/* first, so that a pointer to it is one to us */
	struct QueuedResult *next;
} QueuedResult;

struct SentdmHttp
{
	CURLM	   *multi;
	SentdmSockets *sockets;
	char	   *base_url;
	char	   *ca_file;
	char	   *user_agent;
	char	   *proxy;			/* "": none */
	char	   *no_proxy;		/* hosts that need none */
	bool		plain;			/* http://, which was checked to be loopback */
	bool		multiplexed;	/* the server speaks HTTP/2, as far as is
								 * known */
	int			max_in_flight;
	int			connect_timeout_ms;
	int			request_timeout_ms;
	char		date[64];		/* the last Date header, ... */
	int64_t		date_unix;		/* ... and what it means */
	Transfer   *active;
	Transfer   *idle;
	QueuedResult *first;
	QueuedResult *last;
};

static int64_t
unix_now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/*
 * The resolver's threads inherit the signal mask.  They must not take signals
 * that are meant for the process that we are a guest in.
 */
static void
block_signals(sigset_t *saved)
{
	sigset_t	all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, saved);
}

static void
restore_signals(const sigset_t *saved)
{
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

/* Callbacks of libcurl */

/* The connection stands; the request is about to be sent on it. */
static int
on_before_request(void *arg, char *remote_ip, char *local_ip, int remote_port, int local_port)
{
	Transfer   *transfer = arg;

	(void) remote_ip;
	(void) local_ip;
	(void) remote_port;
	(void) local_port;

	/*
	 * Not when libcurl repeats it on a new connection: then it may have
	 * arrived.
	 */
	if (!transfer->on_the_wire && unix_now_us() >= transfer->deadline_unix_us)
	{
		transfer->too_late = true;
		return CURL_PREREQFUNC_ABORT;
	}
	transfer->on_the_wire = true;
	return CURL_PREREQFUNC_OK;
}

static size_t
on_body(char *data, size_t size, size_t count, void *arg)
{
	Transfer   *transfer = arg;
	SentdmHttpResult *result = transfer->result;
	size_t		length = size * count;
	size_t		needed = result->body_length + length + 1;

	if (needed > transfer->max_answer)
		return 0;
	if (needed > transfer->capacity)
	{
		size_t		capacity = transfer->capacity * 2 > needed ? transfer->capacity * 2 : needed;
		char	   *body = realloc(result->body, capacity);

		if (body == NULL)
			return 0;
		result->body = body;
		transfer->capacity = capacity;
	}
	memcpy(result->body + result->body_length, data, length);
	result->body_length += length;
	result->body[result->body_length] = '\0';
	return length;
}

/* Copy the value of a header line if it has this name; longer ones are ignored. */
static bool
take_header(const char *line, size_t length, const char *name, char *value, size_t size)
{
	size_t		name_length = strlen(name);

	if (length <= name_length || line[name_length] != ':' ||
		strncasecmp(line, name, name_length) != 0)
		return false;
	line += name_length + 1;
	length -= name_length + 1;
	while (length > 0 && (*line == ' ' || *line == '\t'))
		line++, length--;
	while (length > 0 && strchr(" \t\r\n", line[length - 1]) != NULL)
		length--;
	if (length >= size)
		return false;
	memcpy(value, line, length);
	value[length] = '\0';
	return true;
}

/* Answers of the same second say the same. */
static int64_t
unix_time_of(SentdmHttp *http, const char *date)
{
	time_t		date_unix;

	if (strcmp(date, http->date) != 0)
	{
		date_unix = curl_getdate(date, NULL);
		http->date_unix = date_unix > 0 ? date_unix : 0;
		strcpy(http->date, date);
	}
	return http->date_unix;
}

static size_t
on_header(char *line, size_t size, size_t count, void *arg)
{
	Transfer   *transfer = arg;
	SentdmHttpResult *result = transfer->result;
	size_t		length = size * count;
	char		date[sizeof(transfer->http->date)];

	if (length >= 5 && strncmp(line, "HTTP/", 5) == 0)
	{
		/* An answer after an interim one starts anew. */
		result->request_id[0] = '\0';
		result->retry_after[0] = '\0';
		result->date_unix = 0;
	}
	else if (take_header(line, length, "Date", date, sizeof(date)))
	{
		result->date_unix = unix_time_of(transfer->http, date);
	}
	else if (!take_header(line, length, "X-Request-Id", result->request_id,
						  sizeof(result->request_id)))
		(void) take_header(line, length, "Retry-After", result->retry_after,
						   sizeof(result->retry_after));
	return length;
}

/* Setting up */

const char *
sentdm_http_check_url(const char *base_url, bool insecure_http)
{
	static const char *const loopback[] = {"127.", "localhost", "[::1]"};
	const char *host;
	size_t		host_length;

	if (strncmp(base_url, "https://", 8) == 0)
		return NULL;
	if (strncmp(base_url, "http://", 7) != 0)
		return "sentdm.base_url is not an https URL";
	if (!insecure_http)
		return "sentdm.base_url is http, and sentdm.allow_insecure_http is off";
	host = base_url + 7;
	host_length = host[0] == '[' ? strcspn(host, "]/") + 1 : strcspn(host, ":/");
	if (strncmp(host, loopback[0], 4) == 0 && strspn(host, "0123456789.") == host_length)
		return NULL;
	for (size_t i = 1; i < sizeof(loopback) / sizeof(loopback[0]); i++)
	{
		if (host_length == strlen(loopback[i]) && strncmp(host, loopback[i], host_length) == 0)
			return NULL;
	}
	return "sentdm.base_url is http to an address that is not loopback";
}

/*
 * When all streams of a connection are taken, libcurl would open one for each further
 * request, and not put the next ones on it: hundreds at once, after the server closed
 * those there were.  So it may open no more than the requests need streams, and a few
 * for those that are being closed.  A connection without streams is for one request.
 */
static void
limit_connections(SentdmHttp *http)
{
	long		needed = http->max_in_flight / STREAMS + FEW_CONNECTIONS;

	curl_multi_setopt(http->multi, CURLMOPT_MAX_HOST_CONNECTIONS, http->multiplexed ? needed : 0L);
}

static void
set_multi_options(SentdmHttp *http)
{
	curl_multi_setopt(http->multi, CURLMOPT_PIPELINING, (long) CURLPIPE_MULTIPLEX);
	curl_multi_setopt(http->multi, CURLMOPT_MAXCONNECTS, (long) http->max_in_flight);
	limit_connections(http);
}

/* "caller libcurl/1.2.3" */
static char *
name_library(const char *caller)
{
	const char *version = curl_version_info(CURLVERSION_NOW)->version;
	size_t		size = strlen(caller) + sizeof(" libcurl/") + strlen(version);
	char	   *name = malloc(size);

	if (name != NULL)
		snprintf(name, size, "%s libcurl/%s", caller, version);
	return name;
}

/* A copy of the first of these variables that is set; "" if none is. */
static char *
copy_environment(const char *const *names)
{
	for (; *names != NULL; names++)
	{
		const char *value = getenv(*names);

		if (value != NULL && value[0] != '\0')
			return strdup(value);
	}
	return strdup("");
}

/*
 * The variables that libcurl would look at with each request; by then the code of
 * somebody's trigger may be changing the environment in another thread.
 */
static void
read_proxy(SentdmHttp *http)
{
	const char *const proxy[] = {"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", NULL};
	const char *const no_proxy[] = {"no_proxy", "NO_PROXY", NULL};

	http->proxy = http->plain ? strdup("") : copy_environment(proxy);
	http->no_proxy = copy_environment(no_proxy);
}

SentdmHttp *
sentdm_http_create(const SentdmHttpOptions *options)
{
	static bool initialized = false;
	SentdmHttp *http = calloc(1, sizeof(SentdmHttp));

	if (http == NULL)
		return NULL;
	if (!initialized)
		initialized = curl_global_init(CURL_GLOBAL_DEFAULT) == CURLE_OK;
	http->base_url = strdup(options->base_url);
	http->ca_file = strdup(options->ca_file);
	http->user_agent = name_library(options->user_agent);
	http->plain = strncmp(options->base_url, "http://", 7) == 0;
	read_proxy(http);
	http->multiplexed = !http->plain;
	http->max_in_flight = options->max_in_flight;
	http->connect_timeout_ms = options->connect_timeout_ms;
	http->request_timeout_ms = options->request_timeout_ms;
	http->multi = initialized ? curl_multi_init() : NULL;
	http->sockets = http->multi ? sentdm_sockets_create(http->multi) : NULL;
	if (http->sockets == NULL || http->base_url == NULL || http->ca_file == NULL ||
		http->user_agent == NULL || http->proxy == NULL || http->no_proxy == NULL ||
		sentdm_http_check_url(options->base_url, options->insecure_http) != NULL)
	{
		sentdm_http_destroy(http);
		return NULL;
	}
	set_multi_options(http);
	return http;
}

/* Submitting */

/* A list in one piece of memory, to be freed as such; NULL: there is none left. */
static struct curl_slist *
make_headers(const SentdmHttp *http, const SentdmHttpRequest *request)
{
	const char *const lines[][2] = {
		{"User-Agent: ", http->user_agent},
		{"x-api-key: ", request->api_key},
		{"Accept: ", "application/json"},
		{"Content-Type: ", request->body ? "application/json" : NULL},
		{"Idempotency-Key: ", request->idempotency_key},
		{"x-profile-id: ", request->profile_id},
	};
	const int	n_lines = sizeof(lines) / sizeof(lines[0]);
	size_t		size = n_lines * sizeof(struct curl_slist);
	struct curl_slist *headers;
	struct curl_slist *last = NULL;
	char	   *end;

	for (int i = 0; i < n_lines; i++)
		size += lines[i][1] ? strlen(lines[i][0]) + strlen(lines[i][1]) + 1 : 0;
	headers = malloc(size);
	if (headers == NULL)
		return NULL;
	end = (char *) (headers + n_lines);
	for (int i = 0; i < n_lines; i++)
	{
		struct curl_slist *header = last ? last + 1 : headers;

		if (lines[i][1] == NULL)
			continue;
		header->data = end;
		header->next = NULL;
		end = stpcpy(stpcpy(end, lines[i][0]), lines[i][1]) + 1;
		if (last != NULL)
			last->next = header;
		last = header;
	}
	return headers;
}

/* Options that are the same for every request; they stay with a reused handle. */
static void
set_fixed_options(Transfer *transfer)
{
	SentdmHttp *http = transfer->http;
	CURL	   *easy = transfer->easy;

	curl_easy_setopt(easy, CURLOPT_PRIVATE, transfer);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= 0x075500
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, http->plain ? "http" : "https");
#else
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS, http->plain ? CURLPROTO_HTTP : CURLPROTO_HTTPS);
#endif
	curl_easy_setopt(easy, CURLOPT_PROXY, http->proxy);
	curl_easy_setopt(easy, CURLOPT_NOPROXY, http->no_proxy);
	curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 0L);
	curl_easy_setopt(easy, CURLOPT_SSL_VERIFYPEER, 1L);
	curl_easy_setopt(easy, CURLOPT_SSL_VERIFYHOST, 2L);
	curl_easy_setopt(easy, CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	if (http->ca_file[0] != '\0')
		curl_easy_setopt(easy, CURLOPT_CAINFO, http->ca_file);
	curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_2TLS);
	if (!http->plain)
		curl_easy_setopt(easy, CURLOPT_PIPEWAIT, 1L);
	curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
	/* The least.  Nearly all fits, and each request under way has its own. */
	curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 1024L);
	curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, 16384L);
	curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long) http->connect_timeout_ms);
	curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS,
					 (long) http->connect_timeout_ms + http->request_timeout_ms);
	sentdm_sockets_adopt(http->sockets, easy);
	curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, on_before_request);
	curl_easy_setopt(easy, CURLOPT_PREREQDATA, transfer);
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, transfer);
	curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, on_header);
	curl_easy_setopt(easy, CURLOPT_HEADERDATA, transfer);
}

/* The base URL with this path, parsed; NULL: it is none, or out of memory. */
static CURLU *
parse_url(const SentdmHttp *http, const char *path)
{
	size_t		base_length = strlen(http->base_url);
	CURLU	   *url = curl_url();
	char	   *joined;

	while (base_length > 0 && http->base_url[base_length - 1] == '/')
		base_length--;
	joined = malloc(base_length + strlen(path) + 1);
	if (url != NULL && joined != NULL)
	{
		memcpy(joined, http->base_url, base_length);
		strcpy(joined + base_length, path);
		if (curl_url_set(url, CURLUPART_URL, joined, 0) == CURLUE_OK)
		{
			free(joined);
			return url;
		}
	}
	free(joined);
	curl_url_cleanup(url);
	return NULL;
}

/* Most requests have the path of the one before. */
static bool
set_url(Transfer *transfer, const char *path)
{
	CURLU	   *before = transfer->url;

	if (before != NULL && strcmp(transfer->path, path) == 0)
		return true;
	free(transfer->path);
	transfer->path = strdup(path);
	transfer->url = transfer->path ? parse_url(transfer->http, path) : NULL;
	curl_easy_setopt(transfer->easy, CURLOPT_CURLU, transfer->url);
	curl_url_cleanup(before);
	return transfer->url != NULL;
}

static bool
set_request_options(Transfer *transfer, const SentdmHttpRequest *request)
{
	CURL	   *easy = transfer->easy;
	const char *usual_method = request->body ? "POST" : "GET";

	if (request->body != NULL)
	{
		curl_easy_setopt(easy, CURLOPT_POST, 1L);
		curl_easy_setopt(easy, CURLOPT_POSTFIELDS, transfer->request_body);
		curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) request->body_length);
	}
	else
		curl_easy_setopt(easy, CURLOPT_HTTPGET, 1L);
	curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST,
					 strcmp(request->method, usual_method) == 0 ? NULL : request->method);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, transfer->headers);
	return set_url(transfer, request->path);
}

static Transfer *
take_transfer(SentdmHttp *http)
{
	Transfer   *transfer = http->idle;

	if (transfer != NULL)
	{
		http->idle = transfer->next;
		return transfer;
	}
	transfer = calloc(1, sizeof(Transfer));
	if (transfer == NULL)
		return NULL;
	transfer->http = http;
	transfer->easy = curl_easy_init();
	if (transfer->easy == NULL)
	{
		free(transfer);
		return NULL;
	}
	set_fixed_options(transfer);
	return transfer;
}

/* Make it ready for the next request; the handle keeps its fixed options. */
static void
recycle(Transfer *transfer)
{
	SentdmHttp *http = transfer->http;

	free(transfer->headers);
	free(transfer->request_body);
	transfer->headers = NULL;
	transfer->request_body = NULL;
	transfer->result = NULL;
	transfer->capacity = 0;
	transfer->on_the_wire = false;
	transfer->too_late = false;
	transfer->previous = NULL;
	transfer->next = http->idle;
	http->idle = transfer;
}

static bool
prepare(Transfer *transfer, const SentdmHttpRequest *request)
{
	QueuedResult *queued = calloc(1, sizeof(QueuedResult));

	if (queued == NULL)
		return false;
	transfer->result = &queued->result;
	transfer->result->tag = request->tag;
	transfer->result->body = calloc(1, 1);
	transfer->max_answer = request->max_answer;
	transfer->deadline_unix_us = request->deadline_unix_us;
	if (request->body != NULL)
	{
		transfer->request_body = malloc(request->body_length + 1);
		if (transfer->request_body == NULL)
			return false;
		memcpy(transfer->request_body, request->body, request->body_length);
	}
	transfer->headers = make_headers(transfer->http, request);
	return transfer->result->body != NULL && transfer->headers != NULL &&
		set_request_options(transfer, request);
}

bool
sentdm_http_submit(SentdmHttp *http, const SentdmHttpRequest *request)
{
	Transfer   *transfer = take_transfer(http);

	if (transfer == NULL)
		return false;
	/* This starts no thread, so signals need not be blocked. */
	if (!prepare(transfer, request) ||
		curl_multi_add_handle(http->multi, transfer->easy) != CURLM_OK)
	{
		sentdm_http_free_result(transfer->result);
		recycle(transfer);
		return false;
	}
	transfer->next = http->active;
	if (http->active != NULL)
		http->active->previous = transfer;
	http->active = transfer;
	return true;
}

/* Running */

int
sentdm_http_fd(const SentdmHttp *http)
{
	return sentdm_sockets_fd(http->sockets);
}

static SentdmTransport
transport_of(const Transfer *transfer, CURLcode code)
{
	if (code == CURLE_OK)
		return SENTDM_ANSWERED;
	if (transfer->on_the_wire)
		return SENTDM_NO_ANSWER;
	if (transfer->too_late)
		return SENTDM_TOO_LATE;
	if (code == CURLE_PEER_FAILED_VERIFICATION || code == CURLE_SSL_CACERT_BADFILE ||
		code == CURLE_SSL_ISSUER_ERROR)
		return SENTDM_BAD_CERTIFICATE;
	return SENTDM_NOT_REACHED;
}

/* Each answer tells. */
static void
note_version(SentdmHttp *http, CURL *easy)
{
	long		version = 0;
	bool		multiplexed;

	curl_easy_getinfo(easy, CURLINFO_HTTP_VERSION, &version);
	multiplexed = version >= CURL_HTTP_VERSION_2_0;
	if (multiplexed == http->multiplexed)
		return;
	http->multiplexed = multiplexed;
	limit_connections(http);
}

static void
finish(Transfer *transfer, CURLcode code)
{
	SentdmHttp *http = transfer->http;
	SentdmHttpResult *result = transfer->result;
	QueuedResult *queued = (QueuedResult *) result;
	long		status = 0;
	curl_off_t	duration_us = 0;

	curl_easy_getinfo(transfer->easy, CURLINFO_RESPONSE_CODE, &status);
	curl_easy_getinfo(transfer->easy, CURLINFO_TOTAL_TIME_T, &duration_us);
	result->transport = transport_of(transfer, code);
	result->http_status = result->transport == SENTDM_ANSWERED ? (int) status : 0;
	result->trouble = code == CURLE_OK ? NULL : curl_easy_strerror(code);
	result->duration_us = duration_us;
	if (code == CURLE_OK)
		note_version(http, transfer->easy);

	if (http->last != NULL)
		http->last->next = queued;
	else
		http->first = queued;
	http->last = queued;

	if (transfer->previous != NULL)
		transfer->previous->next = transfer->next;
	else
		http->active = transfer->next;
	if (transfer->next != NULL)
		transfer->next->previous = transfer->previous;
	recycle(transfer);
}

static void
collect(SentdmHttp *http)
{
	CURLMsg    *message;
	int			left;

	while ((message = curl_multi_info_read(http->multi, &left)) != NULL)
	{
		CURL	   *easy = message->easy_handle;
		CURLcode	code = message->data.result;
		char	   *arg = NULL;

		if (message->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(easy, CURLINFO_PRIVATE, &arg);
		curl_multi_remove_handle(http->multi, easy);
		finish((Transfer *) arg, code);
	}
}

void
sentdm_http_run(SentdmHttp *http)
{
	sigset_t	saved;
	bool		more;

	block_signals(&saved);
	do
	{
		more = sentdm_sockets_serve(http->sockets);
		/* Now, as to remove a handle takes libcurl longer the more are done. */
		collect(http);
	} while (more);
	sentdm_sockets_arm_timer(http->sockets);
	restore_signals(&saved);
}

SentdmHttpResult *
sentdm_http_next_result(SentdmHttp *http)
{
	QueuedResult *queued = http->first;

	if (queued == NULL)
		return NULL;
	http->first = queued->next;
	if (http->first == NULL)
		http->last = NULL;
	return &queued->result;
}

void
sentdm_http_free_result(SentdmHttpResult *result)
{
	if (result == NULL)
		return;
	free(result->body);
	free(result);
}

void
sentdm_http_abort(SentdmHttp *http)
{
	sigset_t	saved;

	block_signals(&saved);
	while (http->active != NULL)
	{
		Transfer   *transfer = http->active;

		curl_multi_remove_handle(http->multi, transfer->easy);
		finish(transfer, CURLE_ABORTED_BY_CALLBACK);
	}
	restore_signals(&saved);
}

static void
free_idle(SentdmHttp *http)
{
	while (http->idle != NULL)
	{
		Transfer   *transfer = http->idle;

		http->idle = transfer->next;
		curl_easy_cleanup(transfer->easy);
		curl_url_cleanup(transfer->url);
		free(transfer->path);
		free(transfer);
	}
}

void
sentdm_http_destroy(SentdmHttp *http)
{
	SentdmHttpResult *result;
	sigset_t	saved;

	if (http == NULL)
		return;
	sentdm_http_abort(http);
	block_signals(&saved);
	free_idle(http);
	while ((result = sentdm_http_next_result(http)) != NULL)
		sentdm_http_free_result(result);
	if (http->multi != NULL)
		curl_multi_cleanup(http->multi);
	/* Until now, libcurl has closed connections. */
	sentdm_sockets_destroy(http->sockets);
	free(http->base_url);
	free(http->ca_file);
	free(http->user_agent);
	free(http->proxy);
	free(http->no_proxy);
	free(http);
	restore_signals(&saved);
}
