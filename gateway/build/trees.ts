/** What was installed for a project, kept by the digest of all that went into it: no project finds another’s. */
import { randomUUID } from 'node:crypto'
import { mkdir, mkdtemp, readdir, rename, rm, stat, utimes } from 'node:fs/promises'
import { dirname, join } from 'node:path'

/** What an install may take (ms). */
export const installMs = 120_000
/** How long what was chosen without a lock is taken again (ms). */
const unlockedMs = 10 * 60_000
/** Installed trees kept, and for how long (ms) after they were last used. */
const keptTrees = 40
const keptMs = 7 * 24 * 3_600_000

export interface Tree {
  /** Where all of its kind are kept. */
  dir: string
  key: string
  /** Of the folder that is installed. */
  name: string
  /** The same key always gives the same. */
  locked: boolean
}

/** The installed folder, to be used read-only; `make` puts it below the path it is given where it is not there yet. */
export async function kept(
  { dir, key, name, locked }: Tree,
  make: (out: string) => Promise<void>,
): Promise<string> {
  await mkdir(dir, { recursive: true, mode: 0o700 })
  const tree = join(dir, key)
  const folder = join(tree, name)
  const made = await stat(folder).catch(() => undefined)
  if (made !== undefined && (locked || Date.now() - made.mtimeMs < unlockedMs)) {
    // Says when it was last used.
    await utimes(tree, new Date(), new Date()).catch(() => {})
    return folder
  }
  const making = await mkdtemp(join(dir, '.making-'))
  try {
    await make(making)
    await mkdir(join(making, name), { recursive: true })
    await utimes(join(making, name), new Date(), new Date())
    if (made !== undefined) await putAside(tree)
    // Somebody else may have made the same meanwhile.
    await rename(making, tree).catch((error) => {
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error
    })
  } finally {
    await rm(making, { recursive: true, force: true })
  }
  void prune(dir, key).catch(() => {})
  return folder
}

/** Takes a tree out of sight; a build that uses it goes on with it, and a later `prune` removes it. */
async function putAside(tree: string): Promise<void> {
  const aside = join(dirname(tree), `.old-${randomUUID()}`)
  await utimes(tree, new Date(), new Date()).catch(() => {})
  await rename(tree, aside).catch(() => {})
}

/** Removes trees that were not used for long, and the oldest above the number that is kept. */
async function prune(dir: string, inUse: string): Promise<void> {
  const names = (await readdir(dir)).filter((name) => name !== inUse)
  const trees = await Promise.all(
    names.map(async (name) => ({ name, at: (await stat(join(dir, name)).catch(() => undefined))?.mtimeMs })),
  )
  const now = Date.now()
  const stay = new Set(
    trees
      .filter(({ name }) => !name.startsWith('.'))
      .sort((a, b) => (b.at ?? 0) - (a.at ?? 0))
      .filter(({ at }, i) => i < keptTrees && now - (at ?? 0) < keptMs)
      .map(({ name }) => name),
  )
  for (const { name, at } of trees) {
    // Put aside, or left by a crash in the midst of an install.
    if (name.startsWith('.')) {
      if (now - (at ?? now) > 10 * installMs) await rm(join(dir, name), { recursive: true, force: true })
    } else if (!stay.has(name)) await putAside(join(dir, name))
  }
}
