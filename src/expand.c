/*
 * expand.c
 *		Write the entries of a job that was created without: those that the query
 *		of a payout_create_job_from() yields, or the shares of a challenge.
 *
 * The query is run by the worker, as the role that created the job and with the
 * search_path that role had, in a security-restricted operation; for a
 * superuser, as the predefined role pg_read_all_data.  It sees the database as
 * it is at that moment, in one snapshot, and its answer is read in slices and
 * written in one transaction: all of it, or nothing and another try.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/plancache.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"

#include "payoutq.h"

#define SLICE	10000

/* A query that was begun so often without an outcome is not run again. */
#define MAX_CRASHES	3

/* After a transient error a query waits as after so many of a batch. */
#define BACKOFF_STEPS	4

typedef struct Expansion
{
	int64		job_id;
	char	   *query;			/* NULL: the shares of a challenge */
	Datum		settings;		/* text[] of name, value, ... */
	char	   *created_by;
	char	   *currency;
	char	   *source_account;
	int32		batch_size;
	int64		fee;
	bool		has_pool;
	int64		total_pool;
	int32		attempts;

	/* the answer, or the reason why there is none */
	int64		entries;
	int64		total;
	int32		batches;
	ErrorData  *error;
} Expansion;

static void refuse_temporary_tables(List *relations);
static bool names_temporary_schema(const char *path);
static char *wrap_query(const char *query);
static bool load(Expansion *e, bool counted);
static void expand(void *arg);
static void record_failure(void *arg);
static void read_answer(Expansion *e);
static Portal open_shares(const Expansion *e);
static void become_creator(const Expansion *e, EngineState *ours);
static SPIPlanPtr prepare_query(const char *query);
static void write_slice(Expansion *e, EntryWriter *writer, StringInfo previous);
static void require_running(const Expansion *e);
static void complete(const Expansion *e);
static void try_again_later(const Expansion *e);

/* What payout_create_job_from() can already say, with the caller's rights. */
void
payoutq_check_query(const char *query)
{
	SPI_connect();
	(void) prepare_query(query);
	SPI_finish();
}

/* Also again when it is run: its tables may have changed since. */
static SPIPlanPtr
prepare_query(const char *query)
{
	SPIPlanPtr	plan = SPI_prepare(wrap_query(query), 0, NULL);
	List	   *sources;
	Oid			type;

	if (plan == NULL)
		elog(ERROR, "could not prepare the query: %s", SPI_result_code_string(SPI_result));
	sources = SPI_plan_get_plan_sources(plan);
	if (list_length(sources) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("query must be a single SELECT")));

	refuse_temporary_tables(((CachedPlanSource *) linitial(sources))->relationOids);
	type = TupleDescAttr(((CachedPlanSource *) linitial(sources))->resultDesc, 1)->atttypid;
	if (type != INT8OID && type != INT4OID && type != INT2OID)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("column \"amount\" of the query must be of type bigint, not %s",
						format_type_be(type)),
				 errhint("Cast it to bigint, in minor units.")));
	return plan;
}

/* Nobody else has them, but may have a table of that name. */
static void
refuse_temporary_tables(List *relations)
{
	ListCell   *cell;

	foreach(cell, relations)
		if (get_rel_persistence(lfirst_oid(cell)) == RELPERSISTENCE_TEMP)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("query reads temporary table \"%s\"", get_rel_name(lfirst_oid(cell))),
					 errdetail("It is run later, in another session."),
					 errhint("Use a permanent table, or payout_create_job() with arrays.")));
}

/*
 * What the query's names and literals mean to its creator: the schemas of his
 * search_path, with "$user" resolved, and how he writes times.  Temporary tables
 * of the session that runs it, which may be anybody's, come last.
 */
Datum
payoutq_query_settings(void)
{
	static const char *const names[] = {"TimeZone", "DateStyle", "IntervalStyle"};
	Datum		settings[2 * lengthof(names) + 2];
	int			count = 0;
	StringInfoData path;
	ListCell   *cell;

	initStringInfo(&path);
	foreach(cell, fetch_search_path(false))
	{
		/* A temporary schema is nobody else's. */
		if (isAnyTempNamespace(lfirst_oid(cell)))
			continue;
		appendStringInfo(&path, "%s, ", quote_identifier(get_namespace_name(lfirst_oid(cell))));
	}
	appendStringInfoString(&path, "pg_temp");
	settings[count++] = CStringGetTextDatum("search_path");
	settings[count++] = CStringGetTextDatum(path.data);
	for (size_t i = 0; i < lengthof(names); i++)
	{
		settings[count++] = CStringGetTextDatum(names[i]);
		settings[count++] = CStringGetTextDatum(GetConfigOptionByName(names[i], NULL, false));
	}
	return PointerGetDatum(construct_array(settings, count, TEXTOID, -1, false, TYPALIGN_INT));
}

/* Until the foreign code is left.  Paths that version 1.0.0 has stored lack pg_temp. */
void
payoutq_apply_settings(Datum settings)
{
	Datum	   *elements;
	int			count;

	deconstruct_array(DatumGetArrayTypeP(settings), TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, NULL, &count);
	for (int i = 0; i + 1 < count; i += 2)
	{
		char	   *name = TextDatumGetCString(elements[i]);
		char	   *value = TextDatumGetCString(elements[i + 1]);

		if (strcmp(name, "search_path") == 0 && !names_temporary_schema(value))
			value = psprintf("%s, pg_temp", value);
		payoutq_set_local(name, value);
	}
}

static bool
names_temporary_schema(const char *path)
{
	List	   *schemas;
	ListCell   *cell;

	if (!SplitIdentifierString(pstrdup(path), ',', &schemas))
		return false;
	foreach(cell, schemas)
		if (strcmp(lfirst(cell), "pg_temp") == 0)
			return true;
	return false;
}

/* COLLATE "C" is the order in which entries are numbered. */
static char *
wrap_query(const char *query)
{
	int			length = strlen(query);

	while (length > 0 && (query[length - 1] == ';' || isspace((unsigned char) query[length - 1])))
		length--;
	return psprintf("SELECT q.user_id::pg_catalog.text, q.amount AS amount FROM (\n%.*s\n) AS q"
					" ORDER BY q.user_id::pg_catalog.text COLLATE pg_catalog.\"C\"",
					length, query);
}

/*
 * Called in a transaction of its own.  Returns true when the job has its
 * entries now.  The attempt is counted before, in another transaction, so that
 * a query that kills the server is not run for ever.
 */
bool
payoutq_expand_job(ActiveJob *job, EngineState *state)
{
	Expansion	e = {.job_id = job->id};
	Claim		attempt = {.job_id = job->id, .batch_no = QUERY_OF_JOB};
	ErrorData  *obstacle;

	/* One at a time in a database: the other workers pay meanwhile. */
	if (!payoutq_lock_job(0, ExclusiveLock, false) || !load(&e, job->careful > 0))
		return false;
	if (e.attempts > MAX_CRASHES)
	{
		payoutq_fail_job(job->id, ERRCODE_CRASH_SHUTDOWN,
						 psprintf("the server or the worker was killed %d times while it wrote the entries",
								  e.attempts - 1));
		return false;
	}
	payoutq_attempt_counted(&attempt);
	payoutq_turn_commit(state);

	/* Not the job's: whoever cancels it need not wait for its query. */
	if (!payoutq_lock_extension() || !payoutq_lock_job(0, ExclusiveLock, false))
	{
		payoutq_take_attempt_back(&attempt);
		return false;
	}
	e.error = payoutq_in_savepoint(expand, &e);
	if (e.error == NULL)
	{
		payoutq_attempt_ended();
		return true;
	}
	if (payoutq_is_interrupt(e.error))
	{
		payoutq_take_attempt_back(&attempt);
		payoutq_turn_commit(state);
		ReThrowError(e.error);
	}
	payoutq_worker_error(e.error->message);
	obstacle = payoutq_in_savepoint(record_failure, &e);
	if (obstacle)
	{
		if (payoutq_is_interrupt(obstacle) || payoutq_classify(obstacle->sqlerrcode) != FAILURE_TRANSIENT)
			ReThrowError(obstacle);
		ereport(WARNING,
				(errcode(obstacle->sqlerrcode),
				 errmsg("entries of job " INT64_FORMAT " were not written, and why could not be recorded: %s",
						job->id, obstacle->message),
				 obstacle->hint ? errhint("%s", obstacle->hint) : 0));
		payoutq_attempt_counted(&attempt);	/* again: the savepoint has undone it */
		if (!payoutq_forget_attempt())
			job->careful = 0;
	}
	return false;
}

static void
record_failure(void *arg)
{
	Expansion  *e = arg;
	Claim		attempt = {.job_id = e->job_id, .batch_no = QUERY_OF_JOB};

	/* First what waits for the job's row. */
	if (payoutq_classify(e->error->sqlerrcode) == FAILURE_TRANSIENT)
		try_again_later(e);
	else
		payoutq_fail_job(e->job_id, e->error->sqlerrcode, e->error->message);
	payoutq_take_attempt_back(&attempt);
}

static bool
load(Expansion *e, bool counted)
{
	static EngineStatement begin = {
		"UPDATE payoutq.job SET attempts = attempts + $2"
		" WHERE id = $1 AND status = 'running' AND total_winners IS NULL"
		" RETURNING query, settings, created_by, currency, source_account, batch_size,"
		"           platform_fee, total_pool, attempts",
		2, {INT8OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(e->job_id), Int32GetDatum(counted ? 1 : 0)};
	bool		isnull;

	if (payoutq_execute(&begin, values, NULL, SPI_OK_UPDATE_RETURNING) == 0)
		return false;
	e->query = payoutq_result_cstring(0, 1);
	if (e->query)
		e->settings = PointerGetDatum(DatumGetArrayTypePCopy(payoutq_result(0, 2, &isnull)));
	e->created_by = payoutq_result_cstring(0, 3);
	e->currency = payoutq_result_cstring(0, 4);
	e->source_account = payoutq_result_cstring(0, 5);
	e->batch_size = (int32) payoutq_result_int64(0, 6);
	e->fee = payoutq_result_int64(0, 7);
	(void) payoutq_result(0, 8, &isnull);
	e->has_pool = !isnull;
	e->total_pool = payoutq_result_int64(0, 8);
	e->attempts = (int32) payoutq_result_int64(0, 9);
	return true;
}

static void
expand(void *arg)
{
	Expansion  *e = arg;

	read_answer(e);
	require_running(e);
	payoutq_fund_job(e->job_id, e->source_account, e->currency,
					 payoutq_needed_amount(e->total, e->fee, e->has_pool, e->total_pool));
	complete(e);
}

static void
read_answer(Expansion *e)
{
	EntryWriter *writer;
	StringInfoData previous;
	EngineState ours;
	Portal		portal;

	initStringInfo(&previous);
	writer = payoutq_entries_begin(e->job_id, e->batch_size);

	if (e->query)
	{
		become_creator(e, &ours);
		portal = SPI_cursor_open(NULL, prepare_query(e->query), NULL, NULL, false);
	}
	else
		portal = open_shares(e);
	for (;;)
	{
		SPI_cursor_fetch(portal, true, SLICE);
		if (SPI_processed == 0)
			break;
		write_slice(e, writer, &previous);
		SPI_freetuptable(SPI_tuptable);
	}
	SPI_cursor_close(portal);
	if (e->query)
		payoutq_foreign_leave(&ours);

	if (e->entries == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a job needs at least one winner"),
				 errdetail("The query returned no row.")));
	e->batches = payoutq_entries_end(writer, GetCurrentTimestamp());
}

/* No stake comes in any more, so that each try finds the same. */
static Portal
open_shares(const Expansion *e)
{
	static EngineStatement shares = {
		"SELECT user_id, amount FROM payoutq.challenge_shares($1) ORDER BY user_id COLLATE \"C\"",
		1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(e->job_id)};

	return SPI_cursor_open(NULL, payoutq_plan(&shares), values, NULL, false);
}

/* His settings are pinned no more than his session's would be. */
static void
become_creator(const Expansion *e, EngineState *ours)
{
	static const char *const plans[] = {"enable_hashjoin", "enable_mergejoin", "enable_seqscan",
	"enable_bitmapscan", "enable_material"};
	Oid			role = get_role_oid(e->created_by, true);
	bool		superuser = OidIsValid(role) && superuser_arg(role);

	if (!OidIsValid(role))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("role \"%s\", which created the job, does not exist", e->created_by)));

	payoutq_foreign_enter(ours, superuser ? ROLE_PG_READ_ALL_DATA : role);
	for (size_t i = 0; i < lengthof(plans); i++)
		payoutq_set_local(plans[i], "on");
	payoutq_apply_settings(e->settings);

	/* Rows that a policy would hide are an error, not a smaller payout. */
	if (superuser)
		payoutq_set_local("row_security", "off");
}

static void
write_slice(Expansion *e, EntryWriter *writer, StringInfo previous)
{
	TupleDesc	desc = SPI_tuptable->tupdesc;
	Oid			type = TupleDescAttr(desc, 1)->atttypid;

	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool		no_user;
		bool		no_amount;
		Datum		user = SPI_getbinval(SPI_tuptable->vals[i], desc, 1, &no_user);
		Datum		value = SPI_getbinval(SPI_tuptable->vals[i], desc, 2, &no_amount);
		text	   *user_id;
		char	   *data;
		int			length;
		int64		amount;

		e->entries++;
		if (no_user || no_amount)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("\"%s\" must not be null", no_user ? "user_id" : "amount")));
		user_id = DatumGetTextPP(user);
		data = VARDATA_ANY(user_id);
		length = VARSIZE_ANY_EXHDR(user_id);
		amount = type == INT8OID ? DatumGetInt64(value) :
			type == INT4OID ? DatumGetInt32(value) : DatumGetInt16(value);

		payoutq_check_user_id(data, length, e->entries);
		if (e->entries > 1 &&
			payoutq_compare_users(data, length, previous->data, previous->len) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_UNIQUE_VIOLATION),
					 errmsg("user \"%s\" is in the job twice", previous->data)));
		e->total = payoutq_add_amount(e->total, amount, e->entries);
		payoutq_entries_add(writer, data, length, amount);

		resetStringInfo(previous);
		appendBinaryStringInfo(previous, data, length);
	}
}

/* From here on nobody changes its state. */
static void
require_running(const Expansion *e)
{
	static EngineStatement find = {
		"SELECT FROM payoutq.job WHERE id = $1 AND status = 'running'", 1, {INT8OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(e->job_id)};

	(void) payoutq_lock_job(e->job_id, ShareLock, true);
	if (payoutq_select_latest(&find, values) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("job " INT64_FORMAT " was paused or cancelled while its entries were written", e->job_id)));
}

static void
complete(const Expansion *e)
{
	static EngineStatement update = {
		"UPDATE payoutq.job SET amount = $2, total_winners = $3, batches = $4,"
		"       total_pool = coalesce(total_pool, $2 + platform_fee),"
		"       attempts = greatest(attempts - 1, 0), error_code = NULL, error = NULL"
		" WHERE id = $1 AND total_winners IS NULL",
		4, {INT8OID, INT8OID, INT4OID, INT4OID}, NULL
	};
	Datum		values[] = {Int64GetDatum(e->job_id), Int64GetDatum(e->total),
		Int32GetDatum((int32) e->entries), Int32GetDatum(e->batches)};

	if (payoutq_execute(&update, values, NULL, SPI_OK_UPDATE) != 1)
		elog(ERROR, "job " INT64_FORMAT " has its entries already", e->job_id);
}

static void
try_again_later(const Expansion *e)
{
	static EngineStatement wait = {
		"UPDATE payoutq.job SET run_at = $2, error_code = $3, error = $4"
		" WHERE id = $1 AND status = 'running'",
		4, {INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID}, NULL
	};
	Datum		values[] = {Int64GetDatum(e->job_id),
		TimestampTzGetDatum(payoutq_retry_at(GetCurrentTimestamp(), BACKOFF_STEPS)),
		CStringGetTextDatum(unpack_sql_state(e->error->sqlerrcode)),
		CStringGetTextDatum(e->error->message)};

	(void) payoutq_execute(&wait, values, NULL, SPI_OK_UPDATE);
}
