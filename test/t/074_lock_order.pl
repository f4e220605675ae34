# Two workers with the same users do not deadlock each other, also when one of
# the accounts is made while the first of them is in the middle of its batch.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.workers = 0
payoutq.lock_timeout = 1min
payoutq.retry_base = 50ms
deadlock_timeout = 100ms
));
create_db_with_extension($node, 'app');

# u2 has an account, u1 has none.  Whoever changes the account of u2 waits for
# our lock before his statement ends.
$node->safe_psql('app', q{
	SELECT payout_deposit('u2', 1, 'deposit u2');
	CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.user_id = 'u2' THEN
			PERFORM pg_catalog.pg_advisory_xact_lock_shared(1);
		END IF;
		RETURN NULL;
	END $$;
	CREATE TRIGGER wait_here AFTER UPDATE ON payoutq.account
		FOR EACH ROW EXECUTE FUNCTION wait_here()});
my @jobs = map { create_job($node, 'app', "job $_", 2) } (1, 2);
my $hold = $node->background_psql('app');
$hold->query_safe('SELECT pg_advisory_lock(1)');

my @payers;
foreach my $n (0, 1)
{
	my $payer = $node->background_psql('app', on_error_stop => 0);
	my $pid = $payer->query_safe('SELECT pg_backend_pid()');
	$payer->query_until(qr//, "CALL payout_process(job_id => $jobs[$n]);\n");
	ok(wait_for($node, 'app', qq{
			SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $pid}),
		"the payer of job $jobs[$n] waits");
	push @payers, $payer;

	# Between the two, somebody makes the account of u1.
	if ($n == 0)
	{
		my ($code, $out, $error) = $node->psql('app', q{
			SET lock_timeout = '100ms';
			SELECT payout_deposit('u1', 1, 'deposit u1')});
		note("deposit: $error");
	}
}
$hold->query_safe('SELECT pg_advisory_unlock(1)');
$_->query('SELECT 1') foreach @payers;
$_->quit foreach ($hold, @payers);

ok(wait_for($node, 'app', q{
		CALL payout_process();
		SELECT bool_and(status = 'completed') FROM payout_jobs}),
	'both jobs are completed');
is($node->safe_psql('app', q{
		SELECT job_id, attempts, error FROM payoutq.batch ORDER BY job_id}),
	"1|1|\n2|1|", 'each at the first attempt');
is($node->safe_psql('app', q{
		SELECT sum(balance) - (SELECT sum(amount) FROM payoutq.movement WHERE kind = 'deposit')
		FROM payout_accounts}),
	6, 'both are paid by both');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();
