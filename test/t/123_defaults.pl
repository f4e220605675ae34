# With no option and no setting but those that must be, transfers are sent and confirmed.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main');
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1');
$node->safe_psql('app', q{SELECT payout_set_destination('u' || i, 'stripe', 'acct_' || i) FROM generate_series(1, 20) i});
ok(wait_for_job($node, 'app', create_job($node, 'app', 'first', 20, args => q{provider => 'stripe'}), 'completed', 20), 'completed');
$node->stop;
done_testing();
