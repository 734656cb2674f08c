/**
 * Deployed functions: what a client puts (`FunctionSpec`) and what the KV bucket `vulcan_functions` holds of them.
 * Keys: `function.{name}`, `version.{name}.{version}`, `lane.{isolation}.{lane}`.
 */
import { z } from 'zod'
import { Problem } from './errors.ts'
import {
  BlobRef,
  Digest,
  FunctionName,
  Isolation,
  Runtime,
  SpecFields,
  VersionId,
  type WorkloadSpec,
} from './workload.ts'

/** `latest` always stands for the newest version and cannot be set. */
export const AliasName = z
  .string()
  .regex(/^[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?$/, 'must be 1 to 63 of a–z 0–9 -, beginning with a letter')
  .refine((name) => !VersionId.safeParse(name).success, 'must not look like a version')
  .meta({ id: 'AliasName' })
export type AliasName = z.infer<typeof AliasName>

/** So many starts per so many seconds, evenly spread; `burst` may start at once after a pause. */
export const Rate = z
  .strictObject({
    limit: z.int().min(1).max(1_000_000),
    per_s: z.number().min(0.001).max(86_400).default(1),
    burst: z.int().min(1).max(1_000_000).default(1),
  })
  .meta({ id: 'Rate' })
export type Rate = z.infer<typeof Rate>

/** What may wait or run, over all runners; null: no limit. */
const FunctionLimits = {
  /** Invocations running at once; more of them wait. */
  concurrency: z.int().min(1).max(10_000).nullable().default(null),
  rate: Rate.nullable().default(null),
  /** Invocations waiting; more of them are answered 429. */
  queue_limit: z.int().min(0).max(1_000_000).nullable().default(null),
  /** Sandboxes kept ready with the newest or live version on each runner. */
  prewarm: z.int().min(0).max(64).default(0),
}

/** Relative, without `..`, `.` or empty steps. */
export const FilePath = z
  .string()
  .min(1)
  .max(1_024)
  .refine(
    (path) =>
      !path.startsWith('/') &&
      !/[\0\\]/.test(path) &&
      path.split('/').every((step) => step !== '' && step !== '.' && step !== '..'),
    'must be a relative path without . or .. in it',
  )

/** What a client puts. Exactly one of code, files, archive and image is set (an upload is the archive). */
export const FunctionSpec = SpecFields.omit({ input: true })
  .extend({
    files: z
      .record(FilePath, z.string())
      .refine((files) => Object.keys(files).length > 0, 'must name at least one file')
      .optional(),
    ...FunctionLimits,
  })
  .meta({ id: 'FunctionSpec' })
export type FunctionSpec = z.infer<typeof FunctionSpec>

/** Where a build found something worth saying. */
export const BuildWarning = z.strictObject({
  message: z.string(),
  file: z.string().nullable(),
  /** From 1. */
  line: z.int().nullable(),
  /** From 1. */
  column: z.int().nullable(),
})
export type BuildWarning = z.infer<typeof BuildWarning>

/** An immutable version. Its id is a digest of everything here but `created_at` and `warnings`. */
export const FunctionVersion = z
  .strictObject({
    name: FunctionName,
    version: VersionId,
    created_at: z.iso.datetime(),
    isolation: Isolation,
    routing_reason: z.string(),
    runtime: Runtime,
    /** The text that runs: one built ES module with its source map, or one file as it was put; null for images and archives. */
    bundle: BlobRef.extend({ map: Digest.nullable() }).nullable(),
    /** What was deployed, as a tar archive or single file. */
    source: BlobRef.nullable(),
    /** The spec as deployed, without code and files. */
    spec: FunctionSpec.omit({ code: true, files: true }),
    warnings: z.array(BuildWarning),
  })
  .meta({ id: 'FunctionVersion' })
export type FunctionVersion = z.infer<typeof FunctionVersion>

/** A version’s spec as its workloads carry it, without what limits the function as a whole. */
export function invocationSpec({ spec, runtime, bundle, source }: FunctionVersion): WorkloadSpec {
  const { concurrency: _, rate: __, queue_limit: ___, prewarm: ____, ...rest } = spec
  const unbundled = bundle === null && rest.image === undefined && source !== null
  return { ...rest, runtime, ...(unbundled ? { archive: { blob: source.blob } } : {}) }
}

/** What an alias stands for: one version, or several by weight (whole numbers over 0, in any scale). */
export const AliasTarget = z
  .union([
    z.strictObject({ version: VersionId }),
    z.strictObject({
      weights: z
        .record(VersionId, z.int().min(1).max(1_000_000))
        .refine((weights) => Object.keys(weights).length > 0, 'must name at least one version'),
    }),
  ])
  .meta({ id: 'AliasTarget' })
export type AliasTarget = z.infer<typeof AliasTarget>

/** A function as the bucket holds it; changed by compare and set on its revision only. */
export const FunctionRecord = z
  .strictObject({
    name: FunctionName,
    created_at: z.iso.datetime(),
    updated_at: z.iso.datetime(),
    /** Set while it is deleted: versions and history stay, and putting it again brings it back. */
    deleted_at: z.iso.datetime().nullable(),
    /** The version deployed last; what is called where `live` is not set. */
    latest: VersionId,
    /** Newest first, by their last deploy. */
    versions: z.array(z.strictObject({ version: VersionId, deployed_at: z.iso.datetime() })),
    aliases: z.record(AliasName, AliasTarget),
  })
  .meta({ id: 'FunctionRecord' })
export type FunctionRecord = z.infer<typeof FunctionRecord>

/**
 * A queue of its own for a function with limits: a consumer per lane whose unacknowledged messages the server
 * bounds. Its name is the `target` in the subject of `accepted`.
 */
export const Lane = z.strictObject({
  lane: z.string().regex(/^fn-[a-z0-9-]+$/),
  isolation: Isolation,
  function: FunctionName,
  concurrency: z.int().min(1).nullable(),
  rate: Rate.nullable(),
})
export type Lane = z.infer<typeof Lane>

/**
 * The lane of a function that has a limit of any kind; undefined: the common queue. One with a queue limit alone has
 * a lane too, unbounded: what of it waits can be counted nowhere else.
 */
export const laneOf = (
  name: FunctionName,
  spec: Pick<FunctionSpec, 'concurrency' | 'rate' | 'queue_limit'>,
): string | undefined =>
  spec.concurrency === null && spec.rate === null && spec.queue_limit === null ? undefined : `fn-${name}`

/**
 * The versions that a call without a ref may mean, the most likely first: what `live` stands for where it is set,
 * else the latest; none of a deleted function.
 */
export function currentVersions(record: FunctionRecord): VersionId[] {
  if (record.deleted_at !== null) return []
  const { live } = record.aliases
  if (live === undefined) return [record.latest]
  if ('version' in live) return [live.version]
  return Object.entries(live.weights)
    .sort(([, a], [, b]) => b - a)
    .map(([version]) => version)
}

/**
 * The lanes of a function, one for each isolation that a version with limits has. All versions of an isolation share
 * one, so that a limit holds over a deploy too; its numbers are those of the current version, or of the newest that
 * has any.
 */
export function lanesOf(
  record: FunctionRecord,
  version: (id: VersionId) => FunctionVersion | undefined,
): Lane[] {
  if (record.deleted_at !== null) return []
  const lanes = new Map<Isolation, Lane>()
  for (const id of [...currentVersions(record), ...record.versions.map((one) => one.version)]) {
    const found = version(id)
    const lane = found && laneOf(record.name, found.spec)
    if (found === undefined || lane === undefined || lanes.has(found.isolation)) continue
    const { isolation, spec } = found
    const { concurrency, rate } = spec
    lanes.set(isolation, { lane, isolation, function: record.name, concurrency, rate })
  }
  return [...lanes.values()]
}

/**
 * Which version a call means, and by which alias or version: without a `ref`, alias `live` where it is set, else the
 * latest. A split is drawn with `random` (0 to 1). Throws `function_not_found`, `version_not_found` or
 * `alias_not_found`.
 */
export function resolve(
  record: FunctionRecord,
  ref: string | undefined,
  random: () => number = Math.random,
): { version: VersionId; ref: string } {
  const { name, aliases, latest, versions } = record
  if (record.deleted_at !== null)
    throw new Problem('function_not_found', { detail: `function ${name} was deleted` })
  const called = ref ?? (aliases.live === undefined ? 'latest' : 'live')
  if (called === 'latest') return { version: latest, ref: called }
  const target = Object.hasOwn(aliases, called) ? aliases[called] : undefined
  if (target !== undefined)
    return { version: 'version' in target ? target.version : draw(target.weights, random()), ref: called }
  if (!VersionId.safeParse(called).success)
    throw new Problem('alias_not_found', { detail: `function ${name} has no alias ${called}` })
  if (!versions.some(({ version }) => version === called))
    throw new Problem('version_not_found', { detail: `function ${name} has no version ${called}` })
  return { version: called, ref: called }
}

function draw(weights: Record<VersionId, number>, point: number): VersionId {
  const entries = Object.entries(weights)
  let left = point * entries.reduce((sum, [, weight]) => sum + weight, 0)
  for (const [version, weight] of entries) {
    left -= weight
    if (left < 0) return version
  }
  return entries.at(-1)![0]
}
