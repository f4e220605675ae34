# Commands that want a database without connections (DROP, RENAME, use as a
# template, SET TABLESPACE) get it, whether its workers are idle or in the
# middle of a job, and the workers are back afterwards.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $entries = 6000;
my $node = start_node('main', conf => q(payoutq.interval = '1d'));
create_db_with_extension($node, $_) foreach ('app', 'idle', 'busy');
slow_down($node, $_, 200_000) foreach ('app', 'busy');
my %job = map { $_ => create_job($node, $_, 'moved', $entries, args => 'batch_size => 10') }
  ('app', 'busy');
my $offset = -s $node->logfile;

# DROP
worker_pid($node, 'idle');
quickly('DROP DATABASE idle');
in_the_middle('busy');
quickly('DROP DATABASE busy');

# RENAME
in_the_middle('app');
quickly('ALTER DATABASE app RENAME TO moved');
goes_on('moved');
quickly('ALTER DATABASE moved RENAME TO app');
goes_on('app');

# SET TABLESPACE
$node->safe_psql('postgres', q{
	SET allow_in_place_tablespaces = on;
	CREATE TABLESPACE elsewhere LOCATION ''});
quickly('ALTER DATABASE app SET TABLESPACE elsewhere');
goes_on('app');

# TEMPLATE: from here on there are two half-done jobs, each with its own books.
in_the_middle('app');
quickly('CREATE DATABASE copy TEMPLATE app');
goes_on('app');
goes_on('copy');
foreach my $db ('app', 'copy')
{
	speed_up($node, $db);
	ok(wait_for_job($node, $db, $job{app}), "the job in $db is completed");
	paid_once_ok($node, $db, $entries, $db);
}

# Two databases swap their names in one transaction, which names one of them
# twice; before, a savepoint is rolled back, and so is a whole transaction.  A
# session that ends in the middle leaves nothing behind either.
my $swap = join '; ', map { "ALTER DATABASE $_" } 'app RENAME TO other', 'copy RENAME TO app', 'other RENAME TO copy';
quickly("BEGIN; $swap; ROLLBACK");
quickly("BEGIN; SAVEPOINT s; $swap; ROLLBACK TO s; $swap; COMMIT");
my $session = $node->background_psql('postgres');
$session->query_safe("BEGIN; $swap");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'});
ok(wait_for($node, 'postgres', q{SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'}, 0), 'it ends');
$session->{run}->finish;
foreach my $db ('app', 'copy')
{
	my $swapped = create_job($node, $db, 'swapped', 10, prefix => 'swapped');
	ok(wait_for_job($node, $db, $swapped), "the worker is back in $db after a swap");
}

# A command that fails leaves the workers where they were.
my ($code, $out, $error) = $node->psql('postgres', 'ALTER DATABASE app RENAME TO copy');
like($error, qr/already exists/, 'a command that fails');
my $next = create_job($node, 'app', 'next', 10, prefix => 'next');
ok(wait_for_job($node, 'app', $next), 'the worker is back after it');

# Nor does somebody who may not do it stop them.
$node->safe_psql('postgres', 'CREATE ROLE somebody LOGIN');
my $pid = worker_pid($node, 'app');
$node->psql('postgres', 'DROP DATABASE app', extra_params => [ '-U', 'somebody' ]);
is(worker_pid($node, 'app'), $pid, 'somebody else cannot end a worker so');

is(worker_errors($node, $offset), '', 'no complaint of a worker');
$node->stop;
done_testing();

sub in_the_middle
{
	my ($db) = @_;
	my $paid = "completed_count FROM payout_job_status('moved')";
	my $before = $node->safe_psql($db, "SELECT $paid");
	ok(wait_for($node, $db, "SELECT completed_count > $before FROM payout_job_status('moved')")
		  && $node->safe_psql($db, "SELECT status FROM payout_job_status('moved')") eq 'running',
		"$db is in the middle of a job");
	return;
}

sub goes_on
{
	my ($db) = @_;
	in_the_middle($db);
	books_ok($node, $db, $db);
	return;
}

# The server itself waits five seconds for other sessions to leave.
sub quickly
{
	my ($command) = @_;
	my $start = time();
	my ($code, $out, $error) = $node->psql('postgres', $command);
	my $took = time() - $start;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($error, '', $command);
	cmp_ok($took, '<', 3, 'it does not wait');
	return;
}
