/*
 * http_thread.h
 *		The HTTP client of http.h in a thread of its own.
 *
 * Its functions are those of http.h, so see there, with what differs said here.
 * Pure C: nothing in here can throw.  All are for one thread, the caller's.
 */
#ifndef SENTDM_HTTP_THREAD_H
#define SENTDM_HTTP_THREAD_H

#include "http.h"

typedef struct SentdmHttpThread SentdmHttpThread;

/* NULL also when no thread can be started. */
extern SentdmHttpThread *sentdm_http_thread_create(const SentdmHttpOptions *options);

/* Everything in the request is copied.  It leaves after the next run(). */
extern bool sentdm_http_thread_submit(SentdmHttpThread *thread, const SentdmHttpRequest *request);

/* Readable when there are results to take with run(). */
extern int	sentdm_http_thread_fd(const SentdmHttpThread *thread);

/* Hand over what was submitted, and take what ended; waits for nothing. */
extern void sentdm_http_thread_run(SentdmHttpThread *thread);

/* Valid until the next call, which frees it. */
extern const SentdmHttpResult *sentdm_http_thread_next_result(SentdmHttpThread *thread);

/*
 * End the thread.  From then on nothing leaves, and nothing else happens either
 * until it is destroyed.
 */
extern void sentdm_http_thread_stop(SentdmHttpThread *thread);
extern void sentdm_http_thread_destroy(SentdmHttpThread *thread);

#endif							/* SENTDM_HTTP_THREAD_H */
