# When the postmaster is killed, a worker in the middle of a job leaves, so that
# the server can be started again; nothing is paid behind its back.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $node = start_node('main');
create_db_with_extension($node, 'app');
slow_down($node, 'app');
my $entries = 20_000;
my $job = create_job($node, 'app', 'orphan', $entries, args => 'batch_size => 2');
wait_for($node, 'app', "SELECT completed_count > 100 FROM payout_job_status($job)");
my @workers = split /\n/,
  $node->safe_psql('app', 'SELECT pid FROM payout_workers');
cmp_ok(scalar(@workers), '>', 0, 'there are workers');

$node->kill9;
my $start = time();
my $limit = 5;
usleep(10_000) while grep { is_running($_) } @workers and time() < $start + $limit;
my $took = time() - $start;
note("the workers left after $took s");
cmp_ok($took, '<', $limit, 'the workers leave');
kill('KILL', grep { is_running($_) } @workers);

usleep(10_000) while kill(0, @workers) and time() < $start + 60;
$node->start;
is($node->safe_psql('app',
		"SELECT completed_count < $entries FROM payout_job_status($job)"),
	't', 'most was left to do');
books_ok($node, 'app', 'after the restart');

$node->stop;
done_testing();
