/*
 * challenge.c
 *		What the engine does for challenges; the rest is in sql/06_challenges.sql.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "payoutq.h"

static bool lock_row(int64 challenge_id, bool wait);

PG_FUNCTION_INFO_V1(payoutq_enter_challenge_sql);
PG_FUNCTION_INFO_V1(payoutq_lock_challenge_sql);
PG_FUNCTION_INFO_V1(payoutq_latest_pools);

/* payoutq.enter_challenge(challenge_id) */
Datum
payoutq_enter_challenge_sql(PG_FUNCTION_ARGS)
{
	payoutq_enter_challenge(PG_GETARG_INT64(0), ShareLock);
	PG_RETURN_VOID();
}

/*
 * payoutq.lock_challenge(challenge_id, stays)
 *
 * Lock the row FOR UPDATE.  FOR KEY SHARE goes past whoever waits for that, and
 * transactions that overlap never leave a gap, so whoever meets one queues here:
 * who comes after waits behind.  The row is not waited for while the lock is held
 * in Exclusive mode, because who has locked it may want the lock, too.
 *
 * Share is asked for first: he who has the row already needs no other.  It is
 * let go before, because when two hold it, neither gets Exclusive.
 */
Datum
payoutq_lock_challenge_sql(PG_FUNCTION_ARGS)
{
	int64		challenge_id = PG_GETARG_INT64(0);
	bool		stays = PG_GETARG_BOOL(1);
	bool		locked;

	SPI_connect();
	payoutq_enter_challenge(challenge_id, ShareLock);
	if (!lock_row(challenge_id, false))
	{
		payoutq_leave_challenge(challenge_id, ShareLock);
		payoutq_enter_challenge(challenge_id, ExclusiveLock);
		payoutq_enter_challenge(challenge_id, ShareLock);
		locked = lock_row(challenge_id, false);
		payoutq_leave_challenge(challenge_id, ExclusiveLock);

		/* By somebody who has not entered: he is closing it, or tells of it. */
		if (!locked)
			(void) lock_row(challenge_id, true);
	}
	if (!stays)
		payoutq_leave_challenge(challenge_id, ShareLock);
	SPI_finish();
	PG_RETURN_VOID();
}

/* False: there is none, or, without waiting, somebody else has locked it. */
static bool
lock_row(int64 challenge_id, bool wait)
{
	static EngineStatement lock_or_wait = {
		"SELECT FROM payoutq.challenge WHERE id = $1 FOR UPDATE", 1, {INT8OID}, NULL
	};
	static EngineStatement lock_if_free = {
		"SELECT FROM payoutq.challenge WHERE id = $1 FOR UPDATE SKIP LOCKED", 1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(challenge_id)};

	return payoutq_execute(wait ? &lock_or_wait : &lock_if_free, values, NULL, SPI_OK_SELECT) == 1;
}

/* payoutq.latest_pools(challenge_id) */
Datum
payoutq_latest_pools(PG_FUNCTION_ARGS)
{
	static EngineStatement pools = {
		"SELECT ARRAY[coalesce(sum(amount) FILTER (WHERE side = 'YES'), 0)::bigint,"
		"             coalesce(sum(amount) FILTER (WHERE side = 'NO'), 0)::bigint,"
		"             count(*) FILTER (WHERE side = 'YES'), count(*) FILTER (WHERE side = 'NO')]"
		"  FROM payoutq.movement WHERE kind = 'stake' AND challenge_id = $1",
		1, {INT8OID}, NULL
	};
	MemoryContext caller = CurrentMemoryContext;
	Datum		values[] = {PG_GETARG_DATUM(0)};
	EngineState state;
	bool		isnull;
	ArrayType  *result;

	SPI_connect();
	payoutq_engine_enter(&state);
	(void) payoutq_select_latest(&pools, values);
	MemoryContextSwitchTo(caller);
	result = DatumGetArrayTypePCopy(payoutq_result(0, 1, &isnull));
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_ARRAYTYPE_P(result);
}

/*
 * The challenge that the job pays, if any, so that it can be completed with it.
 * False: somebody else has locked it, and the job is finished later.
 */
bool
payoutq_lock_challenge(int64 job_id)
{
	static EngineStatement lock = {
		"SELECT (SELECT count(*) FROM payoutq.challenge WHERE job_id = $1)"
		"     = (SELECT count(*) FROM (SELECT FROM payoutq.challenge WHERE job_id = $1 FOR UPDATE SKIP LOCKED) l)",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id)};
	bool		isnull;

	(void) payoutq_execute(&lock, values, NULL, SPI_OK_SELECT);
	return DatumGetBool(payoutq_result(0, 1, &isnull));
}

/* In the transaction that finishes the job that pays it, if it pays one. */
void
payoutq_complete_challenge(int64 job_id)
{
	static EngineStatement complete = {
		"UPDATE payoutq.challenge SET completed_at = $2,"
		"       status = CASE status WHEN 'cancelled' THEN status ELSE 'completed' END"
		" WHERE job_id = $1 AND completed_at IS NULL",
		2, {INT8OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), TimestampTzGetDatum(GetCurrentTimestamp())};

	(void) payoutq_execute(&complete, values, NULL, SPI_OK_UPDATE);
}
