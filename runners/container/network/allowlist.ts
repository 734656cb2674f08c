/** From the names of an allowlist to the addresses that were found and checked for them. */
import { isIPv4 } from 'node:net'
import { isPublic, plainEntry } from '../../egress.ts'
import { NetworkError } from './error.ts'
import type { Pin } from './rules.ts'

export interface Allowlist {
  pins: Pin[]
  /** For /etc/hosts. */
  hosts: { address: string; name: string }[]
}

export interface AllowlistOptions {
  /** Plain `host:port`s that may have addresses which are not public. */
  allowPrivate: ReadonlySet<string>
  resolve(host: string): Promise<string[]>
  /** Whether it is an address of this host, or `address:port` one of the platform. */
  isOwn(address: string): boolean
  isPlatform(address: string, port: number): boolean
}

/** Of one name; more would be no use to anybody. */
const maxAddresses = 32
/** Never routed from a box: this host’s loopback, link-local with its metadata services, multicast and what is reserved. */
const isUnroutable = (address: string) => /^(?:0|127|22[4-9]|2[3-5]\d)\.|^169\.254\./.test(address)

/** Resolves and checks every entry. Throws `NetworkError` for the first that cannot be had. */
export async function pinAllowlist(policy: readonly string[], options: AllowlistOptions): Promise<Allowlist> {
  const entries = [...new Set(policy.map(plainEntry))].map(parseEntry)
  const names = [...new Set(entries.map(({ host }) => host))].filter((host) => !isIPv4(host))
  const found = new Map(
    await Promise.all(names.map(async (name) => [name, await find(name, options)] as const)),
  )
  const pins = new Map<string, Pin>()
  const hosts = new Map<string, { address: string; name: string }>()
  for (const { entry, host, port } of entries) {
    const unguarded = options.allowPrivate.has(entry)
    const addresses = (found.get(host) ?? [host]).filter(
      (address) =>
        !isUnroutable(address) &&
        !options.isPlatform(address, port) &&
        (unguarded || (isPublic(address) && !options.isOwn(address))),
    )
    if (addresses.length === 0)
      throw new NetworkError(
        'user',
        `network.egress names ${entry}, which is not allowed: its address is not public, or is the platform’s own`,
      )
    for (const address of addresses) {
      pins.set(`${address} ${port} ${unguarded}`, { address, port, unguarded })
      if (found.has(host)) hosts.set(`${address} ${host}`, { address, name: host })
    }
  }
  return { pins: [...pins.values()], hosts: [...hosts.values()] }
}

function parseEntry(entry: string): { entry: string; host: string; port: number } {
  const at = entry.lastIndexOf(':')
  const host = entry.slice(0, at)
  const port = Number(entry.slice(at + 1))
  if (host.includes('*'))
    throw new NetworkError(
      'user',
      `network.egress names ${entry}: a container is held to addresses that are found when it starts, and a wildcard has none. Name the hosts, or use isolation isolate, which checks names.`,
    )
  if (!(port >= 1 && port <= 65_535))
    throw new NetworkError('user', `network.egress names ${entry}: ${port} is not a port`)
  return { entry, host, port }
}

/** The IPv4 addresses of a name. */
async function find(name: string, { resolve }: AllowlistOptions): Promise<string[]> {
  let addresses: string[]
  try {
    addresses = await resolve(name)
  } catch (cause) {
    const message = `network.egress names ${name}, which could not be resolved: ${(cause as Error).message}`
    const isUnknown = (cause as NodeJS.ErrnoException).code === 'ENOTFOUND'
    throw new NetworkError(isUnknown ? 'user' : 'engine', message, { cause })
  }
  const usable = [...new Set(addresses.filter(isIPv4))].slice(0, maxAddresses)
  if (usable.length > 0) return usable
  throw new NetworkError('user', `network.egress names ${name}, which has no IPv4 address`)
}
