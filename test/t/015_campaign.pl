# Campaigns: a tag's progress, and cancelling and retrying it while the worker
# sends.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('campaign', settings => { 'sentdm.max_in_flight' => 8 });
my $node = $t->node;

# The numbers of a tag's messages in a state.
sub numbers
{
	my ($tag, $state) = @_;

	return split /\n/, $t->sql("SELECT request -> 'to' ->> 0 FROM sentdm.messages WHERE tag = '$tag' AND state = '$state'");
}

sub eta_seconds
{
	my ($tag) = @_;

	return $t->sql("SELECT extract(epoch FROM eta - now()) FROM sentdm.progress WHERE tag = '$tag'");
}

sub is_about
{
	my ($value, $expected, $tolerance, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok($value ne '' && abs($value - $expected) <= $tolerance, $name)
	  or diag("got '$value', expected $expected within $tolerance");
	return;
}

# Cancelled in the middle of being sent: what is said to be cancelled never arrives

$t->configure_standin(latency_ms => 5);
$t->sql("SELECT sentdm_send('+1555' || n, body => 'x', tag => 'race') FROM generate_series(1000000, 1001999) n");
$t->sql("SELECT sentdm_send('+15559999999', body => 'x', tag => 'other', send_at => now() + interval '1 day')");
wait_until { $t->summary->{requests} > 100 } 'many were sent';
my $cancelled = $t->sql("SELECT sentdm_cancel_tag('race')");
$t->becomes("SELECT count(*) FROM sentdm.outbox WHERE message_id IN (SELECT id FROM sentdm.messages WHERE tag = 'race')", 0,
	'the rest is settled');
my %arrived = map { $_ => 1 } $t->arrived_numbers;
my @called_off = numbers('race', 'cancelled');
is(scalar(@called_off), $cancelled, 'sentdm_cancel_tag() says how many were cancelled');
count_is([ grep { $arrived{$_} } @called_off ], 0, '... and none of them arrives');
is(scalar(numbers('race', 'accepted')), 2000 - $cancelled, '... and all others were sent');
ok($cancelled > 0 && $cancelled < 1900, "... which are some ($cancelled of 2000 were cancelled)");
is($t->sql("SELECT total, queued, accepted, failed, cancelled, expired, uncertain, percent, eta FROM sentdm.progress WHERE tag = 'race'"),
	"2000|0|" . (2000 - $cancelled) . "|$cancelled|$cancelled|0|0|100.0|", '... as its progress says');
is($t->sql("SELECT state FROM sentdm.messages WHERE tag = 'other'"), 'queued', 'another tag is left alone');
is($t->sql("SELECT sentdm_cancel_tag('race')"), 0, 'nothing is cancelled twice');
is($t->sql("SELECT sentdm_cancel_tag('nobody')"), 0, '... nor what does not exist');

# Several at once, with the worker and each other: nobody waits in a circle

$t->configure_standin(latency_ms => 2);
$t->sql("SELECT sentdm_send('+1556' || n, body => 'x', tag => 't' || n % 5) FROM generate_series(1000000, 1001499) n");
my $position = $t->log_position;
my @sessions = map { $t->session } 0 .. 4;
foreach my $i (0 .. 4)
{
	$sessions[$i]->query_until(qr/begins/, "\\echo begins\nSELECT sentdm_cancel_tag('t' || (n + $i) % 5) FROM generate_series(1, 5) n;\n\\echo ended\n");
}
$t->becomes("SELECT count(*) FROM sentdm.outbox o JOIN sentdm.messages m ON m.id = o.message_id WHERE m.tag ~ '^t[0-4]'", 0,
	'five sessions cancel the same tags at once');
$_->quit foreach @sessions;
%arrived = map { $_ => 1 } $t->arrived_numbers;
is($t->count_in_log(qr/deadlock|could not write to the database/, $position), 0, '... and nobody is in the way of another');
count_is([ grep { $arrived{$_} } map { numbers("t$_", 'cancelled') } 0 .. 4 ], 0, '... and none of the cancelled arrives');
is($t->sql("SELECT string_agg(DISTINCT state, ',' ORDER BY state) FROM sentdm.messages WHERE tag ~ '^t[0-4]'") =~ s/^accepted,//r, 'cancelled',
	'... and each came to one end');
$t->configure_standin(latency_ms => 0);

# Sent again

$t->faults({ match => { to => '+1557000*' }, action => 'status', code => 400, times => -1 });
$t->sql("SELECT sentdm_send('+1557' || n, body => 'x', tag => 'again') FROM generate_series(0001000, 0001009) n"
	  . "; SELECT sentdm_send('+1557000000' || n, body => 'x', tag => 'again') FROM generate_series(1, 4) n");
$t->becomes("SELECT count(*) FILTER (WHERE state = 'failed'), count(*) FILTER (WHERE state = 'queued') FROM sentdm.messages WHERE tag = 'again'", '4|0',
	'some of a tag fail');
is($t->sql("SELECT total, accepted, failed, cancelled FROM sentdm.progress WHERE tag = 'again'"), '14|10|4|0', '... as its progress says');
$t->faults();
is($t->sql("SELECT sentdm_retry_tag('again', '{expired,uncertain}')"), 0, 'sentdm_retry_tag() takes the states that it is told');
is($t->sql("SELECT sentdm_retry_tag('again')"), 4, '... by default those that failed');
$t->all_become('accepted', "tag = 'again'", '... which are sent');
is($t->sql("SELECT count(*), min(generation) FROM sentdm.messages WHERE tag = 'again' AND generation > 1"), '4|2', '... under a new key, and no others');
like($t->sql_error("SELECT sentdm_retry_tag('again', '{failed,accepted}')"), qr/ERROR:  22023: argument "states" contains an unknown state\n.*HINT:/s,
	'what was accepted cannot be retried');
$t->accepted_once('nothing was accepted twice under a key');

# When it will be over

$t->set('sentdm.rate_limit' => '600/minute');
$t->sql("SELECT sentdm_pause('to look at it')");
$t->sql("SELECT sentdm_send('+1558' || n, body => 'x', tag => 'later', priority => 'bulk') FROM generate_series(1000000, 1000599) n");
is(eta_seconds('later'), '', 'while the queue is paused nobody knows when it will be empty');
$t->set('sentdm.rate_limit' => '60/minute', 'sentdm.max_in_flight' => 1);
$t->sql('SELECT sentdm_resume()');
is_about(eta_seconds('later'), 600, 60, '600 requests at 60 a minute take ten minutes');
$t->sql("SELECT sentdm_send('+1559' || n, body => 'x', tag => 'urgent', priority => 'high') FROM generate_series(1000000, 1000059) n");
is_about(eta_seconds('later'), 660, 60, '... and those that go before it count');
is_about(eta_seconds('urgent'), 60, 20, '... while it does not count for them');
$t->sql("SELECT sentdm_cancel_tag('urgent')");
$t->set('sentdm.message_rate_limit' => '30/minute');
is_about(eta_seconds('later'), 1200, 120, 'a limit on recipients counts, if it is slower');
$t->set('sentdm.message_rate_limit' => undef, 'sentdm.mode' => 'hold');
is(eta_seconds('later'), '', 'in mode hold there is no end');
$t->set('sentdm.mode' => undef);
$t->sql("SELECT sentdm_cancel_tag('later')");
is($t->sql("SELECT round(extract(epoch FROM eta - now()) / 3600) FROM sentdm.progress WHERE tag = 'other'"), 24, 'what is scheduled ends when it is due');
$t->set('sentdm.rate_limit' => '100/second', 'sentdm.max_in_flight' => 64);
$t->sql("SELECT sentdm_send('+1560' || n, body => 'x', tag => 'timed') FROM generate_series(1000000, 1000499) n");
my $eta = $t->sql("SELECT extract(epoch FROM eta) FROM sentdm.progress WHERE tag = 'timed'");
$t->all_become('accepted', "tag = 'timed'", 'a campaign under a limit is sent');
my $off = $t->sql("SELECT extract(epoch FROM max(finished_at)) - $eta FROM sentdm.messages WHERE tag = 'timed'");
diag(sprintf 'predicted to take 5 s, the end came %.2f s after the time that was given', $off);
is_about($off, 0, 2.5, '... and ends when it was said to');

# Said at once

$t->sql("SELECT sentdm_pause()");
$t->set('sentdm.rate_limit' => '60/minute');
my $send = "DO \$\$ BEGIN PERFORM sentdm_send('+1561' || n, body => 'x', tag => 'large') FROM generate_series(1000000, 1000000 + %d) n; END \$\$;";
my (undef, undef, $notice) = $node->psql('postgres', sprintf($send, 599));
like($notice, qr/^.*NOTICE:  600 requests to 600 recipients take at least 10 minutes under the present limits$/m,
	'a very large enqueue is told how long it takes');
is(() = $notice =~ /NOTICE/g, 1, '... once');
(undef, undef, $notice) = $node->psql('postgres', 'BEGIN; ' . sprintf($send, 599) . ' ROLLBACK; BEGIN; SAVEPOINT s; '
	  . sprintf($send, 599) . ' ROLLBACK TO s; ' . sprintf($send, 89) . ' COMMIT;');
is($notice, '', '... but not what is rolled back, nor a small one');
(undef, undef, $notice) = $node->psql('postgres', 'BEGIN; ' . sprintf($send, 599) . " PREPARE TRANSACTION 'large';");
like($notice, qr/NOTICE:  600 requests/, '... while what is prepared is announced, because nothing can be said later');
$t->sql("ROLLBACK PREPARED 'large'");
$t->set('sentdm.rate_limit' => '600/minute');
(undef, undef, $notice) = $node->psql('postgres', sprintf($send, 199));
is($notice, '', '... nor one that takes less than a minute');
$t->set('sentdm.message_rate_limit' => '30/minute');
(undef, undef, $notice) = $node->psql('postgres', "SELECT sentdm_send(ARRAY(SELECT '+1561' || n FROM generate_series(1000000, 1000134) n), body => 'x', tag => 'large')");
like($notice, qr/NOTICE:  1 requests to 135 recipients take at least 5 minutes/, 'a limit on recipients counts here too');
is($t->sql("SELECT sentdm_cancel_tag('large')"), 891, 'a tag is cancelled while the queue is paused');

$t->stops_cleanly;

done_testing();
