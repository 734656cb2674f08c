/** What the host asks for, out of the JSON of its frames. What is not as it should be is refused as a whole. */
import type {
  Configure,
  MachineNetwork,
  MachineUser,
  MountSpec,
  PutHeader,
  Start,
  Warm,
} from '../shared/machine.ts'
import { HostError } from './streams.ts'
import { textOf } from './system.ts'

const hexDigits = '0123456789abcdef'
const maxHexBytes = 128

type Fields = Record<string, unknown>

/** Throws `HostError`. */
export function parse(payload: Uint8Array): unknown {
  try {
    return JSON.parse(textOf(payload))
  } catch {
    throw new HostError('a frame without JSON')
  }
}

export function fields(value: unknown): Fields {
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new HostError('not an object')
  return value as Fields
}

/** Without NUL, which the kernel would take for the end. */
function text(value: unknown): string {
  if (typeof value !== 'string' || value.includes('\0')) throw new HostError('not a text')
  return value
}

export function whole(value: unknown): number {
  if (!Number.isSafeInteger(value) || (value as number) < 0) throw new HostError('not a whole number')
  return value as number
}

function list<T>(value: unknown, item: (value: unknown) => T): T[] {
  if (!Array.isArray(value)) throw new HostError('not a list')
  return value.map(item)
}

export const mountSpecs = (value: unknown): MountSpec[] =>
  list(value, (item) => {
    const { path, target } = fields(item)
    return { path: text(path), target: text(target) }
  })

export function configureOf(value: unknown): Configure {
  const { time_ms, entropy, network, mounts, disk_mb } = fields(value)
  return {
    time_ms: whole(time_ms),
    entropy: text(entropy),
    network: network === null ? null : networkOf(network),
    mounts: mountSpecs(mounts),
    disk_mb: whole(disk_mb),
  }
}

function networkOf(value: unknown): MachineNetwork {
  const { address, gateway, nameservers, hosts } = fields(value)
  return {
    address: text(address),
    gateway: text(gateway),
    nameservers: list(nameservers, text),
    hosts: list(hosts, (item) => {
      const host = fields(item)
      return { address: text(host.address), name: text(host.name) }
    }),
  }
}

/** The header, and the bytes behind it. */
export function putOf(payload: Uint8Array): { header: PutHeader; bytes: Uint8Array } {
  const end = payload.indexOf(0)
  if (end < 0) throw new HostError('a put without a header')
  const { path, kind, to, mode } = fields(parse(payload.subarray(0, end)))
  if (kind !== 'file' && kind !== 'directory' && kind !== 'link')
    throw new HostError('a put of no known kind')
  const header: PutHeader = { path: text(path), kind, mode: whole(mode) & 0o777 }
  if (kind === 'link') header.to = text(to)
  return { header, bytes: payload.subarray(end + 1) }
}

export function warmOf(value: unknown): Warm {
  const { directories, result, result_bytes } = fields(value)
  return { directories: list(directories, text), ...resultOf(result, result_bytes) }
}

const resultOf = (result: unknown, bytes: unknown) => ({
  result: result === null ? null : text(result),
  result_bytes: whole(bytes),
})

export function startOf(value: unknown): Start {
  const start = fields(value)
  const argv = list(start.argv, text)
  if (argv.length === 0) throw new HostError('a start without a command')
  return {
    argv,
    env: Object.fromEntries(
      Object.entries(fields(start.env)).map(([name, item]) => [text(name), text(item)]),
    ),
    cwd: text(start.cwd),
    user: userOf(start.user),
    memory_mb: whole(start.memory_mb),
    pids: whole(start.pids),
    file_bytes: whole(start.file_bytes),
    ...resultOf(start.result, start.result_bytes),
  }
}

/** The kernel takes the last one for none, and would leave the process the agent’s own; boot.ts has the one before. */
function id(value: unknown): number {
  if (whole(value) >= 2 ** 32 - 2) throw new HostError('not an id')
  return value as number
}

function userOf(value: unknown): MachineUser {
  const { uid, gid, groups } = fields(value)
  return { uid: id(uid), gid: id(gid), groups: list(groups, id) }
}

/** Bytes that a credit gives. */
export function creditOf(payload: Uint8Array): number {
  const digits = textOf(payload)
  if (!/^\d{1,9}$/.test(digits)) throw new HostError('a credit without a number')
  return Number(digits)
}

/** Up to `maxHexBytes`. Throws `HostError`. */
export function bytesOfHex(hex: string): Uint8Array {
  const length = hex.length / 2
  if (!Number.isInteger(length) || length < 1 || length > maxHexBytes) throw new HostError('not hexadecimal')
  const bytes = new Uint8Array(length)
  for (let index = 0; index < hex.length; index++) {
    const digit = hexDigits.indexOf(hex[index]!)
    if (digit < 0) throw new HostError('not hexadecimal')
    bytes[index >> 1]! |= digit << (index % 2 === 0 ? 4 : 0)
  }
  return bytes
}
