/** Whose a container is, written on it as labels: what the janitor goes by. */
import { readFileSync, readlinkSync } from 'node:fs'

export const ownerLabel = 'vulcan.owner'
export const processLabel = 'vulcan.process'
export const hostLabel = 'vulcan.host'
/** Begins the name of every container of ours. */
export const namePrefix = 'vulcan-'

/** proc(5): when the kernel started it, in ticks since boot; with the pid it names one process for good. */
function startTime(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return fields[0] === 'Z' || fields[0] === 'X' ? undefined : fields[19]
  } catch {
    return undefined
  }
}

/** This boot of the kernel; pids mean nothing in another. */
const boot = () => readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()
/** Nor do they in another namespace. */
const namespace = () => readlinkSync('/proc/self/ns/pid').replace(/\D/g, '')

/** `<pid>.<start time>` of this process. */
export const ownProcess = (): string => `${process.pid}.${startTime(process.pid) ?? ''}`

export const ownLabels = (owner: string): Record<string, string> => ({
  [ownerLabel]: owner,
  [processLabel]: ownProcess(),
  [hostLabel]: `${boot()}.${namespace()}`,
})

/** Whether a process `<pid>.<start time>` of this namespace has ended. */
export function isDead(identity: string): boolean {
  const [, pid, start] = /^(\d+)\.(\d+)$/.exec(identity) ?? []
  return pid !== undefined && startTime(Number(pid)) !== start
}

/** Whether a container has these labels because a vulcan process that has ended made it. When in doubt: no. */
export function isAbandoned(labels: Record<string, string>): boolean {
  const [, bootId, pids] = /^(.+)\.(\d+)$/.exec(labels[hostLabel] ?? '') ?? []
  const identity = labels[processLabel]
  if (bootId === undefined || identity === undefined || labels[ownerLabel] === undefined) return false
  if (bootId !== boot()) return true
  return pids === namespace() && isDead(identity)
}
