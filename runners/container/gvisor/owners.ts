/**
 * Whose boxes are whose, and the removal of what dead processes left. An owner’s record is written before anything of
 * it is made and removed after all of it: what a record does not name is not ours.
 */
import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { startTime, thisBoot, thisPidNamespace } from '../../../shared/process-identity.ts'
import { Cgroup, type Hierarchy } from './cgroups.ts'

const Owner = z.object({
  name: z.string().regex(/^[A-Za-z0-9_.-]+$/),
  pid: z.int().positive(),
  /** proc(5), field 22: with the pid it names one process of a boot for good. */
  started: z.string(),
  /** Pids mean nothing in another boot, or in another namespace. */
  boot: z.string(),
  namespace: z.string(),
  /** Path of the group that its boxes’ groups are in. */
  cgroup: z.string().regex(/^\/(?!.*\.\.).+$/),
})
type Owner = z.infer<typeof Owner>

const recordSuffix = '.owner.json'

/** When in doubt: no. */
function isDead({ pid, started, boot, namespace }: Owner): boolean {
  if (boot !== thisBoot()) return true
  return namespace === thisPidNamespace() && startTime(pid) !== started
}

/** Says that this process owns `<stateDir>/<name>` and the group `cgroup`. */
export async function recordOwner(stateDir: string, name: string, cgroup: string): Promise<void> {
  const { pid } = process
  const record: Owner = Owner.parse({
    ...{ name, pid, cgroup },
    started: startTime(pid) ?? '',
    boot: thisBoot(),
    namespace: thisPidNamespace(),
  })
  const file = join(stateDir, `${name}${recordSuffix}`)
  await writeFile(`${file}.new`, JSON.stringify(record))
  await rename(`${file}.new`, file)
  await mkdir(join(stateDir, name), { mode: 0o700 })
}

/** Everything of an owner: processes, groups, files, and the record of it. Throws where something resists. */
export async function removeOwner(
  stateDir: string,
  hierarchy: Hierarchy,
  { name, cgroup }: Pick<Owner, 'name' | 'cgroup'>,
  more: (name: string) => Promise<void> = async () => {},
): Promise<void> {
  await new Cgroup(hierarchy, cgroup).removeTree()
  await more(name)
  await rm(join(stateDir, name), { recursive: true, force: true })
  await rm(join(stateDir, `${name}${recordSuffix}`), { force: true })
}

/**
 * Removes what owners that no longer live have left: first their processes, then what `more` knows of, then files.
 * What resists stays, for the next time.
 */
export async function removeDeadOwners(
  stateDir: string,
  hierarchy: Hierarchy,
  more: (name: string) => Promise<void> = async () => {},
): Promise<void> {
  for (const entry of await readdir(stateDir)) {
    if (!entry.endsWith(recordSuffix)) continue
    const owner = await readOwner(join(stateDir, entry))
    if (owner === undefined || `${owner.name}${recordSuffix}` !== entry || !isDead(owner)) continue
    await removeOwner(stateDir, hierarchy, owner, more).catch(() => {})
  }
}

async function readOwner(file: string): Promise<Owner | undefined> {
  try {
    return Owner.parse(JSON.parse(await readFile(file, 'utf8')))
  } catch {
    return undefined
  }
}
