# Chaos: the provider answers a fifth of the calls with faults of every kind, and
# the server is killed again and again. In the end everybody has been paid once,
# in the provider's own books, and they are the ledger's.
#
# PAYOUTQ_TEST_SEED and PAYOUTQ_TEST_TRANSFERS make it another run or a longer one.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $transfers = $ENV{PAYOUTQ_TEST_TRANSFERS} // 10_000;
my @how = ('dispatcher', 'postmaster', 'dispatcher', 'all', 'postmaster', 'dispatcher');

my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
diag("PAYOUTQ_TEST_SEED=$seed PAYOUTQ_TEST_TRANSFERS=$transfers");
srand($seed);

# Everything is quick, so that it happens often.
my $node = start_node('main', conf => q(
log_checkpoints = off
payoutq.interval = 1s
payoutq.retry_base = 50ms
payoutq.retry_cap = 1s
payoutq.max_attempts = 20
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
payoutq.confirm_batch = 50
));
create_db_with_extension($node, 'app');
my $provider = start_provider(seed => $seed, faults => 0.2, latency => 2);
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1',
	rate_limit => 5000, timeout => '1s', quiet_period => '2s');

# A tenth share accounts, ten to one; some accounts are closed, and some people have none.
my $no_account = 'i % 200 = 0';
my $closed = 'i % 100 = 1';
$node->safe_psql('app', qq{
	SELECT count(payout_set_destination('u' || i, 'stripe',
	       CASE WHEN $closed THEN 'acct_closed_' || i
	            WHEN i % 10 = 2 THEN 'acct_shared_' || i % (greatest($transfers / 100, 1) * 10)
	            ELSE 'acct_' || i END))
	FROM generate_series(1, $transfers) i WHERE NOT $no_account});
my ($failing, $payable) = split /\|/, $node->safe_psql('app', qq{
	SELECT count(*) FILTER (WHERE $no_account OR $closed), count(*) FILTER (WHERE NOT ($no_account OR $closed))
	FROM generate_series(1, $transfers) i});

my $start = time();
my $job = $node->safe_psql('app', qq{
	SELECT payout_create_job('chaos', array_agg('u' || i), array_agg(i % 997 + 1), provider => 'stripe', currency => 'EUR')
	FROM generate_series(1, $transfers) i});
my $done = "SELECT completed_count + failed_count FROM payout_job_status($job)";

# Somewhere within the next part of what is left
my $left = $transfers;
foreach my $n (0 .. $#how)
{
	my $at = $transfers - $left + int(rand($left / (@how - $n + 2)));
	wait_for($node, 'app', "SELECT ($done) >= $at") or last;
	my $before = crash($node, 'app', $how[$n], $done);
	my $after = $node->safe_psql('app', $done);
	cmp_ok($after, '>=', $before, "kill $n ($how[$n]) at $before: nothing is lost");
	books_ok($node, 'app', "kill $n ($how[$n])");
	$left = $transfers - $after;
}
cmp_ok($left, '>', 0, 'the last kill was before the end');
note(sprintf('%.1f s until the last kill', time() - $start));

# A call that was under way during a crash is made again a minute later.
ok(wait_for($node, 'app', "SELECT status FROM payout_job_status($job)", 'completed',
		$PostgreSQL::Test::Utils::timeout_default + $transfers / 100),
	'the job is completed after all')
  or diag($node->safe_psql('app', q{
		SELECT transfer_id, t.status, generation, t.attempts, run_after, t.error, clock_timestamp(), a.attempt, a.started_at, a.finished_at,
		       a.outcome, a.http_status, a.error
		FROM payout_transfers t LEFT JOIN payout_attempts a USING (transfer_id)
		WHERE t.status NOT IN ('completed', 'failed_terminal') ORDER BY 1, a.attempt LIMIT 100}));
note(sprintf('%.1f s in all', time() - $start));
is($node->safe_psql('app', "SELECT completed_count, failed_count, progress FROM payout_job_status($job)"),
	"$payable|$failing|1.0000", 'all are paid who have an account');
is($node->safe_psql('app', q{
		SELECT count(*) FROM payout_transfers
		WHERE status NOT IN ('completed', 'failed_terminal') OR (status = 'failed_terminal') <> (error ~ 'account_(not_connected|closed)')}),
	0, 'nothing is stuck, and nothing has failed for another reason');

# The provider's books
my $books = ask($provider, 'GET', '/books');
my %paid;
$paid{ $_->{metadata}{payoutq_transfer} }++ foreach @$books;
is_deeply([ grep { $paid{$_} > 1 } sort keys %paid ], [], 'nobody is paid twice');
is(scalar(keys %paid), $payable, 'everybody is paid');
$node->safe_psql('app', 'CREATE TABLE books (b jsonb); INSERT INTO books VALUES ($books$' . encode_json($books) . '$books$)');
is($node->safe_psql('app', q{
		SELECT count(*), coalesce(min(t.transfer_id), min(b.transfer_id))
		FROM (SELECT * FROM payout_transfers WHERE status = 'completed') t
		FULL JOIN (SELECT (e #>> '{metadata,payoutq_transfer}')::bigint AS transfer_id, e ->> 'id' AS id, (e ->> 'amount')::bigint AS amount,
		                  upper(e ->> 'currency') AS currency, e ->> 'destination' AS destination, e ->> 'key' AS key
		           FROM books, jsonb_array_elements(b) e) b USING (transfer_id)
		WHERE (t.provider_reference, t.amount, t.currency, t.destination, t.idempotency_key)
		      IS DISTINCT FROM (b.id, b.amount, b.currency, b.destination, b.key)}),
	'0|', 'they are the same as ours, row by row');

# Our own
is($node->safe_psql('app', qq{
		SELECT payout_balance('\@transit:stripe', 'EUR'),
		       (SELECT sum(amount) FROM payout_ledger WHERE account = '\@outside' AND kind = 'transfer')
		         = (SELECT sum((e ->> 'amount')::bigint) FROM books, jsonb_array_elements(b) e),
		       (SELECT sum(balance) FROM payout_accounts) = (SELECT sum(i % 997 + 1) FROM generate_series(1, $transfers) i WHERE $no_account OR $closed),
		       (SELECT count(*) FROM payout_accounts WHERE balance <> 0)}),
	"0|t|t|$failing", 'nothing is under way, what left is what came, and the rest is with those who cannot have it');
is($node->safe_psql('app', q{SELECT count(*), count(DISTINCT reference) FROM payout_ledger WHERE reference LIKE 'ledger:payout:%' AND account LIKE '@transit:%'}),
	join('|', ($payable + $failing - $transfers / 200) x 2), 'each outcome has its row in the ledger');
books_ok($node, 'app', 'at the end');

# It was a test of something.
my $injected = ask($provider, 'GET', '/faults');
note(join ', ', map { "$_ $injected->{$_}" } sort keys %$injected);
is(scalar(keys %$injected), 15, 'faults of all kinds were injected') if $transfers >= 10_000;
note($node->safe_psql('app', q{SELECT generation, count(*), max(attempts) FROM payout_transfers GROUP BY 1 ORDER BY 1}));
cmp_ok($node->safe_psql('app', q{SELECT count(*) FROM payout_transfers WHERE status = 'completed' AND generation > 1}), '>', 0,
	'what the provider did not do was sent under a new key');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP:/, 'nothing worse in the log');
unlike(slurp_file($node->logfile), qr/sk_test_1/, 'the key is not in the log');

$node->stop;
done_testing();
