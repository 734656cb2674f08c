/**
 * The first code in every isolate: sets up the globals, then calls the user’s handler when told to. Runs there from
 * its own source text: it may use nothing but its parameters and globals. The host’s callbacks stay in this
 * closure, take and give only primitives and bytes, and are never handed to the user’s code.
 */
import type { BodyReader, Bridge, Install, Puller, RequestHead, WebGuest } from '../web/bridge.ts'
import type { Logger, Write } from './console.ts'
import type { Inspect } from './inspect.ts'
import type { OpenSpan, SpanHost, Traced } from './spans.ts'
import type { Timers } from './timers.ts'

/** How a call ended, and what goes with it. */
export type DoneKind =
  | 'ok'
  | 'response'
  | 'responded'
  | 'threw'
  | 'uncaught'
  | 'invalid'
  | 'output_invalid'
  | 'output_too_large'

export interface Host extends SpanHost {
  log: Write
  /**
   * `a`: output or message; `b`: stack; `c`: name of the error. Of `response`: its head as JSON text, and its body.
   * `responded`: the response has gone out already.
   */
  done(kind: DoneKind, a: string, b?: string | Uint8Array, c?: string): void
  setTimer(id: number, ms: number, repeat: boolean): void
  clearTimer(id: number): void
  /** The module has been evaluated. */
  loaded(): void
  /** The head of the response as JSON text; its whole body, or undefined where `send` and `end` follow. */
  respond(head: string, body?: string | Uint8Array): void
  /** The next piece of the response: true when another is welcome at once, else `drain` says so. */
  send(bytes: Uint8Array): boolean
  /** The response is complete. */
  end(): void
  /** Asks for the next piece of the request’s body, answered by `body`. */
  pull(): void
  /** The query of a URL as JSON text of an object. */
  query(url: string): string
}

export interface Parts {
  makeInspect(): Inspect
  makeConsole(inspect: Inspect, write: Write): Logger
  makeTimers(
    setTimer: Host['setTimer'],
    clearTimer: Host['clearTimer'],
    isLive: () => boolean,
    onError: (error: unknown) => void,
  ): Timers
  makeSpans(host: SpanHost, isLive: (call: Traced) => boolean, describe: (error: unknown) => string): OpenSpan
}

/**
 * What the host enters by: `call` (ctx JSON, input JSON or undefined, output limit in characters), `http` (ctx JSON,
 * output limit, head as JSON text, body as text, bytes, true where it comes piece by piece, or undefined), `timer`
 * (id), `abort` (message), `gone`, `body` (bytes, or undefined at the end; then perhaps why the rest never comes),
 * `drain` (whether more is wanted), `web` (kind, id and what goes with it), `exports` (specifier), which gives the names
 * of the exports of a `node:` module with spaces between them, or undefined where there is none such; and `ahead`,
 * before any call, which makes ready what fetch handlers need.
 */
export type Operation =
  | 'call'
  | 'http'
  | 'ahead'
  | 'timer'
  | 'abort'
  | 'gone'
  | 'body'
  | 'drain'
  | 'web'
  | 'exports'
export type Enter = (operation: Operation, ...args: unknown[]) => string | undefined

export function boot(host: Host, parts: Parts, bridge: Bridge, install: Install): Enter {
  const { parse, stringify } = JSON
  const { freeze, defineProperty, keys } = Object
  const { apply } = Reflect
  const { Promise: BasePromise, Error: BaseError, Uint8Array: Bytes } = globalThis
  const uncurry = Function.prototype.bind.bind(Function.prototype.call) as (
    fn: (...args: never[]) => unknown,
  ) => (...args: unknown[]) => unknown
  const then = uncurry(BasePromise.prototype.then)
  const settled = BasePromise.resolve.bind(BasePromise) as (value: unknown) => Promise<unknown>
  const test = uncurry(RegExp.prototype.test) as (pattern: RegExp, text: string) => boolean
  /** As `application/json; charset=utf-8` or `application/problem+json`. */
  const jsonType = /^[^;]*[/+]json *(?:;|$)/i
  const includes = uncurry(Array.prototype.includes) as (list: readonly unknown[], item: unknown) => boolean
  const join = uncurry(Array.prototype.join) as (list: readonly string[], between: string) => string
  const copyInto = uncurry(Bytes.prototype.set)
  const global = globalThis as Record<string, unknown>

  interface Call extends Traced {
    ctx: { env: Record<string, string> }
    input: string | undefined
    maxOutput: number
    /** `head` parses it when it is first wanted. */
    http: { head: () => RequestHead; body: null | string | Uint8Array | Puller } | undefined
    /** Why it is being stopped, once it is. */
    stopped: string | undefined
    /** Of `ctx.signal`, which is made when it is asked for. */
    aborter: ReturnType<WebGuest['makeAbort']> | undefined
    /** Of `request.signal`, which is made when it is asked for. */
    gone: ReturnType<WebGuest['makeAbort']> | undefined
    /** Its caller has gone away. */
    isGone: boolean
    /** Promises given to `ctx.waitUntil` that have not settled. */
    pending: number
    onIdle: (() => void) | undefined
    onBody: ((bytes: Uint8Array | undefined, failed: string | undefined) => void) | undefined
    onDrain: ((wanted: boolean) => void) | undefined
  }
  let handler: unknown
  let isLoaded = false
  let current: Call | undefined

  const inspect = parts.makeInspect()
  const logger = parts.makeConsole(inspect, host.log)
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

  const openSpan = parts.makeSpans(
    host,
    (call) => call === current,
    (error) => {
      const message = typeof error === 'object' && error !== null ? readText(error, 'message') : undefined
      return message ?? (typeof error === 'string' ? error : inspect(error))
    },
  )

  const finish = (call: Call, kind: DoneKind, a: string, b?: string | Uint8Array, c?: string) => {
    if (call !== current) return
    current = undefined
    timers.clear()
    web.reset()
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

  /** JSON text of what a handler returned; undefined where that has none, and the call has ended. */
  const toJson = (call: Call, value: unknown): string | undefined => {
    let text: string | undefined
    try {
      text = value === undefined ? 'null' : stringify(value)
    } catch (error) {
      const message =
        typeof error === 'object' && error !== null ? readText(error, 'message') : inspect(error)
      if (message === 'Invalid string length') finish(call, 'output_too_large', 'more than 536870912')
      else finish(call, 'output_invalid', message ?? 'unknown error')
      return undefined
    }
    if (text === undefined) {
      finish(call, 'output_invalid', `a ${typeof value} has no JSON form`)
      return undefined
    }
    // A text of n characters has at least n bytes: what is sent over is worth counting.
    if (text.length <= call.maxOutput) return text
    finish(call, 'output_too_large', `${text.length}`)
    return undefined
  }

  const wanted = 'export default (input, ctx) => output, or export default { fetch(request, env, ctx) }'
  const refusal = (): string => {
    if (handler === undefined) return `the code has no default export; write: ${wanted}`
    return `the default export is not a function but ${typeof handler === 'object' ? inspect(handler, 0) : `a ${typeof handler}`}; write: ${wanted}`
  }

  const fetchOf = (): ((...args: unknown[]) => unknown) | undefined => {
    if ((typeof handler !== 'object' && typeof handler !== 'function') || handler === null) return undefined
    const { fetch } = handler as { fetch?: unknown }
    return typeof fetch === 'function' ? (fetch as (...args: unknown[]) => unknown) : undefined
  }

  const untilIdle = (call: Call): Promise<void> =>
    new BasePromise((resolve) => {
      if (call.pending === 0) resolve()
      else call.onIdle = resolve
    })

  const drained = (call: Call): Promise<boolean> =>
    new BasePromise((resolve) => {
      call.onDrain = resolve
    })

  /** All that a body still holds, as one; undefined where it is more than `max` bytes. */
  const collect = async (read: Puller, max: number): Promise<Uint8Array | undefined> => {
    const pieces: Uint8Array[] = []
    let size = 0
    for (;;) {
      const piece = await read()
      if (piece === null) break
      size += piece.length
      if (size > max) return undefined
      pieces[pieces.length] = piece
    }
    const all = new Bytes(size)
    for (let i = 0, at = 0; i < pieces.length; at += pieces[i]!.length, i++) copyInto(all, pieces[i], at)
    return all
  }

  /** Sends the response as fast as it is taken, and asks its stream for no more than that. */
  const stream = async (call: Call, reader: BodyReader) => {
    for (;;) {
      const bytes = await reader.read()
      if (call !== current) return
      if (bytes === null) break
      if (bytes.length === 0 || host.send(new Bytes(bytes))) continue
      if (!(await drained(call))) {
        // Nobody takes the rest: that is the caller’s doing, not the handler’s.
        await reader.cancel()
        return
      }
    }
    host.end()
  }

  const answer = async (call: Call, value: unknown) => {
    const { status, headers, body } = web.readResponse(value)
    const head = stringify({ status, headers })
    const reader = typeof body === 'object' && body !== null && 'read' in body ? body : undefined
    // Copies: a view is handed over with all of the buffer that it looks at.
    const whole =
      reader !== undefined
        ? undefined
        : typeof body === 'object' && body !== null
          ? new Bytes(body as Uint8Array)
          : (body ?? '')
    if (whole !== undefined && call.pending === 0) return finish(call, 'response', head, whole)
    if (call !== current) return
    host.respond(head, whole)
    if (reader !== undefined) await stream(call, reader)
    if (call.pending > 0) await untilIdle(call)
    finish(call, 'responded', '')
  }

  const answerText = (call: Call, status: number, type: string, text: string) =>
    finish(call, 'response', `{"status":${status},"headers":[["content-type","${type}"]]}`, text)

  /** The input of a JSON handler that is called by HTTP; undefined and no call any more where it is none. */
  const inputOf = async (call: Call): Promise<string | undefined> => {
    const { head, body } = call.http!
    if (body === null || body === '') {
      const { method, url } = head()
      return method === 'GET' || method === 'HEAD' ? host.query(url) : undefined
    }
    if (typeof body === 'string') return body
    const bytes = typeof body === 'function' ? (await collect(body, 2 ** 31))! : body
    return bytes.length === 0 ? undefined : bridge.decode(bytes)
  }

  const callJson = async (call: Call) => {
    const text = call.http === undefined ? call.input : await inputOf(call)
    call.input = undefined
    let input: unknown
    if (text !== undefined)
      try {
        input = parse(text)
      } catch (error) {
        if (call.http === undefined) throw error
        const detail = stringify(`the body is not JSON: ${(error as Error).message}`)
        const problem = `{"title":"The body is not JSON","status":400,"detail":${detail}}`
        return answerText(call, 400, 'application/problem+json', problem)
      }
    const value = await (handler as (input: unknown, ctx: object) => unknown)(input, call.ctx)
    const output = toJson(call, value)
    if (output === undefined) return
    if (call.pending > 0) await untilIdle(call)
    if (call.http === undefined) finish(call, 'ok', output)
    else answerText(call, 200, 'application/json', output)
  }

  /** A fetch handler that is invoked with JSON: it gets a POST of that, and what it answers is the output. */
  const fetchJson = async (call: Call, fetch: (...args: unknown[]) => unknown) => {
    const head: RequestHead = {
      method: 'POST',
      url: 'http://localhost/',
      headers: [['content-type', 'application/json']],
    }
    const request = web.makeRequest(
      () => head,
      call.input ?? null,
      () => signalOf(call),
    )
    call.input = undefined
    const response = web.readResponse(await apply(fetch, handler, [request, call.ctx.env, call.ctx]))
    const { body } = response
    let text = ''
    if (typeof body === 'string') text = body
    else if (body !== null) {
      const bytes =
        'read' in body
          ? await collect(() => (body as BodyReader).read(), call.maxOutput)
          : (body as Uint8Array)
      if (bytes === undefined) return finish(call, 'output_too_large', `more than ${call.maxOutput}`)
      text = bridge.decode(bytes)
    }
    if (response.status >= 400)
      throw new BaseError(`the fetch handler answered ${response.status}${text === '' ? '' : `: ${text}`}`)
    let value: unknown = text === '' ? null : text
    for (let i = 0; i < response.headers.length; i++) {
      const header = response.headers[i]!
      if (header[0] === 'content-type' && text !== '' && test(jsonType, header[1])) value = parse(text)
    }
    const output = toJson(call, value)
    if (output === undefined) return
    if (call.pending > 0) await untilIdle(call)
    finish(call, 'ok', output)
  }

  const start = async (call: Call) => {
    try {
      const fetch = fetchOf()
      if (fetch === undefined) {
        if (typeof handler !== 'function') return finish(call, 'invalid', refusal())
        await callJson(call)
      } else if (call.http === undefined) await fetchJson(call, fetch)
      else {
        const { head, body } = call.http
        const request = web.makeRequest(head, body, () => signalOf(call))
        await answer(call, await apply(fetch, handler, [request, call.ctx.env, call.ctx]))
      }
    } catch (error) {
      describe(call, 'threw', error)
    }
  }

  const stopReason = (message: string) => {
    const reason = new BaseError(message)
    defineProperty(reason, 'name', { value: 'AbortError', configurable: true, writable: true })
    return reason
  }

  /** The signal of the request, which its caller’s going away aborts, and the end of the call. */
  const signalOf = (call: Call): object => {
    call.gone = web.makeAbort()
    if (call.isGone) call.gone.abort()
    else if (call.stopped !== undefined) call.gone.abort(stopReason(call.stopped))
    return call.gone.signal
  }

  const newCall = (ctxText: string, maxOutput: number): Call => {
    const given = parse(ctxText)
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
      get signal() {
        if (call.aborter === undefined) {
          call.aborter = web.makeAbort()
          if (call.stopped !== undefined) call.aborter.abort(stopReason(call.stopped))
        }
        return call.aborter.signal
      },
      log,
      waitUntil(promise: unknown) {
        if (call !== current) return
        call.pending++
        const settle = () => {
          call.pending--
          if (call.pending === 0) call.onIdle?.()
        }
        then(settled(promise), settle, (error: unknown) => {
          if (call === current) logger.write(3, ['waitUntil:', error])
          settle()
        })
      },
      passThroughOnException() {},
      span: (name: unknown, fn: unknown, attributes?: unknown) =>
        openSpan(call, undefined, name, fn, attributes),
    }
    const call: Call = {
      ctx,
      traceparent: given.traceparent,
      traced: given.traced === true,
      input: undefined,
      maxOutput,
      http: undefined,
      stopped: undefined,
      aborter: undefined,
      gone: undefined,
      isGone: false,
      pending: 0,
      onIdle: undefined,
      onBody: undefined,
      onDrain: undefined,
    }
    return call
  }

  const pullerOf =
    (call: Call): Puller =>
    () =>
      new BasePromise((resolve, reject) => {
        call.onBody = (bytes, failed) => {
          call.onBody = undefined
          if (failed !== undefined) reject(new BaseError(failed))
          else resolve(bytes ?? null)
        }
        if (call === current) host.pull()
      })

  const define = (name: string, value: unknown) =>
    defineProperty(global, name, { value, writable: true, enumerable: false, configurable: true })
  for (const name in timers.globals) define(name, timers.globals[name])
  define('console', logger.console)
  // These would run the user’s code on a thread of their own, when no call is under way.
  delete global.FinalizationRegistry
  delete (Atomics as { waitAsync?: unknown }).waitAsync
  const noEnv = freeze({})
  const web = install(bridge, {
    setTimeout: timers.globals.setTimeout as (callback: () => void, ms: number) => number,
    clearTimeout: timers.globals.clearTimeout as (id: number) => void,
    uncaught: (error) => fail('uncaught', error),
    inspect,
    env: () => current?.ctx.env ?? noEnv,
    log: host.log,
  })
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
  defineProperty(global, '__vulcan_module', { configurable: true, value: web.module })

  return (operation, ...args) => {
    const call = current
    const { 0: a, 1: b, 2: c, 3: d } = args
    switch (operation) {
      case 'call':
        current = newCall(a as string, c as number)
        current.input = b as string | undefined
        if (isLoaded) void start(current)
        break
      case 'http': {
        const made = newCall(a as string, b as number)
        const body = d === true ? pullerOf(made) : ((d as string | Uint8Array | undefined) ?? null)
        let head: RequestHead | undefined
        made.http = { head: () => (head ??= parse(c as string)), body }
        current = made
        if (isLoaded) void start(made)
        break
      }
      case 'ahead':
        web.loadFetch()
        break
      case 'timer':
        timers.fire(a as number)
        break
      case 'abort':
        if (call === undefined) break
        call.stopped = a as string
        call.aborter?.abort(stopReason(call.stopped))
        call.gone?.abort(stopReason(call.stopped))
        break
      case 'gone':
        if (call === undefined) break
        call.isGone = true
        call.gone?.abort()
        break
      case 'body':
        call?.onBody?.(a as Uint8Array | undefined, b as string | undefined)
        break
      case 'drain':
        call?.onDrain?.(a as boolean)
        break
      case 'web':
        if (call !== undefined) apply(web.receive, undefined, args)
        break
      case 'exports':
        return includes(web.specifiers, a) || includes(web.specifiers, `node:${a}`)
          ? join(keys(web.module(a as string)), ' ')
          : undefined
    }
    return undefined
  }
}
