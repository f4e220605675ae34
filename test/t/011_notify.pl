# Two jobs at once: both are paid, and whoever listens to payoutq_jobs hears of
# the beginning and the end of each, once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Test::More;

my $node = start_node('main');
create_db_with_extension($node, 'app');

my $listener = $node->background_psql('app');
$listener->query_safe('LISTEN payoutq_jobs');

# One transaction creates both; nothing is heard of a job that is rolled back.
$node->safe_psql('app', q{
	BEGIN;
	SELECT payout_create_job('first', array_agg('u' || i), array_agg(i::bigint))
	FROM generate_series(1, 100) i;
	SELECT payout_create_job('second', array_agg('u' || i), array_agg(i::bigint), batch_size => 7)
	FROM generate_series(1, 100) i;
	COMMIT;
	BEGIN;
	SELECT payout_create_job('never', ARRAY['u1'], ARRAY[1::bigint]);
	ROLLBACK;
	SELECT payout_create_job_from('broken', 'SELECT NULL::text AS user_id, 1 AS amount')});
my ($first, $second) = map {
	$node->safe_psql('app', "SELECT job_id FROM payout_job_status('$_')")
} ('first', 'second');

wait_for_job($node, 'app', $first);
wait_for_job($node, 'app', $second);
wait_for_job($node, 'app', "'broken'", 'failed');
paid_once_ok($node, 'app', 100, 'two jobs', times => 2);

# A cancelled job ends too.
my $third = create_job($node, 'app', 'cancelled', 5, args => "run_at => 'infinity'");
$node->safe_psql('app', "SELECT payout_cancel_job($third)");

# The queue keeps the order, so nothing comes after our own word.
$node->safe_psql('app', q{NOTIFY payoutq_jobs, '{"event": "end of test"}'});
my $heard = '';
my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
$heard .= $listener->query_safe('SELECT 1') while $heard !~ /end of test/ && time() < $end;

my %events;
while ($heard =~ /"payoutq_jobs" with payload "(\{.*?\})" received/g)
{
	my ($payload) = $1;
	my ($event, $job, $reference, $status) = $payload =~
	  /"event" : "(\w+)", "job_id" : (\d+), "reference" : "(\w+)", "status" : "(\w+)"/
	  or next;
	$events{$reference} .= "$event($status) ";
	is($job, $reference eq 'first' ? $first : $second, "the id of $reference")
	  if $reference =~ /first|second/;
}
is_deeply(
	\%events,
	{
		first => 'started(running) completed(completed) ',
		second => 'started(running) completed(completed) ',
		broken => 'started(running) failed(failed) ',
		cancelled => 'cancelled(cancelled) '
	},
	'each event is heard once') or diag($heard);

$listener->quit;

# The whole reference, however long: cut anywhere, it may be cut inside of a
# character, which the server does not know of in this encoding.
$node->safe_psql('postgres', q(CREATE DATABASE bytes ENCODING 'SQL_ASCII' TEMPLATE template0));
$node->safe_psql('bytes', 'CREATE EXTENSION payoutq');
{
	local $ENV{PGCLIENTENCODING} = 'UTF8';
	$listener = $node->background_psql('bytes');
}
$listener->query_safe('LISTEN payoutq_jobs');
$node->safe_psql('bytes', q{
	SELECT payout_cancel_job(payout_create_job('x' || repeat(E'\303\251', 499), ARRAY['u1'], ARRAY[1::bigint], run_at => 'infinity'));
	SELECT payout_cancel_job(payout_create_job(repeat(E'\001', 1000), ARRAY['u1'], ARRAY[1::bigint], run_at => 'infinity'));
	NOTIFY payoutq_jobs, 'end of test'});
$heard = '';
$end = time() + $PostgreSQL::Test::Utils::timeout_default;
$heard .= $listener->query_safe('SELECT 1') while $heard !~ /end of test/ && time() < $end;
like($heard, qr/"x(\303\251){499}"/, 'a long reference');
like($heard, qr/"(\\u0001){1000}"/, 'even one that is longer when it is written as JSON');

$listener->quit;
$node->stop;
done_testing();
