/*
 * http.h
 *		Many HTTP requests at once behind one pollable descriptor.
 *
 * Pure C over libcurl: nothing in here can throw, so its callbacks cannot
 * either.  Memory is malloc's and is freed by this file only.
 */
#ifndef SENTDM_HTTP_H
#define SENTDM_HTTP_H

#include "request.h"

typedef struct SentdmHttp SentdmHttp;

typedef struct SentdmHttpOptions
{
	const char *base_url;
	const char *ca_file;		/* "" : the system's */
	const char *user_agent;
	bool		insecure_http;	/* http:// allowed, to a loopback address only */
	int			max_in_flight;
	int			connect_timeout_ms;
	int			request_timeout_ms;
} SentdmHttpOptions;

typedef struct SentdmHttpRequest
{
	const char *method;			/* "POST", "GET", ... */
	const char *path;			/* appended to the base URL */
	const char *api_key;
	const char *idempotency_key;	/* or NULL */
	const char *profile_id;		/* or NULL */
	const char *body;			/* or NULL; copied */
	size_t		body_length;
	size_t		max_answer;		/* bytes; a longer answer counts as none */
	int64_t		deadline_unix_us;	/* not to be sent after this time;
									 * INT64_MAX: any */
	void	   *tag;			/* handed back with the result */
} SentdmHttpRequest;

typedef struct SentdmHttpResult
{
	void	   *tag;
	SentdmTransport transport;
	int			http_status;	/* 0: none */
	char	   *body;			/* NUL-terminated; never NULL */
	size_t		body_length;
	char		request_id[80]; /* X-Request-Id, or "" */
	char		retry_after[64];	/* as sent, or "" */
	int64_t		date_unix;		/* Date header; 0: none */
	const char *trouble;		/* static text of the library; NULL: none */
	int64_t		duration_us;
} SentdmHttpResult;

/*
 * Is this base URL usable?  NULL, or a static text that says what is wrong.
 */
extern const char *sentdm_http_check_url(const char *base_url, bool insecure_http);

/* NULL when out of memory or descriptors. */
extern SentdmHttp *sentdm_http_create(const SentdmHttpOptions *options);

/*
 * Start a request; false when out of memory, and then nothing was sent.  It
 * leaves with the next sentdm_http_run(), which must come before any wait.
 */
extern bool sentdm_http_submit(SentdmHttp *http, const SentdmHttpRequest *request);

/* Readable when sentdm_http_run() has something to do. */
extern int	sentdm_http_fd(const SentdmHttp *http);

/* Do what can be done without waiting. */
extern void sentdm_http_run(SentdmHttp *http);

/* The next request that ended; NULL: none.  To be freed by the caller. */
extern SentdmHttpResult *sentdm_http_next_result(SentdmHttp *http);
extern void sentdm_http_free_result(SentdmHttpResult *result);

/* End what is under way; of each there is a result. */
extern void sentdm_http_abort(SentdmHttp *http);

/* Also ends what is under way, and frees the results. */
extern void sentdm_http_destroy(SentdmHttp *http);

#endif							/* SENTDM_HTTP_H */
