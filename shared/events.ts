/**
 * The public events: CloudEvents 1.0 in structured JSON mode (NATS protocol binding), one schema each.
 * `vulcan.workload.<kind>` on `vulcan.events.<workload>.<kind>…`; consumers must ignore fields they do not know.
 */
import { z } from 'zod'
import { fits } from './fits.ts'
import {
  BlobRef,
  Cause,
  Digest,
  FunctionRef,
  HeaderList,
  Isolation,
  isAddedLater,
  LogLine,
  Receipt,
  SpecFields,
  WorkloadError,
  WorkloadId,
} from './workload.ts'

/**
 * A schema of the HTTP contract as an event carries it: objects are open at every depth, so that fields may be added
 * later, and nothing has a default, as whoever publishes has filled it in, but for what was added later.
 */
function open<S extends z.ZodType>(schema: S): z.ZodType<z.output<S>> {
  const opened = openAny(schema)
  return opened as z.ZodType<z.output<S>>
}

function openAny(schema: z.core.$ZodType): z.core.$ZodType {
  if (schema instanceof z.ZodDefault && isAddedLater(schema))
    return withInner(schema, { innerType: schema.unwrap() })
  if (schema instanceof z.ZodDefault || schema instanceof z.ZodPrefault) return openAny(schema.unwrap())
  if (schema instanceof z.ZodObject) {
    const fields = Object.entries<z.core.$ZodType>(schema.shape).map(([name, field]) => [
      name,
      openAny(field),
    ])
    const { id: _, ...meta } = schema.meta() ?? {}
    return z.looseObject(Object.fromEntries(fields)).meta(meta)
  }
  if (schema instanceof z.ZodOptional || schema instanceof z.ZodNullable)
    return withInner(schema, { innerType: schema.unwrap() })
  if (schema instanceof z.ZodArray) return withInner(schema, { element: schema.element })
  if (schema instanceof z.ZodUnion) {
    const options = schema.options.map(openAny)
    const changed = options.some((option, i) => option !== schema.options[i])
    return changed ? schema.clone({ ...schema.def, options }) : schema
  }
  return schema
}

/** The schema itself where nothing in it changes: it keeps its name in the JSON Schema. */
function withInner(schema: z.ZodType, inner: Record<string, z.core.$ZodType>): z.core.$ZodType {
  const [[name, before]] = Object.entries(inner) as [[string, z.core.$ZodType]]
  const after = openAny(before)
  return after === before ? schema : schema.clone({ ...schema.def, [name]: after } as typeof schema.def)
}

const Attempt = z.int().min(1)

/**
 * Bytes of an HTTP body as an event carries them: as text where they are UTF-8, else in base64; in a blob where they
 * are too large for a message; `live` where they went through the gateway and were not kept; null for none.
 */
export const HttpBody = z.union([
  z.looseObject({ text: z.string() }),
  z.looseObject({ base64: z.base64() }),
  open(BlobRef),
  z.literal('live'),
  z.null(),
])
export type HttpBody = z.infer<typeof HttpBody>

/**
 * The request of an HTTP invocation. Headers that carry credentials stand, encrypted, in `sealed` (see
 * `shared/secrets.ts`): whoever may read events may not act as a caller.
 */
export const HttpCall = z.looseObject({
  method: z.string(),
  /** Absolute, as the caller wrote it; the function sees the path below its own prefix. */
  url: z.string(),
  headers: HeaderList,
  sealed: z.string().nullable(),
  body: HttpBody,
  /** Id of the gateway whose caller waits for the response as it comes; null: it is kept with the end. */
  gateway: z.string().nullable(),
})
export type HttpCall = z.infer<typeof HttpCall>

/** What an HTTP invocation answered. Kept whole where it is small or nobody waited, else `body` is `live`. */
export const HttpAnswer = z.looseObject({
  status: z.int(),
  headers: HeaderList,
  sealed: z.string().nullable(),
  body: HttpBody,
})
export type HttpAnswer = z.infer<typeof HttpAnswer>

/**
 * The whole accepted request. Where `code` and `input` are too large for a message they are left out of `spec`
 * and stand, as JSON `{code?, input?}`, in the blob that `payload` names.
 */
export const Accepted = z.looseObject({
  spec: open(SpecFields),
  payload: open(BlobRef).nullable(),
  isolation: Isolation,
  target: z.string(),
  routing_reason: z.string(),
  /** Digest of the request body; what an idempotency key is compared by. */
  request_sha256: z.string(),
  trace_id: z.string(),
  /** The workload this one runs again. */
  rerun_of: WorkloadId.nullable(),
  /** The deployed function it is an invocation of; its code is the blob `bundle`, and `spec` has none. */
  function: open(FunctionRef).nullish(),
  /** `map`: the source map of the bundle, where there is one. */
  bundle: z.looseObject({ blob: Digest, size: z.int(), map: Digest.nullable() }).nullish(),
  /** Set for an HTTP invocation, whose request stands here in place of `spec.input`. */
  http: HttpCall.nullish(),
})
export type Accepted = z.infer<typeof Accepted>

export const Started = z.looseObject({ attempt: Attempt, runner: z.string() })
export type Started = z.infer<typeof Started>

/** Running goes back to pending: this attempt is over, the next starts not before `not_before`. */
export const Retrying = z.looseObject({
  attempt: Attempt,
  runner: z.string(),
  cause: Cause,
  error: open(WorkloadError),
  not_before: z.iso.datetime(),
})
export type Retrying = z.infer<typeof Retrying>

/** How many log batches and lines an attempt published, and how many lines its limit dropped. */
export const LogCount = z.looseObject({
  last: z.int().nonnegative(),
  lines: z.int().nonnegative(),
  dropped: z.int().nonnegative(),
})
export type LogCount = z.infer<typeof LogCount>

/** What every end carries. `attempt` is 0 and `runner` null where nothing ever ran. */
export const End = z.looseObject({
  attempt: z.int().nonnegative(),
  runner: z.string().nullable(),
  started_at: z.iso.datetime().nullable(),
  duration_ms: z.number().nonnegative().nullable(),
  cause: Cause.nullable(),
  error: open(WorkloadError).nullable(),
  output: z.unknown(),
  /** The output as JSON, where it is too large for a message; `output` is null then. */
  output_blob: open(BlobRef).nullable(),
  exit_code: z.int().nullable(),
  logs: LogCount.nullable(),
  receipt: open(Receipt).nullable(),
  /** Of an HTTP invocation that answered. */
  response: HttpAnswer.nullish(),
})
export type End = z.infer<typeof End>

export const Late = z.looseObject({
  attempt: Attempt,
  runner: z.string(),
  status: z.enum(['completed', 'failed', 'killed', 'retrying']),
  cause: Cause.nullable(),
})
export type Late = z.infer<typeof Late>

/** Batch `n` (from 1) of the lines of one attempt, in order. */
export const LogBatch = z.looseObject({
  attempt: Attempt,
  n: z.int().min(1),
  lines: z.array(open(LogLine)),
  /** Lines of the attempt that its log limit had dropped when this batch was sent, in all. */
  dropped: z.int().nonnegative(),
})
export type LogBatch = z.infer<typeof LogBatch>

const cloudEvent = <const K extends string, D extends z.ZodType>(kind: K, data: D) =>
  z
    .looseObject({
      specversion: z.literal('1.0'),
      /** Unique per source; the same for a repeated delivery. */
      id: z.string().min(1),
      source: z.string().min(1),
      type: z.literal(`vulcan.workload.${kind}`),
      /** The workload’s id. */
      subject: WorkloadId,
      time: z.iso.datetime(),
      datacontenttype: z.literal('application/json'),
      traceparent: z.string().optional(),
      data,
    })
    .meta({ title: `vulcan.workload.${kind}` })

/** Schema of each event by kind, as served under `/v1/schemas/events/<kind>`. */
export const eventSchemas = {
  accepted: cloudEvent('accepted', Accepted),
  started: cloudEvent('started', Started),
  retrying: cloudEvent('retrying', Retrying),
  completed: cloudEvent('completed', End),
  failed: cloudEvent('failed', End),
  killed: cloudEvent('killed', End),
  late: cloudEvent('late', Late),
  log: cloudEvent('log', LogBatch),
} as const

export type EventOf<K extends keyof typeof eventSchemas> = z.infer<(typeof eventSchemas)[K]>

const fitting = Object.fromEntries(
  Object.entries(eventSchemas).map(([kind, schema]) => [kind, fits(schema)]),
) as Record<keyof typeof eventSchemas, (value: unknown) => boolean>

/** The event of this kind that parsed JSON is; undefined where it is none. Takes the JSON over: it may be the event itself. */
export function readEvent<K extends keyof typeof eventSchemas>(
  kind: K,
  json: unknown,
): EventOf<K> | undefined {
  return fitting[kind](json) ? (json as EventOf<K>) : (eventSchemas[kind].safeParse(json).data as EventOf<K>)
}

export type EventKind = 'accepted' | 'started' | 'retrying' | 'completed' | 'failed' | 'killed' | 'late'
export type EndKind = 'completed' | 'failed' | 'killed'

export const LifecycleEvent = z.discriminatedUnion('type', [
  eventSchemas.accepted,
  eventSchemas.started,
  eventSchemas.retrying,
  eventSchemas.completed,
  eventSchemas.failed,
  eventSchemas.killed,
])
export type LifecycleEvent = z.infer<typeof LifecycleEvent>
export type AcceptedEvent = z.infer<typeof eventSchemas.accepted>
export type EndEvent = z.infer<
  typeof eventSchemas.completed | typeof eventSchemas.failed | typeof eventSchemas.killed
>
export type LogEvent = z.infer<typeof eventSchemas.log>
export type AnyEvent = LifecycleEvent | z.infer<typeof eventSchemas.late> | LogEvent

export interface Origin {
  /** `/vulcan/<kind>/<process id>`: who published. */
  source: string
  traceparent?: string | undefined
}

type KindOf<E> = E extends { type: `vulcan.workload.${infer K}` } ? K : never
type DataOf<K> = Extract<AnyEvent, { type: `vulcan.workload.${K & string}` }>['data']

/**
 * Wraps data as a CloudEvent. The id is made of workload, kind and attempt: a process that publishes the same
 * step twice publishes the same id.
 */
export function makeEvent<K extends KindOf<AnyEvent>>(
  kind: K,
  workload: WorkloadId,
  step: number | string,
  data: DataOf<K>,
  origin: Origin,
  time: string = new Date().toISOString(),
): Extract<AnyEvent, { type: `vulcan.workload.${K}` }> {
  return {
    specversion: '1.0',
    id: `${workload}.${kind}.${step}`,
    source: origin.source,
    type: `vulcan.workload.${kind}`,
    subject: workload,
    time,
    datacontenttype: 'application/json',
    ...(origin.traceparent === undefined ? {} : { traceparent: origin.traceparent }),
    data,
  } as unknown as Extract<AnyEvent, { type: `vulcan.workload.${K}` }>
}

export const isEnd = (event: LifecycleEvent): event is EndEvent =>
  event.type === 'vulcan.workload.completed' ||
  event.type === 'vulcan.workload.failed' ||
  event.type === 'vulcan.workload.killed'

/** The JSON Schemas (draft 2020-12) of the public events, by kind. */
export const eventJsonSchemas = (): Record<string, unknown> =>
  Object.fromEntries(
    Object.entries(eventSchemas).map(([kind, schema]) => [kind, z.toJSONSchema(schema, { io: 'output' })]),
  )
