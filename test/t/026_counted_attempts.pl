# The first batches of a job are counted before they are tried, so that one that
# kills the server is found. What several processes count at the same time is no
# crash.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 4
max_worker_processes = 20
));
create_db_with_extension($node, 'app');
my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");

my $jobs = 6000;
my $create = $node->basedir . '/create.sql';
append_to_file($create, q{
\set n random(1, 1000000000000)
SELECT payout_create_job('job ' || :client_id || ' ' || :n, ARRAY['a' || :n, 'b'], ARRAY[1, 2]);
});
my $process = $node->basedir . '/process.sql';
append_to_file($process, "CALL payout_process(20);\n");

my @others = map { ['pgbench', '-n', "--random-seed=$seed", '-d', $node->connstr('app'), @$_] }
	(['-c4', '-t' . $jobs / 4, '-f', $create], ['-c6', '-t500', '-f', $process]);
my @runs = map { my $log = ''; IPC::Run::start($_, '>&', \$log) } @others;
$_->finish foreach @runs;

ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_jobs WHERE status <> 'completed'}, 0), 'all jobs are completed');
is($node->safe_psql('app', 'SELECT count(*), sum(completed_count), sum(failed_count) FROM payout_jobs'),
	"$jobs|" . 2 * $jobs . '|0', 'everybody is paid');
is($node->safe_psql('app', 'SELECT count(*) FROM payoutq.batch WHERE crashes <> 0'), 0, 'no count is left');
is(worker_errors($node, 0), '', 'no complaint of a worker');
books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();
