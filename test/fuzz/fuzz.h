/*
 * fuzz.h
 *		What the fuzzers share.  A fuzzer feeds one parser of bytes that come from
 *		outside; an error is an answer, an abort() a finding.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "postgres.h"

#include "compat.h"

typedef struct Fuzzer
{
	const char *name;
	void		(*prepare) (void);	/* or NULL */
	void		(*parse) (const uint8 *data, size_t size);
	bool		subtransaction; /* it needs one to recover from errors */
} Fuzzer;

extern const Fuzzer fuzz_winners;
extern const Fuzzer fuzz_signature;
extern const Fuzzer fuzz_answer;
extern const Fuzzer fuzz_http;

extern void *fuzz_guarded(const void *data, size_t size);
pg_noreturn extern void fuzz_found(const char *what);

#define expect(condition) \
	((condition) ? (void) 0 : fuzz_found(#condition))

#endif							/* FUZZ_H */
