# SentdmPage.pm
#		A page of the documentation whose code is run, in order, and must answer what
#		is shown there.
#
# A ```sql block is run by psql, and those of other languages that the test asks for
# by their programs, with PGHOST and so on set.  A ```text block is what the block
# before it prints, apart from ids and times.  Before a block, all that is due is
# sent.  Comments of the page tell the test what a reader sees or does himself:
#
#	<!-- wait: CONDITION -->	wait for an SQL condition before the block
#	<!-- until: TEXT -->		the block does not end by itself: interrupt it when
#						it has printed this; compared is the last that it printed
#	<!-- step: NAME -->		call that step of the test before the block
package SentdmPage;

use strict;
use warnings;

use IPC::Run;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;

my %programs = (
	sql => [ 'psql', '-X', '-q', '-P', 'footer=off', '-P', 'pager=off', '-v', 'ON_ERROR_STOP=1', '-f', '-' ],
	sh => [ 'bash', '-e', '-u', '-o', 'pipefail', '-s' ],
	python => [ 'python3', '-' ],
	js => [ 'node', '-' ]);

# What is due is sent, unless nothing is to be sent.
my $all_sent = 'NOT EXISTS (SELECT FROM sentdm.outbox WHERE due_at <= now())'
  . ' OR NOT EXISTS (SELECT FROM sentdm.sender WHERE enabled AND paused_at IS NULL)';

# t: a SentdmTest; path: of the page.  database: where SQL is run; languages: what is
# run besides SQL; environment: for programs; while_waiting: called now and then;
# steps: name => code.
sub new
{
	my ($class, $t, $path, %params) = @_;

	return bless {
		t => $t, text => slurp_file($path), languages => [], directory => '.', steps => {}, while_waiting => sub { }, %params,
		environment => {
			PGHOST => $t->node->host, PGPORT => $t->node->port, PGDATABASE => $params{database},
			PGUSER => scalar getpwuid $<, %{ $params{environment} || {} } }
	}, $class;
}

sub text { my ($self) = @_; return $self->{text} }

# The blocks to be run: language, code and line; expected, when an output is shown;
# wait, until and step.
sub blocks
{
	my ($self) = @_;
	my %run = map { $_ => 1 } 'sql', @{ $self->{languages} };
	my (@blocks, $language, $code, %remarks);
	my $line = 0;

	foreach (split /\n/, $self->{text})
	{
		$line++;
		if (defined $language && /^```$/)
		{
			if ($language eq 'text')
			{
				$blocks[-1]{expected} = $code;
			}
			elsif ($run{$language})
			{
				push @blocks, { line => $line, language => $language, code => $code, %remarks };
				%remarks = ();
			}
			undef $language;
		}
		elsif (defined $language) { $code .= "$_\n" }
		elsif (/^```(\w+)$/) { ($language, $code) = ($1, '') }
		elsif (/^<!-- (wait|until|step): (.*) -->$/) { $remarks{$1} = $2 }
	}
	return @blocks;
}

sub is_true
{
	my ($self, $condition) = @_;

	return $self->{t}->sql("SELECT $condition", $self->{database}) eq 't';
}

sub prepare
{
	my ($self, $block) = @_;

	$self->{steps}{ $block->{step} }->() if $block->{step};
	return unless $self->is_true("to_regclass('sentdm.outbox') IS NOT NULL");
	wait_until { $self->is_true($all_sent) } 'the queue is empty';
	return unless $block->{wait};
	wait_until { $self->{while_waiting}->(); $self->is_true($block->{wait}) } $block->{wait};
	return;
}

# Run a block; returns whether it went well, its output and its errors.
sub run
{
	my ($self, $block) = @_;
	my ($out, $error) = ('', '');
	my @run = ($programs{ $block->{language} }, '<', \$block->{code}, '>', \$out, '2>', \$error,
		init => sub { chdir $self->{directory} or die "could not enter $self->{directory}: $!" });
	local %ENV = (%ENV, %{ $self->{environment} });

	if (!$block->{until})
	{
		my $ok = IPC::Run::run(@run);

		return ($ok, $out, $error);
	}
	my $run = IPC::Run::start(@run);

	wait_until { $run->pump_nb; $out =~ /\Q$block->{until}\E/ } "the output has $block->{until}: $out$error";
	$run->signal('INT');
	$run->finish;
	# What was printed before the last time is not shown.
	$out =~ s/\A.*(?=^[^\n]+\(every )//ms;
	return (1, $out, $error);
}

# Ids and times differ from run to run; psql pads with blanks what editors strip.
sub normalized
{
	my ($text) = @_;

	$text =~ s/\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b/00000000-0000-0000-0000-000000000000/g;
	$text =~ s/^.*\((every \S+)\)$/$1/mg;
	$text =~ s/[ \t]+$//mg;
	$text =~ s/\n+\z/\n/;
	return $text;
}

# Run all blocks, as tests.
sub works
{
	my ($self) = @_;

	foreach my $block ($self->blocks)
	{
		$self->prepare($block);
		my ($ok, $out, $error) = $self->run($block);

		ok($ok, "the $block->{language} that ends in line $block->{line} runs") or return diag($error);
		is(normalized($out), normalized($block->{expected}), 'and answers what is shown') if defined $block->{expected};
	}
	return;
}

1;
