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

#include "answer.h"

extern int	LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* In the server a memory context takes the parser's memory back. */
extern const char *__asan_default_options(void);

const char *
__asan_default_options(void)
{
	return "detect_leaks=0";
}

/* What the rest of the worker relies on. */
static void
check(const SentdmAnswer *answer)
{
	if (!answer->readable && (answer->success || answer->n_sent != 0 || answer->error != NULL))
		abort();
	if (answer->error != NULL && strlen(answer->error) > 500)
		abort();
	if (memchr(answer->error_code, '\0', sizeof(answer->error_code)) == NULL ||
		memchr(answer->request_id, '\0', sizeof(answer->request_id)) == NULL)
		abort();
	for (int i = 0; i < answer->n_sent; i++)
	{
		if (strlen(answer->sent[i].sent_id) != 36)
			abort();
	}
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	SentdmAnswer answer;

	sentdm_answer_parse((const char *) data, size, &answer);
	check(&answer);
	if (answer.error != NULL)
		pfree(answer.error);
	if (answer.sent != NULL)
		pfree(answer.sent);
	return 0;
}
