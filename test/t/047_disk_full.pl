# The disk is full in the middle of a job: what is wrong is said, nobody is paid
# twice or left out, no batch is blamed, and it goes on when there is space.
#
# A file system of a fixed size is what PAYOUTQ_TEST_DISK names; without it, the
# test mounts one that only itself can see.

use strict;
use warnings;

BEGIN
{
	use File::Temp 'tempdir';
	use FindBin;

	if (!$ENV{PAYOUTQ_TEST_DISK})
	{
		my $folder = tempdir(CLEANUP => 1);
		my $inside = 'mount -t tmpfs -o size=96m,mode=700 payoutq "$0" && '
		  . "exec unshare --user --map-user=$< --map-group=" . ($( + 0) . ' "$@"';
		my @outside = ('unshare', '--user', '--map-root-user', '--mount');

		if (system("@outside mount -t tmpfs -o size=1m payoutq $folder 2>/dev/null") != 0)
		{
			require Test::More;
			Test::More::plan(skip_all => 'no small file system: PAYOUTQ_TEST_DISK is not set, and we may not mount one');
		}
		$ENV{PAYOUTQ_TEST_DISK} = $folder;
		system(@outside, 'sh', '-c', $inside, $folder, $^X, (map { "-I$_" } @INC), "$FindBin::RealBin/$FindBin::RealScript");
		exit($? >> 8);
	}
}

use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $disk = tempdir(DIR => $ENV{PAYOUTQ_TEST_DISK}, CLEANUP => 1);
my $no_space = 'No space left on device';
my $conf = q(
autovacuum = off
payoutq.retry_base = 50ms
payoutq.retry_cap = 200ms
);

# ---------------------------------------------------------------------------
# Data: a table of the application, then all of a database
# ---------------------------------------------------------------------------

my $node = start_node('data', conf => $conf);
mkdir "$disk/tablespace" or die "could not create a folder on $disk: $!";
$node->safe_psql('postgres', "CREATE TABLESPACE small LOCATION '$disk/tablespace'");
create_db_with_extension($node, 'app');
$node->safe_psql('app', q{
	CREATE ROLE app;
	CREATE TABLE users (user_id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0) TABLESPACE small;
	INSERT INTO users SELECT 'u' || i FROM generate_series(1, 20000) i;
	ALTER TABLE users OWNER TO app;
	GRANT CREATE ON TABLESPACE small TO app;
	SELECT payout_bind_accounts('users', 'user_id', 'balance')});
$node->safe_psql('app', q{
	CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM count(*) FROM pg_catalog.generate_series(1, 20000);
		RETURN NULL;
	END $$;
	CREATE TRIGGER slow AFTER UPDATE ON users FOR EACH STATEMENT EXECUTE FUNCTION slow();
	ALTER FUNCTION slow() OWNER TO app});

my $job = create_job($node, 'app', 'bound', 20_000, args => 'batch_size => 50');
fill($node, 'app', $job);
ok(wait_for($node, 'app', qq{
		SELECT count(*) FILTER (WHERE attempts > 2) > 0 AND bool_and(status = 'retryable' AND error LIKE '%$no_space')
		FROM payout_batches WHERE job_id = $job AND error_code = '53100'}),
	'a bound table: batches wait, say why, and are tried again');
unblamed_ok($node, 'app', $job, 'a bound table');
books_ok($node, 'app', 'a bound table, full');
make_room();
ok(wait_for_job($node, 'app', $job), 'a bound table: goes on');
paid_once_ok($node, 'app', 20_000, 'a bound table', accounts => 'users');

# Where nothing at all can be written, not even that.  An old snapshot keeps
# pages from being cleaned.
$node->safe_psql('postgres', 'CREATE DATABASE small TABLESPACE small');
$node->safe_psql('small', 'CREATE EXTENSION payoutq');
slow_down($node, 'small');
my $session = $node->background_psql('small');
$session->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
$job = create_job($node, 'small', 'all', 20_000, args => 'batch_size => 50');
fill($node, 'small', $job);
ok(wait_for($node, 'small', qq{
		SELECT count(*) > 0 FROM payout_workers WHERE last_error LIKE '%$no_space'}),
	'a whole database: the workers say why');
ok(wait_for_log($node, qr/(?:was not paid, and why could not be recorded: .*$no_space.*?){4}/s),
	'a whole database: the log says it, too, and they try again');
cmp_ok($node->safe_psql('small', 'SELECT max(crashes) FROM payoutq.batch'), '<=', 1,
	'a whole database: trying is not counted over and over');
unblamed_ok($node, 'small', $job, 'a whole database');
my ($status, $out, $error) = $node->psql('small', 'CALL payout_process()');
is($status, 0, 'payout_process() comes back');
like($error, qr/WARNING: .*$no_space/, 'and says why');

my $query = q{SELECT 'q' || i AS user_id, i AS amount FROM generate_series(1, 20000) i};
my $from = $node->safe_psql('small', "SELECT payout_create_job_from('query', \$\$$query\$\$)");
ok(wait_for($node, 'small', qq{
		SELECT status = 'running' AND error LIKE '%$no_space' AND total_winners = 0 FROM payout_jobs WHERE job_id = $from}),
	'a query: its job waits, and says why');

my $create = q{SELECT payout_create_job('created', array_agg('c' || i), array_agg(i::bigint)) FROM generate_series(1, 20000) i};
($status, $out, $error) = $node->psql('small', "\\set VERBOSITY verbose\n$create");
like($error, qr/ERROR:  53100: .*$no_space/, 'creation: refused');
is($node->safe_psql('small', q{SELECT count(*) FROM payout_jobs WHERE reference = 'created'}), 0, 'creation: leaves no job');
is($node->safe_psql('small', q{SELECT count(*) FROM payoutq.entry WHERE user_id LIKE 'c%'}), 0, 'creation: leaves no entry');

$session->query_safe('COMMIT');
$session->quit;
make_room();
my $created = $node->safe_psql('small', $create);
ok(wait_for_job($node, 'small', $_), "a whole database: job $_ goes on") foreach $job, $from, $created;
paid_once_ok($node, 'small', 20_000, "a whole database, $_", prefix => $_) foreach 'u', 'q', 'c';
unlike(worker_errors($node), qr/ERROR|FATAL|PANIC/, 'no worker has ended');
$node->safe_psql('postgres', 'DROP DATABASE small');
$node->safe_psql('app', 'DROP TABLE users');
$node->stop;

# ---------------------------------------------------------------------------
# WAL: the server stops at once, more than once
# ---------------------------------------------------------------------------

$node = start_node('wal', conf => "$conf\nmax_wal_size = 4MB\nmin_wal_size = 2MB\nwal_level = replica\n",
	initdb => [ "--waldir=$disk/wal", '--wal-segsize=1' ]);
create_db_with_extension($node, 'app');
slow_down($node, 'app');
# However slow it is, no segment is used again.
$node->safe_psql('app', q{SELECT pg_create_physical_replication_slot('keep', true)});
$job = create_job($node, 'app', 'wal', 100_000, args => 'batch_size => 100');
foreach my $round (1 .. 2)
{
	my $offset = -s $node->logfile;
	fill($node, 'app', $job);
	ok(wait_for_log($node, qr/PANIC:  .*$no_space/, $offset), "WAL, round $round: the server stops, and says why");
	make_room();

	# It may just be starting again, or have given up.
	$node->stop('immediate', fail_ok => 1);
	$node->start;
	unblamed_ok($node, 'app', $job, "WAL, round $round");
	books_ok($node, 'app', "WAL, round $round");
}
speed_up($node, 'app');
ok(wait_for_job($node, 'app', $job), 'WAL: goes on');
paid_once_ok($node, 'app', 100_000, 'WAL');
$node->stop;
done_testing();

# In the middle of the job
sub fill
{
	my ($server, $db, $id) = @_;
	my $paid = "SELECT completed_count FROM payout_job_status($id)";
	my $before = $server->safe_psql($db, $paid);
	wait_for($server, $db, "SELECT ($paid) > $before") or die 'nothing is paid';
	open(my $ballast, '>>', "$disk/ballast") or die "could not create ballast: $!";
	while (syswrite($ballast, "\0" x 8192)) {}
	close($ballast);
	return;
}

sub wait_for_log
{
	my ($server, $pattern, $offset) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	until (slurp_file($server->logfile, $offset // 0) =~ $pattern)
	{
		return 0 if time() > $end;
		usleep(50_000);
	}
	return 1;
}

sub make_room
{
	unlink "$disk/ballast" or die "could not remove the ballast: $!";
	return;
}

# A full disk is no fault of a batch.
sub unblamed_ok
{
	my ($server, $db, $id, $name) = @_;

	is($server->safe_psql($db, "SELECT status, failed_count, pending_count > 0 FROM payout_job_status($id)"),
		'running|0|t', "$name: the job is running, and nobody has failed");
	return;
}
