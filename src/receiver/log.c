/*
 * log.c
 *		Lines on standard error, written by a thread of their own.
 *
 * A reader of the log that stands still must not stop the receipts.  So lines go
 * into one half of a buffer while the other is being written, and when there is no
 * room they are left out and counted; a part is kept for what is not an access line.
 */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "metrics.h"

#define HALF (256 * 1024)		/* bytes */
#define RESERVE (32 * 1024)		/* bytes of it that access lines leave free */
#define MAX_LINE 1024			/* bytes; the rest is cut off */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t filled = PTHREAD_COND_INITIALIZER;
static pthread_t thread;
static bool running;
static bool stopping;
static bool is_journal;
static char halves[2][HALF];
static int	filling;			/* which half */
static size_t used;				/* bytes of it */

static void
write_all(const char *data, size_t length)
{
	while (length > 0)
	{
		ssize_t		n = write(STDERR_FILENO, data, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;				/* there is nobody left to tell */
		data += n;
		length -= (size_t) n;
	}
}

static void *
log_main(void *arg)
{
	(void) arg;
	pthread_mutex_lock(&lock);
	while (!stopping || used > 0)
	{
		const struct timespec pause = {0, 5 * 1000 * 1000};
		size_t		length;
		int			half;

		if (used == 0)
		{
			pthread_cond_wait(&filled, &lock);
			continue;
		}
		/* A few lines more make one system call instead of many. */
		pthread_mutex_unlock(&lock);
		nanosleep(&pause, NULL);
		pthread_mutex_lock(&lock);
		half = filling;
		length = used;
		filling = 1 - filling;
		used = 0;
		pthread_mutex_unlock(&lock);
		write_all(halves[half], length);
		pthread_mutex_lock(&lock);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

bool
receiver_log_start(void)
{
	is_journal = getenv("JOURNAL_STREAM") != NULL;
	stopping = false;
	running = pthread_create(&thread, NULL, log_main, NULL) == 0;
	return running;
}

void
receiver_log_stop(void)
{
	pthread_mutex_lock(&lock);
	stopping = true;
	pthread_cond_signal(&filled);
	pthread_mutex_unlock(&lock);
	if (running)
		pthread_join(thread, NULL);
	pthread_mutex_lock(&lock);
	running = false;
	pthread_mutex_unlock(&lock);
}

/* The journal has the time already, and wants the level as a number. */
static int
format_head(char *line, size_t size, ReceiverLogLevel level)
{
	static const char *const names[] = {"error", "warning", "info"};
	static const int priorities[] = {3, 4, 6};
	static _Thread_local time_t second;
	static _Thread_local char text[32]; /* of that second */
	struct timespec now;
	struct tm	parts;

	if (is_journal)
		return snprintf(line, size, "<%d>", priorities[level]);
	clock_gettime(CLOCK_REALTIME, &now);
	if (now.tv_sec != second)
	{
		gmtime_r(&now.tv_sec, &parts);
		strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &parts);
		second = now.tv_sec;
	}
	return snprintf(line, size, "%s.%03ldZ %s: ", text, now.tv_nsec / 1000000, names[level]);
}

static size_t
format_line(char *line, ReceiverLogLevel level, const char *format, va_list args)
{
	size_t		head = (size_t) format_head(line, MAX_LINE, level);
	int			n = vsnprintf(line + head, MAX_LINE - head - 1, format, args);
	size_t		length = head + (n < 0 ? 0 : (size_t) n);

	if (length > MAX_LINE - 2)
		length = MAX_LINE - 2;
	while (length > head && line[length - 1] == '\n')
		length--;
	for (size_t i = head; i < length; i++)
	{
		if (line[i] == '\n' || line[i] == '\t')
			line[i] = ' ';
		else if ((unsigned char) line[i] < 0x20 || line[i] == 0x7f)
			line[i] = '?';
	}
	line[length++] = '\n';
	return length;
}

static void
put_line(const char *line, size_t length, size_t room)
{
	pthread_mutex_lock(&lock);
	if (!running)
		write_all(line, length);
	else if (used + length > room)
		receiver_metrics_count(RECEIVER_LOG_LINES_LOST);
	else
	{
		memcpy(halves[filling] + used, line, length);
		if (used == 0)
			pthread_cond_signal(&filled);
		used += length;
	}
	pthread_mutex_unlock(&lock);
}

void
receiver_log(ReceiverLogLevel level, const char *format,...)
{
	char		line[MAX_LINE];
	va_list		args;
	size_t		length;

	va_start(args, format);
	length = format_line(line, level, format, args);
	va_end(args);
	put_line(line, length, HALF);
}

void
receiver_log_access(const char *format,...)
{
	char		line[MAX_LINE];
	va_list		args;
	size_t		length;

	va_start(args, format);
	length = format_line(line, RECEIVER_INFO, format, args);
	va_end(args);
	put_line(line, length, HALF - RESERVE);
}
