/** The runtime images (`runners/container/runtimes`) of this machine: fetches what they are made of and builds them. */
import {
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  stat,
  symlink,
  utimes,
  writeFile,
} from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { buildRuntime, recipeDigest, runtimeKey } from '../runners/container/runtimes/build.ts'
import { type RuntimeName, runtimesDirectory } from '../runners/container/runtimes/index.ts'
import { recipes, suites } from '../runners/container/runtimes/recipes.ts'
import { type DebianArchive, type DebianPackage, openDebian, unpackPackage } from './debian.ts'
import { LockedError, lockDirectory } from './lock.ts'

const nodePackage = resolve(import.meta.dirname, '../node_modules/node')
/** How long an image counts as current before somebody looks for newer packages. */
const freshMs = 7 * 24 * 3_600_000
const lockWaitMs = 15 * 60_000

export type BuildRuntimesOptions = {
  cacheDir: string
  log: (line: string) => void
}

/** What an image is made by, next to its packages. Stands in its layout as `made.json`, whose mtime is the last look. */
type Made = { recipe: string; architecture: string; nodeVersion: string }

/**
 * Builds the images that are missing, those whose recipe or Node has changed, and those for whose packages there are
 * newer versions; these are looked for once a week. Quick where there is nothing to do. An image stays in use until
 * its successor is whole, and is kept beside it for runners that have it open.
 *
 * @throws Error where packages cannot be had or a build fails; images that are there stay
 */
export async function buildRuntimes(
  names: readonly RuntimeName[],
  { cacheDir, log }: BuildRuntimesOptions,
): Promise<void> {
  const directory = runtimesDirectory(cacheDir)
  const made = await madeHere()
  if ((await staleAmong(names, directory, made)).length === 0) return
  await mkdir(directory, { recursive: true })
  using _lock = await lockInTurn(directory, log)
  // Whoever had the lock before may have built them.
  const stale = await staleAmong(names, directory, made)
  if (stale.length === 0) return

  await using scope = new AsyncDisposableStack()
  await removeLeftovers(directory)
  const downloads = await mkdtemp(join(directory, 'tmp-'))
  scope.defer(() => rm(downloads, { recursive: true, force: true }))
  log(`runtime images: looking for packages for ${stale.join(', ')}`)
  const archive = scope.use(await openDebian(suites, downloads))
  const build = (name: RuntimeName) => ensureImage({ name, directory, made, archive, downloads, log })
  // All others stand on it.
  await build('base')
  for (const name of stale.filter((name) => name !== 'base')) await build(name)
}

async function madeHere(): Promise<Made> {
  const architecture = { x64: 'amd64', arm64: 'arm64' }[process.arch as string]
  if (architecture === undefined) throw new Error(`there are no runtime images for ${process.arch}`)
  const { version } = JSON.parse(await readFile(join(nodePackage, 'package.json'), 'utf8')) as {
    version: string
  }
  return { recipe: await recipeDigest(), architecture, nodeVersion: version }
}

async function staleAmong(
  names: readonly RuntimeName[],
  directory: string,
  made: Made,
): Promise<RuntimeName[]> {
  const fresh = await Promise.all(
    names.map(async (name) => {
      const file = join(directory, name, 'made.json')
      const [text, looked] = await Promise.all([
        readFile(file, 'utf8').catch(() => ''),
        stat(file).catch(() => undefined),
      ])
      return text === JSON.stringify(made) && looked !== undefined && Date.now() - looked.mtimeMs < freshMs
    }),
  )
  return names.filter((_, index) => !fresh[index])
}

type ImageOptions = {
  name: RuntimeName
  directory: string
  made: Made
  archive: DebianArchive
  /** Files come here, and are found here by the next image. */
  downloads: string
  log: (line: string) => void
}

/** Builds an image unless one of these very inputs is there, and has its link point to it. */
async function ensureImage(options: ImageOptions): Promise<void> {
  const { name, directory, made, archive, downloads, log } = options
  const under = name === 'base' ? [] : await find(archive, 'base')
  const packages = await find(archive, name)
  const key = runtimeKey({ name, ...made, packages: [...under, ...packages] })
  const layout = join(directory, `${name}-${key}`)
  const began = performance.now()
  const isThere = await stat(layout).then(
    () => true,
    () => false,
  )
  if (!isThere) {
    log(`runtime image ${name}: fetching ${packages.length} packages, then building`)
    const paths = await archive.download(packages, downloads)
    await buildRuntime({
      name,
      layout,
      packages: packages.map((item, index) => ({ ...item, path: paths[index]! })),
      basePackages: under,
      architecture: made.architecture,
      nodeBinary: join(nodePackage, 'bin/node'),
      nodeVersion: made.nodeVersion,
      base: name === 'base' ? undefined : join(directory, 'base'),
      unpack: unpackPackage,
    })
  }
  const file = join(layout, 'made.json')
  await writeFile(file, JSON.stringify(made))
  await utimes(file, new Date(), new Date())
  const previous = await readlink(join(directory, name)).catch(() => undefined)
  await pointTo(join(directory, name), `${name}-${key}`)
  const isOld = new RegExp(`^${name}-[0-9a-f]{16}$`)
  for (const entry of await readdir(directory))
    if (isOld.test(entry) && entry !== `${name}-${key}` && entry !== previous)
      await rm(join(directory, entry), { recursive: true, force: true })
  const took = `${((performance.now() - began) / 1000).toFixed(1)} s`
  log(isThere ? `runtime image ${name}: is up to date` : `runtime image ${name}: built in ${took}`)
}

const find = (archive: DebianArchive, name: RuntimeName): Promise<DebianPackage[]> =>
  recipes[name].packages.length === 0 ? Promise.resolve([]) : archive.find(recipes[name].packages)

/** Makes or moves a symbolic link in one step. */
async function pointTo(link: string, target: string): Promise<void> {
  const beside = `${link}.new`
  await rm(beside, { force: true })
  await symlink(target, beside)
  await rename(beside, link)
}

/** What a build that was killed has left. Only the holder of the lock may. */
async function removeLeftovers(directory: string): Promise<void> {
  for (const entry of await readdir(directory))
    if (/^tmp-|\.tmp-/.test(entry)) await rm(join(directory, entry), { recursive: true, force: true })
}

/** @throws LockedError when another process builds for a quarter of an hour */
async function lockInTurn(directory: string, log: (line: string) => void): Promise<Disposable> {
  const deadline = performance.now() + lockWaitMs
  for (let told = false; ; told = true) {
    try {
      return lockDirectory(directory)
    } catch (error) {
      if (!(error instanceof LockedError) || performance.now() > deadline) throw error
      if (!told) log(`runtime images: process ${error.pid} is building them; waiting for it`)
    }
    await sleep(200)
  }
}
