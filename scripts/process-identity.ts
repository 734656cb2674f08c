import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'

/**
 * When the kernel started this process, in clock ticks since boot: together with the pid it names one process for
 * good, where a pid alone may have been given to another. `undefined`: no such process, or only its zombie is left.
 * Where there is no /proc, every live process has the start time `''`.
 */
export function startTime(pid: number): string | undefined {
  try {
    // proc(5): the second field is the name in parentheses and may itself hold spaces and parentheses.
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return fields[0] === 'Z' || fields[0] === 'X' ? undefined : fields[19]
  } catch {
    return process.platform === 'linux' || !signal(pid, 0) ? undefined : ''
  }
}

/** Sends a signal to a pid, or to a process group by its negated id. False: nothing there to take it. */
export function signal(pid: number, name: NodeJS.Signals | 0): boolean {
  try {
    process.kill(pid, name)
    return true
  } catch {
    return false
  }
}

/** Whether a process was started with `name=value` in its environment. False where that cannot be read. */
export function startedWith(pid: number, name: string, value: string): boolean {
  try {
    return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0').includes(`${name}=${value}`)
  } catch {
    return false
  }
}

/** Every live process that was started with `name=value` in its environment; none where there is no /proc. */
export function processesStartedWith(name: string, value: string): number[] {
  if (process.platform !== 'linux') return []
  const pids = readdirSync('/proc').map(Number).filter(Number.isInteger)
  return pids.filter((pid) => startedWith(pid, name, value) && startTime(pid) !== undefined)
}

/** Waits until a process is gone. False when it is still there after `ms`. */
export async function gone(pid: number, ms: number): Promise<boolean> {
  const deadline = performance.now() + ms
  while (startTime(pid) !== undefined) {
    if (performance.now() > deadline) return false
    await sleep(10)
  }
  return true
}
