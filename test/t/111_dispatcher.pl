# What the dispatcher sends to a provider of kind "stripe", and what it makes of
# each answer: the table of retries, row by row.

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
payoutq.retry_cap = 1s
payoutq.max_attempts = 3
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider();
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', api_version => '2024-04-10',
	rate_limit => 1000, timeout => '1s', quiet_period => '1s');

# One person, by himself
my $job = pay('first', 'anna');
ok(wait_for_job($node, 'app', $job), 'a transfer is sent and confirmed by itself');
is($node->safe_psql('app', "SELECT status, attempts, provider_reference, idempotency_key FROM payout_transfers"),
	'completed|1|tr_1|payout:1', 'it has the id of the provider');
is($node->safe_psql('app', q{SELECT string_agg(kind || ' ' || account || ' ' || amount, ', ' ORDER BY posted_at, kind, account) FROM payout_ledger WHERE transfer_id = 1}),
	'hold @transit:stripe 101, hold anna -101, transfer @outside 101, transfer @transit:stripe -101', 'and its ledger rows');
my ($sent, $confirmed) = @{ ask($provider, 'GET', '/requests') };
is("$sent->{method} $sent->{url}", 'POST /v1/transfers', 'address');
is($sent->{body}, "amount=101&currency=eur&destination=acct_anna&transfer_group=payoutq%3A$job"
	  . '&metadata%5Bpayoutq_transfer%5D=1&metadata%5Bpayoutq_key%5D=payout%3A1&metadata%5Bpayoutq_origin%5D='
	  . $node->safe_psql('app', 'SELECT origin FROM payoutq.key_origin'), 'form');
is_deeply({ map { $_ => $sent->{headers}{$_} } qw(content-type authorization idempotency-key stripe-version) },
	{ 'content-type' => 'application/x-www-form-urlencoded', authorization => 'Bearer sk_test_1',
		'idempotency-key' => 'payout:1', 'stripe-version' => '2024-04-10' }, 'headers');
is("$confirmed->{method} $confirmed->{url} $confirmed->{body}", 'GET /v1/transfers/tr_1 ', 'the confirmation reads it again');
ok(!exists $confirmed->{headers}{'idempotency-key'}, 'without a key');
is($confirmed->{headers}{'stripe-version'}, '2024-04-10', 'of the same version');

# A destination that would not do in a form as it is, and one of no use
$node->safe_psql('app', q{SELECT payout_set_destination('odd', 'stripe', 'acct_ä &=+%')});
wait_for_job($node, 'app', pay('odd', 'odd'));
is(posts('acct_ä &=+%')->[0]{body} =~ /destination=([^&]*)/ && $1, 'acct_%C3%A4%20%26%3D%2B%25', 'encoded');

# The table: what the first calls get, which attempts that makes, and how it ends.
my $paid = 'completed';
my $back = 'failed_terminal';
my %rows = (
	busy      => [ { fault => 409 }, 'unknown 409, sent 200', $paid ],
	limited   => [ { fault => '429-limited', times => 4 }, 'transient 429, transient 429, transient 429, transient 429, sent 200', $paid ],
	locked    => [ { fault => 429 }, 'transient 429, sent 200', $paid ],
	locked3   => [ { fault => 429, times => 3 }, 'transient 429, transient 429, transient 429', $back ],
	made500   => [ { fault => '500-done' }, 'unknown 500, unknown 500, sent 500', $paid ],
	failed500 => [ { fault => 500 }, 'unknown 500, unknown 500, unknown 500, sent 200', $paid ],
	made502   => [ { fault => '502-done' }, 'unknown 502, sent 200', $paid ],
	down503   => [ { fault => 503 }, 'unknown 503, sent 200', $paid ],
	down504   => [ { unreached => 1, status => 504, body => '' }, 'unknown 504, sent 200', $paid ],
	lost      => [ { fault => 'lost' }, 'unknown -, sent 200', $paid ],
	reset     => [ { fault => 'reset' }, 'unknown -, sent 200', $paid ],
	silent    => [ { fault => 'silent' }, 'unknown -, sent 200', $paid ],
	slow      => [ { fault => 'slow-done', delay => 300 }, 'sent 200', $paid ],
	garbage   => [ { fault => 'garbage' }, 'unknown 200, sent 200', $paid ],
	bytes     => [ { hex => '7b226964223a22ff00fe227d' }, 'unknown 200, sent 200', $paid ],
	nested    => [ { body => '[' x 30_000 }, 'unknown 200, sent 200', $paid ],
	other     => [ { body => '{"id": "tr_x", "amount": 1, "currency": "eur", "destination": "acct_other"}' }, 'unknown 200, sent 200', $paid ],
	endless   => [ { long => 200_000 }, 'unknown 200, sent 200', $paid ],
	elsewhere => [ { unreached => 1, status => 302, body => '', headers => { Location => '/elsewhere' } }, 'unknown 302, sent 200', $paid ],
	mixed     => [ { unreached => 1, status => 400, type => 'idempotency_error' }, 'unknown 400, sent 200', $paid ],
	small     => [ { unreached => 1, status => 400, code => 'amount_too_small' }, 'permanent 400', $back ],
	gone      => [ { unreached => 1, status => 404, code => 'resource_missing' }, 'permanent 404', $back ],
	closed    => [ { times => 0 }, 'permanent 400', $back ],
	patient   => [ { fault => '429-limited', headers => { 'Retry-After' => '3', 'Stripe-Rate-Limited-Reason' => 'global-rate' } },
		'transient 429, sent 200', $paid ],
	patient503 => [ { fault => 503, headers => { 'Retry-After' => '3' } }, 'unknown 503, sent 200', $paid ],
	nobody    => [ { times => 0 }, '', $back ],
);
my @names = sort keys %rows;
rule($provider, "acct_$_", %{ $rows{$_}[0] }) foreach grep { $rows{$_}[0]{times} // 1 } @names;
ask($provider, 'DELETE', '/requests');
$node->safe_psql('app', "SELECT payout_set_destination('nobody', 'stripe', null)");
$job = pay('table', @names);
ok(wait_for_job($node, 'app', $job), 'all come to an end');

foreach my $name (@names)
{
	my ($fault, $attempts, $status) = @{ $rows{$name} };
	is($node->safe_psql('app', qq{
			SELECT t.status, coalesce(string_agg(a.outcome || ' ' || coalesce(a.http_status::text, '-'), ', ' ORDER BY a.attempt), '')
			FROM payout_transfers t LEFT JOIN payout_attempts a USING (transfer_id)
			WHERE job_id = $job AND user_id = '$name' GROUP BY t.status}),
		"$status|$attempts", $name);

	# Under one key, everything is the same.
	my %requests;
	push @{ $requests{ $_->{headers}{'idempotency-key'} } }, join("\n", @{ $_->{raw_headers} }, $_->{body}) foreach @{ posts("acct_$name") };
	is_deeply([ map { my %seen; my @different = grep { !$seen{$_}++ } @$_; scalar @different } values %requests ],
		[ (1) x keys %requests ], "$name: replays are the same to the byte");
	is(scalar(grep { $_->{destination} eq "acct_$name" } @{ ask($provider, 'GET', '/books') }), $status eq $paid ? 1 : 0, "$name: in the provider's books");
	is($node->safe_psql('app', "SELECT payout_balance('$name', 'EUR')"), $status eq $paid ? 0 : 100 + index_of($name), "$name: the money");
}
is($node->safe_psql('app', qq{SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM payout_transfers WHERE job_id = $job AND generation > 1}),
	'failed500', 'a new key for what the provider has stored as failed, when it is sure that it was not done');
like(posts('acct_failed500')->[3]{headers}{'idempotency-key'}, qr/^payout:\d+:g2$/, 'the next generation');
is($node->safe_psql('app', "SELECT error FROM payout_transfers WHERE user_id = 'nobody'"), 'stripe_account_not_connected', 'without an account');
is($node->safe_psql('app', "SELECT count(*) FROM payout_attempts a JOIN payout_transfers t USING (transfer_id) WHERE user_id = 'endless' AND a.error = 'the answer is longer than 65536 bytes'"),
	1, 'an answer that is too long says so');
is(scalar(grep { $_->{url} =~ /elsewhere/ } @{ ask($provider, 'GET', '/requests') }), 0, 'redirects are not followed');
cmp_ok(pause('acct_patient'), '>=', 3000, 'Retry-After is honoured');
cmp_ok(pause('acct_patient503'), '>=', 3000, 'also by another status');
cmp_ok(pause('acct_down503'), '<', 2000, 'without it, the pause is ours');
is($node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)"),
	scalar(grep { $_->[2] eq $paid } values %rows) . '|' . scalar(grep { $_->[2] eq $back } values %rows), 'the job counts both');
is($node->safe_psql('app', q{SELECT payout_balance('@transit:stripe', 'EUR')}), 0, 'nothing is left in transit');
books_ok($node, 'app', 'after the table');
is(worker_errors($node), '', 'no complaint of a worker');

$node->stop;
done_testing();

# A job for these users, each with an account of his name and another amount.
sub pay
{
	my ($reference, @users) = @_;
	my $list = join ', ', map { "('$_', " . (100 + index_of($_, @users)) . ')' } @users;

	$node->safe_psql('app', qq{
		SELECT payout_set_destination(u, 'stripe', CASE u WHEN 'closed' THEN 'acct_closed' ELSE 'acct_' || u END)
		FROM (VALUES $list) v (u, a)
		WHERE u <> 'nobody' AND u NOT IN (SELECT user_id FROM payoutq.destination)});
	return $node->safe_psql('app', qq{
		SELECT payout_create_job('$reference', array_agg(u), array_agg(a::bigint), provider => 'stripe', currency => 'EUR')
		FROM (VALUES $list) v (u, a)});
}

sub index_of
{
	my ($name, @list) = @_;

	@list = @names if !@list;
	return 1 + (grep { $list[$_] eq $name } 0 .. $#list)[0];
}

sub posts
{
	my ($destination) = @_;
	my $encoded = $destination =~ s/([^A-Za-z0-9_])/sprintf('%%%02X', ord($1))/ger;

	return [ grep { $_->{method} eq 'POST' && $_->{body} =~ /destination=\Q$encoded\E&/ } @{ ask($provider, 'GET', '/requests') } ];
}

sub pause
{
	my $posts = posts($_[0]);

	return $posts->[1]{at} - $posts->[0]{at};
}
