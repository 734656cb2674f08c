/**
 * What machines are made of, on disk: `<cacheDir>/microvm/`, shared by all processes that use the cache directory.
 *
 *     kernels/<name>/           a kernel with its modules
 *     agent/                    the agent's binary
 *     initramfs/<hash>.cpio
 *     parts/<kind>.json         which kernel and initramfs go together
 *     drives/<hex>.<format>     root drives, by the digest of their image
 *     locks/                    who makes what
 *     tmp/<owner>.<n>           what is on the way
 *
 * What stands at its place is whole: it was made in `tmp` and renamed.
 */
import { existsSync, mkdirSync } from 'node:fs'
import { mkdir, readdir, rename, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { Locks } from '../runners/container/images/locks.ts'
import { isAlive, thisOwner } from '../runners/container/images/owners.ts'

export const storeOf = (cacheDir: string) => join(cacheDir, 'microvm')

const lockPollMs = 50
let count = 0

/** Waits for its turn to make what has this name. */
export function takeTurn(cacheDir: string, name: string, signal?: AbortSignal): Promise<Disposable> {
  const locks = join(storeOf(cacheDir), 'locks')
  mkdirSync(locks, { recursive: true })
  return new Locks(locks).take(name, signal, lockPollMs)
}

/**
 * The path of what stands at `place`, below the store's directory. Where it is missing, `make` makes it, a file or a
 * directory at the path that it is given; only one process does at a time.
 */
export async function makeOnce(
  cacheDir: string,
  place: string,
  make: (path: string) => Promise<void>,
): Promise<string> {
  const target = join(storeOf(cacheDir), place)
  if (existsSync(target)) return target
  using _turn = await takeTurn(cacheDir, place.replaceAll('/', '-'))
  if (existsSync(target)) return target
  await using temporary = await temporaryPath(cacheDir)
  await make(temporary.path)
  await mkdir(dirname(target), { recursive: true })
  await rename(temporary.path, target).catch((error: unknown) => {
    // A lock may have two owners for an instant: whoever was faster has made the same.
    if (!existsSync(target)) throw error
  })
  return target
}

/** A path of this process's own where nothing is yet; what is there when it is disposed of is removed. */
export async function temporaryPath(cacheDir: string): Promise<{ path: string } & AsyncDisposable> {
  const folder = join(storeOf(cacheDir), 'tmp')
  await mkdir(folder, { recursive: true, mode: 0o700 })
  await removeLeftovers(folder)
  const path = join(folder, `${thisOwner}.${count++}`)
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

/** What dead processes have left. */
async function removeLeftovers(folder: string): Promise<void> {
  for (const entry of await readdir(folder))
    if (!isAlive(entry)) await rm(join(folder, entry), { recursive: true, force: true })
}

/** Writes a small file in one step. */
export async function replaceFile(cacheDir: string, place: string, content: string): Promise<void> {
  await using temporary = await temporaryPath(cacheDir)
  await writeFile(temporary.path, content)
  const target = join(storeOf(cacheDir), place)
  await mkdir(dirname(target), { recursive: true })
  await rename(temporary.path, target)
}
