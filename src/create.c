/*
 * create.c
 *		Creation of a job: payout_create_job() and payout_create_job_from().
 *
 * The functions are called with the rights of the caller, so that we know who
 * he is, and write with those of the extension's owner.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "common/cryptohash.h"
#include "common/int.h"
#include "common/sha2.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "payoutq.h"

#define DEFAULT_CURRENCY	"USD"
#define OUTSIDE				"@outside"
#define CHALLENGE			"@challenge:"

typedef struct JobSpec
{
	char	   *reference;
	char	   *query;			/* or winners */
	Winners		winners;
	bool		has_pool;
	int64		total_pool;
	int64		fee;
	bool		has_challenge;
	int64		challenge_id;
	char	   *currency;
	int32		priority;
	int32		batch_size;
	TimestampTz run_at;
	char	   *source_account;
	char	   *provider;
	Datum		metadata;
	bool		has_metadata;
	const char *created_by;
	Datum		settings;		/* text[]: name, value, ... for the query */
} JobSpec;

static void read_common_arguments(FunctionCallInfo fcinfo, int first, JobSpec *spec);
static char *text_argument(FunctionCallInfo fcinfo, int n, const char *value);
static void check_spec(JobSpec *spec);
static void check_source_account(const char *account);
static void refuse_stakes(int64 job_id, const char *source_account);
static Datum create_job(JobSpec *spec);
static int64 insert_job(const JobSpec *spec, bytea *hash);
static int64 existing_job(const JobSpec *spec, bytea *hash);
static bytea *hash_payload(const JobSpec *spec);
static void write_entries(const JobSpec *spec, int64 job_id);

/* A contest that nobody has won */
static const char *const null_winners = "An aggregate of no rows is null; without winners, create no job.";

PG_FUNCTION_INFO_V1(payout_create_job_jsonb);
PG_FUNCTION_INFO_V1(payout_create_job_arrays);
PG_FUNCTION_INFO_V1(payout_create_job_from);
PG_FUNCTION_INFO_V1(payoutq_read_winners_jsonb);
PG_FUNCTION_INFO_V1(payoutq_read_winners_arrays);

static void
require_argument(FunctionCallInfo fcinfo, int n, const char *name, const char *hint)
{
	if (PG_ARGISNULL(n))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be null", name),
				 hint ? errhint("%s", hint) : 0));
}

Datum
payout_create_job_jsonb(PG_FUNCTION_ARGS)
{
	JobSpec		spec = {0};

	require_argument(fcinfo, 1, "winners", null_winners);
	read_common_arguments(fcinfo, 2, &spec);
	payoutq_winners_from_jsonb(PG_GETARG_JSONB_P(1), &spec.winners);
	return create_job(&spec);
}

Datum
payout_create_job_arrays(PG_FUNCTION_ARGS)
{
	JobSpec		spec = {0};

	require_argument(fcinfo, 1, "user_ids", null_winners);
	require_argument(fcinfo, 2, "amounts", null_winners);
	read_common_arguments(fcinfo, 3, &spec);
	payoutq_winners_from_arrays(PG_GETARG_ARRAYTYPE_P(1), PG_GETARG_ARRAYTYPE_P(2),
								&spec.winners);
	return create_job(&spec);
}

Datum
payout_create_job_from(PG_FUNCTION_ARGS)
{
	JobSpec		spec = {0};

	require_argument(fcinfo, 1, "query", NULL);
	read_common_arguments(fcinfo, 2, &spec);
	spec.query = text_to_cstring(PG_GETARG_TEXT_PP(1));
	spec.settings = payoutq_query_settings();
	payoutq_check_query(spec.query);
	return create_job(&spec);
}

/* The arguments from total_pool on, which all forms share. */
static void
read_common_arguments(FunctionCallInfo fcinfo, int first, JobSpec *spec)
{
	spec->reference = text_argument(fcinfo, 0, NULL);
	spec->has_pool = !PG_ARGISNULL(first);
	spec->total_pool = spec->has_pool ? PG_GETARG_INT64(first) : 0;
	spec->fee = PG_ARGISNULL(first + 1) ? 0 : PG_GETARG_INT64(first + 1);
	spec->has_challenge = !PG_ARGISNULL(first + 2);
	spec->challenge_id = spec->has_challenge ? PG_GETARG_INT64(first + 2) : 0;
	spec->currency = text_argument(fcinfo, first + 3, DEFAULT_CURRENCY);
	spec->priority = PG_ARGISNULL(first + 4) ? 0 : PG_GETARG_INT32(first + 4);
	spec->batch_size = PG_ARGISNULL(first + 5) ? payoutq_batch_size : PG_GETARG_INT32(first + 5);
	spec->run_at = PG_ARGISNULL(first + 6) ? GetCurrentTransactionStartTimestamp() :
		PG_GETARG_TIMESTAMPTZ(first + 6);
	spec->source_account = text_argument(fcinfo, first + 7, OUTSIDE);
	spec->has_metadata = !PG_ARGISNULL(first + 9);
	spec->metadata = spec->has_metadata ? PG_GETARG_DATUM(first + 9) : (Datum) 0;
	spec->created_by = GetUserNameFromId(GetUserId(), false);

	spec->provider = text_argument(fcinfo, first + 8, NULL);
	if (spec->provider)
		payoutq_check_provider(spec->provider);
	check_spec(spec);
}

static char *
text_argument(FunctionCallInfo fcinfo, int n, const char *value)
{
	if (!PG_ARGISNULL(n))
		return text_to_cstring(PG_GETARG_TEXT_PP(n));
	return value ? pstrdup(value) : NULL;
}

static void
check_spec(JobSpec *spec)
{
	if (spec->reference == NULL || spec->reference[0] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reference must not be null or empty"),
				 errhint("It is the job's idempotency key: name what is being settled.")));
	if (strlen(spec->reference) > PAYOUTQ_MAX_NAME)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reference is too long"),
				 errdetail("It has %zu bytes; the limit is %d.",
						   strlen(spec->reference), PAYOUTQ_MAX_NAME)));
	if (strncmp(spec->reference, CHALLENGE, strlen(CHALLENGE)) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reference \"%s\" begins with \"%s\"", spec->reference, CHALLENGE),
				 errdetail("Such references are kept for the jobs of challenges.")));
	if (spec->currency[0] == '\0' || strlen(spec->currency) >= NAMEDATALEN)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("currency must have 1 to %d bytes", NAMEDATALEN - 1)));
	if (spec->batch_size < 1 || spec->batch_size > PAYOUTQ_MAX_BATCH_SIZE)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("batch_size must be between 1 and %d, not %d",
						PAYOUTQ_MAX_BATCH_SIZE, spec->batch_size)));
	if (spec->fee < 0)
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("platform_fee must not be negative")));
	check_source_account(spec->source_account);
}

static void
check_source_account(const char *account)
{
	if (account[0] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("source_account must not be empty")));
	if (account[0] == '@' && strcmp(account, OUTSIDE) != 0 &&
		strcmp(account, "@platform") != 0 && strncmp(account, CHALLENGE, strlen(CHALLENGE)) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("account \"%s\" cannot fund a job", account),
				 errhint("Use a user id, @outside, @platform or @challenge:<id>.")));
}

static Datum
create_job(JobSpec *spec)
{
	EngineState state;
	bytea	   *hash;
	int64		job_id;

	if (spec->query == NULL)
		(void) payoutq_needed_amount(spec->winners.total, spec->fee,
									 spec->has_pool, spec->total_pool);
	hash = hash_payload(spec);

	(void) payoutq_complain_of_version(ERROR);
	SPI_connect();
	payoutq_engine_enter(&state);
	job_id = insert_job(spec, hash);
	if (job_id == 0)
		job_id = existing_job(spec, hash);
	else if (spec->query == NULL)
		write_entries(spec, job_id);
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_INT64(job_id);
}

/* What the funding account has to give; an error if the pool is too small. */
int64
payoutq_needed_amount(int64 amounts, int64 fee, bool has_pool, int64 total_pool)
{
	int64		needed;

	if (pg_add_s64_overflow(amounts, fee, &needed))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("sum of the amounts and platform_fee is out of range for type bigint")));
	if (has_pool && needed > total_pool)
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("amounts and fee are above the pool"),
				 errdetail("Amounts of " INT64_FORMAT " and a fee of " INT64_FORMAT
						   " do not fit into a total_pool of " INT64_FORMAT ".",
						   amounts, fee, total_pool)));
	return needed;
}

/* Returns 0 if the reference is taken, after waiting for whoever takes it. */
static int64
insert_job(const JobSpec *spec, bytea *hash)
{
	static EngineStatement insert = {
		"INSERT INTO payoutq.job (reference, payload_hash, challenge_id, currency, source_account,"
		"       total_pool, platform_fee, query, settings, created_by, priority, batch_size,"
		"       run_at, metadata, origin, provider, bound)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,"
		"         EXISTS (SELECT FROM payoutq.binding b WHERE b.currency = $4))"
		" ON CONFLICT (reference) DO NOTHING RETURNING id",
		16, {TEXTOID, BYTEAOID, INT8OID, TEXTOID, TEXTOID, INT8OID, INT8OID, TEXTOID,
			TEXTARRAYOID, NAMEOID, INT4OID, INT4OID, TIMESTAMPTZOID, JSONBOID, TEXTOID, TEXTOID}, NULL
	};
	NameData	created_by;
	int64		pool = spec->has_pool ? spec->total_pool : spec->winners.total + spec->fee;
	bool		pool_known = spec->has_pool || spec->query == NULL;
	Datum		values[16];
	char		nulls[17] = "                ";

	namestrcpy(&created_by, spec->created_by);
	values[0] = CStringGetTextDatum(spec->reference);
	values[1] = PointerGetDatum(hash);
	values[2] = Int64GetDatum(spec->challenge_id);
	values[3] = CStringGetTextDatum(spec->currency);
	values[4] = CStringGetTextDatum(spec->source_account);
	values[5] = Int64GetDatum(pool);
	values[6] = Int64GetDatum(spec->fee);
	values[7] = spec->query ? CStringGetTextDatum(spec->query) : (Datum) 0;
	values[8] = spec->settings;
	values[9] = NameGetDatum(&created_by);
	values[10] = Int32GetDatum(spec->priority);
	values[11] = Int32GetDatum(spec->batch_size);
	values[12] = TimestampTzGetDatum(spec->run_at);
	values[13] = spec->metadata;
	values[14] = CStringGetTextDatum(payoutq_origin());
	values[15] = spec->provider ? CStringGetTextDatum(spec->provider) : (Datum) 0;
	nulls[2] = spec->has_challenge ? ' ' : 'n';
	nulls[5] = pool_known ? ' ' : 'n';
	nulls[7] = nulls[8] = spec->query ? ' ' : 'n';
	nulls[13] = spec->has_metadata ? ' ' : 'n';
	nulls[15] = spec->provider ? ' ' : 'n';

	if (payoutq_execute(&insert, values, nulls, SPI_OK_INSERT_RETURNING) == 0)
		return 0;
	return payoutq_result_int64(0, 1);
}

static int64
existing_job(const JobSpec *spec, bytea *hash)
{
	static EngineStatement find = {
		"SELECT id, payload_hash = $2 FROM payoutq.job WHERE reference = $1",
		2, {TEXTOID, BYTEAOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(spec->reference), PointerGetDatum(hash)};
	int64		job_id;
	bool		isnull;

	if (payoutq_execute(&find, values, NULL, SPI_OK_SELECT) != 1)
		elog(ERROR, "job of reference \"%s\" has vanished", spec->reference);
	job_id = payoutq_result_int64(0, 1);

	if (!DatumGetBool(payoutq_result(0, 2, &isnull)))
		ereport(ERROR,
				(errcode(ERRCODE_UNIQUE_VIOLATION),
				 errmsg("reference \"%s\" is taken by job " INT64_FORMAT, spec->reference, job_id),
				 errdetail("That job has another payload: winners or query, amounts, pool, fee, currency, challenge, source account or provider differ."),
				 errhint("Use a reference of its own for each settlement.")));
	return job_id;
}

/*
 * What makes two calls the same: who is paid how much, from where.  How it is
 * scheduled, and the metadata, may differ.
 */
static bytea *
hash_payload(const JobSpec *spec)
{
	pg_cryptohash_ctx *context = pg_cryptohash_create(PG_SHA256);
	bytea	   *hash = palloc(VARHDRSZ + PG_SHA256_DIGEST_LENGTH);
	const char *provider = spec->provider ? spec->provider : "";
	char	   *head = psprintf("1|%d|" INT64_FORMAT "|" INT64_FORMAT "|%d|" INT64_FORMAT "|%zu|%s|%zu|%s|%zu|%s|%s",
								spec->has_pool, spec->total_pool, spec->fee,
								spec->has_challenge, spec->challenge_id,
								strlen(spec->currency), spec->currency,
								strlen(spec->source_account), spec->source_account,
								strlen(provider), provider, spec->query ? spec->query : "");
	bool		ok = context != NULL && pg_cryptohash_init(context) == 0 &&
		pg_cryptohash_update(context, (uint8 *) head, strlen(head) + 1) == 0;

	for (int64 i = 0; ok && i < spec->winners.count; i++)
	{
		const Winner *w = &spec->winners.list[i];

		ok = pg_cryptohash_update(context, (const uint8 *) w->user_id, w->length) == 0 &&
			pg_cryptohash_update(context, (const uint8 *) "\0", 1) == 0 &&
			pg_cryptohash_update(context, (const uint8 *) &w->amount, sizeof(int64)) == 0;
	}
	SET_VARSIZE(hash, VARHDRSZ + PG_SHA256_DIGEST_LENGTH);
	if (!ok || pg_cryptohash_final(context, (uint8 *) VARDATA(hash), PG_SHA256_DIGEST_LENGTH) != 0)
		elog(ERROR, "could not compute the hash of a job's payload");
	pg_cryptohash_free(context);
	return hash;
}

static void
write_entries(const JobSpec *spec, int64 job_id)
{
	static EngineStatement complete = {
		"UPDATE payoutq.job SET amount = $2, total_winners = $3, batches = $4 WHERE id = $1",
		4, {INT8OID, INT8OID, INT4OID, INT4OID}, NULL
	};
	EntryWriter *writer = payoutq_entries_begin(job_id, spec->batch_size);
	int32		batches;

	payoutq_fund_job(job_id, spec->source_account, spec->currency,
					 spec->winners.total + spec->fee);
	for (int64 i = 0; i < spec->winners.count; i++)
	{
		const Winner *w = &spec->winners.list[i];

		payoutq_entries_add(writer, w->user_id, w->length, w->amount);
	}
	batches = payoutq_entries_end(writer, spec->run_at);
	{
		Datum		values[] = {Int64GetDatum(job_id), Int64GetDatum(spec->winners.total),
			Int32GetDatum((int32) spec->winners.count), Int32GetDatum(batches)};

		(void) payoutq_execute(&complete, values, NULL, SPI_OK_UPDATE);
	}
}

/* The escrow of a challenge is kept for what is decided of it. */
static void
refuse_stakes(int64 job_id, const char *source_account)
{
	static EngineStatement find = {
		"SELECT FROM payoutq.challenge"
		" WHERE id = CASE WHEN $2 ~ '^@challenge:[0-9]{1,18}$' THEN substr($2, 12)::bigint END"
		"   AND completed_at IS NULL AND job_id IS DISTINCT FROM $1",
		2, {INT8OID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), CStringGetTextDatum(source_account)};

	if (strncmp(source_account, CHALLENGE, strlen(CHALLENGE)) == 0 &&
		payoutq_execute(&find, values, NULL, SPI_OK_SELECT) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("account \"%s\" cannot fund a job", source_account),
				 errdetail("It holds the stakes of a challenge that is not completed.")));
}

/* From the source account into the job's escrow. */
void
payoutq_fund_job(int64 job_id, const char *source_account, const char *currency, int64 amount)
{
	static EngineStatement post = {
		"INSERT INTO payoutq.movement (kind, debit_account, credit_account, currency, amount, job_id)"
		" VALUES ('funding', $2, '@job:' || $1, $3, $4, $1)",
		4, {INT8OID, TEXTOID, TEXTOID, INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(job_id), CStringGetTextDatum(source_account),
		CStringGetTextDatum(currency), Int64GetDatum(amount)};

	refuse_stakes(job_id, source_account);
	payoutq_change_balance(source_account, currency, -amount);
	(void) payoutq_execute(&post, values, NULL, SPI_OK_INSERT);
}

static Datum
return_winners(FunctionCallInfo fcinfo, const Winners *winners)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;

	InitMaterializedSRF(fcinfo, 0);
	for (int64 i = 0; i < winners->count; i++)
	{
		const Winner *w = &winners->list[i];
		Datum		values[] = {Int32GetDatum((int32) i + 1),
			PointerGetDatum(cstring_to_text_with_len(w->user_id, w->length)),
			Int64GetDatum(w->amount)};
		bool		nulls[] = {false, false, false};

		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	return (Datum) 0;
}

/* (entry, user_id, amount) as they would be written */
Datum
payoutq_read_winners_jsonb(PG_FUNCTION_ARGS)
{
	Winners		winners;

	payoutq_winners_from_jsonb(PG_GETARG_JSONB_P(0), &winners);
	return return_winners(fcinfo, &winners);
}

Datum
payoutq_read_winners_arrays(PG_FUNCTION_ARGS)
{
	Winners		winners;

	payoutq_winners_from_arrays(PG_GETARG_ARRAYTYPE_P(0), PG_GETARG_ARRAYTYPE_P(1), &winners);
	return return_winners(fcinfo, &winners);
}
