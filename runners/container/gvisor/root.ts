/** What a box’s root must have, and the files in it that are not the image’s. */
import { stat } from 'node:fs/promises'
import type { Mount, Network } from '../engine.ts'
import { resolveInRoot } from '../rootfs.ts'
import { hostname, ownFiles } from './config.ts'

/**
 * Whether an image has the working directory and whatever is mounted over. runsc makes what is missing, on the host,
 * in a root that others share: then it must be given another.
 */
export async function hasAll(root: string, cwd: string, mounts: Mount[]): Promise<boolean> {
  const wanted = [cwd, ...ownFiles, ...mounts.map(({ target }) => target)]
  const found = await Promise.all(wanted.map((path) => isThere(root, path)))
  return found.every(Boolean)
}

async function isThere(root: string, path: string): Promise<boolean> {
  const resolved = await resolveInRoot(root, path)
  if (resolved === undefined) return false
  return stat(resolved.path).then(
    () => true,
    () => false,
  )
}

export const hostsFile = (hosts: Network['hosts']): string =>
  [
    '127.0.0.1 localhost',
    '::1 localhost ip6-localhost ip6-loopback',
    `127.0.0.1 ${hostname}`,
    ...hosts.map(({ address, name }) => `${address} ${name}`),
    '',
  ].join('\n')

export const resolvFile = (nameservers: Network['nameservers']): string =>
  nameservers.map((address) => `nameserver ${address}\n`).join('')
