/**
 * The one door to NATS: a connection that mends itself, publishing under the referee, and reading back.
 * Nothing outside `shared/bus.ts`, `blobs.ts`, `bucket.ts`, `queue.ts` and `follow.ts` talks to the NATS client.
 */
import { setTimeout } from 'node:timers/promises'
import {
  JetStreamApiError,
  type JetStreamClient,
  type JetStreamManager,
  jetstream,
  jetstreamManager,
} from '@nats-io/jetstream'
import { type KV, Kvm } from '@nats-io/kv'
import { nuid } from '@nats-io/nats-core'
import type { NatsConnectionImpl } from '@nats-io/nats-core/internal'
import {
  connect,
  type Msg,
  type MsgHdrs,
  type NatsConnection,
  type Subscription,
} from '@nats-io/transport-node'
import { knownForMs } from './backends.ts'
import { BusUnavailable, MessageTooLarge, StreamFull } from './errors.ts'
import { type AnyEvent, LifecycleEvent } from './events.ts'
import { headerBlock, Outbox } from './outbox.ts'
import { eventSubject, lastToken, lifecycleSubjects } from './subjects.ts'
import { BACKENDS, EVENTS } from './topology.ts'
import { TransientMap } from './transient-map.ts'
import type { WorkloadId } from './workload.ts'

/** Set by the server on sourced messages: `<stream> <sequence> …`. */
const sourceHeader = 'Nats-Stream-Source'
const contentType = 'application/cloudevents+json'

/** Milliseconds to wait for a stream’s acknowledgement before the outcome counts as unknown. */
const ackTimeoutMs = 5_000
/** Milliseconds that what nobody waits for is gathered. */
const soonMs = 10

/** Milliseconds that closing waits for the server to have everything. */
const drainMs = 2_000

/** Room kept for headers in a message (bytes). */
const headerBytes = 8_192

/** `10071` and `10164`: the expected last sequence was not the last. */
const wrongLastSequence = new Set([10071, 10164])
/** `10077` maximum bytes, `10047` and `10023` insufficient storage or resources. */
const noRoom = new Set([10077, 10047, 10023])

/** True for the server’s word that a stream, or the disk, has no room. */
export const isNoRoom = (error: unknown): error is JetStreamApiError =>
  error instanceof JetStreamApiError && noRoom.has(error.code)

/** The event in a stored message; undefined where it is none, or another than its subject says. */
function eventIn(message: { subject: string; json(): unknown }): LifecycleEvent | undefined {
  const [, , workload, kind] = message.subject.split('.', 4)
  try {
    const parsed = LifecycleEvent.safeParse(message.json())
    if (!parsed.success || parsed.data.subject !== workload) return undefined
    return parsed.data.type === `vulcan.workload.${kind}` ? parsed.data : undefined
  } catch {
    return undefined
  }
}

export type Published =
  | { stored: true; seq: number }
  /** Somebody else was first; read back what stands. */
  | { stored: false }

export interface StoredEvent {
  event: LifecycleEvent
  /**
   * Sequence of the last message on the workload’s subjects: what the next publish must expect. It is the event’s
   * own, unless something that is no event was published behind it.
   */
  seq: number
}

/** What stands on some of a workload’s subjects. */
interface Place {
  /** The last message that is an event of that subject; undefined: there is none. */
  event: LifecycleEvent | undefined
  /** Its sequence; 0: there is none. */
  eventSeq: number
  /** Sequence of the last message, event or not; 0: there is none. */
  seq: number
}

interface Ack {
  subject: string
  resolve(seq: number): void
  reject(error: unknown): void
  /** Milliseconds since the epoch. */
  deadline: number
}

/**
 * `nats://user:password@host:4222`, or several separated by commas, as the client takes it: it reads no credentials
 * from URLs. The first that are named are those for all servers.
 */
export function serversOf(url: string): { servers: string[]; user?: string; pass?: string } {
  const urls = url.split(',').map((server) => server.trim())
  const servers = urls.map((server) => server.replace(/^([a-z]+:\/\/)?[^/]*@/, '$1'))
  const named = urls.find((_, i) => urls[i] !== servers[i])
  if (named === undefined) return { servers }
  const [user = '', pass = ''] = named
    .replace(/^[a-z]+:\/\//, '')
    .split('@', 1)[0]!
    .split(':')
  return { servers, user: decodeURIComponent(user), pass: decodeURIComponent(pass) }
}

export interface BusOptions {
  /** One URL or several, separated by commas; with a user and a password where the server wants them. */
  url: string
  /** Shown in the server’s connection list. */
  name: string
}

export class Bus implements AsyncDisposable {
  readonly nc: NatsConnection
  readonly js: JetStreamClient
  readonly jsm: JetStreamManager
  /** False from the moment the connection is lost until it is mended. */
  connected = true
  /** When the connection was lost, ms since the epoch; undefined while connected. */
  disconnectedAt: number | undefined
  readonly #listeners = new Set<(connected: boolean) => void>()
  readonly #outbox = new Outbox()
  #soon: [subject: string, payload: string][] = []
  #soonTimer: NodeJS.Timeout | undefined
  readonly #acks = new TransientMap<string, Ack>()
  readonly #ackInbox = `_INBOX.${nuid.next()}`
  #ackCount = 0
  readonly #ackTimer: NodeJS.Timeout
  #closed = false

  private constructor(nc: NatsConnection, jsm: JetStreamManager) {
    this.nc = nc
    this.js = jetstream(nc)
    this.jsm = jsm
    this.listen(`${this.#ackInbox}.*`, (message) => {
      const ack = this.#acks.delete(lastToken(message.subject))
      if (ack !== undefined) settle(ack, message)
    })
    this.#ackTimer = setInterval(() => this.#expireAcks(), 500)
    void this.#watch()
  }

  /**
   * Connects, waiting as long as it takes for a server, and reconnects for ever after.
   * `signal` gives the first wait up.
   */
  static async connect({ url, name }: BusOptions, signal?: AbortSignal): Promise<Bus> {
    for (;;) {
      signal?.throwIfAborted()
      try {
        const nc = await connect({
          ...serversOf(url),
          name,
          maxReconnectAttempts: -1,
          reconnectTimeWait: 200,
          reconnectJitter: 100,
          pingInterval: 5_000,
          maxPingOut: 2,
          timeout: 2_000,
          ignoreAuthErrorAbort: true,
          noAsyncTraces: true,
        })
        try {
          return new Bus(nc, await jetstreamManager(nc))
        } catch (error) {
          await nc.close()
          throw error
        }
      } catch {
        await setTimeout(250)
      }
    }
  }

  async #watch(): Promise<void> {
    for await (const status of this.nc.status()) {
      if (status.type === 'disconnect' || status.type === 'reconnect') {
        this.connected = status.type === 'reconnect'
        this.disconnectedAt = this.connected ? undefined : (this.disconnectedAt ?? Date.now())
        // An acknowledgement on its way is lost with the connection.
        if (!this.connected) this.#loseAcks()
        for (const listener of this.#listeners) listener(this.connected)
      }
    }
  }

  /** Calls back on every loss (`false`) and return (`true`) of the connection; returns how to stop that. */
  onConnection(listener: (connected: boolean) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** Resolves when connected, at once if that is now. */
  whenConnected(signal?: AbortSignal): Promise<void> {
    if (this.#closed) return Promise.reject(new BusUnavailable('the bus is closed'))
    if (this.connected) return Promise.resolve()
    if (signal?.aborted) return Promise.reject(signal.reason)
    return new Promise((resolve, reject) => {
      const settle = (then: () => void) => {
        stop()
        signal?.removeEventListener('abort', aborted)
        then()
      }
      const stop = this.onConnection((connected) => {
        if (connected) settle(resolve)
        else if (this.#closed) settle(() => reject(new BusUnavailable('the bus is closed')))
      })
      const aborted = () => settle(() => reject(signal?.reason))
      signal?.addEventListener('abort', aborted)
    })
  }

  /**
   * Core publish in order of calls. What is published in one turn of the event loop leaves in one write: under
   * load that saves most of the system calls. With nothing outstanding there is nothing to wait for. Throws
   * `MessageTooLarge` for what the server would refuse.
   */
  publish(subject: string, payload: string | Uint8Array, reply?: string): void {
    this.#publish(subject, reply, '', payload)
  }

  #publish(subject: string, reply: string | undefined, headers: string, payload: string | Uint8Array): void {
    const limit = (this.nc.info?.max_payload ?? Number.POSITIVE_INFINITY) - headerBytes
    if (payload.length * 3 > limit && Buffer.byteLength(payload) > limit)
      throw new MessageTooLarge(`${subject}: ${Buffer.byteLength(payload)} bytes where ${limit} are taken`)
    if (this.#closed) return
    const first = this.#outbox.isEmpty
    this.#outbox.add(subject, reply, headers, payload)
    if (!first) return
    if (this.#acks.size === 0) queueMicrotask(this.#flushOutbox)
    else setImmediate(this.#flushOutbox)
  }

  /** Core publish of what nobody waits for: leaves within 10 ms, together with others of its kind. */
  publishSoon(subject: string, payload: string): void {
    if (this.#soon.push([subject, payload]) === 1)
      this.#soonTimer = globalThis.setTimeout(this.#publishDue, soonMs)
  }

  #publishDue = (): void => {
    globalThis.clearTimeout(this.#soonTimer)
    const due = this.#soon
    this.#soon = []
    for (const [subject, payload] of due) this.publish(subject, payload)
  }

  #flushOutbox = (): void => {
    const { bytes, messages } = this.#outbox.take()
    if (messages === 0 || this.nc.isClosed()) return
    const { protocol } = this.nc as NatsConnectionImpl
    protocol.outMsgs += messages
    protocol.outBytes += bytes.byteLength
    protocol.sendCommand(bytes)
  }

  /** Resolves when the server has taken everything published so far. */
  async flush(): Promise<void> {
    this.#publishDue()
    this.#flushOutbox()
    await this.nc.flush()
  }

  /** Acknowledgements are told apart by a counter on one inbox, their timeouts looked after together. */
  #publishAcked(subject: string, headers: string, payload: string): Promise<number> {
    if (this.#closed) throw new BusUnavailable('the bus is closed')
    const token = (++this.#ackCount).toString(36)
    this.#publish(subject, `${this.#ackInbox}.${token}`, headers, payload)
    return new Promise((resolve, reject) => {
      this.#acks.set(token, { subject, resolve, reject, deadline: Date.now() + ackTimeoutMs })
    })
  }

  #loseAcks(): void {
    for (const ack of this.#acks.values()) settle(ack, undefined)
    this.#acks.clear()
  }

  #expireAcks(): void {
    const now = Date.now()
    for (const [token, ack] of this.#acks) {
      // Made in order of their deadlines.
      if (ack.deadline > now) break
      this.#acks.delete(token)
      settle(ack, undefined)
    }
  }

  /**
   * Publishes a lifecycle event if `expected` is still the last sequence on the workload’s subjects (0: none yet).
   * Throws `BusUnavailable` when the outcome is unknown and `StreamFull` when there is no room.
   */
  async publishEvent(subject: string, event: AnyEvent, expected: number): Promise<Published> {
    const headers = headerBlock(
      'Nats-Expected-Last-Subject-Sequence',
      String(expected),
      'Nats-Expected-Last-Subject-Sequence-Subject',
      lifecycleSubjects(event.subject),
      'Content-Type',
      contentType,
      'traceparent',
      event.traceparent,
    )
    try {
      return { stored: true, seq: await this.#publishAcked(subject, headers, JSON.stringify(event)) }
    } catch (error) {
      if (error instanceof JetStreamApiError && wrongLastSequence.has(error.code)) return { stored: false }
      throw error
    }
  }

  /**
   * Publishes a lifecycle event until it is known whether it stands: through lost acknowledgements, lost
   * connections and full streams. `stored` is also true when an earlier try of the same event had got through.
   *
   * What is no event moves no workload: where nothing else came behind `expected`, the event is published again
   * behind it. `last` is undefined where the stream holds no event of the workload any more.
   *
   * Rejects only when `signal` is aborted, the bus is closed, the event is too large for a message, or, with
   * `StreamFull`, when the stream has had no room for `fullMs`.
   */
  async settleEvent(
    subject: string,
    event: LifecycleEvent,
    expected: number,
    signal?: AbortSignal,
    fullMs = Number.POSITIVE_INFINITY,
  ): Promise<{ stored: true; seq: number } | { stored: false; last: StoredEvent | undefined }> {
    let fullSince: number | undefined
    for (;;) {
      try {
        const published = await this.publishEvent(subject, event, expected)
        if (published.stored) return published
        const { event: last, eventSeq, seq } = await this.#place(lifecycleSubjects(event.subject))
        if (
          last?.id === event.id &&
          last.source === event.source &&
          last.time === event.time &&
          last.traceparent === event.traceparent
        )
          return { stored: true, seq }
        if (seq <= expected || eventSeq > expected)
          return { stored: false, last: last === undefined ? undefined : { event: last, seq } }
        expected = seq
      } catch (error) {
        if (!(error instanceof BusUnavailable || error instanceof StreamFull)) throw error
        signal?.throwIfAborted()
        if (error instanceof StreamFull) {
          fullSince ??= Date.now()
          if (Date.now() - fullSince >= fullMs) throw error
        }
        await this.whenConnected(signal)
        await setTimeout(100)
      }
    }
  }

  /** Publishes what needs no referee (log batches, late results); a repeated `messageId` is stored once. */
  async publishRecord(subject: string, event: AnyEvent, messageId: string): Promise<number> {
    const headers = headerBlock('Nats-Msg-Id', messageId, 'Content-Type', contentType)
    return await this.#publishAcked(subject, headers, JSON.stringify(event))
  }

  /**
   * The last stored lifecycle event of a workload, straight from the stream’s leader; undefined: none. Messages
   * that are no events are passed over, as the dispatcher does.
   */
  async lastEvent(id: WorkloadId): Promise<StoredEvent | undefined> {
    const { event, seq } = await this.#place(lifecycleSubjects(id))
    return event === undefined ? undefined : { event, seq }
  }

  /** The `accepted` event of a workload; undefined: never accepted, or older than the stream keeps. */
  async acceptedEvent(id: WorkloadId): Promise<StoredEvent | undefined> {
    const { event, eventSeq } = await this.#place(`vulcan.events.${id}.accepted.*.*`)
    return event === undefined ? undefined : { event, seq: eventSeq }
  }

  /** The `started` event of a workload’s last attempt; undefined: none, or older than the stream keeps. */
  async startedEvent(id: WorkloadId): Promise<StoredEvent | undefined> {
    const { event, eventSeq } = await this.#place(eventSubject(id, 'started'))
    return event === undefined ? undefined : { event, seq: eventSeq }
  }

  /** Sequence of the last message on a subject, straight from the stream’s leader; 0: none. */
  async lastSequence(stream: string, subject: string): Promise<number> {
    if (!this.connected) throw new BusUnavailable('not connected')
    try {
      return (await this.jsm.streams.getMessage(stream, { last_by_subj: subject }))?.seq ?? 0
    } catch (cause) {
      if (cause instanceof JetStreamApiError && cause.code === 10037) return 0
      throw new BusUnavailable(`stream ${stream} cannot be read`, { cause })
    }
  }

  /** One read where the last message is an event; else all of them, which only something foreign brings about. */
  async #place(subjects: string): Promise<Place> {
    const last = await this.#message({ last_by_subj: subjects })
    if (last === null) return { event: undefined, eventSeq: 0, seq: 0 }
    const place: Place = { event: eventIn(last), eventSeq: last.seq, seq: last.seq }
    if (place.event !== undefined) return place
    place.eventSeq = 0
    for (let seq = 1; seq < last.seq; ) {
      const next = await this.#message({ seq, next_by_subj: subjects })
      if (next === null || next.seq >= last.seq) break
      const event = eventIn(next)
      if (event !== undefined) Object.assign(place, { event, eventSeq: next.seq })
      seq = next.seq + 1
    }
    return place
  }

  async #message(query: { last_by_subj: string } | { seq: number; next_by_subj?: string }) {
    if (!this.connected) throw new BusUnavailable('not connected')
    try {
      return await this.jsm.streams.getMessage(EVENTS, query)
    } catch (cause) {
      if (cause instanceof JetStreamApiError && cause.code === 10037) return null
      throw new BusUnavailable('the event stream cannot be read', { cause })
    }
  }

  /** Core publish: may be lost. While disconnected it is dropped rather than kept. */
  send(subject: string, payload: string | Uint8Array): void {
    if (this.connected) this.publish(subject, payload)
  }

  /** Core subscription; `handle` is called in order of arrival. */
  listen(subject: string, handle: (message: Msg) => void): Subscription {
    return this.nc.subscribe(subject, {
      callback: (error, message) => {
        if (error === null) handle(message)
      },
    })
  }

  /** One request with one answer; undefined when nobody answers within `timeoutMs`. */
  async ask(subject: string, payload: string | Uint8Array, timeoutMs: number): Promise<string | undefined> {
    try {
      return (await this.nc.request(subject, payload, { timeout: timeoutMs })).string()
    } catch {
      return undefined
    }
  }

  /** What each host last said of an isolation, under `backendKey`; kept 15 minutes past the last word. */
  async backends(replicas: number): Promise<KV> {
    return await new Kvm(this.js).create(BACKENDS, { replicas, ttl: knownForMs, history: 1 })
  }

  /** Waits until everything sent has reached the server, then closes. What still waits for an answer is rejected. */
  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#ackTimer)
    this.#publishDue()
    this.#flushOutbox()
    this.#closed = true
    if (this.connected) {
      // A server that goes away meanwhile leaves the drain waiting for ever.
      const patience = AbortSignal.timeout(drainMs)
      const over = new Promise((resolve) => patience.addEventListener('abort', resolve))
      await Promise.race([this.nc.drain().catch(() => {}), over])
    }
    await this.nc.close()
    this.connected = false
    this.#loseAcks()
    for (const listener of this.#listeners) listener(false)
  }
}

/** Sequence in the event stream that a queued message was sourced from. */
export function sourcedSequence(message: { headers?: MsgHdrs | undefined }): number {
  return Number(message.headers?.get(sourceHeader).split(' ')[1] ?? Number.NaN)
}

/** `message`: the server’s answer to a publish; undefined: none came. */
function settle({ subject, resolve, reject }: Ack, message: Msg | undefined): void {
  try {
    // A bare 503 is the server’s word that no stream listens.
    if (message === undefined || message.data.byteLength === 0)
      throw new BusUnavailable(`no acknowledgement for ${subject}`)
    const { seq, error } = message.json<{
      seq: number
      error?: { code: number; err_code: number; description: string }
    }>()
    if (error === undefined) resolve(seq)
    else if (noRoom.has(error.err_code)) throw new StreamFull(error.description)
    else if (error.code === 503) throw new BusUnavailable(error.description)
    else throw new JetStreamApiError(error)
  } catch (error) {
    reject(error)
  }
}
