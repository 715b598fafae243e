/*
 * commands.h
 *		Commands of the server that concern sending.
 */
#ifndef SENTDM_COMMANDS_H
#define SENTDM_COMMANDS_H

/* Install the hooks; once per process. */
extern void sentdm_commands_init(void);

#endif							/* SENTDM_COMMANDS_H */
