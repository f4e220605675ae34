# Schedules with the real pg_cron, from a database that is not pg_cron's own:
# which jobs are made, for whom, and that one real minute does the work of all
# four of them.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $never = '0 0 1 1 *';
my $node = start_node('main', preload => 'payoutq,pg_cron', conf => q(
cron.use_background_workers = on
cron.database_name = 'postgres'
max_worker_processes = 32
payoutq.retention = '30d'
));
$node->safe_psql('postgres', q{
	CREATE EXTENSION pg_cron;
	CREATE EXTENSION payoutq;
	CREATE ROLE keeper LOGIN;
	CREATE ROLE clerk LOGIN});
create_db_with_extension($node, $_) foreach ('app', 'other', 'gone');
$node->safe_psql($_, q{SELECT payout_grant('keeper', 'admin'), payout_grant('clerk', 'admin')})
  foreach ('postgres', 'app', 'other', 'gone');
my ($code, $out, $error);

# One set
is(schedule('app'), 4, 'four jobs are made');
my $guard = q{DO $$BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'payoutq' AND extnamespace = 'public'::pg_catalog.regnamespace) THEN %s; END IF; END$$};
my @standard = map { sprintf "payoutq %s|%s|$guard|app|postgres|t", @$_ } (
	[ 'deadlines', '* * * * *', 'PERFORM public.payout_run_deadlines(pg_catalog.now())' ],
	[ 'maintenance', '30 3 * * *', 'PERFORM public.payout_maintain(1000000::pg_catalog.int4)' ],
	[ 'notifications', '* * * * *', 'PERFORM public.payout_run_notifications(pg_catalog.now())' ],
	[ 'process', '*/5 * * * *', 'CALL public.payout_process(NULL::pg_catalog.int4, NULL::pg_catalog.int8)' ]);
is(jobs('true'), join("\n", @standard), 'as they are documented');
is(schedule('app'), 4, 'again');
is(jobs('true'), join("\n", @standard), 'there is one set');
is($node->safe_psql('app', 'SELECT name, schedule, command, username, active FROM payout_schedules ORDER BY name'),
	join("\n", map { s/\|app//r } @standard), 'payout_schedules shows it');

# Arguments
is(schedule('app', q(process => '*/2 * * * *', deadlines => '*/3 * * * *', maintenance => '0 5 * * *')), 4, 'other times');
is(intervals('app'), 'deadlines */3 * * * *, maintenance 0 5 * * *, notifications * * * * *, process */2 * * * *', 'are the new ones');
is(schedule('app', 'process => NULL, maintenance => NULL'), 2, 'null leaves a job out');
is(intervals('app'), 'deadlines * * * * *, notifications * * * * *', 'and removes it');
($code, $out, $error) = $node->psql('app', q{SELECT payout_schedule(deadlines => 'every minute')});
like($error, qr/ERROR:  invalid schedule: every minute/, 'no cron expression');
is(intervals('app'), 'deadlines * * * * *, notifications * * * * *', 'changes nothing');

# Jobs that are not ours stay, whatever they are called.
$node->safe_psql('postgres', q{
	SELECT cron.schedule_in_database('nightly', '0 0 1 1 *', 'VACUUM', 'app'),
	       cron.schedule_in_database('payoutqueue', '0 0 1 1 *', 'VACUUM', 'app')});

# Roles: the one who calls, who need not be a superuser
is(schedule('app', '', 'keeper'), 4, 'a role with the level admin');
is($node->safe_psql('app', 'SELECT DISTINCT username FROM payout_schedules'), 'keeper', 'replaces the set of another');
is(schedule('app', '', 'clerk'), 4, 'so does a third one');
is(jobs(q(username <> 'clerk' AND jobname LIKE 'payoutq %')), '', 'and nothing is left of the others');
$node->safe_psql('app', q{SELECT payout_revoke('clerk'); SELECT payout_grant('clerk', 'operator')});
foreach my $call ('payout_schedule()', 'payout_unschedule()', q{payoutq.execute_in('postgres', 'SELECT 1')},
	q{payoutq.execute_in_cron('SELECT 1')})
{
	($code, $out, $error) = $node->psql('app', "SELECT $call", extra_params => [ '-U', 'clerk' ]);
	like($error, qr/permission denied/, "not for an operator: $call");
}
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules', extra_params => [ '-U', 'clerk' ]),
	4, 'who sees the schedules');
foreach my $arguments (q(process => NULL, deadlines => 'every minute'), q(deadlines => '* * * *'))
{
	my $before = jobs(q(database = 'app'));
	($code, $out, $error) = $node->psql('app', "SELECT payout_schedule($arguments)", extra_params => [ '-U', 'keeper' ]);
	like($error, qr/ERROR:  invalid schedule/, "a call that fails: $arguments");
	is(jobs(q(database = 'app')), $before, 'removes nothing');
}

# Databases, among them pg_cron's own
is(schedule('other', '', 'clerk'), 4, 'another database, the same role');
is(schedule('postgres', '', 'clerk'), 4, 'the database of pg_cron, the same role');
is(schedule($_, '', 'clerk'), 4, "$_: again") foreach ('other', 'postgres');
is($node->safe_psql('postgres', q{SELECT database, count(*), count(DISTINCT command) FROM cron.job
		WHERE jobname LIKE 'payoutq %' GROUP BY 1 ORDER BY 1}),
	"app|4|4\nother|4|4\npostgres|4|4", 'each has its set');
is($node->safe_psql($_, 'SELECT count(*) FROM payout_schedules'), 4, "$_ sees its own") foreach ('app', 'other', 'postgres');
is(unschedule('other'), 4, 'other: unscheduled');
is(unschedule('other'), 0, 'there is nothing left');
is($node->safe_psql('postgres', q{BEGIN; SELECT payout_unschedule(); ROLLBACK; SELECT count(*) FROM payout_schedules}),
	"4\n4", 'the database of pg_cron: rolled back');
is(unschedule('postgres'), 4, 'the database of pg_cron: unscheduled');
is($node->safe_psql('postgres', q{SELECT database, count(*) FROM cron.job WHERE jobname LIKE 'payoutq %' GROUP BY 1}),
	'app|4', 'the first one still has its set');
is(schedule('other', "'$never', '$never', '$never', '$never'"), 4, 'the second one can come back');
is($node->safe_psql('other', 'SELECT last_run, result, duration, message FROM payout_schedules'), join("\n", ('|||') x 4), 'not run yet');

# What one minute must show, but not before all is ready.  Nobody else does it:
# there is no worker here.
is(schedule('app', "'$never', '$never', '$never', '$never'", 'keeper'), 4, 'not now');
$node->safe_psql('app', 'SELECT payout_stop_workers()');
wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
my $job = create_job($node, 'app', 'scheduled', 700);
$node->safe_psql('app', q{
	SELECT payout_deposit(u, 100, 'deposit ' || u) FROM unnest('{yes,no}'::text[]) u;
	SELECT payout_create_challenge('due', now() + '1 day', 'creator', 'yes', 'no');
	SELECT payout_create_challenge('ending', now() + '40 minutes', 'creator', 'yes', 'no');
	SELECT payout_create_challenge('old', now() - interval '40 days', 'creator', 'yes', 'no');
	SELECT payout_place_stake(c, lower(side), side, 10, at => now() - interval '41 days')
	  FROM generate_series(1, 3) c, unnest('{YES,NO}'::text[]) side;
	SELECT payout_run_notifications(now() - interval '40 days 30 minutes');
	SELECT payout_run_deadlines(now() - interval '40 days');
	UPDATE payoutq.challenge SET due_at = now() WHERE title = 'due'});
is($node->safe_psql('app', 'SELECT title, status FROM payout_challenges ORDER BY id'),
	"due|active\nending|active\nold|pending_admin", 'a due challenge, and one that ends soon');
is($node->safe_psql('app', 'SELECT type, count(*) FROM payout_notifications GROUP BY 1 ORDER BY 1'),
	"challenge_ending_1_hour|3\nchallenge_pending_review|3", 'old notifications');

# Who did it
$node->safe_psql('app', q{
	CREATE TABLE witness (what text, who text);
	CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.witness VALUES (TG_TABLE_NAME || ' ' || lower(TG_OP), session_user);
		RETURN NULL;
	END $$;
	CREATE TRIGGER witness AFTER UPDATE OF status ON payoutq.challenge FOR EACH ROW EXECUTE FUNCTION witness();
	CREATE TRIGGER witness AFTER INSERT OR DELETE ON payoutq.notification FOR EACH ROW EXECUTE FUNCTION witness();
	CREATE TRIGGER witness AFTER INSERT ON payoutq.entry FOR EACH STATEMENT EXECUTE FUNCTION witness();
	CREATE TRIGGER witness AFTER UPDATE OF status ON payoutq.batch FOR EACH ROW EXECUTE FUNCTION witness()});

# Beside it: a role that has lost its rights, and a database that is gone.
is(schedule('other', "NULL, '$never', NULL, NULL", 'clerk'), 1, 'another role');
$node->safe_psql('other', q{SELECT payout_revoke('clerk')});
is(schedule('gone', "NULL, '$never', NULL, NULL"), 1, 'a database that is dropped');
$node->safe_psql('postgres', 'DROP DATABASE gone');
$node->safe_psql('postgres', q{
	SELECT cron.alter_job(jobid, schedule => '* * * * *') FROM cron.job
	WHERE database IN ('other', 'gone') AND jobname LIKE 'payoutq deadlines%'});
is(schedule('app', q('* * * * *', '* * * * *', '* * * * *', '* * * * *'), 'keeper'), 4, 'every minute');

# The minute
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_schedules WHERE result = 'succeeded'}, 4, 130),
	'all four have run');

# The notifications of the same second may have had it locked: then the next run does it.
ok(wait_for($node, 'app', q{SELECT status FROM payout_challenges WHERE title = 'due'}, 'pending_admin', 130),
	'what is due is closed');
is($node->safe_psql('app', "SELECT status, completed_count FROM payout_job_status($job)"),
	'completed|700', 'the job is paid');
paid_once_ok($node, 'app', 700, 'scheduled');
is($node->safe_psql('app', 'SELECT title, status FROM payout_challenges ORDER BY id'),
	"due|pending_admin\nending|active\nold|pending_admin", 'the due challenge is closed');
is($node->safe_psql('app', q{SELECT type, c.title, count(*), count(DISTINCT n.user_id), min(n.created_at) > now() - interval '1 hour'
		FROM payout_notifications n JOIN payout_challenges c ON c.id = challenge_id GROUP BY 1, 2 ORDER BY 1}),
	"challenge_ending_1_hour|ending|3|3|t\nchallenge_pending_review|due|3|3|t",
	'roles are told, and what was old is removed');
is($node->safe_psql('app', 'SELECT what, count(*), min(who), max(who) FROM witness GROUP BY 1 ORDER BY 1'),
	"batch update|2|keeper|keeper\nchallenge update|1|keeper|keeper\n"
	  . "notification delete|6|keeper|keeper\nnotification insert|6|keeper|keeper",
	'it was all done as the role that has scheduled it');
is($node->safe_psql('app', q{SELECT name, username, last_run > now() - interval '10 minutes' AND last_run <= now(),
		duration > '0' AND duration < '1 minute', message <> ''
		FROM payout_schedules ORDER BY name}),
	join("\n", map { "payoutq $_|keeper|t|t|t" } ('deadlines', 'maintenance', 'notifications', 'process')),
	'payout_schedules shows the last run');

# What failed says why, and disturbs nothing else.
ok(wait_for($node, 'other', q{SELECT message ~ 'permission denied for function payout_run_deadlines'
		FROM payout_schedules WHERE result = 'failed' AND duration > '0'}, 't', 130),
	'the run of a role without rights has failed, and says why');
ok(wait_for($node, 'postgres', q{SELECT status FROM cron.job_run_details WHERE database = 'gone' ORDER BY runid LIMIT 1}, 'failed', 130),
	'so has the one for a database that is gone');

# A database of that name takes over what was left of it.
create_db_with_extension($node, 'gone');
is($node->safe_psql('gone', 'SELECT name, result FROM payout_schedules'), 'payoutq deadlines|failed', 'it shows');
is(unschedule('gone'), 1, 'and can be removed');

# The end
is(unschedule('app', 'keeper'), 4, 'unscheduled');
is(jobs(q(database = 'app')), "nightly|$never|VACUUM|app|postgres|t\npayoutqueue|$never|VACUUM|app|postgres|t",
	'jobs of others stay');
is($node->safe_psql('app', 'SELECT count(*) FROM payout_schedules'), 0, 'and are not shown');
books_ok($node, 'app', 'at the end');
is($node->safe_psql('postgres', q{DROP DATABASE app; SELECT count(*) FROM pg_database WHERE datname = 'app'}), 0,
	'the database can be dropped');
$node->safe_psql('other', 'DROP EXTENSION payoutq');
is(worker_errors($node), '', 'no complaint of a worker');

$node->stop;
done_testing();

sub schedule
{
	my ($db, $arguments, $role) = @_;
	return $node->safe_psql($db, 'SELECT payout_schedule(' . ($arguments // '') . ')',
		extra_params => [ '-U', $role // 'postgres' ]);
}

sub unschedule
{
	my ($db, $role) = @_;
	return $node->safe_psql($db, 'SELECT payout_unschedule()', extra_params => [ '-U', $role // 'postgres' ]);
}

sub jobs
{
	my ($condition) = @_;
	return $node->safe_psql('postgres', qq{
		SELECT jobname, schedule, command, database, username, active FROM cron.job
		WHERE $condition ORDER BY jobname COLLATE "C", database});
}

sub intervals
{
	my ($db) = @_;
	return $node->safe_psql($db, q{
		SELECT string_agg(substr(name, 9) || ' ' || schedule, ', ' ORDER BY name) FROM payout_schedules});
}
