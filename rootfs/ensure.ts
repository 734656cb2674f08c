/** Makes what is missing of the machines' parts; fetches from Debian what they are made of. */
import { readdir, rm, stat, utimes } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { buildAgent } from './agent.ts'
import { ensureInitramfs } from './initramfs.ts'
import { ensurePackagedKernel } from './packaged-kernel.ts'
import { type Kernel, type PartsKind, partsKinds, readParts, writeParts } from './parts.ts'
import { replaceFile, storeOf, takeTurn } from './store.ts'
import { comesUp } from './trial.ts'

export interface EnsureOptions {
  cacheDir: string
  log: (line: string) => void
  /** Our own kernel, where it is to be used, and an erofs root drive to try it with. */
  own?: { kernel: Kernel; root: string }
}

/** How long a kernel counts as current before somebody looks for a newer package, ms. */
const freshMs = 7 * 24 * 3_600_000
/** What has been replaced is kept for so long: a runner that has begun with it starts machines from it, ms. */
const keptMs = 7 * 24 * 3_600_000
/** Its mtime is the last look for a newer kernel. */
const looked = 'parts/looked'

/**
 * The agent, Debian's kernel and the initramfs for each kernel that is there. Quick where nothing is to be done; a
 * newer kernel is looked for once a week.
 *
 * @throws Error where the agent cannot be compiled, where there is no kernel and none can be had, or where no machine
 *   starts with our own
 */
export async function ensureMachineParts(options: EnsureOptions): Promise<void> {
  const { cacheDir } = options
  using _turn = await takeTurn(cacheDir, 'parts')
  const agent = await buildAgent(options)
  const packaged = await packagedKernel(options)
  await put('packaged', packaged.kernel, agent, options)
  if (packaged.isNew) await replaceFile(cacheDir, looked, '')
  const own = await ownKernel(options, agent)
  if (own) await put('own', own, agent, options)
  await removeReplaced(cacheDir)
}

/** One that machines do not start with yet has to prove that they would. */
async function ownKernel(
  { cacheDir, log, own }: EnsureOptions,
  agent: { path: string },
): Promise<Kernel | undefined> {
  const now = (await readParts(cacheDir, 'own'))?.kernel
  if (own === undefined || own.kernel.vmlinux === now?.vmlinux) return now
  const { label, vmlinux } = own.kernel
  log(`kernel: starting a machine with ${label}`)
  const initramfs = await ensureInitramfs(cacheDir, { agent: agent.path, modules: own.kernel.modules })
  if (await comesUp({ kernel: vmlinux, initramfs, root: own.root })) return own.kernel
  throw new Error(`${label} starts no machine here; others stay in use`)
}

/** Has the parts of this kind name `kernel` and an initramfs with the agent. */
async function put(
  kind: PartsKind,
  kernel: Kernel,
  agent: { path: string; sha256: string },
  { cacheDir, log }: EnsureOptions,
): Promise<void> {
  const now = await readParts(cacheDir, kind)
  if (now?.agent === agent.sha256 && now.kernel.vmlinux === kernel.vmlinux) return
  // From now on they count as replaced.
  const touched = now ? [dirname(now.kernel.vmlinux), now.initramfs] : []
  for (const path of touched) await utimes(path, new Date(), new Date())
  const initramfs = await ensureInitramfs(cacheDir, { agent: agent.path, modules: kernel.modules })
  await writeParts(cacheDir, kind, { kernel, initramfs, agent: agent.sha256 })
  log(`machines: ${kernel.label} with the agent ${agent.sha256.slice(0, 8)}`)
}

async function packagedKernel({ cacheDir, log }: EnsureOptions): Promise<{ kernel: Kernel; isNew: boolean }> {
  const now = await readParts(cacheDir, 'packaged')
  const last = await stat(join(storeOf(cacheDir), looked)).catch(() => undefined)
  if (now && last && Date.now() - last.mtimeMs < freshMs) return { kernel: now.kernel, isNew: false }
  try {
    return { kernel: await ensurePackagedKernel(cacheDir, log), isNew: true }
  } catch (error) {
    if (now === undefined) throw error
    log(`kernel: no newer one could be looked for: ${(error as Error).message}`)
    return { kernel: now.kernel, isNew: false }
  }
}

async function removeReplaced(cacheDir: string): Promise<void> {
  const named = new Set<string>()
  for (const kind of partsKinds) {
    const parts = await readParts(cacheDir, kind)
    if (parts) named.add(dirname(parts.kernel.vmlinux)).add(parts.initramfs)
  }
  for (const folder of ['kernels', 'initramfs']) {
    const directory = join(storeOf(cacheDir), folder)
    for (const name of await readdir(directory).catch(() => [])) {
      const path = join(directory, name)
      if (!named.has(path) && Date.now() - (await stat(path)).mtimeMs > keptMs)
        await rm(path, { recursive: true, force: true })
    }
  }
}
