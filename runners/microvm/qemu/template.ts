/** What a machine is restored from: a directory with its memory, the state of its devices, and what they go with. */
import { execFile } from 'node:child_process'
import { chmod, chown, open, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { z } from 'zod'
import { programsEnv } from '../../container/gvisor/programs.ts'
import { MachineError } from '../driver.ts'

const run = promisify(execFile)

const Manifest = z.object({
  /** What it can be restored by: QEMU, accelerator, processor. Anything else would be another machine. */
  model: z.string(),
  memory: z.enum(['file', 'stream']),
  /** Of the memory, by which a change would show. */
  changed_ns: z.string().nullable(),
})
export type Manifest = z.infer<typeof Manifest>

export const memoryFile = (dir: string) => join(dir, 'memory')
export const stateFile = (dir: string) => join(dir, 'state')
const manifestFile = (dir: string) => join(dir, 'template.json')

/** The longest a copy to another file system may take, ms. */
const copyMs = 120_000

/** Makes the memory of a machine that is gone that of a template. `mode`: what machines that are restored need of it. */
export async function keepMemory(file: string, dir: string, mode: number): Promise<void> {
  const kept = memoryFile(dir)
  try {
    await rename(file, kept)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EXDEV') throw error
    await run('cp', ['--sparse=always', '--', file, kept], { env: programsEnv, timeout: copyMs })
  }
  if (process.getuid?.() === 0) await chown(kept, 0, 0)
  await chmod(kept, mode)
}

/** The last thing written: what has none is no template. */
export async function writeManifest(
  dir: string,
  { model, memory }: Omit<Manifest, 'changed_ns'>,
): Promise<void> {
  for (const file of [stateFile(dir), ...(memory === 'file' ? [memoryFile(dir)] : [])]) await toDisk(file)
  const changed_ns = memory === 'file' ? await changeOf(dir) : null
  await writeFile(manifestFile(dir), JSON.stringify(Manifest.parse({ model, memory, changed_ns })))
}

/** Throws `MachineError` where there is none, or it is not what was written, or not for `model`. */
export async function readManifest(dir: string, model: string): Promise<Manifest> {
  let manifest: Manifest
  try {
    manifest = Manifest.parse(JSON.parse(await readFile(manifestFile(dir), 'utf8')))
    if (manifest.memory === 'file' && (await changeOf(dir)) !== manifest.changed_ns)
      throw new Error('its memory was changed')
  } catch (cause) {
    throw new MachineError(`the template cannot be used: ${(cause as Error).message}`, { cause })
  }
  if (manifest.model === model) return manifest
  throw new MachineError(`the template is for ${manifest.model}, and this is ${model}`)
}

const changeOf = async (dir: string) => String((await stat(memoryFile(dir), { bigint: true })).mtimeNs)

async function toDisk(path: string): Promise<void> {
  await using file = await open(path, 'r')
  await file.datasync()
}
