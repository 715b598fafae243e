# docs/reference.md is what test/reference.sql prints, and everything that users see
# has a comment there; CONTRIBUTING.md says of every source file what it is for.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use IPC::Run;
use PostgreSQL::Test::Utils;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('reference', enable => 0);
my $now = slurp_file("$FindBin::Bin/../../docs/reference.md");
my $printed;

is($t->sql(<<'SQL'), '', 'everything has a comment');
WITH object AS (
	SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON d.refobjid = e.oid AND d.refclassid = 'pg_extension'::regclass
	WHERE d.deptype = 'e' AND e.extname = 'sentdm' AND pg_describe_object(d.classid, d.objid, 0) !~ '^(sequence|type|toast)')
SELECT pg_describe_object(classid, objid, 0) FROM object
WHERE NOT EXISTS (SELECT FROM pg_description d WHERE d.classoid = classid AND d.objoid = objid AND d.objsubid = 0)
UNION ALL
SELECT pg_describe_object(classid, objid, a.attnum) FROM object JOIN pg_attribute a ON a.attrelid = objid AND a.attnum > 0
WHERE classid = 'pg_class'::regclass AND col_description(objid, a.attnum) IS NULL
SQL

IPC::Run::run([ 'psql', '-X', '-A', '-t', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $t->node->connstr('postgres'),
		'-f', "$FindBin::Bin/../reference.sql", '-o', "$PostgreSQL::Test::Utils::tmp_check/reference.md" ], '2>', \my $error);
is($error, '', 'the reference is printed');
$printed = slurp_file("$PostgreSQL::Test::Utils::tmp_check/reference.md");

# Line by line, so that a failure says what changed.
my (@printed, @now) = split /\n/, $printed;

@now = split /\n/, $now;
my %printed = map { $_ => 1 } @printed;
my %now = map { $_ => 1 } @now;

is_deeply([ grep { !$now{$_} } @printed ], [], 'docs/reference.md has all of it');
is_deeply([ grep { !$printed{$_} } @now ], [], '... and nothing else');
ok($printed eq $now, '... in this order') or diag('make it anew: "make reference" in a database that has the extension');
cmp_ok(length $printed, '>', 10_000, '... and is not cut off');

# The map of files

my $map = slurp_file("$FindBin::Bin/../../CONTRIBUTING.md");
my %named = map { $_ => 1 } $map =~ m{`((?:src|test)/\w[\w/]*\.\w+)}g;
my @sources = map { s{^\Q$FindBin::Bin\E/\.\./\.\./}{}r } glob "$FindBin::Bin/../../src/*.c";

is_deeply([ grep { !$named{$_} } @sources ], [], 'CONTRIBUTING.md names every source file');
is_deeply([ grep { !-e "$FindBin::Bin/../../$_" } sort keys %named ], [], '... and none that is not there');

$t->stops_cleanly;
done_testing();
