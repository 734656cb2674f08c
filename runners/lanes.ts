/**
 * Where a runner takes its work from: the common queue of its isolation, and the lane of every function with limits
 * as the registry names them, new and changed ones at once. All share the runner’s slots. How much of a lane runs at
 * once is the server’s business; here its rate is kept.
 */
import type { Bus } from '../shared/bus.ts'
import type { Lane } from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import { type WorkMessage, type WorkQueue, WorkQueues } from '../shared/queue.ts'
import { laneConsumer, workConsumer } from '../shared/topology.ts'
import { preciseNow } from '../shared/tracing.ts'
import type { Isolation } from '../shared/workload.ts'
import { aheadMs, type MeterStore, Turnstile } from './rate.ts'

/** Milliseconds after which what is not due is looked at again, though it may be due much later: rates change. */
const lookAgainMs = 10_000
/** Milliseconds until a message comes back whose rate could not be read. */
const troubleMs = 1_000

/** The part of the registry that is followed. */
export interface LaneSource {
  lanes(): Lane[]
  onChange(listener: (key: string) => void): () => void
}

export interface IntakeOptions {
  bus: Bus
  isolation: Isolation
  /** Messages in hand at once, of all queues. */
  slots: number
  lanes: LaneSource
  meters: MeterStore
  /**
   * Settles when the message is in other hands or at its end; never rejects. `receivedAt` (ms since the epoch): when
   * it came, where it had to wait for its turn.
   */
  handle(message: WorkMessage, receivedAt?: number): Promise<void>
  log: Logger
}

export interface Intake {
  /** No more work comes after this settles; what waited for its turn is handed back. */
  stop(): Promise<void>
}

export function openIntake(options: IntakeOptions): Intake {
  const { bus, isolation, lanes, handle } = options
  const open = new Map<string, OpenLane>()
  const queues = new WorkQueues(bus, options.slots, (message, release, queue) => {
    const lane = open.get(queue)
    if (lane?.paced === true) void lane.take(message).finally(release)
    else void handle(message).finally(release)
  })
  const common = workConsumer(isolation)
  queues.open({ consumer: common, common: true })

  const follow = (key?: string) => {
    if (key !== undefined && !key.startsWith(`lane.${isolation}.`)) return
    const wanted = new Map(
      lanes
        .lanes()
        .filter((lane) => lane.isolation === isolation)
        .map((lane) => [laneConsumer(lane), lane]),
    )
    for (const [consumer, lane] of open) {
      if (wanted.has(consumer)) continue
      open.delete(consumer)
      void lane.close()
    }
    for (const [consumer, lane] of wanted) {
      const known = open.get(consumer)
      if (known === undefined) open.set(consumer, new OpenLane(queues, consumer, lane, options))
      else if (key === `lane.${isolation}.${lane.lane}`) known.change(lane)
    }
  }
  const unfollow = lanes.onChange(follow)
  follow()

  return {
    async stop() {
      unfollow()
      const stopped = queues.stop()
      for (const lane of open.values()) lane.handBack()
      await stopped
    },
  }
}

/** A lane that this runner pulls from. */
class OpenLane {
  readonly #options: IntakeOptions
  readonly #queue: WorkQueue
  readonly #consumer: string
  #lane: Lane
  #turnstile: Turnstile | undefined
  /** Messages in hand that wait for their turn. */
  readonly #waiting = new Set<() => void>()
  /** Messages in hand whose turn is being asked for. */
  #asking = 0
  /** Nothing is asked for before, as nothing would be due. */
  #pause: NodeJS.Timeout | undefined
  /** What waits for its turn is handed back. */
  #stopped = false
  /** Nothing is asked for any more. */
  #over = false

  constructor(queues: WorkQueues, consumer: string, lane: Lane, options: IntakeOptions) {
    this.#options = options
    this.#consumer = consumer
    this.#lane = lane
    this.#setRate()
    this.#queue = queues.open({ consumer, room: (held) => this.#room(held) })
  }

  get paced(): boolean {
    return this.#turnstile !== undefined
  }

  change(lane: Lane): void {
    this.#lane = lane
    this.#setRate()
    clearTimeout(this.#pause)
    this.#pause = undefined
    this.#queue.wake()
  }

  #setRate(): void {
    const { rate } = this.#lane
    if (rate === null) this.#turnstile = undefined
    else if (this.#turnstile === undefined)
      this.#turnstile = new Turnstile(this.#options.meters, this.#consumer, rate)
    else this.#turnstile.rate = rate
  }

  #room(held: number): number {
    const { concurrency } = this.#lane
    const room = (concurrency ?? Number.POSITIVE_INFINITY) - held
    if (this.#turnstile === undefined || room <= 0) return room
    if (this.#pause !== undefined) return 0
    const { turns, inMs } = this.#turnstile.outlook()
    if (turns === 0) this.#pauseFor(inMs)
    return Math.min(room, turns - this.#asking)
  }

  /** Asks for nothing as long as nothing would be due; a rate that was raised ends it earlier. */
  #pauseFor(ms: number): void {
    clearTimeout(this.#pause)
    if (this.#over) return
    const over = () => {
      this.#pause = undefined
      this.#queue.wake()
    }
    this.#pause = setTimeout(over, Math.min(lookAgainMs, Math.max(1, Math.ceil(ms))))
  }

  /** Starts a message when its turn has come, or hands it back until it may. */
  async take(message: WorkMessage): Promise<void> {
    const turnstile = this.#turnstile!
    const receivedAt = preciseNow()
    this.#asking++
    let wait: number | undefined
    try {
      const turn = await turnstile.take()
      if ('at' in turn) wait = turnstile.until(turn.at)
      else this.#handBackUntil(message, turnstile.until(turn.next))
    } catch (error) {
      this.#options.log.warn({ lane: this.#consumer, err: error }, 'the rate could not be read')
      this.#handBackUntil(message, troubleMs)
    } finally {
      this.#asking--
      this.#queue.wake()
    }
    if (wait === undefined) return
    if (wait > 0.5) await this.#turn(wait)
    if (this.#stopped) return message.later(0)
    await this.#options.handle(message, receivedAt)
  }

  #turn(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const over = () => {
        clearTimeout(timer)
        this.#waiting.delete(over)
        resolve()
      }
      const timer = setTimeout(over, ms)
      this.#waiting.add(over)
    })
  }

  /** It comes back, and more is asked for, when it will be due within what may be held. */
  #handBackUntil(message: WorkMessage, ms: number): void {
    const wait = Math.min(lookAgainMs, Math.max(1, ms - aheadMs / 2))
    message.later(wait)
    this.#pauseFor(wait)
  }

  /** What waits for its turn goes back now. */
  handBack(): void {
    this.#stopped = true
    this.#over = true
    clearTimeout(this.#pause)
    for (const over of [...this.#waiting]) over()
  }

  /** What is in hand goes on. */
  async close(): Promise<void> {
    this.#over = true
    clearTimeout(this.#pause)
    await this.#queue.close()
  }
}
