/*
 * queue.c
 *		Events that wait for the database, bounded in number and in bytes.
 *
 * HTTP threads put events in, one writer takes them out, oldest first.  Must never
 * call answered() with the lock held: the answer goes into another library.
 */
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "queue.h"

struct ReceiverQueue
{
	pthread_mutex_t lock;
	ReceiverEvent *first;
	ReceiverEvent *last;
	int			count;
	int			max_events;
	int			enough;			/* events that the waiting writer wants; INT_MAX: it does not wait */
	ReceiverRefusal blocked;
	bool		closed;
	int			wake_fd;
	size_t		max_bytes;
	_Atomic size_t bytes;
};

ReceiverQueue *
receiver_queue_create(int max_events, size_t max_bytes)
{
	ReceiverQueue *queue = calloc(1, sizeof(ReceiverQueue));

	if (queue == NULL)
		return NULL;
	queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->wake_fd < 0)
	{
		free(queue);
		return NULL;
	}
	pthread_mutex_init(&queue->lock, NULL);
	queue->max_events = max_events;
	queue->max_bytes = max_bytes;
	queue->enough = INT_MAX;
	return queue;
}

void
receiver_queue_destroy(ReceiverQueue *queue)
{
	close(queue->wake_fd);
	pthread_mutex_destroy(&queue->lock);
	free(queue);
}

bool
receiver_queue_reserve(ReceiverQueue *queue, size_t bytes)
{
	size_t		before = atomic_fetch_add(&queue->bytes, bytes);

	if (before + bytes <= queue->max_bytes)
		return true;
	atomic_fetch_sub(&queue->bytes, bytes);
	return false;
}

void
receiver_queue_release(ReceiverQueue *queue, size_t bytes)
{
	atomic_fetch_sub(&queue->bytes, bytes);
}

/* Lock held.  May this event come in? */
static ReceiverRefusal
admit(const ReceiverQueue *queue)
{
	if (queue->closed)
		return RECEIVER_STOPPING;
	if (queue->blocked != RECEIVER_NOT_REFUSED)
		return queue->blocked;
	if (queue->count >= queue->max_events)
		return RECEIVER_QUEUE_FULL;
	return RECEIVER_NOT_REFUSED;
}

ReceiverRefusal
receiver_queue_put(ReceiverQueue *queue, ReceiverEvent *event)
{
	ReceiverRefusal refusal;
	bool		wake = false;

	pthread_mutex_lock(&queue->lock);
	refusal = admit(queue);
	if (refusal == RECEIVER_NOT_REFUSED)
	{
		event->next = NULL;
		if (queue->last != NULL)
			queue->last->next = event;
		else
			queue->first = event;
		queue->last = event;
		queue->count++;
		wake = queue->count >= queue->enough;
		if (wake)
			queue->enough = INT_MAX;
	}
	pthread_mutex_unlock(&queue->lock);
	if (wake)
		receiver_queue_wake(queue);
	return refusal;
}

/* Lock held, and not empty. */
static ReceiverEvent *
shift(ReceiverQueue *queue)
{
	ReceiverEvent *event = queue->first;

	queue->first = event->next;
	if (queue->first == NULL)
		queue->last = NULL;
	queue->count--;
	event->next = NULL;
	return event;
}

int
receiver_queue_take(ReceiverQueue *queue, ReceiverEvent **events, int max, size_t max_bytes)
{
	size_t		bytes = 0;
	int			n = 0;

	pthread_mutex_lock(&queue->lock);
	while (n < max && queue->first != NULL)
	{
		bytes += queue->first->body_length + queue->first->headers_length;
		if (n > 0 && bytes > max_bytes)
			break;
		events[n++] = shift(queue);
	}
	pthread_mutex_unlock(&queue->lock);
	return n;
}

static void
refuse_all(ReceiverEvent *event, ReceiverRefusal refusal)
{
	while (event != NULL)
	{
		ReceiverEvent *next = event->next;

		receiver_event_refuse(event, refusal);
		event = next;
	}
}

/* All deadlines are equally far away, so the oldest events expire first. */
void
receiver_queue_expire(ReceiverQueue *queue, int64_t now_us, ReceiverRefusal refusal)
{
	ReceiverEvent *expired = NULL;
	ReceiverEvent **end = &expired;

	pthread_mutex_lock(&queue->lock);
	while (queue->first != NULL && queue->first->deadline_us <= now_us)
	{
		*end = shift(queue);
		end = &(*end)->next;
	}
	pthread_mutex_unlock(&queue->lock);
	refuse_all(expired, refusal);
}

void
receiver_queue_close(ReceiverQueue *queue)
{
	ReceiverEvent *rest;

	pthread_mutex_lock(&queue->lock);
	queue->closed = true;
	rest = queue->first;
	queue->first = queue->last = NULL;
	queue->count = 0;
	pthread_mutex_unlock(&queue->lock);
	refuse_all(rest, RECEIVER_STOPPING);
	receiver_queue_wake(queue);
}

void
receiver_queue_block(ReceiverQueue *queue, ReceiverRefusal refusal)
{
	pthread_mutex_lock(&queue->lock);
	queue->blocked = refusal;
	pthread_mutex_unlock(&queue->lock);
}

int
receiver_queue_depth(ReceiverQueue *queue)
{
	int			count;

	pthread_mutex_lock(&queue->lock);
	count = queue->count;
	pthread_mutex_unlock(&queue->lock);
	return count;
}

size_t
receiver_queue_bytes(ReceiverQueue *queue)
{
	return atomic_load(&queue->bytes);
}

bool
receiver_queue_prepare_wait(ReceiverQueue *queue, int enough)
{
	bool		wait;

	pthread_mutex_lock(&queue->lock);
	wait = queue->count < enough;
	if (wait && enough < queue->enough)
		queue->enough = enough;
	pthread_mutex_unlock(&queue->lock);
	return wait;
}

int
receiver_queue_fd(const ReceiverQueue *queue)
{
	return queue->wake_fd;
}

void
receiver_queue_end_wait(ReceiverQueue *queue)
{
	eventfd_t	count;

	pthread_mutex_lock(&queue->lock);
	queue->enough = INT_MAX;
	pthread_mutex_unlock(&queue->lock);
	(void) eventfd_read(queue->wake_fd, &count);
}

void
receiver_queue_wake(ReceiverQueue *queue)
{
	(void) eventfd_write(queue->wake_fd, 1);
}

void
receiver_event_refuse(ReceiverEvent *event, ReceiverRefusal refusal)
{
	event->refusal = refusal;
	event->answered(event);
}
