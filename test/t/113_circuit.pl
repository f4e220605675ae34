# A provider that refuses everybody is left alone, and no transfer suffers for
# it; what is wrong with the configuration is shown, and secrets never are.

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
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
my $secret = 'sk_test_not_to_be_seen';
create_provider($node, 'app', 'good', base_url => $provider->{url}, api_key => $secret, rate_limit => 1000);
create_provider($node, 'app', 'bad', base_url => $provider->{url}, api_key => 'pk_not_to_be_seen', rate_limit => 1000);

# The wrong key: 401. However often it is tried, it is nobody's fault.
my $open = q{SELECT open_until > clock_timestamp(), reason FROM payout_providers WHERE provider = 'bad'};
my $close = q{UPDATE payoutq.circuit SET open_until = clock_timestamp()};
my $bad = pay('bad', 'bad', 3);
foreach my $n (1 .. 5)
{
	ok(wait_for($node, 'app', $open, 't|HTTP 401 invalid_request_error api_key_missing'), "refusal $n: nothing is sent for a while");
	ok(wait_for($node, 'app', "SELECT string_agg(DISTINCT status, ' ') FROM payout_transfers WHERE job_id = $bad AND attempts > 0", 'retryable'),
		"refusal $n: no transfer has failed");
	$node->safe_psql('app', $close) if $n < 5;
}

# Those of another provider are sent, and meanwhile none of this one.
my $before = posts('bad');
ok(wait_for_job($node, 'app', pay('good', 'good', 3)), 'another provider is sent to');
is(posts('bad'), $before, 'this one is left alone');
cmp_ok($node->safe_psql('app', q{SELECT open_until - clock_timestamp() > '1 minute' FROM payout_providers WHERE provider = 'bad'}), 'eq', 't',
	'for longer, the more often it refuses');

# With the right key all are paid, although they have been called for more often than may be.
$node->safe_psql('app', "ALTER USER MAPPING FOR PUBLIC SERVER bad OPTIONS (SET api_key '$secret'); $close");
ok(wait_for_job($node, 'app', $bad), 'with the right key all are sent');
is($node->safe_psql('app', "SELECT count(*) FILTER (WHERE status = 'completed'), max(attempts) > 3 FROM payout_transfers WHERE job_id = $bad"),
	'3|t', 'no attempt was used up');
is($node->safe_psql('app', $open), '|', 'and nothing is wrong any more');

# 403 of one call
rule($provider, 'acct_403_1', unreached => 1, status => 403, code => 'platform_account_required');
my $forbidden = pay('403', 'good', 1);
ok(wait_for($node, 'app', q{SELECT reason FROM payout_providers WHERE provider = 'good'}, 'HTTP 403 invalid_request_error platform_account_required'),
	'403 is one too');
$node->safe_psql('app', $close);
ok(wait_for_job($node, 'app', $forbidden), 'and goes on');

# Nobody listens: that is nobody's fault either.
my $port = start_provider();
stop_provider($port);
create_provider($node, 'app', 'down', base_url => $port->{url}, api_key => $secret, rate_limit => 1000);
my $down = pay('down', 'down', 2);
foreach my $n (1 .. 5)
{
	ok(wait_for($node, 'app', q{SELECT open_until > clock_timestamp() AND reason ~ ' connect to server$' FROM payout_providers WHERE provider = 'down'}),
		"try $n: nobody listens");
	$node->safe_psql('app', $close);
}
ok(wait_for($node, 'app', "SELECT string_agg(status, ' '), max(attempts) > 3 FROM payout_transfers WHERE job_id = $down", 'retryable retryable|t'),
	'no transfer has failed');
my $up = start_provider(port => $port->{port});
$node->safe_psql('app', $close);
ok(wait_for_job($node, 'app', $down), 'sent when somebody listens');
is(scalar(@{ ask($up, 'GET', '/books') }), 2, 'each once');

# Without a user mapping
create_provider($node, 'app', 'keyless', base_url => $provider->{url}, rate_limit => 1000);
my $keyless = pay('keyless', 'keyless', 1);
ok(wait_for($node, 'app', q{SELECT count(*) > 0 FROM payout_workers WHERE last_error = 'there is no user mapping for PUBLIC with the option api_key'}),
	'without a user mapping the problem is shown');
my $log = $node->logfile;
$log = "$ENV{TESTDIR}/$log" if $log !~ m{^/};
my $warnings = qq{SELECT count(*) FROM regexp_matches(pg_read_file('$log'), 'WARNING:  could not use provider "keyless": there is no user mapping', 'g')};
ok(wait_for($node, 'app', $warnings, 1), 'and logged');
is(posts('keyless'), 0, 'and nothing is sent');
is($node->safe_psql('app', "SELECT status, attempts FROM payout_transfers WHERE job_id = $keyless"), 'pending|0', 'nor tried');
$node->safe_psql('app', "CREATE USER MAPPING FOR PUBLIC SERVER keyless OPTIONS (api_key '$secret')");
ok(wait_for_job($node, 'app', $keyless), 'with one it is sent');
is($node->safe_psql('app', $warnings), 1, '(it was logged once)');

# What may be written
my $server = 'CREATE SERVER s FOREIGN DATA WRAPPER payout_provider OPTIONS';
my $mapping = 'CREATE USER MAPPING FOR CURRENT_USER SERVER good OPTIONS';
foreach (
	[ "$server (kind 'stripe', base_url 'http://api.example.com')", qr/"base_url" must begin with https/ ],
	[ "$server (kind 'stripe', base_url 'http://127.0.0.1.example.com')", qr/must begin with https/ ],
	[ "$server (kind 'stripe', base_url 'http://127.0.0.1\@example.com')", qr/is not a URL of a provider/ ],
	[ "$server (kind 'stripe', base_url 'https://me:$secret\@example.com')", qr/is not a URL of a provider/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com/')", qr/is not a URL of a provider/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', timeout '0')", qr/"timeout" must be from 100 milliseconds to 10 minutes/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', timeout '11 minutes')", qr/"timeout" must be from 100 milliseconds to 10 minutes/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', quiet_period '79 seconds')", qr/"quiet_period" must not be shorter than "timeout"/ ],
	[ "$server (kind 'webhook', base_url 'https://example.com', status_url 'http://example.com')", qr/"status_url" must begin with https/ ],
	[ "$server (kind 'stripe', base_url 'file:///etc/passwd')", qr/must begin with https|not a URL/ ],
	[ "$server (kind 'stripe', base_url 'nowhere')", qr/must begin with https|not a URL/ ],
	[ "$server (kind 'stripe')", qr/needs the option "base_url"/ ],
	[ "$server (base_url 'https://example.com')", qr/needs the option "kind"/ ],
	[ "$server (kind 'wire')", qr/invalid kind of provider "wire"/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', rate_limit '0')", qr/number from 1 to 999999/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', timeout 'soon')", qr/invalid input syntax for type interval/ ],
	[ "$server (kind 'stripe', base_url 'https://example.com', api_key '$secret')", qr/invalid option "api_key"/ ],
	[ "$mapping (api_key E'$secret\\nX: y')", qr/must not be empty, nor have line breaks/ ],
	[ "$mapping (password '$secret')", qr/invalid option "password"/ ],
	[ "ALTER SERVER good OPTIONS (SET base_url 'http://example.com')", qr/must begin with https/ ])
{
	my ($command, $expected) = @$_;
	my ($code, $out, $error) = $node->psql('app', $command);
	my ($message) = $error =~ /ERROR: (.*)/s;
	like($message, $expected, $command =~ s/.*OPTIONS //r);
	unlike($message =~ s/^LINE.*//smr, qr/not_to_be_seen/, 'the message has no secret');
}
foreach my $url ('https://api.example.com', 'http://127.0.0.1:1', 'http://[::1]:1', 'http://localhost:1')
{
	is($node->psql('app', "$server (kind 'stripe', base_url '$url'); DROP SERVER s"), 0, "allowed: $url");
}

# Secrets are nowhere.
my @views = split /\n/, $node->safe_psql('app', q{
	SELECT quote_ident(schemaname) || '.' || quote_ident(viewname) FROM pg_views WHERE viewname LIKE 'payout%'
	UNION ALL SELECT 'pg_stat_activity'});
cmp_ok(@views, '>', 10, 'there are views');
is($node->safe_psql('app', join ' UNION ALL ', map { "SELECT '$_' FROM $_ v WHERE v::text LIKE '%not\\_to\\_be\\_seen%' AND v::text NOT LIKE '%UNION%'" } @views),
	'', 'no view shows a secret');
is($node->safe_psql('app', q{
		CREATE ROLE curious;
		SET ROLE curious;
		SELECT count(*) FROM pg_user_mappings WHERE umoptions IS NOT NULL}),
	0, 'nor do the catalogs to others');
unlike(join('', grep { !/STATEMENT/ } split /^/, slurp_file($node->logfile)) =~ s/^\s.*$//gmr, qr/not_to_be_seen/, 'the log has none');
books_ok($node, 'app', 'at the end');

$node->stop;
done_testing();

sub pay
{
	my ($reference, $server, $n) = @_;

	$node->safe_psql('app', qq{
		SELECT payout_set_destination('$reference' || i, '$server', 'acct_${reference}_' || i) FROM generate_series(1, $n) i});
	return create_job($node, 'app', $reference, $n, prefix => $reference, args => "provider => '$server'");
}

sub posts
{
	my ($name) = @_;

	return scalar grep { $_->{method} eq 'POST' && $_->{body} =~ /destination=acct_${name}_/ } @{ ask($provider, 'GET', '/requests') };
}
