# How many calls the dispatcher makes at once, how often, to whom; and that it
# holds nothing in the database meanwhile.

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
payoutq.send_concurrency = 7
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '30s');

# So many at once, and not more; the first calls are held back by the provider.
my $n = 40;
hold("acct_many_$_") foreach 1 .. $n;
my $job = pay('many', $n);
my $processing = "SELECT count(*) FROM payout_transfers WHERE job_id = $job AND status = 'processing'";
ok(wait_for($node, 'app', $processing, 7), 'as many calls as payoutq.send_concurrency allows');
ok(wait_until(sub { posts('many') == 7 }), 'have come to the provider');

# Meanwhile nothing is held in the database.
my $session = q{FROM pg_stat_activity WHERE application_name = 'payoutq worker (dispatcher)'};
ok(wait_for($node, 'app', "SELECT count(*) $session AND xact_start IS NULL AND backend_xmin IS NULL", 1), 'no transaction is open during a call');
my $seen = 0;
$seen += $node->safe_psql('app', "SELECT count(*) $session AND xact_start < clock_timestamp() - interval '0.3 s'") foreach 1 .. 30;
is($seen, 0, 'looked at thirty times, there is never an old one');
is($node->safe_psql('app', "SELECT string_agg(DISTINCT wait_event_type, ' ') FROM pg_locks l JOIN pg_stat_activity a USING (pid)
		WHERE application_name = 'payoutq worker (dispatcher)' AND l.locktype = 'transactionid' AND xact_start < clock_timestamp() - interval '0.3 s'"),
	'', 'nor a lock');
is($node->safe_psql('app', "SELECT count(*) FROM payout_attempts WHERE finished_at IS NULL"), 7, 'the intent is written before the call');

# A reload takes effect, while they are under way.
$node->append_conf('postgresql.conf', 'payoutq.send_concurrency = 12');
$node->reload;
ok(wait_for($node, 'app', $processing, 12), 'a reload raises it');
ok(wait_until(sub { posts('many') == 12 }), 'at the provider too');
ok(wait_until(sub { ask($provider, 'POST', '/release'); wait_for_job_now() }), 'all are answered');
is(ask($provider, 'GET', '/measures')->{calls}, 12, 'never more');

# To one destination one after the other, to others at once.
ask($provider, 'DELETE', '/requests');
$node->safe_psql('app', q{SELECT payout_set_destination('same' || i, 'stripe', 'acct_same') FROM generate_series(1, 15) i});
$job = create_job($node, 'app', 'same', 15, prefix => 'same', args => q{provider => 'stripe'});
rule($provider, 'acct_same', delay => 30, times => 15);
ok(wait_for_job($node, 'app', $job), 'fifteen to one destination are sent');
is(ask($provider, 'GET', '/measures')->{destination}, 1, 'one at a time');
is(posts('same'), 15, 'each once');

# So many a second: the bucket, which holds a tenth of a second, is full at first.
$node->safe_psql('app', q{ALTER SERVER stripe OPTIONS (SET rate_limit '20')});
$node->append_conf('postgresql.conf', 'payoutq.send_concurrency = 50');
$node->reload;
ok(wait_for_job($node, 'app', pay('before', 1)), 'with the new limit');
ask($provider, 'DELETE', '/requests');
my $start = time();
$job = pay('limited', 60);
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $job AND status IN ('sent', 'completed')", 60), 'sixty are sent');
my @at = sort { $a <=> $b } map { $_->{at} } @{ ask($provider, 'GET', '/requests') };
my $most = 0;
foreach my $from (@at)
{
	my $within = grep { $_ >= $from && $_ < $from + 1000 } @at;
	$most = $within if $within > $most;
}
cmp_ok($most, '<=', 23, "rate_limit 20: at most $most calls in any second, of all kinds");
cmp_ok($most, '>=', 15, 'and it is made use of');
ok(wait_for_job($node, 'app', $job), 'all are confirmed');

# Raised again while there is something to send
$job = pay('raised', 200);
ok(wait_for($node, 'app', "SELECT count(*) > 5 FROM payout_transfers WHERE job_id = $job AND status <> 'pending'"), 'slowly at first');
$node->safe_psql('app', q{ALTER SERVER stripe OPTIONS (SET rate_limit '5000')});
$start = time();
ok(wait_for_job($node, 'app', $job), 'all are sent');
cmp_ok(time() - $start, '<', 8, 'a new limit is noticed while it sends');

# Two providers do not share a limit, nor wait for each other.
create_provider($node, 'app', 'slow', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1, timeout => '30s');
my $slow = pay('slow', 30, 'slow');
ok(wait_for($node, 'app', "SELECT count(*) > 0 FROM payout_transfers WHERE job_id = $slow AND status <> 'pending'"), 'one provider is slow');
ok(wait_for_job($node, 'app', pay('quick', 100), 'completed', 8), 'another is not');
isnt($node->safe_psql('app', "SELECT status FROM payout_job_status($slow)"), 'completed', 'while the slow one goes on');
books_ok($node, 'app', 'at the end');
is(worker_errors($node), '', 'no complaint of a worker');

$node->stop('immediate');
done_testing();

sub pay
{
	my ($reference, $n, $server) = @_;

	$server //= 'stripe';
	$node->safe_psql('app', qq{
		SELECT payout_set_destination('$reference' || i, '$server', 'acct_${reference}_' || i) FROM generate_series(1, $n) i});
	return create_job($node, 'app', $reference, $n, prefix => $reference, args => "provider => '$server'");
}

sub hold { rule($provider, $_[0], hold => 1); return; }

sub posts
{
	my ($name) = @_;

	return scalar grep { $_->{method} eq 'POST' && $_->{body} =~ /destination=acct_${name}(_|&)/ } @{ ask($provider, 'GET', '/requests') };
}

sub wait_until
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	while (time() < $end)
	{
		return 1 if $condition->();
		usleep(10_000);
	}
	return 0;
}

sub wait_for_job_now
{
	return $node->safe_psql('app', "SELECT status = 'completed' FROM payout_job_status($job)") eq 't';
}
