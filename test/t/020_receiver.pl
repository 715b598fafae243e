# The receiver stores what is authentic and answers 200 only then; it says who it
# is, how it is, and nothing about what it received.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IPC::Run;
use JSON::PP;
use List::Util qw(shuffle);
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('receiver', enable => 0);

# Flags

{
	my ($code, $out, $error) = SentdmReceiver->run('--help');

	is($code, 0, '--help ends with status 0');
	like($out, qr/--max-connections-per-address=N .*\(256\)/, 'and shows flags with their defaults');

	($code, $out) = SentdmReceiver->run('--version');
	is($code, 0, '--version ends with status 0');
	like($out, qr/^sentdm-receiver \d+\.\d+$/m, 'and says the version');

	foreach ([ '--queue-events=many', 'a word for a number' ], [ '--request-timeout=5 weeks', 'an unknown unit' ],
		[ '--threads=0', 'a number out of range' ], [ '--no-such-flag', 'an unknown flag' ], [ 'word', 'an argument' ],
		[ '--path=webhooks', 'a relative path' ], [ '--trusted-proxies=10.0.0.0/33', 'an impossible network' ],
		[ '--access-log=maybe', 'a word that is neither on nor off' ])
	{
		($code, $out, $error) = SentdmReceiver->run($_->[0]);
		isnt($code, 0, "$_->[1] is refused");
		isnt($error, '', 'and the reason is said');
	}

	local $ENV{SENTDM_RECEIVER_THREADS} = 'x';
	($code, $out, $error) = SentdmReceiver->run('--check');
	isnt($code, 0, 'a wrong variable is refused');
	like($error, qr/SENTDM_RECEIVER_THREADS/, 'and named');
}

# --check, and what is missing

my %connection = (PGHOST => $t->node->host, PGPORT => $t->node->port, PGDATABASE => 'postgres', PGUSER => 'receiver');
my @anywhere = ('--listen=127.0.0.1:0', '--health-listen=127.0.0.1:0');

sub check
{
	my ($expected, $pattern, $name, @flags) = @_;
	local %ENV = (%ENV, %connection);
	my ($code, $out, $error) = SentdmReceiver->run('--check', @anywhere, @flags);
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is($code ? 1 : 0, $expected, "--check: $name");
	like($out . $error, $pattern, 'and says so');
	return;
}

check(1, qr/failed: .*role "receiver" does not exist/, 'a role that does not exist');
$t->sql('CREATE ROLE receiver LOGIN');
check(1, qr/failed: .*permission denied/, 'a role without the privilege');
$t->sql(q{SELECT sentdm_grant('receiver', 'webhook')});
check(0, qr/ok: database "postgres"/, 'all is well');
$t->sql('CREATE DATABASE empty');
check(1, qr/failed: .*sentdm is not installed in database "empty"/, 'a database without the extension',
	'--database=dbname=empty');
check(1, qr/failed: settings or addresses/, 'an address that is not ours', '--listen=192.0.2.1:1');

{
	my $file = PostgreSQL::Test::Utils::tempdir() . '/services';

	append_to_file($file, "[here]\nhost=$connection{PGHOST}\nport=$connection{PGPORT}\ndbname=postgres\nuser=receiver\n");
	local %ENV = (%ENV, PGSERVICEFILE => $file, PGSERVICE => 'here');
	delete @ENV{qw(PGHOST PGPORT PGDATABASE PGUSER)};
	my ($code, $out) = SentdmReceiver->run('--check', @anywhere);

	is($code, 0, 'the database can be named by a service file');
}

# Without a secret

my $receiver = SentdmReceiver->new($t->node);
my $id = uuid();

is($receiver->deliver(event($id, 'delivered')), 500, 'without a secret an event is answered 500');
is($t->sql('SELECT count(*) FROM sentdm.events'), 0, 'and not stored');
$t->sql("SELECT sentdm_set_webhook_secret('$secret')");

# One event

my $body = event($id, 'delivered');
my $position = $receiver->log_position;
my $answer = $receiver->post($body, [ signed($body), 'X-Request-ID' => 'abc-123' ]);

is($answer->{status}, 200, 'an authentic event is answered 200');
is_deeply(decode_json($answer->{body}), { received => JSON::PP::true }, 'with the body that Sent documents');
is($answer->{headers}{'content-type'}, 'application/json', 'which is JSON');
is($answer->{headers}{'x-request-id'}, 'abc-123', 'with the request id that was sent');
like($answer->{headers}{'x-process-time'}, qr/^\d+\.\d{6}$/, 'and the time that it took, in seconds');
is($t->sql("SELECT event, sent_id, duplicates FROM sentdm.events"), "message.delivered|$id|0", 'and stored');
is($t->sql("SELECT status FROM sentdm.deliveries WHERE sent_id = '$id'"), 'delivered', 'and applied');

$receiver->log_becomes(qr/id=abc-123/, $position, 'the access log has a line for it');
my ($line) = $receiver->log_since($position) =~ /^(.*id=abc-123.*)$/m;
like($line, qr/client=127\.0\.0\.1 id=abc-123 method=POST path=\/webhooks\/sent status=200 bytes=\d+ ms=[\d.]+ event=\d+ duplicate=false reason=""/,
	'with what can be told');
unlike($receiver->log_since($position), qr/v1,|4155550|$id|$webhook_id/, 'and nothing of body or headers');

$answer = $receiver->post($body, [ signed($body) ]);
is($answer->{status}, 200, 'the same event again is answered 200');
like($answer->{headers}{'x-request-id'}, qr/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/,
	'with a request id of its own when none was sent');
is($t->sql('SELECT count(*), max(duplicates) FROM sentdm.events'), '1|1', 'and only counted');

foreach ([ 'a"b', 'a quote' ], [ 'x' x 129, 'too long a text' ], [ "a\xe9", 'a byte beyond ASCII' ], [ 'a b', 'a space' ])
{
	$answer = $receiver->post($body, [ signed($body), 'X-Request-ID' => $_->[0] ]);
	like($answer->{headers}{'x-request-id'}, qr/^[0-9a-f-]{36}$/, "a request id with $_->[1] is replaced");
}

# What is refused by the database

$t->sql('TRUNCATE sentdm.events');
my %signed = signed($body);

foreach ([ 401, { %signed, 'X-Webhook-Signature' => 'v1,' . 'A' x 43 . '=' }, qr/wrong signature/, 'a wrong signature' ],
	[ 401, { signed("$body ") }, qr/wrong signature/, 'a signature of another body' ],
	[ 401, { signed($body, timestamp => time - 200_000) }, qr/too old/, 'an event of the day before yesterday' ],
	[ 401, { signed($body, timestamp => time + 1000) }, qr/future/, 'an event of the future' ],
	[ 401, { 'X-Webhook-ID' => 'x' }, qr/no x-webhook-signature/, 'an event without a signature' ])
{
	my ($status, $headers, $reason, $name) = @$_;

	$answer = $receiver->post($body, [%$headers]);
	is($answer->{status}, $status, "$name is refused");
	like(decode_json($answer->{body})->{error}, $reason, 'with the reason');
}
is($t->sql('SELECT count(*) FROM sentdm.events'), 0, 'and nothing of it is stored');
$receiver->metric_becomes('requests_rejected_total{status="401",reason="wrong signature"}', 2, 'reasons are counted');

# Whatever the bytes are

foreach ([ '', 'nothing at all' ], [ '{', 'half an object' ], [ "\xff\xfe\x00\x01", 'bytes' ], [ '"\\u0000"', 'a NUL' ],
	[ '[' x 100_000, 'depth' ], [ '1e999999', 'a huge number' ])
{
	is($receiver->deliver($_->[0]), 200, "authentic, and $_->[1]: 200");
}
is($t->sql('SELECT count(*), count(raw) FROM sentdm.events WHERE payload IS NULL'), '6|6', 'and kept as bytes');
is($t->sql(q{SELECT encode(raw, 'hex') FROM sentdm.events WHERE length(raw) = 4}), 'fffe0001', 'exactly');

# The id is signed, so that it verifies only if its bytes arrive as they were sent.
foreach ([ 'a"b\\c/d', 'quotes and backslashes' ], [ "a\tb", 'a tab' ], [ "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 'UTF-8' ],
	[ "\x7f\\u0041\\n", 'what looks like an escape' ], [ '{"a":1}', 'JSON' ])
{
	my $event = event(uuid(), 'sent');

	$answer = $receiver->post($event, [ signed($event, id => $_->[0]) ]);
	is($answer->{status}, 200, "a header with $_->[1] reaches the database unchanged");
}
foreach ([ "\xe9", 'Latin-1' ], [ "\xc0\xaf", 'an overlong form' ], [ "\xed\xa0\x80", 'a surrogate' ], [ "\xf4\x90\x80\x80", 'too large a code point' ],
	[ "ab\xe2\x82", 'half a character' ])
{
	my $event = event(uuid(), 'sent');

	$answer = $receiver->post($event, [ signed($event, id => $_->[0]) ]);
	is($answer->{status}, 400, "a header with $_->[1] is refused");
}
is($receiver->deliver(event(uuid(), 'read'), headers => []), 200, 'and the receiver goes on');
{
	my $event = event(uuid(), 'sent');

	$answer = $receiver->post($event, [ signed($event), 'X-City' => "M\xfcnchen", 'Cookie' => "\xff" ]);
	is($answer->{status}, 200, 'headers that do not concern the database may be anything');
	$answer = $receiver->post($event, [ signed($event), 'x-webhook-id' => 'other' ]);
	is($answer->{status}, 400, 'a webhook header that is there twice is refused');
	is(decode_json($answer->{body})->{error}, 'a header is there more than once', 'with the reason');
}

# Events that were answered 200, new or not.
sub accepted
{
	return $receiver->metric('events_accepted_total') + $receiver->metric('events_duplicate_total');
}

# Health

my ($status, $health) = $receiver->get('/health');

is($status, 200, '/health is 200');
$health = decode_json($health);
is($health->{status}, 'healthy', 'and says so');
like($health->{timestamp}, qr/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/, 'with a time');
like($health->{version}, qr/^\d+\.\d+/, 'and a version');
is_deeply([ sort keys %{ $health->{services} } ], [ 'database', 'sent_dm' ], 'and both services');
is($health->{services}{database}, 'connected', 'of which the database is connected');
is_deeply([ ($receiver->get('/health/ready'))[ 0, 1 ] ], [ 200, qq({"status": "ready"}\n) ], '/health/ready is 200');
is_deeply([ ($receiver->get('/health/live'))[ 0, 1 ] ], [ 200, qq({"status": "alive"}\n) ], '/health/live is 200');
is(($receiver->get('/health', 'POST'))[0], 405, 'only GET is possible');
is(($receiver->get('/other'))[0], 404, 'and nothing else is there');
is(($receiver->get('/webhooks/sent'))[0], 404, 'nor the webhook');

# Metrics

{
	my ($code, $text, $headers) = $receiver->get('/metrics');
	my (%type, @bad);

	is($headers->{'content-type'}, 'text/plain; version=0.0.4; charset=utf-8', '/metrics is in the text format of Prometheus');
	foreach (split /\n/, $text)
	{
		if (/^# TYPE (\w+) (counter|gauge|histogram)$/) { $type{$1} = $2 }
		elsif (/^(\w+?)(?:_bucket|_sum|_count)?(?:\{\w+="(?:[^"\\]|\\.)*"(?:,\w+="(?:[^"\\]|\\.)*")*\})? [\d.e+-]+$/)
		{
			my $name = $1;
			push @bad, $_ unless $type{$name} || $type{ (split /[ {]/)[0] };
		}
		elsif (!/^# HELP \w+ .+$/) { push @bad, $_ }
	}
	count_is(\@bad, 0, 'every line of it is well formed and described');
	my $events = $t->sql('SELECT count(*) + sum(duplicates) FROM sentdm.events');

	# An answer may be read before it is counted.  6 are not in the table any longer.
	wait_until { accepted() == $events + 6 } 'all are counted';
	pass('what was accepted is counted');
	is($receiver->metric('request_seconds_bucket{le="+Inf"}'), $receiver->metric('request_seconds_count'), 'histograms add up');
}

# One event that cannot be stored, and its neighbours

$t->sql('TRUNCATE sentdm.events, sentdm.deliveries');
my $poison = uuid();

$t->sql(<<"SQL");
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	RAISE EXCEPTION 'not this one' USING ERRCODE = TG_ARGV[0];
END \$\$;
CREATE TRIGGER refuse BEFORE INSERT ON sentdm.events FOR EACH ROW
	WHEN (NEW.sent_id = '$poison') EXECUTE FUNCTION refuse('P0001');
-- Without ALWAYS the event would be stored without the trigger.
ALTER TABLE sentdm.events ENABLE ALWAYS TRIGGER refuse;
SQL

# Events in one batch: while the table is locked they all come together.
sub deliver_together
{
	my (@bodies) = @_;
	my $session = $t->session;
	my @sockets = map { $receiver->connect } @bodies;
	my $received = $receiver->metric('requests_received_total');

	$session->query_safe('BEGIN; LOCK TABLE sentdm.events;');
	$receiver->log_position;
	foreach my $i (0 .. $#bodies)
	{
		$sockets[$i]->print(request('POST', '/webhooks/sent',
			[ 'Content-Type' => 'application/json', 'Content-Length' => length $bodies[$i], signed($bodies[$i]) ], $bodies[$i]));
		$sockets[$i]->flush;
		# The first one occupies the database, the others gather behind it.
		wait_until { $receiver->metric('requests_received_total') > $received + $i } 'the event was received';
	}
	$session->query_safe('COMMIT');
	$session->quit;
	return map { (read_answer($_) || {})->{status} } @sockets;
}

my @together = map { event($_, 'sent') } map({ uuid() } 1 .. 20), $poison, map({ uuid() } 1 .. 20);
my @statuses = deliver_together(@together);

is(join(',', @statuses), join(',', (200) x 20, 503, (200) x 20), 'an event that cannot be stored is 503, and its neighbours 200');
is($t->sql('SELECT count(*) FROM sentdm.events'), 40, 'and what was answered 200 is stored, and nothing else');
$receiver->metric_becomes('requests_unavailable_total{reason="database_error"}', 1, 'which is counted');

# After the rows, the commit can still fail.
$t->sql(<<"SQL");
DROP TRIGGER refuse ON sentdm.events;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON sentdm.events DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
	WHEN (NEW.sent_id = '$poison') EXECUTE FUNCTION refuse('P0001');
SQL
is($receiver->deliver(event($poison, 'sent')), 503, 'an event whose commit fails is not answered 200');
is($t->sql("SELECT count(*) FROM sentdm.events WHERE sent_id = '$poison'"), 0, 'for it is not stored');
$t->sql('DROP TRIGGER refuse ON sentdm.events');

# A deadlock, or a conflict, is nobody's fault.
$t->sql(<<"SQL");
CREATE SEQUENCE attempts;
GRANT USAGE ON SEQUENCE attempts TO PUBLIC;
CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
	IF nextval('public.attempts') < 3 THEN
		RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01';
	END IF;
	RETURN NEW;
END \$\$;
CREATE TRIGGER fail_once BEFORE INSERT ON sentdm.events FOR EACH ROW EXECUTE FUNCTION fail_once();
SQL
is($receiver->deliver(event($poison, 'sent')), 200, 'a transaction that lost a deadlock is tried again');
is($t->sql("SELECT last_value FROM attempts"), 3, 'as often as needed');
$t->sql('DROP TRIGGER fail_once ON sentdm.events');

# Durable, whatever the settings are

$t->sql(<<'SQL');
ALTER ROLE receiver SET synchronous_commit = off;
CREATE TABLE settings (name text, value text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
	INSERT INTO public.settings SELECT name, setting FROM pg_settings WHERE name IN ('synchronous_commit', 'statement_timeout');
	RETURN NEW;
END $$;
CREATE TRIGGER note BEFORE INSERT ON sentdm.events FOR EACH ROW EXECUTE FUNCTION note();
SQL
$t->sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'receiver'});
$receiver->metric_becomes('database_connects_total', 2, 'a connection that was ended is made again');
$receiver->wait_until_ready;
is($receiver->deliver(event(uuid(), 'sent')), 200, 'and used');
is($t->sql('SELECT * FROM settings ORDER BY name'), "statement_timeout|5000\nsynchronous_commit|on",
	'an acknowledged event survives a crash although the role says that it need not');
$t->sql('DROP TRIGGER note ON sentdm.events; ALTER ROLE receiver RESET synchronous_commit');

# The extension is created again, elsewhere

$t->sql('DROP EXTENSION sentdm CASCADE; CREATE SCHEMA "Other One"; CREATE EXTENSION sentdm SCHEMA "Other One"');
$t->sql(qq{GRANT USAGE ON SCHEMA "Other One" TO receiver; SET search_path = "Other One"; SELECT sentdm_grant('receiver', 'webhook'), sentdm_set_webhook_secret('$secret')});
wait_until { $receiver->deliver(event(uuid(), 'sent')) == 200 } 'an event is stored again';
pass('an extension that moved to another schema is found');
$receiver->wait_until_ready;

# An encoding that does not have every character

$t->sql(q{CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'});
$t->sql(qq{CREATE EXTENSION sentdm; SELECT sentdm_grant('receiver', 'webhook'), sentdm_set_webhook_secret('$secret')}, 'latin');
{
	my $latin = SentdmReceiver->new($t->node, environment => { PGDATABASE => 'latin' });
	my $event = event(uuid(), 'sent');
	my $other = event(uuid(), 'sent');

	is($latin->post($event, [ signed($event, id => "\xe3\x81\x82") ])->{status}, 400, 'a header that the encoding does not have is refused');
	is($latin->deliver($other), 200, 'and other events are not');
	is($t->sql('SELECT count(*) FROM sentdm.events', 'latin'), 1, 'and stored');
	$latin->stops_cleanly;
}

# Ten thousand messages, in any order, signed by somebody else

my $messages = $ENV{SENTDM_TEST_MESSAGES} || 10_000;
my $modules = $ENV{SENTDM_NODE_MODULES};

SKIP:
{
	skip 'the npm package standardwebhooks cannot be had here', 4 unless $modules;

	my @steps = qw(queued routed sent delivered);
	my (@events, %last);

	foreach my $n (1 .. $messages)
	{
		my $message_id = uuid();
		my $steps = 1 + int rand @steps;

		foreach my $step (0 .. $steps - 1)
		{
			my $event = event($message_id, $steps[$step], sprintf '2026-09-14T16:11:%02dZ', 10 + $step);

			push @events, $event;
			push @events, $event if rand() < 0.1;
		}
		$last{$message_id} = $steps[ $steps - 1 ];
	}
	@events = shuffle @events;

	my $accepted = accepted();
	my $input = join "\n", @events;
	my $output;

	$t->sql('TRUNCATE sentdm.events, sentdm.deliveries');
	local $ENV{NODE_PATH} = $modules;
	ok(IPC::Run::run([ 'node', "$FindBin::Bin/webhook_sender.js", $receiver->{port}, 64, $secret, $webhook_id ],
			'<', \$input, '>', \$output), 'events signed by another implementation are sent');
	is($output, '{"200":' . @events . "}\n", 'each of ' . @events . ' is answered 200');
	is($t->sql('SELECT count(*) + sum(duplicates) FROM sentdm.events'), scalar @events, 'and stored or counted as a duplicate');
	is_deeply({ split /[|\n]/, $t->sql('SELECT sent_id, status FROM sentdm.deliveries') }, \%last,
		"the status of each of $messages messages is its last one");
	wait_until { accepted() == $accepted + @events } 'all are counted';
	pass('and all are in the metrics');
}

$receiver->metric_becomes('connections', 0, 'no connection is left');
$receiver->metric_becomes('queue_bytes', 0, 'no memory is left reserved');
$receiver->metric_becomes('log_lines_lost_total', 0, 'no line of the log was lost');
$receiver->stops_cleanly;
$t->stops_cleanly;
done_testing();
