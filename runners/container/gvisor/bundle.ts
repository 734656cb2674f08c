/** What is asked of a box, and the files by which runsc is told of it. */
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { BoxSpec } from '../engine.ts'
import { runtimeConfig } from './config.ts'
import { memoryFile, overlaidRoot } from './launch.ts'
import type { LauncherHost } from './launcher.ts'
import { hasAll, hostsFile, resolvFile } from './root.ts'

/** What boxes of one engine share. */
export interface Host extends LauncherHost {
  /** /etc/hosts and /etc/resolv.conf of boxes without a network. */
  hosts: string
  resolvConf: string
}

/** A directory of the host in which the box may make Unix sockets that the host connects to. */
export interface Sockets {
  /** Absolute, on the host; the box’s user must be able to write there. */
  source: string
  /** Absolute, in the box. */
  target: string
}

export type GvisorSpec = BoxSpec & {
  /** The seam for services: whatever listens on a socket there can be reached from the host, without any network. */
  sockets?: Sockets
}

/** Writes what runsc reads. Resolves to the image’s root where something must be laid over it. */
export async function writeBundle(
  host: Host,
  dir: string,
  spec: GvisorSpec,
  root: string,
): Promise<string | undefined> {
  const { network, sockets, limits } = spec
  const mounts = sockets === undefined ? spec.mounts : [...spec.mounts, { ...sockets, readonly: false }]
  let { hosts, resolvConf } = host
  const files = new Map<string, string>()
  if (network !== undefined) {
    hosts = join(dir, 'hosts')
    resolvConf = join(dir, 'resolv.conf')
    files.set(hosts, hostsFile(network.hosts)).set(resolvConf, resolvFile(network.nameservers))
  }
  const kib = limits.memoryMb * 1024
  files.set(memoryFile(dir), `MemTotal: ${kib} kB\nMemFree: ${kib} kB\nMemAvailable: ${kib} kB\n`)
  const isWhole = await hasAll(root, spec.cwd, mounts)
  const config = runtimeConfig({
    spec: { ...spec, mounts },
    ...{ root: isWhole ? root : overlaidRoot(dir), dir, hosts, resolvConf },
  })
  files.set(join(dir, 'config.json'), JSON.stringify(config))
  await Promise.all([...files].map(([file, text]) => writeFile(file, text)))
  return isWhole ? undefined : root
}
