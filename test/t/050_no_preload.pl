# Without shared_preload_libraries everything works, by CALL payout_process() or
# by a worker that is started by hand.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', preload => '');
create_db_with_extension($node, 'app');
my ($code, $out, $error);

# Nobody pays unless asked to.
my $job = create_job($node, 'app', 'by hand', 1000, args => 'batch_size => 100, platform_fee => 5');
is($node->safe_psql('app', 'SELECT count(*) FROM payout_workers'), 0, 'no worker');
is($node->safe_psql('app', "SELECT payout_wait_for_job($job, '50 ms')"),
	'queued', 'waiting ends in time');

# One batch, then the rest, a commit for each.
$node->safe_psql('app', 'CALL payout_process(max_batches => 1)');
is($node->safe_psql('app', qq{
		SELECT status, completed_count, pending_count, progress
		FROM payout_job_status($job)}),
	'running|100|900|0.1000',
	'one batch is paid');
books_ok($node, 'app', 'after one batch');
my $before = $node->safe_psql('app', 'SELECT pg_current_xact_id()');
my $waiter = $node->background_psql('app');
$waiter->query_until(qr//, "SELECT payout_wait_for_job($job, '1 min');\n");
$node->safe_psql('app', 'CALL payout_process()');
cmp_ok($node->safe_psql('app', 'SELECT pg_current_xact_id()') - $before,
	'>=', 10, 'each batch is a transaction');
like($waiter->query('SELECT 1'), qr/^completed$/m, 'who waits for the job is told');
$waiter->quit;
paid_once_ok($node, 'app', 1000, 'by hand');

# What a session calls first loads the library.
is($node->safe_psql('app', q{SELECT entry, batch_no, outcome FROM payout_preview_job('preview', ARRAY['ann'], ARRAY[10])}),
	'1|1|new account', 'a preview in a fresh session');

# Of one job only
my $first = create_job($node, 'app', 'first', 10, prefix => 'first');
my $second = create_job($node, 'app', 'second', 10, prefix => 'second');
$node->safe_psql('app', "CALL payout_process(job_id => $second)");
is($node->safe_psql('app', 'SELECT reference, status FROM payout_jobs WHERE job_id > 1 ORDER BY 1'),
	"first|queued\nsecond|completed", 'the other job has to wait');
$node->safe_psql('app', 'CALL payout_process()');

# It commits, so it cannot be a part of something else.
foreach my $sql ('BEGIN; CALL payout_process()', 'CALL payout_process(); SELECT 1')
{
	($code, $out, $error) = $node->psql('app', "\\set VERBOSITY verbose\n" .
		($sql =~ /BEGIN/ ? $sql : 'SELECT 1 \; ' . $sql));
	like($error, qr/ERROR:  25001: /, "refused in: $sql");
}
is($node->safe_psql('app', q{DO 'BEGIN CALL payout_process(1); COMMIT; END'}), '',
	'allowed in a DO block at the top level');

# An expansion and a role that is not a superuser
$node->safe_psql('app', q{
	CREATE ROLE clerk LOGIN;
	SELECT payout_grant('clerk', 'operator');
	GRANT USAGE ON SCHEMA public TO clerk});
$node->safe_psql('app', q{
	SELECT payout_create_job_from('query', 'SELECT current_user || i AS user_id, i::bigint AS amount
	                                        FROM generate_series(1, 700) i');
	CALL payout_process()}, extra_params => [ '-U', 'clerk' ]);
paid_once_ok($node, 'app', 700, 'as another role', prefix => 'clerk');

# A worker by hand works, is shown, and is gone when stopped.
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 1), 'a worker by hand');
my $third = create_job($node, 'app', 'third', 1000, prefix => 'third');
ok(wait_for_job($node, 'app', $third), 'it finds a new job by itself');

# Nobody tells it that a job is to be tried again, but it sees that.
$node->append_conf('postgresql.conf', "payoutq.retry_base = '1h'\npayoutq.retry_cap = '1h'");
$node->reload;
$node->safe_psql('app', q{
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	ALTER TABLE users OWNER TO clerk;
	SELECT payout_bind_accounts('users', 'user_id', 'balance', 'COIN')});
foreach my $again ('payout_trigger_job', 'payout_retry_job')
{
	$job = create_job($node, 'app', $again, 1, prefix => $again, args => "currency => 'COIN'");
	ok(wait_for($node, 'app', "SELECT status FROM payout_batches WHERE job_id = $job", 'retryable'), 'nobody is there to be paid');
	$node->safe_psql('app', qq{
		INSERT INTO users VALUES ('${again}1');
		SELECT $again($job)});
	ok(wait_for_job($node, 'app', $job), "$again() tells the worker by hand");
}
is($node->safe_psql('app', 'SELECT payout_stop_workers()'), 1, 'it is stopped');
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0), 'and leaves');

# Nor does it outlive the extension.
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 1), 'another worker');
paid_once_ok($node, 'app', 1000, 'by a worker', prefix => 'third');
$node->safe_psql('app', 'DROP EXTENSION payoutq');
ok(wait_for($node, 'postgres', q{SELECT count(*) FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker'}, 0),
	'it leaves after DROP EXTENSION');
is(worker_errors($node, 0), '', 'no complaint of a worker');

$node->stop;
done_testing();
