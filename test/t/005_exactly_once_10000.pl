# Ten thousand messages of one transaction arrive exactly once each; and how long
# it takes, for many and for one.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $messages = 10_000;
my $singles = 200;
my $median_limit_ms = 100;	# generous, for a slow machine that does other things, too

my $t = SentdmTest->new('ten_thousand');

sub outcome_count
{
	return $t->sql("SELECT count(*) FROM sentdm.messages WHERE state = 'accepted'");
}

# One transaction

is($t->sql(<<"SQL"), $messages,
SELECT count(sentdm_send('+1555' || to_char(n, 'FM0000000'), 'order_shipped', jsonb_build_object('order_id', n)))
FROM generate_series(1, $messages) n
SQL
	 "$messages messages are sent by one transaction");
my $began = Time::HiRes::time();
wait_until { outcome_count() == $messages } 'all are accepted';
my $seconds = Time::HiRes::time() - $began;

my $summary = $t->summary;
my %expected = (replays => 0, duplicate => 0, keyless => 0, max_effects_per_recipient => 1,
	map { $_ => $messages } qw(requests accepted_requests accepted_recipients distinct_recipients distinct_keys));
is_deeply({ map { $_ => $summary->{$_} } keys %expected }, \%expected,
	'Sent got as many requests, each once, and accepted each once');
diag(sprintf '%d messages drained in %.1f s: %.0f a second; up to %d connections',
	$messages, $seconds, $messages / $seconds, $summary->{most_connections});

# The ledger is large: PostgreSQL reads and compares it.
my $ledger = $t->save_ledger;
$t->sql(<<"SQL");
CREATE TABLE effect AS SELECT e ->> 'key' AS key, e ->> 'to' AS recipient, (e ->> 'message_id')::uuid AS sent_id
FROM jsonb_array_elements(pg_read_file('$ledger')::jsonb -> 'effects') AS e
SQL
is($t->sql("SELECT count(*), count(DISTINCT key), count(DISTINCT recipient), min(recipient), max(recipient) FROM effect"),
	sprintf('%d|%1$d|%1$d|+15550000001|+1555%07d', $messages, $messages), 'the ledger has every number once');
is($t->sql(<<'SQL'), 0, '... under the key of its message, and Sent\'s id for it is stored as a delivery');
SELECT count(*) FROM effect e FULL JOIN
	(SELECT d.recipient, d.sent_id, 'sentdm-' || m.id || '-1' AS key, m.request #>> '{to,0}' AS meant
	 FROM sentdm.messages m JOIN sentdm.deliveries d ON d.message_id = m.id) k USING (key, recipient, sent_id)
WHERE k.meant IS DISTINCT FROM recipient
SQL
is($t->sql("SELECT count(*), max(attempts), count(request_id) FROM sentdm.messages"), "$messages|1|$messages",
	'every message took one attempt');
is($t->sql('SELECT count(*) FROM sentdm.deliveries'), $messages, 'and there is no other delivery');
is($t->sql('SELECT count(*) FROM sentdm.outbox'), 0, 'the queue is empty');
is($t->sql('SELECT requests, accepted, retried, failed FROM sentdm.stat_worker'), "$messages|$messages|0|0",
	'the counters say the same');

# One at a time, with the limits that are the default

$t->set('sentdm.rate_limit' => undef);
$t->reset_standin;
my $session = $t->session;
my %committed_us;
my $slowest_settle = 0;
foreach my $n (1 .. $singles)
{
	my ($id, $us) = split /\n/, $session->query_safe(<<"SQL");
SELECT sentdm_send('+15551111111', body => 'single');
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
SQL
	$committed_us{"sentdm-$id-1"} = $us;
	wait_until { $session->query_safe("SELECT state FROM sentdm.messages WHERE id = '$id'") eq 'accepted' } 'it is accepted';
	my $settled = $session->query_safe("SELECT extract(epoch FROM finished_at - created_at) FROM sentdm.messages WHERE id = '$id'");
	$slowest_settle = $settled if $settled > $slowest_settle;
}
$session->quit;

my %arrived_us = map { @$_ } @{ $t->control('GET', 'arrivals') };
my @latency_ms = sort { $a <=> $b } map { ($arrived_us{$_} - $committed_us{$_}) / 1000 } keys %committed_us;
my ($median, $p99) = @latency_ms[ $singles / 2, $singles * 0.99 - 1 ];
count_is([ keys %arrived_us ], $singles, "$singles messages, sent one at a time, arrive");
diag(sprintf 'from commit to arrival: median %.1f ms, 99th percentile %.1f ms; slowest outcome stored after %.0f ms',
	$median, $p99, $slowest_settle * 1000);
cmp_ok($median, '<', $median_limit_ms, "... half of them within $median_limit_ms ms of the commit");
cmp_ok($slowest_settle, '<', 5, '... and no outcome waits until something else happens');

$t->stops_cleanly;

done_testing();
