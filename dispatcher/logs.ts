/**
 * The log stream as rows: one per batch, within the workload’s limit over all its attempts. What is missing or cut
 * is written down where it happens, so that a reader needs nothing but the rows.
 */
import type { InStatement, InValue } from '@libsql/client'
import { and, lt, max, sql, sum } from 'drizzle-orm'
import { type LogEvent, readEvent } from '../shared/events.ts'
import type { StoredMessage } from '../shared/follow.ts'
import type { Logger } from '../shared/process.ts'
import { workloadOf } from '../shared/subjects.ts'
import { LOGS } from '../shared/topology.ts'
import type { LogLine } from '../shared/workload.ts'
import type { Database } from './database.ts'
import { parseJson, rarely } from './messages.ts'
import type { DispatcherMetrics } from './metrics.ts'
import type { Plan, Projection } from './project.ts'
import { logBatches } from './schema.ts'

/** Workloads whose tallies are kept at hand. */
const recentWorkloads = 10_000
const rowsPerStatement = 50

export interface LogLimits {
  lines: number
  bytes: number
}

/** What has been kept of a workload’s lines, and how far each of its attempts has come. */
export interface Tally {
  lines: number
  bytes: number
  attempts: Map<number, { n: number; dropped: number }>
}

type Row = typeof logBatches.$inferSelect

/** Bytes a line counts for, the same as in the runner’s own limit. */
const sizeOf = (line: LogLine): number => line.text.length + 64

/**
 * The row of a batch, the tally after it, and how many lines are beyond the workload’s limit; undefined for a batch
 * that was delivered before. Pure.
 * A batch number that comes late, behind a higher one, counts as delivered before: readers have passed its place.
 */
export function tallyBatch(
  tally: Tally,
  event: LogEvent,
  message: Pick<StoredMessage, 'seq' | 'at'>,
  limits: LogLimits,
): { row: Row; tally: Tally; cut: number } | undefined {
  const { attempt, n, lines, dropped } = event.data
  const before = tally.attempts.get(attempt) ?? { n: 0, dropped: 0 }
  if (n <= before.n) return undefined
  let { lines: lineTotal, bytes: byteTotal } = tally
  let kept = lines
  for (const [i, line] of lines.entries()) {
    const size = sizeOf(line)
    const fits = lineTotal < limits.lines && byteTotal + size <= limits.bytes
    if (fits) {
      lineTotal++
      byteTotal += size
      if (kept !== lines) kept.push(line)
    } else if (kept === lines) kept = lines.slice(0, i)
  }
  const cut = lines.length - kept.length
  return {
    cut,
    row: {
      seq: message.seq,
      workload: event.subject,
      attempt,
      n,
      missing: n - before.n - 1,
      lineCount: kept.length,
      bytes: byteTotal - tally.bytes,
      dropped: cut + Math.max(0, dropped - before.dropped),
      droppedByRunner: dropped,
      at: message.at,
      lines: JSON.stringify(kept),
    },
    tally: {
      lines: lineTotal,
      bytes: byteTotal,
      attempts: new Map(tally.attempts).set(attempt, { n, dropped: Math.max(dropped, before.dropped) }),
    },
  }
}

const empty: Tally = { lines: 0, bytes: 0, attempts: new Map() }

/** @param metrics counts the lines that are new */
export function logProjection(
  limits: LogLimits,
  log: Logger,
  metrics: Pick<DispatcherMetrics, 'logged'>,
): Projection {
  const recent = new Map<string, Tally>()
  const sayInvalid = rarely((message: StoredMessage) =>
    log.warn(
      { seq: message.seq, subject: message.subject },
      'skipped a message that is not a valid log batch',
    ),
  )
  return {
    stream: LOGS,
    lingerMs: 10,
    counter: 'logs',
    clear: ['DELETE FROM log_batches'],
    forget: () => recent.clear(),
    async plan(database, messages): Promise<Plan> {
      const counted = new Map<string, number[]>()
      const valid: { event: LogEvent; message: StoredMessage }[] = []
      const invalid: number[] = []
      for (const message of messages) {
        const event = readEvent('log', parseJson(message.data))
        if (event !== undefined && event.subject === workloadOf(message.subject))
          valid.push({ event, message })
        else {
          sayInvalid(message)
          invalid.push(message.seq)
        }
      }
      if (invalid.length > 0) counted.set('invalid', invalid)

      const unknown = new Set(valid.map(({ event }) => event.subject).filter((id) => !recent.has(id)))
      const stored = await readTallies(database, unknown, messages[0]!.seq)
      const tallies = new Map<string, Tally>()
      const rows: Row[] = []
      const cuts: number[] = []
      for (const { event, message } of valid) {
        const id = event.subject
        const before = tallies.get(id) ?? recent.get(id) ?? stored.get(id) ?? empty
        const after = tallyBatch(before, event, message, limits)
        if (after === undefined) continue
        tallies.set(id, after.tally)
        rows.push(after.row)
        cuts.push(after.cut)
      }
      return {
        statements: insert(rows),
        touched: tallies.keys(),
        counted,
        committed() {
          for (const [id, tally] of tallies) {
            recent.delete(id)
            recent.set(id, tally)
          }
          for (const oldest of recent.keys()) {
            if (recent.size <= recentWorkloads) break
            recent.delete(oldest)
          }
        },
        tell({ toldTo }) {
          for (const [i, row] of rows.entries()) {
            if (row.seq <= toldTo) continue
            const cut = cuts[i]!
            metrics.logged(row.lineCount, row.dropped - cut, cut, row.missing)
          }
        },
      }
    },
  }
}

/** Of what lies before `seq` alone: another dispatcher may be further. */
async function readTallies({ orm }: Database, ids: Set<string>, seq: number): Promise<Map<string, Tally>> {
  if (ids.size === 0) return new Map()
  const rows = await orm
    .select({
      workload: logBatches.workload,
      attempt: logBatches.attempt,
      n: max(logBatches.n),
      dropped: max(logBatches.droppedByRunner),
      lines: sum(logBatches.lineCount).mapWith(Number),
      bytes: sum(logBatches.bytes).mapWith(Number),
    })
    .from(logBatches)
    .where(
      and(
        sql`${logBatches.workload} IN (SELECT value FROM json_each(${JSON.stringify([...ids])}))`,
        lt(logBatches.seq, seq),
      ),
    )
    .groupBy(logBatches.workload, logBatches.attempt)
  const tallies = new Map<string, Tally>()
  for (const row of rows) {
    const tally = tallies.get(row.workload) ?? { lines: 0, bytes: 0, attempts: new Map() }
    tally.lines += row.lines
    tally.bytes += row.bytes
    tally.attempts.set(row.attempt, { n: row.n ?? 0, dropped: row.dropped ?? 0 })
    tallies.set(row.workload, tally)
  }
  return tallies
}

const names =
  'seq, workload, attempt, n, missing, line_count, bytes, dropped, dropped_by_runner, at, lines' as const
const holder = `(${names.replace(/\w+/g, '?')})`

function insert(rows: Row[]): InStatement[] {
  const statements: InStatement[] = []
  for (let i = 0; i < rows.length; i += rowsPerStatement) {
    const some = rows.slice(i, i + rowsPerStatement)
    const args: InValue[] = []
    for (const r of some)
      args.push(
        r.seq,
        r.workload,
        r.attempt,
        r.n,
        r.missing,
        r.lineCount,
        r.bytes,
        r.dropped,
        r.droppedByRunner,
        r.at,
        r.lines,
      )
    const values = some.map(() => holder).join(', ')
    statements.push({ sql: `INSERT OR IGNORE INTO log_batches (${names}) VALUES ${values}`, args })
  }
  return statements
}
