/**
 * Logs as server-sent events: replay from the database, then live as batches are committed. Nothing is read before
 * the client has taken what was read before, so a slow client costs one chunk of memory however far it is behind.
 */
import { hasEnded, type WorkloadRecord } from '../shared/lifecycle.ts'
import { type LogEnd, type LogEntry, type LogPlace, logId } from '../shared/reads.ts'
import type { WorkloadId } from '../shared/workload.ts'
import { findRow } from './find.ts'
import type { Live } from './live.ts'
import { entriesAfter, settleLogs } from './logreads.ts'

/** Milliseconds between two comments on a quiet stream, so that no proxy takes it for dead. */
export const commentMs = 15_000

export interface LogStreamOptions {
  /** Behind this place. */
  from: LogPlace
  logsKeptMs: number
  /** Ends the stream without an `end` event: the client comes back with what it saw last. */
  stop: AbortSignal
}

export function logStream(live: Live, id: WorkloadId, options: LogStreamOptions): ReadableStream<Uint8Array> {
  const gone = new AbortController()
  const signal = AbortSignal.any([options.stop, gone.signal])
  const chunks = sseChunks(live, id, options, signal)
  const encoder = new TextEncoder()
  return new ReadableStream(
    {
      async pull(controller) {
        const chunk = await chunks.next()
        if (chunk.done) controller.close()
        else controller.enqueue(encoder.encode(chunk.value))
      },
      async cancel() {
        gone.abort()
        await chunks.return()
      },
    },
    { highWaterMark: 0 },
  )
}

async function* sseChunks(
  live: Live,
  id: WorkloadId,
  { from, logsKeptMs }: LogStreamOptions,
  signal: AbortSignal,
): AsyncGenerator<string, void, void> {
  let changed = false
  let wake = () => {}
  const unwatch = live.changes.watch(id, () => {
    changed = true
    wake()
  })
  /** True when woken, false after `ms`. */
  const woken = async (ms: number): Promise<boolean> => {
    if (changed || signal.aborted) return true
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, ms)
      wake = () => {
        clearTimeout(timer)
        resolve()
      }
      signal.addEventListener('abort', wake)
    })
    signal.removeEventListener('abort', wake)
    return changed || signal.aborted
  }
  try {
    yield 'retry: 1000\n\n'
    let place = from
    for (;;) {
      changed = false
      for (;;) {
        const next = await entriesAfter(live, id, place)
        if (signal.aborted) return
        if (!next.more) break
        place = next.place
        if (next.entries.length > 0) yield next.entries.map(toEvent).join('')
      }
      const row = await findRow(live, id)
      // Gone by retention while it was read.
      if (row === undefined) return
      if (hasEnded(row.status)) {
        const record: WorkloadRecord = JSON.parse(row.record)
        const gap = await settleLogs(live, record, logsKeptMs, signal)
        if (signal.aborted) return
        if ((await entriesAfter(live, id, place)).more) continue
        const end: LogEnd = { status: record.status, cause: record.cause }
        const last = gap === undefined || gap.id === logId(from) ? '' : toEvent(gap)
        yield `${last}event: end\ndata: ${JSON.stringify(end)}\n\n`
        return
      }
      while (!(await woken(commentMs))) yield ':\n\n'
      if (signal.aborted) return
    }
  } finally {
    unwatch()
  }
}

function toEvent(entry: LogEntry): string {
  const { id, ...rest } = entry
  return 'gap' in rest
    ? `id: ${id}\nevent: gap\ndata: ${JSON.stringify(rest.gap)}\n\n`
    : `id: ${id}\nevent: log\ndata: ${JSON.stringify(rest)}\n\n`
}
