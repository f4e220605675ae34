/*
 * account.c
 *		Balances of users and of system accounts.
 *
 * A user's balance is a row of payoutq.account, or of the application's table
 * that is bound to the currency (binding.c).  A system account (@...) has no
 * row: its balance is derived, so that no row is changed by everybody.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

#include "payoutq.h"

static void change_user(const char *account, const char *currency, int64 amount);
static void change_system(const char *account, const char *currency, int64 amount);
static void balance_too_low(const char *account, const char *currency, int64 amount);

PG_FUNCTION_INFO_V1(payoutq_change_balance_sql);
PG_FUNCTION_INFO_V1(payoutq_user_balance_sql);

/*
 * Credit the entries of a batch, in order of user_id.  Returns how many have
 * no account (then nothing may be kept of what was done), and which.
 *
 * MERGE: the outer join leaves no choice of plan but entries first and accounts
 * by index, whatever the statistics say; accounts that are not there are made
 * in the same pass, so locks are taken in one order.
 */
int
payoutq_credit_entries(const Claim *claim, int32 **missing)
{
	static EngineStatement credit = {
		"MERGE INTO payoutq.account a"
		" USING (SELECT user_id, amount FROM payoutq.entry"
		"         WHERE job_id = $1 AND seq BETWEEN $2 AND $3 ORDER BY seq) e"
		"    ON a.user_id = e.user_id AND a.currency = $4"
		"  WHEN MATCHED THEN UPDATE SET balance = a.balance + e.amount"
		"  WHEN NOT MATCHED THEN INSERT VALUES (e.user_id, $4, e.amount)",
		4, {INT8OID, INT4OID, INT4OID, TEXTOID}
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->first_seq), Int32GetDatum(claim->last_seq),
	CStringGetTextDatum(claim->currency)};
	uint64		expected = claim->last_seq - claim->first_seq + 1;
	uint64		credited;
	Binding		binding;

	if (payoutq_find_binding(claim->currency, &binding))
		return payoutq_credit_bound(&binding, claim, missing);

	credited = payoutq_execute(&credit, values, NULL, SPI_OK_MERGE);
	if (credited != expected)
		elog(ERROR, "credited " UINT64_FORMAT " of " UINT64_FORMAT " entries of batch %d of job " INT64_FORMAT,
			 credited, expected, claim->batch_no, claim->job_id);
	return 0;
}

/* Add the amount, which may be negative; nobody but @outside may go below zero. */
void
payoutq_change_balance(const char *account, const char *currency, int64 amount)
{
	Binding		binding;

	if (account[0] == '@')
		change_system(account, currency, amount);
	else if (!payoutq_find_binding(currency, &binding))
		change_user(account, currency, amount);
	else if (!payoutq_change_bound(&binding, account, amount))
		balance_too_low(account, currency, amount);
}

static void
change_user(const char *account, const char *currency, int64 amount)
{
	static EngineStatement take = {
		"UPDATE payoutq.account SET balance = balance + $3"
		" WHERE user_id = $1 AND currency = $2 AND balance + $3 >= 0",
		3, {TEXTOID, TEXTOID, INT8OID}
	};
	static EngineStatement give = {
		"INSERT INTO payoutq.account AS a VALUES ($1, $2, $3)"
		" ON CONFLICT (user_id, currency) DO UPDATE SET balance = a.balance + excluded.balance",
		3, {TEXTOID, TEXTOID, INT8OID}
	};
	Datum		values[] = {CStringGetTextDatum(account),
	CStringGetTextDatum(currency), Int64GetDatum(amount)};

	if (amount >= 0)
		(void) payoutq_execute(&give, values, NULL, SPI_OK_INSERT);
	else if (payoutq_execute(&take, values, NULL, SPI_OK_UPDATE) == 0)
		balance_too_low(account, currency, amount);
}

/*
 * The lock stands in for a row: two takers see each other's movements, and so
 * the balance is read with the latest snapshot at any isolation level.
 */
static void
change_system(const char *account, const char *currency, int64 amount)
{
	Oid			argtypes[] = {TEXTOID, TEXTOID};
	Datum		values[] = {CStringGetTextDatum(account),
	CStringGetTextDatum(currency)};
	SPIPlanPtr	plan;

	if (amount >= 0 || strcmp(account, "@outside") == 0)
		return;

	payoutq_lock_account(account, currency);
	plan = SPI_prepare("SELECT payoutq.system_balance($1, $2)", 2, argtypes);
	if (plan == NULL ||
		SPI_execute_snapshot(plan, values, NULL, GetLatestSnapshot(),
							 InvalidSnapshot, true, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not read the balance of \"%s\"", account);
	if (payoutq_result_int64(0, 1) < -amount)
		balance_too_low(account, currency, amount);
}

static void
balance_too_low(const char *account, const char *currency, int64 amount)
{
	ereport(ERROR,
			(errcode(ERRCODE_CHECK_VIOLATION),
			 errmsg("balance of account \"%s\" is too low", account),
			 errdetail(INT64_FORMAT " in %s were to be taken from it.",
					   -amount, currency)));
}

Datum
payoutq_change_balance_sql(PG_FUNCTION_ARGS)
{
	EngineState state;

	SPI_connect();
	payoutq_engine_enter(&state);
	payoutq_change_balance(text_to_cstring(PG_GETARG_TEXT_PP(0)),
						   text_to_cstring(PG_GETARG_TEXT_PP(1)),
						   PG_GETARG_INT64(2));
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_VOID();
}

/* The balance of a user, null when the account does not exist. */
Datum
payoutq_user_balance_sql(PG_FUNCTION_ARGS)
{
	static EngineStatement own = {
		"SELECT balance FROM payoutq.account WHERE user_id = $1 AND currency = $2",
		2, {TEXTOID, TEXTOID}
	};
	char	   *account = text_to_cstring(PG_GETARG_TEXT_PP(0));
	char	   *currency = text_to_cstring(PG_GETARG_TEXT_PP(1));
	EngineState state;
	Binding		binding;
	int64		balance = 0;
	bool		found;

	SPI_connect();
	payoutq_engine_enter(&state);
	if (payoutq_find_binding(currency, &binding))
		found = payoutq_bound_balance(&binding, account, &balance);
	else
	{
		Datum		values[] = {CStringGetTextDatum(account), CStringGetTextDatum(currency)};

		found = payoutq_execute(&own, values, NULL, SPI_OK_SELECT) == 1;
		if (found)
			balance = payoutq_result_int64(0, 1);
	}
	payoutq_engine_leave(&state);
	SPI_finish();

	if (!found)
		PG_RETURN_NULL();
	PG_RETURN_INT64(balance);
}
