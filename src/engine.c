/*
 * engine.c
 *		The rights, the settings and the statements with which the extension
 *		does its own work, whoever called it.
 *
 * payoutq_engine_enter() changes to the owner of the storage tables and pins
 * what a caller could have set against us; payoutq_engine_leave() puts it back,
 * and so does the end of the (sub)transaction after an error.  The turns of a
 * worker, which is a superuser and has set everything once, do without.
 *
 * Heavyweight locks, in the order in which they are taken:
 *
 *	extension	AccessShare in each transaction of the engine, so that DROP
 *				EXTENSION waits for it and not the other way round.
 *	job			Share by whoever pays one of its batches, Exclusive by whoever
 *				changes its state: once pause or cancel return, no batch of the
 *				job is being paid and none will be.
 *	challenge	Share by whoever stakes on it, Exclusive for a moment by whoever
 *				wants its row for himself (challenge.c).
 *	account		Exclusive by whoever takes money from a system account, whose
 *				balance is derived and so has no row to lock.
 *	rows		the batch, then accounts in order of user_id, then progress.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "tcop/pquery.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "payoutq.h"

/* Advisory locks of applications have 1 or 2 in the fourth field. */
#define LOCK_SPACE_JOB		0x7071
#define LOCK_SPACE_ACCOUNT	0x7072
#define LOCK_SPACE_ATTEMPT	0x7073
#define LOCK_SPACE_CHALLENGE	0x7074

/*
 * A transaction may stake on more challenges than the lock table has room for,
 * so that each of these locks is that of many.  Then one waits for nothing.
 */
#define CHALLENGE_LOCKS		1024

static Oid	storage_owner(void);
static Oid	find_extension(char *version);
static bool is_older(const char *a, const char *b);
static void check_result(const EngineStatement *statement, int expected, int rc);
static void set_setting(const char *name, const char *value, GucAction action);
static void set_engine_settings(GucAction action);
static LOCKTAG attempt_tag(int64 job_id, int32 batch_no);
static LOCKTAG lock_tag(uint16 space, uint64 key);

PG_FUNCTION_INFO_V1(payoutq_lock_job_sql);
PG_FUNCTION_INFO_V1(payoutq_origin_sql);

void
payoutq_engine_enter(EngineState *state)
{
	GetUserIdAndSecContext(&state->user_id, &state->sec_context);
	state->guc_level = NewGUCNestLevel();
	SetUserIdAndSecContext(storage_owner(),
						   state->sec_context | SECURITY_LOCAL_USERID_CHANGE);
	set_engine_settings(GUC_ACTION_SAVE);
}

/* Also undoes what somebody else's code has SET meanwhile. */
void
payoutq_engine_leave(EngineState *state)
{
	AtEOXact_GUC(false, state->guc_level);
	SetUserIdAndSecContext(state->user_id, state->sec_context);
}

/*
 * Code of somebody else (a query, triggers of a bound table) runs between these
 * two, as that role in a security-restricted operation, and nothing that it SETs
 * outlives it.
 */
void
payoutq_foreign_enter(EngineState *state, Oid role)
{
	GetUserIdAndSecContext(&state->user_id, &state->sec_context);
	state->guc_level = NewGUCNestLevel();
	SetUserIdAndSecContext(role, state->sec_context | SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_RESTRICTED_OPERATION);
}

void
payoutq_foreign_leave(EngineState *state)
{
	payoutq_engine_leave(state);
}

/*
 * Deferred constraints of tables that code of others changes would be checked at
 * the commit, as nobody's; the server refuses that in a restricted operation.  So
 * they are checked at once.  Only in a transaction of the engine, before it does
 * anything: one of a user may have other events pending.
 */
void
payoutq_make_constraints_immediate(void)
{
	AfterTriggerSetState(makeNode(ConstraintsSetStmt));
}

static void
enter_turn(EngineState *state)
{
	/* As the caller still: a procedure that calls us may have deferred something. */
	payoutq_make_constraints_immediate();
	if (payoutq_is_worker)
	{
		GetUserIdAndSecContext(&state->user_id, &state->sec_context);
		state->guc_level = NewGUCNestLevel();
	}
	else
	{
		/* Money is durable when its transaction has committed. */
		if (synchronous_commit < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
			set_setting("synchronous_commit", "on", GUC_ACTION_LOCAL);
		payoutq_engine_enter(state);
	}
	MemoryContextSwitchTo(state->context);
}

/*
 * A turn of the engine: SPI connected, in the caller's transaction, and what is
 * allocated lives until the caller resets the context, through all commits.
 */
void
payoutq_turn_begin(EngineState *state, MemoryContext context)
{
	state->context = context;
	if (payoutq_is_worker)
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		SPI_connect();
	}
	else
		SPI_connect_ext(SPI_OPT_NONATOMIC);
	enter_turn(state);
}

/*
 * Commit, and go on in a new transaction.  SPI_commit() needs the portal of a
 * CALL, which a worker has not.
 */
void
payoutq_turn_commit(EngineState *state)
{
	payoutq_engine_leave(state);
	if (payoutq_is_worker)
	{
		SPI_finish();
		PopActiveSnapshot();
		CommitTransactionCommand();
		StartTransactionCommand();
		PushActiveSnapshot(GetTransactionSnapshot());
		SPI_connect();
	}
	else
	{
		SPI_commit();

		/* Row locks make us exact; a higher level would only fail more often. */
		if (XactIsoLevel != XACT_READ_COMMITTED)
			set_setting("transaction_isolation", "read committed", GUC_ACTION_SET);

		/* As a worker has: we do not only write through SPI. */
		EnsurePortalSnapshotExists();
	}
	enter_turn(state);
}

/* Commit, and leave the caller in a new transaction. */
void
payoutq_turn_end(EngineState *state)
{
	payoutq_turn_commit(state);
	payoutq_engine_leave(state);
	SPI_finish();
	if (payoutq_is_worker)
		PopActiveSnapshot();
	MemoryContextSwitchTo(state->context);
}

/* For a worker: once, and again when the configuration was read again. */
void
payoutq_engine_settings_for_process(void)
{
	set_engine_settings(GUC_ACTION_SET);
	if (synchronous_commit < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
		set_setting("synchronous_commit", "on", GUC_ACTION_SET);
}

static void
set_setting(const char *name, const char *value, GucAction action)
{
	(void) set_config_option(name, value, PGC_SUSET, PGC_S_SESSION, action,
							 true, ERROR, false);
}

/* Until the engine is left, or the (sub)transaction ends. */
void
payoutq_set_local(const char *name, const char *value)
{
	set_setting(name, value, GUC_ACTION_SAVE);
}

/*
 * Plans must not depend on statistics: a table that was just loaded and never
 * analysed must be paid as fast as any other.  Each of our statements has one
 * good plan, a nested loop over indexes, and these settings leave no other.
 */
static void
set_engine_settings(GucAction action)
{
	char		timeout[32];

	set_setting("search_path", "pg_catalog, pg_temp", action);
	set_setting("enable_hashjoin", "off", action);
	set_setting("enable_mergejoin", "off", action);
	set_setting("enable_seqscan", "off", action);
	set_setting("enable_bitmapscan", "off", action);
	set_setting("enable_material", "off", action);
	set_setting("jit", "off", action);

	/* Who wants to wait less, a session or a dispatcher that records, does so. */
	if (action == GUC_ACTION_SAVE && LockTimeout > 0 && LockTimeout < payoutq_lock_timeout)
		return;
	snprintf(timeout, sizeof(timeout), "%d", payoutq_lock_timeout);
	set_setting("lock_timeout", timeout, action);
}

static Oid
storage_owner(void)
{
	Oid			relid = get_relname_relid("job", get_namespace_oid("payoutq", true));
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"payoutq\" does not exist in this database"),
				 errhint("Run CREATE EXTENSION payoutq.")));

	owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
	ReleaseSysCache(tuple);
	return owner;
}

/*
 * Run one of our statements; its plan is made once a process and kept.
 * Returns the number of rows processed.  Unlike SPI itself, leaves the memory
 * context alone.
 */
uint64
payoutq_execute(EngineStatement *statement, Datum *values, const char *nulls,
				int expected)
{
	MemoryContext caller = CurrentMemoryContext;

	check_result(statement, expected,
				 SPI_execute_plan(payoutq_plan(statement), values, nulls, false, 0));
	MemoryContextSwitchTo(caller);
	return SPI_processed;
}

/* A SELECT that sees what is committed now, at any isolation level. */
uint64
payoutq_select_latest(EngineStatement *statement, Datum *values)
{
	MemoryContext caller = CurrentMemoryContext;

	check_result(statement, SPI_OK_SELECT,
				 SPI_execute_snapshot(payoutq_plan(statement), values, NULL, GetLatestSnapshot(),
									  InvalidSnapshot, true, false, 0));
	MemoryContextSwitchTo(caller);
	return SPI_processed;
}

/* Made once a process, and kept. */
SPIPlanPtr
payoutq_plan(EngineStatement *statement)
{
	SPIPlanPtr	plan = statement->plan;

	if (plan)
		return plan;
	plan = SPI_prepare_cursor(statement->sql, statement->nargs, statement->argtypes,
							  CURSOR_OPT_GENERIC_PLAN);
	if (plan == NULL)
		elog(ERROR, "could not prepare \"%s\": %s", statement->sql,
			 SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	statement->plan = plan;
	return plan;
}

static void
check_result(const EngineStatement *statement, int expected, int rc)
{
	if (rc != expected)
		elog(ERROR, "unexpected result of \"%s\": %s", statement->sql,
			 SPI_result_code_string(rc));
}

Datum
payoutq_result(int row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc,
						 column, isnull);
}

/* 0 for null */
int64
payoutq_result_int64(int row, int column)
{
	bool		isnull;
	Datum		value = payoutq_result(row, column, &isnull);

	if (isnull)
		return 0;
	return SPI_gettypeid(SPI_tuptable->tupdesc, column) == INT4OID ?
		DatumGetInt32(value) : DatumGetInt64(value);
}

char *
payoutq_result_cstring(int row, int column)
{
	return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column);
}

/*
 * Hold off DROP EXTENSION until the end of the transaction.  Returns false
 * when the extension is not there, was dropped while we waited, or is of another
 * version than we are.
 */
bool
payoutq_lock_extension(void)
{
	char		version[NAMEDATALEN];
	Oid			extension = find_extension(version);

	if (!OidIsValid(extension))
		return false;
	LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
	return find_extension(version) == extension && strcmp(version, PAYOUTQ_VERSION) == 0;
}

/*
 * The extension, and the version of its SQL in this database (NAMEDATALEN bytes).
 * Nothing tells us when that changes, so we look each time, which costs what
 * get_extension_oid() costs.
 */
static Oid
find_extension(char *version)
{
	Relation	relation = table_open(ExtensionRelationId, AccessShareLock);
	Oid			extension = InvalidOid;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		isnull;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum("payoutq"));
	scan = systable_beginscan(relation, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		Datum		value = heap_getattr(tuple, Anum_pg_extension_extversion,
										 RelationGetDescr(relation), &isnull);

		extension = ((Form_pg_extension) GETSTRUCT(tuple))->oid;
		text_to_cstring_buffer(DatumGetTextPP(value), version, NAMEDATALEN);
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return extension;
}

/*
 * Say what to do when the SQL in this database is of another version than this
 * library, which expects its own tables and functions.  Returns false when it
 * is of the same, or is not there at all.  Scripts of extensions are let through:
 * one may be on the way from here to there.
 */
bool
payoutq_complain_of_version(int elevel)
{
	char		version[NAMEDATALEN];

	if (creating_extension || !OidIsValid(find_extension(version)) ||
		strcmp(version, PAYOUTQ_VERSION) == 0)
		return false;

	ereport(elevel,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("extension \"payoutq\" has version %s in database \"%s\", but its library has version %s",
					version, get_database_name(MyDatabaseId), PAYOUTQ_VERSION),
			 is_older(version, PAYOUTQ_VERSION) ?
			 errhint("Run ALTER EXTENSION payoutq UPDATE.") :
			 errhint("Install the library of version %s, and restart the server.", version)));
	return true;
}

/* As numbers: 1.0.9 is older than 1.0.10. */
static bool
is_older(const char *a, const char *b)
{
	int			x[3] = {0};
	int			y[3] = {0};

	(void) sscanf(a, "%d.%d.%d", &x[0], &x[1], &x[2]);
	(void) sscanf(b, "%d.%d.%d", &y[0], &y[1], &y[2]);
	for (int i = 0; i < 3; i++)
		if (x[i] != y[i])
			return x[i] < y[i];
	return false;
}

/* The same without waiting: false, too, while somebody is dropping it. */
bool
payoutq_try_lock_extension(void)
{
	Oid			extension = get_extension_oid("payoutq", true);
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, ExtensionRelationId, extension, 0);
	return OidIsValid(extension) &&
		LockAcquire(&tag, AccessShareLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

bool
payoutq_lock_job(int64 job_id, LOCKMODE mode, bool wait)
{
	LOCKTAG		tag = lock_tag(LOCK_SPACE_JOB, (uint64) job_id);

	return LockAcquire(&tag, mode, false, !wait) != LOCKACQUIRE_NOT_AVAIL;
}

/* Until the end of the transaction, or until it is left as often. */
void
payoutq_enter_challenge(int64 challenge_id, LOCKMODE mode)
{
	LOCKTAG		tag = lock_tag(LOCK_SPACE_CHALLENGE, (uint64) challenge_id % CHALLENGE_LOCKS);

	(void) LockAcquire(&tag, mode, false, false);
}

void
payoutq_leave_challenge(int64 challenge_id, LOCKMODE mode)
{
	LOCKTAG		tag = lock_tag(LOCK_SPACE_CHALLENGE, (uint64) challenge_id % CHALLENGE_LOCKS);

	(void) LockRelease(&tag, mode, false);
}

/* Two accounts may share a lock; then one waits for nothing. */
void
payoutq_lock_account(const char *account, const char *currency)
{
	char	   *name = psprintf("%s %s", currency, account);
	uint64		hash = hash_bytes_extended((const unsigned char *) name, strlen(name), 0);
	LOCKTAG		tag = lock_tag(LOCK_SPACE_ACCOUNT, hash);

	(void) LockAcquire(&tag, ExclusiveLock, false, false);
}

/*
 * Kept over the commit between the count of an attempt and the second claim of
 * its batch, and released by a crash.  Never waited for.
 */
bool
payoutq_lock_attempt(int64 job_id, int32 batch_no)
{
	LOCKTAG		tag = attempt_tag(job_id, batch_no);

	return LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
}

void
payoutq_unlock_attempt(int64 job_id, int32 batch_no)
{
	LOCKTAG		tag = attempt_tag(job_id, batch_no);

	(void) LockRelease(&tag, ExclusiveLock, true);
}

static LOCKTAG
attempt_tag(int64 job_id, int32 batch_no)
{
	return lock_tag(LOCK_SPACE_ATTEMPT,
					hash_combine64(hash_bytes_uint32_extended((uint32) batch_no, 0), (uint64) job_id));
}

static LOCKTAG
lock_tag(uint16 space, uint64 key)
{
	LOCKTAG		tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, (uint32) (key >> 32), (uint32) key, space);
	return tag;
}

/*
 * Where a job was created.  A row that says otherwise came in with a restore,
 * and is not paid before the books that came with it balance.
 */
char *
payoutq_origin(void)
{
	return psprintf(UINT64_FORMAT "/%u/%u", GetSystemIdentifier(),
					MyDatabaseId, get_extension_oid("payoutq", true));
}

Datum
payoutq_lock_job_sql(PG_FUNCTION_ARGS)
{
	(void) payoutq_complain_of_version(ERROR);
	(void) payoutq_lock_job(PG_GETARG_INT64(0), ExclusiveLock, true);
	PG_RETURN_VOID();
}

Datum
payoutq_origin_sql(PG_FUNCTION_ARGS pg_attribute_unused())
{
	PG_RETURN_TEXT_P(cstring_to_text(payoutq_origin()));
}
