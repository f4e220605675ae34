# The entries of a query are never all in memory: the worker that writes a
# million needs as much as for a tenth of it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the memory of a process is read from /proc' unless -r '/proc/self/status';

# What the worker touches of shared memory counts as well: let it be little.
my $node = start_node('main', conf => q(
payoutq.workers = 1
shared_buffers = 2MB
work_mem = 4MB
max_wal_size = 1GB
));
create_db_with_extension($node, 'app');

my $pid = worker_pid($node, 'app');
expand('before', 100_000);
my $before = peak($pid);
expand('much', 1_000_000);
my $after = peak($pid);
note("$before kB, then $after kB");
is(worker_pid($node, 'app'), $pid, 'the same worker has written both');
SKIP:
{
	skip 'AddressSanitizer keeps what was freed', 1 if slurp_file("/proc/$pid/maps") =~ /asan/;
	cmp_ok($after - $before, '<', 8 * 1024, 'kB more for ten times as many entries');
}

$node->stop;
done_testing();

# Its entries are written; they need not be paid.
sub expand
{
	my ($reference, $n) = @_;
	my $job = $node->safe_psql('app', qq{SELECT payout_create_job_from('$reference',
		\$\$SELECT 'user' || i AS user_id, i AS amount FROM generate_series(1, $n) i\$\$)});

	ok(wait_for($node, 'app', "SELECT total_winners FROM payout_job_status($job)", $n), "$n entries are written");
	$node->psql('app', "SELECT payout_cancel_job($job)");
	return;
}

# kB, at most so far
sub peak
{
	my ($process) = @_;

	slurp_file("/proc/$process/status") =~ /^VmHWM:\s+(\d+) kB$/m or die "process $process has gone";
	return $1;
}
