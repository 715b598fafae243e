/*
 * signature_test.c
 *		Unit tests of src/signature.c; prints TAP.
 *
 *	cc -I src test/unit/signature_test.c src/signature.c -lcrypto
 *
 * The vectors were computed with two other implementations (Python's hmac and
 * the openssl program).  A case about form must be refused for its form alone,
 * so it carries a signature that is otherwise right: reference_v1() signs
 * whatever it is given, in the plainest way.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/sha.h>

#include "signature.h"

#define SECRET_B1	"whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
#define SECRET_B2	"whsec_yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f"
#define SECRET_B3	"whsec_AAECAwQFBgcICQoLDA0ODw=="
#define KEY_B3		"\0\1\2\3\4\5\6\7\10\11\12\13\14\15\16\17"	/* 16 bytes */
#define ID_B1		"d4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8"
#define SIG_B1		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc="
#define SIG_B2		"v1,XXqpprr63Swm16MVS51v339HGMXwT17lqVa67eGGGYc="
#define SIG_B3		"v1,1tt1Gfy8FJXU7vjGIaU5/XvxUQd6H6YwytZe+rnWAYg="
#define TIME_B1		INT64_C(1789402310)

#define BODY_A1		"{\"type\": \"message.delivered\", \"data\": {\"id\": " \
	"\"msg_123\", \"status\": \"delivered\"}}"
#define SECRET_A1	"your_webhook_secret_here"
#define HEX_A1		"a9cbfb6ec38a6121d878917bd17f414105f1a5e918b488f2897c4a789fa304d3"

static const char body_b1[] =
"{\"field\":\"message\",\"event\":\"message.delivered\","
"\"timestamp\":\"2026-09-14T16:11:50Z\",\"payload\":{"
"\"account_id\":\"7ba7b820-9dad-11d1-80b4-00c04fd430c8\","
"\"message_id\":\"8ba7b830-9dad-11d1-80b4-00c04fd430c8\","
"\"message_status\":\"DELIVERED\",\"channel\":\"sms\","
"\"outbound_number\":\"+14155551234\","
"\"updated_at\":\"2026-09-14T16:11:49Z\"}}";

/* Spaces, line breaks and UTF-8 that any re-serialisation would change. */
static const char body_b2[] =
"{ \"field\" : \"message\", \"event\":\"message.received\","
"\"timestamp\":\"2026-09-14T16:12:00Z\",\n"
" \"payload\":{\"inbound_number\":\"+525512345678\","
"\"outbound_number\":\"+14155550000\","
"\"text\":\"\xc2\xbf" "Cu\xc3\xa1nto? \\u2603 \xe2\x98\x83\","
"\"received_at\":\"2026-09-14T16:11:59Z\"} }\n";

/* A request as the receiver sees it. */
typedef struct Request
{
	const char *secret;
	size_t		secret_len;
	const char *header;
	size_t		header_len;
	SentdmSignedContent content;
	int64_t		now_s;
	int64_t		tolerance_s;
	int64_t		age_s;			/* result */
} Request;

static int	tests = 0;
static int	failures = 0;

static void
ok(bool passed, const char *format,...)
{
	va_list		args;

	printf("%sok %d - ", passed ? "" : "not ", ++tests);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	failures += !passed;
}

static void
set_secret(Request *request, const char *secret)
{
	request->secret = secret;
	request->secret_len = strlen(secret);
}

static void
set_header(Request *request, const char *header)
{
	request->header = header;
	request->header_len = strlen(header);
}

static void
set_id(Request *request, const char *id)
{
	request->content.id = id;
	request->content.id_len = strlen(id);
}

static void
set_timestamp(Request *request, const char *timestamp)
{
	request->content.timestamp = timestamp;
	request->content.timestamp_len = strlen(timestamp);
}

static void
set_payload(Request *request, const char *payload)
{
	request->content.payload = payload;
	request->content.payload_len = strlen(payload);
}

/* Vector B1, received in the second in which it was signed. */
static Request
request_b1(void)
{
	Request		request = {0};

	set_secret(&request, SECRET_B1);
	set_header(&request, SIG_B1);
	set_id(&request, ID_B1);
	set_timestamp(&request, "1789402310");
	set_payload(&request, body_b1);
	request.now_s = TIME_B1;
	request.tolerance_s = 300;
	return request;
}

/* Verify with a key made for the purpose. */
static SentdmSigVerdict
verify(Request *request)
{
	SentdmSigningKey key = {0};
	SentdmSigVerdict verdict;

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1,
						   request->secret, request->secret_len);
	request->age_s = -1;
	verdict = sentdm_signature_verify_v1(&key, &request->content,
										 request->header, request->header_len,
										 request->now_s, request->tolerance_s,
										 &request->age_s);
	sentdm_signing_key_clear(&key);
	return verdict;
}

static SentdmSigVerdict
verify_hex(const char *secret, const char *payload, const char *signature)
{
	SentdmSigningKey key = {0};
	SentdmSigVerdict verdict;

	sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, secret, strlen(secret));
	verdict = sentdm_signature_verify_hex(&key, payload, strlen(payload),
										  signature, strlen(signature));
	sentdm_signing_key_clear(&key);
	return verdict;
}

static void
is_verdict(SentdmSigVerdict verdict, SentdmSigVerdict expected, const char *name)
{
	ok(verdict == expected, "%s", name);
	if (verdict != expected)
		printf("# verdict %d, expected %d\n", (int) verdict, (int) expected);
}

/* The v1 signature of anything at all, well formed or not; in static memory. */
static const char *
reference_v1(const void *key, size_t key_len, const SentdmSignedContent *content)
{
	static char signature[SENTDM_SIG_V1_SIZE];
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

	HMAC(EVP_sha256(), key, (int) key_len, joined, len, mac, NULL);
	free(joined);
	strcpy(signature, "v1,");
	EVP_EncodeBlock((unsigned char *) signature + 3, mac, sizeof(mac));
	return signature;
}

static const char *
reference_hex(const void *key, size_t key_len, const void *payload, size_t len)
{
	static char signature[SENTDM_SIG_HEX_SIZE];
	unsigned char mac[32];

	HMAC(EVP_sha256(), key, (int) key_len, payload, len, mac, NULL);
	for (int i = 0; i < 32; i++)
		sprintf(signature + 2 * i, "%02x", mac[i]);
	return signature;
}

/* Sign a request with the key bytes 00..1f of vector B1, whatever its form. */
static void
sign_anyway(Request *request)
{
	unsigned char key[32];

	for (int i = 0; i < 32; i++)
		key[i] = (unsigned char) i;
	set_header(request, reference_v1(key, sizeof(key), &request->content));
}

static bool
has_sha256(const char *text, const char *expected_hex)
{
	unsigned char digest[32];
	char		hex[65];

	SHA256((const unsigned char *) text, strlen(text), digest);
	for (int i = 0; i < 32; i++)
		sprintf(hex + 2 * i, "%02x", digest[i]);
	return strcmp(hex, expected_hex) == 0;
}

/* One v1 vector: it verifies, and signing gives the same. */
static void
check_v1_vector(const char *name, Request request)
{
	SentdmSigningKey key = {0};
	char		signature[SENTDM_SIG_V1_SIZE];

	ok(verify(&request) == SENTDM_SIG_OK && request.age_s == 0,
	   "vector %s verifies", name);
	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1,
						   request.secret, request.secret_len);
	ok(sentdm_signature_sign_v1(&key, &request.content, signature) &&
	   strcmp(signature, request.header) == 0,
	   "signing gives vector %s", name);
	sentdm_signing_key_clear(&key);
}

static void
test_v1_vectors(void)
{
	Request		request = request_b1();

	ok(has_sha256(body_b1, "2154f1adefc07fd956d08c6409fc4b070c23127bfb7582432b2d440103d14787"),
	   "the body of B1 is the one that was signed");
	check_v1_vector("B1", request);

	set_secret(&request, SECRET_B2);
	set_header(&request, SIG_B2);
	set_timestamp(&request, "1789402320");
	set_payload(&request, body_b2);
	request.now_s = 1789402320;
	ok(request.content.payload_len == 235, "the body of B2 has 235 bytes");
	check_v1_vector("B2", request);

	set_header(&request, "v1,l9TEApEqgPYvZjHF9dUV11nSE3uw5RukoHZXyKT93Rw=");
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "a signature of the same JSON, serialised again, does not match");

	set_secret(&request, SECRET_B3);
	set_header(&request, SIG_B3);
	set_id(&request, "550e8400-e29b-41d4-a716-446655440000");
	set_timestamp(&request, "1705334531");
	set_payload(&request, "");
	request.now_s = 1705334531;
	check_v1_vector("B3 (empty body)", request);
	request.content.payload = NULL;
	is_verdict(verify(&request), SENTDM_SIG_OK,
			   "an empty body may have no address");

	request = request_b1();
	set_header(&request, "v1,pwUu2oyO1vf4vX8n2/05cgW4RFyAy3sIyKaJMYlKJjU=");
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "a signature keyed with the whole secret text does not match");
	set_header(&request, "v1,+s76UThm6t9Q/BDzNEIIFBiS0v/Kou70F4WxEoAYABw=");
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "a signature keyed with the undecoded base64 does not match");
}

static void
check_hex_vector(const char *name, const char *secret, const char *payload,
				 const char *hex)
{
	SentdmSigningKey key = {0};
	char		signature[SENTDM_SIG_HEX_SIZE];
	char		prefixed[80];

	snprintf(prefixed, sizeof(prefixed), "sha256=%s", hex);
	ok(verify_hex(secret, payload, hex) == SENTDM_SIG_OK,
	   "vector %s verifies", name);
	ok(verify_hex(secret, payload, prefixed) == SENTDM_SIG_OK,
	   "vector %s verifies with sha256=", name);
	sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, secret, strlen(secret));
	ok(sentdm_signature_sign_hex(&key, payload, strlen(payload), signature) &&
	   strcmp(signature, hex) == 0,
	   "signing gives vector %s", name);
	sentdm_signing_key_clear(&key);
}

static void
test_hex_vectors(void)
{
	check_hex_vector("A1", SECRET_A1, BODY_A1, HEX_A1);
	check_hex_vector("A2 (secret is not decoded)", SECRET_B1,
					 "{\"type\":\"message.failed\",\"data\":{\"id\":\"msg_124\","
					 "\"status\":\"failed\",\"error\":{\"message\":"
					 "\"n\xc3\xbamero inv\xc3\xa1lido\"}},"
					 "\"timestamp\":\"2026-02-01T10:00:00Z\"}",
					 "a734b782eb920c63d7f032fd9a02a02c2de06470ed348f62fcbffe0fda6519e5");
	check_hex_vector("A3 (empty body)", "k", "",
					 "8bb990c40a7d61cb97597a942125025be50ac8beb74436e3735b98893a7f6620");
}

/* Every length of key, and every length of payload around block boundaries. */
static void
test_lengths(void)
{
	unsigned char bytes[SENTDM_SECRET_MAX];
	char		secret[6 + SENTDM_SECRET_MAX * 4 / 3 + 4];
	char		v1[SENTDM_SIG_V1_SIZE];
	char		hex[SENTDM_SIG_HEX_SIZE];
	SentdmSigningKey key = {0};
	Request		request = request_b1();
	bool		same = true;

	for (size_t i = 0; i < sizeof(bytes); i++)
		bytes[i] = (unsigned char) (i * 73 + 41);

	strcpy(secret, "whsec_");
	for (size_t len = 1; len <= 378; len++)
	{
		EVP_EncodeBlock((unsigned char *) secret + 6, bytes, (int) len);
		same &= sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, secret, strlen(secret)) &&
			sentdm_signature_sign_v1(&key, &request.content, v1) &&
			strcmp(v1, reference_v1(bytes, len, &request.content)) == 0;
	}
	ok(same, "v1: keys of 1 to 378 bytes sign as the reference does");

	EVP_EncodeBlock((unsigned char *) secret + 6, bytes, 381);
	ok(!sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, secret, strlen(secret)),
	   "v1: a secret over 512 bytes is refused");

	same = true;
	for (size_t len = 1; len <= SENTDM_SECRET_MAX; len++)
		same &= sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, (char *) bytes, len) &&
			sentdm_signature_sign_hex(&key, body_b1, 312, hex) &&
			strcmp(hex, reference_hex(bytes, len, body_b1, 312)) == 0;
	ok(same, "hex: secrets of 1 to 512 bytes of any value sign as the reference does");
	memset(secret, 'x', SENTDM_SECRET_MAX + 1);
	ok(!sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, secret, SENTDM_SECRET_MAX + 1),
	   "hex: a secret of 513 bytes is refused");

	same = true;
	for (size_t len = 0; len <= 312; len++)
	{
		request.content.payload_len = len;
		same &= sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B3, strlen(SECRET_B3)) &&
			sentdm_signature_sign_v1(&key, &request.content, v1) &&
			strcmp(v1, reference_v1(KEY_B3, 16, &request.content)) == 0;
	}
	ok(same, "v1: payloads of 0 to 312 bytes sign as the reference does");
	sentdm_signing_key_clear(&key);
}

/* Whether a v1 secret is usable, and a key without it is not. */
static bool
secret_is_usable(const char *secret, size_t len)
{
	Request		request = request_b1();
	SentdmSigningKey key = {0};
	char		v1[SENTDM_SIG_V1_SIZE];
	bool		usable;

	usable = sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, secret, len);
	if (sentdm_signature_sign_v1(&key, &request.content, v1) != usable)
		ok(false, "a key signs if and only if its secret is usable");
	sentdm_signing_key_clear(&key);
	return usable;
}

static void
test_secret_form(void)
{
	static const char *const refused[] = {
		"", "whsec_", "whsec", "AAECAwQFBgcICQoLDA0ODw==",
		"WHSEC_AAECAwQFBgcICQoLDA0ODw==", "whsec-AAECAwQFBgcICQoLDA0ODw==",
		" whsec_AAECAwQFBgcICQoLDA0ODw==", "whsec_ AAECAwQFBgcICQoLDA0ODw==",
		"whsec_whsec_AAECAwQFBgcICQoLDA0ODw==",
		"whsec_AAECAwQFBgcICQoLDA0ODw", "whsec_AAECAwQFBgcICQoLDA0ODw=",
		"whsec_AAECAwQFBgcICQoLDA0ODw===", "whsec_AAECAwQFBgcICQoLDA0ODw==\n",
		"whsec_AAECAwQFBgcICQoLDA0O\nDw==", "whsec_AAECAwQFBgcICQoLDA0ODw==AAAA",
		"whsec_AA==AAAA", "whsec_AA=A", "whsec_A===", "whsec_====", "whsec_=",
		"whsec_=AAA", "whsec_AAECAwQFBgcICQoLDA0ODx==", "whsec_AAF=",
		"whsec_AAECAwQFBgcI-QoLDA0ODw==", "whsec_AAECAwQFBgcI_QoLDA0ODw==",
		"whsec_AAAA===="
	};
	static const char alphabet[] =
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	Request		request = request_b1();
	char		secret[] = "whsec_AAAA";
	bool		right = true;

	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
		if (secret_is_usable(refused[i], strlen(refused[i])))
			ok(false, "secret %s is refused", refused[i]);
	ok(true, "secrets that are not canonical are refused");
	ok(!secret_is_usable(NULL, 0), "no secret is refused");
	ok(!secret_is_usable("whsec_AAA\0", 10), "a secret with a zero byte is refused");
	ok(secret_is_usable("whsec_AA==", 10), "a key of one byte is usable");
	ok(secret_is_usable("whsec_+/+/", 10), "the whole standard alphabet is usable");

	for (int position = 6; position < 10; position++)
		for (int c = 0; c < 256; c++)
		{
			bool		digit = c != 0 && strchr(alphabet, c) != NULL;

			memcpy(secret, "whsec_AAAA", 10);
			secret[position] = (char) c;
			if (position == 9 && c == '=')
				digit = true;	/* padding of a key of two bytes */
			right &= secret_is_usable(secret, 10) == digit;
		}
	ok(right, "of all 256 bytes exactly the base64 digits are digits");

	right = true;
	for (int i = 0; i < 64; i++)
	{
		unsigned char bytes[3] = {(unsigned char) (i << 2), 0, (unsigned char) i};

		memcpy(secret, "whsec_AAAA", 10);
		secret[6] = secret[9] = alphabet[i];
		set_secret(&request, secret);
		set_header(&request, reference_v1(bytes, 3, &request.content));
		right &= verify(&request) == SENTDM_SIG_OK;
	}
	ok(right, "every base64 digit has its value");

	set_secret(&request, "");
	set_header(&request, reference_v1("", 0, &request.content));
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "v1: an empty secret does not match the signature of an empty key");
	set_secret(&request, "whsec_");
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "v1: whsec_ alone does not match the signature of an empty key");
	is_verdict(verify_hex("", BODY_A1, reference_hex("", 0, BODY_A1, strlen(BODY_A1))),
			   SENTDM_SIG_MISMATCH,
			   "hex: an empty secret does not match the signature of an empty key");
}

static void
test_timestamp_form(void)
{
	static const struct
	{
		const char *text;
		size_t		len;
		const char *name;
	}			refused[] = {
		{"", 0, "empty"}, {NULL, 0, "absent"}, {"0", 1, "zero"},
		{"01789402310", 11, "with a leading zero"},
		{"+1789402310", 11, "with a plus"}, {"-1789402310", 11, "negative"},
		{" 1789402310", 11, "after a space"}, {"1789402310 ", 11, "before a space"},
		{"1789402310\n", 11, "before a line feed"},
		{"1789402310\0", 11, "before a zero byte"},
		{"1789402310.0", 12, "with a fraction"}, {"0x6aa81b86", 10, "hexadecimal"},
		{"1e9", 3, "with an exponent"}, {"178940231/", 10, "with the byte before 0"},
		{"178940231:", 10, "with the byte after 9"},
		{"17894023\xd9\xa1", 10, "with an Arabic digit"},
		{"1789402310000", 13, "of 13 digits"},
		{"99999999999999999999", 20, "over 64 bits"},
		{"18446744075498953926", 20, "that wraps around to the right one"}
	};
	Request		request = request_b1();

	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
	{
		request.content.timestamp = refused[i].len > 0 ? refused[i].text : "";
		request.content.timestamp_len = refused[i].len;
		request.tolerance_s = INT64_MAX;
		sign_anyway(&request);
		request.content.timestamp = refused[i].text;
		ok(verify(&request) == SENTDM_SIG_MALFORMED && request.age_s == 0,
		   "a timestamp %s is malformed", refused[i].name);
	}

	set_timestamp(&request, "1");
	sign_anyway(&request);
	request.now_s = 1;
	request.tolerance_s = 0;
	is_verdict(verify(&request), SENTDM_SIG_OK, "a timestamp of one digit is right");
	set_timestamp(&request, "998877665544");
	sign_anyway(&request);
	request.now_s = INT64_C(998877665544);
	is_verdict(verify(&request), SENTDM_SIG_OK, "a timestamp of 12 digits is right");
}

static void
test_id_form(void)
{
	static const char *const refused[] = {"", ".", "a.b", "a.", ".b", "a.b.c"};
	Request		request = request_b1();

	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
	{
		set_id(&request, refused[i]);
		sign_anyway(&request);
		ok(verify(&request) == SENTDM_SIG_MALFORMED && request.age_s == 0,
		   "the webhook id \"%s\" is malformed", refused[i]);
	}
	request.content.id = NULL;
	request.content.id_len = 0;
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED, "no webhook id is malformed");

	set_id(&request, "any other text \xc3\xbc");
	sign_anyway(&request);
	is_verdict(verify(&request), SENTDM_SIG_OK, "a webhook id need not be a UUID");
	set_id(&request, "D4F5A6B7-C8D9-4E0F-A1B2-C3D4E5F6A7B8");
	set_header(&request, SIG_B1);
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH,
			   "a webhook id is compared as it is spelt");
}

/* Verdict on B1 with another header. */
static SentdmSigVerdict
verify_header(const char *header)
{
	Request		request = request_b1();

	set_header(&request, header);
	return verify(&request);
}

static void
test_header_form(void)
{
	static const char *const malformed[] = {
		"", " ", "v1", "v1,", "v1, ", "v1,=", "v1,============================================",
		"xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"V1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1=xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1 xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1, xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v2,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1a,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"sha256=xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc==",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovg==",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgcA",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgd=",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=AAAA",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=,",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=\t",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=\n",
		"\tv1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=",
		"v1,\nxLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc",
		"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZ\nvgc=",
		"\"v1,xLm2525QZ1vo8Mx8G8KVXG3OuyKgTWf9qYAABrZovgc=\"",
		"v1,c4b9b6db9e50675be8f0cc7c1bc2955c6dcebb22a04d67fda9800006b668be07"
	};
	Request		request = request_b1();

	for (size_t i = 0; i < sizeof(malformed) / sizeof(malformed[0]); i++)
		if (verify_header(malformed[i]) != SENTDM_SIG_MALFORMED)
			ok(false, "header %s is malformed", malformed[i]);
	ok(true, "headers without a canonical v1 signature are malformed");
	request.header = NULL;
	request.header_len = 0;
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED, "no header is malformed");
	request.header = SIG_B1 "\0";
	request.header_len = strlen(SIG_B1) + 1;
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED,
			   "a zero byte after the signature is malformed");

	/* B3's signature has both + and /, which URL-safe base64 spells - and _. */
	set_secret(&request, SECRET_B3);
	set_id(&request, "550e8400-e29b-41d4-a716-446655440000");
	set_timestamp(&request, "1705334531");
	set_payload(&request, "");
	request.now_s = 1705334531;
	set_header(&request, "v1,1tt1Gfy8FJXU7vjGIaU5_XvxUQd6H6YwytZe-rnWAYg=");
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED, "URL-safe base64 is malformed");
}

static void
test_header_lists(void)
{
	char		header[SENTDM_SIG_HEADER_MAX + 2];
	Request		request = request_b1();

	is_verdict(verify_header(SIG_B2), SENTDM_SIG_MISMATCH,
			   "a signature of something else does not match");
	is_verdict(verify_header(SIG_B2 " " SIG_B1), SENTDM_SIG_OK,
			   "the second of two signatures may match");
	is_verdict(verify_header(SIG_B1 " " SIG_B2), SENTDM_SIG_OK,
			   "the first of two signatures may match");
	is_verdict(verify_header(SIG_B2 " " SIG_B3), SENTDM_SIG_MISMATCH,
			   "two wrong signatures do not match");
	is_verdict(verify_header("v2,abc v1a,xyz " SIG_B1 " v3,=="), SENTDM_SIG_OK,
			   "other versions are ignored");
	is_verdict(verify_header("v1,short " SIG_B1), SENTDM_SIG_OK,
			   "a broken v1 entry does not hide a right one");
	is_verdict(verify_header("v1,short " SIG_B2), SENTDM_SIG_MISMATCH,
			   "a broken v1 entry does not match");
	is_verdict(verify_header("  " SIG_B2 "   " SIG_B1 "  "), SENTDM_SIG_OK,
			   "extra spaces are no entries");
	is_verdict(verify_header(SIG_B2 "," SIG_B1), SENTDM_SIG_MALFORMED,
			   "a comma does not separate signatures");

	header[0] = '\0';
	for (int i = 0; i < 15; i++)
		strcat(header, "v2,x ");
	strcat(header, SIG_B1);
	is_verdict(verify_header(header), SENTDM_SIG_OK, "16 entries are read");
	strcat(header, " v2,x");
	is_verdict(verify_header(header), SENTDM_SIG_MALFORMED, "17 entries are malformed");
	header[0] = '\0';
	for (int i = 0; i < 15; i++)
		strcat(header, SIG_B2 " ");
	strcat(header, SIG_B1);
	is_verdict(verify_header(header), SENTDM_SIG_OK, "the last of 16 signatures may match");
	strcat(header, " " SIG_B1);
	is_verdict(verify_header(header), SENTDM_SIG_MALFORMED, "17 signatures are malformed");

	memset(header, ' ', sizeof(header));
	memcpy(header, SIG_B1, strlen(SIG_B1));
	request.header = header;
	request.header_len = 4096;
	is_verdict(verify(&request), SENTDM_SIG_OK, "a header of 4096 bytes is read");
	request.header_len = 4097;
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED, "a header of 4097 bytes is malformed");
}

/* How many single-bit flips of a buffer leave the request authentic. */
static int
count_accepted_flips(Request *request, char *buffer, size_t len)
{
	int			accepted = 0;

	for (size_t bit = 0; bit < len * 8; bit++)
	{
		SentdmSigVerdict verdict;

		buffer[bit / 8] ^= (char) (1 << bit % 8);
		verdict = verify(request);
		accepted += verdict != SENTDM_SIG_MISMATCH && verdict != SENTDM_SIG_MALFORMED;
		accepted += request->age_s != 0;
		buffer[bit / 8] ^= (char) (1 << bit % 8);
	}
	return accepted;
}

static void
test_bit_flips(void)
{
	Request		request = request_b1();
	char		payload[512];
	char		header[64];
	char		id[64];
	char		timestamp[16];
	char		secret[64];
	char		hex[] = HEX_A1;
	int			accepted = 0;

	request.content.payload = strcpy(payload, body_b1);
	request.header = strcpy(header, SIG_B1);
	request.content.id = strcpy(id, ID_B1);
	request.content.timestamp = strcpy(timestamp, "1789402310");
	request.secret = strcpy(secret, SECRET_B1);
	request.tolerance_s = INT64_MAX;

	is_verdict(verify(&request), SENTDM_SIG_OK, "the request to be damaged is right");
	ok(count_accepted_flips(&request, payload, strlen(payload)) == 0,
	   "no flipped bit of the payload is accepted");
	ok(count_accepted_flips(&request, header, strlen(header)) == 0,
	   "no flipped bit of the signature is accepted");
	ok(count_accepted_flips(&request, id, strlen(id)) == 0,
	   "no flipped bit of the webhook id is accepted");
	ok(count_accepted_flips(&request, timestamp, strlen(timestamp)) == 0,
	   "no flipped bit of the timestamp is accepted");
	ok(count_accepted_flips(&request, secret, strlen(secret)) == 0,
	   "no flipped bit of the secret is accepted");

	request.content.payload_len--;
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH, "a shortened payload does not match");
	request.content.payload_len += 2;
	is_verdict(verify(&request), SENTDM_SIG_MISMATCH, "a lengthened payload does not match");

	for (size_t bit = 0; bit < strlen(HEX_A1) * 8; bit++)
	{
		hex[bit / 8] ^= (char) (1 << bit % 8);
		accepted += verify_hex(SECRET_A1, BODY_A1, hex) == SENTDM_SIG_OK;
		hex[bit / 8] ^= (char) (1 << bit % 8);
	}
	ok(accepted == 0, "no flipped bit of a hex signature is accepted");
	is_verdict(verify_hex(SECRET_A1 "x", BODY_A1, HEX_A1), SENTDM_SIG_MISMATCH,
			   "hex: another secret does not match");
	is_verdict(verify_hex(SECRET_A1, BODY_A1 " ", HEX_A1), SENTDM_SIG_MISMATCH,
			   "hex: another payload does not match");
}

static void
is_age(int64_t now_s, int64_t tolerance_s, SentdmSigVerdict verdict, int64_t age_s,
	   const char *name)
{
	Request		request = request_b1();

	request.now_s = now_s;
	request.tolerance_s = tolerance_s;
	ok(verify(&request) == verdict && request.age_s == age_s, "%s", name);
}

static void
test_age(void)
{
	Request		request = request_b1();

	is_age(TIME_B1 + 299, 300, SENTDM_SIG_OK, 299, "299 s old is in time");
	is_age(TIME_B1 + 300, 300, SENTDM_SIG_OK, 300, "300 s old is in time");
	is_age(TIME_B1 + 301, 300, SENTDM_SIG_TOO_OLD, 301, "301 s old is too old");
	is_age(TIME_B1 + 86400, 300, SENTDM_SIG_TOO_OLD, 86400, "a day old is too old, and authentic");
	is_age(TIME_B1 - 300, 300, SENTDM_SIG_OK, -300, "300 s ahead is in time");
	is_age(TIME_B1 - 301, 300, SENTDM_SIG_IN_FUTURE, -301, "301 s ahead is in the future");
	is_age(TIME_B1, 0, SENTDM_SIG_OK, 0, "without tolerance the same second is in time");
	is_age(TIME_B1 + 1, 0, SENTDM_SIG_TOO_OLD, 1, "without tolerance one second is too old");
	is_age(TIME_B1 - 1, 0, SENTDM_SIG_IN_FUTURE, -1, "without tolerance one second is in the future");
	is_age(TIME_B1, -1, SENTDM_SIG_TOO_OLD, 0, "a negative tolerance accepts not even now");
	is_age(TIME_B1 - 5, -10, SENTDM_SIG_IN_FUTURE, -5, "a negative tolerance accepts no future");
	is_age(TIME_B1 + 5, INT64_MIN, SENTDM_SIG_TOO_OLD, 5, "the smallest tolerance accepts nothing");
	is_age(TIME_B1 - 5, INT64_MIN, SENTDM_SIG_IN_FUTURE, -5, "the smallest tolerance accepts no future");
	is_age(INT64_MAX, 300, SENTDM_SIG_TOO_OLD, INT64_MAX - TIME_B1, "the end of time is too late");
	is_age(INT64_MAX, INT64_MAX, SENTDM_SIG_OK, INT64_MAX - TIME_B1, "the largest tolerance accepts it");
	is_age(INT64_MIN, 300, SENTDM_SIG_IN_FUTURE, -INT64_MAX, "the beginning of time is too early");
	is_age(INT64_MIN, INT64_MAX, SENTDM_SIG_OK, -INT64_MAX, "an age never overflows");

	set_header(&request, SIG_B2);
	request.now_s += 301;
	ok(verify(&request) == SENTDM_SIG_MISMATCH && request.age_s == 0,
	   "the age of a wrong signature is not told");
}

static void
test_hex_form(void)
{
	static const char *const malformed[] = {
		"", "sha256=", "a9cbfb6e", HEX_A1 "0", HEX_A1 "\n", HEX_A1 " ", " " HEX_A1,
		"9cbfb6ec38a6121d878917bd17f414105f1a5e918b488f2897c4a789fa304d3",
		"A9CBFB6EC38A6121D878917BD17F414105F1A5E918B488F2897C4A789FA304D3",
		"a9cbfb6ec38a6121d878917bd17f414105f1a5e918b488f2897c4a789fa304D3",
		"SHA256=" HEX_A1, "Sha256=" HEX_A1, "sha256:" HEX_A1, "sha256= " HEX_A1,
		"sha256=sha256=" HEX_A1, "sha1=" HEX_A1, "v1," HEX_A1, "0x" HEX_A1,
		"qcv7bsOKYSHYeJF70X9BQQXxpekYtIjyiXxKeJ+jBNM="
	};
	char		hex[] = HEX_A1;
	bool		right = true;

	for (size_t i = 0; i < sizeof(malformed) / sizeof(malformed[0]); i++)
		if (verify_hex(SECRET_A1, BODY_A1, malformed[i]) != SENTDM_SIG_MALFORMED)
			ok(false, "hex: %s is malformed", malformed[i]);
	ok(true, "hex: what is not 64 lower-case digits is malformed");

	for (int position = 0; position < 64; position++)
		for (int c = 1; c < 256; c++)
		{
			SentdmSigVerdict expected = SENTDM_SIG_MALFORMED;

			if (c == HEX_A1[position])
				expected = SENTDM_SIG_OK;
			else if (strchr("0123456789abcdef", c) != NULL)
				expected = SENTDM_SIG_MISMATCH;
			hex[position] = (char) c;
			right &= verify_hex(SECRET_A1, BODY_A1, hex) == expected;
			hex[position] = HEX_A1[position];
		}
	ok(right, "hex: every byte but the right digit is refused, everywhere");
}

static void
test_schemes_apart(void)
{
	Request		request = request_b1();
	SentdmSigningKey key = {0};
	char		v1[SENTDM_SIG_V1_SIZE] = "x";
	char		hex[SENTDM_SIG_HEX_SIZE] = "x";

	is_verdict(sentdm_signature_verify_v1(&key, &request.content, SIG_B1, strlen(SIG_B1),
										  TIME_B1, 300, &request.age_s),
			   SENTDM_SIG_MISMATCH, "v1: a key of zeroes matches nothing");
	is_verdict(sentdm_signature_verify_hex(&key, BODY_A1, strlen(BODY_A1), HEX_A1, strlen(HEX_A1)),
			   SENTDM_SIG_MISMATCH, "hex: a key of zeroes matches nothing");
	ok(!sentdm_signature_sign_v1(&key, &request.content, v1) && v1[0] == '\0' &&
	   !sentdm_signature_sign_hex(&key, "x", 1, hex) && hex[0] == '\0',
	   "a key of zeroes signs nothing");

	/* Both schemes with the same HMAC key: only the scheme can refuse. */
	sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, KEY_B3, 16);
	set_header(&request, reference_v1(KEY_B3, 16, &request.content));
	is_verdict(sentdm_signature_verify_v1(&key, &request.content,
										  request.header, request.header_len,
										  TIME_B1, 300, &request.age_s),
			   SENTDM_SIG_MISMATCH, "a hex key does not match a v1 signature");
	ok(!sentdm_signature_sign_v1(&key, &request.content, v1) && v1[0] == '\0',
	   "a hex key does not make a v1 signature");

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B3, strlen(SECRET_B3));
	is_verdict(sentdm_signature_verify_hex(&key, body_b1, strlen(body_b1),
										   reference_hex(KEY_B3, 16, body_b1, strlen(body_b1)), 64),
			   SENTDM_SIG_MISMATCH, "a v1 key does not match a hex signature");
	ok(!sentdm_signature_sign_hex(&key, body_b1, strlen(body_b1), hex) && hex[0] == '\0',
	   "a v1 key does not make a hex signature");

	set_secret(&request, SECRET_B1);
	set_header(&request, reference_hex(SECRET_B1, strlen(SECRET_B1), body_b1, strlen(body_b1)));
	is_verdict(verify(&request), SENTDM_SIG_MALFORMED,
			   "a right signature of the older scheme is no v1 signature");
	sentdm_signing_key_clear(&key);
}

static void
test_key_reuse(void)
{
	static const char *const secrets[] = {SECRET_B1, SECRET_B2, SECRET_B3};
	SentdmSigningKey key = {0};
	SentdmSigningKey zeroes;
	Request		request = request_b1();
	char		signatures[3][SENTDM_SIG_V1_SIZE];
	char		v1[SENTDM_SIG_V1_SIZE];
	char		hex[SENTDM_SIG_HEX_SIZE];
	bool		right = true;

	memset(&zeroes, 0, sizeof(zeroes));

	for (int i = 0; i < 3; i++)
	{
		sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, secrets[i], strlen(secrets[i]));
		sentdm_signature_sign_v1(&key, &request.content, signatures[i]);
		sentdm_signing_key_clear(&key);
	}
	for (int i = 0; i < 3000; i++)
	{
		int			secret = i * i / 7 % 3;
		int			signature = i % 3;

		right &= sentdm_signing_key_set(&key, SENTDM_SCHEME_V1,
										secrets[secret], strlen(secrets[secret]));
		right &= sentdm_signature_verify_v1(&key, &request.content,
											signatures[signature], strlen(signatures[signature]),
											TIME_B1, 0, &request.age_s) ==
			(secret == signature ? SENTDM_SIG_OK : SENTDM_SIG_MISMATCH);
	}
	ok(right, "a kept key follows its secret through many changes");

	right = sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, secrets[1], strlen(secrets[1]));
	for (int i = 0; i < 100; i++)
		right &= sentdm_signature_sign_v1(&key, &request.content, v1) &&
			strcmp(v1, signatures[1]) == 0;
	ok(right, "a kept key gives the same signature every time");

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1));
	ok(sentdm_signing_key_set(&key, SENTDM_SCHEME_HEX, SECRET_B1, strlen(SECRET_B1)) &&
	   sentdm_signature_sign_hex(&key, "x", 1, hex) &&
	   strcmp(hex, reference_hex(SECRET_B1, strlen(SECRET_B1), "x", 1)) == 0,
	   "the same secret can be kept for the other scheme");

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1));
	ok(!sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1) - 1) &&
	   !sentdm_signature_sign_v1(&key, &request.content, v1),
	   "a bad secret does not leave the one before in place");

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1));
	sentdm_signing_key_clear(&key);
	ok(memcmp(&key, &zeroes, sizeof(key)) == 0, "a cleared key is erased");
	sentdm_signing_key_clear(&key);
	ok(sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1)),
	   "a key cleared twice can be set again");
	sentdm_signing_key_clear(&key);
}

static void
test_sign_refuses(void)
{
	SentdmSigningKey key = {0};
	Request		request = request_b1();
	char		v1[SENTDM_SIG_V1_SIZE] = "x";

	sentdm_signing_key_set(&key, SENTDM_SCHEME_V1, SECRET_B1, strlen(SECRET_B1));
	set_id(&request, "a.b");
	ok(!sentdm_signature_sign_v1(&key, &request.content, v1) && v1[0] == '\0',
	   "a webhook id with a dot is not signed");
	request = request_b1();
	set_timestamp(&request, "01789402310");
	strcpy(v1, "x");
	ok(!sentdm_signature_sign_v1(&key, &request.content, v1) && v1[0] == '\0',
	   "a timestamp with a leading zero is not signed");
	sentdm_signing_key_clear(&key);
}

int
main(void)
{
	test_v1_vectors();
	test_hex_vectors();
	test_lengths();
	test_secret_form();
	test_timestamp_form();
	test_id_form();
	test_header_form();
	test_header_lists();
	test_bit_flips();
	test_age();
	test_hex_form();
	test_schemes_apart();
	test_key_reuse();
	test_sign_refuses();
	printf("1..%d\n", tests);
	return failures == 0 ? 0 : 1;
}
