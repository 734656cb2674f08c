/**
 * Follows a stream from a sequence on, in order and without gaps, in batches. The place is kept here and not by
 * the server: each time the connection, the server or the consumer is lost, a new short-lived consumer begins
 * right behind the last message received.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { JetStreamApiError } from '@nats-io/jetstream'
import { nuid } from '@nats-io/nats-core'
import type { Msg, Subscription } from '@nats-io/transport-node'
import type { Bus } from './bus.ts'

/** Milliseconds a pull stays open, and between the server’s signs of life meanwhile. */
const pullExpiresMs = 30_000
const heartbeatMs = 5_000
/** Nothing heard on an open pull for this long (ms): the consumer is gone. */
const silenceMs = 2 * heartbeatMs + 2_000
/** Milliseconds that a burst stays open: long enough for what is stored to be sent, short enough not to wait. */
const burstMs = 5
/** Bytes one pull may bring; more than any message has. */
const pullBytes = 4 * 1_048_576
/** Milliseconds the server keeps a consumer nobody pulls from. */
const inactiveMs = 60_000

export interface StoredMessage {
  /** Sequence in the stream. */
  seq: number
  subject: string
  data: Uint8Array
  /** When the server stored it, ms since the epoch. */
  at: number
}

/** Up to where a stream has been taken in, with what tells that it is still the same stream. */
export interface StreamPlace {
  /** Sequence of the last message taken in; 0: none. */
  seq: number
  /** When that message was stored, ms since the epoch. */
  at: number
  /** Creation time of the stream as the server says it; null: not known yet. */
  created: string | null
}

/** The stream is not the one that `place` is a place in: it was made anew, or has lost its end. */
export class StreamReplaced extends Error {
  constructor(stream: string, reason: string) {
    super(`stream ${stream} was replaced: ${reason}`)
    this.name = 'StreamReplaced'
  }
}

export interface FollowOptions {
  stream: string
  place: StreamPlace
  /** A batch holds at most so many messages, and waits at most so long (ms) for more once it has one. */
  batch: number
  lingerMs: number
  /** Called when the stream does not exist. */
  ensure(): Promise<void>
}

export class Follower implements AsyncDisposable {
  readonly #bus: Bus
  readonly #options: FollowOptions
  readonly #stopped = new AbortController()
  readonly #unwatch: () => void
  readonly #timer: NodeJS.Timeout
  #place: StreamPlace
  #attachment: Attachment | undefined
  #attaching = false
  #buffer: StoredMessage[] = []
  #failure: unknown
  #wake: (() => void) | undefined
  #hurried = false
  #pending = 0
  #heldAtFirst: number | undefined

  constructor(bus: Bus, options: FollowOptions) {
    this.#bus = bus
    this.#options = options
    this.#place = options.place
    this.#unwatch = bus.onConnection((connected) => connected && this.#attach())
    this.#timer = setInterval(() => this.#check(), 1_000)
    this.#attach()
  }

  /** Creation time of the stream that is followed; null until it was first reached. */
  get created(): string | null {
    return this.#place.created
  }

  /** Last sequence that the stream held when it was first reached; undefined until then. */
  get heldAtFirst(): number | undefined {
    return this.#heldAtFirst
  }

  /** Messages known to be stored and not yet handed out; undefined while that is not known. */
  get behind(): number | undefined {
    return this.#attachment === undefined ? undefined : this.#buffer.length + this.#pending
  }

  /** Hands out what has arrived without waiting for a fuller batch, once. */
  hurry(): void {
    this.#hurried = true
    this.#wake?.()
  }

  /**
   * The next messages in order, at least one. Rejects with the signal’s reason, or with `StreamReplaced`.
   * What it returned is taken as taken in: it never comes again.
   *
   * Waiting is done on a pull of a single message. What is stored in the linger after it comes in one burst, so
   * that a busy stream wakes this process some twenty times a second and not for every message.
   */
  async next(signal: AbortSignal): Promise<StoredMessage[]> {
    const { batch, lingerMs } = this.#options
    while (this.#buffer.length === 0) {
      this.#ask(1, pullExpiresMs)
      await this.#woken(signal)
    }
    const until = performance.now() + lingerMs
    for (let left = lingerMs; left > 0; left = until - performance.now()) {
      if (this.#hurried || this.#buffer.length + this.#pending >= batch) break
      await this.#woken(signal, left)
    }
    this.#hurried = false
    if (this.#buffer.length < batch) {
      this.#ask(batch - this.#buffer.length, burstMs)
      while (this.#buffer.length < batch && this.#asked > 0) await this.#woken(signal)
    }
    const taken = this.#buffer.length <= batch ? this.#buffer : this.#buffer.slice(0, batch)
    this.#buffer = taken === this.#buffer ? [] : this.#buffer.slice(batch)
    // With a whole batch more known to be there, it is fetched while this one is being taken in.
    if (this.#pending >= batch) this.#ask(batch, burstMs)
    return taken
  }

  get #asked(): number {
    return this.#attachment?.asked ?? 0
  }

  async #woken(signal: AbortSignal, ms?: number): Promise<void> {
    signal.throwIfAborted()
    if (this.#failure !== undefined) throw this.#failure
    await new Promise<void>((resolve) => {
      const done = () => {
        clearTimeout(timer)
        signal.removeEventListener('abort', done)
        this.#wake = undefined
        resolve()
      }
      const timer = ms === undefined ? undefined : setTimeout(done, ms)
      signal.addEventListener('abort', done)
      this.#wake = done
    })
    signal.throwIfAborted()
    if (this.#failure !== undefined) throw this.#failure
  }

  /** Begins anew behind the last message received, as often as it takes. One at a time. */
  #attach(): void {
    if (this.#attaching || this.#stopped.signal.aborted || this.#failure !== undefined) return
    this.#attaching = true
    this.#attachment?.subscription.unsubscribe()
    this.#attachment = undefined
    void (async () => {
      while (!this.#stopped.signal.aborted) {
        try {
          await this.#bus.whenConnected(this.#stopped.signal)
          await this.#open()
          break
        } catch (error) {
          if (error instanceof StreamReplaced) {
            this.#failure = error
            this.#wake?.()
            break
          }
          await delay(250)
        }
      }
      this.#attaching = false
      this.#wake?.()
    })()
  }

  async #open(): Promise<void> {
    const { stream, ensure } = this.#options
    const { jsm } = this.#bus
    const info = await jsm.streams.info(stream).catch(async (error) => {
      if (error instanceof JetStreamApiError && error.code === 10059) await ensure()
      throw error
    })
    const { seq, at, created } = this.#place
    if (created !== null && created !== info.created)
      throw new StreamReplaced(stream, `created ${info.created} and not ${created}`)
    if (info.state.last_seq < seq)
      throw new StreamReplaced(stream, `it ends at ${info.state.last_seq}, but ${seq} has been read`)
    if (seq > 0 && seq >= info.state.first_seq) {
      const last = await jsm.streams.getMessage(stream, { seq }).catch((error) => {
        if (error instanceof JetStreamApiError && error.code === 10037) return null
        throw error
      })
      if (last !== null && Date.parse(last.timestamp) !== at)
        throw new StreamReplaced(stream, `message ${seq} is another one than was read`)
    }
    this.#place = { seq, at, created: info.created }
    this.#heldAtFirst ??= info.state.last_seq
    const consumer = await jsm.consumers.add(stream, {
      name: `follow-${nuid.next()}`,
      ack_policy: 'none',
      deliver_policy: 'by_start_sequence',
      opt_start_seq: seq + 1,
      mem_storage: true,
      num_replicas: 1,
      inactive_threshold: inactiveMs * 1_000_000,
    } as Parameters<typeof jsm.consumers.add>[1])
    if (this.#stopped.signal.aborted) return void jsm.consumers.delete(stream, consumer.name).catch(() => {})
    const inbox = `_INBOX.${nuid.next()}`
    const attachment: Attachment = {
      consumer: consumer.name,
      inbox,
      asked: 0,
      delivered: 0,
      heardAt: Date.now(),
      subscription: this.#bus.listen(inbox, (message) => this.#received(attachment, message)),
    }
    this.#pending = consumer.num_pending
    this.#attachment = attachment
  }

  #received(attachment: Attachment, message: Msg): void {
    if (attachment !== this.#attachment) return
    attachment.heardAt = Date.now()
    if (message.reply === undefined || message.reply === '') {
      this.#status(attachment, message)
      return
    }
    // $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<ns>.<pending>
    const tokens = message.reply.split('.')
    const from = tokens.length < 11 ? 5 : 7
    const seq = Number(tokens[from])
    if (Number(tokens[from + 1]) !== ++attachment.delivered) {
      this.#attach()
      return
    }
    const at = Number(tokens[from + 2]!.slice(0, -6))
    this.#pending = Number(tokens[from + 3])
    this.#place = { seq, at, created: this.#place.created }
    attachment.asked--
    this.#buffer.push({ seq, subject: message.subject, data: message.data, at })
    if (this.#buffer.length === 1 || attachment.asked === 0) this.#wake?.()
  }

  #status(attachment: Attachment, message: Msg): void {
    const code = message.headers?.code ?? 0
    if (code === 0 || code === 100) return
    const description = message.headers?.description ?? ''
    const over = code === 408 || (code === 409 && /maxbytes|batch completed/i.test(description))
    if (!over) return void setTimeout(() => attachment === this.#attachment && this.#attach(), 250)
    attachment.asked = 0
    this.#wake?.()
  }

  /** One pull at a time: the end of one is known before the next. */
  #ask(batch: number, expiresMs: number): void {
    const attachment = this.#attachment
    if (attachment === undefined || attachment.asked > 0) return
    if (!this.#bus.connected || this.#stopped.signal.aborted) return
    const pull = {
      batch,
      max_bytes: pullBytes,
      expires: expiresMs * 1_000_000,
      ...(expiresMs > 2 * heartbeatMs ? { idle_heartbeat: heartbeatMs * 1_000_000 } : {}),
    }
    attachment.heardAt = Date.now()
    attachment.asked = batch
    const subject = `$JS.API.CONSUMER.MSG.NEXT.${this.#options.stream}.${attachment.consumer}`
    this.#bus.nc.publish(subject, JSON.stringify(pull), { reply: attachment.inbox })
  }

  #check(): void {
    const attachment = this.#attachment
    if (attachment === undefined || !this.#bus.connected) return
    if (attachment.asked > 0 && Date.now() - attachment.heardAt > silenceMs) this.#attach()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stopped.abort()
    this.#unwatch()
    clearInterval(this.#timer)
    const attachment = this.#attachment
    this.#attachment = undefined
    attachment?.subscription.unsubscribe()
    if (attachment !== undefined && this.#bus.connected)
      await this.#bus.jsm.consumers.delete(this.#options.stream, attachment.consumer).catch(() => {})
  }
}

/** One consumer’s time. Messages of an earlier one are not listened to. */
interface Attachment {
  consumer: string
  inbox: string
  /** Messages that the open pull may still bring; 0: none is open. */
  asked: number
  /** Consumer sequence of the last message. */
  delivered: number
  /** Last sign of life, ms since the epoch. */
  heardAt: number
  subscription: Subscription
}
