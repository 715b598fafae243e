# The receiver's limits: what is too large, too slow, too many or not a webhook at
# all is refused with the right status, costs nothing for long, and harms nobody else.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IO::Select;
use JSON::PP;
use PostgreSQL::Test::Utils;
use SentdmReceiver;
use SentdmTest;
use Test::More;
use Time::HiRes qw(sleep time);

my $t = SentdmTest->new('limits', enable => 0);

SentdmReceiver->prepare($t);

my $receiver = SentdmReceiver->new($t->node);
my $path = '/webhooks/sent';
my $mb = 1024 * 1024;
my $patience = 8 * $slowness;	# seconds, where something takes one; less than another time that is fixed

# Send bytes as they are; the answer, and whether the connection then ends.
sub send_raw
{
	my ($bytes, $socket) = @_;

	$socket ||= $receiver->connect;
	local $SIG{PIPE} = 'IGNORE';
	print $socket $bytes;
	$socket->flush;
	return read_answer($socket);
}

sub status_is
{
	my ($answer, $status, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is($answer ? $answer->{status} : 'none', $status, $name);
	return $answer;
}

# The seconds, counted from a time before it was connected, until the other side
# ends the connection; undef: it does not.  between is done ten times a second.
sub seconds_until_end
{
	my ($socket, $start, $between) = @_;

	local $SIG{PIPE} = 'IGNORE';
	while (time - $start < $patience)
	{
		if (IO::Select->new($socket)->can_read(0.1))
		{
			my $read = sysread $socket, my $buffer, 65536;

			return time - $start unless $read;
		}
		$between->() if $between;
	}
	return undef;
}

# How long something took, against a time that it must take at least.  The upper
# bound only tells it from another, much longer time: this machine may stand still.
sub takes
{
	my ($seconds, $at_least, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	ok(defined $seconds && $seconds >= $at_least && $seconds < $at_least + $patience, $name)
	  or diag('it took ' . (defined $seconds ? "$seconds s" : 'longer'));
	return;
}

# Not a webhook

{
	my $body = event(uuid(), 'sent');
	my @length = ('Content-Length' => length $body);
	my @json = ('Content-Type' => 'application/json');
	my $answer;

	status_is(send_raw(request('GET', '/')), 404, 'another path is 404');
	status_is(send_raw(request('POST', "$path/", [ @json, @length ], $body)), 404, 'also with a slash at the end');
	status_is(send_raw(request('GET', '/health')), 404, '/health is not there for everybody');
	status_is(send_raw(request('GET', '/metrics')), 404, 'nor /metrics');
	$answer = status_is(send_raw(request('GET', $path)), 405, 'GET is 405');
	is($answer->{headers}{allow}, 'POST', 'and says what is allowed');
	status_is(send_raw(request($_, $path, [ 'Content-Length' => 0 ])), 405, "$_ is 405") foreach qw(PUT DELETE PATCH BREW);
	status_is(send_raw(request('POST', $path, \@json)), 411, 'no Content-Length is 411');
	status_is(send_raw(request('POST', $path, [ @json, 'Transfer-Encoding' => 'chunked' ],
		sprintf("%x\r\n%s\r\n0\r\n\r\n", length $body, $body))), 411, 'a chunked body is 411');
	status_is(send_raw(request('POST', $path, [ 'Content-Type' => 'text/plain', @length ], $body)), 415, 'text is 415');
	status_is(send_raw(request('POST', $path, [ 'Content-Type' => 'application/jsonx', @length ], $body)), 415, 'and what only begins like JSON');
	is($receiver->deliver($body, path => "$path?a=b"), 200, 'a query is ignored');
	foreach my $type ('application/json; charset=utf-8', 'APPLICATION/JSON', 'application/json ')
	{
		status_is(send_raw(request('POST', $path, [ 'Content-Type' => $type, @length, signed($body) ], $body)), 200, "\"$type\" is JSON");
	}
	status_is(send_raw(request('POST', $path, [ @length, signed($body) ], $body)), 200, 'no Content-Type may be JSON');
	status_is(send_raw(request('POST', $path, [ @json, 'Content-Length' => 'x' ], $body)), 400, 'a Content-Length that is no number is 400');
	status_is(send_raw(request('POST', $path, [ @json, @length, 'Content-Length' => 1, signed($body) ], $body)), 400, 'two of them are 400');

	$answer = send_raw(request('POST', $path, [ @json, @length, 'Transfer-Encoding' => 'chunked' ], "0\r\n\r\n"));
	ok(!$answer || $answer->{status} == 400 || $answer->{status} == 411, 'a length and chunks at once are refused');

	foreach ([ "\r\n\r\n\r\n", 'empty lines' ], [ "\x16\x03\x01\x02\x00\x01\x00\x01", 'TLS' ], [ "GET\r\n\r\n", 'half a request line' ],
		[ "POST $path HTTP/1.1\r\nno colon\r\n\r\n", 'a header without a colon' ], [ "\x00" x 200 . "\r\n\r\n", 'zeros' ],
		[ "POST $path HTTP/9.9\r\n\r\n", 'another protocol' ])
	{
		my $socket = $receiver->connect;

		local $SIG{PIPE} = 'IGNORE';
		print $socket $_->[0];
		shutdown $socket, 1;
		$answer = read_answer($socket, 5);
		ok(!$answer || $answer->{status} >= 400, "$_->[1]: refused");
	}
	is($receiver->deliver($body), 200, 'and the receiver goes on');
}

# Large

{
	my $body = '"' . 'a' x ($mb - 2) . '"';
	my $socket = $receiver->connect;

	is($receiver->deliver($body, socket => $socket), 200, 'a body of 1 MiB is taken');
	is($receiver->deliver("$body ", socket => $socket), 413, 'one byte more is 413');
	is($receiver->deliver(event(uuid(), 'sent'), socket => $socket), 200, 'and the connection can be used again');
	status_is(send_raw(request('POST', $path, [ 'Content-Length' => 1 << 40 ])), 413, 'much more is 413 before it is sent');
	status_is(send_raw(request('POST', $path, [ 'Content-Length' => '9' x 30 ])), 413, 'and more than a number can be');
	status_is(send_raw(request('POST', $path, [ 'Content-Length' => 2 * $mb, 'Expect' => '100-continue' ])), 413,
		'who asks first is told so');

	my $event = event(uuid(), 'sent');

	$socket = $receiver->connect;
	print $socket request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event,
		'Expect' => '100-continue', signed($event) ]);
	$socket->flush;
	IO::Select->new($socket)->can_read(20);
	sysread $socket, my $continue, 1000;
	like($continue, qr{^HTTP/1\.1 100 }, 'or to continue');
	status_is(send_raw($event, $socket), 200, 'and the event is taken');
}

foreach ([ 31 * 1024, 1, 200 ], [ 31 * 1024, 50, 200 ], [ 33 * 1024, 1, 431 ], [ 33 * 1024, 50, 431 ], [ 200 * 1024, 10, 431 ],
	[ 64 * 1024, 16_000, 431 ])
{
	my ($bytes, $count, $status) = @$_;
	my $event = event(uuid(), 'sent');
	my @headers = map { ("X-$_" => 'a' x ($bytes / $count - 10 > 0 ? $bytes / $count - 10 : 0)) } 1 .. $count;
	my $answer = $receiver->post($event, [ @headers, signed($event) ]);

	# With most of it unread, the connection may be reset before the answer is.
	ok($answer ? $answer->{status} == $status : $status != 200 && $bytes > 60_000, "$bytes bytes in $count headers: $status");
}
{
	my $answer = send_raw('GET /' . 'a' x 60_000 . " HTTP/1.1\r\nHost: x\r\n\r\n");

	ok(!$answer || $answer->{status} == 414 || $answer->{status} == 431, 'a line of 60 kB is refused');
}

# One after the other

{
	my $socket = $receiver->connect;
	my @bodies = map { event(uuid(), 'sent') } 1 .. 5;

	print $socket map { request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length, signed($_) ], $_) } @bodies;
	$socket->flush;
	is(join(',', map { (read_answer($socket) || {})->{status} } @bodies), '200,200,200,200,200', 'requests sent without waiting are answered in order');
	is($t->sql('SELECT count(*) FROM sentdm.events WHERE sent_id IN (' . join(',', map { "'" . decode_json($_)->{payload}{message_id} . "'" } @bodies) . ')'),
		5, 'and all stored');
}

# An event in pieces

{
	my $event = event(uuid(), 'sent');
	my $socket = $receiver->connect;
	my $request = request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event, signed($event) ], $event);

	foreach my $piece ($request =~ /(.{1,40})/gs)
	{
		print $socket $piece;
		$socket->flush;
		sleep 0.005;
	}
	status_is(read_answer($socket), 200, 'an event that comes in small pieces is taken');
}

# A client that goes away with its event in the database

{
	my $event = event(uuid(), 'sent');
	my $session = $t->session;
	my $socket = $receiver->connect;
	my $received = $receiver->metric('requests_received_total');

	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	print $socket request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event, signed($event) ], $event);
	$socket->flush;
	$receiver->metric_becomes('requests_received_total', $received + 1, 'an event is on its way');
	close $socket;
	$session->query_safe('COMMIT');
	$session->quit;
	$receiver->metric_becomes('connections', 0, 'a client that does not wait for its answer leaves nothing behind');
}
$receiver->metric_becomes('queue_bytes', 0, 'no memory stays reserved');
unlike($receiver->log_since(0), qr/4155550|v1,|BREW|a=b/, 'the log has nothing of what was sent');
$receiver->stops_cleanly;

# A client's time is limited, whatever it does meanwhile

{
	my $second = $slowness;
	my $slow = SentdmReceiver->new($t->node,
		options => { 'request-timeout' => "${second}s", 'idle-timeout' => '600s', 'answer-timeout' => '300s' });
	my $event = event(uuid(), 'sent');
	my $head = request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => 1000 ]);
	my ($first_line) = $head =~ /^(.*?\r\n)/s;
	my ($socket, $start);

	$receiver = $slow;
	$start = time;
	takes(seconds_until_end($slow->connect, $start), $second, 'a connection that says nothing is ended');

	$start = time;
	$socket = $slow->connect;
	print $socket $first_line;
	takes(seconds_until_end($socket, $start, sub { print $socket 'X'; $socket->flush }), $second,
		'a header that never ends is ended, although it goes on');

	$start = time;
	$socket = $slow->connect;
	print $socket $head;
	takes(seconds_until_end($socket, $start, sub { print $socket 'x'; $socket->flush }), $second, 'and so is a body');
	$slow->metric_becomes('requests_rejected_total{status="408",reason="too_slow"}', 2, 'which is counted');

	# Between requests another time counts.
	$socket = $slow->connect;
	$start = time;
	is($slow->deliver($event, socket => $socket), 200, 'an event is taken meanwhile');
	wait_until { time - $start > 1.5 * $second } 'a request would be too slow';
	is($slow->deliver($event, socket => $socket), 200, 'a connection that is not used may wait for longer');

	# The database's time is not the client's.
	my $session = $t->session;

	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	$start = time;
	print $socket request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event, signed($event) ], $event);
	$socket->flush;
	wait_until { time - $start > 1.5 * $second } 'a request would be too slow';
	$session->query_safe('COMMIT');
	$session->quit;
	status_is(read_answer($socket), 200, 'waiting for the database is not counted against the client');
	close $socket;
	$slow->metric_becomes('connections', 0, 'all slow connections are gone');
	$slow->stops_cleanly;
}
{
	my $second = $slowness;
	my $slow = SentdmReceiver->new($t->node, options => { 'request-timeout' => '600s', 'idle-timeout' => "${second}s" });
	my $event = event(uuid(), 'sent');
	my ($socket, $start);

	$receiver = $slow;
	$socket = $slow->connect;
	$start = time;
	is($slow->deliver($event, socket => $socket), 200, 'an event is taken');
	takes(seconds_until_end($socket, $start), $second, 'a connection that is not used again is ended');

	# One that is used for longer than that, if this machine lets us use it often.
	wait_until
	{
		$socket = $slow->connect;
		$start = time;
		1 while $slow->deliver($event, socket => $socket) == 200 && time - $start < 2.5 * $second;
		time - $start >= 2.5 * $second
	}
	'a connection that is used lives on';
	pass('one that is used lives on');
	$slow->stops_cleanly;
}

# Many

{
	my $many = SentdmReceiver->new($t->node, options => { 'max-connections' => 20, 'max-connections-per-address' => 8, 'threads' => 1 });
	my $event = event(uuid(), 'sent');
	my @sockets = map { $many->connect } 1 .. 8;
	my $socket;

	$receiver = $many;
	$many->metric_becomes('connections', 8, 'so many connections from one address are taken');
	$socket = $many->connect;
	ok(defined seconds_until_end($socket, time), 'one more is ended at once');
	$many->metric_becomes('connections_refused_total', 1, 'and counted');
	is($many->deliver($event, socket => $sockets[$_]), 200, "the others work ($_)") foreach 0, 7;
	close pop @sockets;
	$many->metric_becomes('connections', 7, 'when one goes');
	$socket = $many->connect;
	is($many->deliver($event, socket => $socket), 200, 'there is room for another');
	is(($many->get('/health/live'))[0], 200, 'whoever asks how it is gets an answer meanwhile');
	$many->stops_cleanly;
}

# Behind a proxy that is trusted: its clients count, not itself

{
	my $proxied = SentdmReceiver->new($t->node,
		options => { 'trusted-proxies' => '127.0.0.0/8, 10.0.0.0/8', 'max-connections-per-address' => 2 });
	my $event = event(uuid(), 'sent');
	my $session = $t->session;
	my (@sockets, @statuses);
	my $position = $proxied->log_position;

	my $start = sub {
		my ($forwarded) = @_;
		my $socket = $proxied->connect;

		print $socket request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event,
			'X-Forwarded-For' => $forwarded, signed($event) ], $event);
		$socket->flush;
		push @sockets, $socket;
	};

	$receiver = $proxied;
	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	$start->('192.0.2.1');
	$start->('6.6.6.6, 192.0.2.1, 10.1.2.3');
	wait_until { $proxied->metric('requests_received_total') == 2 } 'two requests wait';
	$start->('192.0.2.1');
	status_is(read_answer($sockets[2]), 429, 'a third request of one client is 429');
	$start->('192.0.2.1, 192.0.2.2');
	$start->('2001:db8::1');
	$start->('2001:db8::ffff');
	wait_until { $proxied->metric('requests_received_total') == 5 } 'those of others wait';
	$start->('2001:db8:0:0:1::1');
	status_is(read_answer($sockets[6]), 429, 'of one /64 also');
	$session->query_safe('COMMIT');
	$session->quit;
	is(join(',', map { read_answer($sockets[$_])->{status} } 0, 1, 3, 4, 5), '200,200,200,200,200', 'the others are taken');
	$start->('192.0.2.1');
	status_is(read_answer($sockets[7]), 200, 'and then there is room again');
	$proxied->log_becomes(qr/client=192\.0\.2\.2 .* status=200/, $position, 'the log names the clients');
	$proxied->log_becomes(qr/client=2001:db8::ffff .* status=200/, $position, 'also of IPv6');
	unlike($proxied->log_since($position), qr/6\.6\.6\.6/, 'and not whom a client names');
	$proxied->stops_cleanly;
}
{
	my $position;
	my $event = event(uuid(), 'sent');
	my $plain = SentdmReceiver->new($t->node);

	$receiver = $plain;
	$plain->post($event, [ 'X-Forwarded-For' => '192.0.2.1', signed($event) ]);
	$plain->log_becomes(qr/client=127\.0\.0\.1 .*status=200/, 0, 'nobody is believed who is not trusted');
	$plain->stops_cleanly;
}

# More than the database takes

# An event sent, its answer still to be read.
sub start_event
{
	my ($event) = @_;
	my $socket = $receiver->connect;

	print $socket request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $event, signed($event) ], $event);
	$socket->flush;
	return $socket;
}

# How many of some events are stored, and how many rows that are.
sub stored
{
	return $t->sql('SELECT count(DISTINCT sent_id), count(*) FROM sentdm.events WHERE sent_id IN ('
		  . join(',', map { "'" . decode_json($_)->{payload}{message_id} . "'" } @_) . ')');
}

{
	my $full = SentdmReceiver->new($t->node,
		options => { 'queue-events' => 3, 'queue-bytes' => '1MB', 'batch-events' => 2, 'answer-timeout' => '300s' });
	my $session = $t->session;
	my ($answer, @sockets);
	my @events = map { event(uuid(), 'sent') } 1 .. 5;

	$receiver = $full;
	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	push @sockets, start_event($events[0]);
	wait_until { $full->metric('requests_received_total') == 1 && $full->metric('queue_depth') == 0 } 'the first event is in the database';
	push @sockets, map { start_event($_) } @events[ 1 .. 3 ];
	wait_until { $full->metric('queue_depth') == 3 } 'three more wait';
	$answer = read_answer(start_event($events[4]));
	status_is($answer, 503, 'with a full queue an event is 503');
	like($answer->{headers}{'retry-after'}, qr/^\d+$/, 'to be sent again later');
	is(decode_json($answer->{body})->{error}, 'too many events are waiting', 'for a reason');

	# A body that arrives needs memory, not a place.
	my $large = '"' . 'a' x (700 * 1024) . '"';
	my $half = $full->connect;

	print $half request('POST', $path, [ 'Content-Type' => 'application/json', 'Content-Length' => length $large, signed($large) ],
		substr $large, 0, 600 * 1024);
	$half->flush;
	wait_until { $full->metric('queue_bytes') > 512 * 1024 } 'most of a large body is there';
	status_is($full->post($large, [ signed($large) ]), 503, 'without memory a body is 503');
	$full->metric_becomes('requests_unavailable_total{reason="no_memory"}', 1, 'for that reason');
	close $half;
	wait_until { $full->metric('queue_bytes') < 512 * 1024 } 'the memory is given back';
	$full->metric_becomes('requests_unavailable_total{reason="queue_full"}', 1, 'and reasons are counted');
	$session->query_safe('COMMIT');
	$session->quit;
	is(join(',', map { (read_answer($_) || { status => 'none' })->{status} } @sockets), '200,200,200,200', 'those that had a place are taken');
	is(stored(@events), '4|4', 'and stored');
	$full->metric_becomes('queue_bytes', 0, 'no memory stays reserved');
	$full->stops_cleanly;
}

# Nobody waits for ever

{
	my $short = SentdmReceiver->new($t->node, options => { 'batch-events' => 2, 'answer-timeout' => (2 * $slowness) . 's' });
	my $session = $t->session;
	my @events = map { event(uuid(), 'sent') } 1 .. 5;
	my @sockets;

	$receiver = $short;
	$session->query_safe('BEGIN; LOCK TABLE sentdm.events');
	@sockets = map { start_event($_) } @events;
	is(join(',', map { (read_answer($_) || { status => 'none' })->{status} } @sockets), '503,503,503,503,503', 'what is not stored in time is 503');
	$session->query_safe('COMMIT');
	$session->quit;
	$short->wait_until_ready;
	is(stored(@events), '0|0', 'and not stored');
	foreach my $event (@events)
	{
		wait_until { $short->deliver($event) == 200 } 'and then it is taken';
	}
	is(stored(@events), '5|5', 'and then it is taken, once');
	$short->metric_becomes('queue_bytes', 0, 'no memory stays reserved');
	$short->stops_cleanly;
}

$t->stops_cleanly;
done_testing();
