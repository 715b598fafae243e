/*
 * systemd.h
 *		What systemd gives its services and wants to hear from them.
 */
#ifndef RECEIVER_SYSTEMD_H
#define RECEIVER_SYSTEMD_H

#include <stdint.h>

/* Tell the service manager, if there is one: "READY=1". */
extern void receiver_systemd_notify(const char *state);

/* How often it wants to hear WATCHDOG=1; 0: not at all. */
extern int64_t receiver_systemd_watchdog_us(void);

/* The listening socket that it opened for us; -1: none. */
extern int	receiver_systemd_socket(void);

#endif							/* RECEIVER_SYSTEMD_H */
