# Everything at once, for $SENTDM_SOAK_SECONDS (30): sessions that commit, roll
# back, cancel and let expire, while Sent, the network and the processes of the
# server fail at random.  Again and again all is left to settle, and checked.
#
# The seed is printed; $SEED repeats its choices, though not their moments.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use POSIX ();
use SentdmChecker;
use SentdmTest;
use Test::More;
use Time::HiRes qw(time usleep);

my $seconds = $ENV{SENTDM_SOAK_SECONDS} || 30;
my $round_s = $seconds < 60 ? $seconds / 2 : 30;
my $loaders = 2;
my $seed = $ENV{SEED} || time ^ $$;

srand($seed = int $seed);
diag("seed $seed");

my $t = SentdmTest->new('soak', settings => {
		log_statement => 'none', log_min_messages => 'log', log_min_error_statement => 'panic', 'sentdm.connect_timeout' => '500ms',
		'sentdm.request_timeout' => '1s', 'sentdm.max_in_flight' => 16, 'sentdm.rate_limit' => '12000/minute' });
my $node = $t->node;
my $checker = SentdmChecker->new($t, rate => [ 12000, 60, 5 ], private => [ qr/\b1555\d{7}\b/, qr/soakbody/, qr/a-key-for-tests/ ]);
my $stop = PostgreSQL::Test::Utils::tempdir() . '/stop';
my (%events, %total, @memory_kb, %loading);

END
{
	my $exit_code = $?;

	kill 'TERM', -$_ foreach keys %loading;
	$? = $exit_code;
}

# About one in seven does not commit; numbers that end in 13 are refused by Sent.
$t->sql(<<'SQL');
CREATE TABLE load_control (stop boolean);
INSERT INTO load_control VALUES (false);
CREATE FUNCTION any_number() RETURNS text LANGUAGE sql VOLATILE
	AS $$ SELECT '+1555' || to_char(floor(random() * 9999999), 'FM0000000') $$;
CREATE FUNCTION any_priority() RETURNS text LANGUAGE sql VOLATILE
	AS $$ SELECT (ARRAY['high', 'normal', 'bulk'])[1 + floor(random() * 3)] $$;
CREATE PROCEDURE load() LANGUAGE plpgsql AS $$
DECLARE
	kind float;
	id uuid;
BEGIN
	WHILE NOT (SELECT stop FROM load_control) LOOP
		kind := random();
		PERFORM set_config('synchronous_commit', CASE WHEN random() < 0.3 THEN 'off' ELSE 'on' END, true);
		IF kind < 0.70 THEN
			PERFORM sentdm_send(any_number(), body => 'soakbody', priority => any_priority());
		ELSIF kind < 0.75 THEN
			PERFORM sentdm_send(ARRAY[any_number(), any_number(), any_number()], body => 'soakbody', channels => '{sms,whatsapp}');
		ELSIF kind < 0.80 THEN
			PERFORM sentdm_send(any_number(), body => 'soakbody', expires_at => clock_timestamp() + random() * interval '2 s');
		ELSIF kind < 0.90 THEN
			id := sentdm_send(any_number(), body => 'soakbody', send_at => clock_timestamp() + random() * interval '1 s');
			COMMIT;
			PERFORM pg_sleep(random() * 0.1);
			COMMIT;
			PERFORM sentdm_cancel(id);
		ELSIF kind < 0.95 THEN
			BEGIN
				PERFORM sentdm_send(any_number(), body => 'soakbody');
				RAISE division_by_zero;
			EXCEPTION WHEN division_by_zero THEN NULL;
			END;
		ELSE
			PERFORM sentdm_send(any_number(), body => 'soakbody');
			ROLLBACK;
		END IF;
		COMMIT;
		PERFORM pg_sleep(random() * 0.03);
	END LOOP;
END $$;
SQL

sub up
{
	wait_until { eval { $node->psql('postgres', 'SELECT') == 0 } } 'the server is up';
	return;
}

# A statement that a crash may interrupt.
sub try_sql
{
	my ($query) = @_;

	return eval { $t->sql($query) };
}

sub pid_of
{
	my ($type) = @_;

	return try_sql("SELECT min(pid) FROM pg_stat_activity WHERE backend_type = '$type'");
}

# As when memory runs out.
sub kill_process
{
	my ($type) = @_;
	my $pid = pid_of($type) || return 0;

	$t->expect_crashes(1) if kill 'KILL', $pid;
	wait_until { !kill 0, $pid } 'it is dead';
	up();
	return 1;
}

# Not before the last process of the former server is gone; until then a failed
# start takes the pid that is left in a file for that of a server.
sub start_again
{
	wait_until { undef $node->{_pid}; $node->start(fail_ok => 1) } 'the server starts';
	up();
	return 1;
}

# What processes and people do.
my %happenings = (
	'kill -9 of the worker' => sub { kill_process('sentdm worker') },
	'kill -9 of the launcher' => sub { kill_process('sentdm launcher') },
	'kill -9 of the postmaster' => sub { $node->kill9; start_again() },
	'immediate shutdown' => sub { $node->stop('immediate'); start_again() },
	'fast shutdown' => sub { $node->stop('fast'); start_again() },
	'the worker is terminated' =>
	  sub { try_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'sentdm worker'") },
	'the queue is locked' => sub { try_sql('BEGIN; LOCK TABLE sentdm.outbox; SELECT pg_sleep(0.7); COMMIT') },
	'a pause' => sub { try_sql('SELECT sentdm_pause()'); usleep(300_000); resume() },
	'a reload' => sub { $node->reload },
	'Sent stands still' => sub { freeze(1.2) });
my @happenings = sort keys %happenings;

# What Sent does to a part of the requests.  (503 has a code of its own, as
# SERVICE_001 says that nothing was accepted.)
my @faults = (
	(map { { action => 'status', code => $_, error_code => 'INTERNAL_001', accept => rand() < 0.5 ? JSON::PP::true : JSON::PP::false } }
		408, 500, 502, 503, 504),
	{ action => 'status', code => 503 },
	{ action => 'status', code => 409 }, { action => 'status', code => 401 }, { action => 'retry_after', value => '1' },
	{ action => 'hang' }, { action => 'hang', accept => JSON::PP::true }, { action => 'latency', ms => 200 },
	(map { { action => $_ } } qw(drop_before drop_after reset truncate garbage endless close_idle)),
	{ action => 'slow', bytes => 20, delay_ms => 5 });

# Refused for good, from the first to the last request.
my $refusal = { action => 'status', code => 400, error_code => 'VALIDATION_002', times => -1, match => { to => '*13' } };

sub freeze
{
	my ($how_long) = @_;

	kill 'STOP', $t->{standin_pid};
	usleep($how_long * 1e6);
	kill 'CONT', $t->{standin_pid};
	return 1;
}

sub resume
{
	return try_sql("SELECT sentdm_resume() WHERE EXISTS (SELECT FROM sentdm.problems WHERE problem = 'paused')");
}

sub any_faults
{
	my @some = map { { times => -1, probability => 0.15, %{ $faults[ rand @faults ] } } } 1 .. 2;

	return rand() < 0.3 ? () : @some;
}

# Sessions that go on as soon as the server is back.
sub start_loaders
{
	my @pids;

	unlink $stop;
	$t->sql('UPDATE load_control SET stop = false');
	$ENV{LOADED} = $node->connstr('postgres');
	foreach (1 .. $loaders)
	{
		defined(my $pid = fork) or die "could not fork: $!";
		if ($pid == 0)
		{
			POSIX::setsid();
			exec 'sh', '-c', 'until [ -e "$0" ]; do psql -Xq -d "$LOADED" -c "CALL load()" 2>/dev/null; sleep 0.05; done', $stop
			  or POSIX::_exit(127);
		}
		push @pids, $pid;
		$loading{$pid} = 1;
	}
	return @pids;
}

sub stop_loaders
{
	my @pids = @_;

	open my $file, '>', $stop or die "could not write $stop: $!";
	close $file;
	$t->sql('UPDATE load_control SET stop = true');
	waitpid $_, 0 foreach @pids;
	delete @loading{@pids};
	return;
}

sub disturb
{
	my ($until) = @_;

	while (time < $until)
	{
		my $what = $happenings[ rand @happenings ];

		$t->faults($refusal, any_faults());
		usleep(1e6 * (0.2 + rand));
		resume();
		if (rand() < 0.6)
		{
			$happenings{$what}->();
			$events{$what}++;
		}
	}
	$t->faults($refusal);
	return;
}

sub count_up
{
	my $summary = $t->summary;

	$total{$_} += $summary->{$_} foreach qw(requests accepted_requests replays);
	$events{"Sent: $_"} += $summary->{faults}{$_} foreach keys %{ $summary->{faults} };
	foreach (split /\n/, $t->sql('SELECT state, count(*) FROM sentdm.messages GROUP BY 1'))
	{
		my ($state, $count) = split /\|/;

		$total{messages} += $count;
		$total{$state} += $count;
	}
	return;
}

my $end = time + $seconds;
my ($round, %wrong) = (0);
while ($round == 0 || time < $end)
{
	$t->faults($refusal);
	my @pids = start_loaders();

	disturb($round == 0 && $seconds < 60 ? time + $round_s : $end < time + $round_s ? $end : time + $round_s);
	up();
	stop_loaders(@pids);
	wait_until { resume(); $t->sql('SELECT count(*) FROM sentdm.outbox') == 0 } 'the queue empties';
	my @violations = $checker->violations;
	$wrong{ (split /:/)[0] }++ foreach @violations;
	ok(!@violations, 'round ' . ++$round . ': every invariant holds') or diag(join "\n", grep { defined } @violations[ 0 .. 9 ]);
	count_up();
	$t->sql('TRUNCATE sentdm.messages, sentdm.deliveries');
	$t->reset_standin;
}

# What it has been through leaves no trace in the worker's memory.
$t->set('sentdm.rate_limit' => 'off');
foreach (1 .. 4)
{
	$t->sql("SELECT sentdm_send(any_number(), body => 'soakbody') FROM generate_series(1, 1000)");
	$t->outbox_drains('after all this the worker works');
	push @memory_kb, $checker->memory_kb;
}
cmp_ok($memory_kb[3] - $memory_kb[1], '<', 256, "... and does not grow (kB: @memory_kb)");

diag(sprintf '%d messages (%s) in %d rounds: lost %d, duplicated %d', $total{messages},
	join(', ', map { "$total{$_} $_" } grep { $total{$_} } qw(accepted failed expired cancelled uncertain)), $round,
	$wrong{I1} || 0, $wrong{I4} || 0);
diag("$total{requests} requests, $total{replays} of them repeated what Sent had accepted already");
diag('survived: ' . join(', ', map { "$events{$_} x $_" } sort keys %events));
diag('violated: ' . join(', ', map { "$_ ($wrong{$_})" } sort keys %wrong)) if %wrong;

$checker->stop;
$t->stops_cleanly;

done_testing();
