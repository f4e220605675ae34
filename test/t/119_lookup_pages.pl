# What was done under a key is found among many transfers to one account.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '1s', quiet_period => '1s');

# The first is made, the second is not, and of neither the answer says so.
my $n = 70;
$node->safe_psql('app', "SELECT payout_set_destination('u' || i, 'stripe', 'acct_1') FROM generate_series(1, $n) i");
rule($provider, 'acct_1', fault => '500-done');
rule($provider, 'acct_1', fault => 500);
my $job = create_job($node, 'app', 'many', $n, args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 20), 'all are paid');
is($node->safe_psql('app', 'SELECT count(*), max(generation) FROM payout_transfers WHERE generation > 1'), '1|2', 'one under a new key');
is(scalar(@{ ask($provider, 'GET', '/books') }), $n, 'each once');
books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();
