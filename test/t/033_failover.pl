# A primary that is cut off from its synchronous standby sends nothing new.  What a
# standby that lagged behind loses, and what it repeats, is what docs/guarantees.md
# says.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $t = SentdmTest->new('alpha', init => { allows_streaming => 1 });
my $alpha = $t->node;
my $number = 0;

sub standby_of
{
	my ($primary, $name) = @_;
	my $standby = PostgreSQL::Test::Cluster->new($name);

	$standby->init_from_backup($primary, 'base', has_streaming => 1);
	$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''\nprimary_conninfo = '"
		  . $primary->connstr . " application_name=$name'");
	start_as($standby, 'alpha');
	wait_until { $primary->safe_psql('postgres', "SELECT count(*) FROM pg_stat_replication WHERE application_name = '$name' AND state = 'streaming'") } "$name streams";
	return $standby;
}

# Cut the connection to the primary.
sub isolate
{
	my ($primary, $standby) = @_;

	$standby->append_conf('postgresql.conf', "primary_conninfo = ''");
	$standby->reload;
	wait_until { !$primary->safe_psql('postgres', "SELECT count(*) FROM pg_stat_replication WHERE application_name = '" . $standby->name . "'") } 'it is cut off';
	return;
}

# Send some messages; returns their numbers.
sub send_some
{
	my ($node, $n, $settings) = @_;
	my @numbers = map { sprintf '+1555%07d', ++$number } 1 .. $n;

	$node->safe_psql('postgres', join ';', $settings || (), map { "SELECT sentdm_send('$_', body => 'x')" } @numbers);
	return @numbers;
}

sub states
{
	return q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages};
}

# How many of these numbers were written to, and how often at most.
sub reached
{
	my (@numbers) = @_;
	my %wanted = map { $_ => 1 } @numbers;
	my %times;

	$times{$_}++ foreach grep { $wanted{$_} } map { $_->{to} } $t->effects;
	return scalar(keys %times) . ' of ' . @numbers . ', at most ' . ((sort { $b <=> $a } values %times)[0] || 0) . ' times';
}

# Split brain

$alpha->backup('base');
my $beta = standby_of($alpha, 'beta');
$alpha->append_conf('postgresql.conf', "synchronous_standby_names = 'beta'");
$alpha->reload;
wait_until { $t->sql("SELECT sync_state FROM pg_stat_replication") eq 'sync' } 'the standby is synchronous';
my @together = send_some($alpha, 3);
node_becomes($alpha, states(), 'accepted', 'with its standby the primary sends');
isolate($alpha, $beta);

# Sessions that do not wait for the standby can still commit messages.
my $before = $t->summary->{requests};
my @alone = send_some($alpha, 3, 'SET synchronous_commit = local');
my $worker = "FROM pg_stat_activity WHERE backend_type = 'sentdm worker'";
node_becomes($alpha, "SELECT wait_event $worker", 'SyncRep', 'cut off from it, the worker waits with its claims');
is($t->sql("SELECT xact_start IS NULL AND backend_xid IS NULL AND backend_xmin IS NULL $worker"), 't',
	'... outside of a transaction, and holds back no vacuum');
is($t->summary->{requests}, $before, '... and sends nothing new');
foreach (1 .. 3)
{
	$t->sql("SELECT pg_cancel_backend(pid) $worker");
}
stays_true { $t->summary->{requests} == $before } 0.3, '... also when somebody cancels its wait';
my $began = Time::HiRes::time();
$alpha->stop('fast');
my $seconds = Time::HiRes::time() - $began;
cmp_ok($seconds, '<', 10, sprintf '... and does not keep the server from shutting down (%.1f s)', $seconds);
start_as($alpha, 'alpha');
node_becomes($alpha, "SELECT wait_event $worker", 'SyncRep', 'after a restart it waits again');
stays_true { $t->summary->{requests} == $before } 0.3, '... and sends nothing';
is($t->sql('SELECT count(claimed_at) > 0, max(crashes) FROM sentdm.outbox'), 't|0',
	'... with claims in its hands that were handed back unharmed before');

$began = Time::HiRes::time();
$beta->promote;
my @promoted = send_some($beta, 2);
wait_until { grep { $_->{to}[0] eq $promoted[0] } $t->arrived } 'the new primary sends';
$seconds = Time::HiRes::time() - $began;
cmp_ok($seconds, '<', 2, sprintf 'the standby is promoted and sends (%.2f s)', $seconds);
node_becomes($beta, states(), 'accepted', '... all that it has');
is(reached(@together, @promoted), '5 of 5, at most 1 times', '... once');
is(reached(@alone), '0 of 3, at most 0 times', 'while the old primary, which runs, sends nothing');
$alpha->stop('immediate');

# Asynchronous standbys: one that is cut off, one that has everything but does not
# replay it.

$beta->backup('base');
my $gamma = standby_of($beta, 'gamma');
my $delta = standby_of($beta, 'delta');
$t->faults({ action => 'status', code => 429, retry_after => 1, times => -1 });
my @queued = send_some($beta, 3);
$beta->wait_for_catchup($_) foreach 'gamma', 'delta';
is($gamma->safe_psql('postgres', "SELECT count(*) FROM sentdm.messages WHERE state = 'queued'"), 3, 'the standbys know of messages that wait');
isolate($beta, $gamma);
$delta->safe_psql('postgres', 'SELECT pg_wal_replay_pause()');
$t->faults;
node_becomes($beta, states(), 'accepted', '... which the primary then sends');
my @unknown = send_some($beta, 4);
node_becomes($beta, states(), 'accepted', '... and others, of which the one that is cut off does not know');
$before = $t->summary->{accepted_requests};
my $flushed = $beta->safe_psql('postgres', 'SELECT pg_switch_wal()');
wait_until { $delta->safe_psql('postgres', "SELECT pg_last_wal_receive_lsn() >= '$flushed'") eq 't' } 'the other one has received everything';
my $replays = $t->summary->{replays};
$beta->stop('immediate');

$gamma->promote;
my @later = send_some($gamma, 1);
node_becomes($gamma, states(), 'accepted', 'the one that was cut off is promoted and sends');
is(reached(@queued), '3 of 3, at most 1 times', '... what it knew of is asked for again, and accepted once');
is($t->summary->{replays} - $replays, 3, '... under the same keys');
is($gamma->safe_psql('postgres', "SELECT count(*) FROM sentdm.messages WHERE request #>> '{to,0}' IN ('" . join("','", @unknown) . "')"), 0,
	'what it never heard of is lost, with its transactions');
is(reached(@unknown), '4 of 4, at most 1 times', '... though it was sent');
$gamma->stop('immediate');

$before = $t->summary->{effects};
$delta->promote;
wait_until { $delta->safe_psql('postgres', 'SELECT pg_is_in_recovery()') eq 'f' } 'it is promoted';
is($delta->safe_psql('postgres', "SELECT count(*) FROM sentdm.messages WHERE request #>> '{to,0}' IN ('" . join("','", @queued, @unknown) . "')"), 7,
	'a standby that only had not replayed everything knows of all');
push @later, send_some($delta, 1);
node_becomes($delta, states(), 'accepted', '... and sends');
is(reached(@queued, @unknown), '7 of 7, at most 1 times', '... nothing twice');

my $summary = $t->summary;
is_deeply([ @$summary{qw(max_effects_per_recipient duplicate keyless)} ], [ 1, 0, 0 ], 'over all this nobody got anything twice');
ok($delta->stop('fast'), 'the last one shuts down');
$t->stop_standin;
done_testing();
