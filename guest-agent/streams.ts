/** The workload’s three streams. Each end says how much it has taken; no more than a window is ever under way. */
import * as os from 'quickjs:os'
import { machineChunkBytes, machineHeadBytes, machineKinds, machineWindowBytes } from '../shared/machine.ts'
import type { Channel } from './channel.ts'
import type { Loop, Watch } from './loop.ts'
import { errors, pollEvents, utf8 } from './system.ts'

/** A virtio port takes as much at once as a chunk has: a frame and its head should be no more. */
const readBytes = machineChunkBytes - machineHeadBytes

/**
 * A workload that writes much in small pieces would be interrupted for each of them, so that the pieces stay small.
 * After so many that came within a ms of each other the next one gets time to grow, also ms.
 */
const quickPieces = 4
const quickMs = 1
const restMs = 2

/** The host has broken the rules of frames. */
export class HostError extends Error {
  override name = 'HostError'
}

/** What the workload writes. */
export class Outlet {
  readonly #loop: Loop
  readonly #stream: number
  readonly #channel: Channel
  readonly #watch: Watch
  readonly #onEnd: () => void
  readonly #buffer = new ArrayBuffer(readBytes)
  /** Bytes that the host has room for. */
  #window = machineWindowBytes
  #ended = false
  #readAt = 0
  #quick = 0
  #resting = false

  constructor(loop: Loop, channel: Channel, stream: number, fd: number, onEnd: () => void) {
    this.#loop = loop
    this.#stream = stream
    this.#channel = channel
    this.#onEnd = onEnd
    this.#watch = loop.watch(fd, pollEvents.in, () => {
      this.#read()
      if (this.#ended) loop.forget(this.#watch)
    })
  }

  get ended(): boolean {
    return this.#ended
  }

  /** Throws `HostError` where it is more than was under way. */
  credit(bytes: number): void {
    if (this.#window + bytes > machineWindowBytes) throw new HostError(`a credit of ${bytes} bytes too many`)
    this.#window += bytes
    this.refresh()
  }

  /** Reads only what can be sent. */
  refresh(): void {
    if (this.#ended) return
    const wanted = this.#window > 0 && !this.#channel.full && !this.#resting
    this.#watch.events = wanted ? pollEvents.in : 0
  }

  #read(): void {
    const wanted = Math.min(this.#window, readBytes)
    const count = os.read(this.#watch.fd, this.#buffer, 0, wanted)
    if (count === -errors.again) return
    if (count > 0) {
      this.#window -= count
      this.#channel.send(machineKinds.data, new Uint8Array(this.#buffer, 0, count), this.#stream)
      if (count < readBytes / 2) this.#restIfQuick()
      this.refresh()
      return
    }
    this.#ended = true
    os.close(this.#watch.fd)
    this.#channel.send(machineKinds.end, undefined, this.#stream)
    this.#onEnd()
  }

  #restIfQuick(): void {
    const now = os.now()
    this.#quick = now - this.#readAt < quickMs ? this.#quick + 1 : 0
    this.#readAt = now
    if (this.#quick < quickPieces) return
    this.#resting = true
    this.#loop.after(restMs, () => {
      this.#resting = false
      this.#readAt = os.now()
      this.refresh()
    })
  }
}

/** What the host writes: kept until there is a process to read it. */
export class Inlet {
  readonly #loop: Loop
  readonly #channel: Channel
  readonly #stream: number
  #watch: Watch | undefined
  #queue: Uint8Array[] = []
  /** Bytes that came and were not credited yet. */
  #taken = 0
  #complete = false
  /** Nobody reads it any more. */
  #closed = false

  constructor(loop: Loop, channel: Channel, stream: number) {
    this.#loop = loop
    this.#channel = channel
    this.#stream = stream
  }

  attach(fd: number): void {
    this.#watch = this.#loop.watch(fd, 0, () => this.#write())
    this.#write()
  }

  /** Throws `HostError` where it is more than was welcome. */
  take(bytes: Uint8Array): void {
    this.#taken += bytes.length
    if (this.#complete || this.#taken > machineWindowBytes) throw new HostError('more input than was welcome')
    this.#queue.push(bytes)
    this.#write()
  }

  /** There is no more. */
  end(): void {
    this.#complete = true
    this.#write()
  }

  close(): void {
    if (this.#watch !== undefined && !this.#closed) {
      this.#loop.forget(this.#watch)
      os.close(this.#watch.fd)
    }
    this.#closed = true
    this.#write()
  }

  #write(): void {
    if (this.#watch === undefined && !this.#closed) return
    let done = 0
    while (this.#queue.length > 0) {
      const bytes = this.#queue[0]!
      const count = this.#closed ? bytes.length : this.#writeSome(bytes)
      if (count === -errors.again) break
      if (count < 0) {
        this.close()
        return
      }
      done += count
      if (count === bytes.length) this.#queue.shift()
      else this.#queue[0] = bytes.subarray(count)
    }
    this.#taken -= done
    if (done > 0) this.#channel.send(machineKinds.credit, utf8(String(done)), this.#stream)
    if (this.#closed) return
    if (this.#queue.length === 0 && this.#complete) this.close()
    else this.#watch!.events = this.#queue.length > 0 ? pollEvents.out : 0
  }

  #writeSome(bytes: Uint8Array): number {
    return os.write(this.#watch!.fd, bytes.buffer as ArrayBuffer, bytes.byteOffset, bytes.length)
  }
}
