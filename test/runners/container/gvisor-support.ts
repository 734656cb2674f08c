import { randomBytes } from 'node:crypto'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { test } from 'uvu'
import type { Box, BoxLimits, Exit, Image } from '../../../runners/container/engine.ts'
import {
  createGvisor,
  type GvisorEngine,
  type GvisorOptions,
  type GvisorSpec,
} from '../../../runners/container/gvisor/index.ts'
import { findProgram } from '../../../runners/container/images/processes.ts'
import { skip } from '../../harness.ts'

const programs =
  'cat chmod dd df echo env false grep head hostname id kill ls mkdir mount nc ping readlink rm seq sh sleep stat sync tail tee touch true unshare wc yes'

/** Where the tests’ control groups are: not where those of a running vulcan are. */
export const cgroupParent = '/vulcan-test'

export interface GvisorHost extends AsyncDisposable {
  engine: GvisorEngine
  /** Busybox, and nothing else. */
  image: Image
  dir: string
  /** What it takes to make such an engine again. */
  options: GvisorOptions
}

export const noGvisor = (): string | undefined => {
  if (process.getuid?.() !== 0) return 'gVisor’s limits need root'
  const missing = ['runsc', 'busybox'].filter((name) => findProgram(name) === undefined)
  return missing.length === 0 ? undefined : `${missing.join(' and ')} not installed`
}

/** Without launchers that stand ready: what boxes leave behind is counted. */
export async function startGvisor(launchers = 0): Promise<GvisorHost> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-gvisor-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const image = await busyboxRoot(join(dir, 'root'))
  const options = { owner: newOwner(), stateDir: join(dir, 'state'), cgroupParent, launchers }
  const engine = scope.use(await createGvisor(options))
  const resources = scope.move()
  return { engine, image, dir, options, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

export const newOwner = () => `gvisor-${randomBytes(8).toString('hex')}`

/** One engine for all tests of a file: they differ in their boxes. */
export async function gvisorTests() {
  const reason = noGvisor()
  const host = reason === undefined ? await startGvisor() : undefined
  test.after(async () => {
    await host?.[Symbol.asyncDispose]()
  })
  return (name: string, run: (it: GvisorHost) => Promise<void>) => {
    if (host === undefined) skip(test, name, reason!)
    else test(name, () => run(host))
  }
}

export async function busyboxRoot(root: string): Promise<Image> {
  for (const folder of ['bin', 'etc', 'data', 'secret']) await mkdir(join(root, folder), { recursive: true })
  await copyFile(findProgram('busybox')!, join(root, 'bin', 'busybox'))
  for (const program of programs.split(' ')) await symlink('busybox', join(root, 'bin', program))
  await writeFile(join(root, 'etc', 'passwd'), 'root:x:0:0:root:/:/bin/sh\n')
  await writeFile(join(root, 'etc', 'hosts'), 'of the image\n')
  await writeFile(join(root, 'etc', 'resolv.conf'), 'of the image\n')
  await writeFile(join(root, 'data', 'kept'), 'of the image')
  await writeFile(join(root, 'bin', 'notes.txt'), 'no program')
  await writeFile(join(root, 'bin', 'junk'), 'no program either', { mode: 0o755 })
  return imageOf(root)
}

export const imageOf = (root: string): Image => ({
  digest: 'sha256:',
  layout: '',
  config: { entrypoint: [], cmd: [], env: {}, workingDir: '/', user: '' },
  root: async () => root,
  [Symbol.dispose]: () => {},
})

type Options = Partial<Omit<GvisorSpec, 'limits'>> & { limits?: Partial<BoxLimits> }

export function specOf(image: Image, argv: string[], { limits, ...options }: Options = {}): GvisorSpec {
  return {
    image,
    argv,
    env: { PATH: '/bin' },
    cwd: '/',
    user: { uid: 0, gid: 0, groups: [] },
    mounts: [],
    network: undefined,
    ...options,
    limits: { memoryMb: 64, cpu: 2, pids: 64, diskMb: 16, fileBytes: 16 * 2 ** 20, ...limits },
  }
}

export const sh = (script: string) => ['sh', '-c', script]

export interface Ran extends Exit {
  stdout: string
  stderr: string
}

/** From start to end, with nothing or `input` to read. */
export async function finish(box: Box, input = ''): Promise<Ran> {
  const [stdout, stderr] = [text(box.stdout), text(box.stderr)]
  await box.start()
  box.stdin.end(input)
  const exit = await box.exited
  return { ...exit, stdout: await stdout, stderr: await stderr }
}

/** Makes, runs and removes. */
export async function runIn(
  { engine, image }: Pick<GvisorHost, 'engine' | 'image'>,
  argv: string[],
  options: Options & { input?: string } = {},
): Promise<Ran> {
  const { input, ...rest } = options
  const box = await engine.create(specOf(image, argv, rest))
  try {
    return await finish(box, input)
  } finally {
    await box.remove()
  }
}

/** A box that has written its first piece of output, for which `script` must see. */
export async function running({ engine, image }: GvisorHost, script: string, options: Options = {}) {
  const box = await engine.create(specOf(image, sh(script), options))
  const complaint = text(box.stderr)
  const said = new Promise<void>((resolve) => box.stdout.once('data', () => resolve()))
  const silent = box.exited.then(async () => {
    throw new Error(`it ended without a word: ${await complaint}`)
  })
  try {
    await box.start()
    await Promise.race([said, silent])
    return box
  } catch (error) {
    await box.remove()
    throw error
  } finally {
    silent.catch(() => {})
  }
}

const cgroupRoots = existsSync('/sys/fs/cgroup/cgroup.controllers')
  ? ['/sys/fs/cgroup']
  : readdirSync('/sys/fs/cgroup').map((name) => `/sys/fs/cgroup/${name}`)

/** Everything on this host that belongs to an owner. */
export function traces({ options }: Pick<GvisorHost, 'options'>, owner = options.owner): string[] {
  const found: string[] = []
  for (const root of cgroupRoots) {
    const dir = `${root}${cgroupParent}/${owner}`
    if (existsSync(dir)) found.push(dir, ...subdirectories(dir))
  }
  const mine = `${options.stateDir}/${owner}`
  if (existsSync(mine))
    found.push(
      ...readdirSync(mine)
        .filter((name) => /^b\d/.test(name))
        .map((name) => `${mine}/${name}`),
    )
  if (existsSync(`${mine}.owner.json`)) found.push(`${mine}.owner.json`)
  for (const line of readFileSync('/proc/self/mounts', 'utf8').split('\n'))
    if (line.includes(owner)) found.push(`mount ${line}`)
  found.push(...processesOf(owner).map((pid) => `process ${pid}`))
  return found
}

const subdirectories = (dir: string) =>
  readdirSync(dir, { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map((entry) => join(dir, entry.name))

/** Processes with an owner’s paths among their arguments, or in one of its groups. */
export const processesOf = (owner: string): number[] =>
  readdirSync('/proc').flatMap((name) => {
    if (!/^\d+$/.test(name) || Number(name) === process.pid) return []
    try {
      const ours = ['cmdline', 'cgroup'].some((file) =>
        readFileSync(`/proc/${name}/${file}`, 'latin1').includes(`/${owner}`),
      )
      const stat = readFileSync(`/proc/${name}/stat`, 'latin1')
      const isZombie = stat.slice(stat.lastIndexOf(')') + 2).startsWith('Z')
      return ours && !isZombie ? [Number(name)] : []
    } catch {
      return []
    }
  })
