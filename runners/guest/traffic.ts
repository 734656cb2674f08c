/**
 * What goes between a run and the outside while it runs, on the runner’s side: the bodies of its request and
 * response, and its outgoing fetches. What the child says of them is checked here; `FrameError` means that it lies.
 */
import { FrameError } from '../../shared/frames.ts'
import {
  type FetchHead,
  fetchDownStream,
  fetchUpStream,
  type Kind,
  kinds,
  type Message,
  maxFetches,
  type RequestHead,
  requestStream,
  responseStream,
  wholeBytes,
} from '../../shared/guest.ts'
import { preciseNow } from '../../shared/tracing.ts'
import { EgressDenied, type EgressGate } from '../egress.ts'
import type { ByteSink, ByteSource, Job, RunEvents } from '../runner.ts'
import { Inflow, Outflow, routeStream } from './flows.ts'
import { readFetchHead, readResponseHead } from './heads.ts'
import { UserSpans } from './spans.ts'

/** Sends a message to the child about the run; nothing where that is over. */
export type PostMessage = (kind: Kind, parts: (string | Uint8Array | undefined)[], number: number) => void

/** What is read of the reason for which a child’s stream has failed. */
const maxReasonBytes = 1_000
/** Denials of one run that are remembered; each names another host. */
const maxDenials = 1_000

interface Fetch {
  abort: AbortController
  up: Inflow | undefined
  down: Outflow | undefined
}

/** The request as the child gets it: its head, and its body where that is whole and small. */
export interface Entry {
  head: string
  body: Uint8Array | undefined
}

/** A message’s body that is sent piece by piece. */
async function pump(source: ByteSource, out: Outflow): Promise<void> {
  try {
    for await (const bytes of source)
      if (!(await new Promise<boolean>((resolve) => out.write(bytes, resolve)))) return
    out.end()
  } catch (error) {
    out.fail(String((error as Error)?.message ?? error).slice(0, 1000))
  }
}

async function* counted(source: ByteSource, count: (bytes: number) => void): ByteSource {
  for await (const bytes of source) {
    count(bytes.byteLength)
    yield bytes
  }
}

async function* once(bytes: Uint8Array): ByteSource {
  yield bytes
}

export class Traffic {
  readonly #job: Job
  readonly #events: RunEvents
  readonly #egress: EgressGate | undefined
  readonly #post: PostMessage
  readonly #fetches = new Map<number, Fetch>()
  /** Messages of denials: an uncaught error that says the same is one. */
  readonly #denials = new Set<string>()
  #lastFetch = 0
  #request: Outflow | undefined
  #source: ByteSource | undefined
  #response: Inflow | undefined
  #sink: ByteSink | undefined
  #responded: Promise<void> | undefined
  /** Why the response is not passed on any further, once it is so; and what tells whoever waits for its reader. */
  #cut: string | undefined
  #onCut: ((error: Error) => void) | undefined
  #over = false
  /** Where the run is traced. */
  readonly #spans: UserSpans | undefined
  /** When the run began, ms since the epoch. */
  #began = 0
  /** Bytes of bodies that fetches brought and took. */
  received = 0
  sent = 0

  /**
   * Without `egress` the code has a network of its own, and a fetch is a lie. `clock` makes ms since the epoch of what
   * the guest’s clock says, where that is not ms since it began with the run.
   */
  constructor(
    job: Job,
    events: RunEvents,
    egress: EgressGate | undefined,
    post: PostMessage,
    clock?: (ms: number) => number,
  ) {
    this.#job = job
    this.#events = events
    this.#egress = egress
    this.#post = post
    const { onPhase } = events
    if (job.traced !== true || onPhase === undefined) return
    const earliest = preciseNow()
    const toEpoch = clock ?? ((ms) => this.#began + ms)
    // Within the time that there was, whatever the guest says.
    this.#spans = new UserSpans(onPhase, (ms) => Math.min(Math.max(toEpoch(ms), earliest), preciseNow()))
  }

  /** What of a call by HTTP goes with the run; undefined where it is none. */
  enter(): Entry | undefined {
    const { http } = this.#job
    if (http === undefined) return undefined
    const { method, url, headers, body } = http
    const whole = body instanceof Uint8Array && body.length <= wholeBytes ? body : undefined
    if (body !== null && whole === undefined) this.#source = body instanceof Uint8Array ? once(body) : body
    const head: RequestHead = { method, url, headers }
    return { head: JSON.stringify(head), body: whole }
  }

  /** Whether the request’s body comes piece by piece. */
  get streams(): boolean {
    return this.#source !== undefined
  }

  /** The run has begun: what follows its first message. */
  begin(): void {
    this.#began = preciseNow()
    const gone = this.#job.http?.gone
    if (gone !== undefined) {
      if (gone.aborted) this.#gone()
      else gone.addEventListener('abort', this.#gone)
    }
    if (this.#source === undefined) return
    this.#request = new Outflow(this.#streamPost(requestStream))
    void pump(this.#source, this.#request)
  }

  /** A message of the kinds that concern streams, responses and fetches. Throws `FrameError`. */
  handle(message: Message): void {
    if (
      routeStream(
        message,
        (n) => this.#inflow(n),
        (n) => this.#outflow(n),
        maxReasonBytes,
      )
    )
      return
    const { kind, number, parts } = message
    switch (kind) {
      case kinds.respond:
        this.#respond(parts[0])
        break
      case kinds.fetch:
        this.#fetch(number, parts)
        break
      case kinds.unfetch:
        this.#fetches.get(number)?.abort.abort()
        this.#fetches.delete(number)
        break
      case kinds.span:
        if (this.#spans === undefined) throw new FrameError('a span that nobody asked for')
        this.#spans.handle(readJson(parts[0]))
        break
      default:
        throw new FrameError(`a message of unknown kind ${kind}`)
    }
  }

  /** Whether an uncaught error with this message is a denied fetch. */
  denied(message: string): boolean {
    return this.#denials.has(message)
  }

  /** Whether the head of the response was sent already. */
  get responding(): boolean {
    return this.#sink !== undefined
  }

  /**
   * The code does not run any more: its fetches are aborted, and its request is not read any further. Settles when
   * the response, where one was begun, has been taken or given up. `failed` says why no more of it comes.
   */
  async close(failed: string | undefined): Promise<void> {
    this.#over = true
    this.#spans?.close(preciseNow())
    this.#job.http?.gone.removeEventListener('abort', this.#gone)
    this.#request?.stopped()
    for (const { abort, up, down } of this.#fetches.values()) {
      abort.abort()
      down?.stopped()
      up?.stop()
    }
    this.#fetches.clear()
    if (this.#response === undefined) return
    try {
      this.#response.fail(failed ?? 'the response was not completed')
    } catch {
      // It had its end.
    }
    await this.#responded
  }

  /** The response is not passed on any further, whoever still waits for it. */
  cut(message: string): void {
    this.#cut ??= message
    this.#onCut?.(new Error(this.#cut))
  }

  #gone = () => this.#post(kinds.gone, [], 0)

  #streamPost(number: number) {
    return (kind: Kind, part?: string | Uint8Array) => {
      if (!this.#over) this.#post(kind, part === undefined ? [] : [part], number)
    }
  }

  /** Undefined where the stream was let go of; what is still under way for it means nothing. */
  #inflow(number: number): Inflow | undefined {
    if (number === responseStream) {
      if (this.#response === undefined) throw new FrameError('a response without a head')
      return this.#response
    }
    const fetch = this.#fetchOf(number, fetchUpStream)
    if (fetch !== undefined && fetch.up === undefined)
      throw new FrameError('a body for a fetch that has none')
    return fetch?.up
  }

  #outflow(number: number): Outflow | undefined {
    if (number === requestStream) return this.#request
    return this.#fetchOf(number, fetchDownStream)?.down
  }

  #fetchOf(number: number, streamOf: (n: number) => number): Fetch | undefined {
    const n = number >> 1
    if (n < 1 || n > this.#lastFetch || streamOf(n) !== number)
      throw new FrameError(`a message about stream ${number}, which is none`)
    return this.#fetches.get(n)
  }

  #respond(part: Buffer | undefined): void {
    if (this.#job.http === undefined || this.#sink !== undefined)
      throw new FrameError('a response that nobody asked for')
    const head = readResponseHead(readJson(part))
    const sink = this.#events.respond(head)
    const inflow = new Inflow(this.#streamPost(responseStream))
    this.#sink = sink
    this.#response = inflow
    this.#responded = this.#deliver(inflow, sink)
  }

  async #deliver(inflow: Inflow, sink: ByteSink): Promise<void> {
    try {
      for await (const bytes of inflow)
        await new Promise<void>((resolve, reject) => {
          this.#onCut = reject
          if (this.#cut !== undefined) reject(new Error(this.#cut))
          else sink.write(bytes).then(resolve, reject)
        })
      sink.end()
    } catch (error) {
      // Also where nobody takes it any more: then it is harmless.
      sink.fail((error as Error).message)
    }
  }

  #fetch(n: number, parts: (Buffer | undefined)[]): void {
    const egress = this.#egress
    if (egress === undefined) throw new FrameError('a fetch that is not to be made here')
    if (n !== this.#lastFetch + 1) throw new FrameError('a fetch out of its order')
    this.#lastFetch = n
    const head = readFetchHead(readJson(parts[0]))
    if (this.#fetches.size >= maxFetches) {
      this.#post(kinds.unfetched, [`fetch failed: more than ${maxFetches} at once`], n)
      return
    }
    const body = parts[1]
    const fetch: Fetch = {
      abort: new AbortController(),
      up: head.body === 'stream' ? new Inflow(this.#streamPost(fetchUpStream(n))) : undefined,
      down: undefined,
    }
    this.#fetches.set(n, fetch)
    const whole = body === undefined ? null : Uint8Array.prototype.slice.call(body)
    this.sent += whole?.byteLength ?? 0
    const streamed = fetch.up === undefined ? undefined : counted(fetch.up, (bytes) => (this.sent += bytes))
    void this.#run(egress, n, fetch, head, streamed ?? whole)
  }

  async #run(
    gate: EgressGate,
    n: number,
    fetch: Fetch,
    head: FetchHead,
    body: Uint8Array | ByteSource | null,
  ): Promise<void> {
    const { egress: policy, function: ref, source, traceparent } = this.#job
    const owner = ref?.name ?? (source.kind === 'image' ? source.reference : source.sha256)
    const live = () => !this.#over && this.#fetches.get(n) === fetch
    try {
      const { method, url, headers, redirect } = head
      const { body: answer, ...rest } = await gate.fetch(owner, policy, {
        method,
        url,
        headers,
        redirect,
        body,
        signal: fetch.abort.signal,
        traceparent,
        onPhase: this.#job.traced === true ? this.#events.onPhase : undefined,
      })
      if (!live()) return
      this.#post(kinds.fetched, [JSON.stringify({ ...rest, body: answer !== null })], n)
      if (answer !== null) {
        fetch.down = new Outflow(this.#streamPost(fetchDownStream(n)))
        await pump(
          counted(answer, (bytes) => (this.received += bytes)),
          fetch.down,
        )
      }
    } catch (error) {
      const message = (error as Error).message
      // As the guest’s own TypeError is told: see `Sandbox`.
      if (error instanceof EgressDenied && this.#denials.size < maxDenials)
        this.#denials.add(`TypeError: ${message}`)
      if (live()) this.#post(kinds.unfetched, [message.slice(0, 2000)], n)
    } finally {
      fetch.abort.abort()
      fetch.up?.stop()
      if (this.#fetches.get(n) === fetch) this.#fetches.delete(n)
    }
  }
}

function readJson(part: Buffer | undefined): unknown {
  try {
    return JSON.parse(part!.toString())
  } catch {
    throw new FrameError('a head that is not JSON')
  }
}
