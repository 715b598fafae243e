/*
 * database.c
 *		A connection that calls sentdm_receive_webhooks().
 *
 * The one question that matters here: is it committed?  Only the server's "ready
 * for query" after the rows says so.  The rows themselves arrive before the commit,
 * and even the end of the command does; a deferred trigger can still undo it all.
 * Must never take a lost connection, or an error that ended it, for a rollback.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "database.h"

#define BYTEA_ARRAY_OID 1001
#define JSONB_ARRAY_OID 3807
#define STATEMENT "receive"
#define SETUP_TIMEOUT_US (5 * 1000000)
#define SLICE_MS 100			/* how late an abandoned wait may end */
#define BINARY 1

static const char find_function[] =
"SELECT pg_catalog.quote_ident(n.nspname)"
" FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace"
" WHERE e.extname = 'sentdm'";

/*
 * What is acknowledged must survive a crash of the server, whatever the database's
 * or the role's setting is; and a query that nobody waits for any longer must end.
 */
static const char set_up[] =
"SELECT pg_catalog.set_config('synchronous_commit',"
" CASE pg_catalog.current_setting('synchronous_commit') WHEN 'off' THEN 'on'"
" ELSE pg_catalog.current_setting('synchronous_commit') END, false),"
" pg_catalog.set_config('statement_timeout', $1, false)";

static bool
wait_for_socket(ReceiverDatabase *database, short events, int64_t deadline_us)
{
	while (!atomic_load(database->abandon))
	{
		struct pollfd fd = {PQsocket(database->conn), events, 0};
		int			wait_ms = receiver_ms_until(deadline_us, SLICE_MS);
		int			ready = poll(&fd, 1, wait_ms);

		if (ready > 0)
			return true;
		if (ready < 0 && errno != EINTR)
			return false;
		if (wait_ms == 0)
			return false;
	}
	return false;
}

/* Send all of a query; what arrives meanwhile is read, lest both sides wait. */
static bool
flush(ReceiverDatabase *database, int64_t deadline_us)
{
	int			left;

	while ((left = PQflush(database->conn)) > 0)
	{
		if (!wait_for_socket(database, POLLIN | POLLOUT, deadline_us) ||
			!PQconsumeInput(database->conn))
			return false;
	}
	return left == 0;
}

static void
note_error(ReceiverDatabase *database, const PGresult *result)
{
	const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);

	snprintf(database->sqlstate, sizeof(database->sqlstate), "%s", sqlstate ? sqlstate : "XX000");
	snprintf(database->trouble, sizeof(database->trouble), "%s", PQresultErrorMessage(result));
}

/* The next result; false: there is no way to know.  NULL after the last one. */
static bool
next_result(ReceiverDatabase *database, int64_t deadline_us, PGresult **result)
{
	while (PQisBusy(database->conn))
	{
		if (!wait_for_socket(database, POLLIN, deadline_us) || !PQconsumeInput(database->conn))
			return false;
	}
	*result = PQgetResult(database->conn);
	return true;
}

/* Wait for the end of a query, and keep its rows. */
static ReceiverOutcome
finish(ReceiverDatabase *database, int64_t deadline_us, PGresult **rows)
{
	PGresult   *result;
	bool		failed = false;

	*rows = NULL;
	database->sqlstate[0] = '\0';
	if (!flush(database, deadline_us))
		return RECEIVER_UNKNOWN;
	for (;;)
	{
		if (!next_result(database, deadline_us, &result))
			return RECEIVER_UNKNOWN;
		if (result == NULL)
			break;
		if (PQresultStatus(result) == PGRES_TUPLES_OK && *rows == NULL)
		{
			*rows = result;
			continue;
		}
		if (PQresultStatus(result) != PGRES_COMMAND_OK)
		{
			failed = true;
			note_error(database, result);
		}
		PQclear(result);
	}
	/* After a FATAL error there are results, but no ready for query. */
	if (PQstatus(database->conn) != CONNECTION_OK ||
		PQtransactionStatus(database->conn) != PQTRANS_IDLE)
		return RECEIVER_UNKNOWN;
	return failed ? RECEIVER_ROLLED_BACK : RECEIVER_COMMITTED;
}

/* A query of the set-up; the rows, or NULL and trouble. */
static PGresult *
ask(ReceiverDatabase *database, int sent, int64_t deadline_us)
{
	PGresult   *rows = NULL;

	if (sent && finish(database, deadline_us, &rows) == RECEIVER_COMMITTED && rows != NULL)
		return rows;
	if (!sent || database->sqlstate[0] == '\0')
		snprintf(database->trouble, sizeof(database->trouble), "%s", PQerrorMessage(database->conn));
	PQclear(rows);
	return NULL;
}

static bool
configure_session(ReceiverDatabase *database, int64_t statement_timeout_us, int64_t deadline_us)
{
	char		timeout[32];
	const char *values[1] = {timeout};
	PGresult   *rows;

	snprintf(timeout, sizeof(timeout), "%lldms", (long long) (statement_timeout_us / 1000));
	rows = ask(database, PQsendQueryParams(database->conn, set_up, 1, NULL, values, NULL, NULL, 0),
			   deadline_us);
	PQclear(rows);
	return rows != NULL;
}

/* Prepare the call of the function, which is wherever the extension was created. */
static bool
prepare(ReceiverDatabase *database, int64_t deadline_us)
{
	const Oid	types[2] = {BYTEA_ARRAY_OID, JSONB_ARRAY_OID};
	char		query[384];
	PGresult   *rows = ask(database, PQsendQuery(database->conn, find_function), deadline_us);
	bool		found = rows != NULL && PQntuples(rows) == 1;

	if (rows == NULL)
		return false;
	if (!found)
		snprintf(database->trouble, sizeof(database->trouble),
				 "the extension sentdm is not installed in database \"%s\"", PQdb(database->conn));
	else
		snprintf(query, sizeof(query),
				 "SELECT ordinal, http_status, event_id, duplicate, reason"
				 " FROM %s.sentdm_receive_webhooks($1, $2)", PQgetvalue(rows, 0, 0));
	PQclear(rows);
	if (!found)
		return false;
	if (!PQsendPrepare(database->conn, STATEMENT, query, 2, types) ||
		finish(database, deadline_us, &rows) != RECEIVER_COMMITTED)
	{
		if (database->sqlstate[0] == '\0')
			snprintf(database->trouble, sizeof(database->trouble), "%s", PQerrorMessage(database->conn));
		return false;
	}
	return true;
}

static void
ignore_notice(void *arg, const PGresult *result)
{
	(void) arg;
	(void) result;
}

static bool
open_connection(ReceiverDatabase *database, const char *conninfo)
{
	const char *const keywords[] = {"fallback_application_name", "dbname", "client_encoding", NULL};
	const char *const values[] = {"sentdm-receiver", conninfo[0] ? conninfo : NULL, "UTF8", NULL};

	database->conn = PQconnectdbParams(keywords, values, 1);
	if (PQstatus(database->conn) == CONNECTION_OK)
		return true;
	snprintf(database->trouble, sizeof(database->trouble), "%s",
			 database->conn ? PQerrorMessage(database->conn) : "out of memory");
	return false;
}

/*
 * Variables are what libpq asks last, so these are defaults and nothing more: of
 * several hosts take the primary, and do not wait long for one.
 */
void
receiver_database_set_defaults(void)
{
	setenv("PGTARGETSESSIONATTRS", "read-write", 0);
	setenv("PGCONNECT_TIMEOUT", "5", 0);
}

bool
receiver_database_connect(ReceiverDatabase *database, const char *conninfo,
						  int64_t statement_timeout_us)
{
	int64_t		deadline_us;

	if (!open_connection(database, conninfo))
	{
		receiver_database_close(database);
		return false;
	}
	PQsetNoticeReceiver(database->conn, ignore_notice, NULL);
	PQsetnonblocking(database->conn, 1);
	deadline_us = receiver_now_us() + SETUP_TIMEOUT_US;
	if (configure_session(database, statement_timeout_us, deadline_us) &&
		prepare(database, deadline_us) &&
		receiver_database_store(database, NULL, 0, deadline_us) == RECEIVER_COMMITTED)
		return true;
	receiver_database_close(database);
	return false;
}

void
receiver_database_close(ReceiverDatabase *database)
{
	PQfinish(database->conn);
	database->conn = NULL;
}

bool
receiver_database_is_alive(ReceiverDatabase *database)
{
	if (PQconsumeInput(database->conn) && PQstatus(database->conn) == CONNECTION_OK)
		return true;
	snprintf(database->trouble, sizeof(database->trouble), "%s", PQerrorMessage(database->conn));
	receiver_database_close(database);
	return false;
}

static int
send_batch(ReceiverDatabase *database)
{
	ReceiverBatch *batch = &database->batch;
	const char *values[2] = {batch->payloads.data, batch->headers.data};
	const int	lengths[2] = {(int) batch->payloads.length, (int) batch->headers.length};
	const int	formats[2] = {BINARY, BINARY};

	return PQsendQueryPrepared(database->conn, STATEMENT, 2, values, lengths, formats, 0);
}

ReceiverOutcome
receiver_database_store(ReceiverDatabase *database, ReceiverEvent **events, int n, int64_t deadline_us)
{
	PGresult   *rows = NULL;
	ReceiverOutcome outcome;

	database->sqlstate[0] = '\0';
	if (!receiver_batch_encode(&database->batch, events, n))
	{
		snprintf(database->sqlstate, sizeof(database->sqlstate), "53200");
		return RECEIVER_ROLLED_BACK;
	}
	outcome = send_batch(database) ? finish(database, deadline_us, &rows) : RECEIVER_UNKNOWN;
	if (outcome == RECEIVER_COMMITTED && !(rows != NULL && receiver_batch_decode(rows, events, n)))
	{
		snprintf(database->trouble, sizeof(database->trouble),
				 "sentdm_receive_webhooks() did not answer with one row for each event");
		outcome = RECEIVER_UNKNOWN;
	}
	PQclear(rows);
	receiver_batch_trim(&database->batch);
	if (outcome == RECEIVER_UNKNOWN)
		receiver_database_close(database);
	return outcome;
}
