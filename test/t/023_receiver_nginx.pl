# The ways into the database that docs/webhooks.md describes are true: its recipes
# for nginx, PostgREST and an application are taken from there as they are, and work.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IO::Socket::INET;
use IPC::Run;
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('ways', enable => 0);
my $page = slurp_file("$FindBin::Bin/../../docs/webhooks.md");
my %running;

SentdmReceiver->prepare($t);

END
{
	my $exit_code = $?;

	end_process($_) foreach keys %running;
	$? = $exit_code;
}

# The block that follows <!-- recipe: name -->.
sub recipe
{
	my ($name) = @_;

	$page =~ /^<!-- recipe: \Q$name\E -->\n```\w+\n(.*?)^```$/ms || die "there is no recipe $name";
	return $1;
}

sub start_process
{
	my ($log, @command) = @_;
	my $pid = fork;

	die "could not fork: $!" unless defined $pid;
	if ($pid == 0)
	{
		open STDIN, '<', '/dev/null';
		open STDOUT, '>>', $log;
		open STDERR, '>&', \*STDOUT;
		exec @command or POSIX::_exit(127);
	}
	$running{$pid} = 1;
	return $pid;
}

sub end_process
{
	my ($pid) = @_;

	delete $running{$pid};
	kill 'TERM', $pid;
	waitpid $pid, 0;
	return;
}

sub free_port
{
	my $socket = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1', LocalPort => 0);

	return $socket->sockport;
}

sub wait_for_port
{
	my ($port) = @_;

	wait_until { IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port) } "something listens on $port";
	return;
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

my ($nginx) = grep { -x } map { "$_/nginx" } split(/:/, $ENV{PATH}), '/usr/sbin', '/usr/local/sbin';

SKIP:
{
	skip 'nginx is not installed', 1 unless $nginx;

	my $receiver = SentdmReceiver->new($t->node, options => { 'trusted-proxies' => '127.0.0.1' });
	my $prefix = PostgreSQL::Test::Utils::tempdir();
	my $port = free_port();
	my $server = recipe('nginx');

	# Only what a test cannot have: port 443, a certificate.
	is($server =~ s/server 127\.0\.0\.1:8480;/server 127.0.0.1:$receiver->{port};/, 1, 'the recipe names the address of the receiver');
	is($server =~ s/listen 443 ssl;/listen 127.0.0.1:$port;/, 1, 'and listens for https');
	$server =~ s/^ +ssl_certificate.*\n//mg;
	append_to_file("$prefix/nginx.conf", <<"CONF");
daemon off;
worker_processes 1;
pid $prefix/nginx.pid;
error_log $prefix/error.log;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path $prefix/body;
    proxy_temp_path $prefix/proxy;
    fastcgi_temp_path $prefix/fastcgi;
    uwsgi_temp_path $prefix/uwsgi;
    scgi_temp_path $prefix/scgi;
$server
}
CONF
	my $pid = start_process("$prefix/out.log", $nginx, '-p', $prefix, '-c', "$prefix/nginx.conf", '-e', "$prefix/error.log");

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

# PostgREST: what it does with POST /rpc/sent, as far as the database can see

$t->sql('CREATE ROLE web_anon NOLOGIN; CREATE ROLE authenticator LOGIN NOINHERIT; GRANT web_anon TO authenticator');
$t->sql(recipe('postgrest'));

# Answers with the status and the body of the response; undef: the function raised.
sub postgrest
{
	my ($body, %headers) = @_;
	my $headers = JSON::PP->new->utf8->canonical->encode({ map { lc $_ => $headers{$_} } keys %headers });
	my $quoted = $body =~ s/'/''/gr;
	my $sql = <<"SQL";
BEGIN;
SELECT set_config('search_path', '"webhooks", "public"', true), set_config('role', 'web_anon', true),
	set_config('request.jwt.claims', '{"role":"web_anon"}', true), set_config('request.method', 'POST', true),
	set_config('request.path', '/rpc/sent', true), set_config('request.headers', '$headers', true),
	set_config('request.cookies', '{}', true) \\g /dev/null
PREPARE call(json) AS WITH pgrst_source AS (SELECT "webhooks"."sent"(\$1) pgrst_scalar)
	SELECT pgrst_scalar, nullif(current_setting('response.status', true), '') FROM pgrst_source;
EXECUTE call('$quoted');
SELECT nullif(current_setting('response.status', true), '');
COMMIT;
SQL
	my ($code, $out, $error) = $t->node->psql('postgres', $sql, connstr => $t->node->connstr('postgres') . ' user=authenticator');

	return undef unless $code == 0;
	my ($answer, $status) = split /\n/, $out;
	return { status => $status, body => decode_json((split /\|/, $answer)[0]) };
}

{
	my $message_id = uuid();
	# Spaces, an escape and an order of keys that jsonb would not keep.
	my $body = event($message_id, 'delivered') =~ s/:/ :  /gr =~ s/sms/\\u0073ms/r;
	my $answer = postgrest($body, signed($body), 'content-type' => 'application/json');

	is($answer->{status}, 200, 'PostgREST: an event is 200');
	is_deeply($answer->{body}, { received => JSON::PP::true }, 'with the body that Sent documents');
	is(stored($message_id), 1, 'and stored');
	$answer = postgrest($body, signed("$body "));
	is($answer->{status}, 401, 'one with a wrong signature is 401');
	is_deeply($answer->{body}, { error => 'wrong signature' }, 'with the reason');
	$answer = postgrest($body);
	is($answer->{status}, 401, 'and one without any');
	my ($code) = $t->node->psql('postgres', 'SET ROLE web_anon; SELECT * FROM sentdm.events');
	isnt($code, 0, 'and the role can do nothing else');
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

# Any application: the program

SKIP:
{
	my $prefix = PostgreSQL::Test::Utils::tempdir();
	my $modules = $ENV{SENTDM_NODE_MODULES};
	my $output;

	if (!$modules && eval {
			IPC::Run::run([ 'npm', 'install', '--prefix', $prefix, '--cache', "$prefix/cache", '--no-audit', '--no-fund', 'pg@8' ],
				'<', \undef, '>&', \$output, IPC::Run::timeout(120)) })
	{
		$modules = "$prefix/node_modules";
	}
	skip 'the npm package pg cannot be had here', 1 unless $modules && -d "$modules/pg";

	my $port = free_port();

	append_to_file("$prefix/server.js", recipe('node'));
	my $pid = do
	{
		local %ENV = (%ENV, NODE_PATH => $modules, PORT => $port, PGHOST => $t->node->host, PGPORT => $t->node->port,
			PGUSER => 'receiver', PGDATABASE => 'postgres');
		start_process("$prefix/out.log", 'node', "$prefix/server.js");
	};

	wait_for_port($port);
	my $message_id = uuid();
	my $body = event($message_id, 'delivered');

	is(post_to($port, '/', $body, signed($body))->{status}, 200, 'the example for Node answers 200');
	is(stored($message_id), 1, 'and stores');
	is(post_to($port, '/', $body, signed("$body "))->{status}, 401, 'it refuses what is not authentic');
	$t->node->stop('fast');
	is(post_to($port, '/', $body, signed($body))->{status}, 503, 'and is not there without a database');
	$t->node->start;
	end_process($pid);
}

$t->stops_cleanly;
done_testing();
