/*
 * process.c
 *		The loop over batches, for a worker and for CALL payout_process().
 *
 * Both are in a transaction when they come here and when they return.  Each
 * turn serves one job and commits.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/pmsignal.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "payoutq.h"

/*
 * How old the list of jobs may get before it is read again; and if reading takes
 * long, because there are very many, so many times as old.
 */
#define REFRESH_MS		100
#define REFRESH_FACTOR	20

/* How long a job is left alone when it could not be expanded. */
#define EXPAND_WAIT_MS	1000

/* How long a job is left alone whose transfers are under way. */
#define FINISH_WAIT_MS	10000

/* The same when the outcome of a batch or of a query cannot be recorded. */
#define RECORD_WAIT_MS	5000

/* A batch that was begun so often without an outcome is left alone. */
#define MAX_CRASHES		3

/* All but the first few of those that fail are looked for all over the job. */
#define FIRST_FEW	5

/* How long it is left alone when others are still at it, so that it cannot be. */
#define STOP_WAIT_MS	1000

typedef struct Stop
{
	int64		job_id;
	const ErrorData *error;
	TimestampTz since;			/* when everything fails; or 0 */
} Stop;

static MemoryContext turn_context = NULL;

static bool begin_turn(EngineState *state);
static bool refresh(int64 only_job, bool woken);
static TimestampTz next_refresh(TimestampTz began);
static bool serve(ActiveJob *job, bool second, bool *tried);
static bool pay(ActiveJob *job, const Claim *claim, EngineState *state);
static bool begin_carefully(ActiveJob *job, const Claim *claim, EngineState *state, bool *tried);
static bool count_and_reclaim(ActiveJob *job, const Claim *claim, EngineState *state, bool *tried);
static void not_recorded(ActiveJob *job, const Claim *claim, const ErrorData *error);
static void note_failing(ActiveJob *job, const Claim *claim);
static void note_isolated(ActiveJob *job, const Claim *claim, const ErrorData *error, EngineState *state);
static void stop_job(ActiveJob *job, const ErrorData *error, TimestampTz since, EngineState *state);
static void stop(void *arg);

PG_FUNCTION_INFO_V1(payout_process);

/*
 * Work until nothing can be claimed, or max_batches were tried.  Returns how
 * many were.
 */
uint64
payoutq_process(uint64 max_batches, int64 only_job)
{
	static TimestampTz refresh_at = 0;
	static int64 refreshed_for = -1;
	static uint64 generation = 0;
	static bool rested = true;
	MemoryContext caller = CurrentMemoryContext;
	bool		just_refreshed = false;
	bool		wake = !payoutq_is_worker || (payoutq_shared == NULL && rested);
	uint64		batches = 0;

	if (turn_context == NULL)
		turn_context = AllocSetContextCreate(TopMemoryContext, "payoutq turn",
											 ALLOCSET_DEFAULT_SIZES);
	while (batches < max_batches)
	{
		uint64		newest = payoutq_wake_generation(MyDatabaseId);
		TimestampTz now = GetCurrentTimestamp();
		ActiveJob  *job = payoutq_next_job(now);
		bool		tried = false;

		CHECK_FOR_INTERRUPTS();

		/* While there is work nobody waits, and so nobody notices otherwise. */
		if (!PostmasterIsAlive())
			proc_exit(1);
		MemoryContextReset(turn_context);

		if ((job == NULL && !just_refreshed) || newest != generation ||
			refreshed_for != only_job || now >= refresh_at)
		{
			/* Whom nobody wakes looks at every job, but once: there may be many. */
			bool		woken = newest != generation || wake;

			/* What comes in while we read is seen the next time. */
			generation = newest;
			wake = false;
			refreshed_for = only_job;
			just_refreshed = true;
			if (!refresh(only_job, woken))
				break;
			refresh_at = next_refresh(now);
			continue;
		}
		if (job == NULL && payoutq_list_due_jobs())
		{
			just_refreshed = false;
			continue;
		}
		if (job == NULL || !serve(job, batches == 1, &tried))
			break;
		if (tried)
		{
			batches++;
			just_refreshed = false;
		}
	}

	rested = batches == 0;
	/* In a worker, the caller's went with his transaction. */
	MemoryContextSwitchTo(payoutq_is_worker ? CurTransactionContext : caller);
	return batches;
}

/*
 * Returns false, with the turn ended, when the extension was dropped or updated: a
 * worker finds that out for itself and leaves.
 */
static bool
begin_turn(EngineState *state)
{
	payoutq_turn_begin(state, turn_context);
	if (payoutq_lock_extension())
		return true;
	if (!payoutq_is_worker && !payoutq_complain_of_version(ERROR))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"payoutq\" does not exist in this database")));
	payoutq_turn_end(state);
	return false;
}

static bool
refresh(int64 only_job, bool woken)
{
	EngineState state;

	if (!begin_turn(&state))
		return false;
	payoutq_adopt_jobs();
	payoutq_call_callbacks();
	payoutq_refresh_jobs(only_job, woken);
	payoutq_turn_end(&state);
	return true;
}

static TimestampTz
next_refresh(TimestampTz began)
{
	TimestampTz now = GetCurrentTimestamp();

	return TimestampTzPlusMilliseconds(now, Max(REFRESH_MS, REFRESH_FACTOR *
												TimestampDifferenceMilliseconds(began, now)));
}

/*
 * One turn for one job.  second: one batch was tried before, so that a helper could
 * pay the next.  *tried: a batch of it was.
 */
static bool
serve(ActiveJob *job, bool second, bool *tried)
{
	EngineState state;
	Claim		claim;

	if (!begin_turn(&state))
		return false;

	payoutq_worker_serves(job->id);
	switch (payoutq_claim(job, &claim))
	{
		case WORK_BATCH:
			if (second && payoutq_is_worker)
				(void) payoutq_call_for_help(MyDatabaseId);
			payoutq_worker_report(WORKER_WORKING, claim.job_id, claim.batch_no);
			*tried = pay(job, &claim, &state);
			break;
		case WORK_EXPAND:
			/* Let somebody else pay meanwhile. */
			(void) payoutq_call_for_help(MyDatabaseId);
			payoutq_worker_report(WORKER_WORKING, job->id, 0);
			payoutq_turn_commit(&state);
			job->unexpanded = !payoutq_expand_job(job, &state);
			payoutq_worker_report(WORKER_IDLE, 0, 0);
			if (job->unexpanded)
				payoutq_leave_alone(job, job->careful > 0 ? EXPAND_WAIT_MS : RECORD_WAIT_MS);
			break;
		case WORK_FINISH:
			/* Give the job's Share lock back before its Exclusive one. */
			payoutq_turn_commit(&state);
			/* Whoever ends the last of its transfers wakes us, most often. */
			if (!payoutq_finish_job(job->id) && job->provider[0] != '\0')
				payoutq_leave_alone(job, FINISH_WAIT_MS);
			break;
		case WORK_NONE:
			break;
	}

	payoutq_turn_end(&state);
	payoutq_worker_serves(0);
	return true;
}

static bool
pay(ActiveJob *job, const Claim *claim, EngineState *state)
{
	ErrorData  *error = NULL;
	bool		tried = true;

	if ((claim->crashes > 0 || job->careful > 0) &&
		!begin_carefully(job, claim, state, &tried))
		return tried;

	switch (payoutq_pay_batch(claim, &error))
	{
		case BATCH_PAID:
			job->failing.since = 0;
			payoutq_worker_count(claim->last_seq - claim->first_seq + 1);
			break;
		case BATCH_WAITS:
			break;
		case BATCH_ENTRY_FAILED:
			note_failing(job, claim);
			if (claim->failures == 0)	/* another try tells nothing new */
				note_isolated(job, claim, error, state);
			break;
		case BATCH_SPLIT:
			note_failing(job, claim);
			payoutq_look_again(job, claim);
			break;
		case BATCH_JOB_FAILED:
			stop_job(job, error, 0, state);
			break;
		case BATCH_NOT_RECORDED:
			not_recorded(job, claim, error);
			return true;
		case BATCH_INTERRUPTED:
			payoutq_take_attempt_back(claim);
			payoutq_turn_commit(state);
			ReThrowError(error);
	}
	payoutq_attempt_ended();
	return true;
}

/*
 * A batch with a count is one that a crash has left, unless somebody is between
 * his count and his second claim: then he has the lock of the attempt.
 */
static bool
begin_carefully(ActiveJob *job, const Claim *claim, EngineState *state, bool *tried)
{
	volatile bool begun = false;

	*tried = false;
	if (!payoutq_lock_attempt(claim->job_id, claim->batch_no))
		return false;
	PG_TRY();
	{
		begun = count_and_reclaim(job, claim, state, tried);
	}
	PG_FINALLY();
	{
		payoutq_unlock_attempt(claim->job_id, claim->batch_no);
	}
	PG_END_TRY();
	return begun;
}

static bool
count_and_reclaim(ActiveJob *job, const Claim *claim, EngineState *state, bool *tried)
{
	ErrorData  *error;

	if (claim->crashes >= MAX_CRASHES)
	{
		payoutq_quarantine_batch(claim);
		*tried = true;
		return false;
	}
	if (job->careful == 0)
		return true;

	error = payoutq_count_attempt(claim);
	if (error)
	{
		not_recorded(job, claim, error);
		*tried = true;
		return false;
	}
	payoutq_turn_commit(state);
	if (!payoutq_lock_extension() || !payoutq_reclaim(claim))
	{
		payoutq_withdraw_attempt(claim);
		return false;
	}
	job->careful--;
	return true;
}

/* As on a full disk, which is no crash: the same batch is tried again. */
static void
not_recorded(ActiveJob *job, const Claim *claim, const ErrorData *error)
{
	ereport(WARNING,
			(errcode(error->sqlerrcode),
			 errmsg("batch %d of job " INT64_FORMAT " was not paid, and why could not be recorded: %s",
					claim->batch_no, claim->job_id, error->message),
			 error->hint ? errhint("%s", error->hint) : 0));
	payoutq_worker_error(error->message);
	if (!payoutq_forget_attempt())
		job->careful = 0;
	payoutq_look_again(job, claim);
	payoutq_leave_alone(job, RECORD_WAIT_MS);
}

static void
note_failing(ActiveJob *job, const Claim *claim)
{
	Failing    *f = &job->failing;

	if (claim->failures > 0 || claim->is_piece)
		return;
	if (f->since == 0)
		*f = (Failing) {.since = GetCurrentTimestamp()};
	f->first_seq[f->batches % MASS_FAILURE] = claim->first_seq;
	f->last_seq[f->batches % MASS_FAILURE] = claim->last_seq;
	f->batches++;
}

/*
 * What fails for everybody must not be bisected for everybody.  Pieces of older
 * batches do not count: the last ones of a job are single entries, bad ones all of
 * them, and those that were beside them are paid.
 */
static void
note_isolated(ActiveJob *job, const Claim *claim, const ErrorData *error, EngineState *state)
{
	Failing    *f = &job->failing;
	bool		counts = false;

	for (int i = 0; f->since != 0 && i < Min(f->batches, MASS_FAILURE); i++)
		counts |= claim->first_seq >= f->first_seq[i] && claim->last_seq <= f->last_seq[i];
	if (!counts)
		return;
	if (f->sqlstate != error->sqlerrcode)
		f->entries = 0;
	f->sqlstate = error->sqlerrcode;
	if (++f->entries >= MASS_FAILURE)
	{
		TimestampTz since = f->since;

		f->since = 0;
		stop_job(job, error, since, state);
	}
	else if (f->entries >= FIRST_FEW)
		payoutq_look_elsewhere(job);
}

/*
 * Once those who pay its batches have come to an end: when everything fails,
 * since then, they may have paid somebody.  If that takes longer than we wait for
 * locks, the job goes on for now.
 */
static void
stop_job(ActiveJob *job, const ErrorData *error, TimestampTz since, EngineState *state)
{
	Stop		arguments = {.job_id = job->id, .error = error, .since = since};
	ErrorData  *obstacle;

	payoutq_turn_commit(state);
	obstacle = payoutq_in_savepoint(stop, &arguments);
	if (obstacle == NULL)
		return;
	if (payoutq_is_interrupt(obstacle) || payoutq_classify(obstacle->sqlerrcode) != FAILURE_TRANSIENT)
		ReThrowError(obstacle);
	payoutq_leave_alone(job, STOP_WAIT_MS);
}

static void
stop(void *arg)
{
	Stop	   *s = arg;

	(void) payoutq_lock_job(s->job_id, ExclusiveLock, true);
	if (s->since == 0 || payoutq_is_mass_failure(s->job_id, s->since))
		payoutq_fail_job(s->job_id, s->error->sqlerrcode, s->error->message);
}

/* payout_process(max_batches int, job_id bigint) */
Datum
payout_process(PG_FUNCTION_ARGS)
{
	int32		max_batches = PG_ARGISNULL(0) ? 0 : PG_GETARG_INT32(0);
	int64		job_id = PG_ARGISNULL(1) ? 0 : PG_GETARG_INT64(1);
	CallContext *context = (CallContext *) fcinfo->context;

	if (context == NULL || !IsA(context, CallContext) || context->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("payout_process() cannot run inside a transaction block"),
				 errdetail("It commits after each batch."),
				 errhint("CALL it at the top level, outside a transaction block or function.")));
	if (!PG_ARGISNULL(0) && max_batches <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("max_batches must be greater than zero, not %d", max_batches)));
	if (!PG_ARGISNULL(1))
		payoutq_require_job(job_id);

	(void) payoutq_process(max_batches == 0 ? PG_UINT64_MAX : (uint64) max_batches, job_id);
	PG_RETURN_VOID();
}
