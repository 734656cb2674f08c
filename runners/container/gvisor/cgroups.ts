/**
 * The control groups that hold a box on the host. Version 1 keeps a tree per controller, version 2 one tree; both are
 * served by the files that the kernel documents (admin-guide/cgroup-v1, admin-guide/cgroup-v2.rst).
 */
import { existsSync, readFileSync, realpathSync, statfsSync } from 'node:fs'
import { mkdir, readdir, readFile, rmdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { DiskMeter } from '../disk.ts'
import { KeptFiles } from '../kept-files.ts'

export interface CgroupLimits {
  memoryBytes: number
  /** In cores; undefined: as many as there are. */
  cpu: number | undefined
  /** Processes and threads of the host. */
  tasks: number
}

export interface CgroupUsage {
  cpuMs: number
  memoryBytes: number
  /** Null: this kernel does not keep it. */
  memoryPeakBytes: number | null
  oomKills: number
}

const mountPoint = '/sys/fs/cgroup'
/** CGROUP2_SUPER_MAGIC of linux/magic.h. */
const version2Magic = 0x63677270
/** Of version 1: where limits and counters are, and what kills and freezes whole trees. */
const controllers = ['memory', 'cpu', 'cpuacct', 'pids', 'freezer'] as const
const delegated = ['memory', 'cpu', 'pids']
/** Of version 2, where the kernel has it: what counts bytes of disks. */
const counting = 'io'
/** The period over which a quota is counted, µs: the kernel’s own default. */
const periodUs = 100_000
/** The kernel refuses less. */
const leastQuotaUs = 1_000
/** Killing waits for memory to be given back. */
const settleMs = 10_000
/** Freezing waits for system calls to end. */
const freezeMs = 3_000
const refreezeMs = 30

/** The trees of this host. */
export interface Hierarchy {
  version: 1 | 2
  mount: string
  /** Of version 1 one for each controller, those mounted together once; of version 2 the only one. */
  roots: string[]
}

/** Throws where this host has none that can be used; the message says what is wrong. */
export function findHierarchy(): Hierarchy {
  if (statfsSync(mountPoint).type === version2Magic)
    return { version: 2, mount: mountPoint, roots: [mountPoint] }
  const missing = controllers.filter((controller) => !existsSync(join(mountPoint, controller)))
  if (missing.length > 0)
    throw new Error(
      `${mountPoint} has no ${missing.join(', ')}: neither cgroup version 2 nor version 1 is whole`,
    )
  const roots = controllers.map((controller) => realpathSync(join(mountPoint, controller)))
  return { version: 1, mount: mountPoint, roots: [...new Set(roots)] }
}

/** One group of a tree, or the group of each tree, under the same path. */
export class Cgroup {
  readonly path: string
  readonly #hierarchy: Hierarchy
  #kept: KeptFiles | undefined

  /** `path` begins with a slash and is counted from the root of each tree. */
  constructor(hierarchy: Hierarchy, path: string) {
    this.#hierarchy = hierarchy
    this.path = path
  }

  get #dirs(): string[] {
    return this.#hierarchy.roots.map((root) => join(root, this.path))
  }

  #file(controller: (typeof controllers)[number], name: string): string {
    const { version, mount } = this.#hierarchy
    return version === 1 ? join(mount, controller, this.path, name) : join(mount, this.path, name)
  }

  get #doors(): string[] {
    return this.#dirs.map((dir) => join(dir, 'cgroup.procs'))
  }

  /**
   * Takes a process in with what it has started by now. Takes the kernel some ms, which it spends waiting. Throws
   * where there is no such process.
   */
  async join(pid: number): Promise<void> {
    // The wait is in the first: the others find it done.
    for (const door of this.#doors) await writeFile(door, String(pid))
  }

  child(name: string): Cgroup {
    return new Cgroup(this.#hierarchy, `${this.path}/${name}`)
  }

  async make(): Promise<void> {
    await Promise.all(this.#dirs.map((dir) => mkdir(dir, { recursive: true })))
  }

  /** Makes it and its parents so that groups below it can be limited. */
  async makeParent(): Promise<void> {
    for (let tries = 1; ; tries++)
      try {
        await this.make()
        if (this.#hierarchy.version === 2) await this.#delegate()
        return
      } catch (error) {
        // Another process has just removed the parent, which was empty.
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT' || tries === 3) throw error
      }
  }

  /** Of version 2: a controller has to be let down step by step. */
  async #delegate(): Promise<void> {
    const enable = delegated.map((name) => `+${name}`).join(' ')
    const steps = this.path.split('/').filter(Boolean)
    for (let depth = 0; depth <= steps.length; depth++) {
      const file = join(this.#hierarchy.mount, ...steps.slice(0, depth), 'cgroup.subtree_control')
      const present = (await readFile(file, 'utf8')).trim().split(' ')
      if (!delegated.every((name) => present.includes(name))) await writeFile(file, enable)
      if (!present.includes(counting)) await writeFile(file, `+${counting}`).catch(() => {})
    }
  }

  /** Sets all limits. Throws where the kernel takes one not. */
  async limit({ memoryBytes, cpu, tasks }: CgroupLimits): Promise<void> {
    await Promise.all([
      this.#limitMemory(String(memoryBytes)),
      this.limitCpu(cpu),
      writeFile(this.#file('pids', 'pids.max'), String(tasks)),
    ])
  }

  async limitCpu(cpu: number | undefined): Promise<void> {
    const quota = cpu === undefined ? undefined : Math.max(leastQuotaUs, Math.round(cpu * periodUs))
    if (this.#hierarchy.version === 1)
      await writeFile(this.#file('cpu', 'cpu.cfs_quota_us'), String(quota ?? -1))
    else await writeFile(this.#file('cpu', 'cpu.max'), `${quota ?? 'max'} ${periodUs}`)
  }

  /** Memory with swap may never be allowed less than memory alone: growing begins with the one, shrinking with the other. */
  async #limitMemory(bytes: string): Promise<void> {
    if (this.#hierarchy.version === 2) {
      await writeFile(this.#file('memory', 'memory.max'), bytes)
      // What is swapped out would not count. Kernels without swap lack the file.
      await writeFile(this.#file('memory', 'memory.swap.max'), '0').catch(() => {})
      return
    }
    const memory = () => writeFile(this.#file('memory', 'memory.limit_in_bytes'), bytes)
    const withSwap = this.#file('memory', 'memory.memsw.limit_in_bytes')
    if (!existsSync(withSwap)) return memory()
    const grown = await writeFile(withSwap, bytes).then(
      () => true,
      () => false,
    )
    await memory()
    if (!grown) await writeFile(withSwap, bytes)
  }

  /** Host processes in it; none where it is not there. Those that another namespace hides are left out. */
  pids(): number[] {
    const found = new Set<number>()
    for (const door of this.#doors) for (const pid of lines(door).map(Number)) if (pid > 0) found.add(pid)
    return [...found]
  }

  /** What it counts stays open from now on, until that is disposed of. */
  keepOpen(): KeptFiles {
    this.#kept ??= new KeptFiles()
    return this.#kept
  }

  #read(file: string): string {
    return this.#kept?.read(file) ?? readFileSync(file, 'latin1')
  }

  #number(controller: (typeof controllers)[number], name: string): number {
    return Number(this.#read(this.#file(controller, name)))
  }

  #field(controller: (typeof controllers)[number], name: string, field: string): number {
    return fieldOf(this.#read(this.#file(controller, name)), field)
  }

  /** Processes that the kernel has killed in it for want of memory. */
  oomKills(): number {
    const name = this.#hierarchy.version === 1 ? 'memory.oom_control' : 'memory.events'
    return this.#field('memory', name, 'oom_kill')
  }

  /** Undefined where it is not there. */
  usage(): CgroupUsage | undefined {
    try {
      const oomKills = this.oomKills()
      if (this.#hierarchy.version === 1)
        return {
          cpuMs: this.#number('cpuacct', 'cpuacct.usage') / 1e6,
          memoryBytes: this.#number('memory', 'memory.usage_in_bytes'),
          memoryPeakBytes: this.#number('memory', 'memory.max_usage_in_bytes'),
          oomKills,
        }
      return {
        cpuMs: this.#field('cpu', 'cpu.stat', 'usage_usec') / 1e3,
        memoryBytes: this.#number('memory', 'memory.current'),
        // Since Linux 5.19.
        memoryPeakBytes: existsSync(this.#file('memory', 'memory.peak'))
          ? this.#number('memory', 'memory.peak')
          : null,
        oomKills,
      }
    } catch {
      return undefined
    }
  }

  /** Of disks; of version 1 those of what lives in it now. */
  diskMeter(): DiskMeter {
    const [dir = ''] = this.#dirs
    return this.#hierarchy.version === 2
      ? DiskMeter.ofGroup(this.keepOpen(), dir)
      : DiskMeter.ofProcesses(this.keepOpen(), lines(join(dir, 'cgroup.procs')).map(Number))
  }

  /** How often the quota has held it back. */
  throttled(): number {
    return this.#field('cpu', 'cpu.stat', 'nr_throttled')
  }

  /** Settles when nothing in it runs any more. Throws where that cannot be had; then it runs. */
  async freeze(): Promise<void> {
    await this.#write('freeze')
    const begun = performance.now()
    for (let again = begun + refreezeMs; !this.#isFrozen(); await sleep(1)) {
      const now = performance.now()
      if (now > begun + freezeMs) {
        await this.#write('thaw')
        throw new Error('the kernel does not freeze it')
      }
      if (now < again) continue
      // Version 1 can get stuck at a process that is just being traced (freezer-subsystem.rst): it is begun anew.
      await this.#write('thaw')
      await this.#write('freeze')
      again = now + refreezeMs
    }
  }

  async thaw(): Promise<void> {
    await this.#write('thaw')
  }

  #write(what: 'freeze' | 'thaw'): Promise<void> {
    return this.#hierarchy.version === 1
      ? writeFile(this.#file('freezer', 'freezer.state'), what === 'freeze' ? 'FROZEN' : 'THAWED')
      : writeFile(this.#file('freezer', 'cgroup.freeze'), what === 'freeze' ? '1' : '0')
  }

  #isFrozen(): boolean {
    return this.#hierarchy.version === 1
      ? readFileSync(this.#file('freezer', 'freezer.state'), 'utf8').trim() === 'FROZEN'
      : fieldOf(readFileSync(this.#file('freezer', 'cgroup.events'), 'latin1'), 'frozen') === 1
  }

  /**
   * Kills every process in it except `spared`, and settles when they are gone. Throws where they do not go.
   */
  async kill(spared?: number): Promise<void> {
    for (const until = performance.now() + settleMs; ; await sleep(2)) {
      // Each time: somebody may be about to freeze it, and what is frozen does not die.
      await this.thaw().catch(() => {})
      const pids = this.pids().filter((pid) => pid !== spared)
      if (pids.length === 0) return
      if (performance.now() > until)
        throw new Error(`processes of ${this.path} do not die: ${pids.join(', ')}`)
      for (const pid of pids) kill(pid)
    }
  }

  /** Names of the groups below it. */
  async children(): Promise<string[]> {
    const names = new Set<string>()
    for (const dir of this.#dirs)
      for (const entry of await readdir(dir, { withFileTypes: true }).catch(() => []))
        if (entry.isDirectory()) names.add(entry.name)
    return [...names]
  }

  /** Removes it; nothing may live in it or below it. Harmless where it is not there. Throws where it is held. */
  async remove(): Promise<void> {
    for (const dir of this.#dirs)
      for (const until = performance.now() + settleMs; ; await sleep(2)) {
        const error = await rmdir(dir).then(
          () => undefined,
          (error: NodeJS.ErrnoException) => error,
        )
        if (error === undefined || error.code === 'ENOENT') break
        // The last process in it has ended, and is not yet taken out.
        if (error.code !== 'EBUSY' || performance.now() > until) throw error
      }
  }

  async removeIfEmpty(): Promise<void> {
    await Promise.allSettled(this.#dirs.map((dir) => rmdir(dir)))
  }

  /** Kills and removes it and all below it. Throws where something resists. */
  async removeTree(): Promise<void> {
    for (const name of await this.children()) await this.child(name).removeTree()
    await this.kill()
    await this.remove()
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It has ended meanwhile.
  }
}

function lines(file: string): string[] {
  try {
    return readFileSync(file, 'latin1').split('\n').filter(Boolean)
  } catch {
    return []
  }
}

/** Of lines of a name and a number. */
const fieldOf = (text: string, name: string) =>
  Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(text)?.[1] ?? 0)
