/** The event stream as rows: one per workload, moved by the lifecycle’s fold and by nothing else. */
import type { InStatement, InValue } from '@libsql/client'
import { getTableColumns, sql } from 'drizzle-orm'
import { eventSchemas, type LifecycleEvent } from '../shared/events.ts'
import type { StoredMessage } from '../shared/follow.ts'
import { bodyBlob, fold, hasEnded, type WorkloadRecord } from '../shared/lifecycle.ts'
import type { Logger } from '../shared/process.ts'
import { EVENTS } from '../shared/topology.ts'
import type { Digest } from '../shared/workload.ts'
import { type Database, Unfoldable } from './database.ts'
import { parseJson, rarely } from './messages.ts'
import type { Plan, Projection } from './project.ts'
import { workloads } from './schema.ts'

/** Bytes of accepted events whose records are kept at hand, so that the next event needs no SELECT. */
const recentBytes = 48 * 1_048_576
/** Rows per INSERT: more make longer statements and are no faster. */
const rowsPerStatement = 50

type Row = typeof workloads.$inferSelect
export type StoredRecord = Pick<Row, 'record' | 'output' | 'response' | 'spec'>

/** A record with its spec as JSON, which never changes after `accepted` and is written as it was. */
interface Known {
  record: WorkloadRecord
  spec: string
}

export const toRecord = (row: StoredRecord): WorkloadRecord => ({
  ...JSON.parse(row.record),
  output: row.output === null ? null : JSON.parse(row.output),
  response: row.response === null ? null : JSON.parse(row.response),
  spec: JSON.parse(row.spec),
})

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

/** Writes the rows, except where the database already knows more of the workload. */
export function upsert(known: Iterable<Known>): InStatement[] {
  const statements: InStatement[] = []
  let args: InValue[] = []
  const flush = () => {
    const rows = args.length / names.length
    if (rows > 0)
      statements.push({ sql: upsertHead + Array(rows).fill(rowHolder).join(', ') + upsertTail, args })
    args = []
  }
  for (const one of known) {
    const row = toRow(one)
    for (const [key] of columns) args.push(row[key])
    if (args.length >= rowsPerStatement * names.length) flush()
  }
  flush()
  return statements
}

type Parsed = { event: LifecycleEvent } | { late: string } | undefined

/** The event in a message; undefined where it is none, or not the one its subject says. */
export function parseEvent(message: StoredMessage): Parsed {
  const [, family, workload, kind] = message.subject.split('.')
  const raw = parseJson(message.data)
  if (family === 'late') {
    const parsed = eventSchemas.late.safeParse(raw)
    return parsed.success && parsed.data.subject === workload ? { late: parsed.data.data.status } : undefined
  }
  if (kind === undefined || kind === 'late' || kind === 'log' || !Object.hasOwn(eventSchemas, kind))
    return undefined
  const parsed = eventSchemas[kind as keyof typeof eventSchemas].safeParse(raw)
  return parsed.success && parsed.data.subject === workload
    ? { event: parsed.data as LifecycleEvent }
    : undefined
}

export function eventProjection(log: Logger): Projection {
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
    // What has ended is hardly ever asked for again.
    if (hasEnded(known.record.status)) return
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
    log.warn({ workload: event.subject, event: event.id, source: event.source, reason }, 'refused an event'),
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
      const parsed = messages.map(parseEvent)
      const unknown = new Set<string>()
      for (const one of parsed)
        if (one !== undefined && 'event' in one && !recent.has(one.event.subject))
          unknown.add(one.event.subject)
      const stored = await readKnown(database, unknown)

      const changed = new Map<string, Known>()
      const begun: WorkloadRecord[] = []
      const counted = new Map<string, number[]>()
      const count = (name: string, seq: number) => {
        const seqs = counted.get(name)
        if (seqs === undefined) counted.set(name, [seq])
        else seqs.push(seq)
      }
      for (const [i, one] of parsed.entries()) {
        const message = messages[i]!
        if (one === undefined) {
          sayInvalid(message)
          count('invalid', message.seq)
        } else if ('late' in one) count(`late.${one.late}`, message.seq)
        else {
          const { event } = one
          const known = changed.get(event.subject) ?? recent.get(event.subject) ?? stored.get(event.subject)
          const folded = foldable(() => fold(known?.record, event, message.seq))
          if ('illegal' in folded) {
            sayIllegal(event, folded.illegal)
            count(`illegal.${folded.illegal}`, message.seq)
          } else if ('record' in folded) {
            const { record } = folded
            changed.set(event.subject, { record, spec: known?.spec ?? JSON.stringify(record.spec) })
            if (known === undefined) begun.push(record)
          }
        }
      }
      return {
        statements: foldable(() => [...upsert(changed.values()), ...labels(begun)]),
        touched: changed.keys(),
        counted,
        committed() {
          for (const [id, known] of changed) remember(id, known)
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

function labels(begun: WorkloadRecord[]): InStatement[] {
  const rows = begun.flatMap(({ accepted_seq, labels }) =>
    Object.entries(labels).map(([name, value]) => [accepted_seq, name, value]),
  )
  if (rows.length === 0) return []
  return [
    {
      sql: `INSERT OR IGNORE INTO workload_labels (accepted_seq, name, value)
        SELECT value->>0, value->>1, value->>2 FROM json_each(?)`,
      args: [JSON.stringify(rows)],
    },
  ]
}
