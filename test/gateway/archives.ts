/** Archives for tests, well-formed and otherwise, written by hand so that they may say anything. */
import { crc32, deflateRawSync, gzipSync } from 'node:zlib'
import { Header } from 'tar'

export interface TarEntry {
  path: string
  text?: string | Uint8Array
  type?: 'File' | 'SymbolicLink' | 'Link' | 'Directory' | 'CharacterDevice' | 'FIFO'
  linkpath?: string
}

export function tarOf(entries: TarEntry[]): Buffer {
  const parts: Uint8Array[] = []
  for (const { path, text = '', type = 'File', linkpath } of entries) {
    const bytes = type === 'File' ? Buffer.from(text) : Buffer.alloc(0)
    const head = Buffer.alloc(512)
    new Header({
      path,
      type,
      size: bytes.byteLength,
      mode: 0o755,
      uid: 1,
      gid: 1,
      mtime: new Date(),
      ...(linkpath === undefined ? {} : { linkpath }),
    }).encode(head, 0)
    parts.push(head, bytes, Buffer.alloc((512 - (bytes.byteLength % 512)) % 512))
  }
  return Buffer.concat([...parts, Buffer.alloc(1024)])
}

export const tgzOf = (files: Record<string, string | Uint8Array>): Buffer =>
  gzipSync(tarOf(Object.entries(files).map(([path, text]) => ({ path, text }))))

export interface ZipEntry {
  path: string
  text?: string | Uint8Array
  /** Unix mode with its type bits. */
  mode?: number
  /** What the headers say instead of the real size. */
  claims?: number
}

export function zipOf(entries: ZipEntry[]): Buffer {
  const local: Buffer[] = []
  const central: Buffer[] = []
  let offset = 0
  for (const { path, text = '', mode = 0o100644, claims } of entries) {
    const bytes = Buffer.from(text)
    const packed = deflateRawSync(bytes)
    const name = Buffer.from(path)
    const common = Buffer.alloc(26)
    common.writeUInt16LE(20, 0)
    common.writeUInt16LE(0x800, 2)
    common.writeUInt16LE(8, 4)
    common.writeUInt32LE(crc32(bytes), 10)
    common.writeUInt32LE(packed.byteLength, 14)
    common.writeUInt32LE(claims ?? bytes.byteLength, 18)
    common.writeUInt16LE(name.byteLength, 22)
    const here = Buffer.concat([Buffer.from('PK\x03\x04', 'latin1'), common, name, packed])
    const more = Buffer.alloc(14)
    more.writeUInt32LE((mode << 16) >>> 0, 6)
    more.writeUInt32LE(offset, 10)
    central.push(Buffer.concat([Buffer.from('PK\x01\x02\x14\x03', 'latin1'), common, more, name]))
    local.push(here)
    offset += here.byteLength
  }
  const directory = Buffer.concat(central)
  const end = Buffer.alloc(18)
  end.writeUInt16LE(entries.length, 4)
  end.writeUInt16LE(entries.length, 6)
  end.writeUInt32LE(directory.byteLength, 8)
  end.writeUInt32LE(offset, 12)
  return Buffer.concat([...local, directory, Buffer.from('PK\x05\x06', 'latin1'), end])
}
