/*
 * transfer.c
 *		The states of a transfer, and the application's callback.
 *
 *		pending --> processing --> sent --> completed
 *		   ^           |            +-----> confirmation_failed
 *		   |           +--> completed
 *		retryable <----+   transient
 *		               +--> unknown          no answer: the same key again
 *		               +--> failed_terminal
 *
 * From failed_terminal and confirmation_failed an operator leads back to
 * pending, under a new key.  Everything else in SQL changes states only through
 * an UPDATE that this guards.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "payoutq.h"

/* Callbacks in one transaction */
#define CALLBACKS_AT_ONCE	20

/* There is no such job. */
#define CALLBACK_LOCK		INT64CONST(-1)

/* How long they are left to whoever is at them. */
#define OTHERS_MS			1000
static TimestampTz others_until = 0;

/* Unless the server has no room for a helper, or it is long at something else. */
#define HELPER_MS			5000

typedef struct Transition
{
	const char *from;
	const char *to;
} Transition;

static const Transition transitions[] = {
	{"pending", "processing"},
	{"pending", "failed_terminal"}, /* the job was cancelled */
	{"pending", "sent"},		/* the original of a restored copy has sent it */
	{"retryable", "sent"},
	{"retryable", "processing"},
	{"retryable", "failed_terminal"},
	{"unknown", "processing"},
	{"unknown", "sent"},		/* found at the provider */
	{"unknown", "completed"},
	{"unknown", "failed_terminal"},
	{"unknown", "pending"},	/* not found at the provider: a new generation */
	{"processing", "pending"},	/* the provider had no money: a new generation */
	{"processing", "sent"},
	{"processing", "completed"},
	{"processing", "retryable"},
	{"processing", "unknown"},
	{"processing", "failed_terminal"},
	{"sent", "completed"},
	{"sent", "confirmation_failed"},
	{"failed_terminal", "pending"}, /* a new generation */
	{"confirmation_failed", "pending"},
};

static Oid	callback_oid(const char *signature);
static Oid	callback_owner(Oid callback);
static void complete(int64 transfer_id);
static void try_to_complete(void *arg);
static bool leave_to_helper(TimestampTz due, TimestampTz now);

PG_FUNCTION_INFO_V1(payoutq_check_transition);
PG_FUNCTION_INFO_V1(payout_on_confirm);
PG_FUNCTION_INFO_V1(payoutq_call_confirm_callback);

/* Trigger: BEFORE UPDATE of payoutq.transfer, when the status changes. */
Datum
payoutq_check_transition(PG_FUNCTION_ARGS)
{
	TriggerData *data = (TriggerData *) fcinfo->context;
	TupleDesc	desc = data->tg_relation->rd_att;
	int			column = SPI_fnumber(desc, "status");
	char	   *from = SPI_getvalue(data->tg_trigtuple, desc, column);
	char	   *to = SPI_getvalue(data->tg_newtuple, desc, column);

	for (size_t i = 0; i < lengthof(transitions); i++)
		if (strcmp(from, transitions[i].from) == 0 && strcmp(to, transitions[i].to) == 0)
			return PointerGetDatum(data->tg_newtuple);

	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("a transfer cannot go from \"%s\" to \"%s\"", from, to)));
}

/* payout_on_confirm(provider, callback): with the rights of the caller */
Datum
payout_on_confirm(PG_FUNCTION_ARGS)
{
	static EngineStatement set = {
		"INSERT INTO payoutq.confirm_callback VALUES ($1, $2, $3)"
		" ON CONFLICT (provider) DO UPDATE SET callback = excluded.callback, settings = excluded.settings",
		3, {TEXTOID, TEXTOID, TEXTARRAYOID}, NULL
	};
	static EngineStatement unset = {
		"DELETE FROM payoutq.confirm_callback WHERE provider = $1", 1, {TEXTOID}, NULL
	};
	Datum		values[3];
	EngineState state;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("provider must not be null")));
	payoutq_check_provider(text_to_cstring(PG_GETARG_TEXT_PP(0)));
	values[0] = PG_GETARG_DATUM(0);
	if (!PG_ARGISNULL(1))
	{
		Oid			callback = PG_GETARG_OID(1);
		Oid			owner = callback_owner(callback);	/* or there is none */
		Oid		   *argtypes;
		int			nargs;

		(void) get_func_signature(callback, &argtypes, &nargs);
		if (nargs != 1 || argtypes[0] != INT8OID || get_func_prokind(callback) != PROKIND_FUNCTION ||
			isAnyTempNamespace(get_func_namespace(callback)))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s cannot be a callback", format_procedure(callback)),
					 errdetail("It must be a permanent function with one argument of type bigint.")));
		if (!has_privs_of_role(GetUserId(), owner))
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("must be owner of function %s", format_procedure(callback))));
		values[1] = CStringGetTextDatum(format_procedure_qualified(callback));
		values[2] = payoutq_query_settings();
	}

	(void) payoutq_complain_of_version(ERROR);
	SPI_connect();
	payoutq_engine_enter(&state);
	if (PG_ARGISNULL(1))
		(void) payoutq_execute(&unset, values, NULL, SPI_OK_DELETE);
	else
		(void) payoutq_execute(&set, values, NULL, SPI_OK_INSERT);
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_VOID();
}

/* As the owner of the function, in a security-restricted operation. */
Datum
payoutq_call_confirm_callback(PG_FUNCTION_ARGS)
{
	static EngineStatement find = {
		"SELECT callback, settings FROM payoutq.confirm_callback WHERE provider = $1", 1, {TEXTOID}, NULL
	};
	Datum		values[] = {PG_GETARG_DATUM(1)};
	Datum		transfer[] = {PG_GETARG_DATUM(0)};
	Oid			argtypes[] = {INT8OID};
	EngineState ours;
	EngineState theirs;

	SPI_connect();
	payoutq_engine_enter(&ours);
	if (payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 1)
	{
		Oid			callback = callback_oid(payoutq_result_cstring(0, 1));
		char	   *call = psprintf("SELECT %s($1)",
									quote_qualified_identifier(get_namespace_name(get_func_namespace(callback)),
															   get_func_name(callback)));
		bool		isnull;
		Datum		settings = PointerGetDatum(DatumGetArrayTypePCopy(payoutq_result(0, 2, &isnull)));

		payoutq_foreign_enter(&theirs, callback_owner(callback));
		payoutq_apply_settings(settings);
		if (SPI_execute_with_args(call, 1, argtypes, transfer, NULL, false, 0) < 0)
			elog(ERROR, "could not call \"%s\"", call);
		payoutq_foreign_leave(&theirs);
	}
	payoutq_engine_leave(&ours);
	SPI_finish();
	PG_RETURN_VOID();
}

static Oid
callback_oid(const char *signature)
{
	return DatumGetObjectId(DirectFunctionCall1(regprocedurein, CStringGetDatum(signature)));
}

static Oid
callback_owner(Oid callback)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(callback));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function with OID %u does not exist", callback)));
	owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
	ReleaseSysCache(tuple);
	return owner;
}

/*
 * Complete what the provider has confirmed, with the callback that a dispatcher
 * has left to us, or that has failed.  Called by whoever looks for work.  One
 * process at a time, and rather not the resident, so that a callback that hangs
 * leaves the others to pay; pg_cancel_backend() makes it fail.
 */
void
payoutq_call_callbacks(void)
{
	static EngineStatement due = {
		"SELECT id FROM payoutq.transfer"
		" WHERE status = 'sent' AND confirmed_at IS NOT NULL AND run_after <= clock_timestamp()"
		" ORDER BY run_after LIMIT $1 FOR UPDATE SKIP LOCKED",
		1, {INT4OID}, NULL
	};
	Datum		values[] = {Int32GetDatum(CALLBACKS_AT_ONCE)};
	TimestampTz next = payoutq_callbacks_due();
	TimestampTz now = GetCurrentTimestamp();
	int64		ids[CALLBACKS_AT_ONCE];
	int			count = 0;

	if (next == 0 || next > now)
		return;
	if (!leave_to_helper(next, now) && payoutq_lock_job(CALLBACK_LOCK, ExclusiveLock, false))
		count = payoutq_execute(&due, values, NULL, SPI_OK_SELECT);
	if (count == 0)
		others_until = TimestampTzPlusMilliseconds(now, OTHERS_MS);
	for (int i = 0; i < count; i++)
		ids[i] = payoutq_result_int64(i, 1);
	for (int i = 0; i < count; i++)
		complete(ids[i]);
}

static bool
leave_to_helper(TimestampTz due, TimestampTz now)
{
	if (payoutq_my_slot == NULL || !payoutq_my_slot->resident || payoutq_workers < 2)
		return false;
	(void) payoutq_call_for_help(MyDatabaseId);
	return !TimestampDifferenceExceeds(due, now, HELPER_MS);
}

/* Whatever goes wrong with one transfer is not to stop the others, nor payouts. */
static void
complete(int64 transfer_id)
{
	static EngineStatement postpone = {
		"SELECT payoutq.postpone_callback($1, $2)", 2, {INT8OID, TEXTOID}, NULL
	};
	Datum		values[2] = {Int64GetDatum(transfer_id)};
	ErrorData  *error = payoutq_in_savepoint(try_to_complete, &transfer_id);

	if (error == NULL)
		return;
	if (payoutq_is_interrupt(error))
		ReThrowError(error);
	values[1] = CStringGetTextDatum(error->message);
	(void) payoutq_execute(&postpone, values, NULL, SPI_OK_SELECT);
}

static void
try_to_complete(void *arg)
{
	static EngineStatement one = {
		"SELECT payoutq.complete_transfer(t) FROM payoutq.transfer t WHERE t.id = $1", 1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(*(int64 *) arg)};

	(void) payoutq_execute(&one, values, NULL, SPI_OK_SELECT);
}

/* When the next of them is due; 0: there is none. */
TimestampTz
payoutq_callbacks_due(void)
{
	static EngineStatement next = {
		"SELECT run_after FROM payoutq.transfer WHERE status = 'sent' AND confirmed_at IS NOT NULL"
		" ORDER BY run_after LIMIT 1",
		0, {0}, NULL
	};
	bool		isnull;

	if (payoutq_execute(&next, NULL, NULL, SPI_OK_SELECT) == 0)
		return 0;
	return Max(others_until, DatumGetTimestampTz(payoutq_result(0, 1, &isnull)));
}
