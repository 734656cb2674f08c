/**
 * Entry of a sandbox child: a process that holds isolates and nothing else. It reads runs from its standard input,
 * one at a time, and writes lines and results to its standard output. Arguments: path of isolated-vm’s addon, path of
 * the bundle of web APIs, MiB that the isolates kept warm may hold together.
 */
import { writeSync } from 'node:fs'
import { createRequire } from 'node:module'
import { Socket } from 'node:net'
import { setFlagsFromString } from 'node:v8'
import { FrameDecoder } from '../../shared/frames.ts'
import {
  decodeMessage,
  encodeMessage,
  type Kind,
  kinds,
  logLevels,
  type Message,
  maxLineBytes,
  maxRequestBytes,
} from '../../shared/guest.ts'
import { takeClaim } from './claims.ts'
import { monotonic } from './clock.ts'
import { InvalidCode } from './compile.ts'
import type { DoneHeader, RunHeader } from './protocol.ts'
import { type CallEnd, Sandbox, type SandboxHost } from './sandbox.ts'
import { isolateFlags } from './web/flags.ts'
import { WebCode } from './web/host.ts'

/** Isolates kept warm, however small they are. */
const maxWarm = 128
let maxWarmMb = Number.POSITIVE_INFINITY

// Isolates overflow their stack long before this process does, so that a callback made from the depth of a
// recursion still has room to work in.
setFlagsFromString(isolateFlags)
const { ivm } = createRequire(import.meta.url)(process.argv[2]!)

interface Held {
  sandbox: Sandbox
  heapMb: number
  /** Wanted warm: let go of only when there is nothing else. */
  keep: boolean
  /** Made before its first call was there. */
  early: boolean
  /** How that went, until its first call has told. */
  made: NonNullable<DoneHeader['phases']> | undefined
}
interface Run {
  number: number
  key: string
  sandbox: Sandbox
  start: 'cold' | 'warm'
  cpuBefore: number
  /** By the monotonic clock. */
  startedAt: number
  /** What came before it, where that was for this run. */
  made: NonNullable<DoneHeader['phases']> | undefined
  traced: boolean
}

/** By key, the longest unused first. */
const warm = new Map<string, Held>()
/** What `prepare` found wrong with the code it was given last. */
let prepareFailed: { key: string; message: string; reason: InvalidCode['reason'] } | undefined
let dropped: string[] = []
let current: Run | undefined
/** Runs that came while another was under way, oldest first; each in memory of its own. */
const ahead: Message[] = []
/** The claim that was taken last, where its run has not begun yet. */
let claimed: number | undefined
/** Where claims are: see `claims.ts`. */
const claimsFd = 4

const sleeper = new Int32Array(new SharedArrayBuffer(4))

/** Waits while the runner is slow to read: this is what holds a flood of lines back. */
function write(buffer: Buffer): void {
  let at = 0
  while (at < buffer.length) {
    try {
      at += writeSync(1, buffer, at)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code === 'EPIPE') process.exit(0)
      if (code !== 'EAGAIN') throw error
      Atomics.wait(sleeper, 0, 0, 1)
    }
  }
}

const send = (kind: Kind, run: number, parts: (string | Uint8Array | undefined)[], number = 0) =>
  write(encodeMessage(kind, run, parts, number))

const lineBuffer = Buffer.allocUnsafe(maxLineBytes)

/** Cuts at a whole character. */
function cutLine(text: string): string {
  if (text.length * 3 <= maxLineBytes) return text
  const size = Buffer.byteLength(text)
  if (size <= maxLineBytes) return text
  const kept = lineBuffer.write(text)
  return `${lineBuffer.toString('utf8', 0, kept)} … [line cut: it had ${size} bytes]`
}

const host: SandboxHost = {
  ivm,
  web: new WebCode(ivm, process.argv[3]!),
  log(level: number, text: string) {
    if (current !== undefined) send(kinds.log, current.number, [logLevels[level] ?? 'info', cutLine(text)])
  },
  send(kind, parts, number) {
    if (current !== undefined) send(kind, current.number, parts, number)
  },
}

function drop(key: string): void {
  const held = warm.get(key)
  if (held === undefined) return
  warm.delete(key)
  dropped.push(key)
  held.sandbox.dispose()
}

/** Keeps the isolates within their number and memory; `except` is in use. */
function trim(except: string): void {
  let total = 0
  for (const held of warm.values()) total += held.heapMb
  for (const kept of [false, true])
    for (const [key, held] of warm) {
      if (warm.size <= maxWarm && total <= maxWarmMb) return
      if (key === except || held.keep !== kept) continue
      total -= held.heapMb
      drop(key)
    }
}

/** Throws `InvalidCode`. */
function create(header: RunHeader, code: string): Held {
  const begun = monotonic()
  const sandbox = new Sandbox(host, header.memory_mb)
  const created = monotonic()
  try {
    sandbox.compile(code, header.typescript)
  } catch (error) {
    const reported = sandbox.outOfMemory(error) ?? error
    sandbox.dispose()
    throw reported
  }
  const keep = header.keep === true
  const made: Held['made'] = [
    ['create isolate', begun, created],
    ['compile', created, monotonic()],
  ]
  const held = { sandbox, heapMb: sandbox.memoryNow()?.heapMb ?? 0, keep, early: keep, made }
  warm.set(header.key, held)
  trim(header.key)
  return held
}

function answer(
  number: number,
  header: Omit<DoneHeader, 'dropped'>,
  output?: string,
  body?: string | Uint8Array,
): void {
  const text = JSON.stringify({ ...header, dropped })
  if (dropped.length > 0) dropped = []
  current = undefined
  send(kinds.done, number, [text, output, body])
}

/** To a thousandth: what says more only makes the message longer. */
const round = (amount: number): number => Math.round(amount * 1000) / 1000

/** How long a run took, and of what that consisted. */
function timesOf({ start, startedAt, made, traced }: Run): Pick<DoneHeader, 'wall_ms' | 'phases'> {
  const now = monotonic()
  const wall_ms = round(now - startedAt)
  if (start === 'warm' && !traced) return { wall_ms }
  return { wall_ms, phases: [...(made ?? []), ['guest', startedAt, now]] }
}

function ended(run: Run, end: CallEnd): void {
  const { sandbox, key, number, start, cpuBefore } = run
  const memory = sandbox.memoryNow()
  // Nearly full is as good as full: the next call would pay for what this one left.
  if (memory === null || memory.usedMb > sandbox.memoryMb * 0.75) sandbox.reusable = false
  const held = warm.get(key)
  if (held !== undefined && memory !== null) held.heapMb = memory.heapMb
  const usage = {
    cpu_ms: round(sandbox.cpuMs - cpuBefore),
    memory_mb: round(memory?.heapMb ?? sandbox.memoryMb),
    ...timesOf(run),
  }
  const worn = sandbox.atWork ? { worn: true as const } : {}
  if (sandbox.atWork || (end.status === 'failed' && end.cause === 'oom')) closing = true
  if (!sandbox.reusable || sandbox.isWorn(usage.memory_mb)) drop(key)
  if (end.status === 'completed') {
    const header = { status: end.status, cause: null, message: null, stack: null, start, ...usage, ...worn }
    const { response } = end
    answer(number, response === undefined ? header : { ...header, response }, end.output, end.body)
  } else
    answer(number, {
      status: 'failed',
      cause: end.cause,
      message: end.message,
      stack: end.stack,
      start,
      ...usage,
      ...worn,
    })
  trim(key)
  proceed()
}

function refuse(number: number, { message, reason }: Pick<InvalidCode, 'message' | 'reason'>): void {
  answer(number, {
    status: 'failed',
    cause: reason,
    message,
    stack: null,
    start: 'cold',
    cpu_ms: 0,
    wall_ms: 0,
    memory_mb: 0,
  })
}

const textOf = (part: Buffer | undefined) => part?.toString('utf8')
/** Runs of the same code come with the same header, one after the other. */
let lastHeader: { text: string; header: RunHeader } | undefined
function headerOf(message: Message): RunHeader {
  const text = textOf(message.parts[0])!
  if (lastHeader?.text !== text) lastHeader = { text, header: JSON.parse(text) }
  const { header } = lastHeader!
  maxWarmMb = header.warm_mb
  return header
}

let proceeding = false
/** This process should take no other run. */
let closing = false
/** Goes on with what was sent ahead, as far as the runner has not taken it back. */
function proceed(): void {
  // Runs that end at once would call each other ever deeper.
  if (proceeding || closing) return
  proceeding = true
  while (current === undefined && ahead.length > 0) {
    claimed ??= takeClaim(claimsFd)
    if (claimed === undefined) {
      ahead.length = 0
      break
    }
    const message = ahead.shift()!
    if (message.run !== claimed) continue
    claimed = undefined
    run(message, headerOf(message))
  }
  proceeding = false
}

function run(message: Message, header: RunHeader) {
  const { key } = header
  const number = message.run
  const failed = prepareFailed
  prepareFailed = undefined
  if (failed !== undefined && failed.key === key) return refuse(number, failed)
  let held = warm.get(key)
  let start: 'cold' | 'warm' = 'warm'
  if (held === undefined) {
    const code = textOf(message.parts[2])
    if (code === undefined) return send(kinds.need, number, [])
    try {
      held = create(header, code)
    } catch (error) {
      if (error instanceof InvalidCode) return refuse(number, error)
      throw error
    }
  } else {
    // To the end of the line of those that may be dropped.
    warm.delete(key)
    warm.set(key, held)
  }
  const { sandbox } = held
  const head = textOf(message.parts[4])
  if (!sandbox.called && !held.early) start = 'cold'
  const cpuBefore = start === 'cold' ? 0 : sandbox.cpuMs
  const made = start === 'cold' ? held.made : undefined
  held.made = undefined
  const traced = header.traced === true
  const mine: Run = { number, key, sandbox, start, cpuBefore, startedAt: monotonic(), made, traced }
  current = mine
  sandbox.call({
    ctx: textOf(message.parts[1])!,
    input: textOf(message.parts[3]),
    outputBytes: header.output_bytes,
    inlineBytes: header.inline_bytes,
    request: head === undefined ? undefined : { head, body: header.follows === true || message.parts[5] },
    onEnd: (end) => ended(mine, end),
  })
}

function prepare(message: Message): void {
  const header = headerOf(message)
  prepareFailed = undefined
  const held = warm.get(header.key)
  if (held !== undefined) {
    held.keep = header.keep ?? held.keep
    return
  }
  try {
    create(header, textOf(message.parts[1])!)
  } catch (error) {
    if (!(error instanceof InvalidCode)) throw error
    prepareFailed = { key: header.key, message: error.message, reason: error.reason }
  }
}

function cancel(message: Message): void {
  const run = current
  if (run === undefined || run.number !== message.run) return
  run.sandbox.abort(textOf(message.parts[0]) ?? 'aborted')
  // What goes on outside of the isolate goes on after it: then only the end of the process ends it.
  if (current !== run || run.sandbox.atWork) return
  const usage = {
    cpu_ms: run.sandbox.cpuMs - run.cpuBefore,
    memory_mb: run.sandbox.memoryNow()?.heapMb ?? 0,
    ...timesOf(run),
  }
  run.sandbox.dispose()
  drop(run.key)
  answer(run.number, {
    status: 'stopped',
    cause: null,
    message: null,
    stack: null,
    start: run.start,
    ...usage,
  })
  proceed()
}

const decoder = new FrameDecoder(maxRequestBytes)
function onFrame(frame: Buffer): void {
  const message = decodeMessage(frame)
  if (message.kind === kinds.run) {
    const header = headerOf(message)
    if (header.ahead === true) {
      // Where it begins at once its memory is not needed for longer than that.
      ahead.push(current === undefined ? message : decodeMessage(Buffer.from(frame)))
      proceed()
    } else if (current === undefined) run(message, header)
    else throw new Error('a run while another is under way')
  } else if (message.kind === kinds.prepare) prepare(message)
  else if (message.kind === kinds.cancel) cancel(message)
  else if (current !== undefined && current.number === message.run) current.sandbox.receive(message)
}

const input = new Socket({
  fd: 0,
  readable: true,
  writable: false,
  onread: {
    buffer: Buffer.allocUnsafeSlow(64 * 1024),
    callback(size, buffer) {
      decoder.push((buffer as Buffer).subarray(0, size), onFrame)
      return true
    },
  },
})
// The runner is gone.
input.on('end', () => process.exit(0))
input.on('error', () => process.exit(0))
input.resume()
send(kinds.ready, 0, [process.versions.v8])
