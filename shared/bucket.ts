/**
 * A KV bucket mirrored in memory: reads are synchronous, own writes are seen at once, those of others a moment
 * later. The bucket’s stream is followed, so that a lost connection, server or consumer leaves no gap.
 */
import { JetStreamApiError } from '@nats-io/jetstream'
import { type KV, Kvm } from '@nats-io/kv'
import { type Bus, isNoRoom } from './bus.ts'
import { BusUnavailable, MessageTooLarge, StreamFull } from './errors.ts'
import { Follower, type StoredMessage, StreamReplaced } from './follow.ts'

/** Messages taken from the stream at once. */
const batch = 1_000
/** The expected revision was not the last. */
const wrongRevision = new Set([10071, 10164])

export interface BucketOptions<T> {
  name: string
  description: string
  replicas: number
  /** Undefined for what is none of ours; such an entry is passed over. */
  parse(key: string, data: Uint8Array): T | undefined
}

interface Entry<T> {
  /** Undefined: removed. The mark stays, so that an older write that arrives late changes nothing. */
  value: T | undefined
  revision: number
}

export class Bucket<T> {
  readonly #kv: KV
  readonly #bus: Bus
  readonly #options: BucketOptions<T>
  readonly #entries = new Map<string, Entry<T>>()
  readonly #listeners = new Set<(key: string) => void>()
  readonly #stop = new AbortController()

  private constructor(bus: Bus, kv: KV, options: BucketOptions<T>) {
    this.#bus = bus
    this.#kv = kv
    this.#options = options
  }

  /** Makes the bucket where there is none; resolves once everything in it has been read. */
  static async open<T>(bus: Bus, options: BucketOptions<T>): Promise<Bucket<T>> {
    const kv = await make(bus, options)
    const bucket = new Bucket(bus, kv, options)
    const { state } = await bus.jsm.streams.info(bucket.#stream)
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    void bucket.#follow(state.messages === 0 ? 0 : state.last_seq, resolve).catch(reject)
    await promise
    return bucket
  }

  get #stream(): string {
    return `KV_${this.#options.name}`
  }

  async #follow(last: number, ready: () => void): Promise<void> {
    const signal = this.#stop.signal
    if (last === 0) ready()
    while (!signal.aborted) {
      await using follower = new Follower(this.#bus, {
        stream: this.#stream,
        place: { seq: 0, at: 0, created: null },
        batch,
        lingerMs: 0,
        ensure: async () => void (await make(this.#bus, this.#options)),
      })
      try {
        for (;;) {
          const messages = await follower.next(signal)
          for (const message of messages) this.#take(message)
          if ((messages.at(-1)?.seq ?? 0) >= last) ready()
        }
      } catch (error) {
        if (signal.aborted) return
        if (!(error instanceof StreamReplaced)) throw error
        // Another bucket stands there now, with revisions of its own.
        const keys = [...this.#entries.keys()]
        this.#entries.clear()
        for (const key of keys) this.#tell(key)
      }
    }
  }

  #take({ seq, subject, data }: StoredMessage): void {
    const key = subject.slice(`$KV.${this.#options.name}.`.length)
    // Nothing that is kept here is empty: a mark of removal is.
    this.#apply(key, data.byteLength === 0 ? undefined : this.#options.parse(key, data), seq)
  }

  #apply(key: string, value: T | undefined, revision: number): void {
    const known = this.#entries.get(key)
    if (known !== undefined && known.revision >= revision) return
    this.#entries.set(key, { value, revision })
    this.#tell(key)
  }

  #tell(key: string): void {
    for (const listener of this.#listeners) listener(key)
  }

  get(key: string): { value: T; revision: number } | undefined {
    const entry = this.#entries.get(key)
    return entry?.value === undefined ? undefined : (entry as { value: T; revision: number })
  }

  /** In no order. */
  *entries(): IterableIterator<[key: string, value: T]> {
    for (const [key, { value }] of this.#entries) if (value !== undefined) yield [key, value]
  }

  /**
   * Compare and set; `revision` 0: the key must not exist. Returns the new revision, or undefined where another was
   * first, whose value is then in memory. Throws `BusUnavailable` where the outcome is unknown, `StreamFull`, or
   * `MessageTooLarge`.
   */
  async put(key: string, text: string, revision?: number): Promise<number | undefined> {
    const bytes = Buffer.from(text)
    this.#check(key, bytes)
    try {
      const stored =
        revision === undefined
          ? await this.#kv.put(key, bytes)
          : revision === 0
            ? await this.#kv.create(key, bytes)
            : await this.#kv.update(key, bytes, revision)
      this.#apply(key, this.#options.parse(key, bytes), stored)
      return stored
    } catch (cause) {
      if (!(cause instanceof JetStreamApiError && wrongRevision.has(cause.code))) throw asOurs(cause)
      await this.#read(key)
      return undefined
    }
  }

  async remove(key: string): Promise<void> {
    this.#check(key)
    try {
      await this.#kv.delete(key)
    } catch (cause) {
      throw asOurs(cause)
    }
    await this.#read(key)
  }

  /** What the stream’s leader has. */
  async #read(key: string): Promise<void> {
    try {
      const subject = `$KV.${this.#options.name}.${key}`
      const message = await this.#bus.jsm.streams.getMessage(this.#stream, { last_by_subj: subject })
      if (message !== null)
        this.#take({ seq: message.seq, subject, data: message.data, at: message.time.getTime() })
    } catch (cause) {
      if (!(cause instanceof JetStreamApiError && cause.code === 10037)) throw asOurs(cause)
    }
  }

  #check(key: string, bytes?: Uint8Array): void {
    if (!this.#bus.connected) throw new BusUnavailable('not connected')
    const limit = (this.#bus.nc.info?.max_payload ?? 1_048_576) - 8_192
    if (bytes !== undefined && bytes.byteLength > limit)
      throw new MessageTooLarge(`${key}: ${bytes.byteLength} bytes where ${limit} are taken`)
  }

  /** Calls back after memory was updated; returns how to stop that. */
  onChange(listener: (key: string) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  close(): void {
    this.#stop.abort()
    this.#listeners.clear()
  }
}

const make = async <T>(bus: Bus, { name, description, replicas }: BucketOptions<T>): Promise<KV> =>
  await new Kvm(bus.js).create(name, { replicas, description, history: 1 })

function asOurs(cause: unknown): Error {
  if (isNoRoom(cause)) return new StreamFull(cause.message, { cause })
  if (cause instanceof JetStreamApiError) return cause
  return new BusUnavailable('the bucket could not be written', { cause })
}
