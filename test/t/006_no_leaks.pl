# Keys, secrets, texts and numbers appear in no log line, no error, no view that
# is for monitoring: after every kind of error that can be provoked, the whole log
# is searched for words that were planted before.
#
# What a user types may be logged by PostgreSQL itself, as the statement of an
# error or in pg_stat_activity.  So the planted words are in a table that the
# statements read, and where that is impossible the session does not log statements
# (log_min_error_statement = panic).

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use MIME::Base64 qw(encode_base64);
use SentdmTest;
use Test::More;

my %planted = (
	phone => '+19998887776',
	body => 'canarybody7f3a',
	parameter => 'canaryparameter11d2',
	key => 'canarykey52e9c0a1',
	new_key => 'canarynewkey8be4d7',
	file_key => 'canaryfilekey0cc31b',
	secret => 'whsec_' . encode_base64('canarysecretthatsigns0123456789a', ''),
	old_secret => 'whsec_' . encode_base64('canaryformersecret0123456789abcd', ''));

my $t = SentdmTest->new('no_leaks',
	settings => {
		'sentdm.api_key' => $planted{key},
		'sentdm.webhook_secret' => $planted{old_secret},
		'sentdm.log_requests' => 'on',
		'sentdm.notify' => 'on',
		'sentdm.connect_timeout' => '300ms',
		'sentdm.request_timeout' => '500ms',
		log_min_messages => 'debug1',
		log_error_verbosity => 'verbose',
		log_statement => 'none' });	# which is the default, but not of PostgreSQL's test modules

# What a planted word may look like in a text: itself, as the hex of a bytea, decoded.
my @traces = map {
	my $word = s/^(?:\+|whsec_)//r;

	($word, unpack('H*', $word))
} values %planted;
push @traces, qw(canarysecretthatsigns canaryformersecret);

sub traces_in
{
	my ($text) = @_;

	return grep { index(lc $text, lc $_) >= 0 } @traces;
}

sub has_no_trace
{
	my ($text, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	count_is([ traces_in($text) ], 0, $name);
	return;
}

# A statement that must fail, with an error that names what it must and quotes nothing.
sub fails_without_trace
{
	my ($sql, $pattern, $name) = @_;
	my $error = $t->sql_error($sql);
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	like($error, $pattern, $name);
	has_no_trace($error =~ s/^LINE .*$//mgr, '... and the error quotes nothing') if $sql !~ /log_min_error_statement/;
	return;
}

$t->sql('CREATE TABLE planted (name text PRIMARY KEY, word text)');
$t->sql("INSERT INTO planted VALUES ('$_', '$planted{$_}')") foreach sort keys %planted;
$t->sql(<<'SQL');
CREATE VIEW canary AS
	SELECT max(word) FILTER (WHERE name = 'phone') AS phone, max(word) FILTER (WHERE name = 'body') AS body,
		max(word) FILTER (WHERE name = 'parameter') AS parameter, max(word) FILTER (WHERE name = 'secret') AS secret
	FROM planted;
CREATE FUNCTION send_canary() RETURNS uuid LANGUAGE sql
	AS $$ SELECT sentdm_send(phone, body => body, tag => 'canary') FROM canary $$;
SQL
ok(traces_in("...$planted{body}..."), 'a planted word would be found');
ok(traces_in(unpack 'H*', "...$planted{phone}..."), '... also in hex');

# Bad arguments

my %bad = (
	"sentdm_send(body, body => 'x')" => 'recipient',
	"sentdm_send(substr(phone, 2), body => body)" => 'recipient',
	"sentdm_send(NULL::text, body => body)" => 'recipient',
	"sentdm_send(ARRAY[phone, body], body => body)" => 'recipients',
	"sentdm_send(ARRAY[phone, NULL], body => body)" => 'recipients',
	"sentdm_send(phone, body, body => body)" => 'template',
	"sentdm_send(phone)" => 'template',
	"sentdm_send(phone, body => body, channels => ARRAY[parameter])" => 'channels',
	"sentdm_send(phone, body => body, channels => '{sent,sms}')" => 'channels',
	"sentdm_send(phone, 't', to_jsonb(ARRAY[parameter]))" => 'parameters',
	"sentdm_send(phone, 't', jsonb_build_object(parameter, ARRAY[parameter]))" => 'parameters',
	"sentdm_send(phone, 't', jsonb_build_object(parameter, NULL))" => 'parameters',
	"sentdm_send(phone, body => body, priority => parameter)" => 'priority',
	"sentdm_send(phone, body => body, expires_at => now() - interval '1 s')" => 'expires_at',
	"sentdm_send(phone, body => body, send_at => 'infinity')" => 'send_at',
	"sentdm_send(phone, body => body, tag => repeat(parameter, 99))" => 'tag',
	"sentdm_send(phone, body => body, unique_key => repeat(phone, 99))" => 'unique_key',
	"sentdm_send(phone, body => body, extra => to_jsonb(body))" => 'extra',
	"sentdm_send(phone, body => body, extra => jsonb_build_object('to', phone))" => 'extra',
	"sentdm_send(phone, body => repeat(body, 30000))" => '256 kB',
	"sentdm_send_batch(to_jsonb(body))" => 'requests',
	"sentdm_lookup(body)" => 'phone',
	"sentdm_api(body, '/v3/me')" => 'method',
	"sentdm_api('GET', body)" => 'path');
foreach my $call (sort keys %bad)
{
	my $argument = $bad{$call};

	fails_without_trace("SELECT $call FROM canary",
		$argument eq '256 kB' ? qr/ERROR:  54000: .*$argument/ : qr/ERROR:  22\d\d\d: .*"$argument"/,
		"an error names the argument $argument");
}
has_no_trace(
	$t->sql(<<'SQL'), 'errors of a batch quote nothing');
SELECT error FROM canary, sentdm_send_batch(jsonb_build_array(
	body, jsonb_build_object('recipient', body, 'body', body), jsonb_build_object('recipient', phone, parameter, body),
	jsonb_build_object('recipient', phone, 'body', body, 'send_at', body), jsonb_build_object('recipient', phone, 'profile_id', phone),
	jsonb_build_object('recipients', phone, 'body', body), jsonb_build_object('recipients', jsonb_build_array(phone, 1), 'body', body)))
SQL
fails_without_trace('SET sentdm.max_per_transaction = 0; SELECT send_canary()', qr/ERROR:  54000/,
	'so does the limit of a transaction');
fails_without_trace('SET default_transaction_read_only = on; SELECT send_canary()', qr/ERROR:  25006/,
	'so does a read-only transaction');
fails_without_trace('CREATE ROLE nobody; SET ROLE nobody; SELECT send_canary()', qr/ERROR:  42501/,
	'so does a missing privilege');
$t->sql(<<'SQL');
CREATE TABLE customers (phone text, note text);
CREATE TRIGGER tell AFTER INSERT ON customers FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=phone', 'body=note',
	'priority=high');
SQL
fails_without_trace('INSERT INTO customers SELECT body, phone FROM canary', qr/ERROR:  22023/, 'so does a trigger');
is($t->sql("SELECT count(*) FROM sentdm.messages"), 0, 'nothing of all this was queued');

# Whatever the API answers, quoting what it got

my $quote = "$planted{phone} may not get '$planted{body}' with $planted{key}";
my %status = (message => $quote, details => { $planted{phone} => [$quote] });
my @faults = (
	(map { { action => 'status', code => $_, %status } } 400, 401, 403, 404, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504),
	{ action => 'status', code => 409, error_code => 'CONFLICT_005', %status },
	{ action => 'status', code => 422, error_code => 'BUSINESS_003', %status },
	{ action => 'status', code => 302, body => $quote, headers => { Location => "http://127.0.0.1:1/$planted{phone}" } },
	{ action => 'status', code => 404, body => $quote },
	{ action => 'status', code => 202, body => qq({"success": false, "error": {"code": "VALIDATION_002", "message": "$quote"}}) },
	{ action => 'garbage', body => $quote },
	(map { { action => $_ } } qw(truncate drop_before drop_after reset hang endless)));
foreach my $fault (@faults)
{
	my $before = $t->summary->{requests};

	$t->faults($fault);
	$t->sql('SELECT send_canary()');
	wait_until { $t->summary->{requests} > $before } 'the fault was met';
	wait_until { $t->sql(<<'SQL') eq 't' } 'it has consequences';
SELECT EXISTS (SELECT FROM sentdm.problems WHERE problem = 'paused')
	OR NOT EXISTS (SELECT FROM sentdm.outbox WHERE error IS NULL AND http_status IS NULL)
SQL
	has_no_trace($t->sql('SELECT h FROM sentdm_health() h; SELECT s FROM sentdm.stat_worker s; SELECT a FROM pg_stat_activity a'),
		"an answer that quotes everything is not repeated in views for monitoring: $fault->{action} " . ($fault->{code} || ''));
	$t->sql('SELECT sentdm_resume()');
}
$t->faults();
$t->sql('SELECT sentdm_resume()');
$t->outbox_drains('all that can be sent is sent');
foreach my $code (400, 401, 404, 409, 422, 429, 500)
{
	$t->faults({ action => 'status', code => $code, match => { path => '/v3/numbers/*' }, %status });
	fails_without_trace('SELECT sentdm_lookup(phone) FROM canary', qr/ERROR:  .*the API refused the call with status $code/,
		"sentdm_lookup() fails with $code");
}
$t->faults({ action => 'truncate', match => { path => '/v3/numbers/*' } });
fails_without_trace('SELECT sentdm_lookup(phone) FROM canary', qr/ERROR:  .*the API did not answer/,
	'sentdm_lookup() fails without an answer');
$t->faults({ action => 'garbage', body => $quote, match => { path => '/v3/numbers/*' } });
fails_without_trace('SELECT sentdm_lookup(phone) FROM canary', qr/ERROR:/,
	'sentdm_lookup() fails with an answer that is none');

# The outcome cannot be stored

my $position = $t->log_position;
$t->faults({ action => 'latency', ms => 300 });
my $before = $t->summary->{requests};
$t->sql('SELECT send_canary()');
wait_until { $t->summary->{requests} > $before } 'the request is under way';
my $locker = $t->session;
$locker->query_safe('BEGIN; LOCK TABLE sentdm.outbox IN ACCESS EXCLUSIVE MODE');
wait_until { $t->count_in_log(qr/could not write to the database .*55P03/, $position) } 'the lock is noticed';
$locker->query_safe('COMMIT');
$locker->quit;
$t->outbox_drains('a lock on the queue delays the outcome');

$t->sql('ALTER TABLE sentdm.deliveries ADD CONSTRAINT refuse CHECK (length(recipient) < 3) NOT VALID');
$t->sql('SELECT send_canary()');
wait_until { $t->count_in_log(qr/could not write to the database .*23514/, $position) } 'the constraint is noticed';
$t->sql('ALTER TABLE sentdm.deliveries DROP CONSTRAINT refuse');
$t->outbox_drains('a constraint that the outcome violates delays it');

# Webhooks

$t->configure_standin(webhook_secret => $planted{secret}, lifecycle => 'off');
$t->sql('SELECT sentdm_set_webhook_secret(secret) FROM canary');
$t->sql('CREATE TABLE request (name text, expected int, payload bytea, headers jsonb)');
my %sent_id = (message_id => $t->sql('SELECT min(sent_id::text) FROM sentdm.deliveries'));
my @requests = (
	[ 'authentic', 200, { %sent_id, to => $planted{phone}, reason => $planted{body} } ],
	[ 'a status that nobody knows', 200, { %sent_id, event => "message.$planted{body}", to => $planted{phone} } ],
	[ 'an id that is none', 200, { message_id => $planted{phone} } ],
	[ 'a time that is none', 200, { %sent_id, updated_at => $planted{body} } ],
	[ 'a time far off', 200, { %sent_id, updated_at => '999999-01-01T00:00:00Z' } ],
	[ 'a number as text', 200, { event => 'message.received', from => $planted{phone}, text => $planted{body} } ],
	[ 'not JSON', 200, { raw => "$planted{phone} $planted{body}" } ],
	[ 'JSON that cannot be stored', 200, { raw => qq({"field": "message", "x": "\\u0000$planted{body}"}) } ],
	[ 'a number that cannot be stored', 200, { raw => qq({"field": "message", "$planted{body}": 1e999999999}) } ],
	[ 'half a character', 200, { raw_base64 => encode_base64(qq({"field": "message", "x": "$planted{body}\xc3"}), '') } ],
	[ 'deeply nested', 200, { raw => ('[' x 20000) . qq("$planted{body}") . (']' x 20000) } ],
	[ 'another secret', 401, { %sent_id, secret => 'whsec_' . encode_base64('another', ''), to => $planted{phone} } ],
	[ 'no signature', undef, { %sent_id, scheme => 'none', to => $planted{phone} } ],
	[ 'the older scheme', undef, { %sent_id, scheme => 'A', to => $planted{phone} } ],
	[ 'a signature that is none', 401, { %sent_id, headers => { 'X-Webhook-Signature' => "v1,$planted{body}" } } ],
	[ 'a signature far too long', undef, { %sent_id, headers => { 'X-Webhook-Signature' => 'v1,' . $planted{body} x 5000 } } ],
	[ 'an id that is not that of a webhook', 200, { %sent_id, id => $planted{phone} } ],
	[ 'a timestamp that is none', undef, { %sent_id, timestamp => $planted{phone} } ],
	[ 'too old', 401, { %sent_id, timestamp => 1000000000, to => $planted{phone} } ]);
foreach (@requests)
{
	my ($name, $expected, $spec) = @$_;
	my $forged = $t->control('POST', 'sign', $spec);
	my $headers = JSON::PP->new->encode($forged->{headers}) =~ s/'/''/gr;

	$expected = defined $expected ? $expected : 'NULL';
	$t->sql("INSERT INTO request VALUES ('$name', $expected, decode('$forged->{body_base64}', 'base64'), '$headers')");
}
is($t->sql(<<'SQL'), '', 'webhooks of all kinds get the status that they should');
SELECT r.name, w.http_status, w.reason FROM request r, sentdm_receive_webhook(r.payload, r.headers) w
WHERE w.http_status <> expected OR (expected IS NULL AND w.http_status NOT IN (400, 401))
SQL
has_no_trace($t->sql('SELECT w.reason FROM request r, sentdm_receive_webhook(r.payload, r.headers) w'),
	'... with a reason that quotes nothing');
has_no_trace($t->sql('SELECT w FROM (SELECT array_agg(payload) AS p, array_agg(headers) AS h FROM request) r, sentdm_receive_webhooks(r.p, r.h) w'),
	'... also many at once');
is($t->sql(<<'SQL'), '', 'headers of a wrong shape get an answer, too');
SELECT h, w.http_status FROM request r, (SELECT unnest(ARRAY['null', '[]', '"x"', '1', '{"x-webhook-signature": null}',
	'{"x-webhook-signature": {"a": 1}}', '{"x-webhook-signature": ["v1,x"]}', NULL]::jsonb[])) AS v(h), sentdm_receive_webhook(r.payload, h) w
WHERE w.http_status NOT IN (400, 401)
SQL
$t->node->psql('postgres', $_) foreach (
	'SELECT sentdm_receive_webhooks(ARRAY[payload, NULL], ARRAY[headers]) FROM request',
	'SELECT sentdm_set_webhook_secret(body) FROM canary', 'SELECT sentdm_set_webhook_secret(substr(secret, 1, 9)) FROM canary',
	"SELECT sentdm_set_webhook_secret(secret, overlap => '-1 day') FROM canary", 'SELECT sentdm_set_webhook_secret(NULL)',
	"SET default_transaction_read_only = on; SELECT sentdm_set_webhook_secret(secret) FROM canary");

# The key is where it belongs

$t->sql('CREATE ROLE monitor LOGIN IN ROLE pg_monitor; CREATE ROLE somebody LOGIN; CREATE ROLE reader LOGIN IN ROLE pg_read_all_data');
foreach my $setting ('sentdm.api_key', 'sentdm.webhook_secret')
{
	foreach my $role (qw(postgres monitor somebody))
	{
		is($t->sql("SET SESSION AUTHORIZATION $role; SHOW $setting"), '********', "SHOW $setting shows stars to $role");
		is($t->sql("SET SESSION AUTHORIZATION $role; SELECT setting FROM pg_settings WHERE name = '$setting'"), '********',
			'... as does pg_settings');
	}
	has_no_trace($t->sql("SELECT s FROM pg_settings s"), 'pg_settings has no default or former value either');
	my $word = $setting =~ /key/ ? $planted{new_key} : $planted{secret};
	foreach my $command ("ALTER SYSTEM SET $setting = '$word'", "ALTER DATABASE postgres SET $setting = '$word'",
		"ALTER ROLE somebody SET $setting = '$word'", "SET $setting = '$word'", "SET LOCAL $setting = '$word'",
		"SELECT set_config('$setting', '$word', false)", "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET $setting = '$word' AS 'SELECT 1'")
	{
		like($t->sql_error("SET log_min_error_statement = panic; $command"), qr/ERROR:  55P02/, $command =~ s/$word/.../r . ' is refused');
	}
}
is($t->sql("SET ROLE reader; SELECT count(*) FROM sentdm.webhook_secrets"), 0,
	'pg_read_all_data does not read the secrets of webhooks');
ok($t->sql('SELECT count(*) FROM sentdm.webhook_secrets') > 0, '... which are there');

$t->set('sentdm.api_key' => $planted{new_key});
$t->sql('SELECT send_canary()');
$t->outbox_drains('a changed key is taken over by a reload');
is($t->last_request->{headers}{'x-api-key'}, $planted{new_key}, '... and used');

# The key in a file

my $file = $t->node->basedir . '/api_key';
my $health = "SELECT detail FROM sentdm_health() WHERE name = 'credentials'";
my $kind = "SELECT error_code, detail FROM sentdm.problems WHERE problem = 'paused'";

sub write_key
{
	my ($key, $mode) = @_;

	unlink $file;
	open my $handle, '>', $file or die "could not write $file: $!";
	print $handle $key;
	close $handle;
	chmod $mode, $file;
	return;
}

write_key("$planted{file_key}\n", 0644);
$t->set('sentdm.api_key' => undef, 'sentdm.api_key_file' => $file);
$t->becomes($kind, 'credentials|sentdm.api_key_file has group or world access',
	'a key file that others may read pauses');
is($t->sql($health), 'sentdm.api_key_file has group or world access', '... and sentdm_health() says so');
$before = $t->summary->{requests};
$t->sql('SELECT send_canary()');
stays_true { $t->summary->{requests} == $before } 0.2, '... and nothing is sent';
chmod 0600, $file;
$t->outbox_drains('when it is protected, sending goes on by itself');
is($t->last_request->{headers}{'x-api-key'}, $planted{file_key}, '... with the key in the file');
is($t->sql($kind), '', '... and the problem is gone');

$t->configure_standin(keys => [ $planted{key} ]);
$t->sql('SELECT send_canary()');
$t->becomes($kind, 'credentials|Sent does not accept the API key', 'a key that is revoked pauses');
write_key($planted{key}, 0600);
$t->outbox_drains('when the file has a new one, sending goes on by itself');
is($t->last_request->{headers}{'x-api-key'}, $planted{key}, '... with that');

foreach ([ 0000, $planted{file_key}, 'cannot be opened' ], [ 0640, $planted{file_key}, 'has group or world access' ],
	[ 0602, $planted{file_key}, 'has group or world access' ],
	[ 0600, "short\n", 'shorter than 10 characters' ], [ 0600, '', 'shorter than 10 characters' ],
	[ 0600, "$planted{file_key}\nX-Evil: yes", 'cannot stand in a header' ], [ 0600, "$planted{file_key}\x00\x01", '' ],
	[ 0400, "  \n", '' ])
{
	my ($mode, $key, $trouble) = @$_;

	write_key($key, $mode);
	my $detail = $t->sql($health);
	like($detail, qr/$trouble/, sprintf 'a key file with mode %04o and %d bytes: %s', $mode, length $key, $detail);
}
unlink $file;
like($t->sql($health), qr/cannot be opened/, 'a key file that is missing is named');
mkdir $file;
like($t->sql($health), qr/is not a regular file/, 'a key file that is a directory is named');
rmdir $file;
write_key($planted{key}, 0600);

# And now

foreach my $view (qw(sentdm.stat_worker sentdm.stat_outbox sentdm.stat_webhook sentdm_health() sentdm.sender
	pg_stat_activity pg_stat_database pg_settings))
{
	has_no_trace($t->sql("SELECT v FROM $view v"), "$view has no planted word");
}
$t->configure_standin(keys => []);
$t->stops_cleanly;
my $log = $t->log_since(0);
has_no_trace($log, 'the log has no planted word');
cmp_ok($t->count_in_log(qr/LOG:  00000: sentdm request: message=/), '>', scalar @faults,
	'... though it has a line for each request');
cmp_ok($t->count_in_log(qr/DEBUG:  /), '>', 0, '... and is detailed');
diag(join "\n", map { substr $_, 0, 400 } grep { traces_in($_) } split /\n/, $log) if traces_in($log);
my @others = grep { !m{/base/|/pg_wal/|/sentdm\.conf$} } files_under($t->node->data_dir);
count_is([ grep { traces_in(PostgreSQL::Test::Utils::slurp_file($_)) } @others ], 0,
	'no file of the server has a planted word but its tables, their log and the configuration');

done_testing();

sub files_under
{
	my ($directory) = @_;
	my @files;

	require File::Find;
	File::Find::find(sub { push @files, $File::Find::name if -f $_ }, $directory);
	return @files;
}
