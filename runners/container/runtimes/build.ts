/**
 * Builds a runtime image from files that are there: Debian packages and Node's binary. It fetches nothing; the set-up
 * (`scripts/runtimes.ts`) brings the packages. The same inputs give the same manifest digest.
 */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { chmod, mkdir, mkdtemp, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { Digest } from '../../../shared/workload.ts'
import type { RuntimeName } from './index.ts'
import { addImage, addLayer, type Blob, blobFile, createLayout, layersOf, linkBlob } from './layout.ts'
import { recipes } from './recipes.ts'

const execute = promisify(execFile)

/** A Debian package that an image is made of. */
export type Ingredient = { name: string; version: string /** Hex. */; sha256: string }

export type BuildOptions = {
  name: RuntimeName
  /** The directory to make; its parent is there and holds what is written meanwhile. */
  layout: string
  /** Of the recipe, in its order, with the files on this machine. */
  packages: readonly (Ingredient & { path: string })[]
  /** Of the base image, for the list. */
  basePackages: readonly Ingredient[]
  /** As Debian names it. */
  architecture: string
  nodeBinary: string
  nodeVersion: string
  /** The layout of the image `base`, for every other one. */
  base: string | undefined
  /** Unpacks a package over what is in `root`, without what tar's patterns exclude. */
  unpack(file: string, root: string, exclude: readonly string[]): Promise<void>
}

/** Directories at the root that Debian has as links into /usr. */
const merged = ['bin', 'lib', 'lib64', 'sbin']

/** Of the code that decides what the images are like. */
export async function recipeDigest(): Promise<string> {
  const hash = createHash('sha256')
  for (const file of ['build.ts', 'layout.ts', 'recipes.ts'])
    hash.update(await readFile(join(import.meta.dirname, file)))
  return hash.digest('hex')
}

/** Names one build of an image by all that goes into it: `packages` are those of its layer and of the base image. */
export function runtimeKey(inputs: {
  name: RuntimeName
  recipe: string
  architecture: string
  nodeVersion: string
  packages: readonly Ingredient[]
}): string {
  const { name, recipe, architecture, nodeVersion, packages } = inputs
  const listed = packages.map((item) => [item.name, item.version, item.sha256])
  const text = JSON.stringify([name, recipe, architecture, nodeVersion, listed])
  return createHash('sha256').update(text).digest('hex').slice(0, 16)
}

/**
 * Makes the layout of one image. Needs Linux with tar and dpkg; root is not needed.
 *
 * @returns the manifest's digest
 * @throws what a step says; then there is no layout
 */
export async function buildRuntime(options: BuildOptions): Promise<Digest> {
  const { name, layout, packages, basePackages, base, architecture, nodeBinary, nodeVersion, unpack } =
    options
  const recipe = recipes[name]
  await using scope = new AsyncDisposableStack()
  const work = await mkdtemp(`${layout}.tmp-`)
  scope.defer(() => rm(work, { recursive: true, force: true }))
  // What this process writes into a tree must have the same modes whoever runs it.
  const umask = process.umask(0o022)
  scope.defer(() => void process.umask(umask))

  const next = join(work, 'layout')
  await createLayout(next)
  const layers: Blob[] = []
  if (base !== undefined)
    for (const layer of await layersOf(base)) {
      await linkBlob(next, base, layer)
      layers.push(layer)
    }

  const root = join(work, 'root')
  await mkdir(root)
  await chmod(root, 0o755)
  for (const directory of merged) {
    await mkdir(join(root, 'usr', directory), { recursive: true })
    await symlink(`usr/${directory}`, join(root, directory))
  }
  for (const { path } of packages) await unpack(path, root, recipe.exclude)
  await recipe.finish(root, { nodeBinary, base: once(() => unpackLayers(next, layers, join(work, 'base'))) })
  layers.push(await addLayer(next, root))

  const all = [...basePackages, ...packages]
  const digest = await addImage(next, {
    layers,
    architecture,
    env: recipe.env,
    cmd: recipe.cmd,
    user: '65534:65534',
    workingDir: '/workspace',
    labels: {
      'vulcan.runtime': name,
      ...(name === 'node' ? { 'vulcan.node': nodeVersion } : {}),
      'vulcan.packages': all.map((item) => `${item.name}=${item.version}`).join(' '),
    },
  })
  const lines = all.map((item) => `${item.name} ${item.version} ${item.sha256}\n`)
  await writeFile(join(next, 'packages.txt'), lines.join(''))
  await rename(next, layout)
  return digest
}

async function unpackLayers(layout: string, layers: readonly Blob[], root: string): Promise<string> {
  await mkdir(root)
  for (const layer of layers)
    await execute('tar', [
      '--extract',
      '--no-same-owner',
      '--file',
      blobFile(layout, layer),
      '--directory',
      root,
    ])
  return root
}

/** The same promise for every call. */
function once<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined
  return () => (made ??= make())
}
