/**
 * The first code in every isolate: sets up the globals, then calls the user’s handler when told to. Runs there from
 * its own source text: it may use nothing but its parameters and globals. The host’s callbacks stay in this
 * closure, take and give only primitives, and are never handed to the user’s code.
 */
import type { Abortable, MakeAbortable } from './abort.ts'
import type { Logger, Write } from './console.ts'
import type { Inspect } from './inspect.ts'
import type { Timers } from './timers.ts'

/** How a call ended, and the text that goes with it. */
export type DoneKind = 'ok' | 'threw' | 'uncaught' | 'invalid' | 'output_invalid' | 'output_too_large'

export interface Host {
  log: Write
  /** `a`: output or message; `b`: stack; `c`: name of the error. */
  done(kind: DoneKind, a: string, b?: string, c?: string): void
  setTimer(id: number, ms: number, repeat: boolean): void
  clearTimer(id: number): void
  /** The module has been evaluated. */
  loaded(): void
}

export interface Parts {
  makeInspect(): Inspect
  makeConsole(inspect: Inspect, write: Write): Logger
  makeAbort(): MakeAbortable
  makeTimers(
    setTimer: Host['setTimer'],
    clearTimer: Host['clearTimer'],
    isLive: () => boolean,
    onError: (error: unknown) => void,
  ): Timers
}

/**
 * What the host enters by: `call` (ctx JSON, input JSON or undefined, output limit in characters), `timer` (id),
 * `abort` (message).
 */
export type Enter = (operation: 'call' | 'timer' | 'abort', a: unknown, b?: unknown, c?: unknown) => void

export function boot(host: Host, parts: Parts): Enter {
  const { parse, stringify } = JSON
  const { freeze, defineProperty } = Object
  const global = globalThis as Record<string, unknown>

  interface Call {
    input: string | undefined
    ctx: object
    aborter: Abortable
    maxOutput: number
  }
  let handler: unknown
  let isLoaded = false
  let current: Call | undefined

  const inspect = parts.makeInspect()
  const logger = parts.makeConsole(inspect, host.log)
  const newAbortable = parts.makeAbort()
  const fail = (kind: 'threw' | 'uncaught', error: unknown) => {
    const call = current
    if (call !== undefined) describe(call, kind, error)
  }
  const timers = parts.makeTimers(
    host.setTimer,
    host.clearTimer,
    () => current !== undefined,
    (error) => fail('uncaught', error),
  )

  const finish = (call: Call, kind: DoneKind, a: string, b?: string, c?: string) => {
    if (call !== current) return
    current = undefined
    timers.clear()
    host.done(kind, a, b, c)
  }

  const readText = (value: object, key: string): string | undefined => {
    try {
      const text = (value as Record<string, unknown>)[key]
      return typeof text === 'string' ? text : undefined
    } catch {
      return undefined
    }
  }

  const describe = (call: Call, kind: 'threw' | 'uncaught', error: unknown) => {
    if (typeof error === 'string') return finish(call, kind, error)
    if (error === null || typeof error !== 'object') return finish(call, kind, inspect(error))
    const message = readText(error, 'message')
    const stack = readText(error, 'stack')
    if (message === undefined && stack === undefined) return finish(call, kind, inspect(error))
    finish(call, kind, message ?? '', stack, readText(error, 'name'))
  }

  const output = (call: Call, value: unknown) => {
    let text: string | undefined
    try {
      text = value === undefined ? 'null' : stringify(value)
    } catch (error) {
      const message =
        typeof error === 'object' && error !== null ? readText(error, 'message') : inspect(error)
      if (message === 'Invalid string length') return finish(call, 'output_too_large', 'more than 536870912')
      return finish(call, 'output_invalid', message ?? 'unknown error')
    }
    if (text === undefined) return finish(call, 'output_invalid', `a ${typeof value} has no JSON form`)
    // A text of n characters has at least n bytes: what is sent over is worth counting.
    if (text.length > call.maxOutput) return finish(call, 'output_too_large', `${text.length}`)
    finish(call, 'ok', text)
  }

  const refusal = (): string | undefined => {
    if (typeof handler === 'function') return undefined
    const what = 'export default (input, ctx) => output'
    if (handler === undefined) return `the code has no default export; write: ${what}`
    if (typeof handler === 'object' && handler !== null && 'fetch' in handler)
      return `an HTTP handler (export default { fetch }) cannot be run as a workload; write: ${what}`
    return `the default export is not a function but ${typeof handler === 'object' ? inspect(handler, 0) : `a ${typeof handler}`}; write: ${what}`
  }

  const start = async (call: Call) => {
    try {
      const refused = refusal()
      if (refused !== undefined) return finish(call, 'invalid', refused)
      const input = call.input === undefined ? undefined : parse(call.input)
      call.input = undefined
      output(call, await (handler as (input: unknown, ctx: object) => unknown)(input, call.ctx))
    } catch (error) {
      describe(call, 'threw', error)
    }
  }

  const newCall = (ctxText: string, inputText: string | undefined, maxOutput: number): Call => {
    const given = parse(ctxText)
    const aborter = newAbortable((error) => fail('uncaught', error))
    const line =
      (level: number) =>
      (...args: unknown[]) => {
        if (current === call) logger.write(level, args)
      }
    const log = line(1) as unknown as Record<string, unknown>
    log.debug = line(0)
    log.info = line(1)
    log.warn = line(2)
    log.error = line(3)
    const ctx = {
      id: given.id,
      attempt: given.attempt,
      traceparent: given.traceparent,
      env: freeze(given.env),
      signal: aborter.signal,
      log,
    }
    const call: Call = { input: inputText, ctx, aborter, maxOutput }
    return call
  }

  const define = (name: string, value: unknown) =>
    defineProperty(global, name, { value, writable: true, enumerable: false, configurable: true })
  for (const name in timers.globals) define(name, timers.globals[name])
  define('console', logger.console)
  // These would run the user’s code on a thread of their own, when no call is under way.
  delete global.FinalizationRegistry
  delete (Atomics as { waitAsync?: unknown }).waitAsync
  // Taken away again by the module that is evaluated before the user’s: see `sandbox.ts`.
  defineProperty(global, '__vulcan_loaded', {
    configurable: true,
    value: (module: { default?: unknown }) => {
      handler = module.default
      isLoaded = true
      host.loaded()
      if (current !== undefined) void start(current)
    },
  })

  return (operation, a, b, c) => {
    if (operation === 'call') {
      current = newCall(a as string, b as string | undefined, c as number)
      if (isLoaded) void start(current)
    } else if (operation === 'timer') timers.fire(a as number)
    else if (current !== undefined) current.aborter.abort(a as string)
  }
}
