/*
 * fuzz.c
 *		libFuzzer in a backend, because the parsers need one.
 *
 * payoutq_fuzz(ARRAY['command', 'argument of libFuzzer', ...]) runs the fuzzer
 * that the command's last part names.
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "compat.h"
#include "fuzz.h"

/* Of libFuzzer */
extern int	LLVMFuzzerRunDriver(int *argc, char ***argv,
								int (*callback) (const uint8_t *data, size_t size));

#define MAX_GUARDED		16
#define LEAK_INTERVAL	10000
#define LEAK_LIMIT		(1024 * 1024)

static const Fuzzer *const fuzzers[] = {&fuzz_winners, &fuzz_signature, &fuzz_answer, &fuzz_http};

static const Fuzzer *fuzzer;
static MemoryContext input_context;
static void *guarded[MAX_GUARDED];
static int	guarded_count;

static int	try_input(const uint8_t *data, size_t size);
static void parse(const uint8_t *data, size_t size);
static void check_leaks(void);

PG_FUNCTION_INFO_V1(payoutq_fuzz);

Datum
payoutq_fuzz(PG_FUNCTION_ARGS)
{
	Datum	   *words;
	int			argc;
	char	  **argv;
	const char *name;

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(0), TEXTOID, -1, false, TYPALIGN_INT, &words, NULL, &argc);
	argv = palloc0((argc + 1) * sizeof(char *));
	for (int i = 0; i < argc; i++)
		argv[i] = TextDatumGetCString(words[i]);
	name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
	for (int i = 0; i < lengthof(fuzzers); i++)
		if (strcmp(fuzzers[i]->name, name) == 0)
			fuzzer = fuzzers[i];
	if (fuzzer == NULL)
		elog(ERROR, "there is no fuzzer \"%s\"", name);

	input_context = AllocSetContextCreate(CurrentMemoryContext, "fuzzed input", ALLOCSET_DEFAULT_SIZES);
	if (fuzzer->prepare)
		fuzzer->prepare();

	/* libFuzzer sets a handler only where there is none; it needs these. */
	signal(SIGALRM, SIG_DFL);
	signal(SIGINT, SIG_DFL);
	signal(SIGTERM, SIG_DFL);
	if (LLVMFuzzerRunDriver(&argc, &argv, try_input) != 0)
		elog(FATAL, "libFuzzer has failed");
	PG_RETURN_VOID();
}

static int
try_input(const uint8_t *data, size_t size)
{
	MemoryContext caller = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	int			sqlstate = 0;

	if (fuzzer->subtransaction)
		BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(input_context);
	PG_TRY();
	{
		parse(data, size);
	}
	PG_CATCH();
	{
		sqlstate = geterrcode();
		FlushErrorState();
	}
	PG_END_TRY();
	if (fuzzer->subtransaction)
	{
		RollbackAndReleaseCurrentSubTransaction();
		CurrentResourceOwner = owner;
	}
	MemoryContextSwitchTo(caller);

	/* What is wrong with the input has a code of its own. */
	expect(ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_INTERNAL_ERROR);
	while (guarded_count > 0)
		free(guarded[--guarded_count]);
	MemoryContextReset(input_context);
	check_leaks();
	return 0;
}

static void
parse(const uint8_t *data, size_t size)
{
	fuzzer->parse(data, size);
}

/* What each input leaves behind adds up. */
static void
check_leaks(void)
{
	static Size first = 0;
	static int	inputs = 0;
	Size		now;

	if (++inputs % LEAK_INTERVAL != 0)
		return;
	now = MemoryContextMemAllocated(TopMemoryContext, true);
	if (first == 0)
		first = now;
	expect(now <= first + LEAK_LIMIT);
}

/*
 * A copy in memory of its own, so that AddressSanitizer sees each byte that is
 * read behind it; it does not know where what palloc() returns ends.
 */
void *
fuzz_guarded(const void *data, size_t size)
{
	void	   *copy = malloc(size > 0 ? size : 1);

	if (copy == NULL || guarded_count == MAX_GUARDED)
		fuzz_found("no memory for a copy");
	memcpy(copy, data, size);
	guarded[guarded_count++] = copy;
	return copy;
}

void
fuzz_found(const char *what)
{
	fprintf(stderr, "FOUND by %s: not so: %s\n", fuzzer->name, what);
	abort();
}
