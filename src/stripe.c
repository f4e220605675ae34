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
can_confirm(const Provider *provider)
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
	if (call->http_status == 200 && call->is_lookup)
		read_list(call);
	else if (call->http_status == 200)
		read_transfer(call);
	else
		read_error(call);
}

/* It is the one that we meant. */
static void
read_transfer(Call *call)
{
	char	   *id = payoutq_answer_field(call, "id");
	char	   *amount = payoutq_answer_field(call, "amount");
	char	   *currency = payoutq_answer_field(call, "currency");
	char	   *destination = payoutq_answer_field(call, "destination");
	const char *const origin_path[] = {"metadata", "payoutq_origin"};
	char	   *origin = payoutq_json_text(call->answer, call->length, origin_path, 2);

	if (id == NULL || origin == NULL || strcmp(origin, call->origin) != 0 || amount == NULL || currency == NULL || destination == NULL ||
		strtoll(amount, NULL, 10) != call->amount || pg_strcasecmp(currency, call->currency) != 0 ||
		strcmp(destination, call->destination) != 0)
	{
		call->outcome = CALL_UNKNOWN;
		call->reason = pstrdup("the answer is not the transfer that was asked for");
		return;
	}
	call->reference = id;
	call->outcome = call->is_confirmation ? CALL_COMPLETED : CALL_SENT;
	if (call->is_confirmation && strcmp(payoutq_answer_field(call, "reversed") ? payoutq_answer_field(call, "reversed") : "", "true") == 0)
	{
		call->outcome = CALL_REJECTED;
		call->reason = pstrdup("reversed at the provider");
	}
}

static void
read_list(Call *call)
{
	char	   *has_more = payoutq_answer_field(call, "has_more");
	char	   *last = NULL;

	call->outcome = CALL_UNKNOWN;
	call->reason = pstrdup("the list of transfers is not complete");
	for (int i = 0;; i++)
	{
		char	   *n = psprintf("%d", i);
		const char *const id_path[] = {"data", n, "id"};
		const char *const key_path[] = {"data", n, "metadata", "payoutq_key"};
		const char *const origin_path[] = {"data", n, "metadata", "payoutq_origin"};
		const char *const amount_path[] = {"data", n, "amount"};
		char	   *id = payoutq_json_text(call->answer, call->length, id_path, 3);
		char	   *key = payoutq_json_text(call->answer, call->length, key_path, 4);
		char	   *origin = payoutq_json_text(call->answer, call->length, origin_path, 4);
		char	   *amount = payoutq_json_text(call->answer, call->length, amount_path, 3);

		if (id == NULL)
			break;
		last = id;
		if (key && strcmp(key, call->idempotency_key) == 0 && origin && strcmp(origin, call->origin) == 0 &&
			amount && strtoll(amount, NULL, 10) == call->amount)
		{
			call->reference = id;
			call->outcome = CALL_SENT;
			return;
		}
	}
	if (has_more && strcmp(has_more, "false") == 0)
		call->outcome = CALL_ABSENT;
	else if (has_more && last)
		call->cursor = last;
}

/* Only what Stripe itself says is final, not what a proxy does. */
static CallOutcome
read_rejection(long status, const char *type, const char *code)
{
	/* What was done under the key was asked for with another body. */
	if (type == NULL || (status == 404 && (code == NULL || strcmp(code, "resource_missing") != 0)) || strcmp(type, "idempotency_error") == 0)
		return CALL_UNKNOWN;
	if (code && strcmp(code, "balance_insufficient") == 0)
		return CALL_UNFUNDED;
	if (code && (strcmp(code, "livemode_mismatch") == 0 || strcmp(code, "api_key_expired") == 0))
		return CALL_REFUSED;
	return CALL_PERMANENT;
}

static void
read_error(Call *call)
{
	const char *const type_path[] = {"error", "type"};
	const char *const code_path[] = {"error", "code"};
	char	   *type = payoutq_json_text(call->answer, call->length, type_path, 2);
	char	   *code = payoutq_json_text(call->answer, call->length, code_path, 2);

	call->reason = psprintf("HTTP %ld%s%s%s%s", call->http_status, type ? " " : "", type ? type : "",
							code ? " " : "", code ? code : "");
	switch (call->http_status)
	{
		case 400:
		case 402:
		case 404:
			call->outcome = read_rejection(call->http_status, type, code);
			break;
		case 401:
		case 403:
			call->outcome = CALL_REFUSED;
			break;
		case 429:
			call->outcome = payoutq_http_answer_header(call, "Stripe-Rate-Limited-Reason") ?
				CALL_THROTTLED : CALL_TRANSIENT;
			break;
		default:
			/* 409: the first call with the key is still going on */
			call->outcome = CALL_UNKNOWN;
	}
	if (call->is_confirmation || call->is_lookup)
		call->outcome = call->outcome == CALL_REFUSED ? CALL_REFUSED : CALL_UNKNOWN;
}
