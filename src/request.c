/*
 * request.c
 *		What an answer of the API means for the message that was POSTed.
 *
 * The error table of the wire contract as two tables: one by error code, one
 * by HTTP status for what has no code or a code that is not known.  It must
 * never need a clock, a locale or memory of its own.  What shaped it: a wrong
 * "refused" throws messages away and a wrong "not ambiguous" sends them twice,
 * so in doubt a row says "again" and "maybe".
 */
#include "request.h"

#include <string.h>

#define MINUTE_MS		INT64_C(60000)
#define DAY_S			INT64_C(86400)

#define PERSON			INT64_C(-1) /* only a person can end the pause */
#define NEXT_UTC_DAY	INT64_C(-2) /* resolved by sentdm_judge */

#define ANY_STATUS		0

/* What follows from one code or status. */
typedef SentdmJudgement Outcome;

#define ACCEPTED		{SENTDM_ACCEPTED, false, SENTDM_PAUSE_NONE, PERSON}
#define REFUSED			{SENTDM_REFUSED, false, SENTDM_PAUSE_NONE, PERSON}
#define REFUSED_ONE		{SENTDM_REFUSED_RECIPIENT, false, SENTDM_PAUSE_NONE, PERSON}
#define LIMITED			{SENTDM_RATE_LIMITED, false, SENTDM_PAUSE_NONE, PERSON}
#define IN_FLIGHT		{SENTDM_IN_FLIGHT, true, SENTDM_PAUSE_NONE, PERSON}
#define RETRY_MAYBE		{SENTDM_RETRY, true, SENTDM_PAUSE_NONE, PERSON}
#define RETRY_CLEAN		{SENTDM_RETRY, false, SENTDM_PAUSE_NONE, PERSON}
#define PAUSE(kind, probe)	{SENTDM_ACCOUNT, false, SENTDM_PAUSE_##kind, (probe)}

typedef struct CodeRule
{
	const char *code;
	int			status;			/* the only status with which it counts; or
								 * ANY_STATUS, see code_decides() */
	Outcome		outcome;
} CodeRule;

static const CodeRule code_rules[] = {
	/* the key and the account */
	{"AUTH_001", ANY_STATUS, PAUSE(CREDENTIALS, PERSON)},
	{"AUTH_002", ANY_STATUS, PAUSE(CREDENTIALS, PERSON)},
	{"AUTH_003", ANY_STATUS, PAUSE(CREDENTIALS, PERSON)},
	{"AUTH_004", ANY_STATUS, PAUSE(FORBIDDEN, PERSON)},
	{"AUTH_005", ANY_STATUS, PAUSE(FORBIDDEN, 15 * MINUTE_MS)}, /* awaits activation */
	{"AUTH_006", ANY_STATUS, PAUSE(FORBIDDEN, PERSON)},
	{"AUTH_007", ANY_STATUS, PAUSE(FORBIDDEN, PERSON)},
	{"BUSINESS_003", ANY_STATUS, PAUSE(BALANCE, 15 * MINUTE_MS)},
	{"BUSINESS_008", ANY_STATUS, PAUSE(QUOTA, NEXT_UTC_DAY)},
	{"BUSINESS_014", ANY_STATUS, PAUSE(SUSPENDED, PERSON)},

	/* limits; LIMIT_001 holds up scheduled messages only */
	{"BUSINESS_002", ANY_STATUS, LIMITED},
	{"LIMIT_001", ANY_STATUS, RETRY_CLEAN},
	{"LIMIT_001", 429, RETRY_CLEAN},

	/* one recipient may be the cause for all */
	{"VALIDATION_001", ANY_STATUS, REFUSED_ONE},
	{"VALIDATION_002", ANY_STATUS, REFUSED_ONE},
	{"RESOURCE_001", ANY_STATUS, REFUSED_ONE},
	{"BUSINESS_001", ANY_STATUS, REFUSED_ONE},
	{"BUSINESS_004", ANY_STATUS, REFUSED_ONE},
	{"BUSINESS_007", ANY_STATUS, REFUSED_ONE},

	/*
	 * Known as reasons in receipts.  The newest contract refuses some of them
	 * at once, without saying with which status.
	 */
	{"ERR_CONSENT_BLOCKED", ANY_STATUS, REFUSED_ONE},
	{"ERR_ROUTE_DENIED", ANY_STATUS, REFUSED_ONE},
	{"CONVERSATION_TEMPLATE_REQUIRED", ANY_STATUS, REFUSED_ONE},
	{"WHATSAPP_TEMPLATE_REQUIRED", ANY_STATUS, REFUSED_ONE},
	{"ERR_TEMPLATE_PARAMS_INVALID", ANY_STATUS, REFUSED},

	/* the message itself */
	{"VALIDATION_003", ANY_STATUS, REFUSED},
	{"VALIDATION_004", ANY_STATUS, REFUSED},
	{"VALIDATION_005", ANY_STATUS, REFUSED},
	{"VALIDATION_006", ANY_STATUS, REFUSED},
	{"VALIDATION_007", ANY_STATUS, REFUSED},
	{"VALIDATION_008", ANY_STATUS, REFUSED},
	{"RESOURCE_002", ANY_STATUS, REFUSED},
	{"RESOURCE_003", ANY_STATUS, REFUSED},
	{"RESOURCE_004", ANY_STATUS, REFUSED},
	{"RESOURCE_005", ANY_STATUS, REFUSED},
	{"RESOURCE_006", ANY_STATUS, REFUSED},
	{"RESOURCE_007", ANY_STATUS, REFUSED},
	{"RESOURCE_008", ANY_STATUS, REFUSED},
	{"BUSINESS_005", ANY_STATUS, REFUSED},
	{"BUSINESS_006", ANY_STATUS, REFUSED},
	{"BUSINESS_012", ANY_STATUS, REFUSED},
	{"BUSINESS_024", ANY_STATUS, REFUSED},
	{"BUSINESS_029", ANY_STATUS, REFUSED},

	/*
	 * The same key.  CONFLICT_005 says that it belongs to other bytes: a
	 * retry can never succeed, although it is a 409.
	 */
	{"CONFLICT_001", ANY_STATUS, IN_FLIGHT},
	{"CONFLICT_005", ANY_STATUS, REFUSED},
	{"CONFLICT_006", ANY_STATUS, REFUSED},

	/*
	 * Their side.  SERVICE_001 is promised to come before anything was done;
	 * the others may come after.  ANY_STATUS is for a 2xx that says failure,
	 * their own 5xx is in the table of statuses.
	 */
	{"SERVICE_001", ANY_STATUS, RETRY_CLEAN},
	{"SERVICE_001", 503, RETRY_CLEAN},
	{"INTERNAL_001", ANY_STATUS, RETRY_MAYBE},
	{"INTERNAL_002", ANY_STATUS, RETRY_MAYBE},
	{"INTERNAL_003", ANY_STATUS, RETRY_MAYBE},
	{"INTERNAL_004", ANY_STATUS, RETRY_MAYBE},
	{"INTERNAL_005", ANY_STATUS, RETRY_MAYBE},
};

typedef enum Envelope
{
	EITHER,
	SENT,						/* the body is the API's envelope */
	FOREIGN						/* it is not: a proxy, a firewall, a wrong
								 * host */
} Envelope;

typedef struct StatusRule
{
	int			first;
	int			last;
	Envelope	envelope;
	Outcome		outcome;
} StatusRule;

/*
 * The first row that fits counts.
 *
 * Some answers can only come from a wrong base_url or from something that
 * stands between us and Sent: redirects, and a 404, 405, 407, 410, 411, 415,
 * 421 or 431 without the envelope.  URL, method and headers are the same for
 * every message, so the next one would fare no better; taking them for
 * refusals would burn the whole queue within minutes because of one setting,
 * and following a redirect would hand the key to another host.  They pause
 * the queue where everyone can see it, and one request tries again every
 * quarter of an hour, so that a passing fault of a proxy heals by itself.
 *
 * A 413 depends on the size of this message and on nothing else: half of its
 * recipients may well pass.  Any other 4xx without the envelope (a 400 or 406
 * of a firewall, say) may depend on the content: this message is tried again
 * until it is given up, the others go on; when all are hit, the circuit
 * breaker of drain.c holds them.
 */
static const StatusRule status_rules[] = {
	{200, 299, SENT, REFUSED},	/* says failure; success was seen to before */
	{200, 299, FOREIGN, RETRY_MAYBE},
	{300, 399, EITHER, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{400, 400, SENT, REFUSED_ONE},
	{401, 401, EITHER, PAUSE(CREDENTIALS, PERSON)},
	{402, 402, EITHER, PAUSE(BALANCE, 15 * MINUTE_MS)},
	{403, 403, SENT, PAUSE(FORBIDDEN, PERSON)},
	{403, 403, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{404, 405, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{407, 407, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{408, 408, EITHER, RETRY_MAYBE},
	{409, 409, EITHER, IN_FLIGHT},
	{410, 411, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{413, 413, EITHER, REFUSED_ONE},
	{415, 415, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{421, 421, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{422, 422, SENT, REFUSED_ONE},
	{429, 429, EITHER, LIMITED},
	{431, 431, FOREIGN, PAUSE(FORBIDDEN, 15 * MINUTE_MS)},
	{400, 499, SENT, REFUSED},
	{400, 499, FOREIGN, RETRY_CLEAN},
	{500, 599, EITHER, RETRY_MAYBE},
};

static const Outcome unheard_of = RETRY_MAYBE;

/* What the transport alone says; a complete answer is judged by the tables. */
static const Outcome transport_rules[] = {
	[SENTDM_ANSWERED] = RETRY_MAYBE,
	[SENTDM_NOT_REACHED] = {SENTDM_UNREACHED, false, SENTDM_PAUSE_NONE, PERSON},
	[SENTDM_BAD_CERTIFICATE] = PAUSE(CERTIFICATE, 5 * MINUTE_MS),
	[SENTDM_TOO_LATE] = {SENTDM_EXPIRED, false, SENTDM_PAUSE_NONE, PERSON},
	[SENTDM_NO_ANSWER] = RETRY_MAYBE,
};

/*
 * May the code decide alone?  Not where the status itself carries meaning: an
 * answer 500 has to stay ambiguous and a 401 or 429 has to stop the account,
 * whatever code comes with them.
 */
static bool
code_decides(int status)
{
	if (status == 401 || status == 408 || status == 429)
		return false;
	return (status >= 200 && status <= 299) || (status >= 400 && status <= 499);
}

static const Outcome *
find_code(const SentdmReply *reply)
{
	for (size_t i = 0; i < sizeof(code_rules) / sizeof(code_rules[0]); i++)
	{
		const CodeRule *rule = &code_rules[i];

		if (strcmp(rule->code, reply->error_code) != 0)
			continue;
		if (rule->status == reply->http_status ||
			(rule->status == ANY_STATUS && code_decides(reply->http_status)))
			return &rule->outcome;
	}
	return NULL;
}

static const Outcome *
find_status(const SentdmReply *reply)
{
	Envelope	envelope = reply->readable ? SENT : FOREIGN;

	for (size_t i = 0; i < sizeof(status_rules) / sizeof(status_rules[0]); i++)
	{
		const StatusRule *rule = &status_rules[i];

		if (reply->http_status >= rule->first &&
			reply->http_status <= rule->last &&
			(rule->envelope == EITHER || rule->envelope == envelope))
			return &rule->outcome;
	}
	return &unheard_of;
}

/*
 * Milliseconds to the next day in UTC.  In its first quarter of an hour the
 * next day is probably this one: then our clock is ahead of theirs, which must
 * not cost a whole day.
 */
static int64_t
until_next_utc_day(int64_t now_unix)
{
	int64_t		second = now_unix % DAY_S;

	if (second < 0)
		second += DAY_S;
	if (second * 1000 < 15 * MINUTE_MS)
		return 15 * MINUTE_MS;
	return (DAY_S - second) * 1000 + MINUTE_MS;
}

SentdmJudgement
sentdm_judge(const SentdmReply *reply, int64_t now_unix)
{
	static const Outcome accepted = ACCEPTED;
	const Outcome *found = NULL;
	SentdmJudgement judgement;

	if (reply->transport != SENTDM_ANSWERED)
		return transport_rules[reply->transport];

	if (reply->http_status >= 200 && reply->http_status <= 299 &&
		reply->readable && reply->success)
		return accepted;

	if (reply->readable && reply->error_code[0] != '\0')
		found = find_code(reply);
	if (found == NULL)
		found = find_status(reply);

	judgement = *found;
	if (judgement.probe_after_ms == NEXT_UTC_DAY)
		judgement.probe_after_ms = until_next_utc_day(now_unix);
	return judgement;
}

static bool
is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* Reads exactly n digits; false if there are fewer. */
static bool
read_digits(const char **p, int n, int *value)
{
	*value = 0;
	for (int i = 0; i < n; i++, (*p)++)
	{
		if (!is_digit(**p))
			return false;
		*value = *value * 10 + (**p - '0');
	}
	return true;
}

static bool
read_literal(const char **p, const char *literal)
{
	size_t		length = strlen(literal);

	if (strncmp(*p, literal, length) != 0)
		return false;
	*p += length;
	return true;
}

/* Reads one of count names of three letters; gives its index. */
static bool
read_name(const char **p, const char *names, int count, int *index)
{
	for (*index = 0; *index < count; (*index)++)
	{
		if (strncmp(*p, names + 3 * *index, 3) == 0)
		{
			*p += 3;
			return true;
		}
	}
	return false;
}

/* Days from 1970-01-01 to a date of the Gregorian calendar. */
static int64_t
days_from_civil(int year, int month, int day)
{
	int64_t		y = month <= 2 ? year - 1 : year;
	int64_t		m = month <= 2 ? month + 9 : month - 3; /* March is 0 */
	int64_t		era = y / 400;
	int64_t		year_of_era = y % 400;
	int64_t		day_of_year = (153 * m + 2) / 5 + day - 1;

	return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 +
		day_of_year - 719468;
}

static int
days_in_month(int year, int month)
{
	static const int days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
	bool		leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);

	return days[month - 1] + (month == 2 && leap ? 1 : 0);
}

/*
 * An IMF-fixdate ("Sun, 06 Nov 1994 08:49:37 GMT") as unix seconds.
 *
 * By hand: strptime and mktime depend on locale and time zone, and timegm is
 * not everywhere.  The two forms that RFC 9110 calls obsolete are not read;
 * without them Retry-After is only less exact.
 */
static bool
read_http_date(const char *p, const char *end, int64_t *unix_seconds)
{
	int			weekday,
				day,
				month,
				year,
				hour,
				minute,
				second;

	if (!read_name(&p, "MonTueWedThuFriSatSun", 7, &weekday) ||
		!read_literal(&p, ", ") ||
		!read_digits(&p, 2, &day) || !read_literal(&p, " ") ||
		!read_name(&p, "JanFebMarAprMayJunJulAugSepOctNovDec", 12, &month) ||
		!read_literal(&p, " ") ||
		!read_digits(&p, 4, &year) || !read_literal(&p, " ") ||
		!read_digits(&p, 2, &hour) || !read_literal(&p, ":") ||
		!read_digits(&p, 2, &minute) || !read_literal(&p, ":") ||
		!read_digits(&p, 2, &second) || !read_literal(&p, " GMT") ||
		p != end)
		return false;
	month++;
	if (year < 1970 || day < 1 || day > days_in_month(year, month) ||
		hour > 23 || minute > 59 || second > 60)
		return false;
	*unix_seconds = days_from_civil(year, month, day) * DAY_S +
		hour * 3600 + minute * 60 + second;
	return true;
}

/* Seconds with an optional fraction, as milliseconds rounded up; -1 if not. */
static int64_t
read_seconds(const char *p, const char *end)
{
	int64_t		ms = 0;
	int64_t		unit = 100;
	bool		rest = false;

	if (p == end || !is_digit(*p))
		return -1;
	for (; p < end && is_digit(*p); p++)
	{
		ms = ms * 10 + (*p - '0') * 1000;
		if (ms > DAY_S * 1000)
			return -1;
	}
	if (p < end && *p == '.')
	{
		p++;
		if (p == end)
			return -1;
		for (; p < end && is_digit(*p); p++, unit /= 10)
		{
			ms += (*p - '0') * unit;
			rest = rest || (unit == 0 && *p != '0');
		}
	}
	if (p != end)
		return -1;
	return ms + (rest ? 1 : 0);
}

int64_t
sentdm_retry_after_ms(const char *value, int64_t date_unix)
{
	const char *end;
	int64_t		ms;

	if (value == NULL)
		return -1;
	while (*value == ' ' || *value == '\t')
		value++;
	end = value + strlen(value);
	while (end > value && (end[-1] == ' ' || end[-1] == '\t'))
		end--;

	if (is_digit(*value))
		ms = read_seconds(value, end);
	else
	{
		int64_t		then;

		if (date_unix <= 0 || !read_http_date(value, end, &then))
			return -1;
		ms = (then - date_unix) * 1000;
	}
	return ms >= 0 && ms <= DAY_S * 1000 ? ms : -1;
}

static const char *const pause_names[] = {
	[SENTDM_PAUSE_NONE] = "none",
	[SENTDM_PAUSE_USER] = "user",
	[SENTDM_PAUSE_CREDENTIALS] = "credentials",
	[SENTDM_PAUSE_FORBIDDEN] = "forbidden",
	[SENTDM_PAUSE_SUSPENDED] = "suspended",
	[SENTDM_PAUSE_BALANCE] = "balance",
	[SENTDM_PAUSE_QUOTA] = "quota",
	[SENTDM_PAUSE_CERTIFICATE] = "certificate",
};

#define PAUSE_KINDS (sizeof(pause_names) / sizeof(pause_names[0]))

const char *
sentdm_pause_name(SentdmPause pause)
{
	return (size_t) pause < PAUSE_KINDS ? pause_names[pause] : pause_names[SENTDM_PAUSE_USER];
}

SentdmPause
sentdm_pause_from_name(const char *name)
{
	for (size_t i = 0; name != NULL && i < PAUSE_KINDS; i++)
	{
		if (strcmp(name, pause_names[i]) == 0)
			return (SentdmPause) i;
	}
	return SENTDM_PAUSE_USER;
}
