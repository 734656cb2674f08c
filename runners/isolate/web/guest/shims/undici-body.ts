/**
 * Bodies of requests and responses, in place of undici’s own: a body made from text or bytes, or one that the host
 * gives piece by piece, becomes a ReadableStream only when its stream is asked for.
 */
import { serializeAMimeType } from 'undici/lib/web/fetch/data-url.js'
import {
  FormData as FormDataClass,
  getFormDataBoundary,
  setFormDataState,
} from 'undici/lib/web/fetch/formdata.js'
import { extractMimeType } from 'undici/lib/web/fetch/util.js'
import { webidl } from 'undici/lib/web/webidl/index.js'
import type { Puller } from '../../bridge.ts'

type Bytes = Uint8Array<ArrayBuffer>
const noop = () => {}

/** Where the bytes are while there is no stream. */
type Source =
  | { kind: 'text'; text: string }
  | { kind: 'bytes'; bytes: Bytes }
  | { kind: 'pull'; pull: Puller; cancel(reason: unknown): void }

export class Body {
  /** As undici’s classes ask for it: null where the body cannot be read a second time. */
  source: unknown
  length: number | null
  #held: Source | null
  #stream: ReadableStream | null
  #failed: ((error: unknown) => void) | undefined
  /** Read without ever having been a stream. */
  #used = false

  constructor(held: Source | null, stream: ReadableStream | null, source: unknown, length: number | null) {
    this.#held = held
    this.#stream = stream
    this.source = source
    this.length = length
  }

  get stream(): ReadableStream {
    this.#stream ??= this.#toStream()
    return this.#stream
  }

  get disturbed(): boolean {
    return this.#stream === null ? this.#used : group('streams').isDisturbed(this.#stream)
  }

  get unusable(): boolean {
    return this.#stream === null
      ? this.#used
      : this.#stream.locked || group('streams').isDisturbed(this.#stream)
  }

  /** What can be sent at once; undefined where it must be read. Counts as reading. */
  whole(): string | Bytes | undefined {
    if (this.#stream !== null || this.#held === null || this.#held.kind === 'pull') return undefined
    this.#used = true
    return this.#held.kind === 'text' ? this.#held.text : this.#held.bytes
  }

  /** Reads all of what is not whole, on behalf of whoever called text(), json() and so on. */
  async consume(): Promise<string | Bytes> {
    const read = this.reader().read
    const chunks: Bytes[] = []
    let size = 0
    for (;;) {
      const chunk = (await read()) as Bytes | null
      if (chunk === null) break
      chunks.push(chunk)
      size += chunk.length
    }
    if (chunks.length === 1) return chunks[0]!
    const all = new Uint8Array(size)
    let at = 0
    for (const chunk of chunks) {
      all.set(chunk, at)
      at += chunk.length
    }
    return all
  }

  /** It broke off while nobody was reading. */
  fail(error: unknown): void {
    this.#failed?.(error)
  }

  /** Reads it piece by piece; what comes out of a stream must be bytes. */
  reader(): { read: Puller; cancel(reason?: unknown): Promise<void> } {
    const held = this.#held
    if (this.#stream === null && held !== null && held.kind === 'pull') {
      this.#used = true
      return { read: held.pull, cancel: async (reason) => held.cancel(reason) }
    }
    const reader = this.stream.getReader()
    return {
      read: async () => {
        const { done, value } = await reader.read()
        if (done) return null
        if (!(value instanceof Uint8Array)) {
          const error = new TypeError('Received non-Uint8Array chunk')
          reader.cancel(error).catch(noop)
          throw error
        }
        return value
      },
      cancel: (reason) => reader.cancel(reason),
    }
  }

  /** The same body for a second reader. */
  clone(): Body {
    if (this.#stream === null && this.#held !== null && this.#held.kind !== 'pull')
      return new Body(this.#held, null, this.source, this.length)
    const [mine, other] = group('streams').teeBytes(this.stream)
    this.#stream = mine
    return new Body(null, other, this.source, this.length)
  }

  /** Moves it to another owner; this one counts as read from then on. */
  take(): Body {
    if (this.#stream === null) {
      const taken = new Body(this.#held, null, this.source, this.length)
      this.#used = true
      return taken
    }
    const through = new TransformStream()
    this.#stream.pipeThrough(through)
    return new Body(null, through.readable, this.source, this.length)
  }

  #toStream(): ReadableStream {
    const held = this.#held
    if (this.#used || held === null) {
      const stream = new ReadableStream({ type: 'bytes', start: (controller) => controller.close() })
      if (this.#used) {
        // Whoever reads a body keeps its stream locked.
        stream.cancel().catch(noop)
        stream.getReader()
      }
      return stream
    }
    if (held.kind === 'pull') {
      return new ReadableStream({
        type: 'bytes',
        start: (controller) => {
          this.#failed = (error) => controller.error(error)
        },
        async pull(controller) {
          const chunk = (await held.pull()) as Bytes | null
          if (chunk === null) {
            controller.close()
            controller.byobRequest?.respond(0)
          } else if (chunk.length > 0) controller.enqueue(chunk)
          else return this.pull!(controller)
        },
        cancel: (reason) => held.cancel(reason),
      })
    }
    return new ReadableStream({
      type: 'bytes',
      pull(controller) {
        const bytes = held.kind === 'text' ? new TextEncoder().encode(held.text) : held.bytes.slice()
        if (bytes.length > 0) controller.enqueue(bytes)
        controller.close()
        controller.byobRequest?.respond(0)
      },
    })
  }
}

export const textBody = (text: string) => new Body({ kind: 'text', text }, null, text, null)
export const bytesBody = (bytes: Bytes, source: unknown = bytes) =>
  new Body({ kind: 'bytes', bytes }, null, source, bytes.length)
export const pulledBody = (pull: Puller, cancel: (reason: unknown) => void) =>
  new Body({ kind: 'pull', pull, cancel }, null, null, null)

/** Line ends and quotes as multipart/form-data wants them. */
const escapeName = (text: string) => text.replace(/\n/g, '%0A').replace(/\r/g, '%0D').replace(/"/g, '%22')
const lineEnds = (text: string) => text.replace(/\r\n|\r|\n/g, '\r\n')

function multipart(form: FormData, boundary: string): Blob {
  const parts: (string | Blob)[] = []
  for (const [name, value] of form) {
    const head = `--${boundary}\r\nContent-Disposition: form-data; name="${escapeName(lineEnds(name))}"`
    if (typeof value === 'string') parts.push(`${head}\r\n\r\n${lineEnds(value)}\r\n`)
    else {
      const type = value.type || 'application/octet-stream'
      parts.push(
        `${head}; filename="${escapeName(value.name)}"\r\nContent-Type: ${type}\r\n\r\n`,
        value,
        '\r\n',
      )
    }
  }
  parts.push(`--${boundary}--\r\n`)
  return new Blob(parts)
}

/** https://fetch.spec.whatwg.org/#concept-bodyinit-extract */
export function extractBody(object: any, keepalive = false): [Body, string | null] {
  if (typeof object === 'string') return [textBody(object.toWellFormed()), 'text/plain;charset=UTF-8']
  if (webidl.is.ReadableStream(object)) {
    if (keepalive) throw new TypeError('keepalive')
    if (object.locked || group('streams').isDisturbed(object))
      throw new TypeError('Response body object should not be disturbed or locked')
    return [new Body(null, object, null, null), null]
  }
  if (webidl.is.Blob(object)) return [bytesBody(group('blob').bytesOf(object), object), object.type || null]
  if (webidl.is.BufferSource(object))
    return [bytesBody(webidl.util.getCopyOfBytesHeldByBufferSource(object)), null]
  if (webidl.is.FormData(object)) {
    const boundary = getFormDataBoundary(object)
    const blob = multipart(object, boundary)
    return [bytesBody(group('blob').bytesOf(blob), object), `multipart/form-data; boundary=${boundary}`]
  }
  if (webidl.is.URLSearchParams(object))
    return [textBody(object.toString()), 'application/x-www-form-urlencoded;charset=UTF-8']
  if (typeof object[Symbol.asyncIterator] === 'function') {
    if (keepalive) throw new TypeError('keepalive')
    return [new Body(null, (ReadableStream as any).from(object), null, null), null]
  }
  return [textBody(`${object}`.toWellFormed()), 'text/plain;charset=UTF-8']
}
export const safelyExtractBody = extractBody

export const cloneBody = (body: Body) => body.clone()
export const bodyUnusable = (state: { body?: Body | null }) => state.body?.unusable === true
export const streamRegistry = { register: noop }

const toText = (data: string | Bytes): string =>
  typeof data === 'string'
    ? data.charCodeAt(0) === 0xfeff
      ? data.slice(1)
      : data
    : new TextDecoder().decode(data)
/** A copy, for the caller to keep. */
const toBytes = (data: string | Bytes): Bytes =>
  typeof data === 'string' ? new TextEncoder().encode(data) : data.slice()

function toForm(data: string | Bytes, mimeType: { essence: string } | null): FormData {
  if (mimeType?.essence === 'multipart/form-data') {
    // Loads the parser, and Buffer, which it is written for.
    const { multipartFormDataParser } = require('undici/lib/web/fetch/formdata-parser.js')
    const form = new FormDataClass()
    setFormDataState(form, multipartFormDataParser(host.web.Buffer.from(toBytes(data).buffer), mimeType))
    return form
  }
  if (mimeType?.essence === 'application/x-www-form-urlencoded') {
    const form = new FormDataClass()
    const text = typeof data === 'string' ? data : new TextDecoder('utf-8', { ignoreBOM: true }).decode(data)
    for (const [name, value] of new URLSearchParams(text.startsWith('?') ? `&${text}` : text))
      form.append(name, value)
    return form
  }
  throw new TypeError(
    'Content-Type was not one of "multipart/form-data" or "application/x-www-form-urlencoded".',
  )
}

type State = { body?: Body | null; headersList: unknown }
const mimeTypeOf = (state: State) => {
  const type = extractMimeType(state.headersList)
  return type === 'failure' ? null : type
}

/** Adds the methods of the Body mixin to a class. */
export function mixinBody(
  target: { prototype: object },
  stateOf: (object: object) => State,
  isOne: (object: unknown) => boolean,
): void {
  const consume = async <T>(
    object: object,
    convert: (data: string | Bytes, state: State) => T,
  ): Promise<T> => {
    webidl.brandCheck(object, isOne)
    const state = stateOf(object)
    if (bodyUnusable(state)) throw new TypeError('Body is unusable: Body has already been read')
    const whole = state.body ? state.body.whole() : ''
    return convert(whole === undefined ? await state.body!.consume() : whole, state)
  }
  const methods = {
    arrayBuffer() {
      return consume(this, (data) => toBytes(data).buffer)
    },
    blob() {
      return consume(this, (data, state) => {
        const type = mimeTypeOf(state)
        return group('blob').makeBlob(toBytes(data), type === null ? '' : serializeAMimeType(type))
      })
    },
    bytes() {
      return consume(this, toBytes)
    },
    formData() {
      return consume(this, (data, state) => toForm(data, mimeTypeOf(state)))
    },
    json() {
      return consume(this, (data) => JSON.parse(toText(data)))
    },
    text() {
      return consume(this, toText)
    },
  }
  Object.assign(target.prototype, methods)
}
