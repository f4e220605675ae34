# What fails for everybody stops the job instead of being searched for in every
# batch: a mass failure, and an error of configuration.  Retried after the cause
# is mended, the job pays everybody.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.retry_base = 1h
payoutq.retry_cap = 1h
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', q{
	CREATE ROLE app;
	GRANT CREATE, USAGE ON SCHEMA public TO app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, 2000) i;
	CREATE TABLE audit (user_id text);
	ALTER TABLE audit OWNER TO app;
	CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.audit VALUES (NEW.user_id);
		RETURN NEW;
	END $$;
	CREATE TRIGGER audit BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION audit();
	ALTER FUNCTION audit() OWNER TO app;
	ALTER TABLE users OWNER TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance')});
my $n = 0;
my ($holds_row, $pays);

# Each entry fails, and the trigger says the same to all.
fails_and_is_mended('mass failure', 'P0001',
	q{CREATE OR REPLACE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
	  BEGIN RAISE EXCEPTION 'closed today'; END $$},
	q{CREATE OR REPLACE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$
	  BEGIN INSERT INTO public.audit VALUES (NEW.user_id); RETURN NEW; END $$});
my $batches = $node->safe_psql('app', 'SELECT count(*) FROM payout_batches WHERE job_id = 1');
note("$batches batches");
cmp_ok($batches, '<', 400, 'it was not halved down to everybody');

# Errors of configuration
fails_and_is_mended('permission', '42501',
	'REVOKE INSERT ON audit FROM app', 'GRANT INSERT ON audit TO app');
fails_and_is_mended('permission on the bound table', '42501',
	'REVOKE UPDATE ON users FROM app', 'GRANT UPDATE ON users TO app');
fails_and_is_mended('table of the trigger', '42P01',
	'ALTER TABLE audit RENAME TO away', 'ALTER TABLE away RENAME TO audit');
fails_and_is_mended('column', '42703',
	'ALTER TABLE users RENAME balance TO coins', 'ALTER TABLE users RENAME coins TO balance');
fails_and_is_mended('bound table', '42P01',
	q{CREATE TABLE kept AS TABLE users; DROP TABLE users},
	q{ALTER TABLE kept RENAME TO users; ALTER TABLE users ADD PRIMARY KEY (user_id);
	  ALTER TABLE users OWNER TO app;
	  SELECT payout_unbind_accounts(); SELECT payout_bind_accounts('users', 'user_id', 'balance')});

# Entries that fail again, one after the other, say nothing about the others.
$node->append_conf('postgresql.conf', "payoutq.retry_base = 10ms\npayoutq.max_attempts = 2");
$node->reload;
$node->safe_psql('app', q{
	CREATE FUNCTION opened() RETURNS text LANGUAGE sql AS $$SELECT ''$$;
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF substr(NEW.user_id, 2)::int % 40 = 0 AND NEW.user_id <> public.opened() THEN RAISE EXCEPTION 'closed'; END IF;
		RETURN NEW;
	END $$;
	CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse();
	ALTER FUNCTION refuse() OWNER TO app;
	SELECT payout_stop_workers()});
wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
my $job = create_job($node, 'app', 'refused', 2000, args => 'batch_size => 100');
my $other = $node->background_psql('app');
$other->query_safe(qq{
	BEGIN;
	SELECT FROM payoutq.batch WHERE job_id = $job AND last_seq = 2000 FOR UPDATE});
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for($node, 'app', "SELECT completed_count + failed_count = 1900 OR status = 'failed' FROM payout_job_status($job)"),
	'entries fail again while another process has the last batch');
is($node->safe_psql('app', "SELECT status, failed_count >= 40 FROM payout_job_status($job)"),
	'running|t', 'which does not stop the job');
$other->quit;
ok(wait_for_job($node, 'app', $job), 'it is completed');
is($node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)"),
	'1950|50', 'with everybody paid who can be');

# Nor when all of them are retried.
$node->safe_psql('app', q{CREATE OR REPLACE FUNCTION opened() RETURNS text LANGUAGE sql AS $$SELECT 'u2000'$$});
is($node->safe_psql('app', "SELECT payout_retry_job($job)"), 50, 'one can be paid now');
ok(wait_for($node, 'app', "SELECT status IN ('completed', 'failed') FROM payout_job_status($job)"), 'retried');
is($node->safe_psql('app', "SELECT status, completed_count, failed_count FROM payout_job_status($job)"),
	'completed|1951|49', 'and is paid');

# Nor do those of a group, which are one after the other.
$node->safe_psql('app', q{
	CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.user_id LIKE 'u15%' THEN RAISE EXCEPTION 'closed'; END IF;
		RETURN NEW;
	END $$});
foreach my $size (10, 1000)
{
	$job = create_job($node, 'app', "group $size", 2000, args => "batch_size => $size");
	ok(wait_for($node, 'app', "SELECT status IN ('completed', 'failed') FROM payout_job_status($job)"), "a group, $size in a batch");
	is($node->safe_psql('app', "SELECT status, completed_count, failed_count FROM payout_job_status($job)"),
		'completed|1889|111', 'all others are paid');
}

# All of one batch fails while another process pays the only other one: it is
# waited for, because then there is nothing more to try.
$node->safe_psql('app', 'SELECT payout_stop_workers()');
wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
set_lock_timeout('1min');
begin_to_pay_the_last('waited for');
my $stops = $node->background_psql('app');
$stops->query_until(qr/begun/, "\\echo begun\nCALL payout_process();\n");
ok(wait_for($node, 'app', q{SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND NOT granted}, 1),
	'who meets nothing but errors waits for the other');
pay_the_last('waited for');
$stops->quit;

begin_to_pay_the_last('not waited for');
set_lock_timeout('10ms');
my (undef, undef, $error) = $node->psql('app', 'CALL payout_process()');
is($error, '', 'who may not wait goes on');
pay_the_last('not waited for');

$node->stop;
done_testing();

# A job that is running when the cause appears, so that a part of it is paid.
sub fails_and_is_mended
{
	my ($what, $code, $break, $mend) = @_;
	$n++;

	$node->safe_psql('app', 'SELECT payout_stop_workers()');
	wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
	my $job = create_job($node, 'app', $what, 2000, args => 'batch_size => 500');
	$node->safe_psql('app', "CALL payout_process(max_batches => 1, job_id => $job)");
	my $before = $node->safe_psql('app', 'SELECT sum(balance) FROM users');
	$node->safe_psql('app', $break);
	my $table = $node->safe_psql('app', q{
		SELECT CASE WHEN to_regclass('users') IS NULL THEN 'kept' ELSE 'users' END});
	my $column = $what eq 'column' ? 'coins' : 'balance';
	$node->safe_psql('app', 'SELECT payout_start_worker()');

	ok(wait_for_job($node, 'app', $job, 'failed'), "$what: the job fails");
	is($node->safe_psql('app', qq{
			SELECT j.error_code, s.error <> '', s.completed_count, s.failed_count, s.progress < 1
			FROM payout_job_status($job) s, payoutq.job j WHERE j.id = $job}),
		"$code|t|500|0|t", "$what: it has the error, and what was paid stays paid");
	is($node->safe_psql('app', "SELECT sum($column) FROM $table"), $before, "$what: nobody else is paid");
	is($node->safe_psql('app', q{SELECT ok, value FROM payout_health WHERE check_name = 'failed_jobs'}),
		'f|1', "$what: payout_health tells");
	books_ok($node, 'app', "$what, failed");

	$node->safe_psql('app', $mend);
	cmp_ok($node->safe_psql('app', "SELECT payout_retry_job($job)"), '>', 0, "$what: mended and retried");
	ok(wait_for_job($node, 'app', $job), "$what: the job is completed");
	is($node->safe_psql('app', "SELECT completed_count, error FROM payout_job_status($job)"),
		'2000|', "$what: without an error");
	paid_once_ok($node, 'app', 2000, $what, accounts => 'users', times => $n);
	return;
}

sub set_lock_timeout
{
	my ($timeout) = @_;

	$node->append_conf('postgresql.conf', "payoutq.lock_timeout = $timeout");
	$node->reload;
	wait_for($node, 'app', 'SHOW payoutq.lock_timeout', $timeout);
	return;
}

sub begin_to_pay_the_last
{
	my ($name) = @_;
	my $holds_batch = $node->background_psql('app');

	$job = $node->safe_psql('app', qq{
		SELECT payout_create_job('$name', array_agg(user_id ORDER BY user_id), array_agg(1), batch_size => 20)
		FROM users WHERE user_id ~ '^u1[56][01].\$'});
	$holds_batch->query_safe("BEGIN; SELECT FROM payoutq.batch WHERE job_id = $job AND batch_no = 1 FOR UPDATE");
	$holds_row = $node->background_psql('app');
	$holds_row->query_safe(q{BEGIN; SELECT FROM users WHERE user_id = 'u1600' FOR UPDATE});
	$pays = $node->background_psql('app');
	$pays->query_until(qr/begun/, "\\echo begun\nCALL payout_process(1);\n");
	ok(wait_for($node, 'app', q{SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'CALL%'}, 1),
		"$name: the last batch is being paid");
	$holds_batch->query_safe('COMMIT');
	$holds_batch->quit;
	return;
}

sub pay_the_last
{
	my ($name) = @_;

	$holds_row->query_safe('COMMIT');
	$_->quit foreach $holds_row, $pays;
	wait_for($node, 'app', q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CALL%' AND state = 'active'}, 0);
	$node->safe_psql('app', 'SELECT payout_start_worker()');
	ok(wait_for($node, 'app', "SELECT status IN ('completed', 'failed') FROM payout_job_status($job)"), "$name: it ends");
	is($node->safe_psql('app', "SELECT status, completed_count, failed_count FROM payout_job_status($job)"),
		'completed|20|20', "$name: all others are paid");
	$node->safe_psql('app', 'SELECT payout_stop_workers()');
	wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
	return;
}
