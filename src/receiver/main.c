/*
 * main.c
 *		sentdm-receiver: HTTP in, batches out.
 *
 * starting -> serving -> draining -> stopped.  The main thread does nothing but
 * look at the clock: it shuts slow connections, answers events that waited too
 * long, and tells the service manager that all is well.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <poll.h>
#include <unistd.h>

#include "clock.h"
#include "connection.h"
#include "database.h"
#include "health.h"
#include "listener.h"
#include "log.h"
#include "systemd.h"
#include "writer.h"

#define TICK_MS 50
#define ANSWERS_OUT_US 500000
#define SPARE_DESCRIPTORS 200	/* database, log, epoll, health, ... */

typedef struct Receiver
{
	ReceiverConfig config;
	ReceiverQueue *queue;
	ReceiverWriter *writer;
	int			signal_fd;
	int			webhook_fd;
	bool		own_socket;		/* and not the service manager's */
	int			health_fd;
	int64_t		watchdog_us;
	int64_t		next_watchdog_us;
	bool		was_up;			/* what the service manager was told last */
} Receiver;

/* Each connection is a descriptor; failing to accept is worse than refusing to start. */
static bool
raise_descriptor_limit(const ReceiverConfig *config)
{
	struct rlimit limit;
	rlim_t		needed = (rlim_t) config->max_connections + SPARE_DESCRIPTORS;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= needed)
		return true;
	limit.rlim_cur = limit.rlim_max == RLIM_INFINITY || limit.rlim_max > needed ? needed : limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur >= needed)
		return true;
	receiver_log(RECEIVER_ERROR, "%lld connections need %lld descriptors, and only %lld are allowed"
				 " (ulimit -n, LimitNOFILE=)", (long long) config->max_connections,
				 (long long) needed, (long long) limit.rlim_max);
	return false;
}

/* All threads inherit the mask, so signals come to the main thread's descriptor only. */
static bool
take_signals(Receiver *receiver)
{
	sigset_t	set;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	receiver->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return receiver->signal_fd >= 0;
}

static bool
asked_to_stop(Receiver *receiver, int wait_ms)
{
	struct pollfd fd = {receiver->signal_fd, POLLIN, 0};
	struct signalfd_siginfo info;

	return poll(&fd, 1, wait_ms) > 0 && read(receiver->signal_fd, &info, sizeof(info)) == sizeof(info);
}

static bool
open_sockets(Receiver *receiver)
{
	receiver->webhook_fd = receiver_systemd_socket();
	receiver->own_socket = receiver->webhook_fd < 0;
	if (receiver->own_socket)
		receiver->webhook_fd = receiver_socket_listen(receiver->config.listen);
	receiver->health_fd = receiver_socket_listen(receiver->config.health_listen);
	return receiver->webhook_fd >= 0 && receiver->health_fd >= 0;
}

static bool
start(Receiver *receiver)
{
	const ReceiverConfig *config = &receiver->config;

	receiver->queue = receiver_queue_create((int) config->queue_events, (size_t) config->queue_bytes);
	if (receiver->queue == NULL ||
		!receiver_connections_init((int) config->max_connections_per_address,
								   config->proxies, config->n_proxies))
		return false;
	receiver->writer = receiver_writer_start(config, receiver->queue);
	return receiver->writer != NULL &&
		receiver_health_start(receiver->health_fd, receiver->queue, receiver->writer) &&
		receiver_listener_start(config, receiver->queue, receiver->webhook_fd, receiver->own_socket);
}

static void
announce(Receiver *receiver)
{
	char		webhook[128];
	char		health[128];

	receiver_socket_describe(receiver->webhook_fd, webhook, sizeof(webhook));
	receiver_socket_describe(receiver->health_fd, health, sizeof(health));
	receiver_log(RECEIVER_INFO, "sentdm-receiver %s listens on %s%s, health on %s",
				 SENTDM_VERSION, webhook, receiver->config.path, health);
	/* Ready also without a database: it can answer, and systemd must not restart it. */
	receiver_systemd_notify("READY=1\nSTATUS=connecting to the database");
}

static void
tell_manager(Receiver *receiver, int64_t now_us)
{
	bool		up = receiver_writer_is_up(receiver->writer);

	if (up != receiver->was_up)
	{
		receiver_systemd_notify(up ? "STATUS=receiving" : "STATUS=waiting for the database");
		receiver->was_up = up;
	}
	if (receiver->watchdog_us > 0 && now_us >= receiver->next_watchdog_us)
	{
		receiver->next_watchdog_us = now_us + receiver->watchdog_us / 3;
		receiver_systemd_notify("WATCHDOG=1");
	}
}

/* What is to be done now and then. */
static void
tick(Receiver *receiver)
{
	int64_t		now_us = receiver_now_us();
	int64_t		down_since_us = receiver_writer_down_since_us(receiver->writer);

	receiver_connections_reap(now_us);
	receiver_queue_expire(receiver->queue, now_us,
						  down_since_us == 0 ? RECEIVER_DATABASE_SLOW : RECEIVER_DATABASE_DOWN);
	/*
	 * A restart of the server is waited for.  But when it takes longer than anybody
	 * waits for an answer, nobody is made to wait: the sender tries again.
	 */
	if (down_since_us != 0 && now_us - down_since_us > receiver->config.answer_timeout_us)
		receiver_queue_block(receiver->queue, RECEIVER_DATABASE_DOWN);
	tell_manager(receiver, now_us);
}

static void
serve(Receiver *receiver)
{
	while (!asked_to_stop(receiver, TICK_MS))
		tick(receiver);
}

/* Finish what was begun.  False: not in time, or asked a second time. */
static bool
drain(Receiver *receiver)
{
	int64_t		until_us = receiver_now_us() + receiver->config.drain_timeout_us;

	receiver_log(RECEIVER_INFO, "stopping: %d requests under way, %d events wait",
				 receiver_listener_requests(), receiver_queue_depth(receiver->queue));
	receiver_systemd_notify("STOPPING=1\nSTATUS=finishing what was begun");
	receiver_health_set_stopping();
	receiver_listener_quiesce();
	while (receiver_listener_requests() > 0)
	{
		if (receiver_now_us() >= until_us || asked_to_stop(receiver, TICK_MS / 5))
			return false;
		tick(receiver);
	}
	return true;
}

/* Let answers that are given already be sent. */
static void
let_answers_out(void)
{
	int64_t		until_us = receiver_now_us() + ANSWERS_OUT_US;

	while (receiver_listener_requests() > 0 && receiver_now_us() < until_us)
		poll(NULL, 0, 5);
}

/* The order matters: all events must be answered before libmicrohttpd is stopped. */
static bool
stop(Receiver *receiver, bool drained)
{
	receiver_queue_close(receiver->queue);
	if (!receiver_writer_stop(receiver->writer, !drained))
	{
		receiver_log(RECEIVER_WARNING, "stopped without waiting for the database");
		receiver_log_stop();
		return false;
	}
	let_answers_out();
	receiver_listener_stop();
	receiver_health_stop();
	receiver_writer_free(receiver->writer);
	receiver_queue_destroy(receiver->queue);
	receiver_connections_free();
	close(receiver->signal_fd);
	receiver_log(RECEIVER_INFO, drained ? "stopped" : "stopped before all was done");
	receiver_log_stop();
	return true;
}

static int
run(Receiver *receiver)
{
	if (!raise_descriptor_limit(&receiver->config) || !take_signals(receiver) || !open_sockets(receiver))
		return EXIT_FAILURE;
	receiver_log_start();
	if (!start(receiver))
	{
		receiver_log(RECEIVER_ERROR, "cannot start: out of memory, threads or descriptors");
		receiver_log_stop();
		return EXIT_FAILURE;
	}
	receiver->watchdog_us = receiver_systemd_watchdog_us();
	announce(receiver);
	serve(receiver);
	if (!stop(receiver, drain(receiver)))
		_exit(EXIT_SUCCESS);	/* a thread still uses what exit() would free */
	return EXIT_SUCCESS;
}

static int
check(Receiver *receiver)
{
	bool		ok = raise_descriptor_limit(&receiver->config) && open_sockets(receiver);

	printf(ok ? "ok: settings and addresses\n" : "failed: settings or addresses, see above\n");
	return receiver_writer_check(&receiver->config) && ok ? EXIT_SUCCESS : EXIT_FAILURE;
}

int
main(int argc, char **argv)
{
	static Receiver receiver;

	if (!receiver_config_read(&receiver.config, argc, argv))
		return EXIT_FAILURE;
	receiver_database_set_defaults();
	if (receiver.config.help)
		receiver_config_print_help();
	else if (receiver.config.version)
		printf("sentdm-receiver %s\n", SENTDM_VERSION);
	else if (receiver.config.check)
		return check(&receiver);
	else
	{
		srandom((unsigned int) (receiver_now_us() ^ getpid()));
		return run(&receiver);
	}
	return EXIT_SUCCESS;
}
