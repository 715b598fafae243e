/*
 * writer.c
 *		The thread that takes events to the database.
 *
 * Takes what waits, stores it in one transaction, answers, and takes what came
 * meanwhile: under load the batches grow by themselves, and without load nothing
 * waits.  An event is answered 200 only here, after the commit.  Must never answer
 * an event whose fate is unknown as if it were known.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "database.h"
#include "log.h"
#include "metrics.h"
#include "writer.h"

#define MAX_BATCH_BYTES (8 * 1024 * 1024)
#define GRACE_US 1000000		/* for the server to end what takes too long, before we give up */
#define GATHER_FROM 16			/* events; a smaller batch is not worth waiting for */
#define GATHER_SHARE 4			/* of the time of a transaction, this part is waited for events */
#define QUIET_US 500			/* no further event for this long: no more will come */
#define PROBE_US (10 * 1000000) /* ask an idle connection whether it still works */
#define FIRST_BACKOFF_US 50000
#define MAX_BACKOFF_US 3000000
#define COMPLAIN_EVERY_US (30 * 1000000)
#define MAX_ATTEMPTS 5
#define STOP_TIMEOUT_S 2

struct ReceiverWriter
{
	const ReceiverConfig *config;
	ReceiverQueue *queue;
	pthread_t	thread;
	ReceiverDatabase database;
	ReceiverEvent **events;
	int			last_n;			/* events of the batch before */
	int64_t		last_us;		/* time that it took */
	atomic_bool stopping;
	atomic_bool abandon;
	_Atomic int64_t down_since_us;	/* 0: up */
	int64_t		backoff_us;
	int64_t		complained_us;
	int64_t		probe_at_us;
	bool		suspect;		/* an error said that the connection is of no use */
};

/* What to do about a batch that was rolled back. */
typedef enum Remedy
{
	TRY_AGAIN,					/* it was nobody's fault */
	ISOLATE,					/* it may be the fault of one event */
	GIVE_UP,					/* it took too long */
	RECONNECT					/* it is the fault of the server or the connection */
} Remedy;

static void
complain(ReceiverWriter *writer, const char *what, const char *why)
{
	int64_t		now_us = receiver_now_us();

	if (writer->complained_us != 0 && now_us - writer->complained_us < COMPLAIN_EVERY_US)
		return;
	writer->complained_us = now_us;
	receiver_log(RECEIVER_ERROR, "%s: %s", what, why);
}

static bool
is_class(const char *sqlstate, const char *classes)
{
	for (; *classes; classes += strcspn(classes, " "), classes += strspn(classes, " "))
	{
		size_t		length = strcspn(classes, " ");

		if (strncmp(sqlstate, classes, length) == 0)
			return true;
	}
	return false;
}

static Remedy
remedy_for(const char *sqlstate)
{
	/* serialization, deadlock */
	if (is_class(sqlstate, "40"))
		return TRY_AGAIN;
	/* statement and lock timeout: no part of it would be faster */
	if (is_class(sqlstate, "57014 55P03"))
		return GIVE_UP;
	/* a standby, no resources, shutting down, I/O, no such statement */
	if (is_class(sqlstate, "08 25 26 53 57 58 F0"))
		return RECONNECT;
	return ISOLATE;
}

/* An event that the database would not store, alone. */
static void
refuse_culprit(ReceiverWriter *writer, ReceiverEvent *event)
{
	const char *sqlstate = writer->database.sqlstate;

	/* A character that the encoding of the database does not have: it never will. */
	if (is_class(sqlstate, "22P05 22021"))
	{
		receiver_event_refuse(event, RECEIVER_NOT_STORABLE);
		return;
	}
	/* Privileges, or an extension that was created again: look for it anew. */
	if (is_class(sqlstate, "42 3F 0A"))
		writer->suspect = true;
	complain(writer, "an event could not be stored, SQLSTATE", sqlstate);
	receiver_event_refuse(event, RECEIVER_DATABASE_ERROR);
}

static void
refuse_all(ReceiverEvent **events, int n, ReceiverRefusal refusal)
{
	for (int i = 0; i < n; i++)
		receiver_event_refuse(events[i], refusal);
}

static void
answer_all(ReceiverEvent **events, int n)
{
	for (int i = 0; i < n; i++)
		events[i]->answered(events[i]);
}

/* One transaction, again if that may help. */
static ReceiverOutcome
store(ReceiverWriter *writer, ReceiverEvent **events, int n, int64_t deadline_us)
{
	ReceiverOutcome outcome = RECEIVER_ROLLED_BACK;

	for (int attempt = 0; attempt < MAX_ATTEMPTS; attempt++)
	{
		int64_t		start_us = receiver_now_us();

		if (attempt > 0)
			receiver_metrics_count(RECEIVER_BATCHES_RETRIED);
		outcome = receiver_database_store(&writer->database, events, n, deadline_us + GRACE_US);
		if (outcome == RECEIVER_COMMITTED)
		{
			int64_t		now_us = receiver_now_us();

			receiver_metrics_count(RECEIVER_BATCHES);
			receiver_metrics_observe(RECEIVER_BATCH_SIZE, n);
			receiver_metrics_observe(RECEIVER_BATCH_TIME, now_us - start_us);
			writer->probe_at_us = now_us + PROBE_US;
		}
		if (outcome != RECEIVER_ROLLED_BACK || remedy_for(writer->database.sqlstate) != TRY_AGAIN ||
			receiver_now_us() >= deadline_us)
			break;
	}
	return outcome;
}

/*
 * Store events and answer them.  The server ends each attempt by itself after the
 * time that a batch has, so that the outcome is known; parts that are not begun by
 * the deadline are not begun at all.  When an error may be the fault of one of them, the
 * batch is cut in halves until that one is alone.
 */
static void
deliver(ReceiverWriter *writer, ReceiverEvent **events, int n, int64_t deadline_us)
{
	ReceiverOutcome outcome;

	if (writer->database.conn == NULL || writer->suspect || receiver_now_us() >= deadline_us)
	{
		refuse_all(events, n, RECEIVER_DATABASE_ERROR);
		return;
	}
	outcome = store(writer, events, n, deadline_us);
	if (outcome == RECEIVER_COMMITTED)
		answer_all(events, n);
	else if (outcome == RECEIVER_UNKNOWN)
		refuse_all(events, n, RECEIVER_OUTCOME_UNKNOWN);
	else if (remedy_for(writer->database.sqlstate) != ISOLATE)
	{
		Remedy		remedy = remedy_for(writer->database.sqlstate);

		writer->suspect = remedy == RECONNECT;
		complain(writer, "a batch could not be stored, SQLSTATE", writer->database.sqlstate);
		refuse_all(events, n, remedy == GIVE_UP ? RECEIVER_DATABASE_SLOW : RECEIVER_DATABASE_ERROR);
	}
	else if (n == 1)
		refuse_culprit(writer, events[0]);
	else
	{
		receiver_metrics_count(RECEIVER_BATCHES_RETRIED);
		deliver(writer, events, n / 2, deadline_us);
		deliver(writer, events + n / 2, n - n / 2, deadline_us);
	}
}

static void
go_down(ReceiverWriter *writer, const char *what, const char *why)
{
	receiver_database_close(&writer->database);
	writer->suspect = false;
	/* That it is lost is always said; that it is still lost, now and then. */
	if (atomic_load(&writer->down_since_us) == 0)
	{
		atomic_store(&writer->down_since_us, receiver_now_us());
		writer->complained_us = 0;
	}
	receiver_metrics_count(RECEIVER_DATABASE_FAILURES);
	complain(writer, what, why);
}

static void
go_up(ReceiverWriter *writer)
{
	atomic_store(&writer->down_since_us, 0);
	receiver_queue_block(writer->queue, RECEIVER_NOT_REFUSED);
	receiver_metrics_count(RECEIVER_DATABASE_CONNECTS);
	writer->backoff_us = FIRST_BACKOFF_US;
	writer->complained_us = 0;
	writer->probe_at_us = receiver_now_us() + PROBE_US;
	receiver_log(RECEIVER_INFO, "connected to database \"%s\"", PQdb(writer->database.conn));
}

/* Sleep until then, unless there is something new to do. */
static void
rest(ReceiverWriter *writer, int64_t until_us)
{
	while (!atomic_load(&writer->stopping) && receiver_now_us() < until_us)
		poll(NULL, 0, receiver_ms_until(until_us, 100));
}

/* Half of the wait is random, so that several receivers do not come together. */
static void
reconnect(ReceiverWriter *writer)
{
	if (receiver_database_connect(&writer->database, writer->config->database,
								  writer->config->batch_timeout_us))
	{
		go_up(writer);
		return;
	}
	go_down(writer, "cannot use the database", writer->database.trouble);
	rest(writer, receiver_now_us() + writer->backoff_us / 2 + random() % (writer->backoff_us / 2));
	writer->backoff_us *= 2;
	if (writer->backoff_us > MAX_BACKOFF_US)
		writer->backoff_us = MAX_BACKOFF_US;
}

/* Ask an idle connection whether it still works, so that /health tells the truth. */
static void
probe(ReceiverWriter *writer)
{
	writer->probe_at_us = receiver_now_us() + PROBE_US;
	if (receiver_database_store(&writer->database, NULL, 0,
								receiver_now_us() + writer->config->batch_timeout_us) != RECEIVER_COMMITTED)
		go_down(writer, "the database does not work any longer, SQLSTATE",
				writer->database.sqlstate[0] ? writer->database.sqlstate : "none");
}

/* Nothing to do: wait for an event, or for the server to close the connection. */
static void
idle(ReceiverWriter *writer)
{
	struct pollfd fds[2] = {
		{receiver_queue_fd(writer->queue), POLLIN, 0},
		{PQsocket(writer->database.conn), POLLIN, 0}
	};

	if (receiver_queue_prepare_wait(writer->queue, 1))
		poll(fds, 2, receiver_ms_until(writer->probe_at_us, 1000));
	receiver_queue_end_wait(writer->queue);
	if (!receiver_database_is_alive(&writer->database))
		go_down(writer, "lost the database", writer->database.trouble);
	else if (receiver_now_us() >= writer->probe_at_us)
		probe(writer);
}

/*
 * The senders of the last batch have just been answered, and will most likely send
 * again: their events in one transaction cost much less than in two.  So wait until
 * as many more are there, or no more come.  But the database idles meanwhile, so
 * not for long in comparison to a transaction; where that means to wait for a disk
 * or a standby, it is worth more.
 */
static void
gather(ReceiverWriter *writer)
{
	int64_t		now_us = receiver_now_us();
	int64_t		wait_us = writer->last_us / GATHER_SHARE;
	int64_t		until_us = now_us + (wait_us < writer->config->batch_wait_us ? wait_us : writer->config->batch_wait_us);
	struct pollfd fd = {receiver_queue_fd(writer->queue), POLLIN, 0};
	int			depth = receiver_queue_depth(writer->queue);
	int			enough = depth + writer->last_n;

	if (writer->last_n < GATHER_FROM)
		return;
	if (enough > writer->config->batch_events)
		enough = (int) writer->config->batch_events;
	for (; depth < enough && now_us < until_us; now_us = receiver_now_us())
	{
		int64_t		quiet_us = until_us - now_us < QUIET_US ? until_us - now_us : QUIET_US;
		const struct timespec quiet = {0, quiet_us * 1000};
		int			before = depth;

		if (receiver_queue_prepare_wait(writer->queue, enough))
			ppoll(&fd, 1, &quiet, NULL);
		receiver_queue_end_wait(writer->queue);
		depth = receiver_queue_depth(writer->queue);
		if (depth == before)
			break;
	}
}

static void
take_and_deliver(ReceiverWriter *writer)
{
	int64_t		start_us;
	int			n;

	gather(writer);
	n = receiver_queue_take(writer->queue, writer->events, (int) writer->config->batch_events,
							MAX_BATCH_BYTES);
	if (n == 0)
		return;
	start_us = receiver_now_us();
	deliver(writer, writer->events, n, start_us + writer->config->batch_timeout_us);
	writer->last_n = n;
	writer->last_us = receiver_now_us() - start_us;
	if (writer->database.conn == NULL)
		go_down(writer, "lost the database", "the outcome of a batch is unknown");
	else if (writer->suspect)
		go_down(writer, "the database does not work, SQLSTATE", writer->database.sqlstate);
}

static void *
writer_main(void *arg)
{
	ReceiverWriter *writer = arg;

	while (!atomic_load(&writer->stopping))
	{
		if (writer->database.conn == NULL)
			reconnect(writer);
		else if (receiver_queue_depth(writer->queue) == 0)
			idle(writer);
		else if (!receiver_database_is_alive(&writer->database))
			go_down(writer, "lost the database", writer->database.trouble);
		else
			take_and_deliver(writer);
	}
	receiver_database_close(&writer->database);
	return NULL;
}

ReceiverWriter *
receiver_writer_start(const ReceiverConfig *config, ReceiverQueue *queue)
{
	ReceiverWriter *writer = calloc(1, sizeof(ReceiverWriter));

	if (writer == NULL)
		return NULL;
	writer->config = config;
	writer->queue = queue;
	writer->database.abandon = &writer->abandon;
	writer->backoff_us = FIRST_BACKOFF_US;
	atomic_init(&writer->down_since_us, receiver_now_us());
	writer->events = calloc((size_t) config->batch_events, sizeof(ReceiverEvent *));
	if (writer->events == NULL || pthread_create(&writer->thread, NULL, writer_main, writer) != 0)
	{
		free(writer->events);
		free(writer);
		return NULL;
	}
	return writer;
}

bool
receiver_writer_is_up(ReceiverWriter *writer)
{
	return atomic_load(&writer->down_since_us) == 0;
}

int64_t
receiver_writer_down_since_us(ReceiverWriter *writer)
{
	return atomic_load(&writer->down_since_us);
}

bool
receiver_writer_stop(ReceiverWriter *writer, bool abandon)
{
	struct timespec until;

	atomic_store(&writer->abandon, abandon);
	atomic_store(&writer->stopping, true);
	receiver_queue_wake(writer->queue);
	/* A name server that does not answer can hold libpq for a long time. */
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += STOP_TIMEOUT_S;
	return pthread_timedjoin_np(writer->thread, NULL, &until) == 0;
}

void
receiver_writer_free(ReceiverWriter *writer)
{
	receiver_batch_free(&writer->database.batch);
	free(writer->events);
	free(writer);
}

bool
receiver_writer_check(const ReceiverConfig *config)
{
	atomic_bool abandon = false;
	ReceiverDatabase database = {.abandon = &abandon};
	bool		ok = receiver_database_connect(&database, config->database, config->batch_timeout_us);

	if (ok)
		printf("ok: database \"%s\", server %s, sentdm_receive_webhooks() can be called\n",
			   PQdb(database.conn), PQparameterStatus(database.conn, "server_version"));
	else
		printf("failed: %s\n", database.trouble);
	receiver_database_close(&database);
	receiver_batch_free(&database.batch);
	return ok;
}
