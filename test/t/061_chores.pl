# What the worker does besides sending: it asks for receipts that did not come, and
# looks after webhooks; and what it tells: notifications, and triggers of the user's.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('chores', standin => [ '--lifecycle', 'auto', '--step-ms', '5' ],
	settings => { 'sentdm.refresh_after' => 0, 'sentdm.idle_timeout' => '100ms' });
my $webhooks = '/v3/webhooks/*';

# Have the stand-in count the requests of a kind from now on, and answer some of them
# badly.
sub count_requests
{
	my ($path, @faults) = @_;

	$t->faults(@faults, { action => 'latency', ms => 0, times => -1, match => { method => 'GET', path => $path } });
	return;
}

sub requests { return $t->control('GET', 'faults')->[-1]{seen} }

sub status_of
{
	my ($message) = @_;

	return "SELECT status FROM sentdm.deliveries WHERE message_id = '$message'";
}

sub answer
{
	my ($sent_id, $answer) = @_;

	$t->sql("SELECT sentdm.apply_answers('[{\"sent_id\": \"$sent_id\", \"answer\": $answer}]')");
	return $t->sql("SELECT status, status_at AT TIME ZONE 'UTC', price FROM sentdm.deliveries WHERE sent_id = '$sent_id'");
}

# What an answer says, against what is known

count_requests('/v3/messages/*');
my $message = $t->send("'+15550000020', body => 'x'");

$t->becomes("SELECT state FROM sentdm.messages WHERE id = '$message'", 'accepted', 'a message is sent');
wait_until { $t->summary->{statuses}{DELIVERED} } 'it was delivered';
is($t->sql(status_of($message)), 'queued', '... and no receipt came');

my $sent_id = $t->sql("SELECT sent_id FROM sentdm.deliveries WHERE message_id = '$message'");

is(answer($sent_id, '{"status": "SENT", "price": 0.0075, "events": [{"status": "SENT", "timestamp": "2026-05-01T10:00:01.7000000+00:00"}, {"status": "QUEUED", "timestamp": "2026-05-01T10:00:00Z"}]}'),
	'sent|2026-05-01 10:00:01|0.0075', 'the last step counts, to the second as receipts have it');
is(answer($sent_id, '{"status": "DELIVERED", "events": [{"status": "DELIVERED", "timestamp": "2026-05-01T10:00:01.2Z"}]}'),
	'delivered|2026-05-01 10:00:01|0.0075', 'of the same second, the higher rank counts');
is(answer($sent_id, '{"status": "SENT", "events": [{"status": "SENT", "timestamp": "2026-05-01T10:00:01.9Z"}]}'),
	'delivered|2026-05-01 10:00:01|0.0075', '... and does not go back');
is(answer($sent_id, '{"status": "QUEUED"}'), 'delivered|2026-05-01 10:00:01|0.0075', 'a status without a time does not, either');
is(answer($sent_id, '{"status": "READ", "events": "none", "price": "much"}'), 'read|2026-05-01 10:00:01|0.0075', '... but may advance');
is(answer($sent_id, '{"status": 7, "events": [7, {"status": "SENT", "timestamp": "yesterday"}]}'), 'read|2026-05-01 10:00:01|0.0075',
	'what makes no sense does nothing');
is(answer($sent_id, '{"status": "QUEUED", "events": [{"status": "QUEUED", "timestamp": "2026-05-01T10:00:05Z"}]}'),
	'queued|2026-05-01 10:00:05|0.0075', 'what was sent again starts anew');
is($t->sql("SELECT status FROM sentdm_refresh('$message')"), 'delivered', 'sentdm_refresh() asks at once');
is(requests(), 1, '... with one request, and nobody else asked');

# Asking for receipts that did not come

count_requests('/v3/messages/*');
my $sandbox = $t->send("'+15550000021', body => 'x', sandbox => true");

$t->all_become('accepted', 'true', 'messages are accepted');
$message = $t->send("'+15550000022', body => 'x'");
$t->set('sentdm.refresh_after' => '1s');
$t->becomes(status_of($message), 'delivered', 'after sentdm.refresh_after, the worker asks');
is($t->sql("SELECT date_trunc('second', status_at) = status_at FROM sentdm.deliveries WHERE message_id = '$message'"), 't', '... with the time');
is(requests(), 1, '... once, and for nothing else');
is($t->sql(status_of($sandbox)), 'queued', '... not for what was sent to the sandbox');

$message = $t->send("'+15550000023', body => 'x', send_at => now() + interval '3 seconds'");
$t->becomes(status_of($message), 'delivered', 'a message that was scheduled is asked for after it was sent');

$message = $t->send("'+15550000028', body => 'x', profile_id => '7ba7b820-9dad-11d1-80b4-00c04fd430c8'");
$t->becomes(status_of($message), 'delivered', 'a message of a profile is asked for as that profile');
count_requests('/v3/messages/*');

my @ids = split /\n/, $t->sql("SELECT sentdm_send(ARRAY(SELECT '+1555010' || n FROM generate_series(1000, 1149) n), body => 'x')");

$t->becomes("SELECT count(*) FROM sentdm.deliveries WHERE message_id = '$ids[0]' AND status = 'delivered'", 150, 'every recipient is asked for');
is(requests(), 150, '... once');
$t->becomes('SELECT pid FROM sentdm.stat_worker', '', 'with nothing left to do, the worker leaves');

$t->set('sentdm.rate_limit' => '60/minute');
count_requests('/v3/messages/*');
@ids = split /\n/, $t->sql("SELECT sentdm_send(ARRAY(SELECT '+1555013' || n FROM generate_series(1000, 1039) n), body => 'x')");
$t->all_become('accepted', "id = '$ids[0]'", 'a message is sent within sentdm.rate_limit');
wait_until { requests() > 0 } 'somebody asks';
stays_true { requests() < 15 } 3, '... and what is asked counts, too';
$t->set('sentdm.rate_limit' => 'off');
$t->becomes("SELECT count(*) FROM sentdm.deliveries WHERE message_id = '$ids[0]' AND status = 'delivered'", 40, '... but everything is, in the end');

$t->configure_standin(lifecycle => 'off');
count_requests('/v3/messages/*');
$message = $t->send("'+15550000024', body => 'x'");
wait_until { requests() == 2 } 'a message that stays as it is was asked for twice';
is($t->sql("SELECT extract(epoch FROM now() - created_at) > 4 FROM sentdm.messages WHERE id = '$message'"), 't', '... at one and four times that age');

# Not in the way, and not when nothing is to be sent

count_requests('/v3/messages/*', { action => 'hang', times => 1, match => { method => 'GET' } });
$message = $t->send("'+15550000025', body => 'x'");
wait_until { $t->control('GET', 'faults')->[0]{applied} } 'an answer hangs';
$t->send("'+15550000026', body => 'x'");
$t->becomes('SELECT count(*) FROM sentdm.outbox', 0, '... and messages are sent meanwhile');
$t->set('sentdm.mode' => 'hold');
count_requests('/v3/messages/*');
stays_true { requests() == 0 } 2, 'in mode hold, nothing is asked';
$t->send("'+15550000027', body => 'x'");
stays_true { requests() == 0 } 1, '... also when something wakes the worker';
$t->sql('SELECT sentdm_pause()');
$t->set('sentdm.mode' => 'live');
stays_true { requests() == 0 } 2, 'nor in a pause';
count_requests('/v3/messages/*', { action => 'status', code => 403, times => -1, match => { method => 'GET' } });
$t->sql('SELECT sentdm_resume()');
$t->outbox_drains('after it, messages are sent');
wait_until { $t->control('GET', 'faults')->[0]{seen} } 'somebody asks, and may not';
stays_true { $t->control('GET', 'faults')->[0]{seen} == 1 } 2, 'who may not ask does not ask again';
count_requests('/v3/messages/*');
$t->set('sentdm.api_key' => 'another-key-for-tests-01234');
wait_until { requests() > 0 } 'but with another key';
pass('... it does');
$t->set('sentdm.refresh_after' => 0);

# Webhooks

$t->configure_standin(lifecycle => 'auto', webhook_retries => 0, webhook_retry_ms => 1);
$t->set('sentdm.check_webhook' => '1s', 'sentdm.allow_insecure_http' => 'on');

my $log = $t->log_position;
my $id = $t->sql("SELECT sentdm_create_webhook('http://127.0.0.1:1/webhooks/sent')");

$t->becomes("SELECT active, failures, trouble FROM sentdm.webhooks WHERE id = '$id' AND checked_at IS NOT NULL", 't|0|', 'the worker looks at a new webhook');
is($t->sql("SELECT ok FROM sentdm_health() WHERE name = 'webhook endpoint'"), 't', '... and it is well');
@ids = split /\n/, $t->sql("SELECT sentdm_send(ARRAY(SELECT '+1555011' || n FROM generate_series(1000, 1029) n), body => 'x')");
$t->becomes("SELECT active, trouble FROM sentdm.webhooks WHERE id = '$id'", 'f|Sent has disabled it', 'when nobody answers there, Sent disables it');
is($t->sql("SELECT ok, detail FROM sentdm_health() WHERE name = 'webhook endpoint'"), "f|$id: Sent has disabled it", '... and sentdm_health() says so');
like($t->sql("SELECT detail, hint FROM sentdm.problems WHERE problem = 'webhook'"), qr/^webhook $id: Sent has disabled it\|.*toggle-status/, '... and sentdm.problems');
my $missed = $t->sql("SELECT sentdm_api('GET', '/v3/webhooks/$id/events') #>> '{pagination,total_count}'");

$t->becomes("SELECT count(*) FROM sentdm.events WHERE late AND webhook_id = '$id'", $missed, 'the events that it missed are fetched');
is($t->sql("SELECT backfilled_until > registered_at FROM sentdm.webhooks WHERE id = '$id'"), 't', '... which is noted');
is($t->count_in_log(qr/WARNING:  55000: webhook $id: Sent has disabled it|WARNING:  webhook $id: Sent has disabled it/, $log), 1, 'there was one warning');
unlike(join('', grep { !/statement:/ } split /^/, $t->log_since($log)), qr/127\.0\.0\.1:1\b/, '... without the address');
$t->set('sentdm.reactivate_webhook' => 'on');
$t->becomes("SELECT active, trouble IS NULL FROM sentdm.webhooks WHERE id = '$id'", 't|t', 'it is served again, where that is allowed');
is($t->sql("SELECT sentdm_api('GET', '/v3/webhooks/$id') ->> 'is_active'"), 'true', '... by Sent');
$t->sql("SELECT sentdm_api('DELETE', '/v3/webhooks/$id')");
$t->becomes("SELECT trouble FROM sentdm.webhooks WHERE id = '$id'", 'Sent does not know it', 'one that was deleted at Sent is a problem');
$t->sql('DELETE FROM sentdm.webhooks');
$t->becomes('SELECT pid FROM sentdm.stat_worker', '', 'without a webhook, there is nothing to look at');

# Notifications

my $listener = $t->session;

sub heard
{
	my ($pattern, $name) = @_;
	my $heard = '';

	eval { wait_until { ($heard .= $listener->query('SELECT 1')) =~ $pattern } $name };
	like($heard, $pattern, $name);
	return $heard;
}

$listener->query('LISTEN sentdm_status');
$t->set('sentdm.notify' => 'on');
$t->configure_standin(lifecycle => 'off');
$message = $t->send("'+15550000030', body => 'x'");
heard(qr/"sentdm_status" with payload "\{"message_id": "$message", "status": "accepted"\}"/, 'who listens hears that a message was accepted');
$sent_id = $t->sql("SELECT sent_id FROM sentdm.deliveries WHERE message_id = '$message'");
answer($sent_id, '{"status": "SENT"}');
heard(qr/"message_id": "$message", "status": "sent"/, '... and what became of it');
answer($sent_id, '{"status": "SENT"}');
$message = $t->send("ARRAY(SELECT '+1555012' || n FROM generate_series(1000, 2500) n), body => 'x'") =~ s/\n.*//sr;
$t->all_become('accepted', "state <> 'queued'", 'many are sent');
unlike(heard(qr/"$message", "status": "accepted"/, '... and announced'), qr/"status": "sent"/, 'what does not change is not announced');
$t->sql("SELECT sentdm.apply_answers(jsonb_agg(jsonb_build_object('sent_id', sent_id, 'answer', '{\"status\": \"SENT\"}'::jsonb)))"
	  . " FROM sentdm.deliveries WHERE recipient LIKE '+1555012%'");
heard(qr/with payload "\{"messages": 1501\}"/, 'a large change is announced as a number');
$t->set('sentdm.notify' => undef);
$message = $t->send("'+15550000031', body => 'x'");
$t->all_become('accepted', "id = '$message'", 'one more is sent');
is($listener->query('SELECT 1'), 1, '... and without the setting, nothing is announced');
$listener->quit;

# Triggers of the user's

$t->sql(<<'SQL');
CREATE TABLE seen (recipient text, status text);
CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO public.seen VALUES (NEW.recipient, NEW.status);
	IF NEW.recipient = '+15550000666' THEN
		RAISE EXCEPTION 'a mistake about %', NEW.recipient;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER see AFTER INSERT OR UPDATE OF status ON sentdm.deliveries FOR EACH ROW EXECUTE FUNCTION see();
SELECT sentdm_set_webhook_secret('whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=');
SQL
$log = $t->log_position;
$t->sql("SELECT sentdm_send('+1555000' || n, body => 'x', tag => 'trigger') FROM unnest('{0660,0666,0667,0668}'::text[]) n");
$t->becomes("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages WHERE tag = 'trigger'", 'accepted', 'a trigger that raises an error does not keep outcomes from being stored');
is($t->sql("SELECT string_agg(recipient, ',' ORDER BY recipient) FROM seen WHERE status = 'queued'"), '+15550000660,+15550000667,+15550000668',
	'... and has its effect where it does not');
$message = $t->sql("SELECT message_id FROM sentdm.deliveries WHERE recipient = '+15550000666'");
is($t->count_in_log(qr/outcome of message $message was stored without firing triggers.*SQLSTATE P0001/, $log), 1, '... with one warning that names the message');
$t->send("'+15550000669', body => 'x', tag => 'trigger'");
$t->becomes("SELECT count(*) FROM seen WHERE recipient = '+15550000669'", 1, 'later messages fire it as before');

my $receive = <<'SQL';
SELECT string_agg(http_status || ' ' || duplicate, ',' ORDER BY ordinal)
FROM (SELECT array_agg(convert_to(e.body, 'UTF8')) AS bodies, array_agg(jsonb_build_object('X-Webhook-ID', 'w', 'X-Webhook-Timestamp', e.at,
		'X-Webhook-Signature', sentdm_sign(e.body, 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=', 'w', e.at))) AS headers
	FROM (SELECT json_build_object('field', 'message', 'event', 'message.delivered', 'payload', json_build_object('message_id', d.sent_id,
			'message_status', 'DELIVERED', 'updated_at', d.at))::text AS body, extract(epoch FROM now())::bigint::text AS at
		FROM (SELECT sent_id, '2026-06-01T10:00:00Z' AS at FROM sentdm.deliveries JOIN sentdm.messages m ON m.id = message_id WHERE m.tag = 'trigger') AS d) AS e) AS r,
	sentdm_receive_webhooks(bodies, headers)
SQL
$log = $t->log_position;
is($t->sql($receive), join(',', ('200 false') x 5), 'nor does it keep webhooks from being stored');
is($t->sql("SELECT count(*), count(*) FILTER (WHERE status = 'delivered') FROM sentdm.deliveries JOIN sentdm.messages m ON m.id = message_id WHERE m.tag = 'trigger'"),
	'5|5', '... and applied');
is($t->sql("SELECT count(*) FROM seen WHERE status = 'delivered'"), 4, '... with its effect on the others');
is($t->count_in_log(qr/WARNING: .*an event of message [0-9a-f-]{36} was stored without firing triggers.*SQLSTATE P0001/, $log), 1, '... and one warning');
is($t->sql($receive), join(',', ('200 true') x 5), '... once');
is($t->sql("SELECT count(*) FROM sentdm.events WHERE occurred_at = '2026-06-01T10:00:00Z' AND duplicates = 1"), 5, '... and duplicates are counted');

# Beside a history it reads no more than without one

$t->sql(<<'SQL');
DROP TRIGGER see ON sentdm.deliveries;
INSERT INTO sentdm.messages (id, request, state, attempts, finished_at, http_status)
SELECT (overlay(lpad(to_hex(extract(epoch FROM now() - interval '2 days')::bigint * 1000 + n), 12, '0') PLACING '-' FROM 9 FOR 0) || '-7000-8000-000000000000')::uuid, '{"to": ["+15550000001"]}', 'accepted', 1, now(), 202 FROM generate_series(1, 50000) n;
INSERT INTO sentdm.deliveries (sent_id, message_id, status) SELECT id, id, 'delivered' FROM sentdm.messages WHERE id::text LIKE '%-7000-8000-000000000000';
ANALYZE;
SQL
$t->sql('SELECT pg_stat_reset()');
count_requests('/v3/messages/*');
$t->set('sentdm.refresh_after' => '1s');
$t->send("'+15550000701', body => 'x'");
$t->send("'+15550000702', body => 'x', send_at => clock_timestamp() + interval '10 ms'");
wait_until { requests() >= 2 } 'it sends and asks, at once and at a time';
$t->becomes('SELECT pid FROM sentdm.worker_report()', '', '... and leaves');
$t->set('sentdm.refresh_after' => 0);
$t->becomes("SELECT n_tup_upd >= 2 FROM pg_stat_user_tables WHERE relid = 'sentdm.messages'::regclass", 't', '... and tells what it did');
is($t->sql("SELECT string_agg(concat_ws(' ', indexrelname, idx_tup_read), ', ') FROM pg_stat_user_indexes WHERE schemaname = 'sentdm' AND idx_tup_read >= 50000"),
	'', '... and read no index from end to end');
is($t->sql("SELECT string_agg(concat_ws(' ', relname, seq_tup_read), ', ') FROM pg_stat_user_tables WHERE schemaname = 'sentdm' AND seq_tup_read >= 50000"),
	'', '... nor a table');
$t->sql("DELETE FROM sentdm.messages WHERE id::text LIKE '%-7000-8000-000000000000'");
$t->accepted_once('nothing was sent twice');
$t->stops_cleanly;
done_testing();
