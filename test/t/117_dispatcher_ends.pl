# The dispatcher leaves when it is to, also in the middle of calls: when workers
# are stopped, for DROP EXTENSION and DROP DATABASE, and with the server. What
# was under way is sent again under its old key.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
my $provider = start_provider();
my $no_dispatcher = q{SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'payoutq worker (dispatcher)'};
my $n = 0;

create_db_with_extension($node, 'app');
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '30s');

# Ended by somebody, it comes back for the next.
wait_for_job($node, 'app', pay('app', 'first'));
my $pid = dispatcher_pid($node, 'app');
$node->safe_psql('app', "SELECT pg_terminate_backend($pid)");
ok(wait_for_job($node, 'app', pay('app', 'second')), 'one that was terminated is replaced');
isnt(dispatcher_pid($node, 'app'), $pid, 'by another');
my $offset = -s $node->logfile;

# payout_stop_workers(), while a call is under way
under_way('app');
my $start = time();
$node->safe_psql('app', 'SELECT payout_stop_workers()');
ok(wait_for($node, 'postgres', $no_dispatcher), 'payout_stop_workers() stops it too');
cmp_ok(time() - $start, '<', 3, 'at once');
my $next = pay('app', 'stopped');
$node->safe_psql('app', 'CALL payout_process()');
is($node->safe_psql('app', "SELECT status, attempts FROM payout_transfers WHERE job_id = $next"), 'pending|0', 'transfers wait');
is($node->safe_psql('postgres', $no_dispatcher), 't', 'nobody sends');
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $next), 'started again, it sends');

# A server that is stopped does not wait for the provider.
under_way('app');
$start = time();
$node->stop('fast');
cmp_ok(time() - $start, '<', 5, 'a fast shutdown does not wait for an answer');
$node->start;
is(worker_errors($node, $offset), '', 'no complaint of a worker');

# Nor does it outlive the postmaster.
under_way('app');
$pid = dispatcher_pid($node, 'app');
$node->kill9;
my $end = time() + 10;
usleep(10_000) while kill(0, $pid) && time() < $end;
ok(!kill(0, $pid), 'it ends with the postmaster') or kill('KILL', $pid);
$node->start;

# DROP EXTENSION, and both in one transaction
foreach my $command ('DROP EXTENSION payoutq CASCADE', 'BEGIN; DROP EXTENSION payoutq CASCADE; CREATE EXTENSION payoutq; COMMIT')
{
	$offset = -s $node->logfile;
	under_way('app');
	$start = time();
	my ($code, $out, $error) = $node->psql('app', $command);
	is($code, 0, $command) or diag($error);
	cmp_ok(time() - $start, '<', 3, 'it does not wait for an answer');
	if ($command !~ /CREATE/)
	{
		ok(wait_for($node, 'postgres', $no_dispatcher), 'the dispatcher leaves');
		$node->safe_psql('app', 'CREATE EXTENSION payoutq');
	}

	# Ids begin anew, and so do keys, which the old provider knows.
	$provider = start_provider();
	create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '30s');
	rule($provider, 'acct_new' . ($n + 1), hold => 1);
	my $job = pay('app', 'new');
	ok(wait_for($node, 'app', 'SELECT status FROM payout_transfers', 'processing', 10), 'the first transfer of the new extension');
	ok(has_come("acct_new$n"), 'has come to the provider');
	ask($provider, 'POST', '/release');
	ok(wait_for_job($node, 'app', $job, 'completed', 20), 'it is sent');
	is(worker_errors($node, $offset), '', 'no complaint of a worker');
}

# DROP DATABASE
create_db_with_extension($node, 'gone');
create_provider($node, 'gone', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '30s');
under_way('gone');
$start = time();
my ($code, $out, $error) = $node->psql('postgres', 'DROP DATABASE gone');
is($code, 0, 'DROP DATABASE') or diag($error);
cmp_ok(time() - $start, '<', 5, 'it does not wait for an answer');

$node->stop;
done_testing();

sub pay
{
	my ($db, $name) = @_;

	$n++;
	$node->safe_psql($db, "SELECT payout_set_destination('$name${n}_1', 'stripe', 'acct_$name$n')");
	return create_job($node, $db, "$name$n", 1, prefix => "$name${n}_", args => q{provider => 'stripe'});
}

# Returns when a call has come to the provider, which keeps it waiting.
sub under_way
{
	my ($db) = @_;
	my $destination = 'acct_held' . ($n + 1);

	rule($provider, $destination, hold => 1);
	my $job = pay($db, 'held');
	ok(wait_for($node, $db, "SELECT status FROM payout_transfers WHERE job_id = $job", 'processing') && has_come($destination),
		'a call is under way');
	return;
}

sub has_come
{
	my ($destination) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	while (time() < $end)
	{
		return 1 if grep { $_->{body} =~ /destination=$destination&/ } @{ ask($provider, 'GET', '/requests') };
		usleep(10_000);
	}
	return 0;
}
