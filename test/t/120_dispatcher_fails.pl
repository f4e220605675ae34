# A dispatcher that fails is replaced soon.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => "payoutq.interval = 1d\npayoutq.send_interval = 100ms\npayoutq.confirm_interval = 100ms");
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000);
$node->safe_psql('app', q{SELECT payout_set_destination('u' || i, 'stripe', 'acct_' || i) FROM generate_series(1, 2) i});
ok(wait_for_job($node, 'app', create_job($node, 'app', 'first', 1, args => q{provider => 'stripe'})), 'the first') or diag($node->safe_psql('app', 'TABLE payout_transfers'));
$node->safe_psql('app', 'SELECT pg_cancel_backend(' . dispatcher_pid($node, 'app') . ')');
my $job = create_job($node, 'app', 'second', 2, args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 15), 'it is replaced');
$node->stop;
done_testing();
