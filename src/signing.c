/*
 * signing.c
 *		sentdm_sign() and sentdm_verify_signature(): signature.c for SQL.
 *
 * These two are for everybody, and verifying is for strangers' input: whatever
 * is malformed is not an error but false.  Must never show a secret.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "secret.h"
#include "signature.h"

PG_FUNCTION_INFO_V1(sentdm_sign);
PG_FUNCTION_INFO_V1(sentdm_verify_signature);

#define VERIFY_V1_NARGS 7		/* of the variant for the current scheme */

#define EPOCH_DIFFERENCE_S \
	((int64) (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY)

/*
 * The key that was used last.  Making one ready takes longer than using it, and
 * the rows of a table are usually signed with one secret.
 */
static SentdmSigningKey last_key;

/* Whole seconds, rounded down. */
static int64
floor_seconds(int64 us)
{
	return us / USECS_PER_SEC - (us % USECS_PER_SEC < 0 ? 1 : 0);
}

/* Length of an interval, of which a month has 30 days, as when it is compared. */
static int64
interval_seconds(const Interval *interval)
{
	return ((int64) interval->month * DAYS_PER_MONTH + interval->day) * SECS_PER_DAY +
		floor_seconds(interval->time);
}

/* Neither true nor false can be said; that is not the input's fault. */
static bool
is_authentic(SentdmSigVerdict verdict)
{
	if (verdict == SENTDM_SIG_ERROR)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not compute a signature")));
	return verdict == SENTDM_SIG_OK;
}

static void
set_content(SentdmSignedContent *content, struct varlena *payload, text *id, text *timestamp)
{
	content->payload = VARDATA_ANY(payload);
	content->payload_len = VARSIZE_ANY_EXHDR(payload);
	content->id = VARDATA_ANY(id);
	content->id_len = VARSIZE_ANY_EXHDR(id);
	content->timestamp = VARDATA_ANY(timestamp);
	content->timestamp_len = VARSIZE_ANY_EXHDR(timestamp);
}

static bool
use_secret(SentdmSigScheme scheme, text *secret)
{
	return sentdm_signing_key_set(&last_key, scheme, VARDATA_ANY(secret), VARSIZE_ANY_EXHDR(secret));
}

/* (payload, signature, secret, webhook_id, webhook_timestamp, tolerance, at) */
static bool
verify_v1(FunctionCallInfo fcinfo)
{
	text	   *signature = PG_GETARG_TEXT_PP(1);
	int64		tolerance_s = interval_seconds(PG_GETARG_INTERVAL_P(5));
	TimestampTz at = PG_GETARG_TIMESTAMPTZ(6);
	SentdmSignedContent content;
	int64		age_s;

	if (TIMESTAMP_NOT_FINITE(at) || !use_secret(SENTDM_SCHEME_V1, PG_GETARG_TEXT_PP(2)))
		return false;
	set_content(&content, PG_GETARG_VARLENA_PP(0), PG_GETARG_TEXT_PP(3), PG_GETARG_TEXT_PP(4));
	return is_authentic(sentdm_signature_verify_v1(&last_key, &content, VARDATA_ANY(signature),
												   VARSIZE_ANY_EXHDR(signature),
												   floor_seconds(at) + EPOCH_DIFFERENCE_S,
												   tolerance_s, &age_s));
}

/* (payload, signature, secret) */
static bool
verify_hex(FunctionCallInfo fcinfo)
{
	struct varlena *payload = PG_GETARG_VARLENA_PP(0);
	text	   *signature = PG_GETARG_TEXT_PP(1);

	if (!use_secret(SENTDM_SCHEME_HEX, PG_GETARG_TEXT_PP(2)))
		return false;
	return is_authentic(sentdm_signature_verify_hex(&last_key, VARDATA_ANY(payload),
													VARSIZE_ANY_EXHDR(payload),
													VARDATA_ANY(signature),
													VARSIZE_ANY_EXHDR(signature)));
}

/* All variants: the payload is text or bytea, and either way bytes. */
Datum
sentdm_verify_signature(PG_FUNCTION_ARGS)
{
	for (int i = 0; i < PG_NARGS(); i++)
	{
		if (PG_ARGISNULL(i))
			PG_RETURN_BOOL(false);
	}
	PG_RETURN_BOOL(PG_NARGS() == VERIFY_V1_NARGS ? verify_v1(fcinfo) : verify_hex(fcinfo));
}

static text *
sign_v1(struct varlena *payload, text *secret, text *id, text *timestamp)
{
	SentdmSignedContent content;
	char		signature[SENTDM_SIG_V1_SIZE];

	if (!use_secret(SENTDM_SCHEME_V1, secret))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"secret\" is not a signing secret of a webhook"),
				 errhint("It has to be whsec_ and then base64.")));
	set_content(&content, payload, id, timestamp);
	if (!sentdm_signature_sign_v1(&last_key, &content, signature))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"webhook_id\" or \"webhook_timestamp\" is malformed"),
				 errhint("The id has no dot in it, and the timestamp is in seconds since 1970.")));
	return cstring_to_text(signature);
}

static text *
sign_hex(struct varlena *payload, text *secret)
{
	char		signature[SENTDM_SIG_HEX_SIZE];

	if (!use_secret(SENTDM_SCHEME_HEX, secret) ||
		!sentdm_signature_sign_hex(&last_key, VARDATA_ANY(payload),
								   VARSIZE_ANY_EXHDR(payload), signature))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("argument \"secret\" is empty or longer than %d bytes", SENTDM_SECRET_MAX)));
	return cstring_to_text(signature);
}

/* (payload, secret, webhook_id, webhook_timestamp); the payload is text or bytea */
Datum
sentdm_sign(PG_FUNCTION_ARGS)
{
	ErrorContextCallback hide;
	text	   *signature;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		PG_RETURN_NULL();

	hide.callback = sentdm_hide_statement;
	hide.arg = NULL;
	hide.previous = error_context_stack;
	error_context_stack = &hide;

	if (PG_ARGISNULL(2) != PG_ARGISNULL(3))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("arguments \"webhook_id\" and \"webhook_timestamp\" go together"),
				 errhint("Give both for the current scheme, neither for the older one.")));
	if (PG_ARGISNULL(2))
		signature = sign_hex(PG_GETARG_VARLENA_PP(0), PG_GETARG_TEXT_PP(1));
	else
		signature = sign_v1(PG_GETARG_VARLENA_PP(0), PG_GETARG_TEXT_PP(1),
							PG_GETARG_TEXT_PP(2), PG_GETARG_TEXT_PP(3));

	error_context_stack = hide.previous;
	PG_RETURN_TEXT_P(signature);
}
