# A message is sent if and only if the transaction that sent it committed,
# however transactions are begun, nested, prepared, undone and committed.

use strict;
use warnings;

use FindBin;
use lib $FindBin::Bin;
use SentdmTest;
use Test::More;

my $t = SentdmTest->new('transactions');
my $seen = 0;

# What arrived since the last call is exactly these numbers.
sub exactly_arrived
{
	my ($expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	wait_until { $t->sql('SELECT count(*) FROM sentdm.outbox') == 0 } "the queue is empty: $name";
	my @arrived = $t->arrived($seen);
	$seen += @arrived;
	is_deeply([ sort map { @{ $_->{to} } } @arrived ], [ sort map { "+1555000$_" } @$expected ], $name);
	return;
}

# Run statements that may fail, then see what arrives.
sub sends
{
	my ($sql, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$t->node->psql('postgres', $sql, on_error_stop => 0);
	exactly_arrived($expected, $name);
	return;
}

# A short name, and tables whose triggers send.
$t->sql(<<'SQL');
CREATE FUNCTION say(suffix int) RETURNS uuid LANGUAGE sql
	AS $$ SELECT sentdm_send('+1555000' || suffix, body => 'x') $$;
CREATE FUNCTION on_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM say(NEW.suffix); RETURN NULL; END $$;
CREATE TABLE plain (suffix int CHECK (suffix < 9000));
CREATE TRIGGER t AFTER INSERT ON plain FOR EACH ROW EXECUTE FUNCTION on_row();
CREATE TABLE deferred (suffix int UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE CONSTRAINT TRIGGER t AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION on_row();
CREATE TABLE replicated (suffix int);
CREATE TRIGGER t AFTER INSERT ON replicated FOR EACH ROW EXECUTE FUNCTION on_row();
ALTER TABLE replicated ENABLE ALWAYS TRIGGER t;
CREATE TABLE for_replicas (suffix int);
CREATE TRIGGER t AFTER INSERT ON for_replicas FOR EACH ROW EXECUTE FUNCTION on_row();
ALTER TABLE for_replicas ENABLE REPLICA TRIGGER t;
CREATE TABLE without_code (number text);
CREATE CONSTRAINT TRIGGER t AFTER INSERT ON without_code DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION sentdm_send_trigger('recipient=number', 'body=number');
SQL

# One session

sends('SELECT say(1001)', [1001], 'a statement by itself sends');
sends('BEGIN; SELECT say(1011); SELECT say(1012); COMMIT', [ 1011, 1012 ], 'a transaction sends when it commits');
sends('BEGIN; SELECT say(1021); ROLLBACK', [], 'a transaction that rolls back sends nothing');
sends('BEGIN; SELECT say(1022); SELECT 1/0; COMMIT', [], 'a transaction that failed sends nothing');
sends('SELECT say(1023), 1/0', [], 'a statement that failed sends nothing');
sends('SELECT say(n), 1/(1033 - n) FROM generate_series(1031, 1033) n', [], '... also when it failed in the middle');
sends('SELECT say(1041) \; SELECT 1/0', [], 'statements sent as one query are one transaction');
sends('SELECT say(1051) \; SELECT say(1052)', [ 1051, 1052 ], '... which sends when it commits');
sends('BEGIN; SELECT say(1061); COMMIT AND CHAIN; SELECT say(1062); ROLLBACK AND CHAIN; SELECT say(1063); COMMIT',
	[ 1061, 1063 ], 'chained transactions are told apart');

# Savepoints

sends(<<'SQL', [ 1101, 1103 ], 'what a savepoint undid is not sent, the rest is');
BEGIN; SELECT say(1101); SAVEPOINT a; SELECT say(1102); ROLLBACK TO a; SELECT say(1103); COMMIT
SQL
sends(<<'SQL', [ 1111, 1112, 1114 ], 'savepoints nest');
BEGIN; SELECT say(1111); SAVEPOINT a; SELECT say(1112); SAVEPOINT b; SELECT say(1113); ROLLBACK TO b; RELEASE b;
SELECT say(1114); RELEASE a; COMMIT
SQL
sends(<<'SQL', [], 'an outer savepoint undoes an inner one that was released');
BEGIN; SAVEPOINT a; SAVEPOINT b; SELECT say(1121); RELEASE b; ROLLBACK TO a; COMMIT
SQL
sends(<<'SQL', [1132], 'only what follows a savepoint that was rolled back is sent');
BEGIN; SAVEPOINT a; SELECT say(1131); SELECT 1/0; ROLLBACK TO a; SELECT say(1132); COMMIT
SQL
sends(<<'SQL', [ 1141, 1143 ], 'an exception block of PL/pgSQL undoes its messages');
DO $$ BEGIN
	PERFORM say(1141);
	BEGIN PERFORM say(1142); RAISE EXCEPTION 'no'; EXCEPTION WHEN OTHERS THEN PERFORM say(1143); END;
END $$
SQL
sends(<<'SQL', [ 1151, 1153 ], 'a procedure that commits and rolls back sends what it committed');
CREATE PROCEDURE in_parts() LANGUAGE plpgsql AS $$ BEGIN
	PERFORM say(1151); COMMIT; PERFORM say(1152); ROLLBACK; PERFORM say(1153);
END $$;
CALL in_parts();
SQL

# Triggers

sends("COPY plain FROM stdin;\n1201\n1202\n1203\n\\.\n", [ 1201, 1202, 1203 ],
	'COPY into a table with a trigger sends for each row');
sends("COPY plain FROM stdin;\n1211\n9999\n1212\n\\.\n", [], 'COPY that failed at a row sends nothing');
sends('BEGIN; INSERT INTO deferred VALUES (1221), (1222); DELETE FROM sentdm.outbox WHERE false; COMMIT', [ 1221, 1222 ],
	'a deferred trigger sends although it runs during the commit');
sends('INSERT INTO deferred VALUES (1231), (1231)', [], '... unless the commit fails');
sends('SET session_replication_role = replica; INSERT INTO plain VALUES (1241); INSERT INTO replicated VALUES (1242); SELECT say(1243)',
	[ 1242, 1243 ], 'with session_replication_role = replica only those triggers send that are meant to');

sends('INSERT INTO for_replicas VALUES (1251); SET session_replication_role = replica; INSERT INTO for_replicas VALUES (1252)',
	[1252], '... and a trigger for replicas only there');
sends("COPY without_code FROM stdin;\n+15550001261\n+15550001262\n\\.\n", [ 1261, 1262 ],
	'COPY into a table with a deferred trigger without code sends for each row');
sends("BEGIN; INSERT INTO without_code VALUES ('+15550001271'); SAVEPOINT a; INSERT INTO without_code VALUES ('+15550001272');"
	  . " ROLLBACK TO a; SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT b; INSERT INTO without_code VALUES ('+15550001273'); ROLLBACK TO b; COMMIT",
	[1271], '... but not for what a savepoint undid, before or after the trigger ran');
sends("BEGIN; INSERT INTO without_code VALUES ('+15550001281'); PREPARE TRANSACTION 'p0'; ROLLBACK PREPARED 'p0'", [],
	'... nor when the transaction is prepared and rolled back');

# Prepared transactions

sends("BEGIN; SELECT say(1301); PREPARE TRANSACTION 'p1'", [], 'a prepared transaction has sent nothing yet');
is($t->sql('SELECT count(*) FROM pg_prepared_xacts'), 1, '... and is prepared');
sends("COMMIT PREPARED 'p1'", [1301], '... and sends when another session commits it');
sends("BEGIN; SELECT say(1311); PREPARE TRANSACTION 'p2'; ROLLBACK PREPARED 'p2'", [],
	'... and not when it is rolled back');
sends("BEGIN; SELECT say(1321); SAVEPOINT a; SELECT say(1322); ROLLBACK TO a; PREPARE TRANSACTION 'p3';"
	  . " SELECT say(1323); COMMIT PREPARED 'p3'",
	[ 1321, 1323 ], 'what a savepoint undid does not come back by preparing');
$t->sql("BEGIN; SELECT say(1331); PREPARE TRANSACTION 'p4'");
$t->node->restart;
sends("COMMIT PREPARED 'p4'", [1331], 'a prepared transaction that outlived a restart sends when it is committed');
$t->sql("BEGIN; SELECT say(1341); PREPARE TRANSACTION 'p6'; BEGIN; SELECT say(1342); PREPARE TRANSACTION 'p7'");
$t->node->stop('immediate');
$t->node->start;
sends("ROLLBACK PREPARED 'p6'; COMMIT PREPARED 'p7'", [1342], '... and after a crash, only what is committed then');

# Order

my ($early, $late) = ($t->session, $t->session);
$early->query_safe('BEGIN; SELECT say(1401)');
$late->query_safe('BEGIN; SELECT say(1402); COMMIT');
exactly_arrived([1402], 'a transaction that commits first sends first, though it began later');
$early->query_safe('COMMIT');
exactly_arrived([1401], '... and the other one when it commits');

$early->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM plain; SELECT say(1411); INSERT INTO plain VALUES (1412)');
$late->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM plain; INSERT INTO plain VALUES (1413); COMMIT');
$early->query('COMMIT');
like($early->{stderr}, qr/could not serialize access/, 'of two transactions that cannot be serialized one fails');
exactly_arrived([1413], '... and sends nothing');

# What another session changes in between

$early->{stderr} = '';
$t->sql(q{CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$});
$early->query_safe('SELECT say(1421)');
$late->query_safe('CREATE TRIGGER refuse BEFORE INSERT ON sentdm.messages FOR EACH ROW EXECUTE FUNCTION refuse()');
$early->query('SELECT say(1422)');
like($early->{stderr}, qr/ERROR:  refused/, 'a trigger that another session made fires for the next message');
$early->{stderr} = '';
$late->query_safe('DROP TRIGGER refuse ON sentdm.messages');
$early->query_safe('SELECT say(1423)');
exactly_arrived([ 1421, 1423 ], '... and only until it goes');

$early->query_safe('SET client_min_messages = warning; SELECT say(1431)');
$late->query_safe("SELECT sentdm_opt_out('+15550001432')");
$early->query_safe('SELECT say(1432); SELECT say(1433)');
exactly_arrived([ 1431, 1433 ], 'who opts out in another session is left out from the next statement on');
$t->sql('TRUNCATE sentdm.optouts');
$_->quit foreach $early, $late;

# Without waiting for the disk

# The WAL writer must not be the one that saves the commit.
$t->set(wal_writer_delay => '10s', wal_writer_flush_after => '1GB',
	'sentdm.connect_timeout' => '500ms', 'sentdm.request_timeout' => '500ms');
sends('SET synchronous_commit = off; SELECT say(1501)', [1501], 'a transaction with synchronous_commit = off sends');
$t->faults({ action => 'hang', match => { to => '+15550001502' } });
# Within the transaction: what the worker writes after its claim may wait.
my (undef, $lsn) = split /\n/, $t->sql('BEGIN; SET LOCAL synchronous_commit = off; SELECT say(1502); SELECT pg_current_wal_insert_lsn(); COMMIT');
wait_until { grep { $_->{to}[0] eq '+15550001502' } $t->arrived($seen) } 'the request has arrived';
is($t->sql("SELECT pg_current_wal_flush_lsn() >= '$lsn'"), 't',
	'... and its request leaves only when the commit is on disk');
$t->faults();
exactly_arrived([ 1502, 1502 ], '... and was repeated after no answer came');
$t->set(wal_writer_delay => undef, wal_writer_flush_after => undef);

# The limit of a transaction

my $limit = 'SET sentdm.max_per_transaction = 3;';

like($t->sql_error("$limit SELECT sentdm_send('{+15550001601,+15550001602,+15550001603,+15550001604}'::text[], body => 'x')"),
	qr/ERROR:  54000: .*more than 3 recipients/, 'more recipients than max_per_transaction in one call are refused');
sends("$limit BEGIN; SELECT say(n) FROM generate_series(1611, 1614) n; COMMIT", [],
	'... and in one transaction, which sends nothing then');
sends("$limit BEGIN; SELECT say(n) FROM generate_series(1621, 1623) n; COMMIT; SELECT say(1624)", [ 1621 .. 1624 ],
	'each transaction has the limit for itself');
sends("$limit BEGIN; SELECT say(1631); SAVEPOINT a; SELECT say(n) FROM generate_series(1632, 1633) n; ROLLBACK TO a;"
	  . ' SELECT say(n) FROM generate_series(1634, 1635) n; COMMIT',
	[ 1631, 1634, 1635 ], 'what a savepoint undid does not count');
sends("$limit BEGIN; SAVEPOINT a; SAVEPOINT b; SELECT say(n) FROM generate_series(1641, 1642) n; RELEASE b; SELECT say(1643);"
	  . ' SAVEPOINT c; SELECT say(1644); ROLLBACK TO c; RELEASE a; COMMIT',
	[ 1641 .. 1643 ], 'what a savepoint released counts');
sends("$limit BEGIN; SAVEPOINT a; SAVEPOINT b; SELECT say(n) FROM generate_series(1651, 1653) n; RELEASE b; ROLLBACK TO a;"
	  . ' SELECT say(n) FROM generate_series(1654, 1656) n; COMMIT',
	[ 1654 .. 1656 ], '... until an outer one is undone');
sends($limit . <<'SQL', [ 1661 .. 1663 ], 'swallowing the error does not get round the limit');
DO $$ BEGIN
	FOR n IN 1661 .. 1670 LOOP
		BEGIN PERFORM say(n); EXCEPTION WHEN program_limit_exceeded THEN NULL; END;
	END LOOP;
END $$
SQL
sends("$limit BEGIN; SET LOCAL sentdm.max_per_transaction = 10; SELECT say(n) FROM generate_series(1681, 1685) n; COMMIT;"
	  . ' BEGIN; SELECT say(n) FROM generate_series(1691, 1695) n; COMMIT',
	[ 1681 .. 1685 ], 'SET LOCAL raises the limit, for one transaction');
sends("$limit BEGIN; SELECT say(n) FROM generate_series(1701, 1703) n; PREPARE TRANSACTION 'p5';"
	  . " SELECT say(n) FROM generate_series(1704, 1706) n; COMMIT PREPARED 'p5'",
	[ 1701 .. 1706 ], 'a prepared transaction does not count for the next one');

is($t->sql("SELECT string_agg(DISTINCT state, ',') FROM sentdm.messages"), 'accepted',
	'no message is left that was not sent');
is($t->sql('SELECT count(*) FROM sentdm.messages'), scalar distinct(map { $_->{key} } $t->arrived),
	'and no request arrived that has no message');
$t->accepted_once('nothing was accepted twice');
$t->stops_cleanly;

done_testing();
