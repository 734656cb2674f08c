/** Debian's kernel for virtual machines: fetched and unpacked below the cache directory, never installed. */
import { execFile } from 'node:child_process'
import { globSync } from 'node:fs'
import { copyFile, mkdir, readFile, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { promisify } from 'node:util'
import { zstdDecompressSync } from 'node:zlib'
import { openDebian, unpackPackage } from '../scripts/debian.ts'
import { vmlinuxOf } from './bzimage.ts'
import { dependenciesOf } from './elf.ts'
import type { Kernel } from './parts.ts'
import { makeOnce, temporaryPath } from './store.ts'

const execute = promisify(execFile)

const suites = ['bookworm', 'bookworm-security']
/** Depends on the package of the newest version. */
const metapackage = 'linux-image-cloud-amd64'
/** Counts what this file makes of one package. */
const recipe = 2

/** What a machine may need; those that are part of the kernel itself are left out. */
const wanted = [
  ...['virtio_mmio', 'virtio_blk', 'virtio_console', 'virtio_net', 'virtio-rng'],
  ...['vmw_vsock_virtio_transport', 'erofs', 'ext4', 'overlay'],
]

/**
 * Fetches the newest one unless it is here. Takes the network for some seconds even then.
 *
 * @throws DebianError, or Error where the package is not as expected
 */
export async function ensurePackagedKernel(cacheDir: string, log: (line: string) => void): Promise<Kernel> {
  await using temporary = await temporaryPath(cacheDir)
  const work = temporary.path
  await mkdir(work, { recursive: true })
  await using archive = await openDebian(suites, work)
  const [meta] = await archive.download(await archive.find([metapackage]), work)
  const { stdout } = await execute('dpkg-deb', ['--field', meta!, 'Depends'])
  const name = /^linux-image-[\w.+-]+/.exec(stdout)?.[0]
  if (name === undefined) throw new Error(`${metapackage} names no kernel`)
  const [item] = await archive.find([name])
  const { version, sha256 } = item!
  const place = `kernels/debian-${version.replace(/[^\w.-]/g, '_')}-${sha256.slice(0, 8)}-${recipe}`
  const directory = await makeOnce(cacheDir, place, async (path) => {
    log(`kernel: fetching ${name} ${version} of Debian`)
    const [file] = await archive.download([item!], work)
    const root = join(work, 'root')
    await mkdir(root)
    await unpackPackage(file!, root, ['./usr/share', './boot/System.map*'])
    await mkdir(path)
    await takeKernel(root, path)
  })
  return {
    label: `Linux ${version} (Debian)`,
    vmlinux: join(directory, 'vmlinux'),
    bzImage: join(directory, 'vmlinuz'),
    modules: join(directory, 'modules'),
  }
}

async function takeKernel(root: string, target: string): Promise<void> {
  const [image] = globSync('boot/vmlinuz-*', { cwd: root })
  if (image === undefined) throw new Error('the package holds no kernel')
  await copyFile(join(root, image), join(target, 'vmlinuz'))
  await writeFile(join(target, 'vmlinux'), vmlinuxOf(await readFile(join(root, image))))
  const modules = join(target, 'modules')
  await mkdir(modules)
  const order: string[] = []
  for (const { name, content } of await modulesIn(root)) {
    await writeFile(join(modules, `${name}.ko`), content)
    order.push(`${name}.ko\n`)
  }
  await writeFile(join(modules, 'order'), order.join(''))
}

/** Those that are wanted and all that they need, each behind what it needs. */
async function modulesIn(root: string): Promise<{ name: string; content: Buffer }[]> {
  const directory = join(root, 'lib/modules')
  const files = new Map(
    globSync('*/kernel/**/*.ko{,.xz,.zst}', { cwd: directory }).map((path) => [
      nameOf(path),
      join(directory, path),
    ]),
  )
  const found = new Map<string, Buffer>()
  const add = async (name: string): Promise<void> => {
    const file = files.get(plain(name))
    if (file === undefined || found.has(plain(name))) return
    const content = await readModule(file)
    for (const needed of dependenciesOf(content)) await add(needed)
    found.set(plain(name), content)
  }
  for (const name of wanted) await add(name)
  return [...found].map(([name, content]) => ({ name, content }))
}

/** The kernel takes a dash and an underscore in a module's name for the same. */
const plain = (name: string) => name.replaceAll('-', '_')
const nameOf = (path: string) => plain(basename(path).replace(/\.ko(\.\w+)?$/, ''))

async function readModule(file: string): Promise<Buffer> {
  if (file.endsWith('.zst')) return zstdDecompressSync(await readFile(file))
  if (!file.endsWith('.xz')) return readFile(file)
  const { stdout } = await execute('xz', ['--decompress', '--stdout', file], {
    encoding: 'buffer',
    maxBuffer: 64 << 20,
  })
  return stdout
}
