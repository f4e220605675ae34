/*
 * errand.c
 *		payoutq.execute_in(): run a statement in another database of the server;
 *		and payout_schedule(), for which it is.
 *
 * pg_cron keeps its jobs in one database.  A process that is started for the
 * purpose connects there, without authentication, as the owner of the
 * extension; command and answer are handed over in a dynamic shared memory
 * segment.  Only the extension's own functions call it.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "payoutq.h"

#define ERRAND_SIZE		(256 * 1024)

typedef enum ErrandOutcome
{
	ERRAND_NONE = 0,			/* the process ended before */
	ERRAND_ANSWERED,
	ERRAND_FAILED
} ErrandOutcome;

typedef struct Errand
{
	NameData	database;
	NameData	role;
	ErrandOutcome outcome;
	int			sqlstate;
	bool		isnull;
	char		text[FLEXIBLE_ARRAY_MEMBER];	/* the command, then the answer or the error */
} Errand;

#define MAX_TEXT	(ERRAND_SIZE - offsetof(Errand, text))

static BackgroundWorkerHandle *start_errand(dsm_segment *segment);
static void run(Errand *errand);
static bool put_text(Errand *errand, const char *text);

PG_FUNCTION_INFO_V1(payoutq_execute_in);
PG_FUNCTION_INFO_V1(payout_schedule);

/* payoutq.execute_in(database, command) */
Datum
payoutq_execute_in(PG_FUNCTION_ARGS)
{
	char	   *database = text_to_cstring(PG_GETARG_TEXT_PP(0));
	char	   *command = text_to_cstring(PG_GETARG_TEXT_PP(1));
	dsm_segment *segment;
	Errand	   *errand;
	BackgroundWorkerHandle *handle;
	ErrandOutcome outcome;
	int			sqlstate;
	bool		isnull;
	char	   *text;

	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a standby does not work in other databases")));

	segment = dsm_create(ERRAND_SIZE, 0);
	errand = dsm_segment_address(segment);
	memset(errand, 0, offsetof(Errand, text));
	namestrcpy(&errand->database, database);
	namestrcpy(&errand->role, GetUserNameFromId(GetUserId(), false));
	if (!put_text(errand, command))
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("statement is too long")));

	handle = start_errand(segment);
	PG_TRY();
	{
		(void) WaitForBackgroundWorkerShutdown(handle);
	}
	PG_CATCH();
	{
		TerminateBackgroundWorker(handle);
		PG_RE_THROW();
	}
	PG_END_TRY();

	outcome = errand->outcome;
	sqlstate = errand->sqlstate;
	isnull = errand->isnull;
	text = pg_any_to_server(errand->text, strlen(errand->text), PG_UTF8);
	text = text == errand->text ? pstrdup(text) : text;
	dsm_detach(segment);

	if (outcome == ERRAND_NONE)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not work in database \"%s\"", database),
				 errdetail("The server's log says why."),
				 errhint("Mend that, or call the function in database \"%s\".", database)));
	if (outcome == ERRAND_FAILED)
		ereport(ERROR,
				(errcode(sqlstate),
				 errmsg("%s", text),
				 errcontext("in database \"%s\"", database)));
	if (isnull)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(text));
}

static BackgroundWorkerHandle *
start_errand(dsm_segment *segment)
{
	BackgroundWorker worker = {0};
	BackgroundWorkerHandle *handle;

	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = UInt32GetDatum(dsm_segment_handle(segment));
	strlcpy(worker.bgw_library_name, "payoutq", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "payoutq_errand_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "payoutq errand", sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "payoutq errand", sizeof(worker.bgw_type));

	if (!RegisterDynamicBackgroundWorker(&worker, &handle))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start a process to work in another database"),
				 errhint("You might need to increase max_worker_processes.")));
	return handle;
}

/* A failure to connect ends the process here, which is the answer. */
void
payoutq_errand_main(Datum arg)
{
	dsm_segment *segment;
	Errand	   *errand;

	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	CurrentResourceOwner = ResourceOwnerCreate(NULL, "payoutq errand");
	segment = dsm_attach(DatumGetUInt32(arg));
	if (segment == NULL)
		proc_exit(0);
	dsm_pin_mapping(segment);
	errand = dsm_segment_address(segment);

	BackgroundWorkerInitializeConnection(NameStr(errand->database), NULL, 0);
	SetConfigOption("search_path", "pg_catalog, pg_temp", PGC_SUSET, PGC_S_OVERRIDE);
	run(errand);
	proc_exit(0);
}

static void
run(Errand *errand)
{
	MemoryContext context = CurrentMemoryContext;
	char	   *command = pg_any_to_server(errand->text, strlen(errand->text), PG_UTF8);

	command = MemoryContextStrdup(TopMemoryContext, command);
	PG_TRY();
	{
		char	   *answer = NULL;

		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();

		/* Not the role of the connection: it need not be allowed to log in. */
		SetUserIdAndSecContext(get_role_oid(NameStr(errand->role), false), SECURITY_LOCAL_USERID_CHANGE);
		PushActiveSnapshot(GetTransactionSnapshot());
		pgstat_report_activity(STATE_RUNNING, command);
		SPI_connect();
		if (SPI_execute(command, false, 1) < 0)
			elog(ERROR, "could not run \"%s\"", command);
		if (SPI_processed > 0)
			answer = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
		errand->isnull = answer == NULL;
		if (!put_text(errand, answer ? answer : ""))
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("answer is too long")));
		SPI_finish();
		PopActiveSnapshot();
		CommitTransactionCommand();
		errand->outcome = ERRAND_ANSWERED;
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		EmitErrorReport();
		FlushErrorState();
		AbortCurrentTransaction();
		errand->sqlstate = error->sqlerrcode;
		if (!put_text(errand, error->message))
			(void) put_text(errand, "error message is too long");
		errand->outcome = ERRAND_FAILED;
	}
	PG_END_TRY();
}

/* In UTF-8: databases may differ in their encoding.  False: it is too long. */
static bool
put_text(Errand *errand, const char *text)
{
	char	   *utf8 = pg_server_to_any(text, strlen(text), PG_UTF8);

	return strlcpy(errand->text, utf8, MAX_TEXT) < MAX_TEXT;
}

/*
 * payout_schedule(process, deadlines, notifications, maintenance): in C, because
 * who calls is known here only, and the jobs are to run as him.
 */
Datum
payout_schedule(PG_FUNCTION_ARGS)
{
	static EngineStatement schedule = {
		"SELECT payoutq.schedule($1, $2, $3, $4, $5)::bigint", 5,
		{TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(GetUserNameFromId(GetUserId(), false)), 0, 0, 0, 0};
	char		nulls[] = "     ";
	EngineState state;
	int64		jobs;

	for (int i = 0; i < 4; i++)
	{
		values[i + 1] = PG_GETARG_DATUM(i);
		nulls[i + 1] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	(void) payoutq_complain_of_version(ERROR);
	SPI_connect();
	payoutq_engine_enter(&state);
	(void) payoutq_execute(&schedule, values, nulls, SPI_OK_SELECT);
	jobs = payoutq_result_int64(0, 1);
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_INT32((int32) jobs);
}
