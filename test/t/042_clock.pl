# The clock of the server's machine is set: forwards, backwards, by seconds and by
# a day.  A preloaded library (wall_clock.c) sets it for the real server and its
# worker.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmChecker;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('clock', settings => { log_statement => 'none', 'sentdm.request_timeout' => '2s' });
my $node = $t->node;
my $file = $node->basedir . '/clock';
my $library = $node->basedir . '/wall_clock.so';
my $checker = SentdmChecker->new($t, sample => 0);
my $number = 0;
my $offset_s = 0;

sub send_some
{
	my ($count, $arguments) = @_;
	my ($first, $last) = ($number + 1, $number + $count);

	$number = $last;
	return split /\n/, $t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x'" . ($arguments || '')
		  . ") FROM generate_series($first, $last) n");
}

# In place: the server has it mapped.
sub set_clock
{
	my ($seconds) = @_;

	$offset_s = $seconds;
	open my $handle, -e $file ? '+<' : '>', $file or die "could not write $file: $!";
	print $handle pack 'q', $seconds * 1_000_000;
	close $handle;
	return;
}

sub step_clock
{
	my ($seconds) = @_;

	set_clock($offset_s + $seconds);
	return;
}

sub ends_well
{
	my ($name, $states) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->faults();
	$t->outbox_drains("$name: the queue empties");
	$checker->holds('...');
	is($t->sql("SELECT string_agg(DISTINCT state, ',' ORDER BY state) FROM sentdm.messages"), $states || 'accepted',
		'... and the messages are ' . ($states || 'accepted'));
	$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
	$t->reset_standin;
	return;
}

PostgreSQL::Test::Utils::system_or_bail('gcc', '-O2', '-shared', '-fPIC', '-o', $library, "$FindBin::Bin/wall_clock.c", '-ldl');
set_clock(0);
{
	local %ENV = (%ENV, LD_PRELOAD => $library, WALL_CLOCK => $file);

	$node->restart;
}
step_clock(3600);
is($t->sql('SELECT abs(extract(epoch FROM clock_timestamp()) - ' . (time + 3600) . ') < 3'), 't', 'the clock of the server can be set');

foreach (7200, -3, 600, -30)
{
	my $seconds = $_;

	# Under way, waiting for another try, waiting for the rate, and new ones.
	$t->set('sentdm.rate_limit' => '30/second');
	$checker->{rate} = [ 30, 1, 0.3 ];
	$t->configure_standin(latency_ms => 100);
	$t->faults({ action => 'drop_after', times => 5 }, { action => 'status', code => 503, times => 5, match => { every => 3 } });
	send_some(40);
	wait_until { $t->summary->{requests} >= 10 } 'some are sent';
	step_clock($seconds);
	send_some(10);
	$t->sql('UPDATE sentdm.outbox SET due_at = now() WHERE due_at > now() AND claimed_at IS NULL') if $seconds == -30;
	ends_well("the clock is set by $seconds s");
	delete $checker->{rate};
	$t->set('sentdm.rate_limit' => 'off');
}

# Whether Sent remembers a key can only be told by the clock: so rather ask.
$t->faults({ action => 'drop_after', times => -1 });
my ($id) = send_some(1);
wait_until { $t->sql("SELECT ambiguous_since IS NOT NULL AND claimed_at IS NULL FROM sentdm.outbox") eq 't' } 'it is unknown what became of it';
step_clock(24 * 3600);
$t->all_become('uncertain', "id = '$id'", 'a day later by the clock a message with an unknown outcome is uncertain');
my $requests = $t->summary->{requests};
step_clock(-24 * 3600);
stays_true { $t->summary->{requests} == $requests } 0.5, '... and stays so when the clock is set back';
ends_well('... and', 'uncertain');

$checker->stop;
$t->stops_cleanly;

done_testing();
