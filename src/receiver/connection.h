/*
 * connection.h
 *		The connections that are open: how many from where, and until when.
 */
#ifndef RECEIVER_CONNECTION_H
#define RECEIVER_CONNECTION_H

#include "address.h"

typedef struct ReceiverConnection ReceiverConnection;

/* Before the first connection.  False: out of memory. */
extern bool receiver_connections_init(int max_per_address, const ReceiverNetwork *trusted, int n_trusted);

/* After the last one was closed. */
extern void receiver_connections_free(void);

/*
 * A connection was accepted.  NULL: out of memory.  One too many from its address
 * is shut down here, but must be closed like the others.
 */
extern ReceiverConnection *receiver_connection_open(int fd, const struct sockaddr *peer,
													int64_t deadline_us);

/* Before its descriptor is closed. */
extern void receiver_connection_close(ReceiverConnection *connection);

/*
 * What it is doing now must end by then.  False: the time is over already, and the
 * connection is shut down.
 */
extern bool receiver_connection_set_deadline(ReceiverConnection *connection, int64_t deadline_us);

extern const ReceiverAddress *receiver_connection_peer(const ReceiverConnection *connection);
extern bool receiver_connection_is_proxy(const ReceiverConnection *connection);

/* One request at once from an address behind a proxy.  False: it has too many. */
extern bool receiver_address_acquire(const ReceiverAddress *address);
extern void receiver_address_release(const ReceiverAddress *address);

/* Shut down those whose time is over. */
extern void receiver_connections_reap(int64_t now_us);

extern int	receiver_connections_open(void);

#endif							/* RECEIVER_CONNECTION_H */
