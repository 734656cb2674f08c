/**
 * The sandbox children of one runner: as few as serve it, more when runs are long, none that anything else could
 * have harmed. One child runs one workload at a time, so that whatever happens to it is the doing of that one.
 */
import { availableParallelism } from 'node:os'
import type { EgressGate } from '../egress.ts'
import type { RunnerMetrics } from '../metrics.ts'
import type { Job } from '../runner.ts'
import { Attempt, type Code, headerOf, type Seats } from './attempt.ts'
import { type Occupant, SandboxChild } from './child-process.ts'
import { HostLoad } from './host-load.ts'
import type { RunHeader } from './protocol.ts'
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
/** Runs that take their child for less than this (ms), as those of the same code did before, are sent ahead. */
const shortMs = 2
/** So many are sent ahead to a child at most. */
const maxAhead = 8
/** Behind a run that takes longer than this (ms) nothing is left waiting that has not begun. */
const slowMs = 15
/** Codes of which it is remembered what their runs take. */
const maxKnown = 10_000
/** Where all cores are busy with short runs, one child over the least is let go every so many ms. */
const thinMs = 1_000
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

export class Pool implements Seats {
  readonly egress: EgressGate
  /** Once `measure` was called. */
  metrics: RunnerMetrics | undefined
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
  #hurry: NodeJS.Timeout | undefined
  /** When a child was last let go because the cores were busy. */
  #thinnedAt = 0
  /** By key: the running mean of what its runs take, in ms, as the children say it. */
  readonly #wallMs = new Map<string, number>()
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

  /** Counts from now on, and tells of its children and what they hold warm. */
  measure(metrics: RunnerMetrics): void {
    this.metrics = metrics
    metrics.pool('idle', () => this.#idle.length)
    metrics.pool('running', () => [...this.#children].filter((child) => child.busy).length)
    metrics.pool('warm', () => [...this.#children].reduce((sum, child) => sum + child.keys.size, 0))
    metrics.cache('warm isolates', () => {
      let mb = 0
      for (const { keys } of this.#children) for (const one of keys.values()) mb += one
      return mb * 1_048_576
    })
  }

  /** Of the children that are ready: one that is starting is no sandbox yet. */
  pids(): number[] {
    return [...this.#children].flatMap((child) => (child.ready ? child.pids : []))
  }

  prepare(job: Job & Code): Attempt {
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
    // Where no core is free an idle child would only be woken to take its time from the others.
    const busy = this.#load.isBusy(performance.now()) ? this.#busyFor(attempt) : undefined
    const child = busy ?? this.#takeIdle(attempt.key)
    if (child !== undefined) return child
    if (this.#failures >= 3 && this.#children.size === 0) {
      attempt.unavailable(this.#lastFailure)
      return undefined
    }
    this.#waiting.push(attempt)
    this.#sendAhead()
    return undefined
  }

  /** What was sent ahead to `child` and has not begun waits again. */
  takeBack(child: SandboxChild): void {
    this.#requeue(child.takeBack())
    if (!child.busy && !child.dying && child.ready) this.giveBack(child)
  }

  forget(attempt: Attempt): void {
    this.#waiting = this.#waiting.filter((other) => other !== attempt)
  }

  /** Keeps children ready with this code, as far as there are any; 0 lets them go. */
  prewarm(code: Code, count: number): void {
    const header: RunHeader = { ...headerOf(code), keep: count > 0 }
    const { text } = code.source
    if (count > 0) this.#prewarmed.set(header.key, { header, code: text, count })
    else {
      this.#prewarmed.delete(header.key)
      for (const child of this.#children)
        if (child.ready && child.keys.has(header.key))
          child.prepare({ ...header, warm_mb: this.warmMbEach }, text)
    }
    this.#topUp()
  }

  /** Gives back a child that is ready for the next run, or at the next already that was sent ahead. */
  giveBack(child: SandboxChild) {
    if (child.dying) return
    const now = performance.now()
    this.#freedAt = now
    if (child.runs % sampleRuns === 0 || child.lastMs > longMs) {
      child.idleRssMb = child.rssMb()
      if (child.idleRssMb > maxKeptMb) {
        child.closing = true
        this.#requeue(child.takeBack())
      }
    }
    if (child.busy) return this.#sendAhead()
    if (child.closing || this.#isTooMany(now)) return this.retire(child)
    child.since = now
    const next = this.#waiting.shift()
    if (next !== undefined) {
      next.begin(child)
      return this.#sendAhead()
    }
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
    clearTimeout(this.#hurry)
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
      onReturned: (occupants) => this.#requeue(occupants),
    })
    this.#children.add(child)
  }

  #lost(child: SandboxChild): void {
    this.#children.delete(child)
    if (child.killedAt !== undefined) this.metrics?.cleanedUp((performance.now() - child.killedAt) / 1_000)
    // One that somebody else killed says nothing of whether the next will start.
    const failed = !child.ready && !child.killedByOthers
    if (failed) this.#failures++
    this.#onChange?.()
    if (this.#closed) return
    if (failed) {
      this.metrics?.sandboxFailed('start')
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

  /** To the head of the queue: they have waited longest. */
  #requeue(occupants: Occupant[]): void {
    if (occupants.length === 0) return
    const attempts = occupants as Attempt[]
    for (const attempt of attempts) attempt.returned()
    this.#waiting.unshift(...attempts)
    this.#patience ??= setTimeout(this.#impatient, patienceMs)
  }

  /** Those who wait need not wait for a child to be free. */
  #sendAhead(): void {
    for (let next = this.#waiting[0]; next !== undefined; next = this.#waiting[0]) {
      const child = this.#busyFor(next)
      if (child === undefined) {
        this.#patience ??= setTimeout(this.#impatient, patienceMs)
        return
      }
      this.#waiting.shift()
      next.begin(child)
    }
  }

  /**
   * A busy child to which a run can be sent ahead: its code is warm there, and neither it nor what is under way takes
   * long. A child that goes on by itself need not be woken for each run.
   */
  #busyFor(attempt: Attempt): SandboxChild | undefined {
    if (!attempt.isWhole || !this.#isShort(attempt.key)) return undefined
    const now = performance.now()
    let best: SandboxChild | undefined
    for (const child of this.#children)
      if (
        child.ahead < Math.min(maxAhead, best?.ahead ?? maxAhead) &&
        child.busy &&
        !child.dying &&
        !child.closing &&
        child.keys.has(attempt.key) &&
        now - child.since < slowMs &&
        this.#isShort(Attempt.of(child)!.key)
      )
        best = child
    if (best !== undefined) this.#hurry ??= setTimeout(this.#unstick, slowMs)
    return best
  }

  #isShort(key: string): boolean {
    return (this.#wallMs.get(key) ?? Number.POSITIVE_INFINITY) < shortMs
  }

  /** Nothing is left behind a run that turned out to be long. */
  #unstick = () => {
    this.#hurry = undefined
    const now = performance.now()
    let waits = false
    for (const child of this.#children) {
      if (!child.busy || child.ahead === 0 || child.ahead === Number.POSITIVE_INFINITY) continue
      if (now - child.since >= slowMs) this.takeBack(child)
      else waits = true
    }
    if (waits) this.#hurry ??= setTimeout(this.#unstick, slowMs)
    for (let next = this.#waiting[0]; next !== undefined; next = this.#waiting[0]) {
      const child = this.#takeIdle(next.key)
      if (child === undefined) break
      this.#waiting.shift()
      next.begin(child)
    }
  }

  /** Short runs on busy cores are not served sooner by more children, which only take memory. */
  #isTooMany(now: number): boolean {
    if (this.#children.size <= Math.max(this.#least, cores) || now - this.#thinnedAt < thinMs) return false
    if (this.#meanMs > longMs || !this.#load.isBusy(now)) return false
    this.#thinnedAt = now
    return true
  }

  /** What a run took of its child’s time and of a core’s, in ms; `wallMs` is what the child says of the first. */
  ran(key: string, ms: number, cpuMs: number, wallMs: number): void {
    const known = this.#wallMs.get(key)
    if (known === undefined && this.#wallMs.size >= maxKnown) this.#wallMs.clear()
    // One long run is reason enough for care, and takes many short ones to be forgotten.
    this.#wallMs.set(key, known === undefined || wallMs > known ? wallMs : known + (wallMs - known) * newest)
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
