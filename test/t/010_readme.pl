# README.md is true: its SQL runs, in order, and answers what it shows there; its
# tables name the functions, columns and settings that there are.  Blocks of other
# kinds are for the reader only.
use strict;
use warnings;

use Cwd qw(abs_path);
use File::Basename qw(dirname);
use JSON::PP;
use PostgreSQL::Test::Utils;
use SentdmPage;
use SentdmTest;
use Test::More;

my %seconds = (ms => 0.001, s => 1, min => 60, h => 3600, d => 86400);
my %set_by = (sighup => 'file', superuser => 'superuser', user => 'anyone');

# Settings that have no effect yet, and so are not described.
my %undescribed = map { $_ => 1 } qw(sentdm.notify sentdm.refresh_after);

my $path = dirname(abs_path(__FILE__)) . '/../../README.md';
my $readme = slurp_file($path);
my ($secret) = $readme =~ /sentdm_set_webhook_secret\('(whsec_[^']+)'/;
my $t = SentdmTest->new('readme', enable => 0,
	standin => [ '--lifecycle', 'auto', '--step-ms', '1', '--webhook-secret', $secret ]);
my $page = SentdmPage->new($t, $path, database => 'readme', while_waiting => \&hand_on_webhooks);
my $handed_on = 0;

# The rows of the table that follows a heading, as lists of cells.
sub table
{
	my ($heading) = @_;
	my ($section) = $readme =~ /^### \Q$heading\E\n(.*?)(?=^##)/ms;

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

# The tables, against the extension; while it is installed

sub check_functions
{
	my $text = join ' ', map { $_->[0] } table('Functions');
	my %described = map { $_ => 1 } $text =~ /\b(sentdm_\w+)\(/g;
	my $there = $t->sql("SELECT string_agg(DISTINCT proname, ' ' ORDER BY proname) FROM pg_proc WHERE proname ~ '^sentdm_'");

	is(join(' ', sort keys %described), $there, 'the functions are those of the table');
	return;
}

sub check_relations
{
	my %described = map { $_->[0] =~ s/`//gr => $_->[2] } table('Relations');

	foreach my $relation (sort keys %described)
	{
		# What stands in parentheses are values and remarks.
		my @columns = $described{$relation} =~ s/\([^)]*\)//gr =~ /`(\w+)`/g;
		my $unknown = $t->sql("SELECT string_agg(c, ' ') FROM unnest('{" . join(',', @columns) . "}'::name[]) c"
			  . " WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'sentdm.$relation'::regclass AND attname = c)");

		is($unknown, '', "relation $relation has the columns that the table names");
	}
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

		next if $undescribed{$name};
		# Both secrets show stars, whatever they are.
		$default = '' if $default =~ /^\*+$/;
		is_deeply(delete $described{$name}, [ canonical($default, $unit), $set_by{$context} ],
			"setting $name is as the table says");
	}
	is(join(' ', sort keys %described), '', 'the table names no other settings');
	return;
}

$t->sql('CREATE DATABASE readme');
check_functions();
check_relations();
check_settings();

$page->works;
is($t->summary->{max_effects_per_key}, 1, 'nothing was sent twice');
$t->stops_cleanly;

done_testing();
