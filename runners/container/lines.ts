/** Lines out of the raw output of a container: bounded in length, and read no faster than a runner can bear. */
import type { Readable } from 'node:stream'
import { maxLineBytes } from '../../shared/guest.ts'
import { markStart } from './protocol.ts'

const newline = 10
/** What a line costs beside its bytes, as so many of them. */
export const lineWork = 256

/** Cuts bytes at newlines. A line of more than `maxLineBytes` is cut, and says so. */
export class LineSplitter {
  readonly #emit: (text: string) => void
  readonly #onMark: ((mark: string) => void) | undefined
  #parts: Buffer[] = []
  #kept = 0
  #size = 0
  /** The end of a line that was cut: a mark may stand there. */
  #tail = Buffer.alloc(0)

  /** `onMark` is called with each mark (see `markOf`), in the place where it stood. */
  constructor(emit: (text: string) => void, onMark?: (mark: string) => void) {
    this.#emit = emit
    this.#onMark = onMark
  }

  /** How much work it was, in bytes: lines cost more than what is in them. */
  push(chunk: Buffer): number {
    let from = 0
    let work = chunk.length
    for (;;) {
      const at = chunk.indexOf(newline, from)
      if (at < 0) break
      work += lineWork
      this.#add(chunk.subarray(from, at))
      this.#line()
      from = at + 1
    }
    if (from < chunk.length) this.#add(chunk.subarray(from))
    return work
  }

  /** What has no end of line is a line too. */
  end(): void {
    if (this.#size > 0) this.#line()
  }

  #add(bytes: Buffer): void {
    this.#size += bytes.length
    const room = maxLineBytes - this.#kept
    const kept = bytes.length > room ? bytes.subarray(0, room) : bytes
    // A copy: what is left over may be small, and the chunk large.
    if (kept.length > 0) this.#parts.push(Buffer.from(kept))
    this.#kept += kept.length
    if (this.#size > maxLineBytes)
      this.#tail = Buffer.concat([this.#tail, bytes.subarray(-128)]).subarray(-128)
  }

  #line(): void {
    const size = this.#size
    const bytes = this.#parts.length === 1 ? this.#parts[0]! : Buffer.concat(this.#parts)
    const wasCut = size > this.#kept
    const end = wasCut ? this.#tail : bytes
    this.#parts = []
    this.#kept = 0
    this.#size = 0
    this.#tail = Buffer.alloc(0)
    const at = this.#onMark === undefined ? -1 : end.lastIndexOf(markStart)
    if (at >= 0) {
      const mark = end.toString('latin1', at + markStart.length)
      const rest = size - (end.length - at)
      if (rest > 0) this.#say(bytes.subarray(0, rest), rest)
      this.#onMark!(mark)
    } else this.#say(bytes, size)
  }

  #say(bytes: Buffer, size: number): void {
    if (size <= bytes.length) this.#emit(withoutReturn(bytes.toString()))
    else this.#emit(`${wholeCharacters(bytes).toString()} … [line cut: it had ${size} bytes]`)
  }
}

const withoutReturn = (text: string) => (text.endsWith('\r') ? text.slice(0, -1) : text)

/** Without the beginning of a character whose end was cut off. */
function wholeCharacters(bytes: Buffer): Buffer {
  let at = bytes.length - 1
  while (at >= 0 && at > bytes.length - 4 && (bytes[at]! & 0xc0) === 0x80) at--
  const lead = bytes[at] ?? 0
  const width = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1
  return at + width > bytes.length ? bytes.subarray(0, at) : bytes
}

/** Bytes of work that are done within one window; whoever makes more waits for as many windows as it takes. */
const paceBytes = 1_048_576
const paceMs = 50

/** Holds a flood back by not reading: one stream takes at most 20 MiB of work a second of the runner’s time. */
export class Pace {
  readonly #stream: Readable
  #spent = 0
  #since = 0
  #timer: NodeJS.Timeout | undefined

  constructor(stream: Readable) {
    this.#stream = stream
  }

  /** `bytes` of work: see `LineSplitter`. */
  spend(bytes: number): void {
    const now = performance.now()
    if (this.#timer === undefined && now - this.#since >= paceMs) {
      this.#since = now
      this.#spent = 0
    }
    this.#spent += bytes
    if (this.#spent < paceBytes || this.#timer !== undefined) return
    this.#stream.pause()
    this.#timer = setTimeout(() => this.#look(), 1)
  }

  /** What came with the last piece is paid for as well. */
  #look(): void {
    const due = this.#since + paceMs * (this.#spent / paceBytes) - performance.now()
    this.#timer = due > 0 ? setTimeout(() => this.#look(), due) : undefined
    if (due <= 0) this.#stream.resume()
  }
}
