/*
 * request_test.c
 *		The error table of the wire contract, row by row, and Retry-After.
 *
 *		cc -I src -o request_test test/unit/request_test.c src/request.c
 */
#include "request.h"
#include "tap.h"

#include <string.h>

#define QUARTER		INT64_C(900000)
#define PERSON		INT64_C(-1)

/* 2026-09-14 16:11:50 UTC, in the middle of a day */
#define NOON		INT64_C(1789402310)
/* from then to a minute past the next midnight */
#define TO_NEXT_DAY	((86400 - NOON % 86400 + 60) * 1000)

typedef enum Body
{
	NONE,						/* no envelope: readable is false */
	FALSE,						/* the envelope says success: false */
	TRUE						/* ... success: true */
} Body;

typedef struct Row
{
	int			status;
	Body		body;
	const char *code;
	SentdmVerdict verdict;
	bool		ambiguous;
	SentdmPause pause;
	int64_t		probe_ms;
} Row;

#define YES true
#define NO false
#define IS_ACCEPTED		SENTDM_ACCEPTED, NO, SENTDM_PAUSE_NONE, PERSON
#define IS_REFUSED		SENTDM_REFUSED, NO, SENTDM_PAUSE_NONE, PERSON
#define IS_REFUSED_ONE	SENTDM_REFUSED_RECIPIENT, NO, SENTDM_PAUSE_NONE, PERSON
#define IS_RETRY(maybe)	SENTDM_RETRY, maybe, SENTDM_PAUSE_NONE, PERSON
#define IS_IN_FLIGHT	SENTDM_IN_FLIGHT, YES, SENTDM_PAUSE_NONE, PERSON
#define IS_LIMITED		SENTDM_RATE_LIMITED, NO, SENTDM_PAUSE_NONE, PERSON
#define IS_PAUSE(kind, probe)	SENTDM_ACCOUNT, NO, SENTDM_PAUSE_##kind, probe

static const Row rows[] = {
	/* success, and what only looks like it */
	{202, TRUE, "", IS_ACCEPTED},
	{200, TRUE, "", IS_ACCEPTED},
	{201, TRUE, "", IS_ACCEPTED},
	{299, TRUE, "VALIDATION_001", IS_ACCEPTED},
	{202, FALSE, "", IS_REFUSED},
	{202, FALSE, "NEVER_HEARD_OF", IS_REFUSED},
	{200, FALSE, "VALIDATION_002", IS_REFUSED_ONE},
	{200, FALSE, "RESOURCE_002", IS_REFUSED},
	{200, FALSE, "BUSINESS_003", IS_PAUSE(BALANCE, QUARTER)},
	{200, FALSE, "AUTH_002", IS_PAUSE(CREDENTIALS, PERSON)},
	{200, FALSE, "BUSINESS_002", IS_LIMITED},
	{200, FALSE, "CONFLICT_001", IS_IN_FLIGHT},
	{200, FALSE, "INTERNAL_001", IS_RETRY(YES)},
	{200, FALSE, "INTERNAL_002", IS_RETRY(YES)},
	{200, FALSE, "INTERNAL_003", IS_RETRY(YES)},
	{200, FALSE, "INTERNAL_004", IS_RETRY(YES)},
	{200, FALSE, "INTERNAL_005", IS_RETRY(YES)},
	{200, FALSE, "SERVICE_001", IS_RETRY(NO)},
	{200, NONE, "", IS_RETRY(YES)},
	{202, NONE, "", IS_RETRY(YES)},
	{204, NONE, "", IS_RETRY(YES)},
	{202, NONE, "VALIDATION_002", IS_RETRY(YES)},	/* a code is nothing without the envelope */

	/* the key and the account */
	{401, FALSE, "AUTH_001", IS_PAUSE(CREDENTIALS, PERSON)},
	{401, FALSE, "AUTH_002", IS_PAUSE(CREDENTIALS, PERSON)},
	{401, FALSE, "AUTH_003", IS_PAUSE(CREDENTIALS, PERSON)},
	{401, FALSE, "VALIDATION_001", IS_PAUSE(CREDENTIALS, PERSON)},
	{401, FALSE, "", IS_PAUSE(CREDENTIALS, PERSON)},
	{401, NONE, "", IS_PAUSE(CREDENTIALS, PERSON)},
	{403, FALSE, "AUTH_004", IS_PAUSE(FORBIDDEN, PERSON)},
	{403, FALSE, "AUTH_005", IS_PAUSE(FORBIDDEN, QUARTER)},
	{403, FALSE, "AUTH_006", IS_PAUSE(FORBIDDEN, PERSON)},
	{403, FALSE, "AUTH_007", IS_PAUSE(FORBIDDEN, PERSON)},
	{403, FALSE, "BUSINESS_014", IS_PAUSE(SUSPENDED, PERSON)},
	{403, FALSE, "NEVER_HEARD_OF", IS_PAUSE(FORBIDDEN, PERSON)},
	{403, FALSE, "", IS_PAUSE(FORBIDDEN, PERSON)},
	{403, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{402, FALSE, "", IS_PAUSE(BALANCE, QUARTER)},
	{402, NONE, "", IS_PAUSE(BALANCE, QUARTER)},
	{422, FALSE, "BUSINESS_003", IS_PAUSE(BALANCE, QUARTER)},
	{402, FALSE, "BUSINESS_003", IS_PAUSE(BALANCE, QUARTER)},
	{422, FALSE, "BUSINESS_008", IS_PAUSE(QUOTA, TO_NEXT_DAY)},

	/* one recipient may be the cause */
	{400, FALSE, "VALIDATION_001", IS_REFUSED_ONE},
	{400, FALSE, "VALIDATION_002", IS_REFUSED_ONE},
	{404, FALSE, "RESOURCE_001", IS_REFUSED_ONE},
	{422, FALSE, "BUSINESS_001", IS_REFUSED_ONE},
	{422, FALSE, "BUSINESS_004", IS_REFUSED_ONE},
	{422, FALSE, "BUSINESS_007", IS_REFUSED_ONE},
	{403, FALSE, "BUSINESS_004", IS_REFUSED_ONE},
	{400, FALSE, "ERR_CONSENT_BLOCKED", IS_REFUSED_ONE},
	{422, FALSE, "ERR_ROUTE_DENIED", IS_REFUSED_ONE},
	{403, FALSE, "ERR_ROUTE_DENIED", IS_REFUSED_ONE},
	{422, FALSE, "CONVERSATION_TEMPLATE_REQUIRED", IS_REFUSED_ONE},
	{422, FALSE, "WHATSAPP_TEMPLATE_REQUIRED", IS_REFUSED_ONE},
	{400, FALSE, "NEVER_HEARD_OF", IS_REFUSED_ONE},
	{400, FALSE, "", IS_REFUSED_ONE},
	{422, FALSE, "NEVER_HEARD_OF", IS_REFUSED_ONE},
	{422, FALSE, "", IS_REFUSED_ONE},
	{413, NONE, "", IS_REFUSED_ONE},
	{413, FALSE, "", IS_REFUSED_ONE},

	/* the message itself */
	{400, FALSE, "VALIDATION_003", IS_REFUSED},
	{400, FALSE, "VALIDATION_004", IS_REFUSED},
	{400, FALSE, "VALIDATION_005", IS_REFUSED},
	{400, FALSE, "VALIDATION_006", IS_REFUSED},
	{400, FALSE, "VALIDATION_007", IS_REFUSED},
	{400, FALSE, "VALIDATION_008", IS_REFUSED},
	{404, FALSE, "RESOURCE_002", IS_REFUSED},
	{404, FALSE, "RESOURCE_003", IS_REFUSED},
	{404, FALSE, "RESOURCE_004", IS_REFUSED},
	{404, FALSE, "RESOURCE_005", IS_REFUSED},
	{404, FALSE, "RESOURCE_006", IS_REFUSED},
	{404, FALSE, "RESOURCE_008", IS_REFUSED},
	{404, FALSE, "NEVER_HEARD_OF", IS_REFUSED},
	{409, FALSE, "RESOURCE_007", IS_REFUSED},
	{422, FALSE, "BUSINESS_005", IS_REFUSED},
	{422, FALSE, "BUSINESS_006", IS_REFUSED},
	{422, FALSE, "BUSINESS_012", IS_REFUSED},
	{400, FALSE, "BUSINESS_012", IS_REFUSED},
	{400, FALSE, "BUSINESS_024", IS_REFUSED},
	{422, FALSE, "BUSINESS_029", IS_REFUSED},
	{422, FALSE, "ERR_TEMPLATE_PARAMS_INVALID", IS_REFUSED},
	{405, FALSE, "", IS_REFUSED},
	{411, FALSE, "", IS_REFUSED},
	{415, FALSE, "", IS_REFUSED},
	{418, FALSE, "", IS_REFUSED},
	{499, FALSE, "NEVER_HEARD_OF", IS_REFUSED},

	/* the same key */
	{409, FALSE, "CONFLICT_001", IS_IN_FLIGHT},
	{409, FALSE, "NEVER_HEARD_OF", IS_IN_FLIGHT},
	{409, FALSE, "", IS_IN_FLIGHT},
	{409, NONE, "", IS_IN_FLIGHT},
	{409, FALSE, "CONFLICT_005", IS_REFUSED},
	{422, FALSE, "CONFLICT_005", IS_REFUSED},
	{409, FALSE, "CONFLICT_006", IS_REFUSED},

	/* limits */
	{429, FALSE, "BUSINESS_002", IS_LIMITED},
	{429, FALSE, "NEVER_HEARD_OF", IS_LIMITED},
	{429, FALSE, "VALIDATION_001", IS_LIMITED},
	{429, FALSE, "", IS_LIMITED},
	{429, NONE, "", IS_LIMITED},
	{429, FALSE, "LIMIT_001", IS_RETRY(NO)},
	{429, NONE, "LIMIT_001", IS_LIMITED},
	{422, FALSE, "LIMIT_001", IS_RETRY(NO)},

	/* their side */
	{408, FALSE, "", IS_RETRY(YES)},
	{408, NONE, "", IS_RETRY(YES)},
	{408, FALSE, "VALIDATION_001", IS_RETRY(YES)},
	{500, FALSE, "INTERNAL_001", IS_RETRY(YES)},
	{500, FALSE, "INTERNAL_002", IS_RETRY(YES)},
	{502, FALSE, "INTERNAL_003", IS_RETRY(YES)},
	{504, FALSE, "INTERNAL_004", IS_RETRY(YES)},
	{503, FALSE, "INTERNAL_005", IS_RETRY(YES)},
	{503, FALSE, "SERVICE_001", IS_RETRY(NO)},
	{503, NONE, "SERVICE_001", IS_RETRY(YES)},
	{500, FALSE, "SERVICE_001", IS_RETRY(YES)},
	{503, NONE, "", IS_RETRY(YES)},
	{500, NONE, "", IS_RETRY(YES)},
	{502, NONE, "", IS_RETRY(YES)},
	{504, NONE, "", IS_RETRY(YES)},
	{501, NONE, "", IS_RETRY(YES)},
	{520, NONE, "", IS_RETRY(YES)},
	{599, NONE, "", IS_RETRY(YES)},
	{500, FALSE, "VALIDATION_001", IS_RETRY(YES)},
	{500, FALSE, "AUTH_002", IS_RETRY(YES)},
	{503, FALSE, "BUSINESS_002", IS_RETRY(YES)},

	/* a wrong address, or somebody in between */
	{301, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{302, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{304, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{307, FALSE, "VALIDATION_001", IS_PAUSE(FORBIDDEN, QUARTER)},
	{399, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{404, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{405, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{407, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{410, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{411, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{415, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{421, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{431, NONE, "", IS_PAUSE(FORBIDDEN, QUARTER)},
	{400, NONE, "", IS_RETRY(NO)},
	{406, NONE, "", IS_RETRY(NO)},
	{412, NONE, "", IS_RETRY(NO)},
	{422, NONE, "", IS_RETRY(NO)},
	{451, NONE, "", IS_RETRY(NO)},

	/* no status at all */
	{0, NONE, "", IS_RETRY(YES)},
	{101, NONE, "", IS_RETRY(YES)},
	{600, NONE, "", IS_RETRY(YES)},
	{-1, NONE, "", IS_RETRY(YES)},
};

static SentdmReply
answer(int status, Body body, const char *code)
{
	SentdmReply reply = {
		.transport = SENTDM_ANSWERED,
		.http_status = status,
		.readable = body != NONE,
		.success = body == TRUE,
		.retry_after_ms = -1
	};

	snprintf(reply.error_code, sizeof(reply.error_code), "%s", code);
	return reply;
}

static void
test_rows(void)
{
	static const char *const bodies[] = {"no envelope", "failure", "success"};

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
	{
		const Row  *row = &rows[i];
		SentdmReply reply = answer(row->status, row->body, row->code);
		SentdmJudgement got = sentdm_judge(&reply, NOON);

		ok(got.verdict == row->verdict && got.ambiguous == row->ambiguous &&
		   got.pause == row->pause && got.probe_after_ms == row->probe_ms,
		   "%d, %s, \"%s\"", row->status, bodies[row->body], row->code);
	}
}

static void
test_transport(void)
{
	static const struct
	{
		SentdmTransport transport;
		const char *name;
		SentdmVerdict verdict;
		bool		ambiguous;
		SentdmPause pause;
		int64_t		probe_ms;
	}			cases[] = {
		{SENTDM_NOT_REACHED, "not reached", SENTDM_UNREACHED, NO, SENTDM_PAUSE_NONE, PERSON},
		{SENTDM_BAD_CERTIFICATE, "a bad certificate", IS_PAUSE(CERTIFICATE, 300000)},
		{SENTDM_TOO_LATE, "too late to start", SENTDM_EXPIRED, NO, SENTDM_PAUSE_NONE, PERSON},
		{SENTDM_NO_ANSWER, "sent, but no answer", IS_RETRY(YES)},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		/* even if an earlier interim answer left its status there */
		SentdmReply reply = answer(202, TRUE, "");
		SentdmJudgement got;

		reply.transport = cases[i].transport;
		got = sentdm_judge(&reply, NOON);
		ok(got.verdict == cases[i].verdict && got.ambiguous == cases[i].ambiguous &&
		   got.pause == cases[i].pause && got.probe_after_ms == cases[i].probe_ms,
		   "%s", cases[i].name);
	}
}

static void
test_quota(void)
{
	static const struct
	{
		int64_t		now_unix;
		int64_t		probe_ms;
	}			cases[] = {
		{86400 * 20000 + 43200, INT64_C(43260000)},
		{86400 * 20000 + 86399, 61000},
		{86400 * 20000, 900000},
		{86400 * 20000 + 899, 900000},
		{86400 * 20000 + 900, INT64_C(85560000)},
		{-1, 61000},
	};
	SentdmReply reply = answer(422, FALSE, "BUSINESS_008");

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		ok(sentdm_judge(&reply, cases[i].now_unix).probe_after_ms == cases[i].probe_ms,
		   "a quota used up at %lld is probed after the next midnight, or soon if that was now",
		   (long long) cases[i].now_unix);
}

/* Sun, 06 Nov 1994 08:49:37 GMT */
#define EXAMPLE INT64_C(784111777)

static void
test_retry_after(void)
{
	static const struct
	{
		const char *value;
		int64_t		date;
		int64_t		ms;
	}			cases[] = {
		{"60", 0, 60000},
		{"0", 0, 0},
		{" 5\t", 0, 5000},
		{"1.5", 0, 1500},
		{"0.25", 0, 250},
		{"0.001", 0, 1},
		{"0.0001", 0, 1},
		{"1.0000", 0, 1000},
		{"007", 0, 7000},
		{"86400", 0, INT64_C(86400000)},
		{"86400.0", 0, INT64_C(86400000)},
		{"86400.001", 0, -1},
		{"86401", 0, -1},
		{"99999999999999999999999999999", 0, -1},
		{"-1", 0, -1},
		{"-0", 0, -1},
		{"+1", 0, -1},
		{"1e3", 0, -1},
		{"0x10", 0, -1},
		{"1.", 0, -1},
		{".5", 0, -1},
		{"1.5.1", 0, -1},
		{"1 2", 0, -1},
		{"60s", 0, -1},
		{"", 0, -1},
		{"  ", 0, -1},
		{"soon", EXAMPLE, -1},
		{NULL, EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:49:37 GMT", EXAMPLE - 37, 37000},
		{"Sun, 06 Nov 1994 08:49:37 GMT ", EXAMPLE, 0},
		{"Sun, 06 Nov 1994 08:49:37 GMT", EXAMPLE + 1, -1},
		{"Sun, 06 Nov 1994 08:49:37 GMT", EXAMPLE - 86400, INT64_C(86400000)},
		{"Sun, 06 Nov 1994 08:49:37 GMT", EXAMPLE - 86401, -1},
		{"Sun, 06 Nov 1994 08:49:37 GMT", 0, -1},
		{"Thu, 29 Feb 2024 00:00:00 GMT", INT64_C(1709164790), 10000},
		{"Thu, 29 Feb 2000 00:00:00 GMT", INT64_C(951782390), 10000},
		{"Mon, 29 Feb 2100 00:00:00 GMT", INT64_C(4107542390), -1},
		{"Wed, 29 Feb 2023 00:00:00 GMT", INT64_C(1677628790), -1},
		{"Fri, 31 Dec 1999 23:59:60 GMT", INT64_C(946684790), 10000},
		{"Sat, 01 Jan 2000 00:00:00 GMT", INT64_C(946684790), 10000},
		{"Thu, 01 Jan 1970 00:00:10 GMT", 1, 9000},
		{"Wed, 31 Dec 1969 23:59:59 GMT", 1, -1},
		{"Sun, 00 Nov 1994 08:49:37 GMT", EXAMPLE, -1},
		{"Sun, 31 Nov 1994 08:49:37 GMT", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 24:00:00 GMT", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:60:00 GMT", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:49:61 GMT", EXAMPLE, -1},
		{"Sun, 6 Nov 1994 08:49:37 GMT", EXAMPLE, -1},
		{"sun, 06 nov 1994 08:49:37 GMT", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:49:37 UTC", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:49:37 GMT+1", EXAMPLE, -1},
		{"Sun, 06 Nov 1994 08:49:37", EXAMPLE, -1},
		{"Sun, 06 Nov 94 08:49:37 GMT", EXAMPLE, -1},
		{"Sunday, 06-Nov-94 08:49:37 GMT", EXAMPLE, -1},
		{"Sun Nov  6 08:49:37 1994", EXAMPLE, -1},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
	{
		int64_t		got = sentdm_retry_after_ms(cases[i].value, cases[i].date);

		if (!ok(got == cases[i].ms, "Retry-After: %s%s", cases[i].value ? cases[i].value : "(absent)",
				cases[i].date ? " with a Date" : ""))
			printf("# got %lld, expected %lld\n", (long long) got, (long long) cases[i].ms);
	}
}

/* Every day of 200 years, against a walk through the calendar. */
static void
test_calendar(void)
{
	static const char *const months[] = {
		"Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"
	};
	static const int lengths[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
	int64_t		unix_seconds = 0;
	int			wrong = 0;

	for (int year = 1970; year < 2170; year++)
	{
		bool		leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;

		for (int month = 0; month < 12; month++)
		{
			int			length = lengths[month] + (month == 1 && leap ? 1 : 0);

			for (int day = 1; day <= length; day++)
			{
				char		value[64];

				snprintf(value, sizeof(value), "Mon, %02d %s %04d 12:00:00 GMT", day, months[month], year);
				if (sentdm_retry_after_ms(value, unix_seconds + 43200 - 1) != 1000)
					wrong++;
				unix_seconds += 86400;
			}
		}
	}
	ok(wrong == 0, "every day of two centuries has its place");
}

static void
test_pause_names(void)
{
	static const struct
	{
		SentdmPause pause;
		const char *name;
	}			cases[] = {
		{SENTDM_PAUSE_NONE, "none"},
		{SENTDM_PAUSE_USER, "user"},
		{SENTDM_PAUSE_CREDENTIALS, "credentials"},
		{SENTDM_PAUSE_FORBIDDEN, "forbidden"},
		{SENTDM_PAUSE_SUSPENDED, "suspended"},
		{SENTDM_PAUSE_BALANCE, "balance"},
		{SENTDM_PAUSE_QUOTA, "quota"},
		{SENTDM_PAUSE_CERTIFICATE, "certificate"},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		ok(strcmp(sentdm_pause_name(cases[i].pause), cases[i].name) == 0 &&
		   sentdm_pause_from_name(cases[i].name) == cases[i].pause,
		   "the pause %s has its name, and back", cases[i].name);
	ok(sentdm_pause_from_name("whatever") == SENTDM_PAUSE_USER, "an unknown pause is a person's");
	ok(sentdm_pause_from_name("") == SENTDM_PAUSE_USER, "so is one without a name");
	ok(sentdm_pause_from_name(NULL) == SENTDM_PAUSE_USER, "and one that is NULL");
	ok(strcmp(sentdm_pause_name((SentdmPause) 99), "user") == 0, "an impossible pause has a name");
}

int
main(void)
{
	test_rows();
	test_transport();
	test_quota();
	test_retry_after();
	test_calendar();
	test_pause_names();
	return done_testing();
}
