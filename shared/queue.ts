/**
 * Pulling work: never more than there are free slots, never less than is free. A pull consumer’s own `consume`
 * asks for more as messages arrive, not as work ends, so credits are kept here.
 */
import { nuid } from '@nats-io/nats-core'
import type { Msg, Subscription } from '@nats-io/transport-node'
import { type Bus, sourcedSequence } from './bus.ts'
import { lastToken } from './subjects.ts'
import { WORK } from './topology.ts'
import type { WorkloadId } from './workload.ts'

/** Milliseconds a pull stays open at the server; it is renewed before that. */
const pullExpiresMs = 20_000

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

export interface WorkPuller {
  /** A slot has become free; one message more may come. */
  release(): void
  /** No more messages come after this settles; what was delivered is still to be ended by its holder. */
  stop(): Promise<void>
}

const toWork = (bus: Bus, message: Msg): WorkMessage => {
  const tokens = message.reply!.split('.')
  return {
    workload: lastToken(message.subject),
    acceptedSeq: sourcedSequence(message),
    deliveries: Number(tokens[tokens.length < 11 ? 4 : 6]),
    body: message.string(),
    // Nobody waits for it, and the server busy with it would be late with the end it republishes at that moment.
    ack: () => bus.publishSoon(message.reply!, '+ACK'),
    working: () => bus.publish(message.reply!, '+WPI'),
    later: (delayMs) => bus.publish(message.reply!, `-NAK {"delay":${Math.round(delayMs * 1_000_000)}}`),
  }
}

/**
 * Pulls from a durable consumer of the work stream into `handle`, at most `slots` at a time.
 * A lost connection or a restarted server costs nothing: pulls are asked anew.
 */
export function pullWork(
  bus: Bus,
  consumer: string,
  slots: number,
  handle: (message: WorkMessage) => void,
): WorkPuller {
  const subject = `$JS.API.CONSUMER.MSG.NEXT.${WORK}.${consumer}`
  const batch = Math.max(1, Math.floor(slots / 4))
  let free = slots
  let stopped = false
  const inboxes = new Set<Subscription>()
  let current = open()

  /** One inbox and the credits asked for on it. A new one is opened when what was asked is void. */
  function open() {
    const inbox = `_INBOX.${nuid.next()}`
    const state = { inbox, asked: 0, askedAt: Date.now(), subscription: bus.listen(inbox, onMessage) }
    inboxes.add(state.subscription)
    function onMessage(message: Msg) {
      if (message.reply === undefined || message.reply === '') return onStatus(message)
      state.asked--
      // An older inbox may bring more than the new one has been told of.
      if (stopped || free <= 0) return toWork(bus, message).later(0)
      free--
      handle(toWork(bus, message))
    }
    function onStatus(message: Msg) {
      const code = message.headers?.code ?? 0
      if (code === 0 || code === 100) return
      state.asked = Math.max(0, state.asked - Number(message.headers?.get('Nats-Pending-Messages') || 0))
      // 408: the pull ran out. 409 and the rest: the consumer or its leader went away; not in a hot loop.
      if (code === 408) ask()
      else setTimeout(startOver, 250, state)
    }
    return state
  }

  function ask() {
    const want = free - current.asked
    if (stopped || !bus.connected || want < (current.asked === 0 ? 1 : batch)) return
    current.asked += want
    current.askedAt = Date.now()
    bus.publish(subject, JSON.stringify({ batch: want, expires: pullExpiresMs * 1_000_000 }), {
      reply: current.inbox,
    })
  }

  function startOver(state: typeof current) {
    if (stopped || state !== current || bus.nc.isClosed()) return
    // What is still on its way to the old inbox is taken; the rest is redelivered by the server.
    setTimeout(() => {
      state.subscription.unsubscribe()
      inboxes.delete(state.subscription)
    }, pullExpiresMs).unref()
    current = open()
    ask()
  }

  const stopWatching = bus.onConnection((connected) => connected && startOver(current))
  const timer = setInterval(() => {
    if (current.asked > 0 && Date.now() - current.askedAt > pullExpiresMs + 5_000) startOver(current)
    else ask()
  }, 1_000)
  ask()

  return {
    release() {
      free++
      ask()
    },
    async stop() {
      stopped = true
      clearInterval(timer)
      stopWatching()
      // Draining takes what is already on its way, and hands it back.
      for (const inbox of inboxes)
        if (bus.connected) await inbox.drain().catch(() => {})
        else inbox.unsubscribe()
    },
  }
}
