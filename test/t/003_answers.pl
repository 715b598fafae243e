# Whatever Sent, or something in between, answers: each message ends where it
# should, and is accepted at most once.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;
use Time::HiRes;

my $t = SentdmTest->new('answers',
	settings => { 'sentdm.connect_timeout' => '300ms', 'sentdm.request_timeout' => '500ms' });
my $number = 0;

sub next_number
{
	return sprintf '+1555%07d', ++$number;
}

sub envelope
{
	my ($code, $message) = @_;

	return qq({"success":false,"data":null,"error":{"code":"$code","message":"$message"},"meta":{"request_id":"req_x"}});
}

# Whether a process waits most of the time, however busy the machine is.
sub is_waiting
{
	my ($pid) = @_;
	my $waiting = 0;

	foreach (1 .. 20)
	{
		my ($state) = PostgreSQL::Test::Utils::slurp_file("/proc/$pid/stat") =~ /.*\) (\w)/s;

		$waiting++ if $state eq 'S';
		Time::HiRes::usleep(20_000);
	}
	return $waiting > 10;
}

# What the stand-in saw of one message, and what its row says.
sub requests_of
{
	my ($id) = @_;

	return grep { defined $_->{key} && $_->{key} =~ /\Q$id\E/ } $t->arrived;
}

sub row_of
{
	my ($id, $columns) = @_;

	return $t->sql("SELECT $columns FROM sentdm.messages WHERE id = '$id'");
}

# Sent refuses these, or cannot be understood, for a while: the same request is
# repeated until it is accepted.

sub is_repeated
{
	my ($what, $fault, %expected) = @_;
	my $times = $expected{times} || 1;
	my $id;

	$t->faults({ times => $times, %$fault });
	$id = $t->send("'" . next_number() . "', body => 'x'");
	$t->all_become('accepted', "id = '$id'", "$what: the message is accepted in the end");
	my @requests = requests_of($id);
	is(scalar @requests, $expected{requests} || $times + 1, '... after the expected number of requests');
	is_deeply([ distinct(map { $_->{key} } @requests) ], ["sentdm-$id-1"], '... all under the same key');
	is(scalar distinct(map { $_->{sha256} } @requests), 1, '... with the same bytes');
	is(scalar(grep { $_->{outcome} eq 'accepted' } @requests), 1, '... of which one was accepted');
	is(row_of($id, 'attempts, http_status, error_code, error'), "$expected{attempts}|202||", '... and counts the attempts that Sent may have looked at')
	  if defined $expected{attempts};
	is($t->sql("SELECT count(*) FROM sentdm.deliveries WHERE message_id = '$id'"), 1, '... and its delivery is known');
	cmp_ok(($requests[-1]{unix_us} - $requests[0]{unix_us}) / 1000, '>=', $expected{ms}, '... after the wait that was asked for')
	  if $expected{ms};
	return;
}

is_repeated('500', { action => 'status', code => 500 }, attempts => 2);
is_repeated('500 after it was accepted', { action => 'status', code => 500, accept => JSON::PP::true }, attempts => 2);
is_repeated('502 from a proxy', { action => 'status', code => 502, body => '<html>Bad gateway</html>' }, attempts => 2);
is_repeated('503 SERVICE_001, three times', { action => 'status', code => 503, error_code => 'SERVICE_001' }, times => 3, attempts => 4);
is_repeated('504 after it was accepted', { action => 'status', code => 504, accept => JSON::PP::true }, attempts => 2);
is_repeated('408', { action => 'status', code => 408 }, attempts => 2);
is_repeated('429 with Retry-After', { action => 'retry_after', value => 1 }, attempts => 1, ms => 1000);
is_repeated('409 CONFLICT_001', { action => 'status', code => 409, error_code => 'CONFLICT_001' }, attempts => 1, ms => 1000);
is_repeated('503 with Retry-After', { action => 'status', code => 503, retry_after => 1 }, attempts => 2, ms => 1000);
is_repeated('half of an answer', { action => 'truncate' }, attempts => 2);
is_repeated('an answer that is not from the API', { action => 'garbage' }, attempts => 2);
is_repeated('an answer that is JSON, but not the API\'s', { action => 'garbage', body => '{"ok": true}' }, attempts => 2);
is_repeated('an answer that nests too deeply', { action => 'garbage', body => '[' x 5000 }, attempts => 2);
is_repeated('an answer without an end', { action => 'endless' }, attempts => 2);
is_repeated('no answer in time', { action => 'hang' }, attempts => 2, ms => 500);
is_repeated('no answer in time, though it was accepted', { action => 'hang', accept => JSON::PP::true }, attempts => 2);
is_repeated('an answer in small pieces', { action => 'slow', bytes => 50, delay_ms => 2 }, requests => 1, attempts => 1);

# Without an answer libcurl itself repeats the request when the connection was an
# old one, so the worker counts one attempt or two.
foreach my $action (qw(drop_before drop_after reset))
{
	is_repeated("$action on an old connection", { action => $action });
	$t->faults({ action => 'close_idle' });
	my $id = $t->send("'" . next_number() . "', body => 'x'");
	$t->all_become('accepted', "id = '$id'", 'an answer arrives before its connection is closed');
	is_repeated("$action on a new connection", { action => $action }, attempts => 2);
}

$t->faults({ action => 'close_idle', times => 10 });
foreach (1 .. 10)
{
	my $id = $t->send("'" . next_number() . "', body => 'dead connection'");

	wait_until { row_of($id, 'state') eq 'accepted' } 'the message is accepted';
}
is($t->sql("SELECT count(*), max(attempts) FROM sentdm.messages WHERE request ->> 'text' = 'dead connection'"), '10|1',
	'connections that the other side closed are not taken for a failure of Sent');

ok(is_waiting($t->worker_pid), '... nor do they keep the worker busy');

my $position = $t->log_position;
my $before = $t->summary->{requests};
$t->faults({ action => 'retry_after', value => 1 });
my $limited = $t->send("'" . next_number() . "', body => 'x'");
wait_until { $t->summary->{requests} > $before } 'the limit was met';
$t->send("'" . next_number() . "', body => 'x', priority => 'high', tag => 'after 429'");
$t->all_become('accepted', "tag = 'after 429'", 'after a 429 other messages are sent');
my @requests = $t->arrived($before);
cmp_ok(($requests[1]{unix_us} - $requests[0]{unix_us}) / 1000, '>=', 1000,
	'... but none of them before Retry-After, however urgent');

# Sent cannot be reached

my $port_was = $t->url;
$t->stop_standin;
$before = $t->sql('SELECT unreached FROM sentdm.stat_worker');
my @ids = map { $t->send("'" . next_number() . "', body => 'x', tag => 'unreached'") } 1 .. 3;
$t->becomes("SELECT unreached >= $before + 5 FROM sentdm.stat_worker", 't',
	'a connection that is refused is tried again');
is($t->sql("SELECT string_agg(DISTINCT state, ','), max(attempts) FROM sentdm.status WHERE tag = 'unreached'"), 'queued|0',
	'... the messages wait, and nothing counts as an attempt');
is($t->sql('SELECT count(*) FROM sentdm.outbox WHERE ambiguous_since IS NOT NULL'), 0, '... nor as unknown');
is($t->sql("SELECT count(*) FROM sentdm.problems"), 0, '... nor as a problem of a message');
$t->start_standin;
is($t->url, $port_was, 'the API is back');
$t->all_become('accepted', "tag = 'unreached'", '... and the messages are accepted');
is($t->sql("SELECT max(attempts) FROM sentdm.messages WHERE tag = 'unreached'"), 1, '... at the first attempt');
$t->accepted_once('... once each');

# These refuse one message for good: one request, no retry.

sub is_refused
{
	my ($what, $faults, $http_status, $error_code, $arguments) = @_;
	my $problems = $t->sql('SELECT count(*) FROM sentdm.problems');
	my $id;

	$t->faults(@$faults);
	$id = $t->send($arguments || "'" . next_number() . "', body => 'x'");
	$t->all_become('failed', "id = '$id'", "$what: the message fails");
	is(row_of($id, 'attempts, http_status, error_code, error IS NOT NULL, finished_at IS NOT NULL'),
		"1|$http_status|$error_code|t|t", '... and its row says why');
	is(scalar requests_of($id), 1, '... after one request');
	is($t->sql("SELECT problem, error_code, hint FROM sentdm.problems WHERE message_id = '$id'"),
		"failed|$error_code|To send it again: SELECT sentdm_retry('$id');",
			'... and it is among the problems, with a hint');
	return $id;
}

my $failed = is_refused('400', [ { action => 'status', code => 400, error_code => 'VALIDATION_002' } ], 400,
	'VALIDATION_002');
is_refused('a template that is not there', [], 404, 'RESOURCE_002', "'" . next_number() . "', 'missing_template'");
is_refused('a profile that is not there', [], 404, 'RESOURCE_005',
	"'" . next_number() . "', body => 'x', profile_id => '00000000-0000-4000-8000-000000000001'");
is_refused('a text that the channel does not take', [], 400, 'VALIDATION_008', "'" . next_number() . "', body => E'a\\nb', channels => '{whatsapp}'");
is_refused('422 BUSINESS_005', [ { action => 'status', code => 422, error_code => 'BUSINESS_005' } ], 422,
	'BUSINESS_005');
is_refused('409 CONFLICT_005', [ { action => 'status', code => 409, error_code => 'CONFLICT_005' } ], 409,
	'CONFLICT_005');
is_refused('202 that says failure', [ { action => 'status', code => 202, body => envelope('VALIDATION_004', 'No.') } ], 202,
	'VALIDATION_004');
is_refused('a code that nobody knows', [ { action => 'status', code => 418, error_code => 'TEAPOT_001' } ], 418,
	'TEAPOT_001');

is($t->sql("SELECT sentdm_retry('$failed')"), 't', 'a failed message can be sent again');
$t->all_become('accepted', "id = '$failed'", '... and is accepted');
is_deeply([ map { $_->{key} } requests_of($failed) ], [ "sentdm-$failed-1", "sentdm-$failed-2" ],
	'... under a new key');
is(row_of($failed, 'attempts, http_status, error_code, error'), '1|202||', '... and nothing is left of its failure');

# One of many numbers is refused: it alone fails.

my @numbers = map { next_number() } 1 .. 50;
my %bad = map { $_ => 1 } @numbers[ 0, 23, 49 ];
my @refusals = map { { action => 'status', code => 400, error_code => 'VALIDATION_002', times => -1, match => { to => $_ } } } keys %bad;

$before = $t->summary->{accepted_recipients};
$t->faults(@refusals);
my $id = $t->sql("SELECT sentdm_send('{" . join(',', @numbers) . "}'::text[], body => 'to fifty')");
$t->all_become('accepted', "id = '$id'", 'of 50 numbers 3 are refused: the message counts as accepted');
my $deliveries = "FROM sentdm.deliveries WHERE message_id = '$id' AND sent_id";
is_deeply([ split /\n/, $t->sql("SELECT recipient, status, reason_code $deliveries IS NULL ORDER BY 1") ],
	[ map { "$_|failed|VALIDATION_002" } sort keys %bad ], '... exactly the 3 bad ones failed');
is_deeply([ split /\n/, $t->sql("SELECT recipient $deliveries IS NOT NULL ORDER BY 1") ],
	[ grep { !$bad{$_} } @numbers ], '... and the others did not');
is($t->sql("SELECT state, count(*) FROM sentdm.status WHERE message_id = '$id' GROUP BY 1 ORDER BY 1"),
	"accepted|47\nfailed|3", '... which sentdm.status shows');
is_deeply([ sort map { $_->{to} } grep { $_->{key} =~ /\Q$id\E/ } $t->effects ], [ grep { !$bad{$_} } @numbers ],
	'... and Sent accepted each good one exactly once');
@requests = requests_of($id);
is(scalar distinct(map { $_->{key} } @requests), scalar @requests, '... under a new key for each part');
cmp_ok(scalar @requests, '<', 40, '... in fewer requests than one by one');
is($t->sql('SELECT count(*) FROM sentdm.outbox'), 0, '... and nothing of it is left in the queue');

@numbers = map { next_number() } 1 .. 4;
$t->faults({ action => 'status', code => 400, error_code => 'VALIDATION_002', times => -1 });
$id = $t->sql("SELECT sentdm_send('{" . join(',', @numbers) . "}'::text[], body => 'to four')");
$t->all_become('failed', "id = '$id'", 'when all numbers are refused the message fails');
$t->faults();
is($t->sql("SELECT sentdm_retry('$id')"), 't', '... and can be sent again');
$t->all_become('accepted', "id = '$id'", '... to all of them');
is($t->sql("SELECT count(*), count(sent_id) FROM sentdm.deliveries WHERE message_id = '$id'"), '4|4',
	'... and nothing is left of the failure');

# The account is the trouble: no message is burnt, one request, one warning.  A machine
# that stands still for long enough would make it two, so nothing is given up here.

$t->set('sentdm.connect_timeout' => undef, 'sentdm.request_timeout' => undef);

sub pauses
{
	my ($what, $fault, $kind, $reason) = @_;
	my $log = $t->log_position;
	my $paused = 'SELECT count(*) FROM sentdm.problems WHERE problem = \'paused\'';
	my $tag = "pause $what";
	my $requests = $t->summary->{requests};

	$t->faults({ times => -1, %$fault });
	$t->send("'" . next_number() . "', body => 'x', tag => '$tag'");
	$t->becomes($paused, 1, "$what: sending pauses");
	$t->send("'" . next_number() . "', body => 'x', tag => '$tag'") for 1 .. 3;
	$t->requests_stay($requests + 1, 0.15, '... after one request');
	is($t->sql("SELECT string_agg(DISTINCT state, ','), max(attempts) FROM sentdm.status WHERE tag = '$tag'"), 'queued|0',
		'... and the messages wait, unharmed');
	is($t->sql("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'"), $kind,
		'... and the problem has a name');
	is($t->sql("SELECT hint FROM sentdm.problems WHERE problem = 'paused'"), 'Put it right, then: SELECT sentdm_resume();',
		'... and a hint');
	like($t->sql("SELECT ok, detail FROM sentdm_health() WHERE name = 'pause'"), qr/^f\|paused since .* \($kind\): $reason$/,
		'... also in sentdm_health()');
	is($t->count_in_log(qr/WARNING:  sentdm has paused sending: $reason/, $log), 1, '... and one warning was written');

	$t->sql('SELECT sentdm_resume()');
	wait_until { $t->count_in_log(qr/WARNING:  sentdm has paused sending/, $log) == 2 } 'it pauses again';
	$t->requests_stay($requests + 2, 0.15, '... sentdm_resume() tries one request, no more');

	$t->faults();
	$t->sql('SELECT sentdm_resume()');
	$t->all_become('accepted', "tag = '$tag'", '... and when the trouble is over all are sent');
	is($t->sql($paused), 0, '... and the problem is gone');
	return;
}

pauses('401', { action => 'status', code => 401 }, 'credentials', 'Sent does not accept the API key');
pauses('403', { action => 'status', code => 403 }, 'forbidden', 'the account may not send.*');
pauses('403 suspended', { action => 'status', code => 403, error_code => 'BUSINESS_014' }, 'suspended',
	'the account is suspended');
pauses('422 no balance', { action => 'status', code => 422, error_code => 'BUSINESS_003' }, 'balance',
	'the account has no credit');
pauses('422 quota', { action => 'status', code => 422, error_code => 'BUSINESS_008' }, 'quota',
	"the account's quota is used up");
pauses('a redirect', { action => 'status', code => 302, body => '', headers => { Location => $t->url . '/v3/me' } }, 'forbidden',
	'.*');
pauses('404 from a wrong host', { action => 'status', code => 404, body => '<html>Not here</html>' }, 'forbidden',
	'.*');

$t->faults({ action => 'status', code => 401 }, { action => 'retry_after', value => 1 });
$id = $t->send("'" . next_number() . "', body => 'x'");
$t->becomes("SELECT count(*) FROM sentdm.problems WHERE problem = 'paused'", 1, 'a 401 pauses');
$before = $t->summary->{requests};
$t->sql('SELECT sentdm_resume()');
wait_until { $t->summary->{requests} > $before } 'a request tries';
$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'credentials',
	'a 429 that follows a 401 is taken for a lockout');
$t->sql('SELECT sentdm_resume()');
$t->all_become('accepted', "id = '$id'", '... which ends');

# Their time is over.  All at once, because they share a circuit breaker.

my %late = map { $_ => next_number() } qw(unknown refused expires expires_unknown);
$t->set('sentdm.uncertain_after' => '1s', 'sentdm.give_up_after' => '1s');
$t->faults(
	map { { times => -1, match => { to => $late{$_} }, $_ =~ /unknown/ ? (action => 'drop_after') : (action => 'status', code => 503) } } keys %late);
my %late_id = map { $_ => $t->send("'$late{$_}', body => 'x'" . (/expires/ ? ", expires_at => clock_timestamp() + interval '300 ms'" : '')) }
  sort { ($b =~ /expires/) <=> ($a =~ /expires/) } keys %late;
foreach ([ 'unknown', 'uncertain', 'outcome_unknown', 'a message whose outcome stays unknown becomes uncertain' ],
	[ 'refused', 'failed', 'gave_up', 'a message that is refused for longer than sentdm.give_up_after fails' ],
	[ 'expires', 'expired', 'expired', 'a message that is surely not accepted expires' ],
	[ 'expires_unknown', 'uncertain', 'expired_unknown', 'a message that expires while its outcome is unknown becomes uncertain' ])
{
	my ($what, $state, $code, $name) = @$_;

	$t->all_become($state, "id = '$late_id{$what}'", $name);
	is(row_of($late_id{$what}, 'error_code, error IS NOT NULL'), "$code|t", '... and says so');
}
$id = $late_id{unknown};
is($t->sql("SELECT problem, hint FROM sentdm.problems WHERE message_id = '$id'"),
	"uncertain|Sent may have accepted it. To send it again all the same: SELECT sentdm_retry('$id');",
		'an uncertain message is among the problems');
$t->faults();
$t->set('sentdm.uncertain_after' => undef, 'sentdm.give_up_after' => undef);
$before = $t->summary->{requests};
stays_true { $t->summary->{requests} == $before } 0.3, '... and is never sent again by itself';
is($t->sql("SELECT sentdm_retry('$id')"), 't', '... but by a person');
$t->all_become('accepted', "id = '$id'", '... and is accepted');
is_deeply([ distinct(map { $_->{key} } requests_of($id)) ], [ "sentdm-$id-1", "sentdm-$id-2" ], '... under a new key');

# A database in another encoding

$t->sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'latin');
$id = $t->send("'" . next_number() . "', body => 'caf' || chr(233)", 'latin');
$t->all_become('accepted', "id = '$id'", 'a database in LATIN1 sends', 'latin');
is($t->last_request->{json}{text}, "caf\x{e9}", '... in UTF-8');
foreach ("caf\x{e9} \x{4e2d}\x{6587} \x{1F600}", 'caf\\u00e9 \\u4e2d\\u6587 \\ud83d\\ude00')
{
	$t->faults({ action => 'status', code => 400, body => envelope('VALIDATION_008', $_) });
	$id = $t->send("'" . next_number() . "', body => 'x'", 'latin');
	$t->all_become('failed', "id = '$id'", 'an error in letters that the database does not have is stored all the same', 'latin');
	like($t->sql("SELECT error_code, error FROM sentdm.messages WHERE id = '$id'", 'latin'), qr/^VALIDATION_008\|caf/, '... as far as possible');
}
$t->sql('SELECT sentdm_disable()', 'latin');

$t->accepted_once('over all this nothing was accepted twice, and no key had two requests');

# Certificates

my ($certificate, $private) = make_certificate();

$t->stop_standin;
$t->start_standin('--tls-cert' => $certificate, '--tls-key' => $private);
$position = $t->log_position;
$t->set('sentdm.base_url' => $t->url =~ s/^http:/https:/r);
$id = $t->send("'" . next_number() . "', body => 'over TLS'");
$t->becomes("SELECT error_code FROM sentdm.problems WHERE problem = 'paused'", 'certificate',
	'a certificate that nobody vouches for pauses');
is($t->sql("SELECT state, attempts FROM sentdm.status WHERE message_id = '$id'"), 'queued|0',
	'... before anything was sent');
is($t->count_in_log(qr/WARNING:  sentdm has paused sending: the certificate of the API is not trusted/, $position), 1,
	'... with a warning');
$t->set('sentdm.ca_file' => $certificate);
$t->sql('SELECT sentdm_resume()');
$t->all_become('accepted', "id = '$id'", 'with sentdm.ca_file it is trusted');

# The proxy of the environment, where nobody listens

{
	local $ENV{https_proxy} = 'http://127.0.0.1:' . free_port();

	$t->node->restart;
	$id = $t->send("'" . next_number() . "', body => 'by a proxy'");
	wait_until { $t->sql("SELECT value > 0 FROM sentdm.counters() WHERE name = 'unreached'") eq 't' } 'the proxy is not reached';
	is($t->sql("SELECT state FROM sentdm.status WHERE message_id = '$id'"), 'queued', 'a proxy that the environment names is used');
	local $ENV{no_proxy} = '127.0.0.1';
	$t->node->restart;
	$t->all_become('accepted', "id = '$id'", '... unless the environment says that this host needs none');
}

is($t->sql('SELECT count(*) FROM sentdm.outbox'), 0, 'the queue is empty');
$t->stops_cleanly;

done_testing();
