/*
 * failure.c
 *		What an error means for the work that met it, and when to try again.
 */
#include "postgres.h"

#include "access/xact.h"
#include "common/pg_prng.h"
#include "miscadmin.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#include "payoutq.h"

/* A class names all its conditions unless a condition is named itself. */
typedef struct FailureRule
{
	int			sqlstate;
	bool		whole_class;
	FailureClass class;
} FailureRule;

static const FailureRule rules[] = {
	/* transaction rollback: deadlock, serialization failure */
	{ERRCODE_TRANSACTION_ROLLBACK, true, FAILURE_TRANSIENT},
	/* insufficient resources: disk full, out of memory, too many locks */
	{ERRCODE_INSUFFICIENT_RESOURCES, true, FAILURE_TRANSIENT},
	/* lock_timeout, NOWAIT */
	{ERRCODE_LOCK_NOT_AVAILABLE, false, FAILURE_TRANSIENT},
	/* statement_timeout, or somebody cancelled a statement of the worker */
	{ERRCODE_OPERATOR_INTERVENTION, true, FAILURE_TRANSIENT},
	{ERRCODE_CONNECTION_EXCEPTION, true, FAILURE_TRANSIENT},
	{ERRCODE_IO_ERROR, false, FAILURE_TRANSIENT},
	{ERRCODE_READ_ONLY_SQL_TRANSACTION, false, FAILURE_TRANSIENT},
	/* no such table, no permission: nobody can be paid */
	{ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION, true, FAILURE_CONFIGURATION},
	{ERRCODE_INVALID_SCHEMA_NAME, false, FAILURE_CONFIGURATION},
};

/* Anything that is not named is an error of the data. */
FailureClass
payoutq_classify(int sqlstate)
{
	for (size_t i = 0; i < lengthof(rules); i++)
	{
		int			s = rules[i].whole_class ? ERRCODE_TO_CATEGORY(sqlstate) : sqlstate;

		if (s == rules[i].sqlstate)
			return rules[i].class;
	}
	return FAILURE_DATA;
}

/*
 * Exponential backoff with a cap, and jitter of up to an eighth either way so
 * that batches which failed together do not come back together.
 */
TimestampTz
payoutq_retry_at(TimestampTz now, int attempts)
{
	double		delay = payoutq_retry_base;

	for (int i = 1; i < attempts && delay < payoutq_retry_cap; i++)
		delay *= 2;
	delay = Min(delay, payoutq_retry_cap);
	delay *= 0.875 + 0.25 * pg_prng_double(&pg_global_prng_state);
	return TimestampTzPlusMilliseconds(now, (int64) delay);
}

/* Runs it in a savepoint.  Returns NULL, or the error that it met. */
ErrorData *
payoutq_in_savepoint(void (*work) (void *arg), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		work(arg);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		error = payoutq_catch(context, owner);
	}
	PG_END_TRY();
	return error;
}

/*
 * For PG_CATCH: roll the current subtransaction back, return to the state in
 * which it was begun, and give the error to the caller.
 */
ErrorData *
payoutq_catch(MemoryContext context, ResourceOwner owner)
{
	ErrorData  *error;

	MemoryContextSwitchTo(context);
	error = CopyErrorData();
	FlushErrorState();

	RollbackAndReleaseCurrentSubTransaction();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;

	return error;
}

/* Whoever stops the server, or cancels his own statement, is obeyed. */
bool
payoutq_is_interrupt(const ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_ADMIN_SHUTDOWN ||
		error->sqlerrcode == ERRCODE_CRASH_SHUTDOWN ||
		(error->sqlerrcode == ERRCODE_QUERY_CANCELED && !payoutq_is_worker);
}
