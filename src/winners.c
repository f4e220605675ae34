/*
 * winners.c
 *		Who is paid how much: read what the caller gave, check it, and bring it
 *		into the one order that the rest relies on.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/int.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/numeric.h"

#include "compat.h"
#include "payoutq.h"

static void refuse_too_many(int64 count);
static void allocate(Winners *winners, int64 count);
static void add(Winners *winners, const char *user_id, int length, int64 amount);
static void sort_and_check(Winners *winners);
static int	compare_winners(const void *a, const void *b, void *arg);
static void add_json_winner(Winners *winners, JsonbContainer *object);
static int64 json_amount(Numeric number, int64 position);
static JsonbValue *json_field(JsonbContainer *object, const char *name, int64 position);
pg_noreturn static void malformed(int64 position, const char *detail);

void
payoutq_winners_from_arrays(ArrayType *users, ArrayType *amounts, Winners *winners)
{
	Datum	   *ids;
	Datum	   *values;
	bool	   *id_nulls;
	bool	   *value_nulls;
	int			count;
	int			value_count;

	if (ARR_NDIM(users) > 1 || ARR_NDIM(amounts) > 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user_ids and amounts must be one-dimensional arrays")));
	refuse_too_many(ArrayGetNItems(ARR_NDIM(users), ARR_DIMS(users)));
	refuse_too_many(ArrayGetNItems(ARR_NDIM(amounts), ARR_DIMS(amounts)));
	deconstruct_array(users, TEXTOID, -1, false, TYPALIGN_INT, &ids, &id_nulls, &count);
	deconstruct_array(amounts, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE,
					  &values, &value_nulls, &value_count);
	if (count != value_count)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user_ids and amounts must have the same length"),
				 errdetail("They have %d and %d elements.", count, value_count)));

	allocate(winners, count);
	for (int i = 0; i < count; i++)
	{
		if (id_nulls[i] || value_nulls[i])
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s[%d] must not be null", id_nulls[i] ? "user_ids" : "amounts", i + 1)));
		add(winners, VARDATA_ANY(DatumGetPointer(ids[i])),
			VARSIZE_ANY_EXHDR(DatumGetPointer(ids[i])), DatumGetInt64(values[i]));
	}
	sort_and_check(winners);
}

/* [{"user_id": "u1", "amount": 100}, ...]; other keys are left alone */
void
payoutq_winners_from_jsonb(Jsonb *json, Winners *winners)
{
	JsonbIterator *iterator;
	JsonbIteratorToken token;
	JsonbValue	value;
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext scratch;

	if (!JB_ROOT_IS_ARRAY(json) || JB_ROOT_IS_SCALAR(json))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TEXT_REPRESENTATION),
				 errmsg("winners must be a JSON array"),
				 errhint("Write them as [{\"user_id\": \"u1\", \"amount\": 100}].")));

	refuse_too_many(JB_ROOT_COUNT(json));
	allocate(winners, JB_ROOT_COUNT(json));

	/* What one winner needs meanwhile; his name stays in the argument. */
	scratch = AllocSetContextCreate(caller, "payoutq winner", ALLOCSET_SMALL_SIZES);
	iterator = JsonbIteratorInit(&json->root);
	token = JsonbIteratorNext(&iterator, &value, true);
	Assert(token == WJB_BEGIN_ARRAY);
	while ((token = JsonbIteratorNext(&iterator, &value, true)) == WJB_ELEM)
	{
		if (value.type != jbvBinary || !JsonContainerIsObject(value.val.binary.data))
			malformed(winners->count + 1, "It is not an object.");
		MemoryContextSwitchTo(scratch);
		add_json_winner(winners, value.val.binary.data);
		MemoryContextSwitchTo(caller);
		MemoryContextReset(scratch);
	}
	MemoryContextDelete(scratch);
	sort_and_check(winners);
}

static void
add_json_winner(Winners *winners, JsonbContainer *object)
{
	int64		position = winners->count + 1;
	JsonbValue *user = json_field(object, "user_id", position);
	JsonbValue *amount = json_field(object, "amount", position);

	if (user->type != jbvString)
		malformed(position, "Its \"user_id\" is not a string.");
	if (amount->type != jbvNumeric)
		malformed(position, "Its \"amount\" is not a number.");
	add(winners, user->val.string.val, user->val.string.len,
		json_amount(amount->val.numeric, position));
}

static JsonbValue *
json_field(JsonbContainer *object, const char *name, int64 position)
{
	JsonbValue *value = getKeyJsonValueFromContainer(object, name, strlen(name), NULL);

	if (value == NULL)
		malformed(position, psprintf("It has no \"%s\".", name));
	if (value->type == jbvNull)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"%s\" of winner " INT64_FORMAT " must not be null", name, position)));
	return value;
}

static int64
json_amount(Numeric number, int64 position)
{
	int64		amount = DatumGetInt64(DirectFunctionCall1(numeric_int8,
														   NumericGetDatum(number)));

	/* The conversion rounds; money must not be. */
	if (!DatumGetBool(DirectFunctionCall2(numeric_eq, NumericGetDatum(number),
										  NumericGetDatum(int64_to_numeric(amount)))))
		malformed(position, "Its \"amount\" is not an integer.");
	return amount;
}

static void
malformed(int64 position, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TEXT_REPRESENTATION),
			 errmsg("winner " INT64_FORMAT " is malformed", position),
			 errdetail_internal("%s", detail),
			 errhint("Write it as {\"user_id\": \"u1\", \"amount\": 100}, the amount in minor units.")));
}

/* Before anything is allocated for them. */
static void
refuse_too_many(int64 count)
{
	if (count > payoutq_max_winners)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("too many winners in one call"),
				 errdetail("There are " INT64_FORMAT "; the limit is %d (payoutq.max_winners).",
						   count, payoutq_max_winners),
				 errhint("Let a worker read them: payout_create_job_from() takes a query, and has no such limit.")));
}

static void
allocate(Winners *winners, int64 count)
{
	if (count == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a job needs at least one winner")));
	winners->list = MemoryContextAllocHuge(CurrentMemoryContext, count * sizeof(Winner));
	winners->count = 0;
	winners->total = 0;
}

static void
add(Winners *winners, const char *user_id, int length, int64 amount)
{
	Winner	   *winner = &winners->list[winners->count++];

	CHECK_FOR_INTERRUPTS();
	payoutq_check_user_id(user_id, length, winners->count);
	winners->total = payoutq_add_amount(winners->total, amount, winners->count);
	winner->user_id = user_id;
	winner->length = length;
	winner->position = winners->count;
	winner->amount = amount;
}

void
payoutq_check_user_id(const char *user_id, int length, int64 position)
{
	if (length == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user id of winner " INT64_FORMAT " must not be empty", position)));
	if (user_id[0] == '@')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user id \"%.*s\" of winner " INT64_FORMAT " begins with \"@\"",
						pg_mbcliplen(user_id, length, 100), user_id, position),
				 errdetail("Such names are kept for system accounts.")));
	if (length > PAYOUTQ_MAX_NAME)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user id of winner " INT64_FORMAT " is too long", position),
				 errdetail("It has %d bytes; the limit is %d.", length, PAYOUTQ_MAX_NAME)));
}

int64
payoutq_add_amount(int64 total, int64 amount, int64 position)
{
	if (amount <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("amount " INT64_FORMAT " of winner " INT64_FORMAT " is not positive",
						amount, position)));
	if (pg_add_s64_overflow(total, amount, &total))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("sum of the amounts is out of range for type bigint"),
				 errdetail("It overflows at winner " INT64_FORMAT ".", position)));
	return total;
}

/* As COLLATE "C": bytes first, then length. */
int
payoutq_compare_users(const char *a, int alen, const char *b, int blen)
{
	int			result = memcmp(a, b, Min(alen, blen));

	return result != 0 ? result : (alen > blen) - (alen < blen);
}

static int
compare_winners(const void *a, const void *b, void *arg pg_attribute_unused())
{
	const Winner *x = a;
	const Winner *y = b;
	int			result = payoutq_compare_users(x->user_id, x->length,
											   y->user_id, y->length);

	return result != 0 ? result : (x->position > y->position) - (x->position < y->position);
}

static void
sort_and_check(Winners *winners)
{
	qsort_interruptible(winners->list, winners->count, sizeof(Winner), compare_winners, NULL);

	for (int64 i = 1; i < winners->count; i++)
	{
		Winner	   *a = &winners->list[i - 1];
		Winner	   *b = &winners->list[i];

		if (payoutq_compare_users(a->user_id, a->length, b->user_id, b->length) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_UNIQUE_VIOLATION),
					 errmsg("user \"%.*s\" is in the job twice",
							pg_mbcliplen(a->user_id, a->length, 100), a->user_id),
					 errdetail("It stands at positions %d and %d.", a->position, b->position)));
	}
}
