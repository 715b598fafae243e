# The worker dies, fails or stands still at each step of its protocol: every
# message is accepted exactly once, and nothing leaves before its claim is durable.
#
# Needs a server with the library that "make failpoints" builds; its programs are
# in $SENTDM_FAILPOINT_BIN.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;

BEGIN
{
	die "SENTDM_FAILPOINT_BIN is not set" unless $ENV{SENTDM_FAILPOINT_BIN};
	$ENV{PATH} = "$ENV{SENTDM_FAILPOINT_BIN}:$ENV{PATH}";
}
use SentdmChecker;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('failpoints', settings => { log_statement => 'none', 'sentdm.request_timeout' => '60s' });
my $wanted = $t->node->data_dir . '/sentdm.failpoint';
my $reached = "$wanted.reached";
# It stands still inside of transactions, on purpose.
my $checker = SentdmChecker->new($t, sample => 0);
my $number = 0;
my $victim;	# the worker that is to be killed

# What is claimed together.  The session may be ended by what that leads to.
sub send_some
{
	my ($count) = @_;
	my ($first, $last) = ($number + 1, $number + $count);

	$number = $last;
	eval { $t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x') FROM generate_series($first, $last) n") };
	return;
}

# The worker is to do this at the next place of this name.
sub arm
{
	my ($place, $action) = @_;

	unlink $reached;
	$victim = $t->worker_pid || 0;
	open my $file, '>', "$wanted.new" or die "could not write $wanted: $!";
	print $file "$place $action\n";
	close $file;
	rename "$wanted.new", $wanted or die "could not rename $wanted: $!";
	return;
}

sub is_reached
{
	my ($place) = @_;

	wait_until { -e $reached } "the worker comes to $place";
	return;
}

sub release
{
	unlink $reached or die "could not remove $reached: $!";
	return;
}

sub ends_well
{
	my ($name, %expected) = @_;
	my $summary;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->outbox_drains("$name: the queue empties");
	unlink $reached;
	$checker->holds('...');
	$summary = $t->summary;
	is($summary->{replays}, $expected{replays}, '... Sent was asked again as often as it must') if defined $expected{replays};
	is($summary->{requests}, $expected{requests}, '... in so many requests') if defined $expected{requests};
	is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages"), 'accepted', '... and all is accepted');
	$t->reset_standin;
	$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
	return;
}

# The server starts anew when a process of it is killed.
sub is_killed
{
	$t->expect_crashes(1);
	wait_until { eval { ($t->worker_pid || $victim) != $victim } } 'the server is up again, with a worker';
	return;
}

sub taken_over
{
	my ($position) = @_;

	return join ',', $t->log_since($position) =~ /took over (\d+) requests/g;
}

send_some(3);
ends_well('without a failpoint', requests => 3, replays => 0);

# Before the claim is committed nothing has happened.

my $position = $t->log_position;
arm('before-claim-commit', 'kill');
send_some(3);
is_reached('before-claim-commit');
is($t->summary->{requests}, 0, 'a worker that dies before its claim is committed has sent nothing');
is_killed();
ends_well('killed before the claim is committed', requests => 3, replays => 0);
is(taken_over($position), '', '... and nobody had to take over anything');

arm('before-claim-commit', 'error');
send_some(3);
is_reached('before-claim-commit');
ends_well('a claim that fails', requests => 3, replays => 0);

arm('before-claim-commit', 'pause');
send_some(3);
is_reached('before-claim-commit');
stays_true { $t->summary->{requests} == 0 } 0.3, 'while the claim is not committed nothing is sent';
is($t->sql('SELECT count(*) FROM sentdm.outbox WHERE claimed_at IS NULL'), 3, '... and no claim is to be seen');
release();
ends_well('a slow claim', requests => 3, replays => 0);

# After that the claim survives everything, and nothing has been sent yet.

$position = $t->log_position;
arm('after-claim-commit', 'kill');
send_some(3);
is_reached('after-claim-commit');
is($t->summary->{requests}, 0, 'a worker that dies between claim and request has sent nothing');
is_killed();
ends_well('killed after the claim', requests => 3, replays => 0);
is(taken_over($position), 3, '... and the next worker took over what was claimed');

$position = $t->log_position;
arm('after-claim-commit', 'error');
send_some(3);
is_reached('after-claim-commit');
ends_well('an error after the claim', requests => 3, replays => 0);
is(taken_over($position), 3, '... and the next worker took over what was claimed');

$position = $t->log_position;
arm('after-claim-commit', 'pause');
send_some(3);
is_reached('after-claim-commit');
is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.status"), 'sending', 'what is claimed shows as sending');
is($t->sql('SELECT bool_or(sentdm_cancel(id)) FROM sentdm.messages'), 'f', '... and cannot be cancelled any more');
is($t->sql('SELECT xact_start IS NULL AND backend_xmin IS NULL FROM sentdm.stat_worker JOIN pg_stat_activity USING (pid)'), 't',
	'... while the worker is in no transaction');
$t->node->stop('immediate');
unlink $reached;
$t->node->start;
ends_well('the server crashed between claim and request', requests => 3, replays => 0);
is(taken_over($position), 3, '... and the claim was on disk');

# The request is with Sent, the answer is not here yet.

foreach my $action ('kill', 'error')
{
	$position = $t->log_position;
	$t->faults({ action => 'hang', accept => JSON::PP::true, times => 3 });
	send_some(3);
	wait_until { $t->summary->{accepted_requests} == 3 } 'Sent has accepted it';
	arm('under-way', $action);
	kill 'USR1', $victim;	# a worker that sleeps looks up
	is_reached('under-way');
	is_killed() if $action eq 'kill';
	ends_well("$action while requests are under way", requests => 6, replays => 3);
	is(taken_over($position), 3, '... and the next worker took them over');
}

$t->configure_standin(latency_ms => 300);
send_some(3);
wait_until { $t->summary->{requests} == 3 } 'requests are under way';
arm('under-way', 'pause');
kill 'USR1', $victim;
is_reached('under-way');
wait_until { $t->summary->{pending} == 0 } 'Sent has answered';
is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.status"), 'sending', 'answers that nobody has read yet change nothing');
release();
ends_well('a worker that stands still', requests => 3, replays => 0);

# The outcome is not stored yet.

$position = $t->log_position;
arm('before-settle-commit', 'kill');
send_some(3);
is_reached('before-settle-commit');
is_killed();
ends_well('killed before the outcome is stored');
cmp_ok(taken_over($position), '>', 0, '... and the next worker asked again');

$position = $t->log_position;
arm('before-settle-commit', 'error');
send_some(3);
is_reached('before-settle-commit');
ends_well('an outcome that cannot be stored at first', requests => 3, replays => 0);
is($t->count_in_log(qr/sentdm worker could not write to the database and tries again in 100 ms/, $position), 1,
	'... which the log says');

arm('before-settle-commit', 'pause');
send_some(1);
is_reached('before-settle-commit');
send_some(3);
stays_true { $t->summary->{requests} == 1 } 0.3, 'while an outcome is being stored nothing new is sent';
release();
ends_well('a slow settling', requests => 4, replays => 0);

# It is stored, though perhaps not on disk.

foreach my $action ('kill', 'error')
{
	arm('after-settle-commit', $action);
	send_some(1);
	is_reached('after-settle-commit');
	is_killed() if $action eq 'kill';
	ends_well("$action after the outcome is stored", $action eq 'error' ? (requests => 1, replays => 0) : ());
}

$checker->stop;
$t->stops_cleanly;

done_testing();
