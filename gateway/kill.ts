/** Stopping a workload: a pending one never starts, a running one is ended by the runner that has it. */
import { setTimeout as delay } from 'node:timers/promises'
import type { Bus, StoredEvent } from '../shared/bus.ts'
import { BusUnavailable } from '../shared/errors.ts'
import { type End, type EndEvent, type LifecycleEvent, makeEvent, type Origin } from '../shared/events.ts'
import { standing } from '../shared/lifecycle.ts'
import { controlSubject, eventSubject } from '../shared/subjects.ts'
import { type Tracing, tracingOff } from '../shared/tracing.ts'
import type { WorkloadId } from '../shared/workload.ts'
import { beginKill } from './requests.ts'

/** Milliseconds after which the client is told to ask again. */
const patienceMs = 30_000
const askMs = 500

/** The request for the kill: what ends the workload is linked to it. */
export interface KillRequest {
  tracing: Tracing
  traceparent: string | undefined
}

const untraced: KillRequest = { tracing: tracingOff, traceparent: undefined }

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
  { tracing, traceparent }: KillRequest = untraced,
): Promise<EndEvent | undefined> {
  const patience = AbortSignal.timeout(patienceMs)
  /** The attempt whose runner has answered. */
  let told: number | undefined
  const order = JSON.stringify({ action: 'kill', ...(tracing.on ? { traceparent } : {}) })
  while (!patience.aborted) {
    const last = await bus.lastEvent(id)
    if (last === undefined) return undefined
    const now = standing(last.event)
    if (now.at === 'ended') return now.event
    if (now.at === 'pending') {
      const event = await killed(await attemptBefore(bus, last.event), last)
      if (event !== undefined) return event
      continue
    }
    if (told !== now.attempts) {
      const answer = await bus.ask(controlSubject(id), order, askMs)
      if (answer !== undefined) told = now.attempts
    }
    if (isLost(now.runner)) {
      // Its lease is over, so it no longer runs there; nobody else is left to say so.
      const attempt: LastAttempt = {
        attempt: now.attempts,
        runner: now.runner,
        started_at: now.startedAt,
        duration_ms: millisecondsSince(now.startedAt, Date.now()),
      }
      const event = await killed(attempt, last)
      if (event !== undefined) return event
    }
    await delay(told === now.attempts ? 10 : 100)
  }
  throw new BusUnavailable('the runner has not answered the kill yet')

  /** The end, once it is stored; undefined when somebody else was first. */
  async function killed(attempt: LastAttempt, last: StoredEvent): Promise<EndEvent | undefined> {
    const parent = await acceptedTrace(last.event)
    const publish = beginKill(tracing, id, parent, traceparent)
    try {
      const trace = parent === undefined && !tracing.on ? {} : { traceparent: publish.traceparent }
      const event = killedBy(id, attempt, { ...origin, ...trace })
      if (!(await settled(event, last.seq))) {
        publish.event('somebody else was first')
        return undefined
      }
      publish.fail('killed')
      return event
    } finally {
      publish.end()
    }
  }

  /** That of the accepted event; of the last one, where nothing is traced, as then all carry the same. */
  async function acceptedTrace(last: LifecycleEvent): Promise<string | undefined> {
    if (!tracing.on || last.type === 'vulcan.workload.accepted') return last.traceparent
    return (await bus.acceptedEvent(id))?.event.traceparent ?? last.traceparent
  }

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
