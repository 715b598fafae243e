/*
 * listener.h
 *		Where webhooks come in.
 */
#ifndef RECEIVER_LISTENER_H
#define RECEIVER_LISTENER_H

#include "config.h"
#include "queue.h"

/* Open a listening socket; -1: no, and the log says why. */
extern int	receiver_socket_listen(const char *address);

/* The port and address that it is bound to, as text. */
extern void receiver_socket_describe(int fd, char *text, size_t size);

/*
 * Take requests from the socket; own: nobody else has it.  There is only one
 * listener in a process.
 */
extern bool receiver_listener_start(const ReceiverConfig *config, ReceiverQueue *queue, int fd, bool own);

/* Accept no more connections, and end each with the answer to its request. */
extern void receiver_listener_quiesce(void);

/* Requests that are arriving, waiting or being answered. */
extern int	receiver_listener_requests(void);

/* Close everything.  All events must have been answered. */
extern void receiver_listener_stop(void);

#endif							/* RECEIVER_LISTENER_H */
