/*
 * dispatcher.c
 *		Sends transfers to their providers, and asks what has become of them; and
 *		pushes notifications.
 *
 * A worker of its own.  Each turn is one transaction, in which the answers that
 * have come are recorded and the next calls are claimed; then the claimed calls
 * are made, with no transaction open.  So the intent is committed before a call,
 * and its answer after.  Should the process or the server die between them, the
 * lease of the claim lapses, the outcome is unknown, and the same key is used
 * again.
 *
 * A push has no key: its claim takes it out of the queue, and so it is lost then.
 *
 * Sending and confirming have places of their own and do not wait for each other.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/pmsignal.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "provider.h"

#define POLL_MS			10
#define RATE_LIMIT_NAP_MS	20

/* As long as a provider may ask for */
#define MAX_PAUSE_S			60

/* A look from the beginning comes after so many times as long as it took. */
#define LOOK_FACTOR		20

/* Lookups are rare, and nobody waits for them. */
#define LOOKUP_MS		200

/* Beyond the time-out of a call, so that only a dead process loses its lease. */
#define LEASE_MARGIN_MS	20000

/*
 * An answer waits for a lock for a moment only, because all others wait with it,
 * and is recorded again later; at last half the margin is left to do so.
 */
#define RECORD_LOCK_TIMEOUT	"100ms"
#define RECORD_AGAIN_MS		500

static List *providers = NIL;
static TimestampTz providers_loaded_at = 0;

/* Calls that are claimed but not made, under way, and to be recorded. */
static List *claimed = NIL;
static List *under_way = NIL;
static List *answered = NIL;

static MemoryContext call_context = NULL;
static bool rate_limited = false;
static char key_origin[40];

static bool turn(TimestampTz now, TimestampTz *due);
static void load_providers(void);
static Provider *find_provider(const char *name);
static bool sending_is_armed(void);
static int	claim_calls(TimestampTz now);
static int	claim_questions(Provider *provider, int count, TimestampTz now);
static int	claim_sends(Provider *provider, int count);
static int	claim_pushes(Provider *provider, int count);
static int	claim_confirmations(Provider *provider, int count);
static int	claim_lookups(Provider *provider, int count);
static Datum begin_look(const Look *look, TimestampTz now);
static void end_look(Look *look, TimestampTz now, int rows, int column);
static long next_look(TimestampTz now);
static int	allowed_calls(Provider *provider, TimestampTz now);
static bool is_open(const Provider *provider, bool asks, TimestampTz now);
static ArrayType *busy_with(const Provider *provider, CallPurpose purpose);
static Call *new_call(Provider *provider, CallPurpose purpose, int row);
static void start_calls(void);
static bool lease_is_short(Call *call);
static void collect(void);
static bool record_safely(Call *call);
static ErrorData *try_to_record(Call *call);
static void record(void *arg);
static void slow_down(Provider *provider, const Call *call);
static void leave_place(Call *call);

/* For the resident: a dispatcher is wanted when something is due. */
void
payoutq_ask_for_dispatcher(void)
{
	static EngineStatement due = {
		"SELECT payoutq.sending_due() IS NOT NULL", 0, {0}, NULL
	};
	bool		is_there;
	bool		isnull;

	LWLockAcquire(payoutq_shared->lock, LW_SHARED);
	is_there = payoutq_has_dispatcher(MyDatabaseId);
	LWLockRelease(payoutq_shared->lock);
	if (is_there)
		return;

	(void) payoutq_execute(&due, NULL, NULL, SPI_OK_SELECT);
	if (DatumGetBool(payoutq_result(0, 1, &isnull)))
		payoutq_call_for_dispatcher(MyDatabaseId);
}

/*
 * One round.  Returns true if there is more to do at once; else *nap is how long
 * nothing is, in milliseconds, or -1 if there is nothing to send at all.
 */
bool
payoutq_dispatch(long *nap)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz due = 0;
	bool		busy_now;

	if (call_context == NULL)
		call_context = AllocSetContextCreate(TopMemoryContext, "payoutq calls", ALLOCSET_DEFAULT_SIZES);
	/* While there are calls nobody waits, and so nobody notices otherwise. */
	if (!PostmasterIsAlive())
		proc_exit(1);
	busy_now = turn(now, &due);
	start_calls();
	payoutq_http_wait(POLL_MS);
	collect();

	if (busy_now || payoutq_http_calls() > 0)
	{
		*nap = 0;
		return true;
	}
	if (answered != NIL)
		*nap = RATE_LIMIT_NAP_MS;
	else if (due == 0)
		*nap = -1;
	else if (due > now)
		*nap = Min(payoutq_send_interval, TimestampDifferenceMilliseconds(now, due) + 1);
	else
		/* It cannot be done now: because of the rate limit, or for longer. */
		*nap = Min(rate_limited ? RATE_LIMIT_NAP_MS : payoutq_send_interval, next_look(now));
	return false;
}

/* One transaction.  Returns true if something was claimed. */
static bool
turn(TimestampTz now, TimestampTz *due)
{
	static EngineStatement next = {
		"SELECT payoutq.sending_due()", 0, {0}, NULL
	};
	static TimestampTz next_claim = 0;
	static uint64 generation = 0;
	static bool armed = false;
	uint64		newest = payoutq_wake_generation(MyDatabaseId);
	int			calls = 0;
	List	   *recorded = NIL;
	MemoryContext caller;
	ListCell   *cell;
	bool		isnull;

	/* With calls under way and nothing to record there is nothing new to claim. */
	if (answered == NIL && payoutq_http_calls() > 0 && newest == generation && now < next_claim)
		return false;
	generation = newest;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	if (!payoutq_lock_extension())
		proc_exit(0);
	SPI_connect();
	payoutq_make_constraints_immediate();
	pgstat_report_activity(STATE_RUNNING, "payoutq: dispatching");
	payoutq_set_local("lock_timeout", RECORD_LOCK_TIMEOUT);

	foreach(cell, answered)
	{
		Call	   *call = lfirst(cell);

		if (call->record_at > now)
			continue;
		if (record_safely(call))
		{
			leave_place(call);
			recorded = lappend(recorded, call);
		}
		else
			/* One has waited; the others only look. */
			payoutq_set_local("lock_timeout", "1ms");
	}
	if (providers == NIL || TimestampDifferenceExceeds(providers_loaded_at, now, payoutq_send_interval))
	{
		load_providers();
		armed = sending_is_armed();
		providers_loaded_at = now;
	}
	if (armed)
		calls = claim_calls(now);
	/* Nobody asks for it while calls are under way. */
	if (calls == 0 && payoutq_http_calls() == 0)
	{
		(void) payoutq_execute(&next, NULL, NULL, SPI_OK_SELECT);
		*due = DatumGetTimestampTz(payoutq_result(0, 1, &isnull));
		if (isnull)
			*due = 0;
	}
	if (calls == 0)
		next_claim = TimestampTzPlusMilliseconds(now, 100);

	/* In a context that outlives the transaction */
	caller = MemoryContextSwitchTo(call_context);
	recorded = list_copy(recorded);
	MemoryContextSwitchTo(caller);
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);

	foreach(cell, recorded)
	{
		answered = list_delete_ptr(answered, lfirst(cell));
		payoutq_http_free(lfirst(cell));
	}
	list_free(recorded);
	return calls > 0;
}

/* Structs stay where they are while calls under way point to them. */
static void
load_providers(void)
{
	static EngineStatement load = {
		"SELECT name, options, open_until, sends_only FROM payoutq.sending_providers()", 0, {0}, NULL
	};
	int			count = payoutq_execute(&load, NULL, NULL, SPI_OK_SELECT);
	MemoryContext caller = MemoryContextSwitchTo(TopMemoryContext);
	ListCell   *cell;

	foreach(cell, providers)
		((Provider *) lfirst(cell))->gone = true;
	for (int i = 0; i < count; i++)
	{
		char	   *name = payoutq_result_cstring(i, 1);
		Provider   *provider = find_provider(name);
		const char *problem = provider ? provider->problem : NULL;
		bool		isnull;

		if (provider == NULL)
		{
			provider = palloc0(sizeof(Provider));
			provider->name = pstrdup(name);
			provider->tokens = 1;
			provider->filled_at = GetCurrentTimestamp();
			providers = lappend(providers, provider);
		}
		pfree(name);
		provider->gone = false;
		payoutq_configure_provider(provider, payoutq_result(i, 2, &isnull));
		/* Once; and not in the moment between CREATE SERVER and CREATE USER MAPPING. */
		if (provider->problem != problem)
			provider->told = false;
		else if (problem && !provider->told)
		{
			ereport(WARNING,
					(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
					 errmsg("could not use provider \"%s\": %s", provider->name, problem)));
			provider->told = true;
		}
		provider->open_until = DatumGetTimestampTz(payoutq_result(i, 3, &isnull));
		if (isnull)
			provider->open_until = 0;
		provider->asks_when_open = DatumGetBool(payoutq_result(i, 4, &isnull));
	}
	foreach(cell, providers)
	{
		Provider   *provider = lfirst(cell);

		if (!provider->gone || provider->sending + provider->asking > 0)
			continue;
		providers = foreach_delete_current(providers, cell);
		MemoryContextDelete(provider->options);
		pfree(provider->name);
		pfree(provider);
	}
	MemoryContextSwitchTo(caller);
}

static Provider *
find_provider(const char *name)
{
	ListCell   *cell;

	foreach(cell, providers)
		if (strcmp(((Provider *) lfirst(cell))->name, name) == 0)
			return lfirst(cell);
	return NULL;
}

static bool
sending_is_armed(void)
{
	static EngineStatement armed = {
		"SELECT payoutq.sending_is_armed(), payoutq.key_origin()", 0, {0}, NULL
	};
	bool		isnull;

	(void) payoutq_execute(&armed, NULL, NULL, SPI_OK_SELECT);
	strlcpy(key_origin, payoutq_result_cstring(0, 2), sizeof(key_origin));
	return DatumGetBool(payoutq_result(0, 1, &isnull));
}

static int
claim_calls(TimestampTz now)
{
	int			calls = 0;
	ListCell   *cell;

	rate_limited = false;
	foreach(cell, providers)
	{
		Provider   *provider = lfirst(cell);
		int			allowed;

		if (provider->gone)
			continue;
		if (provider->problem)
		{
			payoutq_worker_error(provider->problem);
			continue;
		}
		allowed = allowed_calls(provider, now);
		rate_limited |= allowed == 0;

		/* In turns, so that neither waits for the other at the rate limit. */
		if (allowed > 0)
			provider->ask_first = !provider->ask_first;
		for (int turn = 0; turn < 2 && allowed > 0; turn++)
		{
			bool		asks = (turn == 0) == provider->ask_first;
			int			room = payoutq_http_capacity() - list_length(under_way) -
				list_length(answered) - list_length(claimed);
			int			claimed_now = 0;

			if (is_open(provider, asks, now) || (asks && provider->kind->push))
				continue;
			if (asks)
				room = Min(room, payoutq_confirm_batch - provider->asking);
			else
				room = Min(room, payoutq_send_concurrency - provider->sending);
			room = Min(room, allowed);
			if (room > 0)
				claimed_now = asks ? claim_questions(provider, room, now) :
					provider->kind->push ? claim_pushes(provider, room) : claim_sends(provider, room);
			allowed -= claimed_now;
			provider->tokens -= claimed_now;
			calls += claimed_now;
		}
	}
	return calls;
}

/* Is its circuit open, so that nobody is called? */
static bool
is_open(const Provider *provider, bool asks, TimestampTz now)
{
	return now < provider->open_until && !(asks && provider->asks_when_open);
}

/* About what was sent, and about what nobody knows of. */
static int
claim_questions(Provider *provider, int count, TimestampTz now)
{
	int			calls = 0;

	if (provider->kind->can_confirm(provider))
		calls = claim_confirmations(provider, count);
	if (calls < count && TimestampDifferenceExceeds(provider->looked_up_at, now, LOOKUP_MS))
	{
		provider->looked_up_at = now;
		calls += claim_lookups(provider, provider->kind->lookup ? count - calls : 0);
	}
	return calls;
}

/* One bucket for all calls to a provider; a tenth of a second fits in. */
static int
allowed_calls(Provider *provider, TimestampTz now)
{
	double		capacity = Max(1, provider->rate_limit / 10.0);

	provider->tokens += provider->rate_limit * ((now - provider->filled_at) / 1000000.0);
	provider->tokens = Min(provider->tokens, capacity);
	provider->filled_at = now;
	return Max(0, (int) provider->tokens);
}

/* Each destination has one call under way at a time. */
static int
claim_sends(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT transfer_id, attempt_token::text, attempt, idempotency_key, user_id, destination, amount, currency,"
		"       job_id, entry, due_at"
		"  FROM payoutq.claim_transfers($1, $2, make_interval(secs => $3), $4, $5, $6)",
		6, {TEXTOID, INT4OID, FLOAT8OID, TEXTARRAYOID, BOOLOID, TIMESTAMPTZOID}, NULL
	};
	TimestampTz now = GetCurrentTimestamp();
	Datum		values[6];
	int			rows;

	values[0] = CStringGetTextDatum(provider->name);
	values[1] = Int32GetDatum(count);
	values[2] = Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0);
	values[3] = PointerGetDatum(busy_with(provider, CALL_SEND));
	values[4] = BoolGetDatum(provider->kind->lookup != NULL);
	values[5] = begin_look(&provider->send_look, now);

	rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);
	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, CALL_SEND, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->token = payoutq_result_cstring(i, 2);
		call->attempt = (int) payoutq_result_int64(i, 3);
		call->idempotency_key = payoutq_result_cstring(i, 4);
		call->user_id = payoutq_result_cstring(i, 5);
		call->destination = payoutq_result_cstring(i, 6);
		call->amount = payoutq_result_int64(i, 7);
		call->currency = payoutq_result_cstring(i, 8);
		call->job_id = payoutq_result_int64(i, 9);
		call->entry = (int) payoutq_result_int64(i, 10);
		MemoryContextSwitchTo(caller);
	}
	end_look(&provider->send_look, now, rows, 11);
	return rows;
}

static Datum
begin_look(const Look *look, TimestampTz now)
{
	return TimestampTzGetDatum(now >= look->whole_at ? DT_NOBEGIN : look->since);
}

/* The rows have in this column since when they were due. */
static void
end_look(Look *look, TimestampTz now, int rows, int column)
{
	look->partial = now < look->whole_at;
	if (!look->partial)
	{
		look->since = rows > 0 ? DT_NOBEGIN : now;
		look->whole_at = now + LOOK_FACTOR * (GetCurrentTimestamp() - now);
	}
	for (int i = 0; i < rows; i++)
	{
		bool		isnull;

		look->since = Max(look->since, DatumGetTimestampTz(payoutq_result(i, column, &isnull)));
	}
}

/* How long until those are looked for that a look has passed by. */
static long
next_look(TimestampTz now)
{
	long		nap = payoutq_send_interval;
	ListCell   *cell;

	foreach(cell, providers)
	{
		Provider   *provider = lfirst(cell);

		if (provider->send_look.partial)
			nap = Min(nap, TimestampDifferenceMilliseconds(now, provider->send_look.whole_at) + 1);
		if (provider->confirm_look.partial)
			nap = Min(nap, TimestampDifferenceMilliseconds(now, provider->confirm_look.whole_at) + 1);
	}
	return nap;
}

/* Of each user in the order of their ids, one at a time. */
static int
claim_pushes(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT notification_id, attempt, user_id, type, data FROM payoutq.claim_pushes($1, $2)",
		2, {INT4OID, TEXTARRAYOID}, NULL
	};
	Datum		values[] = {Int32GetDatum(count), PointerGetDatum(busy_with(provider, CALL_PUSH))};
	int			rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);

	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, CALL_PUSH, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->attempt = (int) payoutq_result_int64(i, 2);
		call->user_id = payoutq_result_cstring(i, 3);
		call->type = payoutq_result_cstring(i, 4);
		call->data = payoutq_result_cstring(i, 5);
		MemoryContextSwitchTo(caller);
	}
	return rows;
}

/* The destinations that are being sent to, or the users who are being told. */
static ArrayType *
busy_with(const Provider *provider, CallPurpose purpose)
{
	List	   *calls[] = {under_way, answered, claimed};
	Datum	   *names = palloc(Max(1, provider->sending) * sizeof(Datum));
	int			count = 0;

	for (size_t i = 0; i < lengthof(calls); i++)
	{
		ListCell   *cell;

		foreach(cell, calls[i])
		{
			Call	   *call = lfirst(cell);

			if (call->provider == provider && call->purpose == purpose && !call->recorded)
				names[count++] = CStringGetTextDatum(purpose == CALL_PUSH ? call->user_id : call->destination);
		}
	}
	return construct_array(names, count, TEXTOID, -1, false, TYPALIGN_INT);
}

static int
claim_confirmations(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT transfer_id, provider_reference, amount, currency, destination, due_at"
		"  FROM payoutq.claim_confirmations($1, $2, make_interval(secs => $3), $4)",
		4, {TEXTOID, INT4OID, FLOAT8OID, TIMESTAMPTZOID}, NULL
	};
	TimestampTz now = GetCurrentTimestamp();
	Datum		values[] = {CStringGetTextDatum(provider->name), Int32GetDatum(count),
		Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0),
	begin_look(&provider->confirm_look, now)};
	int			rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);

	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, CALL_CONFIRM, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->reference = payoutq_result_cstring(i, 2);
		call->amount = payoutq_result_int64(i, 3);
		call->currency = payoutq_result_cstring(i, 4);
		call->destination = payoutq_result_cstring(i, 5);
		MemoryContextSwitchTo(caller);
	}
	end_look(&provider->confirm_look, now, rows, 6);
	return rows;
}

/*
 * Of those of which nobody knows, and which would not answer otherwise again.
 * Those whose lease has lapsed are seen to also if the provider cannot be asked.
 */
static int
claim_lookups(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT transfer_id, idempotency_key, destination, amount, currency, job_id"
		"  FROM payoutq.claim_lookups($1, $2, make_interval(secs => $3))",
		3, {TEXTOID, INT4OID, FLOAT8OID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(provider->name), Int32GetDatum(count),
	Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0)};
	int			rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);

	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, CALL_LOOKUP, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->idempotency_key = payoutq_result_cstring(i, 2);
		call->destination = payoutq_result_cstring(i, 3);
		call->amount = payoutq_result_int64(i, 4);
		call->currency = payoutq_result_cstring(i, 5);
		call->job_id = payoutq_result_int64(i, 6);
		MemoryContextSwitchTo(caller);
	}
	return rows;
}

/* It is made when the claim has been committed. */
static Call *
new_call(Provider *provider, CallPurpose purpose, int row)
{
	MemoryContext context = AllocSetContextCreate(call_context, "payoutq call", ALLOCSET_SMALL_SIZES);
	MemoryContext caller = MemoryContextSwitchTo(call_context);
	Call	   *call = MemoryContextAllocZero(context, sizeof(Call));

	call->context = context;
	call->provider = provider;
	call->purpose = purpose;
	call->origin = key_origin;
	call->lease_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), provider->timeout_ms + LEASE_MARGIN_MS);
	call->transfer_id = payoutq_result_int64(row, 1);
	claimed = lappend(claimed, call);
	if (purpose == CALL_SEND || purpose == CALL_PUSH)
		provider->sending++;
	else
		provider->asking++;
	MemoryContextSwitchTo(caller);
	return call;
}

static void
start_calls(void)
{
	static ResourceOwner owner = NULL;
	MemoryContext caller = MemoryContextSwitchTo(call_context);
	ListCell   *cell;

	/* The server's cryptography wants one, also outside of transactions. */
	if (owner == NULL)
		owner = ResourceOwnerCreate(NULL, "payoutq calls");
	CurrentResourceOwner = owner;
	foreach(cell, claimed)
	{
		Call	   *call = lfirst(cell);
		const ProviderKind *kind = call->provider->kind;

		MemoryContextSwitchTo(call->context);
		switch (call->purpose)
		{
			case CALL_SEND:
				if (lease_is_short(call))
					break;
				kind->send(call);
				break;
			case CALL_CONFIRM:
				kind->confirm(call);
				break;
			case CALL_LOOKUP:
				kind->lookup(call);
				break;
			case CALL_PUSH:
				kind->push(call);
				break;
		}
		if (call->url)
			payoutq_http_start(call);
		MemoryContextSwitchTo(call_context);
		if (call->url)
			under_way = lappend(under_way, call);
		else
			answered = lappend(answered, call);
	}
	list_free(claimed);
	claimed = NIL;
	CurrentResourceOwner = NULL;
	MemoryContextSwitchTo(caller);
}

/*
 * The commit of the claim has taken so long (it may wait for a standby) that the
 * lease could lapse during the call: then somebody may fail the transfer.
 */
static bool
lease_is_short(Call *call)
{
	if (TimestampTzPlusMilliseconds(GetCurrentTimestamp(), call->provider->timeout_ms) < call->lease_until)
		return false;
	/* It is nobody's fault, and uses up no attempt. */
	call->outcome = CALL_THROTTLED;
	call->reason = pstrdup("the lease had nearly ended before the call");
	call->retry_after = -1;
	return true;
}

static void
collect(void)
{
	MemoryContext caller = MemoryContextSwitchTo(call_context);
	Call	   *call;

	while ((call = payoutq_http_done()) != NULL)
	{
		if (call->purpose == CALL_LOOKUP && call->cursor)
		{
			/* When its lease ends, it is asked for by another call. */
			if (GetCurrentTimestamp() < call->lease_until)
			{
				call->provider->tokens -= 1;
				payoutq_http_again(call);
				continue;
			}
			call->outcome = CALL_UNKNOWN;
			call->reason = "the list of transfers is too long";
		}
		under_way = list_delete_ptr(under_way, call);
		answered = lappend(answered, call);
	}
	MemoryContextSwitchTo(caller);
}

/*
 * Returns true if there is nothing left to do for the call.  An answer that
 * meets a lock is recorded later; of one that cannot be recorded it is not
 * known what it was.  Questions are asked again, and pushes not repeated.
 */
static bool
record_safely(Call *call)
{
	TimestampTz now = GetCurrentTimestamp();
	ErrorData  *error = try_to_record(call);
	bool		asks = call->purpose == CALL_CONFIRM || call->purpose == CALL_LOOKUP;

	if (error == NULL || (asks && payoutq_classify(error->sqlerrcode) == FAILURE_TRANSIENT))
		return true;
	if (payoutq_classify(error->sqlerrcode) == FAILURE_TRANSIENT &&
		TimestampTzPlusMilliseconds(now, LEASE_MARGIN_MS / 2) < call->lease_until)
	{
		call->record_at = TimestampTzPlusMilliseconds(now, RECORD_AGAIN_MS);
		return false;
	}
	ereport(WARNING,
			(errcode(error->sqlerrcode),
			 errmsg("could not record the answer to %s " INT64_FORMAT ": %s",
					call->purpose == CALL_PUSH ? "notification" : "transfer", call->transfer_id, error->message)));
	call->outcome = CALL_UNKNOWN;
	if (!asks)
		call->reference = NULL;
	call->reason = psprintf("the answer could not be recorded: %s", error->message);
	(void) try_to_record(call);
	return true;
}

/* Returns what is wrong with it, or NULL. */
static ErrorData *
try_to_record(Call *call)
{
	ErrorData  *problem = payoutq_in_savepoint(record, call);

	if (problem && payoutq_is_interrupt(problem))
		ReThrowError(problem);
	return problem;
}

static void
record(void *arg)
{
	Call	   *call = arg;
	static const char *const outcomes[] = {"completed", "sent", "transient", "permanent", "unknown", "throttled", "refused", "unreachable", "unfunded", "rejected", "absent"};
	static EngineStatement answer = {
		"SELECT payoutq.record_answer($1, $2::uuid, $3, $4, $5, $6, $7)",
		7, {INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, INT4OID}, NULL
	};
	/* The transfer may have been rejected and sent again since it was asked for. */
	static EngineStatement confirmation = {
		"SELECT payoutq.record_confirmation(t.id, $2, $3)"
		"  FROM (SELECT id FROM payoutq.transfer WHERE id = $1 AND provider_reference = $4 FOR UPDATE) t",
		4, {INT8OID, TEXTOID, TEXTOID, TEXTOID}, NULL
	};
	static EngineStatement lookup = {
		"SELECT payoutq.record_lookup($1, $2, $3, $4, $5)", 5, {INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}, NULL
	};
	static EngineStatement push = {
		"SELECT payoutq.record_push($1, $2, $3, $4, $5, $6)", 6, {INT8OID, INT4OID, TEXTOID, TEXTOID, TEXTOID, INT4OID}, NULL
	};
	Datum		reason = call->reason ? CStringGetTextDatum(call->reason) : (Datum) 0;
	char		nulls[] = "       ";

	if (call->purpose == CALL_LOOKUP)
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id), CStringGetTextDatum(call->idempotency_key),
			CStringGetTextDatum(outcomes[call->outcome]),
			call->reference ? CStringGetTextDatum(call->reference) : (Datum) 0, reason};

		nulls[3] = call->reference ? ' ' : 'n';
		nulls[4] = call->reason ? ' ' : 'n';
		(void) payoutq_execute(&lookup, values, nulls, SPI_OK_SELECT);
	}
	else if (call->purpose == CALL_CONFIRM)
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id),
			CStringGetTextDatum(outcomes[call->outcome]), reason, CStringGetTextDatum(call->reference)};

		nulls[2] = call->reason ? ' ' : 'n';
		(void) payoutq_execute(&confirmation, values, nulls, SPI_OK_SELECT);
	}
	else if (call->purpose == CALL_PUSH)
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id), Int32GetDatum(call->attempt),
			CStringGetTextDatum(call->provider->name), CStringGetTextDatum(outcomes[call->outcome]),
			reason, Int32GetDatum(call->retry_after)};

		nulls[4] = call->reason ? ' ' : 'n';
		nulls[5] = call->retry_after >= 0 ? ' ' : 'n';
		(void) payoutq_execute(&push, values, nulls, SPI_OK_SELECT);
	}
	else
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id), CStringGetTextDatum(call->token),
			CStringGetTextDatum(outcomes[call->outcome]),
			call->reference ? CStringGetTextDatum(call->reference) : (Datum) 0, reason,
			Int32GetDatum((int32) call->http_status), Int32GetDatum(call->retry_after)};

		nulls[3] = call->reference ? ' ' : 'n';
		nulls[4] = call->reason ? ' ' : 'n';
		nulls[5] = call->http_status ? ' ' : 'n';
		nulls[6] = call->retry_after >= 0 ? ' ' : 'n';
		(void) payoutq_execute(&answer, values, nulls, SPI_OK_SELECT);
	}
	if (call->outcome == CALL_REFUSED || call->outcome == CALL_UNREACHABLE || call->outcome == CALL_UNFUNDED)
		providers_loaded_at = 0;	/* its circuit is open now */
	if (call->outcome != CALL_COMPLETED && call->outcome != CALL_SENT && call->reason)
		payoutq_worker_error(call->reason);
	if (call->outcome == CALL_THROTTLED)
		slow_down(call->provider, call);
	payoutq_worker_count(call->purpose == CALL_SEND ? 1 : 0);
}

/* The limit is on all calls, so all of them wait as long as it says. */
static void
slow_down(Provider *provider, const Call *call)
{
	int			seconds = Min(Max(call->retry_after, 1), MAX_PAUSE_S);

	provider->tokens = Min(provider->tokens, -provider->rate_limit * (double) seconds);
}

/* It is not under way any more: another may be claimed in the same transaction. */
static void
leave_place(Call *call)
{
	call->recorded = true;
	if (call->purpose == CALL_SEND || call->purpose == CALL_PUSH)
		call->provider->sending--;
	else
		call->provider->asking--;
}
