/**
 * What a runner and what it guards say to each other, one message per frame: a kind, the number of the run it belongs
 * to, a number of its own (of a byte stream, or of an outgoing fetch) and parts. Parts are raw bytes or UTF-8, so
 * that input, output, bodies and code are never encoded twice. What stands in a header is each isolation’s own.
 *
 * Byte streams of a run: 0 is the request’s body, 1 the response’s, 2n and 2n + 1 those of its outgoing fetch n
 * (n from 1). Who sends may have `windowBytes` under way that the other side has not given back as credit.
 */
import { FrameError, frameHeaderBytes } from './frames.ts'
import type { HeaderList, LogLevel } from './workload.ts'

/** Runner to guest below 16, guest to runner from 16 on, both ways from 32 on; the parts of each in order. */
export const kinds = {
  /**
   * header JSON, ctx JSON, code or absent when the guest should have it, input JSON or absent,
   * request (`RequestHead`) or absent where it is no call by HTTP, its body where that is whole
   */
  run: 1,
  /** header JSON, code: make it ready, run nothing */
  prepare: 2,
  /** reason: abort the signal, let go of the code, answer `done` */
  cancel: 3,
  /** the caller has gone away: abort `request.signal` */
  gone: 4,
  /** head of the answer (`FetchedHead`) to fetch n; its body follows as stream 2n + 1 */
  fetched: 5,
  /** message: fetch n has no answer */
  unfetched: 6,
  /** version of the engine */
  ready: 16,
  /** level, text */
  log: 17,
  /** header JSON, output JSON where completed, body of the response where that goes with it */
  done: 18,
  /** the code of this run is not held here any more: send the run again with it */
  need: 19,
  /** head of the response (`ResponseHead`) whose body follows as stream 1 */
  respond: 20,
  /** fetch n: head (`FetchHead`), body where that is whole */
  fetch: 21,
  /** nobody waits for fetch n any more */
  unfetch: 22,
  /** `SpanBegin` or `SpanEnd`: a span of user code. Only where the run’s ctx says `traced` */
  span: 23,
  /** bytes of a stream, at most `chunkBytes` */
  data: 32,
  /** the stream is complete */
  end: 33,
  /** message: the rest of the stream never comes */
  fail: 34,
  /** decimal number of bytes that were taken from the stream: as many more are welcome */
  credit: 35,
  /** the rest of the stream is not wanted */
  stop: 36,
} as const
export type Kind = (typeof kinds)[keyof typeof kinds]

/** Streams of a call, and those of its nth fetch. */
export const requestStream = 0
export const responseStream = 1
export const fetchUpStream = (n: number) => 2 * n
export const fetchDownStream = (n: number) => 2 * n + 1

/** Bytes of one stream that may be under way before the first credit. */
export const windowBytes = 256 * 1024
/** The largest `data` message, in bytes. */
export const chunkBytes = 64 * 1024
/** Bodies up to this many bytes go with the head instead of as a stream. */
export const wholeBytes = 64 * 1024
/** Fetches of one run at once; more are refused. */
export const maxFetches = 64
/** Names and values of the headers of one message together, in characters. */
export const maxHeaderChars = 64 * 1024

/** Where a body is: `none` there is no body, `whole` it goes with the message, `stream` it follows. */
export type BodyKind = 'none' | 'whole' | 'stream'

export interface RequestHead {
  method: string
  url: string
  headers: HeaderList
}

export interface ResponseHead {
  status: number
  headers: HeaderList
}

export interface FetchHead {
  method: string
  url: string
  headers: HeaderList
  redirect: 'follow' | 'error' | 'manual'
  body: BodyKind
}

export interface FetchedHead {
  status: number
  statusText: string
  /** After redirects. */
  url: string
  redirected: boolean
  headers: HeaderList
  /** False where the status has no body. */
  body: boolean
}

/** What a span of user code says of itself. */
export type SpanAttributes = Record<string, string | number | boolean>

/** Times are ms with fractions since the guest began with the run, or what else the isolation has agreed upon. */
export interface SpanBegin {
  /** 16 hex digits, made by the guest, not all 0. */
  id: string
  /** Id of the span it stands under; absent: the run itself. */
  parent?: string
  name: string
  /** It asks somebody else for something. */
  kind?: 'client'
  start: number
  attributes?: SpanAttributes
}

/** Of one that has begun. What is still open when the run ends is ended by the runner. */
export interface SpanEnd {
  id: string
  end: number
  /** Added to those it began with. */
  attributes?: SpanAttributes
  /** Why it failed, where it did. */
  error?: string
}

/** Spans of one run; more are not sent, and not taken. */
export const maxSpans = 256
export const maxSpanAttributes = 32
/** Characters of an attribute’s name, and of its value: of a longer one only the length is kept. */
export const maxSpanKey = 128
export const maxSpanValue = 1_024
/** Characters of a span’s name and of an error: these are cut, but only behind where secrets are hidden. */
export const maxSpanText = 16_000

export const logLevels: readonly LogLevel[] = ['debug', 'info', 'warn', 'error']

/** A log line is cut at this many bytes of UTF-8. */
export const maxLineBytes = 64 * 1024
/** The largest message of a child apart from its output: a line, a head, or an error with its stack. */
export const maxChatterBytes = 256 * 1024
/** Code and input of a run together, in bytes. */
export const maxRequestBytes = 512 * 1024 * 1024

const absent = 0xffffffff
const fixedBytes = 10

export interface Message {
  kind: number
  run: number
  /** Of the stream or the fetch; 0 where the kind has none. */
  number: number
  parts: (Buffer | undefined)[]
}

/** A message in its frame, ready to be written. */
export function encodeMessage(
  kind: Kind,
  run: number,
  parts: readonly (string | Uint8Array | undefined)[],
  number = 0,
): Buffer {
  let size = fixedBytes + 4 * parts.length
  const lengths: number[] = []
  for (const part of parts) {
    const length =
      part === undefined ? absent : typeof part === 'string' ? Buffer.byteLength(part) : part.length
    lengths.push(length)
    if (length !== absent) size += length
  }
  const frame = Buffer.allocUnsafe(frameHeaderBytes + size)
  let at = frame.writeUInt32BE(size, 0)
  at = frame.writeUInt8(kind, at)
  at = frame.writeUInt32BE(run, at)
  at = frame.writeUInt32BE(number, at)
  at = frame.writeUInt8(parts.length, at)
  for (const length of lengths) at = frame.writeUInt32BE(length, at)
  for (const part of parts) {
    if (typeof part === 'string') at += frame.write(part, at)
    else if (part !== undefined) {
      frame.set(part, at)
      at += part.length
    }
  }
  return frame
}

/** The message in a frame’s payload; its parts are views. Throws `FrameError` where lengths do not add up. */
export function decodeMessage(frame: Buffer): Message {
  if (frame.length < fixedBytes) throw new FrameError('a message without a head')
  const count = frame[fixedBytes - 1]!
  let at = fixedBytes + 4 * count
  if (frame.length < at) throw new FrameError('a message without its lengths')
  const parts: (Buffer | undefined)[] = []
  for (let i = 0; i < count; i++) {
    const length = frame.readUInt32BE(fixedBytes + 4 * i)
    if (length === absent) {
      parts.push(undefined)
      continue
    }
    if (length > frame.length - at) throw new FrameError('a part that is longer than its message')
    parts.push(frame.subarray(at, at + length))
    at += length
  }
  if (at !== frame.length) throw new FrameError('a message with bytes that belong to no part')
  return { kind: frame[0]!, run: frame.readUInt32BE(1), number: frame.readUInt32BE(5), parts }
}
