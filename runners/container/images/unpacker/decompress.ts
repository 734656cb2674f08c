import { createReadStream, openSync, readSync } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { createGunzip, createZstdDecompress } from 'node:zlib'
import { Refusal } from './tar.ts'

const piece = 256 * 1024

/** By its first bytes, as everybody reads layers: what a manifest says of the compression is often wrong. */
function compressionOf(magic: Buffer): 'gzip' | 'zstd' | 'none' {
  if (magic[0] === 0x1f && magic[1] === 0x8b) return 'gzip'
  const word = magic.readUInt32LE(0)
  // RFC 8878: a frame, or a skippable one before it.
  if (word === 0xfd2fb528 || (word & 0xfffffff0) >>> 0 === 0x184d2a50) return 'zstd'
  return 'none'
}

/**
 * Gives the plain bytes of a file that may be compressed, piece by piece.
 *
 * @throws Refusal where it cannot be decompressed, or is larger than `maxBytes`
 */
export async function decompress(
  path: string,
  maxBytes: number,
  take: (bytes: Buffer) => void,
): Promise<number> {
  const descriptor = openSync(path, 'r')
  const magic = Buffer.alloc(4)
  readSync(descriptor, magic, 0, 4, 0)
  const source = createReadStream('', { fd: descriptor, start: 0, highWaterMark: piece })
  let total = 0
  const sink = async (pieces: AsyncIterable<Buffer>) => {
    for await (const bytes of pieces) {
      total += bytes.length
      if (total > maxBytes)
        throw new Refusal(`it is larger than ${Math.floor(maxBytes / 2 ** 20)} MiB when unpacked`)
      take(bytes)
    }
  }
  const kind = compressionOf(magic)
  if (kind === 'none') await pipeline(source, sink)
  else {
    const plain =
      kind === 'gzip' ? createGunzip({ chunkSize: piece }) : createZstdDecompress({ chunkSize: piece })
    try {
      await pipeline(source, plain, sink)
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      // Those of zlib: `Z_DATA_ERROR`, `Z_BUF_ERROR`, `ZSTD_error_…`.
      if (/^Z(STD)?_/.test(code ?? ''))
        throw new Refusal(`its ${kind} data is damaged (${code})`, { cause: error })
      throw error
    }
  }
  return total
}
