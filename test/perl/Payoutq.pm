
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
use FindBin;
use HTTP::Tiny;
use IPC::Open2;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(
  start_node
  create_db_with_extension
  create_job
  slow_down
  speed_up
  wait_for
  wait_for_job
  paid_once_ok
  books_ok
  worker_pid
  worker_errors
  kill9
  kill_postmaster
  is_running
  crash
  dispatcher_pid
  start_provider
  stop_provider
  create_provider
  ask
  rule
);

=pod

=head1 FUNCTIONS

=over

=item start_node($name, %options)

Starts a server and returns it.  Options: C<preload>, the value of
shared_preload_libraries (payoutq; empty to go without), C<conf>, more lines
of configuration, C<streaming>, true for a server that can have standbys,
C<archiving>, true for one that keeps its WAL, and C<initdb>, options of initdb.

=cut

sub start_node
{
	my ($name, %options) = @_;
	my $preload = $options{preload} // 'payoutq';
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(allows_streaming => $options{streaming} // 0, has_archiving => $options{archiving} // 0,
		extra => [ '--encoding=UTF8', '--no-locale', @{ $options{initdb} // [] } ]);  # whatever the environment says

	# The module turns restart_after_crash off; a test that kills a worker
	# wants what users have.
	$node->append_conf('postgresql.conf', qq(
shared_preload_libraries = '$preload'
payoutq.allow_drop = on
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

=item create_job($node, $db, $reference, $n, %options)

Creates a job that pays the users u1 to u$n, each as much as his number, and
returns its id.  Options: C<prefix>, another one than "u", and C<args>, more
arguments of payout_create_job(), such as "batch_size => 10".

=cut

sub create_job
{
	my ($node, $db, $reference, $n, %options) = @_;
	my $prefix = $options{prefix} // 'u';
	my $args = defined $options{args} ? ", $options{args}" : '';

	return $node->safe_psql($db, qq{
		SELECT payout_create_job('$reference', array_agg('$prefix' || i),
		                         array_agg(i::bigint)$args)
		FROM generate_series(1, $n) i});
}

=item slow_down($node, $db, $work)

Makes a batch take some milliseconds, by work that is done while its accounts
are changed, so that a job lasts long enough to be disturbed.  C<$work> is how
many rows are counted (default: 50000).

=cut

sub slow_down
{
	my ($node, $db, $work) = @_;

	$work //= 50_000;
	$node->safe_psql($db, qq{
		CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM count(*) FROM pg_catalog.generate_series(1, $work);
			RETURN NULL;
		END \$\$;
		CREATE TRIGGER slow AFTER INSERT OR UPDATE ON payoutq.account
			FOR EACH STATEMENT EXECUTE FUNCTION slow()});
	return;
}

=item speed_up($node, $db)

Takes back C<slow_down>, so that what is left of a job need not last.

=cut

sub speed_up
{
	my ($node, $db) = @_;

	$node->safe_psql($db, 'DROP FUNCTION slow CASCADE');
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
		($status, $result, $error) = _ask($node, $db, $query);
		return 1 if $status == 0 && $result eq $expected;
		last if time() > $end;
		usleep(20_000);
	}

	diag("waited $limit s for \"$expected\" from: $query\n"
		  . "last result: \"$result\"\n$error");
	_diagnose($node, $db);
	return 0;
}

# A server that is just starting hangs up before psql has read the query, and
# then writing it to psql is an error too.
sub _ask
{
	my ($node, $db, $query, @params) = @_;
	my @answer;

	eval { @answer = $node->psql($db, $query, @params); 1 }
	  or @answer = (-1, '', $@);
	return @answer;
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
		  _ask($node, $db, $query, extra_params => ['--pset=tuples_only=off']);
		diag("\n$query\n$result$error");
	}

	my @log = split /^/, slurp_file($node->logfile);
	diag("\nthe last lines of the log:\n" . join('', splice(@log, @log > 60 ? -60 : 0)));
	return;
}

=item wait_for_job($node, $db, $job, $status, $limit)

Waits until the job has the status (default: completed), also while the server
is restarted.  Returns true, or writes what is known and returns false.

=cut

sub wait_for_job
{
	my ($node, $db, $job, $status, $limit) = @_;

	return wait_for($node, $db, "SELECT status FROM payout_job_status($job)",
		$status // 'completed', $limit);
}

=item paid_once_ok($node, $db, $n, $name, %options)

Tests that the users of create_job() have what they were to get: u1 to u$n as
much as their number, and nobody else.  Options: C<prefix>, C<times> for more
jobs than one, C<plus> for what else each has, and C<accounts>, the table.
The books are tested too.

=cut

sub paid_once_ok
{
	my ($node, $db, $n, $name, %options) = @_;
	my $prefix = $options{prefix} // 'u';
	my $times = $options{times} // 1;
	my $plus = $options{plus} // 0;
	my $accounts = $options{accounts} // 'payout_accounts';
	my $start = length($prefix) + 1;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is( $node->safe_psql($db, qq{
			SELECT count(*), count(*) FILTER (WHERE balance <>
			       $times * substr(user_id, $start)::bigint + $plus)
			FROM $accounts
			WHERE user_id ~ '^$prefix\\d+\$' AND balance <> 0}),
		"$n|0",
		"$name: everybody is paid once");
	books_ok($node, $db, $name);
	return;
}

=item books_ok($node, $db, $name)

Tests what payout_verify() says.

=cut

sub books_ok
{
	my ($node, $db, $name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is( $node->safe_psql($db, q{
			SELECT coalesce(string_agg(check_name || ': ' || detail, '; ')
			                  FILTER (WHERE NOT ok),
			                CASE WHEN count(*) > 0 THEN 'fine' END)
			FROM payout_verify()}),
		'fine', "$name: the books balance");
	return;
}

=item worker_pid($node, $db)

The process id of a worker in the database, once there is one.

=cut

sub worker_pid
{
	my ($node, $db) = @_;
	my $workers = qq{FROM pg_stat_activity
		WHERE backend_type = 'payoutq worker' AND datname = '$db'};
	my $pid = '';

	# It may leave between two questions.
	while ($pid eq '')
	{
		wait_for($node, 'postgres', "SELECT count(*) > 0 $workers")
		  or die "there is no worker in $db";
		$pid = $node->safe_psql('postgres', "SELECT min(pid) $workers");
	}
	return $pid;
}

=item worker_errors($node, $offset)

What the launcher and workers wrote to the log, from $offset on, that is a
warning or worse.  That a worker is told to end is not.

=cut

sub worker_errors
{
	my ($node, $offset) = @_;

	return join '', grep {
		/ payoutq (worker|launcher) .*(WARNING|ERROR|FATAL|PANIC): /
		  && !/FATAL:  terminating background worker/
		  && !/WARNING:  canceling the wait for synchronous replication and terminating/
	} split /^/, slurp_file($node->logfile, $offset // 0);
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

=item kill_postmaster($node, $everything)

Kills the postmaster, and with C<$everything> the other processes of the server
at the same moment; returns when all have ended.  It is stopped first, because
a process that it starts meanwhile may wait for ever for a lock of a killed one,
and keep a new server from starting.

=cut

sub kill_postmaster
{
	my ($node, $everything) = @_;
	my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	kill('STOP', $postmaster) or die "could not stop $postmaster: $!";
	until (qx(ps -o stat= -p $postmaster) =~ /^T/)
	{
		die "process $postmaster does not stop" if time() > $end;
		usleep(1_000);
	}
	my @children = split ' ', qx(ps -o pid= --ppid $postmaster);

	$node->kill9;
	kill('KILL', @children) if $everything;
	while (kill(0, $postmaster) || grep { is_running($_) } @children)
	{
		die 'the processes of the server do not end' if time() > $end;
		usleep(10_000);
	}
	return;
}

=item is_running($pid)

Says so.  A process that has ended may stay as a zombie until init looks after it.

=cut

sub is_running
{
	my ($pid) = @_;
	return kill(0, $pid) && qx(ps -o stat= -p $pid) !~ /^Z/;
}

=item crash($node, $db, $how, $query)

Kills a worker of the database (C<worker>), its dispatcher (C<dispatcher>), the
postmaster (C<postmaster>) or all processes of the server at once (C<all>).  Returns when the server answers
again, with what the query said just before.

=cut

sub crash
{
	my ($node, $db, $how, $query) = @_;
	my $session = $node->background_psql($db);
	my $victim = $how eq 'worker' ? worker_pid($node, $db) : $how eq 'dispatcher' ? dispatcher_pid($node, $db) : undef;
	my $before = $session->query_safe($query);

	if ($victim)
	{
		kill9($victim);
	}
	else
	{
		kill_postmaster($node, $how eq 'all');
		$node->start;
	}
	$session->quit;
	wait_for($node, $db, 'SELECT true');
	return $before;
}

=item dispatcher_pid($node, $db)

The process id of the dispatcher of the database, once it has one.

=cut

sub dispatcher_pid
{
	my ($node, $db) = @_;
	my $dispatcher = qq{FROM pg_stat_activity
		WHERE application_name = 'payoutq worker (dispatcher)' AND datname = '$db'};
	my $pid = '';

	# It may leave between two questions.
	while ($pid eq '')
	{
		wait_for($node, 'postgres', "SELECT count(*) > 0 $dispatcher")
		  or die "there is no dispatcher in $db";
		$pid = $node->safe_psql('postgres', "SELECT min(pid) $dispatcher");
	}
	return $pid;
}

=item start_provider(%options)

Starts a provider to test against, test/provider/provider.js or another
C<program>, and returns it.  Options are those of the program.  It ends with the
test, however that ends.

=cut

my @providers;

sub start_provider
{
	my (%options) = @_;
	my $program = delete $options{program} // 'provider/provider.js';
	my $pid = open2(my $out, my $in, 'node', "$FindBin::RealBin/../$program",
		map { ("--$_" => $options{$_}) } sort keys %options);
	my $provider = { pid => $pid, out => $out, in => $in };

	push @providers, $provider;
	(<$out> // '') =~ /^listening (\d+)/ or die 'the provider does not start';
	$provider->{port} = $1;
	$provider->{url} = "http://127.0.0.1:$1";
	return $provider;
}

=item stop_provider($provider)

Its books are gone with it.

=cut

sub stop_provider
{
	my ($provider) = @_;

	close($provider->{in});
	waitpid($provider->{pid}, 0);
	return;
}

END
{
	my $status = $?;
	stop_provider($_) foreach grep { defined fileno($_->{in}) } @providers;
	$? = $status;
}

=item create_provider($node, $db, $name, %options)

Creates the foreign server, with a user mapping for the C<api_key>, C<secret> or
C<webhook_secret> among the options.

=cut

sub create_provider
{
	my ($node, $db, $name, %options) = @_;
	my %secret = map { $_ => delete $options{$_} } grep { exists $options{$_} } ('api_key', 'secret', 'webhook_secret');
	my $list = sub {
		my (%o) = @_;
		return join ', ', map { "$_ '$o{$_}'" } sort keys %o;
	};

	$options{kind} //= 'stripe';
	$node->safe_psql($db, "CREATE SERVER $name FOREIGN DATA WRAPPER payout_provider OPTIONS (" . $list->(%options) . ')');
	$node->safe_psql($db, "CREATE USER MAPPING FOR PUBLIC SERVER $name OPTIONS (" . $list->(%secret) . ')') if %secret;
	return;
}

=item ask($provider, $method, $path, $data)

A call to the provider, of the test's own; returns the decoded answer.

=cut

sub ask
{
	my ($provider, $method, $path, $data) = @_;
	my $answer = HTTP::Tiny->new(timeout => 30)->request($method, "$provider->{url}$path",
		defined $data ? { content => encode_json($data) } : {});

	$answer->{success} or die "$method $path: $answer->{status} $answer->{content}";
	return JSON::PP->new->utf8->allow_nonref->decode($answer->{content});
}

=item rule($provider, $destination, %fault)

What the next call for the destination gets; see the program.

=cut

sub rule
{
	my ($provider, $destination, %fault) = @_;

	ask($provider, 'POST', '/rules', { destination => $destination, %fault });
	return;
}

=pod

=back

=cut

1;
