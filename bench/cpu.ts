/** What else happened on the machine while something was measured. */
import { readFileSync } from 'node:fs'

/** What the kernel counted since it started, in ticks: all of it, and what the host gave to others (`man 5 proc_stat`). */
function cpuTimes(): { all: number; steal: number } {
  try {
    const ticks =
      readFileSync('/proc/stat', 'utf8').split('\n')[0]?.split(/\s+/).slice(1, 9).map(Number) ?? []
    return { all: ticks.reduce((sum, value) => sum + value, 0), steal: ticks[7] ?? 0 }
  } catch {
    return { all: Number.NaN, steal: Number.NaN }
  }
}

/** Looks now; what it gives tells the share of CPU time (per cent) that the host has given to others since. */
export function watchSteal(): () => number {
  const before = cpuTimes()
  return () => {
    const now = cpuTimes()
    return (100 * (now.steal - before.steal)) / (now.all - before.all)
  }
}
