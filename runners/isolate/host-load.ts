/** Whether the host’s cores are all at work already: then another sandbox only takes time from those that are there. */
import { readFileSync } from 'node:fs'

/** The share of idle time is taken over at least so many ms. */
const windowMs = 50
/** A host that was idle for less than this share of the time is busy. */
const idleShare = 0.1

/** Ticks since the host’s start: all of them, and those in which a core had nothing to do (`man 5 proc_stat`). */
interface Ticks {
  all: number
  idle: number
}

function readTicks(): Ticks | undefined {
  try {
    const text = readFileSync('/proc/stat', 'latin1')
    const ticks = text.slice(0, text.indexOf('\n')).trim().split(/\s+/).slice(1, 9).map(Number)
    return { all: ticks.reduce((sum, value) => sum + value, 0), idle: ticks[3]! + ticks[4]! }
  } catch {
    return undefined
  }
}

export class HostLoad {
  #at = performance.now()
  #last = readTicks()
  #busy = false

  /** As of the last window that is over; false where the host does not tell. */
  isBusy(now: number): boolean {
    if (this.#last === undefined || now - this.#at < windowMs) return this.#busy
    const ticks = readTicks()
    if (ticks === undefined || ticks.all === this.#last.all) return this.#busy
    // After a pause it says how that was, not how it is now.
    const recent = now - this.#at < 20 * windowMs
    this.#busy = recent && (ticks.idle - this.#last.idle) / (ticks.all - this.#last.all) < idleShare
    this.#last = ticks
    this.#at = now
    return this.#busy
  }
}
