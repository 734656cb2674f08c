/**
 * Queue limits: how many invocations of a function may wait. One waits that is accepted and not running; a call that
 * can start at once as far as is known (there is room below `concurrency`, and its `rate` allows it) never waits, so
 * that a limit of 0 lets through what can run now. A retry in its backoff counts as running: it keeps its place.
 *
 * Counted by the server, as what of the lane was not delivered yet. What was let through a moment ago may not be
 * counted there yet and is added here, so that one gateway is exact where there is a `concurrency`; several may
 * together let through more, at most half of the room that each of them sees.
 */
import type { Bus } from '../shared/bus.ts'
import { BusUnavailable, Problem } from '../shared/errors.ts'
import { type FunctionVersion, type Lane, laneOf, type Rate } from '../shared/functions.ts'
import type { Meters } from '../shared/meters.ts'
import { startable } from '../shared/rate.ts'
import type { Registry } from '../shared/registry.ts'
import { laneConsumer, WORK } from '../shared/topology.ts'

/** Milliseconds for which a count is used. */
const freshMs = 250
/** Milliseconds after which a call that was let through has come to the queue, or never will. */
const settleMs = 1_000
/** Milliseconds that a call waits for room: whoever was just answered calls again before its place is free. */
const fullMs = 25
/** … and at most, where others are always faster. */
const patienceMs = 500
/** Milliseconds between two looks at a queue that seems full. */
const againMs = 10
/** Milliseconds over which the throughput of a lane is measured, at least. */
const throughputMs = 1_000
const longestRetryS = 60
/** Without `concurrency`, where nothing waits, so many are taken to start at once before it is counted again. */
const unboundedSlots = 16

/** What the server says of a lane. */
export interface Count {
  /** Not delivered yet. */
  pending: number
  /** Delivered and not acknowledged. */
  out: number
  /** Deliveries so far. */
  delivered: number
  /** Starts that the rate allows now; `Infinity` where there is none. */
  due: number
}

/** How many more calls may be let through. Pure. */
export function roomFor(limit: number, concurrency: number | null, count: Count): number {
  const slots =
    concurrency === null ? (count.pending === 0 ? unboundedSlots : 0) : Math.max(0, concurrency - count.out)
  return limit + Math.min(slots, count.due) - count.pending
}

/** Seconds until it makes sense to try again: `waiting` calls leave the queue at `perS`. Pure. */
export const retryAfter = (waiting: number, perS: number): number =>
  perS <= 0 ? longestRetryS / 4 : Math.min(longestRetryS, Math.max(1, Math.ceil(Math.max(1, waiting) / perS)))

interface Seen extends Count {
  /** ms, as `performance.now()` has it, when the count was asked for. */
  at: number
}

class Gatepost {
  seen: Seen | undefined
  looking: Promise<Seen> | undefined
  /** When calls were let through that `seen` may not hold yet, oldest first. */
  passed: number[] = []
  /** Refused in this and the last second, for telling how long to wait. */
  refused = { since: 0, count: 0, before: 0 }
  /** An older count, which the throughput is measured against. */
  mark: Seen | undefined
  perS = 0
}

export interface LaneGateOptions {
  bus: Bus
  registry: Pick<Registry, 'lanes' | 'onChange'>
  meters: Pick<Meters, 'read' | 'now'>
}

export class LaneGate {
  readonly #options: LaneGateOptions
  readonly #posts = new Map<string, Gatepost>()
  #lanes: Map<string, Lane> | undefined
  readonly #unfollow: () => void

  constructor(options: LaneGateOptions) {
    this.#options = options
    this.#unfollow = options.registry.onChange((key) => {
      if (key.startsWith('lane.')) this.#lanes = undefined
    })
  }

  /**
   * Lets a call of this version through, or throws `queue_full` with how long to wait. To be called right before its
   * `accepted` event is published. Where the count cannot be had it throws `BusUnavailable`.
   */
  async admit(name: string, version: FunctionVersion): Promise<void> {
    const limit = version.spec.queue_limit
    const lane = laneOf(name, version.spec)
    if (limit === null || lane === undefined) return
    const consumer = laneConsumer({ isolation: version.isolation, lane })
    const { concurrency, rate } = this.#lane(consumer) ?? version.spec
    const post = this.#post(consumer)
    const since = performance.now()
    for (;;) {
      const now = performance.now()
      const { seen } = post
      if (seen !== undefined) {
        const mayBeMissing = post.passed.length
        const room = roomFor(limit, concurrency, seen) - mayBeMissing
        // With plenty of room a count is good for a while; near the limit only for those that share it.
        const fresh = now - seen.at < (room > mayBeMissing + 8 ? freshMs : againMs)
        if (fresh && room > 0) {
          post.passed.push(now)
          return
        }
        if (fresh) {
          // Where what was let through is still on its way to being counted, nobody is refused before it is.
          const full = room + mayBeMissing <= 0 && seen.at - since >= fullMs
          if (full || now - since >= patienceMs) throw this.#full(name, limit, post, now)
          await new Promise((resolve) => setTimeout(resolve, againMs))
        }
      }
      post.looking ??= this.#look(consumer, rate, post).finally(() => {
        post.looking = undefined
      })
      await post.looking
    }
  }

  close(): void {
    this.#unfollow()
  }

  #lane(consumer: string): Lane | undefined {
    if (this.#lanes === undefined) {
      this.#lanes = new Map(this.#options.registry.lanes().map((lane) => [laneConsumer(lane), lane]))
      for (const key of this.#posts.keys()) if (!this.#lanes.has(key)) this.#posts.delete(key)
    }
    return this.#lanes.get(consumer)
  }

  #post(consumer: string): Gatepost {
    const known = this.#posts.get(consumer)
    if (known !== undefined) return known
    const post = new Gatepost()
    this.#posts.set(consumer, post)
    return post
  }

  async #look(consumer: string, rate: Rate | null, post: Gatepost): Promise<Seen> {
    const { bus, meters } = this.#options
    const at = performance.now()
    try {
      const [info, due] = await Promise.all([
        bus.jsm.consumers.info(WORK, consumer),
        rate === null
          ? Number.POSITIVE_INFINITY
          : meters.read(consumer).then(({ meter }) => startable(meter, rate, meters.now())),
      ])
      const { num_pending: pending, num_ack_pending: out } = info
      const seen: Seen = { at, pending, out, due, delivered: info.delivered.consumer_seq }
      // As many as came to the queue since the last count were let through here, unless there are more gateways.
      const came = post.seen === undefined ? 0 : arrivals(seen) - arrivals(post.seen)
      post.passed = post.passed.slice(Math.max(0, came)).filter((passedAt) => passedAt > at - settleMs)
      post.seen = seen
      measure(post, seen)
      return seen
    } catch (cause) {
      throw new BusUnavailable('the queue cannot be counted', { cause })
    }
  }

  #full(name: string, limit: number, post: Gatepost, now: number): Problem {
    const { refused } = post
    if (now - refused.since > 1_000)
      post.refused = { since: now, count: 1, before: now - refused.since > 2_000 ? 0 : refused.count }
    else refused.count++
    // Those refused come back on top of a queue that is full.
    const waiting = Math.max(post.refused.count, post.refused.before)
    return new Problem('queue_full', {
      detail: `as many invocations of ${name} wait as may wait: ${limit}`,
      retryAfterS: retryAfter(waiting, post.perS),
    })
  }
}

/** Messages that have come to the queue so far, one delivered twice counted twice. */
const arrivals = ({ delivered, pending }: Count) => delivered + pending

/** Deliveries per second, over the last second or more. */
function measure(post: Gatepost, seen: Seen): void {
  const { mark } = post
  if (mark === undefined) {
    post.mark = seen
    return
  }
  const ms = seen.at - mark.at
  if (ms < throughputMs && post.perS > 0) return
  post.perS = Math.max(0, ((seen.delivered - mark.delivered) * 1_000) / Math.max(ms, 1))
  if (ms >= throughputMs) post.mark = seen
}
