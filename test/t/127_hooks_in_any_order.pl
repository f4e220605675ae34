# Web hooks come before the answers, in any order and more than once, while a
# part of the calls gets no answer: everybody is paid once, and what was made
# without an answer is found by its web hook.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use JSON::PP;
use Payoutq;
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $n = 300;
my $seed = $ENV{PAYOUTQ_TEST_SEED} // 20261122;
note("PAYOUTQ_TEST_SEED=$seed");

# Without an answer it would be asked again only after the test.
my $node = start_node('main', conf => q(
payoutq.interval = 1s
payoutq.retry_base = 10min
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $provider = start_provider(seed => $seed, faults => 0.3, latency => 30, kinds => 'lost,silent-done,502-done,500-done', hooks => 'whsec_1');
create_provider($node, 'app', 'stripe', base_url => $provider->{url}, api_key => 'sk_test_1', webhook_secret => 'whsec_1',
	rate_limit => 1000, timeout => '500ms');
$node->safe_psql('app', qq{
	SELECT count(payout_set_destination('u' || i, 'stripe', 'acct_' || i)) FROM generate_series(1, $n) i;
	CREATE TABLE told (answer text)});

# The application
my $test = $$;
my $application = fork() // die "fork: $!";
if ($application == 0)
{
	eval
	{
		while (getppid() == $test)
		{
			foreach my $hook (@{ ask($provider, 'GET', '/hooks') })
			{
				my $headers = encode_json($hook->{headers});
				$node->psql('app', "INSERT INTO told SELECT payout_handle_webhook('stripe', '$headers', convert_to(\$hook\$$hook->{body}\$hook\$, 'UTF8'))");
			}
			usleep(1000);
		}
		1;
	} or diag($@);
	POSIX::_exit(0);
}

my $job = create_job($node, 'app', 'hooks', $n, args => q{provider => 'stripe'});
ok(wait_for_job($node, 'app', $job), 'the job is completed');
ok(wait_for($node, 'app', q{SELECT count(*) FROM told WHERE answer <> 'duplicate'}, $n), 'each event is told once');
kill 'KILL', $application;
waitpid $application, 0;

is($node->safe_psql('app', "SELECT completed_count, failed_count FROM payout_job_status($job)"), "$n|0", 'all are paid');
my %paid;
$paid{ $_->{metadata}{payoutq_transfer} }++ foreach @{ ask($provider, 'GET', '/books') };
is_deeply([ sort { $a <=> $b } values %paid ], [ (1) x $n ], 'once in the books of the provider');
cmp_ok($node->safe_psql('app', q{SELECT count(*) FROM payout_attempts WHERE outcome = 'sent' AND http_status IS DISTINCT FROM 200}), '>', 0,
	'what was made without an answer was found by its web hook');
is($node->safe_psql('app', q{SELECT count(*) FROM payout_attempts WHERE attempt > 1}), 0, 'and nothing was called again');
is($node->safe_psql('app', q{SELECT string_agg(DISTINCT answer, ' ' ORDER BY answer) FROM told WHERE answer <> 'ignored'}), 'accepted duplicate',
	'web hooks are accepted, and again they are duplicates');
books_ok($node, 'app', 'after the web hooks');

$node->stop;
done_testing();
