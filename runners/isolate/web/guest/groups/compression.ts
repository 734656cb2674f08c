/** CompressionStream and DecompressionStream, by fflate. */
import { Deflate, Gunzip, Gzip, Inflate, Unzlib, Zlib } from 'fflate'
import { idl, needArguments } from '../idl.ts'

type Coder = { ondata: unknown; push(chunk: Uint8Array, final?: boolean): void }
const encoders: Record<string, () => Coder> = {
  deflate: () => new Zlib(),
  'deflate-raw': () => new Deflate(),
  gzip: () => new Gzip(),
}
const decoders: Record<string, () => Coder> = {
  deflate: () => new Unzlib(),
  'deflate-raw': () => new Inflate(),
  gzip: () => new Gunzip(),
}

const toBytes = (chunk: unknown): Uint8Array => {
  if (ArrayBuffer.isView(chunk)) {
    if (Object.prototype.toString.call(chunk.buffer) === '[object SharedArrayBuffer]')
      throw new TypeError('The chunk is shared memory')
    return new Uint8Array(chunk.buffer, chunk.byteOffset, chunk.byteLength)
  }
  if (Object.prototype.toString.call(chunk) === '[object ArrayBuffer]')
    return new Uint8Array(chunk as ArrayBuffer)
  throw new TypeError('The chunk is not a BufferSource')
}

function transform(format: unknown, given: number, coders: Record<string, () => Coder>, decode: boolean) {
  needArguments(given, 1, decode ? 'DecompressionStream constructor' : 'CompressionStream constructor')
  const name = `${format}`
  if (!Object.hasOwn(coders, name)) throw new TypeError(`Unsupported compression format: '${name}'`)
  const coder = coders[name]!()
  let ended = false
  let controller: TransformStreamDefaultController
  coder.ondata = (chunk: Uint8Array, final: boolean) => {
    if (chunk.length > 0) controller.enqueue(chunk.slice())
    if (final) ended = true
  }
  const push = (bytes: Uint8Array, final: boolean) => {
    try {
      coder.push(bytes, final)
    } catch (error) {
      throw new TypeError(`The data are not valid ${name}: ${(error as Error).message}`)
    }
  }
  return new TransformStream({
    start(given) {
      controller = given
    },
    transform(chunk) {
      const bytes = toBytes(chunk)
      if (bytes.length === 0) return
      if (decode && ended) throw new TypeError('There are data after the end')
      push(bytes.slice(), false)
    },
    flush() {
      push(new Uint8Array(), true)
      if (decode && !ended) throw new TypeError('The data end too early')
    },
  })
}

class CompressionStream {
  #stream: TransformStream
  constructor(format: unknown) {
    this.#stream = transform(format, arguments.length, encoders, false)
  }
  get readable() {
    return this.#stream.readable
  }
  get writable() {
    return this.#stream.writable
  }
}
idl(CompressionStream, 'CompressionStream')

class DecompressionStream {
  #stream: TransformStream
  constructor(format: unknown) {
    this.#stream = transform(format, arguments.length, decoders, true)
  }
  get readable() {
    return this.#stream.readable
  }
  get writable() {
    return this.#stream.writable
  }
}
idl(DecompressionStream, 'DecompressionStream')

export { CompressionStream, DecompressionStream }
