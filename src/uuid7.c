/*
 * uuid7.c
 *		Time-ordered ids (RFC 9562, version 7, with the fraction of the
 *		millisecond in the twelve bits after the version).
 */
#include "postgres.h"

#include <time.h>

#include "uuid7.h"

#define RANDOM_BYTES 8
#define IDS_PER_FETCH 64

/* Cryptographic randomness, fetched for many ids at once. */
static void
random_bytes(unsigned char *bytes)
{
	static unsigned char stock[RANDOM_BYTES * IDS_PER_FETCH];
	static int	left = 0;

	if (left == 0)
	{
		if (!pg_strong_random(stock, sizeof(stock)))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not generate random values")));
		left = IDS_PER_FETCH;
	}
	left--;
	memcpy(bytes, stock + left * RANDOM_BYTES, RANDOM_BYTES);
}

void
sentdm_uuid7(pg_uuid_t *uuid)
{
	static uint64 last = 0;
	struct timespec now;
	uint64		time_ms_12;		/* milliseconds, and 4096ths of one */

	clock_gettime(CLOCK_REALTIME, &now);
	time_ms_12 = ((uint64) now.tv_sec * 1000 + now.tv_nsec / 1000000) << 12 |
		(uint64) (now.tv_nsec % 1000000) * 4096 / 1000000;
	/* The clock may stand still or step back: ids must not. */
	if (time_ms_12 <= last)
		time_ms_12 = last + 1;
	last = time_ms_12;

	for (int i = 0; i < 6; i++)
		uuid->data[i] = (unsigned char) (time_ms_12 >> (52 - 8 * i));
	uuid->data[6] = (unsigned char) (0x70 | ((time_ms_12 >> 8) & 0x0f));
	uuid->data[7] = (unsigned char) time_ms_12;
	random_bytes(uuid->data + 8);
	uuid->data[8] = (uuid->data[8] & 0x3f) | 0x80;
}

int64
sentdm_uuid7_time(const pg_uuid_t *uuid)
{
	int64		time_ms_12 = 0;

	for (int i = 0; i < 6; i++)
		time_ms_12 = time_ms_12 << 8 | uuid->data[i];
	return time_ms_12 << 12 | (uuid->data[6] & 0x0f) << 8 | uuid->data[7];
}
