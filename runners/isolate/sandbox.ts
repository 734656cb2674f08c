/**
 * One isolate with one user’s code in it, in the sandbox child. Everything runs on the main thread: the isolate is
 * entered, runs until its microtasks are drained, and comes back. Nothing of isolated-vm’s is ever passed in:
 * callbacks take and give primitives only.
 */
import type ivm from 'isolated-vm'
import type { Cause } from '../../shared/workload.ts'
import { InvalidCode, sourceName, stripTypes, syntaxError, userStack } from './compile.ts'
import { makeAbort } from './guest/abort.ts'
import { boot, type DoneKind } from './guest/boot.ts'
import { makeConsole } from './guest/console.ts'
import { makeInspect } from './guest/inspect.ts'
import { makeTimers } from './guest/timers.ts'

/** Bounds of what a thrown error may say, in characters. */
const maxMessage = 16_000
const maxStack = 32_000

/** An isolate is replaced by a fresh one after this many calls: what user code leaks does not pile up for ever. */
const maxCalls = 1_000

/** Timers of one call that may wait at once. */
const maxTimers = 10_000

/** In parentheses, which has V8 compile each function at once: so the code cache holds all that booting needs. */
const guestSource = `(function ($0, $1, $2, $3, $4) {
  'use strict'
  const parts = {
    makeInspect: (${makeInspect}),
    makeConsole: (${makeConsole}),
    makeAbort: (${makeAbort}),
    makeTimers: (${makeTimers}),
  }
  return (${boot})({ log: $0, done: $1, setTimer: $2, clearTimer: $3, loaded: $4 }, parts)
})`
/** Made by the first isolate from our own source, before any user code: booting takes 0.3 ms with it, 1.7 without. */
let guestCache: ivm.ExternalCopy<ArrayBuffer> | undefined

/** Evaluated before the user’s module: takes the way back away from the global object. */
const hookSource = `const loaded = globalThis.__vulcan_loaded
delete globalThis.__vulcan_loaded
export { loaded }`
/** Evaluated after the user’s module, also when that waits at its top level. */
const mainSource = `import { loaded } from 'vulcan:hook'
import * as user from 'vulcan:user'
loaded(user)`

export type CallEnd =
  | { status: 'completed'; output: string }
  | { status: 'failed'; cause: Cause; message: string; stack: string | null }

export interface SandboxHost {
  ivm: typeof ivm
  /** Level by number, as in `logLevels`. */
  log(level: number, text: string): void
}

export interface CallOptions {
  /** `{ id, attempt, traceparent, env }` as JSON text. */
  ctx: string
  input: string | undefined
  outputBytes: number
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
  #main: ivm.Module | undefined
  #loaded = false
  #cpuMs = 0
  #calls = 0
  #call: CallOptions | undefined
  #end: CallEnd | undefined
  #entered = false

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
    const callbacks = [
      new ivm.Callback((level: unknown, text: unknown) => {
        if (typeof level === 'number' && typeof text === 'string') host.log(level, text)
      }),
      new ivm.Callback((kind: DoneKind, a: string, b?: string, c?: string) => this.#done(kind, a, b, c)),
      new ivm.Callback((id: number, ms: number, repeat: boolean) => this.#setTimer(id, ms, repeat)),
      new ivm.Callback((id: number) => this.#clearTimer(id)),
      new ivm.Callback(() => {
        this.#loaded = true
      }),
    ]
    this.#enterGuest = main.applySync(undefined, callbacks, { result: { reference: true } }) as ivm.Reference
    main.release()
    script.release()
  }

  /** Whether a call has been made: the first one evaluates the module. */
  get called(): boolean {
    return this.#calls > 0
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
    let user: ivm.Module
    try {
      user = this.#isolate.compileModuleSync(source, { filename: sourceName(typescript) })
    } catch (error) {
      if ((error as Error).name === 'SyntaxError') throw syntaxError(error)
      throw error
    }
    const wanted = user.dependencySpecifiers[0]
    if (wanted !== undefined)
      throw new InvalidCode(
        `import of ${JSON.stringify(wanted)}: an isolate has no modules to import; bundle what the code needs into one file, or choose another isolation`,
      )
    const hook = this.#isolate.compileModuleSync(hookSource, { filename: 'vulcan:hook' })
    const main = this.#isolate.compileModuleSync(mainSource, { filename: 'vulcan:main' })
    try {
      main.instantiateSync(this.#context, (specifier) => (specifier === 'vulcan:hook' ? hook : user))
    } catch (error) {
      if ((error as Error).name === 'SyntaxError') throw syntaxError(error)
      throw error
    }
    this.#main = main
  }

  /** Calls the handler, after evaluating the module where this is the first call. */
  call(options: CallOptions): void {
    this.#call = options
    this.#end = undefined
    this.#calls++
    const { ctx, input, outputBytes } = options
    this.#enter(['call', ctx, input, outputBytes])
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

  /** Fires `ctx.signal` of the call under way. */
  abort(message: string): void {
    this.#enter(['abort', message])
  }

  /** Nothing of the user’s runs after this. */
  dispose(): void {
    this.#call = undefined
    this.#clearTimers()
    this.reusable = false
    if (!this.#isolate.isDisposed) this.#isolate.dispose()
  }

  #enter(args: unknown[]): void {
    this.#entered = true
    try {
      this.#enterGuest.applySync(undefined, args)
    } catch (error) {
      this.#fault(error)
    }
    this.#leave()
  }

  /** Reports the end only when the isolate has been left: its microtasks are drained, its timers gone. */
  #leave(): void {
    this.#entered = false
    const call = this.#call
    const end = this.#end
    if (call === undefined || end === undefined) return
    this.#call = undefined
    this.#end = undefined
    this.#clearTimers()
    if (this.#calls >= maxCalls) this.reusable = false
    call.onEnd(end)
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
      this.#enter(['timer', id])
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
