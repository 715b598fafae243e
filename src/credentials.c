/*
 * credentials.c
 *		Where the API key comes from.
 *
 * Read by a process that is about to call the API, when it does; never kept in
 * shared memory, never part of a message.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "miscadmin.h"
#include "storage/fd.h"

#include "credentials.h"
#include "sentdm.h"

/* Something that can stand in a header line. */
static const char *
check_key(const char *key)
{
	size_t		length = strlen(key);

	if (length < 10)
		return "the API key is shorter than 10 characters";
	for (size_t i = 0; i < length; i++)
	{
		if (key[i] <= ' ' || key[i] > '~')
			return "the API key has a character that cannot stand in a header";
	}
	return NULL;
}

/* The rules of ssl_key_file. */
static const char *
check_file(const struct stat *st)
{
	if (!S_ISREG(st->st_mode))
		return "sentdm.api_key_file is not a regular file";
	if (st->st_uid != geteuid() && st->st_uid != 0)
		return "sentdm.api_key_file must be owned by the database user or root";
	if ((st->st_uid == geteuid() && st->st_mode & (S_IRWXG | S_IRWXO)) ||
		(st->st_uid == 0 && st->st_mode & (S_IWGRP | S_IXGRP | S_IRWXO)))
		return "sentdm.api_key_file has group or world access";
	return NULL;
}

/* Checks the open file, not its name, so that nobody can swap it in between. */
static const char *
read_key_file(char key[SENTDM_MAX_KEY])
{
	int			fd = OpenTransientFile(sentdm_api_key_file, O_RDONLY | O_NONBLOCK | PG_BINARY);
	struct stat st;
	const char *trouble = NULL;
	ssize_t		length = 0;

	if (fd < 0)
		return "sentdm.api_key_file cannot be opened";
	if (fstat(fd, &st) != 0)
		trouble = "sentdm.api_key_file cannot be examined";
	else
		trouble = check_file(&st);
	if (trouble == NULL)
	{
		length = read(fd, key, SENTDM_MAX_KEY - 1);
		if (length < 0)
			trouble = "sentdm.api_key_file cannot be read";
	}
	CloseTransientFile(fd);
	if (trouble != NULL)
		return trouble;
	while (length > 0 && strchr(" \t\r\n", key[length - 1]) != NULL)
		length--;
	key[length] = '\0';
	return NULL;
}

const char *
sentdm_read_api_key(char key[SENTDM_MAX_KEY])
{
	const char *value = sentdm_api_key_setting();
	const char *trouble;

	key[0] = '\0';
	if (value[0] == '\0' && sentdm_api_key_file[0] != '\0')
	{
		trouble = read_key_file(key);
		return trouble ? trouble : check_key(key);
	}
	if (value[0] == '\0')
		value = getenv("SENT_DM_API_KEY");
	if (value == NULL || value[0] == '\0')
		return "no API key is set";
	strlcpy(key, value, SENTDM_MAX_KEY);
	return check_key(key);
}
