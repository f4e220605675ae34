# A worker that is stopped or killed in the middle of a query leaves nothing
# behind: the query is run again, and pays once.  One that always kills the
# worker is given up after three times.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.lock_timeout = 1min
payoutq.max_attempts = 3
max_prepared_transactions = 1
));
create_db_with_extension($node, 'app');

# The query waits for a lock, and a prepared transaction keeps it over crashes.
my $hold = q{
	BEGIN;
	SELECT pg_advisory_xact_lock(7);
	PREPARE TRANSACTION 'hold'};
my $release = q(ROLLBACK PREPARED 'hold');

# Stopped, more often than it may be tried
$node->safe_psql('app', $hold);
my $job = create('stopped');
foreach my $n (1 .. 5)
{
	ok(worker_is_held($job), "the query is run, $n") or last;
	$node->safe_psql('app', 'SELECT payout_stop_workers()');
	wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
	$node->safe_psql('app', 'SELECT payout_start_worker()');
}
nothing_is_left($job, 'stopped');
$node->safe_psql('app', $release);
ok(wait_for_job($node, 'app', $job, 'completed', 30), 'stopped: then the job is paid');
paid_once_ok($node, 'app', 5000, 'stopped', prefix => 'stopped');

# Its cancellation is taken back, more often than it may be tried: nothing has
# happened, and the query goes on.  Committed, it ends the query.
$node->safe_psql('app', $hold);
$job = create('kept');
ok(worker_is_held($job), 'the query is run');
my $pid = held_pid();
foreach my $n (1 .. 5)
{
	ok(worker_is_held($job), "the query is being run, $n") or last;
	my $session = $node->background_psql('app');
	$session->query_safe("BEGIN; SAVEPOINT before; SELECT payout_cancel_job($job)");
	$session->query_safe($n % 2 ? 'ROLLBACK' : 'ROLLBACK TO before; COMMIT');
	$session->quit;
}
is(held_pid(), $pid, 'kept: it is the same attempt');
$node->safe_psql('app', $release);
ok(wait_for_job($node, 'app', $job), 'kept: the job is paid');
paid_once_ok($node, 'app', 5000, 'kept', prefix => 'kept');

$node->safe_psql('app', $hold);
$job = create('cancelled');
ok(worker_is_held($job), 'the query is run');
$node->safe_psql('app', "SELECT payout_cancel_job($job)");
ok(wait_for($node, 'app', 'SELECT NOT ' . held()), 'cancelled: the query ends');
nothing_is_left($job, 'cancelled');
$node->safe_psql('app', $release);

# Killed, once
$node->safe_psql('app', $hold);
$job = create('once');
ok(worker_is_held($job), 'the query is run');
kill9(held_pid());
ok(wait_for($node, 'app', 'SELECT true'), 'the server is back');
ok(worker_is_held($job), 'the query is run again by itself');
nothing_is_left($job, 'once');
$node->safe_psql('app', $release);
ok(wait_for_job($node, 'app', $job), 'killed once: then the job is paid');
paid_once_ok($node, 'app', 5000, 'once', prefix => 'once');

# Killed each time
$node->safe_psql('app', $hold);
$job = create('always');
my $times = 0;
while ($times < 10 && worker_is_held($job))
{
	$times++;
	kill9(held_pid());
	wait_for($node, 'app', 'SELECT true');
}
is($times, 3, 'three times');
ok(wait_for_job($node, 'app', $job, 'failed'), 'then the job has failed');
like($node->safe_psql('app', "SELECT error FROM payout_job_status($job)"), qr/killed 3 times/, 'with the reason');
nothing_is_left($job, 'always');
$node->safe_psql('app', $release);
$node->safe_psql('app', "SELECT payout_retry_job($job)");
ok(wait_for_job($node, 'app', $job), 'retried, it is expanded and paid');
paid_once_ok($node, 'app', 5000, 'always', prefix => 'always');

# The job is being paused by somebody who takes his time, when its query is done,
# and then he thinks better of it: that is no crash either.
$node->safe_psql('app', q{
	CREATE FUNCTION patient() RETURNS boolean LANGUAGE plpgsql SET lock_timeout = 0 AS
		'BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN true; END'});
$node->append_conf('postgresql.conf', 'payoutq.lock_timeout = 100ms');
$node->reload;
$node->safe_psql('app', $hold);
$job = create('paused', 'patient()');
foreach my $n (1 .. 5)
{
	ok(worker_is_held($job), "the query is run, $n") or last;
	my $session = $node->background_psql('app');
	$session->query_safe("BEGIN; SELECT payout_pause_job($job)");
	my $offset = -s $node->logfile;
	$node->safe_psql('app', $release);
	ok($node->wait_for_log(qr/entries of job $job were not written, and why could not be recorded/, $offset), "$n: it cannot be recorded");
	$node->safe_psql('app', $hold);
	$session->query_safe('ROLLBACK');
	$session->quit;
	$node->safe_psql('app', "SELECT payout_trigger_job($job)");
}
$node->safe_psql('app', $release);
ok(wait_for_job($node, 'app', $job), 'paused: in the end the job is paid');
paid_once_ok($node, 'app', 5000, 'paused', prefix => 'paused');

$node->stop;
done_testing();

sub create
{
	my ($name, $waits) = @_;
	$waits //= 'pg_advisory_xact_lock_shared(7) IS NOT NULL';
	return $node->safe_psql('app', qq{
		SELECT payout_create_job_from('$name',
			'SELECT ''$name'' || i AS user_id, i::bigint AS amount
			 FROM generate_series(1, 5000) i
			 WHERE i < 4000 OR $waits')});
}

sub nothing_is_left
{
	my ($job, $name) = @_;
	is($node->safe_psql('app', "SELECT count(*) FROM payout_entries WHERE job_id = $job"),
		0, "$name: nothing is left of an attempt");
	books_ok($node, 'app', "$name, not expanded");
	return;
}

sub held_pid
{
	return $node->safe_psql('app', q{
		SELECT min(pid) FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND wait_event = 'advisory'});
}

sub held
{
	return q{EXISTS (SELECT FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND wait_event = 'advisory')};
}

# True when a worker waits for our lock, false when the job has ended.
sub worker_is_held
{
	my ($job) = @_;
	my $held = held();
	wait_for($node, 'app', "SELECT $held OR status = 'failed' FROM payout_job_status($job)");
	return $node->safe_psql('app', "SELECT $held") eq 't';
}
