/** The command line of QEMU, as a plain table: the same for a template and for what is restored from it but for memory. */
import type { MachineShape } from '../driver.ts'

export type Accelerator = 'kvm' | 'emulation'

export interface QemuVersion {
  /** As it says: `7.2.22`. */
  text: string
  /** All it says of itself: one version is built more than once. */
  build: string
  major: number
  minor: number
}

/**
 * What QEMU is started with beside 0 to 2. It opens nothing by a path of the host: so it needs no right to any, and
 * sockets have no names that could be too long, be left behind or be connected to by others.
 */
export const descriptors = {
  qmp: 3,
  agent: 4,
  console: 5,
  root: 6,
  job: 7,
  memory: 8,
  /** Restored: device state. */
  state: 9,
  /** Booted: the directory in which a snapshot’s stream is taken. */
  dir: 9,
  kernel: 10,
  initramfs: 11,
} as const

/** Name of the socket in `descriptors.dir`. */
export const streamName = 's'

export interface QemuLine {
  /** Told in the list of processes; the janitor goes by it. */
  name: string
  shape: MachineShape
  version: QemuVersion
  accelerator: Accelerator
  start: { kind: 'boot'; tscKhz: number | undefined } | { kind: 'restore'; memory: TemplateMemory }
  /** The interface leads into the network namespace that QEMU is in, or nowhere. */
  isNetworkOpen: boolean
  diskBytesPerSecond: number | undefined
}

/** Where the memory of a template is: a file that all machines share until they write, or in the stream with the rest. */
export type TemplateMemory = 'file' | 'stream'

/**
 * Virtual core of an emulated machine: x86-64-v2, which programs of today ask for, and no more, since what is wider is
 * slow to emulate. With the host’s random generator, so that each kernel reseeds itself with what no other has; and a
 * timer that says it runs always (ARAT), without which Linux ticks on while it is idle and knows no time between ticks.
 */
const emulatedCpu = 'Nehalem,+rdrand,+rdseed,+arat,vme=off'

/**
 * Translated code that is kept, MiB. QEMU’s own default is a GiB. Part of `overheadMb`.
 */
const translatedMb = 64

/** Of the VMM beside the machine’s memory, MiB: 35 were measured without translated code. */
export const overheadMb = 128 + translatedMb

/** Threads of QEMU: one for each virtual core, up to 64 for files, and its own. */
export const threadsOf = (shape: MachineShape) => shape.vcpus + 96

/** What the guest’s interface has, and where it leads: QEMU’s user network (`-netdev user`). */
export const userNetwork = { address: '10.0.2.15/24', gateway: '10.0.2.2' } as const

/** Since 8.2 memory can be mapped privately from a file that may only be read. */
export const takesReadOnlyMemory = ({ major, minor }: QemuVersion) => major > 8 || (major === 8 && minor >= 2)

/** Since 9.1 `fd:` is for sockets, and `file:` for files. */
const takesStateAsFile = ({ major, minor }: QemuVersion) => major > 9 || (major === 9 && minor >= 1)

/** How the state is named in `migrate-incoming`. */
export const incomingUri = (version: QemuVersion) =>
  takesStateAsFile(version) ? `file:/dev/fdset/${fdsets.state}` : `fd:${descriptors.state}`

const fdsets = { root: 1, job: 2, state: 3 } as const

export function qemuArguments(line: QemuLine): string[] {
  const { shape, start } = line
  return [
    // Nothing but what stands here, whatever this build or its configuration would add.
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-name', line.name],
    ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
    ...[
      '-M',
      'microvm,acpi=on,ioapic2=off,pit=on,pic=on,rtc=on,memory-backend=mem,dump-guest-core=off,mem-merge=off',
    ],
    ...accelerate(line.accelerator),
    ...['-cpu', line.accelerator === 'kvm' ? 'host' : emulatedCpu],
    ...['-m', `${shape.memoryMb}`, '-smp', `${shape.vcpus}`],
    ...['-object', memory(line)],
    // A snapshot without the state that the machine was in: what is restored runs at once.
    ...['-global', 'migration.store-global-state=off'],
    ...(start.kind === 'boot' ? kernel(line.accelerator, start.tscKhz) : ['-incoming', 'defer']),
    // What is in a set is no descriptor of its own any more.
    ...(start.kind === 'restore' && incomingUri(line.version).startsWith('file:') ? fdset('state') : []),
    ...['-chardev', `socket,id=qmp,fd=${descriptors.qmp}`, '-mon', 'chardev=qmp,mode=control'],
    ...['-chardev', `socket,id=console,fd=${descriptors.console}`, '-serial', 'chardev:console'],
    ...throttle(line.diskBytesPerSecond),
    ...drive('root', line.diskBytesPerSecond),
    ...drive('job', line.diskBytesPerSecond),
    ...['-device', 'virtio-serial-device,max_ports=2'],
    ...['-chardev', `socket,id=agent,fd=${descriptors.agent}`],
    ...['-device', 'virtserialport,chardev=agent,name=vulcan'],
    ...['-object', 'rng-builtin,id=rng', '-device', 'virtio-rng-device,rng=rng'],
    ...(shape.network ? network(line.isNetworkOpen) : []),
  ]
}

const accelerate = (accelerator: Accelerator) =>
  accelerator === 'kvm' ? ['-accel', 'kvm'] : ['-accel', `tcg,thread=multi,tb-size=${translatedMb}`]

/**
 * Memory of a machine that boots is a file, which becomes the template’s; what is restored maps that privately. The
 * identifier is what it is called in a snapshot, and so the same everywhere.
 */
function memory({ shape, start, version }: QemuLine): string {
  const size = `id=mem,size=${shape.memoryMb}M`
  if (start.kind === 'restore' && start.memory === 'stream') return `memory-backend-ram,${size}`
  const file = `memory-backend-file,${size},mem-path=/proc/self/fd/${descriptors.memory}`
  if (start.kind === 'boot') return `${file},share=on`
  return `${file},share=off${takesReadOnlyMemory(version) ? ',readonly=on,rom=off' : ''}`
}

/**
 * A kernel that panics or reboots ends QEMU. Emulated time is too rough for the kernel’s measurement of its time stamp
 * counter, which then fails and leaves a machine without a clock: so it is told what the counter runs at, and
 * does not look whether the counter keeps time: there is but a rougher clock to compare it with.
 */
function kernel(accelerator: Accelerator, tscKhz: number | undefined): string[] {
  const words = ['console=ttyS0', 'quiet', 'panic=-1', 'reboot=t', 'random.trust_cpu=on']
  if (accelerator === 'emulation') words.push('no_timer_check', 'mitigations=off')
  if (accelerator === 'emulation' && tscKhz !== undefined)
    words.push('tsc=reliable', `tsc_early_khz=${tscKhz}`)
  return [
    ...[
      '-kernel',
      `/proc/self/fd/${descriptors.kernel}`,
      '-initrd',
      `/proc/self/fd/${descriptors.initramfs}`,
    ],
    ...['-append', words.join(' ')],
  ]
}

/** QEMU takes the descriptor itself away. */
const fdset = (name: keyof typeof fdsets) => ['-add-fd', `fd=${descriptors[name]},set=${fdsets[name]}`]

const throttle = (bytesPerSecond: number | undefined) =>
  bytesPerSecond === undefined
    ? []
    : ['-object', `throttle-group,id=disk,x-bps-total=${Math.max(1, Math.round(bytesPerSecond))}`]

/**
 * Through the host’s page cache, which is where the runner’s writes to a job drive are at once, and without locks,
 * which would keep the runner from writing.
 */
function drive(name: 'root' | 'job', bytesPerSecond: number | undefined): string[] {
  const isReadOnly = { 'read-only': true, 'auto-read-only': false }
  const file = {
    ...{ driver: 'file', filename: `/dev/fdset/${fdsets[name]}`, locking: 'off', aio: 'threads' },
    ...{ ...isReadOnly, cache: { direct: false, 'no-flush': true } },
  }
  const raw = { driver: 'raw', ...isReadOnly, file }
  const node =
    bytesPerSecond === undefined
      ? raw
      : { driver: 'throttle', 'throttle-group': 'disk', ...isReadOnly, file: raw }
  return [
    ...fdset(name),
    ...['-blockdev', JSON.stringify({ 'node-name': name, ...node })],
    ...['-device', `virtio-blk-device,drive=${name},serial=${name}`],
  ]
}

/** Never the host’s own network: without a namespace it is shut (`restrict`), and there is nothing in it. */
const network = (isOpen: boolean) => [
  ...['-netdev', `user,id=net,ipv6=off,restrict=${isOpen ? 'off' : 'on'}`],
  ...['-device', 'virtio-net-device,netdev=net,mac=52:54:00:12:34:56'],
]
