# pg_upgrade in the middle of a job: no worker runs during it, and in the new
# server the job goes on by itself.

use strict;
use warnings;

use Cwd;
use File::Spec;
use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Upgrading to the same version is what can be done everywhere.
my $old = start_node('old', conf => 'payoutq.interval = 1s');
create_db_with_extension($old, 'app');
wait_for_job($old, 'app', create_job($old, 'app', 'completed', 100, prefix => 'first'));
slow_down($old, 'app');
my $job = create_job($old, 'app', 'half', 5000, args => 'batch_size => 10, platform_fee => 9');
ok(wait_for($old, 'app', "SELECT completed_count > 500 FROM payout_job_status($job)"), 'in the middle of a job');
$old->stop;

my $new = PostgreSQL::Test::Cluster->new('new');
$new->init;
$new->append_conf('postgresql.conf', q(
shared_preload_libraries = 'payoutq'
payoutq.interval = 1s
log_line_prefix = '%m [%p] %b %q%a '
));
my $bin = $old->config_data('--bindir');
chomp($bin);
my $tmp = PostgreSQL::Test::Utils::tempdir();
{
	# pg_upgrade writes into the folder where it is run.
	my $here = Cwd::getcwd();
	my @data = map { File::Spec->rel2abs($_->data_dir) } ($old, $new);
	chdir($tmp);
	command_ok(
		[ 'pg_upgrade', '--no-sync', '--retain', '-d', $data[0], '-D', $data[1], '-b', $bin, '-B', $bin,
			'-s', $new->host, '-p', $old->port, '-P', $new->port ],
		'pg_upgrade');
	chdir($here);
}
my ($log) = glob($new->data_dir . '/pg_upgrade_output.d/*/log/pg_upgrade_server.log');
unlike(slurp_file($log), qr/\] payoutq (worker|launcher)/, 'no worker has run');

$new->start;
my $status = "SELECT completed_count > 500 AND completed_count < 5000 FROM payout_job_status($job)";
is($new->safe_psql('app', $status), 't', 'the job is where it was');
books_ok($new, 'app', 'upgraded');
ok(wait_for_job($new, 'app', $job), 'it goes on by itself');
paid_once_ok($new, 'app', 5000, 'at the end');
my $next = create_job($new, 'app', 'next', 10, prefix => 'next');
cmp_ok($next, '>', $job, 'ids go on');
ok(wait_for_job($new, 'app', $next), 'new jobs are paid');

$new->stop;
done_testing();
