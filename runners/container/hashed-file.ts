/** Files that are written down as they come, and hashed on the way. */
import { createHash } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import type { ByteSource } from '../runner.ts'

export interface HashedFileOptions {
  mode?: number
  signal?: AbortSignal
  /** Bytes; for ever unless given. */
  maxBytes?: number
  /** What is thrown beyond that. */
  tooLarge?: () => Error
}

/**
 * Makes a file of what comes. Throws where there is one already, and what the source throws; whatever was written by
 * then is the caller’s to remove.
 *
 * @returns the sha256 in hex, and bytes
 */
export async function writeHashed(
  path: string,
  source: ByteSource,
  { mode = 0o666, signal, maxBytes = Number.POSITIVE_INFINITY, tooLarge }: HashedFileOptions = {},
): Promise<{ sha256: string; size: number }> {
  const hash = createHash('sha256')
  let size = 0
  const counted = async function* (chunks: AsyncIterable<Uint8Array>) {
    for await (const chunk of chunks) {
      size += chunk.length
      if (size > maxBytes) throw tooLarge?.() ?? new RangeError(`more than ${maxBytes} bytes`)
      hash.update(chunk)
      yield chunk
    }
  }
  // Not a write stream: one that fails at once may still make its file afterwards.
  const write = (chunks: AsyncIterable<Uint8Array>) => writeFile(path, chunks, { flag: 'wx', mode })
  await pipeline(Readable.from(source), counted, write, { signal })
  return { sha256: hash.digest('hex'), size }
}
