# Copies of a database, however they are made, send nothing until somebody enables
# them; and then what they carry is treated as was asked for.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('copied', enable => 0, settings => { 'sentdm.idle_timeout' => '100ms' },
	init => { allows_streaming => 'logical' });
my $node = $t->node;
my $number = 0;

sub next_number
{
	return sprintf '+1555%07d', ++$number;
}

sub send_one
{
	my ($copy, $database) = @_;

	return $copy->safe_psql($database, "SELECT sentdm_send('" . next_number() . "', body => 'x')");
}

# Nothing arrives although the copy has a new message, too, and its launcher had
# time to act; returns the id of the message.
sub sends_nothing
{
	my ($copy, $database, $name) = @_;
	my $before = $t->summary->{requests};
	my $id = send_one($copy, $database);
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	stays_true { $t->summary->{requests} == $before } 0.5, $name;
	return $id;
}

sub state_becomes
{
	my ($copy, $database, $where, $state, $name) = @_;
	my $states;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	eval {
		wait_until
		{
			($states = $copy->safe_psql($database, "SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages WHERE $where")) eq $state
		}
		$name;
	};
	is($states, $state, $name);
	return;
}

# Enable a copy with each choice: what it carries (the messages in @$carried) and
# what is new are treated differently.  A copy with its own row of sentdm.sender
# cannot tell a message that was sent in it before from one that it carries.
sub enable
{
	my ($copy, $database, $pending, $carried) = @_;
	my $in = "id IN ('" . join("','", @$carried) . "')";
	my $before = $t->summary->{requests};
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$copy->safe_psql($database, "SELECT sentdm_enable('$pending')");
	my $id = send_one($copy, $database);
	state_becomes($copy, $database, "id = '$id'", 'accepted', "enabled with '$pending', $database sends what is new");
	state_becomes($copy, $database, $in, { hold => 'queued', send => 'accepted', discard => 'cancelled' }->{$pending},
		"... and '$pending' does what it says");
	is($copy->safe_psql($database, 'SELECT count(*) FROM sentdm.outbox'), 0, '... and nothing waits to be sent');
	is($t->summary->{requests} - $before, 1 + ($pending eq 'send' ? @$carried : 0), '... and Sent got no other request');
	is($copy->safe_psql($database, "SELECT count(*) FROM sentdm.problems WHERE problem = 'held'"), $pending eq 'hold' ? 1 : 0,
		'... and whether messages are on hold is known');
	return;
}

# Another server, for copies to be in.
sub another_server
{
	my ($name, %init) = @_;
	my $server = PostgreSQL::Test::Cluster->new($name);

	$server->init(extra => [ '--encoding=UTF8', '--locale=C' ], %init);
	configure($server);
	$server->append_conf('postgresql.conf', "shared_preload_libraries = 'sentdm'\nmax_prepared_transactions = 5\ninclude 'sentdm.conf'");
	$server->start;
	return $server;
}

# The same settings and the same key: a copy must not need others to be harmless.
sub configure
{
	my ($server, %settings) = @_;
	my $conf = slurp_file($node->data_dir . '/sentdm.conf');

	$conf .= join '', map { "$_ = '$settings{$_}'\n" } keys %settings;
	PostgreSQL::Test::Utils::append_to_file($server->data_dir . '/sentdm.conf', '');
	open my $file, '>', $server->data_dir . '/sentdm.conf' or die $!;
	print $file $conf;
	close $file;
	return;
}

# The original: one message sent, two that wait.

$t->sql('CREATE DATABASE shop');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'shop');
my $first = send_one($node, 'shop');
$t->all_become('accepted', "id = '$first'", 'the original sends', 'shop');
$t->sql('SELECT sentdm_pause()', 'shop');
my @carried = map { send_one($node, 'shop') } 1 .. 2;
my $backup_before = $t->summary->{requests};
$node->backup('clone');

# Dumps, restored on another server

my $other = another_server('other', allows_streaming => 'logical');
my $dump = $node->basedir;

$node->command_ok([ 'pg_dump', '-f', "$dump/plain.sql", '-d', $node->connstr('shop') ], 'a plain dump');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dump/custom", '-d', $node->connstr('shop') ], 'a custom dump');
$node->command_ok([ 'pg_dump', '-C', '-Fc', '-f', "$dump/create", '-d', $node->connstr('shop') ], 'a dump with --create');
$other->safe_psql('postgres', 'CREATE DATABASE plain');
$other->safe_psql('postgres', 'CREATE DATABASE custom');
$other->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', "$dump/plain.sql", '-d', $other->connstr('plain') ], '... are restored');
$other->command_ok([ 'pg_restore', '-e', '-d', $other->connstr('custom'), "$dump/custom" ], '... each');
$other->command_ok([ 'pg_restore', '-e', '-C', '-d', $other->connstr('postgres'), "$dump/create" ], '... in its way');
is($other->safe_psql('postgres', "SELECT array_to_string(setconfig, ',') FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase WHERE datname = 'shop'"),
	'sentdm.enabled=on', 'pg_dump --create carries the setting that enables');
sends_nothing($other, $_, "a restored dump sends nothing: $_") foreach qw(plain custom shop);
$other->restart;
sends_nothing($other, $_, "... nor after a restart: $_") foreach qw(plain custom shop);
is($other->safe_psql($_, "SELECT ok, detail FROM sentdm_health() WHERE name = 'enabled'"), 'f|not enabled: run sentdm_enable()',
	"... which sentdm_health() says: $_") foreach qw(plain custom shop);

# What was sent in them after the restore is theirs, and leaves with the first enable.
foreach my $database (qw(plain custom shop))
{
	$other->safe_psql($database, "SELECT sentdm_cancel(message_id) FROM sentdm.outbox");
}
enable($other, 'plain', 'hold', \@carried);
# One was due before Sent could have forgotten its key, if it had accepted it since, and
# one was written then, to be sent later.
my ($old, $later) = map { send_one($other, 'custom') } 1 .. 2;
$other->safe_psql('custom', "DELETE FROM sentdm.outbox; UPDATE sentdm.messages SET created_at = created_at - interval '23 hours',"
	  . " send_at = CASE id WHEN '$later' THEN created_at END WHERE id IN ('$old', '$later')");
enable($other, 'custom', 'send', [ @carried, $later ]);
is($other->safe_psql('custom', 'SELECT message_id, problem, error_code FROM sentdm.problems'), "$old|uncertain|outcome_unknown",
	'... but what may have been accepted for so long that Sent has forgotten it waits for a person');
$other->safe_psql('custom', "SELECT sentdm_retry('$old')");
state_becomes($other, 'custom', "id = '$old'", 'accepted', '... and is sent when one asks for it');
enable($other, 'shop', 'discard', \@carried);

# A base backup, under another cluster_name (the test module gives each server
# its own) or another environment

sub base_backup
{
	my ($name, $cluster_name, %settings) = @_;
	my $clone = PostgreSQL::Test::Cluster->new($name);

	$clone->init_from_backup($node, 'clone');
	configure($clone, %settings);
	start_as($clone, $cluster_name);
	return $clone;
}

my $clone = base_backup('staging', 'staging');
sends_nothing($clone, 'shop', 'a base backup under another cluster_name sends nothing');
is($clone->safe_psql('shop', "SELECT ok, detail FROM sentdm_health() WHERE name = 'fence'"),
	'f|cluster_name differs from the one that was enabled', '... which sentdm_health() says');
$clone->safe_psql('shop', 'SELECT sentdm_resume()');
sends_nothing($clone, 'shop', '... also when it is resumed');
enable($clone, 'shop', 'hold', \@carried);
$clone->stop;

$clone = base_backup('testing', 'copied', 'sentdm.environment' => 'testing');
$clone->safe_psql('shop', 'SELECT sentdm_resume()');
push my @waiting, @carried, sends_nothing($clone, 'shop', 'a base backup in another sentdm.environment sends nothing');
is($clone->safe_psql('shop', "SELECT ok, detail FROM sentdm_health() WHERE name = 'fence'"),
	'f|sentdm.environment differs from the one that was enabled', '... which sentdm_health() says');
enable($clone, 'shop', 'discard', \@waiting);
$clone->stop;

# Logical replication, everything published, into a database that sends

$t->sql("CREATE TABLE orders (id int PRIMARY KEY, phone text); CREATE TRIGGER tell AFTER INSERT ON orders"
	  . " FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'body=phone'); CREATE PUBLICATION everything FOR ALL TABLES", 'shop');
$other->safe_psql('postgres', 'CREATE DATABASE subscriber');
$other->safe_psql('subscriber', "CREATE EXTENSION sentdm; SELECT sentdm_enable();"
	  . "CREATE TABLE orders (id int PRIMARY KEY, phone text); CREATE TRIGGER tell AFTER INSERT ON orders"
	  . " FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'body=phone')");
my $own = send_one($other, 'subscriber');
state_becomes($other, 'subscriber', "id = '$own'", 'accepted', 'the subscriber sends its own messages');
my $before = $t->summary->{requests};
my $connection = $node->connstr('shop') =~ s{'}{}gr;
$other->safe_psql('subscriber', "CREATE SUBSCRIPTION copies CONNECTION '$connection' PUBLICATION everything");
wait_until { $other->safe_psql('subscriber', "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate NOT IN ('r')") eq '0' }
'the tables are copied';
is($other->safe_psql('subscriber', 'SELECT count(*) FROM sentdm.messages'), 4, 'the messages of the publisher are copied');
$t->sql("SELECT sentdm_pause('again'); INSERT INTO orders SELECT n, '+1555900000' || n FROM generate_series(1, 3) n", 'shop');
$node->wait_for_catchup('copies');
is($other->safe_psql('subscriber', 'SELECT count(*) FROM orders'), 3, '... and rows are applied, into a table with a trigger');
is($other->safe_psql('subscriber', 'SELECT count(*) FROM sentdm.messages'), 7, '... and into the messages');
is($other->safe_psql('subscriber', 'SELECT count(*) FROM sentdm.outbox'), 0, '... but none into its queue');
$other->safe_psql('subscriber', "INSERT INTO sentdm.outbox (message_id, priority, due_at)"
	  . " SELECT id, priority, 'infinity' FROM sentdm.messages WHERE request -> 'to' ->> 0 = '+15559000001'");
$t->sql("SELECT sentdm_cancel(id) FROM sentdm.messages WHERE request -> 'to' ->> 0 = '+15559000001'", 'shop');
$node->wait_for_catchup('copies');
is($other->safe_psql('subscriber', 'SELECT count(*) FROM sentdm.outbox'), 0, 'what leaves the queue of the publisher leaves that of a copy of it');
is($other->safe_psql('subscriber', "SELECT ok FROM sentdm_health() WHERE name = 'fence'"), 't', '... and it is still itself');
is($other->safe_psql('subscriber', "SELECT ok FROM sentdm_health() WHERE name = 'pause'"), 't', '... and not paused');
stays_true { $t->summary->{requests} == $before } 0.5, 'nothing is sent from applied rows';
$own = send_one($other, 'subscriber');
state_becomes($other, 'subscriber', "id = '$own'", 'accepted', '... while the subscriber sends its own messages');
is($t->summary->{requests}, $before + 1, '... only');
$other->safe_psql('subscriber', 'ALTER TABLE orders ENABLE ALWAYS TRIGGER tell');
$t->sql("INSERT INTO orders VALUES (4, '+15559000004')", 'shop');
wait_until { grep { $_->{to}[0] eq '+15559000004' } $t->arrived } 'the message arrives';
is($t->summary->{requests}, $before + 2, 'a trigger that is enabled ALWAYS sends for applied rows, as its owner wants');
$other->safe_psql('subscriber', 'DROP SUBSCRIPTION copies');

# And all the while the original waits.

is($t->sql("SELECT count(*) FROM sentdm.messages WHERE state = 'accepted'", 'shop'), 1, 'the original has not sent anything meanwhile');
$t->sql('SELECT sentdm_resume()', 'shop');
$t->all_become('accepted', "state <> 'cancelled'", 'the original sends its messages', 'shop');
is($t->summary->{max_effects_per_key}, 1, 'nothing was accepted twice');
ok($other->stop('fast'), 'the other server shuts down');
$t->stops_cleanly;

done_testing();
