/** The one byte channel to the host: a virtio port that is always there, or connections to a vsock port. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import { encodeMachineFrame, MachineFrames, type MachineKind } from '../shared/machine.ts'
import type { Loop, Watch } from './loop.ts'
import { AgentError, check, errors, namesIn, openFlags, pollEvents, readText, utf8 } from './system.ts'

const portName = 'vulcan'
const vsockPort = 1024
const ports = '/sys/class/virtio-ports'
/** How long the port may take to appear, and how long the agent looks away from one that the host has left; ms. */
const portWaitMs = 20_000
const awayMs = 5
const readBytes = 64 * 1024
/** More than this is not read from streams while the host takes nothing. */
const enoughBytes = 128 * 1024

export interface ChannelEvents {
  onFrame(kind: number, stream: number, payload: Uint8Array): void
  /** The host is there, or has left and may come back: frames begin anew on both sides. */
  onHost(): void
  /** There is room again for what streams have. */
  onRoom(): void
}

export class Channel {
  readonly #loop: Loop
  readonly #events: ChannelEvents
  readonly #buffer = new ArrayBuffer(readBytes)
  readonly #isPort: boolean
  #watch: Watch | undefined
  #frames = new MachineFrames()
  #queue: Uint8Array[] = []
  /** Of the first of the queue, bytes that are written. */
  #written = 0
  #queued = 0
  /** Bytes went either way since the host has come. */
  #met = false

  constructor(loop: Loop, transport: 'port' | 'vsock', events: ChannelEvents) {
    this.#loop = loop
    this.#events = events
    this.#isPort = transport === 'port'
    if (transport === 'port') this.#open(openPort())
    else this.#listen()
  }

  /** The queue is long: nothing should be read that would only be added to it. */
  get full(): boolean {
    return this.#queued > enoughBytes
  }

  /** What the host is not there to take is dropped. */
  send(kind: MachineKind, payload?: Uint8Array, stream = 0): void {
    this.sendFrame(encodeMachineFrame(kind, payload, stream))
  }

  sendJson(kind: MachineKind, value: unknown): void {
    this.send(kind, utf8(JSON.stringify(value)))
  }

  /** A frame that is encoded already. */
  sendFrame(frame: Uint8Array): void {
    if (this.#watch === undefined) return
    this.#queue.push(frame)
    this.#queued += frame.length
    if (this.#queue.length === 1) this.#flush()
  }

  #listen(): void {
    const listener = check(linux.vsockListen(vsockPort), 'vsock')
    this.#loop.watch(listener, pollEvents.in, () => {
      const fd = linux.vsockAccept(listener)
      if (fd < 0) return
      this.#close()
      this.#open(fd)
    })
  }

  #open(fd: number): void {
    this.#watch = this.#loop.watch(fd, pollEvents.in, (events) => {
      if ((events & pollEvents.out) !== 0) this.#flush()
      if ((events & ~pollEvents.out) !== 0) this.#read(fd)
    })
    this.#events.onHost()
  }

  #close(): void {
    if (this.#watch === undefined) return
    this.#loop.forget(this.#watch)
    os.close(this.#watch.fd)
    this.#watch = undefined
    this.#forgetFrames()
  }

  #forgetFrames(): void {
    this.#frames = new MachineFrames()
    this.#queue = []
    this.#written = 0
    this.#queued = 0
  }

  #read(fd: number): void {
    const count = os.read(fd, this.#buffer, 0, readBytes)
    if (count === -errors.again) return
    if (count > 0) {
      this.#met = true
      // Payloads may be kept by whoever takes them, and this buffer is used again.
      this.#frames.push(new Uint8Array(this.#buffer.slice(0, count)), this.#events.onFrame)
      return
    }
    if (this.#isPort) this.#lookAway()
    else this.#close()
  }

  /** A port that the host has left is always readable, and reads as nothing. */
  #lookAway(): void {
    const watch = this.#watch!
    watch.events = 0
    if (this.#met) {
      this.#met = false
      this.#forgetFrames()
      this.#events.onHost()
    }
    this.#loop.after(awayMs, () => {
      watch.events = pollEvents.in | (this.#queue.length > 0 ? pollEvents.out : 0)
    })
  }

  #flush(): void {
    const watch = this.#watch
    if (watch === undefined) return
    const wasFull = this.full
    while (this.#queue.length > 0) {
      const frame = this.#queue[0]!
      const left = frame.length - this.#written
      const count = os.write(watch.fd, frame.buffer as ArrayBuffer, frame.byteOffset + this.#written, left)
      // Whatever else is wrong shows when it is read from.
      if (count < 0) break
      this.#met = true
      this.#queued -= count
      this.#written += count
      if (count < left) continue
      this.#queue.shift()
      this.#written = 0
    }
    if (watch.events !== 0) watch.events = pollEvents.in | (this.#queue.length > 0 ? pollEvents.out : 0)
    if (wasFull && !this.full) this.#events.onRoom()
  }
}

/** Throws `AgentError` where the machine has no port of that name. */
function openPort(): number {
  const until = os.now() + portWaitMs
  while (os.now() < until) {
    const port = namesIn(ports).find((name) => readText(`${ports}/${name}/name`) === portName)
    const flags = openFlags.readWrite | openFlags.nonBlocking | openFlags.closeOnExec
    if (port !== undefined) return check(os.open(`/dev/${port}`, flags), port)
    linux.poll(new ArrayBuffer(8), 0, 2)
  }
  throw new AgentError(`there is no virtio port named ${portName}`)
}
