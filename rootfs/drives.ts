/** Drives of machines, written without root and without mounting anything. */
import { constants } from 'node:fs'
import { open, readdir, rm, stat, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import { type ErofsSource, writeErofs } from './erofs.ts'
import { writeExt4 } from './ext4.ts'
import { makeOnce, storeOf } from './store.ts'

export type RootFormat = 'erofs' | 'ext4'

/** An image of which a drive is made. */
export interface DriveImage {
  /** `sha256:…`: names the drive. */
  digest: string
  /** Directory of its unpacked root file system; asked for only where the drive is missing. */
  root(): Promise<string>
}

/** Bytes that root drives of the cache take at most, on disk, as far as they are not in use. */
const budgetBytes = 16 * 2 ** 30
/** One that was asked for since is not removed, ms. */
const keptMs = 3_600_000
/** How often the time of last use is written down, ms. */
const usedEveryMs = 60_000
/** An image with more is refused. */
const maxRootBytes = 32 * 2 ** 30
/** Counts what this version makes of an image. */
const recipe = 1

/**
 * Makes or finds the read-only root drive of an image; only one process makes it. Those that were not asked for
 * longest make room where there are too many.
 *
 * @returns path of its file
 * @throws ErofsError, or Error where a file of the image cannot be read or mke2fs is missing
 */
export async function driveOf(image: DriveImage, format: RootFormat, cacheDir: string): Promise<string> {
  const hex = image.digest.replace(/^sha256:/, '')
  if (!/^[0-9a-f]{8,64}$/.test(hex)) throw new Error(`${image.digest} is no digest`)
  let isNew = false
  const file = await makeOnce(cacheDir, `drives/${hex}-${recipe}.${format}`, async (path) => {
    isNew = true
    await writeRoot(await image.root(), format, path)
  })
  if (isNew) await makeRoom(join(storeOf(cacheDir), 'drives'), file)
  else await markUsed(file)
  return file
}

async function writeRoot(root: string, format: RootFormat, path: string): Promise<void> {
  // Where somebody other than root has unpacked the image, all of it is theirs.
  const owner = process.getuid?.() === 0 ? 'kept' : 'root'
  if (format === 'ext4') await writeExt4(root, path, { owner })
  const file = await open(path, format === 'ext4' ? 'r+' : 'wx', 0o644)
  await using _close = { [Symbol.asyncDispose]: () => file.close() }
  if (format === 'erofs')
    await file.truncate(
      await writeErofs([{ source: root, path: '.' }], file, { owner, maxBytes: maxRootBytes }),
    )
  // What stands at its place is whole, also after the host has lost its power.
  await file.datasync()
}

async function markUsed(file: string): Promise<void> {
  const now = Date.now()
  if (now - (await stat(file)).mtimeMs > usedEveryMs) await utimes(file, now / 1_000, now / 1_000)
}

async function makeRoom(folder: string, newest: string): Promise<void> {
  const drives = await Promise.all(
    (await readdir(folder)).map(async (name) => {
      const file = join(folder, name)
      const there = await stat(file).catch(() => undefined)
      return { file, used: there?.mtimeMs ?? 0, bytes: (there?.blocks ?? 0) * 512 }
    }),
  )
  let total = drives.reduce((sum, { bytes }) => sum + bytes, 0)
  for (const { file, used, bytes } of drives.sort((a, b) => a.used - b.used)) {
    if (total <= budgetBytes || Date.now() - used < keptMs) return
    if (file === newest) continue
    await rm(file, { force: true })
    total -= bytes
  }
}

/**
 * Writes an erofs with `mounts` into the file of a job drive, which is blank and keeps its length. All of it is
 * root's; links stay as they are. A virtual machine may have the file open, but must not have read from it.
 *
 * @returns bytes from the beginning of the file on
 * @throws ErofsError where the file has no room for them, or two of them meet; nothing is written then
 */
export async function writeJobDrive(mounts: readonly ErofsSource[], file: string): Promise<number> {
  const drive = await open(file, constants.O_RDWR | constants.O_NOFOLLOW)
  await using _close = { [Symbol.asyncDispose]: () => drive.close() }
  return await writeErofs(mounts, drive, { owner: 'root', maxBytes: (await drive.stat()).size })
}
