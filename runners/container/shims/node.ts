/**
 * Runs in a container, around a handler for Node: reads runs from descriptor 4 and answers on descriptor 3, one at a
 * time. Made into one file by `bundle.ts`; runs on Node 18 and newer, with the standard library alone.
 */
import { spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { Socket } from 'node:net'
import { isAbsolute, join } from 'node:path'
import { Writable } from 'node:stream'
import { pathToFileURL } from 'node:url'
import { FrameDecoder } from '../../../shared/frames.ts'
import {
  decodeMessage,
  encodeMessage,
  type Kind,
  kinds,
  type Message,
  maxLineBytes,
  maxRequestBytes,
  type RequestHead,
  type ResponseHead,
  requestStream,
  responseStream,
} from '../../../shared/guest.ts'
import type { HeaderList, LogLevel } from '../../../shared/workload.ts'
import { Inflow, Outflow, routeStream } from '../../guest/flows.ts'
import { readResponseHead } from '../../guest/heads.ts'
import { type DoneHeader, inBox, markOf, type RunContext, type RunHeader } from '../protocol.ts'
import { now, type Span, Spans } from './spans.ts'

const framesIn = 4
const framesOut = 3
const rawOut = 2
/** Exit code where the descriptors are not there any more: EX_SOFTWARE of sysexits.h. */
const lostVoice = 70

/** Bounds of what a thrown error may say, in characters. */
const maxMessage = 16_000
const maxStack = 32_000

// Not imported: that would have Node make its own streams, and the descriptors non-blocking with them.
const { Console } = console
const require = createRequire(import.meta.url)
const { inspect }: typeof import('node:util') = require('node:util')
const sleeper = new Int32Array(new SharedArrayBuffer(4))

/** Waits while the runner is slow to read: this is what holds a flood of lines back. */
function write(fd: number, buffer: Uint8Array): void {
  let at = 0
  while (at < buffer.length) {
    try {
      at += writeSync(fd, buffer, at)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code === 'EPIPE') process.exit(0)
      // The user’s code has closed it: nothing can be said any more.
      if (code !== 'EAGAIN') process.exit(lostVoice)
      Atomics.wait(sleeper, 0, 0, 1)
    }
  }
}

interface Run {
  number: number
  header: RunHeader
  ctx: RunContext
  input: string | undefined
  request: RequestHead | undefined
  /** Whole, piece by piece, or none. */
  body: Buffer | Inflow | null
  out: Outflow | undefined
  /** Of `ctx.signal`. */
  stop: AbortController
  /** Of `request.signal`. */
  gone: AbortController
  /** `now()` when it came. */
  began: number
  /** Spans of the code so far. */
  spans: number
  /** When the handler was called, and when it was through: ms since the run came. */
  called: number | undefined
  through: number | undefined
  /** Promises given to `ctx.waitUntil` that have not settled. */
  pending: number
  onIdle: (() => void) | undefined
}
let current: Run | undefined

const post = (run: Run, kind: Kind, parts: (string | Uint8Array | undefined)[], number = 0) => {
  if (run === current) write(framesOut, encodeMessage(kind, run.number, parts, number))
}
const streamPost = (run: Run, number: number) => (kind: Kind, part?: string | Uint8Array) =>
  post(run, kind, part === undefined ? [] : [part], number)

// ---------------------------------------------------------------------------------------------- spans

const spans = new Spans<Run>({
  post: (run, span) => post(run, kinds.span, [JSON.stringify(span)]),
  isLive: (run) => run === current,
  // Loaded for those that use it.
  newId: () => (require('node:crypto') as typeof import('node:crypto')).randomBytes(8).toString('hex'),
  describe: (error) => described(error).message,
})

/** Whether the code uses the global or has kept it from before: what it sends carries its trace. */
function takeFetch(): void {
  const inner = globalThis.fetch
  if (typeof inner !== 'function') return
  const value = spans.fetchWith(inner, () => current)
  Object.defineProperty(globalThis, 'fetch', { value, writable: true, enumerable: true, configurable: true })
}

/** The handler is called now; what comes of it is passed on. */
async function called(run: Run, call: () => unknown): Promise<unknown> {
  run.called = now() - run.began
  try {
    return await call()
  } finally {
    run.through = now() - run.began
  }
}

// ---------------------------------------------------------------------------------------------- lines

const lineBuffer = Buffer.allocUnsafe(maxLineBytes)

/** Cuts at a whole character. */
function cutLine(text: string): string {
  if (text.length * 3 <= maxLineBytes) return text
  const size = Buffer.byteLength(text)
  if (size <= maxLineBytes) return text
  const kept = lineBuffer.write(text)
  return `${lineBuffer.toString('utf8', 0, kept)} … [line cut: it had ${size} bytes]`
}

function line(level: LogLevel, text: string, stream: 'console' | 'stdout' | 'stderr' = 'console'): void {
  if (current !== undefined) post(current, kinds.log, [level, cutLine(text), stream])
}

let consoleLevel: LogLevel = 'info'
const consoleSink = {
  write(text: string): boolean {
    line(consoleLevel, text.endsWith('\n') ? text.slice(0, -1) : text)
    return true
  },
  on() {},
  once() {},
  removeListener() {},
  listenerCount: () => 1,
} as unknown as NodeJS.WritableStream

const levels: Record<string, LogLevel> = {
  debug: 'debug',
  warn: 'warn',
  error: 'error',
  trace: 'error',
  assert: 'error',
}

/** Each call becomes one line with its level, whatever its text. */
function takeConsole(): void {
  const inner = new Console(consoleSink, consoleSink) as unknown as Record<string, unknown>
  const outer = console as unknown as Record<string, unknown>
  for (const name of Object.keys(console)) {
    const method = inner[name]
    if (typeof method !== 'function' || typeof outer[name] !== 'function' || name === 'Console') continue
    outer[name] = (...args: unknown[]) => {
      const before = consoleLevel
      consoleLevel = levels[name] ?? 'info'
      try {
        return method.apply(inner, args)
      } finally {
        consoleLevel = before
      }
    }
  }
}

/** What is written to the process’s own streams, line by line. */
const partial = { stdout: '', stderr: '' }

/** In the place of Node’s own streams, which would make the descriptors non-blocking, for children too. */
function takeStream(name: 'stdout' | 'stderr', fd: number): void {
  const level = name === 'stdout' ? 'info' : 'error'
  const take = (text: string) => {
    const lines = (partial[name] + text).split('\n')
    partial[name] = lines.pop()!
    for (const one of lines) line(level, one, name)
    if (partial[name].length <= maxLineBytes) return
    line(level, partial[name], name)
    partial[name] = ''
  }
  const stream = new Writable({
    write(chunk: Buffer, _encoding, callback) {
      take(chunk.toString())
      callback()
    },
    // As of Node’s own: they stay open for as long as the process runs.
    destroy(_error, callback) {
      callback(null)
    },
  })
  Object.assign(stream, { fd, end: () => stream, destroy: () => stream })
  Object.defineProperty(process, name, { value: stream, configurable: true, enumerable: true })
}

function flushStreams(): void {
  for (const name of ['stdout', 'stderr'] as const) {
    if (partial[name] !== '') line(name === 'stdout' ? 'info' : 'error', partial[name], name)
    partial[name] = ''
  }
}

// ------------------------------------------------------------------------------------------------ ends

function finish(run: Run, header: DoneHeader, output?: string, body?: string | Uint8Array): void {
  if (run !== current) return
  flushStreams()
  write(rawOut, Buffer.from(markOf(run.header.mark)))
  const { called, through = now() - run.began } = run
  const isTold = run.ctx.traced === true && called !== undefined
  const whole: DoneHeader = isTold ? { ...header, guest: [called, through] } : header
  post(run, kinds.done, [JSON.stringify(whole), output, body])
  current = undefined
}

const failed = (
  cause: NonNullable<DoneHeader['cause']>,
  message: string,
  stack: string | null = null,
): DoneHeader => ({ status: 'failed', cause, message: message.slice(0, maxMessage), stack })
const completed: DoneHeader = { status: 'completed', cause: null, message: null, stack: null }

const textAt = (value: object, key: string): string | undefined => {
  try {
    const text = (value as Record<string, unknown>)[key]
    return typeof text === 'string' ? text : undefined
  } catch {
    return undefined
  }
}

/** Without the frames of this file and of Node’s own below the user’s. */
function userStack(stack: string): string {
  const lines = stack.slice(0, maxStack).split('\n')
  const own = lines.findIndex((text) => text.includes(import.meta.url))
  return lines
    .slice(0, own < 0 ? lines.length : own)
    .filter((text) => !/^\s+at .*\(?node:internal/.test(text))
    .join('\n')
}

function described(error: unknown): { message: string; stack: string | null } {
  if (typeof error === 'string') return { message: error, stack: null }
  if (error === null || typeof error !== 'object') return { message: inspect(error), stack: null }
  const message = textAt(error, 'message')
  const stack = textAt(error, 'stack')
  if (message === undefined && stack === undefined) return { message: inspect(error), stack: null }
  const name = textAt(error, 'name')
  const named = name === undefined || name === 'Error' || name === '' ? message! : `${name}: ${message}`
  return { message: named, stack: stack === undefined ? null : userStack(stack) }
}

function threw(run: Run, error: unknown, worn = false): void {
  const { message, stack } = described(error)
  const header = failed('user_error', message, stack)
  finish(run, worn ? { ...header, worn: true } : header)
}

function tooLarge(run: Run, size: string): void {
  const limit = run.header.output_bytes
  finish(
    run,
    failed('output_too_large', `the output has ${size} bytes, the limit is ${limit} (limits.output_mb)`),
  )
}

/** JSON text of what a handler returned; undefined where that has none, and the run has ended. */
function toJson(run: Run, value: unknown): string | undefined {
  let text: string | undefined
  try {
    text = value === undefined ? 'null' : JSON.stringify(value)
  } catch (error) {
    const { message } = described(error)
    if (message.includes('Invalid string length')) tooLarge(run, 'more than 536870912')
    else finish(run, failed('output_invalid', `the output is not JSON: ${message}`))
    return undefined
  }
  if (text === undefined) {
    finish(run, failed('output_invalid', `the output is not JSON: a ${typeof value} has no JSON form`))
    return undefined
  }
  const size = Buffer.byteLength(text)
  if (size <= run.header.output_bytes) return text
  tooLarge(run, String(size))
  return undefined
}

// --------------------------------------------------------------------------------------------- the code

/** The code cannot be run as it is; `message` says why. */
class InvalidCode extends Error {}

const wanted = 'export default (input, ctx) => output, or export default { fetch(request, env, ctx) }'
const endings = ['mjs', 'js', 'cjs', 'mts', 'ts', 'cts']
const names = ['index', 'src/index', 'main', 'src/main', 'worker', 'src/worker']
const candidates = names.flatMap((name) => endings.map((ending) => `${name}.${ending}`))
const isFile = (path: string) => statSync(path, { throwIfNoEntry: false })?.isFile() === true

function entryOf({ root, entry }: RunHeader): string {
  if (entry !== null) {
    const path = isAbsolute(entry) ? entry : join(root, entry)
    if (!isFile(path)) throw new InvalidCode(`there is no file ${entry} in the source`)
    return path
  }
  const manifest = join(root, 'package.json')
  if (existsSync(manifest)) {
    let named: unknown[]
    try {
      const { module, main } = JSON.parse(readFileSync(manifest, 'utf8'))
      named = [module, main]
    } catch (error) {
      throw new InvalidCode(`package.json is not JSON: ${(error as Error).message}`)
    }
    for (const name of named)
      if (typeof name === 'string')
        for (const path of [name, `${name}.js`, join(name, 'index.js')])
          if (isFile(join(root, path))) return join(root, path)
  }
  const found = candidates.find((path) => isFile(join(root, path)))
  if (found === undefined)
    throw new InvalidCode('no entry file was found: name one as entrypoint, or call it index.js')
  return join(root, found)
}

let handler: unknown
let loading: Promise<void> | undefined

async function load(header: RunHeader): Promise<void> {
  const path = entryOf(header)
  let module: Record<string, unknown>
  try {
    module = await import(pathToFileURL(path).href)
  } catch (error) {
    // Nothing of it has run where no frame of it is on the stack.
    const { code } = error as NodeJS.ErrnoException
    const stack = typeof error === 'object' && error !== null ? (textAt(error, 'stack') ?? '') : ''
    if (error instanceof SyntaxError && !/^\s+at (?!.*node:)/m.test(stack))
      throw new InvalidCode(`SyntaxError: ${error.message}${placeOf(path)}`)
    if (code === 'ERR_INVALID_TYPESCRIPT_SYNTAX' || code === 'ERR_UNSUPPORTED_TYPESCRIPT_SYNTAX')
      throw new InvalidCode(`SyntaxError: ${(error as Error).message}`)
    if (code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND')
      throw new InvalidCode(`${(error as Error).message}${wayToPackages(error as Error, header.root)}`)
    throw error
  }
  const exported = module.default as { default?: unknown; __esModule?: unknown } | undefined
  // What compilers make of an ES module for CommonJS.
  const inner = typeof exported === 'object' && exported?.__esModule ? exported.default : exported
  if (inner === undefined) throw new InvalidCode(`the code has no default export; write: ${wanted}`)
  if (typeof inner !== 'function' && fetchOf(inner) === undefined) {
    const shown = typeof inner === 'object' ? inspect(inner, { depth: 0 }) : `a ${typeof inner}`
    throw new InvalidCode(`the default export is not a function but ${shown}; write: ${wanted}`)
  }
  handler = inner
}

/** For a package that nobody has installed: how it comes here. */
function wayToPackages({ message }: Error, root: string): string {
  const name = /^Cannot find (?:package|module) '(@[^'/]+\/[^'/]+|[^'./@][^'/]*)/.exec(message)?.[1]
  // Into an image nothing is installed.
  if (name === undefined || root !== inBox.workspace || existsSync(join(root, 'node_modules'))) return ''
  return `\n${name} is a package: deploy the code as a function with it in package.json, or bring it in node_modules`
}

/** Where Node finds the code of a file wrong; it tells nobody but whoever reads what it prints. */
function placeOf(path: string): string {
  const { stderr } = spawnSync(process.execPath, ['--check', path], { encoding: 'utf8', timeout: 5_000 })
  const place = /^(?:file:\/\/)?(\/\S+:\d+)$/m.exec(stderr ?? '')?.[1]
  return place === undefined ? '' : ` (${place})`
}

type Handler = (...args: unknown[]) => unknown
const fetchOf = (value: unknown): Handler | undefined => {
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null) return undefined
  const { fetch } = value as { fetch?: unknown }
  return typeof fetch === 'function' ? (fetch as Handler) : undefined
}

// ------------------------------------------------------------------------------------------------ calls

function stopReason(message: string): Error {
  const reason = new Error(message)
  reason.name = 'AbortError'
  return reason
}

function contextOf(run: Run) {
  const log = (level: LogLevel) => {
    const sink = {
      ...consoleSink,
      write(text: string) {
        if (run === current) line(level, text.slice(0, -1))
        return true
      },
    } as unknown as NodeJS.WritableStream
    let inner: Console | undefined
    return (...args: unknown[]) => {
      // Made for those that use it: it costs more than most calls do.
      inner ??= new Console(sink, undefined)
      inner.log(...args)
    }
  }
  const logger = Object.assign(log('info'), {
    debug: log('debug'),
    info: log('info'),
    warn: log('warn'),
    error: log('error'),
  })
  const { id, attempt, traceparent, env } = run.ctx
  return {
    id,
    attempt,
    ...(traceparent === null ? {} : { traceparent }),
    env: Object.freeze(env),
    signal: run.stop.signal,
    log: logger,
    span: <T>(name: unknown, fn: (span: Span) => T, attributes?: unknown): T =>
      spans.run(run, undefined, name, fn, attributes),
    waitUntil(promise: unknown) {
      if (run !== current) return
      run.pending++
      const settle = () => {
        run.pending--
        if (run.pending === 0) run.onIdle?.()
      }
      Promise.resolve(promise).then(settle, (error: unknown) => {
        if (run === current) line('error', `waitUntil: ${inspect(error)}`)
        settle()
      })
    },
    passThroughOnException() {},
  }
}

const untilIdle = (run: Run): Promise<void> =>
  new Promise((resolve) => {
    if (run.pending === 0) resolve()
    else run.onIdle = resolve
  })

/** All of a request’s body; empty where there is none. */
async function collect(body: Run['body']): Promise<Buffer> {
  if (body === null) return Buffer.alloc(0)
  if (body instanceof Buffer) return body
  const pieces: Uint8Array[] = []
  for await (const piece of body as Inflow) pieces.push(piece)
  return Buffer.concat(pieces)
}

function queryOf(url: string): Record<string, string | string[]> {
  const query: Record<string, string | string[]> = Object.create(null)
  for (const [name, value] of new URL(url).searchParams) {
    const present = query[name]
    if (present === undefined) query[name] = value
    else if (typeof present === 'string') query[name] = [present, value]
    else present.push(value)
  }
  return query
}

const responseOf = (status: number, type: string): DoneHeader => ({
  ...completed,
  response: { status, headers: [['content-type', type]] },
})

async function callJson(run: Run): Promise<void> {
  let input: unknown
  if (run.request === undefined) input = run.input === undefined ? undefined : JSON.parse(run.input)
  else {
    const bytes = await collect(run.body)
    const reads = run.request.method === 'GET' || run.request.method === 'HEAD'
    try {
      input = bytes.length > 0 ? JSON.parse(bytes.toString()) : reads ? queryOf(run.request.url) : undefined
    } catch (error) {
      const detail = `the body is not JSON: ${(error as Error).message}`
      const problem = JSON.stringify({ title: 'The body is not JSON', status: 400, detail })
      return finish(run, responseOf(400, 'application/problem+json'), 'null', problem)
    }
  }
  const value = await called(run, () => (handler as Handler)(input, contextOf(run)))
  const output = toJson(run, value)
  if (output === undefined) return
  await untilIdle(run)
  if (run.request === undefined) return finish(run, completed, output)
  const bytes = Buffer.from(output)
  if (bytes.length <= run.header.inline_bytes)
    return finish(run, responseOf(200, 'application/json'), 'null', bytes)
  const { response } = responseOf(200, 'application/json')
  await send(run, response!, bytes)
  finish(run, completed, 'null')
}

interface Answer {
  head: ResponseHead
  body: ReadableStream<Uint8Array> | null
}

function readAnswer(value: unknown): Answer {
  const { status, headers, body } = (value ?? {}) as Partial<Response>
  if (typeof status !== 'number' || typeof headers?.forEach !== 'function' || body === undefined)
    throw new TypeError(`the handler must return a Response, not ${inspect(value, { depth: 0 })}`)
  const list: HeaderList = []
  for (const [name, text] of headers as Iterable<[string, string]>) list.push([name.toLowerCase(), text])
  return { head: { status, headers: list }, body: body as Answer['body'] }
}

/** Sends the head, then all of `bytes`. */
async function send(run: Run, head: ResponseHead, bytes: Uint8Array): Promise<boolean> {
  run.out = new Outflow(streamPost(run, responseStream))
  post(run, kinds.respond, [JSON.stringify(head)])
  if (bytes.length === 0) return true
  const wanted = await new Promise<boolean>((resolve) => run.out!.write(bytes, resolve))
  if (wanted) run.out.end()
  return wanted
}

const later = Symbol('later')
const soon = () => new Promise<typeof later>((resolve) => setImmediate(() => resolve(later)))

function bytesOf(value: unknown): Uint8Array {
  if (value instanceof Uint8Array) return value
  throw new TypeError('the body of the response has a piece that is not bytes')
}

async function answer(run: Run, value: unknown): Promise<void> {
  const { head, body } = readAnswer(value)
  try {
    readResponseHead(head)
  } catch (error) {
    return finish(run, failed('user_error', `the response cannot be sent: ${(error as Error).message}`))
  }
  const reader = body?.getReader()
  const pieces: Uint8Array[] = []
  let size = 0
  let next: ReturnType<ReadableStreamDefaultReader<Uint8Array>['read']> | undefined
  // What is there at once goes with the end; the rest is streamed.
  while (reader !== undefined) {
    next = reader.read()
    const came = await Promise.race([next, soon()])
    if (came === later) break
    next = undefined
    if (came.done) break
    pieces.push(bytesOf(came.value))
    size += came.value.length
    if (size > run.header.inline_bytes) break
    if (run !== current) return
  }
  const whole = next === undefined && size <= run.header.inline_bytes
  if (whole && run.pending === 0)
    return finish(run, { ...completed, response: head }, 'null', Buffer.concat(pieces))
  run.out = new Outflow(streamPost(run, responseStream))
  post(run, kinds.respond, [JSON.stringify(head)])
  const put = (bytes: Uint8Array) =>
    bytes.length === 0 ? true : new Promise<boolean>((resolve) => run.out!.write(bytes, resolve))
  let taken = true
  for (const piece of pieces) taken &&= await put(piece)
  while (!whole && taken && run === current) {
    const came = await (next ?? reader!.read())
    next = undefined
    if (came.done) break
    taken = await put(bytesOf(came.value))
  }
  // Nobody takes the rest: that is the caller’s doing, not the handler’s.
  if (!taken) await reader?.cancel().catch(() => {})
  else run.out.end()
  await untilIdle(run)
  finish(run, completed, 'null')
}

function streamOf(inflow: Inflow): ReadableStream<Uint8Array> {
  return new ReadableStream(
    {
      pull: (controller) =>
        new Promise<void>((resolve) =>
          inflow.take((piece) => {
            if (piece === 'end') controller.close()
            else if ('failed' in piece) controller.error(new TypeError(piece.failed))
            else controller.enqueue(piece.bytes)
            resolve()
          }),
        ),
      cancel: () => inflow.stop(),
    },
    { highWaterMark: 0 },
  )
}

function requestOf(run: Run): Request {
  const { method, url, headers } = run.request!
  const reads = method === 'GET' || method === 'HEAD'
  const signal = AbortSignal.any([run.gone.signal, run.stop.signal])
  if (reads && run.body instanceof Inflow) run.body.stop()
  if (reads || run.body === null) return new Request(url, { method, headers, signal })
  const body = run.body instanceof Inflow ? streamOf(run.body) : run.body
  return new Request(url, { method, headers, signal, body, duplex: 'half' } as RequestInit)
}

/** A fetch handler that is invoked with JSON: it gets a POST of that, and what it answers is the output. */
async function fetchJson(run: Run, fetch: Handler): Promise<void> {
  const request = new Request('http://localhost/', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: run.input ?? null,
    signal: run.stop.signal,
  })
  const answer = await called(run, () => fetch.call(handler, request, run.ctx.env, contextOf(run)))
  const { head, body } = readAnswer(answer)
  const pieces: Uint8Array[] = []
  let size = 0
  const reader = body?.getReader()
  while (reader !== undefined) {
    const came = await reader.read()
    if (came.done) break
    pieces.push(bytesOf(came.value))
    size += came.value.length
    if (size > run.header.output_bytes) {
      reader.cancel().catch(() => {})
      return tooLarge(run, `more than ${run.header.output_bytes}`)
    }
  }
  const text = Buffer.concat(pieces).toString()
  if (head.status >= 400)
    throw new Error(`the fetch handler answered ${head.status}${text === '' ? '' : `: ${text}`}`)
  const type = head.headers.find(([name]) => name === 'content-type')?.[1] ?? ''
  const isJson = text !== '' && /^[^;]*[/+]json *(?:;|$)/i.test(type)
  const output = toJson(run, text === '' ? null : isJson ? JSON.parse(text) : text)
  if (output === undefined) return
  await untilIdle(run)
  finish(run, completed, output)
}

async function start(run: Run): Promise<void> {
  const { root, seed, rehearsal } = run.header
  const files = Object.entries(rehearsal ?? {})
  if (files.length > 0) {
    mkdirSync(root, { recursive: true })
    for (const [name, text] of files) writeFileSync(join(root, name), text)
  }
  if (seed !== undefined) wakeUp(seed, root)
  await perform(run)
  if (rehearsal === undefined) return
  // Before the next run can come.
  if (seed !== undefined) process.chdir('/')
  if (files.length > 0) rmSync(root, { recursive: true, force: true })
  for (const path of Object.keys(require.cache)) if (path.startsWith(root)) delete require.cache[path]
  handler = undefined
  loading = undefined
}

async function perform(run: Run): Promise<void> {
  try {
    if (loading === undefined) Object.assign(process.env, run.ctx.env)
    loading ??= load(run.header)
    await loading
  } catch (error) {
    if (error instanceof InvalidCode)
      return finish(run, { ...failed('invalid_workload', error.message), worn: true })
    return threw(run, error, true)
  }
  try {
    const fetch = fetchOf(handler)
    if (fetch === undefined) await callJson(run)
    else if (run.request === undefined) await fetchJson(run, fetch)
    else {
      const call = () => fetch.call(handler, requestOf(run), run.ctx.env, contextOf(run))
      await answer(run, await called(run, call))
    }
  } catch (error) {
    threw(run, error)
  }
}

// -------------------------------------------------------------------------------------------- snapshots

/**
 * Every copy of a snapshot has the state that V8’s generator had in it, and there is no call that seeds it: so
 * `Math.random` gets one of its own (xoshiro128**, Blackman and Vigna 2018). OpenSSL’s seeds itself.
 */
function wakeUp(seed: string, root: string): void {
  process.chdir(root)
  const bytes = Buffer.from(seed, 'hex')
  let [a, b, c, d] = [0, 4, 8, 12].map((at) => bytes.readInt32LE(at)) as [number, number, number, number]
  const next = (): number => {
    const five = Math.imul(b, 5)
    const result = Math.imul((five << 7) | (five >>> 25), 9)
    const shifted = b << 9
    c ^= a
    d ^= b
    b ^= c
    a ^= d
    c ^= shifted
    d = (d << 11) | (d >>> 21)
    return result
  }
  const { random } = { random: () => ((next() >>> 5) * 67_108_864 + (next() >>> 6)) / 9_007_199_254_740_992 }
  Object.defineProperty(Math, 'random', {
    value: random,
    writable: true,
    enumerable: false,
    configurable: true,
  })
}

// --------------------------------------------------------------------------------------------- messages

function begin({ run: number, parts }: Message): void {
  if (current !== undefined) throw new Error('a run while another is under way')
  const text = (part: Buffer | undefined) => part?.toString()
  const header: RunHeader = JSON.parse(text(parts[0])!)
  const head = text(parts[4])
  const run: Run = {
    number,
    header,
    ctx: JSON.parse(text(parts[1])!),
    input: text(parts[3]),
    request: head === undefined ? undefined : JSON.parse(head),
    // A view of what the socket gave, which it uses again.
    body: parts[5] === undefined ? null : Buffer.from(parts[5]),
    out: undefined,
    stop: new AbortController(),
    gone: new AbortController(),
    began: now(),
    spans: 0,
    called: undefined,
    through: undefined,
    pending: 0,
    onIdle: undefined,
  }
  if (header.follows === true) run.body = new Inflow(streamPost(run, requestStream))
  current = run
  void start(run)
}

function onFrame(frame: Buffer) {
  const message = decodeMessage(frame)
  if (message.kind === kinds.run) return begin(message)
  const run = current
  if (run === undefined || run.number !== message.run) return
  if (message.kind === kinds.cancel) {
    const reason = stopReason(message.parts[0]?.toString() ?? 'the workload was stopped')
    run.stop.abort(reason)
    run.gone.abort(reason)
    // Listeners and what they left to promises have their turn.
    setImmediate(() => finish(run, { ...completed, status: 'stopped' }))
  } else if (message.kind === kinds.gone) run.gone.abort()
  else
    routeStream(
      message,
      (n) => (n === requestStream && run.body instanceof Inflow ? run.body : undefined),
      (n) => (n === responseStream ? run.out : undefined),
    )
}

takeConsole()
takeFetch()
takeStream('stdout', 1)
takeStream('stderr', 2)
process.on('exit', flushStreams)
process.on('uncaughtException', (error) => {
  if (current !== undefined) threw(current, error, true)
  else process.exit(1)
})
process.on('unhandledRejection', (error) => {
  const { message, stack } = described(error)
  line('error', `Unhandled rejection: ${stack ?? message}`)
})

const decoder = new FrameDecoder(maxRequestBytes)

function listen(): void {
  const buffer = Buffer.allocUnsafeSlow(64 * 1024)
  let socket: Socket
  try {
    const onread = {
      buffer,
      callback(size: number) {
        decoder.push(buffer.subarray(0, size), onFrame)
        return true
      },
    }
    socket = new Socket({ fd: framesIn, readable: true, writable: false, onread })
  } catch {
    // Neither a pipe nor a socket: then it can only be read waiting.
    for (;;) {
      const size = readSync(framesIn, buffer)
      if (size === 0) process.exit(0)
      decoder.push(buffer.subarray(0, size), onFrame)
    }
  }
  // The runner is gone.
  socket.on('end', () => process.exit(0))
  socket.on('error', () => process.exit(0))
  socket.resume()
}
listen()
write(framesOut, encodeMessage(kinds.ready, 0, [process.versions.node]))
