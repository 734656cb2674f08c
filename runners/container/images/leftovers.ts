import { readdirSync, readFileSync } from 'node:fs'

/**
 * Kills processes that have a path below `path` among their arguments and have lost their parent: programs that a dead
 * runner has started on its temporary directory, and that did not end with it.
 */
export function killNamed(path: string): void {
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue
    try {
      const args = readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0')
      if (!args.some((arg) => arg.includes(`${path}/`) || arg === path)) continue
      const stat = readFileSync(`/proc/${name}/stat`, 'utf8')
      // Behind the name, which may hold anything and ends with the last parenthesis: state, parent.
      const parent = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1])
      if (parent === 1 && process.pid !== 1) process.kill(Number(name), 'SIGKILL')
    } catch {
      // It ended meanwhile, or is not ours.
    }
  }
}
