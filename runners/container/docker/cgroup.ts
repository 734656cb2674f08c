/** The kernel’s own counters of a container, read while it lives. Control groups of version 1 and 2. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { diskOfGroup, diskOfProcesses } from '../disk.ts'
import type { Bytes } from '../engine.ts'

const root = '/sys/fs/cgroup'

export interface Counters {
  cpuMs: number
  /** Null: this kernel does not keep it. */
  memoryPeakMb: number | null
  /** Processes that the kernel has killed for want of memory within the limit. */
  oomKills: number
  /** Periods in which it wanted more time than it may have. */
  throttled: number
  /** Of version 1 by what lives in it. Undefined: not known. */
  disk: Bytes | undefined
}

export interface ContainerCgroup {
  /** Undefined: it is gone. */
  read(): Counters | undefined
  /** As the host knows them; none where it is gone. */
  pids(): number[]
}

const number = (path: string) => Number(readFileSync(path, 'utf8'))
const field = (path: string, name: string) =>
  Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(readFileSync(path, 'utf8'))?.[1] ?? 0)

function orNull(read: () => number): number | null {
  try {
    return read()
  } catch {
    return null
  }
}

/** Where the groups of containers are: the same for all of an engine, but for the id. */
export type Groups = (id: string) => ContainerCgroup

/** Undefined where this process does not see them. `pid` is one of the container’s, `id` its name. */
export function groupsOf(pid: number, id: string): Groups | undefined {
  const paths = new Map<string, string>()
  try {
    for (const line of readFileSync(`/proc/${pid}/cgroup`, 'utf8').trim().split('\n')) {
      // cgroups(7): hierarchy:controllers:path, and `0::path` for version 2.
      const [, controllers = '', path = ''] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
      if (path.includes(id)) for (const controller of controllers.split(',')) paths.set(controller, path)
    }
  } catch {
    return undefined
  }
  const at = (controller: string) => (of: string) => {
    const tree = controller === '' ? root : join(root, controller)
    return join(tree, paths.get(controller)!.replaceAll(id, of))
  }
  const isVersion1 = ['memory', 'cpu', 'cpuacct'].every((controller) => paths.has(controller))
  if (!isVersion1 && !paths.has('')) return undefined
  const groups: Groups = isVersion1
    ? (of) => version1(at('memory')(of), at('cpuacct')(of), at('cpu')(of))
    : (of) => version2(at('')(of))
  return groups(id).read() === undefined ? undefined : groups
}

const version1 = (memory: string, cpuacct: string, cpu: string) =>
  groupOf(join(memory, 'cgroup.procs'), () => ({
    oomKills: field(join(memory, 'memory.oom_control'), 'oom_kill'),
    cpuMs: number(join(cpuacct, 'cpuacct.usage')) / 1e6,
    throttled: field(join(cpu, 'cpu.stat'), 'nr_throttled'),
    memoryPeakMb: number(join(memory, 'memory.max_usage_in_bytes')) / 2 ** 20,
    disk: diskOfProcesses(pidsIn(join(memory, 'cgroup.procs'))),
  }))

const version2 = (dir: string) =>
  groupOf(join(dir, 'cgroup.procs'), () => ({
    oomKills: field(join(dir, 'memory.events'), 'oom_kill'),
    cpuMs: field(join(dir, 'cpu.stat'), 'usage_usec') / 1e3,
    throttled: field(join(dir, 'cpu.stat'), 'nr_throttled'),
    // Since Linux 5.19.
    memoryPeakMb: orNull(() => number(join(dir, 'memory.peak')) / 2 ** 20),
    disk: diskOfGroup(dir),
  }))

function groupOf(procs: string, counters: () => Counters): ContainerCgroup {
  return {
    read: () => {
      try {
        return counters()
      } catch {
        return undefined
      }
    },
    pids: () => pidsIn(procs),
  }
}

/** None where it is not there. */
function pidsIn(procs: string): number[] {
  try {
    return readFileSync(procs, 'utf8').split('\n').filter(Boolean).map(Number)
  } catch {
    return []
  }
}
