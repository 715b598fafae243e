# A webhook endpoint registered from SQL: its secret is kept and rotated, and what
# it missed is fetched from Sent's log.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use JSON::PP;
use SentdmReceiver;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('registration', standin => [ '--lifecycle', 'auto' ]);

$t->sql("CREATE ROLE receiver LOGIN; SELECT sentdm_grant('receiver', 'webhook')");

my $receiver = SentdmReceiver->new($t->node);
my $url = "http://127.0.0.1:$receiver->{port}/webhooks/sent";

# Registration

like($t->sql_error("SELECT sentdm_create_webhook('ftp://example.com/')"), qr/ERROR:  22023: argument "url"/,
	'what is no URL is refused');
like($t->sql_error('SELECT sentdm_create_webhook(NULL)'), qr/ERROR:  22023: argument "url"/, '... and so is none');

my $id = $t->sql("SELECT sentdm_create_webhook('$url')");

like($id, qr/^[0-9a-f-]{36}$/, 'an endpoint is registered');
is($t->sql("SELECT url FROM sentdm.webhooks WHERE id = '$id'"), $url, '... and known here');
is($t->sql("SELECT w ->> 'endpoint_url', w -> 'event_types', w ->> 'retry_count' FROM sentdm_api('GET', '/v3/webhooks/$id') w"),
	qq($url|["message", "contact", "templates"]|5), '... with the events that are understood here');
is($t->sql('SELECT count(*), count(DISTINCT webhook_id), count(valid_until) FROM sentdm.webhook_secrets'), '1|1|0',
	'its secret is kept');
like($t->sql_error("SELECT sentdm_create_webhook('$url')"), qr/ERROR:  42710: .*HINT:.*sentdm_rotate_webhook_secret/s,
	'a second one with the same URL would bring every event twice, and is refused');

my $message = $t->send("'+15550000020', body => 'x'");

$t->becomes("SELECT status FROM sentdm.deliveries WHERE message_id = '$message'", 'delivered', 'receipts arrive, signed with that secret');

# Rotation

my $secrets = 'SELECT count(*), count(valid_until) FROM sentdm.webhook_secrets';

$t->sql("SELECT sentdm_rotate_webhook_secret('$id')");
is($t->sql($secrets), '2|1', 'the old secret stays valid for a while');
like($t->sql("SELECT extract(epoch FROM valid_until - now())::int FROM sentdm.webhook_secrets WHERE valid_until IS NOT NULL"),
	qr/^86[34]\d\d$/, '... which is a day');
$message = $t->send("'+15550000020', body => 'x'");
$t->becomes("SELECT status FROM sentdm.deliveries WHERE message_id = '$message'", 'delivered', 'receipts arrive with the new one');
is($t->sql("BEGIN; SELECT sentdm_rotate_webhook_secret('$id', '1 hour'); $secrets; ROLLBACK; $secrets"), "\n3|2\n2|1",
	'what is rolled back is not kept');
$t->sql("SELECT sentdm_rotate_webhook_secret('$id')");
$message = $t->send("'+15550000020', body => 'x'");
$t->becomes("SELECT status FROM sentdm.deliveries WHERE message_id = '$message'", 'delivered', '... and rotating again mends it');
like($t->sql_error("SELECT sentdm_rotate_webhook_secret('00000000-0000-4000-8000-000000000000')"), qr/ERROR:  02000:/,
	'an endpoint that Sent does not know is an error');

my $other = $t->sql(<<'SQL');
SELECT w ->> 'id' FROM sentdm_api('POST', '/v3/webhooks',
	'{"display_name": "made elsewhere", "endpoint_url": "https://example.com/hook", "event_types": ["contact"]}') w
SQL

$t->sql("SELECT sentdm_rotate_webhook_secret('$other')");
is($t->sql("SELECT url FROM sentdm.webhooks WHERE id = '$other'"), 'https://example.com/hook', 'an endpoint made elsewhere is taken over');
$t->sql("SELECT sentdm_api('DELETE', '/v3/webhooks/$other'); DELETE FROM sentdm.webhooks WHERE id = '$other'");

# Events that were missed

$t->becomes("SELECT count(*) FROM sentdm.events", 12, 'all events came, four for each message');

my $since = $t->sql('SELECT clock_timestamp()');
my $counts = $t->sql('SELECT count(*), sum(duplicates) FROM sentdm.events');

is($t->sql("SELECT sentdm_backfill('$id', '2026-01-01')"), 0, 'with all of them here, nothing is missing');
is($t->sql('SELECT count(*), sum(duplicates) FROM sentdm.events'), $counts, '... and nothing is counted twice');
$receiver->stops_cleanly;
my $ids = $t->sql("SELECT string_agg(id::text, ',') FROM sentdm_send(ARRAY(SELECT '+1555010' || n FROM generate_series(1000, 1059) n), body => 'x') id");
$t->all_become('accepted', "id = '$ids'", 'messages are accepted while nobody listens');
wait_until { ($t->summary->{statuses}{DELIVERED} || 0) == 63 } 'Sent has all their events in its log';
is($t->sql("SELECT sentdm_backfill('$id', '$since')"), 240, 'the missing events are fetched, from all pages');
is($t->sql("SELECT string_agg(DISTINCT status, ','), count(*) FROM sentdm.deliveries WHERE message_id = '$ids'"), 'delivered|60', '... and applied');
is($t->sql("SELECT count(*), count(DISTINCT webhook_id), bool_and(late) FROM sentdm.events WHERE received_at > '$since'"), '240|1|t', '... and marked as late');
is($t->sql("SELECT sentdm_backfill('$id', '$since')"), 0, '... once');
is($t->sql("SELECT backfilled_until > '$since' FROM sentdm.webhooks WHERE id = '$id'"), 't', '... which is noted');
$t->sql("DELETE FROM sentdm.events WHERE received_at > '$since'");
is($t->sql("SELECT sentdm_backfill('$id', clock_timestamp())"), 0, 'nothing older than asked for is fetched');

# ... also while later ones arrived, and nothing was wrong

$t->sql("SELECT sentdm_backfill('$id', '2026-01-01')");
$receiver->start;
$t->sql("SELECT sentdm_api('PATCH', '/v3/webhooks/$id/toggle-status', '{\"is_active\": true}'); UPDATE sentdm.webhooks SET backfilled_until = registered_at");
$t->sql("DELETE FROM sentdm.events WHERE id IN (SELECT id FROM sentdm.events ORDER BY occurred_at, id LIMIT 5)");
$t->set('sentdm.check_webhook' => '1s');
$t->becomes('SELECT count(*) FROM sentdm.events', 252, 'the worker finds what was missed before many that were not');
is($t->sql("SELECT failures, trouble FROM sentdm.webhooks WHERE id = '$id' AND backfilled_until > registered_at"), '0|', '... without trouble to make it look');
$t->set('sentdm.check_webhook' => undef);

# Who may

$t->sql("CREATE ROLE operator LOGIN; SELECT sentdm_grant('operator', 'operator'); CREATE ROLE reader LOGIN; SELECT sentdm_grant('reader', 'reader')");
$t->sql("DELETE FROM sentdm.events WHERE received_at > '$since'");
is($t->sql("SET ROLE operator; SELECT sentdm_backfill('$id', '$since') > 0"), 't', 'an operator may');
like($t->sql_error("SET ROLE reader; SELECT sentdm_backfill('$id', now())"), qr/ERROR:  42501:/, 'a reader may not');
like($t->sql_error("SET ROLE reader; SELECT sentdm_rotate_webhook_secret('$id')"), qr/ERROR:  42501:/, '... nor rotate');
unlike($t->log_since(0), qr/whsec_/, 'no secret is in the log');
$t->stops_cleanly;
done_testing();
