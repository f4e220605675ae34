/*
 * utility.c
 *		Get out of the way of commands on databases, notice DROP and ALTER
 *		EXTENSION, and refuse to drop it while there are books to lose, and to
 *		drop a provider, or make it another kind, while it is sent to.
 *
 * An idle worker is a connection, and DROP DATABASE, CREATE DATABASE ... TEMPLATE,
 * RENAME and SET TABLESPACE want none.  Before them, for whoever may do them, the
 * workers of that database are ended and kept from coming back until the
 * transaction has ended.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/value.h"
#include "storage/latch.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "payoutq.h"

/* The server itself waits five seconds for others to leave. */
#define STOP_TIMEOUT_MS		5000
#define STOP_POLL_MS		5

static ProcessUtility_hook_type next_hook = NULL;
static object_access_hook_type next_object_access_hook = NULL;

static void payoutq_process_utility(PlannedStmt *pstmt, const char *queryString,
									bool readOnlyTree, ProcessUtilityContext context,
									ParamListInfo params, QueryEnvironment *queryEnv,
									DestReceiver *dest, QueryCompletion *qc);
static void refuse_to_rename_provider(Node *statement);
static void refuse_to_change_kind(Node *statement);
static const char *kind_of(Oid provider);
static Oid	affected_database(Node *statement);
static const char *string_option(List *options, const char *name);
static bool changes_extension(Node *statement);
static void object_access(ObjectAccessType access, Oid classId, Oid objectId,
						  int subId, void *arg);
static void refuse_to_drop_books(void);
static void refuse_to_drop_provider(const char *name);
static bool is_sent_to(const char *provider);
static bool is_provider(Oid server);
static void hold_off_workers(Oid database);

/* Also without shared_preload_libraries, in sessions that have called us. */
void
payoutq_install_drop_hook(void)
{
	next_object_access_hook = object_access_hook;
	object_access_hook = object_access;
}

/*
 * Whatever drops the extension (also DROP SCHEMA, DROP OWNED) comes here with the
 * ledger's table, before anything of it is gone.
 */
static void
object_access(ObjectAccessType access, Oid classId, Oid objectId, int subId, void *arg)
{
	if (next_object_access_hook)
		next_object_access_hook(access, classId, objectId, subId, arg);
	if (access == OAT_DROP && classId == RelationRelationId && subId == 0 && !payoutq_allow_drop &&
		objectId == get_relname_relid("movement", get_namespace_oid("payoutq", true)))
		refuse_to_drop_books();
	if (access == OAT_DROP && classId == ForeignServerRelationId && !payoutq_allow_drop && is_provider(objectId))
		refuse_to_drop_provider(GetForeignServer(objectId)->servername);
}

static bool
is_provider(Oid server)
{
	return strcmp(GetForeignDataWrapper(GetForeignServer(server)->fdwid)->fdwname, "payout_provider") == 0;
}

/* They would wait for ever, with the money of their users. */
static void
refuse_to_drop_provider(const char *name)
{
	Oid			schema = get_namespace_oid("payoutq", true);

	/* All of the extension is being dropped, which refuse_to_drop_books() sees to. */
	if (!OidIsValid(get_relname_relid("transfer", schema)) || !OidIsValid(get_relname_relid("job", schema)))
		return;
	if (is_sent_to(name))
		ereport(ERROR,
				(errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
				 errmsg("cannot drop provider \"%s\" because it has jobs or transfers that have not ended", name),
				 errhint("Let them end, or cancel the jobs; payout_jobs and payout_transfers show them.")));
}

/*
 * A job that has not ended has transfers to come, also a failed one: it can be
 * retried.  A transfer can outlast its job, which was cancelled.
 */
static bool
is_sent_to(const char *provider)
{
	static EngineStatement find = {
		"SELECT FROM payoutq.transfer t WHERE t.provider = $1"
		"   AND t.status NOT IN ('completed', 'failed_terminal', 'confirmation_failed')"
		" UNION ALL SELECT FROM payoutq.job j WHERE j.provider = $1"
		"   AND j.status NOT IN ('completed', 'cancelled') LIMIT 1",
		1, {TEXTOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(provider)};
	EngineState state;
	bool		found;

	SPI_connect();
	payoutq_engine_enter(&state);
	found = payoutq_select_latest(&find, values) > 0;
	payoutq_engine_leave(&state);
	SPI_finish();
	return found;
}

static void
refuse_to_drop_books(void)
{
	static const char *const any = "SELECT FROM payoutq.movement LIMIT 1";
	bool		found;

	SPI_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
	found = SPI_execute(any, true, 1) == SPI_OK_SELECT && SPI_processed > 0;
	PopActiveSnapshot();
	SPI_finish();
	if (found)
		ereport(ERROR,
				(errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
				 errmsg("cannot drop extension payoutq because its ledger has entries"),
				 errdetail("Balances and the history of all payments would be lost."),
				 errhint("Make a backup, then SET payoutq.allow_drop = on.")));
}

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
	Oid			database = affected_database(pstmt->utilityStmt);

	if (OidIsValid(database))
		hold_off_workers(database);
	refuse_to_rename_provider(pstmt->utilityStmt);
	refuse_to_change_kind(pstmt->utilityStmt);
	if (IsA(pstmt->utilityStmt, CreatedbStmt))
		payoutq_rescan_at_commit();

	/* Workers see that the extension is gone or another, and leave, or come. */
	if (changes_extension(pstmt->utilityStmt))
		payoutq_wake_at_commit();

	next_hook(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
}

static void
refuse_to_rename_provider(Node *statement)
{
	RenameStmt *rename = (RenameStmt *) statement;
	Oid			server;

	if (!IsA(statement, RenameStmt) || rename->renameType != OBJECT_FOREIGN_SERVER)
		return;
	server = get_foreign_server_oid(strVal(rename->object), true);
	if (OidIsValid(server) && is_provider(server))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot rename provider \"%s\"", strVal(rename->object)),
				 errdetail("Its transfers, destinations and accounts go by its name.")));
}

/* What was asked of one kind must not be answered by another. */
static void
refuse_to_change_kind(Node *statement)
{
	AlterForeignServerStmt *alter = (AlterForeignServerStmt *) statement;
	Oid			server;
	const char *kind;

	if (!IsA(statement, AlterForeignServerStmt) || (kind = string_option(alter->options, "kind")) == NULL)
		return;
	server = get_foreign_server_oid(alter->servername, true);
	if (OidIsValid(server) && is_provider(server) && payoutq_owns_server(server) &&
		strcmp(kind, kind_of(server)) != 0 && is_sent_to(alter->servername))
		ereport(ERROR,
				(errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
				 errmsg("cannot change the kind of provider \"%s\" because it has jobs or transfers that have not ended",
						alter->servername),
				 errdetail("Answers to what was sent would be read as those of the other kind."),
				 errhint("Let them end, or cancel the jobs; payout_jobs and payout_transfers show them.")));
}

static const char *
kind_of(Oid provider)
{
	return string_option(GetForeignServer(provider)->options, "kind");
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
changes_extension(Node *statement)
{
	ListCell   *cell;

	if (IsA(statement, AlterExtensionStmt))
		return strcmp(((AlterExtensionStmt *) statement)->extname, "payoutq") == 0;
	if (!IsA(statement, DropStmt) || ((DropStmt *) statement)->removeType != OBJECT_EXTENSION)
		return false;
	foreach(cell, ((DropStmt *) statement)->objects)
		if (strcmp(strVal(lfirst(cell)), "payoutq") == 0)
			return true;
	return false;
}

/* Until the end of the transaction, however it ends. */
static void
hold_off_workers(Oid database)
{
	payoutq_hold_database(database);
	for (int waited = 0; payoutq_signal_workers(database) > 0 && waited < STOP_TIMEOUT_MS; waited += STOP_POLL_MS)
	{
		static uint32 event = 0;

		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 STOP_POLL_MS, payoutq_wait_event(&event, "PayoutqStopWorkers"));
		ResetLatch(MyLatch);
	}
}
