/** Waits for descriptors and deadlines; everything else in the agent happens in what it calls. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'

export interface Watch {
  readonly fd: number
  /** `pollEvents` that are wanted; 0: none, not even a hang-up. */
  events: number
}

interface Entry extends Watch {
  onReady(events: number): void
}

interface Timer {
  at: number
  run(): void
}

const structureBytes = 8
const maxWatches = 16

export class Loop {
  #watches: Entry[] = []
  #timers: Timer[] = []
  readonly #buffer = new ArrayBuffer(maxWatches * structureBytes)
  readonly #descriptors = new Int32Array(this.#buffer)
  readonly #events = new Int16Array(this.#buffer)

  watch(fd: number, events: number, onReady: (events: number) => void): Watch {
    const entry = { fd, events, onReady }
    this.#watches.push(entry)
    return entry
  }

  /** The descriptor may be closed after this. */
  forget(watch: Watch): void {
    watch.events = 0
    this.#watches = this.#watches.filter((entry) => entry !== watch)
  }

  after(ms: number, run: () => void): void {
    this.#timers.push({ at: os.now() + ms, run })
  }

  /** Never returns. Every descriptor that is ready is served once before any is served again. */
  run(): never {
    for (;;) {
      const wanted = this.#watches.filter((entry) => entry.events !== 0).slice(0, maxWatches)
      wanted.forEach((entry, index) => {
        this.#descriptors[index * 2] = entry.fd
        this.#events[index * 4 + 2] = entry.events
        this.#events[index * 4 + 3] = 0
      })
      const ready = linux.poll(this.#buffer, wanted.length, this.#patience())
      if (ready > 0) {
        const came = wanted.map((_entry, index) => this.#events[index * 4 + 3]!)
        wanted.forEach((entry, index) => {
          // One that was served before it may have done away with this one.
          if (came[index] !== 0 && entry.events !== 0) entry.onReady(came[index]!)
        })
      }
      this.#runDue()
    }
  }

  #patience(): number {
    if (this.#timers.length === 0) return -1
    return Math.max(0, Math.ceil(Math.min(...this.#timers.map(({ at }) => at)) - os.now()))
  }

  #runDue(): void {
    if (this.#timers.length === 0) return
    const now = os.now()
    const due = this.#timers.filter(({ at }) => at <= now)
    this.#timers = this.#timers.filter(({ at }) => at > now)
    for (const timer of due) timer.run()
  }
}
