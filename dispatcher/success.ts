/** Which share of workloads succeeds these minutes. */

const slotMs = 30_000
const slots = 10

interface Tally {
  /** Completed and failed by slot, and the number of the slot that was last counted in. */
  completed: number[]
  failed: number[]
  last: number
}

/** Completed and failed workloads of the last five minutes, in slots of half a minute. */
export class SuccessWindow {
  readonly #tallies = new Map<string, Map<string, Tally>>()

  add(isolation: string, fn: string, completed: boolean, now: number): void {
    let functions = this.#tallies.get(isolation)
    if (functions === undefined) {
      functions = new Map()
      this.#tallies.set(isolation, functions)
    }
    let tally = functions.get(fn)
    if (tally === undefined) {
      tally = {
        completed: Array(slots).fill(0),
        failed: Array(slots).fill(0),
        last: Math.floor(now / slotMs),
      }
      functions.set(fn, tally)
    }
    const counts = completed ? roll(tally, now).completed : roll(tally, now).failed
    counts[tally.last % slots]!++
  }

  /** Where nothing has ended there is no ratio. */
  *ratios(now: number): Iterable<readonly [ratio: number, isolation: string, fn: string]> {
    for (const [isolation, functions] of this.#tallies)
      for (const [fn, tally] of functions) {
        const completed = total(roll(tally, now).completed)
        const all = completed + total(tally.failed)
        if (all > 0) yield [completed / all, isolation, fn]
      }
  }
}

const total = (counts: number[]): number => counts.reduce((sum, n) => sum + n, 0)

/** Empties the slots that time has passed over. A clock that was set back counts on in the last slot. */
function roll(tally: Tally, now: number): Tally {
  const slot = Math.floor(now / slotMs)
  for (let n = Math.max(tally.last + 1, slot - slots + 1); n <= slot; n++) {
    tally.completed[n % slots] = 0
    tally.failed[n % slots] = 0
  }
  tally.last = Math.max(tally.last, slot)
  return tally
}
