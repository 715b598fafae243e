/*
 * http_thread.c
 *		The HTTP client of http.h in a thread of its own.
 *
 * libcurl takes about as long for a request as the database does, and while the
 * worker waits for the disk it could do nothing.  So it has a second core, and
 * requests leave and answers arrive whatever the worker does.
 *
 * A thread in a process of PostgreSQL may touch nothing of PostgreSQL's: no palloc,
 * no ereport, no signals.  What http.c and libcurl do is of that kind, and libcurl's
 * resolver has threads there, too.  The two sides share two mailboxes and nothing
 * else; a request belongs to whoever took it out of one.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "http_thread.h"

typedef struct Request
{
	struct Request *next;
	SentdmHttpRequest wanted;	/* its texts are in text, its tag is this */
	char	   *text;			/* until libcurl has a copy */
	void	   *tag;			/* the caller's */
	SentdmHttpResult *result;	/* NULL: could not be submitted */
} Request;

typedef struct List
{
	Request    *first;
	Request    *last;
} List;

/* From one thread to the other. */
typedef struct Mailbox
{
	pthread_mutex_t mutex;
	int			fd;				/* readable as long as there is something */
	List		list;
	bool		closed;
} Mailbox;

struct SentdmHttpThread
{
	SentdmHttp *http;			/* of the thread, while it runs */
	pthread_t	thread;
	bool		running;
	Mailbox		requests;
	Mailbox		results;
	List		submitted;		/* not handed over yet */
	List		ended;			/* taken, not returned yet */
	Request    *returned;		/* the last one, to be freed */
	SentdmHttpResult failure;	/* what is said of one without a result */
};

/* Lists and mailboxes */

static void
append(List *list, Request *request)
{
	request->next = NULL;
	if (list->last != NULL)
		list->last->next = request;
	else
		list->first = request;
	list->last = request;
}

static Request *
take_first(List *list)
{
	Request    *request = list->first;

	if (request == NULL)
		return NULL;
	list->first = request->next;
	if (list->first == NULL)
		list->last = NULL;
	return request;
}

static void
move_all(List *from, List *to)
{
	if (from->first == NULL)
		return;
	if (to->last != NULL)
		to->last->next = from->first;
	else
		to->first = from->first;
	to->last = from->last;
	from->first = from->last = NULL;
}

static bool
create_mailbox(Mailbox *mailbox)
{
	pthread_mutex_init(&mailbox->mutex, NULL);
	mailbox->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return mailbox->fd >= 0;
}

static void
destroy_mailbox(Mailbox *mailbox)
{
	if (mailbox->fd >= 0)
		close(mailbox->fd);
	pthread_mutex_destroy(&mailbox->mutex);
}

/* The counter of an eventfd cannot overflow by ones. */
static void
make_readable(Mailbox *mailbox)
{
	const uint64_t one = 1;

	while (write(mailbox->fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void
make_unreadable(Mailbox *mailbox)
{
	uint64_t	count;

	while (read(mailbox->fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

static void
put(Mailbox *mailbox, List *list)
{
	if (list->first == NULL)
		return;
	pthread_mutex_lock(&mailbox->mutex);
	if (mailbox->list.first == NULL)
		make_readable(mailbox);
	move_all(list, &mailbox->list);
	pthread_mutex_unlock(&mailbox->mutex);
}

/* No more is to be taken. */
static void
close_mailbox(Mailbox *mailbox)
{
	pthread_mutex_lock(&mailbox->mutex);
	mailbox->closed = true;
	make_readable(mailbox);
	pthread_mutex_unlock(&mailbox->mutex);
}

/* All that is in it; false: it was closed. */
static bool
take(Mailbox *mailbox, List *list)
{
	bool		open;

	pthread_mutex_lock(&mailbox->mutex);
	open = !mailbox->closed;
	if (open && mailbox->list.first != NULL)
	{
		make_unreadable(mailbox);
		move_all(&mailbox->list, list);
	}
	pthread_mutex_unlock(&mailbox->mutex);
	return open;
}

/* Requests */

static const char *
copy_text(const char *text, size_t length, char **end)
{
	char	   *copy = *end;

	if (text == NULL)
		return NULL;
	memcpy(copy, text, length);
	copy[length] = '\0';
	*end += length + 1;
	return copy;
}

static size_t
length_of(const char *text)
{
	return text ? strlen(text) : 0;
}

static Request *
copy_request(const SentdmHttpRequest *wanted)
{
	Request    *request = calloc(1, sizeof(Request));
	size_t		size = length_of(wanted->method) + length_of(wanted->path) + length_of(wanted->api_key) +
	length_of(wanted->idempotency_key) + length_of(wanted->profile_id) + wanted->body_length + 6;
	char	   *end = malloc(size);

	if (request == NULL || end == NULL)
	{
		free(request);
		free(end);
		return NULL;
	}
	request->text = end;
	request->wanted = *wanted;
	request->wanted.method = copy_text(wanted->method, length_of(wanted->method), &end);
	request->wanted.path = copy_text(wanted->path, length_of(wanted->path), &end);
	request->wanted.api_key = copy_text(wanted->api_key, length_of(wanted->api_key), &end);
	request->wanted.idempotency_key = copy_text(wanted->idempotency_key,
												length_of(wanted->idempotency_key), &end);
	request->wanted.profile_id = copy_text(wanted->profile_id, length_of(wanted->profile_id), &end);
	request->wanted.body = copy_text(wanted->body, wanted->body_length, &end);
	request->wanted.tag = request;
	request->tag = wanted->tag;
	return request;
}

static void
free_request(Request *request)
{
	if (request == NULL)
		return;
	sentdm_http_free_result(request->result);
	free(request->text);
	free(request);
}

static void
free_list(List *list)
{
	Request    *request;

	while ((request = take_first(list)) != NULL)
		free_request(request);
}

/* The thread */

/* Give all to libcurl; those that it does not take have ended. */
static void
start_all(SentdmHttp *http, List *requests, List *ended)
{
	Request    *request;

	while ((request = take_first(requests)) != NULL)
	{
		bool		started = sentdm_http_submit(http, &request->wanted);

		free(request->text);
		request->text = NULL;
		if (!started)
			append(ended, request);
	}
}

static void
collect(SentdmHttp *http, List *ended)
{
	SentdmHttpResult *result;

	while ((result = sentdm_http_next_result(http)) != NULL)
	{
		Request    *request = result->tag;

		result->tag = request->tag;
		request->result = result;
		append(ended, request);
	}
}

static void
wait_for_something(const SentdmHttpThread *thread)
{
	struct pollfd fds[2] = {{thread->requests.fd, POLLIN, 0}, {sentdm_http_fd(thread->http), POLLIN, 0}};

	(void) poll(fds, 2, -1);
}

static void *
serve(void *arg)
{
	SentdmHttpThread *thread = arg;
	List		requests = {NULL, NULL};
	List		ended = {NULL, NULL};

	while (take(&thread->requests, &requests))
	{
		start_all(thread->http, &requests, &ended);
		sentdm_http_run(thread->http);
		collect(thread->http, &ended);
		put(&thread->results, &ended);
		wait_for_something(thread);
	}
	return NULL;
}

/* Signals are for the thread that PostgreSQL knows. */
static bool
start_thread(SentdmHttpThread *thread)
{
	sigset_t	all;
	sigset_t	saved;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	thread->running = pthread_create(&thread->thread, NULL, serve, thread) == 0;
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	return thread->running;
}

/* The caller's side */

SentdmHttpThread *
sentdm_http_thread_create(const SentdmHttpOptions *options)
{
	SentdmHttpThread *thread = calloc(1, sizeof(SentdmHttpThread));
	bool		created;

	if (thread == NULL)
		return NULL;
	created = create_mailbox(&thread->requests);
	created &= create_mailbox(&thread->results);
	thread->http = sentdm_http_create(options);
	thread->failure.transport = SENTDM_NOT_REACHED;
	thread->failure.body = "";
	thread->failure.trouble = "the request could not be prepared";
	if (!created || thread->http == NULL || !start_thread(thread))
	{
		sentdm_http_thread_destroy(thread);
		return NULL;
	}
	return thread;
}

bool
sentdm_http_thread_submit(SentdmHttpThread *thread, const SentdmHttpRequest *wanted)
{
	Request    *request = copy_request(wanted);

	if (request == NULL)
		return false;
	append(&thread->submitted, request);
	return true;
}

int
sentdm_http_thread_fd(const SentdmHttpThread *thread)
{
	return thread->results.fd;
}

void
sentdm_http_thread_run(SentdmHttpThread *thread)
{
	put(&thread->requests, &thread->submitted);
	(void) take(&thread->results, &thread->ended);
}

const SentdmHttpResult *
sentdm_http_thread_next_result(SentdmHttpThread *thread)
{
	free_request(thread->returned);
	thread->returned = take_first(&thread->ended);
	if (thread->returned == NULL)
		return NULL;
	if (thread->returned->result != NULL)
		return thread->returned->result;
	thread->failure.tag = thread->returned->tag;
	return &thread->failure;
}

void
sentdm_http_thread_stop(SentdmHttpThread *thread)
{
	if (thread == NULL || !thread->running)
		return;
	close_mailbox(&thread->requests);
	pthread_join(thread->thread, NULL);
	thread->running = false;
}

void
sentdm_http_thread_destroy(SentdmHttpThread *thread)
{
	if (thread == NULL)
		return;
	sentdm_http_thread_stop(thread);
	if (thread->http != NULL)
	{
		/* Requests under way are in no list until they have ended. */
		sentdm_http_abort(thread->http);
		collect(thread->http, &thread->ended);
		sentdm_http_destroy(thread->http);
	}
	free_list(&thread->submitted);
	free_list(&thread->requests.list);
	free_list(&thread->results.list);
	free_list(&thread->ended);
	free_request(thread->returned);
	destroy_mailbox(&thread->requests);
	destroy_mailbox(&thread->results);
	free(thread);
}
