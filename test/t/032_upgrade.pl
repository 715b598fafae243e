# pg_upgrade: nothing is sent while it runs, and afterwards the queue goes on where
# it was.  Only one major version is at hand: the one before is written into
# sentdm.sender, as it would have left it, and the rest is real.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;

# One request at a time: while it hangs, the others are due and wait.
my $t = SentdmTest->new('upgraded', settings => { 'sentdm.request_timeout' => '60s', 'sentdm.max_in_flight' => 1 });
my $number = 0;
my $round = 0;

sub send_one
{
	my ($node) = @_;

	return $node->safe_psql('postgres', sprintf q{SELECT sentdm_send('+1555%07d', body => 'x')}, ++$number);
}

# Leave a cluster with one message in hand, which was accepted, and two that are due.
sub fill
{
	my ($node) = @_;
	my $hangs = ($t->summary->{faults}{hang} || 0) + 1;

	$t->faults({ action => 'hang', accept => \1 });
	send_one($node);
	wait_until { ($t->summary->{faults}{hang} || 0) == $hangs } 'a request hangs';
	send_one($node) foreach 1 .. 2;
	return;
}

# Stop a cluster and move it into a new one of the same name.
sub upgrade
{
	my ($old) = @_;
	my $new = PostgreSQL::Test::Cluster->new('new' . ++$round);
	my ($programs) = qx(pg_config --bindir) =~ /(.*)/;
	my $before;

	$new->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
	$new->append_conf('postgresql.conf',
		"shared_preload_libraries = 'sentdm'\ncluster_name = 'upgraded'\n" . slurp_file($t->node->data_dir . '/sentdm.conf'));
	$old->stop;
	$before = $t->summary->{requests};
	# It leaves a script in the directory where it runs.
	command_ok([ 'sh', '-c', 'cd "$0" && exec "$@"', $new->basedir, 'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir, '-b', $programs, '-B', $programs,
			'-s', $new->host, '-p', $old->port, '-P', $new->port ], 'pg_upgrade runs');
	is($t->summary->{requests}, $before, '... and nothing is sent meanwhile, though messages are due');
	start_as($new, 'upgraded');
	return $new;
}

sub nothing_twice
{
	my ($name) = @_;
	my $summary = $t->summary;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is_deeply([ @$summary{qw(max_effects_per_recipient duplicate accepted_requests)} ], [ 1, 0, $number ], $name);
	return;
}

# The servers that pg_upgrade starts know nothing of how the test starts its own: they
# are to find the name that was enabled, or that alone would keep them from sending.
$t->node->append_conf('postgresql.conf', "cluster_name = 'upgraded'");

my $states = q{SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages};

# From another major version

send_one($t->node);
$t->all_become('accepted', 'true', 'the old server sends');
my $identifier = $t->sql('SELECT system_identifier FROM sentdm.sender');
fill($t->node);
$t->sql('UPDATE sentdm.sender SET server_version = server_version - 10000');
$t->sql("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
	  . 'CREATE TRIGGER watch AFTER INSERT ON sentdm.deliveries FOR EACH ROW EXECUTE FUNCTION watch()');
my $new = upgrade($t->node);
node_becomes($new, $states, 'accepted', 'the new server sends what was due, by itself');
nothing_twice('... once, also what was in hand');
is($new->safe_psql('postgres', 'SELECT count(*) FROM sentdm.problems'), 0, '... and needs nobody');
is($new->safe_psql('postgres', "SELECT server_version = current_setting('server_version_num')::int, system_identifier <> $identifier FROM sentdm.sender"),
	't|t', '... and knows who it is now');
is($new->safe_psql('postgres', "SELECT count(*) FROM pg_trigger WHERE tgname = 'watch'"), 1, '... and a trigger on its tables came along');
send_one($new);
node_becomes($new, $states, 'accepted', '... and sends what is new');

# Between clusters of one version.  pg_createsubscriber leaves the same traces on a
# copy, so a person has to say which it is.

fill($new);
my $newer = upgrade($new);
my $before = $t->summary->{requests};
my $fence = q{SELECT ok, detail FROM sentdm_health() WHERE name = 'fence'};
node_becomes($newer, 'SELECT copy_of FROM sentdm.sender', 'this database is a copy from another cluster',
	'without another version it could be a copy of a standby');
is($newer->safe_psql('postgres', $fence), 'f|this database is a copy from another cluster', '... and is fenced');
$newer->safe_psql('postgres', 'UPDATE sentdm.sender SET server_version = server_version - 10000');
$newer->stop;
start_as($newer, 'upgraded');
stays_true { $t->summary->{requests} == $before } 0.5, '... and nothing is sent';
is($newer->safe_psql('postgres', $fence), 'f|this database is a copy from another cluster', '... also when a copy is upgraded later');
like($newer->safe_psql('postgres', 'SELECT hint FROM sentdm.problems'), qr/SELECT sentdm_enable\(\)/, '... and the hint names the command');
$newer->safe_psql('postgres', "SELECT sentdm_enable('send')");
node_becomes($newer, $states, 'accepted', q{sentdm_enable('send') goes on where the old server stopped});
nothing_twice('... and nothing is sent twice');
is($newer->safe_psql('postgres', $fence), 't|this is the database that was enabled', '... and the fence is gone');

ok($newer->stop('fast'), 'the server shuts down');
$t->stop_standin;
done_testing();
