# packaging/monitoring is true: the real sql_exporter reads its numbers as a role that
# may read nothing else, they say what happened, and each that an alert or the
# dashboard names is there; the alerts fire when they should (test/alerts.yml).

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use HTTP::Tiny;
use IPC::Run;
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $packaging = "$FindBin::Bin/../../packaging/monitoring";
my $scratch = PostgreSQL::Test::Utils::tempdir();
my $t = SentdmTest->new('monitoring', standin => [ '--lifecycle', 'off' ]);
my $address;

# The exporter with the file as it is, except for where the database is and how
# long to wait between two looks.
sub start_exporter
{
	my $config = slurp_file("$packaging/sql_exporter.yml");
	my $host = $t->node->host;
	my $port = $t->node->port;

	$config =~ s{postgres://sentdm_monitor\@/app\?host=/var/run/postgresql&}
		{postgres://sentdm_monitor@/postgres?host=$host&port=$port&} or die 'no connection in sql_exporter.yml';
	$config =~ s/interval: 15s/interval: 200ms/ or die 'no interval in sql_exporter.yml';
	append_to_file("$scratch/sql_exporter.yml", $config);
	$address = '127.0.0.1:' . free_port();
	start_process("$PostgreSQL::Test::Utils::log_path/sql_exporter.log",
		'prometheus-sql-exporter', '-config.file', "$scratch/sql_exporter.yml", '-web.listen-address', $address);
	return;
}

# All series as "name col label" => value; label is that of the queue's priority.
sub metrics
{
	my ($where) = @_;
	my $answer = HTTP::Tiny->new(timeout => 10)->get("http://$where/metrics");
	my %metrics;

	return {} unless $answer->{success};
	foreach (split /\n/, $answer->{content})
	{
		my ($name, $labels, $value) = /^(\w+)(?:\{(.*)\})? (\S+)$/ or next;
		my %labels = ($labels // '') =~ /(\w+)="([^"]*)"/g;

		$metrics{join ' ', grep { defined } $name, @labels{qw(col priority)}} = $value;
	}
	return \%metrics;
}

sub metric_becomes
{
	my ($name, $expected, $text) = @_;
	my $value;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	eval {
		wait_until { $value = metrics($address)->{"sql_sentdm_$name"}; defined $value && $value == $expected } $text;
	};
	is($value, $expected, $text);
	return;
}

# Hand an event to the database, signed or not.
sub deliver
{
	my ($status, $signature) = @_;
	my $body = event(uuid(), $status, POSIX::strftime('%Y-%m-%dT%H:%M:%SZ', gmtime));
	my $headers = encode_json({ signed($body), $signature ? ('X-Webhook-Signature' => $signature) : () });

	return $t->sql("SELECT http_status FROM sentdm_receive_webhook(convert_to('$body', 'UTF8'), '$headers')");
}

# Who may read

my $page = slurp_file("$FindBin::Bin/../../docs/monitoring.md");

$t->sql($page =~ /^```sql\n(.*?)^```$/ms);
$t->sql(<<'SQL');
CREATE ROLE watcher LOGIN IN ROLE pg_monitor;
CREATE ROLE stranger LOGIN;
SQL

my @queries = slurp_file("$packaging/sql_exporter.yml") =~ /^ +query: \|\n((?: {6}.*\n)+)/mg;

count_is(\@queries, 4, 'the collector has its queries');
foreach my $query (@queries)
{
	my ($view) = $query =~ /FROM (sentdm\.\w+)/;

	foreach (qw(sentdm_monitor watcher))
	{
		my ($code) = $t->node->psql('postgres', "SET ROLE $_; $query");

		is($code, 0, "$_ may read $view");
	}
	like($t->sql_error("SET ROLE stranger; $query"), qr/permission denied/, '... and others may not');
}
like($t->sql_error('SET ROLE sentdm_monitor; SELECT * FROM sentdm.messages'), qr/permission denied/,
	'who monitors sees no messages');

# What the numbers say

SentdmReceiver->prepare($t);
start_exporter();
metric_becomes('sender enabled', 1, 'the exporter reads that sending is enabled');
metric_becomes('worker launcher', 1, '... and that the launcher runs');

$t->send("'+14155550$_', body => 'x'") foreach 101 .. 103;
$t->all_become('accepted', 'true', 'three messages are sent');
metric_becomes('worker accepted', 3, '... and counted');
$t->faults({ action => 'status', code => 400 });
$t->send(q{'+14155550104', body => 'x'});
metric_becomes('worker failed', 1, 'one is refused');

$t->sql('SELECT sentdm_pause()');
$t->send(q{'+14155550105', body => 'x', priority => 'high', send_at => now() + interval '1 hour'});
$t->send(q{'+14155550106', body => 'x', priority => 'bulk'}) foreach 1 .. 2;
metric_becomes('outbox queued high', 1, 'what waits is counted by priority');
metric_becomes('outbox due high', 0, '... not as due while it is not');
metric_becomes('outbox due bulk', 2, '... and as due when it is');
metric_becomes('sender paused', 1, 'the pause is shown');
$t->sql(q{UPDATE sentdm.outbox SET due_at = now() - interval '1 hour' WHERE priority = 'bulk'});
wait_until { (metrics($address)->{'sql_sentdm_outbox oldest_due_seconds bulk'} // 0) >= 3600 } 'the age is shown';
cmp_ok(metrics($address)->{'sql_sentdm_outbox oldest_due_seconds bulk'}, '<', 3700, 'the age of the oldest is in seconds');
is(metrics($address)->{'sql_sentdm_outbox oldest_due_seconds high'}, 0, '... and 0 where nothing is due');
$t->sql('SELECT sentdm_resume()');
metric_becomes('outbox queued bulk', 0, 'after it, they are sent');
metric_becomes('sender paused', 0, '... and it is not shown any more');

is(metrics($address)->{'sql_sentdm_webhook last_event_time'}, 0, 'no event came yet');
is(deliver('delivered'), 200, 'an event is stored') foreach 1 .. 2;
is(deliver('read'), 200, '... of one that arrived before');
is(deliver('filtered'), 200, '... and one that says that it failed');
is(deliver('delivered', 'v1,AAAA'), 401, '... and one is refused');
metric_becomes('webhook events', 4, 'events are counted');
metric_becomes('webhook delivered', 2, '... those that arrived, once each');
metric_becomes('webhook undelivered', 1, '... those that did not');
metric_becomes('webhook rejected', 1, '... and those refused');
cmp_ok(abs(metrics($address)->{'sql_sentdm_webhook last_event_time'} - time), '<', 120, 'the time of the last one is known');

$t->sql("INSERT INTO sentdm.webhooks (id, url, active) VALUES ('$webhook_id', 'https://hooks.example.com', false)");
metric_becomes('webhook disabled', 1, 'a webhook that Sent has disabled is shown');

$t->set('sentdm.environment' => 'copy');
metric_becomes('sender fenced', 1, 'a fence is shown');
metric_becomes('worker trouble', 1, '... and that nothing is sent');
$t->set('sentdm.environment' => undef);
metric_becomes('sender fenced', 0, '... until it is gone');

# What is named is there

my $receiver = SentdmReceiver->new($t->node);
my %there = (%{ metrics($address) }, %{ metrics("127.0.0.1:$receiver->{health_port}") });

# Is each metric of an expression exported, with each value of its label "col"?
sub names_only_what_is_there
{
	my ($expression, $name) = @_;
	my @missing;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	while ($expression =~ /\b((?:sql|sentdm)_\w+)(?:\{([^}]*)\})?/g)
	{
		my ($metric, $labels) = ($1, $2 // '');
		my ($cols) = $labels =~ /\bcol=~?"([^"]*)"/;

		push @missing, grep { my $wanted = $_; !grep { /^\Q$wanted\E(?: |$)/ } keys %there }
		  map { defined $_ ? "$metric $_" : $metric } $cols ? split /\|/, $cols : undef;
	}
	is("@missing", '', "$name names only metrics that there are");
	return;
}

my %alerts = slurp_file("$packaging/alerts.yml") =~ /- alert: (\w+)\n +expr: (.*?)^ +(?:for|labels):/msg;

cmp_ok(scalar(keys %alerts), '>=', 12, 'the alerts are found');
names_only_what_is_there($alerts{$_}, "alert $_") foreach sort keys %alerts;
is(join(' ', grep { $page !~ /^\|.*`$_`.*\|/m } sort keys %alerts), '', 'the page says what to do about each');

my $dashboard = decode_json(slurp_file("$packaging/dashboard.json"));
my %queries;

foreach my $panel (@{ $dashboard->{panels} })
{
	$queries{"$panel->{title} $_->{refId}"} = $_->{expr} foreach @{ $panel->{targets} };
}
cmp_ok(scalar(keys %queries), '>=', 14, 'the queries of the dashboard are found');
names_only_what_is_there($queries{$_}, "panel $_") foreach sort keys %queries;
is(scalar(distinct(map { $_->{id} } @{ $dashboard->{panels} })), scalar(@{ $dashboard->{panels} }),
	'its panels have numbers of their own');
names_only_what_is_there($_->{query}{query}, "variable $_->{name}")
  foreach grep { ref $_->{query} } @{ $dashboard->{templating}{list} };

sub promtool
{
	my ($name, @arguments) = @_;
	my $output;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok(IPC::Run::run([ 'promtool', @arguments ], '<', \undef, '>&', \$output), $name) or diag($output);
	return;
}

# Prometheus reads the expressions of the dashboard as rules.
append_to_file("$scratch/dashboard.yml", "groups:\n- name: dashboard\n  rules:\n" . join '',
	map { "  - {record: 'panel$_->[0]', expr: '" . $_->[1] =~ s/\$__rate_interval/1m/gr . "'}\n" }
	map { [ $_, $queries{(sort keys %queries)[$_]} ] } 0 .. keys(%queries) - 1);
promtool('Prometheus understands the dashboard', 'check', 'rules', "$scratch/dashboard.yml");
promtool('... and the alerts', 'check', 'rules', "$packaging/alerts.yml");
promtool('the alerts fire when they should', 'test', 'rules', "$FindBin::Bin/../alerts.yml");
my $tested = slurp_file("$FindBin::Bin/../alerts.yml");
is(join(' ', grep { $tested !~ /alertname: $_\b/ } sort keys %alerts), '', '... each of them');

# The numbers are old

$receiver->stops_cleanly;
my $trouble = 'sql_exporter_last_scrape_failed';
is(metrics($address)->{$trouble}, 0, 'the exporter has no trouble to read');
$t->sql(q{SELECT sentdm_revoke('sentdm_monitor', 'monitor')});
wait_until { metrics($address)->{$trouble} == 1 } 'the exporter cannot read';
is(metrics($address)->{$trouble}, 1, '... and says so when it may not');

$t->stops_cleanly;
done_testing();
