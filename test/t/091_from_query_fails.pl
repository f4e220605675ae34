# A query that cannot be expanded fails its job with the reason, pays nobody, and
# can be retried; what can be seen at creation is refused there.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main');
create_db_with_extension($node, 'app');
$node->safe_psql('app', 'CREATE TABLE winners (user_id text, amount bigint)');

# What is in the table, what the job says, and what the table holds when mended
my @cases = (
	[ 'no row', '', 'a job needs at least one winner' ],
	[ 'duplicate', q(('a', 1), ('b', 2), ('a', 3)), 'user "a" is in the job twice' ],
	[ 'null user', q((NULL, 1)), '"user_id" must not be null' ],
	[ 'null amount', q(('a', NULL)), '"amount" must not be null' ],
	[ 'zero', q(('a', 0)), 'not positive' ],
	[ 'system account', q(('@platform', 1)), 'begins with "@"' ],
	[ 'too much', q(('a', 9223372036854775807), ('b', 1)), 'out of range' ],
	[ 'above the pool', q(('a', 1001)), 'above the pool' ]);
my $total = 0;
foreach my $case (@cases)
{
	my ($what, $rows, $message) = @$case;
	set_winners($rows);
	my $pool = $what eq 'above the pool' ? ', total_pool => 1000' : '';
	my $job = $node->safe_psql('app',
		"SELECT payout_create_job_from('$what', 'SELECT user_id, amount FROM winners'$pool)");
	ok(wait_for_job($node, 'app', $job, 'failed'), "$what: the job fails");
	like($node->safe_psql('app', "SELECT error FROM payout_job_status($job)"),
		qr/\Q$message\E/, "$what: with the reason");

	$total += 3;
	set_winners(q(('a', 1), ('b', 2)));
	$node->safe_psql('app', "SELECT payout_retry_job($job)");
	ok(wait_for_job($node, 'app', $job), "$what: retried, it is completed");
	is($node->safe_psql('app', 'SELECT sum(balance) FROM payout_accounts'), $total, "$what: and paid once");
}
books_ok($node, 'app', 'after all errors');

# An error at run time, and one that is found at once
set_winners(q(('a', 1)));
my $job = $node->safe_psql('app', q{
	SELECT payout_create_job_from('division', 'SELECT user_id, amount / (amount - 1) AS amount FROM winners')});
ok(wait_for_job($node, 'app', $job, 'failed'), 'an error of the query fails the job');
is($node->safe_psql('app', "SELECT error FROM payout_job_status($job)"), 'division by zero', 'with its message');
foreach my $query ('SELECT user_id FROM winners', 'SELECT user_id, amount::numeric FROM winners',
	'SELECT user_id, amount FROM nowhere', 'DELETE FROM winners RETURNING user_id, amount',
	'SELECT user_id, amount FROM winners; SELECT 1', '')
{
	my ($code, $out, $error) = $node->psql('app', "SELECT payout_create_job_from('wrong', '$query')");
	isnt($code, 0, "refused at creation: $query");
}
my ($code, $out, $error) = $node->psql('app', q{
	CREATE TEMP TABLE winners (user_id text, amount bigint);
	SELECT payout_create_job_from('temporary', 'SELECT user_id, amount FROM winners')});
isnt($code, 0, 'refused at creation: a temporary table, which hides another');

# A long message is not cut within a character.
$node->append_conf('postgresql.conf', 'payoutq.workers = 1');
$node->reload;
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 1), 'one worker');
$node->safe_psql('app', q{
	CREATE FUNCTION long_message() RETURNS bigint LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION '%', repeat(U&'\00E9', 300); END $$});
$job = $node->safe_psql('app', q{
	SELECT payout_create_job_from('long message', $$SELECT 'a' AS user_id, long_message() AS amount$$)});
ok(wait_for_job($node, 'app', $job, 'failed'), 'an error with a long message fails the job');
is($node->safe_psql('app', 'SELECT octet_length(last_error) FROM payout_workers'),
	2 * 99, 'payout_workers shows the beginning, in whole characters');

$node->stop;
done_testing();

sub set_winners
{
	my ($rows) = @_;
	$node->safe_psql('app', 'TRUNCATE winners; ' . ($rows ? "INSERT INTO winners VALUES $rows" : ''));
	return;
}
