/*
 * settings.c
 *		All settings of the extension.
 */
#include "postgres.h"

#include <limits.h>

#include "utils/builtins.h"
#include "utils/guc.h"

#include "payoutq.h"

int			payoutq_workers;
int			payoutq_batch_size;
int			payoutq_max_winners;
int			payoutq_interval;
char	   *payoutq_databases;
bool		payoutq_allow_drop;
int			payoutq_max_attempts;
int			payoutq_retry_base;
int			payoutq_retry_cap;
int			payoutq_lock_timeout;
static int	payoutq_notification_window;
static int	payoutq_retention;
static int	payoutq_confirm_timeout;
int			payoutq_send_interval;
int			payoutq_send_concurrency;
int			payoutq_confirm_interval;
int			payoutq_confirm_batch;

typedef struct IntSetting
{
	const char *name;
	const char *description;
	int		   *variable;
	int			value;
	int			min;
	int			max;
	GucContext	context;
	int			flags;
} IntSetting;

static const IntSetting settings[] = {
	{"payoutq.workers", "Sets the number of workers for each database that has work.",
	&payoutq_workers, 2, 0, PAYOUTQ_MAX_WORKERS, PGC_SIGHUP, 0},
	{"payoutq.batch_size", "Sets the number of entries that are paid in one transaction, for jobs that do not name one.",
	&payoutq_batch_size, 500, 1, PAYOUTQ_MAX_BATCH_SIZE, PGC_USERSET, 0},
	{"payoutq.max_winners", "Sets the number of winners that one call may name.",
	&payoutq_max_winners, 10000000, 1, INT_MAX, PGC_SUSET, 0},
	{"payoutq.interval", "Sets the time after which an idle worker looks for work without being woken.",
	&payoutq_interval, 300, 1, INT_MAX / 1000, PGC_SIGHUP, GUC_UNIT_S},
	{"payoutq.max_attempts", "Sets the number of attempts after which an entry has failed.",
	&payoutq_max_attempts, 5, 1, 1000, PGC_SIGHUP, 0},
	{"payoutq.retry_base", "Sets the time to wait after a first failed attempt; it doubles with each further one.",
	&payoutq_retry_base, 1000, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS},
	{"payoutq.retry_cap", "Sets the longest time to wait between two attempts.",
	&payoutq_retry_cap, 900000, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS},
	{"payoutq.lock_timeout", "Sets the time that a batch waits for a lock on an account before it is tried again later.",
	&payoutq_lock_timeout, 2000, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS},
	{"payoutq.notification_window", "Sets the time within which nobody is told the same of the same challenge twice.",
	&payoutq_notification_window, 1800, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_S},
	{"payoutq.send_interval", "Sets the time after which the dispatcher looks for transfers without being woken.",
	&payoutq_send_interval, 4000, 100, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS},
	{"payoutq.send_concurrency", "Sets the number of calls to a provider that may be under way at once.",
	&payoutq_send_concurrency, 50, 1, PAYOUTQ_MAX_CALLS, PGC_SIGHUP, 0},
	{"payoutq.confirm_interval", "Sets the time after which a provider is asked again about a transfer that was sent.",
	&payoutq_confirm_interval, 2000, 100, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS},
	{"payoutq.confirm_batch", "Sets the number of questions to a provider about transfers that may be under way at once.",
	&payoutq_confirm_batch, 20, 1, PAYOUTQ_MAX_CALLS, PGC_SIGHUP, 0},
	{"payoutq.confirm_timeout", "Sets the time after which a transfer that does not move is stuck.",
	&payoutq_confirm_timeout, 300, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_S},
	{"payoutq.retention", "Sets the time after which payout_maintain() removes notifications and archives jobs; 0 keeps them.",
	&payoutq_retention, 0, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_S},
};

PG_FUNCTION_INFO_V1(payoutq_setting_sql);

void
payoutq_define_settings(void)
{
	for (size_t i = 0; i < lengthof(settings); i++)
	{
		const IntSetting *s = &settings[i];

		DefineCustomIntVariable(s->name, s->description, NULL, s->variable,
								s->value, s->min, s->max, s->context,
								s->flags, NULL, NULL, NULL);
	}

	DefineCustomBoolVariable("payoutq.allow_drop",
							 "Sets whether the extension may be dropped while its ledger has entries, and a provider while it has jobs or transfers.",
							 NULL, &payoutq_allow_drop, false, PGC_USERSET, 0, NULL, NULL, NULL);

	DefineCustomStringVariable("payoutq.databases",
							   "Sets the databases in which workers run, separated by commas.",
							   "Empty means every database that has the extension.",
							   &payoutq_databases, "", PGC_SIGHUP,
							   GUC_LIST_INPUT, NULL, NULL, NULL);

	MarkGUCPrefixReserved("payoutq");
}

/* payoutq.setting(name): to be here, the library has been loaded */
Datum
payoutq_setting_sql(PG_FUNCTION_ARGS)
{
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(0));

	PG_RETURN_TEXT_P(cstring_to_text(GetConfigOptionByName(name, NULL, false)));
}
