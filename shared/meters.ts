/**
 * Where the rates of lanes stand, in the KV bucket `vulcan_rates`: a key per lane with limits on its rate, named as
 * its consumer. Read and written by compare and set, by whoever starts something; nobody else keeps any of it.
 */
import { JetStreamApiError } from '@nats-io/jetstream'
import { type KV, Kvm } from '@nats-io/kv'
import type { Bus } from './bus.ts'
import { Meter } from './rate.ts'
import { RATES } from './topology.ts'

/** The expected revision was not the last. */
const wrongRevision = new Set([10071, 10164])
/** Milliseconds between two looks at the server’s clock. */
const clockMs = 30_000

export interface StoredMeter {
  meter: Meter | undefined
  /** 0: nothing is stored. */
  revision: number
}

export class Meters {
  readonly #bus: Bus
  readonly #kv: KV
  readonly #timer: NodeJS.Timeout
  #aheadMs = 0

  private constructor(bus: Bus, kv: KV) {
    this.#bus = bus
    this.#kv = kv
    this.#timer = setInterval(() => void this.#setClock().catch(() => {}), clockMs)
    this.#timer.unref()
  }

  static async open(bus: Bus, replicas: number): Promise<Meters> {
    const description = 'Where the rates of functions stand'
    const meters = new Meters(bus, await new Kvm(bus.js).create(RATES, { replicas, description, history: 1 }))
    await meters.#setClock()
    return meters
  }

  /** Milliseconds since the epoch by the server’s clock, which all hosts share. */
  now(): number {
    return performance.timeOrigin + performance.now() + this.#aheadMs
  }

  async #setClock(): Promise<void> {
    const here = () => performance.timeOrigin + performance.now()
    let shortest = Number.POSITIVE_INFINITY
    let ahead = this.#aheadMs
    for (let i = 0; i < 3; i++) {
      const before = here()
      const { ts } = (await this.#bus.jsm.streams.info(`KV_${RATES}`)) as { ts?: string }
      const trip = here() - before
      if (ts === undefined || trip >= shortest) continue
      shortest = trip
      ahead = Date.parse(ts) - (before + trip / 2)
    }
    // Within the trip the two cannot be told apart.
    this.#aheadMs = Math.abs(ahead) <= shortest ? 0 : ahead
  }

  async read(key: string): Promise<StoredMeter> {
    const entry = await this.#kv.get(key)
    if (entry === null) return { meter: undefined, revision: 0 }
    if (entry.operation !== 'PUT') return { meter: undefined, revision: entry.revision }
    return { meter: Meter.safeParse(parse(entry.string())).data, revision: entry.revision }
  }

  /** The new revision; undefined where another was first. */
  async write(key: string, meter: Meter, revision: number): Promise<number | undefined> {
    try {
      return await this.#kv.put(key, JSON.stringify(meter), { previousSeq: revision })
    } catch (error) {
      if (error instanceof JetStreamApiError && wrongRevision.has(error.code)) return undefined
      throw error
    }
  }

  close(): void {
    clearInterval(this.#timer)
  }
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
