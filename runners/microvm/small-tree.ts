/** Directories that are small enough to be sent file by file. */
import { lstat, readdir, readFile, readlink } from 'node:fs/promises'
import { join } from 'node:path'
import type { PutHeader } from '../../shared/machine.ts'

export type SmallTree = { header: PutHeader; content?: Uint8Array }[]

/** One with more is better off on a drive: it is read there as it is needed. */
const maxEntries = 64
const maxBytes = 256 * 1024

/** A file or directory as it is to be at `target`; undefined where it is too large. Rejects where it cannot be read. */
export async function smallTree(source: string, target: string): Promise<SmallTree | undefined> {
  const tree: SmallTree = []
  let bytes = 0
  const add = async (from: string, path: string): Promise<boolean> => {
    const stat = await lstat(from)
    if (tree.length >= maxEntries) return false
    if (stat.isSymbolicLink()) {
      tree.push({ header: { path, kind: 'link', to: await readlink(from), mode: 0o777 } })
      return true
    }
    if (stat.isDirectory()) {
      tree.push({ header: { path, kind: 'directory', mode: 0o755 } })
      for (const name of (await readdir(from)).sort())
        if (!(await add(join(from, name), join(path, name)))) return false
      return true
    }
    bytes += stat.size
    if (!stat.isFile() || bytes > maxBytes) return false
    const mode = (stat.mode & 0o111) === 0 ? 0o644 : 0o755
    tree.push({ header: { path, kind: 'file', mode }, content: await readFile(from) })
    return true
  }
  return (await add(source, target)) ? tree : undefined
}
