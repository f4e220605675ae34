/*
 * challenge.c
 *		What the engine does for challenges; the rest is in sql/06_challenges.sql.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "payoutq.h"

PG_FUNCTION_INFO_V1(payoutq_latest_pools);

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
