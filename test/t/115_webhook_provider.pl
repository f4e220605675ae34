# Providers of kind "webhook": a signed request to a service of the application,
# and all that it may answer.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Digest::SHA qw(hmac_sha256_hex);
use Encode;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 200ms
payoutq.max_attempts = 3
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
my $secret = 'whsec_not_to_be_seen';
create_provider($node, 'app', 'wire', kind => 'webhook', base_url => "$provider->{url}/pay", status_url => "$provider->{url}/status?via=wire",
	webhook_secret => $secret, rate_limit => 1000, timeout => '1s');
create_provider($node, 'app', 'chain', kind => 'webhook', base_url => "$provider->{url}/pay", webhook_secret => $secret, rate_limit => 1000,
	timeout => '1s');

# The request
my $job = pay('wire', 'anna "ä"');
ok(wait_for_job($node, 'app', $job), 'a service that answers "completed"');
is($node->safe_psql('app', 'SELECT status, provider_reference, attempts FROM payout_transfers'), 'completed|pay_1|1', 'it is at once');
my ($request, @more) = @{ ask($provider, 'GET', '/requests') };
is(scalar(@more), 0, 'and not asked for again');
is_deeply(decode_json(Encode::encode_utf8($request->{body})),
	{ transfer_id => 1, job_id => $job, entry => 1, amount => 101, currency => 'EUR', user_id => "anna \"\x{e4}\"",
		destination => "to anna \"\x{e4}\"", idempotency_key => 'payout:1',
		origin => $node->safe_psql('app', 'SELECT origin FROM payoutq.key_origin') }, 'the order');
is("$request->{method} $request->{url} $request->{headers}{'content-type'} $request->{headers}{'idempotency-key'}",
	'POST /pay application/json payout:1', 'address and headers');
ok(is_signed($request, Encode::encode_utf8($request->{body})), 'signed, which the test reckons by itself');
ok(!is_signed($request, Encode::encode_utf8($request->{body}) . ' '), 'and of nothing else');
ok(!exists $request->{headers}{authorization}, 'the secret is not sent');

# What it may answer, the attempts that makes, and how it ends.
my %rows = (
	transient => [ '{"status": "failed", "class": "transient", "reason": "no line"}', 'transient 200, completed 200', 'completed' ],
	permanent => [ '{"status": "failed", "class": "permanent", "reason": "no such account"}', 'permanent 200', 'failed_terminal' ],
	unknown   => [ '{"status": "failed", "class": "unknown"}', 'unknown 200, completed 200', 'completed' ],
	strange   => [ '{"status": "failed", "class": "odd"}', 'unknown 200, completed 200', 'completed' ],
	classless => [ '{"status": "failed"}', 'unknown 200, completed 200', 'completed' ],
	unnamed   => [ '{"status": "sent"}', 'unknown 200, completed 200', 'completed' ],
	empty     => [ '', 'unknown 200, completed 200', 'completed' ],
	text      => [ 'fine', 'unknown 200, completed 200', 'completed' ],
	list      => [ '[{"status": "completed"}]', 'unknown 200, completed 200', 'completed' ],
	plain     => [ '{"status": "completed"}', 'completed 200', 'completed' ],
	busy      => [ { status => 503 }, 'unknown 503, completed 200', 'completed' ],
	many      => [ { status => 429, times => 4 }, 'transient 429, transient 429, transient 429, transient 429, completed 200', 'completed' ],
	invalid   => [ { status => 422, body => '{"status": "failed", "class": "permanent"}' }, 'permanent 422', 'failed_terminal' ],
	proxy     => [ { status => 422, body => '<html>' }, 'unknown 422, completed 200', 'completed' ],
);
foreach my $name (keys %rows)
{
	my $fault = $rows{$name}[0];
	rule($provider, "to $name", unreached => 1, ref $fault ? (body => '', headers => { 'Retry-After' => '0' }, %$fault) : (body => $fault));
}
$job = pay('wire', sort keys %rows);
ok(wait_for_job($node, 'app', $job), 'all come to an end');
foreach my $name (sort keys %rows)
{
	is($node->safe_psql('app', qq{
			SELECT t.status, string_agg(a.outcome || ' ' || a.http_status, ', ' ORDER BY a.attempt)
			FROM payout_transfers t JOIN payout_attempts a USING (transfer_id) WHERE job_id = $job AND user_id = '$name' GROUP BY t.status}),
		"$rows{$name}[2]|$rows{$name}[1]", $name);
}
is($node->safe_psql('app', "SELECT error FROM payout_transfers WHERE user_id = 'permanent'"), 'no such account', 'its reason is kept');
my @replays = grep { $_->{method} eq 'POST' && $_->{body} =~ /"to (many|busy)"/ } @{ ask($provider, 'GET', '/requests') };
is(scalar(@replays), 7, 'replays');
is_deeply([ grep { !is_signed($_, $_->{body}) } @replays ], [], 'each is signed anew');
my %bodies = map { $_->{body} => 1 } @replays;
is(scalar(keys %bodies), 2, 'over the same body');

# Sent now, confirmed later, by asking: the service knows it only after a while.
rule($provider, 'to ask', unreached => 1, body => '{"status": "sent", "reference": "w&1"}');
rule($provider, '/status', body => '{"status": "sent"}', times => 2);
rule($provider, '/status', body => '{"status": "failed", "reason": "returned"}');
$job = pay('wire', 'ask');
ok(wait_for($node, 'app', "SELECT status, error FROM payout_transfers WHERE job_id = $job", 'confirmation_failed|returned'), 'asked for until it says something');
is($node->safe_psql('app', "SELECT payout_balance('ask', 'EUR')"), 101, 'the money is back');
my @questions = grep { $_->{method} eq 'GET' } @{ ask($provider, 'GET', '/requests') };
is(join(' ', map { $_->{url} } @questions), join(' ', ('/status?via=wire&reference=w%261') x 3), 'three questions');
ok(is_signed($questions[0], 'w&1'), 'which are signed too');
rule($provider, 'to ask2', body => '{"status": "sent", "reference": "pay_' . (3 + keys %rows) . '"}');
$job = pay('wire', 'ask2');
ok(wait_for_job($node, 'app', $job), 'one that is confirmed');
is($node->safe_psql('app', "SELECT status, error FROM payout_transfers WHERE job_id = $job"), 'completed|', 'without a reason');

# Confirmed by the application, which calls payout_confirm_transfer().
rule($provider, "to $_", unreached => 1, body => "{\"status\": \"sent\", \"reference\": \"$_\"}") foreach ('h1', 'h2');
my $early = qq{SELECT payout_confirm_transfer('chain', 'h1', true)};
my ($code, $out, $error) = $node->psql('app', $early);
like($error, qr/has no transfer with the reference "h1"/, 'a web hook that comes before the transfer is known is told so');
$job = pay('chain', 'h1', 'h2');
ok(wait_for($node, 'app', "SELECT string_agg(status, ' ') FROM payout_transfers WHERE job_id = $job", 'sent sent'), 'sent');
is($node->safe_psql('app', "SELECT status FROM payout_job_status($job)"), 'running', 'the job waits');
is($node->safe_psql('app', $early), 'completed', 'and succeeds when it comes again');
is($node->safe_psql('app', $early), 'completed', 'and again');
is($node->safe_psql('app', q{SELECT payout_confirm_transfer('chain', 'h2', false, 'reorganized')}), 'confirmation_failed', 'or says no');
ok(wait_for_job($node, 'app', $job), 'the job ends');
is($node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)"), '1|1', 'with both');
is(scalar(grep { $_->{method} eq 'GET' && $_->{url} =~ /h[12]/ } @{ ask($provider, 'GET', '/requests') }), 0, 'without status_url nobody is asked');
unlike(slurp_file($node->logfile), qr/not_to_be_seen/, 'the secret is not in the log');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

sub pay
{
	my ($server, @users) = @_;
	my $list = join ', ', map { "('$users[$_]', " . (101 + $_) . ')' } 0 .. $#users;

	$node->safe_psql('app', "SELECT payout_set_destination(u, '$server', 'to ' || u) FROM (VALUES $list) v (u, a)");
	return $node->safe_psql('app', qq{
		SELECT payout_create_job('$users[0]', array_agg(u), array_agg(a::bigint), provider => '$server', currency => 'EUR')
		FROM (VALUES $list) v (u, a)});
}

# Of "t.text", and t is not long ago.
sub is_signed
{
	my ($r, $text) = @_;
	my ($t, $v1) = ($r->{headers}{'payoutq-signature'} // '') =~ /^t=(\d+),v1=([0-9a-f]{64})$/ or return 0;

	return abs(time() - $t) < 60 && $v1 eq hmac_sha256_hex("$t.$text", $secret);
}
