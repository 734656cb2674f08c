/**
 * The boxes of handlers that have nothing to do: warm ones, which have run a job and wait for the next of the same
 * kind, and blank ones, which nobody has used yet. Idle boxes are frozen after a moment, and let go by age, number
 * and memory.
 */
import type { Sandbox } from './sandbox.ts'

export interface PoolOptions {
  /** An idle box is frozen after so many ms. */
  freezeMs: number
  /** A box that ran is let go when it has been idle for so many ms. */
  warmMs: number
  /** A blank of a kind that nobody asked for in so many ms is let go. */
  blankMs: number
  /** Idle boxes at most. */
  count: number
  /** Memory of all idle boxes together, MiB. */
  memoryMb: number
  /** One that is so many ms old is replaced: what user code leaks does not pile up for ever. */
  ageMs: number
}

export const poolDefaults: PoolOptions = {
  freezeMs: 250,
  warmMs: 5 * 60_000,
  blankMs: 10 * 60_000,
  count: 64,
  memoryMb: 1024,
  ageMs: 30 * 60_000,
}

/** As after so many runs. */
const maxRuns = 20_000
/** Kinds of blanks kept at once; those asked for longest ago go first. */
const maxKinds = 6
/** After a box was taken, another is made so many ms later: the one that was taken needs the cores now. */
const refillMs = 100
/** After one that could not be made, the next is tried this much later, twice as late each time, up to the second. */
const backoffMs = 1_000
const maxBackoffMs = 60_000

/** Of an idle box, whatever is measured: an interpreter and what guards it, MiB. */
const leastMb = 32
const sizeOf = ({ memoryMb }: Sandbox) => Math.max(leastMb, memoryMb)
const fresh = { askedAt: 0, failures: 0, retryAt: 0, sizeMb: leastMb }

/** A kind of box to be kept ready. */
interface Stock {
  count: number
  make(): Promise<Sandbox>
  askedAt: number
  failures: number
  retryAt: number
  /** Of the last that was made. */
  sizeMb: number
}

export class Pool {
  readonly #options: PoolOptions
  /** Every box of handlers that there is, idle or not. */
  readonly #all = new Set<Sandbox>()
  /** The longest idle first. */
  readonly #idle = new Set<Sandbox>()
  /** Of those idle ones that nobody has used. */
  readonly #blanks = new Map<Sandbox, string>()
  readonly #freezers = new Map<Sandbox, NodeJS.Timeout>()
  /** By blank key, those asked for longest ago first. */
  readonly #kinds = new Map<string, Stock>()
  /** By program key: boxes with that program in them, idle or at work. */
  readonly #programs = new Map<string, Stock>()
  readonly #sweeper: NodeJS.Timeout
  #refill: NodeJS.Timeout | undefined
  /** One is being made. */
  #making = false
  #closed = false

  constructor(options: Partial<PoolOptions> = {}) {
    this.#options = { ...poolDefaults, ...options }
    this.#sweeper = setInterval(() => this.#sweep(), 1_000)
    this.#sweeper.unref()
  }

  /** Counts a box that was made for a job. */
  add(sandbox: Sandbox) {
    this.#all.add(sandbox)
    if (this.#closed) return this.drop(sandbox)
    // One at work is looked after by its job.
    void sandbox.box.exited.then(() => {
      if (this.#idle.has(sandbox)) this.drop(sandbox)
    })
  }

  /** An idle box that ran a job with this key last. It is the caller’s, who has it thawed. */
  takeWarm(key: string): Sandbox | undefined {
    let found: Sandbox | undefined
    for (const sandbox of this.#idle) if (sandbox.warmKey === key && sandbox.usable) found = sandbox
    return found === undefined ? undefined : this.#take(found)
  }

  /** A box with this program in it that has run nothing yet. */
  takePrepared(programKey: string): Sandbox | undefined {
    for (const sandbox of this.#idle)
      if (sandbox.warmKey === undefined && sandbox.programKey === programKey && sandbox.usable)
        return this.#take(sandbox)
    return undefined
  }

  /** A blank box of this kind. Others are made where none is left: who asks will ask again. */
  takeBlank(key: string, count: number, make: () => Promise<Sandbox>): Sandbox | undefined {
    this.stock(key, count, make)
    for (const [sandbox, kind] of this.#blanks)
      if (kind === key && sandbox.usable) {
        this.#blanks.delete(sandbox)
        return this.#take(sandbox)
      }
    return undefined
  }

  /** Keeps so many blanks of this kind, for as long as somebody asks for them; for ever where it is `standing`. */
  stock(key: string, count: number, make: () => Promise<Sandbox>, standing = false): void {
    // The same as before: what is being made for it may fail, and that must be known.
    const stock = this.#kinds.get(key) ?? { count, make, ...fresh }
    const stays = standing || stock.askedAt === Number.POSITIVE_INFINITY
    Object.assign(stock, { count, make, askedAt: stays ? Number.POSITIVE_INFINITY : performance.now() })
    this.#kinds.delete(key)
    this.#kinds.set(key, stock)
    for (const kind of this.#kinds.keys()) {
      if (this.#kinds.size <= maxKinds) break
      if (this.#kinds.get(kind)!.askedAt !== Number.POSITIVE_INFINITY) this.#forgetKind(kind)
    }
    this.#refillSoon()
  }

  /** Keeps so many boxes with this program in them, whether they ran or not; 0: none more than are asked for. */
  keep(programKey: string, count: number, make: () => Promise<Sandbox>): void {
    if (count === 0) {
      this.#programs.delete(programKey)
      return
    }
    this.#programs.set(programKey, { count, make, ...fresh })
    this.#refillSoon()
  }

  /** Gives a box back that can take another run. */
  giveBack(sandbox: Sandbox) {
    const worn = sandbox.shim!.runs >= maxRuns || performance.now() - sandbox.madeAt > this.#options.ageMs
    if (this.#closed || worn || !sandbox.usable) return this.drop(sandbox)
    sandbox.idleSince = performance.now()
    this.#idle.add(sandbox)
    this.#freezers.set(
      sandbox,
      setTimeout(() => {
        this.#freezers.delete(sandbox)
        sandbox.freeze()
      }, this.#options.freezeMs),
    )
    this.#trim()
  }

  /** Lets go of a box, idle or not. */
  drop(sandbox: Sandbox): void {
    if (!this.#all.has(sandbox)) return
    this.#take(sandbox)
    this.#blanks.delete(sandbox)
    // Counted until it is gone: it is a process that is alive.
    void sandbox.close().then(() => {
      this.#all.delete(sandbox)
      this.#refillSoon()
    })
  }

  /** Boxes of handlers that stand idle, and those of them that nobody has used. */
  metrics(): { pool_idle: number; pool_blank: number } {
    return { pool_idle: this.#idle.size, pool_blank: this.#blanks.size }
  }

  /** Boxes at work; those that stand idle and have run nothing, or have; and those of both that get no time. */
  count(state: 'running' | 'idle' | 'warm' | 'paused'): number {
    if (state === 'running') return this.#all.size - this.#idle.size
    let found = 0
    for (const { warmKey, asleep } of this.#idle)
      if (state === 'paused' ? asleep : (warmKey === undefined) === (state === 'idle')) found++
    return found
  }

  async close(): Promise<void> {
    this.#closed = true
    clearInterval(this.#sweeper)
    clearTimeout(this.#refill)
    for (const timer of this.#freezers.values()) clearTimeout(timer)
    await Promise.all([...this.#all].map((sandbox) => sandbox.close()))
    this.#all.clear()
  }

  #take(sandbox: Sandbox): Sandbox {
    this.#idle.delete(sandbox)
    clearTimeout(this.#freezers.get(sandbox))
    this.#freezers.delete(sandbox)
    this.#refillSoon()
    return sandbox
  }

  #refillSoon(): void {
    if (this.#closed) return
    this.#refill ??= setTimeout(() => {
      this.#refill = undefined
      this.#restock()
    }, refillMs)
  }

  /** One at a time: each takes a core for a good part of a second. */
  #restock(): void {
    if (this.#making) return
    // What was asked for, and the first blank of a kind, push out what was idle longest; a further blank does not.
    const mayPush = this.#hasSurplus()
    for (const [key, stock] of this.#programs) {
      let held = 0
      for (const sandbox of this.#all) if (sandbox.programKey === key && sandbox.usable) held++
      if (held < stock.count && this.#isDue(stock, mayPush)) return void this.#make(stock)
    }
    for (const [key, stock] of this.#kinds)
      if (this.#blanksOf(key) === 0 && this.#isDue(stock, mayPush)) return void this.#make(stock, key)
    for (const [key, stock] of this.#kinds)
      if (this.#blanksOf(key) < stock.count && this.#isDue(stock, false)) return void this.#make(stock, key)
  }

  #isDue({ retryAt, sizeMb }: Stock, mayPush: boolean): boolean {
    const { count, memoryMb } = this.#options
    const hasRoom = this.#idle.size < count && this.#idleMb() + sizeMb <= memoryMb
    return retryAt <= performance.now() && (hasRoom || mayPush)
  }

  async #make(stock: Stock, blankKey?: string): Promise<void> {
    this.#making = true
    try {
      const sandbox = await stock.make()
      stock.failures = 0
      this.add(sandbox)
      const isWanted = blankKey === undefined || this.#kinds.has(blankKey)
      if (this.#closed || !isWanted) return this.drop(sandbox)
      const usage = await sandbox.box.usage().catch(() => undefined)
      sandbox.cpuMs = usage?.cpuMs ?? 0
      sandbox.disk = usage?.disk
      sandbox.memoryMb = usage?.memoryPeakMb ?? 0
      stock.sizeMb = sizeOf(sandbox)
      if (blankKey !== undefined) this.#blanks.set(sandbox, blankKey)
      this.giveBack(sandbox)
    } catch {
      // Whoever needs one makes one, and says why that cannot be.
      stock.failures++
      stock.retryAt = performance.now() + Math.min(maxBackoffMs, backoffMs * 2 ** stock.failures)
    } finally {
      this.#making = false
      this.#refillSoon()
    }
  }

  #forgetKind(key: string): void {
    this.#kinds.delete(key)
    for (const [sandbox, kind] of this.#blanks) if (kind === key) this.drop(sandbox)
  }

  #blanksOf(key: string): number {
    let held = 0
    for (const kind of this.#blanks.values()) if (kind === key) held++
    return held
  }

  #hasSurplus(): boolean {
    for (const sandbox of this.#idle) if (!this.#isKept(sandbox)) return true
    return false
  }

  /** The only blank of its kind, or one of those that were asked to be kept. */
  #isKept(sandbox: Sandbox): boolean {
    const kind = this.#blanks.get(sandbox)
    if (kind !== undefined) return this.#blanksOf(kind) === 1
    const stock = sandbox.programKey === undefined ? undefined : this.#programs.get(sandbox.programKey)
    if (stock === undefined) return false
    let held = 0
    for (const other of this.#all) if (other.programKey === sandbox.programKey && other.usable) held++
    return held <= stock.count
  }

  #sweep(): void {
    const now = performance.now()
    for (const [key, stock] of this.#kinds)
      if (now - stock.askedAt > this.#options.blankMs) this.#forgetKind(key)
    for (const sandbox of this.#idle) {
      if (this.#blanks.has(sandbox)) continue
      // Also of one that is kept: the addresses behind the names that it may reach were looked up when it was made.
      const isOld = now - sandbox.madeAt > this.#options.ageMs
      const isUnused = now - sandbox.idleSince >= this.#options.warmMs && !this.#isKept(sandbox)
      if (isOld || isUnused) this.drop(sandbox)
    }
    this.#refillSoon()
  }

  #idleMb(): number {
    let memory = 0
    for (const sandbox of this.#idle) memory += sizeOf(sandbox)
    return memory
  }

  /** Within number and memory: the longest idle first, those that are to be kept last. */
  #trim(): void {
    let memory = this.#idleMb()
    for (const kept of [false, true])
      for (const sandbox of this.#idle) {
        if (this.#idle.size <= this.#options.count && memory <= this.#options.memoryMb) return
        if (this.#isKept(sandbox) !== kept) continue
        memory -= sizeOf(sandbox)
        this.drop(sandbox)
      }
  }
}
