/*
 * drain_sim.c
 *		A whole world in one process, to find out whether the promises hold.
 *
 * Drives the real drain.c and request.c through random schedules: a model of
 * the database (visible and durable state, transactions that fail, are rolled
 * back or get lost), of the worker (claim, submit, settle; it may die between
 * any two steps), of the network, of Sent (idempotency keys that live 24 hours,
 * a rate limit, refusals, every kind of failure) and of the people around it
 * (cancel, retry, pause, a clock that jumps).  Sent's ledger and the database
 * are then compared with what was promised.  The invariants have the names that
 * they have in test/t/SentdmChecker.pm: I1 to I7 and I9; I8 (transactions of the
 * worker), I10 (its memory) and I11 (the log) need the real worker.  I4 is also
 * violated by what leaves without being held, I5 by what leaves although Sent asked
 * to wait, or the account is stopped, or was and another request tries it.
 *
 * Everything follows from the seed of a schedule: the same seed shows the same
 * schedule again, with --verbose as a trace.
 *
 *		cc -O2 -I src -o drain_sim test/sim/drain_sim.c src/drain.c src/request.c
 *		./drain_sim --schedules 20000 --seed 1
 *		./drain_sim --schedules 1 --seed 4711 --verbose
 *		./drain_sim --self-test
 */
#include "drain.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MS				INT64_C(1000)
#define SECOND			INT64_C(1000000)
#define MINUTE			(60 * SECOND)
#define HOUR			(60 * MINUTE)
#define NEVER			INT64_MAX

#define MAX_MESSAGES	20
#define MAX_RECIPIENTS	6
#define MAX_CHANNELS	2
#define MAX_ROWS		128
#define MAX_REQUESTS	128
#define MAX_OPERATIONS	128
#define MAX_WINDOWS		4
#define MAX_ENTRIES		256
#define MAX_IDS			1024
#define MAX_ARRIVALS	4096
#define MAX_STEPS		2000000

/* 2026-09-14 16:11:50 UTC; the monotonic clock starts elsewhere */
#define WALL_BASE		(INT64_C(1789402310) * SECOND)
#define MONOTONIC_BASE	(INT64_C(5000) * SECOND)

#define KEY_LIFE		(24 * HOUR)
#define REQUEST_TIMEOUT	(30 * SECOND)

/* As in the worker. */
#define SETTLE_WITHIN	(5 * MS)
#define LONGEST_AHEAD	SECOND

/*
 * Ages in rows are wall clock time, so a clock that is set back makes them too
 * small.  The hour between uncertain_after and the end of a key's life covers
 * what happens in practice; jumps stay within it.
 */
#define MAX_CLOCK_ERROR	(25 * MINUTE)

/* Nothing may take longer than this once all faults are over. */
#define PATIENCE		(60 * HOUR)

/*
 * Mutations: what the checker must notice.
 */
typedef enum Mutation
{
	NO_MUTATION,
	FRESH_KEY,
	CHANGED_BODY,
	SPLIT_SAME_KEY,
	CLAIM_NOT_DURABLE,
	CLAIM_NOT_COMMITTED,
	DIRTY_READ,
	TIMED_RESCUE,
	NO_RESCUE,
	RESCUE_DELETES,
	RESCUE_FORGETS,
	FORGET_AMBIGUITY,
	NEVER_UNCERTAIN,
	IGNORE_EXPIRY,
	IGNORE_DEADLINE,
	IGNORE_LIMIT,
	FULL_BUCKETS,
	IGNORE_429,
	IGNORE_PAUSE,
	IGNORE_RESUME,
	IGNORE_DOUBT,
	CANCEL_CLAIMED,
	CANCEL_AMBIGUOUS,
	RETRY_ALL,
	DROP_REPLAYED_IDS,
	SETTLE_TWICE_SPLIT,
	REFUSED_IS_LOST,
	TIMEOUT_IS_FAILURE,
	RELEASE_FORGETS,
	RELEASE_STARTS,
	NEVER_RELEASE,
	MUTATIONS
} Mutation;

static const char *const mutation_names[MUTATIONS] = {
	[NO_MUTATION] = "none",
	[FRESH_KEY] = "fresh-key",
	[CHANGED_BODY] = "changed-body",
	[SPLIT_SAME_KEY] = "split-same-key",
	[CLAIM_NOT_DURABLE] = "claim-not-durable",
	[CLAIM_NOT_COMMITTED] = "claim-not-committed",
	[DIRTY_READ] = "dirty-read",
	[TIMED_RESCUE] = "timed-rescue",
	[NO_RESCUE] = "no-rescue",
	[RESCUE_DELETES] = "rescue-deletes",
	[RESCUE_FORGETS] = "rescue-forgets",
	[FORGET_AMBIGUITY] = "forget-ambiguity",
	[NEVER_UNCERTAIN] = "never-uncertain",
	[IGNORE_EXPIRY] = "ignore-expiry",
	[IGNORE_DEADLINE] = "ignore-deadline",
	[IGNORE_LIMIT] = "ignore-limit",
	[FULL_BUCKETS] = "full-buckets",
	[IGNORE_429] = "ignore-429",
	[IGNORE_PAUSE] = "ignore-pause",
	[IGNORE_RESUME] = "ignore-resume",
	[IGNORE_DOUBT] = "ignore-doubt",
	[CANCEL_CLAIMED] = "cancel-claimed",
	[CANCEL_AMBIGUOUS] = "cancel-ambiguous",
	[RETRY_ALL] = "retry-all",
	[DROP_REPLAYED_IDS] = "drop-replayed-ids",
	[SETTLE_TWICE_SPLIT] = "split-keeps-whole",
	[REFUSED_IS_LOST] = "refused-is-lost",
	[TIMEOUT_IS_FAILURE] = "timeout-is-failure",
	[RELEASE_FORGETS] = "release-forgets",
	[RELEASE_STARTS] = "release-starts",
	[NEVER_RELEASE] = "never-release",
};

static const char *const mutation_texts[MUTATIONS] = {
	[NO_MUTATION] = "the code as it is",
	[FRESH_KEY] = "every attempt has a new Idempotency-Key",
	[CHANGED_BODY] = "a retry is not the same bytes",
	[SPLIT_SAME_KEY] = "the parts of a request keep its key",
	[CLAIM_NOT_DURABLE] = "the claim does not wait for the disk",
	[CLAIM_NOT_COMMITTED] = "the request leaves before the claim is committed",
	[DIRTY_READ] = "messages are sent before their transaction has committed",
	[TIMED_RESCUE] = "claims are taken back after a while",
	[NO_RESCUE] = "a new worker leaves the old claims alone",
	[RESCUE_DELETES] = "a new worker drops the old claims",
	[RESCUE_FORGETS] = "a rescued message is no longer ambiguous",
	[FORGET_AMBIGUITY] = "a message put back is no longer ambiguous",
	[NEVER_UNCERTAIN] = "ambiguous messages are tried for ever",
	[IGNORE_EXPIRY] = "expires_at is not looked at",
	[IGNORE_DEADLINE] = "expires_at is not looked at once more when the connection stands",
	[IGNORE_LIMIT] = "the rate limit is not looked at",
	[FULL_BUCKETS] = "a new worker starts with full buckets",
	[IGNORE_429] = "a 429 is a failure like others",
	[IGNORE_PAUSE] = "a refused key is a failure like others",
	[IGNORE_RESUME] = "a pause never ends",
	[IGNORE_DOUBT] = "after a refusal the next does not wait for one that is slow",
	[CANCEL_CLAIMED] = "cancel does not look whether the message is claimed",
	[CANCEL_AMBIGUOUS] = "cancel does not look whether the message is ambiguous",
	[RETRY_ALL] = "a person's retry goes to those who have it, too",
	[DROP_REPLAYED_IDS] = "the ids of a repeated answer are not stored",
	[SETTLE_TWICE_SPLIT] = "a split keeps the whole request, too",
	[REFUSED_IS_LOST] = "refused messages vanish",
	[TIMEOUT_IS_FAILURE] = "a timeout fails the message",
	[RELEASE_FORGETS] = "a message that was claimed ahead and given back is no longer ambiguous",
	[RELEASE_STARTS] = "a message that was given back is started all the same",
	[NEVER_RELEASE] = "what was claimed ahead is kept however long its turn does not come",
};

/*
 * The database.
 */
typedef enum State
{
	QUEUED,
	ACCEPTED,
	FAILED,
	EXPIRED,
	CANCELLED,
	UNCERTAIN
} State;

static const char *const state_names[] = {
	"queued", "accepted", "failed", "expired", "cancelled", "uncertain"
};

/* sentdm.messages, with what deliveries say about each recipient. */
typedef struct Message
{
	bool		exists;
	State		state;
	int			generation;
	int64_t		expires_at;		/* wall clock; NEVER */
	const char *error_code;
	State		fate[MAX_RECIPIENTS];
	bool		unknown[MAX_RECIPIENTS];	/* the fate is a guess */
	int			risks[MAX_RECIPIENTS];	/* so often a person took the risk of a repetition */
} Message;

/* sentdm.outbox; times are wall clock, 0 is NULL. */
typedef struct Row
{
	bool		used;
	int			message;
	int			part;
	SentdmLane	lane;
	unsigned	recipients;		/* a bit for each */
	int64_t		due_at;
	int64_t		expires_at;
	int			attempts;
	int			crashes;
	int64_t		claimed_at;
	int64_t		ambiguous_since;
	int64_t		first_tried_at;
} Row;

typedef struct Database
{
	Message		messages[MAX_MESSAGES];
	Row			rows[MAX_ROWS];
	uint64_t	deliveries[MAX_IDS / 64];	/* sent_id is a number here */
	uint64_t	settled[MAX_ENTRIES / 64];	/* accepted requests that were settled as such */
	SentdmPause pause;
	int64_t		probe_at;		/* wall clock; NEVER */
} Database;

/*
 * Sent.
 */
typedef struct Entry
{
	int			message;
	int			generation;
	int			part;
	unsigned	recipients;
	uint32_t	body;
	int64_t		accepted_at;	/* monotonic */
	int			first_id;
	int			ids;
} Entry;

typedef enum Fault
{
	NO_FAULT,
	DOWN,						/* no connection */
	BAD_TLS,
	LOST,						/* the request is lost on its way */
	NO_REPLY,					/* the answer is */
	SLOW,						/* slower than we wait */
	LATE,						/* a gateway says 504, then it is accepted */
	ERROR_BEFORE,				/* 5xx, nothing done */
	ERROR_AFTER,				/* 5xx of a gateway, all done */
	STORE_DOWN,					/* SERVICE_001 */
	GARBLED,					/* accepted, but the body cannot be read */
	REDIRECT,
	FOREIGN_404,
	FOREIGN_403,
	FOREIGN_400,
	FOREIGN_413,
	BAD_KEY,
	FORBIDDEN,
	NO_BALANCE,
	NO_QUOTA,
	LIMITED,
	TOO_MANY_SCHEDULED,
	FAULTS
} Fault;

static const char *const fault_names[FAULTS] = {
	"", "down", "bad certificate", "lost", "no reply", "slow", "late", "5xx before", "5xx after",
	"store down", "garbled", "redirect", "foreign 404", "foreign 403", "foreign 400", "foreign 413", "bad key",
	"forbidden", "no balance", "no quota", "limited", "too many scheduled"
};

/* While it lasts, this share of the requests is hit. */
typedef struct Window
{
	Fault		fault;
	int			percent;
	int64_t		from;
	int64_t		to;
} Window;

/*
 * The worker and its requests.
 */

/* What the claim returned. */
typedef struct Claim
{
	int			message;
	int			generation;
	int			part;
	unsigned	recipients;
	int			attempts;
	int			crashes;
	int64_t		claimed_at;
	int64_t		ambiguous_since;	/* before this claim */
	int64_t		first_tried_at;
	int64_t		expires_at;
	SentdmLane	lane;
	int64_t		taken_at;		/* monotonic */
} Claim;

typedef enum Stage
{
	CONNECTING,
	ON_THE_WAY,
	WAITING,					/* for another request with this key */
	EXECUTING,
	DONE						/* nothing more happens at Sent */
} Stage;

typedef struct Request
{
	bool		used;
	int			life;			/* of the worker; 0: that one is dead */
	int			era;			/* of the worker's drain, at the start */
	Claim		claim;
	int			key_part;		/* with mutations, not the part */
	uint32_t	body;
	Fault		fault;
	Stage		stage;
	int64_t		server_at;		/* when the next thing happens over there */
	int64_t		client_at;		/* when the worker learns the outcome */
	SentdmReply reply;
	int			entry;			/* the accepted request of the answer; -1 */
} Request;

typedef struct Outcome
{
	Claim		claim;
	SentdmDecision decision;
	int			entry;
	bool		replayed;
} Outcome;

typedef struct Worker
{
	bool		alive;
	int			life;
	int64_t		wake_at;		/* dead: when it is started again */
	SentdmDrain drain;
	Claim		claimed[MAX_ROWS];
	int			n_claimed;
	int64_t		submit_at;		/* claims are committed by then; NEVER: none */
	Claim		ready[MAX_ROWS];	/* in the order of the claims */
	int			n_ready;
	Outcome		outcomes[MAX_ROWS];
	int			n_outcomes;
	int64_t		ended_at;		/* the first of them */
	SentdmPause new_pause;
	int64_t		probe_after_ms;
	bool		unpause;
	int64_t		silent_until;	/* what Sent asked for with a 429 */
	bool		silenced;		/* the account is stopped until a person acts */
	bool		doubted;		/* it was, and nothing was answered well since */
} Worker;

/*
 * People and programs.
 */
typedef enum OperationKind
{
	INSERT,						/* the messages of a transaction, at its end */
	CANCEL,
	RETRY,
	PAUSE,
	RESUME,
	CONFIGURE,
	KILL_WORKER,
	CRASH_SERVER,
	FLUSH,						/* the WAL writer */
	JUMP,						/* the clock is set */
	ROLL_BACK					/* of what DIRTY_READ saw */
} OperationKind;

typedef struct Operation
{
	OperationKind kind;
	int64_t		at;				/* monotonic */
	int64_t		began_at;		/* of a transaction */
	int			message;		/* the first of them */
	int			messages;
	bool		commits;
	bool		durable;		/* synchronous_commit */
	int64_t		amount;			/* a time, or a rate */
} Operation;

/* What the caller of sentdm_send asked for. */
typedef struct Wish
{
	SentdmLane	lane;
	int			recipients;
	int			channels;
	unsigned	bad;			/* recipients that Sent refuses ... */
	int64_t		bad_from;		/* ... from this time on */
	bool		bad_template;
	int64_t		send_after;
	int64_t		expires_after;	/* NEVER */
} Wish;

typedef struct Arrival
{
	int64_t		at;
	int			recipients;
} Arrival;

typedef struct World
{
	uint64_t	random;
	int64_t		now;			/* monotonic */
	int64_t		clock_error;	/* of the wall clock */
	bool		server_up;
	int64_t		crashed_at;		/* the server, last */
	Database	visible;
	Database	durable;
	Wish		wishes[MAX_MESSAGES];
	int			n_messages;
	Operation	operations[MAX_OPERATIONS];
	int			n_operations;
	int			next_operation;
	int64_t		visit_at;		/* when somebody looks after it all */
	int			steps;
	Window		windows[MAX_WINDOWS];
	int			n_windows;
	int64_t		faults_end;
	int			crash_permille;
	int			fault_permille;
	int			sql_error_permille;
	SentdmDrainSettings settings;
	int64_t		most_requests;	/* the highest limit that was ever set */
	SentdmRate	sent_limit;
	bool		replays_silently;	/* a key with another body */
	int			refused_keys;	/* 401 in a row */
	Worker		worker;
	Request		requests[MAX_REQUESTS];
	int			n_requests;		/* slots that may be used */
	Entry		entries[MAX_ENTRIES];
	int			n_entries;
	int			n_ids;
	Arrival		arrivals[MAX_ARRIVALS];
	int			n_arrivals;
	int			left[MAX_MESSAGES]; /* requests that left us */
	int			deaths[MAX_MESSAGES];	/* of workers that held it */
	int			refusals[MAX_MESSAGES];
	char		violation[256];
} World;

typedef struct Totals
{
	int64_t		messages;
	int64_t		requests;
	int64_t		accepted;
	int64_t		repeated;		/* answers repeated for a key */
	int64_t		busy;			/* 409 */
	int64_t		limited;
	int64_t		pauses;
	int64_t		deaths;
	int64_t		ahead;			/* claimed ahead of their turn */
	int64_t		released;		/* of these, given back */
	int64_t		server_crashes;
	int64_t		steps;
	int64_t		ends[UNCERTAIN + 1];
} Totals;

static World world;
static Totals totals;
static Mutation mutation = NO_MUTATION;
static bool verbose = false;

/*
 * Chance.
 */

static uint64_t
draw(void)
{
	uint64_t	z = (world.random += UINT64_C(0x9e3779b97f4a7c15));

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

/* From low to high, both included. */
static int64_t
between(int64_t low, int64_t high)
{
	return low + (int64_t) (draw() % (uint64_t) (high - low + 1));
}

static bool
chance(int permille)
{
	return permille > 0 && (int) (draw() % 1000) < permille;
}

/* The same, but every order of magnitude is as likely. */
static int64_t
spread(int64_t low, int64_t high)
{
	int			octaves = 0;
	int64_t		base;

	while ((low << (octaves + 1)) <= high)
		octaves++;
	base = low << between(0, octaves);
	return between(base, base * 2 < high ? base * 2 : high);
}

/*
 * The trace.
 */

__attribute__((format(printf, 1, 2)))
static void
trace(const char *format, ...)
{
	va_list		args;

	if (!verbose)
		return;
	printf("%12.3f  ", (double) (world.now - MONOTONIC_BASE) / 1000000);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
}

/* The first one counts; the schedule ends there. */
__attribute__((format(printf, 1, 2)))
static void
violate(const char *format, ...)
{
	va_list		args;

	if (world.violation[0] != '\0')
		return;
	va_start(args, format);
	vsnprintf(world.violation, sizeof(world.violation), format, args);
	va_end(args);
	trace("VIOLATION %s", world.violation);
}

static const char *
key_text(const Claim *claim)
{
	static char text[40];

	if (claim->part == 0)
		snprintf(text, sizeof(text), "sentdm-%d-%d", claim->message, claim->generation);
	else
		snprintf(text, sizeof(text), "sentdm-%d-%d-%d", claim->message, claim->generation, claim->part);
	return text;
}

static int
count_bits(unsigned bits)
{
	return __builtin_popcount(bits);
}

static int64_t
wall(void)
{
	return WALL_BASE + (world.now - MONOTONIC_BASE) + world.clock_error;
}

static int64_t
min64(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t
max64(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

static void
set_bit(uint64_t *bits, int n)
{
	bits[n / 64] |= UINT64_C(1) << (n % 64);
}

static bool
has_bit(const uint64_t *bits, int n)
{
	return (bits[n / 64] >> (n % 64)) & 1;
}

/*
 * The database.
 *
 * What is committed is visible at once.  It is durable with the next commit
 * that waits for the disk, or when the WAL writer comes by: the log is written
 * in order, so durable is always an earlier state of visible.
 */

static void
commit(bool durable)
{
	if (durable)
		world.durable = world.visible;
}

static Row *
find_row(int message, int part)
{
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used && row->message == message && row->part == part)
			return row;
	}
	return NULL;
}

static bool
has_rows(int message)
{
	for (int i = 0; i < MAX_ROWS; i++)
	{
		if (world.visible.rows[i].used && world.visible.rows[i].message == message)
			return true;
	}
	return false;
}

static Row *
insert_row(int message, int part, unsigned recipients, int64_t due_at)
{
	if (find_row(message, part) != NULL)
		violate("I3: message %d has part %d twice", message, part);
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used)
			continue;
		*row = (Row)
		{
			.used = true,
				.message = message,
				.part = part,
				.lane = world.wishes[message].lane,
				.recipients = recipients,
				.due_at = due_at,
				.expires_at = world.visible.messages[message].expires_at
		};
		return row;
	}
	violate("simulator: too many rows");
	return NULL;
}

/* sentdm_send, as of its commit. */
static void
insert_message(int n)
{
	const Wish *wish = &world.wishes[n];
	Message    *message = &world.visible.messages[n];
	int64_t		due_at = wall() + wish->send_after;

	message->exists = true;
	message->generation = 1;
	message->expires_at = wish->expires_after == NEVER ? NEVER : due_at + wish->expires_after;
	insert_row(n, 0, (1u << wish->recipients) - 1, due_at);
}

static void
set_fates(Message *message, unsigned recipients, State fate, bool unknown)
{
	for (int i = 0; i < MAX_RECIPIENTS; i++)
	{
		if (recipients & (1u << i))
		{
			message->fate[i] = fate;
			message->unknown[i] = unknown;
		}
	}
}

static bool
has_fate(const Message *message, int recipients, State fate)
{
	for (int i = 0; i < recipients; i++)
	{
		if (message->fate[i] == fate)
			return true;
	}
	return false;
}

/* The last part to end decides the state of the whole. */
static void
conclude(int n, State state)
{
	Message    *message = &world.visible.messages[n];
	int			recipients = world.wishes[n].recipients;

	if (has_rows(n))
		return;
	if (has_fate(message, recipients, UNCERTAIN))
		state = UNCERTAIN;
	else if (has_fate(message, recipients, ACCEPTED))
		state = ACCEPTED;
	message->state = state;
	trace("  message %d is %s%s%s", n, state_names[state], message->error_code ? ": " : "",
		  message->error_code ? message->error_code : "");
}

/* Not a word about parts: they are cancelled with the whole or not at all. */
static bool
cancel_message(int n)
{
	Message    *message = &world.visible.messages[n];
	int			rows = 0;

	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (!row->used || row->message != n)
			continue;
		if ((row->claimed_at != 0 && mutation != CANCEL_CLAIMED) ||
			(row->ambiguous_since != 0 && mutation != CANCEL_AMBIGUOUS &&
			 mutation != CANCEL_CLAIMED) ||
			row->part != 0)
			return false;
		rows++;
	}
	if (rows == 0)
		return false;
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used && row->message == n)
		{
			set_fates(message, row->recipients, CANCELLED, false);
			row->used = false;
		}
	}
	message->state = CANCELLED;
	return true;
}

/* A person's decision, at a person's risk. */
static bool
retry_message(int n)
{
	Message    *message = &world.visible.messages[n];
	unsigned	again = 0;

	if (!message->exists || message->state == QUEUED || message->state == ACCEPTED)
		return false;
	for (int i = 0; i < world.wishes[n].recipients; i++)
	{
		if (message->fate[i] == ACCEPTED && mutation != RETRY_ALL)
			continue;
		if (message->unknown[i])
			message->risks[i]++;
		again |= 1u << i;
	}
	if (again == 0)
		return false;
	set_fates(message, again, QUEUED, false);
	message->state = QUEUED;
	message->error_code = NULL;
	message->generation++;
	if (message->expires_at <= wall())
		message->expires_at = NEVER;
	insert_row(n, 0, again, wall());
	return true;
}

/*
 * Sent.
 */

static Entry *
find_entry(const Request *request)
{
	for (int i = world.n_entries - 1; i >= 0; i--)
	{
		Entry	   *entry = &world.entries[i];

		if (entry->message == request->claim.message &&
			entry->generation == request->claim.generation &&
			entry->part == request->key_part &&
			entry->accepted_at + KEY_LIFE > world.now)
			return entry;
	}
	return NULL;
}

/* Is another request with this key being worked on? */
static bool
is_executing(const Request *request)
{
	for (int i = 0; i < world.n_requests; i++)
	{
		const Request *other = &world.requests[i];

		if (other != request && other->used && other->stage == EXECUTING &&
			other->claim.message == request->claim.message &&
			other->claim.generation == request->claim.generation &&
			other->key_part == request->key_part)
			return true;
	}
	return false;
}

/* It travels back, unless nobody listens or it takes too long. */
static void
answer(Request *request, int status, bool readable, const char *code, int64_t retry_after_ms)
{
	int64_t		at = world.now + between(1 * MS, 50 * MS);

	if (request->fault == NO_REPLY && chance(700))
		return;					/* the timeout tells */
	if (at >= request->client_at)
		return;
	request->client_at = at;
	request->reply.transport = request->fault == NO_REPLY ? SENTDM_NO_ANSWER : SENTDM_ANSWERED;
	if (request->fault == NO_REPLY)
		return;
	request->reply.http_status = status;
	request->reply.readable = readable;
	request->reply.success = status < 300 && readable;
	request->reply.retry_after_ms = retry_after_ms;
	snprintf(request->reply.error_code, sizeof(request->reply.error_code), "%s", code);
}

/* The account; it may take its time. */
static void
refuse_account(Request *request, int status, const char *code)
{
	answer(request, status, true, code, -1);
	if (chance(300))
		request->client_at += between(0, REQUEST_TIMEOUT - 2 * SECOND);
}

static void
answer_accepted(Request *request, Entry *entry)
{
	static const int gateway[] = {500, 502, 503, 504, 520};

	request->entry = (int) (entry - world.entries);
	if (request->fault == ERROR_AFTER)
		answer(request, gateway[between(0, 4)], chance(500), "", -1);
	else if (request->fault == GARBLED)
		answer(request, 202, false, "", -1);
	else
		answer(request, 202, true, "", -1);
}

/* The one moment that counts. */
static void
accept_request(Request *request)
{
	Entry	   *entry = &world.entries[world.n_entries];
	int			ids = count_bits(request->claim.recipients) * world.wishes[request->claim.message].channels;

	if (world.n_entries == MAX_ENTRIES || world.n_ids + ids > MAX_IDS)
	{
		violate("simulator: too many accepted requests");
		return;
	}
	*entry = (Entry)
	{
		.message = request->claim.message,
			.generation = request->claim.generation,
			.part = request->key_part,
			.recipients = request->claim.recipients,
			.body = request->body,
			.accepted_at = world.now,
			.first_id = world.n_ids,
			.ids = ids
	};
	world.n_entries++;
	world.n_ids += ids;
	totals.accepted++;
	trace("Sent accepts %s (ids %d to %d)", key_text(&request->claim), entry->first_id, entry->first_id + ids - 1);
	answer_accepted(request, entry);
}

/* Milliseconds until the limit leaves room; 0: it does. */
static int64_t
over_limit_ms(void)
{
	const SentdmRate *limit = &world.sent_limit;
	int			n = 0;

	if (limit->amount == 0)
		return 0;
	for (int i = world.n_arrivals - 1; i >= 0; i--)
	{
		if (world.arrivals[i].at <= world.now - limit->window_us)
			break;
		if (++n > limit->amount)
			return (world.arrivals[i].at + limit->window_us - world.now) / 1000 + 1;
	}
	return 0;
}

static void
note_arrival(const Request *request)
{
	if (world.n_arrivals == MAX_ARRIVALS)
	{
		/* keep the newer half; windows across the gap go unchecked */
		memmove(world.arrivals, world.arrivals + MAX_ARRIVALS / 2, sizeof(Arrival) * MAX_ARRIVALS / 2);
		world.n_arrivals = MAX_ARRIVALS / 2;
	}
	world.arrivals[world.n_arrivals++] = (Arrival) {world.now, count_bits(request->claim.recipients)};
}

/* The faults that answer without looking at the request.  True: answered. */
static bool
answer_fault(Request *request)
{
	static const int errors[] = {500, 502, 503, 504, 408};

	switch (request->fault)
	{
		case ERROR_BEFORE:
			answer(request, errors[between(0, 4)], chance(700), "INTERNAL_001", -1);
			return true;
		case STORE_DOWN:
			answer(request, 503, true, "SERVICE_001", chance(300) ? 2000 : -1);
			return true;
		case REDIRECT:
			answer(request, 302, false, "", -1);
			return true;
		case FOREIGN_404:
			answer(request, 404, false, "", -1);
			return true;
		case FOREIGN_403:
			answer(request, 403, false, "", -1);
			return true;
		case FOREIGN_400:
			answer(request, 400, false, "", -1);
			return true;
		case FOREIGN_413:
			world.refusals[request->claim.message]++;
			answer(request, 413, false, "", -1);
			return true;
		case BAD_KEY:
			/* a lockout soon, to have it at all */
			if (++world.refused_keys > 3)
				answer(request, 429, true, "BUSINESS_002", 60000);
			else
				refuse_account(request, 401, "AUTH_002");
			return true;
		case FORBIDDEN:
			refuse_account(request, 403, "AUTH_006");
			return true;
		case LIMITED:
			answer(request, 429, true, "BUSINESS_002", chance(500) ? between(0, 90000) : -1);
			return true;
		default:
			return false;
	}
}

/* The checks that come after the idempotency key.  True: refused. */
static bool
refuse_request(Request *request)
{
	const Wish *wish = &world.wishes[request->claim.message];

	switch (request->fault)
	{
		case NO_BALANCE:
			answer(request, 422, true, "BUSINESS_003", -1);
			return true;
		case NO_QUOTA:
			answer(request, 422, true, "BUSINESS_008", -1);
			return true;
		case TOO_MANY_SCHEDULED:
			answer(request, 429, true, "LIMIT_001", -1);
			return true;
		default:
			break;
	}
	if (wish->bad_template)
		answer(request, 404, true, "RESOURCE_002", -1);
	else if ((request->claim.recipients & wish->bad) != 0 && world.now >= wish->bad_from)
		answer(request, 400, true, chance(500) ? "VALIDATION_002" : "BUSINESS_004", -1);
	else
		return false;
	world.refusals[request->claim.message]++;
	return true;
}

/* A key that is known, or being worked on.  True: answered, or made to wait. */
static bool
answer_known_key(Request *request)
{
	Entry	   *entry = find_entry(request);

	if (entry != NULL)
	{
		totals.repeated++;
		if (entry->body != request->body && !world.replays_silently)
			answer(request, 409, true, "CONFLICT_005", -1);
		else
			answer_accepted(request, entry);
		return true;
	}
	if (!is_executing(request))
		return false;
	if (request->stage != WAITING && chance(500))
	{
		request->stage = WAITING;
		request->server_at = world.now + 5 * SECOND;
		return true;
	}
	totals.busy++;
	answer(request, 409, true, "CONFLICT_001", -1);
	return true;
}

static void
execute(Request *request)
{
	request->stage = EXECUTING;
	request->server_at = world.now + spread(2 * MS, 2 * SECOND);
	if (request->fault == SLOW)
		request->server_at = world.now + between(10 * SECOND, 100 * SECOND);
	if (request->fault == LATE)
	{
		answer(request, 504, chance(500), "INTERNAL_004", -1);
		request->server_at = world.now + between(1 * SECOND, 60 * SECOND);
	}
}

static void
look_at_request(Request *request)
{
	request->server_at = NEVER;
	if (answer_known_key(request))
	{
		if (request->server_at == NEVER)
			request->stage = DONE;
		return;
	}
	request->stage = DONE;
	if (!refuse_request(request))
		execute(request);
}

static void
arrive(Request *request)
{
	int64_t		wait_ms;

	request->server_at = NEVER;
	request->stage = DONE;
	if (request->fault == LOST)
	{
		if (chance(300))		/* a reset; otherwise the timeout tells */
			request->client_at = min64(request->client_at, world.now + between(1 * MS, 5 * SECOND));
		return;
	}
	note_arrival(request);
	if (answer_fault(request))
		return;
	world.refused_keys = 0;
	wait_ms = over_limit_ms();
	if (wait_ms > 0)
	{
		answer(request, 429, true, "BUSINESS_002", chance(700) ? (wait_ms + 999) / 1000 * 1000 : -1);
		return;
	}
	request->stage = ON_THE_WAY;
	look_at_request(request);
}

static void
serve(Request *request)
{
	switch (request->stage)
	{
		case ON_THE_WAY:
			arrive(request);
			break;
		case WAITING:
			look_at_request(request);
			break;
		case EXECUTING:
			request->stage = DONE;
			request->server_at = NEVER;
			accept_request(request);
			break;
		case CONNECTING:
		case DONE:
			break;
	}
}

/*
 * The network.
 */

static Fault
choose_fault(void)
{
	for (int i = 0; i < world.n_windows; i++)
	{
		const Window *window = &world.windows[i];

		if (world.now >= window->from && world.now < window->to && chance(window->percent * 10))
			return window->fault;
	}
	if (world.now < world.faults_end && chance(world.fault_permille))
		return (Fault) between(DOWN, STORE_DOWN);
	return NO_FAULT;
}

/*
 * The longest that a request may be on its way so that the limits still hold, the
 * one with the shorter window too: a fiftieth of the window, at least 50 ms.  No
 * sender can keep what it spaced apart from arriving together.
 */
static int64_t
jitter(void)
{
	int64_t		window_us = world.settings.requests.window_us;

	if (world.settings.messages.amount > 0)
		window_us = min64(window_us, world.settings.messages.window_us);
	return max64(window_us / 50, 50 * MS) * 9 / 10;
}

static Request *
new_request(const Claim *claim)
{
	Request    *request = NULL;

	for (int i = 0; i < MAX_REQUESTS && request == NULL; i++)
	{
		if (!world.requests[i].used)
		{
			request = &world.requests[i];
			world.n_requests = (int) max64(world.n_requests, i + 1);
		}
	}
	if (request == NULL)
	{
		violate("simulator: too many requests");
		return NULL;
	}
	memset(request, 0, sizeof(*request));
	request->used = true;
	request->life = world.worker.life;
	request->era = world.worker.drain.era;
	request->claim = *claim;
	request->key_part = claim->part;
	if (mutation == FRESH_KEY)
		request->key_part = claim->part + 100 * (claim->attempts + claim->crashes);
	if (mutation == SPLIT_SAME_KEY)
		request->key_part = 0;
	request->body = (uint32_t) claim->message << 16 | claim->recipients;
	if (mutation == CHANGED_BODY)
		request->body ^= (uint32_t) claim->attempts << 8;
	request->entry = -1;
	request->reply.retry_after_ms = -1;
	request->fault = choose_fault();
	return request;
}

static void
start_request(const Claim *claim)
{
	Request    *request = new_request(claim);
	int64_t		connects_at = world.now + spread(1 * MS, max64(jitter() / 2, 2 * MS));

	if (request == NULL)
		return;
	totals.requests++;
	request->stage = CONNECTING;
	request->server_at = connects_at;
	request->client_at = NEVER;
	trace("request %s for %d recipients%s%s", key_text(claim), count_bits(claim->recipients),
		  request->fault ? ", fault: " : "", fault_names[request->fault]);
}

/* I3, I4, I6 and I7: what must hold for everything that leaves. */
static void
check_leaving(const Request *request)
{
	const Claim *claim = &request->claim;
	const Row  *row = find_row(claim->message, claim->part);

	if (world.visible.messages[claim->message].expires_at <= wall() && row != NULL)
		violate("I6: %s leaves after it expired", key_text(claim));
	if (row == NULL || row->claimed_at != claim->claimed_at ||
		world.visible.messages[claim->message].generation != claim->generation)
	{
		if (world.visible.messages[claim->message].state == CANCELLED)
			violate("I7: %s leaves although it was cancelled", key_text(claim));
		else if (mutation != CLAIM_NOT_COMMITTED && mutation != DIRTY_READ)
			violate("I4: %s leaves, but we do not hold it", key_text(claim));
	}
	for (int i = 0; i < world.n_requests; i++)
	{
		const Request *other = &world.requests[i];

		if (other == request || !other->used || other->claim.message != claim->message ||
			other->claim.generation != claim->generation || other->key_part != request->key_part)
			continue;
		if (other->body != request->body)
			violate("I3: %s has two bodies", key_text(claim));
		if (other->life == request->life && other->claim.part == claim->part)
			violate("I4: %s is under way twice", key_text(claim));
	}
	for (int i = 0; i < world.n_entries; i++)
	{
		const Entry *entry = &world.entries[i];

		if (entry->message == claim->message && entry->generation == claim->generation &&
			entry->part == request->key_part && entry->body != request->body)
			violate("I3: %s has two bodies", key_text(claim));
	}
}

/* The connection stands, or not. */
static void
leave(Request *request)
{
	request->stage = DONE;
	request->server_at = NEVER;
	if (request->fault == DOWN || request->fault == BAD_TLS)
	{
		request->reply.transport = request->fault == DOWN ? SENTDM_NOT_REACHED : SENTDM_BAD_CERTIFICATE;
		request->client_at = world.now + (chance(300) ? spread(1 * MS, 10 * SECOND) : 0);
		return;
	}
	if (request->claim.expires_at <= wall() && mutation != IGNORE_DEADLINE)
	{
		request->reply.transport = SENTDM_TOO_LATE;
		request->client_at = world.now;
		return;
	}
	check_leaving(request);
	world.left[request->claim.message]++;
	request->stage = ON_THE_WAY;
	request->server_at = world.now + between(1 * MS, max64(jitter() / 2, 2 * MS));
	request->client_at = world.now + REQUEST_TIMEOUT;
	request->reply.transport = SENTDM_NO_ANSWER;
}

/*
 * The worker.
 */

static void
start_worker(void)
{
	Worker	   *worker = &world.worker;
	Database   *db = &world.visible;

	worker->alive = true;
	worker->life++;
	worker->wake_at = world.now;
	worker->submit_at = NEVER;
	trace("worker %d starts", worker->life);
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &db->rows[i];

		if (!row->used || row->claimed_at == 0 || mutation == NO_RESCUE)
			continue;
		row->claimed_at = 0;
		row->crashes++;
		if (mutation == RESCUE_DELETES)
			row->used = false;
		if (mutation == RESCUE_FORGETS)
			row->ambiguous_since = 0;
	}
	commit(true);
	sentdm_drain_init(&worker->drain, &world.settings, world.now, draw());
	if (mutation == FULL_BUCKETS)
		worker->drain.rates.requests.tokens = worker->drain.rates.messages.tokens = 1e9;
	if (db->pause != SENTDM_PAUSE_NONE)
		sentdm_drain_pause(&worker->drain, db->pause,
						   db->probe_at == NEVER ? -1 : max64(db->probe_at - wall(), 0) / 1000, world.now);
}

/* Its memory is gone, and its connections are closed. */
static void
kill_worker(int64_t down_for)
{
	Worker	   *worker = &world.worker;
	int			life = worker->life;

	totals.deaths++;
	trace("worker %d dies", life);
	for (int i = 0; i < MAX_ROWS; i++)
	{
		const Row  *row = &world.visible.rows[i];

		if (row->used && row->claimed_at != 0)
			world.deaths[row->message]++;
	}
	for (int i = 0; i < world.n_requests; i++)
	{
		Request    *request = &world.requests[i];

		if (!request->used || request->life == 0)
			continue;
		request->life = 0;
		if (request->stage == CONNECTING)
			request->stage = DONE;
		if (request->stage == DONE)
			request->used = false;
	}
	memset(worker, 0, sizeof(*worker));
	worker->life = life;
	worker->submit_at = NEVER;
	worker->wake_at = world.now + down_for;
}

/* Everything that is not on disk is gone, too. */
static void
crash_server(int64_t down_for)
{
	totals.server_crashes++;
	trace("the server crashes, for %.1f s", (double) down_for / 1000000);
	world.visible = world.durable;
	world.crashed_at = world.now;
	kill_worker(down_for);
	world.server_up = false;
}

/* Between any two steps something may break.  True: it did. */
static bool
something_breaks(void)
{
	if (world.now >= world.faults_end || !chance(world.crash_permille))
		return false;
	if (chance(300))
		crash_server(spread(1 * SECOND, 5 * MINUTE));
	else
		kill_worker(spread(100 * MS, 30 * SECOND));
	return true;
}

static SentdmAttempt
attempt_of(const Claim *claim)
{
	return (SentdmAttempt)
	{
		.recipients = count_bits(claim->recipients),
			.attempts = claim->attempts,
			.crashes = claim->crashes,
			.tried_ms = claim->first_tried_at == 0 ? -1 : max64(wall() - claim->first_tried_at, 0) / 1000,
			.ambiguous_ms = claim->ambiguous_since == 0 ? -1 : max64(wall() - claim->ambiguous_since, 0) / 1000,
			.expires_ms = claim->expires_at == NEVER ? NEVER : (claim->expires_at - wall()) / 1000
	};
}

static void
add_outcome(const Claim *claim, const SentdmDecision *decision, const Request *request)
{
	Worker	   *worker = &world.worker;
	Outcome    *outcome;

	if (worker->n_outcomes == MAX_ROWS)
	{
		violate("simulator: too many outcomes");
		return;
	}
	if (worker->n_outcomes == 0)
		worker->ended_at = world.now;
	outcome = &worker->outcomes[worker->n_outcomes++];
	outcome->claim = *claim;
	outcome->decision = *decision;
	outcome->entry = -1;
	if (request != NULL && decision->action == SENTDM_DO_ACCEPT && request->reply.readable)
		outcome->entry = request->entry;
	outcome->replayed = claim->ambiguous_since != 0;
}

/* A pause that was made or ended is stored with the next settle. */
static void
note_pause(SentdmPause before, const SentdmDecision *decision)
{
	Worker	   *worker = &world.worker;

	if (decision->pause != SENTDM_PAUSE_NONE)
	{
		totals.pauses++;
		trace("  paused: %s", sentdm_pause_name(decision->pause));
		worker->new_pause = decision->pause;
		worker->probe_after_ms = decision->probe_after_ms;
		worker->unpause = false;
	}
	else if (before != SENTDM_PAUSE_NONE && worker->drain.pause == SENTDM_PAUSE_NONE)
	{
		worker->unpause = true;
		worker->new_pause = SENTDM_PAUSE_NONE;
		worker->silenced = false;
	}
}

/* What a mutated worker believes to have been answered. */
static void
mutate_reply(SentdmReply *reply)
{
	if ((mutation == IGNORE_429 && reply->http_status == 429) ||
		(mutation == IGNORE_PAUSE && (reply->http_status == 401 || reply->http_status == 403)))
	{
		reply->http_status = 503;
		snprintf(reply->error_code, sizeof(reply->error_code), "SERVICE_001");
		reply->readable = true;
	}
	if (mutation == TIMEOUT_IS_FAILURE && reply->transport == SENTDM_NO_ANSWER)
	{
		reply->transport = SENTDM_ANSWERED;
		reply->http_status = 404;
		reply->readable = true;
	}
}

/* Sent looked at the message, so it is content with the key and the account. */
static bool
is_content(const SentdmReply *reply)
{
	switch (reply->transport == SENTDM_ANSWERED && reply->readable ? reply->http_status : 0)
	{
		case 202:
		case 400:
		case 404:
		case 409:
			return true;
		case 429:
			return strcmp(reply->error_code, "LIMIT_001") == 0;
		default:
			return false;
	}
}

/*
 * What must hold from here on, whatever drain.c thinks of it.  An answer to what
 * was started before a pause, or before its end, says nothing about the account.
 */
static void
note_stop(const Request *request)
{
	const SentdmReply *reply = &request->reply;
	bool		stale = request->era != world.worker.drain.era;
	int64_t		wait_ms;

	if (!stale && reply->transport == SENTDM_ANSWERED && reply->readable &&
		(reply->http_status == 401 || reply->http_status == 403))
		world.worker.silenced = world.worker.doubted = true;
	if (!stale && is_content(reply))
		world.worker.doubted = false;
	/* perhaps the key was locked, which another one would not be */
	if (stale && world.worker.drain.unauthorized)
		return;
	if (reply->transport != SENTDM_ANSWERED || reply->http_status != 429 ||
		strcmp(reply->error_code, "LIMIT_001") == 0)
		return;
	totals.limited++;
	wait_ms = max64(min64(reply->retry_after_ms, 3600000), 1000);
	world.worker.silent_until = max64(world.worker.silent_until, world.now + wait_ms * MS);
}

static void
collect(Request *request)
{
	Worker	   *worker = &world.worker;
	SentdmAttempt attempt = attempt_of(&request->claim);
	SentdmPause before = worker->drain.pause;
	SentdmDecision decision;

	attempt.era = request->era;
	if (before == SENTDM_PAUSE_NONE || worker->drain.probing)
		note_stop(request);
	mutate_reply(&request->reply);
	decision = sentdm_drain_finished(&worker->drain, &attempt, &request->reply, world.now, wall() / SECOND);
	trace("answer to %s: %d %s%s -> action %d%s%s in %lld ms", key_text(&request->claim),
		  request->reply.transport == SENTDM_ANSWERED ? request->reply.http_status : -(int) request->reply.transport,
		  request->reply.error_code, request->reply.readable ? "" : " (not readable)", decision.action,
		  decision.charged ? ", charged" : "", decision.ambiguous ? ", ambiguous" : "",
		  (long long) decision.delay_ms);
	note_pause(before, &decision);
	add_outcome(&request->claim, &decision, request);
	request->life = 0;
	request->client_at = NEVER;
	if (request->stage == DONE)
		request->used = false;
}

static void
settle_accepted(const Outcome *outcome)
{
	const Entry *entry = &world.entries[outcome->entry];

	set_bit(world.visible.settled, outcome->entry);
	if (mutation == DROP_REPLAYED_IDS && outcome->replayed)
		return;
	for (int i = 0; i < entry->ids; i++)
		set_bit(world.visible.deliveries, entry->first_id + i);
}

static void
settle_retry(const Outcome *outcome, Row *row)
{
	int64_t		since = outcome->claim.ambiguous_since;

	row->claimed_at = 0;
	row->crashes = 0;
	row->due_at = wall() + outcome->decision.delay_ms * MS;
	row->attempts = outcome->claim.attempts + (outcome->decision.charged ? 1 : 0);
	row->ambiguous_since = 0;
	if (outcome->decision.ambiguous && mutation != FORGET_AMBIGUITY)
		row->ambiguous_since = since != 0 ? since : outcome->claim.claimed_at;
}

static void
settle_released(const Outcome *outcome, Row *row)
{
	row->claimed_at = 0;
	row->ambiguous_since = mutation == RELEASE_FORGETS ? 0 : outcome->claim.ambiguous_since;
	row->first_tried_at = outcome->claim.first_tried_at;
}

static void
settle_split(const Outcome *outcome, Row *row)
{
	const Claim *claim = &outcome->claim;
	int			half = count_bits(claim->recipients) / 2;
	unsigned	first = 0;

	for (int i = 0; count_bits(first) < half; i++)
		first |= claim->recipients & (1u << i);
	if (mutation == SETTLE_TWICE_SPLIT)
		row->claimed_at = 0;
	else
		row->used = false;
	insert_row(claim->message, 2 * claim->part + 1, first, wall());
	insert_row(claim->message, 2 * claim->part + 2, claim->recipients & ~first, wall());
}

static State
state_of(SentdmAction action)
{
	switch (action)
	{
		case SENTDM_DO_ACCEPT:
			return ACCEPTED;
		case SENTDM_DO_FAIL:
			return FAILED;
		case SENTDM_DO_EXPIRE:
			return EXPIRED;
		case SENTDM_DO_UNCERTAIN:
			return UNCERTAIN;
		default:
			return QUEUED;
	}
}

static void
settle_outcome(const Outcome *outcome)
{
	const Claim *claim = &outcome->claim;
	Message    *message = &world.visible.messages[claim->message];
	Row		   *row = find_row(claim->message, claim->part);
	State		state = state_of(outcome->decision.action);

	if (row == NULL || message->generation != claim->generation)
		return;
	if (outcome->decision.action == SENTDM_DO_RETRY)
		settle_retry(outcome, row);
	else if (outcome->decision.action == SENTDM_DO_RELEASE)
		settle_released(outcome, row);
	else if (outcome->decision.action == SENTDM_DO_SPLIT)
		settle_split(outcome, row);
	else
	{
		row->used = false;
		if (mutation == REFUSED_IS_LOST && state == FAILED)
			return;
		set_fates(message, claim->recipients, state, outcome->decision.ambiguous);
		message->error_code = outcome->decision.error_code;
		if (outcome->entry >= 0)
			settle_accepted(outcome);
		conclude(claim->message, state);
	}
}

static bool
anything_to_settle(void)
{
	const Worker *worker = &world.worker;

	return worker->n_outcomes > 0 || worker->new_pause != SENTDM_PAUSE_NONE || worker->unpause;
}

static bool
nothing_in_hand(void)
{
	return world.worker.drain.in_flight == 0 && world.worker.n_ready == 0;
}

static bool
settle_is_due(void)
{
	return anything_to_settle() && (nothing_in_hand() || world.worker.new_pause != SENTDM_PAUSE_NONE ||
									world.worker.unpause || world.now >= world.worker.ended_at + SETTLE_WITHIN);
}

static void
settle(void)
{
	Worker	   *worker = &world.worker;
	Database   *db = &world.visible;

	trace("settle %d", worker->n_outcomes);
	for (int i = 0; i < worker->n_outcomes; i++)
		settle_outcome(&worker->outcomes[i]);
	if (worker->unpause)
		db->pause = SENTDM_PAUSE_NONE;
	if (worker->new_pause != SENTDM_PAUSE_NONE && db->pause != SENTDM_PAUSE_USER)
	{
		db->pause = worker->new_pause;
		db->probe_at = worker->probe_after_ms < 0 ? NEVER : wall() + worker->probe_after_ms * MS;
	}
	worker->n_outcomes = 0;
	worker->new_pause = SENTDM_PAUSE_NONE;
	worker->unpause = false;
}

static Row *
next_due_row(SentdmLane lane)
{
	Row		   *next = NULL;

	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used && row->lane == lane && row->claimed_at == 0 &&
			(next == NULL || row->due_at < next->due_at))
			next = row;
	}
	return next;
}

static void
claim_row(Row *row)
{
	Worker	   *worker = &world.worker;
	Claim	   *claim = &worker->claimed[worker->n_claimed++];

	*claim = (Claim)
	{
		.message = row->message,
			.generation = world.visible.messages[row->message].generation,
			.part = row->part,
			.recipients = row->recipients,
			.attempts = row->attempts,
			.crashes = row->crashes,
			.claimed_at = wall(),
			.ambiguous_since = row->ambiguous_since,
			.first_tried_at = row->first_tried_at,
			.expires_at = mutation == IGNORE_EXPIRY ? NEVER : row->expires_at,
			.lane = row->lane
	};
	row->claimed_at = wall();
	if (row->ambiguous_since == 0)
		row->ambiguous_since = wall();
	if (row->first_tried_at == 0)
		row->first_tried_at = wall();
	trace("claim %s", key_text(claim));
}

/* How many are claimed and not started, of this lane and those before it. */
static int
ready_before(SentdmLane lane)
{
	int			n = 0;

	for (int i = 0; i < world.worker.n_ready; i++)
		n += world.worker.ready[i].lane <= lane;
	return n;
}

/* How many of a lane to claim now. */
static int
wanted(SentdmLane lane)
{
	Worker	   *worker = &world.worker;
	int			limit = sentdm_drain_claimable(&worker->drain, lane, ready_before(lane) + worker->n_claimed,
											   world.now);

	if (mutation == IGNORE_LIMIT && limit == 0 && worker->drain.in_flight < 4)
		limit = 4;
	return limit;
}

static bool
anything_to_claim(void)
{
	world.worker.n_claimed = 0;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		Row		   *row = next_due_row((SentdmLane) lane);

		if (row != NULL && row->due_at <= wall() && wanted((SentdmLane) lane) > 0)
			return true;
	}
	return false;
}

/* Lane after lane. */
static void
claim_rows(void)
{
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		for (int limit = wanted((SentdmLane) lane); limit > 0; limit--)
		{
			Row		   *row = next_due_row((SentdmLane) lane);

			if (row == NULL || row->due_at > wall())
				break;
			claim_row(row);
		}
	}
}

/* One transaction settles and claims.  False: it failed, to be repeated. */
static bool
exchange(void)
{
	Worker	   *worker = &world.worker;
	Database	before;

	if (!anything_to_claim() && !settle_is_due())
		return true;
	if (world.now < world.faults_end && chance(world.sql_error_permille))
	{
		trace("the transaction fails");
		return false;
	}
	if (anything_to_settle())
		settle();
	if (mutation == CLAIM_NOT_COMMITTED)
		before = world.visible;
	claim_rows();
	if (worker->n_claimed == 0)
	{
		commit(chance(200));
		return true;
	}
	worker->submit_at = world.now + spread(1 * MS, 500 * MS);
	if (mutation == CLAIM_NOT_COMMITTED)
		world.visible = before;
	commit(mutation != CLAIM_NOT_DURABLE);
	return true;
}

/* Is a request under way that was started since the last pause or the end of it? */
static bool
is_tried(void)
{
	for (int i = 0; i < world.n_requests; i++)
	{
		const Request *request = &world.requests[i];

		if (request->used && request->life == world.worker.life && request->era == world.worker.drain.era)
			return true;
	}
	return false;
}

static void
start(const Claim *claim)
{
	Worker	   *worker = &world.worker;
	SentdmAttempt attempt = attempt_of(claim);
	SentdmDecision decision = sentdm_drain_admit(&worker->drain, &attempt);

	if (decision.action != SENTDM_DO_SEND)
	{
		add_outcome(claim, &decision, NULL);
		return;
	}
	if (world.now < worker->silent_until)
		violate("I5: %s starts although Sent asked to wait", key_text(claim));
	if (worker->silenced)
		violate("I5: %s starts although the account is stopped", key_text(claim));
	if (worker->doubted && is_tried())
		violate("I5: %s starts while another one tries the account", key_text(claim));
	sentdm_drain_started(&worker->drain, attempt.recipients, world.now);
	start_request(claim);
}

static bool
may_start(SentdmLane lane)
{
	SentdmDrain *drain = &world.worker.drain;

	return sentdm_drain_quota(drain, lane, world.now) > 0 || (mutation == IGNORE_LIMIT && drain->in_flight < 4);
}

/* Those that may, lane after lane. */
static void
start_ready(void)
{
	Worker	   *worker = &world.worker;

	if (mutation == IGNORE_DOUBT)
		worker->drain.doubted = false;
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		for (int i = 0; i < worker->n_ready && world.violation[0] == '\0';)
		{
			Claim		claim = worker->ready[i];

			if (claim.lane != (SentdmLane) lane || !may_start((SentdmLane) lane))
			{
				i++;
				continue;
			}
			worker->n_ready--;
			memmove(&worker->ready[i], &worker->ready[i + 1], (size_t) (worker->n_ready - i) * sizeof(Claim));
			start(&claim);
			if (something_breaks())
				return;
		}
	}
}

/* Give back what waits in vain. */
static void
release(void)
{
	Worker	   *worker = &world.worker;
	SentdmDecision decision = {.action = SENTDM_DO_RELEASE};
	int64_t		since = NEVER;

	for (int i = 0; i < worker->n_ready; i++)
		since = min64(since, worker->ready[i].taken_at);
	if (worker->n_ready == 0 || mutation == NEVER_RELEASE ||
		(worker->drain.pause == SENTDM_PAUSE_NONE && since > world.now - LONGEST_AHEAD))
		return;
	trace("%d are given back", worker->n_ready);
	totals.released += worker->n_ready;
	for (int i = 0; i < worker->n_ready; i++)
	{
		add_outcome(&worker->ready[i], &decision, NULL);
		worker->ready[i].taken_at = NEVER;
	}
	if (mutation != RELEASE_STARTS)
		worker->n_ready = 0;
}

/* The claims are on disk. */
static void
submit(void)
{
	Worker	   *worker = &world.worker;

	for (int i = 0; i < worker->n_claimed; i++)
	{
		worker->claimed[i].taken_at = world.now;
		worker->ready[worker->n_ready++] = worker->claimed[i];
		if (sentdm_drain_quota(&worker->drain, worker->claimed[i].lane, world.now) == 0)
			totals.ahead++;
	}
	worker->submit_at = NEVER;
	worker->n_claimed = 0;
	start_ready();
	if (worker->alive)
		worker->wake_at = world.now;
}

/* When there will be something to do although nothing comes back. */
static int64_t
next_wake(void)
{
	Worker	   *worker = &world.worker;
	int64_t		wake_at = world.now + HOUR;

	if (anything_to_settle())
		wake_at = min64(wake_at, worker->ended_at + SETTLE_WITHIN);
	if (worker->n_ready > 0 && worker->ready[0].taken_at != NEVER)
		wake_at = min64(wake_at, worker->ready[0].taken_at + LONGEST_AHEAD);
	for (int lane = 0; lane < SENTDM_LANES; lane++)
	{
		const Row  *row = next_due_row((SentdmLane) lane);
		int64_t		ready;

		bool		waits = ready_before((SentdmLane) lane) > 0;

		if (row == NULL && !waits)
			continue;
		ready = sentdm_drain_ready_us(&worker->drain, (SentdmLane) lane, world.now);
		if (ready != NEVER)
			wake_at = min64(wake_at, waits ? ready : max64(ready, world.now + max64(row->due_at - wall(), 0)));
		if (mutation == IGNORE_LIMIT)
			wake_at = min64(wake_at, world.now + SECOND);
	}
	/* a resolution of a microsecond must not make the simulation stand still */
	return max64(wake_at, world.now + 1);
}

static void
rescue_by_time(void)
{
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used && row->claimed_at != 0 && row->claimed_at < wall() - 20 * SECOND)
			row->claimed_at = 0;
	}
}

/* One turn: what came back, then what may go. */
static void
work(void)
{
	Worker	   *worker = &world.worker;

	if (mutation == TIMED_RESCUE)
		rescue_by_time();
	for (int i = 0; i < world.n_requests; i++)
	{
		Request    *request = &world.requests[i];

		if (request->used && request->life == worker->life && request->client_at <= world.now)
			collect(request);
	}
	if (something_breaks())
		return;
	release();
	start_ready();
	if (!worker->alive || something_breaks())
		return;
	if (!exchange())
	{
		worker->wake_at = world.now + SECOND;
		return;
	}
	if (worker->submit_at != NEVER && something_breaks())
		return;
	start_ready();
	if (!worker->alive)
		return;
	worker->wake_at = next_wake();
}

/*
 * People and programs.
 */

static void
wake_worker(void)
{
	if (world.worker.alive)
		world.worker.wake_at = min64(world.worker.wake_at, world.now);
}

static void
end_transaction(const Operation *operation)
{
	bool		lost = !world.server_up || world.crashed_at >= operation->began_at;

	trace("transaction of %d to %d %s", operation->message, operation->message + operation->messages - 1,
		  lost ? "is lost" : !operation->commits ? "rolls back" : operation->durable ? "commits" : "commits, not durably");
	totals.messages += operation->messages;
	if (lost || !operation->commits)
		return;
	for (int i = operation->message; i < operation->message + operation->messages; i++)
		insert_message(i);
	commit(operation->durable);
	wake_worker();
}

/* With DIRTY_READ, what was seen too early goes away again. */
static void
roll_back(const Operation *operation)
{
	for (int i = 0; i < MAX_ROWS; i++)
	{
		Row		   *row = &world.visible.rows[i];

		if (row->used && row->message >= operation->message &&
			row->message < operation->message + operation->messages)
			row->used = false;
	}
	for (int i = operation->message; i < operation->message + operation->messages; i++)
		world.visible.messages[i].exists = false;
	commit(true);
	trace("transaction of %d to %d rolls back", operation->message, operation->message + operation->messages - 1);
}

static void
pause_queue(void)
{
	world.visible.pause = SENTDM_PAUSE_USER;
	world.visible.probe_at = NEVER;
	commit(true);
	if (world.worker.alive)
	{
		sentdm_drain_pause(&world.worker.drain, SENTDM_PAUSE_USER, -1, world.now);
		world.worker.new_pause = SENTDM_PAUSE_NONE;
	}
	trace("a person pauses");
}

static void
resume_queue(void)
{
	if (mutation == IGNORE_RESUME)
		return;
	world.visible.pause = SENTDM_PAUSE_NONE;
	commit(true);
	if (world.worker.alive)
	{
		/* a lockout belongs to the key, which may be another one now */
		if (world.worker.drain.unauthorized)
			world.worker.silent_until = 0;
		sentdm_drain_resume(&world.worker.drain, world.now);
		world.worker.new_pause = SENTDM_PAUSE_NONE;
		world.worker.silenced = false;
	}
	wake_worker();
	trace("a person resumes");
}

static void
configure(int64_t amount)
{
	if (world.settings.requests.amount == 0)
		return;
	world.settings.requests.amount = amount;
	world.most_requests = max64(world.most_requests, amount);
	if (world.worker.alive)
		sentdm_drain_configure(&world.worker.drain, &world.settings, world.now);
	wake_worker();
	trace("the limit is %lld now", (long long) amount);
}

static void
jump(int64_t by)
{
	world.clock_error += by;
	world.clock_error = max64(min64(world.clock_error, MAX_CLOCK_ERROR), -MAX_CLOCK_ERROR);
	trace("the clock is %+.1f s off", (double) world.clock_error / 1000000);
	wake_worker();
}

static void
operate(const Operation *operation)
{
	bool		done;

	switch (operation->kind)
	{
		case INSERT:
			end_transaction(operation);
			break;
		case CANCEL:
			if (!world.server_up)
				break;
			done = cancel_message(operation->message);
			commit(done);
			trace("cancel %d: %s", operation->message, done ? "yes" : "no");
			break;
		case RETRY:
			if (!world.server_up)
				break;
			done = retry_message(operation->message);
			commit(operation->durable);
			trace("retry %d: %s", operation->message, done ? "yes" : "no");
			wake_worker();
			break;
		case PAUSE:
			if (world.server_up)
				pause_queue();
			break;
		case RESUME:
			if (world.server_up)
				resume_queue();
			break;
		case CONFIGURE:
			configure(operation->amount);
			break;
		case KILL_WORKER:
			if (world.worker.alive)
				kill_worker(operation->amount);
			break;
		case CRASH_SERVER:
			if (world.server_up)
				crash_server(operation->amount);
			break;
		case FLUSH:
			if (world.server_up)
				commit(true);
			break;
		case JUMP:
			jump(operation->amount);
			break;
		case ROLL_BACK:
			roll_back(operation);
			break;
	}
}

/*
 * The schedule.
 */

static Operation *
plan(OperationKind kind, int64_t at)
{
	Operation  *operation = &world.operations[world.n_operations];

	if (world.n_operations == MAX_OPERATIONS)
		return operation - 1;	/* enough happens already */
	world.n_operations++;
	*operation = (Operation) {.kind = kind,.at = at,.began_at = at,.durable = true};
	return operation;
}

static int
by_time(const void *a, const void *b)
{
	int64_t		x = ((const Operation *) a)->at;
	int64_t		y = ((const Operation *) b)->at;

	return (x > y) - (x < y);
}

static Wish
wish(void)
{
	Wish		w = {
		.lane = (SentdmLane) between(SENTDM_HIGH, SENTDM_BULK),
		.recipients = chance(600) ? 1 : (int) between(2, MAX_RECIPIENTS),
		.channels = chance(700) ? 1 : MAX_CHANNELS,
		.expires_after = NEVER
	};

	if (chance(250))
		w.bad = (unsigned) draw() & ((1u << w.recipients) - 1) & (chance(500) ? (unsigned) draw() : ~0u);
	w.bad_from = chance(700) ? 0 : MONOTONIC_BASE + spread(1 * SECOND, 1 * HOUR);
	w.bad_template = chance(50);
	if (chance(150))
		w.send_after = spread(100 * MS, 30 * MINUTE);
	if (chance(300))
		w.expires_after = spread(100 * MS, 30 * MINUTE);
	return w;
}

static void
see_early(Operation *operation)
{
	if (!operation->commits)
	{
		Operation  *end = plan(ROLL_BACK, operation->at);

		end->message = operation->message;
		end->messages = operation->messages;
	}
	operation->at = operation->began_at;
	operation->commits = true;
}

/* Transactions, and what people do about their messages afterwards. */
static void
plan_messages(int64_t span)
{
	world.n_messages = (int) between(1, MAX_MESSAGES);
	for (int i = 0; i < world.n_messages; i++)
		world.wishes[i] = wish();
	for (int i = 0; i < world.n_messages;)
	{
		int64_t		began_at = MONOTONIC_BASE + between(0, span);
		Operation  *operation = plan(INSERT, began_at + spread(1 * MS, 10 * SECOND));

		operation->began_at = began_at;
		operation->message = i;
		operation->messages = (int) min64(between(1, 5), world.n_messages - i);
		operation->commits = chance(850);
		operation->durable = chance(600);
		if (mutation == DIRTY_READ)
			see_early(operation);
		for (int j = 0; j < operation->messages; j++)
		{
			int64_t		committed_at = operation->at;

			if (chance(150))
				plan(CANCEL, committed_at + spread(1 * MS, 10 * MINUTE))->message = i + j;
			if (chance(150))
				plan(RETRY, committed_at + spread(1 * MS, 26 * HOUR))->message = i + j;
			if (chance(100))
				plan(RETRY, committed_at + spread(1 * SECOND, 1 * HOUR))->message = i + j;
		}
		i += operation->messages;
	}
}

static int64_t
fault_length(void)
{
	if (chance(15))
		return between(1 * HOUR, 80 * HOUR);
	return spread(50 * MS, 20 * MINUTE);
}

static void
plan_faults(int64_t span)
{
	world.n_windows = (int) between(0, MAX_WINDOWS);
	for (int i = 0; i < world.n_windows; i++)
	{
		Window	   *window = &world.windows[i];

		window->fault = (Fault) between(DOWN, FAULTS - 1);
		window->percent = chance(500) ? 100 : (int) between(20, 90);
		window->from = MONOTONIC_BASE + between(0, span);
		window->to = window->from + fault_length();
		world.faults_end = max64(world.faults_end, window->to);
		if (chance(500))
			plan(RESUME, window->from + spread(1 * SECOND, 1 * HOUR));
	}
	world.crash_permille = chance(500) ? 0 : (int) spread(2, 200);
	world.fault_permille = chance(500) ? 0 : (int) spread(5, 300);
	world.sql_error_permille = chance(700) ? 0 : (int) spread(5, 300);
}

static void
plan_trouble(int64_t span)
{
	for (int n = (int) between(0, 2); n > 0 && chance(500); n--)
		plan(KILL_WORKER, MONOTONIC_BASE + between(0, span))->amount = spread(100 * MS, 1 * MINUTE);
	for (int n = (int) between(0, 2); n > 0 && chance(400); n--)
		plan(CRASH_SERVER, MONOTONIC_BASE + between(0, span))->amount =
			chance(50) ? between(1 * HOUR, 40 * HOUR) : spread(500 * MS, 2 * MINUTE);
	for (int n = (int) between(0, 3); n > 0 && chance(300); n--)
		plan(JUMP, MONOTONIC_BASE + between(0, span))->amount =
			(chance(500) ? 1 : -1) * spread(10 * MS, MAX_CLOCK_ERROR);
	if (chance(200))
	{
		int64_t		at = MONOTONIC_BASE + between(0, span);

		plan(PAUSE, at);
		plan(RESUME, at + spread(10 * MS, 30 * MINUTE));
	}
	for (int n = (int) between(0, 2); n > 0 && chance(300); n--)
		plan(CONFIGURE, MONOTONIC_BASE + between(0, span))->amount = between(1, 60);
	for (int n = (int) between(0, 10); n > 0; n--)
		plan(FLUSH, MONOTONIC_BASE + between(0, span));
}

static void
plan_settings(void)
{
	SentdmDrainSettings *settings = &world.settings;

	settings->max_in_flight = (int) spread(1, 16);
	if (chance(600))
		settings->requests = (SentdmRate) {spread(1, 60), spread(1 * SECOND, 60 * SECOND)};
	if (chance(150))
		settings->messages = (SentdmRate) {spread(1, 120), spread(1 * SECOND, 60 * SECOND)};
	settings->retry_min_ms = chance(700) ? 1000 : 100;
	settings->retry_max_ms = chance(700) ? 600000 : 10000;
	settings->give_up_after_ms = chance(800) ? 72 * 3600000 : between(60000, 7200000);
	settings->uncertain_after_ms = chance(800) ? 23 * 3600000 : between(60000, 7200000);
	if (mutation == NEVER_UNCERTAIN)
		settings->uncertain_after_ms = NEVER;
	world.most_requests = settings->requests.amount;
	if (chance(300))
		world.sent_limit = (SentdmRate) {between(1, 10), spread(1 * SECOND, 60 * SECOND)};
	world.replays_silently = chance(300);
}

static void
plan_everything(uint64_t seed)
{
	int64_t		span;

	memset(&world, 0, sizeof(world));
	world.random = seed * UINT64_C(0xd1342543de82ef95) + 1;
	world.now = MONOTONIC_BASE;
	world.server_up = true;
	world.worker.submit_at = NEVER;
	world.worker.wake_at = MONOTONIC_BASE;
	span = spread(1 * SECOND, 20 * MINUTE);
	world.faults_end = MONOTONIC_BASE + span;
	plan_settings();
	plan_messages(span);
	plan_faults(span);
	plan_trouble(span);
	for (int i = 0; i < world.n_operations; i++)
		world.faults_end = max64(world.faults_end, world.operations[i].at);
	world.visit_at = world.faults_end + 1;
	qsort(world.operations, (size_t) world.n_operations, sizeof(Operation), by_time);
}

/*
 * The promises.
 */

/* How often the message reached a recipient on a channel; generation 0: any. */
static int
effects(int message, int recipient, int generation)
{
	int			n = 0;

	for (int i = 0; i < world.n_entries; i++)
	{
		const Entry *entry = &world.entries[i];

		if (entry->message == message && (entry->recipients & (1u << recipient)) != 0 &&
			(generation == 0 || entry->generation == generation))
			n++;
	}
	return n;
}

/* Did an answer with its ids get through to the database? */
static bool
is_settled(int message, int recipient)
{
	for (int i = 0; i < world.n_entries; i++)
	{
		const Entry *entry = &world.entries[i];

		if (has_bit(world.visible.settled, i) && entry->message == message &&
			(entry->recipients & (1u << recipient)) != 0)
			return true;
	}
	return false;
}

static void
check_recipient(int n, int recipient)
{
	const Message *message = &world.visible.messages[n];
	State		fate = message->fate[recipient];

	if (fate == QUEUED)
		violate("I1: message %d, recipient %d never came to an end", n, recipient);
	if (fate == ACCEPTED && !is_settled(n, recipient))
		violate("I9: message %d, recipient %d is accepted, but no id is known", n, recipient);
	if (fate == ACCEPTED && effects(n, recipient, 0) == 0)
		violate("I1: message %d, recipient %d is accepted here, but not by Sent", n, recipient);
	if ((fate == FAILED || fate == EXPIRED) && !message->unknown[recipient] &&
		effects(n, recipient, message->generation) > 0)
		violate("I1: message %d, recipient %d is %s, but Sent accepted it", n, recipient, state_names[fate]);
	if (fate == CANCELLED && effects(n, recipient, message->generation) > 0)
		violate("I7: message %d, recipient %d is cancelled, but Sent accepted it", n, recipient);
	if (effects(n, recipient, 0) > 1 + message->risks[recipient])
		violate("I4: message %d, recipient %d was accepted %d times", n, recipient, effects(n, recipient, 0));
}

/* A reason must be true. */
static void
check_reason(int n)
{
	const Message *message = &world.visible.messages[n];
	const char *code = message->error_code;

	if (message->state == EXPIRED && message->expires_at == NEVER)
		violate("I1: message %d is expired, but never expires", n);
	if (message->state == UNCERTAIN && world.left[n] == 0 && world.deaths[n] == 0)
		violate("I1: message %d is uncertain, but was never sent", n);
	if (message->state != FAILED)
		return;
	if (code == NULL && world.refusals[n] == 0)
		violate("I1: message %d is refused, but not by Sent", n);
	if (code != NULL && strcmp(code, "worker_crash") == 0 && world.deaths[n] < SENTDM_MAX_CRASHES)
		violate("I1: message %d is said to kill workers, but does not", n);
}

static void
check_message(int n)
{
	const Message *message = &world.visible.messages[n];

	if (!message->exists)
	{
		if (world.left[n] > 0)
			violate("I2: message %d was sent, but not committed", n);
		return;
	}
	if (message->state == QUEUED)
		violate("I1: message %d never came to an end", n);
	totals.ends[message->state]++;
	for (int i = 0; i < world.wishes[n].recipients; i++)
		check_recipient(n, i);
	check_reason(n);
}

/* I5, as Sent sees it: what arrived in any window. */
static void
check_rate(const SentdmRate *rate, int64_t most, bool recipients)
{
	int64_t		sum = 0;
	int			first = 0;

	if (rate->amount == 0)
		return;
	for (int i = 0; i < world.n_arrivals; i++)
	{
		sum += recipients ? world.arrivals[i].recipients : 1;
		while (world.arrivals[first].at <= world.arrivals[i].at - rate->window_us)
		{
			sum -= recipients ? world.arrivals[first].recipients : 1;
			first++;
		}
		if (sum > most)
		{
			violate("I5: %lld %s in %.3f s, where %lld may", (long long) sum,
					recipients ? "recipients" : "requests", (double) rate->window_us / 1000000, (long long) most);
			return;
		}
	}
}

static void
check_deliveries(void)
{
	for (int i = 0; i < world.n_entries; i++)
	{
		const Entry *entry = &world.entries[i];

		for (int id = entry->first_id; id < entry->first_id + entry->ids; id++)
		{
			if (has_bit(world.visible.settled, i) && !has_bit(world.visible.deliveries, id))
				violate("I9: id %d was accepted and settled, but is not in deliveries", id);
		}
	}
}

/*
 * A request with more recipients than its share of the bucket makes a debt that
 * a dying worker forgets; the limit of recipients holds up to that.
 */
static void
check_promises(void)
{
	int64_t		debts = world.worker.life;

	for (int i = 0; i < world.n_messages; i++)
		check_message(i);
	check_rate(&world.settings.requests, world.most_requests, false);
	check_rate(&world.settings.messages, world.settings.messages.amount + debts * MAX_RECIPIENTS, true);
	check_deliveries();
}

/*
 * The course of events.
 */

/* Somebody fixes what only a person can fix, once it can be fixed. */
static void
visit(void)
{
	world.visit_at = world.now + 10 * MINUTE;
	if (world.visible.pause != SENTDM_PAUSE_NONE && world.visible.probe_at == NEVER)
		resume_queue();
}

static int64_t
worker_time(void)
{
	const Worker *worker = &world.worker;
	int64_t		at = worker->wake_at;

	if (worker->submit_at != NEVER)
		return worker->submit_at;
	for (int i = 0; worker->alive && i < world.n_requests; i++)
	{
		const Request *request = &world.requests[i];

		if (request->used && request->life == worker->life && request->client_at < at)
			at = request->client_at;
	}
	return at;
}

static void
run_worker(void)
{
	if (!world.worker.alive)
	{
		world.server_up = true;
		start_worker();
	}
	else if (world.worker.submit_at != NEVER)
		submit();
	else
		work();
}

static void
run_request(Request *request)
{
	if (request->stage == CONNECTING)
		leave(request);
	else
		serve(request);
	if (request->stage == DONE && request->life == 0)
		request->used = false;
}

static Request *
next_request(void)
{
	Request    *next = NULL;

	for (int i = 0; i < world.n_requests; i++)
	{
		Request    *request = &world.requests[i];

		if (request->used && request->stage != DONE &&
			(next == NULL || request->server_at < next->server_at))
			next = request;
	}
	return next;
}

static void
step(void)
{
	Operation  *operation = world.next_operation < world.n_operations ?
		&world.operations[world.next_operation] : NULL;
	Request    *request = next_request();
	int64_t		worker_at = worker_time();
	int64_t		at = worker_at;

	if (operation != NULL)
		at = min64(at, operation->at);
	if (request != NULL)
		at = min64(at, request->server_at);
	at = min64(at, world.visit_at);
	world.now = max64(world.now, at);
	world.steps++;
	if (operation != NULL && operation->at == at)
	{
		world.next_operation++;
		operate(operation);
	}
	else if (request != NULL && request->server_at == at)
		run_request(request);
	else if (worker_at == at)
		run_worker();
	else
		visit();
}

static bool
is_over(void)
{
	if (world.next_operation < world.n_operations || next_request() != NULL ||
		!world.worker.alive || anything_to_settle() || world.worker.submit_at != NEVER)
		return false;
	for (int i = 0; i < MAX_ROWS; i++)
	{
		if (world.visible.rows[i].used)
			return false;
	}
	return true;
}

/* True: all promises were kept. */
static bool
run_schedule(uint64_t seed)
{
	plan_everything(seed);
	if (verbose)
		printf("# schedule %llu: %d messages, %lld requests in %.1f s, at most %d at once\n",
			   (unsigned long long) seed, world.n_messages, (long long) world.settings.requests.amount,
			   (double) world.settings.requests.window_us / 1000000, world.settings.max_in_flight);
	while (!is_over() && world.violation[0] == '\0')
	{
		step();
		if (world.now > world.faults_end + PATIENCE)
		{
			trace("patience is over");
			break;
		}
		if (world.steps > MAX_STEPS)
			violate("I1: much is done and nothing comes of it");
	}
	if (world.violation[0] == '\0')
		check_promises();
	totals.steps += world.steps;
	return world.violation[0] == '\0';
}

/*
 * Each mutation has to be noticed.
 */
static int
self_test(uint64_t seed, int64_t limit)
{
	int			failed = 0;

	for (int m = NO_MUTATION + 1; m < MUTATIONS; m++)
	{
		int64_t		n = 0;

		mutation = (Mutation) m;
		while (n < limit && run_schedule(seed + (uint64_t) n))
			n++;
		if (n < limit && world.violation[0] == 'I')
			printf("ok %d - %s (%s): after %lld schedules, %s\n", m, mutation_names[m], mutation_texts[m],
				   (long long) n + 1, world.violation);
		else
		{
			failed++;
			printf("not ok %d - %s (%s): %s\n", m, mutation_names[m], mutation_texts[m],
				   n < limit ? world.violation : "not noticed");
		}
		fflush(stdout);
	}
	printf("1..%d\n%d passed, %d failed\n", MUTATIONS - 1, MUTATIONS - 1 - failed, failed);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

static void
report(int64_t schedules, double seconds)
{
	printf("# %.1f s, %.0f schedules/s, %lld steps\n", seconds, (double) schedules / seconds, (long long) totals.steps);
	printf("# %lld messages, %lld requests, %lld accepted, %lld answers repeated, %lld times in flight (409)\n",
		   (long long) totals.messages, (long long) totals.requests, (long long) totals.accepted,
		   (long long) totals.repeated, (long long) totals.busy);
	printf("# %lld times limited, %lld pauses, %lld workers died, %lld times with the server\n",
		   (long long) totals.limited, (long long) totals.pauses, (long long) totals.deaths,
		   (long long) totals.server_crashes);
	printf("# %lld messages claimed ahead, %lld given back\n", (long long) totals.ahead, (long long) totals.released);
	printf("# ends:");
	for (int i = ACCEPTED; i <= UNCERTAIN; i++)
		printf(" %lld %s", (long long) totals.ends[i], state_names[i]);
	putchar('\n');
}

static int
simulate(uint64_t seed, int64_t schedules)
{
	clock_t		begin = clock();
	int64_t		failed = 0;

	for (int64_t i = 0; i < schedules; i++)
	{
		if (run_schedule(seed + (uint64_t) i))
			continue;
		failed++;
		printf("not ok - seed %llu: %s\n", (unsigned long long) (seed + (uint64_t) i), world.violation);
		if (failed == 20)
		{
			printf("# enough\n");
			schedules = i + 1;
		}
	}
	report(schedules, (double) (clock() - begin) / CLOCKS_PER_SEC + 1e-9);
	printf("%lld passed, %lld failed\n", (long long) (schedules - failed), (long long) failed);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

static int
usage(const char *program)
{
	printf("usage: %s [--schedules N] [--seed S] [--verbose] [--mutate NAME] [--self-test]\n\nmutations:\n", program);
	for (int i = 0; i < MUTATIONS; i++)
		printf("  %-20s %s\n", mutation_names[i], mutation_texts[i]);
	return EXIT_FAILURE;
}

static bool
choose_mutation(const char *name)
{
	for (int i = 0; i < MUTATIONS; i++)
	{
		if (strcmp(name, mutation_names[i]) == 0)
		{
			mutation = (Mutation) i;
			return true;
		}
	}
	return false;
}

int
main(int argc, char **argv)
{
	int64_t		schedules = 20000;
	uint64_t	seed = 1;
	bool		test_checker = false;

	for (int i = 1; i < argc; i++)
	{
		if (strcmp(argv[i], "--verbose") == 0)
			verbose = true;
		else if (strcmp(argv[i], "--self-test") == 0)
			test_checker = true;
		else if (strcmp(argv[i], "--schedules") == 0 && i + 1 < argc)
			schedules = strtoll(argv[++i], NULL, 10);
		else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc)
			seed = strtoull(argv[++i], NULL, 10);
		else if (strcmp(argv[i], "--mutate") != 0 || i + 1 == argc || !choose_mutation(argv[++i]))
			return usage(argv[0]);
	}
	if (schedules < 1)
		return usage(argv[0]);
	return test_checker ? self_test(seed, schedules) : simulate(seed, schedules);
}
