/**
 * Deployed functions: what a client puts (`FunctionSpec`) and what the KV bucket `vulcan_functions` holds of them.
 * Keys: `function.{name}`, `version.{name}.{version}`, `lane.{isolation}.{lane}`.
 */
import { z } from 'zod'
import { BlobRef, Digest, FunctionName, Isolation, Runtime, SpecFields, VersionId } from './workload.ts'

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
    /** One ES module; null for images and archives that are not bundled. */
    bundle: BlobRef.extend({ map: Digest.nullable() }).nullable(),
    /** What was deployed, as a tar archive or single file. */
    source: BlobRef.nullable(),
    /** The spec as deployed, without code and files. */
    spec: FunctionSpec.omit({ code: true, files: true }),
    warnings: z.array(BuildWarning),
  })
  .meta({ id: 'FunctionVersion' })
export type FunctionVersion = z.infer<typeof FunctionVersion>

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

/** The lane of a function that has a concurrency or rate limit; undefined: the common queue. */
export const laneOf = (
  name: FunctionName,
  spec: Pick<FunctionSpec, 'concurrency' | 'rate'>,
): string | undefined => (spec.concurrency === null && spec.rate === null ? undefined : `fn-${name}`)
