/**
 * What of the host belongs to this process’s machines, and the removal of what dead processes left. Processes are found
 * by their control groups, and where a process may make none, by the name of their owner among their arguments.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Cgroup, findHierarchy, type Hierarchy } from '../container/gvisor/cgroups.ts'
import { recordOwner, removeDeadOwners, removeOwner } from '../container/gvisor/owners.ts'
import type { DriverOptions } from './driver.ts'
import { removeTaps, tapsDir } from './firecracker/network.ts'
import { isMachineUser } from './users.ts'

export interface Holding extends AsyncDisposable {
  /** `<stateDir>/<owner>`, of this process alone. */
  readonly dir: string
  /** Where groups for machines are made; undefined: this process may make none. */
  readonly cgroup: Cgroup | undefined
}

export interface HoldingOptions extends DriverOptions {
  /** Path of the control group that those of all owners are in. */
  cgroupParent?: string
  /** What dead owners left is looked for this often, ms. */
  sweepMs?: number
}

/** Killed processes are waited for, ms. */
const killMs = 10_000
/** Trees without a root: groups in them are nowhere, and nothing has to be removed. */
const noHierarchy: Hierarchy = { version: 2, mount: '/nonexistent', roots: [] }

/**
 * Records this process as an owner, removes what dead ones left, and goes on doing so. Disposing removes everything of
 * this one. Throws an Error where the state directory cannot be used.
 */
export async function holdMachines(options: HoldingOptions): Promise<Holding> {
  const { owner, stateDir, cgroupParent = '/vulcan', sweepMs = 60_000 } = options
  const isRoot = process.getuid?.() === 0
  const hierarchy = isRoot ? hierarchyOrNone() : noHierarchy
  const group = new Cgroup(hierarchy, join(cgroupParent, owner))
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  await using scope = new AsyncDisposableStack()
  await recordOwner(stateDir, owner, group.path)
  scope.defer(() => new Cgroup(hierarchy, cgroupParent).removeIfEmpty())
  const more = async (name: string) => {
    await killNamed(name)
    await removeTaps(tapsDir(join(stateDir, name)), name)
  }
  scope.defer(() => removeOwner(stateDir, hierarchy, { name: owner, cgroup: group.path }, more))
  const sweep = () => removeDeadOwners(stateDir, hierarchy, more)
  await sweep()
  const cgroup = await group.makeParent().then(
    () => (hierarchy === noHierarchy ? undefined : group),
    () => undefined,
  )
  // What resists is tried again.
  const timer = setInterval(() => void sweep().catch(() => {}), sweepMs)
  timer.unref()
  scope.defer(() => clearInterval(timer))
  const resources = scope.move()
  return { dir: join(stateDir, owner), cgroup, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

function hierarchyOrNone(): Hierarchy {
  try {
    return findHierarchy()
  } catch {
    return noHierarchy
  }
}

/** How a process says whose it is: an argument of this name, or one that begins with it and a dot. */
export const nameOf = (owner: string, id: string) => `${owner}.${id}`

/** Kills the processes of an owner, and settles when they are gone. Throws where they do not go. */
async function killNamed(owner: string): Promise<void> {
  for (const until = performance.now() + killMs; ; await sleep(5)) {
    const pids = processesNamed(owner)
    if (pids.length === 0) return
    if (performance.now() > until) throw new Error(`processes of ${owner} do not die: ${pids.join(', ')}`)
    for (const pid of pids)
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // It has ended meanwhile, or is not ours.
      }
  }
}

/** Only those of this user and of its machines: anybody may call his processes what he likes. */
function processesNamed(owner: string): number[] {
  const ours = process.getuid?.()
  return readdirSync('/proc').flatMap((entry) => {
    const pid = Number(entry)
    if (!Number.isInteger(pid) || pid === process.pid) return []
    try {
      const status = readFileSync(`/proc/${pid}/status`, 'latin1')
      if (/^State:\s+[ZX]/m.test(status)) return []
      const uid = Number(/^Uid:\s+(\d+)/m.exec(status)?.[1])
      if (uid !== ours && !(ours === 0 && isMachineUser(uid))) return []
      const args = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0')
      return args.some((arg) => arg.startsWith(`${owner}.`)) ? [pid] : []
    } catch {
      return []
    }
  })
}
