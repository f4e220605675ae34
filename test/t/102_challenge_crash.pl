# A challenge with 300,000 stakes is resolved, and the server is killed while
# the shares are written and while they are paid: everybody is paid exactly once
# and told once, and what is shown meanwhile is right.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $stakes = 300_000;
my $winners = $stakes * 9 / 10;
my $kills = 4;

my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");
srand($seed);

my $node = start_node('main', conf => q(
log_checkpoints = off
payoutq.batch_size = 100
payoutq.interval = 1s
payoutq.lock_timeout = 1min
));
create_db_with_extension($node, 'app');

# u<i> stakes i % 97 + 1 of his 100, one of ten on the side that loses.  The
# first ten are alone, since a pending challenge counts its stakes one by one.
my $fund = $node->safe_psql('app', qq{
	SELECT payout_create_job_from('fund', batch_size => 2000, query =>
		'SELECT ''u'' || i AS user_id, 100 AS amount FROM generate_series(1, $stakes) i')});
wait_for_job($node, 'app', $fund);
my $challenge = $node->safe_psql('app', q{
	SELECT payout_create_challenge('large', '2100-01-01', 'creator', 'u1', 'u10', fee_bps => 250)});
my $place = q{SELECT count(payout_place_stake(1, 'u' || i, CASE WHEN i % 10 = 0 THEN 'NO' ELSE 'YES' END, i % 97 + 1))
	FROM generate_series};
$node->safe_psql('app', "$place(1, 10) i; CREATE SEQUENCE part MINVALUE 0");
$node->pgbench("-n -c 2 -t 15 app", 0, [qr{transactions actually processed: 30/30}], [qr{^(?!.*ERROR)}s], 'stakes are placed',
	{ stakes => "SELECT nextval('part') AS part \\gset\n"
		  . "$place(:part * 10000 + 11, least(:part * 10000 + 10010, $stakes)) i;\n" } );
is($node->safe_psql('app', "SELECT yes_stakes, no_stakes, status FROM payout_challenges WHERE id = $challenge"),
	"$winners|" . ($stakes - $winners) . '|active', 'all of them');
$node->safe_psql('app', q{SELECT payout_run_deadlines('2100-01-01')});
slow_down($node, 'app', 400_000);

# Resolved, and killed while it is expanded
my $start = time();
my $job = $node->safe_psql('app', "SELECT payout_job_id FROM payout_resolve_challenge($challenge, 'challenger_won')");
note(sprintf('resolved in %d ms, with the start of psql', 1000 * (time() - $start)));
my $shown = 0;
my @wrong;
my $locker;
my $expanding = "EXISTS (SELECT FROM payout_workers WHERE job_id = $job AND batch_no = 0)";
foreach my $n (1 .. 3)
{
	watch($expanding) or BAIL_OUT('the expansion does not begin');
	if ($n == 1)
	{
		is(crash($node, 'app', 'all', "SELECT status, completed_count FROM payout_job_status($job)"),
			'running|0', 'killed before the first share is written');
	}
	else
	{
		crash($node, 'app', 'all', 'SELECT 1');
	}

	# So that it is not over before we have looked; after the last it is stopped.
	$node->safe_psql('app', "SELECT payout_pause_job($job)") if $n < 3;
	is($node->safe_psql('app', "SELECT count(*) FROM payoutq.entry WHERE job_id = $job"), 0, "kill $n of an expansion: no half of it");
	books_ok($node, 'app', "kill $n of an expansion");
	eval { $locker->quit } if $locker;

	# Somebody has the table locked, so that it does not end before it is killed.
	if ($n < 3)
	{
		$locker = $node->background_psql('app');
		$locker->query_safe('BEGIN; LOCK TABLE payoutq.entry IN SHARE MODE');
		$node->safe_psql('app', "SELECT payout_resume_job($job), payout_trigger_job($job)");
	}
}

# What kills the server three times is not tried again by itself.
ok(wait_for_job($node, 'app', $job, 'failed'), 'it is stopped');
like($node->safe_psql('app', "SELECT error FROM payout_job_status($job)"), qr/killed 3 times/, 'and says why');
is($node->safe_psql('app', "SELECT status, result, completed_at IS NULL FROM payout_challenges WHERE id = $challenge"),
	'pending_admin|challenger_won|t', 'the challenge waits for it');
$node->safe_psql('app', "SELECT payout_retry_job($job)");
ok(watch("total_winners = $winners"), 'when it is retried, the shares are written');

# Killed while they are paid
my @how = ('worker', 'all', 'worker', 'postmaster');
my $unpaid = $winners;
foreach my $n (1 .. $kills)
{
	my $at = $winners - $unpaid + int(rand($unpaid / ($kills - $n + 5)));
	watch("completed_count >= $at") or last;
	my $how = $how[ $n % @how ];
	my $before = crash($node, 'app', $how, "SELECT completed_count FROM payout_job_status($job)");
	my ($paid, $told) = split /\|/, $node->safe_psql('app', qq{
		SELECT (SELECT completed_count FROM payout_job_status($job)), count(*)
		FROM payout_notifications WHERE type = 'payout_received'});
	cmp_ok($paid, '>=', $before, "kill $n ($how): nothing is lost");
	is($told, $paid, "kill $n ($how): who is paid is told");
	books_ok($node, 'app', "kill $n ($how)");
	$unpaid = $winners - $paid;
}
cmp_ok($unpaid, '>', 0, 'the last kill was before the end');

# The end
speed_up($node, 'app');
ok(watch("s.status = 'completed'"), 'the job is completed after all');
is_deeply(\@wrong, [], 'what was shown meanwhile was right');
is($node->safe_psql('app', "SELECT status, result, completed_at IS NOT NULL FROM payout_challenges WHERE id = $challenge"),
	'completed|challenger_won|t', 'the challenge is completed');
is($node->safe_psql('app', qq{
		SELECT s.completed_count, s.failed_count, s.progress, s.total_pool = c.pool, s.amount_paid + s.platform_fee = c.pool,
		       s.platform_fee = floor(c.pool * 0.025), payout_balance('\@platform') = s.platform_fee,
		       payout_balance('\@challenge:$challenge'), payout_balance('\@job:$job')
		FROM payout_job_status($job) s, payout_challenges c WHERE c.id = $challenge}),
	"$winners|0|1.0000|t|t|t|t|0|0", 'what is paid and the fee are the pool');

$node->safe_psql('app', 'ANALYZE');

# Reckoned without payout_split(): each has his exact share, rounded one way or the other.
is($node->safe_psql('app', q{
		SELECT count(*), count(*) FILTER (WHERE a.balance IS DISTINCT FROM 100 - s.amount AND s.side = 'NO'),
		       count(*) FILTER (WHERE s.side = 'YES' AND a.balance - 100 + s.amount - floor(s.amount * net / yes_pool) NOT IN (0, 1))
		FROM payout_stakes s
		LEFT JOIN payout_accounts a USING (user_id),
		     (SELECT pool - floor(pool * 0.025) AS net, yes_pool FROM payout_challenges) c}),
	"$stakes|0|0", 'everybody has his share, once');
is($node->safe_psql('app', qq{
		SELECT count(*), count(DISTINCT n.user_id),
		       count(*) FILTER (WHERE n.challenge_id = $challenge AND (n.data->>'amount')::bigint = e.amount)
		FROM payout_notifications n
		LEFT JOIN payout_entries e ON e.job_id = n.job_id AND e.user_id = n.user_id AND e.job_id = $job AND e.status = 'completed'
		WHERE n.type = 'payout_received'}),
	"$winners|$winners|$winners", 'every winner is told once, what he has');
books_ok($node, 'app', 'at the end');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP:/, 'nothing worse in the log');

$node->stop;
done_testing();

# Waits as wait_for() does, and looks each time at what is shown: progress goes
# up only, and is 1 when job and challenge are completed, both at once.
sub watch
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	while (time() < $end)
	{
		my $line = eval { $node->safe_psql('app', qq{
			SELECT coalesce($condition, false), s.progress, s.status, c.status,
			       s.status = 'completed' AND c.status = 'completed' AND s.progress = 1 AND s.completed_count = $winners
			       OR s.status IN ('queued', 'running') AND c.status = 'pending_admin' AND s.progress < 1
			          AND s.processed_winners = s.completed_count AND s.failed_count = 0
			          AND (s.progress = 0 OR s.total_winners = $winners AND abs(s.progress - s.completed_count / $winners.0) <= 0.0001)
			FROM payout_job_status($job) s, payout_challenges c WHERE c.id = $challenge}) };
		next unless defined $line;

		my ($done, $progress, undef, undef, $right) = split /\|/, $line;
		push @wrong, $line if $right ne 't' || $progress < $shown;
		$shown = $progress;
		return 1 if $done eq 't';
		usleep(5_000);
	}
	return wait_for($node, 'app', "SELECT $condition FROM payout_job_status($job) s");
}
