# A large job does not hold up a small one that was created later, and a higher
# priority goes first.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $large = 300_000;
my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.interval = '1d'
));
create_db_with_extension($node, 'app');
slow_down($node, 'app');

# Ten small ones come in while the large one is being paid.
my $job = create_job($node, 'app', 'large', $large);
my $progress = "SELECT completed_count FROM payout_job_status($job)";
wait_for($node, 'app', "SELECT ($progress) > 1000");
foreach my $n (1 .. 10)
{
	my $before = $node->safe_psql('app', $progress);
	my $small = create_job($node, 'app', "small $n", 10, prefix => "s$n-");
	is($node->safe_psql('app', "SELECT payout_wait_for_job($small)"),
		'completed', "small job $n is paid");
	cmp_ok(
		$node->safe_psql('app', qq{
			SELECT count(*) FROM payout_batches b, payout_job_status($small) s
			WHERE b.job_id = $job
			  AND b.completed_at BETWEEN s.created_at AND s.completed_at}),
		'<=', 20, 'after a few batches of the large one');
}
my $now = $node->safe_psql('app', $progress);
cmp_ok($now, '<', 0.9 * $large, 'the large one is not there yet');
cmp_ok($now, '>', 1000, 'and has gone on');

# Two of higher priority: while they can be worked on, nothing else is, and the
# highest is completed first.
my @urgent = split /\|/, $node->safe_psql('app', q{
	SELECT payout_create_job('urgent', array_agg('h' || i), array_agg(i::bigint),
	                         priority => 5, batch_size => 10),
	       payout_create_job('very urgent', array_agg('v' || i), array_agg(i::bigint),
	                         priority => 9, batch_size => 10)
	FROM generate_series(1, 500) i});
ok(wait_for_job($node, 'app', $_), "urgent job $_ is paid") foreach @urgent;
is($node->safe_psql('app', q{
		SELECT string_agg(reference, ', ' ORDER BY completed_at)
		FROM payout_jobs WHERE priority > 0}),
	'very urgent, urgent', 'in order of priority');
is($node->safe_psql('app', qq{
		SELECT count(*) FROM payout_batches b, payout_job_status($urgent[0]) s
		WHERE b.job_id = $job
		  AND b.completed_at BETWEEN s.started_at AND s.completed_at}),
	0, 'without a batch of the large one between them');
cmp_ok($node->safe_psql('app', $progress), '<', $large, 'which is not there yet');

# A job that is not due does not hold up those of lower priority.
$node->safe_psql('app', q{
	SELECT payout_create_job('later', ARRAY['l1'], ARRAY[1::bigint], priority => 99, run_at => 'infinity')});
speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'the large job is completed in the end');
paid_once_ok($node, 'app', $large, 'at the end');

$node->stop;
done_testing();
