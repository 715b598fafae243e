/*
 * api.c
 *		sentdm_api(): one synchronous call of the API from a session.
 *
 * For an operator who asks something, not for sending: messages go through the
 * queue.  The call counts for the rate that the worker keeps to, but never waits
 * for it.  It can be cancelled at any moment; the API's own words stay out of
 * errors, because they may quote a number.
 */
#include "postgres.h"

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"

#include "account.h"
#include "answer.h"
#include "compat.h"
#include "credentials.h"
#include "http.h"
#include "sentdm.h"

PG_FUNCTION_INFO_V1(sentdm_api);

#define LARGEST_ANSWER (16 * 1024 * 1024)

static const char *const methods[] = {"GET", "POST", "PUT", "PATCH", "DELETE"};

/* A call under way; released whatever happens. */
typedef struct Call
{
	SentdmHttp *http;
	WaitEventSet *events;
	SentdmHttpResult *result;
} Call;

static void
check_arguments(const char *method, const char *path)
{
	bool		known = false;

	for (int i = 0; i < lengthof(methods); i++)
		known = known || strcmp(method, methods[i]) == 0;
	if (!known)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"method\" is unknown"),
				 errhint("Use GET, POST, PUT, PATCH or DELETE.")));
	if (path[0] != '/' || strstr(path, "..") != NULL || strlen(path) > 2000 ||
		strspn(path, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:@/?%") != strlen(path))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"path\" is not an absolute path of a URL"),
				 errhint("Write for example /v3/templates?page=1&page_size=100, other characters encoded as %%XX.")));
	if (strcmp(method, "POST") == 0 && strcmp(path, "/v3/messages") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("messages cannot be sent with sentdm_api()"),
				 errhint("Use sentdm_send(), which sends exactly once.")));
}

static void
open_call(Call *call)
{
	SentdmHttpOptions options;
	const char *trouble = sentdm_http_check_url(sentdm_base_url, sentdm_allow_insecure_http);

	if (trouble != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("the API cannot be called: %s", trouble)));
	options.base_url = sentdm_base_url;
	options.ca_file = sentdm_ca_file;
	options.user_agent = "sentdm/" SENTDM_VERSION " PostgreSQL/" PG_MAJORVERSION;
	options.insecure_http = sentdm_allow_insecure_http;
	options.max_in_flight = 1;
	options.connect_timeout_ms = sentdm_connect_timeout_ms;
	options.request_timeout_ms = sentdm_request_timeout_ms;
	call->http = sentdm_http_create(&options);
	if (call->http == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not initialize the HTTP client")));
	call->events = SentdmCreateWaitEventSet(3);
	AddWaitEventToSet(call->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(call->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(call->events, WL_SOCKET_READABLE, sentdm_http_fd(call->http), NULL, NULL);
}

static void
close_call(Call *call)
{
	sentdm_http_free_result(call->result);
	if (call->events != NULL)
		FreeWaitEventSet(call->events);
	sentdm_http_destroy(call->http);
}

static void
submit(Call *call, const char *method, const char *path, const char *body, const char *profile_id)
{
	SentdmHttpRequest request;
	char		key[SENTDM_MAX_KEY];
	const char *trouble = sentdm_read_api_key(key);
	bool		submitted;

	if (trouble != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION),
				 errmsg("the API cannot be called: %s", trouble),
				 errhint("Set sentdm.api_key_file and reload the configuration.")));
	memset(&request, 0, sizeof(request));
	request.method = method;
	request.path = path;
	request.api_key = key;
	request.profile_id = profile_id;
	request.body = body;
	request.body_length = body ? strlen(body) : 0;
	request.max_answer = LARGEST_ANSWER;
	request.deadline_unix_us = INT64_MAX;
	submitted = sentdm_http_submit(call->http, &request);
	if (submitted)
		sentdm_account_count_call(key);
	explicit_bzero(key, sizeof(key));
	if (!submitted)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not start the request")));
}

static void
wait_for_result(Call *call)
{
	for (;;)
	{
		WaitEvent	event;

		CHECK_FOR_INTERRUPTS();
		sentdm_http_run(call->http);
		call->result = sentdm_http_next_result(call->http);
		if (call->result != NULL)
			return;
		(void) WaitEventSetWait(call->events, -1, &event, 1, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}

/* The class of an answer as an SQLSTATE. */
static int
sqlstate_of(int http_status)
{
	switch (http_status)
	{
		case 401:
		case 403:
			return ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION;
		case 400:
		case 422:
			return ERRCODE_INVALID_PARAMETER_VALUE;
		case 404:
			return ERRCODE_NO_DATA;
		case 409:
			return ERRCODE_OBJECT_IN_USE;
		case 429:
			return ERRCODE_CONFIGURATION_LIMIT_EXCEEDED;
		default:
			return http_status >= 500 ? ERRCODE_CONNECTION_FAILURE : ERRCODE_PROTOCOL_VIOLATION;
	}
}

static void
check_result(const SentdmHttpResult *result)
{
	SentdmAnswer answer;

	if (result->transport != SENTDM_ANSWERED)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("the API did not answer"),
				 result->trouble ? errdetail("%s.", result->trouble) : 0));
	sentdm_answer_parse(result->body, result->body_length, &answer);
	if (result->http_status >= 200 && result->http_status < 300 &&
		(answer.success || result->body_length == 0))
		return;
	ereport(ERROR,
			(errcode(sqlstate_of(result->http_status)),
			 errmsg("the API refused the call with status %d", result->http_status),
			 errdetail("Code %s, request %s.",
					   answer.error_code[0] ? answer.error_code : "unknown",
					   answer.request_id[0] ? answer.request_id : "unknown")));
}

/* The "data" of the envelope; NULL when there is none. */
static Datum
data_of(const SentdmHttpResult *result, bool *isnull)
{
	char	   *text = pg_any_to_server(result->body, (int) result->body_length, PG_UTF8);
	Jsonb	   *envelope;
	JsonbValue	key;
	JsonbValue *data;

	*isnull = true;
	if (result->body_length == 0)
		return (Datum) 0;
	envelope = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(text)));
	key.type = jbvString;
	key.val.string.val = "data";
	key.val.string.len = 4;
	data = findJsonbValueFromContainer(&envelope->root, JB_FOBJECT, &key);
	if (data == NULL || data->type == jbvNull)
		return (Datum) 0;
	*isnull = false;
	return JsonbPGetDatum(JsonbValueToJsonb(data));
}

/* sentdm_api(method text, path text, body jsonb [, profile_id uuid]) returns jsonb */
Datum
sentdm_api(PG_FUNCTION_ARGS)
{
	char	   *method;
	char	   *path;
	char	   *body = NULL;
	char	   *profile_id = NULL;
	Datum		data = (Datum) 0;
	bool		isnull = true;
	Call		call;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		PG_RETURN_NULL();
	method = text_to_cstring(PG_GETARG_TEXT_PP(0));
	path = text_to_cstring(PG_GETARG_TEXT_PP(1));
	check_arguments(method, path);
	if (!PG_ARGISNULL(2))
	{
		Jsonb	   *json = PG_GETARG_JSONB_P(2);

		body = JsonbToCString(NULL, &json->root, VARSIZE(json));
		body = pg_server_to_any(body, (int) strlen(body), PG_UTF8);
	}

	if (PG_NARGS() > 3 && !PG_ARGISNULL(3))
		profile_id = DatumGetCString(DirectFunctionCall1(uuid_out, PG_GETARG_DATUM(3)));

	memset(&call, 0, sizeof(call));
	PG_TRY();
	{
		open_call(&call);
		submit(&call, method, path, body, profile_id);
		wait_for_result(&call);
		check_result(call.result);
		data = data_of(call.result, &isnull);
	}
	PG_FINALLY();
	{
		close_call(&call);
	}
	PG_END_TRY();
	if (isnull)
		PG_RETURN_NULL();
	return data;
}
