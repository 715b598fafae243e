/*
 * config.h
 *		What the receiver was told: flags, environment, defaults.
 */
#ifndef RECEIVER_CONFIG_H
#define RECEIVER_CONFIG_H

#include "address.h"

#define RECEIVER_MAX_PROXIES 32

typedef struct ReceiverConfig
{
	bool		help;
	bool		version;
	bool		check;

	const char *listen;
	const char *health_listen;
	const char *path;
	const char *database;		/* connection string; "": libpq's variables */
	const char *trusted_proxies;
	const char *access_log;
	bool		log_requests;
	ReceiverNetwork proxies[RECEIVER_MAX_PROXIES];
	int			n_proxies;

	int64_t		threads;
	int64_t		max_connections;
	int64_t		max_connections_per_address;
	int64_t		max_body;		/* bytes */
	int64_t		max_headers;	/* bytes */
	int64_t		queue_events;
	int64_t		queue_bytes;
	int64_t		batch_events;
	int64_t		batch_wait_us;
	int64_t		request_timeout_us;
	int64_t		idle_timeout_us;
	int64_t		answer_timeout_us;
	int64_t		drain_timeout_us;

	/* The two parts of answer_timeout. */
	int64_t		queue_timeout_us;	/* until a batch is begun */
	int64_t		batch_timeout_us;	/* from then */
} ReceiverConfig;

/* False: something is wrong, and standard error says what. */
extern bool receiver_config_read(ReceiverConfig *config, int argc, char **argv);
extern void receiver_config_print_help(void);

#endif							/* RECEIVER_CONFIG_H */
