/**
 * Entry of a sandbox child: a process that holds isolates and nothing else. It reads runs from its standard input,
 * one at a time, and writes lines and results to its standard output. Argument: path of isolated-vm’s addon.
 */
import { writeSync } from 'node:fs'
import { createRequire } from 'node:module'
import { Socket } from 'node:net'
import { setFlagsFromString } from 'node:v8'
import { FrameDecoder } from '../../shared/frames.ts'
import { InvalidCode } from './compile.ts'
import {
  type DoneHeader,
  decodeMessage,
  encodeMessage,
  type Kind,
  kinds,
  logLevels,
  type Message,
  maxLineBytes,
  maxRequestBytes,
  type RunHeader,
} from './protocol.ts'
import { type CallEnd, Sandbox } from './sandbox.ts'

/** Isolates kept warm, and the memory they may hold together, in MiB. */
const maxWarm = 16
const maxWarmMb = 192

// Isolates overflow their stack long before this process does, so that a callback made from the depth of a
// recursion still has room to work in.
setFlagsFromString('--stack-size=984')
const { ivm } = createRequire(import.meta.url)(process.argv[2]!)

interface Held {
  sandbox: Sandbox
  heapMb: number
}
interface Run {
  number: number
  key: string
  sandbox: Sandbox
  start: 'cold' | 'warm'
  cpuBefore: number
}

/** By key, the longest unused first. */
const warm = new Map<string, Held>()
/** What `prepare` found wrong with the code it was given last. */
let prepareFailed: { key: string; message: string } | undefined
let dropped: string[] = []
let current: Run | undefined

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

const send = (kind: Kind, run: number, parts: (string | undefined)[]) =>
  write(encodeMessage(kind, run, parts))

const lineBuffer = Buffer.allocUnsafe(maxLineBytes)

/** Cuts at a whole character. */
function cutLine(text: string): string {
  if (text.length * 3 <= maxLineBytes) return text
  const size = Buffer.byteLength(text)
  if (size <= maxLineBytes) return text
  const kept = lineBuffer.write(text)
  return `${lineBuffer.toString('utf8', 0, kept)} … [line cut: it had ${size} bytes]`
}

const host = {
  ivm,
  log(level: number, text: string) {
    if (current !== undefined) send(kinds.log, current.number, [logLevels[level] ?? 'info', cutLine(text)])
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
  for (const [key, held] of warm) {
    if (warm.size <= maxWarm && total <= maxWarmMb) return
    if (key === except) continue
    total -= held.heapMb
    drop(key)
  }
}

/** Throws `InvalidCode`. */
function create(header: RunHeader, code: string): Sandbox {
  const sandbox = new Sandbox(host, header.memory_mb)
  try {
    sandbox.compile(code, header.typescript)
  } catch (error) {
    sandbox.dispose()
    throw error
  }
  warm.set(header.key, { sandbox, heapMb: 2 })
  trim(header.key)
  return sandbox
}

function answer(number: number, header: Omit<DoneHeader, 'dropped'>, output?: string): void {
  const text = JSON.stringify({ ...header, dropped })
  if (dropped.length > 0) dropped = []
  current = undefined
  send(kinds.done, number, [text, output])
}

function ended(run: Run, end: CallEnd): void {
  const { sandbox, key, number, start, cpuBefore } = run
  const memory = sandbox.memoryNow()
  // Nearly full is as good as full: the next call would pay for what this one left.
  if (memory === null || memory.usedMb > sandbox.memoryMb * 0.75) sandbox.reusable = false
  const held = warm.get(key)
  if (held !== undefined && memory !== null) held.heapMb = memory.heapMb
  const usage = { cpu_ms: sandbox.cpuMs - cpuBefore, memory_mb: memory?.heapMb ?? sandbox.memoryMb }
  if (!sandbox.reusable) drop(key)
  if (end.status === 'completed')
    answer(
      number,
      { status: 'completed', cause: null, message: null, stack: null, start, ...usage },
      end.output,
    )
  else
    answer(number, {
      status: 'failed',
      cause: end.cause,
      message: end.message,
      stack: end.stack,
      start,
      ...usage,
    })
  trim(key)
}

function refuse(number: number, message: string): void {
  answer(number, {
    status: 'failed',
    cause: 'invalid_workload',
    message,
    stack: null,
    start: 'cold',
    cpu_ms: 0,
    memory_mb: 0,
  })
}

const textOf = (part: Buffer | undefined) => part?.toString('utf8')
const headerOf = (message: Message): RunHeader => JSON.parse(textOf(message.parts[0])!)

function run(message: Message) {
  if (current !== undefined) throw new Error('a run while another is under way')
  const header = headerOf(message)
  const { key } = header
  const number = message.run
  const failed = prepareFailed
  prepareFailed = undefined
  if (failed !== undefined && failed.key === key) return refuse(number, failed.message)
  let held = warm.get(key)
  let start: 'cold' | 'warm' = 'warm'
  if (held === undefined) {
    const code = textOf(message.parts[2])
    if (code === undefined) return send(kinds.need, number, [])
    try {
      create(header, code)
    } catch (error) {
      if (error instanceof InvalidCode) return refuse(number, error.message)
      throw error
    }
    held = warm.get(key)!
  } else {
    // To the end of the line of those that may be dropped.
    warm.delete(key)
    warm.set(key, held)
  }
  const { sandbox } = held
  if (!sandbox.called) start = 'cold'
  const mine: Run = { number, key, sandbox, start, cpuBefore: start === 'cold' ? 0 : sandbox.cpuMs }
  current = mine
  sandbox.call({
    ctx: textOf(message.parts[1])!,
    input: textOf(message.parts[3]),
    outputBytes: header.output_bytes,
    onEnd: (end) => ended(mine, end),
  })
}

function prepare(message: Message): void {
  const header = headerOf(message)
  prepareFailed = undefined
  if (warm.has(header.key)) return
  try {
    create(header, textOf(message.parts[1])!)
  } catch (error) {
    if (!(error instanceof InvalidCode)) throw error
    prepareFailed = { key: header.key, message: error.message }
  }
}

function cancel(message: Message): void {
  const run = current
  if (run === undefined || run.number !== message.run) return
  run.sandbox.abort(textOf(message.parts[0]) ?? 'aborted')
  if (current !== run) return
  const usage = { cpu_ms: run.sandbox.cpuMs - run.cpuBefore, memory_mb: run.sandbox.memoryNow()?.heapMb ?? 0 }
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
}

const decoder = new FrameDecoder(maxRequestBytes)
function onFrame(frame: Buffer): void {
  const message = decodeMessage(frame)
  if (message.kind === kinds.run) run(message)
  else if (message.kind === kinds.prepare) prepare(message)
  else if (message.kind === kinds.cancel) cancel(message)
  else throw new Error(`a message of kind ${message.kind}`)
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
