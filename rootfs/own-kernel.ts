/** Our own kernel for guests: Debian's source of Linux with `microvm.config`, built without root. */
import { execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { promisify } from 'node:util'
import { type DebianPackage, openDebian, unpackPackage } from '../scripts/debian.ts'
import { type Kernel, readParts } from './parts.ts'
import { makeOnce, replaceFile, storeOf, temporaryPath } from './store.ts'

const execute = promisify(execFile)

const suites = ['bookworm', 'bookworm-security']
const sourcePackage = 'linux-source-6.12'
const fragmentFile = join(import.meta.dirname, 'microvm.config')
/** How long a source counts as current before somebody looks for a newer one, ms. */
const freshMs = 7 * 24 * 3_600_000
const progressMs = 15_000
const stepTimeoutMs = 120_000
/** Its mtime is the last look for a newer source; it holds what the kernel was made with besides. */
const looked = 'parts/looked-own'

export interface OwnKernelOptions {
  cacheDir: string
  log: (line: string) => void
}

/**
 * Builds it where it is missing, or where source, fragment or compiler have changed: some minutes on few cores.
 *
 * @throws DebianError, or Error with what the build said last
 */
export async function ensureOwnKernel({ cacheDir, log }: OwnKernelOptions): Promise<Kernel> {
  const fragment = await readFile(fragmentFile, 'utf8')
  const { stdout } = await execute('gcc', ['--version'], { timeout: stepTimeoutMs })
  const recipe = hashOf([fragment, stdout.split('\n')[0]!])
  const now = await readParts(cacheDir, 'own')
  if (now && (await isFresh(cacheDir, recipe))) return now.kernel

  await using temporary = await temporaryPath(cacheDir)
  const work = temporary.path
  await mkdir(work)
  await using archive = await openDebian(suites, work)
  const [source] = await archive.find([sourcePackage])
  const { version, sha256 } = source!
  const directory = await makeOnce(cacheDir, `kernels/own-${hashOf([recipe, sha256])}`, async (path) => {
    log(`kernel: fetching ${sourcePackage} ${version} of Debian (150 MB)`)
    const [file] = await archive.download([source!], work)
    const tree = await unpackSource(file!, work)
    await configure(tree, fragment)
    await build(tree, source!, log)
    await mkdir(path)
    await execute('strip', ['--strip-all', '-o', join(path, 'vmlinux'), join(tree, 'vmlinux')])
    await rename(join(tree, '.config'), join(path, 'config'))
  })
  await replaceFile(cacheDir, looked, recipe)
  return {
    label: `Linux ${version} (vulcan)`,
    vmlinux: join(directory, 'vmlinux'),
    bzImage: undefined,
    modules: undefined,
  }
}

const hashOf = (parts: readonly string[]) =>
  createHash('sha256').update(JSON.stringify(parts)).digest('hex').slice(0, 16)

async function isFresh(cacheDir: string, recipe: string): Promise<boolean> {
  const file = join(storeOf(cacheDir), looked)
  const last = await stat(file).catch(() => undefined)
  if (last === undefined || Date.now() - last.mtimeMs > freshMs) return false
  return (await readFile(file, 'utf8')) === recipe
}

/** The package holds an archive. */
async function unpackSource(file: string, work: string): Promise<string> {
  const root = join(work, 'package')
  await mkdir(root)
  await unpackPackage(file, root, ['./usr/share'])
  await rm(file)
  const archive = join(root, 'usr/src', `${sourcePackage}.tar.xz`)
  await execute('tar', ['--extract', '--xz', '--no-same-owner', '--directory', work, '--file', archive], {
    timeout: 10 * stepTimeoutMs,
  })
  await rm(root, { recursive: true })
  return join(work, sourcePackage)
}

/** The same inputs give the same kernel: it names no machine, user or hour. */
const environment = {
  PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
  LC_ALL: 'C',
  KBUILD_BUILD_TIMESTAMP: '@0',
  KBUILD_BUILD_USER: 'vulcan',
  KBUILD_BUILD_HOST: 'vulcan',
}

async function configure(tree: string, fragment: string): Promise<void> {
  await writeFile(join(tree, 'microvm.config'), fragment)
  const options = { cwd: tree, env: environment, timeout: stepTimeoutMs, maxBuffer: 16 << 20 }
  await execute('make', ['tinyconfig'], options)
  await execute('scripts/kconfig/merge_config.sh', ['-m', '.config', 'microvm.config'], options)
  await execute('make', ['olddefconfig'], options)
  const config = new Set((await readFile(join(tree, '.config'), 'utf8')).split('\n'))
  const lost = fragment.split('\n').filter((line) => line.startsWith('CONFIG_') && !config.has(line))
  if (lost.length > 0) throw new Error(`this source does not take ${lost.join(', ')}`)
}

const stopSignals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

async function build(tree: string, source: DebianPackage, log: (line: string) => void): Promise<void> {
  const began = performance.now()
  const seconds = () => Math.round((performance.now() - began) / 1_000)
  log(`kernel: building ${source.name} ${source.version} (some minutes on few cores)`)
  // The machine stays usable meanwhile.
  const child = spawn('nice', ['-n', '15', 'make', `-j${availableParallelism()}`, 'vmlinux'], {
    cwd: tree,
    env: environment,
    stdio: ['ignore', 'pipe', 'pipe'],
    // A process group of its own: make has many below it.
    detached: true,
  })
  const stop = () => {
    try {
      process.kill(-child.pid!, 'SIGKILL')
    } catch {
      // It has ended.
    }
  }
  for (const name of stopSignals) process.once(name, stop)
  let steps = 0
  let said = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    said = (said + text).slice(-2_000)
  })
  createInterface({ input: child.stdout }).on('line', () => steps++)
  const timer = setInterval(() => log(`kernel: ${steps} steps in ${seconds()} s`), progressMs)
  try {
    const [code] = await once(child, 'close')
    if (code !== 0 || !existsSync(join(tree, 'vmlinux')))
      throw new Error(`the kernel could not be built: ${said.trim().split('\n').slice(-3).join(' ')}`)
  } finally {
    clearInterval(timer)
    for (const name of stopSignals) process.off(name, stop)
  }
  log(`kernel: built in ${seconds()} s`)
}
