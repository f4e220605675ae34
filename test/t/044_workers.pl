# The number of workers follows payoutq.workers on reload, also in the middle of
# a job, and another one helps as soon as there is more than one batch to pay.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(payoutq.interval = '1d'));
create_db_with_extension($node, 'app');
slow_down($node, 'app');
my $entries = 15_000;
my $job = create_job($node, 'app', 'job', $entries, args => 'batch_size => 10');

foreach my $n (2, 4, 1, 0, 3)
{
	$node->append_conf('postgresql.conf', "payoutq.workers = $n");
	$node->reload;
	ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', $n),
		"payoutq.workers = $n");
	is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"),
		'running', 'in the middle of the job');
	books_ok($node, 'app', "$n workers");
}

# Each of them is shown with what it does.
ok(wait_for($node, 'app', qq{
		SELECT count(*) FROM payout_workers
		WHERE job_id = $job AND batch_no IS NOT NULL AND state = 'working'
		  AND batches > 0 AND entries = 10 * batches}, 3),
	'the view shows three at work');

speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'the job is completed');
paid_once_ok($node, 'app', $entries, 'at the end');
is(worker_errors($node, 0), '', 'no complaint of a worker');

# With nothing left to do, one stays.
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 1),
	'helpers leave when the work is done');

# The second batch waits for an account.
$node->append_conf('postgresql.conf', "payoutq.lock_timeout = '1h'");
$node->reload;
my $session = $node->background_psql('app');
$session->query_safe("BEGIN; SELECT FROM payoutq.account WHERE user_id = 'u2' FOR UPDATE");
$job = create_job($node, 'app', 'slow', 9, args => 'batch_size => 1');
ok(wait_for($node, 'app', "SELECT completed_count FROM payout_job_status($job)", 8),
	'a helper pays the others while the resident is at its second batch');
is($node->safe_psql('app', qq{
		SELECT count(*) FROM payout_workers WHERE job_id = $job AND batch_no = 2}), 1, 'which has not ended');
$session->quit;
ok(wait_for_job($node, 'app', $job), 'until that is paid too');

# A query that lasts: there is always somebody else to pay.
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 1), 'the helpers leave again');
$session = $node->background_psql('app');
$session->query_safe('SELECT pg_advisory_lock(1)');
my $query = $node->safe_psql('app', q{
	SELECT payout_create_job_from('query', $$SELECT 'q' AS user_id, 1 AS amount FROM pg_advisory_xact_lock_shared(1)$$)});
my $at_query = "FROM payout_workers WHERE job_id = $query";
ok(wait_for($node, 'app', "SELECT count(*) $at_query", 1), 'a worker is at a query');
my $others = q{FROM pg_stat_activity WHERE backend_type = 'payoutq worker' AND datname = 'app'
	AND wait_event_type IS DISTINCT FROM 'Lock'};
ok(wait_for($node, 'app', "SELECT count(*) > 0 AND bool_or(clock_timestamp() - backend_start > '7 s') $others"),
	'a helper waits with it for longer than it would alone');
$node->safe_psql('app', "SELECT pg_terminate_backend(pid, 60000) $others");
$job = create_job($node, 'app', 'beside a query', 10, prefix => 'beside');
ok(wait_for_job($node, 'app', $job), 'and one comes again when there is work');
is($node->safe_psql('app', "SELECT count(*) $at_query"), 1, 'during the query');
$session->quit;
ok(wait_for_job($node, 'app', $query), 'which ends');

$node->stop;
done_testing();
