/*
 * recovery.c
 *		How this server came to be the primary.
 *
 * A promoted standby goes on where the primary stopped, and so does the queue.  A
 * server that was restored from a backup may hold messages that were sent after
 * the point it was restored to: it is a copy.  Both end on a new timeline.  What
 * tells them apart is the signal file that the server was started with, and, when
 * that start is over, what the timeline's history file says.
 */
#include "postgres.h"

#include <sys/stat.h>
#include <unistd.h>

#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "miscadmin.h"
#include "storage/fd.h"

#include "recovery.h"

typedef enum Start
{
	START_AS_PRIMARY,
	START_AS_STANDBY,
	START_IN_ARCHIVE_RECOVERY
} Start;

/* Set in the postmaster, inherited by every process that it starts. */
static Start start = START_AS_PRIMARY;

void
sentdm_recovery_note_start(void)
{
	struct stat st;

	/*
	 * The server looks for them in this order, too, and removes them at the
	 * end.
	 */
	if (stat(STANDBY_SIGNAL_FILE, &st) == 0)
		start = START_AS_STANDBY;
	else if (stat(RECOVERY_SIGNAL_FILE, &st) == 0)
		start = START_IN_ARCHIVE_RECOVERY;
	else
		start = START_AS_PRIMARY;
}

/* Does the history of this timeline say that it began where the WAL ended? */
static bool
began_at_end_of_wal(TimeLineID timeline)
{
	char		path[MAXPGPATH];
	char		line[1024];
	bool		at_end = false;
	FILE	   *file;

	TLHistoryFilePath(path, timeline);
	file = AllocateFile(path, "r");
	if (file == NULL)
		return false;
	/* The last line is about the switch to this timeline. */
	while (fgets(line, sizeof(line), file) != NULL)
		at_end = strstr(line, "no recovery target specified") != NULL;
	FreeFile(file);
	return at_end;
}

bool
sentdm_recovery_made_copy(TimeLineID then, TimeLineID now)
{
	if (then == now || start == START_AS_STANDBY)
		return false;
	return start == START_IN_ARCHIVE_RECOVERY || !began_at_end_of_wal(now);
}
