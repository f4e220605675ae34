# The progress that an application polls goes up and never down, and is always
# what the tables say.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.lock_timeout = 1min
));
create_db_with_extension($node, 'app');

# Entries are numbered in order of user_id: u1 is in the first batch, and u999
# in the last.  Locks on their accounts hold the worker where we want it.
$node->safe_psql('app', q{
	SELECT payout_deposit(u, 1, 'deposit ' || u)
	FROM unnest(ARRAY['u1', 'u5000', 'u999']) u});
my %hold = map { $_ => $node->background_psql('app') } ('u1', 'u5000', 'u999');

# Two batches of 500: 0, 50 and 100 %.
lock_account('u1');
lock_account('u999');
my $job = create_job($node, 'app', 'two batches', 1000,
	args => 'batch_size => 500, platform_fee => 7');
worker_is_held();
is(status($job), 'running|0|1000|0.0000|0.00|0|500507|', 'at 0 %');
$hold{u1}->query_safe('ROLLBACK');
worker_is_held();
is(status($job), 'running|500|500|0.5000|50.00|' . sum_paid($job) . '|500507|',
	'at 50 %');
$hold{u999}->query_safe('ROLLBACK');
wait_for_job($node, 'app', $job);
is(status($job), 'completed|1000|0|1.0000|100.00|500500|500507|t', 'at 100 %');
is($node->safe_psql('app', q{
		SELECT payout_balance('@platform'), payout_balance('@job:' || } . $job . ')'),
	'7|0', 'the fee is posted, and nothing is left');
is($node->safe_psql('app', q{
		SELECT sum(amount), count(*) FROM payout_ledger
		WHERE account !~ '^@' AND job_id = } . $job),
	'500500|1000', 'the ledger has a line for each entry');

# Ten thousand, polled all the time; the worker stops on the way once.
$node->safe_psql('app', q{
	SELECT payout_withdraw(user_id, balance, 'withdraw ' || user_id)
	FROM payout_accounts});
lock_account('u5000');
$job = create_job($node, 'app', 'ten thousand', 10_000, args => 'batch_size => 10');
my $poll = $node->background_psql('app');
my ($last, %seen, @backwards, @wrong) = (0);
my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
while ($last < 1 && time() < $end)
{
	my ($progress, $same, $held) = split /\|/, $poll->query_safe(qq{
		SELECT s.progress,
		       (s.completed_count, s.failed_count, s.pending_count, s.amount_paid)
		     = (e.completed, e.failed, e.pending, e.paid)
		       AND s.progress = CASE s.status WHEN 'completed' THEN 1
		           ELSE least(round((e.completed + e.failed) / 10000.0, 4), 0.9999) END,
		       EXISTS (SELECT FROM pg_locks WHERE NOT granted)
		FROM payout_job_status($job) s,
		     (SELECT count(*) FILTER (WHERE status = 'completed') AS completed,
		             count(*) FILTER (WHERE status = 'failed') AS failed,
		             count(*) FILTER (WHERE status IN ('pending', 'retryable')) AS pending,
		             coalesce(sum(amount) FILTER (WHERE status = 'completed'), 0) AS paid
		      FROM payout_entries WHERE job_id = $job) e});

	push @backwards, "$last -> $progress" if $progress < $last;
	push @wrong, $progress if $same ne 't';
	$seen{$progress} = 1;
	$last = $progress;
	$hold{u5000}->query('ROLLBACK') if $held eq 't';
}
note('progress seen: ' . join(' ', sort keys %seen));
cmp_ok(scalar(keys %seen), '>=', 3, 'progress is seen on the way');
is("@backwards", '', 'it never goes back');
is("@wrong", '', 'it is always what the entries say');
is(status($job), 'completed|10000|0|1.0000|100.00|50005000|50005000|t',
	'ten thousand are paid');
paid_once_ok($node, 'app', 10_000, 'at the end');

$poll->quit;
$_->quit foreach values %hold;
$node->stop;
done_testing();

sub lock_account
{
	my ($user) = @_;
	$hold{$user}->query_safe(
		"BEGIN; SELECT FROM payoutq.account WHERE user_id = '$user' FOR UPDATE");
	return;
}

sub worker_is_held
{
	wait_for($node, 'app', q{
		SELECT count(*) FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND wait_event_type = 'Lock'}, 1);
	return;
}

sub status
{
	my ($job) = @_;
	return $node->safe_psql('app', qq{
		SELECT status, processed_winners, pending_count, progress,
		       progress_percent, amount_paid, total_pool,
		       CASE WHEN completed_at >= started_at THEN 't' END
		FROM payout_job_status($job)});
}

sub sum_paid
{
	my ($job) = @_;
	return $node->safe_psql('app', qq{
		SELECT sum(amount) FROM payout_entries
		WHERE job_id = $job AND entry <= 500});
}
