/** From a request body to a stored `accepted` event, or a clear refusal with nothing stored. */
import type { z } from 'zod'
import type { Blobs } from '../shared/blobs.ts'
import type { Bus } from '../shared/bus.ts'
import { BusUnavailable, fieldPath, Problem } from '../shared/errors.ts'
import { type AcceptedEvent, type HttpCall, makeEvent } from '../shared/events.ts'
import { type FunctionVersion, invocationSpec, laneOf, resolve } from '../shared/functions.ts'
import { derivedWorkloadId, newWorkloadId, sha256Hex } from '../shared/ids.ts'
import type { Registry } from '../shared/registry.ts'
import type { SecretBox, Secrets } from '../shared/secrets.ts'
import { acceptedSubject } from '../shared/subjects.ts'
import { traceIdOf } from '../shared/trace.ts'
import type { Span } from '../shared/tracing.ts'
import {
  type BlobRef,
  type Digest,
  type FunctionRef,
  type WorkloadId,
  WorkloadSpec,
} from '../shared/workload.ts'
import type { GatewayMetrics } from './metrics.ts'
import type { RequestWatch } from './requests.ts'
import type { Roster } from './roster.ts'
import { route } from './routing.ts'
import { checkShape } from './shape.ts'

/** Specs above this (bytes of JSON) have their code and input stored as a blob: a message holds 1 MiB. */
const inlineBytes = 512 * 1024
/** The most times that a body can grow by being parsed and written again: `1e20` becomes 21 digits. */
const growth = 6
/** No more wrong fields than this are listed. */
const listedErrors = 20

/** All clients share one namespace until tenants come. */
const namespace = 'default'
/** Idempotency keys count for each function by itself. */
const namespaceOf = (name: string) => `${namespace}/functions/${name}`

/** Holds a function to its queue limit. */
export interface Gate {
  /** Throws `queue_full` where no more invocations may wait. */
  admit(name: string, version: FunctionVersion): Promise<void>
}

export interface AdmissionContext {
  bus: Bus
  blobs: Blobs
  roster: Roster
  registry: Registry
  secrets: Pick<Secrets, 'has'>
  box: SecretBox
  gate: Gate
  gatewayId: string
  metrics?: GatewayMetrics | undefined
}

/** A request that can be accepted, not yet published. */
export interface Candidate {
  id: WorkloadId
  event: AcceptedEvent
  /** Of publishing it: begun already, as the event carries its traceparent. */
  publish: Span
}

export interface RequestFacts {
  idempotencyKey: string | undefined
  watch: RequestWatch
}

export type Admitted =
  | { outcome: 'accepted'; seq: number }
  /** The idempotency key had already brought this same workload. */
  | { outcome: 'known'; event: AcceptedEvent; seq: number }

/** Checks a parsed spec; throws `invalid_field` with the path of everything that is wrong. */
export const parseSpec = (value: unknown): WorkloadSpec => parseWith(WorkloadSpec, value)

/** The same for any schema. */
export function parseWith<S extends z.ZodType>(schema: S, value: unknown): z.output<S> {
  const parsed = schema.safeParse(value)
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

/** Throws `secret_not_found` with the field that names it. */
export function checkSecrets(
  secrets: Pick<Secrets, 'has'>,
  { secrets: names, image_auth }: Pick<WorkloadSpec, 'secrets' | 'image_auth'>,
): void {
  const named = names.map((name, i): [field: string, name: string] => [`secrets[${i}]`, name])
  if (image_auth !== undefined) named.push(['image_auth', image_auth])
  for (const [field, name] of named)
    if (!secrets.has(name))
      throw new Problem('secret_not_found', {
        detail: `there is no secret ${name}; put it first (PUT /v1/secrets/${name})`,
        field,
      })
}

/** The blobs that a spec names, each with its field. */
export function blobsOf({
  archive,
  image,
}: Pick<WorkloadSpec, 'archive' | 'image'>): [field: string, digest: Digest][] {
  const named: [string, Digest][] = []
  if (archive !== undefined) named.push(['archive.blob', archive.blob])
  if (typeof image === 'object') named.push(['image.blob', image.blob])
  return named
}

/** Keeps a stored blob from being swept before something refers to it. Throws `blob_not_found` with the field. */
export async function claimBlob(blobs: Blobs, field: string, digest: Digest): Promise<BlobRef> {
  const ref = await blobs.renew(digest)
  if (ref === undefined)
    throw new Problem('blob_not_found', { detail: `there is no blob ${digest}; POST it to /v1/blobs`, field })
  return ref
}

/** Everything that can be refused is refused here, before anything is stored but a large payload’s blob. */
export async function prepare(
  context: AdmissionContext,
  body: Buffer,
  parsed: unknown,
  { idempotencyKey, watch }: RequestFacts,
): Promise<Candidate> {
  checkKey(idempotencyKey)
  const spec = parseSpec(parsed)
  checkShape(spec)
  checkSecrets(context.secrets, spec)
  if (!context.bus.connected) throw new BusUnavailable('not connected')
  const { isolation, reason } = route(spec, context.roster.ability)
  await Promise.all(blobsOf(spec).map(([field, digest]) => claimBlob(context.blobs, field, digest)))
  const id = idempotencyKey === undefined ? newWorkloadId() : derivedWorkloadId(namespace, idempotencyKey)
  const { code, input, ...rest } = spec
  let payload: BlobRef | null = null
  if (body.byteLength > inlineBytes / growth && Buffer.byteLength(stringify(spec)) > inlineBytes) {
    checkRest(rest)
    payload = await context.blobs.put(Buffer.from(stringify({ code, input })))
  }
  const publish = watch.beginPublish(id, { isolation })
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
      trace_id: traceIdOf(publish.traceparent),
      rerun_of: null,
    },
    { source: `/vulcan/gateways/${context.gatewayId}`, traceparent: publish.traceparent },
  ) as AcceptedEvent
  return { id, event, publish }
}

/** A deployed function as a call means it. */
export interface Target {
  version: FunctionVersion
  /** The alias or version it was called by. */
  ref: string
}

/** The version that `name` and `ref` mean now. Throws `function_not_found` and its like. */
export function targetOf({ registry }: AdmissionContext, name: string, ref: string | undefined): Target {
  const found = registry.get(name)
  if (found === undefined) throw new Problem('function_not_found', { detail: `there is no function ${name}` })
  const resolved = resolve(found.record, ref)
  const version = registry.version(name, resolved.version)
  if (version === undefined)
    throw new Problem('version_not_found', {
      detail: `version ${resolved.version} of ${name} is not known here yet`,
      retryAfterS: 1,
    })
  return { version, ref: resolved.ref }
}

/** What is invoked with: the input of a JSON invocation, or a call by HTTP. */
export type Invoked = { input: unknown; http?: undefined } | { http: HttpCall; input?: undefined }

const specs = new WeakMap<FunctionVersion, WorkloadSpec>()

function specOf(version: FunctionVersion): WorkloadSpec {
  let spec = specs.get(version)
  if (spec === undefined) {
    spec = invocationSpec(version)
    specs.set(version, spec)
  }
  return spec
}

/**
 * The invocation of a deployed function as a candidate. `requestSha256` is what an idempotency key is compared by;
 * `id` is given where something was sealed for it already.
 */
export async function prepareInvocation(
  context: AdmissionContext,
  { version, ref }: Target,
  invoked: Invoked,
  { id, requestSha256, watch }: { id: WorkloadId; requestSha256: string; watch: RequestWatch },
): Promise<Candidate> {
  const { name, isolation, bundle } = version
  if (!context.bus.connected) throw new BusUnavailable('not connected')
  const ability = context.roster.ability(isolation)
  if (!ability.available)
    throw new Problem('isolation_unavailable', {
      detail: `${isolation} is unavailable: ${ability.reason}; ${ability.fix}`,
    })
  if (version.spec.queue_limit !== null) await context.gate.admit(name, version)
  let spec = specOf(version)
  let payload: BlobRef | null = null
  if (invoked.http !== undefined) {
    // A body that is streamed can be read once.
    if (invoked.http.body === 'live') spec = { ...spec, retry: { ...spec.retry, max_attempts: 1 } }
  } else if (invoked.input !== undefined) {
    const text = stringify(invoked.input)
    if (text.length > inlineBytes / 3 && Buffer.byteLength(text) > inlineBytes)
      payload = await context.blobs.put(Buffer.from(`{"input":${text}}`))
    else spec = { ...spec, input: invoked.input }
  }
  const called: FunctionRef = { name, version: version.version, ref }
  const publish = watch.beginPublish(id, { isolation, function: called })
  const event = makeEvent(
    'accepted',
    id,
    0,
    {
      spec,
      payload,
      isolation,
      target: laneOf(name, version.spec) ?? 'any',
      routing_reason: version.routing_reason,
      request_sha256: requestSha256,
      trace_id: traceIdOf(publish.traceparent),
      rerun_of: null,
      function: called,
      bundle,
      ...(invoked.http === undefined ? {} : { http: invoked.http }),
    },
    { source: `/vulcan/gateways/${context.gatewayId}`, traceparent: publish.traceparent },
  ) as AcceptedEvent
  return { id, event, publish }
}

/** The id of an invocation: new, or the one that the key stands for with this function. */
export function invocationId(name: string, idempotencyKey: string | undefined): WorkloadId {
  checkKey(idempotencyKey)
  return idempotencyKey === undefined ? newWorkloadId() : derivedWorkloadId(namespaceOf(name), idempotencyKey)
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
  const { publish } = candidate
  try {
    const admitted = await store(context, candidate)
    if (admitted.outcome === 'known') publish.set({ 'vulcan.replayed': true })
    return admitted
  } catch (error) {
    publish.fail(error instanceof Problem ? error.code : (error as Error).name, (error as Error).message)
    throw error
  } finally {
    publish.end()
  }
}

async function store(context: AdmissionContext, candidate: Candidate): Promise<Admitted> {
  const { bus } = context
  const { id, event } = candidate
  const subject = acceptedSubject(id, event.data.isolation, event.data.target)
  const accepted = (seq: number): Admitted => {
    context.metrics?.accepted(event.data.isolation, event.data.function?.name)
    return { outcome: 'accepted', seq }
  }
  for (let tries = 1; ; tries++) {
    if (!bus.connected) throw new BusUnavailable('not connected')
    try {
      const published = await bus.publishEvent(subject, event, 0)
      if (published.stored) return accepted(published.seq)
      const stored = await bus.acceptedEvent(id)
      if (stored === undefined) throw new BusUnavailable('the accepted event cannot be read back')
      const first = stored.event as AcceptedEvent
      // Each request has a span of its own.
      if (first.source === event.source && first.traceparent === event.traceparent)
        return accepted(stored.seq)
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
