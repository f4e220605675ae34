# One server, several databases: each that has the extension gets its workers,
# without a restart, unless payoutq.databases leaves it out.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

# Nothing here happens because time passes.
my $node = start_node('main', conf => q(
payoutq.interval = '1d'
max_worker_processes = 20
));
my $workers_in = q{
	SELECT coalesce(string_agg(DISTINCT datname, ' ' ORDER BY datname), '')
	FROM pg_stat_activity WHERE backend_type = 'payoutq worker'};

# The extension comes after the server has started.
$node->safe_psql('postgres', "CREATE DATABASE $_") foreach ('a', 'b', 'c', '"D d"', 'without');
create_extension($_) foreach ('a', 'b', 'c', 'D d');
ok(wait_for($node, 'postgres', $workers_in, 'D d a b c'), 'a worker in each of them');

# The same references and ids everywhere, paid at the same time.
my %job = map { $_ => create_job($node, $_, 'job', 2000, args => 'batch_size => 20') }
  ('a', 'b', 'c', 'D d');
foreach my $db (sort keys %job)
{
	ok(wait_for_job($node, $db, $job{$db}), "the job in $db is completed");
	paid_once_ok($node, $db, 2000, $db);
}

# Left out on reload: idle workers leave, and those in the middle of a job do.
slow_down($node, 'c');
$job{c} = create_job($node, 'c', 'next', 6000, prefix => 'next', args => 'batch_size => 10');
wait_for($node, 'c', "SELECT completed_count >= 50 FROM payout_job_status($job{c})");
set_databases('a, "D d"');
ok(wait_for($node, 'postgres', $workers_in, 'D d a'), 'only where payoutq.databases says');
is($node->safe_psql('c', "SELECT status FROM payout_job_status($job{c})"),
	'running', 'the job of another database has to wait');
$job{a} = create_job($node, 'a', 'next', 100, prefix => 'next');
$job{b} = create_job($node, 'b', 'next', 100, prefix => 'next');
ok(wait_for_job($node, 'a', $job{a}), 'a database that is named goes on');
is($node->safe_psql('b', "SELECT status FROM payout_job_status($job{b})"),
	'queued', 'and one that is not has to wait');

# Whoever is left out can still do the work himself.
$node->safe_psql('b', 'CALL payout_process()');
ok(wait_for_job($node, 'b', $job{b}), 'with payout_process()');

# It is a list of names, not of patterns, and a wrong one does no harm.
speed_up($node, 'c');
set_databases('c, nosuch');
ok(wait_for($node, 'postgres', $workers_in, 'c'), 'another list');
ok(wait_for_job($node, 'c', $job{c}), 'the job that had to wait is completed');
paid_once_ok($node, 'c', 6000, 'c', prefix => 'next');
set_databases('');
ok(wait_for($node, 'postgres', $workers_in, 'D d a b c'), 'all of them again');

# The same after a restart, when nobody says where the extension is.
$node->restart;
ok(wait_for($node, 'postgres', $workers_in, 'D d a b c'), 'found at the start');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();

sub create_extension
{
	my ($db) = @_;
	$node->safe_psql($db, 'CREATE EXTENSION payoutq');
	return;
}

sub set_databases
{
	my ($value) = @_;
	$node->append_conf('postgresql.conf', "payoutq.databases = '$value'");
	$node->reload;
	return;
}
