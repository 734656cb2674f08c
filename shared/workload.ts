/**
 * The workload: what a client asks for (`WorkloadSpec`) and what vulcan answers with (`Workload`).
 * One schema and one type of the same name; every field that is not named here is refused with its path.
 */
import { z } from 'zod'

export const Isolation = z.enum(['isolate', 'gvisor', 'docker', 'microvm']).meta({ id: 'Isolation' })
export type Isolation = z.infer<typeof Isolation>

export const Runtime = z
  .enum(['javascript', 'typescript', 'node', 'python', 'go', 'oci'])
  .meta({ id: 'Runtime' })
export type Runtime = z.infer<typeof Runtime>

export const Status = z.enum(['pending', 'running', 'completed', 'failed', 'killed']).meta({ id: 'Status' })
export type Status = z.infer<typeof Status>

/** Why a workload ended other than by completing; each is backed by evidence, never guessed. */
export const Cause = z
  .enum([
    'timeout',
    'oom',
    'user_error',
    'exit_code',
    'killed',
    'runner_lost',
    'output_invalid',
    'output_too_large',
    'egress_denied',
    'image_not_found',
    'invalid_workload',
    'backend_unavailable',
    'disk_full',
    'internal',
  ])
  .meta({ id: 'Cause' })
export type Cause = z.infer<typeof Cause>

/** Failures of the platform: retried without being asked. Every other cause is retried only by `retry.on`. */
export const platformCauses: readonly Cause[] = [
  'runner_lost',
  'backend_unavailable',
  'disk_full',
  'internal',
]

export const WorkloadId = z.uuid().meta({ id: 'WorkloadId', description: 'UUID, version 7 or 8' })
export type WorkloadId = z.infer<typeof WorkloadId>

/** Content address of stored bytes. */
export const Digest = z
  .string()
  .regex(/^sha256:[0-9a-f]{64}$/, 'must be sha256: and 64 hex digits')
  .meta({ id: 'Digest' })
export type Digest = z.infer<typeof Digest>

/** A blob in the object store and its size in bytes. */
export const BlobRef = z.strictObject({ blob: Digest, size: z.int().nonnegative() })
export type BlobRef = z.infer<typeof BlobRef>

const later = new WeakSet<z.core.$ZodType>()
/** A field that events of an older version do not have: whoever reads one fills in the default. */
function addedLater<S extends z.ZodDefault>(field: S): S {
  later.add(field)
  return field
}
export const isAddedLater = (field: z.core.$ZodType): boolean => later.has(field)

export const Limits = z
  .strictObject({
    timeout_s: z.number().positive().max(86_400).default(30),
    memory_mb: z.int().min(8).max(65_536).default(128),
    cpu: z.number().positive().max(64).default(1),
    pids: z.int().min(1).max(32_768).default(64),
    output_mb: z.number().positive().max(64).default(6),
    disk_mb: addedLater(z.int().min(1).max(65_536).default(64)),
  })
  .meta({
    id: 'Limits',
    description:
      'timeout in seconds, memory, output and disk (scratch space under /tmp) in MiB, cpu in cores',
  })
export type Limits = z.infer<typeof Limits>

export const Retry = z
  .strictObject({
    max_attempts: z.int().min(1).max(20).default(3),
    on: z.array(Cause).max(14).default(['runner_lost']),
    backoff: z.enum(['exponential', 'none']).default('exponential'),
  })
  .meta({
    id: 'Retry',
    description: 'platform failures are retried anyway; `on` adds causes of the user’s own',
  })
export type Retry = z.infer<typeof Retry>

/** Name of a function: a DNS label, as it stands in URLs and subjects. */
export const FunctionName = z
  .string()
  .regex(
    /^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$/,
    'must be 1 to 63 of a–z 0–9 -, not beginning or ending with -',
  )
  .meta({ id: 'FunctionName' })
export type FunctionName = z.infer<typeof FunctionName>

/** A version’s id is made from its content: deploying the same again gives the same. */
export const VersionId = z
  .string()
  .regex(/^v[0-9a-f]{16}$/, 'must be v and 16 hex digits')
  .meta({ id: 'VersionId' })
export type VersionId = z.infer<typeof VersionId>

/** Of which function and version a workload is an invocation, and by which alias or version it was called. */
export const FunctionRef = z
  .strictObject({ name: FunctionName, version: VersionId, ref: z.string() })
  .meta({ id: 'FunctionRef' })
export type FunctionRef = z.infer<typeof FunctionRef>

/** In the order received, names in lower case; a name may stand more than once. */
export const HeaderList = z.array(z.tuple([z.string(), z.string()]))
export type HeaderList = z.infer<typeof HeaderList>

const HostPort = z
  .string()
  .max(300)
  .regex(/^[a-z0-9.*-]+:\d{1,5}$/i, 'must be host:port')

/** What the code may reach on the network: nothing, everything public, or named `host:port`s. */
export const Egress = z.union([z.enum(['none', 'all']), z.array(HostPort).min(1).max(64)])
export type Egress = z.infer<typeof Egress>

const IsolationChoice = z.union([z.literal('auto'), Isolation, z.array(Isolation).min(1).max(4)])
export const EnvName = z.string().regex(/^[A-Za-z_][A-Za-z0-9_]{0,255}$/, 'must be a name such as MODE')
const LabelName = z
  .string()
  .regex(/^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$/, 'must be 1 to 63 of A–Z a–z 0–9 . _ / -')

/** Programs are given text that ends at the first NUL: the rest would be lost without a word. */
const NoNul = z.string().regex(/^[^\0]*$/, 'must not contain NUL')

/** The fields of a spec, each by itself. Unknown ones are refused. */
export const SpecFields = z.strictObject({
  isolation: IsolationChoice.default('auto'),
  runtime: Runtime.optional(),
  code: z.string().min(1).optional(),
  archive: z.strictObject({ blob: Digest }).optional(),
  image: z.union([z.string().min(1).max(512), z.strictObject({ blob: Digest })]).optional(),
  /** Name of the secret with `user:password` for the registry that `image` names. */
  image_auth: EnvName.optional(),
  entrypoint: z.union([NoNul.min(1).max(1024), z.array(NoNul.max(32_768)).min(1).max(256)]).optional(),
  /** Of containers and microVMs: absolute; the image’s own, or the root of the archive, where it is left out. */
  working_dir: z
    .string()
    .max(1_024)
    .regex(/^\/[^\0]*$/, 'must be an absolute path')
    .optional(),
  /** Of containers: `uid`, `uid:gid`, or names that the image knows; the image’s own where it is left out. */
  user: z
    .string()
    .regex(
      /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?$/,
      'must be a user or user:group',
    )
    .optional(),
  input: z.unknown().optional(),
  env: z.record(EnvName, NoNul.max(32_768)).default({}),
  secrets: z.array(EnvName).max(64).default([]),
  limits: Limits.prefault({}),
  network: z
    .strictObject({
      egress: Egress.default('none'),
    })
    .prefault({}),
  retry: Retry.prefault({}),
  labels: z.record(LabelName, z.string().max(255)).default({}),
})

/** What a client posts. After parsing, every default is filled in and exactly one of code, archive and image is set. */
export const WorkloadSpec = SpecFields.superRefine((spec, ctx) => {
  const sources = (['code', 'archive', 'image'] as const).filter((name) => spec[name] !== undefined)
  if (sources.length !== 1) {
    const message =
      sources.length === 0
        ? 'one of code, archive or image is required'
        : `only one of code, archive and image may be set, not ${sources.join(' and ')}`
    ctx.addIssue({ code: 'custom', path: [sources[1] ?? 'code'], message })
  }
}).meta({ id: 'WorkloadSpec' })
export type WorkloadSpec = z.infer<typeof WorkloadSpec>

const byEnding: [ending: RegExp, runtime: Runtime][] = [
  [/\.([cm]?ts|tsx)$/, 'typescript'],
  [/\.([cm]?js|jsx)$/, 'javascript'],
  [/\.py$/, 'python'],
  [/\.go$/, 'go'],
]

/** What runs a file, by its name; undefined: nothing that is known. */
export const runtimeOfFile = (path: string): Runtime | undefined =>
  byEnding.find(([ending]) => ending.test(path))?.[1]

/** The runtime that a spec names or means; undefined: an archive of which nothing says it. */
export function runtimeOf({
  runtime,
  code,
  image,
  entrypoint,
}: Pick<WorkloadSpec, 'runtime' | 'code' | 'image' | 'entrypoint'>): Runtime | undefined {
  if (runtime !== undefined) return runtime
  if (image !== undefined || Array.isArray(entrypoint)) return 'oci'
  const named = entrypoint === undefined ? undefined : runtimeOfFile(entrypoint)
  return named ?? (code === undefined ? undefined : 'javascript')
}

export const WorkloadError = z
  .strictObject({ message: z.string(), stack: z.string().nullable() })
  .meta({ id: 'WorkloadError' })
export type WorkloadError = z.infer<typeof WorkloadError>

/**
 * What one attempt used, as measured by its sandbox; null where that cannot tell. CPU time in ms, peak memory in MiB;
 * bytes that were really read from and written to disks, and those of its network.
 */
export const Usage = z
  .strictObject({
    cpu_ms: z.number().nullable(),
    memory_peak_mb: z.number().nullable(),
    disk_read_bytes: addedLater(z.int().nonnegative().nullable().default(null)),
    disk_written_bytes: addedLater(z.int().nonnegative().nullable().default(null)),
    network_received_bytes: addedLater(z.int().nonnegative().nullable().default(null)),
    network_sent_bytes: addedLater(z.int().nonnegative().nullable().default(null)),
  })
  .meta({ id: 'Usage' })
export type Usage = z.infer<typeof Usage>

/** How a sandbox came to a run: made for it, made ready before with nothing of the user’s in it, or used before by the same code. */
export const Start = z.enum(['cold', 'pooled', 'warm'])
export type Start = z.infer<typeof Start>

/** Of a microVM: the virtual machine monitor with its version and accelerator, and how the machine came to be. */
export const MachineReceipt = z
  .strictObject({
    /** Such as `QEMU 7.2.22 (emulation)` or `Firecracker 1.10.1 (KVM)`. */
    vmm: z.string(),
    /** Booted from its kernel for this run; restored for it from a snapshot; or it stood ready before. */
    start: z.enum(['boot', 'restore', 'pool']),
  })
  .meta({ id: 'MachineReceipt' })
export type MachineReceipt = z.infer<typeof MachineReceipt>

/** What really ran: the digest of the code, on which runner, within which limits, how it was started. */
export const Receipt = z
  .strictObject({
    code_sha256: z.string().nullable(),
    /** Of the container image that ran, its manifest’s. */
    image_digest: addedLater(Digest.nullable().default(null)),
    /** Of the virtual machine that it ran in. */
    machine: addedLater(MachineReceipt.nullable().default(null)),
    runner: z.string(),
    isolation: Isolation,
    walls: z.array(z.string()),
    start: Start,
    limits: Limits,
    usage: Usage,
  })
  .meta({ id: 'Receipt' })
export type Receipt = z.infer<typeof Receipt>

const Time = z.iso.datetime()

/** The workload as every route answers it. Times are RFC 3339 UTC, durations milliseconds. */
export const Workload = z
  .strictObject({
    id: WorkloadId,
    status: Status,
    cause: Cause.nullable(),
    isolation: Isolation,
    routing_reason: z.string(),
    attempts: z.int().nonnegative(),
    created_at: Time,
    started_at: Time.nullable(),
    ended_at: Time.nullable(),
    queue_ms: z.number().nullable(),
    duration_ms: z.number().nullable(),
    output: z.unknown(),
    exit_code: z.int().nullable(),
    error: WorkloadError.nullable(),
    receipt: Receipt.nullable(),
    trace_id: z.string().nullable(),
    /** Where that trace can be looked at; null unless the operator has said where people do. */
    trace_url: z.string().nullable(),
    labels: z.record(z.string(), z.string()),
    /** Null where it is not an invocation of a deployed function. */
    function: FunctionRef.nullable(),
    /** What an HTTP invocation answered; its body is at `/v1/workloads/:id/response` where it was kept. */
    http: z.strictObject({ method: z.string(), path: z.string(), status: z.int().nullable() }).nullable(),
  })
  .meta({ id: 'Workload' })
export type Workload = z.infer<typeof Workload>

export const LogLevel = z.enum(['debug', 'info', 'warn', 'error'])
export type LogLevel = z.infer<typeof LogLevel>

/** One line a workload wrote: `time` is the runner host’s clock, `stream` says where it was written to. */
export const LogLine = z
  .strictObject({
    time: Time,
    level: LogLevel,
    stream: z.enum(['console', 'stdout', 'stderr', 'vulcan']),
    text: z.string(),
  })
  .meta({ id: 'LogLine' })
export type LogLine = z.infer<typeof LogLine>
