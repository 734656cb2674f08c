/** Both ends of the byte streams in `shared/guest.ts`, the same in runner and guest. */
import { FrameError } from '../../shared/frames.ts'
import { chunkBytes, type Kind, kinds, type Message, windowBytes } from '../../shared/guest.ts'

/** Sends a message about one stream. */
export type Post = (kind: Kind, part?: string | Uint8Array) => void

/** The sending end: no more under way than the other end has asked for. */
export class Outflow {
  /** The other end wants no more, or this one has ended. */
  closed = false
  readonly #post: Post
  #credit = windowBytes
  #rest: Uint8Array | undefined
  #then: ((wanted: boolean) => void) | undefined

  constructor(post: Post) {
    this.#post = post
  }

  /** Calls `then` when all of it was sent, perhaps at once; with false where it is not wanted. One at a time. */
  write(bytes: Uint8Array, then: (wanted: boolean) => void) {
    if (this.closed) return then(false)
    this.#rest = bytes
    this.#then = then
    this.#flush()
  }

  end(): void {
    if (this.closed) return
    this.closed = true
    this.#post(kinds.end)
  }

  fail(message: string): void {
    if (this.closed) return
    this.#close()
    this.#post(kinds.fail, message)
  }

  /** The other end has taken `part` bytes, in decimal digits. Throws `FrameError` where it cannot have. */
  credited(part: Buffer | undefined): void {
    const text = part?.toString('latin1', 0, 12) ?? ''
    const bytes = Number(text)
    if (!/^[1-9]\d*$/.test(text) || this.#credit + bytes > windowBytes)
      throw new FrameError('a credit for bytes that were not sent')
    this.#credit += bytes
    this.#flush()
  }

  /** The other end wants no more. */
  stopped(): void {
    if (!this.closed) this.#close()
  }

  #close(): void {
    this.closed = true
    this.#rest = undefined
    const then = this.#then
    this.#then = undefined
    then?.(false)
  }

  #flush(): void {
    let rest = this.#rest
    if (rest === undefined) return
    while (rest.length > 0 && this.#credit > 0) {
      const size = Math.min(rest.length, this.#credit, chunkBytes)
      this.#credit -= size
      this.#post(kinds.data, rest.subarray(0, size))
      rest = rest.subarray(size)
    }
    this.#rest = rest
    if (rest.length > 0) return
    this.#rest = undefined
    const then = this.#then
    this.#then = undefined
    then?.(true)
  }
}

/** What comes out of a stream: the next piece, its end, or why the rest never comes. */
export type Piece = { bytes: Uint8Array } | 'end' | { failed: string }

/** The receiving end: holds at most a window of bytes, and gives credit for what was taken. */
export class Inflow {
  readonly #post: Post
  readonly #pieces: Uint8Array[] = []
  #held = 0
  #taken = 0
  #last: 'end' | { failed: string } | undefined
  #waiting: ((piece: Piece) => void) | undefined
  #unwanted = false

  constructor(post: Post) {
    this.#post = post
  }

  /** Throws `FrameError` where that is more than was asked for, or comes after the end. */
  data(part: Buffer | undefined): void {
    if (part === undefined || part.length === 0 || part.length > chunkBytes)
      throw new FrameError('a piece of a stream that has no fitting size')
    if (this.#last !== undefined) throw new FrameError('a piece of a stream that has ended')
    if (this.#held + this.#taken + part.length > windowBytes)
      throw new FrameError('more of a stream than was asked for')
    this.#held += part.length
    if (this.#unwanted) return
    // A view of what the socket gave, which it uses again.
    this.#pieces.push(Uint8Array.prototype.slice.call(part))
    this.#wake()
  }

  end(): void {
    this.#finish('end')
  }

  fail(message: string): void {
    this.#finish({ failed: message })
  }

  /** Calls `then` with the next piece, perhaps at once. One at a time. */
  take(then: (piece: Piece) => void): void {
    this.#waiting = then
    this.#wake()
  }

  /** Nobody wants the rest: the other end is told, and what still comes is dropped. */
  stop(): void {
    if (this.#unwanted || this.#last !== undefined) return
    this.#unwanted = true
    this.#pieces.length = 0
    this.#post(kinds.stop)
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array, void> {
    try {
      for (;;) {
        const piece = await new Promise<Piece>((resolve) => this.take(resolve))
        if (piece === 'end') return
        if ('failed' in piece) throw new Error(piece.failed)
        yield piece.bytes
      }
    } finally {
      this.stop()
    }
  }

  #finish(last: 'end' | { failed: string }): void {
    if (this.#last !== undefined) throw new FrameError('a stream that ends twice')
    this.#last = last
    this.#wake()
  }

  #wake() {
    const waiting = this.#waiting
    if (waiting === undefined) return
    const bytes = this.#pieces.shift()
    if (bytes === undefined && this.#last === undefined) return
    this.#waiting = undefined
    if (bytes === undefined) return waiting(this.#last!)
    this.#held -= bytes.length
    this.#taken += bytes.length
    // Credit for every piece would be a message for every piece.
    if (this.#taken >= windowBytes / 4 && this.#last === undefined) {
      this.#post(kinds.credit, String(this.#taken))
      this.#taken = 0
    }
    waiting({ bytes })
  }
}

/**
 * Hands a message about a stream to the end it is for; false for a message of another kind. Of the reason of a
 * failure at most `reasonBytes` are read. Throws `FrameError`.
 */
export function routeStream(
  { kind, number, parts }: Message,
  inflow: (stream: number) => Inflow | undefined,
  outflow: (stream: number) => Outflow | undefined,
  reasonBytes?: number,
): boolean {
  switch (kind) {
    case kinds.data:
      inflow(number)?.data(parts[0])
      return true
    case kinds.end:
      inflow(number)?.end()
      return true
    case kinds.fail:
      inflow(number)?.fail(parts[0]?.toString('utf8', 0, reasonBytes) ?? '')
      return true
    case kinds.credit:
      outflow(number)?.credited(parts[0])
      return true
    case kinds.stop:
      outflow(number)?.stopped()
      return true
    default:
      return false
  }
}
