/*
 * wait.c
 *		payout_wait_for_job(): wait until a job is finished.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

/* With preload the end of a job wakes us; a restart of it may be missed. */
#define WOKEN_RECHECK_MS	1000
#define POLL_MS				20

static char *read_status(int64 job_id);
static bool is_finished(const char *status);
static void wait_for_announcement(long timeout);

PG_FUNCTION_INFO_V1(payout_wait_for_job);

/* (job_id bigint, timeout interval): its status, finished or not, at the latest then */
Datum
payout_wait_for_job(PG_FUNCTION_ARGS)
{
	int64		job_id = PG_GETARG_INT64(0);
	TimestampTz end = DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
															  TimestampTzGetDatum(GetCurrentTimestamp()),
															  PG_GETARG_DATUM(1)));
	char	   *status;

	payoutq_require_job(job_id);
	if (payoutq_shared)
		ConditionVariablePrepareToSleep(&payoutq_shared->announced);
	for (;;)
	{
		long		left;

		CHECK_FOR_INTERRUPTS();
		status = read_status(job_id);
		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end);
		if (is_finished(status) || left <= 0)
			break;
		wait_for_announcement(left);
	}
	ConditionVariableCancelSleep();
	PG_RETURN_TEXT_P(cstring_to_text(status));
}

static void
wait_for_announcement(long timeout)
{
	static uint32 event = 0;
	uint32		wait_event = payoutq_wait_event(&event, "PayoutqWaitForJob");

	if (payoutq_shared)
		(void) ConditionVariableTimedSleep(&payoutq_shared->announced,
										   Min(timeout, WOKEN_RECHECK_MS), wait_event);
	else
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Min(timeout, POLL_MS), wait_event);
		ResetLatch(MyLatch);
	}
}

static char *
read_status(int64 job_id)
{
	static EngineStatement find = {
		"SELECT status FROM payoutq.job WHERE id = $1", 1, {INT8OID}, NULL
	};
	MemoryContext caller = CurrentMemoryContext;
	Datum		values[] = {Int64GetDatum(job_id)};
	EngineState state;
	char	   *status;

	SPI_connect();
	payoutq_engine_enter(&state);
	if (payoutq_select_latest(&find, values) != 1)
		elog(ERROR, "job " INT64_FORMAT " has vanished", job_id);
	status = MemoryContextStrdup(caller, payoutq_result_cstring(0, 1));
	payoutq_engine_leave(&state);
	SPI_finish();
	return status;
}

static bool
is_finished(const char *status)
{
	return strcmp(status, "completed") == 0 || strcmp(status, "failed") == 0 ||
		strcmp(status, "cancelled") == 0;
}
