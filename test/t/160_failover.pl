# A synchronous standby takes over in the middle of a job, twice, while clients
# create jobs and make deposits and note what was acknowledged: nothing of that is
# lost, what was not is repeated under the same reference, and nothing is twice.
#
# Commits wait until the standby has written them (synchronous_commit = on), which
# is enough: it replays all that it has before it is promoted.  remote_apply would
# only matter to whoever reads from the standby.  Here the server does not even
# ask for that, so it is the clients who ask, and payoutq, whose workers do by
# themselves.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $entries = 10_000;
my $clients = 2;
my $tmp = PostgreSQL::Test::Utils::tempdir();
my $paid = "SELECT completed_count FROM payout_job_status('big')";
my %acked;

my $first = start_node('first', streaming => 1, conf => q(
payoutq.interval = 1d
payoutq.workers = 2
synchronous_commit = off
));
create_db_with_extension($first, 'app');
slow_down($first, 'app', 30000);
my $second = add_standby($first, 'second');

# The primary is killed while everything goes on.
my $big = create_job($first, 'app', 'big', $entries, args => 'batch_size => 10, platform_fee => 7');
my @running = map { start_client($first, 1, $_) } 1 .. $clients;
my $seen = progress($first);
ok($seen > 0 && $seen < $entries / 2, "in the middle of the job: $seen are paid");
$first->kill9;
finish(@running);
$second->promote;
taken_over($second, 1);

# And back.  This time the standby stops first: what the primary still commits is
# lost with it, and has not been acknowledged.
my $third = add_standby($second, 'third');
@running = map { start_client($second, 2, $_) } 1 .. $clients;
$seen = progress($second);
ok($seen > 0 && $seen < $entries, "in the middle of the job: $seen are paid");
$third->stop('immediate');
my $late = start_client($second, 'late', 1);
ok(wait_for($second, 'postgres', q{
		SELECT count(*) FILTER (WHERE backend_type = 'client backend'), count(*) FILTER (WHERE backend_type = 'payoutq worker')
		FROM pg_stat_activity WHERE wait_event = 'SyncRep'}, ($clients + 1) . '|2'),
	'without a standby, clients and workers wait for one');
$seen = $second->safe_psql('app', $paid);
$second->kill9;
finish(@running, $late);
is(delete $acked{ $late->{name} }, 0, 'what was committed meanwhile is not acknowledged');
$third->start;
$third->promote;
is($third->safe_psql('app', "SELECT count(*) FROM payoutq.job WHERE reference = '$late->{name}:1'"), 0, 'and is lost');
taken_over($third, 2);

speed_up($third, 'app');
ok(wait_for_job($third, 'app', $big), 'the large job goes on to its end');
paid_once_ok($third, 'app', $entries, 'after two failovers');
is(worker_errors($_), '', 'no complaint of a worker on ' . $_->name) foreach ($second, $third);

$third->stop;
done_testing();

# A standby for which commits of the node wait from now on
sub add_standby
{
	my ($node, $name) = @_;
	my $standby = PostgreSQL::Test::Cluster->new($name);

	$node->backup($name);
	$standby->init_from_backup($node, $name, has_streaming => 1);
	$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
	$standby->start;
	$node->append_conf('postgresql.conf', q(synchronous_standby_names = '*'));
	$node->reload;
	ok(wait_for($node, 'postgres', q{SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'}, 1), "$name is a synchronous standby");
	return $standby;
}

# Runs until the server is gone.  psql writes the line after the commit has
# returned; up to then it may have happened or not.
sub start_client
{
	my ($node, $round, $client) = @_;
	my $name = "r${round}c$client";
	my ($script, $acks) = ("$tmp/$name.sql", "$tmp/$name.acks");

	append_to_file($script, "SET synchronous_commit = on;\n" . join '', map { work($name, $_) . "\\echo $_\n" } 1 .. 5000);
	my $psql = IPC::Run::start(
		[ 'psql', '-X', '-q', '-At', '-v', 'ON_ERROR_STOP=1', '-o', '/dev/null', '-f', $script, $node->connstr('app') ],
		'<', \undef, '>', $acks, '2>', "$acks.err");
	return { name => $name, acks => $acks, psql => $psql };
}

# A job with one winner, and a deposit for another user, in one transaction
sub work
{
	my ($name, $i) = @_;

	return qq{BEGIN;
SELECT payout_create_job('$name:$i', ARRAY['$name' || '_$i'], ARRAY[bigint '$i']);
SELECT payout_deposit('deposit_$name', $i, '$name:$i');
COMMIT;
};
}

sub finish
{
	foreach my $client (@_)
	{
		$client->{psql}->finish;
		my @acks = split /\n/, slurp_file($client->{acks});
		$acked{ $client->{name} } = $acks[-1] // 0;
	}
	return;
}

# How many entries somebody was told to be paid, once all are at work
sub progress
{
	my ($node) = @_;
	my $done = sub { return scalar grep { (() = slurp_file($_->{acks}) =~ /\n/g) >= 20 } @running };
	my $before = $node->safe_psql('app', $paid);

	ok(wait_for($node, 'app', "SELECT ($paid) > $before"), 'the job advances');
	foreach (1 .. 1000)
	{
		last if $done->() == $clients;
		usleep(10_000);
	}
	is($done->(), $clients, 'and the clients do');
	return $node->safe_psql('app', $paid);
}

sub taken_over
{
	my ($node, $round) = @_;
	my $name = $node->name;

	ok(wait_for($node, 'app', 'SELECT count(*) > 0 FROM payout_workers'), "$name: workers start by themselves");
	cmp_ok($node->safe_psql('app', $paid), '>=', $seen, 'what was seen to be paid is paid');
	foreach my $client (sort grep { /^r$round/ } keys %acked)
	{
		my $acks = $acked{$client};
		my $is = $node->safe_psql('app', qq{
			SELECT (SELECT count(*) FROM payoutq.job WHERE reference ~ '^$client:' AND split_part(reference, ':', 2)::int <= $acks),
			       (SELECT count(*) FROM payout_ledger WHERE account = 'deposit_$client' AND amount <= $acks)});
		cmp_ok($acks, '>', 0, "$client: $acks acknowledged");
		is($is, "$acks|$acks", "$client: all of it exists, once");

		# Whoever has no answer asks again, and some do who have one.
		my $all = $acks + 1;
		$node->safe_psql('app', join '', map { work($client, $_) } ($all > 5 ? $all - 5 : 1) .. $all);
		ok(wait_for($node, 'app', qq{
				SELECT count(*), sum(balance), count(*) FILTER (WHERE balance <> substr(user_id, length('$client') + 2)::bigint)
				FROM payout_accounts WHERE user_id ~ '^${client}_'}, "$all|" . $all * ($all + 1) / 2 . '|0'),
			"$client: each of $all is paid, once");
		is($node->safe_psql('app', "SELECT balance FROM payout_accounts WHERE user_id = 'deposit_$client'"), $all * ($all + 1) / 2,
			"$client: each of $all has deposited, once");
	}
	books_ok($node, 'app', $name);
	return;
}
