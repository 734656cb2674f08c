/**
 * Keeps the lanes as the functions want them. A deploy makes its lane before anything is queued there; what comes
 * later (another version goes live, a function is deleted, a setting of the platform changes, something died in
 * between) is brought about here.
 */
import type { Bus } from '../shared/bus.ts'
import { type Lane, lanesOf } from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import type { Registry } from '../shared/registry.ts'
import {
  ensureLane,
  isAsWanted,
  laneConsumer,
  removeLane,
  type TopologyOptions,
  type WorkQueueInfo,
  workQueues,
} from '../shared/topology.ts'

/** Milliseconds between two looks, and until one follows a change. */
const lookMs = 5_000
const soonMs = 200
/** Milliseconds that a lane stays when nobody wants it: a gateway may not know yet that its function is gone. */
const graceMs = 60_000

export type LaneAction = { act: 'ensure' | 'register' | 'remove'; lane: Lane }

export interface LanesSeen {
  wanted: Lane[]
  registered: Lane[]
  consumers: ReadonlyMap<string, WorkQueueInfo>
  /** Since when (ms since the epoch) registered lanes were wanted by nobody, by consumer. */
  unwantedSince: ReadonlyMap<string, number>
}

/** What there is to be done. Consumers come before their entry in the registry, and go before it. Pure. */
export function laneActions(
  topology: TopologyOptions,
  seen: LanesSeen,
  now: number,
  afterMs = graceMs,
): LaneAction[] {
  const registered = new Map(seen.registered.map((lane) => [laneConsumer(lane), lane]))
  const actions: LaneAction[] = []
  for (const lane of seen.wanted) {
    const name = laneConsumer(lane)
    if (!isAsWanted(topology, lane, seen.consumers.get(name))) actions.push({ act: 'ensure', lane })
    if (!same(lane, registered.get(name))) actions.push({ act: 'register', lane })
    registered.delete(name)
  }
  for (const [name, lane] of registered) {
    const since = seen.unwantedSince.get(name)
    if (since !== undefined && now - since >= afterMs) actions.push({ act: 'remove', lane })
    // Until then its work goes on, also where its consumer was lost.
    else if (!seen.consumers.has(name)) actions.push({ act: 'ensure', lane })
  }
  return actions
}

/** Key order is of no matter: both were parsed by one schema or made alike. */
const same = (one: Lane, other: Lane | undefined): boolean =>
  other !== undefined &&
  one.function === other.function &&
  one.concurrency === other.concurrency &&
  one.rate?.limit === other.rate?.limit &&
  one.rate?.per_s === other.rate?.per_s &&
  one.rate?.burst === other.rate?.burst

export interface LaneKeeperOptions {
  bus: Bus
  topology: TopologyOptions
  registry: Registry
  log: Logger
  /** For tests. */
  graceMs?: number | undefined
  lookMs?: number | undefined
}

export function startLaneKeeper(options: LaneKeeperOptions): Disposable {
  const { bus, topology, registry, log } = options
  const unwantedSince = new Map<string, number>()
  let soon: NodeJS.Timeout | undefined
  let looking = false

  async function look(): Promise<void> {
    const now = Date.now()
    const wanted = registry
      .list()
      .flatMap((record) => lanesOf(record, (version) => registry.version(record.name, version)))
    const registered = registry.lanes()
    const names = new Set(wanted.map(laneConsumer))
    const idle = new Set(registered.map(laneConsumer).filter((name) => !names.has(name)))
    for (const name of idle) if (!unwantedSince.has(name)) unwantedSince.set(name, now)
    for (const name of unwantedSince.keys()) if (!idle.has(name)) unwantedSince.delete(name)
    if (wanted.length === 0 && registered.length === 0) return

    const consumers = await workQueues(bus.jsm)
    const seen = { wanted, registered, consumers, unwantedSince }
    for (const { act, lane } of laneActions(topology, seen, now, options.graceMs)) {
      if (act === 'ensure') await ensureLane(bus.jsm, topology, lane)
      else if (act === 'register') await registry.putLane(lane)
      else if (await removeLane(bus.jsm, topology, lane)) await registry.removeLane(lane)
    }
  }

  async function turn(): Promise<void> {
    if (looking || !bus.connected) return
    looking = true
    try {
      await look()
    } catch (error) {
      log.debug({ err: error }, 'the lanes could not be looked after')
    } finally {
      looking = false
    }
  }

  const unfollow = registry.onChange((key) => {
    if (key.startsWith('version.')) return
    soon ??= setTimeout(() => {
      soon = undefined
      void turn()
    }, soonMs)
  })
  const timer = setInterval(turn, options.lookMs ?? lookMs)
  return {
    [Symbol.dispose]() {
      unfollow()
      clearInterval(timer)
      clearTimeout(soon)
    },
  }
}
