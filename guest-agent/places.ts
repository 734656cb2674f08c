/** Files, directories and mounts in the workload’s root, whatever links its image or the workload has laid there. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import type { PutHeader } from '../shared/machine.ts'
import { rootPath } from './layout.ts'
import { AgentError, check, errors, mountFlags, openFlags } from './system.ts'

const created = openFlags.writeOnly | openFlags.create | openFlags.exclusive

/** As a path of the agent’s for as long as `use` runs. Throws `AgentError` where it is not there. */
export function within<T>(path: string, use: (own: string) => T): T {
  const fd = check(linux.openIn(rootPath, path, openFlags.path), path)
  try {
    return use(`/proc/self/fd/${fd}`)
  } finally {
    os.close(fd)
  }
}

/** Name in its directory; throws `AgentError` on what names none. */
function split(path: string): { parent: string; name: string } {
  const parts = path.split('/').filter((part) => part !== '' && part !== '.')
  const name = parts.pop()
  if (!path.startsWith('/') || name === undefined || name === '..')
    throw new AgentError(`not a place: ${path}`)
  return { parent: `/${parts.join('/')}`, name }
}

function isThere(path: string): boolean {
  const fd = linux.openIn(rootPath, path, openFlags.path)
  if (fd >= 0) os.close(fd)
  return fd >= 0
}

/** Those above it too. */
export function makeDirectory(path: string, mode = 0o755): void {
  if (path === '/' || isThere(path)) return
  const { parent, name } = split(path)
  makeDirectory(parent)
  within(parent, (own) => {
    let result = os.mkdir(`${own}/${name}`, mode)
    if (result === -errors.exists) {
      // A link that leads nowhere.
      os.remove(`${own}/${name}`)
      result = os.mkdir(`${own}/${name}`, mode)
    }
    check(result, path)
  })
}

/** Removes a file, a link or an empty directory, where there is one. */
function clear(path: string): void {
  const { parent, name } = split(path)
  within(parent, (own) => os.remove(`${own}/${name}`))
}

/** A new file in place of what is there; its descriptor, which blocks. */
function makeFile(path: string, mode: number): number {
  let fd = linux.openIn(rootPath, path, created, mode)
  if (fd === -errors.noEntry) makeDirectory(split(path).parent)
  if (fd === -errors.exists) clear(path)
  if (fd < 0) fd = linux.openIn(rootPath, path, created, mode)
  return check(fd, path)
}

/** One of the image’s is lifted out of it, so that files can be laid into it without delay; false where it is not there. */
export function lift(path: string): boolean {
  if (!isThere(path)) return false
  within(path, (own) => os.utimes(own, Date.now(), Date.now()))
  return true
}

/** Does what the host has put; the descriptor of a file, for its bytes. */
export function put({ path, kind, to, mode }: PutHeader): number | undefined {
  if (kind === 'file') return makeFile(path, mode)
  if (kind === 'directory') {
    if (!lift(path)) makeDirectory(path, mode)
    return undefined
  }
  const { parent, name } = split(path)
  makeDirectory(parent)
  clear(path)
  within(parent, (own) => check(os.symlink(to ?? '', `${own}/${name}`), path))
  return undefined
}

/** A file in place of what is there. */
export function writeFile(path: string, write: (fd: number) => void): void {
  const fd = makeFile(path, 0o644)
  try {
    write(fd)
  } finally {
    os.close(fd)
  }
}

/** Binds `source`, a path of the agent’s, to `target`, which is made as what `source` is. */
export function bindAt(source: string, target: string, kind: 'file' | 'directory', readonly: boolean): void {
  if (!isThere(target)) {
    if (kind === 'directory') makeDirectory(target)
    else os.close(makeFile(target, 0o644))
  }
  within(target, (own) => check(linux.mount(source, own, null, mountFlags.bind, null), `bind ${target}`))
  if (!readonly) return
  const flags = mountFlags.remount | mountFlags.bind | mountFlags.readonly
  within(target, (own) =>
    check(linux.mount(null, own, null, flags | mountFlags.noSuid | mountFlags.noDevices, null), target),
  )
}
