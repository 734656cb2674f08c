/** The driver `firecracker`: machines of Firecracker under KVM, each in a jail of its own. */
import { execFile } from 'node:child_process'
import { closeSync, constants, openSync } from 'node:fs'
import { chmod, copyFile, mkdir } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import type { Cgroup } from '../../container/gvisor/cgroups.ts'
import { programsEnv } from '../../container/gvisor/programs.ts'
import { findProgram } from '../../container/images/processes.ts'
import { Namespace } from '../../container/network/namespace.ts'
import {
  type Driver,
  type DriverOptions,
  MachineError,
  type MachineOptions,
  type MachineShape,
  type Template,
} from '../driver.ts'
import { holdMachines } from '../owners.ts'
import type { Request } from './api.ts'
import { drawIdentity, type Identity, jailed, placeJobDrive, SharedFiles } from './jailer.ts'
import { FirecrackerMachine } from './machine.ts'
import { addressesOf, Taps, tapsDir } from './network.ts'
import { bootRequests, restoreRequests, trialRequests } from './requests.ts'

export interface FirecrackerOptions extends DriverOptions {
  /** Path of the binary; looked for on PATH where it is left out. */
  firecracker?: string
  /** Path of the jailer of the same version; left out: the one beside `firecracker`, else on PATH. */
  jailer?: string
  /** A kernel (vmlinux) that is booted to see whether this host’s KVM runs guests. Left out: it is believed. */
  kernel?: string
  /** Path of the control group that those of all owners are in. */
  cgroupParent?: string
  /** Of each machine with a network, in each direction. */
  networkBytesPerSecond?: number
}

export interface FirecrackerDriver extends Driver {
  boot(shape: MachineShape, options: MachineOptions): Promise<FirecrackerMachine>
  restore(template: Template, options: MachineOptions): Promise<FirecrackerMachine>
}

const execute = promisify(execFile)
const versionMs = 10_000
/** The first with all that is asked of it: `network_overrides` of `PUT /snapshot/load`. */
const leastVersion = [1, 12]
const tools = ['setpriv', 'nsenter', 'unshare', 'ip', 'nft', 'mkfifo', 'tee', 'cat']
/** The first word of the kernel comes within some 50 ms where KVM runs guests; ms. */
const trialMs = 5_000
const trialMemoryMb = 128
/** Of the VMM and of what the kernel keeps for it, beside the guest’s memory. */
const overheadMb = 96
/** Threads of the VMM, beside one for each vcpu; the jailer is there for a moment too. */
const threads = 16
const mib = 2 ** 20

/**
 * Removes what dead owners left, and boots a kernel to see whether this host can. Throws an Error that says what is
 * missing.
 */
export async function createFirecracker(options: FirecrackerOptions): Promise<FirecrackerDriver> {
  const { owner, stateDir, kernel, cgroupParent = '/vulcan', networkBytesPerSecond } = options
  const { version, ...programs } = await findPrograms(options)
  openKvm()
  await using scope = new AsyncDisposableStack()
  const { dir, cgroup } = scope.use(await holdMachines({ owner, stateDir, cgroupParent }))
  if (cgroup === undefined) throw new Error(`control groups cannot be made below ${cgroupParent}`)
  const firecracker = join(dir, 'firecracker')
  // Its name is part of every jail’s path, and an upgrade must not change it under templates.
  await copyFile(programs.firecracker, firecracker, constants.COPYFILE_FICLONE)
  await chmod(firecracker, 0o755)
  await mkdir(join(dir, 'jails'), { mode: 0o700 })
  const nowhere = scope.use(await Namespace.create(async () => ''))
  const driver = new Firecracker(version, {
    firecracker,
    jailer: programs.jailer,
    base: join(dir, 'jails'),
    cgroup,
    nowhere,
    files: new SharedFiles(join(dir, 'files')),
    taps: new Taps(tapsDir(dir), owner),
    networkBytesPerSecond,
  })
  scope.defer(() => driver.close())
  if (kernel !== undefined) await driver.tryKvm(kernel)
  const resources = scope.move()
  driver.onClose(() => resources.disposeAsync())
  return driver
}

interface Programs {
  firecracker: string
  jailer: string
  /** Such as `1.16.1`. */
  version: string
}

/** Throws an Error that says what is missing. */
async function findPrograms({ firecracker = 'firecracker', jailer }: FirecrackerOptions): Promise<Programs> {
  if (process.getuid?.() !== 0) throw new Error('Firecracker’s jailer works only where the runner is root')
  const found = findProgram(firecracker)
  if (found === undefined) throw new Error(`${firecracker} is not found; see docs/firecracker.md`)
  const beside = join(dirname(found), basename(found).replace('firecracker', 'jailer'))
  const itsJailer =
    jailer === undefined ? (findProgram(beside) ?? findProgram('jailer')) : findProgram(jailer)
  if (itsJailer === undefined) throw new Error(`no jailer beside ${found}, nor on PATH`)
  const missing = tools.filter((tool) => findProgram(tool) === undefined)
  if (missing.length > 0) throw new Error(`not found: ${missing.join(', ')}`)
  const [version, jailerVersion] = await Promise.all([versionOf(found), versionOf(itsJailer)])
  const [major = 0, minor = 0] = version.split('.').map(Number)
  if (major < leastVersion[0]! || (major === leastVersion[0] && minor < leastVersion[1]!))
    throw new Error(`Firecracker ${version} is too old: ${leastVersion.join('.')} or later is needed`)
  if (version !== jailerVersion)
    throw new Error(
      `the jailer is of version ${jailerVersion}, Firecracker of ${version}: they belong together`,
    )
  return { firecracker: found, jailer: itsJailer, version }
}

async function versionOf(program: string): Promise<string> {
  const { stdout } = await execute(program, ['--version'], { timeout: versionMs, env: programsEnv })
  const version = /v(\d+\.\d+\.\d+)/.exec(stdout)?.[1]
  if (version === undefined) throw new Error(`${program} does not say its version`)
  return version
}

function openKvm(): void {
  try {
    closeSync(openSync('/dev/kvm', 'r+'))
  } catch (error) {
    throw new Error(`KVM cannot be used: ${(error as Error).message}`, { cause: error })
  }
}

interface Host {
  firecracker: string
  jailer: string
  base: string
  cgroup: Cgroup
  /** Where machines without a network are. */
  nowhere: Namespace
  files: SharedFiles
  taps: Taps
  networkBytesPerSecond: number | undefined
}

/** A machine to be made. */
interface Plan {
  shape: MachineShape
  options: Pick<MachineOptions, 'netns' | 'cpu'>
  /** Names in the jail, and what is there. */
  files: Record<string, string>
  jobDrive: string | undefined
  requests(tap: string | undefined): Request[]
}

class Firecracker implements FirecrackerDriver {
  readonly name = 'firecracker'
  readonly version: string
  readonly accelerator = 'kvm'
  readonly rootFormat = 'ext4'
  readonly kernelFormat = 'vmlinux'
  readonly walls = [
    'virtual machine',
    'seccomp',
    'unprivileged user',
    'private namespaces',
    'own root directory',
    'control groups',
  ]
  readonly missing: { wall: string; fix: string }[] = []
  readonly #host: Host
  readonly #machines = new Set<FirecrackerMachine>()
  readonly #starting = new Set<Promise<FirecrackerMachine>>()
  #made = 0
  #closed: Promise<void> | undefined
  #onClose: (() => Promise<void>) | undefined

  constructor(version: string, host: Host) {
    this.version = `Firecracker ${version} (KVM)`
    this.#host = host
  }

  onClose(release: () => Promise<void>): void {
    this.#onClose = release
  }

  guestNetwork({ network }: MachineShape) {
    return network ? addressesOf(0) : undefined
  }

  async boot(shape: MachineShape, options: MachineOptions): Promise<FirecrackerMachine> {
    return await this.#start({
      shape,
      options,
      files: {
        [jailed.kernel]: shape.kernel,
        [jailed.initramfs]: shape.initramfs,
        [jailed.root]: shape.root,
      },
      jobDrive: options.jobDrive,
      requests: (tap) => bootRequests(shape, tap, this.#rates(options)),
    })
  }

  async restore({ shape, dir }: Template, options: MachineOptions): Promise<FirecrackerMachine> {
    return await this.#start({
      shape,
      options,
      files: {
        [jailed.root]: shape.root,
        [jailed.memory]: join(dir, 'memory'),
        [jailed.state]: join(dir, 'state'),
      },
      jobDrive: options.jobDrive,
      requests: (tap) => restoreRequests(tap, this.#rates(options)),
    })
  }

  pids(): number[] {
    return [...this.#machines].map(({ pid }) => pid)
  }

  /** Throws an Error where a kernel says nothing: KVM may open, and still run no guest. */
  async tryKvm(kernel: string): Promise<void> {
    const shape = { kernel, initramfs: '', root: '', memoryMb: trialMemoryMb, vcpus: 1, network: false }
    const machine = await this.#start({
      shape,
      options: { netns: undefined },
      files: { [jailed.kernel]: kernel },
      jobDrive: undefined,
      requests: () => trialRequests(shape),
    })
    let over = false
    machine.exited.then(() => {
      over = true
    })
    try {
      for (const until = performance.now() + trialMs; !machine.console().includes('Linux version'); ) {
        if (over) throw new Error(`KVM of this host runs no guest: it ended at once (${machine.log()})`)
        if (performance.now() > until)
          throw new Error(`KVM of this host runs no guest: no word of a kernel within ${trialMs / 1000} s`)
        await sleep(10)
      }
    } finally {
      await machine.kill()
    }
  }

  #rates({ diskBytesPerSecond }: MachineOptions) {
    return { disk: diskBytesPerSecond, network: this.#host.networkBytesPerSecond }
  }

  async #start(plan: Plan): Promise<FirecrackerMachine> {
    if (this.#closed !== undefined) throw new MachineError('the driver is closed')
    const starting = this.#make(plan).catch((cause) => {
      if (cause instanceof MachineError) throw cause
      throw new MachineError(`Firecracker has no machine: ${(cause as Error).message}`, { cause })
    })
    this.#starting.add(starting)
    try {
      const machine = await starting
      this.#machines.add(machine)
      machine.exited.then(() => this.#machines.delete(machine))
      return machine
    } finally {
      this.#starting.delete(starting)
    }
  }

  async #make({ shape, options, files, jobDrive, requests }: Plan): Promise<FirecrackerMachine> {
    const { firecracker, jailer, base, cgroup, nowhere, taps } = this.#host
    const id = `m${++this.#made}`
    const identity = drawIdentity()
    const own = cgroup.child(id)
    await using scope = new AsyncDisposableStack()
    const tap = shape.network ? scope.use(await taps.open(options.netns, identity)) : undefined
    scope.defer(() => own.remove().catch(() => {}))
    await own.make()
    await own.limit({
      memoryBytes: (shape.memoryMb + overheadMb) * mib,
      cpu: options.cpu,
      tasks: shape.vcpus + threads,
    })
    const resources = scope.move()
    return await FirecrackerMachine.start({
      ...{ firecracker, jailer, id, base, identity, shape, cgroup: own },
      netns: tap?.netns ?? nowhere.path,
      // A snapshot holds all memory in one file.
      fileBytes: (shape.memoryMb + 16) * mib,
      network: tap && { address: tap.address, gateway: tap.gateway },
      fill: (root) => this.#fill(root, files, jobDrive, identity),
      requests: requests(tap?.name),
      release: () => resources.disposeAsync(),
    })
  }

  async #fill(root: string, files: Plan['files'], jobDrive: string | undefined, identity: Identity) {
    for (const [name, file] of Object.entries(files)) {
      await mkdir(dirname(join(root, name)), { recursive: true })
      await this.#host.files.place(file, join(root, name))
    }
    if (jobDrive !== undefined) await placeJobDrive(jobDrive, join(root, jailed.job), identity)
  }

  /** Ends all machines. */
  async close(): Promise<void> {
    const killAll = () => Promise.all([...this.#machines].map((machine) => machine.kill()))
    await killAll()
    // Those that were not there yet.
    await Promise.allSettled(this.#starting)
    await killAll()
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#onClose?.() ?? this.close()
    return this.#closed
  }
}
