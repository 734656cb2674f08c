/** The driver `qemu`: machines of QEMU’s `microvm` board, under KVM where that runs guests, emulated elsewhere. */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { programsEnv } from '../../container/gvisor/programs.ts'
import { findProgram } from '../../container/images/processes.ts'
import { Namespace } from '../../container/network/namespace.ts'
import {
  type Driver,
  type DriverOptions,
  type Machine,
  MachineError,
  type MachineOptions,
  type MachineShape,
  type Template,
} from '../driver.ts'
import { type Holding, holdMachines } from '../owners.ts'
import { groupsOf, Users } from '../users.ts'
import {
  type Accelerator,
  type QemuVersion,
  qemuArguments,
  takesReadOnlyMemory,
  userNetwork,
} from './arguments.ts'
import { kvmDevice, probeKvm } from './kvm.ts'
import { inSmallPages } from './launch.ts'
import { QemuMachine } from './machine.ts'
import { type Processor, readProcessor } from './processor.ts'
import type { Host } from './start.ts'

export interface QemuOptions extends DriverOptions {
  /** A kernel that shows whether KVM runs guests; without one KVM is not tried. */
  kernel?: string
  /** Path of qemu-system-x86_64; looked for where Debian has programs where it is left out. */
  qemu?: string
  /** Not tried, but taken for granted. */
  accelerator?: Accelerator
  /** Path of the control group that those of all owners are in. */
  cgroupParent?: string
  /** What dead owners left is looked for this often, ms. */
  sweepMs?: number
}

const program = 'qemu-system-x86_64'
const versionMs = 10_000
/** Since it has all that is asked for here; older ones were not tried. */
const oldest = { major: 7, minor: 2 }
const execute = promisify(execFile)

/**
 * Removes what dead owners left, and finds out whether KVM works: up to 5 s at the first start after a boot of the
 * host. Throws an Error that says what is missing.
 */
export async function createQemu(options: QemuOptions): Promise<Driver> {
  const qemu = findProgram(options.qemu ?? program)
  if (qemu === undefined) throw new Error(`${options.qemu ?? program} is not here`)
  for (const tool of ['setpriv', 'nsenter'])
    if (findProgram(tool) === undefined) throw new Error(`${tool} is not here`)
  const version = await versionOf(qemu)
  await using scope = new AsyncDisposableStack()
  const holding = scope.use(await holdMachines(options))
  const processor = readProcessor()
  const nowhere = await emptyNamespace()
  if (nowhere !== undefined) scope.use(nowhere)
  const hostFor = (accelerator: Accelerator): Host => ({
    ...{ qemu, version, accelerator, owner: options.owner, cgroup: holding.cgroup, nowhere },
    model: modelOf({ version, accelerator }, processor),
    users: new Users(accelerator === 'kvm' ? groupsOf(kvmDevice) : []),
    tscKhz: processor.tscKhz,
    // What it helps against is of emulation.
    inSmallPages: accelerator === 'emulation' ? inSmallPages() : [],
  })
  const { accelerator, why } = await chooseAccelerator(options, hostFor, holding)
  const driver = new Qemu(hostFor(accelerator), why)
  const resources = scope.move()
  driver.onClose(() => resources.disposeAsync())
  return driver
}

async function versionOf(qemu: string): Promise<QemuVersion> {
  const { stdout } = await execute(qemu, ['--version'], { timeout: versionMs, env: programsEnv })
  const [, text, major, minor] = /version ((\d+)\.(\d+)[.\d]*)/.exec(stdout) ?? []
  if (text === undefined) throw new Error(`${qemu} does not say which version it is`)
  const version = { text, build: stdout, major: Number(major), minor: Number(minor) }
  if (version.major > oldest.major || (version.major === oldest.major && version.minor >= oldest.minor))
    return version
  throw new Error(`QEMU ${oldest.major}.${oldest.minor} or newer is needed, and this is ${text}`)
}

async function chooseAccelerator(
  { accelerator, kernel, stateDir }: QemuOptions,
  hostFor: (accelerator: Accelerator) => Host,
  holding: Holding,
): Promise<{ accelerator: Accelerator; why: string }> {
  if (accelerator !== undefined) return { accelerator, why: 'as told' }
  if (kernel === undefined) return { accelerator: 'emulation', why: 'there is no kernel to try KVM with' }
  const { works, why } = await probeKvm(hostFor('kvm'), kernel, join(stateDir, 'kvm.json'), holding.dir)
  return { accelerator: works ? 'kvm' : 'emulation', why }
}

/** What QEMU itself should not reach, whoever has taken it over: the host’s loopback, and anything else. */
async function emptyNamespace(): Promise<Namespace | undefined> {
  if (process.getuid?.() !== 0) return undefined
  return await Namespace.create(async () => '').catch(() => undefined)
}

/**
 * What a template made here goes with: this build of QEMU, this processor, these devices. Anything else would go on as
 * another machine in the middle of its work.
 */
function modelOf(
  { version, accelerator }: Pick<Host, 'version' | 'accelerator'>,
  processor: Processor,
): string {
  const shape = { kernel: '', initramfs: '', root: '', memoryMb: 256, vcpus: 1, network: true }
  const args = qemuArguments({
    ...{ name: '', shape, version, accelerator, isNetworkOpen: false, diskBytesPerSecond: undefined },
    start: { kind: 'restore', memory: 'file' },
  })
  const hash = createHash('sha256').update(JSON.stringify([version.build, processor.name, args]))
  return `QEMU ${version.text} ${accelerator} ${hash.digest('hex').slice(0, 16)}`
}

class Qemu implements Driver {
  readonly name = 'qemu'
  readonly version: string
  readonly accelerator: Accelerator
  readonly rootFormat = 'erofs'
  readonly kernelFormat = 'either'
  readonly walls: string[]
  readonly missing: { wall: string; fix: string }[]
  readonly #host: Host
  readonly #machines = new Set<QemuMachine>()
  readonly #making = new Set<Promise<QemuMachine>>()
  #made = 0
  #closed: Promise<void> | undefined
  #onClose: (() => Promise<void>) | undefined

  constructor(host: Host, why: string) {
    this.#host = host
    this.accelerator = host.accelerator
    this.version = `QEMU ${host.version.text} (${host.accelerator === 'kvm' ? 'KVM' : 'emulation'})`
    const asRoot = 'run the runner as root'
    const walls: [wall: string, isThere: boolean, fix: string][] = [
      ['hardware virtualisation', host.accelerator === 'kvm', `a host whose KVM runs guests: ${why}`],
      ['seccomp', true, ''],
      ['no new privileges', true, ''],
      ['unprivileged user', host.users.areOthers, asRoot],
      [
        'empty network namespace',
        host.nowhere !== undefined,
        host.users.areOthers ? 'Debian’s package iproute2' : asRoot,
      ],
      [
        'control groups',
        host.cgroup !== undefined,
        host.users.areOthers ? 'see docs/containers.md: control groups' : asRoot,
      ],
      [
        'read-only templates',
        host.users.areOthers && takesReadOnlyMemory(host.version),
        'root, and QEMU 8.2 or newer',
      ],
    ]
    this.walls = ['virtual machine', ...walls.filter(([, isThere]) => isThere).map(([wall]) => wall)]
    this.missing = walls.filter(([, isThere]) => !isThere).map(([wall, , fix]) => ({ wall, fix }))
  }

  onClose(release: () => Promise<void>): void {
    this.#onClose = release
  }

  guestNetwork({ network }: MachineShape): { address: string; gateway: string } | undefined {
    return network ? userNetwork : undefined
  }

  boot(shape: MachineShape, options: MachineOptions): Promise<Machine> {
    return this.#make((id) => QemuMachine.boot(this.#host, id, shape, options))
  }

  restore(template: Template, options: MachineOptions): Promise<Machine> {
    return this.#make((id) => QemuMachine.restore(this.#host, id, template, options))
  }

  async #make(make: (id: string) => Promise<QemuMachine>): Promise<Machine> {
    if (this.#closed !== undefined) throw new MachineError('the driver is closed')
    const making = make(`m${++this.#made}`)
    this.#making.add(making)
    try {
      const machine = await making
      this.#machines.add(machine)
      void machine.exited.then(() => this.#machines.delete(machine))
      return machine
    } finally {
      this.#making.delete(making)
    }
  }

  pids(): number[] {
    return [...this.#machines].map(({ pid }) => pid)
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    const killAll = () => Promise.all([...this.#machines].map((machine) => machine.kill()))
    await killAll()
    // Those that were not there yet.
    await Promise.allSettled(this.#making)
    await killAll()
    await this.#onClose?.()
  }
}
