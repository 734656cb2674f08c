/**
 * What the web APIs inside an isolate ask of their host, and what the host tells them. Types only: this file is the
 * contract between the guest’s code (this folder) and whoever stands on the other side of the isolate.
 *
 * Every function of `Bridge` is an `ivm.Callback`: it takes and gives primitives, ArrayBuffers and Uint8Arrays,
 * which isolated-vm copies. Nothing of it is ever handed to the user’s code. Answers come later by `WebGuest.receive`,
 * by which the host enters the isolate; never from within a callback.
 */

/** Header names and values in order; names in lower case, `set-cookie` as often as it was there. */
export type HeaderPairs = [name: string, value: string][]

/** Head of an outgoing request, as JSON text. */
export interface FetchHead {
  method: string
  /** Absolute; http: or https:, without a fragment. */
  url: string
  headers: HeaderPairs
  /** `stream`: it comes by `fetchSend` and `fetchEnd`; `whole`: the third argument of `fetchOpen` is all of it. */
  body: 'none' | 'whole' | 'stream'
  /** `follow`: the host follows, each hop under the egress policy; `error`: it answers `failed`; `manual`: the 3xx itself. */
  redirect: 'follow' | 'error' | 'manual'
}

/** Head of the response to it, as JSON text. */
export interface FetchAnswer {
  status: number
  statusText: string
  /** Of the body as it is delivered: the host has undone the content encoding. */
  headers: HeaderPairs
  /** The last one where redirects were followed. */
  url: string
  redirected: boolean
  /** Whether a body follows; where not, `fetchPull` is not called. */
  body: boolean
}

export interface Bridge {
  /** Evaluates a group of the bundle in this context and gives its function: `WebCode.load` in `host.ts`. */
  load(group: string): unknown
  /** Wall clock in ms since 1970, with as many decimals as the host wants to give. Never goes back. */
  now(): number
  /** So many random bytes; at most 65,536. */
  random(bytes: number): ArrayBuffer
  /** UTF-8 of a long text, lone surrogates replaced: faster than what can be done inside. */
  encode(text: string): ArrayBuffer
  /** The text of long UTF-8, byte order mark kept, errors replaced. */
  decode(bytes: Uint8Array): string
  /**
   * Starts an operation of SubtleCrypto; answered by `crypto`. `request` is JSON text, `buffers` what it refers to
   * by index. `CryptoHost` in `host-crypto.ts` is the other side.
   */
  crypto(call: number, request: string, ...buffers: ArrayBuffer[]): void
  /** Starts an outgoing request; answered by `head` or `failed`. `head` is `FetchHead` as JSON text. */
  fetchOpen(id: number, head: string, body?: Uint8Array): void
  /** One piece of a streamed request body. The next comes only after `drain`. */
  fetchSend(id: number, bytes: Uint8Array): void
  /** The request body is complete. */
  fetchEnd(id: number): void
  /** Asks for one piece of the response body; answered by `chunk`, `end` or `failed`. One at a time. */
  fetchPull(id: number): void
  /** Nobody wants the rest, of request and response: no answer follows. */
  fetchAbort(id: number): void
}

/** What the isolate’s other guest code lends to the web APIs: values of the same context, not of the host. */
export interface GuestServices {
  /** As the timers of this context have it: taken before any user code ran. */
  setTimeout(callback: () => void, ms: number): number
  clearTimeout(id: number): void
  /** An exception that nobody caught: a listener’s, or `reportError`’s. */
  uncaught(error: unknown): void
  /** Shown as `console.log` shows it, for `util.inspect`. */
  inspect(value: unknown, depth?: number): string
  /** Of the call under way; `{}` where there is none. For `process.env`. */
  env(): Record<string, string>
  /** Writes a line at a level (0 debug … 3 error), for what Node prints by itself. */
  log(level: number, text: string): void
}

/** How the host answers, by `WebGuest.receive(kind, id, a, b, …)`. Answers to an unknown id are ignored. */
export interface Answers {
  /** `ok`, then the result as JSON text, then buffers; or `false`, name and message of a DOMException. */
  crypto: [ok: boolean, a: string, ...rest: (string | ArrayBuffer)[]]
  /** `FetchAnswer` as JSON text. */
  head: [answer: string]
  chunk: [bytes: Uint8Array | ArrayBuffer]
  end: []
  /** The request or its response broke off: a TypeError with the message, whose cause has `code` where it is not empty. */
  failed: [message: string, code: string]
  /** The next piece of the request body is welcome. */
  drain: []
}
export type AnswerKind = keyof Answers

/** Gives the next piece of a body, null at its end; rejects where the rest never comes. Called one at a time. */
export type Puller = () => Promise<Uint8Array | null>

export interface RequestHead {
  method: string
  url: string
  headers: HeaderPairs
}

/** What a handler’s Response is made of. */
export interface ReadResponse {
  status: number
  headers: HeaderPairs
  /** Text (sent as UTF-8) or bytes where the body was made from such: nothing is awaited to get at them. */
  body: null | string | Uint8Array | BodyReader
}
export interface BodyReader {
  /** The next piece, null at the end; rejects where the stream errs, or gives what is not bytes. */
  read(): Promise<Uint8Array | null>
  /** Nobody wants the rest. */
  cancel(reason?: unknown): Promise<void>
}

/** What `install` gives back: for the guest’s own code only, never for the user’s. */
export interface WebGuest {
  /** How the host enters. Throws nothing of the user’s. */
  receive(kind: AnswerKind, id: number, ...args: unknown[]): void
  /**
   * The `request` of an HTTP handler. `head` is called when something of it is asked for and gives the same each time,
   * `signal` at most once and gives what `makeAbort` made. A body that is there whole is given as bytes.
   */
  makeRequest(
    head: () => RequestHead,
    body: null | string | Uint8Array | Puller,
    signal: () => object,
  ): object
  /**
   * What to send for the value that a handler returned. Throws a TypeError where that is no Response, or its body
   * is already used. Nothing is awaited; what `read` gives comes from the response’s stream.
   */
  readResponse(response: unknown): ReadResponse
  /** Evaluates what `makeRequest` and `readResponse` are part of, which is done at their first use otherwise. */
  loadFetch(): void
  /** A true AbortSignal and what fires it. Without a reason: a DOMException named AbortError. */
  makeAbort(): { signal: object; abort(reason?: unknown): void }
  /** Specifiers of `modules`, each also without its `node:`. */
  specifiers: readonly string[]
  /** The exports of a `node:` module, `default` among them; made at its first use. */
  module(specifier: string): Record<string, unknown>
  /** The call has ended: forgets what the host will not answer any more. */
  reset(): void
}

/**
 * Sets the globals up in the context where it was evaluated, before any user code, and after the guest’s own globals
 * (`console`, timers, `queueMicrotask`). Captures there what it needs of the language.
 */
export type Install = (bridge: Bridge, services: GuestServices) => WebGuest
