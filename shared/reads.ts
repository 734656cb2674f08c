/**
 * What can be read: list, log pages, log streams and statistics, as the dispatcher answers them and the gateway
 * hands them on. Query strings are parsed here, so that both say the same of a bad parameter.
 */
import { z } from 'zod'
import { Problem } from './errors.ts'
import { Cause, Isolation, LogLine, Status, Workload } from './workload.ts'

export const maxListLimit = 200
export const maxLogLimit = 10_000

const commaSeparated = <T extends z.ZodType>(item: T) =>
  z.preprocess(
    (value) => (value as string[] | undefined)?.flatMap((part) => part.split(',')),
    z.array(item).optional(),
  )
const one = <T extends z.ZodType>(item: T) =>
  z.preprocess((value) => (value as string[] | undefined)?.at(-1), item)
const count = (max: number, preset: number) => one(z.coerce.number().int().min(1).max(max).default(preset))

/** `w.<accepted sequence>`, in base64url: the last workload of the page before. */
const encodeCursor = (seq: number): string => Buffer.from(`w.${seq}`).toString('base64url')
const ListCursor = z.string().transform((text, ctx) => {
  const match = /^w\.(\d{1,15})$/.exec(Buffer.from(text, 'base64url').toString())
  if (match !== null) return Number(match[1])
  ctx.addIssue({ code: 'custom', message: 'must be a next_cursor that was answered' })
  return z.NEVER
})

/** `name=value`, or `name` alone for any value. */
const LabelFilter = z
  .string()
  .min(1)
  .transform((text) => {
    const at = text.indexOf('=')
    return at < 0 ? { name: text, value: null } : { name: text.slice(0, at), value: text.slice(at + 1) }
  })

/** Parameters of `GET /v1/workloads`; each value is the list of what was given under its name. */
export const ListQuery = z.strictObject({
  status: commaSeparated(Status),
  isolation: commaSeparated(Isolation),
  function: one(z.string().min(1).optional()),
  label: z.array(LabelFilter).max(16).optional(),
  since: one(z.iso.datetime({ offset: true }).optional()),
  limit: count(maxListLimit, 50),
  cursor: one(ListCursor.optional()),
})
export type ListQuery = z.infer<typeof ListQuery>

/** A workload as a list shows it: everything but the output. */
export const ListedWorkload = Workload.omit({ output: true }).meta({ id: 'ListedWorkload' })
export type ListedWorkload = z.infer<typeof ListedWorkload>

export const WorkloadList = z
  .strictObject({ workloads: z.array(ListedWorkload), next_cursor: z.string().nullable() })
  .meta({ id: 'WorkloadList' })
export type WorkloadList = z.infer<typeof WorkloadList>

export const nextCursor = encodeCursor

/**
 * Place of a log line: the sequence of its batch in the log stream and its number in the batch, from 1.
 * 0 is before the batch’s first line.
 */
export interface LogPlace {
  seq: number
  line: number
}
export const logId = (place: LogPlace): string => `${place.seq}-${place.line}`
export const logStart: LogPlace = { seq: 0, line: 0 }

export const LogId = z
  .string()
  .regex(/^\d{1,15}-\d{1,9}$/, 'must be an id of a log line, such as 17-3')
  .meta({ id: 'LogId' })
const LogCursor = LogId.transform((text): LogPlace => {
  const [seq, line] = text.split('-')
  return { seq: Number(seq), line: Number(line) }
})

/**
 * Why lines are missing: `dropped` by the workload’s log limit, `lost` on their way, or older than `retention`.
 * `count` says how many, of lines or, where that is not known, of batches.
 */
export const LogGap = z
  .strictObject({
    reason: z.enum(['dropped', 'lost', 'retention']),
    count: z.int().positive(),
    unit: z.enum(['lines', 'batches']),
    attempt: z.int().positive(),
  })
  .meta({ id: 'LogGap' })
export type LogGap = z.infer<typeof LogGap>

/** A line and the attempt that wrote it; the data of SSE’s `log` event. */
export const AttemptLine = LogLine.extend({ attempt: z.int().positive() }).meta({ id: 'AttemptLine' })
export type AttemptLine = z.infer<typeof AttemptLine>

export const LogEntry = z.union([
  AttemptLine.extend({ id: LogId }),
  z.strictObject({ id: LogId, gap: LogGap }),
])
export type LogEntry = z.infer<typeof LogEntry>

/** `complete`: the workload has ended and nothing comes after this page. */
export const LogPage = z
  .strictObject({ lines: z.array(LogEntry), next_cursor: LogId.nullable(), complete: z.boolean() })
  .meta({ id: 'LogPage' })
export type LogPage = z.infer<typeof LogPage>

/** Parameters of `GET /v1/workloads/:id/logs`; `last_event_id` is for event streams, the others for pages. */
export const LogQuery = z.strictObject({
  limit: count(maxLogLimit, 1_000),
  cursor: one(LogCursor.optional()),
  last_event_id: one(LogCursor.optional()),
})
export type LogQuery = z.infer<typeof LogQuery>

/** The `Last-Event-ID` header. */
export function lastEventId(header: string): LogPlace {
  const parsed = LogCursor.safeParse(header)
  if (parsed.success) return parsed.data
  const detail = `Last-Event-ID ${parsed.error.issues[0]?.message}`
  throw new Problem('invalid_header', { detail, field: 'Last-Event-ID' })
}

/** Data of SSE’s `end` event, the last one. */
export const LogEnd = z.strictObject({ status: Status, cause: Cause.nullable() }).meta({ id: 'LogEnd' })
export type LogEnd = z.infer<typeof LogEnd>

/** Milliseconds over the workloads of the window that have the figure; null where there is none. */
export const Distribution = z
  .strictObject({
    count: z.int(),
    mean: z.number().nullable(),
    p50: z.number().nullable(),
    p95: z.number().nullable(),
    p99: z.number().nullable(),
  })
  .meta({ id: 'Distribution' })
export type Distribution = z.infer<typeof Distribution>

const StatusCounts = z.record(Status, z.int())

/** Counts are of all workloads kept; durations of the newest of those that ended in the window. */
export const Stats = z
  .strictObject({
    since: z.iso.datetime(),
    counts: StatusCounts,
    by_isolation: z.partialRecord(
      Isolation,
      z.strictObject({ counts: StatusCounts, duration_ms: Distribution, queue_ms: Distribution }),
    ),
    /** completed / (completed + failed); a kill is nobody’s failure. Null where nothing ended. */
    success_rate: z.number().nullable(),
    /** Ended workloads that the durations are taken from, and whether the window has more. */
    sample: z.strictObject({ size: z.int(), truncated: z.boolean() }),
    /** Results that came after another end, by what they would have been. */
    late: z.strictObject({ total: z.int(), by_status: z.record(z.string(), z.int()) }),
    /** Events refused by the lifecycle, by the move. */
    illegal: z.strictObject({ total: z.int(), by_move: z.record(z.string(), z.int()) }),
    /** Messages that are not valid events. */
    invalid: z.int(),
  })
  .meta({ id: 'Stats' })
export type Stats = z.infer<typeof Stats>

/** Parameters of `GET /v1/stats`. */
export const StatsQuery = z.strictObject({ since: one(z.iso.datetime({ offset: true }).optional()) })
export type StatsQuery = z.infer<typeof StatsQuery>

/** What the dispatcher’s `/readyz` answers, with 200 or 503. */
export const DispatcherReadiness = z.object({
  ready: z.boolean(),
  parts: z.object({
    bus: z.object({ ready: z.boolean(), reason: z.string().nullable() }),
    database: z.object({ ready: z.boolean(), reason: z.string().nullable() }),
    /** Messages stored and not yet folded; null while unknown. */
    fold: z.object({ ready: z.boolean(), lag_events: z.int().nullable(), lag_logs: z.int().nullable() }),
  }),
})
export type DispatcherReadiness = z.infer<typeof DispatcherReadiness>

/** Parses a query string; throws `invalid_query` with the first bad parameter’s name. */
export function parseQuery<S extends z.ZodObject>(schema: S, params: URLSearchParams): z.infer<S> {
  const given = Object.fromEntries([...new Set(params.keys())].map((name) => [name, params.getAll(name)]))
  const parsed = schema.safeParse(given)
  if (parsed.success) return parsed.data
  const problems = parsed.error.issues.map((issue) =>
    issue.code === 'unrecognized_keys'
      ? { field: issue.keys[0]!, detail: 'is not a parameter of this route' }
      : { field: String(issue.path[0]), detail: issue.message },
  )
  const [first] = problems
  throw new Problem('invalid_query', {
    detail: `${first!.field}: ${first!.detail}`,
    field: first!.field,
    errors: problems.length > 1 ? problems : undefined,
  })
}
