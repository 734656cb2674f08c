/** Blob and File: the bytes of one blob in one piece, shared by its slices. */
import { dictionary, idl, needArguments } from '../idl.ts'

const isBuffer = (value: unknown): value is ArrayBufferLike => {
  const tag = Object.prototype.toString.call(value)
  if (tag !== '[object ArrayBuffer]' && tag !== '[object SharedArrayBuffer]') return false
  try {
    new Uint8Array(value as ArrayBuffer)
    return true
  } catch {
    return false
  }
}

function typeOf(value: unknown): string {
  if (value === undefined) return ''
  const text = `${value}`
  return /[^\x20-\x7e]/.test(text) ? '' : text.toLowerCase()
}

let bytesOf: (blob: Blob) => Uint8Array<ArrayBuffer>
let isBlob: (value: object) => boolean
let make: (bytes: Uint8Array<ArrayBuffer>, type: string) => Blob

type Part = string | Uint8Array | ArrayBufferLike

/** Converts every part before any byte is read, as the interface demands. */
function convert(parts: unknown): Part[] {
  if (parts === undefined) return []
  if ((typeof parts !== 'object' && typeof parts !== 'function') || parts === null)
    throw new TypeError('Blob constructor: the parts are not a sequence')
  const method = (parts as Iterable<unknown>)[Symbol.iterator]
  if (typeof method !== 'function') throw new TypeError('Blob constructor: the parts are not iterable')
  const list: Part[] = []
  // The method is read once.
  for (const part of { [Symbol.iterator]: () => Reflect.apply(method, parts, []) as Iterator<unknown> }) {
    if (ArrayBuffer.isView(part)) list.push(new Uint8Array(part.buffer, part.byteOffset, part.byteLength))
    else if (isBuffer(part)) list.push(part)
    else if (typeof part === 'object' && part !== null && isBlob(part)) list.push(bytesOf(part as Blob))
    else list.push(`${part}`)
  }
  return list
}

function join(parts: Part[], native: boolean): Uint8Array<ArrayBuffer> {
  let size = 0
  const pieces = parts.map((part) => {
    const bytes =
      typeof part === 'string'
        ? new TextEncoder().encode(native ? part.replace(/\r\n?|\n/g, '\n') : part)
        : part instanceof Uint8Array
          ? part
          : new Uint8Array(part)
    size += bytes.length
    return bytes
  })
  const all = new Uint8Array(size)
  let at = 0
  for (const piece of pieces) {
    all.set(piece, at)
    at += piece.length
  }
  return all
}

/** As WebIDL converts to a long long with [Clamp]. */
function clamp(value: unknown, fallback: number): number {
  if (value === undefined) return fallback
  const number = Number(value)
  if (Number.isNaN(number)) return 0
  const within = Math.min(Math.max(number, -Number.MAX_SAFE_INTEGER), Number.MAX_SAFE_INTEGER)
  // To the nearest, halves to the even one.
  const floor = Math.floor(within)
  const rest = within - floor
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1
}

class Blob {
  #bytes: Uint8Array<ArrayBuffer>
  #type: string
  constructor(parts: unknown = undefined, options: unknown = undefined) {
    const list = convert(parts)
    const { endings, type } = blobOptions(options)
    this.#bytes = join(list, endings === 'native')
    this.#type = type
  }
  get size() {
    return this.#bytes.length
  }
  get type() {
    return this.#type
  }
  arrayBuffer() {
    return promised(this, (bytes) => bytes.slice().buffer)
  }
  bytes() {
    return promised(this, (bytes) => bytes.slice())
  }
  text() {
    return promised(this, (bytes) => new TextDecoder().decode(bytes))
  }
  slice(start: unknown = undefined, end: unknown = undefined, type: unknown = undefined): Blob {
    const size = this.#bytes.length
    const relative = (at: number) => (at < 0 ? Math.max(size + at, 0) : Math.min(at, size))
    const from = relative(clamp(start, 0))
    const to = relative(clamp(end, size))
    return make(this.#bytes.subarray(from, Math.max(from, to)), typeOf(type))
  }
  stream(): ReadableStream {
    const bytes = this.#bytes
    let at = 0
    return new ReadableStream({
      type: 'bytes',
      pull(controller) {
        if (at < bytes.length) {
          controller.enqueue(bytes.slice(at, at + 65536))
          at += 65536
        }
        if (at >= bytes.length) {
          controller.close()
          controller.byobRequest?.respond(0)
        }
      },
    })
  }
  static {
    bytesOf = (blob) => blob.#bytes
    isBlob = (value) => #bytes in value
    make = (bytes, type) => {
      const blob = new Blob()
      blob.#bytes = bytes
      blob.#type = type
      return blob
    }
  }
}
idl(Blob, 'Blob')

function blobOptions(options: unknown) {
  const given = dictionary(options, 'Blob constructor')
  const { endings } = given
  const kind = endings === undefined ? 'transparent' : `${endings}`
  if (kind !== 'transparent' && kind !== 'native')
    throw new TypeError(`Blob constructor: '${kind}' is not a valid value for endings`)
  return { endings: kind, type: typeOf(given.type) }
}

function promised<T>(blob: Blob, give: (bytes: Uint8Array<ArrayBuffer>) => T): Promise<T> {
  return new Promise((resolve) => {
    if (typeof blob !== 'object' || blob === null || !isBlob(blob)) throw new TypeError('Illegal invocation')
    resolve(give(bytesOf(blob)))
  })
}

let isFile: (value: object) => boolean
class File extends Blob {
  #name: string
  #lastModified: number
  constructor(parts: unknown, name: unknown, options: unknown = undefined) {
    needArguments(arguments.length, 2, 'File constructor')
    if (
      typeof (parts as Iterable<unknown> | null)?.[Symbol.iterator] !== 'function' ||
      typeof parts === 'string'
    )
      throw new TypeError('File constructor: the parts are not a sequence')
    const text = `${name}`.toWellFormed()
    super(parts, options)
    this.#name = text
    const { lastModified } = dictionary(options, 'File constructor')
    this.#lastModified = lastModified === undefined ? Date.now() : Math.trunc(Number(lastModified)) || 0
  }
  get name() {
    return this.#name
  }
  get lastModified() {
    return this.#lastModified
  }
  get webkitRelativePath() {
    return ''
  }
  static {
    isFile = (value) => #name in value
  }
}
idl(File, 'File')

/** For structuredClone, and for bodies: nothing is copied. */
export { bytesOf, make as makeBlob }
export const is = { Blob: isBlob, File: isFile }
export { Blob, File }
