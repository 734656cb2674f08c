/**
 * Looks after the work consumers, those of lanes among them: one that has messages and open pulls but delivers
 * nothing has stalled (https://github.com/nats-io/nats-server/issues/7680), and is made anew.
 */
import type { Heartbeat } from '../shared/backends.ts'
import { lostAfterMs } from '../shared/backends.ts'
import type { Bus } from '../shared/bus.ts'
import type { Lane } from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import {
  laneConsumer,
  recreateConsumer,
  type TopologyOptions,
  type WorkQueueInfo,
  workConsumer,
  workQueues,
} from '../shared/topology.ts'
import { Isolation } from '../shared/workload.ts'
import type { DispatcherMetrics } from './metrics.ts'

const lookMs = 5_000
/** Milliseconds without a delivery after which a consumer that should deliver has stalled. */
const stalledMs = 30_000

/** What one look at a consumer shows. */
export interface Look {
  pending: number
  waiting: number
  /** Consumer sequence of the last delivery. */
  delivered: number
  /** A runner of its isolation lives and has free slots, and as much may be out. */
  wanted: boolean
}

/** Since when a consumer has not done what it should; undefined: it has. Pure. */
export function stuckSince(
  before: { look: Look; since: number | undefined } | undefined,
  look: Look,
  now: number,
): number | undefined {
  const should = look.pending > 0 && look.waiting > 0 && look.wanted
  if (!should || before === undefined || before.look.delivered !== look.delivered) return undefined
  return before.since ?? now
}

export interface WatchdogOptions {
  bus: Bus
  topology: TopologyOptions
  lanes: () => Lane[]
  runners: ReadonlyMap<string, { heartbeat: Heartbeat; at: number }>
  metrics: DispatcherMetrics
  log: Logger
}

export function startWatchdog({ bus, topology, lanes, runners, metrics, log }: WatchdogOptions): Disposable {
  const seen = new Map<string, { look: Look; since: number | undefined }>()

  async function look(queue: Isolation | Lane, info: WorkQueueInfo, wanted: boolean): Promise<void> {
    const now = Date.now()
    const { name, pending, waiting, delivered } = info
    const current = { pending, waiting, delivered, wanted: wanted && info.out < info.maxOut }
    const since = stuckSince(seen.get(name), current, now)
    seen.set(name, { look: current, since })
    if (since === undefined || now - since < stalledMs) return
    log.error({ consumer: name, ...current }, 'a work consumer has stalled and is made anew')
    seen.delete(name)
    await recreateConsumer(bus.jsm, topology, queue)
    metrics.stalled(typeof queue === 'string' ? queue : queue.isolation)
  }

  async function lookAtAll(): Promise<void> {
    const now = Date.now()
    const wanted = new Set(
      [...runners.values()]
        .filter(({ heartbeat, at }) => now - at < lostAfterMs && heartbeat.active < heartbeat.slots)
        .map(({ heartbeat }) => heartbeat.isolation),
    )
    const infos = await workQueues(bus.jsm)
    for (const name of seen.keys()) if (!infos.has(name)) seen.delete(name)
    for (const queue of [...Isolation.options, ...lanes()]) {
      const isolation = typeof queue === 'string' ? queue : queue.isolation
      const info = infos.get(typeof queue === 'string' ? workConsumer(queue) : laneConsumer(queue))
      if (info !== undefined) await look(queue, info, wanted.has(isolation))
    }
  }

  let looking = false
  const timer = setInterval(async () => {
    if (looking || !bus.connected) return
    looking = true
    try {
      await lookAtAll()
    } catch (error) {
      log.debug({ err: error }, 'the work consumers could not be looked at')
    } finally {
      looking = false
    }
  }, lookMs)
  return { [Symbol.dispose]: () => clearInterval(timer) }
}
