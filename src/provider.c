/*
 * provider.c
 *		Providers: foreign servers of the wrapper payout_provider, their options,
 *		and what the kinds share.
 */
#include "postgres.h"

#include "access/reloptions.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "common/hmac.h"
#include "common/sha2.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "provider.h"

#define DEFAULT_RATE_LIMIT	25
#define DEFAULT_TIMEOUT_MS	80000
#define MIN_TIMEOUT_MS		100
#define MAX_TIMEOUT_MS		(10 * 60 * 1000)
#define DEFAULT_QUIET_MS	(60 * 60 * 1000)	/* as in payoutq.quiet_period() */
#define DEFAULT_API_VERSION	"2024-06-20"
#define DEFAULT_CHANNEL		"private-user-%s"

#define KINDS_HINT			"Kinds are external, pusher, stripe and webhook."

#define ALPHANUMERIC		"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

/* As long as a signature of a web hook is good */
#define SIGNATURE_TOLERANCE_S	300

typedef enum OptionType
{
	OPTION_KIND,
	OPTION_URL,
	OPTION_NUMBER,
	OPTION_INTERVAL,
	OPTION_TEXT,
	OPTION_WORD,
	OPTION_CHANNEL
} OptionType;

typedef struct ProviderOption
{
	const char *name;
	Oid			catalog;
	OptionType	type;
} ProviderOption;

static const ProviderOption options_allowed[] = {
	{"kind", ForeignServerRelationId, OPTION_KIND},
	{"base_url", ForeignServerRelationId, OPTION_URL},
	{"status_url", ForeignServerRelationId, OPTION_URL},
	{"rate_limit", ForeignServerRelationId, OPTION_NUMBER},
	{"timeout", ForeignServerRelationId, OPTION_INTERVAL},
	{"key_life", ForeignServerRelationId, OPTION_INTERVAL},
	{"quiet_period", ForeignServerRelationId, OPTION_INTERVAL},
	{"api_version", ForeignServerRelationId, OPTION_TEXT},
	{"app_id", ForeignServerRelationId, OPTION_WORD},
	{"channel", ForeignServerRelationId, OPTION_CHANNEL},
	{"api_key", UserMappingRelationId, OPTION_TEXT},
	{"webhook_secret", UserMappingRelationId, OPTION_TEXT},
	{"secret", UserMappingRelationId, OPTION_TEXT},
};

/* Those that the dispatcher sends to; there is "external" besides. */
static const ProviderKind *const kinds[] = {&payoutq_stripe, &payoutq_webhook, &payoutq_pusher};

static const ProviderKind *find_kind(const char *name);
static void check_option(const char *name, const char *value, Oid catalog);
static void check_url(const char *name, const char *value);
static int64 interval_ms(const char *name, const char *value);
static const char *secret_option(const ProviderKind *kind);
static bool is_loopback(const char *host);
static void check_pusher(const char *kind, const char *base_url, bool has_app, bool has_channel);

PG_FUNCTION_INFO_V1(payoutq_provider_validator);
PG_FUNCTION_INFO_V1(payoutq_signature_is_valid);

/* payoutq.provider_validator(options text[], catalog oid) */
Datum
payoutq_provider_validator(PG_FUNCTION_ARGS)
{
	List	   *options = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	const char *kind = NULL;
	const char *base_url = NULL;
	bool		has_app = false;
	bool		has_channel = false;
	int64		timeout_ms = DEFAULT_TIMEOUT_MS;
	int64		quiet_ms = DEFAULT_QUIET_MS;
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		check_option(option->defname, defGetString(option), catalog);
		if (strcmp(option->defname, "kind") == 0)
			kind = defGetString(option);
		else if (strcmp(option->defname, "timeout") == 0)
			timeout_ms = interval_ms(option->defname, defGetString(option));
		else if (strcmp(option->defname, "quiet_period") == 0)
			quiet_ms = interval_ms(option->defname, defGetString(option));
		else if (strcmp(option->defname, "base_url") == 0)
			base_url = defGetString(option);
		has_app |= strcmp(option->defname, "app_id") == 0;
		has_channel |= strcmp(option->defname, "channel") == 0;
	}
	if (catalog != ForeignServerRelationId)
		PG_RETURN_VOID();
	if (kind == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a provider needs the option \"kind\""),
				 errhint(KINDS_HINT)));
	if (find_kind(kind) && base_url == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a provider of kind \"%s\" needs the option \"base_url\"", kind)));
	check_pusher(kind, base_url, has_app, has_channel);
	if (timeout_ms < MIN_TIMEOUT_MS || timeout_ms > MAX_TIMEOUT_MS)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"timeout\" must be from 100 milliseconds to 10 minutes")));
	if (quiet_ms < timeout_ms)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"quiet_period\" must not be shorter than \"timeout\""),
				 errdetail("The provider may still be at a call that has timed out.")));
	PG_RETURN_VOID();
}

static const ProviderKind *
find_kind(const char *name)
{
	for (size_t i = 0; i < lengthof(kinds); i++)
		if (strcmp(kinds[i]->name, name) == 0)
			return kinds[i];
	return NULL;
}

/* The value is not part of any message: it may be a secret. */
static void
check_option(const char *name, const char *value, Oid catalog)
{
	const ProviderOption *option = NULL;
	const char *mark;

	for (size_t i = 0; i < lengthof(options_allowed); i++)
		if (options_allowed[i].catalog == catalog && strcmp(options_allowed[i].name, name) == 0)
			option = &options_allowed[i];
	if (option == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
				 errmsg("invalid option \"%s\"", name),
				 catalog == UserMappingRelationId ?
				 errhint("Options of a user mapping are api_key, secret and webhook_secret.") :
				 errhint("Options of a provider are kind, base_url, status_url, rate_limit, timeout, key_life, quiet_period, api_version, app_id and channel.")));

	switch (option->type)
	{
		case OPTION_KIND:
			if (find_kind(value) == NULL && strcmp(value, "external") != 0)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("invalid kind of provider \"%s\"", value),
						 errhint(KINDS_HINT)));
			break;
		case OPTION_URL:
			check_url(name, value);
			break;
		case OPTION_NUMBER:
			if (strspn(value, "0123456789") != strlen(value) || strlen(value) > 6 || atoi(value) < 1)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("option \"%s\" must be a number from 1 to 999999", name)));
			break;
		case OPTION_INTERVAL:
			(void) interval_ms(name, value);
			break;
		case OPTION_TEXT:
			/* It becomes a header. */
			if (value[0] == '\0' || strpbrk(value, "\r\n") != NULL)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("option \"%s\" must not be empty, nor have line breaks", name)));
			break;
		case OPTION_WORD:
			if (value[0] == '\0' || strspn(value, ALPHANUMERIC) != strlen(value))
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("option \"%s\" must have only letters and digits", name)));
			break;
		case OPTION_CHANNEL:
			mark = strstr(value, "%s");
			if (mark == NULL || strspn(value, ALPHANUMERIC "_-=@,.;") != (size_t) (mark - value) ||
				strspn(mark + 2, ALPHANUMERIC "_-=@,.;") != strlen(mark + 2) || strlen(value) > 164)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("option \"%s\" must be a name of a channel with %%s once, in place of the user", name),
						 errdetail("Names have letters, digits and _-=@,.; and at most 164 characters.")));
			break;
	}
}

/* What only Pusher has, and what its addresses are made of */
static void
check_pusher(const char *kind, const char *base_url, bool has_app, bool has_channel)
{
	bool		is_pusher = find_kind(kind) == &payoutq_pusher;

	if (!is_pusher && (has_app || has_channel))
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
				 errmsg("a provider of kind \"%s\" has no option \"%s\"", kind, has_app ? "app_id" : "channel")));
	if (is_pusher && !has_app)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a provider of kind \"%s\" needs the option \"%s\"", kind, "app_id")));
	if (is_pusher && base_url && strchr(base_url, '?'))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"%s\" of a provider of kind \"%s\" must not have a query", "base_url", kind)));
}

/* Without TLS, only to this machine. */
static void
check_url(const char *name, const char *value)
{
	CURLU	   *url = curl_url();
	char	   *scheme = NULL;
	char	   *host = NULL;
	char	   *part = NULL;
	bool		ok = url != NULL && curl_url_set(url, CURLUPART_URL, value, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_HOST, &host, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_USER, &part, 0) == CURLUE_NO_USER &&
		curl_url_get(url, CURLUPART_PASSWORD, &part, 0) == CURLUE_NO_PASSWORD &&
		curl_url_get(url, CURLUPART_FRAGMENT, &part, 0) == CURLUE_NO_FRAGMENT &&
		value[strlen(value) - 1] != '/';
	bool		secure = ok && strcmp(scheme, "https") == 0;
	bool		local = ok && strcmp(scheme, "http") == 0 && is_loopback(host);

	curl_free(scheme);
	curl_free(host);
	curl_free(part);
	curl_url_cleanup(url);
	if (!ok)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"%s\" is not a URL of a provider", name),
				 errdetail("It must have a host, no user, password or fragment, and not end with a slash.")));
	if (!secure && !local)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"%s\" must begin with https://", name),
				 errdetail("http:// is only allowed for loopback addresses.")));
}

static bool
is_loopback(const char *host)
{
	return strcmp(host, "127.0.0.1") == 0 || strcmp(host, "[::1]") == 0 ||
		strcmp(host, "localhost") == 0;
}

static int64
interval_ms(const char *name, const char *value)
{
	Interval   *interval = DatumGetIntervalP(DirectFunctionCall3(interval_in, CStringGetDatum(value),
																 ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));

	if (interval->month != 0 || interval->day < 0 || interval->day > 3650 || interval->time < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"%s\" must be a time of up to 3650 days", name)));
	return interval->time / 1000 + interval->day * INT64CONST(86400000);
}

/* It exists, makes transfers, and the current user may use it; as for a foreign table. */
void
payoutq_check_provider(const char *provider)
{
	ForeignServer *server = GetForeignServerByName(provider, true);
	ListCell   *cell;

	/* It cannot be dropped before others see the job. */
	if (server)
	{
		LockDatabaseObject(ForeignServerRelationId, server->serverid, 0, AccessShareLock);
		server = GetForeignServerByName(provider, true);
	}
	if (server == NULL ||
		strcmp(GetForeignDataWrapper(server->fdwid)->fdwname, "payout_provider") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("provider \"%s\" does not exist", provider),
				 errhint("Create it with CREATE SERVER ... FOREIGN DATA WRAPPER payout_provider OPTIONS (kind ...).")));
	if (!payoutq_may_use_server(server->serverid))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for provider \"%s\"", provider),
				 errhint("GRANT USAGE ON FOREIGN SERVER lets a role use it.")));
	foreach(cell, server->options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		if (strcmp(option->defname, "kind") == 0 && find_kind(defGetString(option)) == &payoutq_pusher)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("provider \"%s\" does not make transfers", provider),
					 errdetail("It is of kind pusher, which pushes notifications.")));
	}
}

/* Options as payoutq.sending_providers() has them: name, value, ... */
void
payoutq_configure_provider(Provider *provider, Datum options)
{
	MemoryContext caller;
	Datum	   *words;
	int			count;

	if (provider->options == NULL)
		provider->options = AllocSetContextCreate(TopMemoryContext, "payoutq provider", ALLOCSET_SMALL_SIZES);
	MemoryContextReset(provider->options);
	caller = MemoryContextSwitchTo(provider->options);

	provider->rate_limit = DEFAULT_RATE_LIMIT;
	provider->timeout_ms = DEFAULT_TIMEOUT_MS;
	provider->api_version = pstrdup(DEFAULT_API_VERSION);
	provider->base_url = provider->status_url = provider->secret = provider->app_id = provider->key = NULL;
	provider->channel = pstrdup(DEFAULT_CHANNEL);
	deconstruct_array(DatumGetArrayTypePCopy(options), TEXTOID, -1, false, TYPALIGN_INT, &words, NULL, &count);
	for (int i = 0; i + 1 < count; i += 2)
	{
		char	   *name = TextDatumGetCString(words[i]);
		char	   *value = TextDatumGetCString(words[i + 1]);

		if (strcmp(name, "kind") == 0)
			provider->kind = find_kind(value);
		else if (strcmp(name, "base_url") == 0)
			provider->base_url = value;
		else if (strcmp(name, "status_url") == 0)
			provider->status_url = value;
		else if (strcmp(name, "rate_limit") == 0)
			provider->rate_limit = atoi(value);
		else if (strcmp(name, "timeout") == 0)
			provider->timeout_ms = (int) interval_ms(name, value);
		else if (strcmp(name, "api_version") == 0)
			provider->api_version = value;
		else if (strcmp(name, "app_id") == 0)
			provider->app_id = value;
		else if (strcmp(name, "channel") == 0)
			provider->channel = value;
		else if (strcmp(name, "api_key") == 0)
			provider->key = value;
		if (provider->kind && strcmp(name, secret_option(provider->kind)) == 0)
			provider->secret = value;
	}
	provider->problem = NULL;
	if (provider->kind == &payoutq_pusher ? !(provider->key && provider->secret) : provider->secret == NULL)
		provider->problem = provider->kind == &payoutq_pusher ?
			"there is no user mapping for PUBLIC with the options api_key and secret" :
			provider->kind == &payoutq_webhook ?
			"there is no user mapping for PUBLIC with the option webhook_secret" :
			"there is no user mapping for PUBLIC with the option api_key";
	MemoryContextSwitchTo(caller);
}

/* A service of the application and Pusher get signatures, others the key itself. */
static const char *
secret_option(const ProviderKind *kind)
{
	return kind == &payoutq_webhook ? "webhook_secret" : kind == &payoutq_pusher ? "secret" : "api_key";
}

/* In hexadecimal; RFC 2104. */
char *
payoutq_hmac_sha256(const char *secret, const char *text, int length)
{
	pg_hmac_ctx *context = pg_hmac_create(PG_SHA256);
	uint8		hash[PG_SHA256_DIGEST_LENGTH];
	char	   *hex = palloc(2 * sizeof(hash) + 1);

	if (context == NULL ||
		pg_hmac_init(context, (const uint8 *) secret, strlen(secret)) < 0 ||
		pg_hmac_update(context, (const uint8 *) text, length) < 0 ||
		pg_hmac_final(context, hash, sizeof(hash)) < 0)
		elog(ERROR, "could not compute a signature");
	pg_hmac_free(context);
	for (size_t i = 0; i < sizeof(hash); i++)
		snprintf(hex + 2 * i, 3, "%02x", hash[i]);
	return hex;
}

/*
 * What should be JSON, or NULL if it is not.  Parsing takes no lock and holds
 * nothing, so that an error of it needs no rollback.
 */
Jsonb *
payoutq_parse_json(const char *json, int length)
{
	MemoryContext context = CurrentMemoryContext;
	Jsonb	   *volatile parsed = NULL;

	if (strlen(json) != (size_t) length)
		return NULL;
	PG_TRY();
	{
		parsed = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return parsed;
}

/* The text at a path of the answer; NULL: it is not JSON, or has nothing there. */
char *
payoutq_answer_at(const Call *call, const char *const *path, int depth)
{
	Datum	   *keys = palloc(depth * sizeof(Datum));
	bool		isnull = true;
	Datum		found = (Datum) 0;

	for (int i = 0; i < depth; i++)
		keys[i] = CStringGetTextDatum(path[i]);
	if (call->json)
		found = jsonb_get_element(call->json, keys, depth, &isnull, true);
	return isnull ? NULL : TextDatumGetCString(found);
}

/* At the top of the answer */
char *
payoutq_answer_field(const Call *call, const char *name)
{
	return payoutq_answer_at(call, &name, 1);
}

/* Elements of an array at the top of the answer; -1: there is no such array. */
int
payoutq_answer_count(const Call *call, const char *name)
{
	JsonbValue *value = NULL;

	if (call->json && JB_ROOT_IS_OBJECT(call->json))
		value = getKeyJsonValueFromContainer(&call->json->root, name, strlen(name), NULL);
	if (value == NULL || value->type != jbvBinary || !JsonContainerIsArray(value->val.binary.data))
		return -1;
	return JsonContainerSize(value->val.binary.data);
}

/*
 * payoutq.signature_is_valid(provider, header, body, at): is one of the v1 in
 * "t=<unix time>,v1=<hex>,..." the HMAC-SHA256 of "t.body", and t not long ago?
 * https://docs.stripe.com/webhooks#verify-manually; ours are made alike.  It is
 * checked on the bytes, before anything is parsed.
 */
Datum
payoutq_signature_is_valid(PG_FUNCTION_ARGS)
{
	static EngineStatement find = {
		"SELECT o.option_value FROM pg_foreign_server s"
		"  JOIN pg_user_mapping m ON m.umserver = s.oid AND m.umuser = 0, pg_options_to_table(m.umoptions) o"
		" WHERE s.srvname = $1 AND o.option_name = 'webhook_secret'",
		1, {TEXTOID}, NULL
	};
	Datum		values[] = {PG_GETARG_DATUM(0)};
	char	   *header = text_to_cstring(PG_GETARG_TEXT_PP(1));
	bytea	   *body = PG_GETARG_BYTEA_PP(2);
	int64		now = timestamptz_to_time_t(PG_GETARG_TIMESTAMPTZ(3));
	EngineState state;
	char	   *secret = NULL;
	StringInfoData text;
	char	   *expected;
	int			digits = 0;
	int64		signed_at = 0;
	bool		valid = false;

	SPI_connect();
	payoutq_engine_enter(&state);
	if (payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 1)
		secret = payoutq_result_cstring(0, 1);

	initStringInfo(&text);
	if (secret && strncmp(header, "t=", 2) == 0)
		digits = strspn(header + 2, "0123456789");
	/* The time that is checked must be all that is signed. */
	if (digits > 0 && header[2 + digits] == ',')
	{
		signed_at = strtoll(header + 2, NULL, 10);
		appendBinaryStringInfo(&text, header + 2, digits);
		appendStringInfoChar(&text, '.');
		appendBinaryStringInfo(&text, VARDATA_ANY(body), VARSIZE_ANY_EXHDR(body));
		expected = payoutq_hmac_sha256(secret, text.data, text.len);
		for (char *part = strtok(header, ","); part; part = strtok(NULL, ","))
			if (strncmp(part, "v1=", 3) == 0 && strlen(part + 3) == strlen(expected))
			{
				unsigned char difference = 0;

				/* In constant time */
				for (int i = 0; expected[i]; i++)
					difference |= part[3 + i] ^ expected[i];
				valid |= difference == 0;
			}
	}
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_BOOL(valid && signed_at >= now - SIGNATURE_TOLERANCE_S && signed_at <= now + SIGNATURE_TOLERANCE_S);
}
