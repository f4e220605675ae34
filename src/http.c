/*
 * http.c
 *		Calls over HTTP, many at once, with libcurl's multi interface.
 *
 * libcurl is not told to call back into code that can throw: what it reads goes
 * into the call's own buffer.  Its resolver uses threads, which must not get
 * our signals, so all are blocked while it runs.
 */
#include "postgres.h"

#include "libpq/pqsignal.h"
#include "mb/pg_wchar.h"
#include "storage/fd.h"
#include "utils/memutils.h"

#include "provider.h"

#define CONNECT_TIMEOUT_MS	10000
#define MAX_RETRY_AFTER_S	INT64CONST(3600)

static CURLM *multi = NULL;
static int	calls = 0;

static void begin(void);
static void block_signals(sigset_t *before);
static int	begin_request(void *arg, char *to, char *from, int to_port, int from_port);
static size_t write_answer(char *data, size_t size, size_t count, void *arg);
static void classify(Call *call);
static void read_answer(Call *call);
static bool is_text(const char *answer, int length);
static void end_handle(Call *call);

static void
begin(void)
{
	if (multi)
		return;
	if (curl_global_init(CURL_GLOBAL_DEFAULT) != 0 || (multi = curl_multi_init()) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not initialize libcurl")));
	curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, (long) payoutq_http_capacity());
}

/* Calls at once: the server's own files must not run out of descriptors. */
int
payoutq_http_capacity(void)
{
	return Min(PAYOUTQ_MAX_CALLS, max_safe_fds / 3);
}

static void
block_signals(sigset_t *before)
{
	sigprocmask(SIG_SETMASK, &BlockSig, before);
}

/* The call is the caller's again when payoutq_http_done() returns it. */
void
payoutq_http_start(Call *call)
{
	CURL	   *h;
	sigset_t	before;

	begin();
	block_signals(&before);
	call->handle = h = curl_easy_init();
	if (h)
	{
		curl_easy_setopt(h, CURLOPT_PRIVATE, call);
		curl_easy_setopt(h, CURLOPT_URL, call->url);
		curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, "http,https");
		curl_easy_setopt(h, CURLOPT_FOLLOWLOCATION, 0L);
		curl_easy_setopt(h, CURLOPT_SSL_VERIFYPEER, 1L);
		curl_easy_setopt(h, CURLOPT_SSL_VERIFYHOST, 2L);
		curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
		curl_easy_setopt(h, CURLOPT_PROXY, "");
		curl_easy_setopt(h, CURLOPT_CONNECTTIMEOUT_MS, (long) CONNECT_TIMEOUT_MS);
		curl_easy_setopt(h, CURLOPT_TIMEOUT_MS, (long) call->provider->timeout_ms);
		curl_easy_setopt(h, CURLOPT_USERAGENT, "payoutq/" PAYOUTQ_VERSION);
		curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, write_answer);
		curl_easy_setopt(h, CURLOPT_WRITEDATA, call);
		curl_easy_setopt(h, CURLOPT_HTTPHEADER, call->headers);
		curl_easy_setopt(h, CURLOPT_PREREQFUNCTION, begin_request);
		curl_easy_setopt(h, CURLOPT_PREREQDATA, call);
		if (call->purpose == CALL_PUSH)
		{
			/* It is lost when it may have been made, as on a connection that just ends. */
			curl_easy_setopt(h, CURLOPT_FRESH_CONNECT, 1L);
			curl_easy_setopt(h, CURLOPT_FORBID_REUSE, 1L);
		}
		if (call->body)
		{
			curl_easy_setopt(h, CURLOPT_POSTFIELDS, call->body);
			curl_easy_setopt(h, CURLOPT_POSTFIELDSIZE, (long) strlen(call->body));
		}
		if (curl_multi_add_handle(multi, h) != CURLM_OK)
		{
			curl_easy_cleanup(h);
			h = NULL;
		}
	}
	sigprocmask(SIG_SETMASK, &before, NULL);
	if (h == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not start a call with libcurl")));
	ReserveExternalFD();
	calls++;
}

/*
 * There is a connection, and the request follows.  When one that was used before
 * ends without an answer, libcurl makes the request again by itself; what comes
 * of that says nothing of the first one, so it may not.
 */
static int
begin_request(void *arg, char *to pg_attribute_unused(), char *from pg_attribute_unused(),
			  int to_port pg_attribute_unused(), int from_port pg_attribute_unused())
{
	Call	   *call = arg;

	if (call->begun && (call->purpose == CALL_SEND || call->purpose == CALL_PUSH))
		return CURL_PREREQFUNC_ABORT;
	call->begun = true;
	return CURL_PREREQFUNC_OK;
}

static size_t
write_answer(char *data, size_t size, size_t count, void *arg)
{
	Call	   *call = arg;
	size_t		length = size * count;

	char	   *grown;

	if (call->length + length > MAX_ANSWER)
	{
		call->too_long = true;
		return 0;
	}
	/* palloc() could throw through libcurl. */
	grown = realloc(call->answer, call->length + length + 1);
	if (grown == NULL)
		return 0;
	call->answer = grown;
	memcpy(call->answer + call->length, data, length);
	call->length += length;
	call->answer[call->length] = '\0';
	return length;
}

/* Until something happens, at most so long. */
void
payoutq_http_wait(int milliseconds)
{
	sigset_t	before;
	int			running;

	if (calls == 0)
		return;
	block_signals(&before);
	(void) curl_multi_perform(multi, &running);
	if (running == calls)
		(void) curl_multi_poll(multi, NULL, 0, milliseconds, NULL);
	(void) curl_multi_perform(multi, &running);
	sigprocmask(SIG_SETMASK, &before, NULL);
}

/* The same call is made anew, for the next page; there may be thousands. */
void
payoutq_http_again(Call *call)
{
	MemoryContext page = AllocSetContextCreate(call->context, "payoutq page", ALLOCSET_SMALL_SIZES);
	MemoryContext caller = MemoryContextSwitchTo(page);

	end_handle(call);
	call->cursor = pstrdup(call->cursor);
	call->json = NULL;
	if (call->page)
		MemoryContextDelete(call->page);
	call->page = page;
	call->provider->kind->lookup(call);
	MemoryContextSwitchTo(caller);
	payoutq_http_start(call);
}

/* A call that has ended, with what it means; NULL: there is none now. */
Call *
payoutq_http_done(void)
{
	CURLMsg    *message;
	int			left;

	if (calls == 0)
		return NULL;
	while ((message = curl_multi_info_read(multi, &left)) != NULL)
	{
		Call	   *call;

		if (message->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &call);
		call->code = message->data.result;
		curl_easy_getinfo(call->handle, CURLINFO_RESPONSE_CODE, &call->http_status);
		calls--;
		classify(call);
		return call;
	}
	return NULL;
}

/*
 * Without an answer: what was never begun is tried again, and uses up no attempt,
 * since it is nobody's fault; of all else nobody knows.
 */
static void
classify(Call *call)
{
	MemoryContext caller = MemoryContextSwitchTo(call->page ? call->page : call->context);

	call->retry_after = -1;
	call->cursor = NULL;
	if (call->code == CURLE_OK || (call->purpose == CALL_PUSH && call->http_status != 0))
	{
		curl_off_t	seconds = 0;

		/* In seconds or as a date; 0 if it is not said. */
		curl_easy_getinfo(call->handle, CURLINFO_RETRY_AFTER, &seconds);
		if (seconds > 0)
			call->retry_after = (int) Min(seconds, MAX_RETRY_AFTER_S);
		read_answer(call);
	}
	else
	{
		call->outcome = call->begun ? CALL_UNKNOWN : CALL_UNREACHABLE;
		call->reason = call->too_long ? psprintf("the answer is longer than %d bytes", MAX_ANSWER) :
			call->code == CURLE_ABORTED_BY_CALLBACK ? pstrdup("the connection ended without an answer") :
			pstrdup(curl_easy_strerror(call->code));
	}
	if (call->reason && strlen(call->reason) > MAX_REASON)
		call->reason[pg_mbcliplen(call->reason, strlen(call->reason), MAX_REASON)] = '\0';
	MemoryContextSwitchTo(caller);
}

static void
read_answer(Call *call)
{
	call->json = NULL;
	if (call->answer && !is_text(call->answer, call->length))
	{
		if (call->purpose == CALL_PUSH)
		{
			/* Its status is enough. */
			call->answer[0] = '\0';
			call->provider->kind->read_answer(call);
			return;
		}
		call->outcome = CALL_UNKNOWN;
		call->reason = pstrdup("the answer is not text in the encoding of the database");
		return;
	}
	call->json = payoutq_parse_json(call->answer ? call->answer : "", call->length);
	call->provider->kind->read_answer(call);
	if (call->purpose != CALL_CONFIRM && call->reference &&
		(call->reference[0] == '\0' || strlen(call->reference) > MAX_REFERENCE))
	{
		call->outcome = CALL_UNKNOWN;
		call->reason = psprintf("the reference in the answer does not have 1 to %d bytes", MAX_REFERENCE);
		call->reference = NULL;
	}
}

/* UTF-8 is what providers speak; of other encodings only ASCII is the same. */
static bool
is_text(const char *answer, int length)
{
	if (GetDatabaseEncoding() == PG_UTF8)
		return pg_verifymbstr(answer, length, true);
	for (int i = 0; i < length; i++)
		if (IS_HIGHBIT_SET(answer[i]))
			return false;
	return true;
}

int
payoutq_http_calls(void)
{
	return calls;
}

void
payoutq_http_free(Call *call)
{
	end_handle(call);
	MemoryContextDelete(call->context);
}

static void
end_handle(Call *call)
{
	sigset_t	before;

	block_signals(&before);
	if (call->handle)
	{
		curl_multi_remove_handle(multi, call->handle);
		curl_easy_cleanup(call->handle);
		ReleaseExternalFD();
	}
	curl_slist_free_all(call->headers);
	sigprocmask(SIG_SETMASK, &before, NULL);
	free(call->answer);
	call->handle = NULL;
	call->headers = NULL;
	call->answer = NULL;
	call->length = 0;
	call->begun = false;
	call->too_long = false;
}

void
payoutq_http_header(Call *call, const char *header)
{
	struct curl_slist *headers = curl_slist_append(call->headers, header);

	if (headers == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	call->headers = headers;
}

/* NULL: it has none of that name, or one that is not text. */
char *
payoutq_http_answer_header(const Call *call, const char *name)
{
	struct curl_header *header;

	if (curl_easy_header(call->handle, name, 0, CURLH_HEADER, -1, &header) != CURLHE_OK ||
		!is_text(header->value, strlen(header->value)))
		return NULL;
	return pstrdup(header->value);
}

/* For a form or a URL; RFC 3986. */
char *
payoutq_http_escape(const char *text)
{
	StringInfoData escaped;

	initStringInfo(&escaped);
	for (const unsigned char *c = (const unsigned char *) text; *c; c++)
	{
		if ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') ||
			strchr("-._~", *c) != NULL)
			appendStringInfoChar(&escaped, *c);
		else
			appendStringInfo(&escaped, "%%%02X", *c);
	}
	return escaped.data;
}
