# Transfers and what a copy of the database may do: sending is fenced after a
# restore and after a promotion. Then a provider that keeps its own books, in
# files, while several sessions claim and report, the provider does everything
# that providers do, and the server is killed: nobody is paid twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use POSIX ();
use Test::More;

my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");
srand($seed);
my $tmp = PostgreSQL::Test::Utils::tempdir();
my $test = $$;

my $bank = q{CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external')};
my $states = q{SELECT status, count(*), sum(attempts) FROM payout_transfers GROUP BY 1 ORDER BY 1};
my $health = q{SELECT ok FROM payout_health WHERE check_name = 'sending_armed'};

# ---------------------------------------------------------------------------
# A restore
# ---------------------------------------------------------------------------

my $node = start_node('main', conf => q(
log_checkpoints = off
payoutq.interval = 1s
payoutq.max_attempts = 3
payoutq.retry_base = 1ms
payoutq.retry_cap = 50ms
));
create_db_with_extension($node, 'app');
$node->safe_psql('app', qq{
	$bank;
	CREATE TABLE minted (transfer_id bigint);
	CREATE FUNCTION mint(bigint) RETURNS void LANGUAGE sql AS 'INSERT INTO minted VALUES (\$1)';
	SELECT payout_on_confirm('bank', 'mint(bigint)');
	SELECT payout_set_destination('u' || i, 'bank', 'account ' || i) FROM generate_series(1, 19) i});
my $job = create_job($node, 'app', 'first', 20, args => q{provider => 'bank'});
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_transfers', 20), 'a worker makes the transfers');
$node->safe_psql('app', q{
	CREATE TABLE claim AS SELECT * FROM payout_claim_transfers('bank', 7, '1 hour');
	SELECT payout_transfer_completed(transfer_id, attempt_token, 'c' || transfer_id) FROM claim WHERE transfer_id IN (1, 2);
	SELECT payout_transfer_sent(transfer_id, attempt_token, 's' || transfer_id) FROM claim WHERE transfer_id IN (3, 4);
	SELECT payout_transfer_failed(transfer_id, attempt_token, 'permanent', 'no') FROM claim WHERE transfer_id = 5;
	SELECT payout_transfer_failed(transfer_id, attempt_token, 'unknown') FROM claim WHERE transfer_id = 6});
my $before = $node->safe_psql('app', $states);
is($before, "completed|2|2\nfailed_terminal|2|1\npending|12|0\nprocessing|1|1\nsent|2|2\nunknown|1|1", 'transfers in many states');
is($node->safe_psql('app', $health), 't', 'where it was created, sending is armed');

my $dump = "$tmp/dump";
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, $node->connstr('app') ], 'pg_dump');
$node->safe_psql('postgres', 'CREATE DATABASE copy');
$node->command_ok([ 'pg_restore', '-d', $node->connstr('copy'), $dump ], 'pg_restore');
is($node->safe_psql('copy', $states), $before, 'the copy has the same transfers');
fenced_ok($node, 'copy', 'restored');
is($node->safe_psql('copy', $states), $before, 'restored: and nothing is changed');
is($node->safe_psql('app', $health), 't', 'the original is armed');
is($node->safe_psql('app', q{SELECT count(*) FROM payout_claim_transfers('bank', 1, '1 hour')}), 1, 'and sends');
books_ok($node, 'copy', 'restored');

# What the original had begun can be confirmed in the copy; a copy of the copy is fenced, too.
is($node->safe_psql('copy', q{SELECT payout_confirm_transfer('bank', provider_reference, true) FROM payout_transfers WHERE status = 'sent'}),
	"completed\ncompleted", 'restored: confirmations are heard');
is($node->safe_psql('copy', 'SELECT count(*) FROM minted'), 4, 'restored: with the callback');
$node->command_ok([ 'pg_dump', '-Fc', '-f', "$dump.2", $node->connstr('copy') ], 'pg_dump of the copy');
$node->safe_psql('postgres', 'CREATE DATABASE copy2');
$node->command_ok([ 'pg_restore', '-d', $node->connstr('copy2'), "$dump.2" ], 'pg_restore');
fenced_ok($node, 'copy2', 'restored twice');

$node->safe_psql('copy', 'SELECT payout_arm_sending()');
is($node->safe_psql('copy', $health), 't', 'armed: payout_health is content');
is($node->safe_psql('copy', q{
		SELECT count(*), count(*) FILTER (WHERE idempotency_key = 'payout:' || transfer_id) FROM payout_claim_transfers('bank', 100, '1 hour')}),
	'13|13', 'armed: the copy sends what is pending, and asks again for what is unknown');
is($node->safe_psql('app', $health), 't', 'which is no matter of the original');
$node->safe_psql('copy', q{
	SELECT payout_transfer_completed(id, token, NULL) FROM payoutq.transfer WHERE status = 'processing';
	SELECT payout_set_destination('u20', 'bank', 'at last');
	SELECT payout_retry_job(1)});
$node->safe_psql('copy', q{SELECT payout_transfer_completed(transfer_id, attempt_token, NULL) FROM payout_claim_transfers('bank', 100, '1 hour')});
ok(wait_for_job($node, 'copy', $job), 'armed: the job is completed');
is($node->safe_psql('copy', 'SELECT completed_count, amount_paid FROM payout_job_status(1)'), '20|210', 'armed: everybody has his');
is($node->safe_psql('copy', 'SELECT count(*), count(DISTINCT transfer_id) FROM minted'), '20|20', 'armed: the callback was called for each');
create_job($node, 'copy', 'next', 5, args => q{provider => 'bank'});
ok(wait_for($node, 'copy', 'SELECT count(*) FROM payout_transfers WHERE transfer_id > 20', 5), 'armed: ids go on');
books_ok($node, 'copy', 'armed');
$node->safe_psql('postgres', "DROP DATABASE $_ WITH (FORCE)") foreach ('copy', 'copy2', 'app');

# ---------------------------------------------------------------------------
# A promotion
# ---------------------------------------------------------------------------

my $primary = start_node('primary', streaming => 1);
create_db_with_extension($primary, 'app');
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;
$primary->safe_psql('app', "$bank; SELECT payout_set_destination('u' || i, 'bank', 'x') FROM generate_series(1, 10) i");
$job = create_job($primary, 'app', 'standby', 10, args => q{provider => 'bank'});
ok(wait_for($primary, 'app', 'SELECT count(*) FROM payout_transfers', 10), 'the primary makes transfers');
$primary->safe_psql('app', q{SELECT FROM payout_claim_transfers('bank', 4, '1 microsecond')});
$primary->wait_for_catchup($standby);
is($standby->safe_psql('app', $states), $primary->safe_psql('app', $states), 'the standby shows them');
fenced_ok($standby, 'app', 'standby');
$primary->restart;
is($primary->safe_psql('app', $health), 't', 'a restart of the primary does not matter');

$primary->stop('immediate');
$standby->promote;
fenced_ok($standby, 'app', 'promoted');
books_ok($standby, 'app', 'promoted');
$standby->restart;
fenced_ok($standby, 'app', 'promoted, and restarted');
$standby->safe_psql('app', 'SELECT payout_arm_sending()');
is($standby->safe_psql('app', $health), 't', 'promoted: armed');
$standby->restart;
is($standby->safe_psql('app', q{
		SELECT count(*), count(*) FILTER (WHERE attempt = 2 AND idempotency_key = 'payout:' || transfer_id) FROM payout_claim_transfers('bank', 100, '1 hour')}),
	'10|4', 'promoted: what the primary may have sent is asked for under the same key');
$standby->safe_psql('app', q{SELECT payout_transfer_completed(id, token, NULL) FROM payoutq.transfer WHERE status = 'processing'});
ok(wait_for_job($standby, 'app', $job), 'promoted: the job is completed');
books_ok($standby, 'app', 'promoted, at the end');
$standby->stop;

# ---------------------------------------------------------------------------
# A provider, and a server that is killed
# ---------------------------------------------------------------------------

my $n = 2000;
my $kills = 5;
my $books = "$tmp/books";
mkdir $books;

create_db_with_extension($node, 'app');

# A server that is built with assertions may fail one of its own, in heap_update(),
# when a row is updated again after an update that was rolled back to a savepoint.
my $fails = $node->safe_psql('app', 'SHOW debug_assertions') eq 'on' ? 0 : 0.05;
$node->safe_psql('app', qq{
	$bank;
	CREATE TABLE minted (transfer_id bigint);
	CREATE FUNCTION mint(bigint) RETURNS void LANGUAGE plpgsql AS \$\$
	BEGIN
		INSERT INTO minted VALUES (\$1);
		IF random() < $fails THEN
			RAISE 'the mint is closed';
		END IF;
	END \$\$;
	SELECT payout_on_confirm('bank', 'mint(bigint)');
	SELECT payout_set_destination('u' || i, 'bank', 'account ' || i) FROM generate_series(1, $n) i});
$job = create_job($node, 'app', 'chaos', $n, args => q{provider => 'bank', batch_size => 100});

my @clients = map { my $i = $_; start(sub { send_some($i) }, $i) } 1 .. 4;
push @clients, start(\&confirm_some, 5);

my $ended = q{count(*) FILTER (WHERE status IN ('completed', 'failed_terminal', 'confirmation_failed'))};
my $at = 0;
foreach my $kill (1 .. $kills)
{
	$at += 1 + int(rand(($n * 0.9 - $at) / ($kills - $kill + 1)));
	wait_for($node, 'app', "SELECT $ended >= $at FROM payout_transfers") or last;
	my $was = crash($node, 'app', 'all', "SELECT $ended FROM payout_transfers");
	my $is = $node->safe_psql('app', "SELECT $ended FROM payout_transfers");
	cmp_ok($is, '>=', $was, "kill $kill: nothing is lost");
	cmp_ok($is, '<', $n, "kill $kill: before the end");
	books_ok($node, 'app', "kill $kill");
}
ok(wait_for($node, 'app', "SELECT $ended FROM payout_transfers", $n), 'all transfers come to their ends');
ok(wait_for_job($node, 'app', $job), 'and the job');
books_ok($node, 'app', 'first round');
my ($completed, $failed) = split /\|/, $node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)");
cmp_ok($failed, '>', 0, "some have failed: $failed");
cmp_ok($completed, '>', $failed, "more are completed: $completed");
agree_ok('first round');

# Those that have failed are sent again, under a new key, and the server is killed once more.
is($node->safe_psql('app', "SELECT payout_retry_job($job)"), $failed, 'all that has failed is retried');
$at = $completed + int($failed / 3);
wait_for($node, 'app', "SELECT $ended >= $at FROM payout_transfers");
crash($node, 'app', 'all', 'SELECT 1');
books_ok($node, 'app', 'killed while they are retried');
ok(wait_for($node, 'app', "SELECT $ended FROM payout_transfers", $n), 'all transfers come to their ends again');
ok(wait_for_job($node, 'app', $job), 'and the job');
cmp_ok($node->safe_psql('app', "SELECT failed_count FROM payout_job_status($job)"), '<', $failed, 'most of them are completed now');
cmp_ok($node->safe_psql('app', q{SELECT count(*) FROM payout_transfers WHERE idempotency_key LIKE '%:g2'}), '>=', $failed / 2, 'under the new key');
agree_ok('second round');

append_to_file("$tmp/stop", '');
waitpid($_, 0) foreach @clients;
ok(!-e "$tmp/complaints", 'no session has met what it did not expect') or diag(slurp_file("$tmp/complaints"));
cmp_ok($node->safe_psql('app', q{SELECT count(*) FROM payout_attempts WHERE error = 'the lease ended without a report'}), '>', 0, 'some leases have ended without a report');
like(slurp_file($node->logfile), qr/the report on transfer \d+ is late/, 'and some reports came late');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP:|deadlock detected/, 'nothing worse in the log');
$node->stop;
done_testing();

# ---------------------------------------------------------------------------

sub fenced_ok
{
	my ($server, $db, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my ($code, $out, $error) = $server->psql($db, "\\set VERBOSITY verbose\nSELECT payout_claim_transfers('bank')");
	like($error, qr/ERROR:  55000: sending is fenced.*HINT:.*payout_arm_sending/s, "$name: nothing can be claimed");
	is($server->safe_psql($db, $health), 'f', "$name: payout_health shows it");
	return;
}

sub start
{
	my ($work, $i) = @_;
	my $pid = fork() // die "could not fork: $!";
	return $pid if $pid;

	# Nothing of the test's own end is to happen here.
	srand($seed + $i);
	eval { $work->(); 1 } or complain($@);
	POSIX::_exit(0);
}

sub is_over
{
	return -e "$tmp/stop" || getppid() != $test;
}

sub complain
{
	my ($what) = @_;
	append_to_file("$tmp/complaints", "$what\n");
	return;
}

# Statements one by one; what the server does not hear because it is down is lost.
sub try_query
{
	my ($query) = @_;
	my ($code, $out, $error);

	eval { ($code, $out, $error) = $node->psql('app', $query, on_error_stop => 0); 1 } or return ('', '');
	return ($out, $error);
}

# An application: claims, calls the provider, reports.
sub send_some
{
	my ($i) = @_;
	my $late = '';

	until (is_over())
	{
		my ($claimed) = try_query(q{
			SELECT transfer_id, attempt_token, idempotency_key, destination, amount
			FROM payout_claim_transfers('bank', 10, '300 ms')});
		my $reports = '';
		foreach my $line (split /\n/, $claimed)
		{
			my ($id, $token, $key, $destination, $amount) = split /\|/, $line;
			my $answer = call_provider($key, $destination, $amount, $i);
			next if $answer eq '';
			my $report = sprintf("SELECT payout_transfer_%s;\n", $answer =~ s/TRANSFER/$id, '$token'/r);
			rand() < 0.06 ? $late .= $report : $reports .= $report;
		}

		# Late, most of them after another session has claimed it
		if (rand() < 0.02 || $reports eq '')
		{
			$reports .= $late;
			$late = '';
		}
		next if $reports eq '';
		my (undef, $error) = try_query($reports);
		my @strange = grep { /ERROR:/ && !/is late|shut|recovery|starting up/ } split /\n/, $error;
		complain("report: @strange") if @strange;
	}
	return;
}

# The provider. It knows a key for ever: what it did first is what it does.
# Returns what the application reports, or nothing when it does not come to that.
sub call_provider
{
	my ($key, $destination, $amount, $i) = @_;
	my $luck = rand();

	return '' if $luck < 0.06;                                               # dies before the call
	return q{failed(TRANSFER, 'transient', 'busy')} if $luck < 0.18;         # not executed
	my $does = $luck < 0.23 ? 'rejected' : $luck < 0.45 ? "later|$destination|$amount" : "paid|$destination|$amount";
	my $new = "$tmp/new.$i";
	unlink $new;
	append_to_file($new, $does);
	link $new, "$books/$key";
	my $did = slurp_file("$books/$key");

	$luck = rand();
	return '' if $luck < 0.06;                                               # the answer is lost, and the application with it
	return q{failed(TRANSFER, 'unknown', 'no answer')} if $luck < 0.12;      # the answer is lost
	return q{failed(TRANSFER, 'permanent', 'no')} if $did eq 'rejected';
	return "sent(TRANSFER, '$key')" if $did =~ /^later/;
	return "completed(TRANSFER, '$key')";
}

# The provider's messages: paid after all, or not; said again until it is heard,
# and sometimes once more.
sub confirm_some
{
	my (%heard, %never);

	until (is_over())
	{
		my $messages = '';
		foreach my $file (glob("$books/*"))
		{
			next if $file =~ /\.final$/ || $heard{$file} || $never{$file};
			$never{$file} = slurp_file($file) !~ /^later/ and next;
			append_to_file("$file.final", rand() < 0.15 ? 'returned' : 'paid') unless -e "$file.final";
			my $confirmed = slurp_file("$file.final") eq 'paid' ? 'true' : 'false';
			my ($key) = $file =~ m{([^/]+)$};
			$messages .= "SELECT '$file', payout_confirm_transfer('bank', '$key', $confirmed);\n";
		}
		next if $messages eq '';
		my ($out, $error) = try_query($messages);
		foreach my $line (split /\n/, $out)
		{
			$heard{$1} = 1 if $line =~ /^(.*)\|(sent|completed|confirmation_failed)$/ && rand() < 0.8;
		}
		my @strange = grep { /ERROR:/ && !/has no transfer with|shut|recovery|starting up/ } split /\n/, $error;
		complain("confirm: @strange") if @strange;
	}
	return;
}

# The provider's books and ours. Keys by transfer: at most one of them was paid.
sub agree_ok
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my (%paid, %keys, @wrong);

	foreach my $file (grep { !/\.final$/ } glob("$books/*"))
	{
		my ($what, $destination, $amount) = split /\|/, slurp_file($file);
		my ($id, $generation) = $file =~ /payout:(\d+)(?::g(\d+))?$/ or die "what is $file?";
		$keys{$id} = $generation // 1 if ($generation // 1) > ($keys{$id} // 0);
		next if $what eq 'rejected' || $what eq 'later' && slurp_file("$file.final") eq 'returned';
		push @{ $paid{$id} }, "$destination|$amount";
	}
	my $completed = 0;
	foreach my $line (split /\n/, $node->safe_psql('app', q{
		SELECT transfer_id, status, generation, destination, amount FROM payout_transfers ORDER BY 1}))
	{
		my ($id, $status, $generation, $destination, $amount) = split /\|/, $line;
		my @were = @{ $paid{$id} // [] };
		my $expected = $status eq 'completed' ? "$destination|$amount" : '';
		$completed++ if $status eq 'completed';
		push @wrong, "$line: the provider has paid (@were)" if "@were" ne $expected;
		push @wrong, "$line: the provider knows generation $keys{$id}" if ($keys{$id} // 0) > $generation;
		delete $paid{$id};
	}
	push @wrong, 'the provider has paid for ' . join(' ', keys %paid) if %paid;
	is_deeply([ splice(@wrong, 0, 10) ], [], "$name: the provider's books agree, each transfer is paid once or not at all");
	is($node->safe_psql('app', q{SELECT count(*), count(DISTINCT transfer_id) FROM minted}), "$completed|$completed", "$name: the callback was called once for each");
	is($node->safe_psql('app', qq{
			SELECT payout_balance('\@transit:bank'),
			       count(*) FILTER (WHERE payout_balance(user_id) <> CASE status WHEN 'completed' THEN 0 ELSE amount END),
			       sum(amount) FILTER (WHERE status = 'completed') = (SELECT amount_paid FROM payout_job_status($job)),
			       sum(amount) FILTER (WHERE status = 'completed') = (SELECT sum(amount) FROM payout_ledger WHERE account = '\@outside' AND kind = 'transfer')
			FROM payout_transfers}),
		'0|0|t|t', "$name: who was not paid outside has the money");
	books_ok($node, 'app', $name);
	return;
}
