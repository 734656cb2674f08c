/** Writing OCI layouts (OCI image specification, image-layout.md) whose bytes depend on nothing but their content. */
import { spawn } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { link, mkdir, readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Digest } from '../../../shared/workload.ts'
import { writeHashed } from '../hashed-file.ts'

/** Of every file in a layer, and of the image: 2000-01-01, in seconds. */
const someTime = 946_684_800

const layerType = 'application/vnd.oci.image.layer.v1.tar'

/** A blob of a layout. */
export type Blob = { digest: Digest; size: number }

export type ImageParts = {
  /** Lowest first; their blobs are in the layout already. Uncompressed: a layer's digest is that of its tar. */
  layers: Blob[]
  /** As Debian names it; also the OCI name for the two that Node has. */
  architecture: string
  env: Readonly<Record<string, string>>
  cmd: string[]
  user: string
  workingDir: string
  labels: Record<string, string>
}

/** Where a layout has a blob. */
export const blobFile = (layout: string, { digest }: Pick<Blob, 'digest'>): string =>
  join(layout, 'blobs', 'sha256', digest.slice('sha256:'.length))

/** An empty layout. */
export async function createLayout(layout: string): Promise<void> {
  await mkdir(join(layout, 'blobs', 'sha256'), { recursive: true })
  await writeFile(join(layout, 'oci-layout'), `${JSON.stringify({ imageLayoutVersion: '1.0.0' })}\n`)
}

/** The whole of `root` as a layer: sorted by name, everything root's, all of one time. */
export async function addLayer(layout: string, root: string): Promise<Blob> {
  const beside = join(layout, 'blobs', 'sha256', `.${randomUUID()}`)
  const flags = ['--format=gnu', '--sort=name', `--mtime=@${someTime}`, '--owner=0', '--group=0']
  const tar = spawn('tar', ['--create', ...flags, '--numeric-owner', '--file=-', '--directory', root, '.'], {
    env: { ...process.env, LC_ALL: 'C' },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let said = ''
  tar.stderr.setEncoding('utf8').on('data', (text: string) => {
    said = (said + text).slice(-2_000)
  })
  const ended = once(tar, 'close')
  const [{ sha256, size }] = await Promise.all([writeHashed(beside, tar.stdout), ended])
  const [code] = await ended
  if (code !== 0) throw new Error(`tar of ${root} failed: ${said.trim()}`)
  const digest: Digest = `sha256:${sha256}`
  await rename(beside, blobFile(layout, { digest }))
  return { digest, size }
}

/** Takes a blob of another layout on the same file system, without another copy of it. */
export async function linkBlob(layout: string, from: string, blob: Blob): Promise<void> {
  await link(blobFile(from, blob), blobFile(layout, blob))
}

async function addJson(layout: string, value: unknown): Promise<Blob> {
  const text = JSON.stringify(value)
  const digest: Digest = `sha256:${createHash('sha256').update(text).digest('hex')}`
  await writeFile(blobFile(layout, { digest }), text)
  return { digest, size: Buffer.byteLength(text) }
}

/**
 * Writes config, manifest and index of an image whose layers are there.
 *
 * @returns the manifest's digest
 */
export async function addImage(layout: string, parts: ImageParts): Promise<Digest> {
  const { layers, architecture, env, cmd, user, workingDir, labels } = parts
  const config = await addJson(layout, {
    created: new Date(someTime * 1000).toISOString(),
    architecture,
    os: 'linux',
    config: {
      User: user,
      Env: Object.entries(env).map(([name, value]) => `${name}=${value}`),
      Cmd: cmd,
      WorkingDir: workingDir,
      Labels: labels,
    },
    rootfs: { type: 'layers', diff_ids: layers.map(({ digest }) => digest) },
  })
  const manifestType = 'application/vnd.oci.image.manifest.v1+json'
  const manifest = await addJson(layout, {
    schemaVersion: 2,
    mediaType: manifestType,
    config: { mediaType: 'application/vnd.oci.image.config.v1+json', ...config },
    layers: layers.map((layer) => ({ mediaType: layerType, ...layer })),
  })
  const index = {
    schemaVersion: 2,
    mediaType: 'application/vnd.oci.image.index.v1+json',
    manifests: [{ mediaType: manifestType, ...manifest, platform: { architecture, os: 'linux' } }],
  }
  await writeFile(join(layout, 'index.json'), `${JSON.stringify(index)}\n`)
  return manifest.digest
}

/** The layers of a layout's only image, lowest first. */
export async function layersOf(layout: string): Promise<Blob[]> {
  const index = JSON.parse(await readFile(join(layout, 'index.json'), 'utf8')) as { manifests: Blob[] }
  const text = await readFile(blobFile(layout, index.manifests[0]!), 'utf8')
  const { layers } = JSON.parse(text) as { layers: Blob[] }
  return layers.map(({ digest, size }) => ({ digest, size }))
}
