# Schedules where there is something in the way: long names, another database at
# the same time, a standby.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', preload => 'payoutq,pg_cron', streaming => 1, conf => q(
cron.use_background_workers = on
max_worker_processes = 32
));
my $long = 'd' x 60;
$node->safe_psql('postgres', 'CREATE EXTENSION pg_cron; CREATE EXTENSION payoutq');
create_db_with_extension($node, $_) foreach ('app', $long);
my ($code, $out, $error);

# A schedule without jobs leaks its shared memory segment.
($code, $out, $error) = $node->psql('app', 'SELECT count(*) FROM payout_schedules');
is("$out$error", '0', 'no schedule, no warning');

# A long name of a database: the second call removes what it has made.
$node->safe_psql('app', 'SELECT payout_schedule()');
foreach (1 .. 2)
{
	$node->safe_psql($long, 'SELECT payout_schedule()');
	is($node->safe_psql('postgres', "SELECT count(*) FROM cron.job WHERE database = '$long'"), 4, "call $_ leaves four");
}

# Two databases at once: both are told 4, one has none.
$node->safe_psql($_, 'SELECT payout_unschedule()') foreach ('app', $long);
my $session = $node->background_psql('postgres');
$session->query_safe('BEGIN; SELECT payout_schedule()');
my $other = $node->background_psql('app');
$other->query_until(qr//, "SELECT payout_schedule();\n");
wait_for($node, 'postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'payoutq errand' AND wait_event_type = 'Lock'}, 1);
$session->query_safe('COMMIT');
$other->query_safe('SELECT 1');
is($node->safe_psql('postgres', 'SELECT database, count(*) FROM cron.job GROUP BY 1 ORDER BY 1'), "app|4\npostgres|4", 'each has its set');
$_->quit foreach ($session, $other);

# On a standby.
$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
($code, $out, $error) = $standby->psql('app', q{SET statement_timeout = '5s'; SELECT count(*) >= 0 FROM payout_schedules});
is("$out$error", 't', 'schedules are shown on a standby');
($code, $out, $error) = $standby->psql('app', q{SET statement_timeout = '5s'; SELECT payout_schedule()});
like($error, qr/ERROR/, 'payout_schedule() is refused there');
unlike($error, qr/statement timeout/, 'at once');

$standby->stop;
$node->stop;
done_testing();
