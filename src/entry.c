/*
 * entry.c
 *		Write the entries of a job and its batches, as COPY does it: pages
 *		filled at once, then the indexes.
 *
 * Entries come in order of user_id.  Nothing is kept in memory but a buffer of
 * rows and one sum a batch.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "nodes/makefuncs.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payoutq.h"

#define BUFFERED_ROWS	1000

/* Columns of payoutq.entry */
enum
{
	ENTRY_JOB_ID,
	ENTRY_AMOUNT,
	ENTRY_SEQ,
	ENTRY_USER_ID,
	ENTRY_COLUMNS
};

struct EntryWriter
{
	int64		job_id;
	int32		batch_size;
	int32		seq;			/* of the last entry */
	Relation	relation;
	EState	   *estate;
	ResultRelInfo *rri;
	BulkInsertState bulk;
	CommandId	command;
	TupleTableSlot *slots[BUFFERED_ROWS];
	int			buffered;
	MemoryContext rows;			/* what the buffered rows point to */
	Datum	   *sums;			/* of the amounts of each batch */
	int			max_sums;
};

static void flush(EntryWriter *writer);
static void add_to_batch(EntryWriter *writer, int64 amount);
static int32 write_batches(EntryWriter *writer, TimestampTz run_after);

EntryWriter *
payoutq_entries_begin(int64 job_id, int32 batch_size)
{
	EntryWriter *writer = palloc0(sizeof(EntryWriter));

	writer->job_id = job_id;
	writer->batch_size = batch_size;
	writer->relation = table_openrv(makeRangeVar("payoutq", "entry", -1), RowExclusiveLock);
	writer->estate = CreateExecutorState();
	writer->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->rri, writer->relation, 0, NULL, 0);
	ExecOpenIndices(writer->rri, false);
	writer->bulk = GetBulkInsertState();
	writer->command = GetCurrentCommandId(true);
	writer->rows = AllocSetContextCreate(CurrentMemoryContext, "payoutq entries",
										 ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < BUFFERED_ROWS; i++)
		writer->slots[i] = table_slot_create(writer->relation, NULL);
	writer->max_sums = 1024;
	writer->sums = palloc(writer->max_sums * sizeof(Datum));
	return writer;
}

void
payoutq_entries_add(EntryWriter *writer, const char *user_id, int length, int64 amount)
{
	TupleTableSlot *slot = writer->slots[writer->buffered++];
	MemoryContext caller = MemoryContextSwitchTo(writer->rows);

	if (writer->seq == PG_INT32_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("a job cannot have more than %d winners", PG_INT32_MAX)));
	writer->seq++;
	add_to_batch(writer, amount);

	ExecClearTuple(slot);
	slot->tts_values[ENTRY_JOB_ID] = Int64GetDatum(writer->job_id);
	slot->tts_values[ENTRY_AMOUNT] = Int64GetDatum(amount);
	slot->tts_values[ENTRY_SEQ] = Int32GetDatum(writer->seq);
	slot->tts_values[ENTRY_USER_ID] =
		PointerGetDatum(cstring_to_text_with_len(user_id, length));
	memset(slot->tts_isnull, false, ENTRY_COLUMNS);
	ExecStoreVirtualTuple(slot);
	MemoryContextSwitchTo(caller);

	if (writer->buffered == BUFFERED_ROWS)
		flush(writer);
}

static void
add_to_batch(EntryWriter *writer, int64 amount)
{
	int			batch = (writer->seq - 1) / writer->batch_size;

	if (batch >= writer->max_sums)
	{
		writer->max_sums *= 2;
		writer->sums = repalloc_huge(writer->sums, writer->max_sums * sizeof(Datum));
	}
	if ((writer->seq - 1) % writer->batch_size == 0)
		writer->sums[batch] = Int64GetDatum(0);
	writer->sums[batch] = Int64GetDatum(DatumGetInt64(writer->sums[batch]) + amount);
}

static void
flush(EntryWriter *writer)
{
	MemoryContext caller;

	if (writer->buffered == 0)
		return;

	caller = MemoryContextSwitchTo(GetPerTupleMemoryContext(writer->estate));
	table_multi_insert(writer->relation, writer->slots, writer->buffered,
					   writer->command, 0, writer->bulk);
	MemoryContextSwitchTo(caller);

	for (int i = 0; i < writer->buffered; i++)
		payoutq_insert_index_tuples(writer->rri, writer->slots[i], writer->estate);

	ResetPerTupleExprContext(writer->estate);
	MemoryContextReset(writer->rows);
	writer->buffered = 0;
	CHECK_FOR_INTERRUPTS();
}

/* Write what is left, and the batches.  Returns the number of entries. */
int32
payoutq_entries_end(EntryWriter *writer, TimestampTz run_after)
{
	flush(writer);

	FreeBulkInsertState(writer->bulk);
	for (int i = 0; i < BUFFERED_ROWS; i++)
		ExecDropSingleTupleTableSlot(writer->slots[i]);
	ExecCloseIndices(writer->rri);
	FreeExecutorState(writer->estate);
	MemoryContextDelete(writer->rows);
	table_close(writer->relation, NoLock);
	CommandCounterIncrement();

	return write_batches(writer, run_after);
}

static int32
write_batches(EntryWriter *writer, TimestampTz run_after)
{
	static EngineStatement insert = {
		"INSERT INTO payoutq.batch (job_id, batch_no, first_seq, last_seq, amount, run_after)"
		" SELECT $1, n, (n - 1) * $2 + 1, least(n * $2::bigint, $3), amount, $5"
		"   FROM unnest($4) WITH ORDINALITY AS b (amount, n)",
		5, {INT8OID, INT4OID, INT4OID, INT8ARRAYOID, TIMESTAMPTZOID}, NULL
	};
	int			batches = (writer->seq + writer->batch_size - 1) / writer->batch_size;
	Datum		values[] = {Int64GetDatum(writer->job_id),
		Int32GetDatum(writer->batch_size), Int32GetDatum(writer->seq),
		PointerGetDatum(construct_array(writer->sums, batches, INT8OID, sizeof(int64),
										FLOAT8PASSBYVAL, TYPALIGN_DOUBLE)),
	TimestampTzGetDatum(run_after)};

	(void) payoutq_execute(&insert, values, NULL, SPI_OK_INSERT);
	return batches;
}
