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
#include "utils/lsyscache.h"

#include "utils/array.h"
#include "payoutq.h"

/* The batch that is being paid, for payoutq.amount_due(). */
typedef struct AmountsDue
{
	const BatchEntries *entries;
	int			next;
} AmountsDue;

static AmountsDue *amounts_due = NULL;

static int	credit_own(const Claim *claim, const BatchEntries *entries);
static void credit_or_open(const Claim *claim, const BatchEntries *entries);
static void change_user(const char *account, const char *currency, int64 amount);
static void change_system(const char *account, const char *currency, int64 amount);
static int64 latest_system_balance(const char *account, const char *currency);
static void balance_too_low(const char *account, const char *currency, int64 amount);

PG_FUNCTION_INFO_V1(payoutq_change_balance_sql);
PG_FUNCTION_INFO_V1(payoutq_latest_balance_sql);
PG_FUNCTION_INFO_V1(payoutq_user_balance_sql);
PG_FUNCTION_INFO_V1(payoutq_amount_due);

/*
 * Credit the entries of a batch, in order of user_id.  Returns how many have
 * no account (then nothing may be kept of what was done), and which.
 */
int
payoutq_credit_entries(const Claim *claim, bool one_pass, int32 **missing)
{
	Binding		binding;
	BatchEntries entries;

	payoutq_read_entries(claim, &entries);
	if (payoutq_find_binding(claim->currency, &binding))
		return payoutq_credit_bound(&binding, claim, &entries, missing);

	if (one_pass)
	{
		credit_or_open(claim, &entries);
		return 0;
	}
	return credit_own(claim, &entries);
}

/* The entries of the claimed range, as arrays in order of user_id. */
void
payoutq_read_entries(const Claim *claim, BatchEntries *entries)
{
	static EngineStatement read = {
		"SELECT array_agg(user_id), array_agg(amount)"
		"  FROM (SELECT user_id, amount FROM payoutq.entry"
		"         WHERE job_id = $1 AND seq BETWEEN $2 AND $3 ORDER BY seq) e",
		3, {INT8OID, INT4OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(claim->job_id),
		Int32GetDatum(claim->first_seq), Int32GetDatum(claim->last_seq)};
	int			expected = claim->last_seq - claim->first_seq + 1;
	bool		isnull;
	int			amounts = 0;

	(void) payoutq_execute(&read, values, NULL, SPI_OK_SELECT);
	entries->users = payoutq_result(0, 1, &isnull);
	entries->amounts = payoutq_result(0, 2, &isnull);
	entries->count = 0;
	if (!isnull)
	{
		deconstruct_array(DatumGetArrayTypeP(entries->users), TEXTOID, -1, false,
						  TYPALIGN_INT, &entries->user, NULL, &entries->count);
		deconstruct_array(DatumGetArrayTypeP(entries->amounts), INT8OID, sizeof(int64),
						  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE, &entries->amount, NULL, &amounts);
	}
	if (entries->count != expected || amounts != expected)
		elog(ERROR, "batch %d of job " INT64_FORMAT " has %d entries, not %d",
			 claim->batch_no, claim->job_id, entries->count, expected);
}

/*
 * The accounts are found by one scan of their index with all user ids, in its
 * order, which is that of the entries; payoutq.amount_due() goes along with it,
 * as a merge join would.  That is a quarter faster than joining the entries in
 * SQL, and leaves no choice of plan.
 *
 * Where some accounts are not there yet, another statement has to make them,
 * and all is done again by that one: two passes would lock accounts in another
 * order than those of other workers.
 */
static int
credit_own(const Claim *claim, const BatchEntries *entries)
{
	static EngineStatement credit = {
		"UPDATE payoutq.account SET balance = balance + payoutq.amount_due(user_id)"
		" WHERE user_id = ANY ($1) AND currency = $2",
		2, {TEXTARRAYOID, TEXTOID}, NULL
	};
	AmountsDue	state = {.entries = entries};
	Datum		values[] = {entries->users, CStringGetTextDatum(claim->currency)};
	uint64		credited;

	amounts_due = &state;
	PG_TRY();
	{
		credited = payoutq_execute(&credit, values, NULL, SPI_OK_UPDATE);
	}
	PG_FINALLY();
	{
		amounts_due = NULL;
	}
	PG_END_TRY();

	if (credited == (uint64) entries->count)
		return 0;
	if (credited > 0)
		return CREDIT_AGAIN;
	credit_or_open(claim, entries);
	return 0;
}

static void
credit_or_open(const Claim *claim, const BatchEntries *entries)
{
	static EngineStatement open = {
		"INSERT INTO payoutq.account AS a"
		" SELECT e.user_id, $3, e.amount FROM unnest($1, $2) AS e (user_id, amount)"
		" ON CONFLICT (user_id, currency) DO UPDATE SET balance = a.balance + excluded.balance",
		3, {TEXTARRAYOID, INT8ARRAYOID, TEXTOID}, NULL
	};
	Datum		values[] = {entries->users, entries->amounts,
	CStringGetTextDatum(claim->currency)};
	uint64		credited = payoutq_execute(&open, values, NULL, SPI_OK_INSERT);

	if (credited != (uint64) entries->count)
		elog(ERROR, "credited " UINT64_FORMAT " of %d entries of batch %d of job " INT64_FORMAT,
			 credited, entries->count, claim->batch_no, claim->job_id);
}

/*
 * payoutq.amount_due(user_id): what the batch that is being paid owes the user.
 * Accounts come in the order of the entries, so the next one is nearly always
 * at hand; a row that was waited for is asked for again.
 */
Datum
payoutq_amount_due(PG_FUNCTION_ARGS)
{
	text	   *user = PG_GETARG_TEXT_PP(0);
	const BatchEntries *entries;

	if (amounts_due == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("no batch is being paid")));

	entries = amounts_due->entries;
	for (int tried = 0; tried < entries->count; tried++)
	{
		int			i = (amounts_due->next + tried) % entries->count;
		text	   *candidate = DatumGetTextPP(entries->user[i]);

		if (payoutq_compare_users(VARDATA_ANY(user), VARSIZE_ANY_EXHDR(user),
								  VARDATA_ANY(candidate), VARSIZE_ANY_EXHDR(candidate)) != 0)
			continue;
		amounts_due->next = i + 1;
		PG_RETURN_INT64(DatumGetInt64(entries->amount[i]));
	}
	elog(ERROR, "the batch owes nothing to user \"%s\"", text_to_cstring(user));
	PG_RETURN_NULL();			/* keep the compiler quiet */
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
	{
		if (amount < 0)
			balance_too_low(account, currency, amount);
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("account \"%s\" does not exist in table \"%s\"",
						account, get_rel_name(binding.table))));
	}
}

static void
change_user(const char *account, const char *currency, int64 amount)
{
	static EngineStatement take = {
		"UPDATE payoutq.account SET balance = balance + $3"
		" WHERE user_id = $1 AND currency = $2 AND balance + $3 >= 0",
		3, {TEXTOID, TEXTOID, INT8OID}, NULL
	};
	static EngineStatement give = {
		"INSERT INTO payoutq.account AS a VALUES ($1, $2, $3)"
		" ON CONFLICT (user_id, currency) DO UPDATE SET balance = a.balance + excluded.balance",
		3, {TEXTOID, TEXTOID, INT8OID}, NULL
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
	if (amount >= 0 || strcmp(account, "@outside") == 0)
		return;

	payoutq_lock_account(account, currency);
	if (latest_system_balance(account, currency) < -amount)
		balance_too_low(account, currency, amount);
}

static int64
latest_system_balance(const char *account, const char *currency)
{
	static EngineStatement balance = {
		"SELECT payoutq.system_balance($1, $2)", 2, {TEXTOID, TEXTOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(account), CStringGetTextDatum(currency)};

	(void) payoutq_select_latest(&balance, values);
	return payoutq_result_int64(0, 1);
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

	(void) payoutq_complain_of_version(ERROR);
	SPI_connect();
	payoutq_engine_enter(&state);
	payoutq_change_balance(text_to_cstring(PG_GETARG_TEXT_PP(0)),
						   text_to_cstring(PG_GETARG_TEXT_PP(1)),
						   PG_GETARG_INT64(2));
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_VOID();
}

Datum
payoutq_latest_balance_sql(PG_FUNCTION_ARGS)
{
	EngineState state;
	int64		balance;

	SPI_connect();
	payoutq_engine_enter(&state);
	balance = latest_system_balance(text_to_cstring(PG_GETARG_TEXT_PP(0)),
									text_to_cstring(PG_GETARG_TEXT_PP(1)));
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_INT64(balance);
}

/* The balance of a user, null when the account does not exist. */
Datum
payoutq_user_balance_sql(PG_FUNCTION_ARGS)
{
	static EngineStatement own = {
		"SELECT balance FROM payoutq.account WHERE user_id = $1 AND currency = $2",
		2, {TEXTOID, TEXTOID}, NULL
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
