/**
 * Keeps the event loop turning for a moment instead of letting the process sleep. With a single workload in hand,
 * the next thing to happen (the stream’s acknowledgement, the sandbox’s answer) is about 0.1 ms away, and being
 * woken for it costs a third of that. Under load nothing sleeps anyway, and nobody keeps vigil.
 */
import { availableParallelism } from 'node:os'

/** Milliseconds after the last `keep` that the loop turns at most. */
const patienceMs = 0.4

/** On a single core the turning would only keep others from what is waited for. */
const worthIt = availableParallelism() > 1

export class Vigil {
  readonly #quiet: () => boolean
  #until = 0
  #turning = false

  /** `quiet` says whether so little is going on that a vigil takes nothing from anybody. */
  constructor(quiet: () => boolean) {
    this.#quiet = quiet
  }

  /** Something is about to happen. */
  keep(): void {
    this.#until = performance.now() + patienceMs
    if (this.#turning || !worthIt) return
    this.#turning = true
    setImmediate(this.#turn)
  }

  #turn = (): void => {
    this.#turning = this.#quiet() && performance.now() < this.#until
    if (this.#turning) setImmediate(this.#turn)
  }
}
