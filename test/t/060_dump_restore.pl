# A dump of a half-done job, restored into another database, goes on there by
# itself once all of it is there, and the original is left alone.

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

# One job that is completed, one in the middle, one paused, and one that pays
# into a table of the application, all in books with other movements.
wait_for_job($node, 'app', create_job($node, 'app', 'completed', 500, args => 'platform_fee => 3'));
$node->safe_psql('app', q{
	SELECT count(payout_deposit('u' || i, 7, 'deposit ' || i)) FROM generate_series(1, 100) i;
	SELECT count(payout_withdraw('u' || i, 7, 'withdrawal ' || i)) FROM generate_series(1, 100) i;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL);
	INSERT INTO users SELECT 'u' || i, 0 FROM generate_series(1, 50000) i;
	SELECT payout_bind_accounts('users', 'user_id', 'balance', 'COIN')});
$node->safe_psql('app', 'SELECT payout_stop_workers()');
wait_for($node, 'app', 'SELECT count(*) FROM payout_workers', 0);
my %job = (
	half => create_job($node, 'app', 'half', 1000, args => 'batch_size => 50, platform_fee => 4'),
	paused => create_job($node, 'app', 'paused', 1000, prefix => 'paused', args => 'batch_size => 50'),
	bound => create_job($node, 'app', 'bound', 1000, args => q(batch_size => 50, currency => 'COIN')));
$node->safe_psql('app', "CALL payout_process(max_batches => 7, job_id => $job{$_})") foreach sort keys %job;
$node->safe_psql('app', "SELECT payout_pause_job($job{paused})");
my $state = q{SELECT job_id, status, completed_count, amount_paid FROM payout_jobs ORDER BY 1};
my $before = $node->safe_psql('app', $state);
is($before, "1|completed|500|125250\n"
	  . join("\n", map { "$_|" . ($_ == $job{paused} ? 'paused' : 'running') . '|350|' . paid($_) }
		  sort { $a <=> $b } values %job),
	'half of the work is done');

# Restored by psql, in parallel, and with a part missing
my ($dump, $script) = ("$tmp/dump", "$tmp/script");
my $to = $node->connstr('postgres');
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr('app') ], 'pg_dump');
$node->command_ok([ 'pg_dump', '-f', $script, $node->connstr('app') ], 'pg_dump as a script');
$node->safe_psql('postgres', "CREATE DATABASE $_") foreach ('plain', 'parallel', 'partial', 'sections');
my $list = list_without('payoutq account');
$node->command_ok([ 'pg_restore', '-L', $list, '-d', $node->connstr('partial'), $dump ], 'without accounts');
$node->command_ok([ 'pg_restore', '--section=pre-data', '--section=data', '-d', $node->connstr('sections'), $dump ],
	'without indexes');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $script, '-o', "$tmp/out", '-d', $node->connstr('plain') ], 'psql');
$node->command_ok([ 'pg_restore', '-j2', '-d', $node->connstr('parallel'), $dump ], 'pg_restore -j2');

# What is not whole is not paid, and says why, until the rest is there.  Workers
# look every ten seconds; we do not want to wait for that here.
ok(wait_for($node, 'partial', qq{
		CALL payout_process();
		SELECT error ~ 'restored.*account_balances' FROM payout_job_status($job{half})}),
	'partial: the job says what it waits for');
is($node->safe_psql('partial', $state), $before, 'partial: nothing is paid');
$node->command_ok([ 'pg_restore', '-a', '-n', 'payoutq', '-t', 'account', '-d', $node->connstr('partial'), $dump ],
	'the accounts come later');

# Nor while the bound table has no unique key yet, and maybe no trigger.
ok(wait_for($node, 'sections', qq{
		CALL payout_process();
		SELECT error ~ 'restored.*bound table' FROM payout_job_status($job{bound})}),
	'sections: the job waits for the bound table');
is($node->safe_psql('sections', "SELECT completed_count FROM payout_job_status($job{bound})"),
	350, 'sections: nothing is paid into it');
$node->command_ok([ 'pg_restore', '--section=post-data', '-d', $node->connstr('sections'), $dump ],
	'the indexes come later');

foreach my $db ('plain', 'parallel')
{
	ok(wait_for_job($node, $db, $job{half}), "$db: the job goes on by itself");
	ok(wait_for_job($node, $db, $job{bound}), "$db: and the one into the bound table");
	is($node->safe_psql($db, "SELECT status, completed_count FROM payout_job_status($job{paused})"),
		'paused|350', "$db: what was paused is paused");
	$node->safe_psql($db, "SELECT payout_resume_job($job{paused})");
	$node->safe_psql($db, 'CALL payout_process()');
	ok(wait_for_job($node, $db, $job{paused}), "$db: until it is resumed");

	is($node->safe_psql($db, q{
			SELECT count(*), count(*) FILTER (WHERE balance <> substr(user_id, 2)::int *
			       CASE WHEN substr(user_id, 2)::int <= 500 THEN 2 ELSE 1 END)
			FROM payout_accounts WHERE user_id ~ '^u\d'}),
		'1000|0', "$db: everybody is paid once by each job");
	paid_once_ok($node, $db, 1000, "$db, paused job", prefix => 'paused');
	paid_once_ok($node, $db, 1000, "$db, bound table", accounts => 'users');
	is($node->safe_psql($db, q{SELECT payout_balance('@platform')}), 7, "$db: the fees");

	cmp_ok(create_job($node, $db, 'next', 10, prefix => 'next'), '>', $job{bound}, "$db: ids go on");
	ok(wait_for_job($node, $db, "'next'"), "$db: a new job is paid");
	my ($code, $out, $error) = $node->psql($db, 'DELETE FROM payoutq.entry');
	like($error, qr/not allowed/, "$db: the ledger is append-only");
}

# The part that came later was all that was missing.
$node->safe_psql($_, 'CALL payout_process()') foreach ('partial', 'sections');
ok(wait_for_job($node, 'partial', $job{half}), 'partial: now the job goes on');
is($node->safe_psql('partial', "SELECT error FROM payout_job_status($job{half})"), '', 'and has no error');
books_ok($node, 'partial', 'partial');

ok(wait_for_job($node, 'sections', $job{bound}), 'sections: now the job goes on');
paid_once_ok($node, 'sections', 1000, 'sections', accounts => 'users');

# The original
is($node->safe_psql('app', $state), $before, 'the original has not changed');
$node->safe_psql('app', 'SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $job{half}), 'and goes on when it is told to');
books_ok($node, 'app', 'original');

$node->stop;
done_testing();

sub paid
{
	my ($job) = @_;
	return $node->safe_psql('app', "SELECT sum(amount) FROM payout_entries
		WHERE job_id = $job AND entry <= 350");
}

# A table of contents of the dump without the data of one table
sub list_without
{
	my ($table) = @_;
	my ($out, $error) = run_command([ 'pg_restore', '-l', $dump ]);
	my @lines = grep { !/ TABLE DATA $table / } split /^/, $out;
	append_to_file("$tmp/list", join('', @lines));
	return "$tmp/list";
}
