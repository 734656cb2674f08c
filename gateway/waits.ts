/**
 * Waiting for a workload’s end: the server republishes every end as it stores it, and once a second the recorded
 * end is looked for as well, so that a lost message costs a second and not the answer.
 */
import type { Bus } from '../shared/bus.ts'
import { type EndEvent, isEnd, type LifecycleEvent } from '../shared/events.ts'
import { storedEnds, workloadOf } from '../shared/subjects.ts'
import { TransientMap } from '../shared/transient-map.ts'
import type { WorkloadId } from '../shared/workload.ts'

const lookAfterMs = 1_000
/** The same where something else tells of the end as well. */
const leniently = 15_000
/** Look-ups on their way at once; with more waits than that a round takes longer. */
const lookups = 16

export interface Wait {
  /** The end; undefined when the wait was given up. Never rejects. */
  readonly ended: Promise<EndEvent | undefined>
  giveUp(): void
  /** The recorded end is looked for only now and then, for a wait that may be long and is not all there is. */
  beLenient(): void
}

interface Waiting {
  /** When the recorded end is looked for next, ms since the epoch. */
  lookAt: number
  everyMs: number
  resolve(event: EndEvent | undefined): void
}

export class Waits {
  readonly #waiting = new TransientMap<WorkloadId, Set<Waiting>>()
  readonly #bus: Bus
  readonly #timer: NodeJS.Timeout
  readonly #ends: { unsubscribe(): void }[]
  #looking = false

  constructor(bus: Bus) {
    this.#bus = bus
    this.#ends = storedEnds.map((subject) =>
      bus.listen(subject, (message) => {
        const id = workloadOf(message.subject)
        if (!this.#waiting.has(id)) return
        const end = parseEnd(message.string())
        if (end?.subject === id) this.settle(id, end)
      }),
    )
    this.#timer = setInterval(() => void this.#look(), lookAfterMs)
  }

  /** Begins to wait; to be called before the request is published. */
  begin(id: WorkloadId): Wait {
    const { promise, resolve } = Promise.withResolvers<EndEvent | undefined>()
    const waiting: Waiting = { lookAt: Date.now() + lookAfterMs, everyMs: lookAfterMs, resolve }
    const others = this.#waiting.get(id)
    if (others === undefined) this.#waiting.set(id, new Set([waiting]))
    else others.add(waiting)
    const giveUp = () => {
      const all = this.#waiting.get(id)
      if (all?.delete(waiting) && all.size === 0) this.#waiting.delete(id)
      resolve(undefined)
    }
    const beLenient = () => {
      waiting.everyMs = leniently
      waiting.lookAt = Date.now() + leniently
    }
    return { ended: promise, giveUp, beLenient }
  }

  /** Ends every wait for a workload. */
  settle(id: WorkloadId, event: EndEvent): void {
    for (const waiting of this.#waiting.delete(id) ?? []) waiting.resolve(event)
  }

  async #look(): Promise<void> {
    if (this.#looking || !this.#bus.connected) return
    this.#looking = true
    const now = Date.now()
    const queue: WorkloadId[] = []
    for (const [id, all] of this.#waiting)
      for (const waiting of all)
        if (waiting.lookAt <= now) {
          if (queue.at(-1) !== id) queue.push(id)
          // A round may come a little early.
          waiting.lookAt = now + waiting.everyMs - 100
        }
    const worker = async () => {
      for (let id = queue.pop(); id !== undefined; id = queue.pop()) {
        const last = await this.#bus.lastEvent(id).catch(() => undefined)
        if (last !== undefined && isEnd(last.event)) this.settle(id, last.event)
      }
    }
    await Promise.all(Array.from({ length: lookups }, worker))
    this.#looking = false
  }

  /** Number of workloads waited for. */
  get size(): number {
    return this.#waiting.size
  }

  close(): void {
    clearInterval(this.#timer)
    for (const subscription of this.#ends) subscription.unsubscribe()
    for (const [id, all] of this.#waiting) {
      for (const waiting of all) waiting.resolve(undefined)
      this.#waiting.delete(id)
    }
  }
}

/** Undefined for what is no end: the subject is open to whoever is on the bus. */
function parseEnd(text: string): EndEvent | undefined {
  try {
    const event = JSON.parse(text) as LifecycleEvent
    return isEnd(event) ? event : undefined
  } catch {
    return undefined
  }
}
