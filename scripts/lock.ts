import { linkSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { startTime } from './process-identity.ts'

/** The directory is in use by a live process. */
export class LockedError extends Error {
  override name = 'LockedError'
  readonly pid: number
  constructor(directory: string, pid: number) {
    super(`${directory} is in use by process ${pid}`)
    this.pid = pid
  }
}

type Holder = { pid: number; start: string }

function holderOf(path: string): Holder | undefined {
  try {
    return JSON.parse(readFileSync(path, 'utf8'))
  } catch {
    return undefined
  }
}

const isAlive = (holder: Holder) => startTime(holder.pid) === holder.start

/**
 * Takes `<directory>/lock` for this process until it is disposed. The lock of a dead process is taken over, also
 * when its pid belongs to another process by now.
 *
 * @throws LockedError when a live process holds it, this one included
 */
export function lockDirectory(directory: string): Disposable {
  const path = join(directory, 'lock')
  const mine = `${path}.${process.pid}`
  const own: Holder = { pid: process.pid, start: startTime(process.pid) ?? '' }
  writeFileSync(mine, `${JSON.stringify(own)}\n`)
  try {
    while (!linked(mine, path)) {
      const holder = holderOf(path)
      if (holder && isAlive(holder)) throw new LockedError(directory, holder.pid)
      discard(path, `${mine}.stale`)
    }
  } finally {
    rmSync(mine, { force: true })
  }
  return {
    [Symbol.dispose]: () => {
      if (holderOf(path)?.pid === process.pid) rmSync(path, { force: true })
    },
  }
}

/** Puts `file` at `path` with its content in one step. False when something is there already. */
function linked(file: string, path: string): boolean {
  try {
    linkSync(file, path)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false
    throw error
  }
}

/** Removes a dead process's lock; one that a live process took in the meantime is put back. */
function discard(path: string, aside: string): void {
  try {
    renameSync(path, aside)
  } catch {
    return
  }
  const moved = holderOf(aside)
  if (moved && isAlive(moved)) linked(aside, path)
  rmSync(aside, { force: true })
}
