# The worker does not look again at what it has been past in the queue, except for
# what was not to be seen or to be had then: nothing is left behind.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;
use List::Util qw(min);
use Time::HiRes qw(time);

my $t = SentdmTest->new('late');

# Whoever begins early and commits late.  After a second the worker would look from
# the beginning anyway: so it has to be clearly sooner.

my @delays;
for my $round (1 .. 3)
{
	stays_true { $t->sql('SELECT count(*) FROM sentdm.outbox') == 0 } 1.2, "round $round: all is sent, and looked at";
	my $late = $t->session;
	$late->query_safe(q{BEGIN; SELECT sentdm_send('+15550001001', body => 'late', tag => 'late')});
	my $early = $t->send(q{'+15550001002', body => 'early'});
	$t->all_become('accepted', "id = '$early'", '... one that began later has been sent');
	my $began = time;
	$late->query_safe('COMMIT');
	$t->all_become('accepted', "tag = 'late'", '... and then the one that began before it');
	push @delays, time - $began;
	$late->quit;
}
cmp_ok(min(@delays), '<', 0.6, sprintf('it is not waited for (%s s)', join ', ', map { sprintf '%.2f', $_ } @delays));

# Many at once that began before what the worker claims meanwhile.

my @sessions = map { $t->session } 1 .. 4;
$_->query_safe(q{BEGIN; SELECT count(sentdm_send('+1555000' || n, body => 'x', tag => 'many')) FROM generate_series(2001, 2100) AS n})
  for @sessions;
$t->sql(q{SELECT count(sentdm_send('+1555000' || n, body => 'x')) FROM generate_series(3001, 3500) AS n});
for my $session (@sessions)
{
	$session->query_safe('COMMIT');
	$t->sql(q{SELECT count(sentdm_send('+1555000' || n, body => 'x')) FROM generate_series(3001, 3100) AS n});
	$session->quit;
}
$t->outbox_drains('transactions that commit in another order than they began are all sent');

# A row that somebody has locked when the worker comes by, and lets go of.

$t->sql('SELECT sentdm_pause()');
my $locked = $t->send(q{'+15550004001', body => 'locked'});
my $owner = $t->session;
$owner->query_safe("BEGIN; SELECT sentdm_cancel('$locked')");
my $other = $t->send(q{'+15550004002', body => 'x'});
$t->sql('SELECT sentdm_resume()');
$t->all_become('accepted', "id = '$other'", 'what is behind a locked row is sent');
$owner->query_safe('ROLLBACK');
$owner->quit;
$t->all_become('accepted', "id = '$locked'", 'a row is sent when its lock is gone, although nobody says so');

# One that was scheduled, among many for the same moment.

$t->sql(q{SELECT count(sentdm_send('+1555000' || n, body => 'x', send_at => now() + interval '2 s')) FROM generate_series(5001, 5600) AS n});
$t->outbox_drains('many that are due at the same moment are all sent');
$t->accepted_once('nothing was accepted twice');
$t->stops_cleanly;

done_testing();
