# A batch that meets an account which another session keeps locked waits and is
# tried again, however often; it fails nobody and holds up nobody else.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.lock_timeout = 50ms
payoutq.retry_base = 50ms
payoutq.retry_cap = 100ms
payoutq.max_attempts = 2
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', q{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, 1000) i;
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance', 'COIN')});
wait_for_job($node, 'app', create_job($node, 'app', 'accounts', 1000));

# In our own table of balances, and in one that is bound
foreach my $case ([ 'payoutq.account', 'USD' ], [ 'users', 'COIN' ])
{
	my ($table, $currency) = @$case;
	my $session = $node->background_psql('app');
	$session->query_safe("BEGIN; SELECT FROM $table WHERE user_id = 'u500' FOR UPDATE");

	my $job = create_job($node, 'app', $table, 1000,
		args => "batch_size => 100, currency => '$currency'");
	my $small = create_job($node, 'app', "small $table", 10, prefix => "small$currency");
	my $counts = "SELECT status, completed_count, failed_count, pending_count FROM payout_job_status($job)";
	ok(wait_for($node, 'app', $counts, 'running|900|0|100'), "$table: the others are paid");
	ok(wait_for_job($node, 'app', $small), "$table: another job is not held up");
	ok(wait_for($node, 'app', qq{
			SELECT attempts > 4 FROM payout_batches WHERE job_id = $job AND status <> 'completed'}),
		"$table: the batch is tried again, more often than an entry that cannot be paid");
	is($node->safe_psql('app', qq{
			SELECT status, first_entry = last_entry - 99, error_code, error FROM payout_batches
			WHERE job_id = $job AND status <> 'completed'}),
		'retryable|t|55P03|canceling statement due to lock timeout',
		"$table: it is not divided, and says why it waits");
	is($node->safe_psql('app', $counts), 'running|900|0|100', "$table: nobody has failed");
	books_ok($node, 'app', "$table, waiting");

	$session->query_safe('COMMIT');
	$session->quit;
	ok(wait_for_job($node, 'app', $job), "$table: paid when the lock is gone");
	is($node->safe_psql('app', $counts), 'completed|1000|0|0', "$table: all of them");
}
paid_once_ok($node, 'app', 1000, 'payoutq.account', times => 2);
paid_once_ok($node, 'app', 1000, 'bound table', accounts => 'users');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();
