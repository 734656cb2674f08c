/** Which process something belongs to, for whoever comes later and finds it: a pid alone may be given to another. */
import { readFileSync, readlinkSync } from 'node:fs'

/**
 * When the kernel started this process, in clock ticks since boot: together with the pid it names one process of a
 * boot for good. `undefined`: no such process, or only its zombie is left. Where there is no /proc, every live process
 * has the start time `''`.
 */
export function startTime(pid: number): string | undefined {
  try {
    // proc(5): the second field is the name in parentheses and may itself hold spaces and parentheses.
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return fields[0] === 'Z' || fields[0] === 'X' ? undefined : fields[19]
  } catch {
    return process.platform !== 'linux' && isThere(pid) ? '' : undefined
  }
}

function isThere(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

/** This boot of the kernel: pids and start times mean nothing in another. */
export const thisBoot = (): string => readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()

/** Nor do they in another namespace. */
export const thisPidNamespace = (): string => readlinkSync('/proc/self/ns/pid')
