# SentdmTest.pm
#		A PostgreSQL server that has sentdm preloaded, beside a stand-in for the
#		Sent API, for one test file.
#
# To be run by a user that PostgreSQL runs under (not root), in a directory that
# it may write to, with the extension installed:
#
#	export PATH=$(pg_config --bindir):$PATH
#	prove -I $(dirname $(pg_config --pgxs))/../test/perl -I test/t test/t/*.pl
#
# Nothing else has to be set: PG_REGRESS (wanted by PostgreSQL::Test::Cluster to
# write pg_hba.conf) is derived from pg_config ($PG_CONFIG) below, and data
# directories and logs go to ./tmp_check, or to $TESTDIR/tmp_check when TESTDIR is
# set; from PostgreSQL 16 on TESTDATADIR and TESTLOGDIR say where, as absolute
# paths.  What a failed test leaves there has to be removed before it runs again.
# PG_TEST_TIMEOUT_DEFAULT (seconds, default 180) bounds every wait;
# PG_TEST_NOCLEAN=1 keeps the data directories.  Needed besides PostgreSQL's own
# test modules: IPC::Run, python3.
#
# This file must not decide anything about sentdm: it starts, stops, asks and
# waits.  There is one place that waits, poll().
package SentdmTest;

use strict;
use warnings;

use Cwd qw(abs_path);
use Exporter 'import';
use File::Basename qw(basename dirname);
use HTTP::Tiny;
use IO::Socket::INET;
use JSON::PP;
use POSIX ();
use Time::HiRes qw(usleep);

BEGIN
{
	if (!$ENV{PG_REGRESS})
	{
		my $pg_config = $ENV{PG_CONFIG} || 'pg_config';
		my $pgxs = qx($pg_config --pgxs);

		chomp $pgxs;
		$ENV{PG_REGRESS} = dirname($pgxs) . '/../test/regress/pg_regress';
	}

	# They would be defaults of the server's settings.
	delete @ENV{qw(SENT_DM_API_KEY SENT_DM_BASE_URL SENT_DM_WEBHOOK_SECRET)};
}

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(wait_until wait_for_port stays_true count_is distinct start_process end_process start_nginx make_certificate free_port
  start_as node_becomes);

my $directory = dirname(abs_path(__FILE__));
my $json = JSON::PP->new->utf8->canonical;
my $name = basename($0, '.pl');
my %processes;	# processes to be ended with the test: pid => 1

# Fast enough for a test, and nothing limited that a test does not limit itself.
my %defaults = (
	'sentdm.allow_insecure_http' => 'on',
	'sentdm.api_key' => 'a-key-for-tests-0123456789',
	'sentdm.rate_limit' => 'off',
	'sentdm.retry_min' => '20ms',
	'sentdm.retry_max' => '200ms',
	'sentdm.connect_timeout' => '1s',
	'sentdm.request_timeout' => '5s');

# Ended from outside, a test ends what it started, too.
$SIG{$_} = sub { exit 1 } foreach qw(HUP INT TERM);

# Before the nodes of PostgreSQL::Test::Cluster are torn down, whatever happened.
END
{
	my $exit_code = $?;

	end_process($_) foreach keys %processes;
	$? = $exit_code;
}

# Start a program, which is ended with the test; returns its pid.
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
	$processes{$pid} = 1;
	return $pid;
}

sub end_process
{
	my ($pid) = @_;

	delete $processes{$pid};
	kill 'TERM', $pid;
	waitpid $pid, 0;
	return;
}

# A port of the loopback address that nobody listens on.
sub free_port
{
	my $socket = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1') or die "no port: $!";

	return $socket->sockport;
}

# A certificate for 127.0.0.1 that vouches for itself: its file and that of its key.
sub make_certificate
{
	my $directory = abs_path(PostgreSQL::Test::Utils::tempdir());
	my @files = ("$directory/server.crt", "$directory/server.key");

	PostgreSQL::Test::Utils::system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2',
		'-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', $files[1], '-out', $files[0]);
	return @files;
}

# Start nginx with this in its block "http"; returns its pid and its directory.
sub start_nginx
{
	my ($http) = @_;
	my ($nginx) = grep { -x } map { "$_/nginx" } split(/:/, $ENV{PATH}), '/usr/sbin', '/usr/local/sbin';
	my $prefix = abs_path(PostgreSQL::Test::Utils::tempdir());

	die 'nginx is not installed' unless $nginx;
	PostgreSQL::Test::Utils::append_to_file("$prefix/nginx.conf", <<"CONF");
daemon off;
worker_processes 1;
pid $prefix/nginx.pid;
error_log $prefix/error.log;
events { worker_connections 1024; }
http {
    client_body_temp_path $prefix/body;
    proxy_temp_path $prefix/proxy;
    fastcgi_temp_path $prefix/fastcgi;
    uwsgi_temp_path $prefix/uwsgi;
    scgi_temp_path $prefix/scgi;
    log_format requests '\$server_protocol \$connection \$msec \$request_time';
    access_log $prefix/requests.log requests;
$http
}
CONF
	return (start_process("$prefix/out.log", $nginx, '-p', $prefix, '-c', "$prefix/nginx.conf", '-e', "$prefix/error.log"), $prefix);
}

# Start a server, under a cluster_name that is not its own: the members of one cluster
# have the same, while the test module gives each server another.
sub start_as
{
	my ($node, $cluster_name) = @_;
	local $node->{_name} = $cluster_name;

	$node->start;
	return;
}

# Ask again and again, for some seconds, until the answer is true; returns it.
sub poll
{
	my ($seconds, $condition) = @_;
	my $deadline = Time::HiRes::time() + $seconds;

	while (1)
	{
		my $answer = $condition->();

		return $answer if $answer || Time::HiRes::time() > $deadline;
		usleep(10_000);
	}
}

# Wait until the block returns something true, and return that; die after the time
# that any test may take.
sub wait_until (&$)
{
	my ($condition, $what) = @_;

	return poll($PostgreSQL::Test::Utils::timeout_default, $condition)
	  || die "timed out waiting until $what";
}

sub wait_for_port
{
	my ($port) = @_;

	wait_until { IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port) } "something listens on $port";
	return;
}

# That a block stays true for a while, as a test: what must not happen gets time
# to happen.
sub stays_true (&$$)
{
	my ($condition, $seconds, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(!poll($seconds, sub { !$condition->() }), $name);
}

# The number of elements, for messages that say what is wrong when it is.
sub count_is
{
	my ($list, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is(scalar(@$list), $expected, $name)
	  or diag($json->encode([ @$list[ 0 .. ($#$list > 9 ? 9 : $#$list) ] ]));
	return;
}

# The distinct values in order; in scalar context, how many.
sub distinct
{
	my %seen = map { $_ => 1 } @_;
	my @values = sort keys %seen;

	return @values;
}

# A server and a stand-in, both running, with sending enabled in "postgres".
# settings: of the server; standin: options of the stand-in; enable: 0 leaves the
# database alone.
sub new
{
	my ($class, $name, %params) = @_;
	my $self = bless { settings => { %defaults, %{ $params{settings} || {} } } }, $class;

	$self->{http} = HTTP::Tiny->new(timeout => 60);
	$self->{standin_options} = $params{standin} || [];
	$self->start_standin;

	my $node = PostgreSQL::Test::Cluster->new($name);

	$self->{node} = $node;
	$node->init(extra => [ '--encoding=UTF8', '--locale=C' ], %{ $params{init} || {} });
	$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'sentdm'
restart_after_crash = on
max_prepared_transactions = 5
include 'sentdm.conf'
CONF
	$self->write_settings;
	$node->start;
	$self->sql('CREATE EXTENSION sentdm');
	$self->sql('SELECT sentdm_enable()') unless defined $params{enable} && !$params{enable};
	return $self;
}

# The server

sub node
{
	my ($self) = @_;

	return $self->{node};
}

sub write_settings
{
	my ($self) = @_;
	my %settings = ('sentdm.base_url' => $self->url, %{ $self->{settings} });
	my $path = $self->node->data_dir . '/sentdm.conf';

	open my $file, '>', $path or die "could not write $path: $!";
	print $file map { "$_ = '$settings{$_}'\n" } grep { defined $settings{$_} } sort keys %settings;
	close $file;
	return;
}

# Change settings in the configuration file and have the server read it; undef
# takes one out.  Other processes may act on it a moment later.
sub set
{
	my ($self, %changes) = @_;
	my $before = $self->sql('SELECT pg_conf_load_time()');

	$self->{settings} = { %{ $self->{settings} }, %changes };
	$self->write_settings;
	$self->node->reload;
	wait_until { $self->sql('SELECT pg_conf_load_time()') ne $before } 'the configuration was read';
	return;
}

sub sql
{
	my ($self, $query, $database) = @_;

	return $self->node->safe_psql($database || 'postgres', $query);
}

# The error message of a statement that must fail.
sub sql_error
{
	my ($self, $query, $database) = @_;
	my ($code, $out, $error) =
	  $self->node->psql($database || 'postgres', "\\set VERBOSITY verbose\n$query");

	return $code == 0 ? "no error, but: $out" : $error;
}

sub session
{
	my ($self, $database) = @_;

	return $self->node->background_psql($database || 'postgres', on_error_stop => 0);
}

# Enqueue one message with the arguments given as SQL; returns its id.
sub send
{
	my ($self, $arguments, $database) = @_;

	return $self->sql("SELECT sentdm_send($arguments)", $database);
}

# Wait until a query gives the expected result, as a test; of some server, or of this.
sub node_becomes
{
	my ($node, $query, $expected, $name, $database) = @_;
	my $result;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	eval {
		wait_until { ($result = $node->safe_psql($database || 'postgres', $query)) eq $expected } $name;
	};
	is($result, $expected, $name);
	return;
}

sub becomes
{
	my ($self, @arguments) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	node_becomes($self->node, @arguments);
	return;
}

# Wait until messages are in a state, as a test; where: which messages.
sub all_become
{
	my ($self, $state, $where, $name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$self->becomes("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages WHERE $where",
		$state, $name, $database);
	return;
}

sub outbox_drains
{
	my ($self, $name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$self->becomes('SELECT count(*) FROM sentdm.outbox', 0, $name, $database);
	return;
}

# The process of the worker of a database; undef: none runs.
sub worker_pid
{
	my ($self, $database) = @_;

	return $self->sql('SELECT pid FROM sentdm.stat_worker', $database) || undef;
}

sub log_position
{
	my ($self) = @_;

	return -s $self->node->logfile;
}

# What the server wrote to its log, from a position on.
sub log_since
{
	my ($self, $position) = @_;

	return slurp_file($self->node->logfile, $position);
}

sub count_in_log
{
	my ($self, $pattern, $position) = @_;
	my @matches = $self->log_since($position || 0) =~ /$pattern/g;

	return scalar @matches;
}

# Both orderly, as the last test of a file.
sub stops_cleanly
{
	my ($self) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok($self->node->stop('fast'), 'the server shuts down');
	my @trouble = grep { !/terminating background worker/ }
	  $self->log_since(0) =~ /^.*(?:(?:PANIC|TRAP):|was terminated by signal).*$/mg;
	count_is(\@trouble, $self->{crashes} || 0, 'no process of the server crashed, except those that were killed');
	$self->stop_standin;
	return;
}

# How many processes the test kills itself.
sub expect_crashes
{
	my ($self, $crashes) = @_;

	$self->{crashes} += $crashes;
	return;
}

# The stand-in

sub start_standin
{
	my ($self, @options) = @_;
	my $log = "$PostgreSQL::Test::Utils::log_path/standin_$name.log";
	my $ready = PostgreSQL::Test::Utils::tempdir() . '/ready';
	my @command = (
		'python3', "$directory/../standin.py", '--port', $self->{port} || 0,
		'--lifecycle', 'off', '--ready-file', $ready,
		@{ $self->{standin_options} }, @options);
	my $pid = start_process($log, @command);

	$self->{standin_pid} = $pid;
	wait_until
	{
		die "the stand-in ended, see $log" if waitpid($pid, POSIX::WNOHANG()) != 0;
		-s $ready
	}
	'the stand-in listens';
	chomp($self->{port} = slurp_file($ready));
	return;
}

sub stop_standin
{
	my ($self) = @_;

	end_process(delete $self->{standin_pid}) if $self->{standin_pid};
	return;
}

sub url
{
	my ($self) = @_;

	return "http://127.0.0.1:$self->{port}";
}

# One call of the stand-in's control plane; the body is a Perl structure.
sub control
{
	my ($self, $method, $path, $body) = @_;
	my $answer = $self->{http}->request($method, $self->url . "/_control/$path",
		defined $body ? { content => $json->encode($body), headers => { 'content-type' => 'application/json' } } : {});

	die "$method $path: $answer->{status} $answer->{content}" unless $answer->{success};
	return $json->decode($answer->{content});
}

# Every message request that arrived, as a list of hashes; after: so many are left out.
sub arrived
{
	my ($self, $after) = @_;

	return @{ $self->control('GET', 'ledger?after=' . ($after || 0))->{entries} };
}

# That for a while so many message requests have arrived and no more, as a test.
sub requests_stay
{
	my ($self, $expected, $seconds, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	stays_true { $self->summary->{requests} == $expected } $seconds, $name
	  or diag(map { $json->encode($_) . "\n" } ($self->arrived)[ -5 .. -1 ]);
	return;
}

# What was accepted and was not a replay: a list of hashes, one per recipient and channel.
sub effects
{
	my ($self, $after) = @_;

	return @{ $self->control('GET', 'ledger?after=' . ($after || 0))->{effects} };
}

# The whole ledger as a file of JSON, for PostgreSQL to read; returns its path.
sub save_ledger
{
	my ($self) = @_;
	my $path = PostgreSQL::Test::Utils::tempdir() . '/ledger.json';
	my $answer = $self->{http}->mirror($self->url . '/_control/ledger', $path);

	die "ledger: $answer->{status}" unless $answer->{success};
	return abs_path($path);
}

sub summary
{
	my ($self) = @_;

	return $self->control('GET', 'ledger/summary');
}

# The last POST, with headers and the body as it came.
sub last_request
{
	my ($self) = @_;
	my $request = $self->control('GET', 'requests/last');

	$request->{json} = JSON::PP->new->decode($request->{body}) if $request;
	return $request;
}

# Replace the list of faults; see ACTIONS in standin.py.
sub faults
{
	my ($self, @faults) = @_;

	$self->control('POST', 'faults', \@faults);
	return;
}

sub configure_standin
{
	my ($self, %changes) = @_;

	$self->control('POST', 'config', \%changes);
	return;
}

sub reset_standin
{
	my ($self) = @_;

	$self->control('POST', 'reset', {});
	return;
}

# The keys of the numbers that arrived, as evidence that nothing else did.
sub arrived_numbers
{
	my ($self) = @_;

	return distinct(map { @{ $_->{to} } } $self->arrived);
}

# Nothing may have been accepted twice, and no key used for two requests.
sub accepted_once
{
	my ($self, $name) = @_;
	my $summary = $self->summary;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is_deeply(
		{ map { $_ => $summary->{$_} } qw(max_effects_per_key duplicate keyless) },
		{ max_effects_per_key => $summary->{accepted_requests} ? 1 : 0, duplicate => 0, keyless => 0 },
		$name);
	return;
}

1;
