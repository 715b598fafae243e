/*
 * secret.c
 *		The signing secrets of webhooks: kept in a table that nobody may read.
 *
 * When a secret is rotated, Sent signs with the new one at once, but requests
 * signed with the old one are still under way.  So there may be several valid
 * secrets for an endpoint, and each is tried.  Must never put a secret into an
 * error or a log line.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "secret.h"
#include "send.h"
#include "sentdm.h"
#include "sql.h"

PG_FUNCTION_INFO_V1(sentdm_set_webhook_secret);

#define MIN_VERBATIM_LENGTH 16	/* characters of a secret that is not decoded */

/* A secret, made ready for both schemes; a key that is all zeroes never matches. */
typedef struct Secret
{
	bool		any_endpoint;
	pg_uuid_t	webhook_id;		/* unless any_endpoint */
	SentdmSigningKey v1;
	SentdmSigningKey hex;
} Secret;

struct SentdmSecrets
{
	MemoryContextCallback erase;
	int			n;
	Secret		list[FLEXIBLE_ARRAY_MEMBER];
};

static void
erase_secrets(void *arg)
{
	SentdmSecrets *secrets = arg;

	for (int i = 0; i < secrets->n; i++)
	{
		sentdm_signing_key_clear(&secrets->list[i].v1);
		sentdm_signing_key_clear(&secrets->list[i].hex);
	}
}

/*
 * Make one more secret ready.  One that no request could be checked with is left
 * out: it is as good as none, and that is what the caller should hear.
 */
static void
add_secret(SentdmSecrets *secrets, const pg_uuid_t *webhook_id,
		   const char *text, size_t length)
{
	Secret	   *secret = &secrets->list[secrets->n++];
	bool		usable;

	secret->any_endpoint = webhook_id == NULL;
	if (webhook_id != NULL)
		secret->webhook_id = *webhook_id;
	usable = sentdm_signing_key_set(&secret->v1, SENTDM_SCHEME_V1, text, length);
	if (sentdm_webhook_legacy_signature)
		usable |= sentdm_signing_key_set(&secret->hex, SENTDM_SCHEME_HEX, text, length);
	if (!usable)
		secrets->n--;
}

static void
add_stored_secret(SentdmSecrets *secrets, HeapTuple row, TupleDesc desc)
{
	bool		any_endpoint;
	bool		isnull;
	Datum		webhook_id = SPI_getbinval(row, desc, 1, &any_endpoint);
	text	   *secret = DatumGetTextPP(SPI_getbinval(row, desc, 2, &isnull));

	add_secret(secrets, any_endpoint ? NULL : DatumGetUUIDP(webhook_id),
			   VARDATA_ANY(secret), VARSIZE_ANY_EXHDR(secret));
}

SentdmSecrets *
sentdm_secrets_load(void)
{
	static SentdmStatement fetch = {
		.sql = "SELECT webhook_id, secret FROM sentdm.webhook_secrets"
		" WHERE valid_until IS NULL OR valid_until > pg_catalog.now()"
		" ORDER BY webhook_id IS NULL, id DESC"
	};
	MemoryContext context = CurrentMemoryContext;
	const char *setting = sentdm_webhook_secret_setting();
	SentdmSecrets *secrets;
	int			n;

	SPI_connect();
	n = (int) sentdm_execute(&fetch, NULL, NULL);
	secrets = MemoryContextAllocZero(context, offsetof(SentdmSecrets, list) +
									 (n + 1) * sizeof(Secret));
	/* Registered first: the keys have memory that no context knows of. */
	secrets->erase.func = erase_secrets;
	secrets->erase.arg = secrets;
	MemoryContextRegisterResetCallback(context, &secrets->erase);

	for (int i = 0; i < n; i++)
		add_stored_secret(secrets, SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	if (setting[0] != '\0')
		add_secret(secrets, NULL, setting, strlen(setting));
	SPI_finish();
	return secrets;
}

bool
sentdm_secrets_any(const SentdmSecrets *secrets)
{
	return secrets->n > 0;
}

static bool
is_for_endpoint(const Secret *secret, const pg_uuid_t *webhook_id)
{
	return secret->any_endpoint ||
		(webhook_id != NULL && memcmp(&secret->webhook_id, webhook_id, UUID_LEN) == 0);
}

SentdmSigVerdict
sentdm_secrets_verify_v1(SentdmSecrets *secrets, const pg_uuid_t *webhook_id,
						 const SentdmSignedContent *content,
						 const char *header, size_t header_len,
						 int64 now_s, int64 *age_s)
{
	SentdmSigVerdict verdict = SENTDM_SIG_MISMATCH;

	*age_s = 0;
	for (int i = 0; i < secrets->n && verdict == SENTDM_SIG_MISMATCH; i++)
	{
		if (is_for_endpoint(&secrets->list[i], webhook_id))
			verdict = sentdm_signature_verify_v1(&secrets->list[i].v1, content,
												 header, header_len,
												 now_s, PG_INT64_MAX, age_s);
	}
	return verdict;
}

SentdmSigVerdict
sentdm_secrets_verify_hex(SentdmSecrets *secrets, const pg_uuid_t *webhook_id,
						  const void *payload, size_t payload_len,
						  const char *signature, size_t signature_len)
{
	SentdmSigVerdict verdict = SENTDM_SIG_MISMATCH;

	for (int i = 0; i < secrets->n && verdict == SENTDM_SIG_MISMATCH; i++)
	{
		if (is_for_endpoint(&secrets->list[i], webhook_id))
			verdict = sentdm_signature_verify_hex(&secrets->list[i].hex, payload, payload_len,
												  signature, signature_len);
	}
	return verdict;
}

void
sentdm_hide_statement(void *arg)
{
	errhidestmt(true);
	errhidecontext(true);
}

/* Could a request be checked with this secret? */
static bool
is_usable(text *secret)
{
	SentdmSigningKey key = {0};
	const char *data = VARDATA_ANY(secret);
	size_t		length = VARSIZE_ANY_EXHDR(secret);
	bool		usable;

	usable = sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, data, length);
	if (!usable && sentdm_webhook_legacy_signature)
		usable = pg_mbstrlen_with_len(data, length) >= MIN_VERBATIM_LENGTH &&
			sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, data, length);
	sentdm_signing_key_clear(&key);
	return usable;
}

static void
check_secret(FunctionCallInfo fcinfo)
{
	Interval	zero = {0};

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("argument \"secret\" must not be null")));
	if (PG_ARGISNULL(2) ||
		DatumGetBool(DirectFunctionCall2(interval_lt, PG_GETARG_DATUM(2), IntervalPGetDatum(&zero))))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"overlap\" must not be null or negative")));
	if (!is_usable(PG_GETARG_TEXT_PP(0)))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"secret\" is not a signing secret of a webhook"),
				 errhint("Use the signing_secret as Sent shows it: whsec_ and then base64.")));
}

/* Make a secret the current one of its endpoint; those before it run out. */
static void
store_secret(Datum *values, const char *nulls)
{
	static SentdmStatement lock = {
		.sql = "LOCK TABLE sentdm.webhook_secrets IN SHARE ROW EXCLUSIVE MODE"
	};
	static SentdmStatement retire = {
		.sql = "UPDATE sentdm.webhook_secrets SET valid_until = CASE WHEN secret = $1 THEN NULL"
		" ELSE least(valid_until, pg_catalog.now() + $3) END"
		" WHERE webhook_id IS NOT DISTINCT FROM $2",
		.nargs = 3,
		.types = {TEXTOID, UUIDOID, INTERVALOID}
	};
	static SentdmStatement add = {
		.sql = "INSERT INTO sentdm.webhook_secrets (secret, webhook_id) SELECT $1, $2"
		" WHERE NOT EXISTS (SELECT FROM sentdm.webhook_secrets"
		"   WHERE secret = $1 AND webhook_id IS NOT DISTINCT FROM $2)",
		.nargs = 2,
		.types = {TEXTOID, UUIDOID}
	};

	SPI_connect();
	sentdm_execute(&lock, NULL, NULL);
	sentdm_execute(&retire, values, nulls);
	sentdm_execute(&add, values, nulls);
	SPI_finish();
}

Datum
sentdm_set_webhook_secret(PG_FUNCTION_ARGS)
{
	ErrorContextCallback hide;
	Datum		values[3];
	char		nulls[4] = "   ";

	hide.callback = sentdm_hide_statement;
	hide.arg = NULL;
	hide.previous = error_context_stack;
	error_context_stack = &hide;

	check_secret(fcinfo);
	for (int i = 0; i < 3; i++)
	{
		values[i] = PG_GETARG_DATUM(i);
		nulls[i] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	store_secret(values, nulls);
	/* Perhaps of a webhook that the worker is to look after. */
	sentdm_control_at_commit();

	error_context_stack = hide.previous;
	PG_RETURN_VOID();
}
