/*
 * secret.h
 *		The signing secrets of webhooks.
 */
#ifndef SENTDM_SECRET_H
#define SENTDM_SECRET_H

#include "utils/uuid.h"

#include "signature.h"

typedef struct SentdmSecrets SentdmSecrets;

/*
 * The secrets that are valid now, in the current memory context, with which they
 * are erased.  Needs a transaction; SPI is handled inside.
 */
extern SentdmSecrets *sentdm_secrets_load(void);

/* Is there any secret that a request could be checked with? */
extern bool sentdm_secrets_any(const SentdmSecrets *secrets);

/*
 * Check a signature with each secret for the endpoint (NULL: none that we could
 * know), in either scheme.  A mismatch means that no secret matched.
 */
extern SentdmSigVerdict sentdm_secrets_verify_v1(SentdmSecrets *secrets, const pg_uuid_t *webhook_id,
												 const SentdmSignedContent *content,
												 const char *header, size_t header_len,
												 int64 now_s, int64 *age_s);
extern SentdmSigVerdict sentdm_secrets_verify_hex(SentdmSecrets *secrets, const pg_uuid_t *webhook_id,
												  const void *payload, size_t payload_len,
												  const char *signature, size_t signature_len);

/*
 * An error context callback: while it is in place, no error logs the statement or
 * the context, because there is a secret or a message among their arguments.
 */
extern void sentdm_hide_statement(void *arg);

#endif							/* SENTDM_SECRET_H */
