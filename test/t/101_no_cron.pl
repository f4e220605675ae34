# Where schedules cannot be made, payout_schedule() says what to do, nothing is
# shown, and workers go on as if nothing had been asked for.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => 'payoutq.interval = 1s');
my ($code, $out, $error);
my @calls = ('payout_schedule()', 'payout_unschedule()');

# Without pg_cron
create_db_with_extension($node, 'app');
foreach my $call (@calls)
{
	$error = error_of('app', $call);
	like($error, qr/^ERROR:  0A000: pg_cron is not loaded$/m, "$call without pg_cron");
	like($error, qr/^HINT: .*postgresql-\d+-cron.*shared_preload_libraries.*restart.*CREATE EXTENSION pg_cron/m, 'the hint names the package');
}
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules'), 0, 'no schedule is shown');
ok(wait_for_job($node, 'app', create_job($node, 'app', 'without', 10)), 'a worker pays all the same');
paid_once_ok($node, 'app', 10, 'without pg_cron');

# Also what nobody has told it of
$node->safe_psql('app', 'ALTER TABLE payoutq.job DISABLE TRIGGER wake_workers');
ok(wait_for_job($node, 'app', create_job($node, 'app', 'untold', 10, prefix => 'untold')), 'its interval finds a job');
$node->safe_psql('app', 'ALTER TABLE payoutq.job ENABLE TRIGGER wake_workers');

# Loaded, without the extension, or without its database
$node->append_conf('postgresql.conf', q(
shared_preload_libraries = 'payoutq,pg_cron'
cron.use_background_workers = on
cron.database_name = 'missing'
));
$node->restart;
foreach my $call (@calls)
{
	$error = error_of('app', $call);
	like($error, qr/^ERROR:  0A000: database "missing" does not exist$/m, "$call without the database");
	like($error, qr/^HINT:  Create it/m, 'it says what to do');
}
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules'), 0, 'no schedule is shown');

$node->safe_psql('postgres', 'CREATE DATABASE missing');
foreach my $call (@calls)
{
	$error = error_of('app', $call);
	like($error, qr/^ERROR:  0A000: extension "pg_cron" does not exist in database "missing"$/m, "$call without the extension");
	like($error, qr/^HINT:  Run CREATE EXTENSION pg_cron in database "missing"/m, 'the hint says what to run');
}
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules'), 0, 'no schedule is shown');

# Nothing is called that somebody else has put where pg_cron's objects would be.
$node->safe_psql('missing', q{
	CREATE SCHEMA cron;
	CREATE TABLE public.called ();
	CREATE FUNCTION cron.trap() RETURNS text LANGUAGE sql AS 'INSERT INTO public.called DEFAULT VALUES; SELECT ''app''';
	CREATE TABLE cron.job_run_details (jobid bigint, runid bigint, start_time timestamptz, end_time timestamptz, status text, return_message text);
	CREATE VIEW cron.job AS SELECT 1 AS jobid, 'payoutq process' AS jobname, '' AS schedule, '' AS command, 'u' AS username, true AS active, cron.trap() AS database});
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules'), 0, 'what looks like pg_cron is not shown');
like(error_of('app', $_), qr/^ERROR:  0A000: extension "pg_cron" does not exist/m, "$_ with what looks like pg_cron") foreach (@calls);
is($node->safe_psql('missing', 'SELECT count(*) FROM public.called'), 0, 'nor was any of it called');
$node->safe_psql('missing', 'DROP SCHEMA cron CASCADE');

$node->safe_psql('missing', 'CREATE EXTENSION payoutq');
$error = error_of('missing', 'payout_schedule()');
like($error, qr/^ERROR:  0A000: extension "pg_cron" does not exist in database "missing"$/m, 'nor in the database of pg_cron itself');
is($node->safe_psql('missing', 'SELECT count(*) FROM payout_schedules'), 0, 'where no schedule is shown either');

$node->safe_psql('missing', 'CREATE EXTENSION pg_cron');
is($node->safe_psql($_, 'SELECT payout_schedule()'), 4, "$_: as it was told") foreach ('app', 'missing');

# No process is free: there is room for three launchers, and a worker in each of
# the two databases.
$node->append_conf('postgresql.conf', 'max_worker_processes = 5');
$node->restart;
ok(wait_for($node, $_, 'SELECT count(*) FROM payout_workers', 1), "$_ has a worker") foreach ('app', 'missing');
$error = error_of('app', 'payout_unschedule()');
like($error, qr/^ERROR:  53400: could not start a process to work in another database$/m, 'no process is free');
like($error, qr/^HINT: .*max_worker_processes/m, 'the hint names the setting');
is($node->safe_psql('missing', 'SELECT payout_unschedule()'), 4, 'the database of pg_cron needs none');
$node->safe_psql('missing', 'SELECT payout_stop_workers()');
ok(wait_for($node, 'app', 'SELECT payout_unschedule()', 4), 'once one is free, it works');
ok(wait_for_job($node, 'app', create_job($node, 'app', 'after', 10, prefix => 'after')), 'workers still pay');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

sub error_of
{
	my ($db, $call) = @_;
	my ($code, $out, $error) = $node->psql($db, "\\set VERBOSITY verbose\nSELECT $call");
	isnt($code, 0, "$call fails");
	return $error =~ s/psql:<stdin>:\d+: //r;
}
