/** The programs that vulcan works with, as they call themselves. */
import { execFile } from 'node:child_process'
import { arch, availableParallelism, release, totalmem, type } from 'node:os'
import { promisify } from 'node:util'
import { fetchedFirecracker } from '../../rootfs/firecracker.ts'
import { systemPath, which } from '../host-tools.ts'
import { findNatsServer } from '../nats-server.ts'
import type { PlatformConfig } from '../platform.ts'
import type { Finding } from './report.ts'

const execute = promisify(execFile)

const oldestNode = 26

export async function checkNatsServer({ cacheDir, env, natsUrl }: PlatformConfig): Promise<Finding> {
  const what = 'nats-server'
  try {
    const file = await findNatsServer({ cacheDir, log: () => {}, path: env.PATH, download: false })
    return { state: 'ok', what, says: `${await versionOf(file)} (${file})` }
  } catch (error) {
    const says = (error as Error).message.split('. ')[0]!
    // One that runs elsewhere is used in its place.
    return { state: natsUrl === undefined ? 'bad' : 'off', what, says, fixes: ['npm run setup'] }
  }
}

/** Node, the kernel and, on a line, all others that are there. */
export async function checkVersions({ cacheDir, env }: PlatformConfig): Promise<Finding[]> {
  const node = Number(process.versions.node.split('.')[0])
  const path = `${env.PATH ?? ''}:${systemPath}`
  const programs = {
    runsc: which('runsc', path),
    QEMU: which('qemu-system-x86_64', path),
    Firecracker: env.VULCAN_FIRECRACKER ?? which('firecracker', path) ?? fetchedFirecracker(cacheDir),
    bubblewrap: which('bwrap', path),
    skopeo: which('skopeo', path),
    Docker: which('docker', path) ?? which('dockerd', path),
  }
  const found = await Promise.all(
    Object.entries(programs).map(async ([name, file]) => file && `${name} ${await versionOf(file)}`),
  )
  const memory = (totalmem() / 2 ** 30).toFixed(1)
  return [
    {
      state: node >= oldestNode ? 'ok' : 'bad',
      what: 'Node',
      says: `${process.versions.node}, V8 ${process.versions.v8}`,
      ...(node >= oldestNode ? {} : { fixes: ['npm run doctor runs the Node that the project brings'] }),
    },
    {
      state: process.platform === 'linux' ? 'ok' : 'warn',
      what: 'host',
      says: `${type()} ${release()} ${arch()}; ${availableParallelism()} cores, ${memory} GiB`,
    },
    {
      state: 'ok',
      what: 'programs',
      says: found.filter(Boolean).join(', ') || 'none of those for containers',
    },
  ]
}

/** The first thing in what it says that looks like a version. */
async function versionOf(file: string): Promise<string> {
  try {
    const { stdout } = await execute(file, ['--version'], { timeout: 10_000 })
    return /\d+(?:[.~-]\w+)+|\d{6,}/.exec(stdout)?.[0] ?? 'of no known version'
  } catch {
    return 'that does not run'
  }
}
