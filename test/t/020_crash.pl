# SIGKILL at random moments, of a worker, of the postmaster, or of all
# processes at once: the job goes on, and everybody is paid exactly once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

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
slow_down($node, 'app', 40000);
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
	my $before = crash($node, 'app', $how,
		"SELECT completed_count FROM payout_job_status($job)");
	my $paid = $node->safe_psql('app',
		"SELECT completed_count FROM payout_job_status($job)");
	cmp_ok($paid, '>=', $before, "kill $n ($how): nothing is lost");
	books_ok($node, 'app', "kill $n ($how)");
	$unpaid = $entries - $paid;
}
cmp_ok($unpaid, '>', 0, 'the last kill was before the end');

speed_up($node, 'app');
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
