/**
 * What runner and sandbox child say to each other, one message per frame: a kind, the number of the run it belongs
 * to, and text parts. Parts are raw UTF-8, so that input, output and code are never encoded twice.
 */
import { FrameError, frameHeaderBytes } from '../../shared/frames.ts'
import type { Cause, LogLevel } from '../../shared/workload.ts'

/** Runner to child below 16, child to runner from 16 on; the parts of each in order. */
export const kinds = {
  /** header (`RunHeader`), ctx JSON, code or absent when the child should have it, input JSON or absent */
  run: 1,
  /** header (`RunHeader`), code: compile it, run nothing */
  prepare: 2,
  /** reason: abort the signal, throw the isolate away, answer `done` */
  cancel: 3,
  /** V8 version */
  ready: 16,
  /** level, text */
  log: 17,
  /** header (`DoneHeader`), output JSON where completed */
  done: 18,
  /** the code of this run is not held here any more: send the run again with it */
  need: 19,
} as const
export type Kind = (typeof kinds)[keyof typeof kinds]

export interface RunHeader {
  /** What warm reuse is keyed by: see `isolateKey`. */
  key: string
  typescript: boolean
  memory_mb: number
  output_bytes: number
}

export interface DoneHeader {
  status: 'completed' | 'failed' | 'stopped'
  cause: Cause | null
  message: string | null
  stack: string | null
  start: 'cold' | 'warm'
  cpu_ms: number
  memory_mb: number
  /** Keys whose isolates are no longer held. */
  dropped: string[]
}

export const logLevels: readonly LogLevel[] = ['debug', 'info', 'warn', 'error']

/** A log line is cut at this many bytes of UTF-8. */
export const maxLineBytes = 64 * 1024
/** The largest message of a child apart from its output: a line, or an error with its stack. */
export const maxChatterBytes = 256 * 1024
/** Code and input of a run together, in bytes. */
export const maxRequestBytes = 512 * 1024 * 1024

const absent = 0xffffffff
const fixedBytes = 6

export interface Message {
  kind: number
  run: number
  parts: (Buffer | undefined)[]
}

/** A message in its frame, ready to be written. */
export function encodeMessage(kind: Kind, run: number, parts: readonly (string | undefined)[]): Buffer {
  let size = fixedBytes + 4 * parts.length
  const lengths: number[] = []
  for (const part of parts) {
    const length = part === undefined ? absent : Buffer.byteLength(part)
    lengths.push(length)
    if (length !== absent) size += length
  }
  const frame = Buffer.allocUnsafe(frameHeaderBytes + size)
  let at = frame.writeUInt32BE(size, 0)
  at = frame.writeUInt8(kind, at)
  at = frame.writeUInt32BE(run, at)
  at = frame.writeUInt8(parts.length, at)
  for (const length of lengths) at = frame.writeUInt32BE(length, at)
  for (const part of parts) if (part) at += frame.write(part, at)
  return frame
}

/** The message in a frame’s payload; its parts are views. Throws `FrameError` where lengths do not add up. */
export function decodeMessage(frame: Buffer): Message {
  if (frame.length < fixedBytes) throw new FrameError('a message without a head')
  const count = frame[5]!
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
  return { kind: frame[0]!, run: frame.readUInt32BE(1), parts }
}
