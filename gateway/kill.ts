/** Stopping a workload: a pending one never starts, a running one is ended by the runner that has it. */
import { setTimeout as delay } from 'node:timers/promises'
import type { Bus } from '../shared/bus.ts'
import { BusUnavailable } from '../shared/errors.ts'
import { type End, type EndEvent, type LifecycleEvent, makeEvent, type Origin } from '../shared/events.ts'
import { standing } from '../shared/lifecycle.ts'
import { controlSubject, eventSubject } from '../shared/subjects.ts'
import type { WorkloadId } from '../shared/workload.ts'

/** Milliseconds after which the client is told to ask again. */
const patienceMs = 30_000
const askMs = 500

/** What an end says of the attempt that was the last to start. */
type LastAttempt = Pick<End, 'attempt' | 'runner' | 'started_at' | 'duration_ms'>

const neverStarted: LastAttempt = { attempt: 0, runner: null, started_at: null, duration_ms: null }

const millisecondsSince = (from: string, until: number): number => Math.max(0, until - Date.parse(from))

/** The attempt that a `retrying` event ended; when it started is told by its own event alone. */
async function attemptBefore(bus: Bus, last: LifecycleEvent): Promise<LastAttempt> {
  if (last.type !== 'vulcan.workload.retrying') return neverStarted
  const started_at = (await bus.startedEvent(last.subject))?.event.time ?? null
  const duration_ms = started_at === null ? null : millisecondsSince(started_at, Date.parse(last.time))
  return { attempt: last.data.attempt, runner: last.data.runner, started_at, duration_ms }
}

const killedBy = (id: WorkloadId, data: LastAttempt, origin: Origin) =>
  makeEvent(
    'killed',
    id,
    `${data.attempt}.kill`,
    {
      ...data,
      cause: 'killed',
      error: { message: 'killed on request', stack: null },
      output: null,
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
    },
    origin,
  )

/**
 * Settles when the workload has ended, by this kill or otherwise; undefined when the stream knows no such workload.
 * The referee decides every race: against the start, against completion, against another kill.
 */
export async function kill(
  bus: Bus,
  id: WorkloadId,
  isLost: (runner: string) => boolean,
  origin: Origin,
): Promise<EndEvent | undefined> {
  const patience = AbortSignal.timeout(patienceMs)
  /** The attempt whose runner has answered. */
  let told: number | undefined
  while (!patience.aborted) {
    const last = await bus.lastEvent(id)
    if (last === undefined) return undefined
    const now = standing(last.event)
    if (now.at === 'ended') return now.event
    if (now.at === 'pending') {
      const event = killedBy(id, await attemptBefore(bus, last.event), origin)
      if (await settled(event, last.seq)) return event
      continue
    }
    if (told !== now.attempts) {
      const answer = await bus.ask(controlSubject(id), '{"action":"kill"}', askMs)
      if (answer !== undefined) told = now.attempts
    }
    if (isLost(now.runner)) {
      // Its lease is over, so it no longer runs there; nobody else is left to say so.
      const event = killedBy(
        id,
        {
          attempt: now.attempts,
          runner: now.runner,
          started_at: now.startedAt,
          duration_ms: millisecondsSince(now.startedAt, Date.now()),
        },
        origin,
      )
      if (await settled(event, last.seq)) return event
    }
    await delay(told === now.attempts ? 10 : 100)
  }
  throw new BusUnavailable('the runner has not answered the kill yet')

  /** False when somebody else was first. */
  async function settled(event: EndEvent, expected: number): Promise<boolean> {
    try {
      const stored = await bus.settleEvent(
        eventSubject(id, 'killed'),
        event as LifecycleEvent,
        expected,
        patience,
      )
      return stored.stored
    } catch (cause) {
      if (patience.aborted) throw new BusUnavailable('the kill could not be stored', { cause })
      throw cause
    }
  }
}
