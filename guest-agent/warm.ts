/**
 * A machine that becomes a snapshot gets what those restored from it would each take time for: the places that the
 * runner puts things, and in memory what programs start with, so that no drive is read before a command runs. Nothing
 * of the image is executed.
 */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import type { Warm } from '../shared/machine.ts'
import { rootPath } from './layout.ts'
import { lift, within } from './places.ts'
import { makeResult } from './root.ts'
import { namesIn, openFlags } from './system.ts'

const mebibyte = 2 ** 20
/** Of all files together: memory that the kernel gives to whoever needs it. */
const maxBytes = 32 * mebibyte
/** A larger program is an interpreter or alike: what of it is needed is little of it. */
const maxFileBytes = 4 * mebibyte
/** Of one folder: an image may have any number. */
const maxNames = 4_096
/** The loader and the C library come before programs. */
const libraries = ['/lib64', '/lib', '/usr/lib', '/usr/local/lib']
const programs = ['/bin', '/usr/bin', '/usr/local/bin', '/sbin', '/usr/sbin']
/** Debian has a machine’s libraries in a folder of their own. */
const isArchitecture = (name: string) => name.includes('-linux-')
const kinds = { mask: 0o170000, file: 0o100000 }

/** Throws `AgentError`. */
export function warm({ directories, result, result_bytes }: Warm): void {
  for (const path of directories) lift(path)
  if (result !== null) makeResult(result, result_bytes)
  readPrograms()
}

/** What is not there, or is not to be read, is left out. */
function readPrograms(): void {
  const buffer = new ArrayBuffer(256 * 1024)
  const read = new Set<string>()
  let left = maxBytes
  const folders = libraries.flatMap((folder) => [
    folder,
    ...namesOf(folder)
      .filter(isArchitecture)
      .map((name) => `${folder}/${name}`),
  ])
  const readAll = (folder: string, isWanted: (name: string) => boolean) => {
    for (const name of namesOf(folder)) {
      if (left <= 0 || !isWanted(name)) continue
      left -= readWhole(`${folder}/${name}`, Math.min(left, maxFileBytes), buffer, read)
    }
  }
  for (const folder of folders) readAll(folder, (name) => name.includes('.so'))
  for (const folder of programs) readAll(folder, () => true)
}

function namesOf(folder: string): string[] {
  try {
    return within(folder, namesIn).slice(0, maxNames)
  } catch {
    return []
  }
}

/** The bytes of a file that were read: none of one that is no file, has more than `max`, or was read before. */
function readWhole(path: string, max: number, buffer: ArrayBuffer, read: Set<string>): number {
  // What is not a file could keep the agent waiting.
  const fd = linux.openIn(rootPath, path, openFlags.path)
  if (fd < 0) return 0
  const own = `/proc/self/fd/${fd}`
  const [found] = os.stat(own)
  let size = 0
  if (found !== null && (found.mode & kinds.mask) === kinds.file && found.size <= max) {
    const same = `${found.dev}:${found.ino}`
    if (!read.has(same)) {
      read.add(same)
      size = found.size
      const content = os.open(own, openFlags.readonly | openFlags.closeOnExec)
      if (content >= 0) {
        while (os.read(content, buffer, 0, buffer.byteLength) > 0);
        os.close(content)
      }
    }
  }
  os.close(fd)
  return size
}
