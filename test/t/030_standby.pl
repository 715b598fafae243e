# A standby sends nothing; a promoted one goes on by itself; a server restored to
# a point in time does not.
use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SentdmTest qw(wait_until);
use Test::More;
use Time::HiRes qw(time);

# The test module gives each server a cluster_name of its own, on the command
# line; a copy under another name is fenced for that reason alone.
sub start_as_primary
{
	my ($node) = @_;

	system_or_bail('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', '--cluster-name=primary', 'start');
	$node->_update_pid(1);
	return;
}

my $t = SentdmTest->new('primary',
	init => { allows_streaming => 1, has_archiving => 1 },
	settings => { synchronous_standby_names => undef });
my $primary = $t->node;

$t->send("'+14155550001', body => 'before the backup'");
$t->all_become('accepted', 'true', 'the primary sends');
$t->sql("SELECT sentdm_pause('maintenance')");
$t->send("'+14155550002', body => 'in the backup'");
$primary->backup('base');
my $copied = $t->sql("SELECT sentdm_send('+14155550003', body => 'after the backup')");

# A synchronous standby
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
start_as_primary($standby);
$primary->append_conf('postgresql.conf', "synchronous_standby_names = '*'");
$primary->reload;
wait_until { $t->sql("SELECT sync_state FROM pg_stat_replication") eq 'sync' } 'the standby is synchronous';
is($standby->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'sentdm%'"),
	0, 'no process of ours runs on a standby');
my ($code, undef, $error) = $standby->psql('postgres', "SELECT sentdm_send('+14155550009', body => 'x')");
like($error, qr/read-only|recovery/, 'a standby refuses to enqueue');

# The switch: the primary dies with messages in flight
$t->faults({ action => 'hang', accept => \1, match => { body_contains => 'in flight' }, times => 3 });
$t->sql('SELECT sentdm_resume()');
$t->all_become('accepted', 'true', 'the queue drains with a synchronous standby');
$t->send("'+1415555100$_', body => 'in flight $_'") for 1 .. 3;
wait_until { my $n = () = $t->effects; $n >= 6 } 'three requests hang, accepted';
$primary->stop('immediate');
my $promoted_at = time;
$standby->promote;
my $sent = $standby->safe_psql('postgres', "SELECT sentdm_send('+14155550010', body => 'after the switch')");
wait_until { grep { $_->{key} && $_->{key} =~ /\Q$sent\E/ } $t->arrived } 'the new primary sends';
my $took = time - $promoted_at;
cmp_ok($took, '<', 2, sprintf('the new primary sends %.2f s after the order to promote', $took));
wait_until { $standby->safe_psql('postgres', "SELECT count(*) FROM sentdm.messages WHERE state <> 'accepted'") eq '0' }
  'everything is accepted on the new primary';
my $summary = $t->summary;
is($summary->{max_effects_per_key}, 1, 'nothing was accepted twice');
is($summary->{duplicate}, 0, 'no key was used with other bytes');
is($summary->{accepted_requests}, $standby->safe_psql('postgres', 'SELECT count(*) FROM sentdm.messages'),
	'what was accepted is what the new primary knows of');
is($standby->safe_psql('postgres', 'SELECT count(*) FROM sentdm.problems'), '0', 'it needs nobody');
is($standby->safe_psql('postgres', 'SELECT timeline FROM sentdm.sender'), '2', 'it knows its timeline');

# Once more after a restart: the signal file of the promotion is gone by then.
$standby->stop;
start_as_primary($standby);
my $later = $standby->safe_psql('postgres', "SELECT sentdm_send('+14155550011', body => 'after a restart')");
wait_until { grep { $_->{key} && $_->{key} =~ /\Q$later\E/ } $t->arrived } 'it still sends after a restart';

# Restored to a point in time: the queue of that moment may have been sent since.
my $requests = $t->summary->{requests};
my $restored = PostgreSQL::Test::Cluster->new('restored');
$restored->init_from_backup($primary, 'base', has_restoring => 1, standby => 0);
$restored->append_conf('postgresql.conf', <<'CONF');
recovery_target = 'immediate'
recovery_target_action = 'promote'
synchronous_standby_names = ''
CONF
start_as_primary($restored);
wait_until { $restored->safe_psql('postgres', 'SELECT pg_is_in_recovery()') eq 'f' } 'recovery ends';
$restored->safe_psql('postgres', 'SELECT sentdm_resume()');
$restored->safe_psql('postgres', "SELECT sentdm_send('+14155550012', body => 'from the copy')");
wait_until { $restored->safe_psql('postgres', "SELECT detail FROM sentdm.problems WHERE problem = 'fenced'")
	  =~ /restored to a point in time/ } 'the fence is a problem that says why';
wait_until { $restored->safe_psql('postgres', 'SELECT pid FROM sentdm.stat_worker') ne '' } 'its worker runs';
is($t->summary->{requests}, $requests, 'a restored server sends nothing');
$restored->stop;
start_as_primary($restored);
$restored->safe_psql('postgres', "SELECT sentdm_send('+14155550013', body => 'from the copy')");
wait_until { $restored->safe_psql('postgres', 'SELECT pid FROM sentdm.stat_worker') ne '' } 'its worker runs again';
is($t->summary->{requests}, $requests, 'nor after a restart');
like($restored->safe_psql('postgres', "SELECT sentdm_enable(); SELECT detail FROM sentdm.problems"),
	qr/3 messages from before/, 'enabled, it holds what it carries');
$restored->safe_psql('postgres', "SELECT sentdm_send('+14155550014', body => 'on purpose')");
wait_until { $t->summary->{requests} == $requests + 1 } 'enabled, it sends what is new';

$restored->stop;
$standby->stop;
pass('both servers stop');
done_testing();
