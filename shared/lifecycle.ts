/**
 * The lifecycle as a table, and the fold that turns a workload’s events into its record. Pure: the dispatcher
 * folds streams with it, the gateway a single answer, the runner reads a workload’s state off its last event.
 */
import {
  type Accepted,
  type EndEvent,
  type HttpAnswer,
  type HttpBody,
  type HttpCall,
  isEnd,
  type LifecycleEvent,
} from './events.ts'
import type { TraceLink } from './trace.ts'
import {
  type BlobRef,
  type Cause,
  type Digest,
  platformCauses,
  type Retry,
  type Status,
  type Workload,
  type WorkloadSpec,
} from './workload.ts'

type Kind = LifecycleEvent['type'] extends `vulcan.workload.${infer K}` ? K : never

/** From a status, by an event’s kind, to the next status. What is not here is illegal. */
export const moves: Record<Status, Partial<Record<Kind, Status>>> = {
  pending: { started: 'running', failed: 'failed', killed: 'killed' },
  running: { completed: 'completed', failed: 'failed', killed: 'killed', retrying: 'pending' },
  completed: {},
  failed: {},
  killed: {},
}

export const kindOf = (event: LifecycleEvent): Kind => event.type.slice('vulcan.workload.'.length) as Kind

export const hasEnded = (status: Status): boolean => Object.keys(moves[status]).length === 0

/** All that is known of a workload: the public answer plus what the platform needs to go on with it. */
export interface WorkloadRecord extends Omit<Workload, 'output' | 'trace_url'> {
  /** Stream sequence of `accepted`: the order of listing. */
  accepted_seq: number
  /** Stream sequence of the last event folded in: what the next publish must expect. */
  last_seq: number
  runner: string | null
  output: unknown
  output_blob: BlobRef | null
  /** The spec as accepted; large `code` and `input` stand in `payload`. */
  spec: WorkloadSpec
  payload: BlobRef | null
  /** The code of a deployed function. */
  bundle: NonNullable<Accepted['bundle']> | null
  /** Of a call by HTTP: the blob its body stands in, if it does. */
  request_blob: BlobRef | null
  /** Of a call by HTTP that answered: head and body, as far as it was kept. */
  response: HttpAnswer | null
  request_sha256: string
  rerun_of: string | null
  /** Number of log batches of the last attempt, known at the end. */
  last_log: number | null
}

/** The record that an `accepted` event begins. */
export function begin(
  event: Extract<LifecycleEvent, { type: 'vulcan.workload.accepted' }>,
  seq: number,
): WorkloadRecord {
  const { spec, payload, isolation, routing_reason, request_sha256, rerun_of, trace_id } = event.data
  return {
    id: event.subject,
    status: 'pending',
    cause: null,
    isolation,
    routing_reason,
    attempts: 0,
    created_at: event.time,
    started_at: null,
    ended_at: null,
    queue_ms: null,
    duration_ms: null,
    output: null,
    output_blob: null,
    exit_code: null,
    error: null,
    receipt: null,
    trace_id,
    labels: spec.labels,
    function: event.data.function ?? null,
    http: httpOf(event.data.http),
    accepted_seq: seq,
    last_seq: seq,
    runner: null,
    spec,
    payload,
    bundle: event.data.bundle ?? null,
    request_blob: bodyBlob(event.data.http?.body),
    response: null,
    request_sha256,
    rerun_of,
    last_log: null,
  }
}

/** The blob that a body of a call by HTTP stands in, if it does. */
export const bodyBlob = (body: HttpBody | undefined): BlobRef | null =>
  typeof body === 'object' && body !== null && 'blob' in body
    ? { blob: body.blob as Digest, size: body.size as number }
    : null

const httpOf = (call: HttpCall | null | undefined): Workload['http'] =>
  call == null ? null : { method: call.method, path: pathOf(call.url), status: null }

/** Whatever stands in an event, it can be folded: a host such as 1.2.3.999 makes no URL. */
const pathOf = (url: string): string => URL.parse(url)?.pathname ?? url.split(/[?#]/, 1)[0]!

const millisecondsBetween = (from: string, to: string): number =>
  Math.max(0, Date.parse(to) - Date.parse(from))

/** The record after an end, whatever came before it. */
export function finish(record: WorkloadRecord, event: EndEvent, seq: number): WorkloadRecord {
  const { data } = event
  return {
    ...record,
    status: kindOf(event) as Status,
    cause: data.cause,
    attempts: Math.max(record.attempts, data.attempt),
    started_at: data.started_at,
    ended_at: event.time,
    queue_ms: data.started_at === null ? null : millisecondsBetween(record.created_at, data.started_at),
    duration_ms: data.duration_ms,
    output: data.output ?? null,
    output_blob: data.output_blob,
    exit_code: data.exit_code,
    error: data.error,
    receipt: data.receipt,
    http: record.http === null ? null : { ...record.http, status: data.response?.status ?? null },
    runner: data.runner,
    response: data.response ?? null,
    last_log: data.logs?.last ?? null,
    last_seq: seq,
  }
}

export type Folded =
  | { record: WorkloadRecord }
  /** Seen before: delivered twice, or behind what the record already holds. */
  | { stale: true }
  /** A move the table does not know, or an event of a workload whose `accepted` is gone. */
  | { illegal: string }

/** Folds one stored event into the record. Idempotent: an event at or below `last_seq` changes nothing. */
export function fold(record: WorkloadRecord | undefined, event: LifecycleEvent, seq: number): Folded {
  if (record === undefined) {
    if (event.type === 'vulcan.workload.accepted') return { record: begin(event, seq) }
    return { illegal: `${kindOf(event)} without accepted` }
  }
  if (seq <= record.last_seq) return { stale: true }
  const status = moves[record.status][kindOf(event)]
  if (status === undefined) return { illegal: `${kindOf(event)} after ${record.status}` }
  if (isEnd(event)) return { record: finish(record, event, seq) }
  switch (event.type) {
    case 'vulcan.workload.started':
      return {
        record: {
          ...record,
          status,
          cause: null,
          error: null,
          attempts: event.data.attempt,
          started_at: event.time,
          queue_ms: millisecondsBetween(record.created_at, event.time),
          runner: event.data.runner,
          last_seq: seq,
        },
      }
    case 'vulcan.workload.retrying':
      return {
        record: {
          ...record,
          status,
          cause: event.data.cause,
          error: event.data.error,
          runner: null,
          last_seq: seq,
        },
      }
    case 'vulcan.workload.accepted':
      return { illegal: `accepted after ${record.status}` }
    default:
      throw new Error(`unhandled ${event satisfies never}`)
  }
}

/**
 * The public answer: the record without what is the platform’s own. `output` is given where it stood in a blob,
 * `traceUrl` where people can look at traces.
 */
export function toWorkload(
  record: WorkloadRecord,
  output: unknown = record.output,
  traceUrl: TraceLink = () => null,
): Workload {
  return {
    id: record.id,
    status: record.status,
    cause: record.cause,
    isolation: record.isolation,
    routing_reason: record.routing_reason,
    attempts: record.attempts,
    created_at: record.created_at,
    started_at: record.started_at,
    ended_at: record.ended_at,
    queue_ms: record.queue_ms,
    duration_ms: record.duration_ms,
    output,
    exit_code: record.exit_code,
    error: record.error,
    receipt: record.receipt,
    trace_id: record.trace_id,
    trace_url: traceUrl(record.trace_id),
    labels: record.labels,
    function: record.function,
    http: record.http,
  }
}

/** Where a workload stands, read off its last stored event alone. */
export type Standing =
  | { at: 'pending'; attempts: number; notBefore: number }
  | { at: 'running'; attempts: number; runner: string; startedAt: string }
  | { at: 'ended'; event: EndEvent }

/** `notBefore` is in ms since the epoch. */
export function standing(last: LifecycleEvent): Standing {
  if (isEnd(last)) return { at: 'ended', event: last }
  switch (last.type) {
    case 'vulcan.workload.accepted':
      return { at: 'pending', attempts: 0, notBefore: 0 }
    case 'vulcan.workload.started':
      return { at: 'running', attempts: last.data.attempt, runner: last.data.runner, startedAt: last.time }
    case 'vulcan.workload.retrying':
      return { at: 'pending', attempts: last.data.attempt, notBefore: Date.parse(last.data.not_before) }
    default:
      throw new Error(`unhandled ${last satisfies never}`)
  }
}

export const mayRetry = (policy: Retry, cause: Cause, attempts: number): boolean =>
  attempts < policy.max_attempts && (platformCauses.includes(cause) || policy.on.includes(cause))

/** Delay in ms before the attempt after `attempts`: 0.25 s doubling to 30 s, half of it random. */
export function retryDelay(policy: Retry, attempts: number, random: () => number = Math.random): number {
  if (policy.backoff === 'none') return 0
  const full = Math.min(30_000, 250 * 2 ** (attempts - 1))
  return Math.round(full / 2 + (full / 2) * random())
}
