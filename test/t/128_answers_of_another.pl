# What ends a call is not always an answer to it: a request that libcurl would
# repeat, an answer about an attempt that was rejected since, a lease that ended
# while the claim was committed, an answer that cannot be recorded.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
wal_level = replica
max_wal_senders = 1
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000,
	timeout => '10s');
create_provider($node, 'app', 'asked', kind => 'webhook', base_url => "$provider->{url}/pay", status_url => "$provider->{url}/status",
	webhook_secret => 'whsec_1', rate_limit => 1000, timeout => '10min');
my $attempts = q{SELECT string_agg(format('%s %s', a.outcome, a.http_status), ', ' ORDER BY a.attempt)
	FROM payout_transfers t JOIN payout_attempts a USING (transfer_id) WHERE t.user_id =};

# A connection that was used before ends without an answer: nobody knows, whatever
# the same request would be answered over another connection.
ok(wait_for_job($node, 'app', pay('wire', 'first')), '(there is a connection)');
rule($provider, 'acct_again', fault => 'lost');
rule($provider, 'acct_again', unreached => 1, status => 429, body => '', headers => { 'Retry-After' => '0' });
my $job = pay('wire', 'again');
ok(wait_for_job($node, 'app', $job), 'the service ends the connection after it has made the transfer');
is($node->safe_psql('app', "$attempts 'again'"), 'unknown , transient 429, completed 200', 'that is an attempt of unknown outcome');
is(books('again'), 1, 'made once');

rule($provider, 'acct_gone', fault => 'lost', refuse => 500);
$job = pay('wire', 'gone');
ok(wait_for($node, 'app', "SELECT count(*) > 0 FROM payout_attempts a JOIN payout_transfers t USING (transfer_id) WHERE user_id = 'gone' AND a.outcome IS NOT NULL"),
	'it does so, and stops to listen');
is($node->safe_psql('app', q{SELECT a.outcome, t.maybe_sent FROM payout_attempts a JOIN payoutq.transfer t ON t.id = transfer_id
		WHERE t.user_id = 'gone' ORDER BY a.attempt LIMIT 1}), 'unknown|t', 'which is no attempt that never was sent');
ok(wait_for_job($node, 'app', $job), 'sent again when it listens');
is(books('gone'), 1, 'made once');

# A service that does not know what has become of it
rule($provider, 'acct_unclear', unreached => 1, body => '{"status": "sent", "reference": "u1"}');
rule($provider, '/status', body => '{"status": "failed", "class": "unknown"}', times => 2);
rule($provider, '/status', body => '{"status": "completed"}');
$job = pay('asked', 'unclear');
ok(wait_for_job($node, 'app', $job), 'a status that is not known is asked for again');
is($node->safe_psql('app', q{SELECT status FROM payout_transfers WHERE user_id = 'unclear'}), 'completed', 'and gives no money back');

# Rejected and sent again while it is asked about
rule($provider, 'acct_slow', unreached => 1, body => '{"status": "sent", "reference": "r1"}');
rule($provider, '/status', body => '{"status": "failed"}', hold => 1);
$job = pay('asked', 'slow');
ok(poll(sub { grep { $_->{url} =~ /reference=r1$/ } @{ ask($provider, 'GET', '/requests') } }), 'it is asked about');
is($node->safe_psql('app', q{SELECT payout_confirm_transfer('asked', 'r1', false)}), 'confirmation_failed', 'a web hook is faster');
rule($provider, 'acct_slow', unreached => 1, body => '{"status": "sent", "reference": "r2"}');
rule($provider, '/status', body => '{"status": "sent"}', times => 1_000_000);
$node->safe_psql('app', q{SELECT payout_retry_transfer(transfer_id) FROM payout_transfers WHERE user_id = 'slow'});
ok(wait_for($node, 'app', q{SELECT status, provider_reference FROM payout_transfers WHERE user_id = 'slow'}, 'sent|r2'), 'sent again, under another key');
my $answered = ask_count('r2');
ask($provider, 'POST', '/release');
ok(poll(sub { ask_count('r2') > $answered + 1 }), 'the answer about the first has come');
is($node->safe_psql('app', q{SELECT status, provider_reference FROM payout_transfers WHERE user_id = 'slow'}), 'sent|r2', 'and is not taken for one about the second');
is($node->safe_psql('app', q{SELECT payout_confirm_transfer('asked', 'r2', true)}), 'completed', '(it ends)');

# A rejection that cannot be recorded: the table of the balances does not take it.
$node->safe_psql('app', q{
	CREATE ROLE wallets;
	CREATE TABLE wallet (id text PRIMARY KEY, coins bigint NOT NULL DEFAULT 0, frozen boolean NOT NULL DEFAULT false);
	INSERT INTO wallet VALUES ('frozen');
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
		$$BEGIN IF NEW.frozen THEN RAISE EXCEPTION 'the wallet is frozen'; END IF; RETURN NEW; END$$;
	CREATE TRIGGER refuse BEFORE UPDATE OF coins ON wallet FOR EACH ROW EXECUTE FUNCTION refuse();
	ALTER FUNCTION refuse() OWNER TO wallets;
	ALTER TABLE wallet OWNER TO wallets;
	SELECT payout_bind_accounts('wallet', 'id', 'coins', 'COIN')});
rule($provider, 'acct_frozen', unreached => 1, body => '{"status": "sent", "reference": "f1"}');
pay('asked', 'frozen', 'COIN');
ok(wait_for($node, 'app', q{SELECT status FROM payout_transfers WHERE user_id = 'frozen'}, 'sent'), 'sent');
$node->safe_psql('app', 'UPDATE wallet SET frozen = true');
ask($provider, 'DELETE', '/rules');
rule($provider, '/status', body => '{"status": "failed", "reason": "returned"}', times => 1_000_000);
ok(wait_for($node, 'app', q{SELECT status, error FROM payout_transfers WHERE user_id = 'frozen'},
		'sent|the answer could not be recorded: the wallet is frozen'), 'a rejection that cannot be recorded is shown');
like(slurp_file($node->logfile), qr/WARNING:  could not record the answer to transfer \d+: the wallet is frozen/, 'and logged');
$node->safe_psql('app', 'UPDATE wallet SET frozen = false');
ok(wait_for($node, 'app', q{SELECT status, error FROM payout_transfers WHERE user_id = 'frozen'}, 'confirmation_failed|returned'), 'and recorded as soon as it can be');

# The claim is committed, but the commit waits for a standby until the lease has ended.
# No call is made, which is no attempt of the one that the transfer has.
$node->append_conf('postgresql.conf', 'payoutq.max_attempts = 1');
$node->safe_psql('app', q{INSERT INTO payoutq.circuit VALUES ('wire', 1, 'infinity', 'closed by the test', false)});
$node->restart;
$job = pay('wire', 'late');
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_transfers WHERE user_id = 'late'}, 1), '(a transfer waits)');
set_standby('nobody');
my $session = $node->background_psql('app');
$session->query_until(qr/begun/, "\\echo begun\nCREATE TABLE waits ();\n");
ok(wait_for($node, 'app', q{SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'}, 1), '(commits wait)');
$node->safe_psql('app', q{SET synchronous_commit = local; DELETE FROM payoutq.circuit});
my $waits = q{FROM pg_stat_activity WHERE application_name = 'payoutq worker (dispatcher)' AND wait_event = 'SyncRep'};
ok(wait_for($node, 'app', "SELECT count(*) $waits", 1), 'the commit of the claim waits');
ok(wait_for($node, 'app', "SELECT xact_start < clock_timestamp() - interval '21 s' $waits"), 'for longer than the lease');
set_standby('');
$session->quit;
ok(wait_for_job($node, 'app', $job), 'sent later');
is($node->safe_psql('app', q{SELECT status FROM payout_transfers WHERE user_id = 'late'}), 'completed', 'and completed');
is($node->safe_psql('app', "$attempts 'late'"), 'transient , completed 200', 'but not under a lease that had ended');
is(scalar(grep { $_->{method} eq 'POST' && $_->{body} =~ /acct_late/ } @{ ask($provider, 'GET', '/requests') }), 1, 'with one call');

books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();

sub pay
{
	my ($server, $name, $currency) = @_;

	$currency //= 'USD';
	$node->safe_psql('app', "SELECT payout_set_destination('$name', '$server', 'acct_$name')");
	return $node->safe_psql('app', "SET synchronous_commit = local; SELECT payout_create_job('$name', ARRAY['$name'], ARRAY[5], provider => '$server', currency => '$currency')");
}

sub books
{
	my ($name) = @_;
	return scalar(grep { $_->{destination} eq "acct_$name" } @{ ask($provider, 'GET', '/books') });
}

# How often it was asked what has become of it
sub ask_count
{
	my ($reference) = @_;
	return scalar(grep { $_->{url} =~ /reference=\Q$reference\E$/ } @{ ask($provider, 'GET', '/requests') });
}

sub poll
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	select(undef, undef, undef, 0.02) until $condition->() || time() > $end;
	return $condition->();
}

sub set_standby
{
	my ($name) = @_;

	$node->append_conf('postgresql.conf', "synchronous_standby_names = '$name'");
	$node->reload;
	return;
}
