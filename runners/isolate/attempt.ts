/** One job on its way through the pool: from waiting for a child to its outcome. */
import { type Message, wholeBytes } from '../../shared/guest.ts'
import { preciseNow } from '../../shared/tracing.ts'
import type { LogLevel, Usage } from '../../shared/workload.ts'
import type { EgressGate } from '../egress.ts'
import { nothingRan, round, timestamp, unknownUsage } from '../guest/report.ts'
import { Traffic } from '../guest/traffic.ts'
import type { RunnerMetrics } from '../metrics.ts'
import {
  inlineResponseBytes,
  type Job,
  type Outcome,
  type Phase,
  type Prepared,
  type Program,
  type RunEvents,
} from '../runner.ts'
import type { Occupant, SandboxChild } from './child-process.ts'
import { fromMonotonic } from './clock.ts'
import type { DoneHeader, RunHeader } from './protocol.ts'

/** A child that was told to stop has so many ms to say that it has. */
const graceMs = 150
/** A wait for a child that is shorter than this (ms) is no phase of its own. */
const shortWaitMs = 5

/** What may be resident for a limit of `limitMb` on top of an idle child: V8’s young generation, garbage, buffers. */
const allowanceMb = (limitMb: number) => limitMb * 1.5 + 64

/** The pool as an attempt sees it. */
export interface Seats {
  /** By which the code of its runs reaches the network. */
  readonly egress: EgressGate
  readonly metrics: RunnerMetrics | undefined
  /** MiB of warm isolates for each child. */
  readonly warmMbEach: number
  /** A child, or undefined: then `attempt.begin` is called when there is one. */
  acquire(attempt: Attempt): SandboxChild | undefined
  /** It does not wait any more. */
  forget(attempt: Attempt): void
  /** A child that is ready for the next run, or at the next already that was sent ahead. */
  giveBack(child: SandboxChild): void
  /** What was sent ahead to `child` and has not begun waits again. */
  takeBack(child: SandboxChild): void
  /** Replaces a child that nobody should use again. */
  retire(child: SandboxChild): void
  /** While runs are under way somebody looks at their memory. */
  watch(): void
  /** What a run took of its child’s time and of a core’s, in ms; `wallMs` is what the child says of the first. */
  ran(key: string, ms: number, cpuMs: number, wallMs: number): void
}

/** Source text in a language that isolates run. */
export interface Code extends Program {
  source: Extract<Program['source'], { kind: 'code' }>
}

/** Of an archive or an image an isolate can make nothing. */
export const isCode = (program: Program): program is Code => program.source.kind === 'code'

/** Isolates are used again for the same code in the same language under the same limit. */
export function headerOf(job: Pick<Code, 'runtime' | 'source' | 'limits'>): RunHeader {
  const typescript = job.runtime === 'typescript'
  const { memory_mb, output_mb } = job.limits
  return {
    key: `${job.source.sha256}.${typescript ? 'ts' : 'js'}.${memory_mb}`,
    typescript,
    memory_mb,
    // Known when it is sent.
    warm_mb: 0,
    output_bytes: Math.floor(output_mb * 1048576),
    inline_bytes: inlineResponseBytes,
  }
}

export class Attempt implements Prepared, Occupant {
  static of(child: SandboxChild): Attempt | undefined {
    return child.occupant as Attempt | undefined
  }

  readonly key: string
  waitingSince = 0
  readonly #pool: Seats
  readonly #job: Job & Code
  readonly #header: RunHeader
  #child: SandboxChild | undefined
  /** The child is at it, or was when it died. */
  #begun = false
  #signal: AbortSignal | undefined
  #events: RunEvents | undefined
  #traffic: Traffic | undefined
  #resolve: ((outcome: Outcome) => void) | undefined
  #aborted = false
  #released = false
  #delivering = false
  /** Milliseconds since the epoch: when it was prepared, and when it was to run. */
  readonly #preparedAt = preciseNow()
  #askedAt = 0
  #grace: NodeJS.Timeout | undefined
  #peakMb = 0

  constructor(pool: Seats, job: Job & Code) {
    this.#pool = pool
    this.#job = job
    this.#header = headerOf(job)
    if (job.traced === true) this.#header.traced = true
    this.key = this.#header.key
  }

  /** Holds `child` for this attempt and has it compile the code meanwhile. */
  reserve(child: SandboxChild): void {
    this.#child = child
    this.#header.warm_mb = this.#pool.warmMbEach
    child.prepare(this.#header, this.#job.source.text)
  }

  run(signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    return new Promise((resolve) => {
      this.#resolve = resolve
      this.#signal = signal
      this.#events = events
      this.#askedAt = preciseNow()
      const { runtime } = this.#job
      if (signal.aborted) {
        this.#aborted = true
        return this.#settle({ status: 'stopped', ...nothingRan })
      }
      if (runtime !== 'javascript' && runtime !== 'typescript')
        return this.#fail('invalid_workload', `an isolate runs javascript and typescript, not ${runtime}`)
      signal.addEventListener('abort', this)
      this.#acquire()
    })
  }

  release(): void {
    if (this.#resolve !== undefined || this.#released) return
    this.#released = true
    this.#giveBack()
  }

  /** An `AbortSignal` calls this when it is aborted. */
  handleEvent() {
    if (this.#aborted) return
    this.#aborted = true
    if (this.#delivering) return this.#traffic?.cut('the call was stopped')
    if (this.#child !== undefined && !this.#begun) this.#pool.takeBack(this.#child)
    const child = this.#child
    if (child === undefined) {
      this.#pool.forget(this)
      return this.#settle({ status: 'stopped', ...nothingRan })
    }
    child.cancel(this, stopMessage(this.#signal?.reason))
    this.#grace = setTimeout(() => child.kill('stopped'), graceMs)
  }

  /** It can be sent as one message: its request, if it has one, is here as a whole. */
  get isWhole(): boolean {
    const body = this.#job.http?.body ?? null
    return body === null || (body instanceof Uint8Array && body.length <= wholeBytes)
  }

  /** Sends it to `child`, which may be busy. */
  begin(child: SandboxChild): void {
    this.#child = child
    const { id, attempt, traceparent, env, source, input, traced } = this.#job
    const ctx = JSON.stringify({ id, attempt, traceparent: traceparent ?? null, env, traced })
    const traffic = new Traffic(
      this.#job,
      this.#events!,
      this.#pool.egress,
      (kind, parts, number) => child.post(this, kind, parts, number),
      fromMonotonic,
    )
    this.#traffic = traffic
    // A body that comes piece by piece cannot be sent again: then the child must not ask for the code.
    const entry = traffic.enter()
    const known = child.keys.has(this.key) && !traffic.streams
    this.#header.warm_mb = this.#pool.warmMbEach
    const header = traffic.streams ? { ...this.#header, follows: true } : this.#header
    const waits = child.busy
    child.start(this, header, ctx, known ? undefined : source.text, input, entry)
    if (!waits) this.onTurn()
  }

  onTurn(): void {
    this.#begun = true
    this.#traffic!.begin()
    this.#pool.watch()
  }

  /** Its child had it and never began. */
  returned(): void {
    this.#child = undefined
    this.#begun = false
    void this.#traffic?.close(undefined)
    this.#traffic = undefined
  }

  unavailable(message: string): void {
    this.#fail('backend_unavailable', message)
  }

  checkMemory(child: SandboxChild): void {
    const rss = child.rssMb()
    const grown = rss - child.idleRssMb
    if (grown > this.#peakMb) this.#peakMb = grown
    if (grown > allowanceMb(this.#header.memory_mb)) child.kill('oom')
  }

  onLine(level: LogLevel, text: string): void {
    this.#events?.onLog({ time: timestamp(), level, stream: 'console', text })
  }

  onNeed(): void {
    const child = this.#child!
    if (this.#aborted) {
      this.#settle({ status: 'stopped', ...nothingRan })
      return
    }
    void this.#traffic?.close(undefined)
    this.#begun = false
    this.begin(child)
  }

  onMessage(message: Message): void {
    this.#traffic!.handle(message)
  }

  onDone(header: DoneHeader, output: string | undefined, body: Buffer | undefined) {
    const { status, cause, message, stack, start, cpu_ms, wall_ms, memory_mb, response } = header
    const traffic = this.#traffic!
    this.#pool.ran(this.key, this.#child!.lastMs, cpu_ms, wall_ms)
    if (this.#child!.keys.has(this.key)) this.#child!.keys.set(this.key, memory_mb)
    this.#tell(header)
    const memoryMb = Math.max(memory_mb, this.#peakMb)
    const usage = { ...this.#usage(), cpu_ms: round(cpu_ms), memory_peak_mb: round(memoryMb) }
    const ran = { usage, start }
    if (cause === 'oom') this.#pool.metrics?.sandboxFailed('oom')
    // isolated-vm lets go of an isolate whose memory is spent, but the process is not what it was.
    if (cause === 'oom' || header.worn === true) this.#pool.retire(this.#child!)
    if (this.#aborted) return this.#settle({ status: 'stopped', ...ran })
    if (status === 'failed')
      return this.#settle({
        status,
        cause: cause === 'user_error' && traffic.denied(message!) ? 'egress_denied' : cause!,
        error: { message: message!, stack },
        exitCode: null,
        ...ran,
      })
    const isHttp = this.#job.http !== undefined
    const answers = (response === undefined ? 0 : 1) + (traffic.responding ? 1 : 0)
    if (status === 'stopped' || output === undefined || !isJson(output) || answers !== (isHttp ? 1 : 0)) {
      this.#child!.kill('protocol')
      return this.#fail('runner_lost', 'the sandbox sent a result that is none')
    }
    const completed = { status, output, exitCode: null, ...ran }
    if (response === undefined) return this.#settle(completed)
    // A view of what the socket gave, which it uses again.
    this.#settle({
      ...completed,
      response: { ...response, body: new Uint8Array(body ?? []) },
    })
  }

  onGone() {
    const child = this.#child!
    this.#child = undefined
    const usage = { ...this.#usage(), memory_peak_mb: this.#peakMb > 0 ? round(this.#peakMb) : null }
    const ran = { usage, start: 'cold' as const }
    const { metrics } = this.#pool
    if (this.#begun) {
      const { function: fn, traceparent } = this.#job
      metrics?.started(fn?.name, 'cold', Number.NaN, traceparent)
      const lost = child.ranOutOfMemory ? 'oom' : 'runner_lost'
      this.#tellGuest(performance.timeOrigin + child.since, preciseNow(), this.#aborted ? 'stopped' : lost)
    }
    if (this.#aborted) return this.#settle({ status: 'stopped', ...ran })
    metrics?.sandboxFailed(child.ranOutOfMemory ? 'oom' : 'lost')
    const [cause, message] = child.ranOutOfMemory
      ? ([
          'oom',
          `the code used more than its ${this.#header.memory_mb} MiB of memory (limits.memory_mb)`,
        ] as const)
      : child.killReason === 'protocol'
        ? (['runner_lost', `the sandbox broke its protocol: ${child.stderr.trim().slice(-300)}`] as const)
        : (['runner_lost', `the sandbox died while the code ran: ${child.exit}`] as const)
    this.#settle({ status: 'failed', cause, error: { message, stack: null }, exitCode: null, ...ran })
  }

  /** Of a run whose code may use the network, what its fetches carried. */
  #usage(): Usage {
    const traffic = this.#traffic
    if (traffic === undefined || this.#job.egress === 'none') return unknownUsage
    return {
      ...unknownUsage,
      network_received_bytes: traffic.received,
      network_sent_bytes: traffic.sent,
    }
  }

  /** To metrics and traces, of what the run consisted. */
  #tell({ start, status, cause, phases }: DoneHeader): void {
    const { metrics } = this.#pool
    const { function: fn, traceparent } = this.#job
    const onPhase = this.#onPhase
    if (start === 'warm') metrics?.started(fn?.name, start, 0, traceparent)
    if (phases === undefined) return
    const now = preciseNow()
    const within = (ms: number, from: number) => Math.min(Math.max(fromMonotonic(ms), from), now)
    let waitedUntil = Number.POSITIVE_INFINITY
    for (const [name, from, to] of phases) {
      const earliest = name === 'guest' ? this.#askedAt : this.#preparedAt
      const [begun, ended] = [within(from, earliest), within(to, earliest)]
      if (begun >= this.#askedAt) waitedUntil = Math.min(waitedUntil, begun)
      if (name === 'guest') {
        if (start !== 'warm')
          metrics?.started(fn?.name, start, (begun - this.#preparedAt) / 1_000, traceparent)
        this.#tellGuest(begun, ended, status === 'completed' ? undefined : (cause ?? status))
      } else {
        metrics?.phase(name, (ended - begun) / 1_000, traceparent)
        onPhase?.({ name, start: begun, end: ended })
      }
    }
    const waited = waitedUntil - this.#askedAt
    if (waited >= shortWaitMs && waited < Number.POSITIVE_INFINITY)
      onPhase?.({ name: 'wait for sandbox', start: this.#askedAt, end: waitedUntil })
  }

  #tellGuest(start: number, end: number, error: string | undefined): void {
    this.#onPhase?.({ name: 'guest', start, end, ...(error === undefined ? {} : { error }) })
  }

  get #onPhase(): ((phase: Phase) => void) | undefined {
    return this.#job.traced === true ? this.#events?.onPhase : undefined
  }

  #acquire() {
    const reserved = this.#child
    if (reserved !== undefined && !reserved.dying) return this.begin(reserved)
    this.#child = undefined
    this.waitingSince = performance.now()
    const child = this.#pool.acquire(this)
    if (child !== undefined) this.begin(child)
  }

  #fail(cause: 'backend_unavailable' | 'invalid_workload' | 'runner_lost', message: string): void {
    this.#settle({ status: 'failed', cause, error: { message, stack: null }, exitCode: null, ...nothingRan })
  }

  #settle(outcome: Outcome) {
    const traffic = this.#traffic
    clearTimeout(this.#grace)
    this.#released = true
    this.#giveBack()
    if (traffic === undefined) return this.#finish(outcome)
    const failed = outcome.status === 'failed' ? outcome.error.message : 'the call was stopped'
    const closed = traffic.close(failed)
    if (!traffic.responding) return this.#finish(outcome)
    // The code is through, and its child works for others; the response may still be on its way to a slow reader.
    this.#delivering = true
    if (outcome.status !== 'completed') traffic.cut(failed)
    void closed.then(() => {
      const { usage, start } = outcome
      this.#finish(this.#aborted ? { status: 'stopped', usage, start } : outcome)
    })
  }

  #finish(outcome: Outcome): void {
    const resolve = this.#resolve
    this.#signal?.removeEventListener('abort', this)
    this.#events = undefined
    resolve?.(outcome)
  }

  #giveBack(): void {
    const child = this.#child
    this.#child = undefined
    if (child === undefined) return
    this.#pool.giveBack(child)
  }
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

/** What the user’s code finds as `ctx.signal.reason.message`. */
function stopMessage(reason: unknown): string {
  return typeof reason === 'string' ? `the workload was stopped: ${reason}` : 'the workload was stopped'
}
