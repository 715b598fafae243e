/*
 * failpoint.c
 *		Places at which a test can make the worker die, fail or stand still.
 *
 * The test writes "PLACE ACTION" into the file sentdm.failpoint in the data
 * directory.  The worker that comes to that place renames the file to
 * sentdm.failpoint.reached, which tells the test and makes it happen once, and
 * then does the action: "kill" ends the process as kill -9 does, "error" raises
 * an error, "pause" stands still until the test removes the file.
 */
#include "postgres.h"

#ifdef SENTDM_FAILPOINTS

#include <signal.h>
#include <unistd.h>

#include "failpoint.h"
#include "storage/pmsignal.h"

#define WANTED "sentdm.failpoint"
#define REACHED "sentdm.failpoint.reached"

static bool
read_action(const char *place, char action[16])
{
	char		wanted[64];
	FILE	   *file = fopen(WANTED, "r");
	bool		here;

	if (file == NULL)
		return false;
	here = fscanf(file, "%63s %15s", wanted, action) == 2 && strcmp(wanted, place) == 0;
	fclose(file);
	return here;
}

void
sentdm_failpoint(const char *place)
{
	char		action[16];

	if (!read_action(place, action) || rename(WANTED, REACHED) != 0)
		return;
	if (strcmp(action, "kill") == 0)
		kill(getpid(), SIGKILL);
	if (strcmp(action, "error") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_IO_ERROR),
				 errmsg("failpoint \"%s\"", place)));
	while (access(REACHED, F_OK) == 0 && PostmasterIsAlive())
		pg_usleep(10000);
}

#endif							/* SENTDM_FAILPOINTS */
