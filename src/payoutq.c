/*
 * payoutq.c
 *		Initialisation of the extension.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "payoutq.h"

#ifdef PG_MODULE_MAGIC_EXT
PG_MODULE_MAGIC_EXT(.name = "payoutq", .version = PAYOUTQ_VERSION);
#else
PG_MODULE_MAGIC;
#endif

PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
{
	payoutq_define_settings();
	payoutq_install_drop_hook();

	/* Without preload there is no shared memory and no launcher. */
	if (!process_shared_preload_libraries_in_progress)
		return;

	payoutq_shared_init();
	payoutq_install_utility_hook();

	/* pg_upgrade must find a server in which nothing moves. */
	if (!IsBinaryUpgrade)
		payoutq_register_launcher();
}
