/*
 * binding.c
 *		Balances in a table of the application, bound by payout_bind_accounts().
 *
 * Triggers and constraints of that table are somebody else's code.  It runs as
 * the owner of the table in a security-restricted operation, never with the
 * rights of the worker.  Where the owner is a superuser there is nothing to
 * give up, so his table is only changed while all that runs with it calls
 * functions of superusers too, and not if it has partitions or is one, which may
 * be somebody else's.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tupdesc.h"
#include "catalog/dependency.h"
#include "catalog/pg_index.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/extension.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "rewrite/prs2lock.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/plancache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "compat.h"
#include "payoutq.h"

/* The plans of a bound table are made again after so many batches, for it may
 * have grown since. */
#define PLAN_LIFETIME	64

typedef struct BoundPlan
{
	char	   *sql;
	SPIPlanPtr	plan;
	int			uses;
	bool		running;		/* a trigger may come here again */
} BoundPlan;

PG_FUNCTION_INFO_V1(payout_bind_accounts);

static void become_owner(const Binding *binding, EngineState *state);
static void check_superuser_table(Relation relation);
static void check_triggers(Relation relation);
static void check_constraints(Relation relation);
static void check_indexes(Relation relation);
static void check_rules(Relation relation);
static bool is_of_superuser(Oid function);
static bool calls_others(Node *node, void *context);
static bool is_others(Oid function, void *context);
static void refuse(Relation relation, const char *kind, const char *name,
				   const char *what);
static void execute_bound(BoundPlan *cache, const Binding *binding, int expected,
						  const char *format, int nargs, Oid *argtypes,
						  Datum *values);
static SPIPlanPtr prepare_bound(const char *sql, int nargs, Oid *argtypes);
static void refresh_plan(BoundPlan *cache, const char *sql, int nargs, Oid *argtypes);
static void require_bound_table(const Binding *binding, SPIPlanPtr plan);
static char *bound_sql(const Binding *binding, const char *format);
static int	find_missing(const Binding *binding, const Claim *claim,
						 const BatchEntries *entries, int32 **missing);
static void not_unique(const Binding *binding, const char *key);

/*
 * payout_bind_accounts(table_name regclass, key_column name, balance_column name, currency text)
 *
 * In C, because who calls is known here only: whoever is the owner now, which
 * in a query that a worker runs is not the session's user.
 */
Datum
payout_bind_accounts(PG_FUNCTION_ARGS)
{
	static EngineStatement bind = {
		"SELECT payoutq.bind_accounts($1, $2, $3, $4, $5)",
		5, {REGCLASSOID, NAMEOID, NAMEOID, TEXTOID, NAMEOID}, NULL
	};
	NameData	created_by;
	Datum		values[5];
	EngineState state;

	for (int i = 0; i < 4; i++)
		if (PG_ARGISNULL(i))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("arguments of payout_bind_accounts() must not be null")));
	if (!payoutq_owns_table(PG_GETARG_OID(0)))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of table %s", get_rel_name(PG_GETARG_OID(0)))));

	namestrcpy(&created_by, GetUserNameFromId(GetUserId(), false));
	for (int i = 0; i < 4; i++)
		values[i] = PG_GETARG_DATUM(i);
	values[4] = NameGetDatum(&created_by);

	(void) payoutq_complain_of_version(ERROR);
	SPI_connect();
	payoutq_engine_enter(&state);
	(void) payoutq_execute(&bind, values, NULL, SPI_OK_SELECT);
	payoutq_engine_leave(&state);
	SPI_finish();
	PG_RETURN_VOID();
}

/* False: balances of the currency are kept in payoutq.account. */
bool
payoutq_find_binding(const char *currency, Binding *binding)
{
	static EngineStatement find = {
		"SELECT table_name::oid::bigint, key_column, balance_column"
		"  FROM payoutq.binding WHERE currency = $1", 1, {TEXTOID}, NULL
	};
	Datum		values[] = {CStringGetTextDatum(currency)};
	AttrNumber	key;

	if (payoutq_execute(&find, values, NULL, SPI_OK_SELECT) == 0)
		return false;

	binding->currency = currency;
	binding->table = (Oid) payoutq_result_int64(0, 1);
	binding->key_column = payoutq_result_cstring(0, 2);
	binding->balance_column = payoutq_result_cstring(0, 3);

	if (get_rel_name(binding->table) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("the table bound to currency \"%s\" does not exist", currency),
				 errhint("Bind another with payout_bind_accounts().")));
	key = get_attnum(binding->table, binding->key_column);
	if (key == InvalidAttrNumber)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of the table bound to currency \"%s\" does not exist",
						binding->key_column, currency)));
	binding->key_type = format_type_be_qualified(get_atttype(binding->table, key));
	return true;
}

/*
 * Credit the entries of a batch in the bound table.  Returns how many found no
 * row of their own, and their numbers in ascending order.
 */
int
payoutq_credit_bound(const Binding *binding, const Claim *claim,
					 const BatchEntries *entries, int32 **missing)
{
	static BoundPlan cache;
	Oid			argtypes[] = {TEXTARRAYOID, INT8ARRAYOID};
	Datum		values[] = {entries->users, entries->amounts};
	EngineState state;

	become_owner(binding, &state);
	execute_bound(&cache, binding, SPI_OK_UPDATE_RETURNING,
				  "UPDATE %1$s AS a SET %3$s = coalesce(a.%3$s, 0) + e.amount"
				  "  FROM ROWS FROM (unnest($1), unnest($2)) WITH ORDINALITY AS e (user_id, amount, n)"
				  " WHERE a.%2$s = e.user_id::%4$s"
				  " RETURNING e.n", 2, argtypes, values);
	payoutq_foreign_leave(&state);
	return find_missing(binding, claim, entries, missing);
}

/* What the credit returned are the ordinals of the entries that were paid. */
static int
find_missing(const Binding *binding, const Claim *claim, const BatchEntries *entries, int32 **missing)
{
	bool	   *paid = palloc0(entries->count * sizeof(bool));
	uint64		rows = SPI_processed;
	int			count = 0;

	for (uint64 i = 0; i < rows; i++)
	{
		int64		n = payoutq_result_int64(i, 1) - 1;

		if (paid[n])
			not_unique(binding, text_to_cstring(DatumGetTextPP(entries->user[n])));
		paid[n] = true;
	}
	if (rows == (uint64) entries->count)
		return 0;

	*missing = palloc(entries->count * sizeof(int32));
	for (int i = 0; i < entries->count; i++)
		if (!paid[i])
			(*missing)[count++] = claim->first_seq + i;
	return count;
}

/* Of class 42: it stops a job, with nothing of the batch kept. */
static void
not_unique(const Binding *binding, const char *key)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
			 errmsg("column \"%s\" of the table bound to currency \"%s\" is not unique",
					binding->key_column, binding->currency),
			 errdetail("More than one row is that of user \"%s\".", key),
			 errhint("Leave one row for each user, and create a unique index.")));
}

/* False: no such row, or its balance is too low. */
bool
payoutq_change_bound(const Binding *binding, const char *key, int64 amount)
{
	static BoundPlan cache;
	Oid			argtypes[] = {TEXTOID, INT8OID};
	Datum		values[] = {CStringGetTextDatum(key), Int64GetDatum(amount)};
	EngineState state;

	become_owner(binding, &state);
	execute_bound(&cache, binding, SPI_OK_UPDATE,
				  "UPDATE %1$s AS a SET %3$s = coalesce(a.%3$s, 0) + $2"
				  " WHERE a.%2$s = $1::%4$s AND coalesce(a.%3$s, 0) + $2 >= 0",
				  2, argtypes, values);
	payoutq_foreign_leave(&state);

	if (SPI_processed > 1)
		not_unique(binding, key);
	return SPI_processed == 1;
}

/*
 * Of a numeric balance, what there is in whole units and in the range of bigint.
 * Through numeric: floor() of a bigint would be that of a double.
 */
bool
payoutq_bound_balance(const Binding *binding, const char *key, int64 *balance)
{
	static BoundPlan cache;
	Oid			argtypes[] = {TEXTOID};
	Datum		values[] = {CStringGetTextDatum(key)};
	EngineState state;

	become_owner(binding, &state);
	execute_bound(&cache, binding, SPI_OK_SELECT,
				  "SELECT floor(least(greatest(coalesce(a.%3$s, 0)::numeric, -9223372036854775808),"
				  "             9223372036854775807))::bigint"
				  "  FROM %1$s AS a WHERE a.%2$s = $1::%4$s",
				  1, argtypes, values);
	payoutq_foreign_leave(&state);

	if (SPI_processed == 0)
		return false;
	*balance = payoutq_result_int64(0, 1);
	return true;
}

static void
become_owner(const Binding *binding, EngineState *state)
{
	Relation	relation = table_open(binding->table, RowExclusiveLock);
	Oid			owner = relation->rd_rel->relowner;

	if (superuser_arg(owner))
		check_superuser_table(relation);
	table_close(relation, NoLock);
	payoutq_foreign_enter(state, owner);
}

/*
 * All that an UPDATE of the table runs.  Nothing is opened or simplified for it:
 * that would evaluate immutable functions, as us.  Our lock keeps triggers out
 * until the transaction ends; the rest only the owner changes.
 */
static void
check_superuser_table(Relation relation)
{
	bool		partition = relation->rd_rel->relispartition;

	if (partition || relation->rd_rel->relkind == RELKIND_PARTITIONED_TABLE)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("%s \"%s\" belongs to a superuser", partition ? "partition" : "partitioned table",
						RelationGetRelationName(relation)),
				 partition ? errdetail("Expressions of its parent would run as a superuser.") :
				 errdetail("Triggers of its partitions would run as a superuser."),
				 errhint("Give the table to a role that is not a superuser.")));

	check_triggers(relation);
	check_constraints(relation);
	check_indexes(relation);
	check_rules(relation);
}

/*
 * Whoever was granted TRIGGER may have made them, so a function that he may use
 * does not do what he says: ours run a query that is an argument, and conditions
 * only call immutable functions.
 */
static void
check_triggers(Relation relation)
{
	TriggerDesc *triggers = relation->trigdesc;
	bool		by_anybody = true;

	for (int i = 0; triggers && i < triggers->numtriggers; i++)
	{
		Trigger    *trigger = &triggers->triggers[i];

		if (trigger->tgisinternal)
			continue;
		if (!is_of_superuser(trigger->tgfoid))
			refuse(relation, "trigger", trigger->tgname, "its function belongs to somebody else");
		if (getExtensionOfObject(ProcedureRelationId, trigger->tgfoid) == get_extension_oid("payoutq", true))
			refuse(relation, "trigger", trigger->tgname, "its function runs the query of whoever made it");
		if (trigger->tgqual && calls_others(stringToNode(trigger->tgqual), &by_anybody))
			refuse(relation, "trigger", trigger->tgname,
				   "its condition calls a function that is not immutable, or belongs to somebody else");
	}
}

/* CHECK, and generated columns */
static void
check_constraints(Relation relation)
{
	TupleDesc	desc = RelationGetDescr(relation);
	TupleConstr *constr = desc->constr;
	bool		by_anybody = false;

	for (int i = 0; constr && i < constr->num_check; i++)
		if (calls_others(stringToNode(constr->check[i].ccbin), &by_anybody))
			refuse(relation, "constraint", constr->check[i].ccname, "it calls a function of somebody else");

	for (int i = 0; constr && i < constr->num_defval; i++)
	{
		Form_pg_attribute column = TupleDescAttr(desc, constr->defval[i].adnum - 1);

		if (column->attgenerated && calls_others(stringToNode(constr->defval[i].adbin), &by_anybody))
			refuse(relation, "column", NameStr(column->attname), "it calls a function of somebody else");
	}
}

static void
check_indexes(Relation relation)
{
	static const AttrNumber parts[] = {Anum_pg_index_indexprs, Anum_pg_index_indpred};
	bool		by_anybody = false;
	ListCell   *cell;

	foreach(cell, RelationGetIndexList(relation))
	{
		HeapTuple	tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(lfirst_oid(cell)));

		if (!HeapTupleIsValid(tuple))
			elog(ERROR, "cache lookup failed for index %u", lfirst_oid(cell));
		for (size_t i = 0; i < lengthof(parts); i++)
		{
			bool		isnull;
			Datum		part = SysCacheGetAttr(INDEXRELID, tuple, parts[i], &isnull);

			if (!isnull && calls_others(stringToNode(TextDatumGetCString(part)), &by_anybody))
				refuse(relation, "index", get_rel_name(lfirst_oid(cell)), "it calls a function of somebody else");
		}
		ReleaseSysCache(tuple);
	}
}

static void
check_rules(Relation relation)
{
	RuleLock   *rules = relation->rd_rules;
	bool		by_anybody = false;

	for (int i = 0; rules && i < rules->numLocks; i++)
		if (calls_others(rules->rules[i]->qual, &by_anybody) ||
			calls_others((Node *) rules->rules[i]->actions, &by_anybody))
			refuse(relation, "rule with OID", psprintf("%u", rules->rules[i]->ruleId),
				   "it calls a function of somebody else");
}

static bool
is_of_superuser(Oid function)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", function);
	owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
	ReleaseSysCache(tuple);
	return superuser_arg(owner);
}

/*
 * The context is a bool: anybody may have written the expression.  A domain may
 * get another check at any time, and whoever has a type may tell how it becomes
 * JSON.
 */
static bool
calls_others(Node *node, void *context)
{
	if (node == NULL)
		return false;
	if (IsA(node, CoerceToDomain) || (*(bool *) context && payoutq_is_json_expression(node)))
		return true;
	if (check_functions_in_node(node, is_others, context))
		return true;
	if (IsA(node, Query))
		return query_tree_walker((Query *) node, payoutq_walker(calls_others), context, 0);
	return expression_tree_walker(node, payoutq_walker(calls_others), context);
}

/* Other functions than these may do what arguments say, as ts_rewrite() does. */
static bool
is_others(Oid function, void *context)
{
	bool		by_anybody = *(bool *) context;

	if (!is_of_superuser(function))
		return true;
	return by_anybody && func_volatile(function) != PROVOLATILE_IMMUTABLE &&
		function != F_NOW && function != F_PG_TRIGGER_DEPTH &&
		function != F_CURRENT_SETTING_TEXT && function != F_CURRENT_SETTING_TEXT_BOOL;
}

static void
refuse(Relation relation, const char *kind, const char *name, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("%s \"%s\" of table \"%s\" would run as a superuser",
					kind, name, RelationGetRelationName(relation)),
			 errdetail("Balances are changed as the owner of their table, and %s.", what),
			 errhint("Give the table to a role that is not a superuser.")));
}

static void
execute_bound(BoundPlan *cache, const Binding *binding, int expected,
			  const char *format, int nargs, Oid *argtypes, Datum *values)
{
	char	   *sql = bound_sql(binding, format);
	SPIPlanPtr volatile plan;
	volatile int rc = 0;

	/* Called by a trigger of such a statement: the plan in the cache runs. */
	if (cache->running)
		plan = prepare_bound(sql, nargs, argtypes);
	else
	{
		refresh_plan(cache, sql, nargs, argtypes);
		plan = cache->plan;
	}

	cache->running = true;
	PG_TRY();
	{
		rc = SPI_execute_plan(plan, values, NULL, false, 0);
	}
	PG_FINALLY();
	{
		cache->running = plan != cache->plan;
	}
	PG_END_TRY();
	if (rc != expected)
		elog(ERROR, "unexpected result of a statement on a bound table: %s",
			 SPI_result_code_string(rc));
	require_bound_table(binding, plan);
}

/*
 * A plan is made for a name, and made again for the same one.  Our lock keeps the
 * table's, but not that of its schema.
 */
static void
require_bound_table(const Binding *binding, SPIPlanPtr plan)
{
	CachedPlanSource *source = linitial(SPI_plan_get_plan_sources(plan));

	if (!list_member_oid(source->relationOids, binding->table))
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("the schema of table \"%s\" was renamed meanwhile",
						get_rel_name(binding->table))));
}

static SPIPlanPtr
prepare_bound(const char *sql, int nargs, Oid *argtypes)
{
	SPIPlanPtr	plan = SPI_prepare_cursor(sql, nargs, argtypes, CURSOR_OPT_GENERIC_PLAN);

	if (plan == NULL)
		elog(ERROR, "could not prepare a statement on a bound table: %s",
			 SPI_result_code_string(SPI_result));
	return plan;
}

/* The text tells, too, when the table was renamed and another one has its name. */
static pg_noinline void
refresh_plan(BoundPlan *cache, const char *sql, int nargs, Oid *argtypes)
{
	SPIPlanPtr	old = cache->plan;

	if (old && strcmp(cache->sql, sql) == 0 && cache->uses++ < PLAN_LIFETIME)
		return;

	cache->plan = NULL;
	if (old)
	{
		pfree(cache->sql);
		SPI_freeplan(old);
	}

	old = prepare_bound(sql, nargs, argtypes);
	SPI_keepplan(old);
	cache->sql = MemoryContextStrdup(TopMemoryContext, sql);
	cache->plan = old;
	cache->uses = 0;
}

/* %1$s table, %2$s key column, %3$s balance column, %4$s type of the key */
static char *
bound_sql(const Binding *binding, const char *format)
{
	StringInfoData sql;
	char	   *values[4];

	/* Children by inheritance have balances of their own. */
	values[0] = psprintf("%s %s",
						 get_rel_relkind(binding->table) == RELKIND_RELATION ? "ONLY" : "",
						 quote_qualified_identifier(get_namespace_name(get_rel_namespace(binding->table)),
													get_rel_name(binding->table)));
	values[1] = pstrdup(quote_identifier(binding->key_column));
	values[2] = pstrdup(quote_identifier(binding->balance_column));
	values[3] = binding->key_type;

	initStringInfo(&sql);
	for (const char *p = format; *p; p++)
	{
		if (p[0] == '%' && p[1] >= '1' && p[1] <= '4' && p[2] == '$' && p[3] == 's')
		{
			appendStringInfoString(&sql, values[p[1] - '1']);
			p += 3;
		}
		else
			appendStringInfoChar(&sql, *p);
	}
	return sql.data;
}
