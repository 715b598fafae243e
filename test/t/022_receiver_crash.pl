# Whoever is killed and whenever: an event is either answered 200 and stored, or not
# answered 200 and not stored; where nobody can know, it is not answered 200 either,
# and sent again it is stored once.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IO::Socket::INET;
use IO::Socket::UNIX;
use JSON::PP;
use POSIX ();
use Socket qw(SOCK_DGRAM);
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;
use Time::HiRes qw(time usleep);

my $t = SentdmTest->new('crash', enable => 0, init => { allows_streaming => 1 });

SentdmReceiver->prepare($t);

my $receiver = SentdmReceiver->new($t->node);
my $senders = 8;
my $directory = PostgreSQL::Test::Utils::tempdir();
my $round = 0;

# Senders, each a process with a connection of its own, that send events one after
# the other and write down what became of each: the status, with the reason of a
# 503, or 0 when no answer came.  An event is sent once.
sub start_senders
{
	my (@pids);

	$round++;
	foreach my $n (1 .. $senders)
	{
		my $pid = fork;

		die "could not fork: $!" unless defined $pid;
		if ($pid == 0)
		{
			srand;
			send_events("$directory/$round.$n");
			POSIX::_exit(0);
		}
		push @pids, $pid;
	}
	return @pids;
}

sub send_events
{
	my ($path) = @_;
	my ($socket, $stopped);

	open my $file, '>', $path or POSIX::_exit(1);
	$file->autoflush(1);
	local $SIG{TERM} = sub { $stopped = 1 };
	local $SIG{PIPE} = 'IGNORE';
	while (!$stopped)
	{
		my $message_id = uuid();
		my $body = event($message_id, 'sent');

		$socket ||= IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $receiver->{port}, Timeout => 5);
		if (!$socket)
		{
			# Nothing listens: not sent at all.
			usleep(20_000);
			next;
		}
		my $answer = $receiver->post($body, [ signed($body) ], socket => $socket);
		my $status = $answer ? $answer->{status} : 0;
		my $reason = $status == 503 ? decode_json($answer->{body})->{error} : '';

		print $file "$message_id|$status|$reason\n";
		undef $socket if !$answer || ($answer->{headers}{connection} || '') eq 'close';
	}
	return;
}

sub stop_senders
{
	my (@pids) = @_;

	kill 'TERM', @pids;
	waitpid $_, 0 foreach @pids;
	return map { map { [ split /\|/, $_, -1 ] } split /\n/, slurp_file("$directory/$round.$_") } 1 .. $senders;
}

sub stored
{
	return map { $_ => 1 } split /\n/, $t->sql('SELECT sent_id FROM sentdm.events');
}

sub accepted { return $receiver->metric('events_accepted_total') || 0 }

# Wait until some more events were accepted.
sub under_way
{
	my $before = accepted();

	wait_until { accepted() > $before + 50 * $senders / $slowness || accepted() < $before } 'events come in';
	return;
}

# The promise, for all events of a round; returns how many were answered how.
sub check_events
{
	my ($name, @events) = @_;
	my %stored = stored();
	my %count = map { $_ => 0 } 200, 0, 'unknown';
	my (@lost, @unanswered);

	foreach (@events)
	{
		my ($message_id, $status, $reason) = @$_;
		my $unknown = $status == 0 || $reason eq 'the database did not confirm it';

		push @lost, $_ if $status == 200 && !$stored{$message_id};
		push @unanswered, $_ if $status != 200 && !$unknown && $stored{$message_id};
		$count{$status}++;
		$count{unknown}++ if $unknown;
	}
	note("$name: " . join ', ', map { "$_: $count{$_}" } sort keys %count);
	count_is(\@lost, 0, "$name: every event of $count{200} that was answered 200 is stored");
	count_is(\@unanswered, 0, 'what was certainly refused is not stored');
	# Those in hand, and those that were sent before the connection was accepted.
	cmp_ok($count{unknown}, '<=', 8 * $senders, 'and of few it is not known');

	# As Sent does: again, until it is 200.
	foreach (grep { $_->[1] != 200 } @events)
	{
		my $body = event($_->[0], 'sent');

		is($receiver->deliver($body), 200, 'what was not answered 200 can be sent again') if $_ == $events[-1];
		wait_until { $receiver->deliver($body) == 200 } 'it is stored';
	}
	%stored = stored();
	count_is([ grep { !$stored{ $_->[0] } } @events ], 0, 'and then everything is stored');
	is($t->sql('SELECT count(*) - count(DISTINCT sent_id) FROM sentdm.events'), 0, 'once');
	return %count;
}

# The receiver dies

{
	my @pids = start_senders();

	foreach (1 .. 3)
	{
		under_way();
		$receiver->signal('KILL');
		$receiver->wait_for_end;
		$receiver->start;
	}
	under_way();
	check_events('kill -9 of the receiver', stop_senders(@pids));
}

# The server dies

{
	my @pids = start_senders();
	my %count;

	foreach (1 .. 3)
	{
		under_way();
		# One backend kills them all: the server recovers by itself.
		my $pid = $t->sql(q{SELECT pid FROM pg_stat_activity WHERE usename = 'receiver'});
		my $connects = $receiver->metric('database_connects_total');

		$t->expect_crashes(1);
		kill 'KILL', $pid;
		$receiver->metric_becomes('database_connects_total', $connects + 1, 'a server that crashed is connected to again');
	}
	under_way();
	check_events('kill -9 of the server', stop_senders(@pids));
}
{
	my @pids = start_senders();

	under_way();
	$t->node->stop('immediate');
	$receiver->metric_becomes('database_up', 0, 'a server that is gone is noticed');
	is(($receiver->get('/health/ready'))[0], 503, '/health/ready says so');
	my ($status, $body) = $receiver->get('/health');
	is($status, 503, '/health also');
	is(decode_json($body)->{services}{database}, 'disconnected', 'and what it is');
	is(($receiver->get('/health/live'))[0], 200, 'but the receiver lives');
	$t->node->start;
	$receiver->wait_until_ready;
	under_way();
	check_events('an immediate shutdown', stop_senders(@pids));
}

# A restart, which is shorter than anybody's patience

{
	my @pids = start_senders();
	my %count;

	under_way();
	$t->node->restart('fast');
	$receiver->wait_until_ready;
	under_way();
	%count = check_events('a restart of the server', stop_senders(@pids));
	is($count{0}, 0, 'all were answered');
	cmp_ok($count{503} || 0, '<=', $senders, 'and waited, except for those that were just being stored');
}
{
	my $connects = $receiver->metric('database_connects_total');

	$t->node->restart('fast');
	is($receiver->deliver(event(uuid(), 'sent')), 200, 'an event that comes first after a restart waits too');
	is($receiver->metric('database_connects_total'), $connects + 1, 'for the new connection');
}

# Everybody at once, at random

{
	my @pids = start_senders();

	foreach (1 .. 16)
	{
		# Also in the middle of what the one before has caused.
		under_way() if rand() < 0.6;
		if (rand() < 0.5)
		{
			$receiver->signal('KILL');
			$receiver->wait_for_end;
			$receiver->{wait} = 0;
			$receiver->start;
		}
		else
		{
			# While it recovers there is nobody to ask, nor to kill.
			my ($code, $pid) = $t->node->psql('postgres', q{SELECT pid FROM pg_stat_activity WHERE usename = 'receiver' LIMIT 1});

			next unless $code == 0 && $pid;
			$t->expect_crashes(1) if kill 'KILL', $pid;
		}
	}
	$receiver->wait_until_ready;
	under_way();
	my @events = stop_senders(@pids);
	my %stored = stored();

	count_is([ grep { $_->[1] == 200 && !$stored{ $_->[0] } } @events ], 0, 'whatever happens, what was answered 200 is stored');
}

# SIGTERM under load

{
	my @pids = start_senders();

	under_way();
	$receiver->signal('TERM');
	is($receiver->wait_for_end, 0, 'SIGTERM ends the receiver with status 0');
	my @events = stop_senders(@pids);
	my %stored = stored();

	count_is([ grep { $_->[1] == 200 && !$stored{ $_->[0] } } @events ], 0, 'all that was answered 200 is stored');
	count_is([ grep { $_->[1] != 200 && $stored{ $_->[0] } } @events ], 0, 'and all that is stored was answered 200');
}

# SIGTERM while the database is busy

# An event in the database, which holds it; others behind it.
sub hold
{
	my ($events) = @_;
	my $session = $t->session;
	my $received = $receiver->metric('requests_received_total');
	my @sockets;

	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	foreach (1 .. $events)
	{
		my $body = event(uuid(), 'sent');
		my $socket = $receiver->connect;

		print $socket request('POST', '/webhooks/sent',
			[ 'Content-Type' => 'application/json', 'Content-Length' => length $body, signed($body) ], $body);
		$socket->flush;
		push @sockets, $socket;
		wait_until { $receiver->metric('requests_received_total') == $received + @sockets } 'it was received';
	}
	return ($session, @sockets);
}

{
	my ($socket, $session, @sockets, $answer);

	$receiver->start;
	$receiver->wait_until_ready;
	$socket = $receiver->connect;
	($session, @sockets) = hold(5);
	my $position = $receiver->log_position;

	$receiver->signal('TERM');
	$receiver->log_becomes(qr/stopping: 5 requests under way/, $position, 'with events in hand it does not stop at once');
	is(($receiver->get('/health/ready'))[0], 503, 'but is not ready any longer');
	is(decode_json(($receiver->get('/health'))[1])->{status}, 'stopping', 'and says why');
	is(IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $receiver->{port}), undef, 'nobody can connect');
	$session->query_safe('COMMIT');
	$session->quit;
	foreach (@sockets)
	{
		$answer = read_answer($_);
		is($answer->{status}, 200, 'an event in hand is stored and answered');
		is($answer->{headers}{connection}, 'close', 'as the last one of its connection');
	}
	is($receiver->wait_for_end, 0, 'and then the receiver ends with status 0');
}
{
	my ($session, @sockets, $start);

	# Nothing but these times can end it: the database has much longer.
	$receiver->{options}{'drain-timeout'} = '1s';
	$receiver->{options}{'answer-timeout'} = '300s';
	$receiver->start;
	$receiver->wait_until_ready;
	($session, @sockets) = hold(3);
	$start = time;
	$receiver->signal('TERM');
	is(join(',', map { (read_answer($_) || { status => 'none' })->{status} } @sockets), '503,503,503',
		'events that the database does not take in time are 503');
	is($receiver->wait_for_end, 0, 'and the receiver ends with status 0');
	my $seconds = time - $start;
	# Not before its own time, and long before any other.
	ok($seconds >= 1 && $seconds < 15 * $slowness, 'in time') or diag("after $seconds s");
	$session->query_safe('ROLLBACK');
	$session->quit;
}
{
	my ($session, @sockets) = do { delete $receiver->{options}{'drain-timeout'}; $receiver->start; $receiver->wait_until_ready; hold(1) };
	my $start = time;

	$receiver->signal('TERM');
	wait_until { ($receiver->get('/health/ready'))[0] == 503 } 'it stops';
	$receiver->signal('TERM');
	is($receiver->wait_for_end, 0, 'asked twice, it ends at once');
	cmp_ok(time - $start, '<', 15 * $slowness, 'without waiting as long as it would');
	$session->quit;
}

# Without a server at all

{
	$receiver->{options}{'answer-timeout'} = (2 * $slowness) . 's';
	$t->node->stop('fast');
	$receiver->{wait} = 0;
	my $start = time;
	my $log = $receiver->log_position;
	$receiver->start;
	my $body = event(uuid(), 'sent');
	my $answer = $receiver->post($body, [ signed($body) ]);

	is($answer->{status}, 503, 'without a database an event is 503');
	is(decode_json($answer->{body})->{error}, 'the database cannot be reached', 'for a reason');
	like($answer->{headers}{'retry-after'}, qr/^\d+$/, 'to be sent again later');
	cmp_ok(time - $start, '>', 1 * $slowness, 'after some time, in which the database could have come back');
	wait_until { $start = time; $receiver->deliver($body) == 503 && time - $start < $slowness } 'nobody waits any longer';
	pass('when it is away for long, an event is 503 at once');
	is(() = $receiver->log_since($log) =~ /cannot use the database/g, 1, 'the log does not repeat itself');
	$t->node->start;
	$receiver->wait_until_ready;
	is($receiver->deliver($body), 200, 'when it is there, it is used');
	$receiver->stops_cleanly;
}

# The service manager

{
	my $path = "$directory/notify";
	my $socket = IO::Socket::UNIX->new(Type => SOCK_DGRAM, Local => $path) || die "could not listen: $!";
	my $managed = SentdmReceiver->new($t->node, environment => { NOTIFY_SOCKET => $path, WATCHDOG_USEC => 300_000 });
	my @messages;
	my $receive = sub { $socket->recv(my $message, 1000); push @messages, $message; return $message };

	like($receive->(), qr/^READY=1$/m, 'systemd is told when the receiver is ready');
	wait_until { scalar $receive->() =~ /^STATUS=receiving$/m } 'the status';
	pass('and when it has the database');
	wait_until { scalar $receive->() eq 'WATCHDOG=1' } 'the watchdog';
	pass('and that it lives');
	$managed->signal('TERM');
	wait_until { scalar $receive->() =~ /^STOPPING=1$/m } 'the stop';
	pass('and that it stops');
	is($managed->wait_for_end, 0, 'which it does');
	unlike($managed->log_since(0), qr/Sanitizer|runtime error|ERROR SUMMARY: [1-9]/, 'without a memory error');
}

# A standby takes over

{
	my $standby = PostgreSQL::Test::Cluster->new('standby');
	my $primary = $t->node;

	$primary->backup('backup');
	$standby->init_from_backup($primary, 'backup', has_streaming => 1);
	$standby->start;
	my $both = SentdmReceiver->new($primary, environment => {
			PGHOST => $standby->host . ',' . $primary->host, PGPORT => $standby->port . ',' . $primary->port });
	my $message_id = uuid();
	my $body = event($message_id, 'sent');

	is($both->deliver($body), 200, 'of two servers, the primary is used');
	$primary->wait_for_catchup($standby);
	$primary->stop('immediate');
	$standby->promote;
	is($both->deliver($body), 200, 'and the other one after it was promoted');
	is($standby->safe_psql('postgres', "SELECT duplicates FROM sentdm.events WHERE sent_id = '$message_id'"), 1, 'which has all');
	$both->stops_cleanly;
	$standby->stop('fast');
	$primary->start;
}

$t->stops_cleanly;
done_testing();
