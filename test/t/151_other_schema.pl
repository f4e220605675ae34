# In a schema that is not everybody's: payout_grant() says what else a role needs,
# and then it can work.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main');
my ($code, $out, $error);

$node->safe_psql('postgres', q{
	CREATE DATABASE app;
	CREATE ROLE "Shop 7" LOGIN});
$node->safe_psql('app', q{
	CREATE SCHEMA "Pay.Out";
	CREATE EXTENSION payoutq SCHEMA "Pay.Out"});

($code, $out, $error) = $node->psql('app', q{SELECT "Pay.Out".payout_grant('"Shop 7"', 'operator')});
is($code, 0, 'a level is granted');
like($error, qr/WARNING:  role "Shop 7" lacks USAGE on schema "Pay\.Out"$/m, 'and what is missing is said');
my ($hint) = $error =~ /HINT:  (GRANT .*)\.$/m;
$node->safe_psql('app', $hint);

my $job = $node->safe_psql('app', q{SELECT "Pay.Out".payout_create_job('job', ARRAY['ann'], ARRAY[10])},
	extra_params => [ '-U', 'Shop 7' ]);
ok(wait_for($node, 'app', qq{SELECT status FROM "Pay.Out".payout_job_status($job)}, 'completed'), 'what the hint says is enough');
is($node->safe_psql('app', q{SELECT balance FROM "Pay.Out".payout_accounts}, extra_params => [ '-U', 'Shop 7' ]), 10, 'for views, too');
($code, $out, $error) = $node->psql('app', q{SELECT "Pay.Out".payout_grant('"Shop 7"', 'admin')});
is($error, '', 'nothing is missing any more');

$node->stop;
done_testing();
