# Whoever is killed and whenever: every message that is in the database after it
# all is accepted exactly once, and Sent got no other.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $t = SentdmTest->new('crash', settings => { 'sentdm.max_in_flight' => 16 });
my $number = 0;

$t->sql(<<'SQL');
CREATE PROCEDURE load(first int, last int) LANGUAGE plpgsql AS $$
BEGIN
	FOR n IN first .. last LOOP
		PERFORM sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x');
		COMMIT;
	END LOOP;
END $$;
SQL

# Start a session that sends as fast as it can, and return when enough of it is
# on its way.  The API takes its time, so that there is always something in hand.
sub start_load
{
	my ($messages, $setting) = @_;
	my $session = $t->session;
	my ($first, $last) = ($number + 1, $number + $messages);
	my $before = $t->summary->{requests};

	$number = $last;
	$t->configure_standin(latency_ms => 20);
	$session->query_until(qr/started/, ($setting || '') . "\n\\echo started\nCALL load($first, $last);\n");
	wait_until { $t->summary->{requests} > $before + 100 } 'the load is under way';
	return $session;
}

sub end_session
{
	my ($session) = @_;

	# Its connection may be gone, and psql with it.
	eval { $session->quit };
	return;
}

sub wait_for_server
{
	wait_until { $t->node->psql('postgres', 'SELECT') == 0 } 'the server is up again';
	return;
}

sub wait_for_worker
{
	return wait_until { $t->worker_pid } 'a worker runs';
}

# As the system does it when memory runs out: the server restarts all processes.
sub kill_worker
{
	my $pid = wait_for_worker();

	kill 'KILL', $pid;
	$t->expect_crashes(1);
	wait_until { !kill(0, $pid) } 'the worker is dead';
	wait_for_server();
	return;
}

sub exactly_once
{
	my ($name) = @_;
	my @sent;
	my @kept;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->configure_standin(latency_ms => 0);
	$t->outbox_drains("$name: the queue empties");
	is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages"), 'accepted',
		'... every message is accepted');
	@kept = split /\n/, $t->sql("SELECT request #>> '{to,0}' FROM sentdm.messages ORDER BY 1");
	@sent = sort map { $_->{to} } $t->effects;
	is_deeply(\@sent, \@kept, '... exactly once, and nothing else was (' . scalar(@sent) . ')');
	$t->accepted_once('... under one key each');
	is($t->sql('SELECT count(*) FROM sentdm.messages LEFT JOIN sentdm.deliveries ON message_id = id WHERE sent_id IS NULL'), 0,
		'... and every delivery is known');

	# For the next one.
	my $summary = $t->summary;
	$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
	$t->reset_standin;
	return $summary;
}

# Of the worker

my $position = $t->log_position;
foreach my $round (1 .. 2)
{
	my $session = start_load(1500);

	kill_worker();
	end_session($session);
	my $summary = exactly_once("the worker was killed, round $round");
	is($t->count_in_log(qr/sentdm worker took over [1-9]\d* requests/, $position), $round,
		'... after the next worker took over what it had in hand');
	cmp_ok($summary->{requests}, '>', $summary->{accepted_requests}, '... and asked again with the same keys');
}

my $session = start_load(1500);
my $pid = wait_for_worker();
is($t->sql("SELECT pg_terminate_backend($pid)"), 't', 'the worker can be terminated');
$t->becomes("SELECT pid <> $pid FROM sentdm.stat_worker", 't', '... and another one takes its place');
end_session($session);
exactly_once('the worker was terminated');

# Of the launcher

$position = $t->log_position;
$session = start_load(1500);
$pid = wait_for_worker();
my $launcher = $t->sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'sentdm launcher'");
is($t->sql("SELECT pg_terminate_backend($launcher)"), 't', 'the launcher can be terminated');
$t->becomes("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'sentdm launcher' AND pid <> $launcher", 1,
	'... and another one takes its place');
is($t->worker_pid, $pid, '... while the worker goes on');
end_session($session);
exactly_once('the launcher was terminated');

# The new launcher has never seen this worker start.
$t->set('sentdm.idle_timeout' => '100ms');
$t->becomes('SELECT pid IS NULL FROM sentdm.stat_worker', 't', 'when it has nothing to do, the worker leaves');
$number++;
my $began = Time::HiRes::time();
my $id = $t->send(sprintf q{'+1555%07d', body => 'x'}, $number);
$t->all_become('accepted', "id = '$id'", 'a message is sent after that');
my $seconds = Time::HiRes::time() - $began;
cmp_ok($seconds, '<', 1.5, sprintf '... without waiting (%.1f s)', $seconds);
exactly_once('the launcher was terminated and the worker left');
is($t->count_in_log(qr/background worker "sentdm worker" \(PID \d+\) exited with exit code 1/, $position), 0,
	'... and no second worker was started beside the first');
$t->set('sentdm.idle_timeout' => undef);

# Of the server

$session = start_load(1500);
$t->configure_standin(latency_ms => 500);
$t->node->stop('fast');
end_session($session);
is($t->summary->{pending}, 0, 'a fast shutdown waits for the answers that are under way');
$t->node->start;
is(exactly_once('the server was shut down fast')->{replays}, 0, '... and no request had to be repeated for it');

$number++;
$t->faults({ action => 'hang', match => { to => sprintf('+1555%07d', $number) } });
$t->set('sentdm.request_timeout' => '60s');
$t->send(sprintf q{'+1555%07d', body => 'x'}, $number);
wait_until { $t->summary->{faults}{hang} } 'a request hangs';
$began = Time::HiRes::time();
$t->node->stop('fast');
$seconds = Time::HiRes::time() - $began;
cmp_ok($seconds, '<', 8, sprintf 'a fast shutdown does not wait for an answer that does not come (%.1f s)', $seconds);
$t->node->start;
exactly_once('the server was shut down while a request hung');

# Workers that end in order do not make a message suspect of killing them.
{
	$number++;
	my $id = $t->send(sprintf q{'+1555%07d', body => 'x'}, $number);

	$t->all_become('accepted', "id = '$id'", 'a worker runs');
	$number++;
	$t->faults({ action => 'hang', times => -1, match => { to => sprintf('+1555%07d', $number) } });
	$id = $t->send(sprintf q{'+1555%07d', body => 'x'}, $number);
	foreach my $turn (1 .. 3)
	{
		wait_until { ($t->summary->{faults}{hang} || 0) >= $turn } 'a request hangs';
		my $pid = $t->worker_pid;

		$t->sql("SELECT pg_terminate_backend($pid, 60000)");
	}
	wait_until { $t->summary->{faults}{hang} > 3 } 'and once more';
	is($t->sql("SELECT crashes FROM sentdm.outbox WHERE message_id = '$id'"), 0, 'who was asked to end has not crashed');
	is($t->sql("BEGIN; SELECT sentdm_cancel('$id'); SELECT mode FROM pg_locks WHERE relation = 'sentdm.outbox'::regclass AND pid = pg_backend_pid(); COMMIT"),
		"f\nAccessShareLock", 'to try to cancel what the worker has locks nothing');
	$t->faults();
	$t->node->stop('fast');
	$t->node->start;
	exactly_once('workers were asked to end while a request hung');
}
$t->set('sentdm.request_timeout' => undef);

foreach my $setting ('SET synchronous_commit = on;', 'SET synchronous_commit = off;')
{
	# Nobody but the claims is to save what is committed without waiting.
	$t->set(wal_writer_delay => '10s', wal_writer_flush_after => '1GB');
	$session = start_load(1500, $setting);
	$t->node->stop('immediate');
	end_session($session);
	$t->node->start;
	exactly_once("the server crashed, with $setting");
}
$t->set(wal_writer_delay => undef, wal_writer_flush_after => undef);

# A message that kills the worker

$number++;
my $deadly = sprintf '+1555%07d', $number;
$t->faults({ action => 'hang', times => -1, match => { to => $deadly } });
$id = $t->send("'$deadly', body => 'x'");
my @bystanders = map { $t->send(sprintf q{'+1555%07d', body => 'x', tag => 'bystander'}, ++$number) } 1 .. 3;
foreach my $crash (1 .. 3)
{
	wait_until { ($t->summary->{faults}{hang} || 0) >= $crash } 'it is in hand';
	kill_worker();
}
$t->all_become('failed', "id = '$id'", 'a message that is in hand whenever the worker dies is given up');
is($t->sql("SELECT error_code, error FROM sentdm.messages WHERE id = '$id'"), 'worker_crash|the worker died each time that it was sent',
	'... and says so');
$t->all_become('accepted', "tag = 'bystander'", '... and does no harm to others');
$t->faults();
is($t->sql("SELECT sentdm_retry('$id')"), 't', '... and can be sent again');
exactly_once('a message killed the worker');

$t->stops_cleanly;

done_testing();
