# Asking the API from a session: rows, pages, errors by class, interruption; and
# what is kept of the answers.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('ask', settings => { 'sentdm.request_timeout' => '60s' });
my $node = $t->node;

# What is kept

is($t->sql('SELECT sentdm_sync_templates()'), 4, 'templates are fetched');
is($t->sql("SELECT name, status, channels, variables, synced_at > now() - interval '1 minute' FROM sentdm.templates WHERE name = 'order_shipped'"),
	'order_shipped|APPROVED|{sms,whatsapp,rcs}|{name,order_id}|t', '... as typed rows');
$t->sql("INSERT INTO sentdm.templates (id, name, channels, variables) VALUES ('gone', 'gone', '{}', '{}');"
	  . "UPDATE sentdm.templates SET variables = '{}'");
is($t->sql('SELECT sentdm_sync_templates()'), 4, 'fetched again');
is($t->sql("SELECT string_agg(name, ' ' ORDER BY name), count(*) FILTER (WHERE variables = '{}') FROM sentdm.templates"),
	'order_confirmation order_shipped otp welcome|0', '... what changed is changed, and what is gone is gone');
like($t->sql_error("SET sentdm.check_templates = on; SELECT sentdm_send('+15550000009', 'otp')"),
	qr/ERROR:  22023: argument "parameters" lacks "code", a variable of the template/, '... and messages are checked against them');
$t->faults({ match => { method => 'GET' }, action => 'status', code => 500, times => -1 });
my $before = $t->sql('SELECT count(*), max(synced_at) FROM sentdm.templates');
like($t->sql_error('SELECT sentdm_sync_templates()'), qr/ERROR:  08006:/, 'an API that is down is an error');
is($t->sql('SELECT count(*), max(synced_at) FROM sentdm.templates'), $before, '... and what was known stays known');
$t->faults();

$t->sql("SELECT sentdm_send('+1555000$_', body => 'x') FROM generate_series(1, 1)") foreach '0001', '0002', '0003';
$t->all_become('accepted', 'true', 'three people are contacts');
is($t->sql('SELECT sentdm_sync_contacts()'), 1, 'contacts are fetched');
is($t->sql('SELECT phone, opted_out, source FROM sentdm.optouts'), '+15550000003|t|contacts', '... and the one who opted out is noted');
is($t->sql('SELECT sentdm_sync_contacts()'), 0, '... once');
$t->sql("INSERT INTO sentdm.optouts (phone, since, source) SELECT '+1555000000' || n, now() - interval '1 year', source"
	  . " FROM (VALUES (1, 'contact.opt_out'), (2, 'message.received')) v(n, source)");
is($t->sql('SELECT sentdm_sync_contacts()'), 1, 'whom Sent took back is taken back');
is($t->sql('SELECT phone, opted_out, source FROM sentdm.optouts ORDER BY phone'),
	"+15550000001|f|contacts\n+15550000002|t|message.received\n+15550000003|t|contacts",
	'... but not who told us so themselves');
$t->sql("TRUNCATE sentdm.optouts; SELECT sentdm_send('+1555' || n, body => 'x') FROM unnest('{0000004,0000005,1110003,2220003}'::text[]) n");
$t->all_become('accepted', 'true', 'more people are contacts');
$t->sql("INSERT INTO sentdm.optouts (phone, opted_out, since, source) SELECT '+1555' || n, opted_out, now() + since, source"
	  . " FROM (VALUES ('0000004', true, interval '-1 year', 'manual'), ('0000005', true, '1 hour', 'contact.opt_out'),"
	  . "  ('1110003', false, '-1 year', 'contact.opt_in'), ('2220003', false, '1 hour', 'contact.opt_in')) v(n, opted_out, since, source)");
is($t->sql('SELECT sentdm_sync_contacts()'), 2, 'the later word counts');
is($t->sql('SELECT phone, opted_out, source FROM sentdm.optouts ORDER BY phone'),
	"+15550000003|t|contacts\n+15550000004|t|manual\n+15550000005|t|contact.opt_out\n+15551110003|t|contacts\n+15552220003|f|contact.opt_in",
	'... whichever that is, and what was said here');
my $contact = '{"phone_number": "%s", "opt_out": %s}';
$t->faults({ match => { path => '/v3/contacts' }, action => 'status', code => 200, body => sprintf '{"success": true, "data": {"contacts": [%s], "pagination": {"has_more": false}}}',
	join ', ', map { sprintf $contact, @$_ } [ '+15550000006', 'false' ], [ '+15550000006', 'true' ], [ '5550000007', 'true' ], [ '+15550000008', 'null' ] });
is($t->sql('SELECT sentdm_sync_contacts()'), 1, 'of two contacts with one number no counts, and what is no number does not');
is($t->sql("SELECT phone FROM sentdm.optouts WHERE phone ~ '000000[678]'"), '+15550000006', '... nor who said nothing');

# Rows and pages

is($t->sql('SELECT type, name, email, status FROM sentdm_me()'), 'organization|Stand-in Ltd|owner@example.com|approved', 'the account is a row');
is($t->sql("SELECT phone_number, is_valid, country_code, line_type, is_voip FROM sentdm_lookup('+15550000001')"),
	'+15550000001|f|US|mobile|f', 'a number is looked up, its plus sign arriving as one');
like($t->sql_error("SELECT * FROM sentdm_lookup('+1555000000x/../me')"), qr/ERROR:  22023: argument "phone" is not an E.164 number\n/,
	'... and nothing else can be put into its path');
my $people = $t->sql("SELECT count(*) FROM sentdm_send(ARRAY(SELECT '+1555010' || n FROM generate_series(1000, 1249) n), body => 'x')");
$t->all_become('accepted', 'true', 'many more become contacts');
is($t->sql("SELECT count(*), count(DISTINCT id), bool_and(available_channels = '{sms,whatsapp}'), bool_and(created_at < now()) FROM sentdm_contacts()"),
	'257|257|t|t', 'all pages are fetched, each once, as typed rows');
is($t->sql("SELECT jsonb_array_length(sentdm_api('GET', '/v3/contacts?page=3&page_size=100') -> 'contacts')"), 57, '... which are three');

# For a sender profile

my $profile = '7ba7b820-9dad-11d1-80b4-00c04fd430c8';
my $ours = $t->send("'+15550000010', body => 'x'");
my $theirs = $t->send("'+15550000011', body => 'x', profile_id => '$profile'");

$t->all_become('accepted', 'true', 'a message is sent for a profile');
my $their_id = $t->sql("SELECT sent_id FROM sentdm.deliveries WHERE message_id = '$theirs'");
like($t->sql_error("SELECT sentdm_api('GET', '/v3/messages/$their_id')"), qr/ERROR:  02000:/, 'who did not send it may not ask for it');
is($t->sql("SELECT sentdm_api('GET', '/v3/messages/$their_id', NULL, '$profile') ->> 'id'"), $their_id, '... but the profile may');
is($t->sql("SELECT status FROM sentdm_refresh('$_')"), 'queued', 'sentdm_refresh() asks as who sent it') foreach $theirs, $ours;

# Errors by class

my %states = (400 => '22023', 401 => '28000', 403 => '28000', 404 => '02000', 409 => '55006', 418 => '08P01',
	422 => '22023', 429 => '53400', 500 => '08006', 503 => '08006');
foreach my $code (sort keys %states)
{
	$t->faults({ match => { method => 'GET' }, action => 'status', code => $code + 0, message => '+15550000009 is secret', error_code => "CODE_$code" });
	my $error = $t->sql_error('SELECT * FROM sentdm_me()');

	like($error, qr/ERROR:  $states{$code}: the API refused the call with status $code\n.*DETAIL:  Code CODE_$code, request req_\w+\.\n/s,
		"an answer $code is SQLSTATE $states{$code}, with the API's code and request");
	unlike($error, qr/secret/, '... and not in its words');
}
$t->faults({ match => { method => 'GET' }, action => 'garbage' });
like($t->sql_error('SELECT * FROM sentdm_me()'), qr/ERROR:  08P01: /, 'what is not JSON is a violation of the protocol');
$t->faults({ match => { method => 'GET' }, action => 'reset' });
like($t->sql_error('SELECT * FROM sentdm_me()'), qr/ERROR:  08006: the API did not answer\n/, 'a lost connection is one');
like($t->sql_error("SELECT sentdm_api('POST', '/v3/messages', '{}')"), qr/ERROR:  0A000: .*HINT:  Use sentdm_send\(\)/s,
	'messages are not sent past the queue');

# Interruption

sub hangs
{
	$t->faults({ match => { method => 'GET' }, action => 'hang', times => -1 });
	return;
}

# How long a call takes to end once something is done about it.
$t->sql(<<'SQL');
CREATE FUNCTION ms_to_end(pid int, interrupt text) RETURNS numeric LANGUAGE plpgsql AS $$
DECLARE
	began CONSTANT timestamptz := clock_timestamp();
BEGIN
	EXECUTE format('SELECT %I(%s)', interrupt, pid);
	WHILE EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = ms_to_end.pid AND a.state = 'active') LOOP
		PERFORM pg_sleep(0.001), pg_stat_clear_snapshot();
	END LOOP;
	RETURN extract(epoch FROM clock_timestamp() - began) * 1000;
END $$;
SQL
sub milliseconds_to_end
{
	my ($interrupt) = @_;
	my $session = $t->session;
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	hangs();
	$session->query_until(qr/asking/, "\\echo asking\nSELECT * FROM sentdm_me();\n");
	wait_until { $t->sql("SELECT count(*) FROM pg_stat_activity WHERE pid = $pid AND wait_event = 'Extension'") } 'the session waits for the API';
	my $ms = $t->sql("SELECT ms_to_end($pid, '$interrupt')");

	eval { $session->quit };
	return $ms;
}

foreach my $interrupt (qw(pg_cancel_backend pg_terminate_backend))
{
	my @ms = sort { $a <=> $b } map { milliseconds_to_end($interrupt) } 1 .. 3;

	diag(sprintf '%s: %.1f ms at best, %.1f at worst', $interrupt, @ms[ 0, -1 ]);
	cmp_ok($ms[0], '<', 100, "$interrupt ends a call that hangs within 100 ms");
}
my @overdue = map {
	my $ms = $t->sql(<<'SQL');
SET statement_timeout = '200ms';
SELECT clock_timestamp() AS began \gset
\set ON_ERROR_STOP off
SELECT * FROM sentdm_me();
\set ON_ERROR_STOP on
SET statement_timeout = 0;
SELECT extract(epoch FROM clock_timestamp() - :'began') * 1000 - 200;
SQL
	$ms
} 1 .. 3;
cmp_ok((sort { $a <=> $b } @overdue)[0], '<', 100, '... and so does statement_timeout');
cmp_ok((sort { $a <=> $b } @overdue)[0], '>', -10, '... not before its time');
is($t->sql('SELECT count(*) FROM pg_locks WHERE NOT granted'), 0, 'nobody waits for anything');
$t->faults();
is($t->sql('SELECT count(*) FROM sentdm_me()'), 1, '... and the next call works');

# Each call counts, and none waits

$t->set('sentdm.rate_limit' => '60/minute');
$t->send("'+15550000012', body => 'x'");
$t->outbox_drains('a message is sent at 60 a minute');
my $took = $t->sql('SELECT clock_timestamp() AS began \gset' . "\nDO \$\$ BEGIN FOR i IN 1 .. 20 LOOP PERFORM * FROM sentdm_me(); END LOOP; END \$\$;\n"
	  . "SELECT extract(epoch FROM clock_timestamp() - :'began')");
cmp_ok($took, '<', 15, 'twenty calls do not wait for the rate');
my $later = $t->send("'+15550000013', body => 'x'");
stays_true { $t->sql("SELECT state = 'queued' FROM sentdm.messages WHERE id = '$later'") eq 't' } 4, '... but the worker does';
$t->set('sentdm.rate_limit' => 'off');
$t->all_become('accepted', "id = '$later'", '... and without a limit it need not');

$t->stop_standin;
like($t->sql_error('SELECT * FROM sentdm_me()'), qr/ERROR:  08006: the API did not answer\n/, 'an API that cannot be reached is 08006');
$t->set('sentdm.api_key' => undef);
like($t->sql_error('SELECT * FROM sentdm_me()'), qr/ERROR:  28000: .*no API key is set\n.*HINT:/s, '... and without a key it is not called');

$t->stops_cleanly;

done_testing();
