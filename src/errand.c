/*
 * errand.c
 *		payoutq.execute_in(): run a statement in another database of the server.
 *
 * pg_cron keeps its jobs in one database.  A process that is started for the
 * purpose connects there, without authentication, as the owner of the
 * extension; command and answer are handed over in a dynamic shared memory
 * segment.  Only the extension's own functions call it.
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
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
static void put_text(Errand *errand, const char *text);

PG_FUNCTION_INFO_V1(payoutq_execute_in);

/* payoutq.execute_in(database, command) */
Datum
payoutq_execute_in(PG_FUNCTION_ARGS)
{
	char	   *database = text_to_cstring(PG_GETARG_TEXT_PP(0));
	char	   *command = text_to_cstring(PG_GETARG_TEXT_PP(1));
	dsm_segment *segment = dsm_create(ERRAND_SIZE, 0);
	Errand	   *errand = dsm_segment_address(segment);
	BackgroundWorkerHandle *handle;
	char	   *text;

	memset(errand, 0, offsetof(Errand, text));
	namestrcpy(&errand->database, database);
	namestrcpy(&errand->role, GetUserNameFromId(GetUserId(), false));
	put_text(errand, command);

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

	text = pstrdup(errand->text);
	if (errand->outcome == ERRAND_NONE)
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not connect to database \"%s\"", database),
				 errdetail("The server's log says why."),
				 errhint("Run there: %s", command)));
	if (errand->outcome == ERRAND_FAILED)
		ereport(ERROR,
				(errcode(errand->sqlstate),
				 errmsg("%s", text),
				 errcontext("in database \"%s\"", database)));
	if (errand->isnull)
		PG_RETURN_NULL();
	dsm_detach(segment);
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

	BackgroundWorkerInitializeConnection(NameStr(errand->database), NameStr(errand->role), 0);
	SetConfigOption("search_path", "pg_catalog, pg_temp", PGC_SUSET, PGC_S_OVERRIDE);
	run(errand);
	proc_exit(0);
}

static void
run(Errand *errand)
{
	MemoryContext context = CurrentMemoryContext;
	char	   *command = MemoryContextStrdup(TopMemoryContext, errand->text);

	PG_TRY();
	{
		char	   *answer = NULL;

		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		PushActiveSnapshot(GetTransactionSnapshot());
		pgstat_report_activity(STATE_RUNNING, command);
		SPI_connect();
		if (SPI_execute(command, false, 1) < 0)
			elog(ERROR, "could not run \"%s\"", command);
		if (SPI_processed > 0)
			answer = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
		errand->isnull = answer == NULL;
		put_text(errand, answer ? answer : "");
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
		FlushErrorState();
		AbortCurrentTransaction();
		errand->sqlstate = error->sqlerrcode;
		put_text(errand, error->message);
		errand->outcome = ERRAND_FAILED;
	}
	PG_END_TRY();
}

static void
put_text(Errand *errand, const char *text)
{
	if (strlen(text) >= MAX_TEXT)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("statement or answer is too long")));
	strcpy(errand->text, text);
}
