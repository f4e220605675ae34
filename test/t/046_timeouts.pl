# Settings that end long statements and transactions are not for workers.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $node = start_node('main');
my @timeouts = ('statement_timeout', 'idle_in_transaction_session_timeout');
push @timeouts, 'transaction_timeout' if $node->pg_version >= 17;

# For everybody but this test.
local $ENV{PGOPTIONS} = join ' ', map { "-c $_=0" } @timeouts;
$node->append_conf('postgresql.conf', join '', map { "$_ = '300ms'\n" } @timeouts);
$node->restart;
create_db_with_extension($node, 'app');

my $job = $node->safe_psql('app', q{
	SELECT payout_create_job_from('slow',
		$$SELECT 'u1' AS user_id, least(count(md5(i::text)), 1) AS amount FROM generate_series(1, 5000000) i$$)});
ok(wait_for_job($node, 'app', $job), 'a query that takes longer is run');
paid_once_ok($node, 'app', 1, 'afterwards');
is(worker_errors($node), '', 'no complaint of a worker');

$node->stop;
done_testing();
