/*
 * provider.c
 *		Providers: foreign servers of the wrapper payout_provider, and the
 *		validator of their options.
 */
#include "postgres.h"

#include "access/reloptions.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

static const char *const kinds[] = {"external"};

static void check_kind(const char *kind);
static void check_interval(const char *name, const char *value);

PG_FUNCTION_INFO_V1(payoutq_provider_validator);

/* payoutq.provider_validator(options text[], catalog oid) */
Datum
payoutq_provider_validator(PG_FUNCTION_ARGS)
{
	List	   *options = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	bool		has_kind = false;
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		if (catalog == ForeignServerRelationId && strcmp(option->defname, "kind") == 0)
		{
			check_kind(defGetString(option));
			has_kind = true;
		}
		else if (catalog == ForeignServerRelationId && strcmp(option->defname, "key_life") == 0)
			check_interval(option->defname, defGetString(option));
		else
			ereport(ERROR,
					(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
					 errmsg("invalid option \"%s\"", option->defname),
					 catalog == ForeignServerRelationId ?
					 errhint("Options of a provider are kind and key_life.") :
					 errhint("There are no options here.")));
	}
	if (catalog == ForeignServerRelationId && !has_kind)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
				 errmsg("a provider needs the option \"kind\""),
				 errhint("Kinds are: external.")));
	PG_RETURN_VOID();
}

static void
check_kind(const char *kind)
{
	for (int i = 0; i < lengthof(kinds); i++)
		if (strcmp(kind, kinds[i]) == 0)
			return;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid kind of provider \"%s\"", kind),
			 errhint("Kinds are: external.")));
}

static void
check_interval(const char *name, const char *value)
{
	Interval   *interval = DatumGetIntervalP(DirectFunctionCall3(interval_in, CStringGetDatum(value),
																 ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));

	if (interval->month < 0 || interval->day < 0 || interval->time < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("option \"%s\" must not be negative", name)));
}

/* It exists, and the current user may use it; as for a foreign table. */
void
payoutq_check_provider(const char *provider)
{
	ForeignServer *server = GetForeignServerByName(provider, true);

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
}
