# A promoted standby does not send before it is armed: it may not know what the
# old primary has sent.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = start_node('primary', streaming => 1, conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
payoutq.send_concurrency = 3
));
create_db_with_extension($primary, 'app');
my $provider = start_provider();
create_provider($primary, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '2s');
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

# Three calls are under way when the primary is lost; two of them were executed.
my $n = 10;
$primary->safe_psql('app', "SELECT payout_set_destination('u' || i, 'stripe', 'acct_' || i) FROM generate_series(1, $n) i");
rule($provider, "acct_$_", fault => $_ == 2 ? 'silent' : 'silent-done', times => 2) foreach 1 .. 3;
my $job = create_job($primary, 'app', 'fence', $n, args => q{provider => 'stripe'});
my $states = "SELECT string_agg(status || ' ' || attempts, ', ' ORDER BY transfer_id) FROM payout_transfers WHERE job_id = $job";
ok(wait_for($primary, 'app', "SELECT count(*) FROM payout_transfers WHERE status = 'processing'", 3), 'three calls are under way');
$primary->wait_for_catchup($standby);
$primary->stop('immediate');
my $sent = requests();
my $books = ask($provider, 'GET', '/books');
cmp_ok(scalar(@$books), '>=', 2, 'what was executed is in the books of the provider');

$standby->promote;
my $before = $standby->safe_psql('app', $states);
ok(wait_for($standby, 'app', q{SELECT count(*) > 0 FROM payout_workers}), 'workers run');
$standby->safe_psql('app', q{SELECT payout_set_destination('late1', 'stripe', 'acct_late')});
my $late = create_job($standby, 'app', 'late', 1, prefix => 'late', args => q{provider => 'stripe'});
my $inside = create_job($standby, 'app', 'inside', 100, prefix => 'inside');
ok(wait_for_job($standby, 'app', $inside), 'jobs without a provider are paid');
my ($code, $out, $error) = $standby->psql('app', q{SELECT * FROM payout_claim_transfers('stripe')});
like($error, qr/sending is fenced/, 'transfers cannot be claimed');

# Its dispatcher has looked more than once, by then.
my $looked = $standby->safe_psql('app', 'SELECT clock_timestamp()');
ok(wait_for($standby, 'app', "SELECT clock_timestamp() > '$looked'::timestamptz + interval '1 second'"), 'for longer than it takes to look');
is($standby->safe_psql('app', $states), $before, 'nothing is sent');
is(requests(), $sent, 'the provider has heard nothing');

# Without waiting for the leases to lapse
$standby->safe_psql('app', q{UPDATE payoutq.transfer SET run_after = clock_timestamp() WHERE status = 'processing'});
$standby->safe_psql('app', 'SELECT payout_arm_sending()');
ok(wait_for_job($standby, 'app', $job, 'completed', 120), 'once armed, it sends the rest');
my %paid;
$paid{ $_->{metadata}{payoutq_transfer} }++ foreach @{ ask($provider, 'GET', '/books') };
is_deeply([ map { $paid{$_} // 0 } 1 .. $n ], [ (1) x $n ], 'everybody is paid once');
is($standby->safe_psql('app', q{SELECT count(*) FROM payout_transfers WHERE generation > 1}), 0, 'under the old keys');
books_ok($standby, 'app', 'promoted');

$standby->restart;
ok(wait_for_job($standby, 'app', pay('again')), 'after a restart it is still armed');

$standby->stop;
done_testing();

sub requests
{
	return scalar @{ ask($provider, 'GET', '/requests') };
}

sub pay
{
	my ($name) = @_;

	$standby->safe_psql('app', "SELECT payout_set_destination('${name}1', 'stripe', 'acct_$name')");
	return create_job($standby, 'app', $name, 1, prefix => $name, args => q{provider => 'stripe'});
}
