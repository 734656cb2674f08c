/**
 * Ends what nobody else can: workloads that run on a runner which is gone. What it decides goes through the
 * referee like everything else, so being wrong or second changes nothing that somebody has recorded before.
 */
import { eq, sql } from 'drizzle-orm'
import { Heartbeat, lostAfterMs } from '../shared/backends.ts'
import type { Bus } from '../shared/bus.ts'
import { BusUnavailable, StreamFull } from '../shared/errors.ts'
import { makeEvent, type Origin } from '../shared/events.ts'
import { mayRetry, retryDelay, type WorkloadRecord } from '../shared/lifecycle.ts'
import type { Logger } from '../shared/process.ts'
import { allRunners, eventSubject } from '../shared/subjects.ts'
import { traceFields } from '../shared/trace.ts'
import type { Tracing } from '../shared/tracing.ts'
import { toRecord } from './fold.ts'
import type { Live } from './live.ts'
import type { DispatcherMetrics } from './metrics.ts'
import { workloads } from './schema.ts'

export const sweepMs = 3_000
/** Workloads ended in one sweep, and published at once. */
const atMost = 500
const atOnce = 50
/** Milliseconds after which an unknown outcome is left to the next sweep. */
const settleMs = 5_000

/** Since when (ms since the epoch) each runner that has running workloads was silent, as far as can be known here. */
export interface Silence {
  /** Last heartbeat of each runner, or when it was first missed. */
  heardAt: ReadonlyMap<string, number>
  /** Since when heartbeats would have been heard without a break. */
  listeningSince: number
}

/** The runners that are taken for lost. Pure. */
export function lostRunners(
  runners: Iterable<string>,
  silence: Silence,
  now: number,
  afterMs = lostAfterMs,
): string[] {
  return [...runners].filter((runner) => {
    const heard = silence.heardAt.get(runner)
    return heard !== undefined && now - Math.max(heard, silence.listeningSince) > afterMs
  })
}

/** The event that says so of one of its workloads: the next attempt where one is left, else the end. Pure. */
export function runnerLostEvent(record: WorkloadRecord, origin: Origin, now: number, random?: () => number) {
  const runner = record.runner ?? 'unknown'
  const lost = {
    attempt: record.attempts,
    runner,
    cause: 'runner_lost' as const,
    error: { message: `runner ${runner} was lost while it ran`, stack: null },
  }
  const time = new Date(now).toISOString()
  if (mayRetry(record.spec.retry, 'runner_lost', record.attempts)) {
    const not_before = new Date(now + retryDelay(record.spec.retry, record.attempts, random)).toISOString()
    return makeEvent('retrying', record.id, record.attempts, { ...lost, not_before }, origin, time)
  }
  const end = {
    ...lost,
    started_at: record.started_at,
    duration_ms: null,
    output: null,
    output_blob: null,
    exit_code: null,
    logs: null,
    receipt: null,
  }
  return makeEvent('failed', record.id, record.attempts, end, origin, time)
}

export interface Sweeper extends Disposable {
  /** Runners heard of, with their last heartbeat. */
  readonly runners: ReadonlyMap<string, { heartbeat: Heartbeat; at: number }>
}

export interface SweeperOptions {
  bus: Bus
  live: Live
  origin: Origin
  tracing: Tracing
  metrics: DispatcherMetrics
  log: Logger
  lostAfterMs?: number | undefined
  sweepMs?: number | undefined
}

export function startSweeper(options: SweeperOptions): Sweeper {
  const { bus, live, origin, tracing, metrics, log } = options
  const every = options.sweepMs ?? sweepMs
  const runners = new Map<string, { heartbeat: Heartbeat; at: number }>()
  const missedSince = new Map<string, number>()
  let listeningSince = Date.now()
  let lastTick = Date.now()
  let sweeping = false

  const subscription = bus.listen(allRunners, (message) => {
    const parsed = Heartbeat.safeParse(parse(message.string()))
    if (parsed.success) runners.set(parsed.data.runner, { heartbeat: parsed.data, at: Date.now() })
  })
  const unwatch = bus.onConnection((connected) => {
    if (connected) listeningSince = Date.now()
  })

  async function sweep(): Promise<void> {
    const now = Date.now()
    // This process stood still: heartbeats may be waiting unread.
    if (now - lastTick > 3 * every) listeningSince = now
    lastTick = now
    if (!bus.connected || live.database === undefined || live.databaseTrouble !== undefined) return
    const busy = await live.read(({ orm }) =>
      orm.selectDistinct({ runner: workloads.runner }).from(workloads).where(eq(workloads.status, 'running')),
    )
    const names = new Set(busy.map(({ runner }) => runner).filter((name) => name !== null))
    for (const name of missedSince.keys()) if (!names.has(name)) missedSince.delete(name)
    const heardAt = new Map<string, number>()
    for (const name of names) {
      const heard = runners.get(name)?.at
      if (heard === undefined && !missedSince.has(name)) missedSince.set(name, now)
      heardAt.set(name, heard ?? missedSince.get(name)!)
    }
    const lost = lostRunners(names, { heardAt, listeningSince }, now, options.lostAfterMs)
    for (const [name, { at }] of runners) if (!names.has(name) && now - at > 10 * 60_000) runners.delete(name)
    if (lost.length > 0) await end(lost)
  }

  async function end(lost: string[]): Promise<void> {
    const rows = await live.read(({ orm }) =>
      orm
        .select({
          record: workloads.record,
          output: workloads.output,
          response: workloads.response,
          spec: workloads.spec,
        })
        .from(workloads)
        .where(
          sql`${workloads.status} = 'running' AND ${workloads.runner} IN (SELECT value FROM json_each(${JSON.stringify(lost)}))`,
        )
        .limit(atMost),
    )
    let ended = 0
    let moved = 0
    for (let i = 0; i < rows.length; i += atOnce) {
      const publishing = rows.slice(i, i + atOnce).map(async (row) => {
        const { stored, seq } = await endOne(toRecord(row))
        if (stored) ended++
        moved = Math.max(moved, seq)
      })
      await Promise.all(publishing)
    }
    // Else the next sweep finds the same again.
    await live.events.reached(moved, settleMs)
    if (ended > 0)
      log.warn({ runners: lost, workloads: ended }, 'runners are lost; ended what they had or put it back')
  }

  /** Whether what was decided is what stands, and the sequence of what does. */
  async function endOne(record: WorkloadRecord): Promise<{ stored: boolean; seq: number }> {
    const { id, isolation } = record
    // Both are gone from the stream where it keeps less than the database does.
    const [accepted, started] = await Promise.all([
      bus.acceptedEvent(id),
      tracing.on ? bus.startedEvent(id) : undefined,
    ])
    const parent = accepted?.event.traceparent
    const event = runnerLostEvent(record, { ...origin, traceparent: parent }, Date.now())
    const kind = event.type === 'vulcan.workload.failed' ? 'failed' : 'retrying'
    const span =
      parent === undefined || !tracing.on
        ? undefined
        : tracing.begin(`publish ${kind}`, {
            kind: 'producer',
            parent,
            // Of the attempt that was lost: what its runner kept of the trace went with it.
            links: [started?.event.traceparent],
            attributes: publishing(record, kind, event.id),
          })
    if (span !== undefined) event.traceparent = span.traceparent
    try {
      const settled = await bus.settleEvent(
        eventSubject(id, kind),
        event,
        record.last_seq,
        AbortSignal.timeout(settleMs),
        0,
      )
      if (!settled.stored) {
        span?.set({ 'vulcan.refused': true })
        return { stored: false, seq: settled.last?.seq ?? 0 }
      }
      if (event.type === 'vulcan.workload.retrying')
        span?.event('retry', { 'vulcan.not_before': event.data.not_before })
      span?.fail('runner_lost', event.data.error?.message)
      metrics.swept(isolation, kind)
      log.debug({ workload: id, ...traceFields(event.traceparent), kind }, 'ended what a lost runner had')
      return { stored: true, seq: settled.seq }
    } catch (error) {
      span?.fail((error as Error).name, (error as Error).message)
      throw error
    } finally {
      span?.end()
    }
  }

  const timer = setInterval(() => {
    if (sweeping) return
    sweeping = true
    sweep()
      .catch((error) => {
        // The next sweep finds the same again.
        if (!(error instanceof BusUnavailable || error instanceof StreamFull))
          log.warn({ err: error }, 'a sweep failed')
      })
      .finally(() => {
        sweeping = false
      })
  }, every)

  return {
    runners,
    [Symbol.dispose]() {
      clearInterval(timer)
      unwatch()
      subscription.unsubscribe()
    },
  }
}

const publishing = (record: WorkloadRecord, kind: 'failed' | 'retrying', id: string) => ({
  'messaging.system': 'nats',
  'messaging.operation.name': 'publish',
  'messaging.operation.type': 'send',
  'messaging.destination.name': 'vulcan.events',
  'messaging.destination.template': `vulcan.events.{workload}.${kind}`,
  'messaging.message.id': id,
  'vulcan.workload.id': record.id,
  'vulcan.isolation': record.isolation,
  'vulcan.attempt': record.attempts,
  'vulcan.status': kind,
  'vulcan.cause': 'runner_lost',
  'vulcan.runner': record.runner ?? undefined,
  'vulcan.function': record.function?.name,
  'vulcan.version': record.function?.version,
})

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
