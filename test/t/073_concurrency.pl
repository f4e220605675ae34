# Workers, two jobs over the same users, and sessions that deposit and withdraw
# at the same time: nobody deadlocks, and every unit is accounted for.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $users = 20_000;
my $node = start_node('main', conf => q(
payoutq.workers = 4
payoutq.retry_base = 20ms
max_worker_processes = 20
));
create_db_with_extension($node, 'app');
my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");

# Each transaction moves money of some users of its own choice, not in order;
# who has not enough is left alone.
my $script = $node->basedir . '/move.sql';
append_to_file($script, <<"END");
\\set a random(1, $users)
\\set b random(1, $users)
\\set amount random(1, 50)
\\set n random(1, 1000000000)
SELECT payout_deposit('u' || :a, :amount, 'deposit ' || :client_id || ' ' || :n);
SELECT payout_withdraw('u' || :b, :amount, 'withdrawal ' || :client_id || ' ' || :n)
 WHERE payout_balance('u' || :b) >= :amount;
END

# Some accounts exist, the sessions make others, and so do the jobs, each of
# which pays everybody.
$node->safe_psql('app', qq{
	SELECT payout_create_job('some', array_agg('u' || i), array_agg(i::bigint))
	FROM generate_series(1, $users) i WHERE i % 3 = 0});
wait_for_job($node, 'app', 1);
$node->safe_psql('app', 'SELECT payout_stop_workers()');
my @jobs = map {
	create_job($node, 'app', "job $_", $users, args => "batch_size => $_")
} (500, 50, 333, 200);
my $bench = IPC::Run::start(
	[ 'pgbench', '-n', '-c6', '-j1', '-t1000', "--random-seed=$seed", '-f', $script,
		'--max-tries=1', '-d', $node->connstr('app') ],
	'>', \my $out, '2>', \my $error);
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $_), "job $_ is completed") foreach @jobs;
$bench->finish;
note($out);
unlike($error, qr/deadlock/, 'no session met a deadlock') or diag($error);
like($out, qr/number of transactions actually processed: [1-9]/, 'there was other traffic');

is($node->safe_psql('app', q{
		SELECT sum(completed_count), sum(failed_count) FROM payout_jobs}),
	@jobs * $users + int($users / 3) . '|0', 'everybody is paid by all jobs');
is($node->safe_psql('app', qq{
		SELECT count(*) FROM payout_accounts a,
		       LATERAL (SELECT coalesce(sum(CASE kind WHEN 'deposit' THEN amount ELSE -amount END), 0) AS moved
		                FROM payoutq.movement
		                WHERE a.user_id IN (debit_account, credit_account)) m
		WHERE user_id ~ '^u' AND balance - m.moved <> substr(user_id, 2)::bigint *
		      CASE WHEN substr(user_id, 2)::bigint % 3 = 0 THEN 5 ELSE 4 END}),
	0, 'each balance is all shares and what was moved');
books_ok($node, 'app', 'at the end');

# A batch that met an error and was tried again keeps the error, and nobody
# writes it to the log.
is($node->safe_psql('app', q{
		SELECT error_code, min(error), count(*) FROM payoutq.batch
		WHERE error_code IS NOT NULL GROUP BY 1 ORDER BY 1}),
	'', 'no batch had to be tried again');
my $log = slurp_file($node->logfile);
unlike($log, qr/deadlock/, 'no deadlock in the log');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();
