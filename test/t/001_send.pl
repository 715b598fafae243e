# What sentdm_send() and its relatives make of their arguments on the wire, and
# what the answers become in the tables.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('send');
my $uuid = qr/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/;

# Send one message, wait for its outcome, and return its id and the request.
sub send_and_wait
{
	my ($arguments) = @_;
	my $id = $t->send($arguments);

	wait_until { $t->sql("SELECT state <> 'queued' FROM sentdm.messages WHERE id = '$id'") eq 't' }
	"message $id has an outcome";
	return ($id, $t->last_request);
}

sub state_of
{
	my ($id) = @_;

	return $t->sql("SELECT state FROM sentdm.messages WHERE id = '$id'");
}

# All arguments, with a template

my ($id, $request) = send_and_wait(<<'SQL');
	'+15550000001', template => 'order_confirmation',
	parameters => '{"name": "Ann", "order_id": 42, "vip": true, "total": 12.50}',
	channels => '{sms,whatsapp}', send_at => now() - interval '1 minute', expires_at => now() + interval '1 hour',
	priority => 'high', unique_key => 'order 42', tag => 'orders',
	profile_id => '7ba7b820-9dad-11d1-80b4-00c04fd430c8', sandbox => false,
	extra => '{"subject": "Hi", "media_urls": ["https://example.com/a.png"],
		"channels": {"sms": [{"from": ["+15550009999"]}]}}'
SQL

is_deeply($request->{json}, {
	to => ['+15550000001'],
	template => {
		name => 'order_confirmation',
		parameters => { name => 'Ann', order_id => '42', vip => 'true', total => '12.50' } },
	channel => [ 'sms', 'whatsapp' ],
	subject => 'Hi',
	media_urls => ['https://example.com/a.png'],
	channels => { sms => [ { from => ['+15550009999'] } ] } },
	'the request has every argument that concerns the API, and nothing else');
like($request->{body}, qr/"order_id": ?"42"/, 'a number among the parameters is sent as a string');
is("$request->{method} $request->{path}", 'POST /v3/messages', 'it is POSTed to the right place');

my %headers = map { lc $_ => $request->{headers}{$_} } keys %{ $request->{headers} };
is($headers{'x-api-key'}, 'a-key-for-tests-0123456789', 'the key is in its header');
is($headers{'idempotency-key'}, "sentdm-$id-1", 'the Idempotency-Key is made of the id and the generation');
is($headers{'x-profile-id'}, '7ba7b820-9dad-11d1-80b4-00c04fd430c8', 'the profile is in its header');
like($headers{'user-agent'}, qr{^sentdm/\d\S* PostgreSQL/\d}, 'the User-Agent names sentdm and PostgreSQL');
is($headers{'content-type'}, 'application/json', 'the content type is JSON');
is($headers{accept}, 'application/json', 'the answer is wanted as JSON');
is_deeply(
	[ grep { !/^(?:host|content-length|x-api-key|idempotency-key|x-profile-id|user-agent|content-type|accept)$/ } keys %headers ],
	[], 'no other header is sent');

is($t->sql(<<"SQL"), 'accepted|high|order 42|orders|postgres|1|202||t|t', 'its row says what became of it');
SELECT state, priority, unique_key, tag, created_by, attempts, http_status, error_code,
	finished_at BETWEEN created_at AND now(), request_id LIKE 'req\\_%'
FROM sentdm.messages WHERE id = '$id'
SQL
is_deeply(
	[ split /\n/, $t->sql("SELECT recipient, channel, status FROM sentdm.deliveries WHERE message_id = '$id' ORDER BY 2") ],
	[ '+15550000001|sms|queued', '+15550000001|whatsapp|queued' ],
	'there is one delivery for each channel');
is_deeply(
	[ split /\n/, $t->sql("SELECT sent_id FROM sentdm.deliveries WHERE message_id = '$id' ORDER BY 1") ],
	[ sort map { $_->{message_id} } $t->effects ],
	'the deliveries bear the ids that the API gave');
is($t->sql("SELECT count(*), min(state), min(status) FROM sentdm.status WHERE message_id = '$id'"),
	'2|accepted|queued', 'sentdm.status shows them');

# Other forms

($id, $request) = send_and_wait(q{'+15550000002', body => E'\u00fc \U0001F600 "quoted" \\\\ back\nnew line'});
is_deeply($request->{json}, { to => ['+15550000002'], text => "\x{fc} \x{1F600} \"quoted\" \\ back\nnew line" },
	'a text arrives letter for letter, and nothing is sent that was not asked for');
ok(!exists $request->{headers}{'x-profile-id'}, 'no profile header is sent without a profile');
is($t->sql("SELECT count(*), min(channel) FROM sentdm.deliveries WHERE message_id = '$id'"), '1|',
	'where Sent chooses the channel there is one delivery, without a channel');

(undef, $request) = send_and_wait(q{'+15550000003', '7BA7B820-9DAD-41D1-80B4-000000000002', '{"name": "Bo"}'});
is_deeply($request->{json}{template}, { id => '7BA7B820-9DAD-41D1-80B4-000000000002', parameters => { name => 'Bo' } },
	'a template that is a UUID is sent as an id; arguments may be given by position');

(undef, $request) = send_and_wait(q{'+15550000004', body => 'x', channels => '{sent}', parameters => NULL, tag => NULL});
is_deeply($request->{json}, { to => ['+15550000004'], text => 'x', channel => ['sent'] },
	'a NULL is an argument that is not given');

# To many

my $before = $t->summary->{requests};
my @ids = split /\n/, $t->sql(<<'SQL');
SELECT sentdm_send(array_agg('+1666' || to_char(n, 'FM0000000') ORDER BY n) || '{+16660000001,+16660002500}'::text[],
	'order_shipped', '{"name": "you", "order_id": "7"}', tag => 'many')
FROM generate_series(1, 2500) AS n
SQL
count_is(\@ids, 3, 'an array of 2,500 numbers becomes three messages');
$t->all_become('accepted', "tag = 'many'", 'all three are accepted');
my @arrived = sort { $a->{to}[0] cmp $b->{to}[0] } $t->arrived($before);
is_deeply([ map { scalar @{ $_->{to} } } @arrived ], [ 1000, 1000, 500 ], '... in requests of at most 1,000 numbers');
is_deeply([ map { @{ $_->{to} } } @arrived ], [ map { sprintf '+1666%07d', $_ } 1 .. 2500 ],
	'... which contain every number once, in order');
is_deeply([ sort map { $_->{key} } @arrived ], [ sort map { "sentdm-$_-1" } @ids ], '... under a key each');
is($t->sql("SELECT count(*), count(DISTINCT recipient) FROM sentdm.deliveries JOIN sentdm.messages ON id = message_id WHERE tag = 'many'"),
	'2500|2500', '... with a delivery stored for each number');
is($t->sql("SELECT total, queued, accepted, failed, percent FROM sentdm.progress WHERE tag = 'many'"), '2500|0|2500|0|100.0',
	'... and sentdm.progress counts them');
is($t->sql(q{SELECT count(*) FROM unnest('{NULL,"{}"}'::text[]) AS n, sentdm_send(n::text[], body => 'x')}), 0,
	'no numbers, no message');

# A batch

$before = $t->summary->{requests};
my $result = $t->sql(<<'SQL');
SELECT ordinal, message_id IS NOT NULL, error FROM sentdm_send_batch('[
	{"recipient": "+15550000010", "template": "welcome", "parameters": {"name": "Ann"}, "tag": "batch", "priority": "high"},
	{"recipient": "not a number", "body": "x"},
	{"recipients": ["+15550000011", "+15550000012"], "body": "to two", "tag": "batch", "channels": ["sms"],
	 "expires_at": "2999-01-01T00:00:00Z", "unique_key": "batch 3"},
	{"recipient": "+15550000013", "body": "x", "colour": "red"},
	{"recipient": "+15550000014", "body": "sandboxed", "tag": "batch", "sandbox": true,
	 "profile_id": "7ba7b820-9dad-11d1-80b4-00c04fd430c8", "extra": {"subject": "S"}, "send_at": "2020-01-01T00:00:00Z"}]')
SQL
is($result, <<'ROWS' =~ s/\n\z//r, 'a batch tells for each item what became of it');
1|t|
2|f|argument "recipient" is not an E.164 number
3|t|
4|f|the item has a key that is no argument of sentdm_send()
5|t|
ROWS
$t->all_become('accepted', "tag = 'batch'", 'the good items of a batch are sent');
is_deeply(
	[ map { join ',', @{ $_->{to} } } sort { $a->{to}[0] cmp $b->{to}[0] } $t->arrived($before) ],
	[ '+15550000010', '+15550000011,+15550000012', '+15550000014' ],
	'... and the others are not');

# From a trigger

$t->sql(<<'SQL');
CREATE TABLE orders (id int PRIMARY KEY, phone text, status text);
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM sentdm_send(NEW.phone, 'order_shipped', jsonb_build_object('order_id', NEW.id), tag => 'trigger');
	RETURN NULL;
END $$;
CREATE TRIGGER shipped AFTER UPDATE OF status ON orders FOR EACH ROW
	WHEN (NEW.status = 'shipped' AND OLD.status <> 'shipped') EXECUTE FUNCTION tell();
INSERT INTO orders VALUES (1, '+15550000021', 'new'), (2, '+15550000022', 'new'), (3, '+15550000023', 'new');
UPDATE orders SET status = 'shipped' WHERE id < 3;
SQL
$t->all_become('accepted', "tag = 'trigger'", 'messages from a trigger are sent');
is_deeply([ grep { /^\+1555000002\d$/ } $t->arrived_numbers ], [ '+15550000021', '+15550000022' ],
	'... for the rows for which it fired');

# Times

$id = $t->send(q{'+15550000031', body => 'later', send_at => clock_timestamp() + interval '600 ms'});
$t->all_become('accepted', "id = '$id'", 'a scheduled message is sent');
my ($scheduled) = grep { $_->{to}[0] eq '+15550000031' } $t->arrived;
my $due_ms = $t->sql("SELECT extract(epoch FROM send_at) * 1000 FROM sentdm.messages WHERE id = '$id'");
my $lateness_ms = $scheduled->{unix_us} / 1000 - $due_ms;
cmp_ok($lateness_ms, '>=', 0, '... not before its time');
cmp_ok($lateness_ms, '<', 2000, '... and soon after it');
is($t->last_request->{json}{scheduled_at}, undef, '... as an ordinary request');

$t->sql('SELECT sentdm_pause()');
my $expiring = $t->send(q{'+15550000032', body => 'too late', expires_at => clock_timestamp() + interval '100 ms'});
$t->becomes("SELECT clock_timestamp() > expires_at FROM sentdm.messages WHERE id = '$expiring'", 't',
	'its time is over');
$t->sql('SELECT sentdm_resume()');
$t->all_become('expired', "id = '$expiring'", 'a message that could not be sent in time expires');
is($t->sql("SELECT error_code, error, attempts, finished_at IS NOT NULL FROM sentdm.messages WHERE id = '$expiring'"),
	'expired|expired before it could be sent|0|t', '... and says so');

# Priorities

$t->set('sentdm.max_in_flight' => 1);
$t->sql('SELECT sentdm_pause()');
$before = $t->summary->{requests};
$t->sql(<<'SQL') for 1 .. 3;
SELECT sentdm_send('+1555000004' || n, body => 'x', priority => p, tag => 'priority')
FROM (VALUES (1, 'bulk'), (2, 'normal'), (3, 'high')) AS v(n, p)
SQL
$t->sql('SELECT sentdm_resume()');
$t->all_become('accepted', "tag = 'priority'", 'messages of all priorities are sent');
is(join('', map { substr($_->{to}[0], -1) } $t->arrived($before)), '333222111', '... high before normal before bulk');
$t->set('sentdm.max_in_flight' => undef);

# A key of the caller's own

($id) = send_and_wait(q{'+15550000051', body => 'once', unique_key => 'only once'});
is($t->send(q{'+15550000051', body => 'once', unique_key => 'only once'}), $id,
	'a second message with the same unique_key has the id of the first');
is($t->sql(q{SELECT sentdm_send('{+15550000052,+15550000053}'::text[], body => 'x', unique_key => 'only once')}), $id,
	'... also in the form for many');
is($t->sql("SELECT count(*) FROM sentdm.messages WHERE unique_key = 'only once'"), 1, '... and there is one row');

my ($one, $two) = ($t->session, $t->session);
$one->query_safe('BEGIN');
$one->query_safe(q{SELECT sentdm_send('+15550000054', body => 'x', unique_key => 'race')});
$two->query_until(qr/started/, qq{\\echo started\nSELECT sentdm_send('+15550000055', body => 'x', unique_key => 'race') AS id \\gset\n});
$t->becomes("SELECT count(*) FROM pg_locks WHERE NOT granted", 1,
	'a second session with the same unique_key waits for the first');
$one->query_safe('ROLLBACK');
$t->all_become('accepted', "unique_key = 'race'", '... and sends when that one rolled back');
is($two->query_safe('SELECT :\'id\''), $t->sql("SELECT id FROM sentdm.messages WHERE unique_key = 'race'"),
	'... its own message');
$_->quit foreach $one, $two;
ok(!grep({ $_ eq '+15550000054' } $t->arrived_numbers), '... and the other one never');

# Two that look before either has stored anything: an index before that on the key
# makes them wait there
$t->sql(<<'SQL');
CREATE FUNCTION hold(key text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF key = 'held' THEN
		PERFORM pg_advisory_xact_lock_shared(1);
	END IF;
	RETURN key;
END $$;
CREATE INDEX holding ON sentdm.messages (hold(unique_key));
SQL
$t->sql('REINDEX INDEX CONCURRENTLY sentdm.messages_unique_key');
my ($holder, @racers) = map { $t->session } 0 .. 2;
$holder->query_safe('SELECT pg_advisory_lock(1)');
$_->query_until(qr/started/, qq{\\echo started\nSELECT sentdm_send('+15550000056', body => 'x', unique_key => 'held') AS id \\gset\n}) foreach @racers;
$t->becomes('SELECT count(*) FROM pg_locks WHERE NOT granted', 2, 'two sessions store a message with the same new unique_key');
$holder->query_safe('SELECT pg_advisory_unlock(1)');
my @held = map { $_->query_safe('SELECT :\'id\'') } @racers;
is($held[0], $held[1], '... and get the same id');
$t->all_become('accepted', "unique_key = 'held'", '... of the one message that is sent');
is($t->sql("SELECT count(*) FROM sentdm.messages WHERE id = '$held[0]'"), 1, '... which is there');
$_->quit foreach $holder, @racers;
$t->sql('DROP INDEX sentdm.holding');

# Cancel and retry

$id = $t->send(q{'+15550000061', body => 'x', send_at => now() + interval '1 hour'});
is($t->sql("SELECT sentdm_cancel('$id')"), 't', 'a message that waits can be cancelled');
is(state_of($id), 'cancelled', '... and is');
is($t->sql("SELECT count(*) FROM sentdm.outbox"), 0, '... and left the queue');
is($t->sql("SELECT sentdm_cancel('$id')"), 'f', '... once');
is($t->sql("SELECT sentdm_retry('$id')"), 't', 'a cancelled message can be sent after all');
$t->all_become('accepted', "id = '$id'", '... and is');
is($t->last_request->{headers}{'idempotency-key'}, "sentdm-$id-2", '... under a new key');
is($t->sql("SELECT sentdm_cancel('$id')"), 'f', 'an accepted message cannot be cancelled');
is($t->sql("SELECT sentdm_retry('$id')"), 'f', '... nor sent again');
is($t->sql("SELECT sentdm_retry('$expiring')"), 't', 'an expired message can be sent after all');
$t->all_become('accepted', "id = '$expiring'", '... and is');
is($t->sql("SELECT sentdm_cancel(gen_random_uuid()), sentdm_retry(gen_random_uuid())"), 'f|f',
	'an unknown message cannot be cancelled or sent again');

# Pause and resume, disable and enable

foreach ([ 'sentdm_pause()', 'sentdm_resume()' ], [ 'sentdm_disable()', 'sentdm_enable()' ])
{
	my ($stop, $go) = @$_;

	$t->sql("SELECT $stop");
	$before = $t->summary->{requests};
	$id = $t->send(q{'+15550000071', body => 'x'});
	stays_true { $t->summary->{requests} == $before } 0.4, "after $stop nothing is sent";
	is(state_of($id), 'queued', '... and messages wait');
	my $released_us = $t->sql("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint FROM $go");
	$t->all_become('accepted', "id = '$id'", "... until $go");
	cmp_ok(($t->arrived($before))[0]{unix_us}, '>', $released_us - 1000, '... and not before');
}

# Sandbox and hold

($id, $request) = send_and_wait(q{'+15550000081', body => 'x', sandbox => true});
is($request->{json}{sandbox}, JSON::PP::true, 'sandbox => true is passed on');
is(state_of($id), 'accepted', '... and the message counts as accepted');
is(($t->arrived)[-1]{outcome}, 'sandbox', '... and went to nobody');

$t->set('sentdm.mode' => 'hold');
my $live = $t->send(q{'+15550000082', body => 'live'});
$before = $t->summary->{requests};
stays_true { $t->summary->{requests} == $before } 0.4, 'in mode hold nothing is sent';
$t->set('sentdm.mode' => 'sandbox');
my $fake = $t->send(q{'+15550000083', body => 'fake'});
$t->all_become('accepted', "id = '$fake'", 'in mode sandbox messages are sent');
is_deeply([ map { "$_->{to}[0] $_->{outcome}" } $t->arrived($before) ], ['+15550000083 sandbox'],
	'... to the sandbox, and those that were meant for people are not');
is(state_of($live), 'queued', '... but wait');
$t->set('sentdm.mode' => undef);
my $began = time;
$t->all_become('accepted', "id = '$live'", '... for mode live');
cmp_ok(time - $began, '<', 30, '... and no longer');
is(($t->arrived)[-1]{outcome}, 'accepted', '... and then go to people');
(undef, $request) = do
{
	my $own = $t->sql(q{SET sentdm.mode = 'sandbox'; SELECT sentdm_send('+15550000084', body => 'x')});

	$t->all_become('accepted', "id = '$own'", 'a session can choose the sandbox for itself');
	($own, $t->last_request);
};
is($request->{json}{sandbox}, JSON::PP::true, '... and its messages say so');

$t->accepted_once('nothing was accepted twice, and no request went without a key');
is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages"), 'accepted', 'every message came to its end');
$t->stops_cleanly;

done_testing();
