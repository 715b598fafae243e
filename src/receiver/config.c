/*
 * config.c
 *		What the receiver was told: flags, environment, defaults.
 *
 * One table is the defaults, the flags, the variables SENTDM_RECEIVER_* and the
 * help.  Must never print a value of --database: there may be a password in it.
 */
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"

#define US_PER_S INT64_C(1000000)
#define LENGTH_OF(array) (sizeof(array) / sizeof((array)[0]))

typedef enum Kind
{
	TEXT,
	COUNT,
	BYTES,
	DURATION
} Kind;

typedef struct Option
{
	const char *name;
	Kind		kind;
	size_t		offset;
	const char *value;			/* default */
	int64_t		min;
	int64_t		max;
	const char *argument;
	const char *help;
} Option;

#define FIELD(name) offsetof(ReceiverConfig, name)

static const Option options[] = {
	{"listen", TEXT, FIELD(listen), "127.0.0.1:8480", 0, 0, "ADDRESS:PORT",
	"where webhooks are received"},
	{"health-listen", TEXT, FIELD(health_listen), "127.0.0.1:8481", 0, 0, "ADDRESS:PORT",
	"where /health and /metrics are"},
	{"path", TEXT, FIELD(path), "/webhooks/sent", 0, 0, "PATH",
	"path of the webhook"},
	{"database", TEXT, FIELD(database), "", 0, 0, "CONNINFO",
	"libpq connection string; else the PG* variables"},
	{"trusted-proxies", TEXT, FIELD(trusted_proxies), "", 0, 0, "NETWORKS",
	"comma-separated; their X-Forwarded-For is believed"},
	{"access-log", TEXT, FIELD(access_log), "on", 0, 0, "on|off",
	"log a line for each request"},
	{"threads", COUNT, FIELD(threads), "2", 1, 64, "N",
	"threads that speak HTTP"},
	{"max-connections", COUNT, FIELD(max_connections), "1024", 1, 100000, "N",
	"connections at once"},
	{"max-connections-per-address", COUNT, FIELD(max_connections_per_address), "256", 1, 100000, "N",
	"of them, from one IPv4 address or IPv6 /64"},
	{"max-body", BYTES, FIELD(max_body), "1MB", 1024, 1 << 20, "BYTES",
	"size of a request's body"},
	{"max-headers", BYTES, FIELD(max_headers), "32kB", 1024, 1 << 20, "BYTES",
	"size of a request's headers"},
	{"queue-events", COUNT, FIELD(queue_events), "10000", 1, 1000000, "N",
	"events that may wait for the database"},
	{"queue-bytes", BYTES, FIELD(queue_bytes), "64MB", 1 << 20, INT64_C(1) << 40, "BYTES",
	"memory for the bodies of requests"},
	{"batch-events", COUNT, FIELD(batch_events), "500", 1, 10000, "N",
	"events in one transaction"},
	{"batch-wait", DURATION, FIELD(batch_wait_us), "5ms", 0, US_PER_S, "TIME",
	"wait for more events, when there were more before"},
	{"request-timeout", DURATION, FIELD(request_timeout_us), "10s", US_PER_S / 10, 600 * US_PER_S, "TIME",
	"time for a request to arrive whole"},
	{"idle-timeout", DURATION, FIELD(idle_timeout_us), "75s", US_PER_S / 10, 3600 * US_PER_S, "TIME",
	"time until the next request on a connection"},
	{"answer-timeout", DURATION, FIELD(answer_timeout_us), "20s", US_PER_S / 10, 600 * US_PER_S, "TIME",
	"time for the database to commit, then 503"},
	{"drain-timeout", DURATION, FIELD(drain_timeout_us), "20s", 0, 600 * US_PER_S, "TIME",
	"time to finish after SIGTERM"},
};

#define N_OPTIONS LENGTH_OF(options)

/* Numbers with a unit, as in postgresql.conf. */
static const struct
{
	Kind		kind;
	const char *name;
	int64_t		factor;
}			units[] = {
	{COUNT, "", 1},
	{BYTES, "", 1}, {BYTES, "B", 1}, {BYTES, "kB", 1024},
	{BYTES, "MB", 1 << 20}, {BYTES, "GB", 1 << 30},
	{DURATION, "", US_PER_S}, {DURATION, "us", 1}, {DURATION, "ms", 1000},
	{DURATION, "s", US_PER_S}, {DURATION, "min", 60 * US_PER_S},
};

static bool
parse_number(Kind kind, const char *text, int64_t *value)
{
	char	   *unit;
	long long	number;

	if (!isdigit((unsigned char) text[0]))
		return false;
	errno = 0;
	number = strtoll(text, &unit, 10);
	if (errno != 0)
		return false;
	while (*unit == ' ')
		unit++;
	for (size_t i = 0; i < LENGTH_OF(units); i++)
	{
		if (units[i].kind == kind && strcmp(units[i].name, unit) == 0)
		{
			if (number > INT64_MAX / units[i].factor)
				return false;
			*value = number * units[i].factor;
			return true;
		}
	}
	return false;
}

/* from: the flag or variable, for the message. */
static bool
set_option(ReceiverConfig *config, const Option *option, const char *value, const char *from)
{
	void	   *field = (char *) config + option->offset;
	int64_t		number;

	if (option->kind == TEXT)
	{
		memcpy(field, &value, sizeof(value));
		return true;
	}
	if (!parse_number(option->kind, value, &number))
	{
		fprintf(stderr, "sentdm-receiver: %s: invalid value \"%s\"\n", from, value);
		return false;
	}
	if (number < option->min || number > option->max)
	{
		fprintf(stderr, "sentdm-receiver: %s: \"%s\" is out of range\n", from, value);
		return false;
	}
	memcpy(field, &number, sizeof(number));
	return true;
}

static void
variable_name(const Option *option, char *name, size_t size)
{
	snprintf(name, size, "SENTDM_RECEIVER_%s", option->name);
	for (char *p = name; *p; p++)
		*p = *p == '-' ? '_' : (char) toupper((unsigned char) *p);
}

static bool
read_defaults_and_environment(ReceiverConfig *config)
{
	for (size_t i = 0; i < N_OPTIONS; i++)
	{
		char		name[64];
		const char *value;

		if (!set_option(config, &options[i], options[i].value, options[i].name))
			return false;
		variable_name(&options[i], name, sizeof(name));
		value = getenv(name);
		if (value != NULL && !set_option(config, &options[i], value, name))
			return false;
	}
	return true;
}

static bool
read_flags(ReceiverConfig *config, int argc, char **argv)
{
	struct option flags[N_OPTIONS + 4] = {{0}};
	int			c;

	for (size_t i = 0; i < N_OPTIONS; i++)
		flags[i] = (struct option) {options[i].name, required_argument, NULL, 256 + (int) i};
	flags[N_OPTIONS] = (struct option) {"help", no_argument, NULL, 'h'};
	flags[N_OPTIONS + 1] = (struct option) {"version", no_argument, NULL, 'V'};
	flags[N_OPTIONS + 2] = (struct option) {"check", no_argument, NULL, 'c'};
	while ((c = getopt_long(argc, argv, "hVc", flags, NULL)) != -1)
	{
		if (c == 'h')
			config->help = true;
		else if (c == 'V')
			config->version = true;
		else if (c == 'c')
			config->check = true;
		else if (c < 256)
		{
			fprintf(stderr, "Try \"sentdm-receiver --help\".\n");
			return false;
		}
		else if (!set_option(config, &options[c - 256], optarg, options[c - 256].name))
			return false;
	}
	if (optind < argc)
	{
		fprintf(stderr, "sentdm-receiver: unexpected argument \"%s\"\n", argv[optind]);
		return false;
	}
	return true;
}

static bool
read_proxies(ReceiverConfig *config)
{
	const char *text = config->trusted_proxies;

	while (*text)
	{
		size_t		length = strcspn(text, ", ");

		if (length > 0)
		{
			if (config->n_proxies == RECEIVER_MAX_PROXIES ||
				!receiver_network_parse(&config->proxies[config->n_proxies++], text, length))
			{
				fprintf(stderr, "sentdm-receiver: trusted-proxies: \"%.*s\" is not a network, or one too many\n",
						(int) length, text);
				return false;
			}
		}
		text += length;
		text += strspn(text, ", ");
	}
	return true;
}

/* What one option says must fit the others. */
static bool
validate(ReceiverConfig *config)
{
	if (config->path[0] != '/' || strpbrk(config->path, "?# ") != NULL)
	{
		fprintf(stderr, "sentdm-receiver: path: \"%s\" is not an absolute path\n", config->path);
		return false;
	}
	if (config->queue_bytes < config->max_body)
	{
		fprintf(stderr, "sentdm-receiver: queue-bytes must not be less than max-body\n");
		return false;
	}
	if (config->threads > config->max_connections)
	{
		fprintf(stderr, "sentdm-receiver: threads must not be more than max-connections\n");
		return false;
	}
	config->batch_timeout_us = config->answer_timeout_us / 4;
	config->queue_timeout_us = config->answer_timeout_us - config->batch_timeout_us;
	config->log_requests = strcmp(config->access_log, "off") != 0;
	if (config->log_requests && strcmp(config->access_log, "on") != 0)
	{
		fprintf(stderr, "sentdm-receiver: access-log: \"%s\" is neither on nor off\n", config->access_log);
		return false;
	}
	return read_proxies(config);
}

bool
receiver_config_read(ReceiverConfig *config, int argc, char **argv)
{
	memset(config, 0, sizeof(*config));
	if (!read_defaults_and_environment(config) || !read_flags(config, argc, argv))
		return false;
	return config->help || config->version || validate(config);
}

void
receiver_config_print_help(void)
{
	printf("sentdm-receiver receives the webhooks of Sent and stores them in a database.\n\n"
		   "Usage: sentdm-receiver [OPTION]...\n\n");
	for (size_t i = 0; i < N_OPTIONS; i++)
	{
		char		flag[64];

		snprintf(flag, sizeof(flag), "--%s=%s", options[i].name, options[i].argument);
		printf("  %-32s %s%s%s%s\n", flag, options[i].help,
			   *options[i].value ? " (" : "", options[i].value, *options[i].value ? ")" : "");
	}
	printf("  %-32s %s\n", "--check", "check the settings and the database, and end");
	printf("  %-32s %s\n", "--help", "show this, and end");
	printf("  %-32s %s\n", "--version", "show the version, and end");
	printf("\nEach option can also be a variable: --queue-events is SENTDM_RECEIVER_QUEUE_EVENTS.\n"
		   "The database is found by libpq's PG* variables, its service file or --database.\n");
}
