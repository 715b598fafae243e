/*
 * signature.c
 *		Make and check the signatures of Sent's webhooks (wire contract, 8.3).
 *
 * Everything that arrives here may come from a stranger.  So the rules are
 * strict, every length is bounded before anything is computed, and neither the
 * secret nor the expected signature decides a branch or an address.  Must never
 * read a clock, log, or include postgres.h: tests and fuzzers link it alone.
 */

/*
 * HMAC_CTX is deprecated since OpenSSL 3.0, but it is the one interface that
 * restarts a keyed HMAC on every version from 1.1 on: in 3.0.0 to 3.0.2,
 * EVP_MAC_init() without a key does nothing and says that it succeeded.  It is
 * also the faster one, and the one that PostgreSQL uses.
 */
#ifndef OPENSSL_API_COMPAT
#define OPENSSL_API_COMPAT 0x10100000L
#endif

#include "signature.h"

#include <string.h>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#define MAC_LEN			32		/* bytes of an HMAC-SHA256 */
#define MAC_BASE64_LEN	44
#define MAC_HEX_LEN		64
#define TIMESTAMP_MAX	12		/* digits: to the year 33658, and no overflow */
#define NOT_A_DIGIT		0x80	/* in a digit's value: outside the alphabet */

static const char secret_prefix[] = "whsec_";
static const char v1_prefix[] = "v1,";
static const char hex_prefix[] = "sha256=";

/* A length that a literal prefix has without its NUL. */
#define PREFIX_LEN(prefix) (sizeof(prefix) - 1)

/* Whether text begins with a prefix. */
static bool
has_prefix(const char *text, size_t len, const char *prefix, size_t prefix_len)
{
	return len >= prefix_len && memcmp(text, prefix, prefix_len) == 0;
}

/* All ones if lo <= c <= hi, else 0, without a branch; all below 2^31. */
static uint32_t
in_range(uint32_t c, uint32_t lo, uint32_t hi)
{
	return 0 - (((lo - 1 - c) & (c - hi - 1)) >> 31);
}

/*
 * Value of a base64 digit, or NOT_A_DIGIT.  Secrets pass through here, so it is
 * arithmetic and not a table, whose cache lines would tell which were read.
 */
static uint32_t
base64_value(uint32_t c)
{
	uint32_t	upper = in_range(c, 'A', 'Z');
	uint32_t	lower = in_range(c, 'a', 'z');
	uint32_t	digit = in_range(c, '0', '9');
	uint32_t	plus = in_range(c, '+', '+');
	uint32_t	slash = in_range(c, '/', '/');

	return (upper & (c - 'A')) |
		(lower & (c - 'a' + 26)) |
		(digit & (c - '0' + 52)) |
		(plus & 62) |
		(slash & 63) |
		(~(upper | lower | digit | plus | slash) & NOT_A_DIGIT);
}

/*
 * Decode standard base64 and return the number of bytes, 0 if it is none.
 *
 * Only the canonical form is accepted: padded, no white space, and zeroes in the
 * bits that the padding leaves over.  One value then has one spelling, which the
 * decoders of libcrypto do not insist on.
 */
static size_t
base64_decode(const char *src, size_t len, unsigned char *dst, size_t dst_size)
{
	size_t		padding = 0;
	size_t		nbytes = 0;
	uint32_t	bits = 0;
	int			nbits = 0;
	uint32_t	bad = 0;

	if (len == 0 || len % 4 != 0)
		return 0;
	if (src[len - 1] == '=')
		padding = src[len - 2] == '=' ? 2 : 1;
	if (len / 4 * 3 - padding > dst_size)
		return 0;

	for (size_t i = 0; i < len - padding; i++)
	{
		uint32_t	value = base64_value((unsigned char) src[i]);

		bad |= value & NOT_A_DIGIT;
		bits = (bits << 6) | (value & 63);
		nbits += 6;
		if (nbits >= 8)
		{
			nbits -= 8;
			dst[nbytes++] = (unsigned char) (bits >> nbits);
		}
	}
	bad |= bits & ((1U << nbits) - 1);

	return bad == 0 ? nbytes : 0;
}

/* Decode a MAC from exactly 64 lower-case hex digits. */
static bool
hex_decode_mac(const char *src, size_t len, unsigned char *mac)
{
	uint32_t	bad = 0;

	if (len != MAC_HEX_LEN)
		return false;

	for (size_t i = 0; i < MAC_HEX_LEN; i++)
	{
		uint32_t	c = (unsigned char) src[i];
		uint32_t	digit = in_range(c, '0', '9');
		uint32_t	letter = in_range(c, 'a', 'f');
		uint32_t	value = (digit & (c - '0')) | (letter & (c - 'a' + 10));

		bad |= ~(digit | letter);
		mac[i / 2] = (unsigned char) (i % 2 == 0 ? value << 4 : mac[i / 2] | value);
	}
	return bad == 0;
}

/* Decode the key bytes of a v1 secret and return their number, 0 if it is none. */
static size_t
decode_secret(const char *secret, size_t len, unsigned char *dst, size_t dst_size)
{
	const size_t prefix_len = PREFIX_LEN(secret_prefix);

	if (!has_prefix(secret, len, secret_prefix, prefix_len))
		return 0;
	return base64_decode(secret + prefix_len, len - prefix_len, dst, dst_size);
}

/* Whether the key is ready for this very secret. */
static bool
key_holds(const SentdmSigningKey *key, SentdmSigScheme scheme,
		  const char *secret, size_t secret_len)
{
	return key->hmac != NULL &&
		key->scheme == scheme &&
		key->secret_len == secret_len &&
		CRYPTO_memcmp(key->secret, secret, secret_len) == 0;
}

/* Whether the key can be used with a scheme at all. */
static bool
key_is_for(const SentdmSigningKey *key, SentdmSigScheme scheme)
{
	return key->hmac != NULL && key->scheme == scheme;
}

/* Hash the key bytes once; every signature then starts from the result. */
static bool
key_start(SentdmSigningKey *key, const unsigned char *bytes, size_t nbytes)
{
	HMAC_CTX   *hmac = HMAC_CTX_new();

	if (hmac == NULL)
		return false;
	if (!HMAC_Init_ex(hmac, bytes, (int) nbytes, EVP_sha256(), NULL))
	{
		HMAC_CTX_free(hmac);
		return false;
	}
	key->hmac = hmac;
	return true;
}

bool
sentdm_signing_key_set(SentdmSigningKey *key, SentdmSigScheme scheme,
					   const char *secret, size_t secret_len)
{
	unsigned char decoded[SENTDM_SECRET_MAX];
	bool		ready;

	if (key_holds(key, scheme, secret, secret_len))
		return true;

	sentdm_signing_key_clear(key);
	if (secret_len == 0 || secret_len > SENTDM_SECRET_MAX)
		return false;

	if (scheme == SENTDM_SCHEME_V1)
	{
		size_t		nbytes = decode_secret(secret, secret_len,
										   decoded, sizeof(decoded));

		ready = nbytes > 0 && key_start(key, decoded, nbytes);
		OPENSSL_cleanse(decoded, sizeof(decoded));
	}
	else
		ready = key_start(key, (const unsigned char *) secret, secret_len);

	if (ready)
	{
		key->scheme = scheme;
		key->secret_len = secret_len;
		memcpy(key->secret, secret, secret_len);
	}
	return ready;
}

void
sentdm_signing_key_clear(SentdmSigningKey *key)
{
	HMAC_CTX_free(key->hmac);	/* erases the hashed key */
	OPENSSL_cleanse(key, sizeof(*key));
}

/* Parse a timestamp; false unless it is the one spelling of its number. */
static bool
parse_timestamp(const char *text, size_t len, int64_t *timestamp_s)
{
	int64_t		value = 0;

	if (len == 0 || len > TIMESTAMP_MAX || text[0] == '0')
		return false;
	for (size_t i = 0; i < len; i++)
	{
		if (text[i] < '0' || text[i] > '9')
			return false;
		value = value * 10 + (text[i] - '0');
	}
	*timestamp_s = value;
	return true;
}

/*
 * Check id and timestamp.  The parts are signed joined by dots, so a dot in the
 * id would let one signature stand for two different contents.
 */
static bool
content_is_valid(const SentdmSignedContent *content, int64_t *timestamp_s)
{
	return content->id_len > 0 &&
		memchr(content->id, '.', content->id_len) == NULL &&
		parse_timestamp(content->timestamp, content->timestamp_len, timestamp_s);
}

/* Add bytes to a MAC; an empty part may have no address. */
static bool
mac_add(HMAC_CTX *hmac, const void *data, size_t len)
{
	return len == 0 || HMAC_Update(hmac, data, len);
}

/* MAC of the v1 scheme: "<id>.<timestamp>.<payload>". */
static bool
mac_v1(SentdmSigningKey *key, const SentdmSignedContent *content,
	   unsigned char *mac)
{
	HMAC_CTX   *hmac = key->hmac;

	return HMAC_Init_ex(hmac, NULL, 0, NULL, NULL) &&
		mac_add(hmac, content->id, content->id_len) &&
		mac_add(hmac, ".", 1) &&
		mac_add(hmac, content->timestamp, content->timestamp_len) &&
		mac_add(hmac, ".", 1) &&
		mac_add(hmac, content->payload, content->payload_len) &&
		HMAC_Final(hmac, mac, NULL);
}

/* MAC of the hex scheme: the payload alone. */
static bool
mac_hex(SentdmSigningKey *key, const void *payload, size_t payload_len,
		unsigned char *mac)
{
	HMAC_CTX   *hmac = key->hmac;

	return HMAC_Init_ex(hmac, NULL, 0, NULL, NULL) &&
		mac_add(hmac, payload, payload_len) &&
		HMAC_Final(hmac, mac, NULL);
}

/* Decode one entry of the header, if it is a v1 signature. */
static bool
decode_v1_entry(const char *entry, size_t len, unsigned char *mac)
{
	const size_t prefix_len = PREFIX_LEN(v1_prefix);

	return has_prefix(entry, len, v1_prefix, prefix_len) &&
		len == prefix_len + MAC_BASE64_LEN &&
		base64_decode(entry + prefix_len, MAC_BASE64_LEN, mac, MAC_LEN) == MAC_LEN;
}

/* Collect the MACs of the header and return their number, 0 if it is malformed. */
static int
parse_v1_header(const char *header, size_t len,
				unsigned char macs[SENTDM_SIG_ENTRIES_MAX][MAC_LEN])
{
	int			nentries = 0;
	int			nmacs = 0;
	size_t		pos = 0;

	if (len > SENTDM_SIG_HEADER_MAX)
		return 0;

	while (pos < len)
	{
		size_t		start = pos;

		while (pos < len && header[pos] != ' ')
			pos++;
		if (pos > start)
		{
			if (++nentries > SENTDM_SIG_ENTRIES_MAX)
				return 0;
			if (decode_v1_entry(header + start, pos - start, macs[nmacs]))
				nmacs++;
		}
		pos++;
	}
	return nmacs;
}

/* Seconds from then_s, which is not negative, to now_s; never overflows. */
static int64_t
seconds_between(int64_t then_s, int64_t now_s)
{
	if (now_s < then_s - INT64_MAX)
		return -INT64_MAX;
	return now_s - then_s;
}

/* Verdict on the age of an authentic signature. */
static SentdmSigVerdict
judge_age(int64_t age_s, int64_t tolerance_s)
{
	if (age_s >= 0)
		return age_s > tolerance_s ? SENTDM_SIG_TOO_OLD : SENTDM_SIG_OK;
	return -age_s > tolerance_s ? SENTDM_SIG_IN_FUTURE : SENTDM_SIG_OK;
}

SentdmSigVerdict
sentdm_signature_verify_v1(SentdmSigningKey *key,
						   const SentdmSignedContent *content,
						   const char *header, size_t header_len,
						   int64_t now_s, int64_t tolerance_s, int64_t *age_s)
{
	unsigned char macs[SENTDM_SIG_ENTRIES_MAX][MAC_LEN];
	unsigned char expected[MAC_LEN];
	int64_t		timestamp_s;
	int			nmacs;
	int			matches = 0;

	*age_s = 0;
	if (!content_is_valid(content, &timestamp_s))
		return SENTDM_SIG_MALFORMED;
	nmacs = parse_v1_header(header, header_len, macs);
	if (nmacs == 0)
		return SENTDM_SIG_MALFORMED;
	if (!key_is_for(key, SENTDM_SCHEME_V1))
		return SENTDM_SIG_MISMATCH;
	if (!mac_v1(key, content, expected))
		return SENTDM_SIG_ERROR;

	for (int i = 0; i < nmacs; i++)
		matches += CRYPTO_memcmp(macs[i], expected, MAC_LEN) == 0;
	/* After a mismatch this would be the signature that a forger looks for. */
	OPENSSL_cleanse(expected, sizeof(expected));
	if (matches == 0)
		return SENTDM_SIG_MISMATCH;

	*age_s = seconds_between(timestamp_s, now_s);
	return judge_age(*age_s, tolerance_s);
}

SentdmSigVerdict
sentdm_signature_verify_hex(SentdmSigningKey *key,
							const void *payload, size_t payload_len,
							const char *signature, size_t signature_len)
{
	const size_t prefix_len = PREFIX_LEN(hex_prefix);
	unsigned char mac[MAC_LEN];
	unsigned char expected[MAC_LEN];
	int			differs;

	if (has_prefix(signature, signature_len, hex_prefix, prefix_len))
	{
		signature += prefix_len;
		signature_len -= prefix_len;
	}
	if (!hex_decode_mac(signature, signature_len, mac))
		return SENTDM_SIG_MALFORMED;
	if (!key_is_for(key, SENTDM_SCHEME_HEX))
		return SENTDM_SIG_MISMATCH;
	if (!mac_hex(key, payload, payload_len, expected))
		return SENTDM_SIG_ERROR;

	differs = CRYPTO_memcmp(mac, expected, MAC_LEN);
	OPENSSL_cleanse(expected, sizeof(expected));
	return differs ? SENTDM_SIG_MISMATCH : SENTDM_SIG_OK;
}

bool
sentdm_signature_sign_v1(SentdmSigningKey *key,
						 const SentdmSignedContent *content,
						 char out[SENTDM_SIG_V1_SIZE])
{
	const size_t prefix_len = PREFIX_LEN(v1_prefix);
	unsigned char mac[MAC_LEN];
	int64_t		timestamp_s;

	out[0] = '\0';
	if (!key_is_for(key, SENTDM_SCHEME_V1) ||
		!content_is_valid(content, &timestamp_s) ||
		!mac_v1(key, content, mac))
		return false;

	memcpy(out, v1_prefix, prefix_len);
	EVP_EncodeBlock((unsigned char *) out + prefix_len, mac, MAC_LEN);
	return true;
}

bool
sentdm_signature_sign_hex(SentdmSigningKey *key,
						  const void *payload, size_t payload_len,
						  char out[SENTDM_SIG_HEX_SIZE])
{
	static const char digits[] = "0123456789abcdef";
	unsigned char mac[MAC_LEN];

	out[0] = '\0';
	if (!key_is_for(key, SENTDM_SCHEME_HEX) ||
		!mac_hex(key, payload, payload_len, mac))
		return false;

	for (size_t i = 0; i < MAC_LEN; i++)
	{
		out[2 * i] = digits[mac[i] >> 4];
		out[2 * i + 1] = digits[mac[i] & 15];
	}
	out[MAC_HEX_LEN] = '\0';
	return true;
}
