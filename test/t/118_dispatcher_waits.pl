# While there is something to do, but nothing that it can do now, the dispatcher
# waits, and takes no notice of the processor.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.send_interval = 500ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'later', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000);
create_provider($node, 'app', 'keyless', base_url => $provider->{url}, rate_limit => 1000);
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000);
$node->safe_psql('app', q{SELECT payout_set_destination('u1', p, 'acct_1') FROM unnest(ARRAY['later', 'keyless', 'stripe']) p});

# Sent, and to be confirmed by a web hook only
rule($provider, 'acct_1', body => '{"status": "sent", "reference": "r1"}');
create_job($node, 'app', 'later', 1, args => q{provider => 'later'});
ok(wait_for($node, 'app', 'SELECT status FROM payout_transfers', 'sent'), 'a transfer is sent');
waits_ok('for a web hook');
$node->safe_psql('app', q{SELECT payout_confirm_transfer('later', 'r1', true)});

# A provider that cannot be sent to
my $keyless = create_job($node, 'app', 'keyless', 1, args => q{provider => 'keyless'});
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $keyless", 1), 'a transfer without a user mapping');
waits_ok('for a user mapping');
$node->safe_psql('app', "SELECT payout_cancel_job($keyless, 'enough')");

# An answer
rule($provider, 'acct_1', hold => 1);
create_job($node, 'app', 'held', 1, args => q{provider => 'stripe'});
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_transfers WHERE status = 'processing'}, 1), 'a call is under way');
waits_ok('for an answer');
ask($provider, 'POST', '/release');

# Fenced
$node->safe_psql('app', q{UPDATE payoutq.sending SET timeline = 'other'});
my $fenced = create_job($node, 'app', 'fenced', 1, args => q{provider => 'stripe'});
ok(wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE job_id = $fenced", 1), 'a transfer while sending is fenced');
waits_ok('for payout_arm_sending()');
$node->safe_psql('app', 'SELECT payout_arm_sending()');
ok(wait_for_job($node, 'app', $fenced, 'completed', 5), 'and then goes on');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

# Three seconds: a process reports its commits about once in one.
sub waits_ok
{
	my ($name) = @_;
	my $commits = q{SELECT xact_commit FROM pg_stat_database WHERE datname = 'app'};
	my $start = $node->safe_psql('postgres', 'SELECT clock_timestamp()');

	wait_for($node, 'postgres', "SELECT clock_timestamp() > '$start'::timestamptz + interval '1.5 s'");
	my $before = $node->safe_psql('postgres', $commits);
	wait_for($node, 'postgres', "SELECT clock_timestamp() > '$start'::timestamptz + interval '4.5 s'");
	cmp_ok($node->safe_psql('postgres', $commits) - $before, '<', 150, $name);
	return;
}
