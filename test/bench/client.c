/*
 * client.c
 *		The limit of the library: the bare program that posts the same bytes.
 *
 * libcurl's multi interface driven by epoll, handles and connections reused, the
 * same headers as the worker's; answers are read and thrown away.  No database,
 * no JSON, no promise.
 *
 *		client URL IN_FLIGHT [CA_FILE] < requests
 *
 * With https it speaks HTTP/2 on as few connections as it can, as the worker does.
 * A line of the input is an Idempotency-Key, a tab and a body.  All is read
 * before the clock starts; the result is one line of JSON.
 */
#include <curl/curl.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define EVENTS_AT_ONCE 64
#define KEY_HEADER "Idempotency-Key: "

typedef struct Request
{
	char		key_header[sizeof(KEY_HEADER) + 80];
	char	   *body;
	size_t		body_length;
} Request;

static Request *requests;
static size_t n_requests,
			max_requests,
			n_started,
			n_accepted,
			n_failed;
static CURLM *multi;
static int	epoll_fd;
static long timeout_ms = -1;

static void
die(const char *what)
{
	perror(what);
	exit(1);
}

static void
add_request(const char *line, size_t length)
{
	const char *tab = memchr(line, '\t', length);
	Request    *request;

	if (tab == NULL || tab - line >= 80)
	{
		fprintf(stderr, "client: a line is not key, tab and body\n");
		exit(1);
	}
	if (n_requests == max_requests)
	{
		max_requests = max_requests ? max_requests * 2 : 1024;
		requests = realloc(requests, max_requests * sizeof(Request));
		if (requests == NULL)
			die("realloc");
	}
	request = &requests[n_requests++];
	snprintf(request->key_header, sizeof(request->key_header), "%s%.*s", KEY_HEADER,
			 (int) (tab - line), line);
	request->body_length = length - (tab + 1 - line);
	request->body = strndup(tab + 1, request->body_length);
}

static void
read_requests(void)
{
	char	   *line = NULL;
	size_t		size = 0;
	ssize_t		length;

	while ((length = getline(&line, &size, stdin)) > 0)
		add_request(line, line[length - 1] == '\n' ? length - 1 : length);
	free(line);
}

/* Callbacks */

static int
on_socket(CURL *easy, curl_socket_t socket, int what, void *arg, void *socket_arg)
{
	struct epoll_event event = {.data.fd = socket};

	(void) easy;
	(void) arg;
	(void) socket_arg;
	if (what == CURL_POLL_REMOVE)
		return epoll_ctl(epoll_fd, EPOLL_CTL_DEL, socket, NULL), 0;
	if (what & CURL_POLL_IN)
		event.events |= EPOLLIN;
	if (what & CURL_POLL_OUT)
		event.events |= EPOLLOUT;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, socket, &event) != 0 && errno == ENOENT)
		epoll_ctl(epoll_fd, EPOLL_CTL_ADD, socket, &event);
	return 0;
}

static int
on_timer(CURLM *handle, long ms, void *arg)
{
	(void) handle;
	(void) arg;
	timeout_ms = ms;
	return 0;
}

static size_t
on_body(char *data, size_t size, size_t count, void *arg)
{
	(void) data;
	(void) arg;
	return size * count;
}

/* Sending */

static void
start(CURL *easy)
{
	const Request *request = &requests[n_started++];
	struct curl_slist *headers = NULL;

	headers = curl_slist_append(headers, "x-api-key: sk_test_of_the_bench");
	headers = curl_slist_append(headers, "Accept: application/json");
	headers = curl_slist_append(headers, "Content-Type: application/json");
	headers = curl_slist_append(headers, request->key_header);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers);
	curl_easy_setopt(easy, CURLOPT_PRIVATE, headers);
	curl_easy_setopt(easy, CURLOPT_POSTFIELDS, request->body);
	curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE, (long) request->body_length);
	curl_multi_add_handle(multi, easy);
}

static CURL *
make_handle(const char *url, const char *ca_file)
{
	CURL	   *easy = curl_easy_init();

	curl_easy_setopt(easy, CURLOPT_URL, url);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_PROXY, "");
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
	curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, 30000L);
	if (ca_file != NULL)
	{
		curl_easy_setopt(easy, CURLOPT_CAINFO, ca_file);
		curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_2TLS);
		curl_easy_setopt(easy, CURLOPT_PIPEWAIT, 1L);
	}
	return easy;
}

static void
take_answers(void)
{
	CURLMsg    *message;
	int			left;

	while ((message = curl_multi_info_read(multi, &left)) != NULL)
	{
		CURL	   *easy = message->easy_handle;
		CURLcode	code = message->data.result;
		struct curl_slist *headers = NULL;
		long		status = 0;

		curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
		curl_easy_getinfo(easy, CURLINFO_PRIVATE, &headers);
		curl_multi_remove_handle(multi, easy);
		curl_slist_free_all(headers);
		if (code == CURLE_OK && status == 202)
			n_accepted++;
		else
			n_failed++;
		if (n_started < n_requests)
			start(easy);
		else
			curl_easy_cleanup(easy);
	}
}

static void
run(const char *url, size_t in_flight, const char *ca_file)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	int			running;

	while (n_started < in_flight && n_started < n_requests)
		start(make_handle(url, ca_file));
	while (n_accepted + n_failed < n_requests)
	{
		int			n = epoll_wait(epoll_fd, events, EVENTS_AT_ONCE, (int) timeout_ms);

		for (int i = 0; i < n; i++)
			curl_multi_socket_action(multi, events[i].data.fd,
									 (events[i].events & EPOLLOUT ? CURL_CSELECT_OUT : 0) |
									 (events[i].events & ~EPOLLOUT ? CURL_CSELECT_IN : 0), &running);
		if (n == 0 || timeout_ms == 0)
			curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &running);
		take_answers();
	}
}

static double
seconds(const struct timeval *time)
{
	return time->tv_sec + time->tv_usec / 1e6;
}

static double
monotonic(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

int
main(int argc, char **argv)
{
	struct rusage before;
	struct rusage after;
	double		began;

	if (argc < 3 || argc > 4 || atoi(argv[2]) < 1)
	{
		fprintf(stderr, "usage: client URL IN_FLIGHT [CA_FILE] < requests\n");
		return 2;
	}
	read_requests();
	curl_global_init(CURL_GLOBAL_DEFAULT);
	multi = curl_multi_init();
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, on_socket);
	curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, on_timer);
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, (long) atoi(argv[2]));

	/* Or it would open one for each request beyond the streams of the first. */
	if (argc > 3)
		curl_multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS, atol(argv[2]) / 100 + 1);
	getrusage(RUSAGE_SELF, &before);
	began = monotonic();
	run(argv[1], atoi(argv[2]), argc > 3 ? argv[3] : NULL);
	getrusage(RUSAGE_SELF, &after);
	printf("{\"accepted\": %zu, \"failed\": %zu, \"seconds\": %.6f, \"cpu_s\": %.6f}\n",
		   n_accepted, n_failed, monotonic() - began,
		   seconds(&after.ru_utime) + seconds(&after.ru_stime) -
		   seconds(&before.ru_utime) - seconds(&before.ru_stime));
	return n_failed > 0;
}
