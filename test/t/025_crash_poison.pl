# Workers are killed while they search for the entries of a bound table that
# cannot be paid: only those are left, everybody else is paid once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $entries = 20_000;
my $kills = 10;
my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");
srand($seed);

my $node = start_node('main', conf => q(
payoutq.max_attempts = 2
payoutq.retry_base = 10ms
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', qq{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, $entries) i;
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \$\$
	BEGIN
		IF substr(NEW.user_id, 2)::int % 250 = 0 THEN
			RAISE EXCEPTION 'user % is closed', NEW.user_id;
		END IF;
		RETURN NEW;
	END \$\$;
	CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \$\$
	BEGIN
		PERFORM count(*) FROM generate_series(1, 300000);
		RETURN NULL;
	END \$\$;
	CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse();
	CREATE TRIGGER slow BEFORE UPDATE ON users FOR EACH STATEMENT EXECUTE FUNCTION slow();
	ALTER FUNCTION refuse() OWNER TO app;
	ALTER FUNCTION slow() OWNER TO app;
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance')});
my $job = create_job($node, 'app', 'poison', $entries, args => 'batch_size => 50');
my $batches = "SELECT count(*) FROM payout_batches WHERE job_id = $job";

foreach my $n (1 .. $kills)
{
	# A few batches later, whatever their outcome.
	my $more = 1 + int(rand(20));
	my $done = "SELECT count(*) FROM payoutq.batch WHERE job_id = $job AND (status <> 'pending' OR attempts > 0 OR error IS NOT NULL)";
	my $before = $node->safe_psql('app', $done);
	wait_for($node, 'app', "SELECT ($done) >= $before + $more");
	kill9(worker_pid($node, 'app'));
	wait_for($node, 'app', 'SELECT true');
	books_ok($node, 'app', "kill $n");
}
is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"),
	'running', 'the last kill was before the end');
speed_up($node, 'app');

ok(wait_for_job($node, 'app', $job), 'the job is completed');
is($node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)"),
	$entries - $entries / 250 . '|' . $entries / 250, 'all but the refused are paid');
is($node->safe_psql('app', q{
		SELECT count(*), bool_and(error LIKE 'user u% is closed') FROM payout_failed_entries}),
	$entries / 250 . '|t', 'and those say why');
is($node->safe_psql('app', q{
		SELECT count(*) FROM users WHERE balance <>
		CASE WHEN substr(user_id, 2)::int % 250 = 0 THEN 0 ELSE substr(user_id, 2)::int END}),
	0, 'everybody has what the entries say');
$node->safe_psql('app', 'DROP TRIGGER refuse ON users');
$node->safe_psql('app', "SELECT payout_retry_job($job)");
ok(wait_for_job($node, 'app', $job), 'mended and retried');
paid_once_ok($node, 'app', $entries, 'at the end', accounts => 'users');

$node->stop;
done_testing();
