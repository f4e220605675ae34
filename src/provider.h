/*
 * provider.h
 *		What the dispatcher, the calls over HTTP and the kinds of providers share.
 */
#ifndef PAYOUTQ_PROVIDER_H
#define PAYOUTQ_PROVIDER_H

#include <curl/curl.h>
#if LIBCURL_VERSION_NUM < 0x075500
#error "payoutq needs libcurl 7.85 or newer"
#endif

#include "lib/stringinfo.h"
#include "utils/jsonb.h"
#include "payoutq.h"

/* What came of a call, by what the provider said. */
typedef enum CallOutcome
{
	CALL_COMPLETED,				/* the money has moved */
	CALL_SENT,					/* accepted, to be confirmed */
	CALL_TRANSIENT,				/* not done: try again */
	CALL_PERMANENT,				/* not done, and never will be */
	CALL_UNKNOWN,				/* nobody knows: the same key again; of a question: ask again */
	CALL_THROTTLED,				/* not looked at: too many calls */
	CALL_REFUSED,				/* not looked at: nobody's would be */
	CALL_UNREACHABLE,			/* there was no connection to send it over */
	CALL_UNFUNDED,				/* not done for want of money; that is stored under the key */
	CALL_REJECTED,				/* of a confirmation: it will not happen */
	CALL_ABSENT					/* of a lookup: there is no such transfer */
} CallOutcome;

/* What a call is for. */
typedef enum CallPurpose
{
	CALL_SEND,					/* make a transfer */
	CALL_CONFIRM,				/* what has become of one that was sent? */
	CALL_LOOKUP,				/* what was done under a key? */
	CALL_PUSH					/* push a notification */
} CallPurpose;

/*
 * Where to look for what is due.  While something holds back vacuum, an index
 * begins with all that was done before, so most looks begin where the last one
 * ended; one from the beginning finds what those have passed by.
 */
typedef struct Look
{
	TimestampTz since;
	TimestampTz whole_at;		/* when the next is from the beginning */
	bool		partial;		/* the last one was not */
} Look;

typedef struct Provider
{
	char	   *name;
	MemoryContext options;		/* of what follows, made again at each look */
	const struct ProviderKind *kind;
	char	   *base_url;
	char	   *status_url;		/* or NULL */
	char	   *api_version;
	char	   *secret;			/* never logged */
	char	   *app_id;			/* of Pusher, as are the next two */
	char	   *key;
	char	   *channel;		/* %s stands for the user */
	int			rate_limit;		/* calls a second */
	int			timeout_ms;
	TimestampTz open_until;		/* nothing is sent before; 0: at once */
	bool		asks_when_open; /* but questions are asked */
	const char *problem;		/* of the configuration; NULL: none */
	bool		told;			/* it is in the log */

	double		tokens;			/* of the bucket that rate_limit fills */
	TimestampTz filled_at;
	Look		send_look;
	Look		confirm_look;
	TimestampTz looked_up_at;
	bool		ask_first;		/* whose turn it is: questions or sending */
	int			sending;		/* calls under way, or not recorded yet */
	int			asking;
	bool		gone;			/* from the catalog */
} Provider;

#define MAX_ANSWER	(64 * 1024)
#define MAX_REASON	1000
#define MAX_REFERENCE	255

typedef struct Call
{
	Provider   *provider;
	CallPurpose purpose;
	TimestampTz lease_until;	/* then it may be somebody else's */
	TimestampTz record_at;		/* its answer is not recorded before */
	bool		recorded;		/* in this transaction */
	MemoryContext context;		/* of the call and all that it points to */
	MemoryContext page;			/* of a lookup: of the page it is at, but the first */

	/* the transfer: frozen columns, from which the request is built */
	int64		transfer_id;
	char	   *token;
	int			attempt;
	char	   *idempotency_key;
	const char *origin;			/* payoutq.key_origin() */
	char	   *user_id;
	char	   *destination;
	int64		amount;
	char	   *currency;
	int64		job_id;
	int			entry;
	char	   *reference;		/* the provider's */
	char	   *cursor;			/* of a lookup: the page after this one; NULL: the first, or no more */

	/* the notification, whose id and user are transfer_id and user_id */
	char	   *type;
	char	   *data;			/* JSON */

	/* the request */
	char	   *url;			/* NULL: there is none to make */
	char	   *body;			/* NULL: a GET */
	struct curl_slist *headers;
	CURL	   *handle;

	/* the answer */
	bool		begun;			/* it may have been sent */
	CURLcode	code;
	long		http_status;
	char	   *answer;			/* by malloc; NULL: none has come */
	int			length;
	bool		too_long;
	Jsonb	   *json;			/* NULL: it is none */

	/* what it means */
	CallOutcome outcome;
	char	   *reason;
	int			retry_after;	/* seconds; -1: not said */
} Call;

typedef struct ProviderKind
{
	const char *name;
	void		(*push) (Call *call);	/* it gets notifications; it has none of the next four, then */
	void		(*send) (Call *call);	/* builds the request */
	bool		(*can_confirm) (const Provider *provider);
	void		(*confirm) (Call *call);
	void		(*lookup) (Call *call); /* NULL: it cannot be asked for a key */
	void		(*read_answer) (Call *call);	/* an HTTP answer has come */
} ProviderKind;

extern const ProviderKind payoutq_stripe;
extern const ProviderKind payoutq_webhook;
extern const ProviderKind payoutq_pusher;

/* provider.c */
extern void payoutq_configure_provider(Provider *provider, Datum options);
extern char *payoutq_hmac_sha256(const char *secret, const char *text, int length);
extern Jsonb *payoutq_parse_json(const char *json, int length);
extern char *payoutq_answer_at(const Call *call, const char *const *path, int depth);
extern char *payoutq_answer_field(const Call *call, const char *name);
extern int	payoutq_answer_count(const Call *call, const char *name);

/* http.c */
extern int	payoutq_http_capacity(void);
extern void payoutq_http_start(Call *call);
extern void payoutq_http_wait(int milliseconds);
extern void payoutq_http_again(Call *call);
extern Call *payoutq_http_done(void);
extern int	payoutq_http_calls(void);
extern void payoutq_http_free(Call *call);
extern void payoutq_http_header(Call *call, const char *header);
extern char *payoutq_http_answer_header(const Call *call, const char *name);
extern char *payoutq_http_escape(const char *text);

#endif							/* PAYOUTQ_PROVIDER_H */
