# The application's callback: called by a worker, in the transaction that completes
# the transfer, once; and whatever it does, nobody else waits for it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.workers = 2
payoutq.retry_base = 50ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
payoutq.lock_timeout = 1min
deadlock_timeout = 50ms
max_worker_processes = 20
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000);
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000);
create_provider($node, 'app', 'plain', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000);

# What it does is said by the user's name, up to the first digit, for the first two times.
$node->safe_psql('app', q{
	CREATE TABLE minted (transfer_id bigint, seen text, pid int DEFAULT pg_backend_pid(), xid xid8 DEFAULT pg_current_xact_id());
	CREATE SEQUENCE calls;
	CREATE TABLE locked (id int); INSERT INTO locked VALUES (1);
	CREATE FUNCTION mint(id bigint) RETURNS void LANGUAGE plpgsql AS $$
	DECLARE
		t payout_transfers;
	BEGIN
		SELECT * INTO t FROM payout_transfers WHERE transfer_id = id;
		INSERT INTO minted VALUES (id, t.status);
		CASE substring(t.user_id FROM '^[a-z]+')
			WHEN 'hang' THEN PERFORM pg_advisory_xact_lock(7);
			WHEN 'fine' THEN NULL;
			ELSE
				IF nextval('calls') > 2 THEN
					RETURN;
				END IF;
		END CASE;
		CASE substring(t.user_id FROM '^[a-z]+')
			WHEN 'error' THEN RAISE 'no paper';
			WHEN 'assert' THEN ASSERT false, 'no ink';
			WHEN 'cancel' THEN PERFORM pg_advisory_xact_lock(7);
			WHEN 'locked' THEN
				PERFORM set_config('lock_timeout', '20ms', true);
				LOCK locked;
			WHEN 'deadlock' THEN
				PERFORM pg_advisory_xact_lock(8);
				WHILE NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 8 AND NOT granted) LOOP END LOOP;
				PERFORM pg_advisory_xact_lock(7);
			ELSE NULL;
		END CASE;
	END $$;
	SELECT payout_on_confirm(p, 'mint(bigint)') FROM unnest(ARRAY['wire', 'stripe']) p});
my $state = q{SELECT status, confirmed_at IS NOT NULL, error, callback_failures FROM payoutq.transfer WHERE user_id =};
my $minted = q{SELECT count(*), count(DISTINCT transfer_id), min(seen), max(seen) FROM minted JOIN payout_transfers t USING (transfer_id) WHERE user_id ~ '^%s'};
my $log = -s $node->logfile;

# Held up by a lock: what the dispatcher has recorded is seen, and what the callback does is not.
my $session = $node->background_psql('app');
$session->query_safe('SELECT pg_advisory_lock(7)');
my $job = pay('wire', 'hang1');
ok(wait_for($node, 'app', q{SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND objsubid = 1 AND NOT granted}, 1), 'a callback is called');
is($node->safe_psql('app', "$state 'hang1'"), 'sent|t||0', 'the transfer is sent, and confirmed');
is($node->safe_psql('app', 'SELECT count(*) FROM minted'), 0, 'nothing is minted');
is($node->safe_psql('app', q{SELECT outcome || ' ' || http_status FROM payout_attempts}), 'completed 200', 'though the answer was final');
my $caller = $node->safe_psql('app', q{SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND objsubid = 1 AND NOT granted});
isnt($caller, dispatcher_pid($node, 'app'), 'it is not the dispatcher that waits');

# It holds up one worker only.
ok(wait_for_job($node, 'app', create_job($node, 'app', 'home', 2000, args => 'batch_size => 100')), 'a job without a provider is paid meanwhile');
ok(wait_for_job($node, 'app', pay('plain', map { "plain$_" } 1 .. 20)), 'and one with another provider');
my $stripe = pay('stripe', map { "fine$_" } 1 .. 20);
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $stripe AND status = 'sent' AND confirmed_at IS NOT NULL", 20), 'others are sent, and confirmed');
ok(wait_for_job($node, 'app', create_job($node, 'app', 'home2', 100, prefix => 'v')), 'and so on');
is($node->safe_psql('app', "$state 'hang1'"), 'sent|t||0', 'it still hangs');
$session->query_safe('SELECT pg_advisory_unlock(7)');
ok(wait_for_job($node, 'app', $job), 'it goes on, and its job is completed');
ok(wait_for_job($node, 'app', $stripe), 'and the others are');
is($node->safe_psql('app', sprintf($minted, 'hang')), '1|1|completed|completed', 'minted once, and its transfer is completed then');
is($node->safe_psql('app', sprintf($minted, 'fine')), '20|20|completed|completed', 'the others, too');
books_ok($node, 'app', 'a callback that hangs');

# Each of these fails twice.
my %failures = (error => 'no paper', assert => 'no ink', locked => 'canceling statement due to lock timeout', cancel => 'canceling statement due to user request',
	deadlock => 'deadlock detected');
foreach my $how (sort keys %failures)
{
	$node->safe_psql('app', q{SELECT setval('calls', 1, false)});
	my $holder = $node->background_psql('app');
	$holder->query_safe($how eq 'locked' ? 'BEGIN; LOCK locked' : 'SET deadlock_timeout = \'1min\'; SELECT pg_advisory_lock(7)');
	my $failing = pay('wire', "${how}1");
	foreach my $n (1, 2)
	{
		# It holds 8, and waits for 7 when somebody who has 7 waits for 8.
		if ($how eq 'deadlock')
		{
			ok(wait_for($node, 'app', q{SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 8}, 1), "$how: called");
			$holder->query_safe('SELECT pg_advisory_lock(8); SELECT pg_advisory_unlock(8)');
		}
		elsif ($how eq 'cancel')
		{
			ok(wait_for($node, 'app', q{SELECT bool_or(pg_cancel_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND NOT granted}), "$how: called");
		}
		ok(wait_for($node, 'app', "SELECT last_value >= $n AND is_called FROM calls"), "$how: $n");
	}
	if ($how eq 'error')
	{
		ok(wait_for_job($node, 'app', create_job($node, 'app', "home $how", 100, prefix => 'w')), 'others are paid meanwhile');
		ok(wait_for_job($node, 'app', pay('wire', 'fine99')), 'and completed');
	}
	ok(wait_for_job($node, 'app', $failing), "$how: completed in the end");
	is($node->safe_psql('app', "$state '${how}1'"), 'completed|t||2', "$how: it has failed twice");
	is($node->safe_psql('app', sprintf($minted, $how)), '1|1|completed|completed', "$how: minted once");
	$holder->quit;
}

# What has failed goes back to a bound table with a deferred trigger; the callback writes to a table with one, too.
$node->safe_psql('app', q{
	CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
	CREATE TABLE wallet (id text PRIMARY KEY, coins bigint NOT NULL DEFAULT 0);
	INSERT INTO wallet VALUES ('fine100'), ('fine101');
	CREATE CONSTRAINT TRIGGER look AFTER UPDATE ON wallet DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION look();
	CREATE CONSTRAINT TRIGGER look AFTER INSERT ON minted DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION look();
	SELECT payout_bind_accounts('wallet', 'id', 'coins', 'GEM')});
rule($provider, 'acct_fine101', status => 422, body => '{"status": "failed", "class": "permanent"}');
ok(wait_for_job($node, 'app', pay_in('GEM', 'wire', 'fine100', 'fine101')), 'deferred triggers: a job is completed');
is($node->safe_psql('app', q{SELECT string_agg(user_id || ' ' || t.status || ' ' || coins, ', ' ORDER BY user_id) FROM payout_transfers t JOIN wallet ON id = user_id}),
	'fine100 completed 0, fine101 failed_terminal 5', 'deferred triggers: one is paid, and the other has the money back');
is($node->safe_psql('app', sprintf($minted, 'fine100')), '1|1|completed|completed', 'deferred triggers: the callback is called');

# Seen while it lasts: one that fails always
$node->safe_psql('app', q{ALTER SEQUENCE calls RESTART; CREATE OR REPLACE FUNCTION mint(id bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'out of order'; END $$});
$job = pay('wire', 'never1');
ok(wait_for($node, 'app', q{SELECT callback_failures > 3 FROM payoutq.transfer WHERE user_id = 'never1'}), 'a callback that fails always is tried again and again');
is($node->safe_psql('app', q{SELECT status, error FROM payout_transfers WHERE user_id = 'never1'}), 'sent|callback: out of order', 'which is seen');
is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"), 'running', 'its job waits');
is($node->safe_psql('app', q{SELECT run_after - updated_at BETWEEN '40ms' AND '101ms' FROM payoutq.transfer WHERE user_id = 'never1'}), 't', 'with backoff');
$node->safe_psql('app', q{SELECT payout_on_confirm('wire', NULL)});
ok(wait_for_job($node, 'app', $job), 'until it is not wanted any more');

unlike(slurp_file($node->logfile, $log), qr/payoutq worker.*(FATAL|PANIC|ERROR)|exited with exit code [^0]/, 'no worker has died');
books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();

sub pay
{
	my ($server, @users) = @_;

	return pay_in('USD', $server, @users);
}

sub pay_in
{
	my ($currency, $server, @users) = @_;
	my $list = join ', ', map { "'$_'" } @users;

	$node->safe_psql('app', "SELECT payout_set_destination(u, '$server', 'acct_' || u) FROM unnest(ARRAY[$list]) u");
	return $node->safe_psql('app', "SELECT payout_create_job('$users[0]', u, array_fill(5::bigint, ARRAY[cardinality(u)]), provider => '$server', currency => '$currency') FROM (SELECT ARRAY[$list] AS u) j");
}
