/** One piece of work for all that ask for it while it goes on; stopped when nobody waits for it any more. */
export class Flights<T> {
  /** Also those that nobody waits for and that are about to stop. */
  readonly #all = new Set<Promise<T>>()
  readonly #running = new Map<string, { waiting: number; stop: AbortController; result: Promise<T> }>()

  /** Rejects with the signal’s reason as soon as it aborts. */
  async join(key: string, signal: AbortSignal, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    signal.throwIfAborted()
    let flight = this.#running.get(key)
    if (flight === undefined) {
      const stop = new AbortController()
      const result = work(stop.signal).finally(() => {
        this.#all.delete(result)
        if (this.#running.get(key)?.stop === stop) this.#running.delete(key)
      })
      this.#all.add(result)
      flight = { waiting: 0, stop, result }
      this.#running.set(key, flight)
    }
    flight.waiting++
    const aborted = Promise.withResolvers<never>()
    const abort = () => aborted.reject(signal.reason)
    signal.addEventListener('abort', abort, { once: true })
    try {
      return await Promise.race([flight.result, aborted.promise])
    } finally {
      signal.removeEventListener('abort', abort)
      if (--flight.waiting === 0) {
        // Who comes from now on begins anew.
        if (this.#running.get(key) === flight) this.#running.delete(key)
        flight.stop.abort(new Error('nobody waits for it any more'))
      }
    }
  }

  /** Settles when nothing of it goes on. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#all)
  }
}

/** At most so many at once; the others wait their turn. */
export class Turns {
  #free: number
  readonly #waiting: (() => void)[] = []

  constructor(count: number) {
    this.#free = count
  }

  async take<T>(work: () => Promise<T>): Promise<T> {
    if (this.#free > 0) this.#free--
    else await new Promise<void>((resolve) => this.#waiting.push(resolve))
    try {
      return await work()
    } finally {
      const next = this.#waiting.shift()
      if (next) next()
      else this.#free++
    }
  }
}
