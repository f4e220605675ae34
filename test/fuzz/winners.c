/*
 * winners.c
 *		Lists of winners: JSON, or two arrays.
 *
 * Input: "j", then JSON; or "a", then for each winner a byte (1: the user is
 * null, 2: the amount is, 4: it is below zero), one with the length of the user
 * id, the id, one with the length of the amount, and that.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "fuzz.h"
#include "payoutq.h"

#define MAX_WINNERS	1000

typedef struct Given
{
	const char *user_id;
	int			length;
	int64		amount;
} Given;

static void parse_json(const uint8 *data, size_t size);
static void parse_arrays(const uint8 *data, size_t size);
static void check(const Winners *winners, const Given *given, int count);

static void
parse(const uint8 *data, size_t size)
{
	if (size > 0 && data[0] == 'j')
		parse_json(data + 1, size - 1);
	else if (size > 0 && data[0] == 'a')
		parse_arrays(data + 1, size - 1);
}

static void
parse_json(const uint8 *data, size_t size)
{
	char	   *input = pnstrdup((const char *) data, size);
	Jsonb	   *json;
	Winners		winners;
	Given	   *given;

	pg_verifymbstr(input, strlen(input), false);
	json = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(input)));
	json = fuzz_guarded(json, VARSIZE(json));
	payoutq_winners_from_jsonb(json, &winners);

	/* The same by what SQL has for it */
	given = palloc(winners.count * sizeof(Given));
	expect(winners.count == JB_ROOT_COUNT(json));
	for (int i = 0; i < winners.count; i++)
	{
		Datum		object = DirectFunctionCall2(jsonb_array_element, JsonbPGetDatum(json), Int32GetDatum(i));
		text	   *user = DatumGetTextPP(DirectFunctionCall2(jsonb_object_field_text, object,
															  CStringGetTextDatum("user_id")));
		char	   *amount = TextDatumGetCString(DirectFunctionCall2(jsonb_object_field_text, object,
																	 CStringGetTextDatum("amount")));

		given[i].user_id = VARDATA_ANY(user);
		given[i].length = VARSIZE_ANY_EXHDR(user);
		/* 7.00 is an integer too */
		given[i].amount = strtoll(amount, &amount, 10);
		expect(amount[strspn(amount, ".0")] == '\0');
	}
	check(&winners, given, winners.count);
}

static void
parse_arrays(const uint8 *data, size_t size)
{
	Given	   *given = palloc(MAX_WINNERS * sizeof(Given));
	Datum	   *users = palloc(MAX_WINNERS * sizeof(Datum));
	Datum	   *amounts = palloc(MAX_WINNERS * sizeof(Datum));
	bool	   *no_user = palloc(MAX_WINNERS * sizeof(bool));
	bool	   *no_amount = palloc(MAX_WINNERS * sizeof(bool));
	const uint8 *end = data + size;
	bool		has_null = false;
	int			count = 0;
	int			more;
	int			lower = 1;
	ArrayType  *user_ids;
	ArrayType  *values;
	Winners		winners;

	while (count < MAX_WINNERS && end - data >= 2)
	{
		int			flags = *data++;
		int			length = Min(data[0], end - data - 1);
		uint64		amount = 0;

		data++;
		pg_verifymbstr((const char *) data, length, false);
		given[count].user_id = (const char *) data;
		given[count].length = length;
		users[count] = PointerGetDatum(cstring_to_text_with_len((const char *) data, length));
		data += length;
		length = data < end ? Min(*data & 15, end - data - 1) : 0;
		data += data < end;
		for (int i = 0; i < length; i++)
			amount = amount << 8 | *data++;
		given[count].amount = (flags & 4) ? (int64) -amount : (int64) amount;
		amounts[count] = Int64GetDatum(given[count].amount);
		no_user[count] = flags & 1;
		no_amount[count] = flags & 2;
		has_null |= no_user[count] || no_amount[count];
		count++;
	}
	more = end > data ? *data : 0;		/* lengths that differ */
	user_ids = construct_md_array(users, no_user, 1, &count, &lower, TEXTOID, -1, false, TYPALIGN_INT);
	more = Max(count - more, 0);
	values = construct_md_array(amounts, no_amount, 1, &more, &lower, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE);
	user_ids = fuzz_guarded(user_ids, VARSIZE(user_ids));
	values = fuzz_guarded(values, VARSIZE(values));
	payoutq_winners_from_arrays(user_ids, values, &winners);
	expect(!has_null && more == count);
	check(&winners, given, count);
}

/* What was accepted: everybody once, in order, as he was given. */
static void
check(const Winners *winners, const Given *given, int count)
{
	unsigned __int128 total = 0;

	expect(count > 0 && winners->count == count);
	for (int i = 0; i < count; i++)
	{
		const Winner *w = &winners->list[i];
		const Given *g;

		expect(w->position >= 1 && w->position <= count);
		g = &given[w->position - 1];
		expect(w->length == g->length && memcmp(w->user_id, g->user_id, g->length) == 0);
		expect(w->length >= 1 && w->length <= PAYOUTQ_MAX_NAME && w->user_id[0] != '@');
		expect(w->amount == g->amount && w->amount > 0);
		total += w->amount;
		if (i > 0)
		{
			const Winner *before = w - 1;
			int			order = memcmp(before->user_id, w->user_id, Min(before->length, w->length));

			expect(order < 0 || (order == 0 && before->length < w->length));
		}
	}
	expect(total == winners->total && total <= PG_INT64_MAX);
}

const Fuzzer fuzz_winners = {.name = "winners", .parse = parse};
