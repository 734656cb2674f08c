/**
 * The runner’s end of a shim: a box in which a handler’s code is called. What comes out of it is not trusted:
 * messages are bounded and checked, and a box that breaks the protocol is killed.
 */
import { randomBytes } from 'node:crypto'
import { FrameDecoder, FrameError } from '../../shared/frames.ts'
import {
  decodeMessage,
  encodeMessage,
  type Kind,
  kinds,
  logLevels,
  type Message,
} from '../../shared/guest.ts'
import type { LogLevel, LogLine } from '../../shared/workload.ts'
import { readResponseHead } from '../guest/heads.ts'
import type { Entry } from '../guest/traffic.ts'
import type { Box, Exit } from './engine.ts'
import { LineSplitter, lineWork, Pace } from './lines.ts'
import { type DoneHeader, maxChatterBytes, type RunHeader, shimCauses, streams } from './protocol.ts'

/** How a box with a shim came to its end. */
export interface Gone {
  exit: Exit
  /** How it broke the protocol, where it did. */
  protocol: string | undefined
  /** The end of what it wrote to standard error. */
  stderr: string
}

/** Who is told about the run under way. */
export interface Occupant {
  onLine(line: Pick<LogLine, 'level' | 'stream' | 'text'>): void
  /** `body` is that of a response, where the header has one: a view that is gone after the call. */
  onDone(header: DoneHeader, output: string | undefined, body: Buffer | undefined): void
  /** Of the kinds that concern streams and responses. Throws `FrameError`. */
  onMessage(message: Message): void
  /** The box is dead, and all of its output has been read. */
  onGone(gone: Gone): void
}

/** Bytes of standard error that are kept for messages. */
const stderrBytes = 8 * 1024
/** A shim that leaves so much unread of what it asked for is given up. */
const maxUnreadBytes = 32 * 1024 * 1024
/** What was written to standard error before the end of a run comes within so many ms after it. */
const markMs = 1_000

type Done = { header: DoneHeader; output: string | undefined; body: Buffer | undefined }

export class Shim {
  /** Runs so far, the one under way included, rehearsals not. */
  runs = 0
  /** Settles when it can take a run; false: its box is dead instead. */
  readonly ready: Promise<boolean>
  readonly #box: Box
  readonly #kill: () => void
  readonly #decoder = new FrameDecoder(maxChatterBytes)
  readonly #pace: Pace
  #occupant: Occupant | undefined
  /** It was resumed, and has run nothing of a user’s yet. */
  #asleep: boolean
  #run = 0
  #runBytes = 0
  #mark = ''
  /** The mark of the run under way has come. */
  #marked = false
  /** The end of the run, while what belongs to it on standard error is awaited. */
  #done: Done | undefined
  #markTimer: NodeJS.Timeout | undefined
  #protocol: string | undefined
  #stderr = Buffer.alloc(0)
  #gone: Gone | undefined
  #onReady: (ready: boolean) => void = () => {}

  /** Reads from now on. `kill` ends the box. */
  constructor(box: Box, kill: () => void) {
    this.#box = box
    this.#kill = kill
    this.ready = new Promise((resolve) => {
      this.#onReady = resolve
    })
    this.#asleep = box.resumed === true
    if (this.#asleep) this.#onReady(true)
    box.stdin.on('error', () => {})
    box.stdout.on('error', () => {})
    box.stderr.on('error', () => {})
    this.#pace = new Pace(box.stdout)
    box.stdout.on('data', (chunk: Buffer) => this.#read(chunk))
    const raw = new Pace(box.stderr)
    const lines = new LineSplitter(
      (text) => this.#occupant?.onLine({ level: 'info', stream: 'stdout', text }),
      (mark) => this.#onMark(mark),
    )
    box.stderr.on('data', (chunk: Buffer) => {
      this.#stderr = Buffer.concat([this.#stderr, chunk]).subarray(-stderrBytes)
      raw.spend(lines.push(chunk))
    })
    void box.exited.then((exit) => {
      lines.end()
      this.#end(exit)
    })
  }

  /** How it ended, once it has. */
  get gone(): Gone | undefined {
    return this.#gone
  }

  get dead(): boolean {
    return this.#gone !== undefined || this.#protocol !== undefined
  }

  /** Starts a run; the shim must be ready and not busy. */
  start(
    occupant: Occupant,
    header: Omit<RunHeader, 'mark'>,
    ctx: string,
    input: string | undefined,
    request?: Entry,
  ) {
    if (this.#gone !== undefined) return occupant.onGone(this.#gone)
    this.#occupant = occupant
    this.#run = (this.#run + 1) >>> 0
    this.#mark = randomBytes(12).toString('hex')
    // Another call’s words are no part of this one’s error.
    this.#stderr = Buffer.alloc(0)
    this.#marked = false
    const isReal = header.rehearsal === undefined
    const seed = this.#asleep && isReal ? { seed: randomBytes(32).toString('hex') } : {}
    if (isReal) {
      this.runs++
      this.#asleep = false
    }
    this.#decoder.maxBytes = header.output_bytes + maxChatterBytes
    const text = JSON.stringify({ ...header, ...seed, mark: this.#mark } satisfies RunHeader)
    const frame = encodeMessage(kinds.run, this.#run, [
      text,
      ctx,
      undefined,
      input,
      request?.head,
      request?.body,
    ])
    this.#runBytes = frame.length
    this.#box.stdin.write(frame)
  }

  /** A message about the run under way. */
  post(kind: Kind, parts: (string | Uint8Array | undefined)[], number: number): void {
    if (this.#occupant === undefined || this.dead) return
    this.#box.stdin.write(encodeMessage(kind, this.#run, parts, number))
    // What it asks for is bounded; answers pile up only where it asks and does not read.
    if (this.#box.stdin.writableLength > this.#runBytes + maxUnreadBytes)
      this.#break('it does not read what it asked for')
  }

  cancel(reason: string): void {
    this.post(kinds.cancel, [reason], 0)
  }

  #read(chunk: Buffer): void {
    if (this.#protocol !== undefined) return
    try {
      this.#decoder.push(chunk, (frame) => this.#onMessage(decodeMessage(frame)))
    } catch (error) {
      if (!(error instanceof FrameError)) throw error
      this.#break(error.message)
    }
  }

  #break(message: string): void {
    this.#protocol ??= message
    this.#kill()
  }

  #onMessage(message: Message) {
    const { kind, run, parts } = message
    if (kind === kinds.ready && this.runs === 0) return this.#onReady(true)
    const occupant = this.#occupant
    if (occupant === undefined || run !== this.#run || this.#done !== undefined)
      throw new FrameError('a message about a run that is not under way')
    // Of any kind: some may come as often as the box likes.
    this.#pace.spend(lineWork)
    switch (kind) {
      case kinds.log: {
        const level = parts[0]?.toString('latin1') as LogLevel
        const stream = (parts[2]?.toString('latin1') ?? 'console') as (typeof streams)[number]
        if (!logLevels.includes(level) || !streams.includes(stream) || parts[1] === undefined)
          throw new FrameError('a line without a level, a stream or text')
        if (parts[1].length > maxChatterBytes) throw new FrameError('a line that is too long')
        occupant.onLine({ level, stream, text: parts[1].toString() })
        this.#pace.spend(parts[1].length)
        break
      }
      case kinds.done:
        this.#done = {
          header: readDone(parts[0]),
          output: parts[1]?.toString(),
          // A view of what the socket gave, which it uses again.
          body: parts[2] === undefined ? undefined : Buffer.from(parts[2]),
        }
        if (this.#marked) this.#settle()
        else this.#markTimer = setTimeout(() => this.#settle(), markMs)
        break
      default:
        occupant.onMessage(message)
    }
  }

  #onMark(mark: string): void {
    if (mark !== this.#mark || this.#marked) return
    this.#marked = true
    if (this.#done !== undefined) this.#settle()
  }

  #settle(): void {
    clearTimeout(this.#markTimer)
    const occupant = this.#occupant
    const done = this.#done
    if (occupant === undefined || done === undefined) return
    this.#done = undefined
    this.#occupant = undefined
    this.#decoder.maxBytes = maxChatterBytes
    occupant.onDone(done.header, done.output, done.body)
  }

  #end(exit: Exit): void {
    // An end that came before the box died holds.
    if (this.#protocol === undefined) this.#settle()
    this.#gone = { exit, protocol: this.#protocol, stderr: lastWords(this.#stderr) }
    this.#onReady(false)
    const occupant = this.#occupant
    this.#occupant = undefined
    occupant?.onGone(this.#gone)
  }
}

const lastWords = (bytes: Buffer) =>
  bytes
    .toString()
    .replace(/\0vulcan:[0-9a-f]*/g, '')
    .trim()

const isText = (value: unknown): value is string => typeof value === 'string'

function readDone(part: Buffer | undefined): DoneHeader {
  let header: DoneHeader
  try {
    header = JSON.parse(part!.toString())
  } catch {
    throw new FrameError('an end that is not JSON')
  }
  if (typeof header !== 'object' || header === null) throw new FrameError('an end that is no object')
  const { status, cause, message, stack, worn, response, guest } = header
  const sound =
    (status === 'completed' ||
      status === 'stopped' ||
      (status === 'failed' && shimCauses.has(cause!) && isText(message))) &&
    (stack === null || isText(stack)) &&
    (worn === undefined || worn === true) &&
    (guest === undefined || (Array.isArray(guest) && guest.length === 2 && guest.every(Number.isFinite)))
  if (!sound) throw new FrameError('an end that makes no sense')
  return response === undefined ? header : { ...header, response: readResponseHead(response) }
}
