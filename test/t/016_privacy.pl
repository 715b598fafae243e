# What is kept, for how long, and who sees it: retention by the worker, a person
# who is forgotten, masked numbers, row security.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $secret = 'whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=';
my $t = SentdmTest->new('privacy', standin => [ '--webhook-secret', $secret ]);
my $node = $t->node;
my $handed_on = 0;

$t->sql("SELECT sentdm_set_webhook_secret('$secret')");

# Send, with parameters; how many, as the only recipient of each.
sub send_some
{
	my ($prefix, $n, $arguments) = @_;

	$t->sql("SELECT sentdm_send('+$prefix' || n, 'welcome', '{\"name\": \"Hidden Name\"}'" . ($arguments || '')
		  . ") FROM generate_series(1000, 999 + $n) n");
	return;
}

# Make messages and events so much older than they are.
sub age
{
	my ($interval, $where) = @_;

	$t->sql("UPDATE sentdm.messages SET created_at = created_at - interval '$interval', finished_at = finished_at - interval '$interval' WHERE $where");
	return;
}

# One webhook, signed.
sub receive
{
	my ($body) = @_;

	return $t->sql(<<"SQL");
SELECT r.http_status FROM (SELECT extract(epoch FROM clock_timestamp())::bigint::text AS at) t,
	sentdm_receive_webhook(convert_to(\$b\$$body\$b\$, 'UTF8'), jsonb_build_object('x-webhook-id', 'x', 'x-webhook-timestamp', at,
		'x-webhook-signature', sentdm_sign(\$b\$$body\$b\$, '$secret', 'x', at))) r
SQL
}

sub delivered
{
	my ($sent_id, $number) = @_;

	return receive(qq({"field":"message","event":"message.delivered","payload":{"message_id":"$sent_id","message_status":"DELIVERED",)
		  . qq("outbound_number":"$number","body":"Welcome, Hidden Name!","updated_at":"2026-01-01T10:00:00Z"}}));
}

sub answer_from
{
	my ($number, $text) = @_;
	my $id = $t->sql('SELECT gen_random_uuid()');

	return receive(qq({"field":"message","event":"message.received","payload":{"message_id":"$id","inbound_number":"$number",)
		  . qq("outbound_number":"+15550009999","text":"$text","received_at":"2026-01-01T10:00:00Z"}}));
}

# Texts go first, by themselves

send_some('1555100', 5);
$t->sql("SELECT sentdm_send('+15551009999', body => 'a hidden text', extra => '{\"subject\": \"hidden too\"}')");
$t->all_become('accepted', 'true', 'messages are sent');
my ($id, $sent_id) = split /\|/, $t->sql("SELECT message_id, sent_id FROM sentdm.deliveries WHERE recipient = '+15551001000'");
is(delivered($sent_id, '+15551001000'), 200, 'a receipt comes, with the text in it');
$t->faults({ action => 'status', code => 400 });
my $failed = $t->send("'+15551009998', body => 'a failed text'");
$t->all_become('failed', "id = '$failed'", 'one fails');
my $queued = $t->send("'+15551009997', body => 'a later text', send_at => now() + interval '1 day'");
stays_true { $t->sql("SELECT count(*) FROM sentdm.messages WHERE erased_at IS NOT NULL") == 0 } 0.5,
	'nothing is erased unless that is wanted';
age('1 hour', "id = '$failed'");
$t->set('sentdm.body_retention' => '1s');
$t->becomes("SELECT count(*), count(*) FILTER (WHERE request::text ~* 'hidden') FROM sentdm.messages WHERE erased_at IS NOT NULL", '6|0',
	'with sentdm.body_retention, texts, parameters and further fields go by themselves');
is($t->sql("SELECT request FROM sentdm.messages WHERE id = '$id'"), '{"to": ["+15551001000"], "template": {"name": "welcome"}}',
	'... the rest stays');
$t->becomes("SELECT payload -> 'payload' ? 'body', payload #>> '{payload,message_status}' FROM sentdm.events", 'f|DELIVERED', '... also in events');
is($t->sql("SELECT string_agg(request ->> 'text', ', ' ORDER BY id) FROM sentdm.messages WHERE id IN ('$failed', '$queued')"),
	'a failed text, a later text', '... but not of what was not sent yet, or may be retried');
is($t->sql("SELECT sentdm_retry('$failed')"), 't', 'what failed can be retried');
$t->all_become('accepted', "id = '$failed'", '... with its text');
like($t->last_request->{body}, qr/a failed text/, '... which arrives');
$t->becomes("SELECT request ? 'text' FROM sentdm.messages WHERE id = '$failed'", 'f', '... and then goes too');
my $cancelled = $t->send("'+15551009996', body => 'called off', send_at => now() + interval '1 day'");
is($t->sql("SELECT sentdm_cancel('$cancelled')"), 't', 'a message is cancelled');
$t->becomes("SELECT erased_at IS NOT NULL FROM sentdm.messages WHERE id = '$cancelled'", 't', '... and erased');
is($t->sql("SELECT sentdm_retry('$cancelled')"), 'f', '... so it cannot be retried');
$t->set('sentdm.body_retention' => undef);

# Then the rest, in small batches

$t->sql('CREATE TABLE kept AS SELECT id FROM sentdm.messages');
send_some('1555200', 1500);
$t->sql("SELECT count(*) FROM sentdm_send(ARRAY(SELECT '+1555201' || n FROM generate_series(1000, 2499) n), body => 'x')");
$t->all_become('accepted', "id NOT IN (SELECT id FROM kept)", 'thousands are sent');
send_some('1555300', 3, q(, send_at => now() + interval '1 day'));
age('100 days', "id NOT IN (SELECT id FROM kept)");
$t->sql("INSERT INTO sentdm.events (event, received_at, payload, dedupe_key) SELECT 'message.sent', now() - interval '100 days', '{}', n::text::bytea FROM generate_series(1, 1500) n");
$t->sql("INSERT INTO sentdm.deliveries (sent_id, status, status_at) SELECT gen_random_uuid(), 'sent', now() - n * interval '50 days' FROM generate_series(1, 2) n");
my $session = $t->session;
$session->query_safe("BEGIN; SELECT id FROM sentdm.messages WHERE request -> 'to' ? '+15552001005' FOR UPDATE");
my $position = $t->log_position;
$t->sql('SELECT pg_reload_conf()');		# look at once
$t->becomes("SELECT count(*), count(*) FILTER (WHERE state = 'queued') FROM sentdm.messages WHERE id NOT IN (SELECT id FROM kept)", '4|3',
	'what is older than sentdm.retention goes by itself, what is queued stays, and what is locked is not waited for');
is($t->count_in_log(qr/could not write to the database/, $position), 0, '... without an error');
$t->becomes('SELECT count(*), min(received_at) > now() - interval \'1 day\' FROM sentdm.events', '1|t', '... events too');
$t->becomes("SELECT count(*), count(*) FILTER (WHERE message_id IS NULL) FROM sentdm.deliveries d WHERE NOT EXISTS (SELECT FROM kept JOIN sentdm.messages USING (id) WHERE id = d.message_id)", '2|1',
	'... and deliveries, also those of messages sent elsewhere');
$session->query_safe('COMMIT');
$session->quit;
is($t->sql('SELECT sentdm_prune()'), 2, 'sentdm_prune() takes the rest at once');
is($t->sql('SELECT sentdm_prune()'), 0, '... once');
$id = $t->send("'+15551009990', body => 'x'");
$t->all_become('accepted', "id = '$id'", '... and messages go on being sent');

# A person is forgotten

my $person = '+15554000001';
$t->sql('TRUNCATE sentdm.messages, sentdm.outbox, sentdm.deliveries, sentdm.events');
my $alone = $t->send("'$person', 'welcome', '{\"name\": \"Hidden Name\"}', unique_key => 'once', tag => 'known'");
my $among = $t->sql("SELECT sentdm_send('{+15554000002,$person}'::text[], body => 'for all', tag => 'known')");
$t->all_become('accepted', 'true', 'a person gets messages');
delivered($t->sql("SELECT sent_id FROM sentdm.deliveries WHERE message_id = '$alone'"), $person);
answer_from($person, 'STOP');
answer_from("${person}9", 'from somebody else');
$t->sql("UPDATE sentdm.optouts SET opted_out = false");
my $waiting = $t->send("'$person', body => 'later', send_at => now() + interval '1 day'");
my $shared = $t->sql("SELECT sentdm_send('{+15554000002,$person}'::text[], body => 'for all, soon', send_at => now() + interval '2 seconds')");
is($t->sql("SELECT string_agg(what || ' ' || rows, ', ') FROM sentdm_forget('$person')"),
	'messages cancelled 1, messages 4, deliveries 2, events 2, optouts 0, messages being sent 0', 'sentdm_forget() says how many rows');
is($t->sql("SELECT state FROM sentdm.messages WHERE id = '$waiting'"), 'cancelled', 'what waited for them alone is cancelled');
$node->command_ok([ 'pg_dump', '--data-only', '--exclude-table-data=sentdm.optouts', '-f', $node->basedir . '/dump', '-d', $node->connstr('postgres') ], 'what is left is dumped');
my $dump = PostgreSQL::Test::Utils::slurp_file($node->basedir . '/dump');
unlike($dump, qr/\Q$person\E(?!9)|Hidden Name/, '... and has neither their number nor what was written to them');
like($dump, qr/from somebody else.*\Q${person}9\E/, '... but what belongs to others');
is($t->sql("SELECT request FROM sentdm.messages WHERE id = '$among'"), '{"to": ["+15554000002"], "text": "for all"}', 'others keep their messages');
$t->all_become('accepted', "id = '$shared'", 'what waits for others too is sent');
is_deeply(($t->arrived)[-1]{to}, ['+15554000002'], '... to them');
is($t->sql("SELECT count(*), sum(total) FROM sentdm.progress"), '1|1', 'progress still works');
is($t->sql("SELECT count(*) FROM sentdm.inbound"), 1, '... and so does inbound');
is($t->sql("SELECT sentdm_send('$person', body => 'again', unique_key => 'once')"), $alone, 'a unique key stays used');
is($t->sql("SELECT phone FROM sentdm.optouts"), $person, 'an opt-out stays');
is($t->sql("SELECT string_agg(what || ' ' || rows, ', ') FROM sentdm_forget('$person', keep_opt_out => false) WHERE rows > 0"), 'optouts 1',
	'... unless that is to be forgotten too');
$t->faults({ action => 'latency', ms => 1500 });
my $before = $t->summary->{requests};
$id = $t->send("'$person', body => 'on its way'");
wait_until { $t->summary->{requests} > $before } 'a message is being sent';
my (undef, $out, $warning) = $node->psql('postgres', "SELECT rows FROM sentdm_forget('$person') WHERE what = 'messages being sent'");
is($out, 1, 'a message that is being sent cannot be forgotten');
like($warning, qr/WARNING:  some messages are being sent.*HINT:/s, '... which is said');
$t->all_become('accepted', "id = '$id'", '... and comes to its end');
is($t->sql("SELECT sum(rows) FROM sentdm_forget('$person') WHERE what IN ('messages', 'deliveries', 'messages being sent')"), 2, '... then it can');
like($t->sql_error("SELECT * FROM sentdm_forget('4155550123')"), qr/ERROR:  22023: argument "phone" is not an E.164 number\n/, 'a bad number is an error that does not quote it');

# Who sees what

$t->sql('TRUNCATE sentdm.messages, sentdm.outbox, sentdm.deliveries, sentdm.events, sentdm.optouts');
$t->sql("CREATE ROLE $_ LOGIN") foreach qw(ann bob desk chief);
$t->sql("SELECT sentdm_grant('$_', 'sender'), sentdm_grant('$_', 'reader')") foreach qw(ann bob);
$t->sql("SELECT sentdm_grant('desk', 'reader'), sentdm_grant('chief', 'operator'); GRANT ann TO desk");

sub as
{
	my ($role, $query) = @_;

	return $t->sql("SET SESSION AUTHORIZATION $role; $query");
}

sub error_as
{
	my ($role, $query) = @_;

	return $t->sql_error("SET SESSION AUTHORIZATION $role; $query");
}

$t->faults({ action => 'status', code => 400, message => 'The number 14155550123 is wrong.' });
as('ann', "SELECT sentdm_send('+14155550123', body => 'from ann', tag => 'a')");
$t->becomes("SELECT count(*) FROM sentdm.outbox", 0, 'ann sends');
as('bob', "SELECT sentdm_send('+49301234', body => 'from bob', tag => 'b')");
$t->becomes("SELECT count(*) FROM sentdm.outbox", 0, 'bob sends');
answer_from('+14155550123', 'thank you');
my $shown = 'SELECT recipient FROM sentdm.status ORDER BY tag';
is(as('desk', $shown), "+1415****123\n+4****234", 'a reader sees numbers without their middle');
is(as('desk', 'SELECT contact, line, text FROM sentdm.inbound'), '+1415****123|+15550009999|thank you', '... also of those who answer');
is(as('chief', $shown), "+14155550123\n+49301234", 'an operator sees all of them');
unlike(as('desk', "SELECT string_agg(p::text, ' ') FROM sentdm.problems p") . as('desk', "SELECT string_agg(s::text, ' ') FROM sentdm.status s"), qr/5550123/,
	'... nor in the words of an error');
like(error_as('desk', "SELECT $_"), qr/ERROR:  42501:/, "a reader cannot read $_")
  foreach 'request FROM sentdm.messages', 'recipient FROM sentdm.deliveries', 'payload FROM sentdm.events', 'error FROM sentdm.messages', 'phone FROM sentdm.optouts';
is(as('desk', 'SELECT count(*), count(DISTINCT state) FROM sentdm.messages'), '2|' . $t->sql('SELECT count(DISTINCT state) FROM sentdm.messages'),
	'... but what is no number and no text');
$t->sql('GRANT SELECT (recipient) ON sentdm.deliveries TO desk');
is(as('desk', $shown), "+14155550123\n+49301234", 'one privilege more, and it sees numbers in full');
$t->sql('REVOKE SELECT (recipient) ON sentdm.deliveries FROM desk');

# Each his own

my %counts = (
	messages => 'SELECT count(*) FROM sentdm.messages', status => 'SELECT count(*) FROM sentdm.status',
	progress => 'SELECT count(*) FROM sentdm.progress', deliveries => 'SELECT count(message_id) FROM sentdm.deliveries');

sub sees
{
	my ($role, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is_deeply({ map { $_ => as($role, $counts{$_}) } keys %counts }, { map { $_ => $expected } keys %counts }, $name);
	return;
}

$t->sql('SELECT sentdm_row_security(true)');
is(as($_->[0], 'SELECT count(*) FROM sentdm.problems WHERE message_id IS NOT NULL'), $_->[1], "with row security $_->[0] sees $_->[1] problems")
  foreach [ ann => 1 ], [ bob => 0 ], [ desk => 1 ], [ chief => 1 ];
$t->sql('SELECT sentdm_row_security(false)');
$t->faults();
$t->sql("SELECT sentdm_retry(id) FROM sentdm.messages WHERE state = 'failed'");
$t->all_become('accepted', 'true', 'both are accepted');
sees($_, 2, "without row security $_ sees what everybody sent") foreach qw(ann bob desk chief);
$t->sql('SELECT sentdm_row_security(true)');
sees($_, 1, "with row security $_ sees what was sent in its name") foreach qw(ann bob desk);
is(as('desk', 'SELECT DISTINCT created_by FROM sentdm.messages'), 'ann', '... or by a role it is a member of');
sees('chief', 2, 'an operator sees everything');
is(as('ann', 'SELECT count(*) FROM sentdm.inbound'), 0, 'what nobody here sent is for operators');
is(as('chief', 'SELECT count(*) FROM sentdm.inbound'), 1, '... who see it');
as('bob', "SELECT sentdm_send('+49301235', body => 'more from bob', tag => 'b')");
$t->all_become('accepted', 'true', 'the worker still sends');
is(delivered($t->sql("SELECT sent_id FROM sentdm.deliveries WHERE recipient = '+49301235'"), '+49301235'), 200, '... and webhooks are still applied');
is(as('bob', 'SELECT count(*) FROM sentdm.status WHERE status = \'delivered\''), 1, '... for whoever sent it');
is(as($_->[0], 'SELECT count(id) FROM sentdm.events'), $_->[1], "$_->[0] sees $_->[1] events") foreach [ ann => 0 ], [ bob => 1 ], [ chief => 2 ];
$t->sql('DROP OWNED BY bob; DROP ROLE bob');
is(as('chief', $counts{status}), 3, 'a role that is gone leaves its messages to operators');
is(as('ann', $counts{status}), 1, '... and others see what they saw');
$t->sql('SELECT sentdm_row_security(false)');
is(as('ann', $counts{status}), 3, 'and all of it can be undone');

$t->stops_cleanly;

done_testing();
