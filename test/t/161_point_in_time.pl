# A backup is restored to a point in the middle of a job: the books are those of
# that moment, the job goes on and completes on the new server, nobody is paid
# twice there, and transfers are not sent before it is armed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $entries = 6000;
my $node = start_node('original', streaming => 1, archiving => 1, conf => 'payoutq.interval = 1d');
create_db_with_extension($node, 'app');
slow_down($node, 'app', 60000);
$node->safe_psql('app', q{
	CREATE SERVER bank FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external');
	SELECT payout_set_destination('t' || i, 'bank', 'acct_' || i) FROM generate_series(1, 2) i});
my $transfers = create_job($node, 'app', 'transfers', 2, prefix => 't', args => q{provider => 'bank'});
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_transfers WHERE status = 'pending'}, 2), 'transfers wait');

# The backup is of the middle of the job, and the point is later.
my $job = create_job($node, 'app', 'half', $entries, args => 'batch_size => 10, platform_fee => 9');
my $paid = "SELECT completed_count FROM payout_job_status($job)";
ok(wait_for($node, 'app', "SELECT ($paid) > 100"), 'in the middle of a job');
$node->backup('backup');
my $at_backup = $node->safe_psql('app', $paid);
my $before = create_job($node, 'app', 'before', 10, prefix => 'before');
ok(wait_for($node, 'app', "SELECT ($paid) > $at_backup + 100"), 'later');
my $least = $node->safe_psql('app', $paid);
$node->safe_psql('app', q{SELECT pg_create_restore_point('the middle')});
my $most = $node->safe_psql('app', $paid);
cmp_ok($most, '<', $entries, 'still in the middle');

# What happens afterwards is not restored: one transfer is sent, and the job ends.
speed_up($node, 'app');
create_job($node, 'app', 'after', 10, prefix => 'after');
my $sent = $node->safe_psql('app', q{SELECT user_id FROM payout_claim_transfers('bank', 1)});
ok(wait_for_job($node, 'app', $job), 'the job ends');
my $segment = $node->safe_psql('app', 'SELECT pg_walfile_name(pg_current_wal_lsn())');
$node->safe_psql('app', 'SELECT pg_switch_wal()');
ok(wait_for($node, 'app', "SELECT last_archived_wal >= '$segment' FROM pg_stat_archiver"), 'its WAL is archived');
$node->stop;

my $restored = PostgreSQL::Test::Cluster->new('restored');
$restored->init_from_backup($node, 'backup', has_restoring => 1, standby => 0);
$restored->append_conf('postgresql.conf', q(
recovery_target_name = 'the middle'
recovery_target_action = 'promote'
archive_mode = off
payoutq.workers = 0
));
$restored->start;
ok(wait_for($restored, 'postgres', 'SELECT NOT pg_is_in_recovery()'), 'restored');
my $status = $restored->safe_psql('app', $paid);
ok($least <= $status && $status <= $most, "the job is where it was: $least <= $status <= $most");
is($restored->safe_psql('app', q{SELECT string_agg(reference, ' ' ORDER BY reference) FROM payout_jobs}), 'before half transfers', 'with the jobs of that moment');
books_ok($restored, 'app', 'restored');

speed_up($restored, 'app');
$restored->append_conf('postgresql.conf', 'payoutq.workers = 2');
$restored->reload;
ok(wait_for_job($restored, 'app', $job), 'the job goes on by itself');
ok(wait_for_job($restored, 'app', $before), 'and the other');
paid_once_ok($restored, 'app', $entries, 'completed');
paid_once_ok($restored, 'app', 10, 'the other', prefix => 'before');
my $next = create_job($restored, 'app', 'after', 10, prefix => 'after');
ok(wait_for_job($restored, 'app', $next), 'what was not restored can be asked for again');

# It does not know what the original has sent.
my ($code, $out, $error) = $restored->psql('app', q{SELECT * FROM payout_claim_transfers('bank')});
like($error, qr/sending is fenced.*HINT: .*payout_arm_sending/s, 'sending is fenced');
is($restored->safe_psql('app', q{SELECT ok FROM payout_health WHERE check_name = 'sending_armed'}), 'f', 'which is shown');
$restored->safe_psql('app', 'SELECT payout_arm_sending()');
is($restored->safe_psql('app', q{SELECT string_agg(user_id || ' ' || idempotency_key, ' ' ORDER BY user_id) FROM payout_claim_transfers('bank')}),
	't1 payout:1 t2 payout:2', 'once armed, it sends under the keys of the original');
is(worker_errors($restored), '', 'no complaint of a worker');

$restored->stop;
done_testing();
