/**
 * Spans as the bytes of an OTLP `ExportTraceServiceRequest`, by the field numbers of opentelemetry-proto 1.x
 * (`collector/trace/v1`, `trace/v1`, `common/v1`, `resource/v1`).
 *
 * The SDK’s own serializer reads every text three times and encodes the same names again for every span, which takes
 * more time than all else of a trace together; a test holds the two to the same result.
 */

/** Seconds and nanoseconds since the epoch. */
export type HrTime = readonly [seconds: number, nanoseconds: number]

export interface SpanContext {
  /** 32 hex digits. */
  traceId: string
  /** 16 hex digits. */
  spanId: string
  /** Bit 0: sampled. */
  traceFlags: number
  /** Whether it is another process’s; undefined: nobody knows. */
  isRemote?: boolean | undefined
}

/** What of the SDK’s `ReadableSpan` is sent. */
export interface EndedSpan {
  name: string
  /** 0 internal, 1 server, 2 client, 3 producer, 4 consumer. */
  kind: number
  spanContext(): SpanContext
  parentSpanContext?: SpanContext | undefined
  startTime: HrTime
  endTime: HrTime
  attributes: object
  events: readonly { name: string; time: HrTime; attributes?: object | undefined }[]
  links: readonly { context: SpanContext; attributes?: object | undefined }[]
  /** 0 unset, 1 ok, 2 error. */
  status: { code: number; message?: string | undefined }
  droppedAttributesCount: number
  droppedEventsCount: number
  droppedLinksCount: number
  resource: { attributes: object }
  instrumentationScope: { name: string }
}

/** Field number and wire type in one byte; wire types are 0 varint, 1 eight bytes, 2 with a length, 5 four bytes. */
const tag = (field: number, wire: 0 | 1 | 2 | 5): number => (field << 3) | wire

/** Names of attributes that are kept encoded, at most: those of user code may be any. */
const mostNames = 1_000
/** Texts (up to so many characters) that are kept with their name: one with more than `mostPairs` is that of an id. */
const mostPairs = 16
const longestKept = 128
/** Texts shorter than this (characters) are written here, longer ones by Node. */
const shortText = 48
/** What all that is written at once takes at most, besides texts (bytes). */
const room = 64

const digits = new Uint8Array(128)
for (let value = 0; value < 16; value++) digits[value.toString(16).charCodeAt(0)] = value

interface EncodedName {
  /** `KeyValue.key` with its tag and length. */
  key: Uint8Array
  /** Whole `KeyValue`s with their length, by their text; undefined: it has too many. */
  pairs: Map<string, Uint8Array> | undefined
}

const encodedNames = new Map<string, EncodedName>()

function encodedName(name: string): EncodedName {
  let found = encodedNames.get(name)
  if (found === undefined) {
    const text = Buffer.from(name)
    const head = [tag(1, 2)]
    for (let left = text.length; ; left >>>= 7) {
      head.push(left > 127 ? (left & 127) | 128 : left)
      if (left <= 127) break
    }
    found = { key: Buffer.concat([Buffer.from(head), text]), pairs: new Map() }
    if (encodedNames.size < mostNames) encodedNames.set(name, found)
  }
  return found
}

const varintLength = (value: number): number => {
  let length = 1
  for (let left = value; left > 127; left = Math.floor(left / 128)) length++
  return length
}

class Writer {
  #bytes = Buffer.allocUnsafe(256 * 1024)
  #view = new DataView(this.#bytes.buffer, this.#bytes.byteOffset, this.#bytes.byteLength)
  #at = 0

  /** What was written since the last time, as a copy. */
  take(): Uint8Array {
    const taken = new Uint8Array(this.#bytes.subarray(0, this.#at))
    this.#at = 0
    return taken
  }

  #reserve(count: number): void {
    if (this.#at + count <= this.#bytes.length) return
    const larger = Buffer.allocUnsafe(Math.max(this.#bytes.length * 2, this.#at + count))
    this.#bytes.copy(larger, 0, 0, this.#at)
    this.#bytes = larger
    this.#view = new DataView(larger.buffer, larger.byteOffset, larger.byteLength)
  }

  #varint(value: number): void {
    let left = value
    for (; left > 127; left = Math.floor(left / 128)) this.#bytes[this.#at++] = (left & 127) | 128
    this.#bytes[this.#at++] = left
  }

  /** A message of which only its end tells the length. `reserved`: bytes that its length will most likely take. */
  open(field: number, reserved: number): number {
    this.#reserve(room)
    this.#tag(tag(field, 2))
    const from = this.#at
    this.#at += reserved
    return from
  }

  close(from: number, reserved: number): void {
    const length = this.#at - from - reserved
    const needed = varintLength(length)
    if (needed !== reserved) {
      this.#reserve(room)
      this.#bytes.copyWithin(from + needed, from + reserved, this.#at)
    }
    this.#at = from
    this.#varint(length)
    this.#at += length
  }

  #tag(value: number): void {
    if (value > 127) this.#bytes[this.#at++] = (value & 127) | 128
    this.#bytes[this.#at++] = value > 127 ? value >>> 7 : value
  }

  number(field: number, value: number): void {
    this.#reserve(room)
    this.#tag(tag(field, 0))
    this.#varint(value)
  }

  flags(field: number, value: number): void {
    this.#reserve(room)
    this.#tag(tag(field, 5))
    this.#view.setUint32(this.#at, value, true)
    this.#at += 4
  }

  /** Hex digits as bytes. */
  id(field: number, text: string): void {
    this.#reserve(room)
    this.#tag(tag(field, 2))
    this.#bytes[this.#at++] = text.length >>> 1
    for (let i = 0; i < text.length; i += 2)
      this.#bytes[this.#at++] = (digits[text.charCodeAt(i)]! << 4) | digits[text.charCodeAt(i + 1)]!
  }

  /** Nanoseconds in 64 bits: more than a double holds, so in two halves, each within 53 bits. */
  time(field: number, [seconds, nanoseconds]: HrTime): void {
    this.#reserve(room)
    this.#tag(tag(field, 1))
    const upper = Math.floor(seconds / 65_536) * 1e9
    const lower = (upper % 65_536) * 65_536 + (seconds % 65_536) * 1e9 + nanoseconds
    this.#view.setUint32(this.#at, lower % 2 ** 32, true)
    this.#view.setUint32(this.#at + 4, Math.floor(upper / 65_536) + Math.floor(lower / 2 ** 32), true)
    this.#at += 8
  }

  text(field: number, text: string): void {
    const length = textLength(text)
    this.#reserve(length + room)
    this.#tag(tag(field, 2))
    this.#varint(length)
    this.#text(text, length)
  }

  #text(text: string, length: number): void {
    if (length === text.length && length < shortText)
      for (let i = 0; i < length; i++) this.#bytes[this.#at++] = text.charCodeAt(i)
    else this.#at += this.#bytes.write(text, this.#at, length, 'utf8')
  }

  attributes(field: number, attributes: object): void {
    for (const [name, value] of Object.entries(attributes))
      if (value != null) this.#attribute(field, name, value)
  }

  /** `KeyValue` */
  #attribute(field: number, name: string, value: unknown): void {
    const encoded = encodedName(name)
    const { key, pairs } = encoded
    const pair = pairs !== undefined && typeof value === 'string' ? pairs.get(value) : undefined
    if (pair !== undefined) {
      this.#reserve(pair.length + room)
      this.#tag(tag(field, 2))
      this.#bytes.set(pair, this.#at)
      this.#at += pair.length
      return
    }
    const length = valueLength(value)
    this.#reserve(length + key.length + room)
    this.#tag(tag(field, 2))
    const from = this.#at
    this.#varint(key.length + 1 + varintLength(length) + length)
    this.#bytes.set(key, this.#at)
    this.#at += key.length
    this.#bytes[this.#at++] = tag(2, 2)
    this.#varint(length)
    this.#value(value)
    if (pairs === undefined || typeof value !== 'string' || value.length > longestKept) return
    if (pairs.size < mostPairs) pairs.set(value, new Uint8Array(this.#bytes.subarray(from, this.#at)))
    else encoded.pairs = undefined
  }

  /** `AnyValue`; there is room for all of it. */
  #value(value: unknown): void {
    if (typeof value === 'string') {
      const length = textLength(value)
      this.#bytes[this.#at++] = tag(1, 2)
      this.#varint(length)
      this.#text(value, length)
    } else if (typeof value === 'boolean') {
      this.#bytes[this.#at++] = tag(2, 0)
      this.#bytes[this.#at++] = value ? 1 : 0
    } else if (typeof value === 'number') {
      if (isCount(value)) {
        this.#bytes[this.#at++] = tag(3, 0)
        this.#varint(value)
      } else if (Number.isSafeInteger(value)) {
        this.#bytes[this.#at++] = tag(3, 0)
        // Two’s complement in 64 bits, which takes ten bytes.
        for (let left = BigInt.asUintN(64, BigInt(value)); ; left >>= 7n) {
          if (left < 128n) {
            this.#bytes[this.#at++] = Number(left)
            break
          }
          this.#bytes[this.#at++] = Number(left & 127n) | 128
        }
      } else {
        this.#bytes[this.#at++] = tag(4, 1)
        this.#view.setFloat64(this.#at, value, true)
        this.#at += 8
      }
    } else if (Array.isArray(value)) {
      this.#bytes[this.#at++] = tag(5, 2)
      this.#varint(arrayLength(value))
      for (const item of value) {
        this.#bytes[this.#at++] = tag(1, 2)
        this.#varint(valueLength(item))
        this.#value(item)
      }
    }
  }
}

const isCount = (value: number): boolean => Number.isSafeInteger(value) && value >= 0 && !Object.is(value, -0)

/** Bytes of UTF-8. */
function textLength(text: string): number {
  if (text.length >= shortText) return Buffer.byteLength(text)
  for (let i = 0; i < text.length; i++) if (text.charCodeAt(i) > 127) return Buffer.byteLength(text)
  return text.length
}

/** Bytes of an `AnyValue`; 0 for what has none. */
function valueLength(value: unknown): number {
  if (typeof value === 'string') {
    const length = textLength(value)
    return 1 + varintLength(length) + length
  }
  if (typeof value === 'boolean') return 2
  if (typeof value === 'number') {
    if (isCount(value)) return 1 + varintLength(value)
    return Number.isSafeInteger(value) ? (Object.is(value, -0) ? 2 : 11) : 9
  }
  if (!Array.isArray(value)) return 0
  const length = arrayLength(value)
  return 1 + varintLength(length) + length
}

/** Bytes of an `ArrayValue`. */
const arrayLength = (values: unknown[]): number =>
  values.reduce<number>((sum, item) => {
    const length = valueLength(item)
    return sum + 1 + varintLength(length) + length
  }, 0)

/** Bit 8: it is known whether the parent, or what is linked, is remote; bit 9: it is. */
const flagsOf = (flags: number, isRemote: boolean | undefined): number =>
  (flags & 255) | (isRemote === undefined ? 0 : 0x100) | (isRemote === true ? 0x200 : 0)

const writer = new Writer()

/** @param spans of one process, all under one scope */
export function encodeSpans(spans: readonly EndedSpan[]): Uint8Array {
  const [first] = spans
  if (first === undefined) return new Uint8Array()
  const resourceSpans = writer.open(1, 3)
  const resource = writer.open(1, 2)
  writer.attributes(1, first.resource.attributes)
  writer.close(resource, 2)
  const scopeSpans = writer.open(2, 3)
  const scope = writer.open(1, 1)
  writer.text(1, first.instrumentationScope.name)
  writer.close(scope, 1)
  for (const span of spans) writeSpan(span)
  writer.close(scopeSpans, 3)
  writer.close(resourceSpans, 3)
  return writer.take()
}

function writeSpan(span: EndedSpan): void {
  const {
    name,
    kind,
    startTime,
    endTime,
    attributes,
    events,
    links,
    status,
    parentSpanContext: parent,
  } = span
  const { traceId, spanId, traceFlags } = span.spanContext()
  const from = writer.open(2, 2)
  writer.id(1, traceId)
  writer.id(2, spanId)
  if (parent !== undefined) writer.id(4, parent.spanId)
  writer.text(5, name)
  // The protocol counts from 1.
  writer.number(6, kind + 1)
  writer.time(7, startTime)
  writer.time(8, endTime)
  writer.attributes(9, attributes)
  if (span.droppedAttributesCount > 0) writer.number(10, span.droppedAttributesCount)
  for (const event of events) {
    const inner = writer.open(11, 1)
    writer.time(1, event.time)
    writer.text(2, event.name)
    if (event.attributes !== undefined) writer.attributes(3, event.attributes)
    writer.close(inner, 1)
  }
  if (span.droppedEventsCount > 0) writer.number(12, span.droppedEventsCount)
  for (const { context, attributes: told } of links) {
    const inner = writer.open(13, 1)
    writer.id(1, context.traceId)
    writer.id(2, context.spanId)
    if (told !== undefined) writer.attributes(4, told)
    writer.flags(6, flagsOf(context.traceFlags, context.isRemote))
    writer.close(inner, 1)
  }
  if (span.droppedLinksCount > 0) writer.number(14, span.droppedLinksCount)
  if (status.code !== 0) {
    const inner = writer.open(15, 1)
    if (status.message !== undefined) writer.text(2, status.message)
    writer.number(3, status.code)
    writer.close(inner, 1)
  }
  writer.flags(16, flagsOf(traceFlags, parent?.isRemote))
  writer.close(from, 2)
}
