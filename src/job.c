/*
 * job.c
 *		The states of a job that the engine changes.
 *
 *		queued --> running --> completed
 *		  |  ^        |  ^         |
 *		  v  |        v  |         | payout_retry_job(): failed entries again
 *		 paused      failed <------+
 *
 * Functions for operators (pause, resume, cancel, retry, trigger) are in SQL;
 * they hold the job's lock in Exclusive mode, as everything here does but
 * payoutq_begin_job().
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "payoutq.h"

/* How long restored jobs wait until it is looked again whether they are whole. */
#define ADOPT_WAIT_MS	10000

static TimestampTz adopt_after = 0;

PG_FUNCTION_INFO_V1(payoutq_require_current);

static void announce(int64 job_id, const char *event);
static void post_fee(int64 job_id, int64 fee, const char *currency);

/*
 * Under the job's lock in Share mode: two workers may begin a job at once, and
 * the row decides.
 */
void
payoutq_begin_job(int64 job_id)
{
	static EngineStatement begin = {
		"UPDATE payoutq.job SET status = 'running', started_at = coalesce(started_at, $2)"
		" WHERE id = $1 AND status = 'queued'",
		2, {INT8OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), TimestampTzGetDatum(GetCurrentTimestamp())};

	if (payoutq_execute(&begin, values, NULL, SPI_OK_UPDATE) == 1)
		announce(job_id, "started");
}

/* Complete the job if no batch of it is pending.  Returns true if it did. */
bool
payoutq_finish_job(int64 job_id)
{
	static EngineStatement finish = {
		"UPDATE payoutq.job j SET status = 'completed', completed_at = $2"
		" WHERE j.id = $1 AND j.status = 'running' AND j.total_winners IS NOT NULL"
		"   AND NOT EXISTS (SELECT FROM payoutq.batch b WHERE b.job_id = j.id AND b.status = 'pending')"
		"   AND (j.provider IS NULL OR j.total_winners ="
		"        (SELECT sum(c.completed + c.failed) FROM payoutq.counts c WHERE c.job_id = j.id))"
		" RETURNING platform_fee, currency, total_winners::bigint ="
		"   (SELECT sum(c.completed + c.failed) FROM payoutq.counts c WHERE c.job_id = j.id)",
		2, {INT8OID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), TimestampTzGetDatum(GetCurrentTimestamp())};
	bool		isnull;

	if (!payoutq_lock_job(job_id, ExclusiveLock, false) || !payoutq_lock_challenge(job_id))
		return false;
	if (payoutq_execute(&finish, values, NULL, SPI_OK_UPDATE_RETURNING) == 0)
		return false;
	if (!DatumGetBool(payoutq_result(0, 3, &isnull)) || isnull)
		elog(ERROR, "counters of job " INT64_FORMAT " do not add up to its entries", job_id);

	post_fee(job_id, payoutq_result_int64(0, 1), payoutq_result_cstring(0, 2));
	payoutq_complete_challenge(job_id);
	announce(job_id, "completed");
	return true;
}

static void
post_fee(int64 job_id, int64 fee, const char *currency)
{
	static EngineStatement post = {
		"INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id)"
		" VALUES ('fee', '@job:' || $1, '@platform', $2, $3, $1)"
		" ON CONFLICT (job_id) WHERE kind = 'fee' DO NOTHING",
		3, {INT8OID, TEXTOID, INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), CStringGetTextDatum(currency), Int64GetDatum(fee)};

	if (fee > 0)
		(void) payoutq_execute(&post, values, NULL, SPI_OK_INSERT);
}

/* The job itself cannot run: stop it with the error, nothing else touched. */
void
payoutq_fail_job(int64 job_id, int sqlstate, const char *message)
{
	static EngineStatement fail = {
		"UPDATE payoutq.job SET status = 'failed', completed_at = $4, error_code = $2, error = $3"
		" WHERE id = $1 AND status IN ('queued', 'running')",
		4, {INT8OID, TEXTOID, TEXTOID, TIMESTAMPTZOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id),
		CStringGetTextDatum(unpack_sql_state(sqlstate)),
		CStringGetTextDatum(message),
	TimestampTzGetDatum(GetCurrentTimestamp())};

	(void) payoutq_lock_job(job_id, ExclusiveLock, true);
	if (payoutq_execute(&fail, values, NULL, SPI_OK_UPDATE) == 0)
		return;

	ereport(WARNING,
			(errcode(sqlstate),
			 errmsg("job " INT64_FORMAT " has failed: %s", job_id, message),
			 errhint("Mend the cause, then call payout_retry_job().")));
	announce(job_id, "failed");
}

/*
 * Jobs and challenges that came in with a restore go on when all that belongs to them is
 * there: the books balance, and a table that was bound is, with its unique
 * index, which a restore makes after all data.  Until then they say what is
 * amiss; payout_trigger_job() lets one go on all the same.
 */
void
payoutq_adopt_jobs(void)
{
	static EngineStatement find = {
		"SELECT WHERE EXISTS (SELECT FROM payoutq.job WHERE status IN ('queued', 'running') AND origin <> $1)"
		" OR EXISTS (SELECT FROM payoutq.challenge"
		"             WHERE status IN ('pending', 'active', 'pending_admin') AND origin < $1)"
		" OR EXISTS (SELECT FROM payoutq.challenge"
		"             WHERE status IN ('pending', 'active', 'pending_admin') AND origin > $1)",
		1, {TEXTOID}, NULL
	};
	static EngineStatement adopt = {
		"WITH amiss AS (SELECT string_agg(check_name, ', ') AS checks FROM payoutq.verify() WHERE NOT ok),"
		" looked AS ("
		"    SELECT j.id, CASE WHEN amiss.checks IS NOT NULL THEN 'payout_verify() to be satisfied: ' || amiss.checks"
		"                      WHEN j.bound AND NOT payoutq.is_bound(j.currency) THEN 'the bound table to be complete' END AS waits_for"
		"      FROM payoutq.job j, amiss WHERE j.origin <> $1 AND j.status IN ('queued', 'running')"
		"), challenges AS ("
		"    UPDATE payoutq.challenge c SET origin = $1"
		"      FROM amiss WHERE amiss.checks IS NULL AND c.origin <> $1)"
		" UPDATE payoutq.job j SET origin = CASE WHEN waits_for IS NULL THEN $1 ELSE origin END,"
		"        error = 'restored, and waits for ' || waits_for"
		"   FROM looked WHERE j.id = looked.id",
		1, {TEXTOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(payoutq_origin())};
	TimestampTz now = GetCurrentTimestamp();

	if (now < adopt_after || payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 0)
		return;
	adopt_after = TimestampTzPlusMilliseconds(now, ADOPT_WAIT_MS);

	/* It reads everything: one process at a time. */
	if (payoutq_lock_job(0, ExclusiveLock, false))
		(void) payoutq_execute(&adopt, values, NULL, SPI_OK_UPDATE);
}

/* When to look again whether restored jobs are whole; in the past: none waits. */
TimestampTz
payoutq_adopt_due(void)
{
	return adopt_after;
}

/*
 * payoutq.require_current(job_id): for whoever has the job's lock, and changes batches
 * or transfers of it.  With a snapshot from before the lock he would not find those
 * that the last to have it have made, or that have failed with them.
 */
Datum
payoutq_require_current(PG_FUNCTION_ARGS)
{
	static EngineStatement find = {
		"SELECT concat_ws(' ',"
		"       (SELECT format('%s %s', sum(c.failed), CASE WHEN j.provider IS NOT NULL THEN sum(c.paid) END)"
		"          FROM payoutq.counts c WHERE c.job_id = j.id),"
		"       (SELECT format('%s %s', count(*), sum(b.attempts)) FROM payoutq.batch b"
		"         WHERE b.job_id = j.id AND b.error_code IS NOT NULL),"
		"       (SELECT format('%s %s', count(*), sum(t.attempts)) FROM payoutq.transfer t"
		"         WHERE t.job_id = j.id AND t.status = 'retryable'))"
		"  FROM payoutq.job j WHERE j.id = $1",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {PG_GETARG_DATUM(0)};
	EngineState state;
	char	   *seen;
	char	   *current;

	if (!IsolationUsesXactSnapshot())
		PG_RETURN_VOID();

	SPI_connect();
	payoutq_engine_enter(&state);
	if (payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 0)
		elog(ERROR, "job " INT64_FORMAT " does not exist", PG_GETARG_INT64(0));
	seen = payoutq_result_cstring(0, 1);
	(void) payoutq_select_latest(&find, values);
	current = payoutq_result_cstring(0, 1);
	if (strcmp(seen, current) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("job " INT64_FORMAT " has changed since the transaction's snapshot was taken",
						PG_GETARG_INT64(0)),
				 errhint("Repeat the transaction. A job that is being paid can be paused first, with payout_pause_job().")));
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_VOID();
}

void
payoutq_require_job(int64 job_id)
{
	static EngineStatement find = {
		"SELECT FROM payoutq.job WHERE id = $1", 1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id)};
	EngineState state;
	bool		found;

	SPI_connect();
	payoutq_engine_enter(&state);
	found = payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 1;
	payoutq_engine_leave(&state);
	SPI_finish();

	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("job " INT64_FORMAT " does not exist", job_id)));
}

static void
announce(int64 job_id, const char *event)
{
	static EngineStatement tell = {
		"SELECT payoutq.announce($1, $2)", 2, {INT8OID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), CStringGetTextDatum(event)};

	(void) payoutq_execute(&tell, values, NULL, SPI_OK_SELECT);
}
