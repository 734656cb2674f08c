import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { cacheDirectory } from './cache-directory.ts'
import { findNatsServer } from './nats-server.ts'

const execute = promisify(execFile)
type Log = (line: string) => void

/**
 * Gets what the platform needs from the host: bubblewrap, the outer wall of the isolate runner, where it can be
 * installed, and a nats-server. Quick when all is there.
 *
 * @returns the path of the nats-server
 * @throws Error that says what to install when there is no nats-server. A missing bubblewrap is only reported here;
 *   the runner names the missing wall.
 */
export async function ensureHostTools({ cacheDir, log }: { cacheDir: string; log: Log }): Promise<string> {
  await ensureBubblewrap(log)
  return findNatsServer({ cacheDir, log })
}

/** Installs bubblewrap with apt-get where this runs as root. Never throws. */
export async function ensureBubblewrap(log: Log): Promise<void> {
  if (await runs('bwrap')) return
  const advice = 'install the package bubblewrap to put a second wall around isolates'
  if (process.getuid?.() !== 0 || !(await runs('apt-get'))) return log(`bwrap is not on PATH: ${advice}`)
  log('installing bubblewrap (apt-get)')
  const install = ['install', '--yes', '--no-install-recommends', 'bubblewrap']
  try {
    await aptGet(install).catch(async () => {
      await aptGet(['update'])
      await aptGet(install)
    })
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string }
    log(`bubblewrap could not be installed (${stderr?.trim().split('\n').pop() || message}): ${advice}`)
  }
}

async function runs(program: string): Promise<boolean> {
  return execute(program, ['--version']).then(
    () => true,
    () => false,
  )
}

const aptGet = (args: string[]) =>
  execute('apt-get', ['--quiet=2', '-o', 'DPkg::Lock::Timeout=120', ...args], {
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
    timeout: 300_000,
  })

/** What `npm run setup -- <name>` prepares. */
const setups: Record<string, (log: Log) => Promise<unknown>> = {
  base: (log) => ensureHostTools({ cacheDir: cacheDirectory(process.env), log }),
  gvisor: notYet('gvisor'),
  docker: notYet('docker'),
  microvm: notYet('microvm'),
}

function notYet(name: string) {
  return async () => {
    throw new Error(`the ${name} isolation is not there yet`)
  }
}

if (import.meta.main) {
  const names = process.argv.slice(2)
  try {
    for (const name of names.length ? names : ['base']) {
      const setup = Object.hasOwn(setups, name) && setups[name]
      if (!setup) throw new Error(`unknown: ${name}. There are: ${Object.keys(setups).join(', ')}`)
      await setup(console.log)
      console.log(`${name}: ready`)
    }
  } catch (error) {
    console.error((error as Error).message)
    process.exitCode = 1
  }
}
