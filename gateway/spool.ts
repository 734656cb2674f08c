/** A request body of any size on disk rather than in memory, hashed on its way. */
import { createHash, randomUUID } from 'node:crypto'
import { type FileHandle, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Problem } from '../shared/errors.ts'
import type { BlobRef } from '../shared/workload.ts'
import { tooLarge } from './body.ts'

export interface Spooled extends AsyncDisposable {
  ref: BlobRef
  stream(): ReadableStream<Uint8Array>
}

/** Bytes on disk at once; more is refused rather than filling it. */
const budgetBytes = 4 * 1_073_741_824
let held = 0

/** Throws `overloaded` and `payload_too_large` past `limit` (bytes). The file has no name any more: a crash leaves nothing. */
export async function spool(
  body: ReadableStream<Uint8Array> | null,
  limit: number,
  dir = tmpdir(),
): Promise<Spooled> {
  const file = await unnamed(dir)
  let own = 0
  const close = async () => {
    held -= own
    own = 0
    await file.close()
  }
  try {
    const hash = createHash('sha256')
    let size = 0
    for await (const chunk of body ?? []) {
      if (size + chunk.byteLength > limit) throw tooLarge(limit)
      if (held + chunk.byteLength > budgetBytes)
        throw new Problem('overloaded', { detail: 'too many uploads at once', retryAfterS: 5 })
      held += chunk.byteLength
      own += chunk.byteLength
      hash.update(chunk)
      for (let from = 0; from < chunk.byteLength; )
        from += (await file.write(chunk, from, chunk.byteLength - from, size + from)).bytesWritten
      size += chunk.byteLength
    }
    return {
      ref: { blob: `sha256:${hash.digest('hex')}`, size },
      stream: () => ReadableStream.from(chunksOf(file, size)),
      [Symbol.asyncDispose]: close,
    }
  } catch (error) {
    await close()
    throw error
  }
}

async function unnamed(dir: string): Promise<FileHandle> {
  const path = join(dir, `vulcan-body-${randomUUID()}`)
  const file = await open(path, 'wx+', 0o600)
  await rm(path)
  return file
}

/** Bytes read at once. */
const chunkBytes = 128 * 1024

async function* chunksOf(file: FileHandle, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < size; ) {
    const { bytesRead, buffer } = await file.read(Buffer.alloc(chunkBytes), 0, chunkBytes, at)
    if (bytesRead === 0) throw new Error('the spooled body ended early')
    yield buffer.subarray(0, bytesRead)
    at += bytesRead
  }
}
