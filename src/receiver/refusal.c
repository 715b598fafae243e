/*
 * refusal.c
 *		Why the receiver itself, and not the database, refuses a request: the
 *		one table of statuses, labels and texts.
 */
#include "refusal.h"

static const struct
{
	int			status;
	const char *label;
	const char *text;
}			refusals[RECEIVER_REFUSALS] = {
	[RECEIVER_NOT_REFUSED] = {200, "none", ""},
	[RECEIVER_NOT_FOUND] = {404, "not_found", "not found"},
	[RECEIVER_METHOD] = {405, "method", "only POST is possible here"},
	[RECEIVER_NO_LENGTH] = {411, "no_length", "a Content-Length is required"},
	[RECEIVER_BODY_TOO_LARGE] = {413, "body_too_large", "the body is too large"},
	[RECEIVER_CONTENT_TYPE] = {415, "content_type", "the body must be application/json"},
	[RECEIVER_HEADERS_TOO_LARGE] = {431, "headers_too_large", "the headers are too large"},
	[RECEIVER_HEADER_NOT_UTF8] = {400, "header_not_utf8", "a webhook header is not UTF-8"},
	[RECEIVER_HEADER_REPEATED] = {400, "header_repeated", "a header is there more than once"},
	[RECEIVER_NOT_STORABLE] = {400, "not_storable", "the database cannot represent the headers"},
	[RECEIVER_TOO_SLOW] = {408, "too_slow", "the request took too long to arrive"},
	[RECEIVER_TOO_MANY] = {429, "too_many", "too many requests at once from this address"},
	[RECEIVER_QUEUE_FULL] = {503, "queue_full", "too many events are waiting"},
	[RECEIVER_NO_MEMORY] = {503, "no_memory", "too many bytes are waiting"},
	[RECEIVER_STOPPING] = {503, "stopping", "the receiver is stopping"},
	[RECEIVER_DATABASE_DOWN] = {503, "database_down", "the database cannot be reached"},
	[RECEIVER_DATABASE_ERROR] = {503, "database_error", "the database refused to store it"},
	[RECEIVER_DATABASE_SLOW] = {503, "database_slow", "the database did not answer in time"},
	[RECEIVER_OUTCOME_UNKNOWN] = {503, "outcome_unknown", "the database did not confirm it"},
};

int
receiver_refusal_status(ReceiverRefusal refusal)
{
	return refusals[refusal].status;
}

const char *
receiver_refusal_label(ReceiverRefusal refusal)
{
	return refusals[refusal].label;
}

const char *
receiver_refusal_text(ReceiverRefusal refusal)
{
	return refusals[refusal].text;
}
