/*
 * batch.c
 *		Pay a batch, or record why it was not paid.
 *
 *					   paid
 *		pending ---------------------> completed
 *		 |  ^  | one entry, no attempts left, or quarantined
 *		 |  |  +------------------> failed -- payout_retry_job() --> pending
 *		 +--+
 *		   transient error: waits, with backoff
 *		   data error, several entries: split in two, both pending
 *		   data error, one entry: waits while attempts are left
 *		   accounts missing: those entries cut out, and wait; the rest pending
 *
 * A batch is completed in the transaction that changes the balances, under its
 * row lock, and by complete_batch() only.  Nothing else credits an entry.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

/* What a missing account is recorded as. */
#define MISSING_ACCOUNT		ERRCODE_NO_DATA_FOUND
#define MISSING_MESSAGE		"the account does not exist in the bound table"

/*
 * That a batch is pending, said so that the planner does not take it for the
 * predicate of the index of pending batches: it would read all of the job's.
 */
#define STILL_PENDING		"status NOT IN ('completed', 'failed')"

/* The attempt that was counted before and has no outcome yet; job 0: none. */
static Claim counted;

/* There is no room for taking it back. */
static bool cannot_take_back = false;

/* A batch that was not paid, for a savepoint */
typedef struct Failure
{
	const Claim *claim;
	ErrorData  *error;			/* NULL: accounts are missing */
	int32	   *missing;
	int			count;
	BatchOutcome outcome;
} Failure;

static int	entries_of(const Claim *claim);
static int	try_to_pay(const Claim *claim, int32 **missing, ErrorData **error);
static int	try_in_savepoint(const Claim *claim, bool one_pass, int32 **missing,
							 ErrorData **error);
static void hold_entries(const Claim *claim);
static void tell_winners(const Claim *claim);
static void complete_batch(const Claim *claim);
static void count_progress(const Claim *claim, int completed, int failed,
						   int64 paid);
static void record_failure(void *arg);
static BatchOutcome record_error(const Claim *claim, ErrorData *error);
static void wait_for_another_try(const Claim *claim, const ErrorData *error);
static void wait_or_fail(const Claim *claim, const ErrorData *error);
static void fail_entries(const Claim *claim, int sqlstate, const char *message);
static void count_attempt(void *arg);
static void withdraw(void *arg);
static bool take_back(const Claim *claim);
static void take_counted_back(void *arg);
static void take_back_at_exit(int code pg_attribute_unused(), Datum arg pg_attribute_unused());
static void bisect(const Claim *claim, const ErrorData *error);
static BatchOutcome missing_accounts(const Claim *claim, int32 *missing, int count);
static void cut_out(const Claim *claim, const int32 *missing, int count);
static void split(const Claim *claim, Datum *first, Datum *last, Datum *cut, int pieces,
				  int sqlstate, const char *message);

BatchOutcome
payoutq_pay_batch(const Claim *claim, ErrorData **error)
{
	Failure		failure = {.claim = claim};
	ErrorData  *obstacle;

	failure.count = try_to_pay(claim, &failure.missing, error);
	if (*error == NULL && failure.count == 0)
		return BATCH_PAID;
	if (*error && payoutq_is_interrupt(*error))
		return BATCH_INTERRUPTED;
	payoutq_worker_error(*error ? (*error)->message : MISSING_MESSAGE);

	/* What keeps us from recording it, as a full disk does, is no reason to end. */
	failure.error = *error;
	obstacle = payoutq_in_savepoint(record_failure, &failure);
	if (obstacle == NULL)
		return failure.outcome;
	*error = obstacle;
	if (payoutq_is_interrupt(obstacle))
		return BATCH_INTERRUPTED;
	if (payoutq_classify(obstacle->sqlerrcode) != FAILURE_TRANSIENT)
		ReThrowError(obstacle);
	return BATCH_NOT_RECORDED;
}

static int
entries_of(const Claim *claim)
{
	return claim->last_seq - claim->first_seq + 1;
}

/*
 * One savepoint for the whole batch.  Returns the number of entries whose
 * account is missing; unless it is 0, and without an error, nothing was done.
 */
static int
try_to_pay(const Claim *claim, int32 **missing, ErrorData **error)
{
	int			count = try_in_savepoint(claim, false, missing, error);

	if (count == CREDIT_AGAIN && *error == NULL)
		count = try_in_savepoint(claim, true, missing, error);
	return count;
}

static int
try_in_savepoint(const Claim *claim, bool one_pass, int32 **missing, ErrorData **error)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile int count = 0;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		if (!claim->provider)
			count = payoutq_credit_entries(claim, one_pass, missing);
		if (count == 0)
		{
			if (claim->tells_winners)
				tell_winners(claim);
			complete_batch(claim);
			if (claim->provider)
				hold_entries(claim);
			ReleaseCurrentSubTransaction();
		}
		else
			RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		*error = payoutq_catch(context, owner);
	}
	PG_END_TRY();

	return count;
}

/* They become transfers, for which the money is held once it is posted. */
static void
hold_entries(const Claim *claim)
{
	static EngineStatement hold = {
		"SELECT payoutq.hold_entries($1, $2, $3, $4)", 4, {INT8OID, INT4OID, INT4OID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id), Int32GetDatum(claim->first_seq),
		Int32GetDatum(claim->last_seq), CStringGetTextDatum(claim->provider)};

	(void) payoutq_execute(&hold, values, NULL, SPI_OK_SELECT);
}

/* One statement for all of them. */
static void
tell_winners(const Claim *claim)
{
	static EngineStatement tell = {
		"SELECT payoutq.tell_winners($1, $2, $3)", 3, {INT8OID, INT4OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->first_seq), Int32GetDatum(claim->last_seq)};

	(void) payoutq_execute(&tell, values, NULL, SPI_OK_SELECT);
}

static void
complete_batch(const Claim *claim)
{
	static EngineStatement complete = {
		"UPDATE payoutq.batch"
		"   SET status = 'completed', attempts = attempts + 1, crashes = 0, processed_at = $3"
		" WHERE job_id = $1 AND batch_no = $2 AND " STILL_PENDING,
		3, {INT8OID, INT4OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->batch_no),
	TimestampTzGetDatum(GetCurrentTimestamp())};

	if (payoutq_execute(&complete, values, NULL, SPI_OK_UPDATE) != 1)
		elog(ERROR, "batch %d of job " INT64_FORMAT " is not pending",
			 claim->batch_no, claim->job_id);
	count_progress(claim, claim->provider ? 0 : entries_of(claim), 0, claim->amount);
}

/* Last in the transaction, so that its row is not locked for long. */
static void
count_progress(const Claim *claim, int completed, int failed, int64 paid)
{
	static EngineStatement count = {
		"INSERT INTO payoutq.progress AS p (job_id, part, slot, completed, failed, paid, settled)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7)"
		" ON CONFLICT (job_id, part, slot) DO UPDATE"
		"    SET completed = p.completed + excluded.completed,"
		"        failed = p.failed + excluded.failed, paid = p.paid + excluded.paid,"
		"        settled = p.settled + excluded.settled",
		7, {INT8OID, INT4OID, INT4OID, INT8OID, INT8OID, INT8OID, INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->batch_no / 1024),
		Int32GetDatum(MyBackendNumber() % 64),
		Int64GetDatum(completed), Int64GetDatum(failed), Int64GetDatum(paid),
		Int64GetDatum(claim->provider ? 0 : paid)};

	(void) payoutq_execute(&count, values, NULL, SPI_OK_INSERT);
}

/*
 * Before risky work, in a transaction of its own: should the server be killed,
 * the count stays.  Any other end takes it back.  Returns what kept us from
 * counting, as a full disk does.
 */
ErrorData *
payoutq_count_attempt(const Claim *claim)
{
	ErrorData  *error = payoutq_in_savepoint(count_attempt, (void *) claim);

	if (error && (payoutq_is_interrupt(error) || payoutq_classify(error->sqlerrcode) != FAILURE_TRANSIENT))
		ReThrowError(error);
	return error;
}

static void
count_attempt(void *arg)
{
	const Claim *claim = arg;
	static EngineStatement count = {
		"UPDATE payoutq.batch SET crashes = crashes + 1 WHERE job_id = $1 AND batch_no = $2",
		2, {INT8OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
	Int32GetDatum(claim->batch_no)};

	(void) payoutq_execute(&count, values, NULL, SPI_OK_UPDATE);
	payoutq_attempt_counted(claim);
}

void
payoutq_attempt_counted(const Claim *claim)
{
	static bool registered = false;

	if (!registered)
		before_shmem_exit(take_back_at_exit, (Datum) 0);
	registered = true;
	counted = *claim;
	cannot_take_back = false;
}

void
payoutq_attempt_ended(void)
{
	counted.job_id = 0;
}

void
payoutq_take_attempt_back(const Claim *claim)
{
	(void) take_back(claim);
}

/*
 * When it cannot be claimed again.  Somebody may have the row, but cannot lock the
 * attempt and lets go of it, so he is waited for.  Should that take too long, one
 * attempt too many is counted.
 */
void
payoutq_withdraw_attempt(const Claim *claim)
{
	ErrorData  *error = payoutq_in_savepoint(withdraw, (void *) claim);

	if (error && (payoutq_is_interrupt(error) || payoutq_classify(error->sqlerrcode) != FAILURE_TRANSIENT))
		ReThrowError(error);
	counted.job_id = 0;
}

static void
withdraw(void *arg)
{
	const Claim *claim = arg;
	static EngineStatement withdraw = {
		"UPDATE payoutq.batch SET crashes = crashes - 1"
		" WHERE job_id = $1 AND batch_no = $2 AND " STILL_PENDING " AND crashes > 0",
		2, {INT8OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
	Int32GetDatum(claim->batch_no)};

	(void) payoutq_execute(&withdraw, values, NULL, SPI_OK_UPDATE);
}

/*
 * Nobody is waited for.  False: the row of the job is locked, by whoever changes its
 * state, and the count stays.
 */
static bool
take_back(const Claim *claim)
{
	static EngineStatement take_batch_back = {
		"UPDATE payoutq.batch SET crashes = crashes - 1"
		" WHERE (job_id, batch_no) IN"
		"       (SELECT job_id, batch_no FROM payoutq.batch"
		"         WHERE job_id = $1 AND batch_no = $2 AND " STILL_PENDING " AND crashes > 0"
		"           FOR UPDATE SKIP LOCKED)",
		2, {INT8OID, INT4OID}, NULL
	};
	static EngineStatement take_query_back = {
		"UPDATE payoutq.job SET attempts = attempts - 1"
		" WHERE id IN (SELECT id FROM payoutq.job WHERE id = $1 AND attempts > 0 FOR UPDATE SKIP LOCKED)",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
	Int32GetDatum(claim->batch_no)};
	bool		is_query = claim->batch_no == QUERY_OF_JOB;
	uint64		taken = payoutq_execute(is_query ? &take_query_back : &take_batch_back,
										values, NULL, SPI_OK_UPDATE);

	counted.job_id = 0;
	return taken == 1 || !is_query;
}

/*
 * When the outcome cannot be recorded: false if the count cannot be taken back
 * either.  Then this is the only one: there is no room for another, or it would
 * stay, too.
 */
bool
payoutq_forget_attempt(void)
{
	bool		taken = true;

	cannot_take_back = counted.job_id != 0 &&
		(payoutq_in_savepoint(take_counted_back, &taken) != NULL || !taken);
	return !cannot_take_back;
}

static void
take_counted_back(void *arg)
{
	bool	   *taken = arg;
	Claim		claim = counted;

	*taken = take_back(&claim);
}

/*
 * The process was told to end, or has met an error outside of a batch.  Nothing
 * can interrupt us any more, so nothing is waited for: no lock, and no standby.
 * Should the commit be lost, one attempt too many is counted.
 */
static void
take_back_at_exit(int code pg_attribute_unused(), Datum arg pg_attribute_unused())
{
	EngineState state;
	Claim		claim = counted;

	/* An error would be a fatal one now. */
	if (counted.job_id == 0 || cannot_take_back)
		return;
	counted.job_id = 0;
	AbortOutOfAnyTransaction();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	SPI_connect();
	payoutq_engine_enter(&state);
	payoutq_set_local("synchronous_commit", "off");
	if (payoutq_try_lock_extension())
		payoutq_take_attempt_back(&claim);
	SetUserIdAndSecContext(state.user_id, state.sec_context);
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
}

void
payoutq_quarantine_batch(const Claim *claim)
{
	char	   *message = psprintf("the server or the worker was killed %d times while it paid this batch",
								   claim->crashes);

	ereport(WARNING,
			(errcode(ERRCODE_CRASH_SHUTDOWN),
			 errmsg("batch %d of job " INT64_FORMAT " is quarantined",
					claim->batch_no, claim->job_id),
			 errdetail_internal("%s", message),
			 errhint("Mend the cause, then call payout_retry_job().")));
	fail_entries(claim, ERRCODE_CRASH_SHUTDOWN, message);
}

static void
record_failure(void *arg)
{
	Failure    *f = arg;

	f->outcome = f->error ? record_error(f->claim, f->error) :
		missing_accounts(f->claim, f->missing, f->count);
}

static BatchOutcome
record_error(const Claim *claim, ErrorData *error)
{
	FailureClass class = payoutq_classify(error->sqlerrcode);

	switch (class)
	{
		case FAILURE_TRANSIENT:
			wait_for_another_try(claim, error);
			return BATCH_WAITS;
		case FAILURE_CONFIGURATION:
			payoutq_take_attempt_back(claim);
			return BATCH_JOB_FAILED;
		case FAILURE_DATA:
			break;
	}

	if (entries_of(claim) > 1)
	{
		bisect(claim, error);
		return BATCH_SPLIT;
	}
	wait_or_fail(claim, error);
	return BATCH_ENTRY_FAILED;
}

static void
wait_or_fail(const Claim *claim, const ErrorData *error)
{
	if (claim->failures + 1 < payoutq_max_attempts)
		wait_for_another_try(claim, error);
	else
		fail_entries(claim, error->sqlerrcode, error->message);
}

static void
wait_for_another_try(const Claim *claim, const ErrorData *error)
{
	static EngineStatement wait = {
		"UPDATE payoutq.batch"
		"   SET attempts = attempts + 1, crashes = 0, run_after = $3, error_code = $4, error = $5"
		" WHERE job_id = $1 AND batch_no = $2",
		5, {INT8OID, INT4OID, TIMESTAMPTZOID, TEXTOID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->batch_no),
		TimestampTzGetDatum(payoutq_retry_at(GetCurrentTimestamp(),
											 claim->attempts + 1)),
		CStringGetTextDatum(unpack_sql_state(error->sqlerrcode)),
	CStringGetTextDatum(error->message)};

	(void) payoutq_execute(&wait, values, NULL, SPI_OK_UPDATE);
}

static void
fail_entries(const Claim *claim, int sqlstate, const char *message)
{
	static EngineStatement fail = {
		"UPDATE payoutq.batch"
		"   SET status = 'failed', attempts = attempts + 1, crashes = 0, processed_at = $3,"
		"       error_code = $4, error = $5"
		" WHERE job_id = $1 AND batch_no = $2 AND " STILL_PENDING,
		5, {INT8OID, INT4OID, TIMESTAMPTZOID, TEXTOID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->batch_no),
		TimestampTzGetDatum(GetCurrentTimestamp()),
		CStringGetTextDatum(unpack_sql_state(sqlstate)),
	CStringGetTextDatum(message)};

	if (payoutq_execute(&fail, values, NULL, SPI_OK_UPDATE) != 1)
		elog(ERROR, "batch %d of job " INT64_FORMAT " is not pending",
			 claim->batch_no, claim->job_id);
	count_progress(claim, 0, entries_of(claim), 0);
}

/*
 * Is there more to try, and nothing that has been paid meanwhile?  A single entry
 * is no more, unless it is a whole batch: it need not be searched for.
 */
bool
payoutq_is_mass_failure(int64 job_id, TimestampTz since)
{
	static EngineStatement check = {
		"SELECT FROM payoutq.job"
		" WHERE id = $1"
		"   AND NOT EXISTS (SELECT FROM payoutq.batch"
		"                    WHERE job_id = $1 AND status = 'completed' AND processed_at >= $2)"
		"   AND EXISTS (SELECT FROM payoutq.batch"
		"                WHERE job_id = $1 AND status = 'pending' AND attempts = 0"
		"                  AND (first_seq < last_seq OR job.batch_size = 1))",
		2, {INT8OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), TimestampTzGetDatum(since)};

	return payoutq_execute(&check, values, NULL, SPI_OK_SELECT) == 1;
}

static void
bisect(const Claim *claim, const ErrorData *error)
{
	int32		middle = claim->first_seq + (claim->last_seq - claim->first_seq) / 2;
	Datum		first[] = {Int32GetDatum(claim->first_seq), Int32GetDatum(middle + 1)};
	Datum		last[] = {Int32GetDatum(middle), Int32GetDatum(claim->last_seq)};
	Datum		cut[] = {BoolGetDatum(false), BoolGetDatum(false)};

	split(claim, first, last, cut, 2, error->sqlerrcode, error->message);
}

static BatchOutcome
missing_accounts(const Claim *claim, int32 *missing, int count)
{
	ErrorData	error = {.elevel = ERROR, .sqlerrcode = MISSING_ACCOUNT,
	.message = pstrdup(MISSING_MESSAGE)};

	if (count == entries_of(claim))
	{
		wait_or_fail(claim, &error);
		return BATCH_WAITS;
	}
	cut_out(claim, missing, count);
	return BATCH_SPLIT;
}

/*
 * The statement that credited the others has named the entries it found no
 * account for, in ascending order.  Each run of them becomes a batch, with one
 * attempt behind it; the runs between them are paid in the next turns.
 */
static void
cut_out(const Claim *claim, const int32 *missing, int count)
{
	int			max = 2 * count + 1;
	Datum	   *first = palloc(max * sizeof(Datum));
	Datum	   *last = palloc(max * sizeof(Datum));
	Datum	   *cut = palloc(max * sizeof(Datum));
	int			pieces = 0;
	int			next = 0;

	for (int32 seq = claim->first_seq; seq <= claim->last_seq; seq++)
	{
		bool		is_missing = next < count && missing[next] == seq;

		if (pieces == 0 || DatumGetBool(cut[pieces - 1]) != is_missing)
		{
			first[pieces] = Int32GetDatum(seq);
			cut[pieces++] = BoolGetDatum(is_missing);
		}
		last[pieces - 1] = Int32GetDatum(seq);
		next += is_missing ? 1 : 0;
	}
	split(claim, first, last, cut, pieces, MISSING_ACCOUNT, MISSING_MESSAGE);
}

/*
 * Replace the batch by several: the first keeps its number, the others get new
 * ones from the job's row, and all are due as it was.  Pieces that were cut out
 * carry an attempt and wait; with no attempt left they have failed.
 */
static void
split(const Claim *claim, Datum *first, Datum *last, Datum *cut, int pieces,
	  int sqlstate, const char *message)
{
	static EngineStatement numbers = {
		"UPDATE payoutq.job SET batches = batches + $2 WHERE id = $1 RETURNING batches",
		2, {INT8OID, INT4OID}, NULL
	};
	static EngineStatement split = {
		"WITH piece AS ("
		"    SELECT p.n, p.f, p.l, CASE WHEN p.cut THEN 1 ELSE 0 END AS attempts,"
		"           CASE WHEN p.cut THEN $8 ELSE $7 END AS run_after,"
		"           CASE WHEN p.cut AND $11 THEN 'failed' ELSE 'pending' END AS status,"
		"           CASE WHEN p.cut AND $11 THEN $12 END AS processed_at,"
		"           (SELECT sum(e.amount)::bigint FROM payoutq.entry e"
		"             WHERE e.job_id = $1 AND e.seq BETWEEN p.f AND p.l) AS amount"
		"      FROM ROWS FROM (unnest($4), unnest($5), unnest($6)) WITH ORDINALITY AS p (f, l, cut, n)"
		"), narrowed AS ("
		"    UPDATE payoutq.batch b"
		"       SET last_seq = p.l, amount = p.amount, attempts = p.attempts, crashes = 0,"
		"           status = p.status, processed_at = p.processed_at,"
		"           run_after = p.run_after, error_code = $9, error = $10"
		"      FROM piece p"
		"     WHERE p.n = 1 AND b.job_id = $1 AND b.batch_no = $2"
		")"
		" INSERT INTO payoutq.batch (job_id, batch_no, first_seq, last_seq, amount, attempts,"
		"                            status, processed_at, run_after, error_code, error)"
		" SELECT $1, $3 + p.n - 1, p.f, p.l, p.amount, p.attempts,"
		"        p.status, p.processed_at, p.run_after, $9, $10"
		"   FROM piece p WHERE p.n > 1",
		12, {INT8OID, INT4OID, INT4OID, INT4ARRAYOID, INT4ARRAYOID, BOOLARRAYOID,
			TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID, TEXTOID, BOOLOID, TIMESTAMPTZOID}, NULL
	};
	Datum		wanted[] = {Int64GetDatum(claim->job_id), Int32GetDatum(pieces - 1)};
	TimestampTz now = GetCurrentTimestamp();
	bool		no_attempt_left = payoutq_max_attempts <= 1;
	int			failed = 0;
	int32		highest;

	(void) payoutq_execute(&numbers, wanted, NULL, SPI_OK_UPDATE_RETURNING);
	highest = (int32) payoutq_result_int64(0, 1);
	{
		Datum		values[] = {Int64GetDatum(claim->job_id),
			Int32GetDatum(claim->batch_no),
			Int32GetDatum(highest - (pieces - 1)),
			PointerGetDatum(construct_array(first, pieces, INT4OID, 4, true, TYPALIGN_INT)),
			PointerGetDatum(construct_array(last, pieces, INT4OID, 4, true, TYPALIGN_INT)),
			PointerGetDatum(construct_array(cut, pieces, BOOLOID, 1, true, TYPALIGN_CHAR)),
			TimestampTzGetDatum(claim->run_after),
			TimestampTzGetDatum(payoutq_retry_at(now, 1)),
			CStringGetTextDatum(unpack_sql_state(sqlstate)),
			CStringGetTextDatum(message),
			BoolGetDatum(no_attempt_left),
			TimestampTzGetDatum(now)};

		(void) payoutq_execute(&split, values, NULL, SPI_OK_INSERT);
	}

	for (int i = 0; i < pieces && no_attempt_left; i++)
		if (DatumGetBool(cut[i]))
			failed += DatumGetInt32(last[i]) - DatumGetInt32(first[i]) + 1;
	if (failed > 0)
		count_progress(claim, 0, failed, 0);
}
