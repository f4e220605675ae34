/*
 * answer.c
 *		Answers of providers: as the kinds read them ("answer"), and as libcurl
 *		does before ("http").
 *
 * Input of "answer": a byte for the kind and what the call is for, one for the
 * HTTP status, and the body.  Of "http": the first byte, one that says how much
 * of the end is sent how often, and all that comes over the connection.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "catalog/pg_type.h"
#include "utils/builtins.h"

/* Each call is made to a socket of our own. */
#include <curl/curl.h>
static CURL *new_handle(void);
#define curl_easy_init()	new_handle()
#include "../../src/http.c"
#undef curl_easy_init

#include "fuzz.h"

#define AMOUNT		700
#define CURRENCY	"USD"
#define DESTINATION	"acct_1"
#define ORIGIN		"origin"
#define KEY			"payout:1"

#define MAX_PAGES	4
#define WAIT_MS		1000
#define REPEATED	1024

static const long statuses[] = {200, 201, 204, 301, 400, 401, 402, 403, 404, 409, 413, 422, 429, 500, 502, 503};

static const struct
{
	const char *kind;
	CallPurpose purpose;
}			cases[] = {
	{"stripe", CALL_SEND},
	{"stripe", CALL_CONFIRM},
	{"stripe", CALL_LOOKUP},
	{"webhook", CALL_SEND},
	{"webhook", CALL_CONFIRM},
	{"pusher", CALL_PUSH}
};

static Provider providers[lengthof(cases)];

static char address[64];
static int	listener = -1;

static Call *make_call(int which);
static void check(const Call *call);
static void check_sent(const Call *call);
static void check_absent(const Call *call);
static char *text_at(Jsonb *json, const char *name);
static bool same(const char *a, const char *b);
static void open_listener(void);
static int	respond(const uint8 *data, size_t size, int repeats);

static void
prepare(void)
{
	for (int i = 0; i < lengthof(cases); i++)
	{
		const char *const words[] = {
			"kind", cases[i].kind, "base_url", "http://127.0.0.1:1", "status_url", "http://127.0.0.1:1/status",
			"app_id", "1", "api_key", "key", "webhook_secret", "secret", "secret", "secret"
		};
		Datum		options[lengthof(words)];

		for (int j = 0; j < lengthof(words); j++)
			options[j] = CStringGetTextDatum(words[j]);
		providers[i].name = "fuzzed";
		payoutq_configure_provider(&providers[i], PointerGetDatum(
			construct_array(options, lengthof(options), TEXTOID, -1, false, TYPALIGN_INT)));
		expect(providers[i].problem == NULL);
		providers[i].timeout_ms = WAIT_MS;
	}
}

static void
parse_answer(const uint8 *data, size_t size)
{
	Call	   *call;

	if (size < 2 || size - 2 > MAX_ANSWER)
		return;
	call = make_call(data[0]);
	call->http_status = statuses[data[1] % lengthof(statuses)];
	if (size > 2)
		expect(write_answer((char *) data + 2, 1, size - 2, call) == size - 2);
	classify(call);
	check(call);
	payoutq_http_free(call);
}

static void
parse_http(const uint8 *data, size_t size)
{
	Call	   *call;
	Call	   *done;
	int			peer = -1;

	if (size < 2)
		return;
	open_listener();
	call = make_call(data[0]);
	if (call->purpose == CALL_SEND)
		call->provider->kind->send(call);
	else if (call->purpose == CALL_CONFIRM)
		call->provider->kind->confirm(call);
	else if (call->purpose == CALL_LOOKUP)
		call->provider->kind->lookup(call);
	else
		call->provider->kind->push(call);
	payoutq_http_start(call);
	for (int page = 1;; page++)
	{
		while ((done = payoutq_http_done()) == NULL)
		{
			payoutq_http_wait(peer < 0 ? 0 : WAIT_MS);
			if (peer < 0)
				peer = respond(data + 2, size - 2, data[1]);
		}
		expect(done == call && payoutq_http_calls() == 0);
		if (peer >= 0)
			close(peer);
		peer = -1;
		check(call);
		if (call->cursor == NULL || page == MAX_PAGES)
			break;
		payoutq_http_again(call);
	}
	payoutq_http_free(call);
}

static Call *
make_call(int which)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "fuzzed call", ALLOCSET_SMALL_SIZES);
	MemoryContext caller = MemoryContextSwitchTo(context);
	Call	   *call = palloc0(sizeof(Call));

	which %= lengthof(cases);
	call->context = context;
	call->provider = &providers[which];
	call->purpose = cases[which].purpose;
	call->transfer_id = call->job_id = call->entry = 1;
	call->idempotency_key = pstrdup(KEY);
	call->origin = ORIGIN;
	call->user_id = pstrdup("ann");
	call->destination = pstrdup(DESTINATION);
	call->amount = AMOUNT;
	call->currency = pstrdup(CURRENCY);
	call->type = pstrdup("won");
	call->data = pstrdup("{}");
	if (call->purpose == CALL_CONFIRM)
		call->reference = pstrdup("tr_1");
	MemoryContextSwitchTo(caller);
	return call;
}

/*
 * What an answer may mean depends on what was asked, and what moves money on
 * what it says.
 */
static void
check(const Call *call)
{
	static const int allowed[] = {
		[CALL_SEND] = 1 << CALL_COMPLETED | 1 << CALL_SENT | 1 << CALL_TRANSIENT | 1 << CALL_PERMANENT |
		1 << CALL_UNKNOWN | 1 << CALL_THROTTLED | 1 << CALL_REFUSED | 1 << CALL_UNFUNDED,
		[CALL_CONFIRM] = 1 << CALL_COMPLETED | 1 << CALL_REJECTED | 1 << CALL_UNKNOWN | 1 << CALL_THROTTLED | 1 << CALL_REFUSED,
		[CALL_LOOKUP] = 1 << CALL_SENT | 1 << CALL_ABSENT | 1 << CALL_UNKNOWN | 1 << CALL_THROTTLED | 1 << CALL_REFUSED,
		[CALL_PUSH] = 1 << CALL_COMPLETED | 1 << CALL_PERMANENT | 1 << CALL_UNKNOWN | 1 << CALL_THROTTLED |
		1 << CALL_REFUSED | 1 << CALL_UNREACHABLE
	};

	expect(call->outcome >= 0 && call->outcome <= CALL_ABSENT);
	if (call->code == CURLE_OK)
		expect(allowed[call->purpose] & 1 << call->outcome);
	else
		expect(call->outcome == CALL_UNKNOWN || call->outcome == CALL_UNREACHABLE || call->purpose == CALL_PUSH);

	if (call->reason)
	{
		expect(strlen(call->reason) <= MAX_REASON);
		expect(pg_verifymbstr(call->reason, strlen(call->reason), true));
	}
	if (call->reference && call->purpose != CALL_CONFIRM)
		expect(strlen(call->reference) >= 1 && strlen(call->reference) <= MAX_REFERENCE);
	expect(call->cursor == NULL || (call->purpose == CALL_LOOKUP && call->cursor[0] != '\0'));
	expect(call->retry_after == -1 || (call->retry_after > 0 && call->retry_after <= MAX_RETRY_AFTER_S));
	expect(call->length <= MAX_ANSWER);

	switch (call->outcome)
	{
		case CALL_COMPLETED:
		case CALL_SENT:
		case CALL_ABSENT:
			expect(call->http_status == 200);
			break;
		case CALL_PERMANENT:
		case CALL_REJECTED:
		case CALL_UNFUNDED:
			expect(call->http_status >= 200 && call->http_status < 500);
			break;
		default:
			break;
	}
	if (call->outcome == CALL_SENT)
		check_sent(call);
	if (call->outcome == CALL_ABSENT)
		check_absent(call);
}

static void
check_sent(const Call *call)
{
	expect(call->reference != NULL);
	if (call->provider->kind == &payoutq_stripe && call->purpose == CALL_SEND)
	{
		char	   *metadata = text_at(call->json, "metadata");

		expect(same(text_at(call->json, "amount"), "700") && same(text_at(call->json, "destination"), DESTINATION));
		expect(metadata && strstr(metadata, ORIGIN));
	}
	if (call->provider->kind == &payoutq_webhook)
		expect(same(text_at(call->json, "status"), "sent"));
}

/* Then the key is given up: the list must be whole, and each transfer of it readable. */
static void
check_absent(const Call *call)
{
	Datum		json = JsonbPGetDatum(call->json);
	char	   *data = text_at(call->json, "data");
	Jsonb	   *list;

	expect(same(text_at(call->json, "has_more"), "false"));
	expect(data != NULL);
	list = DatumGetJsonbP(DirectFunctionCall2(jsonb_object_field, json, CStringGetTextDatum("data")));
	expect(JB_ROOT_IS_ARRAY(list) && !JB_ROOT_IS_SCALAR(list));
	for (int i = 0; i < JB_ROOT_COUNT(list); i++)
	{
		Jsonb	   *transfer = DatumGetJsonbP(DirectFunctionCall2(jsonb_array_element, JsonbPGetDatum(list), Int32GetDatum(i)));

		expect(JB_ROOT_IS_OBJECT(transfer) && text_at(transfer, "id") != NULL);
	}
}

static char *
text_at(Jsonb *json, const char *name)
{
	LOCAL_FCINFO(fcinfo, 2);
	Datum		found;

	expect(json != NULL && JB_ROOT_IS_OBJECT(json));
	InitFunctionCallInfoData(*fcinfo, NULL, 2, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = JsonbPGetDatum(json);
	fcinfo->args[0].isnull = false;
	fcinfo->args[1].value = CStringGetTextDatum(name);
	fcinfo->args[1].isnull = false;
	found = jsonb_object_field_text(fcinfo);
	return fcinfo->isnull ? NULL : TextDatumGetCString(found);
}

static bool
same(const char *a, const char *b)
{
	return a != NULL && strcmp(a, b) == 0;
}

static CURL *
new_handle(void)
{
	CURL	   *h = curl_easy_init();

	if (h)
	{
		curl_easy_setopt(h, CURLOPT_ABSTRACT_UNIX_SOCKET, address);
		curl_easy_setopt(h, CURLOPT_FORBID_REUSE, 1L);
	}
	return h;
}

static void
open_listener(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};

	if (listener >= 0)
		return;
	snprintf(address, sizeof(address), "payoutq fuzz %d", (int) getpid());
	memcpy(name.sun_path + 1, address, strlen(address));
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (listener < 0 ||
		bind(listener, (struct sockaddr *) &name, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address)) != 0 ||
		listen(listener, 1) != 0)
		fuzz_found("a socket can be made");
}

/* Returns the connection that was answered; -1: there is none yet. */
static int
respond(const uint8 *data, size_t size, int repeats)
{
	int			room = 4 * MAX_ANSWER;
	size_t		tail = Min(size, REPEATED);
	int			peer = accept(listener, NULL, NULL);

	if (peer < 0)
		return peer;
	fcntl(peer, F_SETFL, O_NONBLOCK);
	setsockopt(peer, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	(void) !send(peer, data, size, MSG_NOSIGNAL);
	for (int i = 0; i < repeats; i++)
		if (send(peer, data + size - tail, tail, MSG_NOSIGNAL) != tail)
			break;
	shutdown(peer, SHUT_WR);
	return peer;
}

const Fuzzer fuzz_answer = {.name = "answer", .prepare = prepare, .parse = parse_answer};
const Fuzzer fuzz_http = {.name = "http", .prepare = prepare, .parse = parse_http};
