/*
 * metrics.c
 *		What happened since the start, as numbers without personal data.
 *
 * Counters are atomics, so that counting costs the request path no lock.  Labels
 * are words of ours and the reasons of sentdm_receive_webhooks(), never a part of
 * a request, and the number of reasons is bounded all the same.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "metrics.h"

#define MAX_REASONS 32
#define MAX_BUCKETS 14

typedef struct Reason
{
	int			http_status;
	char		text[64];
	uint64_t	count;
} Reason;

static const struct
{
	const char *name;
	const char *help;
}			counters[RECEIVER_COUNTERS] = {
	[RECEIVER_RECEIVED] = {"requests_received_total", "Webhook requests received whole."},
	[RECEIVER_EVENTS_ACCEPTED] = {"events_accepted_total", "Events stored and committed."},
	[RECEIVER_EVENTS_DUPLICATE] = {"events_duplicate_total", "Authentic events that were stored already."},
	[RECEIVER_CONNECTIONS_ACCEPTED] = {"connections_accepted_total", "Connections accepted."},
	[RECEIVER_CONNECTIONS_REFUSED] = {"connections_refused_total", "Connections refused: too many from one address."},
	[RECEIVER_BATCHES] = {"batches_total", "Batches committed."},
	[RECEIVER_BATCHES_RETRIED] = {"batches_retried_total", "Batches rolled back and tried again, whole or in halves."},
	[RECEIVER_DATABASE_CONNECTS] = {"database_connects_total", "Database connections made."},
	[RECEIVER_DATABASE_FAILURES] = {"database_failures_total", "Database connections failed or lost."},
	[RECEIVER_LOG_LINES_LOST] = {"log_lines_lost_total", "Log lines left out because nobody took them away."},
};

/* Upper bounds, ending with 0; times in microseconds. */
static const struct
{
	const char *name;
	const char *help;
	double		unit;
	int64_t		bounds[MAX_BUCKETS + 1];
}			histograms[RECEIVER_HISTOGRAMS] = {
	[RECEIVER_BATCH_SIZE] = {"batch_events", "Events of a batch.", 1,
	{1, 2, 5, 10, 20, 50, 100, 200, 500, 0}},
	[RECEIVER_BATCH_TIME] = {"batch_seconds", "Time from sending a batch to the confirmed commit.", 1e-6,
	{1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 20000000, 0}},
	[RECEIVER_REQUEST_TIME] = {"request_seconds", "Time from the request line to the answer.", 1e-6,
	{1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 20000000, 0}},
};

static _Atomic uint64_t counts[RECEIVER_COUNTERS];
static _Atomic uint64_t refused[RECEIVER_REFUSALS];
static _Atomic uint64_t observed[RECEIVER_HISTOGRAMS][MAX_BUCKETS + 1];
static _Atomic uint64_t sums[RECEIVER_HISTOGRAMS];
static _Atomic int64_t last_accepted_us;
static _Atomic int64_t last_rejected_us;
static pthread_mutex_t reasons_lock = PTHREAD_MUTEX_INITIALIZER;
static Reason reasons[MAX_REASONS];
static int	n_reasons;

void
receiver_metrics_count(ReceiverCounter counter)
{
	atomic_fetch_add_explicit(&counts[counter], 1, memory_order_relaxed);
}

void
receiver_metrics_observe(ReceiverHistogram histogram, int64_t value)
{
	const int64_t *bounds = histograms[histogram].bounds;
	int			bucket = 0;

	while (bounds[bucket] != 0 && value > bounds[bucket])
		bucket++;
	atomic_fetch_add_explicit(&observed[histogram][bucket], 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&sums[histogram], (uint64_t) value, memory_order_relaxed);
}

void
receiver_metrics_accepted(bool duplicate)
{
	receiver_metrics_count(duplicate ? RECEIVER_EVENTS_DUPLICATE : RECEIVER_EVENTS_ACCEPTED);
	atomic_store_explicit(&last_accepted_us, receiver_now_us(), memory_order_relaxed);
}

void
receiver_metrics_refused(ReceiverRefusal refusal)
{
	atomic_fetch_add_explicit(&refused[refusal], 1, memory_order_relaxed);
}

/* Lock held.  The entry of a reason; the last one is for all that have no room. */
static Reason *
find_reason(int http_status, const char *text)
{
	Reason	   *reason;

	for (int i = 0; i < n_reasons; i++)
	{
		reason = &reasons[i];
		if (reason->http_status == http_status && strcmp(reason->text, text) == 0)
			return reason;
	}
	if (n_reasons == MAX_REASONS)
		return &reasons[MAX_REASONS - 1];
	reason = &reasons[n_reasons++];
	reason->http_status = http_status;
	snprintf(reason->text, sizeof(reason->text), "%s", n_reasons == MAX_REASONS ? "other" : text);
	return reason;
}

void
receiver_metrics_rejected(int http_status, const char *reason)
{
	pthread_mutex_lock(&reasons_lock);
	find_reason(http_status, reason)->count++;
	pthread_mutex_unlock(&reasons_lock);
	atomic_store_explicit(&last_rejected_us, receiver_now_us(), memory_order_relaxed);
}

int64_t
receiver_metrics_last_accepted_us(void)
{
	return atomic_load(&last_accepted_us);
}

int64_t
receiver_metrics_last_rejected_us(void)
{
	return atomic_load(&last_rejected_us);
}

static void
describe(FILE *out, const char *name, const char *type, const char *help)
{
	fprintf(out, "# HELP sentdm_receiver_%s %s\n# TYPE sentdm_receiver_%s %s\n", name, help, name, type);
}

static void
render_counters(FILE *out)
{
	for (int i = 0; i < RECEIVER_COUNTERS; i++)
	{
		describe(out, counters[i].name, "counter", counters[i].help);
		fprintf(out, "sentdm_receiver_%s %llu\n", counters[i].name, (unsigned long long) counts[i]);
	}
}

/* A label's value: printable, with '"' and '\' escaped. */
static void
render_label(FILE *out, const char *text)
{
	for (; *text; text++)
	{
		if (*text == '"' || *text == '\\')
			fputc('\\', out);
		fputc((unsigned char) *text < 0x20 ? ' ' : *text, out);
	}
}

static void
render_refusals(FILE *out)
{
	describe(out, "requests_rejected_total", "counter", "Requests answered with a 4xx or 500 status.");
	for (int i = RECEIVER_NOT_REFUSED + 1; i < RECEIVER_QUEUE_FULL; i++)
		fprintf(out, "sentdm_receiver_requests_rejected_total{status=\"%d\",reason=\"%s\"} %llu\n",
				receiver_refusal_status((ReceiverRefusal) i), receiver_refusal_label((ReceiverRefusal) i),
				(unsigned long long) refused[i]);
	pthread_mutex_lock(&reasons_lock);
	for (int i = 0; i < n_reasons; i++)
	{
		fprintf(out, "sentdm_receiver_requests_rejected_total{status=\"%d\",reason=\"", reasons[i].http_status);
		render_label(out, reasons[i].text);
		fprintf(out, "\"} %llu\n", (unsigned long long) reasons[i].count);
	}
	pthread_mutex_unlock(&reasons_lock);

	describe(out, "requests_unavailable_total", "counter", "Requests answered with 503, to be sent again.");
	for (int i = RECEIVER_QUEUE_FULL; i < RECEIVER_REFUSALS; i++)
		fprintf(out, "sentdm_receiver_requests_unavailable_total{reason=\"%s\"} %llu\n",
				receiver_refusal_label((ReceiverRefusal) i), (unsigned long long) refused[i]);
}

static void
render_histogram(FILE *out, int h)
{
	const char *name = histograms[h].name;
	uint64_t	total = 0;
	int			b;

	describe(out, name, "histogram", histograms[h].help);
	for (b = 0; histograms[h].bounds[b] != 0; b++)
	{
		total += observed[h][b];
		fprintf(out, "sentdm_receiver_%s_bucket{le=\"%g\"} %llu\n", name,
				(double) histograms[h].bounds[b] * histograms[h].unit, (unsigned long long) total);
	}
	total += observed[h][b];
	fprintf(out, "sentdm_receiver_%s_bucket{le=\"+Inf\"} %llu\n", name, (unsigned long long) total);
	fprintf(out, "sentdm_receiver_%s_sum %.9g\n", name, (double) sums[h] * histograms[h].unit);
	fprintf(out, "sentdm_receiver_%s_count %llu\n", name, (unsigned long long) total);
}

static void
render_gauge(FILE *out, const char *name, const char *help, double value)
{
	describe(out, name, "gauge", help);
	fprintf(out, "sentdm_receiver_%s %.9g\n", name, value);
}

char *
receiver_metrics_render(const ReceiverGauges *gauges, size_t *length)
{
	char	   *text = NULL;
	FILE	   *out = open_memstream(&text, length);

	if (out == NULL)
		return NULL;
	render_counters(out);
	render_refusals(out);
	for (int h = 0; h < RECEIVER_HISTOGRAMS; h++)
		render_histogram(out, h);
	render_gauge(out, "queue_depth", "Events that wait for the database.", gauges->queue_depth);
	render_gauge(out, "queue_bytes", "Bytes of bodies held in memory.", (double) gauges->queue_bytes);
	render_gauge(out, "connections", "Connections that are open.", gauges->connections);
	render_gauge(out, "database_up", "1: the database answers.", gauges->database_up);
	render_gauge(out, "stopping", "1: a stop was asked for.", gauges->stopping);
	describe(out, "info", "gauge", "The version of this receiver.");
	fprintf(out, "sentdm_receiver_info{version=\"%s\"} 1\n", SENTDM_VERSION);
	if (fclose(out) != 0)
	{
		free(text);
		return NULL;
	}
	return text;
}
