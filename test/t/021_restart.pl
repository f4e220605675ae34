# A job that is interrupted by a restart of the server, fast, smart or immediate,
# goes on without anybody's help.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $entries = 12_000;

# Even with an interval of a day: the worker looks for work when it starts.
my $node = start_node('main', conf => q(payoutq.interval = '1d'));
create_db_with_extension($node, 'app');
slow_down($node, 'app');
my $job = create_job($node, 'app', 'restarts', $entries, args => 'batch_size => 10');

my $paid = 0;
my $unpaid = $entries;
foreach my $mode ('fast', 'immediate', 'smart', 'immediate', 'fast')
{
	# It goes on, each time by some batches more.
	my $goal = $paid + 1000;
	ok(wait_for($node, 'app', "SELECT completed_count >= $goal FROM payout_job_status($job)"),
		"the job goes on from $paid");

	my $offset = -s $node->logfile;
	my $start = time();
	$node->stop($mode);
	my $took = time() - $start;
	cmp_ok($took, '<', 5, "$mode shutdown does not wait for the job");
	$node->start;

	my ($now, $rest) = split /\|/, $node->safe_psql('app',
		"SELECT completed_count, pending_count FROM payout_job_status($job)");
	cmp_ok($now, '>=', $paid, 'nothing is lost');
	books_ok($node, 'app', "$mode restart at $now");
	is(worker_errors($node, $offset), '', 'no complaint of a worker')
	  if $mode ne 'immediate';
	($paid, $unpaid) = ($now, $rest);
}
cmp_ok($unpaid, '>', 0, 'the last restart was before the end');

speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'the job is completed');
paid_once_ok($node, 'app', $entries, 'at the end');

# A job that is not due yet is not forgotten over a restart.
my $later = create_job($node, 'app', 'later', 10, prefix => 'later',
	args => "run_at => clock_timestamp() + interval '2 seconds'");
$node->restart;
ok(wait_for_job($node, 'app', $later), 'a job that was not due yet is paid in time');
is($node->safe_psql('app', "SELECT started_at >= run_at FROM payout_jobs WHERE job_id = $later"),
	't', 'and not before');

$node->stop;
done_testing();
