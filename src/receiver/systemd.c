/*
 * systemd.c
 *		What systemd gives its services and wants to hear from them.
 *
 * The protocol is a datagram and three variables; libsystemd is not needed for it.
 */
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "systemd.h"

#define FIRST_PASSED_FD 3

void
receiver_systemd_notify(const char *state)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un address;
	size_t		length;
	int			fd;

	if (path == NULL || (path[0] != '/' && path[0] != '@'))
		return;
	length = strlen(path);
	if (length >= sizeof(address.sun_path))
		return;
	memset(&address, 0, sizeof(address));
	address.sun_family = AF_UNIX;
	memcpy(address.sun_path, path, length);
	if (path[0] == '@')
		address.sun_path[0] = '\0';	/* the abstract namespace */
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	(void) sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *) &address,
				  (socklen_t) (offsetof(struct sockaddr_un, sun_path) + length));
	close(fd);
}

/* Was this variable meant for us, and not for a parent? */
static int
is_for_us(const char *pid_variable)
{
	const char *pid = getenv(pid_variable);

	return pid != NULL && strtol(pid, NULL, 10) == (long) getpid();
}

int64_t
receiver_systemd_watchdog_us(void)
{
	const char *interval = getenv("WATCHDOG_USEC");

	if (interval == NULL || (getenv("WATCHDOG_PID") != NULL && !is_for_us("WATCHDOG_PID")))
		return 0;
	return strtoll(interval, NULL, 10);
}

int
receiver_systemd_socket(void)
{
	const char *count = getenv("LISTEN_FDS");

	if (count == NULL || strcmp(count, "1") != 0 || !is_for_us("LISTEN_PID"))
		return -1;
	(void) fcntl(FIRST_PASSED_FD, F_SETFD, FD_CLOEXEC);
	return FIRST_PASSED_FD;
}
