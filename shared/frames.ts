/**
 * Frame codec for byte streams between a runner and what it guards: a 4-byte big-endian length, then that many
 * bytes. The other side is not trusted: a length over the limit is refused before anything is allocated for it,
 * and memory grows only with bytes that really came. Standard library only, no streams.
 */

export const frameHeaderBytes = 4

/** The stream cannot be followed any further: what sent it is broken or hostile. */
export class FrameError extends Error {
  override name = 'FrameError'
}

/** One frame holding `payload`. */
export function encodeFrame(payload: Uint8Array): Buffer {
  const frame = Buffer.allocUnsafe(frameHeaderBytes + payload.length)
  frame.writeUInt32BE(payload.length, 0)
  frame.set(payload, frameHeaderBytes)
  return frame
}

/** Takes chunks cut anywhere and gives back the frames in them. */
export class FrameDecoder {
  /** The largest payload taken, in bytes. May be changed at any time; applies from the next header on. */
  maxBytes: number
  #header = Buffer.alloc(frameHeaderBytes)
  #headerFilled = 0
  /** Bytes of the frame being collected, and how many are still to come. */
  #parts: Buffer[] = []
  #missing = 0
  #inFrame = false
  #broken = false

  constructor(maxBytes: number) {
    this.maxBytes = maxBytes
  }

  /** True in the middle of a frame: a stream that ends here was cut. */
  get partial(): boolean {
    return this.#inFrame || this.#headerFilled > 0
  }

  /**
   * Calls `onFrame` for each frame that `chunk` completes, in order. A frame may be a view into `chunk`: copy what
   * outlives the call. Throws `FrameError` on a length over the limit, and on every push after that.
   */
  push(chunk: Buffer, onFrame: (frame: Buffer) => void): void {
    if (this.#broken) throw new FrameError('the stream was given up')
    let at = 0
    while (at < chunk.length) {
      if (!this.#inFrame) {
        if (this.#headerFilled === 0 && chunk.length - at >= frameHeaderBytes) {
          this.#begin(chunk.readUInt32BE(at))
          at += frameHeaderBytes
        } else {
          this.#header[this.#headerFilled++] = chunk[at++]!
          if (this.#headerFilled < frameHeaderBytes) continue
          this.#headerFilled = 0
          this.#begin(this.#header.readUInt32BE(0))
        }
      }
      const taken = chunk.subarray(at, at + this.#missing)
      at += taken.length
      this.#missing -= taken.length
      if (this.#missing > 0) {
        if (taken.length > 0) this.#parts.push(Buffer.from(taken))
        return
      }
      const frame = this.#parts.length === 0 ? taken : Buffer.concat([...this.#parts, taken])
      this.#parts = []
      this.#inFrame = false
      onFrame(frame)
    }
  }

  #begin(length: number): void {
    if (length > this.maxBytes) {
      this.#broken = true
      throw new FrameError(`a frame of ${length} bytes where at most ${this.maxBytes} are allowed`)
    }
    this.#missing = length
    this.#inFrame = true
  }
}
