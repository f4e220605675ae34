/*
 * webhook.c
 *		Providers of kind "webhook": a signed POST to a service of the application,
 *		which moves the money by whatever rail it has.
 *
 * POST base_url, Content-Type application/json:
 *		{"transfer_id", "job_id", "entry", "amount", "currency", "user_id",
 *		 "destination", "idempotency_key", "origin"}
 * with Payoutq-Signature: t=<unix time>,v1=<HMAC-SHA256 of "t.body", hexadecimal>
 * and Idempotency-Key.  Another installation has the same keys, and another
 * origin.  It answers 200 with
 *		{"status": "sent" | "completed" | "failed", "reference", "class", "reason"}
 * where class is transient, permanent or unknown; failed may also come with 400
 * or 422.  401, 403 and 404 mean that it is not set up, 429 that it wants a pause;
 * anything else, that nobody knows.  With status_url, what was sent is asked for
 * again: GET status_url?reference=<reference>, with the same answer.
 */
#include "postgres.h"

#include <time.h>

#include "utils/json.h"

#include "provider.h"

static void build_send(Call *call);
static bool can_confirm(const Provider *provider);
static void build_confirm(Call *call);
static void read_answer(Call *call);
static void read_status(Call *call, const char *status);
static void sign(Call *call, const char *text);

const ProviderKind payoutq_webhook = {
	.name = "webhook",
	.send = build_send,
	.can_confirm = can_confirm,
	.confirm = build_confirm,
	.read_answer = read_answer
};

static void
add_text(StringInfo body, const char *name, const char *value)
{
	appendStringInfo(body, ", \"%s\": ", name);
	escape_json(body, value);
}

static void
build_send(Call *call)
{
	StringInfoData body;

	initStringInfo(&body);
	appendStringInfo(&body, "{\"transfer_id\": " INT64_FORMAT ", \"job_id\": " INT64_FORMAT
					 ", \"entry\": %d, \"amount\": " INT64_FORMAT,
					 call->transfer_id, call->job_id, call->entry, call->amount);
	add_text(&body, "currency", call->currency);
	add_text(&body, "user_id", call->user_id);
	add_text(&body, "destination", call->destination);
	add_text(&body, "idempotency_key", call->idempotency_key);
	add_text(&body, "origin", call->origin);
	appendStringInfoChar(&body, '}');

	call->url = call->provider->base_url;
	call->body = body.data;
	payoutq_http_header(call, "Content-Type: application/json");
	payoutq_http_header(call, psprintf("Idempotency-Key: %s", call->idempotency_key));
	sign(call, call->body);
}

static bool
can_confirm(const Provider *provider)
{
	return provider->status_url != NULL;
}

static void
build_confirm(Call *call)
{
	call->url = psprintf("%s%creference=%s", call->provider->status_url,
						 strchr(call->provider->status_url, '?') ? '&' : '?',
						 payoutq_http_escape(call->reference));
	sign(call, call->reference);
}

static void
sign(Call *call, const char *text)
{
	char	   *now = psprintf("%lld", (long long) time(NULL));
	char	   *signed_text = psprintf("%s.%s", now, text);

	payoutq_http_header(call, psprintf("Payoutq-Signature: t=%s,v1=%s", now,
									   payoutq_hmac_sha256(call->provider->secret, signed_text, strlen(signed_text))));
}

/* The service's own word counts, whatever the status; a proxy has none. */
static void
read_answer(Call *call)
{
	char	   *status = payoutq_answer_field(call, "status");

	call->reason = psprintf("HTTP %ld", call->http_status);
	call->outcome = CALL_UNKNOWN;
	if (call->http_status == 401 || call->http_status == 403 || call->http_status == 404)
		call->outcome = CALL_REFUSED;
	else if (call->http_status == 429)
		call->outcome = CALL_THROTTLED;
	else if (call->http_status == 200 || call->http_status == 400 || call->http_status == 422)
		read_status(call, status ? status : "");
}

static void
read_status(Call *call, const char *status)
{
	bool		done = call->http_status == 200;
	char	   *reference = payoutq_answer_field(call, "reference");
	char	   *class = payoutq_answer_field(call, "class");
	char	   *reason = payoutq_answer_field(call, "reason");

	if (reason || (done && (strcmp(status, "completed") == 0 || strcmp(status, "sent") == 0)))
		call->reason = reason;
	if (done && strcmp(status, "completed") == 0)
		call->outcome = CALL_COMPLETED;
	else if (done && strcmp(status, "sent") == 0 && (reference || call->purpose == CALL_CONFIRM))
		call->outcome = call->purpose == CALL_CONFIRM ? CALL_UNKNOWN : CALL_SENT;
	else if (strcmp(status, "failed") == 0 && call->purpose == CALL_CONFIRM)
		call->outcome = class == NULL || strcmp(class, "permanent") == 0 ? CALL_REJECTED : CALL_UNKNOWN;
	else if (strcmp(status, "failed") == 0 && class)
		call->outcome = strcmp(class, "permanent") == 0 ? CALL_PERMANENT :
			strcmp(class, "transient") == 0 ? CALL_TRANSIENT : CALL_UNKNOWN;
	else
		call->reason = pstrdup("the answer says neither sent, completed nor failed");
	if (call->purpose == CALL_SEND)
		call->reference = reference;
}
