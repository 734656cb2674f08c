/**
 * What the processes below this one use together: the sandboxes of a runner, and what stands around them. From /proc
 * (proc(5)); nothing where there is none. Sandboxes that somebody else starts, as a Docker Engine does, are not below.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'

export interface Use {
  processes: number
  /** Of all that ever ran and was waited for. */
  cpuSeconds: number
  /** What several share is counted in parts that make one whole. */
  memoryBytes: number
}

/** USER_HZ: on every architecture that Linux tells it to user space on (asm-generic/param.h). */
const ticksPerSecond = 100

interface Stat {
  parent: number
  /** In ticks: its own, and that of its children that have ended. */
  own: number
  waited: number
}

/** Rejects nothing: what ends meanwhile is left out. */
export async function descendantsUse(): Promise<Use | undefined> {
  const stats = new Map<number, Stat>()
  for (const pid of pids()) {
    const stat = statOf(pid)
    if (stat !== undefined) stats.set(pid, stat)
  }
  const self = stats.get(process.pid)
  if (self === undefined) return undefined
  const below = [...stats.keys()].filter((pid) => pid !== process.pid && isBelow(pid))
  let ticks = self.waited
  for (const pid of below) ticks += stats.get(pid)!.own + stats.get(pid)!.waited
  let memoryBytes = 0
  for (const pid of below) memoryBytes += await memoryOf(pid)
  return { processes: below.length, cpuSeconds: ticks / ticksPerSecond, memoryBytes }

  function isBelow(pid: number): boolean {
    for (let at = stats.get(pid)?.parent; at !== undefined && at > 1; at = stats.get(at)?.parent)
      if (at === process.pid) return true
    return false
  }
}

function pids(): number[] {
  try {
    return readdirSync('/proc').map(Number).filter(Number.isInteger)
  } catch {
    return []
  }
}

function statOf(pid: number): Stat | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1')
    // The name, in parentheses, may hold anything. Fields behind it are counted from the third.
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
    const field = (number: number) => Number(fields[number - 3])
    return { parent: field(4), own: field(14) + field(15), waited: field(16) + field(17) }
  } catch {
    return undefined
  }
}

/** Bytes; 0 where it has ended. Takes the kernel a while of large processes: not on the event loop. */
async function memoryOf(pid: number): Promise<number> {
  const text = await readFile(`/proc/${pid}/smaps_rollup`, 'latin1').catch(() => '')
  return Number(/^Pss:\s+(\d+) kB$/m.exec(text)?.[1] ?? 0) * 1_024
}
