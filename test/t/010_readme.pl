# README.md is true: the server is set up as it says; its SQL runs, in order, and
# answers what it shows there, and so does that of the pages that go on from it; its
# program takes webhooks; its settings are as it says, and its links lead somewhere.
use strict;
use warnings;

use Cwd qw(abs_path);
use File::Basename qw(basename dirname);
use HTTP::Tiny;
use IO::Socket::INET;
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use SentdmPage;
use SentdmTest;
use Test::More;

my %seconds = (ms => 0.001, s => 1, min => 60, h => 3600, d => 86400);
my %set_by = (sighup => 'file', superuser => 'superuser', user => 'anyone');

my $path = dirname(abs_path(__FILE__)) . '/../../README.md';
my $readme = slurp_file($path);
my ($secret) = $readme =~ /sentdm_set_webhook_secret\('(whsec_[^']+)'/;
my $scratch = PostgreSQL::Test::Utils::tempdir();
my $t = SentdmTest->new('readme', enable => 0, settings => { 'sentdm.api_key' => undef, server_settings() },
	standin => [ '--lifecycle', 'auto', '--step-ms', '1', '--webhook-secret', $secret ]);
my @pages = map { SentdmPage->new($t, dirname($path) . "/$_", database => 'readme', while_waiting => \&hand_on_webhooks) }
  qw(README.md docs/sending.md docs/operating.md);
my $handed_on = 0;

# The block of another language than SQL that has a text in it.
sub block_with
{
	my ($language, $text) = @_;
	my ($block) = grep { /\Q$text\E/ } $readme =~ /^```$language\n(.*?)^```$/msg;

	return $block || die "README.md has no $language block with $text";
}

# The settings that it tells to make, with a key file made by its command; only the
# place of the file and its owner are our own.
sub server_settings
{
	my %settings = block_with('conf', 'sentdm.api_key_file') =~ /^(sentdm\.\w+) = '(.*)'$/mg;
	my $file = $settings{'sentdm.api_key_file'};
	my $command = block_with('sh', $file) =~ s/^sudo //r =~ s/-o postgres -g postgres //r =~ s/\Q$file\E/$scratch\/key/r;

	IPC::Run::run([ 'sh', '-e', '-c', $command ], '<', \'a-key-for-tests-0123456789') or die 'could not make the key file';
	return (%settings, 'sentdm.api_key_file' => "$scratch/key");
}

# The rows of the table that follows a heading, as lists of cells.
sub table
{
	my ($heading) = @_;
	my ($section) = $readme =~ /^## \Q$heading\E\n(.*?)(?=^## )/ms;

	return map { [ map { s/^ +| +$//gr } /[^|]+/g ] } grep { /^\| `/ } split /\n/, $section;
}

# Hand the webhooks that the stand-in has made since the last time to the database.
sub hand_on_webhooks
{
	my $news = $t->control('GET', "events?after=$handed_on");
	my $list = JSON::PP->new->utf8->encode($news->{events});

	# Thousands of signatures are no use in the log.
	$t->sql("SET log_statement = 'none';"
		  . "SELECT count(*) FROM (SELECT array_agg(convert_to(e ->> 'body', 'UTF8')) AS bodies,"
		  . " array_agg(e -> 'headers') AS headers FROM jsonb_array_elements(\$list\$$list\$list\$) e) AS news,"
		  . " sentdm_receive_webhooks(bodies, headers)", 'readme') if @{ $news->{events} };
	$handed_on = $news->{next};
	return;
}

# Times as seconds, everything else as it is.
sub canonical
{
	my ($value, $unit) = @_;

	return $value =~ /^([0-9]+)(ms|s|min|h|d)$/ ? $1 * $seconds{$2}
	  : $unit && $value > 0 ? $value * $seconds{$unit} : $value;
}

sub check_settings
{
	my %described;

	foreach (table('Settings'))
	{
		my ($name, $default, $set_by) = map { s/`//gr } @$_;

		$described{$name} = [ canonical($default), $set_by ];
	}
	foreach (split /\n/, $t->sql("SELECT name, boot_val, context, unit FROM pg_settings WHERE name ~ '^sentdm\\.' ORDER BY 1"))
	{
		my ($name, $default, $context, $unit) = split /\|/;

		# Both secrets show stars, whatever they are.
		$default = '' if $default =~ /^\*+$/;
		is_deeply(delete $described{$name}, [ canonical($default, $unit), $set_by{$context} ], "setting $name is as the table says")
		  if $described{$name};
	}
	is(join(' ', sort keys %described), '', 'the table names no other settings');
	return;
}

# The links of all pages of the documentation that lead to other pages, or to a place
# in one.
sub check_links
{
	my $root = dirname($path);
	my %anchors;

	foreach my $page ("$root/README.md", "$root/CONTRIBUTING.md", glob "$root/docs/*.md")
	{
		$anchors{ abs_path($page) } = { map { lc s/[^\w -]//gr =~ s/ /-/gr => 1 } slurp_file($page) =~ /^##+ (.*)$/mg };
	}
	foreach my $page (sort keys %anchors)
	{
		my @broken;

		foreach my $link (slurp_file($page) =~ /\]\((?!https?:)([^)\s]+)\)/g)
		{
			my ($file, $place) = split /#/, $link;
			my $target = $file eq '' ? $page : dirname($page) . "/$file";

			push @broken, $link
			  if !-e $target || defined $place && !$anchors{ abs_path($target) }{$place};
		}
		is("@broken", '', 'the links of ' . basename($page) . ' lead somewhere');
	}
	return;
}

# The program that takes webhooks, in a database that the page does not touch.
sub check_program
{
	my $socket = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1') or die "no port: $!";
	my $port = $socket->sockport;
	my $url = "http://127.0.0.1:$port/webhooks/sent";
	my $output = '';
	my $program = do
	{
		local %ENV = (%ENV, PGHOST => $t->node->host, PGPORT => $t->node->port, PGDATABASE => 'postgres');

		close $socket;
		append_to_file("$scratch/webhooks.py", block_with('python', 'sentdm_receive_webhook'));
		IPC::Run::start([ 'python3', '-m', 'flask', '--app', "$scratch/webhooks.py", 'run', '--port', $port ],
			'<', \undef, '>&', \$output);
	};
	my $answer;

	eval {
		$t->sql("SELECT sentdm_set_webhook_secret('$secret')");
		wait_until { $program->pump_nb; HTTP::Tiny->new->get($url)->{status} == 405 } 'the program listens';
		$answer = $t->control('POST', 'webhooks', { event => 'message.delivered', url => $url });
		is_deeply($answer->{status_codes}, [ 200 ], 'the program answers 200 to an event');
		is_deeply(decode_json($answer->{responses}[0]), { received => JSON::PP::true }, '... as Sent likes it');
		is(HTTP::Tiny->new->post($url, { content => '{}' })->{status}, 401, '... and 401 to what is not signed');
		is($t->sql('SELECT string_agg(event, \',\') FROM sentdm.events'), 'message.delivered', '... and the event is stored');
		1;
	} or fail("the program takes webhooks: $@$output");
	$program->kill_kill;
	return;
}

$t->sql('CREATE DATABASE readme');
check_settings();
check_links();
check_program();

$_->works foreach @pages;
is($t->summary->{max_effects_per_key}, 1, 'nothing was sent twice');
$t->stops_cleanly;

done_testing();
