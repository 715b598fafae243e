# docs/recipes.md is true: its SQL, its commands and its programs run, in order, and
# answer what they show there, on a server whose webhooks come by the receiver; a
# second server is the one to move to.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PostgreSQL::Test::Utils;
use SentdmPage;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $scratch = PostgreSQL::Test::Utils::tempdir();
my $t = SentdmTest->new('recipes', enable => 0, standin => [ '--step-ms', '1', '--webhook-secret', $SentdmReceiver::secret ]);

# The old server, with a database as the README leaves it

$t->sql('CREATE DATABASE shop');
$t->sql(<<"SQL", 'shop');
CREATE EXTENSION sentdm;
SELECT sentdm_enable();
SELECT sentdm_set_webhook_secret('$SentdmReceiver::secret');
CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER watch AFTER INSERT ON sentdm.deliveries FOR EACH ROW EXECUTE FUNCTION watch();
CREATE ROLE receiver LOGIN;
SELECT sentdm_grant('receiver', 'webhook');
SQL
my $receiver = SentdmReceiver->new($t->node, environment => { PGDATABASE => 'shop' });

$t->configure_standin(lifecycle => 'auto', webhook_url => "http://127.0.0.1:$receiver->{port}/webhooks/sent");

# The new one

my $new = PostgreSQL::Test::Cluster->new('new');

$new->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
$new->append_conf('postgresql.conf', "shared_preload_libraries = 'sentdm'\ninclude 'sentdm.conf'");
append_to_file($new->data_dir . '/sentdm.conf', slurp_file($t->node->data_dir . '/sentdm.conf'));
$new->start;
append_to_file("$scratch/services", join '', map { "[$_->[0]]\nhost=" . $_->[1]->host . "\nport=" . $_->[1]->port . "\ndbname=shop\n" }
	[ old => $t->node ], [ new => $new ]);

# What others do in the recipes.
my %steps = (
	'bob asks' => sub { $t->control('POST', 'inbound', { from => '+14155550102', text => 'hours?' }) },
	'bob stops' => sub { $t->control('POST', 'inbound', { from => '+14155550102', text => 'STOP' }) },
	'new sends' => sub
	{
		wait_until { $new->safe_psql('shop', 'SELECT count(*) FROM sentdm.outbox WHERE due_at <= now()') eq '0' } 'the new server sends';
	});

my $page = SentdmPage->new($t, "$FindBin::Bin/../../docs/recipes.md", database => 'shop', languages => [ qw(sh python), $ENV{SENTDM_NODE_MODULES} ? 'js' : () ],
	directory => $scratch, steps => \%steps,
	environment => { NODE_PATH => $ENV{SENTDM_NODE_MODULES} || '', PGSERVICEFILE => "$scratch/services" });

$page->works;

# A trigger on a table of the extension

my $triggers = "SELECT (SELECT count(*) FROM pg_proc WHERE proname = 'watch'), (SELECT count(*) FROM pg_trigger WHERE tgname = 'watch')";

is($t->sql($triggers, 'shop_copy'), '1|0', 'a dump carries the function of a trigger on a table of sentdm, and not the trigger');
is($new->safe_psql('shop', $triggers), '1|1', '... which was moved all the same');

# What Sent saw

$t->accepted_once('nothing was sent twice');
my @moved = grep { $_->{to} eq '+14155550177' } $t->effects;

count_is(\@moved, 1, 'what waited while it was moved was sent once');
is_deeply([ map { $_->{profile_id} } grep { $_->{profile_id} } $t->arrived ],
	[ $t->sql('SELECT profile_id FROM tenants ORDER BY role', 'shop') =~ /\S+/g ], 'each tenant sent as its own profile');

my ($anchors, %headings) = ($page->text, map { lc s/[^\w -]//gr =~ s/ /-/gr => 1 } $page->text =~ /^##+ (.*)$/mg);

is(join(' ', grep { !$headings{ s/[^\w-]//gr } } $anchors =~ /\]\(#([^)]+)\)/g), '', 'the table of contents leads somewhere');

$receiver->stops_cleanly;
$new->stop('fast');
$t->stops_cleanly;
done_testing();
