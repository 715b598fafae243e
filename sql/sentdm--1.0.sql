-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION sentdm" to load this file. \quit

--
-- Relations.  They live in a schema of their own, so that the functions can
-- be put wherever the user likes.
--

CREATE SCHEMA sentdm;
COMMENT ON SCHEMA sentdm IS 'tables and views of the sentdm extension';

-- No CHECK constraints: only this extension writes here, and PostgreSQL reads a
-- constraint's expression anew for each statement, a quarter of the cost of a
-- single sentdm_send().
CREATE TABLE sentdm.messages (
	id uuid PRIMARY KEY,
	request jsonb NOT NULL,
	state text NOT NULL DEFAULT 'queued',
	priority text NOT NULL DEFAULT 'normal',
	tag text,
	unique_key text,
	profile_id uuid,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	created_by name NOT NULL DEFAULT CURRENT_USER,
	send_at timestamptz,
	expires_at timestamptz,
	generation integer NOT NULL DEFAULT 1,
	attempts integer NOT NULL DEFAULT 0,
	finished_at timestamptz,
	http_status integer,
	error_code text,
	error text,
	request_id text,
	erased_at timestamptz
);
CREATE UNIQUE INDEX messages_unique_key ON sentdm.messages (unique_key) WHERE unique_key IS NOT NULL;
CREATE INDEX messages_tag ON sentdm.messages (tag) WHERE tag IS NOT NULL;
-- Ids are in the order of time, so that most messages need no index on a time.
CREATE INDEX messages_send_at ON sentdm.messages (send_at, id) WHERE send_at IS NOT NULL;
CREATE INDEX messages_problem ON sentdm.messages (id) WHERE state IN ('failed', 'uncertain');

COMMENT ON TABLE sentdm.messages IS 'one row per message, kept until the retention time is over';
COMMENT ON COLUMN sentdm.messages.priority IS 'high, normal or bulk';
COMMENT ON COLUMN sentdm.messages.tag IS 'the caller''s name for messages that belong together; a row of sentdm.progress';
COMMENT ON COLUMN sentdm.messages.profile_id IS 'sender profile of an organization''s key; NULL: the key''s own';
COMMENT ON COLUMN sentdm.messages.created_at IS 'when sentdm_send() was called: the start of its transaction';
COMMENT ON COLUMN sentdm.messages.created_by IS 'the role that called it';
COMMENT ON COLUMN sentdm.messages.send_at IS 'not before this time; NULL: at once';
COMMENT ON COLUMN sentdm.messages.expires_at IS 'not after this time; NULL: whenever it can be sent';
COMMENT ON COLUMN sentdm.messages.finished_at IS 'when the state became final';
COMMENT ON COLUMN sentdm.messages.http_status IS 'status of the last answer of Sent';
COMMENT ON COLUMN sentdm.messages.error_code IS 'Sent''s code of the error, or that of sentdm; NULL: none';
COMMENT ON COLUMN sentdm.messages.error IS 'what was wrong, in words';
COMMENT ON COLUMN sentdm.messages.id IS 'UUID version 7; part of the Idempotency-Key';
COMMENT ON COLUMN sentdm.messages.request IS 'exactly what is POSTed to the API';
COMMENT ON COLUMN sentdm.messages.state IS 'queued until the outcome is stored; then accepted, failed, expired, cancelled or uncertain';
COMMENT ON COLUMN sentdm.messages.unique_key IS 'the caller''s own key: a second message with the same key is not sent';
COMMENT ON COLUMN sentdm.messages.generation IS 'part of the Idempotency-Key; only a deliberate sentdm_retry() raises it';
COMMENT ON COLUMN sentdm.messages.attempts IS 'requests made that Sent may have looked at';
COMMENT ON COLUMN sentdm.messages.erased_at IS 'when its text and parameters were erased: it cannot be retried any more';
COMMENT ON COLUMN sentdm.messages.request_id IS 'Sent''s id of the answered request, for its support';

-- Half of a page and more is left free: a claim adds three times to each row, and
-- all rows of a page are claimed at once, without a new entry in an index.
CREATE TABLE sentdm.outbox (
	message_id uuid NOT NULL,
	part integer NOT NULL DEFAULT 0,
	priority text NOT NULL COLLATE "C",
	due_at timestamptz NOT NULL,
	expires_at timestamptz,
	recipients text[],
	sandbox boolean NOT NULL DEFAULT false,
	attempts integer NOT NULL DEFAULT 0,
	crashes integer NOT NULL DEFAULT 0,
	position bigint NOT NULL DEFAULT 0,
	claimed_at timestamptz,
	ambiguous_since timestamptz,
	first_tried_at timestamptz,
	http_status integer,
	error_code text,
	error text,
	PRIMARY KEY (message_id, part)
) WITH (fillfactor = 44, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 10000,
		autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 50000);
CREATE INDEX outbox_due ON sentdm.outbox (priority, due_at, position);

COMMENT ON TABLE sentdm.outbox IS 'one row per request that still has to be made; empty when there is no work';
COMMENT ON COLUMN sentdm.outbox.message_id IS 'the message that it belongs to';
COMMENT ON COLUMN sentdm.outbox.priority IS 'high, normal or bulk';
COMMENT ON COLUMN sentdm.outbox.expires_at IS 'not after this time';
COMMENT ON COLUMN sentdm.outbox.sandbox IS 'Sent is asked to validate only';
COMMENT ON COLUMN sentdm.outbox.attempts IS 'requests made so far that Sent may have looked at';
COMMENT ON COLUMN sentdm.outbox.http_status IS 'status of the last answer';
COMMENT ON COLUMN sentdm.outbox.error_code IS 'code of the error in it, or why there was none';
COMMENT ON COLUMN sentdm.outbox.error IS 'the same in words';
COMMENT ON COLUMN sentdm.outbox.part IS '0, or the number of a part of a request that was split';
COMMENT ON COLUMN sentdm.outbox.due_at IS 'not before this time';
COMMENT ON COLUMN sentdm.outbox.recipients IS 'the recipients of this part; NULL: all of the request';
COMMENT ON COLUMN sentdm.outbox.crashes IS 'how often the worker died while it held this row';
COMMENT ON COLUMN sentdm.outbox.position IS 'order of those that are due at the same time';
COMMENT ON COLUMN sentdm.outbox.claimed_at IS 'when the worker took it; NULL while it waits';
COMMENT ON COLUMN sentdm.outbox.ambiguous_since IS 'start of the first attempt whose outcome is unknown';
COMMENT ON COLUMN sentdm.outbox.first_tried_at IS 'start of the first attempt; sentdm.give_up_after counts from here';

CREATE TABLE sentdm.deliveries (
	sent_id uuid UNIQUE,
	message_id uuid,
	recipient text,
	channel text,
	status text NOT NULL,
	status_at timestamptz,
	reason_code text,
	reason text,
	price numeric
) WITH (fillfactor = 85);
CREATE INDEX deliveries_message_id ON sentdm.deliveries (message_id);
CREATE INDEX deliveries_elsewhere ON sentdm.deliveries (sent_id) WHERE message_id IS NULL;
-- Without it, a publication FOR ALL TABLES would make every update here an error.
ALTER TABLE sentdm.deliveries REPLICA IDENTITY FULL;

COMMENT ON TABLE sentdm.deliveries IS 'one row per recipient and channel, as Sent tracks it';
COMMENT ON COLUMN sentdm.deliveries.recipient IS 'the recipient''s number';
COMMENT ON COLUMN sentdm.deliveries.channel IS 'sms, whatsapp, rcs, mms, ...; NULL: not chosen yet';
COMMENT ON COLUMN sentdm.deliveries.reason_code IS 'Sent''s code for why it did not arrive';
COMMENT ON COLUMN sentdm.deliveries.reason IS 'the same in words';
COMMENT ON COLUMN sentdm.deliveries.price IS 'what Sent charged, in the currency of the account';
COMMENT ON COLUMN sentdm.deliveries.sent_id IS 'the API''s message_id; NULL for a recipient that was refused';
COMMENT ON COLUMN sentdm.deliveries.message_id IS 'our message; NULL while it is not known, or when it was sent elsewhere';
COMMENT ON COLUMN sentdm.deliveries.status IS 'queued, scheduled, routed, sent, delivered, read, failed, filtered, blocked, cancelled, or what Sent invents next';
COMMENT ON COLUMN sentdm.deliveries.status_at IS 'Sent''s time of the last status that was applied; NULL before the first receipt';

CREATE TABLE sentdm.events (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	event text,
	sent_id uuid,
	occurred_at timestamptz,
	received_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	payload jsonb,
	raw bytea,
	reason text,
	duplicates integer NOT NULL DEFAULT 0,
	late boolean NOT NULL DEFAULT false,
	webhook_id text,
	dedupe_key bytea NOT NULL
);
-- Finds the events of a message, too; each index on what is not in the order of time
-- costs a page of its own for nearly every event.
CREATE UNIQUE INDEX events_sent_id ON sentdm.events (sent_id, dedupe_key) NULLS NOT DISTINCT;
CREATE INDEX events_inbound ON sentdm.events (received_at) WHERE event = 'message.received';

COMMENT ON TABLE sentdm.events IS 'every authentic webhook event, as it was received';
COMMENT ON COLUMN sentdm.events.id IS 'in the order in which events were stored';
COMMENT ON COLUMN sentdm.events.event IS 'what happened, such as message.delivered; NULL: it does not say';
COMMENT ON COLUMN sentdm.events.sent_id IS 'the message that it is about';
COMMENT ON COLUMN sentdm.events.occurred_at IS 'when it happened, as Sent says';
COMMENT ON COLUMN sentdm.events.received_at IS 'when it was stored';
COMMENT ON COLUMN sentdm.events.webhook_id IS 'the webhook that it came by, when that was signed';
COMMENT ON COLUMN sentdm.events.payload IS 'the whole envelope; NULL when it is not JSON that can be stored';
COMMENT ON COLUMN sentdm.events.raw IS 'the bytes received, when payload could not be stored';
COMMENT ON COLUMN sentdm.events.reason IS 'why only the raw bytes are kept';
COMMENT ON COLUMN sentdm.events.duplicates IS 'how often the same event came again';
COMMENT ON COLUMN sentdm.events.late IS 'older than sentdm.webhook_tolerance when it arrived';
COMMENT ON COLUMN sentdm.events.dedupe_key IS 'hash of the signed content that tells this event from others';

CREATE TABLE sentdm.templates (
	id text PRIMARY KEY,
	name text NOT NULL,
	status text,
	category text,
	language text,
	channels text[] NOT NULL,
	variables text[] NOT NULL,
	synced_at timestamptz NOT NULL DEFAULT pg_catalog.now()
);
CREATE INDEX templates_name ON sentdm.templates (name);

COMMENT ON TABLE sentdm.templates IS 'the account''s templates, as of the last sentdm_sync_templates()';
COMMENT ON COLUMN sentdm.templates.name IS 'what sentdm_send() calls it';
COMMENT ON COLUMN sentdm.templates.status IS 'Sent''s word, such as APPROVED';
COMMENT ON COLUMN sentdm.templates.category IS 'UTILITY, MARKETING, AUTHENTICATION, ...';
COMMENT ON COLUMN sentdm.templates.language IS 'language of its text';
COMMENT ON COLUMN sentdm.templates.channels IS 'channels that it can be sent on';
COMMENT ON COLUMN sentdm.templates.synced_at IS 'when it was fetched';
COMMENT ON COLUMN sentdm.templates.id IS 'Sent''s id, in lower case';
COMMENT ON COLUMN sentdm.templates.variables IS 'names that parameters must give a value to';

-- A row stays when somebody opts in again: an older event may still come.
CREATE TABLE sentdm.optouts (
	phone text COLLATE "C" PRIMARY KEY,
	opted_out boolean NOT NULL DEFAULT true,
	since timestamptz NOT NULL DEFAULT pg_catalog.now(),
	source text NOT NULL DEFAULT 'manual'
);
COMMENT ON TABLE sentdm.optouts IS 'who does not want messages, learned from webhooks, contacts and sentdm_opt_out()';
COMMENT ON COLUMN sentdm.optouts.phone IS 'the number of the person';
COMMENT ON COLUMN sentdm.optouts.opted_out IS 'false: wants them again';
COMMENT ON COLUMN sentdm.optouts.since IS 'when that was said';
COMMENT ON COLUMN sentdm.optouts.source IS 'the webhook event that said it; contacts or manual otherwise';

CREATE TABLE sentdm.webhook_secrets (
	id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	webhook_id uuid,
	secret text NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	valid_until timestamptz
);
-- A policy-less row security keeps even pg_read_all_data away.
ALTER TABLE sentdm.webhook_secrets ENABLE ROW LEVEL SECURITY;
ALTER TABLE sentdm.webhook_secrets FORCE ROW LEVEL SECURITY;
COMMENT ON TABLE sentdm.webhook_secrets IS 'signing secrets of webhooks; readable by nobody, never dumped';
COMMENT ON COLUMN sentdm.webhook_secrets.id IS 'in the order in which they were stored';
COMMENT ON COLUMN sentdm.webhook_secrets.webhook_id IS 'the webhook that it belongs to; NULL: any';
COMMENT ON COLUMN sentdm.webhook_secrets.secret IS 'the secret; it starts with whsec_';
COMMENT ON COLUMN sentdm.webhook_secrets.created_at IS 'when it was stored';
COMMENT ON COLUMN sentdm.webhook_secrets.valid_until IS 'the end of the overlap after a rotation; NULL: in force';

CREATE TABLE sentdm.webhooks (
	id uuid PRIMARY KEY,
	url text NOT NULL,
	registered_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
	backfilled_until timestamptz NOT NULL DEFAULT pg_catalog.now(),
	checked_at timestamptz,
	active boolean,
	failures integer,
	trouble text
);
COMMENT ON TABLE sentdm.webhooks IS 'endpoints at Sent that post their events to this database; never dumped, for a copy is not their receiver';
COMMENT ON COLUMN sentdm.webhooks.id IS 'Sent''s id of the endpoint';
COMMENT ON COLUMN sentdm.webhooks.url IS 'where Sent posts to';
COMMENT ON COLUMN sentdm.webhooks.registered_at IS 'when it was made or taken over';
COMMENT ON COLUMN sentdm.webhooks.backfilled_until IS 'up to this time, what Sent could not post was fetched from its log';
COMMENT ON COLUMN sentdm.webhooks.checked_at IS 'when the worker looked at it last';
COMMENT ON COLUMN sentdm.webhooks.active IS 'whether Sent posts to it: after ten failures in a row it does not';
COMMENT ON COLUMN sentdm.webhooks.failures IS 'events in a row that could not be posted';
COMMENT ON COLUMN sentdm.webhooks.trouble IS 'what the worker found wrong with it; NULL: nothing';

CREATE TABLE sentdm.refreshes (
	scheduled boolean,
	pass integer,
	send_at timestamptz NOT NULL,
	message_id uuid NOT NULL,
	sent_id uuid NOT NULL,
	PRIMARY KEY (scheduled, pass)
);
COMMENT ON TABLE sentdm.refreshes IS 'how far the worker has asked for statuses that no receipt brought; never dumped';
COMMENT ON COLUMN sentdm.refreshes.scheduled IS 'of messages with a send_at, in the order of it; else of the others, in the order of their ids';
COMMENT ON COLUMN sentdm.refreshes.pass IS 'at sentdm.refresh_after times 1, 4, 16, 64 and 256';
COMMENT ON COLUMN sentdm.refreshes.send_at IS 'of the message ...';
COMMENT ON COLUMN sentdm.refreshes.message_id IS '... up to which it has asked, ...';
COMMENT ON COLUMN sentdm.refreshes.sent_id IS '... and up to which of its recipients';

CREATE TABLE sentdm.sender (
	singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
	system_identifier bigint NOT NULL,
	database_oid oid NOT NULL,
	cluster_name text NOT NULL,
	environment text NOT NULL,
	server_version integer NOT NULL,
	timeline integer NOT NULL,
	enabled boolean NOT NULL,
	enabled_at timestamptz NOT NULL,
	enabled_by name NOT NULL,
	paused_at timestamptz,
	pause_kind text,
	pause_reason text,
	probe_at timestamptz,
	paused_key bigint,
	held bigint NOT NULL DEFAULT 0,
	copy_of text
);
COMMENT ON TABLE sentdm.sender IS 'who this database is, and whether it may send; at most one row; never dumped, so that a copy does not send';
COMMENT ON COLUMN sentdm.sender.singleton IS 'there is one row at most';
COMMENT ON COLUMN sentdm.sender.system_identifier IS 'of the cluster, as pg_controldata shows it';
COMMENT ON COLUMN sentdm.sender.database_oid IS 'of this database';
COMMENT ON COLUMN sentdm.sender.cluster_name IS 'the setting of this name at that time';
COMMENT ON COLUMN sentdm.sender.environment IS 'the setting sentdm.environment at that time';
COMMENT ON COLUMN sentdm.sender.server_version IS 'PG_VERSION_NUM at that time';
COMMENT ON COLUMN sentdm.sender.timeline IS 'the timeline at that time';
COMMENT ON COLUMN sentdm.sender.enabled IS 'sending is enabled';
COMMENT ON COLUMN sentdm.sender.enabled_at IS 'since when';
COMMENT ON COLUMN sentdm.sender.enabled_by IS 'the role that enabled it';
COMMENT ON COLUMN sentdm.sender.paused_at IS 'since when the queue is paused; NULL: it is not';
COMMENT ON COLUMN sentdm.sender.pause_reason IS 'why, in words';
COMMENT ON COLUMN sentdm.sender.pause_kind IS 'user, or what made the worker pause: credentials, forbidden, suspended, balance, quota, certificate';
COMMENT ON COLUMN sentdm.sender.copy_of IS 'why the worker found this to be a copy; outlives pg_upgrade, which changes the traces; sentdm_enable() clears it';
COMMENT ON COLUMN sentdm.sender.held IS 'messages from before the last sentdm_enable() that it left on hold';
COMMENT ON COLUMN sentdm.sender.paused_key IS 'hash of the API key, base URL and CA file at that time: a change is tried once';
COMMENT ON COLUMN sentdm.sender.probe_at IS 'when the worker tries again by itself; NULL: only after sentdm_resume() or a changed key';

-- What a dump carries: the record, never the queue, the secrets or the identity.
SELECT pg_catalog.pg_extension_config_dump('sentdm.messages', '');
SELECT pg_catalog.pg_extension_config_dump('sentdm.deliveries', '');
SELECT pg_catalog.pg_extension_config_dump('sentdm.events', '');
SELECT pg_catalog.pg_extension_config_dump('sentdm.optouts', '');
SELECT pg_catalog.pg_extension_config_dump('sentdm.events_id_seq', '');

--
-- What the functions below stand on.  Not for users.
--

CREATE FUNCTION sentdm.worker_report(
	OUT preloaded boolean, OUT launcher boolean, OUT enabled boolean, OUT pid integer,
	OUT started_at timestamptz, OUT in_flight integer, OUT answered_at timestamptz,
	OUT http_status integer, OUT error_code text, OUT clock_skew_ms bigint, OUT trouble text, OUT mode text)
RETURNS record
AS 'MODULE_PATHNAME', 'sentdm_worker_report' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
REVOKE ALL ON FUNCTION sentdm.worker_report() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.worker_report() IS 'internal: what the worker of this database says of itself';

CREATE FUNCTION sentdm.counters(OUT name text, OUT value bigint)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'sentdm_counters' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
REVOKE ALL ON FUNCTION sentdm.counters() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.counters() IS 'internal: counters of this database since the server started';

CREATE FUNCTION sentdm.credentials_trouble() RETURNS text
AS 'MODULE_PATHNAME', 'sentdm_credentials_trouble' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
REVOKE ALL ON FUNCTION sentdm.credentials_trouble() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.credentials_trouble() IS 'internal: what is wrong with the API key or the base URL; NULL: nothing';

CREATE FUNCTION sentdm.webhook_secret_set() RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_webhook_secret_set' LANGUAGE C VOLATILE PARALLEL RESTRICTED;
REVOKE ALL ON FUNCTION sentdm.webhook_secret_set() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.webhook_secret_set() IS 'internal: is sentdm.webhook_secret set?';

CREATE FUNCTION sentdm.seconds_to_send(requests bigint, recipients bigint) RETURNS double precision
AS 'MODULE_PATHNAME', 'sentdm_pace' LANGUAGE C STABLE STRICT PARALLEL SAFE;
REVOKE ALL ON FUNCTION sentdm.seconds_to_send(bigint, bigint) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.seconds_to_send(bigint, bigint)
IS 'internal: how long so much takes at least, under the limits in force; NULL: there are none';

CREATE FUNCTION sentdm.without_content(request jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
SELECT jsonb_strip_nulls(jsonb_build_object('to', request -> 'to', 'channel', request -> 'channel',
	'sandbox', request -> 'sandbox',
	'template', CASE WHEN request ? 'template' THEN (request -> 'template') - 'parameters' END))
$$;
REVOKE ALL ON FUNCTION sentdm.without_content(jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.without_content(jsonb) IS 'internal: a request without text, parameters and further fields';

CREATE FUNCTION sentdm.trigger_trouble(trigger oid, relation regclass) RETURNS text
AS 'MODULE_PATHNAME', 'sentdm_trigger_trouble' LANGUAGE C STABLE STRICT PARALLEL RESTRICTED;
REVOKE ALL ON FUNCTION sentdm.trigger_trouble(oid, regclass) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.trigger_trouble(oid, regclass)
IS 'internal: what is wrong with a trigger that calls sentdm_send_trigger(); NULL: nothing';

CREATE FUNCTION sentdm.fence() RETURNS text
AS 'MODULE_PATHNAME', 'sentdm_fence' LANGUAGE C VOLATILE PARALLEL RESTRICTED
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm.fence() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.fence() IS 'internal: why this database must not send; NULL: it may';

CREATE FUNCTION sentdm.ignore_applied() RETURNS trigger
AS 'MODULE_PATHNAME', 'sentdm_ignore_applied' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm.ignore_applied() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.ignore_applied() IS 'internal: leaves out what logical replication applies';

CREATE TRIGGER ignore_applied BEFORE INSERT OR UPDATE ON sentdm.outbox
	FOR EACH ROW EXECUTE FUNCTION sentdm.ignore_applied();
ALTER TABLE sentdm.outbox ENABLE REPLICA TRIGGER ignore_applied;
COMMENT ON TRIGGER ignore_applied ON sentdm.outbox IS 'a subscriber must not send what its publisher sends';

CREATE TRIGGER ignore_applied BEFORE INSERT OR UPDATE OR DELETE ON sentdm.sender
	FOR EACH ROW EXECUTE FUNCTION sentdm.ignore_applied();
ALTER TABLE sentdm.sender ENABLE REPLICA TRIGGER ignore_applied;
COMMENT ON TRIGGER ignore_applied ON sentdm.sender IS 'a subscriber is not its publisher';

--
-- Sending
--

CREATE FUNCTION sentdm_send(
	recipient text, template text DEFAULT NULL, parameters jsonb DEFAULT NULL, body text DEFAULT NULL,
	channels text[] DEFAULT NULL, send_at timestamptz DEFAULT NULL, expires_at timestamptz DEFAULT NULL,
	priority text DEFAULT 'normal', unique_key text DEFAULT NULL, tag text DEFAULT NULL,
	profile_id uuid DEFAULT NULL, sandbox boolean DEFAULT NULL, extra jsonb DEFAULT NULL)
RETURNS uuid
AS 'MODULE_PATHNAME', 'sentdm_send' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_send(text, text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_send(text, text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb)
IS 'send a message to one recipient when this transaction commits; returns its id. Give a template (its name, or its id) or a body. recipient is in E.164, such as +14155550101; priority is high, normal or bulk; a message with a unique_key that was used before is not sent, and the id of the first one is returned; extra holds further fields of the API''s request';

CREATE FUNCTION sentdm_send(
	recipients text[], template text DEFAULT NULL, parameters jsonb DEFAULT NULL, body text DEFAULT NULL,
	channels text[] DEFAULT NULL, send_at timestamptz DEFAULT NULL, expires_at timestamptz DEFAULT NULL,
	priority text DEFAULT 'normal', unique_key text DEFAULT NULL, tag text DEFAULT NULL,
	profile_id uuid DEFAULT NULL, sandbox boolean DEFAULT NULL, extra jsonb DEFAULT NULL)
RETURNS SETOF uuid
AS 'MODULE_PATHNAME', 'sentdm_send_many' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_send(text[], text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_send(text[], text, jsonb, text, text[], timestamptz, timestamptz, text, text, text, uuid, boolean, jsonb)
IS 'send the same message to many recipients when this transaction commits; returns one id per 1,000 of them. The other arguments are as for one recipient';

CREATE FUNCTION sentdm_send_batch(requests jsonb)
RETURNS TABLE (ordinal integer, message_id uuid, error text)
AS 'MODULE_PATHNAME', 'sentdm_send_batch' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_send_batch(jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_send_batch(jsonb)
IS 'send an array of messages, each an object keyed by the arguments of sentdm_send(); a bad one yields its error, the others are sent';

CREATE FUNCTION sentdm_send_trigger() RETURNS trigger
AS 'MODULE_PATHNAME', 'sentdm_send_trigger' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_send_trigger() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_send_trigger()
IS 'send a message for each row, with arguments as in ''recipient=phone''. Named are columns for recipient, body, parameters.X, send_at, expires_at, unique_key and profile_id, and values for template, channels, priority, tag and sandbox. A row whose recipient is NULL sends nothing';

CREATE FUNCTION sentdm_cancel(message_id uuid) RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_cancel' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_cancel(uuid) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_cancel(uuid) IS 'call a message off. true: it will never be sent; false: it is too late';

CREATE FUNCTION sentdm_retry(message_id uuid) RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_retry' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_retry(uuid) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_retry(uuid)
IS 'send a failed, expired, cancelled or uncertain message again, deliberately, under a new key; false: it is in no such state';

CREATE FUNCTION sentdm_cancel_tag(tag text) RETURNS bigint
AS 'MODULE_PATHNAME', 'sentdm_cancel_tag' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_cancel_tag(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_cancel_tag(text)
IS 'cancel all messages of a tag for which it is not too late; so many will never be sent';

CREATE FUNCTION sentdm_retry_tag(tag text, states text[] DEFAULT '{failed}') RETURNS bigint
AS 'MODULE_PATHNAME', 'sentdm_retry_tag' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_retry_tag(text, text[]) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_retry_tag(text, text[])
IS 'send the failed messages of a tag again, or those in other states (expired, cancelled, uncertain), as sentdm_retry() does; returns how many';

--
-- Operating
--

CREATE FUNCTION sentdm_enable(pending text DEFAULT 'hold') RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_enable' LANGUAGE C VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_enable(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_enable(text)
IS 'start sending from this database; pending (hold, send or discard) decides on messages that a copy carries';

CREATE FUNCTION sentdm_disable() RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_disable' LANGUAGE C VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_disable() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_disable() IS 'stop the worker and leave the database free to be dropped';

CREATE FUNCTION sentdm_pause(reason text DEFAULT NULL) RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_pause' LANGUAGE C VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_pause(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_pause(text) IS 'hold the queue of this database; messages can still be enqueued';

CREATE FUNCTION sentdm_resume() RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_resume' LANGUAGE C VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_resume() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_resume() IS 'release the queue, also from a pause that the worker made itself';

--
-- Receipts
--

CREATE FUNCTION sentdm_verify_signature(payload bytea, signature text, secret text)
RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_verify_signature'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_verify_signature(bytea, text, text)
	IS 'is this the hex signature, of Sent''s older scheme, of a webhook? Malformed or NULL input is false';

CREATE FUNCTION sentdm_verify_signature(payload text, signature text, secret text)
RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_verify_signature'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_verify_signature(text, text, text)
	IS 'is this the hex signature, of Sent''s older scheme, of a webhook? Malformed or NULL input is false';

CREATE FUNCTION sentdm_verify_signature(payload bytea, signature text, secret text,
	webhook_id text, webhook_timestamp text,
	tolerance interval DEFAULT '5 minutes', at timestamptz DEFAULT pg_catalog.now())
RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_verify_signature'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_verify_signature(bytea, text, text, text, text, interval, timestamptz)
	IS 'is this the v1 signature of a webhook, made within the tolerance of a time? Malformed or NULL input is false';

CREATE FUNCTION sentdm_verify_signature(payload text, signature text, secret text,
	webhook_id text, webhook_timestamp text,
	tolerance interval DEFAULT '5 minutes', at timestamptz DEFAULT pg_catalog.now())
RETURNS boolean
AS 'MODULE_PATHNAME', 'sentdm_verify_signature'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_verify_signature(text, text, text, text, text, interval, timestamptz)
	IS 'is this the v1 signature of a webhook, made within the tolerance of a time? Malformed or NULL input is false';

CREATE FUNCTION sentdm_sign(payload bytea, secret text,
	webhook_id text DEFAULT NULL, webhook_timestamp text DEFAULT NULL)
RETURNS text
AS 'MODULE_PATHNAME', 'sentdm_sign'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_sign(bytea, text, text, text)
	IS 'make the signature of a webhook, for tests; of the older scheme without webhook_id and webhook_timestamp';

CREATE FUNCTION sentdm_sign(payload text, secret text,
	webhook_id text DEFAULT NULL, webhook_timestamp text DEFAULT NULL)
RETURNS text
AS 'MODULE_PATHNAME', 'sentdm_sign'
LANGUAGE C IMMUTABLE CALLED ON NULL INPUT PARALLEL SAFE;
COMMENT ON FUNCTION sentdm_sign(text, text, text, text)
	IS 'make the signature of a webhook, for tests; of the older scheme without webhook_id and webhook_timestamp';

CREATE FUNCTION sentdm.status_rank(status text)
RETURNS integer
AS 'MODULE_PATHNAME', 'sentdm_status_rank'
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE;
REVOKE ALL ON FUNCTION sentdm.status_rank(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.status_rank(text)
	IS 'how far a status is along the way; decides between statuses of the same second';

CREATE FUNCTION sentdm_set_webhook_secret(secret text, webhook_id uuid DEFAULT NULL,
	overlap interval DEFAULT '1 day')
RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_set_webhook_secret'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_set_webhook_secret(text, uuid, interval) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_set_webhook_secret(text, uuid, interval)
	IS 'store the signing secret of a webhook (NULL: of any); the one before stays valid for the overlap';

CREATE FUNCTION sentdm_receive_webhook(payload bytea, headers jsonb)
RETURNS TABLE (http_status integer, event_id bigint, duplicate boolean, reason text)
AS 'MODULE_PATHNAME', 'sentdm_receive_webhook'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE ROWS 1
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_receive_webhook(bytea, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_receive_webhook(bytea, jsonb)
	IS 'verify and record a webhook, and apply its status; answers with the HTTP status to give';

CREATE FUNCTION sentdm_receive_webhooks(payloads bytea[], headers jsonb[])
RETURNS TABLE (ordinal integer, http_status integer, event_id bigint, duplicate boolean, reason text)
AS 'MODULE_PATHNAME', 'sentdm_receive_webhooks'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE ROWS 100
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_receive_webhooks(bytea[], jsonb[]) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_receive_webhooks(bytea[], jsonb[])
	IS 'the same for many webhooks at once; one row for each, in order';

-- What a role sees in the views: those who may read sentdm.deliveries.recipient
-- see numbers in full, others all but the middle; where row security is enabled
-- on sentdm.messages, those who may not read sentdm.sender see what was written
-- by a role that they are a member of.  Each is found out once a query.
CREATE VIEW sentdm.inbound AS
	SELECT e.sent_id,
		CASE WHEN (SELECT pg_catalog.has_column_privilege('sentdm.deliveries', 'recipient', 'SELECT')) THEN m.contact
			ELSE left(m.contact, least(greatest(length(m.contact) - 7, 1), 5)) || '****' || right(m.contact, 3) END AS contact,
		coalesce(m.body ->> 'outbound_number', m.body ->> 'to') AS line,
		m.body ->> 'channel' AS channel,
		m.body ->> 'text' AS text,
		e.received_at,
		m.body -> 'media' AS media
	FROM sentdm.events e
		CROSS JOIN LATERAL (SELECT coalesce(e.payload -> 'payload', e.payload -> 'data') AS body) b
		CROSS JOIN LATERAL (SELECT b.body, coalesce(b.body ->> 'inbound_number', b.body ->> 'from') AS contact) m
	WHERE e.event = 'message.received' AND e.reason IS DISTINCT FROM 'forgotten'
		AND (SELECT NOT pg_catalog.row_security_active('sentdm.messages') OR pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'));
COMMENT ON VIEW sentdm.inbound IS 'messages received from contacts';
COMMENT ON COLUMN sentdm.inbound.contact IS 'who wrote it; masked, as the numbers in sentdm.status are';
COMMENT ON COLUMN sentdm.inbound.sent_id IS 'Sent''s id of the message';
COMMENT ON COLUMN sentdm.inbound.channel IS 'sms, whatsapp, rcs, mms';
COMMENT ON COLUMN sentdm.inbound.text IS 'what it says';
COMMENT ON COLUMN sentdm.inbound.line IS 'our number that it was written to';
COMMENT ON COLUMN sentdm.inbound.received_at IS 'when it came here';
COMMENT ON COLUMN sentdm.inbound.media IS 'array of {url, mime_type, size_bytes, hash_sha256}; NULL: none';

--
-- Views
--

CREATE VIEW sentdm.status AS
SELECT m.id AS message_id,
	CASE WHEN (SELECT pg_catalog.has_column_privilege('sentdm.deliveries', 'recipient', 'SELECT')) THEN r.recipient
		ELSE left(r.recipient, least(greatest(length(r.recipient) - 7, 1), 5)) || '****' || right(r.recipient, 3) END AS recipient,
	r.channel,
	CASE WHEN r.refused THEN r.status
		WHEN m.state = 'queued' AND o.claimed THEN 'sending'
		ELSE m.state END AS state,
	r.status,
	r.status_at,
	coalesce(r.reason_code, m.error_code, o.error_code) AS error_code,
	CASE WHEN (SELECT pg_catalog.has_column_privilege('sentdm.deliveries', 'recipient', 'SELECT'))
		THEN coalesce(r.reason, m.error, o.error)
		ELSE pg_catalog.regexp_replace(coalesce(r.reason, m.error, o.error), '[0-9]{7,}', '****', 'g') END AS error,
	coalesce(o.attempts, m.attempts) AS attempts,
	m.tag,
	m.created_at,
	m.send_at,
	m.finished_at,
	r.sent_id,
	r.price
FROM sentdm.messages m
LEFT JOIN LATERAL (
	SELECT bool_or(o.claimed_at IS NOT NULL) AS claimed, max(o.attempts) AS attempts,
		max(o.error_code) AS error_code, max(o.error) AS error
	FROM sentdm.outbox o WHERE o.message_id = m.id) o ON m.state = 'queued'
CROSS JOIN LATERAL (
	SELECT d.recipient, d.channel, d.status, d.status_at, d.reason_code, d.reason, d.sent_id, d.price,
		d.sent_id IS NULL AS refused
	FROM sentdm.deliveries d WHERE d.message_id = m.id
	UNION ALL
	SELECT t.recipient, NULL, NULL, NULL, NULL, NULL, NULL, NULL, false
	FROM pg_catalog.jsonb_array_elements_text(m.request -> 'to') AS t(recipient)
	WHERE NOT EXISTS (SELECT FROM sentdm.deliveries d WHERE d.message_id = m.id AND d.recipient = t.recipient)
) AS r
WHERE (SELECT NOT pg_catalog.row_security_active('sentdm.messages') OR pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
	OR m.created_by IN (SELECT a.rolname FROM pg_catalog.pg_roles a WHERE pg_catalog.pg_has_role(a.oid, 'USAGE'));
COMMENT ON VIEW sentdm.status IS 'one row per recipient (and channel) of a message, from enqueue to receipt';
COMMENT ON COLUMN sentdm.status.recipient IS 'masked, as in +1415****123, for those who may not read sentdm.deliveries.recipient';
COMMENT ON COLUMN sentdm.status.message_id IS 'the message; what sentdm_send() returned';
COMMENT ON COLUMN sentdm.status.channel IS 'the channel that Sent chose; NULL: not chosen yet';
COMMENT ON COLUMN sentdm.status.status_at IS 'when that happened, as Sent says';
COMMENT ON COLUMN sentdm.status.error_code IS 'code of the error, if there is one';
COMMENT ON COLUMN sentdm.status.error IS 'the same in words';
COMMENT ON COLUMN sentdm.status.attempts IS 'requests made that Sent may have looked at';
COMMENT ON COLUMN sentdm.status.tag IS 'the caller''s name for messages that belong together';
COMMENT ON COLUMN sentdm.status.created_at IS 'when sentdm_send() was called';
COMMENT ON COLUMN sentdm.status.send_at IS 'not before this time; NULL: at once';
COMMENT ON COLUMN sentdm.status.finished_at IS 'when the state became final';
COMMENT ON COLUMN sentdm.status.sent_id IS 'Sent''s id of the message to this recipient';
COMMENT ON COLUMN sentdm.status.price IS 'what Sent charged, in the currency of the account';
COMMENT ON COLUMN sentdm.status.state IS 'what became of our request: queued, sending, accepted, failed, expired, cancelled, uncertain';
COMMENT ON COLUMN sentdm.status.status IS 'what Sent last said about this recipient; NULL before it was accepted';

-- By tag first, so that a condition on the tag reads that tag's messages only.
CREATE VIEW sentdm.progress AS
SELECT m.tag, m.total, m.queued,
	d.accepted,
	d.delivered,
	m.failed + m.expired + m.cancelled + m.uncertain + d.failed AS failed,
	pg_catalog.round(100.0 * (m.total - m.queued) / nullif(m.total, 0), 1) AS percent,
	pg_catalog.round((60 * m.last_minute / m.seconds)::numeric, 0) AS rate_per_minute,
	CASE WHEN w.requests > 0 AND w.requests >= m.queued_requests AND sending.possible
		THEN greatest(w.last_due, pg_catalog.now() + interval '1 second'
			* greatest(sentdm.seconds_to_send(w.requests + a.requests, w.recipients + a.recipients),
				-- of a rate that was kept for a while
				CASE WHEN m.seconds >= 5 THEN m.queued / (m.last_minute / m.seconds) END)) END AS eta,
	m.expired, m.cancelled, m.uncertain
FROM (
	SELECT g.tag, sum(t.recipients) AS total,
		coalesce(sum(t.recipients) FILTER (WHERE g.state = 'queued'), 0) AS queued,
		count(*) FILTER (WHERE g.state = 'queued') AS queued_requests,
		coalesce(sum(t.recipients) FILTER (WHERE g.state = 'failed'), 0) AS failed,
		coalesce(sum(t.recipients) FILTER (WHERE g.state = 'expired'), 0) AS expired,
		coalesce(sum(t.recipients) FILTER (WHERE g.state = 'cancelled'), 0) AS cancelled,
		coalesce(sum(t.recipients) FILTER (WHERE g.state = 'uncertain'), 0) AS uncertain,
		coalesce(sum(t.recipients) FILTER (WHERE g.finished_at > pg_catalog.now() - interval '1 minute'), 0) AS last_minute,
		greatest(extract(epoch FROM pg_catalog.now()
			- min(g.finished_at) FILTER (WHERE g.finished_at > pg_catalog.now() - interval '1 minute')), 1) AS seconds
	FROM sentdm.messages g
		CROSS JOIN LATERAL (SELECT pg_catalog.jsonb_array_length(g.request -> 'to') AS recipients) AS t
	WHERE g.tag IS NOT NULL
		AND ((SELECT NOT pg_catalog.row_security_active('sentdm.messages') OR pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
			OR g.created_by IN (SELECT r.rolname FROM pg_catalog.pg_roles r WHERE pg_catalog.pg_has_role(r.oid, 'USAGE')))
	GROUP BY g.tag) AS m
-- What became of it, as Sent tracks it.
CROSS JOIN LATERAL (
	SELECT count(DISTINCT d.recipient) FILTER (WHERE d.sent_id IS NOT NULL) AS accepted,
		count(*) FILTER (WHERE d.status IN ('delivered', 'read')) AS delivered,
		count(*) FILTER (WHERE d.status IN ('failed', 'filtered', 'blocked', 'cancelled', 'expired', 'uncertain')) AS failed
	FROM sentdm.messages g JOIN sentdm.deliveries d ON d.message_id = g.id WHERE g.tag = m.tag) AS d
-- Its own place in the queue, and what is due there before it.
CROSS JOIN LATERAL (
	SELECT count(*) AS requests, coalesce(sum(coalesce(pg_catalog.cardinality(o.recipients),
			pg_catalog.jsonb_array_length(g.request -> 'to'))), 0) AS recipients,
		max(o.due_at) AS last_due, min(CASE o.priority WHEN 'high' THEN 1 WHEN 'normal' THEN 2 ELSE 3 END) AS lane
	FROM sentdm.messages g JOIN sentdm.outbox o ON o.message_id = g.id
	WHERE g.tag = m.tag AND g.state = 'queued') AS w
CROSS JOIN LATERAL (
	SELECT coalesce(sum(q.requests), 0)::bigint AS requests, coalesce(sum(q.recipients), 0)::bigint AS recipients
	FROM (SELECT o.priority, count(*) AS requests, sum(coalesce(pg_catalog.cardinality(o.recipients),
				pg_catalog.jsonb_array_length(g.request -> 'to'))) AS recipients
			FROM sentdm.outbox o JOIN sentdm.messages g ON g.id = o.message_id
			WHERE o.due_at <= pg_catalog.now() GROUP BY o.priority) AS q
	WHERE CASE q.priority WHEN 'high' THEN 1 WHEN 'normal' THEN 2 ELSE 3 END < w.lane) AS a
CROSS JOIN (
	SELECT EXISTS (SELECT FROM sentdm.sender s WHERE s.enabled AND s.paused_at IS NULL)
		AND pg_catalog.current_setting('sentdm.mode') <> 'hold' AND sentdm.fence() IS NULL AS possible) AS sending;
COMMENT ON VIEW sentdm.progress IS 'one row per tag: how far a campaign is, counted in recipients';
COMMENT ON COLUMN sentdm.progress.tag IS 'the caller''s name for messages that belong together';
COMMENT ON COLUMN sentdm.progress.total IS 'recipients';
COMMENT ON COLUMN sentdm.progress.queued IS 'those that still have to be sent';
COMMENT ON COLUMN sentdm.progress.accepted IS 'those that Sent accepted';
COMMENT ON COLUMN sentdm.progress.delivered IS 'those that it reached, or who have read it';
COMMENT ON COLUMN sentdm.progress.percent IS 'share that is not waiting any more';
COMMENT ON COLUMN sentdm.progress.failed IS 'all that will not arrive: expired, cancelled and uncertain too';
COMMENT ON COLUMN sentdm.progress.expired IS 'whose time had passed before they could be sent';
COMMENT ON COLUMN sentdm.progress.cancelled IS 'whom somebody called off in time';
COMMENT ON COLUMN sentdm.progress.uncertain IS 'of whom nobody knows whether Sent accepted them';
COMMENT ON COLUMN sentdm.progress.rate_per_minute IS 'recipients a minute, as of the last one';
COMMENT ON COLUMN sentdm.progress.eta
IS 'when the last one leaves, by the limits in force, what is due before it, its own schedule and the rate of the last minute, whichever is slowest; NULL: nothing is queued, or nothing can leave';

CREATE VIEW sentdm.problems AS
SELECT m.state AS problem, m.id AS message_id, m.finished_at AS since, m.error_code,
	CASE WHEN (SELECT pg_catalog.has_column_privilege('sentdm.deliveries', 'recipient', 'SELECT')) THEN m.error
		ELSE pg_catalog.regexp_replace(m.error, '[0-9]{7,}', '****', 'g') END AS detail,
	CASE m.state WHEN 'uncertain' THEN pg_catalog.format('Sent may have accepted it. To send it again all the same: SELECT sentdm_retry(%L);', m.id)
		ELSE pg_catalog.format('To send it again: SELECT sentdm_retry(%L);', m.id) END AS hint
FROM sentdm.messages m WHERE m.state IN ('failed', 'uncertain')
	AND ((SELECT NOT pg_catalog.row_security_active('sentdm.messages') OR pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
		OR m.created_by IN (SELECT r.rolname FROM pg_catalog.pg_roles r WHERE pg_catalog.pg_has_role(r.oid, 'USAGE')))
UNION ALL
SELECT 'paused', NULL, s.paused_at, s.pause_kind, s.pause_reason,
	CASE s.pause_kind WHEN 'user' THEN 'To go on: SELECT sentdm_resume();'
		ELSE 'Put it right, then: SELECT sentdm_resume();' END
FROM sentdm.sender s WHERE s.paused_at IS NOT NULL
UNION ALL
SELECT 'fenced', NULL, NULL, NULL, f.reason, 'If this database is to send: SELECT sentdm_enable();'
FROM sentdm.fence() AS f(reason) WHERE f.reason IS NOT NULL
UNION ALL
SELECT 'held', NULL, s.enabled_at, NULL, pg_catalog.format('%s messages from before sentdm_enable() are on hold', h.held),
	'SELECT sentdm_enable(''send''); or SELECT sentdm_enable(''discard'');'
FROM sentdm.sender s, LATERAL (
	-- counted only where some were left on hold: this reads all messages
	SELECT count(*) AS held FROM sentdm.messages m WHERE s.held > 0 AND m.state = 'queued'
		AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id)) AS h
WHERE h.held > 0
UNION ALL
SELECT 'webhook', NULL, w.checked_at, NULL, pg_catalog.format('webhook %s: %s', w.id, w.trouble),
	CASE WHEN w.active IS FALSE AND w.trouble = 'Sent has disabled it'
		THEN pg_catalog.format('Put the receiver right, then: SELECT sentdm_api(''PATCH'', ''/v3/webhooks/%s/toggle-status'', ''{"is_active": true}'');', w.id)
		WHEN w.active THEN 'Look at the receiver and its log.'
		ELSE pg_catalog.format('If it is gone for good: DELETE FROM sentdm.webhooks WHERE id = %L;', w.id) END
FROM sentdm.webhooks w WHERE w.trouble IS NOT NULL
UNION ALL
SELECT 'not enabled', NULL, NULL, NULL, 'sending is not enabled in this database', 'SELECT sentdm_enable();'
WHERE NOT EXISTS (SELECT FROM sentdm.sender s WHERE s.enabled);
COMMENT ON VIEW sentdm.problems IS 'what a person must look at, with the command that helps';
COMMENT ON COLUMN sentdm.problems.problem IS 'failed, uncertain, paused, fenced, held, webhook or not enabled';
COMMENT ON COLUMN sentdm.problems.message_id IS 'the message; NULL: it is about all of them';
COMMENT ON COLUMN sentdm.problems.since IS 'since when';
COMMENT ON COLUMN sentdm.problems.error_code IS 'code of the error, or kind of the pause';
COMMENT ON COLUMN sentdm.problems.detail IS 'what is wrong';
COMMENT ON COLUMN sentdm.problems.hint IS 'the command that helps';

CREATE VIEW sentdm.stat_worker AS
SELECT r.launcher, r.pid, r.started_at, r.in_flight, r.answered_at, r.http_status, r.error_code, r.clock_skew_ms, r.trouble,
	c.requests, c.accepted, c.retried, c.failed, c.expired, c.uncertain, c.rate_limited, c.unreached, c.pauses, c.rescued
FROM sentdm.worker_report() r,
	(SELECT pg_catalog.max(value) FILTER (WHERE name = 'requests') AS requests,
		pg_catalog.max(value) FILTER (WHERE name = 'accepted') AS accepted,
		pg_catalog.max(value) FILTER (WHERE name = 'retried') AS retried,
		pg_catalog.max(value) FILTER (WHERE name = 'failed') AS failed,
		pg_catalog.max(value) FILTER (WHERE name = 'expired') AS expired,
		pg_catalog.max(value) FILTER (WHERE name = 'uncertain') AS uncertain,
		pg_catalog.max(value) FILTER (WHERE name = 'rate_limited') AS rate_limited,
		pg_catalog.max(value) FILTER (WHERE name = 'unreached') AS unreached,
		pg_catalog.max(value) FILTER (WHERE name = 'pauses') AS pauses,
		pg_catalog.max(value) FILTER (WHERE name = 'rescued') AS rescued
	FROM sentdm.counters()) c;
COMMENT ON VIEW sentdm.stat_worker IS 'the worker of this database and its counters since the server started; no personal data';
COMMENT ON COLUMN sentdm.stat_worker.launcher IS 'the launcher, which starts workers, is running';
COMMENT ON COLUMN sentdm.stat_worker.pid IS 'process of the worker; NULL: none runs, because there is no work';
COMMENT ON COLUMN sentdm.stat_worker.started_at IS 'when the worker was started, the last one if none runs';
COMMENT ON COLUMN sentdm.stat_worker.in_flight IS 'requests under way';
COMMENT ON COLUMN sentdm.stat_worker.answered_at IS 'when Sent last answered';
COMMENT ON COLUMN sentdm.stat_worker.http_status IS 'the status of that answer';
COMMENT ON COLUMN sentdm.stat_worker.error_code IS 'Sent''s error code in that answer';
COMMENT ON COLUMN sentdm.stat_worker.clock_skew_ms IS 'Sent''s clock minus ours, in milliseconds';
COMMENT ON COLUMN sentdm.stat_worker.trouble IS 'why nothing is sent; NULL: no reason';
COMMENT ON COLUMN sentdm.stat_worker.requests IS 'requests made';
COMMENT ON COLUMN sentdm.stat_worker.accepted IS 'requests that Sent accepted';
COMMENT ON COLUMN sentdm.stat_worker.retried IS 'attempts that will be repeated, or split';
COMMENT ON COLUMN sentdm.stat_worker.failed IS 'requests that Sent refused for good, or that were given up';
COMMENT ON COLUMN sentdm.stat_worker.expired IS 'requests whose time had passed';
COMMENT ON COLUMN sentdm.stat_worker.uncertain IS 'requests whose outcome stays unknown; a person must decide';
COMMENT ON COLUMN sentdm.stat_worker.rate_limited IS 'answers with status 429';
COMMENT ON COLUMN sentdm.stat_worker.unreached IS 'attempts that did not reach Sent: DNS, connect, TLS';
COMMENT ON COLUMN sentdm.stat_worker.pauses IS 'how often the worker paused the queue itself';
COMMENT ON COLUMN sentdm.stat_worker.rescued IS 'requests taken over from a worker that died';

CREATE VIEW sentdm.stat_outbox AS
SELECT p.priority,
	coalesce(o.queued, 0) AS queued,
	coalesce(o.due, 0) AS due,
	coalesce(o.claimed, 0) AS claimed,
	coalesce(o.ambiguous, 0) AS ambiguous,
	coalesce(o.oldest_due_seconds, 0) AS oldest_due_seconds
FROM (VALUES (1, 'high'), (2, 'normal'), (3, 'bulk')) AS p(n, priority)
-- Counted before it is joined: half the time when a million wait.
LEFT JOIN (
	SELECT priority,
		count(*) AS queued,
		count(*) FILTER (WHERE due_at <= pg_catalog.now() AND claimed_at IS NULL) AS due,
		count(claimed_at) AS claimed,
		count(*) FILTER (WHERE ambiguous_since IS NOT NULL AND claimed_at IS NULL) AS ambiguous,
		extract(epoch FROM pg_catalog.now() - min(due_at) FILTER (WHERE due_at <= pg_catalog.now())) AS oldest_due_seconds
	FROM sentdm.outbox GROUP BY priority) AS o ON o.priority = p.priority
ORDER BY p.n;
COMMENT ON VIEW sentdm.stat_outbox IS 'the queue by priority; no personal data';
COMMENT ON COLUMN sentdm.stat_outbox.priority IS 'high, normal or bulk';
COMMENT ON COLUMN sentdm.stat_outbox.queued IS 'requests that still have to be made, now or later';
COMMENT ON COLUMN sentdm.stat_outbox.due IS 'those that could be made now';
COMMENT ON COLUMN sentdm.stat_outbox.claimed IS 'those that the worker is making';
COMMENT ON COLUMN sentdm.stat_outbox.ambiguous IS 'those that wait after an attempt whose outcome is unknown';
COMMENT ON COLUMN sentdm.stat_outbox.oldest_due_seconds IS 'how long the oldest one has been due; 0: none is';

CREATE VIEW sentdm.stat_webhook AS
SELECT c.events, c.duplicate, c.late, c.raw, c.rejected, c.delivered, c.undelivered,
	(SELECT e.received_at FROM sentdm.events e ORDER BY e.id DESC LIMIT 1) AS last_event_at,
	(SELECT count(*) FROM sentdm.webhooks w WHERE NOT w.active) AS disabled
FROM (SELECT pg_catalog.max(value) FILTER (WHERE name = 'events') AS events,
		pg_catalog.max(value) FILTER (WHERE name = 'events_duplicate') AS duplicate,
		pg_catalog.max(value) FILTER (WHERE name = 'events_late') AS late,
		pg_catalog.max(value) FILTER (WHERE name = 'events_raw') AS raw,
		pg_catalog.max(value) FILTER (WHERE name = 'events_rejected') AS rejected,
		pg_catalog.max(value) FILTER (WHERE name = 'delivered') AS delivered,
		pg_catalog.max(value) FILTER (WHERE name = 'undelivered') AS undelivered
	FROM sentdm.counters()) c;
COMMENT ON VIEW sentdm.stat_webhook IS 'webhook events since the server started; no personal data';
COMMENT ON COLUMN sentdm.stat_webhook.events IS 'authentic events, each counted once';
COMMENT ON COLUMN sentdm.stat_webhook.duplicate IS 'events that had been received before';
COMMENT ON COLUMN sentdm.stat_webhook.late IS 'events older than sentdm.webhook_tolerance';
COMMENT ON COLUMN sentdm.stat_webhook.raw IS 'events that are kept as bytes, because they are not JSON';
COMMENT ON COLUMN sentdm.stat_webhook.rejected IS 'requests that were not authentic, or not complete';
COMMENT ON COLUMN sentdm.stat_webhook.delivered IS 'events that say that a message was delivered';
COMMENT ON COLUMN sentdm.stat_webhook.undelivered IS 'events that say that a message will not arrive: failed, filtered, blocked, cancelled';
COMMENT ON COLUMN sentdm.stat_webhook.last_event_at IS 'when the last event came, whenever the server started';
COMMENT ON COLUMN sentdm.stat_webhook.disabled IS 'webhooks of this database that Sent has disabled, as the worker found them last';

CREATE VIEW sentdm.stat_sender AS
SELECT coalesce(s.enabled, false) AS enabled,
	sentdm.fence() IS NOT NULL AS fenced,
	s.paused_at IS NOT NULL AS paused,
	s.pause_kind,
	s.paused_at,
	coalesce(s.held, 0) AS held
FROM (VALUES (1)) AS one LEFT JOIN sentdm.sender s ON true;
COMMENT ON VIEW sentdm.stat_sender IS 'may this database send? Always one row; no personal data';
COMMENT ON COLUMN sentdm.stat_sender.paused_at IS 'since when; NULL: it is not paused';
COMMENT ON COLUMN sentdm.stat_sender.enabled IS 'sentdm_enable() was called here';
COMMENT ON COLUMN sentdm.stat_sender.fenced IS 'it is a copy of the database that was enabled, and does not send';
COMMENT ON COLUMN sentdm.stat_sender.paused IS 'the queue is on hold, by a person or by the worker itself';
COMMENT ON COLUMN sentdm.stat_sender.pause_kind IS 'user, or what made the worker pause: credentials, forbidden, suspended, balance, quota, certificate';
COMMENT ON COLUMN sentdm.stat_sender.held IS 'messages from before the last sentdm_enable() that it left on hold';

GRANT USAGE ON SCHEMA sentdm TO pg_monitor;
GRANT SELECT ON sentdm.stat_worker, sentdm.stat_outbox, sentdm.stat_webhook, sentdm.stat_sender TO pg_monitor;
-- A view's functions are called with the rights of whoever reads it.
GRANT EXECUTE ON FUNCTION sentdm.worker_report(), sentdm.counters(), sentdm.fence() TO pg_monitor;

CREATE FUNCTION sentdm.excess_grants(OUT name text, OUT grantee oid, OUT privilege_type text) RETURNS SETOF record
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
SELECT o.name, g.grantee, g.privilege_type
FROM (
	SELECT c.oid::regclass::text, c.relowner, c.relacl FROM pg_class c
	WHERE c.relnamespace = 'sentdm'::regnamespace AND c.relkind IN ('r', 'v', 'S')
	UNION ALL
	SELECT format('%s.%s', c.oid::regclass, t.attname), c.relowner, t.attacl FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid
	WHERE c.relnamespace = 'sentdm'::regnamespace AND t.attacl IS NOT NULL
	UNION ALL
	SELECT format('schema %s', n.nspname), n.nspowner, n.nspacl FROM pg_namespace n WHERE n.nspname = 'sentdm'
	UNION ALL
	-- EXECUTE is for PUBLIC unless that was revoked.
	SELECT p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
	FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
		JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'sentdm'
	WHERE p.proname NOT IN ('sentdm_verify_signature', 'sentdm_sign')
) AS o(name, owner, acl), aclexplode(o.acl) g
WHERE g.grantee = 0 OR g.grantee <> o.owner AND g.privilege_type NOT IN ('SELECT', 'USAGE', 'EXECUTE')
$$;
REVOKE ALL ON FUNCTION sentdm.excess_grants() FROM PUBLIC;
COMMENT ON FUNCTION sentdm.excess_grants() IS 'internal: what is granted on our objects to PUBLIC, or more than reading to anybody';

CREATE FUNCTION sentdm_health()
RETURNS TABLE (name text, ok boolean, detail text)
LANGUAGE sql VOLATILE PARALLEL RESTRICTED
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
WITH r AS (SELECT * FROM sentdm.worker_report()),
s AS (SELECT s.* FROM (VALUES (1)) AS one LEFT JOIN sentdm.sender s ON true),
q AS (SELECT sum(queued) AS queued, sum(due) AS due, max(oldest_due_seconds) AS age FROM sentdm.stat_outbox)
SELECT 'library', r.preloaded,
	CASE WHEN r.preloaded THEN 'preloaded' ELSE 'not preloaded: add sentdm to shared_preload_libraries and restart' END FROM r
UNION ALL
SELECT 'launcher', r.launcher, CASE WHEN r.launcher THEN 'running' ELSE 'not running' END FROM r
UNION ALL
SELECT 'enabled', coalesce(s.enabled, false),
	CASE WHEN s.enabled THEN format('since %s by %s', s.enabled_at, s.enabled_by) ELSE 'not enabled: run sentdm_enable()' END FROM s
UNION ALL
SELECT 'fence', f.reason IS NULL, coalesce(f.reason,
	CASE WHEN s.enabled_at IS NULL THEN 'no database was enabled yet' ELSE 'this is the database that was enabled' END)
FROM s, sentdm.fence() AS f(reason)
UNION ALL
SELECT 'mode', m.mode <> 'hold', m.mode FROM r, coalesce(r.mode, current_setting('sentdm.mode')) AS m(mode)
UNION ALL
SELECT 'credentials', c.trouble IS NULL, coalesce(c.trouble, 'an API key is set') FROM sentdm.credentials_trouble() AS c(trouble)
UNION ALL
SELECT 'pause', s.paused_at IS NULL, CASE WHEN s.paused_at IS NULL THEN 'not paused'
	ELSE concat_ws(': ', format('paused since %s (%s)', s.paused_at, s.pause_kind), s.pause_reason) END FROM s
UNION ALL
SELECT 'worker', r.trouble IS NULL, coalesce(r.trouble,
	CASE WHEN r.pid IS NULL THEN 'resting' ELSE format('pid %s, %s in flight', r.pid, r.in_flight) END) FROM r
UNION ALL
SELECT 'api', coalesce(r.http_status < 500 AND r.http_status NOT IN (401, 403, 429), true),
	CASE WHEN r.answered_at IS NULL THEN 'no answer yet'
		ELSE format('answered %s%s at %s', r.http_status, ' ' || r.error_code, r.answered_at) END FROM r
UNION ALL
SELECT 'clock', coalesce(abs(r.clock_skew_ms) < 60000, true),
	CASE WHEN r.clock_skew_ms IS NULL THEN 'not compared yet'
		ELSE format('%s s from Sent''s', round(r.clock_skew_ms / 1000.0)) END FROM r
UNION ALL
SELECT 'backlog', q.age < 60, format('%s queued, %s due, oldest due for %s s', q.queued, q.due, round(q.age)) FROM q
UNION ALL
SELECT 'problems', count(*) = 0, format(CASE count(*) WHEN 1 THEN '%s message failed or is uncertain' ELSE '%s messages failed or are uncertain' END, count(*))
FROM sentdm.messages m WHERE m.state IN ('failed', 'uncertain')
UNION ALL
SELECT 'webhook secret', count(*) > 0 OR sentdm.webhook_secret_set(),
	CASE WHEN count(*) > 0 OR sentdm.webhook_secret_set() THEN 'set' ELSE 'none: receipts cannot be verified; see sentdm_set_webhook_secret()' END
FROM sentdm.webhook_secrets w WHERE w.valid_until IS NULL OR w.valid_until > now()
UNION ALL
SELECT 'triggers', count(t.trouble) = 0, coalesce((array_agg(format('%s on %s: %s', t.tgname, t.tgrelid::regclass, t.trouble) ORDER BY t.tgname, t.tgrelid)
		FILTER (WHERE t.trouble IS NOT NULL))[1], format('%s use sentdm_send_trigger()', count(*)))
FROM (SELECT g.tgname, g.tgrelid, sentdm.trigger_trouble(g.oid, g.tgrelid) AS trouble FROM pg_trigger g
	WHERE g.tgfoid = '@extschema@.sentdm_send_trigger()'::regprocedure) t
UNION ALL
SELECT 'access', count(*) = 0, coalesce((array_agg(format('%s has %s on %s', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
		a.privilege_type, a.name) ORDER BY a.grantee, a.name, a.privilege_type))[1], 'nothing is open to PUBLIC, and only functions write')
FROM sentdm.excess_grants() a
UNION ALL
SELECT 'webhook endpoint', bool_and(w.trouble IS NULL) IS NOT FALSE,
	coalesce(string_agg(format('%s: %s', w.id, w.trouble), '; ' ORDER BY w.id) FILTER (WHERE w.trouble IS NOT NULL),
		CASE WHEN count(*) = 0 THEN 'none was registered from here' ELSE format('%s, last looked at %s', count(*), coalesce(min(w.checked_at)::text, 'never')) END)
FROM sentdm.webhooks w
$$;
REVOKE ALL ON FUNCTION sentdm_health() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_health() IS 'is everything as it should be? One row for each check';

--
-- Asking the API
--

CREATE FUNCTION sentdm_api(method text, path text, body jsonb DEFAULT NULL) RETURNS jsonb
AS 'MODULE_PATHNAME', 'sentdm_api' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_api(text, text, jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_api(text, text, jsonb)
IS 'call the API once and wait for the answer; returns its data, or raises an error with the API''s code in DETAIL. Counts for sentdm.rate_limit, but does not wait for it';

CREATE FUNCTION sentdm_api(method text, path text, body jsonb, profile_id uuid) RETURNS jsonb
AS 'MODULE_PATHNAME', 'sentdm_api' LANGUAGE C VOLATILE PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm_api(text, text, jsonb, uuid) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_api(text, text, jsonb, uuid)
IS 'the same as a sender profile of the account: what it owns is shown to nobody else';

CREATE FUNCTION sentdm.api_rows(path text, field text) RETURNS SETOF jsonb
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	page_size CONSTANT integer := 100;
	data jsonb;
	found jsonb;
BEGIN
	FOR page IN 1 .. 10000 LOOP
		data := @extschema@.sentdm_api('GET', format('%s?page=%s&page_size=%s', path, page, page_size));
		found := CASE WHEN jsonb_typeof(data) = 'array' THEN data ELSE coalesce(data -> field, '[]') END;
		RETURN QUERY SELECT * FROM jsonb_array_elements(found);
		EXIT WHEN jsonb_array_length(found) = 0
			OR NOT coalesce((data #>> '{pagination,has_more}')::boolean, jsonb_array_length(found) = page_size);
	END LOOP;
END $$;
REVOKE ALL ON FUNCTION sentdm.api_rows(text, text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.api_rows(text, text) IS 'internal: all pages of a list of the API';

CREATE FUNCTION sentdm_me()
RETURNS TABLE (id text, type text, name text, email text, status text, channels jsonb, settings jsonb)
LANGUAGE sql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
SELECT m ->> 'id', m ->> 'type', m ->> 'name', m ->> 'email', m ->> 'status', m -> 'channels', m -> 'settings'
FROM @extschema@.sentdm_api('GET', '/v3/me') AS m
$$;
REVOKE ALL ON FUNCTION sentdm_me() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_me() IS 'the account that the API key belongs to';

CREATE FUNCTION sentdm_templates()
RETURNS TABLE (id text, name text, category text, language text, status text, channels text[], variables text[],
	is_published boolean, created_at timestamptz, updated_at timestamptz)
LANGUAGE sql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
SELECT t ->> 'id', t ->> 'name', t ->> 'category', t ->> 'language', t ->> 'status',
	ARRAY(SELECT jsonb_array_elements_text(CASE jsonb_typeof(t -> 'channels') WHEN 'array' THEN t -> 'channels' ELSE '[]' END)),
	ARRAY(SELECT jsonb_array_elements_text(CASE jsonb_typeof(t -> 'variables') WHEN 'array' THEN t -> 'variables' ELSE '[]' END)),
	(t ->> 'is_published')::boolean, (t ->> 'created_at')::timestamptz, (t ->> 'updated_at')::timestamptz
FROM sentdm.api_rows('/v3/templates', 'templates') AS t
$$;
REVOKE ALL ON FUNCTION sentdm_templates() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_templates() IS 'the account''s templates';

CREATE FUNCTION sentdm_contacts()
RETURNS TABLE (id text, phone_number text, country_code text, available_channels text[], default_channel text,
	opt_out boolean, created_at timestamptz, updated_at timestamptz)
LANGUAGE sql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
SELECT c ->> 'id', coalesce(c ->> 'format_e164', c ->> 'phone_number'), c ->> 'country_code',
	string_to_array(replace(c ->> 'available_channels', ' ', ''), ','), c ->> 'default_channel',
	(c ->> 'opt_out')::boolean, (c ->> 'created_at')::timestamptz, (c ->> 'updated_at')::timestamptz
FROM sentdm.api_rows('/v3/contacts', 'contacts') AS c
$$;
REVOKE ALL ON FUNCTION sentdm_contacts() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_contacts() IS 'the account''s contacts';

CREATE FUNCTION sentdm_lookup(phone text)
RETURNS TABLE (phone_number text, is_valid boolean, country_code text, line_type text, carrier_name text,
	is_ported boolean, is_voip boolean, mobile_country_code text, mobile_network_code text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF phone IS NULL OR phone !~ '^\+[1-9][0-9]{6,14}$' THEN
		RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'argument "phone" is not an E.164 number',
			HINT = 'Write numbers with a plus sign and the country code, digits only, such as +14155550123.';
	END IF;
	RETURN QUERY SELECT l ->> 'phone_number', (l ->> 'is_valid')::boolean, l ->> 'country_code', l ->> 'line_type',
		l ->> 'carrier_name', (l ->> 'is_ported')::boolean, (l ->> 'is_voip')::boolean,
		l ->> 'mobile_country_code', l ->> 'mobile_network_code'
	FROM @extschema@.sentdm_api('GET', '/v3/numbers/lookup/' || phone) AS l;
END $$;
REVOKE ALL ON FUNCTION sentdm_lookup(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_lookup(text) IS 'what is known about a phone number: valid, line type, carrier';

CREATE FUNCTION sentdm_sync_templates() RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	-- Ask first and write afterwards: nothing is locked while the network is waited for.
	found CONSTANT jsonb := (SELECT coalesce(jsonb_agg(t), '[]') FROM @extschema@.sentdm_templates() t);
BEGIN
	LOCK TABLE sentdm.templates IN SHARE ROW EXCLUSIVE MODE;
	DELETE FROM sentdm.templates;
	INSERT INTO sentdm.templates (id, name, status, category, language, channels, variables)
	SELECT DISTINCT ON (lower(t.id)) lower(t.id), t.name, t.status, t.category, t.language, t.channels, t.variables
	FROM jsonb_to_recordset(found) AS t(id text, name text, status text, category text, language text,
		channels text[], variables text[])
	WHERE t.id IS NOT NULL AND t.name IS NOT NULL;
	RETURN (SELECT count(*) FROM sentdm.templates);
END $$;
REVOKE ALL ON FUNCTION sentdm_sync_templates() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_sync_templates()
IS 'fetch the account''s templates into sentdm.templates, for sentdm.check_templates; returns how many there are';

CREATE FUNCTION sentdm_sync_contacts() RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	found CONSTANT jsonb := (SELECT coalesce(jsonb_agg(c), '[]') FROM @extschema@.sentdm_contacts() c);
	changed bigint;
BEGIN
	-- What a person said here, or wrote to us, is not undone by a contact that was
	-- touched since for another reason.
	WITH contact AS (
		SELECT DISTINCT ON (c.phone_number) c.phone_number, c.opt_out,
			coalesce(c.updated_at, c.created_at, now()) AS since
		FROM jsonb_to_recordset(found) AS c(phone_number text, opt_out boolean, created_at timestamptz, updated_at timestamptz)
		WHERE c.phone_number ~ '^\+[1-9][0-9]{6,14}$' AND c.opt_out IS NOT NULL
		ORDER BY c.phone_number, c.opt_out DESC
	), undone AS (
		UPDATE sentdm.optouts o SET opted_out = false, since = c.since, source = 'contacts'
		FROM contact c WHERE o.phone = c.phone_number AND NOT c.opt_out AND o.opted_out AND c.since > o.since
			AND o.source NOT IN ('manual', 'message.received')
		RETURNING 1
	), learned AS (
		INSERT INTO sentdm.optouts AS o (phone, since, source)
		SELECT c.phone_number, c.since, 'contacts' FROM contact c WHERE c.opt_out ORDER BY c.phone_number
		ON CONFLICT (phone) DO UPDATE SET opted_out = true, since = excluded.since, source = excluded.source
		WHERE NOT o.opted_out AND excluded.since > o.since
		RETURNING 1
	)
	SELECT (SELECT count(*) FROM undone) + (SELECT count(*) FROM learned) INTO changed;
	RETURN changed;
END $$;
REVOKE ALL ON FUNCTION sentdm_sync_contacts() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_sync_contacts()
IS 'learn from the account''s contacts who has opted out, into sentdm.optouts; returns how many rows changed';

CREATE FUNCTION sentdm_opt_out(phone text, opted_out boolean DEFAULT true) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	IF phone !~ '^\+[1-9][0-9]{6,14}$' THEN
		RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'argument "phone" is not an E.164 number',
			HINT = 'Write numbers with a plus sign and the country code, digits only, such as +14155550123.';
	END IF;
	INSERT INTO sentdm.optouts AS o (phone, opted_out) VALUES ($1, $2)
	ON CONFLICT ON CONSTRAINT optouts_pkey DO UPDATE
	SET opted_out = excluded.opted_out, since = excluded.since, source = excluded.source;
END $$;
REVOKE ALL ON FUNCTION sentdm_opt_out(text, boolean) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_opt_out(text, boolean)
IS 'note that somebody does not want messages, or with false wants them again; Sent is not told';

CREATE FUNCTION sentdm.apply_events(events jsonb[]) RETURNS void
AS 'MODULE_PATHNAME', 'sentdm_apply_events' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm.apply_events(jsonb[]) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.apply_events(jsonb[]) IS 'internal: apply statuses by the rule for webhook events, without recording them';

CREATE FUNCTION sentdm.apply_answers(answers jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	-- Each step that the message took is an event; the status itself may be ahead of them.
	PERFORM sentdm.apply_events(ARRAY(
		SELECT jsonb_build_object('field', 'message', 'event', 'message.' || lower(s.step ->> 'status'), 'payload',
			jsonb_build_object('message_id', a ->> 'sent_id', 'message_status', s.step ->> 'status',
				'channel', a #>> '{answer,channel}', 'updated_at', s.step ->> 'timestamp',
				'reason_code', s.step ->> 'reason_code', 'reason', s.step ->> 'reason'))
		FROM jsonb_array_elements(answers) AS a, LATERAL (
			SELECT * FROM jsonb_array_elements(CASE jsonb_typeof(a #> '{answer,events}') WHEN 'array' THEN a #> '{answer,events}' ELSE '[]' END)
			UNION ALL SELECT a -> 'answer') AS s(step)
		WHERE jsonb_typeof(s.step -> 'status') = 'string'));
	-- In the same order as above, where all of these rows were locked.
	UPDATE sentdm.deliveries d SET price = p.price
	FROM (SELECT (a ->> 'sent_id')::uuid AS sent_id, (a #>> '{answer,price}')::numeric AS price
		FROM jsonb_array_elements(answers) AS a WHERE a #>> '{answer,price}' ~ '^[0-9]{1,9}(\.[0-9]{1,9})?$' ORDER BY 1) AS p
	WHERE d.sent_id = p.sent_id AND d.price IS DISTINCT FROM p.price;
END $$;
REVOKE ALL ON FUNCTION sentdm.apply_answers(jsonb) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.apply_answers(jsonb)
IS 'internal: apply what the API answered about messages: an array of {sent_id, answer}';

CREATE FUNCTION sentdm_refresh(message_id uuid) RETURNS SETOF sentdm.deliveries
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	ids uuid[] := ARRAY(SELECT d.sent_id FROM sentdm.deliveries d
		WHERE d.message_id = $1 AND d.sent_id IS NOT NULL ORDER BY d.sent_id);
	-- Only who sent it may ask for it.
	profile uuid := (SELECT m.profile_id FROM sentdm.messages m WHERE m.id = $1);
	answers jsonb := '[]';
	id uuid;
BEGIN
	-- Ask first and write afterwards: no row is locked while the network is waited for.
	FOREACH id IN ARRAY ids LOOP
		answers := answers || jsonb_build_array(jsonb_build_object('sent_id', id,
			'answer', @extschema@.sentdm_api('GET', '/v3/messages/' || id, NULL, profile)));
	END LOOP;
	PERFORM sentdm.apply_answers(answers);
	RETURN QUERY SELECT * FROM sentdm.deliveries d WHERE d.message_id = $1;
END $$;
REVOKE ALL ON FUNCTION sentdm_refresh(uuid) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_refresh(uuid) IS 'ask the API for the present status of a message and store it';

--
-- Webhook endpoints
--

CREATE FUNCTION sentdm_create_webhook(url text, event_types text[] DEFAULT '{message,contact,templates}',
	name text DEFAULT 'sentdm') RETURNS uuid
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	created jsonb;
BEGIN
	IF url IS NULL OR url !~ '^https://[^/\s]+(/\S*)?$' AND NOT (url ~ '^http://' AND current_setting('sentdm.allow_insecure_http')::boolean) THEN
		RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'argument "url" is not a URL that Sent can post to',
			HINT = 'Give the public address of your sentdm-receiver, such as https://hooks.example.com/webhooks/sent.';
	END IF;
	IF EXISTS (SELECT FROM sentdm.api_rows('/v3/webhooks', 'webhooks') AS w WHERE w ->> 'endpoint_url' = url) THEN
		RAISE EXCEPTION USING ERRCODE = '42710', MESSAGE = 'Sent has an endpoint with this URL already',
			HINT = 'Find its id with SELECT sentdm_api(''GET'', ''/v3/webhooks?page=1&page_size=100''), and take it over with sentdm_rotate_webhook_secret(id).';
	END IF;
	-- Taken now, so that nothing can keep the secret from being stored.
	LOCK TABLE sentdm.webhook_secrets IN SHARE ROW EXCLUSIVE MODE;
	created := @extschema@.sentdm_api('POST', '/v3/webhooks', jsonb_build_object('display_name', name,
		'endpoint_url', url, 'event_types', event_types, 'retry_count', 5, 'timeout_seconds', 30));
	PERFORM @extschema@.sentdm_set_webhook_secret(created ->> 'signing_secret', (created ->> 'id')::uuid);
	INSERT INTO sentdm.webhooks (id, url) VALUES ((created ->> 'id')::uuid, $1);
	RETURN (created ->> 'id')::uuid;
END $$;
REVOKE ALL ON FUNCTION sentdm_create_webhook(text, text[], text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_create_webhook(text, text[], text)
IS 'have Sent post its events to a URL that leads here, and keep the signing secret; returns the endpoint''s id';

CREATE FUNCTION sentdm_rotate_webhook_secret(webhook_id uuid, overlap interval DEFAULT '1 day') RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	webhook jsonb := @extschema@.sentdm_api('GET', '/v3/webhooks/' || webhook_id);
BEGIN
	-- Sent forgets the old secret at once: nothing may keep the new one from being stored.
	LOCK TABLE sentdm.webhook_secrets IN SHARE ROW EXCLUSIVE MODE;
	PERFORM @extschema@.sentdm_set_webhook_secret(@extschema@.sentdm_api('POST', format('/v3/webhooks/%s/rotate-secret', $1))
		->> 'signing_secret', $1, $2);
	INSERT INTO sentdm.webhooks AS w (id, url) VALUES ($1, webhook ->> 'endpoint_url')
	ON CONFLICT (id) DO UPDATE SET url = excluded.url;
END $$;
REVOKE ALL ON FUNCTION sentdm_rotate_webhook_secret(uuid, interval) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_rotate_webhook_secret(uuid, interval)
IS 'have Sent make a new signing secret for an endpoint, and keep it; the old one stays valid here for the overlap. Takes over an endpoint made elsewhere';

CREATE FUNCTION sentdm.record_events(webhook_id uuid, events jsonb[]) RETURNS bigint
AS 'MODULE_PATHNAME', 'sentdm_record_events' LANGUAGE C VOLATILE STRICT PARALLEL UNSAFE;
REVOKE ALL ON FUNCTION sentdm.record_events(uuid, jsonb[]) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.record_events(uuid, jsonb[])
IS 'internal: record and apply events from Sent''s log; returns how many were missing';

CREATE FUNCTION sentdm_backfill(webhook_id uuid, since timestamptz) RETURNS bigint
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	started CONSTANT timestamptz := clock_timestamp();
	pages jsonb[] := '{}';
	data jsonb;
	missing bigint;
BEGIN
	-- The newest come first.  All are fetched before any is written: no row is
	-- locked while the network is waited for.
	FOR page IN 1 .. 10000 LOOP
		data := @extschema@.sentdm_api('GET', format('/v3/webhooks/%s/events?page=%s&page_size=100', webhook_id, page));
		EXIT WHEN coalesce(jsonb_array_length(data -> 'events'), 0) = 0;
		pages := pages || (data -> 'events');
		EXIT WHEN NOT coalesce((data #>> '{pagination,has_more}')::boolean, true)
			OR (data #>> '{events,-1,created_at}')::timestamptz < since;
	END LOOP;
	missing := sentdm.record_events(webhook_id, ARRAY(
		SELECT e -> 'event_data' FROM unnest(pages) WITH ORDINALITY AS p(events, page),
			jsonb_array_elements(p.events) WITH ORDINALITY AS r(e, row)
		WHERE (e ->> 'created_at')::timestamptz >= since ORDER BY page DESC, row DESC));
	UPDATE sentdm.webhooks w SET backfilled_until = greatest(backfilled_until, started)
	WHERE w.id = webhook_id AND w.backfilled_until >= since;
	RETURN missing;
END $$;
REVOKE ALL ON FUNCTION sentdm_backfill(uuid, timestamptz) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_backfill(uuid, timestamptz)
IS 'fetch the events since a time from Sent''s log of an endpoint, and record those that are missing here; returns how many';

--
-- Keeping house
--

CREATE FUNCTION sentdm_prune() RETURNS bigint
AS 'MODULE_PATHNAME', 'sentdm_prune' LANGUAGE C VOLATILE PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
REVOKE ALL ON FUNCTION sentdm_prune() FROM PUBLIC;
COMMENT ON FUNCTION sentdm_prune()
IS 'apply sentdm.retention and sentdm.body_retention now, as the worker does in small batches; returns how many rows that changed';

CREATE FUNCTION sentdm_forget(phone text, keep_opt_out boolean DEFAULT true)
RETURNS TABLE (what text, rows bigint)
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	addressed uuid[];		-- messages
	free uuid[];			-- of these, those that wait and nobody has tried to send
	sent_ids uuid[];
	n bigint;
BEGIN
	IF phone !~ '^\+[1-9][0-9]{6,14}$' THEN
		RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'argument "phone" is not an E.164 number',
			HINT = 'Write numbers with a plus sign and the country code, digits only, such as +14155550123.';
	END IF;
	-- A message that is called off must not come back with a crash.
	IF current_setting('synchronous_commit') = 'off' THEN
		PERFORM set_config('synchronous_commit', 'on', true);
	END IF;
	addressed := ARRAY(SELECT m.id FROM sentdm.messages m WHERE m.request -> 'to' ? phone);

	-- What waits: rows of the queue that can be locked, and messages on hold, which
	-- are looked at again once they are locked.
	free := ARRAY(SELECT o.message_id FROM sentdm.outbox o WHERE o.message_id = ANY (addressed)
			AND o.claimed_at IS NULL AND o.ambiguous_since IS NULL AND o.part = 0 AND o.recipients IS NULL
		FOR UPDATE SKIP LOCKED)
		|| ARRAY(SELECT m.id FROM sentdm.messages m WHERE m.id = ANY (addressed) AND m.state = 'queued'
			AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id) FOR UPDATE SKIP LOCKED);
	free := ARRAY(SELECT m.id FROM sentdm.messages m WHERE m.id = ANY (free) AND m.state = 'queued'
		AND NOT EXISTS (SELECT FROM sentdm.outbox o WHERE o.message_id = m.id
			AND NOT (o.claimed_at IS NULL AND o.ambiguous_since IS NULL AND o.part = 0 AND o.recipients IS NULL)));
	WITH alone AS (
		UPDATE sentdm.messages m SET state = 'cancelled', finished_at = now()
		WHERE m.id = ANY (free) AND jsonb_array_length(m.request -> 'to') = 1 RETURNING m.id
	), gone AS (
		DELETE FROM sentdm.outbox o USING alone WHERE o.message_id = alone.id
	)
	SELECT count(*) INTO n FROM alone;
	what := 'messages cancelled'; rows := n; RETURN NEXT;

	-- What has ended, and what goes to others too; under a new key, as the request
	-- is another one now.
	UPDATE sentdm.messages m
	SET request = jsonb_set(CASE WHEN jsonb_array_length(m.request -> 'to') = 1 THEN sentdm.without_content(m.request)
			ELSE m.request END, '{to}', (m.request -> 'to') - phone),
		generation = m.generation + CASE WHEN m.state = 'queued' THEN 1 ELSE 0 END,
		erased_at = CASE WHEN jsonb_array_length(m.request -> 'to') = 1 THEN now() ELSE m.erased_at END,
		error = CASE WHEN jsonb_array_length(m.request -> 'to') > 1 AND position(phone IN m.error) = 0 THEN m.error END
	WHERE m.id = ANY (addressed) AND (m.id = ANY (free) OR m.state <> 'queued');
	GET DIAGNOSTICS n = ROW_COUNT;
	what := 'messages'; rows := n; RETURN NEXT;

	WITH gone AS (DELETE FROM sentdm.deliveries d WHERE d.recipient = phone RETURNING d.sent_id)
	SELECT count(*), array_agg(g.sent_id) FILTER (WHERE g.sent_id IS NOT NULL) INTO n, sent_ids FROM gone g;
	what := 'deliveries'; rows := n; RETURN NEXT;

	-- A husk stays, to know an event again that is repeated.
	UPDATE sentdm.events e
	SET payload = CASE WHEN e.payload IS NOT NULL THEN jsonb_build_object('event', e.event) END,
		raw = NULL, reason = 'forgotten', sent_id = NULL
	WHERE e.sent_id = ANY (sent_ids) OR position(to_json(phone)::text IN e.payload::text) > 0
		OR position(convert_to(phone, 'UTF8') IN e.raw) > 0;
	GET DIAGNOSTICS n = ROW_COUNT;
	what := 'events'; rows := n; RETURN NEXT;

	DELETE FROM sentdm.optouts o WHERE o.phone = sentdm_forget.phone AND NOT keep_opt_out;
	GET DIAGNOSTICS n = ROW_COUNT;
	what := 'optouts'; rows := n; RETURN NEXT;

	SELECT count(*) INTO n FROM sentdm.messages m WHERE m.id = ANY (addressed) AND m.request -> 'to' ? phone;
	what := 'messages being sent'; rows := n; RETURN NEXT;
	IF n > 0 THEN
		RAISE WARNING USING MESSAGE = 'some messages are being sent at this moment, and could not be forgotten',
			HINT = 'Call sentdm_forget() again when they have come to an end.';
	END IF;
END $$;
REVOKE ALL ON FUNCTION sentdm_forget(text, boolean) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_forget(text, boolean)
IS 'erase a person from messages, deliveries and events; what waits for them is cancelled first. The opt-out stays unless keep_opt_out is false';

--
-- Access
--

-- Without effect until row security is enabled; the owner of the tables, and so
-- all functions here and the worker, are exempt.
CREATE POLICY own_messages ON sentdm.messages
	USING ((SELECT pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
		OR created_by IN (SELECT r.rolname FROM pg_catalog.pg_roles r WHERE pg_catalog.pg_has_role(r.oid, 'USAGE')));
CREATE POLICY own_deliveries ON sentdm.deliveries
	USING ((SELECT pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
		OR EXISTS (SELECT FROM sentdm.messages m WHERE m.id = message_id));
CREATE POLICY own_events ON sentdm.events
	USING ((SELECT pg_catalog.has_table_privilege('sentdm.sender', 'SELECT'))
		OR EXISTS (SELECT FROM sentdm.deliveries d WHERE d.sent_id = events.sent_id));
COMMENT ON POLICY own_messages ON sentdm.messages IS 'see sentdm_row_security()';
COMMENT ON POLICY own_deliveries ON sentdm.deliveries IS 'see sentdm_row_security()';
COMMENT ON POLICY own_events ON sentdm.events IS 'see sentdm_row_security()';

CREATE FUNCTION sentdm_row_security(enabled boolean) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	relation regclass;
BEGIN
	FOREACH relation IN ARRAY '{sentdm.messages,sentdm.deliveries,sentdm.events}'::regclass[] LOOP
		EXECUTE format('ALTER TABLE %s %s ROW LEVEL SECURITY', relation, CASE WHEN enabled THEN 'ENABLE' ELSE 'DISABLE' END);
	END LOOP;
END $$;
REVOKE ALL ON FUNCTION sentdm_row_security(boolean) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_row_security(boolean)
IS 'let readers see only what was sent by a role that they are a member of (messages.created_by), or everything again';

CREATE FUNCTION sentdm.privileges_of(access text) RETURNS SETOF text
LANGUAGE sql STABLE STRICT PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
SELECT format('EXECUTE ON FUNCTION %s', p.oid::regprocedure)
FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
	JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'sentdm'
WHERE p.proname = ANY (CASE access
	WHEN 'sender' THEN '{sentdm_send,sentdm_send_batch,sentdm_send_trigger,sentdm_cancel,sentdm_cancel_tag,sentdm_opt_out}'::name[]
	WHEN 'reader' THEN '{fence,seconds_to_send}'
	WHEN 'webhook' THEN '{sentdm_receive_webhook,sentdm_receive_webhooks}'
	WHEN 'monitor' THEN '{worker_report,counters,fence,sentdm_health}'
	WHEN 'operator' THEN '{sentdm_send,sentdm_send_batch,sentdm_send_trigger,sentdm_cancel,sentdm_retry,
		sentdm_cancel_tag,sentdm_retry_tag,sentdm_forget,seconds_to_send,
		sentdm_pause,sentdm_resume,sentdm_enable,sentdm_disable,sentdm_health,sentdm_refresh,sentdm_prune,
		sentdm_set_webhook_secret,sentdm_create_webhook,sentdm_rotate_webhook_secret,sentdm_backfill,sentdm_opt_out,sentdm_sync_templates,sentdm_sync_contacts,sentdm_api,sentdm_me,sentdm_templates,sentdm_contacts,sentdm_lookup,
		fence,worker_report,counters,api_rows}' END)
UNION ALL
-- Of the tables a reader sees what is neither a number nor a text.
SELECT format('SELECT (%s) ON %s', string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum), a.attrelid::regclass)
FROM pg_attribute a
WHERE access = 'reader' AND a.attrelid IN ('sentdm.messages'::regclass, 'sentdm.deliveries'::regclass, 'sentdm.events'::regclass)
	AND a.attnum > 0 AND NOT a.attisdropped
	AND a.attname <> ALL ('{request,error,recipient,reason,payload,raw,dedupe_key}')
GROUP BY a.attrelid
UNION ALL
SELECT format('SELECT ON sentdm.%I', v.name)
FROM unnest(CASE access
	WHEN 'reader' THEN '{inbound,status,progress,problems,templates}'::text[]
	WHEN 'monitor' THEN '{stat_worker,stat_outbox,stat_webhook,stat_sender}'
	WHEN 'operator' THEN '{messages,deliveries,events,inbound,status,progress,problems,optouts,templates,webhooks,outbox,sender,stat_worker,stat_outbox,stat_webhook,stat_sender}' END) AS v(name)
UNION ALL
SELECT 'USAGE ON SCHEMA sentdm' WHERE access IN ('reader', 'monitor', 'operator')
$$;
REVOKE ALL ON FUNCTION sentdm.privileges_of(text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.privileges_of(text) IS 'internal: what a kind of access consists of';

CREATE FUNCTION sentdm.change_access(access text, command text, role regrole) RETURNS void
LANGUAGE plpgsql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	privilege text;
BEGIN
	IF access NOT IN ('sender', 'reader', 'webhook', 'operator', 'monitor') THEN
		RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'argument "access" is unknown',
			HINT = 'Use sender, reader, webhook, operator or monitor.';
	END IF;
	FOR privilege IN SELECT * FROM sentdm.privileges_of(access) LOOP
		EXECUTE format(command, privilege, role);
	END LOOP;
END $$;
REVOKE ALL ON FUNCTION sentdm.change_access(text, text, regrole) FROM PUBLIC;
COMMENT ON FUNCTION sentdm.change_access(text, text, regrole) IS 'internal: grant or revoke a kind of access';

CREATE FUNCTION sentdm_grant(role regrole, access text) RETURNS void
LANGUAGE sql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$ SELECT sentdm.change_access(access, 'GRANT %s TO %s', role) $$;
REVOKE ALL ON FUNCTION sentdm_grant(regrole, text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_grant(regrole, text) IS 'give a role access as sender, reader, webhook, operator or monitor';

CREATE FUNCTION sentdm_revoke(role regrole, access text) RETURNS void
LANGUAGE sql VOLATILE STRICT PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$ SELECT sentdm.change_access(access, 'REVOKE %s FROM %s', role) $$;
REVOKE ALL ON FUNCTION sentdm_revoke(regrole, text) FROM PUBLIC;
COMMENT ON FUNCTION sentdm_revoke(regrole, text)
IS 'take access away again; what another kind of access shares with it goes too';
