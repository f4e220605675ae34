# A streaming standby shows a job and does not work on it; once promoted in the
# middle of the job, it pays the rest.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = start_node('primary', streaming => 1, conf => q(
payoutq.workers = 1
payoutq.lock_timeout = 1min
));
create_db_with_extension($primary, 'app');
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

# The worker is held in the middle: u500 is in the sixth batch of ten.
$primary->safe_psql('app', "SELECT payout_deposit('u500', 1, 'deposit')");
my $hold = $primary->background_psql('app');
$hold->query_safe("BEGIN; SELECT FROM payoutq.account WHERE user_id = 'u500' FOR UPDATE");
my $job = create_job($primary, 'app', 'standby', 1000, args => 'batch_size => 100');
ok(wait_for($primary, 'app', q{
		SELECT count(*) FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND wait_event_type = 'Lock'}, 1),
	'half of the job is paid');
$primary->wait_for_catchup($standby);

my $status = "SELECT status, completed_count, pending_count FROM payout_job_status($job)";
my $before = $primary->safe_psql('app', $status);
like($before, qr/^running\|[1-9]\d\d\|/, 'on the primary');
is($standby->safe_psql('app', $status), $before, 'the standby shows the same');
books_ok($standby, 'app', 'standby');
is($standby->safe_psql('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'payoutq%'"),
	0, 'no worker on the standby');
is($standby->safe_psql('app', 'SELECT count(*) FROM payout_workers'),
	0, 'nor does a view show one');
is($standby->safe_psql('app', "SELECT payout_wait_for_job($job, '10 ms')"),
	'running', 'one can wait on the standby');
my ($code, $out, $error) = $standby->psql('app', 'CALL payout_process()');
like($error, qr/read-only|recovery/, 'and not work there');

# The primary is lost.
$primary->stop('immediate');
$standby->promote;
ok(wait_for_job($standby, 'app', $job), 'the promoted server pays the rest');
is($standby->safe_psql('app', "SELECT payout_withdraw('u500', 1, 'withdrawal')") > 0,
	1, 'it is a primary now');
paid_once_ok($standby, 'app', 1000, 'promoted');

my $next = create_job($standby, 'app', 'next', 10, prefix => 'next');
cmp_ok($next, '>', $job, 'ids go on');
ok(wait_for_job($standby, 'app', $next), 'new jobs are paid');

$standby->stop;
done_testing();
