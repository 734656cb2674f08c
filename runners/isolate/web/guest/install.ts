/**
 * Runs in a fresh context before any user code: puts getters on the global object that evaluate a group of APIs when
 * something of it is first touched. Whatever user code does to the language afterwards, the host’s functions stay
 * in this closure: they are held in objects without a prototype, which no setter of the user’s can see into.
 */
import type { AnswerKind, Bridge, GuestServices, WebGuest } from '../bridge.ts'
import type { Host } from './host.ts'

/** Group → globals it defines. */
const table: Record<string, string[]> = {
  events: [
    ...['AbortController', 'AbortSignal', 'CustomEvent', 'DOMException', 'ErrorEvent', 'Event'],
    ...['EventTarget', 'MessageEvent', 'PromiseRejectionEvent', 'QuotaExceededError'],
  ],
  url: ['URL', 'URLSearchParams'],
  urlpattern: ['URLPattern'],
  encoding: ['TextDecoder', 'TextDecoderStream', 'TextEncoder', 'TextEncoderStream'],
  streams: [
    ...['ByteLengthQueuingStrategy', 'CountQueuingStrategy', 'ReadableByteStreamController'],
    ...['ReadableStream', 'ReadableStreamBYOBReader', 'ReadableStreamBYOBRequest'],
    ...['ReadableStreamDefaultController', 'ReadableStreamDefaultReader', 'TransformStream'],
    ...['TransformStreamDefaultController', 'WritableStream', 'WritableStreamDefaultController'],
    'WritableStreamDefaultWriter',
  ],
  compression: ['CompressionStream', 'DecompressionStream'],
  blob: ['Blob', 'File'],
  fetch: ['FormData', 'Headers', 'Request', 'Response', 'fetch'],
  crypto: ['Crypto', 'CryptoKey', 'SubtleCrypto', 'crypto'],
  clone: ['structuredClone'],
  messaging: ['MessageChannel', 'MessagePort'],
  misc: ['Navigator', 'Performance', 'atob', 'btoa', 'navigator', 'performance', 'reportError'],
}
/** Not on the global object, yet named by our own code. */
const hidden: Record<string, string[]> = { node_buffer: ['Buffer'], node_process: ['process'] }
/** `node:` modules: specifier → group. */
const modules: Record<string, string> = {
  assert: 'node_assert',
  'assert/strict': 'node_assert',
  async_hooks: 'node_async_hooks',
  buffer: 'node_buffer',
  events: 'node_events',
  path: 'node_path',
  'path/posix': 'node_path',
  process: 'node_process',
  string_decoder: 'node_string_decoder',
  url: 'node_url',
  util: 'node_util',
}

type Receive = (...args: unknown[]) => void

export function install(bridge: Bridge, services: GuestServices): WebGuest {
  const { defineProperty, create } = Object
  const global = globalThis as unknown as Record<string, unknown>
  const BaseError = Error
  const bare = <T extends object>(values: T): T => {
    const object = create(null)
    for (const key in values)
      defineProperty(object, key, {
        value: values[key],
        writable: true,
        enumerable: true,
        configurable: true,
      })
    return object
  }
  const { load, random, now, crypto, encode, decode } = bridge
  const { fetchOpen, fetchSend, fetchEnd, fetchPull, fetchAbort } = bridge
  const { inspect, log } = services

  const loaded: Record<string, any> = create(null)
  const group = (name: string) => {
    let exports = loaded[name]
    if (exports === undefined) {
      exports = (load(name) as (host: Host, group: (name: string) => any) => unknown)(host, group)
      loaded[name] = exports
    }
    return exports
  }

  /** Operations under way, by number. */
  let waiting: Record<number, Receive> = create(null)
  let last = 0
  const wait = (receive: Receive): number => {
    last++
    waiting[last] = receive
    return last
  }

  const groupOf: Record<string, string> = create(null)
  const web = create(null)
  const origin = (name: string) => {
    const of = groupOf[name]!
    const value = group(of)[name]
    // The bundler renames classes whose names it needs twice.
    if (typeof value === 'function' && value.name !== name)
      defineProperty(value, 'name', { value: name, configurable: true })
    defineProperty(web, name, { value })
    return value
  }
  const lazily = (name: string) => defineProperty(web, name, { configurable: true, get: () => origin(name) })

  const host: Host = bare({
    web,
    now,
    timeOrigin: now(),
    random,
    encode,
    decode,
    inspect,
    log,
    setTimeout: services.setTimeout,
    clearTimeout: services.clearTimeout,
    uncaught: services.uncaught,
    env: services.env,
    fetchSend,
    fetchEnd,
    fetchPull,
    fetchAbort,
    NoRegistry: class {
      register() {}
      unregister() {}
    },
    warn: (message: unknown) => log(2, `Warning: ${inspect(message)}`),
    isA: (name: string) => {
      const of = groupOf[name]!
      return (value: unknown) =>
        typeof value === 'object' && value !== null && loaded[of]?.is[name](value) === true
    },
    crypto: (receive: Receive, request: string, buffers: ArrayBuffer[]) => {
      const id = wait(receive)
      switch (buffers.length) {
        case 0:
          crypto(id, request)
          break
        case 1:
          crypto(id, request, buffers[0]!)
          break
        case 2:
          crypto(id, request, buffers[0]!, buffers[1]!)
          break
        default:
          crypto(id, request, ...buffers)
      }
      return id
    },
    fetchOpen: (receive: Receive, head: string, body: Uint8Array | undefined) => {
      const id = wait(receive)
      if (body === undefined) fetchOpen(id, head)
      else fetchOpen(id, head, body)
      return id
    },
    forget: (id: number) => {
      delete waiting[id]
    },
  }) as never

  for (const of in hidden)
    for (const name of hidden[of]!) {
      groupOf[name] = of
      lazily(name)
    }
  for (const of in table)
    for (const name of table[of]!) {
      groupOf[name] = of
      lazily(name)
      const settle = (value: unknown) =>
        defineProperty(global, name, { value, writable: true, enumerable: false, configurable: true })
      defineProperty(global, name, {
        configurable: true,
        enumerable: false,
        get() {
          const value = origin(name)
          settle(value)
          return value
        },
        set: settle,
      })
    }
  defineProperty(global, 'self', { value: global, writable: true, enumerable: false, configurable: true })

  const nodeModules: Record<string, Record<string, unknown>> = create(null)
  const groupOfModule = bare(modules)
  const specifiers: string[] = []
  for (const name in modules) specifiers[specifiers.length] = `node:${name}`

  return bare({
    receive(kind: AnswerKind, id: number, ...args: unknown[]) {
      const receive = waiting[id]
      if (receive === undefined) return
      if (kind === 'crypto') {
        delete waiting[id]
        receive(...args)
      } else receive(kind, ...args)
    },
    makeRequest: (head: never, body: never, signal: never) => group('fetch').makeRequest(head, body, signal),
    readResponse: (response: unknown) => group('fetch').readResponse(response),
    loadFetch: () => void group('fetch'),
    makeAbort: () => group('events').makeAbort(),
    specifiers,
    module: (specifier: string) => {
      const name = specifier.slice(0, 5) === 'node:' ? specifier.slice(5) : specifier
      let exports = nodeModules[name]
      if (exports === undefined) {
        const of = groupOfModule[name]
        if (of === undefined) throw new BaseError(`an isolate has no module ${specifier}`)
        const made = group(of)
        exports = (name === 'assert/strict' ? made.strictExports : made.exports) as Record<string, unknown>
        nodeModules[name] = exports
      }
      return exports
    },
    reset: () => {
      waiting = create(null)
      loaded.node_async_hooks?.reset()
    },
  }) as unknown as WebGuest
}
