/** The projection’s tables. Everything in them can be folded anew from the streams. */
import { isNotNull } from 'drizzle-orm'
import { index, integer, primaryKey, real, sqliteTable, text } from 'drizzle-orm/sqlite-core'
import type { Isolation, Status } from '../shared/workload.ts'

/**
 * One row per workload. Columns hold what is filtered, sorted or counted; `record`, `output`, `response` and `spec`
 * are JSON and together the whole `WorkloadRecord`. The key is the sequence of `accepted`: rows lie in the order of listing.
 */
export const workloads = sqliteTable(
  'workloads',
  {
    acceptedSeq: integer('accepted_seq').primaryKey(),
    id: text('id').notNull().unique(),
    status: text('status').$type<Status>().notNull(),
    isolation: text('isolation').$type<Isolation>().notNull(),
    lastSeq: integer('last_seq').notNull(),
    createdAt: text('created_at').notNull(),
    endedAt: text('ended_at'),
    queueMs: real('queue_ms'),
    durationMs: real('duration_ms'),
    runner: text('runner'),
    /** Name of the deployed function it is an invocation of. */
    function: text('function'),
    /** Digests this row keeps from being swept. */
    payloadBlob: text('payload_blob'),
    outputBlob: text('output_blob'),
    requestBlob: text('request_blob'),
    responseBlob: text('response_blob'),
    sourceBlob: text('source_blob'),
    record: text('record').notNull(),
    output: text('output'),
    response: text('response'),
    spec: text('spec').notNull(),
  },
  // Each index ends with the rowid, which is accepted_seq: equality on one of them lists in order.
  (table) => [
    index('workloads_status').on(table.status),
    index('workloads_isolation').on(table.isolation),
    index('workloads_isolation_status').on(table.isolation, table.status),
    index('workloads_function').on(table.function).where(isNotNull(table.function)),
    index('workloads_created_at').on(table.createdAt),
    index('workloads_ended_at').on(table.endedAt).where(isNotNull(table.endedAt)),
    index('workloads_payload_blob').on(table.payloadBlob).where(isNotNull(table.payloadBlob)),
    index('workloads_output_blob').on(table.outputBlob).where(isNotNull(table.outputBlob)),
    index('workloads_request_blob').on(table.requestBlob).where(isNotNull(table.requestBlob)),
    index('workloads_response_blob').on(table.responseBlob).where(isNotNull(table.responseBlob)),
    index('workloads_source_blob').on(table.sourceBlob).where(isNotNull(table.sourceBlob)),
  ],
)

export const workloadLabels = sqliteTable(
  'workload_labels',
  {
    acceptedSeq: integer('accepted_seq').notNull(),
    name: text('name').notNull(),
    value: text('value').notNull(),
  },
  (table) => [
    primaryKey({ columns: [table.acceptedSeq, table.name] }),
    index('workload_labels_value').on(table.name, table.value, table.acceptedSeq),
    index('workload_labels_name').on(table.name, table.acceptedSeq),
  ],
)

/** One row per message of the log stream; its key is the message’s sequence. */
export const logBatches = sqliteTable(
  'log_batches',
  {
    seq: integer('seq').primaryKey(),
    workload: text('workload').notNull(),
    attempt: integer('attempt').notNull(),
    n: integer('n').notNull(),
    /** Batches of this attempt between the one before and this one that never arrived. */
    missing: integer('missing').notNull(),
    lineCount: integer('line_count').notNull(),
    bytes: integer('bytes').notNull(),
    /** Lines dropped after this batch’s lines, by the runner or here. */
    dropped: integer('dropped').notNull(),
    /** The attempt’s `dropped` as the runner said it, which adds up over its batches. */
    droppedByRunner: integer('dropped_by_runner').notNull(),
    /** When it was stored in the stream, ms since the epoch. */
    at: integer('at').notNull(),
    /** JSON array of log lines. */
    lines: text('lines').notNull(),
  },
  (table) => [index('log_batches_workload').on(table.workload)],
)

/** Up to where each stream has been folded; written in the transaction that folds. */
export const checkpoints = sqliteTable('checkpoints', {
  stream: text('stream').primaryKey(),
  seq: integer('seq').notNull(),
  at: integer('at').notNull(),
  created: text('created').notNull(),
})

/** What was refused or skipped, by name; `last_seq` makes counting a message twice impossible. */
export const counters = sqliteTable('counters', {
  name: text('name').primaryKey(),
  value: integer('value').notNull(),
  lastSeq: integer('last_seq').notNull(),
})

/** Up to where each stream was counted and traced before this database was made, and so is not again. */
export const told = sqliteTable('told', {
  stream: text('stream').primaryKey(),
  seq: integer('seq').notNull(),
})
