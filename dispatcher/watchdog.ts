/**
 * Looks after the work consumers: one that has messages and open pulls but delivers nothing has stalled
 * (https://github.com/nats-io/nats-server/issues/7680), and is made anew.
 */
import type { Heartbeat } from '../shared/backends.ts'
import { lostAfterMs } from '../shared/backends.ts'
import type { Bus } from '../shared/bus.ts'
import type { Logger } from '../shared/process.ts'
import { recreateConsumer, type TopologyOptions, WORK, workConsumer } from '../shared/topology.ts'
import { Isolation } from '../shared/workload.ts'

const lookMs = 5_000
/** Milliseconds without a delivery after which a consumer that should deliver has stalled. */
const stalledMs = 30_000

/** What one look at a consumer shows. */
export interface Look {
  pending: number
  waiting: number
  /** Consumer sequence of the last delivery. */
  delivered: number
  /** A runner of its isolation lives and has free slots. */
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
  runners: ReadonlyMap<string, { heartbeat: Heartbeat; at: number }>
  log: Logger
}

export function startWatchdog({ bus, topology, runners, log }: WatchdogOptions): Disposable {
  const seen = new Map<Isolation, { look: Look; since: number | undefined }>()

  async function look(isolation: Isolation): Promise<void> {
    const now = Date.now()
    const wanted = [...runners.values()].some(
      ({ heartbeat, at }) =>
        heartbeat.isolation === isolation && now - at < lostAfterMs && heartbeat.active < heartbeat.slots,
    )
    if (!wanted) return void seen.delete(isolation)
    const info = await bus.jsm.consumers.info(WORK, workConsumer(isolation))
    const { num_pending: pending, num_waiting: waiting, delivered } = info
    const current = { pending, waiting, delivered: delivered.consumer_seq, wanted }
    const since = stuckSince(seen.get(isolation), current, now)
    seen.set(isolation, { look: current, since })
    if (since === undefined || now - since < stalledMs) return
    log.error({ consumer: isolation, ...current }, 'a work consumer has stalled and is made anew')
    seen.delete(isolation)
    await recreateConsumer(bus.jsm, topology, isolation)
  }

  let looking = false
  const timer = setInterval(async () => {
    if (looking || !bus.connected) return
    looking = true
    try {
      for (const isolation of Isolation.options) await look(isolation)
    } catch (error) {
      log.debug({ err: error }, 'the work consumers could not be looked at')
    } finally {
      looking = false
    }
  }, lookMs)
  return { [Symbol.dispose]: () => clearInterval(timer) }
}
