/*
 * launcher.c
 *		The launcher: finds the databases that have the extension, and keeps
 *		their workers running.
 *
 * It is connected to no database, so it cannot see where the extension exists.
 * At the start it lets a worker look into each database; afterwards the commit
 * of CREATE EXTENSION, or of a job, tells it.  In each database with the
 * extension one worker is resident; others are started when it asks for help.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "compat.h"
#include "payoutq.h"

#define LAUNCHER_RESTART_S	5

/* When the server has no room for another worker. */
#define NO_ROOM_WAIT_MS		1000
#define TRIES_WITHOUT_ROOM	3

/* A worker that was forked must have attached to its slot by then. */
#define START_TIMEOUT_MS	30000

static void detach_launcher(int code, Datum arg);
static void scan_databases(void);
static bool is_chosen(const char *name);
static void drop_vanished(List *chosen, List *existing);
static long keep_workers(void);
static bool keep_resident(DatabaseSlot *database, bool parked, TimestampTz now,
						  long *nap);
static bool keep_helpers(DatabaseSlot *database, TimestampTz now);
static void ask_for_room(void);
static void look_after_parked(void);
static void look_at(const DatabaseSlot *database, DatabaseSlot *copy,
					int *residents, int *helpers);
static bool keep_dispatcher(DatabaseSlot *database, TimestampTz now, long *nap);
static bool start_worker(Oid database, bool resident, bool dispatcher, TimestampTz now);
static void init_worker(BackgroundWorker *worker, Oid database, int slot,
						TimestampTz started);
static void forget_stillborn(TimestampTz now);

PG_FUNCTION_INFO_V1(payoutq_start_worker_sql);
PG_FUNCTION_INFO_V1(payoutq_stop_workers_sql);

void
payoutq_register_launcher(void)
{
	BackgroundWorker worker = {0};

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = LAUNCHER_RESTART_S;
	strlcpy(worker.bgw_library_name, "payoutq", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "payoutq_launcher_main", BGW_MAXLEN);
	strlcpy(worker.bgw_name, "payoutq launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "payoutq launcher", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}

void
payoutq_launcher_main(Datum arg pg_attribute_unused())
{
	static uint32 event = 0;
	MemoryContext loop_context;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_appname("payoutq launcher");
	SetConfigOption("lock_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
	payoutq_disable_transaction_timeout();

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	payoutq_shared->launcher_proc = MyProcIndex();
	payoutq_shared->rescan = true;
	LWLockRelease(payoutq_shared->lock);
	before_shmem_exit(detach_launcher, (Datum) 0);

	loop_context = AllocSetContextCreate(TopMemoryContext, "payoutq launcher",
										 ALLOCSET_DEFAULT_SIZES);
	for (;;)
	{
		long		nap;

		CHECK_FOR_INTERRUPTS();
		MemoryContextReset(loop_context);
		MemoryContextSwitchTo(loop_context);
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			payoutq_shared->rescan = true;
		}
		if (payoutq_shared->rescan)
			scan_databases();
		nap = keep_workers();

		if (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					  nap, payoutq_wait_event(&event, "PayoutqLauncherMain")) & WL_TIMEOUT &&
			nap >= payoutq_interval * 1000L)
			look_after_parked();
		ResetLatch(MyLatch);
	}
}

static void
detach_launcher(int code pg_attribute_unused(), Datum arg pg_attribute_unused())
{
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	payoutq_shared->launcher_proc = -1;
	LWLockRelease(payoutq_shared->lock);
}

/* Databases that are new here get a slot, those that are gone lose theirs. */
static void
scan_databases(void)
{
	MemoryContext context = CurrentMemoryContext;
	List	   *chosen = NIL;
	List	   *existing = NIL;
	Relation	relation;
	TableScanDesc scan;
	HeapTuple	tuple;

	/* Whoever asks for it from here on is seen to by the next one. */
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	payoutq_shared->rescan = false;
	LWLockRelease(payoutq_shared->lock);

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	relation = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(relation, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);
		MemoryContext scanning;

		scanning = MemoryContextSwitchTo(context);
		existing = lappend_oid(existing, database->oid);
		if (database->datallowconn && !database->datistemplate &&
			is_chosen(NameStr(database->datname)))
			chosen = lappend_oid(chosen, database->oid);
		MemoryContextSwitchTo(scanning);
	}
	table_endscan(scan);
	table_close(relation, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);

	drop_vanished(chosen, existing);
}

/* payoutq.databases: empty means all */
static bool
is_chosen(const char *name)
{
	List	   *names;
	ListCell   *cell;

	if (!SplitIdentifierString(pstrdup(payoutq_databases), ',', &names))
	{
		ereport(LOG,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid list syntax in parameter \"%s\"", "payoutq.databases")));
		return false;
	}
	foreach(cell, names)
		if (strcmp(lfirst(cell), name) == 0)
			return true;
	return names == NIL;
}

/* That somebody has stopped its workers is kept for as long as there is the database. */
static void
drop_vanished(List *chosen, List *existing)
{
	ListCell   *cell;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PAYOUTQ_MAX_DATABASES; i++)
	{
		DatabaseSlot *slot = &payoutq_shared->databases[i];
		List	   *staying = slot->state == DATABASE_STOPPED ? existing : chosen;

		if (slot->state != DATABASE_FREE && slot->held == 0 &&
			!list_member_oid(staying, slot->database))
		{
			slot->state = DATABASE_FREE;
			payoutq_set_latches(slot->database);
		}
	}
	foreach(cell, chosen)
		if (payoutq_database_slot(lfirst_oid(cell), true) == NULL)
		{
			ereport(WARNING,
					(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
					 errmsg("payoutq looks after %d databases only", PAYOUTQ_MAX_DATABASES),
					 errhint("Name them in payoutq.databases.")));
			break;
		}
	LWLockRelease(payoutq_shared->lock);
}

/*
 * Start what is missing: a resident in each database before any helper, and
 * those that once made room last.  Returns how long nothing is to do, in
 * milliseconds.
 */
static long
keep_workers(void)
{
	static int	without_room = 0;
	TimestampTz now = GetCurrentTimestamp();
	long		nap = payoutq_interval * 1000L;
	bool		room = true;

	forget_stillborn(now);
	for (int i = 0; i < PAYOUTQ_MAX_DATABASES && room; i++)
		room = keep_resident(&payoutq_shared->databases[i], false, now, &nap);
	for (int i = 0; i < PAYOUTQ_MAX_DATABASES && room; i++)
		room = keep_dispatcher(&payoutq_shared->databases[i], now, &nap) &&
			keep_helpers(&payoutq_shared->databases[i], now);
	for (int i = 0; i < PAYOUTQ_MAX_DATABASES && room; i++)
		room = keep_resident(&payoutq_shared->databases[i], true, now, &nap);

	without_room = room ? 0 : without_room + 1;
	if (without_room == TRIES_WITHOUT_ROOM)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("out of background worker processes for payoutq"),
				 errhint("You might need to increase max_worker_processes.")));
	if (without_room >= TRIES_WITHOUT_ROOM)
		ask_for_room();
	return room ? nap : Min(nap, NO_ROOM_WAIT_MS);
}

/* Returns false when the server has no room for another worker. */
static bool
keep_resident(DatabaseSlot *database, bool parked, TimestampTz now, long *nap)
{
	DatabaseSlot copy;
	int			residents;
	int			helpers;

	look_at(database, &copy, &residents, &helpers);
	if (residents > 0 || copy.held > 0 || payoutq_workers == 0 ||
		!(copy.state == DATABASE_UNKNOWN || copy.state == DATABASE_ACTIVE ||
		  (copy.state == DATABASE_PARKED && parked) ||
		  ((copy.state == DATABASE_WITHOUT || copy.state == DATABASE_PARKED) && copy.wanted)))
		return true;
	if (copy.start_after > now)
	{
		*nap = Min(*nap, TimestampDifferenceMilliseconds(now, copy.start_after) + 1);
		return true;
	}

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database->wanted = false;
	LWLockRelease(payoutq_shared->lock);
	if (start_worker(copy.database, true, false, now))
		return true;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database->wanted = copy.wanted;
	LWLockRelease(payoutq_shared->lock);
	return false;
}

/*
 * Let the worker leave that is idle for longest.  Its database gets another
 * when something is committed there, when there is room, and at each interval.
 */
static void
ask_for_room(void)
{
	WorkerSlot *oldest = NULL;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_IDLE && !worker->yield &&
			(oldest == NULL || worker->since < oldest->since))
			oldest = worker;
	}
	if (oldest)
	{
		oldest->yield = true;
		payoutq_set_latches(oldest->database);
	}
	LWLockRelease(payoutq_shared->lock);
}

static void
look_after_parked(void)
{
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	payoutq_shared->rescan = true;
	for (int i = 0; i < PAYOUTQ_MAX_DATABASES; i++)
		if (payoutq_shared->databases[i].state == DATABASE_PARKED)
			payoutq_shared->databases[i].wanted = true;
	LWLockRelease(payoutq_shared->lock);
}

static bool
keep_helpers(DatabaseSlot *database, TimestampTz now)
{
	DatabaseSlot copy;
	int			residents;
	int			helpers;

	look_at(database, &copy, &residents, &helpers);
	if (!copy.help || copy.held > 0 || copy.state != DATABASE_ACTIVE || copy.start_after > now)
		return true;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database->help = false;
	LWLockRelease(payoutq_shared->lock);

	for (; helpers < payoutq_workers - 1; helpers++)
		if (!start_worker(copy.database, false, false, now))
			return false;
	return true;
}

/* One of its own for each database that has something to send. */
static bool
keep_dispatcher(DatabaseSlot *database, TimestampTz now, long *nap)
{
	DatabaseSlot copy;
	bool		is_there;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	copy = *database;
	is_there = payoutq_has_dispatcher(copy.database);
	LWLockRelease(payoutq_shared->lock);
	if (!copy.sends || copy.held > 0 || copy.state != DATABASE_ACTIVE)
		return true;
	if (copy.start_after > now)
	{
		*nap = Min(*nap, TimestampDifferenceMilliseconds(now, copy.start_after) + 1);
		return true;
	}

	if (!is_there && !start_worker(copy.database, false, true, now))
		return false;
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	database->sends = false;
	LWLockRelease(payoutq_shared->lock);
	return true;
}

static void
look_at(const DatabaseSlot *database, DatabaseSlot *copy, int *residents, int *helpers)
{
	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	*copy = *database;
	payoutq_count_workers(copy->database, residents, helpers);
	LWLockRelease(payoutq_shared->lock);
}

static bool
start_worker(Oid database, bool resident, bool dispatcher, TimestampTz now)
{
	BackgroundWorker worker;
	WorkerSlot *slot = NULL;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PAYOUTQ_SLOTS && slot == NULL; i++)
		if (payoutq_shared->workers[i].state == WORKER_FREE)
			slot = &payoutq_shared->workers[i];
	if (slot)
	{
		slot->state = WORKER_STARTING;
		slot->database = database;
		slot->resident = resident;
		slot->dispatcher = dispatcher;
		slot->proc = -1;
		slot->since = now;
	}
	LWLockRelease(payoutq_shared->lock);
	if (slot == NULL)
		return false;

	init_worker(&worker, database, slot - payoutq_shared->workers, now);
	if (RegisterDynamicBackgroundWorker(&worker, NULL))
		return true;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	memset(slot, 0, sizeof(WorkerSlot));
	LWLockRelease(payoutq_shared->lock);
	return false;
}

/*
 * The launcher is the one that starts a worker again, with backoff, so the
 * postmaster must not.
 */
static void
init_worker(BackgroundWorker *worker, Oid database, int slot, TimestampTz started)
{
	PayoutqWorkerExtra extra = {.database = database, .started = started};

	memset(worker, 0, sizeof(BackgroundWorker));
	worker->bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker->bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker->bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker->bgw_library_name, "payoutq", BGW_MAXLEN);
	strlcpy(worker->bgw_function_name, "payoutq_worker_main", BGW_MAXLEN);
	snprintf(worker->bgw_name, BGW_MAXLEN, "payoutq worker for database %u", database);
	strlcpy(worker->bgw_type, "payoutq worker", BGW_MAXLEN);
	worker->bgw_main_arg = Int32GetDatum(slot);
	worker->bgw_notify_pid = MyProcPid;
	StaticAssertStmt(sizeof(extra) <= BGW_EXTRALEN, "bgw_extra is too small");
	memcpy(worker->bgw_extra, &extra, sizeof(extra));
}

/* Workers that were registered but never came to life free their slots. */
static void
forget_stillborn(TimestampTz now)
{
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_STARTING &&
			TimestampDifferenceExceeds(worker->since, now, START_TIMEOUT_MS))
			memset(worker, 0, sizeof(WorkerSlot));
	}
	LWLockRelease(payoutq_shared->lock);
}

/*
 * payout_start_worker(): with the launcher, let it keep workers here again;
 * without, start one that looks for work by itself.
 */
Datum
payoutq_start_worker_sql(PG_FUNCTION_ARGS pg_attribute_unused())
{
	BackgroundWorker worker;

	if (payoutq_shared)
	{
		DatabaseSlot *slot;

		LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
		slot = payoutq_database_slot(MyDatabaseId, true);
		if (slot)
		{
			slot->state = DATABASE_ACTIVE;
			slot->failures = 0;
			slot->start_after = 0;
			memset(slot->avoided, 0, sizeof(slot->avoided));
			(void) payoutq_set_latches(MyDatabaseId);
		}
		LWLockRelease(payoutq_shared->lock);
		payoutq_wake_launcher();
		PG_RETURN_VOID();
	}

	init_worker(&worker, MyDatabaseId, -1, 0);
	if (!RegisterDynamicBackgroundWorker(&worker, NULL))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("could not start a worker"),
				 errhint("You might need to increase max_worker_processes.")));
	PG_RETURN_VOID();
}

/* payoutq.stop_workers(): end those of this database, and start no others. */
Datum
payoutq_stop_workers_sql(PG_FUNCTION_ARGS pg_attribute_unused())
{
	DatabaseSlot *slot;

	if (payoutq_shared == NULL)
		PG_RETURN_INT32(0);

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(MyDatabaseId, true);
	if (slot)
		slot->state = DATABASE_STOPPED;
	LWLockRelease(payoutq_shared->lock);
	PG_RETURN_INT32(payoutq_signal_workers(MyDatabaseId));
}
