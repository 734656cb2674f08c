/** isolated-vm wants flags of Node’s that only a command line can give: a test file starts itself again with them. */
import { spawnSync } from 'node:child_process'
import { nodeFlags } from '../../runners/isolate/web/flags.ts'

/** Returns where the flags are in force; elsewhere runs the file under them and ends this process with its exit code. */
export function underFlags(file: string): void {
  if (nodeFlags.every((flag) => process.execArgv.includes(flag))) return
  const { status } = spawnSync(
    process.execPath,
    [...nodeFlags, ...process.execArgv, file, ...process.argv.slice(2)],
    {
      stdio: 'inherit',
    },
  )
  process.exit(status ?? 1)
}
