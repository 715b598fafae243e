# Databases that send under the same API key: together they keep to its limit, and
# what Sent says about the key to one of them stops all.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('one_key');
my @databases = qw(postgres second third);
my $number = 0;
my $file = $t->node->basedir . '/key';

sub send_some
{
	my ($database, $n, $tag) = @_;

	$t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x', tag => '$tag') FROM generate_series("
		  . ($number + 1) . ', ' . ($number + $n) . ') n', $database);
	$number += $n;
	return;
}

# The most requests in any window of so many seconds.
sub busiest
{
	my ($seconds, @requests) = @_;
	my @at = sort { $a <=> $b } map { $_->{unix_us} } @requests;
	my ($most, $first) = (0, 0);

	foreach my $last (0 .. $#at)
	{
		$first++ while $at[$last] - $at[$first] >= $seconds * 1_000_000;
		$most = $last - $first + 1 if $last - $first + 1 > $most;
	}
	return $most;
}

my $paused = q{SELECT string_agg(error_code, ',') FROM sentdm.problems WHERE problem = 'paused'};

sub all_become
{
	my ($query, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->becomes($query, $expected, "$name: $_", $_) foreach @databases;
	return;
}

foreach (@databases[ 1, 2 ])
{
	$t->sql("CREATE DATABASE $_");
	$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', $_);
}

# A key that nobody knows yet is bad: one request in all, whoever makes it.

$t->faults({ action => 'status', code => 401, times => -1 }, { action => 'latency', ms => 100, times => -1 });
my $log = $t->log_position;
send_some($_, 5, 'bad key') foreach @databases;
all_become($paused, 'credentials', 'a key that is refused pauses every database that uses it');
stays_true { $t->summary->{requests} == 1 } 0.5, '... after one request in all';
is($t->count_in_log(qr/WARNING:  sentdm has paused sending: Sent does not accept the API key/, $log), 3, '... with one warning each');
$t->sql('SELECT sentdm_resume()', 'second');
wait_until { $t->summary->{requests} == 2 } 'one more';
$t->becomes($paused, 'credentials', '... it is tried again once where somebody resumes', 'second');
stays_true { $t->summary->{requests} == 2 } 0.5, '... and nowhere else';
$t->faults();
$t->sql('SELECT sentdm_resume()', 'third');
all_become(q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages}, 'accepted', 'when it is good, all go on');
all_become($paused, '', '... and nothing is paused');

# Later, with a key that was good

my $before = $t->summary->{requests};
$t->faults({ action => 'status', code => 403, times => -1 });
send_some('second', 1, 'forbidden');
all_become($paused, 'forbidden', 'a good key that is refused later pauses all, too');
send_some($_, 3, 'forbidden') foreach @databases;
stays_true { $t->summary->{requests} == $before + 1 } 0.5, '... after one request in all';
$t->faults({ action => 'status', code => 403 });
$t->set('sentdm.api_key' => 'another-key-for-tests-0123');
wait_until { $t->summary->{requests} > $before + 1 } 'a request tries';
stays_true { $t->summary->{requests} == $before + 2 } 0.5, 'a changed key that is bad, too, is tried once in all';
$t->set('sentdm.api_key' => 'a-third-key-for-tests-0123');
all_become(q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages}, 'accepted', '... and with a good one all go on');

# A key file is looked at again by itself.

sub write_key
{
	my ($key) = @_;

	open my $out, '>', "$file.new" or die "could not write $file: $!";
	chmod 0600, "$file.new";
	print $out "$key\n";
	close $out;
	rename "$file.new", $file or die "could not rename $file: $!";
	return;
}

write_key('a-key-in-a-file-0123456789');
$t->faults({ action => 'status', code => 401, times => 2 });
$t->set('sentdm.api_key' => undef, 'sentdm.api_key_file' => $file);
$before = $t->summary->{requests};
$log = $t->log_position;
send_some('second', 1, 'file');
all_become($paused, 'credentials', 'a key in a file that is refused pauses all');
stays_true { $t->summary->{requests} == $before + 1 } 0.5, '... after one request in all';
write_key('a-better-key-in-a-file-01234');
wait_until { $t->summary->{requests} == $before + 2 } 'it is tried again';
stays_true { $t->summary->{requests} == $before + 2 } 0.5, '... a changed file is tried once, by itself, though bad again';
write_key('a-good-key-in-a-file-0123456');
all_become(q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages}, 'accepted', '... and with a good one all go on');
all_become($paused, '', '... and nothing is paused');
is($t->summary->{requests}, $before + 3, '... after one more request');

# A 429 is about the key.

$before = $t->summary->{requests};
$t->faults({ action => 'retry_after', value => 2 });
send_some('second', 1, '429');
wait_until { $t->summary->{requests} == $before + 1 } 'a request meets the limit';
my ($limited) = $t->arrived($before);
wait_until { $t->sql('SELECT rate_limited FROM sentdm.stat_worker', 'second') > 0 } 'the worker knows';
send_some($_, 1, '429') foreach qw(postgres third);
all_become(q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages}, 'accepted', 'after a 429 in one database all are sent');
my (undef, @later) = $t->arrived($before);
cmp_ok((sort { $a <=> $b } map { $_->{unix_us} } @later)[0] - $limited->{unix_us}, '>=', 2_000_000, '... but nowhere before Retry-After');

# The limit holds for all together.  A restart forgets that 429.

$t->set('sentdm.rate_limit' => '60/second');
$t->node->restart;
$before = $t->summary->{requests};
foreach my $database (@databases)
{
	send_some($database, 100, 'rate');
}
all_become('SELECT count(*) FROM sentdm.outbox', 0, 'under a limit all are sent');
my @requests = $t->arrived($before);
is(scalar @requests, 300, '... in 300 requests');
my $most = busiest(1, @requests);
cmp_ok($most, '<=', 60, "... and never more than 60 of them in a second, in all ($most)");
cmp_ok($most, '>', 35, '... though not much fewer');
$t->accepted_once('nothing was accepted twice');
$t->stops_cleanly;

done_testing();
