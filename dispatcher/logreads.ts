/** Reading a workload’s log lines back: the entries of its batches, and whether all of them are there. */
import { and, asc, eq, gte, max } from 'drizzle-orm'
import { BusUnavailable } from '../shared/errors.ts'
import { hasEnded, type WorkloadRecord } from '../shared/lifecycle.ts'
import { type LogEntry, type LogGap, type LogPage, type LogPlace, logId, logStart } from '../shared/reads.ts'
import { logSubject } from '../shared/subjects.ts'
import { LOGS } from '../shared/topology.ts'
import type { LogLine, WorkloadId } from '../shared/workload.ts'
import type { FoundRow } from './find.ts'
import type { Live } from './live.ts'
import { logBatches } from './schema.ts'

/** Milliseconds that batches may arrive behind the end that counted them. */
const stragglerMs = 2_000
/** An end older than this (ms), by its runner’s clock, has no stragglers to wait for. */
const settledMs = 60_000
/** Milliseconds to wait for the fold to reach what the log stream holds. */
const catchUpMs = 5_000
/** Batches read at once; one is usually below 200 kB and never above a message’s 1 MiB. */
export const batchesAtOnce = 4
/** Behind every line of its batch. */
const behindAll = 999_999_999

type Batch = Pick<
  typeof logBatches.$inferSelect,
  'seq' | 'attempt' | 'n' | 'missing' | 'lineCount' | 'dropped' | 'lines'
>

export interface Entries {
  entries: LogEntry[]
  /** Behind the last batch that was read. */
  place: LogPlace
  /** False when no batch was left to read. */
  more: boolean
}

/** What the next batches hold behind `place`. `more` with no entries is possible: such batches are empty. */
export async function entriesAfter(live: Live, id: WorkloadId, place: LogPlace): Promise<Entries> {
  const batches = await live.read(({ orm }) =>
    orm
      .select({
        seq: logBatches.seq,
        attempt: logBatches.attempt,
        n: logBatches.n,
        missing: logBatches.missing,
        lineCount: logBatches.lineCount,
        dropped: logBatches.dropped,
        lines: logBatches.lines,
      })
      .from(logBatches)
      .where(and(eq(logBatches.workload, id), gte(logBatches.seq, place.seq)))
      .orderBy(asc(logBatches.seq))
      .limit(batchesAtOnce),
  )
  const first = place.seq === 0 ? batches[0] : undefined
  // The batch that `place` is in may have been read to its end.
  const left = batches.filter(
    ({ seq, lineCount, dropped }) => seq > place.seq || place.line < lineCount + (dropped > 0 ? 1 : 0),
  )
  const last = left.at(-1)
  if (last === undefined) return { entries: [], place, more: false }
  return {
    entries: left.flatMap((batch) =>
      entriesOf(batch, batch === first).filter(
        (entry) => batch.seq > place.seq || Number(entry.id.split('-')[1]) > place.line,
      ),
    ),
    place: { seq: last.seq, line: last.lineCount + (last.dropped > 0 ? 1 : 0) },
    more: true,
  }
}

/** A batch’s lines between its gaps. The workload’s first kept batch also answers for those removed before it. */
export function entriesOf(batch: Batch, first: boolean): LogEntry[] {
  const { seq, attempt } = batch
  const entries: LogEntry[] = []
  const gap = (line: number, reason: LogGap['reason'], count: number, unit: LogGap['unit']) => {
    if (count > 0) entries.push({ id: logId({ seq, line }), gap: { reason, count, unit, attempt } })
  }
  const removed = first ? batch.n - 1 - batch.missing : 0
  if (removed > 0) gap(0, 'retention', batch.n - 1, 'batches')
  else gap(0, 'lost', batch.missing, 'batches')
  const lines = JSON.parse(batch.lines) as LogLine[]
  for (const [i, line] of lines.entries()) entries.push({ id: logId({ seq, line: i + 1 }), ...line, attempt })
  gap(lines.length + 1, 'dropped', batch.dropped, 'lines')
  return entries
}

/**
 * For a workload that has ended: waits until all its batches are here or given up. Returns the gap that is left at
 * the end, if any. An end that could not count its logs (a lost runner) has what the stream holds.
 */
export async function settleLogs(
  live: Live,
  record: WorkloadRecord,
  logsKeptMs: number,
  signal: AbortSignal,
): Promise<LogEntry | undefined> {
  const { id, attempts, last_log: expected } = record
  const arrived = async () => {
    const [row] = await live.read(({ orm }) =>
      orm
        .select({ n: max(logBatches.n), seq: max(logBatches.seq) })
        .from(logBatches)
        .where(and(eq(logBatches.workload, id), eq(logBatches.attempt, attempts))),
    )
    return { n: row?.n ?? 0, seq: row?.seq ?? 0 }
  }
  let have = await arrived()
  if (expected !== null && have.n >= expected) return undefined
  try {
    const last = (await live.connectedBus?.lastSequence(LOGS, logSubject(id))) ?? 0
    if (last > live.logs.seq) await live.logs.reached(last, catchUpMs)
  } catch (error) {
    if (!(error instanceof BusUnavailable)) throw error
  }
  have = await arrived()
  if (expected === null) return undefined
  const ended = Date.parse(record.ended_at!)
  const deadline = ended < Date.now() - settledMs ? 0 : Date.now() + stragglerMs
  while (have.n < expected && Date.now() < deadline && !signal.aborted) {
    await change(live, id, deadline - Date.now(), signal)
    have = await arrived()
  }
  if (have.n >= expected) return undefined
  const reason = have.n === 0 && ended < Date.now() - logsKeptMs ? 'retention' : 'lost'
  return {
    id: logId({ seq: have.seq, line: behindAll }),
    gap: { reason, count: expected - have.n, unit: 'batches', attempt: Math.max(1, attempts) },
  }
}

/** Until something of the workload is committed, at most `ms`; returns whether it was. */
export function change(live: Live, id: WorkloadId, ms: number, signal: AbortSignal): Promise<boolean> {
  return new Promise((resolve) => {
    const done = (changed: boolean) => {
      clearTimeout(timer)
      unwatch()
      signal.removeEventListener('abort', aborted)
      resolve(changed)
    }
    const aborted = () => done(false)
    const timer = setTimeout(() => done(false), ms)
    const unwatch = live.changes.watch(id, () => done(true))
    signal.addEventListener('abort', aborted)
    if (signal.aborted) done(false)
  })
}

/** At most `limit` entries behind `from`. */
export async function logPage(
  live: Live,
  id: WorkloadId,
  row: FoundRow,
  from: LogPlace | undefined,
  limit: number,
  logsKeptMs: number,
  signal: AbortSignal,
): Promise<LogPage> {
  const record: WorkloadRecord = JSON.parse(row.record)
  const ended = hasEnded(record.status)
  const gap = ended ? await settleLogs(live, record, logsKeptMs, signal) : undefined
  const lines: LogEntry[] = []
  let place = from ?? logStart
  for (;;) {
    const next = await entriesAfter(live, id, place)
    if (!next.more) break
    place = next.place
    lines.push(...next.entries)
    if (lines.length > limit) break
  }
  const whole = lines.length <= limit
  if (whole && gap !== undefined && (from === undefined || gap.id !== logId(from))) lines.push(gap)
  const page = lines.slice(0, limit)
  const complete = ended && lines.length <= limit
  const last = page.at(-1)?.id ?? (from === undefined ? null : logId(from))
  return { lines: page, next_cursor: complete ? null : last, complete }
}
