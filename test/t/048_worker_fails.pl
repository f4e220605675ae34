# A job that makes workers fail outside of a batch: each that comes after serves the
# others first, and rests until it is that job's turn again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 1
payoutq.interval = '1d'
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', q{
	CREATE SEQUENCE failures START 0 MINVALUE 0;
	SELECT nextval('failures');
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN RAISE EXCEPTION 'failure %', nextval('public.failures'); END $$;
	CREATE TRIGGER refuse BEFORE UPDATE ON payoutq.job FOR EACH ROW
		WHEN (NEW.status = 'completed' AND NEW.reference = 'bad') EXECUTE FUNCTION refuse()});
my $bad = create_job($node, 'app', 'bad', 10);

# The pauses grow: after a few failures it is left alone for some seconds.
my $failures = 'SELECT last_value FROM failures';
ok(wait_for($node, 'app', $failures, 3), 'a job makes three workers fail');
my $good = create_job($node, 'app', 'good', 10, prefix => 'good');
ok(wait_for_job($node, 'app', $good), 'the next one pays another job first');

# What this test asks meanwhile is asked in another database.
my $failed = $node->safe_psql('app', $failures);
my $transactions = q{SELECT xact_commit FROM pg_stat_database WHERE datname = 'app'};
my $before = $node->safe_psql('postgres', $transactions);
my $workers = q{FROM pg_stat_activity WHERE backend_type = 'payoutq worker' AND datname = 'app'};
ok(wait_for($node, 'postgres', "SELECT count(*) $workers", 0), 'then it fails too');
my $done = $node->safe_psql('postgres', $transactions) - $before;
$failed = $node->safe_psql('app', $failures) - $failed;
cmp_ok($done, '<', 200 * ($failed + 1), 'and has rested meanwhile');
note("$done transactions");

# Mended
$node->safe_psql('app', 'DROP FUNCTION refuse CASCADE; SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $bad), 'mended, the job is completed');
paid_once_ok($node, 'app', 10, 'at the end');

$node->stop;
done_testing();
