/*
 * launcher.h
 *		The launcher and the entry point of the workers that it starts.
 */
#ifndef SENTDM_LAUNCHER_H
#define SENTDM_LAUNCHER_H

/* launcher.c */
extern void sentdm_launcher_register(void);
extern PGDLLEXPORT void sentdm_launcher_main(Datum arg);
extern PGDLLEXPORT void sentdm_reader_main(Datum arg);

/* worker.c; arg is the oid of its database */
extern PGDLLEXPORT void sentdm_worker_main(Datum arg);

#endif							/* SENTDM_LAUNCHER_H */
