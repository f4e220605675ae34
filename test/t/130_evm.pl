# The signer of examples/evm, on a chain that keeps its own books: it is killed
# at every point where something is half done, loses answers, transactions and
# the server, and the chain forgets a block; everybody is paid once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Math::BigInt;
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use POSIX ();
use Test::More;
use Time::HiRes qw(time usleep);

my $example = "$FindBin::RealBin/../../examples/evm";
plan skip_all => 'the npm packages of examples/evm are not installed (npm ci --ignore-scripts does it)'
  unless -d "$example/node_modules/hardhat" && -d "$example/node_modules/ethers" && -d "$example/node_modules/pg";

my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");
srand($seed);

my $n = 200;
my $gwei = 1_000_000_000;
my ($signers, %running);
my $chain = start_provider(program => 'provider/chain.js');
my $node = start_node('main', conf => q(
payoutq.interval = 1s
payoutq.retry_base = 1ms
payoutq.retry_cap = 50ms
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', q{
	CREATE ROLE signer LOGIN;
	GRANT CREATE ON SCHEMA public TO signer;
	SELECT payout_grant('signer', 'operator');
	CREATE SERVER evm FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external', key_life '3650 days')});
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('app') . ' user=signer', '-f', "$example/schema.sql" ],
	'the tables of the signer');

# The last but one is a contract that refuses the money, the last is no address.
sub address { return '0x' . 'ab' x 17 . sprintf '%06d', $_[0] }
$node->safe_psql('app', "SELECT payout_set_destination('u' || i, 'evm', '0x' || repeat('ab', 17) || to_char(i, 'FM000000'))
	FROM generate_series(1, $n - 1) i");
$node->safe_psql('app', "SELECT payout_set_destination('u$n', 'evm', 'ann''s wallet')");
rpc('hardhat_setCode', address($n - 1), '0x60006000fd');

# ---------------------------------------------------------------------------
# Half done
# ---------------------------------------------------------------------------

my $job = create_job($node, 'app', 'first', $n, args => q{provider => 'evm', currency => 'ETH'});
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_transfers', $n), 'a worker makes the transfers');
$node->safe_psql('app', 'CREATE TABLE seen AS SELECT idempotency_key, nonce, hash, raw FROM evm_transaction');

# Some are sent, the others of the batch never get to the chain.
rules({ method => 'eth_sendRawTransaction', fault => 'unreached', after => 10, times => 40 });
my $signer = start_signer();
ok(held(40), 'most of a batch are stored, and not sent');
ok(wait_for($node, 'app', 'SELECT count(*), count(sent_at) FROM evm_transaction', '50|10'), 'they are');
kill_signer($signer);

# All of a batch get to the chain, and the signer does not learn it.
rules({ method => 'eth_sendRawTransaction', fault => 'silent', times => 50 });
$signer = start_signer();
ok(held(50), 'a batch is sent, without an answer');
kill_signer($signer);

# Claimed, and not stored.
my $session = $node->background_psql('app');
$session->query_safe('BEGIN; SELECT FROM evm_sender FOR UPDATE');
rules();
my $stored = $node->safe_psql('app', 'SELECT count(*) FROM evm_transaction');
$signer = start_signer();
ok(wait_for($node, 'app', q{SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = 'signer' AND wait_event_type = 'Lock'}), 'a batch is claimed');
kill_signer($signer);
$session->quit;
is($node->safe_psql('app', 'SELECT count(*) FROM evm_transaction'), $stored, 'and not stored');

# Answers are lost, and calls; the signer finds out by itself.
rules(
	{ method => 'eth_sendRawTransaction', fault => 'lost', times => 20 },
	{ method => 'eth_sendRawTransaction', fault => 'refused', times => 20 });
$signer = start_signer();
ok(wait_for($node, 'app', q{SELECT count(*) FILTER (WHERE status = 'sent'), count(*) FILTER (WHERE status = 'failed_terminal') FROM payout_transfers},
		($n - 1) . '|1'), 'all are sent, but one that is no address');
ok($node->safe_psql('app', q{SELECT count(*) > 0 FROM payout_attempts WHERE outcome = 'unknown' AND error ~ 'fetch failed'}), 'some after a call that failed');

# ---------------------------------------------------------------------------
# Final
# ---------------------------------------------------------------------------

# The block is made, and forgotten; some transactions, too.
my $snapshot = rpc('evm_snapshot');
rpc('evm_mine');
is(scalar @{ books() }, $n - 1, 'all are in a block');
rules({ method => 'eth_blockNumber', fault => 'empty', times => 5 });
ok(asked('eth_getTransactionReceipt', 2 * $n), 'the signer looks at it');
is($node->safe_psql('app', q{SELECT count(*) FROM payout_transfers WHERE status = 'completed'}), 0, 'one block is not enough');
rpc('evm_revert', $snapshot);
is(scalar @{ books() }, 0, 'the block is gone');
my @hashes = split /\n/, $node->safe_psql('app', 'SELECT hash FROM evm_transaction ORDER BY nonce LIMIT 20');
rpc('hardhat_dropTransaction', $_) foreach @hashes;
ok(wait_until(sub { 20 == grep { defined rpc('eth_getTransactionByHash', $_) } @hashes }), 'what was dropped is sent again');

# Killed while it reads receipts, and at other times, while blocks are made.
rules({ method => 'eth_getTransactionReceipt', fault => 'silent', after => 20, times => 30 });
rpc('hardhat_mine', '0x3');
ok(held(30), 'receipts are read');
kill_signer($signer);
for my $i (1 .. 2)
{
	my $goal = $node->safe_psql('app', q{SELECT count(*) FROM payout_transfers WHERE status = 'completed'}) + 1 + int(rand(40));
	$signer = start_signer();
	ok(mine_until("SELECT count(*) >= $goal FROM payout_transfers WHERE status = 'completed'"), "more are completed ($i)");
	kill_signer($signer);
}

# Two of them.
$signer = start_signer();
my $second = start_signer();
ok(mine_until("SELECT status = 'completed' FROM payout_job_status($job)"), 'the job is completed');
is($node->safe_psql('app', q{SELECT status, string_agg(user_id || ' ' || payout_balance(user_id, 'ETH'), ' ') FROM payout_transfers
		WHERE status <> 'completed' GROUP BY 1 ORDER BY 1}),
	"confirmation_failed|u199 199\nfailed_terminal|u200 200", 'who was not paid outside has the money');
agree_ok('first', $n - 1);

# Both give another address.
$node->safe_psql('app', 'SELECT payout_set_destination(u, $$evm$$, a) FROM (VALUES ($$u199$$, $$' . address(1199) . '$$), ($$u200$$, $$'
	  . address(1200) . "\$\$)) v(u, a); SELECT payout_retry_job($job)");
ok(mine_until(q{SELECT count(*) = 200 FROM payout_transfers WHERE status = 'completed'}), 'retried: everybody is paid');
agree_ok('retried', $n + 1);

# Many small jobs, while two signers send, one of them is killed again and again,
# and the server crashes under them.
for my $i (1 .. 3)
{
	$node->safe_psql('app', "SELECT payout_create_job('small:$i:' || j, ARRAY['u' || j], ARRAY[1000], provider => 'evm', currency => 'ETH')
		FROM generate_series(1, 40) j");
	my $goal = ($i - 1) * 40 + int(rand(30));
	mine_until("SELECT count(*) > $goal FROM payout_transfers WHERE transfer_id > $n AND status IN ('sent', 'completed')");
	kill_signer($second);
	$second = start_signer();
	ok(wait_for($node, 'app', q{SELECT count(DISTINCT application_name) FROM pg_stat_activity WHERE usename = 'signer'}, 2), "two signers ($i)");
	next if $i % 2;
	$node->stop('immediate');
	$node->start;
}
ok(mine_until("SELECT count(*) = $n + 120 FROM payout_transfers WHERE status = 'completed'"), 'small jobs: everybody is paid');
agree_ok('small jobs', $n + 121);

# ---------------------------------------------------------------------------
# A copy that does not know what was sent
# ---------------------------------------------------------------------------

kill_signer($second);
rpc('eth_sendTransaction', { from => $node->safe_psql('app', 'SELECT address FROM evm_sender'), to => address(5000), value => '0x1' });
rpc('evm_mine');
create_job($node, 'app', 'last', 1, args => q{provider => 'evm', currency => 'ETH'});
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_transfers', $n + 121), 'another transfer');
rules();
ok(asked('eth_getTransactionCount', 3), 'the signer looks at the account');
like(slurp_file($signer->{log}), qr/has sent 322 transactions, of which evm_sender knows 321: nothing is sent/, 'a nonce that was used elsewhere is seen');
is($node->safe_psql('app', q{SELECT status, attempts FROM payout_transfers ORDER BY transfer_id DESC LIMIT 1}), 'pending|0', 'then nothing is sent');
kill_signer($signer);
done_testing();

# ---------------------------------------------------------------------------

# The chain's books and ours.
sub agree_ok
{
	my ($name, $count) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $books = books();
	my (%paid, %hash, @wrong);

	is_deeply([ sort { $a <=> $b } map { $_->{nonce} } @$books ], [ 0 .. $count - 1 ], "$name: $count transactions, one of each nonce");
	foreach my $t (grep { $_->{status} } @$books)
	{
		$paid{ $t->{to} } += $t->{value} / $gwei;
		$hash{ $t->{hash} } = join '|', $t->{to}, $t->{value} / $gwei;
	}
	foreach my $line (split /\n/, $node->safe_psql('app', q{
		SELECT provider_reference, destination, amount FROM payout_transfers WHERE status = 'completed'}))
	{
		my ($reference, $payment) = split /\|/, $line, 2;
		push @wrong, $line unless ($hash{$reference} // '') eq $payment;
		delete $hash{$reference};
	}
	push @wrong, map { "paid: $_ $hash{$_}" } keys %hash;
	is_deeply(\@wrong, [], "$name: each completed transfer has its transaction, and there is no other");
	@wrong = ();
	foreach my $line (split /\n/, $node->safe_psql('app', q{
		SELECT destination, sum(amount) FILTER (WHERE status = 'completed') FROM payout_transfers WHERE destination ~ '^0x' GROUP BY 1}))
	{
		my ($to, $amount) = split /\|/, $line;
		my $balance = Math::BigInt->from_hex(rpc('eth_getBalance', $to, 'latest'));
		push @wrong, "$line: $balance" unless $balance == ($amount || 0) * $gwei;
	}
	is_deeply(\@wrong, [], "$name: the balances on the chain are what was paid");
	is($node->safe_psql('app', q{
			SELECT count(*) FROM seen s LEFT JOIN evm_transaction e USING (idempotency_key, nonce, hash, raw) WHERE e.hash IS NULL}),
		0, "$name: what was stored was never changed");
	books_ok($node, 'app', $name);
	return;
}

sub rpc
{
	my ($method, @params) = @_;
	my $answer = ask($chain, 'POST', '/', { jsonrpc => '2.0', id => 1, method => $method, params => \@params });

	die "$method: $answer->{error}{message}" if $answer->{error};
	return $answer->{result};
}

sub rules { return ask($chain, 'POST', '/rules', [@_]) }
sub books { return ask($chain, 'GET', '/books') }

# So many calls wait for an answer
sub held
{
	my ($count) = @_;
	return wait_until(sub { ask($chain, 'GET', '/calls')->{held} == $count });
}

# So many calls of the method came since the last rules
sub asked
{
	my ($method, $count) = @_;
	return wait_until(sub { (ask($chain, 'GET', '/calls')->{$method} // 0) >= $count });
}

sub wait_until
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	until ($condition->())
	{
		return 0 if time() > $end;
		usleep(30_000);
	}
	return 1;
}

sub mine_until
{
	my ($query) = @_;

	return wait_until(sub {
		rpc('evm_mine');
		my ($status, $out) = $node->psql('app', $query);
		return $status == 0 && $out eq 't';
	}) || wait_for($node, 'app', $query, 't', 0);
}

sub start_signer
{
	my $log = sprintf '%s/signer.%d.log', $PostgreSQL::Test::Utils::log_path, ++$signers;
	my $pid = fork() // die "fork: $!";

	if ($pid == 0)
	{
		%ENV = (%ENV,
			PGHOST => $node->host, PGPORT => $node->port, PGDATABASE => 'app', PGUSER => 'signer', PGAPPNAME => "signer $signers",
			EVM_RPC => $chain->{url}, EVM_CHAIN_ID => 31337, EVM_KEY => '0x' . '11' x 32, EVM_CONFIRMATIONS => 3,
			EVM_LEASE => '1 s', EVM_PAUSE_MS => 100);
		open STDOUT, '>', $log;
		open STDERR, '>&', \*STDOUT;
		exec 'node', "$example/signer.js" or POSIX::_exit(1);
	}
	$running{$pid} = 1;
	return { pid => $pid, log => $log };
}

# What it has stored must be there for ever.
sub kill_signer
{
	my ($signer) = @_;

	kill 'KILL', $signer->{pid};
	waitpid($signer->{pid}, 0);
	is($? & 127, 9, 'the signer is killed');
	delete $running{ $signer->{pid} };
	$node->safe_psql('app', q{INSERT INTO seen SELECT idempotency_key, nonce, hash, raw FROM evm_transaction
		WHERE idempotency_key NOT IN (SELECT idempotency_key FROM seen)});
	return;
}

END
{
	my $status = $?;
	kill 'KILL', keys %running;
	$? = $status;
}
