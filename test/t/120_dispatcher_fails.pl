# A dispatcher that fails is replaced soon, each time a bit later, and soon again
# when the last failure is more than a minute ago.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

# No other worker comes and goes, which would be a success.
my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.workers = 1
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000);
$node->safe_psql('app', q{SELECT payout_set_destination('u' || i, 'stripe', 'acct_' || i) FROM generate_series(1, 2) i});
ok(wait_for_job($node, 'app', create_job($node, 'app', 'first', 1, args => q{provider => 'stripe'})), 'the first') or diag($node->safe_psql('app', 'TABLE payout_transfers'));
$node->safe_psql('app', 'SELECT pg_cancel_backend(' . dispatcher_pid($node, 'app') . ')');
my $job = create_job($node, 'app', 'second', 2, args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 15), 'it is replaced');

# A call a second: there is something to send for as long as we look.
create_provider($node, 'app', 'slow', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1);
$node->safe_psql('app', q{SELECT payout_set_destination('u' || i, 'slow', 'acct_' || i) FROM generate_series(1, 1000) i});
create_job($node, 'app', 'slow', 1000, args => q{provider => 'slow'});
my $another = sub {
	my ($pid, $limit) = @_;

	# While it records an answer, it does that once more instead.
	wait_for($node, 'app', "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE pid = $pid", 0);
	return wait_for($node, 'app', qq{SELECT count(*) FROM pg_stat_activity
		WHERE application_name = 'payoutq worker (dispatcher)' AND pid <> $pid}, 1, $limit);
};
foreach (1 .. 3)
{
	ok($another->(dispatcher_pid($node, 'app')), 'another one');
}
my $pid = dispatcher_pid($node, 'app');
ok(wait_for($node, 'app', "SELECT clock_timestamp() > backend_start + interval '61 s' FROM pg_stat_activity WHERE pid = $pid", 't', 90),
	'it does not fail for a minute');
ok($another->($pid, 10), 'then it is replaced as after a first failure');
$node->stop;
done_testing();
