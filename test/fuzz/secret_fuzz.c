/*
 * secret_fuzz.c
 *		Fuzz target (libFuzzer) of the decoding of secrets in src/signature.c.
 *
 * parts: signature
 * libs: -lcrypto
 *
 * An input is two secrets, separated by a byte of value 0xff.  What each of them
 * signs is compared with libcrypto's HMAC under the key that libcrypto decodes, in
 * both schemes, with a new key and with one that held the other secret before.
 */
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include "check.h"
#include "signature.h"

#define SEPARATOR 0xff

typedef struct Text
{
	const char *data;
	size_t		length;
} Text;

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char payload[] = "{}";
static const SentdmSignedContent content = {
	.payload = payload, .payload_len = 2, .id = "id", .id_len = 2, .timestamp = "1", .timestamp_len = 1
};

/* The signature that a secret gives; false: none, it cannot be used. */
static bool
expected_v1(Text secret, char *signature)
{
	unsigned char key[SENTDM_SECRET_MAX];
	unsigned char mac[32];
	int			nbytes = -1;

	if (secret.length > 6 && secret.length <= SENTDM_SECRET_MAX && memcmp(secret.data, "whsec_", 6) == 0)
		nbytes = reference_base64(secret.data + 6, secret.length - 6, key);
	if (nbytes <= 0)
		return false;
	HMAC(EVP_sha256(), key, nbytes, (const unsigned char *) "id.1.{}", 7, mac, NULL);
	strcpy(signature, "v1,");
	EVP_EncodeBlock((unsigned char *) signature + 3, mac, sizeof(mac));
	return true;
}

static bool
expected_hex(Text secret, char *signature)
{
	unsigned char mac[32];

	if (secret.length == 0 || secret.length > SENTDM_SECRET_MAX)
		return false;
	HMAC(EVP_sha256(), secret.data, (int) secret.length, (const unsigned char *) payload, 2, mac, NULL);
	for (int i = 0; i < 32; i++)
		sprintf(signature + 2 * i, "%02x", mac[i]);
	return true;
}

/* A key, whatever it held before, does what the secret says, and only that. */
static void
check_key(SentdmSigningKey *key, SentdmSigScheme scheme, Text secret)
{
	char		expected[SENTDM_SIG_HEX_SIZE];
	char		v1[SENTDM_SIG_V1_SIZE];
	char		hex[SENTDM_SIG_HEX_SIZE];
	bool		is_v1 = scheme == SENTDM_SCHEME_V1;
	bool		usable = is_v1 ? expected_v1(secret, expected) : expected_hex(secret, expected);

	CHECK(sentdm_signing_key_set(key, scheme, secret.data, secret.length) == usable);
	CHECK(sentdm_signature_sign_v1(key, &content, v1) == (usable && is_v1));
	CHECK(sentdm_signature_sign_hex(key, payload, 2, hex) == (usable && !is_v1));
	CHECK(strcmp(v1, usable && is_v1 ? expected : "") == 0);
	CHECK(strcmp(hex, usable && !is_v1 ? expected : "") == 0);
}

/* Nothing of the secret is left. */
static void
check_clear(SentdmSigningKey *key)
{
	static const SentdmSigningKey cleared;

	sentdm_signing_key_clear(key);
	CHECK(key->hmac == NULL && key->secret_len == 0);
	CHECK(memcmp(key->secret, cleared.secret, sizeof(key->secret)) == 0);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *separator = memchr(data, SEPARATOR, size);
	size_t		first = separator ? (size_t) (separator - data) : size;
	Text		secrets[2] = {{(const char *) data, first}};

	if (separator)
		secrets[1] = (Text) {(const char *) separator + 1, size - first - 1};
	for (int scheme = SENTDM_SCHEME_V1; scheme <= SENTDM_SCHEME_HEX; scheme++)
	{
		SentdmSigningKey key = {0};

		for (int i = 0; i < 4; i++)
			check_key(&key, (SentdmSigScheme) scheme, secrets[i / 2]);
		check_key(&key, (SentdmSigScheme) (1 - scheme), secrets[0]);
		check_clear(&key);
		check_key(&key, (SentdmSigScheme) scheme, secrets[1]);
		check_clear(&key);
	}
	return 0;
}
