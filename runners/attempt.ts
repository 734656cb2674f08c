/**
 * One queued workload from its delivery to its recorded end, whichever isolation runs it. The order matters:
 * `started` is stored before the user’s code runs, the end before the acknowledgement. Whoever waits for the end
 * hears of it from the server, which republishes what it stores.
 * A crash anywhere means redelivery, and the referee decides what still holds.
 */
import { z } from 'zod'
import type { Blobs } from '../shared/blobs.ts'
import type { StoredEvent } from '../shared/bus.ts'
import { BusUnavailable, StreamFull } from '../shared/errors.ts'
import {
  type AcceptedEvent,
  type End,
  type EndKind,
  eventSchemas,
  type Late,
  type LifecycleEvent,
  makeEvent,
  type Origin,
} from '../shared/events.ts'
import { mayRetry, retryDelay, standing } from '../shared/lifecycle.ts'
import type { Logger } from '../shared/process.ts'
import type { WorkMessage } from '../shared/queue.ts'
import { controlSubject, eventSubject, lateSubject, logSubject } from '../shared/subjects.ts'
import { traceFields } from '../shared/trace.ts'
import { preciseNow, type Tracing } from '../shared/tracing.ts'
import type { TransientMap } from '../shared/transient-map.ts'
import type { BlobRef, Cause, LogLine, Receipt, WorkloadError, WorkloadSpec } from '../shared/workload.ts'
import { Answer } from './answer.ts'
import { type Assignment, type JobContext, toJob } from './job.ts'
import { Logbook, type LogLimits } from './logbook.ts'
import type { RunnerMetrics } from './metrics.ts'
import type { Outcome, Source, Stopped } from './runner.ts'
import { Refusal } from './source.ts'
import { AttemptSpans, beginPublish } from './spans.ts'
import type { Stacks } from './stacks.ts'
import type { Vigil } from './vigil.ts'

/** Outputs larger than this (bytes of JSON) go through the object store: a message holds 1 MiB. */
const inlineOutputBytes = 512 * 1024
/** What is kept of an error’s message and stack (UTF-16 units); as JSON a unit may take 6 bytes. */
const errorLength = 32 * 1024

export type StopReason = 'killed' | 'timeout' | 'shutdown' | 'lease_lost'

/** A workload this process holds, from receipt of its message on. */
export class Held {
  message: WorkMessage
  /** Stops the attempt at hand; aborted with a `StopReason`, by its timeout or through `halt`. */
  stop = new AbortController()
  /** The first word of `halt`, which holds beyond the attempt. */
  halted: Exclude<StopReason, 'timeout'> | undefined = undefined
  /** The attempt that runs here now; undefined before and after. */
  attempt: number | undefined = undefined
  /** Tells it that whoever called is gone; set while it runs by HTTP. */
  leave: (() => void) | undefined = undefined
  /** When this process received it and took it up, ms since the epoch; after an attempt here, when that ended. */
  receivedAt: number
  takenAt: number
  /** Of the attempt at hand, where it is traced. */
  spans: AttemptSpans | undefined = undefined
  /** Traceparent of who asked for the kill, where that was told. */
  killer: string | undefined = undefined

  constructor(message: WorkMessage, receivedAt: number, takenAt: number) {
    this.message = message
    this.receivedAt = receivedAt
    this.takenAt = takenAt
  }
}

/** Stops a workload for good: also where its attempt is being stopped already and another would follow. */
export function halt(held: Held, reason: Exclude<StopReason, 'timeout'>): void {
  if (held.halted === undefined) held.spans?.stopping(reason === 'killed' ? 'kill' : reason)
  held.halted ??= reason
  held.stop.abort(reason satisfies StopReason)
}

/** What is asked on a workload’s control subject: to end it, whether its attempt runs there, or that its caller is gone. */
export const ControlRequest = z.discriminatedUnion('action', [
  z.object({ action: z.literal('kill'), traceparent: z.string().max(100).optional() }),
  z.object({ action: z.literal('gone') }),
  z.object({ action: z.literal('have'), attempt: z.int() }),
])
export type ControlRequest = z.infer<typeof ControlRequest>

/** Milliseconds that a runner is given to say that it has a workload. */
const haveTimeoutMs = 500
/** Milliseconds between two tries to store an end where there is no room. */
const fullRetryMs = 1_000

export interface AttemptContext extends JobContext {
  stacks: Stacks
  runnerId: string
  ackWaitMs: number
  /** A completion for which there is no room for this long (ms) ends as `disk_full`. */
  fullMs: number
  logLimits: LogLimits
  tracing: Tracing
  metrics: RunnerMetrics | undefined
  log: Logger
  /** What this process holds, by workload. */
  held: TransientMap<string, Held>
  vigil: Vigil
}

const stopMessages: Record<Exclude<StopReason, 'timeout'>, string> = {
  killed: 'killed on request',
  shutdown: 'the runner was shut down while it ran',
  lease_lost: 'the runner lost the message bus while it ran',
}

/**
 * Takes a delivered message to its next resting place: an end, a recorded retry, or somebody else’s hands.
 * `receivedAt` (ms since the epoch) is when it came, where it had to wait before.
 */
export async function takeWork(
  context: AttemptContext,
  message: WorkMessage,
  receivedAt?: number,
): Promise<void> {
  const { bus, held, log } = context
  const takenAt = preciseNow()
  context.metrics?.received(message.deliveries)
  const already = held.get(message.workload)
  if (already !== undefined) {
    // Redelivered while it runs here: this process was too busy to say so. The new handle keeps it.
    already.message = message
    message.working()
    return
  }
  const mine = new Held(message, receivedAt ?? takenAt, takenAt)
  held.set(message.workload, mine)
  context.vigil.keep()
  try {
    // The gateway has parsed it: it is looked at again only where something goes wrong with it.
    const accepted = JSON.parse(message.body) as AcceptedEvent
    if (!looksAccepted(accepted, message)) throw new Error('not an accepted event of its workload')
    let next: Next =
      message.deliveries === 1
        ? { event: accepted, seq: message.acceptedSeq }
        : ((await bus.lastEvent(message.workload)) ?? 'gone')
    while (next !== 'done')
      next = next === 'gone' ? await giveUp(context, accepted) : await step(context, mine, accepted, next)
  } catch (error) {
    if (!isAccepted(message)) {
      log.warn({ workload: message.workload }, 'dropped a queued message that is not an accepted event')
      mine.message.ack()
      return
    }
    if (!(error instanceof BusUnavailable))
      log.error(
        { workload: message.workload, ...traceFields(traceparentOf(message)), err: error },
        'attempt failed',
      )
    // Whatever went wrong here was ours: the message comes back, here or elsewhere.
    mine.message.later(1_000)
  } finally {
    held.delete(message.workload)
  }
}

/** Where a workload stands after a move; `gone`: its events are no longer in the stream. */
type Next = StoredEvent | 'gone' | 'done'

/** As much as tells an accepted event from anything else, before something is recorded of it. */
const looksAccepted = (event: AcceptedEvent | null, { workload, acceptedSeq }: WorkMessage): boolean =>
  event?.subject === workload &&
  acceptedSeq > 0 &&
  Number.isFinite(event.data?.spec?.limits?.timeout_s) &&
  Number.isInteger(event.data.spec.retry?.max_attempts)

/** Of a message that is an accepted event. */
const traceparentOf = (message: WorkMessage) => (JSON.parse(message.body) as AcceptedEvent).traceparent

const isAccepted = (message: WorkMessage): boolean =>
  !Number.isNaN(message.acceptedSeq) &&
  eventSchemas.accepted.safeParse(parseJson(message.body)).data?.subject === message.workload

/**
 * The queue has it and the stream has nothing of it: older than what is kept, or purged. Whether it ran cannot be
 * known, so it does not run now; for whoever knows it as pending this is its end, for others it comes late.
 */
const giveUp = (context: AttemptContext, accepted: AcceptedEvent): Promise<Next> =>
  move(
    context,
    accepted,
    0,
    'failed',
    endOf({
      attempt: 0,
      runner: null,
      cause: 'internal',
      error: { message: 'its events are no longer in the stream', stack: null },
    }),
  )

/** One move from where the workload stands. */
async function step(
  context: AttemptContext,
  held: Held,
  accepted: AcceptedEvent,
  last: StoredEvent,
): Promise<Next> {
  const now = standing(last.event)
  switch (now.at) {
    case 'ended':
      held.message.ack()
      return 'done'
    case 'pending': {
      const leaving = held.halted === 'shutdown' || held.halted === 'lease_lost'
      const wait = now.notBefore - Date.now()
      if (leaving || wait > 0) {
        held.message.later(Math.max(0, wait))
        return 'done'
      }
      // A timeout belongs to the attempt it ended; a kill holds for the next one too, also one that came behind it.
      if (held.stop.signal.reason === ('timeout' satisfies StopReason)) {
        held.stop = new AbortController()
        if (held.halted !== undefined) halt(held, held.halted)
      }
      return await tracedAttempt(context, held, accepted, now.attempts + 1, last)
    }
    case 'running': {
      // A message can come back while its first holder is alive, as when its consumer had to be made anew.
      const question = JSON.stringify({ action: 'have', attempt: now.attempts } satisfies ControlRequest)
      if ((await context.bus.ask(controlSubject(accepted.subject), question, haveTimeoutMs)) !== undefined) {
        held.message.later(context.ackWaitMs)
        return 'done'
      }
      const error = { message: `runner ${now.runner} was lost while it ran`, stack: null }
      const retry = accepted.data.spec.retry
      const data = { attempt: now.attempts, runner: now.runner, cause: 'runner_lost' as const, error }
      const lost = { links: [last.event.traceparent] }
      if (!mayRetry(retry, 'runner_lost', now.attempts)) {
        const end = endOf({ ...data, started_at: now.startedAt })
        return await move(context, accepted, last.seq, 'failed', end, lost)
      }
      const not_before = new Date(Date.now() + retryDelay(retry, now.attempts)).toISOString()
      return await move(context, accepted, last.seq, 'retrying', { ...data, not_before }, lost)
    }
    default:
      throw new Error(`unhandled ${now satisfies never}`)
  }
}

/** One attempt with its spans around it. */
async function tracedAttempt(
  context: AttemptContext,
  held: Held,
  accepted: AcceptedEvent,
  n: number,
  last: StoredEvent,
): Promise<Next> {
  const { tracing, runnerId, runner } = context
  const spans = AttemptSpans.begin(tracing, {
    accepted,
    attempt: n,
    after: last.event,
    runnerId,
    isolation: runner.isolation,
    deliveries: held.message.deliveries,
    receivedAt: held.receivedAt,
    takenAt: held.takenAt,
  })
  held.spans = spans
  try {
    return await attempt(context, held, accepted, n, last.seq)
  } catch (error) {
    spans?.fail((error as Error).name, (error as Error).message)
    throw error
  } finally {
    spans?.end()
    held.spans = undefined
    held.receivedAt = held.takenAt = preciseNow()
  }
}

/** Runs the code once, if the referee lets this process start it. */
async function attempt(
  context: AttemptContext,
  held: Held,
  accepted: AcceptedEvent,
  n: number,
  expected: number,
): Promise<Next> {
  const { bus, runner, runnerId, metrics } = context
  const { spans } = held
  const id = accepted.subject
  const { spec } = accepted.data
  const assigned = await toJob(context, accepted, n, spans).catch((error: Error) => {
    if (error instanceof Refusal) return error
    throw error
  })
  const prepared = assigned instanceof Refusal ? undefined : runner.prepare(assigned.job)
  held.attempt = n
  if (!(assigned instanceof Refusal) && assigned.job.http !== undefined) held.leave = assigned.leave
  try {
    const publish = spans?.publish('started')
    const origin = originOf(context, accepted, publish?.traceparent)
    const started = makeEvent('started', id, n, { attempt: n, runner: runnerId }, origin)
    let stored: Awaited<ReturnType<typeof bus.settleEvent>>
    try {
      stored = await bus.settleEvent(eventSubject(id, 'started'), started, expected)
    } finally {
      publish?.end()
    }
    if (!stored.stored) {
      spans?.refused()
      return stored.last ?? 'gone'
    }
    if (prepared === undefined || assigned instanceof Refusal) {
      const { reason, message } = assigned as Refusal
      const error = { message, stack: null }
      const end = endOf({ attempt: n, runner: runnerId, started_at: started.time, cause: reason, error })
      return await move(context, accepted, stored.seq, 'failed', end, { spans })
    }

    const { job, redact, exchange } = assigned
    const runOrigin = originOf(context, accepted, spans?.runTraceparent)
    const book = new Logbook(context.logLimits, async (batch, lines, dropped) => {
      const event = makeEvent('log', id, `${n}.${batch}`, { attempt: n, n: batch, lines, dropped }, runOrigin)
      await bus.publishRecord(logSubject(id), event, `${id}.${n}.log.${batch}`)
    })
    const write =
      redact === undefined ? book.write : (line: LogLine) => book.write({ ...line, text: redact(line.text) })
    const map = accepted.data.bundle?.map
    const lines = map == null ? undefined : context.stacks.lines(map, write)
    const answer = new Answer({ id, box: context.box, exchange, outputMb: spec.limits.output_mb })
    const clock = setTimeout(() => {
      if (!held.stop.signal.aborted) spans?.stopping('timeout', { 'vulcan.timeout_s': spec.limits.timeout_s })
      held.stop.abort('timeout' satisfies StopReason)
    }, spec.limits.timeout_s * 1_000)
    context.vigil.keep()
    spans?.run(redact)
    const before = performance.now()
    const outcome = await prepared
      .run(held.stop.signal, {
        onLog: lines?.write ?? write,
        respond: spans === undefined ? answer.respond : (head) => spans.responding(head, answer.respond),
        onPhase: spans?.phase,
      })
      .finally(() => clearTimeout(clock))
    const duration = Math.round((performance.now() - before) * 1_000) / 1_000
    await lines?.settled()
    const logs = book.close()
    if (!book.settled) await book.flushed()
    spans?.ran(outcome, answer.statusOf(outcome))
    metrics?.logged(logs.lines, logs.dropped)
    metrics?.used(job.function?.name, outcome.usage, job.traceparent)

    const receipt: Receipt = {
      code_sha256: codeDigest(job.source),
      image_digest: outcome.imageDigest ?? null,
      machine: outcome.machine ?? null,
      runner: runnerId,
      isolation: runner.isolation,
      walls: runner.capabilities.walls,
      start: outcome.start,
      limits: job.limits,
      usage: outcome.usage,
    }
    const base = {
      attempt: n,
      runner: runnerId,
      started_at: started.time,
      duration_ms: duration,
      logs,
      receipt,
    }
    const verdict = judge(outcome, held.stop.signal.reason, spec, answer)
    if (verdict.kind === 'completed') {
      const parts = async (patience: number) => ({
        ...(await storeOutput(context.blobs, verdict.output, patience)),
        ...(await responseOf(context, job, answer, outcome, patience)),
      })
      const size = () => Buffer.byteLength(verdict.output) + answer.kept(outcome)
      const end = { ...base, exit_code: verdict.exitCode }
      return await complete(context, accepted, stored.seq, end, { parts, size, spans })
    }
    const { cause, exitCode } = verdict
    const error = await readable(context, accepted, assigned, verdict.error)
    if (verdict.kind === 'failed' && mayRetry(spec.retry, cause, n)) {
      const not_before = new Date(Date.now() + retryDelay(spec.retry, n)).toISOString()
      const again = { attempt: n, runner: runnerId, cause, error, not_before }
      return await move(context, accepted, stored.seq, 'retrying', again, { spans })
    }
    // Of a response that did not come to its end the caller has the beginning all the same.
    const response = exchange === undefined ? {} : await responseOf(context, job, answer, outcome, 0)
    return await move(
      context,
      accepted,
      stored.seq,
      verdict.kind,
      endOf({ ...base, ...response, cause, error, exit_code: exitCode }),
      { spans, links: [held.killer] },
    )
  } finally {
    held.attempt = undefined
    held.leave = undefined
    prepared?.release()
    if (!(assigned instanceof Refusal)) assigned.exchange?.close()
  }
}

/** Of the code or the archive’s bytes; an image is told by its own digest. */
const codeDigest = (source: Source): string | null =>
  source.kind === 'code' || source.kind === 'archive' ? source.sha256 : null

async function responseOf(
  context: AttemptContext,
  job: Assignment['job'],
  answer: Answer,
  outcome: Outcome,
  fullMs: number,
): Promise<Pick<End, 'response'>> {
  if (job.http === undefined) return {}
  const response = await answer.toEvent(outcome, (bytes) => storePatiently(context.blobs, bytes, fullMs))
  return response === undefined ? {} : { response }
}

/** The error with the user’s own lines in its stack, without the values of secrets, and not too long. */
async function readable(
  context: AttemptContext,
  accepted: AcceptedEvent,
  { redact }: Assignment,
  { message, stack }: WorkloadError,
): Promise<WorkloadError> {
  const map = accepted.data.bundle?.map
  if (stack !== null && map != null) stack = await context.stacks.toSource(stack, map)
  if (redact !== undefined) [message, stack] = [redact(message), stack === null ? null : redact(stack)]
  return {
    message: message.slice(0, errorLength),
    stack: stack === null ? null : stack.slice(0, errorLength),
  }
}

type Verdict =
  | { kind: 'completed'; output: string; exitCode: number | null }
  | {
      kind: 'failed' | 'killed'
      cause: Cause
      error: { message: string; stack: string | null }
      exitCode: number | null
    }

/** What an outcome means, given why it was stopped, if it was. */
function judge(
  outcome: Outcome,
  reason: StopReason | undefined,
  spec: WorkloadSpec,
  answer: Answer,
): Verdict {
  answer.check(outcome)
  if (answer.excess !== undefined && outcome.status !== 'stopped')
    return {
      kind: 'failed',
      cause: 'output_too_large',
      error: { message: answer.excess, stack: null },
      exitCode: null,
    }
  switch (outcome.status) {
    case 'completed':
      return { kind: 'completed', output: outcome.output, exitCode: outcome.exitCode }
    case 'failed':
      return { kind: 'failed', cause: outcome.cause, error: outcome.error, exitCode: outcome.exitCode }
    case 'stopped': {
      const stopped = (kind: 'failed' | 'killed', cause: Cause, message: string): Verdict => ({
        kind,
        cause,
        error: { message, stack: null },
        exitCode: null,
      })
      if (reason === 'timeout') return stopped('failed', 'timeout', overtime(outcome, spec))
      if (reason === 'killed') return stopped('killed', 'killed', stopMessages.killed)
      return stopped('failed', 'runner_lost', stopMessages[reason ?? 'shutdown'])
    }
    default:
      throw new Error(`unhandled ${outcome satisfies never}`)
  }
}

/** Parts of a start that go on without the run that began them, and need not be done again. */
const kept = new Set(['boot machine', 'build program', 'unpack image'])

function overtime({ before }: Stopped, { limits }: WorkloadSpec): string {
  const limit = `${limits.timeout_s} s`
  if (before === undefined) return `the workload ran longer than its limit of ${limit}`
  const tryAgain = kept.has(before) ? 'try again soon, as that goes on, or ' : ''
  return `its limit of ${limit} was over before its code began (${before}): ${tryAgain}raise limits.timeout_s`
}

interface Completion {
  /** Output and response, as far as there are, stored within so many ms. */
  parts: (patienceMs: number) => Promise<Partial<End>>
  /** How large they are, bytes. */
  size: () => number
  spans: AttemptSpans | undefined
}

/**
 * Stores a completion, trying as long as it takes. Where there has been no room for it for `fullMs` and there is
 * room for the small event that says so, the workload has failed instead: to run it again would bring the same
 * output.
 */
async function complete(
  context: AttemptContext,
  accepted: AcceptedEvent,
  expected: number,
  base: Partial<End> & Pick<End, 'attempt' | 'runner'>,
  { parts, size, spans }: Completion,
): Promise<Next> {
  for (let patience = context.fullMs; ; patience = fullRetryMs) {
    try {
      const end = endOf({ ...base, ...(await parts(patience)) })
      return await move(context, accepted, expected, 'completed', end, { spans, fullMs: patience })
    } catch (error) {
      if (!(error instanceof StreamFull)) throw error
      const message = `its output of ${size()} bytes could not be stored: ${error.message}`
      const end = endOf({ ...base, cause: 'disk_full', error: { message, stack: null } })
      try {
        return await move(context, accepted, expected, 'failed', end, { spans, fullMs: 0 })
      } catch (again) {
        if (!(again instanceof StreamFull)) throw again
      }
    }
  }
}

interface Moving {
  /** Of the attempt that ends by it, where it is traced. */
  spans?: AttemptSpans | undefined
  /** Traceparents of what has to do with it. */
  links?: (string | undefined)[]
  /** Milliseconds without room after which it is given up; for ever unless given. */
  fullMs?: number
}

/**
 * Stores the next event. Stored: the workload stands there. Refused: somebody else moved it, and what we have is
 * late unless it is a step that lost its point. Throws `StreamFull` where there has been no room for `fullMs`.
 */
async function move<K extends 'retrying' | EndKind>(
  context: AttemptContext,
  accepted: AcceptedEvent,
  expected: number,
  kind: K,
  data: K extends 'retrying' ? Parameters<typeof makeEvent<'retrying'>>[3] : End,
  { spans, links, fullMs = Number.POSITIVE_INFINITY }: Moving = {},
): Promise<Next> {
  const { bus, runnerId, tracing, metrics } = context
  const id = accepted.subject
  const { cause } = data
  spans?.judged(kind, cause, data.error?.message, (data as { not_before?: string }).not_before)
  const parent = spans?.traceparent ?? accepted.traceparent
  const span = tracing.on ? beginPublish(tracing, kind, parent, links) : undefined
  // Of an attempt that somebody else lost this span is all that is left to tell it by.
  if (spans === undefined && cause !== null) span?.fail(cause, data.error?.message)
  const origin = originOf(context, accepted, span?.traceparent)
  const made = makeEvent(kind as EndKind, id, data.attempt as number, data as End, origin)
  const event = made as LifecycleEvent
  const fn = accepted.data.function?.name
  try {
    const stored = await bus.settleEvent(eventSubject(id, kind), event, expected, undefined, fullMs)
    if (stored.stored) {
      metrics?.attempted(fn, kind, cause)
      return { event, seq: stored.seq }
    }
    span?.set({ 'vulcan.late': true })
    if (data.runner === runnerId) {
      metrics?.attempted(fn, 'late', cause)
      const late: Late = { attempt: data.attempt as number, runner: runnerId, status: kind, cause }
      const record = makeEvent('late', id, late.attempt, late, origin)
      await bus
        .publishRecord(lateSubject(id), record, `${id}.late.${late.attempt}.${runnerId}`)
        .catch(() => {})
    }
    return stored.last ?? 'gone'
  } catch (error) {
    span?.fail((error as Error).name, (error as Error).message)
    throw error
  } finally {
    span?.end()
  }
}

/** Throws `StreamFull` where there has been no room for `fullMs`. */
async function storeOutput(
  blobs: Blobs,
  output: string,
  fullMs: number,
): Promise<Pick<End, 'output' | 'output_blob'>> {
  const value: unknown = JSON.parse(output)
  // Written again it can be longer: `1e20` becomes 21 digits.
  if (output.length <= inlineOutputBytes / 6 || Buffer.byteLength(JSON.stringify(value)) <= inlineOutputBytes)
    return { output: value, output_blob: null }
  return { output: null, output_blob: await storePatiently(blobs, Buffer.from(output), fullMs) }
}

/** Throws `StreamFull` where there has been no room for `fullMs`. */
async function storePatiently(blobs: Blobs, bytes: Uint8Array, fullMs: number): Promise<BlobRef> {
  let fullSince: number | undefined
  for (;;) {
    try {
      return await blobs.put(bytes)
    } catch (error) {
      if (!(error instanceof BusUnavailable || error instanceof StreamFull)) throw error
      if (error instanceof StreamFull) {
        fullSince ??= Date.now()
        if (Date.now() - fullSince >= fullMs) throw error
      }
      await new Promise((resolve) => setTimeout(resolve, 250))
    }
  }
}

const endOf = (data: Partial<End> & Pick<End, 'attempt' | 'runner'>): End => ({
  started_at: null,
  duration_ms: null,
  cause: null,
  error: null,
  output: null,
  output_blob: null,
  exit_code: null,
  logs: null,
  receipt: null,
  ...data,
})

const originOf = (context: AttemptContext, accepted: AcceptedEvent, traceparent?: string): Origin => ({
  source: `/vulcan/runners/${context.runnerId}`,
  traceparent: traceparent ?? accepted.traceparent,
})

/** The value, or undefined where the text is not JSON. */
export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
