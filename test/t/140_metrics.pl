# Metrics, with the real exporter and the real Prometheus: what is in
# monitoring/ works with the rights of a reader, alerts and panels use only
# what the exporter gives, nothing reads entries, and counters go on over a
# restart.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use HTTP::Tiny;
use JSON::PP;
use Payoutq;
use POSIX ':sys_wait_h';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $monitoring = "$FindBin::RealBin/../../monitoring";
my %started;

my @missing = grep { my $program = $_; !grep { -x "$_/$program" } split /:/, $ENV{PATH} }
  ('promtool', 'prometheus', 'prometheus-postgres-exporter');
if (@missing)
{
	fail("there is no @missing: install Debian's packages prometheus and prometheus-postgres-exporter");
	done_testing();
	exit 1;
}

my $node = start_node('main', preload => 'payoutq,pg_cron', conf => q(
cron.use_background_workers = on
cron.database_name = 'app'
max_worker_processes = 32
));
create_db_with_extension($node, 'app');
create_provider($node, 'app', 'bank', kind => 'external');
$node->safe_psql('app', q{
	CREATE EXTENSION pg_cron;
	CREATE ROLE monitoring LOGIN;
	SELECT payout_grant('monitoring', 'reader'), payout_schedule('0 0 1 1 *', NULL, NULL, NULL);
	SELECT payout_set_destination('w' || i, 'bank', 'x') FROM generate_series(1, 3) i});

# Prometheus takes five seconds before it looks at a target for the first time.
my $exporter = start_exporter();
my $prometheus = start_prometheus($exporter);

# ---------------------------------------------------------------------------
# The files by themselves
# ---------------------------------------------------------------------------

my $queries = slurp_file("$monitoring/queries.yaml");
my $rules = slurp_file("$monitoring/alerts.yaml");
my $rule_tests = slurp_file("$monitoring/alerts_test.yaml");
my $dashboard = decode_json(slurp_file("$monitoring/dashboard.json"));

command_ok([ 'promtool', 'check', 'rules', "$monitoring/alerts.yaml" ], 'the alert rules are valid');
command_ok([ 'promtool', 'test', 'rules', "$monitoring/alerts_test.yaml" ], 'they fire when they must, and only then');
my @alerts = $rules =~ /- alert: (\w+)/g;
foreach my $alert (@alerts)
{
	like($rule_tests, qr/alertname: $alert\n\s+eval_time: \w+\n\s+exp_alerts:\n\s+- /, "$alert is tested when it fires");
	like($rule_tests, qr/alertname: $alert, eval_time: \w+, exp_alerts: \[\]/, 'and when it does not');
}

# ---------------------------------------------------------------------------
# What the exporter gives
# ---------------------------------------------------------------------------

ok(wait_for_job($node, 'app', create_job($node, 'app', 'first', 100)), 'a job is paid');
my $transfers = create_job($node, 'app', 'wired', 3, prefix => 'w', args => "provider => 'bank'");
ok(wait_for($node, 'app', 'SELECT count(*) FROM payout_transfers', 3), 'transfers are made');
$node->safe_psql('app', q{
	SELECT CASE user_id WHEN 'w1' THEN payout_transfer_failed(transfer_id, attempt_token, 'permanent', 'closed')
	                    WHEN 'w2' THEN payout_transfer_completed(transfer_id, attempt_token, 'tr_2')::text END
	  FROM payout_claim_transfers('bank', 10)});
$node->safe_psql('app', q{
	INSERT INTO payoutq.circuit VALUES ('bank', 1, now() + interval '1 hour', 'test', false);
	SELECT payout_create_job('later', ARRAY['a', 'b'], ARRAY[1, 1], currency => 'EUR', run_at => '2100-01-01')});

my %metrics = scrape();
is($metrics{'pg_exporter_last_scrape_error'}, 0, 'a reader may see all of it');
is($metrics{'payoutq_entries_paid_total{USD}'}, 101, 'entries paid');
is($metrics{'payoutq_amount_paid_total{USD}'}, 5052, 'amount paid');
is($metrics{'payoutq_entries_pending{USD}'}, 1, 'entries that are on their way');
is($metrics{'payoutq_entries_pending{EUR}'}, 2, 'entries that are to be paid later');
is($metrics{'payoutq_entries_failed{USD}'}, 1, 'entries that have failed');
is($metrics{"payoutq_jobs_by_status{$$_[0]}"}, $$_[1], "jobs that are $$_[0]")
  foreach ([ 'completed', 1 ], [ 'running', 1 ], [ 'queued', 1 ], [ 'failed', 0 ]);
is($metrics{'payoutq_jobs_oldest_seconds{queued}'}, 0, 'the job that is not due is not late');
cmp_ok($metrics{'payoutq_jobs_oldest_seconds{running}'}, '>', 0, 'the running one has an age');
is($metrics{"payoutq_transfers_by_status{bank,$$_[0]}"}, $$_[1], "transfers that are $$_[0]")
  foreach ([ 'completed', 1 ], [ 'processing', 1 ], [ 'failed_terminal', 1 ], [ 'pending', 0 ], [ 'sent', 0 ]);
is($metrics{'payoutq_provider_circuit_open{bank}'}, 1, 'the circuit is open');
is($metrics{'payoutq_provider_stuck_transfers{bank}'}, 0, 'no transfer is stuck');
is($metrics{'payoutq_schedule_failed{payoutq process}'}, 0, 'a schedule has not failed');
is($metrics{'payoutq_schedule_active{payoutq process}'}, 1, 'and is active');
cmp_ok($metrics{'payoutq_workers_by_state{idle}'} + $metrics{'payoutq_workers_by_state{working}'}, '>=', 1, 'there are workers');
is($metrics{"payoutq_health_ok{$_}"}, $_ eq 'failed_entries' ? 0 : 1, "health: $_")
  foreach split /\n/, $node->safe_psql('app', 'SELECT check_name FROM payout_health');
is(metrics_of_files($queries), metrics_of_exporter(), 'all that is in the file is there');

my $lint = '';
IPC::Run::run([ 'promtool', 'check', 'metrics' ], '<', \join('', grep { /payoutq_/ } split /^/, page()), '>&', \$lint);
is($lint, '', 'their names are as they should be');

# However many entries there are
foreach my $query ($queries =~ /^  query: \|\n((?:^    .*\n)+)/mg)
{
	my $plan = $node->safe_psql('app', "SET enable_seqscan = off; EXPLAIN $query", extra_params => [ '-U', 'monitoring' ]);
	my ($column) = $query =~ /AS (?!datname)(\w+)/;
	like($plan, qr/cost=/, "query of $column");
	unlike($plan, qr/ on (entry|movement|account)\b/, 'does not read entries');
	unlike($plan, qr/Seq Scan on transfer\b/, 'nor all transfers');
}

# ---------------------------------------------------------------------------
# What Prometheus makes of it
# ---------------------------------------------------------------------------

my %firing = (PayoutqEntriesFailed => 1, PayoutqCircuitOpen => 0);
foreach my $alert (sort keys %firing)
{
	ok(wait_until(sub { alert_state($alert) eq ($firing{$alert} ? 'firing' : 'pending') }), "$alert is seen");
}
is(join(' ', grep { alert_state($_) ne 'inactive' } @alerts), 'PayoutqEntriesFailed PayoutqCircuitOpen', 'no other alert');

my %given = map { $_ => 1 } page() =~ /^# TYPE (\w+)/mg;
foreach my $panel (@{ $dashboard->{panels} })
{
	foreach my $expr (map { $_->{expr} } @{ $panel->{targets} })
	{
		is(join(' ', grep { !$given{$_} } $expr =~ /\b((?:payoutq|pg)_\w+)/g), '', "panel $panel->{title}: metrics that there are");
		$expr =~ s/\$__rate_interval/1m/g;
		$expr =~ s/\$(server|datname)/.*/g;
		unlike($expr, qr/\$/, 'and variables');
		ok(wait_until(sub { @{ query($expr) } }), 'it shows something');
	}
}
foreach my $variable (grep { $_->{type} eq 'query' } @{ $dashboard->{templating}{list} })
{
	my ($metric, $label) = $variable->{query}{query} =~ /^label_values\((\w+)(?:\{.*\})?, (\w+)\)$/;
	ok((grep { $_->{metric}{$label} } @{ query($metric) }), "variable $variable->{name}");
}
foreach my $expr ($rules =~ /expr: (?:>-\n\s*)?(.*)/g)
{
	is(join(' ', grep { !$given{$_} } $expr =~ /\b((?:payoutq|pg)_\w+)/g), '', "metrics that there are: $expr");
}

# ---------------------------------------------------------------------------
# A restart
# ---------------------------------------------------------------------------

$node->stop('immediate');
ok(wait_until(sub { my %m = scrape(); ($m{pg_up} // 1) == 0 }), 'the exporter tells that the server is down');
$node->start;
ok(wait_until(sub { my %m = scrape(); $m{'payoutq_entries_paid_total{USD}'} }), 'it is there again');
my %after = scrape();
is($after{$_}, $metrics{$_}, "$_ is what it was") foreach ('payoutq_entries_paid_total{USD}', 'payoutq_amount_paid_total{USD}');
ok(wait_for_job($node, 'app', create_job($node, 'app', 'second', 10)), 'another job is paid');
%after = scrape();
is($after{'payoutq_entries_paid_total{USD}'}, 111, 'which is counted');
is($after{'payoutq_amount_paid_total{USD}'}, 5107, 'with its amount');
ok(wait_until(sub { value('payoutq_entries_paid_total{currency="USD"}') == 111 }), 'also by Prometheus');
is(value("sum(resets($_\[10m]))"), 0, "for which $_ was not reset") foreach ('payoutq_entries_paid_total', 'payoutq_amount_paid_total');

# Without the right the alerts have something to see.
$node->safe_psql('app', q{SELECT payout_revoke('monitoring')});
ok(wait_until(sub { my %m = scrape(); $m{pg_exporter_last_scrape_error} == 1 && !exists $m{'payoutq_entries_paid_total{USD}'} }),
	'who is no reader sees nothing');
ok(wait_until(sub { alert_state('PayoutqMetricsMissing') eq 'pending' && alert_state('PayoutqMetricsIncomplete') eq 'pending' }),
	'and that is noticed');

$node->stop;
done_testing();

sub start_exporter
{
	my $port = PostgreSQL::Test::Cluster::get_free_port();

	delete local $ENV{PGSYSCONFDIR};		# which it does not support
	local $ENV{DATA_SOURCE_NAME} =
	  join ' ', 'host=' . $node->host, 'port=' . $node->port, 'user=monitoring dbname=app sslmode=disable';
	return start($port, '/metrics', 'prometheus-postgres-exporter', '--web.listen-address' => "127.0.0.1:$port",
		'--extend.query-path' => "$monitoring/queries.yaml");
}

sub start_prometheus
{
	my ($target) = @_;
	my $port = PostgreSQL::Test::Cluster::get_free_port();
	my $dir = PostgreSQL::Test::Utils::tempdir();
	my ($address) = $target =~ m,//(.*),;

	append_to_file("$dir/prometheus.yml", qq(
global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}
rule_files: ['$monitoring/alerts.yaml']
scrape_configs:
  - job_name: payoutq
    static_configs: [{targets: ['$address']}]
));
	command_ok([ 'promtool', 'check', 'config', "$dir/prometheus.yml" ], 'the configuration is valid');
	return start($port, '/-/ready', 'prometheus', "--config.file=$dir/prometheus.yml", "--storage.tsdb.path=$dir/data",
		"--web.listen-address=127.0.0.1:$port");
}

# Starts a program, and returns its address once it answers.
sub start
{
	my ($port, $path, $program, @args) = @_;
	my $log = "$PostgreSQL::Test::Utils::log_path/140_metrics_$program.log";
	my $pid = fork() // die "could not fork: $!";

	if ($pid == 0)
	{
		open STDIN, '<', '/dev/null';
		open STDOUT, '>', $log;
		open STDERR, '>&', \*STDOUT;
		exec $program, @args or die "could not run $program: $!";
	}
	$started{$pid} = $program;
	wait_until(sub { waitpid($pid, WNOHANG) || HTTP::Tiny->new(timeout => 10)->get("http://127.0.0.1:$port$path")->{success} })
	  && kill(0, $pid) or die "$program does not start: " . slurp_file($log);
	return "http://127.0.0.1:$port";
}

END
{
	my $status = $?;
	kill 'KILL', keys %started;
	waitpid $_, 0 foreach keys %started;
	$? = $status;
}

# The exporter's page
sub page
{
	my $answer = HTTP::Tiny->new(timeout => 60)->get("$exporter/metrics");

	$answer->{success} or die "the exporter: $answer->{status} $answer->{content}";
	return $answer->{content};
}

# Its values, by the name and those labels that are not the same for all
sub scrape
{
	my %values;

	foreach (split /\n/, page())
	{
		my ($name, undef, $labels, $value) = /^(\w+)(\{(.*)\})? (\S+)$/ or next;
		my %labels = ($labels // '') =~ /(\w+)="([^"]*)"/g;

		delete @labels{ 'datname', 'server' };
		$name .= '{' . join(',', map { $labels{$_} } sort keys %labels) . '}' if %labels;
		$values{$name} = $value;
	}
	return %values;
}

sub metrics_of_exporter
{
	return join ' ', sort grep { /^payoutq/ } page() =~ /^# TYPE (\w+)/mg;
}

sub metrics_of_files
{
	my @names;
	my $namespace;

	foreach (split /\n/, $_[0])
	{
		$namespace = $1 if /^(\w+):/;
		push @names, "${namespace}_$1" if /^    - (\w+): \{usage: "(?:COUNTER|GAUGE)"/;
	}
	return join ' ', sort @names;
}

sub query
{
	my ($expr) = @_;
	my $answer = HTTP::Tiny->new(timeout => 60)->post_form("$prometheus/api/v1/query", { query => $expr });

	$answer->{success} or die "$expr: $answer->{content}";
	return decode_json($answer->{content})->{data}{result};
}

sub value
{
	my ($expr) = @_;
	my $result = query($expr);

	return @$result ? $result->[0]{value}[1] : -1;
}

sub alert_state
{
	my ($name) = @_;
	my $answer = HTTP::Tiny->new(timeout => 60)->get("$prometheus/api/v1/rules");
	my ($rule) = grep { $_->{name} eq $name } map { @{ $_->{rules} } } @{ decode_json($answer->{content})->{data}{groups} };

	return $rule->{state};
}

sub wait_until
{
	my ($condition) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;

	until ($condition->())
	{
		return 0 if time() > $end;
		usleep(50_000);
	}
	return 1;
}
