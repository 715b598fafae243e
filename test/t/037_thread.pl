# The worker fails while its other thread is in the middle of encrypted requests: the
# thread ends before the worker does, which must not take the server with it.
#
# Needs a server with the library that "make failpoints" builds, as 040 does.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;

BEGIN
{
	die "SENTDM_FAILPOINT_BIN is not set" unless $ENV{SENTDM_FAILPOINT_BIN};
	$ENV{PATH} = "$ENV{SENTDM_FAILPOINT_BIN}:$ENV{PATH}";
}
use SentdmTest;
use Test::More;

my $failures = 3;	# each makes the launcher wait longer
my ($certificate, $private) = make_certificate();
my $t = SentdmTest->new('thread', settings => { log_statement => 'none', 'sentdm.ca_file' => $certificate });
my $wanted = $t->node->data_dir . '/sentdm.failpoint';
my $https = free_port();
my ($nginx) = start_nginx(<<"CONF");
    ssl_certificate $certificate;
    ssl_certificate_key $private;
    server {
        listen 127.0.0.1:$https ssl;
        keepalive_requests 1;
        location / { proxy_pass @{[ $t->url ]}; }
    }
CONF

wait_for_port($https);
$t->set('sentdm.base_url' => "https://127.0.0.1:$https");
foreach my $failure (1 .. $failures)
{
	open my $file, '>', "$wanted.new" or die "could not write $wanted: $!";
	print $file "under-way error\n";
	close $file;
	rename "$wanted.new", $wanted or die "could not rename $wanted: $!";
	$t->sql("SELECT sentdm_send('+1555' || to_char(n, 'FM0000000'), body => 'x') FROM generate_series(${failure}001, ${failure}100) n");
	wait_until { -e "$wanted.reached" } 'the worker fails';
	unlink "$wanted.reached";
	$t->outbox_drains('and another sends all');
}
is($t->count_in_log(qr/ERROR:  failpoint "under-way"/, 0), $failures, "a worker failed $failures times");
is($t->count_in_log(qr/terminated by signal/, 0), 0, '... and ended in an orderly way');
$t->accepted_once('... and all was accepted once');
end_process($nginx);
$t->stops_cleanly;

done_testing();
