# SentdmReceiver.pm
#		A sentdm-receiver that runs for one test file, and clients for it.
#
# The program is build/sentdm-receiver, or $SENTDM_RECEIVER;
# $SENTDM_RECEIVER_WRAPPER is a command to run it under (valgrind, for instance),
# and $SENTDM_TEST_SLOWNESS (default 1) a factor for the times that tests measure.
#
# Requests are written byte by byte here, without a library that would mend them,
# and signed by Perl's own SHA-256: nothing is shared with what is tested.
package SentdmReceiver;

use strict;
use warnings;

use Cwd qw(abs_path);
use Digest::SHA qw(hmac_sha256);
use Exporter 'import';
use File::Basename qw(basename dirname);
use IO::Select;
use IO::Socket::INET;
use JSON::PP;
use MIME::Base64 qw(decode_base64 encode_base64);
use POSIX ();
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;
use Time::HiRes;

our @EXPORT = qw($secret $webhook_id $slowness event sign signed request read_answer uuid);

our $secret = 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=';
our $webhook_id = 'd4f5a6b7-c8d9-4e0f-a1b2-c3d4e5f6a7b8';
our $slowness = $ENV{SENTDM_TEST_SLOWNESS} || 1;

my $directory = dirname(abs_path(__FILE__));
my $program = $ENV{SENTDM_RECEIVER} || "$directory/../../build/sentdm-receiver";
my @wrapper = split ' ', $ENV{SENTDM_RECEIVER_WRAPPER} || '';
my $json = JSON::PP->new->utf8->canonical;
my $started = 0;
my %running;

END
{
	my $exit_code = $?;

	foreach my $pid (keys %running)
	{
		kill 'KILL', $pid;
		waitpid $pid, 0;
	}
	$? = $exit_code;
}

# The program

sub program { return (@wrapper, $program) }

# Run it to its end; returns exit code, standard output and error.
sub run
{
	my ($class, @arguments) = @_;
	my ($out, $error) = ('', '');

	IPC::Run::run([ $class->program, @arguments ], '<', \undef, '>', \$out, '2>', \$error);
	return ($? >> 8, $out, $error);
}

# Start it on the database "postgres" of a server.  options: its flags without
# "--"; environment: variables; wait: 0 returns before it has the database.
sub new
{
	my ($class, $node, %params) = @_;
	my $self = bless { node => $node, %params }, $class;

	$self->{log} = sprintf '%s/receiver_%s_%d.log', $PostgreSQL::Test::Utils::log_path, basename($0, '.pl'), ++$started;
	$self->{options} = {
		'listen' => '127.0.0.1:0', 'health-listen' => '127.0.0.1:0', %{ $params{options} || {} }
	};
	$self->{environment} = {
		PGHOST => $node->host, PGPORT => $node->port, PGDATABASE => 'postgres', PGUSER => 'receiver',
		%{ $params{environment} || {} }
	};
	$self->start;
	return $self;
}

sub start
{
	my ($self) = @_;
	my $position = -s $self->{log} || 0;
	my @command = ($self->program, map { "--$_=$self->{options}{$_}" } sort keys %{ $self->{options} });
	my $pid = fork;

	die "could not fork: $!" unless defined $pid;
	if ($pid == 0)
	{
		%ENV = (%ENV, %{ $self->{environment} });
		open STDIN, '<', '/dev/null';
		open STDOUT, '>>', $self->{log};
		open STDERR, '>>', $self->{log};
		exec @command or POSIX::_exit(127);
	}
	$running{$pid} = 1;
	$self->{pid} = $pid;
	wait_until
	{
		die "the receiver ended with status $?: " . slurp_file($self->{log}, $position) if waitpid($pid, POSIX::WNOHANG()) != 0;
		-s $self->{log}
		  && slurp_file($self->{log}, $position) =~ m{listens on \S+?:(\d+)/\S*, health on \S+?:(\d+)\n}
		  && (($self->{port}, $self->{health_port}) = ($1, $2))
	}
	'the receiver listens';
	# The same ports again, after a restart.
	$self->{options}{'listen'} = "127.0.0.1:$self->{port}";
	$self->{options}{'health-listen'} = "127.0.0.1:$self->{health_port}";
	$self->wait_until_ready unless defined $self->{wait} && !$self->{wait};
	return;
}

sub wait_until_ready
{
	my ($self) = @_;

	wait_until { ($self->get('/health/ready'))[0] == 200 } 'the receiver is ready';
	return;
}

sub signal
{
	my ($self, $signal) = @_;

	kill $signal, $self->{pid};
	return;
}

# The exit status as of wait(): 0 is a clean end.
sub wait_for_end
{
	my ($self) = @_;
	my $pid = delete $self->{pid};
	my $ended;

	wait_until { ($ended = waitpid($pid, POSIX::WNOHANG())) != 0 } 'the receiver ended';
	my $status = $?;

	delete $running{$pid};
	return $status;
}

# As the last test with it: an orderly end, and nothing in the log from a sanitizer
# or valgrind.
sub stops_cleanly
{
	my ($self) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$self->signal('TERM');
	is($self->wait_for_end, 0, 'the receiver ends with status 0');
	unlike($self->log_since(0), qr/Sanitizer|runtime error|ERROR SUMMARY: [1-9]/, 'and has no memory error');
	return;
}

sub log_position { my ($self) = @_; return -s $self->{log} }
sub log_since { my ($self, $position) = @_; return slurp_file($self->{log}, $position) }

sub log_becomes
{
	my ($self, $pattern, $position, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	eval { wait_until { $self->log_since($position) =~ $pattern } $name };
	like($self->log_since($position), $pattern, $name);
	return;
}

# Events and signatures

sub uuid
{
	return sprintf '%04x%04x-%04x-4%03x-a%03x-%04x%04x%04x', map { int rand $_ } 65536, 65536, 65536, 4096, 4096, 65536, 65536, 65536;
}

# One event as Sent posts it.
sub event
{
	my ($message_id, $status, $at) = @_;

	return $json->encode({
		field => 'message', event => 'message.' . lc $status, timestamp => '2026-09-14T16:11:50Z',
		payload => {
			account_id => '7ba7b820-9dad-11d1-80b4-00c04fd430c8', message_id => $message_id,
			message_status => uc $status, channel => 'sms', outbound_number => '+14155550123',
			updated_at => $at || '2026-09-14T16:11:49Z' } });
}

sub sign
{
	my ($body, $timestamp, $id) = @_;
	my $key = decode_base64(substr $secret, 6);

	return 'v1,' . encode_base64(hmac_sha256(($id || $webhook_id) . ".$timestamp.$body", $key), '');
}

# The headers of a signed request, as a list of names and values.
sub signed
{
	my ($body, %params) = @_;
	my $timestamp = $params{timestamp} || time;
	my $id = $params{id} || $webhook_id;

	return ('X-Webhook-ID' => $id, 'X-Webhook-Timestamp' => "$timestamp",
		'X-Webhook-Signature' => sign($body, $timestamp, $id));
}

# Requests and answers

# A request as bytes; headers is a list of names and values.
sub request
{
	my ($method, $path, $headers, $body) = @_;
	my @headers = @{ $headers || [] };
	my $text = "$method $path HTTP/1.1\r\nHost: receiver.test\r\n";

	while (my ($name, $value) = splice @headers, 0, 2)
	{
		$text .= "$name: $value\r\n";
	}
	return "$text\r\n" . (defined $body ? $body : '');
}

sub connect
{
	my ($self, $port) = @_;

	return IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port || $self->{port}, Timeout => 20)
	  || die "could not connect: $!";
}

# One answer: {status, headers (lower case), body}; undef when the connection ends
# first.  What follows it is kept with the socket for the next call.
sub read_answer
{
	my ($socket, $seconds) = @_;
	my $deadline = Time::HiRes::time() + ($seconds || 60) * $slowness;
	my $buffer = delete ${*$socket}{sentdm_left};

	$buffer = '' unless defined $buffer;
	while (1)
	{
		if ($buffer =~ /^HTTP\/1\.1 100 .*?\r\n\r\n(.*)$/s)
		{
			$buffer = $1;
			next;
		}
		if ($buffer =~ /^HTTP\/1\.1 (\d+) [^\r\n]*\r\n(.*?)\r\n\r\n(.*)$/s)
		{
			my ($status, $head, $rest) = ($1, $2, $3);
			my %headers = map { /^([^:]+):\s*(.*)$/ ? (lc $1 => $2) : () } split /\r\n/, $head;
			my $length = $headers{'content-length'} || 0;

			if (length $rest >= $length)
			{
				${*$socket}{sentdm_left} = substr $rest, $length;
				return { status => $status, headers => \%headers, body => substr($rest, 0, $length) };
			}
		}
		my $left_s = $deadline - Time::HiRes::time();

		return undef if $left_s <= 0;
		next unless IO::Select->new($socket)->can_read($left_s);	# also after a signal
		return undef unless sysread $socket, $buffer, 65536, length $buffer;
	}
}

# POST a body with headers to the webhook, on a connection of its own or on one
# given; the answer, or undef.
sub post
{
	my ($self, $body, $headers, %params) = @_;
	my $socket = $params{socket} || $self->connect;
	my @headers = ('Content-Type' => 'application/json', 'Content-Length' => length $body, @$headers);

	local $SIG{PIPE} = 'IGNORE';
	print $socket request('POST', $params{path} || '/webhooks/sent', \@headers, $body);
	$socket->flush;
	return read_answer($socket);
}

# A signed event, and the status of its answer.
sub deliver
{
	my ($self, $body, %params) = @_;
	my $answer = $self->post($body, [ signed($body) ], %params);

	return $answer ? $answer->{status} : 0;
}

# GET from the second listener: status, body, headers.
sub get
{
	my ($self, $path, $method) = @_;
	my $socket = $self->connect($self->{health_port});

	local $SIG{PIPE} = 'IGNORE';
	print $socket request($method || 'GET', $path, [ 'Connection' => 'close' ]);
	$socket->flush;
	my $answer = read_answer($socket) || return (0, '', {});
	return ($answer->{status}, $answer->{body}, $answer->{headers});
}

# One number from /metrics.
sub metric
{
	my ($self, $name) = @_;
	my ($status, $body) = $self->get('/metrics');

	return $body =~ /^sentdm_receiver_\Q$name\E (\S+)$/m ? $1 : undef;
}

sub metric_becomes
{
	my ($self, $metric, $expected, $name) = @_;
	my $value;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	eval {
		wait_until { defined($value = $self->metric($metric)) && $value == $expected } $name;
	};
	is($value, $expected, $name);
	return;
}

# The role that the receiver connects as, with no more than it needs, and a secret.
sub prepare
{
	my ($class, $t) = @_;

	$t->sql("CREATE ROLE receiver LOGIN");
	$t->sql("SELECT sentdm_grant('receiver', 'webhook')");
	$t->sql("SELECT sentdm_set_webhook_secret('$secret')");
	return;
}

1;
