#!/bin/bash
# Run once, when the database is made: the extension, and the role of the receiver.
# Sending is for you to switch on: SELECT sentdm_enable().
set -eu
psql -v ON_ERROR_STOP=1 -v password="$RECEIVER_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<-'SQL'
	CREATE EXTENSION sentdm;
	CREATE ROLE sentdm_receiver LOGIN PASSWORD :'password';
	SELECT sentdm_grant('sentdm_receiver', 'webhook');
SQL
