# Answers that are odd, but say that the money has gone, are recorded.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 100ms
payoutq.max_attempts = 3
payoutq.send_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => 'whsec_1', rate_limit => 1000);
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '1s');

sub pay
{
	my ($name, $server) = @_;
	$node->safe_psql('app', "SELECT payout_set_destination('${name}1', '$server', 'acct_$name')");
	return create_job($node, 'app', $name, 1, prefix => $name, args => "provider => '$server'");
}
my $status = 'SELECT status FROM payout_transfers WHERE job_id =';

# A reference with bytes that are not UTF-8
rule($provider, 'acct_bytes', hex => unpack('H*', '{"status": "sent", "reference": "a' . "\xff\xfe" . 'b"}'));
my $job = pay('bytes', 'wire');
wait_for($node, 'app', "SELECT attempts > 0 AND status <> 'processing' FROM payout_transfers WHERE job_id = $job", 't', 5);
isnt($node->safe_psql('app', "SELECT encode(textsend(provider_reference), 'hex') = '61fffe62' FROM payout_transfers WHERE job_id = $job"), 't',
	'no invalid text is stored');

# A reference that another transfer has
rule($provider, "acct_$_", unreached => 1, body => '{"status": "sent", "reference": "same"}', times => 100) foreach ('same1', 'same2');
pay('same1', 'wire');
wait_for($node, 'app', "SELECT count(*) FROM payout_transfers WHERE provider_reference = 'same'", 1, 5);
$job = pay('same2', 'wire');
ok(wait_for($node, 'app', "SELECT status IN ('unknown', 'sent') AND error IS NOT NULL FROM payout_transfers WHERE job_id = $job", 't', 5),
	'a reference that another has: shown, not left in processing');

# A reference that is too long for an index
my $long = join '', map { chr(33 + 2 + int(rand(50))) } 1 .. 20000;
$long =~ s/["\\]//g;
rule($provider, 'acct_long', unreached => 1, body => '{"status": "sent", "reference": "' . $long . '"}', times => 100);
$job = pay('long', 'wire');
ok(wait_for($node, 'app', "SELECT status <> 'processing' AND attempts > 0 FROM payout_transfers WHERE job_id = $job", 't', 5),
	'a very long reference: recorded, or shown');

# Lost, and then a refusal by something in between, not by the provider: the money may have gone.
rule($provider, 'acct_proxy', fault => 'lost');
rule($provider, 'acct_proxy', unreached => 1, status => 400, body => '<html>nginx</html>');
$job = pay('proxy', 'stripe');
wait_for($node, 'app', "SELECT attempts >= 2 AND status <> 'processing' FROM payout_transfers WHERE job_id = $job");
isnt($node->safe_psql('app', "$status $job"), 'failed_terminal', 'a 400 that is not of the provider does not give back money that may have gone');

# No funds, and the wrong mode: it is nobody's fault
rule($provider, 'acct_funds', unreached => 1, status => 400, code => 'balance_insufficient');
$job = pay('funds', 'stripe');
wait_for($node, 'app', "SELECT attempts > 0 AND status <> 'processing' FROM payout_transfers WHERE job_id = $job");
isnt($node->safe_psql('app', "$status $job"), 'failed_terminal', 'without funds the lane pauses');
$node->safe_psql('app', 'UPDATE payoutq.circuit SET open_until = clock_timestamp()');
rule($provider, 'acct_mode', unreached => 1, status => 400, code => 'livemode_mismatch');
$job = pay('mode', 'stripe');
wait_for($node, 'app', "SELECT attempts > 0 AND status <> 'processing' FROM payout_transfers WHERE job_id = $job");
isnt($node->safe_psql('app', "$status $job"), 'failed_terminal', 'a key of the wrong mode opens the circuit');

$node->stop;
done_testing();
