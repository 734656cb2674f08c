/**
 * Which process something in the store belongs to. What a dead one has left may be taken away; what belongs to a live
 * one is not touched. All processes on one store see each other’s pids.
 */
import { readFileSync } from 'node:fs'

/**
 * `<pid>-<start>-<boot>`: a pid alone may have been given to another process by now (proc(5), field 22), and ticks
 * are counted from a boot.
 */
export type Owner = string

/** `undefined`: no such process, or only its zombie is left. */
function startTime(pid: string): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    // Behind the name, which may itself hold spaces and parentheses.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return fields[0] === 'Z' || fields[0] === 'X' ? undefined : fields[19]
  } catch {
    return undefined
  }
}

const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').slice(0, 8)

export const thisOwner: Owner = `${process.pid}-${startTime(String(process.pid))}-${boot}`

/** Whatever stands behind a dot is a name the owner gave. */
export function isAlive(owner: string): boolean {
  const [, pid, start, when] = /^(\d+)-(\d+)-([0-9a-f]{8})(?:\.|$)/.exec(owner) ?? []
  return pid !== undefined && when === boot && startTime(pid) === start
}
