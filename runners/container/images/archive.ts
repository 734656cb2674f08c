/**
 * Images from one file: an OCI layout in a tar archive, or what `docker save` writes. The archive is taken apart into
 * numbered files in the jail; the names in it are only ever compared.
 */

import { renameSync } from 'node:fs'
import { mkdir, rm } from 'node:fs/promises'
import { join, posix } from 'node:path'
import { z } from 'zod'
import type { Digest } from '../../../shared/workload.ts'
import type { ByteSource } from '../../runner.ts'
import { ImageError } from '../engine.ts'
import { writeHashed } from '../hashed-file.ts'
import { readDocument } from './blobs.ts'
import { findManifest } from './directory.ts'
import { inJail } from './jail.ts'
import { type Descriptor, mediaTypes } from './manifests.ts'
import { hexOf } from './shelf.ts'
import type { Part } from './unpacker/protocol.ts'

/** Files in an archive: some for each layer. */
const maxEntries = 10_000

/** `docker save` (moby, image/tarexport). */
const Saved = z.array(z.object({ Config: z.string(), Layers: z.array(z.string()).max(512) })).min(1)

type File = Extract<Part, { file: string }>

export interface ArchiveImage {
  manifest: Buffer
  /** Moves the blobs to files of these names, in hex. */
  move(descriptors: Descriptor[], into: string): Promise<void>
}

export interface ArchiveOptions {
  digest: Digest
  open(): Promise<ByteSource>
  /** An empty directory of one’s own. */
  scratch: string
  /** Of the archive, plain. */
  maxBytes: number
  signal: AbortSignal
}

/** Throws `ImageError`. */
export async function openArchive(options: ArchiveOptions): Promise<ArchiveImage> {
  const { digest, scratch, maxBytes, signal } = options
  const image = `the image archive ${digest}`
  const archive = join(scratch, 'archive')
  const into = join(scratch, 'parts')
  await receive(options, archive, image)
  await mkdir(into)
  const job = { kind: 'split' as const, maxBytes, maxEntries }
  const answer = await inJail({ target: into, files: [archive], job, signal })
  await rm(archive)
  if (answer.kind !== 'parts')
    throw new ImageError(
      'invalid_workload',
      `${image} cannot be read: ${answer.kind === 'refused' ? answer.why : answer.kind}`,
    )

  const files = new Map<string, File>()
  const links = new Map<string, string>()
  for (const part of answer.parts) {
    const path = normal(part.path)
    if ('file' in part) files.set(path, part)
    else
      links.set(
        path,
        normal(part.link.startsWith('/') ? part.link : posix.join(posix.dirname(path), part.link)),
      )
  }
  const at = (path: string): File | undefined => {
    const name = normal(path)
    return files.get(name) ?? files.get(links.get(name) ?? '')
  }
  const byDigest = new Map([...files.values()].map((file) => [file.digest, file]))
  const read = (file: File | undefined, what: string) => {
    if (file === undefined) throw new ImageError('invalid_workload', `${image} has no ${what}`)
    return readDocument(join(into, file.file), image)
  }

  const index = at('index.json')
  const saved = at('manifest.json')
  if (!index && !saved)
    throw new ImageError(
      'invalid_workload',
      `${image} is not an image: it has neither index.json nor manifest.json; make one with skopeo copy … oci-archive:FILE or docker save`,
    )
  let manifest: Buffer
  if (index) {
    const blob = (descriptor: Descriptor) => read(byDigest.get(hexOf(descriptor.digest)), descriptor.digest)
    manifest = await findManifest(await read(index, 'index.json'), image, blob)
  } else {
    const parsed = Saved.safeParse(parseJson(await read(saved, 'manifest.json')))
    if (!parsed.success) throw new ImageError('invalid_workload', `${image} has a broken manifest.json`)
    if (parsed.data.length > 1)
      throw new ImageError('invalid_workload', `${image} holds ${parsed.data.length} images: save one alone`)
    const { Config, Layers } = parsed.data[0]!
    const describe = (path: string, mediaType: string) => {
      const file = at(path)
      if (!file) throw new ImageError('invalid_workload', `${image} has no ${path.slice(0, 200)}`)
      return { mediaType, digest: `sha256:${file.digest}`, size: file.size }
    }
    const document = {
      schemaVersion: 2,
      mediaType: mediaTypes.manifest,
      config: describe(Config, mediaTypes.config),
      layers: Layers.map((path) => describe(path, mediaTypes.layer)),
    }
    manifest = Buffer.from(JSON.stringify(document))
  }
  return {
    manifest,
    async move(descriptors, to) {
      for (const descriptor of descriptors) {
        const file = byDigest.get(hexOf(descriptor.digest))
        if (!file) throw new ImageError('invalid_workload', `${image} has no ${descriptor.digest}`)
        renameSync(join(into, file.file), join(to, hexOf(descriptor.digest)))
      }
    },
  }
}

/** As a key: `./a//b` and `/a/b` are `a/b`. Names are bytes, and those looked for are ASCII. */
const normal = (path: string) => posix.join('/', path).slice(1)

function parseJson(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString())
  } catch {
    return undefined
  }
}

/** Writes the archive down and sees that it is the one that was named. */
async function receive({ digest, open, maxBytes, signal }: ArchiveOptions, path: string, image: string) {
  const tooLarge = () =>
    new ImageError('invalid_workload', `${image} is larger than ${Math.floor(maxBytes / 2 ** 20)} MiB`)
  const { sha256 } = await writeHashed(path, await open(), { mode: 0o600, signal, maxBytes, tooLarge })
  const got: Digest = `sha256:${sha256}`
  if (got !== digest) throw new ImageError('backend_unavailable', `${image} came as other bytes: ${got}`)
}
