/*
 * signature_fuzz.c
 *		Fuzz target (libFuzzer) of src/signature.c.
 *
 * parts: signature
 * libs: -lcrypto
 *
 * An input is 16 bytes (now and tolerance in seconds, little-endian) and then
 * secret, webhook id, timestamp, signature header and payload, separated by
 * bytes of value 0xff, which no rule treats in a special way.
 *
 * Every verdict is compared with that of a second implementation, which is
 * written to be obviously right: it allocates, prints back what it parsed and
 * compares texts.  Then the input's content is signed, verified and damaged.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include "check.h"
#include "signature.h"

#define SEPARATOR 0xff

typedef struct Input
{
	int64_t		now_s;
	int64_t		tolerance_s;
	const char *secret;
	size_t		secret_len;
	const char *header;
	size_t		header_len;
	SentdmSignedContent content;
} Input;

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The field up to the next separator, without it; moves *data on. */
static const char *
next_field(const uint8_t **data, size_t *size, size_t *field_len)
{
	const char *field = (const char *) *data;
	const uint8_t *end = memchr(*data, SEPARATOR, *size);

	*field_len = end != NULL ? (size_t) (end - *data) : *size;
	*data += *field_len;
	*size -= *field_len;
	if (end != NULL)
	{
		(*data)++;
		(*size)--;
	}
	return field;
}

static bool
read_input(Input *input, const uint8_t *data, size_t size)
{
	if (size < 16)
		return false;
	memcpy(&input->now_s, data, 8);
	memcpy(&input->tolerance_s, data + 8, 8);
	data += 16;
	size -= 16;
	input->secret = next_field(&data, &size, &input->secret_len);
	input->content.id = next_field(&data, &size, &input->content.id_len);
	input->content.timestamp = next_field(&data, &size, &input->content.timestamp_len);
	input->header = next_field(&data, &size, &input->header_len);
	input->content.payload = data;
	input->content.payload_len = size;
	return true;
}

/* The key bytes of a secret, -1 if it has none. */
static int
reference_key(const Input *input, unsigned char *bytes)
{
	if (input->secret_len < 6 || input->secret_len > SENTDM_SECRET_MAX ||
		memcmp(input->secret, "whsec_", 6) != 0)
		return -1;
	return reference_base64(input->secret + 6, input->secret_len - 6, bytes);
}

static bool
reference_timestamp(const SentdmSignedContent *content, long long *timestamp_s)
{
	char		text[16];
	char		again[32];

	if (content->timestamp_len == 0 || content->timestamp_len > 12)
		return false;
	memcpy(text, content->timestamp, content->timestamp_len);
	text[content->timestamp_len] = '\0';
	*timestamp_s = strtoll(text, NULL, 10);
	snprintf(again, sizeof(again), "%lld", *timestamp_s);
	return *timestamp_s > 0 && strlen(text) == content->timestamp_len &&
		strcmp(text, again) == 0;
}

/* The v1 signature of the content. */
static void
reference_sign(const SentdmSignedContent *content, const unsigned char *key,
			   int key_len, char *signature)
{
	size_t		len = content->id_len + content->timestamp_len + content->payload_len + 2;
	unsigned char *joined = malloc(len);
	unsigned char *end = joined;
	unsigned char mac[32];

	memcpy(end, content->id, content->id_len);
	end += content->id_len;
	*end++ = '.';
	memcpy(end, content->timestamp, content->timestamp_len);
	end += content->timestamp_len;
	*end++ = '.';
	memcpy(end, content->payload, content->payload_len);
	HMAC(EVP_sha256(), key, key_len, joined, len, mac, NULL);
	free(joined);
	strcpy(signature, "v1,");
	EVP_EncodeBlock((unsigned char *) signature + 3, mac, 32);
}

/*
 * Count the entries of the header, those that are a v1 signature, and those that
 * are this one.
 */
static void
reference_entries(const Input *input, const char *signature,
				  int *nentries, int *nusable, int *nequal)
{
	const char *entry = input->header;
	const char *end = input->header + input->header_len;

	*nentries = *nusable = *nequal = 0;
	for (const char *p = entry; p <= end; p++)
	{
		unsigned char mac[64];
		size_t		len = (size_t) (p - entry);

		if (p < end && *p != ' ')
			continue;
		if (len > 0)
			++*nentries;
		if (len == 47 && memcmp(entry, "v1,", 3) == 0 &&
			reference_base64(entry + 3, 44, mac) == 32)
		{
			++*nusable;
			*nequal += memcmp(entry, signature, 47) == 0;
		}
		entry = p + 1;
	}
}

/* The verdict that verify_v1 has to give. */
static SentdmSigVerdict
reference_verdict(const Input *input, const unsigned char *key, int key_len)
{
	char		signature[SENTDM_SIG_V1_SIZE];
	long long	timestamp_s;
	int			nentries;
	int			nusable;
	int			nequal;

	if (input->content.id_len == 0 ||
		memchr(input->content.id, '.', input->content.id_len) != NULL ||
		!reference_timestamp(&input->content, &timestamp_s) ||
		input->header_len > 4096)
		return SENTDM_SIG_MALFORMED;
	reference_sign(&input->content, key, key_len > 0 ? key_len : 0, signature);
	reference_entries(input, signature, &nentries, &nusable, &nequal);
	if (nentries > 16 || nusable == 0)
		return SENTDM_SIG_MALFORMED;
	if (nequal == 0 || key_len <= 0)
		return SENTDM_SIG_MISMATCH;
	if ((__int128) input->now_s - timestamp_s >= 0)
		return (__int128) input->now_s - timestamp_s > input->tolerance_s ?
			SENTDM_SIG_TOO_OLD : SENTDM_SIG_OK;

	/* An age that has no 64 bits is that of the smallest that has. */
	if ((__int128) timestamp_s - input->now_s > INT64_MAX)
		return input->tolerance_s < INT64_MAX ? SENTDM_SIG_IN_FUTURE : SENTDM_SIG_OK;
	return (__int128) timestamp_s - input->now_s > input->tolerance_s ?
		SENTDM_SIG_IN_FUTURE : SENTDM_SIG_OK;
}

/* Verify the input as it is, with a fresh and with a kept key. */
static void
check_verdict(const Input *input, const unsigned char *key_bytes, int key_len)
{
	static SentdmSigningKey kept;
	SentdmSigningKey fresh = {0};
	SentdmSigVerdict verdict;
	int64_t		age_s = -1;
	int64_t		kept_age_s = -1;
	bool		usable;

	usable = sentdm_signing_key_set(&fresh, SENTDM_SCHEME_V1,
									input->secret, input->secret_len);
	CHECK(usable == (key_len > 0));
	verdict = sentdm_signature_verify_v1(&fresh, &input->content,
										 input->header, input->header_len,
										 input->now_s, input->tolerance_s, &age_s);
	sentdm_signing_key_clear(&fresh);
	CHECK(verdict == reference_verdict(input, key_bytes, key_len));
	if (verdict == SENTDM_SIG_OK)
		CHECK((age_s < 0 ? -age_s : age_s) <= input->tolerance_s);
	else if (verdict == SENTDM_SIG_TOO_OLD)
		CHECK(age_s >= 0);
	else if (verdict == SENTDM_SIG_IN_FUTURE)
		CHECK(age_s < 0);
	else
		CHECK(age_s == 0);

	CHECK(sentdm_signing_key_set(&kept, SENTDM_SCHEME_V1,
								 input->secret, input->secret_len) == usable);
	CHECK(sentdm_signature_verify_v1(&kept, &input->content,
									 input->header, input->header_len,
									 input->now_s, input->tolerance_s,
									 &kept_age_s) == verdict);
	CHECK(kept_age_s == age_s);
}

/* What is signed verifies; what is damaged, or of the other scheme, does not. */
static void
check_v1_round_trip(const Input *input)
{
	SentdmSigningKey key = {0};
	char		signature[SENTDM_SIG_V1_SIZE];
	int64_t		age_s;
	size_t		bit = (size_t) input->now_s % (47 * 8);
	long long	timestamp_s;

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, input->secret, input->secret_len);
	if (sentdm_signature_sign_v1(&key, &input->content, signature))
	{
		CHECK(strlen(signature) == 47);
		CHECK(reference_timestamp(&input->content, &timestamp_s));
		CHECK(sentdm_signature_verify_v1(&key, &input->content, signature, 47,
										 timestamp_s, 0, &age_s) == SENTDM_SIG_OK);
		CHECK(sentdm_signature_verify_v1(&key, &input->content, signature, 47,
										 timestamp_s + 1, 0, &age_s) == SENTDM_SIG_TOO_OLD);
		CHECK(sentdm_signature_verify_hex(&key, input->content.payload,
										  input->content.payload_len,
										  input->header, input->header_len) != SENTDM_SIG_OK);
		signature[bit / 8] ^= (char) (1 << bit % 8);
		CHECK(sentdm_signature_verify_v1(&key, &input->content, signature, 47,
										 timestamp_s, INT64_MAX, &age_s) <= SENTDM_SIG_MALFORMED);
	}
	sentdm_signing_key_clear(&key);
}

/* The same for the older scheme, whose header is the input's too. */
static void
check_hex(const Input *input)
{
	const void *payload = input->content.payload;
	size_t		payload_len = input->content.payload_len;
	SentdmSigningKey key = {0};
	char		signature[SENTDM_SIG_HEX_SIZE];
	size_t		skip = 0;
	size_t		bit = (size_t) input->now_s % (64 * 8);
	SentdmSigVerdict verdict;

	CHECK(sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX,
								 input->secret, input->secret_len) ==
		  (input->secret_len > 0 && input->secret_len <= SENTDM_SECRET_MAX));
	verdict = sentdm_signature_verify_hex(&key, payload, payload_len,
										  input->header, input->header_len);
	if (sentdm_signature_sign_hex(&key, payload, payload_len, signature))
	{
		if (input->header_len >= 7 && memcmp(input->header, "sha256=", 7) == 0)
			skip = 7;
		CHECK((verdict == SENTDM_SIG_OK) ==
			  (input->header_len == skip + 64 &&
			   memcmp(input->header + skip, signature, 64) == 0));
		CHECK(sentdm_signature_verify_hex(&key, payload, payload_len,
										  signature, 64) == SENTDM_SIG_OK);
		signature[bit / 8] ^= (char) (1 << bit % 8);
		CHECK(sentdm_signature_verify_hex(&key, payload, payload_len,
										  signature, 64) != SENTDM_SIG_OK);
	}
	else
		CHECK(verdict <= SENTDM_SIG_MALFORMED);
	sentdm_signing_key_clear(&key);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	unsigned char key[SENTDM_SECRET_MAX];
	int			key_len;
	Input		input;

	if (!read_input(&input, data, size))
		return 0;
	key_len = reference_key(&input, key);
	check_verdict(&input, key, key_len);
	check_v1_round_trip(&input);
	check_hex(&input);
	return 0;
}
