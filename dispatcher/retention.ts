/** Removes what is older than it is kept for: ended workloads, log lines, and blobs that nothing refers to. */
import { setTimeout as delay } from 'node:timers/promises'
import { and, asc, eq, inArray, isNotNull, lt, or } from 'drizzle-orm'
import type { Bus } from '../shared/bus.ts'
import type { FunctionVersion } from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import type { Registry } from '../shared/registry.ts'
import { EVENTS } from '../shared/topology.ts'
import type { Digest } from '../shared/workload.ts'
import type { Database } from './database.ts'
import type { Live } from './live.ts'
import type { DispatcherMetrics } from './metrics.ts'
import { logBatches, workloadLabels, workloads } from './schema.ts'

/** Rows removed in one transaction, so that the fold and the readers come between. */
const rowsAtOnce = 500
/** Milliseconds the sweep of blobs waits for the fold to reach the stream’s end. */
const foldMs = 60_000

export interface RetentionOptions {
  bus: Bus
  live: Live
  registry: Pick<Registry, 'versions'>
  metrics: DispatcherMetrics
  log: Logger
  keepWorkloadsMs: number
  keepLogsMs: number
  blobGraceMs: number
  everyMs: number
}

/** Ended workloads older than `before`, with their labels and logs. Returns how many. */
export async function removeWorkloads({ orm }: Database, before: Date): Promise<number> {
  let removed = 0
  for (;;) {
    const old = await orm
      .select({ seq: workloads.acceptedSeq, id: workloads.id })
      .from(workloads)
      .where(and(isNotNull(workloads.endedAt), lt(workloads.endedAt, before.toISOString())))
      .orderBy(asc(workloads.endedAt))
      .limit(rowsAtOnce)
    if (old.length === 0) return removed
    const seqs = old.map(({ seq }) => seq)
    const ids = old.map(({ id }) => id)
    await orm.batch([
      orm.delete(logBatches).where(inArray(logBatches.workload, ids)),
      orm.delete(workloadLabels).where(inArray(workloadLabels.acceptedSeq, seqs)),
      orm.delete(workloads).where(inArray(workloads.acceptedSeq, seqs)),
    ])
    removed += old.length
    await delay(1)
  }
}

/** Log batches stored before `before` (ms since the epoch). They lie in the order of their age. Returns how many. */
export async function removeLogs({ orm }: Database, before: number): Promise<number> {
  let removed = 0
  for (;;) {
    const oldest = await orm
      .select({ seq: logBatches.seq, at: logBatches.at })
      .from(logBatches)
      .orderBy(asc(logBatches.seq))
      .limit(rowsAtOnce)
    const old = oldest.filter(({ at }) => at < before).map(({ seq }) => seq)
    if (old.length > 0) await orm.delete(logBatches).where(inArray(logBatches.seq, old))
    removed += old.length
    if (old.length < rowsAtOnce) return removed
    await delay(1)
  }
}

/** Those of `digests` that a row refers to. */
export async function referenced({ orm }: Database, digests: Digest[]): Promise<Set<string>> {
  const found = new Set<string>()
  for (const digest of digests) {
    const [row] = await orm
      .select({ seq: workloads.acceptedSeq })
      .from(workloads)
      .where(
        or(
          eq(workloads.payloadBlob, digest),
          eq(workloads.outputBlob, digest),
          eq(workloads.requestBlob, digest),
          eq(workloads.responseBlob, digest),
          eq(workloads.sourceBlob, digest),
        ),
      )
      .limit(1)
    if (row !== undefined) found.add(digest)
  }
  return found
}

/** The blobs of deployed versions, those of deleted functions among them: their history is kept. */
export function deployed(versions: FunctionVersion[]): Set<Digest> {
  const kept = new Set<Digest>()
  for (const { bundle, source, spec } of versions) {
    const { archive, image } = spec
    for (const digest of [bundle?.blob, bundle?.map, source?.blob, archive?.blob])
      if (digest != null) kept.add(digest)
    if (typeof image === 'object') kept.add(image.blob)
  }
  return kept
}

/**
 * Removes blobs that are out of their grace and that no deployed version and no row refers to, now nor in the sweep before: `suspects`
 * holds what was unreferenced then and is given the new ones. Blobs are listed first and the stream is folded to
 * its end after that: whoever refers to a listed blob later has put it again, which renews it.
 */
export async function sweepBlobs(
  { bus, live, registry, blobGraceMs }: Pick<RetentionOptions, 'bus' | 'live' | 'registry' | 'blobGraceMs'>,
  suspects: Set<Digest>,
): Promise<number> {
  const { blobs } = live
  if (blobs === undefined || !bus.connected) return 0
  const before = Date.now() - blobGraceMs
  const listed = (await blobs.list()).filter(({ at }) => at < before).map(({ digest }) => digest)
  const functions = deployed(registry.versions())
  const old = listed.filter((digest) => !functions.has(digest))
  if (old.length === 0) {
    suspects.clear()
    return 0
  }
  const { state } = await bus.jsm.streams.info(EVENTS)
  if (state.messages > 0 && !(await live.events.reached(state.last_seq, foldMs))) return 0
  const kept = await live.read((database) => referenced(database, old))
  const free = old.filter((digest) => !kept.has(digest))
  const removed = new Set<Digest>()
  for (const digest of free)
    if (suspects.has(digest) && (await blobs.removeStale(digest, before))) removed.add(digest)
  suspects.clear()
  for (const digest of free) if (!removed.has(digest)) suspects.add(digest)
  return removed.size
}

export function startRetention(options: RetentionOptions): AsyncDisposable {
  const { live, metrics, log, keepWorkloadsMs, keepLogsMs, everyMs } = options
  const stop = new AbortController()
  const suspects = new Set<Digest>()

  async function round(): Promise<void> {
    const now = Date.now()
    const logs = await live.read((database) => removeLogs(database, now - keepLogsMs))
    const rows = await live.read((database) => removeWorkloads(database, new Date(now - keepWorkloadsMs)))
    const blobs = await sweepBlobs(options, suspects)
    metrics.removed('workloads', rows)
    metrics.removed('log_batches', logs)
    metrics.removed('blobs', blobs)
    if (logs + rows + blobs > 0)
      log.info({ workloads: rows, logBatches: logs, blobs }, 'removed what was too old')
  }

  const running = (async () => {
    while (!stop.signal.aborted) {
      await delay(everyMs, undefined, { signal: stop.signal }).catch(() => {})
      if (stop.signal.aborted) return
      // During a rebuild the rows that refer to a blob are still on their way.
      if (!live.events.caughtUp || live.databaseTrouble !== undefined) continue
      await round().catch((error) =>
        log.warn({ err: error }, 'removing what is too old failed; the next round tries again'),
      )
    }
  })()
  return {
    async [Symbol.asyncDispose]() {
      stop.abort()
      await running
    },
  }
}
