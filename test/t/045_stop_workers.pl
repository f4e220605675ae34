# Workers that were stopped by hand stay away until they are started again; one
# that was ended by somebody else comes back.

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
my $workers = 'SELECT count(*) FROM payout_workers';
my $entries = 6000;
my $job = create_job($node, 'app', 'job', $entries, args => 'batch_size => 10');
my $paid = "SELECT completed_count FROM payout_job_status($job)";

# Ended by somebody else: another takes over.
ok(wait_for($node, 'app', $workers, 2), 'two are at work');
my $pid = worker_pid($node, 'app');
$node->safe_psql('app', "SELECT pg_terminate_backend($pid)");
ok(wait_for($node, 'app', "SELECT count(*) = 2 AND bool_and(pid <> $pid) FROM payout_workers"),
	'one that was terminated is replaced');
my $before = $node->safe_psql('app', $paid);
ok(wait_for($node, 'app', "SELECT ($paid) > $before", 't', 10), 'the job goes on');

# A batch that is cancelled is tried again.
$node->safe_psql('app', 'SELECT pg_cancel_backend(pid) FROM payout_workers') foreach (1 .. 5);
ok(wait_for($node, 'app', $workers, 2), 'there are two after a cancel');

# Stopped by hand, they stay away, also when there is a new job.
is($node->safe_psql('app', 'SELECT payout_stop_workers()'), 2, 'two are stopped');
ok(wait_for($node, 'app', $workers, 0), 'they leave');
$before = $node->safe_psql('app', $paid);
cmp_ok($before, '<', $entries, 'in the middle of the job');
is($node->safe_psql('app', "SELECT ok FROM payout_health WHERE check_name = 'worker_running'"),
	'f', 'payout_health tells');
my $next = create_job($node, 'app', 'next', 10, prefix => 'next');
is($node->safe_psql('app', "SELECT payout_wait_for_job($next, '1.5 s')"), 'queued',
	'nobody pays a new job');
is($node->safe_psql('app', $paid), $before, 'nor goes on with the old one');
books_ok($node, 'app', 'stopped');

# A worker that was only just asked for is stopped too.  The pauses, made of
# work, let the launcher get to different points.
$node->safe_psql('app', q{
	DO $$ BEGIN
		FOR i IN 1..100 LOOP
			PERFORM payout_start_worker();
			PERFORM count(*) FROM generate_series(1, i * 500);
			PERFORM payout_stop_workers();
		END LOOP;
	END $$});
ok(wait_for($node, 'app', $workers, 0, 20), 'start and stop at once leaves none');

$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $next, 'completed', 10), 'started again, they pay the new job');
$before = $node->safe_psql('app', $paid);
ok(wait_for($node, 'app', "SELECT ($paid) > $before OR ($paid) = $entries", 't', 10),
	'and go on with the old one at once');
speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'until it is completed');
paid_once_ok($node, 'app', $entries, 'at the end');

# That they were stopped outlasts other settings: the launcher gives up the
# databases that are left out, and sees to all of them again, in the order of their slots.
create_db_with_extension($node, 'other');
my $others = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'payoutq worker' AND datname = 'other'};
ok(wait_for($node, 'postgres', $others, 1), 'a database whose workers are not stopped');
$node->safe_psql('app', 'SELECT payout_stop_workers()');
ok(wait_for($node, 'app', $workers, 0), 'and one where they are');
foreach my $setting (q{SET payoutq.databases = 'postgres'}, 'RESET payoutq.databases')
{
	$node->safe_psql('postgres', "ALTER SYSTEM $setting");
	$node->reload;
	ok(wait_for($node, 'postgres', $others, $setting =~ /^SET/ ? 0 : 1), $setting);
}
my $last = create_job($node, 'app', 'last', 10, prefix => 'last');
is($node->safe_psql('app', $workers), 0, 'they stay away');
is($node->safe_psql('app', "SELECT payout_wait_for_job($last, '1.5 s')"), 'queued', 'also for a new job');
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $last), 'until they are started');

# A restart of the server starts them too.
$node->safe_psql('app', 'SELECT payout_stop_workers()');
$node->restart;
ok(wait_for($node, 'app', $workers, 1), 'a worker is there after a restart');

$node->stop;
done_testing();
