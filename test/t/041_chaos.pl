# What goes wrong around the worker, one thing at a time: Sent, the network, the
# disk, the queue's rows, the database.  (Kills at random moments, and everything
# at once, are in 050_soak.pl.)

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use POSIX qw(strftime);
use SentdmChecker;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $t = SentdmTest->new('chaos', settings => {
		log_statement => 'none', log_min_error_statement => 'panic', 'sentdm.connect_timeout' => '500ms',
		'sentdm.request_timeout' => '1s' });
my $node = $t->node;
my $checker = SentdmChecker->new($t, private => [ qr/\b1555\d{7}\b/, qr/chaosbody/, qr/a-key-for-tests/ ]);
my $number = 0;
my $accounts = 0;

sub send_some
{
	my ($count, $arguments, $database) = @_;
	my ($first, $last) = ($number + 1, $number + $count);

	$number = $last;
	return split /\n/, $t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'chaosbody'"
		  . ($arguments || '') . ") FROM generate_series($first, $last) n", $database);
}

# All is over: check, and begin anew.
sub ends_well
{
	my ($name, $state) = @_;
	my $summary;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->faults();
	$t->outbox_drains("$name: the queue empties");
	$checker->holds('...');
	is($t->sql("SELECT string_agg(DISTINCT state, ',' ORDER BY state) FROM sentdm.messages"), $state || 'accepted',
		'... and the messages are ' . ($state || 'accepted'));
	$summary = $t->summary;
	$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
	$t->reset_standin;
	return $summary;
}

# Another worker, and then another account, as a worker takes with it what it has
# learned: nobody remembers what Sent answered.
sub forget
{
	$t->set('sentdm.idle_timeout' => '10ms');
	wait_until { !$t->worker_pid } 'the worker left';
	$t->set('sentdm.idle_timeout' => undef, 'sentdm.api_key' => 'a-key-for-tests-' . (1000000 + ++$accounts));
	return;
}

# Sent is unwell

$t->faults(map { { action => 'status', times => -1, %$_ } }
	  { code => 502, body => '<html>', match => { nth => 2 } }, { code => 503, match => { nth => 3 } },
	{ code => 504, match => { nth => 4 } }, { code => 500 });
send_some(50);
wait_until { $t->summary->{requests} >= 5 } 'the storm is met';
stays_true { $t->summary->{requests} == 5 } 0.3, 'of 50 messages 5 requests meet a storm of 5xx, then the worker waits';
my $opened = Time::HiRes::time();
wait_until { $t->summary->{requests} > 5 } 'one request tries';
stays_true { $t->summary->{requests} == 6 } 0.3, '... and then tries with one';
ends_well('a storm of 5xx');
forget();

# How long a 429 keeps everything back.  Some requests are under way before the
# first answer is known.
my $now = time;
foreach ([ 'seconds', 1, 1, {} ],
	[ 'a date', strftime('%a, %d %b %Y %H:%M:%S GMT', gmtime($now + 1)), 1, { Date => strftime('%a, %d %b %Y %H:%M:%S GMT', gmtime $now) } ],
	[ 'zero', 0, 1, {} ], [ 'a negative number', -5, 2, {} ], [ 'nothing', undef, 2, {} ])
{
	my ($what, $retry_after, $wait_s, $headers) = @$_;

	$t->faults({ action => 'retry_after', times => -1, headers => $headers,
			defined $retry_after ? (value => "$retry_after") : () });
	send_some(8);
	wait_until { $t->summary->{refused}{BUSINESS_002} } 'the limit is met';
	$t->faults();
	$t->outbox_drains("a 429 whose Retry-After is $what: the queue empties");
	my @arrived = $t->arrived;
	my @refused = grep { $_->{status} == 429 } @arrived;
	my ($next) = grep { $_->{status} != 429 } @arrived;
	cmp_ok(($next->{mono_us} - $refused[0]{mono_us}) / 1e6, '>=', $wait_s, "... after at least $wait_s s");
	cmp_ok(scalar @refused, '<=', 4, '... with nothing sent in between');
	ends_well('... and');
	forget();
}
foreach ('99999999999999999999', 'Fri, 31 Dec 9999 23:59:59 GMT', 'soon')
{
	$t->faults({ action => 'retry_after', value => $_ });
	send_some(1);
	wait_until { $t->summary->{refused}{BUSINESS_002} } 'the limit is met';
	stays_true { $t->summary->{requests} == 1 } 0.3, "a 429 whose Retry-After is absurd ($_) keeps everything back";
	is($t->sql('SELECT bool_and(sentdm_cancel(id)) FROM sentdm.messages'), 't', '... what waits can be cancelled');
	ends_well('... and', 'cancelled');
	forget();
}

# The rate, also of workers that follow one another

$t->set('sentdm.rate_limit' => '30/second');
$checker->{rate} = [ 30, 1, 0.3 ];
send_some(80);
foreach (15, 40)
{
	my $requests = $_;

	wait_until { $t->summary->{requests} >= $requests } 'some are sent';
	$t->sql('SELECT pg_terminate_backend(pid) FROM sentdm.stat_worker');
}
ends_well('a limited rate');
delete $checker->{rate};
$t->set('sentdm.rate_limit' => 'off');

# Answers that never end, or hardly begin

sub peak_kb
{
	return (PostgreSQL::Test::Utils::slurp_file("/proc/$_[0]/status") =~ /^VmHWM:\s+(\d+)/m)[0];
}

send_some(64);
ends_well('before the memory is measured');
my $pid = $t->worker_pid;
my $before_kb = peak_kb($pid);
$t->faults({ action => 'endless', delay_ms => 0, times => 4 });
send_some(4);
wait_until { ($t->summary->{faults}{endless} || 0) == 4 } 'the fault is met';
ends_well('answers without an end');
cmp_ok(peak_kb($pid) - $before_kb, '<', 8 * 1024, '... in bounded memory');
is($t->worker_pid, $pid, '... of the same worker');

$t->faults({ action => 'slow', bytes => 1, delay_ms => 100, times => 3 });
send_some(3);
wait_until { ($t->summary->{faults}{slow} || 0) == 3 } 'the fault is met';
cmp_ok(ends_well('answers that come byte by byte')->{replays}, '>=', 3, '... are given up, and asked for again');
forget();

# The request that tries after a pause hangs.  Sent may refuse it in the end, and ten
# refusals lock the key: so the others wait for it, until it is given up.

$t->faults({ action => 'status', code => 401 });
send_some(10);
$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'credentials', 'a 401 pauses');
$t->faults({ action => 'hang' });
$t->sql('SELECT sentdm_resume()');
wait_until { $t->summary->{faults}{hang} } 'the first request after the pause hangs';
$t->outbox_drains('... and the others are sent when it is given up');
my ($refused, $hung, $next) = $t->arrived;
cmp_ok(($next->{mono_us} - $hung->{mono_us}) / 1e6, '>=', 1, '... but none before');
is(ends_well('the probe')->{requests}, 12, '... and only what was refused or hung is asked for again');

# Sent is not there

my $unreached = $t->sql('SELECT unreached FROM sentdm.stat_worker');
$t->set('sentdm.base_url' => 'https://api.sent.invalid');
send_some(10);
$t->becomes("SELECT unreached > $unreached FROM sentdm.stat_worker", 't', 'a name that does not exist is noticed');
is($t->sql("SELECT string_agg(DISTINCT state, ','), max(attempts) FROM sentdm.status"), 'queued|0', '... the messages wait');
is($t->sql('SELECT count(*) FROM sentdm.problems'), 0, '... and are no problem');
$t->set('sentdm.base_url' => $t->url);
is(ends_well('the name is right again')->{requests}, 10, '... with one request each');

# The disk is full.  The table that takes what Sent answers is a link to a device that is.

$t->sql('TRUNCATE sentdm.deliveries; CHECKPOINT');
my $path = $node->data_dir . '/' . $t->sql("SELECT pg_relation_filepath('sentdm.deliveries')");
unlink $path or die "could not remove $path: $!";
symlink '/dev/full', $path or die "could not link $path: $!";
my $position = $t->log_position;
send_some(4);
wait_until { $t->count_in_log(qr/could not write to the database .*No space left on device \(SQLSTATE 53100\)/, $position) >= 2 }
'the worker cannot store what Sent answered';
is($t->summary->{accepted_requests}, 4, 'the disk is full when Sent has accepted the messages');
send_some(4);
wait_until { $t->count_in_log(qr/SQLSTATE 53100/, $position) >= 4 } 'it tries again';
is($t->summary->{requests}, 4, '... meanwhile nothing new is sent');
is($t->sql('SELECT trouble FROM sentdm.stat_worker'), 'the database cannot be written', '... and the worker says why');
$t->sql('TRUNCATE sentdm.deliveries');
my $summary = ends_well('there is room again');
is("$summary->{requests} $summary->{replays}", '8 0', '... nothing had to be asked for again');

# The disk is full for the log, which the server itself does not survive: no new segment
# can be written by any process that runs now.  (A limit on the size of files does it, in
# the same place as a full disk.)

$t->faults({ action => 'latency', ms => 300, times => -1 });
$position = $t->log_position;
send_some(300);
wait_until { $t->summary->{requests} >= 8 } 'requests are under way';
my $segment = $t->sql("SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'");
PostgreSQL::Test::Utils::system_or_bail('prlimit', '--pid', $_, '--fsize=' . ($segment - 8192))
  foreach split /\n/, $t->sql("SELECT pid FROM pg_stat_activity WHERE backend_type <> 'client backend'");
wait_until { eval { $t->sql('SELECT pg_switch_wal()') }; $t->count_in_log(qr/PANIC:  could not write to file "pg_wal/, $position) } 'the log is full';
wait_until { eval { $t->worker_pid } } 'the server is up again, with a worker';
$t->expect_crashes($t->count_in_log(qr/PANIC:|was terminated by signal/, $position));
cmp_ok($t->summary->{accepted_requests}, '<', 300, 'the log is full in the middle of sending');
cmp_ok(ends_well('a server that went down for it')->{replays}, '>', 0, '... after Sent was asked again for what was in hand');

# Somebody holds an old snapshot, and then a lock

my $reader = $t->session;
$reader->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM sentdm.messages');
send_some(500) for 1 .. 2;
$t->outbox_drains('an old snapshot: the queue empties');
is($reader->query_safe('SELECT count(*) FROM sentdm.messages'), 0, '... which it does not see');
$reader->query_safe('COMMIT');
ends_well('an old snapshot');

$t->faults({ action => 'latency', ms => 300, times => 4 });
send_some(4);
wait_until { $t->summary->{requests} == 4 } 'requests are under way';
$position = $t->log_position;
$reader->query_safe('BEGIN; LOCK TABLE sentdm.outbox IN ACCESS EXCLUSIVE MODE');
wait_until { $t->count_in_log(qr/could not write to the database .*55P03/, $position) } 'the lock is in the way';
$reader->query_safe('COMMIT');
is(ends_well('a lock while the outcomes are stored')->{requests}, 4, '... nothing was asked for again');

# A refused key pauses from the answer on, not from when that is stored: whoever looks
# at the key in between must not take it for another one.

$t->set('sentdm.request_timeout' => '60s');
$t->faults({ action => 'status', code => 401, times => -1 });
kill 'STOP', $t->{standin_pid};
send_some(1);
$t->becomes('SELECT count(*) > 0 FROM sentdm.outbox WHERE claimed_at IS NOT NULL', 't', 'a request is under way');
$position = $t->log_position;
$reader->query_safe('BEGIN; LOCK TABLE sentdm.outbox IN ACCESS EXCLUSIVE MODE');
kill 'CONT', $t->{standin_pid};
wait_until { $t->count_in_log(qr/could not write to the database .*55P03/, $position) } 'the lock is in the way';
$position = $t->log_position;
$t->set('sentdm.request_timeout' => '1s');
wait_until { $t->count_in_log(qr/could not write to the database .*55P03/, $position) } '... also after the key was read again';
$reader->query_safe('COMMIT');
$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'credentials', 'a 401 that cannot be stored at once pauses');
$t->requests_stay(1, 0.3, '... after one request');
$t->faults();
$t->sql('SELECT sentdm_resume()');
ends_well('... and');
$reader->quit;

# Rows go while they are in hand

$t->faults({ action => 'latency', ms => 500, times => -1 });
my ($unqueued, $deleted, $gone) = send_some(3);
wait_until { $t->summary->{requests} == 3 } 'three requests are under way';
$position = $t->log_position;
$t->sql("DELETE FROM sentdm.outbox WHERE message_id IN ('$unqueued', '$gone');
	DELETE FROM sentdm.messages WHERE id IN ('$deleted', '$gone')");
$t->faults();
$t->outbox_drains('rows are deleted while they are under way: the queue empties');
$t->all_become('accepted', "id = '$unqueued'", '... and the outcome of what is left is stored');
$t->sql('SELECT sentdm_pause()');
($deleted) = send_some(1);
$t->sql("DELETE FROM sentdm.messages WHERE id = '$deleted'; SELECT sentdm_resume()");
$t->outbox_drains('a row whose message was deleted leaves the queue');
is($t->summary->{requests}, 3, '... and nothing is sent for it');
is($t->count_in_log(qr/ERROR:|could not write/, $position), 0, '... without an error');
$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
$t->reset_standin;

# After a pause that only a person wanted nothing is held back, even if the first requests hang

$t->set('sentdm.request_timeout' => '30s');
$t->sql('SELECT sentdm_pause()');
$t->faults({ action => 'hang', times => 3 });
send_some(20);
$t->sql('SELECT sentdm_resume()');
my $began = Time::HiRes::time();
wait_until { $t->summary->{accepted_requests} >= 17 } 'the others are sent';
my $seconds = Time::HiRes::time() - $began;
cmp_ok($seconds, '<', 3, sprintf 'requests that hang after a pause hold up no other (%.1f s)', $seconds);
$t->set('sentdm.request_timeout' => '1s');
$t->sql('SELECT pg_terminate_backend(pid) FROM sentdm.stat_worker');
ends_well('... and');

# Databases go

sub drops
{
	my ($database, $options, $name) = @_;
	my $start = Time::HiRes::time();
	my $code = $node->psql('postgres', "DROP DATABASE $database $options");
	my $took = Time::HiRes::time() - $start;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok($code == 0 && $took < 5, sprintf '%s (%.2f s)', $name, $took);
	return;
}

$t->sql('CREATE DATABASE busy') ;
$t->sql('CREATE DATABASE other');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'busy');
$t->set('sentdm.request_timeout' => '30s');
$t->faults({ action => 'hang', times => -1, match => { to => '+19990*' } });
$t->sql("SELECT sentdm_send('+1999000000' || n, body => 'x') FROM generate_series(1, 4) n", 'busy');
$t->sql("SELECT sentdm_send('+1999000001' || n, body => 'x', tag => 'hangs') FROM generate_series(1, 4) n");
wait_until { $t->summary->{requests} >= 8 } 'both workers wait for Sent';
$position = $t->log_position;
drops('other', '', 'another database can be dropped while workers wait for Sent');
drops('busy', 'WITH (FORCE)', 'a database can be dropped with FORCE while its worker waits for Sent');
is($t->count_in_log(qr/(?:PANIC|TRAP)/, $position), 0, '... without a crash');
send_some(4, ", tag => 'after'");
$t->all_become('accepted', "tag = 'after'", '... and the worker of this one goes on');
$t->faults();
$t->set('sentdm.request_timeout' => '1s');
$t->sql('SELECT pg_terminate_backend(pid) FROM sentdm.stat_worker');
$t->outbox_drains('... and sends what hung when it is started anew');
$t->accepted_once('... once each');
$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
$t->reset_standin;

# Certificates that are not good, though their issuer is known

my $directory = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir());

sub run_openssl
{
	PostgreSQL::Test::Utils::system_or_bail('openssl', @_);
	return;
}

sub certificate
{
	my ($name, $names, $days) = @_;

	PostgreSQL::Test::Utils::append_to_file("$directory/$name.ext", "subjectAltName=$names\n");
	run_openssl('req', '-newkey', 'rsa:2048', '-nodes', '-subj', "/CN=$name", '-keyout', "$directory/$name.key",
		'-out', "$directory/$name.csr");
	run_openssl('x509', '-req', '-in', "$directory/$name.csr", '-CA', "$directory/ca.crt", '-CAkey', "$directory/ca.key",
		'-CAcreateserial', '-days', $days, '-extfile', "$directory/$name.ext", '-out', "$directory/$name.crt");
	if ($days == 0)
	{
		wait_until { system("openssl x509 -in $directory/$name.crt -noout -checkend 0 >$directory/checkend") } 'it has expired';
	}
	return ('--tls-cert' => "$directory/$name.crt", '--tls-key' => "$directory/$name.key");
}

run_openssl('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=issuer', '-keyout', "$directory/ca.key",
	'-out', "$directory/ca.crt");
my $url = $t->url =~ s/^http:/https:/r;
my @ids = send_some(3, ", send_at => now() + interval '1 hour'");
foreach ([ 'expired', 'IP:127.0.0.1', 0 ], [ 'wrong_host', 'DNS:api.sent.example', 2 ], [ 'good', 'IP:127.0.0.1', 2 ])
{
	my ($name, $names, $days) = @$_;

	$t->stop_standin;
	$t->start_standin(certificate($name, $names, $days));
	$t->set('sentdm.base_url' => $url, 'sentdm.ca_file' => "$directory/ca.crt");
	$t->sql('SELECT sentdm_resume()');
	$t->sql('UPDATE sentdm.outbox SET due_at = now()');
	send_some(1);
	last if $name eq 'good';
	$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'certificate', "a certificate that is $name pauses");
	is($t->sql("SELECT string_agg(DISTINCT state, ','), max(attempts) FROM sentdm.status"), 'queued|0', '... before anything was sent');
}
$t->outbox_drains('with a good certificate the messages are sent');
is($t->sql("SELECT state, count(*) FROM sentdm.messages GROUP BY 1"), 'accepted|6', '... all of them');

$checker->stop;
$t->stops_cleanly;

done_testing();
