/*
 * worker.c
 *		The background worker of a database: waits, handles signals, reads the
 *		configuration again.  The work is in process.c.
 *
 * One worker of each database is resident: it stays, so that it can be woken
 * within a millisecond.  The others help while there is more work than one can
 * do, and leave.  Exit status 0: I am no longer wanted; 1: something went wrong,
 * and the launcher starts another after a while.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_authid.h"
#include "commands/dbcommands.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

/* Batches between two looks at signals, configuration and statistics. */
#define BATCHES_PER_ROUND	32

/* After a failure, from a second up to a minute until the next start. */
#define MAX_BACKOFF_S		60

/* A helper leaves after so long without work, unless another is at a query. */
#define HELPER_PATIENCE_MS	5000
#define DISPATCHER_PATIENCE_MS	60000

/* Without shared memory nobody can wake us. */
#define UNSUPERVISED_NAP_MS	1000

bool		payoutq_is_worker = false;

static bool unsupervised = false;
static volatile sig_atomic_t told_to_end = false;

static void end_when_told(SIGNAL_ARGS);
static void attach(int slot, TimestampTz started);
static void detach(int code, Datum arg);
static void report_database(DatabaseState state, bool worked);
static void prepare_session(void);
static void remain_superuser(void);
static void require_extension(void);
static void complain_once(void);
static bool is_dispatcher(void);
static bool dispatch(long *nap);
static bool work(long *nap);
static bool is_superfluous(TimestampTz worked_at);
static void wait_for_work(long nap);

void
payoutq_worker_main(Datum arg)
{
	int			slot = DatumGetInt32(arg);
	PayoutqWorkerExtra extra;
	TimestampTz worked_at;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, end_when_told);
	payoutq_is_worker = true;
	unsupervised = slot < 0;
	memcpy(&extra, MyBgworkerEntry->bgw_extra, sizeof(extra));
	if (!unsupervised)
		attach(slot, extra.started);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(extra.database, InvalidOid, 0);
	prepare_session();

	worked_at = GetCurrentTimestamp();
	for (;;)
	{
		long		nap;
		bool		busy;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			payoutq_engine_settings_for_process();
		}

		busy = is_dispatcher() ? dispatch(&nap) : work(&nap);
		if (busy)
			worked_at = GetCurrentTimestamp();
		if (is_superfluous(worked_at))
			proc_exit(0);
		if (payoutq_my_slot && payoutq_my_slot->resident && payoutq_my_slot->yield && !busy &&
			nap >= payoutq_interval * 1000L)
		{
			report_database(DATABASE_PARKED, true);
			proc_exit(0);
		}
		if (!busy)
			wait_for_work(nap);
	}
}

/* That is no failure, neither of the worker nor of the job it is at. */
static void
end_when_told(SIGNAL_ARGS)
{
	told_to_end = true;
	die(postgres_signal_arg);
}

/* The launcher has filled the slot; make it ours, and free it at exit. */
static void
attach(int slot, TimestampTz started)
{
	WorkerSlot *worker;
	DatabaseSlot *database;
	bool		stopped;

	if (payoutq_shared == NULL)
		proc_exit(1);

	worker = &payoutq_shared->workers[slot];
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database = payoutq_database_slot(worker->database, false);
	stopped = database == NULL || database->held > 0 || database->state == DATABASE_STOPPED;
	if (worker->state == WORKER_STARTING && worker->since == started)
	{
		worker->pid = MyProcPid;
		worker->proc = MyProcIndex();
		worker->state = WORKER_IDLE;
		worker->since = GetCurrentTimestamp();
		payoutq_my_slot = worker;
	}
	LWLockRelease(payoutq_shared->lock);

	/* Too late: the launcher has given the slot to another. */
	if (payoutq_my_slot == NULL)
		proc_exit(0);
	before_shmem_exit(detach, (Datum) 0);
	if (stopped)
		proc_exit(0);
}

static void
detach(int code, Datum arg pg_attribute_unused())
{
	DatabaseSlot *database;
	bool		was_dispatcher;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database = payoutq_database_slot(payoutq_my_slot->database, false);
	if (code != 0 && database && !told_to_end)
	{
		TimestampTz now = GetCurrentTimestamp();
		AvoidedJob *avoided;
		int			seconds;

		/*
		 * What failed before us was long ago.  A dispatcher says nothing when it
		 * has come through a round.
		 */
		if (TimestampDifferenceExceeds(MyStartTimestamp, now, MAX_BACKOFF_S * 1000))
			database->failures = 0;
		seconds = Min(1 << Min(database->failures, 6), MAX_BACKOFF_S);
		avoided = &database->avoided[database->failures % PAYOUTQ_AVOIDED];
		database->failures++;
		database->start_after = TimestampTzPlusMilliseconds(now, seconds * INT64CONST(1000));

		/* Should it be the job's fault, the next worker begins with others. */
		avoided->job_id = payoutq_my_slot->serves;
		avoided->until = TimestampTzPlusMilliseconds(database->start_after,
													 2 * seconds * INT64CONST(1000));
	}
	was_dispatcher = payoutq_my_slot->dispatcher;
	memset(payoutq_my_slot, 0, sizeof(WorkerSlot));
	payoutq_my_slot = NULL;

	/* As long as we were there, the resident did not ask for another. */
	if (was_dispatcher && database)
		payoutq_set_latches(database->database);
	payoutq_wake_launcher();
	LWLockRelease(payoutq_shared->lock);
}

/* Tell the launcher what it could not see from outside. */
static void
report_database(DatabaseState state, bool worked)
{
	DatabaseSlot *database;

	if (payoutq_my_slot == NULL)
		return;
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database = payoutq_database_slot(MyDatabaseId, false);
	if (database && database->state != DATABASE_STOPPED)
		database->state = state;
	if (database && worked)
	{
		database->failures = 0;
		database->complained = false;
	}
	LWLockRelease(payoutq_shared->lock);
}

static void
prepare_session(void)
{
	char		name[64];

	snprintf(name, sizeof(name), "payoutq worker%s",
			 unsupervised ? " (unsupervised)" :
			 payoutq_my_slot->dispatcher ? " (dispatcher)" :
			 payoutq_my_slot->resident ? "" : " (helper)");
	pgstat_report_appname(name);
	remain_superuser();
	SetConfigOption("default_transaction_read_only", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("default_transaction_isolation", "read committed", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("statement_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("idle_in_transaction_session_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
	payoutq_disable_transaction_timeout();
	payoutq_engine_settings_for_process();
}

/*
 * The settings of the database, or of the role that we are, may name another role
 * for sessions.
 */
static void
remain_superuser(void)
{
	if (GetSessionUserId() != BOOTSTRAP_SUPERUSERID)
	{
		StartTransactionCommand();
		SetConfigOption("session_authorization", GetUserNameFromId(BOOTSTRAP_SUPERUSERID, false),
						PGC_SUSET, PGC_S_OVERRIDE);
		CommitTransactionCommand();
	}
	SetConfigOption("role", "none", PGC_SUSET, PGC_S_OVERRIDE);
}

/*
 * One round, in one go of transactions.  Returns true if there may be more to
 * do; else the time until which nothing is due, in milliseconds.
 */
static bool
work(long *nap)
{
	static bool known = false;
	uint64		batches;
	TimestampTz now;
	TimestampTz due;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	pgstat_report_activity(STATE_RUNNING, "payoutq: looking for work");
	require_extension();
	batches = payoutq_process(BATCHES_PER_ROUND, 0);

	/* Only who has come through a round has not failed. */
	if (!known)
		report_database(DATABASE_ACTIVE, true);
	known = true;

	/* It may have been dropped since; this is another transaction. */
	require_extension();
	PushActiveSnapshot(GetTransactionSnapshot());
	SPI_connect();
	now = GetCurrentTimestamp();
	due = payoutq_next_due(now);
	if (payoutq_shared)
		payoutq_ask_for_dispatcher();
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(batches == 0);
	pgstat_report_activity(STATE_IDLE, NULL);
	payoutq_worker_report(WORKER_IDLE, 0, 0);

	*nap = payoutq_interval * 1000L;
	if (unsupervised)
		*nap = UNSUPERVISED_NAP_MS;
	if (payoutq_my_slot && !payoutq_my_slot->resident)
		*nap = Min(*nap, HELPER_PATIENCE_MS);
	if (due != 0)
		*nap = Min(*nap, TimestampDifferenceMilliseconds(now, due) + 1);
	return batches >= BATCHES_PER_ROUND;
}

static bool
is_dispatcher(void)
{
	return payoutq_my_slot && payoutq_my_slot->dispatcher;
}

/* Leaves by itself when there has been nothing to send for a while. */
static bool
dispatch(long *nap)
{
	static TimestampTz idle_since = 0;
	TimestampTz now = GetCurrentTimestamp();
	bool		busy;

	busy = payoutq_dispatch(nap);
	if (busy || idle_since == 0)
		idle_since = now;
	if (*nap < 0)
	{
		if (TimestampDifferenceExceeds(idle_since, now, DISPATCHER_PATIENCE_MS))
			proc_exit(0);
		*nap = DISPATCHER_PATIENCE_MS;
	}
	return busy;
}

/*
 * Lock it for this transaction.  Without it, or with one of another version,
 * there is nothing to do here until somebody runs CREATE or ALTER EXTENSION.
 */
static void
require_extension(void)
{
	bool		exists;

	PushActiveSnapshot(GetTransactionSnapshot());
	exists = payoutq_lock_extension();
	PopActiveSnapshot();
	if (exists)
		return;

	complain_once();
	AbortCurrentTransaction();
	report_database(DATABASE_WITHOUT, false);
	proc_exit(0);
}

/* Others may start and find the same before somebody updates the extension. */
static void
complain_once(void)
{
	DatabaseSlot *database;
	bool		complained;

	if (payoutq_my_slot == NULL)
	{
		(void) payoutq_complain_of_version(WARNING);
		return;
	}

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	database = payoutq_database_slot(MyDatabaseId, false);
	complained = database == NULL || database->complained || !payoutq_my_slot->resident;
	LWLockRelease(payoutq_shared->lock);
	if (complained || !payoutq_complain_of_version(WARNING))
		return;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database = payoutq_database_slot(MyDatabaseId, false);
	if (database)
		database->complained = true;
	LWLockRelease(payoutq_shared->lock);
}

/*
 * A helper with nothing to do, one more than payoutq.workers, or a worker of a
 * database that is no longer in payoutq.databases.
 */
static bool
is_superfluous(TimestampTz worked_at)
{
	bool		unwanted;
	bool		querying;
	int			residents;
	int			helpers;

	if (payoutq_my_slot == NULL)
		return false;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	unwanted = payoutq_database_slot(MyDatabaseId, false) == NULL;
	querying = payoutq_runs_query(MyDatabaseId);
	payoutq_count_workers(MyDatabaseId, &residents, &helpers);
	LWLockRelease(payoutq_shared->lock);

	if (unwanted || payoutq_workers == 0)
		return true;
	return !payoutq_my_slot->resident && !payoutq_my_slot->dispatcher &&
		(residents + helpers > payoutq_workers ||
		 ((!querying || payoutq_my_slot->yield) &&
		  TimestampDifferenceExceeds(worked_at, GetCurrentTimestamp(), HELPER_PATIENCE_MS)));
}

static void
wait_for_work(long nap)
{
	static uint32 event = 0;

	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 nap, payoutq_wait_event(&event, "PayoutqWorkerMain"));
	ResetLatch(MyLatch);
}
