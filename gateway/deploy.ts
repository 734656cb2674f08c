/**
 * From what was put to a version with its bytes stored: scripts are built into one module, images and commands are
 * kept as they are, and projects for Node, Python and Go as a tar with what they depend on.
 */
import type { Blobs } from '../shared/blobs.ts'
import { Problem } from '../shared/errors.ts'
import { FunctionSpec, type FunctionVersion } from '../shared/functions.ts'
import type { Secrets } from '../shared/secrets.ts'
import { type BlobRef, type Digest, type Runtime, runtimeOf, runtimeOfFile } from '../shared/workload.ts'
import { checkSecrets, claimBlob, parseWith } from './admission.ts'
import {
  type Files,
  type Project,
  packed,
  packedWith,
  projectOf,
  refuseLinks,
  unpackProject,
} from './build/archive.ts'
import type { Builder, Dependencies } from './build/build.ts'
import type { Roster } from './roster.ts'
import { type Routable, type Route, route } from './routing.ts'
import { checkShape } from './shape.ts'
import { spool } from './spool.ts'
import { entryOf, filesIn, pythonEntryOf, specWith, type Upload } from './uploads.ts'
import { versionOf } from './versions.ts'

export interface DeployContext {
  blobs: Blobs
  secrets: Pick<Secrets, 'has'>
  roster: Pick<Roster, 'ability'>
  builder: Builder
  /** Largest body in bytes. */
  maxBodyBytes: number
}

/** Largest project with what was installed for it, as a tar (bytes). */
const projectBytes = 512 * 1_048_576

const sources = ['code', 'files', 'archive', 'image'] as const
const isScript = (runtime: Runtime | undefined) => runtime === 'javascript' || runtime === 'typescript'
const isCommand = ({ entrypoint }: Pick<FunctionSpec, 'entrypoint'>) => Array.isArray(entrypoint)

/** What was put, read and checked. */
interface Deployment {
  spec: FunctionSpec
  /** Undefined for images, and for archives that are kept unread. */
  project: Project | undefined
  /** The archive as it came, or where it is stored. */
  archive: Buffer | BlobRef | undefined
}

/** What a version is made of beside its spec, and the spec as it is kept. */
type Made = Pick<FunctionVersion, 'runtime' | 'bundle' | 'source' | 'spec' | 'warnings'>

/** Checks, builds and stores the bytes of what was put. Nothing refers to them yet. */
export async function deployable(
  context: DeployContext,
  name: string,
  upload: Upload,
  signal: AbortSignal,
): Promise<FunctionVersion> {
  // Unpacked files are large: as few are held as are being built.
  return await context.builder.inTurn(async () => {
    signal.throwIfAborted()
    const deployment = await read(context, upload)
    const { spec, project } = deployment
    checkSecrets(context.secrets, spec)
    const entry = project === undefined || isCommand(spec) ? undefined : beginning(project.files, spec)
    const runtime = spec.runtime ?? (entry === undefined ? runtimeOf(spec) : runtimeOfFile(entry))
    const scripted = entry !== undefined && isScript(runtime)
    const routable = asSource(spec, runtime, scripted)
    checkShape(routable)
    const { isolation, reason }: Route = route(routable, context.roster.ability)
    const { warnings, ...made } = await (spec.image !== undefined
      ? withImage(context, spec)
      : scripted
        ? built(context, deployment, entry, signal)
        : asItIs(context, deployment, { runtime: runtime!, entry }, signal))
    return versionOf({ name, isolation, routing_reason: reason, ...made }, warnings)
  })
}

async function read(context: DeployContext, upload: Upload): Promise<Deployment> {
  let { archive }: { archive: Buffer | BlobRef | undefined } = upload
  if (archive !== undefined)
    for (const field of sources)
      if (field in upload.spec)
        throw new Problem('invalid_field', { detail: `${field}: the archive is what is deployed`, field })
  const spec = parseWith(FunctionSpec, upload.spec)
  if (archive === undefined) {
    exactlyOne(spec)
    const files = filesIn(spec)
    if (files !== undefined) return { spec, project: projectOf(files), archive }
    if (spec.archive === undefined) return { spec, project: undefined, archive }
    archive = await claimBlob(context.blobs, 'archive.blob', spec.archive.blob)
  }
  // A command runs on the archive as it is, unless something is to be installed for it.
  if (isCommand(spec) && spec.runtime !== 'node' && spec.runtime !== 'python')
    return { spec, project: undefined, archive }
  const bytes = Buffer.isBuffer(archive) ? archive : await stored(context, archive)
  const project = await unpackProject(bytes)
  return { spec: specWith(project.files, upload.spec), project, archive }
}

async function stored({ blobs, maxBodyBytes }: DeployContext, { blob, size }: BlobRef): Promise<Buffer> {
  if (size > maxBodyBytes) throw new Problem('payload_too_large', { detail: `${blob} has ${size} bytes` })
  const bytes = await blobs.get(blob)
  if (bytes === undefined) throw new Problem('blob_not_found', { detail: `there is no blob ${blob}` })
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

async function withImage({ blobs }: DeployContext, spec: FunctionSpec): Promise<Made> {
  const { image } = spec
  const source = typeof image === 'object' ? await claimBlob(blobs, 'image.blob', image.blob) : null
  return { runtime: spec.runtime ?? 'oci', bundle: null, source, spec: kept(spec), warnings: [] }
}

/** A script with all that it imports, as one module. */
async function built(
  { blobs, builder }: DeployContext,
  { spec, project }: Deployment,
  entry: string,
  signal: AbortSignal,
): Promise<Made> {
  refuseLinks(project!)
  const { files } = project!
  const { code, map, warnings } = await builder.build(files, entry, signal)
  const [bundle, mapRef, source] = await Promise.all([
    blobs.put(code),
    blobs.put(map),
    blobs.put(spec.code === undefined ? packed(files) : Buffer.from(spec.code)),
  ])
  // What a bundle is, whatever it was written in.
  return {
    runtime: 'javascript',
    bundle: { ...bundle, map: mapRef.blob },
    source,
    spec: kept(spec),
    warnings,
  }
}

/** Code as it was put; a project with what it depends on; an archive for a command byte by byte. */
async function asItIs(
  { blobs, builder }: DeployContext,
  { spec, project, archive }: Deployment,
  { runtime, entry }: { runtime: Runtime; entry: string | undefined },
  signal: AbortSignal,
): Promise<Made> {
  if (spec.code !== undefined) {
    const source = await blobs.put(Buffer.from(spec.code))
    return { runtime, bundle: { ...source, map: null }, source, spec: kept(spec), warnings: [] }
  }
  const language = runtime === 'node' || runtime === 'python' ? runtime : undefined
  const dependencies: Dependencies =
    project === undefined || language === undefined
      ? { folders: [], warnings: [] }
      : await builder.dependencies(project.files, language, signal)
  const untouched = project === undefined || (isCommand(spec) && !project.unwrapped && archive !== undefined)
  const source =
    untouched && dependencies.folders.length === 0
      ? Buffer.isBuffer(archive)
        ? await blobs.put(archive)
        : archive!
      : await packedIn(blobs, project!, dependencies)
  const begun = entry === undefined ? spec : { ...spec, entrypoint: entry }
  return { runtime, bundle: null, source, spec: kept(begun), warnings: dependencies.warnings }
}

async function packedIn(blobs: Blobs, project: Project, { folders }: Dependencies): Promise<BlobRef> {
  refuseLinks(project)
  await using tar = await spool(ReadableStream.from(packedWith(project, folders)), projectBytes)
  return await blobs.putStream(tar.ref, () => tar.stream())
}

/** The spec without what is stored beside it. */
function kept({ code: _, files: __, archive: ___, ...spec }: FunctionSpec): FunctionVersion['spec'] {
  return spec
}

function exactlyOne(spec: FunctionSpec): void {
  const set = sources.filter((name) => spec[name] !== undefined)
  if (set.length === 1) return
  throw new Problem('invalid_field', {
    detail:
      set.length === 0
        ? 'one of code, files, archive or image is required'
        : `only one of code, files, archive and image may be set, not ${set.join(' and ')}`,
    field: set[1] ?? 'code',
  })
}

/** The file a handler begins with; undefined where the runtime finds it by itself. */
function beginning(files: Files, spec: FunctionSpec): string | undefined {
  const { runtime, code } = spec
  if (runtime === 'go' || runtime === 'oci') return undefined
  const entrypoint = typeof spec.entrypoint === 'string' ? spec.entrypoint : undefined
  const entry =
    code !== undefined
      ? [...files.keys()][0]!
      : runtime === 'python'
        ? pythonEntryOf(files, entrypoint)
        : entryOf(files, entrypoint)
  const kind = runtimeOfFile(entry)
  if (runtime === undefined && kind === undefined)
    throw new Problem('invalid_field', {
      detail: `runtime: say what ${entry} is to be run by`,
      field: 'runtime',
    })
  if (runtime !== undefined && runtime !== 'python' && !isScript(kind))
    throw new Problem('invalid_field', {
      detail: `entrypoint: ${entry} is no JavaScript or TypeScript by its name`,
      field: 'entrypoint',
    })
  // Of one file of code the name says nothing but what it is written in.
  return code !== undefined && !isScript(runtime ?? kind) ? undefined : entry
}

const anyBlob: Digest = `sha256:${'0'.repeat(64)}`

/** What is routed: a project that becomes one module counts as source. */
function asSource(spec: FunctionSpec, runtime: Runtime | undefined, scripted: boolean) {
  const { isolation, network, image, image_auth, working_dir, user, entrypoint } = spec
  const source = scripted
    ? { code: ' ' }
    : image !== undefined
      ? { image, image_auth, entrypoint }
      : spec.code !== undefined
        ? { code: ' ', entrypoint }
        : { archive: spec.archive ?? { blob: anyBlob }, entrypoint }
  return { isolation, network, working_dir, user, ...source, runtime } satisfies Partial<Routable>
}
