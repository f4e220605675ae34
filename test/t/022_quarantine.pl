# A batch that kills the server is left alone after a few crashes: it is shown
# as failed, the rest of the job is paid, and it can be retried later.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main');
create_db_with_extension($node, 'app');

# The application's table of balances.  Its trigger calls something that kills
# the process it runs in, as a broken library would.
$node->safe_psql('app', q{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, 2000) i;
	CREATE FUNCTION kill_server() RETURNS void SECURITY DEFINER LANGUAGE plpgsql AS $$
	BEGIN
		COPY (SELECT 1) TO PROGRAM 'kill -9 $PPID';
	END $$;
	CREATE FUNCTION check_user() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.user_id = 'u777' THEN
			PERFORM public.kill_server();
		END IF;
		RETURN NEW;
	END $$;
	CREATE TRIGGER check_user BEFORE UPDATE ON users
		FOR EACH ROW EXECUTE FUNCTION check_user();
	ALTER FUNCTION check_user() OWNER TO app;
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance')});

my $job = create_job($node, 'app', 'killer', 2000, args => 'batch_size => 100');
ok(wait_for_job($node, 'app', $job), 'the job ends');
is($node->safe_psql('app', qq{
		SELECT completed_count, failed_count, pending_count, progress
		FROM payout_job_status($job)}),
	'1900|100|0|1.0000',
	'all batches but one are paid');
is($node->safe_psql('app', qq{
		SELECT count(*), count(DISTINCT batch_no), bool_or(user_id = 'u777'),
		       bool_and(status = 'failed'), bool_and(error LIKE '%killed%')
		FROM payout_failed_entries WHERE job_id = $job}),
	'100|1|t|t|t',
	'the batch is shown, with the reason');
is($node->safe_psql('app', qq{
		SELECT count(*) FROM users u JOIN payout_entries e USING (user_id)
		WHERE e.job_id = $job AND u.balance <> CASE e.status
		      WHEN 'completed' THEN e.amount ELSE 0 END}),
	0,
	'who is paid has his money, and the others have none');
books_ok($node, 'app', 'with a batch in quarantine');

my $log = slurp_file($node->logfile);
my $crashes = () = $log =~ /was terminated by signal 9/g;
cmp_ok($crashes, '>=', 3, 'not given up at the first crash');
cmp_ok($crashes, '<=', 4, 'given up after a few');
like($log, qr/WARNING: .*batch \d+ of job $job is quarantined/, 'the log tells');

# Without anybody's word, it is not tried again.
$node->restart;
ok(wait_for($node, 'app', 'SELECT count(*) > 0 FROM payout_workers'), 'a worker starts');
is($node->safe_psql('app', "SELECT failed_count FROM payout_job_status($job)"),
	100, 'it stays in quarantine over a restart');

# Mended
$node->safe_psql('app', 'DROP TRIGGER check_user ON users');
is($node->safe_psql('app', "SELECT payout_retry_job($job)"),
	100, 'its entries are queued again');
ok(wait_for_job($node, 'app', $job), 'the job ends again');
is($node->safe_psql('app', qq{
		SELECT completed_count, failed_count FROM payout_job_status($job)}),
	'2000|0',
	'nobody is left out');
paid_once_ok($node, 'app', 2000, 'after the retry', accounts => 'users');

$node->stop;
done_testing();
