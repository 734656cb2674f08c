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
import { toRecord } from './fold.ts'
import type { Live } from './live.ts'
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
  log: Logger
  lostAfterMs?: number | undefined
  sweepMs?: number | undefined
}

export function startSweeper(options: SweeperOptions): Sweeper {
  const { bus, live, origin, log } = options
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
    for (let i = 0; i < rows.length; i += atOnce) {
      const publishing = rows.slice(i, i + atOnce).map(async (row) => {
        const record = toRecord(row)
        const event = runnerLostEvent(record, origin, Date.now())
        const kind = event.type === 'vulcan.workload.failed' ? 'failed' : 'retrying'
        const subject = eventSubject(record.id, kind)
        const settled = await bus.settleEvent(
          subject,
          event,
          record.last_seq,
          AbortSignal.timeout(settleMs),
          0,
        )
        if (settled.stored) ended++
      })
      await Promise.all(publishing)
    }
    if (ended > 0)
      log.warn({ runners: lost, workloads: ended }, 'runners are lost; ended what they had or put it back')
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

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
