# DROP DATABASE ends the workers and then waits for other sessions.  When it is
# cancelled there, or its session is ended, the workers come back.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(payoutq.interval = '1d'));
create_db_with_extension($node, 'app');
my $other = $node->background_psql('app');
my $n = 0;

foreach my $end ('pg_cancel_backend', 'pg_terminate_backend')
{
	my $worker = worker_pid($node, 'app');
	my $dropper = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $dropper->query_safe('SELECT pg_backend_pid()');

	$dropper->query_until(qr//, "DROP DATABASE app;\n");
	ok(wait_for($node, 'postgres', qq{
			SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $worker)
			   AND EXISTS (SELECT FROM pg_stat_activity
			               WHERE pid = $pid AND state = 'active')}),
		'the worker has left, and the command waits');
	$node->safe_psql('postgres', "SELECT $end($pid)");
	$dropper->{run}->finish if $end eq 'pg_terminate_backend';
	$dropper->quit if $end eq 'pg_cancel_backend';

	$n++;
	my $job = create_job($node, 'app', "job $n", 10, prefix => "p$n-");
	ok(wait_for_job($node, 'app', $job, 'completed', 20),
		"after $end the job is paid");
	paid_once_ok($node, 'app', 10, "after $end", prefix => "p$n-");
}

$other->quit;
$node->stop;
done_testing();
