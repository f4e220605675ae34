# Confirming does not wait for sending, also when the rate limit is what holds up both.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 20);
$node->safe_psql('app', q{SELECT payout_set_destination('u' || i, 'stripe', 'acct_' || i) FROM generate_series(1, 100) i});
my $job = create_job($node, 'app', 'many', 100, args => q{provider => 'stripe'});
ok(wait_for($node, 'app', "SELECT count(*) = 100 AND count(*) FILTER (WHERE status = 'pending') < 50 FROM payout_transfers"), 'half are sent');
cmp_ok($node->safe_psql('app', "SELECT count(*) FROM payout_transfers WHERE status = 'completed'"), '>', 0, 'some are confirmed by then');
ok(wait_for_job($node, 'app', $job), 'the end');
$node->stop;
done_testing();
