/*
 * compat.h
 *		All differences between the supported server versions (15 to 18).
 */
#ifndef PAYOUTQ_COMPAT_H
#define PAYOUTQ_COMPAT_H

#include "postgres.h"

#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_foreign_server.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "storage/proc.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 150000
#error "payoutq needs PostgreSQL 15 or later"
#endif

/* Before a declaration: the function does not return. */
#ifndef pg_noreturn
#define pg_noreturn			__attribute__((noreturn))
#endif

/* A small number that no other live backend has. */
#if PG_VERSION_NUM >= 170000
#define MyBackendNumber()	((int) MyProcNumber)
#else
#define MyBackendNumber()	((int) MyBackendId)
#endif

/* The index of this process in ProcGlobal->allProcs. */
#if PG_VERSION_NUM >= 170000
#define MyProcIndex()		((int) MyProcNumber)
#else
#define MyProcIndex()		(MyProc->pgprocno)
#endif

/* Wait events have names of their own since PostgreSQL 17. */
static inline uint32
payoutq_wait_event(uint32 *cache pg_attribute_unused(), const char *name pg_attribute_unused())
{
#if PG_VERSION_NUM >= 170000
	if (*cache == 0)
		*cache = WaitEventExtensionNew(name);
	return *cache;
#else
	return PG_WAIT_EXTENSION;
#endif
}

/* Since PostgreSQL 17 a setting can end long transactions, a worker's too. */
static inline void
payoutq_disable_transaction_timeout(void)
{
#if PG_VERSION_NUM >= 170000
	SetConfigOption("transaction_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
#endif
}

static inline void
payoutq_insert_index_tuples(ResultRelInfo *rri, TupleTableSlot *slot,
							EState *estate)
{
#if PG_VERSION_NUM >= 160000
	ExecInsertIndexTuples(rri, slot, estate, false, false, NULL, NIL, false);
#else
	ExecInsertIndexTuples(rri, slot, estate, false, false, NULL, NIL);
#endif
}

/* Walkers were declared as (), which is (void) since C23. */
#if PG_VERSION_NUM < 160000
#define payoutq_walker(function) ((bool (*) ()) (void (*) (void)) (function))
#else
#define payoutq_walker(function) (function)
#endif

/* What calls functions that are not in the expression. */
static inline bool
payoutq_is_json_expression(Node *node pg_attribute_unused())
{
#if PG_VERSION_NUM >= 170000
	return IsA(node, JsonConstructorExpr) || IsA(node, JsonExpr);
#elif PG_VERSION_NUM >= 160000
	return IsA(node, JsonConstructorExpr);
#else
	return false;
#endif
}

static inline bool
payoutq_owns_database(Oid database)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(DatabaseRelationId, database, GetUserId());
#else
	return pg_database_ownercheck(database, GetUserId());
#endif
}

static inline bool
payoutq_owns_table(Oid table)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(RelationRelationId, table, GetUserId());
#else
	return pg_class_ownercheck(table, GetUserId());
#endif
}

static inline bool
payoutq_owns_server(Oid server)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(ForeignServerRelationId, server, GetUserId());
#else
	return pg_foreign_server_ownercheck(server, GetUserId());
#endif
}

static inline bool
payoutq_may_use_server(Oid server)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(ForeignServerRelationId, server, GetUserId(), ACL_USAGE) == ACLCHECK_OK;
#else
	return pg_foreign_server_aclcheck(server, GetUserId(), ACL_USAGE) == ACLCHECK_OK;
#endif
}

#endif							/* PAYOUTQ_COMPAT_H */
