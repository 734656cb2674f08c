/** The first root file system of a machine: the agent, and the modules that the kernel needs to find its drives. */
import { createHash } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type CpioEntry, writeCpio } from './cpio.ts'
import { makeOnce } from './store.ts'

const types = { file: 0o100000, directory: 0o040000, character: 0o020000 }
const directories = ['dev', 'proc', 'root', 'run', 'sys', 'tmp']

export interface InitramfsContent {
  /** Path of the agent's binary, which becomes `/init`. */
  agent: string
  /** Directory with kernel modules and their `order`; undefined for a kernel that needs none. */
  modules: string | undefined
}

/**
 * Makes `initramfs/<hash>.cpio` unless it is there: `/init`, `/dev/console`, empty directories, and `/modules` with
 * the modules and `order`, the names of their files in the order in which they are loaded, one a line.
 *
 * @returns its path
 */
export async function ensureInitramfs(cacheDir: string, content: InitramfsContent): Promise<string> {
  const bytes = writeCpio(await entriesOf(content))
  const hash = createHash('sha256').update(bytes).digest('hex').slice(0, 32)
  return makeOnce(cacheDir, `initramfs/${hash}.cpio`, (path) => writeFile(path, bytes))
}

async function entriesOf({ agent, modules }: InitramfsContent): Promise<CpioEntry[]> {
  const entries: CpioEntry[] = [
    ...directories.map((path) => ({ path, mode: types.directory | 0o755 })),
    { path: 'dev/console', mode: types.character | 0o600, device: { major: 5, minor: 1 } },
    { path: 'init', mode: types.file | 0o755, content: await readFile(agent) },
  ]
  if (modules === undefined) return entries
  entries.push({ path: 'modules', mode: types.directory | 0o755 })
  for (const name of ['order', ...(await orderOf(modules))].sort())
    entries.push({
      path: `modules/${name}`,
      mode: types.file | 0o644,
      content: await readFile(join(modules, name)),
    })
  return entries
}

async function orderOf(modules: string): Promise<string[]> {
  const text = await readFile(join(modules, 'order'), 'utf8')
  return text.split('\n').filter(Boolean)
}
