# Thousands of jobs at once, also thousands that wait for another try, for their
# transfers or for a query: nobody is forgotten, and a new job does not have to wait
# for them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;
use Time::HiRes qw(time);

my $node = start_node('main', conf => q(
payoutq.interval = '1d'
payoutq.retry_base = 1h
payoutq.retry_cap = 1h
));
create_db_with_extension($node, 'app');

# More than a worker keeps in its list, created at once
my $jobs = 3000;
my $create = q{
	SELECT count(payout_create_job('%s' || n, ARRAY['u1', 'u2', 'u3'], ARRAY[1::bigint, 2, 3], currency => '%s'))
	FROM generate_series(1, %d) n};
my %took;
foreach my $n ($jobs / 10, $jobs)
{
	$node->safe_psql('app', sprintf($create, "$n-", 'USD', $n));
	ok(wait_for($node, 'app', "SELECT count(*) FROM payout_jobs WHERE status = 'completed' AND reference LIKE '$n-%'", $n),
		"$n jobs are completed");
	$took{$n} = $node->safe_psql('app',
		"SELECT extract(epoch FROM max(completed_at) - min(started_at)) FROM payout_jobs WHERE reference LIKE '$n-%'");
	note("$n jobs in $took{$n} s");
}
cmp_ok($took{$jobs}, '<', 40 * $took{ $jobs / 10 }, 'in a time that does not grow with their square');
paid_once_ok($node, 'app', 3, 'many jobs', times => $jobs + $jobs / 10);

# As many that wait for accounts which do not exist
$node->safe_psql('app', q{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance', 'COIN')});
$node->safe_psql('app', sprintf($create, 'waits', 'COIN', $jobs));
ok( wait_for($node, 'app', q{
		SELECT count(*) FROM payout_batches WHERE status = 'retryable'}, $jobs),
	'all were tried, and wait');
foreach my $priority (0, -1)
{
	my $start = time();
	my $new = create_job($node, 'app', "new $priority", 10, prefix => "new$priority-",
		args => "priority => $priority");
	ok(wait_for_job($node, 'app', $new), "a new job of priority $priority is paid");
	cmp_ok(time() - $start, '<', 3, 'at once');
}

# Mended, and triggered all at once
$node->safe_psql('app', q{
	INSERT INTO users VALUES ('u1'), ('u2'), ('u3');
	SELECT count(payout_trigger_job(job_id)) FROM payout_jobs WHERE status = 'running'});
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_jobs WHERE status <> 'completed'}, 0),
	'all are completed when the cause is mended');
paid_once_ok($node, 'app', 3, 'waiting jobs', times => $jobs, accounts => 'users');

# As many of which all transfers are under way
my $many = 1100;
$node->safe_psql('app', q{
	CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
	SELECT payout_set_destination('u1', 'bank', 'x')});
$node->safe_psql('app', qq{
	SELECT count(payout_create_job('sent' || n, ARRAY['u1'], ARRAY[1::bigint], provider => 'bank'))
	FROM generate_series(1, $many) n});
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_transfers', $many), 'all have their transfers');
foreach my $priority (0, -1)
{
	my $new = create_job($node, 'app', "beside transfers $priority", 10, prefix => "beside$priority-",
		args => "priority => $priority");
	ok(wait_for_job($node, 'app', $new), "a new job of priority $priority is paid meanwhile");
}
$node->safe_psql('app', qq{SELECT count(payout_fail_transfer(id)) FROM payoutq.transfer});
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_jobs WHERE status <> 'completed'}, 0),
	'all are completed when their transfers have ended');

# As many that wait for the query of one of them
$node->append_conf('postgresql.conf', "payoutq.lock_timeout = '1h'");
$node->reload;
my $holder = $node->background_psql('app');
$holder->query_safe('SELECT pg_advisory_lock(1)');
$node->safe_psql('app', qq{
	SELECT count(payout_create_job_from('query' || n,
		\$\$SELECT 'u1' AS user_id, 1 AS amount FROM pg_advisory_xact_lock_shared(1)\$\$))
	FROM generate_series(1, $many) n});
ok( wait_for($node, 'app', q{
		SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'payoutq worker' AND wait_event_type = 'Lock'}, 1),
	'a query waits');
my $new = create_job($node, 'app', 'beside queries', 10, prefix => 'beside-query-');
ok(wait_for_job($node, 'app', $new), 'a new job is paid meanwhile');
$holder->quit;
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_jobs WHERE status <> 'completed'}, 0),
	'all are completed when the query has ended');
books_ok($node, 'app', 'at the end');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();
