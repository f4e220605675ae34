# A dump of challenges in every state, restored into another database: each goes
# on from where it was. And the life of a challenge without the background
# worker.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(payoutq.interval = 1s));
create_db_with_extension($node, 'app');
my $tmp = PostgreSQL::Test::Utils::tempdir();

# Ten people on each side of each challenge; y<i> and n<i> stake i.
my @states = ('pending', 'active', 'awaiting', 'resolved', 'half paid', 'refunding', 'cancelled', 'completed', 'drawn');
$node->safe_psql('app', q{
	SELECT payout_create_job('fund', array_agg(side || i), array_agg(1000::bigint))
	FROM generate_series(1, 10) i, unnest('{y,n}'::text[]) side});
wait_for_job($node, 'app', "'fund'");
my %id = map { $_ => $node->safe_psql('app', qq{
	SELECT payout_create_challenge('$_', '2100-01-01', 'creator', 'y1', 'n1', fee_bps => 1000, description => 'of a test',
	                               metadata => '{"state": "$_"}')}) } @states;
my $place = q{
	SELECT count(payout_place_stake(%d, side || i, CASE side WHEN 'y' THEN 'YES' ELSE 'NO' END, i, reference => %d || side || i))
	FROM generate_series(1, 10) i, unnest('{%s}'::text[]) side};
$node->safe_psql('app', sprintf($place, $id{$_}, $id{$_}, $_ eq 'pending' ? 'y' : 'y,n')) foreach @states;
$node->safe_psql('app', qq{
	SELECT payout_add_evidence($id{awaiting}, 'y1', '"a picture"');
	UPDATE payoutq.challenge SET due_at = NULL WHERE id IN ($id{active}, $id{cancelled});
	SELECT payout_run_deadlines('2100-01-01')});

# No worker from here on: what is not paid by hand stays.
$node->safe_psql('app', 'SELECT payout_stop_workers()');
wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
foreach my $name ('completed', 'drawn', 'half paid', 'resolved', 'refunding')
{
	my $result = $name eq 'drawn' || $name eq 'refunding' ? 'draw' : 'challenger_won';
	my $job = $node->safe_psql('app', qq{
		SET payoutq.batch_size = 4;
		SELECT coalesce(payout_job_id, refund_job_id) FROM payout_resolve_challenge($id{$name}, '$result', 'seen by me')});
	$node->safe_psql('app', "CALL payout_process(max_batches => 2, job_id => $job)") if $name eq 'half paid';
	$node->safe_psql('app', "CALL payout_process(job_id => $job)") if $name eq 'completed' || $name eq 'drawn';
}
$node->safe_psql('app', "SELECT payout_cancel_challenge($id{cancelled}, 'by mistake')");
my $state = q{
	SELECT c.title, c.status, c.result, c.pool, j.kind, j.status, j.total_winners, j.completed_count, j.total_winners IS NULL AS unexpanded
	FROM payout_challenges c LEFT JOIN payout_jobs j ON j.challenge_id = c.id ORDER BY c.id};
is($node->safe_psql('app', $state), join("\n",
		'pending|pending||55|||||t',
		'active|active||110|||||t',
		'awaiting|pending_admin||110|||||t',
		'resolved|pending_admin|challenger_won|110|payout|queued|0|0|f',
		'half paid|pending_admin|challenger_won|110|payout|running|10|8|f',
		'refunding|pending_admin|draw|110|refund|queued|0|0|f',
		'cancelled|cancelled||110|refund|queued|0|0|f',
		'completed|completed|challenger_won|110|payout|completed|10|10|f',
		'drawn|completed|draw|110|refund|completed|20|20|f'),
	'challenges in every state');
books_ok($node, 'app', 'original');

# Three copies, one of them without the challenges
my ($dump, $script) = ("$tmp/dump", "$tmp/script");
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr('app') ], 'pg_dump');
$node->command_ok([ 'pg_dump', '-f', $script, $node->connstr('app') ], 'pg_dump as a script');
my ($contents) = run_command([ 'pg_restore', '-l', $dump ]);
append_to_file("$tmp/list", join '', grep { !/ TABLE DATA payoutq challenge / } split /^/, $contents);
my @copies = ('plain', 'parallel');
$node->safe_psql('postgres', "CREATE DATABASE $_") foreach (@copies, 'partial');

# Jobs of a copy wait until its books are looked at, and then only for what is
# not there.  Here that is early: nobody has paid yet.
$node->command_ok([ 'pg_restore', '-L', "$tmp/list", '-d', $node->connstr('partial'), $dump ], 'without challenges');
ok(wait_for($node, 'partial', q{
		CALL payout_process();
		SELECT count(*) FROM payout_jobs WHERE error ~ 'restored.*challenge'}, 4),
	'partial: the jobs say what they wait for');
is($node->safe_psql('partial', q{SELECT sum(completed_count) FROM payout_jobs WHERE challenge_id IN (
		SELECT challenge_id FROM payout_jobs WHERE status <> 'completed')}), 8, 'partial: nothing is paid');
$node->command_ok([ 'pg_restore', '-a', '-n', 'payoutq', '-t', 'challenge', '-d', $node->connstr('partial'), $dump ],
	'the challenges come later');

$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $script, '-o', "$tmp/out", '-d', $node->connstr('plain') ], 'psql');
$node->command_ok([ 'pg_restore', '-j2', '-d', $node->connstr('parallel'), $dump ], 'pg_restore -j2');

# They go on by themselves, and all end the same.
$node->safe_psql('app', 'SELECT payout_start_worker()');
my %end;
foreach my $db (@copies, 'partial', 'app')
{
	is($node->safe_psql($db, q{SELECT count(*) FROM payout_challenges WHERE metadata->>'state' = title AND description = 'of a test'}),
		scalar(@states), "$db: all challenges are there");
	$node->safe_psql($db, 'CALL payout_process()') if $db eq 'partial';
	ok(wait_for($node, $db, q{SELECT count(*) FROM payout_jobs WHERE status = 'completed' AND completed_count = total_winners}, 7),
		"$db: all jobs are completed");
	is($node->safe_psql($db, q{SELECT title, status, result FROM payout_challenges WHERE completed_at IS NOT NULL ORDER BY id}), join("\n",
			'resolved|completed|challenger_won', 'half paid|completed|challenger_won', 'refunding|completed|draw',
			'cancelled|cancelled|', 'completed|completed|challenger_won', 'drawn|completed|draw'),
		"$db: and their challenges");

	# The others live on.
	is($node->safe_psql($db, 'SELECT title, evidence->0->>$$evidence$$, pool, yes_stakes FROM payout_challenges_awaiting'),
		'awaiting|a picture|110|10', "$db: one awaits its result");
	my $stake = $node->safe_psql($db, q{SELECT max(id) FROM payout_stakes});
	is($node->safe_psql($db, qq{SELECT payout_place_stake($id{active}, 'y10', 'YES', 10, reference => '$id{active}y10') <= $stake}),
		't', "$db: a stake that is asked for again is not placed again");
	$node->safe_psql($db, sprintf($place, $id{pending}, $id{pending}, 'n'));
	cmp_ok($node->safe_psql($db, 'SELECT max(id) FROM payout_stakes'), '>=', $stake + 10, "$db: new ones are");
	$node->safe_psql($db, qq{
		UPDATE payoutq.challenge SET due_at = '2100-02-01' WHERE id = $id{active};
		SELECT payout_run_deadlines('2100-02-01');
		SELECT payout_resolve_challenge(id, 'challenged_won') FROM payout_challenges_awaiting});
	ok(wait_for($node, $db, q{SELECT string_agg(DISTINCT status, ' ') FROM payout_challenges}, 'cancelled completed'),
		"$db: all challenges are at their end");
	books_ok($node, $db, "$db, at the end");
	$end{$db} = $node->safe_psql($db, q{
		SELECT user_id, balance FROM payout_accounts UNION ALL SELECT '@platform', payout_balance('@platform')
		UNION ALL SELECT type || ' ' || user_id || ' ' || body, count(*) FROM payout_notifications GROUP BY 1 ORDER BY 1});
	is($node->safe_psql($db, q{SELECT c.title, count(*), count(DISTINCT n.user_id) FROM payout_notifications n
			JOIN payout_challenges c ON c.id = n.challenge_id WHERE type = 'payout_received' GROUP BY 1 ORDER BY 1}),
		join("\n", map { "$_|10|10" } ('active', 'awaiting', 'completed', 'half paid', 'pending', 'resolved')),
		"$db: winners are told, once");
	cmp_ok($node->safe_psql($db, q{SELECT payout_create_challenge('next')}), '>', @states, "$db: ids go on");
}
is($end{$_}, $end{app}, "$_: everybody has what he has in the original") foreach (@copies, 'partial');
$node->stop;

# Without the background worker
$node = start_node('alone', preload => '');
create_db_with_extension($node, 'app');
create_job($node, 'app', 'fund', 20);
is($node->safe_psql('app', q{
		CALL payout_process();
		SELECT payout_create_challenge('alone', '2100-01-01', 'creator', 'u10', 'u11', fee_bps => 500);
		SELECT payout_run_notifications('2099-12-31 23:30');
		SELECT count(payout_place_stake(1, 'u' || i, CASE WHEN i % 2 = 0 THEN 'YES' ELSE 'NO' END, i)) FROM generate_series(10, 19) i;
		SELECT payout_run_notifications('2099-12-31 23:30');
		SELECT payout_run_deadlines('2100-01-01');
		SELECT payout_resolve_challenge(1, 'challenger_won')}),
	"1\n0\n10\n3\n1\n" . '(1,challenger_won,2,,"5 winning stakes share 138 minor units of USD, after a fee of 7.")', 'a challenge is resolved');
is($node->safe_psql('app', 'SELECT status, progress FROM payout_job_status(2)'), 'queued|0.0000', 'and nothing is paid');
is($node->safe_psql('app', q{
		CALL payout_process();
		SELECT status, completed_at IS NOT NULL FROM payout_challenges;
		SELECT status, completed_count, progress, amount_paid, platform_fee FROM payout_job_status(2);
		SELECT type, count(*) FROM payout_notifications GROUP BY 1 ORDER BY 1;
		SELECT user_id, balance - substr(user_id, 2)::int FROM payout_accounts WHERE balance <> substr(user_id, 2)::int ORDER BY 1}),
	join("\n", 'completed|t', 'completed|5|1.0000|138|7', 'challenge_ending_1_hour|3', 'challenge_pending_review|3', 'payout_received|5',
		# 138 in proportion to 10, 12, 14, 16 and 18 of 70, less the stake
		'u10|10', 'u11|-11', 'u12|12', 'u13|-13', 'u14|14', 'u15|-15', 'u16|15', 'u17|-17', 'u18|17', 'u19|-19'),
	'until it is asked for');
books_ok($node, 'app', 'without preload');
is($node->safe_psql('app', q{
		SELECT payout_create_challenge('drawn', '2100-01-01');
		SELECT payout_place_stake(2, 'u1', 'YES', 1), payout_place_stake(2, 'u2', 'NO', 2);
		SELECT payout_run_deadlines('2100-01-01');
		SELECT (payout_resolve_challenge(2, 'draw')).refund_job_id;
		CALL payout_process();
		SELECT status, payout_balance('u1'), payout_balance('u2'), payout_balance('@challenge:2') FROM payout_challenges WHERE id = 2}) =~ s/.*\n//sr,
	'completed|1|2|0', 'a draw gives the stakes back');
books_ok($node, 'app', 'at the end');
is(worker_errors($node), '', 'no complaint of a worker');

$node->stop;
done_testing();
