# One entry that cannot be paid does not keep the others of its batch from their
# money, costs only a few small batches, and is paid when the cause is mended.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.max_attempts = 3
payoutq.retry_base = 1h
payoutq.retry_cap = 1h
));
create_db_with_extension($node, 'app');

# A table of the application, whose trigger and constraint refuse two users.
$node->safe_psql('app', q{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0,
	                    CONSTRAINT poor CHECK (user_id <> 'u250' OR balance = 0));
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, 1000) i;
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.user_id = 'u777' THEN
			RAISE EXCEPTION 'user % is closed', NEW.user_id;
		END IF;
		RETURN NEW;
	END $$;
	CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse();
	ALTER FUNCTION refuse() OWNER TO app;
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance')});

# One among 500: while it waits for another try, the job is not completed.
my $job = create_job($node, 'app', 'one', 500, args => 'batch_size => 500');
my $counts = 'SELECT status, completed_count, failed_count, pending_count, progress FROM payout_job_status';
ok(wait_for($node, 'app', "$counts($job)", 'running|499|0|1|0.9980'), 'all but one are paid');
is($node->safe_psql('app', q{
		SELECT user_id, status, attempts, error_code, error FROM payout_failed_entries}),
	'u250|retryable|1|23514|new row for relation "users" violates check constraint "poor"',
	'and it says why');
my ($batches, $paid) = split /\|/, $node->safe_psql('app', qq{
	SELECT count(*), sum(w.batches) / count(*)
	FROM payout_batches b, payout_workers w WHERE b.job_id = $job});
note("$batches batches, $paid of them paid");
cmp_ok($batches, '<=', 11, 'the batch was halved until one was left');
cmp_ok($paid, '==', $batches - 1, 'and each half was paid once');
paid_except('u250', 'with one waiting');

# Its attempts are used up, one by one.
foreach my $attempt (2 .. 3)
{
	$node->safe_psql('app', "SELECT payout_trigger_job($job)");
	ok(wait_for($node, 'app', 'SELECT attempts FROM payout_failed_entries', $attempt),
		"attempt $attempt");
}
ok(wait_for_job($node, 'app', $job), 'then the job is completed');
is($node->safe_psql('app', "$counts($job)"), 'completed|499|1|0|1.0000', 'with one that failed');
is($node->safe_psql('app', 'SELECT user_id, status FROM payout_failed_entries'),
	'u250|failed', 'for good');
is($node->safe_psql('app', q{SELECT ok, value FROM payout_health WHERE check_name = 'failed_entries'}),
	'f|1', 'payout_health tells');

# Mended, and retried by hand
$node->safe_psql('app', 'ALTER TABLE users DROP CONSTRAINT poor');
is($node->safe_psql('app', "SELECT payout_retry_job($job)"), 1, 'one entry is queued again');
ok(wait_for($node, 'app', "$counts($job)", 'completed|500|0|0|1.0000'), 'and paid');
paid_once_ok($node, 'app', 500, 'at the end', accounts => 'users');
is($node->safe_psql('app', "SELECT payout_retry_job($job)"), 0, 'nothing is left to retry');

# A poison and missing accounts, in several batches at once
$node->safe_psql('app', q{
	UPDATE users SET balance = 0 WHERE balance > 0;
	DELETE FROM users WHERE user_id IN ('u1', 'u10', 'u100', 'u42', 'u999')});
$job = create_job($node, 'app', 'more', 1000, args => 'batch_size => 100');
ok(wait_for($node, 'app', "$counts($job)", 'running|994|0|6|0.9940'), 'all but six are paid');
is($node->safe_psql('app', q{
		SELECT string_agg(user_id, ' ' ORDER BY user_id), error_code
		FROM payout_failed_entries GROUP BY 2 ORDER BY 2}),
	"u777|P0001\nu1 u10 u100 u42 u999|P0002", 'each with its own reason');
cmp_ok($node->safe_psql('app', "SELECT count(*) FROM payout_batches WHERE job_id = $job"),
	'<=', 30, 'missing accounts are cut out, not searched for');
books_ok($node, 'app', 'six waiting');
$node->safe_psql('app', q{
	ALTER TABLE users DISABLE TRIGGER refuse;
	INSERT INTO users SELECT unnest(ARRAY['u1', 'u10', 'u100', 'u42', 'u999'])});
$node->safe_psql('app', "SELECT payout_retry_job($job)");
ok(wait_for_job($node, 'app', $job), 'completed when all is mended');
paid_once_ok($node, 'app', 1000, 'more', accounts => 'users');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();

sub paid_except
{
	my ($user, $name) = @_;
	is($node->safe_psql('app', qq{
			SELECT count(*) FROM users
			WHERE balance <> CASE WHEN user_id = '$user' OR substr(user_id, 2)::int > 500
			                      THEN 0 ELSE substr(user_id, 2)::int END}),
		0, "$name: everybody else has his money");
	books_ok($node, 'app', $name);
	return;
}
