/**
 * What goes between a call and the outside while it runs, on the child’s side: the other end of `traffic.ts`. It
 * stands between the callbacks of the isolate and messages; the isolate is only ever entered by `enter`.
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
  requestStream,
  responseStream,
  wholeBytes,
} from '../../shared/guest.ts'
import { Inflow, Outflow, type Piece, routeStream } from '../guest/flows.ts'
import { readFetchHead, readResponseHead } from '../guest/heads.ts'
import type { Operation } from './guest/boot.ts'

/** Sends a message about the call under way. */
export type Send = (kind: Kind, parts: (string | Uint8Array | undefined)[], number?: number) => void
/** Enters the isolate, or waits until it has been left. */
export type EnterLater = (operation: Operation, ...args: unknown[]) => void

interface Fetch {
  /** As the guest counts them; it never uses an id twice. */
  id: number
  up: Outflow | undefined
  down: Inflow | undefined
}

const encoder = new TextEncoder()

export class Exchange {
  readonly #send: Send
  readonly #enter: EnterLater
  /** By number; made by the first. */
  #fetches: Map<number, Fetch> | undefined
  /** Their numbers by the guest’s ids. */
  #numbers: Map<number, number> | undefined
  #lastFetch = 0
  #request: Inflow | undefined
  #response: Outflow | undefined

  constructor(send: Send, enter: EnterLater) {
    this.#send = send
    this.#enter = enter
  }

  /** The request’s body comes piece by piece. */
  expectBody(): void {
    this.#request = new Inflow(this.#post(requestStream))
  }

  /** A message from the runner about the call. */
  handle(message: Message): void {
    if (
      routeStream(
        message,
        (n) => this.#inflow(n),
        (n) => this.#outflow(n),
      )
    )
      return
    const { kind, number, parts } = message
    const text = () => parts[0]?.toString() ?? ''
    switch (kind) {
      case kinds.gone:
        this.#enter('gone')
        break
      case kinds.fetched:
        this.#fetched(number, text())
        break
      case kinds.unfetched:
        this.#answer(number, 'failed', text(), '')
        this.#forget(number)
        break
      default:
        throw new Error(`a message of kind ${kind}`)
    }
  }

  /** The guest wants the next piece of the request’s body. */
  pull(): void {
    this.#request?.take((piece) => {
      if (piece === 'end') this.#enter('body')
      else if ('failed' in piece) this.#enter('body', undefined, piece.failed)
      else this.#enter('body', piece.bytes)
    })
  }

  /** The response begins. Throws `FrameError` where its head cannot be sent. */
  respond(head: string): void {
    if (this.#response !== undefined) throw new FrameError('a second response')
    const checked = readResponseHead(JSON.parse(head))
    this.#response = new Outflow(this.#post(responseStream))
    this.#send(kinds.respond, [JSON.stringify(checked)])
  }

  /** Sends all of a body that is there, then calls `then`. */
  sendWhole(body: Uint8Array, then: () => void): void {
    this.#response!.write(body, () => {
      this.#response!.end()
      then()
    })
  }

  /** True when the next piece is welcome at once; else the guest is told by `drain`. */
  sendPiece(bytes: Uint8Array): boolean {
    let inside = true
    let sent = false
    this.#response?.write(bytes, (wanted) => {
      if (inside && wanted) sent = true
      else this.#enter('drain', wanted)
    })
    inside = false
    return sent
  }

  end(): void {
    this.#response?.end()
  }

  fetchOpen(id: number, headText: string, body: Uint8Array | undefined) {
    let head: FetchHead
    try {
      head = readFetchHead(JSON.parse(headText))
    } catch (error) {
      return this.#enter('web', 'failed', id, `fetch failed: ${(error as Error).message}`, '')
    }
    this.#fetches ??= new Map()
    this.#numbers ??= new Map()
    if (this.#fetches.size >= maxFetches)
      return this.#enter('web', 'failed', id, `fetch failed: more than ${maxFetches} at once`, '')
    const n = ++this.#lastFetch
    const large = head.body === 'whole' && body !== undefined && body.length > wholeBytes
    if (large) head.body = 'stream'
    const up = head.body === 'stream' ? new Outflow(this.#post(fetchUpStream(n))) : undefined
    this.#fetches.set(n, { id, up, down: undefined })
    this.#numbers.set(id, n)
    this.#send(kinds.fetch, [JSON.stringify(head), head.body === 'whole' ? body : undefined], n)
    if (large) up!.write(body!, () => up!.end())
  }

  fetchSend(id: number, bytes: Uint8Array): void {
    this.#byId(id)?.up?.write(bytes, () => this.#enter('web', 'drain', id))
  }

  fetchEnd(id: number): void {
    this.#byId(id)?.up?.end()
  }

  fetchPull(id: number): void {
    const n = this.#numbers?.get(id)
    this.#byId(id)?.down?.take((piece: Piece) => {
      if (typeof piece === 'object' && 'bytes' in piece) return this.#enter('web', 'chunk', id, piece.bytes)
      if (piece === 'end') this.#enter('web', 'end', id)
      else this.#enter('web', 'failed', id, `fetch failed: ${piece.failed}`, '')
      this.#forget(n!)
    })
  }

  fetchAbort(id: number): void {
    const n = this.#numbers?.get(id)
    if (n === undefined) return
    this.#send(kinds.unfetch, [], n)
    this.#forget(n)
  }

  #byId(id: number): Fetch | undefined {
    return this.#fetches?.get(this.#numbers?.get(id) ?? 0)
  }

  #forget(n: number): void {
    const fetch = this.#fetches?.get(n)
    if (fetch === undefined) return
    this.#fetches?.delete(n)
    this.#numbers?.delete(fetch.id)
    fetch.up?.stopped()
  }

  #fetched(n: number, answer: string): void {
    const fetch = this.#fetches?.get(n)
    if (fetch === undefined) return
    const head = JSON.parse(answer) as { body: boolean }
    if (head.body) fetch.down = new Inflow(this.#post(fetchDownStream(n)))
    this.#answer(n, 'head', answer)
    if (!head.body) this.#forget(n)
  }

  #answer(n: number, kind: string, ...args: unknown[]): void {
    const fetch = this.#fetches?.get(n)
    if (fetch !== undefined) this.#enter('web', kind, fetch.id, ...args)
  }

  #post(number: number) {
    return (kind: Kind, part?: string | Uint8Array) =>
      this.#send(kind, part === undefined ? [] : [part], number)
  }

  #inflow(number: number): Inflow | undefined {
    return number === requestStream ? this.#request : this.#fetches?.get(number >> 1)?.down
  }

  #outflow(number: number): Outflow | undefined {
    return number === responseStream ? this.#response : this.#fetches?.get(number >> 1)?.up
  }
}

export const utf8 = (text: string): Uint8Array => encoder.encode(text)
