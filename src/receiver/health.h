/*
 * health.h
 *		/health and /metrics, on an address of their own.
 */
#ifndef RECEIVER_HEALTH_H
#define RECEIVER_HEALTH_H

#include "queue.h"
#include "writer.h"

extern bool receiver_health_start(int fd, ReceiverQueue *queue, ReceiverWriter *writer);

/* A stop was asked for: not ready any longer. */
extern void receiver_health_set_stopping(void);
extern void receiver_health_stop(void);

#endif							/* RECEIVER_HEALTH_H */
