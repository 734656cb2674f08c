/**
 * bubblewrap’s inner process ties its life to the outer one only some time after it was made. Where the outer one
 * is killed just then, the inner one sleeps for ever: it holds no code yet, but it is a process that nobody owns.
 */
import { readdirSync, readFileSync } from 'node:fs'

/** Kills processes that were started with `marker` among their arguments and have lost their parent. */
export function killOrphans(marker: string): void {
  let names: string[]
  try {
    names = readdirSync('/proc')
  } catch {
    return
  }
  for (const name of names) {
    if (!/^\d+$/.test(name)) continue
    try {
      if (!readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0').includes(marker)) continue
      // Behind the name, which may hold anything and ends with the last parenthesis: state, parent.
      const stat = readFileSync(`/proc/${name}/stat`, 'utf8')
      const parent = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1])
      if (parent === 1 && process.pid !== 1) process.kill(Number(name), 'SIGKILL')
    } catch {
      // It ended meanwhile, or is not ours.
    }
  }
}
