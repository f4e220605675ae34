# doc/ says what the catalog says: functions with their arguments, views with
# their columns, settings, options of providers, errors.  Links resolve, and the
# SQL examples run, but for those after <!-- not run -->.

use strict;
use warnings;

use File::Basename;
use FindBin;
use lib "$FindBin::RealBin/../perl";
use Payoutq;
use PostgreSQL::Test::Utils;
use Test::More;

my $root = "$FindBin::RealBin/../..";
my $text = qr/(?:(?!^ *```).)*/ms;
my $reference = slurp_file("$root/doc/reference.md");
my $operations = slurp_file("$root/doc/operations.md");
my $readme = slurp_file("$root/README.md");
my @pages = map { chomp; $_ } grep { !m{/(?:tmp_check|log|node_modules)/} } `cd '$root' && find . -name '*.md'`;

my $node = start_node('main');
create_db_with_extension($node, 'app');

# ---------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------

# Types without their aliases, defaults without casts, times in words
my @functions = lines(q{
	SET intervalstyle = 'postgres_verbose';
	SELECT CASE prokind WHEN 'p' THEN 'CALL ' ELSE '' END || p.proname || '(' || pg_get_function_arguments(p.oid) || ')'
	       || CASE prokind WHEN 'p' THEN '' ELSE ' RETURNS ' || pg_get_function_result(p.oid) END
	  FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
	 WHERE p.proname LIKE 'payout\_%'});
my (@documented, %section);
while ($reference =~ /^### (payout_\w+)\n(.*?)(?=^##)/msg)
{
	my ($name, $body) = ($1, $2);
	next unless $body =~ /\A\n```text\n($text)^```/m;
	$section{$name} = $body;
	push @documented, grep { /\S/ } split /\n\n/, $1;
}
is_deeply({ map { signature($_) => 1 } @documented }, { map { signature($_) => 1 } @functions },
	'functions, with their arguments, defaults and results');
is_deeply([ sort keys %section ], [ sort keys %{ { map { /(payout_\w+)\(/; $1 => 1 } @functions } } ],
	'each has a section of its own');

# Errors as \df+ shows them
my %commented;
foreach (lines(q{
	SELECT p.proname || '|' || obj_description(p.oid, 'pg_proc')
	  FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
	 WHERE p.proname LIKE 'payout\_%' ORDER BY p.proname}))
{
	my ($name, $comment) = split /\|/, $_, 2;
	my ($errors) = $comment =~ /\berrors?: (.*)/;
	my ($other) = ($errors // '') =~ /those of (\w+)/;
	$commented{$name}{$_} = 1 foreach codes($errors // ''), $other ? keys %{ $commented{$other} } : ();
}
is_deeply({ map { $_ => join(' ', codes($section{$_} =~ /^Errors: (.*)$/m ? $1 : '')) } keys %section },
	{ map { $_ => join(' ', sort keys %{ $commented{$_} // {} }) } keys %section },
	'the errors of each are those in its comment');

# ---------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------

my %views;
while ($reference =~ /^### (payout_\w+)\n(?:(?!^#).)*?^\| Column \| Type \| Meaning \|\n((?:\|[^\n]*\n)+)/msg)
{
	my ($name, $rows) = ($1, $2);
	$views{$name} = [ map { join ' | ', map { plain($_) } cells($_) } grep { !/^\|-/ } split /\n/, $rows ];
}
my %columns;
foreach (lines(q{
	SELECT c.relname || ' ' || concat_ws(' | ', a.attname, format_type(a.atttypid, a.atttypmod), col_description(c.oid, a.attnum))
	  FROM pg_class c JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
	  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
	 WHERE c.relkind = 'v' AND c.relname LIKE 'payout\_%' ORDER BY c.relname, a.attnum}))
{
	my ($name, $column) = split / /, $_, 2;
	$column =~ s/timestamp with time zone/timestamptz/;
	push @{ $columns{$name} }, $column;
}
is_deeply([ sort keys %views ], [ sort keys %columns ], 'views');
is_deeply($views{$_}, $columns{$_}, "columns of $_, with types and comments") foreach sort keys %columns;
is($node->safe_psql('app', q{
		SELECT count(*) FROM pg_attribute s
		 WHERE s.attrelid = 'payoutq.status'::regclass AND s.attnum > 0
		   AND NOT EXISTS (SELECT FROM pg_attribute j WHERE j.attrelid = 'payout_jobs'::regclass
		                      AND (j.attname, j.attnum, j.atttypid) = (s.attname, s.attnum, s.atttypid))}),
	0, 'payout_job_status() yields the first columns of payout_jobs');

# ---------------------------------------------------------------------------
# Settings, options, checks, errors
# ---------------------------------------------------------------------------

my @settings = lines(q{
	SELECT name || ' ' || coalesce(nullif(CASE vartype WHEN 'bool' THEN boot_val ELSE current_setting(name) END, ''), '''''') || ' '
	       || CASE context WHEN 'sighup' THEN 'reload' WHEN 'user' THEN 'session' ELSE context END
	  FROM pg_settings WHERE name LIKE 'payoutq.%'});
is_deeply([ sort map { my @c = map { plain($_) } cells($_); "$c[0] $c[1] $c[3]" } $reference =~ /^(\| `payoutq\.\w+` .*)$/mg ],
	[ sort @settings ], 'settings, with default and context');
is_deeply([ sort map { my @c = map { plain($_) } cells($_); "$c[0] $c[1]" } $readme =~ /^(\| `payoutq\.\w+` .*)$/mg ],
	[ sort map { s/ \w+$//r } @settings ], 'and in README.md');

is_deeply([ column('Option', 'server') ], hint(q{CREATE SERVER x FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external', nonsense '')}),
	'options of a provider');
is_deeply([ column('Kind') ], hint(q{CREATE SERVER x FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'nonsense')}), 'kinds');
$node->safe_psql('app', q{CREATE SERVER x FOREIGN DATA WRAPPER payout_provider OPTIONS (kind 'external')});
is_deeply([ column('Option', 'user mapping') ], hint(q{CREATE USER MAPPING FOR PUBLIC SERVER x OPTIONS (nonsense '')}),
	'options of a user mapping');

is_deeply([ first_column($reference, 'check_name') ],
	[ lines('SELECT check_name FROM payout_verify()') ], 'checks of payout_verify()');
is_deeply([ sort +first_column($operations, 'check_name') ], [ sort +lines('SELECT check_name FROM payout_health') ],
	'operations.md: checks of payout_health');

# errcodes.txt: 42704 E ERRCODE_UNDEFINED_OBJECT undefined_object
my $share = $node->config_data('--sharedir');
chomp $share;
my (%sqlstate, %condition);
foreach (grep { /^\w{5} / } split /\n/, slurp_file("$share/errcodes.txt"))
{
	my ($code, $severity, $macro, $condition) = split;
	$sqlstate{$macro} = $code;
	$condition{$condition} //= $code if defined $condition;
}
my %listed = $reference =~ /^\| `([0-9HP][0-9A-Z]{4})` \| `(\w+)` \|/mg;
is_deeply([ grep { ($condition{ $listed{$_} } // '') ne $_ } sort keys %listed ], [], 'errors have the names that PostgreSQL gives them');
is_deeply([ grep { !$listed{$_} } sort keys %{ { map { %$_ } values %commented } } ], [], 'all that a function raises is explained');
my @raised = map { my $file = slurp_file($_); ($file =~ /errcode\(ERRCODE_(\w+)\)/g, map { uc } $file =~ /ERRCODE = '([a-z_]+)'/g) }
  (glob("$root/src/*.c"), glob("$root/sql/[0-9]*.sql"));
my %inside = map { $_ => 1 } qw(40001 53200 PQ000 PQ001 XX000);  # caught, or of a worker's own
is_deeply([ grep { !$inside{$_} && $reference !~ /`$_`/ } sort keys %{ { map { ($sqlstate{"ERRCODE_$_"} // $condition{ lc $_ } // $_) => 1 } @raised } } ], [],
	'and all that the code raises is named');

# ---------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------

my @broken;
foreach my $page (@pages)
{
	my $body = slurp_file("$root/$page") =~ s/^ *```$text^ *```//mgr;
	while ($body =~ /\]\(([^)\s]+)\)/g)
	{
		my ($file, $anchor) = split /#/, $1, 2;
		next if $file =~ /^(?:https?|mailto):/;
		my $target = $file eq '' ? "$root/$page" : dirname("$root/$page") . "/$file";
		push @broken, "$page: $1" unless -e $target && (!defined $anchor || grep { $_ eq $anchor } anchors($target));
	}
}
is_deeply(\@broken, [], 'links in ' . @pages . ' pages resolve');

# ---------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------

foreach my $page ('doc/reference.md', 'doc/operations.md', 'doc/migration.md', 'doc/security.md')
{
	examples_ok($page, examples(slurp_file("$root/$page")));
}

# README.md has no marks.  Its first example is about tables of the application;
# the extension is there already, and pg_cron need not be.
examples_ok('README.md', q{
	CREATE TABLE contest (id bigint PRIMARY KEY, settled_at timestamptz);
	CREATE TABLE winner (contest_id bigint, user_id text, amount bigint);
	CREATE ROLE app_of_readme;
	INSERT INTO contest VALUES (7);
	INSERT INTO winner VALUES (7, 'ann', 1), (7, 'bob', 2)},
	map { s/\bapp\b/app_of_readme/gr } grep { !/CREATE EXTENSION|CREATE ROLE|payout_schedule/ } examples($readme));

$node->stop;
done_testing();

# Lines of the answer
sub lines
{
	return split /\n/, $node->safe_psql('app', $_[0]);
}

sub signature
{
	my ($s) = @_;

	$s =~ s/timestamp with time zone/timestamptz/g;
	$s =~ s/('|NULL|\b\d+)::[\w ]+?(?=[,)])/$1/g;
	$s =~ s/'@ (\d+ \w+?)s?'/'$1'/g;
	$s =~ s/\bIN //g;
	$s =~ s/TABLE\(/TABLE (/;
	return join ' ', split ' ', $s;
}

sub codes
{
	my %codes = map { $_ => 1 } $_[0] =~ /\b([0-9][0-9A-Z]{4})\b/g;
	return sort keys %codes;
}

sub cells
{
	my ($row) = @_;
	my @cells = split /\s*\|\s*/, $row =~ s/^\|\s*//r;
	return @cells;
}

# Without marks
sub plain
{
	return $_[0] =~ s/\[([^\]]*)\]\([^)]*\)/$1/gr =~ tr/`//dr;
}

# The first column of the tables with this head
sub first_column
{
	my ($page, $head) = @_;
	return map { /^\| `(\w+)`/mg } $page =~ /^\| `?$head`? \|.*\n\|-.*\n((?:\|.*\n)+)/mg;
}

# That of the table of providers, of the rows with the second cell
sub column
{
	my ($head, $of) = @_;
	my ($rows) = $reference =~ /^\| $head \|.*\n.*\n((?:\|.*\n)+)/m;
	return sort map { /^\| `(\w+)` \| (.*?) \|/ && (!$of || $2 eq $of) ? $1 : () } split /\n/, $rows;
}

# What the hint of an error lists: "Kinds are external, stripe and webhook."
sub hint
{
	my ($statement) = @_;
	my ($code, $out, $error) = $node->psql('app', $statement);
	my ($list) = $error =~ /HINT:\s+.*? are (.*)\./;
	return [ sort split /, | and /, $list // $error ];
}

# As GitHub makes them from headings
sub anchors
{
	my $page = slurp_file($_[0]) =~ s/^ *```$text^ *```//mgr;
	return map { lc($_) =~ s/[^\w\- ]//gr =~ tr/ /-/r } $page =~ /^#+ (.*)$/mg;
}

# The SQL that is not marked otherwise
sub examples
{
	my ($page) = @_;
	my @found;

	while ($page =~ /(^ *<!-- not run[^\n]*-->\n+)?^ *```sql\n($text)^ *```/mg)
	{
		push @found, $2 unless defined $1;
	}
	return @found;
}

# In a database of its own, one after the other.  Workers get time to pay.
sub examples_ok
{
	my ($page, @examples) = @_;
	my $db = lc($page) =~ s/\W/_/gr;

	create_db_with_extension($node, $db);
	foreach my $example (@examples)
	{
		my ($code, $out, $error) = $node->psql($db, $example, on_error_stop => 1);
		is($code, 0, "$page: " . ($example =~ /^(.{1,60})/m)[0]) or diag($error);
		wait_for($node, $db, q{SELECT count(*) FROM payout_jobs
			WHERE status IN ('queued', 'running') AND run_at <= now() AND provider IS NULL}, 0);
	}
	return;
}
