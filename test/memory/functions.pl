# Calls every function in C at least once, with a worker, the dispatcher and
# providers at work, so that whoever watches the server sees all of it.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', preload => 'payoutq,pg_cron', conf => q(
cron.use_background_workers = on
cron.database_name = 'postgres'
max_worker_processes = 32
track_functions = 'all'
payoutq.interval = 1s
payoutq.retry_base = 20ms
payoutq.retry_cap = 200ms
payoutq.send_interval = 200ms
payoutq.confirm_interval = 200ms
payoutq.workers = 2
));
$node->safe_psql('postgres', 'CREATE EXTENSION pg_cron; CREATE EXTENSION payoutq');
create_db_with_extension($node, 'app');

# Jobs of all kinds, paid by the worker
my @jobs = split /\n/, $node->safe_psql('app', q{
	SELECT payout_create_job('json', '[{"user_id": "ann", "amount": 700}, {"user_id": "bob", "amount": 250}]', total_pool => 1000, platform_fee => 50);
	SELECT payout_create_job('arrays', array_agg('u' || i), array_agg(i::bigint), batch_size => 20) FROM generate_series(1, 100) i;
	SELECT payout_create_job_from('query', $$SELECT 'v' || i AS user_id, i AS amount FROM generate_series(1, 50) i$$)});
ok(wait_for_job($node, 'app', $_), "job $_") foreach @jobs;
my ($code, $out, $error) = $node->psql('app', q{SELECT payout_create_job('twice', ARRAY['a', 'a'], ARRAY[1, 2])});
like($error, qr/in the job twice/, 'a list that is wrong');
is($node->safe_psql('app', q{SELECT payout_wait_for_job(1, '10 s')}), 'completed', 'payout_wait_for_job()');

# Balances in a table of the application, one of which breaks a constraint
$node->safe_psql('app', q{
	CREATE TABLE users (id bigint PRIMARY KEY, coins bigint NOT NULL DEFAULT 0 CHECK (coins < 1000));
	INSERT INTO users SELECT i FROM generate_series(1, 20) i;
	SELECT payout_bind_accounts('public.users', 'id', 'coins', 'COIN')});
my $bound = $node->safe_psql('app', q{SELECT payout_create_job('bound', array_agg(i::text), array_agg(CASE WHEN i = 7 THEN 5000 ELSE i END::bigint), currency => 'COIN')
	FROM generate_series(1, 20) i});
ok(wait_for_job($node, 'app', $bound), 'a bound table');
is($node->safe_psql('app', 'SELECT sum(coins), count(*) FILTER (WHERE coins = 0) FROM users'), '203|1', 'the one that cannot be paid fails alone');

# The same in a session, without workers
$node->safe_psql('app', 'SELECT payout_stop_workers()');
$node->safe_psql('app', q{
	SELECT payout_create_job('session', ARRAY['ann'], ARRAY[5]);
	SELECT payout_pause_job(id), payout_resume_job(id) FROM payoutq.job WHERE reference = 'session'});
$node->safe_psql('app', 'CALL payout_process()');
is($node->safe_psql('app', q{SELECT status FROM payout_job_status('session')}), 'completed', 'payout_process()');
$node->safe_psql('app', 'SELECT payout_start_worker()');

# A challenge, of which those who are in it are told
my $provider = start_provider();
create_provider($node, 'app', 'push', kind => 'pusher', base_url => $provider->{url}, app_id => '3', api_key => 'k', secret => 's', timeout => '20s');
$node->safe_psql('app', q{SELECT payout_deposit('ann', 1000, 'd1'), payout_deposit('bob', 1000, 'd2')});
my $challenge = $node->safe_psql('app', q{
	SELECT payout_create_challenge('rematch', now() + interval '1 hour', creator_id => 'carl', challenger_id => 'ann', challenged_id => 'bob', fee_bps => 250)});
$node->safe_psql('app', qq{
	SELECT payout_place_stake($challenge, 'ann', 'YES', 500), payout_place_stake($challenge, 'bob', 'NO', 200);
	SELECT payout_run_notifications(now() + interval '55 min'), payout_run_deadlines(now() + interval '1 hour')});
ok(wait_for_job($node, 'app', $node->safe_psql('app', qq{SELECT payout_job_id FROM payout_resolve_challenge($challenge, 'challenger_won')})), 'a challenge');

ok(wait_for($node, 'app', 'SELECT count(*) > 0 FROM payoutq.notification WHERE push_attempts > 0'), 'a push');

# Transfers, answers that are good and bad, and a callback
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", status_url => "$provider->{url}/status",
	webhook_secret => 'whsec_1', rate_limit => 1000, timeout => '20s', quiet_period => '20s');
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_1', webhook_secret => 'whsec_2', rate_limit => 1000, timeout => '20s',
	quiet_period => '20s');
$node->safe_psql('app', q{
	CREATE TABLE told (transfer_id bigint);
	CREATE FUNCTION tell(bigint) RETURNS void LANGUAGE sql AS 'INSERT INTO told VALUES ($1)';
	SELECT payout_on_confirm('wire', 'tell(bigint)');
	SELECT payout_set_destination('u' || i, p, 'acct_' || i || p) FROM generate_series(1, 6) i, unnest(ARRAY['wire', 'stripe']) p});
rule($provider, "acct_1$_", status => 503) foreach ('wire', 'stripe');
rule($provider, "acct_2$_", status => 429, headers => { 'Retry-After' => '1' }) foreach ('wire', 'stripe');
rule($provider, 'acct_3wire', body => '{"status": "failed", "class": "permanent", "reason": "no such account"}');
rule($provider, 'acct_4wire', body => '{"status": "sent", "reference": "pay_4"}');
foreach my $name ('wire', 'stripe')
{
	my $job = create_job($node, 'app', "by $name", 6, args => "provider => '$name'");
	ok(wait_for($node, 'app', qq{SELECT count(*) > 0 AND bool_and(status IN ('completed', 'failed_terminal', 'sent')) FROM payout_transfers WHERE job_id = $job}),
		"transfers by $name");
}
ok(wait_for($node, 'app', 'SELECT count(*) > 0 FROM told'), 'the callback');

# What a web hook is signed with
is($node->safe_psql('app', q{SELECT payoutq.signature_is_valid('wire', 't=1,v1=00', 'x', now())}), 'f', 'a signature');

# A schedule, in the database of pg_cron and from another one
is($node->safe_psql($_, 'SELECT payout_schedule()'), 4, "a schedule in $_") foreach ('postgres', 'app');

# What is called by nothing above, or through something that does not count it
$node->safe_psql('app', q{
	SELECT payoutq.provider_validator(ARRAY['kind=external'], 'pg_foreign_server'::regclass);
	SELECT payout_split(1000, ARRAY[1, 2, 3]);
	SELECT * FROM payout_preview_job('p', '[{"user_id": "ann", "amount": 1}]');
	SELECT * FROM payout_preview_job('p', ARRAY['ann'], ARRAY[1]);
	SELECT * FROM payoutq.worker_slots();
	SELECT payoutq.change_balance('ann', 'USD', 1), payoutq.change_balance('ann', 'USD', -1);
	SELECT payout_balance('ann'), payout_balance('@platform'), payout_balance('1', 'COIN');
	SELECT payoutq.latest_system_balance('@platform', 'USD');
	SELECT payoutq.execute_in('postgres', 'SELECT 1');
	SELECT payoutq.tell_waiters(), payoutq.wake()});

# None is forgotten.  Statistics of a process are written when it ends.
ok(wait_for($node, 'app', q{
	SELECT coalesce(string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.proname), 'none')
	  FROM pg_proc p LEFT JOIN pg_stat_user_functions s ON s.funcid = p.oid
	 WHERE p.probin LIKE '%payoutq%' AND coalesce(s.calls, 0) = 0}, 'none', 60), 'all functions in C were called');

books_ok($node, 'app', 'in the end');
stop_provider($provider);
$node->stop;
done_testing();
