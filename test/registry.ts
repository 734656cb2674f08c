/**
 * Container images for tests: a real registry on loopback (Debian’s docker-registry), and images built by hand, so
 * that they can be as broken or hostile as a test wants.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync, statSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { architecture } from '../runners/container/images/manifests.ts'
import { tryPort } from '../scripts/ports.ts'
import type { Digest } from '../shared/workload.ts'

const execute = promisify(execFile)
const host = '127.0.0.1'

/** An entry of a layer. A file unless told; root’s, 0644 or 0755, of the year 2001. */
export interface Entry {
  path: string | Buffer
  type?: 'file' | 'directory' | 'symlink' | 'link' | 'char' | 'block' | 'fifo'
  content?: string | Buffer
  target?: string
  mode?: number
  uid?: number
  gid?: number
  mtime?: number
  /** Extended header records that go before it, such as `{ path: '…' }`. */
  pax?: Record<string, string>
  /** Its type in the header, as it stands there, whatever `type` says. */
  flag?: string
  /** What the header says, whatever follows. */
  size?: number
}

const flags = { file: '0', link: '1', symlink: '2', char: '3', block: '4', directory: '5', fifo: '6' }

function header(entry: Entry, name: Buffer, size: number): Buffer {
  const block = Buffer.alloc(512)
  const type = entry.type ?? 'file'
  const octal = (value: number, length: number) => `${value.toString(8).padStart(length - 1, '0')}\0`
  name.copy(block, 0, 0, 100)
  block.write(octal(entry.mode ?? (type === 'directory' ? 0o755 : 0o644), 8), 100)
  block.write(octal(entry.uid ?? 0, 8), 108)
  block.write(octal(entry.gid ?? 0, 8), 116)
  block.write(octal(entry.size ?? size, 12), 124)
  block.write(octal(entry.mtime ?? 1_000_000_000, 12), 136)
  block.write(entry.flag ?? flags[type], 156)
  block.write((entry.target ?? '').slice(0, 100), 157, 'latin1')
  block.write('ustar\x0000', 257)
  block.write(' '.repeat(8), 148)
  block.write(
    octal(
      block.reduce((sum, byte) => sum + byte, 0),
      8,
    ),
    148,
  )
  return block
}

const padded = (bytes: Buffer) => Buffer.concat([bytes, Buffer.alloc((512 - (bytes.length % 512)) % 512)])

function paxRecords(records: Record<string, string>): Buffer {
  const lines = Object.entries(records).map(([key, value]) => {
    const rest = Buffer.byteLength(` ${key}=${value}\n`)
    let length = rest + String(rest).length
    if (rest + String(length).length !== length) length++
    return `${length} ${key}=${value}\n`
  })
  return Buffer.from(lines.join(''))
}

/** A tar archive of these entries, in this order, as they are. */
export function tar(entries: readonly Entry[]): Buffer {
  const blocks = entries.flatMap((entry) => {
    const name = Buffer.from(entry.path)
    const records = { ...entry.pax }
    if (name.length > 100) records.path ??= name.toString()
    if ((entry.target ?? '').length > 100) records.linkpath ??= entry.target!
    const content = Buffer.from(entry.content ?? '')
    const before = Object.keys(records).length > 0 ? paxRecords(records) : undefined
    return [
      ...(before ? [header({ path: '', flag: 'x' }, Buffer.from('pax'), before.length), padded(before)] : []),
      header(entry, name, content.length),
      padded(content),
    ]
  })
  return Buffer.concat([...blocks, Buffer.alloc(1024)])
}

/** A file of this host, at the same or another place in the image. */
export const hostFile = (path: string, at = path): Entry => ({
  path: at,
  content: readFileSync(path),
  mode: statSync(path).mode & 0o777,
})

export interface LayerSpec {
  entries?: readonly Entry[]
  /** A whole archive, instead of entries. */
  tar?: Buffer
  compression?: 'none' | 'gzip' | 'zstd'
  /** Compressed bytes as they are to be, whatever the archive is. */
  blob?: Buffer
  diffId?: Digest
}

export interface ImageSpec {
  /** Lowest first; a list of entries is a gzipped layer. */
  layers: readonly (LayerSpec | readonly Entry[])[]
  /** `config` of the image’s config: Entrypoint, Cmd, Env, WorkingDir, User. */
  config?: Record<string, unknown>
  architecture?: string
  /** Docker’s media types instead of those of OCI. */
  docker?: boolean
}

export interface BuiltImage {
  digest: Digest
  manifest: Buffer
  config: Buffer
  /** All of it but the manifest, by hex digest. */
  blobs: Map<string, Buffer>
  layers: { digest: Digest; size: number }[]
  mediaType: string
}

export const digestOf = (bytes: Buffer): Digest =>
  `sha256:${createHash('sha256').update(bytes).digest('hex')}`
const hex = (digest: string) => digest.slice('sha256:'.length)

const compress = {
  none: (bytes: Buffer) => bytes,
  gzip: (bytes: Buffer) => gzipSync(bytes),
  zstd: zstdCompressSync,
}

/** An image in memory. */
export function buildImage(spec: ImageSpec): BuiltImage {
  const blobs = new Map<string, Buffer>()
  const keep = (bytes: Buffer) => {
    blobs.set(hex(digestOf(bytes)), bytes)
    return { digest: digestOf(bytes), size: bytes.length }
  }
  const oci = 'application/vnd.oci.image'
  const docker = 'application/vnd.docker'
  const layers = spec.layers.map((one) => {
    const layer: LayerSpec = Array.isArray(one) ? { entries: one } : (one as LayerSpec)
    const plain = layer.tar ?? tar(layer.entries ?? [])
    const compression = layer.compression ?? 'gzip'
    const suffix = compression === 'none' ? '' : `${spec.docker ? '.' : '+'}${compression}`
    const type = spec.docker ? `${docker}.image.rootfs.diff.tar` : `${oci}.layer.v1.tar`
    return {
      diffId: layer.diffId ?? digestOf(plain),
      descriptor: { mediaType: type + suffix, ...keep(layer.blob ?? compress[compression](plain)) },
    }
  })
  const config = Buffer.from(
    JSON.stringify({
      architecture: spec.architecture ?? architecture,
      os: 'linux',
      config: spec.config ?? {},
      rootfs: { type: 'layers', diff_ids: layers.map(({ diffId }) => diffId) },
      // Docker’s tools want one of each layer.
      history: layers.map(() => ({ created: '2001-09-09T01:46:40Z' })),
    }),
  )
  const configType = spec.docker ? `${docker}.container.image.v1+json` : `${oci}.config.v1+json`
  const mediaType = spec.docker ? `${docker}.distribution.manifest.v2+json` : `${oci}.manifest.v1+json`
  const manifest = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType,
      config: { mediaType: configType, ...keep(config) },
      layers: layers.map(({ descriptor }) => descriptor),
    }),
  )
  const descriptors = layers.map(({ descriptor: { digest, size } }) => ({ digest, size }))
  return { digest: digestOf(manifest), manifest, config, blobs, layers: descriptors, mediaType }
}

interface Named {
  image: BuiltImage
  tag?: string
  platform?: { os: string; architecture: string }
}

/** The index over images, as a layout or a registry has it. */
export function indexOf(images: readonly Named[]): Buffer {
  const manifests = images.map(({ image, tag, platform }) => ({
    mediaType: image.mediaType,
    digest: image.digest,
    size: image.manifest.length,
    ...(tag ? { annotations: { 'org.opencontainers.image.ref.name': tag } } : {}),
    ...(platform ? { platform } : {}),
  }))
  const mediaType = 'application/vnd.oci.image.index.v1+json'
  return Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType, manifests }))
}

/** The files of an OCI layout by their path. */
export function layoutFiles(images: readonly Named[], index = indexOf(images)): Map<string, Buffer> {
  const files = new Map([
    ['oci-layout', Buffer.from('{"imageLayoutVersion":"1.0.0"}')],
    ['index.json', index],
  ])
  for (const { image } of images) {
    files.set(`blobs/sha256/${hex(image.digest)}`, image.manifest)
    for (const [name, bytes] of image.blobs) files.set(`blobs/sha256/${name}`, bytes)
  }
  return files
}

/** Writes an OCI layout with one image into `dir`, which it makes. */
export async function writeLayout(dir: string, spec: ImageSpec, tag?: string): Promise<BuiltImage> {
  const image = buildImage(spec)
  await writeFiles(dir, layoutFiles([{ image, ...(tag === undefined ? {} : { tag }) }]))
  return image
}

export async function writeFiles(dir: string, files: ReadonlyMap<string, Buffer>): Promise<void> {
  await mkdir(join(dir, 'blobs/sha256'), { recursive: true })
  for (const [path, bytes] of files) await writeFile(join(dir, path), bytes)
}

/** What `docker save` wrote before it wrote OCI layouts too. */
export function dockerSave(image: BuiltImage): Buffer {
  const { config, layers } = JSON.parse(image.manifest.toString())
  const manifest = [
    {
      Config: `${hex(config.digest)}.json`,
      RepoTags: ['test:latest'],
      Layers: layers.map(({ digest }: { digest: string }) => `${hex(digest)}/layer.tar`),
    },
  ]
  return tar([
    ...layers.map(({ digest }: { digest: string }) => ({
      path: `${hex(digest)}/layer.tar`,
      content: image.blobs.get(hex(digest))!,
    })),
    { path: `${hex(config.digest)}.json`, content: image.config },
    { path: 'manifest.json', content: JSON.stringify(manifest) },
  ])
}

/** Who may read from a registry that was started with `credentials: true`. */
export const reader = { username: 'reader', password: 'correct horse' }
/** bcrypt of that password. */
const htpasswd = 'reader:$2a$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n'

export interface TestRegistry extends AsyncDisposable {
  /** `127.0.0.1:port`. */
  host: string
  /** Pushes with skopeo. The reference by tag, and the digest that the registry then has. */
  push(layout: string, name: string): Promise<{ reference: string; digest: Digest }>
  /** Puts bytes at a tag of a repository that has what they name; for lists and the like. */
  put(repository: string, tag: string, manifest: Buffer, mediaType: string): Promise<Digest>
  /** Requests so far whose method and path match. */
  requests(pattern: RegExp): Promise<number>
  stop(): Promise<void>
}

/** A real registry at a free port of loopback, its store gone when it is disposed of. */
export async function startRegistry(options: { credentials?: boolean } = {}): Promise<TestRegistry> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-registry-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const port = await tryPort(host, 0)
  await writeFile(join(dir, 'htpasswd'), htpasswd)
  const config = {
    version: 0.1,
    log: { accesslog: { disabled: false }, level: 'error' },
    storage: { filesystem: { rootdirectory: join(dir, 'store') }, delete: { enabled: true } },
    http: { addr: `${host}:${port}` },
    ...(options.credentials ? { auth: { htpasswd: { realm: 'test', path: join(dir, 'htpasswd') } } } : {}),
  }
  // JSON is YAML.
  await writeFile(join(dir, 'config.yml'), JSON.stringify(config))
  let log = ''
  const server: ChildProcess = spawn('docker-registry', ['serve', join(dir, 'config.yml')], {
    env: { PATH: '/usr/bin:/bin', HOME: dir, OTEL_TRACES_EXPORTER: 'none' },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  for (const stream of [server.stdout!, server.stderr!])
    stream.setEncoding('utf8').on('data', (text: string) => {
      log += text
    })
  const failed = new Promise<never>((_, reject) => server.once('error', reject))
  failed.catch(() => {})
  const stop = async () => {
    if (server.exitCode !== null || server.signalCode !== null || server.pid === undefined) return
    const exit = once(server, 'exit')
    server.kill('SIGKILL')
    await exit
  }
  scope.defer(stop)
  const authorization = options.credentials
    ? { authorization: `Basic ${Buffer.from(`${reader.username}:${reader.password}`).toString('base64')}` }
    : undefined
  const headers: Record<string, string> = { ...authorization }
  const url = `http://${host}:${port}/v2/`
  for (let tries = 0; ; tries++) {
    const answer = await Promise.race([fetch(url, { headers }).catch(() => undefined), failed])
    if (answer?.ok) break
    if (tries > 200) throw new Error(`docker-registry did not start:\n${log}`)
    await sleep(50)
  }
  const resources = scope.move()
  return {
    host: `${host}:${port}`,
    async push(layout, name) {
      const digestFile = join(dir, 'digest')
      const credentials = options.credentials
        ? ['--dest-username', reader.username, '--dest-password', reader.password]
        : []
      const reference = `${host}:${port}/${name}`
      await execute('skopeo', [
        ...['copy', '--quiet', '--insecure-policy', '--dest-tls-verify=false', '--preserve-digests'],
        ...[...credentials, '--digestfile', digestFile, `oci:${layout}`, `docker://${reference}`],
      ])
      return { reference, digest: (await readFile(digestFile, 'utf8')).trim() as Digest }
    },
    async put(repository, tag, manifest, mediaType) {
      const answer = await fetch(`${url}${repository}/manifests/${tag}`, {
        method: 'PUT',
        headers: { ...headers, 'content-type': mediaType },
        body: new Uint8Array(manifest),
      })
      if (!answer.ok) throw new Error(`the registry refused it: ${answer.status} ${await answer.text()}`)
      return digestOf(manifest)
    },
    async requests(pattern) {
      // Lines of access come a moment after the answer.
      await sleep(100)
      return log.split('\n').filter((line) => pattern.test(line)).length
    },
    stop,
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}
