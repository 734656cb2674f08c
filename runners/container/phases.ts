/** What the start of a job is made of, measured: counted always, and told to its trace where it has one. */
import { type Attributes, preciseNow } from '../../shared/tracing.ts'
import type { PhaseName, RunnerMetrics } from '../metrics.ts'
import type { Job, Phase, RunEvents } from '../runner.ts'

type Tell = NonNullable<RunEvents['onPhase']>

export class Phases {
  readonly #metrics: RunnerMetrics | undefined
  readonly #traced: boolean
  readonly #job: Pick<Job, 'function' | 'traceparent'> | undefined
  readonly #began = performance.now()
  #tell: Tell | undefined
  /** Measured before anybody could be told. */
  #early: Phase[] = []
  /** Parts under way: their starts. */
  readonly #open = new Map<symbol, { name: PhaseName; start: number }>()
  #closed = false

  /** From the job’s `prepare` on. Without a job nothing is told, and nothing counted: what is made ahead. */
  constructor(job?: Pick<Job, 'function' | 'traceparent' | 'traced'>, metrics?: RunnerMetrics) {
    this.#job = job
    this.#metrics = job === undefined ? undefined : metrics
    this.#traced = job?.traced === true
  }

  /** A part of the start. `describe` gives its attributes, where somebody asks. */
  async measure<T>(
    name: PhaseName,
    work: () => Promise<T>,
    describe?: (result: T) => Attributes,
  ): Promise<T> {
    if (!this.#traced && this.#metrics === undefined) return await work()
    const part = this.begin(name)
    try {
      const result = await work()
      part.done(() => describe?.(result))
      return result
    } catch (error) {
      part.fail(error)
      throw error
    }
  }

  /** A part that begins now, and may turn out to be none: `drop` it then. One that is left open fails with the run. */
  begin(name: PhaseName): {
    done(describe?: () => Attributes | undefined): void
    fail(error: unknown): void
    drop(): void
  } {
    const start = preciseNow()
    const key = Symbol(name)
    this.#open.set(key, { name, start })
    const drop = () => void this.#open.delete(key)
    return {
      drop,
      done: (describe) => {
        drop()
        this.done(name, start, describe)
      },
      fail: (error) => {
        drop()
        this.add({ name, start, end: preciseNow(), error: String((error as Error).message).slice(0, 1_000) })
      },
    }
  }

  /** A part that began at `start` (ms since the epoch) is done now. */
  done(name: PhaseName, start: number, describe?: () => Attributes | undefined): void {
    if (!this.#traced && this.#metrics === undefined) return
    const end = preciseNow()
    this.#metrics?.phase(name, (end - start) / 1_000, this.#job?.traceparent)
    const attributes = this.#traced ? describe?.() : undefined
    this.add({ name, start, end, ...(attributes === undefined ? {} : { attributes }) })
  }

  add(phase: Phase): void {
    if (!this.#traced || this.#closed) return
    if (this.#tell === undefined) this.#early.push(phase)
    else this.#tell(phase)
  }

  /** Somebody can be told from now on; what was measured by now is told at once. */
  tell(onPhase: Tell | undefined): void {
    if (onPhase === undefined) return
    this.#tell = onPhase
    for (const phase of this.#early) onPhase(phase)
    this.#early = []
  }

  /** What the start is busy with: the last part that has begun and goes on. */
  get underWay(): PhaseName | undefined {
    return [...this.#open.values()].at(-1)?.name
  }

  /** The run is over: what is under way ends now for its trace, and says so. */
  close(): void {
    const end = preciseNow()
    for (const open of this.#open.values()) this.add({ ...open, end, error: 'the run ended before it' })
    this.#closed = true
  }

  /** The code is about to run. */
  started(start: 'cold' | 'pooled' | 'warm'): void {
    const { function: ref, traceparent } = this.#job ?? {}
    this.#metrics?.started(ref?.name, start, (performance.now() - this.#began) / 1_000, traceparent)
  }
}

/** Of what nobody waits for. */
export const unmeasured = new Phases()
