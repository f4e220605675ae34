# Stopping workers, restarting the server and cancelling payout_process() are
# not crashes: however often that happens to a batch, it is not quarantined.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $times = 5;
my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.lock_timeout = 1min
max_prepared_transactions = 1
));
create_db_with_extension($node, 'app');

# The first batch of each job waits for the lock on an account.
my %case = (
	'payout_stop_workers()' => sub {
		$node->safe_psql('app', 'SELECT payout_stop_workers()');
		wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
		$node->safe_psql('app', 'SELECT payout_start_worker()');
	},
	'pg_cancel_backend()' => sub {
		$node->safe_psql('app', 'SELECT pg_cancel_backend(pid) FROM payout_workers');
		$node->safe_psql('app', q{SELECT payout_trigger_job(job_id)
			FROM payout_jobs WHERE status = 'running'});
	},
	'statement_timeout' => sub {
		my ($code, $out, $error) = $node->psql('app',
			"SET statement_timeout = '100ms'; CALL payout_process()");
		like($error, qr/statement timeout/, 'CALL payout_process() is cancelled');
	},
	'a restart' => sub {
		$node->stop('fast');
		$node->start;
	});

foreach my $what (sort keys %case)
{
	my ($prefix) = $what =~ /(\w+)/;
	$node->safe_psql('app', "SELECT payout_deposit('${prefix}1', 1, '$what')");
	$node->safe_psql('app', 'SELECT payout_stop_workers()') if $what =~ /timeout/;

	# A prepared transaction keeps its locks over a restart.
	$node->safe_psql('app', qq{
		BEGIN;
		SELECT FROM payoutq.account WHERE user_id = '${prefix}1' FOR UPDATE;
		PREPARE TRANSACTION 'hold'});
	my $job = create_job($node, 'app', $what, 20, prefix => $prefix,
		args => 'batch_size => 2');
	foreach (1 .. $times)
	{
		ok($what =~ /timeout/ || worker_is_held(), 'the batch is being tried') or last;
		$case{$what}->();
	}
	$node->safe_psql('app', q(ROLLBACK PREPARED 'hold'));
	$node->safe_psql('app', 'SELECT payout_start_worker()');
	$node->psql('app', "SELECT payout_trigger_job($job)");
	ok(wait_for_job($node, 'app', $job), "$what, $times times: the job ends");
	is($node->safe_psql('app', qq{
			SELECT completed_count, failed_count FROM payout_job_status($job)}),
		'20|0', "$what, $times times: everybody is paid");
	$node->safe_psql('app', "SELECT payout_withdraw('${prefix}1', 1, 'back $what')");
	paid_once_ok($node, 'app', 20, $what, prefix => $prefix);
}

$node->stop;
done_testing();

sub worker_is_held
{
	return wait_for($node, 'app', q{
		SELECT count(*) FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND wait_event_type = 'Lock'}, 1, 10);
}
