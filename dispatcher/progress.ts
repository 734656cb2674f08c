/** How far a stream has been folded, and waiting until it is far enough. */
export class Progress {
  /** Sequence of the last message folded and committed. */
  seq = 0
  /** True once everything stored has been folded, since the database was opened. */
  caughtUp = false
  /** False until a database has said it. */
  isKnown = false
  /** Asks whoever folds to commit what has arrived. */
  hurry: () => void = () => {}
  #behind: () => number | undefined = () => undefined
  readonly #waiting = new Set<{ seq: number; resolve: (reached: boolean) => void }>()

  /** Messages stored and not yet folded; undefined while unknown. */
  get lag(): number | undefined {
    const lag = this.#behind()
    if (lag === 0) this.caughtUp = true
    return lag
  }

  /** Everything up to `seq` is committed. */
  advance(seq: number): void {
    this.seq = seq
    void this.lag
    for (const waiter of this.#waiting) {
      if (waiter.seq > seq) continue
      this.#waiting.delete(waiter)
      waiter.resolve(true)
    }
    if (this.#waiting.size > 0) this.hurry()
  }

  /** Begins again behind `seq`, on another database or stream; `behind` says how much is left. */
  restart(seq: number, behind: () => number | undefined, hurry: () => void): void {
    this.caughtUp = false
    this.isKnown = true
    this.#behind = behind
    this.hurry = hurry
    this.seq = seq
    this.advance(seq)
  }

  /** True as soon as the message with this sequence is committed; false when that takes longer than `ms`. */
  async reached(seq: number, ms: number): Promise<boolean> {
    if (seq <= this.seq) return true
    return await new Promise((resolve) => {
      const waiter = {
        seq,
        resolve: (reached: boolean) => {
          clearTimeout(timer)
          resolve(reached)
        },
      }
      const timer = setTimeout(() => {
        this.#waiting.delete(waiter)
        resolve(false)
      }, ms)
      this.#waiting.add(waiter)
      this.hurry()
    })
  }
}

/** Tells who reads a workload’s logs that something of it was committed. */
export class Changes {
  readonly #listeners = new Map<string, Set<() => void>>()

  /** Calls back after every commit that touches the workload; returns how to stop that. */
  watch(workload: string, listener: () => void): () => void {
    const listeners = this.#listeners.get(workload) ?? new Set()
    this.#listeners.set(workload, listeners.add(listener))
    return () => {
      listeners.delete(listener)
      if (listeners.size === 0 && this.#listeners.get(workload) === listeners)
        this.#listeners.delete(workload)
    }
  }

  committed(workloads: Iterable<string>): void {
    if (this.#listeners.size === 0) return
    for (const workload of workloads) for (const listener of this.#listeners.get(workload) ?? []) listener()
  }

  /** Workloads that are watched now. */
  get size(): number {
    return this.#listeners.size
  }
}
