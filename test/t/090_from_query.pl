# A job made from a query is expanded by the worker: once, as the role that
# created it, with the names meaning what they meant to that role.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_node('main');
create_db_with_extension($node, 'app');
my $status = 'SELECT status, total_winners, completed_count, amount_paid FROM payout_job_status';

# Tables of one name in several schemas, each readable by its owner only.
$node->safe_psql('app', q{
	CREATE ROLE clerk LOGIN;
	CREATE ROLE other LOGIN;
	SELECT payout_grant('clerk', 'operator'), payout_grant('other', 'operator');
	CREATE SCHEMA clerk AUTHORIZATION clerk;
	CREATE SCHEMA other AUTHORIZATION other;
	CREATE SCHEMA postgres;
	CREATE TABLE clerk.winners AS SELECT 'clerk' || i AS user_id, i::bigint AS amount FROM generate_series(1, 700) i;
	CREATE TABLE other.winners AS SELECT 'other' || i AS user_id, i::bigint AS amount FROM generate_series(1, 800) i;
	CREATE TABLE postgres.winners AS SELECT 'postgres' || i AS user_id, i::bigint AS amount FROM generate_series(1, 900) i;
	CREATE TABLE public.winners AS SELECT 'public' || i AS user_id, i::bigint AS amount FROM generate_series(1, 5) i;
	ALTER TABLE clerk.winners OWNER TO clerk;
	ALTER TABLE other.winners OWNER TO other});

# "$user" in the search_path is whoever created the job, also a superuser.
foreach my $case ([ 'clerk', 700 ], [ 'other', 800 ], [ 'postgres', 900 ])
{
	my ($role, $n) = @$case;
	my $job = create_from($role, "by $role", 'SELECT user_id, amount FROM winners');
	ok(wait_for_job($node, 'app', $job), "the query of $role is expanded and paid");
	paid_once_ok($node, 'app', $n, $role, prefix => $role);
}
is($node->safe_psql('app', q{SELECT count(*) FROM payout_accounts WHERE user_id ~ '^public'}),
	0, 'nobody else is paid');

# A search_path that was set for the session, and current_user
my $job = create_from('clerk', 'session path',
	q{SELECT current_user || '-' || session_user || amount AS user_id, amount FROM tab},
	'CREATE SCHEMA mine; CREATE TABLE mine.tab AS SELECT 5::bigint AS amount; SET search_path = mine, public', 1);
ok(wait_for_job($node, 'app', $job), 'a search_path of the session is kept');
like($node->safe_psql('app', "SELECT user_id FROM payout_entries WHERE job_id = $job"),
	qr/^clerk-/, 'current_user is who created the job');

# Nobody gets at what he may not read by having the worker read it.
my ($code, $out, $error) = $node->psql('app', q{
	SELECT payout_create_job_from('theirs', 'SELECT user_id, amount FROM other.winners')},
	extra_params => [ '-U', 'clerk' ]);
like($error, qr/permission denied for schema other/, 'refused at creation');
$node->safe_psql('app', 'GRANT USAGE ON SCHEMA clerk TO other; GRANT SELECT ON clerk.winners TO other');
$node->safe_psql('app', 'SELECT payout_stop_workers()');
$job = create_from('other', 'revoked', q{SELECT 'again' || user_id AS user_id, amount FROM clerk.winners});
$node->safe_psql('app', 'REVOKE SELECT ON clerk.winners FROM other; SELECT payout_start_worker()');
ok(wait_for_job($node, 'app', $job, 'failed'), 'and when it was revoked meanwhile');
like($node->safe_psql('app', "SELECT error FROM payout_job_status($job)"),
	qr/permission denied for table winners/, 'with the reason');
$node->safe_psql('app', 'GRANT SELECT ON clerk.winners TO other');
$node->safe_psql('app', "SELECT payout_retry_job($job)");
ok(wait_for_job($node, 'app', $job), 'mended and retried, it is paid');
paid_once_ok($node, 'app', 700, 'retried', prefix => 'againclerk');

# A superuser's query reads all, but is not run as one.
$job = create_from('postgres', 'power', q{SELECT 'power' AS user_id, count(*) AS amount FROM clerk.winners, other.winners});
ok(wait_for_job($node, 'app', $job), 'a superuser reads all tables');
foreach my $query (
	q{SELECT 'p' AS user_id, 1 AS amount FROM pg_read_file('PG_VERSION')},
	q{SELECT 'p' AS user_id, 1 AS amount FROM pg_catalog.set_config('payoutq.batch_size', '1', false), evil()})
{
	$node->safe_psql('app', q{
		CREATE OR REPLACE FUNCTION evil() RETURNS int LANGUAGE plpgsql AS
		'BEGIN ALTER ROLE clerk SUPERUSER; RETURN 1; END'});
	$job = create_from('postgres', $query, $query);
	ok(wait_for_job($node, 'app', $job, 'failed'), 'and does nothing else');
}
is($node->safe_psql('app', q{SELECT rolsuper FROM pg_roles WHERE rolname = 'clerk'}), 'f', 'no role has gained by it');

books_ok($node, 'app', 'at the end');
$node->stop;
done_testing();

sub create_from
{
	my ($role, $reference, $query, $before, $as_owner) = @_;
	$before //= '';
	$node->safe_psql('app', 'GRANT CREATE ON DATABASE app TO clerk') if $as_owner;
	return $node->safe_psql('app',
		"$before;\nSELECT payout_create_job_from(\$r\$$reference\$r\$, \$q\$$query\$q\$)",
		extra_params => [ '-U', $role ]);
}
