# What the dispatcher makes of answers that it cannot record at once, or that are
# about more than one transfer; and more providers than a few.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 1h
payoutq.lock_timeout = 10min
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000);
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000);
my $origin = $node->safe_psql('app', 'SELECT payoutq.key_origin()');
my $made = 0;

# The account to give the money back to is locked for a while.
$node->safe_psql('app', q{SELECT payout_deposit('busy', 1000, 'before')});
my $session = $node->background_psql('app');
$session->query_safe(q{BEGIN; SELECT FROM payoutq.account WHERE user_id = 'busy' FOR UPDATE});
rule($provider, 'acct_busy', unreached => 1, body => '{"status": "failed", "class": "permanent", "reason": "closed"}');
my $job = pay('wire', 'busy');
my $waits = q{SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.application_name = 'payoutq worker (dispatcher)'};
foreach my $n (1 .. 3)
{
	ok(wait_for($node, 'app', $waits, 1), "the answer waits for a lock: $n");
	ok(wait_for($node, 'app', $waits, 0), 'for a moment');
}
ok(wait_for_job($node, 'app', pay('wire', 'free')), 'others are sent and recorded meanwhile');
is($node->safe_psql('app', q{SELECT status, attempts FROM payout_transfers WHERE user_id = 'busy'}), 'processing|1', 'it is not recorded yet, nor made unknown');
$session->query_safe('COMMIT');
ok(wait_for_job($node, 'app', $job), 'then it is');
is($node->safe_psql('app', q{SELECT status, attempts, t.error, outcome FROM payout_transfers t JOIN payout_attempts USING (transfer_id) WHERE user_id = 'busy'}),
	'failed_terminal|1|closed|permanent', 'as it was answered');
is($node->safe_psql('app', q{SELECT payout_balance('busy')}), 1005, 'the money is back');
is(scalar(grep { $_->{body} =~ /acct_busy/ } @{ ask($provider, 'GET', '/requests') }), 1, 'with one call');

# Reversed in part, when it is confirmed
$node->safe_psql('app', q{
	CREATE TABLE minted (id bigint);
	CREATE FUNCTION mint(id bigint) RETURNS void LANGUAGE sql AS 'INSERT INTO minted VALUES (id)'});
foreach my $callback ('NULL', q{'mint(bigint)'})
{
	my $who = $callback eq 'NULL' ? 'part' : 'minted';
	$node->safe_psql('app', "SELECT payout_on_confirm('stripe', $callback)");
	rule($provider, next_address(), body => encode_json({
		id => "tr_$made", amount => 5, currency => 'usd', destination => "acct_$who", reversed => JSON::PP::false, amount_reversed => 2,
		metadata => { payoutq_origin => $origin } }));
	ok(wait_for_job($node, 'app', pay('stripe', $who)), "$who: completed");
	is($node->safe_psql('app', "SELECT status, error FROM payout_transfers WHERE user_id = '$who'"), 'completed|2 of it reversed at the provider', "$who: the partial reversal is seen");
}
is($node->safe_psql('app', 'SELECT count(*) FROM minted'), 1, 'with the callback');
$node->safe_psql('app', q{SELECT payout_on_confirm('stripe', NULL)});

# Without funds: nothing is sent, but what was sent is confirmed.
rule($provider, next_address(), status => 500);
my $before = pay('stripe', 'before');
ok(wait_for($node, 'app', q{SELECT status || ' ' || error FROM payout_transfers WHERE user_id = 'before'}, 'sent HTTP 500 invalid_request_error'), 'one is sent, and not confirmed yet');
rule($provider, 'acct_poor', fails => 1, stored => 1, status => 400, code => 'balance_insufficient');
my $poor = pay('stripe', 'poor');
ok(wait_for($node, 'app', q{SELECT open_until > now() + interval '50 s' FROM payout_providers WHERE provider = 'stripe'}), 'the circuit is open');
is($node->safe_psql('app', q{SELECT status, attempts, generation, outcome FROM payout_transfers JOIN payout_attempts USING (transfer_id) WHERE user_id = 'poor'}), 'pending|1|2|transient',
	'the transfer waits, for a new key');
my $after = pay('stripe', 'after');
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $after", 1), 'another transfer');
$node->safe_psql('app', q{UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE status = 'sent'});
ok(wait_for_job($node, 'app', $before), 'what was sent is confirmed');
is($node->safe_psql('app', q{SELECT string_agg(user_id || ' ' || status || ' ' || attempts, ', ' ORDER BY user_id) FROM payout_transfers WHERE user_id IN ('poor', 'after')}),
	'after pending 0, poor pending 1', 'nothing is sent');
$node->safe_psql('app', 'UPDATE payoutq.circuit SET open_until = clock_timestamp()');
ok(wait_for_job($node, 'app', $_), 'then all are') foreach ($poor, $after);
is(join(' ', map { $_->{headers}{'idempotency-key'} =~ /(:g\d+|)$/ } grep { $_->{body} =~ /acct_poor/ } @{ ask($provider, 'GET', '/requests') }), ' :g2', 'the refused one under a new key');

# Refused when it asks: so would all others be.
rule($provider, next_address(), status => 401);
my $asked = pay('stripe', 'asked');
ok(wait_for($node, 'app', q{SELECT open_until > now() + interval '50 s', reason FROM payout_providers WHERE provider = 'stripe'}, 't|HTTP 401 invalid_request_error'), 'a 401 to a question opens the circuit');
my $later = pay('stripe', 'later');
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $later", 1), 'another transfer');
$node->safe_psql('app', q{UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE status = 'sent'});
ok(wait_for_job($node, 'app', pay('wire', 'free2')), 'other providers are served');
is($node->safe_psql('app', q{SELECT string_agg(user_id || ' ' || status, ', ' ORDER BY user_id) FROM payout_transfers WHERE user_id IN ('asked', 'later')}), 'asked sent, later pending', 'this is not');
is(scalar(grep { $_->{method} eq 'GET' && $_->{url} =~ /tr_$made$/ } @{ ask($provider, 'GET', '/requests') }), 1, 'nor asked');
$node->safe_psql('app', 'UPDATE payoutq.circuit SET open_until = clock_timestamp()');
ok(wait_for_job($node, 'app', $_), 'later it is') foreach ($asked, $later);
is($node->safe_psql('app', 'SELECT count(*) FROM payoutq.circuit'), 0, 'and the circuit is closed');

# Refused for one account only
rule($provider, 'acct_gone', unreached => 1, status => 403, code => 'account_invalid');
ok(wait_for_job($node, 'app', pay('stripe', 'gone')), 'an account that the provider may not use any more');
is($node->safe_psql('app', q{SELECT status, (SELECT count(*) FROM payoutq.circuit) FROM payout_transfers WHERE user_id = 'gone'}), 'failed_terminal|0', 'holds up nobody else');

# Many providers, and others in their place
foreach my $round ('a', 'b')
{
	$node->safe_psql('app', qq{
		DO \$\$ BEGIN
			FOR i IN 1 .. 45 LOOP
				EXECUTE format('CREATE SERVER ${round}%s FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ''webhook'', base_url ''$provider->{url}/pay'', rate_limit ''1000'')', i);
				EXECUTE format('CREATE USER MAPPING FOR PUBLIC SERVER ${round}%s OPTIONS (webhook_secret ''whsec_%s'')', i, i);
				PERFORM payout_set_destination('$round', '$round' || i, 'acct_$round' || i),
						payout_create_job('$round' || i, ARRAY['$round'], ARRAY[1], provider => '$round' || i);
			END LOOP;
		END \$\$});
	ok(wait_for($node, 'app', qq{SELECT count(*) FROM payout_jobs WHERE reference ~ '^$round\\d' AND status = 'completed'}, 45), "$round: 45 providers are served");
	$node->safe_psql('app', qq{
		DO \$\$ BEGIN
			FOR i IN 1 .. 45 LOOP
				EXECUTE format('DROP SERVER ${round}%s CASCADE', i);
			END LOOP;
		END \$\$});
}
ok(wait_for_job($node, 'app', pay('wire', 'free3')), 'and those that are left');
unlike(slurp_file($node->logfile), qr/payoutq worker.*(WARNING|ERROR|FATAL|PANIC)|exited with exit code/, 'nothing is in the log');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

sub pay
{
	my ($server, $user) = @_;

	$node->safe_psql('app', "SELECT payout_set_destination('$user', '$server', 'acct_$user')");
	return $node->safe_psql('app', "SELECT payout_create_job('$user', ARRAY['$user'], ARRAY[5], provider => '$server')");
}

# Where the provider is asked about what it makes next
sub next_address
{
	$made = @{ ask($provider, 'GET', '/books') } + 1;
	return "/v1/transfers/tr_$made";
}
