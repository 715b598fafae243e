/*
 * sockets.h
 *		Everything that libcurl waits for, behind one pollable descriptor.
 *
 * Pure C, with curl/curl.h included before.
 */
#ifndef SENTDM_SOCKETS_H
#define SENTDM_SOCKETS_H

#include <stdbool.h>

typedef struct SentdmSockets SentdmSockets;

/*
 * For all that this multi handle waits for; it must be cleaned up before its sockets
 * are destroyed.  NULL when out of memory or descriptors.
 */
extern SentdmSockets *sentdm_sockets_create(CURLM *multi);
extern void sentdm_sockets_destroy(SentdmSockets *sockets);

/* Connections of this handle are opened and closed through them; once per handle. */
extern void sentdm_sockets_adopt(SentdmSockets *sockets, CURL *easy);

/* Readable when there is something to serve. */
extern int	sentdm_sockets_fd(const SentdmSockets *sockets);

/*
 * Have libcurl do what it can do now, without waiting; true: there may be more.
 * Then arm the timer, before anybody waits.
 */
extern bool sentdm_sockets_serve(SentdmSockets *sockets);
extern void sentdm_sockets_arm_timer(SentdmSockets *sockets);

#endif							/* SENTDM_SOCKETS_H */
