import { createHash, randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { create } from 'tar'
import { createDocker, type DockerOptions } from '../../../runners/container/docker/index.ts'
import type { Box, BoxSpec, Engine, Exit, Image } from '../../../runners/container/engine.ts'
import type { Digest } from '../../../shared/workload.ts'
import { noDockerd, startDocker, type TestDocker } from '../../dockerd.ts'

const programs =
  'cat chmod dd echo env false head id kill ls mkdir nc readlink rm seq sh sha256sum sleep stat tail tee touch true wc wget yes'

export interface DockerHost extends AsyncDisposable {
  docker: TestDocker
  engine: Engine
  /** Busybox, and nothing else. */
  image: Image
  dir: string
  /** What it takes to make such an engine again. */
  options: DockerOptions
}

/** A Docker Engine of its own with our engine on it. */
export async function startEngine(options: Partial<DockerOptions> = {}): Promise<DockerHost> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-boxes-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const docker = scope.use(await startDocker())
  const image = await busyboxImage(join(dir, 'layout'))
  const all: DockerOptions = {
    host: docker.host,
    owner: `docker-${randomBytes(4).toString('hex')}`,
    stateDir: join(dir, 'state'),
    ...options,
  }
  const engine = scope.use(await createDocker(all))
  const resources = scope.move()
  return { docker, engine, image, dir, options: all, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

/** An OCI layout with one image of busybox. `extra` goes into its config, as a hostile one’s would. */
export async function busyboxImage(layout: string, extra: Record<string, unknown> = {}): Promise<Image> {
  const root = `${layout}.root`
  const blobs = join(layout, 'blobs', 'sha256')
  for (const folder of ['bin', 'etc', 'data']) await mkdir(join(root, folder), { recursive: true })
  await mkdir(blobs, { recursive: true })
  await copyFile('/bin/busybox', join(root, 'bin', 'busybox'))
  for (const program of programs.split(' ')) await symlink('busybox', join(root, 'bin', program))
  await writeFile(join(root, 'etc', 'passwd'), 'root:x:0:0:root:/:/bin/sh\n')
  await writeFile(join(root, 'data', 'kept'), 'of the image')
  await writeFile(join(root, 'bin', 'notes.txt'), 'no program')
  const archive = `${layout}.tar`
  await create({ cwd: root, file: archive, portable: true, noMtime: true }, ['bin', 'etc', 'data'])
  const put = async (mediaType: string, bytes: Buffer) => {
    const hex = createHash('sha256').update(bytes).digest('hex')
    await writeFile(join(blobs, hex), bytes)
    return { mediaType, digest: `sha256:${hex}` as Digest, size: bytes.length }
  }
  const json = (value: unknown) => Buffer.from(JSON.stringify(value))
  const tar = await readFile(archive)
  const layer = await put('application/vnd.oci.image.layer.v1.tar', tar)
  await rm(root, { recursive: true })
  await rm(archive)
  const config = await put(
    'application/vnd.oci.image.config.v1+json',
    json({
      architecture: process.arch === 'x64' ? 'amd64' : process.arch,
      os: 'linux',
      config: extra,
      rootfs: { type: 'layers', diff_ids: [layer.digest] },
    }),
  )
  const manifest = await put(
    'application/vnd.oci.image.manifest.v1+json',
    json({
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      config,
      layers: [layer],
    }),
  )
  await writeFile(join(layout, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }))
  await writeFile(join(layout, 'index.json'), json({ schemaVersion: 2, manifests: [manifest] }))
  return {
    digest: manifest.digest,
    layout,
    config: { entrypoint: [], cmd: [], env: {}, workingDir: '/', user: '' },
    root: async () => {
      throw new Error('not for Docker')
    },
    [Symbol.dispose]: () => {},
  }
}

export function specOf(image: Image, argv: string[], options: Partial<BoxSpec> = {}): BoxSpec {
  return {
    image,
    argv,
    env: { PATH: '/bin' },
    cwd: '/',
    user: { uid: 0, gid: 0, groups: [] },
    mounts: [],
    network: undefined,
    ...options,
    limits: { memoryMb: 64, cpu: 1, pids: 64, diskMb: 16, fileBytes: 16 * 2 ** 20, ...options.limits },
  }
}

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

/** Runs a command in a box of its own and removes it. */
export async function runIn(
  { engine, image }: Pick<DockerHost, 'engine' | 'image'>,
  argv: string[],
  options: Partial<BoxSpec> & { input?: string } = {},
): Promise<Ran> {
  const box = await engine.create(specOf(image, argv, options))
  try {
    return await finish(box, options.input)
  } finally {
    await box.remove()
  }
}

export const sh = (script: string) => ['/bin/sh', '-c', script]

/** Why there can be no boxes here; undefined: there can. */
export function noDocker(): string | undefined {
  if (!existsSync('/bin/busybox')) return 'there is no /bin/busybox: apt-get install busybox-static'
  return noDockerd()
}
