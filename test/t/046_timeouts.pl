# Settings that end long statements, transactions and waits: those that the server,
# the database or a role has are not for workers; a session's own are obeyed.  Nor
# does a worker become the role that a database gives to its sessions.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $node = start_node('main', conf => 'payoutq.lock_timeout = 1min');
my %timeouts = (statement_timeout => '300ms', idle_in_transaction_session_timeout => '300ms', lock_timeout => '1ms');
$timeouts{transaction_timeout} = '300ms' if $node->pg_version >= 17;

# For everybody but this test.
local $ENV{PGOPTIONS} = join ' ', map { "-c $_=0" } sort keys %timeouts;
$node->append_conf('postgresql.conf', join '', map { "$_ = '$timeouts{$_}'\n" } sort keys %timeouts);
$node->restart;
$node->safe_psql('postgres', 'CREATE DATABASE app');
$node->safe_psql('postgres', join '', map { "ALTER DATABASE app SET $_ = '$timeouts{$_}';
	DO \$\$ BEGIN EXECUTE format('ALTER ROLE %I SET $_ = %L', current_user, '$timeouts{$_}'); END \$\$;" } sort keys %timeouts);
$node->safe_psql('app', 'CREATE EXTENSION payoutq');

# ---------------------------------------------------------------------------
# Workers and the launcher
# ---------------------------------------------------------------------------

my $job = $node->safe_psql('app', q{
	SELECT payout_create_job_from('slow',
		$$SELECT 'u1' AS user_id, least(count(md5(i::text)), 1) AS amount FROM generate_series(1, 5000000) i$$)});
ok(wait_for_job($node, 'app', $job), 'a query that takes longer is run');
paid_once_ok($node, 'app', 1, 'afterwards');

my $session = $node->background_psql('app');
$session->query_safe("BEGIN; SELECT FROM payoutq.account WHERE user_id = 'u1' FOR UPDATE");
$job = create_job($node, 'app', 'locked account', 10);
is(waits_long('worker'), 't', 'a batch waits for a lock longer than lock_timeout');
$session->query_safe('COMMIT');
ok(wait_for_job($node, 'app', $job), 'and is paid');
is($node->safe_psql('app', "SELECT attempts FROM payout_batches WHERE job_id = $job"), 1, 'at the first attempt');

$session->query_safe('BEGIN; LOCK pg_database IN ACCESS EXCLUSIVE MODE; SELECT pg_reload_conf()');
is(waits_long('launcher'), 't', 'so does the launcher');
$session->query_safe('COMMIT');
is(worker_errors($node), '', 'no complaint of any of them');

# ---------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------

$session->query_safe(q{BEGIN; SELECT payout_create_job('reference', ARRAY['a'], ARRAY[1])});
my $begin = time();
my ($status, $out, $error) = $node->psql('app', q{
	SET lock_timeout = '100ms';
	SELECT payout_create_job('reference', ARRAY['a'], ARRAY[1])});
like($error, qr/canceling statement due to lock timeout/, q(a session's lock_timeout ends the wait for a reference));
cmp_ok(time() - $begin, '<', 30, 'before payoutq.lock_timeout does');
$session->query_safe('ROLLBACK');
$session->quit;

# A million winners, to be read, sorted and written.
($status, $out, $error) = $node->psql('app', q{
	CREATE TEMP TABLE given AS
		SELECT array_agg(md5(i::text)) AS user_ids, array_agg(i::bigint) AS amounts FROM generate_series(1, 1000000) i;
	SET statement_timeout = '200ms';
	SELECT payout_create_job('many', user_ids, amounts) FROM given});
like($error, qr/canceling statement due to statement timeout/, q(a session's statement_timeout ends a creation));
is($node->safe_psql('app', q{
		SELECT (SELECT count(*) FROM payout_jobs WHERE reference IN ('many', 'reference')), (SELECT count(*) FROM payoutq.entry)}),
	'0|11', 'which leaves nothing');

# ---------------------------------------------------------------------------
# The role of a database, or of whom a worker is
# ---------------------------------------------------------------------------

my $offset = -s $node->logfile;
my $me = $node->safe_psql('postgres', 'CREATE ROLE nobody; SELECT current_user');
foreach my $setting ('DATABASE app SET role', "ROLE $me IN DATABASE app SET role", 'DATABASE app SET session_authorization')
{
	local $ENV{PGOPTIONS} = "$ENV{PGOPTIONS} -c role=none -c session_authorization=$me";
	$node->safe_psql('postgres', "ALTER $setting = 'nobody'");
	$node->safe_psql('app', 'SELECT payout_stop_workers()');
	wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
	$node->safe_psql('app', 'SELECT payout_start_worker()');
	$job = $node->safe_psql('app', qq{
		SELECT payout_create_job('$setting', ARRAY['u1'], ARRAY[1])});
	ok(wait_for_job($node, 'app', $job), "paid after $setting");
	$node->safe_psql('postgres', 'ALTER ' . ($setting =~ s/SET/RESET/r));
}
is(worker_errors($node, $offset), '', 'no complaint of a worker');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

# Asked in the session that holds the lock: nobody else may be able to connect.
sub waits_long
{
	my ($who) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
	my $answer = '';

	while (time() < $end)
	{
		$answer = $session->query_safe(qq{
			SELECT coalesce(max(clock_timestamp() - l.waitstart) > '500ms', false)
			FROM pg_locks l JOIN pg_stat_get_activity(NULL) a USING (pid) WHERE NOT l.granted AND a.backend_type = 'payoutq $who'});
		last if $answer eq 't';
		usleep(20_000);
	}
	return $answer;
}
