/*
 * payoutq.h
 *		What the files of the extension share, grouped by the file that owns it.
 */
#ifndef PAYOUTQ_H
#define PAYOUTQ_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "storage/lwlock.h"
#include "utils/array.h"
#include "utils/jsonb.h"
#include "utils/resowner.h"

/* settings.c */
extern int	payoutq_workers;
extern int	payoutq_batch_size;
extern int	payoutq_max_winners;	/* in one call */
extern int	payoutq_interval;		/* seconds */
extern char *payoutq_databases;
extern bool payoutq_allow_drop;
extern int	payoutq_max_attempts;
extern int	payoutq_retry_base;		/* milliseconds */
extern int	payoutq_retry_cap;		/* milliseconds */
extern int	payoutq_lock_timeout;	/* milliseconds */
extern int	payoutq_send_interval;	/* milliseconds */
extern int	payoutq_send_concurrency;
extern int	payoutq_confirm_interval;	/* milliseconds */
extern int	payoutq_confirm_batch;

#define PAYOUTQ_MAX_CALLS	1000

extern void payoutq_define_settings(void);

#define PAYOUTQ_MAX_WORKERS		32	/* per database */
#define PAYOUTQ_MAX_BATCH_SIZE	10000
#define PAYOUTQ_MAX_NAME		1000	/* bytes of a user id or reference: they are indexed */

/* engine.c: the rights, settings and statements of the extension's own work */
typedef struct EngineState
{
	Oid			user_id;
	int			sec_context;
	int			guc_level;
	MemoryContext context;		/* of a turn */
} EngineState;

typedef struct EngineStatement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[20];
	SPIPlanPtr	plan;
} EngineStatement;

extern void payoutq_engine_enter(EngineState *state);
extern void payoutq_engine_leave(EngineState *state);
extern void payoutq_foreign_enter(EngineState *state, Oid role);
extern void payoutq_foreign_leave(EngineState *state);
extern void payoutq_make_constraints_immediate(void);
extern void payoutq_turn_begin(EngineState *state, MemoryContext context);
extern void payoutq_turn_commit(EngineState *state);
extern void payoutq_turn_end(EngineState *state);
extern void payoutq_engine_settings_for_process(void);
extern void payoutq_set_local(const char *name, const char *value);
extern SPIPlanPtr payoutq_plan(EngineStatement *statement);
extern uint64 payoutq_execute(EngineStatement *statement, Datum *values,
							  const char *nulls, int expected);
extern uint64 payoutq_select_latest(EngineStatement *statement, Datum *values);
extern bool payoutq_lock_extension(void);
extern bool payoutq_try_lock_extension(void);
extern bool payoutq_complain_of_version(int elevel);
extern bool payoutq_lock_job(int64 job_id, LOCKMODE mode, bool wait);
extern void payoutq_enter_challenge(int64 challenge_id, LOCKMODE mode);
extern void payoutq_leave_challenge(int64 challenge_id, LOCKMODE mode);
extern void payoutq_lock_account(const char *account, const char *currency);
extern bool payoutq_lock_attempt(int64 job_id, int32 batch_no);
extern void payoutq_unlock_attempt(int64 job_id, int32 batch_no);
extern char *payoutq_origin(void);
extern Datum payoutq_result(int row, int column, bool *isnull);
extern int64 payoutq_result_int64(int row, int column);
extern char *payoutq_result_cstring(int row, int column);

/* shared.c: shared memory, and waking */
#define PAYOUTQ_MAX_DATABASES	128
#define PAYOUTQ_SLOTS			128
#define PAYOUTQ_ERROR_LENGTH	200

typedef enum DatabaseState
{
	DATABASE_FREE = 0,			/* slot not in use */
	DATABASE_UNKNOWN,			/* not looked at yet */
	DATABASE_ACTIVE,			/* has the extension */
	DATABASE_WITHOUT,			/* has not */
	DATABASE_PARKED,			/* has it, but its worker made room for another's */
	DATABASE_STOPPED			/* payout_stop_workers() */
} DatabaseState;

/* A worker has failed outside of a batch while it served the job. */
#define PAYOUTQ_AVOIDED		8
typedef struct AvoidedJob
{
	int64		job_id;
	TimestampTz until;
} AvoidedJob;

typedef struct DatabaseSlot
{
	Oid			database;
	DatabaseState state;
	bool		wanted;			/* something was committed there */
	bool		help;			/* more work than the resident can do */
	bool		sends;			/* there are transfers to be sent */
	bool		complained;		/* of the version of the extension */
	int			held;			/* commands that want nobody connected */
	uint64		generation;		/* counts wake-ups */
	TimestampTz start_after;	/* no worker is started before */
	int			failures;		/* of workers, in a row */
	AvoidedJob	avoided[PAYOUTQ_AVOIDED];
} DatabaseSlot;

typedef enum WorkerState
{
	WORKER_FREE = 0,
	WORKER_STARTING,
	WORKER_IDLE,
	WORKER_WORKING
} WorkerState;

typedef struct WorkerSlot
{
	WorkerState state;
	Oid			database;
	bool		resident;		/* stays while the extension exists */
	bool		dispatcher;		/* sends transfers, and nothing else */
	bool		yield;			/* unless there is room for others no more */
	int			pid;
	int			proc;			/* index in ProcGlobal->allProcs */
	int64		serves;			/* 0, or the job whose turn it is */
	int64		job_id;
	int32		batch_no;
	TimestampTz since;
	int64		batches;
	int64		entries;
	char		last_error[PAYOUTQ_ERROR_LENGTH];
} WorkerSlot;

typedef struct SharedState
{
	LWLock	   *lock;			/* guards everything below */
	int			launcher_proc;	/* -1: none */
	bool		rescan;			/* look at the list of databases again */
	ConditionVariable announced;	/* a job has finished; needs no lock */
	DatabaseSlot databases[PAYOUTQ_MAX_DATABASES];
	WorkerSlot	workers[PAYOUTQ_SLOTS];
} SharedState;

extern SharedState *payoutq_shared; /* NULL unless preloaded */

extern void payoutq_shared_init(void);
extern void payoutq_wake_at_commit(void);
extern void payoutq_announce_at_commit(void);
extern void payoutq_rescan_at_commit(void);
extern void payoutq_hold_database(Oid database);
extern void payoutq_wake_workers(Oid database);
extern void payoutq_wake_launcher(void);
extern DatabaseSlot *payoutq_database_slot(Oid database, bool create);
extern bool payoutq_set_latches(Oid database);
extern bool payoutq_runs_query(Oid database);
extern int	payoutq_signal_workers(Oid database);
extern void payoutq_count_workers(Oid database, int *residents, int *helpers);
extern uint64 payoutq_wake_generation(Oid database);
extern bool payoutq_call_for_help(Oid database);
extern void payoutq_call_for_dispatcher(Oid database);
extern bool payoutq_has_dispatcher(Oid database);
extern void payoutq_worker_report(WorkerState state, int64 job_id,
								  int32 batch_no);
extern void payoutq_worker_count(int64 entries);
extern void payoutq_worker_error(const char *message);
extern void payoutq_worker_serves(int64 job_id);
extern TimestampTz payoutq_avoided_until(int64 job_id);
extern WorkerSlot *payoutq_my_slot;

/* launcher.c */
typedef struct PayoutqWorkerExtra
{
	Oid			database;
	TimestampTz started;		/* as in the slot, so that none attaches late */
} PayoutqWorkerExtra;

extern void payoutq_register_launcher(void);
PGDLLEXPORT void payoutq_launcher_main(Datum arg);

/* dispatcher.c */
extern bool payoutq_dispatch(long *nap);
extern void payoutq_ask_for_dispatcher(void);

/* provider.c */
extern void payoutq_check_provider(const char *provider);

/* transfer.c */
extern void payoutq_call_callbacks(void);
extern TimestampTz payoutq_callbacks_due(void);

/* errand.c */
PGDLLEXPORT void payoutq_errand_main(Datum arg);

/* utility.c */
extern void payoutq_install_drop_hook(void);
extern void payoutq_install_utility_hook(void);

/* worker.c */
extern bool payoutq_is_worker;
PGDLLEXPORT void payoutq_worker_main(Datum arg);

/* claim.c: which batch is next */
typedef struct Claim
{
	int64		job_id;
	int32		batch_no;
	int32		first_seq;
	int32		last_seq;
	int64		amount;
	int32		attempts;
	int32		failures;		/* attempts that count against max_attempts */
	bool		is_piece;		/* of a batch that was split */
	int32		crashes;
	TimestampTz run_after;
	char	   *currency;
	char	   *provider;		/* NULL: entries are credited */
	bool		tells_winners;
} Claim;

typedef enum JobWork
{
	WORK_NONE,					/* nothing to do now */
	WORK_BATCH,					/* *claim is locked by this transaction */
	WORK_EXPAND,				/* the job's entries have not been written */
	WORK_FINISH					/* no batch is pending */
} JobWork;

/*
 * A job is stopped when so many isolated entries in a row failed with the same
 * error, each for the first time, nothing was paid since the first batch failed,
 * and there is more to try.
 */
#define MASS_FAILURE	20

typedef struct Failing
{
	TimestampTz since;			/* a whole batch failed then, and nothing was paid since; or 0 */
	int			batches;		/* that failed since; the last of them, with their entries: */
	int32		first_seq[MASS_FAILURE];
	int32		last_seq[MASS_FAILURE];
	int			entries;		/* of them that were isolated, */
	int			sqlstate;		/* all with this error */
} Failing;

typedef struct ActiveJob
{
	int64		id;
	int32		priority;
	bool		queued;			/* nothing of it was begun */
	bool		unexpanded;		/* its entries are not written yet */
	bool		tells_winners;	/* pays a challenge */
	char		currency[NAMEDATALEN];
	char		provider[NAMEDATALEN];	/* or empty */
	TimestampTz position_run_after; /* batches up to here were looked at */
	int32		position_batch_no;
	int64		served;			/* when it had its last turn, in turns of this process */
	int			careful;		/* batches to be counted before they are tried */
	Failing		failing;
	TimestampTz idle_until;		/* nothing to do before */
} ActiveJob;

extern void payoutq_refresh_jobs(int64 only_job, bool woken);
extern bool payoutq_list_due_jobs(void);
extern ActiveJob *payoutq_next_job(TimestampTz now);
extern void payoutq_leave_alone(ActiveJob *job, int milliseconds);
extern JobWork payoutq_claim(ActiveJob *job, Claim *claim);
extern void payoutq_look_again(ActiveJob *job, const Claim *claim);
extern void payoutq_look_elsewhere(ActiveJob *job);
extern bool payoutq_reclaim(const Claim *claim);
extern TimestampTz payoutq_next_due(TimestampTz now);

/* batch.c: pay a batch, or record why not */
typedef enum BatchOutcome
{
	BATCH_PAID,
	BATCH_WAITS,				/* for another try, or has failed */
	BATCH_ENTRY_FAILED,			/* the same, for an isolated entry */
	BATCH_SPLIT,				/* into parts that are to be tried at once */
	BATCH_JOB_FAILED,			/* *error is the reason */
	BATCH_NOT_RECORDED,			/* not paid; *error is why that could not be recorded */
	BATCH_INTERRUPTED			/* *error is to be thrown again */
} BatchOutcome;

/* Instead of a batch_no: the attempt is at the query of the job. */
#define QUERY_OF_JOB	0

extern ErrorData *payoutq_count_attempt(const Claim *claim);
extern void payoutq_attempt_counted(const Claim *claim);
extern void payoutq_attempt_ended(void);
extern void payoutq_take_attempt_back(const Claim *claim);
extern void payoutq_withdraw_attempt(const Claim *claim);
extern bool payoutq_forget_attempt(void);
extern bool payoutq_is_mass_failure(int64 job_id, TimestampTz since);
extern BatchOutcome payoutq_pay_batch(const Claim *claim, ErrorData **error);
extern void payoutq_quarantine_batch(const Claim *claim);

/* failure.c: classes of errors, and backoff */
typedef enum FailureClass
{
	FAILURE_TRANSIENT,
	FAILURE_CONFIGURATION,
	FAILURE_DATA
} FailureClass;

extern FailureClass payoutq_classify(int sqlstate);
extern TimestampTz payoutq_retry_at(TimestampTz now, int attempts);
extern ErrorData *payoutq_in_savepoint(void (*work) (void *arg), void *arg);
extern ErrorData *payoutq_catch(MemoryContext context, ResourceOwner owner);
extern bool payoutq_is_interrupt(const ErrorData *error);

/* account.c: balances of users and system accounts */
typedef struct BatchEntries
{
	int			count;
	Datum		users;			/* text[] */
	Datum		amounts;		/* bigint[] */
	Datum	   *user;			/* their elements */
	Datum	   *amount;
} BatchEntries;

extern void payoutq_read_entries(const Claim *claim, BatchEntries *entries);
#define CREDIT_AGAIN	(-1)	/* roll back, and credit in one pass */

extern int	payoutq_credit_entries(const Claim *claim, bool one_pass,
								   int32 **missing);
extern void payoutq_change_balance(const char *account, const char *currency,
								   int64 amount);

/* binding.c: balances in a table of the application */
typedef struct Binding
{
	const char *currency;
	Oid			table;
	char	   *key_column;
	char	   *balance_column;
	char	   *key_type;
} Binding;

extern bool payoutq_find_binding(const char *currency, Binding *binding);
extern int	payoutq_credit_bound(const Binding *binding, const Claim *claim,
								 const BatchEntries *entries, int32 **missing);
extern bool payoutq_change_bound(const Binding *binding, const char *key,
								 int64 amount);
extern bool payoutq_bound_balance(const Binding *binding, const char *key,
								  int64 *balance);

/* process.c: the loop over batches */
extern uint64 payoutq_process(uint64 max_batches, int64 only_job);

/* job.c: a job's states */
extern void payoutq_begin_job(int64 job_id);
extern bool payoutq_finish_job(int64 job_id);
extern void payoutq_adopt_jobs(void);
extern TimestampTz payoutq_adopt_due(void);
extern void payoutq_fail_job(int64 job_id, int sqlstate, const char *message);
extern void payoutq_require_job(int64 job_id);

/* challenge.c */
extern bool payoutq_lock_challenge(int64 job_id);
extern void payoutq_complete_challenge(int64 job_id);

/* create.c */
extern void payoutq_fund_job(int64 job_id, const char *source_account,
							 const char *currency, int64 amount);
extern int64 payoutq_needed_amount(int64 amounts, int64 fee, bool has_pool,
								   int64 total_pool);

/* winners.c: who is paid how much */
typedef struct Winner
{
	const char *user_id;		/* not null-terminated */
	int32		length;
	int32		position;		/* in the caller's list, from 1 */
	int64		amount;
} Winner;

typedef struct Winners
{
	Winner	   *list;
	int64		count;
	int64		total;
} Winners;

extern void payoutq_winners_from_arrays(ArrayType *users, ArrayType *amounts,
										Winners *winners);
extern void payoutq_winners_from_jsonb(Jsonb *json, Winners *winners);
extern void payoutq_check_user_id(const char *user_id, int length,
								  int64 position);
extern int64 payoutq_add_amount(int64 total, int64 amount, int64 position);
extern int	payoutq_compare_users(const char *a, int alen,
								  const char *b, int blen);

/* entry.c: write entries and batches of a job */
typedef struct EntryWriter EntryWriter;

extern EntryWriter *payoutq_entries_begin(int64 job_id, int32 batch_size);
extern void payoutq_entries_add(EntryWriter *writer, const char *user_id,
								int length, int64 amount);
extern int32 payoutq_entries_end(EntryWriter *writer, TimestampTz run_after);

/* expand.c */
extern void payoutq_check_query(const char *query);
extern Datum payoutq_query_settings(void);
extern void payoutq_apply_settings(Datum settings);
extern bool payoutq_expand_job(ActiveJob *job, EngineState *state);

#endif							/* PAYOUTQ_H */
