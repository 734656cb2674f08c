/**
 * An isolate with the web APIs in it and a real host on the other side: as small as it can be, without the pool, the
 * pipes and the walls around it. For the tests of the APIs and for `npm run conformance`.
 */
import { randomBytes } from 'node:crypto'
import { createRequire } from 'node:module'
import { setFlagsFromString } from 'node:v8'
import type ivm from 'isolated-vm'
import { makeConsole } from '../../runners/isolate/guest/console.ts'
import { makeInspect } from '../../runners/isolate/guest/inspect.ts'
import { makeTimers } from '../../runners/isolate/guest/timers.ts'
import type { AnswerKind, Bridge, FetchAnswer, FetchHead, Install } from '../../runners/isolate/web/bridge.ts'
import { webBundle } from '../../runners/isolate/web/bundle.ts'
import { isolateFlags } from '../../runners/isolate/web/flags.ts'
import { WebCode } from '../../runners/isolate/web/host.ts'
import { cryptoOperation } from '../../runners/isolate/web/host-crypto.ts'

const isolatedVm = createRequire(import.meta.url)('isolated-vm') as typeof ivm
// As in the sandbox child: room for callbacks from the depth of an isolate’s stack.
setFlagsFromString(isolateFlags)

/** In the isolate: makes the guest’s own globals, then the web APIs. Runs there from its own source text. */
function boot(
  web: { install: Install },
  host: Bridge & {
    log(level: number, text: string): void
    setTimer(id: number, ms: number, repeat: boolean): void
    clearTimer(id: number): void
  },
  parts: any,
) {
  const global = globalThis as unknown as Record<string, unknown>
  const inspect = parts.makeInspect()
  const uncaught = (error: unknown) => host.log(3, `Uncaught ${inspect(error)}`)
  const timers = parts.makeTimers(host.setTimer, host.clearTimer, () => true, uncaught)
  const define = (name: string, value: unknown) =>
    Object.defineProperty(global, name, { value, writable: true, enumerable: false, configurable: true })
  for (const name in timers.globals) define(name, timers.globals[name])
  define('console', parts.makeConsole(inspect, host.log).console)
  // As the runner’s own boot does.
  delete global.FinalizationRegistry
  const guest = web.install(host, {
    setTimeout: timers.globals.setTimeout,
    clearTimeout: timers.globals.clearTimeout,
    uncaught,
    inspect,
    env: () => ({ MODE: 'test' }),
    log: host.log,
  })
  return { guest, fire: timers.fire as (id: number) => void, lent: Object.values(host) }
}

/** In the isolate: what `evaluate` and the host enter by. */
const enterSource = `(function ({ guest, fire }) {
  return (what, ...args) => what === 'timer' ? fire(args[0]) : guest.receive(what, ...args)
})`

const bootSource = `(function (web, $0, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) {
  const parts = {
    makeInspect: (${makeInspect}),
    makeConsole: (${makeConsole}),
    makeTimers: (${makeTimers}),
  }
  return (${boot})(web, {
    log: $0, setTimer: $1, clearTimer: $2, load: $3, now: $4, random: $5, encode: $6, decode: $7, crypto: $8,
    fetchOpen: $9, fetchSend: $10, fetchEnd: $11, fetchPull: $12, fetchAbort: $13,
  }, parts)
})`

export interface RealmOptions {
  /** Levels 0 to 3, as in `logLevels`. */
  log?(level: number, text: string): void
  memoryMb?: number
  /** Keeps V8’s code from one realm to the next: give the same one. */
  code?: WebCode
}

export async function webCode(): Promise<WebCode> {
  return new WebCode(isolatedVm, (await webBundle()).path)
}

interface Exchange {
  abort: AbortController
  body: ReadableStreamDefaultReader<Uint8Array> | undefined
  send: ReadableStreamDefaultController<Uint8Array> | undefined
}

export class Realm implements Disposable {
  readonly isolate: ivm.Isolate
  readonly context: ivm.Context
  readonly #timers = new Map<number, NodeJS.Timeout>()
  readonly #exchanges = new Map<number, Exchange>()
  readonly #guest: ivm.Reference
  #enter: ivm.Reference | undefined

  constructor(code: WebCode, { log = () => {}, memoryMb = 256 }: RealmOptions = {}) {
    this.isolate = new isolatedVm.Isolate({ memoryLimit: memoryMb })
    this.context = this.isolate.createContextSync()
    const main = this.context.evalSync(bootSource, { reference: true, filename: 'vulcan:guest' })
    const callback = (fn: (...args: any[]) => unknown) => new isolatedVm.Callback(fn)
    const install = code.install(this.isolate, this.context)
    this.#guest = main.applySync(
      undefined,
      [
        install.derefInto({ release: true }),
        callback(log),
        callback((id, ms, repeat) => {
          const fire = () => this.enter('timer', id)
          this.#timers.set(id, repeat ? setInterval(fire, ms) : setTimeout(fire, ms))
        }),
        callback((id) => clearTimeout(this.#timers.get(id))),
        callback((name) => code.load(this.isolate, this.context, name)),
        callback(() => performance.timeOrigin + performance.now()),
        callback((bytes) => new Uint8Array(randomBytes(bytes)).buffer),
        callback((text) => new TextEncoder().encode(text).buffer),
        callback((bytes) => Buffer.from(bytes).toString()),
        callback((id, request, ...buffers) => {
          void cryptoOperation(request, buffers).then((answer) => this.answer('crypto', id, ...answer))
        }),
        callback((id, head, body) => void this.#fetch(id, JSON.parse(head), body)),
        callback((id, bytes) => {
          this.#exchanges.get(id)?.send?.enqueue(bytes)
        }),
        callback((id) => this.#exchanges.get(id)?.send?.close()),
        callback((id) => void this.#pull(id)),
        callback((id) => {
          this.#exchanges.get(id)?.abort.abort()
          this.#exchanges.delete(id)
        }),
      ],
      { result: { reference: true } },
    ) as ivm.Reference
    main.release()
    const enter = this.context.evalSync(enterSource, { reference: true })
    this.#enter = enter.applySync(undefined, [this.#guest.derefInto()], { result: { reference: true } })
    enter.release()
  }

  /**
   * Calls a function, given as text, as the guest’s own code would: with what `install` gave, and copies of arguments.
   * `lent` is in its scope: the functions of the host.
   */
  guest(fn: string, ...args: unknown[]): Promise<unknown> {
    return this.#call(`({ guest, lent }, ...args) => (${fn})(guest, ...args)`, [
      this.#guest.derefInto(),
      ...args,
    ])
  }

  /** Runs user code as the body of an async function; gives a copy of what it returns. */
  evaluate(body: string, ...args: unknown[]): Promise<any> {
    return this.#call(`async (...args) => {${body}\n}`, args)
  }

  /** On this thread: an isolate that is entered from another one can be entered in the midst of a callback. */
  async #call(fn: string, args: unknown[]): Promise<unknown> {
    const settled = Promise.withResolvers<boolean>()
    const call = this.context.evalSync(
      `((settle, ...args) => {
        let result
        const done = (ok, value) => {
          result = value
          settle(ok)
        }
        void (async () => (${fn})(...args))().then(
          (value) => done(true, value),
          (error) => done(false, [error?.name, error?.message, error?.stack].map(String)),
        )
        return () => result
      })`,
      { reference: true },
    )
    const settle = new isolatedVm.Callback((ok: boolean) => settled.resolve(ok))
    const result = call.applySync(undefined, [settle, ...args], {
      arguments: { copy: true },
      result: { reference: true },
    }) as ivm.Reference
    const ok = await settled.promise
    const value = result.applySync(undefined, [], { result: { copy: true } })
    if (ok) return value
    const [name, message, stack] = value as unknown as string[]
    throw Object.assign(new Error(message), { name, stack })
  }

  /** Puts a function of ours on the global object: for tests only. */
  lend(name: string, fn: (...args: any[]) => unknown): void {
    this.context.global.setSync(name, new isolatedVm.Callback(fn))
  }

  /** Runs a classic script. Throws what it throws. */
  script(source: string, filename: string): void {
    this.isolate
      .compileScriptSync(source, { filename })
      .runSync(this.context, { release: true, timeout: 60_000 })
  }

  /** How the host answers: later, because what comes from a callback may still be within it. */
  answer(kind: AnswerKind, ...args: unknown[]): void {
    setImmediate(() => this.enter(kind, ...args))
  }

  enter(what: AnswerKind | 'timer', ...args: unknown[]): void {
    if (this.isolate.isDisposed || this.#enter === undefined) return
    try {
      this.#enter.applySync(undefined, args.length > 0 ? [what, ...args] : [what], {
        arguments: { copy: true },
      })
    } catch {
      // A promise that nobody handled: none of the host’s business here.
    }
  }

  [Symbol.dispose](): void {
    for (const timer of this.#timers.values()) clearTimeout(timer)
    for (const { abort } of this.#exchanges.values()) abort.abort()
    if (!this.isolate.isDisposed) this.isolate.dispose()
  }

  async #fetch(id: number, head: FetchHead, whole: Uint8Array | undefined): Promise<void> {
    const exchange: Exchange = { abort: new AbortController(), body: undefined, send: undefined }
    this.#exchanges.set(id, exchange)
    const streamed = new ReadableStream<Uint8Array>(
      {
        start: (controller) => {
          exchange.send = controller
        },
        pull: () => this.answer('drain', id),
      },
      { highWaterMark: 0 },
    )
    try {
      const response = await fetch(head.url, {
        method: head.method,
        headers: head.headers,
        redirect: head.redirect,
        signal: exchange.abort.signal,
        ...(head.body === 'none' ? {} : { body: head.body === 'whole' ? Buffer.from(whole!) : streamed }),
        duplex: 'half',
      } as RequestInit)
      exchange.body = response.body?.getReader()
      const answer: FetchAnswer = {
        status: response.status,
        statusText: response.statusText,
        headers: [...response.headers],
        url: response.url,
        redirected: response.redirected,
        body: response.body !== null,
      }
      this.answer('head', id, JSON.stringify(answer))
    } catch (error) {
      this.#failed(id, error)
    }
  }

  async #pull(id: number): Promise<void> {
    try {
      const { done, value } = await this.#exchanges.get(id)!.body!.read()
      if (done) this.answer('end', id)
      else this.answer('chunk', id, new Uint8Array(value))
    } catch (error) {
      this.#failed(id, error)
    }
  }

  #failed(id: number, error: unknown): void {
    const cause = (error as Error).cause as (Error & { code?: string }) | undefined
    this.answer('failed', id, cause?.message ?? (error as Error).message, cause?.code ?? '')
  }
}
