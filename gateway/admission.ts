/** From a request body to a stored `accepted` event, or a clear refusal with nothing stored. */
import type { Blobs } from '../shared/blobs.ts'
import type { Bus } from '../shared/bus.ts'
import { BusUnavailable, fieldPath, Problem } from '../shared/errors.ts'
import { type AcceptedEvent, makeEvent } from '../shared/events.ts'
import { derivedWorkloadId, newWorkloadId, sha256Hex } from '../shared/ids.ts'
import { acceptedSubject } from '../shared/subjects.ts'
import { continueTrace } from '../shared/trace.ts'
import { type BlobRef, type WorkloadId, WorkloadSpec } from '../shared/workload.ts'
import type { Roster } from './roster.ts'
import { route } from './routing.ts'

/** Specs above this (bytes of JSON) have their code and input stored as a blob: a message holds 1 MiB. */
const inlineBytes = 512 * 1024
/** The most times that a body can grow by being parsed and written again: `1e20` becomes 21 digits. */
const growth = 6
/** No more wrong fields than this are listed. */
const listedErrors = 20

/** All clients share one namespace until tenants come. */
const namespace = 'default'

export interface AdmissionContext {
  bus: Bus
  blobs: Blobs
  roster: Roster
  gatewayId: string
}

/** A request that can be accepted, not yet published. */
export interface Candidate {
  id: WorkloadId
  event: AcceptedEvent
}

export interface RequestHeaders {
  idempotencyKey: string | undefined
  traceparent: string | undefined
}

export type Admitted =
  | { outcome: 'accepted'; seq: number }
  /** The idempotency key had already brought this same workload. */
  | { outcome: 'known'; event: AcceptedEvent; seq: number }

/** Checks a parsed spec; throws `invalid_field` with the path of everything that is wrong. */
export function parseSpec(value: unknown): WorkloadSpec {
  const parsed = WorkloadSpec.safeParse(value)
  if (parsed.success) return parsed.data
  const errors = parsed.error.issues.flatMap((issue) => {
    if (issue.code === 'unrecognized_keys')
      return issue.keys.map((key) => ({ field: fieldPath([...issue.path, key]), detail: 'unknown field' }))
    return [{ field: fieldPath(issue.path), detail: describe(issue) }]
  })
  const [first] = errors
  errors.length = Math.min(errors.length, listedErrors)
  throw new Problem('invalid_field', {
    detail: errors.map(({ field, detail }) => (field === '' ? detail : `${field}: ${detail}`)).join('; '),
    field: first?.field,
    errors,
  })
}

/** The message of an issue; for a union, the choices. */
function describe(issue: { code?: string | undefined; message: string; path: PropertyKey[] }): string {
  if (issue.code !== 'invalid_union') return issue.message
  const field = String(issue.path[0])
  if (field === 'isolation')
    return 'must be auto, isolate, gvisor, docker or microvm, or a list of these in order of preference'
  if (field === 'network') return 'must be none, all or a list of host:port'
  if (field === 'image') return 'must be an image reference or {"blob": "sha256:…"}'
  if (field === 'entrypoint') return 'must be a file name or a command array'
  return issue.message
}

function checkKey(key: string | undefined): void {
  if (key !== undefined && (key === '' || key.length > 255))
    throw new Problem('invalid_header', { detail: 'must have 1 to 255 characters', field: 'Idempotency-Key' })
}

/** Everything that can be refused is refused here, before anything is stored but a large payload’s blob. */
export async function prepare(
  context: AdmissionContext,
  body: Buffer,
  parsed: unknown,
  headers: RequestHeaders,
): Promise<Candidate> {
  checkKey(headers.idempotencyKey)
  const spec = parseSpec(parsed)
  if (spec.secrets.length > 0)
    throw new Problem('secret_not_found', {
      detail: `there is no secret ${spec.secrets[0]}`,
      field: 'secrets[0]',
    })
  if (!context.bus.connected) throw new BusUnavailable('not connected')
  const { isolation, reason } = route(spec, context.roster.ability)
  const id =
    headers.idempotencyKey === undefined
      ? newWorkloadId()
      : derivedWorkloadId(namespace, headers.idempotencyKey)
  const { code, input, ...rest } = spec
  let payload: BlobRef | null = null
  if (body.byteLength > inlineBytes / growth && Buffer.byteLength(stringify(spec)) > inlineBytes) {
    checkRest(rest)
    payload = await context.blobs.put(Buffer.from(stringify({ code, input })))
  }
  const trace = continueTrace(headers.traceparent)
  const event = makeEvent(
    'accepted',
    id,
    0,
    {
      spec: payload === null ? spec : rest,
      payload,
      isolation,
      target: 'any',
      routing_reason: reason,
      request_sha256: sha256Hex(body),
      trace_id: trace.traceId,
      rerun_of: null,
    },
    { source: `/vulcan/gateways/${context.gatewayId}`, traceparent: trace.traceparent },
  ) as AcceptedEvent
  return { id, event }
}

/** What is left beside code and input always travels in the message itself. */
function checkRest(rest: Omit<WorkloadSpec, 'code' | 'input'>): void {
  const sizes = Object.entries(rest).map(([field, value]) => ({
    field,
    size: stringify(value ?? null).length,
  }))
  if (Buffer.byteLength(stringify(rest)) <= inlineBytes) return
  const [largest] = sizes.sort((a, b) => b.size - a.size)
  throw new Problem('invalid_field', {
    detail: `without code and input a spec may have at most ${inlineBytes / 1024} KiB`,
    field: largest!.field,
  })
}

function stringify(value: unknown): string {
  try {
    return JSON.stringify(value)
  } catch (cause) {
    throw tooDeep(cause)
  }
}

const tooDeep = (cause: unknown) =>
  new Problem('invalid_field', { detail: 'input is nested too deeply', field: 'input', cause })

/**
 * Publishes the `accepted` event: from here on the workload exists.
 * A refusal means that the idempotency key, or an earlier try of ours whose acknowledgement was lost, came first.
 */
export async function admit(context: AdmissionContext, candidate: Candidate): Promise<Admitted> {
  const { bus } = context
  const { id, event } = candidate
  const subject = acceptedSubject(id, event.data.isolation, event.data.target)
  for (let tries = 1; ; tries++) {
    if (!bus.connected) throw new BusUnavailable('not connected')
    try {
      const published = await bus.publishEvent(subject, event, 0)
      if (published.stored) return { outcome: 'accepted', seq: published.seq }
      const stored = await bus.acceptedEvent(id)
      if (stored === undefined) throw new BusUnavailable('the accepted event cannot be read back')
      const first = stored.event as AcceptedEvent
      // Each request has a span of its own.
      if (first.source === event.source && first.traceparent === event.traceparent)
        return { outcome: 'accepted', seq: stored.seq }
      if (first.data.request_sha256 === event.data.request_sha256)
        return { outcome: 'known', event: first, seq: stored.seq }
      throw new Problem('idempotency_conflict', {
        detail: `the key stands for workload ${id}, whose body was another`,
        field: 'Idempotency-Key',
      })
    } catch (error) {
      if (error instanceof RangeError) throw tooDeep(error)
      // Unknown outcome: asking again is safe, since the first one to be stored wins.
      if (!(error instanceof BusUnavailable) || tries === 3 || !bus.connected) throw error
    }
  }
}
