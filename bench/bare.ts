/** The programs beneath, run by themselves: `true` on the root that has a POSIX shell and coreutils. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { openImageStore } from '../runners/container/images/store.ts'
import { findRuntime } from '../runners/container/runtimes/index.ts'
import { systemPath, which } from '../scripts/host-tools.ts'
import type { TestDocker } from '../test/dockerd.ts'

export interface Floor extends AsyncDisposable {
  /** As a person would type it. */
  name: string
  /** From spawn to exit. */
  run(): Promise<void>
}

async function baseImage(cacheDir: string) {
  const found = await findRuntime('base', cacheDir)
  if (found === undefined) throw new Error('the base runtime image was not built: npm run setup -- gvisor')
  return found
}

/** `runsc run` with no more than it needs: no network, no control groups, a read-only root, a small /tmp. */
export async function bareRunsc(cacheDir: string): Promise<Floor> {
  await using scope = new AsyncDisposableStack()
  const found = await baseImage(cacheDir)
  const images = scope.use(
    await openImageStore({
      dir: join(cacheDir, 'images'),
      insecureRegistries: [],
      imageDirectories: [found.layout],
      budgetMb: 20_480,
    }),
  )
  const reference = `oci:${found.layout}`
  const image = scope.use(await images.get({ kind: 'reference', reference }, AbortSignal.timeout(60_000)))
  const dir = await mkdtemp(join(tmpdir(), 'bench-runsc-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const tmpfs = (destination: string) => ({ destination, type: 'tmpfs', source: 'tmpfs' })
  const config = {
    ociVersion: '1.0.2',
    process: { user: { uid: 0, gid: 0 }, args: ['true'], env: ['PATH=/usr/bin:/bin'], cwd: '/' },
    root: { path: await image.root(), readonly: true },
    mounts: [{ destination: '/proc', type: 'proc', source: 'proc' }, tmpfs('/dev'), tmpfs('/tmp')],
    linux: { namespaces: ['pid', 'ipc', 'uts', 'mount', 'network'].map((type) => ({ type })) },
  }
  await writeFile(join(dir, 'config.json'), JSON.stringify(config))
  const runsc = programOf('runsc', systemPath)
  const flags = [
    '--root',
    join(dir, 'state'),
    '--platform',
    'systrap',
    '--network',
    'none',
    '--ignore-cgroups',
  ]
  let n = 0
  const held = scope.move()
  return {
    name: 'runsc run',
    run: () =>
      exits(runsc, [...flags, '--overlay2=none', 'run', '--bundle', dir, `bench-${process.pid}-${++n}`]),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  }
}

/** `docker run` by Debian’s client, of the image that vulcan’s own runs have loaded into the engine. */
export async function bareDocker(docker: TestDocker, cacheDir: string): Promise<Floor> {
  const { digest } = await baseImage(cacheDir)
  const image = `vulcan.local/image:${digest.slice('sha256:'.length)}`
  const client = programOf('docker', '/usr/bin')
  const flags = ['--rm', '--network', 'none', '--read-only']
  return {
    name: 'docker run',
    run: () => exits(client, ['--host', docker.host, 'run', ...flags, image, 'true']),
    [Symbol.asyncDispose]: async () => {},
  }
}

function programOf(name: string, path: string): string {
  const found = which(name, path)
  if (found === undefined) throw new Error(`there is no ${name} in ${path}`)
  return found
}

async function exits(program: string, args: string[]): Promise<void> {
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let complaint = ''
  child.stderr.setEncoding('utf8').on('data', (text) => {
    complaint += text
  })
  const [code] = await once(child, 'close')
  if (code !== 0) throw new Error(`${program} exited with ${code}: ${complaint}`)
}
