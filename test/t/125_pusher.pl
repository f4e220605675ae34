# Providers of kind "pusher": notifications arrive at a client of a server that
# speaks Pusher's protocol, each at most once, and of each user in their order.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use Digest::MD5 qw(md5_hex);
use Digest::SHA qw(hmac_sha256_hex);
use Encode;
use IPC::Open2;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $push = "$FindBin::RealBin/../push";
plan skip_all => 'the npm packages of test/push are not installed (npm install --ignore-scripts does it)'
  unless -d "$push/node_modules/pusher-js";

my %app = (id => '3', key => '278d425bdf160c739803', secret => '7ad3773142a6692b25b8');
my $node = start_node('main', conf => q(
payoutq.interval = 1d
payoutq.retry_base = 20ms
payoutq.retry_cap = 200ms
payoutq.send_interval = 100ms
payoutq.confirm_interval = 100ms
));
create_db_with_extension($node, 'app');
my $server = start_provider(program => 'push/server.js', %app);
my $odd = "Ren\x{e9}; 7";
my %client = (out => PostgreSQL::Test::Utils::tempdir() . '/received', position => 0);
start_client('private-user-ann', 'private-user-bob', 'private-user-carl', 'private-user-Ren;C3;A9;3B;207', map { "private-user-u$_" } 1 .. 5);

# Of all that happens to a challenge
my $challenge = challenge();
is($node->safe_psql('app', q{SELECT payout_run_notifications(now())}), 3, 'before there is a provider');
create_provider($node, 'app', 'push', kind => 'pusher', base_url => $server->{url}, app_id => $app{id}, rate_limit => 1000, timeout => '1s',
	api_key => $app{key}, secret => $app{secret});
create_provider($node, 'app', 'second', kind => 'pusher', base_url => 'http://127.0.0.1:1', app_id => '4', api_key => 'k', secret => 's');
is($node->safe_psql('app', q{SELECT payout_run_notifications(now() + interval '45 min') + payout_run_deadlines(now() + interval '51 min')}), 4, 'after');
my $job = $node->safe_psql('app', qq{SELECT payout_job_id FROM payout_resolve_challenge($challenge, 'challenger_won')});
ok(wait_for_job($node, 'app', $job), 'it is resolved');
my @got = received(7);
foreach my $user ('ann', 'bob', 'carl')
{
	my @mine = grep { $_->{channel} eq "private-user-$user" } @got;
	my $is_told = $node->safe_psql('app', qq{
		SELECT string_agg(type, ' ' ORDER BY id) FROM payout_notifications WHERE user_id = '$user' AND type <> 'challenge_ending_1_hour'});
	is(join(' ', map { $_->{event} } @mine), $is_told, "$user hears, in order");
	is_deeply($_->{data}, decode_json(Encode::encode_utf8($node->safe_psql('app', qq{
			SET timezone = 'UTC';
			SELECT json_build_object('id', id, 'type', type, 'title', title, 'body', body, 'urgency', urgency, 'challenge_id', challenge_id,
			                         'job_id', job_id, 'data', data, 'created_at', created_at) FROM payout_notifications WHERE id = $_->{data}{id}}))),
		"all of $_->{event}") foreach map { local $_ = $_; $_->{data}{created_at} =~ s/Z$/+00:00/; $_ } @mine;
}
is((grep { $_->{event} eq 'payout_received' } @got)[0]{data}{data}{amount}, 20, 'who has won hears how much');
is($node->safe_psql('app', q{SELECT count(*), count(pushed_at), count(push_error) FROM payout_notifications}), '10|7|0',
	'what was written before is not pushed');

# Many, and a user with an odd name
$node->safe_psql('app', q{
	INSERT INTO payoutq.notification (user_id, type, title, body, urgency, created_at, push_after)
	SELECT 'u' || i % 5 + 1, 'test', 'n', i::text, 'normal', now(), payoutq.push_at() FROM generate_series(1, 200) i});
notify($odd);
@got = received(201);
foreach my $n (1 .. 5)
{
	my @bodies = map { $_->{data}{body} } grep { $_->{channel} eq "private-user-u$n" } @got;
	is_deeply(\@bodies, [ grep { $_ % 5 + 1 == $n } 1 .. 200 ], "u$n hears 40, in order");
}
is(scalar(grep { $_->{channel} eq 'private-user-Ren;C3;A9;3B;207' } @got), 1, 'whose name a channel cannot have has one too');

# The service is down for a while
kill_server();
notify('ann') foreach 1 .. 3;
notify('bob') foreach 1 .. 2;
ok(wait_for($node, 'app', q{SELECT count(*) FROM payout_notifications WHERE user_id IN ('ann', 'bob') AND push_error LIKE 'Couldn''t connect%'}, 2),
	'the first of each user is tried');
like($node->safe_psql('app', q{SELECT reason FROM payout_providers WHERE provider = 'push'}), qr/ connect to server$/, 'as payout_providers says');
restart_server();
@got = received(5);
is(join(' ', map { $_->{data}{id} } grep { $_->{channel} =~ /ann/ } @got), ids('ann', 3), 'when it is back all arrive, in order');
is(join(' ', map { $_->{data}{id} } grep { $_->{channel} =~ /bob/ } @got), ids('bob', 2), 'of each user');

# A wrong secret
$node->safe_psql('app', q{ALTER USER MAPPING FOR PUBLIC SERVER push OPTIONS (SET secret 'wrong')});
settle();
notify('ann') foreach 1 .. 2;
ok(wait_for($node, 'app', q{SELECT reason ~ '^HTTP 401' AND open_until > clock_timestamp() + interval '30 s' FROM payout_providers WHERE provider = 'push'}),
	'a wrong secret stops all');
$node->safe_psql('app', "ALTER USER MAPPING FOR PUBLIC SERVER push OPTIONS (SET secret '$app{secret}')");
close_circuit();
is(join(' ', map { $_->{data}{id} } received(2)), ids('ann', 2), 'with the right one they arrive');

# Whatever it answers: what becomes of it, and how many requests that makes
my $faulty = start_provider();
$node->safe_psql('app', "ALTER SERVER push OPTIONS (SET base_url '$faulty->{url}/base')");
settle();
my %fine = (status => 200, body => '{}');
my @rows = (
	[ 'fine', '', { %fine } ],
	[ 'garbage', '', { status => 200, body => '<html>' } ],
	[ 'not text', '', { status => 200, hex => 'ff00' } ],
	[ 'empty', '', { status => 200, body => '' } ],
	[ 'half an answer', '', { status => 200, body => '{}', headers => { 'Content-Length' => 100 } } ],
	[ '202', 'HTTP 202: {}', { status => 202, body => '{}' } ],
	[ '301', 'HTTP 301: moved', { status => 301, body => 'moved', headers => { Location => "$faulty->{url}/base/apps/3/events" } } ],
	[ '400', 'HTTP 400: no', { status => 400, body => 'no' } ],
	[ '413', 'HTTP 413', { status => 413, body => '' } ],
	[ '500', 'HTTP 500: done?', { status => 500, body => 'done?' } ],
	[ '502', 'HTTP 502', { status => 502, body => '' } ],
	[ 'reset', 'Server returned nothing (no headers, no data)', { drop => JSON::PP::true } ],
	[ 'silence', 'Timeout was reached', { silent => JSON::PP::true } ],
	[ '503', '', { status => 503, body => '' }, { %fine } ],
	[ '429', '', { status => 429, body => '', headers => { 'Retry-After' => '1' } }, { %fine } ],
	[ '401', '', { status => 401, body => '' }, { %fine } ],
	[ '403', '', { status => 403, body => '' }, { %fine } ],
	[ '404', '', { status => 404, body => 'no' }, { %fine } ],
);
foreach my $row (@rows)
{
	my ($name, $error, @answers) = @$row;

	ask($faulty, 'DELETE', '/requests');
	rule($faulty, '/base/apps/3/events', unreached => 1, %$_) foreach @answers;
	notify('ann');
	if (@answers > 1)
	{
		wait_for($node, 'app', q{SELECT push_after IS NOT NULL AND push_attempts = 1 FROM payoutq.notification ORDER BY id DESC LIMIT 1})
		  if $name =~ /40/;
		close_circuit() if $name =~ /40/;
	}
	is(outcome('ann'), ($error eq '' ? 'pushed' : 'not pushed') . "|$error", "answer: $name");
	is(scalar(@{ requests() }), scalar(@answers), "answer: $name, so many requests");
}
my ($request) = @{ requests() };
my ($path, $query, $signature) = $request->{url} =~ /^(.*)\?(.*)&auth_signature=([0-9a-f]{64})$/;
is($signature, hmac_sha256_hex("POST\n$path\n$query", $app{secret}), 'the signature, which the test reckons by itself');
like($query, qr/^auth_key=$app{key}&auth_timestamp=\d+&auth_version=1\.0&body_md5=\Q@{[ md5_hex($request->{body}) ]}\E$/, 'over what Pusher says');
is("$request->{method} $path $request->{headers}{'content-type'}", 'POST /base/apps/3/events application/json', 'address and header');

# A connection that was used before and ends: libcurl would call again.
ask($faulty, 'DELETE', '/requests');
rule($faulty, '/base/apps/3/events', %fine);
notify('ann');
is(outcome('ann'), 'pushed|', 'a first call');
rule($faulty, '/base/apps/3/events', unreached => 1, drop => JSON::PP::true);
rule($faulty, '/base/apps/3/events', %fine);
notify('ann');
like(outcome('ann'), qr/^not pushed\|Server returned nothing/, 'a second, whose answer is lost');
is(scalar(@{ requests() }), 2, 'is not repeated');
notify('ann');
is(outcome('ann'), 'pushed|', 'the next is pushed');
is(scalar(@{ requests() }), 3, 'by itself');

# Not sent at all
ask($faulty, 'DELETE', '/requests');
notify('ann', 'x' x 10240);
like(outcome('ann'), qr/^not pushed\|its data has 10\d\d\d bytes, and Pusher takes 10240$/, 'too long');
notify('y' x 160);
like(outcome('y' x 160), qr/^not pushed\|the name of its channel has 173 bytes, and Pusher takes 164$/, 'too long a name');
is(scalar(@{ requests() }), 0, 'nothing is sent');

# From here on nobody's patience ends.
$node->safe_psql('app', q{ALTER SERVER push OPTIONS (SET timeout '1min')});
settle();

# Of each user one is under way at a time, and others do not wait for him.
rule($faulty, '/base/apps/3/events', hold => JSON::PP::true, %fine);
rule($faulty, '/base/apps/3/events', times => 3, %fine);
$node->safe_psql('app', q{
	INSERT INTO payoutq.notification (user_id, type, title, body, urgency, created_at, push_after)
	SELECT 'ann', 'test', 't', i::text, 'normal', now(), payoutq.push_at() FROM generate_series(1, 2) i});
ok(wait_for($node, 'app', q{SELECT push_attempts FROM payoutq.notification WHERE user_id = 'ann' ORDER BY id DESC OFFSET 1 LIMIT 1}, 1), 'the first is under way');
notify('bob');
is(outcome('bob'), 'pushed|', 'another user is told');
notify('bob');
is(outcome('bob'), 'pushed|', 'and again');
is($node->safe_psql('app', q{SELECT push_attempts FROM payoutq.notification WHERE user_id = 'ann' ORDER BY id DESC LIMIT 1}), 0, 'the second waits');
release();
is(outcome('ann'), 'pushed|', 'for the answer to the first');
is(join(' ', map { (decode_json(decode_json($_->{body})->{data}))->{body} } grep { $_->{body} =~ /user-ann/ } @{ requests() }), '1 2', 'in order');

# Somebody has a lock on it when the answer comes.
ask($faulty, 'DELETE', '/requests');
rule($faulty, '/base/apps/3/events', hold => JSON::PP::true, %fine);
notify('ann');
ok(wait_for($node, 'app', q{SELECT push_attempts FROM payoutq.notification ORDER BY id DESC LIMIT 1}, 1), 'claimed');
my $reader = $node->background_psql('app');
$reader->query_safe(q{BEGIN; SELECT payout_mark_notification_read(max(id)) FROM payoutq.notification});
release();
ok(wait_for($node, 'app', q{SELECT count(*) > 0 FROM pg_locks WHERE NOT granted}, $_), "the answer waits for a lock: $_") foreach 't', 'f', 't';
$reader->query_safe(q{COMMIT});
$reader->quit;
is(outcome('ann'), 'pushed|', 'and is recorded later');
is(scalar(@{ requests() }), 1, 'of one request');

# The dispatcher is killed between claim and answer.
ask($faulty, 'DELETE', '/requests');
rule($faulty, '/base/apps/3/events', silent => JSON::PP::true);
notify('ann');
my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
usleep(10_000) until @{ requests() } > 0 or time() > $end;
crash($node, 'app', 'dispatcher', 'SELECT 1');
rule($faulty, '/base/apps/3/events', times => 2, %fine);
notify('ann');
is(outcome('ann'), 'pushed|', 'after a crash the next is pushed');
is($node->safe_psql('app', q{SELECT pushed_at IS NULL, push_error FROM payout_notifications WHERE user_id = 'ann' ORDER BY id DESC OFFSET 1 LIMIT 1}),
	't|no answer was recorded', 'what was under way is given up');
is(scalar(@{ requests() }), 2, 'and not pushed again');

# A restored copy, where some are due
$node->safe_psql('app', q{ALTER SERVER push OPTIONS (SET base_url 'http://127.0.0.1:1', SET timeout '1s')});
settle();
notify('ann') foreach 1 .. 2;
ok(wait_for($node, 'app', q{SELECT push_error ~ ' connect to server$' FROM payout_notifications ORDER BY id DESC OFFSET 1 LIMIT 1}), 'two are due');
my $dump = PostgreSQL::Test::Utils::tempdir() . '/dump';
my $due = 'SELECT count(*) FROM payoutq.notification WHERE push_after IS NOT NULL';
# Not while one of them is being tried
my $snapshot = $node->background_psql('app');
my $begin = 'BEGIN ISOLATION LEVEL REPEATABLE READ';
$snapshot->query_safe($begin);
$snapshot->query_safe("COMMIT; $begin") while $snapshot->query_safe($due) != 2;
$node->command_ok([ 'pg_dump', '-d', $node->connstr('app'), '-f', $dump, '--snapshot', $snapshot->query_safe('SELECT pg_export_snapshot()') ], 'dump');
$snapshot->quit;
$node->safe_psql('postgres', 'CREATE DATABASE copy');
$node->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('copy'), '-f', $dump ], 'restore');
ask($faulty, 'DELETE', '/requests');
rule($faulty, '/base/apps/3/events', times => 100, %fine);
$node->safe_psql('copy', "ALTER SERVER push OPTIONS (SET base_url '$faulty->{url}/base')");
is($node->safe_psql('copy', $due), 2, 'they are due in the copy');
my $looked = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
dispatcher_pid($node, 'copy');
wait_for($node, 'copy', "SELECT clock_timestamp() > '$looked'::timestamptz + interval '1 s'");
is($node->safe_psql('copy', $due), 2, 'where they are not pushed');
$node->safe_psql('copy', 'SELECT payout_arm_sending()');
is($node->safe_psql('copy', $due), 0, 'also when it is armed');
notify('ann', 'n', 'copy');
is(outcome('ann', 'copy'), 'pushed|', 'but what happens there is');
is(scalar(@{ requests() }), 1, 'one request');
$node->safe_psql('app', "ALTER SERVER push OPTIONS (SET base_url '$faulty->{url}/base')");
settle();
close_circuit();
is(outcome('ann'), 'pushed|', 'the original pushes them');
is(scalar(@{ requests() }), 3, 'both');
is($node->safe_psql('app', q{SELECT count(*) FROM payoutq.notification WHERE push_attempts > 0 AND pushed_at IS NULL AND push_error IS NULL}), 0,
	'nothing is left in between');
is(scalar(received(0)), 0, 'nothing arrives twice');
close($client{in});
$node->stop;
done_testing();

# Active, with ann and bob in it, due in 50 minutes
sub challenge
{
	return $node->safe_psql('app', q{
		SELECT payout_deposit(u, 100, u) FROM unnest(ARRAY['ann', 'bob']) u \g /dev/null
		SELECT payout_create_challenge('Chess "1"', now() + interval '50 min', 'carl', 'ann', 'bob') AS c \gset
		SELECT payout_place_stake(:c, 'ann', 'YES', 10), payout_place_stake(:c, 'bob', 'NO', 10) \g /dev/null
		SELECT :c});
}

sub notify
{
	my ($user, $body, $db) = @_;

	$body //= 'n';
	$node->safe_psql($db // 'app', qq{
		SET client_encoding = 'UTF8';
		INSERT INTO payoutq.notification (user_id, type, title, body, urgency, created_at, push_after)
		VALUES ('@{[ Encode::encode_utf8($user) ]}', 'test', 't', '$body', 'normal', now(), payoutq.push_at())});
	return;
}

# Of the last notification of the user, once it is not due any more
sub outcome
{
	my ($user, $db) = @_;
	my $last = "FROM payoutq.notification WHERE user_id = '$user' ORDER BY id DESC LIMIT 1";

	$db //= 'app';
	wait_for($node, $db, "SELECT push_after IS NULL AND push_error IS DISTINCT FROM 'no answer was recorded' $last");
	return $node->safe_psql($db, "SELECT CASE WHEN pushed_at IS NULL THEN 'not pushed' ELSE 'pushed' END, push_error $last");
}

sub ids
{
	my ($user, $count) = @_;

	return $node->safe_psql('app', qq{SELECT string_agg(id::text, ' ' ORDER BY id) FROM
		(SELECT id FROM payout_notifications WHERE user_id = '$user' ORDER BY id DESC LIMIT $count) n});
}

sub requests
{
	return [ grep { $_->{url} =~ m{^/base/apps} } @{ ask($faulty, 'GET', '/requests') } ];
}

# The answer that is held, once the request is there
sub release
{
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
	my $released = 0;

	until ($released > 0 || time() > $end)
	{
		usleep(10_000);
		$released = ask($faulty, 'POST', '/release');
	}
	is($released, 1, 'an answer is released');
	return;
}

# Until the dispatcher has read the options of providers again
sub settle
{
	my $start = $node->safe_psql('app', 'SELECT clock_timestamp()');

	wait_for($node, 'app', "SELECT clock_timestamp() > '$start'::timestamptz + interval '300 ms'");
	return;
}

sub close_circuit
{
	$node->safe_psql('app', q{UPDATE payoutq.circuit SET open_until = clock_timestamp()});
	return;
}

sub start_client
{
	my (@channels) = @_;

	$client{pid} = open2($client{stdout}, $client{in}, 'node', "$push/client.js", '--port', $server->{port}, '--out', $client{out}, @channels);
	$client{channels} = @channels;
	wait_for_subscriptions();
	return;
}

sub wait_for_subscriptions
{
	my %subscribed;

	local $SIG{ALRM} = sub { die 'the client does not subscribe' };
	alarm($PostgreSQL::Test::Utils::timeout_default);
	while (keys %subscribed < $client{channels})
	{
		my $line = readline($client{stdout}) // die 'the client has ended';
		$subscribed{$1} = 1 if $line =~ /^subscribed (.*)/;
	}
	alarm(0);
	return;
}

# What has come since the last time, once it is so much and nothing is due
sub received
{
	my ($count) = @_;
	my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
	my @events;

	wait_for($node, 'app', q{SELECT count(*) FROM payoutq.notification WHERE push_after IS NOT NULL OR push_error = 'no answer was recorded'}, 0)
	  if $count > 0;
	do
	{
		usleep(50_000);
		my $text = -e $client{out} ? slurp_file($client{out}) : '';
		@events = map { decode_json($_) } split /\n/, substr($text, $client{position});
		$client{length} = length($text);
	} while (@events < $count && time() < $end);
	$client{position} = $client{length};
	is(scalar(@events), $count, "$count events arrive") if $count > 0;
	return @events;
}

sub kill_server
{
	kill('KILL', $server->{pid});
	stop_provider($server);
	return;
}

# What is not heard is lost, so nothing is pushed before the client is back.
sub restart_server
{
	$node->safe_psql('app', q{UPDATE payoutq.circuit SET open_until = 'infinity'});
	$server = start_provider(program => 'push/server.js', port => $server->{port}, %app);
	wait_for_subscriptions();
	close_circuit();
	return;
}
