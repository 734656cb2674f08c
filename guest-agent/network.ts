/** The machine’s one interface, and the names that the workload can look up. */
import * as linux from 'vulcan:linux'
import type { MachineNetwork } from '../shared/machine.ts'
import { writeFile } from './places.ts'
import { AgentError, check, namesIn, trySet, utf8, writeAll } from './system.ts'

const hostname = 'vulcan'

/** What was set last: to set an interface anew would end its connections. */
let last: string | undefined

/** Throws `AgentError`. */
export function configureNetwork(network: MachineNetwork | null): void {
  const wanted = JSON.stringify(network)
  if (wanted === last) return
  if (network !== null) raiseInterface(network)
  writeLines('/etc/hosts', [
    '127.0.0.1 localhost',
    '::1 localhost ip6-localhost ip6-loopback',
    `127.0.0.1 ${hostname}`,
    ...(network?.hosts ?? []).map(({ address, name }) => `${address} ${name}`),
  ])
  writeLines(
    '/etc/resolv.conf',
    (network?.nameservers ?? []).map((address) => `nameserver ${address}`),
  )
  last = wanted
}

function raiseInterface({ address, gateway }: MachineNetwork): void {
  const name = namesIn('/sys/class/net').find((found) => found !== 'lo')
  if (name === undefined) throw new AgentError('this machine has no network interface')
  // What is outside must not give it an address of its own choice.
  trySet(`/proc/sys/net/ipv6/conf/${name}/disable_ipv6`, '1')
  const [host, length] = address.split('/')
  check(linux.interfaceUp(name, host!, netmask(Number(length)), gateway), name)
}

/** Of a prefix length from 0 to 32. */
function netmask(length: number): string {
  const bits = length === 0 ? 0 : (-1 << (32 - length)) >>> 0
  return [24, 16, 8, 0].map((shift) => (bits >>> shift) & 255).join('.')
}

function writeLines(path: string, lines: string[]): void {
  const bytes = utf8(lines.map((line) => `${line}\n`).join(''))
  writeFile(path, (fd) => writeAll(fd, bytes, path))
}
