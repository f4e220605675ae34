/*
 * split.c
 *		payout_split(): divide a pool in proportion to weights, to the last unit.
 *
 * Method of the largest remainder (Hamilton): each share is rounded down, and
 * the units that are left go to the largest remainders.  A tie goes to the
 * larger weight, and among equal weights to the earlier one, so that the result
 * does not depend on the order and never gives less to a larger weight.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/memutils.h"

#include "payoutq.h"

#ifndef HAVE_INT128
#error "payoutq needs a compiler with 128-bit integers"
#endif

typedef struct Share
{
	uint128		remainder;
	int64		weight;
	int			position;
} Share;

static int128 check_weights(const int64 *weights, int count);
static int	compare_shares(const void *a, const void *b);
static void split_pool(int64 pool, const int64 *weights, int count, Datum *shares);

PG_FUNCTION_INFO_V1(payout_split);

/* payout_split(pool bigint, weights bigint[]) returns bigint[] */
Datum
payout_split(PG_FUNCTION_ARGS)
{
	int64		pool = PG_GETARG_INT64(0);
	ArrayType  *array = PG_GETARG_ARRAYTYPE_P(1);
	int			count = ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array));
	Datum	   *shares;

	if (pool < 0)
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("pool must not be negative")));
	if (ARR_NDIM(array) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("weights must be a one-dimensional array that is not empty")));
	if (array_contains_nulls(array))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("weights must not contain nulls")));

	shares = MemoryContextAllocHuge(CurrentMemoryContext, count * sizeof(Datum));
	split_pool(pool, (const int64 *) ARR_DATA_PTR(array), count, shares);
	PG_RETURN_ARRAYTYPE_P(construct_array(shares, count, INT8OID, sizeof(int64),
										  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

static int128
check_weights(const int64 *weights, int count)
{
	int128		total = 0;

	for (int i = 0; i < count; i++)
	{
		if (weights[i] < 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("weights[%d] must not be negative", i + 1)));
		total += weights[i];
	}
	if (total == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("at least one weight must be greater than zero")));
	return total;
}

static void
split_pool(int64 pool, const int64 *weights, int count, Datum *shares)
{
	int128		total = check_weights(weights, count);
	Share	   *order = MemoryContextAllocHuge(CurrentMemoryContext, count * sizeof(Share));
	int64		left = pool;

	for (int i = 0; i < count; i++)
	{
		/* below 2^126 */
		int128		product = (int128) pool * weights[i];

		shares[i] = Int64GetDatum((int64) (product / total));
		left -= DatumGetInt64(shares[i]);
		order[i].remainder = (uint128) (product % total);
		order[i].weight = weights[i];
		order[i].position = i;
	}

	/* Fewer units are left than there are shares with a remainder. */
	Assert(left < count);
	if (left > 0)
		qsort(order, count, sizeof(Share), compare_shares);
	for (int64 i = 0; i < left; i++)
	{
		Datum	   *share = &shares[order[i].position];

		*share = Int64GetDatum(DatumGetInt64(*share) + 1);
	}
}

static int
compare_shares(const void *a, const void *b)
{
	const Share *x = a;
	const Share *y = b;

	if (x->remainder != y->remainder)
		return x->remainder > y->remainder ? -1 : 1;
	if (x->weight != y->weight)
		return x->weight > y->weight ? -1 : 1;
	return (x->position > y->position) - (x->position < y->position);
}
