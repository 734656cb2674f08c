/** Images from an OCI layout directory of this host (OCI image layout specification). */

import { realpath, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { ImageError } from '../engine.ts'
import { openRegular, readDocument, sha256 } from './blobs.ts'
import { choose, type Descriptor, isIndex, type Manifest, parseManifest } from './manifests.ts'
import type { DirectoryReference } from './references.ts'
import { hexOf } from './shelf.ts'

/** How deep lists may lie in lists: a layout’s own, the image’s by platform, and one to spare. */
const maxDepth = 3

/** Blobs by their digest; rejects with an `ENOENT` where one is not there. */
export type ReadBlob = (descriptor: Descriptor) => Promise<Buffer>

/**
 * Goes down from a list of manifests to the one for this host.
 *
 * @throws ImageError
 */
export async function findManifest(
  top: Buffer,
  image: string,
  read: ReadBlob,
  tag?: string,
): Promise<Buffer> {
  let bytes = top
  for (let depth = 0; depth <= maxDepth; depth++) {
    const document = parseManifest(bytes, image)
    if (!isIndex(document)) return bytes
    const descriptor = choose(document, image, depth === 0 ? tag : undefined)
    bytes = await read(descriptor)
    if (sha256(bytes) !== descriptor.digest)
      throw new ImageError(
        'invalid_workload',
        `${image} has a manifest whose bytes are not those of its digest`,
      )
  }
  throw new ImageError('invalid_workload', `${image} has lists in lists in lists`)
}

/** Where the layout really is. Throws `ImageError` where it is not below one of the listed directories. */
async function placeOf(path: string, listed: readonly string[]): Promise<string> {
  const real = await realpath(path).catch(() => undefined)
  const roots = await Promise.all(listed.map((root) => realpath(root).catch(() => undefined)))
  // One answer for what is elsewhere and what is nowhere: paths of the host are not to be found out this way.
  if (real === undefined || !roots.some((root) => root !== undefined && `${real}/`.startsWith(`${root}/`)))
    throw new ImageError(
      'image_not_found',
      `oci:${path} is no image that may be run here: put it below a directory that VULCAN_IMAGE_DIRECTORIES lists`,
    )
  return real
}

export interface LayoutImage {
  manifest: Buffer
  /** Copies blobs to files of these names, in hex, without verifying them. */
  copy(descriptors: Descriptor[], into: string, signal: AbortSignal): Promise<void>
}

/** Throws `ImageError`. */
export async function openLayout(
  { path, tag }: DirectoryReference,
  listed: readonly string[],
): Promise<LayoutImage> {
  const image = `oci:${path}${tag === undefined ? '' : `:${tag}`}`
  const place = await placeOf(path, listed)
  const blobAt = ({ digest }: Descriptor) => join(place, 'blobs/sha256', hexOf(digest))
  const missing = (what: string, cause: unknown) =>
    new ImageError('image_not_found', `${image} is not a whole OCI layout: it has no ${what}`, { cause })
  const unless = async <T>(work: Promise<T>, what: string): Promise<T> => {
    try {
      return await work
    } catch (error) {
      if (['ENOENT', 'ELOOP', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? ''))
        throw missing(what, error)
      throw error
    }
  }
  const index = await unless(readDocument(join(place, 'index.json'), image), 'index.json')
  const read: ReadBlob = (descriptor) => unless(readDocument(blobAt(descriptor), image), descriptor.digest)
  return {
    manifest: await findManifest(index, image, read, tag),
    async copy(descriptors, into, signal) {
      for (const descriptor of descriptors) {
        await using file = await unless(openRegular(blobAt(descriptor)), descriptor.digest)
        const source = file.createReadStream({
          highWaterMark: 1024 * 1024,
          autoClose: false,
          end: descriptor.size,
        })
        const path = join(into, hexOf(descriptor.digest))
        await pipeline(source, (chunks) => writeFile(path, chunks, { flag: 'wx' }), { signal })
      }
    },
  }
}

/** As parsed; for the caller who knows that it is one. */
export const manifestOf = (bytes: Buffer, image: string): Manifest => parseManifest(bytes, image) as Manifest
