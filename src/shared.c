/*
 * shared.c
 *		Shared memory, and waking workers at commit.
 *
 * All of SharedState but the condition variable is guarded by its LWLock, which
 * is never held over anything slow.  A worker's slot is given to it by the
 * launcher and taken back at its exit under the lock; in between the worker
 * reports what it does without it, for a view that may be a moment behind; its
 * last error only under the lock.
 * Processes are named by their index in ProcGlobal, never by a pointer.
 *
 * Without preload there is none of this: payoutq_shared is NULL, nobody can be
 * woken, and everything else works.
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "commands/dbcommands.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

SharedState *payoutq_shared = NULL;
WorkerSlot *payoutq_my_slot = NULL;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

static bool wake_pending = false;
static bool announce_pending = false;
static bool rescan_pending = false;
static List *held_databases = NIL;	/* by this transaction; in TopMemoryContext */

static void request_shared_memory(void);
static void create_shared_memory(void);
static void register_callback(void);
static void release_databases(void);
static void rescan_databases(void);
static void at_end(XactEvent event, void *arg);
static void set_latch_of(int proc);

PG_FUNCTION_INFO_V1(payoutq_wake_sql);
PG_FUNCTION_INFO_V1(payoutq_tell_waiters);
PG_FUNCTION_INFO_V1(payoutq_wake_trigger);
PG_FUNCTION_INFO_V1(payoutq_worker_slots);

void
payoutq_shared_init(void)
{
	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shared_memory;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = create_shared_memory;
}

static void
request_shared_memory(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();
	RequestAddinShmemSpace(MAXALIGN(sizeof(SharedState)));
	RequestNamedLWLockTranche("payoutq", 1);
}

static void
create_shared_memory(void)
{
	bool		found;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	payoutq_shared = ShmemInitStruct("payoutq", sizeof(SharedState), &found);
	if (!found)
	{
		memset(payoutq_shared, 0, sizeof(SharedState));
		payoutq_shared->lock = &(GetNamedLWLockTranche("payoutq"))->lock;
		payoutq_shared->launcher_proc = -1;
		payoutq_shared->rescan = true;
		ConditionVariableInit(&payoutq_shared->announced);
	}
	LWLockRelease(AddinShmemInitLock);
}

/* Somebody may have work when this transaction has committed. */
void
payoutq_wake_at_commit(void)
{
	register_callback();
	wake_pending = true;
}

/* Whoever waits for a job shall look again. */
void
payoutq_announce_at_commit(void)
{
	register_callback();
	announce_pending = true;
}

/* There is another database, or one has another name. */
void
payoutq_rescan_at_commit(void)
{
	register_callback();
	rescan_pending = true;
}

/*
 * No worker may start there until this transaction ends.  A transaction can name
 * several databases, and each more than once.
 */
void
payoutq_hold_database(Oid database)
{
	MemoryContext caller;
	DatabaseSlot *slot;

	if (list_member_oid(held_databases, database))
		return;
	register_callback();

	/* First what can fail: what is counted must be taken back. */
	caller = MemoryContextSwitchTo(TopMemoryContext);
	held_databases = lappend_oid(held_databases, database);
	MemoryContextSwitchTo(caller);

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, true);
	if (slot)
		slot->held++;
	LWLockRelease(payoutq_shared->lock);
	if (slot == NULL)
		held_databases = list_delete_oid(held_databases, database);
}

static void
release_databases(void)
{
	ListCell   *cell;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	foreach(cell, held_databases)
	{
		DatabaseSlot *slot = payoutq_database_slot(lfirst_oid(cell), false);

		if (slot && slot->held > 0)
		{
			slot->held--;
			slot->failures = 0;
			slot->start_after = 0;
		}
	}
	LWLockRelease(payoutq_shared->lock);
	list_free(held_databases);
	held_databases = NIL;
	rescan_databases();
}

static void
rescan_databases(void)
{
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	payoutq_shared->rescan = true;
	payoutq_wake_launcher();
	LWLockRelease(payoutq_shared->lock);
}

static void
register_callback(void)
{
	static bool registered = false;

	if (!registered)
		RegisterXactCallback(at_end, NULL);
	registered = true;
}

static void
at_end(XactEvent event, void *arg pg_attribute_unused())
{
	switch (event)
	{
		case XACT_EVENT_COMMIT:
			if (wake_pending)
				payoutq_wake_workers(MyDatabaseId);
			if (announce_pending && payoutq_shared)
				ConditionVariableBroadcast(&payoutq_shared->announced);
			if (rescan_pending && payoutq_shared)
				rescan_databases();
			break;
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			/* After PREPARE TRANSACTION the interval finds the work. */
			break;
		default:
			return;
	}
	if (payoutq_shared && held_databases != NIL)
		release_databases();
	wake_pending = announce_pending = rescan_pending = false;
}

static void
set_latch_of(int proc)
{
	if (proc >= 0)
		SetLatch(&ProcGlobal->allProcs[proc].procLatch);
}

/* All workers of the database; without one, the launcher starts it. */
void
payoutq_wake_workers(Oid database)
{
	DatabaseSlot *slot;

	if (payoutq_shared == NULL)
		return;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, true);
	if (slot)
	{
		/* The launcher has to see whether it is a chosen one. */
		if (slot->state == DATABASE_UNKNOWN)
			payoutq_shared->rescan = true;
		slot->wanted = true;
		slot->generation++;
		slot->help |= payoutq_runs_query(database);
	}
	if (!payoutq_set_latches(database) || (slot && slot->help))
		set_latch_of(payoutq_shared->launcher_proc);
	LWLockRelease(payoutq_shared->lock);
}

/* With the lock held.  Returns true if the database has a worker, or gets one. */
bool
payoutq_set_latches(Oid database)
{
	bool		found = false;

	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_FREE || worker->database != database)
			continue;
		found |= !worker->dispatcher;
		if (worker->state != WORKER_STARTING)
			set_latch_of(worker->proc);
	}
	return found;
}

/* With the lock held.  Whoever is at the query of a job hears nothing meanwhile. */
bool
payoutq_runs_query(Oid database)
{
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_WORKING && worker->database == database && worker->batch_no == 0)
			return true;
	}
	return false;
}

void
payoutq_wake_launcher(void)
{
	if (payoutq_shared)
		set_latch_of(payoutq_shared->launcher_proc);
}

/* With the lock held. */
void
payoutq_count_workers(Oid database, int *residents, int *helpers)
{
	*residents = *helpers = 0;
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_FREE || worker->database != database || worker->dispatcher)
			continue;
		if (worker->resident)
			(*residents)++;
		else
			(*helpers)++;
	}
}

/* With the lock held, in exclusive mode to create.  NULL: none, or no room. */
DatabaseSlot *
payoutq_database_slot(Oid database, bool create)
{
	DatabaseSlot *free_slot = NULL;

	for (int i = 0; i < PAYOUTQ_MAX_DATABASES; i++)
	{
		DatabaseSlot *slot = &payoutq_shared->databases[i];

		if (slot->state != DATABASE_FREE && slot->database == database)
			return slot;
		if (slot->state == DATABASE_FREE && free_slot == NULL)
			free_slot = slot;
	}
	if (!create || free_slot == NULL)
		return NULL;

	memset(free_slot, 0, sizeof(DatabaseSlot));
	free_slot->database = database;
	free_slot->state = DATABASE_UNKNOWN;
	return free_slot;
}

/* Ask the workers of the database to end.  Returns how many there still are. */
int
payoutq_signal_workers(Oid database)
{
	int			count = 0;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_FREE || worker->database != database)
			continue;
		count++;
		if (worker->pid != 0)
			kill(worker->pid, SIGTERM);
	}
	LWLockRelease(payoutq_shared->lock);
	return count;
}

uint64
payoutq_wake_generation(Oid database)
{
	DatabaseSlot *slot;
	uint64		generation = 0;

	if (payoutq_shared == NULL)
		return 0;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	slot = payoutq_database_slot(database, false);
	if (slot)
		generation = slot->generation;
	LWLockRelease(payoutq_shared->lock);
	return generation;
}

/* There is work for more workers than are there. */
bool
payoutq_call_for_help(Oid database)
{
	DatabaseSlot *slot;
	bool		asked = false;

	if (payoutq_shared == NULL)
		return false;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, false);
	if (slot && !slot->help)
	{
		slot->help = asked = true;
		set_latch_of(payoutq_shared->launcher_proc);
	}
	LWLockRelease(payoutq_shared->lock);
	return asked;
}

/* With the lock held. */
bool
payoutq_has_dispatcher(Oid database)
{
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state != WORKER_FREE && worker->database == database && worker->dispatcher)
			return true;
	}
	return false;
}

void
payoutq_call_for_dispatcher(Oid database)
{
	DatabaseSlot *slot;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, false);
	if (slot && !slot->sends && !payoutq_has_dispatcher(database))
	{
		slot->sends = true;
		set_latch_of(payoutq_shared->launcher_proc);
	}
	LWLockRelease(payoutq_shared->lock);
}

/* For pg_stat_activity and for payout_workers. */
void
payoutq_worker_report(WorkerState state, int64 job_id, int32 batch_no)
{
	if (payoutq_is_worker && state == WORKER_WORKING)
	{
		char		activity[80];

		snprintf(activity, sizeof(activity), batch_no > 0 ?
				 "payoutq: job " INT64_FORMAT ", batch %d" :
				 "payoutq: query of job " INT64_FORMAT, job_id, batch_no);
		pgstat_report_activity(STATE_RUNNING, activity);
	}
	if (payoutq_my_slot == NULL)
		return;
	payoutq_my_slot->state = state;
	payoutq_my_slot->job_id = job_id;
	payoutq_my_slot->batch_no = batch_no;
	payoutq_my_slot->since = GetCurrentTimestamp();
}

void
payoutq_worker_count(int64 entries)
{
	if (payoutq_my_slot == NULL)
		return;
	payoutq_my_slot->batches++;
	payoutq_my_slot->entries += entries;
}

void
payoutq_worker_error(const char *message)
{
	int			length = pg_mbcliplen(message, strlen(message), PAYOUTQ_ERROR_LENGTH - 1);

	if (payoutq_my_slot == NULL)
		return;

	/* Half of one and half of another message may be no text. */
	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	strlcpy(payoutq_my_slot->last_error, message, length + 1);
	LWLockRelease(payoutq_shared->lock);
}

/* Should we fail, it may be the job's fault. */
void
payoutq_worker_serves(int64 job_id)
{
	if (payoutq_my_slot)
		payoutq_my_slot->serves = job_id;
}

/* Until then the others go first; 0: they do not. */
TimestampTz
payoutq_avoided_until(int64 job_id)
{
	DatabaseSlot *slot;
	TimestampTz until = 0;

	if (payoutq_my_slot == NULL)
		return 0;
	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	slot = payoutq_database_slot(MyDatabaseId, false);
	for (int i = 0; slot && i < PAYOUTQ_AVOIDED; i++)
		if (slot->avoided[i].job_id == job_id)
			until = Max(until, slot->avoided[i].until);
	LWLockRelease(payoutq_shared->lock);
	return until;
}

Datum
payoutq_wake_sql(PG_FUNCTION_ARGS pg_attribute_unused())
{
	payoutq_wake_at_commit();
	PG_RETURN_VOID();
}

/* Not the workers: a job that begins or ends is nothing new to do. */
Datum
payoutq_tell_waiters(PG_FUNCTION_ARGS pg_attribute_unused())
{
	payoutq_announce_at_commit();
	PG_RETURN_VOID();
}

/* After an INSERT into payoutq.job, be it by a restore. */
Datum
payoutq_wake_trigger(PG_FUNCTION_ARGS pg_attribute_unused())
{
	payoutq_wake_at_commit();
	PG_RETURN_POINTER(NULL);
}

/* Workers of this database: pid, state, job, batch, since, batches, entries, last_error */
Datum
payoutq_worker_slots(PG_FUNCTION_ARGS)
{
	static const char *const states[] = {"free", "starting", "idle", "working"};
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	WorkerSlot *copy;

	InitMaterializedSRF(fcinfo, 0);
	if (payoutq_shared == NULL)
		return (Datum) 0;

	copy = palloc(sizeof(payoutq_shared->workers));
	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	memcpy(copy, payoutq_shared->workers, sizeof(payoutq_shared->workers));
	LWLockRelease(payoutq_shared->lock);

	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *w = &copy[i];
		bool		working = w->state == WORKER_WORKING;
		Datum		values[] = {Int32GetDatum(w->pid),
			CStringGetTextDatum(states[w->state]), Int64GetDatum(w->job_id),
			Int32GetDatum(w->batch_no), TimestampTzGetDatum(w->since),
			Int64GetDatum(w->batches), Int64GetDatum(w->entries),
			CStringGetTextDatum(w->last_error)};
		bool		nulls[] = {w->pid == 0, false, !working, !working, false, false, false,
		w->last_error[0] == '\0'};

		if (w->state == WORKER_FREE || w->database != MyDatabaseId)
			continue;
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}
