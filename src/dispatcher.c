/*
 * dispatcher.c
 *		Sends transfers to their providers, and asks what has become of them.
 *
 * A worker of its own.  Each turn is one transaction, in which the answers that
 * have come are recorded and the next calls are claimed; then the claimed calls
 * are made, with no transaction open.  So the intent is committed before a call,
 * and its answer after.  Should the process or the server die between them, the
 * lease of the claim lapses, the outcome is unknown, and the same key is used
 * again.
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
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "provider.h"

#define MAX_PROVIDERS	32
#define POLL_MS			10
#define RATE_LIMIT_NAP_MS	20

/* Lookups are rare, and nobody waits for them. */
#define LOOKUP_MS		200

/* Beyond the time-out of a call, so that only a dead process loses its lease. */
#define LEASE_MARGIN_MS	60000

static Provider *providers[MAX_PROVIDERS];
static int	provider_count = 0;
static TimestampTz providers_loaded_at = 0;

static List *answered = NIL;	/* calls to be recorded */
static List *claimed = NIL;		/* calls to be made */
static char *busy[PAYOUTQ_MAX_CALLS];	/* destinations of the calls under way */
static int	busy_count = 0;

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
static int	claim_confirmations(Provider *provider, int count);
static int	claim_lookups(Provider *provider, int count);
static int	allowed_calls(Provider *provider, TimestampTz now);
static Call *new_call(Provider *provider, bool is_confirmation, int row);
static void start_calls(void);
static void collect(void);
static void record_safely(Call *call);
static char *try_to_record(Call *call);
static void record(Call *call);
static void end_call(Call *call);

/* For the resident: a dispatcher is wanted when something is due. */
void
payoutq_ask_for_dispatcher(void)
{
	static EngineStatement due = {
		"SELECT payoutq.sending_due() IS NOT NULL", 0, {0}
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

	if (busy_now || answered != NIL || payoutq_http_calls() > 0)
	{
		*nap = 0;
		return true;
	}
	if (due == 0)
		*nap = -1;
	else if (due > now)
		*nap = Min(payoutq_send_interval, TimestampDifferenceMilliseconds(now, due) + 1);
	else
		/* It cannot be done now: because of the rate limit, or for longer. */
		*nap = rate_limited ? RATE_LIMIT_NAP_MS : payoutq_send_interval;
	return false;
}

/* One transaction.  Returns true if something was claimed. */
static bool
turn(TimestampTz now, TimestampTz *due)
{
	static EngineStatement next = {
		"SELECT payoutq.sending_due()", 0, {0}
	};
	static TimestampTz next_claim = 0;
	static uint64 generation = 0;
	static bool armed = false;
	uint64		newest = payoutq_wake_generation(MyDatabaseId);
	int			calls = 0;
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
	pgstat_report_activity(STATE_RUNNING, "payoutq: dispatching");

	foreach(cell, answered)
		record_safely(lfirst(cell));
	if (provider_count == 0 || TimestampDifferenceExceeds(providers_loaded_at, now, payoutq_send_interval))
	{
		load_providers();
		armed = sending_is_armed();
		providers_loaded_at = now;
	}
	if (armed)
		calls = claim_calls(now);
	if (calls == 0)
	{
		(void) payoutq_execute(&next, NULL, NULL, SPI_OK_SELECT);
		*due = DatumGetTimestampTz(payoutq_result(0, 1, &isnull));
		if (isnull)
			*due = 0;
		next_claim = TimestampTzPlusMilliseconds(now, 100);
	}

	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);

	foreach(cell, answered)
		end_call(lfirst(cell));
	list_free(answered);
	answered = NIL;
	return calls > 0;
}

/* Structs stay where they are: calls under way point to them. */
static void
load_providers(void)
{
	static EngineStatement load = {
		"SELECT name, options, open_until FROM payoutq.sending_providers()", 0, {0}
	};
	int			count = payoutq_execute(&load, NULL, NULL, SPI_OK_SELECT);

	for (int i = 0; i < provider_count; i++)
		providers[i]->gone = true;
	for (int i = 0; i < count; i++)
	{
		Provider   *provider = find_provider(payoutq_result_cstring(i, 1));
		bool		isnull;

		if (provider == NULL)
		{
			if (provider_count == MAX_PROVIDERS)
				break;
			provider = MemoryContextAllocZero(TopMemoryContext, sizeof(Provider));
			provider->name = MemoryContextStrdup(TopMemoryContext, payoutq_result_cstring(i, 1));
			provider->tokens = 1;
			provider->filled_at = GetCurrentTimestamp();
			providers[provider_count++] = provider;
		}
		provider->gone = false;
		payoutq_configure_provider(provider, payoutq_result(i, 2, &isnull));
		provider->open_until = DatumGetTimestampTz(payoutq_result(i, 3, &isnull));
		if (isnull)
			provider->open_until = 0;
	}
}

static Provider *
find_provider(const char *name)
{
	for (int i = 0; i < provider_count; i++)
		if (strcmp(providers[i]->name, name) == 0)
			return providers[i];
	return NULL;
}

static bool
sending_is_armed(void)
{
	static EngineStatement armed = {
		"SELECT payoutq.sending_is_armed(), payoutq.key_origin()", 0, {0}
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

	rate_limited = false;
	for (int i = 0; i < provider_count; i++)
	{
		Provider   *provider = providers[i];
		int			allowed = allowed_calls(provider, now);

		if (!provider->gone && !provider->problem && allowed == 0)
			rate_limited = true;
		if (provider->gone || allowed == 0)
			continue;
		if (provider->problem)
		{
			payoutq_worker_error(provider->problem);
			continue;
		}
		/* In turns, so that neither waits for the other at the rate limit. */
		provider->confirm_first = !provider->confirm_first;
		for (int turn = 0; turn < 2 && allowed > 0; turn++)
		{
			bool		confirm = (turn == 0) == provider->confirm_first;
			int			claimed_now = confirm ?
				claim_questions(provider, Min(allowed, payoutq_confirm_batch - provider->confirming), now) :
				now < provider->open_until ? 0 :
				claim_sends(provider, Min(allowed, payoutq_send_concurrency - provider->sending));

			allowed -= claimed_now;
			provider->tokens -= claimed_now;
			calls += claimed_now;
		}
	}
	return calls;
}

/* About what was sent, and about what nobody knows of. */
static int
claim_questions(Provider *provider, int count, TimestampTz now)
{
	int			calls = 0;

	count = Min(count, PAYOUTQ_MAX_CALLS - payoutq_http_calls() - list_length(claimed));
	if (count <= 0)
		return 0;
	if (provider->kind->can_confirm(provider))
		calls = claim_confirmations(provider, count);
	if (calls < count && provider->kind->lookup &&
		TimestampDifferenceExceeds(provider->looked_up_at, now, LOOKUP_MS))
	{
		provider->looked_up_at = now;
		calls += claim_lookups(provider, count - calls);
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
	return (int) provider->tokens;
}

/* Each destination has one call under way at a time. */
static int
claim_sends(Provider *provider, int count)
{
	int			room = PAYOUTQ_MAX_CALLS - busy_count - list_length(claimed);

	static EngineStatement claim = {
		"SELECT transfer_id, attempt_token::text, attempt, idempotency_key, user_id, destination, amount, currency,"
		"       job_id, entry"
		"  FROM payoutq.claim_transfers($1, $2, make_interval(secs => $3), $4, $5)",
		5, {TEXTOID, INT4OID, FLOAT8OID, TEXTARRAYOID, BOOLOID}
	};
	Datum		destinations[PAYOUTQ_MAX_CALLS];
	Datum		values[5];
	int			rows;

	count = Min(count, room);
	if (count <= 0)
		return 0;
	for (int i = 0; i < busy_count; i++)
		destinations[i] = CStringGetTextDatum(busy[i]);
	values[0] = CStringGetTextDatum(provider->name);
	values[1] = Int32GetDatum(count);
	values[2] = Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0);
	values[3] = PointerGetDatum(construct_array(destinations, busy_count, TEXTOID, -1, false, TYPALIGN_INT));
	values[4] = BoolGetDatum(provider->kind->lookup != NULL);

	rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);
	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, false, i);
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
	return rows;
}

static int
claim_confirmations(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT transfer_id, provider_reference, amount, currency, destination"
		"  FROM payoutq.claim_confirmations($1, $2, make_interval(secs => $3))",
		3, {TEXTOID, INT4OID, FLOAT8OID}
	};
	Datum		values[] = {CStringGetTextDatum(provider->name), Int32GetDatum(count),
	Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0)};
	int			rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);

	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, true, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->reference = payoutq_result_cstring(i, 2);
		call->amount = payoutq_result_int64(i, 3);
		call->currency = payoutq_result_cstring(i, 4);
		call->destination = payoutq_result_cstring(i, 5);
		MemoryContextSwitchTo(caller);
	}
	return rows;
}

/* Of those of which nobody knows, and which would not answer otherwise again. */
static int
claim_lookups(Provider *provider, int count)
{
	static EngineStatement claim = {
		"SELECT transfer_id, idempotency_key, destination, amount, currency, job_id"
		"  FROM payoutq.claim_lookups($1, $2, make_interval(secs => $3))",
		3, {TEXTOID, INT4OID, FLOAT8OID}
	};
	Datum		values[] = {CStringGetTextDatum(provider->name), Int32GetDatum(count),
	Float8GetDatum((provider->timeout_ms + LEASE_MARGIN_MS) / 1000.0)};
	int			rows = payoutq_execute(&claim, values, NULL, SPI_OK_SELECT);

	for (int i = 0; i < rows; i++)
	{
		Call	   *call = new_call(provider, false, i);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		call->is_lookup = true;
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
new_call(Provider *provider, bool is_confirmation, int row)
{
	MemoryContext context = AllocSetContextCreate(call_context, "payoutq call", ALLOCSET_SMALL_SIZES);
	MemoryContext caller;
	Call	   *call = MemoryContextAllocZero(context, sizeof(Call));

	call->context = context;
	call->provider = provider;
	call->is_confirmation = is_confirmation;
	call->origin = key_origin;
	call->transfer_id = payoutq_result_int64(row, 1);
	caller = MemoryContextSwitchTo(TopMemoryContext);
	claimed = lappend(claimed, call);
	MemoryContextSwitchTo(caller);
	return call;
}

static void
start_calls(void)
{
	ListCell   *cell;

	foreach(cell, claimed)
	{
		Call	   *call = lfirst(cell);
		MemoryContext caller = MemoryContextSwitchTo(call->context);

		if (call->is_confirmation || call->is_lookup)
		{
			if (call->is_lookup)
				call->provider->kind->lookup(call);
			else
				call->provider->kind->confirm(call);
			call->provider->confirming++;
		}
		else
		{
			call->provider->kind->send(call);
			call->provider->sending++;
			busy[busy_count++] = call->destination;
		}
		payoutq_http_start(call);
		MemoryContextSwitchTo(caller);
	}
	list_free(claimed);
	claimed = NIL;
}

static void
collect(void)
{
	MemoryContext caller = MemoryContextSwitchTo(TopMemoryContext);
	Call	   *call;

	while ((call = payoutq_http_done()) != NULL)
	{
		if (call->is_lookup && call->cursor)
		{
			MemoryContextSwitchTo(call->context);
			payoutq_http_again(call);
			MemoryContextSwitchTo(TopMemoryContext);
			continue;
		}
		answered = lappend(answered, call);
	}
	MemoryContextSwitchTo(caller);
}

/*
 * An answer that cannot be recorded must not stand in the way of the others.
 * What it was is not known then.
 */
static void
record_safely(Call *call)
{
	char	   *problem = try_to_record(call);

	if (problem == NULL)
		return;
	ereport(WARNING,
			(errmsg("could not record the answer to transfer " INT64_FORMAT ": %s",
					call->transfer_id, problem)));
	call->outcome = CALL_UNKNOWN;
	call->reference = NULL;
	call->reason = psprintf("the answer could not be recorded: %s", problem);
	(void) try_to_record(call);
}

/* Returns what is wrong with it, or NULL. */
static char *
try_to_record(Call *call)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	char	   *volatile problem = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		record(call);
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData  *error = payoutq_catch(context, owner);

		if (payoutq_is_interrupt(error))
			ReThrowError(error);
		problem = error->message;
	}
	PG_END_TRY();
	return problem;
}

static void
record(Call *call)
{
	static const char *const outcomes[] = {"completed", "sent", "transient", "permanent", "unknown", "throttled", "refused", "unreachable", "unfunded", "rejected", "absent"};
	static EngineStatement answer = {
		"SELECT payoutq.record_answer($1, $2::uuid, $3, $4, $5, $6, $7)",
		7, {INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, INT4OID}
	};
	static EngineStatement confirmation = {
		"SELECT payoutq.record_confirmation($1, $2, $3)", 3, {INT8OID, TEXTOID, TEXTOID}
	};
	static EngineStatement lookup = {
		"SELECT payoutq.record_lookup($1, $2, $3, $4)", 4, {INT8OID, TEXTOID, TEXTOID, TEXTOID}
	};
	Datum		reason = call->reason ? CStringGetTextDatum(call->reason) : (Datum) 0;
	char		nulls[] = "       ";

	if (call->is_lookup)
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id), CStringGetTextDatum(call->idempotency_key),
			CStringGetTextDatum(outcomes[call->outcome]),
			call->reference ? CStringGetTextDatum(call->reference) : (Datum) 0};

		nulls[3] = call->reference ? ' ' : 'n';
		(void) payoutq_execute(&lookup, values, nulls, SPI_OK_SELECT);
	}
	else if (call->is_confirmation)
	{
		Datum		values[] = {Int64GetDatum(call->transfer_id),
			CStringGetTextDatum(outcomes[call->outcome]), reason};

		nulls[2] = call->reason ? ' ' : 'n';
		(void) payoutq_execute(&confirmation, values, nulls, SPI_OK_SELECT);
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
	payoutq_worker_count(call->is_confirmation || call->is_lookup ? 0 : 1);
}

static void
end_call(Call *call)
{
	if (call->is_confirmation || call->is_lookup)
		call->provider->confirming--;
	else
	{
		call->provider->sending--;
		for (int i = 0; i < busy_count; i++)
			if (busy[i] == call->destination)
			{
				busy[i] = busy[--busy_count];
				break;
			}
	}
	payoutq_http_free(call);
}
