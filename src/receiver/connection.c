/*
 * connection.c
 *		The connections that are open: how many from where, and until when.
 *
 * libmicrohttpd knows timeouts of inactivity only, which a client that sends one
 * byte a second never reaches.  So each connection has an absolute deadline for
 * what it is doing, and one whose time is over is shut down from outside: its own
 * thread then sees the end of the stream.  The lock guards the descriptors: one
 * that is in the list is not closed yet, so it cannot be somebody else's.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "clock.h"
#include "connection.h"
#include "metrics.h"

#define BUCKETS 4096
#define EXPIRED (-1)

struct ReceiverConnection
{
	ReceiverConnection *next;
	ReceiverConnection *previous;
	int			fd;
	ReceiverAddress peer;
	bool		is_proxy;
	bool		counted;
	_Atomic int64_t deadline_us;	/* or EXPIRED */
};

/* How many connections, or requests through a proxy, an address has. */
typedef struct Tally
{
	struct Tally *next;
	ReceiverAddress address;
	int			count;
} Tally;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ReceiverConnection *connections;
static int	n_connections;
static Tally **tallies;
static uint64_t seed;
static int	limit;
static const ReceiverNetwork *proxies;
static int	n_proxies;

bool
receiver_connections_init(int max_per_address, const ReceiverNetwork *trusted, int n_trusted)
{
	limit = max_per_address;
	proxies = trusted;
	n_proxies = n_trusted;
	tallies = calloc(BUCKETS, sizeof(Tally *));
	/* Without it, whoever owns many addresses could put them all in one bucket. */
	if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		seed = (uint64_t) receiver_now_us();
	return tallies != NULL;
}

void
receiver_connections_free(void)
{
	free(tallies);
	tallies = NULL;
}

static Tally **
bucket_of(const ReceiverAddress *address)
{
	uint64_t	hash = seed;

	for (size_t i = 0; i < sizeof(address->bytes); i++)
	{
		hash ^= address->bytes[i];
		hash *= UINT64_C(0x9e3779b97f4a7c15);
		hash ^= hash >> 29;
	}
	return &tallies[hash % BUCKETS];
}

/* Lock held. */
static bool
count_up(const ReceiverAddress *address)
{
	Tally	  **bucket = bucket_of(address);
	Tally	   *tally;

	for (tally = *bucket; tally != NULL; tally = tally->next)
	{
		if (memcmp(&tally->address, address, sizeof(*address)) == 0)
			break;
	}
	if (tally == NULL)
	{
		tally = calloc(1, sizeof(Tally));
		if (tally == NULL)
			return false;
		tally->address = *address;
		tally->next = *bucket;
		*bucket = tally;
	}
	if (tally->count >= limit)
		return false;
	tally->count++;
	return true;
}

/* Lock held. */
static void
count_down(const ReceiverAddress *address)
{
	for (Tally **link = bucket_of(address); *link != NULL; link = &(*link)->next)
	{
		Tally	   *tally = *link;

		if (memcmp(&tally->address, address, sizeof(*address)) != 0)
			continue;
		if (--tally->count == 0)
		{
			*link = tally->next;
			free(tally);
		}
		return;
	}
}

/* Lock held. */
static void
link_connection(ReceiverConnection *connection)
{
	connection->next = connections;
	if (connections != NULL)
		connections->previous = connection;
	connections = connection;
	n_connections++;
}

/* Lock held. */
static void
unlink_connection(ReceiverConnection *connection)
{
	if (connection->previous != NULL)
		connection->previous->next = connection->next;
	else
		connections = connection->next;
	if (connection->next != NULL)
		connection->next->previous = connection->previous;
	n_connections--;
}

ReceiverConnection *
receiver_connection_open(int fd, const struct sockaddr *peer, int64_t deadline_us)
{
	ReceiverConnection *connection = calloc(1, sizeof(ReceiverConnection));
	ReceiverAddress group;

	if (connection == NULL)
	{
		shutdown(fd, SHUT_RDWR);
		return NULL;
	}
	connection->fd = fd;
	receiver_address_from_socket(&connection->peer, peer);
	connection->is_proxy = receiver_network_contains(proxies, n_proxies, &connection->peer);
	atomic_init(&connection->deadline_us, deadline_us);
	group = receiver_address_group(&connection->peer);

	pthread_mutex_lock(&lock);
	connection->counted = !connection->is_proxy && count_up(&group);
	link_connection(connection);
	pthread_mutex_unlock(&lock);

	if (!connection->counted && !connection->is_proxy)
	{
		atomic_store(&connection->deadline_us, EXPIRED);
		shutdown(fd, SHUT_RDWR);
		receiver_metrics_count(RECEIVER_CONNECTIONS_REFUSED);
	}
	return connection;
}

void
receiver_connection_close(ReceiverConnection *connection)
{
	ReceiverAddress group = receiver_address_group(&connection->peer);

	pthread_mutex_lock(&lock);
	unlink_connection(connection);
	if (connection->counted)
		count_down(&group);
	pthread_mutex_unlock(&lock);
	free(connection);
}

bool
receiver_connection_set_deadline(ReceiverConnection *connection, int64_t deadline_us)
{
	int64_t		before = atomic_load(&connection->deadline_us);

	do
	{
		if (before == EXPIRED)
			return false;
	} while (!atomic_compare_exchange_weak(&connection->deadline_us, &before, deadline_us));
	return true;
}

const ReceiverAddress *
receiver_connection_peer(const ReceiverConnection *connection)
{
	return &connection->peer;
}

bool
receiver_connection_is_proxy(const ReceiverConnection *connection)
{
	return connection->is_proxy;
}

bool
receiver_address_acquire(const ReceiverAddress *address)
{
	ReceiverAddress group = receiver_address_group(address);
	bool		acquired;

	pthread_mutex_lock(&lock);
	acquired = count_up(&group);
	pthread_mutex_unlock(&lock);
	return acquired;
}

void
receiver_address_release(const ReceiverAddress *address)
{
	ReceiverAddress group = receiver_address_group(address);

	pthread_mutex_lock(&lock);
	count_down(&group);
	pthread_mutex_unlock(&lock);
}

void
receiver_connections_reap(int64_t now_us)
{
	pthread_mutex_lock(&lock);
	for (ReceiverConnection *connection = connections; connection != NULL; connection = connection->next)
	{
		int64_t		deadline_us = atomic_load(&connection->deadline_us);

		/* Whoever changes the deadline first wins: it, or we. */
		if (deadline_us != EXPIRED && deadline_us <= now_us &&
			atomic_compare_exchange_strong(&connection->deadline_us, &deadline_us, EXPIRED))
			shutdown(connection->fd, SHUT_RDWR);
	}
	pthread_mutex_unlock(&lock);
}

int
receiver_connections_open(void)
{
	int			n;

	pthread_mutex_lock(&lock);
	n = n_connections;
	pthread_mutex_unlock(&lock);
	return n;
}
