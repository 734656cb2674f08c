/** What is run, as a spec, its payload and the object store have it together. */
import type { Blobs } from '../shared/blobs.ts'
import { BusUnavailable } from '../shared/errors.ts'
import type { Accepted } from '../shared/events.ts'
import { sha256Hex } from '../shared/ids.ts'
import { preciseNow } from '../shared/tracing.ts'
import { type Cause, type Digest, runtimeOf, type WorkloadSpec } from '../shared/workload.ts'
import type { Bundles } from './bundles.ts'
import type { ByteSource, Phase, Program, RegistryAuth, Source } from './runner.ts'

/** The workload cannot run, now or later. */
export class Refusal extends Error {
  override name = 'Refusal'
  readonly reason: Cause
  constructor(reason: Cause, message: string, options?: ErrorOptions) {
    super(message, options)
    this.reason = reason
  }
}

/** Where a program comes from: the fields of a spec, and the text of a deployed function where it has one. */
export type ProgramSpec = Pick<
  WorkloadSpec,
  'code' | 'archive' | 'image' | 'runtime' | 'entrypoint' | 'limits' | 'network' | 'working_dir' | 'user'
> & {
  bundle: Accepted['bundle']
  /** `user:password` of the image’s registry. */
  registryUser?: string | undefined
}

export interface Stores {
  blobs: Pick<Blobs, 'open'>
  bundles: Pick<Bundles, 'get'>
}

/** Of specs that were accepted before they could name it (MiB). */
const defaultDiskMb = 64

/**
 * Throws `Refusal` for what cannot run, `BusUnavailable` where trying again can help. Archives are not read yet.
 * `onPhase` is told of code that was not in memory.
 */
export async function programOf(
  stores: Stores,
  spec: ProgramSpec,
  onPhase?: (phase: Phase) => void,
): Promise<Program> {
  const { bundle, limits } = spec
  const built = isBuilt(spec)
  return {
    // A built module holds no types any more.
    // The gateway takes no archive of which nothing says what runs it.
    runtime: built ? 'javascript' : (runtimeOf(spec) ?? 'oci'),
    source: bundle == null ? sourceOf(stores, spec) : await bundleOf(stores, bundle.blob, onPhase),
    entrypoint: built ? undefined : spec.entrypoint,
    limits: { ...limits, disk_mb: limits.disk_mb ?? defaultDiskMb },
    egress: spec.network.egress,
    workingDir: spec.working_dir,
    user: spec.user,
  }
}

/** A module that was built, rather than a file that was put. */
const isBuilt = ({ bundle, runtime, entrypoint }: ProgramSpec): boolean =>
  bundle != null &&
  !Array.isArray(entrypoint) &&
  (runtime === undefined || runtime === 'javascript' || runtime === 'typescript')

async function bundleOf(
  { bundles }: Stores,
  digest: Digest,
  onPhase: ((phase: Phase) => void) | undefined,
): Promise<Source> {
  let text = bundles.get(digest)
  if (typeof text !== 'string')
    text = await timed('fetch bundle', unlessGone(text, `its code ${digest}`), onPhase)
  return { kind: 'code', text, sha256: hex(digest) }
}

/** Tells how long something took that had to be fetched. */
export async function timed<T>(
  name: string,
  work: Promise<T>,
  onPhase: ((phase: Phase) => void) | undefined,
): Promise<T> {
  if (onPhase === undefined) return await work
  const start = preciseNow()
  let error: string | undefined
  try {
    return await work
  } catch (thrown) {
    error = (thrown as Error).message
    throw thrown
  } finally {
    onPhase({ name, start, end: preciseNow(), ...(error === undefined ? {} : { error }) })
  }
}

function sourceOf({ blobs }: Stores, { code, archive, image, registryUser }: ProgramSpec): Source {
  if (code !== undefined) return { kind: 'code', text: code, sha256: sha256Hex(code) }
  if (archive !== undefined) {
    const open = () => opened(blobs, archive.blob, 'archive')
    return { kind: 'archive', sha256: hex(archive.blob), open }
  }
  if (typeof image === 'string')
    return registryUser === undefined
      ? { kind: 'image', reference: image }
      : { kind: 'image', reference: image, auth: authOf(registryUser) }
  if (image !== undefined) {
    const open = () => opened(blobs, image.blob, 'image')
    return { kind: 'image-archive', sha256: hex(image.blob), open }
  }
  throw new Refusal('internal', 'it has neither code nor archive nor image')
}

function authOf(secret: string): RegistryAuth {
  const colon = secret.indexOf(':')
  if (colon < 1)
    throw new Refusal('invalid_workload', 'the secret that image_auth names must be user:password')
  return { username: secret.slice(0, colon), password: secret.slice(colon + 1) }
}

async function opened(blobs: Stores['blobs'], digest: Digest, what: string): Promise<ByteSource> {
  const blob = await unlessGone(blobs.open(digest), `its ${what} ${digest}`)
  if (blob === undefined) throw new Refusal('internal', `its ${what} ${digest} is no longer stored`)
  return blob.chunks
}

const hex = (digest: Digest): string => digest.slice('sha256:'.length)

/** What cannot be read for good makes the workload impossible. */
export async function unlessGone<T>(reading: Promise<T>, what: string): Promise<T> {
  try {
    return await reading
  } catch (cause) {
    if (cause instanceof BusUnavailable) throw cause
    throw new Refusal('internal', `${what} cannot be read: ${(cause as Error).message}`, { cause })
  }
}
