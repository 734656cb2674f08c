import { createHash } from 'node:crypto'
import { constants, createReadStream } from 'node:fs'
import { open } from 'node:fs/promises'
import { pipeline } from 'node:stream/promises'
import type { Digest } from '../../../shared/workload.ts'
import { ImageError } from '../engine.ts'
import { maxDocumentBytes } from './manifests.ts'

export const sha256 = (bytes: Uint8Array): Digest =>
  `sha256:${createHash('sha256').update(bytes).digest('hex')}`

/** Of a file, read without blocking anybody. */
export async function sha256OfFile(path: string): Promise<Digest> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path, { highWaterMark: 1024 * 1024 }), hash)
  return `sha256:${hash.digest('hex')}`
}

/** Opens a regular file of a directory that others write to: neither a link nor a FIFO is taken for one. */
export async function openRegular(path: string) {
  const file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK)
  if ((await file.stat()).isFile()) return file
  await file.close()
  throw Object.assign(new Error(`${path} is not a regular file`), { code: 'ENOENT' })
}

/** A manifest, an index or a config. Throws `ImageError` where it is larger than any such thing may be. */
export async function readDocument(path: string, image: string): Promise<Buffer> {
  await using file = await openRegular(path)
  const { size } = await file.stat()
  if (size > maxDocumentBytes)
    throw new ImageError(
      'invalid_workload',
      `${image} has a document of ${size} bytes, more than any may have`,
    )
  return await file.readFile()
}
