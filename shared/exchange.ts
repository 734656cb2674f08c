/**
 * The streamed part of an HTTP invocation, over core NATS: the request’s body from gateway to runner, the response
 * from runner to gateway. Whoever sends keeps at most `windowBytes` ahead of what was consumed at the other end, so
 * a slow reader holds the writer back. Chunks are numbered: a gap breaks the stream, it is never passed over.
 *
 * A frame is one message: kind (1 byte), stream (4 bytes), number (4 bytes, big endian), payload. The runner makes
 * up the stream’s number for each attempt, so that what is left of an earlier attempt is told apart.
 * Runner to gateway on `vulcan.reply.{gateway}.{workload}`: head, data, end, fail; credit for the request’s body,
 * of which the first, number 0, asks for it. Gateway to runner on `vulcan.request.{workload}`: data, end, fail;
 * credit for the response. Ping, by either, is answered with the number of chunks consumed.
 */
import { randomInt } from 'node:crypto'
import type { Msg, Subscription } from '@nats-io/transport-node'
import { z } from 'zod'
import type { Bus } from './bus.ts'
import { allReplies, lastToken, replySubject, requestSubject } from './subjects.ts'
import { TransientMap } from './transient-map.ts'
import { HeaderList, type WorkloadId } from './workload.ts'

/** Bytes sent ahead of what was consumed. */
export const windowBytes = 1_048_576
/** Largest payload of a chunk. */
const chunkBytes = 64 * 1024
/** What a chunk counts for besides its bytes: many tiny ones cost too. */
const chunkCost = 128
/** Milliseconds without credit after which the other end is asked whether it still is there. */
const stalledMs = 5_000
/** Milliseconds that it is given to say so; two silences in a row mean that it is gone. */
const pingMs = 2_000

const kinds = { head: 0x48, data: 0x44, end: 0x45, fail: 0x46, credit: 0x43, ping: 0x50 } as const
type Kind = (typeof kinds)[keyof typeof kinds]
const frameHead = 9
/** What a ping is answered with where nobody takes the rest any more. */
const goneWord = 'gone'

const Head = z.object({ status: z.int(), headers: HeaderList })
export type StreamHead = z.infer<typeof Head>

/** A stream that did not come to its end: a gap, the other end gone, or a failure that it told. */
export class StreamBroken extends Error {
  override name = 'StreamBroken'
}

interface Frame {
  kind: Kind
  stream: number
  n: number
  payload: Uint8Array
}

function toFrame(kind: Kind, stream: number, n: number, payload?: Uint8Array): Uint8Array {
  const frame = Buffer.allocUnsafe(frameHead + (payload?.byteLength ?? 0))
  frame[0] = kind
  frame.writeUInt32BE(stream, 1)
  frame.writeUInt32BE(n, 5)
  if (payload !== undefined) frame.set(payload, frameHead)
  return frame
}

/** Undefined for what is no frame: the subjects are open to whoever is on the bus. */
function fromFrame(data: Uint8Array): Frame | undefined {
  if (data.byteLength < frameHead) return undefined
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength)
  return {
    kind: data[0] as Kind,
    stream: view.getUint32(1),
    n: view.getUint32(5),
    payload: data.subarray(frameHead),
  }
}

/** Frames of one stream to the other end. */
interface Wire {
  send(kind: Kind, n: number, payload?: Uint8Array): void
  /** What the other end says of the stream: chunks consumed, or that it is gone; undefined where nobody answers. */
  ping(): Promise<string | undefined>
}

const wireTo = (bus: Bus, subject: string, stream: number): Wire => ({
  send: (kind, n, payload) => bus.send(subject, toFrame(kind, stream, n, payload)),
  ping: () => bus.ask(subject, toFrame(kinds.ping, stream, 0), pingMs),
})

/** The sending end. */
export class Outflow {
  readonly #wire: Wire
  #n = 0
  /** Chunks sent and consumed there. */
  #consumed = 0
  /** Costs of the chunks sent and not yet consumed, oldest first. */
  #flying: number[] = []
  #ahead = 0
  #over = false
  #broken: StreamBroken | undefined
  #wake: (() => void) | undefined

  constructor(wire: Wire) {
    this.#wire = wire
  }

  /** Settles when the next piece is welcome; throws `StreamBroken` where nobody takes the rest any more. */
  async write(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.byteLength; at += chunkBytes) {
      if (this.#broken !== undefined) throw this.#broken
      if (this.#over) throw new StreamBroken('the stream has ended')
      const part = bytes.subarray(at, at + chunkBytes)
      this.#wire.send(kinds.data, ++this.#n, part)
      this.#flying.push(part.byteLength + chunkCost)
      this.#ahead += part.byteLength + chunkCost
      while (this.#ahead >= windowBytes) await this.#room()
    }
  }

  end(): void {
    if (this.over) return
    this.#over = true
    this.#wire.send(kinds.end, this.#n + 1)
  }

  /** The rest never comes. */
  fail(message: string): void {
    if (this.over) return
    this.#over = true
    this.#wire.send(kinds.fail, this.#n + 1, Buffer.from(message.slice(0, 1_000)))
    this.#wake?.()
  }

  /** Nobody takes the rest. */
  break(reason: string): void {
    this.#broken ??= new StreamBroken(reason)
    this.#wake?.()
  }

  get over(): boolean {
    return this.#over || this.#broken !== undefined
  }

  /** Chunks up to `n` have been consumed. */
  credit(n: number): void {
    if (n > this.#n) return
    for (; this.#consumed < n; this.#consumed++) this.#ahead -= this.#flying.shift()!
    this.#wake?.()
  }

  /** Settles on credit, or on the word that none will come. */
  async #room(): Promise<void> {
    if (this.#broken !== undefined) throw this.#broken
    if (this.#over) throw new StreamBroken('the stream has ended')
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#wake = resolve
    const timer = setInterval(() => void this.#ask(), stalledMs)
    this.#silences = 0
    await promise
    clearInterval(timer)
    this.#wake = undefined
    if (this.#broken !== undefined) throw this.#broken
  }

  #silences = 0
  async #ask(): Promise<void> {
    const answer = await this.#wire.ping()
    if (answer === goneWord) this.break('whom it is for is gone')
    else if (answer !== undefined) {
      this.#silences = 0
      this.credit(Number(answer) || 0)
    } else if (++this.#silences === 2) this.break('the other end is gone')
  }
}

/** The receiving end: gives out the chunks in order, and credit for one when the next is asked for. */
export class Inflow implements AsyncIterable<Uint8Array> {
  readonly #wire: Wire
  readonly #queue: Uint8Array[] = []
  #arrived = 0
  #consumed = 0
  #uncredited = 0
  #ended = false
  #broken: StreamBroken | undefined
  #wake: (() => void) | undefined

  constructor(wire: Wire) {
    this.#wire = wire
  }

  get consumed(): number {
    return this.#consumed
  }

  /** True once it is known how it ends; chunks may still wait to be taken. */
  get settled(): boolean {
    return this.#ended || this.#broken !== undefined
  }

  take({ kind, n, payload }: Frame): void {
    if (this.settled) return
    if (n !== this.#arrived + 1) {
      this.break(`chunk ${this.#arrived + 1} was lost`)
      return
    }
    this.#arrived = n
    if (kind === kinds.data) this.#queue.push(payload)
    else if (kind === kinds.end) this.#ended = true
    else this.#broken = new StreamBroken(Buffer.from(payload).toString())
    this.#wake?.()
  }

  /** What came before is still given out. */
  break(reason: string): void {
    if (this.settled) return
    this.#broken = new StreamBroken(reason)
    this.#wake?.()
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array> {
    for (;;) {
      const chunk = this.#queue.shift()
      if (chunk !== undefined) {
        yield chunk
        this.#consumed++
        this.#uncredited += chunk.byteLength + chunkCost
        if (this.#uncredited >= windowBytes / 4) {
          this.#uncredited = 0
          this.#wire.send(kinds.credit, this.#consumed)
        }
      } else if (this.#broken !== undefined) throw this.#broken
      else if (this.#ended) return
      else {
        const { promise, resolve } = Promise.withResolvers<void>()
        this.#wake = resolve
        await promise
        this.#wake = undefined
      }
    }
  }
}

/** A response as its gateway receives it. Reading its body throws `StreamBroken` where it does not come to its end. */
export interface StreamedResponse extends StreamHead {
  body: Inflow
}

/** One call, as the gateway whose caller waits sees it. */
export class GatewayExchange {
  readonly #bus: Bus
  readonly #id: WorkloadId
  readonly #answered = Promise.withResolvers<StreamedResponse | undefined>()
  #response: { stream: number; inflow: Inflow } | undefined
  #body: AsyncIterable<Uint8Array> | undefined
  #request: { stream: number; outflow: Outflow } | undefined
  readonly #forget: () => void

  constructor(bus: Bus, id: WorkloadId, forget: () => void) {
    this.#bus = bus
    this.#id = id
    this.#forget = forget
  }

  /** The first response that begins to come; undefined when it was closed before. Never rejects. */
  get answered(): Promise<StreamedResponse | undefined> {
    return this.#answered.promise
  }

  /** The body to send when a runner asks for it; read once, as fast as it is consumed there. */
  offer(body: AsyncIterable<Uint8Array>): void {
    this.#body = body
  }

  receive(frame: Frame, message: Msg): void {
    switch (frame.kind) {
      case kinds.head:
        this.#onHead(frame)
        return
      case kinds.data:
      case kinds.end:
      case kinds.fail:
        if (this.#response?.stream === frame.stream) this.#response.inflow.take(frame)
        return
      case kinds.credit:
        if (frame.n === 0) this.#onAsked(frame.stream)
        else if (this.#request?.stream === frame.stream) this.#request.outflow.credit(frame.n)
        return
      case kinds.ping:
        message.respond(
          this.#response?.stream === frame.stream ? String(this.#response.inflow.consumed) : goneWord,
        )
    }
  }

  #wire(stream: number): Wire {
    return wireTo(this.#bus, requestSubject(this.#id), stream)
  }

  #onHead({ stream, payload }: Frame): void {
    if (this.#response !== undefined) {
      // The caller has the beginning of another response already.
      if (this.#response.stream !== stream) this.#response.inflow.break('another attempt has begun')
      return
    }
    const head = parseHead(payload)
    if (head === undefined) return
    const inflow = new Inflow(this.#wire(stream))
    this.#response = { stream, inflow }
    this.#answered.resolve({ ...head, body: inflow })
  }

  #onAsked(stream: number): void {
    const wire = this.#wire(stream)
    if (this.#request?.stream === stream) return
    if (this.#request !== undefined || this.#body === undefined) {
      new Outflow(wire).fail('the request’s body went to an attempt before this one')
      return
    }
    const outflow = new Outflow(wire)
    this.#request = { stream, outflow }
    void pump(this.#body, outflow)
  }

  /** No more of the response is taken, nor of the request sent. */
  close(): void {
    this.#request?.outflow.fail('the caller is gone')
    this.#response?.inflow.break('closed')
    this.#answered.resolve(undefined)
    this.#forget()
  }
}

async function pump(body: AsyncIterable<Uint8Array>, outflow: Outflow): Promise<void> {
  try {
    for await (const bytes of body) await outflow.write(bytes)
    outflow.end()
  } catch (error) {
    outflow.fail(error instanceof StreamBroken ? error.message : 'the caller broke the request off')
  }
}

function parseHead(payload: Uint8Array): StreamHead | undefined {
  try {
    return Head.parse(JSON.parse(Buffer.from(payload).toString()))
  } catch {
    return undefined
  }
}

/** All calls whose callers wait at one gateway. */
export class GatewayExchanges {
  readonly #bus: Bus
  readonly #open = new TransientMap<WorkloadId, GatewayExchange>()
  readonly #subscription: Subscription

  constructor(bus: Bus, gatewayId: string) {
    this.#bus = bus
    this.#subscription = bus.listen(allReplies(gatewayId), (message) => {
      const frame = fromFrame(message.data)
      if (frame === undefined) return
      const exchange = this.#open.get(lastToken(message.subject))
      if (exchange !== undefined) exchange.receive(frame, message)
      else if (frame.kind === kinds.ping) message.respond(goneWord)
    })
  }

  /** To be called before the call is published. */
  open(id: WorkloadId): GatewayExchange {
    const exchange = new GatewayExchange(this.#bus, id, () => void this.#open.delete(id))
    this.#open.set(id, exchange)
    return exchange
  }

  get size(): number {
    return this.#open.size
  }

  close(): void {
    this.#subscription.unsubscribe()
    for (const exchange of [...this.#open.values()]) exchange.close()
  }
}

let streams = randomInt(0x1_0000_0000)
const nextStream = (): number => {
  streams = (streams + 1) >>> 0
  return streams
}

/** One attempt at a call, as its runner sees it. Nothing is subscribed to until something is streamed. */
export class RunnerExchange {
  readonly #bus: Bus
  readonly #id: WorkloadId
  readonly #stream = nextStream()
  readonly #wire: Wire
  #subscription: Subscription | undefined
  #request: Inflow | undefined
  #response: Outflow | undefined
  #gone = false

  constructor(bus: Bus, gatewayId: string, id: WorkloadId) {
    this.#bus = bus
    this.#id = id
    this.#wire = wireTo(bus, replySubject(gatewayId, id), this.#stream)
  }

  /** The request’s body; the gateway is asked for it when its first piece is. Throws `StreamBroken`. */
  async *body(): AsyncGenerator<Uint8Array> {
    if (this.#gone) throw new StreamBroken('the caller is gone')
    this.#request = new Inflow(this.#wire)
    this.#listen()
    this.#wire.send(kinds.credit, 0)
    yield* this.#request
  }

  /** Begins the response. Call it once. */
  respond(head: StreamHead): Outflow {
    this.#response = new Outflow(this.#wire)
    if (this.#gone) this.#response.break('the caller is gone')
    else {
      this.#listen()
      this.#wire.send(kinds.head, 0, Buffer.from(JSON.stringify(head)))
    }
    return this.#response
  }

  #listen(): void {
    this.#subscription ??= this.#bus.listen(requestSubject(this.#id), (message) => {
      const frame = fromFrame(message.data)
      if (frame === undefined || frame.stream !== this.#stream) return
      if (frame.kind === kinds.credit) this.#response?.credit(frame.n)
      else if (frame.kind === kinds.ping) message.respond(String(this.#request?.consumed ?? 0))
      else this.#request?.take(frame)
    })
  }

  /** The caller is gone: nobody takes the rest, and no more comes. */
  leave(): void {
    this.#gone = true
    this.#response?.break('the caller is gone')
    this.#request?.break('the caller is gone')
  }

  /** The attempt is over. A response that has not ended by now never will. */
  close(): void {
    this.#response?.fail('the function ended before its response did')
    this.#request?.break('the attempt is over')
    this.#subscription?.unsubscribe()
  }
}
