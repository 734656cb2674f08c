import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { startTime } from '../shared/process-identity.ts'

export { startTime }

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
