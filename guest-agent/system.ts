/** Short names for what the parts ask of the kernel. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'

/** Of x86-64 and arm64 alike, except where it says so: errno.h, mount.h, stat.h, poll.h. */
export const errors = { noEntry: 2, again: 11, exists: 17 } as const
export const mountFlags = {
  readonly: 1,
  noSuid: 2,
  noDevices: 4,
  noExecute: 8,
  remount: 32,
  bind: 4096,
  recursive: 16384,
  private: 1 << 18,
  shared: 1 << 20,
} as const
export const pollEvents = { in: 1, out: 4, error: 8, hangUp: 16 } as const
/** fcntl.h; O_DIRECTORY and O_NOFOLLOW differ between architectures, so they are not used. */
export const openFlags = {
  readonly: 0,
  writeOnly: 1,
  readWrite: 2,
  create: 0o100,
  exclusive: 0o200,
  truncate: 0o1000,
  append: 0o2000,
  nonBlocking: 0o4000,
  closeOnExec: 0o2000000,
  path: 0o10000000,
} as const

/** Something could not be done in this machine. */
export class AgentError extends Error {
  override name = 'AgentError'
  readonly fault: 'user' | 'machine'
  constructor(message: string, fault: 'user' | 'machine' = 'machine') {
    super(message)
    this.fault = fault
  }
}

/** `result` itself, unless it is a negative errno; throws `AgentError` then. */
export function check(result: number, what: string): number {
  if (result < 0) throw new AgentError(`${what}: ${linux.errorText(-result)}`)
  return result
}

export const utf8 = (text: string): Uint8Array => new Uint8Array(linux.utf8(text))

export const textOf = (bytes: Uint8Array): string =>
  linux.text(bytes.buffer as ArrayBuffer, bytes.byteOffset, bytes.length)

/** mount(2); throws `AgentError`. */
export function mount(
  source: string,
  target: string,
  type: string,
  flags: number,
  data: string | null = null,
) {
  check(linux.mount(source, target, type, flags, data), `mount ${target}`)
}

/** The trimmed text of a file of the kernel’s, whose size is not known before; '' where there is none. */
export function readText(path: string, maxBytes = 4096): string {
  const fd = os.open(path, openFlags.readonly | openFlags.closeOnExec)
  if (fd < 0) return ''
  const buffer = new ArrayBuffer(maxBytes)
  let length = 0
  for (let count = 1; count > 0 && length < maxBytes; length += Math.max(count, 0))
    count = os.read(fd, buffer, length, maxBytes - length)
  os.close(fd)
  return linux.text(buffer, 0, length).trim()
}

/** Into a file that is there. */
export function writeText(path: string, text: string): void {
  const fd = check(os.open(path, openFlags.writeOnly | openFlags.closeOnExec), path)
  const bytes = utf8(text)
  const wrote = os.write(fd, bytes.buffer as ArrayBuffer, 0, bytes.length)
  os.close(fd)
  check(wrote, path)
}

/** Of a setting that not every kernel has. */
export function trySet(path: string, text: string): void {
  try {
    writeText(path, text)
  } catch {
    // Then it is as it was.
  }
}

/** All of it, to a descriptor that blocks. */
export function writeAll(fd: number, bytes: Uint8Array, what: string): void {
  let at = 0
  while (at < bytes.length) {
    at += check(os.write(fd, bytes.buffer as ArrayBuffer, bytes.byteOffset + at, bytes.length - at), what)
  }
}

/** Names in a directory; none where it is missing. */
export const namesIn = (path: string): string[] => os.readdir(path)[0].filter((name) => !/^\.\.?$/.test(name))

export function log(text: string): void {
  const line = utf8(`agent: ${text}\n`)
  os.write(2, line.buffer as ArrayBuffer, 0, line.length)
}
