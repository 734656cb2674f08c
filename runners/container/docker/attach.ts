/**
 * The standard streams of a container over one connection. Output comes in frames (Docker Engine API, “Stream
 * format”): a stream number, three zeros, the length as a big-endian 32-bit number, the bytes.
 */
import type { Socket } from 'node:net'
import { Readable, Writable } from 'node:stream'
import { finished } from 'node:stream/promises'

/** What waits of one stream before nothing more is read of both, bytes. */
const highWaterMark = 256 * 1024
const headerBytes = 8
/** Enough of the beginning of stderr to know what the init process says there. */
const beginningBytes = 512

export interface Streams {
  readonly stdin: Writable
  readonly stdout: Readable
  readonly stderr: Readable
  /** The connection is at its end, though output may wait to be read. */
  readonly closed: Promise<void>
  /** All output was read. */
  readonly read: Promise<void>
  /** How stderr begins. */
  beginning(): string
  /** Whether it is the reader who keeps output waiting. */
  blocked(): boolean
  /** No more of it is waited for: what has come can still be read. */
  end(): void
  /** Nothing of it is wanted any more. */
  destroy(): void
}

class Output extends Readable {
  readonly #wanted: () => void
  constructor(wanted: () => void) {
    super({ highWaterMark })
    this.#wanted = wanted
  }
  override _read(): void {
    this.#wanted()
  }
}

/** `onEnd` is called at the very moment the connection is at its end. Nothing here ever emits `error`. */
export function openStreams(socket: Socket, onEnd: () => void): Streams {
  const waiting = new Set<Output>()
  const output = () => {
    const one: Output = new Output(() => {
      if (waiting.delete(one) && waiting.size === 0) socket.resume()
    })
    return one
  }
  const stdout = output()
  const stderr = output()
  const stdin = inputOf(socket)
  const closed = Promise.withResolvers<void>()
  let beginning = Buffer.alloc(0)

  let ended = false
  const end = () => {
    if (ended) return
    ended = true
    onEnd()
    stdout.push(null)
    stderr.push(null)
    stdin.destroy()
    socket.destroy()
    closed.resolve()
  }

  const take = framesTo((stream, bytes) => {
    const target = stream === 1 ? stdout : stderr
    if (target === stderr && beginning.length < beginningBytes)
      beginning = Buffer.concat([beginning, bytes.subarray(0, beginningBytes - beginning.length)])
    if (!target.destroyed && !target.push(bytes)) waiting.add(target)
  })
  socket.on('data', (chunk: Buffer) => {
    if (ended) return
    if (!take(chunk)) end()
    else if (waiting.size > 0) socket.pause()
  })
  for (const event of ['end', 'close', 'error'] as const) socket.on(event, end)
  for (const one of [stdout, stderr]) {
    one.on('error', () => {})
    // Who does not want one of them must not stop the other.
    one.once('close', () => {
      if (waiting.delete(one) && waiting.size === 0) socket.resume()
    })
  }

  /** Nothing waits to be read, whether or not anybody asks. */
  const over = async (one: Readable) => {
    await closed.promise
    if (one.readableLength > 0) await finished(one).catch(() => {})
  }
  return {
    stdin,
    stdout,
    stderr,
    closed: closed.promise,
    read: Promise.all([over(stdout), over(stderr)]).then(() => {}),
    beginning: () => beginning.toString('latin1'),
    blocked: () => waiting.size > 0,
    end,
    destroy: () => {
      end()
      stdout.destroy()
      stderr.destroy()
    },
  }
}

/** Its end closes only this direction. What is written when the other side is gone is lost without a word. */
function inputOf(socket: Socket): Writable {
  const stdin = new Writable({
    write: (chunk: Buffer, _encoding, done) => {
      if (socket.writable) socket.write(chunk, () => done())
      else done()
    },
    final: (done) => {
      if (socket.writable) socket.end(() => done())
      else done()
    },
  })
  stdin.on('error', () => {})
  return stdin
}

/** Takes chunks however they are cut, and hands on the bytes of frames as they come. False: these are no frames. */
export function framesTo(onBytes: (stream: 1 | 2, bytes: Buffer) => void): (chunk: Buffer) => boolean {
  const header = Buffer.alloc(headerBytes)
  let have = 0
  let left = 0
  return (chunk) => {
    let at = 0
    while (at < chunk.length) {
      if (left === 0) {
        const copied = chunk.copy(header, have, at)
        have += copied
        at += copied
        if (have < headerBytes) return true
        have = 0
        left = header.readUInt32BE(4)
        if ((header[0] !== 1 && header[0] !== 2) || header.readUIntBE(1, 3) !== 0) return false
        continue
      }
      const bytes = chunk.subarray(at, at + left)
      at += bytes.length
      left -= bytes.length
      onBytes(header[0] as 1 | 2, bytes)
    }
    return true
  }
}
