/*
 * http_thread_test.c
 *		The HTTP client in its thread, against a real server in another process.
 *
 * To be run under sanitizers, and under valgrind's helgrind.
 *
 *		cc -I src -o http_thread_test test/unit/http_thread_test.c src/http_thread.c \
 *			src/http.c src/sockets.c -lcurl -lmicrohttpd
 */
#include <microhttpd.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "http_thread.h"
#include "tap.h"

#define REQUESTS 1000
#define AT_ONCE 64
#define WAIT_MS 60000			/* of a test that fails; helgrind is slow */

static char base_url[64];

/* The server: says the Idempotency-Key, hangs, or says how often it was asked to */

static int	hanging = 0;

static enum MHD_Result
answer(void *arg, struct MHD_Connection *connection, const char *url, const char *method,
	   const char *version, const char *body, size_t *size, void **state)
{
	const char *key = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Idempotency-Key");
	struct MHD_Response *response;
	enum MHD_Result queued;
	char		text[80];

	(void) arg, (void) method, (void) version, (void) body;
	if (*state == NULL || *size > 0)
	{
		*state = connection;
		*size = 0;
		return MHD_YES;
	}
	if (strcmp(url, "/hang") == 0)
	{
		hanging++;
		MHD_suspend_connection(connection);
		return MHD_YES;
	}
	snprintf(text, sizeof(text), "%s %d", key ? key : "none", hanging);
	response = MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_COPY);
	queued = MHD_queue_response(connection, 200, response);
	MHD_destroy_response(response);
	return queued;
}

static void
serve_until_killed(int port_pipe)
{
	struct MHD_Daemon *daemon = MHD_start_daemon(MHD_USE_INTERNAL_POLLING_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_EPOLL,
												 0, NULL, NULL, answer, NULL, MHD_OPTION_END);
	int			port = daemon ? MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_BIND_PORT)->port : 0;

	if (write(port_pipe, &port, sizeof(port)) == sizeof(port))
		pause();
	_exit(0);
}

static pid_t
start_server(void)
{
	int			ends[2];
	int			port = 0;
	pid_t		pid = pipe(ends) == 0 ? fork() : -1;

	if (pid == 0)
		serve_until_killed(ends[1]);
	if (pid < 0 || read(ends[0], &port, sizeof(port)) != sizeof(port) || port == 0)
		abort();
	snprintf(base_url, sizeof(base_url), "http://127.0.0.1:%d", port);
	return pid;
}

/* The client */

static SentdmHttpThread *
open_client(void)
{
	SentdmHttpOptions options = {
		.base_url = base_url,
		.ca_file = "",
		.user_agent = "test",
		.insecure_http = true,
		.max_in_flight = AT_ONCE,
		.connect_timeout_ms = WAIT_MS,
		.request_timeout_ms = WAIT_MS,
	};

	return sentdm_http_thread_create(&options);
}

static bool
submit(SentdmHttpThread *thread, const char *path, const char *key, void *tag)
{
	SentdmHttpRequest request = {
		.method = "POST",
		.path = path,
		.api_key = "key",
		.idempotency_key = key,
		.body = "{}",
		.body_length = 2,
		.max_answer = 1000,
		.deadline_unix_us = INT64_MAX,
		.tag = tag,
	};

	return sentdm_http_thread_submit(thread, &request);
}

static bool
is_readable(const SentdmHttpThread *thread, int wait_ms)
{
	struct pollfd fd = {sentdm_http_thread_fd(thread), POLLIN, 0};

	return poll(&fd, 1, wait_ms) == 1;
}

/* The next one; NULL: none comes. */
static const SentdmHttpResult *
wait_for_result(SentdmHttpThread *thread)
{
	const SentdmHttpResult *result;

	for (;;)
	{
		sentdm_http_thread_run(thread);
		result = sentdm_http_thread_next_result(thread);
		if (result != NULL || !is_readable(thread, WAIT_MS))
			return result;
	}
}

/* Ask once more and compare what the server says. */
static bool
is_answered(SentdmHttpThread *thread, const char *path, const char *key, const char *wanted)
{
	const SentdmHttpResult *result;

	if (!submit(thread, path, key, NULL))
		return false;
	result = wait_for_result(thread);
	return result != NULL && result->transport == SENTDM_ANSWERED && result->http_status == 200 &&
		strcmp(result->body, wanted) == 0;
}

/* Tests */

static void
test_many(void)
{
	static int	results[REQUESTS];
	SentdmHttpThread *thread = open_client();
	int			started = 0;
	int			ended = 0;
	int			wrong = 0;

	while (ended < REQUESTS)
	{
		const SentdmHttpResult *result;
		char		key[20];
		char		wanted[20];
		int			n;

		for (; started < REQUESTS && started - ended < AT_ONCE; started++)
		{
			snprintf(key, sizeof(key), "k%d", started);
			if (!submit(thread, "/", key, &results[started]))
				break;
		}
		result = wait_for_result(thread);
		if (result == NULL)
			break;
		n = (int) ((int *) result->tag - results);
		results[n]++;
		snprintf(wanted, sizeof(wanted), "k%d 0", n);
		wrong += result->transport != SENTDM_ANSWERED || strcmp(result->body, wanted) != 0;
		ended++;
	}
	for (int i = 0; i < REQUESTS; i++)
		wrong += results[i] != 1;
	ok(ended == REQUESTS, "%d of %d requests, %d at once, have a result", ended, REQUESTS, AT_ONCE);
	ok(wrong == 0, "... each its own answer, once: %d wrong", wrong);
	sentdm_http_thread_run(thread);
	ok(!is_readable(thread, 0), "... and then there is nothing to take");
	sentdm_http_thread_destroy(thread);
}

static void
test_unprepared(void)
{
	SentdmHttpThread *thread = open_client();
	int			tag;
	const SentdmHttpResult *result;

	submit(thread, "no path", "k", &tag);
	result = wait_for_result(thread);
	ok(result != NULL && result->transport == SENTDM_NOT_REACHED && result->tag == &tag &&
	   result->http_status == 0 && result->body[0] == '\0',
	   "a request that libcurl does not take was not sent");
	ok(is_answered(thread, "/", "next", "next 0"), "... and the next is");
	sentdm_http_thread_destroy(thread);
}

static volatile sig_atomic_t handled = 0;

static void
handle(int signal_number)
{
	(void) signal_number;
	handled++;
}

/* A thread that does not block it would run the handler. */
static void
test_signals(void)
{
	SentdmHttpThread *thread = open_client();
	sigset_t	usr1;
	sigset_t	pending;

	signal(SIGUSR1, handle);
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	ok(is_answered(thread, "/", "a", "a 0"), "the thread is there");
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	kill(getpid(), SIGUSR1);
	ok(is_answered(thread, "/", "b", "b 0"), "... and busy");
	sigpending(&pending);
	ok(handled == 0 && sigismember(&pending, SIGUSR1) == 1, "a signal waits for the thread of the caller");
	pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
	ok(handled == 1, "... which takes it");
	sentdm_http_thread_destroy(thread);
}

static void
test_stop(void)
{
	SentdmHttpThread *thread = open_client();
	SentdmHttpThread *other = open_client();
	int			asked = 0;

	for (int i = 0; i < 3; i++)
		submit(thread, "/hang", "h", NULL);
	sentdm_http_thread_run(thread);
	/* Until the server has all three. */
	while (!is_answered(other, "/", "w", "w 3") && asked < 100000)
		asked++;
	sentdm_http_thread_stop(thread);
	submit(thread, "/hang", "h", NULL);
	sentdm_http_thread_run(thread);
	ok(!is_readable(thread, 0) && sentdm_http_thread_next_result(thread) == NULL,
	   "a thread that was stopped while requests hang gives no result");
	sentdm_http_thread_destroy(thread);
	ok(is_answered(other, "/", "w", "w 3"), "... and what was submitted afterwards never left");
	sentdm_http_thread_destroy(other);
}

static void
test_short_lives(void)
{
	int			opened = 0;

	for (int i = 0; i < 20; i++)
	{
		SentdmHttpThread *thread = open_client();

		opened += thread != NULL;
		/* Those that were not handed over, handed over, and perhaps under way. */
		for (int j = 0; j < i; j++)
			submit(thread, "/", "k", NULL);
		if (i % 2 == 0)
			sentdm_http_thread_run(thread);
		sentdm_http_thread_destroy(thread);
	}
	sentdm_http_thread_destroy(NULL);
	ok(opened == 20, "it may end at any time");
}

int
main(void)
{
	pid_t		server = start_server();

	test_many();
	test_unprepared();
	test_signals();
	test_short_lives();
	test_stop();
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return done_testing();
}
