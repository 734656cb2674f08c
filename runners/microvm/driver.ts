/**
 * What the parts of the microVM runner owe each other. A driver starts virtual machines under one VMM; `engine.ts`
 * makes boxes of them (`runners/container/engine.ts`) and knows neither QEMU nor Firecracker.
 */
import type { Duplex } from 'node:stream'

/** What a machine is made of; every path is absolute and its file never changes. */
export interface MachineShape {
  /** Uncompressed (`vmlinux`) or bzImage, as the driver’s `kernelFormats` has it. */
  kernel: string
  /** The agent, and the modules that this kernel needs. */
  initramfs: string
  /** Root file system image, read-only: of the format the driver names. */
  root: string
  memoryMb: number
  vcpus: number
  /** The machine has a network interface, at work or not. */
  network: boolean
}

/** What is the job’s own. */
export interface MachineOptions {
  /** Directory for sockets and other files of this machine alone; made and removed by the caller. */
  dir: string
  /** Read-only block device with what the job brings; the caller fills it, also later. Always `jobDriveBytes` long. */
  jobDrive: string
  /** Network namespace that the machine’s interface is in; undefined: its network, where it has one, leads nowhere. */
  netns: string | undefined
  /** Share of the host’s cores that the VMM may take; may be a fraction; undefined: as much as it gets. */
  cpu?: number
  /** Bandwidth of the job’s disk, bytes per second; undefined: no limit. */
  diskBytesPerSecond?: number
  /** Nobody waits for it, and it may stand for long: little memory is worth more than an early start. */
  ahead?: boolean
}

/** Length of the file behind every job drive: sparse. A snapshot’s device must not change its size. */
export const jobDriveBytes = 2 ** 31

/** A machine that was stopped and written down. */
export interface Template {
  shape: MachineShape
  /** Directory with the driver’s files: memory, device state. */
  dir: string
}

export interface Machine {
  /** Of the VMM. */
  readonly pid: number
  /** Where its interface leads, if that is not what the driver’s `guestNetwork` says of its shape. */
  readonly network?: { address: string; gateway: string } | undefined
  /** Byte channel to the agent. Ends where the VMM does. */
  readonly channel: Duplex
  /** Settles when the VMM is gone, and nothing of it runs any more. Never rejects. */
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>
  /** The last of what the guest’s console said: bounded. */
  console(): string
  /** The guest gets no time until `resume`. */
  pause(): Promise<void>
  resume(): Promise<void>
  /** Of a paused machine, into an empty directory. */
  snapshot(dir: string): Promise<void>
  /** What the VMM process has used: CPU in ms, resident memory in MiB. */
  usage(): Promise<{ cpuMs: number; memoryMb: number }>
  /** SIGKILL; settles with `exited`. Safe more than once. */
  kill(): Promise<void>
}

/** A machine could not be made: the host’s doing. */
export class MachineError extends Error {
  override name = 'MachineError'
}

export interface Driver extends AsyncDisposable {
  readonly name: 'qemu' | 'firecracker'
  /** Such as `QEMU 7.2.22 (emulation)` or `Firecracker 1.10.1 (KVM)`. */
  readonly version: string
  readonly accelerator: 'kvm' | 'emulation'
  readonly rootFormat: 'erofs' | 'ext4'
  readonly kernelFormat: 'vmlinux' | 'bzImage' | 'either'
  /** What stands between the guest and the host besides the machine: `seccomp`, `unprivileged user`, … */
  readonly walls: string[]
  readonly missing: { wall: string; fix: string }[]
  /** Where the interface of the guest leads, in `Configure.network`; undefined where the shape has none. */
  guestNetwork(shape: MachineShape): { address: string; gateway: string } | undefined
  /** Starts it from its kernel, running. Throws `MachineError`. */
  boot(shape: MachineShape, options: MachineOptions): Promise<Machine>
  /** Starts it where its snapshot was taken, running. Throws `MachineError`. */
  restore(template: Template, options: MachineOptions): Promise<Machine>
  /** Host processes that are machines of this driver. */
  pids(): number[]
}

/** What a driver is told. */
export interface DriverOptions {
  /** Names what belongs to this process, such as `microvm-8f3a…`: control groups, namespaces, taps. */
  owner: string
  /** Below VULCAN_DATA_DIR, mode 0700; what is this process’s own stands in `<stateDir>/<owner>/`. */
  stateDir: string
}
