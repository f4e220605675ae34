/*
 * stripe.c
 *		Providers of kind "stripe": transfers to connected accounts.
 *
 * https://docs.stripe.com/api/transfers, /api/idempotent_requests, /rate-limits,
 * /error-low-level.  The body is built from frozen columns only, so that a
 * replay is the same to the byte.  An error that the endpoint has executed is
 * stored under the key; a parameter error, a conflict and a throttled call are
 * not.
 */
#include "postgres.h"

#include "provider.h"

#define AUTHORIZATION	"Authorization: Bearer %s"

/* Transfers on a page of a lookup; they must fit into MAX_ANSWER. */
#define PAGE			20

static void build_send(Call *call);
static bool can_confirm(const Provider *provider);
static void build_confirm(Call *call);
static void build_lookup(Call *call);
static void read_list(Call *call);
static void read_answer(Call *call);
static void read_transfer(Call *call);
static void read_error(Call *call);
static CallOutcome read_rejection(long status, const char *type, const char *code);
static void add_headers(Call *call);
static char *lower(const char *text);

const ProviderKind payoutq_stripe = {
	.name = "stripe",
	.send = build_send,
	.can_confirm = can_confirm,
	.confirm = build_confirm,
	.lookup = build_lookup,
	.read_answer = read_answer
};

static void
build_send(Call *call)
{
	StringInfoData body;

	initStringInfo(&body);
	appendStringInfo(&body, "amount=" INT64_FORMAT "&currency=%s&destination=%s",
					 call->amount, payoutq_http_escape(lower(call->currency)),
					 payoutq_http_escape(call->destination));
	appendStringInfo(&body, "&transfer_group=payoutq%%3A" INT64_FORMAT, call->job_id);
	appendStringInfo(&body, "&metadata%%5Bpayoutq_transfer%%5D=" INT64_FORMAT
					 "&metadata%%5Bpayoutq_key%%5D=%s&metadata%%5Bpayoutq_origin%%5D=%s",
					 call->transfer_id, payoutq_http_escape(call->idempotency_key), call->origin);
	call->url = psprintf("%s/v1/transfers", call->provider->base_url);
	call->body = body.data;
	add_headers(call);
	payoutq_http_header(call, psprintf("Idempotency-Key: %s", call->idempotency_key));
}

static bool
can_confirm(const Provider *provider pg_attribute_unused())
{
	return true;
}

/* Read it again: that it is there is the confirmation. */
static void
build_confirm(Call *call)
{
	call->url = psprintf("%s/v1/transfers/%s", call->provider->base_url,
						 payoutq_http_escape(call->reference));
	add_headers(call);
}

/*
 * Keys cannot be asked for; all transfers of the job to this destination can,
 * newest first: one for each user who has it, and each generation.
 */
static void
build_lookup(Call *call)
{
	call->url = psprintf("%s/v1/transfers?destination=%s&transfer_group=payoutq%%3A" INT64_FORMAT "&limit=%d%s%s",
						 call->provider->base_url, payoutq_http_escape(call->destination), call->job_id, PAGE,
						 call->cursor ? "&starting_after=" : "",
						 call->cursor ? payoutq_http_escape(call->cursor) : "");
	add_headers(call);
}

static void
add_headers(Call *call)
{
	payoutq_http_header(call, psprintf(AUTHORIZATION, call->provider->secret));
	payoutq_http_header(call, psprintf("Stripe-Version: %s", call->provider->api_version));
}

static char *
lower(const char *text)
{
	char	   *copy = pstrdup(text);

	for (char *c = copy; *c; c++)
		*c = pg_ascii_tolower((unsigned char) *c);
	return copy;
}

static void
read_answer(Call *call)
{
	if (call->http_status == 200 && call->purpose == CALL_LOOKUP)
		read_list(call);
	else if (call->http_status == 200)
		read_transfer(call);
	else
		read_error(call);
}

/* The text at a path of up to two names in a transfer, or in one of a list */
static char *
field(const Call *call, int element, const char *name, const char *second)
{
	char	   *index = psprintf("%d", element);
	const char *const path[] = {"data", index, name, second};

	return payoutq_answer_at(call, element < 0 ? path + 2 : path, (element < 0 ? 1 : 3) + (second ? 1 : 0));
}

/* It is the one that we meant, whatever its key. */
static bool
is_ours(const Call *call, int element)
{
	char	   *amount = field(call, element, "amount", NULL);
	char	   *currency = field(call, element, "currency", NULL);
	char	   *destination = field(call, element, "destination", NULL);
	char	   *origin = field(call, element, "metadata", "payoutq_origin");

	return amount && strcmp(amount, psprintf(INT64_FORMAT, call->amount)) == 0 &&
		currency && pg_strcasecmp(currency, call->currency) == 0 &&
		destination && strcmp(destination, call->destination) == 0 &&
		origin && strcmp(origin, call->origin) == 0;
}

/* Of another installation that uses the account, whose keys are the same */
static bool
is_of_another(const Call *call, int element)
{
	char	   *origin = field(call, element, "metadata", "payoutq_origin");

	return origin && strcmp(origin, call->origin) != 0;
}

static void
read_transfer(Call *call)
{
	char	   *id = field(call, -1, "id", NULL);
	char	   *reversed = field(call, -1, "reversed", NULL);
	char	   *amount_reversed = field(call, -1, "amount_reversed", NULL);

	call->outcome = CALL_UNKNOWN;
	if (id == NULL)
	{
		call->reason = pstrdup("the answer is not a transfer");
		return;
	}
	if (call->purpose == CALL_SEND)
		call->reference = id;
	if (!is_ours(call, -1))
		call->reason = pstrdup("the answer is not the transfer that was asked for");
	else if (call->purpose == CALL_SEND)
		call->outcome = CALL_SENT;
	else if (reversed && strcmp(reversed, "true") == 0)
	{
		call->outcome = CALL_REJECTED;
		call->reason = pstrdup("reversed at the provider");
	}
	else
	{
		call->outcome = CALL_COMPLETED;
		if (amount_reversed && strcmp(amount_reversed, "0") != 0)
			call->reason = psprintf("%s of it reversed at the provider", amount_reversed);
	}
}

/* That there is none is only said by a list of which all could be read. */
static void
read_list(Call *call)
{
	char	   *has_more = payoutq_answer_field(call, "has_more");
	char	   *last = NULL;
	int			count = payoutq_answer_count(call, "data");
	bool		readable = count >= 0;

	for (int i = 0; i < count; i++)
	{
		char	   *id = field(call, i, "id", NULL);
		char	   *key = field(call, i, "metadata", "payoutq_key");

		if (id == NULL || id[0] == '\0')
		{
			readable = false;
			continue;
		}
		if (key && strcmp(key, call->idempotency_key) == 0 && !is_of_another(call, i))
		{
			call->outcome = is_ours(call, i) ? CALL_SENT : CALL_UNKNOWN;
			call->reference = is_ours(call, i) ? id : NULL;
			call->reason = pstrdup("the transfer with the key is not as it was asked for");
			return;
		}
		last = id;
	}
	call->outcome = CALL_UNKNOWN;
	if (readable && has_more && strcmp(has_more, "false") == 0)
		call->outcome = CALL_ABSENT;
	else if (readable && has_more && last)
		call->cursor = last;
	else
		call->reason = pstrdup("the list of transfers is not complete");
}

static void
read_error(Call *call)
{
	const char *const type_path[] = {"error", "type"};
	const char *const code_path[] = {"error", "code"};
	char	   *type = payoutq_answer_at(call, type_path, 2);
	char	   *code = payoutq_answer_at(call, code_path, 2);
	char	   *request = payoutq_http_answer_header(call, "Request-Id");

	call->reason = psprintf("HTTP %ld%s%s%s%s%s%s", call->http_status, type ? " " : "", type ? type : "",
							code ? " " : "", code ? code : "", request ? " " : "", request ? request : "");
	switch (call->http_status)
	{
		case 400:
		case 402:
		case 404:
			call->outcome = read_rejection(call->http_status, type, code ? code : "");
			break;
		case 401:
		case 403:
			/* One account, not all of them */
			call->outcome = code && strcmp(code, "account_invalid") == 0 ? CALL_PERMANENT : CALL_REFUSED;
			break;
		case 429:
			/* Without a reason it is about an object that is locked. */
			call->outcome = payoutq_http_answer_header(call, "Stripe-Rate-Limited-Reason") ?
				CALL_THROTTLED : CALL_TRANSIENT;
			break;
		default:
			/* 409: the first call with the key is still going on */
			call->outcome = CALL_UNKNOWN;
	}
	if (call->purpose != CALL_SEND && call->outcome != CALL_REFUSED && call->outcome != CALL_THROTTLED)
		call->outcome = CALL_UNKNOWN;
}

/* Only what Stripe itself says is final, not what a proxy does. */
static CallOutcome
read_rejection(long status, const char *type, const char *code)
{
	if (type == NULL || (status == 404 && strcmp(code, "resource_missing") != 0))
		return status == 404 ? CALL_REFUSED : CALL_UNKNOWN;
	/* What was done under the key was asked for with another body. */
	if (strcmp(type, "idempotency_error") == 0)
		return CALL_UNKNOWN;
	if (strcmp(code, "balance_insufficient") == 0)
		return CALL_UNFUNDED;
	if (strcmp(code, "livemode_mismatch") == 0 || strcmp(code, "api_key_expired") == 0)
		return CALL_REFUSED;
	return CALL_PERMANENT;
}
