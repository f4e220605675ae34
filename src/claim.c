/*
 * claim.c
 *		Which job is served next, and which of its batches.
 *
 * Each process keeps a short list of the jobs that have work: higher priority
 * first, and among equals one batch each in turn, first the one that has waited
 * longest, so that a job of ten million does not hold up a job of ten.  The
 * batches of a job are taken in the order in which they are due.  The process
 * remembers the position up to which it has looked; a claim starts there, and so
 * never walks over the batches that are done, nor over their dead index entries.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "payoutq.h"

#define MAX_ACTIVE_JOBS		1000

/*
 * The first batches of a job that a process tries are counted in a transaction
 * of their own before.  A batch that kills the server is sooner or later the
 * lowest pending one, and so the first that is tried after the restart.
 */
#define CAREFUL_BATCHES		8

/* How long a job is left alone of which all batches are locked by others. */
#define BUSY_JOB_WAIT_MS	1000
#define LOCKED_JOB_WAIT_MS	20

/* How long a list that was full is confined to jobs with something due. */
#define DUE_ONLY_MS			5000

static ActiveJob *jobs = NULL;	/* in order of priority DESC, id */
static int	job_count = 0;
static int64 turns = 0;
static TimestampTz due_only_until = 0;

static void read_job(ActiveJob *job, int row);
static ActiveJob *old_entry(const ActiveJob *job, int *position);
static bool claim_from(ActiveJob *job, TimestampTz run_after, int32 batch_no, Claim *claim);
static JobWork nothing_claimed(ActiveJob *job);

void
payoutq_refresh_jobs(int64 only_job, bool woken)
{
	static EngineStatement list = {
		"SELECT id, priority, status = 'queued', total_winners IS NULL, currency,"
		"       kind = 'payout' AND EXISTS (SELECT FROM payoutq.challenge c WHERE c.job_id = job.id),"
		"       coalesce(provider, '')"
		"  FROM payoutq.job"
		" WHERE status IN ('queued', 'running') AND run_at <= $1 AND ($2 = 0 OR id = $2)"
		"   AND origin = $5 AND (NOT $4 OR CASE WHEN total_winners IS NULL THEN"
		/* One of them at a time is expanded. */
		"        id = ANY (ARRAY(SELECT j.id FROM payoutq.job j WHERE j.status IN ('queued', 'running')"
		"                           AND j.run_at <= $1 AND j.origin = $5 AND j.total_winners IS NULL"
		"                         ORDER BY j.priority DESC, j.id LIMIT 10))"
		"        ELSE coalesce($1 >="
		"        (SELECT b.run_after FROM payoutq.batch b WHERE b.job_id = job.id AND b.status = 'pending'"
		"          ORDER BY b.run_after LIMIT 1),"
		/* Transfers that are under way may be so for days. */
		"        provider IS NULL OR total_winners ="
		"        (SELECT sum(c.completed + c.failed) FROM payoutq.counts c WHERE c.job_id = job.id)) END)"
		" ORDER BY priority DESC, id LIMIT $3",
		5, {TIMESTAMPTZOID, INT8OID, INT4OID, BOOLOID, TEXTOID}, NULL
	};
	TimestampTz now = GetCurrentTimestamp();
	Datum		values[] = {TimestampTzGetDatum(now), Int64GetDatum(only_job),
		Int32GetDatum(MAX_ACTIVE_JOBS), BoolGetDatum(only_job == 0 && now < due_only_until),
		CStringGetTextDatum(payoutq_origin())};
	ActiveJob  *fresh;
	int			count;
	int			old = 0;

	count = payoutq_execute(&list, values, NULL, SPI_OK_SELECT);
	fresh = MemoryContextAllocZero(TopMemoryContext,
								   Max(count, 1) * sizeof(ActiveJob));
	for (int i = 0; i < count; i++)
	{
		ActiveJob  *before;

		read_job(&fresh[i], i);
		before = old_entry(&fresh[i], &old);
		if (before == NULL)
			continue;
		fresh[i].position_run_after = before->position_run_after;
		fresh[i].position_batch_no = before->position_batch_no;
		fresh[i].served = before->served;
		fresh[i].careful = before->careful;
		fresh[i].failing = before->failing;
		if (!woken)
			fresh[i].idle_until = before->idle_until;
	}

	if (jobs)
		pfree(jobs);
	jobs = fresh;
	job_count = count;
}

/*
 * All jobs in the list are idle: is it full, so that others may not be?  Then
 * it is read again, without those of which all batches, or the transfers, wait.
 */
bool
payoutq_list_due_jobs(void)
{
	TimestampTz now = GetCurrentTimestamp();

	if (job_count < MAX_ACTIVE_JOBS || now < due_only_until)
		return false;
	due_only_until = TimestampTzPlusMilliseconds(now, DUE_ONLY_MS);
	return true;
}

static void
read_job(ActiveJob *job, int row)
{
	bool		isnull;

	job->id = payoutq_result_int64(row, 1);
	job->priority = (int32) payoutq_result_int64(row, 2);
	job->queued = DatumGetBool(payoutq_result(row, 3, &isnull));
	job->unexpanded = DatumGetBool(payoutq_result(row, 4, &isnull));
	strlcpy(job->currency, payoutq_result_cstring(row, 5), NAMEDATALEN);
	job->tells_winners = DatumGetBool(payoutq_result(row, 6, &isnull));
	strlcpy(job->provider, payoutq_result_cstring(row, 7), NAMEDATALEN);
	job->position_run_after = DT_NOBEGIN;
	job->careful = CAREFUL_BATCHES;

	/* It comes last: if many come, the others must not wait for all of them. */
	job->served = turns;
}

/* Both lists are in the same order, so one pass finds all. */
static ActiveJob *
old_entry(const ActiveJob *job, int *position)
{
	for (; *position < job_count; (*position)++)
	{
		ActiveJob  *old = &jobs[*position];

		if (old->id == job->id)
			return old;
		if (old->priority < job->priority ||
			(old->priority == job->priority && old->id > job->id))
			break;
	}
	return NULL;
}

/* The job whose turn it is, or NULL when all are idle. */
ActiveJob *
payoutq_next_job(TimestampTz now)
{
	ActiveJob  *next = NULL;

	for (int i = 0; i < job_count; i++)
	{
		ActiveJob  *job = &jobs[i];

		if (next && job->priority < next->priority)
			break;
		if (next && job->served >= next->served)
			continue;
		if (job->idle_until > now || payoutq_avoided_until(job->id) > now)
			continue;
		next = job;
	}

	return next;
}

void
payoutq_leave_alone(ActiveJob *job, int milliseconds)
{
	job->idle_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), milliseconds);
}

/*
 * Find something to do for the job.  Takes its lock in Share mode, which holds
 * off pause and cancel until the end of the transaction.
 */
JobWork
payoutq_claim(ActiveJob *job, Claim *claim)
{
	job->served = ++turns;
	if (!payoutq_lock_job(job->id, ShareLock, false))
	{
		payoutq_leave_alone(job, LOCKED_JOB_WAIT_MS);
		return WORK_NONE;
	}
	if (job->queued)
	{
		payoutq_begin_job(job->id);
		job->queued = false;
	}
	if (job->unexpanded)
		return WORK_EXPAND;

	if (claim_from(job, job->position_run_after, job->position_batch_no, claim))
		return WORK_BATCH;

	/* Those that were locked when we passed them. */
	if (job->position_run_after != DT_NOBEGIN &&
		claim_from(job, DT_NOBEGIN, 0, claim))
		return WORK_BATCH;

	return nothing_claimed(job);
}

static bool
claim_from(ActiveJob *job, TimestampTz run_after, int32 batch_no, Claim *claim)
{
	static EngineStatement next = {
		"SELECT b.batch_no, b.first_seq, b.last_seq, b.amount, b.attempts, b.crashes, b.run_after, b.error_code"
		"  FROM payoutq.batch b"
		" WHERE b.job_id = $1 AND b.status = 'pending'"
		"   AND (b.run_after, b.batch_no) > ($2, $3) AND b.run_after <= $4"
		"   AND EXISTS (SELECT FROM payoutq.job j WHERE j.id = $1 AND j.status = 'running')"
		" ORDER BY b.run_after, b.batch_no LIMIT 1 FOR UPDATE OF b SKIP LOCKED",
		4, {INT8OID, TIMESTAMPTZOID, INT4OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job->id), TimestampTzGetDatum(run_after),
		Int32GetDatum(batch_no), TimestampTzGetDatum(GetCurrentTimestamp())};
	bool		isnull;
	char	   *code;

	job->position_run_after = run_after;
	job->position_batch_no = batch_no;
	if (payoutq_execute(&next, values, NULL, SPI_OK_SELECT) == 0)
		return false;

	claim->job_id = job->id;
	claim->batch_no = (int32) payoutq_result_int64(0, 1);
	claim->first_seq = (int32) payoutq_result_int64(0, 2);
	claim->last_seq = (int32) payoutq_result_int64(0, 3);
	claim->amount = payoutq_result_int64(0, 4);
	claim->attempts = (int32) payoutq_result_int64(0, 5);
	claim->crashes = (int32) payoutq_result_int64(0, 6);
	claim->run_after = DatumGetTimestampTz(payoutq_result(0, 7, &isnull));
	claim->currency = job->currency;
	claim->provider = job->provider[0] ? job->provider : NULL;
	claim->tells_winners = job->tells_winners;

	/* What is only in the way for a while does not use up attempts. */
	code = payoutq_result_cstring(0, 8);
	claim->failures = code && payoutq_classify(MAKE_SQLSTATE(code[0], code[1], code[2], code[3], code[4])) ==
		FAILURE_TRANSIENT ? 0 : claim->attempts;
	claim->is_piece = code && claim->attempts == 0;
	job->position_run_after = claim->run_after;
	job->position_batch_no = claim->batch_no;
	return true;
}

/*
 * The claimed batch has become several, due as it was, of which the first has
 * its number: so an error is followed down to a single entry before the next
 * batch is met.
 */
void
payoutq_look_again(ActiveJob *job, const Claim *claim)
{
	job->position_run_after = claim->run_after;
	job->position_batch_no = claim->batch_no - 1;
}

/*
 * Entries that are near to each other may be a group that alone cannot be paid,
 * because they are in the order of user ids.  Far away more can be learned.
 */
void
payoutq_look_elsewhere(ActiveJob *job)
{
	static EngineStatement anywhere = {
		"SELECT (random() * batches)::integer FROM payoutq.job WHERE id = $1",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job->id)};

	if (payoutq_execute(&anywhere, values, NULL, SPI_OK_SELECT) == 1)
		job->position_batch_no = (int32) payoutq_result_int64(0, 1);
}

/* Either all batches have ended, or some wait: until when? */
static JobWork
nothing_claimed(ActiveJob *job)
{
	static EngineStatement due = {
		"SELECT run_after FROM payoutq.batch WHERE job_id = $1 AND status = 'pending'"
		" ORDER BY run_after LIMIT 1",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job->id)};
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz run_after;
	bool		isnull;

	if (payoutq_execute(&due, values, NULL, SPI_OK_SELECT) == 0)
	{
		payoutq_leave_alone(job, BUSY_JOB_WAIT_MS);
		return WORK_FINISH;
	}

	run_after = DatumGetTimestampTz(payoutq_result(0, 1, &isnull));

	/* Due, and yet not claimed: another process is at it. */
	if (run_after <= now)
		run_after = TimestampTzPlusMilliseconds(now, BUSY_JOB_WAIT_MS);
	job->idle_until = run_after;
	return WORK_NONE;
}

/*
 * Lock the batch again that was claimed in an earlier transaction.  Whoever has
 * locked it meanwhile cannot lock the attempt, and lets go of it at once.
 */
bool
payoutq_reclaim(const Claim *claim)
{
	static EngineStatement again = {
		"SELECT FROM payoutq.batch b"
		" WHERE b.job_id = $1 AND b.batch_no = $2 AND b.status NOT IN ('completed', 'failed')"
		"   AND b.first_seq = $3 AND b.last_seq = $4"
		"   AND EXISTS (SELECT FROM payoutq.job j WHERE j.id = $1 AND j.status = 'running')"
		" FOR UPDATE OF b",
		4, {INT8OID, INT4OID, INT4OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->batch_no), Int32GetDatum(claim->first_seq),
	Int32GetDatum(claim->last_seq)};

	return payoutq_lock_job(claim->job_id, ShareLock, false) &&
		payoutq_execute(&again, values, NULL, SPI_OK_SELECT) == 1;
}

/* When the next of the waiting jobs wants to be looked at; 0: none waits. */
TimestampTz
payoutq_next_due(TimestampTz now)
{
	static EngineStatement future = {
		"SELECT run_at FROM payoutq.job WHERE status IN ('queued', 'running') AND run_at > $1"
		" ORDER BY run_at LIMIT 1",
		1, {TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {TimestampTzGetDatum(now)};
	bool		isnull;
	TimestampTz due = 0;
	TimestampTz callbacks;

	if (payoutq_execute(&future, values, NULL, SPI_OK_SELECT) == 1)
		due = DatumGetTimestampTz(payoutq_result(0, 1, &isnull));

	callbacks = payoutq_callbacks_due();
	if (callbacks != 0 && (due == 0 || callbacks < due))
		due = Max(callbacks, now);
	if (now < payoutq_adopt_due() && (due == 0 || payoutq_adopt_due() < due))
		due = payoutq_adopt_due();

	/* Then not all that wait are in the list. */
	if (now < due_only_until && (due == 0 || due_only_until < due))
		due = due_only_until;

	for (int i = 0; i < job_count; i++)
	{
		TimestampTz until = Max(jobs[i].idle_until, now);

		if (until == now)
			until = Max(payoutq_avoided_until(jobs[i].id), now);
		if (due == 0 || until < due)
			due = until;
	}
	return due;
}
