/** TextEncoder and TextDecoder, by @exodus/bytes; the tables of the multi-byte encodings stand in a group of their own. */
import {
  setMultibyte,
  TextDecoder,
  TextDecoderStream,
  TextEncoder,
  TextEncoderStream,
} from '@exodus/bytes/fallback/encoding.js'
import { idl } from '../idl.ts'

setMultibyte(
  (encoding: string, loose: boolean) => group('multibyte').createMultibyteDecoder(encoding, loose),
  (...args: unknown[]) => group('multibyte').multibyteEncoder(...args),
)
/** From here on (characters, bytes) the way to the host is shorter than the work. */
const long = 4096

/** Decoders that hold the beginning of a character. */
const streaming = new WeakSet<object>()
const { encode } = TextEncoder.prototype
const { decode } = TextDecoder.prototype
Object.assign(TextEncoder.prototype, {
  encode(this: TextEncoder, ...args: [text?: string]) {
    const [text] = args
    if (typeof text !== 'string' || text.length < long) return Reflect.apply(encode, this, args)
    return new Uint8Array(host.encode(text))
  },
})
Object.assign(TextDecoder.prototype, {
  decode(
    this: TextDecoder,
    ...args: [input?: ArrayBuffer | ArrayBufferView, options?: { stream?: boolean }]
  ) {
    const [input, options] = args
    if (options !== undefined || streaming.has(this)) {
      if (options?.stream) streaming.add(this)
      else streaming.delete(this)
      return Reflect.apply(decode, this, args)
    }
    if (!isLong(input) || this.encoding !== 'utf-8' || this.fatal) return Reflect.apply(decode, this, args)
    const view = ArrayBuffer.isView(input) ? input : new Uint8Array(input)
    const bytes = new Uint8Array(view.buffer as ArrayBuffer, view.byteOffset, view.byteLength)
    // A view is copied with the whole of its buffer.
    const text = host.decode(bytes.length < bytes.buffer.byteLength ? bytes.slice() : bytes)
    return !this.ignoreBOM && text.charCodeAt(0) === 0xfeff ? text.slice(1) : text
  },
})
function isLong(input: unknown): input is ArrayBuffer | ArrayBufferView {
  if (ArrayBuffer.isView(input)) return input.byteLength >= long && input.buffer instanceof ArrayBuffer
  return input instanceof ArrayBuffer && input.byteLength >= long
}

for (const [name, made] of Object.entries({
  TextDecoder,
  TextDecoderStream,
  TextEncoder,
  TextEncoderStream,
})) {
  Reflect.deleteProperty((made as any).prototype, Symbol.toStringTag)
  idl(made as never, name)
}

export { TextDecoder, TextDecoderStream, TextEncoder, TextEncoderStream }
