# What was done under a key is found among many transfers to one account.
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
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', rate_limit => 1000, timeout => '1s', quiet_period => '1s');

# The first is made, the second is not, and of neither the answer says so.
my $n = 70;
$node->safe_psql('app', "SELECT payout_set_destination('u' || i, 'stripe', 'acct_1') FROM generate_series(1, $n) i");
rule($provider, 'acct_1', fault => '500-done');
rule($provider, 'acct_1', fault => 500);
my $job = create_job($node, 'app', 'many', $n, args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 20), 'all are paid');
is($node->safe_psql('app', 'SELECT count(*), max(generation) FROM payout_transfers WHERE generation > 1'), '1|2', 'one under a new key');
is(scalar(@{ ask($provider, 'GET', '/books') }), $n, 'each once');

# An answer that says nothing is no reason to wait for ever; one that something was made is.
rule($provider, 'acct_nothing', fault => 500);
rule($provider, 'acct_nothing', fault => 'garbage', times => 2);
rule($provider, 'acct_other', unreached => 1, times => 3, body => '{"id": "tr_other", "amount": 7, "currency": "usd", "destination": "acct_other"}');
$node->safe_psql('app', "SELECT payout_set_destination(p || '1', 'stripe', 'acct_' || p) FROM unnest(ARRAY['nothing', 'other']) p");
$job = create_job($node, 'app', 'nothing', 1, prefix => 'nothing', args => q{provider => 'stripe'});
my $other = create_job($node, 'app', 'other', 1, prefix => 'other', args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 20), 'three answers that say nothing, and nothing is there: it is sent');
is($node->safe_psql('app', "SELECT generation, string_agg(http_status::text, ' ' ORDER BY attempt) FROM payout_transfers t JOIN payout_attempts USING (transfer_id) WHERE job_id = $job GROUP BY 1"),
	'2|500 200 200 200', 'under a new key');
my $end = time() + 20;
1 while time() < $end && grep({ $_->{method} eq 'GET' && $_->{url} =~ /acct_other/ } @{ ask($provider, 'GET', '/requests') }) < 8;
is($node->safe_psql('app', "SELECT t.status, generation, t.attempts, a.provider_reference FROM payout_transfers t JOIN payout_attempts a USING (transfer_id) WHERE job_id = $other AND attempt = 1"),
	'unknown|1|3|tr_other', 'an answer with another transfer: it waits for somebody to look');
is(scalar(grep { $_->{destination} eq 'acct_nothing' } @{ ask($provider, 'GET', '/books') }), 1, 'once');

# A list that cannot be read does not say that there is none.
$node->safe_psql('app', "SELECT payout_set_destination('list1', 'stripe', 'acct_list')");
rule($provider, 'acct_list', fault => '500-done');
rule($provider, '/v1/transfers', body => $_, times => 10)
  foreach ('{"has_more": false}', '{"has_more": false, "data": {}}', '{"has_more": false, "data": [{"object": "transfer"}, null]}');
$job = create_job($node, 'app', 'list', 1, prefix => 'list', args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job, 'completed', 30), 'lists that say nothing, and then one that does');
is($node->safe_psql('app', "SELECT generation FROM payout_transfers WHERE job_id = $job"), '1', 'it is found under its key');
is(scalar(grep { $_->{destination} eq 'acct_list' } @{ ask($provider, 'GET', '/books') }), 1, 'and was sent once');
books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();
