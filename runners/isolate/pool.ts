/**
 * The sandbox children of one runner: as few as serve it, more when runs are long, none that anything else could
 * have harmed. One child runs one workload at a time, so that whatever happens to it is the doing of that one.
 */
import { availableParallelism } from 'node:os'
import type { LogLevel } from '../../shared/workload.ts'
import type { EgressGate } from '../egress.ts'
import { inlineResponseBytes, type Job, type Outcome, type Prepared, type RunEvents } from '../runner.ts'
import { type Occupant, SandboxChild } from './child-process.ts'
import { HostLoad } from './host-load.ts'
import type { DoneHeader, Message, RunHeader } from './protocol.ts'
import { Traffic } from './traffic.ts'
import type { Walls } from './walls.ts'

export interface PoolOptions {
  /** Children kept even when nothing runs. */
  min: number
  /** Workloads that can run at once. */
  max: number
  /** A child over `min` is let go after so many ms without work. */
  idleMs: number
  /** MiB that the isolates kept warm in all children may hold together. */
  warmMb: number
}

/** How often, in ms, it is considered whether those who wait deserve another child. */
const patienceMs = 15
/** What another child costs, in ms: waiting less than this for one that is there is better. */
const startMs = 150
/** When no child has become free for so many ms, those who wait are behind something long. */
const stallMs = 50
/** When none has for so many ms, another child is tried even where the host has no time for one. */
const stuckMs = 500
/** Weight of the newest run in the running means of what runs take. */
const newest = 0.05
/** A run is long after so many ms: its child is no longer counted on, and its memory is watched. */
const longMs = 50
const watchMs = 25
/** A child that was told to stop has so many ms to say that it has. */
const graceMs = 150
const cores = availableParallelism()
/** Children starting at once: each takes a core for about 100 ms. */
const maxStarting = cores
/** An idle child with more resident memory than this is replaced, in MiB; a fresh one has about 65. */
const maxKeptMb = 384
/** Resident memory is looked at after so many runs. */
const sampleRuns = 50
/** After children that did not start, the next is tried this much later, twice as late each time, up to the second. */
const backoffMs = 50
const maxBackoffMs = 2_000

/** How long after a child came or let go of isolates, in ms, it is looked whether code is held warm often enough. */
const topUpMs = 100

/** What may be resident for a limit of `limitMb` on top of an idle child: V8’s young generation, garbage, buffers. */
const allowanceMb = (limitMb: number) => limitMb * 1.5 + 64

export class Pool {
  /** By which the code of its runs reaches the network. */
  readonly egress: EgressGate
  readonly #walls: Walls
  readonly #options: PoolOptions
  readonly #children = new Set<SandboxChild>()
  readonly #idle: SandboxChild[] = []
  readonly #load = new HostLoad()
  #waiting: Attempt[] = []
  #patience: NodeJS.Timeout | undefined
  #watch: NodeJS.Timeout | undefined
  #shrink: NodeJS.Timeout
  #retry: NodeJS.Timeout | undefined
  #topping: NodeJS.Timeout | undefined
  /** By key. */
  readonly #prewarmed = new Map<string, { header: RunHeader; code: string; count: number }>()
  #failures = 0
  #lastFailure = ''
  #closed = false
  /** When a child last became free. */
  #freedAt = 0
  /** Running means of what a run takes of its child’s time and of a core’s, in ms. */
  #meanMs = 0
  #meanCpuMs = 0
  #onChange: (() => void) | undefined

  constructor(walls: Walls, options: PoolOptions, egress: EgressGate) {
    this.#walls = walls
    this.egress = egress
    this.#options = options
    for (let i = 0; i < options.min; i++) this.#spawn()
    this.#shrink = setInterval(() => this.#letGo(), Math.max(50, options.idleMs / 4))
    this.#shrink.unref()
  }

  /** V8’s version, as a child said it; empty before one has. */
  get version(): string {
    for (const child of this.#children) if (child.version !== '') return child.version
    return ''
  }

  get size(): number {
    return this.#children.size
  }

  /** Of the children that are ready: one that is starting is no sandbox yet. */
  pids(): number[] {
    return [...this.#children].flatMap((child) => (child.ready ? child.pids : []))
  }

  prepare(job: Job): Attempt {
    const attempt = new Attempt(this, job)
    // Only for code that is warm nowhere: warm code waits for nothing, and should not hold a child meanwhile.
    if (this.#idle.length > 0 && !this.#isWarm(attempt.key)) {
      const child = this.#idle.pop()!
      attempt.reserve(child)
    }
    return attempt
  }

  /** A child for this key, or undefined: then `attempt.begin` is called when there is one. */
  acquire(attempt: Attempt): SandboxChild | undefined {
    if (this.#closed) {
      attempt.unavailable('the runner is shutting down')
      return undefined
    }
    const child = this.#takeIdle(attempt.key)
    if (child !== undefined) return child
    if (this.#failures >= 3 && this.#children.size === 0) {
      attempt.unavailable(this.#lastFailure)
      return undefined
    }
    this.#waiting.push(attempt)
    this.#patience ??= setTimeout(this.#impatient, patienceMs)
    return undefined
  }

  forget(attempt: Attempt): void {
    this.#waiting = this.#waiting.filter((other) => other !== attempt)
  }

  /** Keeps children ready with this code, as far as there are any; 0 lets them go. */
  prewarm(code: Code, count: number): void {
    const header: RunHeader = { ...headerOf(code), keep: count > 0 }
    if (count > 0) this.#prewarmed.set(header.key, { header, code: code.code, count })
    else {
      this.#prewarmed.delete(header.key)
      for (const child of this.#children)
        if (child.ready && child.keys.has(header.key))
          child.prepare({ ...header, warm_mb: this.warmMbEach }, code.code)
    }
    this.#topUp()
  }

  /** Gives back a child that is ready for the next run. */
  giveBack(child: SandboxChild) {
    if (child.dying) return
    const now = performance.now()
    this.#freedAt = now
    if (child.runs % sampleRuns === 0 || now - child.since > longMs) {
      child.idleRssMb = child.rssMb()
      if (child.idleRssMb > maxKeptMb) return this.retire(child)
    }
    child.since = now
    const next = this.#waiting.shift()
    if (next !== undefined) return next.begin(child)
    this.#idle.push(child)
    if (child.dropped) {
      child.dropped = false
      this.#topUpSoon()
    }
  }

  /** Replaces a child that nobody should use again. */
  retire(child: SandboxChild): void {
    child.kill('retired')
  }

  /** While runs are under way somebody looks at their memory. */
  watch(): void {
    this.#watch ??= setInterval(this.#look, watchMs)
  }

  /** Settles when `min` children are ready, or one of them could not be started. */
  filled(): Promise<void> {
    return new Promise((resolve) => {
      this.#onChange = () => {
        let ready = 0
        for (const child of this.#children) if (child.ready) ready++
        if (ready < this.#options.min && this.#failures === 0) return
        this.#onChange = undefined
        resolve()
      }
      this.#onChange()
    })
  }

  async close(): Promise<void> {
    this.#closed = true
    clearTimeout(this.#patience)
    clearTimeout(this.#retry)
    clearTimeout(this.#topping)
    clearInterval(this.#watch)
    clearInterval(this.#shrink)
    for (const attempt of this.#waiting.splice(0)) attempt.unavailable('the runner is shutting down')
    for (const child of this.#children) child.kill('retired')
    if (this.#children.size > 0)
      await new Promise<void>((resolve) => {
        this.#onChange = () => {
          if (this.#children.size === 0) resolve()
        }
      })
  }

  /** Soon, and not more often than it takes: children come and go by the dozen. */
  #topUpSoon(): void {
    if (this.#prewarmed.size === 0 || this.#closed) return
    this.#topping ??= setTimeout(() => {
      this.#topping = undefined
      this.#topUp()
    }, topUpMs)
  }

  #topUp(): void {
    for (const { header, code, count } of this.#prewarmed.values()) {
      let held = 0
      for (const child of this.#children) if (!child.dying && child.keys.has(header.key)) held++
      // Those with the least in them first; one that runs is not disturbed.
      const others = this.#idle.filter((child) => !child.keys.has(header.key))
      others.sort((a, b) => a.keys.size - b.keys.size)
      for (const child of others.slice(0, Math.max(0, count - held))) {
        child.prepare({ ...header, warm_mb: this.warmMbEach }, code)
        held++
      }
      if (held < count) this.#refill()
    }
  }

  /** Children wanted whether or not anything runs. */
  get #least(): number {
    let most = this.#options.min
    for (const { count } of this.#prewarmed.values()) most = Math.max(most, count)
    return Math.min(most, this.#options.max)
  }

  /** MiB of warm isolates for each child. */
  get warmMbEach(): number {
    return this.#options.warmMb / Math.max(1, this.#children.size)
  }

  #isWarm(key: string): boolean {
    for (const child of this.#children) if (child.keys.has(key)) return true
    return false
  }

  #takeIdle(key: string): SandboxChild | undefined {
    const idle = this.#idle
    for (let i = idle.length - 1; i >= 0; i--) if (idle[i]!.keys.has(key)) return idle.splice(i, 1)[0]
    return idle.pop()
  }

  #spawn(): void {
    if (this.#closed || this.#children.size >= this.#options.max) return
    const child = new SandboxChild(this.#walls, {
      onReady: (ready) => {
        this.#failures = 0
        this.giveBack(ready)
        this.#onChange?.()
        this.#topUpSoon()
      },
      onDying: (dying) => {
        const at = this.#idle.indexOf(dying)
        if (at >= 0) this.#idle.splice(at, 1)
      },
      onGone: (gone) => this.#lost(gone),
    })
    this.#children.add(child)
  }

  #lost(child: SandboxChild): void {
    this.#children.delete(child)
    // One that somebody else killed says nothing of whether the next will start.
    const failed = !child.ready && !child.killedByOthers
    if (failed) this.#failures++
    this.#onChange?.()
    if (this.#closed) return
    if (failed) {
      this.#lastFailure = `a sandbox could not be started: ${child.exit}${child.stderr === '' ? '' : `: ${child.stderr.trim().slice(-500)}`}`
      if (this.#failures >= 3 && this.#children.size === 0)
        for (const attempt of this.#waiting.splice(0)) attempt.unavailable(this.#lastFailure)
    }
    if (!child.ready) {
      this.#retry ??= setTimeout(
        () => {
          this.#retry = undefined
          this.#refill()
        },
        Math.min(maxBackoffMs, backoffMs * 2 ** this.#failures),
      )
      return
    }
    this.#refill()
  }

  #refill(): void {
    const wanted = Math.max(this.#least, this.#waiting.length > 0 ? this.#busyOrStarting() + 1 : 0)
    while (this.#children.size < Math.min(wanted, this.#options.max)) this.#spawn()
  }

  #busyOrStarting(): number {
    return this.#children.size - this.#idle.length
  }

  #starting(): number {
    let count = 0
    for (const child of this.#children) if (!child.ready) count++
    return count
  }

  #impatient = () => {
    this.#patience = undefined
    if (this.#waiting.length === 0) return
    if (this.#retry === undefined && this.#wouldHelp(performance.now())) {
      const more = Math.min(this.#waiting.length, maxStarting) - this.#starting()
      for (let i = 0; i < more; i++) this.#spawn()
    }
    this.#patience = setTimeout(this.#impatient, patienceMs)
  }

  /** What a run took of its child’s time and of a core’s, in ms. */
  ran(ms: number, cpuMs: number): void {
    this.#meanMs += (ms - this.#meanMs) * newest
    this.#meanCpuMs += (cpuMs - this.#meanCpuMs) * newest
  }

  /**
   * Whether those who wait would be served sooner by one more child: not when the ones there are soon through with
   * the queue, nor when the cores are busy already.
   */
  #wouldHelp(now: number): boolean {
    if (now - this.#waiting[0]!.waitingSince < patienceMs - 1) return false
    if (now - this.#freedAt > stuckMs) return true
    if (this.#load.isBusy(now)) return false
    if (now - this.#freedAt > stallMs) return true
    const children = this.#children.size
    const expectedMs = (this.#waiting.length * this.#meanMs) / Math.max(1, children)
    const busyCores = (children * this.#meanCpuMs) / Math.max(0.01, this.#meanMs)
    return expectedMs > startMs && busyCores < 0.9 * cores
  }

  #look = () => {
    let busy = 0
    let long = 0
    const now = performance.now()
    for (const child of this.#children) {
      if (!child.busy) continue
      busy++
      if (now - child.since < longMs / 2) continue
      if (now - child.since >= longMs) long++
      Attempt.of(child)?.checkMemory(child)
    }
    if (busy === 0) {
      clearInterval(this.#watch)
      this.#watch = undefined
      return
    }
    // When all are at something long, the next workload should find a child that is not.
    if (
      long > 0 &&
      this.#idle.length === 0 &&
      long === busy &&
      this.#starting() === 0 &&
      this.#failures === 0
    )
      this.#spawn()
  }

  #letGo(): void {
    const now = performance.now()
    // The longest idle stand first.
    let spare = this.#children.size - this.#least
    for (const child of [...this.#idle]) {
      if (spare <= 0 || now - child.since < this.#options.idleMs) break
      spare--
      child.kill('retired')
    }
  }
}

let clockMs = 0
let clockText = ''
/** Now as RFC 3339, formatted once per ms. */
function timestamp(): string {
  const now = Date.now()
  if (now !== clockMs) {
    clockMs = now
    clockText = new Date(now).toISOString()
  }
  return clockText
}

export type Code = Pick<Job, 'runtime' | 'code' | 'codeSha256' | 'limits'>

/** Isolates are used again for the same code in the same language under the same limit. */
function headerOf(job: Code): RunHeader {
  const typescript = job.runtime === 'typescript'
  const { memory_mb, output_mb } = job.limits
  return {
    key: `${job.codeSha256}.${typescript ? 'ts' : 'js'}.${memory_mb}`,
    typescript,
    memory_mb,
    // Known when it is sent.
    warm_mb: 0,
    output_bytes: Math.floor(output_mb * 1048576),
    inline_bytes: inlineResponseBytes,
  }
}

/** One job on its way through the pool. */
export class Attempt implements Prepared, Occupant {
  static readonly #byChild = new WeakMap<SandboxChild, Attempt>()
  static of(child: SandboxChild): Attempt | undefined {
    return Attempt.#byChild.get(child)
  }

  readonly key: string
  waitingSince = 0
  readonly #pool: Pool
  readonly #job: Job
  readonly #header: RunHeader
  #child: SandboxChild | undefined
  #signal: AbortSignal | undefined
  #events: RunEvents | undefined
  #traffic: Traffic | undefined
  #resolve: ((outcome: Outcome) => void) | undefined
  #aborted = false
  #released = false
  #delivering = false
  #grace: NodeJS.Timeout | undefined
  #peakMb = 0

  constructor(pool: Pool, job: Job) {
    this.#pool = pool
    this.#job = job
    this.#header = headerOf(job)
    this.key = this.#header.key
  }

  /** Holds `child` for this attempt and has it compile the code meanwhile. */
  reserve(child: SandboxChild): void {
    this.#child = child
    this.#header.warm_mb = this.#pool.warmMbEach
    child.prepare(this.#header, this.#job.code)
  }

  run(signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    return new Promise((resolve) => {
      this.#resolve = resolve
      this.#signal = signal
      this.#events = events
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
    const child = this.#child
    if (child === undefined) {
      this.#pool.forget(this)
      return this.#settle({ status: 'stopped', ...nothingRan })
    }
    child.cancel(stopMessage(this.#signal?.reason))
    this.#grace = setTimeout(() => child.kill('stopped'), graceMs)
  }

  begin(child: SandboxChild): void {
    this.#child = child
    const { id, attempt, traceparent, env, code, input } = this.#job
    const ctx = JSON.stringify({ id, attempt, traceparent: traceparent ?? null, env })
    Attempt.#byChild.set(child, this)
    const traffic = new Traffic(this.#job, this.#events!, this.#pool.egress, (kind, parts, number) =>
      child.post(kind, parts, number),
    )
    this.#traffic = traffic
    // A body that comes piece by piece cannot be sent again: then the child must not ask for the code.
    const entry = traffic.enter()
    const known = child.keys.has(this.key) && !traffic.streams
    this.#header.warm_mb = this.#pool.warmMbEach
    const header = traffic.streams ? { ...this.#header, follows: true } : this.#header
    child.start(this, header, ctx, known ? undefined : code, input, entry)
    traffic.begin()
    this.#pool.watch()
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
    this.begin(child)
  }

  onMessage(message: Message): void {
    this.#traffic!.handle(message)
  }

  onDone(header: DoneHeader, output: string | undefined, body: Buffer | undefined) {
    const { status, cause, message, stack, start, cpu_ms, memory_mb, response } = header
    const traffic = this.#traffic!
    this.#pool.ran(performance.now() - this.#child!.since, cpu_ms)
    const usage = { cpu_ms: round(cpu_ms), memory_peak_mb: round(Math.max(memory_mb, this.#peakMb)) }
    const ran = { usage, start }
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
    const usage = { cpu_ms: null, memory_peak_mb: this.#peakMb > 0 ? round(this.#peakMb) : null }
    const ran = { usage, start: 'cold' as const }
    if (this.#aborted) return this.#settle({ status: 'stopped', ...ran })
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
    Attempt.#byChild.delete(child)
    this.#pool.giveBack(child)
  }
}

const nothingRan = { usage: { cpu_ms: null, memory_peak_mb: null }, start: 'cold' as const }

const round = (amount: number) => Math.round(amount * 1000) / 1000

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
