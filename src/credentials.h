/*
 * credentials.h
 *		Where the API key comes from.
 */
#ifndef SENTDM_CREDENTIALS_H
#define SENTDM_CREDENTIALS_H

#define SENTDM_MAX_KEY 512

/*
 * Read the key that is in force: sentdm.api_key, else sentdm.api_key_file, else
 * SENT_DM_API_KEY.  Returns NULL and fills key, or says what is wrong (static
 * text, names no path and no value).
 */
extern const char *sentdm_read_api_key(char key[SENTDM_MAX_KEY]);

#endif							/* SENTDM_CREDENTIALS_H */
