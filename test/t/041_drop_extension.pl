# DROP EXTENSION in the middle of a job succeeds, and the workers leave without
# a complaint; after CREATE EXTENSION there is a worker again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = start_node('main', conf => q(payoutq.interval = '1d'));
create_db_with_extension($node, 'app');
my $no_worker = q{
	SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'payoutq worker'};

$node->safe_psql('app', 'DROP EXTENSION payoutq');

foreach my $command ('DROP EXTENSION payoutq', 'DROP SCHEMA home CASCADE',
	'BEGIN; DROP EXTENSION payoutq; CREATE EXTENSION payoutq; COMMIT')
{
	my $offset = -s $node->logfile;

	$node->safe_psql('app', q{
		ALTER DATABASE app SET search_path = home, public;
		CREATE SCHEMA IF NOT EXISTS home;
		DROP FUNCTION IF EXISTS slow;
		CREATE EXTENSION payoutq SCHEMA home});
	slow_down($node, 'app');

	# Ids begin at 1 again each time, so what a worker remembers of a job must
	# not be mistaken for another's.
	my $job = create_job($node, 'app', 'job', 3000, args => 'batch_size => 10');
	is($job, 1, 'the first job');
	wait_for($node, 'app', "SELECT completed_count >= 100 FROM payout_job_status($job)");
	is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"),
		'running', 'in the middle of a job');

	my $start = time();
	my ($code, $out, $error) = $node->psql('app', $command);
	is($code, 0, $command) or diag($error);
	cmp_ok(time() - $start, '<', 2, 'it does not wait for the job');
	if ($command !~ /CREATE/)
	{
		ok(wait_for($node, 'postgres', $no_worker), 'the workers leave');
		$node->safe_psql('app', 'CREATE EXTENSION payoutq SCHEMA public');
	}
	my $again = create_job($node, 'app', 'again', 100);
	is($again, 1, 'the first job of the new extension');
	ok(wait_for_job($node, 'app', $again, 'completed', 10), 'it is paid');
	paid_once_ok($node, 'app', 100, $command);
	is(worker_errors($node, $offset), '', 'no complaint of a worker');

	$node->safe_psql('app', 'DROP EXTENSION payoutq');
	ok(wait_for($node, 'postgres', $no_worker), 'an idle worker leaves too');
}

# DROP EXTENSION is rolled back: nothing has happened.
$node->safe_psql('app', 'CREATE ROLE keeper SUPERUSER; SET ROLE keeper; CREATE EXTENSION payoutq SCHEMA public');
my $job = create_job($node, 'app', 'rolled back', 100);
$node->safe_psql('app', 'BEGIN; DROP EXTENSION payoutq; ROLLBACK');
ok(wait_for_job($node, 'app', $job), 'DROP EXTENSION rolled back');
paid_once_ok($node, 'app', 100, 'after the ROLLBACK');

# It is refused while the ledger has entries, whatever would drop it, also in a
# server without the worker.
$node->append_conf('postgresql.conf', 'payoutq.allow_drop = off');
my $provider = q{CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external')};
foreach my $preload ('payoutq', '')
{
	$node->append_conf('postgresql.conf', "shared_preload_libraries = '$preload'");
	$node->restart;
	foreach my $command ('DROP EXTENSION payoutq', "$provider; DROP EXTENSION payoutq CASCADE", "$provider; DROP OWNED BY keeper CASCADE",
		'SET LOCAL payoutq.allow_drop = on; SET LOCAL payoutq.allow_drop = off; DROP EXTENSION payoutq')
	{
		my ($code, $out, $error) = $node->psql('app', "\\set VERBOSITY verbose\nBEGIN; SELECT payout_balance('u1'); $command");
		like($error, qr/ERROR:  2BP01: cannot drop extension payoutq because its ledger has entries.*allow_drop = on/s,
			"'$preload': $command");
	}
	paid_once_ok($node, 'app', 100, 'nothing has changed');
}
$node->safe_psql('app', "$provider; SET payoutq.allow_drop = on; DROP EXTENSION payoutq CASCADE");
$node->safe_psql('app', 'CREATE EXTENSION payoutq; DROP EXTENSION payoutq');
$node->safe_psql('app', "CREATE EXTENSION payoutq; $provider; DROP EXTENSION payoutq CASCADE");
pass('an empty ledger is dropped as it is');

$node->stop;
done_testing();
