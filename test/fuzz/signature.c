/*
 * signature.c
 *		Signatures of web hooks.
 *
 * Input: the header, a line break, and the body.  In the header "~" stands for
 * the right signature, which no fuzzer would find, and "^" for one whose last
 * digit is wrong.
 */
#include "postgres.h"

#include "common/cryptohash.h"
#include "common/sha2.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "fuzz.h"
#include "payoutq.h"

/* As in test/fuzz/database.sql */
#define PROVIDER	"fuzzed"
#define SECRET		"whsec_fuzz"

#define NOW			1700000000
#define TOLERANCE	300
#define BLOCK		64

extern Datum payoutq_signature_is_valid(PG_FUNCTION_ARGS);

static bool is_valid(const char *header, const char *signature);
static char *sign(const char *header, const char *body, int length);
static char *hmac(const char *text, int length);
static void hash(const uint8 *first, int first_length, const uint8 *second, int second_length, uint8 *result);
static struct varlena *varlena(const char *data, int length);

static void
parse(const uint8 *data, size_t size)
{
	const uint8 *line = memchr(data, '\n', size);
	char	   *template = pnstrdup((const char *) data, line ? line - data : size);
	const char *body = line ? (const char *) line + 1 : "";
	int			length = line ? size - (line + 1 - data) : 0;
	char	   *signature = sign(template, body, length);
	StringInfoData header;
	bool		valid;

	pg_verifymbstr(template, strlen(template), false);
	initStringInfo(&header);
	for (const char *c = template; *c; c++)
	{
		if (*c == '~' || *c == '^')
			appendStringInfoString(&header, signature);
		else
			appendStringInfoChar(&header, *c);
		if (*c == '^')
			header.data[header.len - 1] ^= 1;
	}

	valid = DatumGetBool(DirectFunctionCall4(payoutq_signature_is_valid, CStringGetTextDatum(PROVIDER),
											 PointerGetDatum(varlena(header.data, header.len)),
											 PointerGetDatum(varlena(body, length)),
											 TimestampTzGetDatum(time_t_to_timestamptz(NOW))));
	expect(valid == is_valid(header.data, signature));
}

static struct varlena *
varlena(const char *data, int length)
{
	struct varlena *value = palloc(VARHDRSZ + length);

	SET_VARSIZE(value, VARHDRSZ + length);
	memcpy(VARDATA(value), data, length);
	return fuzz_guarded(value, VARHDRSZ + length);
}

/* "t=<digits>", not long ago, and a "v1=<signature>" behind it */
static bool
is_valid(const char *header, const char *signature)
{
	int64		t = 0;
	const char *c = header + 2;
	bool		found = false;

	if (header[0] != 't' || header[1] != '=' || *c < '0' || *c > '9')
		return false;
	for (; *c >= '0' && *c <= '9'; c++)
		t = t > PG_INT64_MAX / 100 ? t : t * 10 + (*c - '0');
	if (*c != ',' || t < NOW - TOLERANCE || t > NOW + TOLERANCE)
		return false;
	while (c)
	{
		const char *end = strchr(++c, ',');
		int			length = end ? end - c : strlen(c);

		found |= length == 3 + strlen(signature) && memcmp(c, "v1=", 3) == 0 &&
			memcmp(c + 3, signature, strlen(signature)) == 0;
		c = end;
	}
	return found;
}

static char *
sign(const char *header, const char *body, int length)
{
	StringInfoData text;

	initStringInfo(&text);
	if (strlen(header) > 2)
		appendBinaryStringInfo(&text, header + 2, strspn(header + 2, "0123456789"));
	appendStringInfoChar(&text, '.');
	appendBinaryStringInfo(&text, body, length);
	return hmac(text.data, text.len);
}

/* RFC 2104, from the hash alone */
static char *
hmac(const char *text, int length)
{
	uint8		inner[BLOCK] = {0};
	uint8		outer[BLOCK] = {0};
	uint8		result[PG_SHA256_DIGEST_LENGTH];
	char	   *hex = palloc(2 * sizeof(result) + 1);

	memcpy(inner, SECRET, strlen(SECRET));
	memcpy(outer, SECRET, strlen(SECRET));
	for (int i = 0; i < BLOCK; i++)
	{
		inner[i] ^= 0x36;
		outer[i] ^= 0x5c;
	}
	hash(inner, BLOCK, (const uint8 *) text, length, result);
	hash(outer, BLOCK, result, sizeof(result), result);
	for (int i = 0; i < sizeof(result); i++)
		sprintf(hex + 2 * i, "%02x", result[i]);
	return hex;
}

static void
hash(const uint8 *first, int first_length, const uint8 *second, int second_length, uint8 *result)
{
	pg_cryptohash_ctx *context = pg_cryptohash_create(PG_SHA256);

	expect(pg_cryptohash_init(context) == 0 &&
		   pg_cryptohash_update(context, first, first_length) == 0 &&
		   pg_cryptohash_update(context, second, second_length) == 0 &&
		   pg_cryptohash_final(context, result, PG_SHA256_DIGEST_LENGTH) == 0);
	pg_cryptohash_free(context);
}

const Fuzzer fuzz_signature = {.name = "signature", .parse = parse, .subtransaction = true};
