
=head1 NAME

Payoutq - servers with payoutq for the TAP tests

=head1 SYNOPSIS

	use FindBin;
	use lib "$FindBin::RealBin/../perl";
	use Payoutq;
	use Test::More;

	my $node = start_node('main', conf => "payoutq.workers = 1");
	create_db_with_extension($node, 'app');
	...
	ok(wait_for($node, 'app', $query), 'the job is finished');

=cut

package Payoutq;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(
  start_node
  create_db_with_extension
  wait_for
  kill9
);

=pod

=head1 FUNCTIONS

=over

=item start_node($name, %options)

Starts a server and returns it.  Options: C<preload>, the value of
shared_preload_libraries (payoutq; empty to go without), and C<conf>, more
lines of configuration.

=cut

sub start_node
{
	my ($name, %options) = @_;
	my $preload = $options{preload} // 'payoutq';
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;

	# The module turns restart_after_crash off; a test that kills a worker
	# wants what users have.
	$node->append_conf('postgresql.conf', qq(
shared_preload_libraries = '$preload'
restart_after_crash = on
fsync = off
log_statement = none
log_line_prefix = '%m [%p] %b %q%a '
));
	$node->append_conf('postgresql.conf', $options{conf})
	  if defined $options{conf};
	$node->start;
	return $node;
}

=item create_db_with_extension($node, $db)

=cut

sub create_db_with_extension
{
	my ($node, $db) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION payoutq');
	return;
}

=item wait_for($node, $db, $query, $expected, $limit)

Runs the query until its result is C<$expected> (default: t), at most for
C<$limit> seconds (default: the PG_TEST_TIMEOUT_DEFAULT of the other tests).
Errors count as another result, because the server may just be restarting.
Returns true, or writes what is known about the jobs and returns false.

=cut

sub wait_for
{
	my ($node, $db, $query, $expected, $limit) = @_;
	my ($status, $result, $error);

	$expected //= 't';
	$limit //= $PostgreSQL::Test::Utils::timeout_default;

	my $end = time() + $limit;
	while (1)
	{
		($status, $result, $error) = $node->psql($db, $query);
		return 1 if $status == 0 && $result eq $expected;
		last if time() > $end;
		usleep(20_000);
	}

	diag("waited $limit s for \"$expected\" from: $query\n"
		  . "last result: \"$result\"\n$error");
	_diagnose($node, $db);
	return 0;
}

sub _diagnose
{
	my ($node, $db) = @_;

	foreach my $query (
		'SELECT * FROM payout_jobs',
		q(SELECT * FROM payout_batches
		  WHERE status <> 'completed' OR error IS NOT NULL LIMIT 20),
		q(SELECT pid, backend_type, datname, state, wait_event_type, wait_event,
		         regexp_replace(left(query, 60), '\s+', ' ', 'g') AS query
		  FROM pg_stat_activity))
	{
		my ($status, $result, $error) =
		  $node->psql($db, $query, extra_params => ['--pset=tuples_only=off']);
		diag("\n$query\n$result$error");
	}

	my @log = split /^/, slurp_file($node->logfile);
	diag("\nthe last lines of the log:\n" . join('', splice(@log, @log > 60 ? -60 : 0)));
	return;
}

=item kill9($pid)

Kills a process of the server as a crash would, and returns once it is gone.

=cut

sub kill9
{
	my ($pid) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	kill('KILL', $pid) or die "could not kill $pid: $!";
	while (kill(0, $pid))
	{
		die "process $pid does not end" if time() > $end;
		usleep(5_000);
	}
	return;
}

=pod

=back

=cut

1;
