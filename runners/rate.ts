/**
 * The rate of a function over all runners: whoever is about to start an invocation takes its turn from the lane’s
 * meter by compare and set. Those who ask while a write is under way share the next one, so that a high rate costs
 * few writes; what is taken is used at once or within `aheadMs`, and only a crash in between loses it.
 */
import type { Rate } from '../shared/functions.ts'
import type { StoredMeter } from '../shared/meters.ts'
import { grant, startable } from '../shared/rate.ts'

/** Starts that are due within this time (ms) are waited for with the message in hand. */
export const aheadMs = 100
/** Milliseconds after which what is remembered of a meter is read again before it is judged by. */
const staleMs = 1_000

/** Times are ms since the epoch by the store’s clock. */
export interface MeterStore {
  now(): number
  read(key: string): Promise<StoredMeter>
  write(key: string, meter: NonNullable<StoredMeter['meter']>, revision: number): Promise<number | undefined>
}

/** The start was granted for `at`, or the next one is due at `next` and nothing was taken. */
export type Turn = { at: number } | { next: number }

interface Waiting {
  resolve(turn: Turn): void
  reject(error: unknown): void
}

export class Turnstile {
  readonly #store: MeterStore
  readonly #key: string
  rate: Rate
  #known: (StoredMeter & { readAt: number }) | undefined
  #waiting: Waiting[] = []
  #busy = false

  constructor(store: MeterStore, key: string, rate: Rate) {
    this.#store = store
    this.#key = key
    this.rate = rate
  }

  /** Milliseconds from now until a time of the store’s. */
  until(at: number): number {
    return at - this.#store.now()
  }

  /**
   * How many turns would be granted, as far as is known here, and where there is none, how long (ms) until there may
   * be one. Others may have taken them by now.
   */
  outlook(): { turns: number; inMs: number } {
    if (this.#known === undefined) return { turns: 1, inMs: 0 }
    const now = this.#store.now()
    const { meter } = this.#known
    const turns = startable(meter, this.rate, now, aheadMs)
    return { turns, inMs: turns > 0 ? 0 : grant(meter, this.rate, now, 0, 0).next - now - aheadMs }
  }

  /** Rejects where the store cannot be reached. */
  take(): Promise<Turn> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject })
      if (!this.#busy) void this.#serve()
    })
  }

  async #serve(): Promise<void> {
    this.#busy = true
    while (this.#waiting.length > 0) {
      // All that come in this turn of the event loop share it.
      await new Promise(setImmediate)
      const group = this.#waiting
      this.#waiting = []
      try {
        const turns = await this.#turns(group.length)
        for (const [i, { resolve }] of group.entries()) resolve(turns[i]!)
      } catch (error) {
        this.#known = undefined
        for (const { reject } of group) reject(error)
      }
    }
    this.#busy = false
  }

  async #turns(count: number): Promise<Turn[]> {
    for (;;) {
      let known = this.#known
      if (known === undefined || performance.now() - known.readAt > staleMs)
        known = { ...(await this.#store.read(this.#key)), readAt: performance.now() }
      const { starts, meter, next } = grant(known.meter, this.rate, this.#store.now(), count, aheadMs)
      this.#known = known
      if (meter !== undefined) {
        const revision = await this.#store.write(this.#key, meter, known.revision)
        this.#known = revision === undefined ? undefined : { meter, revision, readAt: performance.now() }
        if (revision === undefined) continue
      }
      return Array.from({ length: count }, (_, i) => (i < starts.length ? { at: starts[i]! } : { next }))
    }
  }
}
