/**
 * The events of vulcan as a view: each workload as `GET /v1/workloads/<id>` tells it. Needs nothing but the events, in
 * the order of their sequences.
 */

/** CloudEvents 1.0. Fields that are not known here may come with any version: they are passed over. */
interface WorkloadEvent {
  /** `vulcan.workload.<kind>`. */
  type: string
  /** The workload’s id. */
  subject: string
  time: string
  // biome-ignore lint/suspicious/noExplicitAny: docs/schemas/<kind>.json says what it is
  data: Record<string, any>
}

export interface Workload {
  id: string
  status: 'pending' | 'running' | 'completed' | 'failed' | 'killed'
  attempts: number
  created_at: string
  started_at: string | null
  queue_ms: number | null
  /** The other fields of the API’s answer. */
  [field: string]: unknown
}

/** From a status, by kind of event. What is not here has no effect: there is one end, and nothing after it. */
const moves: Record<string, Record<string, Workload['status']>> = {
  pending: { started: 'running', failed: 'failed', killed: 'killed' },
  running: { completed: 'completed', failed: 'failed', killed: 'killed', retrying: 'pending' },
}

/** The event in a message on `vulcan.events.<workload>.<kind>…`; undefined: it is none, and no concern of anybody. */
export function eventIn(subject: string, data: Uint8Array): WorkloadEvent | undefined {
  const [, , workload, kind] = subject.split('.')
  try {
    const event = JSON.parse(new TextDecoder().decode(data)) as WorkloadEvent
    const fits = event.subject === workload && event.type === `vulcan.workload.${kind}`
    return fits && typeof event.data === 'object' ? event : undefined
  } catch {
    return undefined
  }
}

/** The workload after an event; undefined: nothing changes. */
export function fold(before: Workload | undefined, event: WorkloadEvent): Workload | undefined {
  const kind = event.type.slice('vulcan.workload.'.length)
  if (before === undefined) return kind === 'accepted' ? accepted(event) : undefined
  const status = moves[before.status]?.[kind]
  if (status === undefined) return undefined
  const { data, time } = event
  if (kind === 'retrying') return { ...before, status, cause: data.cause, error: data.error }
  if (kind === 'started') {
    const queue_ms = between(before.created_at, time)
    const attempts = data.attempt as number
    return { ...before, status, cause: null, error: null, attempts, started_at: time, queue_ms }
  }
  return {
    ...before,
    status,
    cause: data.cause,
    attempts: Math.max(before.attempts, data.attempt),
    started_at: data.started_at,
    ended_at: time,
    queue_ms: data.started_at === null ? null : between(before.created_at, data.started_at),
    duration_ms: data.duration_ms,
    // One over 512 KiB stands in the object store: the API fetches it from there.
    output: data.output ?? null,
    exit_code: data.exit_code,
    error: data.error,
    receipt: data.receipt,
    http: before.http && { ...before.http, status: data.response?.status ?? null },
  }
}

function accepted({ subject, time, data }: WorkloadEvent): Workload {
  const { isolation, routing_reason, trace_id, http } = data
  return {
    id: subject,
    status: 'pending',
    cause: null,
    isolation,
    routing_reason,
    attempts: 0,
    created_at: time,
    started_at: null,
    ended_at: null,
    queue_ms: null,
    duration_ms: null,
    output: null,
    exit_code: null,
    error: null,
    receipt: null,
    trace_id,
    labels: data.spec.labels,
    function: data.function ?? null,
    http: http
      ? { method: http.method, path: URL.parse(http.url)?.pathname ?? http.url, status: null }
      : null,
  }
}

const between = (from: string, to: string): number => Math.max(0, Date.parse(to) - Date.parse(from))
