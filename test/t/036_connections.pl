# A server that speaks HTTP/2 gets few connections, also when all requests have to be
# made on new ones at once; one that does not gets one for each request.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;

my ($certificate, $private) = make_certificate();
my $t = SentdmTest->new('connections', settings => { 'sentdm.max_in_flight' => 256, 'sentdm.ca_file' => $certificate });
my ($http2, $http1) = (free_port(), free_port());
my $number = 0;
my ($nginx, $directory) = start_nginx(<<"CONF");
    ssl_certificate $certificate;
    ssl_certificate_key $private;
    server {
        listen 127.0.0.1:$http2 ssl http2;
        location / { proxy_pass @{[ $t->url ]}; }
    }
    server {
        listen 127.0.0.1:$http1 ssl;
        location / { proxy_pass @{[ $t->url ]}; }
    }
CONF

sub send_all
{
	my ($n) = @_;

	$t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x') FROM generate_series("
		  . ($number + 1) . ', ' . ($number + $n) . ') n');
	$number += $n;
	$t->outbox_drains("$n messages are sent");
	return;
}

# What nginx has seen since a place in its log: how many requests, on how many
# connections, in which protocol, and how many at once.
sub seen_since
{
	my ($position) = @_;
	my @requests = map { [ split / / ] } split /\n/, slurp_file("$directory/requests.log", $position);
	my ($now, $most) = (0, 0);

	foreach (sort { $a->[0] <=> $b->[0] || $a->[1] <=> $b->[1] } map { [ $_->[2], -1 ], [ $_->[2] - $_->[3], 1 ] } @requests)
	{
		$now += $_->[1];
		$most = $now if $now > $most;
	}
	return (scalar(@requests), scalar(distinct(map { $_->[1] } @requests)), join(' ', distinct(map { $_->[0] } @requests)), $most);
}

wait_for_port($_) foreach $http2, $http1;
$t->configure_standin(latency_ms => 200);
$t->set('sentdm.base_url' => "https://127.0.0.1:$http2");
send_all(600);

my ($requests, $connections, $spoken, $at_once) = seen_since(0);

is($spoken, 'HTTP/2.0', 'HTTP/2 is spoken');
is($requests, 600, 'each message is a request');
cmp_ok($connections, '<=', 6, 'on few connections');

# All connections are closed, and 256 requests are to be in flight at once again.
my $position = -s "$directory/requests.log";

$t->set('sentdm.base_url' => "https://127.0.0.1:$http2/");
send_all(600);
($requests, $connections, $spoken, $at_once) = seen_since($position);
is($requests, 600, 'after a change of the settings, too, each message is a request');
cmp_ok($connections, '<=', 6, 'and so many at once do not open a connection each');
cmp_ok($at_once, '>', 100, 'though they are at once');

$position = -s "$directory/requests.log";
$t->set('sentdm.base_url' => "https://127.0.0.1:$http1");
send_all(600);
($requests, $connections, $spoken, $at_once) = seen_since($position);
is($spoken, 'HTTP/1.1', 'where HTTP/2 is not spoken,');
is($requests, 600, 'each message is a request, too,');
cmp_ok($at_once, '>', 100, 'and so many are at once all the same');

$t->accepted_once('nothing was accepted twice');
end_process($nginx);
$t->stops_cleanly;

done_testing();
