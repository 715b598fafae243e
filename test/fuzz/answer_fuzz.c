/*
 * answer_fuzz.c
 *		Fuzz target (libFuzzer) of src/answer.c: whatever comes over the network
 *		instead of an answer of the API.
 *
 * parts: answer
 * flags: -DFRONTEND
 * libs: -lpgcommon -lpgport
 */
#include "postgres_fe.h"

#include <malloc.h>

#include "answer.h"

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/*
 * In the server a memory context takes back what the parser does not.  So these,
 * instead of libpgcommon's, remember what they gave.
 */
typedef struct Chunk
{
	struct Chunk *next;
	struct Chunk *previous;
	char		data[] __attribute__((aligned(16)));
} Chunk;

static Chunk chunks = {&chunks, &chunks};

void *
palloc(Size size)
{
	Chunk	   *chunk = malloc(offsetof(Chunk, data) + size);

	if (chunk == NULL)
		abort();
	chunk->next = chunks.next;
	chunk->previous = &chunks;
	chunks.next->previous = chunk;
	chunks.next = chunk;
	return chunk->data;
}

void
pfree(void *pointer)
{
	Chunk	   *chunk = (Chunk *) ((char *) pointer - offsetof(Chunk, data));

	chunk->next->previous = chunk->previous;
	chunk->previous->next = chunk->next;
	free(chunk);
}

void *
palloc0(Size size)
{
	return memset(palloc(size), 0, size);
}

/* Always to another place, so that a pointer to the old one is found out. */
void *
repalloc(void *pointer, Size size)
{
	Chunk	   *chunk = (Chunk *) ((char *) pointer - offsetof(Chunk, data));
	size_t		old = malloc_usable_size(chunk) - offsetof(Chunk, data);
	void	   *copy = palloc(size);

	memcpy(copy, pointer, old < size ? old : size);
	pfree(pointer);
	return copy;
}

char *
pstrdup(const char *string)
{
	return strcpy(palloc(strlen(string) + 1), string);
}

char *
pnstrdup(const char *string, Size size)
{
	Size		length = strnlen(string, size);
	char	   *copy = palloc(length + 1);

	memcpy(copy, string, length);
	copy[length] = '\0';
	return copy;
}

/* What the rest of the worker relies on. */
static void
check(const SentdmAnswer *answer)
{
	const char *packed = answer->sent;
	SentdmSent	sent;

	if (!answer->readable && (answer->success || answer->n_sent != 0 || answer->error != NULL))
		abort();
	if (answer->error != NULL && strlen(answer->error) > 500)
		abort();
	if (memchr(answer->error_code, '\0', sizeof(answer->error_code)) == NULL ||
		memchr(answer->request_id, '\0', sizeof(answer->request_id)) == NULL)
		abort();
	for (int i = 0; i < answer->n_sent; i++)
	{
		packed = sentdm_answer_sent(packed, &sent);
		if (packed > answer->sent + answer->sent_bytes)
			abort();
	}
	if (answer->n_sent == 0 ? answer->sent_bytes != 0 : packed != answer->sent + answer->sent_bytes)
		abort();
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	SentdmAnswer answer;

	sentdm_answer_parse((const char *) data, size, &answer);
	check(&answer);
	while (chunks.next != &chunks)
		pfree(chunks.next->data);
	return 0;
}
