/** The engine `microvm`: boxes are virtual machines, begun from snapshots that are made once. */
import { mkdir, open, rm, stat } from 'node:fs/promises'
import { availableParallelism, cpus } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { driveOf } from '../../rootfs/index.ts'
import type { LimitReport } from '../../shared/backends.ts'
import type { MachineNetwork } from '../../shared/machine.ts'
import { machineProtocol } from '../../shared/machine.ts'
import { type Box, BoxError, type BoxSpec, type Engine } from '../container/engine.ts'
import { unmeasured } from '../container/phases.ts'
import type { RunnerMetrics } from '../metrics.ts'
import { MicrovmBox, watchMs } from './box.ts'
import { machineMemoryMb, machineVcpus } from './classes.ts'
import { type Driver, jobDriveBytes, type MachineShape } from './driver.ts'
import { Medians } from './medians.ts'
import { type Left, Templates } from './templates.ts'

/**
 * A process that was exercised goes on for a moment: it clears up, and so does its kernel. Whatever it had left to do
 * at the snapshot, each machine restored from that would do; ms.
 */
const clearUpMs = 1_000

export interface MicrovmEngineOptions {
  /** The engine’s from here on. */
  driver: Driver
  /** Absolute; their content never changes. */
  parts: { kernel: string; initramfs: string }
  /** `<stateDir>/<owner>`, which the driver has made. */
  dir: string
  owner: string
  cacheDir: string
  /** What templates may take on disk, MiB. */
  budgetMb: number
  /** False: every machine is started from its kernel. */
  snapshots: boolean
  metrics?: RunnerMetrics | undefined
}

export class MicrovmEngine implements Engine {
  readonly version: string
  readonly walls: string[]
  readonly missing: Engine['missing']
  /** They hold by the machine’s own kernel and its size; that of cores by the host’s. */
  readonly limits: LimitReport
  readonly egress: Engine['egress'] = ['none', 'all', 'allowlist']
  readonly resumes: boolean
  readonly #options: MicrovmEngineOptions
  readonly #templates: Templates
  readonly #boxes = new Set<MicrovmBox>()
  readonly #making = new Set<Promise<unknown>>()
  readonly #watch: NodeJS.Timeout
  /** What tells one host, VMM or kernel from another: a snapshot is of use on no other. */
  readonly #identity: unknown
  readonly #medians = new Medians()
  readonly #total = { machines_booted: 0, machines_restored: 0 }
  #made = 0
  #closed: Promise<void> | undefined

  static async open(options: MicrovmEngineOptions): Promise<MicrovmEngine> {
    const { cacheDir, dir, parts, driver, budgetMb } = options
    await mkdir(join(dir, 'boxes'), { recursive: true, mode: 0o700 })
    const templates = await Templates.open(join(cacheDir, 'microvm', 'templates'), budgetMb)
    const identity = [
      ...[machineProtocol, driver.name, driver.version, driver.accelerator, cpus()[0]?.model],
      ...(await Promise.all([parts.kernel, parts.initramfs].map(identityOf))),
    ]
    return new MicrovmEngine(options, templates, identity)
  }

  private constructor(options: MicrovmEngineOptions, templates: Templates, identity: unknown) {
    const { driver, metrics } = options
    this.#options = options
    metrics?.cache('templates', () => templates.bytes)
    this.#templates = templates
    this.#identity = identity
    this.resumes = options.snapshots
    this.version = driver.version
    this.walls = [...new Set(['virtual machine', ...driver.walls])]
    this.missing = driver.missing
    const isShared = driver.walls.some((wall) => wall.includes('control group'))
    this.limits = {
      ...{ memory: 'enforced', pids: 'enforced', file_size: 'enforced', disk: 'enforced' },
      cpu: isShared ? 'enforced' : 'not enforced',
    }
    this.#watch = setInterval(() => {
      for (const box of this.#boxes) box.watch()
    }, watchMs)
    this.#watch.unref()
  }

  async create(spec: BoxSpec): Promise<Box> {
    if (this.#closed !== undefined) throw new BoxError('engine', 'the engine is closed')
    const making = this.#create(spec)
    this.#making.add(making)
    try {
      return await making
    } catch (error) {
      if (error instanceof BoxError || (error as Error).name === 'ImageError') throw error
      throw new BoxError('engine', (error as Error).message, { cause: error })
    } finally {
      this.#making.delete(making)
    }
  }

  async #create(spec: BoxSpec): Promise<MicrovmBox> {
    const shape = await this.#shapeOf(spec)
    if (!this.resumes) return await this.#begin(spec, shape)
    const key = this.#keyOf(spec, shape)
    for (const isLast of [false, true]) {
      const kept = await this.#template(spec, shape, key)
      try {
        return await this.#begin(spec, shape, kept)
      } catch (error) {
        // A snapshot that cannot be restored, a full disk when it was made for instance, must not be in the way for ever.
        if (kept.fresh || isLast || this.#closed !== undefined) throw error
        await this.#templates.drop(key)
      }
    }
    throw new Error('unreachable')
  }

  /** The template of a key; where it has to be made first, that is a boot. */
  async #template({ phases = unmeasured, ...spec }: BoxSpec, shape: MachineShape, key: string) {
    const boot = phases.begin('boot machine')
    try {
      const kept = await this.#templates.get(key, (dir) => this.#make(spec, shape, dir))
      this.#options.metrics?.templateAsked(kept.fresh ? 'miss' : 'hit')
      if (kept.fresh) boot.done(() => ({ 'vulcan.machine.template': 'made' }))
      else boot.drop()
      return kept
    } catch (error) {
      boot.fail(error)
      throw error
    }
  }

  async #shapeOf({ image, limits, network, phases = unmeasured }: BoxSpec): Promise<MachineShape> {
    const { driver, parts, cacheDir } = this.#options
    let unpacking: ReturnType<typeof phases.begin> | undefined
    const unpacked = () => {
      unpacking = phases.begin('unpack image')
      return image.root()
    }
    const drive = driveOf({ digest: image.digest, root: unpacked }, driver.rootFormat, cacheDir)
    const root = await drive.catch((error) => {
      unpacking?.fail(error)
      throw error
    })
    unpacking?.done()
    return {
      ...parts,
      root,
      memoryMb: machineMemoryMb(limits.memoryMb),
      vcpus: machineVcpus(limits.cpu, availableParallelism()),
      network: network !== undefined,
    }
  }

  #keyOf({ image, template, argv, env, cwd, user, limits }: BoxSpec, shape: MachineShape): string {
    const { memoryMb, vcpus, network } = shape
    const { memoryMb: limitMb, pids, diskMb, fileBytes } = limits
    const process =
      template === undefined
        ? null
        : [template.key, argv, Object.entries(env).sort(), cwd, user, limitMb, pids, diskMb, fileBytes]
    return Templates.key([this.#identity, image.digest, memoryMb, vcpus, network, process])
  }

  /** Boots a machine, brings it where others are to begin, and writes it down. */
  async #make(spec: BoxSpec, shape: MachineShape, dir: string): Promise<Left> {
    const { template } = spec
    const { phases: _, ...rest } = spec
    const bare = { ...rest, network: undefined, ...(template === undefined ? { mounts: [] } : {}) }
    const box = await this.#begin(bare, shape, undefined, true)
    try {
      if (template !== undefined) {
        await template.exercise(box)
        await sleep(clearUpMs)
      }
      return await box.snapshot(dir)
    } finally {
      await box.remove()
    }
  }

  /** Starts a machine, and takes its box to where its process can be started or goes on. */
  async #begin(
    spec: BoxSpec,
    shape: MachineShape,
    kept?: { dir: string; left: Left; fresh: boolean },
    isTemplate = false,
  ): Promise<MicrovmBox> {
    const { phases = unmeasured } = spec
    const begin = () => this.#beginNow(spec, shape, kept, isTemplate)
    return await phases.measure(kept === undefined ? 'boot machine' : 'restore machine', begin, () => ({
      'vulcan.machine.vmm': this.#options.driver.version,
    }))
  }

  async #beginNow(
    spec: BoxSpec,
    shape: MachineShape,
    kept: { dir: string; left: Left; fresh: boolean } | undefined,
    isTemplate: boolean,
  ): Promise<MicrovmBox> {
    const { driver, dir: base, owner, metrics } = this.#options
    const id = `b${++this.#made}`
    const dir = join(base, 'boxes', id)
    const jobDrive = join(dir, 'job')
    await mkdir(dir, { mode: 0o700 })
    let box: MicrovmBox | undefined
    try {
      {
        await using file = await open(jobDrive, 'wx', 0o644)
        await file.truncate(jobDriveBytes)
      }
      const options = {
        ...{ dir, jobDrive, netns: spec.network?.path, ahead: spec.ahead === true },
        // Making a template is our doing, and not held to the share that the user’s code has.
        ...(isTemplate ? {} : { cpu: spec.limits.cpu }),
      }
      const began = performance.now()
      const machine =
        kept === undefined
          ? await driver.boot(shape, options)
          : await driver.restore({ shape, dir: kept.dir }, options)
      const made: MicrovmBox = new MicrovmBox({
        ...{ name: `${owner}-${id}`, dir, jobDrive, machine, spec, isTemplate },
        left: kept?.left,
        vmm: driver.version,
        start: kept === undefined || kept.fresh ? 'boot' : 'restore',
        network: this.#networkOf(spec, shape),
        onRemoved: (ms) => {
          this.#boxes.delete(made)
          this.#medians.add('cleanup_ms', ms)
        },
        onRoundTrip: (ms) => {
          this.#medians.add('round_trip_ms', ms)
          metrics?.channelRoundTrip(ms / 1_000)
        },
      })
      box = made
      this.#boxes.add(box)
      await box.prepare()
      this.#total[kept === undefined ? 'machines_booted' : 'machines_restored']++
      const ms = performance.now() - began
      this.#medians.add(kept === undefined ? 'boot_ms' : 'restore_ms', ms)
      if (kept === undefined) metrics?.machineBooted(ms / 1_000)
      else metrics?.machineRestored(ms / 1_000)
      if (this.#closed !== undefined) throw new BoxError('engine', 'the engine is closed')
      return box
    } catch (error) {
      if (box !== undefined) await box.remove()
      else await rm(dir, { recursive: true, force: true })
      throw error
    }
  }

  #networkOf({ network }: BoxSpec, shape: MachineShape): MachineNetwork | null {
    const guest = this.#options.driver.guestNetwork(shape)
    if (network === undefined || guest === undefined) return null
    return { ...guest, nameservers: network.nameservers, hosts: network.hosts }
  }

  metrics(): Record<string, number> {
    const all = [...this.#boxes]
    const paused = all.filter(({ frozen }) => frozen).length
    return {
      ...{ machines_active: all.length - paused, machines_paused: paused },
      ...this.#total,
      ...this.#medians.all(),
    }
  }

  /** Host processes that are machines. */
  pids(): number[] {
    return this.#options.driver.pids()
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    clearInterval(this.#watch)
    const removeAll = () => Promise.all([...this.#boxes].map((box) => box.remove()))
    await removeAll()
    await Promise.allSettled(this.#making)
    await removeAll()
    await this.#options.driver[Symbol.asyncDispose]()
  }
}

async function identityOf(path: string): Promise<unknown> {
  const { size, mtimeMs } = await stat(path)
  return [path, size, mtimeMs]
}
