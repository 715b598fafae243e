# The worker is in nobody's way: no transaction or snapshot while the network is
# waited for, none that is long, and memory that does not grow.  And nobody is in its
# way: not a transaction that stays open all the while.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmChecker;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('never_in_the_way', settings => { 'sentdm.request_timeout' => '60s' });
my $checker = SentdmChecker->new($t);
my $worker = "FROM pg_stat_activity WHERE backend_type = 'sentdm worker'";
my @samples;

# Anonymous memory of the worker, in kB.
sub memory
{
	my ($kb) = PostgreSQL::Test::Utils::slurp_file('/proc/' . $t->worker_pid . '/status') =~ /^RssAnon:\s+(\d+) kB/m;

	return $kb;
}

# Whether the worker is in a transaction, and whether it holds anything.
sub sample
{
	push @samples, $t->sql("SELECT xact_start IS NOT NULL, backend_xmin IS NOT NULL OR backend_xid IS NOT NULL OR state <> 'idle' $worker");
	return;
}

# While requests hang

my $id = $t->send("'+15550000001', body => 'x'");
$t->all_become('accepted', "id = '$id'", 'the worker sends');
$t->faults({ action => 'hang', times => 3, accept => \1 });
$t->sql("SELECT sentdm_send('+1555000001' || n, body => 'x') FROM generate_series(1, 3) n");
wait_until { ($t->summary->{faults}{hang} || 0) == 3 } 'three requests hang';
# It may keep house for a moment meanwhile.
ok(eval { wait_until { sample(); @samples >= 10 && distinct(@samples[ -10 .. -1 ]) == 1 && $samples[-1] eq 'f|f' } 'ten in a row' },
	'while requests hang the worker holds no transaction and no snapshot');
is($t->sql("SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE backend_type = 'sentdm worker' AND locktype <> 'advisory'"), 0,
	'... and no lock but the one that says who drains');
$t->sql('VACUUM sentdm.outbox');
is($t->sql("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'sentdm worker' AND age(backend_xmin) > 0"), 0,
	'... so it holds back no vacuum');
$t->node->restart;
$t->outbox_drains('after a restart they are asked for again');
$t->accepted_once('... and accepted once');

# While somebody holds a snapshot, all the time

my $idle = $t->session;
$idle->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM sentdm.outbox');
$t->reset_standin;
$t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x', tag => 'snapshot') FROM generate_series(1, 3000) n");
$t->outbox_drains('the queue drains');
is($t->sql("SELECT count(*) FROM sentdm.messages WHERE tag = 'snapshot' AND state = 'accepted'"), 3000,
	'while somebody keeps a snapshot, messages are sent');
is(scalar(my @all = $t->effects), 3000, '... exactly once each');
$t->accepted_once('... under one key each');
is($idle->query_safe('SELECT count(*) FROM sentdm.outbox'), 0, '... and the snapshot was held');
$idle->query_safe('COMMIT');
$idle->quit;

# Memory, over 100,000 messages.  In requests of ten, for the sake of the stand-in:
# what is kept of a message and of an answer is kept for each of them.

sub send_many
{
	my ($requests, $tag) = @_;

	$t->sql("SET sentdm.max_per_transaction = 1000000; SELECT count(*) FROM generate_series(1, $requests) n, sentdm_send(ARRAY("
		  . "SELECT '+1556' || to_char(n * 10 + i, 'FM0000000') FROM generate_series(0, 9) i), body => repeat('x', 500), tag => '$tag')");
	$t->outbox_drains("$requests requests to 10 recipients each are sent");
	return memory();
}

send_many(1000, 'warm-up');
my $before = memory();
my @after = map { send_many(2500, "round $_") } 1 .. 4;
diag("RssAnon of the worker: $before kB, then @after kB");
# About a hundred bytes for each request.
cmp_ok($after[3] - $before, '<', 1024, '... and the memory of the worker is as before after 100,000 messages');
is($t->sql("SELECT count(*) FROM sentdm.deliveries JOIN sentdm.messages m ON m.id = message_id WHERE tag LIKE 'round %'"), 100_000,
	'... of which it stored every id');

$checker->transactions_are_short('all the while no transaction of the worker took a second, or was open while it waited for the network');
$checker->stop;

# ... and with the largest answers there are: a thousand recipients on four channels,
# as many at once as may be, of which nothing can be stored for a while.

my $requests = 40;
my $locker = $t->session;
my $peak = 0;

sub watch
{
	my $now = memory();

	$peak = $now if $now > $peak;
	return;
}

$before = memory();
$t->reset_standin;
$t->configure_standin(latency_ms => 1500);
$locker->query_safe('BEGIN; LOCK TABLE sentdm.deliveries IN EXCLUSIVE MODE');
$t->sql("SET sentdm.max_per_transaction = 1000000; SELECT count(*) FROM generate_series(1, $requests) n, sentdm_send(ARRAY("
	  . "SELECT '+1557' || to_char(n * 1000 + i, 'FM0000000') FROM generate_series(0, 999) i), body => repeat('x', 500),"
	  . " channels => '{sms,whatsapp,rcs,mms}', tag => 'large')");
wait_until { watch(); $t->sql('SELECT in_flight FROM sentdm.worker_report()') > 0 } 'large requests are under way';
wait_until { watch(); $t->sql('SELECT in_flight FROM sentdm.worker_report()') == 0 } 'large requests are answered';
my $at_once = $t->arrived;
cmp_ok($at_once, '>=', 3, 'several large requests are under way at once');
cmp_ok($at_once, '<', 20, '... but no more than have room');
$locker->query_safe('COMMIT');
$locker->quit;
$t->configure_standin(latency_ms => 0);
wait_until { watch(); $t->sql('SELECT count(*) FROM sentdm.outbox') == 0 } 'all of them are stored';
diag("RssAnon of the worker: $before kB, at most $peak kB with $at_once large requests at once, then " . memory() . ' kB');
cmp_ok($peak, '<', 40 * 1024, '... the memory of the worker stays under 40 MB');
cmp_ok(memory() - $before, '<', 4096, '... and most of it is given back when they are stored');
is($t->sql("SELECT count(DISTINCT sent_id) FROM sentdm.deliveries JOIN sentdm.messages m ON m.id = message_id WHERE tag = 'large'"),
	4000 * $requests, '... every id of them');

$t->stops_cleanly;

done_testing();
