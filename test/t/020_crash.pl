# SIGKILL at random moments, of a worker, of the postmaster, or of all
# processes at once: the job goes on, and everybody is paid exactly once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $entries = 60_000;
my $kills = 21;

my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");
srand($seed);

my $node = start_node('main', conf => 'log_checkpoints = off');
create_db_with_extension($node, 'app');

# Half of the accounts are there already, so batches insert and update.
create_job($node, 'app', 'half', $entries / 2);
wait_for_job($node, 'app', "'half'");
slow_down($node, 'app');
my $job = create_job($node, 'app', 'crashes', $entries, args => 'batch_size => 10');

my @how = ('worker', 'worker', 'all', 'worker', 'worker', 'postmaster', 'worker');
my $unpaid = $entries;
foreach my $n (1 .. $kills)
{
	# Somewhere within the next part of what is left.
	my $at = $entries - $unpaid + int(rand($unpaid / ($kills - $n + 5)));
	wait_for($node, 'app', "SELECT completed_count >= $at FROM payout_job_status($job)")
	  or last;

	my $how = $how[ $n % @how ];
	my $before = crash($how);
	my $paid = $node->safe_psql('app',
		"SELECT completed_count FROM payout_job_status($job)");
	cmp_ok($paid, '>=', $before, "kill $n ($how): nothing is lost");
	books_ok($node, 'app', "kill $n ($how)");
	$unpaid = $entries - $paid;
}
cmp_ok($unpaid, '>', 0, 'the last kill was before the end');

$node->safe_psql('app', 'DROP FUNCTION slow CASCADE');
ok(wait_for_job($node, 'app', $job), 'the job is completed after all');
is($node->safe_psql('app', qq{
		SELECT completed_count, failed_count, amount_paid
		FROM payout_job_status($job)}),
	"$entries|0|" . $entries * ($entries + 1) / 2,
	'all entries are paid');
is($node->safe_psql('app', qq{
		SELECT count(*), count(*) FILTER (WHERE balance <>
		       substr(user_id, 2)::int *
		       CASE WHEN substr(user_id, 2)::int <= $entries / 2 THEN 2 ELSE 1 END)
		FROM payout_accounts}),
	"$entries|0",
	'everybody has his share, once');
books_ok($node, 'app', 'at the end');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP:/, 'nothing worse in the log');

$node->stop;
done_testing();

# Returns when the server answers again, with what was shown as paid just before
# the crash.
sub crash
{
	my ($how) = @_;
	my $session = $node->background_psql('app');
	my @children = split /\n/,
	  $node->safe_psql('postgres', 'SELECT pid FROM pg_stat_activity');
	my $worker = worker_pid($node, 'app');
	my $before = $session->query_safe(
		"SELECT completed_count FROM payout_job_status($job)");

	if ($how eq 'worker')
	{
		kill9($worker);
	}
	else
	{
		$node->kill9;
		kill('KILL', @children) if $how eq 'all';

		# What is left of the old server must go before a new one can start.
		my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
		usleep(10_000) while grep { kill(0, $_) } @children and time() < $end;
		$node->start;
	}
	$session->quit;
	wait_for($node, 'app', 'SELECT true');
	return $before;
}
