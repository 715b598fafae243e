# What an administrator sees and does: health, problems, access, idle workers,
# databases that are dropped, copied, dumped and restored.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $t = SentdmTest->new('operate');
my $node = $t->node;
my $number = 0;

sub next_number
{
	return sprintf '+1555%07d', ++$number;
}

sub send_one
{
	my ($arguments, $database) = @_;

	return $t->send("'" . next_number() . "', body => 'x'" . ($arguments || ''), $database);
}

sub state_of
{
	my ($id, $database) = @_;

	return $t->sql("SELECT state FROM sentdm.messages WHERE id = '$id'", $database);
}

sub worker_leaves
{
	my ($name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->becomes('SELECT pid IS NULL FROM sentdm.stat_worker', 't', $name, $database);
	return;
}

# Run the command that a hint of sentdm.problems names.
sub follow_hint
{
	my ($where, $database) = @_;
	my ($command) = $t->sql("SELECT hint FROM sentdm.problems WHERE $where", $database) =~ /(SELECT .*?;)/;

	return $t->sql($command, $database);
}

# Health and problems

my $id = send_one();
$t->all_become('accepted', "id = '$id'", 'a message is sent');
is($t->sql("SELECT string_agg(name, ',') FROM sentdm_health()"),
	'library,launcher,enabled,fence,mode,credentials,pause,worker,api,clock,backlog,problems,webhook secret,triggers,access,webhook endpoint',
		'sentdm_health() looks at everything');
is($t->sql("SELECT string_agg(name, ',') FROM sentdm_health() WHERE NOT ok"), 'webhook secret',
	'... and all is well but the secret that was not set');
$t->sql('SELECT sentdm_set_webhook_secret(\'whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\')');
is($t->sql('SELECT bool_and(ok) FROM sentdm_health()'), 't', '... and with one, everything');
is($t->sql('SELECT count(*) FROM sentdm.problems'), 0, '... and there are no problems');

sub health_of
{
	my ($name) = @_;

	return $t->sql("SELECT ok, detail FROM sentdm_health() WHERE name = '$name'");
}

$t->sql("SELECT sentdm_pause('the office is closed')");
like(health_of('pause'), qr/^f\|paused since .* \(user\): the office is closed$/, 'a pause is not well');
is($t->sql('SELECT problem, error_code, detail FROM sentdm.problems'), 'paused|user|the office is closed',
	'... and is a problem');
$id = send_one();
follow_hint("problem = 'paused'");
$t->all_become('accepted', "id = '$id'", '... and its hint helps');

$t->set('sentdm.mode' => 'hold');
$t->becomes("SELECT ok, detail FROM sentdm_health() WHERE name = 'mode'", 'f|hold', 'mode hold is not well');
$t->becomes("SELECT detail FROM sentdm_health() WHERE name = 'worker'", 'sentdm.mode is hold',
	'... and the worker says so');
$t->set('sentdm.mode' => undef);
$t->becomes('SELECT bool_and(ok) FROM sentdm_health()', 't', '... until it is over');

# The worker's mode counts, not the one of the session that asks.
my $mode = "SET sentdm.mode = 'live'; SELECT detail FROM sentdm_health() WHERE name = 'mode'";
$t->sql("ALTER DATABASE postgres SET sentdm.mode = 'hold'");
$t->becomes($mode, 'hold', 'a running worker notices a mode that is set for its database');
my $requests = $t->summary->{requests};
$id = send_one();
stays_true { $t->summary->{requests} == $requests } 0.3, '... and obeys it';
$t->sql('ALTER DATABASE postgres RESET sentdm.mode');
$t->all_become('accepted', "id = '$id'", '... and that it is reset');
$t->sql("ALTER ROLE ALL SET sentdm.mode = 'hold'");
$t->becomes($mode, 'hold', '... also when it is set for all roles');
$t->sql('ALTER ROLE ALL RESET sentdm.mode');
$t->becomes($mode, 'live', '... and reset');
$t->sql("BEGIN; SAVEPOINT a; DROP EXTENSION sentdm; ROLLBACK TO a; COMMIT; BEGIN; SAVEPOINT a; SELECT sentdm_disable(); ROLLBACK TO a; COMMIT");
is($t->sql("SELECT sentdm_send('" . next_number() . "', body => 'x'); SELECT enabled FROM sentdm.worker_report()") =~ /t$/, 1,
	'what a savepoint undid has not disabled sending');

$t->set('sentdm.api_key' => undef);
is(health_of('credentials'), 'f|no API key is set', 'a missing key is not well');
$t->becomes("SELECT error_code, detail FROM sentdm.problems WHERE problem = 'paused'", 'credentials|no API key is set',
	'... and a problem');
$t->set('sentdm.api_key' => 'short');
like(health_of('credentials'), qr/^f\|the API key is shorter/, 'a short key is not well');
$t->set('sentdm.api_key' => 'a-key-for-tests-0123456789');
$t->becomes('SELECT count(*) FROM sentdm.problems', 0, '... and with a key sending goes on by itself');

$t->set('sentdm.base_url' => 'http://192.0.2.1');
is(health_of('credentials'), 'f|sentdm.base_url is http to an address that is not loopback',
	'a base URL without TLS is not well');
$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'credentials', '... and a problem');
$t->set('sentdm.base_url' => $t->url);
follow_hint("problem = 'paused'") if $t->sql("SELECT count(*) FROM sentdm.problems WHERE problem = 'paused'");
$id = send_one();
$t->all_become('accepted', "id = '$id'", '... until it is set right');

$t->set('sentdm.api_key_file' => '/nowhere');
is(health_of('credentials'), 'f|both sentdm.api_key and sentdm.api_key_file are set; the first one is used',
	'a key in two places is not well');
$t->set('sentdm.api_key_file' => undef);
$node->stop;
{
	local $ENV{SENT_DM_API_KEY} = 'a-key-of-the-environment';
	$node->start;
}
is(health_of('credentials'), 'f|an API key is set here and as SENT_DM_API_KEY in the environment; that one is not used',
	'... nor is one in the environment too');
$node->restart;
is(health_of('credentials'), 't|an API key is set', '... and one is enough');

$t->configure_standin(clock_skew_s => -120);
send_one();
$t->becomes("SELECT ok, detail ~ '^-1(19|20|21) s from Sent' FROM sentdm_health() WHERE name = 'clock'", 'f|t', 'a clock that is two minutes fast is not well');
$t->configure_standin(clock_skew_s => 0);
send_one();
$t->becomes("SELECT ok, detail ~ '^-?[01] s from Sent' FROM sentdm_health() WHERE name = 'clock'", 't|t', '... until it is right');

$t->faults({ action => 'status', code => 400 });
$id = send_one();
$t->becomes("SELECT ok, detail FROM sentdm_health() WHERE name = 'problems'", 'f|1 message failed or is uncertain',
	'a failed message is not well');
is(follow_hint("problem = 'failed'"), 't', '... and its hint');
$t->all_become('accepted', "id = '$id'", '... helps');

# Access

my $members = <<'SQL';
SELECT d.classid, d.objid, pg_describe_object(d.classid, d.objid, 0) AS name
FROM pg_depend d JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
WHERE d.deptype = 'e' AND e.extname = 'sentdm'
SQL
cmp_ok($t->sql("SELECT count(*) FROM ($members) m"), '>', 40, 'the extension has its objects');
is($t->sql(<<"SQL"), '', 'every object of the extension has a comment');
SELECT name FROM ($members) m WHERE obj_description(objid, classid::regclass::text) IS NULL
	AND classid NOT IN ('pg_type'::regclass)	-- the row types of relations
	AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = objid AND c.relkind = 'S')
ORDER BY name
SQL
isnt($t->sql("SELECT obj_description(oid, 'pg_extension') FROM pg_extension WHERE extname = 'sentdm'"), '',
	'... and so has the extension');
is($t->sql(<<"SQL"), '', 'PUBLIC may run only the pure functions');
SELECT name FROM ($members) m JOIN pg_proc p ON p.oid = objid AND classid = 'pg_proc'::regclass
WHERE has_function_privilege('public', p.oid, 'EXECUTE') <> (p.proname IN ('sentdm_verify_signature', 'sentdm_sign'))
SQL
is($t->sql(<<"SQL"), '', '... and may do nothing with a relation or a schema');
SELECT name FROM ($members) m LEFT JOIN pg_class c ON c.oid = objid AND classid = 'pg_class'::regclass
WHERE CASE WHEN classid = 'pg_namespace'::regclass THEN has_schema_privilege('public', objid, 'USAGE, CREATE')
	WHEN c.relkind = 'S' THEN has_sequence_privilege('public', c.oid, 'USAGE, SELECT, UPDATE')
	WHEN c.oid IS NOT NULL THEN has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
		OR has_any_column_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, REFERENCES') END
SQL
is($t->sql(<<"SQL"), '', 'no function with the rights of its owner has a search_path of the caller');
SELECT name FROM ($members) m JOIN pg_proc p ON p.oid = objid AND classid = 'pg_proc'::regclass
WHERE prosecdef AND NOT coalesce(proconfig::text LIKE '%search_path=pg_catalog, pg_temp%', false)
SQL

# What each kind of access can read and run; what is not named here must be denied.
my %reads = (
	stat => [qw(stat_worker stat_outbox stat_webhook)],
	data => [qw(messages deliveries events inbound status progress problems)],
	inside => [qw(outbox sender)],
	nobody => [qw(webhook_secrets)]);
my %access = (
	nothing => [], sender => [], webhook => [], monitor => ['stat'], reader => ['data'], operator => [ 'stat', 'data', 'inside' ]);
my %runs = (
	"sentdm_send('+15550000000', body => 'x', send_at => now() + interval '1 day')" => 'sender operator',
	'sentdm_cancel(gen_random_uuid())' => 'sender operator',
	"sentdm_receive_webhook('', '{}')" => 'webhook',
	'sentdm_health()' => 'monitor operator',
	'sentdm_retry(gen_random_uuid())' => 'operator',
	'sentdm_me()' => 'operator',
	"sentdm_pause('by an operator')" => 'operator',
	'sentdm_resume()' => 'operator',
	"sentdm_grant('nothing', 'operator')" => '',
	"sentdm_sign('x'::text, 'a secret')" => 'nothing sender webhook monitor reader operator');
# Which of these statements a role may run; they are run, in one session.
sub allowed
{
	my ($role, @statements) = @_;
	my ($code, $out) = $node->psql('postgres',
		"SET SESSION AUTHORIZATION $role;\n" . join('', map { "$statements[$_];\n\\echo outcome $_ :SQLSTATE\n" } 0 .. $#statements),
		on_error_stop => 0);
	my %outcome = $out =~ /^outcome (\d+) (\w+)$/mg;

	return map { $statements[$_] } grep { $outcome{$_} ne '42501' } 0 .. $#statements;
}

sub readings
{
	return map { "SELECT count(*) FROM sentdm.$_" } map { @{ $reads{$_} } } @_;
}

$t->sql("CREATE ROLE $_ LOGIN") foreach keys %access;
foreach my $kind (sort keys %access)
{
	my @expected = (readings(@{ $access{$kind} }), map { "SELECT $_" } grep { $runs{$_} =~ /\b$kind\b/ } keys %runs);

	$t->sql("SELECT sentdm_grant('$kind', '$kind')") if $kind ne 'nothing';
	is_deeply([ sort(allowed($kind, readings(keys %reads), map { "SELECT $_" } sort keys %runs)) ], [ sort @expected ],
		"access as $kind: exactly what belongs to it");
}
$t->sql("SELECT sentdm_revoke('operator', 'operator')");
is_deeply([ allowed('operator', readings(keys %reads), 'SELECT sentdm_resume()') ], [],
	'what was granted can be revoked, all of it');
$t->sql('CREATE ROLE watcher LOGIN IN ROLE pg_monitor');
is_deeply([ sort(allowed('watcher', readings(keys %reads), map { "SELECT $_" } grep { !/sign/ } sort keys %runs)) ],
	[ sort(readings('stat')) ],
	'a member of pg_monitor can read the statistics, and nothing else');
$t->sql("SELECT sentdm_cancel(id) FROM sentdm.messages WHERE state = 'queued'; SELECT sentdm_resume()");

# A worker with nothing to do

$t->set('sentdm.idle_timeout' => '100ms');
worker_leaves('an idle worker leaves');
# The launcher starts one once more after a reload, in case the former missed it.
$t->becomes("SELECT ok, detail FROM sentdm_health() WHERE name = 'worker'", 't|resting', '... which is well');
my @latency_ms;
foreach my $round (1 .. 5)
{
	my ($sent, $us) = split /\n/, $t->sql("SELECT sentdm_send('" . next_number()
		  . "', body => 'x'); SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint");

	wait_until { state_of($sent) eq 'accepted' } 'the message is accepted';
	push @latency_ms, (($t->arrived)[-1]{unix_us} - $us) / 1000;
	wait_until { !$t->worker_pid } 'the worker left';
}
@latency_ms = sort { $a <=> $b } @latency_ms;
diag(sprintf 'from commit to arrival when a worker has to be started: median %.0f ms, slowest %.0f ms', @latency_ms[ 2, 4 ]);
cmp_ok($latency_ms[2], '<', 500, 'a message starts it again at once');
$id = send_one(q{, send_at => clock_timestamp() + interval '1500 ms'});
worker_leaves('a worker does not wait for what is due much later');
is(state_of($id), 'queued', '... though it is not sent yet');
$t->all_become('accepted', "id = '$id'", '... but is there in time');
cmp_ok($t->sql("SELECT extract(epoch FROM finished_at - send_at) FROM sentdm.messages WHERE id = '$id'"), '<', 1,
	'... to the second');
$t->set('sentdm.idle_timeout' => undef);

# Other databases

$t->sql("CREATE DATABASE $_") foreach qw(one two);
$t->sql('CREATE EXTENSION sentdm', 'one');
$t->sql('CREATE SCHEMA messaging; CREATE EXTENSION sentdm SCHEMA messaging', 'two');
my $two_sends = join ';', map { "SELECT sentdm_send('" . next_number() . "', body => 'x')" } 1 .. 2;
my (undef, undef, $warning) = $node->psql('one', $two_sends);
is(() = $warning =~ /WARNING:  the message is queued, but sending is not enabled in this database/g, 1,
	'where sending is not enabled a session is warned, once');
is($t->sql('SELECT problem, hint FROM sentdm.problems', 'one'), 'not enabled|SELECT sentdm_enable();',
	'... and it is a problem');
is($t->sql("SELECT ok, detail FROM sentdm_health() WHERE name = 'fence'", 'one'), 't|no database was enabled yet',
	'... and there is nothing to be fenced');
$t->sql('SELECT messaging.sentdm_enable()', 'two');
$id = $t->sql("SET search_path = ''; SELECT messaging.sentdm_send('" . next_number() . "', body => 'x')", 'two');
$t->all_become('accepted', "id = '$id'", 'each enabled database has a worker', 'two');
like($t->sql("SET search_path = ''; SELECT name FROM messaging.sentdm_me()", 'two'), qr/Stand-in/, '... wherever its functions are');
is($t->sql('SELECT count(DISTINCT datname) FROM pg_stat_activity WHERE backend_type = \'sentdm worker\''), 2,
	'... of its own');
is($t->sql("SELECT count(*) FROM sentdm.messages WHERE state = 'queued'", 'one'), 2,
	'... and the other keeps its messages');
is($t->sql('SELECT count(*) FROM sentdm.problems', 'one'), 1, 'messages that waited for sentdm_enable()');
follow_hint("problem = 'not enabled'", 'one');
$t->all_become('accepted', 'true', '... are sent then', 'one');

sub drops
{
	my ($database, $options, $name) = @_;
	my $began = Time::HiRes::time();
	my $code = $node->psql('postgres', "DROP DATABASE $database $options");
	my $seconds = Time::HiRes::time() - $began;

	ok($code == 0 && $seconds < 3, sprintf '%s (%.2f s)', $name, $seconds);
	return;
}

$t->sql('SELECT messaging.sentdm_disable()', 'two');
worker_leaves('sentdm_disable() stops the worker', 'two');
drops('two', '', '... and the database can be dropped');
drops('one', 'WITH (FORCE)', 'a database with a worker can be dropped with FORCE');
$t->sql('CREATE DATABASE three');
drops('three', '', 'a database without sentdm can be dropped at once');
$id = send_one();
$t->all_become('accepted', "id = '$id'", 'other databases go on');

# The extension goes while a request is under way

$t->sql('CREATE DATABASE going');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'going');
$t->faults({ action => 'latency', ms => 500 });
my $before = $t->summary->{requests};
my $position = $t->log_position;
send_one('', 'going');
send_one(q{, send_at => now() + interval '1 second'}, 'going');
wait_until { $t->summary->{requests} > $before } 'a request is under way';
$t->sql('DROP EXTENSION sentdm', 'going');
is($t->sql("SELECT count(*) FROM pg_namespace WHERE nspname = 'sentdm'", 'going'), 0,
	'the extension can be dropped while a request is under way');
$t->becomes("SELECT count(*) FROM pg_stat_activity WHERE datname = 'going' AND backend_type = 'sentdm worker'", 0,
	'... and its worker leaves');
is($t->count_in_log(qr/(?:ERROR|FATAL|PANIC):/, $position), 0, '... without an error');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'going');
is($t->sql('SELECT count(*) FROM sentdm.messages', 'going'), 0, 'made anew it is empty');
$t->faults({ action => 'latency', ms => 500 });
$before = $t->summary->{requests};
send_one('', 'going');
wait_until { $t->summary->{requests} > $before } 'a request is under way';
$t->sql('DROP EXTENSION sentdm; CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'going');
$id = send_one('', 'going');
$t->all_become('accepted', "id = '$id'", 'made anew while a request is under way, it works', 'going');
is($t->sql('SELECT count(*) FROM sentdm.deliveries', 'going'), 1, '... and knows nothing of what was under way before');
$t->sql('DROP EXTENSION sentdm; CREATE EXTENSION sentdm', 'going');
$warning = ($node->psql('going', "SELECT sentdm_send('" . next_number() . "', body => 'x')"))[2];
is(() = $warning =~ /WARNING:  the message is queued, but sending is not enabled in this database/g, 1,
	'made anew and not enabled, a session is warned');
$node->restart;
$t->becomes('SELECT enabled FROM sentdm.worker_report()', 'f', '... and after a restart it is known, too', 'going');
$t->sql('SELECT sentdm_enable()', 'going');
$t->sql('SELECT sentdm_disable()', 'going');

# Copies.  The original waits, so that all of them carry the same messages.

$t->sql('CREATE DATABASE original');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'original');
$id = send_one('', 'original');
$t->all_become('accepted', "id = '$id'", 'the original sends', 'original');
$t->sql("SELECT sentdm_pause(); SELECT sentdm_set_webhook_secret('whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=')",
	'original');
my @carried = map { send_one($_, 'original') } '', ", priority => 'high'", q{, send_at => now() + interval '1 s'};
$t->set('sentdm.idle_timeout' => '100ms');
worker_leaves('its worker leaves it free to be copied', 'original');
$t->sql("CREATE DATABASE $_ TEMPLATE original") foreach qw(holding discarding);

my $dump = $node->basedir . '/dump.sql';
$t->sql('CREATE DATABASE restored');
$node->command_ok([ 'pg_dump', '-f', $dump, '-d', $node->connstr('original') ], 'the original can be dumped');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', $dump, '-d', $node->connstr('restored') ],
	'... and restored');
is(PostgreSQL::Test::Utils::slurp_file($dump) =~ /whsec_|COPY sentdm\.(?:outbox|sender|webhook_secrets)/, '',
	'... without secrets, queue and identity');
is($t->sql('SELECT count(*), count(*) FILTER (WHERE state = \'queued\') FROM sentdm.messages', 'restored'), '4|3',
	'... with its messages');

$before = $t->summary->{requests};
# As a copy of the whole cluster, or pg_dump --create, would have it.
$t->sql("ALTER DATABASE $_ SET sentdm.enabled = on") foreach qw(holding discarding restored);
$position = $t->log_position;
$node->restart;
wait_until { $t->count_in_log(qr/WARNING:  sentdm sends nothing from this database: this database is a copy/, $position) >= 2 }
'the copies are fenced';
send_one('', $_) foreach qw(holding discarding restored);
stays_true { $t->summary->{requests} == $before } 1.2, 'copies send nothing, whatever their settings say';
is($t->sql("SELECT detail FROM sentdm_health() WHERE name = 'fence'", 'holding'), 'this database is a copy of another database',
	'... and sentdm_health() says why');
is($t->sql('SELECT problem, hint FROM sentdm.problems WHERE problem = \'fenced\'', 'holding'), 'fenced|If this database is to send: SELECT sentdm_enable();',
	'... and it is a problem, with a hint');
is($t->sql("SELECT string_agg(problem, ',') FROM sentdm.problems", 'restored'), 'not enabled',
	'a restored dump is not enabled');

# A copy cannot tell what was sent in it from what it carries; a restored dump can.
foreach ([ 'holding', "problem = 'fenced'", 4 ], [ 'restored', "problem = 'not enabled'", 3 ])
{
	my ($copy, $where, $held) = @$_;

	follow_hint($where, $copy);
	$id = send_one('', $copy);
	$t->all_become('accepted', "id = '$id'", "sentdm_enable() in the copy \"$copy\": what is sent from now on leaves", $copy);
	is($t->sql("SELECT count(*) FROM sentdm.messages WHERE state = 'queued'", $copy), $held,
		'... and what it carries stays on hold');
	is($t->sql("SELECT problem, detail FROM sentdm.problems", $copy), "held|$held messages from before sentdm_enable() are on hold",
		'... which is a problem');
	$t->sql("SELECT sentdm_cancel(id) FROM sentdm.messages WHERE state = 'queued' AND priority = 'high'", $copy);
	$held--;
	like($t->sql('SELECT detail FROM sentdm.problems', $copy), qr/^$held messages/,
		'... as long as somebody has to decide about it');
}
is($t->summary->{requests}, $before + 3, 'nothing else was sent');

$t->sql("SELECT sentdm_enable('discard')", 'discarding');
is($t->sql('SELECT state, count(*) FROM sentdm.messages GROUP BY 1 ORDER BY 1', 'discarding'), "accepted|1\ncancelled|4",
	 "sentdm_enable('discard') cancels what the copy carries");
$t->sql('SELECT sentdm_resume()', 'original');
$t->all_become('accepted', 'true', 'the original sends its messages', 'original');
my $accepted = $t->summary->{accepted_requests};
follow_hint("problem = 'held'", 'holding');
$t->all_become('accepted', "state <> 'cancelled'", "sentdm_enable('send') sends what the copy carries", 'holding');
is($t->sql('SELECT count(*) FROM sentdm.problems', 'holding'), 0, '... and the problem is gone');
is($t->summary->{accepted_requests}, $accepted + 1, '... and those that the original sent do not arrive twice');
is($t->summary->{max_effects_per_recipient}, 1, 'nobody got anything twice');
is($t->sql("SELECT count(*) FROM sentdm.messages WHERE state = 'queued'", 'restored'), 2,
	'the other copy still holds its messages');
$t->sql("SELECT sentdm_enable('discard')", 'restored');
$t->sql('SELECT sentdm_disable()', $_) foreach qw(original holding discarding restored);
$t->set('sentdm.idle_timeout' => undef);

# Another environment

$id = send_one();
$t->all_become('accepted', "id = '$id'", 'at home messages are sent');
$t->set('sentdm.environment' => 'staging');
my $fence = 'sentdm.environment differs from the one that was enabled';
is(health_of('fence'), "f|$fence", 'a changed sentdm.environment is a fence');
$t->becomes('SELECT trouble FROM sentdm.stat_worker', $fence, '... which the worker obeys');
$before = $t->summary->{requests};
$id = send_one();
stays_true { $t->summary->{requests} == $before } 0.4, '... and nothing is sent';
$node->restart;
stays_true { $t->summary->{requests} == $before } 0.6, '... and after a restart';
$t->set('sentdm.environment' => undef);
$t->all_become('accepted', "id = '$id'", '... and back at home the message is sent');

$node->stop;
start_as($node, 'elsewhere');
is(health_of('fence'), 'f|cluster_name differs from the one that was enabled', 'a changed cluster_name is a fence');
$before = $t->summary->{requests};
$id = send_one();
stays_true { $t->summary->{requests} == $before } 0.6, '... through which nothing passes';
$t->sql("SELECT sentdm_enable('send')");
$t->all_become('accepted', "id = '$id'", '... until an administrator enables it there');
$node->stop;
$node->start;
like(health_of('fence'), qr/^f\|cluster_name/, '... and then it is the former name that is fenced');
$t->sql('SELECT sentdm_enable()');

# Without the library

$node->adjust_conf('postgresql.conf', 'shared_preload_libraries', "''");
$node->restart;
($id, $warning) = ($node->psql('postgres', "SELECT sentdm_send('" . next_number() . "', body => 'x')"))[ 1, 2 ];
like($warning, qr/WARNING:  the message is queued, but the sentdm library is not preloaded/,
	'without the library in shared_preload_libraries a sender is warned');
is($t->sql("SELECT string_agg(name, ',') FROM sentdm_health() WHERE NOT ok"), 'library,launcher',
	'... and sentdm_health() says so');
$node->adjust_conf('postgresql.conf', 'shared_preload_libraries', "'sentdm'");
$node->restart;
$t->all_become('accepted', "id = '$id'", '... and the message waits for it');

# It may go in the very moment between the launcher's look and the start.
cmp_ok($t->count_in_log(qr/FATAL:  database \d+ does not exist/), '<=', 1, 'no worker is started again and again for a database that is gone');
is($t->sql("SELECT string_agg(problem || ' ' || detail, ',') FROM sentdm.problems"), '', 'no problem is left');
$t->stops_cleanly;

done_testing();
