/*
 * pusher.c
 *		Providers of kind "pusher": notifications as events of Pusher Channels, by
 *		its HTTP API, https://pusher.com/docs/channels/library_auth_reference/rest-api
 *
 * POST base_url/apps/app_id/events?auth_key=...&auth_timestamp=...&auth_version=1.0
 *		&body_md5=...&auth_signature=..., with
 *		{"name": the type, "channel", "data": "a JSON object as text"}
 *
 * An event has no key by which Pusher would know it again, so what may have been
 * done is never repeated.  That it was not done is what these say: that there
 * was no connection, 401, 403, 429, and 503, with which a server says that it
 * does not handle the request now (RFC 9110, 15.6.4).
 */
#include "postgres.h"

#include <time.h>

#include "common/md5.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/json.h"

#include "provider.h"

/* Limits of Pusher, in bytes */
#define MAX_DATA			10240
#define MAX_CHANNEL			164

/* What it allows in the name of a channel, but for the one that we escape with */
#define CHANNEL_CHARACTERS	"_-=@,."

#define MD5_HEX_LENGTH		32

static void build_push(Call *call);
static char *channel_of(const Call *call);
static char *in_utf8(const char *text);
static void add_query(Call *call, const char *body_md5);
static void refuse(Call *call, CallOutcome outcome, const char *reason);
static void read_answer(Call *call);

const ProviderKind payoutq_pusher = {
	.name = "pusher",
	.push = build_push,
	.read_answer = read_answer
};

static void
build_push(Call *call)
{
	char	   *data = in_utf8(call->data);
	char	   *channel;
	StringInfoData body;
	char		md5[MD5_HEX_LENGTH + 1];
	const char *problem = NULL;

	if (data == NULL || in_utf8(call->user_id) == NULL)
	{
		refuse(call, CALL_PERMANENT, "it is not text in UTF-8");
		return;
	}
	if (strlen(data) > MAX_DATA)
	{
		refuse(call, CALL_PERMANENT, psprintf("its data has %zu bytes, and Pusher takes %d", strlen(data), MAX_DATA));
		return;
	}
	channel = channel_of(call);
	if (strlen(channel) > MAX_CHANNEL)
	{
		refuse(call, CALL_PERMANENT, psprintf("the name of its channel has %zu bytes, and Pusher takes %d", strlen(channel), MAX_CHANNEL));
		return;
	}

	initStringInfo(&body);
	appendStringInfoString(&body, "{\"name\":");
	escape_json(&body, call->type);
	appendStringInfoString(&body, ",\"channel\":");
	escape_json(&body, channel);
	appendStringInfoString(&body, ",\"data\":");
	escape_json(&body, data);
	appendStringInfoChar(&body, '}');
	if (!pg_md5_hash(body.data, body.len, md5, &problem))
	{
		refuse(call, CALL_REFUSED, psprintf("could not compute MD5: %s", problem));
		return;
	}
	call->body = body.data;
	payoutq_http_header(call, "Content-Type: application/json");
	add_query(call, md5);
}

/* NULL: it is none, which only a database without an encoding can have. */
static char *
in_utf8(const char *text)
{
	if (GetDatabaseEncoding() == PG_SQL_ASCII && !pg_verify_mbstr(PG_UTF8, text, strlen(text), true))
		return NULL;
	return pg_server_to_any(text, strlen(text), PG_UTF8);
}

/*
 * A byte that the name of a channel cannot have is ";" and two hexadecimal
 * digits, and so is ";" itself: two users never share a channel.
 */
static char *
channel_of(const Call *call)
{
	const char *pattern = call->provider->channel;
	const char *mark = strstr(pattern, "%s");
	StringInfoData name;

	initStringInfo(&name);
	appendBinaryStringInfo(&name, pattern, mark - pattern);
	for (const unsigned char *c = (const unsigned char *) in_utf8(call->user_id); *c; c++)
	{
		if ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') ||
			strchr(CHANNEL_CHARACTERS, *c) != NULL)
			appendStringInfoChar(&name, *c);
		else
			appendStringInfo(&name, ";%02X", *c);
	}
	appendStringInfoString(&name, mark + strlen("%s"));
	return name.data;
}

/* Signed with the time of now, since an old signature is refused. */
static void
add_query(Call *call, const char *body_md5)
{
	const Provider *provider = call->provider;
	char	   *url = psprintf("%s/apps/%s/events", provider->base_url, provider->app_id);
	char	   *path = strchr(strstr(url, "://") + strlen("://"), '/');
	char	   *rest = psprintf("&auth_timestamp=%lld&auth_version=1.0&body_md5=%s", (long long) time(NULL), body_md5);
	char	   *text = psprintf("POST\n%s\nauth_key=%s%s", path, provider->key, rest);

	call->url = psprintf("%s?auth_key=%s%s&auth_signature=%s", url, payoutq_http_escape(provider->key), rest,
						 payoutq_hmac_sha256(provider->secret, text, strlen(text)));
}

/* It is not sent at all. */
static void
refuse(Call *call, CallOutcome outcome, const char *reason)
{
	call->outcome = outcome;
	call->reason = pstrdup(reason);
	call->retry_after = -1;
}

/* The status says all; the text is for whoever reads push_error. */
static void
read_answer(Call *call)
{
	call->reason = psprintf("HTTP %ld", call->http_status);
	if (call->answer && call->answer[0])
		call->reason = psprintf("%s: %s", call->reason, call->answer);
	switch (call->http_status)
	{
		case 200:
			call->outcome = CALL_COMPLETED;
			break;
		case 401:
		case 403:
		case 404:				/* there is no such application */
			call->outcome = CALL_REFUSED;
			break;
		case 429:
			call->outcome = CALL_THROTTLED;
			break;
		case 503:
			call->outcome = CALL_UNREACHABLE;
			break;
		case 400:
		case 413:
			call->outcome = CALL_PERMANENT;
			break;
		default:
			call->outcome = CALL_UNKNOWN;
	}
}
