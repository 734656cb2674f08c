/**
 * Reads a tar archive as it comes. Of its own making, because a layer is applied byte for byte or refused: names are
 * kept as bytes, whatever their encoding, and what is not understood is an error, never passed over. Formats: ustar,
 * pax, GNU and old tar, as Go’s archive/tar reads them, which nearly all layers are written and read with.
 */

export interface TarEntry {
  /** One character for each byte, as all names here. */
  path: string
  type: 'file' | 'directory' | 'symlink' | 'link' | 'device' | 'fifo'
  /** Of symlink and link. */
  target: string
  mode: number
  uid: number
  gid: number
  /** Seconds since 1970. */
  mtime: number
  /** Bytes that follow; 0 of all but files. */
  size: number
}

export interface TarHandler {
  entry(entry: TarEntry): void
  /** Of the file that `entry` told of last. */
  data(bytes: Uint8Array): void
  /** That file is whole. */
  end(): void
}

/** What was read is hostile or broken; the message goes to the user. */
export class Refusal extends Error {
  override name = 'Refusal'
}

const block = 512
/** Of the extended headers of one entry, bytes. */
const maxMeta = 1024 * 1024

const types: Record<string, TarEntry['type']> = {
  '\0': 'file',
  '0': 'file',
  '7': 'file',
  '1': 'link',
  '2': 'symlink',
  '3': 'device',
  '4': 'device',
  '5': 'directory',
  '6': 'fifo',
}

type Extended = Map<string, string>

export class TarReader {
  readonly #handler: TarHandler
  /** Of a header that came in pieces. */
  readonly #header = Buffer.alloc(block)
  #filled = 0
  #state: 'header' | 'body' | 'meta' | 'padding' | 'ended' = 'header'
  /** Of a body or its padding, still to come. */
  #left = 0
  #padding = 0
  #zeros = 0
  #meta: { type: string; pieces: Uint8Array[] } | undefined
  #extended: Extended = new Map()
  #metaBytes = 0

  constructor(handler: TarHandler) {
    this.#handler = handler
  }

  /** Throws `Refusal`, and what the handler throws. */
  write(chunk: Uint8Array): void {
    let at = 0
    while (at < chunk.length) {
      if (this.#state === 'ended') return
      if (this.#state === 'header') {
        const size = Math.min(block - this.#filled, chunk.length - at)
        this.#header.set(chunk.subarray(at, at + size), this.#filled)
        this.#filled += size
        at += size
        if (this.#filled === block) {
          this.#filled = 0
          this.#read(this.#header)
        }
        continue
      }
      const size = Math.min(this.#left, chunk.length - at)
      const piece = chunk.subarray(at, at + size)
      at += size
      this.#left -= size
      if (this.#state === 'body') this.#handler.data(piece)
      // A copy: the chunk belongs to whoever wrote it.
      else if (this.#state === 'meta') this.#meta!.pieces.push(Buffer.from(piece))
      if (this.#left === 0) this.#next()
    }
  }

  /** Nothing follows. Throws `Refusal` where that cuts an entry off. */
  end(): void {
    if (this.#state === 'ended') return
    if (this.#state !== 'header' || this.#filled > 0 || this.#meta || this.#extended.size > 0)
      throw new Refusal('the archive ends in the middle of an entry')
  }

  #body(state: 'body' | 'meta', size: number): void {
    this.#padding = (block - (size % block)) % block
    this.#state = state
    this.#left = size
    if (size === 0) this.#next()
  }

  /** A body or its padding is over. */
  #next(): void {
    if (this.#state === 'body') this.#handler.end()
    if (this.#state === 'meta') this.#extend()
    if (this.#state !== 'padding' && this.#padding > 0) {
      this.#state = 'padding'
      this.#left = this.#padding
      return
    }
    this.#state = 'header'
  }

  #read(header: Buffer): void {
    if (header.every((byte) => byte === 0)) {
      if (++this.#zeros === 2) this.#state = 'ended'
      return
    }
    if (this.#zeros > 0) throw new Refusal('the archive goes on behind its end')
    if (!isHeader(header)) throw new Refusal('it is not a tar archive, or a damaged one')
    const flag = header.toString('latin1', 156, 157)
    const size = number(header, 124, 12, 'size')
    switch (flag) {
      case 'x':
      case 'g':
      case 'L':
      case 'K':
        this.#metaBytes += size
        if (this.#metaBytes > maxMeta) throw new Refusal(`an entry has more than ${maxMeta} bytes of headers`)
        this.#meta = { type: flag, pieces: [] }
        this.#body('meta', size)
        return
    }
    const type = types[flag]
    if (type === undefined)
      throw new Refusal(
        flag === 'S' ? 'it has sparse files' : `it has an entry of type ${JSON.stringify(flag)}`,
      )
    this.#metaBytes = 0
    const extended = this.#extended
    this.#extended = new Map()
    for (const key of extended.keys())
      if (key.startsWith('GNU.sparse.')) throw new Refusal('it has sparse files')
    const own = ownNumbers(extended)
    const path = extended.get('path') ?? pathOf(header)
    if (path.includes('\0')) throw new Refusal('a name has a NUL in it')
    const entry: TarEntry = {
      path,
      // Before there was a type for directories, their names ended so.
      type: flag === '\0' && path.endsWith('/') ? 'directory' : type,
      target: extended.get('linkpath') ?? text(header, 157, 100),
      mode: number(header, 100, 8, 'mode') & 0o7777,
      uid: own.uid ?? number(header, 108, 8, 'uid'),
      gid: own.gid ?? number(header, 116, 8, 'gid'),
      mtime: own.mtime ?? number(header, 136, 12, 'mtime'),
      size: 0,
    }
    if (entry.target.includes('\0')) throw new Refusal('a link has a NUL in it')
    // Of other types a size is only told, and no bytes follow (archive/tar, isHeaderOnly).
    if (entry.type === 'file') entry.size = own.size ?? size
    this.#handler.entry(entry)
    if (entry.type === 'file') this.#body('body', entry.size)
  }

  #extend(): void {
    const { type, pieces } = this.#meta!
    this.#meta = undefined
    const value = Buffer.concat(pieces).toString('latin1')
    // Global headers hold comments, such as git’s commit; nobody in this field applies them.
    if (type === 'g') return
    if (type === 'L') this.#extended.set('path', value.split('\0')[0]!)
    else if (type === 'K') this.#extended.set('linkpath', value.split('\0')[0]!)
    else parsePax(value, this.#extended)
  }
}

/** pax(1), extended header: `<length> <key>=<value>\n`, the length in decimal and counting all of it. */
function parsePax(records: string, into: Extended): void {
  for (let at = 0; at < records.length; ) {
    const space = records.indexOf(' ', at)
    const digits = records.slice(at, space)
    const end = at + Number(digits)
    const equals = records.indexOf('=', space)
    if (space < 0 || !/^[0-9]{1,9}$/.test(digits) || records[end - 1] !== '\n' || equals < 0 || equals >= end)
      throw new Refusal('it has a broken extended header')
    into.set(records.slice(space + 1, equals), records.slice(equals + 1, end - 1))
    at = end
  }
}

function ownNumbers(extended: Extended) {
  const own: { uid?: number; gid?: number; size?: number; mtime?: number } = {}
  for (const key of ['uid', 'gid', 'size', 'mtime'] as const) {
    const value = extended.get(key)
    if (value === undefined || value === '') continue
    if (!(key === 'mtime' ? /^-?[0-9]{1,15}(\.[0-9]*)?$/ : /^[0-9]{1,15}$/).test(value))
      throw new Refusal(`it has a ${key} that is not a number`)
    own[key] = Number(value)
  }
  return own
}

function isHeader(header: Buffer): boolean {
  const told = octal(text(header, 148, 8))
  let unsigned = 8 * 0x20
  let signed = unsigned
  for (let i = 0; i < block; i++) {
    if (i >= 148 && i < 156) continue
    unsigned += header[i]!
    // Some old implementations have summed signed bytes.
    signed += header.readInt8(i)
  }
  return told === unsigned || told === signed
}

function pathOf(header: Buffer): string {
  const name = text(header, 0, 100)
  // POSIX alone has a prefix; GNU has other things there, and star has a shorter one.
  if (header.toString('latin1', 257, 263) !== 'ustar\0') return name
  const prefix = text(header, 345, header.toString('latin1', 508, 512) === 'tar\0' ? 131 : 155)
  return prefix ? `${prefix}/${name}` : name
}

/** Up to the first NUL. */
function text(header: Buffer, at: number, length: number): string {
  const value = header.toString('latin1', at, at + length)
  const nul = value.indexOf('\0')
  return nul < 0 ? value : value.slice(0, nul)
}

function octal(digits: string): number | undefined {
  const trimmed = digits.trim()
  if (trimmed === '') return 0
  return /^[0-7]+$/.test(trimmed) ? Number.parseInt(trimmed, 8) : undefined
}

/** In octal, or in base 256 where the first bit is set, as GNU and star write what is too large for octal. */
function number(header: Buffer, at: number, length: number, what: string): number {
  let value: number | undefined
  if (header[at]! & 0x80) {
    const bytes = header.subarray(at, at + length)
    const negative = (bytes[0]! & 0x40) !== 0
    let big = BigInt(bytes[0]! & 0x3f) - (negative ? 0x40n : 0n)
    for (const byte of bytes.subarray(1)) big = big * 256n + BigInt(byte)
    value = Number(big)
  } else value = octal(text(header, at, length))
  if (value === undefined || !Number.isSafeInteger(value) || (value < 0 && what !== 'mtime'))
    throw new Refusal(`it has a ${what} that is not a number`)
  return value
}
