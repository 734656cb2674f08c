/**
 * Pulling work from many queues into one number of slots: never more is held than there are slots, and what is free
 * is shared out by `slots.ts`. A pull consumer’s own `consume` asks for more as messages arrive, not as work ends,
 * so credits are kept here.
 */
import { nuid } from '@nats-io/nats-core'
import type { Msg, Subscription } from '@nats-io/transport-node'
import { type Bus, sourcedSequence } from './bus.ts'
import { Slots } from './slots.ts'
import { lastToken } from './subjects.ts'
import { WORK } from './topology.ts'
import type { WorkloadId } from './workload.ts'

/** Milliseconds a pull stays open at the server; it is renewed before that. Lanes are many and mostly idle. */
const pullExpiresMs = { common: 20_000, lane: 60_000 }
/** Milliseconds until a queue that answers with an error is asked again: doubled from the first to the second. */
const againMs = { first: 250, most: 5_000 }

/** A queued workload. It is redelivered unless `ack`ed, or `working` is called within the ack wait. */
export interface WorkMessage {
  workload: WorkloadId
  /** Sequence of its `accepted` event in the event stream. */
  acceptedSeq: number
  /** 1 for the first delivery. */
  deliveries: number
  /** The `accepted` event as JSON. */
  body: string
  ack(): void
  working(): void
  /** Comes back after `delayMs`. */
  later(delayMs: number): void
}

export interface QueueOptions {
  /** Durable consumer of the work stream. */
  consumer: string
  /** The one queue that is no lane. */
  common?: boolean
  /** How many more messages of it may be asked for, beside the `held` ones; any number unless given. */
  room?(held: number): number
}

export interface WorkQueue {
  /** Its room has changed, or its consumer was made anew. */
  wake(): void
  /** Lets go of it: what comes from now on is handed back, what is held stays held. */
  close(): Promise<void>
}

/** Takes one message of a consumer; `release` is called once, when its slot is free again. */
export type TakeMessage = (message: WorkMessage, release: () => void, consumer: string) => void

const toWork = (bus: Bus, message: Msg, common: boolean): WorkMessage & { pending: number } => {
  const reply = message.reply!
  // $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<ns>.<pending>
  const tokens = reply.split('.')
  const from = tokens.length < 11 ? 4 : 6
  return {
    workload: lastToken(message.subject),
    acceptedSeq: sourcedSequence(message),
    deliveries: Number(tokens[from]),
    pending: Number(tokens[from + 4]),
    body: message.string(),
    // In the common queue nobody waits for it, and the server busy with it would be late with the end it republishes
    // at that moment. In a lane the next one waits for it.
    ack: () => (common ? bus.publishSoon(reply, '+ACK') : bus.publish(reply, '+ACK')),
    working: () => bus.publish(reply, '+WPI'),
    later: (delayMs) => bus.publish(reply, `-NAK {"delay":${Math.round(delayMs * 1_000_000)}}`),
  }
}

/** Pulls from durable consumers of the work stream, and hands on at most `slots` messages at a time. */
export class WorkQueues {
  readonly #bus: Bus
  readonly #take: TakeMessage
  readonly #slots: Slots<Pulls>
  readonly #queues = new Set<Pulls>()
  readonly #unwatch: () => void
  readonly #timers: NodeJS.Timeout[]

  constructor(bus: Bus, slots: number, take: TakeMessage) {
    this.#bus = bus
    this.#take = take
    this.#slots = new Slots(slots, (queue, count) => queue.ask(count))
    if (!bus.connected) this.#slots.close()
    this.#unwatch = bus.onConnection((connected) => {
      this.#slots.close()
      if (!connected) return
      for (const queue of this.#queues) queue.renew()
      this.#slots.reopen()
    })
    const tick = setInterval(() => this.#slots.tick(), 100)
    const check = setInterval(() => {
      for (const queue of this.#queues) queue.check()
    }, 1_000)
    this.#timers = [tick, check]
  }

  /** Messages in hand. */
  get held(): number {
    return this.#slots.held
  }

  open(options: QueueOptions): WorkQueue {
    const slots = this.#slots
    const queue: Pulls = new Pulls(this.#bus, options, {
      held: () => slots.heldOf(queue),
      lapsed: (count) => slots.lapsed(queue, count),
      arrived: (message) => {
        const work = toWork(this.#bus, message, queue.common)
        if (!slots.arrived(queue, work.pending)) return work.later(0)
        this.#take(work, () => slots.released(queue), options.consumer)
      },
    })
    this.#queues.add(queue)
    slots.add(queue)
    return {
      wake: () => {
        queue.retry()
        slots.wake(queue)
      },
      close: async () => {
        slots.remove(queue)
        this.#queues.delete(queue)
        await queue.close()
      },
    }
  }

  /** No more messages come after this settles; what was delivered is still to be ended by its holder. */
  async stop(): Promise<void> {
    this.#slots.close()
    for (const timer of this.#timers) clearInterval(timer)
    this.#unwatch()
    await Promise.all([...this.#queues].map((queue) => queue.close()))
  }
}

interface PullEvents {
  held(): number
  lapsed(count: number): void
  arrived(message: Msg): void
}

/** The open pulls of one consumer: an inbox and what was asked for on it. */
class Pulls {
  readonly common: boolean
  readonly #bus: Bus
  readonly #options: QueueOptions
  readonly #events: PullEvents
  readonly #subject: string
  readonly #expiresMs: number
  readonly #inboxes = new Set<Subscription>()
  #inbox = ''
  #asked = 0
  #askedAt = 0
  #failures = 0
  #again: NodeJS.Timeout | undefined
  #closed = false

  constructor(bus: Bus, options: QueueOptions, events: PullEvents) {
    this.common = options.common ?? false
    this.#bus = bus
    this.#options = options
    this.#events = events
    this.#subject = `$JS.API.CONSUMER.MSG.NEXT.${WORK}.${options.consumer}`
    this.#expiresMs = this.common ? pullExpiresMs.common : pullExpiresMs.lane
    this.#listen()
  }

  room(): number {
    return this.#again === undefined
      ? (this.#options.room?.(this.#events.held()) ?? Number.POSITIVE_INFINITY)
      : 0
  }

  ask(count: number): void {
    this.#asked += count
    this.#askedAt = Date.now()
    const pull = { batch: count, expires: this.#expiresMs * 1_000_000 }
    this.#bus.publish(this.#subject, JSON.stringify(pull), this.#inbox)
  }

  /** What was asked is void: a new inbox, on which nothing is asked yet. The old one is still heard for a while. */
  renew(): void {
    if (this.#closed || this.#bus.nc.isClosed()) return
    const [before] = [...this.#inboxes].slice(-1)
    if (before !== undefined)
      setTimeout(() => {
        before.unsubscribe()
        this.#inboxes.delete(before)
      }, pullExpiresMs.common).unref()
    this.#asked = 0
    this.#listen()
  }

  /** Ends the pause after an error. */
  retry(): void {
    if (this.#again === undefined) return
    clearTimeout(this.#again)
    this.#again = undefined
    this.#startOver()
  }

  /** A pull that is long over was lost on its way. */
  check(): void {
    if (this.#asked > 0 && Date.now() - this.#askedAt > this.#expiresMs + 5_000 && this.#bus.connected)
      this.#startOver()
  }

  async close(): Promise<void> {
    this.#closed = true
    clearTimeout(this.#again)
    // Draining takes what is already on its way, and hands it back.
    await Promise.all(
      [...this.#inboxes].map((inbox) =>
        this.#bus.connected ? inbox.drain().catch(() => {}) : inbox.unsubscribe(),
      ),
    )
  }

  #listen(): void {
    const inbox = `_INBOX.${nuid.next()}`
    this.#inbox = inbox
    this.#inboxes.add(
      this.#bus.listen(inbox, (message) => {
        if (message.reply === undefined || message.reply === '') return this.#status(inbox, message)
        if (inbox === this.#inbox) this.#asked = Math.max(0, this.#asked - 1)
        this.#failures = 0
        this.#events.arrived(message)
      }),
    )
  }

  #status(inbox: string, message: Msg): void {
    const code = message.headers?.code ?? 0
    if (code === 0 || code === 100 || inbox !== this.#inbox || this.#closed) return
    // 408: the pull ran out. 409, 503 and the rest: the consumer or its leader went away; not in a hot loop.
    if (code === 408) {
      const lapsed = Math.min(this.#asked, Number(message.headers?.get('Nats-Pending-Messages') || 0))
      this.#failures = 0
      this.#asked -= lapsed
      this.#events.lapsed(lapsed)
    } else if (this.#again === undefined) {
      const wait = Math.min(againMs.most, againMs.first * 2 ** this.#failures++)
      this.#again = setTimeout(() => this.retry(), wait)
    }
  }

  #startOver(): void {
    this.renew()
    this.#events.lapsed(Number.POSITIVE_INFINITY)
  }
}

export interface WorkPuller {
  /** A slot has become free; one message more may come. */
  release(): void
  /** No more messages come after this settles; what was delivered is still to be ended by its holder. */
  stop(): Promise<void>
}

/** Pulls from one consumer only, as from a common queue, into `handle`, at most `slots` at a time. */
export function pullWork(
  bus: Bus,
  consumer: string,
  slots: number,
  handle: (message: WorkMessage) => void,
): WorkPuller {
  const releases: (() => void)[] = []
  const queues = new WorkQueues(bus, slots, (message, release) => {
    releases.push(release)
    handle(message)
  })
  queues.open({ consumer, common: true })
  return { release: () => releases.pop()?.(), stop: () => queues.stop() }
}
