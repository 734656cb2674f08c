// npm run setup [-- base | gvisor | docker | microvm | go …]
//
// Gets what an isolation needs of this machine: programs, and the runtime images. A second run changes nothing.
import { ensureMachineParts } from '../rootfs/ensure.ts'
import { fetchFirecracker } from '../rootfs/firecracker.ts'
import { type RuntimeName, runtimeNames } from '../runners/container/runtimes/index.ts'
import { cacheDirectory } from './cache-directory.ts'
import { engineAnswers } from './docker-engine.ts'
import { ensureTools, type Log, type ToolSet } from './host-tools.ts'
import { findNatsServer } from './nats-server.ts'
import { buildRuntimes } from './runtimes.ts'

type Host = { cacheDir: string; log: Log; env: NodeJS.ProcessEnv }

/**
 * Gets what the platform needs from the host: bubblewrap, the outer wall of the isolate runner, where it can be
 * installed, and a nats-server. Quick when all is there.
 *
 * @returns the path of the nats-server
 * @throws Error that says what to install when there is no nats-server. A missing bubblewrap is only reported here;
 *   the runner names the missing wall.
 */
export async function ensureHostTools(host: Host): Promise<string> {
  await ensureBubblewrap(host)
  return findNatsServer({ ...host, path: host.env.PATH })
}

/** Installs bubblewrap with apt-get where this runs as root. Never throws. */
export async function ensureBubblewrap({ log, env }: Pick<Host, 'log' | 'env'>): Promise<void> {
  for (const line of await ensureTools(['isolate'], { log, path: env.PATH })) log(line)
}

/**
 * What `gvisor` and `docker` need, without a nats-server, and the runtime images.
 *
 * @throws Error that says what to install
 */
async function ensureIsolation(
  host: Host,
  sets: readonly ToolSet[],
  runtimes: readonly RuntimeName[],
): Promise<void> {
  const { cacheDir, log } = host
  const missing = await ensureTools(sets, { log })
  await buildRuntimes(runtimes, { cacheDir, log })
  if (missing.length > 0) throw new Error(missing.join('\n'))
}

/**
 * All that the tests of containers and virtual machines need. Never throws: a test that lacks something skips and says
 * so.
 */
export async function ensureTestTools({ cacheDir, log }: Host): Promise<void> {
  const missing = await ensureTools(['gvisor', 'docker', 'engine', 'microvm', 'tests'], { log })
  for (const line of missing) log(line)
  try {
    await buildRuntimes(runtimeNames, { cacheDir, log })
  } catch (error) {
    log(`the runtime images could not be built: ${(error as Error).message}`)
  }
  try {
    await ensureMachineParts({ cacheDir, log })
  } catch (error) {
    log(`virtual machines lack a part: ${(error as Error).message}`)
  }
}

/** Without `go`, which takes longer to build than all others together. */
const containerRuntimes: readonly RuntimeName[] = ['base', 'node', 'python']

/** What `npm run setup -- <name>` prepares. */
const setups: Record<string, (host: Host) => Promise<unknown>> = {
  base: ensureHostTools,
  gvisor: (host) => ensureIsolation(host, ['gvisor'], containerRuntimes),
  async docker(host) {
    const answers = await engineAnswers(host.env.DOCKER_HOST)
    await ensureIsolation(host, answers ? ['docker'] : ['docker', 'engine'], containerRuntimes)
    if (!answers)
      host.log(
        'no Docker Engine answers: start it (systemctl start docker), or set DOCKER_HOST to one that runs',
      )
  },
  go: (host) => ensureIsolation(host, [], ['go']),
  async microvm(host) {
    await ensureIsolation(host, ['microvm'], containerRuntimes)
    await ensureMachineParts(host)
    try {
      await fetchFirecracker(host.cacheDir, host.log)
    } catch (error) {
      host.log(`Firecracker is left out: ${(error as Error).message}`)
    }
  },
}

if (import.meta.main) {
  const names = process.argv.slice(2)
  const host = { cacheDir: cacheDirectory(process.env), log: console.log, env: process.env }
  try {
    for (const name of names.length ? names : ['base']) {
      const setup = Object.hasOwn(setups, name) && setups[name]
      if (!setup) throw new Error(`unknown: ${name}. There are: ${Object.keys(setups).join(', ')}`)
      await setup(host)
      console.log(`${name}: ready`)
    }
  } catch (error) {
    console.error((error as Error).message)
    process.exitCode = 1
  }
}
