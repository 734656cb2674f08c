/** What stands in manifests, lists of them and image configs; fields that are not used here are passed over. */
import { posix } from 'node:path'
import { z } from 'zod'
import { Digest } from '../../../shared/workload.ts'
import { type ImageConfig, ImageError } from '../engine.ts'

/** Of a manifest, an index or a config, bytes: what registries take (distribution specification, pushing manifests). */
export const maxDocumentBytes = 4 * 1024 * 1024
/** Docker’s own limit is 127. */
const maxLayers = 512

const Descriptor = z.object({
  mediaType: z.string().default(''),
  digest: Digest,
  size: z.int().nonnegative(),
  annotations: z.record(z.string(), z.string()).nullish(),
  platform: z.object({ os: z.string(), architecture: z.string(), variant: z.string().optional() }).nullish(),
})
export type Descriptor = z.infer<typeof Descriptor>

const Index = z.object({ manifests: z.array(Descriptor).max(10_000) })
export type Index = z.infer<typeof Index>

const Manifest = z.object({
  mediaType: z.string().optional(),
  config: Descriptor,
  layers: z.array(Descriptor).max(maxLayers),
})
export type Manifest = z.infer<typeof Manifest>

const Config = z.object({
  os: z.string().optional(),
  architecture: z.string().optional(),
  config: z
    .object({
      Entrypoint: z.array(z.string()).nullish(),
      Cmd: z.array(z.string()).nullish(),
      Env: z.array(z.string()).nullish(),
      WorkingDir: z.string().nullish(),
      User: z.string().nullish(),
    })
    .nullish(),
  rootfs: z.object({ diff_ids: z.array(Digest).max(maxLayers).nullish() }),
})

export const mediaTypes = {
  index: 'application/vnd.oci.image.index.v1+json',
  manifest: 'application/vnd.oci.image.manifest.v1+json',
  config: 'application/vnd.oci.image.config.v1+json',
  layer: 'application/vnd.oci.image.layer.v1.tar',
  dockerManifest: 'application/vnd.docker.distribution.manifest.v2+json',
} as const

const layerType =
  /^application\/vnd\.(?:oci\.image\.layer\.(?:nondistributable\.)?v1\.tar|docker\.image\.rootfs\.(?:foreign\.)?diff\.tar)(?:[.+](?:gzip|zstd))?$/
const configTypes = [mediaTypes.config, 'application/vnd.docker.container.image.v1+json']

/** Go’s name of a processor, as images say it, by Node’s. */
const architectures: Partial<Record<NodeJS.Architecture, string>> = {
  x64: 'amd64',
  ia32: '386',
  ppc64: 'ppc64le',
}
export const architecture = architectures[process.arch] ?? process.arch

const broken = (image: string, why: string) => new ImageError('invalid_workload', `${image} ${why}`)

function parse<T>(schema: z.ZodType<T>, bytes: Uint8Array, image: string, what: string): T {
  let document: unknown
  try {
    document = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch {
    throw broken(image, `has a ${what} that is not JSON`)
  }
  if ((document as { schemaVersion?: unknown } | null)?.schemaVersion === 1)
    throw broken(
      image,
      'is in the old manifest format, schema 1, which is not supported: push it again with a current tool',
    )
  const { data, error } = schema.safeParse(document)
  if (data === undefined) {
    const issue = error?.issues[0]
    throw broken(image, `has a broken ${what}: ${issue?.path.join('.')}: ${issue?.message}`)
  }
  return data
}

/** A manifest, or a list of manifests, told apart by what they hold as everywhere in the field. Throws `ImageError`. */
export function parseManifest(bytes: Uint8Array, image: string): Index | Manifest {
  const either = parse(z.looseObject({ manifests: z.unknown().optional() }), bytes, image, 'manifest')
  return either.manifests === undefined
    ? checked(parse(Manifest, bytes, image, 'manifest'), image)
    : parse(Index, bytes, image, 'list of manifests')
}

export const isIndex = (document: Index | Manifest): document is Index => 'manifests' in document

function checked(manifest: Manifest, image: string): Manifest {
  if (!configTypes.includes(manifest.config.mediaType))
    throw broken(
      image,
      `is not a container image: its config is of type ${JSON.stringify(manifest.config.mediaType)}`,
    )
  const strange = manifest.layers.find((layer) => !layerType.test(layer.mediaType))
  if (strange)
    throw broken(image, `has a layer of type ${JSON.stringify(strange.mediaType)}, which is not supported`)
  return manifest
}

/** The one for this host among those of a list; the name of the image’s tag decides first where one is given. */
export function choose(index: Index, image: string, tag?: string): Descriptor {
  const name = 'org.opencontainers.image.ref.name'
  const named =
    tag === undefined ? index.manifests : index.manifests.filter((one) => one.annotations?.[name] === tag)
  if (named.length === 0) {
    const tags = index.manifests.flatMap((one) => one.annotations?.[name] ?? [])
    const which = tags.length ? `it has ${tags.slice(0, 20).join(', ')}` : 'nothing in it has a tag'
    throw new ImageError(
      'image_not_found',
      tag === undefined ? `${image} holds no image` : `${image} has no tag ${tag}: ${which}`,
    )
  }
  if (named.length === 1 && !named[0]!.platform) return named[0]!
  const fits = named.filter(
    ({ platform }) => platform?.os === 'linux' && platform.architecture === architecture,
  )
  // Variants of one architecture: the plain one, else the first, as the list is in order of preference.
  const found = fits.find(({ platform }) => !platform?.variant || platform.variant === 'v8') ?? fits[0]
  if (found) return found
  if (named.every(({ platform }) => !platform))
    throw broken(image, `holds ${named.length} images: say which by its tag`)
  const offered = named.flatMap(({ platform }) => (platform ? `${platform.os}/${platform.architecture}` : []))
  throw new ImageError(
    'image_not_found',
    `${image} is not there for linux/${architecture}: it has ${[...new Set(offered)].slice(0, 20).join(', ')}`,
  )
}

export interface ParsedConfig {
  config: ImageConfig
  /** Of the uncompressed layers, lowest first. */
  diffIds: Digest[]
}

/** Throws `ImageError` also where the image is for another platform. */
export function parseConfig(bytes: Uint8Array, manifest: Manifest, image: string): ParsedConfig {
  const { os, architecture: built, config, rootfs } = parse(Config, bytes, image, 'config')
  if ((os && os !== 'linux') || (built && built !== architecture))
    throw broken(
      image,
      `is for ${os ?? 'linux'}/${built ?? architecture}, and this host is linux/${architecture}`,
    )
  const diffIds = rootfs.diff_ids ?? []
  if (diffIds.length !== manifest.layers.length)
    throw broken(image, `has ${manifest.layers.length} layers and ${diffIds.length} diff_ids`)
  const pairs = (config?.Env ?? []).map((line) => /^([^=]+)=?(.*)$/s.exec(line))
  return {
    config: {
      entrypoint: config?.Entrypoint ?? [],
      cmd: config?.Cmd ?? [],
      env: Object.fromEntries(pairs.flatMap((pair) => (pair ? [[pair[1]!, pair[2]!]] : []))),
      workingDir: posix.resolve('/', config?.WorkingDir ?? ''),
      user: config?.User ?? '',
    },
    diffIds,
  }
}
