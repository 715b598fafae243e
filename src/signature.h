/*
 * signature.h
 *		Make and check the signatures of Sent's webhooks (wire contract, 8.3).
 *
 * Pure: no PostgreSQL, no clock; times are arguments, in whole seconds.  Text is
 * pointer and length, needs no terminating NUL, and may be NULL when the length
 * is 0.  No function fails on any input: what is not well formed does not match.
 * The only state is the signing key, which one thread at a time may use.
 *
 * Nothing here chooses a scheme by what a request contains: a key is made for
 * one scheme, and the other scheme's functions never match with it.
 */
#ifndef SENTDM_SIGNATURE_H
#define SENTDM_SIGNATURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SENTDM_SECRET_MAX		512 /* bytes of secret text */
#define SENTDM_SIG_HEADER_MAX	4096	/* bytes of signature header */
#define SENTDM_SIG_ENTRIES_MAX	16	/* signatures in one header */

/* Room for a signature and its terminating NUL. */
#define SENTDM_SIG_V1_SIZE		48	/* "v1," and 44 characters of base64 */
#define SENTDM_SIG_HEX_SIZE		65	/* 64 hex digits */

typedef enum SentdmSigScheme
{
	SENTDM_SCHEME_V1,			/* current: base64, over id, time, payload */
	SENTDM_SCHEME_HEX			/* older: hex, over the payload alone */
} SentdmSigScheme;

typedef enum SentdmSigVerdict
{
	SENTDM_SIG_MISMATCH,		/* well formed, not signed with this key */
	SENTDM_SIG_MALFORMED,		/* could not have been signed with any key */
	SENTDM_SIG_TOO_OLD,			/* authentic, older than the tolerance */
	SENTDM_SIG_IN_FUTURE,		/* authentic, further ahead than the tolerance */
	SENTDM_SIG_OK,				/* authentic and in time */
	SENTDM_SIG_ERROR			/* libcrypto failed: unknown, try again */
} SentdmSigVerdict;

/*
 * A secret made ready for use.  All zeroes is a valid key that matches nothing.
 * Members are private.
 */
typedef struct SentdmSigningKey
{
	void	   *hmac;			/* keyed context, or NULL: no usable secret */
	SentdmSigScheme scheme;
	size_t		secret_len;
	char		secret[SENTDM_SECRET_MAX];
} SentdmSigningKey;

/* What a signature is computed over: bytes exactly as received; not owned. */
typedef struct SentdmSignedContent
{
	const void *payload;
	size_t		payload_len;
	const char *id;				/* X-Webhook-ID: not empty, no "." */
	size_t		id_len;
	const char *timestamp;		/* X-Webhook-Timestamp: unix seconds, 1 to 12
								 * digits, the first not 0 */
	size_t		timestamp_len;
} SentdmSignedContent;

/*
 * Make the key ready for a secret; nearly free if it already is for this one, so
 * a caller may keep one key and call this each time.  For v1 the secret is
 * "whsec_" and padded standard base64 of the key bytes; for hex it is used as it
 * is.  False, and a key that matches nothing, if the secret is empty, too long
 * or not of that form, or libcrypto failed.  The key owns copies, which clear
 * (or another secret) erases.
 */
extern bool sentdm_signing_key_set(SentdmSigningKey *key,
								   SentdmSigScheme scheme,
								   const char *secret, size_t secret_len);

/* Erase and free what the key holds; it can be set again. */
extern void sentdm_signing_key_clear(SentdmSigningKey *key);

/*
 * Check a v1 signature header: entries separated by spaces, of which one "v1,"
 * entry has to match.  Entries of other versions are ignored, "v1," entries that
 * are not exactly 44 characters of canonical base64 never match.  Malformed: id
 * or timestamp as above, header too long, too many entries, no usable entry.
 *
 * If the signature is right, *age_s is how many seconds before now_s it was made
 * (negative: after), and the verdict says whether that is within tolerance_s
 * either way; otherwise *age_s is 0.  A negative tolerance accepts no age.
 */
extern SentdmSigVerdict sentdm_signature_verify_v1(SentdmSigningKey *key,
												   const SentdmSignedContent *content,
												   const char *header,
												   size_t header_len,
												   int64_t now_s,
												   int64_t tolerance_s,
												   int64_t *age_s);

/*
 * Check a signature of the older scheme: 64 lower-case hex digits, optionally
 * after "sha256=".  Only the payload is signed, so there is no age.
 */
extern SentdmSigVerdict sentdm_signature_verify_hex(SentdmSigningKey *key,
													const void *payload,
													size_t payload_len,
													const char *signature,
													size_t signature_len);

/*
 * Sign, for tests and tools.  False, and an empty string, if the key is not of
 * the scheme, the id or timestamp could never be verified, or libcrypto failed.
 */
extern bool sentdm_signature_sign_v1(SentdmSigningKey *key,
									 const SentdmSignedContent *content,
									 char out[SENTDM_SIG_V1_SIZE]);
extern bool sentdm_signature_sign_hex(SentdmSigningKey *key,
									  const void *payload, size_t payload_len,
									  char out[SENTDM_SIG_HEX_SIZE]);

#endif							/* SENTDM_SIGNATURE_H */
