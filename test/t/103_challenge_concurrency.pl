# Many run the deadlines and notifications at the same time while stakes come
# in: each challenge is closed once, nobody is told anything twice, and whoever
# listens hears of it once a transaction.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => 'max_connections = 50');
create_db_with_extension($node, 'app');
my $at = '2100-01-01 12:00 UTC';
my $due = 300;

# Of 1,000 challenges: 300 due, 200 that end within 10 minutes, 200 within an
# hour, 200 later, 50 without a due time, 50 that nobody has taken up.
$node->safe_psql('app', qq{
	CREATE TABLE moved (n int NOT NULL);
	CREATE TABLE told (n int NOT NULL);
	CREATE SEQUENCE clock;
	SELECT payout_create_job('fund', array_agg('u' || i), array_agg(1000000::bigint)) FROM generate_series(1, 100) i;
	SELECT count(payout_create_challenge('c' || i, CASE
	           WHEN i <= $due THEN timestamptz '$at' - i * interval '1 second'
	           WHEN i <= 500 THEN timestamptz '$at' + (i - $due) * interval '3 seconds'
	           WHEN i <= 700 THEN timestamptz '$at' + interval '10 minutes' + (i - 500) * interval '15 seconds'
	           WHEN i <= 900 THEN timestamptz '$at' + interval '1 hour' + (i - 700) * interval '1 second'
	           WHEN i > 950 THEN timestamptz '$at' END,
	       'creator' || i % 7, 'u' || i % 100 + 1, 'u' || (i + 1) % 100 + 1)) FROM generate_series(1, 1000) i});
wait_for_job($node, 'app', "'fund'");
$node->safe_psql('app', q{
	SELECT count(payout_place_stake(i, u || i % 100 + 1, side, 10))
	FROM generate_series(1, 950) i, (VALUES ('u', 'YES'), ('u', 'NO')) s (u, side)});

# Always four runs of the deadlines share a moment, three seconds before that of
# the next four, so that challenges are closed while stakes are placed on them.
my %script = (
	deadlines => qq{
INSERT INTO moved SELECT payout_run_deadlines('$at'::timestamptz - $due * interval '1 second'
	+ least(nextval('clock') / 4 * 3, $due) * interval '1 second');
},
	notifications => "INSERT INTO told SELECT payout_run_notifications('$at');\n",
	stake => q{
\set c random(1, 950)
\set u random(1, 100)
\set amount random(1, 50)
DO 'BEGIN PERFORM payout_place_stake(:c, ''u:u'', (ARRAY[''YES'',''NO''])[:u % 2 + 1], :amount);
    EXCEPTION WHEN object_not_in_prerequisite_state THEN NULL; END';
});
my @files;
foreach my $name (sort keys %script)
{
	my $file = PostgreSQL::Test::Utils::tempdir() . "/$name";
	append_to_file($file, $script{$name});
	push @files, '-f', $file . ($name eq 'stake' ? '@3' : '@1');
}
my $before = $node->safe_psql('app', 'SELECT max(id) FROM payout_stakes');
$node->command_checks_all([ 'pgbench', '-n', '-c', 16, '-j', 2, '-t', 150, '--random-seed=1', @files, $node->connstr('app') ],
	0, [qr{processed: 2400/2400}], [qr{^(?!.*error)}s], 'sixteen sessions');

is($node->safe_psql('app', qq{
		INSERT INTO moved SELECT payout_run_deadlines('$at');
		SELECT sum(n), count(*) FILTER (WHERE n > 0) > 10 FROM moved}),
	"$due|t", 'each challenge that is due is closed once');
is($node->safe_psql('app', 'SELECT status, count(*), min(id), max(id) FROM payout_challenges GROUP BY 1 ORDER BY 1'),
	"active|650|301|950\npending|50|951|1000\npending_admin|$due|1|$due", 'and no other');
cmp_ok($node->safe_psql('app', "SELECT count(*) FROM payout_stakes WHERE challenge_id <= $due AND id > $before"), '>', 10,
	'stakes came in meanwhile');
is($node->safe_psql('app', q{
		SELECT count(*) FROM payout_challenges c
		  LEFT JOIN (SELECT challenge_id, sum(amount) FILTER (WHERE side = 'YES') AS yes, sum(amount) FILTER (WHERE side = 'NO') AS no
		               FROM payout_stakes GROUP BY 1) s ON s.challenge_id = c.id
		 WHERE (pool, yes_pool, no_pool, payout_balance('@challenge:' || id))
		    IS DISTINCT FROM (coalesce(yes + no, 0), coalesce(yes, 0), coalesce(no, 0), coalesce(yes + no, 0))}),
	0, 'each pool is what was staked');

# creator, challenger and challenged are three; notifications may have told of
# the end of a challenge just before it was closed.
is($node->safe_psql('app', q{
		SELECT type, count(*), count(DISTINCT (challenge_id, user_id)), min(challenge_id), max(challenge_id), min(urgency)
		FROM payout_notifications GROUP BY 1 ORDER BY 1}),
	"challenge_ending_10_mins|600|600|301|500|critical\nchallenge_ending_1_hour|600|600|501|700|high\n"
	  . 'challenge_pending_review|' . 3 * $due . '|' . 3 * $due . "|1|$due|normal",
	'each is told once, what it is');
cmp_ok($node->safe_psql('app', 'SELECT sum(n) FROM told'), '>=', 1200, 'which is what the runs say');
books_ok($node, 'app', 'afterwards');

# Afterwards
is(run('deadlines', $at) . run('notifications', $at), '00', 'the next run at the same moment finds nothing');
my $later = "$at'::timestamptz + '29 minutes";
is(run('notifications', $later), 3 * (200 + 116 + 200), 'a later one finds what is new: due, due soon, due within an hour');
is($node->safe_psql('app', q{
		SELECT count(*) FROM (SELECT FROM payout_notifications GROUP BY challenge_id, user_id, type HAVING count(*) > 1) twice}),
	0, 'nothing was told twice');

# Whoever listens hears once of each transaction that wrote something.
my $listener = $node->background_psql('app');
$listener->query_safe('LISTEN payoutq_notifications');
my $evening = "$at'::timestamptz + '20 days 8 hours";
$at = "$at'::timestamptz + '20 days";
$node->safe_psql('app', qq{
	SELECT payout_run_notifications('$later');
	BEGIN; SELECT payout_run_deadlines('$at'); ROLLBACK;
	NOTIFY payoutq_notifications, 'first';
	BEGIN; SELECT payout_run_notifications('$at'); SELECT payout_run_deadlines('$evening'); COMMIT;
	NOTIFY payoutq_notifications, 'second';
	SELECT payout_run_notifications('$evening'), payout_run_deadlines('$evening');
	NOTIFY payoutq_notifications, 'third'});
my @heard = heard('third');
is_deeply([ map { s/^\{"event" ?: ?"created", ?"transaction_at" ?: ?"[^"]+"\}$/created/r } @heard ],
	[ 'first', 'created', 'second', 'third' ], 'one notification a transaction, none without a row') or diag("@heard");
is($node->safe_psql('app', qq{SELECT count(*) FROM payout_notifications WHERE created_at IN ('$at', '$evening')}), 2 * 3 * 600, 'of many rows');

# Winners: two batches are two transactions.
wait_for_job($node, 'app', create_job($node, 'app', 'fund many', 700, prefix => 'w'));
$node->safe_psql('app', q{
	SELECT payout_create_challenge('crowd', '2200-01-01', min_stakes => 1);
	SELECT count(payout_place_stake(1001, 'w' || i, 'YES', 1)) FROM generate_series(1, 700) i;
	SELECT payout_run_deadlines('2200-01-01')});
wait_for_job($node, 'app', $node->safe_psql('app', q{SELECT payout_job_id FROM payout_resolve_challenge(1001, 'challenger_won')}));
$node->safe_psql('app', q{NOTIFY payoutq_notifications, 'fourth'});
@heard = heard('fourth');
is(scalar(grep { /created/ } @heard), 2, 'one notification a batch of winners') or diag("@heard");
is($node->safe_psql('app', q{SELECT count(*) FROM payout_notifications WHERE type = 'payout_received'}), 700, 'who are all told');
books_ok($node, 'app', 'at the end');

$listener->quit;
$node->stop;
done_testing();

sub run
{
	my ($what, $when) = @_;
	return $node->safe_psql('app', "SELECT payout_run_$what('$when')");
}

# What the listener hears until our own word; the queue keeps the order.
sub heard
{
	my ($last) = @_;
	my $heard = '';
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	$heard .= $listener->query_safe('SELECT 1') while $heard !~ /payload "$last"/ && time() < $end;
	return $heard =~ /"payoutq_notifications" with payload "(.*?)" received/g;
}
