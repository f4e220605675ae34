# Pause and cancel in the middle of a job that several workers are paying: when
# the call returns, no batch is being paid and none will be.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $node = start_node('main', conf => 'payoutq.workers = 3');
create_db_with_extension($node, 'app');
slow_down($node, 'app');
$node->safe_psql('app', q{SELECT payout_deposit('sponsor', 100000000, 'deposit')});

my $entries = 6000;
my $job = create_job($node, 'app', 'paused', $entries, args => q(batch_size => 10,
	platform_fee => 1000, source_account => 'sponsor'));
my $other = create_job($node, 'app', 'other', 30_000, prefix => 'other', args => 'batch_size => 10');
my $paid = 'SELECT completed_count, amount_paid FROM payout_job_status';

foreach my $n (1 .. 5)
{
	my ($before) = split /\|/, $node->safe_psql('app', "$paid($job)");
	wait_for($node, 'app', "SELECT completed_count > $before FROM payout_job_status($job)");
	my $session = $node->background_psql('app');
	$session->query_safe("SELECT payout_pause_job($job)");
	my $at_once = $session->query_safe("$paid($job)");
	books_ok($node, 'app', "pause $n");

	# The workers go on with the other job meanwhile.
	my ($others) = split /\|/, $node->safe_psql('app', "$paid($other)");
	wait_for($node, 'app', "SELECT completed_count > $others + 100 FROM payout_job_status($other)");
	is($node->safe_psql('app', "$paid($job)"), $at_once, "pause $n: nothing is paid after it");
	is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"), 'paused', "pause $n: shown");
	$session->query_safe("SELECT payout_resume_job($job)");
	$session->quit;
}

# Cancelled: what is paid stays paid, and the rest of the money goes back.
my ($before) = split /\|/, $node->safe_psql('app', "$paid($job)");
wait_for($node, 'app', "SELECT completed_count > $before FROM payout_job_status($job)");
$node->safe_psql('app', "SELECT payout_cancel_job($job, 'enough')");
my ($count, $amount) = split /\|/, $node->safe_psql('app', "$paid($job)");
cmp_ok($count, '<', $entries, 'cancelled in the middle');
is($node->safe_psql('app', qq{SELECT status, error FROM payout_job_status($job)}), 'cancelled|enough', 'with the reason');
is($node->safe_psql('app', q{SELECT payout_balance('sponsor')}), 100_000_000 - $amount, 'the rest goes back');
is($node->safe_psql('app', qq{SELECT count(*), sum(amount) FROM payout_entries
		WHERE job_id = $job AND status = 'completed'}), "$count|$amount", 'entries say the same');
is($node->safe_psql('app', q{SELECT sum(balance) FROM payout_accounts WHERE user_id ~ '^u'}), $amount, 'and balances');
books_ok($node, 'app', 'cancelled');

speed_up($node, 'app');
ok(wait_for_job($node, 'app', $other), 'the other job is completed');
is($node->safe_psql('app', "$paid($job)"), "$count|$amount", 'nothing is paid after the cancel');
paid_once_ok($node, 'app', 30_000, 'the other job', prefix => 'other');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();
