/**
 * What a runner and the agent in a virtual machine say to each other, over whatever carries bytes: a virtio port, a
 * vsock. A frame is a 4-byte big-endian length of what follows, a kind, a stream and a payload: bytes, or JSON in
 * UTF-8. Both sides refuse what is malformed or too long without allocating for it; neither trusts the other. Uses
 * nothing but the language, so that the agent can be compiled for an engine without Node’s libraries.
 */

/** Runner to agent below 16, agent to runner from 16 on, both ways from 32 on. */
export const machineKinds = {
  /** `Configure`: after a boot and after each restore, before anything else. Answered by `configured` or `failed`. */
  configure: 1,
  /** `PutHeader` as JSON, a NUL, and bytes: a file, a directory or a link. No answer where it goes well. */
  put: 2,
  /** bytes that belong behind those of the last `put` of a file */
  more: 3,
  /** `MountSpec[]`: mounts more from the job drive, also while the process runs. Answered by `mounted` or `failed`. */
  mount: 4,
  /** `Start`: at most once. Answered by `started` or `failed`. */
  start: 5,
  /** `{ signal: number }` to every process of the workload */
  signal: 6,
  /** answered by `usage` */
  ask: 7,
  /** up to 64 bytes, answered by `pong` with the same */
  ping: 8,
  /** powers the machine off */
  off: 9,
  /** `Warm`: before a snapshot. No answer where it goes well. */
  warm: 10,
  /** `Ready`: once, when the agent is up; a machine restored from a snapshot does not say it again */
  ready: 16,
  configured: 17,
  mounted: 18,
  started: 19,
  /** `Failed`: what was asked last did not go well */
  failed: 20,
  /** bytes of the result file, before `exited`, at most `Start.result_bytes + 1` of them */
  result: 21,
  /** `Exited`: after all output; the last word about the process */
  exited: 22,
  /** `MachineUsage` */
  usage: 23,
  pong: 24,
  /** bytes of a stream, at most `machineChunkBytes` */
  data: 32,
  /** the stream is complete */
  end: 33,
  /** decimal number of bytes taken from the stream: as many more are welcome */
  credit: 34,
} as const
export type MachineKind = (typeof machineKinds)[keyof typeof machineKinds]

/** Streams of the workload’s process: as its descriptors are numbered. */
export const machineStreams = { stdin: 0, stdout: 1, stderr: 2 } as const

/** Bytes of one stream that may be under way before the first credit. */
export const machineWindowBytes = 256 * 1024
export const machineChunkBytes = 32 * 1024
/** The longest frame either side takes, without its length. */
export const maxMachineFrameBytes = 128 * 1024

/** Ids of the user a process runs as. */
export interface MachineUser {
  uid: number
  gid: number
  groups: number[]
}

/** A directory or file of the job drive, bound read-only where the workload looks for it. */
export interface MountSpec {
  /** On the drive, such as `0`; '.' is all of it. */
  path: string
  /** Absolute; made where it is missing. */
  target: string
}

export interface Configure {
  /** Milliseconds since the epoch. */
  time_ms: number
  /** 64 bytes from the host’s random generator, hex: the kernel’s is reseeded with them. */
  entropy: string
  /** Of the machine’s one network interface; null: it has none. */
  network: MachineNetwork | null
  mounts: MountSpec[]
  /** Of the memory that /tmp, /run and the like may hold together, MiB. */
  disk_mb: number
}

export interface MachineNetwork {
  /** With its prefix length: `10.0.2.15/24`. */
  address: string
  gateway: string
  nameservers: string[]
  /** Lines of /etc/hosts. */
  hosts: { address: string; name: string }[]
}

export interface PutHeader {
  /** Absolute; directories above it are made. */
  path: string
  kind: 'file' | 'directory' | 'link'
  /** Of a link. */
  to?: string
  /** Permission bits. */
  mode: number
}

/** What machines that are restored from a snapshot will ask for, as far as it can be there before. */
export interface Warm {
  /** Directories that files will be put into: those that are there. */
  directories: string[]
  /** As in `Start`. */
  result: string | null
  result_bytes: number
}

export interface Start {
  argv: string[]
  env: Record<string, string>
  cwd: string
  user: MachineUser
  /** MiB (control group in the machine), processes, bytes of the largest file. */
  memory_mb: number
  pids: number
  file_bytes: number
  /** A file whose content is the result; null: none. Made empty and writable for everybody. */
  result: string | null
  result_bytes: number
}

export interface Ready {
  /** Of the frames; the runner takes its own only. */
  protocol: number
  /** `uname -r`. */
  kernel: string
}
export const machineProtocol = 2

export interface Failed {
  /** `user`: the command is not there or cannot be executed; `machine`: anything else. */
  fault: 'user' | 'machine'
  message: string
}

export interface Exited {
  /** As a shell has it: 128 + n where signal n ended it. */
  code: number
  /** The kernel has killed for want of memory within the limit. */
  oom: boolean
  usage: MachineUsage
}

export interface MachineUsage {
  cpu_ms: number
  memory_peak_mb: number
  oom_kills: number
}

export class MachineFrameError extends Error {
  override name = 'MachineFrameError'
}

/** Bytes of a frame before its payload. */
export const machineHeadBytes = 6

/** A frame, ready to be written. */
export function encodeMachineFrame(
  kind: MachineKind,
  payload: Uint8Array = new Uint8Array(0),
  stream = 0,
): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(machineHeadBytes + payload.length)
  new DataView(frame.buffer).setUint32(0, payload.length + 2)
  frame[4] = kind
  frame[5] = stream
  frame.set(payload, machineHeadBytes)
  return frame
}

/** Takes chunks cut anywhere; memory grows with bytes that came, never with lengths that were claimed. */
export class MachineFrames {
  readonly #maxBytes: number
  readonly #head = new Uint8Array(4)
  #headFilled = 0
  #parts: Uint8Array[] = []
  /** Bytes of the frame under way that have not come yet. */
  #missing = 0
  #broken = false

  constructor(maxBytes: number = maxMachineFrameBytes) {
    this.#maxBytes = maxBytes
  }

  /**
   * Calls `onFrame` for each whole frame; the payload may be a view into `chunk`. Throws `MachineFrameError` on a
   * length that is too small or too large, and on every push after that.
   */
  push(chunk: Uint8Array, onFrame: (kind: number, stream: number, payload: Uint8Array) => void): void {
    if (this.#broken) throw new MachineFrameError('the stream was given up')
    let at = 0
    while (at < chunk.length) {
      if (this.#missing === 0) {
        this.#head[this.#headFilled++] = chunk[at++]!
        if (this.#headFilled < 4) continue
        this.#headFilled = 0
        const length = new DataView(this.#head.buffer).getUint32(0)
        if (length < 2 || length > this.#maxBytes) {
          this.#broken = true
          throw new MachineFrameError(`a frame of ${length} bytes where 2 to ${this.#maxBytes} are allowed`)
        }
        this.#missing = length
        continue
      }
      const taken = chunk.subarray(at, at + this.#missing)
      at += taken.length
      this.#missing -= taken.length
      if (this.#missing > 0) {
        this.#parts.push(taken.slice())
        return
      }
      const frame = this.#parts.length === 0 ? taken : join([...this.#parts, taken])
      this.#parts = []
      onFrame(frame[0]!, frame[1]!, frame.subarray(2))
    }
  }
}

function join(parts: readonly Uint8Array[]): Uint8Array {
  let size = 0
  for (const part of parts) size += part.length
  const whole = new Uint8Array(size)
  let at = 0
  for (const part of parts) {
    whole.set(part, at)
    at += part.length
  }
  return whole
}
