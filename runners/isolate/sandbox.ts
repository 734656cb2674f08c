/**
 * One isolate with one user’s code in it, in the sandbox child. Everything runs on the main thread: the isolate is
 * entered, runs until its microtasks are drained, and comes back. Nothing of isolated-vm’s is ever passed in:
 * callbacks take and give primitives only.
 */
import { isUtf8 } from 'node:buffer'
import { randomFillSync } from 'node:crypto'
import type ivm from 'isolated-vm'
import {
  kinds,
  type Message,
  maxSpans,
  maxSpanText,
  type ResponseHead,
  type SpanBegin,
  type SpanEnd,
} from '../../shared/guest.ts'
import { newSpanId } from '../../shared/trace.ts'
import type { Cause } from '../../shared/workload.ts'
import { queryOf, readResponseHead } from '../guest/heads.ts'
import { monotonic } from './clock.ts'
import { InvalidCode, sourceName, stripTypes, syntaxError, userStack } from './compile.ts'
import { Exchange, type Send, utf8 } from './exchange.ts'
import { boot, type DoneKind, type Host, type Operation } from './guest/boot.ts'
import { makeConsole } from './guest/console.ts'
import { makeInspect } from './guest/inspect.ts'
import { makeSpans } from './guest/spans.ts'
import { makeTimers } from './guest/timers.ts'
import type { Bridge } from './web/bridge.ts'
import type { WebCode } from './web/host.ts'

import { cryptoOperation } from './web/host-crypto.ts'

/** Bounds of what a thrown error may say, in characters. */
const maxMessage = 16_000
const maxStack = 32_000

/**
 * An isolate is replaced by a fresh one after this many calls, this many ms, or when its heap has grown to so many
 * times what it was after its first call, and by so many MiB: what user code leaks does not pile up for ever.
 */
const maxCalls = 20_000
const maxAgeMs = 30 * 60_000
const maxGrowth = 4
const maxGrowthMb = 16

/** Timers of one call that may wait at once. */
const maxTimers = 10_000
/** Of what is said of one span, in bytes; where it is more, its attributes are left out. */
const maxSpanBytes = 128 * 1024

/** Code that will most likely have a Request or make a Response. */
const mentionsFetch = /\bfetch\b|\bRe(?:quest|sponse)\b/

/** What the guest may call, in the order in which it is given: see `Host` and `Bridge` there. */
const hostNames = [
  ...['log', 'done', 'setTimer', 'clearTimer', 'loaded'],
  ...['respond', 'send', 'end', 'pull', 'query', 'beginSpan', 'endSpan'],
] as const
const bridgeNames = [
  ...['load', 'now', 'random', 'encode', 'decode', 'crypto'],
  ...['fetchOpen', 'fetchSend', 'fetchEnd', 'fetchPull', 'fetchAbort'],
] as const
const fields = (names: readonly string[], prefix: string) =>
  names.map((name) => `${name}: ${prefix}${name}`).join(', ')

/** In parentheses, which has V8 compile each function at once: so the code cache holds all that booting needs. */
const guestSource = `(function (web, ${[...hostNames.map((name) => `h_${name}`), ...bridgeNames.map((name) => `b_${name}`)].join(', ')}) {
  'use strict'
  const parts = {
    makeInspect: (${makeInspect}),
    makeConsole: (${makeConsole}),
    makeTimers: (${makeTimers}),
    makeSpans: (${makeSpans}),
  }
  return (${boot})({ ${fields(hostNames, 'h_')} }, parts, { ${fields(bridgeNames, 'b_')} }, web.install)
})`
/** Made by the first isolate from our own source, before any user code: booting takes 0.3 ms with it, 1.7 without. */
let guestCache: ivm.ExternalCopy<ArrayBuffer> | undefined

/** Evaluated before the user’s module and those it imports: takes the way back away from the global object. */
const hookSource = `const loaded = globalThis.__vulcan_loaded, module = globalThis.__vulcan_module
delete globalThis.__vulcan_loaded
delete globalThis.__vulcan_module
export { loaded, module }`
/** Evaluated after the user’s module, also when that waits at its top level. */
const mainSource = `import { loaded } from 'vulcan:hook'
import * as user from 'vulcan:user'
loaded(user)`
/** Of the `node:` modules: names of exports by specifier, the same in every isolate. */
const exportsOf = new Map<string, string[]>()

const nodeSource = (specifier: string, names: string[]) =>
  `import { module } from 'vulcan:hook'
const all = module(${JSON.stringify(specifier)})
${names.map((name, i) => `const v${i} = all[${JSON.stringify(name)}]\nexport { v${i} as ${JSON.stringify(name)} }`).join('\n')}`

export type CallEnd =
  | { status: 'completed'; output: string; response?: ResponseHead; body?: string | Uint8Array }
  | { status: 'failed'; cause: Cause; message: string; stack: string | null }

export interface SandboxHost {
  ivm: typeof ivm
  web: WebCode
  /** Level by number, as in `logLevels`. */
  log(level: number, text: string): void
  /** A message about the call under way. */
  send: Send
}

export interface CallOptions {
  /** `{ id, attempt, traceparent, env }` as JSON text. */
  ctx: string
  input: string | undefined
  outputBytes: number
  /** Responses up to this are given with the end. */
  inlineBytes: number
  /** Of a call by HTTP: `RequestHead` as JSON text, and the body where it is whole; true: it follows. */
  request: { head: string; body: Buffer | true | undefined } | undefined
  /** Called once, when the isolate has been left and none of the call’s code can run any more. */
  onEnd: (end: CallEnd) => void
}

export class Sandbox {
  readonly memoryMb: number
  /** False when the isolate must not be used for another call. */
  reusable = true
  readonly #host: SandboxHost
  readonly #isolate: ivm.Isolate
  readonly #context: ivm.Context
  readonly #enterGuest: ivm.Reference
  readonly #timers = new Map<number, NodeJS.Timeout>()
  readonly #later: [Operation, ...unknown[]][] = []
  readonly #madeAt = performance.now()
  #main: ivm.Module | undefined
  #loaded = false
  /** Operations under way on threads of this process. */
  #atWork = 0
  /** The code may use `import()`. */
  #imports = false
  #cpuMs = 0
  #calls = 0
  #firstHeapMb: number | undefined
  #call: CallOptions | undefined
  #exchange: Exchange | undefined
  #end: CallEnd | undefined
  #entered = false
  /** Spans that the call under way has begun. */
  #spans = 0

  constructor(host: SandboxHost, memoryMb: number) {
    const { ivm } = host
    this.#host = host
    this.memoryMb = memoryMb
    // Without `onCatastrophicError`: an isolate entered from the main thread would hang in it for ever. So it
    // aborts the process instead, and the runner reads V8’s last words.
    this.#isolate = new ivm.Isolate({ memoryLimit: memoryMb })
    this.#context = this.#isolate.createContextSync()
    const script = this.#isolate.compileScriptSync(guestSource, {
      filename: 'vulcan:guest',
      ...(guestCache === undefined ? { produceCachedData: true } : { cachedData: guestCache }),
    })
    guestCache ??= (script as ivm.CachedDataResult).cachedData
    const main = script.runSync(this.#context, { reference: true }) as ivm.Reference
    const functions: Host & Bridge = { ...this.#hostFunctions(), ...this.#bridgeFunctions() }
    const callbacks = [...hostNames, ...bridgeNames].map((name) => new ivm.Callback(functions[name]))
    const install = host.web.install(this.#isolate, this.#context).derefInto()
    this.#enterGuest = main.applySync(undefined, [install, ...callbacks], {
      result: { reference: true },
    }) as ivm.Reference
    main.release()
    script.release()
  }

  /** The error to report where one came out of making or compiling: that its memory is spent, where it is. */
  outOfMemory(error: unknown): InvalidCode | undefined {
    if (!this.#isolate.isDisposed && !String(error).includes('Isolate was disposed')) return undefined
    return new InvalidCode(this.#oomMessage(), 'oom')
  }

  /** Whether a call has been made: the first one evaluates the module. */
  get called(): boolean {
    return this.#calls > 0
  }

  /** Whether something that this isolate asked for still goes on outside of it. */
  get atWork(): boolean {
    return this.#atWork > 0
  }

  /** CPU time spent in the isolate so far, in ms. */
  get cpuMs(): number {
    if (!this.#isolate.isDisposed) this.#cpuMs = Number(this.#isolate.cpuTime) / 1e6
    return this.#cpuMs
  }

  /** Memory held by the isolate now, in MiB; null where it is gone. */
  memoryNow(): { heapMb: number; usedMb: number } | null {
    if (this.#isolate.isDisposed) return null
    const heap = this.#isolate.getHeapStatisticsSync()
    const outside = heap.externally_allocated_size + heap.malloced_memory
    return {
      heapMb: (heap.total_heap_size + outside) / 1048576,
      usedMb: (heap.used_heap_size + outside) / 1048576,
    }
  }

  /** Compiles and links; runs none of the user’s code. Throws `InvalidCode`. */
  compile(code: string, typescript: boolean): void {
    const source = typescript ? stripTypes(code) : code
    this.#imports = /\bimport\s*\(/.test(source)
    let user: ivm.Module
    try {
      user = this.#isolate.compileModuleSync(source, { filename: sourceName(typescript) })
    } catch (error) {
      if ((error as Error).name === 'SyntaxError') throw syntaxError(error)
      throw error
    }
    const modules = new Map<string, ivm.Module>()
    for (const specifier of user.dependencySpecifiers) modules.set(specifier, this.#nodeModule(specifier))
    modules.set('vulcan:hook', this.#isolate.compileModuleSync(hookSource, { filename: 'vulcan:hook' }))
    modules.set('vulcan:user', user)
    const main = this.#isolate.compileModuleSync(mainSource, { filename: 'vulcan:main' })
    try {
      main.instantiateSync(this.#context, (specifier) => modules.get(specifier)!)
    } catch (error) {
      if ((error as Error).name === 'SyntaxError') throw syntaxError(error)
      throw error
    }
    this.#main = main
    // Now, while the run may still be on its way, rather than in its first call.
    if (mentionsFetch.test(source)) this.#enterGuest.applySync(undefined, ['ahead'])
  }

  /** Calls the handler, after evaluating the module where this is the first call. */
  call(options: CallOptions): void {
    this.#call = options
    this.#end = undefined
    this.#spans = 0
    this.#calls++
    const { ctx, input, outputBytes, request } = options
    this.#exchange = new Exchange(this.#host.send, (...args) => this.#enter(...args))
    if (request === undefined) this.#enter('call', ctx, input, outputBytes)
    else {
      const { head, body } = request
      if (body === true) this.#exchange.expectBody()
      this.#enter('http', ctx, outputBytes, head, body instanceof Uint8Array ? bodyOf(body) : body)
    }
    const main = this.#main
    if (main !== undefined && this.#call === options) {
      this.#main = undefined
      this.#entered = true
      try {
        main.evaluateSync()
      } catch (error) {
        this.#fault(error)
      }
      this.#leave()
    }
  }

  /** A message from the runner about the call under way. */
  receive(message: Message): void {
    if (this.#call !== undefined) this.#exchange?.handle(message)
  }

  /** Fires `ctx.signal` and `request.signal` of the call under way. */
  abort(message: string): void {
    this.#enter('abort', message)
  }

  /** Whether what the code has left behind is too much, or the isolate has lived long enough. */
  isWorn(heapMb: number): boolean {
    this.#firstHeapMb ??= heapMb
    const grown = heapMb - this.#firstHeapMb
    return (
      this.#calls >= maxCalls ||
      performance.now() - this.#madeAt > maxAgeMs ||
      (grown > maxGrowthMb && heapMb > this.#firstHeapMb * maxGrowth)
    )
  }

  /** Nothing of the user’s runs after this. */
  dispose(): void {
    this.#call = undefined
    this.#exchange = undefined
    this.#later.length = 0
    this.#clearTimers()
    this.reusable = false
    if (!this.#isolate.isDisposed) this.#isolate.dispose()
  }

  #hostFunctions(): Host {
    return {
      log: (level: unknown, text: unknown) => {
        if (typeof level === 'number' && typeof text === 'string') this.#host.log(level, text)
      },
      done: (kind, a, b, c) => this.#done(kind, a, b, c),
      setTimer: (id, ms, repeat) => this.#setTimer(id, ms, repeat),
      clearTimer: (id) => this.#clearTimer(id),
      loaded: () => {
        this.#loaded = true
      },
      respond: (head, body) => this.#respond(head, body),
      send: (bytes) => isBytes(bytes) && (this.#exchange?.sendPiece(bytes) ?? false),
      end: () => this.#exchange?.end(),
      pull: () => this.#exchange?.pull(),
      query: (url) => queryOf(url),
      beginSpan: (name, parent, attributes) => this.#beginSpan(name, parent, attributes),
      endSpan: (id, attributes, error) => this.#endSpan(id, attributes, error),
    }
  }

  #beginSpan(name: unknown, parent: unknown, attributes: unknown): string | undefined {
    if (this.#call === undefined || typeof name !== 'string' || this.#spans >= maxSpans) return undefined
    this.#spans++
    const begun: SpanBegin = { id: newSpanId(), name: name.slice(0, maxSpanText), start: monotonic() }
    if (typeof parent === 'string') begun.parent = parent
    this.#sendSpan(begun, attributes)
    return begun.id
  }

  #endSpan(id: unknown, attributes: unknown, error: unknown): void {
    if (this.#call === undefined || typeof id !== 'string') return
    const ended: SpanEnd = { id, end: monotonic() }
    if (typeof error === 'string') ended.error = error.slice(0, maxSpanText)
    this.#sendSpan(ended, attributes)
  }

  #sendSpan(span: SpanBegin | SpanEnd, attributes: unknown): void {
    const plain = JSON.stringify(span)
    let text = plain
    if (typeof attributes === 'string' && attributes.length <= maxSpanBytes)
      text = JSON.stringify({ ...span, attributes: JSON.parse(attributes) })
    this.#host.send(kinds.span, [Buffer.byteLength(text) <= maxSpanBytes ? text : plain])
  }

  #bridgeFunctions(): Bridge {
    const exchange = () => this.#exchange
    return {
      load: (group) => this.#host.web.load(this.#isolate, this.#context, group),
      now: clock,
      random: (bytes) => randomBytes(bytes),
      encode: (text) => exact(Buffer.from(text)).buffer as ArrayBuffer,
      decode: (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString(),
      crypto: (id, request, ...buffers) => void this.#subtle(id, request, buffers),
      fetchOpen: (id, head, body) => exchange()?.fetchOpen(id, head, body),
      fetchSend: (id, bytes) => {
        if (isBytes(bytes)) exchange()?.fetchSend(id, bytes)
      },
      fetchEnd: (id) => exchange()?.fetchEnd(id),
      fetchPull: (id) => exchange()?.fetchPull(id),
      fetchAbort: (id) => exchange()?.fetchAbort(id),
    }
  }

  async #subtle(id: number, request: string, buffers: ArrayBuffer[]): Promise<void> {
    const mine = this.#exchange
    this.#atWork++
    const answer = await cryptoOperation(request, buffers)
    this.#atWork--
    if (mine !== undefined && mine === this.#exchange) this.#enter('web', 'crypto', id, ...answer)
  }

  /** Enters at once, or when the isolate has been left: what answers a callback must not come from within it. */
  #enter(...args: [Operation, ...unknown[]]): void {
    if (this.#entered) {
      this.#later.push(args)
      return
    }
    let next: [Operation, ...unknown[]] | undefined = args
    while (next !== undefined && !this.#isolate.isDisposed) {
      this.#entered = true
      try {
        if (next.some(isCopied)) this.#enterGuest.applySync(undefined, next, copied)
        else this.#enterGuest.applySync(undefined, next)
      } catch (error) {
        this.#fault(error)
      }
      this.#entered = false
      next = this.#end === undefined ? this.#later.shift() : undefined
    }
    this.#leave()
  }

  /** Reports the end only when the isolate has been left: its microtasks are drained, its timers gone. */
  #leave(): void {
    this.#entered = false
    const call = this.#call
    const end = this.#end
    if (call === undefined) return
    if (end === undefined) {
      const next = this.#later.shift()
      if (next !== undefined) this.#enter(...next)
      return
    }
    this.#call = undefined
    this.#end = undefined
    this.#exchange = undefined
    this.#later.length = 0
    this.#clearTimers()
    call.onEnd(end)
  }

  #nodeModule(specifier: string): ivm.Module {
    let names = exportsOf.get(specifier)
    if (names === undefined) {
      let text: unknown
      try {
        text = this.#enterGuest.applySync(undefined, ['exports', specifier])
      } catch (error) {
        if (this.#isolate.isDisposed) throw error
        throw new InvalidCode(`import of ${JSON.stringify(specifier)}: ${(error as Error).message}`)
      }
      if (typeof text !== 'string')
        throw new InvalidCode(
          `import of ${JSON.stringify(specifier)}: an isolate has only some node: modules to import; bundle what the code needs into one file, or choose another isolation`,
        )
      names = text.split(' ')
      exportsOf.set(specifier, names)
    }
    return this.#isolate.compileModuleSync(nodeSource(specifier, names), { filename: 'vulcan:node' })
  }

  #respond(head: string, body: string | Uint8Array | undefined) {
    const exchange = this.#exchange
    if (exchange === undefined || this.#end !== undefined) return
    try {
      exchange.respond(head)
    } catch (error) {
      this.reusable = false
      return this.#fail('user_error', `the response cannot be sent: ${(error as Error).message}`, null)
    }
    if (body !== undefined) exchange.sendWhole(typeof body === 'string' ? utf8(body) : body, () => {})
  }

  /** A response that is there as a whole: small ones end the call, others when they have been taken. */
  #answer(head: string, body: string | Uint8Array) {
    const { inlineBytes } = this.#call!
    const size = typeof body === 'string' ? Buffer.byteLength(body) : body.length
    const exchange = this.#exchange!
    try {
      if (size <= inlineBytes) {
        const response = readResponseHead(JSON.parse(head))
        this.#end = { status: 'completed', output: 'null', response, body }
        return
      }
      exchange.respond(head)
    } catch (error) {
      return this.#fail('user_error', `the response cannot be sent: ${(error as Error).message}`, null)
    }
    exchange.sendWhole(typeof body === 'string' ? utf8(body) : body, () => {
      if (this.#exchange !== exchange) return
      this.#end = { status: 'completed', output: 'null' }
      if (!this.#entered) this.#leave()
    })
  }

  /** What came out of entering the isolate other than by `done`: its death, or a promise nobody handles. */
  #fault(error: unknown): void {
    const isError = typeof error === 'object' && error !== null
    const message = String((isError ? (error as Error).message : error) ?? error).slice(0, maxMessage)
    if (this.#isolate.isDisposed || message.startsWith('Isolate was disposed')) {
      this.reusable = false
      this.#end = { status: 'failed', cause: 'oom', message: this.#oomMessage(), stack: null }
      return
    }
    const raw = isError ? (error as Error).stack : undefined
    const stack = typeof raw === 'string' ? userStack(raw.slice(0, maxStack)) : null
    if (!this.#loaded) {
      this.reusable = false
      this.#fail('user_error', message, stack, isError ? (error as Error).name : undefined)
      return
    }
    this.#host.log(3, `Unhandled rejection: ${stack ?? message}`)
  }

  #done(kind: DoneKind, a: unknown, b: unknown, c: unknown): void {
    if (this.#call === undefined || this.#end !== undefined || typeof a !== 'string') return
    switch (kind) {
      case 'response':
        if (typeof b === 'string' || isBytes(b)) this.#answer(a, b)
        break
      case 'responded':
        this.#end = { status: 'completed', output: 'null' }
        break
      case 'ok': {
        const size = Buffer.byteLength(a)
        if (size > this.#call.outputBytes) this.#tooLarge(String(size))
        else this.#end = { status: 'completed', output: a }
        break
      }
      case 'threw':
      case 'uncaught':
        // After an exception that nothing caught, nobody knows what state the module is in.
        if (kind === 'uncaught') this.reusable = false
        this.#fail(
          'user_error',
          a.slice(0, maxMessage),
          typeof b === 'string' ? userStack(b.slice(0, maxStack)) : null,
          typeof c === 'string' ? c.slice(0, 200) : undefined,
        )
        break
      case 'invalid':
        this.reusable = false
        this.#fail('invalid_workload', a.slice(0, maxMessage), null)
        break
      case 'output_invalid':
        this.#fail('output_invalid', `the output is not JSON: ${a.slice(0, maxMessage)}`, null)
        break
      case 'output_too_large':
        this.#tooLarge(a.slice(0, 40))
        break
      default:
        throw new Error(`unhandled ${kind satisfies never}`)
    }
    // Comes from outside of any entry only if V8 ran the user’s code by itself: wait until that has let go.
    if (!this.#entered) setImmediate(() => this.#leave())
  }

  #tooLarge(size: string): void {
    const limit = this.#call!.outputBytes
    this.#fail(
      'output_too_large',
      `the output has ${size} bytes, the limit is ${limit} (limits.output_mb)`,
      null,
    )
  }

  #fail(cause: Cause, message: string, stack: string | null, name?: string): void {
    if (name === 'RangeError' && message === 'Array buffer allocation failed') {
      this.reusable = false
      this.#end = { status: 'failed', cause: 'oom', message: `${this.#oomMessage()}: ${message}`, stack }
      return
    }
    // What V8 says where nobody imports for it.
    if (this.#imports && message === 'Not supported' && (name === undefined || name === 'Error'))
      message =
        'import() is not supported in an isolate: bundle what the code needs into one file, or choose another isolation'
    const named = name === undefined || name === 'Error' || name === '' ? message : `${name}: ${message}`
    this.#end = { status: 'failed', cause, message: named, stack }
  }

  #oomMessage(): string {
    return `the code used more than its ${this.memoryMb} MiB of memory (limits.memory_mb)`
  }

  #setTimer(id: number, ms: number, repeat: boolean): void {
    if (this.#call === undefined || this.#end !== undefined) return
    if (this.#timers.size >= maxTimers) throw new RangeError(`more than ${maxTimers} timers at once`)
    const fire = () => {
      if (!repeat) this.#timers.delete(id)
      this.#enter('timer', id)
    }
    this.#timers.set(id, repeat ? setInterval(fire, ms) : setTimeout(fire, ms))
  }

  #clearTimer(id: number): void {
    clearTimeout(this.#timers.get(id))
    this.#timers.delete(id)
  }

  #clearTimers(): void {
    if (this.#timers.size === 0) return
    for (const timer of this.#timers.values()) clearTimeout(timer)
    this.#timers.clear()
  }
}

const isBytes = (value: unknown): value is Uint8Array => value instanceof Uint8Array
/** What isolated-vm hands over only when it is told to copy. */
const isCopied = (value: unknown) => isBytes(value) || value instanceof ArrayBuffer
const copied = { arguments: { copy: true } } as const

/** In memory of its own: isolated-vm copies the whole of what a view looks at. */
const exact = (bytes: Uint8Array): Uint8Array => Uint8Array.prototype.slice.call(bytes)

/** Text where it is UTF-8, which is cheaper to hand over than bytes. */
const bodyOf = (bytes: Buffer): string | Uint8Array => (isUtf8(bytes) ? bytes.toString() : exact(bytes))

/** In steps of 0.1 ms: fine enough for code that times itself, too coarse to time what a cache holds. */
const clock = (): number => Math.floor((performance.timeOrigin + performance.now()) * 10) / 10

function randomBytes(size: unknown): ArrayBuffer {
  const bytes = new Uint8Array(typeof size === 'number' && size >= 0 && size <= 65_536 ? size : 0)
  randomFillSync(bytes)
  return bytes.buffer
}
