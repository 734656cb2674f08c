import { linkSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { isAlive, thisOwner } from './owners.ts'

/**
 * Locks between the processes that share a store, each a file that names its owner. They save work that would be done
 * twice; nothing breaks where two hold one, which is possible for an instant when a dead owner’s is taken over.
 */
export class Locks {
  readonly #dir: string
  #count = 0

  /** `dir` exists. */
  constructor(dir: string) {
    this.#dir = dir
  }

  /** Waits until it is had; rejects with the signal’s reason. Not reentrant. */
  async take(name: string, signal?: AbortSignal, pollMs = 20): Promise<Disposable> {
    for (;;) {
      signal?.throwIfAborted()
      const lock = this.try(name)
      if (lock) return lock
      await sleep(pollMs)
    }
  }

  /** Undefined while a live process holds it, this one included. */
  try(name: string): Disposable | undefined {
    const path = join(this.#dir, name)
    const mine = join(this.#dir, `.${thisOwner}.${this.#count++}`)
    writeFileSync(mine, thisOwner)
    try {
      if (!linked(mine, path)) {
        const holder = read(path)
        if (holder === undefined || isAlive(holder)) return undefined
        // Moved aside and looked at again: it may have been taken over just before.
        const aside = `${mine}.stale`
        renameSync(path, aside)
        const moved = read(aside)
        if (moved !== undefined && isAlive(moved)) linked(aside, path)
        rmSync(aside, { force: true })
        if (!linked(mine, path)) return undefined
      }
    } catch (error) {
      // Whoever took it over first has moved it away.
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
      throw error
    } finally {
      rmSync(mine, { force: true })
    }
    return { [Symbol.dispose]: () => rmSync(path, { force: true }) }
  }
}

const read = (path: string): string | undefined => {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}

/** Puts `file` at `path` with its content in one step. False where something is there already. */
function linked(file: string, path: string): boolean {
  try {
    linkSync(file, path)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false
    throw error
  }
}
