/**
 * The runner’s end of what it says to the agent in a machine: see `shared/machine.ts`. Nothing that comes is trusted:
 * every frame is checked against what was asked and against the windows, so that what a guest makes the runner hold
 * is bounded, and the first frame that is out of place ends the conversation.
 */
import { randomBytes } from 'node:crypto'
import { type Duplex, Readable, Writable } from 'node:stream'
import {
  type Configure,
  encodeMachineFrame,
  type Failed,
  machineKinds as kinds,
  MachineFrameError,
  MachineFrames,
  type MachineKind,
  type MachineUsage,
  type MountSpec,
  machineChunkBytes,
  machineProtocol,
  machineWindowBytes,
  maxMachineFrameBytes,
  type PutHeader,
  type Ready,
  type Start,
  machineStreams as streams,
  type Warm,
} from '../../shared/machine.ts'
import { lineWork, Pace } from '../container/lines.ts'

/** Bytes that may still be sent, or may still come, before there is credit for more. */
export interface Windows {
  stdin: number
  stdout: number
  stderr: number
}

/** The process of a machine has ended. */
export interface ProcessEnd {
  code: number
  oom: boolean
  usage: MachineUsage
}

export interface ChannelOptions {
  /** Of a machine whose process was started before its snapshot; undefined: there is no process yet. */
  running?: Windows | undefined
  /** Called with the bytes of the result, in their order. */
  onResult?(bytes: Uint8Array): void
  /** Once: the guest has broken the protocol, or the channel is closed. Nothing of it is heard any more. */
  onBroken(message: string, isClosed: boolean): void
  onExited(end: ProcessEnd): void
}

/** The agent says that what was asked did not go well. */
export class AgentFailed extends Error {
  override name = 'AgentFailed'
  readonly fault: Failed['fault']
  constructor({ fault, message }: Failed) {
    super(message)
    this.fault = fault
  }
}

/** Characters of a message of the agent that are kept. */
const maxMessage = 2_000
/** A header and its bytes must fit into one frame. */
const putBytes = 64 * 1024
/** Credit is given for so many bytes at once. */
const creditBytes = machineWindowBytes / 4

const answers = {
  configured: kinds.configured,
  mounted: kinds.mounted,
  started: kinds.started,
  usage: kinds.usage,
  pong: kinds.pong,
} as const
type Answer = keyof typeof answers
const answerNames = new Map<number, Answer>(
  Object.entries(answers).map(([name, kind]) => [kind, name as Answer]),
)

interface Question {
  resolve(payload: Uint8Array): void
  reject(error: Error): void
  /** Of a ping. */
  expected?: Buffer
}

export class Channel {
  /** Of the process; bytes are taken as the machine has room for them. */
  readonly stdin: Writable
  readonly stdout: Readable
  readonly stderr: Readable
  /** What the agent said when it was up. Rejects where the channel breaks before. */
  readonly ready: Promise<Ready>
  /** Since `performance.now()` nothing has come. */
  heardAt = performance.now()
  readonly #duplex: Duplex
  readonly #options: ChannelOptions
  readonly #frames = new MachineFrames()
  readonly #pace: Pace
  readonly #open: Record<Answer, Question[]> = {
    configured: [],
    mounted: [],
    started: [],
    usage: [],
    pong: [],
  }
  #onReady: PromiseWithResolvers<Ready> | undefined = Promise.withResolvers<Ready>()
  #state: 'idle' | 'running' | 'exited'
  #broken: string | undefined
  /** A `put` went wrong, and nobody was waiting. */
  #failed: AgentFailed | undefined
  /** Bytes of the result that may still come. */
  #resultLeft = 0
  #sendable: number
  /** Sent and not yet credited. */
  #unconfirmed: number
  #resume: (() => void) | undefined
  readonly #inflows: Map<number, Inflow>

  constructor(duplex: Duplex, options: ChannelOptions) {
    const { running } = options
    this.#duplex = duplex
    this.#options = options
    this.#state = running === undefined ? 'idle' : 'running'
    this.#sendable = running?.stdin ?? machineWindowBytes
    this.#unconfirmed = machineWindowBytes - this.#sendable
    this.ready = this.#onReady!.promise
    this.ready.catch(() => {})
    if (running !== undefined) this.#onReady = undefined
    const inflow = (stream: number, left: number) =>
      new Inflow(left, (bytes) => this.#send(kinds.credit, text(String(bytes)), stream))
    const stdout = inflow(streams.stdout, running?.stdout ?? machineWindowBytes)
    const stderr = inflow(streams.stderr, running?.stderr ?? machineWindowBytes)
    this.stdout = stdout.readable
    this.stderr = stderr.readable
    this.#inflows = new Map([
      [streams.stdout, stdout],
      [streams.stderr, stderr],
    ])
    this.stdin = new Writable({
      write: (chunk: Buffer, _encoding, done) => this.#write(chunk, done),
      final: (done) => {
        this.#send(kinds.end, undefined, streams.stdin)
        done()
      },
    })
    this.stdin.on('error', () => {})
    this.#pace = new Pace(duplex)
    duplex.on('error', () => {})
    duplex.on('data', (chunk: Buffer) => this.#read(chunk))
    const onClose = () => this.#break('the channel to the machine was closed', true)
    duplex.once('close', onClose)
    duplex.once('end', onClose)
  }

  /** How it ended, where it has. */
  get broken(): string | undefined {
    return this.#broken
  }

  /** To go on with after a restore: nothing may be under way. */
  windows(): Windows {
    const left = (stream: number) => this.#inflows.get(stream)!.left
    return { stdin: this.#sendable, stdout: left(streams.stdout), stderr: left(streams.stderr) }
  }

  /** Rejects with `AgentFailed`, or where the channel breaks. */
  async configure(config: Configure): Promise<void> {
    await this.#ask('configured', kinds.configure, json(config))
  }

  async mount(mounts: MountSpec[]): Promise<void> {
    await this.#ask('mounted', kinds.mount, json(mounts))
  }

  async start(start: Start): Promise<void> {
    if (this.#state !== 'idle') throw new Error('a machine has one process')
    this.#state = 'running'
    // One more shows that it is too large.
    this.#resultLeft = start.result === null ? 0 : start.result_bytes + 1
    await this.#ask('started', kinds.start, json(start))
  }

  signal(signal: number): void {
    this.#send(kinds.signal, json({ signal }))
  }

  async usage(): Promise<MachineUsage> {
    const open = this.#open.usage.length
    if (open > 8) throw new Error('it does not answer')
    return readUsage(parse(await this.#ask('usage', kinds.ask)))
  }

  /** Settles when everything that was sent before has been seen by the agent. */
  async ping(): Promise<void> {
    const expected = randomBytes(8)
    await this.#ask('pong', kinds.ping, expected, expected)
  }

  /** Sends a file, directory or link; a `ping` tells that it is there. */
  put(header: PutHeader, content?: Uint8Array): void {
    const head = Buffer.from(`${JSON.stringify(header)}\0`)
    const first = content?.subarray(0, putBytes) ?? new Uint8Array(0)
    if (head.length + first.length + 2 > maxMachineFrameBytes) throw new Error('a path that is too long')
    this.#send(kinds.put, Buffer.concat([head, first]))
    if (content !== undefined)
      for (let at = putBytes; at < content.length; at += putBytes)
        this.#send(kinds.more, content.subarray(at, at + putBytes))
  }

  /** Settles when what was sent has left this process, so that more may follow. */
  async drained(): Promise<void> {
    if (!this.#duplex.writableNeedDrain || this.#broken !== undefined) return
    await new Promise<void>((resolve) => {
      const done = () => {
        this.#duplex.off('drain', done).off('close', done)
        resolve()
      }
      this.#duplex.on('drain', done).on('close', done)
    })
  }

  /** Has the agent ready what a snapshot is to have; a `ping` tells that it has. */
  warm(warm: Warm): void {
    this.#send(kinds.warm, json(warm))
  }

  powerOff(): void {
    this.#send(kinds.off)
  }

  /** Nothing is heard or said any more. */
  close(): void {
    this.#break('it was closed', true)
  }

  // ---------------------------------------------------------------------------------------------- sending

  #send(kind: MachineKind, payload?: Uint8Array, stream?: number): void {
    if (this.#broken !== undefined || this.#duplex.writableEnded || this.#duplex.destroyed) return
    this.#duplex.write(encodeMachineFrame(kind, payload, stream))
  }

  async #ask(
    answer: Answer,
    kind: MachineKind,
    payload?: Uint8Array,
    expected?: Buffer,
  ): Promise<Uint8Array> {
    if (this.#broken !== undefined) throw new Error(this.#broken)
    if (this.#failed !== undefined) throw this.#failed
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>()
    this.#open[answer].push({ resolve, reject, ...(expected === undefined ? {} : { expected }) })
    this.#send(kind, payload)
    return await promise
  }

  /** Bytes of standard input, within the window. */
  #write(chunk: Buffer, done: () => void): void {
    let at = 0
    const go = () => {
      while (at < chunk.length) {
        if (this.#broken !== undefined || this.#state === 'exited') break
        const size = Math.min(this.#sendable, machineChunkBytes, chunk.length - at)
        if (size === 0) {
          this.#resume = go
          return
        }
        this.#sendable -= size
        this.#unconfirmed += size
        this.#send(kinds.data, chunk.subarray(at, at + size), streams.stdin)
        at += size
      }
      // Nobody takes the rest.
      done()
    }
    go()
  }

  #goOn(): void {
    const resume = this.#resume
    this.#resume = undefined
    resume?.()
  }

  // -------------------------------------------------------------------------------------------- listening

  #read(chunk: Buffer): void {
    if (this.#broken !== undefined) return
    this.heardAt = performance.now()
    try {
      this.#frames.push(chunk, (kind, stream, payload) => {
        if (this.#broken !== undefined) return
        this.#pace.spend(lineWork)
        this.#onFrame(kind, stream, payload)
      })
    } catch (error) {
      if (!(error instanceof MachineFrameError)) throw error
      this.#break(`the machine broke its protocol: ${error.message}`)
    }
  }

  #onFrame(kind: number, stream: number, payload: Uint8Array): void {
    const answer = answerNames.get(kind)
    if (answer !== undefined) this.#onAnswer(answer, payload)
    else this.#onWord(kind, stream, payload)
  }

  /** What nobody has asked for. */
  #onWord(kind: number, stream: number, payload: Uint8Array): void {
    switch (kind) {
      case kinds.ready: {
        const ready = readReady(parse(payload))
        if (this.#onReady === undefined) throw new MachineFrameError('it was ready before')
        this.#onReady.resolve(ready)
        this.#onReady = undefined
        break
      }
      case kinds.failed:
        this.#onFailed(new AgentFailed(readFailed(parse(payload))))
        break
      case kinds.data:
        this.#inflow(stream).take(payload)
        break
      case kinds.end:
        this.#inflow(stream).end()
        break
      case kinds.credit:
        this.#onCredit(stream, payload)
        break
      case kinds.result:
        if (this.#state !== 'running') throw new MachineFrameError('a result of nothing')
        this.#resultLeft -= payload.length
        if (payload.length === 0 || this.#resultLeft < 0)
          throw new MachineFrameError('a result that is empty or too long')
        this.#options.onResult?.(payload)
        break
      case kinds.exited: {
        if (this.#state !== 'running') throw new MachineFrameError('an end of nothing')
        const end = readExited(parse(payload))
        this.#state = 'exited'
        for (const inflow of this.#inflows.values()) inflow.finish()
        this.#goOn()
        this.#options.onExited(end)
        break
      }
      default:
        throw new MachineFrameError(`a frame of kind ${kind}, which no agent sends`)
    }
  }

  #inflow(stream: number): Inflow {
    const inflow = this.#inflows.get(stream)
    if (inflow === undefined || this.#state !== 'running')
      throw new MachineFrameError('bytes of a stream that is not open')
    return inflow
  }

  #onAnswer(answer: Answer, payload: Uint8Array): void {
    if (answer === 'usage') readUsage(parse(payload))
    const question = this.#open[answer].shift()
    if (question === undefined) throw new MachineFrameError(`${answer}, which was not asked`)
    if (question.expected !== undefined && !question.expected.equals(payload)) {
      question.reject(new Error('the machine broke its protocol'))
      throw new MachineFrameError('a pong that is not what was sent')
    }
    question.resolve(Buffer.from(payload))
  }

  /** It concerns what was asked first; where that is only a ping, something that was put. */
  #onFailed(failed: AgentFailed): void {
    for (const name of ['configured', 'mounted', 'started'] as const) {
      const question = this.#open[name].shift()
      question?.reject(failed)
      if (question !== undefined) return
    }
    if (this.#failed !== undefined) throw new MachineFrameError('it fails again and again')
    this.#failed = failed
    const pings = this.#open.pong
    for (const ping of pings) ping.reject(failed)
  }

  #onCredit(stream: number, payload: Uint8Array): void {
    const bytes = payload.length <= 10 ? Buffer.from(payload).toString('latin1') : ''
    const credit = /^[1-9]\d*$/.test(bytes) ? Number(bytes) : 0
    if (stream !== streams.stdin || credit === 0 || credit > this.#unconfirmed)
      throw new MachineFrameError('a credit for what was not sent')
    this.#unconfirmed -= credit
    this.#sendable += credit
    this.#goOn()
  }

  #break(message: string, isClosed = false): void {
    if (this.#broken !== undefined) return
    this.#broken = message
    const error = new Error(message)
    this.#onReady?.reject(error)
    for (const questions of Object.values(this.#open)) {
      for (const { reject } of questions) reject(error)
      questions.length = 0
    }
    for (const inflow of this.#inflows.values()) inflow.finish()
    this.#goOn()
    this.#options.onBroken(message, isClosed)
  }
}

/** A stream out of the machine, as far as there was credit. */
class Inflow {
  readonly readable: Readable
  /** Bytes that may still come. */
  left: number
  #received = 0
  #credited = 0
  #ended = false

  constructor(left: number, credit: (bytes: number) => void) {
    this.left = left
    // What was taken before the snapshot and not credited yet.
    this.#received = machineWindowBytes - left
    this.readable = new Readable({
      read: () => {
        const due = this.#received - this.readable.readableLength - this.#credited
        if (due < creditBytes || this.#ended) return
        this.#credited += due
        this.left += due
        credit(due)
      },
    })
    this.readable.on('error', () => {})
  }

  take(payload: Uint8Array): void {
    if (this.#ended) throw new MachineFrameError('bytes after the end of a stream')
    if (payload.length === 0 || payload.length > Math.min(this.left, machineChunkBytes))
      throw new MachineFrameError('more bytes of a stream than there was credit for')
    this.left -= payload.length
    this.#received += payload.length
    this.readable.push(Buffer.from(payload))
  }

  end(): void {
    if (this.#ended) throw new MachineFrameError('a stream that ends twice')
    this.finish()
  }

  finish(): void {
    if (this.#ended) return
    this.#ended = true
    this.readable.push(null)
  }
}

// -------------------------------------------------------------------------------------------- what is said

const text = (value: string) => Buffer.from(value)
const json = (value: unknown) => Buffer.from(JSON.stringify(value))

function parse(payload: Uint8Array): Record<string, unknown> {
  let value: unknown
  try {
    value = JSON.parse(Buffer.from(payload.buffer, payload.byteOffset, payload.length).toString())
  } catch {
    throw new MachineFrameError('text that is not JSON')
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new MachineFrameError('JSON that is no object')
  return value as Record<string, unknown>
}

const isCount = (value: unknown, most = Number.MAX_SAFE_INTEGER): value is number =>
  typeof value === 'number' && value >= 0 && value <= most

function readReady({ protocol, kernel }: Record<string, unknown>): Ready {
  if (protocol !== machineProtocol)
    throw new MachineFrameError(
      `an agent of protocol ${String(protocol).slice(0, 20)}, not ${machineProtocol}`,
    )
  return { protocol: machineProtocol, kernel: String(kernel).slice(0, 100) }
}

function readFailed({ fault, message }: Record<string, unknown>): Failed {
  if ((fault !== 'user' && fault !== 'machine') || typeof message !== 'string')
    throw new MachineFrameError('a failure that makes no sense')
  return { fault, message: message.slice(0, maxMessage) }
}

function readUsage(value: unknown): MachineUsage {
  const { cpu_ms, memory_peak_mb, oom_kills } = (value ?? {}) as Record<string, unknown>
  if (!isCount(cpu_ms) || !isCount(memory_peak_mb) || !isCount(oom_kills))
    throw new MachineFrameError('a usage that makes no sense')
  return { cpu_ms, memory_peak_mb, oom_kills }
}

function readExited({ code, oom, usage }: Record<string, unknown>): ProcessEnd {
  if (!isCount(code, 255) || !Number.isInteger(code) || typeof oom !== 'boolean')
    throw new MachineFrameError('an end that makes no sense')
  return { code, oom, usage: readUsage(usage) }
}
