/**
 * The runner’s end of one sandbox child. What a child says is not trusted: messages are bounded and checked, and a
 * child that breaks the protocol is killed.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs'
import type { Writable } from 'node:stream'
import { FrameDecoder, FrameError } from '../../shared/frames.ts'
import {
  decodeMessage,
  encodeMessage,
  type Kind,
  kinds,
  logLevels,
  type Message,
  maxChatterBytes,
} from '../../shared/guest.ts'
import type { Cause, LogLevel } from '../../shared/workload.ts'
import { readResponseHead } from '../guest/heads.ts'
import type { Entry } from '../guest/traffic.ts'
import { Claims } from './claims.ts'
import { killOrphans } from './orphans.ts'
import { type DoneHeader, phaseNames, type RunHeader } from './protocol.ts'
import { childMarker, type Walls } from './walls.ts'

/** Who is told about a run. */
export interface Occupant {
  /** What was sent ahead is what the child is at now. */
  onTurn(): void
  onLine(level: LogLevel, text: string): void
  /** `body` is that of a response, where the header has one: a view that is gone after the call. */
  onDone(header: DoneHeader, output: string | undefined, body: Buffer | undefined): void
  /** Of the kinds that concern streams, responses and fetches. Throws `FrameError`. */
  onMessage(message: Message): void
  /** The child does not hold the code any more. */
  onNeed(): void
  /** The process is gone, and all of its output has been read. */
  onGone(): void
}

export interface ChildEvents {
  onReady(child: SandboxChild): void
  /** It is going down: nothing more should be given to it. `onGone` follows when all of its output has been read. */
  onDying(child: SandboxChild): void
  onGone(child: SandboxChild): void
  /** Runs that were sent ahead and never began here. */
  onReturned(occupants: Occupant[]): void
}

/** A run that was sent. */
interface Turn {
  occupant: Occupant
  number: number
  outputBytes: number
}

/** Bytes of standard error that are kept: V8’s last words. */
const stderrBytes = 8 * 1024
/** A child that leaves so much unread of what it asked for is given up. */
const maxUnreadBytes = 32 * 1024 * 1024
/** A child that is not ready after so many ms is given up. */
const readyMs = 10_000
/** After a process exits, its pipes close at once; where they do not in so many ms, an orphan holds them. */
const closeMs = 500
const pageBytes = 4096

/** Causes that a child may name; any other is made up. */
const childCauses: ReadonlySet<Cause> = new Set<Cause>([
  'user_error',
  'oom',
  'invalid_workload',
  'output_invalid',
  'output_too_large',
])
/** What V8 and isolated-vm write before they end a process whose memory is spent. */
const outOfMemory =
  /is_heap_oom|out of memory|Allocation failed|invalid (?:array|table|size|string) |invalid size error/i

export class SandboxChild {
  /** Isolates it is believed to hold warm, with MiB of their heaps when they last ran. */
  readonly keys = new Map<string, number>()
  /** It has let go of isolates since somebody last looked. */
  dropped = false
  version = ''
  ready = false
  dying = false
  gone = false
  /** Why it was killed, where we did it. */
  killReason: 'oom' | 'stopped' | 'protocol' | 'retired' | undefined
  /** `performance.now()` when that was decided. */
  killedAt: number | undefined
  /** `performance.now()` at the start of the run under way, or of its idleness. */
  since = performance.now()
  runs = 0
  /** Milliseconds that the last run had the child for. */
  lastMs = 0
  /** Resident memory in MiB when it last stood idle. */
  idleRssMb = 0
  /** It is to be replaced as soon as it is idle. */
  closing = false
  readonly #process: ChildProcess
  readonly #events: ChildEvents
  readonly #decoder = new FrameDecoder(maxChatterBytes)
  readonly #claims: Claims | undefined
  /** The run under way. */
  #turn: Turn | undefined
  /** What was sent to begin after it, in order. */
  #ahead: Turn[] = []
  #lastRun = 0
  #corked = false
  #runBytes = 0
  #stderr = ''
  #innerPid: number | undefined
  #statm: number | undefined
  #exit = 'it could not be started'
  #readyTimer: NodeJS.Timeout
  #closeTimer: NodeJS.Timeout | undefined

  constructor(walls: Walls, events: ChildEvents) {
    this.#events = events
    const claims = makeClaims()
    this.#claims = claims
    const child = spawn(walls.file, walls.args, {
      // Its own session: a terminal’s Ctrl-C is for the runner, which stops its children in good order.
      detached: true,
      env: {},
      cwd: '/',
      stdio: [
        'pipe',
        'pipe',
        'pipe',
        walls.extra === undefined ? 'ignore' : 'pipe',
        claims?.childFd ?? 'ignore',
      ],
    })
    claims?.given()
    this.#process = child
    const extra = child.stdio[3] as Writable | null | undefined
    extra?.on('error', () => {})
    extra?.end(walls.extra)
    this.#readyTimer = setTimeout(() => this.kill('protocol', true), readyMs)
    child.stdin!.on('error', () => {})
    child.stdout!.on('error', () => {})
    child.stderr!.on('error', () => {})
    child.stdout!.on('data', (chunk: Buffer) => this.#read(chunk))
    child.stderr!.on('data', (chunk: Buffer) => {
      this.#stderr = (this.#stderr + chunk.toString('latin1')).slice(-stderrBytes)
    })
    child.on('error', (error) => {
      this.#exit = error.message
      if (child.pid === undefined) this.#close()
    })
    child.on('exit', (code, signal) => {
      // bubblewrap exits with 128 + n where signal n ended what it held.
      this.#exit =
        signal !== null ? `signal ${signal}` : code! > 128 ? `signal ${code! - 128}` : `exit code ${code}`
      this.#down()
      this.#closeTimer = setTimeout(() => {
        killOrphans(childMarker)
        child.stdout!.destroy()
        child.stderr!.destroy()
      }, closeMs)
    })
    child.stdout!.on('end', () => this.#down())
    child.on('close', () => this.#close())
  }

  /** The processes by which this sandbox can be killed: the outer one, and the innermost one where that differs. */
  get pids(): number[] {
    const outer = this.#process.pid
    if (this.gone || outer === undefined) return []
    return this.#innerPid === undefined || this.#innerPid === outer ? [outer] : [outer, this.#innerPid]
  }

  get busy(): boolean {
    return this.#turn !== undefined
  }

  get occupant(): Occupant | undefined {
    return this.#turn?.occupant
  }

  /** How many runs were sent ahead; infinite where none can be. */
  get ahead(): number {
    return this.#claims === undefined ? Number.POSITIVE_INFINITY : this.#ahead.length
  }

  /** How it died, in words. */
  get exit(): string {
    return this.#exit
  }

  /** Killed, and not by us. */
  get killedByOthers(): boolean {
    return this.killReason === undefined && /^signal (?:SIGKILL|9)$/.test(this.#exit)
  }

  /** The end of what it wrote to standard error. */
  get stderr(): string {
    return this.#stderr
  }

  get ranOutOfMemory(): boolean {
    return this.killReason === 'oom' || outOfMemory.test(this.#stderr)
  }

  prepare(header: RunHeader, code: string): void {
    this.#keep(header.key)
    this.#write(encodeMessage(kinds.prepare, 0, [JSON.stringify(header), code]))
  }

  /**
   * Starts a run, or sends it ahead where the child is busy; the child must be ready, and take what is sent ahead.
   * `code` may be left out where `keys` has its key.
   */
  start(
    occupant: Occupant,
    header: RunHeader,
    ctx: string,
    code: string | undefined,
    input: string | undefined,
    request?: Entry,
  ): void {
    this.#lastRun = (this.#lastRun + 1) >>> 0
    const turn = { occupant, number: this.#lastRun, outputBytes: header.output_bytes }
    this.#keep(header.key)
    if (this.#turn === undefined) this.#begin(turn)
    else {
      this.#ahead.push(turn)
      this.#claims!.offer(turn.number)
      header = { ...header, ahead: true }
    }
    const frame = encodeMessage(kinds.run, turn.number, [
      JSON.stringify(header),
      ctx,
      code,
      input,
      request?.head,
      request?.body,
    ])
    this.#runBytes = Math.max(this.#runBytes, frame.length)
    this.#write(frame)
  }

  /** What was sent ahead and has not begun: it never will, here. Also where its turn has come. */
  takeBack(): Occupant[] {
    const turns = this.#turn === undefined ? [] : [this.#turn, ...this.#ahead]
    const unclaimed = this.#claims?.takeBack()
    if (unclaimed === undefined || unclaimed.size === 0) return []
    const [turn, ...ahead] = turns.filter((one) => !unclaimed.has(one.number))
    if (turn !== this.#turn) this.#turn = turn
    this.#ahead = ahead
    return turns.filter((one) => unclaimed.has(one.number)).map((one) => one.occupant)
  }

  /** A message about a run; nothing where that is not under way. */
  post(occupant: Occupant, kind: Kind, parts: (string | Uint8Array | undefined)[], number: number): void {
    const turn = this.#turn
    if (turn === undefined || turn.occupant !== occupant || this.dying) return
    this.#write(encodeMessage(kind, turn.number, parts, number))
    // What it asks for is bounded; answers pile up only where it asks and does not read.
    if (this.#process.stdin!.writableLength > this.#runBytes + maxUnreadBytes) this.kill('protocol', true)
  }

  /** Of a run that has begun. */
  cancel(occupant: Occupant, reason: string): void {
    const turn = [this.#turn, ...this.#ahead].find((one) => one?.occupant === occupant)
    if (turn !== undefined) this.#write(encodeMessage(kinds.cancel, turn.number, [reason]))
  }

  /**
   * `onGone` tells when it is done. A child that is starting is killed when it is ready, unless `now`: until then
   * it runs nobody’s code, and bubblewrap cannot yet be killed without leaving an orphan.
   */
  kill(reason: NonNullable<SandboxChild['killReason']>, now = this.ready): void {
    if (this.gone) return
    this.killReason ??= reason
    this.killedAt ??= performance.now()
    if (!now) return
    this.#down()
    // The innermost first: when its pipes are closed, nothing of it runs any more.
    for (const pid of this.pids.reverse()) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // It is already dead.
      }
    }
  }

  /** Resident memory now, in MiB; 0 where the host cannot tell. */
  rssMb(): number {
    if (this.#statm === undefined) return 0
    const buffer = Buffer.allocUnsafe(128)
    try {
      const size = readSync(this.#statm, buffer, 0, 128, 0)
      return (Number(buffer.toString('latin1', 0, size).split(' ')[1]) * pageBytes) / 1048576
    } catch {
      return 0
    }
  }

  #read(chunk: Buffer): void {
    if (this.killReason === 'protocol') return
    try {
      this.#decoder.push(chunk, (frame) => this.#onMessage(decodeMessage(frame)))
    } catch (error) {
      if (!(error instanceof FrameError)) throw error
      this.#stderr += `\n${error.message}`
      this.kill('protocol', true)
    }
  }

  #onMessage(message: Message): void {
    const { kind, run, parts } = message
    if (kind === kinds.ready && !this.ready) {
      this.version = parts[0]?.toString('latin1', 0, 100) ?? ''
      this.#onReady()
      return
    }
    const turn = this.#turn
    if (turn === undefined || run !== turn.number)
      throw new FrameError('a message about a run that is not under way')
    const { occupant } = turn
    switch (kind) {
      case kinds.log: {
        const level = parts[0]?.toString('latin1') as LogLevel
        if (!logLevels.includes(level) || parts[1] === undefined)
          throw new FrameError('a line without a level or text')
        occupant.onLine(level, parts[1].toString())
        break
      }
      case kinds.done: {
        const header = readDone(parts[0])
        for (const key of header.dropped) this.keys.delete(key)
        if (header.dropped.length > 0) this.dropped = true
        this.lastMs = performance.now() - this.since
        this.#next()
        occupant.onDone(header, parts[1]?.toString(), parts[2])
        this.#turn?.occupant.onTurn()
        break
      }
      case kinds.need:
        this.keys.clear()
        this.#next()
        occupant.onNeed()
        this.#turn?.occupant.onTurn()
        break
      default:
        occupant.onMessage(message)
    }
  }

  #begin(turn: Turn): void {
    this.#turn = turn
    this.runs++
    this.since = performance.now()
    this.#decoder.maxBytes = turn.outputBytes + maxChatterBytes
  }

  #keep(key: string): void {
    if (!this.keys.has(key)) this.keys.set(key, 0)
  }

  /** The run under way has ended: the child goes on with the next that was sent ahead. */
  #next() {
    const turn = this.#ahead.shift()
    if (turn !== undefined) return this.#begin(turn)
    this.#turn = undefined
    this.#runBytes = 0
    this.#decoder.maxBytes = maxChatterBytes
  }

  /** What is written in one go wakes the child once. */
  #write(frame: Buffer): void {
    const stdin = this.#process.stdin!
    if (!this.#corked) {
      this.#corked = true
      stdin.cork()
      process.nextTick(() => {
        this.#corked = false
        stdin.uncork()
      })
    }
    stdin.write(frame)
  }

  #onReady(): void {
    clearTimeout(this.#readyTimer)
    this.ready = true
    this.since = performance.now()
    const inner = innermost(this.#process.pid!)
    this.#innerPid = inner
    try {
      this.#statm = openSync(`/proc/${inner}/statm`, 'r')
      // Where the host itself runs short of memory, its kernel should take a sandbox rather than a runner.
      writeFileSync(`/proc/${inner}/oom_score_adj`, '1000')
    } catch {
      // Not Linux, or not allowed: nothing depends on it.
    }
    this.idleRssMb = this.rssMb()
    if (this.killReason !== undefined) this.kill(this.killReason)
    else this.#events.onReady(this)
  }

  #down(): void {
    if (this.dying) return
    this.dying = true
    this.#events.onDying(this)
    const back = this.takeBack()
    if (back.length > 0) this.#events.onReturned(back)
  }

  #close(): void {
    if (this.gone) return
    this.#down()
    this.gone = true
    clearTimeout(this.#readyTimer)
    clearTimeout(this.#closeTimer)
    if (this.#statm !== undefined) closeSync(this.#statm)
    this.#statm = undefined
    this.#claims?.close()
    const turns = this.#turn === undefined ? [] : [this.#turn, ...this.#ahead]
    this.#turn = undefined
    this.#ahead = []
    this.#events.onGone(this)
    for (const { occupant } of turns) occupant.onGone()
  }
}

/** Undefined where the host makes none: then nothing is sent ahead. */
function makeClaims(): Claims | undefined {
  try {
    return new Claims()
  } catch {
    return undefined
  }
}

/** Follows the only children down: bubblewrap has two processes of its own above what it holds. */
function innermost(pid: number): number {
  for (;;) {
    try {
      const first = readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1').split(' ')[0]
      if (!first) return pid
      pid = Number(first)
    } catch {
      return pid
    }
  }
}

const isText = (value: unknown): value is string => typeof value === 'string'
const isAmount = (value: unknown): value is number => typeof value === 'number' && value >= 0 && value < 1e12

const isPhase = (value: unknown): boolean =>
  Array.isArray(value) && phaseNames.includes(value[0]) && isAmount(value[1]) && isAmount(value[2])

function readDone(part: Buffer | undefined): DoneHeader {
  let header: DoneHeader
  try {
    header = JSON.parse(part!.toString())
  } catch {
    throw new FrameError('an end that is not JSON')
  }
  const { status, cause, message, stack, start, cpu_ms, wall_ms, memory_mb, dropped, phases } = header
  const sound =
    (status === 'completed' ||
      status === 'stopped' ||
      (status === 'failed' && childCauses.has(cause!) && isText(message))) &&
    (stack === null || isText(stack)) &&
    (start === 'cold' || start === 'warm') &&
    isAmount(cpu_ms) &&
    isAmount(wall_ms) &&
    isAmount(memory_mb) &&
    Array.isArray(dropped) &&
    dropped.every(isText) &&
    (phases === undefined ||
      (Array.isArray(phases) && phases.length <= phaseNames.length && phases.every(isPhase)))
  if (!sound) throw new FrameError('an end that makes no sense')
  if (header.response !== undefined) header.response = readResponseHead(header.response)
  return header
}
