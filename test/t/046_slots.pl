# When the server has no room for another background worker, the log says so
# once, with the name of the setting, and all jobs are paid all the same.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

# Room for the launcher of logical replication, ours, and two workers.
my $node = start_node('main', conf => q(
max_worker_processes = 4
payoutq.workers = 8
payoutq.interval = 1s
));
create_db_with_extension($node, 'app');
slow_down($node, 'app');
my $entries = 6000;
my $job = create_job($node, 'app', 'job', $entries, args => 'batch_size => 10');
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 2),
	'as many as there is room for');
speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'they pay the job');
paid_once_ok($node, 'app', $entries, 'one database');

my @warnings = grep { /WARNING/ } split /^/, slurp_file($node->logfile);
is(scalar(@warnings), 1, 'one warning') or diag(@warnings);
like("@warnings", qr/payoutq launcher WARNING:  out of background worker/, 'it tells');
like(slurp_file($node->logfile), qr/HINT: .*max_worker_processes/, 'what to do');

# More databases than there is room for workers: each has its turn.
my @dbs = map { "db$_" } (1 .. 4);
foreach my $db (@dbs)
{
	create_db_with_extension($node, $db);
	create_job($node, $db, 'job', 100);
}
foreach my $db (@dbs)
{
	ok(wait_for_job($node, $db, 1, 'completed', 30), "the job in $db is paid");
	paid_once_ok($node, $db, 100, $db);
}

$node->stop;
done_testing();
