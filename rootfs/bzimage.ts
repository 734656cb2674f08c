/** Gets the `vmlinux` out of a bzImage, as the boot protocol describes it (kernel: Documentation/arch/x86/boot.rst). */
import { gunzipSync, zstdDecompressSync } from 'node:zlib'

/** `setup_sects`, `payload_offset` and `payload_length` in the header. */
const header = { setupSectors: 0x1f1, magic: 0x202, payloadOffset: 0x248, payloadLength: 0x24c }
const sectorBytes = 512
/** No kernel is as long. */
const maxKernelBytes = 512 * 2 ** 20

/**
 * The uncompressed kernel, an ELF file.
 *
 * @throws Error where this is no bzImage, or one compressed in a way that is not known here
 */
export function vmlinuxOf(bzImage: Buffer): Buffer {
  if (bzImage.toString('latin1', header.magic, header.magic + 4) !== 'HdrS')
    throw new Error('this is no bzImage')
  const setup = ((bzImage[header.setupSectors] || 4) + 1) * sectorBytes
  const start = setup + bzImage.readUInt32LE(header.payloadOffset)
  const payload = bzImage.subarray(start, start + bzImage.readUInt32LE(header.payloadLength))
  // The build appends the length, except where the compressed format ends with it itself.
  const length = payload.readUInt32LE(payload.length - 4)
  if (length > maxKernelBytes) throw new Error(`the kernel claims ${length} bytes`)
  const kernel = decompress(payload, length)
  if (kernel.toString('latin1', 0, 4) !== '\x7fELF') throw new Error('the bzImage holds no ELF file')
  return kernel
}

function decompress(payload: Buffer, length: number): Buffer {
  const options = { maxOutputLength: maxKernelBytes }
  switch (payload.readUInt32LE(0)) {
    case 0x184c2102:
      return unpackLz4(payload.subarray(4, -4), length)
    case 0xfd2fb528:
      return zstdDecompressSync(payload.subarray(0, -4), options)
    default:
      if (payload.readUInt16LE(0) !== 0x8b1f) throw new Error('the kernel is compressed in an unknown way')
      return gunzipSync(payload, options)
  }
}

/** LZ4's legacy frame: blocks, each behind its length. */
function unpackLz4(packed: Buffer, length: number): Buffer {
  const output = Buffer.allocUnsafe(length)
  let written = 0
  for (let at = 0; at + 4 <= packed.length; ) {
    const size = packed.readUInt32LE(at)
    at += 4
    written = unpackBlock(packed.subarray(at, at + size), output, written)
    at += size
  }
  if (written !== length) throw new Error(`the kernel has ${written} bytes in place of ${length}`)
  return output
}

/**
 * Returns where the block’s content ends in `output`. References do not lead before the block.
 *
 * Both lengths are read in place: Node 26.10 compiles (by Maglev, while the loop runs) a helper that shares `at` with
 * it into code that now and then forgets a step.
 */
function unpackBlock(block: Buffer, output: Buffer, begin: number): number {
  let at = 0
  let to = begin
  while (at < block.length) {
    const token = block[at++]!
    let literals = token >> 4
    if (literals === 15) {
      while (block[at] === 255) {
        literals += 255
        at++
      }
      literals += block[at++]!
    }
    block.copy(output, to, at, at + literals)
    at += literals
    to += literals
    if (at >= block.length) break
    const back = block.readUInt16LE(at)
    at += 2
    let count = (token & 15) + 4
    if (count === 19) {
      while (block[at] === 255) {
        count += 255
        at++
      }
      count += block[at++]!
    }
    if (back === 0 || to - back < begin || to + count > output.length)
      throw new Error('the kernel is damaged')
    // It may overlap itself: the part that is there is repeated.
    if (back >= count) output.copyWithin(to, to - back, to - back + count)
    else for (let index = 0; index < count; index++) output[to + index] = output[to + index - back]!
    to += count
  }
  return to
}
