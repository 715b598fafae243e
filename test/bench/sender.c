/*
 * sender.c
 *		Sends one message at a time, and says when.
 *
 *		sender CONNINFO COUNT INTERVAL_US [STATEMENT]
 *
 * Each is a transaction of its own, a prepared statement: sentdm_send, or one
 * that returns an id too.  A line of the output is the message's id, and the Unix time in microseconds when the statement was
 * sent and when its commit was confirmed.
 */
#include <libpq-fe.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SEND "SELECT sentdm_send('+14155550101', 'order_confirmation'," \
	" '{\"name\": \"Ada\", \"order_id\": \"1001\"}')"

static int64_t
unix_now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void
check(PGconn *connection, PGresult *result, ExecStatusType wanted)
{
	if (PQresultStatus(result) == wanted)
		return;
	fprintf(stderr, "sender: %s", PQerrorMessage(connection));
	exit(1);
}

static void
send_one(PGconn *connection)
{
	int64_t		before_us = unix_now_us();
	PGresult   *result = PQexecPrepared(connection, "send", 0, NULL, NULL, NULL, 0);
	int64_t		after_us = unix_now_us();

	check(connection, result, PGRES_TUPLES_OK);
	printf("%s %lld %lld\n", PQgetvalue(result, 0, 0), (long long) before_us, (long long) after_us);
	PQclear(result);
}

int
main(int argc, char **argv)
{
	PGconn	   *connection;
	PGresult   *result;

	if (argc < 4 || argc > 5)
	{
		fprintf(stderr, "usage: sender CONNINFO COUNT INTERVAL_US [STATEMENT]\n");
		return 2;
	}
	connection = PQconnectdb(argv[1]);
	result = PQprepare(connection, "send", argc > 4 ? argv[4] : SEND, 0, NULL);
	check(connection, result, PGRES_COMMAND_OK);
	PQclear(result);
	for (int i = 0; i < atoi(argv[2]); i++)
	{
		if (i > 0)
			usleep(atoi(argv[3]));
		send_one(connection);
	}
	PQfinish(connection);
	return 0;
}
