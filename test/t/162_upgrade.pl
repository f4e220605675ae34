# ALTER EXTENSION payoutq UPDATE from each version that was released equals a
# fresh install, with data in place, and the SQL of a version that was released
# does not change.  While the library and the SQL are of different versions,
# nothing is paid, and everybody is told what to do.
#
# test/upgrade has the install scripts of releases, from "make freeze".  Beside
# them a version 0.0.1 is made up here, so that there is always one to update.

use strict;
use warnings;

use File::Basename;
use File::Copy;
use File::Spec;
use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $tree = "$FindBin::RealBin/../..";
my $tmp = PostgreSQL::Test::Utils::tempdir();
my ($current) = slurp_file("$tree/payoutq.control") =~ /^default_version = '(.*)'/m;
my ($extensions, $install_path) = private_installation();
my $built = slurp_file("$extensions/payoutq--$current.sql");

# What the made-up version has, and how the update makes it what is built: one
# change of each kind.
my @changes = (
	[ 'function', q{CREATE FUNCTION payoutq.relic() RETURNS int LANGUAGE sql AS 'SELECT 1'}, 'DROP FUNCTION payoutq.relic()' ],
	[ 'body of a function', map { "UPDATE pg_catalog.pg_proc SET prosrc = $_ WHERE oid = 'payoutq.key_origin()'::pg_catalog.regprocedure" }
		  q{prosrc || '--'}, q{pg_catalog.rtrim(prosrc, '-')} ],
	[ 'setting of a function', map { "ALTER FUNCTION payoutq.key_origin() COST $_" } 7, 100 ],
	[ 'table', 'CREATE TABLE payoutq.relic_table ()', 'DROP TABLE payoutq.relic_table' ],
	[ 'column', 'ALTER TABLE payoutq.batch ADD COLUMN relic int', 'ALTER TABLE payoutq.batch DROP COLUMN relic' ],
	[ 'null', map { "ALTER TABLE payoutq.job ALTER COLUMN created_by $_ NOT NULL" } 'DROP', 'SET' ],
	[ 'default', q{ALTER TABLE payoutq.batch ALTER COLUMN error SET DEFAULT 'relic'}, 'ALTER TABLE payoutq.batch ALTER COLUMN error DROP DEFAULT' ],
	[ 'constraint', 'ALTER TABLE payoutq.entry ADD CONSTRAINT relic CHECK (amount > -1)', 'ALTER TABLE payoutq.entry DROP CONSTRAINT relic' ],
	[ 'index', 'CREATE INDEX relic_index ON payoutq.job (created_by)', 'DROP INDEX payoutq.relic_index' ],
	[ 'trigger', map { "ALTER TABLE payoutq.job $_ TRIGGER wake_workers" } 'DISABLE', 'ENABLE' ],
	[ 'view', map { "ALTER VIEW payoutq.status $_" } 'SET (security_barrier)', 'RESET (security_barrier)' ],
	[ 'type', 'CREATE DOMAIN payoutq.relic_type AS int', 'DROP DOMAIN payoutq.relic_type' ],
	[ 'owner', map { "ALTER TABLE payoutq.sending OWNER TO $_" } 'pg_monitor', 'CURRENT_USER' ],
	[ 'privilege', 'GRANT EXECUTE ON FUNCTION payoutq.change_balance(text, text, bigint) TO PUBLIC',
		'REVOKE EXECUTE ON FUNCTION payoutq.change_balance(text, text, bigint) FROM PUBLIC' ],
	[ 'comment', q{COMMENT ON TABLE payoutq.sending IS 'relic'}, q{COMMENT ON TABLE payoutq.sending IS 'where sending is armed'} ],
	[ 'dump', map { "SELECT pg_catalog.pg_extension_config_dump('payoutq.job', '$_')" } 'WHERE id > 0', '' ]);
append_to_file("$extensions/payoutq--0.0.1.sql", join ";\n", $built, map({ $_->[1] } @changes), '');
append_to_file("$extensions/payoutq--0.0.1--$current.sql", update_script());

my $node = PostgreSQL::Test::Cluster->new('main', install_path => $install_path);
$node->init;
$node->append_conf('postgresql.conf', q(
shared_preload_libraries = 'payoutq'
payoutq.interval = 1d
payoutq.workers = 0
log_line_prefix = '%m [%p] %b %q%a '
));
$node->start;
create_db_with_extension($node, 'fresh');
my $fresh = members('fresh');
cmp_ok(scalar(split(/\n/, $fresh)), '>', 1000, 'members of the extension are listed');
$node->safe_psql('postgres', 'CREATE DATABASE wrong');

# ---------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------

update_from('0.0.1');
foreach my $script (glob "$tree/test/upgrade/payoutq--*.sql")
{
	my ($version) = $script =~ /payoutq--(.*)\.sql/;

	if ($version eq $current)
	{
		ok(slurp_file($script) eq $built, "the SQL of version $version is as it was released")
		  or diag('A change takes a new default_version in payoutq.control, and an update script in sql/.');
		next;
	}
	unlink("$extensions/payoutq--$version.sql");		# a link to what an older package has left
	copy($script, $extensions) or die "could not copy $script: $!";
	update_from($version);
}

# An update that forgets something would be noticed, and the last one forgets nothing.
for my $i (0 .. @changes)
{
	my $version = '0.0.' . ($i + 2);

	append_to_file("$extensions/payoutq--$version--0.0.1.sql", '');
	symlink("payoutq--0.0.1.sql", "$extensions/payoutq--$version.sql") or die "could not link: $!";
	append_to_file("$extensions/payoutq--$version--$current.sql", update_script($i));
	my $members = members('wrong', "BEGIN; CREATE EXTENSION payoutq VERSION '$version'; ALTER EXTENSION payoutq UPDATE");
	if ($i < @changes)
	{
		isnt($members, $fresh, "an update that forgets a change is noticed: $changes[$i][0]");
	}
	else
	{
		same($members, 'one that forgets nothing');
	}
}

# ---------------------------------------------------------------------------
# A library that is too old
# ---------------------------------------------------------------------------

append_to_file("$extensions/payoutq--$current--99.0.sql", '');
append_to_file("$extensions/payoutq--99.0--$current.sql", '');
set_workers(2);
$node->safe_psql('fresh', 'SELECT payout_start_worker()');
ok(wait_for($node, 'fresh', 'SELECT count(*) > 0 FROM payout_workers'), 'there is a worker');
my $session = $node->background_psql('fresh', on_error_stop => 0);
$session->query(q{SELECT payout_deposit('anna', 1, 'before')});
my $offset = -s $node->logfile;
$node->safe_psql('fresh', q{ALTER EXTENSION payoutq UPDATE TO '99.0'});
ok(wait_for($node, 'fresh', 'SELECT count(*) FROM payout_workers', 0), 'workers leave when the SQL becomes newer');
my $complaint = qr/WARNING:  extension "payoutq" has version 99\.0 in database "fresh", but its library has version \Q$current\E\n.*HINT:  Install the library of version 99\.0, and restart the server\./;
like(slurp_file($node->logfile, $offset), $complaint, 'and say why');
refused('fresh', 'Install the library of version 99.0, and restart the server.');
$session->query(q{SELECT payout_deposit('anna', 1, 'after')});
$session->quit;
is($node->safe_psql('fresh', q{SELECT payout_balance('anna')}), 1, 'also in a session that has worked before');
$node->safe_psql('fresh', "ALTER EXTENSION payoutq UPDATE TO '$current'");
ok(wait_for_job($node, 'fresh', create_job($node, 'fresh', 'back', 10)), 'they are back when it fits again');

# ---------------------------------------------------------------------------
# make freeze
# ---------------------------------------------------------------------------

mkdir("$tmp/tree") or die;
system_or_bail('cp', '-R', map({ "$tree/$_" } 'Makefile', 'payoutq.control', 'sql'), "$tmp/tree");
mkdir("$tmp/tree/$_") or die foreach ('test', 'test/upgrade');
my @freeze = ('make', '-s', '-C', "$tmp/tree", 'freeze');
delete local @ENV{ 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL' };
command_ok(\@freeze, 'make freeze');
ok(slurp_file("$tmp/tree/test/upgrade/payoutq--$current.sql") eq $built, 'keeps what is installed');
command_ok(\@freeze, 'also twice');
append_to_file("$tmp/tree/sql/15_permissions.sql", "SELECT 1;\n");
command_fails_like(\@freeze, qr/exists and differs/, 'but nothing else of the same version');
ok(slurp_file("$tmp/tree/test/upgrade/payoutq--$current.sql") eq $built, 'what was kept stays');

$node->stop;
done_testing();

# Where we may write into the folder of extensions: the server finds it beside
# the program.  Everything else is that of the real installation.
sub private_installation
{
	my %dir = map { my $dir = `pg_config --$_`; chomp $dir; $_ => $dir } ('bindir', 'sharedir', 'pkglibdir', 'libdir');
	my $root = "$tmp/root";

	system_or_bail('mkdir', '-p', map { "$root$dir{$_}" } ('bindir', 'sharedir'));
	foreach (glob "$dir{bindir}/*")
	{
		my $to = "$root$dir{bindir}/" . basename($_);
		/\/(postgres|pg_ctl|initdb)$/ ? system_or_bail('cp', $_, $to) : symlink($_, $to);
	}
	foreach my $dir ('pkglibdir', 'libdir')
	{
		next if -e "$root$dir{$dir}";
		system_or_bail('mkdir', '-p', dirname("$root$dir{$dir}"));
		symlink($dir{$dir}, "$root$dir{$dir}") or die "could not link $dir{$dir}: $!";
	}
	symlink($_, "$root$dir{sharedir}/" . basename($_)) foreach grep { !/\/extension$/ } glob "$dir{sharedir}/*";
	mkdir("$root$dir{sharedir}/extension") or die;
	symlink($_, "$root$dir{sharedir}/extension/" . basename($_)) foreach glob "$dir{sharedir}/extension/*";
	return (File::Spec->rel2abs("$root$dir{sharedir}/extension"), File::Spec->rel2abs(dirname("$root$dir{bindir}")));
}

sub update_script
{
	my ($forget) = @_;

	return join '', map { $_ == ($forget // -1) ? '' : "$changes[$_][2];\n" } 0 .. $#changes;
}

sub members
{
	my ($db, $before) = @_;

	return $node->safe_psql($db, join '', $before ? "$before;\n" : '', slurp_file("$tree/test/upgrade/members.sql"));
}

# One that has all of: half-done job, challenge, transfers
sub update_from
{
	my ($version) = @_;
	my $db = "from_$version";
	my $paid = q{SELECT status, completed_count FROM payout_job_status('half')};
	my $number = sub { my $n = 0; $n = $n * 1000 + $_ foreach split /\./, $_[0]; return $n };

	cmp_ok($number->($version), '<', $number->($current), "$version is older than $current");
	$node->safe_psql('postgres', qq{CREATE DATABASE "$db"});
	$node->safe_psql($db, "CREATE EXTENSION payoutq VERSION '$version'");

	# Only a library that fits can fill it.  Should this one no longer do for
	# what that version has, take a dump from there.
	my $pretend = sub { $node->safe_psql($db, "UPDATE pg_extension SET extversion = '$_[0]' WHERE extname = 'payoutq'") };
	$pretend->($current);
	my $challenge = $node->safe_psql($db, q{
		SELECT count(payout_deposit(u, 100, 'deposit ' || u)) FROM unnest('{y,n}'::text[]) u;
		CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
		SELECT payout_set_destination('t' || i, 'bank', 'acct_' || i) FROM generate_series(1, 5) i;
		SELECT payout_create_challenge('stakes', creator_id => 'y', challenger_id => 'y', challenged_id => 'n')});
	($challenge) = $challenge =~ /(\d+)$/;
	$node->safe_psql($db, qq{SELECT payout_place_stake($challenge, 'y', 'YES', 10), payout_place_stake($challenge, 'n', 'NO', 30)});
	create_job($node, $db, 'transfers', 5, prefix => 't', args => q{provider => 'bank'});
	$node->safe_psql($db, 'CALL payout_process()');
	my $lease = $node->safe_psql($db, q{SELECT transfer_id, attempt_token FROM payout_claim_transfers('bank', 2) LIMIT 1});
	$node->safe_psql($db, sprintf(q{SELECT payout_transfer_completed(%d, '%s', 'tr_1')}, split /\|/, $lease));
	my $job = create_job($node, $db, 'half', 500, args => 'batch_size => 10');
	$node->safe_psql($db, 'CALL payout_process(max_batches => 3)');
	$pretend->($version);

	# Nobody touches it.
	my $offset = -s $node->logfile;
	set_workers(2);
	my $complaints = sub {
		return scalar(() = slurp_file($node->logfile, $offset) =~
			  /payoutq worker .*WARNING:  extension "payoutq" has version \Q$version\E in database "\Q$db\E", but its library has version \Q$current\E\n.*HINT:  Run ALTER EXTENSION payoutq UPDATE\./g);
	};
	foreach (1 .. 3)
	{
		$node->safe_psql($db, 'SELECT payout_start_worker()');
		ok(wait_for($node, $db, q{SELECT count(*) FROM payout_workers}, 0), "$version: workers leave it alone");
	}
	poll($complaints);
	is($node->safe_psql($db, $paid), 'running|30', 'the job is where it was');
	refused($db, 'Run ALTER EXTENSION payoutq UPDATE.');
	books_ok($node, $db, $version);

	$node->safe_psql($db, 'ALTER EXTENSION payoutq UPDATE');
	is($complaints->(), 1, 'workers have said so, once');
	ok(wait_for_job($node, $db, $job), 'updated: workers go on by themselves');
	paid_once_ok($node, $db, 500, 'updated');
	$node->safe_psql($db, qq{SELECT payout_resolve_challenge($challenge, 'challenger_won')});
	ok(wait_for($node, $db, q{SELECT payout_balance('y')}, 130), 'the challenge goes on');
	is($node->safe_psql($db, q{SELECT string_agg(status, ' ' ORDER BY status) FROM payout_transfers}), 'completed pending pending pending processing',
		'transfers are where they were');
	is($node->safe_psql($db, q{SELECT count(*) FROM payout_claim_transfers('bank')}), 3, 'and can be claimed');
	books_ok($node, $db, "updated from $version");
	same(members($db), "the update from $version is a fresh install");
	set_workers(0);
	return;
}

sub set_workers
{
	my ($n) = @_;

	$node->append_conf('postgresql.conf', "payoutq.workers = $n");
	$node->reload;
	ok(wait_for($node, 'postgres', q{SELECT current_setting('payoutq.workers')}, $n), "payoutq.workers = $n");
	return;
}

sub poll
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	select(undef, undef, undef, 0.02) until $condition->() || time() > $end;
	return;
}

# Calls that change something, and one that does not
sub refused
{
	my ($db, $hint) = @_;

	foreach my $call (q{SELECT payout_create_job('refused', '{u}', '{1}'::bigint[])}, q{SELECT payout_deposit('u', 1, 'refused')},
		q{SELECT payout_create_job_from('refused', $$SELECT 'u' AS user_id, 1::bigint AS amount$$)}, 'CALL payout_process()', 'SELECT payout_pause_job(1)',
		q{SELECT payout_bind_accounts('pg_class', 'relname', 'relpages', 'EUR')})
	{
		my ($code, $out, $error) = $node->psql($db, "\\set VERBOSITY verbose\n$call");

		like($error, qr/ERROR:  55000: extension "payoutq" has version .*\nHINT:  \Q$hint\E$/m, "$db: refused: $call");
	}
	is($node->psql($db, 'SELECT * FROM payout_jobs'), 0, 'what is there can be read');
	return;
}

sub same
{
	my ($members, $name) = @_;
	my %is = map { $_ => 1 } split /\n/, $members;
	my %should = map { $_ => 1 } split /\n/, $fresh;
	my @differences = (map({ "- $_" } grep { !$is{$_} } sort keys %should), map({ "+ $_" } grep { !$should{$_} } sort keys %is));

	ok($members eq $fresh, $name) or diag(join "\n", @differences);
	return;
}
