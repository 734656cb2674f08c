/** The event stream as rows: one per workload, moved by the lifecycle’s fold and by nothing else. */
import type { InStatement, InValue } from '@libsql/client'
import { getTableColumns, sql } from 'drizzle-orm'
import { type EventKind, eventSchemas, type LifecycleEvent, readEvent } from '../shared/events.ts'
import type { StoredMessage } from '../shared/follow.ts'
import { bodyBlob, fold, hasEnded, type WorkloadRecord } from '../shared/lifecycle.ts'
import type { Logger } from '../shared/process.ts'
import { workloadOf } from '../shared/subjects.ts'
import { EVENTS } from '../shared/topology.ts'
import { traceFields } from '../shared/trace.ts'
import type { Cause, Digest, FunctionRef, Isolation, Status, WorkloadId } from '../shared/workload.ts'
import { type Database, Unfoldable } from './database.ts'
import { parseJson, rarely } from './messages.ts'
import type { Batch, Plan, Projection } from './project.ts'
import { workloads } from './schema.ts'

/** Bytes of accepted events whose records are kept at hand, so that the next event needs no SELECT. */
const recentBytes = 48 * 1_048_576
/** Rows per INSERT: few different texts, as each is prepared once; more rows in one are no faster. */
const rowsPerStatement = [64, 16, 4, 1]

type Row = typeof workloads.$inferSelect
export type StoredRecord = Pick<Row, 'record' | 'output' | 'response' | 'spec'>

/** A record with its spec as JSON, which never changes after `accepted` and is written as it was. */
interface Known {
  record: WorkloadRecord
  spec: string
}

/**
 * What a batch changes. Of a workload that has ended only the row is kept: hardly anything moves it again, and what
 * the row was made of is garbage while it is young, which under load is a third of the fold’s time.
 */
type Changed = Known | { row: Row }

export const toRecord = (row: StoredRecord): WorkloadRecord => ({
  ...JSON.parse(row.record),
  output: row.output === null ? null : JSON.parse(row.output),
  response: row.response === null ? null : JSON.parse(row.response),
  spec: JSON.parse(row.spec),
})

const toKnown = (changed: Changed): Known =>
  'row' in changed ? { record: toRecord(changed.row), spec: changed.row.spec } : changed

function toRow({ record, spec }: Known): Row {
  return {
    acceptedSeq: record.accepted_seq,
    id: record.id,
    status: record.status,
    isolation: record.isolation,
    lastSeq: record.last_seq,
    createdAt: record.created_at,
    endedAt: record.ended_at,
    queueMs: record.queue_ms,
    durationMs: record.duration_ms,
    runner: record.runner,
    function: record.function?.name ?? null,
    payloadBlob: record.payload?.blob ?? null,
    outputBlob: record.output_blob?.blob ?? null,
    requestBlob: record.request_blob?.blob ?? null,
    responseBlob: bodyBlob(record.response?.body)?.blob ?? null,
    sourceBlob: sourceBlob(record),
    record: JSON.stringify({ ...record, spec: undefined, output: undefined, response: undefined }),
    output: record.output === null ? null : JSON.stringify(record.output),
    response: record.response === null ? null : JSON.stringify(record.response),
    spec,
  }
}

/** Of a deployed function it is kept with the version. */
function sourceBlob({ function: of, spec: { archive, image } }: WorkloadRecord): Digest | null {
  if (of !== null) return null
  return archive?.blob ?? (typeof image === 'object' ? image.blob : null)
}

const rowsOf = (changed: ReadonlyMap<string, Changed>): Row[] =>
  Array.from(changed.values(), (one) => ('row' in one ? one.row : toRow(one)))

// The statement is written out rather than built by drizzle for each batch: this is the platform’s hottest write.
const columns = Object.entries(getTableColumns(workloads)) as [keyof Row, { name: string }][]
const names = columns.map(([, { name }]) => name)
const fixed = [
  'accepted_seq',
  'id',
  'isolation',
  'created_at',
  'function',
  'payload_blob',
  'request_blob',
  'source_blob',
  'spec',
]
const upsertHead = `INSERT INTO workloads (${names.join(', ')}) VALUES `
const upsertTail = ` ON CONFLICT (id) DO UPDATE SET ${names
  .filter((name) => !fixed.includes(name))
  .map((name) => `${name} = excluded.${name}`)
  .join(', ')} WHERE workloads.last_seq < excluded.last_seq`
const rowHolder = `(${names.map(() => '?').join(', ')})`

const upsertOf = new Map(
  rowsPerStatement.map((n) => [n, upsertHead + Array(n).fill(rowHolder).join(', ') + upsertTail]),
)

/** Writes the rows, except where the database already knows more of the workload. */
export function upsert(rows: readonly Row[]): InStatement[] {
  const statements: InStatement[] = []
  let at = 0
  for (const [n, sql] of upsertOf)
    for (; rows.length - at >= n; at += n) {
      const args: InValue[] = []
      for (let i = at; i < at + n; i++) for (const [key] of columns) args.push(rows[i]![key])
      statements.push({ sql, args })
    }
  return statements
}

type Parsed = { event: LifecycleEvent } | { late: string } | undefined

/** The event in a message; undefined where it is none, or not the one its subject says. */
export function parseEvent(message: StoredMessage): Parsed {
  const [, family, workload, kind] = message.subject.split('.')
  const raw = parseJson(message.data)
  if (family === 'late') {
    const event = readEvent('late', raw)
    return event !== undefined && event.subject === workload ? { late: event.data.status } : undefined
  }
  if (kind === undefined || kind === 'late' || kind === 'log' || !Object.hasOwn(eventSchemas, kind))
    return undefined
  const event = readEvent(kind as Exclude<EventKind, 'late'>, raw)
  return event !== undefined && event.subject === workload ? { event } : undefined
}

/** What an event that moved its workload says to whoever counts and traces; nothing of its size is kept for that. */
export interface Step {
  seq: number
  event: Pick<LifecycleEvent, 'id' | 'type' | 'traceparent'>
  workload: WorkloadId
  isolation: Isolation
  function: FunctionRef | null
  attempt: number
  status: Status
  cause: Cause | null
  /** Of the failure, where it is one. */
  message: string | undefined
  queueMs: number | null
  durationMs: number | null
}

const toStep = ({ id, type, traceparent }: LifecycleEvent, record: WorkloadRecord, seq: number): Step => ({
  seq,
  event: { id, type, traceparent },
  workload: record.id,
  isolation: record.isolation,
  function: record.function,
  attempt: record.attempts,
  status: record.status,
  cause: record.cause,
  message: record.error?.message,
  queueMs: record.queue_ms,
  durationMs: record.duration_ms,
})

/** @param tell told of every committed batch, with the steps in it that are new */
export function eventProjection(
  log: Logger,
  tell: (steps: Step[], batch: Batch) => void = () => {},
): Projection {
  const recent = new Map<string, Known>()
  let bytes = 0
  const forget = (id: string) => {
    const known = recent.get(id)
    if (known === undefined) return
    recent.delete(id)
    bytes -= known.spec.length
  }
  const remember = (id: string, known: Known) => {
    forget(id)
    recent.set(id, known)
    bytes += known.spec.length
    for (const oldest of recent.keys()) {
      if (bytes <= recentBytes) break
      forget(oldest)
    }
  }
  const sayInvalid = rarely((message: StoredMessage) =>
    log.warn({ seq: message.seq, subject: message.subject }, 'skipped a message that is not a valid event'),
  )
  const sayIllegal = rarely((event: LifecycleEvent, reason: string) =>
    log.warn(
      {
        workload: event.subject,
        ...traceFields(event.traceparent),
        event: event.id,
        source: event.source,
        reason,
      },
      'refused an event',
    ),
  )

  return {
    stream: EVENTS,
    // Readers who need it sooner hurry it; larger batches are what makes folding cheap.
    lingerMs: 100,
    counter: 'events',
    clear: ['DELETE FROM workloads', 'DELETE FROM workload_labels'],
    forget() {
      recent.clear()
      bytes = 0
    },
    async plan(database, messages): Promise<Plan> {
      const unknown = new Set<string>()
      for (const { subject } of messages) {
        const id = subject.startsWith('vulcan.events.') ? workloadOf(subject) : undefined
        if (id !== undefined && !recent.has(id)) unknown.add(id)
      }
      const stored = await readKnown(database, unknown)

      const changed = new Map<string, Changed>()
      const begun: [acceptedSeq: number, name: string, value: string][] = []
      const steps: Step[] = []
      const counted = new Map<string, number[]>()
      const count = (name: string, seq: number) => {
        const seqs = counted.get(name)
        if (seqs === undefined) counted.set(name, [seq])
        else seqs.push(seq)
      }
      const move = (event: LifecycleEvent, seq: number) => {
        const id = event.subject
        const before = changed.get(id)
        const known = before === undefined ? (recent.get(id) ?? stored.get(id)) : toKnown(before)
        const folded = fold(known?.record, event, seq)
        if ('illegal' in folded) {
          sayIllegal(event, folded.illegal)
          count(`illegal.${folded.illegal}`, seq)
        } else if ('record' in folded) {
          const { record } = folded
          const now = { record, spec: known?.spec ?? JSON.stringify(record.spec) }
          changed.set(id, hasEnded(record.status) ? { row: toRow(now) } : now)
          if (known === undefined)
            for (const [name, value] of Object.entries(record.labels)) begun.push([seq, name, value])
          else steps.push(toStep(event, record, seq))
        }
      }
      for (const message of messages) {
        const parsed = parseEvent(message)
        if (parsed === undefined) {
          sayInvalid(message)
          count('invalid', message.seq)
        } else if ('late' in parsed) count(`late.${parsed.late}`, message.seq)
        else foldable(() => move(parsed.event, message.seq))
      }
      return {
        statements: foldable(() => [...upsert(rowsOf(changed)), ...labels(begun)]),
        touched: changed.keys(),
        counted,
        committed() {
          for (const [id, one] of changed)
            if ('row' in one) forget(id)
            else remember(id, one)
        },
        tell(batch) {
          const { toldTo } = batch
          tell(toldTo < messages[0]!.seq ? steps : steps.filter(({ seq }) => seq > toldTo), batch)
        },
      }
    },
  }
}

/** What throws here would throw again: the one message is counted out, and the fold goes on. */
function foldable<T>(act: () => T): T {
  try {
    return act()
  } catch (cause) {
    throw new Unfoldable('a message cannot be folded', { cause })
  }
}

async function readKnown({ orm }: Database, ids: Set<string>): Promise<Map<string, Known>> {
  if (ids.size === 0) return new Map()
  const rows = await orm
    .select({
      id: workloads.id,
      record: workloads.record,
      output: workloads.output,
      response: workloads.response,
      spec: workloads.spec,
    })
    .from(workloads)
    .where(sql`${workloads.id} IN (SELECT value FROM json_each(${JSON.stringify([...ids])}))`)
  return new Map(rows.map((row) => [row.id, { record: toRecord(row), spec: row.spec }]))
}

function labels(begun: [acceptedSeq: number, name: string, value: string][]): InStatement[] {
  if (begun.length === 0) return []
  return [
    {
      sql: `INSERT OR IGNORE INTO workload_labels (accepted_seq, name, value)
        SELECT value->>0, value->>1, value->>2 FROM json_each(?)`,
      args: [JSON.stringify(begun)],
    },
  ]
}
