# SentdmChecker.pm
#		Whether the promises hold: compares what the stand-in for Sent saw with
#		what the database says, whatever happened in between.
#
# The invariants, under the same names as in test/sim/drain_sim.c:
#
#	I1	committed: accepted by Sent, or at another end, which is true
#	I2	not committed: never seen
#	I3	one key, one body: the one that is stored
#	I4	one message has one effect, unless a person retried it
#	I5	the rate is within the limit in every window
#	I6	nothing is first sent after it expired
#	I7	cancelled: never sent afterwards
#	I8	no transaction of the worker is open while it waits for the network, nor for a second
#	I9	every id that Sent gave is in sentdm.deliveries, and no other
#	I10	the worker's memory does not grow (memory_kb is for the caller to compare)
#	I11	no key, body or number is in the log
#
# To be asked when the queue is empty.  It must not change anything.
package SentdmChecker;

use strict;
use warnings;

use List::Util qw(any);
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;

my $uuid = qr/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/;
my $late_s = 2;	# an arrival may be noted so much later than the request left, or a
				# cancellation have begun so much earlier than it was done
my %samplers;	# processes to be ended with the test: pid => 1

END
{
	my $exit_code = $?;

	end_sampler($_) foreach keys %samplers;
	$? = $exit_code;
}

# What the worker does at a moment, and for how many nanoseconds it has been kept
# from running by other processes: a loaded machine is not to be blamed on it.
my $sample = <<'SQL';
SELECT pid, extract(epoch FROM clock_timestamp()), extract(epoch FROM xact_start), coalesce(wait_event_type || ' ' || wait_event, 'nothing'),
	split_part(pg_read_file('/proc/' || pid || '/schedstat', 0, 100, true), ' ', 2)
FROM pg_stat_activity WHERE backend_type = 'sentdm worker' AND datname = current_database()
SQL
my $longest_s = $ENV{SENTDM_TEST_SLOWNESS} || 1;

# database: whose messages; rate: [amount, seconds, so much less for delays on the
# way]; private: patterns that the log must not have; sample: 0 leaves out I8.
sub new
{
	my ($class, $t, %params) = @_;
	my $self = bless {
		t => $t, database => 'postgres', private => [qr/\b1555\d{7}\b/], log_position => $t->log_position, %params }, $class;

	$self->{samples} = PostgreSQL::Test::Utils::tempdir() . '/samples';
	$self->start_sampler if !defined $self->{sample} || $self->{sample};
	return $self;
}

# Look at the worker ten times a second, also across crashes of the server.
sub start_sampler
{
	my ($self) = @_;
	my $script = "$self->{samples}.sql";
	my $pid;

	open my $file, '>', $script or die "could not write $script: $!";
	print $file "$sample\\watch 0.1\n";
	close $file;
	$ENV{SAMPLED} = $self->{t}->node->connstr($self->{database});
	defined($pid = fork) or die "could not fork: $!";
	if ($pid == 0)
	{
		POSIX::setsid();
		exec 'sh', '-c', 'while :; do psql -XAtq -d "$SAMPLED" -f "$0" 2>/dev/null; sleep 0.1; done >>"$1"',
		  $script, $self->{samples} or POSIX::_exit(127);
	}
	$samplers{ $self->{sampler} = $pid } = 1;
	return;
}

sub end_sampler
{
	my ($pid) = @_;

	delete $samplers{$pid};
	kill 'TERM', -$pid;
	waitpid $pid, 0;
	return;
}

# The last thing before the server stops.
sub stop
{
	my ($self) = @_;

	end_sampler(delete $self->{sampler}) if $self->{sampler};
	return;
}

# Memory of the worker that is its own, in kB; undef: none runs.
sub memory_kb
{
	my ($self) = @_;
	my $pid = $self->{t}->worker_pid($self->{database}) || return;

	return eval { (slurp_file("/proc/$pid/status") =~ /^RssAnon:\s+(\d+)/m)[0] };
}

# As one test.
sub holds
{
	my ($self, $name) = @_;
	my @violations = $self->violations;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok(!@violations, "$name: every invariant holds")
	  or diag(join "\n", scalar(@violations) . ' violations', grep { defined } @violations[ 0 .. 19 ]);
	return !@violations;
}

# Everything that is wrong, each with the name of the invariant.
sub violations
{
	my ($self) = @_;

	$self->{violations} = [];
	$self->read_database;
	$self->read_ledger;
	$self->check_message($_) foreach values %{ $self->{messages} };
	$self->check_keys;
	$self->check_rate if $self->{rate};
	$self->check_deliveries;
	$self->check_samples;
	$self->check_log;
	return @{ $self->{violations} };
}

sub violate
{
	my ($self, $invariant, $what) = @_;

	push @{ $self->{violations} }, "$invariant: $what";
	return;
}

# The rows of a query as hashes; NULL is ''.  PostgreSQL reads the ledger's JSON,
# too: it is much faster than we are.
sub rows
{
	my ($self, $names, $from) = @_;
	my @names = split ' ', $names;

	return map { my %row; @row{@names} = split /\|/, $_, -1; \%row }
	  split /\n/, $self->{t}->sql("SELECT $from", $self->{database});
}

sub read_database
{
	my ($self) = @_;

	$self->{messages} = { map { $_->{id} => $_ } $self->rows('id state generation error_code to sha256 expires_at finished_at', <<'SQL') };
	id, state, generation, error_code, (SELECT string_agg(number, ',') FROM jsonb_array_elements_text(request -> 'to') number),
	encode(sha256(convert_to(request::text, 'UTF8')), 'hex'), extract(epoch FROM expires_at), extract(epoch FROM finished_at)
	FROM sentdm.messages
SQL
	$self->{deliveries} = [ $self->rows('message_id sent_id recipient', 'message_id, sent_id, recipient FROM sentdm.deliveries') ];
	# Of many recipients some may be refused, one by one.
	$self->{refused} = {};
	$self->{refused}{ $_->{message_id} }{ $_->{recipient} } = 1 foreach grep { !$_->{sent_id} } @{ $self->{deliveries} };
	return;
}

# The requests and effects of each message; what belongs to none was not committed.
sub read_ledger
{
	my ($self) = @_;
	my $ledger = "jsonb_array_elements(pg_read_file('" . $self->{t}->save_ledger . "')::jsonb";
	my @entries = $self->rows('key sha256 unix_us mono_us', <<"SQL");
	e ->> 'key', e ->> 'sha256', e ->> 'unix_us', e ->> 'mono_us' FROM $ledger -> 'entries') e ORDER BY (e ->> 'n')::int
SQL
	my @effects = $self->rows('key to channel sent_id',
		"e ->> 'key', e ->> 'to', e ->> 'channel', e ->> 'message_id' FROM $ledger -> 'effects') e");

	$self->{entries} = \@entries;
	$self->{effects} = [];
	$self->assign($_, 'requests') foreach @entries;
	$self->assign($_, 'effects') && push @{ $self->{effects} }, $_ foreach @effects;
	return;
}

sub assign
{
	my ($self, $seen, $list) = @_;
	my ($id, $generation, $part) = $seen->{key} =~ /^sentdm-($uuid)-(\d+)(?:-(\d+))?$/;
	my $message = $id && $self->{messages}{$id};

	@$seen{qw(id generation part)} = ($id, $generation, $part || 0);
	return push @{ $message->{$list} }, $seen if $message;
	$self->violate('I2', 'what was not committed arrived, under the key ' . ($seen->{key} || 'none'));
	return 0;
}

sub check_message
{
	my ($self, $message) = @_;
	my ($id, $state) = @$message{qw(id state)};
	my @requests = @{ $message->{requests} || [] };
	my @effects = grep { $_->{generation} == $message->{generation} } @{ $message->{effects} || [] };
	my %reached = map { $_->{to} => 1 } @effects;
	my %count;

	$self->violate('I1', "$id has come to no end") if $state eq 'queued';
	if ($state eq 'accepted')
	{
		$self->violate('I1', "$id is accepted here, but not by Sent")
		  if any { !$reached{$_} && !$self->{refused}{$id}{$_} } split /,/, $message->{to};
	}
	$self->violate('I1', "$id is $state, but Sent accepted it")
	  if @effects && ($state eq 'expired' || ($state eq 'failed' && $message->{error_code} ne 'worker_crash'));

	$count{"$_->{generation} $_->{to} $_->{channel}"}++ foreach @{ $message->{effects} || [] };
	$self->violate('I4', "$id had an effect $_ times") foreach grep { $_ > 1 } values %count;
	$self->violate('I4', "$id came under a key that nobody asked for")
	  if any { $_->{generation} > $message->{generation} } @requests;

	$self->violate('I6', sprintf '%s first came %.1f s after it expired', $id, $requests[0]{unix_us} / 1e6 - $message->{expires_at})
	  if @requests && $message->{expires_at} && $requests[0]{unix_us} / 1e6 > $message->{expires_at} + $late_s;
	if ($state eq 'cancelled')
	{
		my @after = grep { $_->{unix_us} / 1e6 > $message->{finished_at} + $late_s } @requests;

		# It may have been refused, for the time being, before.
		$self->violate('I7', "$id was cancelled, but Sent accepted it") if @effects;
		$self->violate('I7', "$id was cancelled and came after that") if @after;
	}
	return;
}

sub check_keys
{
	my ($self) = @_;
	my %sha256;

	foreach (@{ $self->{entries} })
	{
		my $message = $_->{id} && $self->{messages}{ $_->{id} } || next;

		$sha256{ $_->{key} } ||= $_->{part} == 0 ? $message->{sha256} : $_->{sha256};
		$self->violate('I3', "$_->{key} came with another body") if $_->{sha256} ne $sha256{ $_->{key} };
	}
	return;
}

# Whatever arrived counts, as it does at Sent.
sub check_rate
{
	my ($self) = @_;
	my ($amount, $seconds, $slack_s) = @{ $self->{rate} };
	my @at = sort { $a <=> $b } map { $_->{mono_us} / 1e6 } @{ $self->{entries} };

	foreach ($amount .. $#at)
	{
		my $took = $at[$_] - $at[ $_ - $amount ];

		$self->violate('I5', sprintf('%d requests in %.2f s, where %d may', $amount + 1, $took, $amount))
		  if $took < $seconds - ($slack_s || 0);
	}
	return;
}

sub check_deliveries
{
	my ($self) = @_;
	my %known = map { $_->{sent_id} => $_ } grep { $_->{sent_id} } @{ $self->{deliveries} };
	my %given = map { $_->{sent_id} => $_ } @{ $self->{effects} };

	foreach (@{ $self->{effects} })
	{
		my $message = $self->{messages}{ $_->{id} };
		my $delivery = $known{ $_->{sent_id} };

		next if $message->{state} ne 'accepted' || $_->{generation} != $message->{generation};
		$self->violate('I9', "the id $_->{sent_id} is not in sentdm.deliveries, or not as that of $_->{id}")
		  if !$delivery || $delivery->{message_id} ne $_->{id} || $delivery->{recipient} ne $_->{to};
	}
	$self->violate('I9', "the id $_ is in sentdm.deliveries, but not from Sent") foreach grep { !$given{$_} } keys %known;
	return;
}

sub check_samples
{
	my ($self) = @_;

	$self->violate('I8', $_) foreach $self->long_transactions;
	return;
}

# The worker's transactions that were too long.  Of the time since a transaction began
# that is left out for which the worker would have run, had it been let: what the kernel
# counted since the last look before it.  And one that is still open at the next look
# must not have waited for the network at both.
sub long_transactions
{
	my ($self) = @_;
	my (%last, %long);

	foreach (split /\n/, -e $self->{samples} ? slurp_file($self->{samples}) : '')
	{
		my ($pid, $now, $began, $waits, $delay_ns) = /^(\d+)\|([\d.]+)\|([\d.]*)\|([^|]*)\|(\d*)$/ or next;
		my $before = $last{$pid} || { delay_ns => 0, began => '' };
		my $same = $began ne '' && $before->{began} eq $began;
		my $look = $last{$pid} = { delay_ns => $delay_ns || 0, began => $began, waits => $waits };

		$look->{delay_ns_before} = $same ? $before->{delay_ns_before} : $before->{delay_ns};
		$self->{looks}++;
		next if $began eq '';
		my $took_s = $now - $began - ($look->{delay_ns} - $look->{delay_ns_before}) / 1e9;
		$long{"$pid $began"} = sprintf 'worker %d is in a transaction for %.2f s, of which %.2f s are its own, and waits for %s', $pid, $now - $began, $took_s, $waits
		  if $took_s > $longest_s || ($same && $waits =~ /^Extension/ && $before->{waits} eq $waits);
	}
	return map { $long{$_} } sort keys %long;
}

# As one test.
sub transactions_are_short
{
	my ($self, $name) = @_;
	my @long = $self->long_transactions;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(!@long && $self->{looks}, $name) || diag(join "\n", @long);
}

sub check_log
{
	my ($self) = @_;
	my $log = $self->{t}->log_since($self->{log_position});

	$self->{log_position} = $self->{t}->log_position;
	foreach my $private (@{ $self->{private} })
	{
		my ($line) = $log =~ /^(.*$private.*)$/m;

		$self->violate('I11', "the log says: $line") if defined $line;
	}
	return;
}

1;
