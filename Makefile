# payoutq: batched payouts in PostgreSQL
#
#   make, make install        build and install for the server of PG_CONFIG
#   make installcheck         test what is installed, on servers of its own
#   make test                 packages, strict build, install, all tests
#   make demo                 pay 43,575 people on a throwaway server
#   make bench                measure
#   make chaos                send through a provider that fails, SEED=... N=...
#   make lint                 compile with every warning an error
#   make analyze              gcc, clang, cppcheck, clang-tidy, plpgsql_check
#   make test-sanitizers      all tests with AddressSanitizer and UndefinedBehaviorSanitizer, LEVELS=...
#   make test-valgrind        every function in C, the worker and the dispatcher under valgrind
#   make fuzz                 every parser of bytes from outside, TIME=... seconds each, FUZZERS=...
#   make test-pg-upgrade      pg_upgrade from 15 to 17 and 18, with data in place
#   make freeze               keep the install script of a release, to test updates from it
#   make dist                 the archive for PGXN, of the last commit
#   make test-versions        all tests on PostgreSQL 15, 17 and 18, SUITES=...
#   make test-package         test the Debian package and that archive, SUITE=...

EXTENSION = payoutq
MODULE_big = payoutq
PGFILEDESC = "payoutq - batched payouts"

# The control file holds the one version number.  (PGXS uses VERSION for the
# version of the server.)
EXTVERSION := $(shell sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" payoutq.control)

OBJS = \
	src/payoutq.o \
	src/settings.o \
	src/engine.o \
	src/shared.o \
	src/launcher.o \
	src/worker.o \
	src/utility.o \
	src/process.o \
	src/claim.o \
	src/batch.o \
	src/failure.o \
	src/account.o \
	src/binding.o \
	src/job.o \
	src/create.o \
	src/winners.o \
	src/entry.o \
	src/expand.o \
	src/split.o \
	src/challenge.o \
	src/dispatcher.o \
	src/http.o \
	src/provider.o \
	src/stripe.o \
	src/webhook.o \
	src/pusher.o \
	src/transfer.o \
	src/errand.o \
	src/wait.o

PG_CPPFLAGS = -DPAYOUTQ_VERSION='"$(EXTVERSION)"' $(shell curl-config --cflags 2>/dev/null)
SHLIB_LINK = $(shell curl-config --libs 2>/dev/null)

# The install script is kept in parts and joined in the order of their names.
INSTALL_SCRIPT_SQL = sql/$(EXTENSION)--$(EXTVERSION).sql
SQL_PARTS := $(sort $(wildcard sql/[0-9][0-9]_*.sql))
DATA_built = $(INSTALL_SCRIPT_SQL)
DATA = $(wildcard sql/$(EXTENSION)--*--*.sql)

# Each kind of test runs on a server of its own, because the worker needs
# shared_preload_libraries.  The tests are whatever files are there.
REGRESS := $(sort $(patsubst test/sql/%.sql,%,$(wildcard test/sql/*.sql)))
REGRESS_OPTS = --inputdir=test --outputdir=tmp_check_regress \
	--temp-instance=tmp_check_regress/server \
	--temp-config=test/postgresql.conf --load-extension=$(EXTENSION)
ISOLATION := $(sort $(patsubst test/isolation/specs/%.spec,%,\
	$(wildcard test/isolation/specs/*.spec)))
ISOLATION_OPTS = --inputdir=test/isolation --outputdir=tmp_check_iso \
	--temp-instance=tmp_check_iso/server \
	--temp-config=test/postgresql.conf --load-extension=$(EXTENSION)
PROVE_TESTS ?= $(sort $(wildcard test/t/*.pl))
TAP_TESTS := $(if $(PROVE_TESTS),1)

EXTRA_CLEAN = tmp_check_regress/ tmp_check_iso/

PG_CONFIG ?= pg_config
PGXS := $(wildcard $(shell $(PG_CONFIG) --pgxs 2>/dev/null))

ifneq ($(PGXS),)
include $(PGXS)
else
# test and demo must start without PostgreSQL: they install it.
.PHONY: all install installcheck clean lint
all install installcheck clean lint:
	@echo "'$(PG_CONFIG) --pgxs' finds no PostgreSQL to build for." >&2
	@echo "Install the server's development package, or set PG_CONFIG." >&2
	@false
endif

# PGXS does not know which headers an object includes.
$(OBJS) $(OBJS:.o=.bc): $(wildcard src/*.h) payoutq.control

$(INSTALL_SCRIPT_SQL): $(SQL_PARTS) payoutq.control
	{ printf '%s\n' '\echo Use "CREATE EXTENSION $(EXTENSION)" to load this file. \quit'; \
	  cat $(SQL_PARTS) </dev/null; } >$@.tmp
	mv $@.tmp $@

# Warnings differ from compiler to compiler, so users' builds do without.
# PostgreSQL's own headers do not pass.
STRICT = -Wall -Wextra -Werror -isystem $(shell $(PG_CONFIG) --includedir-server)
ifneq ($(findstring clang,$(CC)),)
# PostgreSQL was configured for gcc.
STRICT += -Wno-ignored-optimization-argument -Wno-unknown-warning-option \
	-Wno-ignored-attributes
endif
ifneq ($(PGXS),)
.PHONY: lint
lint:
	@test/meta META.json $(EXTVERSION)
	$(MAKE) clean
	$(MAKE) COPT='$(STRICT)' all
endif

export PG_CONFIG

# Once released, a version's SQL stays as it is: what differs is the next one's.
.PHONY: freeze
FROZEN = test/upgrade/$(EXTENSION)--$(EXTVERSION).sql
freeze: $(INSTALL_SCRIPT_SQL)
	@if [ -e $(FROZEN) ] && ! cmp -s $< $(FROZEN); then \
		echo "$(FROZEN) exists and differs: a change takes a new default_version and an update script." >&2; \
		exit 1; \
	fi
	cp $< $(FROZEN)

.PHONY: dist
DIST_DIR = .
dist:
	git archive --format=zip --prefix=$(EXTENSION)-$(EXTVERSION)/ \
		-o $(DIST_DIR)/$(EXTENSION)-$(EXTVERSION).zip HEAD

.PHONY: test test-package test-versions test-pg-upgrade test-sanitizers test-valgrind fuzz demo bench chaos analyze
analyze:
	@test/analyze
test:
	@test/run
test-package:
	@test/package $(SUITE)
test-versions:
	@test/versions $(SUITES)
test-pg-upgrade:
	@test/pg_upgrade
test-sanitizers:
	@test/sanitizers $(LEVELS)
test-valgrind:
	@test/valgrind
fuzz:
	@test/fuzz/run $(FUZZERS)
demo:
	@examples/demo
bench:
	@bench/run
chaos:
	@test/chaos
