# The ways into the database that docs/webhooks.md describes are true: its recipes
# for nginx, PostgREST and an application are taken from there as they are, and work.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IO::Socket::INET;
use JSON::PP;
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('ways', enable => 0);
my $page = slurp_file("$FindBin::Bin/../../docs/webhooks.md");

SentdmReceiver->prepare($t);

# The block that follows <!-- recipe: name -->.
sub recipe
{
	my ($name) = @_;

	$page =~ /^<!-- recipe: \Q$name\E -->\n```\w+\n(.*?)^```$/ms || die "there is no recipe $name";
	return $1;
}

# A POST through something else than the receiver itself.
sub post_to
{
	my ($port, $path, $body, @headers) = @_;
	my $client = bless { port => $port }, 'SentdmReceiver';
	# Another address than that of the proxy, which the receiver trusts.
	my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, LocalAddr => '127.0.0.2')
	  || die "could not connect: $!";

	return $client->post($body, \@headers, path => $path, socket => $socket);
}

sub stored
{
	my ($message_id) = @_;

	return $t->sql("SELECT count(*) FROM sentdm.events WHERE sent_id = '$message_id'");
}

# nginx

{
	my $receiver = SentdmReceiver->new($t->node, options => { 'trusted-proxies' => '127.0.0.1' });
	my $port = free_port();
	my $server = recipe('nginx');

	# Only what a test cannot have: port 443, a certificate.
	is($server =~ s/server 127\.0\.0\.1:8480;/server 127.0.0.1:$receiver->{port};/, 1, 'the recipe names the address of the receiver');
	is($server =~ s/listen 443 ssl;/listen 127.0.0.1:$port;/, 1, 'and listens for https');
	$server =~ s/^ +ssl_certificate.*\n//mg;

	my ($pid) = start_nginx($server);

	wait_for_port($port);
	my $message_id = uuid();
	my $body = event($message_id, 'delivered');
	my $position = $receiver->log_position;
	my $answer = post_to($port, '/webhooks/sent', $body, signed($body), 'X-Forwarded-For' => '6.6.6.6');

	is($answer->{status}, 200, 'an event that comes through nginx is answered 200');
	is($answer->{body}, '{"received": true}', 'by the receiver');
	is(stored($message_id), 1, 'and stored');
	$receiver->log_becomes(qr/client=127\.0\.0\.2 id=[0-9a-f]{32} .*status=200/, $position, 'under the request id that nginx gave it');
	unlike($receiver->log_since($position), qr/6\.6\.6\.6/, 'and not under an address that the sender gave itself');
	$answer = post_to($port, '/webhooks/sent', $body, signed("$body "));
	is($answer->{status}, 401, 'so do refusals');

	$body = '"' . ('a' x (1024 * 1024 - 2)) . '"';
	is(post_to($port, '/webhooks/sent', $body, signed($body))->{status}, 200, 'a body of 1 MiB goes through');
	$body = '"' . ("\xff\x00\r\n" x 50_000) . '"';
	is(post_to($port, '/webhooks/sent', $body, signed($body))->{status}, 200, 'and any bytes, unchanged');
	is($t->sql('SELECT count(*) FROM sentdm.events WHERE length(raw) = 200002'), 1, 'all of them');
	$body = 'a' x (1024 * 1024 + 1);
	is(post_to($port, '/webhooks/sent', $body, signed($body))->{status}, 413, 'more is refused');
	is(post_to($port, $_, '', ())->{status}, 404, "$_ is not there for everybody") foreach '/health', '/metrics', '/', '/webhooks/sent/';

	# Many, on connections that are kept.
	my $accepted = $receiver->metric('connections_accepted_total');
	my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port);
	my $client = bless { port => $port }, 'SentdmReceiver';
	my @ids = map { uuid() } 1 .. 200;

	is(scalar(grep { $client->deliver(event($_, 'sent'), socket => $socket) == 200 } @ids), 200, 'two hundred events go through');
	cmp_ok($receiver->metric('connections_accepted_total') - $accepted, '<', 100, 'and not each on a connection of its own');

	$receiver->signal('TERM');
	is($receiver->wait_for_end, 0, 'the receiver ends');
	$body = event(uuid(), 'sent');
	cmp_ok(post_to($port, '/webhooks/sent', $body, signed($body))->{status}, '>=', 500, 'without it nginx answers 5xx, so that Sent tries again');
	$receiver->start;
	wait_until { post_to($port, '/webhooks/sent', $body, signed($body))->{status} == 200 } 'it is back';
	pass('when it is back, events go through again');
	end_process($pid);
	$receiver->stops_cleanly;
}

my $modules = $ENV{SENTDM_NODE_MODULES};

# Start a program that finds its database as a user; returns its pid when it listens.
sub start_application
{
	my ($user, $port, @command) = @_;
	my $log = "$PostgreSQL::Test::Utils::log_path/" . ($command[1] =~ s,.*/,,r) . "_023_receiver_nginx_$user.log";

	local %ENV = (%ENV, PORT => $port, PGHOST => $t->node->host, PGPORT => $t->node->port,
		PGUSER => $user, PGDATABASE => 'postgres');
	local $ENV{NODE_PATH} = $modules if $modules;
	my $pid = start_process($log, @command);

	wait_for_port($port);
	return $pid;
}

# What every way in has to do; path: where it takes webhooks.
sub takes_webhooks
{
	my ($name, $port, $path) = @_;
	my $message_id = uuid();
	# Spaces, an escape and an order of keys that neither JSON.stringify nor jsonb would keep.
	my $body = event($message_id, 'delivered') =~ s/:/ :  /gr =~ s/sms/\\u0073m\xc3\xa4s/r;
	my @json = ('Content-Type' => 'application/json');
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is(post_to($port, $path, $body, @json, signed($body))->{status}, 200, "$name: an event is 200");
	is(stored($message_id), 1, 'and stored');
	is($t->sql("SELECT duplicates, channel FROM sentdm.events JOIN sentdm.deliveries USING (sent_id) WHERE sent_id = '$message_id'"),
		"0|sm\xc3\xa4s", 'and applied');
	is(post_to($port, $path, $body, @json, signed($body))->{status}, 200, 'again it is 200');
	is($t->sql("SELECT duplicates FROM sentdm.events WHERE sent_id = '$message_id'"), 1, 'and counted');
	is(post_to($port, $path, $body, @json, signed("$body "))->{status}, 401, 'one with a wrong signature is 401');
	is(post_to($port, $path, $body, @json)->{status}, 401, 'and one without any');

	# The deliveries cannot be committed, but the statement succeeds.
	$t->sql(q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$;
		CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON sentdm.events DEFERRABLE INITIALLY DEFERRED
			FOR EACH ROW EXECUTE FUNCTION refuse()});
	$body = event(uuid(), 'delivered');
	isnt(post_to($port, $path, $body, @json, signed($body))->{status}, 200, 'one whose commit fails is not 200');
	$t->sql('DROP TRIGGER refuse ON sentdm.events; DROP FUNCTION refuse()');
	$t->node->stop('fast');
	is(post_to($port, $path, $body, @json, signed($body))->{status}, 503, 'nor is one without a database');
	$t->node->start;
	wait_until { post_to($port, $path, $body, @json, signed($body))->{status} == 200 } "$name works again";
	is($t->sql("SELECT count(*) FROM sentdm.events WHERE sent_id = '" . decode_json($body)->{payload}{message_id} . "'"),
		1, 'when the database is back, it is stored');
	return;
}

# PostgREST

$t->sql('CREATE ROLE web_anon NOLOGIN; CREATE ROLE authenticator LOGIN NOINHERIT; GRANT web_anon TO authenticator');
$t->sql(recipe('postgrest'));

SKIP:
{
	skip 'the npm package pg cannot be had here', 1 unless $modules;

	my $port = free_port();
	my $pid = start_application('authenticator', $port, 'node', "$FindBin::Bin/postgrest.js", $port, 'webhooks', 'web_anon');
	my $body = event(uuid(), 'sent');

	takes_webhooks('PostgREST', $port, '/rpc/sent');
	is(post_to($port, '/rpc/sent', $body, signed($body))->{body}, '{"received": true}', 'with the body that Sent documents');
	is_deeply(decode_json(post_to($port, '/rpc/sent', $body, signed("$body "))->{body}), { error => 'wrong signature' }, 'or the reason');
	$body = 'no JSON';
	is(post_to($port, '/rpc/sent', $body, signed($body))->{status}, 400, 'what is not JSON does not get through');
	foreach my $query ('SELECT 1 FROM sentdm.events', 'SELECT 1 FROM sentdm.webhook_secrets', q{SELECT sentdm_send('+14155550123', body => 'x')})
	{
		my ($code) = $t->node->psql('postgres', "SET ROLE web_anon; $query");
		isnt($code, 0, "its role cannot $query");
	}
	end_process($pid);
}

# Any application: the statement

{
	my $message_id = uuid();
	my $body = event($message_id, 'delivered');
	my $headers = encode_json({ signed($body), Host => 'example.com' });
	my $hex = unpack 'H*', $body;

	is($t->sql('PREPARE call AS ' . recipe('sql') . "; EXECUTE call('\\x$hex', '$headers')"), '200|', 'the statement answers 200');
	is(stored($message_id), 1, 'and stores');
}

# Any application: the programs

my $programs = PostgreSQL::Test::Utils::tempdir();

SKIP:
{
	skip 'the npm package pg cannot be had here', 1 unless $modules;

	my $port = free_port();

	append_to_file("$programs/server.js", recipe('node'));
	my $pid = start_application('receiver', $port, 'node', "$programs/server.js");

	takes_webhooks('Node', $port, '/');
	end_process($pid);
}

my ($python) = grep { system("$_ -c 'import psycopg2' 2>/dev/null") == 0 } '/usr/bin/python3', 'python3';

SKIP:
{
	skip 'psycopg2 is not installed', 1 unless $python;

	my $port = free_port();

	append_to_file("$programs/application.py", recipe('python') . <<'PY');

from wsgiref.simple_server import ServerHandler, make_server
ServerHandler.http_version = '1.1'
make_server('127.0.0.1', int(os.environ['PORT']), application).serve_forever()
PY
	my $pid = start_application('receiver', $port, $python, "$programs/application.py");

	takes_webhooks('Python', $port, '/');
	end_process($pid);
}

$t->stops_cleanly;
done_testing();
