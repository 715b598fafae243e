# docs/testing.md is true: what it does runs and answers what is shown there, with
# pgTAP too, and nothing of it reaches Sent but what went to the sandbox.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmPage;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('testing', enable => 0);
my %mode = (held => 'hold', sandbox => 'sandbox');

$t->sql('CREATE DATABASE shop');
$t->sql('CREATE EXTENSION sentdm; SELECT sentdm_enable()', 'shop');

# A running worker obeys the mode a moment after it was set.
my %steps = map {
	my $mode = $mode{$_};
	$_ => sub { $t->becomes("SELECT mode FROM sentdm.worker_report()", $mode, "the worker is in mode $mode", 'shop') }
} keys %mode;
my $page = SentdmPage->new($t, "$FindBin::Bin/../../docs/testing.md", database => 'shop', steps => \%steps);

$page->works;

my @arrived = $t->arrived;

count_is(\@arrived, 1, 'one message reached Sent');
ok($t->last_request->{json}{sandbox}, '... for the sandbox');
$t->stops_cleanly;
done_testing();
