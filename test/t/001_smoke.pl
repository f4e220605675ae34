# The worker pays a job without being asked.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $node = start_node('smoke');
create_db_with_extension($node, 'app');

my $job = $node->safe_psql('app', q{
	SELECT payout_create_job('smoke',
	                         array_agg('user' || i), array_agg(i * 100))
	FROM generate_series(1, 10) i
});
is($node->safe_psql('app', "SELECT payout_wait_for_job($job, '1 min')"),
	'completed', 'the job is completed');
is( $node->safe_psql('app', q{
		SELECT count(*), sum(balance) FROM payout_accounts
		WHERE user_id LIKE 'user%'}),
	'10|5500',
	'everybody is paid');
is($node->safe_psql('app', 'SELECT * FROM payout_verify() WHERE NOT ok'),
	'', 'the books balance');

$node->stop;
done_testing();
