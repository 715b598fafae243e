/*
 * check.h
 *		What the fuzz targets share: a check that stays on, and the decoding of
 *		base64 by libcrypto.
 */
#ifndef FUZZ_CHECK_H
#define FUZZ_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

#define CHECK(condition) \
	do { \
		if (!(condition)) \
		{ \
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

/*
 * Decode base64 with libcrypto, and return the number of bytes; only text that it
 * encodes back the same counts, else -1.
 */
static inline int
reference_base64(const char *text, size_t len, unsigned char *bytes)
{
	unsigned char *again = malloc(len + 4);
	char	   *copy = malloc(len + 1);
	int			nbytes = -1;

	memcpy(copy, text, len);
	copy[len] = '\0';
	if (len > 0 && len % 4 == 0 && strlen(copy) == len)
		nbytes = EVP_DecodeBlock(bytes, (unsigned char *) copy, (int) len);
	if (nbytes > 0)
	{
		nbytes -= (copy[len - 1] == '=') + (copy[len - 2] == '=');
		EVP_EncodeBlock(again, bytes, nbytes);
		if (strcmp((char *) again, copy) != 0)
			nbytes = -1;
	}
	free(copy);
	free(again);
	return nbytes;
}

#endif							/* FUZZ_CHECK_H */
