/*
 * utility.c
 *		Get out of the way of commands on databases, and notice DROP EXTENSION.
 *
 * An idle worker is a connection, and DROP DATABASE, CREATE DATABASE ... TEMPLATE,
 * RENAME and SET TABLESPACE want none.  Before them, for whoever may do them, the
 * workers of that database are ended and kept from coming back until the command
 * is done.
 */
#include "postgres.h"

#include <signal.h>

#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/value.h"
#include "storage/latch.h"
#include "tcop/utility.h"
#include "utils/acl.h"

#include "compat.h"
#include "payoutq.h"

/* The server itself waits five seconds for others to leave. */
#define STOP_TIMEOUT_MS		5000
#define STOP_POLL_MS		5

static ProcessUtility_hook_type next_hook = NULL;

static void payoutq_process_utility(PlannedStmt *pstmt, const char *queryString,
									bool readOnlyTree, ProcessUtilityContext context,
									ParamListInfo params, QueryEnvironment *queryEnv,
									DestReceiver *dest, QueryCompletion *qc);
static Oid	affected_database(Node *statement);
static const char *string_option(List *options, const char *name);
static bool drops_extension(Node *statement);
static DatabaseState hold_off_workers(Oid database);
static void let_workers_in(Oid database, DatabaseState state);
static bool signal_workers(Oid database);

void
payoutq_install_utility_hook(void)
{
	next_hook = ProcessUtility_hook ? ProcessUtility_hook : standard_ProcessUtility;
	ProcessUtility_hook = payoutq_process_utility;
}

static void
payoutq_process_utility(PlannedStmt *pstmt, const char *queryString,
						bool readOnlyTree, ProcessUtilityContext context,
						ParamListInfo params, QueryEnvironment *queryEnv,
						DestReceiver *dest, QueryCompletion *qc)
{
	volatile Oid database = affected_database(pstmt->utilityStmt);
	volatile bool drops = drops_extension(pstmt->utilityStmt);
	volatile DatabaseState before = DATABASE_FREE;

	/* Of the database, when it has workers; else nothing to restore. */
	if (OidIsValid(database))
		before = hold_off_workers(database);

	PG_TRY();
	{
		next_hook(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
	}
	PG_CATCH();
	{
		let_workers_in(database, before);
		PG_RE_THROW();
	}
	PG_END_TRY();

	/* A database that is gone loses its slot when the launcher looks again. */
	if (!IsA(pstmt->utilityStmt, DropdbStmt))
		let_workers_in(database, before);

	/* Workers see that the extension is gone, and leave. */
	if (drops)
		payoutq_wake_at_commit();
}

/* The database that must have no connection, if the caller may ask for that. */
static Oid
affected_database(Node *statement)
{
	const char *name = NULL;
	Oid			database;

	switch (nodeTag(statement))
	{
		case T_DropdbStmt:
			name = ((DropdbStmt *) statement)->dbname;
			break;
		case T_CreatedbStmt:
			name = string_option(((CreatedbStmt *) statement)->options, "template");
			break;
		case T_AlterDatabaseStmt:
			if (string_option(((AlterDatabaseStmt *) statement)->options, "tablespace"))
				name = ((AlterDatabaseStmt *) statement)->dbname;
			break;
		case T_RenameStmt:
			if (((RenameStmt *) statement)->renameType == OBJECT_DATABASE)
				name = ((RenameStmt *) statement)->subname;
			break;
		default:
			break;
	}
	if (name == NULL)
		return InvalidOid;

	database = get_database_oid(name, true);
	if (!OidIsValid(database) || !payoutq_owns_database(database))
		return InvalidOid;
	return database;
}

static const char *
string_option(List *options, const char *name)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		if (strcmp(option->defname, name) == 0 && option->arg)
			return defGetString(option);
	}
	return NULL;
}

static bool
drops_extension(Node *statement)
{
	ListCell   *cell;

	if (!IsA(statement, DropStmt) || ((DropStmt *) statement)->removeType != OBJECT_EXTENSION)
		return false;
	foreach(cell, ((DropStmt *) statement)->objects)
		if (strcmp(strVal(lfirst(cell)), "payoutq") == 0)
			return true;
	return false;
}

/* Returns the state to be restored. */
static DatabaseState
hold_off_workers(Oid database)
{
	DatabaseState state = DATABASE_FREE;
	DatabaseSlot *slot;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, false);
	if (slot)
	{
		state = slot->state;
		slot->state = DATABASE_STOPPED;
	}
	LWLockRelease(payoutq_shared->lock);

	for (int waited = 0; signal_workers(database) && waited < STOP_TIMEOUT_MS; waited += STOP_POLL_MS)
	{
		static uint32 event = 0;

		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 STOP_POLL_MS, payoutq_wait_event(&event, "PayoutqStopWorkers"));
		ResetLatch(MyLatch);
	}
	return state;
}

static void
let_workers_in(Oid database, DatabaseState state)
{
	DatabaseSlot *slot;

	if (!OidIsValid(database))
		return;

	LWLockAcquire(payoutq_shared->lock, LW_EXCLUSIVE);
	slot = payoutq_database_slot(database, false);
	if (slot)
	{
		slot->state = state;
		slot->failures = 0;
		slot->start_after = 0;
	}
	payoutq_shared->rescan = true;
	LWLockRelease(payoutq_shared->lock);
	payoutq_wake_launcher();
}

/* Ask the workers of the database to end.  Returns false when none is left. */
static bool
signal_workers(Oid database)
{
	bool		found = false;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	for (int i = 0; i < PAYOUTQ_SLOTS; i++)
	{
		WorkerSlot *worker = &payoutq_shared->workers[i];

		if (worker->state == WORKER_FREE || worker->database != database)
			continue;
		found = true;
		if (worker->pid != 0)
			kill(worker->pid, SIGTERM);
	}
	LWLockRelease(payoutq_shared->lock);
	return found;
}
